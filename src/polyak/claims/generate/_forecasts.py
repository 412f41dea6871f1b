"""Forecasts of a law that is known, what must be true of them, and how guidances are tuned. This module imports torch."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from polyak.generate import CFG, EDM, Denoiser, Euler, Heun, PrecisionGuidance, ensemble_forecast, sample
from polyak.generate.cogdpm import Forecast, crps, spread_skill

PIXELS, NARROW, WIDE = 64, 0.02, 0.98
PROCESS = EDM(sigma_min=0.01, sigma_max=20.0)
GRID = (0.25, 0.5, 1.0, 2.0, 4.0)  # of w, for every guidance


class Even(PrecisionGuidance):
    """As much guidance at every step, the same for all pixels of a forecast."""

    def weight(self, state: Any) -> Tensor | None:
        w = super().weight(state)
        assert w is not None
        return w.flatten(1).mean(1).reshape(-1, *[1] * (w.ndim - 1)).expand_as(w)


def guidance(arm: str, w: float, window: int) -> Any:
    """An arm's guidance of scale w, as precision guidance counts it."""
    return {
        "cond": lambda: PrecisionGuidance(0.0),
        "cfg": lambda: CFG(1 + w),
        "pw": lambda: PrecisionGuidance(w),
        "even": lambda: Even(w),
        "window": lambda: PrecisionGuidance(w, window=window),
        "flat": lambda: PrecisionGuidance(w, clip=(1.0, 1.0)),
    }[arm]()


class Known:
    """Pixels ``x = sqrt(1 - c) z + sqrt(c) e``, z and e standard normal: after z their variance is c, without it 1.

    The model under-uses its context: its mean is ``(1 - 0.6 c) sqrt(1 - c) z``, so that guidance away from the law without
    context, N(0, 1), has something to mend where the variance is large.
    """

    def __init__(self, seed: int, cases: int) -> None:
        draw = torch.Generator().manual_seed(seed)
        self.variance = torch.linspace(NARROW, WIDE, PIXELS, dtype=torch.float64)
        self.context = torch.randn(cases, PIXELS, generator=draw, dtype=torch.float64)
        noise = torch.randn(cases, PIXELS, generator=draw, dtype=torch.float64)
        self.truth = (1 - self.variance).sqrt() * self.context + self.variance.sqrt() * noise
        self.seed = seed

    def mean(self, context: Tensor) -> Tensor:
        return (1 - 0.6 * self.variance) * (1 - self.variance).sqrt() * context

    def denoiser(self, context: Tensor) -> Denoiser:
        mean = self.mean(context)

        def of(mean: Any, variance: Any) -> Any:
            return lambda x, s: mean + variance / (variance + s[:, None] ** 2) * (x - mean)

        return Denoiser(
            of(mean, self.variance), PROCESS, "sample", unconditional=of(0.0, torch.ones(())), label=lambda t: t
        )

    def forecast(self, guidance: Any, rows: slice, members: int) -> Forecast:
        draw = torch.Generator().manual_seed(self.seed + 10_000)
        return ensemble_forecast(
            self.denoiser, self.context[rows], solver=Euler(), steps=18, grid="karras", members=members, guidance=guidance,
            generator=draw,
        )  # fmt: skip


def ranks(x: Tensor) -> Tensor:
    return x.argsort(-1).argsort(-1).to(torch.float64)


def spearman(x: Tensor, y: Tensor) -> Tensor:
    """The rank correlation over the last dimension, without ties."""
    a, b = (ranks(v) - (v.shape[-1] - 1) / 2 for v in (x, y))
    return (a * b).sum(-1) / (a.square().sum(-1) * b.square().sum(-1)).sqrt()


def scored(
    forecast: Callable[[Any, slice], Forecast],
    truth: Tensor,
    arm: str,
    window: int,
    *,
    fixed: Sequence[float],
    against: Callable[[Forecast, Tensor], Tensor],
) -> dict[str, float]:
    """One arm's scores on the second half of the cases: at some w, and at that of the grid which is best on the first half.

    ``against`` says what U should be in order with.
    """
    half = len(truth) // 2
    first, second = slice(0, half), slice(half, None)
    guided = arm not in ("cond", "window")
    found = {
        w: crps(forecast(guidance(arm, w, window), first).samples, truth[first]).mean().item() for w in GRID if guided
    }
    w = min(found, key=found.__getitem__) if guided else 1.0
    made = {v: forecast(guidance(arm, v, window), second) for v in {w, 1.0, *(fixed if guided else ())}}
    score = {v: crps(f.samples, truth[second]).mean().item() for v, f in made.items()}
    one, best = made[1.0], made[w]
    wanted = against(one, truth[second])
    return {
        **{f"crps_{v:g}": score.get(v, score[w]) for v in fixed},
        "crps": score[w],
        "w": w if arm != "cond" else 0.0,
        "spearman": spearman(one.uncertainty.flatten(1), wanted).mean().item(),
        "spread": spread_skill(best.samples, truth[second]).mean().item(),
    }


