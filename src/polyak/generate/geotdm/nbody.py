"""Trajectories of N bodies: springs, charges and gravity, as in the paper's experiments."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from polyak.core import checks

KINDS = ("springs", "charged", "gravity")
_STIFFNESS, _SPEED, _LARGEST, _SOFTENING = 0.1, 0.5, 100.0, 0.1


@checks.arguments(
    kind=checks.Choice(*KINDS), n=checks.Integer(1, 10_000_000), bodies=checks.Integer(1, 10_000),
    steps=checks.Integer(2, 100_000_000), save_every=checks.Integer(1), dt=checks.positive, generator=checks.generator | None,
    initial=checks.Each(checks.Tensor(floating=True, ndim=3), count=2, words="a pair (x, v)") | None,
    edges=checks.Tensor(floating=True, ndim=3) | None, charges=checks.Tensor(floating=True, ndim=2) | None,
)  # fmt: skip
@torch.no_grad()
def simulate_nbody(
    kind: str,
    n: int,
    bodies: int = 5,
    steps: int = 5000,
    *,
    save_every: int = 100,
    dt: float = 0.001,
    generator: torch.Generator | None = None,
    initial: tuple[Tensor, Tensor] | None = None,
    edges: Tensor | None = None,
    charges: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """n trajectories of N bodies, float64, by the symplectic Euler method.

    ``v += dt F(x)``; then, for i = 1 .. steps - 1: ``x += dt v``, a frame where ``save_every`` divides i, ``v += dt F(x)``. The
    state at the start is no frame. With d = x_i - x_j the forces are

    - "springs": ``-sum_j k_ij d``, k_ij in {0, 0.1} with equal probability; x ~ N(0, 1/4);
    - "charged": ``sum_j q_i q_j d / |d|^3``, each component clipped to +-100, q = +-1; x ~ N(0, (N/5)^(2/3));
    - "gravity": ``-sum_j m_j d / (|d|^2 + 0.1^2)^(3/2)``, m = 1; x ~ N(0, 1).

    Velocities have the length 0.5 and a random direction; with gravity they are N(0, 1) less their mean.

    Args:
        kind, n, bodies, steps, save_every, dt: see above; there is no box.
        generator: of all that is drawn; the result is on its device.
        initial: positions and velocities at the start instead, each [n, N, 3].
        edges: k instead, [n, N, N]; for springs only.
        charges: q, or the masses m, instead, [n, N]; not for springs.

    Returns:
        ``(x, v, edges, charges)``: x and v [n, frames, N, 3] with (steps - 1) // save_every frames; edges [n, N, N], k, or q_i q_j,
        or 0 with gravity; charges [n, N], 0 with springs.

    Raises:
        ValueError: an unknown kind, shapes that do not fit, numbers that are not finite, or no frame.
    """
    if save_every >= steps:
        raise ValueError(f"save_every must be below steps={steps}, for a frame to be saved, got {save_every}")
    for name, given, wrong in (("edges", edges, kind != "springs"), ("charges", charges, kind == "springs")):
        if given is not None and wrong:
            raise ValueError(f"{name} must be None for kind={kind!r}, got {checks.shown(given)}")
    given = [one for one in (*(initial or ()), edges, charges) if one is not None]
    device = generator.device if generator is not None else given[0].device if given else "cpu"
    options: dict[str, Any] = dict(dtype=torch.float64, device=device)
    if initial is None:
        x, v = _start(kind, n, bodies, generator, options)
    else:
        x, v = (_given("initial", one, (n, bodies, 3), options) for one in initial)
    if kind == "springs":
        charges = torch.zeros(n, bodies, **options)
        shape = (n, bodies, bodies)
        edges = _springs(shape, generator, options) if edges is None else _given("edges", edges, shape, options)
    else:
        edges = torch.zeros(n, bodies, bodies, **options)
        if charges is not None:
            charges = _given("charges", charges, (n, bodies), options)
        elif kind == "gravity":
            charges = torch.ones(n, bodies, **options)
        else:
            charges = 2 * torch.randint(2, (n, bodies), generator=generator, **options) - 1
        if kind == "charged":
            edges = charges[:, :, None] * charges[:, None]
            edges.diagonal(0, 1, 2).zero_()
    force = _force(kind, edges, charges)
    frames = (steps - 1) // save_every
    xs, vs = (torch.empty(n, frames, bodies, 3, **options) for _ in range(2))
    v = v + dt * force(x)
    for i in range(1, frames * save_every + 1):
        x = x + dt * v
        if i % save_every == 0:
            xs[:, i // save_every - 1], vs[:, i // save_every - 1] = x, v
        v = v + dt * force(x)
    return xs, vs, edges, charges


def _start(
    kind: str, n: int, bodies: int, generator: torch.Generator | None, options: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    x, v = (torch.randn(n, bodies, 3, generator=generator, **options) for _ in range(2))
    if kind == "gravity":
        return x, v - v.mean(1, keepdim=True)
    spread = 0.5 if kind == "springs" else math.cbrt(bodies / 5)
    return spread * x, _SPEED * v / torch.linalg.vector_norm(v, dim=-1, keepdim=True)


def _springs(shape: tuple[int, ...], generator: torch.Generator | None, options: dict[str, Any]) -> Tensor:
    lower = _STIFFNESS * torch.randint(2, shape, generator=generator, **options).tril(-1)
    return lower + lower.mT


def _given(name: str, value: Tensor, shape: tuple[int, ...], options: dict[str, Any]) -> Tensor:
    if value.shape != shape or not bool(value.isfinite().all()):
        raise ValueError(f"{name} must be finite, of shape {shape}, got {checks.shown(value)}")
    return value.to(**options)


def _force(kind: str, edges: Tensor, charges: Tensor) -> Callable[[Tensor], Tensor]:
    """The force on each body, of positions [n, N, 3]."""
    if kind == "springs":
        laplacian = torch.diag_embed(edges.sum(2)) - edges
        return lambda x: -(laplacian @ x)

    def charged(x: Tensor) -> Tensor:
        d, square = _differences(x)
        inverse = torch.where(square > 0, square, math.inf).pow(-1.5)  # two at one place do not act on each other
        return ((edges * inverse)[..., None] * d).sum(2).clamp(-_LARGEST, _LARGEST)

    def gravity(x: Tensor) -> Tensor:
        d, square = _differences(x)
        return -((charges[:, None] * (square + _SOFTENING**2).pow(-1.5))[..., None] * d).sum(2)

    return charged if kind == "charged" else gravity


def _differences(x: Tensor) -> tuple[Tensor, Tensor]:
    d = x[:, :, None] - x[:, None]
    return d, d.square().sum(-1)
