"""The CPU backend: a traced rule as C, compiled once by the machine's own compiler and kept in the user's cache.

One pass over memory: every parameter, gradient and state is read and written once, in as many threads as PyTorch uses. The text
depends on the rule and on the tensors' types alone: which tensors, how many steps each has made and what its group's numbers
are stands in tables. Where there is no compiler, or a rule needs what plain C does not do fast (exp, tanh), ATen's calls run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from polyak.core.cc import SPLIT, function, library, parallel
from polyak.optim._engine.places import EVERY
from polyak.optim._engine.rounding import DROPPED, Rounding
from polyak.optim._engine.trace import Expr, Program

if TYPE_CHECKING:
    from polyak.optim._engine.plan import Cohort

# A table's row: first element, elements, block, first part of the norm, number among all parameters; then the addresses of the
# parameter, the gradient (0: none at this step), the states, what rounding left, the gaps and the bases.
HEADER = 5
PART = 65536  # elements whose squares are summed at a time: sums do not depend on the number of threads
# What a job says, in words of 64 bits; see `source`.
TABLE, ROWS, BLOCKS, BLOCK_COUNT, NUMBERS, VALUES, BEGIN, END, OUT, WHAT = range(10)
UNIFORMS, RULE, SQUARES, TOTAL = 1, 2, 4, 8
_C = {torch.float32: "float", torch.float64: "double", torch.bfloat16: "uint16_t", torch.float16: "_Float16"}
_EMIT = {
    "add": "({} + {})", "sub": "({} - {})", "mul": "({} * {})", "div": "({} / {})", "neg": "(-{})", "axpy": "({2} + {0} * {1})",
    "gt": "(T)({} > {})", "ge": "(T)({} >= {})", "lt": "(T)({} < {})", "le": "(T)({} <= {})", "where": "({0} != 0 ? {1} : {2})",
    "sqrt": "SQRT({})", "abs": "FABS({})", "sign": "({0} != {0} ? {0} : (T)(({0} > 0) - ({0} < 0)))",
    "min": "(({0} != {0} || {0} < {1}) ? {0} : {1})", "max": "(({0} != {0} || {0} > {1}) ? {0} : {1})",
}  # fmt: skip
# The same in float64 for uniform values, which may be powers.
_UNIFORM = {
    **{op: text.replace("(T)", "(double)").replace("SQRT", "sqrt").replace("FABS", "fabs") for op, text in _EMIT.items()},
    "pow": "pow({}, {})", "exp": "exp({})", "tanh": "tanh({})",
}  # fmt: skip
_GAPS = {torch.uint8: "uint8_t", torch.int16: "int16_t", torch.int32: "int32_t"}
_PRELUDE = """#include <math.h>
#include <stdint.h>
#include <string.h>
static inline float load16(uint16_t h) { uint32_t b = (uint32_t)h << 16; float x; memcpy(&x, &b, 4); return x; }
static inline uint16_t store16(float x) {
    uint32_t b; memcpy(&b, &x, 4);
    uint32_t rounded = (b + 0x7FFF + ((b >> 16) & 1)) >> 16;
    return (uint16_t)(x != x ? 0x7FC0 : rounded);
}
/* SplitMix64 (Steele, Lea, Flood, 2014). */
static inline uint64_t mixed(uint64_t x) {
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;
    x = (x ^ (x >> 27)) * 0x94D049BB133111EBu;
    return x ^ (x >> 31);
}
"""


@dataclass(frozen=True)
class Layout:
    """What a compiled rule depends on besides the program."""

    compute: torch.dtype
    storage: tuple[torch.dtype, ...]  # of each of the program's inputs
    rounding: Rounding
    gaps: torch.dtype | None = None  # type of the gaps between the elements that have a state, where not all have


def _uniforms(program: Program, host: Sequence[Expr], extra: Sequence[str]) -> str:
    """Every block's values, of its group's numbers and its count of steps."""
    inputs = {name: i for i, name in enumerate(numbers_of(program))}
    lines: list[str] = []
    names: dict[int, str] = {}

    def emit(node: Any) -> str:
        if not isinstance(node, Expr):
            return f"({_number(float(node))})"
        if node.index not in names:
            if node.op == "input":
                text = "step" if node.name == "step" else f"u[{inputs[node.name]}]"
            else:
                text = _UNIFORM[node.op].format(*(emit(a) for a in node.args))
            names[node.index] = f"e{node.index}"
            lines.append(f"    const double e{node.index} = {text};")
        return names[node.index]

    results = [*map(emit, host), *(f"u[{inputs[name]}]" for name in extra)]
    lines += [f"    v[{i}] = {result};" for i, result in enumerate(results)]
    body = "\n".join(lines)
    return f"""static void evaluate(const double *u, const double step, double *v) {{
{body}
}}
static void uniforms(const int64_t *job) {{
    const int64_t *block = (const int64_t *)job[{BLOCKS}];
    double *values = (double *)job[{VALUES}];
    for (int64_t b = 0; b < job[{BLOCK_COUNT}]; b++, block += 3, values += {len(results)})
        evaluate((const double *)job[{NUMBERS}] + block[0] * {len(inputs)}, block[1] ? *(const float *)block[1] : 0, values);
}}
"""


def values_source(program: Program, host: Sequence[Expr], extra: Sequence[str] = ()) -> str:
    """The C of ``fill(job)``, which computes the uniform values of many blocks and nothing else."""
    return f"{_PRELUDE}{_uniforms(program, host, extra)}void fill(const int64_t *job) {{ uniforms(job); }}\n"


class Writer:
    """The parts of a rule's text in C: argument lists, uniform values, and the work on the element ``i``.

    Args:
        extra: names of uniform inputs that the text needs beside what the rule does.
    """

    def __init__(self, program: Program, layout: Layout, extra: Sequence[str] = ()) -> None:
        self.program = program
        self._rounding = layout.rounding.mode
        self._low = layout.storage[0]
        self._indexed = layout.gaps is not None
        kahan = [layout.storage[0]] if self._rounding == "kahan" else []
        self.types = [_C[t] for t in (*layout.storage, *kahan)]
        self._host = program.split().host
        self.names = {node.index: f"v{i}" for i, node in enumerate(self._host)}
        self.count = len(self._host) + len(extra)  # of a block's values
        self.pointers = ", ".join(f"{t} *restrict a{i}" for i, t in enumerate(self.types))
        self.values = "".join(f", T v{i}" for i in range(len(self._host)))
        self.given = "".join(f", (T)values[{i}]" for i in range(len(self._host)))
        suffix = "f" if _C[layout.compute] == "float" else ""
        self.head = (
            f"{_PRELUDE}typedef {_C[layout.compute]} T;\n"
            f"#define SQRT __builtin_sqrt{suffix}\n#define FABS __builtin_fabs{suffix}\n{_uniforms(program, self._host, extra)}"
        )

    def text(self, a: Any) -> str:
        return self.names[a.index] if isinstance(a, Expr) else f"((T){_number(float(a))})"

    def at(self, i: int) -> str:
        """The place of the element in the i-th of the program's inputs."""
        return f"a{i}[j]" if self._indexed and self.program.inputs[i : i + 1] in (("p",), ("g",)) else f"a{i}[i]"

    def read(self, i: int) -> str:
        """The element of the i-th input, as a number."""
        return f"load16({self.at(i)})" if self.types[i] == "uint16_t" else f"(T){self.at(i)}"

    def _stored(self, i: int, value: str) -> str:
        return f"store16({value})" if self.types[i] == "uint16_t" else f"({self.types[i]}){value}"

    def compute(self, results: Any) -> list[str]:
        """Statements for some of the program's values."""
        lines, needed = ["j += gaps[i];"] if self._indexed else [], self.program.needed(results)
        for node in self.program.nodes:
            if node.op == "input" and not node.uniform and node.index in needed and node.name in self.program.inputs:
                read = self.read(self.program.inputs.index(node.name))
                if node.name == "p" and self._rounding == "kahan":
                    read = f"{read} + {self.read(len(self.types) - 1)}"
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
            if name == "p" and self._rounding != "nearest":
                lines += self._rounded(self.text(out))
            else:
                lines.append(f"{self.at(i)} = {self._stored(i, self.text(out))};")
        if self.program.count is not None:
            lines.append(f"count += {self.text(self.program.count)} != 0;")
        return lines

    def _rounded(self, value: str) -> list[str]:
        """The parameter written back as `polyak.optim._engine.rounding` says."""
        if self._rounding == "kahan":
            last = len(self.types) - 1
            return [
                f"{self.at(0)} = {self._stored(0, value)};",
                f"T kept = {self.read(0)};",
                f"{self.at(last)} = {self._stored(last, f'(FABS(kept) < INFINITY ? {value} - kept : 0)')};",
            ]
        mask = (1 << DROPPED[self._low]) - 1
        return [
            f"T value = {value};",
            "uint32_t bits; memcpy(&bits, &value, 4);",
            f"bits = (bits + ((uint32_t)(mixed(seed + (uint64_t)i * 0x9E3779B97F4A7C15u) >> 32) & {mask:#x}u)) & ~{mask:#x}u;",
            "T kept; memcpy(&kept, &bits, 4);",
            f"{self.at(0)} = {self._stored(0, '(FABS(value) < INFINITY ? kept : value)')};",
        ]

    @property
    def seeded(self) -> bool:
        return self._rounding == "stochastic"

    def addresses(self, header: int) -> str:
        """The row's arrays from its element ``at`` on; where not all elements have a state, all of p and g."""
        fixed = ("p", "g") if self._indexed else ()
        names = [*self.program.inputs, "compensation"][: len(self.types)]
        return ", ".join(
            f"({t} *)row[{header + i}]" + ("" if name in fixed else " + at")
            for i, (t, name) in enumerate(zip(self.types, names, strict=True))
        )


