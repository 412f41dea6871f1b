"""How a tensor lies in memory: types, shards, complex views and strides, as the backends need them."""

from __future__ import annotations

import torch

LOW = (torch.bfloat16, torch.float16)


def real_dtype(dtype: torch.dtype) -> torch.dtype:
    return dtype.to_real() if dtype.is_complex else dtype


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Low-precision tensors are computed with in float32."""
    return torch.float32 if dtype in LOW else dtype


def wide(step: torch.Tensor) -> torch.Tensor:
    # Powers of a retention factor near one need float64, which not every device has.
    return step if step.device.type == "mps" else step.double()


def is_dtensor(t: torch.Tensor) -> bool:
    return hasattr(t, "_local_tensor")


def plain(t: torch.Tensor) -> torch.Tensor:
    """The local, real tensor that holds t's elements."""
    if is_dtensor(t):
        t = t._local_tensor  # type: ignore[attr-defined]
    return torch.view_as_real(t.resolve_conj()) if t.is_complex() else t


def placed_like(g: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
    if is_dtensor(p) and g.placements != p.placements:  # type: ignore[attr-defined]
        return g.redistribute(p.device_mesh, p.placements)  # type: ignore[attr-defined]
    return g


def dense(t: torch.Tensor) -> bool:
    """Whether t's elements fill one stretch of memory, in whatever order of dimensions."""
    expected = 1
    for stride, size in sorted((st, n) for st, n in zip(t.stride(), t.shape, strict=True) if n > 1):
        if stride != expected:
            return False
        expected *= size
    return True


def laid_out(t: torch.Tensor, strides: tuple[int, ...]) -> torch.Tensor:
    """t itself where it has these strides, else a copy that has."""
    if t.stride() == strides:
        return t
    return torch.empty_strided(t.shape, strides, dtype=t.dtype, device=t.device).copy_(t)


def flat(t: torch.Tensor) -> torch.Tensor:
    """The elements of a dense tensor in the order of memory, as a view."""
    return t.detach().as_strided((t.numel(),), (1,))
