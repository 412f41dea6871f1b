"""One step of any linear solver: the next state, as a linear combination of tensors in one pass over memory.

What a step makes of its inputs, with all weights known before as numbers:

    value = a x + b o                                  what the solver remembers of a prediction
    mean  = w_x x + w_o o + sum_i w_i r_i              x, o: the point and the network's output there
    next  = mean + std z

and, for whoever asks, further combinations: of x and o alone, and of all that the mean is made of. On a GPU this is a single
Triton launch; elsewhere, and for whatever the kernel cannot take, a few calls of PyTorch.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from polyak.core.launch import Launcher, available, build, function, is_elsewhere

BLOCK = 1024
_WARPS = 4
_KINDS = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
_LOW = (torch.float16, torch.bfloat16)
_launch = Launcher()


@dataclass(slots=True)
class Update:
    """What :func:`advance` made: the next state, the remembered value (or None), the mean where noise was added, and what else
    was asked for."""

    next: Tensor
    value: Tensor | None = None
    mean: Tensor | None = None
    also: tuple[Tensor, ...] = ()
    mixed: tuple[Tensor, ...] = ()


def combine(*terms: tuple[float, Tensor]) -> Tensor:
    """``sum c_i x_i`` as a new tensor of the first one's dtype, with as few passes over memory as there are terms."""
    used = [(c, x) for c, x in terms if c]
    if not used:
        return torch.zeros_like(terms[0][1])
    dtype = terms[0][1].dtype
    # One whose weight is 1 goes first: it needs no multiplication.
    first = next((i for i, (c, x) in enumerate(used) if c == 1.0 and x.dtype == dtype), 0)
    c, x = used.pop(first)
    if x.dtype != dtype:
        x = x.to(dtype)
    if c == 1.0:
        if not used:
            return x.clone()
        (c, y), *used = used
        total = torch.add(x, y if y.dtype == dtype else y.to(dtype), alpha=c)
    else:
        total = x * c
    for c, x in used:
        total.add_(x, alpha=c)
    return total


def advance(
    x: Tensor,
    output: Tensor,
    of_x: float,
    of_output: float,
    rest: Sequence[tuple[float, Tensor]] = (),
    *,
    value: tuple[float, float] | None = None,
    noise: tuple[float, Tensor] | None = None,
    mean: bool = True,
    also: Sequence[tuple[float, float]] = (),
    mixed: Sequence[Sequence[float]] = (),
) -> Update:
    """``of_x x + of_output output + sum c r``, with x's dtype and shape.

    Args:
        x, output: the point of the evaluation and what the network said there.
        of_x, of_output: their weights.
        rest: further weights and tensors of x's shape.
        value: ``(a, b)``: also make ``a x + b output``, a tensor of its own even where it is one of them.
        noise: ``(std, z)``: add ``std z``.
        mean: whether what the noise is added to is wanted, too.
        also: further ``(a, b)``, as of the value.
        mixed: further combinations, each by its weights of (x, output, *rest); what a row leaves out weighs 0.
    """
    alone = not rest and value is None and noise is None and not also and not mixed
    if alone and of_x == 1.0 and (output.dtype == x.dtype or output.dtype in _LOW):
        return Update(torch.add(x, output, alpha=of_output))
    if mixed:
        rows = [(*row, *[0.0] * (2 + len(rest) - len(row))) for row in mixed]
        used = [i for i, (c, _) in enumerate(rest) if c or any(row[2 + i] for row in rows)]
        rest = [rest[i] for i in used]
        rows = [(*row[:2], *(row[2 + i] for i in used)) for row in rows]
    else:
        rest, rows = [(c, r) for c, r in rest if c], ()
    if x.is_cuda:
        tensors = [x, output, *[r for _, r in rest], *([] if noise is None else [noise[1]])]
        seen = _looked_at(tensors)
        if seen is not None:
            numbers = [of_x, of_output, *[c for c, _ in rest]]
            kept = also if value is None else (value, *also)
            made = _fused(tensors, seen, numbers, kept, None if noise is None else noise[0], mean, rows)
            if value is not None:
                made.value, *more = made.also
                made.also = tuple(more)
            return made
    value_of = None if value is None else combine((value[0], x), (value[1], output))
    others = tuple(combine((a, x), (b, output)) for a, b in also)
    past = [r for _, r in rest]
    mixes = tuple(combine(*zip(row, (x, output, *past), strict=True)) for row in rows)
    middle = combine((of_x, x), (of_output, output), *rest)
    if noise is None:
        return Update(middle, value_of, None, others, mixes)
    std, z = noise
    return Update(torch.add(middle, z, alpha=std), value_of, middle if mean else None, others, mixes)


