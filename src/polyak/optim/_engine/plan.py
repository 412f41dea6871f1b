"""A plan of the step: which tensors the compiled backends take, in groups of one kind (cohorts), and the addresses found.

One plan is for all param groups of an optimizer, and for all of their parameters that have a state: which of them have a
gradient may change with every step. It is good for as long as nothing it depends on has changed, which `look.py` finds out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from polyak.optim._engine import compiled, dispatch, kernel
from polyak.optim._engine.look import Looker
from polyak.optim._engine.options import on_device
from polyak.optim._engine.places import Places
from polyak.optim._engine.tensors import PLAIN, addressable, is_dtensor, local
from polyak.optim._engine.trace import Program

if TYPE_CHECKING:
    from polyak.optim._engine.base import RuleOptimizer


@dataclass(eq=False)
class Block:
    """Tensors of one cohort that have the same uniform values: those of one group with one counter of steps."""

    group: int  # row of the cohort's table of numbers
    counter: torch.Tensor | None
    on_host: bool  # whether the host computes with the count
    seed: int

    @property
    def address(self) -> int:
        """Of the count, as compiled code reads it; 0 where it does not."""
        return self.counter.data_ptr() if self.counter is not None and self.on_host else 0

    def step(self) -> float | None:
        """The number of the present step, where the host knows it."""
        return float(self.counter) if self.counter is not None and self.on_host else None

    def drawn(self) -> int:
        """The seed of this step's random numbers."""
        return mixed(self.seed, 0, int(self.step() or 0))


@dataclass(eq=False)
class Cohort:
    """Tensors that are updated together by compiled code: one rule, one combination of types, one device."""

    mode: str  # "compiled" or "kernel"
    program: Program
    layout: Any  # compiled.Layout or kernel.Signature
    device: torch.device
    positions: list[int]  # among all parameters of the optimizer
    owners: list[torch.Tensor]
    columns: list[list[torch.Tensor]]  # per program input but "g" (and what rounding left): local tensors
    places: list[Places] | None  # per parameter the elements that have a state, where not all have
    counters: list[torch.Tensor | None]
    rank: dict[int, int]  # numbers of param groups -> their rows in the table of numbers
    of_block: list[int] = field(default_factory=list)
    blocks: list[Block] = field(default_factory=list)
    numbers: np.ndarray = field(default_factory=lambda: np.zeros((0, 0)))  # of each group
    places_of: dict[str, int] = field(default_factory=dict)  # of each number that the host writes, in a row of them
    version: int = 0  # of the numbers
    runner: Any = None

    @property
    def sizes(self) -> list[int]:
        """Elements that are gone through, of each tensor: real numbers."""
        if self.places is not None:
            return [own.gaps.numel() for own in self.places]
        return [p.numel() * (2 if p.is_complex() else 1) for p in self.columns[0]]

    def write(self, k: int, values: Mapping[str, Any]) -> None:
        """Take over some of the numbers of param group ``k``; those on the device are handed over with each launch."""
        row = self.numbers[self.rank[k]]
        for name, value in values.items():
            if (i := self.places_of.get(name)) is not None:
                row[i] = value
                self.version += 1

    def write_all(self, values: Mapping[str, Any]) -> None:
        """Take over numbers that are the same for all groups."""
        for name, value in values.items():
            if (i := self.places_of.get(name)) is not None:
                self.numbers[:, i] = float(value)
                self.version += 1


@dataclass(eq=False)
class Row:
    """One parameter of the optimizer."""

    p: torch.Tensor
    group: int
    state: dict[str, Any] | None  # None: it has never had a gradient
    mode: str = "eager"
    cohort: int = -1
    on_device: bool = False  # whether steps are counted on the device
    grad_dtype: torch.dtype | None = None


