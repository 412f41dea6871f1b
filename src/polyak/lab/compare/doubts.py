"""What makes a comparison's numbers doubtful, each in a sentence that says what to look at."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable

from polyak.lab import words
from polyak.lab.compare.rows import Row, TaskRows
from polyak.lab.compare.spec import ArmSpec

_BUSY = 0.8  # of the time: a trial that had a processor for less was held up
_EDGE = 0.02  # of a range's length: a best point this near to its end may have a better one beyond
_FURTHER = 30.0  # a range that is proposed goes on by this factor
_MANY_TIMES = 10.0  # better than the baseline: rarely real


def doubts(t: TaskRows) -> Iterable[str]:
    """All there are, the gravest first."""
    for look in (_lost, _more_gradients, _too_good, _unmoved, _badly_tuned, _too_short, _too_busy):
        yield from look(t)


def _lost(t: TaskRows) -> Iterable[str]:
    """Where all trials of an arm diverged, why: it may be the task that is wrong."""
    for row in t.rows:
        if not 0 < row.diverged == row.seeds:
            continue
        said = [trial.message.partition("\n")[0] for trial in t.trials(row.arm)]
        first = "" if len(set(said)) == 1 else " (the first)"
        yield f"{row.label}: every trial diverged{f': {said[0]}{first}' if said[0] else ''}"


def _more_gradients(t: TaskRows) -> Iterable[str]:
    """Steps are no equal work where some take more gradients than others."""
    if t.facts.kind != "training" or t.setup.budget.unit != "steps":
        return
    taken = {row.label: t.gradients(row) for row in t.rows}
    least = min(taken.values())
    if more := [f"{label} {words.number(n)}" for label, n in taken.items() if n > 1.005 * least]:
        yield (
            f"gradients for each step: {', '.join(more)}; all others {words.number(least)}: at equal steps that is so many times "
            f"the work. With --budget {t.setup.budget.amount:g}grads gradients are what is equal"
        )


def _unmoved(t: TaskRows) -> Iterable[str]:
    for row in t.rows:
        curves = [[values[t.main.name] for _, values in trial.curve] for trial in t.trials(row.arm)]
        begun = all(trial.curve and trial.curve[0][0]["used"] == 0 for trial in t.trials(row.arm))
        if begun and not row.diverged and all(len(set(values)) == 1 < len(values) for values in curves):
            yield f"{row.label} never changes the {t.main.label}: does its step() move the parameters?"


def _badly_tuned(t: TaskRows) -> Iterable[str]:
    """Where the best of what was tried is at an end of its range, or nothing that was tried is any good."""
    for spec, row in zip(t.setup.arms, t.rows, strict=True):
        tried = t.trials(row.arm, "tuning")
        if tried and all(trial.diverged for trial in tried):
            r = spec.space.get("lr")
            lower = f"; try a lower range: {_wider(spec, 'lr', r.low / _FURTHER, r.low)}" if r else ""
            yield f"{row.label}: every tuning trial diverged, and the first one's options are used{lower}"
            continue
        for name, r in spec.space.items():
            if r.log:
                yield from _at_an_end(t, spec, row, name)


def _at_an_end(t: TaskRows, spec: ArmSpec, row: Row, name: str) -> Iterable[str]:
    """Where most seeds' best value of an option is at one end of what was tried."""
    r, on_grid = spec.space[name], name == next(iter(spec.space))
    found: dict[str, list[float]] = {"low": [], "high": []}
    ends: dict[str, list[float]] = {
        "low": [r.low],
        "high": [r.high],
    }  # the range has grown where the best was at its end
    points = t.points(row.arm)
    for seed, point in zip(t.result.seeds, points, strict=True):
        tried = [trial.point[name] for trial in t.tried(row.arm, seed) if name in trial.point]
        if not tried or (on_grid and len(set(tried)) < 3):
            continue
        for side, pick in (("low", min), ("high", max)):
            ends[side].append(pick(tried))
            near = 0.0 if on_grid else _EDGE * math.log(r.high / r.low)
            if abs(math.log(point[name] / pick(tried if on_grid else [*tried, getattr(r, side)]))) <= near:
                found[side].append(point[name])
    low, high = min(ends["low"]), max(ends["high"])
    for side, values in found.items():
        if 2 * len(values) > len(points):
            beyond = (low / _FURTHER, high) if side == "low" else (low, high * _FURTHER)
            of = "" if len(values) == len(points) else f" of {len(values)} of {len(points)} seeds"
            yield (
                f"{row.label}: its best {name}{of}, {words.number(words.typical(values))}, is at the {side} end of what was "
                f"tried, and a better one may be beyond: {_wider(spec, name, *beyond)}"
            )