def _looked_at(tensors: Sequence[Tensor]) -> tuple[int, ...] | None:
    """What a launch on these depends on; None where the kernel may not take them.

    It takes plain tensors of one device, shape and layout that autograd need not see.
    """
    x = tensors[0]
    if torch.compiler.is_compiling() or not available(x.device) or _watched():
        return None
    size, device, shape, keep = x.numel(), x.device, x.shape, torch.is_grad_enabled()
    packed, strides = x.is_contiguous(), x.stride()
    if size == 0 or not (packed or (x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last))):
        return None
    kinds = bits = 0
    for t in tensors:
        kind = _KINDS.get(t.dtype)
        if kind is None or not (type(t) is Tensor or type(t) is torch.nn.Parameter):
            return None
        if t.shape != shape or t.device != device or t.is_neg() or (keep and t.requires_grad):
            return None
        if not (t.is_contiguous() if packed else t.stride() == strides):
            return None
        kinds = 3 * kinds + kind
        bits |= t.data_ptr()
    return size, x.get_device(), kinds, bits % 16 == 0


def _watched() -> bool:
    """Whether a mode or a transform (FakeTensorMode, vmap, grad) must see every operation."""
    core: Any = torch._C
    return bool(core._len_torch_dispatch_stack() or core._functorch.peek_interpreter_stack())


@cache
def _kernel(inputs: int, kept: int, noise: bool, mean: bool, mixed: int = 0) -> Any:
    names = [f"in{i}" for i in range(inputs + noise)]
    outputs = ["out", *(f"kept{i}" for i in range(kept)), *(f"mixed{i}" for i in range(mixed))]
    outputs += ["middle"] if mean else []
    pairs = [f"{name}{i}" for i in range(kept) for name in "ab"]
    rows = [f"u{i}_{j}" for i in range(mixed) for j in range(inputs)]
    numbers = [*(f"w{i}" for i in range(inputs)), *pairs, *rows, *(["std"] if noise else [])]
    lines = [
        f"at = tl.program_id(0).to(tl.int64) * {BLOCK} + tl.arange(0, {BLOCK})",
        "inside = at < size",
        *(f"x{i} = tl.load({name} + at, mask=inside).to(tl.float32)" for i, name in enumerate(names)),
        "mean = " + " + ".join(f"w{i} * x{i}" for i in range(inputs)),
    ]
    lines += [
        f"tl.store(kept{i} + at, (a{i} * x0 + b{i} * x1).to(kept{i}.dtype.element_ty), mask=inside)"
        for i in range(kept)
    ]
    for i in range(mixed):
        total = " + ".join(f"u{i}_{j} * x{j}" for j in range(inputs))
        lines.append(f"tl.store(mixed{i} + at, ({total}).to(mixed{i}.dtype.element_ty), mask=inside)")
    if mean:
        lines.append("tl.store(middle + at, mean.to(middle.dtype.element_ty), mask=inside)")
    if noise:
        lines.append(f"mean = mean + std * x{inputs}")
    lines.append("tl.store(out + at, mean.to(out.dtype.element_ty), mask=inside)")
    return build(function("advance", [*names, *outputs, *numbers, "size"], lines))["advance"]


def _fused(
    tensors: Sequence[Tensor],
    seen: tuple[int, ...],
    numbers: Sequence[float],
    kept: Sequence[tuple[float, float]],
    std: float | None,
    mean: bool,
    mixed: Sequence[Sequence[float]] = (),
) -> Update:
    x, (size, place, _, aligned) = tensors[0], seen
    if is_elsewhere(place):
        with torch.cuda.device(place):
            return _fused(tensors, seen, numbers, kept, std, mean, mixed)
    mean = mean and std is not None
    made = Update(torch.empty_like(x))
    made.also = tuple(torch.empty_like(x) for _ in kept)
    made.mixed = tuple(torch.empty_like(x) for _ in mixed)
    given: list[Any] = [*tensors, made.next, *made.also, *made.mixed]
    if mean:
        made.mean = torch.empty_like(x)
        given.append(made.mean)
    more = itertools.chain(*kept, *mixed)
    given += map(float, (*numbers, *more, *(() if std is None else (std,))))
    given.append(size)
    shape = len(numbers), len(kept), std is not None, mean, len(mixed)
    # Where addresses are not all aligned, Triton has to look at each of them at every launch.
    _launch(lambda: _kernel(*shape), -(-size // BLOCK), given, _WARPS, (seen, shape) if aligned else None)
    return made
