"""Checks before every step that all tensors are still as the plan assumes: in one call of C (``look.c``), or in Python.

A plan holds addresses. Parameters, states and counters may be given other memory, shapes and types behind its back (``.data``,
``resize_``, ``share_memory_``, offloading), states and options may be replaced, and gradients are new ones at every step. All
of that is looked at before each step: address, shape, strides, type and storage of every tensor.
"""

from __future__ import annotations

import ctypes
from collections import Counter
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from polyak.core.cc import library
from polyak.optim._engine.dispatch import matters
from polyak.optim._engine.tensors import PLAIN, is_dtensor, is_short, local

if TYPE_CHECKING:
    from polyak.optim._engine.base import RuleOptimizer
    from polyak.optim._engine.plan import Cohort, Row

# What a look may find (CHANGED: the plan is no longer good), and what is to be done with a row's gradient; as in `look.c`.
CHANGED, DIRTY, ODD, APART = 1, 2, 4, 8
ABSENT, READ, COPIED, LOOSE = range(4)
MOST = 60  # numbers of a group that have a bit of their own
# Words of the tables; as the structures in `look.c`.
FORM, FACT, KEY, DICT, PARAMS, ROW, COUNTER = 4, 3, 2, 4, 3, 9, 3
_STATUS = 8  # word of a row


class Native(NamedTuple):
    """A compiled look."""

    look: Any
    advance: Any
    exchange: int  # address of DLPack's table
    payload: int  # where in a Python tensor PyTorch's is
    reads: Any
    headers: bool  # whether it was compiled with PyTorch's headers


class _DLTensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p), ("device", ctypes.c_int64), ("ndim", ctypes.c_int32), ("kind", ctypes.c_uint32),
        ("shape", ctypes.c_void_p), ("strides", ctypes.c_void_p), ("offset", ctypes.c_uint64),
    )  # fmt: skip


@cache
def native() -> Native | None:
    """The fastest compiled look that can be had here; None: there is no compiler."""
    return through_headers() or through_dlpack()


@cache
def _exchange() -> int:
    """The address of DLPack's table, 0 where there is none of the version that is known here."""
    capsule = getattr(torch.Tensor, "__dlpack_c_exchange_api__", None)
    if capsule is None:
        return 0
    pointer = ctypes.pythonapi.PyCapsule_GetPointer
    pointer.argtypes, pointer.restype = [ctypes.py_object, ctypes.c_char_p], ctypes.c_void_p
    table = pointer(capsule, b"dlpack_exchange_api")
    return table if ctypes.c_uint32.from_address(table).value == 1 else 0


def through_dlpack() -> Native | None:
    """Tensors are read through DLPack's table: C, and any PyTorch that has it."""
    return _loaded() if _exchange() else None


def through_headers() -> Native | None:
    """Tensors are read as PyTorch's own extensions do, where its headers and a C++ compiler are."""
    root = Path(torch.__file__).parent
    if not _exchange() or not (root / "include" / "c10" / "core" / "TensorImpl.h").exists():
        return None
    build = f"-DPYTORCH={torch.__version__}.{torch.version.git_version}"  # for another one it is compiled anew
    made = _loaded(
        "-std=c++20", f"-I{root / 'include'}", f"-L{root / 'lib'}", f"-Wl,-rpath,{root / 'lib'}", build, "-lc10"
    )  # fmt: skip
    return made if made is not None and _reads(made) else None


def _loaded(*plus: str) -> Native | None:
    made = library(Path(__file__).with_name("look.c").read_text(), ctypes.PyDLL, plus)
    if made is None:
        return None
    look, advance = made.polyak_look, made.polyak_advance
    look.argtypes, look.restype = [ctypes.c_void_p, ctypes.py_object, ctypes.py_object], ctypes.c_int64
    advance.argtypes, advance.restype = [ctypes.c_void_p], None
    made.polyak_reads.argtypes = [ctypes.c_int64, ctypes.py_object, ctypes.c_int64, ctypes.c_int64]
    made.polyak_reads.restype = ctypes.c_int64
    return Native(look, advance, _exchange(), object.__basicsize__, made.polyak_reads, bool(plus))


