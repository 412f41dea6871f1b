"""What is done with ancestors: counting, and moving states."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree

from polyak.core import checks
from polyak.core.particles import _native
from polyak.core.particles._moves import moved
from polyak.core.particles._values import indices

_ANCESTORS = checks.Tensor(least_ndim=1)


@checks.arguments(ancestors=_ANCESTORS, N=checks.Integer(1))
def counts(ancestors: Tensor, N: int) -> Tensor:
    """How many offspring each of N particles has: ancestors of shape (*batch, n) to (*batch, N), int64.

    Raises:
        ValueError: on the CPU, ancestors that are not in [0, N).
    """
    ancestors = indices("ancestors", ancestors, N)
    made = ancestors.new_zeros(*ancestors.shape[:-1], N)
    return made.scatter_add_(-1, ancestors, ancestors.new_ones(1).expand_as(ancestors))


@checks.arguments(
    tree=checks.Anything("a tensor, or a pytree of tensors"), ancestors=_ANCESTORS, dim=checks.Integer() | None
)
def gather(tree: Any, ancestors: Tensor, dim: int | None = None) -> Any:
    """States of the ancestors: row k of each system is its row ``ancestors[k]``.

    Args:
        tree: a tensor of shape (*batch, N, *event), or a pytree of such; what is no tensor stays as it is.
        ancestors: (*batch, n) integers; each system has its own.
        dim: the particles' dimension. Default: that of the ancestors. Of dimensions before the batch (a history's, say) each
            index is moved alike.

    Returns:
        Tensors of shape (*batch, n, *event); differentiable.

    Raises:
        ValueError: a tensor whose shape does not go with the ancestors; on the CPU, ancestors out of range.
    """
    if isinstance(tree, Tensor):
        return _leaf((), tree, ancestors, dim)
    return pytree.tree_map_with_path(lambda path, x: _leaf(path, x, ancestors, dim), tree)


def _leaf(path: Any, x: Any, ancestors: Tensor, dim: int | None) -> Any:
    if not isinstance(x, Tensor):
        return x
    batch = ancestors.shape[:-1]
    at = len(batch) if dim is None else dim + x.ndim * (dim < 0)
    if not len(batch) <= at < x.ndim or x.shape[at - len(batch) : at] != batch:
        raise ValueError(
            f"tree{pytree.keystr(path)} must have shape ({', '.join([*map(str, batch), 'N'])}, ...), its particles in dimension "
            f"{at}, to go with ancestors of shape {tuple(ancestors.shape)}; got {tuple(x.shape)}"
        )
    if at == len(batch) and (made := _native.moved(x, ancestors)) is not None:  # it looks at the ancestors itself
        return made
    rows = indices("ancestors", ancestors, x.shape[at])
    if at > len(batch):
        rows = rows.expand(*x.shape[: at - len(batch)], *rows.shape)
    return moved(x, rows)
