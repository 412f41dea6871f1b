"""What the tests of the diffusers adapter share: configurations of every scheduler that is taken, and the pipelines' loop."""

from __future__ import annotations

import importlib
import inspect
import itertools
import sys
import types
from typing import Any

import pytest
import torch

diffusers = pytest.importorskip("diffusers")

from polyak.generate import DDIM, DPMSolver, Euler, Heun, Solver  # noqa: E402
from polyak.generate.adapters.diffusers import PolyakScheduler  # noqa: E402

Options = dict[str, Any]
TWO_M = DPMSolver(order=2, form="data", method="multistep", lower_order_final=15)


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def scheduler_class(name: str) -> Any:
    """Also of those that need torchsde, which their plans do not use."""
    modules = {
        "CosineDPMSolverMultistepScheduler": "cosine_dpmsolver_multistep",
        "DPMSolverSDEScheduler": "dpmsolver_sde",
    }
    if name not in modules:
        return getattr(diffusers.schedulers, name)
    known = "torchsde" in sys.modules
    stub = sys.modules.setdefault("torchsde", types.ModuleType("torchsde"))
    try:
        return getattr(importlib.import_module(f"diffusers.schedulers.scheduling_{modules[name]}"), name)
    finally:
        if not known and sys.modules.get("torchsde") is stub:
            del sys.modules["torchsde"]


def saved(scheduler: Any) -> Options:
    """A configuration with its class's name, as it is in a file."""
    return {**scheduler.config, "_class_name": type(scheduler).__name__}


def network(x: torch.Tensor, t: Any) -> torch.Tensor:
    """Stands for a model that was trained on labels 0 .. 999."""
    label = torch.as_tensor(t, dtype=torch.float64).reshape(-1, *[1] * (x.ndim - 1)).to(x.dtype)
    return torch.tanh(0.7 * x + 0.001 * label)


def push(
    scheduler: Any, x: torch.Tensor, model: Any = network, generator: Any = None, **own: Any
) -> tuple[torch.Tensor, float]:
    """The loop of every diffusers pipeline, from unit noise; also the largest value on the way."""
    takes = inspect.signature(scheduler.step).parameters
    noise = {"generator": generator} if "generator" in takes and generator is not None else {}
    x = x * float(getattr(scheduler, "init_noise_sigma", 1.0))
    largest = float(x.abs().max())
    for t in scheduler.timesteps:
        seen = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        x = scheduler.step(model(seen, t), t, x, return_dict=False, **noise, **own)[0]
        largest = max(largest, float(x.abs().max()))
    return x, largest


def every(*choices: list[Options]) -> list[Options]:
    """All combinations."""
    return [dict(itertools.chain(*(c.items() for c in combined))) for combined in itertools.product(*choices)]


SPACED = [
    {"timestep_spacing": "linspace"},
    {"timestep_spacing": "leading", "steps_offset": 1},
    {"timestep_spacing": "trailing"},
]
SHAPED: list[Options] = [{}, *({f"use_{shape}_sigmas": True} for shape in ("karras", "exponential", "beta"))]
ENDS = [{"final_sigmas_type": "zero"}, {"final_sigmas_type": "sigma_min"}]
FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 3.0}
ZERO_SNR = {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}
SCALED = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
VIDEO = {
    "use_karras_sigmas": True, "sigma_min": 0.002, "sigma_max": 700.0, "timestep_type": "continuous",
    "prediction_type": "v_prediction",
}  # fmt: skip
COSMOS = {
    "use_flow_sigmas": True, "use_karras_sigmas": True, "prediction_type": "flow_prediction", "sigma_min": 0.01,
    "sigma_max": 200.0,
}  # fmt: skip

