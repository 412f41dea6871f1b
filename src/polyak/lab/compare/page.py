"""A comparison's page: one HTML file in the report's style, and a short form for notebooks."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

from markupsafe import Markup, escape

from polyak.lab import plots, report, strips, words
from polyak.lab.compare import figures
from polyak.lab.compare.answer import Said, TaskComparison
from polyak.lab.compare.result import Found
from polyak.lab.compare.rows import Row
from polyak.lab.compare.search import MEASURE, stopped
from polyak.lab.compare.spec import ArmSpec
from polyak.lab.report import Live
from polyak.lab.statistics import LEAST_SEEDS, LEVEL

OUTCOME = {"holds": "better", "fails": "worse", "undecided": "undecided"}


def page(comparison: Found, *, live: Live | None = None, command: str = "") -> str:
    """The whole page; served (``live``) with the command that asked for the comparison."""
    return report.render(
        "compare.html",
        c=comparison,
        setup=comparison.setup,
        title=_title(comparison),
        tasks=[_task(t) for t in comparison.tasks],
        fair=fair(comparison),
        profiles=Markup(figures.profile_svg(comparison)) if len(comparison.tasks) > 1 else "",
        data=report.embedded(comparison.to_json()),
        outcome=OUTCOME,
        live=live,
        command=command,
    )


def so_far(comparison: Found, *, live: Live, command: str, done: int, failed: int, total: int, running: bool) -> str:
    """The page of a comparison of which so many trials have ended; nothing is judged."""
    return report.render(
        "comparing.html",
        setup=comparison.setup,
        title=_title(comparison),
        tasks=[_task_so_far(t) for t in comparison.tasks],
        live=live,
        command=command,
        done=done,
        failed=failed,
        total=total,
        running=running,
    )


def _title(comparison: Found) -> str:
    tasks = comparison.tasks
    return tasks[0].name if len(tasks) == 1 else words.count(len(tasks), "task")


def summary(comparison: Found) -> str:
    """The answer and the table, for a notebook: no style sheet, no script."""
    head = "".join(
        f"<th>{escape(h)}</th>" for h in ("task", "arm", "at the end", "difference", "95 % interval", "verdict")
    )
    rows = []
    for t in comparison.tasks:
        for row in t.rows:
            d = row.difference
            cells = [t.name, row.label, words.number(row.final)]
            cells += [*words.compared(d), OUTCOME[d.verdict]] if d else ["", "", "baseline"]
            rows.append("<tr>" + "".join(f"<td>{escape(c)}</td>" for c in cells) + "</tr>")
    return (
        _answer(comparison.said)
        + _listed(comparison.warnings)
        + f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"
    )


def _answer(said: Said) -> str:
    if not said.long:
        return f"<p><strong>{escape(str(said))}</strong></p>"
    more = f"<p>{escape(said.more)}</p>" if said.more else ""
    return f"<p><strong>{escape(said.head)}.</strong></p>{_listed(said.rest)}{more}"


def _listed(lines: Sequence[str]) -> str:
    return f"<ul>{''.join(f'<li>{escape(line)}</li>' for line in lines)}</ul>" if lines else ""


def _task(t: TaskComparison) -> dict[str, Any]:
    svg = figures.sensitivity(t)
    compared = [row.difference for row in t.rows if row.difference]
    sides = ("better", "worse") if t.main.better == "lower" else ("worse", "better")
    timed = t.setup.budget.unit == "seconds"
    return {
        "t": t,
        "rows": [_row(t, row) for row in t.rows],
        "strips": [
            (
                row,
                why(row),
                Markup(strips.strip(row.difference, "difference", sides, compared, words.compared(row.difference))),
            )
            for row in t.rows
            if row.difference
        ],
        "curves": [(title, Markup(svg)) for title, svg in figures.curves(t)],
        "sensitivity": Markup(svg),
        "gradients": [
            f"{row.label}: {words.number(t.gradients(row))} a step" for row in t.rows if t.gradients(row) > 1.005
        ]
        if t.facts.kind == "training"
        else [],
        "lost": any(row.diverged for row in t.rows),
        "memory": any(row.memory for row in t.rows),
        # Of a count a solver may leave some over.
        "counts": timed or any(row.spent not in (None, t.setup.budget.amount) for row in t.rows),
        **_trials(t),
        "arms": [{**report.arm_facts(t.claim, t.claim.arm(arm.text), t.result), "spec": arm} for arm in t.setup.arms],
    }


def _task_so_far(t: TaskComparison) -> dict[str, Any]:
    return {
        "t": t,
        "rows": [_row_so_far(t, spec) for spec in t.setup.arms],
        "curves": [(title, Markup(svg)) for title, svg in figures.curves(t)],
        "sensitivity": Markup(figures.sensitivity(t)),
    }


def _row_so_far(t: TaskComparison, spec: ArmSpec) -> dict[str, Any]:
    tuning, reported = t.trials(spec.text, "tuning"), t.trials(spec.text)
    pick = min if t.main.better == "lower" else max
    whole = [trial for trial in tuning if not stopped(trial)]
    best = pick(whole, key=lambda trial: trial.values[MEASURE], default=None)
    return {
        "label": t.claim.arm(spec.text).label,
        "swatch": Markup(plots.swatch(t.claim, t.claim.arm(spec.text))),
        "tuned": f"{len(tuning)} of {t.setup.trials * t.setup.seeds}" if spec.space else "nothing",
        "best": (words.number(best.values[MEASURE]), words.options(best.point)) if best else ("", ""),
        "seeds": f"{len(reported)} of {t.setup.seeds}",
        "mean": words.number(statistics.fmean(trial.values[t.main.name] for trial in reported)) if reported else "",
    }


def _trials(t: TaskComparison) -> dict[str, Any]:
    """The table of all trials, without columns that say nothing: where no trial has a value, or all have another column's."""
    measured = [trial.values for trial in t.result.trials]
    metrics = [m for m in t.claim.metrics if any(m.name in values for values in measured)]
    if all(values.get("evaluations") == values.get("steps") for values in measured):
        metrics = [m for m in metrics if m.name != "evaluations"]
    return {
        "metrics": metrics,
        "trials": report.trial_rows(t.claim, t.result, metrics, told={"report": t.main.name, "tuning": MEASURE}),
    }


