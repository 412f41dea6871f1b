"""How far the samples of Markov chains are independent: the autocorrelation of a statistic, and the effective number of samples."""

from __future__ import annotations

import torch
from torch import Tensor

from polyak.core import checks
from polyak.generate.process import wide

_VALUES = checks.Tensor(floating=True, ndim=2)


@checks.arguments(values=_VALUES)
def autocorrelation(values: Tensor) -> Tensor:
    """The correlation of a statistic with itself so many samples later, averaged over chains.

    Deviations are from the mean of all chains, so that chains that stay where they are count as correlated.

    Args:
        values: (n, chains), the statistic of the n samples that each chain emitted, in order; at least 2 of them.

    Returns:
        (n,), float64; the first is 1. Where the statistic is constant all others are 0.
    """
    n, chains = values.shape
    if n < 2 or not chains:
        raise ValueError(f"values must have shape (n, chains), n at least 2, got {tuple(values.shape)}")
    wider = values.to(wide(values.device))
    moved = wider - wider.mean()
    spectrum = torch.fft.rfft(moved, 2 * n, dim=0)
    products = torch.fft.irfft(spectrum.abs().square(), 2 * n, dim=0)[:n].sum(1)
    covariance = products / (chains * torch.arange(n, 0, -1, device=values.device))
    least = torch.finfo(wider.dtype).eps * wider.square().mean()
    varies = covariance[0] > least
    correlation = torch.where(varies, covariance / torch.where(varies, covariance[0], 1.0), 0.0)
    correlation[0] = 1.0
    return correlation


@checks.arguments(values=_VALUES)
def effective_sample_size(values: Tensor) -> float:
    """How many independent samples know the mean of a statistic as well as these do: ``n chains / (1 + 2 sum of correlations)``.

    The sum ends before the first pair of neighbours whose sum is not positive (Geyer, 1992).

    Args:
        values: as for :func:`autocorrelation`.
    """
    correlation = autocorrelation(values)
    pairs = correlation[: len(correlation) // 2 * 2].reshape(-1, 2).sum(1)
    kept = (pairs > 0).cumprod(0)
    time = 2 * (pairs * kept).sum() - 1
    return values.numel() / max(time.item(), 1 / values.numel())
