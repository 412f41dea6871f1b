"""Runs: begun anywhere, copied at any time, edited on the way, with generators for each step, on devices without float64."""

from __future__ import annotations

import copy
import pickle
import threading
from itertools import pairwise
from typing import Any

import pytest
import torch
from diffusers_cases import TWO_M, diffusers, network, push, rng, saved
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from polyak.generate import (
    DDIM,
    RK4,
    VP,
    Denoiser,
    DPMSolver,
    Euler,
    Flow,
    Heun,
    ProbabilityPath,
    Query,
    Solver,
    Step,
    sample,
)
from polyak.generate.adapters.diffusers import PolyakScheduler, as_diffusers

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:diffusers")


class AdamsBashforth(Solver):
    """A coroutine of the user's own that remembers a slope and does not say so."""

    def run(self, x: Any, times: Any, process: Any, *, generator: Any = None) -> Any:
        before = None
        for i, (s, t) in enumerate(pairwise(times)):
            p = yield Query(x, s)
            slope = p.flow
            x = p.x + (t - s) * (slope if before is None else 1.5 * slope - 0.5 * before)
            before = slope
            yield Step(x, s, t, i, i == len(times) - 2)
        return x


class Noisy(Solver):
    """A coroutine of the user's own that draws noise."""

    stochastic = True

    def run(self, x: Any, times: Any, process: Any, *, generator: Any = None) -> Any:
        for i, (s, t) in enumerate(pairwise(times)):
            p = yield Query(x, s)
            x = 0.9 * p.x0 + 0.1 * torch.randn(p.x.shape, generator=generator, dtype=p.x.dtype)
            yield Step(x, s, t, i, i == len(times) - 2)
        return x


class Remembering(Solver):
    """The same, which puts what it remembers into its steps."""

    history = 1

    def run(self, x: Any, times: Any, process: Any, *, generator: Any = None, memory: Any = None) -> Any:
        first, before = (0, None) if memory is None else memory
        for i, (s, t) in enumerate(pairwise(times)):
            if i < first:
                continue
            p = yield Query(x, s)
            slope = p.flow
            x = p.x + (t - s) * (slope if before is None else 1.5 * slope - 0.5 * before)
            before = slope
            yield Step(x, s, t, i, i == len(times) - 2, memory=(i + 1, before))
        return x


SOLVERS: list[Solver] = [
    DDIM(),
    DDIM(1.0),
    Euler(),
    Heun(),
    RK4(),
    DPMSolver(),
    DPMSolver(order=2, form="data", method="fast"),
    DPMSolver(order=3, form="data", method="singlestep"),
    TWO_M,
    DPMSolver(order=3, method="multistep", start="singlestep"),
    DPMSolver(order=2, form="data", method="multistep", denoise_to_zero=True),
    DPMSolver(order=2, form="data", method="multistep", sde=True),
    AdamsBashforth(),
    Remembering(),
    Noisy(),
]
every_solver = pytest.mark.parametrize("solver", SOLVERS, ids=repr)
ORIGINS = ["DDIMScheduler", "DPMSolverMultistepScheduler", "EulerDiscreteScheduler", "FlowMatchEulerDiscreteScheduler"]


def scheduler_of(solver: Solver, origin: str = "DPMSolverMultistepScheduler", **options: Any) -> PolyakScheduler:
    if origin == "DDIMScheduler":
        options = {"clip_sample": False, **options}
    return PolyakScheduler.from_config(saved(getattr(diffusers, origin)(**options)), solver=solver)


def start(rows: int = 2) -> torch.Tensor:
    return torch.randn(rows, 3, 4, dtype=torch.float64, generator=rng())


def steps(scheduler: PolyakScheduler, x: torch.Tensor, indices: range, **kwargs: Any) -> torch.Tensor:
    for i in indices:
        t = scheduler.timesteps[i]
        x = scheduler.step(network(scheduler.scale_model_input(x, t), t), t, x, **kwargs).prev_sample
    return x


