"""diffusers' own tests of schedulers (tests/schedulers of its repository), in our words, against PolyakScheduler.

Their numbers are those that diffusers publishes for its schedulers; here the solver of ours that is the same method must give
them. What does not apply is listed, with reasons, in docs/diffusers.md.
"""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from diffusers_cases import Options, diffusers, rng, scheduler_class

from polyak.generate import DDIM, DPMSolver, Euler, Heun, Solver
from polyak.generate.adapters.diffusers import PolyakScheduler

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:diffusers", "ignore::FutureWarning")
TWO_M = DPMSolver(order=2, form="data", method="multistep", lower_order_final=False)
# Every kind of plan, with the solver that the scheduler is.
KINDS: dict[str, tuple[Solver, Options]] = {
    "DDIMScheduler": (DDIM(), {}),
    "DDPMScheduler": (DDIM(1.0), {}),
    "DPMSolverMultistepScheduler": (TWO_M, {}),
    "DPMSolverSinglestepScheduler": (DPMSolver(order=2, form="data"), {}),
    "UniPCMultistepScheduler": (TWO_M, {}),
    "EulerDiscreteScheduler": (Euler(), {"num_train_timesteps": 1100}),
    "HeunDiscreteScheduler": (Heun(), {"beta_start": 0.0001, "beta_end": 0.02}),
    "EDMEulerScheduler": (Euler(), {}),
    "FlowMatchEulerDiscreteScheduler": (Euler(), {"shift": 3.0}),
}
every_kind = pytest.mark.parametrize("name", KINDS)
CHAINS = [n for n in KINDS if not n.startswith(("EDM", "Flow"))]


def made(name: str, **options: Any) -> PolyakScheduler:
    solver, own = KINDS[name]
    theirs = scheduler_class(name)(**{**own, **options})
    return PolyakScheduler.from_config(theirs.config, solver=solver, origin=name)


def ramp(flipped: bool = False) -> torch.Tensor:
    """Their deterministic sample, and noise: 4 images of 3 channels, 8 by 8, with the batch as the last index."""
    values = torch.arange(4 * 3 * 8 * 8)
    return ((values.flip(-1) if flipped else values).reshape(3, 8, 8, 4) / values.numel()).permute(3, 0, 1, 2)


def model(x: torch.Tensor, t: Any) -> torch.Tensor:
    """Their network."""
    t = torch.as_tensor(t).reshape(-1, 1, 1, 1).to(x.dtype)
    return x * t / (t + 1)


def loop(scheduler: PolyakScheduler, n: int, x: torch.Tensor, start: int = 0, rescaled: bool = False) -> torch.Tensor:
    """Their full loop; some of their tests hand on the scaled sample."""
    generator = torch.manual_seed(0)
    if not scheduler._times:
        scheduler.set_timesteps(n)
    for t in scheduler.timesteps[start:]:
        scaled = scheduler.scale_model_input(x, t)
        x = scheduler.step(model(scaled, t), t, scaled if rescaled else x, generator=generator).prev_sample
    return x


def total(x: torch.Tensor) -> float:
    return float(x.abs().sum())


# --- published sums


@pytest.mark.parametrize(
    ("options", "want"),
    [
        ({}, 172.0067),
        ({"prediction_type": "v_prediction"}, 52.5302),
        ({"set_alpha_to_one": True, "beta_start": 0.01}, 149.8295),
        ({"set_alpha_to_one": False, "beta_start": 0.01}, 149.0784),
    ],
)
def test_ddim(options: Options, want: float) -> None:
    assert total(loop(made("DDIMScheduler", **options), 10, ramp())) == pytest.approx(want, abs=1e-2)


def test_ddim_from_noise() -> None:
    scheduler = made("DDIMScheduler")
    scheduler.set_timesteps(10)
    start = 8 * scheduler.order
    x = scheduler.add_noise(ramp(), ramp(flipped=True), scheduler.timesteps[start : start + 1])
    assert total(loop(scheduler, 10, x, start)) == pytest.approx(354.5418, abs=1e-2)


