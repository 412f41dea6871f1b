"""What a comparison found: numbers for each arm, and a sentence that says what they mean."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from polyak.lab import words
from polyak.lab.claim import Claim, Metric
from polyak.lab.compare.arms import ArmSpec
from polyak.lab.compare.budget import Budget
from polyak.lab.compare.doubts import doubts
from polyak.lab.compare.task import Facts
from polyak.lab.result import ClaimResult, CriterionResult, TrialResult, plain
from polyak.lab.statistics import LEAST_SEEDS_MEAN

if TYPE_CHECKING:
    import pandas
    from matplotlib.figure import Figure

SCHEMA = 1
MANY = 4  # arms beside the baseline, from which on an answer is a list


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


@dataclass(frozen=True, kw_only=True)
class Row:
    """One arm on one task. Means, medians and counts are over the reported seeds; None where nothing can be said."""

    arm: str
    label: str
    point: Mapping[str, Any]  # what tuning chose
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


@dataclass(frozen=True)
class Said:
    """An answer in its clauses, for where it takes more than a line. As a string it is a sentence.

    Args:
        head: the first clause, with what holds for all.
        rest: the others.
        more: a sentence after it, or nothing.
        aside: the rest only explains the head.
    """

    head: str
    rest: tuple[str, ...] = ()
    more: str = ""
    aside: bool = False

    @property
    def long(self) -> bool:
        """Whether it is of so many arms that a list is easier to read than a sentence."""
        return len(self.rest) + (not self.aside) >= MANY

    @property
    def short(self) -> str:
        """Its head, if it is long, and how much more there is."""
        if not self.long:
            return str(self)
        more = "" if self.aside else f"; {len(self.rest)} more on its page"
        return f"{self.head}{more}."

    def __str__(self) -> str:
        rest = "; ".join(self.rest)
        whole = f"{self.head} ({rest})" if self.aside else "; ".join((self.head, *self.rest))
        return f"{whole}. {self.more}".rstrip()


@dataclass(frozen=True, kw_only=True)
class TaskComparison:
    """What was found on one task."""

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

    def criterion(self, arm: str) -> CriterionResult | None:
        return next((c for c in self.result.criteria if c.name == arm), None)

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
        spent = "steps" if self.facts.kind == "training" else "evaluations"
        reached = [self.reach(t) for t in trials if t.seed in self.targets] or [(math.inf, math.inf)]
        return Row(
            arm=arm,
            label=label,
            point=self.result.chosen[self.name][arm],
            final=_mean(t.values[name] for t in trials),
            best=_mean(self._best(t) for t in trials),
            difference=self.criterion(arm),
            diverged=len(trials) - len(sound),
            seeds=len(trials),
            spent=_median(t.values[spent] for t in sound),
            seconds=_median(t.values["seconds"] for t in sound),
            memory=_median(t.values["memory"] for t in sound),
            spent_to_target=statistics.median(r[0] for r in reached),
            seconds_to_target=statistics.median(r[1] for r in reached),
            reached=sum(math.isfinite(r[1]) for r in reached),
        )

    def _best(self, trial: TrialResult) -> float:
        pick = min if self.main.better == "lower" else max
        return pick([values[self.main.name] for _, values in trial.curve] or [self.main.worst_value])

    def reach(self, trial: TrialResult) -> tuple[float, float]:
        """(steps or evaluations, seconds) of the first measurement that reaches its seed's target; infinite where none does."""
        target = self.targets[trial.seed]
        x = "step" if self.facts.kind == "training" else "evaluations"
        for at, values in trial.curve:
            value = values[self.main.name]
            if value <= target if self.main.better == "lower" else value >= target:
                return at[x], at["seconds"]
        return math.inf, math.inf

    # -- in words --------------------------------------------------------------------------------------------------------

    @property
    def as_points(self) -> bool:
        """Whether the main metric is a share, whose differences are said in points of a hundred."""
        values = [t.values[self.main.name] for t in self.result.trials if self.main.name in t.values and not t.diverged]
        accuracy = "acc" in self.main.name.lower() and self.main.better == "higher"
        return accuracy and all(0 <= v <= 1 for v in values)

    @property
    def answer(self) -> str:
        """Which arm is better than the baseline, by how much, in a sentence."""
        return str(self.said)

    @cached_property
    def said(self) -> Said:
        """The answer in its clauses: better arms, worse ones, and those that are undecided; of the first two the best first."""
        rows, base, equal = self.rows[1:], self.rows[0].label, self.setup.budget.equal
        decided = [r for r in rows if r.difference and r.difference.verdict != "undecided"]
        rest = [r for r in rows if r not in decided]
        if not decided:
            verb = "is" if len(rest) == 1 else "are"
            why = tuple(self._undecided(r, named=len(rest) > 1) for r in rest)
            names = words.listing([r.label for r in rest])
            return Said(f"{names} {verb} undecided against {base} at {equal}", why, self.too_few, aside=True)
        decided.sort(key=self._gain, reverse=True)
        first, *others = [self._decided(r, base) for r in decided]
        others += [f"{r.label} is undecided ({self._undecided(r)})" for r in rest]
        return Said(f"{first} at {equal}", tuple(others), self.too_few)

    def _gain(self, row: Row) -> tuple[bool, float]:
        """By what arms that are decided are ordered: better ones are the larger."""
        d = row.difference
        assert d is not None
        return d.verdict == "holds", -d.estimate if self.main.better == "lower" else d.estimate

    @property
    def too_few(self) -> str:
        """A sentence more where there are too few seeds to decide anything; else nothing."""
        seeds = len(self.result.seeds)
        if seeds >= LEAST_SEEDS_MEAN:
            return ""
        return f"{words.count(seeds, 'seed')} cannot decide anything: at least {LEAST_SEEDS_MEAN} can."

    def _decided(self, row: Row, base: str) -> str:
        d = row.difference
        assert d is not None
        verb = "beats" if d.verdict == "holds" else "loses to"
        if not (math.isfinite(d.low) and math.isfinite(d.high)):
            lost = row.diverged if d.verdict == "fails" else self.rows[0].diverged
            who = row.label if d.verdict == "fails" else base
            return f"{row.label} {verb} {base} ({lost} of {row.seeds} trials of {who} diverged)"
        near, far = sorted((abs(d.low), abs(d.high)))
        return f"{row.label} {verb} {base} by {self._amounts(near, far)}{self._of}"

    def _undecided(self, row: Row, *, named: bool = False) -> str:
        d = row.difference
        assert d is not None
        who = f"{row.label}: " if named else ""
        if row.diverged:
            return f"{who}{row.diverged} of {row.seeds} trials diverged"
        if not (math.isfinite(d.low) and math.isfinite(d.high)):
            if base := self.rows[0].diverged:
                return f"{who}{base} of {row.seeds} trials of {self.rows[0].label} diverged"
            return f"{who}difference {words.number(self._scale * d.estimate, 2)}{self._of}"
        said = f"{who}difference {self._amounts(d.low, d.high)}{self._of}"
        clear = d.low > 0 or d.high < 0
        # The interval alone would decide: say what does not agree with it.
        return f"{said}, but p = {words.number(d.p_value, 2)}" if clear and not self.too_few else said

    def _amounts(self, low: float, high: float) -> str:
        ends = self._scale * low, self._scale * high
        return " to ".join(dict.fromkeys(words.rounded(end, *ends) for end in ends))

    @property
    def _scale(self) -> float:
        return 100.0 if self.as_points else 1.0

    def reached(self, row: Row) -> str:
        """ "3 of 5 seeds" reach the target, where not all do that have one; else nothing."""
        having = len(self.targets)
        return f"{row.reached} of {words.count(having, 'seed')}" if row.reached < having else ""

    @property
    def _of(self) -> str:
        return f" points of {self.main.label}" if self.as_points else f" in {self.main.label}"

    @cached_property
    def warnings(self) -> tuple[str, ...]:
        """What makes the numbers doubtful: too good, or a task that gives itself away."""
        return (*self.facts.warnings, *doubts(self))

    @property
    def notes(self) -> tuple[str, ...]:
        return self.result.notes


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """The result of :func:`polyak.lab.compare`.

    In a notebook it shows itself. :attr:`answer` is a sentence, :meth:`to_pandas` the table, :meth:`figure` a drawing,
    :meth:`save` the page, :meth:`to_json` all data.
    """

    setup: Setup
    tasks: tuple[TaskComparison, ...]

    def task(self, name: str = "") -> TaskComparison:
        """A task's part; of the only one, without its name."""
        if not name and len(self.tasks) == 1:
            return self.tasks[0]
        found = {t.name: t for t in self.tasks}
        if name not in found:
            raise KeyError(f"task {name!r} is unknown; there are {', '.join(found)}")
        return found[name]

    @property
    def answer(self) -> str:
        """What was found, in a sentence or two."""
        return str(self.said)

    @cached_property
    def said(self) -> Said:
        """The answer in its clauses; over several tasks one for each arm, which wins most first."""
        if len(self.tasks) == 1:
            return self.tasks[0].said
        labels = {arm.name: arm.label for arm in self.tasks[0].claim.arms}
        found = []
        for arm in self.setup.arms[1:]:
            verdicts = [c.verdict for t in self.tasks if (c := t.criterion(arm.text))]
            counts = {v: verdicts.count(v) for v in _VERDICTS}
            said = ", ".join(f"{word} {counts[v]}" for v, word in _VERDICTS.items() if counts[v])
            found.append((-counts["holds"], counts["fails"], f"{labels[arm.text]} {said}"))
        first, *others = [said for *_, said in sorted(found, key=lambda f: f[:2])]
        base = labels[self.setup.baseline.text]
        head = f"Against {base} at {self.setup.budget.equal}, of {len(self.tasks)} tasks: {first}"
        return Said(head, tuple(others), self.tasks[0].too_few)

    @property
    def warnings(self) -> tuple[str, ...]:
        several = len(self.tasks) > 1
        return tuple(f"{t.name}: {w}" if several else w for t in self.tasks for w in t.warnings)

    def profiles(self) -> dict[str, list[tuple[float, float]]]:
        """Performance profiles (Dolan and More, 2002) of the seconds to each task's target, by arm.

        Of an arm, points (ratio, share): on what share of tasks it took at most so many times as long as the fastest arm there. The
        median over seeds counts; a task that no arm finishes is left out of none: nobody has a share of it.
        """
        costs = {arm.text: [t.rows[i].seconds_to_target for t in self.tasks] for i, arm in enumerate(self.setup.arms)}
        return profile(costs)

    def to_pandas(self) -> pandas.DataFrame:
        """A row for each task and arm.

        Raises:
            ModuleNotFoundError: pandas is not installed.
        """
        try:
            import pandas
        except ModuleNotFoundError as missing:
            raise ModuleNotFoundError("to_pandas needs pandas: pip install pandas", name="pandas") from missing
        return pandas.DataFrame(self.records())

    def records(self) -> list[dict[str, Any]]:
        """The table as plain dictionaries: a row for each task and arm."""
        found = []
        for t in self.tasks:
            for row in t.rows:
                d = row.difference
                plain = {k: v for k, v in asdict(row).items() if k not in ("difference", "point")}
                compared = {
                    "difference": d.estimate if d else None,
                    "low": d.low if d else None,
                    "high": d.high if d else None,
                    "improvement": d.improvement if d else None,
                    "p_value": d.p_value if d else None,
                    "verdict": _OUTCOMES[d.verdict] if d else "baseline",
                }
                found.append({"task": t.name, "metric": t.main.name, **plain, **compared, **row.point})
        return found

    def to_json(self) -> dict[str, Any]:
        """All data; infinities and NaN become the strings "inf", "-inf", "nan"."""
        return plain(
            {
                "schema": SCHEMA,
                "answer": self.answer,
                "warnings": list(self.warnings),
                "budget": asdict(self.setup.budget),
                "arms": [{**asdict(arm), "label": arm.label} for arm in self.setup.arms],
                "trials": self.setup.trials,
                "table": self.records(),
                "tasks": [{"name": t.name, "answer": t.answer, "result": asdict(t.result)} for t in self.tasks],
            }
        )

    def figure(self, what: str = "curves", task: str = "") -> Figure:
        """A matplotlib figure: "curves" of the main metric, "sensitivity" to the learning rate, or "profiles" over tasks."""
        from polyak.lab.compare import figures

        return figures.figure(self, what, task)

    def save(self, path: Path | str) -> Path:
        """Write the page, one HTML file that opens from disk; its path."""
        from polyak.lab.compare.page import page

        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(page(self), encoding="utf-8")
        return path

    def __repr__(self) -> str:
        """The answer and a row for each arm."""
        lines = [self.answer]
        for t in self.tasks:
            if len(self.tasks) > 1:
                lines.append(f"{t.name}:")
            wide = max(len(row.label) for row in t.rows)
            for row in t.rows:
                said = f"  {row.label:{wide}}  {t.main.label} {words.number(row.final)}"
                if d := row.difference:
                    estimate, interval = words.compared(d)
                    said += f", difference {estimate} (95 %: {interval}), {_OUTCOMES[d.verdict]}"
                else:
                    said += ", baseline"
                lines.append(said)
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        from polyak.lab.compare.page import summary

        return summary(self)


