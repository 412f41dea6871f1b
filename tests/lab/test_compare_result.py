"""What is said of a comparison: intervals, sentences, costs, profiles, doubts; on made-up trials."""

from __future__ import annotations

import math
import random
import statistics
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from scipy import stats

from polyak.lab import words
from polyak.lab.compare.result import profile

from .tasks_for_tests import falling, made_up, together

A = [0.50, 0.52, 0.49, 0.51, 0.53]
BETTER = [0.41, 0.43, 0.38, 0.42, 0.42]  # differences -0.09, -0.09, -0.11, -0.09, -0.11
MIXED = [0.49, 0.53, 0.50, 0.49, 0.54]


def test_intervals_are_of_the_paired_differences() -> None:
    t = made_up({"adamw": A, "adan": BETTER, "lion": MIXED})
    base, adan, lion = t.rows
    differences = np.subtract(BETTER, A)
    known = stats.ttest_1samp(differences, 0)
    assert base.difference is None
    assert adan.difference is not None
    assert adan.difference.estimate == pytest.approx(differences.mean())
    assert (adan.difference.low, adan.difference.high) == pytest.approx(tuple(known.confidence_interval(0.95)))
    assert adan.difference.p_value == pytest.approx(known.pvalue)
    assert adan.difference.adjusted == pytest.approx(2 * known.pvalue), "Lion is compared, too"
    assert (adan.difference.improvement, adan.difference.verdict) == (1.0, "holds")
    assert lion.difference is not None
    assert (lion.difference.improvement, lion.difference.verdict) == (0.4, "undecided")
    assert adan.final == pytest.approx(statistics.mean(BETTER))


def test_the_answer_is_a_sentence_that_says_which_arm_to_use() -> None:
    assert made_up({"adamw": A, "adan": BETTER, "lion": MIXED}).answer == (
        "Use Adan: Adan beats AdamW by 0.08 to 0.11 in loss at equal steps; Lion is undecided (difference −0.018 to 0.018 in loss)."
    )
    higher = made_up({"adamw": A, "adan": BETTER}, better="higher", metric="accuracy", unit="seconds")
    assert higher.answer == "Keep AdamW: Adan loses to AdamW by 8 to 11 points of accuracy at equal time."
    nothing = made_up({"adamw": A, "lion": MIXED})
    assert nothing.answer.startswith("Keep AdamW: Lion is undecided against AdamW at equal steps (difference")
    few = made_up({"adamw": A[:2], "adan": BETTER[:2]})
    assert few.answer.startswith("Keep AdamW: Adan is undecided")
    assert few.answer.endswith("2 seeds cannot decide anything: at least 3 can.")
    same = made_up({"adamw": [0.5] * 3, "adan": [0.25] * 3})
    assert same.answer.endswith("(difference −0.25 in loss, the same with all 3 seeds, which are too few to tell).")
    lost = made_up({"adamw": A, "adan": [math.inf] * 5})
    assert lost.answer == "Keep AdamW: Adan loses to AdamW (5 of 5 trials of Adan diverged) at equal steps."
    some = made_up({"adamw": A, "adan": [*BETTER[:4], math.inf]})
    assert "Adan is undecided against AdamW at equal steps (1 of 5 trials diverged)" in some.answer
    assert made_up({"adamw": [math.inf] * 5, "adan": [math.inf] * 5}).answer.startswith("Use none of these: ")


def test_of_many_arms_one_looks_better_by_chance() -> None:
    """The interval of one arm alone may exclude zero where the verdict, which is of all together, is undecided."""
    near = [a + d for a, d in zip(A, (-0.02, -0.05, -0.03, -0.01, -0.01), strict=True)]
    names = ("adan", "lion", "nadam", "radam", "adagrad")
    alone, many = (
        made_up({"adamw": A, "adan": near}),
        made_up({"adamw": A, **dict.fromkeys(names, MIXED), "adan": near}),
    )
    assert alone.rows[1].difference is not None
    assert (alone.rows[1].difference.verdict, alone.answer[:8]) == ("holds", "Use Adan")
    adan = many.rows[1].difference
    assert adan is not None
    assert (adan.verdict, adan.high < 0) == ("undecided", True)
    assert adan.adjusted == pytest.approx(5 * adan.p_value)
    assert "Adan: difference −0.045 to −0.003 in loss, but with so many arms p = 0.16" in many.answer