def _row(t: TaskComparison, row: Row) -> dict[str, Any]:
    finals = [trial.values[t.main.name] for trial in t.trials(row.arm)]
    low, high = min(finals), max(finals)
    return {
        "row": row,
        "swatch": Markup(plots.swatch(t.claim, t.claim.arm(row.arm))),
        "range": f"{words.number(low)} to {words.number(high)}" if low < high else "",
        "difference": words.compared(row.difference) if row.difference else ("", ""),
        "reach": _reach(t, row),
        "chance": words.percent(row.difference.improvement, row.chance) if row.difference and row.chance else ("", ""),
    }


def _reach(t: TaskComparison, row: Row) -> tuple[str, ...]:
    """What it costs to reach the target, how many seeds do where not all, and how the costs compare with the baseline's."""
    some, unit = t.reached(row), t.unit
    if math.isinf(row.seconds_to_target):
        said = [f"reached by {some}" if row.reached else "not reached"]
    else:
        said = [f"{words.number(row.spent_to_target)}, {words.time(row.seconds_to_target)}", some]
    for what, e in ((unit, row.spent_ratio), ("time", row.seconds_ratio)):
        if e:
            said.append(f"{what}: {words.times(e.value, e.low, e.high)}")
    return tuple(filter(None, said))


def why(row: Row) -> str:
    """Why a difference is undecided, in a sentence; else nothing."""
    d = row.difference
    if d is None or d.verdict != "undecided":
        return ""
    if row.seeds < LEAST_SEEDS:
        return f"{words.count(row.seeds, 'seed')} cannot decide anything: at least {LEAST_SEEDS} can."
    said = f"were both equally good, {words.number(100 * d.p_value, 2)} % of such comparisons would look like this or clearer"
    if d.p_value > LEVEL:
        return f"This may be chance: {said}."
    return (
        f"By itself this would be decided: {said}. But of so many arms one looks like this more often by chance: "
        f"p = {words.number(d.adjusted, 2)} for all of them together."
    )


