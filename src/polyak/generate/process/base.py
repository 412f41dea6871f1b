"""What every noising process has: the base class, and the conventions of shapes and times."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from polyak.core import checks

Time = TypeVar("Time", float, Tensor, float | Tensor)
GRIDS = ("logsnr", "time", "quadratic", "karras")
RHO = 7.0  # of the "karras" grid (EDM, equation 5)


def _in_float64(method: Callable[[Any, Tensor], Tensor]) -> Callable[[Any, Any], Any]:
    """Let a method that is written for float64 tensors take a number or any floating-point tensor."""

    @wraps(method)
    def call(self: Any, t: Any) -> Any:
        if not isinstance(t, Tensor):
            return method(self, torch.tensor(_number(t), dtype=torch.float64)).item()
        if not t.is_floating_point():
            raise ValueError(f"t must be floating point, got a tensor of {t.dtype}")
        return method(self, t.to(torch.float64)).to(t.dtype)

    return call


def _number(t: Any) -> float:
    """A number that is not NaN (lam, too, comes this way, and may be infinite)."""
    number = float(t)
    if math.isnan(number):
        raise ValueError("t must be a number, got nan")
    return number


def expand(coefficient: float | Tensor, x: Tensor) -> float | Tensor:
    """A per-sample coefficient of shape (B,) made to multiply x of shape (B, ...), in x's dtype; numbers pass through."""
    if not isinstance(coefficient, Tensor):
        return coefficient
    coefficient = coefficient.to(device=x.device, dtype=x.dtype)
    return coefficient.reshape(coefficient.shape + (1,) * (x.ndim - 1)) if coefficient.ndim else coefficient


def check_batch(t: float | Tensor, x: Tensor) -> float | Tensor:
    """t as a number, or a tensor of shape () or (B,) for x of shape (B, ...); ValueError otherwise."""
    if isinstance(t, Tensor) and t.ndim and t.shape != x.shape[:1]:
        raise ValueError(f"t must be a number or have shape ({x.shape[0]},) like x's batch, got {tuple(t.shape)}")
    return t