# A row's own stream of random numbers at one step: of its block's seed, the step, and its number among all parameters.
SEED = (
    "mixed(mixed((uint64_t)block[2] + (block[1] ? (uint64_t)*(const float *)block[1] : 0) * 7919u) + (uint64_t)row[4])"
)


def source(program: Program, layout: Layout) -> str:
    """The C of a rule: ``rule(job)`` over a range of elements of all tensors in a row."""
    writer = Writer(program, layout)
    indexed = layout.gaps is not None
    words = HEADER + len(writer.types) + 2 * indexed
    places, given, seek = "", "", ""
    if layout.gaps is not None:
        kind = f"const {_GAPS[layout.gaps]} *"
        places = f"int64_t j, {kind}restrict gaps, "
        given = f"place, ({kind})row[{words - 2}] + at, "
        seek = (
            f"int64_t place = ((const int64_t *)row[{words - 1}])[at / {EVERY}];\n            "
            f"for (int64_t i = at / {EVERY} * {EVERY}; i < at; i++) place += (({kind})row[{words - 2}])[i];"
        )
    # Random numbers belong to an element's place in its tensor, so that they do not depend on the number of threads.
    seed = ", uint64_t seed" if writer.seeded else ""
    seeded = f", {SEED} + (uint64_t)at * 0x9E3779B97F4A7C15u" if writer.seeded else ""
    indent = "\n        "
    # GCC leaves a loop that also counts scalar, unless it is told that the count is a sum.
    counted = "\n    #pragma omp simd reduction(+:count)" if program.count is not None and not indexed else ""
    g = program.inputs.index("g")
    return f"""{writer.head}static int64_t body(int64_t n, {places}{writer.pointers}{writer.values}{seed}) {{
    int64_t count = 0;{counted}
    for (int64_t i = 0; i < n; i++) {{
        {indent.join(writer.element())}
    }}
    return count;
}}
static double squares(int64_t n, const {writer.types[g]} *a{g}) {{
    double total = 0;
    #pragma omp simd reduction(+:total)
    for (int64_t i = 0; i < n; i++) {{ const double x = {writer.read(g).replace("[j]", "[i]")}; total += x * x; }}
    return total;
}}
void rule(const int64_t *job) {{
    const int64_t *table = (const int64_t *)job[{TABLE}], *blocks = (const int64_t *)job[{BLOCKS}];
    const int64_t begin = job[{BEGIN}], end = job[{END}], what = job[{WHAT}];
    int64_t count = 0;
    if (what & {UNIFORMS}) uniforms(job);
    for (int64_t r = 0; r < job[{ROWS}]; r++) {{
        const int64_t *row = table + r * {words}, *block = blocks + 3 * row[2];
        if (what & {SQUARES}) {{
            double *parts = (double *)job[{OUT}] + row[3];
            for (int64_t at = 0; at < row[1]; at += {PART}) {{
                if (row[0] + at < begin || row[0] + at >= end) continue;
                const int64_t n = row[1] - at < {PART} ? row[1] - at : {PART};
                parts[at / {PART}] = row[{HEADER + g}] ? squares(n, (const {writer.types[g]} *)row[{HEADER + g}] + at) : 0;
            }}
        }}
        if (!(what & {RULE}) || !row[{HEADER + g}]) continue;
        const double *values = (const double *)job[{VALUES}] + row[2] * {writer.count};
        int64_t lo = row[0] > begin ? row[0] : begin, hi = row[0] + row[1] < end ? row[0] + row[1] : end, at = lo - row[0];
        (void)values; (void)block;
        if (lo < hi) {{
            {seek}
            count += body(hi - lo, {given}{writer.addresses(HEADER)}{writer.given}{seeded});
        }}
    }}
    if (what & {RULE}) *(int64_t *)job[{OUT}] = count;
    if (what & {TOTAL}) {{
        double *parts = (double *)job[{OUT}], total = 0;
        for (int64_t k = 0; k < end; k++) total += parts[k];
        parts[end] = total;
    }}
}}
"""


