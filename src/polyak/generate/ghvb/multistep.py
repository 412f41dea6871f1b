"""Adams-Bashforth methods in ``y = x / alpha`` over ``s = sigma / alpha``, with heavy-ball momentum.

Each method is one recurrence. It is run on the weights of its values, not on the values: what it does at a step is then one row of
weights for the state and one for each average that is remembered.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, Literal, NamedTuple, Self

import torch
from torch import Tensor

from polyak.core import checks, integrators
from polyak.generate.ghvb.coefficients import BETA, K, ab_coefficients
from polyak.generate.linear import LinearSolver, Stage
from polyak.generate.process import Moments, ProbabilityPath
from polyak.generate.process.path import unwatched
from polyak.generate.solver import step_count

Form = tuple[float, ...]  # a linear combination, by its weights
_TOGETHER = 128  # steps whose weights are found at once
_OPTIONS: dict[str, checks.Kind] = dict(
    order=K, beta=BETA, spacing=checks.Choice("constant", "variable"), start=checks.Choice("lower", "rk")
)


class _Row(NamedTuple):
    """A step, as weights of the new value and what is remembered: what is stepped by, and what is remembered then."""

    direction: Form
    keep: tuple[int, ...]
    mixed: tuple[Form, ...]


@dataclass(frozen=True, repr=False)
class _Momentum(LinearSolver):
    """What the methods share: grids, weights, the start, and how a recurrence becomes a table."""

    order: int = 4
    beta: float = 0.8
    spacing: Literal["constant", "variable"] = "constant"
    start: Literal["lower", "rk"] = "lower"

    @classmethod
    @checks.arguments(order=checks.Number(0, 5, "(]"))
    def from_decimal(cls, order: float, **options: Any) -> Self:
        """The paper's short form: 3.8 is order 4 with beta 0.8, 0.7 order 1 with beta 0.7, 4 order 4 without momentum."""
        part = float(Decimal(repr(float(order))) % 1)  # 3.8 % 1 is 0.7999999999999998
        return cls(math.ceil(order), part or 1.0, **options)

    def _advance(self, g: Form, past: list[Form], weights: Sequence[float]) -> tuple[Form, list[Form]]:
        """One step of the recurrence: what is stepped by, and what is remembered, from the new value and that before."""
        raise NotImplementedError

    def _seeded(self, shift: Tensor, average: Tensor) -> list[Tensor]:
        """What is remembered after step k - 2, as combinations of the values at steps 0 to k - 1.

        Args:
            shift, average: the matrices by which a polynomial of degree k - 1, given at these steps, goes back one step, and by
                which it becomes its average over all steps before.
        """
        raise NotImplementedError

    @property
    def _reaches(self) -> int:
        """The order that a run has asymptotically."""
        return self.order if self.start == "rk" and self.spacing == "variable" else min(self.order, 2)

    @property
    def tapers(self) -> int:  # type: ignore[override]
        return self.order - self._reaches

    @property
    def _extra(self) -> int:
        """Evaluations beside those at the times."""
        return (len(integrators.RK4.nodes) - 1) * (self.order - 1) if self.start == "rk" else 0

    def times(
        self, process: ProbabilityPath, *, steps: int | None = None, nfe: int | None = None, grid: str | None = None
    ) -> Tensor:
        n = step_count(steps, nfe, 1) - (self._extra if nfe is not None else 0)
        if n < self.order:
            more = " with start='rk'" if self.start == "rk" else ""
            count = f"steps={steps}" if nfe is None else f"nfe={nfe}"
            raise ValueError(f"{count} is too few for order {self.order}{more}")
        return process.grid(n, grid or self.grid)

    def table(self, times: Sequence[float], process: ProbabilityPath, kind: str = "flow") -> list[Stage]:
        with unwatched():
            return self._table(times, process)

    def _table(self, times: Sequence[float], process: ProbabilityPath) -> list[Stage]:
        k, steps = self.order, len(times) - 1
        started = k - 1 if self.start == "rk" and steps >= k else 0  # steps of Runge-Kutta
        at = process.moments(times)
        levels = at.sigma_hat
        _check_levels(levels, times, process)
        at, places = _points(at, process, started)
        stages, weights = [], self._weights(levels)
        size = started  # of what is remembered
        known: dict[tuple[int, Form], _Row] = {}
        for i, (here, there) in enumerate(itertools.pairwise(places)):
            if i < started:
                stages += _runge_kutta(at, here, i)
                continue
            if i == started > 0:
                row = self._row(size, weights[i], self._start(weights))
            elif (row := known.get((size, weights[i]))) is None:
                row = known[size, weights[i]] = self._row(size, weights[i])
            gain = at.alpha[there] * (levels[i + 1] - levels[i])
            value, *rest = [gain * weight for weight in row.direction]
            base = at.alpha[there] / at.alpha[here]
            stages.append(Stage(at[here], at[there], "eps", base, value, tuple(rest), 0.0, row.keep, mixed=row.mixed))
            size = len(row.keep)
        return stages

    def _row(self, size: int, weights: Form, past: list[Form] | None = None) -> _Row:
        """One step from ``size`` remembered values, which are the past unless they are said to make it up."""
        basis = _units(1 + size)
        direction, after = self._advance(basis[0], basis[1:] if past is None else past, weights)
        mixed = [form for form in after if form not in basis]
        keep = tuple(basis.index(form) if form in basis else -1 - mixed.index(form) for form in after)
        return _Row(direction, keep, tuple(mixed))

    def _weights(self, levels: Sequence[float]) -> list[Form]:
        """The weights of every step for the values that are there, newest first."""
        counts = [min(i, self.order) for i in range(1, len(levels))]
        if self.spacing == "constant":
            return [ab_coefficients(count, self._mixing) for count in counts]
        return [_integrals(levels, i, count) for i, count in enumerate(counts)]

    @property
    def _mixing(self) -> float:
        """The b of the weights."""
        return 1.0

    def _start(self, weights: Sequence[Form]) -> list[Form]:
        """What is remembered before step k - 1, after Runge-Kutta steps, as combinations of the values at steps k - 1, ..., 0.

        On a uniform grid the averages are those of the polynomial through the values, continued backwards for ever: averages that
        began at step 0 would be of first order there. Weights for the actual steps allow for the beginning.
        """
        k = self.order
        if self.spacing == "variable":
            past: list[Form] = []
            for i, g in enumerate(reversed(_units(k)[1:])):
                _, past = self._advance(g, past, weights[i])
            return past
        shift = torch.diag(torch.ones(k - 1, dtype=torch.float64, device="cpu"), -1)
        shift[0] = torch.tensor([(-1.0) ** m * math.comb(k, m + 1) for m in range(k)], dtype=torch.float64)
        eye = torch.eye(k, dtype=torch.float64, device="cpu")
        # v_n - (1 - beta) v_(n-1) = beta g_n, for polynomials
        average = self.beta * torch.linalg.inv(eye - (1 - self.beta) * shift)
        return [tuple(row.flip(0).tolist()) for row in self._seeded(shift, average)]


