"""The times of a run, and what the network is told at each, for every kind of configuration."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from polyak.core import checks
from polyak.generate.adapters.diffusers.levels import (
    Arctan,
    ChainLevels,
    distilled,
    label_of_sigma,
    shaped,
    spaced,
    spaced_apart,
)
from polyak.generate.adapters.diffusers.plan import Plan
from polyak.generate.prediction import edm_label
from polyak.generate.process import EDM, Discrete, Flow

Array = np.ndarray[Any, Any]


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
        return _flow_chain(plan, request, zero) if plan.is_flow else _chain(plan, request, zero)
    return {"levels": _levels, "edm": _edm, "flow": _flow, "trig": _trig}[family](plan, request)


def label(plan: Plan, process: Any, t: float) -> float:
    """What the network is told at a time that is not on the schedule."""
    if _told_log_sigma(plan, process):
        return edm_label(process.sigma_hat(t))  # type: ignore[return-value]
    return (1 - t) * plan.train_steps if _inverted(plan) else process.label(t)


def times_of(plan: Plan, process: Any, labels: torch.Tensor) -> torch.Tensor:
    """The inverse of :func:`label`."""
    if _told_log_sigma(plan, process):
        return process.t_of_lam(-4 * labels)
    return 1 - labels / plan.train_steps if _inverted(plan) else process.t_of_label(labels)


def _told_log_sigma(plan: Plan, process: Any) -> bool:
    """Whether the network is told ``ln(sigma) / 4``."""
    if isinstance(process, ChainLevels | Arctan):
        return _continuous(plan)
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
        labels = [math.log(s) / 4 for s in levels] if _continuous(plan) else [float(i) for i in reversed(range(n))]
        return labels, [*levels, 0.0]
    if plan.is_flow:
        raw = np.arange(n, 0, -1, dtype=np.float32) / np.float32(n)
        if plan.facts.family == "flow" and not plan.config.get("use_dynamic_shifting"):
            raw = shifted(raw, plan.config["shift"])
        return (raw * np.float32(n)).tolist(), raw.tolist()
    made = make(plan, Request(steps=n), zero=True)
    return made.labels, made.times


def shifted(t: Any, shift: float) -> Any:
    """A flow's times after its shift."""
    return shift * t / (1 + (shift - 1) * t)


def _continuous(plan: Plan) -> bool:
    return (
        plan.facts.family == "levels"
        and plan.config.get("timestep_type") == "continuous"
        and plan.config["prediction_type"] == "v_prediction"
    )


def _count(request: Request) -> int:
    return checks.integer("num_inference_steps", request.steps, least=1)


def _numbers(values: Any) -> Array:
    """A sequence, array or tensor of numbers, or a single one, as float64."""
    return np.atleast_1d(torch.as_tensor(values, device="cpu").double().numpy())


def _decreasing(name: str, values: Any) -> Array:
    given = _numbers(values)
    if given.ndim != 1 or not len(given) or not np.isfinite(given).all():
        raise ValueError(f"{name} must be a sequence of numbers, got {values!r}")
    if (np.diff(given) >= 0).any():
        raise ValueError(f"{name} must decrease, got {given.tolist()}")
    return given


def _levels_given(name: str, plan: Plan) -> None:
    if plan.shape:
        raise ValueError(f"{name} cannot be given with {plan.shape}")


# --- a process that was given


def _of_process(plan: Plan, request: Request, zero: bool) -> Schedule:
    process = plan.process
    if isinstance(process, Flow) and request.steps is not None:
        dynamic = plan.config.get("use_dynamic_shifting")
        shift = _dynamic(plan, request) if dynamic else plan.config.get("flow_shift", 1.0)
        lowest = 1 / plan.train_steps if dynamic else shifted(1 / plan.train_steps, shift)
        raw = np.linspace(process.t_max, max(lowest, process.t_min), _count(request))
        times = _ended(plan, process, shifted(raw, shift).tolist(), zero)
        return Schedule(times, [label(plan, process, t) for t in times[:-1]], process)
    if isinstance(process, Discrete) and request.sigmas is None and request.timesteps is None:
        labels = _chain_labels(plan, request)
        times = [_snapped(process, float(t)) for t in (labels + 1) / process.n]
        scale = process.label_scale / process.n
        return Schedule(_ended(plan, process, times, zero), [float(v) * scale for v in labels], process)
    if request.sigmas is not None:
        sigmas = _decreasing("sigmas", request.sigmas)
        if isinstance(process, Flow):
            times = sigmas.tolist()
        else:
            times = [process.t_of_lam(-math.log(s)) if s else 0.0 for s in sigmas.tolist()]
    else:
        given = _decreasing("timesteps", request.timesteps)
        times = times_of(plan, process, torch.from_numpy(given)).tolist()
    times = _ended(plan, process, [_snapped(process, t) for t in times], zero)
    return Schedule(times, [label(plan, process, t) for t in times[:-1]], process)


