"""The loss that trains a velocity."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from polyak.core import checks
from polyak.generate.prediction import Denoiser
from polyak.generate.process import Process
from polyak.generate.training import denoising_loss

_PROCESS = checks.Instance(Process, words="a Process of Gaussian noise (an instance, not the class)")


@checks.arguments(
    model=checks.Function("a function (x, t) -> dx/dt", 2), x1=checks.Tensor(floating=True, least_ndim=2), process=_PROCESS,
    generator=checks.generator | None,
)  # fmt: skip
def conditional_flow_matching_loss(
    model: Callable[[Tensor, Tensor], Tensor], x1: Tensor, process: Process, generator: torch.Generator | None = None
) -> Tensor:
    """``E |v(x_t, t) - (alpha' x1 + sigma' x0)|^2``, t uniform in the process's range, as a mean over samples and elements.

    It is :func:`polyak.generate.denoising_loss` for a network that predicts "flow": v is dx/dt in the process's time, from data to
    noise; flow-matching libraries have 1 - t and -v.

    Args:
        model: the velocity v, ``(x, label of t) -> v``.
        x1: data, shape (B, ...).
        process: any Gaussian process.
        generator: of times and noise, on x1's device.
    """
    return denoising_loss(Denoiser(model, process, "flow"), x1, generator=generator).mean()
