"""What the claim of stochastic interpolants is tried on: bridges on the line, and a checkerboard. This module imports torch."""

from __future__ import annotations

from functools import lru_cache
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from scipy.linalg import solve_banded
from torch import Tensor, nn

from polyak.generate.interpolants import (
    Fields,
    GaussianMixtureInterpolant,
    Interpolant,
    integrate,
    interpolant_loss,
)
from polyak.generate.problems import Mixture

CELLS, REACH, MOMENTS = 500, 14.0, 400  # of the line's density: cells, half width, steps in time


class Wrong(Fields):
    """Exact fields with something amiss.

    error: the drift is off by ``error sin(2 x)``.
    score: "right"; "none": noise is added, and the score that makes up for it is left out; "flipped": of the other sign.
    """

    def __init__(self, exact: GaussianMixtureInterpolant, error: float = 0.0, score: str = "right") -> None:
        super().__init__(exact.interpolant, b=exact.b, s=exact.s)
        self.exact, self.error, self.score = exact, error, score

    def _both(self, x: Tensor, t: float | Tensor, *, score: bool) -> tuple[Tensor, Any]:
        b, s = self.exact._both(x, t, score=True)
        if self.score == "flipped":
            # b = v - gamma gamma' s
            b, s = b + 2 * self._of("gg_dot", t, x) * s, -s
        elif self.score == "none":
            s = torch.zeros_like(s)
        return b + self.error * torch.sin(2 * x), s

    def log_prob(self, x: Tensor, t: float) -> Tensor:
        return self.exact.log_prob(x, t)


def random_bridge(seed: int) -> GaussianMixtureInterpolant:
    """Between random mixtures on the line, on one of four paths."""
    draw = torch.Generator().manual_seed(seed)

    def law(count: int) -> Mixture:
        place, width, weight = torch.rand(3, count, generator=draw, dtype=torch.float64)
        return Mixture(6 * place[:, None] - 3, 0.2 + 0.5 * width, 0.5 + weight)

    paths = (("linear", "brownian"), ("trig", "brownian"), ("linear", "bsquared"), ("trig", "sigmoid"))
    return GaussianMixtureInterpolant(law(2), law(3), Interpolant(*paths[seed % len(paths)]))


def residual(fields: Wrong, eps: float = 0.7) -> float:
    """The largest ``|d rho/dt + d(b rho)/dx -+ eps (...)|`` of the transport and both Fokker-Planck equations, relative to rho.

    By central differences of the law's density and of the fields: at points of its bulk, at three times.
    """
    h, worst = 1e-4, 0.0
    for t in (0.2, 0.5, 0.8):
        x = torch.linspace(-3, 3, 25, dtype=torch.float64)[:, None]

        def density(x: Tensor, t: float = t) -> Tensor:
            return fields.log_prob(x, t).exp()[:, None]

        moved = (density(x, t + h) - density(x, t - h)) / (2 * h)
        bend = (density(x + h) + density(x - h) - 2 * density(x)) / h**2
        for level in (0.0, eps, -eps):
            out = fields.drift(x + h, t, level) * density(x + h) - fields.drift(x - h, t, level) * density(x - h)
            gap = (moved + out / (2 * h) - level * bend).abs() / density(x).max()
            worst = max(worst, gap.max().item())
    return worst


def carried(fields: Wrong, steps: int = 200) -> float:
    """How far the ODE takes quantiles of one end from quantiles of the other; on the line it keeps them."""
    exact = fields.exact
    levels = torch.linspace(0.05, 0.95, 19, dtype=torch.float64)
    start, end = (quantiles(law, levels) for law in (exact.rho0, exact.rho1))
    return (integrate(fields, start, steps=steps, method="rk4", t0=0.0) - end).abs().max().item()


def quantiles(law: Mixture, levels: Tensor) -> Tensor:
    """(n, 1), by bisection of the distribution function."""
    low, high = torch.full_like(levels, -20.0), torch.full_like(levels, 20.0)
    for _ in range(60):
        middle = (low + high) / 2
        share = torch.special.ndtr((middle[:, None] - law.means[:, 0]) / law.variances[:, 0].sqrt()) @ law.weights
        low, high = torch.where(share < levels, middle, low), torch.where(share < levels, high, middle)
    return ((low + high) / 2)[:, None]


