"""One step of an exponential integrator of order 1 to 3 in half-logSNR time: its weights, and the step as a pure function."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from polyak.core import checks
from polyak.generate.process import Moments, Process
from polyak.generate.update import combine

Form = Literal["eps", "data"]
Kind = Literal["midpoint", "taylor"]
VIEW = {"eps": "eps", "data": "x0"}  # what a form reads of a prediction


def _z_phi(z: float, count: int) -> list[float]:
    """``[z phi_1(z), ..., z phi_count(z)]``, each to full relative precision; z may be infinite for count 1."""
    if count == 1 or abs(z) >= 1:
        values = [math.expm1(z)]
        for k in range(1, count):
            values.append(values[-1] / z - 1 / math.factorial(k))
        return values
    # These differences lose all digits for small z: the series of the last, and phi_k = z phi_(k+1) + 1 / k! downwards.
    phi = 0.0
    for coefficient in _SERIES[count]:
        phi = phi * z + coefficient
    values = [z * phi]
    for k in range(count - 1, 0, -1):
        phi = z * phi + 1 / math.factorial(k)
        values.insert(0, z * phi)
    return values


# 1 / (j + k)! from j = 19 down to 0: the terms of phi_k.
_SERIES = {k: [1 / math.factorial(j + k) for j in range(19, -1, -1)] for k in (2, 3)}


def _node_weights(z: float, r: Sequence[float], kind: Kind, parity: str | None) -> list[float]:
    """The weight of m at the start and at the nodes r, in ``x_t = A x - B sum_i w_i m_i``."""
    if not r:
        return _z_phi(z, 1)
    if len(r) == 1:
        first, second = _z_phi(z, 2)
        slope = (first / 2 if kind == "midpoint" else second) / r[0]
        return [first - slope, slope]
    first, second, third = _z_phi(z, 3)
    r1, r2 = r
    if kind == "midpoint" and r2 > 0:
        return [first - second / r2, 0.0, second / r2]
    # D1 = (r2 D10 - r1 D11) / (r2 - r1) and D2 = 2 (D11 - D10) / (r2 - r1), with D1i = (m_(i+1) - m_0) / r_(i+1).
    curvature = third if parity == "official" and r2 < 0 else 2 * third
    w1 = (r2 * second - curvature) / ((r2 - r1) * r1)
    w2 = (curvature - r1 * second) / ((r2 - r1) * r2)
    return [first - w1 - w2, w1, w2]


def _transition(
    s: tuple[float, float], t: tuple[float, float], form: Form, sde: bool
) -> tuple[float, float, float, float]:
    """(A, B, z, std) between two points (log alpha, log sigma): ``x_t = A x_s - B sum_i w_i(z) m_i + std N(0, I)``."""
    (la_s, ls_s), (la_t, ls_t) = s, t
    h = (la_t - ls_t) - (la_s - ls_s)
    if form == "eps":
        scale, std = (2.0, math.sqrt(math.expm1(2 * h))) if sde else (1.0, 0.0)
        return math.exp(la_t - la_s), scale * math.exp(ls_t), h, std * math.exp(ls_t)
    if sde:
        return math.exp(ls_t - ls_s - h), math.exp(la_t), -2 * h, math.exp(ls_t) * math.sqrt(-math.expm1(-2 * h))
    return math.exp(ls_t - ls_s), math.exp(la_t), -h, 0.0


def step_weights(
    s: tuple[float, float],
    t: tuple[float, float],
    r: Sequence[float] = (),
    *,
    form: Form = "eps",
    kind: Kind = "midpoint",
    sde: bool = False,
    parity: str | None = None,
    times: tuple[float, float] = (math.nan, math.nan),
) -> tuple[float, list[float], float]:
    """``(keep, weights, std)`` of ``x_t = keep x_s + sum_i weights_i m_i + std N(0, I)``; see :func:`dpm_step`.

    Args:
        s, t: log alpha and log sigma at both ends.
        times: the ends themselves, for messages.
    """
    keep, scale, z, std = _transition(s, t, form, sde)
    if math.isinf(z) and (form == "eps" or r):
        at = times[0] if math.isinf(s[0] - s[1]) else times[1]
        raise ValueError(
            f"lam is infinite at t={at:g}: only a first-order step in data form "
            'reaches it; use DPMSolverMultistep(form="data"), or end before it'
        )
    return keep, [-scale * w for w in _node_weights(z, r, kind, parity)], std


def ends(at: Moments, i: int) -> tuple[float, float]:
    """(log alpha, log sigma) at one of the times."""
    return at.log_alpha[i], at.log_sigma[i]


@checks.arguments(
    x=checks.floating, s=checks.real, t=checks.real, values=checks.Each(checks.floating, least=1),
    process=checks.Instance(Process, words="a Process"), r=checks.Each(checks.real), form=checks.Choice("eps", "data"),
    kind=checks.Choice("midpoint", "taylor"), sde=checks.flag, noise=checks.floating | None,
    parity=checks.Choice(None, "official"),
)  # fmt: skip
def dpm_step(
    x: Tensor,
    s: float,
    t: float,
    values: Sequence[Tensor],
    process: Process,
    *,
    r: Sequence[float] = (),
    form: Form = "eps",
    kind: Kind = "midpoint",
    sde: bool = False,
    noise: Tensor | None = None,
    parity: Literal["official"] | None = None,
) -> Tensor:
    """One update s -> t of order ``len(values)``; t may be on either side of s.

    Args:
        x: the state at s.
        s, t: times of ``process``.
        values: 1 to 3 network values of x's shape, in the dialect of ``form``: first that at s, then those at the nodes ``r``.
        r: the nodes of the further values, ``(lam - lam_s) / (lam_t - lam_s)``: positive for points within the step,
            negative for earlier steps.
        form: "eps" (DPM-Solver) or "data" (DPM-Solver++).
        kind: "taylor": the integral of the interpolating polynomial. "midpoint", the papers' default: order 2 replaces
            phi_2 by phi_1 / 2; order 3 with nodes within the step uses the farther one only.
        sde: the reverse SDE in place of the ODE (DPM-Solver++, appendix).
        noise: standard normal of x's shape for the SDE; without it the mean of the transition is returned.
        parity: "official" halves the second-difference term of multistep order 3, as the official code (and diffusers) do;
            the method is then of second order only (ours of third), though often better at 10 to 20 steps.

    Returns:
        The state at t, a new tensor of x's shape and dtype.

    Raises:
        ValueError: numbers of values and nodes that do not fit; lam infinite at s or t where only a first-order step in data
            form is defined.
    """
    if not 1 <= len(values) <= 3 or len(r) != len(values) - 1:
        raise ValueError(f"values must be 1 to 3, and r one fewer, got {len(values)} and {len(r)}")
    for name, member in (*((f"values[{i}]", v) for i, v in enumerate(values)), ("noise", noise)):
        if member is not None and member.shape != x.shape:
            raise ValueError(f"{name} must have x's shape {tuple(x.shape)}, got {tuple(member.shape)}")
    s, t = process.check_time("s", s), process.check_time("t", t)
    at = process.moments((s, t))
    keep, weights, std = step_weights(
        ends(at, 0), ends(at, 1), r, form=form, kind=kind, sde=sde, parity=parity, times=(s, t)
    )
    mean = combine((keep, x), *zip(weights, values, strict=True))
    return mean if noise is None or not std else torch.add(mean, noise, alpha=std)
