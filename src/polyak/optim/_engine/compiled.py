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
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch

from polyak.optim._engine.blocked import Layout
from polyak.optim._engine.places import EVERY, Places
from polyak.optim._engine.trace import Expr, Program

FLAGS = (
    "-O3",
    "-march=native",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-ffp-contract=off",
    "-fopenmp-simd",
    "-shared",
    "-fPIC",
)
SPLIT = 65536  # elements below which one thread does it all
_HEADER = 2  # words of a table's row before the addresses: first element, size
_C = {torch.float32: "float", torch.float64: "double", torch.bfloat16: "uint16_t"}
_EMIT = {
    "add": "({} + {})", "sub": "({} - {})", "mul": "({} * {})", "div": "({} / {})", "neg": "(-{})", "axpy": "({2} + {0} * {1})",
    "gt": "(T)({} > {})", "ge": "(T)({} >= {})", "lt": "(T)({} < {})", "le": "(T)({} <= {})", "where": "({0} != 0 ? {1} : {2})",
    "sqrt": "SQRT({})", "abs": "FABS({})", "sign": "({0} != {0} ? {0} : (T)(({0} > 0) - ({0} < 0)))",
    "min": "(({0} != {0} || {0} < {1}) ? {0} : {1})", "max": "(({0} != {0} || {0} > {1}) ? {0} : {1})",
}  # fmt: skip
_GAPS = {torch.uint8: "uint8_t", torch.int16: "int16_t", torch.int32: "int32_t"}
_PRELUDE = """#include <stdint.h>
#include <string.h>
static inline float load16(uint16_t h) { uint32_t b = (uint32_t)h << 16; float x; memcpy(&x, &b, 4); return x; }
static inline uint16_t store16(float x) {
    uint32_t b; memcpy(&b, &x, 4);
    uint32_t rounded = (b + 0x7FFF + ((b >> 16) & 1)) >> 16;
    return (uint16_t)(x != x ? 0x7FC0 : rounded);
}
"""


class Writer:
    """The parts of a rule's text in C: argument lists, and the work on the element ``i``."""

    def __init__(self, program: Program, layout: Layout) -> None:
        self.program = program
        self._indexed = layout.gaps is not None
        self.types = [_C[t] for t in layout.storage]
        self.names = {node.index: f"v{i}" for i, node in enumerate(program.split().host)}
        host = range(len(self.names))
        self.pointers = ", ".join(f"{t} *restrict a{i}" for i, t in enumerate(self.types))
        self.values = "".join(f", T v{i}" for i in host)
        self.given = "".join(f", (T)values[{i}]" for i in host)
        suffix = "f" if _C[layout.compute] == "float" else ""
        self.head = (
            f"{_PRELUDE}typedef {_C[layout.compute]} T;\n"
            f"#define SQRT __builtin_sqrt{suffix}\n#define FABS __builtin_fabs{suffix}\n"
        )

    def text(self, a: Any) -> str:
        return self.names[a.index] if isinstance(a, Expr) else f"((T){_number(float(a))})"

    def at(self, i: int) -> str:
        """The place of the element in the i-th of the program's inputs."""
        return f"a{i}[j]" if self._indexed and self.program.inputs[i] in ("p", "g") else f"a{i}[i]"

    def compute(self, results: Any) -> list[str]:
        """Statements for some of the program's values."""
        lines, needed = ["j += gaps[i];"] if self._indexed else [], self.program.needed(results)
        for node in self.program.nodes:
            if node.op == "input" and not node.uniform and node.index in needed and node.name in self.program.inputs:
                i = self.program.inputs.index(node.name)
                read = self.at(i) if self.types[i] != "uint16_t" else f"load16({self.at(i)})"
                lines.append(f"T x{node.index} = {read};")
                self.names[node.index] = f"x{node.index}"
        for node in self.program.operations(results):
            self.names[node.index] = f"x{node.index}"
            lines.append(f"T x{node.index} = {_EMIT[node.op].format(*map(self.text, node.args))};")
        return lines

    def element(self) -> list[str]:
        """All of the rule: load, compute, store."""
        lines = self.compute(self.program.results)
        for name, out in self.program.outputs.items():
            i = self.program.inputs.index(name)
            value = self.text(out) if self.types[i] != "uint16_t" else f"store16({self.text(out)})"
            lines.append(f"{self.at(i)} = {value};")
        if self.program.count is not None:
            lines.append(f"count += {self.text(self.program.count)} != 0;")
        return lines