# --- beginning anywhere


@every_solver
@pytest.mark.parametrize("origin", ORIGINS)
def test_image_to_image_at_every_strength(solver: Solver, origin: str) -> None:
    # pipelines: timesteps[t_start * order:], with as many steps left as the strength asks for
    n = 7
    for t_start in range(n):
        scheduler = scheduler_of(solver, origin)
        scheduler.set_timesteps(n)
        first = t_start * scheduler.order
        rest = scheduler.timesteps[first:]
        assert len(rest) >= (n - t_start - 1) * scheduler.order + 1
        level = float(scheduler.sigmas[first])
        assert level < float(scheduler.sigmas[0]) or t_start == 0
        scheduler.set_begin_index(first)
        x = steps(scheduler, start(), range(first, len(scheduler.timesteps)))
        assert bool(x.isfinite().all())
        assert scheduler.step_index == len(scheduler.timesteps)
        with pytest.raises(ValueError, match="the run is complete"):
            scheduler.step(x, rest[-1], x)


@every_solver
def test_a_run_may_begin_at_any_timestep(solver: Solver) -> None:
    # x0 = 0 is said everywhere: then the result is the noise that remains, whatever the plan.
    scheduler = scheduler_of(solver, prediction_type="sample", final_sigmas_type="sigma_min")
    if solver.stochastic or isinstance(solver, RK4 | Heun | Euler | AdamsBashforth | Remembering):
        return  # exact for x0 = 0 are the exponential integrators
    scheduler.set_timesteps(8)
    for index in range(len(scheduler.timesteps)):
        scheduler.set_timesteps(8)
        scheduler.set_begin_index(index)
        x = start()
        for t in scheduler.timesteps[index:]:
            x = scheduler.step(torch.zeros_like(x), t, x).prev_sample
        process = scheduler.process
        ratio = process.sigma(process.t_min) / process.sigma(scheduler._asked[index])
        if getattr(solver, "denoise_to_zero", False):
            ratio = 0.0
        assert torch.allclose(x, ratio * start(), rtol=1e-9, atol=1e-12), index
    scheduler.set_timesteps(8)
    scheduler.set_begin_index(99)
    with pytest.raises(ValueError, match="begin_index must be below"):
        scheduler.step(x, scheduler.timesteps[0], x)


def test_a_run_from_the_middle_is_the_solvers_own_from_there() -> None:
    for solver in (DPMSolver(), DPMSolver(order=2, form="data"), Heun(), RK4(), TWO_M):
        scheduler = scheduler_of(solver, final_sigmas_type="sigma_min")
        scheduler.set_timesteps(9)
        first = 4 * scheduler.order
        x = steps(scheduler, start(), range(first, len(scheduler.timesteps)))
        denoiser = Denoiser(network, scheduler.process)
        want = sample(denoiser, start(), solver=solver, grid=scheduler._times[4:])
        assert torch.allclose(x, want, rtol=1e-5, atol=1e-5)


def test_a_singlestep_start_is_left_out_where_the_run_begins_later() -> None:
    scheduler = scheduler_of(DPMSolver(order=3, form="data", method="multistep", start="singlestep"))
    scheduler.set_timesteps(8)
    scheduler.set_begin_index(6)
    x = steps(scheduler, start(), range(6, len(scheduler.timesteps)))
    denoiser = Denoiser(network, scheduler.process)
    times = [*scheduler._asked[6:], 0.0]
    want = sample(denoiser, start(), solver=DPMSolver(order=3, form="data", method="multistep"), grid=times)
    assert torch.allclose(x, want, rtol=1e-5, atol=1e-5)


def test_the_order_of_solvers() -> None:
    orders = {repr(s): scheduler_of(s).order for s in SOLVERS}
    assert {name: order for name, order in orders.items() if order != 1} == {"Heun()": 2, "RK4()": 4}
    scheduler = scheduler_of(RK4())
    for n in (1, 2, 3, 10):  # the number of steps does not change it
        scheduler.set_timesteps(n)
        assert scheduler.order == 4
        assert len(scheduler.timesteps) == 4 * (n - 1) + 1


