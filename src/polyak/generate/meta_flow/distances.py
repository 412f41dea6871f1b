"""Distances between predicted and true populations: exact optimal transport, and the discrepancy of Gaussian kernels."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from polyak.core import checks
from polyak.core.distances import KernelDistance

_SAMPLES = checks.Tensor(floating=True, ndim=2)


@checks.arguments(x=_SAMPLES, y=_SAMPLES, p=checks.Number(1, 100))
def wasserstein(x: Tensor, y: Tensor, p: float = 2) -> float:
    """The exact p-Wasserstein distance ``(min_pi E |x - y|^p)^(1/p)`` of two samples, [N, D] and [M, D], equally weighted.

    An assignment where N = M, O(N^3); else a linear program with N M unknowns.

    Raises:
        ImportError: SciPy is not installed.
    """
    cost, largest = _costs(x, y, p)
    if not largest:
        return 0.0
    if len(x) == len(y):
        mean = cost.gather(1, assignment(cost)[:, None]).mean().item()
    else:
        mean = _linear_program(cost)
    return largest * max(mean, 0.0) ** (1 / p)


def _costs(x: Tensor, y: Tensor, p: float) -> tuple[Tensor, float]:
    """``|x - y|^p`` in units of the largest distance, and that."""
    for name, given in (("x", x), ("y", y)):
        if not len(given) or not bool(given.isfinite().all()):
            raise ValueError(f"{name} must have points, all of them finite, got {checks.shown(given)}")
    if x.shape[1] != y.shape[1]:
        raise ValueError(f"x and y must have one dimension, got {x.shape[1]} and {y.shape[1]}")
    distance = torch.cdist(x.double(), y.double(), compute_mode="donot_use_mm_for_euclid_dist").cpu()
    largest = distance.max().item() if distance.numel() else 0.0
    return (distance / (largest or 1.0)) ** p, largest


def _scipy(module: str) -> Any:
    try:
        return import_module(f"scipy.{module}")
    except ImportError as error:
        raise ImportError("exact optimal transport needs SciPy: pip install 'polyak[lab]'") from error


def assignment(cost: Tensor) -> Tensor:
    """The column of each row, of the least total."""
    return torch.from_numpy(_scipy("optimize").linear_sum_assignment(cost.detach().numpy())[1])


def _linear_program(cost: Tensor) -> float:
    """``min sum_ij pi_ij c_ij`` over pi >= 0 with rows of 1/n and columns of 1/m in all."""
    optimize, sparse = _scipy("optimize"), _scipy("sparse")
    n, m = cost.shape
    rows = sparse.kron(sparse.eye_array(n), [[1.0] * m])
    columns = sparse.kron([[1.0] * n], sparse.eye_array(m))
    # In units of 1/(n m) all numbers are whole.
    found = optimize.linprog(
        cost.flatten().numpy(), A_eq=sparse.vstack([rows, columns]), b_eq=[m] * n + [n] * m, method="highs"
    )
    if found.x is None:
        raise RuntimeError(f"SciPy's linear program did not end: {found.message}")
    return found.fun / (n * m)


@checks.arguments(x=_SAMPLES, y=_SAMPLES, gammas=checks.Numbers(1, checks.positive))
def mmd_rbf(x: Tensor, y: Tensor, gammas: Sequence[float] = (2, 1, 0.5, 0.1, 0.01, 0.005)) -> float:
    """The squared maximum mean discrepancy of two samples, [N, D] and [M, D], averaged over kernels ``exp(-gamma |x - y|^2)``.

    With the pairs of a point and itself (the V-statistic): at least 0.
    """
    rates = [float(gamma) for gamma in gammas]

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        square = torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist").square()
        return torch.stack([(-gamma * square).exp() for gamma in rates]).mean(0)

    return KernelDistance(y, kernel)(x)
