"""K-FAC with exact factors, the second-order reference of claims about its successors (Martens & Grosse, arXiv 1503.05671).

For Linear layers, as the public implementations do it: ``A`` and ``G`` are moving averages of ``E[a a^T]`` and ``E[g g^T]`` over
the rows of a batch (a with the bias's 1, g the gradients of the mean loss times the rows), both are damped and inverted every
``every`` steps, and ``U = (G + damping I)^-1 [dW | db] (A + damping I)^-1`` is scaled by
``min(1, sqrt(clip / (lr^2 sum <U, grad>)))``.

This module imports torch: a claim imports it inside its trial function.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class KFAC:
    """Changes the gradients of a model's Linear layers, all with bias, in place, before a first-order optimizer steps."""

    def __init__(
        self, model: nn.Module, *, damping: float = 1e-3, decay: float = 0.95, every: int = 10, clip: float = 1e-3
    ) -> None:
        self.layers = [m for m in model.modules() if isinstance(m, nn.Linear)]
        self.damping, self.decay, self.every, self.clip = damping, decay, every, clip
        self.steps = 0
        self.factors: list[list[Tensor]] = [
            [torch.eye(n, device=m.weight.device, dtype=m.weight.dtype) for n in _sizes(m)] for m in self.layers
        ]
        self.inverses = [[f.clone() for f in pair] for pair in self.factors]
        self._inputs: dict[nn.Module, Tensor] = {}
        self._outputs: dict[nn.Module, Tensor] = {}
        for layer in self.layers:
            layer.register_forward_hook(self._watch)

    def _watch(self, layer: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        if output.requires_grad and self.steps % self.every == 0:
            self._inputs[layer] = F.pad(args[0].detach(), (0, 1), value=1.0)
            output.register_hook(lambda grad: self._outputs.__setitem__(layer, grad.detach() * len(grad)))

    @torch.no_grad()
    def precondition(self, lr: float) -> None:
        """Update the factors where that is due, and replace the gradients."""
        if self.steps % self.every == 0:
            self.update()
        directions, product = [], self.layers[0].weight.new_zeros(())
        for layer, (A, G) in zip(self.layers, self.inverses, strict=True):
            weight, bias = layer.weight.grad, layer.bias.grad
            assert weight is not None
            assert bias is not None
            grad = torch.cat([weight, bias[:, None]], 1)
            directions.append(G @ grad @ A)
            product += (directions[-1] * grad).sum()
        scale = (self.clip / (lr**2 * product)).sqrt().clamp(max=1.0)
        for layer, U in zip(self.layers, directions, strict=True):
            layer.weight.grad, layer.bias.grad = U[:, :-1] * scale, U[:, -1] * scale
        self.steps += 1

    def update(self) -> None:
        """Take in the last batch, and invert: O(rows d^2 + d^3) a layer."""
        for i, layer in enumerate(self.layers):
            for side, rows in enumerate((self._inputs[layer], self._outputs[layer])):
                factor = self.factors[i][side].lerp_(rows.T @ rows / len(rows), 1 - self.decay)
                damped = factor + self.damping * torch.eye(len(factor), device=factor.device, dtype=factor.dtype)
                self.inverses[i][side] = torch.cholesky_inverse(torch.linalg.cholesky(damped))


def _sizes(layer: nn.Linear) -> tuple[int, int]:
    return layer.in_features + 1, layer.out_features
