"""The loop: order of the parts, guidance, steering, precision, randomness, and refusals."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from generate_cases import BETAS, MIXTURE, PROCESSES, every_process, exact, noise

from polyak.generate import (
    APG,
    CFG,
    DDIM,
    EDM,
    RK4,
    VP,
    Denoiser,
    Discrete,
    DPMSolver,
    DynamicThresholding,
    Euler,
    Flow,
    Guidance,
    Heun,
    Prediction,
    Process,
    Steering,
    SteeringState,
    TrigFlow,
    invert,
    sample,
)
from polyak.generate.problems import ExactDenoiser, Gaussian, Recorder, path_rmse, reference, ring


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


TWO_M = DPMSolver(order=2, form="data", method="multistep")


# --- solvers


def test_ddim_against_the_papers_formula() -> None:
    # arXiv 2010.02502, equations 12 and 16, written for alphas_cumprod.
    betas = torch.linspace(1e-3, 0.2, 50, dtype=torch.float64)
    bar = torch.cumprod(1 - betas, 0)
    process, eta = Discrete(betas), 0.7
    index = [49, 30, 12, 0]
    denoiser = Denoiser(lambda x, t: torch.sin(x + t[:, None]), process)
    x = start = noise(6, 2)
    g = rng(5)
    for i, j in itertools.pairwise(index):
        eps = torch.sin(x + float(i))
        x0 = (x - (1 - bar[i]).sqrt() * eps) / bar[i].sqrt()
        sigma = eta * ((1 - bar[j]) / (1 - bar[i])).sqrt() * (1 - bar[i] / bar[j]).sqrt()
        z = torch.randn(6, 2, dtype=torch.float64, generator=g)
        x = bar[j].sqrt() * x0 + (1 - bar[j] - sigma**2).sqrt() * eps + sigma * z
    got = sample(denoiser, start, solver=DDIM(eta), grid=[(i + 1) / 50 for i in index], generator=rng(5))
    assert torch.allclose(got, x, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize(
    ("solver", "grid", "slope"),
    [(DDIM(), "time", 1), (Euler(), "quadratic", 1), (Heun(), "time", 2), (RK4(), "quadratic", 4)],
)
def test_baselines_converge_at_their_order(solver: Any, grid: str, slope: float) -> None:
    denoiser, x = exact(), noise()
    ref = reference(denoiser, x, nfe=3000)
    errors = [path_rmse(sample(denoiser, x, solver=solver, steps=n, grid=grid), ref) for n in (40, 80)]
    assert math.log2(errors[0] / errors[1]) == pytest.approx(slope, abs=0.2)
    assert solver.order == slope


def test_heun_is_edms_sampler() -> None:
    # arXiv 2206.00364, algorithm 1: the last step is Euler's.
    process, n = EDM(), 6
    denoiser, x = exact(process), 80 * noise()
    times = process.grid(n, "karras", end=0).tolist()
    want = x
    for i, (s, t) in enumerate(itertools.pairwise(times)):
        d = (want - MIXTURE.posterior_mean(want, 1.0, s)) / s
        after = want + (t - s) * d
        if i < n - 1:
            d2 = (after - MIXTURE.posterior_mean(after, 1.0, t)) / t
            after = want + (t - s) * (d + d2) / 2
        want = after
    got, info = sample(denoiser, x, solver=Heun(), grid=times, return_info=True)
    assert torch.allclose(got, want, rtol=1e-10, atol=1e-10)
    assert info.nfe == 2 * n - 1


@pytest.mark.parametrize("solver", [DDIM(), Euler(), TWO_M])
@pytest.mark.parametrize("name", ["Flow", "TrigFlow", "EDM", "Discrete"])
def test_the_last_step_may_end_on_clean_data(solver: Any, name: str) -> None:
    process = {"Flow": Flow(), "TrigFlow": TrigFlow()}.get(name, PROCESSES[name])
    denoiser = exact(process)
    times = process.grid(40, "time" if name != "EDM" else "karras", end=0)
    x = sample(denoiser, process.prior((400, 1), generator=rng(), dtype=torch.float64), solver=solver, grid=times)
    assert bool(x.isfinite().all())
    assert x.mean().item() == pytest.approx(MIXTURE.mean.item(), abs=0.12)


@every_process
def test_stochastic_sampling_has_the_right_law(process: Process) -> None:
    law = Gaussian([0.4], 0.3)
    x = sample(
        ExactDenoiser(law, process),
        (4000, 1),
        solver=DDIM(1.0),
        steps=150,
        grid="logsnr",
        generator=rng(),
        dtype=torch.float64,
    )
    assert x.mean().item() == pytest.approx(0.4, abs=0.05)
    assert x.var().item() == pytest.approx(0.3, rel=0.1)


# --- guidance and correction


def test_cfg_is_linear_whatever_the_dialect() -> None:
    law = ring(4)
    denoiser = ExactDenoiser(law.of_class(1), VP(), unconditional=law)
    x = noise(5, 2)
    cond, uncond = denoiser.pair(x, 0.4)
    for w in (0.0, 0.5, 3.0):
        guided = CFG(w)(cond, uncond)
        want = cond.x0 + (w - 1) * (cond.x0 - uncond.x0)
        assert torch.allclose(guided.x0, want)
        mixed = CFG(w)(cond, uncond.replace(uncond.eps, "epsilon"))
        assert torch.allclose(mixed.x0, want)
        assert torch.allclose(guided.eps, cond.eps + (w - 1) * (cond.eps - uncond.eps))
    assert CFG(1.0)(cond, uncond) is cond
    assert isinstance(CFG(), Guidance)


def test_scale_one_needs_no_second_evaluation() -> None:
    law = ring(4)
    denoiser = ExactDenoiser(law.of_class(1), VP(), unconditional=law)
    x = noise(5, 2)
    plain, info = sample(denoiser, x, solver=DPMSolver(), nfe=7, guidance=CFG(1.0), return_info=True)
    assert torch.equal(plain, sample(denoiser, x, solver=DPMSolver(), nfe=7))
    assert (info.nfe, info.evaluations) == (7, 7)
    _, info = sample(denoiser, x, solver=DPMSolver(), nfe=7, guidance=CFG(2.0), return_info=True)
    assert (info.nfe, info.evaluations) == (7, 14)
    with pytest.raises(ValueError, match="guidance needs both predictions"):
        sample(exact(), noise(), solver=DDIM(), nfe=2, guidance=CFG(2.0))


class Counting:
    """A guidance with memory: counts the evaluations it was allowed to learn from."""

    paired = True

    def init(self) -> dict[str, Any]:
        return {"updates": 0, "calls": 0}

    def __call__(self, cond: Prediction, uncond: Prediction, state: Any = None, *, update: bool = True) -> Prediction:
        state["calls"] += 1
        state["updates"] += update
        self.seen = state
        return cond

    def reindex(self, state: Any, ancestors: torch.Tensor) -> Any:
        state["moved"] = ancestors
        return state


def test_guidance_learns_once_a_step_and_anew_for_each_trajectory() -> None:
    law = ring(4)
    denoiser = ExactDenoiser(law.of_class(1), VP(), unconditional=law)
    guidance = Counting()
    for _ in range(2):
        sample(denoiser, noise(3, 2), solver=DPMSolver(order=3, method="singlestep"), nfe=9, guidance=guidance)
        assert guidance.seen == {"updates": 3, "calls": 9}


def test_the_corrector_comes_after_guidance_and_before_the_solver() -> None:
    order: list[str] = []

    class Noted(Counting):
        def __call__(
            self, cond: Prediction, uncond: Prediction, state: Any = None, *, update: bool = True
        ) -> Prediction:
            order.append("guidance")
            return cond

    def corrector(x0: torch.Tensor, t: float) -> torch.Tensor:
        order.append(f"corrector {t:.1f}")
        return torch.zeros_like(x0)

    law = ring(4)
    denoiser = ExactDenoiser(law.of_class(1), VP(), unconditional=law)
    x = sample(denoiser, noise(3, 2), solver=DDIM(), grid=[1.0, 0.5, 0.001], guidance=Noted(), corrector=corrector)
    assert order == ["guidance", "corrector 1.0", "guidance", "corrector 0.5"]
    process = VP()
    # x0 = 0 throughout: x shrinks with sigma
    assert torch.allclose(x, noise(3, 2) * process.sigma(0.001) / process.sigma(1.0))
    with pytest.raises(ValueError, match="corrector cannot be used: adaptive sampling cannot call a corrector"):
        sample(denoiser, noise(3, 2), solver=DPMSolver(method="adaptive", form="data"), corrector=corrector)
    with pytest.raises(ValueError, match='use form="data"'):
        sample(denoiser, noise(3, 2), solver=DPMSolver(), nfe=5, corrector=DynamicThresholding())


def test_dynamic_thresholding() -> None:
    x0 = torch.stack([torch.linspace(-4, 4, 201), torch.linspace(-0.5, 0.5, 201)]).reshape(2, 3, 67)
    before = x0.clone()
    y = DynamicThresholding(0.9)(x0, 0.5)
    q = torch.quantile(x0[0].abs().flatten(), 0.9)
    assert torch.allclose(y[0], x0[0].clamp(-q, q) / q, atol=1e-6)
    assert torch.equal(y[1], x0[1])  # already within [-1, 1]
    assert torch.equal(x0, before)
    assert y.abs().max() <= 1


# --- steering


class Shuffle:
    """A steering that reverses the particles of each system at every step, without changing any law."""

    particles = 4
    resamples = True

    def __init__(self) -> None:
        self.calls: list[dict[str, Any]] = []

    def init(self, batch: int, k: int) -> SteeringState:
        return SteeringState.uniform(batch, k)

    def step(self, state: SteeringState, x_next: torch.Tensor, **facts: Any) -> tuple[torch.Tensor, SteeringState]:
        self.calls.append(facts)
        batch, k = state.logw.shape
        ancestors = torch.arange(batch * k).reshape(batch, k).flip(1).flatten()
        return x_next[ancestors], state.moved(ancestors)

    def select(self, state: SteeringState, x: torch.Tensor) -> torch.Tensor:
        return x.reshape(*state.logw.shape, *x.shape[1:])[:, 0]


class Zero:
    """z = 0 in place of the noise: a stochastic solver becomes a function of its start, row by row."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        from polyak.generate import linear

        patch.setattr(linear, "standard_normal", lambda shape, **kw: torch.zeros(shape, dtype=kw["dtype"]))


