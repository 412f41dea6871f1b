"""The GPU backend: the text of a traced rule as one Triton launch over all tensors of a kind.

A table in device memory holds, for every tensor, its first tile, its size and the addresses of the parameter, the gradient
(0 where there is none at this step), the states and the counter of steps; a second one says which tensor each tile belongs to.

Uniform values are computed on the host in float64 and handed over as arguments; as a table where tensors differ in them, for
they are of several groups or have made different numbers of steps. What lives on the device (``capturable``'s steps and
learning rate, the norm of all gradients) is computed with in float64 by every program.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from polyak.core.launch import build, function
from polyak.optim._engine.places import EVERY
from polyak.optim._engine.rounding import Rounding
from polyak.optim._engine.trace import Expr, Program

BLOCK = EVERY  # elements a program: two 16-byte accesses a thread and tensor
WARPS = 4
# Words of a table's row before the addresses: first tile, elements, block, address of the counter (0: it is on the host).
HEADER = 4
_TRITON_TYPES = {
    torch.float32: "tl.float32",
    torch.float64: "tl.float64",
    torch.bfloat16: "tl.bfloat16",
    torch.float16: "tl.float16",
}
_GAPS = {torch.uint8: "tl.uint8", torch.int16: "tl.int16", torch.int32: "tl.int32"}


def known(*types: torch.dtype) -> bool:
    """Whether kernels can load and store numbers of these types, complex ones as two."""
    return all((t.to_real() if t.is_complex else t) in _TRITON_TYPES for t in types)


@dataclass(frozen=True)
class Signature:
    """What a kernel depends on besides the program."""

    compute: torch.dtype
    storage: tuple[torch.dtype, ...]  # of each of the program's inputs
    rounding: Rounding
    on_device: tuple[str, ...]  # uniform inputs that are loaded from device memory
    scaled: bool  # gradients carry a GradScaler's scale; found_inf skips the step
    gaps: torch.dtype | None = None  # type of the gaps between the elements that have a state, where not all have
    many: bool = False  # uniform values of the host are a table: tensors differ in them

    @property
    def arguments(self) -> tuple[str, ...]:
        """The uniform inputs on the device that all tensors share. Steps are each tensor's own, by address."""
        return tuple(name for name in self.on_device if name != "step")


_EMIT = {
    "add": "({} + {})", "sub": "({} - {})", "mul": "({} * {})", "div": "({} / {})", "neg": "(-{})", "sqrt": "tl.sqrt({})",
    "abs": "tl.abs({})", "exp": "tl.exp({})", "axpy": "({2} + {0} * {1})", "gt": "({} > {})", "ge": "({} >= {})",
    "lt": "({} < {})", "le": "({} <= {})", "where": "tl.where({}, {}, {})", "pow": "tl.exp({1} * tl.log({0}))",
    "min": "tl.minimum({}, {}, propagate_nan=tl.PropagateNan.ALL)",
    "max": "tl.maximum({}, {}, propagate_nan=tl.PropagateNan.ALL)",
    "sign": "tl.where({0} > 0, 1.0, tl.where({0} < 0, -1.0, {0}))",
    # exp(-2|x|) never overflows, and expm1's cancellation is harmless where tanh is near 0 only through the second branch.
    "tanh": "_tanh({})",
}  # fmt: skip
_BOOLEAN = {"gt", "ge", "lt", "le"}


def is_wide(program: Program, signature: Signature) -> bool:
    """Whether host values need more than float32, which is what Triton makes of a Python float."""
    return signature.compute == torch.float64 or bool(program.split(signature.on_device).device)


