"""The GPU backend: a traced rule as one Triton launch over all tensors of a group.

A table in device memory holds, for every tensor, its first tile, its size and the addresses of the parameter, the gradient
and the states; a second one says which tensor each tile belongs to. The tables are rebuilt only when an address changes, with
one asynchronous copy. Nothing is read back: a step never waits for the device, and can be captured in a CUDA graph.

Uniform values are computed on the host in float64 and handed over as arguments, or are computed in float64 by every program
where they live on the device (``capturable``'s step and learning rate, a global clipping factor).
"""

from __future__ import annotations

import hashlib
import linecache
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch

from polyak.optim._engine.places import EVERY, Places
from polyak.optim._engine.rounding import Rounding
from polyak.optim._engine.trace import Expr, Program

BLOCK = EVERY  # elements a program: two 16-byte accesses a thread and tensor
WARPS = 4
_HEADER = 2  # words of a table's row before the addresses: first tile, size
_TRITON_TYPES = {
    torch.float32: "tl.float32",
    torch.float64: "tl.float64",
    torch.bfloat16: "tl.bfloat16",
    torch.float16: "tl.float16",
}
_GAPS = {torch.uint8: "tl.uint8", torch.int16: "tl.int16", torch.int32: "tl.int32"}


def available(device: torch.device) -> bool:
    """Whether kernels can run on tensors of this device (CUDA or ROCm; the CPU in Triton's interpreter mode)."""
    try:
        from triton import knobs
    except ImportError:
        return False
    return device.type == "cuda" or (device.type == "cpu" and bool(knobs.runtime.interpret))


@dataclass(frozen=True)
class Signature:
    """What a kernel depends on besides the program."""

    compute: torch.dtype
    storage: tuple[torch.dtype, ...]  # of each of the program's inputs
    rounding: Rounding
    on_device: tuple[str, ...]  # uniform inputs that are loaded from device memory
    scaled: bool  # gradients carry a GradScaler's scale; found_inf skips the step
    gaps: torch.dtype | None = None  # type of the gaps between the elements that have a state, where not all have


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


def _is_wide(program: Program, signature: Signature) -> bool:
    """Whether host values need more than float32, which is what Triton makes of a Python float."""
    return signature.compute == torch.float64 or bool(program.split(signature.on_device).device)


class Writer:
    """The parts of a kernel's text: arguments, addresses, uniform values, and the elementwise work on one block.

    The text uses ``row`` (this tensor's row of the table, whose addresses start ``header`` words in), ``offsets`` (of the
    block's elements in the tensor), ``size`` (its number of elements) and ``drawn`` (a number for each of the block's
    elements that no other of the launch has).
    """

    def __init__(self, program: Program, signature: Signature) -> None:
        self.program = program
        self.signature = signature
        self.split = program.split(signature.on_device)
        self.wide = _is_wide(program, signature)
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
            *(f"uniform{i}" for i in range(len(self.signature.on_device))),
            *(["grad_scale", "found_inf"] if self.signature.scaled else []),
            *(f"v{i}" for i in range(len(self.split.host))), *(f"w{i}" for i in range(len(self.split.host) if self.wide else 0)),
            *(["seed"] if self._stochastic else []),
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
        return lines

    def uniforms(self) -> list[str]:
        """Uniform values: float64 throughout, rounded once to the compute type."""
        lines, names = [], self.names
        rank = {name: i for i, name in enumerate(self.signature.on_device)}
        for i, node in enumerate(self.split.host):
            rest = f" + tl.full((), w{i}, tl.float64)" if self.wide else ""
            lines.append(f"h{i} = tl.full((), v{i}, tl.float64){rest}")
            names[node.index] = f"h{i}"
        for node in self._loaded:
            lines.append(f"d{node.index} = tl.load(uniform{rank[node.name]}).to(tl.float64)")
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
            lines += [f"seed = seed + d{n.index}.to(tl.int64) * 7919" for n in self._loaded if n.name == "step"]
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
                lines.append(f"r = tl.randint(seed, drawn).to(tl.int32, bitcast=True) & {noise}")
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


def function(name: str, arguments: list[str], lines: list[str]) -> str:
    """A kernel's text."""
    return f"@triton.jit\ndef {name}({', '.join(arguments)}):\n" + "".join(f"    {line}\n" for line in lines)


