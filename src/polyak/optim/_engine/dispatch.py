"""Which backend takes which tensor: chosen from the options of its param group and from what the tensor itself is.

Compiled code and kernels hold addresses. They take what has one and lies in memory as they go through it; all else goes the
way of ``foreach=False``, in PyTorch's own operations.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from polyak.core.launch import available
from polyak.optim._engine import compiled, kernel
from polyak.optim._engine.options import on_device
from polyak.optim._engine.rounding import Rounding
from polyak.optim._engine.tensors import (
    PLAIN,
    addressable,
    compute_dtype,
    dense,
    is_dtensor,
    is_short,
    local,
    real_dtype,
    shares_elements,
    side_by_side,
)
from polyak.optim._engine.trace import Program, trace

if TYPE_CHECKING:
    from polyak.optim._engine.base import RuleOptimizer

_programs: dict[Any, Program] = {}
_modes_active = getattr(torch._C, "_len_torch_dispatch_stack", lambda: 0)


def is_watched() -> bool:
    """Whether a mode (fake tensors, a counter of operations) wants to see every operation: compiled code hides them."""
    return _modes_active() > 0


def mode_of(optimizer: RuleOptimizer, group: dict[str, Any], device: torch.device) -> str:
    """The backend that a group's options ask for on a device: "eager", "compiled", "foreach" or "kernel"."""
    loop = group["foreach"] is False and not group["fused"]
    if group["differentiable"] or loop or not optimizer._elementwise(group):
        return "eager"
    wanted = group["fused"] or (device.type == "cuda" and not group["foreach"] and group["fused"] is None)
    if wanted and available(device):
        return "kernel"
    if device.type == "cpu" and not group["foreach"]:
        return "compiled"
    return "foreach" if optimizer.multi_tensor else "eager"


def fits(optimizer: RuleOptimizer, group: dict[str, Any], p: torch.Tensor, state: dict[str, Any]) -> bool:
    """Whether compiled code can go through the parameter and its state side by side, at their addresses."""
    places, own = optimizer._places(p), local(p)
    if not addressable(own):
        return False
    states = [state[name] for name in optimizer._stored(group)]
    kept = [state[name] for name in optimizer.other_names if name in state]
    if any(is_dtensor(t) != is_dtensor(p) for t in states):
        return False
    mine = [local(t) for t in states]
    if not all(addressable(t) and t.device == own.device for t in (*mine, *kept)):
        return False
    if not all(t.is_complex() == own.is_complex() and t.is_floating_point() == own.is_floating_point() for t in mine):
        return False
    if places is not None:
        return own.is_contiguous() and all(t.is_contiguous() for t in (*mine, *kept))
    return dense(own) and all(t.shape == own.shape and side_by_side(t, own) for t in mine)


def check(optimizer: RuleOptimizer, p: torch.Tensor, g: torch.Tensor) -> None:
    """Raise RuntimeError where a gradient or a state cannot be one of this parameter, or elements are not in memory."""
    name = type(optimizer).__name__
    if g.layout is not torch.strided or p.layout is not torch.strided:
        what, layout = ("gradients", g.layout) if g.layout is not torch.strided else ("parameters", p.layout)
        raise RuntimeError(f"{name} does not support sparse {what}, got layout {layout}")
    if g.shape != p.shape or g.device != p.device:
        raise RuntimeError(
            f"{name}: a gradient must have its parameter's shape and device, got {tuple(g.shape)} on {g.device} for "
            f"{tuple(p.shape)} on {p.device}"
        )
    if shares_elements(p):
        raise RuntimeError(f"{name} cannot update an expanded parameter (several of its elements are one in memory)")
    _check_storage(name, "gradient", g)
    check_state(optimizer, p)


def check_state(optimizer: RuleOptimizer, p: torch.Tensor) -> None:
    """Raise RuntimeError where a state cannot be one of this parameter, or elements are not in memory."""
    name, state = type(optimizer).__name__, optimizer.state.get(p, {})
    _check_storage(name, "parameter", p)
    expected = optimizer._shape(p, state)
    for key in optimizer.state_names:
        if isinstance(t := state.get(key), torch.Tensor):
            if t.shape != expected:
                raise RuntimeError(
                    f"{name}: the state {key} has shape {tuple(t.shape)} where its parameter needs {tuple(expected)}. "
                    "A parameter that was resized needs a new state: del optimizer.state[p]"
                )
            _check_storage(name, f"state {key}", t)


def _check_storage(name: str, what: str, t: torch.Tensor) -> None:
    if type(t) in PLAIN and t.layout is torch.strided and is_short(t):
        raise RuntimeError(f"{name}: a {what} of shape {tuple(t.shape)} is not in its storage, which was freed or cut")


def matters(optimizer: RuleOptimizer, name: str) -> int:
    """What a group's entry is to a plan: 0 nothing, 1 it is made for it, 2 a number that may change."""
    if name in optimizer.numbers or name in optimizer.tuples:
        return 2
    return int(name == "params" or name in optimizer.defaults)


def static(optimizer: RuleOptimizer, group: dict[str, Any]) -> dict[str, Any]:
    """The options that a program is made for."""
    return {name: group[name] for name in optimizer.switches}


def further(optimizer: RuleOptimizer, group: dict[str, Any]) -> tuple[str, ...]:
    """Names of the rule's uniform inputs that are no options."""
    norm = ("grad_norm",) if optimizer._needs_norm(group) else ()
    counted = ("step",) if optimizer._counts(group) else ()
    return (*optimizer._extra(group), *optimizer._derived(group), *norm, *counted)


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


def layout_of(
    optimizer: RuleOptimizer,
    group: dict[str, Any],
    mode: str,
    program: Program,
    p: torch.Tensor,
    grad_dtype: torch.dtype,
    scaled: bool,
) -> compiled.Layout | kernel.Signature:
    """What of a parameter's types and options compiled code is made for."""
    state, places = optimizer.state[p], optimizer._places(p)
    real = real_dtype(p.dtype)
    storage = (real, real_dtype(grad_dtype), *(real_dtype(state[name].dtype) for name in optimizer.state_names))
    gaps = None if places is None else places.gaps.dtype
    compute, rounding = compute_dtype(real), Rounding(group["rounding"])
    if mode == "compiled":
        return compiled.Layout(compute, storage, rounding, gaps)
    loaded = [*optimizer._extra(group)]
    loaded += ["step"] if group["capturable"] and optimizer._counts(group) else []
    loaded += ["lr"] if on_device(group.get("lr")) else []
    loaded += ["grad_norm"] if optimizer._needs_norm(group) else []
    used = tuple(name for name in loaded if name in program.uniforms)
    return kernel.Signature(compute, storage, rounding, used, scaled, gaps)