@pytest.mark.parametrize("solver", [DDIM(1.0), DPMSolver(order=3, form="data", method="multistep", sde=True)])
def test_everything_that_remembers_rows_moves_with_them(solver: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    # Reversing rows after every step of an even number undoes itself, provided the history is moved along.
    Zero(monkeypatch)
    law = ring(4)
    denoiser = ExactDenoiser(law.of_class(1), VP(), unconditional=law)
    x, guidance, steering = noise(8, 2), Counting(), Shuffle()
    plain = sample(denoiser, x, solver=solver, steps=6)
    got, info = sample(denoiser, x, solver=solver, steps=6, guidance=guidance, steering=steering, return_info=True)
    assert torch.allclose(got, plain.reshape(2, 4, 2)[:, 0], rtol=1e-13, atol=1e-13)
    assert guidance.seen["moved"].tolist() == [3, 2, 1, 0, 7, 6, 5, 4]
    assert [c["step"] for c in steering.calls] == list(range(6))
    assert [c["last"] for c in steering.calls] == [False] * 5 + [True]
    first = steering.calls[0]
    assert torch.equal(first["x0_hat"], denoiser(x, 1.0).x0)
    assert (first["t"], first["t_next"]) == info.steps[0]
    assert info.steering.logw.shape == (2, 4)
    assert isinstance(steering, Steering)


def test_a_shape_counts_systems_and_a_start_holds_particles() -> None:
    out = sample(exact(), (3, 1), solver=DDIM(1.0), steps=2, steering=Shuffle(), generator=rng())
    assert out.shape == (3, 1)
    with pytest.raises(ValueError, match="x_T must hold k=4 particles for each system, got 6 rows"):
        sample(exact(), noise(6), solver=DDIM(1.0), steps=2, steering=Shuffle())
    with pytest.raises(ValueError, match="resampled copies never separate"):
        sample(exact(), noise(8), solver=DDIM(), steps=2, steering=Shuffle())


# --- precision, randomness, inputs


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("solver", [DDIM(), DPMSolver(), TWO_M])
def test_half_precision_is_stepped_in_float32(solver: Any, dtype: torch.dtype) -> None:
    seen: set[torch.dtype] = set()

    def network(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        seen.add(x.dtype)
        return torch.zeros_like(x)

    # With eps = 0 the state is multiplied by a product of a thousand factors: in half precision it would drift.
    x = noise(4, 3).to(dtype)
    out = sample(Denoiser(network, VP()), x, solver=solver, nfe=1000)
    assert seen == {dtype}
    assert out.dtype == dtype
    factor = VP().alpha(1e-3) / VP().alpha(1.0)
    assert torch.allclose(out.float(), x.float() * factor, rtol=torch.finfo(dtype).eps)


def test_inputs_are_not_changed_and_dtypes_followed() -> None:
    for solver in (DDIM(0.5), Heun(), DPMSolver(), TWO_M, DPMSolver(order=2, method="adaptive")):
        x = noise(4, 1).float()
        before = x.clone()
        budget = {} if solver.adaptive else {"nfe": 6}
        out = sample(exact(), x, solver=solver, generator=rng(), **budget)
        assert torch.equal(x, before)
        assert out.dtype == torch.float32
        assert out.data_ptr() != x.data_ptr()


def test_randomness_comes_from_the_generator_alone() -> None:
    torch.manual_seed(1)
    kwargs: dict[str, Any] = {"solver": DDIM(1.0), "steps": 4}
    a = sample(exact(), (5, 1), generator=rng(3), **kwargs)
    state = torch.get_rng_state()
    b = sample(exact(), (5, 1), generator=rng(3), **kwargs)
    assert torch.equal(a, b)
    assert torch.equal(state, torch.get_rng_state())
    assert not torch.equal(a, sample(exact(), (5, 1), generator=rng(4), **kwargs))
    assert a.dtype == torch.float32
    assert sample(exact(), (5, 1), generator=rng(3), dtype=torch.float64, **kwargs).dtype == torch.float64


def test_an_empty_batch() -> None:
    denoiser = exact()
    for start in (torch.zeros(0, 1), (0, 1)):
        x, info = sample(denoiser, start, solver=DPMSolver(), nfe=9, return_info=True)
        assert x.shape == (0, 1)
        assert info.nfe == 0


def test_info_and_callback() -> None:
    recorder = Recorder()
    x, info = sample(exact(), noise(), solver=Heun(), steps=3, callback=recorder, return_info=True)
    times = VP().grid(3, "time").tolist()
    assert info.queries == [times[0], times[1], times[1], times[2], times[2], times[3]]
    assert info.steps == list(itertools.pairwise(times))
    assert torch.equal(recorder.states[-1], x)
    assert info.steering is None


def test_gradients_are_not_kept() -> None:
    weight = torch.ones((), requires_grad=True)
    x = sample(Denoiser(lambda x, t: weight * x, VP()), noise(), solver=DDIM(), nfe=3)
    assert not x.requires_grad


def test_not_finite_predictions_are_named() -> None:
    def network(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return x * (float("nan") if t[0] < 0.6 else 1.0)

    with pytest.raises(ValueError, match=r"NaN in the prediction of evaluation 3 at t=0.5"):
        sample(Denoiser(network, VP()), noise(), solver=DDIM(), grid=[1.0, 0.7, 0.5, 0.1])
    out = sample(Denoiser(network, VP()), noise(), solver=DDIM(), grid=[1.0, 0.7, 0.5, 0.1], check_finite=False)
    assert bool(out.isnan().all())
    with pytest.raises(ValueError, match="infinity in the prediction of evaluation 1"):
        sample(Denoiser(lambda x, t: x / 0, VP()), noise(), solver=DDIM(), nfe=2)


def test_inversion_undoes_sampling() -> None:
    denoiser, x = exact(), noise()
    for solver in (DPMSolver(), DPMSolver(order=3, form="data", method="multistep"), Heun(), TWO_M):
        errors = []
        for nfe in (60, 240):
            data = sample(denoiser, x, solver=solver, nfe=nfe, grid="logsnr")
            errors.append(path_rmse(invert(denoiser, data, solver=solver, nfe=nfe, grid="logsnr"), x))
        assert errors[1] < errors[0] / 10
    assert errors[1] < 1e-3
    with pytest.raises(ValueError, match="only a deterministic solver can be inverted"):
        invert(denoiser, x, solver=DDIM(1.0), nfe=5)


class NotGaussian(EDM):
    is_gaussian = False


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"solver": DDIM()}, "give either steps or nfe"),
        ({"solver": DDIM(), "steps": 3, "nfe": 3}, "give either steps or nfe"),
        ({"solver": DDIM(), "steps": 0}, "steps must be at least 1, got 0"),
        ({"solver": RK4(), "nfe": 3}, "nfe must be at least 4, got 3"),
        ({"solver": DDIM(), "steps": 3, "grid": "cubic"}, "grid must be one of"),
        ({"solver": DDIM(), "steps": 3, "grid": [1.0, 0.5]}, "grid holds the times; leave out steps and nfe"),
        ({"solver": DDIM(), "grid": [1.0]}, "at least 2 times"),
        ({"solver": DDIM(), "grid": [1.0, 0.5, 0.5]}, r"decrease strictly, got times\[1\]=0.5, times\[2\]=0.5"),
        ({"solver": DDIM(), "grid": [1.0, 1e-5]}, r"times\[1\] must be in \[0.001, 1\].*got 1e-05"),
        ({"solver": DDIM(), "steps": 3, "process": VP(beta1=15.0)}, "process must be the denoiser's own"),
        ({"solver": DDIM(), "steps": 3, "dtype": torch.float16}, "dtype and device follow the start"),
        ({"solver": DPMSolver(method="adaptive"), "nfe": 10}, "adaptive finds its own steps"),
    ],
)
def test_bad_arguments_are_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sample(exact(), noise(), **arguments)


