"""Comparisons in a store: which trials are of one, what it is called, and the command that writes its page."""

from __future__ import annotations

import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tasks_for_tests import REGRESSION

from polyak.lab import Store, compare
from polyak.lab.compared import Compared, budget_words, comparisons
from polyak.lab.result import ComparedTrial
from polyak.lab.store import InFlight

LIBRARIES = {"python": "3.11.7", "torch": "2.13.0", "numpy": "2.4.0", "polyak": "0.1.0"}
CLASSES = {"adamw": "torch.optim:AdamW", "adan": "polyak.optim:Adan", "lion": "polyak.optim:Lion"}


def trial(arm: str, state: str, owner: str, *, minute: int = 0, **changes: Any) -> ComparedTrial:
    facts = {
        "claim": "compare-mine",
        "scale": "1 seconds",
        "device": "cpu",
        "versions": {**LIBRARIES, "fingerprint": state},
        "arm": arm,
        "target": CLASSES.get(arm, arm),
        "purpose": "report",
        "seed": 0,
        "number": -1,
        "points": 20,
        "state": "done",
        "owner": owner,
        "seconds": 1.5,
        "finished": f"2026-11-25T07:{minute:02d}:00+00:00",
    }
    return ComparedTrial(**(facts | changes))


def arm(name: str, state: str, owner: str, *, seeds: int = 2, tuned: int = 3, **changes: Any) -> list[ComparedTrial]:
    """All of an arm's trials."""
    tuning = [
        trial(name, state, owner, purpose="tuning", seed=10_000, number=n, points=10, **changes) for n in range(tuned)
    ]
    return tuning + [trial(name, state, owner, seed=s, **changes) for s in range(seeds)]


def arms_of(found: list[Compared]) -> list[list[str]]:
    return [list(c.arms) for c in found]


def test_the_arms_of_a_command_are_one_comparison():
    """Each has a fingerprint of its own, and so is a run of its own to the store."""
    [one] = comparisons([*arm("adamw", "a", "me"), *arm("adan", "b", "me", minute=3)])
    assert (one.task, one.budget, one.done, one.failed, one.seconds) == ("mine", "1 s for each trial", 10, 0, 15.0)
    assert one.arms == {"adamw": "AdamW", "adan": "Adan"}
    assert one.finished == "2026-11-25T07:03:00+00:00"
    assert one.versions == {k: v for k, v in LIBRARIES.items() if k != "polyak"}


def test_an_arm_that_was_added_later_is_of_the_same_comparison():
    trials = [*arm("adamw", "a", "first"), *arm("adan", "b", "first"), *arm("lion", "c", "second", minute=9)]
    assert arms_of(comparisons(trials)) == [["adamw", "adan", "lion"]]


def test_what_went_on_in_another_process_is_of_the_same_comparison():
    begun = arm("adamw", "a", "first", seeds=0)
    rest = [*arm("adamw", "a", "second", tuned=0), *arm("adan", "b", "second")]
    assert arms_of(comparisons([*begun, *rest])) == [["adamw", "adan"]]


def test_a_changed_task_is_another_comparison_and_the_latest_is_first():
    before = [*arm("adamw", "a", "first"), *arm("adan", "b", "first")]
    after = [*arm("lion", "e", "second", minute=9), *arm("adamw", "d", "second", minute=9)]
    assert arms_of(comparisons([*before, *after])) == [["lion", "adamw"], ["adamw", "adan"]]


@pytest.mark.parametrize(
    "change",
    [
        {"claim": "compare-other"},
        {"scale": "2 seconds"},
        {"device": "NVIDIA H100"},
        {"versions": {**LIBRARIES, "torch": "2.12.0", "fingerprint": "a"}},
    ],
)
def test_another_task_budget_device_or_library_is_another_comparison(change):
    trials = arm("adamw", "a", "me")
    assert len(comparisons([*trials, *(replace(t, **change) for t in trials)])) == 2
    other_polyak = replace(trials[0], versions={**trials[0].versions, "polyak": "9"})  # says nothing of the code
    assert len(comparisons([*trials, other_polyak])) == 1