def _units(n: int) -> list[Form]:
    return [tuple(float(i == j) for j in range(n)) for i in range(n)]


def _mix(weights: Sequence[float], forms: Sequence[Form]) -> Form:
    return tuple(sum(w * x for w, x in zip(weights, column, strict=True)) for column in zip(*forms, strict=True))


def _check_levels(levels: Sequence[float], times: Sequence[float], process: ProbabilityPath) -> None:
    for t, level in zip(times, levels, strict=False):
        if not math.isfinite(level):
            raise ValueError(
                f"alpha is 0 at t={t:g} of {process!r}, where sigma / alpha is infinite: use HeavyBallDPM, or begin below it"
            )
    pairs = list(itertools.pairwise(levels))
    if not (all(a > b for a, b in pairs) or all(a < b for a, b in pairs)):
        raise ValueError(f"sigma / alpha must decrease strictly over the times of a run, got {levels}")


def _points(at: Moments, process: Any, started: int) -> tuple[Moments, list[int]]:
    """All points of evaluation, those within Runge-Kutta steps included, and where the steps begin and end among them."""
    if not started:
        return at, list(range(len(at)))
    points, places = [], []
    for i, s in enumerate(at):
        places.append(len(points))
        points.append(s)
        if i < started:
            low, high = at.sigma_hat[i], at.sigma_hat[i + 1]
            inner = [process.t_of_lam(-math.log(low + c * (high - low))) for c in integrators.RK4.nodes[1:-1]]
            points += [*inner, at[i + 1]]
    return process.moments(points), places