@pytest.mark.parametrize(
    ("options", "want"),
    [
        ({}, 0.3301),
        ({"prediction_type": "v_prediction"}, 0.2251),
        ({"thresholding": True, "dynamic_thresholding_ratio": 0.87, "sample_max_value": 0.5}, 1.1364),
    ],
)
def test_dpm_solver_multistep(options: Options, want: float) -> None:
    x = loop(made("DPMSolverMultistepScheduler", final_sigmas_type="sigma_min", **options), 10, ramp())
    assert float(x.abs().mean()) == pytest.approx(want, abs=1e-3)


@pytest.mark.parametrize(("options", "want"), [({}, 0.2791), ({"prediction_type": "v_prediction"}, 0.1453)])
def test_dpm_solver_singlestep(options: Options, want: float) -> None:
    x = loop(made("DPMSolverSinglestepScheduler", final_sigmas_type="sigma_min", **options), 10, ramp())
    assert float(x.abs().mean()) == pytest.approx(want, abs=1e-3)


@pytest.mark.parametrize(
    ("options", "want"),
    [({}, 10.0807), ({"prediction_type": "v_prediction"}, 0.0002), ({"use_karras_sigmas": True}, 124.52299)],
)
def test_euler(options: Options, want: float) -> None:
    scheduler = made("EulerDiscreteScheduler", **options)
    scheduler.set_timesteps(10)
    x = loop(scheduler, 10, ramp() * scheduler.init_noise_sigma, rescaled=True)
    assert total(x) == pytest.approx(want, abs=1e-2)


def test_heun() -> None:
    scheduler = made("HeunDiscreteScheduler", num_train_timesteps=1100)
    scheduler.set_timesteps(10)
    x = loop(scheduler, 10, ramp() * scheduler.init_noise_sigma, rescaled=True)
    assert total(x) == pytest.approx(0.1233, abs=1e-2)


def test_euler_ancestral() -> None:
    theirs = diffusers.EulerAncestralDiscreteScheduler(num_train_timesteps=1100)
    scheduler = PolyakScheduler.from_config(theirs.config, solver=DDIM(1.0))
    scheduler.set_timesteps(10)
    x = loop(scheduler, 10, ramp() * scheduler.init_noise_sigma, rescaled=True)
    assert total(x) == pytest.approx(152.3192, abs=1e-2)


def test_edm() -> None:
    scheduler = made("EDMEulerScheduler", num_train_timesteps=256)
    scheduler.set_timesteps(10)
    assert total(loop(scheduler, 10, ramp() * scheduler.init_noise_sigma)) == pytest.approx(34.1855, abs=1e-3)
    theirs = diffusers.EDMDPMSolverMultistepScheduler(final_sigmas_type="sigma_min")
    scheduler = PolyakScheduler.from_config(theirs.config, solver=TWO_M)
    scheduler.set_timesteps(10)
    x = scheduler.add_noise(ramp(), ramp(flipped=True), scheduler.timesteps[5:6])
    generator = torch.manual_seed(0)
    for t in scheduler.timesteps[5:]:  # they do not scale the model's input here
        x = scheduler.step(model(x, t), t, x, generator=generator).prev_sample
    assert total(x) == pytest.approx(8.1661, abs=1e-2)


# --- configurations


@every_kind
def test_saving_and_loading_gives_the_same_step(name: str, tmp_path: Any) -> None:
    scheduler = made(name)
    scheduler.save_pretrained(tmp_path)
    again = PolyakScheduler.from_pretrained(tmp_path)
    outputs = []
    for s in (scheduler, again):
        s.set_timesteps(10)
        x = torch.rand(4, 3, 8, 8, generator=rng())
        x = s.scale_model_input(x, s.timesteps[0])
        outputs.append(s.step(0.1 * x, s.timesteps[0], x, generator=rng(1)).prev_sample)
    assert torch.equal(*outputs)
    config = {k: v for k, v in scheduler.config.items() if k != "_use_default_values"}
    assert config == {k: v for k, v in again.config.items() if k != "_use_default_values"}