@dataclass(eq=False)
class Plan:
    """What a step goes through."""

    rows: list[Row]
    cohorts: list[Cohort]
    values: list[dict[str, Any]]  # of each group, its numbers by name
    normed: list[bool]  # of each group, whether its rule sees the norm of all gradients
    moving: list[int]  # groups of which more numbers come with every step
    volatile: dict[int, list[str]]  # options of groups that may change without being replaced
    of_group: list[list[Cohort]]
    sharded: bool  # whether some parameters are DTensors
    watched: bool
    scaled: bool
    looker: Looker
    by_hand: list[tuple[int, torch.Tensor]]  # counters that PyTorch increments, with their numbers
    odd: bool = False  # whether some of this step's gradients cannot be read where they are
    norm: Any = None

    @property
    def mode(self) -> str:
        """The backend that runs the first parameter which has a state."""
        return next((row.mode for row in self.rows if row.state is not None), "eager")


def make(optimizer: RuleOptimizer, grads: Sequence[torch.Tensor | None], *, scaled: bool) -> Plan:
    """A plan for the optimizer's parameters that have a state.

    Args:
        grads: of all parameters, the groups one after the other.
        scaled: whether a GradScaler leaves scaling, and skipping, to the step.
    """
    watched = dispatch.is_watched()
    rows, at = [], 0
    for k, group in enumerate(optimizer.param_groups):
        for p in group["params"]:
            rows.append(_row(optimizer, k, group, p, grads[at], watched))
            at += 1
    _part(rows)
    _own_counters(optimizer, rows)
    cohorts = _cohorts(optimizer, rows, scaled)
    groups = optimizer.param_groups
    values = [numbers(optimizer, group) for group in groups]
    for cohort in cohorts:
        for k in cohort.rank:
            cohort.write(k, values[k])
        make_runner = optimizer._compiled if cohort.mode == "compiled" else optimizer._launch
        cohort.runner = make_runner(cohort)
    for i, cohort in enumerate(cohorts):
        for position in cohort.positions:
            if cohort.runner is not None:
                rows[position].cohort = i
            else:  # no compiler, or nothing for it
                rows[position].mode = "foreach" if cohort.places is None and optimizer.multi_tensor else "eager"
    cohorts = [cohort for cohort in cohorts if cohort.runner is not None]
    counters = _counters(optimizer, rows)
    # A step that a scaler skips is not counted: only the device knows.
    by_hand = [(i, t) for i, t in enumerate(counters) if scaled or not _counts_in_place(t)]
    return Plan(
        rows, cohorts, values, [optimizer._needs_norm(group) for group in groups],
        [k for k, group in enumerate(groups) if optimizer._extra(group) or optimizer._derived(group)],
        {k: names for k, group in enumerate(groups) if (names := _volatile(optimizer, group))},
        [[cohort for cohort in cohorts if k in cohort.rank] for k in range(len(groups))],
        any(is_dtensor(row.p) for row in rows), watched, scaled,
        Looker(optimizer, rows, cohorts, counters, {i for i, _ in by_hand}), by_hand,
    )  # fmt: skip


def refresh(optimizer: RuleOptimizer, plan: Plan, dirty: Sequence[int]) -> bool:
    """Read numbers of some groups again; False where these need another plan."""
    for k in dirty:
        group, names = optimizer.param_groups[k], plan.looker.changed(k)
        if k in plan.volatile:
            names += [name for name in plan.volatile[k] if name not in names]
        before = plan.values[k]
        fresh = numbers(optimizer, group, names)
        if any(on_device(value) and before[name] is not value for name, value in fresh.items()):
            return False
        if optimizer._needs_norm(group) != plan.normed[k]:
            return False
        if any(
            isinstance(group[name], (torch.Tensor, list)) and name not in plan.volatile.get(k, ()) for name in names
        ):
            return False
        plan.values[k] = {**before, **fresh}
        for cohort in plan.of_group[k]:
            cohort.write(k, fresh)
    return True


def numbers(optimizer: RuleOptimizer, group: Mapping[str, Any], names: Sequence[str] | None = None) -> dict[str, Any]:
    """The group's numeric hyperparameters, or some of them; tuples as name.0, name.1, ..."""
    found: dict[str, Any] = {}
    for name in (*optimizer.numbers, *optimizer.tuples) if names is None else names:
        value = group[name]
        if name in optimizer.tuples:
            if len(value) != optimizer.tuples[name]:
                raise ValueError(f"{name} must hold {optimizer.tuples[name]} numbers, got {value!r}")
            found.update({f"{name}.{i}": float(v) for i, v in enumerate(value)})
        elif not on_device(value):
            found[name] = float(value)
        elif group["capturable"]:
            found[name] = value
        else:
            raise ValueError(f"{name} as a tensor on {value.device} needs capturable=True")
    return found


