"""Search over paths: noise is added to samples, and the best of what the ODE makes of it is kept."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from polyak.core import checks
from polyak.generate.process import Process
from polyak.generate.rbf.ground import SAMPLE, Finish, Ground, SearchResult, SearchTrace, check_budget, kinds
from polyak.generate.rbf.solver import FlowSDE


@checks.arguments(
    **kinds("reward nfe chains finish generator"), candidates=checks.Integer(1), seed=checks.fraction,
    forward=checks.positive, backward=checks.positive,
)  # fmt: skip
@dataclass(frozen=True, eq=False)
class SoP:
    """Search over paths (Ma et al., arXiv 2501.09732). The ODE takes ``chains`` noises down to the time ``seed``. Then, until there
    is clean data: add the noise of ``forward`` to each ``candidates`` times, follow the ODE back by ``backward``, keep the best.

    Times are shares of the process's range. The ODE is solved by Euler's method, in as many steps a piece as the budget admits.

    Args:
        reward, nfe, generator: as of :class:`RolloverBudget`.
        chains, candidates: samples, and renoised copies of each.
        seed, forward, backward: the times.
        finish: "x0hat": the data predicted at the ODE's last evaluation; "ode": where it ends.

    Raises:
        ValueError: a budget below one step a piece; times that do not lead to clean data.
    """

    reward: Any
    nfe: int = 500
    chains: int = 2
    candidates: int = 5
    seed: float = 0.12
    forward: float = 0.78
    backward: float = 0.81
    finish: Finish = "x0hat"
    generator: torch.Generator | None = None

    def __post_init__(self) -> None:
        if not self.forward < self.backward:
            raise ValueError(f"backward must be above forward={self.forward!r}, got {self.backward!r}")
        if self.seed + self.forward > 1:
            raise ValueError(f"forward must be at most 1 - seed={1 - self.seed:g}, got {self.forward!r}")
        check_budget(
            "SoP", self.nfe, self._pieces, f"chains={self.chains}, candidates={self.candidates}, {self.rounds} rounds"
        )

    @property
    def rounds(self) -> int:
        """How often noise is added."""
        return max(1, math.ceil(self.seed / (self.backward - self.forward) - 1e-9))

    @property
    def _pieces(self) -> int:
        return self.chains * (1 + self.rounds * self.candidates)

    @checks.arguments(**SAMPLE)
    @torch.no_grad()
    def sample(
        self,
        model: Any,
        process: Process,
        shape: Sequence[int],
        batch: int = 1,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> SearchResult:
        """Search for samples of a shape; arguments as for :meth:`RolloverBudget.sample`."""
        at = Ground(self, model, process, shape, batch, dtype, device, FlowSDE(norm=0.0), 1)
        n, low, span = self.nfe // self._pieces, process.t_min, process.t_max - process.t_min
        x, x0 = self._down(at, at.start(self.chains), 1.0, self.seed, n)
        now, reward = self.seed, None
        spent, best, steps = list[int](), list[Tensor](), list[Tensor]()
        for i in range(self.rounds):
            high = min(now + self.forward, 1.0)
            s, t = low + span * now, low + span * high
            ratio = process.alpha(t) / process.alpha(s)
            std = math.sqrt(max(process.sigma(t) ** 2 - (ratio * process.sigma(s)) ** 2, 0.0))
            x = x.repeat_interleave(self.candidates, 1)
            x = ratio * x + std * at.noise(x.shape[1])
            now = max(high - self.backward, 0.0) if i + 1 < self.rounds else 0.0
            x, x0 = self._down(at, x, high, now, n)
            reward = at.score(x if self.finish == "ode" and now == 0 else x0, 0, last=now == 0)
            x, x0, reward = (at.pick(v, at.best_of(reward, self.chains)) for v in (x, x0, reward))
            best.append(reward if not best else torch.maximum(reward, best[-1]))
            steps.append(torch.full_like(reward, i + 1, dtype=torch.int64))
            spent.append(at.spent)
        assert reward is not None
        trace = SearchTrace(spent, torch.stack(best, 2), torch.stack(steps, 2))
        return at.finished("x0hat", x, x if self.finish == "ode" else x0, reward, 0, n, trace)

    @staticmethod
    def _down(at: Ground, x: Tensor, high: float, low: float, n: int) -> tuple[Tensor, Tensor]:
        """The ODE in n Euler steps, between shares of the range; and the data predicted at the last of its evaluations."""
        process, x0 = at.process, x
        t_min, span = process.t_min, process.t_max - process.t_min
        times = [t_min + span * (high + (low - high) * i / n) for i in range(n + 1)]
        for s, t in itertools.pairwise(times):
            u, x0 = at.ask_at(x, min(s, process.t_max))
            x = torch.add(x, u, alpha=t - s)
        return x, x0
