"""Scores of ensemble forecasts: of members (B, M, ...) against what came, (B, ...).

``mask`` is True where there are data; both may be NaN elsewhere, and nowhere else. A row without data scores NaN. Thresholds and
values are in units of the data. Half precision is scored in float32.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d

from polyak.core import checks
from polyak.generate.evaluate import HALF

_MEMBERS = checks.Tensor(floating=True, least_ndim=3)
_TRUTH = checks.Tensor(floating=True, least_ndim=2)
_MASK = checks.Tensor(least_ndim=1) | None


def _prepared(samples: Tensor, truth: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Members and truth (0 where it is not known), in float32 at least, and mask, of matching shapes."""
    if samples.shape[:1] + samples.shape[2:] != truth.shape:
        raise ValueError(f"truth must have shape {(len(samples), *samples.shape[2:])}, got {tuple(truth.shape)}")
    if mask is None:
        mask = torch.ones_like(truth, dtype=torch.bool)
    elif mask.dtype != torch.bool:
        raise ValueError(f"mask must be of bool, True where there are data, got {mask.dtype}")
    else:
        try:
            mask = mask.to(truth.device).expand_as(truth)
        except RuntimeError:
            raise ValueError(f"mask must broadcast to {tuple(truth.shape)}, got {tuple(mask.shape)}") from None
        samples, truth = samples.masked_fill(~mask[:, None], 0.0), truth.masked_fill(~mask, 0.0)
    for name, x in (("samples", samples), ("truth", truth)):
        if bool(x.isnan().any()):
            raise ValueError(f"{name} has NaN, which needs a mask that is False there")
    return _precise(samples), _precise(truth), mask


def _precise(x: Tensor) -> Tensor:
    return x.float() if x.dtype in HALF else x


def _mean(values: Tensor, mask: Tensor) -> Tensor:
    """Over the known pixels of each row, (B,)."""
    return (values * mask).flatten(1).sum(1) / mask.flatten(1).sum(1)


@checks.arguments(samples=_MEMBERS, truth=_TRUTH, mask=_MASK)
def crps(samples: Tensor, truth: Tensor, mask: Tensor | None = None) -> Tensor:
    """The continuous ranked probability score of each forecast, ``mean|e - y| - mean|e - e'| / 2``, (B,).

    Of one member it is the mean absolute error.
    """
    e, y, known = _prepared(samples, truth, mask)
    m = e.shape[1]
    # sum |e - e'| over pairs, of sorted members: 2 sum_i (2 i - m + 1) e_i.
    rank = 2 * torch.arange(m, dtype=e.dtype, device=e.device) - (m - 1)
    pairs = torch.einsum("bm...,m->b...", e.sort(1).values, rank) / m**2
    return _mean((e - y[:, None]).abs().mean(1) - pairs, known)


@checks.arguments(samples=_MEMBERS, truth=_TRUTH, mask=_MASK)
def ensemble_rmse(samples: Tensor, truth: Tensor, mask: Tensor | None = None) -> Tensor:
    """The root mean square error of the mean over the members, (B,)."""
    e, y, known = _prepared(samples, truth, mask)
    return _mean((e.mean(1) - y).square(), known).sqrt()


@checks.arguments(samples=_MEMBERS, truth=_TRUTH, mask=_MASK)
def spread_skill(samples: Tensor, truth: Tensor, mask: Tensor | None = None) -> Tensor:
    """Spread over error, (B,): ``sqrt((M + 1) / M var) / rmse``, 1 for members that are drawn as the truth is."""
    e, y, known = _prepared(samples, truth, mask)
    m = e.shape[1]
    if m < 2:
        raise ValueError(f"samples must have at least 2 members for a spread, got {m}")
    return ((m + 1) / m * _mean(e.var(1), known)).sqrt() / _mean((e.mean(1) - y).square(), known).sqrt()


@checks.arguments(samples=_MEMBERS, truth=_TRUTH, threshold=checks.real, mask=_MASK)
def csi(samples: Tensor, truth: Tensor, threshold: float, mask: Tensor | None = None) -> Tensor:
    """The critical success index of the ensemble's mean, hits / (hits + misses + false alarms), (B,); NaN without events."""
    e, y, known = _prepared(samples, truth, mask)
    said, came = (e.mean(1) >= threshold) & known, (y >= threshold) & known
    return (said & came).flatten(1).sum(1) / (said | came).flatten(1).sum(1)


@checks.arguments(
    samples=checks.Tensor(floating=True, least_ndim=4), truth=checks.Tensor(floating=True, least_ndim=3),
    threshold=checks.real, size=checks.Integer(1), mask=_MASK,
)  # fmt: skip
def fss(samples: Tensor, truth: Tensor, threshold: float, size: int, mask: Tensor | None = None) -> Tensor:
    """The fractions skill score of the members' frequencies in squares of ``size`` pixels, (B,); 1 is perfect, NaN without events.

    ``1 - sum (p - o)^2 / sum (p^2 + o^2)`` (Roberts and Lean 2008), fields in the last two dimensions.
    """
    e, y, known = _prepared(samples, truth, mask)
    height, width = y.shape[-2:]
    if size > min(height, width):
        raise ValueError(f"size must be at most the field's {min(height, width)} pixels, got {size}")
    there = known.to(e.dtype)
    p, o = (e >= threshold).to(e.dtype).mean(1) * there, (y >= threshold).to(e.dtype) * there
    p, o = (avg_pool2d(v.reshape(len(v), -1, height, width), size, 1).flatten(1) for v in (p, o))
    return 1 - (p - o).square().sum(1) / (p.square() + o.square()).sum(1)


@checks.arguments(x=checks.Tensor(floating=True, least_ndim=2))
def power_spectrum(x: Tensor) -> Tensor:
    """The power of fields (..., H, W) in rings of one wavenumber each: (..., min(H, W) // 2 + 1). Its sum is the mean of x^2."""
    height, width = x.shape[-2:]
    if not height * width:
        raise ValueError(f"x must have fields of at least one pixel, got {tuple(x.shape)}")
    x = _precise(x)
    power = torch.fft.fft2(x, norm="forward").abs().square()
    ky, kx = (torch.fft.fftfreq(n, 1 / n, dtype=x.dtype, device=x.device) for n in (height, width))
    last = min(height, width) // 2
    ring = torch.hypot(ky[:, None], kx).round().long().clamp(max=last)  # corners belong to the last ring
    flat = power.flatten(-2)
    return flat.new_zeros(*flat.shape[:-1], last + 1).index_add(-1, ring.flatten(), flat)


@checks.arguments(samples=_MEMBERS, truth=_TRUTH, mask=_MASK)
def rank_histogram(samples: Tensor, truth: Tensor, mask: Tensor | None = None) -> Tensor:
    """How often so many members are below what came, (M + 1,); flat for members that are drawn as the truth is."""
    e, y, known = _prepared(samples, truth, mask)
    ranks = (e < y[:, None]).sum(1)[known]
    return torch.bincount(ranks, minlength=e.shape[1] + 1)
