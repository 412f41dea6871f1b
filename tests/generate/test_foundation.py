"""What the parts stand on: one pass for a step, schedules at all times at once, steps that can be taken up again, own parts."""

from __future__ import annotations

import copy
import itertools
import math
import pickle
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from generate_cases import BETAS, MIXTURE, Sine, exact, noise
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from polyak.generate import (
    APG,
    CFG,
    DDIM,
    EDM,
    GHVB,
    RK4,
    VP,
    Change,
    Denoiser,
    Discrete,
    DPMSolver,
    DPMSolverAdaptive,
    DPMSolverFast,
    DPMSolverMultistep,
    DPMSolverSDE,
    DPMSolverSinglestep,
    Euler,
    Evaluator,
    Flow,
    HeavyBall,
    HeavyBallDPM,
    Heun,
    LinearSolver,
    Nesterov,
    Prediction,
    ProbabilityPath,
    Process,
    Query,
    Solver,
    Stage,
    SteeringState,
    Step,
    TrigFlow,
    check_process,
    check_solver,
    drive,
    resume,
    sample,
)
from polyak.generate.problems import ExactDenoiser, ring
from polyak.generate.update import _fused, _looked_at, advance, combine

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def on_gpu(test: Any) -> Any:
    return pytest.mark.gpu(needs_gpu(test))


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# --- one step is one combination


def test_combine_follows_the_first_dtype_and_keeps_its_inputs() -> None:
    x, y = torch.ones(3, dtype=torch.float64), torch.full((3,), 2.0, dtype=torch.bfloat16)
    assert torch.equal(combine((3.0, x), (-0.5, y)), torch.full((3,), 2.0, dtype=torch.float64))
    assert torch.equal(combine((0.0, x), (1.0, y)), torch.full((3,), 2.0, dtype=torch.float64))
    assert torch.equal(combine((0.0, x), (0.0, y)), torch.zeros(3, dtype=torch.float64))
    alone = combine((1.0, x))
    assert alone.data_ptr() != x.data_ptr()
    assert torch.equal(x, torch.ones(3, dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(3, 5), (2, 4, 40, 40)])
