"""The same step on the CPU, by the machine's C compiler: without one, plain PyTorch does it."""

from __future__ import annotations

import ctypes
import math
import threading
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from polyak.core.cc import SPLIT, function, library, parallel
from polyak.core.particles._gpu import Stepped, is_plain, word_of

_MOST_KEPT = 2**21  # weights for which a thread keeps room
_kept = threading.local()
_LEAST = 64  # particles in all below which calling C does not pay
_ALWAYS = ctypes.c_double(-1.0)
_ARGUMENTS = {"resample": 12, "multinomial": 8, "ssp": 10, "residual": 9, "reweight": 9}
_MOVES = {1: "move1", 2: "move2", 4: "move4", 8: "move8"}  # by a word's bytes


@cache
def _functions() -> dict[str, Any] | None:
    made = library(Path(__file__).with_name("_native.c").read_text(encoding="utf-8"))
    if made is None:
        return None
    found = {name: function(made, name, count) for name, count in _ARGUMENTS.items()}
    return found | {name: function(made, name, 8, ctypes.c_int64) for name in _MOVES.values()}


def stepped(
    logw: Tensor, n: int, scheme: str, u: Tensor, *, threshold: float | None = None, x: Tensor | None = None
) -> Stepped | None:
    """As the kernel's; None where it may not take these tensors."""
    size = logw.shape[-1]
    if not _takes(logw, u) or max(n, size) >= 2**31 or (functions := _functions()) is None:
        return None
    logw, u = logw.contiguous(), u.contiguous()
    ancestors = torch.empty((*logw.shape[:-1], n), dtype=torch.int64)
    fresh = did = None
    limit = _ALWAYS
    if threshold is not None:
        fresh, did = torch.empty_like(logw), torch.empty(logw.shape[:-1], dtype=torch.bool)
        limit = ctypes.c_double(math.inf if threshold == 1 else threshold * size)
    run, strata, where = functions["resample"], scheme == "stratified", ctypes.addressof(limit)

    def rows(a: int, b: int) -> None:
        w = _space(size)
        run(*_at(logw, u, w, ancestors, fresh, did), where, a, b, size, n, strata)

    _split(logw.numel() // size, size, rows)
    return Stepped(ancestors, None if x is None else moved(x, ancestors), fresh, did)


def drawn(logw: Tensor, n: int, scheme: str, u: Tensor) -> Tensor | None:
    """Ancestors by "multinomial" and "residual" of sums of exponentials, "ssp" of uniforms."""
    size = logw.shape[-1]
    if not _takes(logw, u) or (functions := _functions()) is None:
        return None
    logw, u = logw.contiguous(), u.contiguous()
    ancestors = torch.empty((*logw.shape[:-1], n), dtype=torch.int64)
    run = functions[scheme]
    spaces = {"multinomial": 0, "residual": 1, "ssp": 2}[scheme]

    def rows(a: int, b: int) -> None:
        w, space = _space(size), torch.empty((spaces, size), dtype=torch.int64)
        run(*_at(logw, u, w, *space, ancestors), a, b, size, n)

    _split(logw.numel() // size, size, rows)
    return ancestors


def reweighted(logw: Tensor, incr: Tensor) -> tuple[Tensor, Tensor, Tensor] | None:
    """``logw + incr``, its largest in every system (NaN, or infinite where something is amiss), and the gain of evidence."""
    if not _takes(logw, incr) or logw.shape != incr.shape or logw.requires_grad or incr.requires_grad:
        return None
    if (functions := _functions()) is None:
        return None
    logw, incr, size, run = logw.contiguous(), incr.contiguous(), logw.shape[-1], functions["reweight"]
    out, tops, before, after = torch.empty_like(logw), *torch.empty((3, *logw.shape[:-1]), dtype=torch.float64)
    _split(logw.numel() // size, size, lambda a, b: run(*_at(logw, incr, out, tops, before, after), a, b, size))
    return out, tops, after - before


def moved(x: Tensor, ancestors: Tensor) -> Tensor | None:
    """Rows of x, (*batch, N, *event), by ancestors; None where it may not take them, or one is not in [0, N)."""
    if not (is_plain(x, ancestors) and x.is_cpu and ancestors.is_cpu and ancestors.dtype == torch.int64):
        return None
    if x.numel() < _LEAST or (x.requires_grad and torch.is_grad_enabled()):
        return None
    if (word := word_of(x, ancestors.ndim)) is None or (functions := _functions()) is None:
        return None
    ancestors = ancestors.contiguous()
    n, size, width = ancestors.shape[-1], x.shape[ancestors.ndim - 1], word[1]
    out = x.new_empty((*ancestors.shape, *x.shape[ancestors.ndim :]))
    run, at, wrong = functions[_MOVES[word[0]]], _at(x, ancestors, out), []

    def rows(a: int, b: int) -> None:
        if run(*at, a, b, size, n, width):
            wrong.append(a)

    _split(ancestors.numel() // max(n, 1), n * width, rows)
    return None if wrong else out


def takes(logw: Tensor) -> bool:
    """Whether log-weights are such as C takes, and there is a compiler."""
    return _takes(logw) and _functions() is not None


def _takes(*tensors: Tensor) -> bool:
    for x in tensors:
        if not x.is_cpu or x.dtype != torch.float64 or x.numel() == 0:
            return False
    return is_plain(*tensors)


def _at(*tensors: Tensor | None) -> list[int]:
    return [0 if t is None else t.data_ptr() for t in tensors]


def _space(size: int) -> Tensor:
    """Room for one system's weights, the same one for every call of a thread: fresh memory costs more than the arithmetic."""
    kept = getattr(_kept, "w", None)
    if kept is None or kept.numel() < size:
        kept = torch.empty(size, dtype=torch.float64)
        if size <= _MOST_KEPT:
            _kept.w = kept
    return kept


def _split(rows: int, size: int, run: Callable[[int, int], Any]) -> None:
    """All rows, shared by as many threads as PyTorch has."""
    count = rows * size // SPLIT
    if count < 2:
        run(0, rows)
        return
    count = max(1, min(torch.get_num_threads(), rows, count))
    parallel(run, [rows * i // count for i in range(count + 1)])
