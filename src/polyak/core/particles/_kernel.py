"""A resampling step of many systems as one launch: systematic or stratified, with states moved and weights reset.

A program takes one system after another. It has the system's log-weights in registers, in pieces of ``chunk``; exponents,
sums and cumulative sums are double precision, rounded as in ``_schemes``, so that the sums are exact. A particle i with offspring
leaves i where its first one stands, in a row of the program's own that stays in the cache; the largest mark up to a slot is the
slot's ancestor. Marks of earlier systems are smaller, so that the row needs no clearing.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from polyak.core.launch import Launcher, build, function, is_elsewhere
from polyak.core.particles import _blocks
from polyak.core.particles._gpu import FUNCTIONS, Stepped, columns, given, moves, takes

CHUNK = 2048  # particles that a program has at a time
PIECES = 1  # of them at most: beyond it many programs for a system are faster (measured on an H200)
WARPS = 8
PROGRAMS = {1: 8, 2: 4}  # on each multiprocessor, by pieces; of more pieces:
MANY = 2
OPTIONS: dict[str, int] = {}  # of Triton's compiler
_launch = Launcher()


class _Form(NamedTuple):
    """What the kernel's text depends on."""

    chunk: int
    pieces: int  # of particles
    slots: int  # pieces of what is drawn
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
    if max(size, n) > CHUNK * PIECES:
        return _blocks.stepped(logw, n, scheme, u, threshold, x)
    rows = logw.numel() // size
    chunk = _chunk(max(size, n))
    made = given(logw, n, threshold, x)
    strata, adaptive = scheme == "stratified", threshold is not None
    form = _Form(chunk, -(-size // chunk), -(-n // chunk), strata, adaptive, columns(made.x))
    programs = min(rows, _multiprocessors(place) * PROGRAMS.get(max(form.pieces, form.slots), MANY))
    if -(-rows // programs) * form.pieces * chunk >= 2**31 - form.pieces * chunk:
        return None
    scratch = torch.empty(programs * form.slots * chunk, dtype=torch.int32, device=logw.device)
    tensors = [logw, u, scratch, *made.tensors()]
    numbers = rows, size, n, 1 if made.x is None else made.x.shape[-1], made.limit
    key = None
    if all(t.data_ptr() % 16 == 0 for t in tensors):
        key = form, place, programs, numbers, None if made.x is None else made.x.dtype
    _launch(lambda: _kernel(form), programs, (*tensors, *numbers), WARPS if chunk > 1024 else 4, key, **OPTIONS)
    return made.out


@cache
def _multiprocessors(place: int) -> int:
    return torch.cuda.get_device_properties(place).multi_processor_count if place >= 0 else 1


def _chunk(most: int) -> int:
    return CHUNK if most > 1024 else max(32, 1 << (most - 1).bit_length())


@cache
def _kernel(form: _Form) -> Any:
    arguments = ["logw", "u", "scratch", "ancestors"]
    arguments += ["fresh", "done"] if form.adaptive else []
    arguments += ["x", "out"] if form.columns else []
    arguments += ["rows", "size", "n", "words", "limit"]
    text = FUNCTIONS + "\n\n" + function("step", arguments, _step(form))
    return build(text)["step"]


def _each(pieces: int, *lines: str) -> list[str]:
    """Lines for every piece, with its number for {j}."""
    return [line.replace("{j}", str(j)) for j in range(pieces) for line in lines]


def _total(f: str, names: list[str]) -> str:
    """Nested calls of a function of two, or a sum."""
    return " + ".join(names) if f == "+" else _nested(f, names)


def _nested(f: str, names: list[str]) -> str:
    if len(names) == 1:
        return names[0]
    middle = len(names) // 2
    return f"{f}({_nested(f, names[:middle])}, {_nested(f, names[middle:])})"


def _step(form: _Form) -> list[str]:
    pieces, slots, chunk = form.pieces, form.slots, form.chunk
    w = [f"w{j}" for j in range(pieces)]
    lines = [
        f"lane = tl.arange(0, {chunk})",
        f"mine = scratch + tl.program_id(0).to(tl.int64) * {slots * chunk}",
        *_each(slots, f"tl.store(mine + ({{j}} * {chunk} + lane), tl.zeros([{chunk}], tl.int32))"),
        "row = tl.program_id(0)",
        "base = row * 0",
        "share = n.to(tl.float64)",
    ]
    loop = [
        f"base += {pieces * chunk}",
        "first = row.to(tl.int64) * size",
        *_each(pieces, f"i{{j}} = {{j}} * {chunk} + lane"),
        *_each(pieces, 'w{j} = tl.load(logw + first + i{j}, mask=i{j} < size, other=float("-inf"))'),
        f"top = tl.max({_nested('tl.maximum', w)}, 0)",
        # An atom at +inf, and a system without weight, are equal to the largest.
        *_each(pieces, "w{j} = weight(tl.where(w{j} == top, 0.0, w{j} - top))"),
        *_each(pieces, "w{j} = tl.where(i{j} < size, w{j}, 0.0)"),
        f"total = tl.sum({' + '.join(w)}, 0)",
        "right = total == total",
        *_each(pieces, "w{j} = tl.where(right, w{j}, tl.where(i{j} < size, 1.0, 0.0))"),
        "total = tl.where(right, total, size.to(tl.float64))",
    ]
    if form.adaptive:
        loop += [
            f"squares = tl.sum({' + '.join(f'{v} * {v}' for v in w)}, 0)",
            "effective = total * total / squares",
            "did = effective < limit.to(tl.float64, bitcast=True)",
            "staying = tl.where(did, 0, size)",
            "tl.store(done + row, did.to(tl.uint8))",
            *_each(
                pieces,
                "kept = tl.load(logw + first + i{j}, mask=i{j} < staying, other=0.0)",
                "tl.store(fresh + first + i{j}, kept, mask=i{j} < size)",
            ),
        ]
    loop += [
        f"above = (total.to(tl.int64, bitcast=True) & {0x7FF0000000000000}).to(tl.float64, bitcast=True) * 2.0",
        *_each(pieces, "w{j} = (w{j} + above) - above"),
        f"total = tl.sum({' + '.join(w)}, 0)",
        "rate = share / total",
        "before = total * 0.0",
    ]
    own = "tl.load(u + row.to(tl.int64) * n + tl.minimum(tl.maximum({k}, 0), n - 1))" if form.strata else "v"
    loop += [] if form.strata else ["v = tl.load(u + row)"]
    if slots:
        loop += ["tl.debug_barrier()"]  # all have read the marks of the system before
    loop += _each(
        pieces,
        "c = before + tl.cumsum(w{j}, 0)",
        "before += tl.sum(w{j}, 0)",
        "p = c - w{j}",  # exact: what c is at the particle before
        "k, rest = stratum(c * rate)",
        f"end = tl.where(c >= total, n, tl.minimum(k + (({own.format(k='k')}) < rest).to(tl.int32), n))",
        "k, rest = stratum(p * rate)",
        f"begin = tl.where(p >= total, n, tl.minimum(k + (({own.format(k='k')}) < rest).to(tl.int32), n))",
        "tl.store(mine + begin, base + i{j}, mask=end > begin)",
    )
    loop += [
        "tl.debug_barrier()",
        "line = row.to(tl.int64) * n",
        "most = base",
        *_each(
            slots,
            f"k{{j}} = {{j}} * {chunk} + lane",
            "mark = tl.load(mine + k{j})",
            "a{j} = tl.maximum(tl.associative_scan(mark, 0, larger), most) - base",
            "most = tl.maximum(most, tl.max(mark, 0))",
        ),
    ]
    if form.adaptive:
        loop += _each(slots, "a{j} = tl.where(did, a{j}, k{j})")
    loop += _each(slots, "tl.store(ancestors + line + k{j}, a{j}.to(tl.int64), mask=k{j} < n)")
    if form.columns == 1:
        loop += _each(slots, "state{j} = tl.load(x + first + a{j}, mask=k{j} < n, other=0)")
        loop += _each(slots, "tl.store(out + line + k{j}, state{j}, mask=k{j} < n)")
    elif form.columns:
        loop += moves(chunk, form.columns)
    loop += ["row += tl.num_programs(0)"]
    return [*lines, "while row < rows:", *(f"    {line}" for line in loop)]
