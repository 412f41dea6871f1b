"""The registry of schemes, and drawing by one."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from polyak.core.particles import _schemes
from polyak.core.particles._values import looks


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
    how, size = REGISTRY[scheme], logw.shape[-1]
    if scheme == "killing" and n != size:
        raise ValueError(f"n must be the number of particles, {size}, for scheme='killing', got {n}")
    if u is not None:
        u = _given(u, (*logw.shape[:-1], *how.uniforms(size, n)), logw, check)
    same_device(generator, logw)
    return how.draw(_schemes.unnormalized(logw), n, u, generator)


def _given(u: Tensor, shape: tuple[int, ...], logw: Tensor, check: bool | None) -> Tensor:
    if u.shape != shape or u.device != logw.device:
        raise ValueError(
            f"u must have shape {shape} on {logw.device} for this scheme, got {tuple(u.shape)} on {u.device}"
        )
    u = u.detach().to(logw.dtype)
    if looks(u, check) and not bool(((u >= 0) & (u < 1)).all()):
        raise ValueError("u must be in [0, 1)")
    return u


def same_device(generator: torch.Generator | None, logw: Tensor) -> None:
    if generator is not None and generator.device.type != logw.device.type:
        raise ValueError(f"generator must be of logw's device, {logw.device}, got one of {generator.device}")
