"""Launching a rule's Triton kernel on all tensors of one kind: pointer tables in device memory, and the arguments.

The tables are uploaded again only when an address changes, with one asynchronous copy. Nothing is read back: a step never
waits for the device, and can be captured in a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from polyak.core.cc import function, library
from polyak.core.launch import Launcher, is_elsewhere
from polyak.optim._engine import compiled
from polyak.optim._engine.kernel import (
    BLOCK,
    HEADER,
    SPAN,
    WARPS,
    compile_kernel,
    is_wide,
    norm_kernels,
)
from polyak.optim._engine.trace import Program

if TYPE_CHECKING:
    from polyak.optim._engine.plan import Cohort


@cache
def _evaluation(program: Program, on_device: tuple[str, ...], extra: tuple[str, ...]) -> Any:
    """Compiled code for the values of many blocks, or None."""
    made = library(compiled.values_source(program, program.split(on_device).host, extra))
    return None if made is None else function(made, "fill", 1)


class Values:
    """What a launch is handed besides its tables, in the order of :meth:`Writer.arguments`.

    Args:
        extra: as of the writer.
    """

    def __init__(self, cohort: Cohort, extra: tuple[str, ...] = ()) -> None:
        self._cohort = cohort
        self._signature = signature = cohort.layout
        self._extra = extra
        split = cohort.program.split(signature.on_device)
        self._evaluate = split.evaluate
        self._names = compiled.numbers_of(cohort.program)
        self._wide = is_wide(cohort.program, signature)
        self._stochastic = signature.rounding.mode == "stochastic"
        self._one = torch.ones((), device=cohort.device) if signature.scaled else None
        self._count = len(split.host) + len(extra)
        self._known: Any = None
        self._given: list[Any] = []
        if signature.many:
            self._tables = compiled.Tables(cohort, self._count)
            self._job = self._tables.job(np.zeros(1, dtype=np.int64))
            self._captured: list[torch.Tensor] = []
            self._reserve = self._host_table()

    def _host_table(self) -> torch.Tensor:
        shape = (len(self._cohort.blocks), self._count + self._stochastic)
        return torch.empty(shape, dtype=torch.float64, pin_memory=self._cohort.device.type == "cuda")

    def arguments(self, on_device: Mapping[str, torch.Tensor], scaled: Sequence[torch.Tensor | None]) -> list[Any]:
        given: list[Any] = [on_device[name] for name in self._signature.arguments]
        if self._signature.scaled:
            # A scaler that has unscaled the gradients itself hands over no scale.
            scale, found_inf = scaled
            given += [self._one if scale is None else scale, found_inf]
        now = (self._cohort.version, *(block.step() for block in self._cohort.blocks))
        if now != self._known:  # a rule that does not count has the same values as long as nobody changes them
            self._known, self._given = now, self._many() if self._signature.many else self._single()
        return given + self._given

    def _of(self, block: Any) -> tuple[float, ...]:
        uniforms = dict(zip(self._names, self._cohort.numbers[block.group].tolist(), strict=True))
        step = block.step()
        uniforms["step"] = 0.0 if step is None else step
        return (*self._evaluate(uniforms), *(uniforms[name] for name in self._extra))

    def _single(self) -> list[Any]:
        (block,) = self._cohort.blocks
        values: Sequence[float] = self._of(block)
        if self._wide:
            # Two float32 hold 48 bits of a float64.
            with np.errstate(invalid="ignore", over="ignore"):
                high = np.asarray(values).astype(np.float32).astype(np.float64)
                values = (*high.tolist(), *np.nan_to_num(np.asarray(values) - high, nan=0.0).tolist())
        return [*values, block.drawn()] if self._stochastic else list(values)

    def _many(self) -> list[Any]:
        blocks, table = self._cohort.blocks, self._reserve
        fill = _evaluation(self._cohort.program, self._signature.on_device, self._extra) if len(blocks) > 4 else None
        if fill is not None:
            fill(self._job.ctypes.data)
            table[:, : self._count] = torch.from_numpy(self._tables.values)
        else:
            table[:, : self._count] = torch.tensor([self._of(block) for block in blocks], dtype=torch.float64)
        if self._stochastic:
            table[:, -1] = torch.tensor([block.drawn() for block in blocks], dtype=torch.float64)
        uploaded = table.to(self._cohort.device, non_blocking=True)
        # The copy reads the host's table later: the next step has another.
        if self._cohort.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            self._captured += [table, uploaded]  # read by the captured graph whenever it is replayed
            self._reserve = torch.empty(table.shape, dtype=table.dtype)  # no pinned one may be allocated here
        else:
            self._reserve = self._host_table()
        return [uploaded]

    def key(self, given: Sequence[Any]) -> Any:
        """What Triton specializes on in these values: see :class:`polyak.core.launch.Launcher`."""
        pointers = tuple(value.data_ptr() % 16 for value in given if isinstance(value, torch.Tensor))
        if self._stochastic and not self._signature.many:
            return (pointers, given[-1] == 1, given[-1] % 16 == 0)
        return pointers


class Table:
    """Words about every tensor of a launch in device memory, the gradients' addresses among them.

    Args:
        rows: int64, one row a tensor: other words, then addresses, of which the second, in column ``gradient``, is filled in
            with each step.
    """

    def __init__(self, rows: np.ndarray, gradient: int, device: torch.device) -> None:
        self._device = device
        self._cuda = device.type == "cuda"
        self._rows, self._column = rows, rows[:, gradient]
        self._shared = torch.from_numpy(rows)
        self._gradients: np.ndarray | None = None
        self._fixed_aligned = bool((np.delete(rows, gradient, axis=1)[:, gradient - 1 :] % 16 == 0).all())
        self._table = self._shared
        # A pinned table in reserve: none may be allocated while a graph is captured.
        self._reserve = self._shared.pin_memory() if self._cuda else self._shared
        self._captured: list[torch.Tensor] = []  # read by captured graphs whenever they are replayed
        self.aligned = False
        start, step = rows.ctypes.data, rows.strides[0]
        self.slots = [start + r * step + 8 * gradient for r in range(len(rows))]

    def now(self) -> torch.Tensor:
        """The table with this step's addresses; uploaded again only if they have changed, without waiting."""
        if self._gradients is None or not np.array_equal(self._column, self._gradients):
            self._gradients = self._column.copy()
            self.aligned = self._fixed_aligned and not (self._gradients % 16).any()
            if self._cuda and torch.cuda.is_current_stream_capturing():
                self._reserve.copy_(self._shared)
                self._table = self._reserve.to(self._device, non_blocking=True)
                self._captured += [self._reserve, self._table]
                self._reserve = torch.empty_like(self._shared)
            elif self._cuda:
                self._table = self._shared.pin_memory().to(self._device, non_blocking=True)
            else:
                self._table = self._shared.clone()
        return self._table


