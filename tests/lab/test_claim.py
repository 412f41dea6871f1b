"""A claim that contradicts itself is refused where it is declared."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import claims_for_tests as examples
import pytest

from polyak import claims
from polyak.lab.claim import Arm, Metric, Plot, Scale, Task, Trial, check_rules, measure

PLAIN = Arm(name="plain", label="", role="baseline")
QUICK = Arm(name="quick", label="", role="method")
CRITERION = examples.BETTER
TASK = Task(name="parabola", label="", tune="loss")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"arms": ()}, "no arms"),
        ({"arms": (PLAIN, PLAIN)}, "arms share a name"),
        ({"arms": (QUICK, PLAIN)}, "first arm must be the paper's baseline, got role 'method'"),
        (
            {"arms": (replace(PLAIN, grid={"lr": [1]}), replace(QUICK, grid={"lr": [1, 2]}))},
            r"equally many tuning trials, got \{'plain': 1, 'quick': 2\}",
        ),
        ({"arms": (replace(PLAIN, grid={"lr": []}), QUICK)}, "arm 'plain': a name in its grid has no values"),
        ({"arms": (PLAIN, replace(QUICK, tasks=("far",)))}, r"arm 'quick': unknown tasks \['far'\]"),
        ({"tasks": (replace(TASK, tune=""),)}, "tune= must name a metric, got ''"),
        ({"tasks": (replace(TASK, plots=(Plot(x="step", y="lost"),)),)}, "plot of unknown metric 'lost'"),
        (
            {"scales": (Scale(name="small", says="", seeds=1, tasks=("far",)),)},
            r"scale 'small': unknown tasks \['far'\]",
        ),
        (
            {"scales": (Scale(name="small", says="", seeds=1, task_options={"far": {}}),)},
            r"scale 'small': unknown tasks \['far'\]",
        ),
        ({"criteria": (replace(CRITERION, task="far"),)}, "criterion 'better': unknown task 'far'"),
        ({"criteria": (replace(CRITERION, arm="far"),)}, "criterion 'better': no arm 'far'"),
        ({"criteria": (replace(CRITERION, control="far"),)}, "criterion 'better': no arm 'far'"),
        ({"criteria": (replace(CRITERION, metric="far"),)}, "criterion 'better': unknown metric 'far'"),
        ({"criteria": (replace(CRITERION, compare="value"),)}, "compare='value' with against='plain'"),
        ({"criteria": (replace(CRITERION, against=""),)}, "compare='ratio' with against=''"),
    ],
)
def test_contradictions_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        examples.make(**changes)


def test_options_later_over_earlier() -> None:
    claim = examples.make(
        arms=(replace(PLAIN, options={"d": "arm", "e": "arm"}),),
        tasks=(replace(TASK, options={"b": "task", "c": "task"}),),
        scales=(
            Scale(
                name="small",
                says="",
                seeds=1,
                options={"a": "scale", "b": "scale"},
                task_options={"parabola": {"c": "scale's task", "d": "scale's task"}},
            ),
        ),
        criteria=(),
    )
    assert claim.options("small", "parabola", "plain", {"e": "point"}) == {
        "a": "scale",
        "b": "task",
        "c": "scale's task",
        "d": "arm",
        "e": "point",
    }


def test_a_grid_s_points_are_in_order() -> None:
    arm = replace(PLAIN, grid={"lr": [1, 2], "beta": [3, 4]})
    assert arm.points == [{"lr": 1, "beta": 3}, {"lr": 1, "beta": 4}, {"lr": 2, "beta": 3}, {"lr": 2, "beta": 4}]
    assert PLAIN.points == [{}]


def test_names_are_looked_up() -> None:
    claim = examples.make()
    assert claim.arm("quick").label == "Quick"
    for kind in ("task", "arm", "scale", "metric"):
        with pytest.raises(KeyError, match=f"claim parabola: {kind} 'absent' is unknown; it has"):
            getattr(claim, kind)("absent")


def test_a_trial_names_the_option_that_it_lacks() -> None:
    trial = Trial(claim="c", scale="small", task="t", arm="a", seed=0, options={"lr": 1})
    assert trial["lr"] == 1
    with pytest.raises(KeyError, match=r"no option 'beta' for arm 'a', task 't'; it has \['lr'\]"):
        trial["beta"]


def test_measurements_and_worst_values() -> None:
    assert measure(loss=1.0).at is None
    assert measure({"step": 3}, loss=1.0).at == {"step": 3}
    assert Metric(name="loss", label="").worst_value == math.inf
    assert Metric(name="score", label="", better="higher").worst_value == -math.inf
    assert Metric(name="score", label="", better="higher", worst=0.0).worst_value == 0.0


# --------------------------------------------------------------------------------------------------- every seed, or the mean


@pytest.mark.parametrize(("exact", "against"), [((), ""), (("loss",), "global_draw"), (("global_draw",), "")])
def test_every_seed_is_asked_of_exact_metrics_only(exact: tuple[str, ...], against: str) -> None:
    metrics = tuple(replace(m, exact=m.name in exact) for m in examples.METRICS)
    claim = examples.make(metrics=metrics, criteria=(replace(CRITERION, rule="every", against_metric=against),))
    noisy = against or "loss"
    with pytest.raises(ValueError, match=rf"criterion 'better': rule='every' is for exact metrics, and {noisy} is not"):
        check_rules(claim)
    check_rules(replace(claim, metrics=tuple(replace(m, exact=True) for m in metrics)))
    check_rules(replace(claim, criteria=(CRITERION,)))


@pytest.mark.parametrize("slug", sorted(claims.catalogue()))
def test_no_claim_asks_every_seed_of_a_noisy_metric(slug: str) -> None:
    check_rules(claims.load(slug))