def standard_normal(
    shape: Sequence[int],
    *,
    generator: torch.Generator | list[torch.Generator] | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """N(0, I) of a shape, drawn on the generator's device; a list of generators draws one row each."""
    if isinstance(generator, list):
        if len(generator) != shape[0]:
            raise ValueError(f"generator must be one, or one for each of the {shape[0]} rows, got {len(generator)}")
        rows = [standard_normal((1, *shape[1:]), generator=g, dtype=dtype, device=device) for g in generator]
        return torch.cat(rows)
    source = device if generator is None else generator.device
    return torch.randn(tuple(shape), generator=generator, dtype=dtype, device=source).to(device or source)


class Process:
    """A noising process. Subclasses give the schedules as functions of float64 tensors; the rest is here.

    A subclass defines ``_log_alpha``, ``_log_sigma``, ``_t_of_lam``, ``_dlog_alpha`` and ``_dlam``, the times
    ``t_min < t_max`` between which it may be evaluated, and ``prior_std``. Where the products ``alpha f`` and
    ``sigma (f - dlam/dt)`` are 0 * inf at an end, it overrides ``_dalpha`` and ``_dsigma``.
    """

    is_gaussian: ClassVar[bool] = True
    t_min: float
    t_max: float

    def _log_alpha(self, t: Tensor) -> Tensor:
        raise NotImplementedError

    def _log_sigma(self, t: Tensor) -> Tensor:
        raise NotImplementedError

    def _t_of_lam(self, lam: Tensor) -> Tensor:
        raise NotImplementedError

    def _dlog_alpha(self, t: Tensor) -> Tensor:
        raise NotImplementedError

    def _dlam(self, t: Tensor) -> Tensor:
        raise NotImplementedError

    def _dalpha(self, t: Tensor) -> Tensor:
        return self._log_alpha(t).exp() * self._dlog_alpha(t)

    def _dsigma(self, t: Tensor) -> Tensor:
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
        return self._log_alpha(t).exp()

    @_in_float64
    def sigma(self, t: Tensor) -> Tensor:
        """The scale of the noise."""
        return self._log_sigma(t).exp()

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
        return -2 * (2 * self._log_sigma(t)).exp() * self._dlam(t)

    @property
    def prior_std(self) -> float:
        """The standard deviation of the law that sampling starts from, for data of unit variance."""
        return self.sigma(self.t_max)

    def label(self, t: Time) -> Time:
        """What a network trained with this process is told in place of t: t itself unless the process says otherwise."""
        return t

    def t_of_label(self, label: Time) -> Time:
        """The inverse of :meth:`label`."""
        return label

    def perturb(
        self,
        x0: Tensor,
        t: float | Tensor,
        noise: Tensor | None = None,
        *,
        generator: torch.Generator | None = None,
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
        t = t.to(torch.float64) if isinstance(t, Tensor) else t
        return expand(self.alpha(t), x0) * x0 + expand(self.sigma(t), x0) * noise, noise

    def prior(
        self,
        shape: Sequence[int],
        *,
        generator: torch.Generator | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> Tensor:
        """Draw what sampling starts from: ``prior_std * N(0, I)`` of the given shape."""
        device = device or (None if generator is None else generator.device)
        return self.prior_std * standard_normal(shape, generator=generator, dtype=dtype, device=device)

    def check_time(self, name: str, t: Any) -> float:
        """t, if it is in [t_min, t_max], or 0 where that is clean data; else ValueError."""
        number = checks.real(name, t)
        slack = 1e-12 * max(abs(self.t_min), abs(self.t_max))
        inside = self.t_min - slack <= number <= self.t_max + slack
        if not inside and not (number == 0 and self.sigma(0.0) == 0):
            raise ValueError(f"{name} must be in [{self.t_min:g}, {self.t_max:g}] for {self!r}, got {t!r}")
        return number

    def grid(self, n: int, kind: str = "logsnr", *, start: float | None = None, end: float | None = None) -> Tensor:
        """n steps: n + 1 strictly decreasing times from ``start`` (default t_max) to ``end`` (default t_min), float64.

        Args:
            n: number of steps, at least 1.
            kind: what is equally spaced: "logsnr": lam; "time": t; "quadratic": sqrt(t); "karras": sigma_hat^(1/7).
            start, end: other ends. ``end=0`` below t_min puts n points on [t_min, start], and then the clean data at 0.

        Raises:
            ValueError: unknown kind, n < 1, ends out of range, or lam infinite at an end where the kind needs it.
        """
        checks.integer("n", n, least=1)
        checks.one_of("kind", kind, GRIDS)
        first = self.check_time("start", self.t_max if start is None else start)
        last = self.check_time("end", self.t_min if end is None else end)
        if last >= first:
            raise ValueError(f"end must be below start={first!r}, got {last!r}")
        if last < self.t_min:
            head = self.grid(n - 1, kind, start=first) if n > 1 else torch.tensor([first], dtype=torch.float64)
            return torch.cat([head, torch.tensor([last], dtype=torch.float64)])
        forward, back = self._scale(kind)
        ends = forward(torch.tensor([first, last], dtype=torch.float64))
        if not bool(ends.isfinite().all()):
            at = first if not bool(ends[0].isfinite()) else last
            raise ValueError(f"the {kind!r} grid of {self!r} cannot reach t={at:g}, where lam is infinite; use 'time'")
        # Not linspace: its halves round differently, and a grid of a sub-interval should repeat the whole one's points.
        times = back(ends[0] + (ends[1] - ends[0]) * torch.arange(n + 1, dtype=torch.float64) / n)
        times[0], times[-1] = first, last
        return times

    def _scale(self, kind: str) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
        """The map from t to what a kind of grid spaces equally, and its inverse."""
        if kind == "logsnr":
            return self.lam, self.t_of_lam
        if kind == "time":
            return lambda t: t, lambda t: t
        if kind == "quadratic":
            return torch.sqrt, torch.square
        return lambda t: self.sigma_hat(t) ** (1 / RHO), lambda u: self.t_of_lam(-RHO * u.log())
