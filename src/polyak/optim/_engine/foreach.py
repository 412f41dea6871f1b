"""The multi-tensor backend for any device: a traced rule as a sequence of ``torch._foreach_*`` calls.

One call an operation over all tensors; intermediates are as large as the parameters, as with ``foreach`` in torch.optim.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from polyak.core import elementwise
from polyak.optim._engine.rounding import Rounding, store
from polyak.optim._engine.trace import Expr, Program

_FOREACH = {
    "add": torch._foreach_add, "sub": torch._foreach_sub, "mul": torch._foreach_mul, "div": torch._foreach_div,
    "min": torch._foreach_minimum, "max": torch._foreach_maximum, "neg": torch._foreach_neg, "sqrt": torch._foreach_sqrt,
    "abs": torch._foreach_abs, "exp": torch._foreach_exp, "tanh": torch._foreach_tanh,
}  # fmt: skip
_EACH: dict[str, Any] = {
    "sign": elementwise.sign, "where": elementwise.where, "min": elementwise.minimum, "max": elementwise.maximum,
    "axpy": elementwise.axpy, "add": lambda a, b: a + b, "sub": lambda a, b: a - b, "mul": lambda a, b: a * b,
    "div": lambda a, b: a / b, "gt": lambda a, b: a > b, "ge": lambda a, b: a >= b, "lt": lambda a, b: a < b,
    "le": lambda a, b: a <= b, "pow": lambda a, b: a**b, "neg": lambda a: -a, "sqrt": elementwise.sqrt,
    "abs": elementwise.absolute, "exp": elementwise.exp, "tanh": elementwise.tanh,
}  # fmt: skip


def run(
    program: Program,
    tensors: Sequence[Sequence[torch.Tensor]],
    uniforms: Mapping[str, Any],
    compute: torch.dtype,
    rounding: Rounding,
    generator: torch.Generator | None = None,
) -> list[torch.Tensor]:
    """Apply the rule; returns how many elements it counted in each tensor, where it counts.

    Args:
        tensors: for each of the program's inputs (and, last, the compensation where rounding is "kahan") a list of tensors,
            one per parameter, all on one device.
        uniforms: the program's uniform inputs: numbers, or tensors of one element.
    """
    if not tensors[0]:
        return []
    count = len(tensors[0])
    models = [t.to(compute) for t in tensors[0]]
    kahan = rounding.mode == "kahan"
    values: dict[int, Any] = {}
    arrays = {node.name: node for node in program.nodes if node.op == "input" and not node.uniform}
    for node in program.nodes:
        if node.op != "input":
            args = [values[a.index] if isinstance(a, Expr) else a for a in node.args]
            values[node.index] = _EACH[node.op](*args) if node.uniform else _array(node, args, models)
        elif node.uniform:
            values[node.index] = uniforms[node.name]
        else:
            column = tensors[program.inputs.index(node.name)]
            loaded = [t.to(compute) for t in column]
            if node.name == "p" and kahan:
                loaded = torch._foreach_add(loaded, [c.to(compute) for c in tensors[-1]])
            values[node.index] = loaded
    counted = [] if program.count is None else [c.sum() for c in values[program.count.index]]
    # Outputs that are an input of another name: what that was before any of them is written.
    moved = {o.name for n, o in program.outputs.items() if isinstance(o, Expr) and o.op == "input" and o.name != n}
    before = {n: [t.clone() for t in values[o.index]] for n, o in arrays.items() if n in moved}
    for name, out in program.outputs.items():
        targets = list(tensors[program.inputs.index(name)])
        new = values[out.index] if isinstance(out, Expr) else out
        if isinstance(out, Expr) and out.op == "input" and not out.uniform and out.name != name:
            new = before[out.name]
        if not isinstance(new, (list, tuple)):
            new = [torch.as_tensor(new, dtype=compute, device=t.device).expand_as(t) for t in targets]
        if name == "p" and rounding.mode != "nearest":
            remainders = tensors[-1] if kahan else [None] * count
            for p, value, remainder in zip(targets, new, remainders, strict=True):
                store(p, value, rounding, remainder, generator)
        else:
            torch._foreach_copy_(targets, list(new))
    return counted


def _array(node: Expr, args: list[Any], models: list[torch.Tensor]) -> Any:
    lists = [isinstance(a, (list, tuple)) for a in args]
    op = node.op
    if op == "axpy" and all(lists[1:]) and not isinstance(args[0], torch.Tensor):
        return torch._foreach_add(args[2], args[1], alpha=args[0])
    if op in _FOREACH and (all(lists) or (op in ("add", "sub", "mul", "div") and lists[0])):
        return _FOREACH[op](*args)
    if op in ("add", "mul") and lists[1] and not lists[0]:
        return _FOREACH[op](args[1], args[0])
    columns = [a if many else [a] * len(models) for a, many in zip(args, lists, strict=True)]
    results = [_EACH[op](*row) for row in zip(*columns, strict=True)]
    # where() on a uniform condition may have chosen a number.
    return [r if isinstance(r, torch.Tensor) else torch.full_like(m, r) for r, m in zip(results, models, strict=True)]