# --- copies


@every_solver
@pytest.mark.parametrize("way", [copy.deepcopy, lambda s: pickle.loads(pickle.dumps(s))], ids=["deepcopy", "pickle"])
@pytest.mark.parametrize("at", [0, 1, 3, 6])
def test_a_copy_goes_on_alike(solver: Solver, way: Any, at: int) -> None:
    scheduler = scheduler_of(solver)
    copied = way(scheduler)  # before anything is planned
    copied.set_timesteps(6)
    scheduler.set_timesteps(6)
    assert torch.equal(copied.timesteps, scheduler.timesteps)
    count = len(scheduler.timesteps)
    at = min(at, count)
    x = steps(scheduler, start(), range(at), generator=rng(1))
    again = way(scheduler)
    results = [steps(s, x, range(at, count), generator=rng(2)) if at < count else x for s in (scheduler, again)]
    assert torch.equal(*results)
    assert scheduler.step_index == again.step_index
    twice = way(way(scheduler))  # after the run
    twice.set_timesteps(6)
    assert twice.step_index is None


def test_a_copy_of_a_copy_within_a_run() -> None:
    scheduler = scheduler_of(AdamsBashforth())
    scheduler.set_timesteps(6)
    want = steps(copy.deepcopy(scheduler), start(), range(6))
    x = steps(scheduler, start(), range(2))
    copied = pickle.loads(pickle.dumps(copy.deepcopy(scheduler)))
    x = steps(copied, x, range(2, 4))
    x = steps(copy.deepcopy(copied), x, range(4, 6))
    assert torch.equal(x, want)


def test_a_shallow_copy_goes_its_own_way() -> None:
    for solver in (TWO_M, AdamsBashforth()):
        scheduler = scheduler_of(solver)
        scheduler.set_timesteps(6)
        x = steps(scheduler, start(), range(3))
        again = copy.copy(scheduler)
        assert torch.equal(steps(scheduler, x, range(3, 6)), steps(again, x, range(3, 6)))


def test_a_copy_has_the_generator_that_was_given_last() -> None:
    for solver in (DDIM(1.0), Noisy()):
        for generator in (rng(5), [rng(5), rng(6)] if solver == DDIM(1.0) else rng(7)):
            scheduler = scheduler_of(solver)
            scheduler.set_timesteps(6)
            x = steps(scheduler, start(), range(1), generator=generator)
            again = copy.deepcopy(scheduler)
            assert torch.equal(steps(scheduler, x, range(1, 6)), steps(again, x, range(1, 6)))


def test_of_a_solver_with_a_memory_nothing_else_is_kept() -> None:
    scheduler = scheduler_of(Remembering())
    scheduler.set_timesteps(6)
    x = steps(scheduler, start(), range(4))
    assert scheduler._driven is not None
    coroutine = scheduler._driven._coroutine
    assert coroutine is not None
    assert coroutine.told == []
    again = pickle.loads(pickle.dumps(scheduler))
    assert torch.equal(steps(scheduler, x, range(4, 6)), steps(again, x, range(4, 6)))


def test_two_threads_on_copies() -> None:
    scheduler = scheduler_of(TWO_M)
    scheduler.set_timesteps(20)
    want, _ = push(copy.deepcopy(scheduler), start())
    results: dict[int, torch.Tensor] = {}

    def work(i: int) -> None:
        results[i] = push(copy.deepcopy(scheduler), start())[0]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(r, want) for r in results.values())


# --- edits


