"""Recording an update rule: what it computes, as a short program that any backend can run.

A rule is called once with traced values instead of tensors. Arithmetic on them is recorded (equal expressions once). Values
that hold one number for the whole tensor (hyperparameters, the step, and whatever is made of them alone) are *uniform*: they
are computed once a step on the host in float64, or inside the kernel where they live on the device. All else is *array*.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from types import SimpleNamespace
from typing import Any

from polyak.core import elementwise

ARITY = {
    "add": 2, "sub": 2, "mul": 2, "div": 2, "pow": 2, "min": 2, "max": 2, "gt": 2, "ge": 2, "lt": 2, "le": 2,
    "neg": 1, "sqrt": 1, "abs": 1, "sign": 1, "exp": 1, "tanh": 1,
    "axpy": 3, "where": 3,
}  # fmt: skip


class Expr:
    """A traced value: a node of the expression graph, with Python's operators on it."""

    __slots__ = ("args", "index", "name", "op", "tracer", "uniform")

    def __init__(self, tracer: Tracer, op: str, args: tuple[Any, ...], name: str, uniform: bool) -> None:
        self.tracer = tracer
        self.op = op  # "input", or a key of ARITY
        self.args = args  # Exprs and numbers
        self.name = name  # of an input
        self.uniform = uniform
        self.index = len(tracer.nodes)

    def elementwise(self, op: str, *args: Any) -> Expr:
        """What ``polyak.core.elementwise`` calls; also the way of all operators below."""
        return self.tracer.record(op, args)

    def __add__(self, other: Any) -> Expr:
        return self.elementwise("add", self, other)

    def __radd__(self, other: Any) -> Expr:
        return self.elementwise("add", other, self)

    def __sub__(self, other: Any) -> Expr:
        return self.elementwise("sub", self, other)

    def __rsub__(self, other: Any) -> Expr:
        return self.elementwise("sub", other, self)

    def __mul__(self, other: Any) -> Expr:
        return self.elementwise("mul", self, other)

    def __rmul__(self, other: Any) -> Expr:
        return self.elementwise("mul", self, other)

    def __truediv__(self, other: Any) -> Expr:
        return self.elementwise("div", self, other)

    def __rtruediv__(self, other: Any) -> Expr:
        return self.elementwise("div", other, self)

    def __pow__(self, other: Any) -> Expr:
        return self.elementwise("pow", self, other)

    def __rpow__(self, other: Any) -> Expr:
        return self.elementwise("pow", other, self)

    def __neg__(self) -> Expr:
        return self.elementwise("neg", self)

    def __gt__(self, other: Any) -> Expr:
        return self.elementwise("gt", self, other)

    def __ge__(self, other: Any) -> Expr:
        return self.elementwise("ge", self, other)

    def __lt__(self, other: Any) -> Expr:
        return self.elementwise("lt", self, other)

    def __le__(self, other: Any) -> Expr:
        return self.elementwise("le", self, other)

    def __bool__(self) -> bool:
        raise TypeError("a rule may not branch on a traced value: use where(), or a static option")


class Tracer:
    """Records the nodes of one rule in the order they are made, each expression once."""

    def __init__(self) -> None:
        self.nodes: list[Expr] = []
        self.marks: dict[str, Expr] = {}  # values that a backend needs by name before the outputs
        self._seen: dict[tuple[Any, ...], Expr] = {}

    def input(self, name: str, *, uniform: bool) -> Expr:
        """An input. One that is made while a rule runs is an array which the backend itself computes from the marks."""
        node = Expr(self, "input", (), name, uniform)
        self.nodes.append(node)
        return node

    def record(self, op: str, args: tuple[Any, ...]) -> Expr:
        if op not in ARITY or len(args) != ARITY[op]:
            raise TypeError(f"a rule used {op!r} with {len(args)} operands; known are {', '.join(ARITY)}")
        for a in args:
            if not isinstance(a, (Expr, int, float)):
                raise TypeError(f"a rule's operands must be its inputs and numbers, got {type(a).__name__} in {op}")
        key = (op, *(("node", a.index) if isinstance(a, Expr) else ("number", float(a)) for a in args))
        if key not in self._seen:
            uniform = all(a.uniform for a in args if isinstance(a, Expr))
            if op == "pow" and not uniform:
                raise TypeError("a rule may raise only uniform values to a power; multiply, or use sqrt()")
            if op == "axpy" and not (isinstance(args[0], (int, float)) or args[0].uniform):
                raise TypeError("axpy(a, x, y) needs a uniform a")
            node = Expr(self, op, args, "", uniform)
            self.nodes.append(node)
            self._seen[key] = node
        return self._seen[key]


