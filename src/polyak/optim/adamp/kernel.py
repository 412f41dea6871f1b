"""AdamP and SGDP on the GPU: all tensors in at most five Triton launches, and no decision on the host.

``sums`` reads the parameters and gradients and leaves the sums over rows; of tensors whose rows were projected at the last step
it also reads the states, and leaves how far the step points along each row. ``decide`` makes each tensor's decision. ``dot``
makes up for what was not expected, ``layer_sum`` for tensors that are projected as a whole: as a rule neither has anything to
do. ``rule`` then does the step, in the engine's way. Beside the step's own 7 words an element (5 with SGDP) that is 2 for a
tensor that stays as it is, and 4 (3 with SGDP) for one that is projected.

A program of ``sums`` and of ``dot`` has some successive rows of one tensor. Small programs were fastest on an H200: with 256
elements and one warp the sums of GPT-2 took 247 us, with 1024 and four warps 341.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch

from polyak.core.launch import Launcher, build, function, is_elsewhere
from polyak.optim._engine import compiled, kernel
from polyak.optim._engine.kernel import BLOCK, WARPS, Signature, Writer, triton_type
from polyak.optim._engine.launch import Table, Values, counter_addresses, tile_owners
from polyak.optim._engine.plan import Cohort
from polyak.optim._engine.trace import Program
from polyak.optim.adamp.rules import CHANNEL, LAYER

ROW_WARPS = 1  # of a program that sums over rows: its sums need no barrier
CHUNK = 256  # elements that such a program has in registers
SHARE = 8192  # elements that it goes through, rounded down to whole rows
CLASSES = (64, CHUNK)  # rows of up to so many elements are put into blocks of this width; longer ones are cut
EVEN = 16  # rows of a multiple of this many elements are loaded in 16-byte words
PARTS = 1024  # programs' sums at a time in `decide`, and rows in `layer_sum`
LONGEST = 2**30  # elements of a row: places within one are 32-bit numbers
# A table's row: first tile, elements, elements a row, rows a program, first program, first row, block, address of the counter;
# then the addresses.
HEADER = 8
EXTRA = ("delta", "eps")  # numbers that the kernels need beside the rule's

_SHARED = """@triton.jit
def decide(table, parts, modes, todos, programs, blocks, delta, eps, MANY: tl.constexpr, WORDS: tl.constexpr,
           FORCED: tl.constexpr, T: tl.constexpr):
    t = tl.program_id(0)
    row = table + t.to(tl.int64) * WORDS
    if MANY > 0:
        delta = tl.load(blocks + tl.load(row + 6) * MANY + AT)
        eps = tl.load(blocks + tl.load(row + 6) * MANY + AT + 1)
    size = tl.load(row + 1)
    per = tl.load(row + 3)
    first = tl.load(row + 4)
    count = (size // tl.load(row + 2) + per - 1) // per
    failed = tl.zeros((PARTS,), T)
    gw = tl.zeros((PARTS,), T)
    gg = tl.zeros((PARTS,), T)
    ww = tl.zeros((PARTS,), T)
    for begin in range(0, count, PARTS):
        k = begin + tl.arange(0, PARTS)
        at = parts + first + k
        failed += tl.load(at, mask=k < count, other=0.0)
        gw += tl.load(at + programs, mask=k < count, other=0.0)
        gg += tl.load(at + 2 * programs, mask=k < count, other=0.0)
        ww += tl.load(at + 3 * programs, mask=k < count, other=0.0)
    norms = tl.sqrt(tl.sum(gg, axis=0)) * tl.sqrt(tl.sum(ww, axis=0))
    whole = tl.abs(tl.sum(gw, axis=0)) / tl.maximum(norms, (tl.zeros((), tl.float64) + eps).to(T))
    by_layer = whole < delta / tl.sqrt(size.to(tl.float64))
    mode = tl.where(tl.sum(failed, axis=0) == 0, CHANNEL, tl.where(by_layer, LAYER, 0))
    mode = tl.where(FORCED > 0, FORCED, mode)
    expected = tl.load(modes + t)
    tl.store(todos + t, (mode == LAYER) | ((mode == CHANNEL) & (expected != CHANNEL)))
    tl.store(modes + t, mode)


@triton.jit
def layer_sum(table, stats, modes, rows, blocks, eps, MANY: tl.constexpr, WORDS: tl.constexpr, T: tl.constexpr):
    t = tl.program_id(0)
    row = table + t.to(tl.int64) * WORDS
    if MANY > 0:
        eps = tl.load(blocks + tl.load(row + 6) * MANY + AT + 1)
    if tl.load(modes + t) == LAYER:
        at = stats + tl.load(row + 5)
        count = tl.load(row + 1) // tl.load(row + 2)
        uw = tl.zeros((PARTS,), T)
        ww = tl.zeros((PARTS,), T)
        for begin in range(0, count, PARTS):
            r = begin + tl.arange(0, PARTS)
            ww += tl.load(at + r, mask=r < count, other=0.0)
            uw += tl.load(at + rows + r, mask=r < count, other=0.0)
        norm = tl.sqrt(tl.sum(ww, axis=0)) + (tl.zeros((), tl.float64) + eps).to(T)
        along = tl.sum(uw, axis=0) / norm / norm
        for begin in range(0, count, PARTS):
            r = begin + tl.arange(0, PARTS)
            tl.store(at + rows + r, tl.zeros((PARTS,), T) + along, mask=r < count)


"""


class _Work(NamedTuple):
    """What is done with each block of rows."""

    computed: Sequence[str]  # what the products are made of
    products: Mapping[str, str]  # name -> what is summed over each row
    after: Sequence[str]  # with the sums of a block's rows
    totals: Sequence[str]  # sums over all of the program's rows, which `after` adds to
    end: Sequence[str]  # with the totals


class _Source:
    """The text of the three kernels that know the rule."""

    def __init__(self, program: Program, signature: Signature, aligned: bool) -> None:
        self.writer = Writer(program, signature, HEADER - 2, EXTRA)
        self.aligned = aligned
        self.type = self.writer.compute
        self.inputs = {n.name: n for n in program.nodes if n.op == "input"}
        self.words = HEADER + len(self.writer.columns)
        self.direction = program.marks["direction"]

    def program(self) -> list[str]:
        """What a program on some rows of ``tensor`` needs to know; ``spot`` is where its first row's sums go."""
        return [
            f"row = table + tensor * {self.words}",
            "size = tl.load(row + 1)",
            "length = tl.load(row + 2).to(tl.int32)",
            "per = tl.load(row + 3)",
            "top = (pid - tl.load(row + 4)) * per",
            "spot = stats + tl.load(row + 5) + top",
            *self.writer.addresses(HEADER, self.aligned),
            *(f"base{i} = at{i}" for i in range(len(self.writer.columns))),
            *self.writer.uniforms(),
            "count = tl.minimum(size // length - top, per).to(tl.int32)",
        ]

    def over_rows(self, work: _Work) -> list[str]:
        """Sums over each of a program's rows."""
        # Places within a program are 32-bit numbers. In every branch anew: where branches meet, what is known of alignment is lost.
        moved = [f"at{i} = base{i} + top * length" for i in range(len(self.writer.columns))]
        first = [f"{name} = tl.zeros((ROWS,), {self.type})" for name in work.totals]

        def block(width: int) -> list[str]:
            rows = CHUNK // width
            return [
                *(line.replace("ROWS", str(rows)) for line in first),
                f"for begin in range(0, count, {rows}):",
                f"    numbers = begin + tl.arange(0, {rows})",
                "    real = numbers < count",
                f"    column = tl.arange(0, {width})[None, :]",
                "    offsets = numbers[:, None] * length + column",
                "    inside = real[:, None] & (column < length)",
                *indented(work.computed),
                *(f"    {name} = tl.sum(tl.where(inside, {product}, 0.0), axis=1)" for name, product in work.products.items()),
                *indented(work.after),
                *work.end,
            ]  # fmt: skip

        long = [
            *(line.replace("ROWS", "1") for line in first),
            "for number in range(0, count):",
            *(f"    {name}s = tl.zeros((1, {CHUNK}), {self.type})" for name in work.products),
            f"    for begin in range(0, length, {CHUNK}):",
            f"        column = begin + tl.arange(0, {CHUNK})[None, :]",
            "        offsets = number * length + column",
            "        inside = column < length",
            *indented(indented(work.computed)),
            *(f"        {name}s += tl.where(inside, {product}, 0.0)" for name, product in work.products.items()),
            *(f"    {name} = tl.sum({name}s, axis=1)" for name in work.products),
            "    numbers = number + tl.arange(0, 1)",
            "    real = numbers < count",
            *indented(work.after),
            *work.end,
        ]

        # No branch is an `else`: Triton wants a name to have one shape in both.
        def classes() -> list[str]:
            found, above = [], 0
            for width in CLASSES:
                found += [f"if length > {above} and length <= {width}:", *indented(block(width))]
                above = width
            return [*moved, *found, f"if length > {above}:", *indented(long)]

        # As arithmetic, which widens loads: tl.multiple_of() would be about the value itself, in the other branch as well.
        even = [f"length = length // {EVEN} * {EVEN}", *classes()]
        return [f"if length % {EVEN} == 0:", *indented(even), f"if length % {EVEN} != 0:", *indented(classes())]

    def work(self, *, along: bool) -> _Work:
        """What ``sums`` does; with how far the step points along each row, or without."""
        p, g = self.inputs["p"], self.inputs["g"]
        computed = self.writer.values([p, g, *([self.direction] if along else [])], masked=True)
        w, grad = self.writer.names[p.index], self.writer.names[g.index]
        products = {"gw": f"{grad} * {w}", "gg": f"{grad} * {grad}", "ww": f"{w} * {w}"}
        after = [
            "tl.store(spot + numbers, ww, mask=real)",
            f"cosine = tl.abs(gw) / tl.maximum(tl.sqrt(gg) * tl.sqrt(ww), eps.to({self.type}))",
            f"all_failed += (real & ((cosine < bound) == 0)).to({self.type})",  # a NaN is not below the bound
            *(f"all_{name} += {name}" for name in products),
        ]
        if along:
            products["uw"] = f"{self.writer.text(self.direction, self.type)} * {w}"
            after += [
                f"norm = tl.sqrt(ww) + eps.to({self.type})",
                "tl.store(spot + rows + numbers, uw / norm / norm, mask=real)",
            ]
        totals = ["all_failed", "all_gw", "all_gg", "all_ww"]
        end = [f"tl.store(parts + {k} * programs + pid, tl.sum({of}, axis=0))" for k, of in enumerate(totals)]
        # A skipped step (GradScaler's) has no rows here, and leaves all as it was.
        return _Work(computed, products, after, totals, ["if count > 0:", *indented(end)])

    def sums(self) -> str:
        writer, body = self.writer, []
        body += [
            "pid = tl.program_id(0).to(tl.int64)",
            "tensor = tl.load(owners + pid).to(tl.int64)",
            *self.program(),
            "bound = delta / tl.sqrt(length.to(tl.float64))",
            "expected = tl.load(modes + tensor) == CHANNEL",
        ]
        writer.mask = "inside"
        for along, condition in ((True, "expected"), (False, "expected == 0")):
            body += [f"if {condition}:", *indented(self.over_rows(self.work(along=along)))]
        given = ["table", "owners", "stats", "parts", "modes", "rows", "programs", *writer.arguments()]
        return function("sums", given, body)

    def dot(self) -> str:
        writer = self.writer
        head = self.program()
        writer.mask = "inside"
        computed = writer.values((self.direction, self.inputs["p"]), masked=True)
        w, u = writer.names[self.inputs["p"].index], writer.text(self.direction, self.type)
        after = [
            "ww = tl.load(spot + numbers, mask=real, other=0.0)",
            f"norm = tl.sqrt(ww) + eps.to({self.type})",
            "uw = tl.where(by_layer, uw, uw / norm / norm)",
            "tl.store(spot + rows + numbers, uw, mask=real)",
        ]
        body = [
            "pid = tl.program_id(0).to(tl.int64)",
            "tensor = tl.load(owners + pid).to(tl.int64)",
            "if tl.load(todos + tensor) > 0:",
            "    by_layer = tl.load(modes + tensor) == LAYER",
            *indented([*head, *self.over_rows(_Work(computed, {"uw": f"{u} * {w}"}, after, [], []))]),
        ]
        given = ["table", "owners", "stats", "modes", "todos", "rows", *writer.arguments()]
        return function("dot", given, body)

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
            "    along = tl.load(stats + rows + tl.load(row + 5) + number, mask=offsets < size, other=0.0)",
            f"if start + {BLOCK} <= size:",
            *indented(writer.block(masked=False)),
            "elif start < size:",
            *indented(writer.block(masked=True)),
        ]
        return function("rule", ["table", "tiles", "stats", "modes", "rows", "matrices", *writer.arguments()], body)

    def text(self) -> str:
        at = len(self.writer.split.host)  # of the extra numbers among a block's
        constants = {"CHANNEL": CHANNEL, "LAYER": LAYER, "PARTS": PARTS, "AT": at}
        shared = "".join(f"{name}: tl.constexpr = tl.constexpr({value})\n" for name, value in constants.items())
        return f"{shared}\n\n{_SHARED}" + "\n\n".join([self.sums(), self.dot(), self.rule()])


