"""Checks that all ranks of a process group start with the same weights and options, by a few numbers in one collective."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

CHUNK = 2**22  # elements that are looked at together: their bits are widened to eight bytes
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_ODD = (-0x61C8864680B583EB, -0x40A7B892E31B1A47)


def checksum(tensors: Iterable[Tensor]) -> int:
    """A number of all bits in their order. Sums of integers: the same on every device, read back once."""
    total: Tensor | None = None
    start = 1
    for t in tensors:
        bits = t.detach().reshape(-1).view(_BITS[t.element_size()])
        for part in bits.split(CHUNK):
            x = part.to(torch.int64) + torch.arange(start, start + len(part), device=t.device) * _ODD[0]
            x = (x ^ (x >> 29)) * _ODD[1]
            found = (x ^ (x >> 32)).sum()
            total = found if total is None else total + found.to(total.device)
            start += len(part)
    return 0 if total is None else int(total)


def text_sum(value: Any) -> int:
    """A number of an object's text."""
    return zlib.crc32(repr(value).encode())


def differing(names: Sequence[str], by_rank: Sequence[Sequence[int]]) -> str:
    """Names whose numbers differ, with the numbers where they are plain ones (a name that ends in "=")."""
    found = []
    for name, numbers in zip(names, zip(*by_rank, strict=True), strict=True):
        if len(set(numbers)) > 1:
            found.append(f"{name[:-1]} (by rank: {list(numbers)})" if name.endswith("=") else name)
    return ", ".join(found)
