"""What the rules take in: k vectors as one tensor (k, d), or as k equal containers of tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from polyak.core import checks

Vectors = Tensor | Sequence[Any]


class Containers(checks.Kind):
    """A tensor, or containers of such, nested."""

    words = "a tensor, or a container of tensors"

    def __init__(self, *, several: bool) -> None:
        self.several = several
        if several:
            self.words = "a tensor (k, d), or a sequence of k tensors or containers of tensors"

    def like(self, value: Any) -> bool:
        if isinstance(value, Tensor):
            return True
        leaves = pytree.tree_leaves(value)
        right = all(isinstance(leaf, Tensor) for leaf in leaves)
        return right and (isinstance(value, Sequence) if self.several else bool(leaves))

    def __call__(self, name: str, value: Any) -> Any:
        super().__call__(name, value)
        if isinstance(value, Tensor) and value.ndim < 1 + self.several:
            raise ValueError(f"{name} must have shape ({'k, ' if self.several else ''}d), got {tuple(value.shape)}")
        return value


VECTORS, OWN = Containers(several=True), Containers(several=False)


def flatten(tree: Any) -> Tensor:
    leaves = pytree.tree_leaves(tree)
    return leaves[0].reshape(-1) if len(leaves) == 1 else torch.cat([leaf.reshape(-1) for leaf in leaves])


def rows_of(name: str, x: Vectors) -> tuple[list[Tensor], Callable[[Tensor], Any]]:
    """The vectors one by one, and what makes a result look like them."""
    if isinstance(x, Tensor):
        rows, rebuild = list(x.unbind(-2)), lambda result: result
    else:
        if any(not pytree.tree_leaves(tree) for tree in x):
            raise TypeError(f"{name} must be tensors or containers of tensors, got an empty one")
        rows = [flatten(tree) for tree in x]
        if not rows:
            raise ValueError(f"{name} must hold at least one vector, got none")
        rebuild = like(x[0])
    check_alike(name, rows)
    return rows, rebuild


def like(tree: Any) -> Callable[[Tensor], Any]:
    leaves, spec = pytree.tree_flatten(tree)

    def rebuild(result: Tensor) -> Any:
        parts = result.split([leaf.numel() for leaf in leaves], dim=-1)
        shaped = [p.reshape(leaf.shape).to(leaf.dtype) for p, leaf in zip(parts, leaves, strict=True)]
        return pytree.tree_unflatten(shaped, spec)

    return rebuild


def check_alike(name: str, rows: Sequence[Tensor]) -> None:
    lengths = sorted({row.shape[-1] for row in rows})
    if len(lengths) > 1:
        raise ValueError(f"{name} must be vectors of one length, got lengths {lengths}")
    for row in rows:
        if not row.is_floating_point():
            raise ValueError(f"{name} must be floating point, got {row.dtype}")
