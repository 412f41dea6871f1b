"""The layers that MKOR preconditions, and the statistics that they have collected since the last step."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from polyak.core import checks
from polyak.optim._engine.tensors import is_dtensor

Module = nn.Linear | nn.Conv2d


class Tally:
    """A layer's sums over passes where a compiled graph takes them: it can write into tensors only."""

    def __init__(self, inputs: int, outputs: int, like: Tensor) -> None:
        dtype = torch.promote_types(like.dtype, torch.float32)
        self.a = torch.zeros(inputs, dtype=dtype, device=like.device)
        self.g = torch.zeros(outputs, dtype=dtype, device=like.device)
        self.passes = torch.zeros((), dtype=dtype, device=like.device)
        self.used = False  # whether a compiled forward pass has run since it was zero

    def zero(self) -> None:
        torch._foreach_zero_([self.a, self.g, self.passes])
        self.used = False


@dataclass(eq=False)
class Layer:
    """A preconditioned module; ``bias`` is None where it is not trained."""

    name: str
    module: Module
    weight: Tensor
    bias: Tensor | None
    a: Tensor | None = field(default=None, repr=False)  # sums over passes
    g: Tensor | None = field(default=None, repr=False)
    passes: int | Tensor = 0
    tally: Tally | None = field(default=None, repr=False)

    @classmethod
    def of(cls, name: str, module: Module) -> Layer:
        bias = module.bias if module.bias is not None and module.bias.requires_grad else None
        return cls(name, module, module.weight, bias)

    @property
    def inputs(self) -> int:
        """Length of ``a``."""
        return self.weight.shape[1:].numel() + (self.bias is not None)

    @property
    def outputs(self) -> int:
        """Length of ``g``."""
        return self.weight.shape[0]

    def add(self, a: Tensor, g: Tensor, passes: int | Tensor = 1) -> None:
        """Take in a pass, or the sums of several."""
        self.a = a if self.a is None else self.a + a
        self.g = g if self.g is None else self.g + g
        self.passes = self.passes + passes

    def drop(self) -> None:
        """Forget all but what compiled passes have summed up."""
        self.a = self.g = None
        self.passes = 0

    def clear(self) -> None:
        self.drop()
        if self.tally is not None and self.tally.used:
            self.tally.zero()

    def collect(self) -> None:
        """Take in what compiled passes have summed up."""
        if (tally := self.tally) is not None and tally.used:
            self.add(tally.a.clone(), tally.g.clone(), tally.passes.clone())
            tally.zero()


class _Model(checks.Kind):
    words = "a torch.nn.Module, or an iterable of modules or of (name, module)"

    def like(self, value: Any) -> bool:
        return isinstance(value, nn.Module) or checks.Stream().like(value)

    def __call__(self, name: str, value: Any) -> Any:
        return value if isinstance(super().__call__(name, value), nn.Module) else list(value)


class _Skip(checks.Kind):
    words = "a list of names or modules"

    def like(self, value: Any) -> bool:
        return checks.Stream().like(value) and not isinstance(value, nn.Module)

    def __call__(self, name: str, value: Any) -> Any:
        value = list(super().__call__(name, value))
        for i, entry in enumerate(value):
            if not isinstance(entry, (str, nn.Module)):
                raise TypeError(f"{name}[{i}] must be a name or a module, got {checks.shown(entry)}")
        return value


MODEL, SKIP = _Model(), _Skip()


def named_layers(model: Any, skip: Iterable[str | nn.Module]) -> list[tuple[str, Module]]:
    """All Linear and Conv2d modules with their names, but those that are, or are inside, what ``skip`` names.

    Raises:
        TypeError: neither modules nor pairs of names and modules.
        ValueError: no module at all; a name in ``skip`` that there is not.
    """
    roots = _roots(model)
    if not roots:
        raise ValueError("model must be a module, or at least one, got an empty list")
    modules = {f"{prefix}.{name}".strip("."): module for prefix, root in roots for name, module in root.named_modules()}
    left_out = _skipped(modules, skip)
    return [
        (name, module)
        for name, module in modules.items()
        if isinstance(module, (nn.Linear, nn.Conv2d)) and module not in left_out
    ]


def _roots(model: Any) -> list[tuple[str, nn.Module]]:
    if isinstance(model, nn.Module):
        # Names are those of the model itself, whatever wraps it, so that checkpoints fit with and without.
        while isinstance(model, nn.parallel.DistributedDataParallel) or hasattr(model, "_orig_mod"):
            model = getattr(model, "_orig_mod", None) or model.module
        return [("", model)]
    roots = [item if isinstance(item, tuple) else (str(i), item) for i, item in enumerate(model)]
    for item in roots:
        if len(item) != 2 or not isinstance(item[0], str) or not isinstance(item[1], nn.Module):
            raise TypeError(f"model must have modules, or pairs of names and modules, got {checks.shown(item)}")
    return roots


def _skipped(modules: dict[str, nn.Module], skip: Iterable[str | nn.Module]) -> set[nn.Module]:
    inside: set[nn.Module] = set()
    for entry in skip:
        found = modules.get(entry) if isinstance(entry, str) else entry
        if found is None:
            raise ValueError(f"skip: there is no module {checks.shown(entry)}{checks.suggestion(entry, modules)}")
        if found not in modules.values():
            raise ValueError(f"skip: {type(found).__name__} is no module of the model")
        inside |= set(found.modules())
    return inside


def eligible(name: str, module: Module) -> bool:
    """Whether MKOR can precondition a module whose weight is trained; a warning says where it cannot.

    Raises:
        TypeError: the weight is in shards.
        ValueError: the weight has no shape yet.
    """
    if is_lazy(module.weight):
        raise ValueError(f"MKOR: {name!r} is lazy; run a forward pass first")
    if is_dtensor(module.weight):
        raise TypeError(f"MKOR needs whole weights, that of {name!r} is in shards (a DTensor)")
    why = ""
    if isinstance(module, nn.Conv2d) and module.groups > 1:
        why = f"a convolution of {module.groups} groups"
    elif not module.weight.is_floating_point():
        why = f"of type {module.weight.dtype}"
    elif module.weight.numel() == 0:
        why = "empty"
    if why:
        warnings.warn(f"MKOR leaves {name!r} to the base optimizer: it is {why}", stacklevel=4)
    return not why
