"""Tuning: for every reported seed anew, the same number of trials for every arm, on a seed that is never reported.

An arm's first trials are a grid of its learning rate over its whole range (all else at its centre), which also gives the curve of
its sensitivity. Where the grid begins follows from the seed and the task, so that what it happens to miss is noise between seeds,
and no lasting gain or loss of one arm. One or two trials are the middle of the range, or of its halves. While the best rate is the
largest or smallest that was tried, the next trial goes one step of the grid beyond, whichever arm it is. Where nothing but this
rate is tuned, the rest halve the wider gap beside the best one: what is found then does not depend on where in its range the
best rate is, which would be a lasting gain of one arm. Where there is more to tune, the rest are asked of a tree-structured Parzen
estimator. They come one after the other, and may be stopped early by the median rule: a trial that is worse, at a point of its
budget, than the median of the earlier ones was there. The grid runs to its end. What is asked follows from what was told alone, in
order, so that a run that was interrupted asks the same again.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

from polyak.lab.claim import Claim
from polyak.lab.compare import generators
from polyak.lab.compare.spec import ArmSpec, Range
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
        seed: of all that is random of the search, 32 bits.
    """

    def __init__(
        self, space: Mapping[str, Range], trials: int, better: Literal["lower", "higher"], points: int, seed: int = 0
    ) -> None:
        self.trials, self._points, self._seed = trials, points, seed
        self._direction: Literal["minimize", "maximize"] = "minimize" if better == "lower" else "maximize"
        self.grid = trials if trials <= 3 else math.ceil(_GRID * trials)
        self.space = dict(space)
        self._first = next(iter(space))
        first = space[self._first]
        self._step = (first.high / first.low) ** (1 / self.grid) if first.log else 1.0
        self._start = seed / 2**32
        self._points_asked: list[dict[str, Any]] = []
        self._heard: list[dict[int, float]] = []  # by trial: values by the point of its budget
        self._values: list[float | None] = []  # of the trials that were told; None: stopped early
        self._asked: dict[int, optuna.trial.Trial] = {}  # those after the grid

    @cached_property
    def _study(self) -> optuna.Study:
        """The grid's trials, for what comes after: most searches of a simulation need none."""
        import optuna

        with _quietly():
            study = optuna.create_study(
                direction=self._direction,
                sampler=optuna.samplers.TPESampler(seed=self._seed, multivariate=True, n_startup_trials=self.grid),
                pruner=optuna.pruners.MedianPruner(
                    n_startup_trials=self.grid, n_warmup_steps=round(_PATIENCE * self._points)
                ),
            )
            space = {name: _distribution(r) for name, r in self.space.items()}
            for point, value, heard in zip(self._points_asked, self._values, self._heard, strict=True):
                # Short numbers may be a little outside of a range that they are the ends of.
                inside = {n: min(max(point[n], r.low), r.high) for n, r in self.space.items()}
                study.add_trial(
                    optuna.trial.create_trial(
                        params=inside, distributions=space, value=value, intermediate_values=heard
                    )
                )
        return study

    def ask(self) -> list[dict[str, Any]]:
        """The points to try next, once all that were asked before are told: the whole grid at first, then one at a time."""
        asked = len(self._points_asked)
        if len(self._values) < asked or asked == self.trials:
            return []
        if not asked:
            for point in self._grid():
                self._note(point)
            return list(self._points_asked)
        return [self._next(self._beyond() or self._between())]

    def _grid(self) -> list[dict[str, Any]]:
        centre, first = {name: r.centre for name, r in self.space.items()}, self.space[self._first]
        return [{**centre, self._first: first.at(part)} for part in parts(self.grid, self._start, first.whole)]

    def _beyond(self) -> dict[str, Any] | None:
        """The point one step beyond the best one, where that is the farthest that was tried; the range then reaches there."""
        r, best = self.space[self._first], self._points_asked[self.best]
        if not (r.open and r.log and self.grid > 2):
            return None
        tried, value = [point[self._first] for point in self._points_asked], best[self._first]
        if value == max(tried):
            value *= self._step
        elif value == min(tried):
            value /= self._step
        else:
            return None
        self.space[self._first] = replace(r, low=min(r.low, value), high=max(r.high, value))
        return {**best, self._first: value}

    def _between(self) -> dict[str, Any] | None:
        """The middle of the wider gap beside the best point, or of the better side's; None where more than one option is tuned."""
        r = self.space[self._first]
        if len(self.space) > 1 or r.whole or self.grid < 2:
            return None
        best = self._points_asked[self.best][self._first]
        scale = math.log if r.log else float
        loss = {"minimize": 1.0, "maximize": -1.0}[self._direction]
        sides = []
        for point, value in zip(self._points_asked, self._values, strict=True):
            other = point[self._first]
            if other != best:
                sides.append((scale(other) - scale(best), math.inf if value is None else loss * value, other))
        nearest = [
            min(side, key=lambda each: abs(each[0]))
            for side in ([each for each in sides if each[0] < 0], [each for each in sides if each[0] > 0])
            if side
        ]
        if not nearest:
            return None
        widest = max(abs(gap) for gap, _, _ in nearest)
        # Gaps are of short numbers: equal ones differ by their rounding.
        _, _, other = min((each for each in nearest if abs(each[0]) > 0.9 * widest), key=lambda each: each[1])
        return {self._first: math.sqrt(best * other) if r.log else (best + other) / 2}

    def _note(self, point: Mapping[str, Any]) -> dict[str, Any]:
        # Short numbers read well, and are the same however they were come by.
        self._points_asked.append({n: float(f"{v:.4g}") if isinstance(v, float) else v for n, v in point.items()})
        self._heard.append({})
        return self._points_asked[-1]

    def _next(self, point: Mapping[str, Any] | None) -> dict[str, Any]:
        study = self._study
        with _quietly():
            if point is not None:
                study.enqueue_trial(dict(point))
            trial = study.ask({name: _distribution(r) for name, r in self.space.items()})
        self._asked[len(self._points_asked)] = trial
        return self._note(trial.params)

    def heard(self, number: int, used: float, value: float) -> bool:
        """Take in a value on the way. Whether the trial should go on."""
        at = round(used * self._points)
        self._heard[number].setdefault(at, value)
        if number < self.grid:
            return True
        with _quietly():
            self._asked[number].report(value, at)
        return not self._asked[number].should_prune()

    def tell(self, number: int, value: float, *, stopped: bool) -> None:
        """A trial's end; trials are told in the order that they were asked in."""
        self._values.append(None if stopped else value)
        if number < self.grid:
            return
        import optuna

        with _quietly():
            if stopped:
                self._study.tell(self._asked[number], state=optuna.trial.TrialState.PRUNED)
            else:
                self._study.tell(self._asked[number], value)

    @property
    def best(self) -> int:
        """The number of the best trial that ran to its end, the first of equals."""
        ended = {number: value for number, value in enumerate(self._values) if value is not None}
        return (min if self._direction == "minimize" else max)(ended, key=ended.__getitem__)