_VERDICTS = {"holds": "wins", "fails": "loses", "undecided": "is undecided on"}
_OUTCOMES = {"holds": "better", "fails": "worse", "undecided": "undecided"}


def profile(costs: Mapping[str, Sequence[float]]) -> dict[str, list[tuple[float, float]]]:
    """Performance profiles from costs by arm, each over the same problems: the steps of each arm's curve, from ratio 1 on."""
    problems = list(zip(*costs.values(), strict=True))
    found = {}
    for arm, own in costs.items():
        # What costs another nothing is no multiple of it: beside that, a cost is as good as none.
        ratios = sorted(
            1.0 if cost == min(all_) else cost / min(all_)
            for cost, all_ in zip(own, problems, strict=True)
            if math.isfinite(cost) and (min(all_) or not cost)
        )
        steps = [
            (r, (i + 1) / len(problems)) for i, r in enumerate(ratios) if i + 1 == len(ratios) or ratios[i + 1] > r
        ]
        found[arm] = steps if steps and steps[0][0] == 1.0 else [(1.0, 0.0), *steps]
    return found


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


def _mean(values: Iterable[float]) -> float:
    found = list(values)
    return sum(found) / len(found)


def _median(values: Iterable[float]) -> float | None:
    found = list(values)
    return statistics.median(found) if found else None