def _source(program: Program, signature: Signature, aligned: bool) -> str:
    writer = Writer(program, signature)
    words = _HEADER + len(writer.columns) + (2 if signature.gaps is not None else 0)
    arguments = ["table", "tiles", *(["counts"] if program.count is not None else []), *writer.arguments()]
    lines = [
        "pid = tl.program_id(0).to(tl.int64)",
        f"row = table + tl.load(tiles + pid).to(tl.int64) * {words}",
        f"start = (pid - tl.load(row)) * {BLOCK}",
        "size = tl.load(row + 1)",
        *writer.addresses(_HEADER, aligned),
        *writer.uniforms(),
        f"offsets = start + tl.arange(0, {BLOCK})",
        f"drawn = pid * {BLOCK} + tl.arange(0, {BLOCK})",
        f"if start + {BLOCK} <= size:",
        *(f"    {line}" for line in writer.block(masked=False)),
        "elif start < size:",
        *(f"    {line}" for line in writer.block(masked=True)),
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

_HEAD = "import triton\nimport triton.language as tl\n\n\n" + _TANH


@cache
def build(source: str) -> dict[str, Any]:
    """The kernels of a text by name; made once."""
    text = _HEAD + source
    # Triton reads a kernel's source through inspect: linecache is where generated code is found.
    name = f"<polyak kernel {hashlib.sha256(text.encode()).hexdigest()[:16]}>"
    linecache.cache[name] = (len(text), None, text.splitlines(keepends=True), name)
    scope: dict[str, Any] = {"__name__": "polyak.optim._engine.generated"}
    exec(compile(text, name, "exec"), scope)
    return scope


_kernels: dict[tuple[Program, Signature, bool], Any] = {}


def compile_kernel(program: Program, signature: Signature, aligned: bool) -> Any:
    """The Triton kernel of a rule; made once. ``aligned``: all addresses are multiples of 16 bytes."""
    key = (program, signature, aligned)
    if key not in _kernels:
        _kernels[key] = build(_source(program, signature, aligned))["rule"]
    return _kernels[key]


class Launcher:
    """Launches of kernels on always the same kinds of arguments.

    From the second launch of one on, Triton's own look at every argument is skipped: most of a small step's time on the host.
    """

    def __init__(self) -> None:
        self._ready: dict[Any, Any] = {}

    def __call__(self, kernel: Any, grid: int, arguments: Sequence[Any], warps: int, key: Any = None) -> None:
        """Launch. ``key`` tells arguments that differ in what Triton specializes on: alignment, and divisibility of integers."""
        ready = self._ready.get((kernel, key))
        if ready is not None:
            ready(*arguments)
            return
        made = kernel[(grid,)](*arguments, num_warps=warps)
        if made is not None and hasattr(type(made), "__getitem__"):  # the interpreter makes nothing
            self._ready[kernel, key] = made[(grid, 1, 1)]


class Uniforms:
    """The values that a launch hands over besides its tables, in the order of :meth:`Writer.arguments`."""

    def __init__(self, program: Program, signature: Signature, device: torch.device) -> None:
        self.signature = signature
        self.evaluate = program.split(signature.on_device).evaluate
        self._wide = _is_wide(program, signature)
        self._stochastic = signature.rounding.mode == "stochastic"
        self._one = torch.ones((), device=device) if signature.scaled else None

    def arguments(
        self, uniforms: Mapping[str, Any], scaled: Sequence[torch.Tensor | None] = (), seed: int = 0
    ) -> list[Any]:
        signature = self.signature
        given: list[Any] = [uniforms[name] for name in signature.on_device]
        if signature.scaled:
            # A scaler that has unscaled the gradients itself hands over no scale.
            scale, found_inf = scaled
            given += [self._one if scale is None else scale, found_inf]
        values = self.evaluate(uniforms)
        if self._wide:
            # Two float32 hold 48 bits of a float64.
            high = np.asarray(values).astype(np.float32).astype(np.float64)
            values = (*high.tolist(), *np.nan_to_num(np.asarray(values) - high, nan=0.0).tolist())
        given += values
        if self._stochastic:
            given.append(seed)
        return given

    def key(self, given: Sequence[Any]) -> Any:
        """What Triton specializes on in these values: see :class:`Launcher`."""
        pointers = tuple(value.data_ptr() % 16 for value in given if isinstance(value, torch.Tensor))
        return (pointers, given[-1] == 1, given[-1] % 16 == 0) if self._stochastic else pointers


class Table:
    """Words about every tensor of a launch in device memory, the gradients' addresses among them.

    Args:
        rows: int64, one row a tensor: other words, then addresses, of which the second, in column ``gradient``, is filled in
            by :meth:`at`.
    """

    def __init__(self, rows: torch.Tensor, gradient: int, device: torch.device) -> None:
        self._device = device
        self._cuda = device.type == "cuda"
        self._rows = rows
        self._column = gradient
        self._gradients: list[int] | None = None
        self._fixed_aligned = bool((rows[:, gradient - 1 :] % 16 == 0).all())
        self._table = rows
        # A pinned table in reserve: none may be allocated while a graph is captured.
        self._reserve = rows.pin_memory() if self._cuda else rows
        self._captured: list[torch.Tensor] = []  # read by captured graphs whenever they are replayed
        self.aligned = False

    def at(self, gradients: list[int]) -> torch.Tensor:
        """The table with these addresses; uploaded again only if they have changed, without waiting."""
        if gradients != self._gradients:
            self.aligned = self._fixed_aligned and all(a % 16 == 0 for a in gradients)
            self._rows[:, self._column] = torch.tensor(gradients, dtype=torch.int64)
            if self._cuda and torch.cuda.is_current_stream_capturing():
                self._reserve.copy_(self._rows)
                self._table = self._reserve.to(self._device, non_blocking=True)
                self._captured += [self._reserve, self._table]
                self._reserve = torch.empty_like(self._rows)
            elif self._cuda:
                self._table = self._rows.pin_memory().to(self._device, non_blocking=True)
            else:
                self._table = self._rows.clone()
            self._gradients = gradients
        return self._table


def tile_owners(tiles: Sequence[int], device: torch.device) -> torch.Tensor:
    """For every tile the number of its tensor, in device memory."""
    owners = torch.repeat_interleave(torch.arange(len(tiles), dtype=torch.int32), torch.tensor(tiles))
    return (owners.pin_memory() if device.type == "cuda" else owners).to(device, non_blocking=True)


class Launch:
    """A rule over a fixed list of tensors: the tables, and the launch.

    Args:
        columns: for each of the program's inputs but the gradient (and, last, the compensation) the tensors, one per
            parameter, each dense.
        places: where not all elements have a state, those that have, for each parameter.
    """

    def __init__(
        self,
        program: Program,
        signature: Signature,
        columns: Sequence[Sequence[torch.Tensor]],
        places: Sequence[Places] | None = None,
    ) -> None:
        self.signature = signature
        self._program = program
        self._device = columns[0][0].device
        self._uniforms = Uniforms(program, signature, self._device)
        sizes = [t.numel() for t in (columns[0] if places is None else [own.gaps for own in places])]
        tiles = [-(-n // BLOCK) for n in sizes]
        first = [0]
        for t in tiles:
            first.append(first[-1] + t)
        self._grid = first[-1]
        self._launch = Launcher()
        self._kernels: list[Any] = [None, None]  # for unaligned and for aligned gradients
        self._tiles = tile_owners(tiles, self._device)
        addresses = [[t.data_ptr() for t in column] for column in columns]
        rows = [first[:-1], sizes, addresses[0], [0] * len(sizes), *addresses[1:]]
        if places is not None:
            rows += [[own.gaps.data_ptr() for own in places], [own.bases.data_ptr() for own in places]]
        self._table = Table(torch.tensor(rows, dtype=torch.int64).t().contiguous(), _HEADER + 1, self._device)
        self.counts = (
            torch.zeros(max(1, self._grid), dtype=torch.int32, device=self._device)
            if program.count is not None
            else None
        )

    def run(
        self,
        grads: Sequence[torch.Tensor],
        uniforms: Mapping[str, Any],
        scaled: Sequence[torch.Tensor | None] = (),
        seed: int = 0,
    ) -> None:
        """Launch.

        Args:
            grads: the gradients, laid out as the parameters.
            uniforms: the program's uniform inputs; those of ``signature.on_device`` as tensors of one element.
            scaled: (grad_scale, found_inf) where the signature has ``scaled``.
        """
        if not self._grid:
            return
        if self._device.type == "cuda" and self._device.index != torch.cuda.current_device():
            # Triton launches on the current device, whatever its arguments are on.
            with torch.cuda.device(self._device):
                self.run(grads, uniforms, scaled, seed)
            return
        table = self._table.at(list(map(torch.Tensor.data_ptr, grads)))
        kernel = self._kernels[self._table.aligned]
        if kernel is None:
            kernel = compile_kernel(self._program, self.signature, self._table.aligned)
            self._kernels[self._table.aligned] = kernel
        given = self._uniforms.arguments(uniforms, scaled, seed)
        counts = () if self.counts is None else (self.counts,)
        self._launch(kernel, self._grid, (table, self._tiles, *counts, *given), WARPS, self._uniforms.key(given))
