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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from polyak.optim._engine.rounding import Rounding
from polyak.optim._engine.trace import Expr, Program

BLOCK = 1024  # elements a program: two 16-byte accesses a thread and tensor
WARPS = 4
_HEADER = 2  # words of a table's row before the addresses: first tile, size
_TRITON_TYPES = {
    torch.float32: "tl.float32",
    torch.float64: "tl.float64",
    torch.bfloat16: "tl.bfloat16",
    torch.float16: "tl.float16",
}


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


def _source(program: Program, signature: Signature, aligned: bool) -> str:
    split = program.split(signature.on_device)
    wide = _is_wide(program, signature)
    compute = _TRITON_TYPES[signature.compute]
    loaded = [n for n in program.nodes if n.op == "input" and n.uniform and n.name in signature.on_device]
    rank = {name: i for i, name in enumerate(signature.on_device)}
    kahan, stochastic = signature.rounding.mode == "kahan", signature.rounding.mode == "stochastic"
    columns = [*program.inputs, *(["compensation"] if kahan else [])]
    types = [*signature.storage, *([signature.storage[0]] if kahan else [])]
    arguments = [
        "table", "tiles", *(f"uniform{i}" for i in range(len(signature.on_device))),
        *(["grad_scale", "found_inf"] if signature.scaled else []),
        *(f"v{i}" for i in range(len(split.host))), *(f"w{i}" for i in range(len(split.host) if wide else 0)),
        *(["seed"] if stochastic else []),
    ]  # fmt: skip
    lines = [
        "pid = tl.program_id(0).to(tl.int64)",
        f"row = table + tl.load(tiles + pid).to(tl.int64) * {_HEADER + len(columns)}",
        f"start = (pid - tl.load(row)) * {BLOCK}",
        "size = tl.load(row + 1)",
    ]
    for i, t in enumerate(types):
        lines.append(f"at{i} = tl.load(row + {_HEADER + i}).to(tl.pointer_type({_TRITON_TYPES[t]}))")
        if aligned:
            lines.append(f"at{i} = tl.multiple_of(at{i}, 16)")

    names: dict[int, str] = {}
    # Comparisons made in the kernel are Triton's booleans; those of the host come as 0.0 or 1.0.
    booleans = {n.index for n in (*program.body, *split.device) if n.op in _BOOLEAN}

    def text(a: Any, kind: str) -> str:
        if not isinstance(a, Expr):
            return repr(float(a))
        return f"{names[a.index]}.to({kind})" if a.index in booleans else names[a.index]

    def emit(node: Expr, kind: str) -> str:
        if node.op == "where":
            condition = node.args[0]
            first = names[condition.index] if isinstance(condition, Expr) else repr(float(condition))
            if not (isinstance(condition, Expr) and condition.index in booleans):
                first = f"({first} != 0)"
            return _EMIT["where"].format(first, *(text(a, kind) for a in node.args[1:]))
        return _EMIT[node.op].format(*(text(a, kind) for a in node.args))

    # Uniform values: float64 throughout, rounded once to the compute type.
    for i, node in enumerate(split.host):
        rest = f" + tl.full((), w{i}, tl.float64)" if wide else ""
        lines.append(f"h{i} = tl.full((), v{i}, tl.float64){rest}")
        names[node.index] = f"h{i}"
    for node in loaded:
        lines.append(f"d{node.index} = tl.load(uniform{rank[node.name]}).to(tl.float64)")
        names[node.index] = f"d{node.index}"
    for node in split.device:
        if node.op != "input":
            lines.append(f"d{node.index} = {emit(node, 'tl.float64')}")
            names[node.index] = f"d{node.index}"
    in_body = sorted({a.index for n in program.body for a in n.args if isinstance(a, Expr) and a.uniform})
    for index in in_body:
        if index not in booleans:
            lines.append(f"c{index} = {names[index]}.to({compute})")
            names[index] = f"c{index}"
    if signature.scaled:
        lines.append(f"unscale = (1.0 / tl.load(grad_scale).to(tl.float64)).to({compute})")
        lines.append("size = tl.where(tl.load(found_inf) == 0, size, 0)")
    lines.append(f"offsets = start + tl.arange(0, {BLOCK})")

    # A new draw every step: the host mixes the step into the seed, or the kernel does where only it knows the step.
    steps = [names[n.index] for n in loaded if n.name == "step"]
    seed = f"(seed + {steps[0]}.to(tl.int64) * 7919)" if steps else "seed"

    def block(masked: bool) -> list[str]:
        mask = ", mask=offsets < size" if masked else ""
        inner = []
        needed = {a.index for n in program.body for a in n.args if isinstance(a, Expr)}
        needed |= {o.index for o in program.outputs.values() if isinstance(o, Expr)}
        for node in program.nodes:
            if node.op == "input" and not node.uniform and node.index in needed:
                i = program.inputs.index(node.name)
                inner.append(f"x{node.index} = tl.load(at{i} + offsets{mask}).to({compute})")
                if node.name == "g" and signature.scaled:
                    inner.append(f"x{node.index} = x{node.index} * unscale")
                if node.name == "p" and kahan:
                    inner.append(f"x{node.index} += tl.load(at{len(types) - 1} + offsets{mask}).to({compute})")
                names[node.index] = f"x{node.index}"
        for node in program.body:
            inner.append(f"x{node.index} = {emit(node, compute)}")
            names[node.index] = f"x{node.index}"
        for name, out in program.outputs.items():
            i = program.inputs.index(name)
            value = text(out, compute)
            kind = _TRITON_TYPES[types[i]]
            if name == "p" and stochastic:
                inner.append(
                    f"r = tl.randint({seed}, pid * {BLOCK} + tl.arange(0, {BLOCK})).to(tl.int32, bitcast=True)"
                )
                inner.append(f"r = r & {_noise_mask(types[0])}")
                inner.append(f"bits = ({value}.to(tl.int32, bitcast=True) + r) & {~_noise_mask(types[0])}")
                inner.append(
                    f"kept = tl.where(tl.abs({value}) < float('inf'), bits.to(tl.float32, bitcast=True), {value})"
                )
                inner.append(f"tl.store(at{i} + offsets, kept.to({kind}){mask})")
            elif name == "p" and kahan:
                inner.append(f"kept = {value}.to({kind})")
                inner.append(f"left = {value} - kept.to({compute})")
                inner.append(f"left = tl.where(tl.abs(kept.to({compute})) < float('inf'), left, 0.0)")
                inner.append(f"tl.store(at{i} + offsets, kept{mask})")
                inner.append(f"tl.store(at{len(types) - 1} + offsets, left.to({kind}){mask})")
            else:
                uniform = not isinstance(out, Expr) or out.uniform
                value = f"tl.full(({BLOCK},), {value}, {compute})" if uniform else value
                inner.append(f"tl.store(at{i} + offsets, {value}.to({kind}){mask})")
        return inner

    lines.append(f"if start + {BLOCK} <= size:")
    lines += [f"    {line}" for line in block(masked=False)]
    lines.append("elif start < size:")
    lines += [f"    {line}" for line in block(masked=True)]
    head = "import triton\nimport triton.language as tl\n\n\n" + _TANH
    return f"{head}@triton.jit\ndef rule({', '.join(arguments)}):\n" + "".join(f"    {line}\n" for line in lines)


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

