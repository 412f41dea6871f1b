"""A step of a param group: the plan is looked for or made, and each of its cohorts is run by its backend."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from polyak.optim._engine import foreach as foreach_backend
from polyak.optim._engine import plan as plans
from polyak.optim._engine.dispatch import further, mixed, static
from polyak.optim._engine.eager import eager
from polyak.optim._engine.plan import Cohort
from polyak.optim._engine.rounding import Rounding
from polyak.optim._engine.tensors import compute_dtype, flat, laid_out, placed_like, plain, wide
from polyak.optim._engine.trace import Hyper

if TYPE_CHECKING:
    from polyak.optim._engine.base import RuleOptimizer

_GRAD = operator.attrgetter("grad")  # in map(), no bytecode per tensor


@torch.compiler.disable  # type: ignore[misc]
def step_group(optimizer: RuleOptimizer, index: int, group: dict[str, Any]) -> None:
    """Update the parameters of a group that have a gradient.

    Not traced by torch.compile: the backends are compiled already, and plans are made from addresses.
    """
    plan = optimizer._plans.get(index)
    grads = list(map(_GRAD, group["params"]))
    params = group["params"]
    if type(None) in set(map(type, grads)):
        params = [p for p, g in zip(params, grads, strict=True) if g is not None]
        grads = [g for g in grads if g is not None]
    if not params:
        return
    if plan is None or not plans.valid(optimizer, plan, group, params, grads):
        optimizer._init_group(group, params, grads)
        plan = optimizer._plans[index] = plans.make(optimizer, index, group, params, grads)
    numbers = {**plan.numbers, **optimizer._derived(group)}
    numbers.update({name: optimizer._extra_values[index][name] for name in optimizer._extra(group)})
    scale, found_inf = getattr(optimizer, "grad_scale", None), getattr(optimizer, "found_inf", None)
    if plan.unwrap:
        grads = [plain(placed_like(g, p)) for g, p in zip(grads, params, strict=True)]
    if found_inf is not None and scale is None:  # as GradScaler has it after unscale_()
        scale = torch.ones_like(found_inf)
    for cohort in plan.cohorts:
        own = grads if len(cohort.members) == len(grads) else [grads[i] for i in cohort.members]
        if found_inf is not None and cohort.mode != "kernel":
            # A parameter that the kernel cannot take (one with gaps in memory): here the host has to look.
            if bool(found_inf):
                continue
            own = [g / scale.to(g.device, g.dtype) for g in own]  # type: ignore[union-attr]
        _run(optimizer, cohort, own, group, numbers, scale, found_inf)


def counted(optimizer: RuleOptimizer) -> torch.Tensor:
    """How many elements the rule's condition held for at the last step: on the first parameter's device, no waiting."""
    device = optimizer.param_groups[0]["params"][0].device
    parts = []
    for plan in optimizer._plans.values():
        for cohort in plan.cohorts:
            counts = getattr(cohort.runner, "counts", None)
            parts += cohort.counts if counts is None else [counts.sum()]
    if not parts:
        return torch.zeros((), dtype=torch.int64, device=device)
    return torch.stack([c.to(device) for c in parts]).sum()


def _run(
    optimizer: RuleOptimizer,
    cohort: Cohort,
    grads: Sequence[torch.Tensor],
    group: dict[str, Any],
    numbers: dict[str, Any],
    scale: torch.Tensor | None,
    found_inf: torch.Tensor | None,
) -> None:
    step, values, seed, mode = cohort.step, numbers, group["rounding_seed"], cohort.mode
    cohort.counts = []
    if step is not None:
        if found_inf is None:
            step += 1
        else:
            step += 1 - found_inf.to(step.device, step.dtype).reshape(())
        on_host = not group["capturable"] or (step.device.type == "cpu" and mode != "kernel")
        values = {**numbers, "step": step if mode == "kernel" and not on_host else wide(step)}
        if on_host:
            values["step"] = float(step)
    if group["rounding"] == "stochastic":
        # A new draw for every step and cohort, the same again after a checkpoint.
        on_host = step is not None and step.device.type == "cpu"
        seed = mixed(seed, cohort.salt, int(step) if on_host else 0)  # type: ignore[arg-type]
        if cohort.generator is not None and on_host:
            cohort.generator.manual_seed(seed)
    if mode == "kernel":
        if list(map(torch.Tensor.stride, grads)) != cohort.strides:
            grads = [laid_out(g, s) for g, s in zip(grads, cohort.strides, strict=True)]
        for name in cohort.runner.signature.on_device:
            values = _moved(values, name, cohort.device)
        cohort.runner.run(grads, values, (scale, found_inf), seed)
    elif mode == "compiled":
        if list(map(torch.Tensor.stride, grads)) != cohort.strides:
            grads = [laid_out(g, s) for g, s in zip(grads, cohort.strides, strict=True)]
        cohort.runner.run(grads, {name: float(value) for name, value in values.items()})
    elif mode == "blocked":
        p, *states = cohort.arrays
        flattened = [flat(laid_out(g, s)) for g, s in zip(grads, cohort.strides, strict=True)]
        hosted = {name: float(value) for name, value in values.items()}
        cohort.counts = cohort.runner.run([p, flattened, *states], hosted, cohort.generator)
    elif mode == "foreach":
        p, *states = cohort.arrays
        for name in optimizer._extra(group):
            values = _moved(values, name, cohort.device)
        compute, rounding = compute_dtype(p[0].dtype), Rounding(group["rounding"])
        columns = [p, grads, *states]
        cohort.counts = foreach_backend.run(cohort.runner, columns, values, compute, rounding, cohort.generator)
    else:
        for name in optimizer._extra(group):
            values = _moved(values, name, cohort.device)
        _run_eager(optimizer, cohort, grads, group, values)


def _run_eager(
    optimizer: RuleOptimizer,
    cohort: Cohort,
    grads: Sequence[torch.Tensor],
    group: dict[str, Any],
    values: dict[str, Any],
) -> None:
    """The reference: the rule itself, on one tensor after the other."""
    h = Hyper(**static(optimizer, group))
    for name in (*optimizer.numbers, *further(optimizer, group)):
        setattr(h, name, values[name])
    for name, length in optimizer.tuples.items():
        setattr(h, name, tuple(values[f"{name}.{i}"] for i in range(length)))
    rounding, names = Rounding(group["rounding"]), optimizer.state_names
    for k, ((p, *stored), g) in enumerate(zip(zip(*cohort.arrays, strict=True), grads, strict=True)):
        state = dict(zip(names, stored, strict=False))
        remainder = stored[-1] if rounding.mode == "kahan" else None
        h.note = cohort.notes[k]
        places = None if cohort.places is None else cohort.places[k].indices()
        own = p if places is None else p.flatten()[places]
        g = g if places is None else g.flatten()[places]
        signed = -g if group["maximize"] else g
        count = eager(type(optimizer).rule, own, signed, state, h, rounding, remainder, cohort.generator)
        if places is not None:
            p.copy_(p.flatten().index_copy(0, places, own).view_as(p))
        if count is not None:
            cohort.counts.append(count)


def _moved(values: dict[str, Any], name: str, device: torch.device) -> dict[str, Any]:
    """``values`` with one tensor on ``device``."""
    value = values[name]
    if value.device == device:
        return values
    return {**values, name: value.to(device, non_blocking=True)}
