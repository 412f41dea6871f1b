"""A comparison's drawings: curves, sensitivity to the learning rate, and performance profiles over tasks."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from polyak.core import checks
from polyak.lab import plots, words
from polyak.lab.claim import Arm, Claim, Plot
from polyak.lab.compare.answer import TaskComparison
from polyak.lab.compare.result import Found
from polyak.lab.compare.rows import regular
from polyak.lab.compare.search import MEASURE, stopped
from polyak.lab.plots import Line
from polyak.lab.result import TrialResult

if TYPE_CHECKING:
    from matplotlib.figure import Figure

KINDS = ("curves", "sensitivity", "profiles")
_WIDE = 20.0  # largest over smallest: beyond, an axis is logarithmic
_LATE = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5)  # parts of a curve's course from which on it may be looked at
_APART = 0.2  # of an axis: how much the ends of curves should take
_ROOM = 0.06  # of an axis, beyond what is on it
_PROFILES = Plot(x="ratio", y="share", x_label="times as long as the fastest arm", log_x=True)


def figure(comparison: Found, what: str, task: str = "") -> Figure:
    """One drawing as a matplotlib figure, which a notebook shows.

    Raises:
        ValueError: ``what`` is none of :data:`KINDS`, or there is nothing to draw.
    """
    from polyak.lab.compare.notebook import SHARP, Drawing

    checks.one_of("figure", what, KINDS)
    if what == "profiles":
        claim, found = comparison.tasks[0].claim, _profiles(comparison)
        title = _capital(found.title)
    else:
        t = comparison.task(task)
        claim = t.claim
        found = _sensitivity(t) if what == "sensitivity" else _curve(t, claim.tasks[0].plots[0])
        title = f"{t.name}: {found.title}"
    if not found.lines:
        raise ValueError(f"there is nothing to draw for {what}")
    with plots.styled():
        drawn = plots.draw(claim, found.lines, found.plot, title=title, figure=Drawing(), **found.how)
    drawn.set_dpi(SHARP)
    return drawn


@dataclass(frozen=True)
class _Drawn:
    """What is drawn, and how (see :func:`plots.draw`)."""

    lines: list[Line]
    plot: Plot
    title: str
    how: dict[str, Any]

    def svg(self, claim: Claim, name: str, prefix: str) -> str:
        return plots.drawing(claim, self.lines, self.plot, name=name, prefix=prefix, **self.how)


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def curves(t: TaskComparison) -> list[tuple[str, str]]:
    """(title, SVG) of the reported trials' curves."""
    drawn = []
    for plot in t.claim.tasks[0].plots:
        found = _curve(t, plot)
        name = f"{t.name}: {t.claim.metric(plot.y).label} over {plot.x_label}, per arm"
        if svg := found.svg(t.claim, name, f"{t.name}-{plot.x}-{plot.y}"):
            drawn.append((_capital(found.title), svg))
    return drawn


def _curve(t: TaskComparison, plot: Plot) -> _Drawn:
    plot = _scaled(t, plot)
    lines = plots.lines(t.claim, t.claim.tasks[0], plot, regular(t.result))
    diverged = [trial.arm for trial in t.result.trials if trial.purpose == "report" and trial.diverged]
    lost = {arm for arm in diverged if diverged.count(arm) == len(t.trials(arm))}
    view = _late([line for line in lines if line.arm.name not in lost] or lines, plot, lost=bool(diverged))
    shown = [v for line in lines for v in (*line.middle, *(y for _, y in line.crosses)) if math.isfinite(v)]
    label = t.claim.metric(plot.y).label
    title = f"{label} against {plot.x_label}"
    return _Drawn(lines, plot, title, {"above": _above(t, plot, shown, view), "view": view})


def _scaled(t: TaskComparison, plot: Plot) -> Plot:
    """With a logarithmic axis for a loss that falls far. What diverged says nothing of this, unless all did."""
    trials = [trial for trial in t.result.trials if trial.purpose == "report"]
    sound = [trial for trial in trials if not trial.diverged] or trials
    values = [v[plot.y] for trial in sound for _, v in trial.curve if plot.y in v]
    wide = bool(values) and 0 < min(values) * _WIDE < max(values)
    return replace(plot, log_y=wide and t.claim.metric(plot.y).better == "lower")


