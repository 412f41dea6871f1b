"""How far generated trajectories are from true ones, and their coordinates' law from theirs."""

from __future__ import annotations

import torch
from torch import Tensor

from polyak.core import checks

PATHS = checks.Tensor(floating=True, least_ndim=2)
BATCH = checks.Tensor(ndim=1)


@checks.arguments(samples=PATHS, truth=PATHS, batch=BATCH | None, best=checks.flag)
def ade(samples: Tensor, truth: Tensor, batch: Tensor | None = None, *, best: bool = False) -> float:
    """Average displacement error: the mean distance of points from where they truly are, over points and frames, then graphs.

    Args:
        samples: [..., 3, T], or K for each truth, [K, ..., 3, T].
        truth: [..., 3, T]: [B, N, 3, T] of B graphs; [M, 3, T] of one, or of those that ``batch`` [M] says.
        best: of K samples the nearest for each graph, not their mean.

    Raises:
        ValueError: shapes that do not fit.
    """
    return _error(_distances(samples, truth).mean(-1), truth, batch, best)


@checks.arguments(samples=PATHS, truth=PATHS, batch=BATCH | None, best=checks.flag)
def fde(samples: Tensor, truth: Tensor, batch: Tensor | None = None, *, best: bool = False) -> float:
    """Final displacement error: the mean distance in the last frame. Arguments as for :func:`ade`."""
    return _error(_distances(samples, truth)[..., -1], truth, batch, best)


def _distances(samples: Tensor, truth: Tensor) -> Tensor:
    """[K, ..., T]"""
    if truth.shape[-2] != 3 or not truth.numel() or not samples.numel():
        raise ValueError(f"truth must have shape [..., 3, T], and samples and truth elements, got {tuple(truth.shape)}")
    samples = samples if samples.ndim > truth.ndim else samples[None]
    if samples.shape[1:] != truth.shape:
        raise ValueError(f"samples must be (K of) {tuple(truth.shape)}, as truth is, got {tuple(samples.shape)}")
    return torch.linalg.vector_norm(samples - truth, dim=-2)


def _error(distance: Tensor, truth: Tensor, batch: Tensor | None, best: bool) -> float:
    """Of distances of points, [K, ...]."""
    if batch is not None:
        if truth.ndim != 3 or batch.shape != truth.shape[:1] or batch.dtype != torch.long or int(batch.min()) < 0:
            raise ValueError(
                f"batch must be the graph of each of the points of truth [M, 3, T], got {checks.shown(batch)}"
            )
        _, graph, sizes = batch.unique(return_inverse=True, return_counts=True)
        total = distance.new_zeros(len(distance), len(sizes)).index_add(1, graph, distance)
        graphs = total / sizes
    else:
        graphs = (distance.mean(-1) if truth.ndim > 2 else distance).reshape(len(distance), -1)
    return (graphs.amin(0) if best else graphs).mean().item()


@checks.arguments(samples=PATHS, truth=PATHS, bins=checks.Integer(1, 100_000))
def marginal_score(samples: Tensor, truth: Tensor, *, bins: int = 50) -> float:
    """The mean absolute difference of the densities of coordinates, in bins over the range of the true ones; the mean of three.

    Args:
        samples, truth: [..., 3, T]; all points and frames count alike, so that numbers of graphs may differ.

    Raises:
        ValueError: not three coordinates, or one that is the same everywhere in ``truth``.
    """
    scores = []
    for i in range(3):
        made, true = _coordinate("samples", samples, i), _coordinate("truth", truth, i)
        low, high = true.min().item(), true.max().item()
        if not low < high < float("inf"):
            raise ValueError(f"truth must be finite and vary in all coordinates, got [{low:g}, {high:g}] in number {i}")
        densities = [
            torch.histc(one, bins, low, high).double() * (bins / ((high - low) * one.numel())) for one in (made, true)
        ]
        scores.append((densities[0] - densities[1]).abs().mean())
    return torch.stack(scores).mean().item()


def _coordinate(name: str, x: Tensor, i: int) -> Tensor:
    if x.shape[-2] != 3 or not x.numel() or not bool(x.isfinite().all()):
        raise ValueError(f"{name} must be finite, of shape [..., 3, T], got {checks.shown(x)}")
    return x.select(-2, i).flatten().double()
