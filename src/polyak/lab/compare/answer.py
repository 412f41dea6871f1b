"""What a comparison found on one task, in a sentence."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

from polyak.lab import words
from polyak.lab.compare.doubts import doubts
from polyak.lab.compare.rows import Row, TaskRows
from polyak.lab.statistics import LEAST_SEEDS, LEVEL

MANY = 4  # arms beside the baseline, from which on an answer is a list


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
class TaskComparison(TaskRows):
    """What was found on one task."""

    @property
    def as_points(self) -> bool:
        """Whether the main metric is a share, whose differences are said in points of a hundred."""
        values = [t.values[self.main.name] for t in self.result.trials if self.main.name in t.values and not t.diverged]
        accuracy = "acc" in self.main.name.lower() and self.main.better == "higher"
        return accuracy and all(0 <= v <= 1 for v in values)

    @property
    def answer(self) -> str:
        """Which arm to use, which are better than the baseline, and by how much, in a sentence."""
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
            head = f"{self.advice}: {names} {verb} undecided against {base} at {equal}"
            return Said(head, why, self.too_few, aside=True)
        decided.sort(key=self._gain, reverse=True)
        first, *others = [self._decided(r, base) for r in decided]
        others += [f"{r.label} is undecided ({self._undecided(r)})" for r in rest]
        return Said(f"{self.advice}: {first} at {equal}", tuple(others), self.too_few)

    @property
    def advice(self) -> str:
        """Which arm to use: the best of those that are better than the baseline, else that."""
        better = [row for row in self.rows[1:] if row.difference and row.difference.verdict == "holds"]
        if better:
            return f"Use {max(better, key=self._gain).label}"
        base = self.rows[0]
        return "Use none of these" if base.diverged == base.seeds else f"Keep {base.label}"

    def _gain(self, row: Row) -> tuple[bool, float]:
        """By what arms that are decided are ordered: better ones are the larger."""
        d = row.difference
        assert d is not None
        return d.verdict == "holds", -d.estimate if self.main.better == "lower" else d.estimate

    @property
    def too_few(self) -> str:
        """A sentence more where there are too few seeds to decide anything; else nothing."""
        seeds = len(self.result.seeds)
        if seeds >= LEAST_SEEDS:
            return ""
        return f"{words.count(seeds, 'seed')} cannot decide anything: at least {LEAST_SEEDS} can."

    def _decided(self, row: Row, base: str) -> str:
        d = row.difference
        assert d is not None
        verb = "beats" if d.verdict == "holds" else "loses to"
        if not (math.isfinite(d.low) and math.isfinite(d.high)):
            lost = row.diverged if d.verdict == "fails" else self.rows[0].diverged
            who = row.label if d.verdict == "fails" else base
            return f"{row.label} {verb} {base} ({lost} of {row.seeds} trials of {who} diverged)"
        near, far = sorted((abs(d.low), abs(d.high)))
        return f"{row.label} {verb} {base} by {self._amounts(near, far)}{self._of}{self._work(row)}"

    def _work(self, row: Row) -> str:
        """How many times the gradients an arm took, where steps are what is equal."""
        times = self.gradients(row) / self.gradients(self.rows[0])
        uneven = self.unit == "steps" and self.setup.budget.unit == "steps" and abs(times - 1) > 0.005
        return f" with {words.number(times, 2)} times the gradients" if uneven else ""

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
        if not clear or self.too_few:
            return said
        # The interval, which is of this arm alone, would decide.
        if d.p_value > LEVEL:
            return f"{said}, the same with all {words.count(row.seeds, 'seed')}, which are too few to tell"
        return f"{said}, but with so many arms p = {words.number(d.adjusted, 2)}"

    def _amounts(self, low: float, high: float) -> str:
        ends = self._scale * low, self._scale * high
        return " to ".join(dict.fromkeys(words.rounded(end, *ends) for end in ends))

    @property
    def _scale(self) -> float:
        return 100.0 if self.as_points else 1.0

    @property
    def _of(self) -> str:
        return f" points of {self.main.label}" if self.as_points else f" in {self.main.label}"

    @cached_property
    def warnings(self) -> tuple[str, ...]:
        """What makes the numbers doubtful: too good, or a task that gives itself away."""
        return (*self.facts.warnings, *doubts(self))