def _number(value: float) -> str:
    if value != value or value in (float("inf"), float("-inf")):
        return '__builtin_nan("")' if value != value else f"({'-' if value < 0 else ''}__builtin_inf())"
    return value.hex()


def numbers_of(program: Program) -> tuple[str, ...]:
    """The uniform inputs that are a group's, in the order of a cohort's table of numbers."""
    return tuple(name for name in program.uniforms if name != "step")


def supported(program: Program, layout: Layout) -> bool:
    stochastic = layout.rounding.mode == "stochastic"
    return (
        all(t in _C for t in (layout.compute, *layout.storage))
        and all(node.op in _EMIT for node in program.body)
        and not (stochastic and layout.gaps is not None)
    )


@cache
def rule(program: Program, layout: Layout) -> Any:
    """The compiled rule, or None where this backend cannot serve."""
    if not supported(program, layout):
        return None
    made = library(source(program, layout))
    return None if made is None else function(made, "rule", 1)


class Tables:
    """The numbers and values of a cohort's blocks, in memory that compiled code reads."""

    def __init__(self, cohort: Cohort, values: int) -> None:
        self.numbers = np.ascontiguousarray(cohort.numbers)
        cohort.numbers = self.numbers  # what is written there is read here
        rows = [[block.group, block.address, block.seed] for block in cohort.blocks]
        self._blocks = np.array(rows, dtype=np.int64).reshape(-1, 3)
        self.values = np.zeros((len(rows), max(1, values)))

    def job(self, table: np.ndarray, words: int = 10) -> np.ndarray:
        """A job over a table, but for what is to be done."""
        job = np.zeros(words, dtype=np.int64)
        job[: VALUES + 1] = [
            table.ctypes.data, len(table), self._blocks.ctypes.data, len(self._blocks), self.numbers.ctypes.data,
            self.values.ctypes.data,
        ]  # fmt: skip
        return job


