"""What a comparison found on all its tasks: the answer, the table, the data."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from polyak.lab import words
from polyak.lab.compare.answer import Said, TaskComparison
from polyak.lab.compare.rows import Estimate, Setup
from polyak.lab.result import plain

if TYPE_CHECKING:
    import pandas

SCHEMA = 2


@dataclass(frozen=True, kw_only=True)
class Found:
    """What was found on all tasks."""

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
        head = f"{self._advice(base)}: against {base} at {self.setup.budget.equal}, of {len(self.tasks)} tasks {first}"
        return Said(head, tuple(others), self.tasks[0].too_few)

    def _advice(self, base: str) -> str:
        """Which arm to use on tasks like these: the one that wins most, if it loses on none; else the baseline, or it depends."""
        labels = {arm.name: arm.label for arm in self.tasks[0].claim.arms}
        won: dict[str, int] = {}
        for arm in self.setup.arms[1:]:
            verdicts = [c.verdict for t in self.tasks if (c := t.criterion(arm.text))]
            if "holds" in verdicts:
                won[labels[arm.text]] = 0 if "fails" in verdicts else verdicts.count("holds")
        if not any(won.values()):
            return "Choose by task" if won else f"Keep {base}"
        return f"Use {max(won, key=lambda label: won[label])}"

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
                plain = {k: v for k, v in asdict(row).items() if k not in _APART}
                plain |= {
                    f"{name}{end}": value
                    for name, e in (("spent_ratio", row.spent_ratio), ("seconds_ratio", row.seconds_ratio))
                    for end, value in _ends(e)
                }
                compared = {
                    "difference": d.estimate if d else None,
                    "low": d.low if d else None,
                    "high": d.high if d else None,
                    "improvement": d.improvement if d else None,
                    "improvement_low": row.chance[0] if row.chance else None,
                    "improvement_high": row.chance[1] if row.chance else None,
                    "p_value": d.p_value if d else None,
                    "p_adjusted": d.adjusted if d else None,
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


_VERDICTS = {"holds": "wins", "fails": "loses", "undecided": "is undecided on"}
_APART = ("difference", "point", "chance", "spent_ratio", "seconds_ratio")
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


def _ends(e: Estimate | None) -> Iterable[tuple[str, float | None]]:
    yield "", e.value if e else None
    yield "_low", e.low if e else None
    yield "_high", e.high if e else None
