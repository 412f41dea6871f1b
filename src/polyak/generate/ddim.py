"""DDIM, deterministic and ancestral: the solver of first order that all others are measured against."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from polyak.core import checks
from polyak.generate.linear import LinearSolver, Stage
from polyak.generate.process import ProbabilityPath


@checks.arguments(eta=checks.fraction)
@dataclass(frozen=True, repr=False)
class DDIM(LinearSolver):
    """DDIM (Song et al., arXiv 2010.02502, equation 12): ``x_t = alpha_t x0 + sqrt(sigma_t^2 - std^2) eps + std z``.

    First order, one evaluation a step. ``eta=0`` is deterministic, and equals DPM-Solver-1; ``eta=1`` is ancestral sampling
    (SDE-DPM-Solver++ of first order). ``std = eta sigma_t sqrt(1 - exp(-2h))`` with h the step in half log-SNR.
    """

    eta: float = 0.0

    order: ClassVar[int] = 1

    @property
    def stochastic(self) -> bool:  # type: ignore[override]
        return self.eta > 0

    @property
    def needs_gaussian(self) -> bool:  # type: ignore[override]
        return self.eta > 0

    def table(self, times: Sequence[float], process: ProbabilityPath, kind: str = "flow") -> list[Stage]:
        at = process.moments(times)
        alpha, sigma = at.alpha, at.sigma
        stages = []
        for i, (s, t) in enumerate(itertools.pairwise(at)):
            std = 0.0
            if self.eta and sigma[i + 1]:
                std = self.eta * sigma[i + 1] * math.sqrt(-math.expm1(2 * (at.lam[i] - at.lam[i + 1])))
            rest = math.sqrt(sigma[i + 1] ** 2 - std**2)
            if sigma[i]:
                # eps = (x - alpha_s x0) / sigma_s
                ratio = rest / sigma[i]
                stages.append(Stage(s, t, "x0", ratio, alpha[i + 1] - ratio * alpha[i], std=std))
            else:
                # x0 = x / alpha_s
                stages.append(Stage(s, t, "eps", alpha[i + 1] / alpha[i], rest, std=std))
        return stages
