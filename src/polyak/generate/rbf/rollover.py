"""Rollover budget forcing: calls that a step did not need are spent by later ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

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


@checks.arguments(**kinds("reward nfe steps chains init finish generator lookahead solver"))
@dataclass(frozen=True, eq=False)
class RolloverBudget:
    """Rollover budget forcing (Kim et al., arXiv 2503.19385, section 5, as their code has it).

    Each chain keeps the best of ``init`` noises, by the reward of the predicted data. Then it draws one next state after another.
    One that is better than all before is gone on from at once, and what is left of the step's quota is added to the next one's;
    when the quota is spent, the best draw of the step is gone on from. The last step gets all calls that are left.

    Args:
        reward: of samples, larger is better: a function as of :class:`polyak.generate.rewards.Scorer`, or such a scorer. NaN counts
            as -inf. Its context's t is a tensor of shape (batch, chains), since chains are at different times.
        nfe: calls of the network for each system; never more, and, as in the official code, fewer by one to ``chains * lookahead``.
        steps: of the solver's grid.
        chains: independent of each other; the best one is returned.
        init: noises for each chain.
        finish: "x0hat": the data that are predicted at the last time but one, which is a sample if the model predicts sharply from
            there (few-step distilled models); "ode": the winner's ODE, ``steps`` steps to clean data, whose calls are set aside.
        generator: of all noise, on the samples' device.
        lookahead: candidates that a chain draws at once; the best counts. For devices that a few rows do not fill.
        solver: how to step.

    Raises:
        ValueError: a budget that leaves steps without a call, with the least one; a solver without noise.

    Example:
        >>> search = RolloverBudget(lambda x: -x.square().flatten(2).sum(2), nfe=60, steps=5, init=5)
        >>> model = convert(lambda x, label: x, Flow(), VP())  # a velocity
        >>> search.sample(model, VP(), (3,), batch=4).x.shape
        torch.Size([4, 3])
    """

    reward: Any
    nfe: int = 500
    steps: int = 10
    chains: int = 2
    init: int = 25
    finish: Finish = "x0hat"
    generator: torch.Generator | None = None
    lookahead: int = field(default=1, kw_only=True)
    solver: FlowSDE = field(default=FlowSDE(), kw_only=True)

    def __post_init__(self) -> None:
        check_stochastic("RolloverBudget", self.solver)
        least = self.chains * (self.init + self.steps * self.lookahead) + reserved(self.finish, self.steps)
        check_budget(
            "RolloverBudget",
            self.nfe,
            least,
            f"chains={self.chains}, init={self.init}, steps={self.steps}, lookahead={self.lookahead}",
        )

    @property
    def quota(self) -> int:
        """The calls that each step of a chain is granted, before what is left over."""
        free = self.nfe - reserved(self.finish, self.steps) - self.init * self.chains
        return free // (self.steps * self.chains)

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
        """Search for samples of a shape.

        Args:
            model: a Denoiser, or a network ``(x, label) -> velocity``, of ``process``. The rows of one system are adjacent: with
                one prompt for each system, row i of n is of prompt ``i * batch // n``.
            process: the interpolant, in which all is done; :func:`polyak.generate.convert` gives a model another one.
            shape: of a sample.
            batch: systems (prompts), each searched for itself.
            dtype, device: of the samples; in half precision states are kept in float32.
        """
        at = Ground(self, model, process, shape, batch, dtype, device, self.solver, self.steps)
        chains, m, last = self.chains, self.lookahead, self.steps - 2
        x = at.start(chains * self.init)
        u, x0 = at.ask(x, 0)
        reward = at.score(x0, 0)
        x, u, x0, record = (at.pick(v, at.best_of(reward, chains)) for v in (x, u, x0, reward))
        found_x, found_u, found_x0, found_at, found = x, u, x0, torch.zeros_like(record, dtype=torch.int64), record
        step, used, rolled = (torch.zeros_like(found_at) for _ in range(3))
        quota, granted = (torch.full_like(found_at, self.quota) for _ in range(2))
        best = torch.full_like(record, -torch.inf)  # of the present step
        spent, records, steps = [at.spent], [record], [step]
        while at.spent + chains * m < self.nfe - reserved(self.finish, self.steps):
            fresh = used == 0
            draws, slopes, here = (v.repeat_interleave(m, 1) if m > 1 else v for v in (x, u, step))
            new_x = at.move(draws, slopes, here)
            new_u, new_x0 = at.ask(new_x, here + 1)
            reward = at.score(new_x0, here + 1)
            if m > 1:
                first = at.best_of(reward, chains)
                new_x, new_u, new_x0, reward = (at.pick(v, first) for v in (new_x, new_u, new_x0, reward))
            used = used + m
            better = (reward > best) | fresh  # whatever its reward, the first draw is the best so far
            chosen = at.spread(better, x)
            best = torch.where(better, reward, best)
            found = torch.where(better, reward, found)
            found_at = torch.where(better, step + 1, found_at)
            found_x, found_u, found_x0 = (
                torch.where(chosen, new, old) for new, old in ((new_x, found_x), (new_u, found_u), (new_x0, found_x0))
            )
            # A new record is the step's best, too: either way that is gone on from. The record stays what it is.
            moves = ((reward > record) | (used >= quota)) & (step < last)
            record = torch.maximum(record, reward)
            x, u = (torch.where(at.spread(moves, x), new, old) for new, old in ((found_x, x), (found_u, u)))
            left = torch.where(moves, quota - used, 0)
            quota = torch.where(moves, self.quota + left, quota)
            granted, rolled = granted + torch.where(moves, quota, 0), rolled + left
            used, step = torch.where(moves, 0, used), step + moves
            best = torch.where(moves, -torch.inf, best)
            spent.append(at.spent)
            records.append(record)
            steps.append(step)
        trace = SearchTrace(spent, torch.stack(records, 2), torch.stack(steps, 2), granted, rolled)
        return at.finished(self.finish, found_x, found_x0, found, found_at, self.steps, trace)
