"""Gaussian processes of the literature (VP, VE, EDM, flow matching, ...), each given by alpha(t) and sigma(t)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from polyak.core import checks
from polyak.generate.process.base import Process
from polyak.generate.process.path import Time, wide

_TIMES = dict(t_min=checks.non_negative, t_max=checks.positive)


class _VariancePreserving(Process):
    """``alpha^2 + sigma^2 = 1``; sigma from log alpha without cancellation."""

    def _log_sigma(self, t: Tensor) -> Tensor:
        return 0.5 * torch.log(-torch.expm1(2 * self._log_alpha(t)))

    def _dlam(self, t: Tensor) -> Tensor:
        return self._dlog_alpha(t) / -torch.expm1(2 * self._log_alpha(t))

    @property
    def prior_std(self) -> float:
        return 1.0


def _log_alpha_of_lam(lam: Tensor) -> Tensor:
    """Of a variance-preserving process: ``alpha^2 = 1 / (1 + exp(-2 lam))``."""
    return -0.5 * torch.nn.functional.softplus(-2 * lam, threshold=700.0)


@checks.arguments(beta0=checks.positive, beta1=checks.positive, **_TIMES)
@dataclass(frozen=True)
class VP(_VariancePreserving):
    """Variance preserving, linear beta: ``log alpha = -(beta1 - beta0) t^2 / 4 - beta0 t / 2`` (arXiv 2011.13456, eq. 29).

    ``t_min`` is usually 1e-3 for up to 15 evaluations and 1e-4 above (arXiv 2206.00927, appendix).
    """

    beta0: float = 0.1
    beta1: float = 20.0
    t_min: float = 1e-3
    t_max: float = 1.0

    def __post_init__(self) -> None:
        if self.beta1 <= self.beta0:
            raise ValueError(f"beta1 must be above beta0={self.beta0:g}, got {self.beta1!r}")
        _check_range(self)

    def _log_alpha(self, t: Tensor) -> Tensor:
        return -t * ((self.beta1 - self.beta0) * t / 4 + self.beta0 / 2)

    def _dlog_alpha(self, t: Tensor) -> Tensor:
        return -((self.beta1 - self.beta0) * t + self.beta0) / 2

    def _t_of_lam(self, lam: Tensor) -> Tensor:
        # With B = beta1 - beta0, u = -4 B log alpha: B t = sqrt(beta0^2 + u) - beta0, freed from its cancellation.
        slope = self.beta1 - self.beta0
        u = -4 * slope * _log_alpha_of_lam(lam)
        return u / ((self.beta0**2 + u).sqrt() + self.beta0) / slope


@checks.arguments(s=checks.positive, **_TIMES)
@dataclass(frozen=True)
class CosineVP(_VariancePreserving):
    """Variance preserving, ``alpha = cos(pi/2 (t+s)/(1+s)) / cos(pi/2 s/(1+s))`` (arXiv 2102.09672, eq. 17).

    alpha reaches 0 at t = 1; ``t_max`` stops where lam = -5.
    """

    s: float = 0.008
    t_min: float = 1e-3
    t_max: float = 0.9946

    def __post_init__(self) -> None:
        _check_range(self, most=1.0)

    @property
    def _offset(self) -> float:
        return math.log(math.cos(math.pi / 2 * self.s / (1 + self.s)))

    def _angle(self, t: Tensor) -> Tensor:
        return math.pi / 2 * (t + self.s) / (1 + self.s)

    def _log_alpha(self, t: Tensor) -> Tensor:
        log_alpha = torch.log(torch.cos(self._angle(t))) - self._offset
        return log_alpha.clamp(max=0.0)  # at t = 0 it rounds to either side of 0

    def _dlog_alpha(self, t: Tensor) -> Tensor:
        return -math.pi / 2 / (1 + self.s) * torch.tan(self._angle(t))

    def _t_of_lam(self, lam: Tensor) -> Tensor:
        angle = torch.acos(torch.exp(_log_alpha_of_lam(lam) + self._offset))
        return angle * (2 * (1 + self.s) / math.pi) - self.s


class Discrete(_VariancePreserving):
    """The N-step chain of a discrete-time model: ``t_i = (i + 1) / N``, log alpha piecewise linear in t between.

    The clean data is at t = 0 (``alpha = 1``); a model knows t in [1/N, t_max].

    Args:
        betas: the N variances of the forward chain, each in (0, 1]; or
        alphas_cumprod: their running products ``prod (1 - beta)`` (alpha is the square root of these).
        label_scale: a network is told ``(t - 1/N) * label_scale``; the default N gives 0 .. N-1.
        lam_min: the tail with lam below this is left out of [t_min, t_max] (cosine and zero-terminal-SNR schedules).

    Raises:
        ValueError: neither or both schedules, fewer than 2 points, or products that do not decrease within [0, 1).
    """

    @checks.arguments(
        betas=checks.Numbers(2) | None, alphas_cumprod=checks.Numbers(2) | None, label_scale=checks.positive | None,
        lam_min=checks.Number(-math.inf, infinite=True),
    )  # fmt: skip
    def __init__(
        self,
        betas: Sequence[float] | Tensor | None = None,
        *,
        alphas_cumprod: Sequence[float] | Tensor | None = None,
        label_scale: float | None = None,
        lam_min: float = -5.1,
    ) -> None:
        if (betas is None) == (alphas_cumprod is None):
            raise ValueError("give either betas or alphas_cumprod")
        if betas is not None:
            table = 0.5 * torch.log1p(-torch.as_tensor(betas, dtype=torch.float64).cpu()).cumsum(0)
        else:
            table = 0.5 * torch.log(torch.as_tensor(alphas_cumprod, dtype=torch.float64).cpu())
        given = "betas" if betas is not None else "alphas_cumprod"
        steps = torch.diff(table, prepend=table.new_zeros(1))
        rising = ~(steps < 0)
        if bool(rising.any()):
            at = int(rising.nonzero()[0])
            raise ValueError(f"{given} must make alpha decrease from 1 at every point, it does not at index {at}")
        lam = table - 0.5 * torch.log(-torch.expm1(2 * table))
        kept = int((lam >= lam_min).sum())
        if kept < 2:
            raise ValueError(f"lam_min={lam_min!r} leaves {kept} points of the schedule, at least 2 are needed")
        self.n = len(table)
        self.label_scale = float(self.n) if label_scale is None else label_scale
        self.t_min, self.t_max = 1 / self.n, kept / self.n
        self._table = torch.cat([table.new_zeros(1), table])
        self._tables: dict[torch.device, Tensor] = {}  # on the devices that times have come from

    def __repr__(self) -> str:
        return f"Discrete(n={self.n}, t_max={self.t_max:g})"

    def __eq__(self, other: object) -> bool:
        """Whether it is the same chain: betas and their products round differently, and are one chain all the same."""
        if not isinstance(other, Discrete):
            return NotImplemented
        mine, theirs = (self.n, self.t_max, self.label_scale), (other.n, other.t_max, other.label_scale)
        return mine == theirs and torch.allclose(self._table, other._table, rtol=1e-12, atol=1e-14)

    def __hash__(self) -> int:
        return hash((self.n, self.t_max, self.label_scale))

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_tables": {}}

    def _on(self, device: torch.device) -> Tensor:
        if device not in self._tables:
            self._tables[device] = self._table.to(device, wide(device))
        return self._tables[device]

    def _cell(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """How far t is between two points of the table, and what stands at both."""
        table, place = self._on(t.device), t * self.n
        point = place.round()
        # A point is met, however its time was rounded.
        place = torch.where((place - point).abs() < 1e-9 * point, point, place)
        left = torch.floor(place).clamp(0, self.n - 1).long()
        return place - left, table[left], table[left + 1]

    def _log_alpha(self, t: Tensor) -> Tensor:
        part, low, high = self._cell(t)
        # The last may be -inf, which times nothing is no number.
        return torch.where(part == 0, low, torch.where(part == 1, high, torch.lerp(low, high, part)))

    def _dlog_alpha(self, t: Tensor) -> Tensor:
        _, low, high = self._cell(t)
        return (high - low) * self.n

    def _t_of_lam(self, lam: Tensor) -> Tensor:
        log_alpha = _log_alpha_of_lam(lam)
        table = self._on(lam.device)
        right = torch.searchsorted(-table, -log_alpha).clamp(1, self.n)
        low, high = table[right - 1], table[right]
        return (right - 1 + (log_alpha - low) / (high - low)) / self.n

    def label(self, t: Time) -> Time:
        return (t - 1 / self.n) * self.label_scale

    def t_of_label(self, label: Time) -> Time:
        return label / self.label_scale + 1 / self.n


class _VarianceExploding(Process):
    """``alpha = 1``."""

    def _log_alpha(self, t: Tensor) -> Tensor:
        return torch.zeros_like(t)

    def _dlog_alpha(self, t: Tensor) -> Tensor:
        return torch.zeros_like(t)


@checks.arguments(sigma_min=checks.positive, sigma_max=checks.positive)
@dataclass(frozen=True)
class VE(_VarianceExploding):
    """Variance exploding: ``sigma = sigma_min (sigma_max / sigma_min)^t``, t in [0, 1] (arXiv 2011.13456, eq. 30)."""

    sigma_min: float = 0.01
    sigma_max: float = 50.0
    t_min: ClassVar[float] = 0.0
    t_max: ClassVar[float] = 1.0

    def __post_init__(self) -> None:
        _check_sigmas(self.sigma_min, self.sigma_max)

    @property
    def _rate(self) -> float:
        return math.log(self.sigma_max / self.sigma_min)

    def _log_sigma(self, t: Tensor) -> Tensor:
        return math.log(self.sigma_min) + t * self._rate

    def _dlam(self, t: Tensor) -> Tensor:
        return torch.full_like(t, -self._rate)

    def _t_of_lam(self, lam: Tensor) -> Tensor:
        return (-lam - math.log(self.sigma_min)) / self._rate


@checks.arguments(sigma_min=checks.positive, sigma_max=checks.positive)
@dataclass(frozen=True)
class EDM(_VarianceExploding):
    """``sigma = t``, t in [sigma_min, sigma_max]; 0 is the clean data (arXiv 2206.00364).

    The paper's grid is ``EDM().grid(n, "karras", end=0)``.
    """

    sigma_min: float = 0.002
    sigma_max: float = 80.0

    def __post_init__(self) -> None:
        _check_sigmas(self.sigma_min, self.sigma_max)

    @property
    def t_min(self) -> float:
        return self.sigma_min

    @property
    def t_max(self) -> float:
        return self.sigma_max

    @property
    def prior_std(self) -> float:
        return self.sigma_max

    def _log_sigma(self, t: Tensor) -> Tensor:
        return t.log()

    def _dlam(self, t: Tensor) -> Tensor:
        return -1 / t

    def _dsigma(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)

    def _t_of_lam(self, lam: Tensor) -> Tensor:
        return torch.exp(-lam)


@checks.arguments(label_scale=checks.positive, **_TIMES)
@dataclass(frozen=True)
class Flow(Process):
    """Rectified flow, conditional optimal transport: ``alpha = 1 - t``, ``sigma = t`` (arXiv 2209.03003, 2210.02747).

    A paper that runs from noise at s = 0 to data at s = 1 has t = 1 - s. lam is infinite at both ends.

    Args:
        t_min, t_max: the times between which the model may be evaluated.
        label_scale: a network is told ``t * label_scale`` (1000 for those of diffusers).
    """

    t_min: float = 0.0
    t_max: float = 1.0
    label_scale: float = 1.0

    def __post_init__(self) -> None:
        _check_range(self, most=1.0)

    def _log_alpha(self, t: Tensor) -> Tensor:
        return torch.log1p(-t)

    def _log_sigma(self, t: Tensor) -> Tensor:
        return t.log()

    def _dlog_alpha(self, t: Tensor) -> Tensor:
        return -1 / (1 - t)

    def _dlam(self, t: Tensor) -> Tensor:
        return -1 / (t * (1 - t))

    def _dalpha(self, t: Tensor) -> Tensor:
        return torch.full_like(t, -1.0)

    def _dsigma(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)

    def _t_of_lam(self, lam: Tensor) -> Tensor:
        return torch.sigmoid(-lam)

    def label(self, t: Time) -> Time:
        return t * self.label_scale

    def t_of_label(self, label: Time) -> Time:
        return label / self.label_scale


@checks.arguments(**_TIMES)
@dataclass(frozen=True)
class TrigFlow(Process):
    """``alpha = cos(pi t / 2)``, ``sigma = sin(pi t / 2)``, t in [0, 1] (arXiv 2410.11081). lam is infinite at both ends."""

    t_min: float = 0.0
    t_max: float = 1.0

    def __post_init__(self) -> None:
        _check_range(self, most=1.0)

    def _log_alpha(self, t: Tensor) -> Tensor:
        return torch.log(torch.sin(math.pi / 2 * (1 - t)))  # exactly -inf at t = 1, which cos(pi/2) is not

    def _log_sigma(self, t: Tensor) -> Tensor:
        return torch.log(torch.sin(math.pi / 2 * t))

    def _dlog_alpha(self, t: Tensor) -> Tensor:
        return -math.pi / 2 / torch.tan(math.pi / 2 * (1 - t))

    def _dlam(self, t: Tensor) -> Tensor:
        return -math.pi / torch.sin(math.pi * t)

    def _dalpha(self, t: Tensor) -> Tensor:
        return -math.pi / 2 * torch.sin(math.pi / 2 * t)

    def _dsigma(self, t: Tensor) -> Tensor:
        return math.pi / 2 * torch.sin(math.pi / 2 * (1 - t))

    def _t_of_lam(self, lam: Tensor) -> Tensor:
        return torch.atan(torch.exp(-lam)) * (2 / math.pi)


@checks.arguments(**_TIMES)
@dataclass(frozen=True)
class OU(Process):
    """Ornstein-Uhlenbeck ``dx = -x dt + dW``: ``alpha = exp(-t)``, ``sigma^2 = (1 - exp(-2t)) / 2``, prior N(0, 1/2)."""

    t_min: float = 1e-3
    t_max: float = 5.0

    def __post_init__(self) -> None:
        _check_range(self)

    @property
    def prior_std(self) -> float:
        return math.sqrt(0.5)

    def _log_alpha(self, t: Tensor) -> Tensor:
        return -t

    def _log_sigma(self, t: Tensor) -> Tensor:
        return 0.5 * torch.log(-torch.expm1(-2 * t) / 2)

    def _dlog_alpha(self, t: Tensor) -> Tensor:
        return torch.full_like(t, -1.0)

    def _dlam(self, t: Tensor) -> Tensor:
        return 1 / torch.expm1(-2 * t)

    def _t_of_lam(self, lam: Tensor) -> Tensor:
        return 0.5 * torch.log1p(2 * torch.exp(-2 * lam))


def _check_range(process: Any, most: float = math.inf) -> None:
    if not process.t_min < process.t_max <= most:
        raise ValueError(f"t_max must be in (t_min={process.t_min:g}, {most:g}], got {process.t_max!r}")


def _check_sigmas(sigma_min: float, sigma_max: float) -> None:
    if sigma_max <= sigma_min:
        raise ValueError(f"sigma_max must be above sigma_min={sigma_min:g}, got {sigma_max!r}")
