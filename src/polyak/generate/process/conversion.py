"""Another interpolant for a flow model that is trained: exact, and without training (Lipman et al., arXiv 2210.02747, 2412.06264).

Two interpolants pass through the same laws, up to scale. The new one, (a, s) at time r, is at the signal-to-noise ratio that the
model's own, (alpha, sigma), has at

    t(r) = SNR^-1(a / s),    c(r) = s / sigma_t = a / alpha_t,    x_r = c x_t

so that its velocity is, by the chain rule,

    u_r(x) = (c' / c) x + c t' u_t(x / c),
    t' = (s a' - a s') / (c^2 (sigma alpha' - alpha sigma')),    c' = (s' - c sigma' t') / sigma = (a' - c alpha' t') / alpha
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from polyak.core import checks
from polyak.generate.process.base import Process
from polyak.generate.process.path import expand, wide

_PROCESS = checks.Instance(Process, words="a Process of Gaussian noise (an instance, not the class)")
_MARGIN = 1e-5  # that is kept from an end at which the signal-to-noise ratio is 0 or infinite
_HALF = (torch.float16, torch.bfloat16)


class Matched(NamedTuple):
    """Where in the source a time r of the target is, and how it moves: t, c, and their derivatives by r."""

    t: Tensor
    c: Tensor
    dt: Tensor
    dc: Tensor


def matched(source: Process, target: Process, r: Tensor) -> Matched:
    """The times of ``source`` at which it has the signal-to-noise ratios of ``target`` at times r; float64, r's shape."""
    margin = _MARGIN * (target.t_max - target.t_min)
    low = target.t_min + (0.0 if math.isfinite(target.lam(target.t_min)) else margin)
    high = target.t_max - (0.0 if math.isfinite(target.lam(target.t_max)) else margin)
    r = r.clamp(low, high)
    a, s, da, ds, lam = target.alpha(r), target.sigma(r), target.dalpha(r), target.dsigma(r), target.lam(r)
    t = source.t_of_lam(lam).clamp(source.t_min, source.t_max)
    alpha, sigma, dalpha, dsigma = source.alpha(t), source.sigma(t), source.dalpha(t), source.dsigma(t)
    noisy = lam < 0  # either of two forms, whose divisor is not small
    c = torch.where(noisy, s / sigma, a / alpha)
    dt = (s * da - a * ds) / (c.square() * (sigma * dalpha - alpha * dsigma))
    dc = torch.where(noisy, (ds - c * dsigma * dt) / sigma, (da - c * dalpha * dt) / alpha)
    return Matched(t, c, dt, dc)


class _Converted:
    """A velocity in another interpolant: asks the network at the point of its own with the same signal-to-noise ratio.

    Attributes:
        process: the interpolant whose velocity it is.
    """

    def __init__(self, model: Callable[[Tensor, Tensor], Tensor], source: Process, target: Process) -> None:
        self.model, self.source, self.process = model, source, target

    def __call__(self, x: Tensor, label: Tensor | float) -> Tensor:
        kind = wide(x.device)
        told = torch.as_tensor(label, device=x.device)
        at = matched(self.source, self.process, self.process.t_of_label(told.to(kind)))
        made = x.float() if x.dtype in _HALF else x
        own = self.source.label(at.t).to(told.dtype if told.is_floating_point() else torch.float32)
        said = self.model((made / expand(at.c, made)).to(x.dtype), own.expand(x.shape[:1]))
        return expand(at.dc / at.c, made) * made + expand(at.c * at.dt, made) * said.to(made.dtype)


@checks.arguments(
    model=checks.Function("a Denoiser, or a network (x, label) -> velocity", 2), source=_PROCESS, target=_PROCESS
)
def convert(model: Any, source: Process, target: Process) -> Any:
    """A flow model of one interpolant, in another: exact, without training.

    Args:
        model: the velocity ``dx/dt`` of ``source``, a network ``(x, label) -> u``, x of shape (B, ...), label of shape (B,); or a
            :class:`polyak.generate.Denoiser` of ``source``, in any dialect.
        source: the interpolant that it was trained with.
        target: the one that it shall have. Times at which its signal-to-noise ratio is 0 or infinite are moved 1e-5 inwards; what
            is beyond the source's ends is taken to be at its end.

    Returns:
        A network of the velocity of ``target``, which is its ``process``, and told ``target.label(t)``: in float32 for x of half
        precision, because the predicted data divide it by small numbers. Of a Denoiser a Denoiser of ``target``.

    Raises:
        ValueError: a Denoiser, or a converted network, of another process; noise that is not Gaussian.

    Example:
        >>> model = convert(lambda x, t: x, Flow(), VP())
        >>> model(torch.ones(2, 3), torch.full((2,), 0.5)).shape
        torch.Size([2, 3])
    """
    from polyak.generate.equal_snr import reparametrize
    from polyak.generate.prediction import Denoiser

    if isinstance(model, Denoiser):
        if model.process != source:
            raise ValueError(f"source must be the denoiser's own, {model.process!r}, got {source!r}")
        return model if source == target else reparametrize(model, source, target)
    for name, process in (("source", source), ("target", target)):
        if not process.is_gaussian:
            raise ValueError(f"{name} must have Gaussian noise, which {process!r} has not")
    if isinstance(model, _Converted) and model.process != source:
        raise ValueError(f"source must be the converted network's own, {model.process!r}, got {source!r}")
    return model if source == target else _Converted(model, source, target)