def fair(comparison: Found) -> list[tuple[str, str]]:
    """How it was compared: what was the same for all arms, and where that ends."""
    setup, first = comparison.setup, comparison.tasks[0]
    sampled = first.facts.kind == "sampling"
    said = [("Budget", f"{setup.budget.words}, the same for every arm.")]
    if setup.budget.unit == "seconds" and not sampled:
        said.append(("The clock", f"{_CLOCK} {_ALONE if setup.alone else _BESIDE}"))
    said.append(("Tuning", _tuning(comparison)))
    seeds = f"{_span(first.result.seeds)} {'are' if setup.seeds > 1 else 'is'} reported"
    tuning = _span(first.result.tuning_seeds)
    said.append(("Seeds", f"{seeds}; tuning used {tuning}, one for each, never reported." if tuning else f"{seeds}."))
    same = f"the initial noise of one seed, the model, and the metric. {_TIMES}"
    if not sampled:
        same = (
            "initial weights, and batches in the same order, of one seed; the learning rate's schedule "
            f"({first.facts.schedule}), where an arm does not say its own."
        )
    said.append(("Same for all arms", same))
    others = (len(setup.arms) - 1) * len(comparison.tasks)
    many = (
        f" The {others} verdicts are corrected for their number (Holm); each interval is of one." if others > 1 else ""
    )
    untuned = "" if tuning else " Nothing was tuned, and they say nothing of other options."
    return [*said, ("Intervals", _INTERVALS + many + untuned), ("Not covered", _NOT_COVERED)]


def _span(seeds: Sequence[int]) -> str:
    """ "0, 1, 2", "0 to 4"."""
    return ", ".join(map(str, seeds)) if len(seeds) < 4 else f"{seeds[0]} to {seeds[-1]}"


_CLOCK = (
    "counts taking batches, gradients and the optimizer's steps, so that what an optimizer costs counts. Evaluations, building the "
    "task, and two steps to warm up do not count."
)
_ALONE = "Trials ran one at a time on a machine, on one thread."
_BESIDE = "Trials ran beside each other, which makes times rough."
_INTERVALS = (
    "95 %, by Student's t over seeds. Each seed is a repeat of all that is random: initial weights, order of batches, and tuning, "
    "which is done anew for it. An arm is better or worse where chance would explain so large a mean difference in 5 % of "
    "comparisons at most; else it is undecided. A diverged trial counts as the worst value."
)
_NOT_COVERED = (
    "Other data, other tasks, other budgets, and whatever a task does alike for all seeds, such as one split of its data. With 3 "
    "or 4 seeds the intervals rest on differences that are roughly normal."
)
_TIMES = "Not the times at which the model is asked: they are each solver's own, where an arm does not give its grid."
_APART = "Chosen by the task's validate(model), on data apart from what is reported."
_TOGETHER = (
    "Chosen by the same numbers that are reported, on another seed: a little too good, for every arm alike; a task may return "
    "validate to keep them apart."
)
_FEW = {
    1: "the centre of all ranges",
    2: "two values of the learning rate, all else at the centre of its range",
}
_GRID = (
    "a grid of the learning rate over its range, then beyond it while the best is at its end, then halves of the gap beside "
    "the best, or Optuna's TPE where more is tuned; the last ones may be stopped early by the median rule"
)


def _tuning(comparison: Found) -> str:
    setup = comparison.setup
    if not any(arm.space for arm in setup.arms):
        sampled = comparison.tasks[0].facts.kind == "sampling"
        return f"none: {'no arm has an option with a range' if sampled else 'all options were given'}."
    how = f"{words.count(setup.trials, 'trial')} for every arm, anew for each seed: {_FEW.get(setup.trials, _GRID)}."
    if untuned := [arm.label for arm in setup.arms if not arm.space]:
        how += f" Nothing was tuned of {words.listing(untuned)}: all options were given."
    if comparison.tasks[0].facts.kind == "sampling":
        return how.replace("the learning rate", "the first option")
    apart = [t.name for t in comparison.tasks if t.facts.validates]
    together = [t.name for t in comparison.tasks if not t.facts.validates]
    if apart and together:
        return f"{how} On {words.listing(apart)}: {_APART} On {words.listing(together)}: {_TOGETHER}"
    return f"{how} {_APART if apart else _TOGETHER}"