def mixed(seed: int, cohort: int, step: int) -> int:
    """A seed for random numbers at one step."""
    return (seed * 1_000_003 + cohort + step * 7919) % 2**31


def _volatile(optimizer: RuleOptimizer, group: Mapping[str, Any]) -> list[str]:
    """Options that may change without being replaced."""
    named = (*optimizer.numbers, *optimizer.tuples)
    return [name for name in named if isinstance(group[name], (torch.Tensor, list))]


def _row(
    optimizer: RuleOptimizer,
    k: int,
    group: dict[str, Any],
    p: torch.Tensor,
    g: torch.Tensor | None,
    watched: bool,
) -> Row:
    state = optimizer.state.get(p)
    if state is None or not all(name in state for name in optimizer._needed(group)):
        return Row(p, k, None)
    if optimizer._counts(group):
        state["step"] = _placed_count(state["step"], group, p)
    if g is not None:
        dispatch.check(optimizer, p, g)
    places = optimizer._places(p)
    otherwise = "foreach" if optimizer.multi_tensor and places is None else "eager"
    mode = "eager" if watched else optimizer._mode(group, p.device)
    if mode == "foreach" or (
        mode != "eager"
        and not (
            dispatch.fits(optimizer, group, p, state)
            and optimizer._fits(group, p)
            and _is_counted(optimizer, group, state)
        )
    ):
        mode = otherwise
    if mode in ("compiled", "kernel") and places is not None and int(places.gaps.sum(dtype=torch.int64)) >= p.numel():
        raise RuntimeError(
            f"{type(optimizer).__name__}: the mask of a parameter of shape {tuple(p.shape)} is another's"
        )
    dtype = p.dtype if g is None else g.dtype
    if mode == "kernel" and not kernel.known(dtype, p.dtype, *(state[name].dtype for name in optimizer.state_names)):
        mode = otherwise
    if dtype.is_complex != p.is_complex() or dtype.is_floating_point != p.is_floating_point():
        mode = "eager"
    there = group["capturable"] or not optimizer._counts(group)
    return Row(p, k, state, mode, on_device=there, grad_dtype=dtype)


def _placed_count(step: Any, group: dict[str, Any], p: torch.Tensor) -> Any:
    """A count of steps as a tensor, and where the group's options want it."""
    if not isinstance(step, torch.Tensor):
        step = torch.tensor(float(step))
    wanted = p.device if group["capturable"] else torch.device("cpu")
    return step if step.device == wanted or type(step) not in PLAIN else step.to(wanted)


def _is_counted(optimizer: RuleOptimizer, group: dict[str, Any], state: dict[str, Any]) -> bool:
    """Whether compiled code can read the count of steps: one float32, on the device where that is where it is kept."""
    if not optimizer._counts(group):
        return True
    step = state["step"]
    kept = group["capturable"] or step.device.type == "cpu"
    return kept and addressable(step) and step.dtype == torch.float32 and step.numel() == 1


def _part(rows: Sequence[Row]) -> None:
    """Send tensors that share memory the way of the reference, one after the other: elsewhere their order is open."""
    spans = []
    for i, row in enumerate(rows):
        if row.mode != "eager" and row.state is not None:
            for t in (row.p, *(v for v in row.state.values() if isinstance(v, torch.Tensor) and v.dim())):
                t = local(t)
                if t.numel() and addressable(t):
                    spans.append((str(t.device), t.data_ptr(), t.data_ptr() + t.numel() * t.element_size(), i))
    spans.sort()
    device, end, last = "", 0, -1
    for where, begin, stop, i in spans:
        if where == device and begin < end:
            rows[i].mode = rows[last].mode = "eager"
        if where != device or stop > end:
            device, end, last = where, stop, i


