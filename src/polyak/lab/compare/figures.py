"""The drawings that only comparisons have: sensitivity to the learning rate, and performance profiles over tasks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from polyak.core import checks
from polyak.lab import plots
from polyak.lab.claim import Arm, Plot
from polyak.lab.compare.result import Comparison, TaskComparison, regular
from polyak.lab.compare.search import MEASURE, stopped
from polyak.lab.plots import Line
from polyak.lab.result import TrialResult

if TYPE_CHECKING:
    from matplotlib.figure import Figure

KINDS = ("curves", "sensitivity", "profiles")
_WIDE = 20.0  # largest over smallest: beyond, an axis is logarithmic
_PROFILES = Plot(x="ratio", y="share", x_label="times as long as the fastest arm", log_x=True)


def figure(comparison: Comparison, what: str, task: str = "") -> Figure:
    """One drawing as a matplotlib figure.

    Raises:
        ValueError: ``what`` is none of :data:`KINDS`, or there is nothing to draw.
    """
    checks.one_of("figure", what, KINDS)
    if what == "profiles":
        claim, lines, plot, above = comparison.tasks[0].claim, profile_lines(comparison), _PROFILES, "share of tasks"
    else:
        t = comparison.task(task)
        claim = t.claim
        if what == "sensitivity":
            lines, plot = sensitivity_lines(t), sensitivity_plot(t)
        else:
            plot = _scaled(t, claim.tasks[0].plots[0])
            lines = plots.lines(claim, claim.tasks[0], plot, regular(t))
        above = _above(t, plot)
    if not lines:
        raise ValueError(f"there is nothing to draw for {what}")
    with plots.styled():
        return plots.draw(claim, lines, plot, above)


def curves(t: TaskComparison) -> list[tuple[str, str]]:
    """(title, SVG) of the reported trials' curves."""
    drawn = []
    for plot in t.claim.tasks[0].plots:
        plot = _scaled(t, plot)
        label = t.claim.metric(plot.y).label
        svg = plots.curves(t.claim, t.claim.tasks[0], plot, regular(t))
        if svg:
            drawn.append((f"{label[:1].upper()}{label[1:]} against {plot.x_label}", svg))
    return drawn


def _scaled(t: TaskComparison, plot: Plot) -> Plot:
    """With a logarithmic axis for a loss that falls far."""
    values = [
        v[plot.y] for trial in t.result.trials if trial.purpose == "report" for _, v in trial.curve if plot.y in v
    ]
    wide = bool(values) and 0 < min(values) * _WIDE < max(values)
    return replace(plot, log_y=wide and t.claim.metric(plot.y).better == "lower")


def sensitivity(t: TaskComparison) -> str:
    """The SVG of what each arm's tuning trials reached by learning rate; "" where none was tuned."""
    plot = sensitivity_plot(t)
    name = f"{t.name}: {t.main.label} in tuning over {plot.x_label}, per arm"
    return plots.drawing(
        t.claim, sensitivity_lines(t), plot, above=_above(t, plot), name=name, prefix=f"{t.name}-sensitivity"
    )


def sensitivity_lines(t: TaskComparison) -> list[Line]:
    """A line for each arm over what its grid was over, all else at the centre; crosses where a trial diverged."""
    drawn = []
    for arm in t.claim.arms:
        trials = [trial for trial in t.trials(arm.name, "tuning") if not stopped(trial)]
        if trials and (name := next(iter(trials[0].point))) == _tuned(t):
            drawn.append((arm, name, _grid(trials, name)))
    finite = [p.values[MEASURE] for _, _, trials in drawn for p in trials if not p.diverged]
    worst = (max if t.main.better == "lower" else min)(finite, default=0.0)
    return [_line(arm, name, trials, worst) for arm, name, trials in drawn]


def _line(arm: Arm, name: str, trials: Sequence[TrialResult], worst: float) -> Line:
    sound = sorted((float(p.point[name]), p.values[MEASURE]) for p in trials if not p.diverged)
    x, y = [place for place, _ in sound], [value for _, value in sound]
    crosses = [(float(p.point[name]), worst) for p in trials if p.diverged]
    return Line(arm, x=x, middle=y, low=y, high=y, crosses=crosses, label=arm.label)


def _tuned(t: TaskComparison) -> str:
    """What most arms' first range is of: the learning rate, where that is tuned."""
    names = [next(iter(arm.space)) for arm in t.setup.arms if arm.space]
    return "lr" if "lr" in names else max(names, key=names.count, default="")


def _grid(trials: Sequence[TrialResult], name: str) -> list[TrialResult]:
    """Those trials that differ from the first in this alone."""

    def others(trial: TrialResult) -> dict[str, object]:
        return {key: value for key, value in trial.point.items() if key != name}

    return [trial for trial in trials if others(trial) == others(trials[0])]


def sensitivity_plot(t: TaskComparison) -> Plot:
    lines = sensitivity_lines(t)
    values = [y for line in lines for y in line.middle]
    places = [x for line in lines for x in line.x]
    name = _tuned(t)
    return Plot(
        x=name,
        y=MEASURE,
        x_label="learning rate" if name == "lr" else name,
        log_x=bool(places) and min(places) > 0,
        log_y=bool(values) and 0 < min(values) * _WIDE < max(values),
    )


def profile_svg(comparison: Comparison) -> str:
    """The SVG of the performance profiles."""
    claim = comparison.tasks[0].claim
    above = "share of tasks; higher is better"
    name = "Performance profiles: share of tasks whose target is reached, over the time relative to the fastest arm, per arm"
    return plots.drawing(claim, profile_lines(comparison), _PROFILES, above=above, name=name, prefix="profiles")


def profile_lines(comparison: Comparison) -> list[Line]:
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


def _above(t: TaskComparison, plot: Plot) -> str:
    metric = t.claim.metric(plot.y)
    log = ", log scale" if plot.log_y else ""
    return f"{metric.label}{log}; {metric.better} is better"
