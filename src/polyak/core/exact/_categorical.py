"""What models of finitely many states share: probabilities as arguments, draws, and products of log-probabilities with matrices."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_SLACK = 1e-6  # by which a row of probabilities may miss 1, as float32 makes it
_DENSE = 1e-200  # a matrix whose entries are larger than this loses nothing outside the log domain


def probabilities(
    name: str, given: Tensor | Sequence, shape: tuple[int | None, ...], device: torch.device | None = None
) -> Tensor:
    """float64 probabilities of a shape, None where a size is free; each last dimension adds up to 1."""
    made = torch.as_tensor(given, dtype=torch.float64, device=device)
    words = ", ".join("n" if size is None else str(size) for size in shape)
    fits = made.ndim == len(shape) and all(s in (None, m) and m > 0 for s, m in zip(shape, made.shape, strict=True))
    if not fits:
        raise ValueError(f"{name} must have shape ({words}{',' * (len(shape) == 1)}), got {tuple(made.shape)}")
    values = made.detach()
    if not bool((values >= 0).all() & ((values.sum(-1) - 1).abs() < _SLACK).all()):
        raise ValueError(f"{name} must be probabilities, each row adding up to 1")
    return made


def drawn(weights: Tensor, generator: torch.Generator | None) -> Tensor:
    """One index for each row of weights (..., n) >= 0, never one of weight 0."""
    ends = weights.cumsum(-1)
    levels = torch.rand(*weights.shape[:-1], 1, dtype=ends.dtype, device=ends.device, generator=generator)
    found = torch.searchsorted(ends, levels * ends[..., -1:], right=True)[..., 0]
    last = weights.shape[-1] - 1 - (weights > 0).flip(-1).to(torch.int8).argmax(-1)
    return torch.minimum(found, last)


def advanced(log_p: Tensor, matrix: Tensor, dense: bool) -> Tensor:
    """``log sum_i exp(log_p_i) M_ij`` for log_p (*batch, S) and M (S, V); ``dense`` where the largest log_p decides."""
    if dense:
        top = log_p.amax(-1, keepdim=True)
        top = torch.where(top.isfinite(), top, 0.0)
        return ((log_p - top).exp() @ matrix).log() + top
    return (log_p[..., :, None] + matrix.log()).logsumexp(-2)


def is_dense(matrix: Tensor) -> bool:
    return bool((matrix.detach() > _DENSE).all())
