"""The CPU backend: a traced rule over blocks that stay in the cache, without temporaries.

A block's intermediate values live in a few scratch rows that are used again and again, so that main memory sees each
parameter, gradient and state once. Small tensors are packed side by side into one block. The operations are ATen's own, the
same ones in the same order as the eager reference, so that both agree bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from polyak.optim._engine.rounding import Rounding, store
from polyak.optim._engine.trace import Expr, Program

BLOCK = 65536  # elements: two threads' worth of ATen's grain, and about ten rows of it fit in a mid-size cache
SMALL = BLOCK // 4  # tensors up to this size are packed

_BOOLEAN = {"gt", "ge", "lt", "le"}
# op -> template of statements on arrays a, b (x, y, or numbers), into d; chosen by which operands are numbers
_BINARY = {
    "add": ("add(a, b, out=d)", "add(a, B, out=d)", "add(b, A, out=d)"),
    "sub": ("sub(a, b, out=d)", "sub(a, B, out=d)", "neg(b, out=d); d.add_(A)"),
    "mul": ("mul(a, b, out=d)", "mul(a, B, out=d)", "mul(b, A, out=d)"),
    "div": ("div(a, b, out=d)", "div(a, B, out=d)", "reciprocal(b, out=d); d.mul_(A)"),
    "min": ("minimum(a, b, out=d)", "clamp_max(a, B, out=d)", "clamp_max(b, A, out=d)"),
    "max": ("maximum(a, b, out=d)", "clamp_min(a, B, out=d)", "clamp_min(b, A, out=d)"),
    "gt": ("gt(a, b, out=d)", "gt(a, B, out=d)", "lt(b, A, out=d)"),
    "ge": ("ge(a, b, out=d)", "ge(a, B, out=d)", "le(b, A, out=d)"),
    "lt": ("lt(a, b, out=d)", "lt(a, B, out=d)", "gt(b, A, out=d)"),
    "le": ("le(a, b, out=d)", "le(a, B, out=d)", "ge(b, A, out=d)"),
}
_UNARY = {op: f"{op}(a, out=d)" for op in ("neg", "sqrt", "abs", "exp", "tanh")}
_FUNCTIONS = (
    "add", "sub", "mul", "div", "neg", "reciprocal", "minimum", "maximum", "clamp_max", "clamp_min", "gt", "ge", "lt", "le",
    "sqrt", "abs", "exp", "tanh", "where", "tensor",
)  # fmt: skip


@dataclass(frozen=True)
class Layout:
    """What a compiled body depends on besides the program."""

    compute: torch.dtype
    storage: tuple[torch.dtype, ...]  # of each of the program's inputs
    rounding: Rounding
    gaps: torch.dtype | None = None  # type of the gaps between the elements that have a state, where not all have


@dataclass(frozen=True)
class Body:
    """A block's work as one Python function ``run(arrays, rows, flags, values, generator, counts)``."""

    run: Callable[..., None]
    rows: int  # scratch rows of the compute type
    flags: int  # scratch rows of bools


