"""What all searches do: draw, ask the model, step, score, and end with the best."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from polyak.core import checks
from polyak.generate.evaluate import HALF, Evaluator
from polyak.generate.prediction import Denoiser
from polyak.generate.process import Process, standard_normal
from polyak.generate.rbf.solver import FlowSDE
from polyak.generate.rewards import REWARD, Scorer, warn_of_nan, without_nan
from polyak.generate.solver import Query

Finish = Literal["x0hat", "ode"]

PROCESS = checks.Instance(Process, words="a Process of Gaussian noise (an instance, not the class)")
MODEL = checks.Function("a Denoiser, or a network (x, label) -> velocity", 2)
SAMPLE = dict(
    model=MODEL, process=PROCESS, shape=checks.Each(checks.Integer(1)), batch=checks.Integer(1),
    dtype=checks.dtype | None, device=checks.device | None,
)  # fmt: skip
KINDS: dict[str, checks.Kind] = dict(
    reward=REWARD, nfe=checks.Integer(1), steps=checks.Integer(2, 100_000), chains=checks.Integer(1), init=checks.Integer(1),
    candidates=checks.Integer(1) | None, block=checks.Integer(1), finish=checks.Choice("x0hat", "ode"),
    generator=checks.generator | None, lookahead=checks.Integer(1), solver=checks.Instance(FlowSDE, words="a FlowSDE"),
)  # fmt: skip


def kinds(names: str) -> dict[str, checks.Kind]:
    return {name: KINDS[name] for name in names.split()}


@checks.arguments(
    nfe=checks.Each(checks.Integer(0)), best=checks.tensor, step=checks.tensor, granted=checks.tensor | None,
    rolled=checks.tensor | None,
)  # fmt: skip
@dataclass(frozen=True, eq=False)
class SearchTrace:
    """How a search went, at each of its K decisions.

    Attributes:
        nfe: calls of the network for each system so far, K numbers.
        best: (batch, chains, K), each chain's best reward so far, float64.
        step: (batch, chains, K), each chain's step after the decision, int64.
        granted: (batch, chains), calls that a chain's steps were granted in all; rollover budget forcing alone.
        rolled: (batch, chains), how many of these had been left over at an earlier step.
    """

    nfe: list[int]
    best: Tensor
    step: Tensor
    granted: Tensor | None = None
    rolled: Tensor | None = None


@checks.arguments(
    x=checks.tensor,
    reward=checks.tensor,
    nfe=checks.Integer(0),
    trace=checks.Instance(SearchTrace, words="a SearchTrace"),
)
@dataclass(frozen=True, eq=False)
class SearchResult:
    """What a search found.

    Attributes:
        x: (batch, *shape), a sample for each system.
        reward: (batch,), theirs, float64.
        nfe: calls of the network for each system.
        trace: how it went.
    """

    x: Tensor
    reward: Tensor
    nfe: int
    trace: SearchTrace


class Ground:
    """A search in progress: the model on its times, and what was spent. States are (batch, m, *shape), m of each system."""

    def __init__(
        self,
        search: Any,
        model: Any,
        process: Process,
        shape: Sequence[int],
        batch: int,
        dtype: torch.dtype | None,
        device: torch.device | str | None,
        solver: FlowSDE,
        steps: int,
    ) -> None:
        own = getattr(model, "process", process)
        if own != process:
            raise ValueError(
                f"process must be the model's own, {own!r}, got {process!r}: convert(model, ...) moves it there"
            )
        if not process.is_gaussian:
            raise ValueError(f"process must have Gaussian noise, which {process!r} has not")
        denoiser = model if isinstance(model, Denoiser) else Denoiser(model, process, "flow")
        reward, generator = search.reward, search.generator
        self.score_of = reward if isinstance(reward, Scorer) else Scorer(reward)
        self.process, self.shape, self.batch, self.generator = process, tuple(shape), batch, generator
        at = process.moments(process.check_times(solver.times(process, steps=steps)))
        stages = solver.table(at, process)
        first = process.prior((0,), generator=generator, dtype=dtype, device=device)
        self.dtype, self.device = first.dtype, first.device
        self.state_dtype = torch.float32 if first.dtype in HALF else first.dtype
        self.at, self.spent = at, 0
        self.evaluate = Evaluator(denoiser, dtype=self.dtype)
        self.times = self._table([float(t) for t in at])
        self._numbers = [(s.base, s.value, s.std) for s in stages]
        self._weights = [self._table(column).to(self.state_dtype) for column in zip(*self._numbers, strict=True)]
        self._rows = torch.arange(batch, device=self.device)[:, None]
        self._missing = torch.zeros((), dtype=torch.int64, device=self.device)

    def _table(self, numbers: Sequence[float]) -> Tensor:
        return torch.tensor(numbers, dtype=torch.float64, device=self.device)

    def noise(self, m: int) -> Tensor:
        shape = (self.batch, m, *self.shape)
        return standard_normal(shape, generator=self.generator, dtype=self.state_dtype, device=self.device)

    def start(self, m: int) -> Tensor:
        return self.noise(m) * self.process.prior_std

    def ask(self, x: Tensor, at: int | Tensor) -> tuple[Tensor, Tensor]:
        """The velocity and the predicted data at x, at the time of an index, or of one for each (batch, m)."""
        return self.ask_at(x, self.at[at] if isinstance(at, int) else self.times[at])

    def ask_at(self, x: Tensor, t: Any) -> tuple[Tensor, Tensor]:
        self.spent += x.shape[1]
        told = t.flatten() if isinstance(t, Tensor) else t
        said = self.evaluate(Query(x.flatten(0, 1), told))
        return said.flow.view_as(x), said.x0.view_as(x)

    def move(self, x: Tensor, u: Tensor, at: int | Tensor) -> Tensor:
        """One stochastic step from the time of an index, or of one for each (batch, m), to the next."""
        if isinstance(at, int):
            base, value, std = self._numbers[at]
            moved = torch.add(base * x, u, alpha=value)
            return moved if std == 0 else moved.add_(self.noise(x.shape[1]), alpha=std)
        base, value, std = (self.spread(w[at], x) for w in self._weights)
        return base * x + value * u + std * self.noise(x.shape[1])

    def score(self, x0: Tensor, at: int | Tensor, last: bool = False) -> Tensor:
        """The rewards of (batch, m, *shape), (batch, m); NaN is -inf."""
        t: Any = float(self.at[at]) if isinstance(at, int) else self.times[at]
        step = at if isinstance(at, int) else 0
        found = self.score_of(x0.flatten(0, 1).to(self.dtype), x0.shape[1], step=step, t=t, last=last)
        found, missing = without_nan(found)
        self._missing = self._missing + missing
        return found

    def pick(self, values: Tensor, index: Tensor) -> Tensor:
        """Of (batch, m, ...) those at (batch, n)."""
        return values[self._rows, index]

    def best_of(self, reward: Tensor, groups: int) -> Tensor:
        """The place, among all (batch, groups * k), of the best of each group: (batch, groups)."""
        k = reward.shape[1] // groups
        inside = reward.view(self.batch, groups, k).argmax(2)
        return inside + k * torch.arange(groups, device=self.device)

    @staticmethod
    def spread(numbers: Tensor, x: Tensor) -> Tensor:
        """(batch, m) made to stand beside (batch, m, *shape)."""
        return numbers.view(*numbers.shape, *[1] * (x.ndim - numbers.ndim))

    def finished(
        self, finish: Finish, x: Tensor, x0: Tensor, reward: Tensor, at: int | Tensor, steps: int, trace: SearchTrace
    ) -> SearchResult:
        """The best of all chains, (batch, m, *shape) at the times of ``at``; its predicted data, or where the ODE takes it."""
        best = self.best_of(reward, 1)
        x, x0, reward = self.pick(x, best), self.pick(x0, best), self.pick(reward, best)
        if finish == "ode":
            time = self.times[torch.full_like(best, at) if isinstance(at, int) else self.pick(at, best)]
            x0 = self._integrated(x, x0, time, steps)
            reward = self.score(x0, len(self.at) - 1, last=True)
        warn_of_nan(self._missing, "they count as -inf")
        return SearchResult(x0[:, 0].to(self.dtype), reward[:, 0], self.spent, trace)

    def _integrated(self, x: Tensor, x0: Tensor, time: Tensor, steps: int) -> Tensor:
        """DDIM from times (batch, 1), in equal steps to clean data; the first prediction is known."""
        process = self.process
        end = 0.0 if process.ends_clean(0.0) else process.t_min
        for i in range(steps):
            s, t = ((time + (end - time) * (j / steps)) for j in (i, i + 1))
            s, t = s.clamp(min=process.t_min), t if i == steps - 1 else t.clamp(min=process.t_min)
            if i:
                _, x0 = self.ask_at(x, s)
            alpha_s, sigma_s, alpha, sigma = (
                self.spread(f(r), x).to(x.dtype) for r in (s, t) for f in (process.alpha, process.sigma)
            )
            x = alpha * x0 + sigma / sigma_s * (x - alpha_s * x0)
        return x


def reserved(finish: Finish, steps: int) -> int:
    """The calls that an end by the ODE takes."""
    return steps - 1 if finish == "ode" else 0


def check_budget(name: str, nfe: int, least: int, what: str) -> None:
    if nfe < least:
        raise ValueError(f"nfe must be at least {least} for {name} with {what}, got {nfe}")


def check_stochastic(name: str, solver: FlowSDE) -> None:
    if not solver.stochastic:
        raise ValueError(f"solver must add noise for {name}, all candidates of {solver!r} are alike: norm > 0")


__all__ = ["SearchResult", "SearchTrace"]
