"""Euler-Maruyama steps of the reverse SDE, with any share of noise."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from polyak.core import checks
from polyak.generate.linear import LinearSolver, Stage
from polyak.generate.process import ProbabilityPath, Process


@checks.arguments(zeta=checks.non_negative)
@dataclass(frozen=True, repr=False)
class ReverseSDE(LinearSolver):
    """Euler-Maruyama of ``dx = [-f + (1 + zeta^2)/2 sigma^2 score] dtau + zeta sigma dW`` (arXiv 2503.02819, section 3).

    First order, one evaluation a step. ``zeta=1`` is the reverse SDE, ``zeta=0`` the probability-flow ODE; for annealing by beta
    ``zeta=beta**-0.5`` is tempered noise. With zeta above 1 a particle forgets faster and weights vary less, and steps must be
    smaller. sigma is the diffusion coefficient of the process.

    Raises:
        ValueError: a start where that is infinite, as at t = 1 of ``Flow()``: ``Flow(t_max=0.999)`` begins below.
    """

    zeta: float = 1.0

    order: ClassVar[int] = 1
    needs_gaussian: ClassVar[bool] = True

    @property
    def stochastic(self) -> bool:  # type: ignore[override]
        return self.zeta > 0

    def table(self, times: Sequence[float], process: ProbabilityPath, kind: str = "flow") -> list[Stage]:
        assert isinstance(process, Process)  # needs_gaussian
        stages = []
        for s, t in itertools.pairwise(process.moments(times)):
            d, sigma2 = float(s) - float(t), process.diffusion2(float(s))
            if not math.isfinite(sigma2):
                raise ValueError(f"diffusion of {process!r} is infinite at t={float(s):g}: begin below")
            rate = (1 + self.zeta**2) / 2 * sigma2
            std = self.zeta * math.sqrt(sigma2 * d)
            stages.append(Stage(s, t, "score", 1 - process.drift(float(s)) * d, rate * d, std=std))
        return stages
