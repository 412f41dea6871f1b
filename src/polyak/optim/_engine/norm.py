"""The Euclidean norm of many tensors together."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from polyak.optim._engine.tensors import LOW, PLAIN, alike, is_dtensor


def global_norm(grads: Sequence[torch.Tensor]) -> torch.Tensor:
    """On the device of the first; shards of a DTensor are summed over."""
    if not grads:
        return torch.zeros(())
    norms: list[torch.Tensor] = []
    for members in alike(grads):
        # Of low-precision gradients in float32: a sum of squares overflows float16, and has 8 bits in bfloat16.
        wide = {"dtype": torch.float32} if members[0].dtype in LOW else {}
        if type(members[0]) in PLAIN or is_dtensor(members[0]):
            norms += torch._foreach_norm(members, 2, **wide)
        else:
            norms += [torch.linalg.vector_norm(g, **wide) for g in members]
    norms = [n.full_tensor() if is_dtensor(n) else n for n in norms]  # type: ignore[attr-defined]
    device = norms[0].device
    if {(n.device, n.dtype) for n in norms} != {(device, torch.float32)}:
        norms = [n.to(device, torch.float32 if n.dtype != torch.float64 else n.dtype) for n in norms]
        norms = [n.double() for n in norms] if any(n.dtype == torch.float64 for n in norms) else norms
    return torch.linalg.vector_norm(torch.stack(norms))