@pytest.mark.parametrize("solver", [TWO_M, DDIM(), Heun(), DPMSolver(form="data"), AdamsBashforth()], ids=repr)
def test_an_edit_counts_in_every_precision_in_place_or_not(solver: Solver) -> None:
    # The network says the same whatever it sees, so that only the state can carry the edit to the end.
    def run(dtype: torch.dtype, edit: str) -> torch.Tensor:
        scheduler = scheduler_of(solver, prediction_type="sample", final_sigmas_type="sigma_min")
        scheduler.set_timesteps(6)
        x = torch.randn(2, 4, 8, 8, generator=rng()).bfloat16().to(dtype)
        for i, t in enumerate(scheduler.timesteps):
            x = scheduler.step(torch.randn(2, 4, 8, 8, generator=rng(i)), t, x).prev_sample
            if edit == "in place" and i == 2:
                x[:, :2] += 100
            elif edit == "anew" and i == 2:
                x = torch.cat([x[:, :2] + 100, x[:, 2:]], 1)
        return x.float()

    want, without = run(torch.float32, "anew"), run(torch.float32, "none")
    assert (want - without).abs().max() > 0.2
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        got = run(dtype, "in place")
        assert torch.equal(got, run(dtype, "anew"))
        # what is not edited keeps its precision, and is rounded once
        assert torch.equal(got[:, 2:], without[:, 2:].to(dtype).float())
        # the edited values were rounded once more, where they were large
        assert (got - want).abs().max() < torch.finfo(dtype).eps * (100 + want.abs().max()) + 1e-4


# --- noise


@pytest.mark.parametrize(
    "solver", [DDIM(1.0), DPMSolver(order=2, form="data", method="multistep", sde=True), Noisy()], ids=repr
)
def test_the_generator_of_a_step_is_its_own(solver: Solver) -> None:
    scheduler = scheduler_of(solver, final_sigmas_type="sigma_min")
    results = []
    for seeds in ([1] * 5, [1, 1, 2, 1, 1]):
        scheduler.set_timesteps(5)
        x, seen = start(), []
        for t, seed in zip(scheduler.timesteps, seeds, strict=True):
            x = scheduler.step(network(x, t), t, x, generator=rng(seed)).prev_sample
            seen.append(x)
        results.append(seen)
    assert torch.equal(results[0][1], results[1][1])
    assert not torch.equal(results[0][2], results[1][2])
    # None is the last one that was given, which moves on
    scheduler.set_timesteps(5)
    generator, x = rng(1), start()
    for t in scheduler.timesteps:
        x = scheduler.step(network(x, t), t, x, generator=generator).prev_sample
    scheduler.set_timesteps(5)
    y = start()
    for i, t in enumerate(scheduler.timesteps):
        y = scheduler.step(network(y, t), t, y, generator=rng(1) if i == 0 else None).prev_sample
    assert torch.equal(x, y)


def test_a_list_of_generators_makes_samples_independent_of_their_batch() -> None:
    for solver in (DDIM(1.0), DPMSolver(order=2, form="data", method="multistep", sde=True)):
        scheduler, rows = scheduler_of(solver), []
        for seeds in ([1, 2], [2]):
            scheduler.set_timesteps(4)
            x = start()[-len(seeds) :]
            rows.append(steps(scheduler, x, range(4), generator=[rng(s) for s in seeds])[-1])
        assert torch.allclose(*rows, rtol=1e-12)


def test_clipped_noise_as_ddims_pipelines_ask_for_it() -> None:
    # DDIM keeps the network's noise where it clips the data; use_clipped_model_output=True takes that of the clipped data.
    theirs = diffusers.DDIMScheduler(clip_sample_range=0.5, timestep_spacing="trailing")
    ours = PolyakScheduler.from_config(saved(theirs), solver=DDIM())
    for clipped in (False, True):
        theirs.set_timesteps(5)
        ours.set_timesteps(5)
        want, _ = push(theirs, start(), use_clipped_model_output=clipped)
        got, _ = push(ours, start(), use_clipped_model_output=clipped)
        assert torch.allclose(got, want, rtol=1e-5, atol=1e-6)
    multistep = PolyakScheduler.from_config(saved(theirs), solver=TWO_M)
    multistep.set_timesteps(5)
    assert float(push(multistep, start())[0].abs().max()) <= 0.5


