"""The reference backend: a rule as it is written, in eager PyTorch, on one tensor."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import torch

from polyak.optim._engine.rounding import Rounding, store
from polyak.optim._engine.tensors import compute_dtype


def eager(
    rule: Callable[..., tuple[Any, dict[str, Any]]],
    p: torch.Tensor,
    g: torch.Tensor,
    state: Mapping[str, torch.Tensor],
    h: Any,
    rounding: Rounding,
    remainder: torch.Tensor | None = None,
    generator: torch.Generator | None = None,
) -> torch.Tensor | None:
    """The reference: the rule itself on one tensor, written back in place. Returns the number of elements it counted."""
    compute = compute_dtype(p.dtype)
    # What is differentiated must not be written over: autograd may need it for the rule's backward.
    kept = torch.is_grad_enabled()
    value = p.to(compute, copy=kept) if remainder is None else p.to(compute) + remainder.to(compute)
    inputs = {"p": value, **{name: s.to(compute, copy=kept) for name, s in state.items()}}
    new, new_state = rule(value, g.to(compute), SimpleNamespace(**inputs), h)
    count = new_state.pop("count", None)
    outputs: dict[str, Any] = {"p": new, **new_state}
    for name, out in outputs.items():
        if not isinstance(out, torch.Tensor):
            outputs[name] = torch.as_tensor(out, dtype=compute, device=p.device).expand_as(p)
        elif any(out is old for other, old in inputs.items() if other != name):
            outputs[name] = out.clone()  # what it was before any of them is written
    store(p, outputs.pop("p"), rounding, remainder, generator)
    for name, s in outputs.items():
        state[name].copy_(s)
    return None if count is None else torch.as_tensor(count, device=p.device).sum()
