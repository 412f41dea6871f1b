"""How a param group was last updated, and whether it may be updated so again."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch

from polyak.optim._engine import dispatch
from polyak.optim._engine.options import ENGINE_OPTIONS, on_device
from polyak.optim._engine.places import Places
from polyak.optim._engine.tensors import is_dtensor

if TYPE_CHECKING:
    from polyak.optim._engine.base import RuleOptimizer

_DTYPE = operator.attrgetter("dtype")  # in map(), no bytecode per tensor


@dataclass(eq=False)
class Cohort:
    """The parameters of a plan that are updated together: one step count, one combination of types."""

    mode: str  # "eager", "compiled", "blocked", "foreach" or "kernel"
    members: list[int]  # positions in the plan
    salt: int  # tells its random numbers from those of other cohorts and groups
    step: torch.Tensor | None
    device: torch.device
    runner: Any = None
    arrays: list[list[torch.Tensor]] = field(default_factory=list)  # per program input but "g": local tensors
    strides: list[tuple[int, ...]] = field(default_factory=list)
    generator: torch.Generator | None = None
    notes: list[Any] = field(default_factory=list)  # per parameter, what the rule wants to know of it
    # Of the last step, where the rule counts and has no runner.
    counts: list[torch.Tensor] = field(default_factory=list)
    places: list[Places] | None = None  # per parameter the elements that have a state, where not all have


@dataclass(eq=False)
class Plan:
    """How a param group was last updated; good for as long as nothing it depends on has changed."""

    key: Any
    params: list[torch.Tensor]
    states: list[dict[str, Any]]
    all_states: list[dict[str, Any]]  # of the optimizer, in its order
    contents: list[Any]  # the values of `states`, one after the other
    tensors: dict[str, list[Any]]  # per state name, as found in `states`
    pointers: list[list[int]]  # of the parameters, then per stored state
    strides: list[tuple[int, ...]]  # of the parameters
    options: list[Any] | None  # of the group, in the order of the defaults; None where they may change unseen
    numbers: dict[str, Any]  # made of them
    unwrap: bool  # whether gradients must be made local and real before they are used
    grad_types: list[torch.dtype]
    cohorts: list[Cohort]

    @property
    def mode(self) -> str:
        """The cohorts' backend; that of the first where devices differ."""
        return self.cohorts[0].mode


def valid(
    optimizer: RuleOptimizer,
    plan: Plan,
    group: dict[str, Any],
    params: Sequence[torch.Tensor],
    grads: Sequence[torch.Tensor],
) -> bool:
    """Whether everything is as the plan has seen it."""
    if len(params) != len(plan.params) or not all(map(operator.is_, params, plan.params)):
        return False
    options = list(map(group.__getitem__, optimizer.defaults))
    if plan.options is None or not all(map(operator.is_, options, plan.options)):
        if plan.key != _key(optimizer, group):
            return False
        plan.numbers = _numbers(optimizer, group)
        plan.options = None if any(isinstance(value, torch.Tensor) for value in options) else options
    elif plan.key[-1] != (getattr(optimizer, "found_inf", None) is not None):
        return False
    # In the order of the dictionaries: looking a tensor up by its hash costs more than all that is compared here.
    states = optimizer.state.values()
    if len(states) != len(plan.all_states) or not all(map(operator.is_, states, plan.all_states)):
        return False
    found = list(chain.from_iterable(map(dict.values, plan.states)))
    if len(found) != len(plan.contents) or not all(map(operator.is_, found, plan.contents)):
        return False
    # Lists compare by identity first: no element is looked at while nothing has changed.
    # The states' memory may move, too (share_memory_(), or .data as offloading assigns it), and runners hold addresses.
    return (
        plan.grad_types == list(map(_DTYPE, grads))
        and plan.strides == list(map(torch.Tensor.stride, params))
        and plan.pointers == _pointers(optimizer, group, params, plan.tensors)
    )