# ----------------------------------------------------------------------------------------------------------- every figure


def test_what_it_costs_is_compared_with_an_interval() -> None:
    """By geometric means over seeds, each timed to the worse one of both ends."""
    down = {
        "adamw": [[3.0, 2.0, 1.0, 0.5]] * 3,
        "adan": [[1.0, 0.7, 0.6, 0.4], [2.0, 1.0, 0.6, 0.5], [2.0, 0.5, 0.5, 0.5]],
    }
    finals = {arm: [way[-1] for way in ways] for arm, ways in down.items()}
    base, adan = made_up(finals, curves=down).rows
    assert base.spent_ratio is None
    logs = np.log([4 / 4, 4 / 4, 2 / 4])
    low, high = np.exp(stats.ttest_1samp(logs, 0).confidence_interval(0.95))
    found = adan.spent_ratio
    assert found is not None
    assert (found.value, found.low, found.high) == pytest.approx((np.exp(logs.mean()), low, high))
    # To a target that was asked for both may come early, or never.
    asked = made_up(finals, curves=down, target=0.65).rows[1].spent_ratio
    assert asked is not None
    assert asked.value == pytest.approx(np.exp(np.log([3 / 4, 3 / 4, 2 / 4]).mean()))
    never = made_up(finals, curves=down, target=0.1).rows[1].spent_ratio
    assert never is not None
    assert (never.value, never.low, never.high) == (1.0, 1.0, 1.0), "equal, where neither gets there"
    once = made_up(finals, curves=down, target=0.45).rows[1].spent_ratio
    assert once is not None
    assert (once.value, once.low, once.high) == (0.0, 0.0, math.inf)


def test_a_copy_of_the_baseline_is_not_slower_than_it() -> None:
    """To the baseline's own end a second run of it comes later than the first, if at all; over many seeds this is no chance."""
    rng = np.random.default_rng(0)
    ways = {arm: (np.linspace(2, 1, 20) + 0.1 * rng.standard_normal((60, 20))).tolist() for arm in ("adamw", "adan")}
    row = made_up({arm: [way[-1] for way in own] for arm, own in ways.items()}, curves=ways).rows[1]
    assert row.spent_ratio is not None
    assert row.spent_ratio.low < 1 < row.spent_ratio.high
    assert row.reached < 50, "its ends are not the baseline's"


def test_the_chance_to_be_better_has_an_interval() -> None:
    row = made_up({"adamw": A, "lion": MIXED}).rows[1]
    assert row.difference is not None
    assert row.difference.improvement == 0.4
    known = stats.binomtest(2, 5).proportion_ci(0.95, "exact")
    assert row.chance == pytest.approx((known.low, known.high))
    records = together(made_up({"adamw": A, "lion": MIXED})).records()
    assert (records[1]["improvement_low"], records[1]["improvement_high"]) == row.chance
    assert records[0]["improvement_low"] is None


