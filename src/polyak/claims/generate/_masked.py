"""What masked diffusion's claim runs on: Markov chains, noise of few bits, a small text model and one of binary digits."""

from __future__ import annotations

import math
import time
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from polyak.claims import _problems
from polyak.core.distances import energy_distance
from polyak.core.exact import MarkovChain
from polyak.generate.discrete import categorical, rounded_gumbel_law, truncated_gumbel_law
from polyak.generate.masked_diffusion import FirstHitting, MaskedAncestral, sentence_entropy
from polyak.generate.process import MaskedProcess
from polyak.generate.sampling import sample
from polyak.generate.tokens import TokenDenoiser
from polyak.lab import data

# -- Markov chains ---------------------------------------------------------------------------------------------------------


def chain(seed: int, symbols: int) -> MarkovChain:
    """A chain whose rows are softmax of normals of deviation 1.5: far from independence, and no symbol is forbidden."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(symbols + 1, symbols, generator=generator, dtype=torch.float64)
    law = (1.5 * drawn).softmax(1)
    return MarkovChain(law[0], law[1:])


def exact(law: MarkovChain) -> TokenDenoiser:
    """Its exact conditionals, as a network says them."""
    process = MaskedProcess(len(law.initial))

    def says(x: Tensor) -> Tensor:
        return law.conditionals(x.masked_fill(x == process.mask_id, -1)).log()

    return TokenDenoiser(says, process)


def judge(law: MarkovChain, x: Tensor) -> dict[str, float]:
    """Strings against the law: by triples in the middle (chi-square), and by their mean log-likelihood."""
    from scipy.stats import chi2

    n, length, symbols = *x.shape, len(law.initial)
    at = length // 2 - 1
    marginal = law.marginals(length)[at]
    want = (marginal[:, None, None] * law.transition[:, :, None] * law.transition).flatten() * n
    code = (x[:, at] * symbols + x[:, at + 1]) * symbols + x[:, at + 2]
    got = code.bincount(minlength=symbols**3).double()
    rare = want < 5
    if bool(rare.any()):
        want, got = (torch.cat([c[~rare], c[rare].sum()[None]]) for c in (want, got))
    statistic, freedom = ((got - want).square() / want).sum().item(), len(want) - 1
    log_p = law.log_prob(x)
    excess = -log_p.mean().item() - law.entropy(length).item()
    return {
        "p_value": float(chi2.sf(statistic, freedom)),
        "divergence": (statistic - freedom) / n,
        "variation": ((got - want).abs().sum() / 2 / n).item(),
        "excess": abs(excess) / (log_p.std().item() / math.sqrt(n)),
    }


def bound_gap(law: MarkovChain, length: int, n: int, form: str, generator: torch.Generator) -> float:
    """How far the mean loss of exact conditionals is from the entropy of the strings, in nats a symbol."""
    denoiser = exact(law)
    x = law.sample(length, n, generator=generator)
    return (
        abs(denoiser.process.nelbo(denoiser, x, form, generator=generator).mean().item() - law.entropy(length).item())
        / length
    )


# -- rounded noise ---------------------------------------------------------------------------------------------------------


def zipf(count: int) -> Tensor:
    """Probabilities in proportion to 1 / rank, float64."""
    weights = 1 / torch.arange(1, count + 1, dtype=torch.float64)
    return weights / weights.sum()


def entropy(p: Tensor) -> float:
    """In nats."""
    return -torch.special.xlogy(p, p).sum().item()


@lru_cache(maxsize=4)
def lost(count: int, steps: int, law: str) -> float:
    """By how much that law has less entropy than Zipf's of so many tokens, in nats."""
    p = zipf(count)
    return entropy(p) - entropy(revealed_law(p, steps, law))


@lru_cache(maxsize=4)
def unsurprised(count: int, steps: int) -> float:
    """By how much tokens of that law, with rounded noise, are less surprising than Zipf's, in nats."""
    p = zipf(count)
    return entropy(p) + (revealed_law(p, steps, "rounded") * p.log()).sum().item()