def _too_busy(t: TaskRows) -> Iterable[str]:
    """On a CPU whose cores were shared with other work, seconds say little."""
    timed = t.facts.kind == "training" and t.setup.budget.unit == "seconds"
    if not timed or t.result.device != "cpu":
        return
    shares = {
        row.label: [trial.values["processor"] for trial in t.trials(row.arm) if not trial.diverged] for row in t.rows
    }
    means = {label: statistics.mean(values) for label, values in shares.items() if values}
    if means and min(means.values()) < _BUSY:
        label = min(means, key=lambda name: means[name])
        yield (
            f"trials of {label} had a processor for {100 * means[label]:.0f} % of their time only: other work on this machine, "
            "or waiting for data, makes a budget in time rough; a count (500steps) does not depend on it"
        )


def _too_short(t: TaskRows) -> Iterable[str]:
    for row in t.rows:
        if t.facts.kind == "training" and row.spent is not None and row.spent < t.setup.points:
            yield (
                f"{row.label} had time for {words.number(row.spent)} steps only, fewer than the {t.setup.points} points at "
                "which is measured: give a larger budget"
            )


def _too_good(t: TaskRows) -> Iterable[str]:
    name, better, base = t.main.name, t.main.better, t.rows[0]
    lower = better == "lower"
    for row in t.rows:
        finals = [trial.values[name] for trial in t.trials(row.arm)]
        perfect = all(v == 0.0 for v in finals) if lower else t.main.worst == 0.0 and all(v == 1.0 for v in finals)
        if perfect:
            yield (
                f"{row.label} is perfect on every seed ({t.main.label} {words.number(finals[0])}): is the target among the "
                "inputs, or evaluation data in the training data?"
            )
    for row in t.rows[1:]:
        wins = row.difference is not None and row.difference.verdict == "holds"
        if lower and wins and 0 < row.final * _MANY_TIMES < base.final < math.inf:
            yield (
                f"{row.label} is more than {_MANY_TIMES:g} times as good as {base.label}: so large a difference is more often "
                "a leak, or a baseline whose best learning rate is outside of its range, than a better method"
            )
    if t.facts.validates:
        for row in t.rows:
            gap = _leaking_gap(t, row)
            if gap:
                yield gap
    untrained = t.facts.initial.get(name, math.nan)
    trains = t.facts.kind == "training" and not any(row.diverged == row.seeds for row in t.rows)
    if trains and all(row.best >= untrained if lower else row.best <= untrained for row in t.rows):
        yield f"no arm improves on the untrained model ({t.main.label} {words.number(untrained)}): nothing is learned"


def _leaking_gap(t: TaskRows, row: Row) -> str:
    """A word where what was tuned by is far better than what is reported, beyond what seeds explain."""
    tuned = [
        trial.values["validation"]
        for trial in t.trials(row.arm, "tuning")
        if trial.point in t.points(row.arm) and not trial.diverged
    ]
    finals = [trial.values[t.main.name] for trial in t.trials(row.arm) if not trial.diverged]
    if not tuned or len(finals) < 3:
        return ""
    before, after = statistics.mean(tuned), statistics.mean(finals)
    gap = after - before if t.main.better == "lower" else before - after
    if gap > 6 * statistics.stdev(finals) and gap > 0.5 * abs(after):
        return (
            f"{row.label} is far better on the data it was tuned by ({words.number(before)}) than on the reported "
            f"({words.number(after)}): is the validation data in the training data?"
        )
    return ""


def _wider(spec: ArmSpec, name: str, low: float, high: float) -> str:
    """An arm's words with another range of an option."""
    kept = [piece for piece in spec.pieces if not piece.startswith(f"{name}=")]
    ends = "..".join(f"{float(f'{end:.1g}'):g}" for end in (low, high))
    return ":".join([*kept, f"{name}={ends}"])
