"""What may stand in a param group besides a rule's own hyperparameters: the options of the engine."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from polyak.core import checks

ROUNDINGS = ("nearest", "stochastic", "kahan")
DEFAULTS: dict[str, Any] = dict(
    maximize=False, foreach=None, fused=None, capturable=False, differentiable=False, state_dtype=None, rounding="nearest"
)  # fmt: skip
ENGINE_OPTIONS = (*DEFAULTS, "rounding_seed")


def check(group: Mapping[str, Any]) -> None:
    """Raise ValueError where an option of the engine is not allowed."""
    for name in ("maximize", "capturable", "differentiable"):
        checks.one_of(name, group[name], (False, True))
    for name in ("foreach", "fused"):
        checks.one_of(name, group[name], (None, False, True))
    checks.one_of("rounding", group["rounding"], ROUNDINGS)
    wanted = group["state_dtype"]
    if wanted is not None and not (isinstance(wanted, torch.dtype) and wanted.is_floating_point):
        raise ValueError(f"state_dtype must be None or a floating-point torch.dtype, got {wanted!r}")


def on_device(value: Any) -> bool:
    """Whether an option is a tensor that the host cannot read without waiting."""
    return isinstance(value, torch.Tensor) and value.device.type != "cpu"