@every_kind
def test_compatible_schedulers_and_back(name: str) -> None:
    scheduler = made(name)
    assert all(c is not None for c in scheduler.compatibles)
    if name.startswith(("EDM", "Flow")):
        return
    for other in scheduler.compatibles:
        if other.__name__ in ("PolyakScheduler", "DPMSolverSDEScheduler"):
            continue
        theirs = other.from_config(scheduler.config)
        again = PolyakScheduler.from_config(theirs.config, solver=scheduler.solver, origin=name)
        assert {k: again.config[k] for k in scheduler.config if k != "_use_default_values"} == {
            k: v for k, v in scheduler.config.items() if k != "_use_default_values"
        }


@pytest.mark.parametrize("name", CHAINS)
def test_trained_betas(name: str, tmp_path: Any) -> None:
    scheduler = made(name, trained_betas=np.array([0.1, 0.3]))
    scheduler.save_pretrained(tmp_path)
    assert scheduler.betas.tolist() == PolyakScheduler.from_pretrained(tmp_path).betas.tolist()
    assert scheduler.betas.tolist() == scheduler_class(name)(trained_betas=[0.1, 0.3]).betas.tolist()


@pytest.mark.parametrize("name", CHAINS)
@pytest.mark.parametrize(
    "options",
    [
        {"num_train_timesteps": 50},
        {"beta_start": 0.001, "beta_end": 0.02},
        {"beta_schedule": "scaled_linear"},
        {"beta_schedule": "squaredcos_cap_v2"},
        {"prediction_type": "v_prediction"},
        {"prediction_type": "sample"},
    ],
)
def test_over_configurations_every_sample_is_finite(name: str, options: Options) -> None:
    scheduler = made(name, **options)
    x = loop(scheduler, 10, ramp())
    assert bool(x.isfinite().all())
    assert x.shape == ramp().shape


def test_steps_offset() -> None:
    scheduler = made("DDIMScheduler", steps_offset=1)
    scheduler.set_timesteps(5)
    assert scheduler.timesteps.tolist() == [801, 601, 401, 201, 1]


@every_kind
@pytest.mark.parametrize("n", [1, 2, 3, 5, 50])
def test_numbers_of_steps(name: str, n: int) -> None:
    scheduler = made(name)
    scheduler.set_timesteps(n)
    assert scheduler.num_inference_steps == n
    assert bool(loop(scheduler, n, ramp()).isfinite().all())
    with pytest.raises(ValueError, match="num_inference_steps must be"):
        scheduler.set_timesteps(0)


# --- the interface


@every_kind
def test_the_public_interface(name: str) -> None:
    scheduler, x = made(name), torch.rand(4, 3, 8, 8)
    assert float(scheduler.init_noise_sigma) > 0
    assert scheduler.scale_model_input(x, 0.0).shape == x.shape  # before anything is planned, too
    scheduler.set_timesteps(100)
    assert scheduler.scale_model_input(x, scheduler.timesteps[0]).shape == x.shape
    t = scheduler.timesteps[5][None]
    assert scheduler.add_noise(x, torch.randn_like(x), t).shape == x.shape
    assert len(scheduler) == scheduler.config.num_train_timesteps
    assert scheduler.index_for_timestep(scheduler.timesteps[3]) in (3, 4)


@every_kind
def test_outputs_are_the_same_as_tuple_and_as_dict(name: str) -> None:
    x = torch.rand(4, 3, 8, 8, generator=rng())
    outputs = []
    for return_dict in (True, False):
        scheduler = made(name)
        scheduler.set_timesteps(10)
        t = scheduler.timesteps[0]
        outputs.append(scheduler.step(0.1 * x, t, x, generator=rng(1), return_dict=return_dict))
    as_dict, as_tuple = outputs
    for a, b in zip(as_tuple, as_dict.values(), strict=False):
        assert torch.equal(a, b)
    theirs = scheduler_class(name)()
    theirs.set_timesteps(10)
    theirs.scale_model_input(x, theirs.timesteps[0]) if hasattr(theirs, "scale_model_input") else None
    assert len(as_tuple) == len(theirs.step(0.1 * x, theirs.timesteps[0], x, return_dict=False))