def _reads(made: Native) -> bool:
    """Whether PyTorch's tensor is where it should be in Python's, by the addresses that DLPack gives of its shape."""
    entry = ctypes.c_void_p.from_address(made.exchange + 40).value  # the sixth word: of a tensor, without its ownership
    if entry is None:
        return False
    read = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.py_object, ctypes.c_void_p)(entry)
    for t in (torch.zeros(2, 3), torch.nn.Parameter(torch.zeros(5)), torch.zeros(4, 3, 2, dtype=torch.float64).mT):
        seen = _DLTensor()
        if read(t, ctypes.addressof(seen)) or not made.reads(made.payload, t, seen.shape, seen.strides):
            return False
    return True


class Looker:
    """All that a plan has seen.

    Args:
        by_hand: numbers of the counters that are not counted here.
    """

    def __init__(
        self,
        optimizer: RuleOptimizer,
        rows: Sequence[Row],
        cohorts: Sequence[Cohort],
        counters: Sequence[torch.Tensor],
        by_hand: set[int],
    ) -> None:
        self._native = native()
        # A tensor that something in C++ refers to, too, is read through DLPack's table twice as fast: a view of it does.
        read = [t for cohort in cohorts for column in cohort.columns[1:] for t in column]
        with torch.no_grad():
            self._views = (
                [t.view(t.shape) for t in read] if self._native is not None and not self._native.headers else []
            )
        # Dictionaries with their keys, values, and what these matter. All that is compared by identity is kept, so that nothing
        # else gets its address.
        self._dicts: list[tuple[dict[Any, Any], list[Any]]] = []
        self._groups, self._lists = optimizer.param_groups, [group["params"] for group in optimizer.param_groups]
        self._members = [list(params) for params in self._lists]
        names = {*optimizer.state_names, *optimizer.other_names, "compensation", "step"}
        for group in optimizer.param_groups:
            self._dicts.append((group, [(key, value, matters(optimizer, key)) for key, value in group.items()]))
        self._state = optimizer.state
        self._dicts.append((optimizer.state, [(p, state, 1) for p, state in optimizer.state.items()]))
        for state in optimizer.state.values():
            if isinstance(state, dict):
                self._dicts.append((state, [(key, value, int(key in names)) for key, value in state.items()]))
        self._tensors, self._others, of_row, self._wrapped = _looked_at(optimizer, rows, cohorts, counters, by_hand)
        self._facts = [_fact(t) for t in self._tensors]
        numbered = {id(t): i for i, t in enumerate(counters)}
        slots = [0] * len(rows)
        for cohort in cohorts:
            for position, slot in zip(cohort.positions, cohort.runner.slots(), strict=True):
                slots[position] = slot
        self._counter_of = [-1 if row.state is None else numbered.get(id(row.state.get("step")), -1) for row in rows]
        self._rows, self._fact_of, self._slots = list(rows), of_row, slots
        self.counters, self._by_hand = list(counters), by_hand
        members = Counter(self._counter_of)
        self.members = [members[i] for i in range(len(counters))]
        self.status = np.zeros(len(rows), dtype=np.int64)
        self.active = np.zeros(len(counters), dtype=np.int64)
        self.dirty = np.zeros(len(self._groups), dtype=np.int64)
        if self._native is not None:
            self._tabulate(self._native)

    def _tabulate(self, made: Native) -> None:
        """Write all of it down for `look.c`."""
        keys: list[int] = []
        values: list[int] = []
        dicts, dims, params = [], [], []
        named: dict[Any, int] = {}
        for dictionary, entries in self._dicts:
            of_keys = tuple((id(key), kind) for key, _, kind in entries)
            if of_keys not in named:
                named[of_keys] = len(keys) // KEY
                keys += [word for entry in of_keys for word in entry]
            dicts.append([id(dictionary), len(values), named[of_keys], len(entries)])
            values += [id(value) for _, value, _ in entries]
        forms: dict[Any, int] = {}
        of_forms, facts = [], []
        for t in self._tensors:
            form = (t.device, t.dtype, t.shape, t.stride())
            if form not in forms:
                forms[form] = len(forms)
                of_forms.append([_device(t), _dlpack_kind(t.dtype), t.dim(), len(dims)])
                dims += [*t.shape, *t.stride()]
            facts.append([id(t), t.data_ptr(), forms[form]])
        first = 0
        for members, params_list in zip(self._members, self._lists, strict=True):
            params.append([id(params_list), first, len(members)])
            first += len(members)
        rows = [
            [
                id(row.p), fact, slot, _dlpack_kind(row.grad_dtype) if fact >= 0 and row.grad_dtype else 0, counter,
                int(row.state is not None), 0, 0, 0,
            ]
            for row, fact, slot, counter in zip(self._rows, self._fact_of, self._slots, self._counter_of, strict=True)
        ]  # fmt: skip
        counters = [
            [0 if i in self._by_hand else t.data_ptr(), self.members[i], 0] for i, t in enumerate(self.counters)
        ]
        tables = [
            np.array(table, dtype=np.int64).reshape(-1, width)
            for table, width in (
                (dicts, DICT), (params, PARAMS), (keys, KEY), (values, 1), (of_forms, FORM), (facts, FACT), (dims, 1),
                (rows, ROW), (counters, COUNTER),
            )
        ]  # fmt: skip
        self._values, self.status, self.active = tables[3][:, 0], tables[-2][:, _STATUS], tables[-1][:, 2]
        self._first_value = [first for _, first, _, _ in dicts]
        known = [torch.Tensor, torch.nn.Parameter, None, "grad", torch.Tensor.is_neg, torch.Tensor.is_conj, is_short]
        words = [
            made.exchange, *map(id, known), id(self._groups), id(self._state), len(self._groups), len(rows), self._others,
            len(counters), len(self._dicts) - len(self._groups) - 1, *(table.ctypes.data for table in tables),
            self.dirty.ctypes.data, made.payload, 1,
        ]  # fmt: skip
        self._plan = np.array(words, dtype=np.int64)
        self._kept = [known, tables]
        self._address = self._plan.ctypes.data

    def is_of(self, optimizer: RuleOptimizer) -> bool:
        """Whether these are still the optimizer's own groups and states."""
        return optimizer.param_groups is self._groups and optimizer.state is self._state

    def look(self, grads: list[torch.Tensor | None] | None, held: list[torch.Tensor], *, advance: bool) -> int:
        """What is not as it was. Leaves the addresses of this step's gradients with the runners, and counts the step.

        Args:
            grads: of all parameters; None: their ``grad``.
            held: those that are read where they are, are put here.
            advance: whether to count the step, if everything is as it was.
        """
        if self._wrapped and not all(local(outer) is inner for outer, inner in self._wrapped):
            return CHANGED
        if self._native is None:
            return self._look(grads, held, advance)
        self._plan[-1] = advance
        return self._native.look(self._address, grads, held)

    def advance(self) -> None:
        """Count a step for all that have a gradient."""
        if self._native is not None:
            self._native.advance(self._address)
            return
        for i, counter in enumerate(self.counters):
            if self.active[i] and i not in self._by_hand:
                counter += 1

    def changed(self, k: int) -> list[str]:
        """Which of a group's numbers are other objects than before; from here on they are not."""
        bits, (group, entries) = int(self.dirty[k]), self._dicts[k]
        self.dirty[k] = 0
        at = [i for i in range(len(entries)) if bits >> min(i, MOST) & 1 and entries[i][2] == 2]
        for i in at:
            name = entries[i][0]
            entries[i] = (name, group[name], 2)
            if self._native is not None:
                self._values[self._first_value[k] + i] = id(group[name])
        return [entries[i][0] for i in at]

    def put(self, row: int, g: torch.Tensor) -> None:
        """Let a row's gradient be read from ``g``, which is laid out as its parameter."""
        ctypes.c_int64.from_address(self._slots[row]).value = g.data_ptr()

    # The same in Python.

    def _look(self, grads: list[torch.Tensor | None] | None, held: list[torch.Tensor], advance: bool) -> int:
        if not self._is_as_it_was():
            return CHANGED
        found = DIRTY if self.dirty.any() else 0
        self.active[:] = 0
        for i, row in enumerate(self._rows):
            g = row.p.grad if grads is None else grads[i]
            status = self._status(i, row, g)
            if status < 0:
                return CHANGED
            if status == READ and g is not None:
                held.append(g)
            if self._slots[i]:
                address = g.data_ptr() if status == READ and g is not None else 0
                ctypes.c_int64.from_address(self._slots[i]).value = address
            self.status[i] = status
            found |= ODD if status >= COPIED else 0
            if self._counter_of[i] >= 0:
                self.active[self._counter_of[i]] += status != ABSENT
        if any(0 < n < of for n, of in zip(self.active.tolist(), self.members, strict=True)):
            found |= APART
        if advance and not found:
            self.advance()
        return found

    def _is_as_it_was(self) -> bool:
        if [id(group) for group in self._groups] != [id(d) for d, _ in self._dicts[: len(self.dirty)]]:
            return False
        for k, (dictionary, entries) in enumerate(self._dicts):
            if len(dictionary) != len(entries):
                return False
            for (key, value), (known, seen, kind) in zip(dictionary.items(), entries, strict=True):
                if key is not known or (value is not seen and kind == 1):
                    return False
                if value is not seen and kind == 2:
                    self.dirty[k] |= 1 << MOST
        for params, members in zip(self._lists, self._members, strict=True):
            if list(map(id, params)) != list(map(id, members)):
                return False
        try:
            return all(_fact(t) == fact for t, fact in zip(self._tensors, self._facts, strict=True))
        except RuntimeError:  # one that has no address any more
            return False

    def _status(self, i: int, row: Row, g: torch.Tensor | None) -> int:
        if g is None:
            return ABSENT
        if row.state is None:
            return -1
        if self._fact_of[i] < 0 or type(g) not in PLAIN or g.layout is not torch.strided:
            return LOOSE
        p = self._tensors[self._fact_of[i]]
        if g.shape != p.shape or g.device != p.device:
            return LOOSE
        if g.dtype != row.grad_dtype:
            return -1
        try:
            address = g.data_ptr()
        except RuntimeError:
            return LOOSE
        if is_short(g) or (g.numel() and not address):
            return LOOSE
        apart = any(a != b and n > 1 for a, b, n in zip(g.stride(), p.stride(), g.shape, strict=True))
        return COPIED if apart or g.is_neg() or g.is_conj() or address == p.data_ptr() else READ


