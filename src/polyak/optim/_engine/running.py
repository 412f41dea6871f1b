"""Running a step: check the plan, run each cohort, then run what has no plan."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from polyak.optim._engine import dispatch, loose
from polyak.optim._engine import plan as plans
from polyak.optim._engine.launch import Norm
from polyak.optim._engine.look import APART, CHANGED, COPIED, DIRTY, LOOSE, ODD
from polyak.optim._engine.norm import global_norm
from polyak.optim._engine.plan import Cohort, Plan
from polyak.optim._engine.tensors import PLAIN, is_dtensor, laid_out, local, placed_like

if TYPE_CHECKING:
    from polyak.optim._engine.base import RuleOptimizer

Gradients = list["torch.Tensor | None"]


def step(optimizer: RuleOptimizer) -> None:
    """Update all parameters that have a gradient."""
    optimizer._prepare()
    scale, found_inf = getattr(optimizer, "grad_scale", None), getattr(optimizer, "found_inf", None)
    held: list[torch.Tensor] = []
    optimizer._loose_counts = []
    plan, grads = _ready(optimizer, held, found_inf)
    if plan is None:
        return
    items = _odd(optimizer, plan, grads, held) if plan.odd else []
    if plan.by_hand:
        _count(plan, found_inf if plan.scaled else None)
    values = _values(optimizer, plan, grads, items, scale if plan.scaled else None)
    for cohort in plan.cohorts:
        if cohort.mode == "compiled":
            cohort.runner.run()
        else:
            cohort.runner.run(_on_device(cohort, values), (scale, found_inf))
    if items:
        optimizer._loose_counts = loose.run(optimizer, items, values)


# For torch.compile, which is not to trace it: the backends are compiled already, and plans are made from addresses.
untraced_step = torch.compiler.disable(step)  # type: ignore[misc]


def counted(optimizer: RuleOptimizer) -> torch.Tensor:
    """How many elements the rule's condition held for at the last step: on the first parameter's device, no waiting."""
    device = optimizer.param_groups[0]["params"][0].device
    cohorts = [] if optimizer._plan is None else optimizer._plan.cohorts
    counts = [cohort.runner.counts for cohort in cohorts]
    parts = [*optimizer._loose_counts, *(c.sum() for c in counts if c is not None)]
    if not parts:
        return torch.zeros((), dtype=torch.int64, device=device)
    return torch.stack([c.to(device) for c in parts]).sum()


def _ready(
    optimizer: RuleOptimizer, held: list[torch.Tensor], found_inf: torch.Tensor | None
) -> tuple[Plan | None, Gradients | None]:
    """A plan that everything is as in, and the gradients where they are not the parameters' own."""
    for _ in range(4):
        plan, grads = optimizer._plan, None
        held.clear()
        if plan is not None and not (plan.looker.is_of(optimizer) and plan.watched == dispatch.is_watched()):
            plan = None
        if plan is not None and (found_inf is not None or plan.scaled):
            grads = [row.p.grad for row in plan.rows]
            if plan.scaled != (found_inf is not None and _all_scaled(plan, grads)):
                plan = None
            elif found_inf is not None and not plan.scaled:
                # A parameter that the kernel cannot take (one with gaps in memory): here the host has to look.
                if bool(found_inf):
                    return None, None
                grads = _unscaled(grads, getattr(optimizer, "grad_scale", None))
        if plan is not None and not _look(optimizer, plan, grads, held) & CHANGED:
            return plan, grads
        if not _begin(optimizer, found_inf):
            return None, None
    raise RuntimeError(f"{type(optimizer).__name__}: parameters or gradients change while they are looked at")


def _look(optimizer: RuleOptimizer, plan: Plan, grads: Gradients | None, held: list[torch.Tensor]) -> int:
    looker = plan.looker
    if plan.volatile:
        looker.dirty[list(plan.volatile)] |= 1 << 62
    if plan.sharded:
        grads = [row.p.grad for row in plan.rows] if grads is None else grads
        grads = [
            local(placed_like(g, row.p)) if g is not None and row.cohort >= 0 and is_dtensor(row.p) else g
            for g, row in zip(grads, plan.rows, strict=True)
        ]
    found = looker.look(grads, held, advance=True)
    plan.odd = bool(found & ODD)
    if found & APART and not found & CHANGED:
        several = zip(looker.counters, looker.active.tolist(), looker.members, strict=True)
        plans.apart(plan, [counter for counter, active, members in several if 0 < active < members])
        return CHANGED
    if found & CHANGED or not found:
        return found
    if found & DIRTY and not plans.refresh(optimizer, plan, looker.dirty.nonzero()[0].tolist()):
        return CHANGED
    if plan.odd:
        for row, status in zip(plan.rows, looker.status.tolist(), strict=True):
            if status == LOOSE and row.p.grad is not None:
                dispatch.check(optimizer, row.p, row.p.grad)
    looker.advance()
    return found


def _all(plan: Plan, grads: Gradients | None) -> Gradients:
    return [row.p.grad for row in plan.rows] if grads is None else grads


def _unscaled(grads: Gradients, scale: torch.Tensor | None) -> Gradients:
    return grads if scale is None else [None if g is None else g / scale.to(g.device, g.dtype) for g in grads]