class Writer:
    """The parts of a kernel's text: arguments, addresses, uniform values, and the elementwise work on one block.

    The text uses ``row`` (this tensor's row of the table, whose addresses start ``header`` words in), ``offsets`` (of the
    block's elements in the tensor), ``size`` (its number of elements) and ``drawn`` (a number for each of the block's
    elements that no other of the launch has).

    Args:
        block: the word of a row that is its block; the next one is the address of its counter.
        extra: names of uniform inputs that the text needs beside what the rule does.
    """

    def __init__(
        self, program: Program, signature: Signature, block: int = HEADER - 2, extra: Sequence[str] = ()
    ) -> None:
        self.program = program
        self.signature = signature
        self.split = program.split(signature.on_device)
        self._host = (*self.split.host, *extra)
        self._block = block
        self.wide = is_wide(program, signature)
        self.compute = _TRITON_TYPES[signature.compute]
        self._loaded = [n for n in program.nodes if n.op == "input" and n.uniform and n.name in signature.on_device]
        self._kahan = signature.rounding.mode == "kahan"
        self._stochastic = signature.rounding.mode == "stochastic"
        self.columns = [*program.inputs, *(["compensation"] if self._kahan else [])]
        self._types = [*signature.storage, *([signature.storage[0]] if self._kahan else [])]
        self.names: dict[int, str] = {}
        self.mask = "offsets < size"  # of a masked block
        self.masks: dict[str, str] = {}  # of inputs that have one of their own
        # Comparisons made in the kernel are Triton's booleans; those of the host come as 0.0 or 1.0.
        self._booleans = {n.index for n in (*program.body, *self.split.device) if n.op in _BOOLEAN}

    def arguments(self) -> list[str]:
        """The arguments after the tables, in the order of :meth:`Uniforms.arguments`."""
        return [
            *(f"uniform{i}" for i in range(len(self.signature.arguments))),
            *(["grad_scale", "found_inf"] if self.signature.scaled else []),
            *(["blocks"] if self.signature.many else [
                *(f"v{i}" for i in range(len(self._host))), *(f"w{i}" for i in range(len(self._host) if self.wide else 0)),
                *(["seed"] if self._stochastic else []),
            ]),
        ]  # fmt: skip

    def addresses(self, header: int, aligned: bool) -> list[str]:
        lines = []
        for i, t in enumerate(self._types):
            lines.append(f"at{i} = tl.load(row + {header + i}).to(tl.pointer_type({_TRITON_TYPES[t]}))")
            if aligned:
                lines.append(f"at{i} = tl.multiple_of(at{i}, 16)")
        if self.signature.gaps is not None:
            kinds = (_GAPS[self.signature.gaps], "tl.int64")
            for k, (name, kind) in enumerate(zip(("gaps", "bases"), kinds, strict=True)):
                lines.append(f"{name} = tl.load(row + {header + len(self._types) + k}).to(tl.pointer_type({kind}))")
        return [*lines, f"size = tl.where(tl.load(row + {header + 1}) != 0, size, 0)"]

    def uniforms(self) -> list[str]:
        """Uniform values: float64 throughout, rounded once to the compute type."""
        lines, names = [], self.names
        rank = {name: i for i, name in enumerate(self.signature.arguments)}
        if self.signature.many:
            words = len(self._host) + self._stochastic
            lines.append(f"block = blocks + tl.load(row + {self._block}) * {words}")
        if self._stochastic:
            # By another name than the argument's: in a branch a name keeps its type.
            given = (
                f"tl.load(block + {words - 1}).to(tl.int64)" if self.signature.many else "tl.full((), seed, tl.int64)"
            )
            lines.append(f"stream = {given}")
        for i, node in enumerate(self._host):
            name = f"h{i}" if isinstance(node, Expr) else node
            rest = f" + tl.full((), w{i}, tl.float64)" if self.wide else ""
            lines.append(
                f"{name} = "
                + (f"tl.load(block + {i})" if self.signature.many else f"tl.full((), v{i}, tl.float64){rest}")
            )
            if isinstance(node, Expr):
                names[node.index] = name
        for node in self._loaded:
            own = f"tl.load(row + {self._block + 1}).to(tl.pointer_type(tl.float32))"
            at = own if node.name == "step" else f"uniform{rank[node.name]}"
            lines.append(f"d{node.index} = tl.load({at}).to(tl.float64)")
            names[node.index] = f"d{node.index}"
        for node in self.split.device:
            if node.op != "input":
                lines.append(f"d{node.index} = {self._emit(node, 'tl.float64')}")
                names[node.index] = f"d{node.index}"
        for index in sorted({a.index for n in self.program.body for a in n.args if isinstance(a, Expr) and a.uniform}):
            if index not in self._booleans:
                lines.append(f"c{index} = {names[index]}.to({self.compute})")
                names[index] = f"c{index}"
        if self.signature.scaled:
            lines.append(f"unscale = (1.0 / tl.load(grad_scale).to(tl.float64)).to({self.compute})")
            lines.append("size = tl.where(tl.load(found_inf) == 0, size, 0)")
        if self._stochastic:
            # A new draw every step: the host mixes the step into the seed, or the kernel does where only it knows the step.
            lines += [f"stream = stream + d{n.index}.to(tl.int64) * 7919" for n in self._loaded if n.name == "step"]
        return lines

    def load(self, name: str, masked: bool) -> str:
        """The block of one of the program's inputs, in the compute type."""
        i = self.program.inputs.index(name)
        through = "spots" if self.signature.gaps is not None and name in ("p", "g") else "offsets"
        mask = f", mask={self.masks.get(name, self.mask)}" if masked else ""
        value = f"tl.load(at{i} + {through}{mask}).to({self.compute})"
        if name == "g" and self.signature.scaled:
            value = f"({value} * unscale)"
        if name == "p" and self._kahan:
            value = f"({value} + tl.load(at{len(self._types) - 1} + offsets{mask}).to({self.compute}))"
        return value

    def values(self, results: Any, masked: bool, known: Iterable[int] = ()) -> list[str]:
        """Compute some of the program's values on the block; ``known`` have been computed before."""
        lines, needed = [], self.program.needed(results).difference(known)
        for node in self.program.nodes:
            if node.op == "input" and not node.uniform and node.index in needed and node.name in self.program.inputs:
                lines.append(f"x{node.index} = {self.load(node.name, masked)}")
                self.names[node.index] = f"x{node.index}"
        for node in self.program.operations(results):
            if node.index in needed:
                lines.append(f"x{node.index} = {self._emit(node, self.compute)}")
                self.names[node.index] = f"x{node.index}"
        return lines

    def block(self, masked: bool, known: Iterable[int] = ()) -> list[str]:
        """All of the rule on the block: load, compute, store; ``known`` values have been computed before."""
        program, mask = self.program, f", mask={self.mask}" if masked else ""
        lines = []
        if self.signature.gaps is not None:
            lines.append(f"gap = tl.load(gaps + offsets{mask + (', other=0' if masked else '')}).to(tl.int64)")
            lines.append(f"spots = tl.load(bases + start // {EVERY}) + tl.cumsum(gap, axis=0)")
        lines += self.values(program.results, masked, known)
        for name, out in program.outputs.items():
            i = program.inputs.index(name)
            value = self.text(out, self.compute)
            kind = _TRITON_TYPES[self._types[i]]
            through = "spots" if self.signature.gaps is not None and name == "p" else "offsets"
            if name == "p" and self._stochastic:
                noise = _noise_mask(self._types[0])
                lines.append(f"r = tl.randint(stream, drawn).to(tl.int32, bitcast=True) & {noise}")
                lines.append(f"bits = ({value}.to(tl.int32, bitcast=True) + r) & {~noise}")
                lines.append(
                    f"kept = tl.where(tl.abs({value}) < float('inf'), bits.to(tl.float32, bitcast=True), {value})"
                )
                lines.append(f"tl.store(at{i} + {through}, kept.to({kind}){mask})")
            elif name == "p" and self._kahan:
                lines.append(f"kept = {value}.to({kind})")
                lines.append(f"left = {value} - kept.to({self.compute})")
                lines.append(f"left = tl.where(tl.abs(kept.to({self.compute})) < float('inf'), left, 0.0)")
                lines.append(f"tl.store(at{i} + offsets, kept{mask})")
                lines.append(f"tl.store(at{len(self._types) - 1} + offsets, left.to({kind}){mask})")
            else:
                uniform = not isinstance(out, Expr) or out.uniform
                value = f"tl.full(({BLOCK},), {value}, {self.compute})" if uniform else value
                lines.append(f"tl.store(at{i} + {through}, {value}.to({kind}){mask})")
        if program.count is not None:
            true = f"({self.names[program.count.index]} != 0)"
            inside = self.mask if masked else "offsets >= 0"
            lines.append(f"tl.store(counts + pid, tl.sum(({true} & ({inside})).to(tl.int32), axis=0))")
        return lines

    def text(self, a: Any, kind: str) -> str:
        """A value in the kernel's text."""
        if not isinstance(a, Expr):
            return repr(float(a))
        return f"{self.names[a.index]}.to({kind})" if a.index in self._booleans else self.names[a.index]

    def _emit(self, node: Expr, kind: str) -> str:
        if node.op == "where":
            condition = node.args[0]
            first = self.names[condition.index] if isinstance(condition, Expr) else repr(float(condition))
            if not (isinstance(condition, Expr) and condition.index in self._booleans):
                first = f"({first} != 0)"
            return _EMIT["where"].format(first, *(self.text(a, kind) for a in node.args[1:]))
        return _EMIT[node.op].format(*(self.text(a, kind) for a in node.args))


