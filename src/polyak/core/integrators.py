"""Integrators of ``dx/dt = f(x, t)`` and related equations, each with its order, cost and formula.

All take one step, but :func:`dopri5`, which finds its own.

``x`` is a tensor of any shape; ``t`` and ``dt`` are numbers or tensors that broadcast with it; ``dt`` may be negative.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch

from polyak.core import checks

Field = Callable[[torch.Tensor, Any], torch.Tensor]  # f(x, t)
_FIELD, _TIME, _ROW = checks.Function("a function of x and t", 2), checks.Operand(checks.real), checks.Each(checks.real)
_STATE = checks.Tensor(inexact=True)
_STEP = dict(f=_FIELD, x=_STATE, t=_TIME, dt=_TIME)


@checks.arguments(nodes=_ROW, matrix=checks.Each(_ROW), weights=_ROW)
class Tableau(NamedTuple):
    """An explicit Runge-Kutta method: ``k_i = f(x + dt sum_j a_ij k_j, t + c_i dt)``, ``x + dt sum_i b_i k_i``.

    nodes: c, the first of them 0. matrix: a, one row for each further stage. weights: b.
    """

    nodes: tuple[float, ...]
    matrix: tuple[tuple[float, ...], ...]
    weights: tuple[float, ...]


EULER = Tableau((0.0,), (), (1.0,))
HEUN = Tableau((0.0, 1.0), ((1.0,),), (0.5, 0.5))
MIDPOINT = Tableau((0.0, 0.5), ((0.5,),), (0.0, 1.0))
RK4 = Tableau((0.0, 0.5, 0.5, 1.0), ((0.5,), (0.0, 0.5), (0.0, 0.0, 1.0)), (1 / 6, 1 / 3, 1 / 3, 1 / 6))
DOPRI5 = Tableau(
    (0.0, 1 / 5, 3 / 10, 4 / 5, 8 / 9, 1.0),
    (
        (1 / 5,),
        (3 / 40, 9 / 40),
        (44 / 45, -56 / 15, 32 / 9),
        (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
        (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
    ),
    (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
)
# Less those of the embedded method of order 4; the last is of the slope at the step's end.
_ERROR = (-71 / 57600, 0.0, 71 / 16695, -71 / 1920, 17253 / 339200, -22 / 525, 1 / 40)
# Between the ends: the weight of slope i at the fraction u is the sum over j of its row's entry j times u^(j+1) (Shampine, 1986).
_BETWEEN = (
    (1.0, -8048581381 / 2820520608, 8663915743 / 2820520608, -12715105075 / 11282082432),
    (0.0, 0.0, 0.0, 0.0),
    (0.0, 131558114200 / 32700410799, -68118460800 / 10900136933, 87487479700 / 32700410799),
    (0.0, -1754552775 / 470086768, 14199869525 / 1410260304, -10690763975 / 1880347072),
    (0.0, 127303824393 / 49829197408, -318862633887 / 49829197408, 701980252875 / 199316789632),
    (0.0, -282668133 / 205662961, 2019193451 / 616988883, -1453857185 / 822651844),
    (0.0, 40617522 / 29380423, -110615467 / 29380423, 69997945 / 29380423),
)


@checks.arguments(tableau=checks.Instance(Tableau, words="a Tableau"), **_STEP)
def runge_kutta(tableau: Tableau, f: Field, x: torch.Tensor, t: Any, dt: Any) -> torch.Tensor:
    """One step of an explicit Runge-Kutta method; as many evaluations as it has nodes."""
    _check_times(x, t=t, dt=dt)
    slopes = [f(x, t)]
    for c, row in zip(tableau.nodes[1:], tableau.matrix, strict=True):
        slopes.append(f(_moved(x, dt, row, slopes), t + c * dt))
    return _moved(x, dt, tableau.weights, slopes)


def _check_times(x: torch.Tensor, **times: Any) -> None:
    for name, time in times.items():
        if isinstance(time, torch.Tensor) and time.ndim:
            fits = time.ndim <= x.ndim and all(
                a in (1, b) for a, b in zip(time.shape[::-1], x.shape[::-1], strict=False)
            )
            if not fits:
                raise ValueError(f"{name} must broadcast with x, {tuple(x.shape)}, got {tuple(time.shape)}")


def _moved(x: torch.Tensor, dt: Any, weights: tuple[float, ...], slopes: list[torch.Tensor]) -> torch.Tensor:
    for w, slope in zip(weights, slopes, strict=True):
        if w:
            x = x + dt * w * slope
    return x


@checks.arguments(**_STEP)
def euler(f: Field, x: torch.Tensor, t: Any, dt: Any) -> torch.Tensor:
    """Order 1, one evaluation: ``x + dt f(x, t)``."""
    return runge_kutta(EULER, f, x, t, dt)


@checks.arguments(**_STEP)
def heun(f: Field, x: torch.Tensor, t: Any, dt: Any) -> torch.Tensor:
    """Order 2, two evaluations: the trapezoidal rule with an Euler predictor."""
    return runge_kutta(HEUN, f, x, t, dt)


@checks.arguments(**_STEP)
def midpoint(f: Field, x: torch.Tensor, t: Any, dt: Any) -> torch.Tensor:
    """Order 2, two evaluations: the slope at an Euler half step."""
    return runge_kutta(MIDPOINT, f, x, t, dt)


@checks.arguments(**_STEP)
def rk4(f: Field, x: torch.Tensor, t: Any, dt: Any) -> torch.Tensor:
    """Order 4, four evaluations: the classical method of Kutta (1901)."""
    return runge_kutta(RK4, f, x, t, dt)


@checks.arguments(
    f=_FIELD, x=checks.floating, times=checks.Numbers(2), rtol=checks.positive, atol=checks.positive,
    max_steps=checks.Integer(1, 10**9),
)  # fmt: skip
def dopri5(
    f: Field,
    x: torch.Tensor,
    times: Sequence[float] | torch.Tensor,
    *,
    rtol: float = 1e-4,
    atol: float = 1e-4,
    max_steps: int = 10_000,
) -> torch.Tensor:
    """Order 5 with steps that the error decides (Dormand and Prince, 1980): six evaluations a step, two at the start.

    Of every step the error, estimated by a method of order 4, is at most ``atol + rtol |x|`` in each element. A time within a
    step costs no evaluation: there a polynomial of degree 4 is taken.

    Args:
        f: given t as a float.
        x: the state at the first time.
        times: increasing, or decreasing.
        rtol: at least 100 times the rounding of x's type.

    Returns:
        The states at all times, shape (len(times), *x.shape); the first is x.

    Raises:
        RuntimeError: no progress, or ``max_steps`` are not enough; it says at which time.
    """
    knots = [float(t) for t in times]
    end, towards = knots[-1], math.copysign(1.0, knots[-1] - knots[0])
    if any((b - a) * towards <= 0 for a, b in pairwise(knots)):
        raise ValueError(f"times must increase, or decrease, got {checks.shown(knots)}")
    if rtol < 100 * torch.finfo(x.dtype).eps:
        least = f"{100 * torch.finfo(x.dtype).eps:.1e}"
        raise ValueError(f"rtol must be at least {least} in {x.dtype}, which cannot hold more, got {rtol:g}")
    if not bool(x.isfinite().all()):
        raise ValueError(f"x must be finite, got {checks.shown(x)}")
    states, t = [x], knots[0]
    if not x.numel():
        return torch.stack(states * len(knots))
    slope = f(x, t)
    h, tried = _first_step(f, x, t, slope, abs(end - t), towards, rtol, atol), 0
    smallest = 1e-14 * max(map(abs, knots))
    while len(states) < len(knots):
        if tried == max_steps or not h > smallest:
            why = (
                f"max_steps={max_steps} are spent" if tried == max_steps else "no progress: stiff there, or not finite"
            )
            raise RuntimeError(f"dopri5 is at t={t:.6g} of {end:g}: {why}")
        h = min(h, abs(end - t))
        then = end if h == abs(end - t) else t + towards * h
        dt = then - t
        slopes = [slope]
        for c, row in zip(DOPRI5.nodes[1:], DOPRI5.matrix, strict=True):
            slopes.append(f(_moved(x, dt, row, slopes), t + c * dt))
        new = _moved(x, dt, DOPRI5.weights, slopes)
        slopes.append(f(new, then))
        error = _moved(torch.zeros_like(x), dt, _ERROR, slopes)
        ratio = (error.abs() / (atol + rtol * torch.maximum(x.abs(), new.abs()))).max().item()
        tried += 1
        if ratio <= 1:
            while len(states) < len(knots) and (knots[len(states)] - then) * towards <= 0:
                knot = knots[len(states)]
                states.append(new if knot == then else _between(x, dt, slopes, (knot - t) / dt))
            x, t, slope = new, then, slopes[-1]
        # A factor of NaN, of a state that is not finite, is the smallest.
        h = abs(dt) * (min(10.0, max(0.2, 0.9 * max(ratio, 1e-10) ** -0.2)) if ratio < math.inf else 0.2)
    return torch.stack(states)


def _first_step(f: Field, x: Any, t: float, slope: Any, span: float, towards: float, rtol: float, atol: float) -> float:
    """Hairer, Norsett and Wanner, Solving Ordinary Differential Equations I, II.4."""

    def size(v: torch.Tensor) -> float:
        return (v.abs() / (atol + rtol * x.abs())).max().item()

    state, first = size(x), size(slope)
    h = min(span, 1e-6 if min(state, first) < 1e-5 else 0.01 * state / first)
    second = size(f(x + towards * h * slope, t + towards * h) - slope) / h
    largest = max(first, second)
    return min(span, 100 * h, (0.01 / largest) ** 0.2 if largest > 1e-15 else max(1e-6, 1e-3 * h))


def _between(x: torch.Tensor, dt: float, slopes: list[torch.Tensor], u: float) -> torch.Tensor:
    return _moved(x, dt, tuple(sum(w * u ** (j + 1) for j, w in enumerate(row)) for row in _BETWEEN), slopes)


@checks.arguments(acceleration=checks.Function("a function of q", 1), q=_STATE, p=_STATE, dt=_TIME)
def leapfrog(
    acceleration: Callable[[torch.Tensor], torch.Tensor], q: torch.Tensor, p: torch.Tensor, dt: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """Order 2, symplectic and time-reversible (Stoermer-Verlet, kick-drift-kick) for ``q' = p, p' = a(q)``.

    Two evaluations; a caller that keeps the last one needs one a step. Returns the new ``(q, p)``.
    """
    if q.shape != p.shape:
        raise ValueError(f"q and p must have one shape, got {tuple(q.shape)} and {tuple(p.shape)}")
    _check_times(q, dt=dt)
    p = p + dt / 2 * acceleration(q)
    q = q + dt * p
    return q, p + dt / 2 * acceleration(q)


@checks.arguments(
    drift=_FIELD,
    diffusion=_FIELD,
    x=_STATE,
    t=_TIME,
    dt=_TIME,
    noise=checks.tensor | None,
    generator=checks.generator | None,
)
def euler_maruyama(
    drift: Field,
    diffusion: Field,
    x: torch.Tensor,
    t: Any,
    dt: Any,
    *,
    noise: torch.Tensor | None = None,
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    """Strong order 1/2 for ``dx = f dt + g dW`` (Ito, diagonal g): ``x + f dt + g sqrt(|dt|) z``.

    ``noise`` is z, standard normal of x's shape; drawn from ``generator`` where it is not given. A negative ``dt`` integrates
    the reverse-time equation whose drift is ``f``.
    """
    _check_times(x, t=t, dt=dt)
    if noise is not None and noise.shape != x.shape:
        raise ValueError(f"noise must have x's shape {tuple(x.shape)}, got {tuple(noise.shape)}")
    if noise is None:
        noise = torch.randn(x.shape, dtype=x.dtype, device=x.device, generator=generator)
    root = torch.as_tensor(dt, dtype=x.dtype, device=x.device).abs().sqrt()
    return x + drift(x, t) * dt + diffusion(x, t) * root * noise
