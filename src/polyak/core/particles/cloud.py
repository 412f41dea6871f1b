"""A population of weighted particles, and what is done with it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from polyak.core import checks
from polyak.core.particles import _native
from polyak.core.particles._drawing import adapted
from polyak.core.particles._moves import moved
from polyak.core.particles._values import (
    LOGW,
    ON_COLLAPSE,
    cleaned,
    effective,
    fitting,
    look,
    looks,
    prepared,
    sized,
    wide,
)
from polyak.core.particles.resampling import SCHEME

_TREE = checks.Anything("a tensor, or a pytree of tensors")
_OF_X = checks.Function("a function of x", 1)


@checks.arguments(
    x=_TREE, logw=LOGW, log_z=checks.Tensor(floating=True), ancestors=checks.tensor | None, differentiable=checks.flag
)
@dataclass(frozen=True)
class Cloud:
    """Particles and their weights; each step makes a new one.

    Attributes:
        x: states, (*batch, N, *event), or a pytree of such.
        logw: (*batch, N), log-weights since the last resampling, float64.
        log_z: (*batch), the evidence so far: the logarithm of an unbiased estimate. -inf for ever where all weight was lost once.
        ancestors: (*batch, N) int64, where the last :meth:`maybe_resample` took the particles from.
        differentiable: resampled log-weights are 0 but keep their gradient (``l - stop_gradient(l)``; Scibior and Wood, 2021), so
            that the gradient of ``log_z`` is a consistent estimate of the score. Else resampling cuts gradients off.

    Example:
        >>> cloud = Cloud.uniform(torch.randn(8, 1000, 2), (8, 1000))
        >>> cloud = cloud.reweight(-cloud.x.square().sum(-1))
        >>> cloud, ancestors, did = cloud.maybe_resample(0.5)
        >>> cloud.log_z.shape, cloud.mean().shape
        (torch.Size([8]), torch.Size([8, 2]))
    """

    x: Any
    logw: Tensor
    log_z: Tensor
    ancestors: Tensor | None = None
    differentiable: bool = False

    def __post_init__(self) -> None:
        sized("logw", self.logw)
        shape = self.logw.shape
        if self.log_z.shape != shape[:-1]:
            raise ValueError(
                f"log_z must have the shape {tuple(shape[:-1])} of logw's batch, got {tuple(self.log_z.shape)}"
            )
        for path, leaf in pytree.tree_flatten_with_path(self.x)[0]:
            if isinstance(leaf, Tensor) and leaf.shape[: len(shape)] != shape:
                raise ValueError(
                    f"x{pytree.keystr(path)} must have logw's dimensions {tuple(shape)} first, got {tuple(leaf.shape)}"
                )

    @classmethod
    @checks.arguments(x=_TREE, shape=checks.Each(checks.Integer(0)), differentiable=checks.flag)
    def uniform(cls, x: Any, shape: Sequence[int], *, differentiable: bool = False) -> Cloud:
        """Equal weights, and evidence 1, for x with dimensions ``shape`` = (*batch, N) first."""
        leaf = next((leaf for leaf in pytree.tree_leaves(x) if isinstance(leaf, Tensor)), None)
        device = torch.device("cpu") if leaf is None else leaf.device
        if not shape:
            raise ValueError("shape must be (*batch, N), got ()")
        logw = torch.zeros(*shape, dtype=wide(device), device=device)
        return cls(x, logw, logw.new_zeros(logw.shape[:-1]), None, differentiable)

    @property
    def W(self) -> Tensor:
        """The weights, (*batch, N), which sum to 1."""
        return cleaned(self.logw)[0].softmax(-1)

    @property
    def ess(self) -> Tensor:
        """The effective sample size, of shape batch."""
        return effective(self.logw)

    @checks.arguments(log_incr=checks.Tensor(floating=True), on_collapse=ON_COLLAPSE, check=checks.optional_flag)
    def reweight(self, log_incr: Tensor, *, on_collapse: str = "error", check: bool | None = None) -> Cloud:
        """Multiply weights by ``exp(log_incr)``; the evidence is multiplied by the mean of that under the weights.

        Args:
            log_incr: (*batch, N), or what broadcasts to it. With a proposal q: log G + log f - log q.
            on_collapse: what a system is whose weights all vanish: "error", or "uniform", equal weights, with log_z = -inf.
            check: look for NaN and collapse. Default: on the CPU.

        Raises:
            ValueError: with the systems' indices: NaN, two of +inf, no weight left; an increment of another shape.
        """
        logw = self.logw.to(wide(self.logw.device))
        log_incr = fitting("log_incr", log_incr, logw)
        if logw.device.type == "cpu" and (made := _native.reweighted(logw, log_incr)) is not None:
            after, tops, gain = made
            if math.isfinite(tops.sum().item()):  # else see what is amiss
                return replace(self, logw=after, log_z=self.log_z + gain)
        before, _ = cleaned(logw)
        logw = before + log_incr
        if looks(logw, check):
            look("log_incr added to logw", logw, on_collapse)
        after, top = cleaned(logw)
        gain = torch.where(top.isfinite(), after.logsumexp(-1, keepdim=True), top).squeeze(-1) - before.logsumexp(-1)
        return replace(self, logw=after, log_z=self.log_z + gain)

    @checks.arguments(
        threshold=checks.fraction, scheme=SCHEME, generator=checks.generator | None,
        u=checks.Tensor(floating=True) | None, on_collapse=ON_COLLAPSE, check=checks.optional_flag,
    )  # fmt: skip
    def maybe_resample(
        self,
        threshold: float = 0.5,
        scheme: str = "systematic",
        generator: torch.Generator | None = None,
        *,
        u: Tensor | None = None,
        on_collapse: str = "error",
        check: bool | None = None,
    ) -> tuple[Cloud, Tensor, Tensor]:
        """Resample the systems whose effective sample size is below ``threshold * N``; the others keep particles and weights.

        Args:
            threshold: in [0, 1]; 0 never resamples, 1 always does.
            scheme, generator, u, on_collapse, check: as for :func:`resample`.

        Returns:
            The cloud, the ancestors (*batch, N), which are 0 ... N - 1 where nothing was done, and whether it was, (*batch) bool.

        Raises:
            ValueError: as :func:`resample`.
        """
        logw = prepared("logw", self.logw, on_collapse, check)
        if threshold == 0:
            ancestors = torch.arange(logw.shape[-1], device=logw.device).expand(logw.shape)
            did = torch.zeros(logw.shape[:-1], dtype=torch.bool, device=logw.device)
            return replace(self, logw=logw, ancestors=ancestors), ancestors, did
        leaves, tree = pytree.tree_flatten(self.x)
        largest = None
        for leaf in leaves:
            if isinstance(leaf, Tensor) and (largest is None or leaf.numel() > largest.numel()):
                largest = leaf
        ancestors, x, fresh, did = adapted(logw.detach(), threshold, scheme, generator, u, check, largest)
        if logw.requires_grad:
            keeps = cleaned(logw)[0].gather(-1, ancestors) if self.differentiable else torch.zeros_like(logw)
            fresh = torch.where(did.unsqueeze(-1), keeps - keeps.detach(), logw)
        for i, leaf in enumerate(leaves):
            if isinstance(leaf, Tensor):
                leaves[i] = moved(leaf, ancestors) if x is None or leaf is not largest else x
        return replace(self, x=tree.unflatten(leaves), logw=fresh, ancestors=ancestors), ancestors, did

    @checks.arguments(f=_OF_X | None)
    def mean(self, f: Callable[[Any], Tensor] | None = None) -> Tensor:
        """``sum_k W_k f(x_k)``, of shape (*batch, *event); f takes x to a tensor (*batch, N, *event). Default: of x itself."""
        values = self._values(f)
        weights = self.W.to(torch.promote_types(values.dtype, torch.float32))
        event = values.shape[weights.ndim :]
        rows = values.to(weights.dtype).reshape(*weights.shape, math.prod(event))
        return (weights.unsqueeze(-2) @ rows).squeeze(-2).reshape(*weights.shape[:-1], *event)

    @checks.arguments(q=checks.fraction, f=_OF_X | None)
    def quantile(self, q: float, f: Callable[[Any], Tensor] | None = None) -> Tensor:
        """The least value of f(x) up to which there is a share q of the weight, in each component of the event by itself."""
        values = self._values(f)
        dim = self.logw.ndim - 1
        weights = self.W.reshape(*self.logw.shape, *[1] * (values.ndim - self.logw.ndim)).expand(values.shape)
        values, order = values.sort(dim)
        # A value without weight is none, even for q = 0.
        c = weights.gather(dim, order).cumsum(dim)
        total = c.narrow(dim, -1, 1)
        tiny = torch.finfo(c.dtype).tiny
        below = (c < (q * total).clamp(min=tiny).minimum(total)).sum(dim, keepdim=True)
        return values.gather(dim, below.clamp(max=values.shape[dim] - 1)).squeeze(dim)

    def _values(self, f: Callable[[Any], Tensor] | None) -> Tensor:
        values = self.x if f is None else f(self.x)
        name = "x" if f is None else "f(x)"
        if not isinstance(values, Tensor):
            raise TypeError(f"{name} must be a tensor, got {checks.shown(values)}; give f, a function of x")
        if values.shape[: self.logw.ndim] != self.logw.shape:
            raise ValueError(f"{name} must have dimensions {tuple(self.logw.shape)} first, got {tuple(values.shape)}")
        return values
