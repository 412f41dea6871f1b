"""What a run keeps is its own: gradients in half precision, latents written in place, the signs of answers."""

from __future__ import annotations

import copy
from itertools import pairwise
from typing import Any

import pytest
import torch
from diffusers_cases import TWO_M, diffusers, rng, saved

from polyak.generate import DDIM, RK4, DPMSolver, Euler, Flow, Heun, Query, Solver, Step
from polyak.generate.adapters.diffusers import PolyakScheduler
from polyak.generate.adapters.diffusers.answers import Negated, unrounded

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:diffusers")


class Replacing(Solver):
    """Euler, by predictions that were taken apart and put together again."""

    def run(self, x: Any, times: Any, process: Any, *, generator: Any = None) -> Any:
        for i, (s, t) in enumerate(pairwise(times)):
            p = yield Query(x, s)
            x = p.x + (t - s) * p.replace(p.output).rebase(p.x).flow
            yield Step(x, s, t, i, i == len(times) - 2)
        return x


class Midpoint(Solver):
    """A coroutine of two stages, which goes back to the step's start."""

    stages = 2

    def run(self, x: Any, times: Any, process: Any, *, generator: Any = None) -> Any:
        for i, (s, t) in enumerate(pairwise(times)):
            p = yield Query(x, s)
            q = yield Query(p.x + (t - s) / 2 * p.flow, (s + t) / 2, first=False)
            x = p.x + (t - s) * q.flow
            yield Step(x, s, t, i, i == len(times) - 2)
        return x


def start() -> torch.Tensor:
    return torch.randn(2, 4, 2, 2, generator=rng())


# --- gradients


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("edited", [False, True])
def test_gradients_go_to_the_sample_that_is_given(dtype: torch.dtype, edited: bool) -> None:
    scheduler = PolyakScheduler(solver=DDIM())
    scheduler.set_timesteps(5)
    t = scheduler.timesteps
    x = start().to(dtype)
    x = scheduler.step(0.3 * x, t[0], x).prev_sample.detach()
    if edited:
        x[:, :2] = 0.5
    x.requires_grad_()
    s, to = scheduler._times[1:3]
    process = scheduler.process
    (got,) = torch.autograd.grad(scheduler.step((0.3 * x).detach(), t[1], x).prev_sample.sum(), x)
    assert torch.allclose(got, torch.full_like(x, process.alpha(to) / process.alpha(s)))


def test_gradients_through_a_whole_run_are_those_of_single_precision() -> None:
    def gradient(dtype: torch.dtype) -> torch.Tensor:
        scheduler = PolyakScheduler(solver=TWO_M, final_sigmas_type="sigma_min")
        scheduler.set_timesteps(4)
        first = x = start().to(dtype).requires_grad_()
        for t in scheduler.timesteps:
            x = scheduler.step(0.3 * x, t, x).prev_sample
        return torch.autograd.grad(x.float().sum(), first)[0].float()

    # four steps, each rounded
    assert torch.allclose(gradient(torch.bfloat16), gradient(torch.float32), rtol=8 * 2**-8)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_no_graph_lives_on_after_detaching(dtype: torch.dtype) -> None:
    scheduler = PolyakScheduler(solver=DDIM())
    scheduler.set_timesteps(5)
    t, x = scheduler.timesteps, start().to(dtype)
    weight = torch.tensor(1.0, requires_grad=True)
    x = scheduler.step(weight * x, t[0], x).prev_sample
    assert x.requires_grad
    x = x.detach()
    assert not scheduler.step(0.3 * x, t[1], x).prev_sample.requires_grad
    assert (scheduler._exact is None) == (dtype == torch.float32)


@pytest.mark.parametrize("solver", [TWO_M, Heun(), Midpoint()], ids=repr)
def test_a_run_with_a_graph_can_be_copied(solver: Solver) -> None:
    scheduler = PolyakScheduler(solver=solver)
    scheduler.set_timesteps(4)
    x = start()
    weight = torch.tensor(0.3, requires_grad=True)
    for t in scheduler.timesteps[:3]:
        x = scheduler.step(weight * x, t, x).prev_sample
    copied, t = copy.deepcopy(scheduler), scheduler.timesteps[3]
    assert torch.equal(*(s.step(0.3 * x, t, x).prev_sample for s in (scheduler, copied)))


def test_what_was_rounded_to_infinity_is_known_exactly() -> None:
    exact = torch.tensor([[1e5, 1.0]])
    given = exact.half().requires_grad_()
    value = unrounded(given, exact)
    assert torch.equal(value, exact)
    (gradient,) = torch.autograd.grad(value[0, 1], given)
    assert gradient.tolist() == [[0.0, 1.0]]


# --- memory


@pytest.mark.parametrize("solver", [DDIM(), TWO_M, Heun(), RK4(), DPMSolver(), Midpoint()], ids=repr)
@pytest.mark.parametrize("origin", ["DPMSolverMultistepScheduler", "FlowMatchEulerDiscreteScheduler"])
def test_latents_and_outputs_may_be_written_in_place(solver: Solver, origin: str) -> None:
    scheduler = PolyakScheduler.from_config(saved(getattr(diffusers, origin)()), solver=solver)

    def run(in_place: bool) -> torch.Tensor:
        scheduler.set_timesteps(6)
        x = start()
        output = torch.empty_like(x)
        for t in scheduler.timesteps:
            said = torch.tanh(x + 0.001 * float(t))
            made = scheduler.step(output.copy_(said) if in_place else said, t, x).prev_sample
            x = x.copy_(made) if in_place else made
            if in_place:
                made.fill_(torch.nan)
                output.fill_(torch.nan)
        return x

    assert torch.equal(run(True), run(False))


# --- networks that answer the opposite


def test_an_opposite_answer_keeps_its_sign() -> None:
    x, output = start(), torch.ones(2, 4, 2, 2)
    prediction = Negated(output, x, 0.5, Flow(), "flow")
    for again in (prediction.replace(output), prediction.rebase(x), prediction.rebase(x.double())):
        assert torch.equal(again.flow, -output.to(again.x.dtype))
    assert torch.equal(prediction.replace(output, "flow").flow, output)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("EulerDiscreteScheduler", {"prediction_type": "v_prediction"}),
        ("EDMEulerScheduler", {"prediction_type": "v_prediction"}),
        ("FlowMatchEulerDiscreteScheduler", {"invert_sigmas": True}),
    ],
)
def test_solvers_that_read_outputs_themselves_hear_the_right_sign(name: str, options: dict[str, Any]) -> None:
    results = []
    for solver in (Replacing(), Euler()):
        scheduler = PolyakScheduler.from_config(saved(getattr(diffusers, name)(**options)), solver=solver)
        scheduler.set_timesteps(5)
        x = start().double()
        for t in scheduler.timesteps:
            x = scheduler.step(torch.tanh(scheduler.scale_model_input(x, t)), t, x).prev_sample
        results.append(x)
    assert torch.allclose(*results, rtol=1e-12)
