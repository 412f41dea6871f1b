"""Forecasts that are known, and fields that are advected by us: data, networks and scores. This module imports torch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from polyak.generate import EDM, Denoiser, Euler, PrecisionGuidance, ensemble_forecast
from polyak.generate.cogdpm import Forecast, crps, spread_skill

PIXELS, NARROW, WIDE = 64, 0.02, 0.98
PROCESS = EDM(sigma_min=0.01, sigma_max=20.0)


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

    def forecast(self, guidance: Any, members: int, steps: int = 18) -> Forecast:
        draw = torch.Generator().manual_seed(self.seed + 10_000)
        return ensemble_forecast(
            self.denoiser, self.context, solver=Euler(), steps=steps, grid="karras", members=members, guidance=guidance, generator=draw
        )  # fmt: skip


def ranks(x: Tensor) -> Tensor:
    return x.argsort(-1).argsort(-1).to(torch.float64)


def spearman(x: Tensor, y: Tensor) -> Tensor:
    """The rank correlation over the last dimension, without ties."""
    a, b = (ranks(v) - (v.shape[-1] - 1) / 2 for v in (x, y))
    return (a * b).sum(-1) / (a.square().sum(-1) * b.square().sum(-1)).sqrt()
