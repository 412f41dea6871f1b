"""MKOR's inverse factors: layers of one shape are stacked, so that many small layers take few launches.

Nothing here waits for the device: whether a factor is reset, or an update is skipped, is decided there, layer by layer.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from polyak.core import checks
from polyak.core.linalg import sherman_morrison
from polyak.optim.mkor.layers import Layer

FACTORS = ("A", "G", "A_reset", "G_reset")  # a layer's: the inverse factors, and whether they start anew
STACKED = 2**25  # elements of a stack beyond which further layers get one of their own: large ones gain nothing by it


class _Stabilize(checks.Kind):
    words = "(threshold, blend)"

    def like(self, value: Any) -> bool:
        return isinstance(value, (tuple, list)) and len(value) == 2

    def __call__(self, name: str, value: Any) -> tuple[float, float]:
        if not self.like(value):
            raise ValueError(f"{name} must be {self.words}, got {checks.shown(value)}")
        blend = checks.between(f"{name}[1]", value[1], 0.0, 1.0, ends="(]")
        return checks.positive(f"{name}[0]", value[0]), blend


STABILIZE = _Stabilize()


@dataclass(frozen=True)
class Rule:
    """How a factor takes in a vector; arguments as in :class:`polyak.optim.MKOR`."""

    decay: float
    ema: bool
    threshold: float
    blend: float

    @classmethod
    def checked(cls, decay: float, update: str, stabilize: Any, dtype: torch.dtype) -> Rule:
        """From :class:`polyak.optim.MKOR`'s arguments."""
        threshold, blend = stabilize
        # A factor grows by 1 / decay at most from one look at it to the next, and float32 has to square what it gives.
        if threshold > (most := min(torch.finfo(dtype).max, 1e15) * decay):
            raise ValueError(f"stabilize[0] must be at most {most:g} for factors of {dtype}, got {threshold:g}")
        return cls(decay, update == "ema", threshold, blend)


class Side:
    """One side's inverse factors J of a stack, ``(n, d, d)``, and which of them start anew at their next update."""

    def __init__(self, count: int, size: int, dtype: torch.dtype, device: torch.device) -> None:
        eye = torch.eye(size, dtype=dtype, device=device)
        self.J = eye.expand(count, size, size).contiguous()
        self.reset = torch.ones(count, dtype=torch.bool, device=device)

    def update(self, v: Tensor, usable: Tensor, rule: Rule) -> Tensor:
        """Take in a vector (n, d) each where ``usable`` (n,), by Sherman-Morrison; returns which grew over the threshold.

        A factor that is to be reset takes in nothing: it is blended with I.
        """
        fresh, taken = usable & self.reset, usable & ~self.reset
        # J <- keep J + eye I for every case at once; then v is zero where it is not taken in, which changes nothing.
        keep, eye, weight = (
            (1 / rule.decay, 0.0, (1 - rule.decay) ** 0.5) if rule.ema else (rule.decay, 1 - rule.decay, 1.0)
        )
        J = self.J.to(v.dtype)
        J.mul_(_choose(taken, keep, fresh, 1 - rule.blend, 1.0, v.dtype)[:, None, None])
        J.diagonal(dim1=-2, dim2=-1).add_(_choose(taken, eye, fresh, rule.blend, 0.0, v.dtype)[:, None])
        sherman_morrison(J, torch.where(taken[:, None], weight * v, 0.0), out=J)
        if J is not self.J:
            self.J.copy_(J)
        self.reset &= ~fresh
        # No entry of a positive definite matrix is larger than the largest on its diagonal.
        return taken & (J.diagonal(dim1=-2, dim2=-1).amax(1) > rule.threshold)


def _choose(first: Tensor, a: float, second: Tensor, b: float, otherwise: float, dtype: torch.dtype) -> Tensor:
    scalar = torch.full((), otherwise, dtype=dtype, device=first.device)
    return torch.where(first, a, torch.where(second, b, scalar))


