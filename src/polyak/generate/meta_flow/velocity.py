"""The vector field, of a point, the time and a population's embedding."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from polyak.core import checks
from polyak.generate.meta_flow.populations import NONE_OR_SIZE, SIZE, shape_of

_TIMES = 128  # features of t


class MetaVelocity(nn.Module):
    """The field ``v_t(x | e)``: a multilayer perceptron of the embedding, the time, Fourier features of x, x and a condition.

    With ``skip`` a linear layer, ``layers - 1`` further ones of the form ``h <- SELU(W h + h)``, and a linear one to D; without,
    ``layers`` linear ones with SELU between.

    Args:
        dim: D, of a point.
        embed: W, of the embedding.
        hidden, layers, skip: see above.
        fourier: F, frequencies of the features ``cos(2 pi x B)`` and ``sin(2 pi x B)``; B [D, F] is drawn once, ``scale`` times
            standard normal, and saved with the weights.
        scale: of B.
        cond: how many numbers the condition (a treatment) has.
    """

    B: Tensor
    frequencies: Tensor

    @checks.arguments(
        dim=SIZE, embed=NONE_OR_SIZE, hidden=SIZE, layers=checks.Integer(1, 1000), fourier=NONE_OR_SIZE,
        scale=checks.positive, skip=checks.flag, cond=NONE_OR_SIZE,
    )  # fmt: skip
    def __init__(
        self,
        dim: int,
        embed: int,
        hidden: int = 512,
        layers: int = 4,
        fourier: int = 128,
        scale: float = 0.01,
        skip: bool = True,
        cond: int = 0,
    ) -> None:
        super().__init__()
        if not skip and layers < 2:
            raise ValueError(f"layers must be at least 2 with skip=False, got {layers}")
        self.dim, self.embed, self.skip, self.cond = dim, embed, skip, cond
        self.register_buffer("B", scale * torch.randn(dim, fourier))
        self.register_buffer(
            "frequencies", 10_000.0 ** (-torch.arange(_TIMES // 2) / (_TIMES // 2 - 1)), persistent=False
        )
        self.first = nn.Linear(embed + cond + _TIMES + 2 * fourier + dim, hidden)
        self.middle = nn.ModuleList(nn.Linear(hidden, hidden) for _ in range(layers - (1 if skip else 2)))
        self.last = nn.Linear(hidden, dim)

    def forward(self, t: float | Tensor, x: Tensor, e: Tensor, cond: Tensor | None = None) -> Tensor:
        """The velocities, [P, N, D], at the points x, [P, N, D], of populations with embeddings e, [P, W].

        ``t`` is one time or one for each point, [P, N]; ``cond`` is [P, C].
        """
        if x.ndim != 3 or x.shape[2] != self.dim:
            raise ValueError(f"x must have shape [P, N, {self.dim}], got {tuple(x.shape)}")
        if e.shape != (len(x), self.embed):
            raise ValueError(f"e must have shape {(len(x), self.embed)}, got {tuple(e.shape)}")
        if shape_of(cond) != ((len(x), self.cond) if self.cond else None):
            raise ValueError(f"cond must have shape {(len(x), self.cond)} (cond={self.cond}), got {shape_of(cond)}")
        t = torch.as_tensor(t, dtype=x.dtype, device=x.device)
        if t.ndim and t.shape != x.shape[:2]:
            raise ValueError(f"t must be one time, or of shape {tuple(x.shape[:2])}, got {tuple(t.shape)}")
        angle, wave = (t if t.ndim else t.expand(1, 1))[..., None] * self.frequencies, 2 * math.pi * (x @ self.B)
        told = [e[:, None], *([] if cond is None else [cond.to(x.dtype)[:, None]])]
        parts = [*told, torch.cat([angle.sin(), angle.cos()], -1), torch.cat([wave.cos(), wave.sin(), x], -1)]
        # Each part is multiplied at its own size: what all points of a population share, once.
        h: Any = self.first.bias
        for part, weight in zip(parts, self.first.weight.split([part.shape[-1] for part in parts], 1), strict=True):
            h = h + part @ weight.T
        h = F.selu(h)
        for layer in self.middle:
            h = F.selu(layer(h) + h if self.skip else layer(h))
        return self.last(h)