def compile_body(program: Program, layout: Layout) -> Body:
    """Assign every intermediate value a place (a scratch row, or its output's own memory) and write the function."""
    place: dict[int, str] = {}
    lines: list[str] = []
    values = {node.index: f"values[{i}]" for i, node in enumerate(program.split().host)}
    inputs = {n.name: n for n in program.nodes if n.op == "input" and not n.uniform}
    storage = dict(zip(program.inputs, layout.storage, strict=True))
    last: dict[int, int] = {}
    for at, node in enumerate(program.body):
        for a in node.args:
            if isinstance(a, Expr):
                last[a.index] = at
    end = len(program.body)
    in_place = {}
    for name, out in program.outputs.items():
        plain = storage[name] == layout.compute and not (name == "p" and layout.rounding.mode != "nearest")
        if plain and isinstance(out, Expr) and not out.uniform and out.op != "input" and out.index not in in_place:
            in_place[out.index] = name
        elif isinstance(out, Expr):
            last[out.index] = end
    if program.count is not None:
        last[program.count.index] = end
    for out in program.results:
        if isinstance(out, Expr):
            last.setdefault(out.index, end)

    free: dict[str, list[str]] = {"row": [], "flag": []}
    count = {"row": 0, "flag": 0}

    def take(kind: str) -> str:
        if free[kind]:
            return free[kind].pop()
        count[kind] += 1
        return f"{kind}s[{count[kind] - 1}]"

    def release(at: int, node: Expr) -> None:
        for index in {a.index for a in node.args if isinstance(a, Expr) and not a.uniform}:
            spot = place[index]
            if last[index] == at and spot.startswith(("row", "flag")):
                free["row" if spot.startswith("row") else "flag"].append(spot)

    for name, node in inputs.items():
        position = program.inputs.index(name)
        if storage[name] == layout.compute:
            place[node.index] = f"arrays[{position}]"
        elif node.index in last:
            place[node.index] = take("row")
            lines.append(f"{place[node.index]}.copy_(arrays[{position}])")
    # Outputs that are an input of another name: what that was before any of them is written.
    moved: dict[int, str] = {}
    for name, out in program.outputs.items():
        other = isinstance(out, Expr) and out.op == "input" and not out.uniform and out.name != name
        if other and place[out.index].startswith("arrays") and out.index not in moved:
            moved[out.index] = take("row")
            lines.append(f"{moved[out.index]}.copy_({place[out.index]})")

    if layout.rounding.mode == "kahan":
        # The parameter is the sum of its stored value and of what rounding has left behind.
        row = place[inputs["p"].index]
        lines.append(f"{row}.add_(arrays[{len(program.inputs)}])")

    def text(a: Any) -> str:
        if not isinstance(a, Expr):
            return repr(float(a))
        return values[a.index] if a.uniform else place[a.index]

    for at, node in enumerate(program.body):
        target = in_place.get(node.index)
        old = inputs[target] if target else None
        if old is not None and target is not None and last.get(old.index, -1) <= at and _may_alias(node, old):
            place[node.index] = f"arrays[{program.inputs.index(target)}]"
        else:
            # A scratch row that held an operand may hold the result, where the operation allows it.
            if target:
                last[node.index] = end  # it is copied out last
            early = node.op not in ("where", *_BOOLEAN)
            if early:
                release(at, node)
            place[node.index] = take("flag" if node.op in _BOOLEAN else "row")
            if not early:
                release(at, node)
            lines.append(_statement(node, text, place[node.index]))
            continue
        lines.append(_statement(node, text, place[node.index]))
        release(at, node)

    for name, out in program.outputs.items():
        target = f"arrays[{program.inputs.index(name)}]"
        if name == "p" and layout.rounding.mode != "nearest":
            extra = f"arrays[{len(program.inputs)}]" if layout.rounding.mode == "kahan" else "None"
            value = moved.get(out.index, text(out)) if isinstance(out, Expr) else text(out)
            lines.append(f"store({target}, {value}, {extra}, generator)")
        elif not isinstance(out, Expr) or out.uniform:
            lines.append(f"{target}.fill_({text(out)})")
        elif place[out.index] != target:
            lines.append(f"{target}.copy_({moved.get(out.index, place[out.index])})")
    if program.count is not None:
        lines.append(f"counts.append(({text(program.count)} != 0).sum())")
    source = "def run(arrays, rows, flags, values, generator, counts):\n" + "".join(f"    {line}\n" for line in lines)
    scope: dict[str, Any] = {name: getattr(torch, name) for name in _FUNCTIONS}
    scope["nan"], scope["inf"], scope["BIG"] = float("nan"), float("inf"), torch.finfo(layout.compute).max
    scope["store"] = lambda p, value, extra, generator: store(p, value, layout.rounding, extra, generator)
    exec(compile(source, "<polyak rule: block>", "exec"), scope)
    return Body(scope["run"], count["row"], count["flag"])


def _may_alias(node: Expr, old: Expr) -> bool:
    # where() may not write over what it selects from.
    return node.op != "where" or all(a is not old for a in node.args)


