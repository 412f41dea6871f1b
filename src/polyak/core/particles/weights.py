"""Weights and effective sample sizes from log-weights."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from polyak.core import checks
from polyak.core.particles._values import LOGW, ON_COLLAPSE, cleaned, effective, fitting, look, looks, prepared


def _last(name: str, logw: Tensor, dim: int) -> Tensor:
    if not -logw.ndim <= dim < logw.ndim:
        raise ValueError(f"dim must be one of {name}'s {logw.ndim} dimensions, got {dim}")
    return logw.movedim(dim, -1)


@checks.arguments(logw=LOGW, dim=checks.Integer(), on_collapse=ON_COLLAPSE, check=checks.optional_flag)
def normalize(
    logw: Tensor, dim: int = -1, *, on_collapse: str = "error", check: bool | None = None
) -> tuple[Tensor, Tensor]:
    """``(W, log_mean)``: the weights, which sum to 1, and ``logsumexp(logw) - log N``; float64, differentiable.

    Args:
        logw: log-weights, shape (*batch, N). -inf is no weight; a single +inf has all of it.
        dim: the particles' dimension.
        on_collapse: what a system is where all are -inf: "error", or "uniform", equal weights (``log_mean`` is -inf then, too).
        check: look for NaN and collapse. Default: on the CPU. Where nobody looks, a system without weight has equal weights and a
            log_mean of -inf, or NaN.

    Returns:
        W of logw's shape, and log_mean without the dimension.

    Raises:
        ValueError: with the systems' indices: NaN, two of +inf, all -inf; no particles; logw of integers.
    """
    clean, top = cleaned(prepared("logw", _last("logw", logw, dim), on_collapse, check))
    # Where the largest is not finite it is the logarithm of the sum, too.
    total = torch.where(top.isfinite(), clean.logsumexp(-1, keepdim=True), top).squeeze(-1)
    return clean.softmax(-1).movedim(-1, dim), total - math.log(clean.shape[-1])


@checks.arguments(logw=LOGW, dim=checks.Integer(), on_collapse=ON_COLLAPSE, check=checks.optional_flag)
def ess(logw: Tensor, dim: int = -1, *, on_collapse: str = "error", check: bool | None = None) -> Tensor:
    """The effective sample size ``(sum w)^2 / sum w^2``, in [1, N]; float64, differentiable.

    For log-weights from N(0, s^2) it tends to ``N exp(-s^2)``.

    Args:
        logw, dim, on_collapse, check: as for :func:`normalize`.

    Returns:
        logw's shape without the dimension.

    Raises:
        ValueError: as :func:`normalize`.
    """
    return effective(prepared("logw", _last("logw", logw, dim), on_collapse, check))


@checks.arguments(logw_prev=LOGW, log_incr=LOGW, on_collapse=ON_COLLAPSE, check=checks.optional_flag)
def cess(logw_prev: Tensor, log_incr: Tensor, *, on_collapse: str = "error", check: bool | None = None) -> Tensor:
    """The conditional effective sample size ``N (sum W v)^2 / sum W v^2`` of increments v on weights W (Zhou et al., 2016).

    It is N where all v are equal, whatever W is: what a step of annealing costs.

    Args:
        logw_prev: log-weights before, shape (*batch, N).
        log_incr: log v, of the same shape, or one that broadcasts with it.
        on_collapse, check: as for :func:`normalize`.

    Returns:
        Shape batch, float64.

    Raises:
        ValueError: as :func:`normalize`, of either; where no increment falls on a positive weight; shapes that do not fit.
    """
    log_w, _ = cleaned(prepared("logw_prev", logw_prev, on_collapse, check))
    v = fitting("log_incr", log_incr, log_w)
    both = log_w + v
    if looks(both, check):
        look("log_incr", both, on_collapse)
    both, _ = cleaned(both)
    first = 2 * both.logsumexp(-1) - log_w.logsumexp(-1)
    second = (2 * both - torch.where(log_w == -torch.inf, 0.0, log_w)).logsumexp(-1)
    return logw_prev.shape[-1] * (first - second).exp().clamp(max=1)
