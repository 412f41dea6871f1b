"""Masked diffusion's samplers: their law against exact conditionals, calls and times, prompts, steering, and what is refused."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from polyak import generate
from polyak.core.exact import MarkovChain
from polyak.generate import (
    APG,
    CFG,
    DDIM,
    VP,
    FirstHitting,
    MaskedAncestral,
    MaskedProcess,
    Solver,
    SteeringState,
    TokenDenoiser,
    TokenPrediction,
    sample,
)
from polyak.generate.masked_diffusion import ancestral, first_hitting

CHAIN = MarkovChain([0.6, 0.3, 0.1], [[0.8, 0.15, 0.05], [0.1, 0.1, 0.8], [0.45, 0.5, 0.05]])
PROCESS = MaskedProcess(3)
EXACT = TokenDenoiser(lambda x: CHAIN.conditionals(x.masked_fill(x == 3, -1)).log(), PROCESS)
SOLVERS: dict[str, Solver] = {
    "first hitting": FirstHitting(),
    "first hitting, 3 calls": FirstHitting(steps=3),
    "extrapolated": FirstHitting(steps=3, order=2, variant="extrapolate"),
    "predictor-corrector": FirstHitting(steps=3, order=2, variant="pc"),
    "two levels": FirstHitting(precision="two_level"),
    "ancestral": MaskedAncestral(20),
    "ancestral, no cache": MaskedAncestral(20, cache=False),
    "ancestral, two levels": MaskedAncestral(20, precision="two_level"),
    "ancestral, joint": MaskedAncestral(20, precision="f32"),
}
every_solver = pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS.keys())


def seed(n: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(n)


def says(*logits: float) -> TokenDenoiser:
    """The same logits everywhere."""
    return TokenDenoiser(lambda x: torch.tensor(logits).expand(*x.shape, -1), MaskedProcess(len(logits)))


def chi_square(x: Tensor, p: Tensor) -> float:
    """(X^2 - degrees of freedom) / sqrt(2 degrees of freedom): about standard normal if x are draws of p."""
    code = sum(x[:, j] * p.shape[0] ** (x.shape[1] - 1 - j) for j in range(x.shape[1]))
    want = p.flatten() * len(x)
    got = torch.as_tensor(code).bincount(minlength=want.numel()).double()
    rare = want < 10  # as one
    if bool(rare.any()):
        want, got = (torch.cat([c[~rare], c[rare].sum()[None]]) for c in (want, got))
    freedom = want.numel() - 1
    return ((((got - want) ** 2 / want).sum() - freedom) / math.sqrt(2 * freedom)).item()


# -- the law


@pytest.mark.parametrize("schedule", ["linear", "cosine", lambda t: (1 - t) ** 3], ids=["linear", "cosine", "cubic"])
def test_first_hitting_is_exact(schedule: Any) -> None:
    process = MaskedProcess(3, schedule=schedule)
    denoiser = TokenDenoiser(EXACT.model, process)
    x, info = sample(denoiser, (30_000, 4), solver=FirstHitting(), generator=seed(), return_info=True)
    assert info.nfe == 4
    assert abs(chi_square(x, CHAIN.law(4))) < 4


@pytest.mark.parametrize("precision", ["f64", "two_level", "f32"])
@pytest.mark.parametrize("cache", [True, False])
def test_ancestral_sampling_has_the_law_of_its_steps(cache: bool, precision: str) -> None:
    """Of two positions in two steps: revealed together, half of the time, they are drawn by themselves."""
    joint = CHAIN.law(2)
    alone = joint.sum(1)[:, None] * joint.sum(0)
    solver = MaskedAncestral(2, cache=cache, precision=precision)
    x = sample(EXACT, (20_000, 2), solver=solver, generator=seed(3))
    assert abs(chi_square(x, (joint + alone) / 2)) < 4
    assert chi_square(x, joint) > 20


def test_one_call_draws_every_token_by_itself() -> None:
    joint = CHAIN.law(2)
    x, info = sample(EXACT, (20_000, 2), solver=FirstHitting(steps=1), generator=seed(), return_info=True)
    assert info.nfe == 1
    assert abs(chi_square(x, joint.sum(1)[:, None] * joint.sum(0))) < 4
    for asked in ({"steps": 1}, {"nfe": 1}, {"grid": [1.0, 0.0]}):
        again, info = sample(EXACT, (20_000, 2), solver=FirstHitting(), generator=seed(), return_info=True, **asked)
        assert info.nfe == 1, asked
        assert torch.equal(again, x)


def test_as_many_calls_as_masks_are_first_hitting_bit_for_bit() -> None:
    whole = sample(EXACT, (50, 6), solver=FirstHitting(), generator=seed())
    for solver in (
        FirstHitting(steps=6),
        FirstHitting(steps=6, order=2, variant="extrapolate"),
        FirstHitting(steps=6, order=2, variant="pc"),
    ):
        assert torch.equal(sample(EXACT, (50, 6), solver=solver, generator=seed()), whole)
    assert torch.equal(sample(EXACT, (50, 6), solver=FirstHitting(), steps=6, generator=seed()), whole)


def test_golden_trajectory() -> None:
    """The algorithm in plain Python, on the same uniforms: of the time, of the positions, of the token."""
    x0 = torch.full((2, 5), 3)
    denoiser = TokenDenoiser(
        lambda x: torch.stack([(x == 3).double().sum(1) * 0.3, x[:, 0] * 0.1, x.sum(1) * 0.02], -1)[:, None].expand(2, 5, 3),
        PROCESS,
    )  # fmt: skip
    got, info = sample(denoiser, x0, solver=FirstHitting(), generator=seed(4), return_info=True)
    draw, rows, t = seed(4), [[3] * 5, [3] * 5], [1.0, 1.0]
    for n in range(5, 0, -1):
        u, keys, v = (torch.rand(shape, generator=draw, dtype=torch.float64) for shape in ((2, 1), (2, 5), (2, 1, 1)))
        for b, row in enumerate(rows):
            t[b] *= (1 - u[b, 0].item()) ** (1 / n)
            place = max((keys[b, j].item(), j) for j in range(5) if row[j] == 3)[1]
            weights = [math.exp(z) for z in (n * 0.3, row[0] * 0.1, sum(row) * 0.02)]
            left, token = v[b, 0, 0].item() * sum(weights), 0
            while left >= weights[token]:
                left, token = left - weights[token], token + 1
            row[place] = token
        assert info.queries[5 - n].tolist() == pytest.approx(t, abs=1e-15)
    assert got.tolist() == rows == [[1, 0, 0, 2, 0], [1, 2, 2, 0, 0]]


def test_times_are_order_statistics_of_uniforms() -> None:
    n, rows = 5, 20_000
    _, info = sample(says(0.0, 0.0), (rows, n), solver=FirstHitting(), generator=seed(), return_info=True)
    times = torch.stack(info.queries, 1)
    assert bool((torch.diff(times, dim=1) <= 0).all())
    for k, t in zip(range(n, 0, -1), times.T, strict=True):
        mean, variance = k / (n + 1), k * (n + 1 - k) / ((n + 1) ** 2 * (n + 2))
        assert t.mean().item() == pytest.approx(mean, abs=4 * math.sqrt(variance / rows))
        assert t.var().item() == pytest.approx(variance, rel=0.06)


def test_times_of_several_reveals_are_the_same_order_statistics() -> None:
    """Of 6 masks in 2 calls the second is at the third smallest of the times."""
    process = MaskedProcess(2, schedule="cosine")
    denoiser = TokenDenoiser(lambda x: torch.zeros(*x.shape, 2), process)
    _, info = sample(denoiser, (20_000, 6), solver=FirstHitting(steps=2), generator=seed(), return_info=True)
    hidden = 1 - process.alpha(info.queries[1])
    assert hidden.mean().item() == pytest.approx(3 / 7, abs=4 * math.sqrt(3 * 4 / (49 * 8) / 20_000))


def test_the_order_is_uniform_whatever_the_network_is_sure_of() -> None:
    """Not by confidence: the first revealed position of four."""
    sure = torch.tensor([[9.0, 0.0], [1.0, 0.0], [0.1, 0.0], [0.0, 0.0]])
    denoiser = TokenDenoiser(lambda x: sure.expand(*x.shape, 2), MaskedProcess(2))
    first: list[Tensor] = []
    sample(denoiser, (8000, 4), solver=FirstHitting(), generator=seed(), callback=lambda s: first.append(s.x.clone()))
    counts = (first[0] != 2).sum(0).double()
    assert ((counts - 2000) ** 2 / 2000).sum() < 16.3  # chi-square of 3 degrees, 0.1 %


def test_ancestral_calls_are_at_most_one_for_each_token() -> None:
    denoiser, steps, length, calls = says(0.0, 0.0), 10, 6, []
    for s in range(40):
        _, info = sample(denoiser, (1, length), solver=MaskedAncestral(steps), generator=seed(s), return_info=True)
        assert len(info.steps) == steps
        calls.append(info.nfe)
    assert max(calls) <= length
    # A call for each step in which any token is revealed.
    assert sum(calls) / 40 == pytest.approx(steps * (1 - (1 - 1 / steps) ** length), abs=0.6)
    _, info = sample(denoiser, (1, 6), solver=MaskedAncestral(cache=False), steps=steps, return_info=True)
    assert info.nfe == steps


# -- what stays


PROMPT = torch.tensor([[3, 1, 3, 3, 3, 0], [3, 3, 3, 3, 3, 3], [0, 1, 2, 0, 1, 2]])


@every_solver
def test_visible_tokens_stay_and_no_mask_is_left(solver: Solver) -> None:
    states: list[Tensor] = [PROMPT]
    x = sample(EXACT, PROMPT, solver=solver, generator=seed(), callback=lambda s: states.append(s.x.clone()))
    assert x.dtype == torch.int64
    assert bool((x != 3).all())
    assert torch.equal(x[PROMPT != 3], PROMPT[PROMPT != 3])
    assert torch.equal(sample(EXACT, PROMPT.int(), solver=solver, generator=seed()), x.int())
    if getattr(solver, "variant", None) != "pc":
        for before, after in itertools.pairwise(states):
            assert torch.equal(after[before != 3], before[before != 3])


@every_solver
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_state_may_be_changed_in_place_or_be_another_tensor(solver: Solver, mode: Any) -> None:
    """At any step, with or without a reveal: a token is put in, and another is hidden again."""

    def run(at: int, in_place: bool) -> tuple[Tensor, Tensor]:
        def edit(step: Any) -> None:
            if step.index == at:
                new = step.x.clone()
                new[0, 0], new[0, 1] = 2, 3
                step.x = step.x.copy_(new) if in_place else new

        with mode():
            start = PROMPT.clone()
            end = sample(EXACT, start, solver=solver, generator=seed(), callback=edit)
            return start, end

    for at in range(3):
        (start, end), (_, other) = run(at, True), run(at, False)
        assert torch.equal(end, other), at
        assert torch.equal(start, PROMPT), "the start stays as it is"
        assert end[0, 0] == 2
        if isinstance(solver, MaskedAncestral):
            assert bool((end != 3).all()), at


@every_solver
def test_tokens_that_a_callback_puts_in_stay(solver: Solver) -> None:
    def fill(step: Any) -> None:
        if step.index == 0:
            step.x = torch.full_like(step.x, 2)

    certain = TokenDenoiser(lambda x: torch.tensor([0.0, -50.0, -50.0]).expand(*x.shape, 3), PROCESS)
    x = sample(certain, (4, 6), solver=solver, generator=seed(), callback=fill)
    if getattr(solver, "variant", None) != "pc":
        assert bool((x == 2).all())


def test_reveals_after_a_change_are_as_likely_at_each_step_that_is_left() -> None:
    left: list[int] = []

    def hide(step: Any) -> None:
        if step.index == 0:
            step.x = torch.full_like(step.x, 2)
        left.append(int((step.x == 2).sum()))

    sample(says(0.0, 0.0), (3000, 4), solver=MaskedAncestral(4), generator=seed(), callback=hide)
    assert left[0] == 12_000
    assert left[1:] == pytest.approx([8000, 4000, 0], abs=4 * math.sqrt(12_000 * 2 / 9))


def test_a_uniform_of_0_is_a_reveal_at_the_last_step(monkeypatch: Any) -> None:
    monkeypatch.setattr(ancestral, "uniform", lambda shape, **_: torch.zeros(shape, dtype=torch.float64))
    left: list[int] = []
    solver = MaskedAncestral(4)
    sample(EXACT, (2, 3), solver=solver, generator=seed(), callback=lambda s: left.append(int((s.x == 3).sum())))
    assert left == [6, 6, 6, 0]


def test_draws_of_clean_data_keep_what_is_visible() -> None:
    drawn = says(0.0, 0.0, 0.0)(PROMPT, 0.5).draw(50, generator=seed())
    assert bool((drawn[:, PROMPT != 3] == PROMPT[PROMPT != 3]).all())
    assert drawn[:, PROMPT == 3].unique().tolist() == [0, 1, 2]


def test_a_step_that_was_heard_of_does_not_change_with_a_later_one() -> None:
    kept: list[Any] = []

    def edit(step: Any) -> None:
        step.x[0, 0] = step.index % 2
        kept.append((step.x, step.x.clone()))

    sample(EXACT, (1, 2), solver=MaskedAncestral(8), generator=seed(), callback=edit)
    assert all(torch.equal(x, then) for x, then in kept)


@every_solver
def test_a_prompt_without_masks_comes_back_and_costs_nothing(solver: Solver) -> None:
    whole = PROMPT[2:]
    x, info = sample(EXACT, whole, solver=solver, generator=seed(), return_info=True)
    assert torch.equal(x, whole)
    asks = (getattr(solver, "steps", None) or 0) if not getattr(solver, "cache", True) or solver.adaptive else 0
    assert info.nfe == asks  # only who was told to ask


def test_temperature_zero_takes_the_most_probable() -> None:
    denoiser = says(0.3, 0.5, 0.1)
    x = sample(denoiser, (20, 6), solver=FirstHitting(temperature=0.0), generator=seed(1))
    assert bool((x == 1).all())
    cold = FirstHitting(steps=2, order=2, variant="extrapolate", temperature=0.0)
    assert bool((sample(denoiser, (20, 6), solver=cold) == 1).all())
    x = sample(denoiser, (4000, 2), solver=FirstHitting(temperature=0.5), generator=seed(1)).flatten()
    want = (torch.tensor([0.3, 0.5, 0.1]).double() * 2).softmax(0)
    assert torch.allclose(x.bincount(minlength=3) / 8000, want.float(), atol=4 * math.sqrt(0.25 / 8000))


def test_top_p_keeps_the_fewest_that_reach_it() -> None:
    p = torch.tensor([0.5, 0.3, 0.15, 0.05])
    denoiser = TokenDenoiser(lambda x: p.log().expand(*x.shape, -1), MaskedProcess(4))
    x = sample(denoiser, (4000, 2), solver=FirstHitting(top_p=0.7), generator=seed()).flatten()
    want = torch.tensor([0.625, 0.375, 0.0, 0.0])
    assert torch.allclose(x.bincount(minlength=4) / 8000, want, atol=4 * math.sqrt(0.25 / 8000))
    assert (x > 1).sum() == 0


@every_solver
def test_a_row_with_a_generator_of_its_own_does_not_depend_on_the_batch(solver: Solver) -> None:
    if solver in (SOLVERS["ancestral, joint"], SOLVERS["ancestral"], SOLVERS["ancestral, two levels"]):
        solver = replace(solver, cache=False)  # type: ignore[type-var]  # else a step draws for as many as it reveals at most
    whole = sample(EXACT, PROMPT, solver=solver, generator=[seed(i) for i in range(3)])
    for i in range(2):
        assert torch.equal(sample(EXACT, PROMPT[i : i + 1], solver=solver, generator=[seed(i)])[0], whole[i])


@every_solver
def test_a_run_goes_on_from_any_of_its_steps(solver: Solver) -> None:
    kept: list[Any] = []
    draw = seed(7)
    whole = sample(EXACT, PROMPT, solver=solver, generator=draw, callback=lambda s: kept.append((s, draw.get_state())))
    for step, state in kept[:: max(1, len(kept) // 3)]:
        again = torch.Generator()
        again.set_state(state)
        assert torch.equal(sample(EXACT, step, solver=solver, generator=again), whole)


@pytest.mark.parametrize("shape", [(3, 2, 4), (2, 2, 2, 2)])
def test_events_of_any_shape(shape: tuple[int, ...]) -> None:
    denoiser = TokenDenoiser(lambda x: torch.zeros(*x.shape, 3), PROCESS)
    for solver in SOLVERS.values():
        x = sample(denoiser, shape, solver=solver, generator=seed())
        assert x.shape == shape
        assert x.max() < 3
    assert sample(denoiser, (0, 4), solver=FirstHitting()).shape == (0, 4)


# -- higher order


def test_extrapolation_is_exact_where_log_p_is_linear_in_the_number_of_masks(monkeypatch: Any) -> None:
    seen: list[Tensor] = []
    draw = first_hitting.categorical
    monkeypatch.setattr(first_hitting, "categorical", lambda log_p, **more: seen.append(log_p) or draw(log_p, **more))
    slope = torch.tensor([0.3, -0.2, 0.1])

    def linear(x: Tensor) -> Tensor:
        # Normalized, so that log p itself is linear: p = softmax of fixed logits, tilted by what has sum 0 in log space.
        return ((x == 3).sum(1).float()[:, None, None] * slope).expand(*x.shape, 3).contiguous()

    denoiser = TokenDenoiser(linear, PROCESS)
    solver = FirstHitting(steps=2, order=2, variant="extrapolate")
    sample(denoiser, (1, 6), solver=solver, generator=seed())
    # 6 masks, then 3 of which the mean count is 2: logits linear in the count stay so up to a constant.
    assert torch.allclose(seen[0][0, 0], (6 * slope).log_softmax(0), atol=1e-6)
    assert torch.allclose(seen[1][0, 0], (2 * slope).log_softmax(0), atol=1e-6)


def test_the_corrector_draws_what_was_revealed_last_once_more() -> None:
    """A network that says 0 of a string of masks, and 1 of any other."""

    def late(x: Tensor) -> Tensor:
        any_visible = (x != 2).any(1).float()[:, None]
        return (torch.stack([1 - any_visible, any_visible], -1) * 50).expand(*x.shape, 2)

    denoiser = TokenDenoiser(late, MaskedProcess(2))
    plain = sample(denoiser, (1, 4), solver=FirstHitting(steps=2), generator=seed())
    corrected = sample(denoiser, (1, 4), solver=FirstHitting(steps=2, order=2, variant="pc"), generator=seed())
    assert sorted(plain[0].tolist()) == [0, 0, 1, 1]
    assert corrected[0].tolist() == [1, 1, 1, 1]


# -- the other parts


class Copies:
    """Both particles of a system go on from its first."""

    particles, resamples = 2, True

    def __init__(self) -> None:
        self.seen: list[Any] = []

    def init(self, batch: int, k: int) -> SteeringState:
        return SteeringState.uniform(batch, k)

    def step(
        self, state: SteeringState, x_next: Tensor, *, pred: Any, x0_hat: Tensor, generator: Any, **known: Any
    ) -> Any:
        drawn = pred.draw(3, generator=generator)
        assert drawn.shape == (3, *x_next.shape)
        assert torch.equal(drawn[0][~pred.hidden], pred.x[~pred.hidden])
        assert bool((drawn < 3).all())
        assert bool((x0_hat < 3).all())
        self.seen.append((pred.x, x_next, known["t"], known["t_next"]))
        ancestors = torch.arange(len(x_next)) // 2 * 2
        return x_next[ancestors], state.moved(ancestors)

    def select(self, state: SteeringState, x: Tensor) -> Tensor:
        return x


class Once(Copies):
    """All go on from the first row after the first step, each by itself."""

    def __init__(self) -> None:
        self.states: list[Tensor] = []

    def step(self, state: Any, x_next: Tensor, *, step: int, **known: Any) -> Any:
        self.states.append(x_next)
        ancestors = torch.zeros(len(x_next), dtype=torch.long) if step == 0 else None
        return (x_next if ancestors is None else x_next[ancestors]), state.moved(ancestors)


@every_solver
def test_steering_moves_rows_and_what_is_remembered_of_them(solver: Solver) -> None:
    x = PROMPT[:2].repeat_interleave(2, 0)
    steering = Copies()
    end = sample(EXACT, x, solver=solver, steering=steering, generator=seed())
    assert bool((end != 3).all())
    assert torch.equal(end[x != 3], x[x != 3])
    assert torch.equal(end[0], end[1])
    assert torch.equal(end[2], end[3])
    times = [t for _, _, s, t in steering.seen]
    assert times == sorted(times, reverse=True)
    for (_, after, _, _), (before, _, _, _) in zip(steering.seen, steering.seen[1:], strict=False):
        ancestors = torch.arange(4) // 2 * 2
        if solver is not SOLVERS["first hitting"]:
            assert bool(((before == after[ancestors]) | (before == 3)).all())
        else:
            assert torch.equal(before, after[ancestors])  # the prediction is of the state as it was moved


@pytest.mark.parametrize("solver", [*[*SOLVERS.values()][:5], SOLVERS["ancestral"]])
def test_a_copy_of_a_row_with_more_masks_reveals_all_of_them(solver: Solver) -> None:
    x = torch.tensor([[3, 3, 3, 3, 3, 3], [0, 1, 2, 3, 0, 3]])
    end = sample(EXACT, x, solver=solver, steering=Once(), generator=seed())
    assert bool((end != 3).all())


def test_copies_are_revealed_each_by_its_own() -> None:
    """After resampling an ancestral run draws anew when what is hidden will be revealed."""
    apart = 0
    for s in range(10):
        once = Once()
        end = sample(says(0.0, 0.0), (1, 12), solver=MaskedAncestral(4), steering=once, generator=seed(s))
        assert bool((end != 2).all())
        hidden = once.states[1] == 2
        apart += int((hidden[0] != hidden[1]).any())
    assert apart >= 8


def test_guidance_mixes_logits() -> None:
    cond, uncond = torch.tensor([1.0, 0.0, -1.0]), torch.tensor([0.0, 0.5, 0.0])
    denoiser = TokenDenoiser(
        lambda x: cond.expand(*x.shape, 3), PROCESS, unconditional=lambda x: uncond.expand(*x.shape, 3)
    )
    x, info = sample(denoiser, (4000, 2), solver=FirstHitting(), guidance=CFG(3.0), generator=seed(), return_info=True)
    want = (uncond + 3 * (cond - uncond)).softmax(0)
    assert torch.allclose(x.flatten().bincount(minlength=3) / 8000, want, atol=4 * math.sqrt(0.25 / 8000))
    assert (info.nfe, info.evaluations) == (2, 4)
    with pytest.raises(ValueError, match="guidance needs both"):
        sample(EXACT, (2, 3), solver=FirstHitting(), guidance=CFG(3.0))
    with pytest.raises((ValueError, RuntimeError, TypeError)):
        sample(denoiser, (2, 3), solver=FirstHitting(), guidance=APG(3.0))


def test_a_network_that_is_told_the_time_is_asked_at_every_step() -> None:
    told: list[Tensor] = []

    def timed(x: Tensor, t: Tensor) -> Tensor:
        told.append(t.clone())
        return torch.zeros(*x.shape, 3)

    denoiser = TokenDenoiser(timed, PROCESS, told="time")
    _, info = sample(denoiser, (2, 4), solver=MaskedAncestral(30), generator=seed(), return_info=True)
    assert info.nfe > 8  # at most that without the time
    assert [t[0].item() for t in told] == pytest.approx(info.queries)
    told.clear()
    _, info = sample(denoiser, (2, 4), solver=FirstHitting(), generator=seed(), return_info=True)
    assert all(torch.equal(t, q.float()) for t, q in zip(told, info.queries, strict=True))
    parts: list[Tensor] = []
    part = TokenDenoiser(lambda x, m: parts.append(m) or torch.zeros(*x.shape, 3), PROCESS, told="masked")
    sample(part, (2, 4), solver=FirstHitting(), generator=seed())
    assert [m.tolist() for m in parts] == [[n / 4, n / 4] for n in (4, 3, 2, 1)]


def test_every_solver_of_tokens_is_here() -> None:
    found = [getattr(generate, name) for name in generate.__all__]
    solvers = {c for c in found if isinstance(c, type) and issubclass(c, Solver) and c.discrete}
    assert solvers == {type(solver) for solver in SOLVERS.values()}


# -- bad input


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: sample(EXACT, (2, 4), solver=FirstHitting(steps=5)), "steps must be at most the 4 positions, got 5"),
        (lambda: sample(EXACT, (2, 4), solver=FirstHitting(), steps=5), "steps must be at most"),
        (lambda: FirstHitting().times(PROCESS, steps=1), r"FirstHitting\(steps=1\)"),
        (lambda: sample(EXACT, (2, 4), solver=FirstHitting(steps=2), steps=3), "steps must be the solver's own, 2"),
        (lambda: sample(EXACT, (2, 4), solver=MaskedAncestral(2), steps=3), "steps must be the solver's own, 2"),
        (lambda: sample(EXACT, (2, 4), solver=MaskedAncestral()), "give either steps or nfe"),
        (lambda: FirstHitting(order=2), "variant must be"),
        (lambda: FirstHitting(variant="pc"), "variant must be"),
        (lambda: sample(EXACT, (2, 4), solver=DDIM(), steps=3), "steps through numbers, not integer states"),
        (lambda: sample(lambda x, t: x, (2, 4), process=VP(), solver=FirstHitting()), "integer states only, which VP"),
        (lambda: sample(EXACT, torch.zeros(2, 4), solver=FirstHitting()), "x_T_or_shape must be integers"),
        (lambda: sample(EXACT, torch.full((2, 4), 4), solver=FirstHitting()), "tokens below vocab=3 or the mask 3, got 4"),
        (lambda: sample(EXACT, torch.full((2, 4), -1), solver=FirstHitting()), "got -1"),
        (lambda: sample(EXACT, (4,), solver=FirstHitting()), r"shape must be \(B, L\)"),
        (lambda: sample(EXACT, (2, 4), solver=FirstHitting(), dtype=torch.float32), "dtype must be left out"),
        (lambda: sample(EXACT, (2, 4), solver=FirstHitting(), corrector=lambda x, t: x), "corrector cannot be used"),
        (lambda: sample(says(0.0, math.nan), (2, 4), solver=FirstHitting()), "NaN in the prediction of evaluation 1"),
        (lambda: sample(says(0.0, math.inf), (2, 4), solver=FirstHitting()), "infinity in the prediction"),
        (lambda: sample(says(-math.inf, -math.inf), (2, 4), solver=FirstHitting()), "NaN"),
        (lambda: TokenPrediction(torch.zeros(2, 4, 2), PROMPT, 0.5, PROCESS), "logits must have shape"),
        (lambda: sample(TokenDenoiser(lambda x: x, PROCESS), (2, 4), solver=FirstHitting()), "logits must be a floating"),
        (lambda: EXACT(PROMPT, 0.5).replace(torch.zeros(3, 6, 3), "sample"), "kind must be 'logits'"),
    ],
)  # fmt: skip
def test_bad_input(call: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        call()


def test_a_single_token_and_half_precision() -> None:
    one = TokenDenoiser(lambda x: torch.zeros(*x.shape, 1), MaskedProcess(1))
    for solver in SOLVERS.values():
        assert bool((sample(one, (2, 5), solver=solver, generator=seed()) == 0).all())
    p = torch.tensor([0.7, 0.3])
    half = TokenDenoiser(lambda x: p.log().half().expand(*x.shape, 2), MaskedProcess(2))
    assert half(torch.tensor([[2]]), 0.5).log_probs.dtype == torch.float32
    x = sample(half, (4000, 2), solver=FirstHitting(), generator=seed())
    assert x.double().mean().item() == pytest.approx(0.3, abs=4 * math.sqrt(0.21 / 8000))


def test_the_mask_is_never_drawn_even_if_the_network_wants_it() -> None:
    denoiser = TokenDenoiser(lambda x: torch.tensor([0.0, 60.0, 0.0]).expand(*x.shape, 3), MaskedProcess(3, mask_id=1))
    for solver in SOLVERS.values():
        x = sample(denoiser, (50, 5), solver=solver, generator=seed())
        assert set(x.unique().tolist()) == {0, 2}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("solver", [FirstHitting(steps=4), FirstHitting(steps=8), MaskedAncestral(6, cache=False)])
def test_steps_do_not_wait_for_the_device(solver: Solver) -> None:
    denoiser = TokenDenoiser(lambda x: torch.zeros(*x.shape, 3, device="cuda"), PROCESS)
    draw = torch.Generator("cuda").manual_seed(0)

    def strict(step: Any) -> None:
        torch.cuda.set_sync_debug_mode("default" if step.last else "error")

    try:
        x = sample(denoiser, (4, 8), solver=solver, generator=draw, callback=strict, check_finite=False)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert bool((x < 3).all())
