"""One-step integrators of ``dx/dt = f(x, t)`` and its kin: one step each, with order, cost and equation.

``x`` is a tensor of any shape; ``t`` and ``dt`` are numbers or tensors that broadcast with it; ``dt`` may be negative.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

Field = Callable[[torch.Tensor, Any], torch.Tensor]  # f(x, t)


def euler(f: Field, x: torch.Tensor, t: Any, dt: Any) -> torch.Tensor:
    """Order 1, one evaluation: ``x + dt f(x, t)``."""
    return x + dt * f(x, t)


def heun(f: Field, x: torch.Tensor, t: Any, dt: Any) -> torch.Tensor:
    """Order 2, two evaluations: the trapezoidal rule with an Euler predictor."""
    first = f(x, t)
    return x + dt / 2 * (first + f(x + dt * first, t + dt))


def midpoint(f: Field, x: torch.Tensor, t: Any, dt: Any) -> torch.Tensor:
    """Order 2, two evaluations: the slope at an Euler half step."""
    return x + dt * f(x + dt / 2 * f(x, t), t + dt / 2)


def rk4(f: Field, x: torch.Tensor, t: Any, dt: Any) -> torch.Tensor:
    """Order 4, four evaluations: the classical method of Kutta (1901)."""
    k1 = f(x, t)
    k2 = f(x + dt / 2 * k1, t + dt / 2)
    k3 = f(x + dt / 2 * k2, t + dt / 2)
    k4 = f(x + dt * k3, t + dt)
    return x + dt / 6 * (k1 + 2 * k2 + 2 * k3 + k4)


def leapfrog(
    acceleration: Callable[[torch.Tensor], torch.Tensor], q: torch.Tensor, p: torch.Tensor, dt: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """Order 2, symplectic and time-reversible (Stoermer-Verlet, kick-drift-kick) for ``q' = p, p' = a(q)``.

    Two evaluations; a caller that keeps the last one needs one a step. Returns the new ``(q, p)``.
    """
    p = p + dt / 2 * acceleration(q)
    q = q + dt * p
    return q, p + dt / 2 * acceleration(q)


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
    if noise is None:
        noise = torch.randn(x.shape, dtype=x.dtype, device=x.device, generator=generator)
    root = torch.as_tensor(dt, dtype=x.dtype, device=x.device).abs().sqrt()
    return x + drift(x, t) * dt + diffusion(x, t) * root * noise
