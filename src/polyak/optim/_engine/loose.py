"""Tensors that no compiled plan takes, and the reference backend: rules in PyTorch's own operations.

``foreach=False`` goes tensor by tensor; where ``_foreach_`` calls are asked for, lists are made of tensors of one kind.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from polyak.optim._engine import dispatch, foreach
from polyak.optim._engine.eager import eager
from polyak.optim._engine.plan import mixed
from polyak.optim._engine.rounding import Rounding
from polyak.optim._engine.tensors import PLAIN, compute_dtype, local, placed_like, plain, wide
from polyak.optim._engine.trace import Hyper

if TYPE_CHECKING:
    from polyak.optim._engine.base import RuleOptimizer


class Item(NamedTuple):
    """One parameter to be updated."""

    group: int
    position: int  # among all parameters: tells its random numbers from those of others
    p: torch.Tensor
    g: torch.Tensor
    listed: bool  # whether it may be part of a list


def run(optimizer: RuleOptimizer, items: Sequence[Item], values: Sequence[Mapping[str, Any]]) -> list[torch.Tensor]:
    """Update the parameters, whose counters have been increased. Returns how many elements the rule counted.

    Args:
        values: of each group, its numbers by name, but the step.
    """
    counts: list[torch.Tensor] = []
    lists: dict[Any, list[Item]] = {}
    for item in items:
        group, state = optimizer.param_groups[item.group], optimizer.state[item.p]
        kind = _kind(optimizer, group, item, state) if item.listed else None
        if kind is None:
            counts += _eager(optimizer, group, item, state, values[item.group])
        else:
            lists.setdefault(kind, []).append(item)
    for together in lists.values():
        counts += _foreach(optimizer, together, values[together[0].group])
    return counts


def _kind(optimizer: RuleOptimizer, group: dict[str, Any], item: Item, state: dict[str, Any]) -> Any:
    """What tensors must have in common to be in one list; None: this one is for none."""
    tensors = [item.p, item.g, *(state[name] for name in optimizer._stored(group))]
    if not all(type(local(t)) in PLAIN and not t.is_neg() for t in tensors) or item.p.is_conj():
        return None
    step: Any = None
    if optimizer._counts(group):
        # Comparing values on the device would mean to wait for it.
        step = id(state["step"]) if group["capturable"] else float(state["step"])
    return (item.group, step, tuple((local(t).device, t.dtype) for t in tensors))


def _values(
    optimizer: RuleOptimizer,
    group: dict[str, Any],
    state: dict[str, Any],
    known: Mapping[str, Any],
    device: torch.device,
) -> dict[str, Any]:
    """The rule's uniform inputs for one tensor, on its device where they are tensors."""
    values = dict(known)
    if optimizer._counts(group):
        step = state["step"]
        on_host = not group["capturable"] or step.device.type == "cpu"
        try:
            values["step"] = float(step) if on_host else wide(step)
        except RuntimeError:  # a fake tensor has no value
            values["step"] = wide(step)
    moved = [*optimizer._extra(group), *(["grad_norm"] if "grad_norm" in values else [])]
    for name in moved:
        if isinstance(values[name], torch.Tensor) and values[name].device != device:
            values[name] = values[name].to(device, non_blocking=True)
    return values


def _seeded(
    group: dict[str, Any], state: dict[str, Any], item: Item, device: torch.device, known: dict[Any, torch.Generator]
) -> torch.Generator | None:
    """A new draw for every step and tensor, the same again after a checkpoint."""
    if group["rounding"] != "stochastic":
        return None
    step = state["step"]
    generator = known.get(item.position)
    counted = step.device.type == "cpu"
    if generator is None or counted:
        # A step on the device cannot be read at every update: from its first on the generator goes on by itself.
        generator = known[item.position] = torch.Generator(device=device)
        generator.manual_seed(mixed(group["rounding_seed"], item.position, int(step)))
    return generator


def _foreach(optimizer: RuleOptimizer, items: Sequence[Item], known: Mapping[str, Any]) -> list[torch.Tensor]:
    first = items[0]
    group, state = optimizer.param_groups[first.group], optimizer.state[first.p]
    states = [optimizer.state[item.p] for item in items]
    columns = [
        [plain(item.p) for item in items],
        [plain(placed_like(item.g, item.p)) for item in items],
        *([plain(s[name]) for s in states] for name in optimizer._stored(group)),
    ]
    device, program = columns[0][0].device, dispatch.program_of(optimizer, group)
    values = _values(optimizer, group, state, known, device)
    generator = _seeded(group, state, first, device, optimizer._generators)
    compute, rounding = compute_dtype(columns[0][0].dtype), Rounding(group["rounding"])
    return foreach.run(program, columns, values, compute, rounding, generator)


def _eager(
    optimizer: RuleOptimizer, group: dict[str, Any], item: Item, state: dict[str, Any], known: Mapping[str, Any]
) -> list[torch.Tensor]:
    """The rule itself on one tensor."""
    p, g, names = item.p, item.g, optimizer._stored(group)
    # A rule that is not elementwise needs the whole tensor, and lets DTensor see to its parts.
    elementwise = optimizer._elementwise(group)
    tensors = [p, *(state[name] for name in names)]
    work = [plain(t) for t in tensors] if elementwise else tensors
    g = plain(placed_like(g, p)) if elementwise else g
    values = _values(optimizer, group, state, known, local(p).device)
    h = Hyper(**dispatch.static(optimizer, group))
    for name in (*optimizer.numbers, *dispatch.further(optimizer, group)):
        setattr(h, name, values[name])
    for name, length in optimizer.tuples.items():
        setattr(h, name, tuple(values[f"{name}.{i}"] for i in range(length)))
    h.note = optimizer._note(p)
    rounding = Rounding(group["rounding"])
    own = dict(zip(optimizer.state_names, work[1:], strict=False))
    remainder = work[-1] if rounding.mode == "kahan" else None
    generator = _seeded(group, state, item, work[0].device, optimizer._generators)
    places = optimizer._places(p)
    where = None if places is None else places.indices()
    target = work[0] if where is None else work[0].flatten()[where]
    g = g if where is None else g.flatten()[where]
    count = eager(type(optimizer).rule, target, -g if group["maximize"] else g, own, h, rounding, remainder, generator)
    if where is not None:
        work[0].copy_(work[0].flatten().index_copy(0, where, target).view_as(work[0]))
    for outer, inner in zip(tensors, work, strict=True):
        if elementwise and local(outer).is_conj():  # what was worked on is a copy
            local(outer).copy_(torch.view_as_complex(inner))
    return [] if count is None else [count]