@dataclass(frozen=True, eq=False)
class Program:
    """A traced rule.

    inputs: names of its array inputs in order: "p", "g", then state names.
    uniforms: names of its uniform inputs.
    outputs: name of what is written ("p" or a state) -> the value.
    count: a condition whose true elements are counted, or None.
    marks: values that a backend needs before the outputs.
    """

    nodes: tuple[Expr, ...]
    inputs: tuple[str, ...]
    uniforms: tuple[str, ...]
    outputs: Mapping[str, Expr]
    count: Expr | None = None
    marks: Mapping[str, Expr] = field(default_factory=dict)
    _splits: dict[frozenset[str], Split] = field(default_factory=dict)

    @cached_property
    def body(self) -> tuple[Expr, ...]:
        """The array operations that the outputs need, in order."""
        return self.operations(self.results)

    @property
    def results(self) -> tuple[Any, ...]:
        """All that is computed: the outputs, and the condition that is counted."""
        return (*self.outputs.values(), *(() if self.count is None else (self.count,)))

    def operations(self, results: Iterable[Any]) -> tuple[Expr, ...]:
        """The array operations that some of the program's values need, in order."""
        needed = self.needed(results)
        return tuple(n for n in self.nodes if n.index in needed and n.op != "input" and not n.uniform)

    def needed(self, results: Iterable[Any]) -> set[int]:
        """The indices of all nodes that some of the program's values are made of, themselves included."""
        needed = {r.index for r in results if isinstance(r, Expr)}
        for node in reversed(self.nodes):
            if node.index in needed:
                needed.update(a.index for a in node.args if isinstance(a, Expr))
        return needed

    def split(self, on_device: Iterable[str] = ()) -> Split:
        """Which uniform values the host computes, given those of the uniform inputs that are only known on the device."""
        names = frozenset(on_device)
        if names not in self._splits:
            self._splits[names] = _split(self, names)
        return self._splits[names]


@dataclass(frozen=True, eq=False)
class Split:
    """The division of a program's uniform values between host and device."""

    host: tuple[Expr, ...]  # computed on the host, handed over as numbers
    device: tuple[Expr, ...]  # uniform operations left to the kernel, in order
    evaluate: Callable[[Mapping[str, float]], tuple[float, ...]]  # uniform inputs -> values of `host`


def _split(program: Program, on_device: frozenset[str]) -> Split:
    tainted: set[int] = set()
    for node in program.nodes:
        if node.uniform and (
            (node.op == "input" and node.name in on_device)
            or any(isinstance(a, Expr) and a.index in tainted for a in node.args)
        ):
            tainted.add(node.index)
    host: dict[int, Expr] = {}
    device: dict[int, Expr] = {}

    def need(node: Expr) -> None:
        if not node.uniform:
            return
        if node.index not in tainted:
            host[node.index] = node
        elif node.index not in device:
            for a in node.args:
                if isinstance(a, Expr):
                    need(a)
            device[node.index] = node

    for node in program.body:
        for a in node.args:
            if isinstance(a, Expr):
                need(a)
    for out in program.results:
        if isinstance(out, Expr):
            need(out)
    roots = tuple(host[i] for i in sorted(host))
    return Split(roots, tuple(device[i] for i in sorted(device)), _compile(roots))


