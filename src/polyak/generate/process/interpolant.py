"""Interpolants between data and noise, as flow models are described by: two functions of t in [0, 1], or a few by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from polyak.core import checks
from polyak.generate.process.base import Process

Schedule = Callable[[Tensor], Tensor]

_SCHEDULE = checks.Function("a function of t", 1)
_TIMES = dict(t_min=checks.fraction, t_max=checks.fraction)
_ROUNDING = 1e-6
_POINTS = 33  # at which functions of the user's own are looked at


def check_range(process: Process) -> None:
    if not process.t_min < process.t_max:
        raise ValueError(f"t_max must be in (t_min={process.t_min:g}, 1], got {process.t_max!r}")


@checks.arguments(**_TIMES)
@dataclass(frozen=True)
class LinearVPPath(Process):
    """Variance preserving, sigma linear: ``alpha = sqrt(1 - t^2)``, ``sigma = t``, t in [0, 1]. alpha' is infinite at t = 1."""

    t_min: float = 0.0
    t_max: float = 1.0

    def __post_init__(self) -> None:
        check_range(self)

    def _log_alpha(self, t: Tensor) -> Tensor:
        return 0.5 * torch.log1p(-t.square())

    def _log_sigma(self, t: Tensor) -> Tensor:
        return t.log()

    def _dlog_alpha(self, t: Tensor) -> Tensor:
        return -t / (1 - t.square())

    def _dlam(self, t: Tensor) -> Tensor:
        return -1 / (t * (1 - t.square()))

    def _dalpha(self, t: Tensor) -> Tensor:
        return -t / (1 - t.square()).sqrt()

    def _dsigma(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)

    def _t_of_lam(self, lam: Tensor) -> Tensor:
        return torch.sigmoid(-2 * lam).sqrt()


@checks.arguments(n=checks.positive, **_TIMES)
@dataclass(frozen=True)
class PolynomialPath(Process):
    """``alpha = (1 - t)^n``, ``sigma = 1 - (1 - t)^n``, t in [0, 1] (arXiv 2412.06264, whose t runs from noise to data).

    ``n=1`` is :class:`Flow`. For n > 1 both slopes are 0 at t = 1, where an output then says nothing of the data.
    """

    n: float = 2.0
    t_min: float = 0.0
    t_max: float = 1.0

    def __post_init__(self) -> None:
        check_range(self)

    def _log_alpha(self, t: Tensor) -> Tensor:
        return self.n * torch.log1p(-t)

    def _log_sigma(self, t: Tensor) -> Tensor:
        return torch.log(-torch.expm1(self._log_alpha(t)))

    def _dlog_alpha(self, t: Tensor) -> Tensor:
        return -self.n / (1 - t)

    def _dlam(self, t: Tensor) -> Tensor:
        return self.n / ((1 - t) * torch.expm1(self._log_alpha(t)))

    def _dalpha(self, t: Tensor) -> Tensor:
        return -self.n * (1 - t) ** (self.n - 1)

    def _dsigma(self, t: Tensor) -> Tensor:
        return self.n * (1 - t) ** (self.n - 1)

    def _t_of_lam(self, lam: Tensor) -> Tensor:
        return -torch.expm1(torch.nn.functional.logsigmoid(lam) / self.n)


class Interpolant(Process):
    """An interpolant ``x_t = alpha(t) x0 + sigma(t) x1`` of one's own between data x0 and noise x1, t in [0, 1].

    The interpolants of :mod:`polyak.generate.interpolants` are bridges between any two laws, in a time of their own; this is one
    of the room's processes.

    Args:
        alpha, sigma: functions of a float64 tensor, elementwise; alpha decreases from 1, sigma rises from 0, both positive between.
        d_alpha, d_sigma: their slopes; left out, found by automatic differentiation.
        snr_inverse: from ``alpha / sigma`` to t; left out, found by bisection.
        t_min, t_max: the times between which the model may be evaluated.

    Raises:
        ValueError: alpha / sigma that does not decrease in t, or functions that are not elementwise.

    Example:
        >>> path = Interpolant(lambda t: 1 - t, lambda t: t, snr_inverse=lambda snr: 1 / (1 + snr))
        >>> path.lam(0.5)
        0.0
    """

    @checks.arguments(
        alpha=_SCHEDULE, sigma=_SCHEDULE, d_alpha=_SCHEDULE | None, d_sigma=_SCHEDULE | None, snr_inverse=_SCHEDULE | None,
        **_TIMES,
    )  # fmt: skip
    def __init__(
        self,
        alpha: Schedule,
        sigma: Schedule,
        d_alpha: Schedule | None = None,
        d_sigma: Schedule | None = None,
        snr_inverse: Schedule | None = None,
        *,
        t_min: float = 0.0,
        t_max: float = 1.0,
    ) -> None:
        self.t_min, self.t_max = t_min, t_max
        self._functions = (alpha, sigma, d_alpha, d_sigma, snr_inverse)
        check_range(self)
        t = t_min + (t_max - t_min) * torch.arange(1, _POINTS, dtype=torch.float64, device="cpu") / _POINTS
        for name, function in zip(("alpha", "sigma", "d_alpha", "d_sigma"), self._functions, strict=False):
            made = None if function is None else function(t)
            if function is not None and not (isinstance(made, Tensor) and made.shape == t.shape):
                raise ValueError(
                    f"{name} must be a function of a float64 tensor, elementwise, got {checks.shown(made)}"
                )
        if not bool((torch.diff(self.lam(t)) < 0).all()):
            raise ValueError("alpha / sigma must be positive and decrease in t")
        if snr_inverse is not None and not torch.allclose(
            self._t_of_lam(self.lam(t)), t, rtol=_ROUNDING, atol=_ROUNDING
        ):
            raise ValueError("snr_inverse must be the inverse of alpha / sigma")

    def _alpha(self, t: Tensor) -> Tensor:
        return self._functions[0](t)

    def _sigma(self, t: Tensor) -> Tensor:
        return self._functions[1](t)

    def _dalpha(self, t: Tensor) -> Tensor:
        given = self._functions[2]
        return super()._dalpha(t) if given is None else given(t)

    def _dsigma(self, t: Tensor) -> Tensor:
        given = self._functions[3]
        return super()._dsigma(t) if given is None else given(t)

    def _t_of_lam(self, lam: Tensor) -> Tensor:
        given = self._functions[4]
        return super()._t_of_lam(lam) if given is None else given(lam.exp())