def test_the_best_is_said_first() -> None:
    finals = {
        "adamw": A,
        "sgd": [a + 0.3 for a in A],
        "adan": [a - 0.02 for a in A],
        "lion": MIXED,
        "nadam": [a + 0.1 for a in A],
        "radam": [a - 0.2 for a in A],
    }
    said = made_up(finals).said
    assert [clause.removeprefix("Use RAdam: ").split()[0] for clause in (said.head, *said.rest)] == [
        "RAdam",
        "Adan",
        "NAdam",
        "SGD",
        "Lion",
    ]
    assert str(said) == made_up(finals).answer
    assert made_up(finals).answer.startswith(
        "Use RAdam: RAdam beats AdamW by 0.2 in loss at equal steps; Adan beats AdamW by 0.02 in loss; NAdam loses to AdamW by 0.1 "
    )
    higher = made_up(finals, better="higher", metric="score").said
    assert [clause.removeprefix("Use SGD: ").split()[0] for clause in (higher.head, *higher.rest)] == [
        "SGD",
        "NAdam",
        "Adan",
        "RAdam",
        "Lion",
    ]
    assert said.long
    assert said.short == "Use RAdam: RAdam beats AdamW by 0.2 in loss at equal steps; 4 more on its page."
    few = made_up(dict(list(finals.items())[:4])).said
    assert not few.long
    assert few.short == str(few)
    none = made_up(dict.fromkeys(finals, MIXED)).said
    assert none.long
    assert none.head == "Keep AdamW: SGD, Adan, Lion, NAdam and RAdam are undecided against AdamW at equal steps"
    assert none.rest == tuple(f"{arm}: difference 0 in loss" for arm in ("SGD", "Adan", "Lion", "NAdam", "RAdam"))


def test_over_tasks_who_wins_most_is_said_first() -> None:
    worst = [a + 0.3 for a in A]
    tasks = [
        made_up({"adamw": A, "sgd": worst, "lion": MIXED, "adan": BETTER}, name="one"),
        made_up({"adamw": A, "sgd": worst, "lion": BETTER, "adan": BETTER}, name="two"),
    ]
    assert together(*tasks).answer == (
        "Use Adan: against AdamW at equal steps, of 2 tasks Adan wins 2; Lion wins 1, is undecided on 1; SGD loses 2."
    )


def test_the_answer_over_tasks() -> None:
    tasks = [
        made_up({"adamw": A, "adan": BETTER, "lion": MIXED}, name="one"),
        made_up({"adamw": A, "adan": MIXED, "lion": BETTER}, name="two"),
        made_up({"adamw": BETTER, "adan": A, "lion": MIXED}, name="three"),
    ]
    each = "wins 1, loses 1, is undecided on 1"
    few = [made_up({arm: values[:2] for arm, values in (("adamw", A), ("adan", BETTER))}, name=n) for n in "ab"]
    assert together(*few).answer == (
        "Keep AdamW: against AdamW at equal steps, of 2 tasks Adan is undecided on 2. 2 seeds cannot decide anything: at least 3 "
        "can."
    )
    assert (
        together(*tasks).answer == f"Choose by task: against AdamW at equal steps, of 3 tasks Adan {each}; Lion {each}."
    )
    assert together(tasks[0], tasks[0]).answer.startswith("Use Adan: ")


def test_steps_and_seconds_to_a_target() -> None:
    curves = {
        "adamw": [[0.9, 0.8, 0.6, 0.5]] * 5,
        "adan": [[0.6, 0.5, 0.45, 0.4]] * 3 + [[0.9, 0.7, 0.5, 0.4], [0.9, 0.9, 0.9, 0.9]],
        "lion": [[0.9, 0.9, 0.9, 0.9]] * 4 + [[0.1, 0.9, 0.9, 0.9]],
    }
    finals = {name: [c[-1] for c in runs] for name, runs in curves.items()}
    adamw, adan, lion = made_up(finals, curves=curves).rows
    assert (adamw.spent_to_target, adamw.seconds_to_target, adamw.reached) == (4, pytest.approx(0.4), 5)
    assert (adan.spent_to_target, adan.seconds_to_target, adan.reached) == (2, pytest.approx(0.2), 4)
    assert (lion.spent_to_target, lion.reached) == (math.inf, 1)
    assert lion.best == pytest.approx((4 * 0.9 + 0.1) / 5)
    # Each seed has its own target; one with which the baseline diverges has none.
    own = {"adamw": [[0.9, 0.5], [0.9, 0.3], [0.9, 0.4]], "adan": [[0.5, 0.5], [0.4, 0.4], [0.4, 0.4]]}
    ends = {name: [c[-1] for c in runs] for name, runs in own.items()}
    adamw, adan = made_up(ends, curves=own).rows
    assert (adamw.spent_to_target, adamw.reached) == (2, 3)
    assert (adan.spent_to_target, adan.reached) == (1, 2)
    adamw, adan = made_up({**ends, "adamw": [0.5, 0.3, math.inf]}, curves=own).rows
    assert (adamw.spent_to_target, adamw.reached) == (2, 2)
    assert (adan.spent_to_target, adan.reached) == (math.inf, 1)
    asked = made_up(finals, curves=curves, target=0.8).rows
    assert [r.spent_to_target for r in asked] == [2, 1, math.inf]


