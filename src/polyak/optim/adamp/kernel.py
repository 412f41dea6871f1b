"""AdamP and SGDP on the GPU: all tensors in at most five Triton launches, and no decision on the host.

``stats`` reads the parameters and gradients (2 words an element) and leaves three sums for each row. ``decide`` makes each
tensor's decision of them. ``layer_dot`` and ``layer_sum`` work only on tensors that are projected as a whole. ``rule`` then does
the step. Where rows are projected it first needs the step's part along each row: short rows stay in registers for that, long
ones are read twice, the second time from the cache. In all 9 words an element, where the step itself needs 7.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import torch

from polyak.optim._engine import kernel
from polyak.optim._engine.kernel import (
    BLOCK,
    WARPS,
    Launcher,
    Signature,
    Table,
    Uniforms,
    Writer,
    function,
    tile_owners,
)
from polyak.optim._engine.trace import Program
from polyak.optim.adamp.rules import CHANNEL, LAYER

CHUNK = 4 * BLOCK  # elements a program, in whole rows where they are shorter
GROUP = 16  # tiles a program of `layer_dot`
WIDTHS = (64, 256, BLOCK)  # rows up to these lengths are handled side by side, BLOCK elements at a time
EVEN = 16  # rows of a multiple of this many elements are loaded in 16-byte words
ROWS = 4096  # rows or tiles at a time in `decide` and `layer_sum`
# A table's row: first tile, elements, elements a row, rows a tile, first row, elements in the tensors before; then addresses.
HEADER = 6

_SHARED = """@triton.jit
def decide(table, stats, modes, layers, rows, delta, eps, WORDS: tl.constexpr, FORCED: tl.constexpr, T: tl.constexpr):
    t = tl.program_id(0)
    row = table + t.to(tl.int64) * WORDS
    size = tl.load(row + 1)
    length = tl.load(row + 2)
    first = tl.load(row + 4)
    count = size // length
    bound = delta / tl.sqrt(length.to(tl.float64))
    failed = tl.zeros((ROWS,), tl.int32)
    gw = tl.zeros((ROWS,), T)
    gg = tl.zeros((ROWS,), T)
    ww = tl.zeros((ROWS,), T)
    for begin in range(0, count, ROWS):
        r = begin + tl.arange(0, ROWS)
        at = stats + first + r
        a = tl.load(at, mask=r < count, other=0.0)
        b = tl.load(at + rows, mask=r < count, other=0.0)
        c = tl.load(at + 2 * rows, mask=r < count, other=0.0)
        cosine = tl.abs(a) / tl.maximum(tl.sqrt(b) * tl.sqrt(c), tl.full((), eps, T))
        # A NaN is not below the bound.
        failed = tl.maximum(failed, ((r < count) & ((cosine < bound) == 0)).to(tl.int32))
        gw += a
        gg += b
        ww += c
    norm = tl.sqrt(tl.sum(ww, axis=0))
    whole = tl.abs(tl.sum(gw, axis=0)) / tl.maximum(tl.sqrt(tl.sum(gg, axis=0)) * norm, tl.full((), eps, T))
    by_layer = whole < delta / tl.sqrt(size.to(tl.float64))
    mode = tl.where(tl.max(failed, axis=0) == 0, CHANNEL, tl.where(by_layer, LAYER, 0))
    tl.store(modes + t, tl.where(FORCED > 0, FORCED, mode))
    tl.store(layers + t, norm)


@triton.jit
def layer_sum(table, stats, modes, layers, eps, WORDS: tl.constexpr, T: tl.constexpr):
    t = tl.program_id(0)
    if tl.load(modes + t) == LAYER:
        row = table + t.to(tl.int64) * WORDS
        first = tl.load(row)
        whole = tl.load(row + 2) * tl.load(row + 3)
        count = (tl.load(row + 1) + whole - 1) // whole
        total = tl.zeros((ROWS,), T)
        for begin in range(0, count, ROWS):
            r = begin + tl.arange(0, ROWS)
            total += tl.load(stats + first + r, mask=r < count, other=0.0)
        norm = tl.load(layers + t) + tl.full((), eps, T)
        tl.store(layers + t, tl.sum(total, axis=0) / norm / norm)


