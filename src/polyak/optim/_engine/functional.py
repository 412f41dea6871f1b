"""A rule applied to lists of tensors, without an optimizer object: the functional form that every system offers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from polyak.optim._engine import foreach as foreach_backend
from polyak.optim._engine.eager import eager
from polyak.optim._engine.rounding import Rounding
from polyak.optim._engine.trace import Hyper, trace


def apply(
    rule: Callable[..., tuple[Any, dict[str, Any]]],
    params: Sequence[torch.Tensor],
    grads: Sequence[torch.Tensor],
    states: Mapping[str, Sequence[torch.Tensor]],
    steps: Sequence[torch.Tensor] | None,
    hyper: Mapping[str, Any],
    *,
    maximize: bool,
    foreach: bool,
) -> None:
    """Update ``params`` and ``states`` in place; ``steps`` (tensors of one element, one per parameter) are incremented.

    Raises:
        ValueError: lists of unequal length.
    """
    lists = {"grads": grads, **states, **({} if steps is None else {"state_steps": steps})}
    for name, values in lists.items():
        if len(values) != len(params):
            raise ValueError(f"{name} has {len(values)} tensors where params has {len(params)}")
    groups: dict[Any, list[int]] = {}
    for i, p in enumerate(params):
        if steps is not None:
            steps[i].add_(1)
        groups.setdefault((None if steps is None else float(steps[i]), p.device, p.dtype), []).append(i)
    for (step, _, dtype), members in groups.items():
        values = dict(hyper) if step is None else {**hyper, "step": step}
        if not foreach:
            for i in members:
                state = {name: column[i] for name, column in states.items()}
                eager(rule, params[i], -grads[i] if maximize else grads[i], state, Hyper(**values), Rounding())
            continue
        numeric = {n: v for n, v in values.items() if isinstance(v, (float, tuple)) and not isinstance(v, bool)}
        static = {n: v for n, v in values.items() if n not in numeric}
        lengths = {n: len(v) if isinstance(v, tuple) else 0 for n, v in numeric.items()}
        program = trace(rule, states, lengths, static, maximize=maximize)
        uniforms: dict[str, float] = {}
        for name, value in numeric.items():
            uniforms.update(
                {f"{name}.{i}": v for i, v in enumerate(value)} if isinstance(value, tuple) else {name: value}
            )
        columns = [[column[i] for i in members] for column in (params, grads, *states.values())]
        compute = torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype
        foreach_backend.run(program, columns, uniforms, compute, Rounding())