def test_bad_starts_and_denoisers_are_named() -> None:
    with pytest.raises(ValueError, match=r"floating-point tensor of shape \(B, ...\), got torch.int64"):
        sample(exact(), torch.zeros(3, 1, dtype=torch.int64), solver=DDIM(), steps=2)
    with pytest.raises(ValueError, match=r"shape\[0\] must be at least 0, got -1"):
        sample(exact(), (-1, 1), solver=DDIM(), steps=2)
    with pytest.raises(TypeError, match="solver must be a Solver"):
        sample(exact(), noise(), solver=DDIM, steps=2)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="process is needed"):
        sample(lambda x, t: Prediction(x, x, t, VP()), noise(), solver=DDIM(), steps=2)
    with pytest.raises(TypeError, match="must return a Prediction, got Tensor; wrap it in Denoiser"):
        sample(lambda x, t: x, noise(), process=VP(), solver=DDIM(), steps=2)  # type: ignore[arg-type, return-value]
    with pytest.raises(ValueError, match="eta must be in"):
        DDIM(1.5)
    denoiser = Denoiser(lambda x, t: x, NotGaussian(), "sample")
    with pytest.raises(ValueError, match="needs Gaussian noise"):
        sample(denoiser, noise(), solver=DDIM(1.0), steps=2)
    assert sample(denoiser, noise(), solver=DDIM(), steps=2).shape == (32, 1)


