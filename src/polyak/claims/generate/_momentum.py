"""How multistep methods with momentum are measured on equations that are solved in closed form. This module imports torch."""

from __future__ import annotations

import math
from typing import Any

import torch

from polyak.generate import EDM, GHVB, Denoiser, Solver, sample, stability_limit
from polyak.generate.problems import path_rmse

RUN = 240  # unit steps of a run that grows or does not
STEPS = (160, 320)  # between which orders of convergence are measured
SPAN = 3.0


class Averaged(GHVB):
    """GHVB without its weights: those of Adams-Bashforth are put on the averages."""

    @property
    def _mixing(self) -> float:
        return 1.0


def limit(solver: Solver, seed: int) -> float:
    """The largest z for which a run on ``y' = -z y`` with steps of length 1 does not grow, to 1e-4; by bisection."""
    process = EDM(sigma_min=1.0, sigma_max=1.0 + RUN)
    times = [1.0 + RUN - i for i in range(RUN + 1)]
    start = 1 + torch.rand(4, 1, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)

    def grows(z: float) -> bool:
        sizes: list[float] = []
        # Time runs backwards: eps = z y.
        denoiser = Denoiser(lambda x, t: z * x, process, "epsilon")
        sample(
            denoiser, start, solver=solver, grid=times, check_finite=False,
            callback=lambda step: sizes.append(step.x.norm().item()),
        )  # fmt: skip
        return not (math.isfinite(sizes[-1]) and sizes[-1] <= sizes[RUN // 2])

    low, high = 0.0, 16.0
    while high - low > 1e-4 * high:
        middle = (low + high) / 2
        low, high = (low, middle) if grows(middle) else (middle, high)
    return low


def compared(method: Any, order: int, beta: float, measured: float) -> tuple[float, float]:
    """``(off, wider)``: the relative distance to the formula's limit, and the ratio to that without momentum."""
    return abs(measured / stability_limit(method, order, beta) - 1), measured / stability_limit(method, order, 1.0)


def order(solver: Solver, seed: int, uneven: float) -> float:
    """The order of convergence on eight equations ``dy/ds = y sin(a s + b)`` together.

    ``uneven``: of the logarithm of the longest step's ratio to the shortest.
    """
    draw = torch.Generator().manual_seed(seed)
    a, b = torch.rand(2, 8, 1, generator=draw, dtype=torch.float64)
    a, b = 0.7 + 0.6 * a, 0.6 * b - 0.3
    process = EDM(sigma_min=0.01, sigma_max=SPAN)
    low = process.t_min
    exact = (((a * SPAN + b).cos() - (a * low + b).cos()) / a).exp()
    denoiser = Denoiser(lambda x, t: x * (a * t[:, None] + b).sin(), process, "epsilon", label=lambda t: t)
    errors = []
    for n in STEPS:
        shares = [1 - i / n for i in range(n + 1)]
        if uneven:
            shares = [math.expm1(uneven * u) / math.expm1(uneven) for u in shares]
        times = [SPAN, *(low + (SPAN - low) * u for u in shares[1:-1]), low]
        errors.append(path_rmse(sample(denoiser, torch.ones_like(a), solver=solver, grid=times), exact))
    return math.log2(errors[0] / errors[1])
