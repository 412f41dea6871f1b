"""Tuning: the same number of trials for every arm, on one seed that is never reported, by Optuna's ask and tell.

An arm's first trials are a grid of its learning rate over its whole range (all else at its centre), which also gives the curve of
its sensitivity; one or two are the middle of the range, or of its halves. While the best rate is at an end of the range, the next
trial goes one step of the grid beyond, whichever arm it is. The rest are asked of a tree-structured Parzen estimator, one after
the other, and may be stopped early by the median rule: a trial that is worse, at a point of its budget, than the median of the
earlier ones was there. The grid runs to its end. What is asked follows from what was told alone, in order, so that a run that was
interrupted asks the same again.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

from polyak.lab.claim import Claim
from polyak.lab.compare.arms import ArmSpec, Range
from polyak.lab.result import TrialResult
from polyak.lab.store import Planned, Stored
from polyak.lab.tuning import Key, Plan
from polyak.lab.workers import STOPPED

if TYPE_CHECKING:
    import optuna

MEASURE = "validation"  # what tuning trials yield
_GRID = 0.6  # of an arm's tuning trials
_PATIENCE = 0.3  # of the budget: none is stopped before


class Search:
    """An arm's tuning on a task.

    Args:
        space: what is tuned.
        trials: how many there are.
        better: whether lower or higher values are.
        points: how often a trial is measured on the way.
    """

    def __init__(
        self, space: Mapping[str, Range], trials: int, better: Literal["lower", "higher"], points: int
    ) -> None:
        import optuna

        self.trials, self._points = trials, points
        self.grid = trials if trials <= 3 else math.ceil(_GRID * trials)
        self.space = dict(space)
        self._first = next(iter(space))
        self._points_asked: list[dict[str, Any]] = []
        first = space[self._first]
        self._step = (first.high / first.low) ** (1 / max(self.grid - 1, 1)) if first.log else 1.0
        with _quietly():
            self._study = optuna.create_study(
                direction="minimize" if better == "lower" else "maximize",
                sampler=optuna.samplers.TPESampler(seed=0, multivariate=True, n_startup_trials=self.grid),
                pruner=optuna.pruners.MedianPruner(
                    n_startup_trials=self.grid, n_warmup_steps=round(_PATIENCE * points)
                ),
            )
        self._asked: list[optuna.trial.Trial] = []
        self._told = 0

    def ask(self) -> list[dict[str, Any]]:
        """The points to try next, once all that were asked before are told: the whole grid at first, then one at a time."""
        if self._told < len(self._asked) or len(self._asked) == self.trials:
            return []
        if not self._asked:
            return [self._next(point) for point in self._grid()]
        return [self._next(self._beyond())]

    def _grid(self) -> list[dict[str, Any]]:
        centre, first = {name: r.centre for name, r in self.space.items()}, self.space[self._first]
        return [{**centre, self._first: first.at(part)} for part in _parts(self.grid, first.whole)]

    def _beyond(self) -> dict[str, Any] | None:
        """The point one step outside of the range, where the best one is at its end; the range then reaches there."""
        r, best = self.space[self._first], self._points_asked[self.best]
        if not (r.open and r.log and self.grid > 2):
            return None
        step = self._step
        if best[self._first] > r.high / math.sqrt(step):
            value = r.high * step
            self.space[self._first] = replace(r, high=value)
        elif best[self._first] < r.low * math.sqrt(step):
            value = r.low / step
            self.space[self._first] = replace(r, low=value)
        else:
            return None
        return {**best, self._first: value}

    def _next(self, point: Mapping[str, Any] | None) -> dict[str, Any]:
        with _quietly():
            if point is not None:
                self._study.enqueue_trial(dict(point))
            trial = self._study.ask({name: _distribution(r) for name, r in self.space.items()})
        self._asked.append(trial)
        # Short numbers read well, and are the same however they were come by.
        self._points_asked.append(
            {n: float(f"{v:.4g}") if isinstance(v, float) else v for n, v in trial.params.items()}
        )
        return self._points_asked[-1]

    def heard(self, number: int, used: float, value: float) -> bool:
        """Take in a value on the way. Whether the trial should go on."""
        trial = self._asked[number]
        with _quietly():
            trial.report(value, round(used * self._points))
        return number < self.grid or not trial.should_prune()

    def tell(self, number: int, value: float, *, stopped: bool) -> None:
        """A trial's end; trials are told in the order that they were asked in."""
        import optuna

        with _quietly():
            if stopped:
                self._study.tell(self._asked[number], state=optuna.trial.TrialState.PRUNED)
            else:
                self._study.tell(self._asked[number], value)
        self._told += 1

    @property
    def best(self) -> int:
        """The number of the best trial that ran to its end, the first of equals."""
        return self._study.best_trial.number


def _parts(count: int, whole: bool) -> list[float]:
    """Where in its range the grid's values are, from 0 (low) to 1 (high)."""
    # Of whole numbers there may be so few that two which are not the ends are one.
    if count > 2 or (count == 2 and whole):
        return [i / (count - 1) for i in range(count)]
    # Middles of equal parts: the farthest that any value of the range can be from one that is tried is then least.
    return [(i + 0.5) / count for i in range(count)]