def make(
    optimizer: RuleOptimizer,
    index: int,
    group: dict[str, Any],
    params: Sequence[torch.Tensor],
    grads: Sequence[torch.Tensor],
) -> Plan:
    """A plan for the parameters of a group that have a gradient."""
    names = optimizer._stored(group)
    groups: dict[Any, list[int]] = {}
    for i, (p, g) in enumerate(zip(params, grads, strict=True)):
        state = optimizer.state[p]
        step: Any = None
        if optimizer._counts(group):
            # Comparing values on the device would mean to wait for it.
            step = id(state["step"]) if group["capturable"] else float(state["step"])
        mode = dispatch.mode_for(optimizer, group, p)
        places = optimizer._places(p)
        types = tuple(state[name].dtype for name in names)
        gaps = None if places is None else places.gaps.dtype
        groups.setdefault((mode, step, p.device, p.dtype, g.dtype, types, gaps), []).append(i)
    cohorts = []
    for (mode, _, device, dtype, grad_dtype, types, _), members in groups.items():
        step = _own_step([optimizer.state[params[i]] for i in members]) if optimizer._counts(group) else None
        cohort = Cohort(mode, members, index * 1_000_033 + members[0], step, device)
        dispatch.equip(optimizer, cohort, group, [params[i] for i in members], dtype, grad_dtype, types)
        cohorts.append(cohort)
    states = [optimizer.state[p] for p in params]
    contents = list(chain.from_iterable(s.values() for s in states))
    tensors = {name: [s.get(name) for s in states] for name in names}
    unwrap = optimizer._elementwise(group) and any(is_dtensor(p) or p.is_complex() for p in params)
    pointers = _pointers(optimizer, group, params, tensors)
    strides, types = [p.stride() for p in params], [g.dtype for g in grads]
    return Plan(
        _key(optimizer, group), list(params), states, list(optimizer.state.values()), contents, tensors, pointers, strides,
        None, _numbers(optimizer, group), unwrap, types, cohorts,
    )  # fmt: skip


def _key(optimizer: RuleOptimizer, group: dict[str, Any]) -> Any:
    """What of a group a plan is made for, beside its tensors."""
    options = tuple(group[name] for name in ENGINE_OPTIONS)
    switches = tuple(dispatch.static(optimizer, group).values())
    elsewhere = tuple(group[name] for name in optimizer.defaults if _is_of_no_kind(optimizer, name))
    scaled = getattr(optimizer, "found_inf", None) is not None
    return (options, switches, elsewhere, optimizer._extra(group), on_device(group.get("lr")), scaled)


def _is_of_no_kind(optimizer: RuleOptimizer, name: str) -> bool:
    """Whether an option is none of the engine's and none that the rule sees."""
    return name not in (*ENGINE_OPTIONS, *optimizer.numbers, *optimizer.tuples, *optimizer.switches)


def _numbers(optimizer: RuleOptimizer, group: dict[str, Any]) -> dict[str, Any]:
    """The group's numeric hyperparameters, tuples as name.0, name.1, ..."""
    numbers: dict[str, Any] = {}
    for name in optimizer.numbers:
        value = group[name]
        if on_device(value):
            if not group["capturable"]:
                raise ValueError(f"{name} as a tensor on {value.device} needs capturable=True")
            numbers[name] = value
        else:
            numbers[name] = float(value)
    for name in optimizer.tuples:
        numbers.update({f"{name}.{i}": float(v) for i, v in enumerate(group[name])})
    return numbers


def _pointers(
    optimizer: RuleOptimizer, group: dict[str, Any], params: Sequence[torch.Tensor], tensors: Mapping[str, list[Any]]
) -> list[list[int]]:
    columns = [params, *(tensors[name] for name in optimizer._stored(group))]
    return [list(map(torch.Tensor.data_ptr, column)) for column in columns]


def _own_step(states: list[dict[str, Any]]) -> torch.Tensor:
    """One counter for a cohort, its own: parameters outside of it that shared the old one keep that."""
    step = states[0]["step"].clone()
    for state in states:
        state["step"] = step
    return step
