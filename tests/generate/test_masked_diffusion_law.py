"""Draws of tokens and the laws of rounded noise; the masking process and its loss; decoding; measures of text."""

from __future__ import annotations

import itertools
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from polyak.core.exact import MarkovChain
from polyak.generate import (
    FirstHitting,
    MaskedAncestral,
    MaskedProcess,
    SteeringState,
    TokenDenoiser,
    generate_masked,
    generative_perplexity,
    sentence_entropy,
)
from polyak.generate import discrete as d

SCHEDULES: dict[str, Any] = {"linear": "linear", "cosine": "cosine", "cubic": lambda t: (1 - t) ** 3}
P = torch.tensor([0.02, 0.08, 0.2, 0.7], dtype=torch.float64)


def seed(n: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(n)


# -- draws


@pytest.mark.parametrize("precision", ["f64", "two_level", "f32"])
def test_a_token_comes_as_often_as_its_probability_says(precision: str) -> None:
    logits = torch.tensor([0.3, -math.inf, 2.0, -1.0]).expand(40_000, 4)
    got = d.categorical(logits, precision=precision, generator=seed()).bincount(minlength=4).double()
    want = logits[0].double().softmax(0) * 40_000
    assert got[1] == 0
    kept = want > 0
    assert ((got - want) ** 2 / want)[kept].sum() < 13.8  # 2 degrees, 0.1 %


@pytest.mark.parametrize("precision", ["f64", "two_level", "f32"])
@pytest.mark.parametrize("u", [0.0, 1 - 2.0**-53])
def test_the_ends_of_the_uniform_draw_no_impossible_token(u: float, precision: str, monkeypatch: Any) -> None:
    def fixed(shape: Any, *, dtype: torch.dtype = torch.float64, **_: Any) -> Tensor:
        return torch.full(shape, u, dtype=torch.float64).to(dtype).clamp(max=1 - torch.finfo(dtype).eps / 2)

    monkeypatch.setattr(d, "uniform", fixed)
    logits = torch.tensor([[-math.inf, 0.0, -3.0, -math.inf]])
    assert d.categorical(logits, precision=precision).item() in (1, 2)
    assert d.categorical(torch.zeros(3, 1), precision=precision).tolist() == [0, 0, 0]


def test_a_device_whose_uniform_is_1_draws_a_token_that_there_is(monkeypatch: Any) -> None:
    monkeypatch.setattr(d, "uniform", lambda shape, **_: torch.ones(shape, dtype=torch.float64))
    assert d.categorical(torch.tensor([[0.3, 0.2, -math.inf]])).item() == 1


@pytest.mark.parametrize(("u", "token"), [(5e-13, 0), (2e-12, 1), (1 - 2e-12, 1), (1 - 5e-13, 2)])
def test_float64_keeps_what_single_precision_rounds_away(u: float, token: int, monkeypatch: Any) -> None:
    monkeypatch.setattr(d, "uniform", lambda shape, **_: torch.full(shape, u, dtype=torch.float64))
    logits = torch.tensor([1e-12, 1 - 2e-12, 1e-12], dtype=torch.float64).log()
    assert d.categorical(logits).item() == token


def test_two_levels_reach_what_one_cannot(monkeypatch: Any) -> None:
    """Of two draws that are nearly 0 the noise is that of 2^-48 or so."""
    u = {"two_level": 0.0, "f32": 1 - 2.0**-24}
    for precision, value in u.items():
        monkeypatch.setattr(d, "uniform", lambda shape, value=value, **_: torch.full(shape, value))
        monkeypatch.setattr(Tensor, "argmax", lambda self, dim: self)
        noise = d.categorical(torch.zeros(1, 1), precision=precision)[0, 0].item()
        assert noise == pytest.approx({"f32": 16.6355, "two_level": 49 * math.log(2)}[precision], abs=1e-4)


def test_truncated_law() -> None:
    law = d.truncated_gumbel_law(P, bound=2.0)
    assert law.tolist() == pytest.approx([3.957e-5, 0.0233417, 0.1532384, 0.8233804], rel=2e-4)
    for bits in (2, 8, 24):
        law = d.truncated_gumbel_law(P, bits)
        assert law.sum().item() == pytest.approx(1, abs=1e-12)
        assert bool((torch.diff(law / P) > 0).all())
    assert torch.allclose(d.truncated_gumbel_law(P, bound=40.0), P, rtol=1e-12)
    batch = torch.stack([P, P.flip(0)])
    assert torch.allclose(d.truncated_gumbel_law(batch, 6)[1], d.truncated_gumbel_law(P, 6).flip(0))
    with_zero = d.truncated_gumbel_law(torch.tensor([0.5, 0.0, 0.5]), 6)
    assert with_zero.tolist() == pytest.approx([0.5, 0.0, 0.5])


def test_truncated_law_is_that_of_conditioned_noise() -> None:
    e, n = math.exp(-1.0), 200_000
    race = e - torch.rand(n, 4, generator=seed(), dtype=torch.float64).log()  # exponential, given that it is at least e
    got = (race / P).argmin(1).bincount(minlength=4) / n
    assert torch.allclose(got.double(), d.truncated_gumbel_law(P, bound=1.0), atol=5 * math.sqrt(0.25 / n))


def test_rounded_law_is_that_of_a_grid() -> None:
    """The exact law of one token beside the mask, by summing over the grid; the truncated law is off by a third."""
    bits, w = 10, 2.0**-10
    grid = -torch.log(torch.arange(1, 2**bits, dtype=torch.float64) / 2**bits)  # 0 is the last of all
    exact = (2.0**-bits * torch.exp(-(1 - w) * grid / w)).sum().item()
    law = d.rounded_gumbel_law(torch.tensor([1.0], dtype=torch.float64), bits, reveal=w).item()
    assert law == pytest.approx(exact, rel=3e-3)
    conditioned = d.truncated_gumbel_law(torch.tensor([w, 1 - w], dtype=torch.float64), bits)[0].item()
    assert conditioned < 0.7 * exact
    assert d.rounded_gumbel_law(P, 60).tolist() == pytest.approx((1e-3 * P).tolist(), rel=1e-9)


def test_bounds_of_noise() -> None:
    assert d.gumbel_bound(torch.float32) == pytest.approx(16.6355, abs=1e-4)
    assert d.gumbel_bound(torch.float64) == pytest.approx(36.737, abs=1e-3)
    assert float(-(-torch.tensor(1 - 2.0**-24, dtype=torch.float64).log()).log()) == pytest.approx(
        d.gumbel_bound(torch.float32)
    )


def test_ancestral_tokens_are_drawn_without_the_reveal_probability(monkeypatch: Any) -> None:
    from polyak.generate.masked_diffusion import ancestral

    seen: list[Tensor] = []
    monkeypatch.setattr(ancestral, "categorical", lambda p, **_: seen.append(p) or torch.zeros(p.shape[:-1]).long())
    denoiser = TokenDenoiser(lambda x: P.log().expand(*x.shape, 4), MaskedProcess(4))
    from polyak.generate import sample

    sample(denoiser, (1, 4), solver=MaskedAncestral(1000), generator=seed())
    assert all(torch.allclose(p.exp().sum(-1), torch.ones(())) for p in map(torch.Tensor.float, seen))


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: d.categorical(torch.tensor([[0.0, math.nan]])), "got NaN"),
        (lambda: d.categorical(torch.tensor([[0.0, math.inf]])), "got +inf"),
        (lambda: d.categorical(torch.full((1, 2), -math.inf)), "-inf for every token"),
        (lambda: d.categorical(torch.zeros(2, 0)), "at least one token"),
        (lambda: d.categorical(torch.zeros(2, 3), generator=[seed()]), "generator must be one, or one for each row"),
        (lambda: d.categorical(torch.zeros(3), generator=[seed()]), "generator must be one"),
        (lambda: d.truncated_gumbel_law(torch.tensor([0.5, -0.1])), "p must hold probabilities"),
        (lambda: d.truncated_gumbel_law(torch.zeros(2)), "p must hold probabilities"),
        (lambda: d.random_subsets(torch.ones(2), 3), "counts must be integers"),
        (lambda: MaskedProcess(1, 0), "a token beside the mask"),
        (lambda: MaskedProcess(3, 4), "mask_id must be at most"),
        (lambda: MaskedProcess(3, schedule=lambda t: 1 - t + 0.3 * torch.sin(9 * t)), "schedule must fall strictly"),
        (lambda: MaskedProcess(3, schedule=lambda t: 0.9 * (1 - t)), "schedule must fall strictly"),
        (lambda: MaskedProcess(3, schedule=lambda t: t), "schedule must fall strictly"),
        (lambda: MaskedProcess(3, schedule=lambda t: 1.0), "schedule must map a tensor"),
        (lambda: MaskedProcess(3).corrupt(torch.tensor([[0, 3]]), n=1), "x0 must be clean data, but holds the mask 3"),
        (lambda: MaskedProcess(3, 1).corrupt(torch.tensor([[0, 1]]), n=1), "x0 must be clean data"),
        (lambda: MaskedProcess(3).corrupt(torch.tensor([[0, 1]]), n=0), r"n must be in \(0, 2\], got 0"),
        (lambda: MaskedProcess(3).corrupt(torch.tensor([[0, 1]]), n=3), r"n must be in \(0, 2\], got 3"),
        (lambda: MaskedProcess(3).corrupt(torch.tensor([[0, 1]]), n=torch.tensor([0])), "n must be in"),
        (lambda: MaskedProcess(3).corrupt(torch.tensor([[0, 1]]), n=torch.tensor([1.0])), "n must be an integer"),
        (lambda: MaskedProcess(3).corrupt(torch.tensor([[0, 1]]), 0.0), "t must be in"),
        (lambda: MaskedProcess(3).corrupt(torch.tensor([[0, 1]]), torch.tensor([1.5])), "t must be in"),
        (lambda: MaskedProcess(3).corrupt(torch.tensor([[0, 1]]), 0.5, n=1), "give either t or n"),
        (lambda: MaskedProcess(3).corrupt(torch.tensor([[0, 1]])), "give either t or n"),
        (lambda: MaskedProcess(3).nelbo(lambda x: torch.zeros(1, 2, 4), torch.tensor([[0, 1]])), "logits must have shape"),
    ],
)  # fmt: skip
def test_bad_input(call: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words.replace("+inf", r"\+inf")):
        call()


