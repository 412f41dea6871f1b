"""The registry of schemes, and drawing by one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from polyak.core.particles import _kernel, _native, _schemes
from polyak.core.particles._gpu import Stepped
from polyak.core.particles._schemes import uniforms, unnormalized
from polyak.core.particles._values import effective, looks

FUSED = ("systematic", "stratified")  # in one launch, or one call of C
SORTED = ("multinomial", "residual", "ssp")  # in C alone


class Scheme(NamedTuple):
    draw: Callable[[Tensor, int, Tensor | None, torch.Generator | None], Tensor]
    uniforms: Callable[[int, int], tuple[int, ...]]  # of N and n: the shape of u, after the batch


REGISTRY = {
    "multinomial": Scheme(_schemes.multinomial, lambda N, n: (n,)),
    "stratified": Scheme(_schemes.stratified, lambda N, n: (n,)),
    "systematic": Scheme(_schemes.systematic, lambda N, n: ()),
    "residual": Scheme(_schemes.residual, lambda N, n: (n,)),
    "residual-systematic": Scheme(_schemes.residual_systematic, lambda N, n: ()),
    "ssp": Scheme(_schemes.ssp, lambda N, n: (N - 1,)),
    "killing": Scheme(_schemes.killing, lambda N, n: (2 * n,)),
}


def drawn(
    logw: Tensor, n: int, scheme: str, generator: torch.Generator | None, u: Tensor | None, check: bool | None
) -> Tensor:
    """Ancestors from log-weights that have been looked at."""
    u = _uniforms(logw, n, scheme, generator, u, check)
    if (made := _fast(logw, n, scheme, u)) is not None:
        return made.ancestors
    if scheme in SORTED and _native.takes(logw) and (found := _sorted(logw, n, scheme, u, generator)) is not None:
        return found
    return REGISTRY[scheme].draw(unnormalized(logw), n, u, generator)


def _sorted(logw: Tensor, n: int, scheme: str, u: Tensor | None, generator: torch.Generator | None) -> Tensor | None:
    """Other schemes in C, of uniforms that are drawn here: those of a caller need not be sorted."""
    if scheme != "ssp":
        if u is not None:
            return None
        u = _schemes.spacings((*logw.shape[:-1], n), logw, generator)
    return None if u is None else _native.drawn(logw, n, scheme, u)


def adapted(
    logw: Tensor,
    threshold: float,
    scheme: str,
    generator: torch.Generator | None,
    u: Tensor | None,
    check: bool | None,
    x: Tensor | None,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """Resample the systems whose effective sample size is below ``threshold * N``; threshold in (0, 1].

    Returns:
        The ancestors, x if it was moved, too, the new log-weights, and which systems were resampled.
    """
    size = logw.shape[-1]
    u = _uniforms(logw, size, scheme, generator, u, check)
    made = _fast(logw, size, scheme, u, threshold=threshold, x=x)
    if made is not None and made.logw is not None and made.did is not None:
        return made.ancestors, made.x, made.logw, made.did
    ancestors = REGISTRY[scheme].draw(unnormalized(logw), size, u, generator)
    if threshold == 1:
        return ancestors, None, torch.zeros_like(logw), torch.ones_like(logw[..., 0], dtype=torch.bool)
    did = effective(logw) < threshold * size
    each = did.unsqueeze(-1)
    ancestors = torch.where(each, ancestors, torch.arange(size, device=logw.device))
    return ancestors, None, torch.where(each, 0.0, logw), did


def _fast(logw: Tensor, n: int, scheme: str, u: Tensor | None, **how: Any) -> Stepped | None:
    """The step in one launch, or one call of C, where there is one."""
    if u is None or scheme not in FUSED:
        return None
    return (_native if logw.device.type == "cpu" else _kernel).stepped(logw, n, scheme, u, **how)


def _uniforms(
    logw: Tensor, n: int, scheme: str, generator: torch.Generator | None, u: Tensor | None, check: bool | None
) -> Tensor | None:
    """The uniforms that are given, or those of a scheme for which a kernel may draw; None: the scheme draws them itself."""
    size = logw.shape[-1]
    shape = (*logw.shape[:-1], *REGISTRY[scheme].uniforms(size, n))
    if scheme == "killing" and n != size:
        raise ValueError(f"n must be the number of particles, {size}, for scheme='killing', got {n}")
    same_device(generator, logw)
    if u is not None:
        return _given(u, shape, logw, check)
    return uniforms(shape, logw, generator) if scheme in FUSED or scheme == "ssp" else None


def _given(u: Tensor, shape: tuple[int, ...], logw: Tensor, check: bool | None) -> Tensor:
    if u.shape != shape or u.device != logw.device:
        raise ValueError(
            f"u must have shape {shape} on {logw.device} for this scheme, got {tuple(u.shape)} on {u.device}"
        )
    u = u.detach().to(logw.dtype)
    if u.numel() and looks(u, check):
        least, most = (v.item() for v in u.aminmax())
        if not (least >= 0 and most < 1):
            raise ValueError(f"u must be in [0, 1), got {least if not least >= 0 else most:g}")
    return u


def same_device(generator: torch.Generator | None, logw: Tensor) -> None:
    if generator is not None and generator.device.type != logw.device.type:
        raise ValueError(f"generator must be of logw's device, {logw.device}, got one of {generator.device}")
