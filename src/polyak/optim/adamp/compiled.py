"""AdamP and SGDP on the CPU: the same passes as in ``kernel.py``, as C that the machine's own compiler makes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from polyak.optim._engine import compiled
from polyak.optim._engine.blocked import Layout
from polyak.optim._engine.compiled import SPLIT, Writer, parallel
from polyak.optim._engine.trace import Program
from polyak.optim.adamp.rules import CHANNEL, LAYER

CHUNK = 4096  # elements a tile where there are no rows
# A table's row: first tile, tiles, elements, elements a tile, rows (0: never projected); then the addresses.
HEADER = 5
STATS, DECIDE, LAYER_DOT, LAYER_SUM, RULE = range(5)


def source(program: Program, layout: Layout) -> str:
    """The C of a projected rule: ``rule(phase, table, tensors, begin, end, values, stats, modes)`` over a range of tiles."""
    writer = Writer(program, layout)
    direction = program.marks["direction"]
    types = writer.types
    p, g = program.inputs.index("p"), program.inputs.index("g")

    def read(i: int) -> str:
        return f"load16(a{i}[i])" if types[i] == "uint16_t" else f"a{i}[i]"

    head = f"int64_t n, {writer.pointers}{writer.values}"
    addresses = ", ".join(f"({t} *)row[{HEADER + i}] + at" for i, t in enumerate(types))
    inner = "\n        "
    dot = inner.join(
        [*writer.compute((direction,)), f"uw += (double){writer.text(direction)} * (double){read(p)};",
         f"ww += (double){read(p)} * (double){read(p)};"]
    )  # fmt: skip
    for node in program.nodes:
        if node.op == "input" and node.name in ("projected", "along"):
            writer.names[node.index] = node.name
    host = len(program.split().host)
    return f"""{writer.head}#include <math.h>
