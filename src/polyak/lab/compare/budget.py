"""Budgets: how many steps or evaluations, or how much time, each arm may spend."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from polyak.lab import limits, words

Unit = Literal["steps", "gradients", "evaluations", "seconds"]
_NUMBER = re.compile(r"(\d+(?:\.\d*)?|\.\d+)\s*([a-z]+)\s*(/\s*trial)?")
_SECONDS = {"s": 1, "sec": 1, "m": 60, "min": 60, "h": 3600}
_COUNTS: dict[str, Unit] = {
    "step": "steps",
    "steps": "steps",
    "grad": "gradients",
    "grads": "gradients",
    "gradient": "gradients",
    "gradients": "gradients",
    "nfe": "evaluations",
    "evaluation": "evaluations",
    "evaluations": "evaluations",
}
LEAST_DEADLINE_S: dict[Unit, float] = {
    "seconds": 60.0,
    "steps": 1800.0,
    "gradients": 1800.0,
    "evaluations": 1800.0,
}  # of a trial
FORMS = "a time for all (90s, 5m, 1h), a time for each trial (20s/trial), or a count for each trial (500steps, 500grads, 20nfe)"


@dataclass(frozen=True)
class Budget:
    """``amount`` of ``unit`` for each trial; of a time for the whole comparison each trial's share."""

    unit: Unit
    amount: float
    total: float | None = None  # seconds of the whole comparison, where that was given

    @property
    def label(self) -> str:
        """Under which results are stored: what one trial may spend."""
        return f"{self.amount:g} {self.unit}"

    @property
    def words(self) -> str:
        """ "6.7 s of training for each trial (5 min in all)"."""
        if self.unit == "seconds":
            whole = f" ({words.duration(self.total)} for the whole comparison)" if self.total else ""
            return f"{self.amount:g} s for each trial{whole}"
        return f"{words.count(int(self.amount), self.unit.removesuffix('s'))} for each trial"

    @property
    def equal(self) -> str:
        """ "equal time", "equal steps"."""
        return "equal time" if self.unit == "seconds" else f"equal {self.unit}"


def seconds(name: str, text: str) -> float:
    """A time such as 90s, 5m or 1h, in seconds; ValueError for anything else."""
    match = _NUMBER.fullmatch(text.strip().lower())
    if match is None or match[2] not in _SECONDS or match[3] or not float(match[1]):
        raise ValueError(f"{name} must be a time such as 90s, 5m or 1h, got {limits.short(text)!r}")
    return _time(name, match)


def _time(name: str, match: re.Match[str]) -> float:
    """Seconds, of which there are not more than anybody can wait for."""
    found = float(match[1]) * _SECONDS[match[2]]
    if found > limits.MOST_SECONDS:
        raise ValueError(f"{name} must be at most {limits.MOST_SECONDS:g} s, got {limits.short(match[0])!r}")
    return found


def parse(text: str, trials: float) -> Budget:
    """A budget from words; a time for the whole is shared out among this many trials (of which some may count for more than one).

    Raises:
        ValueError: the words are none of :data:`FORMS`, or there is nothing to spend.
    """
    match = _NUMBER.fullmatch(text.strip().lower())
    unit = match[2] if match else ""
    if match is None or unit not in {*_SECONDS, *_COUNTS}:
        raise ValueError(f"budget must be {FORMS}, got {limits.short(text)!r}")
    amount = float(match[1])
    if unit in _COUNTS:
        if not 1 <= amount <= limits.MOST_COUNT or amount != int(amount):
            raise ValueError(
                f"budget must be a whole number of {_COUNTS[unit]}, from 1 to {limits.MOST_COUNT:.0e}, got {limits.short(text)!r}"
            )
        return Budget(_COUNTS[unit], int(amount))
    if amount <= 0:
        raise ValueError(f"budget must be more than no time, got {limits.short(text)!r}")
    time = _time("budget", match)
    if match[3]:
        return Budget("seconds", time)
    return Budget("seconds", float(f"{time / trials:.2g}"), total=time)
