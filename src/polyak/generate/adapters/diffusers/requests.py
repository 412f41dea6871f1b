"""What ``set_timesteps`` asked for, and the plan made of it: the run's times, and the network's timestep at each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from polyak.core import checks
from polyak.generate.adapters.diffusers.plan import Plan

Array = np.ndarray[Any, Any]
ROUNDING = 1e-6  # of a level in single precision, as a part of its time


@dataclass(frozen=True)
class Request:
    """What ``set_timesteps`` was asked: a number of steps, timesteps, or noise levels."""

    steps: int | None = None
    timesteps: Sequence[float] | None = None
    sigmas: Sequence[float] | None = None
    mu: float | None = None
    original_steps: int | None = None
    strength: float = 1.0


@dataclass(frozen=True)
class Schedule:
    """Times of a run.

    Attributes:
        times: one more than there are steps, decreasing; the last two may be equal (diffusers then asks in vain).
        labels: what the network is told at each time but the last.
        process: the plan's, or one of a wider range.
    """

    times: list[float]
    labels: list[float]
    process: Any


def count(request: Request) -> int:
    return checks.integer("num_inference_steps", request.steps, least=1)


def numbers(values: Any) -> Array:
    """A sequence, array or tensor of numbers, or a single one, as float64."""
    return np.atleast_1d(torch.as_tensor(values, device="cpu").double().numpy())


def decreasing(name: str, values: Any) -> Array:
    given = numbers(values)
    if given.ndim != 1 or not len(given) or not np.isfinite(given).all():
        raise ValueError(f"{name} must be a sequence of numbers, got {values!r}")
    if (np.diff(given) >= 0).any():
        raise ValueError(f"{name} must decrease, got {given.tolist()}")
    return given


def refuse_with_shape(name: str, plan: Plan) -> None:
    if plan.shape:
        raise ValueError(f"{name} cannot be given with {plan.shape}")


def ends_at_zero(plan: Plan, zero: bool) -> bool:
    final = plan.facts.final
    if final == "option":
        chosen = plan.config.get("final_sigmas_type")
        if chosen is None and "set_alpha_to_one" in plan.facts.options:
            return zero and plan.config.get("set_alpha_to_one", True) is not False
        return chosen == "zero" or (chosen is None and zero)
    return final == "zero" or (final == "alpha" and bool(plan.config.get("set_alpha_to_one")))


def ended(plan: Plan, process: Any, times: list[float], zero: bool) -> list[float]:
    if process.sigma(times[-1]) == 0:
        return times
    if ends_at_zero(plan, zero) and (process.ends_clean(0.0) or process.t_min == 0):
        return [*times, 0.0]
    repeats = plan.facts.final == "last" or (plan.origin == "UniPCMultistepScheduler" and plan.shape is not None)
    if repeats and (plan.shape is not None or plan.is_flow):
        return [*times, times[-1]]
    # Where the last level is the lowest one but for its rounding, the last evaluation is without effect.
    return [*times, times[-1] if times[-1] <= process.t_min * (1 + ROUNDING) else process.t_min]


def shifted(t: Any, shift: float) -> Any:
    """A flow's times after its shift."""
    return shift * t / (1 + (shift - 1) * t)
