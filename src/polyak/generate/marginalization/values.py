"""Configurations: whole numbers [B, D] of which 0 is unknown and 1 to K are values; and orders of their positions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from polyak.core import checks

VALUES = checks.Tensor(ndim=2)
SIZE = checks.Integer(1, 1_000_000)
MANY = checks.Integer(2, 1_000_000)  # values that a position may have


def whole(t: Tensor) -> bool:
    return not (t.is_floating_point() or t.is_complex() or t.dtype == torch.bool)


def configurations(name: str, x: Tensor, length: int, num_values: int, *, complete: bool = False) -> Tensor:
    """x as int64. Its values are looked at on the CPU alone: elsewhere that would wait for the device."""
    if not whole(x):
        raise ValueError(f"{name} must be whole numbers, 0 for unknown and 1 to {num_values}, got {x.dtype}")
    if x.ndim != 2 or x.shape[1] != length:
        raise ValueError(f"{name} must have shape [B, {length}], got {tuple(x.shape)}")
    if x.device.type == "cpu" and x.numel():
        low, high = (int(end) for end in x.aminmax())
        least = 1 if complete else 0
        if low < least or high > num_values:
            wrong = low if low < least else high
            what = f"values 1 to {num_values}" if complete else f"0 (unknown) or values 1 to {num_values}"
            raise ValueError(f"{name} must have {what}, got {wrong}")
    return x.long()


def ranks(name: str, order: Tensor, rows: int, length: int, device: Any) -> Tensor:
    """Orders as ranks [rows, length]: position j is drawn as number ``order[..., j]``, from 0."""
    if not whole(order) or order.shape not in ((length,), (1, length), (rows, length)):
        raise ValueError(
            f"{name} must be ranks, whole numbers of shape ({length},) or ({rows}, {length}), got {order.dtype}, "
            f"{tuple(order.shape)}"
        )
    order = order.to(device).long().expand(rows, length)
    if device.type == "cpu" and not torch.equal(order.sort(1).values, torch.arange(length).expand(rows, length)):
        raise ValueError(f"{name} must have the ranks 0 to {length - 1}, each once in a row, got {checks.shown(order)}")
    return order


def random_ranks(rows: int, length: int, device: Any, generator: torch.Generator | None) -> Tensor:
    """Uniformly random orders [rows, length]."""
    return torch.rand(rows, length, device=device, generator=generator).argsort(1)


def widened(t: Tensor) -> Tensor:
    """In float32 at least: logarithms of probabilities are sums of many terms."""
    return t.float() if t.dtype in (torch.float16, torch.bfloat16) else t
