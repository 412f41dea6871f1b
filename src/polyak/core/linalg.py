"""Linear algebra that several systems share: rank-1 updates of inverses."""

from __future__ import annotations

import torch

from polyak.core import checks


@checks.operands(P=checks.tensor, v=checks.tensor, out=checks.tensor | None)
def sherman_morrison(P: torch.Tensor, v: torch.Tensor, *, out: torch.Tensor | None = None) -> torch.Tensor:
    """``inv(inv(P) + v v^T) = P - (P v)(P v)^T / (1 + v^T P v)``, in O(d^2) and symmetric to the last bit where P is.

    Args:
        P: symmetric positive definite, of shape ``(..., d, d)``.
        v: of shape ``(..., d)``.
        out: where to put the result; P itself is allowed.

    Raises:
        ValueError: the shapes do not fit.
    """
    if P.dim() < 2 or P.shape[-1] != P.shape[-2] or P.shape[:-1] != v.shape:
        raise ValueError(f"P must be (..., d, d) and v (..., d), got {tuple(P.shape)} and {tuple(v.shape)}")
    if out is not None and (out.shape != P.shape or out.dtype != P.dtype):
        raise ValueError(f"out must be like P, {tuple(P.shape)} of {P.dtype}, got {tuple(out.shape)} of {out.dtype}")
    u = P @ v.unsqueeze(-1)
    # The root makes one factor of two, so that entries (i, j) and (j, i) are the same product.
    u = u * torch.rsqrt(1 + v.unsqueeze(-2) @ u)
    return torch.addcmul(P, u, u.mT, value=-1, out=out)