"""


class _Source:
    """The text of the three kernels that know the rule."""

    def __init__(self, program: Program, signature: Signature, aligned: bool) -> None:
        self.writer = Writer(program, signature)
        self.aligned = aligned
        self.type = self.writer.compute
        self.inputs = {n.name: n for n in program.nodes if n.op == "input"}
        self.words = HEADER + len(self.writer.columns)
        self.direction = program.marks["direction"]
        self.before = (self.direction, self.inputs["p"])  # what has to be known of a row first

    def tile(self, pid: str) -> list[str]:
        """The tile's tensor, and which of its elements are in it."""
        return [
            f"tensor = tl.load(tiles + {pid}).to(tl.int64)",
            f"row = table + tensor * {self.words}",
            "length = tl.load(row + 2)",
            f"start = ({pid} - tl.load(row)) * length * tl.load(row + 3)",
            "size = tl.minimum(tl.load(row + 1), start + length * tl.load(row + 3))",
            *self.writer.addresses(HEADER, self.aligned),
            *self.writer.uniforms(),
        ]

    def branches(self, lines: Sequence[str]) -> list[str]:
        """The lines for even rows, whose loads the compiler may widen, and again for others."""
        even = [f"length = tl.multiple_of(length, {EVEN})", f"start = tl.multiple_of(start, {EVEN})", *lines]
        return [f"if length % {EVEN} == 0:", *indented(even), "else:", *indented(lines)]

    def zeros(self, names: Sequence[str], shape: str) -> list[str]:
        return [f"{name} = tl.zeros({shape}, {self.type})" for name in names]

    def side_by_side(self, width: int, lines: Sequence[str]) -> list[str]:
        """``lines`` on blocks of whole rows, or of ``width`` columns of them in a loop where rows are longer."""
        return [
            f"for first in range(start, size, {BLOCK // width} * length):",
            f"    rows_in = first + tl.arange(0, {BLOCK // width})[:, None].to(tl.int64) * length",
            *indented(lines),
        ]

    def columns(self, width: int, begin: str = "0") -> list[str]:
        return [
            f"column = {begin} + tl.arange(0, {width})[None, :]",
            "offsets = rows_in + column",
            "inside = (rows_in < size) & (column < length)",
        ]

    def products(self) -> dict[str, str]:
        """The step's direction times the weight, and the weight's squares, of a block that has been loaded."""
        w, u = self.writer.names[self.inputs["p"].index], self.writer.text(self.direction, self.type)
        return {n: f"tl.where({self.writer.mask}, {x} * {w}, 0.0)" for n, x in (("uw", u), ("ww", w))}

    def stats(self) -> str:
        self.writer.mask = "inside"
        sums = [
            f"w = tl.where(inside, {self.writer.load('p', True)}, 0.0)",
            f"g = tl.where(inside, {self.writer.load('g', True)}, 0.0)",
            "gw += g * w",
            "gg += g * g",
            "ww += w * w",
        ]
        names = ("gw", "gg", "ww")

        def rows(width: int) -> list[str]:
            lines = [
                *self.zeros(names, f"({BLOCK // width}, {width})"),
                f"for begin in range(0, length, {width}):",
                *indented([*self.columns(width, "begin"), *sums]),
                f"number = first_row + first // length + tl.arange(0, {BLOCK // width})",
                f"real = first + tl.arange(0, {BLOCK // width}) * length < size",
                *(
                    f"tl.store(stats + {k} * rows + number, tl.sum({n}, axis=1), mask=real)"
                    for k, n in enumerate(names)
                ),
            ]
            return self.side_by_side(width, lines)

        lines = [
            f"if length <= {WIDTHS[0]}:", *indented(rows(WIDTHS[0])), "else:", *indented(rows(WIDTHS[1])),
        ]  # fmt: skip
        body = [
            "pid = tl.program_id(0).to(tl.int64)",
            *self.tile("pid"),
            "first_row = tl.load(row + 4)",
            *self.branches(lines),
        ]
        return function("stats", ["table", "tiles", "stats", "rows", *self.writer.arguments()], body)

    def layer_dot(self) -> str:
        self.writer.mask = "offsets < size"
        loop = [
            *self.zeros(("uw",), f"({BLOCK},)"),
            f"for begin in range(start, size, {BLOCK}):",
            f"    offsets = begin + tl.arange(0, {BLOCK})",
            *indented(self.writer.values(self.before, masked=True)),
            f"    uw += {self.products()['uw']}",
            "tl.store(stats + pid, tl.sum(uw, axis=0))",
        ]
        body = [
            "group = tl.program_id(0).to(tl.int64)",
            f"for pid in range(group * {GROUP}, tl.minimum(group * {GROUP} + {GROUP}, row_tiles)):",
            "    if tl.load(modes + tl.load(tiles + pid)) == LAYER:",
            *indented(indented([*self.tile("pid"), *loop])),
        ]
        return function("layer_dot", ["table", "tiles", "stats", "modes", "row_tiles", *self.writer.arguments()], body)

    def rule(self) -> str:
        writer, eps = self.writer, f"tl.full((), eps, {self.type})"
        known = writer.program.needed(self.before)
        # These two are the same for all of a row.
        for name in ("projected", "along"):
            writer.names[self.inputs[name].index] = name
        coefficient = [f"norm = tl.sqrt(ww) + {eps}", "along = uw / norm / norm"]

        def short(width: int) -> list[str]:
            writer.mask = "inside"
            computed = writer.values(self.before, masked=True)
            lines = [
                *self.columns(width),
                *computed,
                *(f"{name} = tl.sum({product}, axis=1)[:, None]" for name, product in self.products().items()),
                *coefficient,
                "drawn = (before + offsets).to(tl.int32)",
                *writer.block(True, known),
            ]
            return self.side_by_side(width, lines)

        def flat(begin: str, end: str) -> list[str]:
            writer.mask = f"offsets < {end}"
            return [
                f"for at in range({begin}, {end}, {BLOCK}):",
                f"    offsets = at + tl.arange(0, {BLOCK})",
                "    drawn = (before + offsets).to(tl.int32)",
                f"    if at + {BLOCK} <= {end}:",
                *indented(indented(writer.block(masked=False))),
                "    else:",
                *indented(indented(writer.block(masked=True))),
            ]

        def long() -> list[str]:
            writer.mask = "offsets < stop"
            over = [
                *self.zeros(("uws", "wws"), f"({BLOCK},)"),
                f"for at in range(first, stop, {BLOCK}):",
                f"    offsets = at + tl.arange(0, {BLOCK})",
                *indented(writer.values(self.before, masked=True)),
                *(f"    {name}s += {product}" for name, product in self.products().items()),
                "uw = tl.sum(uws, axis=0)",
                "ww = tl.sum(wws, axis=0)",
                *coefficient,
            ]
            return [
                "for first in range(start, size, length):",
                "    stop = tl.minimum(first + length, size)",
                *indented([*over, *flat("first", "stop")]),
            ]

        lines = [
            "if mode != CHANNEL:",
            f"    along = tl.full((), 0.0, {self.type})",
            "    if mode == LAYER:",
            "        along = tl.load(layers + tensor)",
            *indented(flat("start", "size")),
        ]
        for width in WIDTHS:
            lines += [f"elif length <= {width}:", *indented(short(width))]
        lines += ["else:", *indented(long())]
        body = [
            "pid = tl.program_id(0).to(tl.int64)",
            *self.tile("pid"),
            "mode = tl.full((), 0, tl.int32)",
            "if pid < row_tiles:",
            "    mode = tl.load(modes + tensor)",
            f"projected = (mode > 0).to({self.type})",
            "before = tl.load(row + 5)",
            *self.branches(lines),
        ]
        arguments = ["table", "tiles", "modes", "layers", "row_tiles", "eps", *writer.arguments()]
        return function("rule", arguments, body)

    def text(self) -> str:
        constants = {"CHANNEL": CHANNEL, "LAYER": LAYER, "ROWS": ROWS}
        shared = "".join(f"{name}: tl.constexpr = tl.constexpr({value})\n" for name, value in constants.items())
        return f"{shared}\n\n{_SHARED}" + "\n\n".join([self.stats(), self.layer_dot(), self.rule()])


