"""Moving rows by ancestors that are known to be right."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from polyak.core.particles import _native


def moved(x: Tensor, ancestors: Tensor) -> Tensor:
    """One tensor's rows, by ancestors that are right."""
    if x.is_cpu and (made := _native.moved(x, ancestors)) is not None:
        return made
    batch, n = ancestors.shape[:-1], ancestors.shape[-1]
    event = x.shape[ancestors.ndim :]
    if not event:
        return x.gather(-1, ancestors)
    systems, size = math.prod(batch), x.shape[len(batch)]
    if batch:  # each system's rows begin where those before it end
        first = torch.arange(0, systems * size, size, device=x.device) if size else ancestors.new_zeros(systems)
        ancestors = ancestors.reshape(systems, n) + first.unsqueeze(-1)
    return x.reshape(systems * size, *event).index_select(0, ancestors.flatten()).reshape(*batch, n, *event)