def address_columns(cohort: Cohort) -> list[list[int]]:
    """The addresses in a table's rows, one list for each word: of the gradients zeros, for they come with each step."""
    first, *others = [[t.data_ptr() for t in column] for column in cohort.columns]
    columns = [first, [0] * len(first), *others]
    if cohort.places is not None:
        columns += [[own.gaps.data_ptr() for own in cohort.places], [own.bases.data_ptr() for own in cohort.places]]
    return columns


class Compiled:
    """A compiled rule over the tensors of a cohort."""

    def __init__(self, cohort: Cohort, run: Any) -> None:
        self._function = run
        sizes = np.array(cohort.sizes, dtype=np.int64)
        parts = -(-sizes // PART)
        firsts = [np.concatenate([[0], np.cumsum(of)]) for of in (sizes, parts)]
        words = [firsts[0][:-1], sizes, cohort.of_block, firsts[1][:-1], cohort.positions, *address_columns(cohort)]
        self._table = np.ascontiguousarray(np.array(words, dtype=np.int64).T)
        self._total, self._parts = int(firsts[0][-1]), np.zeros(int(firsts[1][-1]) + 1)
        self._tables = Tables(cohort, len(cohort.program.split().host))
        self._job = self._tables.job(self._table)
        self._counted = np.zeros((1, 8), dtype=np.int64)  # each thread's on a cache line of its own
        self._whole = [0, self._total, self._counted.ctypes.data, UNIFORMS | RULE]
        self._job[BEGIN:] = self._whole
        self._address = self._job.ctypes.data
        # The same for the norm: all squares, and the sum of the parts, whose number stands where elements end.
        self._norm_job, self._total_job = self._job.copy(), self._job.copy()
        self._norm_job[BEGIN:] = [0, self._total, self._parts.ctypes.data, SQUARES]
        self._total_job[[ROWS, BEGIN]] = 0
        self._total_job[END:] = [len(self._parts) - 1, self._parts.ctypes.data, TOTAL]
        self._norm_address, self._total_address = self._norm_job.ctypes.data, self._total_job.ctypes.data
        self.counting = cohort.program.count is not None

    def slots(self) -> list[int]:
        """Where each gradient's address goes."""
        start, step = self._table.ctypes.data, self._table.strides[0]
        return [start + r * step + 8 * (HEADER + 1) for r in range(len(self._table))]

    @property
    def counts(self) -> torch.Tensor | None:
        """How many elements the rule's condition held for at the last step, where it counts."""
        return torch.from_numpy(self._counted[:, 0].copy()) if self.counting else None

    def run(self) -> None:
        """Apply the rule where there is a gradient."""
        threads = 1 if self._total < SPLIT else torch.get_num_threads()
        if threads == 1:
            self._function(self._address)
            return
        if len(self._counted) != threads:
            self._counted = np.zeros((threads, 8), dtype=np.int64)
        self._each(UNIFORMS, [0, 0], self._counted)
        self._each(RULE, [self._total * k // threads for k in range(threads + 1)], self._counted)

    def squares(self) -> float:
        """The sum of the squares of all gradients: first of parts, then of those, in an order that threads do not change."""
        threads = 1 if self._total < SPLIT else torch.get_num_threads()
        if threads == 1:
            self._function(self._norm_address)
        else:
            self._each(SQUARES, [self._total * k // threads for k in range(threads + 1)], self._parts[None])
        self._function(self._total_address)
        return float(self._parts[-1])

    def _each(self, what: int, edges: list[int], out: np.ndarray) -> None:
        """``what`` over the elements between each two edges; with as many rows of ``out`` as threads, each has its own."""
        jobs = {}
        for k, (begin, end) in enumerate(pairwise(edges)):
            job = self._job.copy()
            job[BEGIN:] = [begin, end, out.ctypes.data + out.strides[0] * (k % len(out)), what]
            jobs[begin, end] = job
        parallel(lambda begin, end: self._function(jobs[begin, end].ctypes.data), edges)


def make(cohort: Cohort) -> Compiled | None:
    """A compiled rule for a cohort, or None where this backend cannot serve."""
    run = rule(cohort.program, cohort.layout)
    return None if run is None else Compiled(cohort, run)
