"""Precision-weighted guidance against its equations, written here again, its invariances, and what it refuses."""

from __future__ import annotations

import copy
import itertools
import math
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from polyak.generate import (
    APG,
    CFG,
    EDM,
    VP,
    ContextDropout,
    Denoiser,
    DPMSolverMultistep,
    Euler,
    Evaluator,
    Heun,
    PrecisionGuidance,
    PrecisionState,
    Prediction,
    Query,
    context_denoiser,
    ensemble_forecast,
    sample,
)
from polyak.generate.guidance import Guidance

SHAPE = (6, 2, 5, 4)  # two forecasts of three members, two frames
EDM20 = EDM(sigma_min=0.01, sigma_max=20.0)


def drawn(count: int = 4, seed: int = 0, shape: tuple[int, ...] = SHAPE, dtype: torch.dtype = torch.float64) -> Any:
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(seed), dtype=dtype).unbind()


def predictions(seed: int, kind: str = "sample") -> tuple[Prediction, Prediction]:
    x, c, u, _ = drawn(seed=seed)
    return tuple(Prediction(o, x, 0.6, VP(), kind) for o in (c, u))  # type: ignore[return-value]


def weight_by_hand(
    history: list[Tensor], members: int, q: float = 1.0, clip: Any = (0.0, 1.0), window: Any = None, start: int = 1
) -> Tensor:
    """W in NumPy, forecast by forecast."""
    u = np.var(np.stack([h.numpy() for h in history][-(window or len(history)) :]), axis=0)
    for i in range(0, len(u), members):
        u[i : i + members] = u[i : i + members].mean(0)
    if len(history) <= start:
        u[:] = 0
    w = np.zeros_like(u)
    for i in range(len(u)):
        level = np.quantile(u[i], q)
        w[i] = np.clip(np.divide(u[i], level, out=np.zeros_like(u[i]), where=u[i] > 0), *clip)
    return torch.from_numpy(w)


# --- the equations

OPTIONS: list[dict[str, Any]] = [
    {}, {"pool": "member"}, {"quantile": 0.8}, {"clip": (0.2, 0.7)}, {"window": 2}, {"start": 0}, {"start": 3},
    {"pool": "member", "quantile": 0.37, "clip": (0.0, 3.0)},
]  # fmt: skip


