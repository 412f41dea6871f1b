"""The path of least kinetic energy for a law (arXiv 2306.06626), and the energy of any path."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from polyak.core import checks
from polyak.generate.kinetic_optimal.separation import Separation, metric_of
from polyak.generate.process import Process, expand, wide
from polyak.generate.process.path import unwatched

SEPARATION = checks.Function("a Separation, or a function of the signal-to-noise ratio")
_FLOOR = 1e-8  # of the metric, where nothing has to move: the angle stays a function of time


class _Arc(NamedTuple):
    """``phi(theta) = int_0^theta sqrt(G)`` as a table over equal steps of the angle, sqrt(G) linear between."""

    speed: Tensor  # sqrt(G) at the nodes
    length: Tensor  # phi there

    @classmethod
    def of(cls, speed: Tensor) -> _Arc:
        cells = (speed[1:] + speed[:-1]) * (math.pi / 4 / (len(speed) - 1))
        return cls(speed, torch.cat([cells.new_zeros(1), cells.cumsum(0)]))

    def angle(self, length: Tensor) -> tuple[Tensor, Tensor]:
        """The angle at an arc length, and the speed there."""
        at = (torch.searchsorted(self.length, length.contiguous(), right=True) - 1).clamp(0, len(self.speed) - 2)
        step = math.pi / 2 / (len(self.speed) - 1)
        begin, rest = self.speed[at], (length - self.length[at]).clamp(min=0.0)
        bend = (self.speed[at + 1] - begin) / step
        speed = (begin.square() + 2 * bend * rest).clamp(min=0.0).sqrt()
        return at.to(length.dtype) * step + 2 * rest / (begin + speed), speed

    def reach(self, angle: Tensor) -> Tensor:
        """The arc length at an angle."""
        step = math.pi / 2 / (len(self.speed) - 1)
        cell = (angle / step).floor().clamp(0, len(self.speed) - 2)
        at, rest = cell.long(), angle - cell * step
        bend = (self.speed[at + 1] - self.speed[at]) / step
        return self.length[at] + rest * (self.speed[at] + bend * rest / 2)


class KineticOptimal(Process):
    """The Gaussian path along which the marginal velocity of a law has the least kinetic energy.

    With ``alpha = r sin theta`` and ``sigma = r cos theta`` the energy per dimension is ``int r'^2 + r^2 G(theta) theta'^2 dt``,
    ``G = 1 - (1 - lambda(tan theta)) / cos^2 theta``, where lambda is the law's separation function. In r and
    ``phi = int sqrt(G) dtheta`` this metric is flat. So the best path is the chord from (1, 0) to (1, Phi), ``Phi = phi(pi / 2)``,
    at constant speed:

        r sin phi = (1 - t) sin Phi,   r cos phi = t + (1 - t) cos Phi,   energy = 4 sin^2(Phi / 2)

    (t = 0 is data, t = 1 noise). For lambda = 1 this is :class:`Flow`, of energy 2; for N(0, I) nothing has to move.

    Args:
        separation: of data of mean 0 and mean square 1, for which the path is then; a :class:`Separation`, or a function from a
            tensor of signal-to-noise ratios to lambda.
        n: the number of angles in the table of phi.
        t_min, t_max: the times between which the model may be evaluated.

    Attributes:
        phi_total: Phi, in (0, pi / 2].
        energy: kinetic energy per dimension, from t = 1 to 0.

    Two paths are equal where their tables are. Where data have eigenvalues that differ, alpha grows as ``sqrt(1 - t)`` at the noise
    end: its slope is large there, and finite.

    Example:
        >>> process = KineticOptimal(gaussian_separation([3.0, 0.6, 0.4]), t_max=0.999)
        >>> denoiser = Denoiser(lambda x, t: torch.zeros_like(x), process, "flow")
    """

    @checks.arguments(
        separation=SEPARATION,
        n=checks.Integer(8, 10**6),
        t_min=checks.Number(0, 1, "[)"),
        t_max=checks.Number(0, 1, "(]"),
    )
    def __init__(
        self,
        separation: Separation | Callable[[Tensor], Tensor],
        n: int = 1025,
        *,
        t_min: float = 0.0,
        t_max: float = 1.0,
    ) -> None:
        if t_min >= t_max:
            raise ValueError(f"t_max must be above t_min={t_min:g}, got {t_max!r}")
        with unwatched():
            metric = _metric(separation, torch.linspace(0, math.pi / 2, n, dtype=torch.float64, device="cpu"))
            speed = (metric + _FLOOR * (1 - metric)).sqrt()
            # From either end, so that neither alpha nor sigma is a difference.
            self._arcs = _Arc.of(speed), _Arc.of(speed.flip(0))
        self.n, self.t_min, self.t_max = n, t_min, t_max
        self.phi_total = self._arcs[0].length[-1].item()
        self._on: dict[torch.device, tuple[_Arc, _Arc]] = {}  # on the devices that times have come from

    @property
    def energy(self) -> float:
        return 4 * math.sin(self.phi_total / 2) ** 2

    def __repr__(self) -> str:
        return f"KineticOptimal(phi_total={self.phi_total:.6g}, n={self.n}, t_min={self.t_min:g}, t_max={self.t_max:g})"

    def __eq__(self, other: object) -> bool:
        """Whether it is the same path, by its tables."""
        if not isinstance(other, KineticOptimal):
            return NotImplemented
        mine, theirs = (self.n, self.t_min, self.t_max), (other.n, other.t_min, other.t_max)
        return mine == theirs and torch.equal(self._arcs[0].speed, other._arcs[0].speed)

    def __hash__(self) -> int:
        return hash((self.n, self.t_min, self.t_max, self.phi_total))

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_on": {}}

    @property
    def prior_std(self) -> float:
        return self._radius(torch.tensor(self.t_max, dtype=torch.float64, device="cpu")).item()

    def _arc(self, device: torch.device, data: bool) -> _Arc:
        """The table from the noise end, or from the data end."""
        if device.type == "cpu":
            return self._arcs[data]
        if device not in self._on:
            both = (_Arc(*(x.to(device, wide(device)) for x in arc)) for arc in self._arcs)
            self._on[device] = tuple(both)  # type: ignore[assignment]
        return self._on[device][data]

    def _radius(self, t: Tensor) -> Tensor:
        return (1 - self.energy * t * (1 - t)).sqrt()

    def _leg(self, t: Tensor, data: bool) -> tuple[Tensor, Tensor, Tensor]:
        """At a share t of the chord, from the end where the angle is 0: r, the angle and its derivative by t."""
        arc, total = self._arc(t.device, data), self.phi_total
        r = self._radius(t)
        length = torch.atan2(t * math.sin(total), 1 - t + t * math.cos(total)).clamp(max=total)
        angle, speed = arc.angle(length)
        return r, angle, math.sin(total) / (r.square() * speed)  # r^2 phi' is the area that the chord sweeps

    def _slope(self, t: Tensor, data: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """``r sin(angle)`` and its derivative by t; ``r'/r`` and the derivative of the angle."""
        r, angle, turn = self._leg(t, data)
        stretch = self.energy * (t - 0.5) / r.square()
        return r * angle.sin(), r * (stretch * angle.sin() + angle.cos() * turn), stretch, turn

    def _alpha(self, t: Tensor) -> Tensor:
        r, angle, _ = self._leg(1 - t, False)
        return r * angle.sin()

    def _sigma(self, t: Tensor) -> Tensor:
        r, angle, _ = self._leg(t, True)
        return r * angle.sin()

    def _dalpha(self, t: Tensor) -> Tensor:
        return -self._slope(1 - t, False)[1]

    def _dsigma(self, t: Tensor) -> Tensor:
        return self._slope(t, True)[1]

    def _dlog_alpha(self, t: Tensor) -> Tensor:
        alpha, slope, _, _ = self._slope(1 - t, False)
        return -slope / alpha

    def _dlam(self, t: Tensor) -> Tensor:
        _, angle, turn = self._leg(1 - t, False)
        return -2 * turn / (2 * angle).sin()

    def _t_of_lam(self, lam: Tensor) -> Tensor:
        lengths = (
            self._arc(lam.device, data).reach(torch.atan(sign.exp())) for data, sign in ((False, lam), (True, -lam))
        )
        before, after = (length.sin() for length in lengths)
        return after / (before + after)

    @checks.arguments(t=checks.Operand(checks.fraction), x0=checks.floating, x1=checks.floating)
    def sample(self, t: float | Tensor, x0: Tensor, x1: Tensor) -> tuple[Tensor, Tensor]:
        """``(x_t, dx_t/dt)`` in the convention of flow-matching libraries: noise x0 at t = 0, data x1 at t = 1.

        Args:
            t: a number or a tensor of shape (B,).
            x0, x1: of one shape (B, ...).
        """
        if x0.shape != x1.shape:
            raise ValueError(f"x0 must have x1's shape {tuple(x1.shape)}, got {tuple(x0.shape)}")
        own = 1 - (t.to(wide(t.device)) if isinstance(t, Tensor) else t)
        x, _ = self.perturb(x1, own, x0)
        return x, -(expand(self.dalpha(own), x1) * x1 + expand(self.dsigma(own), x1) * x0)


