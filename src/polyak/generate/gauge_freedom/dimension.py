"""The data's manifold from a denoiser: the Jacobian of the flow from noise to data, and the number of dimensions that it keeps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from polyak.core import checks
from polyak.generate.evaluate import MODEL, Model
from polyak.generate.fields import (
    PROCESS,
    STATE,
    STEPS,
    check_process,
    check_size,
    jacobian,
    solution,
    value,
    velocity,
    widened,
)
from polyak.generate.process import Process
from polyak.generate.process.path import TIMES

_START = 80.0  # the largest sigma_hat from which the flow is followed: that of EDM


@checks.arguments(denoiser=MODEL, process=PROCESS, x=STATE, times=TIMES, Y=checks.Tensor(floating=True, ndim=3) | None)
def flow_jacobian(
    denoiser: Model, process: Process, x: Tensor, times: Sequence[float] | Tensor, Y: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The probability-flow ODE from x and the Jacobian of its end: ``dx/dt = v``, ``dY/dt = J_v(x, t) Y``, ``Y = I`` at first.

    By the classical Runge-Kutta method; the result is the derivative of its steps to all digits.

    Args:
        x: (B, ...), the state at ``times[0]``.
        times: decreasing, one Runge-Kutta step between neighbours.
        Y: (B, D, D), the Jacobian so far, to go on along a path that was begun.

    Returns:
        ``(x_t, Y_t)`` at ``times[-1]``: x's shape, and (B, D, D) with ``Y[b, i, j] = d x_t[b, i] / d x[b, j]``. Differentiable.

    Raises:
        ValueError: a process whose noise is not Gaussian or that is not the denoiser's; rows of more than 4096 elements; a Jacobian
            that is not finite (naming the time).
    """
    check_process(denoiser, process)
    size, kind = check_size(x), x.dtype
    denoiser, x = widened(denoiser, x)
    if Y is None:
        Y = torch.eye(size, dtype=x.dtype, device=x.device).expand(len(x), size, size)
    elif Y.shape != (len(x), size, size):
        raise ValueError(f"Y must have shape {(len(x), size, size)}, got {tuple(Y.shape)}")

    def slope(state: Tensor, t: float) -> Tensor:
        flow, J = jacobian(lambda y: velocity(denoiser, y, t), state[:, :size].reshape(x.shape))
        turned = J @ state[:, size:].reshape(len(x), size, size)
        return torch.cat([flow.flatten(1), turned.flatten(1)], 1)

    state = torch.cat([x.flatten(1), Y.flatten(1).to(x.dtype)], 1)
    nodes, finite = process.check_times(times), list[Tensor]()
    state = solution(slope, state, nodes, lambda t, state: finite.append(state.isfinite().all()))
    seen = torch.stack(finite)
    if not bool(seen.all()):  # looked at once, since each look waits for the device
        raise ValueError(f"the Jacobian of denoiser is not finite at t={nodes[1 + seen.tolist().index(False)]:.6g}")
    state = state.to(kind)
    return state[:, :size].reshape(x.shape), state[:, size:].reshape(len(x), size, size)


@checks.arguments(k=checks.tensor, singular_values=checks.tensor, tangent=checks.tensor)
class Dimension(NamedTuple):
    """What :func:`intrinsic_dimension` found at each of B points.

    Attributes:
        k: (B,), the estimated number of dimensions of the manifold.
        singular_values: (B, D), decreasing.
        tangent: (B, D, D), an orthonormal basis in columns, tangent directions first: ``tangent[b, :, :k[b]]`` spans the estimated
            tangent space, the rest the normal one.
    """

    k: Tensor
    singular_values: Tensor
    tangent: Tensor


_LEVEL = checks.positive


