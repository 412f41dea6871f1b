"""APG against its equations (written here again, independently), its bounds and invariances, and what it refuses."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from polyak.generate import (
    APG,
    CFG,
    DDIM,
    EDM,
    VP,
    APGState,
    Denoiser,
    DPMSolverAdaptive,
    Euler,
    Evaluator,
    Heun,
    Prediction,
    Query,
    normalized_guidance,
    sample,
)
from polyak.generate.apg import contrast, denoiser_post_cfg, project, saturation
from polyak.generate.problems import ExactDenoiser, Gaussian, Mixture, gaussian_flow

SHAPE = (5, 3, 4, 4)
OPTIONS: list[dict[str, Any]] = [
    {}, {"norm_threshold": 2.0}, {"momentum": -0.5}, {"norm_threshold": 2.0, "momentum": -0.75, "eta": 0.3},
    {"eta": 1.0, "norm_threshold": 2.0}, {"base": "uncond", "norm_threshold": 2.0}, {"rescale": 0.7}, {"channelwise": True},
    {"channelwise": True, "norm_threshold": 2.0, "momentum": -0.5},
    {"space": "pred", "momentum": 0.5},
]  # fmt: skip
every_option = pytest.mark.parametrize("options", OPTIONS, ids=str)


def drawn(count: int = 3, seed: int = 0, shape: tuple[int, ...] = SHAPE, dtype: torch.dtype = torch.float64) -> Any:
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(seed), dtype=dtype).unbind()


def by_hand(c: Tensor, u: Tensor, w: float, before: Any = 0.0, **options: Any) -> tuple[Tensor, Tensor]:
    """The method's five lines, for one sample after another, in plain loops; and the new memory."""
    d = c - u + (options.get("momentum") or 0.0) * before
    memory, result = d.clone(), torch.empty_like(c)
    r, eta = options.get("norm_threshold", 0.0), options.get("eta", 0.0)
    for i in range(len(c)):
        capped = d[i] * min(1.0, r / d[i].norm().item()) if r > 0 else d[i]
        pieces = zip(capped, c[i], strict=True) if options.get("channelwise") else [(capped, c[i])]
        kept = [(p - (1 - eta) * (p * q).sum() / (q * q).sum() * q).reshape(-1) for p, q in pieces]
        update = torch.cat(kept).reshape(c[i].shape)
        made = u[i] + w * update if options.get("base") == "uncond" else c[i] + (w - 1) * update
        if phi := options.get("rescale"):
            made = phi * made * c[i].std() / made.std() + (1 - phi) * made
        result[i] = made
    return result, memory


def predictions(
    kind: str = "sample", t: float = 0.6, process: Any = None, seed: int = 0
) -> tuple[Prediction, Prediction]:
    x, c, u = drawn(seed=seed)
    return tuple(Prediction(o, x, t, process or VP(), kind) for o in (c, u))  # type: ignore[return-value]


# --- the equations


@every_option
def test_it_is_its_equations(options: dict[str, Any]) -> None:
    guidance = APG(6.0, **options)
    state, before = guidance.init(), 0.0
    for seed in range(3):
        cond, uncond = predictions(seed=seed)
        want, before = by_hand(cond.output, uncond.output, 6.0, before, **options)
        got = guidance(cond, uncond, state)
        assert got.kind == "sample"
        assert torch.allclose(got.output, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("r", [0.0, 2.0])
def test_the_papers_function_is_the_same(eta: float, r: float) -> None:
    state, before = APGState(momentum=-0.5), 0.0
    for seed in range(3):
        c, u, _ = drawn(seed=seed)
        want, before = by_hand(c, u, 5.0, before, momentum=-0.5, eta=eta, norm_threshold=r)
        assert torch.allclose(normalized_guidance(c, u, 5.0, state, eta, r), want, rtol=1e-12, atol=1e-12)
    assert state.step == 3


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "flow", "sample", "score", "edm"])
@pytest.mark.parametrize("w", [0.0, 0.3, 7.5])
def test_without_its_ingredients_it_is_cfg_to_the_bit(kind: str, w: float) -> None:
    cond, uncond = predictions(kind)
    got, want = APG(w, eta=1.0)(cond, uncond), CFG(w)(cond, uncond)
    assert got.kind == want.kind
    assert torch.equal(got.output, want.output)
    assert torch.equal(normalized_guidance(cond.output, uncond.output, w), want.output)
    single = normalized_guidance(cond.output.float(), uncond.output.float(), w)
    assert (single - want.output).abs().max() < 1e-6 * (1 + w) * want.output.abs().max()