class Stack:
    """Layers of one shape on one device. A: factors of the inputs, G: of the outputs; ``skipped``: updates not taken in."""

    def __init__(self, layers: Sequence[Layer], dtype: torch.dtype) -> None:
        first = layers[0]
        self.layers = list(layers)
        self.biased = first.bias is not None
        self.device, self.weight_dtype = first.weight.device, first.weight.dtype
        self.A = Side(len(layers), first.inputs, dtype, self.device)
        self.G = Side(len(layers), first.outputs, dtype, self.device)
        self.skipped = torch.zeros(len(layers), dtype=torch.int64, device=self.device)
        self.entries = self._views()

    def _views(self) -> list[dict[str, Tensor]]:
        """Per layer its factors and flags, as they stand in the optimizer's state: always the same tensors."""
        tensors = (self.A.J, self.G.J, self.A.reset, self.G.reset)
        names = [f"mkor_{name}" for name in FACTORS]
        return [{n: t[i] for n, t in zip(names, tensors, strict=True)} for i in range(len(self.layers))]

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "entries"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.entries = self._views()  # of the copy's own factors

    @property
    def dtype(self) -> torch.dtype:
        """The type of arithmetic: at least float32, and that of the factors and of the weights."""
        return torch.promote_types(torch.promote_types(self.A.J.dtype, self.weight_dtype), torch.float32)

    def vectors(self, mean_loss: bool) -> tuple[Tensor, Tensor, Tensor]:
        """``a`` (n, d_A) and ``g`` (n, d_G) over all passes, zero for layers without one; and (n,), 1 or 0: whether there was."""
        like: dict[str, Any] = dict(dtype=self.dtype, device=self.device)
        no_a, no_g = torch.zeros(self.A.J.shape[-1], **like), torch.zeros(self.G.J.shape[-1], **like)
        yes, no = torch.ones((), **like), torch.zeros((), **like)
        for layer in self.layers:
            layer.collect()
        # The gradients of a mean's rows sum up over passes, since each has its share of the loss.
        # Compiled passes are counted on the device, and may be none.
        passes = [x.passes.to(**like).clamp(min=1) if isinstance(x.passes, Tensor) else x.passes for x in self.layers]
        a = [no_a if x.a is None else x.a.to(**like) / n for x, n in zip(self.layers, passes, strict=True)]
        g = [
            no_g if x.g is None else x.g.to(**like) / (1 if mean_loss else n)
            for x, n in zip(self.layers, passes, strict=True)
        ]
        present = [
            (x.passes > 0).to(**like) if isinstance(x.passes, Tensor) else yes if x.passes else no for x in self.layers
        ]
        return torch.stack(a), torch.stack(g), torch.stack(present)

    def update(self, a: Tensor, g: Tensor, present: Tensor, rule: Rule) -> None:
        """The inputs' factors first: what overflows there resets the outputs' in the same update."""
        for side, other, v in ((self.A, self.G, a), (self.G, self.A, g)):
            finite = v.isfinite().all(1)
            over = side.update(v, finite & (present > 0), rule)
            side.reset |= over
            other.reset |= over
            self.skipped += (present > 0) & ~finite

    def precondition(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Every parameter whose layer has gradients, with ``G [dW | db] A``, as long as ``[dW | db]`` was."""
        chosen = [i for i, layer in enumerate(self.layers) if _gradients(layer) is not None]
        if not chosen:
            return
        A, G = self.A.J, self.G.J
        if len(chosen) < len(self.layers):
            A, G = torch.stack([A[i] for i in chosen]), torch.stack([G[i] for i in chosen])
        pairs = [g for i in chosen if (g := _gradients(self.layers[i])) is not None]
        M = torch.stack([pair[0].flatten(1) for pair in pairs])
        if self.biased:
            M = torch.cat([M, torch.stack([pair[1] for pair in pairs]).unsqueeze(-1)], -1)
        M = M.to(self.dtype)
        U = G.to(M.dtype) @ M @ A.to(M.dtype)
        ratio = (self._size(M) / self._size(U))[:, None, None]
        # 0/0, or a gradient that is not finite: it is left as it is.
        U = torch.where(ratio.isfinite(), U * ratio, M)
        weights = (U[:, :, :-1] if self.biased else U).to(pairs[0][0].dtype).contiguous()
        for j, i in enumerate(chosen):
            layer, (weight, bias) = self.layers[i], pairs[j]
            yield layer.weight, _like(weights[j], weight)
            if layer.bias is not None:
                yield layer.bias, _like(U[j, :, -1], bias)

    def _size(self, M: Tensor) -> Tensor:
        """``||W||_F + ||b||`` of each layer: a sum of two norms, as in the official code."""
        if not self.biased:
            return torch.linalg.vector_norm(M, dim=(1, 2))
        return torch.linalg.vector_norm(M[:, :, :-1], dim=(1, 2)) + torch.linalg.vector_norm(M[:, :, -1], dim=1)


def _gradients(layer: Layer) -> tuple[Tensor, Tensor] | None:
    """Those of the weight and of the bias (the weight's again, where there is no bias); None where one is missing."""
    weight = layer.weight.grad
    bias = weight if layer.bias is None else layer.bias.grad
    return None if weight is None or bias is None else (weight, bias)


def _like(value: Tensor, grad: Tensor) -> Tensor:
    """The value with the shape, type and memory layout of the gradient in whose place it goes."""
    value = value.reshape(grad.shape)
    if value.dtype == grad.dtype and value.stride() == grad.stride():
        return value
    return torch.empty_like(grad).copy_(value)


def stacks(layers: Iterable[Layer], dtype: torch.dtype) -> list[Stack]:
    """The layers in stacks of equal shapes, with identities for factors."""
    shapes: dict[tuple[object, ...], list[list[Layer]]] = {}
    for layer in layers:
        d_in, d_out, w = layer.inputs, layer.outputs, layer.weight
        parts = shapes.setdefault((d_in, d_out, layer.bias is not None, w.device, w.dtype), [[]])
        if len(parts[-1]) * max(d_in, d_out) ** 2 >= STACKED:
            parts.append([])
        parts[-1].append(layer)
    return [Stack(part, dtype) for parts in shapes.values() for part in parts]
