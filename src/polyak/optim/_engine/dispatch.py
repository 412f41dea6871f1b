"""Which backend runs what: chosen from the options of a param group and from the tensors themselves."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from polyak.optim._engine import kernel
from polyak.optim._engine.blocked import Blocked, Layout
from polyak.optim._engine.options import on_device
from polyak.optim._engine.rounding import Rounding
from polyak.optim._engine.tensors import compute_dtype, flat, plain, real_dtype
from polyak.optim._engine.trace import Program, trace

if TYPE_CHECKING:
    from polyak.optim._engine.base import RuleOptimizer
    from polyak.optim._engine.plan import Cohort

_programs: dict[Any, Program] = {}


def mode_of(optimizer: RuleOptimizer, group: dict[str, Any], device: torch.device) -> str:
    """The backend that a group's options ask for on a device: "eager", "blocked", "foreach" or "kernel"."""
    loop = group["foreach"] is False and not group["fused"]
    if group["differentiable"] or loop or not optimizer._elementwise(group):
        return "eager"
    wanted = group["fused"] or (device.type == "cuda" and not group["foreach"] and group["fused"] is None)
    if wanted and kernel.available(device):
        return "kernel"
    if device.type == "cpu":
        return "blocked" if optimizer.multi_tensor or not group["foreach"] else "eager"
    return "foreach" if optimizer.multi_tensor else "eager"


def mode_for(optimizer: RuleOptimizer, group: dict[str, Any], p: torch.Tensor) -> str:
    """The backend that a group's options ask for, if it can take this parameter and its state; else one that can."""
    mode, places = optimizer._mode(group, p.device), optimizer._places(p)
    if mode in ("blocked", "kernel") and not optimizer._is_laid_out(group, p):
        return "foreach" if places is None and optimizer.multi_tensor else "eager"
    return "eager" if mode == "foreach" and places is not None else mode


def static(optimizer: RuleOptimizer, group: dict[str, Any]) -> dict[str, Any]:
    """The options that a program is made for."""
    return {name: group[name] for name in optimizer.switches}


def further(optimizer: RuleOptimizer, group: dict[str, Any]) -> tuple[str, ...]:
    """Names of the rule's uniform inputs that are no options."""
    counted = ("step",) if optimizer._counts(group) else ()
    return (*optimizer._extra(group), *optimizer._derived(group), *counted)


def program_of(optimizer: RuleOptimizer, group: dict[str, Any]) -> Program:
    """The group's traced rule; made once for all groups and optimizers that need the same one."""
    rule, fixed = type(optimizer).rule, static(optimizer, group)
    lengths = {
        **dict.fromkeys((*optimizer.numbers, *further(optimizer, group)), 0),
        **optimizer.tuples,
    }
    key = (rule, optimizer.state_names, tuple(lengths.items()), tuple(fixed.items()), group["maximize"])
    if key not in _programs:
        _programs[key] = trace(rule, optimizer.state_names, lengths, fixed, maximize=group["maximize"])
    return _programs[key]


def equip(
    optimizer: RuleOptimizer,
    cohort: Cohort,
    group: dict[str, Any],
    owners: list[torch.Tensor],
    dtype: torch.dtype,
    grad_dtype: torch.dtype,
    state_types: tuple[torch.dtype, ...],
) -> None:
    """Give a cohort its tensors and what runs its step."""
    mode, names = cohort.mode, optimizer._stored(group)
    program = program_of(optimizer, group) if mode != "eager" else None
    # A rule that is not elementwise needs the whole tensor, and lets DTensor see to its parts.
    local = plain if optimizer._elementwise(group) else (lambda t: t)
    columns = [[local(p) for p in owners], *([local(optimizer.state[p][name]) for p in owners] for name in names)]
    real = real_dtype(dtype)
    compute = compute_dtype(real)
    of_states = [real_dtype(t) for t in state_types[: len(optimizer.state_names)]]
    storage = (real, real_dtype(grad_dtype), *of_states)
    rounding = Rounding(group["rounding"])
    if mode in ("blocked", "kernel"):
        cohort.strides = [p.stride() for p in columns[0]]
    if rounding.mode == "stochastic" and mode != "kernel":
        cohort.generator = torch.Generator(device=cohort.device)
        if cohort.step is not None and cohort.step.device.type != "cpu":
            # The step cannot be read at every update: from here on the generator goes on by itself.
            cohort.generator.manual_seed(mixed(group["rounding_seed"], cohort.salt, int(cohort.step)))
    cohort.arrays, cohort.runner = columns, program
    cohort.notes = [optimizer._note(p) for p in owners]
    places = [own for own in map(optimizer._places, owners) if own is not None]
    cohort.places, gaps = places or None, places[0].gaps.dtype if places else None
    if mode == "blocked":
        assert program is not None
        layout = Layout(compute, storage, rounding, gaps)
        runner = None if group["foreach"] else optimizer._compiled(program, layout, cohort, owners, group)
        if runner is not None:
            cohort.mode, cohort.runner = "compiled", runner
            return
        if gaps is not None or not optimizer.multi_tensor:
            cohort.mode = "eager"
            return
        cohort.runner = Blocked(program, layout)
        cohort.arrays = [[flat(t) for t in column] for column in columns]
    elif mode == "kernel":
        assert program is not None
        loaded = [*optimizer._extra(group)]
        if group["capturable"]:
            loaded += ["step"] if optimizer._counts(group) else []
        loaded += ["lr"] if on_device(group.get("lr")) else []
        used = tuple(n for n in loaded if n in program.uniforms)
        scaled = getattr(optimizer, "found_inf", None) is not None
        signature = kernel.Signature(compute, storage, rounding, used, scaled, gaps)
        cohort.runner = optimizer._launch(program, signature, cohort, owners, group)


def mixed(seed: int, cohort: int, step: int) -> int:
    """A seed for one cohort's random numbers at one step."""
    return (seed * 1_000_003 + cohort + step * 7919) % 2**31