def _looked_at(
    optimizer: RuleOptimizer,
    rows: Sequence[Row],
    cohorts: Sequence[Cohort],
    counters: Sequence[torch.Tensor],
    by_hand: set[int],
) -> tuple[list[torch.Tensor], int, list[int], list[tuple[torch.Tensor, torch.Tensor]]]:
    """The tensors whose memory matters, first so many that are no parameters; for each row the number of its parameter; and
    what is inside of what."""
    tensors: list[torch.Tensor] = [t for i, t in enumerate(counters) if i not in by_hand]
    of_row, wrapped = [-1] * len(rows), []
    for cohort in cohorts:
        for column in cohort.columns[1:]:
            tensors += column
        if cohort.places is not None:
            tensors += [t for own in cohort.places for t in own]
        if "step" in getattr(cohort.layout, "on_device", ()):
            tensors += list({id(t): t for t in cohort.counters if t is not None}.values())
    others = len(tensors)
    for cohort in cohorts:
        for position, p in zip(cohort.positions, cohort.columns[0], strict=True):
            of_row[position] = len(tensors)
            tensors.append(p)
            row = rows[position]
            outer = [row.p, *(row.state or {}).values()]
            wrapped += [(t, local(t)) for t in outer if isinstance(t, torch.Tensor) and is_dtensor(t)]
    return tensors, others, of_row, wrapped


def _fact(t: torch.Tensor) -> tuple[Any, ...]:
    return (type(t), t.data_ptr(), t.device, t.dtype, t.shape, t.stride(), t.is_neg(), is_short(t))


_KINDS = {
    torch.float16: (2, 16), torch.float32: (2, 32), torch.float64: (2, 64), torch.bfloat16: (4, 16),
    torch.complex32: (5, 32), torch.complex64: (5, 64), torch.complex128: (5, 128), torch.uint8: (1, 8),
    torch.int8: (0, 8), torch.int16: (0, 16), torch.int32: (0, 32), torch.int64: (0, 64), torch.bool: (6, 8),
}  # fmt: skip


def _dlpack_kind(dtype: torch.dtype) -> int:
    """A type as `look.c` writes DLPack's."""
    code, bits = _KINDS.get(dtype, (255, 0))
    return code << 32 | bits << 16 | 1


def _device(t: torch.Tensor) -> int:
    """A device as `look.c` writes it."""
    return 0 if t.device.type == "cpu" else 1 << 32 | (t.device.index or 0)