def _snapped(process: Any, t: float) -> float:
    """An end of the range, or a point of the chain, which single precision has missed by a little."""
    points = [process.t_min, process.t_max]
    if isinstance(process, Discrete):
        points.append(round(t * process.n) / process.n)
    return next((p for p in points if abs(t - p) <= 1e-6 * p), t)


def _ends_at_zero(plan: Plan, zero: bool) -> bool:
    final = plan.facts.final
    if final == "option":
        chosen = plan.config.get("final_sigmas_type")
        if chosen is None and "set_alpha_to_one" in plan.facts.options:
            return zero and plan.config.get("set_alpha_to_one", True) is not False
        return chosen == "zero" or (chosen is None and zero)
    return final == "zero" or (final == "alpha" and bool(plan.config.get("set_alpha_to_one")))


def _ended(plan: Plan, process: Any, times: list[float], zero: bool) -> list[float]:
    if process.sigma(times[-1]) == 0:
        return times
    if _ends_at_zero(plan, zero):
        return [*times, 0.0]
    repeats = plan.facts.final == "last" or (plan.origin == "UniPCMultistepScheduler" and plan.shape is not None)
    if repeats and (plan.shape is not None or plan.is_flow):
        return [*times, times[-1]]
    return [*times, min(times[-1], process.t_min)]


# --- chains


def _chain_labels(plan: Plan, request: Request) -> Array:
    config, facts, total = plan.config, plan.facts, plan.train_steps
    n, last = _count(request), total
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


def _chain(plan: Plan, request: Request, zero: bool) -> Schedule:
    process, table = plan.process, plan.table
    assert isinstance(process, Discrete)
    assert table is not None
    if request.timesteps is not None:
        _levels_given("timesteps", plan)
        labels = _decreasing("timesteps", request.timesteps)
        times = [_snapped(process, process.t_of_label(v)) for v in labels.tolist()]
    elif request.sigmas is not None:
        sigmas = _decreasing("sigmas", request.sigmas)
        times = [_snapped(process, process.t_of_lam(-math.log(s))) if s else 0.0 for s in sigmas.tolist()]
        if not times[-1]:
            sigmas = sigmas[:-1]
            labels = label_of_sigma(sigmas, table.sigmas)
            return Schedule(times, _whole(labels), process)
        labels = label_of_sigma(sigmas, table.sigmas)
    elif plan.shape is not None:
        n, own = _count(request), table.sigmas
        config = plan.config
        top = own[-1].item() if config.get("sigma_max") is None else float(config["sigma_max"])
        low = own[0].item() if config.get("sigma_min") is None else float(config["sigma_min"])
        sigmas = shaped(plan.shape, n, top, low)
        labels = label_of_sigma(sigmas, own)
        if _rounds(plan):
            labels = labels.round()
        lams = -torch.from_numpy(sigmas.astype(np.float32)).double().log()
        times = [_snapped(process, t) for t in process.t_of_lam(lams).tolist()]
        return Schedule(_ended(plan, process, times, zero), np.trunc(labels).tolist(), process)
    else:
        labels = _chain_labels(plan, request)
        times = [_snapped(process, t) for t in ((labels + 1) / process.n).tolist()]
    return Schedule(_ended(plan, process, times, zero), _whole(labels), process)


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