def revealed_law(p: Tensor, steps: int, law: str) -> Tensor:
    """The law of a token after ancestral sampling that draws reveal and token together, with single precision's noise.

    In step i of T a token that is hidden is revealed with probability ``1 / (T - i)``. Where they fall, what is drawn changes from
    step to step: many steps share one law, of the geometric middle of their probabilities.
    """
    total, left, i = torch.zeros_like(p), 1.0, 0
    while i < steps - 1:
        many = max(1, (steps - i) // 50)
        reveal = 1 / (steps - i - many // 2)
        if law == "rounded":
            drawn = rounded_gumbel_law(p, reveal=reveal)
        else:
            drawn = truncated_gumbel_law(torch.cat([reveal * p, p.new_tensor([1 - reveal])]))[:-1]
        stays = (1 - drawn.sum().item()) ** many
        total = total + drawn / drawn.sum() * (left * (1 - stays))
        left, i = left * stays, i + many
    return total + left * p


def few_bits(p: Tensor, n: int, bits: int, reveal: float, generator: torch.Generator) -> tuple[float, float]:
    """How far the count of revealed tokens is from what two laws say, in standard deviations; the noise has few bits.

    Returns:
        Of the law of rounded noise, and of that of conditioned noise.
    """
    weight = torch.cat([reveal * p, p.new_tensor([1 - reveal])])
    count = 0
    for rows in torch.full((n,), 1).split(100_000):
        u = torch.randint(2**bits, (len(rows), len(weight)), generator=generator).double() / 2**bits
        # The mask's own noise is fine-grained at its size, as in single precision.
        u[:, -1] = torch.rand(len(rows), generator=generator, dtype=torch.float64)
        race = -u.clamp(min=2.0**-60).log() / weight
        count += int((race.argmin(1) < len(p)).sum())
    laws = rounded_gumbel_law(p, bits, reveal=reveal).sum(), truncated_gumbel_law(weight, bits)[:-1].sum()
    return tuple(abs(count - n * q.item()) / math.sqrt(n * q.item()) for q in laws)  # type: ignore[return-value]


def surprise(p: Tensor, n: int, precision: str, generator: torch.Generator) -> float:
    """How far the mean of ``-log p`` over draws is from the entropy, in nats."""
    logits, total = p.log(), 0.0
    for rows in torch.full((n,), 1).split(2000):
        drawn = categorical(logits.expand(len(rows), -1), precision=precision, generator=generator)
        total -= logits[drawn].sum().item()
    return abs(total / n - entropy(p))


def after(p: Tensor, steps: int, n: int, precision: str, generator: torch.Generator) -> float:
    """The same of tokens that ancestral sampling in so many steps makes, from a network that says p whatever it sees."""
    denoiser = TokenDenoiser(lambda x: p.log().expand(*x.shape, -1), MaskedProcess(len(p)))
    solver = MaskedAncestral(steps, precision=precision)
    drawn = sample(denoiser, (1, n), solver=solver, generator=generator, check_finite=False)
    return abs(-p.log()[drawn].mean().item() - entropy(p))


class Table(nn.Module):
    """Logits of many tokens from a table: each position's, moved by the mean of what is visible."""

    def __init__(self, vocabulary: int, length: int, width: int) -> None:
        super().__init__()
        self.tokens = nn.Parameter(torch.randn(vocabulary + 1, width) / width**0.5)
        self.places = nn.Parameter(torch.randn(length, width))

    def forward(self, x: Tensor) -> Tensor:
        """(B, L) to (B, L, V)."""
        return (self.places + self.tokens[x].mean(1, keepdim=True)) @ self.tokens[:-1].T


@torch.no_grad()
def seconds(kind: str, vocabulary: int, length: int, steps: int, seed: int) -> dict[str, float]:
    """What one sequence takes, of many tokens; the network is a table, so that most of it is drawing."""
    model = _problems.seeded(lambda: Table(vocabulary, length, 16), seed, "cpu")
    denoiser = TokenDenoiser(model, MaskedProcess(vocabulary))
    generator = torch.Generator().manual_seed(seed)

    def run(solver: Any) -> tuple[float, int]:
        begin = time.perf_counter()
        _, info = sample(denoiser, (1, length), solver=solver, generator=generator, return_info=True)
        return time.perf_counter() - begin, info.nfe

    run(FirstHitting(steps=2))  # warms up
    took, calls = run(
        FirstHitting() if kind == "first" else MaskedAncestral(steps, precision="f32" if kind == "joint" else "f64")
    )
    return {"seconds": took, "calls": calls}


# -- trained networks ------------------------------------------------------------------------------------------------------


class TokenNet(nn.Module):
    """Convolutions over neighbours, then bidirectional transformer blocks; told a time, it adds its embedding."""

    def __init__(self, vocabulary: int, length: int, *, dim: int, depth: int, timed: bool) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary + 1, dim)
        nn.init.normal_(self.embed.weight, std=dim**-0.5)
        self.positions = nn.Parameter(torch.randn(length, dim) / dim**0.5)
        self.time = nn.Sequential(nn.Linear(8, dim), nn.GELU(), nn.Linear(dim, dim)) if timed else None
        self.near = nn.ModuleList(nn.Conv1d(dim, dim, 5, padding=2) for _ in range(2))
        self.blocks = nn.Sequential(*(_problems.Block(dim, 4, 2, length, causal=False) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, vocabulary)

    def forward(self, x: Tensor, t: Tensor | None = None) -> Tensor:
        """(B, L) to (B, L, V)."""
        h = self.embed(x) + self.positions
        if self.time is not None:
            assert t is not None
            angle = t[:, None] * math.pi * torch.arange(1, 5)
            h = h + self.time(torch.cat([angle.sin(), angle.cos()], 1))[:, None]
        for layer in self.near:
            h = h + layer(nn.functional.gelu(h).mT).mT
        return self.head(self.norm(self.blocks(h)))


class DigitNet(nn.Module):
    """A perceptron of 64 pixels that are 0, 1 or hidden."""

    def __init__(self, pixels: int, width: int) -> None:
        super().__init__()
        self.layers = _problems.dense(3 * pixels, width, width, 2 * pixels, activation=nn.GELU)

    def forward(self, x: Tensor) -> Tensor:
        """(B, L) to (B, L, 2)."""
        return self.layers(nn.functional.one_hot(x, 3).flatten(1).float()).view(*x.shape, 2)


def windows(tokens: Tensor, starts: Tensor, length: int) -> Tensor:
    """(B, length) of a text from where each row starts."""
    return tokens[starts[:, None] + torch.arange(length)]


@lru_cache(maxsize=1)
def text() -> tuple[Tensor, Tensor, int]:
    """What is trained on, the last tenth, and how many characters there are."""
    numbers, vocabulary = _problems._characters()
    tokens = torch.from_numpy(numbers)
    edge = len(tokens) * 9 // 10
    return tokens[:edge], tokens[edge:], vocabulary


@lru_cache(maxsize=1)
def digits() -> tuple[Tensor, Tensor]:
    """scikit-learn's digits as 64 pixels that are 0 or 1, in one random order: 1197 to train on, and 600 held out."""
    x = torch.from_numpy(data.digits()[0] > 7.5).long()
    x = x[torch.randperm(len(x), generator=torch.Generator().manual_seed(0))]
    return x[:-600], x[-600:]


@lru_cache(maxsize=2)
def trained(
    kind: str, seed: int, timed: bool, length: int, dim: int, depth: int, steps: int, batch: int, lr: float
) -> TokenDenoiser:
    """A denoiser of the text or of the digits, trained with the count loss; the same batches and masks, told the time or not."""
    train, vocabulary = (text()[0], text()[2]) if kind == "text" else (digits()[0], 2)

    def make() -> nn.Module:
        return (
            TokenNet(vocabulary, length, dim=dim, depth=depth, timed=timed) if kind == "text" else DigitNet(length, dim)
        )

    net = _problems.seeded(make, seed, "cpu")
    denoiser = TokenDenoiser(net, MaskedProcess(vocabulary), told="time" if timed else "nothing")
    optimizer = torch.optim.AdamW(net.parameters(), lr, betas=(0.9, 0.98), weight_decay=0.01)
    warm = max(1, steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda i: min(1.0, (i + 1) / warm) * 0.5 * (1 + math.cos(math.pi * i / steps))
    )
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        starts = torch.randint(len(train) - (length if kind == "text" else 0), (batch,), generator=generator)
        x = windows(train, starts, length) if kind == "text" else train[starts]
        loss = denoiser.process.nelbo(denoiser, x, generator=generator).mean() / length
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    net.eval().requires_grad_(False)
    return denoiser


@torch.no_grad()
def held_out_loss(denoiser: TokenDenoiser, kind: str, length: int, rows: int, rounds: int) -> float:
    """The bound on the last tenth of the text, or on the held-out digits, in nats a token; masks are the same for all."""
    generator = torch.Generator().manual_seed(0)
    total = 0.0
    for _ in range(rounds):
        if kind == "text":
            held = text()[1]
            x = windows(held, torch.randint(len(held) - length, (rows,), generator=generator), length)
        else:
            held = digits()[1]
            x = held[torch.randint(len(held), (rows,), generator=generator)]
        total += denoiser.process.nelbo(denoiser, x, generator=generator).mean().item() / length
    return total / rounds


def drawn(denoiser: TokenDenoiser, solver: Any, n: int, length: int, seed: int) -> tuple[Tensor, int]:
    """Samples, and the calls that one batch took."""
    generator = torch.Generator().manual_seed(1000 + seed)
    x, info = sample(denoiser, (n, length), solver=solver, generator=generator, return_info=True)
    return x, info.nfe


def triples(x: Tensor, vocabulary: int) -> Tensor:
    """The frequencies of three characters in a row: of (B, L) within rows, of (N,) in all."""
    code = (x[..., :-2] * vocabulary + x[..., 1:-1]) * vocabulary + x[..., 2:]
    count = code.flatten().bincount(minlength=vocabulary**3).double()
    return count / count.sum()


def text_distance(x: Tensor) -> dict[str, float]:
    """Half the L1 distance of the frequencies of triples from the held-out text's, and the entropy inside samples."""
    _, held, vocabulary = text()
    gap = (triples(x, vocabulary) - triples(held, vocabulary)).abs().sum().item() / 2
    return {"triples": gap, "variety": sentence_entropy(x).mean().item()}


def digit_distance(x: Tensor) -> float:
    """The energy distance of samples to the held-out digits."""
    return energy_distance(x.double(), digits()[1].double())
