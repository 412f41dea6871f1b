"""AdamP and SGDP on the CPU: the same passes as in ``kernel.py``, as C that the machine's own compiler makes."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
import torch

from polyak.core.cc import SPLIT, function, library, parallel
from polyak.optim._engine import compiled
from polyak.optim._engine.compiled import BEGIN, BLOCKS, END, ROWS, TABLE, VALUES, Layout, Tables, Writer
from polyak.optim._engine.plan import Cohort
from polyak.optim._engine.trace import Program
from polyak.optim.adamp.rules import CHANNEL, LAYER

CHUNK = 4096  # elements a tile where there are no rows
# A table's row: first tile, tiles, elements, elements a tile, rows (0: never projected), number of the tensor, block; then the
# addresses.
HEADER = 7
# What is done, in this order for every tensor; several threads do one after the other for all tensors.
UNIFORMS, STATS, DECIDE, LAYER_DOT, LAYER_SUM, RULE = (1 << k for k in range(6))
EVERY = 63
# Words of a job beside the engine's.
_STATS, _MODES, _WHAT, _FORCED = 8, 9, 10, 11


def source(program: Program, layout: Layout) -> str:
    """The C of a projected rule: ``rule(job)`` over a range of tiles."""
    writer = Writer(program, layout, extra=("delta", "eps"))
    direction = program.marks["direction"]
    types = writer.types
    p, g = program.inputs.index("p"), program.inputs.index("g")
    weight = (
        writer.read(p) if layout.rounding.mode != "kahan" else f"({writer.read(p)} + {writer.read(len(types) - 1)})"
    )
    head = f"int64_t n, {writer.pointers}{writer.values}"
    seed = ", uint64_t seed" if writer.seeded else ""
    # A tensor's tiles follow one another: random numbers belong to an element's place in it.
    seeded = (
        f", {compiled.SEED.replace('row[4]', 'row[5]')} + (uint64_t)at * 0x9E3779B97F4A7C15u" if writer.seeded else ""
    )
    inner = "\n        "
    dot = inner.join(
        [*writer.compute((direction,)), f"uw += (double){writer.text(direction)} * (double){weight};",
         f"ww += (double){weight} * (double){weight};"]
    )  # fmt: skip
    for node in program.nodes:
        if node.op == "input" and node.name in ("projected", "along"):
            writer.names[node.index] = node.name
    words, addresses, given = HEADER + len(types), writer.addresses(HEADER), writer.given
    return f"""{writer.head}static void sums({head}, double *out) {{
    double gw = 0, gg = 0, ww = 0;
    #pragma omp simd reduction(+:gw,gg,ww)
    for (int64_t i = 0; i < n; i++) {{
        double w = {weight}, g = {writer.read(g)};
        gw += g * w; gg += g * g; ww += w * w;
    }}
    out[0] = gw; out[1] = gg; out[2] = ww;
}}
static void dots({head}, double *out) {{
    double uw = 0, ww = 0;
    #pragma omp simd reduction(+:uw,ww)
    for (int64_t i = 0; i < n; i++) {{
        {dot}
    }}
    out[0] = uw; out[1] = ww;
}}
static void step({head}, T projected, T along{seed}) {{
    for (int64_t i = 0; i < n; i++) {{
        {inner.join(writer.element())}
    }}
}}
static int orthogonal(const double *s, double delta, int64_t n, double eps) {{
    const double norms = sqrt(s[1]) * sqrt(s[2]);
    return fabs(s[0]) / (norms > eps ? norms : eps) < delta / sqrt((double)n);  /* a NaN is not */
}}
void rule(const int64_t *job) {{
    const int64_t *table = (const int64_t *)job[{TABLE}], *blocks = (const int64_t *)job[{BLOCKS}];
    const int64_t tensors = job[{ROWS}], begin = job[{BEGIN}], end = job[{END}], what = job[{_WHAT}], forced = job[{_FORCED}];
    double *stats = (double *)job[{_STATS}];
    int64_t *modes = (int64_t *)job[{_MODES}];
    if (what & {UNIFORMS}) uniforms(job);
    if (!tensors) return;
    const int64_t *last = table + (tensors - 1) * {words};
    double *layers = stats + 3 * (last[0] + last[1]);
    for (int64_t r = 0; r < tensors; r++) {{
        const int64_t *row = table + r * {words}, *block = blocks + 3 * row[6];
        const int64_t first = row[0], tiles = row[1], size = row[2], length = row[3], rows = row[4];
        const double *values = (const double *)job[{VALUES}] + row[6] * {writer.count};
        const double delta = values[{writer.count - 2}], eps = values[{writer.count - 1}];
        double *own = stats + 3 * first, *layer = layers + 3 * r;
        const int64_t lo = first > begin ? first : begin, hi = first + tiles < end ? first + tiles : end;
        const int64_t whole = first >= begin && first < end;  /* one thread decides for a tensor */
        (void)block;
        if (!row[{HEADER + g}]) continue;
        const int64_t tested = rows && forced != {CHANNEL}, alone = (what & {EVERY}) == {EVERY};
        if (alone && tested) {{
            /* One thread: rows one by one until one fails, and what is left as one. */
            int64_t k = 0, by_channel = !forced;
            double all[3] = {{0, 0, 0}}, s[3];
            for (; k < rows && by_channel; k++) {{
                const int64_t at = k * length, n = length;
                sums(n, {addresses}{given}, s);
                by_channel = orthogonal(s, delta, length, eps);
                for (int i = 0; i < 3; i++) all[i] += s[i];
            }}
            if (k < rows) {{
                const int64_t at = k * length, n = size - at;
                sums(n, {addresses}{given}, s);
                for (int i = 0; i < 3; i++) all[i] += s[i];
            }}
            modes[r] = forced ? forced : by_channel ? {CHANNEL} : orthogonal(all, delta, size, eps) ? {LAYER} : 0;
            if (modes[r] == {LAYER}) {{
                const int64_t at = 0, n = size;
                const double norm = sqrt(all[2]) + eps;
                dots(n, {addresses}{given}, s);
                layer[0] = s[0] / norm / norm;
            }}
        }} else if (alone) {{
            modes[r] = forced;
        }}
        if (!alone && what & {STATS} && tested) for (int64_t tile = lo; tile < hi; tile++) {{
            const int64_t at = (tile - first) * length, n = at + length < size ? length : size - at;
            sums(n, {addresses}{given}, stats + 3 * tile);
        }}
        if (!alone && what & {DECIDE} && whole) {{
            modes[r] = forced;
            if (tested) {{
                int64_t by_channel = 1;
                double all[3] = {{0, 0, 0}};
                for (int64_t k = 0; k < rows; k++) {{
                    by_channel &= orthogonal(own + 3 * k, delta, length, eps);
                    for (int i = 0; i < 3; i++) all[i] += own[3 * k + i];
                }}
                if (!forced) modes[r] = by_channel ? {CHANNEL} : orthogonal(all, delta, size, eps) ? {LAYER} : 0;
                layer[0] = sqrt(all[2]);
            }}
        }}
        const int64_t mode = rows ? modes[r] : 0;
        if (!alone && what & {LAYER_DOT} && mode == {LAYER}) for (int64_t tile = lo; tile < hi; tile++) {{
            const int64_t at = (tile - first) * length, n = at + length < size ? length : size - at;
            dots(n, {addresses}{given}, stats + 3 * tile);
        }}
        if (!alone && what & {LAYER_SUM} && mode == {LAYER} && whole) {{
            double uw = 0;
            for (int64_t k = 0; k < rows; k++) uw += own[3 * k];
            layer[0] = uw / (layer[0] + eps) / (layer[0] + eps);
        }}
        if (what & {RULE} && mode == {CHANNEL}) for (int64_t tile = lo; tile < hi; tile++) {{
            const int64_t at = (tile - first) * length, n = at + length < size ? length : size - at;
            double found[2];
            dots(n, {addresses}{given}, found);
            const double norm = sqrt(found[1]) + eps;
            step(n, {addresses}{given}, 1, (T)(found[0] / norm / norm){seeded});
        }} else if (what & {RULE} && lo < hi) {{
            const int64_t at = (lo - first) * length, n = ((hi - first) * length < size ? (hi - first) * length : size) - at;
            step(n, {addresses}{given}, (T)(mode > 0), (T)(mode ? layer[0] : 0){seeded});
        }}
    }}
}}
"""


class Compiled:
    """A compiled projected rule over the tensors of a cohort.

    Args:
        matrices: for each tensor the number of its rows, or 0 where it is never projected.
        forced: CHANNEL or LAYER where the view is given, 0 where the test decides.
    """

    counts = None

    def __init__(self, cohort: Cohort, run: Any, matrices: Sequence[int], forced: int) -> None:
        self._function = run
        self._forced = forced
        sizes, rows = np.array(cohort.sizes, dtype=np.int64), np.array(matrices, dtype=np.int64)
        self._matrices = rows > 0
        tiles = np.where(rows > 0, rows, -(-sizes // CHUNK))
        lengths = np.where(rows > 0, sizes // np.maximum(rows, 1), CHUNK)
        first = np.concatenate([[0], np.cumsum(tiles)])
        words = [
            first[:-1], tiles, sizes, lengths, rows, cohort.positions, cohort.of_block, *compiled.address_columns(cohort)
        ]  # fmt: skip
        self._table = np.ascontiguousarray(np.array(words, dtype=np.int64).T)
        self._tiles, self._total = int(first[-1]), int(sizes.sum())
        # Threads begin at a tile: as near as can be to equal numbers of elements.
        self._ends = np.cumsum(np.repeat(lengths, tiles))
        self._stats = np.zeros(3 * (self._tiles + len(sizes)))
        self._modes = np.zeros(len(sizes), dtype=np.int64)
        self._tables = Tables(cohort, len(cohort.program.split().host) + 2)
        self._job = self._tables.job(self._table, 12)
        self._job[BEGIN:] = [0, self._tiles, self._stats.ctypes.data, self._modes.ctypes.data, EVERY, forced]
        self._address = self._job.ctypes.data

    def slots(self) -> list[int]:
        """Where each gradient's address goes."""
        start, step = self._table.ctypes.data, self._table.strides[0]
        return [start + r * step + 8 * (HEADER + 1) for r in range(len(self._table))]

    def modes(self) -> list[int | None]:
        """How each tensor was projected at its last step; None where it never is."""
        both = zip(self._modes.tolist(), self._matrices.tolist(), strict=True)
        return [mode if projected else None for mode, projected in both]

    def run(self) -> None:
        """Apply the rule where there is a gradient."""
        threads = 1 if self._total < SPLIT else torch.get_num_threads()
        if threads == 1:
            self._function(self._address)
            return
        shares = np.searchsorted(self._ends, self._ends[-1] * np.arange(1, threads) / threads)
        edges = [0, *map(int, shares), self._tiles]
        self._phase(UNIFORMS, [0, 0])
        if self._matrices.any():
            self._phase(STATS, edges)
            self._phase(DECIDE, [0, self._tiles])
            if (self._modes[self._matrices] == LAYER).any():
                self._phase(LAYER_DOT, edges)
                self._phase(LAYER_SUM, [0, self._tiles])
        self._phase(RULE, edges)

    def _phase(self, what: int, edges: Sequence[int]) -> None:
        def run(begin: int, end: int) -> None:
            job = self._job.copy()
            job[[BEGIN, END, _WHAT]] = begin, end, what
            self._function(job.ctypes.data)

        parallel(run, edges)


@cache
def _rule(program: Program, layout: Layout) -> Any:
    if not compiled.supported(program, layout):
        return None
    made = library(source(program, layout))
    return None if made is None else function(made, "rule", 1)


def make(cohort: Cohort, matrices: Sequence[int], forced: int) -> Compiled | None:
    """A compiled rule for a cohort, or None where this backend cannot serve."""
    run = _rule(cohort.program, cohort.layout)
    return None if run is None else Compiled(cohort, run, matrices, forced)
