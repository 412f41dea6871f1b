"""What may stand in a param group besides a rule's own hyperparameters: the options of the engine."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from polyak.core import checks

ROUNDINGS = ("nearest", "stochastic", "kahan")
DEFAULTS: dict[str, Any] = dict(
    maximize=False, foreach=None, fused=None, capturable=False, differentiable=False, state_dtype=None, rounding="nearest"
)  # fmt: skip


def check(group: Mapping[str, Any]) -> None:
    """Raise ValueError where an option of the engine is not allowed."""
    for name in ("maximize", "capturable", "differentiable"):
        checks.one_of(name, group[name], (False, True))
    for name in ("foreach", "fused"):
        checks.one_of(name, group[name], (None, False, True))
    checks.one_of("rounding", group["rounding"], ROUNDINGS)
    wanted = group["state_dtype"]
    if wanted is not None and not (isinstance(wanted, torch.dtype) and wanted.is_floating_point):
        raise ValueError(f"state_dtype must be None or a floating-point torch.dtype, got {checks.shown(wanted)}")


def check_generator(value: Any) -> None:
    """Raise TypeError where a generator is none."""
    if value is not None and not isinstance(value, torch.Generator):
        raise TypeError(f"generator must be a torch.Generator, got {checks.shown(value)}")


def check_lr(value: Any) -> None:
    """Raise where a learning rate is not allowed. One on a device is read here, where groups are added or loaded, only."""
    if not isinstance(value, Tensor):
        checks.non_negative("lr", value)
        return
    if value.numel() != 1:
        raise ValueError(f"Tensor lr must be 1-element, got {checks.shown(value)}")
    number = known(value)
    if number is not None and not (0 <= number < math.inf):
        raise ValueError(f"lr must be finite and >= 0, got {number}")


def known(value: Any) -> float | None:
    """An option's number; None for a tensor that has none, on the meta device or in FakeTensorMode."""
    try:
        return float(value)
    except (RuntimeError, NotImplementedError):
        return None


def warn_of_near_misses(owner: str, group: Iterable[Any], defaults: Iterable[str]) -> None:
    """Param groups may hold anything, as in torch.optim; an entry that is an option but for a letter or two is a mistake."""
    options = list(defaults)
    for name in group:
        near = next((o for o in options if name not in options and isinstance(name, str) and _near(name, o)), None)
        if near is not None:
            warnings.warn(
                f"{owner} has no option {name!r} (param group); did you mean {near!r}? It is kept", stacklevel=5
            )


def _near(name: str, option: str) -> bool:
    """Whether a few letters are left out, added, changed or swapped: at most one in five, and one of a short name."""
    name = name.lower().replace("-", "_")
    most = max(1, len(option) // 5)
    if abs(len(name) - len(option)) > most:
        return False
    before, last = [0] * (len(option) + 1), list(range(len(option) + 1))
    for i, a in enumerate(name):
        row = [i + 1]
        for j, b in enumerate(option):
            row.append(min(last[j + 1] + 1, row[j] + 1, last[j] + (a != b)))
            if i and j and a == option[j - 1] and name[i - 1] == b:
                row[-1] = min(row[-1], before[j - 1] + 1)
        before, last = last, row
    return last[-1] <= most


def on_device(value: Any) -> bool:
    """Whether an option is a tensor that the host cannot read without waiting."""
    return isinstance(value, torch.Tensor) and value.device.type != "cpu"
