"""Flow models of independent coordinates that need no training: a straight one, which predicts sharply, and the exact one."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

MODES, WIDTH, DIM = (-1.5, 0.0, 1.5), 0.15, 16
POINTS, REACH = 1601, 5.5  # of the table of quantiles


@lru_cache(maxsize=1)
def quantiles() -> tuple[Any, Any]:
    """Noise z and the quantile q(z) of the mixture with the same rank, as tables; q is linear between."""
    import torch

    q = torch.linspace(-3.5, 3.5, 40_001, dtype=torch.float64)
    rank = torch.stack([torch.special.ndtr((q - mode) / WIDTH) for mode in MODES]).mean(0)
    z = torch.linspace(-REACH, REACH, POINTS, dtype=torch.float64)
    wanted = torch.special.ndtr(z)
    right = torch.searchsorted(rank, wanted).clamp(1, len(q) - 1)
    share = (wanted - rank[right - 1]) / (rank[right] - rank[right - 1])
    return z, torch.lerp(q[right - 1], q[right], share.clamp(0, 1))


def straight(x: Any, label: Any) -> Any:
    """The velocity z - q(z), z where ``(1 - t) q(z) + t z = x``: constant on its paths, so that x0_hat = q(z) is a sample.

    It is what distillation to few steps aims at. x: (B, 16); label: t, (B,).
    """
    import torch

    z, q = quantiles()
    t = label.double()[:, None]
    knots, y = (1 - t) * q + t * z, x.double()
    right = torch.searchsorted(knots, y).clamp(1, len(z) - 1)
    low, high = knots.gather(1, right - 1), knots.gather(1, right)
    share = (y - low) / (high - low)
    velocity = z - q
    return torch.lerp(velocity[right - 1], velocity[right], share).to(x.dtype)


def blurred(x: Any, label: Any) -> Any:
    """The velocity of the mixture's marginals: its x0_hat is the posterior mean, a blend of modes where noise is large."""
    import torch

    t = label.double()[:, None]
    y, alpha = x.double(), 1 - t
    variance = alpha**2 * WIDTH**2 + t**2
    modes = torch.tensor(MODES, dtype=torch.float64, device=x.device)
    off = y[..., None] - alpha[..., None] * modes
    weight = torch.softmax(-(off**2) / (2 * variance[..., None]), -1)
    slope = (t - alpha * WIDTH**2) / variance  # of the flow of one mode, about its mean
    return (weight * (slope[..., None] * off - modes)).sum(-1).to(x.dtype)


def counting(x: Any) -> Any:
    """Eleven coordinates in the upper mode and four in the lower one; less what they are off by. (..., 16) -> (...)"""
    return -((x > 1).sum(-1) - 11).abs().double() - ((x < -1).sum(-1) - 4).abs().double()


