"""What may stand in a param group besides a rule's own hyperparameters: the options of the engine."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from polyak.core import checks

DEFAULTS: dict[str, Any] = dict(
    maximize=False, foreach=None, fused=None, capturable=False, differentiable=False, state_dtype=None, rounding="nearest"
)  # fmt: skip


class Params(checks.Kind):
    """Parameters, as torch.optim takes them; it says itself what is no parameter."""

    words = "an iterable of tensors, of (name, tensor) or of param groups"

    def like(self, value: Any) -> bool:
        return isinstance(value, Tensor) or (isinstance(value, Iterable) and getattr(value, "ndim", 1) > 0)

    def __call__(self, name: str, value: Any) -> Any:
        return value if isinstance(value, Tensor) else list(super().__call__(name, value))


class LearningRate(checks.Kind):
    """A number, or a tensor of one element: one on a device is read here, where groups are added or loaded, only."""

    words = "a number >= 0, or a tensor of one element"

    def like(self, value: Any) -> bool:
        return isinstance(value, Tensor) or checks.real.like(value)

    def __call__(self, name: str, value: Any) -> Any:
        if not isinstance(value, Tensor):
            checks.non_negative(name, value)
            return value
        if value.numel() != 1 or value.dtype is torch.bool or value.is_complex():
            raise ValueError(f"Tensor {name} must be 1-element, got {checks.shown(value)}")
        number = known(value)
        if number is not None and not (0 <= number < math.inf):
            raise ValueError(f"{name} must be finite and >= 0, got {number}")
        return value


class StateType(checks.Kind):
    """The type of the state; None for the parameter's."""

    words = "None or a floating-point torch.dtype"

    def like(self, value: Any) -> bool:
        return value is None or (isinstance(value, torch.dtype) and value.is_floating_point)

    def __call__(self, name: str, value: Any) -> Any:
        if not self.like(value):
            raise ValueError(f"{name} must be {self.words}, got {checks.shown(value)}")
        return value


# Of every optimizer of the engine. All but the first and the last are options of param groups.
KINDS: dict[str, checks.Kind] = dict(
    params=Params(), lr=LearningRate(), maximize=checks.flag, foreach=checks.optional_flag, fused=checks.optional_flag,
    capturable=checks.flag, differentiable=checks.flag, state_dtype=StateType(),
    rounding=checks.Choice("nearest", "stochastic", "kahan"), generator=checks.generator | None,
)  # fmt: skip


def check(kinds: Mapping[str, checks.Kind], group: dict[str, Any]) -> None:
    """Look at the options of a param group, each by its kind; what a kind makes of one takes its place."""
    group.update({name: kind(name, group[name]) for name, kind in kinds.items() if name in group and name != "params"})


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