def test_a_lower_range_is_proposed_where_there_is_a_learning_rate() -> None:
    lost = [(0.001, math.inf), (0.01, math.inf)]
    for arm, ends in (("adamw:lr=0.001..1", "; try a lower range: adamw:lr=3e-05..0.001"), ("adamw:lr=1:eps=1..2", "")):
        said = [w for w in made_up({"sgd:lr=0.1": A, arm: BETTER}, tuning={arm: lost}).warnings if "tuning trial" in w]
        assert [w.partition(" are used")[2] for w in said] == [ends]


def test_a_best_value_at_an_end_is_doubted() -> None:
    def said(tuned: list[tuple[float, float]], arm: str = "adamw:betas=(0.9,0.98)") -> list[str]:
        return [w for w in made_up({arm: A, "sgd:lr=0.1": BETTER}, tuning={arm: tuned}).warnings if "end of what" in w]

    # made_up's trials use lr 0.01
    assert said([(0.001, 0.5), (0.01, 0.4), (0.1, 0.6)]) == []
    [low] = said([(0.01, 0.4), (0.03, 0.5), (0.1, 0.6)], "adamw:betas=(0.9,0.98):lr=0.01..0.1")
    assert low == (
        "AdamW (betas (0.9,0.98), …): its best lr, 0.01, is at the low end of what was tried, and a better one may be beyond: "
        "adamw:betas=(0.9,0.98):lr=0.0003..0.1"
    )
    [high] = said([(0.001, 0.4), (0.003, 0.5), (0.01, 0.6)], "torch.optim:AdamW:lr=0.001..0.01")
    assert high.endswith(
        "is at the high end of what was tried, and a better one may be beyond: torch.optim:AdamW:lr=0.001..0.3"
    )
    # Two trials are inside of the range: either may be the best, and the range goes on beyond it.
    for rates in ((0.01, 0.1), (0.001, 0.01)):
        assert (
            said([(lr, 0.4) for lr in rates], f"adamw:betas=(0.9,0.98):lr={rates[0] / 3.16}..{rates[1] * 3.16}") == []
        )
    lost = made_up({"adamw": A, "sgd": BETTER}, tuning={"sgd": [(0.01, math.inf), (0.1, math.inf)]}).warnings
    assert any(w.startswith("SGD: every tuning trial diverged") and w.endswith("sgd:lr=0.0001..0.003") for w in lost)


def test_divergence_is_counted_and_is_the_worst() -> None:
    t = made_up({"adamw": A, "adan": [*BETTER[:3], math.inf, math.inf]})
    assert (t.rows[1].diverged, t.rows[1].final) == (2, math.inf)
    assert t.rows[1].spent == 4
    bounded = made_up(
        {"adamw": A, "adan": [*A[:4], -math.inf]}, better="higher", metric="accuracy", initial={"accuracy": 0.1}
    )
    assert bounded.rows[1].final == pytest.approx(sum(A[:4]) / 5), "the worst of a share is none"


