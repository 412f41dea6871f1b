"""What a comparison found on one task, in numbers: a row for each arm, with intervals of all that is compared."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from polyak.lab import intervals, words
from polyak.lab.claim import Claim, Metric
from polyak.lab.compare.budget import Budget
from polyak.lab.compare.spec import ArmSpec
from polyak.lab.compare.task import Facts
from polyak.lab.result import ClaimResult, CriterionResult, TrialResult
from polyak.lab.tuning import FIRST_TUNING_SEED


@dataclass(frozen=True, kw_only=True)
class Setup:
    """How all tasks were compared."""

    budget: Budget
    arms: tuple[ArmSpec, ...]  # the baseline first
    trials: int
    points: int
    target: float | None
    jobs: int | None  # trials at once; None: as many as there are cores
    seeds: int
    device: str  # its kind
    versions: Mapping[str, str]  # of python and the libraries

    @property
    def alone(self) -> bool:
        """Whether trials ran one at a time."""
        return self.jobs == 1

    @property
    def baseline(self) -> ArmSpec:
        return self.arms[0]


@dataclass(frozen=True)
class Estimate:
    """A figure with its 95 % interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True)
class Row:
    """One arm on one task. Means, medians and counts are over the reported seeds; None where nothing can be said."""

    arm: str
    label: str
    point: Mapping[str, Any]  # what tuning chose: of each option the middle one of the seeds' values
    final: float  # mean of the main metric at the end, a diverged seed at its worst
    best: float  # mean of its best value on the way
    difference: CriterionResult | None  # to the baseline, seed by seed; None for the baseline itself
    diverged: int
    seeds: int
    spent: float | None  # steps, or evaluations, of a trial: median of those that did not diverge
    seconds: float | None
    memory: float | None  # MB
    spent_to_target: float  # median over the seeds that have a target, infinite unless more than half reach it
    seconds_to_target: float
    reached: int  # seeds that reach it
    chance: tuple[float, float] | None  # the interval of ``difference.improvement``
    spent_ratio: Estimate | None  # to the baseline, of what it costs to get as far as both come; None for the baseline
    seconds_ratio: Estimate | None


