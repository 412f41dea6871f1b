"""The same step on the CPU, by the machine's C compiler: without one, plain PyTorch does it."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from polyak.core.cc import SPLIT, function, library, parallel
from polyak.core.particles._gpu import Stepped, is_plain, words_of

_LEAST = 64  # particles in all below which calling C does not pay
_ARGUMENTS = {"resample": 12, "merged": 8, "move1": 8, "move2": 8, "move4": 8, "move8": 8}


@cache
def _functions() -> dict[str, Any] | None:
    made = library(Path(__file__).with_name("_native.c").read_text(encoding="utf-8"))
    return None if made is None else {name: function(made, name, count) for name, count in _ARGUMENTS.items()}


def stepped(
    logw: Tensor, n: int, scheme: str, u: Tensor, *, threshold: float | None = None, x: Tensor | None = None
) -> Stepped | None:
    """As the kernel's; and "multinomial" of sorted points. None where it may not take these tensors."""
    size = logw.shape[-1]
    if not _takes(logw) or not _takes(u) or max(n, size) >= 2**31 or (functions := _functions()) is None:
        return None
    logw, u = logw.contiguous(), u.contiguous()
    rows = logw.numel() // size
    ancestors = torch.empty((*logw.shape[:-1], n), dtype=torch.int64)
    w = torch.empty((_threads(rows, size), size), dtype=torch.float64)
    space = iter(w)
    fresh = did = None
    if scheme == "multinomial":
        run = functions["merged"]
        _split(rows, size, lambda a, b: run(*_at(logw, u, next(space), ancestors), a, b, size, n))
        return Stepped(ancestors)
    limit = ctypes.c_double(-1.0)
    if threshold is not None:
        fresh, did = torch.empty_like(logw), torch.empty(logw.shape[:-1], dtype=torch.bool)
        limit = ctypes.c_double(math.inf if threshold == 1 else threshold * size)
    run, strata = functions["resample"], scheme == "stratified"
    where = ctypes.addressof(limit)
    _split(
        rows,
        size,
        lambda a, b: run(*_at(logw, u, next(space), ancestors, fresh, did), where, a, b, size, n, strata),
    )
    return Stepped(ancestors, None if x is None else moved(x, ancestors), fresh, did)


def moved(x: Tensor, ancestors: Tensor) -> Tensor | None:
    """Rows of x, (*batch, N, *event), by right ancestors; None where it may not take them."""
    if (
        not (is_plain(x) and is_plain(ancestors))
        or x.device.type != "cpu"
        or (x.requires_grad and torch.is_grad_enabled())
    ):
        return None
    if x.numel() < _LEAST or (words := words_of(x, ancestors.ndim)) is None or (functions := _functions()) is None:
        return None
    ancestors = ancestors.contiguous()
    n, size, width = ancestors.shape[-1], x.shape[ancestors.ndim - 1], words.shape[-1]
    out = x.new_empty((*ancestors.shape, *x.shape[ancestors.ndim :]))
    run = functions[f"move{words.element_size()}"]
    rows = ancestors.numel() // max(n, 1)
    _split(rows, n * width, lambda a, b: run(*_at(words, ancestors, out), a, b, size, n, width))
    return out


def _takes(x: Tensor) -> bool:
    return x.device.type == "cpu" and x.dtype == torch.float64 and x.numel() > 0 and is_plain(x)


def _at(*tensors: Tensor | None) -> list[int]:
    return [0 if t is None else t.data_ptr() for t in tensors]


def _threads(rows: int, size: int) -> int:
    """How many share the rows."""
    return max(1, min(torch.get_num_threads(), rows, rows * size // SPLIT))


def _split(rows: int, size: int, run: Callable[[int, int], Any]) -> None:
    count = _threads(rows, size)
    parallel(run, [rows * i // count for i in range(count + 1)])
