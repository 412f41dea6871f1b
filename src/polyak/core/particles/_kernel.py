"""A resampling step of many systems as one launch: systematic or stratified, with states moved and weights reset.

A program takes one system after another. It has the system's log-weights in registers, in pieces of ``chunk``; exponents,
sums and cumulative sums are double precision, rounded as in ``_schemes``, so that the sums are exact. A particle i with offspring
leaves i where its first one stands, in a row of the program's own that stays in the cache; the largest mark up to a slot is the
slot's ancestor. Marks of earlier systems are smaller, so that the row needs no clearing.
"""

from __future__ import annotations

import math
import struct
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from polyak.core.launch import Launcher, available, build, function, is_elsewhere

CHUNK = 2048  # particles that a program has at a time
PIECES = 8  # of them at most, for what a program's registers hold
WARPS = 8
PROGRAMS = {1: 8, 2: 4}  # on each multiprocessor, by pieces; of more pieces:
MANY = 2
COLUMNS = 32  # words of a row that are moved at a time
REGISTERS = 0  # of a thread, at most; 0: as the compiler likes
SCHEMES = ("systematic", "stratified")
_launch = Launcher()
_WORDS = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.int8}


class _Form(NamedTuple):
    """What the kernel's text depends on."""

    chunk: int
    pieces: int  # of particles
    slots: int  # pieces of what is drawn
    strata: bool  # each with its own uniform
    adaptive: bool
    columns: int  # of states that are moved: 0: none are; 1: a word each


class Stepped(NamedTuple):
    """What a step made; x if it was moved with it; ``logw`` and ``did`` of an adaptive one alone."""

    ancestors: Tensor
    x: Tensor | None = None
    logw: Tensor | None = None
    did: Tensor | None = None


