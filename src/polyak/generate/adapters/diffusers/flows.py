"""Noise schedules of flow matching schedulers, and of chains with ``use_flow_sigmas``."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from polyak.generate.adapters.diffusers.levels import shaped
from polyak.generate.adapters.diffusers.plan import Plan
from polyak.generate.adapters.diffusers.requests import (
    Array,
    Request,
    Schedule,
    count,
    decreasing,
    ends_at_zero,
    refuse_with_shape,
    shifted,
)


def flow_chain(plan: Plan, request: Request, zero: bool) -> Schedule:
    """``use_flow_sigmas``: a flow in the place of the chain."""
    config, n_train = plan.config, plan.train_steps
    unipc = plan.origin == "UniPCMultistepScheduler"
    dynamic = config.get("use_dynamic_shifting") and request.mu is not None
    if unipc and config.get("use_dynamic_shifting") and request.mu is None:
        raise ValueError("mu is needed: the configuration asks for dynamic shifting")
    shift = dynamic_shift(plan, request) if dynamic else config.get("flow_shift", 1.0)
    if request.timesteps is not None:
        refuse_with_shape("timesteps", plan)
        sigmas = decreasing("timesteps", request.timesteps) / n_train
    elif plan.shape is not None:
        assert plan.table is not None
        own = plan.table.sigmas
        top = own[-1].item() if config.get("sigma_max") is None else float(config["sigma_max"])
        low = own[0].item() if config.get("sigma_min") is None else float(config["sigma_min"])
        sigmas = shaped(plan.shape, count(request), top, low)
        sigmas = sigmas / (sigmas + 1)
    elif request.sigmas is not None:
        sigmas = stretched(plan, shifted(decreasing("sigmas", request.sigmas), shift))
    elif unipc:
        raw = np.linspace(1, 1 / n_train, count(request) + 1)[:-1]
        sigmas = stretched(plan, shifted(raw, shift))
    else:
        raw = 1.0 - np.linspace(1, 1 / n_train, count(request) + 1)
        sigmas = np.flip(shifted(raw, shift))[:-1].copy()
        if "shift_terminal" in plan.facts.options:
            sigmas = stretched(plan, sigmas)
    if unipc and plan.shape is None and abs(sigmas[0] - 1) < 1e-6:
        sigmas[0] -= 1e-6  # as diffusers does, which divides by alpha
    times = sigmas.astype(np.float32).astype(np.float64).tolist()
    labels = np.trunc(sigmas * n_train).tolist()
    if config.get("final_sigmas_type") == "sigma_min" and not unipc:
        assert plan.table is not None
        return Schedule([*times, min(float(plan.table.sigmas[0]), times[-1])], labels, plan.process)
    return Schedule(_ended_flow(plan, times, zero), labels, plan.process)


def _ended_flow(plan: Plan, times: list[float], zero: bool) -> list[float]:
    if ends_at_zero(plan, zero) or plan.origin is None:
        return [*times, 0.0]
    return [*times, times[-1]]


def dynamic_shift(plan: Plan, request: Request) -> float:
    """The shift that mu asks for."""
    if request.mu is None:
        raise ValueError("mu is needed: the configuration asks for dynamic shifting")
    linear = plan.config.get("time_shift_type", "exponential") == "linear"
    return float(request.mu) if linear else math.exp(request.mu)


def stretched(plan: Plan, t: Array) -> Array:
    """``shift_terminal``: the last time is moved there, all others in proportion."""
    terminal = plan.config.get("shift_terminal")
    return 1 - (1 - t) / ((1 - t[-1]) / (1 - terminal)) if terminal and t[-1] < 1 else t


def flow(plan: Plan, request: Request) -> Schedule:
    """A flow matching scheduler's; also on a flow that was given."""
    config, process, n_train = plan.config, plan.process, plan.train_steps
    dynamic = bool(config.get("use_dynamic_shifting"))
    shift = dynamic_shift(plan, request) if dynamic else config["shift"]
    told = None if request.timesteps is None else decreasing("timesteps", request.timesteps).astype(np.float32)
    if request.sigmas is not None:
        sigmas: Any = decreasing("sigmas", request.sigmas).astype(np.float32)
        if told is not None and len(told) != len(sigmas):
            raise ValueError(f"sigmas and timesteps must be of one length, got {len(sigmas)} and {len(told)}")
    elif told is not None:
        sigmas = told / np.float32(process.label_scale)
    else:
        lowest = np.float32(1) / np.float32(n_train)
        if not dynamic:
            lowest = shifted(lowest, config["shift"])  # and once more below: as diffusers does
        lowest = max(float(lowest), process.t_min)
        sigmas = np.linspace(process.t_max * n_train, lowest * n_train, count(request)) / n_train
    sigmas = stretched(plan, shifted(sigmas, shift))
    if plan.shape is not None:
        top = float(sigmas[0] if config.get("sigma_max") is None else config["sigma_max"])
        low = float(sigmas[-1] if config.get("sigma_min") is None else config["sigma_min"])
        sigmas = shaped(plan.shape, len(sigmas), top, low)
    single = np.asarray(sigmas).astype(np.float32)
    if (np.diff(single) >= 0).any() or single[0] > 1:
        raise ValueError(f"sigmas must decrease from at most 1, after all shifts they are {single.tolist()}")
    if config.get("invert_sigmas"):
        labels = (np.float32(1) - single) * np.float32(process.label_scale)
    else:
        labels = told if told is not None else single * np.float32(process.label_scale)
    times = single.astype(np.float64).tolist()
    clean = process.t_min == 0 or process.ends_clean(0.0)
    return Schedule([*times, 0.0 if clean else process.t_min], labels.astype(np.float64).tolist(), process)
