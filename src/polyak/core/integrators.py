"""One-step integrators of ``dx/dt = f(x, t)`` and related equations, each with its order, cost and formula.

``x`` is a tensor of any shape; ``t`` and ``dt`` are numbers or tensors that broadcast with it; ``dt`` may be negative.
"""

from __future__ import annotations

from collections.abc import Callable
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
