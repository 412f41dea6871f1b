"""The data separation function of a law: how much of it is seen through noise (arXiv 2306.06626, section 4)."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from polyak.core import checks
from polyak.core.exact import Mixture
from polyak.generate.prediction import Denoiser
from polyak.generate.process import Process, standard_normal
from polyak.generate.process.path import unwatched

_MOST = 1e4  # snr beyond which 1 - lambda has too few digits to be multiplied by snr^2
_LEAST = 1e-15  # of 1 - lambda in a table, whose logarithm is interpolated
_ENTRIES = 1 << 22  # of the largest matrix of distances
_ROWS = 256  # that a network is given at once
_SNR = checks.Number(0, infinite=True)
_OFF = 0.01  # how far from mean 0 and mean square 1 data are taken to be normalised


def _pchip_slopes(x: Tensor, y: Tensor) -> Tensor:
    """The slopes of the monotone cubic through points (Fritsch and Butland, 1984); at the ends the secants'."""
    h, secant = torch.diff(x), torch.diff(y) / torch.diff(x)
    before, after = secant[:-1], secant[1:]
    w1, w2 = 2 * h[1:] + h[:-1], h[1:] + 2 * h[:-1]
    inner = torch.where(before * after > 0, (w1 + w2) / (w1 / before + w2 / after), 0.0)
    return torch.cat([secant[:1], inner, secant[-1:]])


def _pchip(x: Tensor, y: Tensor, slopes: Tensor, at: Tensor) -> Tensor:
    """The cubic through ``(x, y)`` with these slopes, within [x[0], x[-1]]."""
    left = (torch.searchsorted(x, at.contiguous(), right=True) - 1).clamp(0, len(x) - 2)
    h = x[left + 1] - x[left]
    s = (at - x[left]) / h
    rise = y[left + 1] - y[left]
    a, b = h * slopes[left] - rise, rise - h * slopes[left + 1]
    return torch.lerp(y[left], y[left + 1], s) + s * (1 - s) * ((1 - s) * a + s * b)


class Separation:
    """``lambda(g) = E|E[x1 | g x1 + x0]|^2 / d`` for data x1 of mean 0 and ``E|x1|^2 = d``, and noise x0 ~ N(0, I).

    It rises from 0 to 1, and is at least ``g^2 / (1 + g^2)``, which it is for N(0, I) alone. ``1 - lambda`` is the mean square
    error per dimension of the best denoiser. Between the given points its logarithm is interpolated by a monotone cubic in
    log g; below the first lambda is proportional to g^2, beyond the last ``1 - lambda`` to ``1 / (1 + g^2)``.

    Args:
        snr: increasing values of g = alpha / sigma, at least two.
        values: lambda there. What is below the bound by up to five standard errors is raised to it, what falls to what was before.
        stderr: standard errors of the values; left out, none.

    Attributes:
        snr, values, stderr: (K,), float64.
        lower_bound: ``snr^2 / (1 + snr^2)``.
        estimates: (2, K) or None: what was found from ``|x1_hat|^2``, and from ``|x1 - x1_hat|^2``.
        shift, scale: the data's mean (a number or a tensor of a sample's shape), and the root of their mean square about it: lambda
            is that of ``(data - shift) / scale``.
    """

    estimates: Tensor | None = None
    shift: float | Tensor = 0.0
    scale: float = 1.0

    @checks.arguments(
        snr=checks.Numbers(2, checks.positive, "a sequence of at least 2 signal-to-noise ratios"),
        values=checks.Numbers(2, checks.non_negative), stderr=checks.Numbers(2, checks.non_negative) | None,
    )  # fmt: skip
    def __init__(
        self,
        snr: Sequence[float] | Tensor,
        values: Sequence[float] | Tensor,
        stderr: Sequence[float] | Tensor | None = None,
    ) -> None:
        self.snr, self.values = (torch.as_tensor(given, dtype=torch.float64).cpu() for given in (snr, values))
        self.stderr = (
            torch.zeros_like(self.values) if stderr is None else torch.as_tensor(stderr, dtype=torch.float64).cpu()
        )
        for name, given in (("values", self.values), ("stderr", self.stderr)):
            if given.shape != self.snr.shape:
                raise ValueError(f"{name} must have one number for each of the {len(self.snr)} snr, got {len(given)}")
        if not bool((torch.diff(self.snr) > 0).all()):
            raise ValueError(f"snr must increase, got {self.snr.tolist()}")
        self.lower_bound = self.snr.square() / (1 + self.snr.square())
        slack = 5 * self.stderr + 1e-9
        for wrong, what in (
            (self.values < self.lower_bound - slack, "at least snr^2 / (1 + snr^2)"),
            (self.values > 1 + slack, "at most 1"),
        ):
            if bool(wrong.any()):
                i = int(wrong.nonzero()[0])
                raise ValueError(
                    f"values must be {what} up to 5 standard errors, got {self.values[i].item():.6g} "
                    f"+- {self.stderr[i].item():.2g} at snr={self.snr[i].item():.4g}: the separation estimate is inconsistent: "
                    "increase n_samples"
                )
        self.values = torch.maximum(self.values, self.lower_bound).clamp(max=1.0).cummax(0).values
        self._log_snr, self._log_left = self.snr.log(), (1 - self.values).clamp(min=_LEAST).log()
        self._slopes = _pchip_slopes(self._log_snr, self._log_left)

    def __call__(self, snr: float | Tensor) -> Any:
        """lambda at a signal-to-noise ratio, a number or a tensor of any shape: of the same kind."""
        if isinstance(snr, Tensor):
            return self._at(snr.to("cpu", torch.float64)).to(snr)
        with unwatched():
            return self._at(torch.tensor(_SNR("snr", snr), dtype=torch.float64, device="cpu")).item()

    def _at(self, snr: Tensor) -> Tensor:
        first, last = self.snr[0], self.snr[-1]
        inner = _pchip(self._log_snr, self._log_left, self._slopes, snr.clamp(first, last).log())
        below = self.values[0] * (snr / first).square().clamp(max=1.0)
        left = torch.where(snr > last, inner.exp() * (1 + last**2) / (1 + snr**2), inner.exp())
        found = torch.where(snr < first, below, torch.where(left <= _LEAST, 1.0, 1 - left))
        return torch.maximum(found, 1 / (1 + snr**-2)).clamp(max=1.0)

    def _metric(self, angle: Tensor) -> Tensor:
        return metric_of(self, angle)


