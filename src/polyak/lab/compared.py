"""The comparisons that a store holds (`polyak compare`), put together from their trials.

The store knows trials, not which command asked for them: a command runs only what is missing, and an arm may have been run for
an earlier one. What is certain is this. An arm's trials of one fingerprint are of one state of the code (the task's file and the
arm's). What one open store wrote is of one command. So arms are put into one comparison where a command ran them together, or
where nothing speaks against it: the same task, budget, device and libraries, and no arm in two states of the code.
"""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from polyak.lab.compare.budget import Budget
from polyak.lab.result import ComparedTrial
from polyak.lab.store import COMPARISON, InFlight

_UNITS = {"seconds": "s/trial", "steps": "steps", "evaluations": "nfe"}  # as the command takes them
_POINTS = 20  # how often a reported trial is measured, where the command does not say


@dataclass(frozen=True)
class Compared:
    """A comparison's trials, in the order they were stored in."""

    trials: tuple[ComparedTrial, ...]

    @property
    def claim(self) -> str:
        return self.trials[0].claim

    @property
    def task(self) -> str:
        """The task file's name."""
        return self.claim.removeprefix(COMPARISON)

    @property
    def scale(self) -> str:
        return self.trials[0].scale

    @property
    def device(self) -> str:
        return self.trials[0].device

    @property
    def versions(self) -> Mapping[str, str]:
        """Of python and the libraries; the fingerprint is each arm's own."""
        return _libraries(self.trials[0])

    @property
    def budget(self) -> str:
        """ "1 s for each trial"."""
        return budget_words(self.scale)

    @cached_property
    def arms(self) -> Mapping[str, str]:
        """What arms are called, by their words: by their classes where these differ, in the order they were begun in."""
        classes = {t.arm: t.target.rpartition(":")[2] for t in self.trials}
        shared = Counter(classes.values())
        return {arm: name if name and shared[name] == 1 else arm for arm, name in classes.items()}

    @property
    def done(self) -> int:
        return sum(t.state == "done" for t in self.trials)

    @property
    def failed(self) -> int:
        return sum(t.state == "failed" for t in self.trials)

    @property
    def seconds(self) -> float:
        return sum(t.seconds for t in self.trials)

    @property
    def finished(self) -> str:
        return max(t.finished for t in self.trials)

    def goes_on(self, trial: InFlight) -> bool:
        """Whether a trial in flight is of this comparison."""
        here = (self.claim, self.scale, self.device, self.versions)
        return here == (trial.claim, trial.scale, trial.device, _libraries(trial)) and any(
            t.owner == trial.owner or _state(t) == _state(trial) for t in self.trials
        )

    @cached_property
    def command(self) -> str:
        """The command that writes this comparison's page from what is stored; "" where that is not certain.

        It is where all that one command would have run is there, once: equally many seeds for every arm, counted from 0, and
        equally many tuning trials for every arm that is tuned.
        """
        budget = _budget(self.scale)
        by_arm = [[t for t in self.trials if t.arm == arm] for arm in self.arms]
        seeds = [sorted(t.seed for t in trials if t.purpose == "report") for trials in by_arm]
        tuning = [n for trials in by_arm if (n := sorted(t.number for t in trials if t.purpose == "tuning"))]
        points = {t.points for t in self.trials if t.purpose == "report"}
        whole = len(self.arms) > 1 and self.done == len(self.trials) and len(points) == 1
        if not (whole and budget and seeds[0] and _alike(seeds) and (not tuning or _alike(tuning))):
            return ""
        said = {
            "--arms": ",".join(self.arms),
            "--budget": f"{budget.amount:g}{_UNITS[budget.unit]}",
            "--seeds": str(len(seeds[0])),
            **({"--trials": str(len(tuning[0]))} if tuning else {}),
            **({"--points": str(*points)} if points != {_POINTS} else {}),
            **({"--device": "cuda"} if self.device != "cpu" else {}),
        }
        return " ".join(
            [f"polyak compare {self.task}.py", *(f"{name} {shlex.quote(value)}" for name, value in said.items())]
        )


def budget_words(scale: str) -> str:
    """A comparison's scale in words: "1 s for each trial"."""
    budget = _budget(scale)
    return budget.words if budget else scale


def _budget(scale: str) -> Budget | None:
    """What each trial might spend, from the words that it is stored under; None where they are another version's."""
    amount, _, unit = scale.partition(" ")
    try:
        return Budget(unit, float(amount)) if unit in _UNITS else None  # pyright: ignore[reportArgumentType]
    except ValueError:
        return None


def _alike(counts: Sequence[Sequence[int]]) -> bool:
    """Whether all are 0, 1, 2, ... to the same end."""
    return all(list(c) == list(range(len(counts[0]))) for c in counts)


def _libraries(trial: ComparedTrial | InFlight) -> dict[str, str]:
    return {name: version for name, version in trial.versions.items() if name not in ("fingerprint", "polyak")}


def comparisons(trials: Iterable[ComparedTrial]) -> list[Compared]:
    """The comparisons that these trials, in the order they were stored in, are of; the latest first."""
    places: dict[tuple, list[ComparedTrial]] = {}
    for trial in trials:
        place = (trial.claim, trial.scale, trial.device, *sorted(_libraries(trial).items()))
        places.setdefault(place, []).append(trial)
    found = [Compared(tuple(group)) for here in places.values() for group in _together(here)]
    return sorted(found, key=lambda c: c.finished, reverse=True)


def _together(trials: Sequence[ComparedTrial]) -> list[list[ComparedTrial]]:
    """Trials of one task, budget, device and libraries, by comparison."""
    # First what one command ran, or one state of an arm's code, links: a forest whose leaves are commands and states.
    above: dict[object, object] = {}

    def root(key: object) -> object:
        while (upper := above.setdefault(key, key)) != key:
            key = upper
        return key

    for trial in trials:
        above[root(trial.owner)] = root(_state(trial))
    groups: dict[object, list[ComparedTrial]] = {}
    for trial in trials:
        groups.setdefault(root(trial.owner), []).append(trial)
    # Then what may have been one comparison all the same: an arm that was added later, or run before.
    joined: list[list[ComparedTrial]] = []
    for group in groups.values():
        if joined and _agree(joined[-1], group):
            joined[-1] += group
        else:
            joined.append(group)
    return joined


def _state(trial: ComparedTrial | InFlight) -> tuple[str, str]:
    """An arm, and the state of the code that decides its results."""
    return trial.arm, trial.versions.get("fingerprint", "")


def _agree(one: Iterable[ComparedTrial], other: Iterable[ComparedTrial]) -> bool:
    states: dict[str, set[str]] = {}
    for arm, state in map(_state, [*one, *other]):
        states.setdefault(arm, set()).add(state)
    return all(len(s) == 1 for s in states.values())
