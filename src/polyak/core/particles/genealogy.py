"""Genealogies: who came from whom, over time."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from polyak.core import checks
from polyak.core.particles._moves import moved
from polyak.core.particles._values import INTEGERS, indices

_PARTICLES = checks.Integer() | checks.tensor | None


class Genealogy:
    """The particles of each time and their parents, as a resampling after another leaves them.

    Example:
        >>> tree = Genealogy()
        >>> tree.append(None, torch.tensor([1.0, 2.0]))  # the first particles have no parents
        >>> tree.append(torch.tensor([1, 1]), torch.tensor([3.0, 4.0]))
        >>> tree.path(0), tree.lineage(0), tree.unique(0)
        (tensor([2., 3.]), tensor([1, 0]), tensor(1))
    """

    def __init__(self) -> None:
        self._parents: list[Tensor] = []  # rows of the time before
        self._labels: list[Tensor | None] = []  # the rows' first numbers, of a time that was pruned
        self._x: list[Any] = []

    def __len__(self) -> int:
        return len(self._parents)

    @checks.arguments(ancestors=checks.Tensor(least_ndim=1) | None, x=checks.Anything("a pytree of tensors, or None"))
    def append(self, ancestors: Tensor | None, x: Any = None) -> None:
        """The particles of the next time.

        Args:
            ancestors: (*batch, N): whose child each particle is, among those of the time before. At the first time it only tells
                how many there are, and None will do where x does.
            x: their states, (*batch, N, *event), or a pytree of such; None where only lineages are wanted. It is kept, not copied.

        Raises:
            ValueError: ancestors of another batch, or out of range; states of another shape, or given at some times only.
        """
        leaves = [leaf for leaf in pytree.tree_leaves(x) if isinstance(leaf, Tensor)]
        if self._x and (x is None) != (self._x[-1] is None):
            raise ValueError("x must be given at every time, or at none")
        if ancestors is None:
            if self._parents or not leaves or leaves[0].ndim < 1:
                raise ValueError("ancestors may be None only at the first time, with x of shape (N, ...)")
            ancestors = torch.arange(leaves[0].shape[0], device=leaves[0].device)
        if ancestors.dtype not in INTEGERS:
            raise ValueError(f"ancestors must be integers, got {ancestors.dtype}")
        for leaf in leaves:
            if leaf.shape[: ancestors.ndim] != ancestors.shape:
                raise ValueError(
                    f"x must have the ancestors' dimensions {tuple(ancestors.shape)} first, got {tuple(leaf.shape)}"
                )
        if self._parents:
            last = self._parents[-1]
            if ancestors.shape[:-1] != last.shape[:-1]:
                raise ValueError(
                    f"ancestors must have the batch {tuple(last.shape[:-1])}, got {tuple(ancestors.shape[:-1])}"
                )
            indices("ancestors", ancestors, last.shape[-1])
        self._parents.append(ancestors.to(torch.int64))
        self._labels.append(None)
        self._x.append(x)

    @checks.arguments(k=_PARTICLES)
    def lineage(self, k: int | Tensor | None = None) -> Tensor:
        """The numbers of the ancestors of the last time's particles k, at every time.

        Args:
            k: a number, the same in all systems; integers (*batch), one for each, or (*batch, m); None: all of them.

        Returns:
            (*batch, T) for one particle a system, else (*batch, m, T); int64.

        Raises:
            ValueError: k out of range, or of another shape; nothing appended yet.
        """
        numbers = []
        rows, one = self._walk(k)
        for t, row in enumerate(rows):
            labels = self._labels[t]
            numbers.append(row if labels is None else labels.gather(-1, row))
        made = torch.stack(numbers, -1)
        return made.squeeze(-2) if one else made

    @checks.arguments(k=_PARTICLES)
    def path(self, k: int | Tensor | None = None) -> Any:
        """The states along the lineages of the last time's particles k: (*batch, T, *event), or (*batch, m, T, *event).

        Args:
            k: as for :meth:`lineage`.

        Raises:
            ValueError: as :meth:`lineage`; no states were given.
        """
        rows, one = self._walk(k)
        if self._x[0] is None:
            raise ValueError("k has no path: x was not given to append()")
        dim = rows[0].ndim - one
        steps = [
            pytree.tree_map(lambda leaf, row=row: _of(leaf, row, one), x) for x, row in zip(self._x, rows, strict=True)
        ]
        return pytree.tree_map(
            lambda *leaves: torch.stack(leaves, dim) if isinstance(leaves[0], Tensor) else leaves[0], *steps
        )

    @checks.arguments(t=checks.Integer())
    def unique(self, t: int = 0) -> Tensor:
        """How many particles of time t (negative: from the end) have descendants at the last time: shape batch, int64."""
        rows, _ = self._walk(None)
        if not -len(rows) <= t < len(rows):
            raise ValueError(f"t must be one of {len(rows)} times, got {t}")
        alive = _alive(rows[t], self._parents[t].shape[-1])
        return alive.sum(-1)

    def prune(self) -> None:
        """Forget all particles without descendants at the last time: what remains is of order T + N log N (Jacob et al., 2015).

        Lineages and paths stay what they are. Of several systems as many rows are kept as the one with most needs. It waits for the
        device, to know how many.
        """
        if len(self) < 2:
            return
        rows, _ = self._walk(None)
        for t in range(len(rows) - 1):
            alive = _alive(rows[t], self._parents[t].shape[-1])
            kept = int(alive.sum(-1).max()) if alive.numel() else 0
            if kept == alive.shape[-1]:
                continue
            order = torch.argsort((~alive).to(torch.uint8), dim=-1, stable=True)[..., :kept]
            place = (alive.cumsum(-1) - 1).clamp(min=0)  # where each survivor goes
            labels = self._labels[t]
            self._labels[t] = order if labels is None else labels.gather(-1, order)
            self._parents[t] = self._parents[t].gather(-1, order)
            self._parents[t + 1] = place.gather(-1, self._parents[t + 1])
            self._x[t] = pytree.tree_map(
                lambda x, order=order: moved(x, order) if isinstance(x, Tensor) else x, self._x[t]
            )

    def _walk(self, k: int | Tensor | None) -> tuple[list[Tensor], bool]:
        """The rows of the ancestors at every time, each (*batch, m), and whether one particle was asked for."""
        if not self._parents:
            raise ValueError("k has no lineage: nothing was appended")
        last = self._parents[-1]
        batch, size = last.shape[:-1], last.shape[-1]
        one = k is not None
        if k is None:
            row = torch.arange(size, device=last.device).expand(last.shape)
        elif isinstance(k, Tensor):
            one = k.shape == batch
            if not (one or (k.ndim == last.ndim and k.shape[:-1] == batch)) or k.dtype not in INTEGERS:
                shape = ", ".join(map(str, batch))
                raise ValueError(f"k must be a number, or integers ({shape}) or ({shape}, m), got {checks.shown(k)}")
            indices("k", k, size)
            row = (k.unsqueeze(-1) if one else k).to(torch.int64)
        else:
            if not 0 <= k < size:
                raise ValueError(f"k must be in [0, {size}), got {k}")
            row = torch.full((*batch, 1), k, dtype=torch.int64, device=last.device)
        rows = [row]
        for parents in reversed(self._parents[1:]):
            rows.append(parents.gather(-1, rows[-1]))
        return rows[::-1], one


def _alive(row: Tensor, size: int) -> Tensor:
    """Which of so many rows are among the given."""
    return torch.zeros(*row.shape[:-1], size, dtype=torch.bool, device=row.device).scatter_(-1, row, True)


def _of(leaf: Any, row: Tensor, one: bool) -> Any:
    if not isinstance(leaf, Tensor):
        return leaf
    made = moved(leaf, row)
    return made.squeeze(row.ndim - 1) if one else made