def _flow_chain(plan: Plan, request: Request, zero: bool) -> Schedule:
    """``use_flow_sigmas``: a flow in the place of the chain."""
    config, n_train = plan.config, plan.train_steps
    unipc = plan.origin == "UniPCMultistepScheduler"
    dynamic = config.get("use_dynamic_shifting") and request.mu is not None
    if unipc and config.get("use_dynamic_shifting") and request.mu is None:
        raise ValueError("mu is needed: the configuration asks for dynamic shifting")
    shift = _dynamic(plan, request) if dynamic else config.get("flow_shift", 1.0)
    if request.timesteps is not None:
        _levels_given("timesteps", plan)
        sigmas = _decreasing("timesteps", request.timesteps) / n_train
    elif plan.shape is not None:
        assert plan.table is not None
        own = plan.table.sigmas
        top = own[-1].item() if config.get("sigma_max") is None else float(config["sigma_max"])
        low = own[0].item() if config.get("sigma_min") is None else float(config["sigma_min"])
        sigmas = shaped(plan.shape, _count(request), top, low)
        sigmas = sigmas / (sigmas + 1)
    elif request.sigmas is not None:
        sigmas = _stretched(plan, shifted(_decreasing("sigmas", request.sigmas), shift))
    elif unipc:
        raw = np.linspace(1, 1 / n_train, _count(request) + 1)[:-1]
        sigmas = _stretched(plan, shifted(raw, shift))
    else:
        raw = 1.0 - np.linspace(1, 1 / n_train, _count(request) + 1)
        sigmas = np.flip(shifted(raw, shift))[:-1].copy()
        if "shift_terminal" in plan.facts.options:
            sigmas = _stretched(plan, sigmas)
    if unipc and plan.shape is None and abs(sigmas[0] - 1) < 1e-6:
        sigmas[0] -= 1e-6  # as diffusers does, which divides by alpha
    times = sigmas.astype(np.float32).astype(np.float64).tolist()
    labels = np.trunc(sigmas * n_train).tolist()
    if config.get("final_sigmas_type") == "sigma_min" and not unipc:
        assert plan.table is not None
        return Schedule([*times, min(float(plan.table.sigmas[0]), times[-1])], labels, plan.process)
    return Schedule(_ended_flow(plan, times, zero), labels, plan.process)


def _ended_flow(plan: Plan, times: list[float], zero: bool) -> list[float]:
    if _ends_at_zero(plan, zero) or plan.origin is None:
        return [*times, 0.0]
    return [*times, times[-1]]


def _dynamic(plan: Plan, request: Request) -> float:
    """The shift that mu asks for."""
    if request.mu is None:
        raise ValueError("mu is needed: the configuration asks for dynamic shifting")
    linear = plan.config.get("time_shift_type", "exponential") == "linear"
    return float(request.mu) if linear else math.exp(request.mu)


def _stretched(plan: Plan, t: Array) -> Array:
    """``shift_terminal``: the last time is moved there, all others in proportion."""
    terminal = plan.config.get("shift_terminal")
    return 1 - (1 - t) / ((1 - t[-1]) / (1 - terminal)) if terminal and t[-1] < 1 else t


# --- levels of a chain


def _levels(plan: Plan, request: Request) -> Schedule:
    table, config = plan.table, plan.config
    assert table is not None
    own = table.sigmas
    end = 0.0
    if config.get("final_sigmas_type") == "sigma_min" and plan.facts.final == "option":
        end = float(own[0])
    if request.sigmas is not None:
        given = _decreasing("sigmas", request.sigmas)
        if len(given) < 2:
            raise ValueError(f"sigmas must hold the end as well, so at least 2, got {given.tolist()}")
        sigmas, end = given[:-1], float(given[-1])
        labels = label_of_sigma(sigmas, own)
    else:
        if request.timesteps is not None:
            _levels_given("timesteps", plan)
            if _continuous(plan):
                raise ValueError('timesteps cannot be given with timestep_type="continuous"; give sigmas')
            labels = _decreasing("timesteps", request.timesteps).astype(np.float32)
        else:
            labels = _chain_labels(plan, request)
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
    if _continuous(plan):
        labels = np.log(levels) / 4
    process = plan.process
    assert isinstance(process, ChainLevels)
    low = levels[-1] if end == 0 else min(levels[-1], end)
    if low < process.sigma_min or levels[0] > process.sigma_max:
        process = ChainLevels(own, min(low, process.sigma_min), max(levels[0], process.sigma_max))
    end = float(np.float32(end))
    return Schedule([*levels.tolist(), min(end, levels[-1])], labels.tolist(), process)