def _statement(node: Expr, text: Callable[[Any], str], d: str) -> str:
    def number(a: Any) -> bool:
        return not isinstance(a, Expr) or a.uniform

    args = [text(a) for a in node.args]
    if node.op in _UNARY:
        return _UNARY[node.op].replace("(a", f"({args[0]}").replace("=d", f"={d}")
    if node.op == "sign":
        # Twice, so that the smallest subnormal number also ends at 1; a NaN stays one, which torch.sign would hide.
        return f"mul({args[0]}, BIG, out={d}); {d}.clamp_(-1, 1).mul_(BIG).clamp_(-1, 1)"
    if node.op == "axpy":
        a, x, y = args
        if number(node.args[1]) or number(node.args[2]):
            raise TypeError("axpy(a, x, y) needs array x and y; write y + a * x")
        return f"add({y}, {x}, alpha={a}, out={d})"
    if node.op == "where":
        condition, a, b = args
        branches = [
            f"tensor({t}, dtype={d}.dtype)" if number(n) else t for n, t in zip(node.args[1:], (a, b), strict=True)
        ]
        if number(node.args[0]):
            fill = [
                f"{d}.fill_({t})" if number(n) else f"{d}.copy_({t})"
                for n, t in zip(node.args[1:], (a, b), strict=True)
            ]
            return f"{fill[0]} if {condition} else {fill[1]}"
        return f"where({condition}, {branches[0]}, {branches[1]}, out={d})"
    both, right, left = _BINARY[node.op]
    template = left if number(node.args[0]) else right if number(node.args[1]) else both
    import re

    names = {"a": args[0], "A": args[0], "b": args[1], "B": args[1], "d": d}
    return re.sub(r"\b([aAbBd])\b", lambda m: names[m.group(1)], template)


class Blocked:
    """A compiled rule with its scratch memory. One per group of parameters with equal types; not for use by two threads."""

    def __init__(self, program: Program, layout: Layout) -> None:
        self.program = program
        self.layout = layout
        self.body = compile_body(program, layout)
        self.evaluate = program.split().evaluate
        self._rows = list(torch.empty(self.body.rows, BLOCK, dtype=layout.compute).unbind())
        self._flags = list(torch.empty(self.body.flags, BLOCK, dtype=torch.bool).unbind())
        self._packs: list[torch.Tensor] = []
        self._written = [self.program.inputs.index(name) for name in program.outputs]

    def run(
        self,
        tensors: Sequence[Sequence[torch.Tensor]],
        uniforms: Mapping[str, float],
        generator: torch.Generator | None = None,
    ) -> list[torch.Tensor]:
        """Apply the rule; returns how many elements it counted in each block, where it counts.

        Args:
            tensors: for each of the program's inputs (and, last, the compensation where rounding is "kahan") the flat
                (one-dimensional, contiguous) tensors, one per parameter.
            uniforms: the program's uniform inputs.
        """
        values = self.evaluate(uniforms)
        counts: list[torch.Tensor] = []
        small: list[int] = []
        for i, p in enumerate(tensors[0]):
            if p.numel() > SMALL:
                self._large([column[i] for column in tensors], values, generator, counts)
            elif p.numel():
                small.append(i)
        start = 0
        while start < len(small):
            stop, total = start, 0
            while stop < len(small) and total + tensors[0][small[stop]].numel() <= BLOCK:
                total += tensors[0][small[stop]].numel()
                stop += 1
            picked = small[start:stop]
            self._packed([[column[i] for i in picked] for column in tensors], total, values, generator, counts)
            start = stop
        return counts

    def _large(
        self,
        arrays: list[torch.Tensor],
        values: tuple[float, ...],
        generator: torch.Generator | None,
        counts: list[torch.Tensor],
    ) -> None:
        n = arrays[0].numel()
        run, rows, flags = self.body.run, self._rows, self._flags
        full = n - n % BLOCK
        # split() makes all views of a tensor in one call.
        for views in zip(*(a[:full].split(BLOCK) for a in arrays), strict=True) if full else ():
            run(views, rows, flags, values, generator, counts)
        if full < n:
            rest = n - full
            scratch = [r[:rest] for r in rows], [f[:rest] for f in flags]
            run([a[full:] for a in arrays], *scratch, values, generator, counts)

    def _packed(
        self,
        columns: list[list[torch.Tensor]],
        total: int,
        values: tuple[float, ...],
        generator: torch.Generator | None,
        counts: list[torch.Tensor],
    ) -> None:
        if not self._packs:
            extra = [columns[0][0].dtype] if len(columns) > len(self.layout.storage) else []
            self._packs = [torch.empty(BLOCK, dtype=t) for t in (*self.layout.storage, *extra)]
        packs = [pack[:total] for pack in self._packs[: len(columns)]]
        for pack, column in zip(packs, columns, strict=True):
            torch.cat(column, out=pack)
        scratch = [r[:total] for r in self._rows], [f[:total] for f in self._flags]
        self.body.run(packs, *scratch, values, generator, counts)
        sizes = [t.numel() for t in columns[0]]
        written = self._written + ([len(columns) - 1] if len(columns) > len(self.layout.storage) else [])
        for i in written:
            torch._foreach_copy_(columns[i], list(packs[i].split(sizes)))
