"""Where a solver cannot go by itself it is helped, and what it does at the end of its run it does there."""

from __future__ import annotations

import copy
import pickle
from itertools import pairwise
from typing import Any

import pytest
import torch
from diffusers_cases import TWO_M, both, diffusers, network, rng, saved

from polyak.generate import (
    DDIM,
    VP,
    Denoiser,
    DPMSolver,
    DPMSolverFast,
    DPMSolverMultistep,
    DPMSolverSDE,
    Flow,
    Process,
    Query,
    Solver,
    Step,
    TrigFlow,
    sample,
)
from polyak.generate.adapters.diffusers import PolyakScheduler, as_diffusers
from polyak.generate.adapters.diffusers.runs import FIRST_ORDER, Ground, compose
from polyak.generate.process import Moment

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:diffusers")
NOISE_FORM = [
    DPMSolverFast(),
    DPMSolverMultistep(3),
    DPMSolverMultistep(2, "eps"),
    DPMSolverMultistep(3, "eps", denoise_to_zero=True),
    DPMSolverSDE(3),
]


# --- ends


@pytest.mark.parametrize("solver", NOISE_FORM, ids=repr)
@pytest.mark.parametrize("n", [1, 2, 3, 4, 7])
def test_every_solver_takes_flows_with_any_number_of_steps(solver: Solver, n: int) -> None:
    configs = [diffusers.FlowMatchEulerDiscreteScheduler(), diffusers.IPNDMScheduler()]
    schedulers = [PolyakScheduler.from_config(saved(c), solver=solver) for c in configs]
    schedulers += [as_diffusers(solver, process, "flow") for process in (Flow(), TrigFlow())]
    for scheduler in schedulers:
        sigmas = {} if scheduler.config["process"] is None else {"timesteps": [1 - i / n for i in range(n)]}
        scheduler.set_timesteps(**(sigmas or {"num_inference_steps": n}))
        assert len(scheduler.timesteps) == n
        x = torch.ones(1, 1, dtype=torch.float64)
        for t in scheduler.timesteps:
            at = scheduler._driven.t if scheduler._driven else scheduler._times[0]
            data, noise = 0.5, (x - 0.5 * scheduler.process.alpha(at)) / scheduler.process.sigma(at)
            said = scheduler.process.dalpha(at) * data + scheduler.process.dsigma(at) * noise
            turned = 2 / torch.pi if scheduler.config["origin"] == "IPNDMScheduler" else 1.0  # it says v
            x = scheduler.step(said * turned, t, x, generator=rng()).prev_sample
        assert x.item() == pytest.approx(0.5, abs=1e-6)


class Fussy(Solver):
    """Cannot begin without a signal, and takes no step over t = 0.5."""

    def run(self, x: Any, times: Any, process: Any, *, generator: Any = None) -> Any:
        if times[0] == 1:
            raise ValueError("no signal at t=1")
        for i, (s, t) in enumerate(pairwise(times)):
            if s >= 0.5 >= t:
                raise ValueError("t=0.5 is left out")
            p = yield Query(x, s)
            x = p.x + (t - s) * p.flow
            yield Step(x, s, t, i, i == len(times) - 2)
        return x


def test_a_refusal_names_what_cannot_be_helped() -> None:
    ground = Ground(Flow(), "flow")
    with pytest.raises(ValueError, match=r"t=0\.5 is left out"):
        compose(Fussy(), [1.0, 0.9, 0.8, 0.7, 0.6, 0.3, 0.1], ground)
    with pytest.raises(ValueError, match=r"t=0\.5 is left out"):
        compose(Fussy(), [0.9, 0.8, 0.7, 0.6, 0.55, 0.3, 0.1], ground)
    assert [leg.solver for leg in compose(Fussy(), [1.0, 0.4, 0.2, 0.1], ground)] == [FIRST_ORDER, Fussy()]