def test_seeds_with_which_both_diverge_say_nothing() -> None:
    lost = made_up({"adamw": [math.inf] * 5, "adan": [math.inf] * 5, "lion": [*A[:3], math.inf, math.inf]})
    assert lost.answer == (
        "Use none of these: Adan and Lion are undecided against AdamW at equal steps (Adan: 5 of 5 trials diverged; "
        "Lion: 2 of 5 trials diverged)."
    )
    adan, lion = (row.difference for row in lost.rows[1:])
    assert adan is not None
    assert lion is not None
    assert (adan.estimate, adan.p_value, adan.improvement) == (0, 1, 0.5)
    assert lion.per_seed == (-math.inf, -math.inf, -math.inf, 0, 0)


def test_why_all_trials_of_an_arm_diverged_is_told() -> None:
    lost = made_up({"adamw": A, "adan": [math.inf] * 5, "lion": [*A[:4], math.inf]})
    assert lost.warnings == ("Adan: every trial diverged: nan",)

    def said(*messages: str) -> tuple[str, ...]:
        told = dict(enumerate(messages))
        trials = [replace(t, message=told[t.seed] if t.arm == "adan" else t.message) for t in lost.result.trials]
        return replace(lost, result=replace(lost.result, trials=tuple(trials))).warnings

    assert said(*["loss is nan at step 3\nmore"] * 5) == ("Adan: every trial diverged: loss is nan at step 3",)
    assert said("loss is inf", *["loss is nan"] * 4) == ("Adan: every trial diverged: loss is inf (the first)",)
    assert said(*[""] * 5) == ("Adan: every trial diverged",)


def test_a_baseline_that_diverged_is_told() -> None:
    said = made_up({"adamw": [*A[:4], math.inf], "adan": A}).answer
    assert said == "Keep AdamW: Adan is undecided against AdamW at equal steps (1 of 5 trials of AdamW diverged)."


def test_what_lies_between_0_and_1_at_first_need_not_do_so() -> None:
    """One that diverged is not better than an R² below zero."""
    t = made_up({"adamw": [-3.0] * 5, "adan": [-math.inf] * 5}, better="higher", metric="r2", initial={"r2": 0.01})
    assert t.answer == "Keep AdamW: Adan loses to AdamW (5 of 5 trials of Adan diverged) at equal steps."


def test_amounts_that_are_equal_are_said_once_and_an_error_has_no_points() -> None:
    t = made_up({"adamw": [0.5] * 5, "adan": [0.25] * 5}, metric="acceleration_error")
    assert t.answer == "Use Adan: Adan beats AdamW by 0.25 in acceleration error at equal steps."


def test_performance_profiles_by_hand() -> None:
    inf = math.inf
    costs = {"a": [1.0, 2.0, 4.0, inf], "b": [2.0, 1.0, 4.0, inf], "c": [4.0, inf, 1.0, inf]}
    assert profile(costs) == {
        "a": [(1.0, 0.25), (2.0, 0.5), (4.0, 0.75)],
        "b": [(1.0, 0.25), (2.0, 0.5), (4.0, 0.75)],
        "c": [(1.0, 0.25), (4.0, 0.5)],
    }
    assert profile({"a": [0.0, 0.0], "b": [3.0, 0.0]}) == {"a": [(1.0, 1.0)], "b": [(1.0, 0.5)]}
    assert profile({"a": [inf], "b": [3.0]}) == {"a": [(1.0, 0.0)], "b": [(1.0, 1.0)]}