# -- the process and its loss


@pytest.mark.parametrize("schedule", [*SCHEDULES.values(), "loglinear"], ids=[*SCHEDULES, "loglinear"])
def test_a_schedule_its_slope_and_its_inverse(schedule: Any) -> None:
    process = MaskedProcess(3, schedule=schedule)
    t = torch.linspace(0.01, 0.99, 23, dtype=torch.float64)
    assert torch.allclose(process.t_of_alpha(process.alpha(t)), t, atol=1e-9)
    slope = (process.alpha(t + 1e-6) - process.alpha(t - 1e-6)) / 2e-6
    assert torch.allclose(process.dalpha(t), slope, rtol=1e-6, atol=1e-9)
    late = torch.tensor([1 - 1e-6], dtype=torch.float64)
    assert (1 - process.t_of_alpha(process.alpha(late))).item() == pytest.approx(1e-6, rel=1e-6)
    assert process.alpha(0.0) == pytest.approx(1.0, abs=1e-15)
    assert process.alpha(1.0) == pytest.approx(1e-3 if schedule == "loglinear" else 0.0, abs=1e-15)
    assert process == MaskedProcess(3, schedule=schedule) != MaskedProcess(4, schedule=schedule)


def test_corruption_hides_what_was_asked() -> None:
    x0 = torch.arange(5).expand(20_000, 5) % 3
    process = MaskedProcess(3)
    x = process.corrupt(x0, n=2, generator=seed())
    hidden = x == 3
    assert bool((hidden.sum(1) == 2).all())
    assert torch.equal(x[~hidden], x0[~hidden])
    pairs = (hidden.long() * 2 ** torch.arange(5)).sum(1).unique(return_counts=True)[1].double()
    assert len(pairs) == 10
    assert ((pairs - 2000) ** 2 / 2000).sum() < 27.9  # 9 degrees, 0.1 %
    hidden = process.corrupt(x0, 0.3, generator=seed()) == 3
    assert hidden.double().mean().item() == pytest.approx(0.3, abs=4 * math.sqrt(0.21 / 100_000))
    assert process.corrupt(x0[:, :2], torch.full((20_000,), 1.0)).unique().tolist() == [3]