def _own_counters(optimizer: RuleOptimizer, rows: Sequence[Row]) -> None:
    """Give tensors of different kinds of counting counters of their own."""
    kinds: dict[tuple[int, Any], torch.Tensor] = {}
    seen: dict[int, Any] = {}
    for row in rows:
        group = optimizer.param_groups[row.group]
        if row.state is None or not optimizer._counts(group):
            continue
        step = row.state["step"]
        kind = (group["capturable"], row.p.device if group["capturable"] else None)
        first = seen.setdefault(id(step), kind)
        if first != kind:
            row.state["step"] = kinds.setdefault((id(step), kind), step.clone())


def _counters(optimizer: RuleOptimizer, rows: Sequence[Row]) -> list[torch.Tensor]:
    found: dict[int, torch.Tensor] = {}
    for row in rows:
        if row.state is not None and optimizer._counts(optimizer.param_groups[row.group]):
            found.setdefault(id(row.state["step"]), row.state["step"])
    return list(found.values())


def _counts_in_place(t: torch.Tensor) -> bool:
    return addressable(t) and t.device.type == "cpu" and t.dtype == torch.float32 and t.numel() == 1


def apart(plan: Plan, counters: Sequence[torch.Tensor]) -> None:
    """Give every tensor that shares one of these counters its own: not all of them have a gradient any more."""
    shared = {id(t) for t in counters}
    for row in plan.rows:
        if row.state is not None and id(row.state.get("step")) in shared:
            row.state["step"] = row.state["step"].clone()


def _cohorts(optimizer: RuleOptimizer, rows: Sequence[Row], scaled: bool) -> list[Cohort]:
    members: dict[Any, list[int]] = {}
    for i, row in enumerate(rows):
        if row.state is None or row.mode not in ("compiled", "kernel"):
            continue
        group = optimizer.param_groups[row.group]
        program = dispatch.program_of(optimizer, group)
        assert row.grad_dtype is not None
        layout = dispatch.layout_of(optimizer, group, row.mode, program, row.p, row.grad_dtype, scaled)
        # What a group has on the device is handed over once a launch.
        apart = row.group if set(getattr(layout, "arguments", ())) - {"grad_norm"} else -1
        members.setdefault((row.mode, program, layout, row.p.device, apart), []).append(i)
    cohorts = []
    for (mode, program, layout, device, _), positions in members.items():
        owners = [rows[i].p for i in positions]
        group = optimizer.param_groups[rows[positions[0]].group]
        names = optimizer._stored(group)
        states = [rows[i].state or {} for i in positions]
        columns = [[local(p) for p in owners], *([local(s[name]) for s in states] for name in names)]
        places = [own for own in map(optimizer._places, owners) if own is not None]
        counters = [s.get("step") if optimizer._counts(group) else None for s in states]
        cohort = Cohort(mode, program, layout, device, positions, owners, columns, places or None, counters, {})
        _divide(optimizer, cohort, [rows[i].group for i in positions])
        cohorts.append(cohort)
    return cohorts


def _divide(optimizer: RuleOptimizer, cohort: Cohort, groups: Sequence[int]) -> None:
    """A cohort's blocks: one for each group and counter."""
    on_host = "step" not in getattr(cohort.layout, "on_device", ())
    known: dict[Any, int] = {}
    for k, counter in zip(groups, cohort.counters, strict=True):
        cohort.rank.setdefault(k, len(cohort.rank))
        key = (k, id(counter) if on_host else None)
        if key not in known:
            known[key] = len(cohort.blocks)
            seed = optimizer.param_groups[k]["rounding_seed"]
            cohort.blocks.append(Block(cohort.rank[k], counter, on_host, seed))
        cohort.of_block.append(known[key])
    names, elsewhere = compiled.numbers_of(cohort.program), getattr(cohort.layout, "on_device", ())
    cohort.numbers = np.zeros((len(cohort.rank), len(names)))
    cohort.places_of = {name: i for i, name in enumerate(names) if name not in elsewhere}
    if cohort.mode == "kernel" and len(cohort.blocks) > 1:
        cohort.layout = replace(cohort.layout, many=True)