@pytest.mark.parametrize("kind", ["sample", "epsilon", "v_prediction", "flow"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_it_is_its_equations(options: dict[str, Any], kind: str) -> None:
    guidance = PrecisionGuidance(1.7, members=3, **options)
    state, history = guidance.init(), []
    told = {"q" if k == "quantile" else k: v for k, v in options.items() if k != "pool"}
    for seed in range(4):
        cond, uncond = predictions(seed, kind)
        history.append(cond.x0)
        w = weight_by_hand(history, 1 if options.get("pool") == "member" else 3, **told)
        got = guidance(cond, uncond, state)
        assert got.kind == kind
        assert torch.allclose(got.x0, cond.x0 + 1.7 * w * (cond.x0 - uncond.x0), rtol=1e-11, atol=1e-11)
    assert isinstance(guidance, Guidance)


def test_the_least_precise_pixels_get_the_most() -> None:
    state, guidance = PrecisionState(), PrecisionGuidance(1.0)
    quiet = torch.linspace(0, 1, 12, dtype=torch.float64)[None]
    for step in range(4):
        state.add((-1.0) ** step * quiet)
    weight = guidance.weight(state)
    assert weight is not None
    assert bool((weight.diff(dim=1) > 0).all())
    assert weight[0, -1] == 1
    assert state.precision is not None
    assert bool((state.precision.diff(dim=1) < 0).all())


@pytest.mark.parametrize("window", [None, 3])
def test_the_running_variance_is_that_of_the_list(window: int | None) -> None:
    state, history = PrecisionState(members=3, window=window), []
    for seed in range(9):
        history.append(1e3 + drawn(1, seed)[0])  # an offset that sums of squares would not survive
        said = history[-1].clone()
        state.add(said)
        said.zero_()  # as by a network that writes its outputs to one place
    rows = np.var(torch.stack(history[-(window or 9) :]).numpy(), axis=0)
    want = rows.reshape(2, 3, *SHAPE[1:]).mean(1).repeat(3, 0)
    assert state.uncertainty is not None
    assert np.abs(state.uncertainty.numpy() - want).max() < 1e-12
    assert torch.allclose(state.precision, 1 / (state.uncertainty + 1e-6))  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["sample", "epsilon", "v_prediction", "flow", "score", "edm"])
def test_with_weight_one_it_is_cfg_and_with_scale_zero_the_conditional_prediction(kind: str) -> None:
    flat, none = PrecisionGuidance(2.0, clip=(1.0, 1.0)), PrecisionGuidance(0.0)
    states = flat.init(), none.init()
    for seed in range(3):
        cond, uncond = predictions(seed, kind)
        assert torch.equal(flat(cond, uncond, states[0]).output, CFG(3.0)(cond, uncond).output)
        assert none(cond, cond, states[1]) is cond
    assert not none.paired
    assert torch.equal(states[0].uncertainty, states[1].uncertainty)  # type: ignore[arg-type]


@pytest.mark.parametrize("solver", [Euler(), Heun(), DPMSolverMultistep(order=2, form="data")])
def test_along_a_trajectory_these_hold_to_the_bit(solver: Any) -> None:
    x = EDM20.prior((6, 3), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    run = {"solver": solver, "steps": 6}
    cfg = sample(two_laws(), x, guidance=CFG(3.0), **run)
    assert torch.equal(sample(two_laws(), x, guidance=PrecisionGuidance(2.0, clip=(1.0, 1.0)), **run), cfg)
    assert torch.equal(sample(two_laws(), x, guidance=PrecisionGuidance(0.0), **run), sample(two_laws(), x, **run))
    assert not torch.allclose(sample(two_laws(), x, guidance=PrecisionGuidance(2.0), **run), cfg)


def test_predictions_that_stay_are_not_guided() -> None:
    guidance = PrecisionGuidance(5.0, members=2)
    state = guidance.init()
    cond, uncond = predictions(0)
    for _ in range(4):
        assert torch.equal(guidance(cond, uncond, state).output, cond.output)
    assert not bool(state.uncertainty.any())
    state.add(cond.output.clone().index_fill(1, torch.tensor([0]), 0.0))  # half of the pixels still do
    for q in (1.0, 0.2):  # whether or not the level is 0, too
        weight = PrecisionGuidance(5.0, members=2, quantile=q).weight(state)
        assert not bool(weight[:, 1].any())
        assert weight[:, 0].amax() == 1


def test_of_x0_and_not_of_the_noisy_state() -> None:
    """x_t changes by the noise alone: where the predicted data stay, U is 0."""
    cond, _ = predictions(0)
    state, guidance = PrecisionState(), PrecisionGuidance(0.0)
    for t in (0.9, 0.5, 0.1):
        x = VP().alpha(t) * cond.x0 + VP().sigma(t) * drawn()[3]
        guidance(Prediction((x - VP().alpha(t) * cond.x0) / VP().sigma(t), x, t, VP(), "epsilon"), None, state)
    assert state.uncertainty.max() < 1e-25  # type: ignore[union-attr]


# --- invariances


def guided(rows: Any, guidance: PrecisionGuidance, dims: Any = None) -> Tensor:
    """Three steps of the predictions with these rows, or with flipped pixels."""
    state = guidance.init()
    for seed in range(3):
        pair = (p if dims is None else p.replace(p.output.flip(dims)) for p in predictions(seed))
        cond, uncond = (Prediction(p.output[rows], p.x[rows], 0.6, VP(), "sample") for p in pair)
        out = guidance(cond, uncond, state).output
    return out


ALL = torch.arange(6)


def test_pixels_and_members_are_exchangeable() -> None:
    guidance = PrecisionGuidance(2.0, members=3, quantile=0.9)
    whole = guided(ALL, guidance)
    assert torch.allclose(guided(ALL, guidance, (1, 2, 3)), whole.flip(1, 2, 3), rtol=1e-13)
    order = torch.tensor([2, 0, 1, 5, 4, 3])
    assert torch.allclose(guided(order, guidance), whole[order], rtol=1e-12)
    swapped = torch.tensor([3, 1, 2, 0, 4, 5])  # between forecasts they are not
    assert not torch.allclose(guided(swapped, guidance), whole[swapped], rtol=1e-3)


def test_a_forecast_does_not_depend_on_its_batch() -> None:
    for members, rows in ((3, torch.tensor([3, 4, 5])), (1, torch.tensor([4]))):
        guidance = PrecisionGuidance(2.0, pool="ensemble" if members > 1 else "member", members=members)
        assert torch.allclose(guided(rows, guidance), guided(ALL, guidance)[rows], rtol=1e-13)


def test_resampled_rows_take_their_history_along() -> None:
    ancestors = torch.tensor([0, 0, 2, 3, 5, 5])
    for guidance in (
        PrecisionGuidance(pool="member"),
        PrecisionGuidance(pool="member", window=2, inner=APG(momentum=-0.5)),
    ):
        state, moved = guidance.init(), guidance.init()
        for seed in range(3):
            cond, uncond = predictions(seed)
            guidance(cond, uncond, state)
            guidance(
                *(Prediction(p.output[ancestors], p.x[ancestors], 0.6, VP(), "sample") for p in (cond, uncond)), moved
            )
        again = guidance.reindex(state, ancestors)
        assert torch.equal(again.uncertainty, moved.uncertainty)
        assert again.count == 3
        for s in (again, moved):
            s.add(drawn(1, 7)[0])
        assert torch.equal(again.uncertainty, moved.uncertainty)
        if guidance.inner is not None:
            assert torch.equal(again.inner.average, moved.inner.average)


def test_smoothing_is_a_mean_over_neighbours_that_are_there() -> None:
    state = PrecisionState()
    for sign in (1.0, -1.0):
        state.add(sign * torch.ones(1, 1, 9, 9, dtype=torch.float64))
    assert torch.allclose(PrecisionGuidance(smooth=1.0).weight(state), torch.ones(1, 1, 9, 9).double())  # type: ignore[arg-type]
    u, there = drawn(1, 3, (9, 7))[0].square(), torch.ones(9, 7, dtype=torch.bool)
    there[2:4, 3:] = False
    want = torch.zeros_like(u)
    for i, k in there.nonzero().tolist():
        near = [(a, b) for a, b in there.nonzero().tolist() if max(abs(a - i), abs(b - k)) <= 5]  # within 3 sigma
        share = [math.exp(-((a - i) ** 2 + (b - k) ** 2) / (2 * 1.5**2)) for a, b in near]
        want[i, k] = sum(s * u[at] for s, at in zip(share, near, strict=True)) / sum(share)
    one = PrecisionState(count=2, mean=u[None], m2=2 * u[None])
    got = PrecisionGuidance(smooth=1.5, mask=there[None]).weight(one)
    assert torch.allclose(got, want[None] / want.max(), rtol=1e-12)  # type: ignore[arg-type]


def test_masked_pixels_have_no_part_in_the_weights() -> None:
    mask = torch.ones(1, 2, 5, 4, dtype=torch.bool)
    mask[..., 0] = False
    history = list(drawn(3))
    loud = [h.clone() for h in history]
    for i, h in enumerate(loud):
        h[..., 0] = 1e6 * i
    for options in ({}, {"quantile": 0.6}, {"smooth": 1.0}):
        guidance = PrecisionGuidance(members=3, mask=mask, **options)
        got = []
        for steps in (history, loud):
            state = guidance.init()
            for h in steps:
                state.add(h)
            got.append(guidance.weight(state))
        assert torch.equal(*got)
        assert not bool(got[0][..., 0].any())
    got, state = guidance.weight(state), PrecisionState(members=3)
    for h in history:
        state.add(h[..., 1:])
    cut = PrecisionGuidance(members=3, quantile=0.6).weight(state)
    masked = PrecisionState(members=3)
    for h in history:
        masked.add(h)
    assert torch.allclose(PrecisionGuidance(members=3, quantile=0.6, mask=mask).weight(masked)[..., 1:], cut)  # type: ignore[index]


def test_half_precision() -> None:
    state = PrecisionState()
    for sign in (1, -1):
        state.add(torch.full((1, 3), sign * 1e-4).half())  # whose square is 0 in float16
    assert state.uncertainty is not None
    assert state.uncertainty.dtype == torch.float32
    assert torch.allclose(state.uncertainty, torch.tensor(1e-8), rtol=1e-2)
    x = EDM20.prior((6, 3), generator=torch.Generator().manual_seed(0))
    run = {"solver": Euler(), "steps": 6, "guidance": PrecisionGuidance(2.0, members=3)}
    half = sample(two_laws(), x.bfloat16(), **run)
    assert half.dtype == torch.bfloat16
    assert (half - sample(two_laws(), x, **run)).abs().max() < 0.1
    assert sample(two_laws(), x[:0], **run).shape == (0, 3)


def test_with_apg_the_weight_is_of_what_its_projection_leaves() -> None:
    inner = APG(6.0, norm_threshold=2.0, momentum=-0.5)
    guidance = PrecisionGuidance(0.5, members=3, inner=inner)
    state, own, history = guidance.init(), inner.init(), []
    for seed in range(3):
        cond, uncond = predictions(seed)
        history.append(cond.x0)
        update = inner(cond, uncond, own).x0 - cond.x0
        want = cond.x0 + 0.5 * weight_by_hand(history, 3) * update
        assert torch.allclose(guidance(cond, uncond, state).x0, want, rtol=1e-12, atol=1e-12)
    assert not PrecisionGuidance(1.0, inner=CFG(1.0)).paired
    window = PrecisionGuidance(1.0, inner=APG(4.0, start=0.2, stop=0.6))
    x = EDM20.prior((6, 3), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert sample(two_laws(), x, solver=Euler(), steps=6, guidance=window).shape == x.shape


# --- along a trajectory

C = torch.tensor([0.05, 0.3, 0.9], dtype=torch.float64)
MEAN = torch.tensor([0.4, -0.2, 0.1], dtype=torch.float64)


def two_laws(mean: Any = MEAN, c: Any = C) -> Denoiser:
    """N(mean, c) with the context, N(0, 1) without."""

    def of(mean: Any, c: Any) -> Any:
        return lambda x, s: (mean + c / (c + s[:, None] ** 2) * (x - mean)).to(x.dtype)

    return Denoiser(of(mean, c), EDM20, "sample", unconditional=of(0.0, 1.0), label=lambda t: t)


def test_golden_trajectory() -> None:
    """Euler on dx/ds = (x - D) / s in NumPy, with the map, the weight and the guidance written out."""
    x = EDM20.prior((4, 3), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    times = EDM20.grid(6, "karras").tolist()
    got = sample(two_laws(), x, solver=Euler(), grid=times, guidance=PrecisionGuidance(2.0, members=2, quantile=0.9))
    state, history = x.numpy(), []
    for s, t in itertools.pairwise(times):
        c, u = MEAN.numpy() + (C / (C + s**2)).numpy() * (state - MEAN.numpy()), state / (1 + s**2)
        history.append(torch.from_numpy(c))
        data = c + 2.0 * weight_by_hand(history, 2, 0.9).numpy() * (c - u)
        state = state + (t - s) * (state - data) / s
    assert np.allclose(got.numpy(), state, rtol=1e-10, atol=1e-12)


def test_only_the_first_evaluation_of_a_step_is_counted() -> None:
    states: list[Any] = []
    x = EDM20.prior((4, 3), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    guidance = PrecisionGuidance(1.0, members=2)
    sample(two_laws(), x, solver=Heun(), steps=5, guidance=guidance, callback=lambda step: states.append(step.guidance))
    assert [state.count for state in states] == [1, 2, 3, 4, 5]
    evaluate = Evaluator(two_laws(), guidance=guidance)
    for s in (5.0, 2.0):
        evaluate(Query(x, s))
    kept = evaluate.state.uncertainty
    evaluate(Query(x, 1.0, first=False))
    assert torch.equal(evaluate.state.uncertainty, kept)


def test_a_forecast_begins_anew_and_goes_on_from_a_step() -> None:
    guidance, steps = PrecisionGuidance(2.0, members=2), []
    x = EDM20.prior((4, 3), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    run = {"solver": Heun(), "steps": 6, "guidance": guidance}
    first = sample(two_laws(), x, callback=steps.append, **run)
    assert torch.equal(sample(two_laws(), x, **run), first)  # the object remembers nothing
    assert torch.equal(sample(two_laws(), copy.deepcopy(steps[2]), **run), first)


@pytest.mark.parametrize("window", [None, 6])
def test_the_map_of_a_gaussian_is_as_derived(window: int | None) -> None:
    """On the ODE D_c - mean = sqrt(c) sqrt(c / (c + s^2)) xi: the mean of U is c Var_j sqrt(c / (c + s_j^2))."""
    c = torch.linspace(0.02, 0.98, 25, dtype=torch.float64)
    rows, first = 4000, 20.0
    xi = torch.randn(rows, 25, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    states: list[Any] = []
    times = EDM20.grid(60, "karras").tolist()
    sample(
        two_laws(0.0, c), (c + first**2).sqrt() * xi, solver=Heun(), grid=times, callback=lambda s: states.append(s.guidance),
        guidance=PrecisionGuidance(0.0, members=rows, window=window),
    )  # fmt: skip
    s = torch.tensor(times[:-1], dtype=torch.float64)[:, None]
    want = c * (c / (c + s**2)).sqrt()[-(window or 60) :].var(0, correction=0)
    u = states[-1].uncertainty[0]
    # Five standard errors of the mean of xi^2, and the solver's own error.
    assert torch.allclose(u, want, rtol=5 * math.sqrt(2 / rows) + 0.02)
    rising = (want.diff() > 0).double().mean()
    assert rising == (1 if window is None else 0)  # late in sampling a window shows the reverse


# --- forecasts


class Linear(torch.nn.Module):
    """Says so much of the data as it is told: the last frame, for all frames ahead."""

    def forward(self, x: Tensor, label: Tensor, told: Tensor) -> Tensor:
        known = told[:, -1:]
        return known * told[:, -2:-1] + 0.3 * x / (1 + label.reshape(-1, 1, 1, 1).exp() ** 8)


MAKE = partial(context_denoiser, Linear(), process=EDM20, prediction="sample")
RUN: dict[str, Any] = {"solver": Euler(), "steps": 5}


def context(rows: int = 2, frames: int = 3) -> Tensor:
    return drawn(1, 5, (rows, frames, 6, 4))[0]


def forecast(guidance: Any = None, c: Any = None, **how: Any) -> Any:
    generator = torch.Generator().manual_seed(0)
    return ensemble_forecast(MAKE, context() if c is None else c, guidance=guidance, generator=generator, **RUN, **how)


def test_a_forecast_is_sampling_with_repeated_contexts() -> None:
    guidance = PrecisionGuidance(1.5)
    made = forecast(guidance, members=4, shape=(2, 6, 4))
    assert made.samples.shape == (2, 4, 2, 6, 4)
    assert made.uncertainty.shape == made.precision.shape == (2, 2, 6, 4)
    states: list[Any] = []
    denoiser = MAKE(context().repeat_interleave(4, 0))
    generator = torch.Generator().manual_seed(0)
    x = sample(
        denoiser, (8, 2, 6, 4), guidance=PrecisionGuidance(1.5, members=4), generator=generator, dtype=torch.float64,
        callback=lambda step: states.append(step.guidance), **RUN,
    )  # fmt: skip
    assert torch.equal(made.samples.flatten(0, 1), x)
    assert torch.allclose(made.uncertainty, states[-1].uncertainty[::4])
    assert torch.allclose(made.precision, 1 / (made.uncertainty + 1e-6))


@pytest.mark.parametrize("guidance", [None, CFG(3.0), CFG(1.0), APG(3.0, momentum=-0.5)], ids=repr)
def test_any_guidance_gets_a_map(guidance: Any) -> None:
    made = forecast(guidance, members=2)
    x = sample(
        MAKE(context().repeat_interleave(2, 0)), (4, 3, 6, 4), guidance=guidance, dtype=torch.float64,
        generator=torch.Generator().manual_seed(0), **RUN,
    )  # fmt: skip
    assert torch.equal(made.samples.flatten(0, 1), x)
    assert bool((made.uncertainty > 0).all())


def test_an_inner_guidance_asks_for_both_predictions_where_it_needs_them() -> None:
    inner, made = APG(5.0, momentum=-0.5, start=0.2, stop=0.6), []

    def make(c: Tensor) -> Denoiser:
        made.append(MAKE(c))
        return made[-1]

    run = {"guidance": inner, "generator": torch.Generator().manual_seed(0)} | RUN | {"solver": Heun()}
    alone = make(context().repeat_interleave(2, 0))
    x = sample(alone, (4, 3, 6, 4), dtype=torch.float64, **run)
    run["generator"].manual_seed(0)
    assert torch.equal(ensemble_forecast(make, context(), members=2, **run).samples.flatten(0, 1), x)
    assert made[1].evaluations == alone.evaluations == 10 + 4
    state = PrecisionGuidance(1.0, inner=inner).init(5)
    assert not PrecisionGuidance(0.0, inner=inner).paired_at(0.5, state, True)
    assert PrecisionGuidance(1.0, inner=CFG(2.0)).paired_at(0.5, state, True)


def test_one_member_is_its_own_ensemble() -> None:
    with pytest.warns(UserWarning, match="members=1 leaves nothing to pool: the member's own variance is used"):
        made = forecast(PrecisionGuidance(1.0), members=1)
    same = forecast(PrecisionGuidance(1.0, pool="member"), members=1)
    assert torch.equal(made.samples, same.samples)
    assert forecast(c=context()[:0], members=3).samples.shape == (0, 3, 3, 6, 4)


def test_what_a_network_is_told() -> None:
    c, drop = context(4), ContextDropout(0.2)
    assert torch.equal(drop.eval()(c), torch.cat([c, torch.ones(4, 1, 6, 4).double()], 1))
    many = context(1).expand(4000, 3, 6, 4)
    told = drop.train()(many, generator=torch.Generator().manual_seed(0))
    left = (told == 0).flatten(1).all(1)
    assert torch.equal(told[~left], ContextDropout(0.0)(many)[~left])
    assert abs(left.double().mean() - 0.2) < 5 * 0.4 / math.sqrt(4000)
    again = drop(many, generator=torch.Generator().manual_seed(0))
    assert torch.equal(told, again)
    assert repr(drop) == "ContextDropout(p=0.2)"
    asked: list[Tensor] = []
    context_denoiser(lambda x, t, told: asked.append(told) or x, c, EDM20).pair(c, 1.0)
    assert torch.equal(asked[0], ContextDropout(0.0)(c))
    assert not bool(asked[1].any())  # nor does the mask say that anything is known
    encoded = c.clone().requires_grad_()  # by an encoder that is trained along
    MAKE(encoded)(torch.zeros(4, 3, 6, 4).double(), 1.0).x0.sum().backward()
    assert torch.equal(encoded.grad, torch.tensor([0.0, 0, 3])[:, None, None].double().expand_as(c))  # type: ignore[arg-type]
    cond, uncond = MAKE(c).pair(torch.zeros(4, 3, 6, 4).double(), 1.0)
    assert torch.equal(cond.x0, c[:, -1:].expand_as(c))
    assert not bool(uncond.x0.any())


def test_missing_pixels() -> None:
    c, mask = context(), torch.ones(2, 1, 6, 4, dtype=torch.bool)
    mask[..., 0] = False
    hole = c.masked_fill(~mask, math.nan)
    for call in (lambda: forecast(c=hole), lambda: MAKE(hole)):
        with pytest.raises(ValueError, match="context has NaN or infinity, which needs a mask that is False there"):
            call()
    with pytest.raises(ValueError, match="which needs mask to be False there"):
        forecast(c=hole.fill_(math.nan), mask=mask)
    hole = c.masked_fill(~mask, math.nan)
    made = forecast(PrecisionGuidance(1.0, quantile=0.5), c=hole, mask=mask)
    assert bool(made.samples.isfinite().all())
    filled = c.masked_fill(~mask, 9.0)
    assert torch.equal(made.samples, forecast(PrecisionGuidance(1.0, quantile=0.5), c=filled, mask=mask).samples)
    told = ContextDropout(0.0)(hole, mask)
    assert torch.equal(told[:, -1:], mask.double())

    # Forecasts may have other dimensions before the context's own; pixels must be the same.
    def volumes(c: Tensor, mask: Tensor) -> Denoiser:
        return context_denoiser(lambda x, t, told: 0.5 * x, c, EDM20, "sample", mask=mask)

    how = {"mask": mask, "members": 2, "guidance": PrecisionGuidance(1.0)} | RUN
    assert ensemble_forecast(volumes, c, shape=(2, 3, 6, 4), **how).samples.shape == (2, 2, 2, 3, 6, 4)
    assert ensemble_forecast(volumes, c, shape=(6, 4), **how).samples.shape == (2, 2, 6, 4)
    with pytest.raises(
        ValueError, match=r"mask must broadcast to the batch's shape \(4, 2, 5, 4\), got \(4, 1, 6, 4\)"
    ):
        ensemble_forecast(volumes, c, shape=(2, 5, 4), **how)
    # The same mask is the guidance's.
    rows = mask.repeat_interleave(8, 0)
    with_mask, without = (
        sample(
            MAKE(hole.repeat_interleave(8, 0), mask=rows), (16, 3, 6, 4), dtype=torch.float64,
            generator=torch.Generator().manual_seed(0), **RUN,
            guidance=PrecisionGuidance(1.0, quantile=0.5, members=8, mask=m),
        )
        for m in (rows, None)
    )  # fmt: skip
    assert torch.equal(made.samples.flatten(0, 1), with_mask)
    assert not torch.allclose(with_mask, without, rtol=1e-3)
    # And so is one that it has of its own.
    own = [forecast(PrecisionGuidance(1.0, quantile=0.5, mask=m), c=filled).samples for m in (rows, None)]
    assert not torch.allclose(*own, rtol=1e-3)


# --- what is refused


def test_what_is_refused() -> None:
    cond, uncond = predictions(0)
    for missing in (None, cond):
        with pytest.raises(ValueError, match="uncond is missing: precision guidance needs a context-free prediction"):
            PrecisionGuidance()(cond, missing, PrecisionState())
    untrained = partial(MAKE, context_free=False)
    for guidance in (PrecisionGuidance(1.0), CFG(2.0)):
        with pytest.raises(
            ValueError, match="precision guidance needs a context-free prediction: train the network with"
        ):
            ensemble_forecast(untrained, context(), guidance=guidance, **RUN)
    assert ensemble_forecast(untrained, context(), **RUN).samples.shape == (2, 8, 3, 6, 4)
    with pytest.raises(ValueError, match=r"clip must be \(lo, hi\) with lo <= hi, got \(1.0, 0.5\)"):
        PrecisionGuidance(clip=(1.0, 0.5))
    with pytest.raises(ValueError, match=r"window must be .* got 1"):
        PrecisionGuidance(window=1)
    with pytest.raises(ValueError, match=r"scale must be .* got -0.5"):
        PrecisionGuidance(-0.5)
    with pytest.raises(ValueError, match="members=4 must divide the batch, got 6 rows"):
        PrecisionGuidance(members=4)(cond, uncond, PrecisionState(members=4))
    with pytest.raises(ValueError, match="state is needed"):
        PrecisionGuidance()(cond, uncond)
    state = PrecisionState()
    with pytest.raises(ValueError, match="state must have seen the first evaluation"):
        PrecisionGuidance()(cond, uncond, state, update=False)
    state.add(cond.x0)
    with pytest.raises(ValueError, match=r"state is of predictions of shape \(6, 2, 5, 4\), got \(3, 2, 5, 4\)"):
        state.add(cond.x0[:3])
    with pytest.raises(ValueError, match="mask must be of bool"):
        PrecisionGuidance(mask=torch.ones(1, 2))
    with pytest.raises(ValueError, match="mask must be of bool"):
        ContextDropout()(context(), torch.ones(2, 1, 6, 4))
    with pytest.raises(ValueError, match=r"mask must broadcast to \(2, 1, 6, 4\), got \(2, 1, 5, 4\)"):
        ContextDropout()(context(), torch.ones(2, 1, 5, 4, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"guidance\.members must be members=8, or left out, got 2"):
        forecast(PrecisionGuidance(members=2))
    with pytest.raises(ValueError, match="smooth=1 needs fields"):
        PrecisionGuidance(smooth=1.0).weight(PrecisionState(count=1, mean=torch.ones(2, 3), m2=torch.ones(2, 3)))