# --- what must be true


def measured(arm: str, window: int, seed: int) -> dict[str, float]:
    """All metrics of the equations' task, for the map of one arm."""
    problem = Known(seed, 6)
    w = 2.0
    x_T = PROCESS.prior((6, PIXELS), generator=torch.Generator().manual_seed(seed + 1), dtype=torch.float64)
    made = problem.denoiser(problem.context)

    def run(given: Any, x: Tensor = x_T, denoiser: Denoiser = made, **how: Any) -> tuple[Tensor, Any]:
        seen: list[Any] = []
        how = {"solver": Euler(), "steps": 18, "grid": "karras"} | how
        end = sample(denoiser, x, guidance=given, callback=lambda step: seen.append(step.guidance), **how)
        return end, seen[-1]

    own = guidance(arm, w, window)
    end, state = run(own)
    watched = _Watch(own)
    run(watched)
    listed = np.var(torch.stack(watched.history).numpy(), axis=0)
    still = guidance(arm, 0.0, window) if arm != "flat" else PrecisionGuidance(0.0)
    plain, kept = run(still)
    alone, _ = run(own, x_T[2:3], problem.denoiser(problem.context[2:3]))
    return {
        "from_cfg": (end - run(CFG(1 + w))[0]).abs().max().item(),
        "from_cond": (plain - run(None)[0]).abs().max().item(),
        "variance": float(np.abs(state.uncertainty.numpy() / listed - 1).max()),
        "recurrence": (kept.uncertainty / _recurrence(problem, x_T) - 1).abs().max().item(),
        "batch": (alone - end[2:3]).abs().max().item(),
        **_derived(problem, still, run),
    }


class _Watch:
    """Writes down what data a guidance is given at the first evaluation of each step."""

    paired = True

    def __init__(self, guidance: Any) -> None:
        self.guidance, self.history = guidance, []

    def init(self) -> Any:
        return self.guidance.init()

    def __call__(self, cond: Any, uncond: Any, state: Any = None, *, update: bool = True) -> Any:
        self.history += [cond.x0] if update else []
        return self.guidance(cond, uncond, state, update=update)

    def reindex(self, state: Any, ancestors: Tensor) -> Any:
        return self.guidance.reindex(state, ancestors)


def _recurrence(problem: Known, x_T: Tensor) -> Tensor:
    """U of Euler's method without guidance: ``(x_T - mean)^2 Var_j g_j``, of the factors by which each step shrinks a pixel."""
    c, off, seen = problem.variance, torch.ones(PIXELS, dtype=torch.float64), []
    times = PROCESS.grid(18, "karras").tolist()
    for s, t in itertools.pairwise(times):
        share = c / (c + s**2)
        seen.append(share * off)
        off = off * (1 + (t - s) / s * (1 - share))
    return (x_T - problem.mean(problem.context)).square() * torch.stack(seen).var(0, correction=0)


def _derived(problem: Known, still: Any, run: Any) -> dict[str, float]:
    """U on the ODE itself, of starts at one standard deviation: ``c Var_j sqrt(c / (c + s_j^2))``, and its order beside c's."""
    c, times = problem.variance, PROCESS.grid(400, "karras").tolist()
    start = problem.mean(problem.context) + (c + times[0] ** 2).sqrt()
    _, state = run(still, start, solver=Heun(), grid=times, steps=None)
    s = torch.tensor(times[:-1], dtype=torch.float64)[:, None]
    want = c * (c / (c + s**2)).sqrt().var(0, correction=0)
    return {
        "derived": (state.uncertainty / want - 1).abs().max().item(),
        "order": spearman(state.uncertainty, c.expand_as(state.uncertainty)).min().item(),
    }
