"""Networks of two heads: a pair of perceptrons, and a transformer."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from polyak.core import checks
from polyak.generate.marginalization.values import MANY, SIZE

_DEPTH = checks.Integer(1, 1000)


class _Residual(nn.Module):
    """A perceptron whose inner layers add to what they are given: ``h <- h + LeakyReLU(W h + b)``."""

    def __init__(self, inputs: int, hidden: int, outputs: int, layers: int) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(inputs, hidden), nn.Linear(hidden, outputs)
        self.middle = nn.ModuleList(nn.Linear(hidden, hidden) for _ in range(layers - 1))

    def forward(self, x: Tensor) -> Tensor:
        h = F.leaky_relu(self.first(x))
        for layer in self.middle:
            h = h + F.leaky_relu(layer(h))
        return self.last(h)


class MLPDual(nn.Module):
    """Two residual perceptrons that share nothing, one for marginals and one for conditionals (the paper's for Ising models).

    Their input is one-hot, K + 1 numbers for each position.

    Args:
        num_values: K.
        length: D.
        hidden: width.
        layers: hidden layers.
    """

    @checks.arguments(num_values=MANY, length=SIZE, hidden=SIZE, layers=_DEPTH)
    def __init__(self, num_values: int, length: int, hidden: int = 2048, layers: int = 4) -> None:
        super().__init__()
        self.num_values, self.length = num_values, length
        inputs = (num_values + 1) * length
        self.of_marginals = _Residual(inputs, hidden, 1, layers)
        self.of_conditionals = _Residual(inputs, hidden, length * num_values, layers)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """f, [B], and logits, [B, D, K], for x of int64, [B, D], 0 for unknown."""
        return self.marginal(x), self.conditional(x)

    def marginal(self, x: Tensor) -> Tensor:
        """f alone."""
        return self.of_marginals(self._inputs(x))[:, 0]

    def conditional(self, x: Tensor) -> Tensor:
        """The logits alone."""
        return self.of_conditionals(self._inputs(x)).unflatten(1, (self.length, self.num_values))

    def _inputs(self, x: Tensor) -> Tensor:
        values = torch.arange(self.num_values + 1, device=x.device)
        return (x[..., None] == values).flatten(1).to(self.of_marginals.first.weight.dtype)


class TransformerDual(nn.Module):
    """A transformer whose first token is none of the positions: from it come marginals, from the others conditionals.

    Args:
        num_values: K.
        length: D.
        dim: of a token.
        heads: of attention; dim is a multiple of them.
        layers: of the transformer, normalized before attention, without dropout.
        feedforward: width of its perceptrons, and of the head of marginals.
    """

    @checks.arguments(num_values=MANY, length=SIZE, dim=SIZE, heads=SIZE, layers=_DEPTH, feedforward=SIZE)
    def __init__(
        self,
        num_values: int,
        length: int,
        dim: int = 768,
        heads: int = 12,
        layers: int = 12,
        feedforward: int = 3072,
    ) -> None:
        super().__init__()
        if dim % heads:
            raise ValueError(f"dim must be a multiple of heads={heads}, got {dim}")
        self.values = nn.Embedding(num_values + 1, dim)
        self.places = nn.Parameter(0.02 * torch.randn(length + 1, dim))
        layer = nn.TransformerEncoderLayer(
            dim, heads, feedforward, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.body = nn.TransformerEncoder(layer, layers, nn.LayerNorm(dim), enable_nested_tensor=False)
        self.of_marginals = nn.Sequential(nn.Linear(dim, feedforward), nn.GELU(), nn.Linear(feedforward, 1))
        self.of_conditionals = nn.Sequential(nn.Linear(dim, dim), nn.GELU(), nn.Linear(dim, num_values))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """f, [B], and logits, [B, D, K], for x of int64, [B, D], 0 for unknown."""
        tokens = F.pad(self.values(x), (0, 0, 1, 0)) + self.places
        h = self.body(tokens)
        return self.of_marginals(h[:, 0])[:, 0], self.of_conditionals(h[:, 1:])
