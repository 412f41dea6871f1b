"""A bank of checkpoints and their linear combinations, streamed: ``theta(a) = sum_i a_i theta_i``.

A combination keeps one set of weights and adds checkpoints to it, one tensor at a time, so that K checkpoints need the memory
of one. Moving from a to b adds ``(b_i - a_i) theta_i`` for the coefficients that differ.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from polyak.core import checks
from polyak.teachers.lcsc.sources import CHECKPOINTS, checkpoints_in, source

_LORA_FACTORS = ("lora_A", "lora_B", "lora_down", "lora_up", "lora.down", "lora.up")
_NATIVE = (torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64, torch.complex128)


class CheckpointBank:
    """Checkpoints of one model, the oldest first; their weights stay where they are until they are used.

    Args:
        checkpoints: a sequence of at least 2 of: a state dict; a ``.safetensors`` or torch file (``.pt``, ``.pth``, ``.bin``,
            ``.ckpt``; memory-mapped, read with ``weights_only=True``); a shard index (``....index.json``); a folder with one
            of these, or written by torch.distributed.checkpoint; a :class:`~polyak.teachers.lcsc.sources.Source`. Or one
            folder that holds several files or folders of checkpoints, ordered by the numbers in their names.
        keys: the entries to combine, by name or as a predicate of the name. Default: all of floating point. All others
            (integer buffers, what is no tensor) come from the last checkpoint.
        entry: where torch files and distributed folders hold more than the state dict: the name it has in them.
        dtype: in which :meth:`keep` holds checkpoints, as differences from the last one. Default: that of accumulation.

    Attributes:
        names: what the checkpoints are called.
        layout: entry -> (shape, dtype) in the last checkpoint; None for what is no tensor.
        keys: the combined entries, in the order they are read.

    Raises:
        ValueError: fewer than 2 checkpoints, entries or shapes that differ (the first such is named), unknown keys.
        FileNotFoundError: a path that leads nowhere.
        ImportError: safetensors files without safetensors.
    """

    @checks.arguments(
        checkpoints=CHECKPOINTS, keys=checks.Function("a predicate of a name", 1) | checks.Several(checks.Text(empty=True)) | None,
        entry=checks.text | None, dtype=checks.dtype | None,
    )  # fmt: skip
    def __init__(
        self,
        checkpoints: str | Path | Sequence[Any],
        *,
        keys: Iterable[str] | Callable[[str], bool] | None = None,
        entry: str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        items = checkpoints_in(Path(checkpoints)) if isinstance(checkpoints, (str, os.PathLike)) else list(checkpoints)
        if len(items) < 2:
            where = f" in {checkpoints}" if isinstance(checkpoints, (str, os.PathLike)) else ""
            raise ValueError(f"checkpoints must be at least 2, got {len(items)}{where}")
        self.sources = [source(item, i, entry) for i, item in enumerate(items)]
        self.names = [s.name for s in self.sources]
        self.dtype = dtype
        layouts = [s.layout() for s in self.sources]
        self.layout = layouts[-1]
        for name, layout in zip(self.names, layouts, strict=True):
            self._check_alike(name, layout, layouts[0])
        self.keys = self._chosen(keys)
        self._wide = {key: _accumulator([layout[key] for layout in layouts]) for key in self.keys}
        self._kept: dict[int, list[Tensor]] = {}
        if factors := [k for k in self.keys if any(part in k for part in _LORA_FACTORS)]:
            warnings.warn(
                f"{factors[0]!r} is a factor of a LoRA update: a combination of factors is no combination of updates; combine "
                "merged weights instead",
                stacklevel=2,
            )

    def __len__(self) -> int:
        return len(self.sources)

    def _check_alike(self, name: str, layout: Mapping[str, Any], first: Mapping[str, Any]) -> None:
        for key in (*first, *layout):
            if key not in layout:
                raise ValueError(f"checkpoints differ: {name} lacks {key!r}, which {self.names[0]} has")
            if key not in first:
                raise ValueError(f"checkpoints differ: {name} has {key!r}, which {self.names[0]} lacks")
            ours, theirs = layout[key], first[key]
            if (ours and ours[0]) != (theirs and theirs[0]):
                what = [f"shape {x[0]}" if x else "no tensor" for x in (ours, theirs)]
                raise ValueError(f"checkpoints differ: {key!r} has {what[0]} in {name}, {what[1]} in {self.names[0]}")

    def _chosen(self, keys: Iterable[str] | Callable[[str], bool] | None) -> list[str]:
        floating = [
            k for k, facts in self.layout.items() if facts and (facts[1].is_floating_point or facts[1].is_complex)
        ]
        if keys is None or callable(keys):
            chosen = [k for k in floating if keys is None or keys(k)]
        else:
            wanted = {checks.one_of("keys", key, floating) for key in keys}
            chosen = [k for k in floating if k in wanted]
        if not chosen:
            raise ValueError(
                f"keys must leave something to combine; the checkpoints have {floating or 'no float entries'}"
            )
        return chosen

    def without(self, keys: Iterable[str]) -> CheckpointBank:
        """The same checkpoints, with these entries taken from the last one."""
        left_out = set(keys)
        other = copy(self)
        other.keys = [key for key in self.keys if key not in left_out]
        other._kept = {}
        return other

    def shape(self, key: str) -> torch.Size:
        """A combined entry's shape."""
        facts = self.layout[key]
        assert facts is not None
        return torch.Size(facts[0])

    def dtype_of(self, key: str) -> torch.dtype:
        """A combined entry's type in the last checkpoint, which combinations are given back in."""
        facts = self.layout[key]
        assert facts is not None
        return facts[1]

    def wide(self, key: str) -> torch.dtype:
        """The type in which an entry is accumulated: float32, or float64 where a checkpoint has it (complex alike)."""
        return self._wide[key]

    @contextmanager
    def tensors(self, i: int) -> Iterator[Iterator[tuple[str, Tensor]]]:
        """Checkpoint i's combined entries, each read when its turn comes."""
        with self.sources[i].open() as get:
            yield ((key, get(key).detach()) for key in self.keys)

    def others(self) -> dict[str, Any]:
        """What is not combined, from the last checkpoint; tensors are copies."""
        chosen = set(self.keys)
        with self.sources[-1].open() as get:
            found = {key: get(key) for key in self.layout if key not in chosen}
            return {k: v.detach().clone() if isinstance(v, Tensor) else v for k, v in found.items()}

    def ordered(self, entries: Mapping[str, Any]) -> dict[str, Any]:
        """Entries in the order of the last checkpoint."""
        return {key: entries[key] for key in self.layout}

    def keep(self, budget: int, device: torch.device | str) -> int:
        """Hold as many checkpoints as ``budget`` bytes allow on ``device``, the newest first; returns how many.

        They are held as differences from the last checkpoint, in ``dtype``.
        """
        checks.integer("budget", budget, least=0)
        self._kept.clear()
        size = sum(self.shape(k).numel() * (self.dtype or self.wide(k)).itemsize for k in self.keys)
        for i in range(len(self) - 2, max(-1, len(self) - 2 - budget // size), -1):
            with self.tensors(i) as ours, self.tensors(len(self) - 1) as last:
                self._kept[i] = [
                    (t.to(device, self.wide(key)) - s.to(device, self.wide(key))).to(self._kept_type(key))
                    for (key, t), (_, s) in zip(ours, last, strict=True)
                ]
        return len(self._kept)

    def _kept_type(self, key: str) -> torch.dtype:
        wide = self.wide(key)
        return self.dtype if self.dtype and not wide.is_complex else wide

    def identical(self) -> bool:
        """Whether all checkpoints' combined entries are equal. Reads no further than the first that are not."""
        last = len(self) - 1
        for i in range(last):
            with self.tensors(i) as ours, self.tensors(last) as theirs:
                if not all(
                    torch.equal(t, s.to(t.device, t.dtype)) for (_, t), (_, s) in zip(ours, theirs, strict=True)
                ):
                    return False
        return True

    def add(
        self, weights: Mapping[str, Tensor], change: Tensor, total: float, *, fresh: bool, kept: bool = True
    ) -> None:
        """``weights += sum_i change_i theta_i``; where ``fresh``, ``weights = `` that sum.

        ``change`` has shape (K,) and sums to ``total``, 1 or 0; in exact arithmetic the checkpoints that are kept as
        differences then need the last one ``total - sum of the others`` times.
        """
        held = self._kept if kept else {}
        steps = change.tolist()
        if held:
            steps[-1] = total - sum(s for i, s in enumerate(steps[:-1]) if i not in held)
        ours = [weights[key] for key in self.keys]
        # What is streamed comes first: with ``fresh`` the first of it overwrites, so that a single checkpoint comes out bitwise.
        for i, step in enumerate(steps):
            if step and i not in held:
                with self.tensors(i) as entries:
                    for w, (_, t) in zip(ours, entries, strict=True):
                        _axpy(w, t, step, overwrite=fresh)
                fresh = False
        if fresh:
            torch._foreach_zero_(ours)
        for i, difference in held.items():
            if steps[i]:
                torch._foreach_add_(ours, difference, alpha=steps[i])


def _axpy(w: Tensor, t: Tensor, step: float, *, overwrite: bool) -> None:
    if overwrite:
        w.copy_(t).mul_(step)
    else:
        # Half precision is widened within the sum; other narrow types (float8) know no sums.
        w.add_(t.to(w.device, t.dtype if t.dtype in _NATIVE else w.dtype), alpha=step)


def _accumulator(facts: Iterable[tuple[Any, torch.dtype] | None]) -> torch.dtype:
    wide = torch.float32
    for fact in facts:
        assert fact is not None
        wide = torch.promote_types(wide, fact[1] if fact[1] in _NATIVE else torch.float32)
    return wide


class Combination:
    """The weights at the present coefficients.

    Args:
        bank: the checkpoints.
        into: tensors to keep the weights in, where their type and shape allow it.
        device: where the other weights are kept.

    Attributes:
        weights: entry -> tensor, of the bank's accumulation types.
    """

    def __init__(
        self, bank: CheckpointBank, *, into: Mapping[str, Tensor] | None = None, device: torch.device | str = "cpu"
    ) -> None:
        self.bank = bank
        self.weights: dict[str, Tensor] = {}
        taken: set[int] = set()
        for key in bank.keys:
            given = None if into is None else into[key]
            # Tied tensors would be added to twice.
            if given is not None and given.dtype == bank.wide(key) and given.data_ptr() not in taken:
                taken.add(given.data_ptr())
                self.weights[key] = given
            else:
                where = device if given is None else given.device
                self.weights[key] = torch.empty(bank.shape(key), dtype=bank.wide(key), device=where)
        self._at: Tensor | None = None

    @torch.no_grad()
    def set(self, coefficients: Tensor, *, kept: bool = True) -> None:
        """Combine anew. ``coefficients``: (K,), float64."""
        total = 1.0 if kept else float(coefficients.sum())
        self.bank.add(self.weights, coefficients, total, fresh=True, kept=kept)
        self._at = coefficients.clone()

    @torch.no_grad()
    def move(self, coefficients: Tensor) -> None:
        """To other coefficients, by what differs. Rounding adds up from move to move."""
        if self._at is None:
            raise RuntimeError("a combination must be set before it can be moved")
        self.bank.add(self.weights, coefficients - self._at, 0.0, fresh=False)
        self._at = coefficients.clone()

    def state_dict(self) -> dict[str, Tensor]:
        """The weights in the checkpoints' own types; those that have it already are not copied."""
        return {key: w.to(self.bank.dtype_of(key)) for key, w in self.weights.items()}


def check_coefficients(coefficients: Any, count: int, *, affine: bool = True) -> Tensor:
    """(K,), float64, on the CPU; finite, and of sum 1 (to 1e-6) where ``affine``."""
    a = torch.as_tensor(coefficients, dtype=torch.float64).detach().cpu()
    if a.shape != (count,):
        raise ValueError(f"coefficients must have shape ({count},), one for each checkpoint, got {tuple(a.shape)}")
    if broken := int((~a.isfinite()).sum()):
        raise ValueError(f"coefficients must be finite, got {broken} of {count} that are not")
    if affine and abs(float(a.sum()) - 1) > 1e-6:
        raise ValueError(f"coefficients must sum to 1, got {float(a.sum())!r} (affine=False allows any sum)")
    return a


BANK = checks.Instance(CheckpointBank, words="a CheckpointBank") | CHECKPOINTS


@checks.arguments(checkpoints=BANK, coefficients=checks.Numbers(1), affine=checks.flag)
def combine(
    checkpoints: CheckpointBank | str | Path | Sequence[Any], coefficients: Any, *, affine: bool = True
) -> dict[str, Any]:
    """``sum_i a_i theta_i`` as a state dict: new tensors in the checkpoints' types, accumulated in float32 (float64 if they are).

    Args:
        checkpoints: a :class:`CheckpointBank`, or what makes one.
        coefficients: (K,), the oldest checkpoint's first. A single 1 among zeros gives that checkpoint bitwise.
        affine: insist that they sum to 1.

    Returns:
        The entries of the last checkpoint in its order; what is not of floating point comes from it.

    Raises:
        ValueError: as :class:`CheckpointBank`; coefficients of another number or sum, or not finite.
    """
    bank = checkpoints if isinstance(checkpoints, CheckpointBank) else CheckpointBank(checkpoints)
    a = check_coefficients(coefficients, len(bank), affine=affine)
    with bank.tensors(len(bank) - 1) as last:
        device = next(last)[1].device
    combination = Combination(bank, device=device)
    combination.set(a, kept=False)
    return bank.ordered({**bank.others(), **combination.state_dict()})


@checks.arguments(k=checks.Integer(1, 1_000_000), rate=checks.fraction, start=checks.Integer(0))
def ema_coefficients(k: int, rate: float, *, start: int = 0) -> Tensor:
    """The coefficients of an exponential moving average over checkpoints, started at one of them.

    ``a_start = g^(k-1-start)``, ``a_i = (1-g) g^(k-1-i)`` after it, 0 before: the recurrence ``m <- g m + (1-g) theta``. A rate
    b per step with a checkpoint every s steps has about ``g = b^s``: the steps between are skipped.

    Args:
        k: number of checkpoints.
        rate: g in [0, 1]; 0 gives the last checkpoint.
        start: index of the first checkpoint in the average.

    Returns:
        (k,), float64, the oldest first; sums to 1.
    """
    checks.integer("start", start, least=0, most=k - 1)
    age = torch.arange(k - 1, -1, -1, dtype=torch.float64)
    a = (1 - rate) * rate**age
    a[start] = rate ** (k - 1 - start)
    a[:start] = 0
    return a
