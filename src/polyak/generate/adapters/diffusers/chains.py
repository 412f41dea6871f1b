"""Noise schedules of discrete chains of betas (as DDPM's), with samples scaled or not."""

from __future__ import annotations

import math

import numpy as np
import torch

from polyak.generate.adapters.diffusers.levels import (
    ChainLevels,
    distilled,
    label_of_sigma,
    shaped,
    spaced,
    spaced_apart,
)
from polyak.generate.adapters.diffusers.plan import Plan
from polyak.generate.adapters.diffusers.requests import (
    Array,
    Request,
    Schedule,
    count,
    decreasing,
    ended,
    refuse_with_shape,
)
from polyak.generate.process import Discrete


def chain_labels(plan: Plan, request: Request) -> Array:
    config, facts, total = plan.config, plan.facts, plan.train_steps
    n, last = count(request), total
    if isinstance(plan.process, Discrete):
        total = last = plan.process.n
        if plan.given:
            last = round(plan.process.t_max * total)
    if facts.spacing == "lcm":
        original = request.original_steps or config["original_inference_steps"]
        if original is not None:
            return distilled(n, total, original, request.strength)
        return np.floor(np.linspace(total - 1, 0, n, endpoint=False))
    clip = config.get("lambda_min_clipped")
    if clip is not None and "lambda_min_clipped" in facts.options and plan.table is not None:
        last -= int((-np.log(plan.table.sigmas) < clip).sum())
    kind, offset = config.get("timestep_spacing", "linspace"), config.get("steps_offset", 0)
    if plan.origin == "DPMSolverSinglestepScheduler":
        kind, offset = "linspace", 0
    raw = (spaced_apart if facts.spacing == "dpm" else spaced)(kind, n, last, total, offset)[:n]
    if facts.spacing == "euler":
        return raw.astype(np.float32) if kind == "linspace" else raw.round()
    rounded = raw.round()
    if (np.diff(rounded) < 0).all():
        return rounded
    # More steps than integers: the process knows the times between.
    return (spaced_apart if facts.spacing == "dpm" else spaced)("linspace", n, last, total, 0)


def chain(plan: Plan, request: Request, zero: bool) -> Schedule:
    process, table = plan.process, plan.table
    assert isinstance(process, Discrete)
    assert table is not None
    if request.timesteps is not None:
        refuse_with_shape("timesteps", plan)
        labels = decreasing("timesteps", request.timesteps)
        if plan.facts.spacing == "lcm":
            labels = labels[len(labels) - min(int(len(labels) * request.strength), len(labels)) :]
        times = [process.t_of_label(v) for v in labels.tolist()]
    elif request.sigmas is not None:
        sigmas = decreasing("sigmas", request.sigmas)
        times = [process.t_of_lam(-math.log(s)) if s else 0.0 for s in sigmas.tolist()]
        if not times[-1]:
            sigmas = sigmas[:-1]
            labels = label_of_sigma(sigmas, table.sigmas)
            return Schedule(times, _whole(labels), process)
        labels = label_of_sigma(sigmas, table.sigmas)
    elif plan.shape is not None:
        n, own = count(request), table.sigmas
        config = plan.config
        top = own[-1].item() if config.get("sigma_max") is None else float(config["sigma_max"])
        low = own[0].item() if config.get("sigma_min") is None else float(config["sigma_min"])
        sigmas = shaped(plan.shape, n, top, low)
        if plan.shape == "use_lu_lambdas" and (top, low) == (own[-1].item(), own[0].item()):
            # From the table's own logarithms: where levels hardly differ, their rounding decides the timestep.
            ends = np.log(own[[-1, 0]]).tolist()
            sigmas = np.exp(ends[0] + np.linspace(0, 1, n) * (ends[1] - ends[0]))
        labels = label_of_sigma(sigmas, own)
        if _rounds(plan):
            labels = labels.round()
        lams = -torch.from_numpy(sigmas.astype(np.float32)).double().log()
        times = process.t_of_lam(lams).tolist()
        return Schedule(ended(plan, process, times, zero), np.trunc(labels).tolist(), process)
    else:
        labels = chain_labels(plan, request)
        times = ((labels + 1) / process.n).tolist()
    return Schedule(ended(plan, process, times, zero), _whole(labels), process)


