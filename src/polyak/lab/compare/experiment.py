"""A comparison on one task as a claim that the lab can judge, with a criterion for each arm: better than the baseline."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from polyak.lab.claim import Arm, Claim, Criterion, Metric, Paper, Plot, Scale, Task
from polyak.lab.compare.budget import Budget
from polyak.lab.compare.sampling import Draw
from polyak.lab.compare.search import MEASURE
from polyak.lab.compare.spec import ArmSpec
from polyak.lab.compare.task import Facts
from polyak.lab.compare.trial import Train
from polyak.lab.store import COMPARISON

_SHARES = ("acc", "auc", "f1", "precision", "recall", "iou")  # names of what lies between 0 and 1
_LONG = 36  # characters of a label
_ROUNDING = 1e-6  # relative to the values: what two orders of the same sums in single precision may differ by
_OWN_METRICS = (
    Metric(name="train_loss", label="training loss"),
    Metric(name="steps", label="steps", better="higher"),
    Metric(name="seconds", label="seconds", unit="s"),
    Metric(name="memory", label="memory", unit="MB"),
    Metric(name="processor", label="share of a processor", better="higher"),
)


def experiment(file: Path, facts: Facts, arms: Sequence[ArmSpec], budget: Budget, seeds: int) -> Claim:
    """The comparison in the lab's words: a claim that nobody has made, whose criteria are that an arm is better than the first."""
    name, better = file.stem, facts.better[facts.main]
    labels = _labels(arms)
    measured = [_metric(key, value, facts) for key, value in facts.better.items()]
    x, x_label = {
        "seconds": ("seconds", "seconds of training"),
        "steps": ("step", "optimizer step"),
        "gradients": ("gradients", "gradients of batches"),
        "evaluations": ("evaluations", "evaluations of the model"),
    }[budget.unit]
    if facts.kind == "sampling":
        x, x_label = "evaluations", "evaluations of the model"
    sampled = facts.kind == "sampling"
    plots = [Plot(x=x, y=m.name, x_label=x_label, log_x=sampled) for m in measured[:3]]
    if not sampled:
        plots.append(Plot(x=x, y="train_loss", x_label=x_label))
        if x != "seconds":
            plots.insert(1, Plot(x="seconds", y=facts.main, x_label="seconds of training"))
    return Claim(
        slug=f"{COMPARISON}{name}",
        room="compare",
        name=name,
        summary=facts.says,
        says="",
        paper=Paper(title="", year=0),
        part="",
        budget=budget.unit,
        tasks=(Task(name=name, label=name, says=facts.says, tune=MEASURE, plots=tuple(plots)),),
        arms=tuple(
            Arm(
                name=arm.text,
                label=labels[arm.text],
                role="baseline" if arm is arms[0] else "method",
                options=arm.fixed,
                says=arm.says,
            )
            for arm in arms
        ),
        scales=(Scale(name=budget.label, says=budget.words, seeds=seeds),),
        metrics=(
            *measured,
            Metric(name=MEASURE, label=f"{facts.main.replace('_', ' ')} in tuning", better=better),
            *(m for m in _own_metrics(sampled) if m.name not in facts.better),
        ),
        criteria=tuple(
            Criterion(
                name=arm.text,
                says=f"{labels[arm.text]} is better than {labels[arms[0].text]}",
                kind="effect",
                task=name,
                metric=facts.main,
                arm=arm.text,
                against=arms[0].text,
                compare="difference",
                op="<=" if better == "lower" else ">=",
                bound=0.0,
                both_diverged="equal",
                rounding=_ROUNDING,
            )
            for arm in arms[1:]
        ),
        trial=(Draw if sampled else Train)(str(file)),
    )


def _own_metrics(sampled: bool) -> tuple[Metric, ...]:
    asked = Metric(name="evaluations", label="evaluations" if sampled else "gradients", better="higher")
    return (*_OWN_METRICS, asked)


def _labels(arms: Sequence[ArmSpec]) -> dict[str, str]:
    """Class names with the options that were given, of long ones the first; where that leaves two alike, all, or the words."""
    ways = [{arm.text: way(arm) for arm in arms} for way in (_short, lambda arm: arm.label, lambda arm: arm.text)]
    alone = [{text for text, label in way.items() if list(way.values()).count(label) == 1} for way in ways]
    return {
        arm.text: next(w[arm.text] for w, ones in zip(ways, alone, strict=True) if arm.text in ones) for arm in arms
    }


def _short(arm: ArmSpec) -> str:
    if len(arm.label) <= _LONG or not arm.own:
        return arm.label
    kept = list(arm.own)
    while len(kept) > 1 and len(arm.labelled([*kept, "…"])) > _LONG:
        kept.pop()
    # One that is long alone stays: without it an arm would look like its class with nothing said.
    return arm.labelled(kept if kept == list(arm.own) else [*kept, "…"])


def _metric(name: str, better: Any, facts: Facts) -> Metric:
    # A share has a worst value; a loss, a reward or R² has none, whatever it is at first.
    share = any(part in name.lower() for part in _SHARES)
    bounded = share and better == "higher" and 0 <= facts.initial.get(name, math.nan) <= 1
    return Metric(name=name, label=name.replace("_", " "), better=better, worst=0.0 if bounded else None)