def test_arms_of_one_class_are_called_as_they_were_given():
    trials = [
        trial("adamw", "a", "me"),
        trial("adamw:eps=1", "a", "me", target=CLASSES["adamw"]),
        trial("adan", "b", "me"),
    ]
    [one] = comparisons(trials)
    assert list(one.arms.values()) == ["adamw", "adamw:eps=1", "Adan"]


def test_a_trial_in_flight_is_of_its_commands_comparison():
    first, second = comparisons([*arm("adamw", "a", "me"), *arm("adamw", "b", "other", minute=5)])[::-1]
    place = {"claim": "compare-mine", "scale": "1 seconds", "device": "cpu", "label": "", "since": 0.0}
    flight = InFlight(**place, arm="adan", owner="me", versions={**LIBRARIES, "fingerprint": "c"})
    assert (first.goes_on(flight), second.goes_on(flight)) == (True, False)
    again = replace(flight, arm="adamw", owner="new", versions={**LIBRARIES, "fingerprint": "b"})
    assert (first.goes_on(again), second.goes_on(again)) == (False, True)
    assert not first.goes_on(replace(flight, scale="2 seconds"))
    assert not first.goes_on(replace(flight, owner="new"))


def test_budgets_in_words():
    assert budget_words("1 seconds") == "1 s for each trial"
    assert budget_words("500 steps") == "500 steps for each trial"
    assert budget_words("20 evaluations") == "20 evaluations for each trial"
    assert budget_words("as it was before") == "as it was before"


def test_the_command_is_given_only_where_it_is_certain():
    whole = [*arm("adamw", "a", "me"), *arm("adan:eps=(1, 2)", "b", "me")]
    [one] = comparisons(whole)
    assert one.command == (
        "polyak compare mine.py --arms 'adamw,adan:eps=(1, 2)' --budget 1s/trial --seeds 2 --trials 3"
    )
    fixed = [*arm("adamw", "a", "me"), *arm("adan", "b", "me", tuned=0)]  # all options given: nothing to tune
    assert comparisons(fixed)[0].command.endswith("--arms adamw,adan --budget 1s/trial --seeds 2 --trials 3")
    others = [replace(t, points=40) if t.purpose == "report" else t for t in whole]
    assert comparisons(others)[0].command.endswith("--points 40")
    not_certain = [
        whole[:-1],  # a seed is missing
        whole[1:],  # a tuning trial is
        arm("adamw", "a", "me"),  # one arm alone is no comparison
        [*whole[:-1], replace(whole[-1], state="failed")],
        [*whole, replace(whole[0], owner="other")],  # two searches of one arm
        [*whole[:-1], replace(whole[-1], points=40)],
        [replace(t, scale="some time") for t in whole],
        [t for t in whole if t.purpose == "tuning"],
    ]
    for trials in not_certain:
        assert [c.command for c in comparisons(trials)] == [""]


def test_the_command_of_a_comparison_runs_nothing_that_is_stored(tmp_path: Path):
    task = tmp_path / "line.py"
    task.write_text(REGRESSION)
    home = tmp_path / "home"
    compare(task, "adamw,adan,sgd:momentum=0.9:lr=0.1:weight_decay=0", budget="20steps", seeds=2, trials=2, points=4,
            store=home, progress=False)  # fmt: skip
    with Store(home) as store:
        [found] = comparisons(store.compared())
    assert found.arms == {"adamw": "AdamW", "adan": "Adan", "sgd:momentum=0.9:lr=0.1:weight_decay=0": "SGD"}
    assert (found.task, found.budget, found.done) == ("line", "20 steps for each trial", 10)
    said = shlex.split(found.command)
    assert said[:3] == ["polyak", "compare", "line.py"]
    given = dict(zip(said[3::2], said[4::2], strict=True))
    news = []
    compare(
        task, given["--arms"], budget=given["--budget"], seeds=int(given["--seeds"]), trials=int(given["--trials"]),
        points=int(given["--points"]), store=home, on_progress=news.append,
    )  # fmt: skip
    assert (news[-1].cached, news[-1].total) == (10, 10)