def test_a_function_will_do_as_denoiser() -> None:
    process = Discrete(BETAS)
    exact_one = exact(process)
    x = sample(lambda x, t: exact_one(x, t), noise(), process=process, solver=DDIM(), steps=5)
    assert torch.equal(x, sample(exact(process), noise(), solver=DDIM(), steps=5))


@pytest.mark.parametrize("solver", [DDIM(), DDIM(0.7), Heun(), TWO_M], ids=repr)
@pytest.mark.parametrize(
    "guidance",
    [
        CFG(3.0),
        APG(3.0, norm_threshold=1.0, momentum=-0.5),
        APG(3.0, base="uncond"),
        APG(3.0, space="pred"),
        APG(3.0, eta=1),
    ],
    ids=repr,
)
def test_the_fast_loop_with_guidance_is_the_coroutine(solver: Any, guidance: Any) -> None:
    def said(x: torch.Tensor, t: torch.Tensor, turn: float) -> torch.Tensor:
        made = torch.sin(turn * x.float() + t[:, None]).to(x.dtype if turn < 3 else torch.float32)
        t.mul_(0.5)  # which the next one must not see
        return made

    process = VP()
    networks = [lambda x, t, turn=turn: said(x, t, turn) for turn in (2.0, 3.0)]
    both = Denoiser(networks[0], process, "v_prediction", unconditional=networks[1])
    for dtype in (torch.float32, torch.bfloat16):
        ends = []
        for heard in ({}, {"callback": lambda step: None}):
            both.nfe = both.evaluations = 0
            how: dict[str, Any] = {"solver": solver, "nfe": 8, "generator": rng(), "guidance": guidance, **heard}
            end, info = sample(both, noise(4, 3).to(dtype), return_info=True, **how)
            assert (both.nfe, both.evaluations) == (info.nfe, info.evaluations)
            ends.append((end, info.nfe, info.evaluations, info.queries, info.steps))
        assert torch.equal(ends[0][0], ends[1][0])
        assert ends[0][1:] == ends[1][1:]