def _rounds(plan: Plan) -> bool:
    """Whether the timesteps of spaced levels are rounded; else they are truncated."""
    if not plan.facts.rounds or plan.shape not in ("use_karras_sigmas", "use_lu_lambdas"):
        return False
    multistep = plan.origin in (None, "DPMSolverMultistepScheduler")
    return not (multistep and plan.config.get("beta_schedule") == "squaredcos_cap_v2")


def _whole(labels: Array) -> list[float]:
    """Integers that were missed by rounding, as integers."""
    near = labels.round()
    return np.where(np.abs(labels - near) < 1e-6, near, labels).tolist()


def continuous(plan: Plan) -> bool:
    return (
        plan.facts.family == "levels"
        and plan.config.get("timestep_type") == "continuous"
        and plan.config["prediction_type"] == "v_prediction"
    )


def levels(plan: Plan, request: Request) -> Schedule:
    table, config = plan.table, plan.config
    assert table is not None
    own = table.sigmas
    end = 0.0
    if config.get("final_sigmas_type") == "sigma_min" and plan.facts.final == "option":
        end = float(own[0])
    if request.sigmas is not None:
        given = decreasing("sigmas", request.sigmas)
        if len(given) < 2:
            raise ValueError(f"sigmas must hold the end as well, so at least 2, got {given.tolist()}")
        sigmas, end = given[:-1], float(given[-1])
        labels = label_of_sigma(sigmas, own)
    else:
        if request.timesteps is not None:
            refuse_with_shape("timesteps", plan)
            if continuous(plan):
                raise ValueError('timesteps cannot be given with timestep_type="continuous"; give sigmas')
            labels = decreasing("timesteps", request.timesteps).astype(np.float32)
        else:
            labels = chain_labels(plan, request)
        sigmas = np.interp(labels, np.arange(len(own)), own)
        if config.get("interpolation_type") == "log_linear":
            sigmas = np.exp(np.linspace(math.log(own[-1]), math.log(own[0]), len(labels) + 1))
            sigmas, end = sigmas[:-1], float(sigmas[-1])
        if plan.shape is not None:
            top, low = sigmas[0].item(), end if config.get("interpolation_type") == "log_linear" else sigmas[-1].item()
            # Two schedulers of diffusers do not read the options for these; all others do, where a configuration has them.
            blind = plan.origin in ("LMSDiscreteScheduler", "DPMSolverSDEScheduler")
            if not (blind and plan.shape == "use_karras_sigmas"):
                top = top if config.get("sigma_max") is None else float(config["sigma_max"])
                low = low if config.get("sigma_min") is None else float(config["sigma_min"])
            sigmas = shaped(plan.shape, len(labels), top, low)
            labels = label_of_sigma(sigmas, own)
            labels = labels.round() if _rounds(plan) else labels
            if config.get("interpolation_type") == "log_linear":
                end = float(own[0]) if config.get("final_sigmas_type") == "sigma_min" else 0.0
    levels = sigmas.astype(np.float32).astype(np.float64)
    if continuous(plan):
        labels = np.log(levels) / 4
    process = plan.process
    assert isinstance(process, ChainLevels)
    low = levels[-1] if end == 0 else min(levels[-1], end)
    if low < process.sigma_min or levels[0] > process.sigma_max:
        process = ChainLevels(own, min(low, process.sigma_min), max(levels[0], process.sigma_max))
    end = float(np.float32(end))
    return Schedule([*levels.tolist(), min(end, levels[-1])], labels.tolist(), process)
