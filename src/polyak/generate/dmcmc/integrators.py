"""Integrators of the reverse ODE and SDE that start every row of a batch at a noise level of its own.

All work in the scaled variable y, where ``dy/dsigma = eps`` (the reverse SDE adds its noise), and are called with
``(scaled, y, sigma, generator)``: a denoiser there, the states (B, ...) and their levels (B,), float64.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from polyak.core import checks, integrators
from polyak.generate.dmcmc.scaled import PROCESS, Scaled, check_range, checked, working
from polyak.generate.evaluate import MODEL, Model
from polyak.generate.linear import LinearSolver, Stage, tabled
from polyak.generate.process import RHO, Generators, Process, expand, standard_normal, wide

_STEPS = checks.Integer(1, 1_000_000)
_LEVEL = checks.positive
_KEPT = 4096  # tables of levels: where levels are no classes, each is new
_CHURN = dict(
    churn=checks.non_negative | None, churn_range=checks.Each(checks.non_negative, count=2, words="a pair (low, high)"),
    churn_noise=_LEVEL,
)  # fmt: skip


class Integrator:
    """From states at their levels to samples. A subclass defines ``__call__``, and ``nfe``: evaluations, None where they vary."""

    @property
    def nfe(self) -> int | None:
        return None

    def __call__(self, scaled: Scaled, y: Tensor, sigma: Tensor, generator: Generators | None = None) -> Tensor:
        """The samples, of y's shape.

        Args:
            scaled: the denoiser.
            y: (B, ...). sigma: (B,), float64.
        """
        raise NotImplementedError


def karras_levels(sigma: Tensor, steps: int, sigma_min: float) -> Tensor:
    """EDM's grid (arXiv 2206.00364, equation 5) from the level of each row to sigma_min, and then 0: (steps + 1, B)."""
    end = sigma.clamp(max=sigma_min)  # a row that starts below it stays there
    part = torch.arange(max(steps - 1, 0), dtype=sigma.dtype, device=sigma.device) / max(steps - 1, 1)
    high, low = sigma ** (1 / RHO), end ** (1 / RHO)
    inner = (high + part[1:, None] * (low - high)) ** RHO
    last = [end[None]] if steps > 1 else []
    return torch.cat([sigma[None], inner, *last, torch.zeros_like(sigma)[None]])


@checks.arguments(steps=_STEPS, **_CHURN, sigma_min=_LEVEL)
@dataclass(frozen=True)
class KarrasHeun(Integrator):
    """Heun's method on EDM's grid (arXiv 2206.00364, algorithms 1 and 2): the paper's KAR1, and KAR2 with churn.

    ``2 steps - 1`` evaluations.

    Official code calls by N what makes ``steps = N - 1``.

    Args:
        steps: from each row's level to sigma_min, and by a last one, of Euler, to 0.
        churn: S_churn; the paper's KAR2 has 80. Before a step, where sigma is within ``churn_range``, noise of ``churn_noise`` is
            added: sigma grows by the factor ``1 + min(churn / steps, sqrt(2) - 1)``. None or 0: the ODE, without noise.
        sigma_min: the last level before 0.
    """

    steps: int
    churn: float | None = None
    churn_range: tuple[float, float] = field(default=(0.05, 1.0), kw_only=True)
    churn_noise: float = field(default=1.007, kw_only=True)
    sigma_min: float = field(default=0.01, kw_only=True)

    @property
    def nfe(self) -> int:
        return 2 * self.steps - 1

    def __call__(self, scaled: Scaled, y: Tensor, sigma: Tensor, generator: Generators | None = None) -> Tensor:
        levels = karras_levels(sigma, self.steps, scaled.floor(self.sigma_min))
        grown = 1 + min((self.churn or 0.0) / self.steps, math.sqrt(2) - 1)
        low, high = self.churn_range
        for i, (s, t) in enumerate(pairwise(levels)):
            if self.churn:
                hat = torch.where((s >= low) & (s <= high), grown * s, s)
                z = standard_normal(y.shape, generator=generator, dtype=y.dtype, device=y.device)
                y = y + expand((hat.square() - s.square()).sqrt() * self.churn_noise, y) * z
                s = hat
            step = expand(t - s, y)
            slope = scaled.eps(y, s)
            ahead = y + step * slope
            y = ahead if i == self.steps - 1 else y + step * (0.5 * (slope + scaled.eps(ahead, t)))
        return y


