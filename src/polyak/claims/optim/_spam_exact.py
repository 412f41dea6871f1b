"""What must be true of SPAM by its equations, on random gradients in float64, one entry of which spikes. It imports torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from polyak.optim.spam import SPAM

SIZE, STEPS, LR, BETAS = 16, 60, 0.1, (0.9, 0.999)
INTERVAL, WARMUP, GRACE, THRESHOLD = 25, 5, 5, 5000.0
SPIKE, AT, ENTRY = 1e6, 20, 3  # how large, in which step (from 1), in which entry
NEVER = 10**9


def measured(seed: int, *, optimizer: str, clips: bool, resets: bool) -> dict[str, float]:
    """One run with the spike and one without.

    Args:
        seed: of the gradients.
        optimizer: "spam", or "adam" with its gradient's norm clipped to 1.
        clips, resets: whether SPAM does; what it does without either is compared with Adam.

    Returns:
        spread: the largest difference that the spike makes to other entries. growth: the largest by which a step multiplies a
        second moment after the first grace period, over ``b2 + (1 - b2) threshold``. And for SPAM equations: the distance of its
        points to the equations; forgotten: the largest relative difference of the moments to those of one gradient, at
        resets; from_adam: the distance to Adam, without spikes.
    """
    draw = torch.Generator().manual_seed(seed)
    start, *smooth = torch.randn(1 + STEPS, SIZE, generator=draw, dtype=torch.float64)
    spiked = [g.clone() for g in smooth]
    spiked[AT - 1][ENTRY] *= SPIKE
    (points, moments), (plain, _) = (_run(optimizer, clips, resets, start, g) for g in (spiked, smooth))
    others = torch.arange(SIZE) != ENTRY
    most = BETAS[1] + (1 - BETAS[1]) * THRESHOLD
    v = [second for _, second in moments]
    growth = max(float((v[t] / v[t - 1]).max()) for t in range(GRACE, STEPS) if (t + 1) % INTERVAL >= GRACE) / most
    found = {"spread": float((points - plain)[:, others].abs().max()), "growth": growth}
    if optimizer == "adam":
        return found
    adam, _ = _run("adam", False, False, start, smooth)
    forgotten = [
        float(((moment - (1 - b) * power) / moment).abs().max())
        for t in range(INTERVAL, STEPS + 1, INTERVAL)
        for moment, b, power in zip(moments[t - 1], BETAS, (spiked[t - 1], spiked[t - 1] ** 2), strict=True)
    ]
    return found | {
        "equations": float((points - _by_equations(start, spiked)).abs().max()),
        "forgotten": max(forgotten),
        "from_adam": float((plain - adam).abs().max()),
    }


def _run(
    name: str, clips: bool, resets: bool, start: Tensor, gradients: Sequence[Tensor]
) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    """The points and both moments after each step. eps is 0: Adam and SPAM add it in different places."""
    x = nn.Parameter(start.clone())
    if name == "adam":
        optimizer: Any = torch.optim.Adam([x], lr=LR, betas=BETAS, eps=0.0)
    else:
        optimizer = SPAM(
            [x], lr=LR, betas=BETAS, eps=0.0, reset_interval=INTERVAL if resets else NEVER, warmup_steps=WARMUP, grace=GRACE,
            threshold=THRESHOLD if clips else 0.0,
        )  # fmt: skip
    points, moments = [], []
    for g in gradients:
        x.grad = g.clone()
        if name == "adam" and clips:
            nn.utils.clip_grad_norm_([x], 1.0)
        optimizer.step()
        points.append(x.detach().clone())
        moments.append(tuple(optimizer.state[x][key].clone() for key in ("exp_avg", "exp_avg_sq")))
    return torch.stack(points), moments


def _by_equations(start: Tensor, gradients: Sequence[Tensor]) -> Tensor:
    """Algorithm 1, entry by entry, in Python's numbers."""
    (b1, b2), columns = BETAS, []
    for i in range(SIZE):
        x, m, v, column = float(start[i]), 0.0, 0.0, []
        for t, row in enumerate(gradients, start=1):
            g, k = float(row[i]), t % INTERVAL
            if k == 0:
                m = v = 0.0
            if t >= GRACE and k >= GRACE and g * g > THRESHOLD * v:
                g = math.copysign(math.sqrt(THRESHOLD * v), g)
            m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
            warm = t >= INTERVAL and k < WARMUP
            s = 1 - 0.99 * (1 + math.cos(math.pi * k / (WARMUP + 1))) / 2 if warm else 1.0
            x -= LR * s * math.sqrt(1 - b2**t) / (1 - b1**t) * m / math.sqrt(v)
            column.append(x)
        columns.append(torch.tensor(column, dtype=torch.float64))
    return torch.stack(columns, dim=1)