_PYTHON = {
    "add": "({} + {})", "sub": "({} - {})", "mul": "({} * {})", "div": "divide({}, {})", "pow": "({} ** {})",
    "min": "min({}, {})", "max": "max({}, {})", "neg": "(-{})", "sqrt": "sqrt({})", "abs": "abs({})", "exp": "exp({})",
    "tanh": "tanh({})", "sign": "sign({})", "gt": "float({} > {})", "ge": "float({} >= {})", "lt": "float({} < {})",
    "le": "float({} <= {})", "axpy": "({2} + {0} * {1})", "where": "({1} if {0} else {2})",
}  # fmt: skip


def _divide(a: float, b: float) -> float:
    # As in IEEE arithmetic on the device, not as in Python.
    if b == 0:
        return math.nan if a == 0 or math.isnan(a) else math.copysign(math.inf, a)
    return a / b


def _compile(roots: tuple[Expr, ...]) -> Callable[[Mapping[str, float]], tuple[float, ...]]:
    """One Python function for all host values: a step should not walk a graph."""
    lines: list[str] = []
    names: dict[int, str] = {}

    def emit(node: Any) -> str:
        if not isinstance(node, Expr):
            return repr(float(node))
        if node.index not in names:
            if node.op == "input":
                text = f"u[{node.name!r}]"
            else:
                text = _PYTHON[node.op].format(*(emit(a) for a in node.args))
            names[node.index] = f"v{node.index}"
            lines.append(f"    v{node.index} = {text}")
        return names[node.index]

    results = [emit(r) for r in roots]
    source = "def evaluate(u):\n" + "\n".join(lines) + f"\n    return ({', '.join(results)}{',' if results else ''})\n"
    scope = {
        "sqrt": math.sqrt, "exp": math.exp, "tanh": math.tanh, "divide": _divide, "min": elementwise.minimum,
        "max": elementwise.maximum, "abs": abs, "float": float, "sign": elementwise.sign, "__builtins__": {},
    }  # fmt: skip
    exec(compile(source, "<polyak rule: uniform values>", "exec"), scope)
    return scope["evaluate"]  # type: ignore[return-value]


class Hyper(SimpleNamespace):
    """A param group's hyperparameters as a rule sees them: ``h.lr``, ``h.betas[0]``, ``h.step``, and static options."""


def trace(
    rule: Callable[..., tuple[Any, dict[str, Any]]],
    state: Iterable[str],
    numbers: Mapping[str, int],
    static: Mapping[str, Any],
    *,
    maximize: bool = False,
) -> Program:
    """Record ``rule(p, g, state, h) -> (p, {state: value})``; an entry "count" there is the condition to be counted.

    Args:
        state: names of the state tensors.
        numbers: names of numeric hyperparameters, each with its length (0: a number, n: a tuple of n numbers); "step" among
            them.
        static: options that are part of the program itself.
        maximize: negate the gradient first.
    """
    tracer = Tracer()
    p = tracer.input("p", uniform=False)
    g = tracer.input("g", uniform=False)
    states = {name: tracer.input(name, uniform=False) for name in state}
    values: dict[str, Any] = {}
    for name, length in numbers.items():
        if length:
            values[name] = tuple(tracer.input(f"{name}.{i}", uniform=True) for i in range(length))
        else:
            values[name] = tracer.input(name, uniform=True)
    new_p, new_state = rule(p, -g if maximize else g, SimpleNamespace(**states), Hyper(**values, **static))
    count = new_state.pop("count", None)
    if unknown := set(new_state) - set(states):
        raise ValueError(f"rule writes unknown state {sorted(unknown)}; it has {sorted(states)}")
    outputs = {"p": new_p, **new_state}
    uniforms = tuple(n.name for n in tracer.nodes if n.op == "input" and n.uniform)
    return Program(tuple(tracer.nodes), ("p", "g", *states), uniforms, outputs, count, dict(tracer.marks))