@every_option
def test_scale_one_is_the_conditional_prediction(options: dict[str, Any]) -> None:
    cond, uncond = predictions()
    guidance = APG(1.0, **options)
    assert not guidance.paired
    assert guidance(cond, uncond, guidance.init()) is cond
    assert guidance(cond, cond, guidance.init()) is cond  # nobody asks for another
    assert guidance.combine(cond.x0, uncond.x0, guidance.init()) is cond.x0


def test_at_eta_zero_nothing_is_added_along_the_data_and_the_norm_is_bounded() -> None:
    c, u, other = drawn()
    for state in (None, APGState(momentum=-0.5, average=other)):
        moved = normalized_guidance(c, u, 9.0, state, 0.0, 2.0) - c
        along = (moved * c).flatten(1).sum(1) / (moved.flatten(1).norm(dim=1) * c.flatten(1).norm(dim=1))
        assert along.abs().max() < 1e-10
        # In double precision the bound holds to the rounding of some fifty terms.
        assert bool((moved.flatten(1).norm(dim=1) <= 8 * 2.0 * (1 + 1e-14)).all())
    kept = normalized_guidance(c, u, 9.0, None, 1.0, 2.0) - c
    assert torch.allclose(kept.flatten(1).norm(dim=1), torch.full((5,), 16.0, dtype=torch.float64))
    loose = normalized_guidance(c, u, 9.0, None, 1.0, 1e6)
    assert torch.allclose(loose, normalized_guidance(c, u, 9.0), rtol=1e-14)


def test_projection() -> None:
    a, b, _ = drawn()
    parallel, orthogonal = project(a, b)
    assert torch.allclose(parallel + orthogonal, a)
    assert (orthogonal * b).flatten(1).sum(1).abs().max() < 1e-12
    assert torch.allclose(parallel, project(a, -b)[0])  # whichever sign the direction has
    assert torch.allclose(parallel, project(a, 1e-8 * b)[0], rtol=1e-10)
    for i in range(len(a)):  # each sample by itself
        assert torch.allclose(parallel[i], (a[i] * b[i]).sum() / b[i].square().sum() * b[i])
    single = project(a.float(), b.float())[0]
    assert torch.equal(single, project(a.float().double(), b.float().double())[0].float())
    zero, rest = project(a, torch.zeros_like(a))
    assert not bool(zero.any())
    assert torch.equal(rest, a)


@pytest.mark.parametrize("beta", [-0.5, -0.75, 0.3])
def test_momentum_adds_up_and_is_no_average(beta: float) -> None:
    guidance, (cond, uncond) = APG(2.0, eta=1.0, momentum=beta), predictions()
    state, c, u = guidance.init(), cond.output, uncond.output
    for n in range(6):
        gain = ((guidance(cond, uncond, state).output - c) / (c - u)).mean().item()
        assert math.isclose(gain, (1 - beta ** (n + 1)) / (1 - beta), rel_tol=1e-9)
    if beta == -0.5:
        assert abs(gain - 2 / 3) < 0.02


def test_an_update_of_nothing_and_data_of_nothing() -> None:
    c, u, _ = drawn()
    zero = torch.zeros_like(c)
    assert torch.equal(normalized_guidance(c, c.clone(), 5.0, None, 0.0, 2.0), c)
    # Nothing is parallel to data that are 0.
    assert torch.allclose(normalized_guidance(zero, u, 5.0, None, 0.0, 0.0), -4 * u)
    assert torch.equal(APG(5.0, rescale=0.7).combine(zero, zero.clone(), APGState()), zero)
    c[2] = 0.0
    assert bool(normalized_guidance(c, u, 5.0, None, 0.0, 2.0).isfinite().all())
    for shape in ((0, 3, 4, 4), (2, 0)):
        none = torch.zeros(shape)
        assert normalized_guidance(none, none.clone(), 5.0, APGState(momentum=-0.5), 0.0, 2.0).shape == shape


# --- invariances