def metric_of(separation: Callable[[Tensor], Tensor], angle: Tensor) -> Tensor:
    """``G(theta) = 1 - (1 - lambda(tan theta)) / cos^2 theta``, in [0, 1], for float64 angles in [0, pi / 2]."""
    snr = torch.tan(angle.clamp(max=math.atan(_MOST)))
    found = separation(snr)
    if not isinstance(found, Tensor) or found.shape != snr.shape:
        raise ValueError("separation must map a tensor of signal-to-noise ratios to a tensor of its shape")
    if not bool((found >= -1e-9).all() & (found <= 1 + 1e-9).all()):
        raise ValueError(f"separation must have values in [0, 1], got {found.min().item():g} to {found.max().item():g}")
    return (1 - (1 - found.to(torch.float64)) * (1 + snr**2)).clamp(0.0, 1.0)


class _OfSpectrum(Separation):
    """That of a Gaussian, in closed form."""

    def __init__(self, spectrum: Tensor) -> None:
        self.spectrum = spectrum
        snr = torch.logspace(-2, 4, 61, dtype=torch.float64, device="cpu")
        super().__init__(snr, self._at(snr))

    def _at(self, snr: Tensor) -> Tensor:
        square = snr[..., None].square()
        found = (square * self.spectrum**2 / (1 + square * self.spectrum)).mean(-1)
        return torch.where(snr.isinf(), 1.0, found)

    def _metric(self, angle: Tensor) -> Tensor:
        # 1 - mean c / (cos^2 + c sin^2) with mean c = 1: this form has no cancellation, and a limit at pi / 2.
        s, c = angle.sin().square()[..., None], angle.cos().square()[..., None].clamp(min=1e-30)
        return (s * c * (self.spectrum - 1).square() / (c + self.spectrum * s)).mean(-1).clamp(max=1.0)


@checks.arguments(spectrum=checks.Numbers(1, checks.non_negative, "a sequence of eigenvalues"))
def gaussian_separation(spectrum: Sequence[float] | Tensor) -> Separation:
    """The separation function of a Gaussian with this spectrum, in closed form: ``mean g^2 c^2 / (1 + g^2 c)``.

    Args:
        spectrum: eigenvalues c of the covariance, at least one of them positive; they are divided by their mean, whose root is the
            ``scale`` of the result.
    """
    eigenvalues = torch.as_tensor(spectrum, dtype=torch.float64).cpu()
    mean = eigenvalues.mean().item()
    if not 0 < mean < math.inf:
        raise ValueError(f"spectrum must have a positive, finite mean, got {mean:g}")
    made = _OfSpectrum(eigenvalues / mean)
    made.scale = math.sqrt(mean)
    return made


