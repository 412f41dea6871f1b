"""What Feynman-Kac correctors promise, without chance: the equation of the weighted law, and Gaussians step by step."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from polyak.core.exact import Mixture
from polyak.generate import VE, Composed, FeynmanKacCorrector, ReverseSDE, fkc_weight
from polyak.generate.fkc.composed import ComposedPrediction
from polyak.generate.problems import ExactDenoiser

MODES, RADIUS, BETA = 6, 3.0, 3.0
WEIGHTS, VARIANCES = (0.3, 0.25, 0.2, 0.1, 0.1, 0.05), (0.05, 0.1, 0.2, 0.1, 0.3, 0.2)
PROCESS = VE(sigma_min=0.02, sigma_max=20.0)
ZETAS = (0.0, 1.0, 1.7)
# By how much rho grows along the way, and its shape b'x - x'Bx/2.
PULL, CURB = torch.tensor([0.4, -0.3], dtype=torch.float64), 0.2


def ring(turned: bool = False) -> Mixture:
    """Six modes on a circle; turned, by half a mode, with weights and variances in the opposite order."""
    angle = (torch.arange(MODES, dtype=torch.float64) + (0.5 if turned else 0.0)) * 2 * math.pi / MODES
    means = RADIUS * torch.stack([angle.cos(), angle.sin()], -1)
    weights, variances = (torch.tensor(v[::-1] if turned else v, dtype=torch.float64) for v in (WEIGHTS, VARIANCES))
    return Mixture(means, variances, weights)


def reward(x: Tensor, t: Tensor) -> Tensor:
    t = t.to(x.dtype)
    return (1 - t / 20) * (x @ PULL.to(x.dtype) - CURB * x.square().sum(1) / 2)


Target = tuple[Sequence[Any], Any]


class Shuffled(FeynmanKacCorrector):
    """Particles have each other's weights: as much is resampled, and it says nothing."""

    def _rate(self, pred: Any, *others: Any) -> tuple[Tensor, float]:
        g, level = super()._rate(pred, *others)
        return g.roll(len(g) // 2), level


def targets(process: Any) -> dict[str, Target]:
    """Experts with their powers, and a reward: of each kind one."""
    a, b = ExactDenoiser(ring(), process), ExactDenoiser(ring(turned=True), process)
    return {
        "anneal": ([(a, 3.0)], None),
        "product": ([(a, 1.0), (b, 1.0)], None),
        "guided": ([(a, -1.0), (b, 2.0)], None),
        "tilt": ([(a, 1.0)], reward),
        "all": ([(a, 1.5), (b, -0.25)], reward),
    }


def drift_in_time(process: Any) -> Target:
    """Powers that change along the way."""
    span = process.t_max
    a, b = ExactDenoiser(ring(), process), ExactDenoiser(ring(turned=True), process)
    return ([(a, lambda t: 2.0 - t / span), (b, lambda t: 0.5 * t / span)], None)


def unbalance(target: Target, process: Any, seed: int, *, weighted: bool = True, log_terms: bool = True) -> float:
    """How far the target is from solving the equation of the weighted law, relative to g's spread over the points.

    With L the target's log-density, ``d_tau L + div v + <v, grad L> - zeta^2 sigma^2/2 (lap L + |grad L|^2) - g`` must be the same
    everywhere. Derivatives in x are in closed form, that in t is a central difference of fourth order.
    """
    draw = torch.Generator().manual_seed(seed)
    experts, rho = target
    worst = 0.0
    for zeta in ZETAS:
        composed = Composed(experts, rho, process=process, zeta=zeta)
        for t in (0.3, 0.6) if process.t_max <= 1 else (0.4, 2.0):
            x = 2.5 * torch.randn(64, 2, generator=draw, dtype=torch.float64)
            found = composed(x, t)
            sigma2, f = process.diffusion2(t), process.drift(t)
            g = rate(found, sigma2, f, log_terms)
            grad, lap, lap_rho = found.composed_score, torch.zeros(64, dtype=torch.float64), 0.0
            for (model, _), beta in zip(experts, found.betas, strict=True):
                lap = lap + beta * model.law.score_divergence(x, process.alpha(t), process.sigma(t))
            divergence_S = lap
            if found.grad_rho is not None:
                # of b'x - c |x|^2 / 2 in two dimensions
                lap_rho = (1 - t / 20) * -2 * CURB
                grad, lap = grad + found.grad_rho, lap + lap_rho
            v = -f * x + (1 + zeta**2) / 2 * sigma2 * found.score
            div_v = -2 * f + (1 + zeta**2) / 2 * sigma2 * (divergence_S + composed.share * lap_rho)
            moved = -_slope(lambda s, c=composed, x=x: log_target(c, x, s), t)
            left = moved + div_v + (v * grad).sum(1) - zeta**2 * sigma2 / 2 * (lap + grad.square().sum(1))
            left = left - g if weighted else left
            worst = max(worst, (left.std() / g.std()).item())
    return worst


def rate(found: ComposedPrediction, sigma2: float, f: float, log_terms: bool = True) -> Tensor:
    x = found.x
    scores = [e.score for e in found.experts]
    own = None if found.grad_rho is None else f * x
    g = fkc_weight(found.composed_score, scores, found.betas, sigma2, own, found.grad_rho, found.drho)
    return g if found.dlog is None or not log_terms else g + found.dlog


def log_target(composed: Composed, x: Tensor, t: float) -> Tensor:
    total = torch.zeros(len(x), dtype=torch.float64)
    for (model, _), beta in zip(composed.experts, composed.betas(t), strict=True):
        total = total + beta * model.log_prob(x, t)  # type: ignore[union-attr]
    return total if composed.reward is None else total + composed.reward(x, torch.full((len(x),), t).double())


def _slope(f: Callable[[float], Tensor], t: float, h: float = 1e-3) -> Tensor:
    return (8 * (f(t + h) - f(t - h)) - (f(t + 2 * h) - f(t - 2 * h))) / (12 * h)


# -- Gaussians, whose weighted law stays Gaussian ----------------------------------------------------------------------------

NORMALS = ((1.5, 0.5), (-0.5, 2.0))  # mean and variance
# powers of the two, the mean and variance that these give, and the variance of the unweighted particles where it is known
GAUSSIANS = {
    "anneal": ((3.0,), 1.5, 1 / 6),
    "product": ((1.0, 1.0), 1.1, 0.4),
    "guided": ((2.0, -1.0), 25 / 14, 2 / 7),
}


def gaussian(name: str, steps: int, zeta: float = 1.0, *, weighted: bool = True) -> tuple[float, float, float]:
    """The mean and variance of the weighted law after a run on Karras's grid, and log of its integral over the start's."""
    process = VE(sigma_min=1e-3, sigma_max=4.0)
    powers = GAUSSIANS[name][0]
    laws = (Mixture([[m]], v) for m, v in NORMALS)
    experts = [(ExactDenoiser(law, process), beta) for law, beta in zip(laws, powers, strict=False)]
    composed = Composed(experts, zeta=zeta)
    times = process.grid(steps, "karras").tolist()
    # From the exact law at the start: that of the prior is off by what the data are against the largest noise.
    parts = [(m, v + process.prior_std**2, beta) for (m, v), beta in zip(NORMALS, powers, strict=False)]
    var = 1 / math.fsum(beta / v for _, v, beta in parts)
    mean = var * math.fsum(beta * m / v for m, v, beta in parts)
    log_z, points = 0.0, torch.tensor([[-1.0], [0.0], [1.0]], dtype=torch.float64)
    for stage in ReverseSDE(zeta).table(times, process):
        found = composed(points, float(stage.t))
        if weighted:
            low, mid, high = (rate(found, process.diffusion2(float(stage.t)), 0.0) * (stage.t - stage.to)).tolist()
            b, c = (high - low) / 2, (high + low) / 2 - mid  # g dtau = mid + b x + c x^2
            new = 1 / (1 / var - 2 * c)
            at = new * (mean / var + b)
            log_z += mid + (math.log(new / var) + at**2 / new - mean**2 / var) / 2
            mean, var = at, new
        score = found.score.squeeze(1).tolist()
        slope = stage.base + stage.value * (score[2] - score[0]) / 2
        mean = slope * mean + stage.value * score[1]
        var = slope**2 * var + stage.std**2
    return mean, var, log_z


def gaussian_errors(steps: int, name: str = "anneal", zeta: float = 1.0) -> float:
    """How far mean and variance of the weighted law are from the target's."""
    mean, var, _ = gaussian(name, steps, zeta)
    return abs(mean - GAUSSIANS[name][1]) + abs(var - GAUSSIANS[name][2])


def gaussian_log_z(powers: Sequence[float], low: float = 1e-3, high: float = 4.0) -> float:
    """The logarithm of the integral of the normals' product at the smallest noise, over that at the largest."""
    return _log_integral(powers, low) - _log_integral(powers, high)


def _log_integral(powers: Sequence[float], sigma: float) -> float:
    parts = [(m, v + sigma**2, beta) for (m, v), beta in zip(NORMALS, powers, strict=False)]
    precision = math.fsum(beta / v for _, v, beta in parts)
    pull = math.fsum(beta * m / v for m, v, beta in parts)
    each = math.fsum(-beta / 2 * (math.log(2 * math.pi * v) + m**2 / v) for m, v, beta in parts)
    return each + (math.log(2 * math.pi / precision) + pull**2 / precision) / 2
