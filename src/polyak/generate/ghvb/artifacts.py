"""How much of a latent picture has diverged."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from polyak.core import checks


@checks.arguments(
    latents=checks.Tensor(floating=True, ndim=4), mean=checks.array, std=checks.array, kernel=checks.Integer(1),
    threshold=checks.non_negative,
)  # fmt: skip
def artifact_score(
    latents: Tensor,
    mean: Tensor | Sequence[float],
    std: Tensor | Sequence[float],
    kernel: int = 4,
    threshold: float = 3.0,
) -> Tensor:
    """The magnitude score of divergence artifacts (arXiv 2307.11118, section 5).

    ``z = |latents - mean| / std``, its largest over channels and over squares of ``kernel`` pixels; what is below ``threshold``
    counts 0; the mean over the picture.

    Args:
        latents: shape (B, C, H, W).
        mean, std: of each channel over pictures that are right, shape (C,). Of Stable Diffusion's latents on COCO: (0.1456,
            -0.1077, 0.0237, 0.0460) and (0.9221, 1.0914, 0.7303, 0.7227).
        kernel: at most H and W; what is left over at the lower and right edges is not looked at.
        threshold: in standard deviations.

    Returns:
        Shape (B,), of the latents' dtype.

    Raises:
        ValueError: mean or std that are not one for each channel, std not above 0, a kernel larger than the picture.
    """
    channels, height, width = latents.shape[1:]
    work = latents.float() if latents.dtype in (torch.float16, torch.bfloat16) else latents
    at, by = (torch.as_tensor(v, dtype=work.dtype, device=work.device) for v in (mean, std))
    for name, value in (("mean", at), ("std", by)):
        if value.shape != (channels,):
            raise ValueError(f"{name} must have shape ({channels},), one for each channel, got {tuple(value.shape)}")
    if bool((by <= 0).any()):
        raise ValueError(f"std must be > 0, got {by.tolist()}")
    if kernel > min(height, width):
        raise ValueError(f"kernel must be at most {min(height, width)}, the picture's size, got {kernel}")
    z = ((work - at[:, None, None]) / by[:, None, None]).abs().amax(1)
    largest = torch.nn.functional.max_pool2d(z[:, None], kernel)
    return torch.where(largest < threshold, 0.0, largest).mean((1, 2, 3)).to(latents.dtype)
