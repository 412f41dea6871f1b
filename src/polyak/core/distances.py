"""Distances between probability distributions: from samples, and in closed form between Gaussians.

Samples are tensors of shape (n, d), float; computed in float64. Numbers are returned as Python floats.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from polyak.core import checks

_POWER = checks.Number(1.0, 1e6)


def _samples(name: str, x: Tensor) -> Tensor:
    if x.ndim != 2 or x.shape[0] == 0:
        raise ValueError(f"{name} must have shape (n, d) with n > 0, got {tuple(x.shape)}")
    if not x.is_floating_point():
        raise ValueError(f"{name} must be floating point, got {x.dtype}")
    return x.to(torch.float64)


def _pair(x: Tensor, y: Tensor, names: tuple[str, str] = ("x", "y")) -> tuple[Tensor, Tensor]:
    x, y = (_samples(name, given) for name, given in zip(names, (x, y), strict=True))
    if x.shape[1] != y.shape[1]:
        raise ValueError(f"{' and '.join(names)} must have one dimension, got {x.shape[1]} and {y.shape[1]}")
    return x, y


def _distances(x: Tensor, y: Tensor) -> Tensor:
    """(n, m) Euclidean distances, without the cancellation of the matrix-product form."""
    return torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist")


@checks.arguments(x=checks.tensor, y=checks.tensor, p=_POWER)
def wasserstein_1d(x: Tensor, y: Tensor, p: float = 2.0) -> Tensor:
    """Exact p-Wasserstein distances ``(int |F^-1 - G^-1|^p)^(1/p)`` of each column; sizes may differ.

    Args:
        x: (n, k). y: (m, k).

    Returns:
        (k,), float64.
    """
    x, y = _pair(x, y)
    (n, m) = len(x), len(y)
    x, y = x.sort(0).values, y.sort(0).values
    if n != m:  # both quantile functions are constant between the merged jumps i/n and j/m
        steps = torch.cat([torch.arange(1, n + 1, device=x.device) * m, torch.arange(1, m + 1, device=x.device) * n])
        ends = steps.unique()
        x, y = x[(ends - 1) // m], y[(ends - 1) // n]
        mass = torch.diff(ends, prepend=ends.new_zeros(1)).to(torch.float64) / (n * m)
        return (mass[:, None] * (x - y).abs() ** p).sum(0) ** (1 / p)
    return ((x - y).abs() ** p).mean(0) ** (1 / p)


@checks.arguments(
    x=checks.tensor, y=checks.tensor, p=_POWER, projections=checks.Integer(1), generator=checks.generator | None
)
def sliced_wasserstein(
    x: Tensor, y: Tensor, *, p: float = 2.0, projections: int = 128, generator: torch.Generator | None = None
) -> float:
    """Sliced p-Wasserstein distance ``(E_u W_p(u.x, u.y)^p)^(1/p)`` over uniform directions u (Rabin et al., 2011)."""
    x, y = _pair(x, y)
    directions = torch.randn(x.shape[1], projections, dtype=torch.float64, device=x.device, generator=generator)
    directions = directions / directions.norm(dim=0)
    return ((wasserstein_1d(x @ directions, y @ directions, p) ** p).mean() ** (1 / p)).item()


class KernelDistance:
    """``E k(X, X') + E k(Y, Y') - 2 E k(X, Y)`` from samples to one reference y, whose own term is computed once.

    Args:
        y: the reference, (m, d).
        kernel: ``(n, d), (m, d) -> (n, m)``, positive definite, or conditionally so.
        unbiased: leave pairs of a point with itself out (the U-statistic, which may be negative).
    """

    @checks.arguments(y=checks.tensor, kernel=checks.Function("a function of x and y", 2), unbiased=checks.flag)
    def __init__(self, y: Tensor, kernel: Callable[[Tensor, Tensor], Tensor], *, unbiased: bool = False) -> None:
        self.y, self.kernel, self.unbiased = _samples("y", y), kernel, unbiased
        self._own = self._within("y", self.y)

    def __call__(self, x: Tensor) -> float:
        """The distance of x, (n, d), on y's device."""
        x, y = _pair(x, self.y)
        return (self._within("x", x) + self._own - 2 * self.kernel(x, y).mean()).item()

    def _within(self, name: str, x: Tensor) -> Tensor:
        values = self.kernel(x, x)
        if not self.unbiased:
            return values.mean()
        if len(x) < 2:
            raise ValueError(f"{name} must have at least 2 samples, got {len(x)}")
        return (values.sum() - values.diagonal().sum()) / (len(x) * (len(x) - 1))


@checks.arguments(x=checks.tensor, y=checks.tensor)
def minus_distance(x: Tensor, y: Tensor) -> Tensor:
    """The kernel ``-|x - y|``, whose :class:`KernelDistance` is the energy distance."""
    return -_distances(*_pair(x, y))


@checks.arguments(bandwidth=checks.positive)
def gaussian_kernel(bandwidth: float) -> Callable[[Tensor, Tensor], Tensor]:
    """``exp(-|x - y|^2 / (2 h^2))``."""
    return partial(_gaussian, -0.5 / bandwidth / bandwidth)  # a partial, no closure: can be pickled


def _gaussian(scale: float, x: Tensor, y: Tensor) -> Tensor:
    return (scale * _distances(x, y).square()).exp()