def _metric(separation: Any, angle: Tensor) -> Tensor:
    return separation._metric(angle) if isinstance(separation, Separation) else metric_of(separation, angle)


@checks.arguments(
    path=checks.Instance(Process, words="a Process of Gaussian noise (an instance, not the class)"), separation=SEPARATION,
    n=checks.Integer(2, 10**7),
)  # fmt: skip
def kinetic_energy(path: Process, separation: Separation | Callable[[Tensor], Tensor], n: int = 400) -> float:
    """The kinetic energy per dimension of a path's marginal velocity, ``int E|E[alpha' x1 + sigma' x0 | x_t]|^2 / d dt``.

    Args:
        path: a Gaussian process; the integral is over its own times, from t_min to t_max.
        separation: of the data, normalised to mean 0 and mean square 1. Energies of data that are not cannot be compared with it.
        n: points of the integral, denser towards the ends.
    """
    if not path.is_gaussian:
        raise ValueError(f"path must have Gaussian noise, which {path!r} has not")
    with unwatched():
        turn = math.pi * (torch.arange(n, dtype=torch.float64, device="cpu") + 0.5) / n
        span = path.t_max - path.t_min
        t = path.t_min + span * torch.sin(turn / 2).square()
        alpha, sigma, dalpha, dsigma = path.alpha(t), path.sigma(t), path.dalpha(t), path.dsigma(t)
        metric = _metric(separation, torch.atan2(alpha, sigma))
        square = alpha.square() + sigma.square()
        speed = (
            (alpha * dalpha + sigma * dsigma).square() + metric * (dalpha * sigma - alpha * dsigma).square()
        ) / square
        return (speed * turn.sin()).sum().item() * span * math.sin(math.pi / (2 * n))  # the cells' lengths in t