def _odd(optimizer: RuleOptimizer, plan: Plan, grads: Gradients | None, held: list[torch.Tensor]) -> list[loose.Item]:
    """Copy the gradients that cannot be read where they are; those that no compiled code can take are returned."""
    items = []
    for i, (row, status, g) in enumerate(zip(plan.rows, plan.looker.status.tolist(), _all(plan, grads), strict=True)):
        if g is not None and status == LOOSE:
            items.append(loose.Item(row.group, i, row.p, g, row.mode == "foreach"))
        elif g is not None and status == COPIED:
            own = local(placed_like(g, row.p)) if is_dtensor(row.p) else g
            held.append(laid_out(own, local(row.p).stride()))
            plan.looker.put(i, held[-1])
    return items


def _all_scaled(plan: Plan, grads: Gradients) -> bool:
    """Whether every gradient goes to a kernel, with its count of steps on the device: those unscale, and skip, by themselves."""
    return all(
        row.mode == "kernel" and row.on_device
        for row, g in zip(plan.rows, grads, strict=True)
        if g is not None and row.state is not None
    )


def _begin(optimizer: RuleOptimizer, found_inf: torch.Tensor | None) -> bool:
    """Make what states are missing, and a plan; False where there is no gradient at all."""
    grads: Gradients = []
    for group in optimizer.param_groups:
        own = [p.grad for p in group["params"]]
        grads += own
        some = [(p, g) for p, g in zip(group["params"], own, strict=True) if g is not None]
        if some:
            optimizer._init_group(group, [p for p, _ in some], [g for _, g in some])
    if all(g is None for g in grads):
        return False
    optimizer._plan = plans.make(optimizer, grads, scaled=False)
    if found_inf is not None and _all_scaled(optimizer._plan, grads):
        optimizer._plan = plans.make(optimizer, grads, scaled=True)
    return True


def _count(plan: Plan, found_inf: torch.Tensor | None) -> None:
    """Count a step where compiled code does not: on devices, and in tensors that are no plain memory."""
    one: dict[torch.device, list[torch.Tensor]] = {}
    for i, counter in plan.by_hand:
        if plan.looker.active[i]:
            one.setdefault(counter.device, []).append(counter)
    for device, counters in one.items():
        if found_inf is not None:
            taken = 1 - found_inf.to(device, counters[0].dtype).reshape(())
            for counter in counters:
                counter += taken
        elif device.type == "cuda" and len(counters) > 1:
            torch._foreach_add_(counters, 1)
        else:
            for counter in counters:
                counter += 1


def _values(
    optimizer: RuleOptimizer,
    plan: Plan,
    grads: Gradients | None,
    items: list[loose.Item],
    scale: torch.Tensor | None,
) -> list[dict[str, Any]]:
    """The numbers of each group at this step; those of compiled code are written where it reads them."""
    values, normed = plan.values, any(plan.normed)
    if not (plan.moving or normed):
        return values
    handed = bool(items) or any(cohort.mode == "kernel" for cohort in plan.cohorts)
    if plan.moving:
        more = {k: _moving(optimizer, k) for k in plan.moving}
        alike = len(more) == len(values) and len({id(found) for found in more.values()}) == 1
        for cohort in plan.cohorts:
            if alike:
                cohort.write_all(more[0])
            else:
                for k in cohort.rank:
                    cohort.write(k, more.get(k, {}))
        if handed:
            values = [{**known, **more.get(k, {})} for k, known in enumerate(values)]
    if normed:
        norm = _norm(plan, grads, items)
        if scale is not None:
            norm = norm / scale.to(norm.device) if isinstance(norm, torch.Tensor) else norm / float(scale)
        if handed:
            values = [{**known, "grad_norm": norm} for known in values]
        for cohort in plan.cohorts:
            cohort.write_all({"grad_norm": norm})
    return values


def _moving(optimizer: RuleOptimizer, k: int) -> Mapping[str, Any]:
    """A group's numbers that come with this step."""
    group = optimizer.param_groups[k]
    derived, names = optimizer._derived(group), optimizer._extra(group)
    return {**derived, **{name: optimizer._extra_values[k][name] for name in names}} if names else derived


def _norm(plan: Plan, grads: Gradients | None, items: list[loose.Item]) -> Any:
    """The norm of all gradients together: a number, or a tensor on a device that is not waited for."""
    runners = [cohort.runner for cohort in plan.cohorts]
    devices = {cohort.device for cohort in plan.cohorts}
    if items or plan.sharded or len(devices) != 1 or len({cohort.mode for cohort in plan.cohorts}) != 1:
        return global_norm([g for g in _all(plan, grads) if g is not None])
    if plan.cohorts[0].mode == "compiled":
        return sum(runner.squares() for runner in runners) ** 0.5
    if plan.norm is None:
        plan.norm = Norm(runners, *devices)
    return plan.norm.run()


def _on_device(cohort: Cohort, values: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """What a launch is handed as tensors of one element, which all of its groups share."""
    if not cohort.layout.arguments:
        return {}
    found = {name: values[next(iter(cohort.rank))][name] for name in cohort.layout.arguments}
    for name, value in found.items():
        if type(value) not in PLAIN:
            value = torch.tensor(float(value), dtype=torch.float64)
        if value.device != cohort.device:
            value = value.to(cohort.device, non_blocking=True)
        found[name] = value
    return found