def _runge_kutta(at: Moments, first: int, depth: int) -> list[Stage]:
    """A Runge-Kutta step in s from one of the points, with ``depth`` earlier values remembered; it remembers its own first."""
    nodes, matrix, weights = integrators.RK4
    count, stages = len(nodes), []
    delta = at.sigma_hat[first + count] - at.sigma_hat[first]
    for j, row in enumerate((*matrix, weights)):
        to, last = first + j + 1, j == count - 1
        value, *past = (at.alpha[to] * delta * w for w in reversed(row))
        keep = range(count - 1, count + depth) if last else range(j + 1 + depth)
        base = at.alpha[to] / at.alpha[first]
        stages.append(Stage(at[first + j], at[to], "eps", base, value, tuple(past), 0.0, tuple(keep), j == 0, last))
    return stages


def _integrals(levels: Sequence[float], step: int, count: int) -> Form:
    """The mean over a step of the polynomial through the last values: a weight for each, newest first."""
    at, length = levels[step], levels[step + 1] - levels[step]
    nodes = [(levels[step - i] - at) / length for i in range(count)]
    weights = []
    for i, own in enumerate(nodes):
        powers = [1.0]  # of the Lagrange polynomial in u, which is 0 at the step's start and 1 at its end
        for other in (node for j, node in enumerate(nodes) if j != i):
            low, high = [-other * c for c in powers], powers
            powers = [(a + b) / (own - other) for a, b in zip([*low, 0.0], [0.0, *high], strict=True)]
        weights.append(sum(c / (n + 1) for n, c in enumerate(powers)))
    return tuple(weights)


class _OfValues(_Momentum):
    """What :class:`HeavyBall` and :class:`Nesterov` share: past values of the network are mixed, and then averaged."""

    @property
    def _reaches(self) -> int:
        return super()._reaches if self.beta == 1 else 1

    @property
    def history(self) -> int:  # type: ignore[override]
        return self.order - 1 + (self.beta < 1)

    def _direction(self, velocity: Form, mix: Form) -> Form:
        raise NotImplementedError

    def _advance(self, g: Form, past: list[Form], weights: Sequence[float]) -> tuple[Form, list[Form]]:
        if self.beta == 1:
            values = [g, *past]
            return _mix(weights, values), values[: self.order - 1]
        values = [g, *past[1:]]
        mix = _mix(weights, values)
        velocity = _mix((1 - self.beta, self.beta), (past[0], mix)) if past else g  # v_(-1) = g_0
        return self._direction(velocity, mix), [velocity, *values[: self.order - 1]]

    def _seeded(self, shift: Tensor, average: Tensor) -> list[Tensor]:
        values = list(torch.eye(self.order, dtype=torch.float64, device="cpu").flip(0)[1:])
        if self.beta == 1:
            return values
        mixed = sum(c * torch.linalg.matrix_power(shift, i) for i, c in enumerate(ab_coefficients(self.order)))
        return [(average @ mixed)[-2], *values]


