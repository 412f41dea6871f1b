"""Where runs meet other people's programs: their tracers, modes, networks that write, callbacks that change, and odd numbers."""

from __future__ import annotations

import copy
import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from generate_cases import noise
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from polyak.generate import (
    CFG,
    DDIM,
    OU,
    RK4,
    VP,
    CosineVP,
    Denoiser,
    Discrete,
    DPMSolverAdaptive,
    DPMSolverFast,
    DPMSolverMultistep,
    DPMSolverSDE,
    Euler,
    Flow,
    Heun,
    Prediction,
    Process,
    Solver,
    SteeringState,
    Step,
    check_process,
    check_solver,
    drive,
    sample,
)
from polyak.generate.prediction import _schedules


def linear(x: Tensor, t: Tensor) -> Tensor:
    return 0.3 * x


X = noise(3, 2)


# --- processes at their ends


def test_a_chain_whose_last_alpha_is_zero_is_a_number_everywhere() -> None:
    chain = Discrete([0.1, 0.2, 0.5, 1.0])
    products = [1.0, 0.9, 0.72, 0.36, 0.0]
    t = torch.arange(5, dtype=torch.float64) / 4
    assert torch.allclose(chain.alpha(t) ** 2, torch.tensor(products, dtype=torch.float64), rtol=1e-14)
    assert chain.sigma(1.0) == 1.0
    thirds = Discrete(torch.full((3,), 0.1, dtype=torch.float64))
    assert all(thirds.alpha(i / 3) == pytest.approx(0.9 ** (i / 2), rel=1e-14) for i in range(4))


def test_no_noise_at_zero_is_zero() -> None:
    assert (CosineVP().alpha(0.0), CosineVP().sigma(0.0), CosineVP().lam(0.0)) == (1.0, 0.0, math.inf)
    assert CosineVP().ends_clean(0.0)


@pytest.mark.parametrize("solver", [Euler(), Heun(), RK4()], ids=repr)
def test_a_field_without_a_slope_at_zero_is_not_asked_there(solver: Solver) -> None:
    """VP's sigma' is infinite at t = 0: the last step ends there without an evaluation."""
    got = sample(Denoiser(linear, VP(t_min=0.0)), X, solver=solver, steps=64)
    want = sample(Denoiser(linear, VP(t_min=0.0)), X, solver=DPMSolverAdaptive(rtol=1e-6, atol=1e-7), grid=[1.0, 1e-6])
    assert torch.allclose(got, want, rtol=0.06)  # what Euler is off by


def test_what_a_run_ends_in_is_looked_at() -> None:
    class Ends(Euler):
        def run(self, x: Tensor, times: Any, process: Any, **options: Any) -> Any:
            end = yield from super().run(x, times, process, **options)
            return end / 0

    with pytest.raises(ValueError, match="finite"):
        sample(Denoiser(linear, VP()), X, solver=Ends(), steps=2)


