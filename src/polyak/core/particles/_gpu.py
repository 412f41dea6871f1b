"""What the kernels of resampling have in common: the text of their functions, and what they take."""

from __future__ import annotations

import math
import struct
from typing import Any, NamedTuple

import torch
from torch import Tensor

from polyak.core.launch import available, function

COLUMNS = 32  # words of a row that are moved at a time
WORDS = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.int8}


class Stepped(NamedTuple):
    """What a step made; x if it was moved with it; ``logw`` and ``did`` of an adaptive one alone."""

    ancestors: Tensor
    x: Tensor | None = None
    logw: Tensor | None = None
    did: Tensor | None = None


class Given(NamedTuple):
    """What a step writes, and the states that it moves, as rows of words; None where there are none."""

    out: Stepped
    x: Tensor | None
    limit: int  # the effective sample size below which a system is resampled, as the bits of a float64

    def tensors(self) -> list[Tensor]:
        """The arguments of a kernel: ancestors, [fresh, done], [x, out]."""
        ancestors, moved, fresh, did = self.out
        given = [ancestors]
        if fresh is not None and did is not None:
            given += [fresh, did.view(torch.uint8)]
        if self.x is not None and moved is not None:
            given += [self.x, moved.view(-1).view(self.x.dtype)]
        return given


def given(logw: Tensor, n: int, threshold: float | None, x: Tensor | None) -> Given:
    ancestors = torch.empty((*logw.shape[:-1], n), dtype=torch.int64, device=logw.device)
    fresh = did = moved = words = None
    limit = 0.0
    if threshold is not None:
        fresh, did = torch.empty_like(logw), torch.empty(logw.shape[:-1], dtype=torch.bool, device=logw.device)
        # All systems are resampled where the limit is infinite.
        limit = math.inf if threshold == 1 else threshold * logw.shape[-1]
    if x is not None and takes(x) and not (x.requires_grad and torch.is_grad_enabled()):
        words = words_of(x, logw.ndim)
    if words is not None and x is not None:
        moved = x.new_empty((*logw.shape[:-1], n, *x.shape[logw.ndim :]))
    # Numbers are handed over in single precision, integers as they are.
    bits = struct.unpack("<q", struct.pack("<d", limit))[0]
    return Given(Stepped(ancestors, moved, fresh, did), words, bits)


def takes(x: Tensor) -> bool:
    """Whether a tensor is on a GPU, and nobody but a kernel must see what is done with it."""
    return not torch.compiler.is_compiling() and _on_gpu(x) and is_plain(x)


def _on_gpu(x: Tensor) -> bool:
    return x.is_cuda and available(x.device)


_core: Any = torch._C
_modes, _transform = _core._len_torch_dispatch_stack, _core._functorch.peek_interpreter_stack


def is_plain(*tensors: Tensor) -> bool:
    """Whether nobody must see what is done with tensors: no mode, no transform, no trace."""
    if torch.compiler.is_compiling():
        return False
    for x in tensors:
        if type(x) is not Tensor or x.is_neg():
            return False
    return not (_modes() or _transform())


def word_of(x: Tensor, ndim: int) -> tuple[int, int] | None:
    """The bytes of the widest words that rows are made of, and how many of them a row is; None where they are not in one piece."""
    if not x.is_contiguous() or x.is_conj() or x.numel() == 0:
        return None
    row = math.prod(x.shape[ndim:]) * x.element_size()
    whole = row | x.data_ptr() | int(x.storage_offset()) * x.element_size()
    size = min(whole & -whole, 8)  # the largest power of two that divides all three
    return size, row // size


def words_of(x: Tensor, ndim: int) -> Tensor | None:
    """States as rows of the widest words that they are made of: (rows, words)."""
    if (x.device.index is None and x.is_cuda) or (word := word_of(x, ndim)) is None:
        return None
    if x.dtype == torch.bool:
        x = x.view(torch.uint8)
    return x.detach().view(-1).view(WORDS[word[0]]).view(-1, word[1])


LARGER = function("larger", ["a", "b"], ["return tl.maximum(a, b)"])

# exp(d) for d <= 0 by exp(i ln 2) times a polynomial. The sum 1.5 2^52 + i has i in its last bits.
_MAGIC = 1.5 * 2.0**52
_LN2 = (0.693147180369123816490, 1.90821492927058770002e-10)
_TERMS = [1 / math.factorial(k) for k in range(13, -1, -1)]
WEIGHT = function(
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
STRATUM = function(
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


def columns(words: Tensor | None) -> int:
    """Of a row's words, how many are moved at a time."""
    return 0 if words is None else min(COLUMNS, 1 << (words.shape[-1] - 1).bit_length())


def moves(chunk: int, columns: int, start: str = "row * 0", stop: str = "n") -> list[str]:
    """Rows of several words: their ancestors are read again, from the cache."""
    height = max(chunk // columns, 1)
    inner = [
        f"inside = (place < {stop})[:, None] & (column < words)[None, :]",
        "words_there = tl.load(x + ((first + origin) * words)[:, None] + column[None, :], mask=inside, other=0)",
        "tl.store(out + ((line + place) * words)[:, None] + column[None, :], words_there, mask=inside)",
        f"column += {columns}",
        f"start += {columns}",
    ]
    outer = [
        f"place = slot + tl.arange(0, {height})",
        f"origin = tl.load(ancestors + line + place, mask=place < {stop}, other=0)",
        f"column = tl.arange(0, {columns})",
        "start = row * 0",
        "while start < words:",
        *(f"    {line}" for line in inner),
        f"slot += {height}",
    ]
    return ["tl.debug_barrier()", f"slot = {start}", f"while slot < {stop}:", *(f"    {line}" for line in outer)]


FUNCTIONS = "\n\n".join((LARGER, WEIGHT, STRATUM))