_kernels: dict[tuple[Program, Signature, bool], Any] = {}


def compile_kernel(program: Program, signature: Signature, aligned: bool) -> Any:
    """The Triton kernel of a rule; made once. ``aligned``: all addresses are multiples of 16 bytes."""
    key = (program, signature, aligned)
    if key not in _kernels:
        source = _source(program, signature, aligned)
        # Triton reads a kernel's source through inspect: linecache is where generated code is found.
        name = f"<polyak kernel {hashlib.sha256(source.encode()).hexdigest()[:16]}>"
        linecache.cache[name] = (len(source), None, source.splitlines(keepends=True), name)
        scope: dict[str, Any] = {"__name__": "polyak.optim._engine.generated"}
        exec(compile(source, name, "exec"), scope)
        _kernels[key] = scope["rule"]
    return _kernels[key]


class Launch:
    """A rule over a fixed list of tensors: the tables, and the launch.

    Args:
        columns: for each of the program's inputs but the gradient (and, last, the compensation) the tensors, one per
            parameter, each dense.
    """

    def __init__(self, program: Program, signature: Signature, columns: Sequence[Sequence[torch.Tensor]]) -> None:
        self.signature = signature
        self.evaluate = program.split(signature.on_device).evaluate
        self._program = program
        self._wide = _is_wide(program, signature)
        self._device = columns[0][0].device
        self._cuda = self._device.type == "cuda"
        sizes = [t.numel() for t in columns[0]]
        tiles = [-(-n // BLOCK) for n in sizes]
        first = [0]
        for t in tiles:
            first.append(first[-1] + t)
        self._grid = (first[-1],)
        owners = torch.repeat_interleave(torch.arange(len(sizes), dtype=torch.int32), torch.tensor(tiles))
        self._tiles = self._upload(owners.pin_memory() if self._cuda else owners)
        addresses = [[t.data_ptr() for t in column] for column in columns]
        rows = [first[:-1], sizes, addresses[0], [0] * len(sizes), *addresses[1:]]
        self._rows = torch.tensor(rows, dtype=torch.int64).t().contiguous()
        self._fixed_aligned = all(a % 16 == 0 for column in addresses for a in column)
        self._gradients: list[int] = []
        self._table = self._rows
        self._kernel: Any = None
        # A pinned table in reserve: none may be allocated while a graph is captured.
        self._reserve = self._rows.pin_memory() if self._cuda else self._rows
        self._one = torch.ones((), device=self._device) if signature.scaled else None
        self._captured: list[torch.Tensor] = []  # read by captured graphs whenever they are replayed

    def _upload(self, t: torch.Tensor) -> torch.Tensor:
        return t.to(self._device, non_blocking=True)

    def _point(self, gradients: list[int]) -> None:
        aligned = self._fixed_aligned and all(a % 16 == 0 for a in gradients)
        self._kernel = compile_kernel(self._program, self.signature, aligned)
        self._rows[:, _HEADER + 1] = torch.tensor(gradients, dtype=torch.int64)
        if self._cuda and torch.cuda.is_current_stream_capturing():
            self._reserve.copy_(self._rows)
            self._table = self._upload(self._reserve)
            self._captured += [self._reserve, self._table]
            self._reserve = torch.empty_like(self._rows)
        elif self._cuda:
            self._table = self._upload(self._rows.pin_memory())
        else:
            self._table = self._rows.clone()
        self._gradients = gradients

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
        if not self._grid[0]:
            return
        if self._cuda and self._device.index != torch.cuda.current_device():
            # Triton launches on the current device, whatever its arguments are on.
            with torch.cuda.device(self._device):
                self.run(grads, uniforms, scaled, seed)
            return
        gradients = list(map(torch.Tensor.data_ptr, grads))
        if gradients != self._gradients:
            self._point(gradients)
        signature = self.signature
        seeds = (seed,) if signature.rounding.mode == "stochastic" else ()
        on_device = [uniforms[name] for name in signature.on_device]
        found: Sequence[torch.Tensor | None] = ()
        if signature.scaled:
            # A scaler that has unscaled the gradients itself hands over no scale.
            scale, found_inf = scaled
            found = (self._one if scale is None else scale, found_inf)
        values = self.evaluate(uniforms)
        if self._wide:
            # Two float32 hold 48 bits of a float64.
            high = np.asarray(values).astype(np.float32).astype(np.float64)
            values = (*high.tolist(), *np.nan_to_num(np.asarray(values) - high, nan=0.0).tolist())
        self._kernel[self._grid](
            self._table, self._tiles, *on_device, *found, *values, *seeds, num_warps=WARPS
        )  # fmt: skip