@checks.arguments(
    denoiser=MODEL, x=checks.Tensor(floating=True, least_ndim=2), sigma0=checks.Operand(_LEVEL), steps=_STEPS, **_CHURN,
    process=PROCESS | None, sigma_min=_LEVEL, generator=checks.generators | None,
)  # fmt: skip
@torch.no_grad()
def heun_per_sample(
    denoiser: Model,
    x: Tensor,
    sigma0: float | Tensor,
    steps: int,
    churn: float | None = None,
    *,
    churn_range: tuple[float, float] = (0.05, 1.0),
    churn_noise: float = 1.007,
    process: Process | None = None,
    sigma_min: float = 0.01,
    generator: Generators | None = None,
) -> Tensor:
    """:class:`KarrasHeun` from states x at levels sigma0, one for each row.

    Args:
        denoiser: a :class:`Denoiser`, or any ``(x, t) -> Prediction`` (then ``process`` is needed).
        x: (B, ...), in the scaled variable ``x_t / alpha``: of VE and EDM the state itself.
        sigma0: ``sigma / alpha``, a number or (B,).
        steps, churn, churn_range, churn_noise, sigma_min: as for :class:`KarrasHeun`.
        generator: of the noise of churn.

    Returns:
        Samples at sigma = 0, in x's shape and dtype.

    Raises:
        ValueError: a process without Gaussian noise, or levels beyond the model's.
    """
    process = _process_of(denoiser, process)
    level = torch.as_tensor(sigma0, dtype=wide(x.device), device=x.device)
    if level.ndim and level.shape != x.shape[:1]:
        raise ValueError(f"sigma0 must be a number or have shape ({len(x)},), got {tuple(level.shape)}")
    if level.device.type == "cpu" and level.numel():
        check_range("sigma0", level.min().item(), level.max().item(), process)
    if not len(x):
        return x.clone()
    heun = KarrasHeun(steps, churn, churn_range=churn_range, churn_noise=churn_noise, sigma_min=sigma_min)
    y = heun(Scaled(denoiser, process, x.dtype), working(x), level.expand(len(x)), generator)
    return y.to(x.dtype)


def _process_of(denoiser: Model, process: Process | None) -> Process:
    own = getattr(denoiser, "process", None) if process is None else process
    if own is None:
        raise ValueError("process is needed: this denoiser does not have one")
    return checked(denoiser, own)


@checks.arguments(steps=_STEPS, snr=_LEVEL | None, sigma_min=_LEVEL)
@dataclass(frozen=True)
class ReverseDiffusion(Integrator):
    """The reverse-diffusion predictor of score_sde (arXiv 2011.13456, appendix E), with ``snr`` its predictor-corrector sampler.

    On levels equally spaced in log sigma, ``sigma_1 = sigma, .., sigma_N = sigma_min, sigma_(N+1) = 0``::

        y <- y + (sigma_i^2 - sigma_(i+1)^2) s(y, sigma_i) + sqrt(sigma_i^2 - sigma_(i+1)^2) z,

    the last without noise. Before each, a corrector: a Langevin step ``y + h s + sqrt(2 h) z``, ``h = 2 (snr |z| / |s|)^2``.

    Args:
        steps: N; one evaluation each, two with a corrector.
        snr: of the corrector; score_sde has 0.16 for CIFAR-10. None: no corrector.
        sigma_min: the last level before 0.
    """

    steps: int
    snr: float | None = None
    sigma_min: float = field(default=0.01, kw_only=True)

    @property
    def nfe(self) -> int:
        return self.steps * (1 if self.snr is None else 2)

    def __call__(self, scaled: Scaled, y: Tensor, sigma: Tensor, generator: Generators | None = None) -> Tensor:
        end = sigma.clamp(max=scaled.floor(self.sigma_min))
        part = torch.arange(self.steps, dtype=sigma.dtype, device=sigma.device) / max(self.steps - 1, 1)
        levels = torch.cat([sigma * (end / sigma) ** part[:, None], torch.zeros_like(sigma)[None]])

        def noise() -> Tensor:
            return standard_normal(y.shape, generator=generator, dtype=y.dtype, device=y.device)

        for i, (s, t) in enumerate(pairwise(levels)):
            if self.snr is not None:
                eps, z = scaled.eps(y, s), noise()
                # Of each row by itself: score_sde takes the batch's mean norms, and so couples its rows.
                length = s * (z.flatten(1).norm(dim=1) / eps.flatten(1).norm(dim=1))
                h = 2 * (self.snr * length).square()
                y = y - expand(h / s, y) * eps + expand((2 * h).sqrt(), y) * z
            gone = s.square() - t.square()
            y = y - expand(gone / s, y) * scaled.eps(y, s)
            if i < self.steps - 1:
                y = y + expand(gone.sqrt(), y) * noise()
        return y


