"""Resampling of more particles than a program holds, in three launches: many programs share a system.

``parts`` leaves each piece's largest log-weight and its sums; ``joined`` makes of them, for every system, where in the n slots each
piece begins; ``drawn`` reads the log-weights again and writes a piece's share of slots. Pieces are rounded by themselves, such that
sums within one are exact, and so are the sums of pieces. A piece's share is what lies between its edges, whatever rounds.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from polyak.core.launch import Launcher, build, function
from polyak.core.particles._gpu import FUNCTIONS, Stepped, columns, given, moves

CHUNK = 256  # particles of a program, which is one warp: small ones hide each other's waiting
LONG = 2**20  # systems of more have pieces of eight times as many: one program holds what all pieces left
MOST = 2**24
_launch = Launcher()


class _Form(NamedTuple):
    """What the kernels' text depends on."""

    chunk: int
    width: int  # at least as many as there are pieces
    strata: bool
    adaptive: bool
    columns: int


def stepped(logw: Tensor, n: int, scheme: str, u: Tensor, threshold: float | None, x: Tensor | None) -> Stepped | None:
    """As ``_kernel.stepped``, of tensors that a kernel may take."""
    size = logw.shape[-1]
    chunk = CHUNK if size <= LONG else 8 * CHUNK
    rows, pieces = logw.numel() // size, -(-size // chunk)
    if max(size, n) > MOST or rows * pieces >= 2**31:
        return None
    made = given(logw, n, threshold, x)
    form = _Form(chunk, 1 << (pieces - 1).bit_length(), scheme == "stratified", threshold is not None, columns(made.x))
    device, wide = logw.device, torch.float64
    parts = torch.empty(rows * pieces * 3, dtype=wide, device=device)
    edges = torch.empty(rows * (pieces + 1), dtype=wide, device=device)
    equal = torch.empty(rows, dtype=torch.int32, device=device)
    marks = torch.empty(rows * n, dtype=torch.int32, device=device)
    tensors = made.tensors()
    did = tensors[2:3] if form.adaptive else []
    words = 1 if made.x is None else made.x.shape[-1]
    place = logw.get_device()
    key = None
    if all(t.data_ptr() % 16 == 0 for t in (logw, u, *tensors)):
        key = form, place, rows, size, n, words, made.limit, None if made.x is None else made.x.dtype
    _run("parts", form, rows * pieces, (logw, parts, size, pieces), key)
    _run("joined", form, rows, (parts, edges, equal, *did, size, n, pieces, made.limit), key)
    _run("drawn", form, rows * pieces, (logw, u, edges, equal, marks, *tensors, size, n, pieces, words), key)
    return made.out


