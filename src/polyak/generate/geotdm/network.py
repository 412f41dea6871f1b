"""EGTN, the equivariant network over points and frames; and the reference trajectory that it makes of the frames that are given."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from polyak.core import checks
from polyak.generate.geotdm.graphs import Dense, Graph, Inputs, frames_of, graph_of, pick, trajectory
from polyak.generate.process import wide

SIZE = checks.Integer(1, 100_000)
_TINY = 1e-8  # under the root of a squared distance, whose slope at 0 is infinite


def waves(times: Tensor, dim: int, dtype: torch.dtype) -> Tensor:
    """Sines, and then cosines, of times at ``dim / 2`` frequencies from 1 to 1/10,000: [..., dim]."""
    half = dim // 2
    place = torch.arange(half, dtype=wide(times.device), device=times.device)
    angle = times[..., None] * torch.exp(place * (-math.log(10_000.0) / (half - 1)))
    return torch.cat([angle.sin(), angle.cos()], -1).to(dtype)


def mlp(into: int, hidden: int, out: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(into, hidden), nn.SiLU(), nn.Linear(hidden, out))


class Spatial(nn.Module):
    """Messages between points, in each frame by itself, as in EGNN (arXiv 2102.09844):

    m_ij = MLP(h_i, h_j, |x_i - x_j|^2, a_ij),   h_i <- MLP(h_i, sum_j m_ij),
    x_i <- x_i + mean_j MLP(m_ij) (x_i - x_j) / (|x_i - x_j| + 1).
    """

    def __init__(self, hidden: int, edge_dim: int) -> None:
        super().__init__()
        self.sizes = [hidden, hidden, 1, edge_dim]
        self.edge = mlp(sum(self.sizes), hidden, hidden)
        self.coordinate = mlp(hidden, hidden, 1)
        self.node = mlp(2 * hidden, hidden, hidden)

    def forward(self, x: Tensor, h: Tensor, graph: Graph) -> tuple[Tensor, Tensor]:
        """x [..., T, 3] and h [..., T, hidden]."""
        first: Any = self.edge[0]
        of_receiver, of_sender, of_square, of_edge = first.weight.split(self.sizes, 1)
        d = graph.receiving(x) - graph.sending(x)
        square = d.square().sum(-1, keepdim=True)
        # What a point says is multiplied once, not once for each of its edges.
        m = graph.receiving(h @ of_receiver.T + first.bias) + graph.sending(h @ of_sender.T) + square * of_square[:, 0]
        if graph.edges is not None:
            m = m + (graph.edges.to(x.dtype) @ of_edge.T)[..., None, :]
        m = F.silu(self.edge[2](F.silu(m)))
        x = x + graph.mean(self.coordinate(m) / ((square + _TINY).sqrt() + 1) * d)
        return x, self.node(torch.cat([h, graph.total(m)], -1))


class Temporal(nn.Module):
    """Attention between frames, for each point by itself, with an embedding r of the time between two:

    a_ts = softmax_s q_t . (k_s + r_ts),   h_t <- h_t + sum_s a_ts (v_s + r_ts),   x_t <- x_t + sum_s a_ts MLP(v_s) (x_t - x_s).
    """

    def __init__(self, hidden: int, time_dim: int) -> None:
        super().__init__()
        self.query, self.key, self.value = (mlp(hidden, hidden, hidden) for _ in range(3))
        self.coordinate = mlp(hidden, hidden, 1)
        self.relative = nn.Linear(time_dim, hidden)

    def forward(self, x: Tensor, h: Tensor, between: Tensor) -> tuple[Tensor, Tensor]:
        """x [..., T, 3] and h [..., T, hidden]; ``between`` [T, T, time_dim], waves of the time from s to t."""
        r, q, v = self.relative(between), self.query(h), self.value(h)
        # r is the same for all points, and is never put beside each of them.
        attention = F.softmax(q @ self.key(h).mT + torch.einsum("...th,tsh->...ts", q, r), -1)
        weight = attention * self.coordinate(v).mT
        x = x + weight.sum(-1, keepdim=True) * x - weight @ x
        return x, h + attention @ v + torch.einsum("...ts,tsh->...th", attention, r)


class EGTN(nn.Module):
    """The equivariant geometric trajectory network: ``layers`` times :class:`Spatial` and :class:`Temporal`.

    Its output turns, mirrors and permutes with its input, and does not move with it: it is equivariant under E(3), and therefore
    cannot tell a molecule from its mirror image.

    Args:
        node_dim, edge_dim: sizes H of a point's features and E of an edge's; with ``edge_dim=0`` there is no ``edge_attr``.
        hidden: size of all layers.
        layers: of the network; ``ref_layers`` of the reference.
        time_dim: size of the embeddings of the diffusion's step, and of the time between frames; even.
        future: frames that the reference trajectory has.
    """

    @checks.arguments(
        node_dim=SIZE, edge_dim=checks.Integer(0, 100_000), hidden=SIZE, layers=checks.Integer(1, 1000),
        time_dim=checks.Integer(4, 100_000), ref_layers=checks.Integer(1, 1000), future=SIZE,
    )  # fmt: skip
    def __init__(
        self,
        node_dim: int,
        edge_dim: int,
        hidden: int = 128,
        layers: int = 6,
        time_dim: int = 32,
        ref_layers: int = 2,
        future: int = 20,
    ) -> None:
        super().__init__()
        if time_dim % 2:
            raise ValueError(f"time_dim must be even, got {time_dim}")
        self.node_dim, self.edge_dim, self.time_dim, self.future = node_dim, edge_dim, time_dim, future
        self.enter = nn.Linear(node_dim + time_dim, hidden)
        self.blocks = nn.ModuleList(Block(hidden, edge_dim, time_dim) for _ in range(layers))
        self.ref_enter = nn.Linear(node_dim, hidden)
        self.ref_blocks = nn.ModuleList(Block(hidden, edge_dim, time_dim) for _ in range(ref_layers))
        self.gamma = nn.Parameter(torch.ones(future))

    def forward(
        self,
        x: Tensor,
        tau: Tensor,
        h: Tensor,
        edge_index: Tensor | None = None,
        edge_attr: Tensor | None = None,
        batch: Tensor | None = None,
        cond_mask: Tensor | None = None,
    ) -> Tensor:
        """The noise in the frames that are generated, [..., 3, T_f]; in all of them without a mask.

        Args:
            x: all frames in their places, [B, N, 3, T] or [M, 3, T]: those that are given clean, the others noisy.
            tau: the step of the diffusion of each graph, from 0, [B]; or a time between two steps.
            h, edge_index, edge_attr, batch: the graphs, see :mod:`polyak.generate.geotdm`.
            cond_mask: bool [T], True at frames that are given.

        Raises:
            ValueError: shapes that do not fit each other, or the network.
        """
        graph = self._graph("x", x, Inputs(h, edge_index, edge_attr, batch))
        known = (
            isinstance(graph, Dense) or x.device.type == "cpu"
        )  # elsewhere counting graphs would wait for the device
        if not isinstance(tau, Tensor) or tau.ndim != 1 or (known and len(tau) != graph.count):
            raise ValueError(f"tau must have shape [B], one step for each graph, got {checks.shown(tau)}")
        of_node, of_step = self.enter.weight.split([self.node_dim, self.time_dim], 1)
        step = waves(tau.to(x.device, wide(x.device)), self.time_dim, x.dtype)
        entered = h.to(x.dtype) @ of_node.T + graph.at_nodes(step @ of_step.T) + self.enter.bias
        times = torch.arange(x.shape[-1], dtype=wide(x.device), device=x.device)
        y, _ = through(self.blocks, x.mT, entered, graph, times, self.time_dim)
        eps = (y - x.mT).mT
        return eps if cond_mask is None else pick(eps, frames_of(cond_mask, x.shape[-1]).future)

    def reference(
        self,
        x_given: Tensor,
        h: Tensor,
        edge_index: Tensor | None = None,
        edge_attr: Tensor | None = None,
        batch: Tensor | None = None,
        cond_mask: Tensor | None = None,
    ) -> Tensor:
        """The reference trajectory, [..., 3, future]: an affine combination of the frames that are given.

        With x~ and h the output of the reference's own layers on them, and w_s the mean of h over its channels in frame s:

            x_r[f] = sum_s W_sf x~_s,   W_sf = w_s gamma_f for all frames but the last given, whose weight makes the sum 1.

        Args:
            x_given: the frames that are given, [B, N, 3, T_c] or [M, 3, T_c].
            h, edge_index, edge_attr, batch: as for :meth:`forward`.
            cond_mask: bool [T], which says when these frames were: at 0, 1, ..., T_c - 1 if it is left out.
        """
        graph = self._graph("x_given", x_given, Inputs(h, edge_index, edge_attr, batch))
        count = x_given.shape[-1]
        when = list(range(count)) if cond_mask is None else frames_of(cond_mask).given
        if len(when) != count:
            raise ValueError(f"cond_mask must be True at the {count} frames of x_given, got {len(when)}")
        times = torch.arange(when[0], when[0] + count, dtype=wide(x_given.device), device=x_given.device)
        if when != list(range(when[0], when[0] + count)):
            times = torch.tensor(when, dtype=wide(x_given.device), device=x_given.device)
        entered = self.ref_enter(h.to(x_given.dtype))
        y, hidden = through(self.ref_blocks, x_given.mT, entered, graph, times, self.time_dim)
        weight = hidden.mean(-1, keepdim=True)[..., :-1, :] * self.gamma  # [..., T_c - 1, future]
        last = y[..., -1:, :]
        return (last + weight.mT @ (y[..., :-1, :] - last)).mT

    def _graph(self, name: str, x: Tensor, inputs: Inputs) -> Graph:
        graph = graph_of(inputs, trajectory(name, x).shape[:-2], name)
        if inputs.h.shape[-1] != self.node_dim:
            raise ValueError(f"h must have {self.node_dim} features (node_dim), got {inputs.h.shape[-1]}")
        edge_attr = inputs.edge_attr
        if (0 if edge_attr is None else edge_attr.shape[-1]) != self.edge_dim:
            raise ValueError(f"edge_attr must have {self.edge_dim} features (edge_dim), got {checks.shown(edge_attr)}")
        return graph


class Block(nn.Module):
    """A layer between points, and one between frames."""

    def __init__(self, hidden: int, edge_dim: int, time_dim: int) -> None:
        super().__init__()
        self.spatial, self.temporal = Spatial(hidden, edge_dim), Temporal(hidden, time_dim)

    def forward(self, x: Tensor, h: Tensor, graph: Graph, between: Tensor) -> tuple[Tensor, Tensor]:
        return self.temporal(*self.spatial(x, h, graph), between)


def through(
    blocks: Iterable[Any], x: Tensor, h: Tensor, graph: Graph, times: Tensor, time_dim: int
) -> tuple[Tensor, Tensor]:
    """x [..., T, 3] and features h [..., hidden], the same in all frames, after all blocks."""
    between = waves(times[:, None] - times, time_dim, x.dtype)
    h = h[..., None, :].expand(*h.shape[:-1], x.shape[-2], h.shape[-1])
    for block in blocks:
        x, h = block(x, h, graph, between)
    return x, h