# --- networks


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_network_that_writes_into_its_label(mode: Any) -> None:
    seen: list[float] = []

    def writes(x: Tensor, t: Tensor) -> Tensor:
        seen.append(t[0].item())
        t.mul_(1000.0)
        return 0.1 * x

    denoiser = Denoiser(writes, VP(), unconditional=writes)
    options: dict[str, Any] = {"solver": DDIM(), "grid": [1.0, 0.5, 0.1]}
    with mode():
        sample(denoiser, X, guidance=CFG(2.0), **options)
        sample(denoiser, X, **options)
        sample(denoiser, X, callback=lambda step: None, **options)
    assert seen == pytest.approx([1.0, 1.0, 0.5, 0.5, 1.0, 0.5, 1.0, 0.5])


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_labels_are_made_once_a_run(mode: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[float] = []
    denoiser = Denoiser(linear, VP())
    monkeypatch.setattr(denoiser, "_told_at", lambda t: made.append(t) or float(t))
    with mode():
        sample(denoiser, X, solver=DDIM(), steps=6, callback=lambda step: None)
    assert len(made) == 7


def test_a_label_is_asked_for_where_a_network_is() -> None:
    """The last time of this run has none, and needs none."""
    got = sample(Denoiser(linear, Flow(), "edm"), X, solver=DDIM(), grid=[0.9, 0.5, 0.0])
    assert got.isfinite().all()


@pytest.mark.parametrize(
    ("output", "message"), [((X,), "got tuple"), (type("Out", (), {"sample": X})(), "take its .sample")]
)
def test_an_output_that_is_no_tensor(output: Any, message: str) -> None:
    for options in ({}, {"callback": print}):
        with pytest.raises(TypeError, match=message):
            sample(Denoiser(lambda x, t: output, VP()), X, solver=DDIM(), steps=2, **options)


def test_an_adaptive_run_keeps_what_a_network_writes_over() -> None:
    kept = torch.empty_like(X)

    def reuses(x: Tensor, t: Tensor) -> Tensor:
        return kept.copy_(torch.sin(x))

    options: dict[str, Any] = {"solver": DPMSolverAdaptive(order=3)}
    fresh = sample(Denoiser(lambda x, t: torch.sin(x), VP()), X, **options)
    assert torch.equal(sample(Denoiser(reuses, VP()), X, **options), fresh)


def test_evaluations_are_counted_as_they_are_made() -> None:
    def fails(x: Tensor, t: Tensor) -> Tensor:
        if t[0] < 0.5:
            raise KeyError("network")
        return 0.3 * x

    denoiser = Denoiser(fails, VP())
    with pytest.raises(KeyError):
        sample(denoiser, X, solver=DDIM(), grid=[1.0, 0.8, 0.6, 0.4, 0.2])
    assert denoiser.nfe == 3


def test_max_nfe_is_not_exceeded() -> None:
    denoiser = Denoiser(linear, VP())
    with pytest.raises(RuntimeError, match="max_nfe=7"):
        sample(denoiser, X, solver=DPMSolverAdaptive(order=3, max_nfe=7, rtol=1e-9, atol=1e-9))
    assert denoiser.nfe == 6
    with pytest.raises(RuntimeError, match="spent 0 evaluations"):
        sample(denoiser, X, solver=DPMSolverAdaptive(order=3, max_nfe=2))
    assert denoiser.nfe == 6


# --- compilers and modes


def test_a_whole_run_under_torch_compile() -> None:
    def run(x: Tensor) -> Tensor:
        return sample(Denoiser(linear, VP()), x, solver=DDIM(), steps=2)

    torch._dynamo.reset()
    assert torch.equal(torch.compile(run, backend="eager")(X), run(X))


def test_shapes_without_numbers() -> None:
    """Memory is planned with fake and meta tensors; schedules stay numbers."""
    for solver in (DDIM(), DPMSolverMultistep(form="data"), Heun(), DPMSolverFast(), DPMSolverSDE(form="data")):
        for options in ({}, {"callback": lambda step: None}):
            with FakeTensorMode():
                got = sample(Denoiser(linear, VP()), torch.ones(3, 2), solver=solver, nfe=6, **options)
            assert isinstance(got, FakeTensor)
            assert got.shape == (3, 2)
            meta = sample(Denoiser(linear, VP()), torch.ones(3, 2, device="meta"), solver=solver, nfe=6, **options)
            assert meta.is_meta


def test_the_default_device_is_that_of_what_is_made_without_one() -> None:
    for solver in (DDIM(), DPMSolverMultistep(form="data"), Heun(), DPMSolverFast(), DPMSolverSDE(form="data")):
        options: dict[str, Any] = {"solver": solver, "nfe": 6}
        want = sample(Denoiser(linear, VP()), X, generator=torch.Generator().manual_seed(0), **options)
        with torch.device("meta"):
            got = sample(Denoiser(linear, VP()), X, generator=torch.Generator("cpu").manual_seed(0), **options)
        assert torch.equal(got, want)


def test_schedules_can_be_copied_and_asked_for_what_they_lack() -> None:
    for at in (_schedules(VP(), 0.5), _schedules(VP(), VP().moments([1.0, 0.5])[1])):
        for same in (copy.copy(at), copy.deepcopy(at)):
            assert same.alpha == pytest.approx(VP().alpha(0.5))
        assert not hasattr(at, "__array_interface__")


# --- dialects


def test_a_guidance_that_changes_the_dialect_on_the_way() -> None:
    """From eps to x0 half way: each step is the one that the prediction has."""

    class Late:
        paired = True
        guided = unguided = 1.0

        def init(self) -> None:
            return None

        def paired_at(self, t: float) -> bool:
            return t < 0.5

        def __call__(self, cond: Any, uncond: Any = None, state: Any = None, *, update: bool = True) -> Any:
            return cond if cond is uncond or uncond is None else cond.replace(2 * cond.x0 - uncond.x0, "sample")

        def reindex(self, state: Any, ancestors: Tensor) -> Any:
            return state

    for process, kind in ((Flow(), "flow"), (VP(t_min=0.0), "epsilon")):
        denoiser = Denoiser(linear, process, kind, unconditional=lambda x, t: 0.2 * x)
        for solver in (Heun(), RK4(), DDIM(), DPMSolverMultistep(form="data")):
            got = sample(denoiser, X, solver=solver, grid=[0.99, 0.75, 0.5, 0.25, 0.0], guidance=Late())
            assert got.isfinite().all(), (process, solver)


def test_views_have_names() -> None:
    with pytest.raises(ValueError, match="view must be one of 'x0', 'eps', 'score', 'v', 'flow', got 'epsilon'"):
        Prediction(X, X, 0.5, VP()).view("epsilon")


# --- what is passed in


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"guidance": 3.0}, "guidance must be a Guidance"),
        ({"guidance": CFG}, "an instance, not the class"),
        ({"steering": 4}, "steering must be a Steering"),
        ({"corrector": 1}, "corrector must be a function"),
        ({"generator": 0}, "generator must be a torch.Generator"),
        ({"generator": [0, 1, 2]}, r"generator\[0\] must be a torch.Generator"),
    ],
)
def test_parts_that_are_none(options: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        sample(Denoiser(linear, VP()), X, solver=DDIM(), steps=2, **options)


@pytest.mark.parametrize("start", [3, "12", None, ()])
def test_starts_that_are_none(start: Any) -> None:
    with pytest.raises(TypeError, match="x_T_or_shape must be a tensor or a shape"):
        sample(Denoiser(linear, VP()), start, solver=DDIM(), steps=2)


def test_numpys_numbers_are_numbers() -> None:
    theirs = DPMSolverMultistep(order=np.int64(3), denoise_to_zero=np.bool_(True))  # type: ignore[arg-type]
    assert theirs == DPMSolverMultistep(order=3, denoise_to_zero=True)
    with pytest.raises(ValueError, match="denoise_to_zero must be one of"):
        DPMSolverMultistep(denoise_to_zero=np.int64(1))  # type: ignore[arg-type]


def test_a_stop_from_elsewhere_is_no_end() -> None:
    def stops(query: Any) -> Any:
        return next(iter([]))

    with pytest.raises((StopIteration, RuntimeError)):
        drive(DDIM().run(X, [1.0, 0.5, 0.1], VP()), stops)
    several = iter([1])
    with pytest.raises((StopIteration, RuntimeError)):
        sample(Denoiser(linear, VP()), X, solver=DDIM(), steps=3, callback=lambda step: next(several))


# --- callbacks


def test_a_callback_may_give_another_state() -> None:
    def replaces(step: Step) -> None:
        step.x = step.x / 2

    def writes(step: Step) -> None:
        step.x.div_(2)

    for solver in (DDIM(), DPMSolverMultistep(form="data"), Heun()):
        options: dict[str, Any] = {"solver": solver, "steps": 4}
        halved = sample(Denoiser(linear, VP()), X, callback=writes, **options)
        assert torch.equal(sample(Denoiser(linear, VP()), X, callback=replaces, **options), halved)
        assert not torch.allclose(sample(Denoiser(linear, VP()), X, **options), halved)


def test_what_a_callback_is_given_of_steering_is_its_own() -> None:
    class Sums:
        particles, resamples = 1, False

        def init(self, batch: int, k: int) -> SteeringState:
            return SteeringState.uniform(batch, k)

        def step(self, state: SteeringState, x_next: Tensor, **told: Any) -> tuple[Tensor, SteeringState]:
            state.logw.add_(1)
            return x_next, state

        def select(self, state: SteeringState, x: Tensor) -> Tensor:
            return x

    kept: list[Any] = []
    options: dict[str, Any] = {"solver": DDIM(), "steps": 3, "steering": Sums()}
    sample(Denoiser(linear, VP()), X, callback=lambda s: kept.append(s.steering), **options)
    assert [state.logw[0].item() for state in kept] == [1.0, 2.0, 3.0]


# --- the checks of parts of one's own


@pytest.mark.parametrize(
    "process",
    [
        VP(t_max=2.0),
        VP(beta1=50.0),
        OU(t_max=20.0),
        Discrete(torch.linspace(1e-3, 0.2, 100)),
        Discrete(torch.linspace(1e-4, 0.02, 50)),
    ],
    ids=repr,
)
def test_right_processes_pass(process: Process) -> None:
    check_process(process)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prior_std": 3.0}, r"prior must have the std|prior_std must be"),
        ({"evaluable": lambda self, t, kind="flow": True}, "must be false above t_max"),
        ({"evaluable": lambda self, t, kind="flow": False}, "must be true within"),
        ({"ends_clean": lambda self, t: True}, "must be false within"),
        ({"perturb": lambda self, x0, t, noise=None, **k: (x0 + noise, noise)}, "alpha x0 \\+ sigma noise"),
        ({"perturb": lambda self, x0, t, noise=None, **k: (x0, torch.zeros_like(x0))}, "must use the noise"),
    ],
)
def test_wrong_processes_do_not(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        check_process(type("Wrong", (Flow,), changes)())


@pytest.mark.parametrize("solver", [DPMSolverMultistep(3, parity="official"), DPMSolverAdaptive(), DDIM(0.5)], ids=repr)
def test_right_solvers_pass(solver: Solver) -> None:
    check_solver(solver)


def test_a_stochastic_step_says_what_it_drew_from() -> None:
    class Silent(DDIM):
        stochastic = True

        def run(self, x: Tensor, times: Any, process: Any, *, generator: Any = None, memory: Any = None) -> Any:
            from polyak.generate import Query

            for i, (s, t) in enumerate(itertools.pairwise(times)):
                p = yield Query(x, s)
                drawn = torch.randn(x.shape, dtype=x.dtype, generator=generator)
                change = yield Step(
                    process.alpha(t) * p.x0 + process.sigma(t) * drawn, s, t, i, i == len(times) - 2, memory=i + 1
                )
                x = process.alpha(t) * p.x0 + process.sigma(t) * drawn if change is None else change.x
            return x

    with pytest.raises(AssertionError, match="must give its mean and std"):
        check_solver(Silent())
