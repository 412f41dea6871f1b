"""The weights of Adams-Bashforth methods with momentum, and the regions in which these methods are stable."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from polyak.core import checks

Method = Literal["hb", "ghvb", "nt"]
K = checks.Integer(1, 5)
BETA = checks.Number(0, 1, "(]")
METHOD = checks.Choice("hb", "ghvb", "nt")
_ROUNDING = 1e-9  # what a root on the unit circle may seem to be outside of it

# Of each order the denominator d and, newest first, the pairs (p, q): a weight is (p + q b) / (d b).
_MIXERS: dict[int, tuple[int, tuple[tuple[int, int], ...]]] = {
    1: (1, ((0, 1),)),
    2: (2, ((2, 1), (-2, 1))),
    3: (12, ((18, 5), (-24, 8), (6, -1))),
    4: (24, ((46, 9), (-78, 19), (42, -5), (-10, 1))),
    5: (720, ((1650, 251), (-3420, 646), (2880, -264), (-1380, 106), (270, -19))),
}


@checks.arguments(k=K, beta=BETA)
def ab_coefficients(k: int, beta: float = 1.0) -> tuple[float, ...]:
    """The weights of ``M_k(v; beta)``, newest first, on a uniform grid (arXiv 2307.11118, appendix).

    ``beta=1`` is the Adams-Bashforth method. Below 1 the weights are those of order k for values that are averages
    ``v_n = (1 - beta) v_(n-1) + beta g_n``. They sum to 1.

    Args:
        k: the order, 1 to 5.
        beta: in (0, 1].
    """
    denominator, pairs = _MIXERS[k]
    return tuple((p + q * beta) / (denominator * beta) for p, q in pairs)


def _transfer(method: Method, k: int, beta: float) -> list[float]:
    """N of ``zeta - 1 = z N(1 / zeta) / (1 - (1 - beta) / zeta)``, the characteristic equation, by powers of ``1 / zeta``."""
    weights = [beta * c for c in ab_coefficients(k, beta if method == "ghvb" else 1.0)]
    if method != "nt":
        return weights
    # Nesterov's step is (1 - beta) v + beta p, and p = v (1 - (1 - beta) / zeta) / beta.
    return [(2 - beta) * c - (1 - beta) * b for c, b in zip([*weights, 0.0], [0.0, *weights], strict=True)]


@checks.arguments(method=METHOD, k=K, beta=BETA)
def stability_limit(method: Method, k: int, beta: float = 1.0) -> float:
    """The largest z for which the method does not grow on ``y' = -z y`` with steps of length 1.

    There a root is -1. With L_k = 2, 1, 6/11, 3/10, 90/551 it is ``L_k (2 - beta) / beta`` for HB and ``L_k (2 - beta) / (beta (3 -
    2 beta))`` for Nesterov's. For GHVB it is, order by order, ``2 (2 - beta) / beta``, ``2 - beta``, ``6 (2 - beta) / (12 -
    beta)``, ``3 (2 - beta) / (11 - beta)`` and ``90 (2 - beta) / (600 - 49 beta)``.

    Args:
        method: "hb", "ghvb" or "nt".
        k: the order, 1 to 5.
        beta: in (0, 1]; 1 is the Adams-Bashforth method, for each of the three.
    """
    return 2 * (2 - beta) / sum(c * (-1) ** i for i, c in enumerate(_transfer(method, k, beta)))


@checks.arguments(method=METHOD, k=K, beta=BETA, grid=checks.Tensor(inexact=True))
def stability_region(method: Method, k: int, beta: float, grid: Tensor) -> Tensor:
    """Where in the plane the method does not grow on ``y' = z y`` with steps of length 1: all roots are within the unit circle.

    Args:
        method, k, beta: as for :func:`stability_limit`, which is the region's end on the negative real axis.
        grid: values of z, real or complex, of any shape.

    Returns:
        Truths of grid's shape.

    Raises:
        ValueError: grid holds values that are not finite.
    """
    if not bool(grid.isfinite().all()):
        raise ValueError(f"grid must be finite, got {grid[~grid.isfinite()][:3].tolist()}")
    z = grid.to(torch.complex128)
    numerator = _transfer(method, k, beta)
    degree = max(len(numerator), 2)
    # zeta^degree - (2 - beta) zeta^(degree-1) + (1 - beta) zeta^(degree-2) - z sum_i N_i zeta^(degree-1-i)
    companion = torch.zeros(*z.shape, degree, degree, dtype=z.dtype, device=z.device)
    for i, weight in enumerate(numerator):
        companion[..., 0, i] = weight * z
    companion[..., 0, 0] += 2 - beta
    companion[..., 0, 1] -= 1 - beta
    rows = torch.arange(1, degree, device=z.device)
    companion[..., rows, rows - 1] = 1.0
    roots = torch.linalg.eigvals(companion).abs()
    return (roots <= 1 + _ROUNDING).all(-1)
