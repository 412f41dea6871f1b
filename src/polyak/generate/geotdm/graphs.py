"""Graphs of points in two layouts, as layers see them, and which frames of a trajectory are given."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from polyak.core import checks

_SHAPES = "[B, N, 3, T] or [M, 3, T]"


class Inputs(NamedTuple):
    """What a network is told of its graphs, in the order of its arguments."""

    h: Tensor
    edge_index: Tensor | None = None
    edge_attr: Tensor | None = None
    batch: Tensor | None = None


class Dense:
    """B graphs of N nodes, each joined to all others: nodes are [B, N, ...], edges [B, N, N-1, ...]."""

    def __init__(self, inputs: Inputs) -> None:
        h, _, edge_attr, _ = inputs
        self.count, self.n = h.shape[:2]
        every, sender = torch.arange(self.n, device=h.device)[:, None], torch.arange(self.n - 1, device=h.device)
        self.others = sender + (sender >= every)  # [N, N-1]: all but the node itself
        self.edges = None if edge_attr is None else edge_attr[:, every, self.others]

    def receiving(self, v: Tensor) -> Tensor:
        """What is at the receiver of each edge."""
        return v[:, :, None]

    def sending(self, v: Tensor) -> Tensor:
        """What is at the sender of each edge."""
        return v[:, self.others]

    def total(self, e: Tensor) -> Tensor:
        """The sum over the edges that a node receives from."""
        return e.sum(2)

    def mean(self, e: Tensor) -> Tensor:
        """The mean over these edges; 0 where there are none."""
        return e.sum(2) / max(self.n - 1, 1)

    def at_nodes(self, v: Tensor) -> Tensor:
        """What is said of each graph, [B, C], at its nodes."""
        return v[:, None]

    def rows(self, v: Tensor) -> Tensor:
        """What is said of each graph, [B], for the rows of x."""
        return v

    def of_graphs(self, rows: Tensor) -> Tensor:
        """The inverse of :meth:`rows`."""
        return rows

    def centre(self, v: Tensor) -> Tensor:
        """The mean over a graph's nodes, at each of them."""
        return v.mean(1, keepdim=True)

    def average(self, v: Tensor) -> Tensor:
        """The mean over the nodes, [B, N], of each graph, and then over graphs."""
        return v.mean()


class Sparse:
    """Graphs of any sizes and edges: nodes are [M, ...], edges [E, ...]. See :class:`Dense` for what its methods do."""

    def __init__(self, inputs: Inputs) -> None:
        h, edge_index, self.edges, batch = inputs
        assert edge_index is not None
        self.receiver, self.sender = edge_index.long()
        self.nodes = len(h)
        self.batch = torch.zeros(self.nodes, dtype=torch.long, device=h.device) if batch is None else batch.long()

    @cached_property
    def count(self) -> int:
        """How many graphs there are; it is read from the device."""
        return int(self.batch[-1]) + 1 if self.nodes else 0

    def receiving(self, v: Tensor) -> Tensor:
        return v[self.receiver]

    def sending(self, v: Tensor) -> Tensor:
        return v[self.sender]

    def total(self, e: Tensor) -> Tensor:
        return e.new_zeros(self.nodes, *e.shape[1:]).index_add(0, self.receiver, e)

    @cached_property
    def _degree(self) -> Tensor:
        return self.total(torch.ones_like(self.receiver)).clamp(min=1)

    def mean(self, e: Tensor) -> Tensor:
        total = self.total(e)
        return total / self._degree.reshape(-1, *[1] * (total.ndim - 1))

    def at_nodes(self, v: Tensor) -> Tensor:
        return v[self.batch]

    rows = at_nodes

    def of_graphs(self, rows: Tensor) -> Tensor:
        return rows[self._first]

    @cached_property
    def _size(self) -> Tensor:
        return torch.bincount(self.batch, minlength=self.count)

    @cached_property
    def _first(self) -> Tensor:
        return self._size.cumsum(0) - self._size

    def _means(self, v: Tensor) -> Tensor:
        total = v.new_zeros(self.count, *v.shape[1:]).index_add(0, self.batch, v)
        return total / self._size.reshape(-1, *[1] * (v.ndim - 1))

    def centre(self, v: Tensor) -> Tensor:
        return self._means(v)[self.batch]

    def average(self, v: Tensor) -> Tensor:
        return self._means(v).mean()


Graph = Dense | Sparse


