"""Means over processes, in one all-reduce of O(d_in + d_out) words a layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

Vectors = tuple[Tensor, Tensor, Tensor]


def average(gathered: Sequence[Vectors], group: Any) -> list[Vectors]:
    """Of every stack's (a, g, present): the means over the processes that have them, and by how many they are had.

    Args:
        gathered: of the same shapes on all processes; zeros where a layer has nothing.
        group: None for all processes, False for none but this.
    """
    if _size(group) == 1:
        return list(gathered)
    by_device: dict[torch.device, list[int]] = {}
    for i, (a, _, _) in enumerate(gathered):
        by_device.setdefault(a.device, []).append(i)
    result = list(gathered)
    for members in by_device.values():
        tensors = [t for i in members for t in gathered[i]]
        flat = torch.cat([t.flatten() for t in tensors])
        torch.distributed.all_reduce(flat, group=group)
        parts = [
            p.view_as(t).to(t.dtype) for p, t in zip(flat.split([t.numel() for t in tensors]), tensors, strict=True)
        ]
        for i, a, g, count in zip(members, parts[::3], parts[1::3], parts[2::3], strict=True):
            # 0/0 where no process has any: not taken in, since the count is zero.
            result[i] = a / count[:, None], g / count[:, None], count
    return result


def mean(value: Tensor, group: Any) -> Tensor:
    """A tensor's mean over the processes."""
    size = _size(group)
    if size == 1:
        return value
    total = value.clone()
    torch.distributed.all_reduce(total, group=group)
    return total / size


def _size(group: Any) -> int:
    """How many processes take part."""
    if group is False or not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return 1
    return max(1, torch.distributed.get_world_size(group))
