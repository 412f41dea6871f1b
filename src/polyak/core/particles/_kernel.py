"""A resampling step of many systems as one launch: systematic or stratified, with states moved and weights reset.

A program takes one system after another, with its log-weights in registers: those of at most ``CHUNK`` particles. Exponents, sums
and cumulative sums are double precision, rounded as in ``_schemes``, so that the sums are exact. A particle i with offspring leaves
i where its first one stands, in a row of the program's own that stays in the cache; the largest mark up to a slot is the slot's
ancestor. Marks of earlier systems are smaller, so that the row needs no clearing.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from polyak.core.launch import Launcher, build, function, is_elsewhere
from polyak.core.particles import _blocks
from polyak.core.particles._gpu import FUNCTIONS, Stepped, columns, given, moves, takes

CHUNK = 2048  # particles at most: of more, many programs for a system are faster (``_blocks``; measured on an H200)
PROGRAMS = 8  # on each multiprocessor
OPTIONS: dict[str, int] = {}  # of Triton's compiler
_launch = Launcher()


class _Form(NamedTuple):
    """What the kernel's text depends on."""

    chunk: int  # at least as many as there are particles, and as are drawn
    strata: bool  # each with its own uniform
    adaptive: bool
    columns: int  # of states that are moved: 0: none are; 1: a word each


def stepped(
    logw: Tensor, n: int, scheme: str, u: Tensor, *, threshold: float | None = None, x: Tensor | None = None
) -> Stepped | None:
    """Ancestors, and what goes with them; None where the kernel may not take these tensors.

    Args:
        logw: (*batch, N), float64; not differentiated. u: (*batch) or (*batch, n), float64.
        threshold: in (0, 1]; then n is N, and systems whose effective sample size is not below it stay as they are.
        x: (*batch, N, *event), to be moved; it stays where it is if the kernel may not take it.
    """
    size = logw.shape[-1]
    if not (takes(logw) and takes(u)) or logw.dtype != torch.float64 or min(size, n) < 2 or logw.numel() == 0:
        return None
    place = logw.get_device()
    if is_elsewhere(place):
        with torch.cuda.device(place):
            return stepped(logw, n, scheme, u, threshold=threshold, x=x)
    logw, u = logw.contiguous(), u.contiguous()
    if max(size, n) > CHUNK:
        return _blocks.stepped(logw, n, scheme, u, threshold, x)
    rows = logw.numel() // size
    chunk = max(32, 1 << (max(size, n) - 1).bit_length())
    made = given(logw, n, threshold, x)
    strata, adaptive = scheme == "stratified", threshold is not None
    form = _Form(chunk, strata, adaptive, columns(made.x))
    programs = min(rows, _multiprocessors(place) * PROGRAMS)
    if -(-rows // programs) * chunk >= 2**31 - chunk:
        return None
    scratch = torch.empty(programs * chunk, dtype=torch.int32, device=logw.device)
    tensors = [logw, u, scratch, *made.tensors()]
    numbers = rows, size, n, 1 if made.x is None else made.x.shape[-1], made.limit
    key = None
    if all(t.data_ptr() % 16 == 0 for t in tensors):
        key = form, place, programs, numbers, None if made.x is None else made.x.dtype
    _launch(lambda: _kernel(form), programs, (*tensors, *numbers), 8 if chunk > 1024 else 4, key, **OPTIONS)
    return made.out


@cache
def _multiprocessors(place: int) -> int:
    return torch.cuda.get_device_properties(place).multi_processor_count if place >= 0 else 1


@cache
def _kernel(form: _Form) -> Any:
    arguments = ["logw", "u", "scratch", "ancestors"]
    arguments += ["fresh", "done"] if form.adaptive else []
    arguments += ["x", "out"] if form.columns else []
    arguments += ["rows", "size", "n", "words", "limit"]
    text = FUNCTIONS + "\n\n" + function("step", arguments, _step(form))
    return build(text)["step"]


def _step(form: _Form) -> list[str]:
    chunk = form.chunk
    lines = [
        f"lane = tl.arange(0, {chunk})",
        f"mine = scratch + tl.program_id(0).to(tl.int64) * {chunk}",
        f"tl.store(mine + lane, tl.zeros([{chunk}], tl.int32))",
        "row = tl.program_id(0)",
        "base = row * 0",
        "share = n.to(tl.float64)",
    ]
    loop = [
        f"base += {chunk}",
        "first = row.to(tl.int64) * size",
        'w = tl.load(logw + first + lane, mask=lane < size, other=float("-inf"))',
        "top = tl.max(w, 0)",
        # An atom at +inf, and a system without weight, are equal to the largest.
        "w = weight(tl.where(w == top, 0.0, w - top))",
        "w = tl.where(lane < size, w, 0.0)",
        "total = tl.sum(w, 0)",
        "right = total == total",
        "w = tl.where(right, w, tl.where(lane < size, 1.0, 0.0))",
        "total = tl.where(right, total, size.to(tl.float64))",
    ]
    if form.adaptive:
        loop += [
            "effective = total * total / tl.sum(w * w, 0)",
            "did = effective < limit.to(tl.float64, bitcast=True)",
            "tl.store(done + row, did.to(tl.uint8))",
            "kept = tl.load(logw + first + lane, mask=lane < tl.where(did, 0, size), other=0.0)",
            "tl.store(fresh + first + lane, kept, mask=lane < size)",
        ]
    own = "tl.load(u + row.to(tl.int64) * n + tl.minimum(tl.maximum(k, 0), n - 1))" if form.strata else "v"
    loop += [
        f"above = (total.to(tl.int64, bitcast=True) & {0x7FF0000000000000}).to(tl.float64, bitcast=True) * 2.0",
        "w = (w + above) - above",
        "total = tl.sum(w, 0)",
        "rate = share / total",
        *([] if form.strata else ["v = tl.load(u + row)"]),
        "c = tl.cumsum(w, 0)",
        "p = c - w",  # exact: what c is at the particle before
    ]
    for name, place in (("end", "c"), ("begin", "p")):
        loop += [
            f"k, rest = stratum({place} * rate)",
            f"{name} = tl.where({place} >= total, n, tl.minimum(k + (({own}) < rest).to(tl.int32), n))",
        ]
    loop += [
        "tl.debug_barrier()",  # all have read the marks of the system before
        "tl.store(mine + begin, base + lane, mask=end > begin)",
        "tl.debug_barrier()",
        "line = row.to(tl.int64) * n",
        "a = tl.maximum(tl.associative_scan(tl.load(mine + lane), 0, larger), base) - base",
        *(["a = tl.where(did, a, lane)"] if form.adaptive else []),
        "tl.store(ancestors + line + lane, a.to(tl.int64), mask=lane < n)",
    ]
    if form.columns == 1:
        loop += [
            "state = tl.load(x + first + a, mask=lane < n, other=0)",
            "tl.store(out + line + lane, state, mask=lane < n)",
        ]
    elif form.columns:
        loop += moves(chunk, form.columns)
    loop += ["row += tl.num_programs(0)"]
    return [*lines, "while row < rows:", *(f"    {line}" for line in loop)]
