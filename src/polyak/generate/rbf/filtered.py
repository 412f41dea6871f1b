"""Searches that go on from the best of several candidates: best of n, SVDD, CoDe. They are steerings of ``sample``, too."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from polyak.core import checks
from polyak.generate.process import Process
from polyak.generate.rbf.ground import (
    SAMPLE,
    Finish,
    Ground,
    SearchResult,
    SearchTrace,
    check_budget,
    check_stochastic,
    kinds,
    reserved,
)
from polyak.generate.rbf.solver import FlowSDE
from polyak.generate.rewards import Scorer, without_nan
from polyak.generate.steering import SteeringState, rows_of


class _Filtered:
    """``chains`` chains that go on from the best of k candidates after every ``block`` steps."""

    reward: Any
    nfe: int
    steps: int
    finish: Finish
    generator: torch.Generator | None
    solver: FlowSDE

    def _shape(self) -> tuple[int, int, int]:
        """(chains, candidates, block)"""
        raise NotImplementedError

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
        at = Ground(self, model, process, shape, batch, dtype, device, self.solver, self.steps)
        chains, k, block = self._shape()
        x = at.start(chains)
        u, x0 = at.ask(x, 0)
        reward, final = None, self.steps - 1
        spent, best, steps = list[int](), list[Tensor](), list[Tensor]()
        for i in range(final):
            if k > 1 and i % block == 0:
                x, u = x.repeat_interleave(k, 1), u.repeat_interleave(k, 1)
            x = at.move(x, u, i)
            u, x0 = at.ask(x, i + 1)
            if (i + 1) % block and i + 1 < final:
                continue
            reward = at.score(x0, i + 1)
            if k > 1:
                x, u, x0, reward = (at.pick(v, at.best_of(reward, chains)) for v in (x, u, x0, reward))
            best.append(reward if not best else torch.maximum(reward, best[-1]))
            steps.append(torch.full_like(best[-1], i + 1, dtype=torch.int64))
            spent.append(at.spent)
        assert reward is not None
        trace = SearchTrace(spent, torch.stack(best, 2), torch.stack(steps, 2))
        return at.finished(self.finish, x, x0, reward, final, self.steps, trace)

    # --- as a steering

    @property
    def particles(self) -> int:
        chains, k, _ = self._shape()
        return chains * k

    @property
    def resamples(self) -> bool:
        return self._shape()[1] > 1

    def init(self, batch: int, k: int, device: torch.device | None = None) -> SteeringState:
        return SteeringState.uniform(batch, k, device=device)

    def step(
        self,
        state: SteeringState,
        x_next: Tensor,
        *,
        x0_hat: Tensor,
        step: int,
        t: float,
        mean: Tensor | None = None,
        std: float | None = None,
        **known: Any,
    ) -> tuple[Tensor, SteeringState]:
        """Draw all candidates of a chain from the one whose predicted data, before the step, were the best."""
        chains, k, block = self._shape()
        if k == 1 or step % block:
            return x_next, state
        batch = len(state.logw)
        reward, _ = without_nan(self._scorer(x0_hat, chains * k, step=step, t=float(t)))
        best = reward.view(batch, chains, k).argmax(2) + k * torch.arange(chains, device=reward.device)
        rows = rows_of(best.repeat_interleave(k, 1))
        moved = x_next[rows]
        if mean is not None and std:
            moved = mean[rows] + (x_next - mean)  # each with the noise that it had drawn itself
        return moved, state.moved(rows)

    def select(self, state: SteeringState, x: Tensor) -> Tensor:
        """The best final sample of each system, (batch, ...)."""
        reward, _ = without_nan(self._scorer(x, self.particles, last=True))
        return x.view(*reward.shape, *x.shape[1:])[torch.arange(len(reward), device=x.device), reward.argmax(1)]

    @property
    def _scorer(self) -> Scorer:
        return self.reward if isinstance(self.reward, Scorer) else Scorer(self.reward)


@checks.arguments(**kinds("reward nfe steps finish generator solver"))
@dataclass(frozen=True, eq=False)
class BestOfN(_Filtered):
    """The best of ``nfe // steps`` samples of the ODE.

    As a steering of :func:`polyak.generate.sample` it runs that many particles, by any solver, and returns the best.

    Args:
        reward, nfe, steps, finish, generator: as of :class:`RolloverBudget`.
        solver: how to step; the ODE's by default.

    Raises:
        ValueError: fewer calls than steps.
    """

    reward: Any
    nfe: int = 500
    steps: int = 10
    finish: Finish = "x0hat"
    generator: torch.Generator | None = None
    solver: FlowSDE = field(default=FlowSDE(norm=0.0), kw_only=True)

    def __post_init__(self) -> None:
        least = self.steps + reserved(self.finish, self.steps)
        check_budget("BestOfN", self.nfe, least, f"steps={self.steps}")

    def _shape(self) -> tuple[int, int, int]:
        return (self.nfe - reserved(self.finish, self.steps)) // self.steps, 1, self.steps


@checks.arguments(**kinds("reward nfe steps chains candidates finish generator solver"))
@dataclass(frozen=True, eq=False)
class SVDD(_Filtered):
    """Each of ``chains`` chains draws ``candidates`` next states and goes on from the best (Li et al., arXiv 2408.08252).

    As a steering of :func:`polyak.generate.sample` it runs ``chains * candidates`` particles; of those of a chain the best
    prediction's transition is the one that all are drawn from. The first choice is then among noises.

    Args:
        reward, nfe, steps, chains, finish, generator, solver: as of :class:`RolloverBudget`.
        candidates: default ``nfe // (steps * chains)``.

    Raises:
        ValueError: a budget that is too small for the candidates; a solver without noise.
    """

    reward: Any
    nfe: int = 500
    steps: int = 10
    chains: int = 2
    candidates: int | None = None
    finish: Finish = "x0hat"
    generator: torch.Generator | None = None
    solver: FlowSDE = field(default=FlowSDE(), kw_only=True)

    def __post_init__(self) -> None:
        name, k = type(self).__name__, self.candidates or 1
        least = self.chains * (1 + k * (self.steps - 1)) + reserved(self.finish, self.steps)
        check_budget(name, self.nfe, least, f"chains={self.chains}, candidates={k}, steps={self.steps}")
        check_stochastic(name, self.solver)

    def _shape(self) -> tuple[int, int, int]:
        free = self.nfe - reserved(self.finish, self.steps)
        return self.chains, self.candidates or max(1, free // (self.steps * self.chains)), 1


@checks.arguments(**kinds("reward nfe steps chains candidates finish generator solver block"))
@dataclass(frozen=True, eq=False)
class CoDe(SVDD):
    """SVDD that chooses after every ``block`` steps (Singh et al., arXiv 2502.00968).

    Args:
        reward, nfe, steps, chains, candidates, finish, generator, solver: as of :class:`SVDD`.
        block: steps that a candidate takes before it is judged.
    """

    block: int = field(default=2, kw_only=True)

    def _shape(self) -> tuple[int, int, int]:
        chains, k, _ = super()._shape()
        return chains, k, self.block