@checks.arguments(**_OPTIONS)
@dataclass(frozen=True, repr=False)
class HeavyBall(_OfValues):
    """PLMS with heavy-ball momentum (HB): ``v = (1 - beta) v + beta M_k(eps)``, ``y += delta v``; one evaluation a step.

    First order for beta < 1. ``beta=1`` is the Adams-Bashforth method PLMS.

    Args:
        order: k, 1 to 5, of the multistep method; while fewer values are there, their number.
        beta: in (0, 1]; less is more momentum.
        spacing: "constant": the weights of a uniform grid, as in the official code. "variable": those of the actual steps in
            sigma / alpha.
        start: "lower": the first steps are of lower order, as in the official code. "rk": they are steps of the classical
            Runge-Kutta method, at 3 (order - 1) further evaluations, and the average starts as if it had always gone on.
    """

    def _direction(self, velocity: Form, mix: Form) -> Form:
        return velocity


@checks.arguments(**_OPTIONS)
@dataclass(frozen=True, repr=False)
class Nesterov(_OfValues):
    """PLMS with Nesterov's momentum (NT): ``p = M_k(eps)``, ``v = (1 - beta) v + beta p``, ``y += delta ((1 - beta) v + beta p)``.

    First order for beta < 1; the paper's ablation. Options as of :class:`HeavyBall`.
    """

    def _direction(self, velocity: Form, mix: Form) -> Form:
        return _mix((1 - self.beta, self.beta), (velocity, mix))


@checks.arguments(**_OPTIONS)
@dataclass(frozen=True, repr=False)
class GHVB(_Momentum):
    """Generalized heavy ball: ``v = (1 - beta) v + beta eps``, ``y += delta M_k(v; beta)``; one evaluation a step.

    Its weights allow for the average, so that on a uniform grid of sigma / alpha it is of order k. As all multistep methods
    that begin with a step of Euler's it shows order 2, unless ``start="rk"``. Options as of :class:`HeavyBall`.
    """

    @property
    def history(self) -> int:  # type: ignore[override]
        return max(self.order - 1, 1)

    @property
    def _mixing(self) -> float:
        return self.beta

    def _advance(self, g: Form, past: list[Form], weights: Sequence[float]) -> tuple[Form, list[Form]]:
        velocity = _mix((1 - self.beta, self.beta), (past[0], g)) if past else g
        velocities = [velocity, *past][: self.order]
        return _mix(weights, velocities), velocities[: self.history]

    def _weights(self, levels: Sequence[float]) -> list[Form]:
        if self.spacing == "constant":
            return super()._weights(levels)
        every = torch.tensor(levels, dtype=torch.float64, device="cpu")
        steps = torch.arange(len(levels) - 1, device="cpu")
        return [row for some in steps.split(_TOGETHER) for row in self._exact(every, some)]

    def _exact(self, levels: Tensor, steps: Tensor) -> list[Form]:
        """The weights for which M(v) is the mean over a step of every polynomial g that as many averages can tell."""
        k, keep = self.order, 1 - self.beta
        orders, values = torch.arange(k, device="cpu"), torch.arange(int(steps[-1]) + 1, device="cpu")
        # What v_(n-j) is of the values so far, the first of which is also what is before it.
        ages = steps[:, None, None] - orders[:, None] - values
        averages = keep ** ages.clamp(min=0).double() * (ages >= 0)
        averages[..., 1:] *= self.beta
        here, there = levels[steps, None], levels[steps + 1, None]
        nodes = (levels[values] - here) / (there - here)
        moments = nodes[:, None] ** orders[:, None] @ averages.mT
        # While there are fewer averages than k, the others weigh 0.
        absent = orders > steps[:, None]
        moments = moments.masked_fill(absent[:, None] | absent[..., None], 0.0) + absent.double().diag_embed()
        means = (1 / (orders + 1).double()).masked_fill(absent, 0.0)
        weights = torch.linalg.solve(moments, means).tolist()
        return [tuple(row[: step + 1]) for row, step in zip(weights, steps.tolist(), strict=True)]

    def _seeded(self, shift: Tensor, average: Tensor) -> list[Tensor]:
        return list(average.flip(0)[1:])
