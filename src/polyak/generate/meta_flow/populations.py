"""Populations: padded points [P, N, D] and where they are."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor

from polyak.core import checks

SIZE = checks.Integer(1, 100_000)
NONE_OR_SIZE = checks.Integer(0, 100_000)


def population(
    name: str, x: Tensor, mask: Tensor | None, dim: int | None = None, least: int = 1
) -> tuple[Tensor, Tensor]:
    """The points, zero where there are none, and where there are some; it warns of populations with fewer than ``least``."""
    if not isinstance(x, Tensor) or not x.is_floating_point():
        raise ValueError(f"{name} must be a floating-point tensor, got {checks.shown(x)}")
    if x.ndim != 3 or 0 in x.shape[1:] or dim not in (None, x.shape[2]):
        raise ValueError(f"{name} must have shape [P, N, {dim or 'D'}] with N > 0, got {tuple(x.shape)}")
    points = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
    if mask is not None:
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.shape != x.shape[:2]:
            what = f"of {name} must be a tensor of bool, shape {tuple(x.shape[:2])}"
            raise ValueError(f"mask {what}, got {checks.shown(mask)}")
        points = mask.to(x.device)
        x = torch.where(points[..., None], x, 0)
    fewest = x.shape[1]
    if len(x) and (mask is not None or x.device.type == "cpu"):  # one read of the device, where it has to be read
        fewest, finite = torch.stack([points.sum(1).min(), x.isfinite().all()]).tolist()
        if not fewest:
            which = (~points.any(1)).nonzero()[0].item()
            raise ValueError(f"{name} must have a point in every population, got none in number {which}")
        if not finite:
            which = (~x.isfinite().flatten(1).all(1)).nonzero()[0].item()
            raise ValueError(f"{name} must be finite, got NaN or infinity in population {which}")
    if fewest < least:
        warnings.warn(
            f"k is {least - 1}, and a population has {fewest} points: all others are neighbours", stacklevel=3
        )
    return x, points


def mean_of(x: Tensor, points: Tensor) -> Tensor:
    return (torch.where(points[..., None], x, 0).sum(1) / points.sum(1, keepdim=True))[:, None]


def shape_of(x: Any) -> Any:
    return tuple(x.shape) if isinstance(x, Tensor) else x