Reconstruct = Callable[[Tensor, Tensor, float], Tensor]  # (x1, noise, g) -> the data, seen through g x1 + noise; (M, d)


def _best(law: Mixture) -> Reconstruct:
    """The best denoiser of a law."""
    entries = len(law) * (law.dim if law.basis is not None else 1)
    rows = max(1, _ENTRIES // max(entries, law.dim))

    def reconstruct(x1: Tensor, noise: Tensor, g: float) -> Tensor:
        parts = zip(x1.split(rows), noise.split(rows), strict=True)
        return torch.cat([law.posterior_mean(g * x + e, g, 1.0) for x, e in parts])

    return reconstruct


def _trained(denoiser: Denoiser, like: Tensor, mean: Tensor) -> Reconstruct:
    """A denoiser of data of some shape, type and mean."""
    process: Any = denoiser.process
    least = math.exp(process.lam(process.t_max))

    @torch.no_grad()
    def reconstruct(x1: Tensor, noise: Tensor, g: float) -> Tensor:
        if g < least * (1 - 1e-6):  # more noise than it was trained with: what it says of less would be too good
            return mean.expand_as(x1)
        t = min(max(process.t_of_lam(math.log(g)), process.t_min), process.t_max)
        alpha, sigma = process.alpha(t), process.sigma(t)
        parts = zip(x1.split(_ROWS), noise.split(_ROWS), strict=True)
        states = [(alpha * x + sigma * e).reshape(-1, *like.shape[1:]).to(like.dtype) for x, e in parts]
        return torch.cat([denoiser(x, t).x0.flatten(1).to(torch.float64) for x in states])

    return reconstruct


def _moments(name: str, points: Tensor, h: float) -> tuple[Tensor, float]:
    """The mean and the variance per dimension of a data set, (n, d), with a bandwidth."""
    if not bool(points.isfinite().all()):
        raise ValueError(f"{name} must be finite, got NaN or infinity")
    if not points.numel():
        raise ValueError(f"{name} must not be empty, got shape {tuple(points.shape)}")
    mean = points.mean(0)
    variance = (points - mean).square().mean().item() + h**2
    if len(points) < 2 or not variance:
        raise ValueError(
            f"{name} must have at least 2 different points, got shape {tuple(points.shape)}: the data set is a single point: "
            "the kinetic-optimal path is Cond-OT (Flow)"
        )
    return mean, variance


def _drawn(points: Tensor, h: float, n: int, generator: torch.Generator | None) -> Tensor:
    """n of the points, each as often as the others, up to one, with the bandwidth's noise."""
    rounds = [
        torch.randperm(len(points), generator=generator, device=points.device) for _ in range(-(-n // len(points)))
    ]
    x1 = points[torch.cat(rounds)[:n]]
    return x1 + h * _normal(x1, generator) if h else x1


def _normal(like: Tensor, generator: torch.Generator | None) -> Tensor:
    return standard_normal(like.shape, generator=generator, dtype=torch.float64, device=like.device)


def _default_grid(n: int | None, d: int, h: float) -> Tensor:
    """Of a law or a data set of n points, normalised."""
    most = max(20.0, 10 / h) if h else 20.0
    grid = torch.logspace(math.log10(0.02), math.log10(most), 40, dtype=torch.float64, device="cpu")
    if n is None:
        return grid
    jump = math.log10(2 * math.log(max(n, 2)) / d) / 2
    return torch.cat([grid, torch.logspace(jump - 0.3, jump + 0.3, 20, dtype=torch.float64, device="cpu")]).unique()


def _combined(square: Tensor, error: Tensor) -> Tensor:
    """What has the least variance of ``square - w (square - error)``, for each row."""
    apart = square - error
    apart = apart - apart.mean(1, keepdim=True)
    spread = apart.square().mean(1)
    weight = torch.where(spread > 0, (square * apart).mean(1) / spread.clamp(min=1e-300), 0.0)
    return square - weight[:, None] * (square - error)


_GIVEN = (
    checks.Tensor(floating=True, least_ndim=2)
    | checks.Instance(Mixture, words="a Mixture")
    | checks.Instance(Denoiser, words="a Denoiser")
)


@checks.arguments(
    data_or_denoiser=_GIVEN, snr=checks.Numbers(2, checks.positive, "a sequence of at least 2 signal-to-noise ratios") | None,
    n_samples=checks.Integer(16, 10**7), generator=checks.generator | None, h=checks.Number(0, 1e6),
    data=checks.Tensor(floating=True, least_ndim=2) | None,
)  # fmt: skip
def separation_function(
    data_or_denoiser: Tensor | Mixture | Denoiser,
    snr: Sequence[float] | Tensor | None = None,
    n_samples: int = 4096,
    generator: torch.Generator | None = None,
    h: float = 0.0,
    *,
    data: Tensor | None = None,
) -> Separation:
    """Estimate the data separation function by Monte Carlo.

    Both ``|x1_hat|^2`` and ``1 - |x1 - x1_hat|^2`` estimate lambda without bias where the reconstruction is the best one; the
    result is their combination of least variance. A trained denoiser gives the second alone: ``1 - lambda`` is then an upper
    bound, and the bound of the best linear denoiser is taken where that is better, and where there is more noise than at its t_max.

    Args:
        data_or_denoiser: a data set, shape (n, ...), whose best denoiser is known; or a law, a :class:`~polyak.core.exact.Mixture`;
            or a trained :class:`Denoiser` of a Gaussian process, with its ``data``.
        snr: increasing signal-to-noise ratios g = alpha / sigma of the normalised data. Default: 60 from 0.02 to 20 (to 10 / h, if
            that is more), a third of them about ``sqrt(2 log n / d)``, where a small data set is suddenly remembered.
        n_samples: draws of data and noise, the same at every g. The cost is n_samples * n * d for each.
        generator: on the data's device.
        h: bandwidth of the Gaussian about each of the data, in their units; 0 for the data set itself.
        data: for a denoiser: what it was trained on, shape (n, ...).

    Raises:
        ValueError: data that are not finite, fewer than two or all equal; an estimate below its bound by more than five
            standard errors.

    Warns:
        UserWarning: the data have not mean 0 and mean square 1. lambda is that of ``(data - shift) / scale``, with the result's
            ``shift`` and ``scale``, and so is the path that is made from it.
    """
    given = data_or_denoiser
    if isinstance(given, Denoiser) != (data is not None):
        raise ValueError(f"data is needed with a denoiser, and with nothing else, got {checks.shown(data)}")
    if h and not isinstance(given, Tensor):
        raise ValueError(f"h is a bandwidth about the points of a data set, got h={h!r} with {checks.shown(given)}")
    points = given if isinstance(given, Tensor) else data
    if isinstance(given, Mixture):
        mean, variance, shape = given.mean, torch.diagonal(given.covariance).mean().item(), (given.dim,)
        if not variance:
            raise ValueError("data_or_denoiser must have a variance > 0, got 0")
        x1, reconstruct = given.sample(n_samples, generator=generator), _best(given)
    else:
        assert points is not None
        flat, shape = points.flatten(1).to(torch.float64), points.shape[1:]
        mean, variance = _moments("data_or_denoiser" if data is None else "data", flat, h)
        x1 = _drawn(flat, h, n_samples, generator)
        reconstruct = _best(Mixture(flat, h**2)) if data is None else _trained(_gaussian(given), data, mean)
    scale, d = math.sqrt(variance), x1.shape[1]
    if abs(variance - 1) > _OFF or bool(mean.square().mean() > _OFF):
        warnings.warn(
            f"the data have mean square {variance:.4g} about their mean, whose own is {mean.square().mean().item():.2g}; "
            "the separation function is that of (data - shift) / scale",
            stacklevel=3,
        )
    if snr is None:
        snr = _default_grid(None if points is None else len(points), d, h / scale)
    grid, noise = torch.as_tensor(snr, dtype=torch.float64).cpu(), _normal(x1, generator)
    found = []
    for g in grid.tolist():
        x1_hat = reconstruct(x1, noise, g / scale)
        both = (x1_hat - mean).square().mean(1), (x1 - x1_hat).square().mean(1)
        found.append(torch.stack([both[0] / variance, 1 - both[1] / variance]))
    square, error = torch.stack(found, 1).cpu()  # (K, n_samples)
    if not bool((square + error).isfinite().all()):
        raise ValueError("data_or_denoiser must give finite reconstructions, got NaN or infinity")
    each = _combined(square, error) if data is None else error
    values = each.mean(1)
    if data is not None:
        values = torch.maximum(values, grid**2 / (1 + grid**2))
    made = Separation(grid, values, each.std(1) / math.sqrt(n_samples))
    made.estimates = torch.stack([square.mean(1), error.mean(1)])
    made.shift, made.scale = mean.reshape(shape), scale
    return made


def _gaussian(denoiser: Any) -> Denoiser:
    if isinstance(denoiser.process, Process) and denoiser.process.is_gaussian:
        return denoiser
    raise ValueError(f"data_or_denoiser must be of a process with Gaussian noise, got {denoiser.process!r}")