static void sums({head}, double *out) {{
    double gw = 0, gg = 0, ww = 0;
    #pragma omp simd reduction(+:gw,gg,ww)
    for (int64_t i = 0; i < n; i++) {{
        double w = {read(p)}, g = {read(g)};
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
static void step({head}, T projected, T along) {{
    for (int64_t i = 0; i < n; i++) {{
        {inner.join(writer.element())}
    }}
}}
void rule(int64_t phase, const int64_t *table, int64_t tensors, int64_t begin, int64_t end, const double *values,
          double *stats, int64_t *modes) {{
    const double delta = values[{host}], eps = values[{host + 1}];
    for (int64_t r = 0; r < tensors; r++) {{
        const int64_t *row = table + r * {HEADER + len(types)};
        const int64_t first = row[0], tiles = row[1], size = row[2], length = row[3], rows = row[4];
        double *own = stats + 3 * first, *layer = stats + 3 * table[(tensors - 1) * {HEADER + len(types)}]
            + 3 * table[(tensors - 1) * {HEADER + len(types)} + 1] + 3 * r;
        if (phase == {DECIDE}) {{
            if (!rows) continue;
            int64_t by_channel = 1;
            double gw = 0, gg = 0, ww = 0;
            for (int64_t k = 0; k < rows; k++) {{
                const double *s = own + 3 * k, norms = sqrt(s[1]) * sqrt(s[2]);
                by_channel &= fabs(s[0]) / (norms > eps ? norms : eps) < delta / sqrt((double)length);
                gw += s[0]; gg += s[1]; ww += s[2];
            }}
            const double norms = sqrt(gg) * sqrt(ww);
            const int64_t by_layer = fabs(gw) / (norms > eps ? norms : eps) < delta / sqrt((double)size);
            if (modes[r] < 0) modes[r] = by_channel ? {CHANNEL} : by_layer ? {LAYER} : 0;
            layer[0] = sqrt(ww);
            continue;
        }}
        if (phase == {LAYER_SUM}) {{
            if (!rows || modes[r] != {LAYER}) continue;
            double uw = 0;
            for (int64_t k = 0; k < rows; k++) uw += own[3 * k];
            layer[0] = uw / (layer[0] + eps) / (layer[0] + eps);
            continue;
        }}
        const int64_t lo = first > begin ? first : begin, hi = first + tiles < end ? first + tiles : end;
        for (int64_t tile = lo; tile < hi; tile++) {{
            const int64_t at = (tile - first) * length, n = at + length < size ? length : size - at;
            double *s = stats + 3 * tile;
            if (phase == {STATS}) {{
                if (rows) sums(n, {addresses}{writer.given}, s);
            }} else if (phase == {LAYER_DOT}) {{
                if (rows && modes[r] == {LAYER}) dots(n, {addresses}{writer.given}, s);
            }} else {{
                const int64_t mode = rows ? modes[r] : 0;
                double along = mode == {LAYER} ? layer[0] : 0;
                if (mode == {CHANNEL}) {{
                    double found[2];
                    dots(n, {addresses}{writer.given}, found);
                    const double norm = sqrt(found[1]) + eps;
                    along = found[0] / norm / norm;
                }}
                step(n, {addresses}{writer.given}, (T)(mode > 0), (T)along);
            }}
        }}
    }}
}}
"""


class Compiled:
    """A compiled projected rule over a fixed list of tensors; arguments as in ``kernel.Launch``."""

    def __init__(
        self,
        program: Program,
        run: Any,
        columns: Sequence[Sequence[torch.Tensor]],
        matrices: Sequence[int],
        forced: int,
    ) -> None:
        self.evaluate = program.split().evaluate
        self._function = run
        self._forced = forced
        sizes = np.array([t.numel() for t in columns[0]])
        rows = np.array(matrices)
        self._matrices = rows > 0
        tiles = np.where(rows > 0, rows, -(-sizes // CHUNK))
        lengths = np.where(rows > 0, sizes // np.maximum(rows, 1), CHUNK)
        first = np.concatenate([[0], np.cumsum(tiles)])
        addresses = [[t.data_ptr() for t in column] for column in columns]
        table = [first[:-1], tiles, sizes, lengths, rows, addresses[0], [0] * len(sizes), *addresses[1:]]
        self._table = np.ascontiguousarray(np.array(table, dtype=np.int64).T)
        self._tiles, self._total = int(first[-1]), int(sizes.sum())
        # Threads begin at a tile: as near as can be to equal numbers of elements.
        self._ends = np.cumsum(np.repeat(lengths, tiles))
        self._stats = np.zeros(3 * (self._tiles + len(sizes)))
        self._modes = np.zeros(len(sizes), dtype=np.int64)

    def modes(self) -> list[int | None]:
        """How each tensor was projected at the last step; None where it never is."""
        return [int(m) if projected else None for m, projected in zip(self._modes, self._matrices, strict=True)]

    def run(self, grads: Sequence[torch.Tensor], uniforms: Mapping[str, float]) -> None:
        """Apply the rule; ``grads`` are laid out as the parameters."""
        self._table[:, HEADER + 1] = list(map(torch.Tensor.data_ptr, grads))
        given = np.array([*self.evaluate(uniforms), uniforms["delta"], uniforms["eps"]], dtype=np.float64)
        self._modes.fill(self._forced or -1)
        threads = 1 if self._total < SPLIT else torch.get_num_threads()
        shares = np.searchsorted(self._ends, self._ends[-1] * np.arange(1, threads) / threads) if threads > 1 else []
        edges = [0, *map(int, shares), self._tiles]

        def phase(number: int, edges: Sequence[int]) -> None:
            fixed = (given.ctypes.data, self._stats.ctypes.data, self._modes.ctypes.data)
            table = (self._table.ctypes.data, len(self._table))
            parallel(lambda begin, end: self._function(number, *table, begin, end, *fixed), edges)

        if self._matrices.any() and self._forced != CHANNEL:
            phase(STATS, edges)
            phase(DECIDE, [0, self._tiles])
            if (self._modes[self._matrices] == LAYER).any():
                phase(LAYER_DOT, edges)
                phase(LAYER_SUM, [0, self._tiles])
        phase(RULE, edges)


def make(
    program: Program, layout: Layout, columns: Sequence[Sequence[torch.Tensor]], matrices: Sequence[int], forced: int
) -> Compiled | None:
    """A compiled rule for these tensors, or None where this backend cannot serve."""
    if not compiled.supported(program, layout):
        return None
    run = compiled.library(source(program, layout), 8)
    return None if run is None else Compiled(program, run, columns, matrices, forced)