@checks.arguments(x=checks.tensor, y=checks.tensor)
def cubic_kernel(x: Tensor, y: Tensor) -> Tensor:
    """``(x.y / d + 1)^3``, the kernel of KID."""
    x, y = _pair(x, y)
    return (x @ y.T / x.shape[1] + 1) ** 3


@checks.arguments(y=checks.tensor)
def median_distance(y: Tensor) -> float:
    """The median distance between two of y's points, (m, d) with m > 1: the usual bandwidth. 1 where it is zero."""
    y = _samples("y", y)
    if len(y) < 2:
        raise ValueError(f"y must have at least 2 samples, got {len(y)}")
    return torch.pdist(y).median().item() or 1.0


@checks.arguments(x=checks.tensor, y=checks.tensor)
def energy_distance(x: Tensor, y: Tensor) -> float:
    """``2 E|X-Y| - E|X-X'| - E|Y-Y'|`` (Szekely and Rizzo, 2013), the V-statistic: >= 0, and 0 for equal samples."""
    return KernelDistance(y, minus_distance)(x)


@checks.arguments(x=checks.tensor, y=checks.tensor, bandwidth=checks.positive | None)
def mmd(x: Tensor, y: Tensor, *, bandwidth: float | None = None) -> float:
    """Squared maximum mean discrepancy with a Gaussian kernel (Gretton et al., 2012), the V-statistic: >= 0.

    ``bandwidth`` is by default the median distance between two of y's points.
    """
    return KernelDistance(y, gaussian_kernel(median_distance(y) if bandwidth is None else bandwidth))(x)


@checks.arguments(x=checks.tensor, y=checks.tensor)
def kernel_inception_distance(x: Tensor, y: Tensor) -> float:
    """KID (Binkowski et al., arXiv 1801.01401) in whatever space the samples are: unbiased, so it may be negative."""
    return KernelDistance(y, cubic_kernel, unbiased=True)(x)


@checks.arguments(mean1=checks.array, cov1=checks.array, mean2=checks.array, cov2=checks.array)
def gaussian_w2(mean1: Tensor, cov1: Tensor, mean2: Tensor, cov2: Tensor) -> float:
    """Exact 2-Wasserstein distance between two Gaussians (Dowson and Landau, 1982).

    ``W2^2 = |m1 - m2|^2 + tr(C1 + C2 - 2 (C1^1/2 C2 C1^1/2)^1/2)``. Means (d,), covariances (d, d).
    """
    m1, c1, m2, c2 = (torch.as_tensor(v, dtype=torch.float64) for v in (mean1, cov1, mean2, cov2))
    if m1.ndim != 1 or m1.shape != m2.shape or not c1.shape == c2.shape == (len(m1), len(m1)):
        raise ValueError(
            "mean1 and mean2 must have shape (d,), cov1 and cov2 (d, d), "
            f"got {[tuple(v.shape) for v in (m1, c1, m2, c2)]}"
        )
    values, vectors = torch.linalg.eigh(c1)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    cross = torch.linalg.eigvalsh(root @ c2 @ root).clamp(min=0).sqrt().sum()
    square = (m1 - m2).square().sum() + c1.trace() + c2.trace() - 2 * cross
    return square.clamp(min=0).sqrt().item()


class FrechetDistance:
    """``W2^2`` between the Gaussians with two samples' means and covariances, to one reference y whose own are taken once.

    Args:
        y: the reference, (m, d), m > 1.
    """

    @checks.arguments(y=checks.tensor)
    def __init__(self, y: Tensor) -> None:
        self.y = _samples("y", y)
        self._own = self._moments("y", self.y)

    def __call__(self, x: Tensor) -> float:
        """The distance of x, (n, d), n > 1."""
        x, _ = _pair(x, self.y)
        moments = (*self._moments("x", x), *self._own)
        finite = all(bool(moment.isfinite().all()) for moment in moments)
        return gaussian_w2(*moments) ** 2 if finite else math.nan

    @staticmethod
    def _moments(name: str, x: Tensor) -> tuple[Tensor, Tensor]:
        if len(x) < 2:
            raise ValueError(f"{name} must have at least 2 samples, got {len(x)}")
        return x.mean(0), _covariance(x)


@checks.arguments(x=checks.tensor, y=checks.tensor)
def frechet_distance(x: Tensor, y: Tensor) -> float:
    """``W2^2`` between the Gaussians with the samples' means and covariances: FID, in whatever space the samples are."""
    return FrechetDistance(y)(x)


def _covariance(x: Tensor) -> Tensor:
    centred = x - x.mean(0)
    return centred.T @ centred / (len(x) - 1)


@checks.arguments(real=checks.tensor, generated=checks.tensor, k=checks.Integer(1))
def precision_recall(real: Tensor, generated: Tensor, k: int = 3) -> tuple[float, float]:
    """Improved precision and recall (Kynkaanniemi et al., arXiv 1904.06991).

    Precision: the share of generated points within the k-th neighbour radius of some real point; recall: the reverse.
    """
    real, generated = _pair(real, generated, ("real", "generated"))
    checks.integer("k", k, least=1, most=min(len(real), len(generated)) - 1)
    between = _distances(real, generated)
    radius_real = _distances(real, real).kthvalue(k + 1, dim=1).values  # the nearest is the point itself
    radius_generated = _distances(generated, generated).kthvalue(k + 1, dim=1).values
    precision = (between <= radius_real[:, None]).any(0)
    recall = (between <= radius_generated).any(1)
    return precision.double().mean().item(), recall.double().mean().item()