# --- EDM


def _edm(plan: Plan, request: Request) -> Schedule:
    config = plan.config
    top, low = float(config["sigma_max"]), float(config["sigma_min"])
    shape = "use_karras_sigmas" if config["sigma_schedule"] == "karras" else "use_exponential_sigmas"
    if request.sigmas is not None:
        given = _numbers(request.sigmas)
        if (np.diff(given) > 0).all() and given[0] >= 0 and given[-1] <= 1:  # as diffusers: positions between the ends
            rho = config["rho"]
            ends = top ** (1 / rho), low ** (1 / rho)
            sigmas = (ends[0] + given * (ends[1] - ends[0])) ** rho
            if shape == "use_exponential_sigmas":
                sigmas = shaped(shape, len(given), top, low)
        else:
            sigmas = _decreasing("sigmas", given)
            if sigmas[-1] == 0:
                sigmas = sigmas[:-1]
    elif request.timesteps is not None:
        labels = _decreasing("timesteps", request.timesteps)
        found = times_of(plan, plan.process, torch.from_numpy(labels)).tolist()
        sigmas = np.array([_snapped(plan.process, t) for t in found])
    else:
        sigmas = shaped(shape, _count(request), top, low, config["rho"])
    levels = sigmas.astype(np.float32).astype(np.float64)
    process = plan.process
    assert isinstance(process, EDM)
    if levels[-1] < low or levels[0] > top:
        process = dataclasses.replace(process, sigma_min=min(low, levels[-1]), sigma_max=max(top, levels[0]))
    end = 0.0 if config["final_sigmas_type"] == "zero" else float(levels[-1])
    return Schedule([*levels.tolist(), end], [label(plan, process, t) for t in levels.tolist()], process)


# --- flows


def _flow(plan: Plan, request: Request) -> Schedule:
    config, n_train = plan.config, plan.train_steps
    dynamic = bool(config.get("use_dynamic_shifting"))
    shift = _dynamic(plan, request) if dynamic else config["shift"]
    told = None if request.timesteps is None else _decreasing("timesteps", request.timesteps).astype(np.float32)
    if request.sigmas is not None:
        sigmas: Any = _decreasing("sigmas", request.sigmas).astype(np.float32)
        if told is not None and len(told) != len(sigmas):
            raise ValueError(f"sigmas and timesteps must be of one length, got {len(sigmas)} and {len(told)}")
    elif told is not None:
        sigmas = told / np.float32(n_train)
    else:
        lowest = np.float32(1) / np.float32(n_train)
        if not dynamic:
            lowest = shifted(lowest, config["shift"])  # and once more below: as diffusers does
        sigmas = np.linspace(n_train, float(lowest) * n_train, _count(request)) / n_train
    sigmas = _stretched(plan, shifted(sigmas, shift))
    if plan.shape is not None:
        top = float(sigmas[0] if config.get("sigma_max") is None else config["sigma_max"])
        low = float(sigmas[-1] if config.get("sigma_min") is None else config["sigma_min"])
        sigmas = shaped(plan.shape, len(sigmas), top, low)
    single = np.asarray(sigmas).astype(np.float32)
    if (np.diff(single) >= 0).any() or single[0] > 1:
        raise ValueError(f"sigmas must decrease from at most 1, after all shifts they are {single.tolist()}")
    if config.get("invert_sigmas"):
        labels = (np.float32(1) - single) * np.float32(n_train)
    else:
        labels = told if told is not None else single * np.float32(n_train)
    return Schedule([*single.astype(np.float64).tolist(), 0.0], labels.astype(np.float64).tolist(), plan.process)


# --- iPNDM


def _trig(plan: Plan, request: Request) -> Schedule:
    if request.sigmas is not None:
        raise ValueError("sigmas cannot be given to iPNDM's schedule; give timesteps")
    if request.timesteps is not None:
        times = _decreasing("timesteps", request.timesteps)
    else:
        sine = np.sin(np.linspace(1, 0, _count(request) + 1)[:-1] * math.pi / 2) ** 2
        times = np.arctan2(sine, np.sqrt(1 - sine**2)) * 2 / math.pi
    times = times.clip(max=1.0).tolist()
    return Schedule([*times, 0.0], list(times), plan.process)