@every_kind
def test_step_shapes(name: str) -> None:
    scheduler, x = made(name), torch.rand(4, 3, 8, 8)
    scheduler.set_timesteps(25)
    for t in scheduler.timesteps[5:7]:  # in the middle
        x = scheduler.step(0.1 * x, t, x).prev_sample
        assert x.shape == (4, 3, 8, 8)
    assert scheduler.step_index in (7, 8)


@every_kind
def test_half_precision_stays(name: str) -> None:
    x = loop(made(name), 10, ramp().half())
    assert x.dtype == torch.float16
    assert bool(x.isfinite().all())


@every_kind
def test_copies_are_independent(name: str) -> None:
    scheduler = made(name)
    scheduler.set_timesteps(10)
    again = copy.deepcopy(scheduler)
    x = ramp()
    assert torch.equal(loop(scheduler, 10, x), loop(again, 10, x))
    assert scheduler.step_index == again.step_index == len(scheduler.timesteps)


def test_attributes_and_configuration_entries() -> None:
    scheduler = made("DDIMScheduler")
    scheduler.dummy_attribute = 5  # type: ignore[attr-defined]
    scheduler.register_to_config(test_attribute=5)
    assert scheduler.dummy_attribute == 5  # type: ignore[attr-defined]
    with pytest.warns(FutureWarning, match="Accessing config attribute `test_attribute`"):
        assert scheduler.test_attribute == 5  # type: ignore[attr-defined]
    with pytest.raises(AttributeError, match="'PolyakScheduler' object has no attribute 'does_not_exist'"):
        scheduler.does_not_exist  # type: ignore[attr-defined]  # noqa: B018
    scheduler.set_timesteps(3)  # a note in the configuration changes nothing


def test_custom_timesteps() -> None:
    scheduler = made("DDPMScheduler")
    scheduler.set_timesteps(timesteps=[100, 87, 50, 1, 0])
    assert scheduler.timesteps.tolist() == [100, 87, 50, 1, 0]
    assert bool(loop(scheduler, 5, ramp()).isfinite().all())
    for bad, message in (
        ([100, 87, 50, 51, 0], "timesteps must decrease"),
        ([1000], "timestep 1000 is outside of those that the network knows, 0 to 999"),
    ):
        with pytest.raises(ValueError, match=message):
            scheduler.set_timesteps(timesteps=bad)
    with pytest.raises(ValueError, match="give one of num_inference_steps"):
        scheduler.set_timesteps(5, timesteps=[100, 87, 50, 1, 0])


def test_more_steps_than_timesteps_that_differ() -> None:
    scheduler = made("DPMSolverMultistepScheduler")
    scheduler.set_timesteps(scheduler.config.num_train_timesteps)
    assert len(scheduler.timesteps) == scheduler.num_inference_steps
    for threshold in (0.5, 1.0, 2.0):
        for kind in ("epsilon", "sample"):
            options = {"thresholding": True, "sample_max_value": threshold, "prediction_type": kind}
            assert bool(loop(made("DPMSolverMultistepScheduler", **options), 5, ramp()).isfinite().all())


def test_positional_and_foreign_arguments_of_step() -> None:
    scheduler, x = made("DDIMScheduler"), ramp()
    scheduler.set_timesteps(4)
    first = scheduler.step(0.1 * x, scheduler.timesteps[0], x, 0.0).prev_sample  # DDIM's fourth argument is eta
    scheduler.set_timesteps(4)
    again = scheduler.step(0.1 * x, scheduler.timesteps[0], x, s_churn=0.0, s_noise=1.0, variance_noise=None)
    assert torch.equal(again.prev_sample, first)
    for name, value in (("s_churn", 1.0), ("per_token_timesteps", torch.ones(1)), ("colour", 1)):
        with pytest.raises(ValueError, match=f"{name}=.* cannot be taken by step"):
            scheduler.step(0.1 * x, scheduler.timesteps[1], x, **{name: value})