def _late(lines: Sequence[Line], plot: Plot, *, lost: bool) -> tuple[float, float] | None:
    """From where to where an axis goes so that the ends of curves are told apart: as much of their course as allows it.

    Curves that begin far from where they end are seen from some part of their course on, at most from the middle; before, they are
    out of view. So are the values of seeds that diverge (``lost``: there are some). None: all is in view. It is, too, where there
    is no course, but a few budgets on a logarithmic axis.
    """
    ends = [v for line in lines if line.x for v in (line.middle[-1], line.low[-1], line.high[-1]) if math.isfinite(v)]
    if not ends or plot.log_x or any(line.singles for line in lines):
        return None
    scale = math.log if plot.log_y else float
    courses = [list(_course(line)) for line in lines if line.x]
    part, seen = 0.0, ends
    for part in _LATE:
        seen = [*ends, *(v for course in courses for share, v in course if share >= part)]
        if _APART * (scale(max(seen)) - scale(min(seen))) <= scale(max(ends)) - scale(min(ends)):
            break
    return _around(seen, plot) if part or lost else None


def _course(line: Line) -> Iterator[tuple[float, float]]:
    """(share of the way, value) of a line's middle."""
    first, last = line.x[0], line.x[-1]
    for x, value in zip(line.x, line.middle, strict=True):
        if math.isfinite(value):
            yield ((x - first) / (last - first) if last > first else 1.0), value


def _above(t: TaskComparison, plot: Plot, shown: Sequence[float], view: tuple[float, float] | None) -> str:
    """What is said over a drawing; on a second line, what of these values is out of view."""
    metric = t.claim.metric(plot.y)
    log = ", log scale" if plot.log_y else ""
    said = f"{metric.label}{log}; {metric.better} is better"
    if view is None:
        return said
    over, under = [v for v in shown if v > view[1]], [v for v in shown if v < view[0]]
    parts = [f"up to {words.number(max(over))}" if over else "", f"down to {words.number(min(under))}" if under else ""]
    out = " and ".join(filter(None, parts))
    return f"{said}\nout of view: {out}" if out else said


# -- sensitivity -----------------------------------------------------------------------------------------------------------


def sensitivity(t: TaskComparison) -> str:
    """The SVG of what each arm's tuning trials reached by learning rate; "" where none was tuned."""
    found = _sensitivity(t)
    name = f"{t.name}: {t.main.label} in tuning over {found.plot.x_label}, per arm"
    return found.svg(t.claim, name, f"{t.name}-sensitivity")


def _sensitivity(t: TaskComparison) -> _Drawn:
    name = _tuned(t)
    lines = [line for arm in t.claim.arms if (line := _tuning(t, arm, name)).end]
    values = [y for line in lines for y in (*line.middle, *(y for _, y in _alone(line)))]
    places = [x for line in lines for x in (*line.x, *(x for x, _ in (*_alone(line), *line.crosses)))]
    ranges = [arm.space[name] for arm in t.setup.arms if name in arm.space]
    x_label = "learning rate" if name == "lr" else name
    near = _near(t, values)
    plot = Plot(
        x=name,
        y=MEASURE,
        x_label=x_label,
        log_x=bool(places) and min(places) > 0 and not any(r.whole for r in ranges),
        log_y=bool(near) and 0 < min(near) * _WIDE < max(near),
    )
    view = _around(near, plot) if len(near) < len(values) else None
    worst = (max if t.main.better == "lower" else min)(near, default=0.0)
    lines = [replace(line, crosses=[(x, worst) for x, _ in line.crosses]) for line in lines]
    there = {kind for line in lines for kind, points in line.marks.items() if points}
    there |= {"diverged"} if any(line.crosses for line in lines) else set()
    keys = {kind: says for kind, says in _KEYS.items() if not kind or kind in there}
    title = f"what tuning trials reached, by their {x_label}"
    return _Drawn(lines, plot, title, {"above": _above(t, plot, values, view), "view": view, "keys": keys})


_KEYS = {
    "": "grids, all else at its centre (mean over seeds)",
    "other": "other points",
    "stopped": "stopped early, with its last value",
    "diverged": "diverged",
    "chosen": "chosen",
}


