"""A population's embedding, by graph convolutions over its points; no graph library is needed."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from polyak.core import checks
from polyak.generate.meta_flow.populations import NONE_OR_SIZE, SIZE, population, shape_of

_DENSE = 2048  # points up to which averages over neighbours are products with a dense matrix
_AT_ONCE = 2**24  # distances, or features of neighbours, that are in memory at a time


class PopulationEncoder(nn.Module):
    """A population's embedding: graph convolutions over its points, their mean, and its direction (section 4.2 of the paper).

    A layer is linear in the average of a point and its k nearest, by ``x``, with a ReLU before each but the first. That is a graph
    convolution ``D^-1/2 (A + I) D^-1/2``: every point hears from k others, so that all degrees are k + 1. The embedding does
    not depend on the points' order, unless distances are equal.

    Args:
        dim: D, of a point.
        width: W, of the layers and the embedding.
        layers: how many.
        k: neighbours; in a population of k points or fewer all others, with a warning. 0: each point for itself (DeepSets).
        pool: over the points.
        normalize: divide by the norm, so that embeddings lie on a sphere (one that is zero stays zero).
        features: how many each point has beside its place: they enter the first layer, and do not decide who is near.
    """

    @checks.arguments(
        dim=SIZE, width=SIZE, layers=checks.Integer(1, 1000), k=checks.Integer(0), pool=checks.Choice("mean"),
        normalize=checks.flag, features=NONE_OR_SIZE,
    )  # fmt: skip
    def __init__(
        self,
        dim: int,
        width: int = 64,
        layers: int = 3,
        k: int = 50,
        pool: str = "mean",
        normalize: bool = True,
        *,
        features: int = 0,
    ) -> None:
        super().__init__()
        self.dim, self.k, self.pool, self.normalize, self.features = dim, k, pool, normalize, features
        sizes = [dim + features, *[width] * layers]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(sizes))

    def forward(self, x: Tensor, mask: Tensor | None = None, features: Tensor | None = None) -> Tensor:
        """The embeddings, [P, W], of populations x, [P, N, D], with features [P, N, F]."""
        x, points = population("x", x, mask, self.dim, self.k + 1)
        h = x
        if self.features or features is not None:
            wanted = (*x.shape[:2], self.features)
            if not isinstance(features, Tensor) or features.shape != wanted or not self.features:
                raise ValueError(
                    f"features must have shape {wanted} (features={self.features}), got {shape_of(features)}"
                )
            h = torch.cat([x, torch.where(points[..., None], features, 0)], -1)
        average = _averaging(x, points, min(self.k, x.shape[1] - 1))
        for i, layer in enumerate(self.layers):
            h = layer(average(F.relu(h) if i else h))
        e = torch.where(points[..., None], h, 0).sum(1) / points.sum(1, keepdim=True)
        if not self.normalize:
            return e
        return e / torch.linalg.vector_norm(e, dim=1, keepdim=True).clamp(min=max(1e-12, torch.finfo(e.dtype).tiny))


def _averaging(x: Tensor, points: Tensor, k: int) -> Callable[[Tensor], Tensor]:
    """h [P, N, C] -> the mean of each point's h and of its k nearest points', the point itself not counted among them."""
    if k < 1:
        return lambda h: h
    populations, n, _ = x.shape
    place = x.detach().float() if x.dtype in (torch.float16, torch.bfloat16) else x.detach()
    rows = max(1, _AT_ONCE // max(1, populations * n))
    found = []
    with torch.no_grad():
        for start in range(0, n, rows):
            d = torch.cdist(place[:, start : start + rows], place, compute_mode="donot_use_mm_for_euclid_dist")
            d.masked_fill_(~points[:, None], math.inf)
            d.diagonal(start, 1, 2).fill_(math.inf)
            found.append(d.topk(k, largest=False))
        near = torch.cat([one.indices for one in found], 1)
        real = torch.cat([one.values for one in found], 1).isfinite()
    weight = 1 / (1 + real.sum(2, keepdim=True)).to(x.dtype)
    if n <= _DENSE:
        matrix = torch.zeros(populations, n, n, dtype=x.dtype, device=x.device).scatter_(2, near, real.to(x.dtype))
        matrix.diagonal(0, 1, 2).fill_(1)
        matrix *= weight
        return lambda h: matrix @ h

    def gathered(h: Tensor) -> Tensor:
        which = torch.arange(populations, device=h.device)[:, None, None]
        size = max(1, _AT_ONCE // (populations * k * h.shape[2]))
        sums = [
            torch.where(r[..., None], h[which, i], 0).sum(2)
            for i, r in zip(near.split(size, 1), real.split(size, 1), strict=True)
        ]
        return weight * (h + torch.cat(sums, 1))

    return gathered