def test_counts_are_spread_and_each_is_uniform() -> None:
    counts = torch.stack([d.stratified_counts(12, 4, generator=seed(s)) for s in range(300)])
    assert bool((torch.stack([row.bincount(minlength=5) for row in counts]) == torch.tensor([0, 3, 3, 3, 3])).all())
    per_row = torch.stack([c.bincount(minlength=5)[1:] for c in counts.T]).double()
    assert ((per_row - 75) ** 2 / 75).sum(1).max() < 25
    assert d.stratified_counts(0, 4).shape == (0,)


TABLE = torch.randn(4, 4, 4, 3, 3, generator=seed(5), dtype=torch.float64)  # logits for each x of {0, 1, 2, mask}^3


def network(x: Tensor) -> Tensor:
    return TABLE[x[:, 0], x[:, 1], x[:, 2]]


def any_order(model: Any, x0: Tensor) -> float:
    """``sum_n (1/n) E_S sum_l`` over all subsets: the count form by enumeration, written here again."""
    total = 0.0
    for n in (1, 2, 3):
        subsets = list(itertools.combinations(range(3), n))
        for subset in subsets:
            x = x0.clone()
            x[list(subset)] = 3
            log_p = model(x[None])[0].log_softmax(-1)
            total -= sum(log_p[j, x0[j]].item() for j in subset) / n / len(subsets)
    return total


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES.keys())
def test_all_forms_of_the_loss_have_one_mean(schedule: Any) -> None:
    x0, rows, process = torch.tensor([0, 2, 1]), 20_000, MaskedProcess(3, schedule=schedule)
    want = any_order(network, x0)
    for form in ("count", "time"):
        loss = process.nelbo(network, x0.expand(rows, 3), form, generator=seed(2))
        assert loss.mean().item() == pytest.approx(want, abs=4 * loss.std().item() / math.sqrt(rows)), form
    # By quadrature over t: the form in time, exactly.
    t = (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000
    q, weight = 1 - process.alpha(t), -process.dalpha(t) / (1 - process.alpha(t))
    total = 0.0
    for n in (1, 2, 3):
        for subset in itertools.combinations(range(3), n):
            x = x0.clone()
            x[list(subset)] = 3
            log_p = network(x[None])[0].log_softmax(-1)
            part = (weight * q**n * (1 - q) ** (3 - n)).mean().item()
            total -= part * sum(log_p[j, x0[j]].item() for j in subset)
    assert total == pytest.approx(want, rel=1e-5)


def test_the_loss_of_a_uniform_network_is_the_same_for_every_row() -> None:
    """L log V, whatever was hidden: an average over all masked positions of a batch would not give it."""
    x0 = torch.randint(5, (40, 7), generator=seed())
    loss = MaskedProcess(5).nelbo(lambda x: torch.zeros(*x.shape, 5), x0, generator=seed())
    assert torch.allclose(loss, torch.full((40,), 7 * math.log(5)), rtol=1e-6)


def test_exact_conditionals_have_the_entropy_as_their_loss() -> None:
    chain = MarkovChain([0.5, 0.3, 0.2], [[0.7, 0.2, 0.1], [0.1, 0.1, 0.8], [0.3, 0.6, 0.1]])

    def model(x: Tensor) -> Tensor:
        return chain.conditionals(x.masked_fill(x == 3, -1)).log()

    law = chain.law(3)
    strings = list(itertools.product(range(3), repeat=3))
    mean = sum(law[s].item() * any_order(model, torch.tensor(s)) for s in strings)
    assert mean == pytest.approx(chain.entropy(3).item(), rel=1e-10)
    x = chain.sample(6, 20_000, generator=seed())
    loss = MaskedProcess(3).nelbo(model, x, generator=seed(1))
    assert loss.mean().item() == pytest.approx(chain.entropy(6).item(), abs=4 * loss.std().item() / math.sqrt(len(x)))


def test_the_loss_of_a_denoiser_and_its_gradient() -> None:
    net = torch.nn.Embedding(4, 3)
    told: list[Tensor] = []
    denoiser = TokenDenoiser(lambda x, t: told.append(t) or net(x), MaskedProcess(3), told="time")
    x0 = torch.randint(3, (6, 4), generator=seed())
    denoiser.process.nelbo(denoiser, x0, generator=seed()).sum().backward()
    assert net.weight.grad is not None
    assert net.weight.grad[:3].abs().sum() == 0  # what is visible is not predicted
    assert net.weight.grad[3].abs().sum() > 0
    hidden = MaskedProcess(3).corrupt(x0, n=d.stratified_counts(6, 4, generator=(g := seed())), generator=g) == 3
    assert torch.allclose(told[0], hidden.float().mean(1))  # under the linear schedule
    cosine = MaskedProcess(3, schedule="cosine")
    denoiser = TokenDenoiser(denoiser.model, cosine, told="time")
    cosine.nelbo(denoiser, x0, generator=seed())
    assert torch.allclose(1 - cosine.alpha(told[1].double()).float(), hidden.float().mean(1), atol=1e-6)
    impossible = MaskedProcess(2).nelbo(
        lambda x: torch.tensor([0.0, -math.inf]).expand(*x.shape, 2), torch.zeros(4, 3).long()
    )
    assert bool(impossible.isfinite().all())


# -- decoding


class Bert:
    """Called, and configured, as a ``*ForMaskedLM`` model of transformers is; what it says depends on what may be read."""

    config = SimpleNamespace(vocab_size=11, mask_token_id=None)

    def __init__(self) -> None:
        self.read: list[Tensor] = []

    def __call__(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Any:
        self.read.append(torch.ones_like(input_ids) if attention_mask is None else attention_mask)
        seen = (input_ids * self.read[-1]).sum(1, keepdim=True)
        return SimpleNamespace(logits=(seen[..., None] * torch.arange(11) * 0.3).sin().expand(*input_ids.shape, 11))


def test_a_masked_language_model_fills_masks_and_goes_on() -> None:
    bert = Bert()
    prompt = torch.tensor([[1, 4, 2, 10], [0, 5, 10, 10]])
    read = torch.tensor([[1, 1, 1, 1], [0, 1, 1, 1]])
    out = generate_masked(bert, prompt, 3, mask_token_id=10, attention_mask=read, generator=seed())
    assert out.shape == (2, 7)
    assert torch.equal(out[:, :4][prompt != 10], prompt[prompt != 10])
    assert out.max() < 10
    assert len(bert.read) == 5
    assert all(torch.equal(said, torch.cat([read, torch.ones(2, 3).long()], 1)) for said in bert.read)
    whole = prompt.clamp(max=9)
    assert torch.equal(generate_masked(bert, whole, mask_token_id=10), whole)
    bert.read.clear()
    three = FirstHitting(steps=3, temperature=0.0)
    generate_masked(bert, prompt, 3, mask_token_id=10, solver=three, callback=lambda s: None, generator=seed())
    assert len(bert.read) == 3
    steered = generate_masked(bert, prompt, 3, mask_token_id=10, attention_mask=read, steering=Best(), generator=seed())
    assert steered.shape == (2, 7)
    assert bert.read[-1][:, 0].tolist() == [1, 1, 0, 0]  # a row for each copy


class Best:
    """Two copies of each prompt; the one whose tokens have the larger sum stays."""

    particles, resamples = 2, True

    def init(self, batch: int, k: int) -> SteeringState:
        return SteeringState.uniform(batch, k)

    def step(self, state: SteeringState, x_next: Tensor, *, generator: Any, **known: Any) -> Any:
        best = x_next.sum(1).view(-1, 2).argmax(1)
        ancestors = (2 * torch.arange(len(best)) + best).repeat_interleave(2)
        return x_next[ancestors], state.moved(ancestors)

    def select(self, state: SteeringState, x: Tensor) -> Tensor:
        return x[::2]


def test_decoding_is_steered_after_each_reveal() -> None:
    model = SimpleNamespace(config=SimpleNamespace(vocab_size=4, mask_token_id=4))

    def says(input_ids: Tensor) -> Any:
        return SimpleNamespace(logits=torch.zeros(*input_ids.shape, 4))

    says.config = model.config  # type: ignore[attr-defined]
    prompt = torch.tensor([[1, 2], [3, 0]])
    plain, steered = (generate_masked(says, prompt, 40, steering=s, generator=seed()) for s in (None, Best()))
    assert plain.shape == steered.shape == (2, 42)
    assert torch.equal(steered[:, :2], prompt)
    assert steered[:, 2:].double().mean() > plain[:, 2:].double().mean() + 0.25  # of 1.5, its error is 0.125


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda m, x: generate_masked(m, x, 2), "mask_token_id is needed"),
        (lambda m, x: generate_masked(m, x, 2, mask_token_id=9), "mask_token_id must be at most 4"),
        (lambda m, x: generate_masked(m, x.float(), 2, mask_token_id=4), "input_ids must be integers"),
        (
            lambda m, x: generate_masked(m, x + 5, 2, mask_token_id=4),
            "input_ids must hold tokens below vocab=4 or the mask 4, got",
        ),
        (lambda m, x: generate_masked(m, x, 2, mask_token_id=4, attention_mask=x[:, :1]), "attention_mask must have"),
        (lambda m, x: generate_masked(lambda x: "no", x, 2, mask_token_id=4), "model must say logits"),
    ],
)
def test_bad_input_of_decoding(call: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        call(lambda input_ids: torch.zeros(*input_ids.shape, 4), torch.tensor([[0, 1], [2, 3]]))


# -- measures


def test_perplexity_and_entropy() -> None:
    texts = torch.tensor([[0, 1, 2, 0], [1, 1, 0, 2]])
    p = torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.6, 0.3], [0.2, 0.2, 0.6]])
    got = generative_perplexity(texts, lambda x: SimpleNamespace(logits=p.log()[x]))
    follows = [0.3, 0.3, 0.2, 0.6, 0.1, 0.2]  # of each token after the one before
    assert got.item() == pytest.approx(math.exp(-sum(map(math.log, follows)) / 6), rel=1e-6)
    assert generative_perplexity(texts, lambda x: torch.zeros(*x.shape, 7)).item() == pytest.approx(7, rel=1e-6)
    want = [-(0.5 * math.log(0.5) + 0.5 * math.log(0.25))] * 2
    assert sentence_entropy(texts).tolist() == pytest.approx(want)
    assert sentence_entropy(torch.zeros(1, 9).long()).tolist() == [0.0]
    assert sentence_entropy(torch.arange(8)[None]).item() == pytest.approx(math.log(8))
    for call in (
        lambda: generative_perplexity(texts[:, :1], lambda x: x),
        lambda: generative_perplexity(texts, lambda x: torch.zeros(2, 3, 4)),
        lambda: generative_perplexity(texts.float(), lambda x: x),
        lambda: sentence_entropy(texts.float()),
        lambda: sentence_entropy(torch.zeros(2, 0).long()),
    ):
        with pytest.raises(ValueError, match=r"texts|logits|tokens"):
            call()
