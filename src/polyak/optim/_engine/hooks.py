"""Step hooks and profiler records, as PyTorch's wrapper of ``step()`` provides them, skipped where nobody uses them."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch.autograd import profiler
from torch.optim import Optimizer

# Not public: where one is missing, PyTorch's wrapper is always used.
_module = importlib.import_module("torch.optim.optimizer")
_PRE = getattr(_module, "_global_optimizer_pre_hooks", None)
_POST = getattr(_module, "_global_optimizer_post_hooks", None)
_KNOWN = _PRE is not None and _POST is not None and hasattr(profiler, "_is_profiler_enabled")


def wrap(kind: type[Optimizer]) -> None:
    """Wrap the class's ``step``, once, as PyTorch does when the first of a class is made.

    PyTorch's wrapper opens a range for the profiler at every step, which takes 8 microseconds, a seventh of Adan's for 161
    tensors. Here it is gone round while there is no hook and no profiler.
    """
    if _KNOWN and not getattr(kind.step, "hooked", False):
        kind.step = _light(kind.step)  # type: ignore[method-assign]


def _light(step: Callable[..., Any]) -> Callable[..., Any]:
    heard = Optimizer.profile_hook_step(step)

    @functools.wraps(step)
    def light(self: Any, *args: Any, **kwargs: Any) -> Any:
        if (
            self._optimizer_step_pre_hooks
            or self._optimizer_step_post_hooks
            or _PRE
            or _POST
            or profiler._is_profiler_enabled
            or torch.compiler.is_compiling()
        ):
            return heard(self, *args, **kwargs)
        return step(self, *args, **kwargs)

    light.hooked = True  # type: ignore[attr-defined]
    return light
