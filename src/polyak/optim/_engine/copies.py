"""What an optimizer's copies and pickles contain, and what is made anew."""

from __future__ import annotations

from types import FunctionType, MethodType
from typing import Any

from torch.optim import Optimizer

# What others hang on one object: GradScaler, schedulers.
_OF_THIS_OBJECT = ("grad_scale", "found_inf", "_opt_called", "_zero_grad_profile_name")


def kept(optimizer: Optimizer) -> dict[str, Any]:
    """All that a class and its subclasses keep.

    Hooks stay behind, as in torch.optim, and so does what shadows a method on this object alone, as a scheduler's step() does.
    """
    return {
        name: value
        for name, value in vars(optimizer).items()
        if not name.startswith("_optimizer_")
        and name not in _OF_THIS_OBJECT
        and not callable(getattr(type(optimizer), name, None))
        and not _is_nameless(value)
    }


def _is_nameless(value: Any) -> bool:
    """Whether this is a function that no pickle can name."""
    return isinstance(value, MethodType) or (isinstance(value, FunctionType) and "<" in value.__qualname__)
