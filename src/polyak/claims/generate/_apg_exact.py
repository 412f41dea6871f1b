"""What must be true of APG by its equations, measured. This module imports torch."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor

from polyak.generate import APG, CFG, EDM, Euler, Prediction, sample
from polyak.generate.problems import ExactDenoiser, Gaussian, Mixture

PROCESS = EDM()
STEPS, CALLS, SCALE = 18, 8, 8.0
MOMENTUM, THRESHOLD = -0.5, 0.5  # of what is measured; an arm that leaves one out is measured against it all the same


def measured(guidance: APG, seed: int) -> dict[str, float]:
    """All metrics of the exact task, for one guidance of scale 8 on one seed's random problem."""
    draw = torch.Generator().manual_seed(seed)
    law = Mixture(torch.randn(12, 16, generator=draw, dtype=torch.float64), 0.04, labels=[0, 1, 2] * 4)
    denoiser = ExactDenoiser(law.of_class(0), PROCESS, unconditional=law)
    x_T = PROCESS.prior((8, 16), generator=draw, dtype=torch.float64)
    watch = _Watch(guidance)
    end = sample(denoiser, x_T, solver=Euler(), steps=STEPS, grid="karras", guidance=watch)
    plain = sample(denoiser, x_T, solver=Euler(), steps=STEPS, grid="karras", guidance=CFG(SCALE))
    return {
        "from_cfg": (end - plain).abs().max().item(),
        "along": watch.along,
        "reach": watch.reach / ((SCALE - 1) * THRESHOLD),
        "gain": _gain(guidance, draw),
        "path": _path(guidance, draw),
    }


class _Watch:
    """Notes how far a guidance moves the conditional data, and how far along them."""

    paired = True

    def __init__(self, guidance: APG) -> None:
        self.guidance, self.along, self.reach = guidance, 0.0, 0.0

    def init(self) -> Any:
        return self.guidance.init()

    def __call__(self, cond: Any, uncond: Any, state: Any = None, *, update: bool = True) -> Any:
        guided = self.guidance(cond, uncond, state, update=update)
        data, moved = cond.x0, guided.x0 - cond.x0
        size = moved.norm(dim=1)
        cosine = (moved * data).sum(1).abs() / (size * data.norm(dim=1)).clamp(min=1e-300)
        self.along = max(self.along, cosine.max().item())
        self.reach = max(self.reach, size.max().item())
        return guided

    def reindex(self, state: Any, ancestors: Tensor) -> Any:
        return self.guidance.reindex(state, ancestors)


def _gain(guidance: APG, draw: torch.Generator) -> float:
    """How far the update is from ``(1 - beta^n) / (1 - beta)`` differences after n calls with the same predictions.

    The difference is orthogonal to the data and far below the threshold, so that momentum alone acts.
    """
    c, d = torch.randn(2, 4, 16, generator=draw, dtype=torch.float64)
    d = 1e-3 * (d - (d * c).sum(1, keepdim=True) / c.square().sum(1, keepdim=True) * c)
    state, off = guidance.init(), 0.0
    for n in range(1, CALLS + 1):
        cond, uncond = (Prediction(v, c, 1.0, PROCESS, "sample") for v in (c, c - d))
        moved = (guidance(cond, uncond, state).x0 - c) / (SCALE - 1)
        gain = (moved * d).sum(1) / d.square().sum(1)
        off = max(off, (gain - (1 - MOMENTUM**n) / (1 - MOMENTUM)).abs().max().item())
    return off


def _path(guidance: APG, draw: torch.Generator) -> float:
    """The relative error of a whole trajectory, with an update that is orthogonal to the data.

    Two normals of one variance v whose means differ by delta: ``D_c - D_u = s^2 / (v + s^2) delta`` wherever one is. Where delta
    is orthogonal to mean and start, both coordinates follow recurrences of numbers.
    """
    v, length = 0.09, 2.0
    m, y = torch.rand(2, generator=draw, dtype=torch.float64).tolist()
    law, other = (Gaussian([m, 0.0, delta], v) for delta in (0.0, -length))
    times = PROCESS.grid(STEPS, "karras").tolist()
    x = torch.tensor([[m + 3 * y, 1.0 + y, 0.0]], dtype=torch.float64) * times[0] / 10
    denoiser = ExactDenoiser(law, PROCESS, unconditional=other)
    got = sample(denoiser, x, solver=Euler(), grid=times, guidance=_Flat(guidance))
    z, memory = x[0].tolist(), 0.0
    for s, t in itertools.pairwise(times):
        share = v / (v + s * s)
        memory = (1 - share) * length + MOMENTUM * memory
        update = (SCALE - 1) * max(-THRESHOLD, min(THRESHOLD, memory))
        data = [m + share * (z[0] - m), share * z[1], share * z[2] + update]
        z = [q + (t - s) * (q - p) / s for q, p in zip(z, data, strict=True)]
    want = torch.tensor([z], dtype=torch.float64)
    return ((got - want).norm() / want.norm()).item()


class _Flat(_Watch):
    """A guidance that is shown data without their third coordinate, along which the update is: it projects nothing away."""

    def __call__(self, cond: Any, uncond: Any, state: Any = None, *, update: bool = True) -> Any:
        third = torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64)
        flat = cond.replace(cond.x0 * (1 - third), "sample")
        lower = cond.replace(flat.x0 - (cond.x0 - uncond.x0), "sample")
        guided: Tensor = self.guidance(flat, lower, state, update=update).x0
        return cond.replace(guided + cond.x0 * third, "sample")