@dataclass(frozen=True, kw_only=True)
class TaskRows:
    """What was found on one task, in numbers."""

    name: str
    facts: Facts
    claim: Claim
    result: ClaimResult
    setup: Setup

    @property
    def main(self) -> Metric:
        return self.claim.metric(self.facts.main)

    def trials(self, arm: str, purpose: str = "report") -> list[TrialResult]:
        return [t for t in self.result.trials if t.arm == arm and t.purpose == purpose]

    def tried(self, arm: str, seed: int) -> list[TrialResult]:
        """The tuning trials of a reported seed."""
        return [t for t in self.trials(arm, "tuning") if t.seed == FIRST_TUNING_SEED + seed]

    def points(self, arm: str) -> Sequence[Mapping[str, Any]]:
        """What tuning chose, by reported seed."""
        return self.result.chosen[self.name][arm]

    def criterion(self, arm: str) -> CriterionResult | None:
        return next((c for c in self.result.criteria if c.name == arm), None)

    @property
    def unit(self) -> str:
        """What costs are counted in, beside time."""
        if self.facts.kind == "sampling":
            return "evaluations"
        return "gradients" if self.setup.budget.unit == "gradients" else "steps"

    def gradients(self, row: Row) -> float:
        """For how many gradients an optimizer asked at a step, in the mean over its trials."""
        trials = [t for t in self.trials(row.arm) if not t.diverged and t.values.get("steps")]
        taken = sum(t.values["steps"] for t in trials)
        return sum(t.values["evaluations"] for t in trials) / taken if taken else 1.0

    @property
    def goal(self) -> str:
        """What arms are timed to, in words: "0.9", or "AdamW's end"."""
        if self.setup.target is not None:
            return words.number(self.setup.target)
        return f"{self.claim.arm(self.setup.baseline.text).label}'s end"

    @cached_property
    def targets(self) -> Mapping[int, float]:
        """By seed the main metric's value that arms are timed to: the one asked for, else where the baseline ends with this seed.

        A seed with which the baseline diverges has none.
        """
        asked = self.setup.target
        base = self.trials(self.setup.baseline.text)
        if asked is not None:
            return dict.fromkeys(self.result.seeds, asked)
        return {t.seed: t.values[self.main.name] for t in base if not t.diverged}

    @cached_property
    def rows(self) -> tuple[Row, ...]:
        return tuple(self._row(arm.name, arm.label) for arm in self.claim.arms)

    def _row(self, arm: str, label: str) -> Row:
        trials = self.trials(arm)
        name, sound = self.main.name, [t for t in trials if not t.diverged]
        spent = "steps" if self.unit == "steps" else "evaluations"
        reached = [self.reach(t, self.targets[t.seed]) for t in trials if t.seed in self.targets]
        reached, d = reached or [(math.inf, math.inf)], self.criterion(arm)
        return Row(
            arm=arm,
            label=label,
            point=words.typical_point(self.points(arm)),
            final=_mean(t.values[name] for t in trials),
            best=_mean(self._best(t) for t in trials),
            difference=d,
            diverged=len(trials) - len(sound),
            seeds=len(trials),
            spent=_median(t.values[spent] for t in sound),
            seconds=_median(t.values["seconds"] for t in sound),
            memory=_median(t.values["memory"] for t in sound),
            spent_to_target=statistics.median(r[0] for r in reached),
            seconds_to_target=statistics.median(r[1] for r in reached),
            reached=sum(math.isfinite(r[1]) for r in reached),
            chance=intervals.share(d.improvement * len(d.per_seed), len(d.per_seed)) if d else None,
            spent_ratio=self._ratio(trials, 0) if d else None,
            seconds_ratio=self._ratio(trials, 1) if d else None,
        )

    def _ratio(self, trials: Sequence[TrialResult], what: int) -> Estimate | None:
        """What it costs (0: steps or evaluations, 1: seconds) to get as far as both come, over what it costs the baseline.

        With one seed both are timed to the worse one of their two ends, or to the target that was asked for: to the baseline's own
        end a second run of the baseline itself would come later than the first, if at all.
        """
        pick, logs = max if self.main.better == "lower" else min, []
        for own, base in zip(trials, self.trials(self.setup.baseline.text), strict=True):
            ends = [t.values[self.main.name] for t in (own, base) if not t.diverged]
            asked = self.setup.target
            target = asked if asked is not None else pick(ends) if len(ends) == 2 else None
            if target is None:
                logs.append(0.0 if not ends else math.copysign(math.inf, 1.0 if own.diverged else -1.0))
                continue
            cost, other = (self.reach(t, target)[what] for t in (own, base))
            if (cost == 0) != (other == 0):
                return None  # what costs nothing has no ratio
            logs.append(0.0 if cost == other else math.log(cost) - math.log(other))
        found = intervals.mean(logs)
        return Estimate(*(_exp(float(v)) for v in (found.mean, found.low, found.high)))

    def _best(self, trial: TrialResult) -> float:
        pick = min if self.main.better == "lower" else max
        return pick([values[self.main.name] for _, values in trial.curve] or [self.main.worst_value])

    def reach(self, trial: TrialResult, target: float) -> tuple[float, float]:
        """(steps or evaluations, seconds) of the first measurement that is as good as this; infinite where none is."""
        x = {"gradients": "gradients"}.get(self.setup.budget.unit, "step")
        x = "evaluations" if self.facts.kind == "sampling" else x
        for at, values in trial.curve:
            value = values[self.main.name]
            if value <= target if self.main.better == "lower" else value >= target:
                return at[x], at["seconds"]
        return math.inf, math.inf

    def reached(self, row: Row) -> str:
        """ "3 of 5 seeds" reach the target, where not all do that have one; else nothing."""
        having = len(self.targets)
        return f"{row.reached} of {words.count(having, 'seed')}" if row.reached < having else ""

    @property
    def notes(self) -> tuple[str, ...]:
        return self.result.notes


def regular(result: ClaimResult) -> ClaimResult:
    """The result with the same places in every trial of an arm, where they differ: medians over seeds, at each part of the budget.

    Seeds take different times for one step, or different steps in one time; a curve over seeds needs places that they share.
    """
    places: dict[tuple[str, float, str], list[float]] = {}
    for trial in result.trials:
        for at, _ in trial.curve:
            for name, value in at.items():
                if trial.purpose == "report":
                    places.setdefault((trial.arm, at["used"], name), []).append(value)
    medians = {key: statistics.median(values) for key, values in places.items()}
    trials = []
    for trial in result.trials:
        if trial.purpose == "report":
            curve = tuple(({n: medians[trial.arm, at["used"], n] for n in at}, values) for at, values in trial.curve)
            trials.append(replace(trial, curve=curve))
    return replace(result, trials=tuple(trials))


def _exp(number: float) -> float:
    return math.exp(min(number, 700.0)) if number < math.inf else math.inf


def _mean(values: Iterable[float]) -> float:
    found = list(values)
    return sum(found) / len(found)


def _median(values: Iterable[float]) -> float | None:
    found = list(values)
    return statistics.median(found) if found else None
