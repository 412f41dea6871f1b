"""The forward hooks of MKOR's layers: eager passes call the optimizer, compiled ones sum up inside their graph.

A hook that calls Python would break a compiled graph at every layer. There the module's output goes through a function that is
the identity, whose backward pass adds to tensors of the layer; the optimizer takes the sums in at its step.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from polyak.optim.mkor import statistics
from polyak.optim.mkor.layers import Layer


class Gate:
    """What a compiled pass has to know of the optimizer. ``open`` alone changes in a training: two graphs serve all of it."""

    def __init__(self, clip: float, mean_loss: bool) -> None:
        self.open = True
        self.clip, self.mean_loss = clip, mean_loss
        self.scaler: Any = None
        self.silent = 0  # updates without a pass, as long as there was none
        self.scaled = False  # what a compiled pass may look at: a GradScaler's methods break a graph
        self.loss_scale: Tensor | None = None

    def shut(self) -> None:
        self.open = False

    def scale(self) -> Tensor | None:
        """The scale that gradients have from the scaler: its own tensor, which is written in place from step to step."""
        return self.scaler._get_scale_async() if self.scaler is not None and self.scaler.is_enabled() else None

    def prime(self, layers: Sequence[Layer]) -> None:
        """Have the scaler make its tensor now, not with the first loss that it scales: a compiled pass comes before."""
        self.scaled = False
        if self.scaler is not None and self.scaler.is_enabled() and layers:
            self.scaled, device = True, layers[0].weight.device
            if device.type == getattr(self.scaler, "_device", device.type):
                self.scaler.scale(torch.zeros((), device=device))
        self.loss_scale = self.scale()

    def look_for_passes(self, layers: Sequence[Layer]) -> None:
        """Warn where updates of the factors find that no layer has ever been seen."""
        seen = any(layer.a is not None for layer in layers)
        self.silent = -1 if seen or self.silent < 0 else self.silent + 1
        if self.silent == 2:
            warnings.warn(
                "MKOR has seen no pass of its layers, so that it does nothing. Was the model compiled before? "
                "torch.compile does not look for hooks that come later: make the optimizer first",
                stacklevel=6,
            )


@contextmanager
def aside(layers: Sequence[Layer]) -> Iterator[None]:
    """Compiled backward passes inside add to the layers' sums all the same: leave those out."""
    used = [layer for layer in layers if layer.tally is not None and layer.tally.used]
    for layer in used:
        layer.collect()
    try:
        yield
    finally:
        for layer in used:
            if layer.tally is not None:
                layer.tally.zero()
                layer.tally.used = True  # passes from before may still have their backward pass


class Watch:
    """The forward hook of a layer. Copies of the module, by deepcopy or pickle, get one that does nothing."""

    def __init__(
        self, see: Callable[..., None] | None = None, layer: Layer | None = None, gate: Gate | None = None
    ) -> None:
        self._see = None if see is None else weakref.WeakMethod(see)  # the module must not keep the optimizer alive
        self._layer, self._gate = layer, gate

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Tensor | None:
        if self._layer is None or self._gate is None or torch.compiler.is_exporting():
            return None
        if not (torch.is_grad_enabled() and isinstance(output, Tensor) and output.requires_grad):
            return None
        x = args[0] if args else kwargs["input"]
        if not torch.compiler.is_compiling():
            self._eager(x, output)
            return None
        if not self._gate.open or not x.numel():
            return None
        tally = self._layer.tally
        unknown = self._gate.scaled and self._gate.loss_scale is None
        if tally is None or tally.g.device != output.device or unknown:
            self._apart(x, output)  # type: ignore[call-arg]
            return None
        tally.used = True
        return _tap(output, self._a(x), tally.a, tally.g, tally.passes, self._gate.loss_scale, self._layer, self._gate)

    def _a(self, x: Tensor) -> Tensor:
        assert self._layer is not None
        assert self._gate is not None
        return statistics.input_mean(self._layer, x, self._gate.clip, torch.promote_types(x.dtype, torch.float32))

    def _eager(self, x: Tensor, output: Tensor) -> None:
        if self._see is not None and (see := self._see()) is not None:
            see(self._layer, x, output)

    @torch.compiler.disable  # type: ignore[misc]
    def _apart(self, x: Tensor, output: Tensor) -> None:
        self._eager(x, output)

    def __deepcopy__(self, memo: dict[int, Any]) -> Watch:
        return Watch()

    def __reduce__(self) -> tuple[type[Watch], tuple[()]]:
        return Watch, ()


class Tap(torch.autograd.Function):
    """The identity; its backward pass adds the means of one pass to a layer's sums."""

    @staticmethod
    def forward(
        ctx: Any,
        output: Tensor,
        a: Tensor,
        sum_a: Tensor,
        sum_g: Tensor,
        passes: Tensor,
        scale: Any,
        layer: Any,
        gate: Any,
    ) -> Tensor:
        ctx.save_for_backward(a)
        ctx.sums, ctx.scale, ctx.layer, ctx.gate = (sum_a, sum_g, passes), scale, layer, gate
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        (a,), (sum_a, sum_g, passes) = ctx.saved_tensors, ctx.sums
        dtype = torch.promote_types(grad.dtype, torch.float32)
        sum_a.add_(a)
        sum_g.add_(
            statistics.output_mean(ctx.layer, grad.detach(), ctx.gate.clip, dtype, ctx.scale, ctx.gate.mean_loss)
        )
        passes.add_(1)
        return grad, None, None, None, None, None, None, None


_tap: Any = Tap.apply