def parts(count: int, start: float, whole: bool = False) -> list[float]:
    """Where in its range the grid's values are, from 0 (low) to 1 (high). ``start``: from 0 to 1, where the first step begins."""
    # Of whole numbers there may be so few that two which are not the ends are one.
    if whole and count > 1:
        return [i / (count - 1) for i in range(count)]
    # Middles of equal parts: the farthest that any value of the range can be from one that is tried is then least.
    return [(i + (start if count > 2 else 0.5)) / count for i in range(count)]


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
        trials: how many tuning trials every arm gets for each seed, if it has something to tune.
        points: how often a tuning trial is measured on the way.
        fingerprints: of the code that decides an arm's results.
        identity: of the task, so that its searches are no other's: one task's luck is not all tasks'.
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
        identity: str,
    ) -> None:
        self.options, self._fingerprints, self.specs = options, fingerprints, specs
        super().__init__(claim, scale=claim.scales[0].name, seeds=seeds, device=device, versions=versions)
        self.trials = trials
        better = claim.metric(MEASURE).better
        luck = {seed: generators.number(f"search {identity}", self._tuning_seeds(seed)[0]) for seed in self.seeds}
        self._searches = {
            (task, arm, seed): Search(specs[arm].space, trials, better, points, luck[seed])
            for task, arm in self._arms
            if specs[arm].space
            for seed in self.seeds
        }
        self._asked: dict[Key, list[Planned]] = {key: [] for key in self._searches}
        self._told: dict[Key, int] = dict.fromkeys(self._searches, 0)
        self._numbers: dict[str, int] = {}  # by digest: which of its search's trials it is
        for key in self._searches:
            del self.chosen[key]
            self._ask(key)

    def _trial(self, key: Key, purpose: Literal["tuning", "report"], point: Mapping[str, Any], seed: int) -> Planned:
        trial = super()._trial(key, purpose, point, seed)
        _, arm, _ = key
        return replace(
            trial,
            options={**self.options(arm, purpose), "tuned": sorted(point), **point},
            versions={**self.versions, "fingerprint": self._fingerprints[arm]},
        )

    def _ask(self, key: Key) -> list[Planned]:
        asked = self._asked[key]
        new = []
        for point in self._searches[key].ask():
            trial = self._trial(key, "tuning", point, self._tuning_seeds(key[2])[0])
            # Numbered, so that a point which is asked for twice is two trials.
            new.append(replace(trial, options={**trial.options, "number": len(asked) + len(new)}))
        for trial in new:
            self._places[trial.digest], self._numbers[trial.digest] = key, len(asked)
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
        yield from self._chosen_ones()

    def asks(self, trial: Planned) -> bool:
        key = self._places.get(trial.digest)
        return key is not None and self._numbers[trial.digest] >= self._searches[key].grid

    def heard(self, trial: Planned, at: Mapping[str, float], values: Mapping[str, float]) -> bool:
        search = self._searches[self._places[trial.digest]]
        return search.heard(self._numbers[trial.digest], at["used"], values[MEASURE])

    def add(self, trial: Planned, stored: Stored) -> list[Planned]:
        self.found[trial.digest] = stored
        if trial.digest not in self._places:
            return []
        key = self._places[trial.digest]
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
        self.chosen[key] = dict(asked[search.best].point)
        return [self.reported(key)]


def stopped(trial: TrialResult) -> bool:
    """Whether a tuning trial was stopped early."""
    return trial.message.startswith(STOPPED)