def over_bound(fields: Wrong, levels: tuple[float, ...] = (0.25, 1.0, 5.0)) -> float:
    """The largest ``KL(rho1 || model) / (1/(4 eps) int E|error|^2 dt)`` of the forward SDEs: at most 1 by Girsanov.

    The model's density solves its Fokker-Planck equation on a grid: fluxes of Scharfetter and Gummel, which keep it positive
    and its mass 1, implicit in time.
    """
    exact, h, dt = fields.exact, 2 * REACH / CELLS, 1 / MOMENTS
    centres = torch.linspace(-REACH + h / 2, REACH - h / 2, CELLS, dtype=torch.float64)[:, None]
    faces = torch.linspace(-REACH + h, REACH - h, CELLS - 1, dtype=torch.float64)[:, None]
    first, last = (exact.log_prob(centres, t).exp().numpy() * h for t in (0.0, 1.0))
    models = [first / first.sum() for _ in levels]
    spent = 0.0
    for i in range(MOMENTS):
        t = (i + 0.5) * dt
        b, s = (v[:, 0].numpy() for v in fields._both(faces, t, score=True))
        square = (fields.error * torch.sin(2 * centres)[:, 0].numpy()) ** 2
        spent += dt * (exact.log_prob(centres, t).exp().numpy() * h * square).sum()
        for k, eps in enumerate(levels):
            peclet = np.clip((b + eps * s) * h / eps, -600, 600)
            up = eps / h**2 * bernoulli(-peclet)  # of mass that goes right through a face, and left
            down = eps / h**2 * bernoulli(peclet)
            band = np.zeros((3, CELLS))
            band[0, 1:], band[2, :-1] = -dt * down, -dt * up
            band[1] = 1
            band[1, :-1] += dt * up
            band[1, 1:] += dt * down
            models[k] = solve_banded((1, 1), band, models[k])
    kls = [(last * np.log(np.maximum(last, 1e-300) / np.maximum(m, 1e-300))).sum() for m in models]
    return max(4 * eps * kl / spent for eps, kl in zip(levels, kls, strict=True))


def bernoulli(w: np.ndarray) -> np.ndarray:
    """``w / (exp(w) - 1)``."""
    small = np.abs(w) < 1e-6
    return np.where(small, 1 - w / 2, w / np.expm1(np.where(small, 1.0, w)))


SOURCE, TARGET = Mixture([[-3.0], [3.0]], 0.25), Mixture([[-6.0], [0.0], [6.0]], [0.5, 0.33, 0.5])


def on_the_line(seed: int, points: int, steps: int, eps: float, score: str, errors: tuple[float, ...]) -> list[float]:
    """W2 to the target's quantiles, for each size of the drift's error: the same starts and noise for all arms of a seed."""
    from polyak.core.distances import wasserstein_1d

    exact = GaussianMixtureInterpolant(SOURCE, TARGET)
    goal = quantiles(TARGET, (torch.arange(points, dtype=torch.float64) + 0.5) / points)
    made = []
    for error in errors:
        draw = torch.Generator().manual_seed(seed)
        x = SOURCE.sample(points, generator=draw)
        x = integrate(Wrong(exact, error, score), x, eps, steps, "euler", generator=draw)
        made.append(wasserstein_1d(x, goal).item())
    return made


# ------------------------------------------------------------------------------------------------------------ checkerboard


class Net(nn.Module):
    """An MLP on (x, t)."""

    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        sizes = [3] + [width] * depth
        layers = [m for a, b in pairwise(sizes) for m in (nn.Linear(a, b), nn.ReLU())]
        self.layers = nn.Sequential(*layers, nn.Linear(width, 2))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.layers(torch.cat([x, t[:, None]], 1))


def checkerboard(n: int, draw: torch.Generator) -> Tensor:
    """n points, uniform on the black squares of a 4 by 4 board on [-4, 4]^2."""
    column = torch.randint(0, 4, (n,), generator=draw)
    row = 2 * torch.randint(0, 2, (n,), generator=draw) + column % 2
    corner = torch.stack([column, row], 1).float()
    return 2 * (corner + torch.rand(n, 2, generator=draw)) - 4


def off_the_board(x: Tensor) -> float:
    """The share of points that are not on a black square."""
    square = torch.floor((x + 4) / 2)
    on = (square >= 0).all(1) & (square < 4).all(1) & ((square.sum(1) % 2) == 0)
    return 1 - on.double().mean().item()


@lru_cache(maxsize=32)
def trained(seed: int, gamma: str, steps: int, batch: int, width: int, depth: int) -> Fields:
    """b, and the score where there is noise, from the same pairs in the same order."""
    path, nets = Interpolant("linear", gamma), {}
    for i, kind in enumerate(("b",) if gamma == "zero" else ("b", "s")):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(2 * seed + i)
            nets[kind] = net = Net(width, depth)
        draw = torch.Generator().manual_seed(seed)
        optimizer = torch.optim.Adam(net.parameters(), 2e-3)
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, steps // 2, 0.4)
        for _ in range(steps):
            x1, x0 = checkerboard(batch, draw), torch.randn(batch, 2, generator=draw)
            loss = interpolant_loss(kind, net, x0, x1, path, draw).mean()
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
        net.eval().requires_grad_(False)
    return Fields(path, **nets)


def without_score(fields: Fields) -> Fields:
    """The same, told that the score is 0."""
    return Fields(fields.interpolant, b=fields.b, s=lambda x, t: torch.zeros_like(x))
