"""Heavy-ball momentum on DPM-Solver++ 2M."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from polyak.core import checks
from polyak.generate.ghvb.coefficients import BETA
from polyak.generate.linear import LinearSolver, Stage
from polyak.generate.process import ProbabilityPath


@checks.arguments(beta=BETA, warm=checks.flag)
@dataclass(frozen=True, repr=False)
class HeavyBallDPM(LinearSolver):
    """DPM-Solver++ 2M with heavy-ball momentum; one evaluation a step (arXiv 2307.11118, section 4.1).

    With h the step in half log-SNR, r the one before divided by h, and m the predicted data, newest first,

        D = m_0 + (m_0 - m_1) / (2 r),   v = (1 - beta) v + beta D,   x_t = (sigma_t / sigma_s) x_s - alpha_t expm1(-h) v

    First order for beta < 1. ``beta=1`` is DPM-Solver++ 2M. It starts where no signal is left (alpha = 0), and ends on clean
    data, each with a step of first order, which has no momentum.

    Args:
        beta: in (0, 1]; less is more momentum.
        warm: whether v starts with the first prediction; else, as in the official code, with the first D of second order.
    """

    beta: float = 0.8
    warm: bool = False

    order: ClassVar[int] = 2
    grid: ClassVar[str] = "logsnr"

    @property
    def tapers(self) -> int:  # type: ignore[override]
        return int(self.beta < 1)

    @property
    def history(self) -> int:  # type: ignore[override]
        return 1 + (self.beta < 1)

    def table(self, times: Sequence[float], process: ProbabilityPath, kind: str = "flow") -> list[Stage]:
        at = process.moments(times)
        lam, averages, stages = at.lam, self.beta < 1, []
        moving = False  # whether v is among what is remembered, (v, m_1)
        for i, (s, t) in enumerate(itertools.pairwise(at)):
            if at.sigma[i] == 0:
                raise ValueError(f"sigma is 0 at t={s:g}, where DPM-Solver++ cannot start: begin above it")
            h = lam[i + 1] - lam[i]
            base, gain = at.sigma[i + 1] / at.sigma[i], -at.alpha[i + 1] * math.expm1(-h)
            if i == 0 or math.isinf(h):
                warm = self.warm and averages
                stages.append(Stage(s, t, "x0", base, gain, keep=(0, 0) if warm else (0,)))
                moving = warm
                continue
            half = h / (lam[i] - lam[i - 1]) / 2
            fresh = (1 + half, -half)  # D, of (m_0, m_1)
            if moving:
                row = (self.beta * fresh[0], 1 - self.beta, self.beta * fresh[1])
            else:
                row = fresh
            value, past = gain * row[0], tuple(gain * weight for weight in row[1:])
            if averages:
                stages.append(Stage(s, t, "x0", base, value, past, keep=(-1, 0), mixed=(row,)))
            else:
                stages.append(Stage(s, t, "x0", base, value, past, keep=(0,)))
            moving = averages
        return stages