def _source(program: Program, signature: Signature, aligned: bool) -> str:
    writer = Writer(program, signature)
    words = HEADER + len(writer.columns) + (2 if signature.gaps is not None else 0)
    arguments = ["table", "tiles", *(["counts"] if program.count is not None else []), *writer.arguments()]
    lines = [
        "pid = tl.program_id(0).to(tl.int64)",
        f"row = table + tl.load(tiles + pid).to(tl.int64) * {words}",
        f"start = (pid - tl.load(row)) * {BLOCK}",
        "size = tl.load(row + 1)",
        *writer.addresses(HEADER, aligned),
        *writer.uniforms(),
        f"offsets = start + tl.arange(0, {BLOCK})",
        f"drawn = pid * {BLOCK} + tl.arange(0, {BLOCK})",
        f"if start + {BLOCK} <= size:",
        *(f"    {line}" for line in writer.block(masked=False)),
        "elif start < size:",
        *(f"    {line}" for line in writer.block(masked=True)),
        *(["else:", "    tl.store(counts + pid, 0)"] if program.count is not None else []),
    ]
    return function("rule", arguments, lines)


def _noise_mask(dtype: torch.dtype) -> int:
    return {torch.bfloat16: 0xFFFF, torch.float16: 0x1FFF}[dtype]


