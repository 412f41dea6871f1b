"""Gaussian noising processes ``x_t = alpha(t) x0 + sigma(t) eps``: all that follows from the two schedules."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any, ClassVar

import torch
from torch import Tensor

from polyak.generate.process.path import (
    Generators,
    ProbabilityPath,
    check_batch,
    expand,
    standard_normal,
    unwatched,
    wide,
)

RHO = 7.0  # of the "karras" grid (EDM, equation 5)
_HALVINGS = 100  # of the interval in which t is sought: more than a double has bits


def _in_float64(method: Callable[[Any, Tensor], Tensor]) -> Callable[[Any, Any], Any]:
    """Let a method that is written for float64 tensors take a number or any floating-point tensor."""

    @wraps(method)
    def call(self: Any, t: Any) -> Any:
        if not isinstance(t, Tensor):
            with unwatched():
                return method(self, torch.tensor(_number(t), dtype=torch.float64, device="cpu")).item()
        if not t.is_floating_point():
            raise ValueError(f"t must be floating point, got a tensor of {t.dtype}")
        return method(self, t.to(wide(t.device))).to(t.dtype)

    return call


def _number(t: Any) -> float:
    """A number that is not NaN (lam, too, comes this way, and may be infinite)."""
    number = float(t)
    if math.isnan(number):
        raise ValueError("t must be a number, got nan")
    return number


def _slope(schedule: Callable[[Tensor], Tensor], t: Tensor) -> Tensor:
    """The derivative of an elementwise function by automatic differentiation, also where gradients are switched off."""
    with torch.inference_mode(False), torch.enable_grad():
        point = t.detach().clone().requires_grad_()
        value = schedule(point)
        if not value.requires_grad:
            return torch.zeros_like(t)
        (slope,) = torch.autograd.grad(value.sum(), point)
    return slope.detach()


class Process(ProbabilityPath):
    """A noising process. A subclass gives its schedules as functions of float64 tensors; the rest is here.

    It defines either ``_log_alpha`` and ``_log_sigma`` or ``_alpha`` and ``_sigma``, and the times ``t_min < t_max`` between
    which the model may be evaluated. It may also define, for speed or where an end needs care: ``_t_of_lam`` (else found by
    bisection: lam must decrease in t), ``_dlog_alpha``, ``_dlam``, ``_dalpha`` and ``_dsigma`` (else by automatic
    differentiation), and ``prior_std``. :func:`polyak.generate.check_process` tries what was written.

    Example:
        >>> class Sine(Process):
        ...     t_min, t_max = 0.01, 0.99
        ...     def _alpha(self, t): return torch.cos(torch.pi / 2 * t)
        ...     def _sigma(self, t): return torch.sin(torch.pi / 2 * t)
    """

    is_gaussian: ClassVar[bool] = True

    def _log_alpha(self, t: Tensor) -> Tensor:
        return self._alpha(t).log()

    def _log_sigma(self, t: Tensor) -> Tensor:
        return self._sigma(t).log()

    def _alpha(self, t: Tensor) -> Tensor:
        if type(self)._log_alpha is Process._log_alpha:
            raise NotImplementedError(f"{type(self).__name__} defines neither _log_alpha nor _alpha")
        return self._log_alpha(t).exp()

    def _sigma(self, t: Tensor) -> Tensor:
        if type(self)._log_sigma is Process._log_sigma:
            raise NotImplementedError(f"{type(self).__name__} defines neither _log_sigma nor _sigma")
        return self._log_sigma(t).exp()

    def _t_of_lam(self, lam: Tensor) -> Tensor:
        low, high = torch.full_like(lam, self.t_min), torch.full_like(lam, self.t_max)
        for _ in range(_HALVINGS):
            middle = (low + high) / 2
            early = self._log_alpha(middle) - self._log_sigma(middle) > lam
            low, high = torch.where(early, middle, low), torch.where(early, high, middle)
        return (low + high) / 2

    def _dlog_alpha(self, t: Tensor) -> Tensor:
        return _slope(self._log_alpha, t)

    def _dlam(self, t: Tensor) -> Tensor:
        return self._dlog_alpha(t) - _slope(self._log_sigma, t)

    def _dalpha(self, t: Tensor) -> Tensor:
        if type(self)._alpha is not Process._alpha:
            return _slope(self._alpha, t)
        return self._log_alpha(t).exp() * self._dlog_alpha(t)

    def _dsigma(self, t: Tensor) -> Tensor:
        if type(self)._sigma is not Process._sigma:
            return _slope(self._sigma, t)
        return self._log_sigma(t).exp() * (self._dlog_alpha(t) - self._dlam(t))

    @_in_float64
    def log_alpha(self, t: Tensor) -> Tensor:
        """``log alpha(t)``; -inf where the signal is gone."""
        return self._log_alpha(t)

    @_in_float64
    def log_sigma(self, t: Tensor) -> Tensor:
        """``log sigma(t)``; -inf where there is no noise."""
        return self._log_sigma(t)

    @_in_float64
    def alpha(self, t: Tensor) -> Tensor:
        """The scale of the data."""
        return self._alpha(t)

    @_in_float64
    def sigma(self, t: Tensor) -> Tensor:
        """The scale of the noise."""
        return self._sigma(t)

    @_in_float64
    def lam(self, t: Tensor) -> Tensor:
        """Half log-SNR ``log alpha - log sigma``."""
        return self._log_alpha(t) - self._log_sigma(t)

    @_in_float64
    def t_of_lam(self, lam: Tensor) -> Tensor:
        """The inverse of :meth:`lam`."""
        return self._t_of_lam(lam)

    @_in_float64
    def sigma_hat(self, t: Tensor) -> Tensor:
        """``sigma / alpha``, the sigma of Karras et al."""
        return (self._log_sigma(t) - self._log_alpha(t)).exp()

    @_in_float64
    def dalpha(self, t: Tensor) -> Tensor:
        """``alpha'(t)``."""
        return self._dalpha(t)

    @_in_float64
    def dsigma(self, t: Tensor) -> Tensor:
        """``sigma'(t)``."""
        return self._dsigma(t)

    @_in_float64
    def drift(self, t: Tensor) -> Tensor:
        """``f(t) = d log alpha / dt`` of the forward SDE ``dx = f x dt + g dW``."""
        return self._dlog_alpha(t)

    @_in_float64
    def diffusion2(self, t: Tensor) -> Tensor:
        """``g(t)^2 = d sigma^2/dt - 2 f sigma^2 = -2 sigma^2 dlam/dt``."""
        return -2 * self._sigma(t).square() * self._dlam(t)

    @property
    def prior_std(self) -> float:
        """The standard deviation of the law that sampling starts from, for data of unit variance."""
        return self.sigma(self.t_max)

    def perturb(
        self,
        x0: Tensor,
        t: float | Tensor,
        noise: Tensor | None = None,
        *,
        generator: Generators | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Draw ``x_t`` given ``x0``.

        Args:
            x0: data, shape (B, ...), floating point.
            t: a number or a tensor of shape (B,).
            noise: standard normal of x0's shape; drawn from ``generator`` where it is left out.

        Returns:
            ``(x_t, noise)``, both of x0's shape.
        """
        if not x0.is_floating_point():
            raise ValueError(f"x0 must be floating point, got {x0.dtype}")
        check_batch(t, x0)
        if noise is None:
            noise = standard_normal(x0.shape, generator=generator, dtype=x0.dtype, device=x0.device)
        elif noise.shape != x0.shape:
            raise ValueError(f"noise must have x0's shape {tuple(x0.shape)}, got {tuple(noise.shape)}")
        t = t.to(wide(t.device)) if isinstance(t, Tensor) else t
        return expand(self.alpha(t), x0) * x0 + expand(self.sigma(t), x0) * noise, noise

    def prior(
        self,
        shape: Sequence[int],
        *,
        generator: Generators | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> Tensor:
        """Draw what sampling starts from: ``prior_std * N(0, I)`` of the given shape."""
        if device is None and generator is not None:
            one = generator[0] if isinstance(generator, Sequence) and len(generator) else generator
            device = one.device if isinstance(one, torch.Generator) else None
        return standard_normal(shape, generator=generator, dtype=dtype, device=device).mul_(self.prior_std)

    def evaluable(self, t: float, kind: str = "flow") -> bool:
        """Whether an output of a dialect determines the field ``dx/dt = alpha' x0 + sigma' eps`` at t.

        Within [t_min, t_max], "flow" does. The others do where both slopes are finite, and the dialect is not divided by a sigma
        or alpha that is 0 there.
        """
        if not self.t_min <= t <= self.t_max:
            return False
        if kind == "flow":
            return True
        if not (math.isfinite(self.dalpha(t)) and math.isfinite(self.dsigma(t))):
            return False
        if kind in ("sample", "edm", "score") and self.sigma(t) == 0:
            return False
        return kind not in ("epsilon", "edm", "score") or self.alpha(t) != 0

    def ends_clean(self, t: float) -> bool:
        return t == 0 < self.t_min and self.sigma(0.0) == 0

    def _scale(self, kind: str) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
        if kind == "logsnr":
            return self.lam, self.t_of_lam
        if kind == "karras":
            return lambda t: self.sigma_hat(t) ** (1 / RHO), lambda u: self.t_of_lam(-RHO * u.log())
        return super()._scale(kind)

    def grid(self, n: int, kind: str = "logsnr", *, start: float | None = None, end: float | None = None) -> Tensor:
        return super().grid(n, kind, start=start, end=end)

    grid.__doc__ = ProbabilityPath.grid.__doc__
