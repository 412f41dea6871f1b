"""What MKOR keeps, where PyTorch's helpers for checkpoints look: in the states of the base's parameters and in its param groups.

``torch.distributed.checkpoint.state_dict`` knows of an optimizer what stands under "state" and "param_groups", by the names that
are there before it loads. So each weight's state has its layer's factors as entries, and every group has the few numbers.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from polyak.optim.mkor.factors import FACTORS, Stack
from polyak.optim.mkor.layers import Layer

PREFIX = "mkor_"
_ENTRIES = frozenset(PREFIX + name for name in FACTORS)
MARK = "mkor"  # the entry of a parameter that has no other: the helpers want a state of all parameters, or of none


def publish(base: Optimizer, stacks: Iterable[Stack]) -> None:
    """Entries for the weights that the base has stepped: an entry that is there before would count as the base's own state."""
    state = base.state
    for stack in stacks:
        for layer, entries in zip(stack.layers, stack.entries, strict=True):
            if layer.weight.grad is not None:
                own = state[layer.weight]
                if any(own.get(name) is not value for name, value in entries.items()):
                    own.update(entries)
    for group in base.param_groups:
        for p in group["params"]:
            if p.grad is not None and not state.get(p):
                state[p][MARK] = True


def renew(base: Optimizer, stacks: Iterable[Stack], found: Mapping[str, Any] | None = None) -> None:
    """The present factors in the place of those in the base's state; ``found`` in a checkpoint are there again."""
    found = found or {"factors": {}, "marked": ()}
    for stack in stacks:
        for layer, entries in zip(stack.layers, stack.entries, strict=True):
            if base.state.get(layer.weight) or layer.name in found["factors"]:
                base.state[layer.weight].update(entries)
    for p in found["marked"]:
        base.state[p][MARK] = True


def withdraw(base: Optimizer) -> None:
    """Take the factors out of the base's state."""
    for own in base.state.values():
        for name in FACTORS:
            own.pop(PREFIX + name, None)


def write_numbers(base: Optimizer, numbers: Mapping[str, Any]) -> None:
    """The same numbers in every group."""
    entries = {PREFIX + name: value for name, value in numbers.items()}
    for group in base.param_groups:
        group.update(entries)


def divide(
    saved: Mapping[str, Any], params: Sequence[Tensor], layers: Iterable[Layer]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """A checkpoint as the base's part, and what is found in it of MKOR's: its numbers, and "factors" by the module's name.

    Layers whose weight has no state in the checkpoint had no step: they are among "stepless" instead. "marked" are
    the parameters that have no other entry than the mark.
    """
    groups = [dict(group) for group in saved["param_groups"]]
    own: dict[str, Any] = {}
    for group in groups:
        for name in [name for name in group if isinstance(name, str) and name.startswith(PREFIX)]:
            own[name.removeprefix(PREFIX)] = group.pop(name)
    of_layers: dict[Any, dict[str, Any]] = {}
    state: dict[Any, Any] = {}
    for i, values in saved["state"].items():
        if not isinstance(values, Mapping):
            state[i] = values
            continue
        mine = {name: values[PREFIX + name] for name in FACTORS if PREFIX + name in values}
        rest = {k: v for k, v in values.items() if k != MARK and k not in _ENTRIES}
        of_layers[i] = mine
        if rest:
            state[i] = rest
    ids = dict(zip(params, (i for group in groups for i in group["params"]), strict=False))
    if own:
        where = {layer.name: ids.get(layer.weight) for layer in layers}
        own["factors"] = {name: of_layers[i] for name, i in where.items() if i in of_layers}
        own["stepless"] = where.keys() - own["factors"].keys()
        own["marked"] = [p for p, i in ids.items() if MARK in saved["state"].get(i, ())]
    return {**saved, "state": state, "param_groups": groups}, own


def check(own: Any, base: str, layers: Iterable[Layer]) -> None:
    """Raise ValueError where MKOR's part of a checkpoint is not one for these layers around a base of this name."""
    if not isinstance(own, Mapping) or not {"base", "steps", "preconditions", "factors"} <= own.keys():
        raise ValueError("this state_dict is not one of MKOR: it has no 'mkor' entry with factors")
    if own["base"] != base:
        raise ValueError(f"state_dict is of MKOR around {own['base']}, this one is around {base}")
    if not own["preconditions"]:
        return
    mine, theirs = {layer.name: layer for layer in layers}, own["factors"]
    if missing := sorted(mine.keys() ^ (theirs.keys() | own.get("stepless", set()))):
        raise ValueError(f"state_dict and optimizer do not have the same layers: {missing} are in one of them only")
    for name, values in theirs.items():
        if not set(FACTORS) <= values.keys():
            raise ValueError(f"state_dict: factors of {name!r} are incomplete")
        for side, size in (("A", mine[name].inputs), ("G", mine[name].outputs)):
            if (shape := tuple(values[side].shape)) != (size, size):
                raise ValueError(f"state_dict: {side} of {name!r} has shape {shape}, where {(size, size)} is needed")


def settled(value: Tensor | None) -> Tensor:
    """A number that may not be there yet, as a tensor always: a distributed checkpoint reads into what it finds."""
    return torch.full((), float("nan")) if value is None else value