@pytest.mark.parametrize("solver", [*NOISE_FORM[:3], DPMSolver(), DDIM(), TWO_M], ids=repr)
def test_zero_terminal_snr_is_no_start_for_what_divides_by_the_signal(solver: Solver) -> None:
    # Data N(0.5, 0.3^2), the network exact: 2000 samples know their mean to 0.02 and their deviation to 0.005.
    theirs = diffusers.DDIMScheduler(
        rescale_betas_zero_snr=True, timestep_spacing="trailing", prediction_type="v_prediction"
    )
    scheduler = PolyakScheduler.from_config(theirs.config, solver=solver)
    scheduler.set_timesteps(30)
    x = torch.randn(2000, 1, dtype=torch.float64, generator=rng())
    for t in scheduler.timesteps:
        at = scheduler._driven.t if scheduler._driven else scheduler._asked[0]
        alpha, sigma = scheduler.process.alpha(at), scheduler.process.sigma(at)
        x0 = 0.5 + alpha * 0.09 / (alpha**2 * 0.09 + sigma**2) * (x - alpha * 0.5)
        x = scheduler.step(alpha * (x - alpha * x0) / sigma - sigma * x0, t, x).prev_sample
    assert x.mean().item() == pytest.approx(0.5, abs=0.03)
    assert x.std().item() == pytest.approx(0.3, abs=0.06)  # 30 steps of first order keep 0.25
    helped = scheduler._legs[0].solver == FIRST_ORDER
    assert helped == (solver in NOISE_FORM or solver in (DDIM(), DPMSolver()))


# --- a last level that is there twice


@pytest.mark.parametrize("n", [2, 3, 6])
def test_the_last_step_is_the_last_one_of_all(n: int) -> None:
    # The evaluation without effect is diffusers' last step: only that one is of lower order.
    solver = DPMSolverMultistep(2, "data", parity="official", lower_order_final=15)
    theirs, ours = both(
        "DPMSolverMultistepScheduler", {"use_karras_sigmas": True, "final_sigmas_type": "sigma_min"}, solver
    )
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64, generator=rng())
    for s in (theirs, ours):
        s.set_timesteps(n)
    assert ours._times[-1] == ours._times[-2]
    for first in (0, 1):  # also of a run that begins later
        results = []
        for s in (theirs, ours):
            s.set_timesteps(n)
            s.set_begin_index(first)
            y, largest = x, 0.0
            for t in s.timesteps[first:]:
                y = s.step(network(y, t), t, y, return_dict=False)[0]
                largest = max(largest, float(y.abs().max()))
            results.append(y)
        assert (results[1] - results[0]).abs().max() < 1e-5 * float(results[0].abs().max()) + 3e-7 * largest


@pytest.mark.parametrize("name", ["EDMEulerScheduler", "EDMDPMSolverMultistepScheduler"])
def test_one_step_of_edm_ends_where_diffusers_ends_it(name: str) -> None:
    theirs, ours = both(name, {"final_sigmas_type": "sigma_min"}, TWO_M)
    for n in (1, 2, 5):
        for s in (theirs, ours):
            s.set_timesteps(n)
        assert torch.allclose(ours.sigmas, theirs.sigmas, rtol=1e-6), n


# --- copies


@pytest.mark.parametrize("way", [copy.deepcopy, lambda s: pickle.loads(pickle.dumps(s))], ids=["deepcopy", "pickle"])
def test_a_copy_of_a_plan_keeps_what_makes_it_fast(way: Any) -> None:
    scheduler = PolyakScheduler(solver=TWO_M)
    scheduler.set_timesteps(5)
    x = torch.ones(1, 1)
    x = scheduler.step(x, scheduler.timesteps[0], x).prev_sample
    copied = way(scheduler)
    copied_at_once = way(copied)
    for s in (copied, copied_at_once):
        assert s._driven is not None
        for leg in (*s._legs, *s._driven.legs):
            assert leg.ground.process is s.process
            assert leg.stages is not None
            assert all(isinstance(stage.t, Moment) and stage.t.of.path is s.process for stage in leg.stages)


def test_a_run_of_first_order_begins_later_in_copies_too() -> None:
    scheduler = copy.deepcopy(PolyakScheduler(solver=DPMSolverFast()))
    scheduler.set_timesteps(7)
    copied = pickle.loads(pickle.dumps(scheduler))
    for s in (scheduler, copied):
        s.set_begin_index(6)  # the first-order step at the end
        x = torch.ones(1, 1)
        s.step(x, s.timesteps[6], x)
    assert isinstance(scheduler.process, Process)
    denoised = sample(Denoiser(lambda x, t: 0 * x, VP()), x, solver=DDIM(), steps=1)
    assert denoised.shape == x.shape
