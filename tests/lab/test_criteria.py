"""A claim declares its criteria by what they ask: each constructor gives the criterion that it is named for."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import pytest

from polyak.lab.claim import Criterion, Metric
from polyak.lab.criteria import Ask

METRICS = (
    Metric("loss", "loss"),
    Metric("accuracy", "accuracy", better="higher"),
    Metric("order", "order", exact=True),
)
ASK = Ask(METRICS, kind="effect", task="digits", metric="loss", arm="adan", over="adamw")


def full(**changes: Any) -> dict[str, Any]:
    facts = {
        "name": "c",
        "says": "so",
        "kind": "effect",
        "task": "digits",
        "metric": "loss",
        "arm": "adan",
        "against": "adamw",
    }
    return asdict(Criterion(**{**facts, **changes}))  # fmt: skip


@pytest.mark.parametrize(
    ("made", "changes"),
    [
        (ASK.at_most("c", 0.5, "so"), {"op": "<=", "bound": 0.5}),
        (ASK.below("c", 0.5, "so"), {"op": "<", "bound": 0.5}),
        (ASK.at_least("c", 0.5, "so"), {"op": ">=", "bound": 0.5}),
        (ASK.above("c", 0.5, "so"), {"op": ">", "bound": 0.5}),
        (ASK.beats("c", "so"), {"op": "<", "bound": 1.0}),
        (ASK.beats("c", "so", minus="sgd"), {"op": "<", "bound": 0.0, "compare": "difference", "against": "sgd"}),
        (ASK.beats("c", "so", metric="accuracy"), {"op": ">", "bound": 1.0, "metric": "accuracy"}),
        (
            ASK.beats("c", "so", metric="accuracy", minus="adamw"),
            {"op": ">", "bound": 0.0, "metric": "accuracy", "compare": "difference"},
        ),
        (ASK.at_most("c", 2.0, "so", over=""), {"bound": 2.0, "compare": "value", "against": ""}),
        (ASK.at_most("c", 2.0, "so", over=["a", "b"]), {"bound": 2.0, "against": ("a", "b")}),
        (
            ASK.order("c", 2, "so", metric="order", over="", kind="mechanism", rule="every"),
            {"op": ">=", "bound": 1.9, "metric": "order", "compare": "value", "against": "", "kind": "mechanism", "rule": "every"},
        ),
        (ASK.order("c", 3, "so", slack=0.25), {"op": ">=", "bound": 2.75}),
        (
            ASK.at_most(
                "c", 1.0, "so", control="hollow", gating=False, against_metric="accuracy", both_diverged="equal", rounding=1e-6
            ),
            {"control": "hollow", "gating": False, "against_metric": "accuracy", "both_diverged": "equal", "rounding": 1e-6},
        ),
    ],
)  # fmt: skip
def test_a_constructor_asks_what_it_is_named_for(made: Criterion, changes: dict[str, Any]) -> None:
    assert asdict(made) == full(**changes)


def test_defaults_are_set_once_and_may_be_changed() -> None:
    changed = ASK.but(task="text", minus="sgd", gating=False)
    wanted = full(task="text", against="sgd", compare="difference", gating=False, bound=0.1)
    assert asdict(changed.at_most("c", 0.1, "so")) == wanted
    assert asdict(changed.at_most("c", 0.1, "so", task="digits", over="adamw", gating=True)) == full(bound=0.1)
    assert asdict(ASK.at_most("c", 0.1, "so")) == full(bound=0.1)  # as it was


def test_a_table_gives_a_criterion_for_each_row() -> None:
    rows = ASK.table(
        "at_most", "name bound metric says", ("one", 0.5, "loss", "a"), ("two", 0.7, "order", "b"), over="sgd"
    )
    assert [asdict(c) for c in rows] == [
        full(name="one", bound=0.5, says="a", against="sgd"),
        full(name="two", bound=0.7, says="b", metric="order", against="sgd"),
    ]
    assert ASK.table("beats", "name says over", ("c", "so", "adamw"))[0] == ASK.beats("c", "so")
    with pytest.raises(ValueError, match=r"entry for each of name, says, got \('c',\)"):
        ASK.table("beats", "name says", ("c",))
    for wrong in (lambda: ASK.table("beats", "name bound says"), lambda: ASK.table("beats", "name says", bound=1.0)):
        with pytest.raises(ValueError, match=r"columns of beats must be among .*got bound"):
            wrong()


def test_what_says_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match=r"criterion 'c': say whom it beats by over= or minus=, got ''"):
        ASK.beats("c", "so", over="")
    with pytest.raises(
        ValueError, match=r"criterion 'c': unknown metric 'lost'; it has \['accuracy', 'loss', 'order'\]"
    ):
        ASK.beats("c", "so", metric="lost")
    with pytest.raises(ValueError, match=r"criterion 'c': say over= or minus=, one of the two, got 'a' and 'b'"):
        ASK.at_most("c", 1.0, "so", over="a", minus="b")
    with pytest.raises(TypeError, match="unexpected keyword argument 'bount'"):
        ASK.at_most("c", 1.0, "so", bount=2.0)  # pyright: ignore[reportCallIssue]