def _run(name: str, form: _Form, programs: int, arguments: Any, key: Any) -> None:
    lanes = form.width // 4 if name == "joined" else form.chunk // 8
    warps = min(8, max(1, lanes // 32))
    _launch(lambda: _kernels(form)[name], programs, arguments, warps, key and (name, key))


@cache
def _kernels(form: _Form) -> dict[str, Any]:
    done = ["done"] * form.adaptive
    parts = function("parts", ["logw", "parts", "size", "pieces"], _parts(form))
    joined = ["parts", "edges", "equal", *done, "size", "n", "pieces", "limit"]
    drawn = ["logw", "u", "edges", "equal", "marks", "ancestors", *["fresh"] * form.adaptive, *done]
    drawn += ["x", "out"] if form.columns else []
    drawn += ["size", "n", "pieces", "words"]
    texts = (FUNCTIONS, parts, function("joined", joined, _joined(form)), function("drawn", drawn, _drawn(form)))
    return build("\n\n".join(texts))


def _piece(form: _Form) -> list[str]:
    """A piece's weights over its own largest."""
    return [
        "pid = tl.program_id(0)",
        "row = pid // pieces",
        "piece = pid % pieces",
        f"lane = tl.arange(0, {form.chunk})",
        f"i = piece * {form.chunk} + lane",
        "first = row.to(tl.int64) * size",
        'l = tl.load(logw + first + i, mask=i < size, other=float("-inf"))',
        "top = tl.max(l, 0)",
        "w = weight(tl.where(l == top, 0.0, l - top))",
        "w = tl.where(i < size, w, 0.0)",
    ]


def _parts(form: _Form) -> list[str]:
    return [
        *_piece(form),
        "at = parts + pid.to(tl.int64) * 3",
        "tl.store(at, top)",
        "tl.store(at + 1, tl.sum(w, 0))",
        "tl.store(at + 2, tl.sum(w * w, 0))",
    ]


_ROUNDED = f"above = (total.to(tl.int64, bitcast=True) & {0x7FF0000000000000}).to(tl.float64, bitcast=True) * 2.0"


def _joined(form: _Form) -> list[str]:
    lines = [
        "row = tl.program_id(0)",
        f"b = tl.arange(0, {form.width})",
        "at = parts + (row.to(tl.int64) * pieces + b) * 3",
        'tops = tl.load(at, mask=b < pieces, other=float("-inf"))',
        "s = tl.load(at + 1, mask=b < pieces, other=0.0)",
        "top = tl.max(tops, 0)",
        "scale = weight(tl.where(tops == top, 0.0, tops - top))",
        "s = s * scale",
        "total = tl.sum(s, 0)",
        "wrong = total != total",
        "same = tl.where(wrong, 1, 0)",
    ]
    if form.adaptive:
        lines += [
            "squares = tl.load(at + 2, mask=b < pieces, other=0.0)",
            "effective = total * total / tl.sum(squares * scale * scale, 0)",
            "effective = tl.where(wrong, size.to(tl.float64), effective)",
            "did = effective < limit.to(tl.float64, bitcast=True)",
            "tl.store(done + row, did.to(tl.uint8))",
            "same = tl.where(did, same, 1)",
        ]
    return [
        *lines,
        "total = tl.where(wrong, 1.0, total)",
        _ROUNDED,
        "s = (s + above) - above",
        "total = tl.sum(s, 0)",
        "c = tl.cumsum(s, 0)",
        "share = n.to(tl.float64)",
        "edge = tl.where(c >= total, share, tl.minimum(c * (share / total), share))",
        f"ends = tl.minimum((b + 1) * {form.chunk}, size).to(tl.float64) * (share / size.to(tl.float64))",
        "edge = tl.where(same != 0, ends, edge)",
        "line = edges + row.to(tl.int64) * (pieces + 1)",
        "tl.store(line + 1 + b, edge, mask=b < pieces)",
        "tl.store(line, 0.0)",
        "tl.store(equal + row, same)",
    ]


def _drawn(form: _Form) -> list[str]:
    own = "tl.load(u + line + tl.minimum(tl.maximum(k, 0), n - 1))" if form.strata else "v"
    end = f"tl.minimum(tl.maximum(k + (({own}) < rest).to(tl.int32), 0), n)"
    lines = [
        *_piece(form),
        "line = row.to(tl.int64) * n",
        "same = tl.load(equal + row)",
        "w = tl.where(same != 0, tl.where(i < size, 1.0, 0.0), w)",
        "at = edges + row.to(tl.int64) * (pieces + 1) + piece",
        "low = tl.load(at)",
        "high = tl.load(at + 1)",
        *([] if form.strata else ["v = tl.load(u + row)"]),
        "k, rest = stratum(low)",
        f"begins = {end}",
        "k, rest = stratum(high)",
        f"stops = {end}",
        "stops = tl.where(piece == pieces - 1, n, stops)",
        "total = tl.sum(w, 0)",
        _ROUNDED,
        "w = (w + above) - above",
        "total = tl.sum(w, 0)",
        "rate = (high - low) / total",
        "c = tl.cumsum(w, 0)",
        "p = c - w",  # exact: what c is at the particle before
    ]
    for name, place in (("end", "c"), ("begin", "p")):
        lines += [
            f"k, rest = stratum(low + {place} * rate)",
            f"{name} = tl.minimum(tl.maximum({end}, begins), stops)",
            f"{name} = tl.where({place} <= 0.0, begins, tl.where({place} >= total, stops, {name}))",
        ]
    slots = ["slot = begins", "while slot < stops:"]
    lines += [
        *slots,
        "    tl.store(marks + line + slot + lane, lane * 0, mask=slot + lane < stops)",
        f"    slot += {form.chunk}",
        "tl.debug_barrier()",
        "tl.store(marks + line + begin, i, mask=end > begin)",
        "tl.debug_barrier()",
        f"most = piece * {form.chunk}",
        *slots,
        "    own = slot + lane",
        "    mark = tl.load(marks + line + own, mask=own < stops, other=0)",
        "    a = tl.maximum(tl.associative_scan(mark, 0, larger), most)",
        "    most = tl.maximum(most, tl.max(mark, 0))",
        "    tl.store(ancestors + line + own, a.to(tl.int64), mask=own < stops)",
    ]
    if form.columns == 1:
        lines += [
            "    state = tl.load(x + first + a, mask=own < stops, other=0)",
            "    tl.store(out + line + own, state, mask=own < stops)",
        ]
    lines += [f"    slot += {form.chunk}"]
    if form.adaptive:
        lines += [
            "staying = tl.where(tl.load(done + row) != 0, 0, size)",
            "tl.store(fresh + first + i, tl.where(i < staying, l, 0.0), mask=i < size)",
        ]
    if form.columns > 1:
        lines += moves(form.chunk, form.columns, "begins", "stops")
    return lines
