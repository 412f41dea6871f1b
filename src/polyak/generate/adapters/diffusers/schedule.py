"""The times of a run, and the timestep that the network is given at each, for every kind of configuration."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from polyak.generate.adapters.diffusers.chains import chain, chain_labels, continuous, levels
from polyak.generate.adapters.diffusers.flows import dynamic_shift, flow, flow_chain, stretched
from polyak.generate.adapters.diffusers.levels import Arctan, ChainLevels, shaped
from polyak.generate.adapters.diffusers.plan import Plan
from polyak.generate.adapters.diffusers.requests import (
    ROUNDING,
    Request,
    Schedule,
    count,
    decreasing,
    ended,
    numbers,
    shifted,
)
from polyak.generate.process import EDM, Discrete, Flow


def make(plan: Plan, request: Request, *, zero: bool) -> Schedule:
    """The schedule of a run.

    Args:
        plan: of the configuration.
        request: what was asked for.
        zero: whether the run ends on clean data where the configuration does not say.
    """
    if plan.given:
        return _of_process(plan, request, zero)
    family = plan.facts.family
    if family == "chain":
        return flow_chain(plan, request, zero) if plan.is_flow else chain(plan, request, zero)
    return {"levels": levels, "edm": _edm, "flow": flow, "trig": _trig}[family](plan, request)


def label(plan: Plan, process: Any, t: float) -> float:
    """What the network is told at a time that is not on the schedule."""
    if _told_log_sigma(plan, process):
        sigma = process.sigma_hat(t)
        return math.log(sigma) / 4 if sigma else -math.inf
    return process.label(1 - t) if _inverted(plan) else process.label(t)


def checked(plan: Plan, made: Schedule) -> list[float]:
    """The times of a run, all of them in the process's range.

    Raises:
        ValueError: a timestep that the network does not know.
    """
    process, times = made.process, []
    for t, told in itertools.zip_longest(made.times, made.labels):
        try:
            times.append(process.check_time("times", t))
        except ValueError:
            if told is None:
                raise
            ends = sorted(label(plan, process, end) for end in (process.t_min, process.t_max))
            raise ValueError(
                f"timestep {told:g} is outside of those that the network knows, {ends[0]:g} to {ends[1]:g}: lower "
                "steps_offset, or give other timesteps or sigmas"
            ) from None
    return times


def times_of(plan: Plan, process: Any, labels: torch.Tensor) -> torch.Tensor:
    """The inverse of :func:`label`."""
    if _told_log_sigma(plan, process):
        return process.t_of_lam(-4 * labels)
    return 1 - process.t_of_label(labels) if _inverted(plan) else process.t_of_label(labels)


def _told_log_sigma(plan: Plan, process: Any) -> bool:
    """Whether the network is told ``ln(sigma) / 4``."""
    if isinstance(process, ChainLevels | Arctan):
        return continuous(plan)
    return plan.kind == "edm"


def _inverted(plan: Plan) -> bool:
    return plan.facts.family == "flow" and bool(plan.config.get("invert_sigmas"))


def training(plan: Plan) -> tuple[list[float], list[float]]:
    """All timesteps and levels, as they are before a run is planned."""
    n = plan.train_steps
    if plan.given:
        return [label(plan, plan.process, t) for t in (plan.process.t_max, plan.process.t_min)], []
    if plan.table is not None and not plan.is_flow:
        n = len(plan.table.betas)
        sigmas = plan.table.sigmas.astype(np.float64).tolist()
        if plan.facts.family == "chain":
            return [float(i) for i in reversed(range(n))], sigmas
        levels = sigmas[::-1]
        labels = [math.log(s) / 4 for s in levels] if continuous(plan) else [float(i) for i in reversed(range(n))]
        return labels, [*levels, 0.0]
    if plan.is_flow:
        raw = np.arange(n, 0, -1, dtype=np.float32) / np.float32(n)
        if plan.facts.family == "flow" and not plan.config.get("use_dynamic_shifting"):
            raw = shifted(raw, plan.config["shift"])
        return (raw * np.float32(n)).tolist(), raw.tolist()
    made = make(plan, Request(steps=n), zero=True)
    return made.labels, made.times


def _of_process(plan: Plan, request: Request, zero: bool) -> Schedule:
    process = plan.process
    if isinstance(process, Flow) and plan.facts.family == "flow":
        return flow(plan, request)
    if isinstance(process, Flow) and request.timesteps is None:
        return _of_flow(plan, request, zero)
    if isinstance(process, Discrete) and request.sigmas is None and request.timesteps is None:
        labels = chain_labels(plan, request)
        times = ((labels + 1) / process.n).tolist()
        scale = process.label_scale / process.n
        return Schedule(ended(plan, process, times, zero), [float(v) * scale for v in labels], process)
    if request.sigmas is not None:
        sigmas = decreasing("sigmas", request.sigmas).tolist()
        times = [process.t_of_lam(-math.log(s)) if s else 0.0 for s in sigmas]
    else:
        given = decreasing("timesteps", request.timesteps)
        times = times_of(plan, process, torch.from_numpy(given)).tolist()
    times = ended(plan, process, times, zero)
    return Schedule(times, [label(plan, process, t) for t in times[:-1]], process)


def _of_flow(plan: Plan, request: Request, zero: bool) -> Schedule:
    process, config = plan.process, plan.config
    dynamic = config.get("use_dynamic_shifting")
    shift = dynamic_shift(plan, request) if dynamic else config.get("flow_shift", 1.0)
    if request.sigmas is not None:
        raw = decreasing("sigmas", request.sigmas)
    else:
        lowest = 1 / plan.train_steps if dynamic else shifted(1 / plan.train_steps, shift)
        raw = np.linspace(process.t_max, max(lowest, process.t_min), count(request))
    times = ended(plan, process, stretched(plan, shifted(raw, shift)).tolist(), zero)
    return Schedule(times, [label(plan, process, t) for t in times[:-1]], process)


def _edm(plan: Plan, request: Request) -> Schedule:
    config = plan.config
    top, low = float(config["sigma_max"]), float(config["sigma_min"])
    shape = "use_karras_sigmas" if config["sigma_schedule"] == "karras" else "use_exponential_sigmas"
    if request.sigmas is not None:
        given = numbers(request.sigmas)
        if (np.diff(given) > 0).all() and given[0] >= 0 and given[-1] <= 1:  # as diffusers: positions between the ends
            rho = config["rho"]
            ends = top ** (1 / rho), low ** (1 / rho)
            sigmas = (ends[0] + given * (ends[1] - ends[0])) ** rho
            if shape == "use_exponential_sigmas":
                sigmas = shaped(shape, len(given), top, low)
        else:
            sigmas = decreasing("sigmas", given)
            if sigmas[-1] == 0:
                sigmas = sigmas[:-1]
    elif request.timesteps is not None:
        labels = decreasing("timesteps", request.timesteps)
        sigmas = times_of(plan, plan.process, torch.from_numpy(labels)).numpy()
    else:
        sigmas = shaped(shape, count(request), top, low, config["rho"])
    levels = sigmas.astype(np.float32).astype(np.float64)
    process = widened(plan.process, levels.tolist())
    end = 0.0 if config["final_sigmas_type"] == "zero" else _last_level(plan, levels.tolist(), low)
    return Schedule([*levels.tolist(), end], [label(plan, process, t) for t in levels.tolist()], process)


def widened(process: Any, times: Sequence[float]) -> Any:
    """A process of levels that holds the given ones, 0 apart."""
    used = [t for t in times if t]
    if not isinstance(process, EDM) or (process.sigma_min <= used[-1] and used[0] <= process.sigma_max):
        return process
    low, high = min(process.sigma_min, used[-1]), max(process.sigma_max, used[0])
    if isinstance(process, ChainLevels):
        return ChainLevels(None, low, high, logs=process.logs)
    return dataclasses.replace(process, sigma_min=low, sigma_max=high)


def _last_level(plan: Plan, levels: list[float], low: float) -> float:
    """``final_sigmas_type="sigma_min"``: the lowest level of all, or, as EDMEulerScheduler has it, the last one again."""
    again = plan.origin == "EDMEulerScheduler" or levels[-1] <= low * (1 + ROUNDING)
    return levels[-1] if again else low


def _trig(plan: Plan, request: Request) -> Schedule:
    if request.sigmas is not None:
        raise ValueError("sigmas cannot be given to iPNDM's schedule; give timesteps")
    if request.timesteps is not None:
        times = decreasing("timesteps", request.timesteps)
    else:
        sine = np.sin(np.linspace(1, 0, count(request) + 1)[:-1] * math.pi / 2) ** 2
        times = np.arctan2(sine, np.sqrt(1 - sine**2)) * 2 / math.pi
    times = times.clip(max=1.0).tolist()
    return Schedule([*times, 0.0], list(times), plan.process)
