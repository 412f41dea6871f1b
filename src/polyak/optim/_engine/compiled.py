"""The fastest CPU backend: a traced rule as C, compiled once by the machine's own compiler and kept in the user's cache.

One pass over memory: every parameter, gradient and state is read and written once, in as many threads as PyTorch uses. Where
there is no compiler, or a rule needs what plain C does not do fast (exp, tanh, the special roundings), the blocked backend runs.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from polyak.optim._engine.blocked import Layout
from polyak.optim._engine.trace import Expr, Program

FLAGS = ("-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=off", "-shared", "-fPIC")
SPLIT = 65536  # elements below which one thread does it all
_HEADER = 2  # words of a table's row before the addresses: first element, size
_C = {torch.float32: "float", torch.float64: "double", torch.bfloat16: "uint16_t"}
_EMIT = {
    "add": "({} + {})", "sub": "({} - {})", "mul": "({} * {})", "div": "({} / {})", "neg": "(-{})", "axpy": "({2} + {0} * {1})",
    "gt": "(T)({} > {})", "ge": "(T)({} >= {})", "lt": "(T)({} < {})", "le": "(T)({} <= {})", "where": "({0} != 0 ? {1} : {2})",
    "sqrt": "SQRT({})", "abs": "FABS({})", "sign": "({0} != {0} ? {0} : (T)(({0} > 0) - ({0} < 0)))",
    "min": "(({0} != {0} || {0} < {1}) ? {0} : {1})", "max": "(({0} != {0} || {0} > {1}) ? {0} : {1})",
}  # fmt: skip
_PRELUDE = """#include <stdint.h>
#include <string.h>
static inline float load16(uint16_t h) { uint32_t b = (uint32_t)h << 16; float x; memcpy(&x, &b, 4); return x; }
static inline uint16_t store16(float x) {
    uint32_t b; memcpy(&b, &x, 4);
    uint32_t rounded = (b + 0x7FFF + ((b >> 16) & 1)) >> 16;
    return (uint16_t)(x != x ? 0x7FC0 : rounded);
}
"""


def source(program: Program, layout: Layout) -> str:
    """The C of a rule: ``rule(table, rows, begin, end, values)`` over a range of elements of all tensors in a row."""
    real = _C[layout.compute]
    types = [_C[t] for t in layout.storage]
    names = {node.index: f"v{i}" for i, node in enumerate(program.split().host)}
    inputs = {n.name: n for n in program.nodes if n.op == "input" and not n.uniform}

    def text(a: Any) -> str:
        return names[a.index] if isinstance(a, Expr) else f"((T){_number(float(a))})"

    loads, lines, stores = [], [], []
    for i, name in enumerate(program.inputs):
        read = f"a{i}[i]" if types[i] != "uint16_t" else f"load16(a{i}[i])"
        loads.append(f"T x{inputs[name].index} = {read};")
        names[inputs[name].index] = f"x{inputs[name].index}"
    for node in program.body:
        names[node.index] = f"x{node.index}"
        lines.append(f"T x{node.index} = {_EMIT[node.op].format(*map(text, node.args))};")
    for name, out in program.outputs.items():
        i = program.inputs.index(name)
        stores.append(f"a{i}[i] = {text(out)};" if types[i] != "uint16_t" else f"a{i}[i] = store16({text(out)});")
    pointers = ", ".join(f"{t} *restrict a{i}" for i, t in enumerate(types))
    values = ", ".join(f"T v{i}" for i in range(len(program.split().host)))
    given = ", ".join(f"(T)values[{i}]" for i in range(len(program.split().host)))
    addresses = ", ".join(f"({t} *)row[{_HEADER + i}] + lo - row[0]" for i, t in enumerate(types))
    indent = "\n        "
    return f"""{_PRELUDE}typedef {real} T;
