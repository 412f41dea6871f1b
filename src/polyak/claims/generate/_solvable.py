"""Diffusion ODEs that are solved in closed form, and what a solver leaves of them. This module imports torch."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from polyak.generate import DDIM, VP, Denoiser, Solver, sample
from polyak.generate.problems import ExactDenoiser, Mixture, path_rmse

PROCESS = VP(beta0=0.1, beta1=20.0, t_min=1e-3, t_max=1.0)
STEPS = (128, 512)  # between which orders of convergence are measured
KIND = {"eps": "epsilon", "data": "sample"}


def left(solver: Solver, form: str, degree: int, seed: int) -> float:
    """The relative error on a grid of six random intervals, where the network says ``c + s lam`` (degree 0: s = 0) whatever x is.

    With ``c + s lam`` for the noise ("eps"), ``x / alpha - G`` does not change, ``G = (c + s (lam + 1)) exp(-lam)``; for the data
    ("data"), ``x / sigma - G``, ``G = (c + s (lam - 1)) exp(lam)``. All of c, s and the start are normal.
    """
    draw = torch.Generator().manual_seed(seed)
    start, c, s = torch.randn(3, 8, 1, generator=draw, dtype=torch.float64)
    s = s * degree
    inner = torch.rand(5, generator=draw, dtype=torch.float64).clamp(2 * PROCESS.t_min).sort(descending=True).values
    times = [PROCESS.t_max, *inner.tolist(), PROCESS.t_min]
    sign, scale = (-1, PROCESS.alpha) if form == "eps" else (1, PROCESS.sigma)

    def G(t: float) -> Tensor:
        lam = PROCESS.lam(t)
        return (c + s * (lam - sign)) * math.exp(sign * lam)

    def network(x: Tensor, t: Tensor) -> Tensor:
        return c + s * PROCESS.lam(t[0].item())

    want = scale(times[-1]) * (start / scale(times[0]) - G(times[0]) + G(times[-1]))
    got = sample(Denoiser(network, PROCESS, KIND[form]), start, solver=solver, grid=times)  # type: ignore[arg-type]
    return ((got - want).norm() / want.norm()).item()


class Line:
    """A random mixture of three normals on the line: the ODE keeps quantiles, so that its solution is known without a solver."""

    def __init__(self, seed: int, paths: int = 32) -> None:
        draw = torch.Generator().manual_seed(seed)
        share, place, width = torch.rand(3, 3, generator=draw, dtype=torch.float64)
        self.weights, self.means, self.variances = (share + 0.5) / (share + 0.5).sum(), 4 * place - 2, 0.1 + 0.2 * width
        law = Mixture(self.means[:, None], self.variances, weights=self.weights)
        self.denoiser = ExactDenoiser(law, PROCESS)
        levels = torch.linspace(0.05, 0.95, paths, dtype=torch.float64)
        self.start, self.end = (self._quantiles(levels, t)[:, None] for t in (PROCESS.t_max, PROCESS.t_min))

    def _quantiles(self, levels: Tensor, t: float) -> Tensor:
        alpha, sigma = PROCESS.alpha(t), PROCESS.sigma(t)
        deviation = (alpha**2 * self.variances + sigma**2).sqrt()
        low, high = torch.full_like(levels, -20.0), torch.full_like(levels, 20.0)
        for _ in range(70):
            x = (low + high) / 2
            below = torch.special.ndtr((x[:, None] - alpha * self.means) / deviation) @ self.weights < levels
            low, high = torch.where(below, x, low), torch.where(below, high, x)
        return (low + high) / 2

    def order(self, solver: Solver) -> float:
        """The order of convergence, measured between two numbers of steps on the logSNR grid."""
        few, many = (path_rmse(self._run(solver, steps=n, grid="logsnr"), self.end) for n in STEPS)
        return math.log(few / many) / math.log(STEPS[1] / STEPS[0])

    def from_ddim(self, solver: Solver) -> float:
        """The largest distance to DDIM's samples after ten steps, on three grids."""
        grids = ("logsnr", "time", "quadratic")
        both = ((self._run(which, steps=10, grid=grid) for which in (solver, DDIM())) for grid in grids)
        return max((one - other).abs().max().item() for one, other in both)

    def _run(self, solver: Solver, **how: Any) -> Tensor:
        return sample(self.denoiser, self.start, solver=solver, **how)
