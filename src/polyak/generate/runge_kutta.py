"""Classical Runge-Kutta methods for the probability-flow ODE, by their tableaus."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import ClassVar

from polyak.core import integrators
from polyak.generate.linear import LinearSolver, Stage
from polyak.generate.process import ProbabilityPath


class RungeKutta(LinearSolver):
    """An explicit Runge-Kutta method on the probability-flow ODE ``dx/dt = alpha' x0 + sigma' eps`` in the process's own time.

    A subclass declares its tableau: ``nodes`` c, ``matrix`` a (one row per further stage) and ``weights`` b. A step is Euler's
    where it would ask at a time at which the field is not known: clean data below t_min, or sigma = 0 for a dialect that is
    divided by it (:meth:`ProbabilityPath.evaluable`).
    """

    nodes: ClassVar[tuple[float, ...]]
    matrix: ClassVar[tuple[tuple[float, ...], ...]]
    weights: ClassVar[tuple[float, ...]]

    @property
    def stages(self) -> int:  # type: ignore[override]
        return len(self.nodes)

    by_kind = True

    def table(self, times: Sequence[float], process: ProbabilityPath, kind: str = "flow") -> list[Stage]:
        if len(self.nodes) == 1:
            at = process.moments(times)
            return [Stage(s, t, "flow", 1.0, (t - s) * self.weights[0]) for s, t in itertools.pairwise(at)]
        inner: list[float] = []
        for s, t in itertools.pairwise(times):
            # A node at the step's end is the next time itself, to the last bit.
            inner += [s, *(t if c == 1.0 else s + c * (t - s) for c in self.nodes[1:])]
        points = process.moments([*inner, times[-1]])
        count = len(self.nodes)
        rows = [tuple(reversed(row)) for row in (*self.matrix, self.weights)]  # newest first, as values are remembered
        keeps = [*(tuple(range(j + 1)) for j in range(count - 1)), ()]
        stages = []
        for first in range(0, len(points) - 1, count):
            s, t = points[first], points[first + count]
            h = t - s
            asked = points[first : first + count]
            if t == points[-1] and not all(process.evaluable(q, kind) for q in asked[1:]):
                stages.append(Stage(s, t, "flow", 1.0, h))
                continue
            for j, (at, to, row, keep) in enumerate(zip(asked, (*asked[1:], t), rows, keeps, strict=True)):
                past = tuple([h * w for w in row[1:]])
                stages.append(Stage(at, to, "flow", 1.0, h * row[0], past, 0.0, keep, j == 0, j == count - 1))
        return stages


class Euler(RungeKutta):
    """First order, one evaluation a step: ``x + h f(x, s)``."""

    nodes, matrix, weights = integrators.EULER


class Heun(RungeKutta):
    """Second order, two evaluations a step: the trapezoidal rule (the deterministic sampler of EDM, arXiv 2206.00364)."""

    order = 2
    nodes, matrix, weights = integrators.HEUN


class RK4(RungeKutta):
    """Fourth order, four evaluations a step: the classical method of Kutta (1901)."""

    order = 4
    nodes, matrix, weights = integrators.RK4
