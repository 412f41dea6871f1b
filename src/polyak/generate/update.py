"""One step of any linear solver: the next state, as a linear combination of tensors in one pass over memory.

What a step makes of its inputs, with all weights known before as numbers:

    value = a x + b o                                  what the solver remembers of a prediction
    mean  = w_x x + w_o o + sum_i w_i r_i              x, o: the point and the network's output there
    next  = mean + std z

On a GPU this is a single Triton launch; elsewhere, and for whatever the kernel cannot take, a few calls of PyTorch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from polyak.core.launch import Launcher, available, build, function

BLOCK = 1024
_WARPS = 4
_FEW = 2**20  # elements, which a GPU of today moves in less time than a launch takes the host
_STORED = {torch.float32: "tl.float32", torch.float16: "tl.float16", torch.bfloat16: "tl.bfloat16"}
_LOW = (torch.float16, torch.bfloat16)
_launch = Launcher()


@dataclass(slots=True)
class Update:
    """What :func:`advance` made: the next state, the remembered value (or None), and the mean where noise was added."""

    next: Tensor
    value: Tensor | None = None
    mean: Tensor | None = None


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
) -> Update:
    """``of_x x + of_output output + sum c r``, with x's dtype and shape.

    Args:
        x, output: the point of the evaluation and what the network said there.
        of_x, of_output: their weights.
        rest: further weights and tensors of x's shape.
        value: ``(a, b)``: also make ``a x + b output``, a tensor of its own even where it is one of them.
        noise: ``(std, z)``: add ``std z``, and give the mean, too.
    """
    alone = not rest and value is None and noise is None
    if alone and (output.dtype == x.dtype or output.dtype in _LOW) and _small(x, of_x):
        # The whole of a one-step method: no more than the arithmetic.
        if of_x == 1.0:
            return Update(torch.add(x, output, alpha=of_output))
        return Update(torch.mul(x, of_x).add_(output, alpha=of_output))
    rest = [(c, r) for c, r in rest if c]
    tensors = [x, output, *(r for _, r in rest), *(() if noise is None else (noise[1],))]
    if x.is_cuda and _suits(tensors):
        return _fused(tensors, [of_x, of_output, *(c for c, _ in rest)], value, None if noise is None else noise[0])
    made = None if value is None else combine((value[0], x), (value[1], output))
    mean = combine((of_x, x), (of_output, output), *rest)
    if noise is None:
        return Update(mean, made)
    std, z = noise
    return Update(torch.add(mean, z, alpha=std), made, mean)


def _small(x: Tensor, of_x: float) -> bool:
    """Whether two terms are sooner added up by PyTorch: one call, or two that cost the host less than a kernel's launch."""
    return not x.is_cuda or of_x == 1.0 or x.numel() <= _FEW


def _suits(tensors: Sequence[Tensor]) -> bool:
    """Whether the kernel may take these: plain tensors of one device, shape and layout that autograd need not see."""
    x = tensors[0]
    if torch.compiler.is_compiling() or not available(x.device) or _watched():
        return False
    shape, stride, device, keep = x.shape, x.stride(), x.device, torch.is_grad_enabled()
    packed = x.is_contiguous()
    if not packed and not (x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last)):
        return False
    for t in tensors:
        if type(t) is not Tensor and type(t) is not torch.nn.Parameter:
            return False
        if t.dtype not in _STORED or t.shape != shape or t.device != device or t.is_neg():
            return False
        if (keep and t.requires_grad) or (t.stride() != stride and not (packed and t.is_contiguous())):
            return False
    return x.numel() > 0


def _watched() -> bool:
    """Whether a mode or a transform (FakeTensorMode, vmap, grad) must see every operation."""
    core: Any = torch._C
    return bool(core._len_torch_dispatch_stack() or core._functorch.peek_interpreter_stack())


@cache
def _kernel(inputs: int, value: bool, noise: bool) -> Any:
    names = [f"in{i}" for i in range(inputs + noise)]
    outputs = ["out", *(["kept"] if value else []), *(["middle"] if noise else [])]
    numbers = [*(f"w{i}" for i in range(inputs)), *(["a", "b"] if value else []), *(["std"] if noise else [])]
    lines = [
        f"at = tl.program_id(0).to(tl.int64) * {BLOCK} + tl.arange(0, {BLOCK})",
        "inside = at < size",
        *(f"x{i} = tl.load({name} + at, mask=inside).to(tl.float32)" for i, name in enumerate(names)),
        "mean = " + " + ".join(f"w{i} * x{i}" for i in range(inputs)),
    ]
    if value:
        lines.append("tl.store(kept + at, (a * x0 + b * x1).to(kept.dtype.element_ty), mask=inside)")
    if noise:
        lines.append("tl.store(middle + at, mean.to(middle.dtype.element_ty), mask=inside)")
        lines.append(f"mean = mean + std * x{inputs}")
    lines.append("tl.store(out + at, mean.to(out.dtype.element_ty), mask=inside)")
    return build(function("advance", [*names, *outputs, *numbers, "size"], lines))["advance"]


_devices = cache(torch.cuda.device_count)


def _fused(tensors: list[Tensor], numbers: list[float], value: tuple[float, float] | None, std: float | None) -> Update:
    x = tensors[0]
    if x.is_cuda and _devices() > 1 and x.device.index != torch.cuda.current_device():
        with torch.cuda.device(x.device):  # Triton launches on the current device, whatever its arguments are on
            return _fused(tensors, numbers, value, std)
    kernel = _kernel(len(numbers), value is not None, std is not None)
    made = Update(
        torch.empty_like(x),
        None if value is None else torch.empty_like(x),
        None if std is None else torch.empty_like(x),
    )
    outputs = [t for t in (made.next, made.value, made.mean) if t is not None]
    size = x.numel()
    # Allocations are aligned, inputs need not be; Triton's own look at a number is at its type alone.
    key = (*((t.dtype, t.data_ptr() % 16 == 0) for t in tensors), size % 16 == 0, size == 1, size < 2**31)
    given = [*tensors, *outputs, *map(float, numbers), *(value or ()), *(() if std is None else (std,)), size]
    _launch(kernel, -(-size // BLOCK), given, _WARPS, key)
    return made
