"""APG's update on a GPU: two launches, nothing decided on the host, each sum in the same order every time.

``sums`` reads both outputs, adds the momentum, and leaves ``|d|^2``, ``<d, c>`` and ``|c|^2`` of each program's share of a row; a
row is a sample, or one of its channels. ``made`` adds these up, which each of its programs does for its own row, and combines.
Where nothing has to be summed ``made`` is alone.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from polyak.core.launch import Launcher, build, function, is_elsewhere
from polyak.generate.update import _looked_at

BLOCK = 1024  # elements that a program has in registers
PARTS = 512  # programs of a row, at most: each sums what all of them left
LONGEST = 2**30  # elements of a row: places within one are 32-bit numbers
_WARPS = 4
_launch = Launcher()


class Pair(NamedTuple):
    """Two outputs, and the numbers that lead from them to what is guided: ``a x + b output``; no x: ``b output``."""

    cond: Tensor
    uncond: Tensor
    x: Tensor | None = None
    a: float = 0.0
    b: float = 1.0


class How(NamedTuple):
    """What is made: ``base + gain (d_orth + eta d_par)`` of the d that is no longer than r, if r > 0."""

    gain: float
    eta: float
    r: float
    of_uncond: bool = False  # the base, else it is the conditional one
    channels: bool = False  # projected by itself is each channel, else each sample
    rescale: float = 0.0


class _Form(NamedTuple):
    """What the kernels' text depends on."""

    x: bool
    memory: bool
    keeps: bool
    capped: bool
    projected: bool
    of_uncond: bool
    block: int


def guided(
    pair: Pair, memory: Tensor | None, beta: float, keeps: bool, how: How, dtype: torch.dtype
) -> tuple[Tensor, Tensor | None] | None:
    """What is made, and ``d + beta memory`` in float32 if it is to be kept; None where the kernels may not take it.

    They take plain tensors on a GPU, of at most single precision, of one shape and layout, that autograd need not see; and no
    rescaling.
    """
    cond, uncond, x, a, b = pair
    if how.rescale or not _on_gpu(cond):
        return None
    tensors = [cond, uncond]
    if x is not None:
        tensors.append(x)
    if memory is not None:
        tensors.append(memory)
    seen = _looked_at(tensors)
    if seen is None or (how.channels and not cond.is_contiguous()):
        return None
    if is_elsewhere(seen[1]):
        with torch.cuda.device(seen[1]):
            return guided(pair, memory, beta, keeps, how, dtype)
    shape = cond.shape
    channels = shape[1] if how.channels else 1
    rows = shape[0] * channels
    size = seen[0] // rows
    if size > LONGEST:
        return None
    block, blocks, turns = _split(size)
    capped, projected = how.r > 0, how.eta != 1
    form = _Form(x is not None, memory is not None, keeps, capped, projected, how.of_uncond, block)
    made = torch.empty_like(cond, dtype=dtype)
    tensors.append(made)
    average = None
    if keeps:
        average = torch.empty_like(cond, dtype=torch.float32)
        tensors.append(average)
    programs, summed = rows * blocks, capped or projected
    if summed:
        tensors.append(torch.empty((3 if projected else 1) * programs, dtype=torch.float32, device=cond.device))
    numbers = float(a), float(b), float(beta), float(how.gain), 1.0 - how.eta, float(how.r)
    given = (*tensors, *numbers, size, blocks, turns, channels)
    # Where addresses are not all aligned, Triton has to look at each of them at every launch.
    key = (form, seen, dtype, rows, channels) if seen[3] else None
    if summed:
        _launch(lambda: _kernels(form)["sums"], programs, given, _WARPS, key and ("sums", key))
    _launch(lambda: _kernels(form)["made"], programs, given, _WARPS, key and ("made", key))
    return made, average


def _on_gpu(x: Tensor) -> bool:
    return x.is_cuda