def test_what_is_made_of_a_guidance_is_asked_itself() -> None:
    """Neither one derived from CFG nor one around it is taken for it."""

    class Halved(CFG):
        def __call__(self, cond: Any, uncond: Any, state: Any = None, *, update: bool = True) -> Any:
            return cond.replace(super().__call__(cond, uncond, state).output / 2)

    class Around:
        def __init__(self, guidance: Any) -> None:
            self.guidance = guidance

        def __getattr__(self, name: str) -> Any:
            return getattr(self.guidance, name)

        def __call__(self, *given: Any, **options: Any) -> Any:
            return self.guidance(*given, **options)

    both = Denoiser(lambda x, t: torch.sin(x), VP(), unconditional=lambda x, t: torch.cos(x))
    made = [
        sample(both, noise(3), solver=DDIM(), steps=4, guidance=g) for g in (CFG(3.0), Halved(3.0), Around(Halved(3.0)))
    ]
    assert not torch.allclose(made[0], made[1])
    assert torch.equal(made[1], made[2])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("solver", [DDIM(), DDIM(1.0), Heun(), DPMSolver(), TWO_M], ids=repr)
def test_on_the_gpu_no_step_waits_for_the_device(solver: Any) -> None:
    denoiser = Denoiser(lambda x, t: torch.tanh(x + t[:, None]), VP(), unconditional=lambda x, t: torch.tanh(x))
    x = noise(64, 8).float().cuda()
    g = torch.Generator("cuda").manual_seed(0)
    kwargs: dict[str, Any] = {"solver": solver, "nfe": 12, "guidance": CFG(2.0)}
    torch.cuda.set_sync_debug_mode("error")
    try:
        got = sample(denoiser, x, generator=g, check_finite=False, **kwargs)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert got.is_cuda
    if not solver.stochastic:
        assert torch.allclose(got.cpu(), sample(denoiser, x.cpu(), **kwargs), rtol=1e-3, atol=1e-3)
    broken = Denoiser(lambda x, t: x * float("nan"), VP())
    with pytest.raises(ValueError, match="the sample is not finite; run with check_finite=True"):
        sample(broken, x, solver=solver, nfe=4, generator=g)
    with pytest.raises(ValueError, match="generator must be on x_T's device"):
        sample(denoiser, x, generator=rng(), **kwargs)