def tile_owners(tiles: Sequence[int], device: torch.device) -> torch.Tensor:
    """For every tile the number of its tensor, in device memory."""
    owners = torch.repeat_interleave(torch.arange(len(tiles), dtype=torch.int32), torch.tensor(tiles))
    return (owners.pin_memory() if device.type == "cuda" else owners).to(device, non_blocking=True)


def counter_addresses(cohort: Cohort) -> list[int]:
    """For each tensor the address of its counter where that is on the device, else 0."""
    loaded = "step" in cohort.layout.on_device
    return [counter.data_ptr() if loaded and counter is not None else 0 for counter in cohort.counters]


class Launch:
    """A rule over the tensors of a cohort: the tables, and the launch."""

    def __init__(self, cohort: Cohort) -> None:
        self._cohort = cohort
        self._device = cohort.device
        self._values = Values(cohort)
        tiles = [-(-n // BLOCK) for n in cohort.sizes]
        first = np.concatenate([[0], np.cumsum(tiles)]).astype(np.int64)
        self._grid = int(first[-1])
        self._launch = Launcher()
        self._tiles = tile_owners(tiles, self._device)
        self._place = self._tiles.get_device()
        words = [
            first[:-1],
            cohort.sizes,
            cohort.of_block,
            counter_addresses(cohort),
            *compiled.address_columns(cohort),
        ]
        self._table = Table(np.ascontiguousarray(np.array(words, dtype=np.int64).T), HEADER + 1, self._device)
        self._words = len(words)
        self._squares: Squares | None = None
        counted = cohort.program.count is not None
        self.counts = torch.zeros(max(1, self._grid), dtype=torch.int32, device=self._device) if counted else None

    def slots(self) -> list[int]:
        """Where each gradient's address goes."""
        return self._table.slots

    def run(self, on_device: Mapping[str, torch.Tensor], scaled: Sequence[torch.Tensor | None] = ()) -> None:
        """Launch.

        Args:
            on_device: the uniform inputs of ``signature.arguments``, as tensors of one element.
            scaled: (grad_scale, found_inf) where the signature has ``scaled``.
        """
        if not self._grid:
            return
        if is_elsewhere(self._place):
            with torch.cuda.device(self._place):
                self.run(on_device, scaled)
            return
        table = self._table.now()
        given = self._values.arguments(on_device, scaled)
        counts = () if self.counts is None else (self.counts,)
        key = (self._table.aligned, self._values.key(given))
        self._launch(self._kernel, self._grid, (table, self._tiles, *counts, *given), WARPS, key)

    def _kernel(self) -> Any:
        return compile_kernel(self._cohort.program, self._cohort.layout, self._table.aligned)

    def parts(self) -> int:
        """How many sums of squares this cohort adds to the norm."""
        if self._squares is None:
            self._squares = Squares(self._cohort, self._table, self._words)
        return self._squares.count

    def squares(self, parts: torch.Tensor) -> None:
        """Leave the sums of the squares of all gradients in ``parts``."""
        assert self._squares is not None
        self._squares.run(parts)


class Squares:
    """The sums of the squares of a cohort's gradients."""

    def __init__(self, cohort: Cohort, table: Table, words: int) -> None:
        tiles = [-(-n // SPAN) for n in cohort.sizes]
        first = np.concatenate([[0], np.cumsum(tiles)]).astype(np.int64)
        self.count = int(first[-1])
        self._table = table
        self._owners = tile_owners(tiles, cohort.device)
        self._firsts = torch.from_numpy(first[:-1].copy()).to(cohort.device)
        self._types = (cohort.layout.storage[1], cohort.layout.compute)
        self._words = words
        self._launch = Launcher()

    def run(self, parts: torch.Tensor) -> None:
        if self.count:
            arguments = (self._table.now(), self._owners, self._firsts, parts, self._words)
            self._launch(self._kernel, self.count, arguments, WARPS, parts.data_ptr() % 16)

    def _kernel(self) -> Any:
        return norm_kernels(*self._types)[0]


def _root() -> Any:
    return norm_kernels(torch.float32, torch.float32)[1]


class Norm:
    """The norm of all gradients on one device, in as many launches as there are cohorts, and one."""

    def __init__(self, runners: Sequence[Launch], device: torch.device) -> None:
        counts = [runner.parts() for runner in runners]
        self._total, self._launch = sum(counts), Launcher()
        self._parts = torch.zeros(max(1, self._total), dtype=torch.float64, device=device)
        self._shares = list(zip(runners, self._parts[: self._total].split(counts), strict=True))
        self._out = torch.zeros((), dtype=torch.float64, device=device)
        self._place = self._out.get_device()

    def run(self) -> torch.Tensor:
        """The norm, as a tensor on the device that the next call overwrites."""
        if is_elsewhere(self._place):
            with torch.cuda.device(self._place):
                return self.run()
        for runner, share in self._shares:
            runner.squares(share)
        self._launch(_root, 1, (self._parts, self._total, self._out), WARPS, "norm")
        return self._out