def corner(x: Any) -> Any:
    """Less the distance to the corner of alternating modes."""
    import torch

    wanted = torch.tensor([MODES[-1], MODES[0]] * (DIM // 2), dtype=x.dtype, device=x.device)
    return -(x - wanted).square().sum(-1).sqrt().double()


def misses(solver: Any, process: Any, law: tuple[float, float], steps: int) -> float:
    """The largest error of mean, or relative error of variance, of Gaussian data along a run: it is linear, so both are known."""
    mu, v = law
    at = process.moments(process.check_times(process.grid(steps, "time")))
    alpha, sigma, d_alpha, d_sigma = at.alpha, at.sigma, at.dalpha, at.dsigma
    true = [a**2 * v + s**2 for a, s in zip(alpha, sigma, strict=True)]
    mean, variance, worst = alpha[0] * mu, true[0], 0.0
    for i, stage in enumerate(solver.table(at, process)):
        slope = (alpha[i] * d_alpha[i] * v + sigma[i] * d_sigma[i]) / true[i]  # of the exact flow, about its mean
        mean = stage.base * mean + stage.value * (d_alpha[i] * mu + slope * (mean - alpha[i] * mu))
        variance = (stage.base + stage.value * slope) ** 2 * variance + stage.std**2
        worst = max(worst, abs(mean - alpha[i + 1] * mu), abs(variance / true[i + 1] - 1))
    return worst


def order(errors: list[float]) -> float:
    return math.log2(errors[-2] / errors[-1])


def marginal_order(make: Any, seed: int) -> float:
    """The lowest order with which mean and variance converge, over all strengths of noise in two interpolants."""
    import torch

    from polyak.generate import VP, Flow
    from polyak.generate.rbf.solver import SHAPES

    draws = torch.rand(2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).tolist()
    law = (2 * draws[0] - 1, 0.3 + draws[1])
    paths = (Flow(t_min=0.02), VP(t_min=0.05))
    # "tan" is steep at t = 0.95: as strong as the others where it is not.
    cases = [(make(g, 0.3 if g == "tan" else 1.5), path) for g in SHAPES for path in paths]
    return min(order([misses(solver, path, law, n) for n in (160, 320)]) for solver, path in cases)


def conversion_errors(seed: int, whole: bool = True) -> tuple[float, float]:
    """Of flow matching in the VP interpolant: the largest errors of x0_hat and of the velocity, against their definitions.

    x0_hat shall be that of the flow at the matched point; the velocity that of the exact denoiser of VP itself.

    Args:
        whole: with sigma' t' in c'; without, as it is easily forgotten.
    """
    import torch

    from polyak.core.exact import Mixture
    from polyak.generate import VP, Denoiser, Flow, Prediction, convert
    from polyak.generate.problems import ExactDenoiser
    from polyak.generate.process.conversion import matched

    draw = torch.Generator().manual_seed(seed)
    means, x = (torch.randn(3, n, generator=draw, dtype=torch.float64).T for n in (4, 64))
    law, process, flow = Mixture(means, 0.1 + torch.rand(4, generator=draw, dtype=torch.float64)), VP(), Flow()
    r = 0.05 + 0.9 * torch.rand(64, generator=draw, dtype=torch.float64)
    at = matched(flow, process, r)

    def network(y: Any, label: Any) -> Any:
        x0 = law.posterior_mean(y, flow.alpha(label), flow.sigma(label))
        return Prediction(x0, y, label, flow, "sample").flow

    u = convert(network, flow, process)(x, r)
    if not whole:
        u = u + (flow.dsigma(at.t) * at.dt / flow.sigma(at.t))[:, None] * x
    said, exact = Denoiser(lambda y, label: u, process, "flow")(x, r), ExactDenoiser(law, process)(x, r)
    there = Denoiser(network, flow, "flow")(x / at.c[:, None], at.t)
    return (said.x0 - there.x0).abs().max().item(), (u - exact.flow).abs().max().item()


def account(seed: int, forced: bool = True) -> dict[str, float]:
    """How a search keeps to its budget, on a field of sines.

    Args:
        forced: with what is left over granted again; else SVDD, whose steps have equal shares.
    """
    import torch

    from polyak.generate import SVDD, Flow, RolloverBudget

    rows, told = 0, iter(range(10**6))

    def network(x: Any, label: Any) -> Any:
        nonlocal rows
        rows += len(x)
        return torch.sin(3 * x) + x

    def found(reward: Any, batch: int = 1, chains: int = 2) -> tuple[Any, Any]:
        noise = torch.Generator().manual_seed(seed)
        made = RolloverBudget(reward, nfe=200, steps=6, chains=chains, init=10, generator=noise)
        return made, made.sample(network, Flow(), (DIM,), batch)

    def draws(trace: Any) -> Any:
        return trace.step[0, 0, :-1].bincount()[:-1]  # at each step but the last

    made, result = found(counting, batch=2)
    trace, spent = result.trace, rows / 2
    entered = trace.step[..., -1] + 1
    lost = (trace.granted - made.quota * entered - trace.rolled).abs().max().item()
    falls = (-torch.diff(trace.best, dim=2)).clamp(min=0).max().item()
    made, constant = found(lambda x: 0 * x.sum(-1))
    if forced:
        _, climbed = found(lambda x: [float(next(told)) for _ in range(x.shape[0] * x.shape[1])], chains=1)
        calls = draws(climbed.trace).max().item()
    else:
        calls = SVDD(counting, nfe=200, steps=6, chains=1).particles
    return {
        "overspent": max(0.0, spent - made.nfe) + abs(spent - result.nfe),
        "lost": lost + falls,
        "uneven": (draws(constant.trace) - made.quota).abs().max().item(),
        "calls_when_climbing": float(calls),
    }
