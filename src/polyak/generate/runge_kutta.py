"""The classical integrators of the probability-flow ODE, by their tableaus."""

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
        inner: list[float] = []
        for s, t in itertools.pairwise(times):
            # A node at the step's end is the next time itself, to the last bit.
            inner += [s, *(t if c == 1.0 else s + c * (t - s) for c in self.nodes[1:])]
        points = process.moments([*inner, times[-1]])
        count = len(self.nodes)
        rows = [*self.matrix, self.weights]
        stages = []
        for first in range(0, len(points) - 1, count):
            s, t = points[first], points[first + count]
            h = float(t) - float(s)
            asked = points[first : first + count]
            if count > 1 and t == points[-1] and not all(process.evaluable(q, kind) for q in asked[1:]):
                stages.append(Stage(s, t, "flow", 1.0, h))
                continue
            for j, row in enumerate(rows):
                last = j == count - 1
                weights = tuple(h * w for w in reversed(row))
                stages.append(
                    Stage(
                        asked[j],
                        t if last else asked[j + 1],
                        "flow",
                        1.0,
                        weights[0],
                        weights[1:],
                        keep=() if last else tuple(range(j + 1)),
                        first=j == 0,
                        last=last,
                    )
                )
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
