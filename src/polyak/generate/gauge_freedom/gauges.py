"""Gauges: fields R with ``div(p R) = 0``, which is ``div R + R . s* = 0`` with the score ``s* = grad log p``."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor
from torch.func import jvp, vmap

from polyak.core import checks
from polyak.generate.fields import (
    FIELD,
    METHOD,
    PROBES,
    STATE,
    Field,
    directions,
    trace,
    value,
)
from polyak.generate.process.path import TIME, one_for_each_row, standard_normal


@checks.arguments(
    field=FIELD, score=FIELD, x=STATE, t=TIME, method=METHOD, probes=PROBES, generator=checks.generator | None
)
def gauge_residual(
    field: Field,
    score: Field,
    x: Tensor,
    t: float | Tensor,
    *,
    method: Literal["exact", "hutchinson"] = "exact",
    probes: int = 1,
    generator: torch.Generator | None = None,
) -> Tensor:
    """``div R + R . s*`` of ``R = field - score``: zero everywhere exactly if the field differs from the score by a gauge.

    It is ``div(p R) / p``: how fast R makes or destroys mass, relative to the mass that is there.

    Args:
        field: the field that is looked at; a denoiser stands for its score.
        score: the true score s*; a denoiser stands for its score.
        x: (B, ...). t: a number or (B,).
        method, probes, generator: as for :func:`polyak.generate.divergence`.

    Returns:
        (B,), differentiable.
    """
    one_for_each_row(t, x)
    true = value(score, x, t)
    remainder, div = trace(
        lambda y: value(field, y, t) - value(score, y, t), x, directions(x, method, probes, generator)
    )
    return div + (remainder * true).flatten(1).sum(1)


@checks.arguments(score=FIELD, A=checks.array, kappa=checks.real)
def antisymmetric_gauge(score: Field, A: Tensor, kappa: float = 1.0) -> Callable[[Tensor, Any], Tensor]:
    """The field ``s + kappa A s``, whose last term is a gauge of every density: ``div(A grad p) = 0``.

    Args:
        score: s; a denoiser stands for its score.
        A: (D, D) with ``A = -A^T``, D the number of elements of a row.
        kappa: the size of the gauge.

    Returns:
        A function ``(x, t) -> tensor``. To sample with it: ``Denoiser(it, process, "score", label=lambda t: t)``.

    Raises:
        ValueError: a matrix that is not antisymmetric; of another size than x's rows, when the field is asked.
    """
    matrix = torch.as_tensor(A, dtype=torch.float64)
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1]:
        raise ValueError(f"A must be a square matrix, got shape {tuple(matrix.shape)}")
    if not torch.allclose(matrix, -matrix.mT):
        raise ValueError(f"A must satisfy A = -A^T, got {matrix.tolist() if len(matrix) < 5 else tuple(matrix.shape)}")

    def field(x: Tensor, t: Any) -> Tensor:
        s = value(score, x, t)
        flat = s.flatten(1)
        if flat.shape[1] != len(matrix):
            raise ValueError(f"A must have the size of x's rows, {flat.shape[1]}, got {tuple(matrix.shape)}")
        return s + kappa * (flat @ matrix.to(flat).mT).reshape(s.shape)

    return field


@checks.arguments(score=FIELD, B=checks.Function("a function (x, t) -> matrices (batch, D, D)", 2))
def matrix_gauge(score: Field, B: Callable[[Tensor, Any], Tensor]) -> Callable[[Tensor, Any], Tensor]:
    """The field ``s + div B + B s``, ``(div B)_i = sum_j d B_ij / d x_j``: the general gauge, for B antisymmetric at every x.

    Args:
        score: s, which must be the score of the density whose gauge is wanted; a denoiser stands for its score.
        B: ``(x, t) -> `` matrices (batch, D, D) with ``B = -B^T``, which is not looked at; :func:`gauge_residual` would show it.

    Returns:
        A function ``(x, t) -> tensor``; it costs D derivatives of B, forward, all at once.

    Raises:
        ValueError: when the field is asked: matrices of a wrong shape.
    """

    def field(x: Tensor, t: Any) -> Tensor:
        s = value(score, x, t)
        size = math.prod(x.shape[1:])

        def matrices(y: Tensor) -> Tensor:
            made = B(y, t)
            if made.shape != (len(y), size, size):
                raise ValueError(f"B must return shape {(len(y), size, size)}, got {tuple(made.shape)}")
            return made

        # Column j of B, moved along axis j: the sum over j is div B.
        axes = torch.eye(size, dtype=x.dtype, device=x.device).reshape(size, 1, *x.shape[1:]).expand(size, *x.shape)
        moved = vmap(lambda e: jvp(lambda y: (matrices(y) @ e.flatten(1)[..., None])[..., 0], (x,), (e,))[1])(axes)
        turned = torch.einsum("bij,bj->bi", matrices(x), s.flatten(1))
        return s + (moved.sum(0) + turned).reshape(s.shape)

    return field


@checks.arguments(
    field=FIELD, x=STATE, t=TIME, features=checks.Integer(1, 1_000_000), bandwidth=checks.positive | None,
    generator=checks.generator | None,
)  # fmt: skip
def gauge_moments(
    field: Field,
    x: Tensor,
    t: float | Tensor,
    *,
    features: int = 64,
    bandwidth: float | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """``E_p[grad psi . R]`` for random functions psi, all zero if R is a gauge: a test that needs no score, only samples.

    ``psi(x) = sqrt(2) cos(w . x + b)`` with ``w ~ N(0, I / bandwidth^2)``, b uniform. The sum of the squares, with
    ``R = s - grad phi`` of the projection, is the gauge penalty of training.

    Args:
        field: R, as a function; of a denoiser its score would be taken.
        x: (B, ...), samples of the law at t.
        t: a number or (B,).
        features: how many functions psi.
        bandwidth: their scale; default: the root mean square distance between two samples.
        generator: of w and b.

    Returns:
        (features,), differentiable. Of a gauge it is zero up to ``O(|R| |w| / sqrt(B))``.
    """
    one_for_each_row(t, x)
    remainder, flat = value(field, x, t).flatten(1), x.flatten(1)
    if bandwidth is None:
        scale = flat.detach().var(0, unbiased=False).sum().mul(2).sqrt()
        scale = torch.where(scale > 0, scale, 1.0)
    else:
        scale = bandwidth
    w = standard_normal((features, flat.shape[1]), generator=generator, dtype=x.dtype, device=x.device) / scale
    source = x.device if generator is None else generator.device
    b = 2 * math.pi * torch.rand(features, dtype=x.dtype, device=source, generator=generator).to(x.device)
    return (-math.sqrt(2) * torch.sin(flat @ w.mT + b) * (remainder @ w.mT)).mean(0)