# --- add_noise and its kin


@pytest.mark.parametrize(
    "name",
    [
        *ORIGINS,
        "DDPMScheduler",
        "HeunDiscreteScheduler",
        "EDMEulerScheduler",
        "UniPCMultistepScheduler",
        "LCMScheduler",
    ],
)
def test_noise_is_added_as_the_origin_adds_it(name: str) -> None:
    kind = getattr(diffusers, name)
    theirs = kind()
    ours = PolyakScheduler.from_config(saved(theirs), solver=Heun() if name.startswith("Heun") else DDIM())
    x, z = torch.randn(2, 4, 3, 8, 8, generator=rng())
    for planned in (False, True):
        if planned:
            theirs.set_timesteps(9)
            ours.set_timesteps(9)
        elif name.startswith(("Heun", "DPMSolver", "UniPC")):
            continue  # it plans a run at once, or its levels are in another order than its timesteps
        t = theirs.timesteps[[2, 5, 5, 8]]
        if name.startswith("Flow"):
            want, got = theirs.scale_noise(x, t, z), ours.scale_noise(x, t, z)
        else:
            want, got = theirs.add_noise(x, z, t), ours.add_noise(x, z, t)
        assert torch.allclose(got, want, rtol=1e-4, atol=1e-4 * float(want.abs().max())), planned
    one = ours.add_noise(x, z, ours.timesteps[3:4])
    assert torch.allclose(one[2:3], ours.add_noise(x[2:3], z[2:3], ours.timesteps[3:4]))
    if hasattr(theirs, "get_velocity") and not name.startswith(
        "Euler"
    ):  # Euler's takes betas by the place in its schedule
        t = ours.timesteps[[2, 5, 5, 8]]
        assert torch.allclose(ours.get_velocity(x, z, t), theirs.get_velocity(x, z, t), rtol=1e-4, atol=1e-5)


def test_noise_at_planned_timesteps_has_their_own_levels() -> None:
    # A timestep that was truncated, or that says something else than its level, is looked up.
    x, z = torch.randn(2, 2, 3, 8, 8, generator=rng())
    for name, options, request in (
        ("DPMSolverMultistepScheduler", {"use_exponential_sigmas": True}, {"num_inference_steps": 9}),
        ("EulerDiscreteScheduler", {"interpolation_type": "log_linear"}, {"num_inference_steps": 9}),
        ("FlowMatchEulerDiscreteScheduler", {}, {"timesteps": [900.0, 500.0, 100.0], "sigmas": [0.7, 0.6, 0.2]}),
    ):
        theirs = getattr(diffusers, name)(**options)
        ours = PolyakScheduler.from_config(saved(theirs), solver=DDIM())
        for s in (theirs, ours):
            s.set_timesteps(**request)
        t = ours.timesteps[[1, 2]]
        want = theirs.scale_noise(x, t, z) if name.startswith("Flow") else theirs.add_noise(x, z, t)
        assert torch.allclose(ours.add_noise(x, z, t), want, rtol=1e-5, atol=1e-5)


def test_attributes_are_there_where_the_origin_has_them() -> None:
    chain = scheduler_of(DDIM(), "DDIMScheduler")
    flow = scheduler_of(Euler(), "FlowMatchEulerDiscreteScheduler")
    for name in ("betas", "alphas", "alphas_cumprod", "final_alpha_cumprod"):
        assert hasattr(chain, name)
        assert not hasattr(flow, name)
    for name in ("EulerDiscreteScheduler", "HeunDiscreteScheduler", "EDMEulerScheduler", "DPMSolverMultistepScheduler"):
        theirs = getattr(diffusers, name)()
        for spacing in ({"timestep_spacing": "leading"}, {}) if not name.startswith("EDM") else ({},):
            theirs = getattr(diffusers, name)(**spacing)
            ours = PolyakScheduler.from_config(saved(theirs), solver=Euler())
            for n in (None, 6):
                if n:
                    theirs.set_timesteps(n)
                    ours.set_timesteps(n)
                assert float(ours.init_noise_sigma) == pytest.approx(float(theirs.init_noise_sigma), rel=1e-6)
    assert as_diffusers(DDIM(), VP()).init_noise_sigma == 1.0
    flow.set_shift(3.0)
    flow.set_timesteps(4)
    theirs = diffusers.FlowMatchEulerDiscreteScheduler()
    theirs.set_shift(3.0)
    theirs.set_timesteps(4)
    assert float(flow.timesteps[1]) == pytest.approx(float(theirs.timesteps[1]), rel=1e-3)