_TANH = """@triton.jit
def _tanh(x):
    # (1 - e) / (1 + e) with e = exp(-2|x|) cancels near 0, where the odd series is exact to rounding.
    a = tl.abs(x)
    e = tl.exp(-2.0 * a)
    s = a * a
    near = a * (1.0 + s * (-1.0 / 3.0 + s * (2.0 / 15.0 + s * (-17.0 / 315.0 + s * (62.0 / 2835.0)))))
    y = tl.where(a < 0.1, near, (1.0 - e) / (1.0 + e))
    return tl.where(x < 0, -y, tl.where(x == x, y, x))


"""


@cache
def compile_kernel(program: Program, signature: Signature, aligned: bool) -> Any:
    """The Triton kernel of a rule; made once. ``aligned``: all addresses are multiples of 16 bytes."""
    return build(_TANH + _source(program, signature, aligned))["rule"]


SPAN = 8 * BLOCK  # elements whose squares a program sums
PARTS = 1024  # sums of such programs that are added at a time

_NORM = """@triton.jit
def squares(table, owners, firsts, parts, WORDS: tl.constexpr):
    pid = tl.program_id(0).to(tl.int64)
    tensor = tl.load(owners + pid).to(tl.int64)
    row = table + tensor * WORDS
    address = tl.load(row + {word})
    size = tl.where(address != 0, tl.load(row + 1), 0)
    start = (pid - tl.load(firsts + tensor)) * {span}
    total = tl.zeros(({block},), {compute})
    for begin in range(0, {span}, {block}):
        offsets = start + begin + tl.arange(0, {block})
        x = tl.load(address.to(tl.pointer_type({storage})) + offsets, mask=offsets < size, other=0.0).to({compute})
        total += x * x
    tl.store(parts + pid, tl.sum(total, axis=0).to(tl.float64))


@triton.jit
def norm(parts, count, out):
    total = tl.zeros(({parts},), tl.float64)
    for begin in range(0, count, {parts}):
        at = begin + tl.arange(0, {parts})
        total += tl.load(parts + at, mask=at < count, other=0.0)
    tl.store(out, tl.sqrt(tl.sum(total, axis=0)))
"""


@cache
def norm_kernels(storage: torch.dtype, compute: torch.dtype) -> tuple[Any, Any]:
    """The two kernels of the norm of all gradients: sums of squares in a fixed order, and the root of their sum."""
    types = {"storage": _TRITON_TYPES[storage], "compute": _TRITON_TYPES[compute]}
    scope = build(_NORM.format(word=HEADER + 1, span=SPAN, block=BLOCK, parts=PARTS, **types))
    return scope["squares"], scope["norm"]


@cache
def triton_type(dtype: torch.dtype) -> Any:
    from triton import language

    return getattr(language, _TRITON_TYPES[dtype].removeprefix("tl."))