@checks.arguments(
    denoiser=MODEL, process=PROCESS, x=STATE, method=checks.Choice("flow", "score"), sigma_lo=_LEVEL, sigma_hi=_LEVEL,
    sigma_start=_LEVEL | None, steps=STEPS, points=checks.Integer(1, 10**9) | None, generator=checks.generator | None,
)  # fmt: skip
def intrinsic_dimension(
    denoiser: Model,
    process: Process,
    x: Tensor,
    method: Literal["flow", "score"] = "flow",
    *,
    sigma_lo: float = 0.02,
    sigma_hi: float = 0.1,
    sigma_start: float | None = None,
    steps: int = 64,
    points: int | None = None,
    generator: torch.Generator | None = None,
) -> Dimension:
    """How many dimensions the data's manifold has at x, from a denoiser of the data.

    Levels are ``sigma_hat = sigma / alpha``, in the data's own units: ``sigma_hi`` must be small beside the manifold's curvature
    radius, and ``sigma_lo`` large beside the scatter of the data about it.

    - "flow": the flow into x, from ``sigma_start``, and its Jacobian. As sigma falls, singular values of directions along the
      manifold stay, and those across it vanish like sigma. k is the number of those with
      ``d log sv / d log sigma < 1/2`` between ``sigma_hi`` and ``sigma_lo``.
    - "score" (Stanczuk et al., arXiv 2212.12611): near the manifold the score points across it. The singular values of the
      matrix of scores at ``points`` noised copies of x (divided by ``sqrt(points)``) are large across and small along it; it is
      split where the ratio of neighbours is largest. k is at least 1 and at most D - 1.

    Args:
        x: (B, ...), data.
        sigma_hi, sigma_start, steps: of "flow". ``sigma_start`` is by default the level of t_max, at most 80; steps are of the
            classical Runge-Kutta method, from there down to ``sigma_lo``.
        sigma_lo: of "flow", and the noise of "score".
        points: of "score", at least D; default 4 D.
        generator: of the noise of "score".

    Returns:
        A :class:`Dimension`; singular values are those at ``sigma_lo``.

    Raises:
        ValueError: levels that are not in order or that the model was not trained with; too few points; scores that are not finite;
            and as :func:`flow_jacobian`.
    """
    check_process(denoiser, process)
    size = check_size(x)
    if not size:
        raise ValueError(f"x must have at least one element in a row, got shape {tuple(x.shape)}")
    kind = x.dtype
    denoiser, x = widened(denoiser, x)
    least, most = process.sigma_hat(process.t_min), process.sigma_hat(process.t_max)
    # What rounding of sigma_hat misses of an end is forgiven.
    if sigma_lo < least * (1 - 1e-6):
        raise ValueError(f"sigma_lo must be at least the model's smallest sigma, {least:g}, got {sigma_lo!r}")
    if method == "score":
        if sigma_lo > most * (1 + 1e-6):
            raise ValueError(f"sigma_lo must be at most the model's largest sigma, {most:g}, got {sigma_lo!r}")
        found = _by_score(
            denoiser, process, x, _time(process, sigma_lo), 4 * size if points is None else points, generator
        )
        return _typed(found, kind)
    start = min(most, _START) if sigma_start is None else sigma_start
    if not sigma_lo < sigma_hi < start <= most * (1 + 1e-6):
        raise ValueError(
            f"sigma_lo < sigma_hi < sigma_start must hold, and sigma_start be at most the model's largest, {most:g}, got "
            f"{sigma_lo!r}, {sigma_hi!r} and {start!r}"
        )
    return _typed(_by_flow(denoiser, process, x, (sigma_lo, sigma_hi, start), steps), kind)


def _typed(found: Dimension, kind: torch.dtype) -> Dimension:
    return Dimension(found.k, found.singular_values.to(kind), found.tangent.to(kind))


def _time(process: Process, sigma_hat: float) -> float:
    return min(max(process.t_of_lam(-math.log(sigma_hat)), process.t_min), process.t_max)


def _by_flow(denoiser: Model, process: Process, x: Tensor, levels: tuple[float, float, float], steps: int) -> Dimension:
    low, high, start = (_time(process, level) for level in levels)
    share = math.log(levels[1] / levels[0]) / math.log(levels[2] / levels[0])
    last = max(1, round(steps * share))
    pieces = [process.grid(n, start=s, end=t) for n, s, t in ((max(1, steps - last), start, high), (last, high, low))]
    upward = [*reversed(pieces[1].tolist()), *reversed(pieces[0].tolist()[:-1])]
    state = process.alpha(low) * x.flatten(1)
    state = solution(lambda y, t: velocity(denoiser, y.reshape(x.shape), t).flatten(1), state, upward)
    at, Y, logs = state.reshape(x.shape), None, list[Tensor]()
    for grid in pieces:
        at, Y = flow_jacobian(denoiser, process, at, grid, Y)
        logs.append(torch.linalg.svdvals(Y).log() - process.log_alpha(grid[-1].item()))
    slopes = (logs[0] - logs[1]) / math.log(levels[1] / levels[0])
    u, values, _ = torch.linalg.svd(Y)
    return Dimension((slopes < 0.5).sum(1), values, u)


def _by_score(
    denoiser: Model, process: Process, x: Tensor, t: float, points: int, generator: torch.Generator | None
) -> Dimension:
    size = math.prod(x.shape[1:])
    if size < 2:
        raise ValueError(f"x must have at least 2 elements in a row for method='score', got {size}")
    if points < size:
        raise ValueError(f"points must be at least {size}: need at least D perturbed points, got {points}")
    near, _ = process.perturb(x.repeat_interleave(points, 0), t, generator=generator)
    scores = value(denoiser, near, t).reshape(len(x), points, size)
    if not bool(scores.isfinite().all()):
        raise ValueError(f"the score of denoiser is not finite at t={t:.6g}")
    # Not centred: their mean, too, points across the manifold.
    _, values, v = torch.linalg.svd(scores / math.sqrt(points), full_matrices=False)
    # What rounding leaves of a zero has no ratio to another.
    seen = torch.maximum(values, values[:, :1] * points * torch.finfo(values.dtype).eps)
    large = (seen[:, :-1] / seen[:, 1:]).argmax(1) + 1
    return Dimension(size - large, values, v.mT.flip(2))
