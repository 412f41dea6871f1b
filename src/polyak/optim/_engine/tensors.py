"""How a tensor lies in memory: kinds, dtypes, shards, complex views and strides, as the backends need them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

LOW = (torch.bfloat16, torch.float16)
PLAIN = (torch.Tensor, torch.nn.Parameter)  # of these types alone a tensor is its own memory


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


def local(t: torch.Tensor) -> torch.Tensor:
    """This process's part of a sharded tensor; any other is its own."""
    return t._local_tensor if is_dtensor(t) else t  # type: ignore[attr-defined]


def plain(t: torch.Tensor) -> torch.Tensor:
    """The local, real tensor that holds t's elements."""
    t = local(t)
    return torch.view_as_real(t.resolve_conj()) if t.is_complex() else t


def placed_like(g: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
    if is_dtensor(p) and g.placements != p.placements:  # type: ignore[attr-defined]
        return g.redistribute(p.device_mesh, p.placements)  # type: ignore[attr-defined]
    return g


def is_short(t: torch.Tensor) -> bool:
    """Whether some of t's elements are not in its storage, which may have been freed or cut."""
    if not t.numel() or t.device.type == "meta":
        return False
    try:
        storage = t.untyped_storage()
    except (RuntimeError, NotImplementedError):  # functorch's wrappers are of the plain type, and have none
        return False
    last = t.storage_offset() + sum((n - 1) * stride for n, stride in zip(t.shape, t.stride(), strict=True))
    return (last + 1) * t.element_size() > storage.nbytes()


def addressable(t: torch.Tensor) -> bool:
    """Whether t's elements are at its address: not those of a wrapper, a fake, or a lazily negated or conjugated view."""
    if type(t) not in PLAIN or t.layout is not torch.strided or t.device.type not in ("cpu", "cuda"):
        return False
    try:
        return not (t.is_neg() or t.is_conj() or is_short(t)) and bool(t.data_ptr() or not t.numel())
    except (RuntimeError, NotImplementedError):  # functorch's wrappers are of the plain type, and have no storage
        return False


def shares_elements(t: torch.Tensor) -> bool:
    """Whether t is expanded: several of its elements are one place in memory."""
    return any(stride == 0 and n > 1 for stride, n in zip(t.stride(), t.shape, strict=True))


def alike(tensors: Iterable[torch.Tensor]) -> list[list[torch.Tensor]]:
    """Lists that one ``_foreach_`` call can take: of one kind, device, type, and mesh and placements where they are sharded."""
    lists: dict[Any, list[torch.Tensor]] = {}
    for t in tensors:
        mesh = (t.device_mesh, t.placements) if is_dtensor(t) else None  # type: ignore[attr-defined]
        lists.setdefault((type(t), t.device, t.dtype, mesh), []).append(t)
    return list(lists.values())


def side_by_side(t: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors of one shape have their elements in the same order."""
    return all(a == b for a, b, n in zip(t.stride(), other.stride(), t.shape, strict=True) if n > 1)


def dense(t: torch.Tensor) -> bool:
    """Whether t's elements fill one stretch of memory, in whatever order of dimensions."""
    expected = 1
    for stride, size in sorted((st, n) for st, n in zip(t.stride(), t.shape, strict=True) if n > 1):
        if stride != expected:
            return False
        expected *= size
    return True


def laid_out(t: torch.Tensor, strides: tuple[int, ...]) -> torch.Tensor:
    """A copy of t with these strides, its elements as they are meant: a lazy sign or conjugate is carried out."""
    return torch.empty_strided(t.shape, strides, dtype=t.dtype, device=t.device).copy_(t)