@every_option
def test_samples_do_not_influence_each_other(options: dict[str, Any]) -> None:
    guidance, order = APG(6.0, **options), torch.tensor([3, 0, 4, 1, 2])
    whole, moved, single = (guidance.init() for _ in range(3))
    for seed in range(2):
        cond, uncond = predictions(seed=seed)
        got = guidance(cond, uncond, whole).output
        pairs = {}
        for name, rows in (("moved", order), ("single", slice(2, 3))):
            pairs[name] = [Prediction(p.output[rows], cond.x[rows], 0.6, VP(), "sample") for p in (cond, uncond)]
        assert torch.allclose(guidance(*pairs["moved"], moved).output, got[order], rtol=1e-13)
        assert torch.allclose(guidance(*pairs["single"], single).output, got[2:3], rtol=1e-13)
    if whole.average is not None:
        reindexed = guidance.reindex(whole, order)
        assert torch.allclose(reindexed.average, moved.average)  # type: ignore[arg-type]
        assert torch.allclose(reindexed.before, moved.before)  # type: ignore[arg-type]
        assert reindexed.step == whole.step


def test_it_turns_with_the_data() -> None:
    c, u, other = (v.flatten(1) for v in drawn())
    turn = torch.linalg.qr(drawn(1, 3, (48, 48))[0]).Q
    states = [APGState(momentum=-0.5, average=v) for v in (other, other @ turn)]
    got = normalized_guidance(c @ turn, u @ turn, 6.0, states[1], 0.2, 2.0)
    assert torch.allclose(got, normalized_guidance(c, u, 6.0, states[0], 0.2, 2.0) @ turn, atol=1e-12)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "flow", "score", "edm"])
def test_other_outputs_are_guided_as_data(kind: str) -> None:
    cond, uncond = predictions(kind)
    guidance = APG(6.0, norm_threshold=2.0, momentum=-0.5)
    state, before = guidance.init(), 0.0
    for _ in range(2):
        want, before = by_hand(cond.x0, uncond.x0, 6.0, before, norm_threshold=2.0, momentum=-0.5)
        got = guidance(cond, uncond, state)
        assert torch.allclose(got.x0, want, rtol=1e-10, atol=1e-10)
    raw, _ = by_hand(cond.output, uncond.output, 6.0, norm_threshold=2.0)
    as_output = cond.replace(raw).x0
    assert (
        as_output - APG(6.0, norm_threshold=2.0)(cond, uncond).x0
    ).abs().max() > 0.1  # a threshold of data is none of noise
    assert torch.allclose(APG(6.0, norm_threshold=2.0, space="pred")(cond, uncond).x0, as_output)
    rows = torch.full((5,), 0.6, dtype=torch.float64)  # a time for each row goes another way to the same
    each = [Prediction(p.output, p.x, rows, VP(), kind) for p in (cond, uncond)]
    assert torch.allclose(APG(6.0)(*each).x0, APG(6.0)(cond, uncond).x0, rtol=1e-10)
    mixed = uncond.replace(uncond.x0, "sample")
    assert torch.allclose(APG(6.0)(cond, mixed).x0, APG(6.0)(cond, uncond).x0, rtol=1e-10)
    for x, t in ((uncond.x, 0.3), (2 * uncond.x, 0.6)):  # of another state or time
        other = Prediction(uncond.output, x, t, VP(), kind)
        want, _ = by_hand(cond.x0, other.x0, 6.0)
        assert torch.allclose(APG(6.0)(cond, other).x0, want, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("dtype", "eps"), [(torch.float32, 2e-6), (torch.bfloat16, 2e-2), (torch.float16, 2e-3)])
def test_dtypes(dtype: torch.dtype, eps: float) -> None:
    c, u = (v.to(dtype) for v in drawn()[:2])
    want, _ = by_hand(c.double(), u.double(), 4.0, norm_threshold=2.0)
    got = normalized_guidance(c, u, 4.0, None, 0.0, 2.0)
    assert got.dtype == dtype
    assert (got - want).abs().max() < eps * want.abs().max()
    large = normalized_guidance(300 * c, 300 * u, 4.0, None, 0.0, 0.1)  # squares that half precision cannot hold
    assert bool(large.isfinite().all())


def test_gradients_and_inputs() -> None:
    c, u, _ = drawn(shape=(2, 3))
    kept = c.clone(), u.clone()
    c.requires_grad_()
    assert torch.autograd.gradcheck(lambda c: normalized_guidance(c, u, 4.0, None, 0.3, 0.5), c)
    state = APGState(momentum=-0.5)
    outputs = [normalized_guidance(c.detach(), u, 4.0, state, 0.0, 0.0) for _ in range(3)]
    assert not torch.equal(outputs[0], outputs[1])
    assert torch.equal(c, kept[0])
    assert torch.equal(u, kept[1])


