"""The statistics of a layer that MKOR uses: one mean vector of its inputs, and one of the gradients at its outputs.

    a = mean over rows of clamp([x, 1])           g = mean over rows of clamp(N dL/dy),  N rows

Rows are the inputs of a Linear layer (tokens), or the samples of a convolution, each averaged over its positions.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from polyak.optim.mkor.layers import Layer


def input_mean(layer: Layer, x: Tensor, clip: float, dtype: torch.dtype) -> Tensor:
    """``a`` of one pass, of shape (inputs,): a mean over rows whose entries are clamped to ``+-clip``, with the bias's 1."""
    module = layer.module
    rows = x.detach().reshape(-1, x.shape[-1]) if isinstance(module, nn.Linear) else mean_patches(module, x.detach())
    mean = rows.to(dtype).clamp(-clip, clip).mean(0)
    return mean if layer.bias is None else F.pad(mean, (0, 1), value=min(1.0, clip))


def output_mean(
    layer: Layer, grad: Tensor, clip: float, dtype: torch.dtype, loss_scale: Tensor | None, mean_loss: bool
) -> Tensor:
    """``g`` of one pass, of shape (outputs,), of the gradient at the layer's output and the scale that it has from a scaler."""
    if isinstance(layer.module, nn.Linear):
        rows = grad.detach().reshape(-1, grad.shape[-1]).to(dtype)
        factor = 1.0
    else:
        maps = grad.detach() if grad.dim() == 4 else grad.detach().unsqueeze(0)
        rows, factor = maps.sum((2, 3), dtype=dtype), 1 / maps[0, 0].numel()
    rows = rows * (factor * (len(rows) if mean_loss else 1))
    if loss_scale is not None:
        rows = rows / loss_scale.to(dtype)
    return rows.clamp_(-clip, clip).mean(0)


def mean_patches(module: nn.Conv2d, x: Tensor) -> Tensor:
    """The patches that a convolution sees, averaged over its positions: (N, C, H, W) or (C, H, W) to (N, C kh kw)."""
    x = x if x.dim() == 4 else x.unsqueeze(0)
    if module.padding != 0 and module.padding not in ("valid", (0, 0)):
        mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
        x = F.pad(x, _padding(module), mode=mode)
    (kh, kw), (sh, sw), (dh, dw) = module.kernel_size, module.stride, module.dilation
    # A view of all patches: no copy of the input for each element of the kernel, as F.unfold makes. (as_strided() would be one,
    # too, but what is compiled may lay its input out otherwise.)
    patches = x.unfold(2, dh * (kh - 1) + 1, sh).unfold(3, dw * (kw - 1) + 1, sw)[..., ::dh, ::dw]
    return patches.mean((2, 3), dtype=torch.promote_types(x.dtype, torch.float32)).flatten(1)


def _padding(module: nn.Conv2d) -> list[int]:
    """Left, right, top, bottom."""
    if isinstance(module.padding, str):
        totals = [d * (k - 1) for d, k in zip(module.dilation, module.kernel_size, strict=True)]
        (top, bottom), (left, right) = ((t // 2, t - t // 2) for t in totals)
        return [left, right, top, bottom]
    high, wide = module.padding
    return [wide, wide, high, high]