def indented(lines: Sequence[str]) -> list[str]:
    return [f"    {line}" for line in lines]


@cache
def _kernels(program: Program, signature: Signature, aligned: bool) -> dict[str, Any]:
    return kernel.build(_Source(program, signature, aligned).text())


class Launch:
    """A projected rule over a fixed list of tensors: the tables, and the launches.

    Args:
        columns: as in the engine's ``Launch``; the tensors' rows are contiguous in memory.
        matrices: for each tensor the number of its rows, or 0 where it is never projected.
        forced: CHANNEL or LAYER where the view is given, 0 where the test decides.
    """

    def __init__(
        self,
        program: Program,
        signature: Signature,
        columns: Sequence[Sequence[torch.Tensor]],
        matrices: Sequence[int],
        forced: int,
    ) -> None:
        self.signature = signature
        self._program = program
        self._forced = forced
        self._device = device = columns[0][0].device
        self._uniforms = Uniforms(program, signature, device)
        self._launch = Launcher()
        # Matrices come first, so that tiles below a number are those of rows.
        self._order = sorted(range(len(columns[0])), key=lambda i: matrices[i] == 0)
        sizes = [columns[0][i].numel() for i in self._order]
        counts = [matrices[i] for i in self._order]
        lengths = [n // rows if rows else CHUNK for n, rows in zip(sizes, counts, strict=True)]
        pers = [max(1, CHUNK // length) for length in lengths]
        tiles = [-(-n // (length * per)) for n, length, per in zip(sizes, lengths, pers, strict=True)]
        first, before, first_row = [0], [0], [0]
        for n, count, rows in zip(sizes, tiles, counts, strict=True):
            first.append(first[-1] + count)
            before.append(before[-1] + n)
            first_row.append(first_row[-1] + rows)
        self._matrices = sum(rows > 0 for rows in counts)
        self._row_tiles, self._grid, self._rows = first[self._matrices], first[-1], first_row[-1]
        self._tiles = tile_owners(tiles, device)
        addresses = [[column[i].data_ptr() for i in self._order] for column in columns]
        words = [first[:-1], sizes, lengths, pers, first_row[:-1], before[:-1]]
        rows = [*words, addresses[0], [0] * len(sizes), *addresses[1:]]
        self._table = Table(torch.tensor(rows, dtype=torch.int64).t().contiguous(), HEADER + 1, device)
        self._words = len(rows)
        self._stats = torch.zeros(max(3 * self._rows, self._row_tiles), dtype=signature.compute, device=device)
        self._layers = torch.zeros(self._matrices, dtype=signature.compute, device=device)
        self._modes = torch.full((self._matrices,), forced, dtype=torch.int32, device=device)

    def modes(self) -> list[int | None]:
        """How each tensor was projected at the last step; None where it never is. Waits for the device."""
        found: list[int | None] = [None] * len(self._order)
        for i, mode in zip(self._order, self._modes.tolist(), strict=False):
            found[i] = mode
        return found

    def run(
        self,
        grads: Sequence[torch.Tensor],
        uniforms: Mapping[str, Any],
        scaled: Sequence[torch.Tensor | None] = (),
        seed: int = 0,
    ) -> None:
        """Launch; arguments as in the engine's ``Launch``."""
        if not self._grid:
            return
        if self._device.type == "cuda" and self._device.index != torch.cuda.current_device():
            with torch.cuda.device(self._device):
                self.run(grads, uniforms, scaled, seed)
            return
        pointers = list(map(torch.Tensor.data_ptr, grads))
        table = self._table.at([pointers[i] for i in self._order])
        kernels = _kernels(self._program, self.signature, self._table.aligned)
        given = self._uniforms.arguments(uniforms, scaled, seed)
        tiles, stats, modes, layers, rows = self._tiles, self._stats, self._modes, self._layers, self._rows
        delta, eps = float(uniforms["delta"]), float(uniforms["eps"])
        launch, key, row_tiles = self._launch, self._uniforms.key(given), self._row_tiles
        if rows and self._forced != CHANNEL:
            words, kind, count = self._words, _triton_type(self.signature.compute), self._matrices
            launch(kernels["stats"], row_tiles, (table, tiles, stats, rows, *given), WARPS, key)
            decided = (table, stats, modes, layers, rows, delta, eps, words, self._forced, kind)
            launch(kernels["decide"], count, decided, 2 * WARPS)
            launch(
                kernels["layer_dot"],
                -(-row_tiles // GROUP),
                (table, tiles, stats, modes, row_tiles, *given),
                WARPS,
                key,
            )
            launch(kernels["layer_sum"], count, (table, stats, modes, layers, eps, words, kind), 2 * WARPS)
        launch(kernels["rule"], self._grid, (table, tiles, modes, layers, row_tiles, eps, *given), WARPS, key)


@cache
def _triton_type(dtype: torch.dtype) -> Any:
    from triton import language

    return {torch.float32: language.float32, torch.float64: language.float64}[dtype]