@pytest.mark.parametrize("case", ["two", "value", "history", "noise", "mixed", "all"])
def test_the_kernel_makes_what_pytorch_makes(case: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    triton = pytest.importorskip("triton")
    if torch.cuda.is_available() or not triton.knobs.runtime.interpret:
        pytest.skip("needs Triton's interpreter")
    g = rng()
    x, r1, r2, z = torch.randn(4, *shape, generator=g)
    output = torch.randn(shape, generator=g).to(dtype)
    if len(shape) == 4:
        x, r1, r2, z, output = (t.to(memory_format=torch.channels_last) for t in (x, r1, r2, z, output))
    rest = [(0.3, r1), (-1.7, r2)] if case in ("history", "all") else []
    value = (0.25, -1.5) if case in ("value", "all") else None
    drawn = (0.7, z) if case in ("noise", "all") else None
    also = [(1.0, 0.0), (0.5, 2.0)] if case in ("two", "all") else []
    if case == "mixed":
        rest = [(0.0, r1), (-1.7, r2)]
    mixed = [(0.0, 0.2, 0.8, 0.0), (1.5, 0.0, 0.3, -0.6)] if case in ("mixed", "all") else []
    want = advance(x, output, 0.9, -0.4, rest, value=value, noise=drawn, also=also, mixed=mixed)
    tensors = [x, output, *(t for _, t in rest), *([z] if drawn else [])]
    seen = _looked_at(tensors)
    assert seen is not None
    kept = [*([value] if value else []), *also]
    got, short = (
        _fused(tensors, seen, [0.9, -0.4, *(c for c, _ in rest)], kept, 0.7 if drawn else None, mean, mixed)
        for mean in (True, False)
    )
    assert short.mean is None
    assert torch.equal(short.next, got.next)
    assert len(got.also) == len(kept)
    assert len(got.mixed) == len(want.mixed) == len(mixed)
    beside = [*([] if want.value is None else [want.value]), *want.also]
    more = (*zip(got.also, beside, strict=True), *zip(got.mixed, want.mixed, strict=True))
    for a, b in ((got.next, want.next), (got.mean, want.mean), *more):
        assert (a is None) == (b is None)
        if a is not None and b is not None:
            # Five terms of size about 1, each rounded once or twice more in one of the two.
            assert torch.allclose(a, b, rtol=0, atol=16 * torch.finfo(torch.float32).eps)
            assert a.stride() == b.stride()


def test_the_kernel_looks_at_what_it_takes() -> None:
    pytest.importorskip("triton")
    x = torch.zeros(4, 6)
    if _looked_at([x, x]) is None:
        pytest.skip("needs Triton's interpreter, or a GPU")
    base = torch.zeros(4, 12)
    wrong = [
        base[:, ::2], x.T.contiguous().T, x.double(), torch.zeros(6, 4), torch.zeros(4, 6, device="meta"),
        torch.zeros(4, 6, dtype=torch.complex64).imag, torch.complex(x, x).conj().imag, torch.zeros(1, 6).expand(4, 6),
        torch.zeros(4, 6, requires_grad=True), torch.nn.parameter.Buffer(x).as_subclass(type("Own", (Tensor,), {})),
    ]  # fmt: skip
    for t in wrong:
        assert _looked_at([x, t]) is None, (t.shape, t.stride(), t.dtype)
    with torch.no_grad():
        assert _looked_at([x, torch.zeros(4, 6, requires_grad=True)]) is not None
    with NoFloat64():
        assert _looked_at([x, x]) is None
    assert _looked_at([torch.zeros(0, 6), torch.zeros(0, 6)]) is None
    # Another address, type or size is another launch.
    keys = {
        _looked_at([x, x]),
        _looked_at([x, x.bfloat16()]),
        _looked_at([base, base]),
        _looked_at([base[0, 1:], base[0, 1:]]),
    }
    assert len(keys) == 4


@on_gpu
@pytest.mark.parametrize("solver", [DDIM(), DPMSolver(), DPMSolverMultistep(form="data"), Heun(), RK4()])
def test_a_gpu_draws_what_the_cpu_draws(solver: Any) -> None:
    weight = torch.randn(3, 3, generator=rng()) / 3
    ends = []
    for device in ("cpu", "cuda"):
        w = weight.to(device)
        denoiser = Denoiser(lambda x, t, w=w: torch.tanh(x @ w), VP())
        x_T = torch.randn(64, 3, generator=rng(1)).to(device)
        ends.append(sample(denoiser, x_T, solver=solver, nfe=12).cpu())
    assert torch.allclose(*ends, rtol=1e-4, atol=1e-5)


CAPTURED = {
    **{repr(solver): (solver, None) for solver in (
        DDIM(), DPMSolverMultistep(form="data"), DPMSolver(), Heun(), RK4(), DPMSolverSDE(order=2, form="data"),
        HeavyBall(4, 0.8), HeavyBallDPM(), Nesterov(2, 0.8), GHVB(4, 0.8), GHVB(3, 0.8, spacing="variable", start="rk"),
    )},
    "CFG": (DDIM(), CFG(3.0)),
    "APG": (DPMSolverMultistep(form="data"), APG(3.0, norm_threshold=2.0, momentum=-0.5)),
}  # fmt: skip


@on_gpu
@pytest.mark.parametrize("name", CAPTURED)
def test_a_whole_run_in_one_cuda_graph(name: str) -> None:
    net = torch.nn.Linear(16, 16).cuda()
    solver, guidance = CAPTURED[name]
    denoiser = Denoiser(
        lambda x, t: torch.tanh(net(x)) * (1 + t[:, None]), VP(), unconditional=lambda x, t: torch.tanh(net(x)) * 0.5
    )
    start = torch.randn(32, 16, device="cuda")
    generator = torch.Generator("cuda").manual_seed(0)
    how: dict[str, Any] = {"solver": solver, "guidance": guidance, "steps": 5, "generator": generator}
    run = lambda: sample(denoiser, start, **how)  # noqa: E731
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    graph.register_generator_state(generator)
    with torch.cuda.graph(graph):
        end = run()
    for seed in (1, 2):
        start.copy_(torch.randn(32, 16, device="cuda"))
        generator.manual_seed(seed)
        graph.replay()
        generator.manual_seed(seed)
        assert torch.equal(end, run())


def test_the_process_is_evaluated_once_for_all_times() -> None:
    calls: list[int] = []

    @dataclass(frozen=True)
    class Counted(VP):
        def _log_alpha(self, t: Tensor) -> Tensor:
            calls.append(t.numel())
            return super()._log_alpha(t)

    process = Counted()
    denoiser = Denoiser(lambda x, t: x, process)
    for solver in (DDIM(), DDIM(1.0), Heun(), DPMSolver(), DPMSolverMultistep(form="data"), DPMSolverSDE(form="data")):
        counts = []
        for n in (12, 48):
            calls.clear()
            sample(denoiser, noise(2), solver=solver, steps=n, generator=rng())
            counts.append(len(calls))
        # The singlestep grid has a call for each step's inner points; nothing else grows with the steps.
        assert counts[0] == counts[1] or (solver == DPMSolver() and counts[1] < 48 * 4)


def test_labels_are_made_for_all_times_together_and_are_the_processes() -> None:
    heard: list[Tensor] = []

    def network(x: Tensor, t: Tensor) -> Tensor:
        heard.append(t)
        return x

    denoiser = Denoiser(network, Discrete(BETAS))
    sample(denoiser, noise(3), solver=DDIM(), steps=4)
    times = Discrete(BETAS).grid(4, "time")[:-1]
    assert torch.allclose(torch.stack(heard)[:, 0].double(), (times - 1e-3) * 1000)
    assert all(t.shape == (3,) and t.is_contiguous() for t in heard)
    heard.clear()
    sample(denoiser, noise(5), solver=DDIM(), steps=4)  # another batch, the same denoiser
    assert heard[0].shape == (5,)


def test_a_network_may_give_the_same_buffer_every_time() -> None:
    """Compiled and captured networks write every output to one place."""
    place = torch.empty(6, 2, dtype=torch.float64)

    def reused(x: Tensor, t: Tensor) -> Tensor:
        return place.copy_(torch.sin(x + t[:, None]))

    def fresh(x: Tensor, t: Tensor) -> Tensor:
        return torch.sin(x + t[:, None])

    for form in ("eps", "data"):
        for kind in ("epsilon", "sample"):
            for solver in (DPMSolverMultistep(form=form), DPMSolverSinglestep(form=form), RK4()):
                a, b = (sample(Denoiser(f, VP(), kind), noise(6, 2), solver=solver, steps=12) for f in (reused, fresh))
                assert torch.equal(a, b)


# --- runs that are taken up again

EVERY = [
    DDIM(), DDIM(1.0), Euler(), Heun(), RK4(), DPMSolverFast(), DPMSolverSinglestep(order=2, form="data"),
    DPMSolverMultistep(form="data"), DPMSolverMultistep(start="singlestep"), DPMSolverSDE(form="data"), DPMSolverAdaptive(),
]  # fmt: skip


@pytest.mark.parametrize("solver", EVERY, ids=repr)
def test_every_solver_is_sound(solver: Any) -> None:
    check_solver(solver)


class Still:
    """A steering that does nothing but listen."""

    particles, resamples = 1, False

    def init(self, batch: int, k: int) -> SteeringState:
        return SteeringState.uniform(batch, k)

    def step(self, state: SteeringState, x_next: Tensor, **known: Any) -> tuple[Tensor, SteeringState]:
        return x_next, state

    def select(self, state: SteeringState, x: Tensor) -> Tensor:
        return x


class Averaging:
    """A guidance with memory, which it changes in place."""

    paired = True

    def init(self, steps: int | None = None) -> dict[str, Any]:
        return {"steps": steps, "mean": None}

    def __call__(self, cond: Any, uncond: Any, state: Any = None, *, update: bool = True) -> Any:
        difference = cond.x0 - uncond.x0
        mean = difference if state["mean"] is None else (difference + state["mean"]) / 2
        if update:
            state["mean"] = mean
        return cond.replace(cond.x0 + mean, "sample")

    def reindex(self, state: Any, ancestors: Tensor) -> Any:
        return {**state, "mean": state["mean"][ancestors]}


@pytest.mark.parametrize("solver", [s for s in EVERY if not s.stochastic], ids=repr)
def test_sample_goes_on_from_any_step(solver: Any) -> None:
    law = ring(4)
    denoiser = ExactDenoiser(law.of_class(1), VP(), unconditional=law)
    kept: list[Step] = []
    options: dict[str, Any] = {"solver": solver, "guidance": Averaging()}
    options |= {} if solver.adaptive else {"steps": 12}
    whole = sample(denoiser, noise(4, 2), callback=kept.append, **options)
    assert kept[0].guidance["steps"] == (None if solver.adaptive else 12)
    for step in (kept[len(kept) // 2], pickle.loads(pickle.dumps(kept[0])), copy.deepcopy(kept[-2])):
        for _ in range(2):  # a step is not used up
            assert torch.equal(sample(denoiser, step, **options), whole)
    assert torch.equal(sample(denoiser, kept[-1], **options), whole)  # after the last step there is nothing to do
    if not solver.adaptive:
        with pytest.raises(ValueError, match="none of this run's times"):
            sample(denoiser, kept[1], **{**options, "steps": 13, "grid": "time"})


def test_half_precision_goes_on_in_float32() -> None:
    kept: list[Step] = []
    x_T = noise(4, 2).bfloat16()
    options: dict[str, Any] = {"solver": DPMSolverMultistep(form="data"), "steps": 12}
    whole = sample(Denoiser(lambda x, t: x.sin(), VP()), x_T, callback=kept.append, **options)
    again = sample(Denoiser(lambda x, t: x.sin(), VP()), kept[5], dtype=torch.bfloat16, **options)
    assert kept[5].x.dtype == torch.float32
    assert again.dtype == torch.bfloat16
    assert torch.equal(again, whole)


def test_a_solver_with_history_and_no_memory_cannot_be_taken_up() -> None:
    class Forgetful(DDIM):
        history = 1

        def run(self, x: Tensor, times: Any, process: Any, *, generator: Any = None) -> Any:  # type: ignore[override]
            for i, (s, t) in enumerate(itertools.pairwise(times)):
                p = yield Query(x, s)
                x = process.alpha(t) * p.x0 + process.sigma(t) * p.eps
                yield Step(x, s, t, i, i == len(times) - 2)
            return x

    kept: list[Step] = []
    sample(exact(), noise(), solver=Forgetful(), steps=3, callback=kept.append)
    with pytest.raises(ValueError, match="no memory to go on from"):
        sample(exact(), kept[0], solver=Forgetful(), steps=3)


def test_a_change_moves_what_is_remembered() -> None:
    solver, process = DPMSolverMultistep(form="data"), VP()
    times = process.grid(6, "logsnr").tolist()
    turned = torch.arange(5, -1, -1)

    def answer(query: Query) -> Prediction:
        x0 = MIXTURE.posterior_mean(query.x, process.alpha(query.t), process.sigma(query.t))
        return Prediction(x0, query.x, query.t, process, "sample")

    plain = drive(solver.run(noise(6), times, process), answer)
    moved = drive(solver.run(noise(6), times, process), answer, lambda step: Change(step.x[turned], turned))
    assert torch.allclose(moved, plain, rtol=1e-13)  # six turns are none


# --- steering hears what there is to know


class Listening(Still):
    particles, resamples = 3, True

    def __init__(self) -> None:
        self.heard: list[dict[str, Any]] = []
        self.devices: list[Any] = []

    def init(self, batch: int, k: int, device: Any = None) -> SteeringState:
        self.devices.append(device)
        return SteeringState.uniform(batch, k, device=device)

    def step(self, state: SteeringState, x_next: Tensor, **known: Any) -> tuple[Tensor, SteeringState]:
        self.heard.append({**known, "x": x_next, "stale": state.ancestors})
        # Moves rows at the first step only, and never clears what it said of them.
        if known["step"] == 0:
            rows = torch.arange(len(x_next)).flip(0)
            return x_next[rows], state.moved(rows)
        return x_next, state


@pytest.mark.parametrize(
    ("solver", "view"), [(DDIM(1.0), "x0"), (DDIM(0.4), "x0"), (DPMSolverSDE(order=2, form="eps"), "eps")], ids=repr
)
def test_steering_hears_the_transition(solver: Any, view: str) -> None:
    law, process = ring(4), VP()
    denoiser, steering = ExactDenoiser(law.of_class(1), process, unconditional=law), Listening()
    sample(
        denoiser, (2, 2), solver=solver, steps=5, guidance=CFG(3.0), steering=steering, generator=rng(), dtype=torch.float64
    )  # fmt: skip
    assert [str(d) for d in steering.devices] == ["cpu"]
    assert all(k["stale"] is None for k in steering.heard)
    for known in steering.heard[:-1]:
        # The unguided transition's density over the one drawn from, from the definitions: means differ by the gain.
        std, mean, pred = known["std"], known["mean"], known["pred"]
        x, x0 = known["x"], known["cond"].x0
        if known["step"] == 0:
            x, mean = x, mean
        s, t = known["t"], known["t_next"]
        if view == "x0":
            rest = math.sqrt(process.sigma(t) ** 2 - std**2) / process.sigma(s)
            free = mean + (process.alpha(t) - rest * process.alpha(s)) * (x0 - pred.x0)
            p = torch.distributions.Normal(free, std).log_prob(x).sum(1)
            q = torch.distributions.Normal(mean, std).log_prob(x).sum(1)
            assert torch.allclose(known["log_ratio"], p - q, rtol=1e-9, atol=1e-9)
        assert known["log_ratio"].shape == (6,)
        assert torch.allclose(known["uncond"].x0, denoiser.pair(pred.x, s)[1].x0)
    assert steering.heard[1]["log_ratio"].abs().max() > 0.1


def test_without_guidance_the_ratio_is_one_and_generators_are_apart() -> None:
    steering = Listening()
    sample(exact(), (2, 1), solver=DDIM(1.0), steps=3, steering=steering, generator=rng(5))
    assert torch.equal(steering.heard[0]["log_ratio"], torch.zeros(6, dtype=torch.float64))
    drawn = torch.randn(4, generator=steering.heard[0]["generator"])

    class Drawing(Still):
        def step(self, state: SteeringState, x_next: Tensor, **known: Any) -> tuple[Tensor, SteeringState]:
            torch.randn(100, generator=known["generator"])
            return x_next, state

    # What steering draws does not change the solver's noise.
    plain = sample(exact(), (2, 1), solver=DDIM(1.0), steps=3, generator=rng(5))
    assert torch.equal(sample(exact(), (2, 1), solver=DDIM(1.0), steps=3, steering=Drawing(), generator=rng(5)), plain)
    assert not torch.equal(drawn, torch.randn(4, generator=rng(5)))


def test_a_steering_that_asks_is_told_the_number_of_steps() -> None:
    class Counting(Still):
        def init(self, batch: int, k: int, steps: int | None = None) -> SteeringState:  # type: ignore[override]
            self.steps = steps
            return SteeringState.uniform(batch, k)

    for told, options in ((3, {"solver": DDIM(1.0), "steps": 3}), (None, {"solver": DPMSolver(method="adaptive")})):
        steering = Counting()
        sample(exact(), (2, 1), steering=steering, generator=rng(), **options)  # type: ignore[arg-type]
        assert steering.steps == told


def test_a_steering_of_few_words_is_told_no_more_than_it_takes() -> None:
    class Short(Still):
        def step(self, state, x_next, *, pred, x0_hat, step, t, t_next, last, generator):  # type: ignore[no-untyped-def, override]
            return x_next * 1.0, state

    assert sample(exact(), (2, 1), solver=DDIM(1.0), steps=3, steering=Short(), generator=rng()).shape == (2, 1)


# --- the evaluator


def test_one_evaluator_for_loops_of_ones_own() -> None:
    law, process = ring(4), VP()
    denoiser = ExactDenoiser(law.of_class(1), process, unconditional=law)
    evaluate = Evaluator(denoiser, guidance=CFG(2.0), corrector=lambda x0, t: x0.clamp(-1, 1))
    x = noise(5, 2)
    p = evaluate(Query(x, 0.4))
    cond, uncond = denoiser.pair(x, 0.4)
    assert torch.allclose(p.x0, (2 * cond.x0 - uncond.x0).clamp(-1, 1))
    assert (evaluate.nfe, evaluate.evaluations) == (1, 2)
    assert torch.equal(evaluate.cond.x0, cond.x0)
    assert torch.equal(evaluate.uncond.x0, uncond.x0)
    times = process.grid(4, "time").tolist()
    own = drive(DDIM().run(x, times, process), Evaluator(denoiser, guidance=CFG(2.0)))
    assert torch.equal(own, sample(denoiser, x, solver=DDIM(), grid=times, guidance=CFG(2.0)))


def test_a_guidance_may_need_the_second_prediction_at_some_times_only() -> None:
    class Late(CFG):
        def paired_at(self, t: float) -> bool:
            return t < 0.5

    law = ring(4)
    denoiser = ExactDenoiser(law.of_class(1), VP(), unconditional=law)
    grid = [1.0, 0.8, 0.6, 0.4, 0.2]
    got, info = sample(denoiser, noise(5, 2), solver=DDIM(), grid=grid, guidance=Late(2.0), return_info=True)
    assert (info.nfe, info.evaluations) == (4, 5)
    x = sample(denoiser, noise(5, 2), solver=DDIM(), grid=grid[:4])
    assert torch.allclose(got, sample(denoiser, x, solver=DDIM(), grid=grid[3:], guidance=CFG(2.0)))


# --- parts of one's own


class LogSine(Process):
    t_min, t_max = 0.01, 0.99

    def _log_alpha(self, t: Tensor) -> Tensor:
        return torch.log(torch.cos(torch.pi / 2 * t))

    def _log_sigma(self, t: Tensor) -> Tensor:
        return torch.log(torch.sin(torch.pi / 2 * t))


@pytest.mark.parametrize("process", [Sine(), LogSine()], ids=["alpha", "log"])
def test_a_process_of_two_schedules_is_a_whole_one(process: Process) -> None:
    known = TrigFlow(t_min=0.01, t_max=0.99)
    check_process(process)
    check_process(known)
    t = torch.linspace(0.02, 0.98, 9, dtype=torch.float64)
    for name in ("alpha", "sigma", "lam", "dalpha", "dsigma", "drift", "diffusion2", "sigma_hat"):
        assert torch.allclose(getattr(process, name)(t), getattr(known, name)(t), rtol=1e-12), name
    assert torch.allclose(process.t_of_lam(known.lam(t)), t, rtol=1e-13)
    with torch.inference_mode():
        assert torch.allclose(process.dsigma(t), known.dsigma(t), rtol=1e-12)
    for solver in (DDIM(), Heun(), DPMSolver(), DPMSolverMultistep(form="data")):
        ours, theirs = (sample(exact(p), noise(4), solver=solver, nfe=12, grid="time") for p in (process, known))
        assert torch.allclose(ours, theirs, rtol=1e-9)
    assert type(process)() == process
    with pytest.raises(NotImplementedError, match="defines neither"):
        type("Nothing", (Process,), {"t_min": 0.0, "t_max": 1.0})().alpha(0.5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"_alpha": lambda self, t: 1 + t, "_sigma": lambda self, t: 1 - t}, "lam must decrease"),
        ({"_dalpha": lambda self, t: 0 * t}, "dalpha must be the derivative"),
        ({"_t_of_lam": lambda self, lam: lam}, "t_of_lam must be the inverse"),
        ({"label": lambda self, t: 1000 * t}, "t_of_label must be the inverse"),
        ({"__eq__": lambda self, other: self is other, "__hash__": object.__hash__}, "a copy must be equal"),
    ],
)
def test_check_process_finds(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        check_process(type("Wrong", (Sine,), changes)())


class _Wrong(LinearSolver):
    def __init__(self, fault: str) -> None:
        self.fault = fault
        self.order = 2 if fault == "order" else 1
        self.cache: dict[int, Any] = {}

    def run(self, x: Tensor, times: Any, process: Any, *, generator: Any = None, memory: Any = None) -> Iterator[Any]:  # type: ignore[override]
        start = 0 if memory is None else memory
        for i, (s, t) in list(enumerate(itertools.pairwise(times)))[start:]:
            p = yield Query(x, s)
            if self.fault == "dear":
                yield Query(p.x, s, False)
            if self.fault == "in place":
                x.add_(p.flow, alpha=t - s)
            else:
                x = (x if self.fault == "sure" else p.x) + (t - s) * p.flow
            if self.fault == "scales":
                p.output.mul_(2)
            if self.fault == "forgets" and start:
                x = x * 1.1
            change = yield Step(
                x, s, t, i + (self.fault == "numbers"), i == len(times) - 2 or self.fault == "last", memory=i + 1
            )
            if change is not None and self.fault != "deaf":
                x = change.x
        return x


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("in place", "changed the start in place"),
        ("numbers", "numbered from 0"),
        ("last", "last step alone"),
        ("forgets", "must be in Step.memory"),
        ("order", "declares order 2"),
        ("deaf", "must go on from a Change"),
        ("sure", "must go on from prediction.x"),
        ("scales", "changed a prediction's output in place"),
        ("dear", "for nfe=12 it asks 24 times"),
    ],
)
def test_check_solver_finds(fault: str, message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        check_solver(_Wrong(fault))
    check_solver(_Wrong(""))


class Straight(ProbabilityPath):
    """A bridge between two data sets, without noise: x_t = (1 - t) x1 + t x0, known field u."""

    t_min, t_max = 0.0, 1.0


@dataclass
class Field:
    """What a bridge's network says: no x0, no eps, only the field."""

    output: Tensor
    x: Tensor

    @property
    def flow(self) -> Tensor:
        return self.output

    def rebase(self, x: Tensor) -> Field:
        return Field(self.output.to(x.dtype), x)


def test_a_path_that_is_not_alpha_and_sigma() -> None:
    asked: list[float] = []

    def field(x: Tensor, t: float) -> Field:
        asked.append(t)
        return Field(x * math.cos(3 * t), x)

    want = math.exp(-math.sin(3.0) / 3)
    errors = []
    for n in (80, 160):
        got = sample(field, torch.ones(1, 1, dtype=torch.float64), process=Straight(), solver=Heun(), steps=n)
        errors.append(abs(got.item() - want))
    assert len(asked) == 480
    assert math.log2(errors[0] / errors[1]) == pytest.approx(2, abs=0.25)
    with pytest.raises(ValueError, match="needs Gaussian noise"):
        sample(field, torch.ones(1, 1), process=Straight(), solver=DDIM(1.0), steps=3)
    with pytest.raises(ValueError, match="needs a Gaussian process"):
        Straight().grid(3, "logsnr")
    with pytest.raises(NotImplementedError, match="hand sample"):
        sample(field, (2, 1), process=Straight(), solver=Heun(), steps=3)


def test_heun_where_sigma_is_zero_and_the_field_is_known() -> None:
    """sigma = 0 alone says nothing of whether the field can be evaluated there: plain Heun, step by step."""

    class Noiseless(Process):
        t_min, t_max, is_gaussian = 0.0, 1.0, False

        def _log_alpha(self, t: Tensor) -> Tensor:
            return torch.zeros_like(t)

        def _log_sigma(self, t: Tensor) -> Tensor:
            return torch.full_like(t, -torch.inf)

    process = Noiseless()

    def field(x: Tensor, t: float) -> Prediction:
        return Prediction(x * math.cos(3 * t), x, t, process, "flow")

    for n in (3, 20):
        got = sample(field, torch.ones(1, 1, dtype=torch.float64), process=process, solver=Heun(), steps=n).item()
        x, times = 1.0, process.grid(n, "time").tolist()
        for s, t in itertools.pairwise(times):
            k = x * math.cos(3 * s)
            x += (t - s) * (k + (x + (t - s) * k) * math.cos(3 * t)) / 2
        assert got == pytest.approx(x, rel=1e-14)


@pytest.mark.parametrize(
    ("kind", "process", "evaluations"),
    [
        ("flow", Flow(), 8), ("epsilon", Flow(), 8), ("v_prediction", TrigFlow(), 8), ("sample", Flow(), 7),
        ("sample", Flow(t_min=0.1), 8), ("edm", EDM(), 7), ("flow", EDM(), 7),
    ],
)  # fmt: skip
def test_runge_kutta_asks_where_the_dialect_determines_the_field(kind: str, process: Any, evaluations: int) -> None:
    end = 0 if isinstance(process, EDM) else None
    grid = process.grid(4, "time" if end is None else "karras", end=end)
    start = 0.0 if kind != "epsilon" else 1e-3
    grid[0] -= start  # an eps at alpha = 0 says nothing of x0
    denoiser = Denoiser(lambda x, t: 0.1 * x, process, kind)
    _, info = sample(denoiser, noise(3), solver=Heun(), grid=grid, return_info=True)
    assert info.nfe == evaluations


# --- options, equality, devices


def test_no_option_is_taken_where_it_does_nothing() -> None:
    for make, message in (
        (lambda: DPMSolver(method="fast", rtol=0.1), r'rtol=0.1 needs method="adaptive" \(DPMSolverAdaptive\)'),
        (lambda: DPMSolver(method="singlestep", parity="official"), r'parity="official" needs method="multistep"'),
        (lambda: DPMSolver(method="multistep", h_init=0.1), "does nothing in DPMSolverMultistep"),
        (lambda: DPMSolver(method="adaptive", grid="time"), "does nothing in DPMSolverAdaptive"),
        (lambda: DPMSolver(method="multistep", sde=True, start="singlestep"), "does nothing in DPMSolverSDE"),
        (lambda: DPMSolver(method="fast", lower_order_final=15), "does nothing in DPMSolverFast"),
        (lambda: DPMSolverMultistep(order=1, start="singlestep"), "needs order 2 or 3"),
    ):
        with pytest.raises(ValueError, match=message):
            make()
    with pytest.raises(TypeError):
        DPMSolverFast(rtol=0.1)  # type: ignore[call-arg]


def test_the_old_call_makes_the_small_classes() -> None:
    base: dict[str, Any] = {"order": 2, "form": "data"}
    assert DPMSolver() == DPMSolverFast()
    assert DPMSolver(method="singlestep", **base) == DPMSolverSinglestep(**base)
    assert DPMSolver(method="multistep", **base) == DPMSolverMultistep(**base)
    assert DPMSolver(method="multistep", sde=True, **base) == DPMSolverSDE(**base)
    assert DPMSolver(2, "data", "adaptive") == DPMSolverAdaptive(**base)
    assert isinstance(DPMSolver(), DPMSolver)
    assert repr(DPMSolver(method="multistep", **base)) == "DPMSolverMultistep(order=2, form='data')"
    full = dict(
        method="multistep", atol=0.0078, rtol=0.05, theta=0.9, h_init=0.05, sde=False, max_nfe=10_000, start="lower"
    )
    assert DPMSolver(**full) == DPMSolverMultistep()  # as configurations were saved
    for solver in EVERY:
        same = pickle.loads(pickle.dumps(solver))
        assert type(same) is type(solver)
        assert same == solver
        assert hash(same) == hash(solver)
    assert Heun() != Euler()


def test_true_and_one_are_the_same() -> None:
    one, true, no, zero = (DPMSolverMultistep(lower_order_final=v) for v in (1, True, False, 0))
    assert one == true
    assert one.orders(6) == true.orders(6) == [1, 2, 3, 3, 2, 1]
    assert no == zero
    assert no.orders(6) == zero.orders(6) == [1, 2, 3, 3, 3, 3]


def test_chains_compare_by_value() -> None:
    a, b = Discrete(BETAS), Discrete(BETAS.clone())
    assert a == b
    assert hash(a) == hash(b)
    assert a == Discrete(alphas_cumprod=torch.cumprod(1 - BETAS, 0))
    assert a != Discrete(BETAS * 1.001)
    assert a != Discrete(BETAS, label_scale=500)
    assert a != VP()
    assert sample(exact(a), noise(2), process=b, solver=DDIM(), steps=3).shape == (2, 1)


def test_single_precision_may_miss_the_ends() -> None:
    process = EDM()
    low, high = process.sigma_min ** (1 / 7), process.sigma_max ** (1 / 7)
    grid = (torch.linspace(0, 1, 5) * (low - high) + high) ** 7
    assert sample(exact(process), noise(2), solver=Euler(), grid=torch.cat([grid, torch.zeros(1)])).isfinite().all()
    assert process.check_time("t", 0.002 * (1 - 3e-7)) == 0.002
    assert process.check_time("t", 80.0 * (1 + 3e-7)) == 80.0
    assert VP().check_time("t", 1.0 + 1e-7) == 1.0
    for t in (0.00199, 80.001, -1e-9, 1e-6):
        with pytest.raises(ValueError, match="t must be in"):
            process.check_time("t", t)


def test_a_generator_for_each_row() -> None:
    solver = DDIM(1.0)
    many = sample(exact(), (3, 1), solver=solver, steps=4, generator=[rng(s) for s in (1, 2, 3)])
    for i, s in enumerate((1, 2, 3)):
        alone = sample(exact(), (1, 1), solver=solver, steps=4, generator=[rng(s)])
        assert torch.allclose(many[i : i + 1], alone)
    start = noise(3)
    assert sample(exact(), start, solver=solver, steps=4, generator=[rng(s) for s in (1, 2, 3)]).shape == (3, 1)
    with pytest.raises(ValueError, match="one for each of the 3 rows, got 2"):
        sample(exact(), start, solver=solver, steps=4, generator=[rng(1), rng(2)])
    with pytest.raises(ValueError, match="one for each of the 3 rows, got 2"):
        sample(exact(), (3, 1), solver=solver, steps=4, generator=[rng(1), rng(2)])
    x0 = torch.zeros(2, 3)
    x, _ = VP().perturb(x0, 0.5, generator=[rng(1), rng(2)])
    assert torch.equal(x[1:], VP().perturb(x0[1:], 0.5, generator=[rng(2)])[0])


class NoFloat64(TorchDispatchMode):
    """A device without float64, such as MPS; the meta device stands for it."""

    def __torch_dispatch__(self, f: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = f(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            assert not (isinstance(t, Tensor) and t.device.type == "meta" and t.dtype == torch.float64), f
        return out


@pytest.mark.parametrize("name", ["VP", "EDM", "Flow", "Discrete", "own"])
def test_nothing_is_float64_on_a_device_that_may_not_have_it(name: str) -> None:
    process = {"VP": VP(), "EDM": EDM(), "Flow": Flow(), "Discrete": Discrete(BETAS), "own": Sine()}[name]
    x, t = torch.empty(2, 4, device="meta"), torch.empty(2, device="meta")
    with NoFloat64():
        process.perturb(x, t, x)
        for kind in ("epsilon", "sample", "v_prediction", "flow", "edm"):
            p = Denoiser(lambda x, t: x, process, kind)(x, t)
            assert p.x0.dtype == p.eps.dtype == p.flow.dtype == torch.float32
        for solver in (DDIM(), DDIM(1.0), Heun(), DPMSolverMultistep(form="data")):
            grid = process.grid(4, "time", start=0.9 * process.t_max, end=process.t_min or 0.1)
            sample(Denoiser(lambda x, t: x, process), x, solver=solver, grid=grid, check_finite=False)


def test_per_row_times_equal_single_ones() -> None:
    process, t = VP(), torch.tensor([0.2, 0.5, 0.9])
    x = torch.randn(3, 4, generator=rng())
    denoiser = Denoiser(lambda x, t: torch.sin(x + t[:, None]), process)
    together = denoiser(x, t)
    for i in range(3):
        alone = denoiser(x[i : i + 1], t[i].item())
        for view in ("x0", "eps", "v", "score", "flow"):
            assert torch.allclose(together.view(view)[i : i + 1], alone.view(view), rtol=1e-5, atol=1e-6)


def test_resume_renumbers_solvers_without_memory() -> None:
    class Plain(Solver):
        def run(self, x, times, process, *, generator=None):  # type: ignore[no-untyped-def, override]
            for i, (s, t) in enumerate(itertools.pairwise(times)):
                p = yield Query(x, s)
                x = p.x + (t - s) * p.flow
                yield Step(x, s, t, i, i == len(times) - 2)
            return x

    kept: list[Step] = []
    whole = sample(exact(), noise(), solver=Plain(), steps=5, callback=kept.append)
    later: list[Step] = []
    assert torch.equal(sample(exact(), kept[1], solver=Plain(), steps=5, callback=later.append), whole)
    assert [s.index for s in later] == [2, 3, 4]
    run = resume(Plain(), kept[1], VP().grid(5, "time").tolist(), VP())
    assert isinstance(next(run), Query)


def test_a_stage_table_is_all_a_linear_solver_needs() -> None:
    class Mine(LinearSolver):
        def table(self, times: Any, process: Any, kind: str = "flow") -> list[Stage]:
            at = process.moments(times)
            return [Stage(s, t, "flow", 1.0, t - s) for s, t in itertools.pairwise(at)]

    assert torch.equal(
        sample(exact(), noise(), solver=Mine(), steps=6), sample(exact(), noise(), solver=Euler(), steps=6)
    )


def test_a_solver_whose_rows_have_times_of_their_own() -> None:
    """Heun from a noise level of each row's own; every row is what it is alone."""
    process = EDM(sigma_min=0.01, sigma_max=40.0)
    starts = torch.tensor([1.0, 5.0, 40.0], dtype=torch.float64)

    class PerRow(Solver):
        def __init__(self, starts: Tensor) -> None:
            self.starts = starts

        def run(self, x, times, process, *, generator=None):  # type: ignore[no-untyped-def, override]
            shares = torch.linspace(1, 0, len(times), dtype=torch.float64)
            rows = self.starts[None] ** shares[:, None] * 0.01 ** (1 - shares[:, None])
            for i, (s, t) in enumerate(itertools.pairwise(rows)):
                p = yield Query(x, s)
                slope = p.flow
                q = yield Query(p.x + (t - s)[:, None] * slope, t, first=False)
                x = p.x + (t - s)[:, None] * (slope + q.flow) / 2
                yield Step(x, float(s.max()), float(t.max()), i, i == len(rows) - 2)
            return x

    grid = process.grid(6, "karras")
    denoiser = Denoiser(lambda x, label: 0.3 * x / (1 + label[:, None] ** 2), process, "sample")
    x = noise(3, 2) * starts[:, None]
    together, info = sample(denoiser, x, solver=PerRow(starts), grid=grid, return_info=True)
    assert info.queries[0].tolist() == starts.tolist()
    for i in range(3):
        alone = sample(denoiser, x[i : i + 1], solver=PerRow(starts[i : i + 1]), grid=grid)
        assert torch.allclose(together[i : i + 1], alone, rtol=1e-13)
    with pytest.raises(ValueError, match=r"NaN in the prediction of evaluation 1 at t=\[1.0, 5.0, 40.0\]"):
        sample(Denoiser(lambda x, t: x * math.nan, process, "sample"), x, solver=PerRow(starts), grid=grid)


def test_times_may_be_of_any_kind_of_number() -> None:
    import numpy as np

    want = sample(exact(), noise(2), solver=DDIM(), grid=[1.0, 0.5, 0.25])
    for grid in (
        torch.tensor([1.0, 0.5, 0.25]),
        np.array([1.0, 0.5, 0.25]),
        np.array([1.0, 0.5, 0.25], dtype=np.float32),
        [torch.tensor(1.0), torch.tensor(0.5), torch.tensor(0.25)],
        (1, 0.5, 0.25),
    ):
        assert torch.equal(sample(exact(), noise(2), solver=DDIM(), grid=grid), want)