# Of every scheduler: configurations whose timesteps and levels are compared.
PLANS: dict[str, list[Options]] = {
    "DDIMScheduler": every(SPACED, [{}, {"set_alpha_to_one": False}, ZERO_SNR]),
    "DDIMParallelScheduler": [{}],
    "DDPMScheduler": every(
        SPACED, [{"beta_schedule": b} for b in ("linear", "laplace", "sigmoid", "squaredcos_cap_v2")]
    ),
    "DDPMParallelScheduler": [{}],
    "PNDMScheduler": every(SPACED, [{"skip_prk_steps": True}]),
    "CogVideoXDDIMScheduler": every(SPACED, [{"clip_sample": False}]),
    "CogVideoXDPMScheduler": [{"clip_sample": False, "snr_shift_scale": 1.0, **ZERO_SNR}],
    "LCMScheduler": [{}, {"original_inference_steps": 100}],
    "TCDScheduler": [{}],
    "DPMSolverMultistepScheduler": [
        *every(SPACED, [*SHAPED, {"use_lu_lambdas": True}, {"lambda_min_clipped": -3.0}, FLOW], ENDS),
        *every(SHAPED, [{"beta_schedule": "squaredcos_cap_v2"}]),
        *every([{"use_lu_lambdas": True}], [{"beta_schedule": "squaredcos_cap_v2"}, {}], [{}, ZERO_SNR]),
        ZERO_SNR,
    ],
    "DPMSolverSinglestepScheduler": every([*SHAPED, {"lambda_min_clipped": -3.0}, FLOW], [{"lower_order_final": True}]),
    "UniPCMultistepScheduler": every(SPACED, [*SHAPED, FLOW, COSMOS, {**FLOW, "shift_terminal": 0.1}], ENDS),
    "DEISMultistepScheduler": every(SPACED, [*SHAPED, FLOW]),
    "SASolverScheduler": every(SPACED, [*SHAPED, {"lambda_min_clipped": -3.0}]),
    "EulerDiscreteScheduler": [
        *every(SPACED, [*SHAPED, {"interpolation_type": "log_linear"}, ZERO_SNR], ENDS, [SCALED]),
        *every(SPACED, [VIDEO]),
    ],
    "EulerAncestralDiscreteScheduler": SPACED,
    "HeunDiscreteScheduler": [*every(SPACED, SHAPED[:2]), *SHAPED[2:], {"beta_schedule": "exp"}],
    "LMSDiscreteScheduler": [*SPACED, *SHAPED],
    # Few: constructing one of these takes diffusers a tenth of a second.
    "KDPM2DiscreteScheduler": [SPACED[1], SHAPED[1]],
    "KDPM2AncestralDiscreteScheduler": [SHAPED[1]],
    "DPMSolverSDEScheduler": [*SPACED, *SHAPED],
    "EDMEulerScheduler": every([{}, {"sigma_schedule": "exponential"}], ENDS, [{}, {"sigma_max": 50.0, "rho": 5.0}]),
    "EDMDPMSolverMultistepScheduler": [{}, {"sigma_schedule": "exponential"}],
    "CosineDPMSolverMultistepScheduler": [{}, {"sigma_schedule": "karras"}],
    "IPNDMScheduler": [{}],
    "FlowMatchEulerDiscreteScheduler": every(
        [{}, {"shift": 3.0}], SHAPED, [{}, {"shift_terminal": 0.1}], [{}, {"invert_sigmas": True}]
    ),
    "FlowMatchHeunDiscreteScheduler": [{}, {"shift": 3.0}],
    "FlowMatchLCMScheduler": [{}, {"shift": 3.0}],
}

# The solver of ours that a scheduler is, and configurations with which whole trajectories are compared. With DDIM's
# timesteps where n does not divide their number, or "linspace", diffusers steps to other times than those it then asks at.
SAME: dict[str, tuple[Solver, list[Options]]] = {
    "DDIMScheduler": (
        DDIM(),
        [
            {"timestep_spacing": "trailing", "clip_sample": False},
            {"steps_offset": 1, "set_alpha_to_one": False, "clip_sample": False},
            {"timestep_spacing": "trailing", "clip_sample": False, **ZERO_SNR},
            {"prediction_type": "sample", "clip_sample": False},
            {"clip_sample_range": 0.8},
            {"clip_sample": False, "thresholding": True, "sample_max_value": 2.0},
        ],
    ),
    "DDPMScheduler": (
        DDIM(1.0),
        [{}, {"timestep_spacing": "linspace", "clip_sample_range": 0.8}, {"thresholding": True, "sample_max_value": 2.0}],
    ),
    "CogVideoXDDIMScheduler": (
        DDIM(),
        [{"clip_sample": False}, {"clip_sample": False, "timestep_spacing": "trailing", **ZERO_SNR}],
    ),
    "TCDScheduler": (DDIM(), [{}]),
    "DPMSolverMultistepScheduler": (
        TWO_M,
        [
            {}, SCALED, ZERO_SNR, FLOW, {"prediction_type": "sample"}, {"use_lu_lambdas": True}, *SHAPED,
            {"final_sigmas_type": "sigma_min"}, {"thresholding": True, "sample_max_value": 2.0},
        ],
    ),
    "DPMSolverSinglestepScheduler": (DPMSolver(order=2, form="data"), [{"lower_order_final": True, **o} for o in SHAPED]),
    "EulerDiscreteScheduler": (
        Euler(),
        [*every(SPACED, [{}, ZERO_SNR]), *SHAPED, VIDEO, *ENDS, {"interpolation_type": "log_linear"}],
    ),
    "EulerAncestralDiscreteScheduler": (DDIM(1.0), SPACED),
    "HeunDiscreteScheduler": (
        Heun(),
        [*SPACED, *SHAPED, {"clip_sample": True}, {"prediction_type": "v_prediction"}, {"prediction_type": "sample"}],
    ),
    "EDMEulerScheduler": (Euler(), [{}, {"prediction_type": "v_prediction"}, {"sigma_schedule": "exponential"}, *ENDS]),
    "EDMDPMSolverMultistepScheduler": (
        TWO_M,
        [{}, {"prediction_type": "v_prediction"}, {"thresholding": True, "sample_max_value": 1.5}],
    ),
    "FlowMatchEulerDiscreteScheduler": (
        Euler(),
        [{"shift": 3.0}, *SHAPED, {"shift_terminal": 0.1}, {"shift": 2.0, "invert_sigmas": True}],
    ),
    "FlowMatchHeunDiscreteScheduler": (Heun(), [{}, {"shift": 3.0}]),
}  # fmt: skip


def both(name: str, options: Options, solver: Solver) -> tuple[Any, PolyakScheduler]:
    """Theirs, and ours from its configuration."""
    theirs = scheduler_class(name)(**options)
    return theirs, PolyakScheduler.from_config(saved(theirs), solver=solver)
