"""How an updated parameter is written back where its type holds fewer bits than the arithmetic.

``nearest`` loses every update below half a unit in the last place; ``stochastic`` keeps it in expectation; ``kahan`` keeps it
exactly enough, in a second tensor of the parameter's type that holds what rounding left behind.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

Mode = Literal["nearest", "stochastic", "kahan"]
DROPPED = {torch.bfloat16: 16, torch.float16: 13}  # bits of a float32 significand that the type does not hold


@dataclass(frozen=True)
class Rounding:
    """mode: "nearest", "stochastic" or "kahan"."""

    mode: Mode = "nearest"


def store(
    p: torch.Tensor,
    value: torch.Tensor,
    rounding: Rounding,
    compensation: torch.Tensor | None = None,
    generator: torch.Generator | None = None,
) -> None:
    """Write ``value`` (the compute type) into ``p``; both are left in place otherwise."""
    if rounding.mode == "stochastic":
        p.copy_(stochastic(value, p.dtype, generator))
        return
    p.copy_(value)
    if rounding.mode == "kahan":
        assert compensation is not None
        # An overflowed or broken parameter has no remainder: inf - inf would turn it into NaN at the next step.
        compensation.copy_(torch.where(torch.isfinite(p), value - p.to(value.dtype), 0.0))


def stochastic(value: torch.Tensor, dtype: torch.dtype, generator: torch.Generator | None) -> torch.Tensor:
    """float32 -> bf16 or fp16, up or down with probabilities that keep the expectation (normal range); inf and NaN stay."""
    bits = DROPPED[dtype]
    noise = torch.randint(0, 1 << bits, value.shape, dtype=torch.int32, device=value.device, generator=generator)
    mask = -(1 << bits)
    rounded = value.view(torch.int32).add(noise).bitwise_and_(mask).view(torch.float32)
    return torch.where(torch.isfinite(value), rounded, value).to(dtype)