#define SQRT __builtin_sqrt{"f" if real == "float" else ""}
#define FABS __builtin_fabs{"f" if real == "float" else ""}
static void body(int64_t n, {pointers}{", " + values if values else ""}) {{
    for (int64_t i = 0; i < n; i++) {{
        {indent.join([*loads, *lines, *stores])}
    }}
}}
void rule(const int64_t *table, int64_t rows, int64_t begin, int64_t end, const double *values) {{
    for (int64_t r = 0; r < rows; r++) {{
        const int64_t *row = table + r * {_HEADER + len(types)};
        int64_t lo = row[0] > begin ? row[0] : begin, hi = row[0] + row[1] < end ? row[0] + row[1] : end;
        if (lo < hi) body(hi - lo, {addresses}{", " + given if given else ""});
    }}
}}
"""


def _number(value: float) -> str:
    if value != value or value in (float("inf"), float("-inf")):
        return '__builtin_nan("")' if value != value else f"({'-' if value < 0 else ''}__builtin_inf())"
    return value.hex()


def _supported(program: Program, layout: Layout) -> bool:
    return (
        layout.rounding.mode == "nearest"
        and all(t in _C for t in (layout.compute, *layout.storage))
        and all(node.op in _EMIT for node in program.body)
    )


def _folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(base) / "polyak"


@cache
def _compiler() -> tuple[str, str] | None:
    """The C compiler, and what its native code depends on."""
    if sys.platform == "win32" or os.environ.get("POLYAK_NO_COMPILER"):
        return None
    found = shutil.which(os.environ.get("CC", "cc")) or shutil.which("gcc") or shutil.which("clang")
    if found is None:
        return None
    processor = platform.machine() + platform.processor()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        processor += next((line for line in lines if line.startswith(("flags", "Features"))), "")
    except OSError:
        pass
    return found, processor


@cache
def _library(code: str) -> Any:
    """The compiled function, or None where it cannot be made."""
    tool = _compiler()
    if tool is None:
        return None
    name = hashlib.sha256("\n".join([code, *tool, *FLAGS]).encode()).hexdigest()[:32] + ".so"
    try:
        folder = _folder()
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        except OSError:
            folder = Path(tempfile.mkdtemp(prefix="polyak-"))
        path = folder / name
        if not path.exists():
            with tempfile.TemporaryDirectory(dir=folder) as work:
                built = Path(work) / name
                text = Path(work) / "rule.c"
                text.write_text(code)
                command = [tool[0], *FLAGS, str(text), "-o", str(built)]
                subprocess.run(command, check=True, capture_output=True, timeout=60)
                os.replace(built, path)  # whole or not at all, whoever else is building it
        function = ctypes.CDLL(str(path)).rule
    except (OSError, subprocess.SubprocessError):
        return None
    function.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p]
    function.restype = None
    return function


@cache
def _threads(count: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(count, thread_name_prefix="polyak")


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_threads.cache_clear)  # a forked child has none of these threads


class Compiled:
    """A compiled rule over a fixed list of tensors.

    Args:
        columns: for each of the program's inputs but the gradient the tensors, one per parameter, each dense.
    """

    def __init__(self, program: Program, function: Any, columns: Sequence[Sequence[torch.Tensor]]) -> None:
        self.evaluate = program.split().evaluate
        self._function = function
        sizes = [t.numel() for t in columns[0]]
        starts = np.concatenate([[0], np.cumsum(sizes)])
        addresses = [[t.data_ptr() for t in column] for column in columns]
        rows = [starts[:-1], sizes, addresses[0], [0] * len(sizes), *addresses[1:]]
        self._table = np.ascontiguousarray(np.array(rows, dtype=np.int64).T)
        self._total = int(starts[-1])

    def run(self, grads: Sequence[torch.Tensor], uniforms: Mapping[str, float]) -> None:
        """Apply the rule; ``grads`` are laid out as the parameters."""
        self._table[:, _HEADER + 1] = list(map(torch.Tensor.data_ptr, grads))
        values = np.array(self.evaluate(uniforms), dtype=np.float64)
        table, rows, given = self._table.ctypes.data, len(self._table), values.ctypes.data
        count = 1 if self._total < SPLIT else torch.get_num_threads()
        if count == 1:
            self._function(table, rows, 0, self._total, given)
            return
        # Foreign calls let go of the interpreter, so that plain threads share the work.
        edges = [self._total * k // count for k in range(count + 1)]
        others = [
            _threads(count - 1).submit(self._function, table, rows, edges[k], edges[k + 1], given)
            for k in range(1, count)
        ]
        self._function(table, rows, 0, edges[1], given)
        for other in others:
            other.result()


def compiled(program: Program, layout: Layout, columns: Sequence[Sequence[torch.Tensor]]) -> Compiled | None:
    """A compiled rule for these tensors, or None where this backend cannot serve."""
    if not _supported(program, layout):
        return None
    function = _library(source(program, layout))
    return None if function is None else Compiled(program, function, columns)
