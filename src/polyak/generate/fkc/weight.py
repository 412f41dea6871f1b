"""The corrector's formulas as functions."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from polyak.core import checks
from polyak.generate.process import Process, wide

_PROCESS = checks.Instance(Process, words="a Process with alpha and sigma (an instance, not the class)")
_POWERS = checks.Each(checks.real, words="a list of numbers")


@checks.arguments(
    S=checks.Tensor(floating=True, least_ndim=2), scores=checks.Each(checks.Tensor(floating=True)), betas=_POWERS,
    sigma2=checks.non_negative, f=checks.Tensor(floating=True) | None, grad_rho=checks.Tensor(floating=True) | None,
    drho=checks.Tensor(floating=True) | None, event_dims=checks.Integer(1),
)  # fmt: skip
def fkc_weight(
    S: Tensor,
    scores: Sequence[Tensor],
    betas: Sequence[float],
    sigma2: float,
    f: Tensor | None = None,
    grad_rho: Tensor | None = None,
    drho: Tensor | None = None,
    *,
    event_dims: int = 1,
) -> Tensor:
    """The rate g of the log-weight in reverse time, without ``(sum beta - 1) div f``, which is the same for all particles.

        g = sigma^2/2 (|S|^2 - sum_i beta_i |s_i|^2) + drho + <grad_rho, sigma^2/2 S - f>

    Args:
        S: (*batch, N, *event), the composed score ``sum_i beta_i s_i``.
        scores: the experts' scores, each of S's shape.
        betas: their powers.
        sigma2: ``sigma_t^2``, the diffusion coefficient squared (of the variance exploding ``sigma_t = t`` that is 2 t).
        f: the forward drift at the particles, S's shape; needed with ``grad_rho``.
        grad_rho: the gradient of the log-reward, S's shape.
        drho: its derivative in reverse time, (*batch, N).
        event_dims: how many of the last dimensions are the event.

    Returns:
        (*batch, N), in float64 where the device has it.

    Raises:
        ValueError: shapes or numbers of experts that differ; ``grad_rho`` without ``f``.

    Example:
        >>> import torch
        >>> s = torch.ones(5, 2)
        >>> fkc_weight(3 * s, [s], [3.0], sigma2=0.5)[0]  # 0.5 * 3 * (3 - 1) / 2 * |s|^2
        tensor(3., dtype=torch.float64)
    """
    if len(scores) != len(betas) or not scores:
        raise ValueError(f"scores and betas must be as many, and one at least, got {len(scores)} and {len(betas)}")
    for name, other in (*((f"scores[{i}]", s) for i, s in enumerate(scores)), ("f", f), ("grad_rho", grad_rho)):
        if other is not None and other.shape != S.shape:
            raise ValueError(f"{name} must have S's shape {tuple(S.shape)}, got {tuple(other.shape)}")
    if event_dims >= S.ndim:
        raise ValueError(f"event_dims must be below S's {S.ndim} dimensions, got {event_dims}")
    kind, over = wide(S.device), tuple(range(-event_dims, 0))
    total = S.to(kind)
    square = total.square().sum(over)
    for s, beta in zip(scores, betas, strict=True):
        square = square - beta * s.to(kind).square().sum(over)
    g = sigma2 / 2 * square
    if grad_rho is not None:
        if f is None:
            raise ValueError("f is needed with grad_rho, got None")
        g = g + (grad_rho.to(kind) * (sigma2 / 2 * total - f.to(kind))).sum(over)
    if drho is not None:
        if drho.shape != g.shape:
            raise ValueError(f"drho must have shape {tuple(g.shape)}, got {tuple(drho.shape)}")
        g = g + drho.to(kind)
    return g


@checks.arguments(betas=_POWERS, process=_PROCESS)
def initial_scale(betas: Sequence[float], process: Process) -> float:
    """The standard deviation of the start: ``N(0, sigma_1^2 I)`` to the power ``sum beta`` has ``sigma_1 / sqrt(sum beta)``.

    Raises:
        ValueError: powers whose sum is not positive, whose product has no density at the start.
    """
    total = math.fsum(betas)
    if not total > 0:
        raise ValueError(f"target not normalizable at the start: the sum of betas must be positive, got {total:g}")
    return process.prior_std / math.sqrt(total)