@cache
def _split(size: int) -> tuple[int, int, int]:
    """A row's elements as (elements at a time, programs, times of each program)."""
    block = min(BLOCK, max(32, 1 << (size - 1).bit_length()))
    pieces = -(-size // block)
    turns = -(-pieces // PARTS)
    return block, -(-pieces // turns), turns


@cache
def _kernels(form: _Form) -> dict[str, Any]:
    arguments = ["cond", "uncond", *["x"] * form.x, *["memory"] * form.memory, "out", *["average"] * form.keeps]
    summed = form.capped or form.projected
    arguments += ["parts"] * summed
    arguments += ["a", "b", "beta", "gain", "rest", "r", "size", "blocks", "turns", "channels"]
    text = function("sums", arguments, _sums(form)) if summed else ""
    return build(text + "\n\n" + function("made", arguments, _made(form, stored=form.keeps and summed)))


_PLACE = ["pid = tl.program_id(0)", "row = pid // blocks", "share = pid % blocks", "first = row.to(tl.int64) * size"]
_ZERO = "tl.zeros(({},), tl.float32)"


def _elements(form: _Form, wanted: str, stored: bool) -> list[str]:
    """Reads those of c, u and d that are wanted."""
    names = {"c": "cond", "u": "uncond", "x": "x", "m": "memory", "s": "average"}
    fresh = "d" in wanted and not stored
    read = [n for n in "cu" if n in wanted or fresh]
    read += ["x"] if form.x and ("c" in wanted or "u" in wanted) else []
    read += ["s"] if "d" in wanted and stored else ["m"] if fresh and form.memory else []
    lines = [
        f"at = (share * turns + i) * {form.block} + tl.arange(0, {form.block})",
        "inside = at < size",
        "at = first + at",
        *(f"o_{n} = tl.load({names[n]} + at, mask=inside, other=0.0).to(tl.float32)" for n in read),
    ]
    lines += [f"{n} = " + ("a * o_x + " if form.x else "") + f"b * o_{n}" for n in "cu" if n in wanted]
    if fresh:
        lines.append("d = b * (o_c - o_u)" + (" + beta * o_m" if form.memory else ""))
        lines += ["tl.store(average + at, d, mask=inside)"] if form.keeps else []
    elif "d" in wanted:
        lines.append("d = o_s")
    return lines


def _loop(lines: list[str]) -> list[str]:
    return ["for i in range(turns):", *(f"    {line}" for line in lines)]


def _sums(form: _Form) -> list[str]:
    terms = {"dd": "d * d"} if form.capped else {}
    terms |= {"dc": "d * c", "cc": "c * c"} if form.projected else {}
    lines = _elements(form, "cd" if form.projected else "d", stored=False)
    lines += [f"{name} += {term}" for name, term in terms.items()]
    left = {"dc": 0, "cc": 1, "dd": 2} if form.projected else {"dd": 0}
    stores = [f"tl.store(parts + {left[name]} * programs + pid, tl.sum({name}, 0))" for name in terms]
    zeros = [f"{name} = " + _ZERO.format(form.block) for name in terms]
    return [*_PLACE, "programs = tl.num_programs(0).to(tl.int64)", *zeros, *_loop(lines), *stores]


def _made(form: _Form, stored: bool) -> list[str]:
    lines = [*_PLACE, "weight = gain"]
    if form.capped or form.projected:
        lines.append("programs = tl.num_programs(0).to(tl.int64)")
    if form.capped:
        lines += [
            "many = channels * blocks",
            f"begin = parts + {2 * form.projected} * programs + (row // channels) * many",
            f"dd = {_ZERO.format(PARTS)}",
            f"for i in range(0, many, {PARTS}):",
            f"    k = i + tl.arange(0, {PARTS})",
            "    dd += tl.load(begin + k, mask=k < many, other=0.0)",
            "norm = tl.sqrt(tl.sum(dd, 0))",
            "weight = gain * (r / tl.where(norm <= r, r, norm))",
        ]
    if form.projected:
        lines += [
            f"k = tl.arange(0, {PARTS})",
            *(
                f"{name} = tl.sum(tl.load(parts + {i} * programs + row * blocks + k, mask=k < blocks, other=0.0), 0)"
                for i, name in enumerate(("dc", "cc"))
            ),
            "along = rest * weight * (dc / tl.where(cc == 0.0, 1.0, cc))",  # nothing is parallel to what is 0
        ]
    base = "u" if form.of_uncond else "c"
    loop = _elements(form, f"{base}d" + "c" * (form.projected and form.of_uncond), stored)
    loop += [f"y = {base} + weight * d" + (" - along * c" if form.projected else "")]
    loop += ["tl.store(out + at, y.to(out.dtype.element_ty), mask=inside)"]
    return [*lines, *_loop(loop)]