def source(program: Program, layout: Layout) -> str:
    """The C of a rule: ``rule(table, rows, begin, end, values, count)`` over a range of elements of all tensors in a row."""
    writer = Writer(program, layout)
    indexed = layout.gaps is not None
    fixed = ("p", "g") if indexed else ()
    addresses = ", ".join(
        f"({t} *)row[{_HEADER + i}]" + ("" if name in fixed else " + at")
        for i, (t, name) in enumerate(zip(writer.types, program.inputs, strict=True))
    )
    words = _HEADER + len(writer.types) + 2 * indexed
    places, given, seek = "", "", ""
    if layout.gaps is not None:
        kind = f"const {_GAPS[layout.gaps]} *"
        places = f"int64_t j, {kind}restrict gaps, "
        given = f"place, ({kind})row[{words - 2}] + at, "
        seek = (
            f"int64_t place = ((const int64_t *)row[{words - 1}])[at / {EVERY}];\n            "
            f"for (int64_t i = at / {EVERY} * {EVERY}; i < at; i++) place += (({kind})row[{words - 2}])[i];"
        )
    indent = "\n        "
    # GCC leaves a loop that also counts scalar, unless it is told that the count is a sum.
    counted = "\n    #pragma omp simd reduction(+:count)" if program.count is not None and not indexed else ""
    return f"""{writer.head}static int64_t body(int64_t n, {places}{writer.pointers}{writer.values}) {{
    int64_t count = 0;{counted}
    for (int64_t i = 0; i < n; i++) {{
        {indent.join(writer.element())}
    }}
    return count;
}}
void rule(const int64_t *table, int64_t rows, int64_t begin, int64_t end, const double *values, int64_t *count) {{
    for (int64_t r = 0; r < rows; r++) {{
        const int64_t *row = table + r * {words};
        int64_t lo = row[0] > begin ? row[0] : begin, hi = row[0] + row[1] < end ? row[0] + row[1] : end, at = lo - row[0];
        if (lo < hi) {{
            {seek}
            *count += body(hi - lo, {given}{addresses}{writer.given});
        }}
    }}
}}
"""


def _number(value: float) -> str:
    if value != value or value in (float("inf"), float("-inf")):
        return '__builtin_nan("")' if value != value else f"({'-' if value < 0 else ''}__builtin_inf())"
    return value.hex()


def supported(program: Program, layout: Layout) -> bool:
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
def library(code: str, arguments: int = 6) -> Any:
    """The compiled function ``rule`` of a text, which takes 64-bit addresses and integers; None where it cannot be made."""
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
    function.argtypes = [ctypes.c_void_p] * arguments
    function.restype = None
    return function


@cache
def _threads(count: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(count, thread_name_prefix="polyak")


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_threads.cache_clear)  # a forked child has none of these threads


def parallel(run: Callable[[int, int], Any], edges: Sequence[int]) -> None:
    """``run(begin, end)`` between each two successive edges, in a thread each.

    Foreign calls let go of the interpreter, so that plain threads share the work.
    """
    others = [_threads(len(edges) - 2).submit(run, *pair) for pair in pairwise(edges[1:])]
    run(edges[0], edges[1])
    for other in others:
        other.result()


class Compiled:
    """A compiled rule over a fixed list of tensors.

    Args:
        columns: for each of the program's inputs but the gradient the tensors, one per parameter, each dense.
        places: where not all elements have a state, those that have, for each parameter.
    """

    def __init__(
        self,
        program: Program,
        function: Any,
        columns: Sequence[Sequence[torch.Tensor]],
        places: Sequence[Places] | None = None,
    ) -> None:
        self.evaluate = program.split().evaluate
        self._function = function
        sizes = [t.numel() for t in (columns[0] if places is None else [own.gaps for own in places])]
        starts = np.concatenate([[0], np.cumsum(sizes)])
        addresses = [[t.data_ptr() for t in column] for column in columns]
        rows = [starts[:-1], sizes, addresses[0], [0] * len(sizes), *addresses[1:]]
        if places is not None:
            rows += [[own.gaps.data_ptr() for own in places], [own.bases.data_ptr() for own in places]]
        self._table = np.ascontiguousarray(np.array(rows, dtype=np.int64).T)
        self._total = int(starts[-1])
        self.counts = torch.zeros(64, dtype=torch.int64) if program.count is not None else None

    def run(self, grads: Sequence[torch.Tensor], uniforms: Mapping[str, float]) -> None:
        """Apply the rule; ``grads`` are laid out as the parameters."""
        self._table[:, _HEADER + 1] = list(map(torch.Tensor.data_ptr, grads))
        values = np.array(self.evaluate(uniforms), dtype=np.float64)
        table, rows, given = self._table.ctypes.data, len(self._table), values.ctypes.data
        threads = 1 if self._total < SPLIT else torch.get_num_threads()
        edges = [self._total * k // threads for k in range(threads + 1)]
        counted = np.zeros((threads, 8), dtype=np.int64)  # each on a cache line of its own
        spot = {edge: counted.ctypes.data + 64 * k for k, edge in enumerate(edges[:-1])}

        def run(begin: int, end: int) -> None:
            self._function(table, rows, begin, end, given, spot[begin])

        parallel(run, edges)
        if self.counts is not None:
            self.counts = torch.from_numpy(counted[:, 0].copy())


def compiled(
    program: Program,
    layout: Layout,
    columns: Sequence[Sequence[torch.Tensor]],
    places: Sequence[Places] | None = None,
) -> Compiled | None:
    """A compiled rule for these tensors, or None where this backend cannot serve."""
    if not supported(program, layout):
        return None
    function = library(source(program, layout))
    return None if function is None else Compiled(program, function, columns, places)