def test_a_corrected_prediction_is_one_of_data() -> None:
    # x0 that was clipped says no velocity at sigma = 0, though the network's own output does: the last step is Euler's.
    plain, clipped = (as_diffusers(Heun(), Flow(label_scale=1000.0), "flow", clip_sample=c) for c in (False, True))
    for s, evaluations in ((plain, 8), (clipped, 7)):
        s.set_timesteps(4)
        assert len(s.timesteps) == evaluations
        assert bool(push(s, start(), lambda x, t: torch.tanh(x))[0].isfinite().all())


class Bridge(ProbabilityPath):
    """Two-sided: no alpha, no sigma; a network that gives the field."""

    t_min, t_max = 0.0, 1.0

    def label(self, t: Any) -> Any:
        return 100 * t


def test_a_path_that_is_no_gaussian_process() -> None:
    scheduler = as_diffusers(Heun(), Bridge(), "flow")
    scheduler.set_timesteps(40)
    assert scheduler.timesteps[:2].tolist() == [100.0, 97.5]
    x = torch.ones(1, 1, dtype=torch.float64)
    for t in scheduler.timesteps:
        out = scheduler.step(x * float(torch.cos(0.03 * t)), t, x)
        x, x0 = out.prev_sample, out.pred_original_sample
    assert x0 is None
    # dx/dt = x cos(3t), from 1 to 0
    assert x.item() == pytest.approx(float(torch.exp(-torch.sin(torch.tensor(3.0)) / 3)), rel=1e-4)
    copied = copy.deepcopy(scheduler)
    copied.set_timesteps(3)


# --- devices


class NoFloat64(TorchDispatchMode):
    """The meta device stands for one without float64 (MPS), and for one whose values a step must not wait for."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for t in tree_flatten(out)[0]:
            if isinstance(t, torch.Tensor) and t.device.type == "meta" and t.dtype == torch.float64:
                raise TypeError(f"float64 on a device that has none ({func})")
        return out


@pytest.mark.parametrize("origin", [*ORIGINS, "EDMEulerScheduler"])
@pytest.mark.parametrize("solver", [DDIM(), TWO_M, Heun(), DPMSolver(form="data"), AdamsBashforth()], ids=repr)
def test_devices_without_float64_and_without_synchronization(origin: str, solver: Solver) -> None:
    x = torch.empty(2, 4, 8, 8, device="meta", dtype=torch.float16)
    with NoFloat64():
        scheduler = scheduler_of(solver, origin)
        scheduler.set_timesteps(5, device="meta")
        assert scheduler.timesteps.device.type == "meta"
        scheduler.set_begin_index(0)
        for t in scheduler.timesteps:
            seen = scheduler.scale_model_input(x, t)
            x = scheduler.step(seen, t, x, return_dict=False)[0]
        assert x.dtype == torch.float16
        label = torch.empty(2, device="meta", dtype=scheduler.timesteps.dtype)
        for planned in (True, False):
            s = scheduler if planned else scheduler_of(solver, origin)
            assert s.add_noise(x, x, label).device.type == "meta"
            assert s.scale_noise(x, label, x).device.type == "meta"
            assert s.get_velocity(x, x, label).device.type == "meta"