@pytest.mark.parametrize(
    ("found", "says"),
    [
        (made_up({"adamw": A, "adan": [0.0] * 5}), "Adan is perfect on every seed (loss 0)"),
        (
            made_up({"adamw": A, "adan": [1.0] * 5}, better="higher", metric="accuracy", initial={"accuracy": 0.1}),
            "Adan is perfect on every seed (accuracy 1)",
        ),
        (made_up({"adamw": A, "adan": [0.01] * 5}), "Adan is more than 10 times as good as AdamW"),
        (
            made_up({"adamw": A, "adan": BETTER}, initial={"loss": 0.3}),
            "no arm improves on the untrained model (loss 0.3)",
        ),
        (
            made_up({"adamw": A, "adan": BETTER}, validates=True, tuning={"adan": [(0.01, 0.05)]}),
            "Adan is far better on the data it was tuned by (0.05) than on the reported (0.412)",
        ),
        (
            made_up({"adamw": A, "adan": BETTER}, unit="seconds", processor=0.43),
            "trials of AdamW had a processor for 43 % of their time only",
        ),
        (made_up({"adamw": A, "adan": BETTER}, warnings=("the target is among the inputs",)), "the target is among"),
    ],
)
def test_what_is_too_good_is_doubted(found: Any, says: str) -> None:
    assert len(found.warnings) == 1
    assert says in found.warnings[0]


def test_nothing_is_doubted_without_a_reason() -> None:
    tuned = {"adamw": [(0.01, 0.5)], "adan": [(0.01, 0.4)]}
    assert made_up({"adamw": A, "adan": BETTER}, validates=True, tuning=tuned, initial={"loss": 2.3}).warnings == ()


def test_profiles_are_drawn_over_tasks() -> None:
    rng = random.Random(0)
    finals = {"adamw": A, "adan": BETTER}
    curves = {arm: [falling(rng, v) for v in values] for arm, values in finals.items()}
    both = together(*(made_up(finals, name=name, curves=curves) for name in ("one", "two")))
    assert "share of tasks" in {t.get_text() for t in both.figure("profiles").texts}
    assert both.task("two").name == "two"
    with pytest.raises(KeyError, match="task 'three' is unknown; there are one, two"):
        both.task("three")


def test_a_comparison_says_itself_in_a_few_lines() -> None:
    t = made_up({"adamw": A, "adan": BETTER, "lion": MIXED})
    assert repr(together(t)).splitlines() == [
        t.answer,
        "  AdamW  loss 0.51, baseline",
        "  Adan   loss 0.412, difference −0.1 (95 %: −0.11 to −0.08), better",
        "  Lion   loss 0.51, difference 0 (95 %: −0.018 to 0.018), undecided",
    ]
    both = repr(together(t, made_up({"adamw": A, "adan": BETTER, "lion": MIXED}, name="two"))).splitlines()
    assert (both[1], both[5], len(both)) == ("made:", "two:", 9)


@pytest.mark.parametrize(
    ("value", "low", "high", "says"),
    [
        (-3.19e-5, -0.00294, 0.003, "0"),
        (-0.00476, -0.00663, -0.00149, "−0.0048"),
        (0.5004, 0.5001, 0.5009, "0.5004"),  # far from zero, the width decides
        (48_123.4, 41_000.0, 52_000.0, "48,000"),
        (-2.23e-6, -3.2e-6, -1.1e-6, "−2.2e−6"),
        (0.001, 0.001, 1.2, "0.001"),  # an end on one side of zero is not said to be zero
        (-0.001, -0.001, 1.2, "0"),
        (0.1234, -math.inf, math.inf, "0.123"),
        (math.inf, 0.1, math.inf, "∞"),
        (0.0, 0.0, 0.0, "0"),
    ],
)
def test_an_estimate_has_the_decimals_of_its_interval(value: float, low: float, high: float, says: str) -> None:
    assert words.rounded(value, low, high) == says


@pytest.mark.parametrize(
    ("seconds", "says"),
    [(2.84, "2.8 s"), (3.41, "3.4 s"), (0.0634, "0.063 s"), (9.96, "10 s"), (12.3, "12 s"), (125, "2 min 05 s")],
)
def test_short_times_have_two_digits(seconds: float, says: str) -> None:
    assert words.time(seconds) == says