def _tuning(t: TaskComparison, arm: Arm, name: str) -> Line:
    """All of an arm's tuning trials that have this option: a line over its grids of it, and marks for the others.

    Seeds have grids of their own. The line goes over their steps: at each the means over seeds, in a band of all there are.
    """
    spec = next(spec for spec in t.setup.arms if spec.text == arm.name)
    line, marks = Line(arm, label=arm.label), {"other": [], "stopped": [], "chosen": []}
    steps: dict[int, list[TrialResult]] = {}
    for seed, point in zip(t.result.seeds, t.result.chosen.get(t.name, {}).get(arm.name, ()), strict=False):
        tried = [trial for trial in t.tried(arm.name, seed) if name in trial.point]
        marks["chosen"] += [trial for trial in tried if trial.point == point][:1]
    for seed in t.result.seeds:
        tried = [trial for trial in t.tried(arm.name, seed) if name in trial.point]
        on_grid = _grid(tried, name) if next(iter(spec.space), "") == name else []
        line.crosses += [(float(trial.point[name]), 0.0) for trial in tried if trial.diverged]
        sound = [trial for trial in tried if not trial.diverged]
        marks["stopped"] += [trial for trial in sound if stopped(trial)]
        marks["other"] += [trial for trial in sound if not stopped(trial) and trial not in on_grid]
        ordered = sorted(on_grid, key=lambda trial: trial.point[name])
        for place, trial in enumerate(ordered):
            if not trial.diverged and not stopped(trial):
                # Counted from where the grid begins: some seeds' searches have gone beyond it.
                steps.setdefault(place - ordered.index(on_grid[0]), []).append(trial)
    for _, found in sorted(steps.items()):
        values = [trial.values[MEASURE] for trial in found]
        line.x.append(_middle([float(trial.point[name]) for trial in found]))
        line.middle.append(statistics.fmean(values))
        line.low.append(min(values))
        line.high.append(max(values))
    line.marks = {
        kind: [(float(p.point[name]), p.values[MEASURE]) for p in found if not p.diverged]
        for kind, found in marks.items()
    }
    return line


def _grid(trials: Sequence[TrialResult], name: str) -> list[TrialResult]:
    """Those trials that differ from the first in this alone."""

    def others(trial: TrialResult) -> dict[str, object]:
        return {key: value for key, value in trial.point.items() if key != name}

    return [trial for trial in trials if others(trial) == others(trials[0])]


def _middle(places: Sequence[float]) -> float:
    """The mean of an option's values, of its logarithms where it has them."""
    if len(set(places)) == 1:
        return places[0]
    return statistics.geometric_mean(places) if min(places) > 0 else statistics.fmean(places)


def _alone(line: Line) -> list[tuple[float, float]]:
    return [point for points in line.marks.values() for point in points]


def _near(t: TaskComparison, values: Sequence[float]) -> list[float]:
    """Those values that are no farther beyond the untrained model's than that is from the best; of samplers, all."""
    if t.facts.kind == "sampling":
        return list(values)  # what was judged first was noise
    untrained, lower = t.facts.initial.get(t.main.name, math.nan), t.main.better == "lower"
    best = (min if lower else max)(values, default=math.nan)
    farthest = 2 * untrained - best
    if math.isnan(farthest) or (best >= untrained if lower else best <= untrained):
        return list(values)
    return [v for v in values if (v <= farthest if lower else v >= farthest)]


def _around(values: Sequence[float], plot: Plot) -> tuple[float, float]:
    """An axis that holds these values, with a little room."""
    scale, back = (math.log, math.exp) if plot.log_y else (float, float)
    low, high = scale(min(values)), scale(max(values))
    room = _ROOM * (high - low) or _ROOM * max(abs(high), 1e-12)
    return back(low - room), back(high + room)


def _tuned(t: TaskComparison) -> str:
    """What most arms' first range is of: the learning rate, where that is tuned."""
    names = [next(iter(arm.space)) for arm in t.setup.arms if arm.space]
    return "lr" if "lr" in names else max(names, key=names.count, default="")


# -- over tasks ------------------------------------------------------------------------------------------------------------


def profile_svg(comparison: Found) -> str:
    """The SVG of the performance profiles."""
    name = "Performance profiles: share of tasks whose target is reached, over the time relative to the fastest arm, per arm"
    return _profiles(comparison).svg(comparison.tasks[0].claim, name, "profiles")


def _profiles(comparison: Found) -> _Drawn:
    title = "share of tasks whose target is reached; higher is better"
    return _Drawn(profile_lines(comparison), _PROFILES, title, {"above": "share of tasks"})


def profile_lines(comparison: Found) -> list[Line]:
    """Stairs for each arm, all to one right end."""
    profiles = comparison.profiles()
    end = 1.2 * max((ratio for steps in profiles.values() for ratio, _ in steps), default=1.0)
    drawn = []
    for arm in comparison.tasks[0].claim.arms:
        x, y, level = [], [], 0.0
        for ratio, share in profiles[arm.name]:
            x, y = [*x, *([ratio] if x else []), ratio], [*y, *([level] if x else []), share]
            level = share
        x, y = [*x, end], [*y, level]
        drawn.append(Line(arm, x=x, middle=y, low=y, high=y, label=arm.label))
    return drawn