def graph_of(inputs: Inputs, lead: Sequence[int] | None = None, name: str = "x") -> Graph:
    """The graph of what a network is told, for trajectories of shape (*lead, 3, T); ValueError where they do not fit."""
    h, edge_index, edge_attr, batch = inputs
    if not isinstance(h, Tensor) or h.ndim not in (2, 3) or (h.ndim == 3 and not h.shape[1]):
        raise ValueError(f"h must be a tensor of shape [B, N, H] or [M, H], got {checks.shown(h)}")
    if lead is not None and h.shape[:-1] != tuple(lead):
        raise ValueError(f"h must have shape {(*lead, 'H')} for the points of {name}, got {tuple(h.shape)}")
    if h.ndim == 3:
        for what, given in (("edge_index", edge_index), ("batch", batch)):
            if given is not None:
                raise ValueError(f"{what} must be None where h is [B, N, H]: all are joined; got {checks.shown(given)}")
        wanted = (*h.shape[:2], h.shape[1])
        if edge_attr is not None and (not isinstance(edge_attr, Tensor) or edge_attr.shape[:-1] != wanted):
            raise ValueError(f"edge_attr must have shape {(*wanted, 'E')}, got {checks.shown(edge_attr)}")
        return Dense(inputs)
    if not _whole(edge_index) or edge_index.ndim != 2 or len(edge_index) != 2:  # type: ignore[union-attr]
        raise ValueError(
            f"edge_index must be integers of shape [2, E] where h is [M, H], got {checks.shown(edge_index)}"
        )
    edges = edge_index.shape[1]  # type: ignore[union-attr]
    if edge_attr is not None and (not isinstance(edge_attr, Tensor) or edge_attr.ndim != 2 or len(edge_attr) != edges):
        raise ValueError(f"edge_attr must have shape {(edges, 'A')}, got {checks.shown(edge_attr)}")
    if batch is not None and (not _whole(batch) or batch.shape != h.shape[:1]):
        raise ValueError(f"batch must be {len(h)} integers, the graph of each point, got {checks.shown(batch)}")
    if h.device.type == "cpu":  # elsewhere a look would wait for the device
        _look(edge_index, batch, len(h))
    return Sparse(inputs)


def _whole(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dtype in (torch.int64, torch.int32)


def _look(edge_index: Any, batch: Tensor | None, nodes: int) -> None:
    if edge_index.numel() and not bool(((edge_index >= 0) & (edge_index < nodes)).all()):
        raise ValueError(f"edge_index must be in [0, {nodes}), got {checks.shown(edge_index)}")
    if batch is None or not nodes:
        return
    if int(batch[0]) != 0 or not bool(((batch.diff() >= 0) & (batch.diff() <= 1)).all()):
        raise ValueError(f"batch must be sorted, and count graphs from 0 without gaps, got {checks.shown(batch)}")
    if edge_index.numel() and not torch.equal(batch[edge_index[0]], batch[edge_index[1]]):
        raise ValueError("edge_index must join points of one graph, as batch says, got an edge between two graphs")


def repeated(inputs: Inputs, graph: Graph, times: int) -> Inputs:
    """The same graphs so many times, as one batch."""
    if times == 1:
        return inputs
    h, edge_index, edge_attr, batch = (None if v is None else v.repeat(times, *[1] * (v.ndim - 1)) for v in inputs)
    assert h is not None
    if isinstance(graph, Dense):
        return Inputs(h, None, edge_attr)
    copies = torch.arange(times, device=h.device)
    assert inputs.edge_index is not None
    edge_index = (inputs.edge_index[:, None] + copies[:, None] * graph.nodes).flatten(1)
    batch = (graph.batch + copies[:, None] * graph.count).flatten()
    return Inputs(h, edge_index, edge_attr, batch)


def trajectory(name: str, x: Any) -> Tensor:
    """x, where it may be a trajectory."""
    if not isinstance(x, Tensor) or not x.is_floating_point():
        raise ValueError(f"{name} must be a floating-point tensor of shape {_SHAPES}, got {checks.shown(x)}")
    if x.ndim not in (3, 4) or x.shape[-2] != 3 or not x.shape[-1]:
        raise ValueError(f"{name} must have shape {_SHAPES} with T > 0, got {tuple(x.shape)}")
    return x


def finite(name: str, x: Tensor) -> None:
    """Looked for on the CPU only: elsewhere it would wait for the device."""
    if x.device.type == "cpu" and not bool(x.isfinite().all()):
        raise ValueError(f"{name} must be finite, got NaN or infinity among its coordinates")


class Frames(NamedTuple):
    """Which of the frames of a trajectory are given, and which are generated."""

    given: list[int]
    future: list[int]

    def join(self, given: Tensor, future: Tensor) -> Tensor:
        """The trajectory, each frame in its place."""
        order = [*self.given, *self.future]
        return pick(torch.cat([given, future], -1), sorted(range(len(order)), key=order.__getitem__))


def frames_of(cond_mask: Any, total: int | None = None) -> Frames:
    """The frames of a mask; ValueError unless some are given, and some are not."""
    if not isinstance(cond_mask, Tensor) or cond_mask.dtype != torch.bool or cond_mask.ndim != 1:
        raise ValueError(f"cond_mask must be a tensor of bool, shape [T], got {checks.shown(cond_mask)}")
    if total is not None and len(cond_mask) != total:
        raise ValueError(f"cond_mask must have one for each of the {total} frames, got {len(cond_mask)}")
    known = cond_mask.tolist()
    if all(known) or not any(known):
        raise ValueError(f"cond_mask must be True at some frames and False at others, got {len(known)} x {known[:1]}")
    return Frames([i for i, k in enumerate(known) if k], [i for i, k in enumerate(known) if not k])


def pick(x: Tensor, at: list[int]) -> Tensor:
    """The frames of x at these places."""
    if at == list(range(at[0], at[0] + len(at))):
        return x[..., at[0] : at[0] + len(at)]
    return x.index_select(-1, torch.tensor(at, device=x.device))