def _distribution(r: Range) -> optuna.distributions.BaseDistribution:
    import optuna

    if r.whole:
        return optuna.distributions.IntDistribution(int(r.low), int(r.high))
    return optuna.distributions.FloatDistribution(r.low, r.high, log=r.log)


@contextmanager
def _quietly() -> Iterator[None]:
    import optuna

    level = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)  # a study says at once that it was made
    try:
        with warnings.catch_warnings():
            # Of what is told twice (a trial that began anew, or is replayed) the first counts, without a word.
            warnings.simplefilter("ignore")
            yield
    finally:
        optuna.logging.set_verbosity(level)


class ComparisonPlan(Plan):
    """All trials of a comparison on one task. Which points are tuned with follows from results as they come.

    Args:
        claim: the comparison as an experiment: one task, its arms, metrics and criteria.
        options: what a trial is given beside its point, by arm and purpose.
        specs: the arms, by name.
        trials: how many tuning trials every arm gets that has something to tune.
        points: how often a tuning trial is measured on the way.
        fingerprints: of the code that decides an arm's results.
    """

    def __init__(
        self,
        claim: Claim,
        *,
        seeds: int,
        device: str,
        versions: Mapping[str, str],
        options: Callable[[str, str], Mapping[str, Any]],
        specs: Mapping[str, ArmSpec],
        trials: int,
        points: int,
        fingerprints: Mapping[str, str],
    ) -> None:
        self._options, self._fingerprints, self.specs = options, fingerprints, specs
        super().__init__(claim, scale=claim.scales[0].name, seeds=seeds, device=device, versions=versions)
        self.trials = trials
        better = claim.metric(MEASURE).better
        self._searches = {
            key: Search(specs[key[1]].space, trials, better, points) for key in self._arms if specs[key[1]].space
        }
        self._asked: dict[Key, list[Planned]] = {key: [] for key in self._searches}
        self._told: dict[Key, int] = dict.fromkeys(self._searches, 0)
        self._places: dict[str, tuple[Key, int]] = {}  # by digest: whose tuning trial it is, and which
        for key in self._searches:
            del self.chosen[key]
            self._ask(key)

    def _trial(self, key: Key, purpose: Literal["tuning", "report"], point: Mapping[str, Any], seed: int) -> Planned:
        trial = super()._trial(key, purpose, point, seed)
        arm = key[1]
        return replace(
            trial,
            options={**self._options(arm, purpose), "tuned": sorted(point), **point},
            versions={**self.versions, "fingerprint": self._fingerprints[arm]},
        )

    def _ask(self, key: Key) -> list[Planned]:
        asked = self._asked[key]
        new = []
        for point in self._searches[key].ask():
            trial = self._trial(key, "tuning", point, self.tuning_seeds[0])
            # Numbered, so that a point which is asked for twice is two trials.
            new.append(replace(trial, options={**trial.options, "number": len(asked) + len(new)}))
        for trial in new:
            self._places[trial.digest] = (key, len(asked))
            asked.append(trial)
        return new

    def libraries(self) -> tuple[str, ...]:
        return ("numpy", "torch")

    @property
    def tunes(self) -> bool:
        return bool(self._searches)

    @property
    def total(self) -> int:
        return len(self._searches) * self.trials + len(self._arms) * len(self.seeds)

    def known(self) -> Iterator[Planned]:
        for asked in self._asked.values():
            yield from asked
        for key in self._arms:
            if key in self.chosen:
                yield from self.reported(key)

    def asks(self, trial: Planned) -> bool:
        if trial.digest not in self._places:
            return False
        key, number = self._places[trial.digest]
        return number >= self._searches[key].grid

    def heard(self, trial: Planned, at: Mapping[str, float], values: Mapping[str, float]) -> bool:
        key, number = self._places[trial.digest]
        return self._searches[key].heard(number, at["used"], values[MEASURE])

    def add(self, trial: Planned, stored: Stored) -> list[Planned]:
        self.found[trial.digest] = stored
        if trial.digest not in self._places:
            return []
        key, _ = self._places[trial.digest]
        search, asked = self._searches[key], self._asked[key]
        while self._told[key] < len(asked) and asked[self._told[key]].digest in self.found:
            number = self._told[key]
            result = self.found[asked[number].digest].result
            # Of a trial that was stored before, or of the grid, nothing has been heard on the way.
            for at, values in result.curve:
                search.heard(number, at["used"], values[MEASURE])
            search.tell(number, result.values[MEASURE], stopped=stopped(result))
            self._told[key] += 1
        if self._told[key] < self.trials:
            return self._ask(key)
        self._choose(key)
        return self.reported(key)

    def _choose(self, key: Key) -> None:
        best = self._asked[key][self._searches[key].best]
        self.chosen[key] = dict(best.point)


def stopped(trial: TrialResult) -> bool:
    """Whether a tuning trial was stopped early."""
    return trial.message.startswith(STOPPED)