# --- along a trajectory

LAW = Mixture([[-1.0, 0.4], [0.6, 1.0], [0.3, -0.8]], 0.09, labels=[0, 1, 1])


def problem(process: Any = None, rows: int = 6) -> tuple[ExactDenoiser, Tensor]:
    process = process or EDM()
    x = process.prior((rows, 2), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return ExactDenoiser(LAW.of_class(1), process, unconditional=LAW), x


def golden(x: Tensor, times: list[float], w: float, r: float, beta: float, stages: int) -> Tensor:
    """Euler or Heun on EDM's equation dx/ds = (x - D) / s, with the guidance written out."""
    cond, uncond = (lambda x, s, law=law: law.posterior_mean(x, 1.0, s) for law in (LAW.of_class(1), LAW))
    memory: Any = 0.0
    for s, t in itertools.pairwise(times):
        data, now = by_hand(cond(x, s), uncond(x, s), w, memory, norm_threshold=r, momentum=beta)
        slope = (x - data) / s
        end = x + (t - s) * slope
        if stages == 2 and t > 0:
            data, _ = by_hand(cond(end, t), uncond(end, t), w, memory, norm_threshold=r, momentum=beta)
            end = x + (t - s) * (slope + (end - data) / t) / 2
        x, memory = end, now
    return x


@pytest.mark.parametrize(("solver", "stages"), [(Euler(), 1), (Heun(), 2)])
def test_golden_trajectory(solver: Any, stages: int) -> None:
    denoiser, x = problem()
    times = EDM().grid(8, "karras").tolist()
    got = sample(denoiser, x, solver=solver, grid=times, guidance=APG(5.0, norm_threshold=0.4, momentum=-0.5))
    assert torch.allclose(got, golden(x, times, 5.0, 0.4, -0.5, stages), rtol=1e-9, atol=1e-11)


def test_all_evaluations_of_a_step_see_one_memory() -> None:
    denoiser, x = problem()
    step, every = (APG(5.0, momentum=-0.5, update=which) for which in ("step", "every"))
    run = {"solver": Heun(), "steps": 6, "grid": "karras"}
    assert not torch.allclose(*(sample(denoiser, x, guidance=g, **run) for g in (step, every)))
    one_stage = [sample(denoiser, x, guidance=g, solver=Euler(), steps=6) for g in (step, every)]
    assert torch.equal(*one_stage)
    evaluate = Evaluator(denoiser, guidance=step)
    evaluate(Query(x, 2.0))
    kept = evaluate.state.average
    again = [evaluate(Query(x, 2.0, first=False)).x0 for _ in range(2)]
    assert torch.equal(*again)
    assert evaluate.state.average is kept


def test_a_trajectory_begins_anew_and_goes_on_from_a_step() -> None:
    denoiser, x = problem()
    guidance, kept = APG(5.0, norm_threshold=0.4, momentum=-0.5), []
    run = {"solver": Heun(), "steps": 6, "guidance": guidance}
    first = sample(denoiser, x, callback=kept.append, **run)
    assert torch.equal(sample(denoiser, x, **run), first)  # the object remembers nothing
    assert torch.equal(sample(denoiser, copy.deepcopy(kept[2]), **run), first)


def test_guidance_within_an_interval_saves_the_other_evaluations() -> None:
    denoiser, x = problem()
    guidance = APG(5.0, momentum=-0.5, start=0.25, stop=0.75)
    for solver, spent in ((Euler(), 8 + 4), (Heun(), 16 + 8)):
        _, info = sample(denoiser, x, solver=solver, steps=8, guidance=guidance, return_info=True)
        assert info.evaluations == spent
    # The same by hand: the steps outside without guidance.
    times = EDM().grid(8, "karras").tolist()
    for solver in (Euler(), Heun()):
        whole = sample(denoiser, x, solver=solver, grid=times, guidance=guidance)
        before = sample(denoiser, x, solver=solver, grid=times[:3])
        inner = sample(denoiser, before, solver=solver, grid=times[2:7], guidance=APG(5.0, momentum=-0.5))
        assert torch.allclose(whole, sample(denoiser, inner, solver=solver, grid=times[6:]), rtol=1e-12)
    with pytest.raises(ValueError, match="fractions of the steps"):
        sample(denoiser, x, solver=DPMSolverAdaptive(), guidance=guidance)


def test_gaussians_with_one_covariance() -> None:
    """There CFG is the exact sampler of a law whose mean is shifted by w - 1 differences; APG shifts nothing along D_c."""
    mean, shift, w = torch.tensor([0.5, -0.2]), torch.tensor([0.3, 0.4]), 4.0
    cond, uncond = (Gaussian(m, 0.04) for m in (mean, mean - shift))
    process = VP()
    denoiser = ExactDenoiser(cond, process, unconditional=uncond)
    x = process.prior((5, 2), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    want = gaussian_flow(Gaussian(mean + (w - 1) * shift, 0.04), process, x, process.t_max, process.t_min)
    # A second-order method of 400 steps is within 1e-4 of the flow.
    got = [sample(denoiser, x, solver=Heun(), steps=400, guidance=g) for g in (CFG(w), APG(w, eta=1.0), APG(w))]
    assert (got[0] - want).abs().max() < 1e-4
    assert torch.equal(*got[:2])
    assert (got[2] - want).norm(dim=1).min() > 0.1
    for t in (0.2, 0.7):
        guided, own = APG(w)(*denoiser.pair(x, t)).x0, denoiser(x, t).x0
        assert ((guided - own) * own).sum(1).abs().max() < 1e-12


def test_a_threshold_is_measured_without_guidance() -> None:
    process = EDM()
    exact, x = problem(process)
    models = (lambda x, t, p=p: p(x, t).eps for p in (exact, ExactDenoiser(LAW, process)))
    denoiser = Denoiser(next(models), process, "epsilon", unconditional=next(models), label=lambda t: t)
    sizes: list[Tensor] = []
    noises: list[Tensor] = []

    class Look(CFG):
        paired = True  # type: ignore[assignment]

        def __call__(self, cond: Any, uncond: Any, state: Any = None, *, update: bool = True) -> Any:
            if update:
                sizes.append((cond.x0 - uncond.x0).norm(dim=1))
                noises.append((cond.output - uncond.output).norm(dim=1))
            return cond

    sample(denoiser, x, solver=DDIM(), steps=6, guidance=Look())
    auto = APG(5.0, norm_threshold="auto", momentum=-0.5)
    found = auto.measured(denoiser, x, solver=DDIM(), steps=6)
    assert math.isclose(found.norm_threshold, torch.cat(sizes).quantile(0.5).item(), rel_tol=1e-12)
    assert found == APG(5.0, norm_threshold=found.norm_threshold, momentum=-0.5)
    most = auto.measured(denoiser, x, quantile=1.0, solver=DDIM(), steps=6).norm_threshold
    assert most == pytest.approx(torch.cat(sizes).max().item())
    outputs = dataclasses.replace(auto, space="pred").measured(denoiser, x, solver=DDIM(), steps=6)
    assert outputs.norm_threshold == pytest.approx(torch.cat(noises).quantile(0.5).item())
    sizes.clear()
    sample(denoiser, x, solver=Heun(), steps=4, guidance=Look())  # of its second evaluations none counts
    found = auto.measured(denoiser, x, solver=Heun(), steps=4)
    assert math.isclose(found.norm_threshold, torch.cat(sizes).quantile(0.5).item(), rel_tol=1e-12)
    with pytest.raises(ValueError, match="has to be measured"):
        sample(denoiser, x, solver=DDIM(), steps=6, guidance=auto)


def test_half_precision_and_an_empty_batch() -> None:
    denoiser, x = problem()
    guidance = APG(5.0, norm_threshold=0.4, momentum=-0.5)
    half = sample(denoiser, x.bfloat16(), solver=Euler(), steps=6, guidance=guidance)
    assert half.dtype == torch.bfloat16
    empty = sample(denoiser, x[:0], solver=Euler(), steps=6, guidance=guidance)
    assert empty.shape == (0, 2)


# --- for other programs, and measures


def test_a_hook_on_denoised_data() -> None:
    guidance = APG(5.0, momentum=-0.5)
    hook, other = denoiser_post_cfg(guidance), denoiser_post_cfg(guidance)
    c, u, _ = drawn(dtype=torch.float32)
    before: Any = 0.0

    def args(sigma: float) -> dict[str, Any]:
        return {"cond_denoised": c, "uncond_denoised": u, "sigma": torch.full((5,), sigma), "denoised": c}

    for sigma in (10.0, 5.0, 5.0, 1.0):
        want, before = by_hand(c, u, 5.0, before, momentum=-0.5)
        assert torch.allclose(hook(args(sigma)), want, rtol=1e-5, atol=1e-5)
    assert torch.equal(hook(args(8.0)), other(args(10.0)))  # sigma rose: another image
    assert denoiser_post_cfg(APG(1.0))({**args(1.0), "uncond_denoised": None}) is c
    with pytest.raises(
        ValueError, match="uncond_denoised is missing: APG needs both predictions; use scale=1 for none"
    ):
        hook({**args(1.0), "uncond_denoised": None})


def test_saturation_and_contrast() -> None:
    pure, grey, half = torch.tensor([[1.0, 0, 0], [0.5, 0.5, 0.5], [1.0, 0.5, 0.5]])
    image = torch.stack([pure, grey, half], 1)[None, :, :, None].repeat(2, 1, 1, 4)
    image[1] = 0.0
    assert torch.allclose(saturation(image), torch.tensor([(1 + 0 + 0.5) / 3, 0.0]))
    assert torch.allclose(saturation(image * 3 - 1), saturation((image * 3 - 1).clamp(0, 1)))
    assert torch.allclose(contrast(torch.tensor([[1.0, 3.0], [2.0, 2.0]])), torch.tensor([1.0, 0.0]))


# --- what is refused


def test_what_is_refused() -> None:
    cond, uncond = predictions()
    c, u = cond.output, uncond.output
    for beta in (1.0, -1.0, -1.5):
        with pytest.raises(
            ValueError, match=r"momentum must be in \(-1, 1\): \|momentum\| must be < 1 or the guidance diverges"
        ):
            APG(momentum=beta)
    with pytest.raises(ValueError, match="start must be below stop"):
        APG(start=0.5, stop=0.5)
    for missing in (None, cond):
        with pytest.raises(ValueError, match="APG needs both predictions; use scale=1 for none"):
            APG(5.0)(cond, missing)
    with pytest.raises(ValueError, match="pred_uncond is missing: APG needs both predictions"):
        normalized_guidance(c, None, 5.0)
    assert normalized_guidance(c, None, 1.0) is c
    with pytest.raises(ValueError, match="state is needed with momentum"):
        APG(5.0, momentum=-0.5)(cond, uncond)
    with pytest.raises(ValueError, match="state is needed with start and stop"):
        APG(5.0, stop=0.5)(cond, uncond, APGState())
    with pytest.raises(ValueError, match="must have pred_cond's shape"):
        normalized_guidance(c, u[:2], 5.0)
    with pytest.raises(ValueError, match="of cond's kind 'sample'"):
        APG(5.0, space="pred")(cond, uncond.replace(uncond.eps, "epsilon"))
    with pytest.raises(ValueError, match=r"\(B, C, ...\)"):
        APG(5.0, channelwise=True).combine(c.flatten(1), u.flatten(1), APGState())
    with pytest.raises(ValueError, match=r"x must have shape \(B, 3, ...\)"):
        saturation(c[:, :2])


def test_a_state_of_another_batch_is_refused() -> None:
    guidance = APG(5.0, momentum=-0.5)
    state, (c, u, _) = guidance.init(), drawn()
    guidance.combine(c, u, state)
    with pytest.raises(ValueError, match=r"state is of predictions of shape \(5, 3, 4, 4\), got \(2, 3, 4, 4\)"):
        guidance.combine(c[:2], u[:2], state)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_predictions_that_are_not_finite_are_refused(value: float) -> None:
    c, u, _ = drawn()
    u[3, 1, 2, 2] = value
    with pytest.raises(ValueError, match="pred_uncond must be finite"):
        normalized_guidance(c, u, 5.0)
    network = Denoiser(lambda x, t: 0.5 * x, VP(), unconditional=lambda x, t: value * x)
    with pytest.raises(ValueError, match=r"in the prediction of evaluation 1 at t=1"):
        sample(network, (2, 3), solver=DDIM(), steps=3, guidance=APG(5.0), generator=torch.Generator().manual_seed(0))
    alone = Denoiser(lambda x, t: 0.5 * x, VP())
    with pytest.raises(ValueError, match="guidance needs both predictions"):
        sample(alone, (2, 3), solver=DDIM(), steps=3, guidance=APG(5.0))