def stepped(
    logw: Tensor, n: int, scheme: str, u: Tensor | None, *, threshold: float | None = None, x: Tensor | None = None
) -> Stepped | None:
    """Ancestors, and what goes with them; None where the kernel may not take these tensors.

    Args:
        logw: (*batch, N), float64; not differentiated. u: (*batch) or (*batch, n), float64.
        threshold: in (0, 1]; then n is N, and systems whose effective sample size is not below it stay as they are.
        x: (*batch, N, *event), to be moved; it stays where it is if the kernel may not take it.
    """
    size = logw.shape[-1]
    if u is None or scheme not in SCHEMES or not _takes(logw, size, n) or not _plain(u):
        return None
    place = logw.get_device()
    if is_elsewhere(place):
        with torch.cuda.device(place):
            return stepped(logw, n, scheme, u, threshold=threshold, x=x)
    moves = (
        None if x is None or not _plain(x) or (x.requires_grad and torch.is_grad_enabled()) else _words(x, logw.ndim)
    )
    logw, u = logw.contiguous(), u.contiguous()
    rows = logw.numel() // size
    chunk = _chunk(max(size, n))
    form = _Form(chunk, -(-size // chunk), -(-n // chunk), scheme == "stratified", threshold is not None, 0)
    programs = min(rows, _multiprocessors(place) * PROGRAMS.get(max(form.pieces, form.slots), MANY))
    if -(-rows // programs) * form.pieces * chunk >= 2**31 - form.pieces * chunk:
        return None
    scratch = torch.empty(programs * form.slots * chunk, dtype=torch.int32, device=logw.device)
    ancestors = torch.empty((*logw.shape[:-1], n), dtype=torch.int64, device=logw.device)
    given: list[Any] = [logw, u, scratch, ancestors]
    fresh = did = out = None
    limit = 0
    if threshold is not None:
        fresh, did = torch.empty_like(logw), torch.empty(logw.shape[:-1], dtype=torch.bool, device=logw.device)
        given += [fresh, did.view(torch.uint8)]
        # All systems are resampled where the limit is infinite.
        limit = _bits(math.inf if threshold == 1 else threshold * size)
    words = 1
    if moves is not None and x is not None:
        words = moves.shape[-1]
        form = form._replace(columns=min(COLUMNS, 1 << (words - 1).bit_length()))
        out = x.new_empty((*logw.shape[:-1], n, *x.shape[logw.ndim :]))
        given += [moves, out.view(-1).view(moves.dtype)]
    given += [rows, size, n, words, limit]
    aligned = all(t.data_ptr() % 16 == 0 for t in given if isinstance(t, Tensor))
    key = (
        (form, place, programs, rows, size, n, words, limit, None if moves is None else moves.dtype)
        if aligned
        else None
    )
    warps = WARPS if chunk > 1024 else 4
    _launch(lambda: _kernel(form), programs, given, warps, key, **({"maxnreg": REGISTERS} if REGISTERS else {}))
    return Stepped(ancestors, out, fresh, did)


def _takes(logw: Tensor, size: int, n: int) -> bool:
    fits = min(size, n) >= 2 and max(size, n) <= CHUNK * PIECES and logw.numel() > 0
    return fits and _plain(logw) and logw.dtype == torch.float64


def _plain(x: Tensor) -> bool:
    """Whether a tensor is on a GPU, and nobody but the kernel must see what is done with it."""
    core: Any = torch._C
    if torch.compiler.is_compiling() or not _on_gpu(x):
        return False
    watched = core._len_torch_dispatch_stack() or core._functorch.peek_interpreter_stack()
    return type(x) is Tensor and not watched and not x.is_neg()


def _on_gpu(x: Tensor) -> bool:
    return x.is_cuda and available(x.device)


@cache
def _multiprocessors(place: int) -> int:
    return torch.cuda.get_device_properties(place).multi_processor_count if place >= 0 else 1


def _chunk(most: int) -> int:
    return CHUNK if most > 1024 else max(32, 1 << (most - 1).bit_length())


def _bits(value: float) -> int:
    """A float64 as an integer: numbers are handed over in single precision."""
    return struct.unpack("<q", struct.pack("<d", value))[0]


def _words(x: Tensor, ndim: int) -> Tensor | None:
    """States as rows of the widest words that they are made of: (rows, words)."""
    if not x.is_contiguous() or x.is_conj() or (x.device.index is None and x.is_cuda):
        return None
    row = math.prod(x.shape[ndim:]) * x.element_size()
    if row == 0 or x.numel() == 0:
        return None
    size = next(
        s for s in _WORDS if row % s == 0 and x.data_ptr() % s == 0 and x.storage_offset() * x.element_size() % s == 0
    )
    if x.dtype == torch.bool:
        x = x.view(torch.uint8)
    return x.detach().view(-1).view(_WORDS[size]).view(-1, row // size)


@cache
def _kernel(form: _Form) -> Any:
    arguments = ["logw", "u", "scratch", "ancestors"]
    arguments += ["fresh", "done"] if form.adaptive else []
    arguments += ["x", "out"] if form.columns else []
    arguments += ["rows", "size", "n", "words", "limit"]
    text = "\n\n".join((_LARGER, _WEIGHT, _ENDS, function("step", arguments, _step(form))))
    return build(text)["step"]


_LARGER = function("larger", ["a", "b"], ["return tl.maximum(a, b)"])

# exp(d) for d <= 0 by exp(i ln 2) times a polynomial. The sum 1.5 2^52 + i has i in its last bits.
_MAGIC = 1.5 * 2.0**52
_LN2 = (0.693147180369123816490, 1.90821492927058770002e-10)
_TERMS = [1 / math.factorial(k) for k in range(13, -1, -1)]
_WEIGHT = function(
    "weight",
    ["d"],
    [
        f"t = d * {1 / math.log(2)!r} + {_MAGIC!r}",
        f"i = t - {_MAGIC!r}",
        f"f = d - i * {_LN2[0]!r}",
        f"f = f - i * {_LN2[1]!r}",
        f"p = {_TERMS[0]!r} * f + {_TERMS[1]!r}",
        *(f"p = p * f + {term!r}" for term in _TERMS[2:]),
        "p = (p.to(tl.int64, bitcast=True) + (t.to(tl.int64, bitcast=True) << 52)).to(tl.float64, bitcast=True)",
        "return tl.where(d <= -45.0, 0.0, p)",  # below the last place of any sum; NaN stays
    ],
)

# #{k: k + u < at}
_ENDS = function(
    "stratum",
    ["at"],
    [
        f"t = at + {_MAGIC!r}",
        "k = t.to(tl.int64, bitcast=True).to(tl.int32)",
        f"rest = at - (t - {_MAGIC!r})",
        "below = rest < 0.0",
        "return k - below.to(tl.int32), tl.where(below, rest + 1.0, rest)",
    ],
)


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
        loop += _moves(chunk, form.columns)
    loop += ["row += tl.num_programs(0)"]
    return [*lines, "while row < rows:", *(f"    {line}" for line in loop)]


def _moves(chunk: int, columns: int) -> list[str]:
    """Rows of several words: their ancestors are read again, from the cache."""
    height = max(chunk // columns, 1)
    inner = [
        "inside = (place < n)[:, None] & (column < words)[None, :]",
        "words_there = tl.load(x + ((first + origin) * words)[:, None] + column[None, :], mask=inside, other=0)",
        "tl.store(out + ((line + place) * words)[:, None] + column[None, :], words_there, mask=inside)",
        f"column += {columns}",
        f"start += {columns}",
    ]
    outer = [
        f"place = slot + tl.arange(0, {height})",
        "origin = tl.load(ancestors + line + place, mask=place < n, other=0)",
        f"column = tl.arange(0, {columns})",
        "start = row * 0",
        "while start < words:",
        *(f"    {line}" for line in inner),
        f"slot += {height}",
    ]
    return ["tl.debug_barrier()", "slot = row * 0", "while slot < n:", *(f"    {line}" for line in outer)]
