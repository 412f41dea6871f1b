"""Distances to a fixed reference, against their definitions written out."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from polyak.core.distances import (
    FrechetDistance,
    KernelDistance,
    cubic_kernel,
    energy_distance,
    frechet_distance,
    gaussian_kernel,
    kernel_inception_distance,
    median_distance,
    minus_distance,
    mmd,
)


def points(n: int, d: int, seed: int) -> Tensor:
    return torch.randn(n, d, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


X, Y = points(6, 3, 0), points(9, 3, 1) + 0.5


def mean(kernel, a: Tensor, b: Tensor, *, apart: bool = False) -> float:
    """The mean of a kernel over pairs, one by one; ``apart`` leaves out a point with itself."""
    pairs = [(i, j) for i in range(len(a)) for j in range(len(b)) if not (apart and i == j)]
    return math.fsum(kernel(a[i], b[j]) for i, j in pairs) / len(pairs)


def written_out(kernel, *, apart: bool = False) -> float:
    return mean(kernel, X, X, apart=apart) + mean(kernel, Y, Y, apart=apart) - 2 * mean(kernel, X, Y)


def test_energy_distance_is_its_definition():
    assert energy_distance(X, Y) == pytest.approx(written_out(lambda a, b: -float((a - b).norm())), rel=1e-12)


def test_mmd_is_its_definition_and_takes_the_median_distance():
    def kernel(a: Tensor, b: Tensor) -> float:
        return math.exp(-float((a - b).square().sum()) / (2 * 0.7**2))

    assert mmd(X, Y, bandwidth=0.7) == pytest.approx(written_out(kernel), rel=1e-12)
    pairs = sorted(float((Y[i] - Y[j]).norm()) for i in range(9) for j in range(i))
    assert median_distance(Y) == pytest.approx(pairs[17], rel=1e-14)  # the lower middle of 36
    assert mmd(X, Y) == mmd(X, Y, bandwidth=median_distance(Y))
    assert abs(mmd(Y, Y)) < 1e-14


def test_kid_is_its_unbiased_definition():
    def kernel(a: Tensor, b: Tensor) -> float:
        return (float(a @ b) / 3 + 1) ** 3

    assert kernel_inception_distance(X, Y) == pytest.approx(written_out(kernel, apart=True), rel=1e-10)


def test_kid_is_unbiased():
    # Zero on average for two samples of one law; the mean of 400 has a standard error of its spread / 20.
    values = torch.tensor([kernel_inception_distance(points(8, 3, 2 * i), points(8, 3, 2 * i + 1)) for i in range(400)])
    assert abs(float(values.mean())) < 4 * float(values.std()) / 20


def test_a_fixed_reference_gives_what_two_samples_give():
    assert KernelDistance(Y, minus_distance)(X) == energy_distance(X, Y)
    assert KernelDistance(Y, gaussian_kernel(0.7))(X) == mmd(X, Y, bandwidth=0.7)
    assert KernelDistance(Y, cubic_kernel, unbiased=True)(X) == kernel_inception_distance(X, Y)
    assert FrechetDistance(Y)(X) == frechet_distance(X, Y)


def test_one_point_repeated_has_a_bandwidth():
    assert median_distance(torch.ones(4, 2)) == 1.0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: mmd(X, Y, bandwidth=0.0), "bandwidth must be > 0, got 0.0"),
        (lambda: mmd(X, Y[:1]), "y must have at least 2 samples, got 1"),
        (lambda: kernel_inception_distance(X, Y[:1]), "y must have at least 2 samples, got 1"),
        (lambda: kernel_inception_distance(X[:1], Y), "x must have at least 2 samples, got 1"),
        (lambda: frechet_distance(X[:1], Y), "x must have at least 2 samples, got 1"),
        (lambda: FrechetDistance(Y)(X[:, :2]), "x and y must have one dimension, got 2 and 3"),
        (lambda: KernelDistance(Y.long(), minus_distance), "y must be floating point"),
    ],
)
def test_bad_samples_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
