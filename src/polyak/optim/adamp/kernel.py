"""AdamP and SGDP on the GPU: all tensors in at most six Triton launches, and no decision on the host.

``stats`` reads the parameters and gradients and leaves three sums for each row. ``expect`` does so for tensors whose rows were
projected at the last step: it also reads the states, and leaves how far the step points along each row. ``decide`` makes each
tensor's decision. ``dot`` makes up for what was not expected, ``layer_sum`` for tensors that are projected as a whole: as a rule
neither has anything to do. ``rule`` then does the step, in the engine's way. Beside the step's own 7 words an element (5 with
SGDP) that is 2 for a tensor that stays as it is, and 4 (3 with SGDP) for one that is projected.
"""

from __future__ import annotations

import itertools
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

GROUP = 4  # row tiles a program: most find nothing to do, and fewer of them find it sooner
# Rows of up to so many elements (longer ones in a loop) -> rows a program: small programs, of which many fit on the device.
CLASSES = {64: BLOCK // 64, 256: BLOCK // 256, BLOCK: 1}
EVEN = 16  # rows of a multiple of this many elements are loaded in 16-byte words
ROWS = 16384  # rows at a time in `decide` and `layer_sum`
LONGEST = 2**30  # elements of a row: places within one are 32-bit numbers
# A table's row: first tile, elements, elements a row, rows a row tile, first row tile, first row; then the addresses.
HEADER = 6

_SHARED = """@triton.jit
def decide(table, stats, modes, todos, rows, delta, eps, WORDS: tl.constexpr, FORCED: tl.constexpr, T: tl.constexpr):
    t = tl.program_id(0)
    row = table + t.to(tl.int64) * WORDS
    size = tl.load(row + 1)
    length = tl.load(row + 2)
    first = tl.load(row + 5)
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
    norms = tl.sqrt(tl.sum(gg, axis=0)) * tl.sqrt(tl.sum(ww, axis=0))
    whole = tl.abs(tl.sum(gw, axis=0)) / tl.maximum(norms, tl.full((), eps, T))
    by_layer = whole < delta / tl.sqrt(size.to(tl.float64))
    mode = tl.where(tl.max(failed, axis=0) == 0, CHANNEL, tl.where(by_layer, LAYER, 0))
    mode = tl.where(FORCED > 0, FORCED, mode)
    expected = tl.load(modes + t)
    tl.store(todos + t, (mode == LAYER) | ((mode == CHANNEL) & (expected != CHANNEL)))
    tl.store(modes + t, mode)


@triton.jit
def layer_sum(table, stats, modes, rows, eps, WORDS: tl.constexpr, T: tl.constexpr):
    t = tl.program_id(0)
    if tl.load(modes + t) == LAYER:
        row = table + t.to(tl.int64) * WORDS
        first = tl.load(row + 5)
        count = tl.load(row + 1) // tl.load(row + 2)
        uw = tl.zeros((ROWS,), T)
        ww = tl.zeros((ROWS,), T)
        for begin in range(0, count, ROWS):
            r = begin + tl.arange(0, ROWS)
            ww += tl.load(stats + 2 * rows + first + r, mask=r < count, other=0.0)
            uw += tl.load(stats + 3 * rows + first + r, mask=r < count, other=0.0)
        norm = tl.sqrt(tl.sum(ww, axis=0)) + tl.full((), eps, T)
        along = tl.sum(uw, axis=0) / norm / norm
        for begin in range(0, count, ROWS):
            r = begin + tl.arange(0, ROWS)
            tl.store(stats + 3 * rows + first + r, tl.zeros((ROWS,), T) + along, mask=r < count)


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

    def row_tile(self) -> list[str]:
        """What a program on row tile ``pid`` of ``tensor`` needs to know."""
        return [
            f"row = table + tensor * {self.words}",
            "size = tl.load(row + 1)",
            "length = tl.load(row + 2)",
            "top = (pid - tl.load(row + 4)) * tl.load(row + 3)",
            "first_row = tl.load(row + 5)",
            *self.writer.addresses(HEADER, self.aligned),
            *self.writer.uniforms(),
        ]

    def over_rows(self, computed: Sequence[str], products: Mapping[str, str], after: Sequence[str]) -> list[str]:
        """Sums over each of a tile's rows: of ``products`` of what is ``computed`` on a block; then ``after`` with them."""

        def block(width: int, rows: int) -> list[str]:
            return [
                f"numbers = top + tl.arange(0, {rows})",
                "real = numbers * length < size",
                f"column = tl.arange(0, {width})[None, :]",
                "offsets = numbers[:, None] * length + column",
                "inside = real[:, None] & (column < length)",
                *computed,
                *(f"{name} = tl.sum(tl.where(inside, {product}, 0.0), axis=1)" for name, product in products.items()),
                *after,
            ]

        long = [
            "numbers = top + tl.arange(0, 1)",
            "real = numbers * length < size",
            *(f"{name}s = tl.zeros((1, {BLOCK}), {self.type})" for name in products),
            f"for begin in range(0, length, {BLOCK}):",
            f"    column = begin + tl.arange(0, {BLOCK})[None, :]",
            "    offsets = numbers[:, None] * length + column",
            "    inside = real[:, None] & (column < length)",
            *indented(computed),
            *(f"    {name}s += tl.where(inside, {product}, 0.0)" for name, product in products.items()),
            *(f"{name} = tl.sum({name}s, axis=1)" for name in products),
            *after,
        ]

        # No branch is an `else`: Triton wants a name to have one shape in both.
        def classes() -> list[str]:
            found, above = [], 0
            for width, rows in CLASSES.items():
                found += [f"if length > {above} and length <= {width}:", *indented(block(width, rows))]
                above = width
            return [*found, f"if length > {above}:", *indented(long)]

        # As arithmetic, which widens loads: tl.multiple_of() would be about the value itself, in the other branch as well.
        even = [f"length = length // {EVEN} * {EVEN}", *classes()]
        return [f"if length % {EVEN} == 0:", *indented(even), f"if length % {EVEN} != 0:", *indented(classes())]

    def sums(self, name: str) -> str:
        """``stats``, or ``expect``."""
        writer, head = self.writer, self.row_tile()
        writer.mask = "inside"
        wanted = [self.inputs["p"], self.inputs["g"], *([self.direction] if name == "expect" else [])]
        computed = writer.values(wanted, masked=True)
        w, g = (writer.names[self.inputs[of].index] for of in ("p", "g"))
        products = {"gw": f"{g} * {w}", "gg": f"{g} * {g}", "ww": f"{w} * {w}"}
        after = []
        if name == "expect":
            products["uw"] = f"{writer.text(self.direction, self.type)} * {w}"
            after = [f"norm = tl.sqrt(ww) + tl.full((), eps, {self.type})", "uw = uw / norm / norm"]
        after += [f"tl.store(stats + {k} * rows + first_row + numbers, {n}, mask=real)" for k, n in enumerate(products)]
        condition = "modes", f"{'==' if name == 'expect' else '!='} CHANNEL"
        return self.over_tiles(name, condition, [*head, *self.over_rows(computed, products, after)])

    def over_tiles(self, name: str, condition: tuple[str, str], lines: Sequence[str]) -> str:
        """A kernel of ``lines`` for each row tile of the tensors whose entry in an array compares so."""
        flags, compares = condition
        group = f"tl.program_id(0).to(tl.int64) * {GROUP}"
        body = [
            f"pids = {group} + tl.arange(0, {GROUP})",
            "owners = tl.load(tiles + pids, mask=pids < row_tiles, other=0)",
            f"any_of = (tl.load({flags} + owners) {compares}) & (pids < row_tiles)",
            "if tl.max(any_of.to(tl.int32), axis=0) > 0:",
            f"    for pid in range({group}, tl.minimum({group} + {GROUP}, row_tiles)):",
            "        tensor = tl.load(tiles + pid).to(tl.int64)",
            f"        if tl.load({flags} + tensor) {compares}:",
            *indented(indented(indented(lines))),
        ]
        given = ["table", "tiles", "stats", "modes", "todos", "rows", "row_tiles", "eps", *self.writer.arguments()]
        return function(name, given, body)

    def dot(self) -> str:
        writer, head = self.writer, self.row_tile()
        writer.mask = "inside"
        computed = writer.values((self.direction, self.inputs["p"]), masked=True)
        w, u = writer.names[self.inputs["p"].index], writer.text(self.direction, self.type)
        after = [
            "ww = tl.load(stats + 2 * rows + first_row + numbers, mask=real, other=0.0)",
            f"norm = tl.sqrt(ww) + tl.full((), eps, {self.type})",
            "uw = tl.where(tl.load(modes + tensor) == LAYER, uw, uw / norm / norm)",
            "tl.store(stats + 3 * rows + first_row + numbers, uw, mask=real)",
        ]
        return self.over_tiles("dot", ("todos", "> 0"), [*head, *self.over_rows(computed, {"uw": f"{u} * {w}"}, after)])

    def rule(self) -> str:
        writer = self.writer
        writer.mask = "offsets < size"
        for name in ("projected", "along"):
            writer.names[self.inputs[name].index] = name
        body = [
            "pid = tl.program_id(0).to(tl.int64)",
            "tensor = tl.load(tiles + pid).to(tl.int64)",
            f"row = table + tensor * {self.words}",
            f"start = (pid - tl.load(row)) * {BLOCK}",
            "size = tl.load(row + 1)",
            *writer.addresses(HEADER, self.aligned),
            *writer.uniforms(),
            f"inner = tl.arange(0, {BLOCK})",
            "offsets = start + inner",
            f"drawn = pid * {BLOCK} + inner",
            "mode = tl.full((), 0, tl.int32)",
            "if tensor < matrices:",
            "    mode = tl.load(modes + tensor)",
            f"projected = (mode > 0).to({self.type})",
            f"along = tl.zeros(({BLOCK},), {self.type})",
            "if mode > 0:",
            "    length = tl.load(row + 2)",
            "    top = start // length",
            "    number = top + ((start - top * length).to(tl.int32) + inner) // length.to(tl.int32)",
            "    along = tl.load(stats + 3 * rows + tl.load(row + 5) + number, mask=offsets < size, other=0.0)",
            f"if start + {BLOCK} <= size:",
            *indented(writer.block(masked=False)),
            "elif start < size:",
            *indented(writer.block(masked=True)),
        ]
        return function("rule", ["table", "tiles", "stats", "modes", "rows", "matrices", *writer.arguments()], body)

    def text(self) -> str:
        constants = {"CHANNEL": CHANNEL, "LAYER": LAYER, "ROWS": ROWS}
        shared = "".join(f"{name}: tl.constexpr = tl.constexpr({value})\n" for name, value in constants.items())
        return f"{shared}\n\n{_SHARED}" + "\n\n".join(
            [self.sums("stats"), self.sums("expect"), self.dot(), self.rule()]
        )


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
        # Matrices come first, so that tensors below a number are those.
        self._order = sorted(range(len(columns[0])), key=lambda i: matrices[i] == 0)
        sizes = [columns[0][i].numel() for i in self._order]
        counts = [matrices[i] for i in self._order]
        lengths = [n // rows if rows else 1 for n, rows in zip(sizes, counts, strict=True)]
        pers = [next((rows for width, rows in CLASSES.items() if n <= width), CLASSES[BLOCK]) for n in lengths]
        tiles = [-(-n // BLOCK) for n in sizes]
        row_tiles = [-(-rows // per) for rows, per in zip(counts, pers, strict=True)]
        first, first_tile, first_row = ([0, *itertools.accumulate(of)] for of in (tiles, row_tiles, counts))
        self._grid, self._row_grid, self._rows = first[-1], first_tile[-1], first_row[-1]
        self._matrices = sum(rows > 0 for rows in counts)
        self._tiles, self._row_tiles = tile_owners(tiles, device), tile_owners(row_tiles, device)
        addresses = [[column[i].data_ptr() for i in self._order] for column in columns]
        words = [first[:-1], sizes, lengths, pers, first_tile[:-1], first_row[:-1]]
        rows = [*words, addresses[0], [0] * len(sizes), *addresses[1:]]
        self._table = Table(torch.tensor(rows, dtype=torch.int64).t().contiguous(), HEADER + 1, device)
        self._words = len(rows)
        self._stats = torch.zeros(
            4 * self._rows, dtype=signature.compute, device=device
        )  # <g,w>, |g|^2, |w|^2, step along w
        self._modes = torch.full((max(1, self._matrices),), forced, dtype=torch.int32, device=device)
        self._todos = torch.zeros_like(self._modes)

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
        stats, modes, rows, count = self._stats, self._modes, self._rows, self._matrices
        delta, eps, row_grid = float(uniforms["delta"]), float(uniforms["eps"]), self._row_grid
        launch, key = self._launch, self._uniforms.key(given)
        words, kind, todos = self._words, _triton_type(self.signature.compute), self._todos
        over_rows = (table, self._row_tiles, stats, modes, todos, rows, row_grid, eps, *given)
        groups, wide = -(-row_grid // GROUP), 4 * WARPS
        if rows and self._forced != CHANNEL:
            launch(kernels["stats"], groups, over_rows, WARPS, key)
        if rows:
            launch(kernels["expect"], groups, over_rows, WARPS, key)
        if rows and self._forced != CHANNEL:
            decided = (table, stats, modes, todos, rows, delta, eps, words, self._forced, kind)
            launch(kernels["decide"], count, decided, wide)
            launch(kernels["dot"], groups, over_rows, WARPS, key)
            launch(kernels["layer_sum"], count, (table, stats, modes, rows, eps, words, kind), wide)
        launch(kernels["rule"], self._grid, (table, self._tiles, stats, modes, rows, count, *given), WARPS, key)


@cache
def _triton_type(dtype: torch.dtype) -> Any:
    from triton import language

    return {torch.float32: language.float32, torch.float64: language.float64}[dtype]