@checks.arguments(rtol=_LEVEL, atol=_LEVEL, sigma_min=_LEVEL)
@dataclass(frozen=True)
class RK45(Integrator):
    """The ODE by Dormand and Prince's method, its steps decided by the error: to sigma_min, where the samples keep that much noise.

    All rows take their steps together, each in log sigma from its own level: a sample depends, within the tolerance, on its batch.

    Args:
        rtol, atol: the tolerances; the paper has 1e-5. In single precision ``rtol`` is at least 1.2e-5.
        sigma_min: where it ends; ``tweedie=sigma_min`` of the chains removes the rest.
    """

    rtol: float = 1e-5
    atol: float = 1e-5
    sigma_min: float = field(default=0.01, kw_only=True)

    def __call__(self, scaled: Scaled, y: Tensor, sigma: Tensor, generator: Generators | None = None) -> Tensor:
        end = sigma.clamp(max=scaled.floor(self.sigma_min))
        rate = (end / sigma).log()

        def slope(y: Tensor, u: float) -> Tensor:
            level = sigma * (rate * u).exp()
            return expand(level * rate, y) * scaled.eps(y, level)

        least = 100 * torch.finfo(y.dtype).eps
        return integrators.dopri5(slope, y, (0.0, 1.0), rtol=max(self.rtol, least), atol=self.atol)[-1]


@checks.arguments(
    solver=checks.Instance(LinearSolver, words="a LinearSolver (an instance, not the class)"), steps=_STEPS,
    grid=checks.Choice("karras", "logsnr"),
)  # fmt: skip
@dataclass(frozen=True)
class PerSample(Integrator):
    """Any linear solver of the room, from a level of its own for each row: DDIM, DPM-Solver++, GHVB, Runge-Kutta methods, ...

    The solver's table is made once for each level and kept, some thousands at most; a step is then one combination whose weights
    are one for each row.

    Args:
        solver: how to step; all its work must be in its table.
        steps: from each row's level on the process's grid, the last to clean data where the process and the solver allow it.
        grid: "karras" or "logsnr".
    """

    solver: LinearSolver
    steps: int
    grid: str = "karras"
    _tables: dict[Any, list[Stage]] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not tabled(self.solver):
            raise ValueError(f"solver must have all its work in its table, got {self.solver!r}, which runs by itself")

    def __call__(self, scaled: Scaled, y: Tensor, sigma: Tensor, generator: Generators | None = None) -> Tensor:
        process, times = scaled.process, scaled.time(sigma).tolist()
        kind = getattr(scaled.denoiser, "prediction", "epsilon")
        tables = [self._table(process, t, kind) for t in times]

        def weight(*numbers: float) -> Any:
            """One for each row."""
            return expand(torch.tensor(numbers, dtype=sigma.dtype, device=y.device), y)

        x = expand(process.alpha(scaled.time(sigma)), y) * y
        start, values, end = x, (), sigma
        for stages in zip(*tables, strict=True):
            one = stages[0]

            asked = torch.tensor([float(s.t) for s in stages], dtype=sigma.dtype, device=x.device)
            m = scaled.predict(x, asked).view(one.view)
            start = x if one.first else start
            known = (m, *values)
            x = weight(*(s.base for s in stages)) * start + weight(*(s.value for s in stages)) * m
            for j, value in zip(range(len(one.past)), values, strict=False):
                x = x + weight(*(s.past[j] for s in stages)) * value
            if one.std:
                z = standard_normal(x.shape, generator=generator, dtype=x.dtype, device=x.device)
                x = x + weight(*(s.std for s in stages)) * z
            mixed = [
                sum((weight(*(s.mixed[k][j] for s in stages)) * v for j, v in zip(range(len(row)), known, strict=False)), 0 * m)
                for k, row in enumerate(one.mixed)
            ]  # fmt: skip
            values = tuple(mixed[-1 - i] if i < 0 else known[i] for i in one.keep if i < len(known))
            end = torch.tensor([float(s.to) for s in stages], dtype=sigma.dtype, device=x.device)
        return x / expand(process.alpha(end), x)

    def _table(self, process: Process, t: float, kind: str) -> list[Stage]:
        key = process, t, kind
        known = self._tables.get(key)
        if known is None:
            end = 0.0 if self.solver.reaches_zero and process.ends_clean(0.0) else None
            if t <= process.t_min * (1 + 1e-9):
                raise ValueError(f"sigma must be above the model's smallest level for {self!r}, got t={t:g}")
            times = process.check_times(process.grid(self.steps, self.grid, start=t, end=end))
            if len(self._tables) >= _KEPT:
                self._tables.clear()
            known = self._tables[key] = self.solver.table(times, process, kind)
        return known
