"""What the residual says of the laws of samples: the ODE's density, and how far the ODE's law can be from the SDE's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from polyak.core import checks
from polyak.generate.ddim import DDIM
from polyak.generate.evaluate import HALF, MODEL, Model
from polyak.generate.fields import (
    POTENTIAL,
    PROCESS,
    STATE,
    STEPS,
    check_process,
    jacobian,
    scalar,
    solution,
    value,
    velocity,
)
from polyak.generate.fokker_planck_gap.residual import (
    TRACE,
    Laplacian,
    Potential,
    check_smooth,
    row_times,
    score_and_residual,
    score_fp_residual,
    spatial,
)
from polyak.generate.process import GRIDS, Process
from polyak.generate.sampling import sample

_GRID = checks.Choice(*GRIDS)
SHAPE = checks.Each(checks.Integer(1, 10**6), least=1)


@checks.arguments(
    potential=POTENTIAL, process=PROCESS, x=STATE, steps=STEPS, grid=_GRID,
    prior=checks.Function("a function x -> log density", 1) | None, **TRACE,
)  # fmt: skip
def exact_ode_logdensity(
    potential: Potential,
    process: Process,
    x: Tensor,
    steps: int = 100,
    *,
    grid: str = "logsnr",
    prior: Callable[[Tensor], Tensor] | None = None,
    laplacian: Laplacian = "exact",
    probes: int = 1,
    generator: torch.Generator | None = None,
) -> Tensor:
    """``log p(x)`` of the law that the probability-flow ODE makes at t_min with the score ``grad u``, for any u.

    Along the ODE ``d/dt (u - log p) = R``, hence ``log p(x) = u(x, t_min) - [u(x_T, t_max) - log p_T(x_T)] + int R dt``: a
    potential is the log density of its own samples as far as R vanishes and its end is the prior's.

    Args:
        potential: u, as for :func:`log_fp_residual`.
        x: (B, ...), points at t_min.
        steps, grid: of the classical Runge-Kutta method, four evaluations a step. ``grid="time"`` where lam is infinite at an end.
        prior: the log density at t_max, (B, ...) -> (B,). Default: that of the process's prior, ``prior_std * N(0, I)``.
        laplacian, probes, generator: as for :func:`log_fp_residual`; random signs are drawn once for the whole path.

    Returns:
        (B,), in nats, differentiable. :func:`polyak.generate.log_likelihood` of the same score is equal to it. The path of x in
        half precision is followed in float32.

    Raises:
        ValueError: as :func:`log_fp_residual`, and a prior that does not give one number for each row.
    """
    check_smooth("potential", potential)
    check_process(potential, process)
    kind, u = x.dtype, potential
    if kind in HALF:
        x, u = x.float(), lambda y, t: potential(y.to(kind), t.to(kind)).float()
    along = spatial(x, laplacian, probes, generator)
    times = process.check_times(process.grid(steps, grid))[::-1]

    def slope(state: Tensor, t: float) -> Tensor:
        y, at = state[:, :-1].reshape(x.shape), row_times(process, x, t)
        s, missed = score_and_residual(u, process, y, at, along)
        f, g2 = process.drift(t), process.diffusion2(t)
        return torch.cat([(f * y - g2 / 2 * s).flatten(1), missed[:, None]], 1)

    state = solution(slope, torch.cat([x.flatten(1), x.new_zeros(len(x), 1)], 1), times)
    end = state[:, :-1].reshape(x.shape)
    first, last = (scalar(u, y, row_times(process, x, t).to(x.dtype)) for y, t in ((x, times[0]), (end, times[-1])))
    if prior is None:
        std = torch.as_tensor(process.prior_std, dtype=x.dtype, device=x.device)
        reached = torch.distributions.Normal(torch.zeros_like(std), std).log_prob(end).flatten(1).sum(1)
    else:
        reached = prior(end)
        if not isinstance(reached, Tensor) or reached.shape != x.shape[:1]:
            raise ValueError(f"prior must return a tensor of shape ({len(x)},), got {checks.shown(reached)}")
    return (first - (last - reached) + state[:, -1]).to(kind)


_ROW = checks.Tensor(ndim=1)


@checks.arguments(w2=checks.scalar, times=_ROW, residual=_ROW, score_error=_ROW, lipschitz=_ROW)
class GapBound(NamedTuple):
    """What :func:`wasserstein_bound` found.

    Attributes:
        w2: the bound on W2 between the laws of the ODE's and the SDE's samples at t_min.
        times: (K,), decreasing from t_max to t_min.
        residual: (K,), ``sqrt(E |r|^2)`` over the SDE's samples at these times.
        score_error: (K,), what ``sqrt(E |grad log q - s|^2)`` can be at most, q the SDE's law.
        lipschitz: (K,), the one-sided Lipschitz constant of the ODE, run from noise to data.
    """

    w2: Tensor
    times: Tensor
    residual: Tensor
    score_error: Tensor
    lipschitz: Tensor


@checks.arguments(
    denoiser=MODEL, process=PROCESS, shape=SHAPE, n=checks.Integer(1, 10**9), steps=STEPS, grid=_GRID,
    lipschitz=checks.Function("a function t -> number", 1) | None, dtype=checks.dtype | None, device=checks.device | None,
    **TRACE,
)  # fmt: skip
def wasserstein_bound(
    denoiser: Model,
    process: Process,
    shape: Sequence[int],
    n: int = 1000,
    steps: int = 200,
    generator: torch.Generator | None = None,
    *,
    grid: str = "logsnr",
    lipschitz: Callable[[float], float] | None = None,
    laplacian: Laplacian = "exact",
    probes: int = 1,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> GapBound:
    """How far apart in W2 the laws of the ODE's and the SDE's samples can be, from the residual r of the score s.

    Let q be the law of the SDE's samples, ``e = grad log q - s``, and s a gradient. Then, t falling from T,

        |e|_t <= alpha_T/alpha_t |e|_T + int_t^T alpha_s/alpha_t |r|_s ds,      |.|_t = sqrt(E_q |.|^2),
        W2 <= int_tmin^T exp(int_tmin^t L ds) g_t^2/2 |e|_t dt,

    with L the one-sided Lipschitz constant of the reversed ODE (Groenwall's lemma on a coupling of both). The paper bounds W2
    in this manner, with a constant; here all of it is computed, by the trapezoidal rule, from n samples of the SDE.

    It is an estimate of a bound: means over n samples, and L, unless it is given, the largest over these samples. It is
    near to the gap where data contract; where modes part, L is large and it says little. Of a score that is no gradient it
    holds up to the part that is none.

    Args:
        denoiser: of the process, its score with second derivatives.
        shape: of one sample.
        n, steps, grid: samples of the SDE, steps and their spacing.
        generator: of everything random.
        lipschitz: L as a function of t, in place of the largest over the samples, which takes D products with the Jacobian.
        laplacian, probes: as for :func:`score_fp_residual`. An estimated r is larger in the mean square, never smaller.
        dtype, device: of the samples.

    Returns:
        A :class:`GapBound`, without gradients.

    Raises:
        ValueError: as :func:`score_fp_residual`.
    """
    check_process(denoiser, process)
    times = process.check_times(process.grid(steps, grid))
    start = process.prior((n, *shape), generator=generator, dtype=dtype, device=device)
    found: list[tuple[Tensor, Any]] = []

    def look(x: Tensor, t: float) -> None:
        r = score_fp_residual(denoiser, process, x, t, laplacian, probes, generator)
        size = r.flatten(1).square().sum(1).mean().sqrt()
        found.append((size, size.new_tensor(lipschitz(t)) if lipschitz else _expansion(denoiser, x, t)))

    with torch.no_grad():
        look(start, times[0])
        missed = value(denoiser, start, times[0]) + start / process.prior_std**2
        sample(
            denoiser, start, process=process, solver=DDIM(eta=1.0), grid=times, generator=generator,
            callback=lambda step: look(step.x, float(step.t)),
        )  # fmt: skip
        at = torch.tensor(times, dtype=torch.float64, device=start.device).to(start.dtype)
        residual, constants = (torch.stack(list(column)) for column in zip(*found, strict=True))
        first = missed.flatten(1).square().sum(1).mean().sqrt()
        alpha, g2 = process.alpha(at), process.diffusion2(at)
        error = (alpha[0] * first + _integral(alpha * residual, at)) / alpha
        grown = _integral(constants, at)
        # From t down to t_min: all of it less what is above t.
        total = _integral((grown[-1] - grown).exp() * g2 / 2 * error, at)[-1]
    return GapBound(total, at, residual, error, constants)


def _expansion(denoiser: Model, x: Tensor, t: float) -> Tensor:
    _, J = jacobian(lambda y: -velocity(denoiser, y, t), x)
    J = J.float() if x.dtype in HALF else J
    return torch.linalg.eigvalsh((J + J.mT) / 2).max().to(x.dtype)


def _integral(values: Tensor, times: Tensor) -> Tensor:
    """The running integral over decreasing times, by the trapezoidal rule, (K,); it grows from 0."""
    parts = (values[1:] + values[:-1]) / 2 * (times[:-1] - times[1:])
    return torch.cat([values.new_zeros(1), parts.cumsum(0)])
