"""Laws of discrete variables, networks that know one exactly, and trainings: for the claim of marginalization models."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from polyak.core.exact import Ising
from polyak.generate.marginalization import (
    MarginalizationModel,
    MLPDual,
    PersistentChain,
    consistency_loss,
    data_loss,
    energy_loss,
)
from polyak.lab import data
from polyak.lab.claim import Diverged

TEST = 360  # digits
COUPLING, FIELD = 0.2, 0.2  # the official code's sigma is 0.1, and it counts every bond twice


class Oracle(nn.Module):
    """A network that is a law over {1..K}^D: its marginals in a table, and its conditionals.

    Args:
        law: log p of all configurations, shape (K,) * D.
        noise: what is added to the table's entries and to logits, times standard normal numbers: an inconsistent network.
    """

    def __init__(self, law: Tensor, noise: float = 0.0, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.length, self.num_values = law.ndim, len(law)
        table = law
        for axis in range(law.ndim):  # entry 0 of an axis is the sum over its values
            table = torch.cat([table.logsumexp(axis, keepdim=True), table], axis)
        self.table = nn.Parameter(table + noise * torch.randn(table.shape, dtype=table.dtype, generator=generator))
        logits = torch.stack([self._conditional(table, axis) for axis in range(law.ndim)], -2)  # (K + 1,) * D, D, K
        self.tilts = nn.Parameter(logits + noise * torch.randn(logits.shape, dtype=law.dtype, generator=generator))

    def _conditional(self, table: Tensor, axis: int) -> Tensor:
        values = table.narrow(axis, 1, self.num_values).movedim(axis, -1)
        return values.unsqueeze(axis).expand(*table.shape, self.num_values)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        at = tuple(x.T)
        return self.table[at], self.tilts[at]


def random_law(length: int, num_values: int, generator: torch.Generator) -> Tensor:
    """log p of all configurations, float64."""
    law = torch.randn((num_values,) * length, dtype=torch.float64, generator=generator)
    return law - law.logsumexp(tuple(range(length)))


def everything(length: int, values: range) -> Tensor:
    """All configurations with these values, [n, D]."""
    return torch.tensor(list(itertools.product(values, repeat=length)))


def inconsistencies(model: MarginalizationModel) -> dict[str, float]:
    """How far a model is from one law, at its worst: over all that may be known, all orders, all values."""
    length, k = model.length, model.num_values
    complete, partial = everything(length, range(1, k + 1)), everything(length, range(k + 1))
    with torch.no_grad():
        orders = torch.tensor(list(itertools.permutations(range(length))))
        chains = torch.stack([model.log_prob(complete, "chain", one) for one in orders])
        f, one_step, sums = model.log_marginal(partial), [], []
        for j in range(length):
            here = partial[:, j] == 0
            after = torch.stack(
                [model.log_marginal(partial[here].index_fill(1, torch.tensor(j), v + 1)) for v in range(k)], 1
            )
            one_step.append(f[here, None] + model.conditional(partial[here], j)[:, 0] - after)
            sums.append(after.logsumexp(1) - f[here])
        total = model.log_prob(complete).logsumexp(0)
    return dict(
        error_of_law=_largest(*one_step),
        spread=_largest(chains - chains.mean(0)),
        sums=_largest(*sums),
        total=total.abs().item(),
    )


def _largest(*of: Tensor) -> float:
    return max(one.abs().max().item() for one in of)


def gradients(model: MarginalizationModel, target: Tensor) -> dict[str, float]:
    """Of the energy's loss beside that of the exact divergence, relative; and at the model that is the target, absolute.

    The chain holds every configuration as often as the model's law says, in multiples of one in 2^12, which that law is made
    to have: the loss's mean is then no estimate.
    """
    length, k = model.length, model.num_values
    states, draws = everything(length, range(1, k + 1)), 2**12
    with torch.no_grad():
        counts = (model.log_prob(states, "chain").exp() * draws).round().clamp(min=1)
        law = (counts / counts.sum()).log().reshape((k,) * length)
    rows = states.repeat_interleave(counts.long(), 0)
    chain = PersistentChain(len(rows), length, k)
    chain.x = rows

    def estimate(model: MarginalizationModel, log_f: Tensor) -> Tensor:
        table = dict(model.net.named_parameters())["table"]
        loss = energy_loss(model, lambda x: log_f[tuple((x - 1).T)], chain, alpha=0.0)
        (grad,) = torch.autograd.grad(loss, table)
        return grad[(slice(1, None),) * length]

    f = law.flatten().requires_grad_()
    log_q = f.log_softmax(0)
    divergence = (log_q.exp() * (log_q - target.flatten())).sum()
    (exact,) = torch.autograd.grad(divergence, f)
    q, r = law.flatten().exp(), (law - target).flatten()
    deviation = (q * (r - (q * r).sum()).square()).sum().mul(len(rows) / (len(rows) - 1)).sqrt()
    here = MarginalizationModel(Oracle(law.detach()), k, length)
    estimated = estimate(here, target).flatten() * deviation
    gradient = ((estimated - exact).abs().max() / exact.abs().max()).item()
    return dict(gradient=gradient, stationary=_largest(estimate(here, law.detach() + 3.0)))


@lru_cache(maxsize=1)
def digits() -> tuple[Tensor, Tensor]:
    """Binarized digits, values 1 and 2, [n, 64]: for training, and for the test."""
    x, _ = data.digits()
    x = (torch.from_numpy(x) > 7).long() + 1
    x = x[torch.randperm(len(x), generator=torch.Generator().manual_seed(0))]
    return x[TEST:], x[:TEST]


def _model(length: int, hidden: int, layers: int, seed: int) -> MarginalizationModel:
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        return MarginalizationModel(MLPDual(2, length, hidden, layers), 2, length)


def _minimize(loss: Callable[[], Tensor], parameters: Any, steps: int, lr: float, decay: bool) -> None:
    optimizer = torch.optim.Adam(parameters, lr, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda i: 0.5 * (1 + math.cos(math.pi * i / steps)) if decay else 1.0
    )
    for _ in range(steps):
        value = loss()
        optimizer.zero_grad(set_to_none=True)
        value.backward()
        optimizer.step()
        schedule.step()
    if not math.isfinite(value.item()):
        raise Diverged(f"the loss was {value.item()} at the last step")


def on_digits(
    seed: int, *, hidden: int, layers: int, steps: int, marginal_steps: int, batch: int, lr: float
) -> MarginalizationModel:
    """Conditionals trained on digits; and beside them marginals, by consistency alone."""
    train, _ = digits()
    generator = torch.Generator().manual_seed(seed)
    model = _model(train.shape[1], hidden, layers, seed)

    def rows() -> Tensor:
        return train[torch.randint(len(train), (batch,), generator=generator)]

    net: Any = model.net
    _minimize(lambda: data_loss(model, rows(), generator), net.of_conditionals.parameters(), steps, lr, True)
    net.of_conditionals.requires_grad_(False)
    if marginal_steps:
        _minimize(
            lambda: consistency_loss(model, rows(), generator), net.of_marginals.parameters(), marginal_steps, lr, True
        )
    return model


@torch.no_grad()
def likelihoods(model: MarginalizationModel, orders: int, batch: int, seed: int) -> dict[str, float]:
    """log p of test digits by one call, beside the average of chains in many orders; and the time that each takes."""
    _, test = digits()
    generator = torch.Generator().manual_seed(seed)
    chains = model.log_prob(test, "chain", orders, generator=generator)
    one_chain, one_call = model.log_prob(test, "chain", generator=generator), model.log_prob(test)
    some = test[:batch]
    chain_ms = milliseconds(lambda: model.log_prob(some, "chain", generator=generator), 5)
    call_ms = milliseconds(lambda: [model.log_prob(some) for _ in range(20)], 5) / 20
    return dict(
        pearson=_correlation(chains, one_call),
        spearman=_correlation(chains.argsort().argsort().float(), one_call.argsort().argsort().float()),
        pearson_chain=_correlation(chains, one_chain),
        gap=(one_call.mean() - chains.mean()).abs().item(),
        log_p=chains.mean().item(),
        speedup=chain_ms / call_ms,
    )


def _correlation(a: Tensor, b: Tensor) -> float:
    return torch.corrcoef(torch.stack([a, b]).double())[0, 1].item()


def spins(x: Tensor) -> Tensor:
    """Values 0 (unknown), 1, 2 as spins 0, -1, +1."""
    return torch.where(x == 0, 0, 2 * x - 3)


def passes(arm: str, length: int) -> int:
    """Of one configuration through one perceptron in a step: 4 to renew the chain; with gradients one counts as 3."""
    trained = {"arm_full": 3 * length, "arm_mc": 1 + 3, "arm_all": 1 + 3}
    return 4 + trained.get(arm, 3 * 4)


def on_energy(
    arm: str,
    seed: int,
    *,
    side: int,
    hidden: int,
    layers: int,
    batch: int,
    lr: float,
    budget: int,
    decay: bool,
    alpha: float,
) -> tuple[MarginalizationModel, Ising, float]:
    """A model trained on the Ising model of a torus with a budget of passes; and the milliseconds that one step took.

    All arms are trained on persistent chains, each renewed by the arm's own conditionals.
    """
    law, length = Ising(side, COUPLING, FIELD), side**2
    generator = torch.Generator().manual_seed(seed)
    model, chain = _model(length, hidden, layers, seed), PersistentChain(batch, length, 2, generator=generator)

    def log_f(x: Tensor) -> Tensor:
        return law.log_density(spins(x)).float()

    def reinforce(log_p: Tensor, log_p_of_reward: Tensor, x: Tensor) -> Tensor:
        r = log_p_of_reward.detach() - log_f(x)
        return ((r - r.mean()) / (r.std() + 1e-7) * log_p).mean()

    def loss() -> Tensor:
        x = chain.refresh(model, generator=generator)
        if arm == "arm_full":
            log_p = model.log_prob(x, "chain", generator=generator)
            return reinforce(log_p, log_p, x)
        if arm in ("arm_mc", "arm_all"):
            with torch.no_grad():
                other = _estimate(model, x, arm == "arm_all", generator)
            return reinforce(_estimate(model, x, arm == "arm_all", generator), other, x)
        return energy_loss(model, log_f, chain, alpha if arm.startswith("mam") else 0.0, generator=generator)

    steps = max(2, budget // (batch * passes(arm, length)))
    begin = time.process_time()
    _minimize(loss, model.parameters(), steps, lr, decay)
    return model, law, 1e3 * (time.process_time() - begin) / steps


def _estimate(model: MarginalizationModel, x: Tensor, of_all: bool, generator: torch.Generator) -> Tensor:
    """log p(x) from one call: D times one conditional of a random order, or the mean over all that are unknown there."""
    rank = torch.rand(x.shape, generator=generator).argsort(1)
    step = torch.randint(model.length, (len(x), 1), generator=generator)
    hidden = rank >= step if of_all else rank == step
    said = model.logits(torch.where(rank < step, x, 0)).log_softmax(-1).gather(2, x[..., None] - 1)[..., 0]
    return model.length * torch.where(hidden, said, 0).sum(1) / hidden.sum(1)


@torch.no_grad()
def divergence(model: MarginalizationModel, law: Ising, n: int, seed: int) -> tuple[float, float]:
    """``KL(p_theta || p)`` of the law that samples come from, by chains; and by the head of marginals, at the same samples."""
    generator = torch.Generator().manual_seed(seed)
    # Each draw's probability is that of the order which it was drawn in: of another one it would be no divergence.
    rank = torch.rand(n, model.length, generator=generator).argsort(1)
    x = model.sample(n, order=rank, generator=generator)
    log_f = law.log_density(spins(x))
    means = [(log_p.double() - log_f).mean().item() for log_p in (model.log_prob(x, "chain", rank), model.log_prob(x))]
    return means[0] + law.log_z.item(), means[1] + law.log_z.item()


@torch.no_grad()
def marginal_error(model: MarginalizationModel, law: Ising, n: int, seed: int) -> float:
    """Mean absolute error of log p(x_S) over random subsets, of sizes that are uniform in 1 .. D, of the law's own draws."""
    generator = torch.Generator().manual_seed(seed)
    s = law.sample(n, generator=generator)
    rank = torch.rand(s.shape, generator=generator).argsort(1)
    size = 1 + torch.randint(model.length, (n, 1), generator=generator)
    x = torch.where(rank < size, (s.long() + 3) // 2, 0)
    return (model.log_marginal(x).double() - law.log_marginal(spins(x))).abs().mean().item()


def milliseconds(call: Callable[[], Any], repeats: int) -> float:
    """The median of the processor's time for a call."""
    spans = []
    for _ in range(repeats):
        begin = time.process_time()
        call()
        spans.append(1e3 * (time.process_time() - begin))
    return sorted(spans)[repeats // 2]