def indented(lines: Sequence[str]) -> list[str]:
    return [f"    {line}" for line in lines]


@cache
def _kernels(program: Program, signature: Signature, aligned: bool) -> dict[str, Any]:
    return build(_Source(program, signature, aligned).text())


class Launch:
    """A projected rule over the tensors of a cohort: the tables, and the launches.

    Args:
        cohort: the tensors' rows are contiguous in memory.
        matrices: for each tensor the number of its rows, or 0 where it is never projected.
        forced: CHANNEL or LAYER where the view is given, 0 where the test decides.
    """

    counts = None

    def __init__(self, cohort: Cohort, matrices: Sequence[int], forced: int) -> None:
        self._cohort, self._signature = cohort, cohort.layout
        self._forced = forced
        device = cohort.device
        self._values = Values(cohort, EXTRA)
        self._launch = Launcher()
        # Matrices come first, so that tensors below a number are those.
        self._order = order = sorted(range(len(cohort.owners)), key=lambda i: matrices[i] == 0)
        sizes = np.array(cohort.sizes, dtype=np.int64)[order]
        counts = np.array(matrices, dtype=np.int64)[order]
        lengths = np.where(counts > 0, sizes // np.maximum(counts, 1), 1)
        pers = np.maximum(1, SHARE // np.maximum(lengths, 1))
        tiles, shares = -(-sizes // BLOCK), -(-counts // pers)
        first, first_program, first_row = (np.concatenate([[0], np.cumsum(of)]) for of in (tiles, shares, counts))
        self._grid, self._programs, self._rows = int(first[-1]), int(first_program[-1]), int(first_row[-1])
        self._matrices = int((counts > 0).sum())
        self._tiles, self._owners = tile_owners(tiles.tolist(), device), tile_owners(shares.tolist(), device)
        self._place = self._tiles.get_device()
        of_each = (cohort.of_block, counter_addresses(cohort), *compiled.address_columns(cohort))
        words = [first[:-1], sizes, lengths, pers, first_program[:-1], first_row[:-1]]
        words += [np.array(of, dtype=np.int64)[order] for of in of_each]
        self._words = len(words)
        self._table = Table(np.ascontiguousarray(np.array(words, dtype=np.int64).T), HEADER + 1, device)
        # Of each row the squared norm of the weight, and how far the step points along it.
        compute = self._signature.compute
        self._stats = torch.zeros(max(1, 2 * self._rows), dtype=compute, device=device)
        self._parts = torch.zeros(max(1, 4 * self._programs), dtype=compute, device=device)
        self._modes = torch.full((max(1, self._matrices),), forced, dtype=torch.int32, device=device)
        self._todos = torch.zeros_like(self._modes)
        count = len(cohort.program.split(self._signature.on_device).host) + len(EXTRA)
        self._many = count + (self._signature.rounding.mode == "stochastic") if self._signature.many else 0
        # In a launch's arguments, where the values of this kind begin; and, if the host has all of them, those two.
        self._at = len(self._signature.arguments) + 2 * self._signature.scaled
        wide = kernel.is_wide(cohort.program, self._signature)
        self._extra = [
            [self._at + k, *([self._at + count + k] if wide else [])] for k in range(count - len(EXTRA), count)
        ]

    def slots(self) -> list[int]:
        """Where each gradient's address goes."""
        slots = [0] * len(self._order)
        for i, slot in zip(self._order, self._table.slots, strict=True):
            slots[i] = slot
        return slots

    def modes(self) -> list[int | None]:
        """How each tensor was projected at the last step; None where it never is. Waits for the device."""
        found: list[int | None] = [None] * len(self._order)
        for i, mode in zip(self._order[: self._matrices], self._modes.tolist(), strict=False):
            found[i] = mode
        return found

    def run(self, on_device: Mapping[str, torch.Tensor], scaled: Sequence[torch.Tensor | None] = ()) -> None:
        """Launch; arguments as in the engine's ``Launch``."""
        if not self._grid:
            return
        if is_elsewhere(self._place):
            with torch.cuda.device(self._place):
                self.run(on_device, scaled)
            return
        table, aligned = self._table.now(), self._table.aligned
        given = self._values.arguments(on_device, scaled)
        many = self._many
        # A pointer is needed in any case: the statistics' is one.
        blocks, delta, eps = (given[self._at], 0.0, 0.0) if many else (
            self._stats, *(sum(given[k] for k in words) for words in self._extra)
        )  # fmt: skip
        stats, parts, modes, todos = self._stats, self._parts, self._modes, self._todos
        rows, programs, count, words = self._rows, self._programs, self._matrices, self._words
        key, kind = self._values.key(given), triton_type(self._signature.compute)

        def launch(name: str, grid: int, warps: int, *arguments: Any) -> None:
            def kernel() -> Any:
                return _kernels(self._cohort.program, self._signature, aligned)[name]

            self._launch(kernel, grid, arguments, warps, (name, aligned, key))

        if rows:
            launch("sums", programs, ROW_WARPS, table, self._owners, stats, parts, modes, rows, programs, *given)
        if rows and self._forced != CHANNEL:
            decided = (table, parts, modes, todos, programs, blocks, delta, eps, many, words, self._forced, kind)
            launch("decide", count, WARPS, *decided)
            launch("dot", programs, ROW_WARPS, table, self._owners, stats, modes, todos, rows, *given)
            launch("layer_sum", count, WARPS, table, stats, modes, rows, blocks, eps, many, words, kind)
        launch("rule", self._grid, WARPS, table, self._tiles, stats, modes, rows, count, *given)
