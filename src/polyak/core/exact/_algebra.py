"""Products, tilts and powers of Gaussian densities, and their masses. All tensors are float64; covariances are full matrices."""

from __future__ import annotations

import math

import torch
from torch import Tensor

_LOG_2PI = math.log(2 * math.pi)


def factored(matrices: Tensor, message: str) -> Tensor:
    """Lower Cholesky factors; ValueError with the message where a matrix is not positive definite."""
    factors, failed = torch.linalg.cholesky_ex(matrices)
    if bool(failed.any()) or not bool(factors.isfinite().all()):
        raise ValueError(message)
    return factors


def spectrum(covariances: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues, those within rounding of zero set to zero, and eigenvectors."""
    values, vectors = torch.linalg.eigh(covariances)
    tiny = values.abs().amax(-1, keepdim=True) * values.shape[-1] * torch.finfo(torch.float64).eps
    return torch.where(values.abs() <= tiny, 0.0, values), vectors


def log_density(offset: Tensor, factor: Tensor) -> Tensor:
    """``log N(offset; 0, L L')`` for offsets (..., d) and factors L (..., d, d)."""
    white = torch.linalg.solve_triangular(factor, offset[..., None], upper=False)[..., 0]
    half_det = factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    return -0.5 * (white.square().sum(-1) + offset.shape[-1] * _LOG_2PI) - half_det


def tilted(means: Tensor, roots: Tensor, b: Tensor, B: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``N(x; m, L L') exp(b'x - x'Bx/2)``: means (K, d), covariances (K, d, d), log masses (K,).

    With ``M = I + L'BL`` the covariance is ``S' = L M^-1 L'``, the mean ``m + S'(b - Bm)`` and the mass
    ``b'm - m'Bm/2 + (b - Bm)'S'(b - Bm)/2 - log|M|/2``: L may be singular.
    """
    inner = roots.mT @ B @ roots + torch.eye(means.shape[1], dtype=means.dtype, device=means.device)
    factor = factored(inner, "B leaves nothing to normalise: every S_k^-1 + B must be positive definite")
    half = torch.linalg.solve_triangular(factor, roots.mT, upper=False)  # S' = half' half
    pull = means @ B
    pushed = torch.einsum("kij,kj->ki", half, b - pull)
    log_mass = means @ b - 0.5 * (means * pull).sum(-1) + 0.5 * pushed.square().sum(-1)
    moved = means + torch.einsum("kji,kj->ki", half, pushed)
    return moved, half.mT @ half, log_mass - factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)


def multiplied(m1: Tensor, s1: Tensor, m2: Tensor, s2: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``N(x; m1, S1) N(x; m2, S2)`` of every pair, first index slowest: means, covariances, log masses.

    With ``T = S1 + S2``, ``H = S2 T^-1`` and ``G = S1 T^-1``: the mean is ``H m1 + G m2``, the covariance
    ``H S1 H' + G S2 G'``, and the mass ``N(m1; m2, T)``.
    """
    d = m1.shape[1]
    m1, s1, m2, s2 = m1[:, None], s1[:, None], m2[None], s2[None]
    factor = factored(s1 + s2, "other and this law both have a component without spread in one direction")
    h, g = (torch.cholesky_solve(s.expand_as(factor).mT, factor).mT for s in (s2, s1))
    means = (h @ m1[..., None] + g @ m2[..., None])[..., 0]
    covariances = h @ s1 @ h.mT + g @ s2 @ g.mT
    return means.reshape(-1, d), covariances.reshape(-1, d, d), log_density(m1 - m2, factor).flatten()


def powers(means: Tensor, covariances: Tensor, betas: Tensor, message: str) -> tuple[Tensor, Tensor, Tensor]:
    """``prod_k N(x; m_k, S_k)^beta_nk`` for each row n of betas (n, K): means, covariances, log masses.

    The precision is ``P = sum_k beta_k S_k^-1``; the mass is the integrand at its mean, times ``(2 pi)^(d/2) |P|^(-1/2)``.
    """
    factor = factored(covariances, "covariances must be positive definite: a law without density has no powers")
    precision = torch.cholesky_inverse(factor)
    total = torch.einsum("nk,kij->nij", betas, precision)
    chol = factored(total, message)
    pulled = torch.einsum("nk,kij,kj->ni", betas, precision, means)
    m = torch.cholesky_solve(pulled[..., None], chol)[..., 0]
    at_mean = (betas * log_density(m[:, None] - means, factor)).sum(-1)
    log_mass = at_mean + 0.5 * means.shape[1] * _LOG_2PI - chol.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    return m, torch.cholesky_inverse(chol), log_mass
