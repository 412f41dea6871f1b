"""Verdicts against values worked out by hand."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import claims_for_tests as examples
import numpy as np
import pytest
import scipy.stats

from polyak.lab import intervals
from polyak.lab.claim import KINDS, Arm, Claim, Criterion, Metric, Scale, Task
from polyak.lab.result import CriterionResult, TrialResult, verdict
from polyak.lab.statistics import corrected, judge

INF = math.inf


def claim_of(*criteria: Criterion, seeds: int = 5, metrics: tuple[Metric, ...] | None = None) -> Claim:
    return examples.make(
        arms=(
            Arm(name="plain", label="Plain", role="baseline"),
            Arm(name="other", label="Other", role="baseline"),
            Arm(name="quick", label="Quick", role="method"),
            Arm(name="hollow", label="Hollow", role="control"),
        ),
        tasks=(Task(name="parabola", label="Parabola"),),
        scales=(Scale(name="small", says="", seeds=seeds),),
        metrics=metrics
        or (Metric(name="loss", label="loss"), Metric(name="score", label="", better="higher", worst=0)),
        criteria=criteria,
    )


def criterion(**changes: Any) -> Criterion:
    facts = {"name": "c", "says": "", "task": "parabola", "metric": "loss", "arm": "quick", "against": "plain"}
    facts["kind"] = "effect"
    return Criterion(**{**facts, **changes})


def trials_of(metric: str = "loss", **arms: list[float]) -> list[TrialResult]:
    """One trial per value; an infinite value or NaN marks a diverged trial, which scores as infinity."""
    return [
        TrialResult(
            task="parabola",
            arm=arm,
            seed=seed,
            purpose="report",
            point={},
            values={metric: value},
            curve=(),
            seconds=1.0,
            diverged=math.isinf(value),
        )
        for arm, values in arms.items()
        for seed, value in enumerate(values)
    ]


def judged(c: Criterion, metric: str = "loss", *, seeds: int | None = None, **arms: list[float]) -> CriterionResult:
    count = seeds or len(next(iter(arms.values())))
    (result,) = judge(claim_of(c), trials_of(metric, **arms), range(count))
    return result


# -- each seed's statistic -------------------------------------------------------------------------------------------------


def test_ratio_difference_and_value() -> None:
    arms = {"quick": [1.0, 2.0, 3.0], "plain": [2.0, 2.0, 4.0]}
    assert judged(criterion(rule="every"), **arms).per_seed == (0.5, 1.0, 0.75)
    assert judged(criterion(compare="difference", bound=0.0), **arms).per_seed == (-1.0, 0.0, -1.0)
    assert judged(criterion(compare="value", against="", bound=3.0), **arms).per_seed == (1.0, 2.0, 3.0)


def test_the_best_rival_is_taken_seed_by_seed() -> None:
    c = criterion(against=("plain", "other"), compare="difference")
    assert judged(c, quick=[0.0] * 3, plain=[1.0, 5.0, 3.0], other=[4.0, 2.0, 3.0]).per_seed == (-1.0, -2.0, -3.0)
    c = criterion(against=("plain", "other"), compare="difference", metric="score", op=">=")
    assert judged(c, "score", quick=[0.0] * 3, plain=[1.0, 5.0, 3.0], other=[4.0, 2.0, 3.0]).per_seed == (
        -4.0,
        -5.0,
        -3.0,
    )


def test_another_metric_may_stand_on_the_other_side() -> None:
    metrics = (Metric(name="half", label=""), Metric(name="full", label=""))
    c = criterion(metric="half", against_metric="full", rule="every", bound=2.0)
    trials = trials_of("half", quick=[2.0, 3.0, 4.0]) + trials_of("full", plain=[2.0, 2.0, 2.0])
    (result,) = judge(claim_of(c, metrics=metrics), trials, range(3))
    assert result.per_seed == (1.0, 1.5, 2.0)
    assert result.verdict == "holds"
    assert result.statistic == "ratio of half, quick / full of plain"


def test_zeros_in_ratios() -> None:
    result = judged(criterion(rule="every"), quick=[0.0, 0.0, 1.0], plain=[0.0, 1.0, 0.0])
    assert result.per_seed == (1.0, 0.0, INF)
    assert (result.verdict, result.seeds_passing) == ("fails", 2)


def test_what_differs_by_rounding_is_equal() -> None:
    c = criterion(compare="difference", bound=0.0, rounding=1e-6)
    near = {"quick": [0.15 + 1e-7] * 5 + [0.2], "plain": [0.15] * 5 + [0.1]}
    result = judged(c, **near)
    assert result.per_seed[:5] == (0.0,) * 5
    assert result.per_seed[5] == pytest.approx(0.1)
    assert result.improvement == pytest.approx(2.5 / 6)
    always = {"quick": [0.15 + 1e-7] * 6, "plain": [0.15] * 6}
    more = criterion(compare="difference", bound=0.0, op=">")
    assert judged(more, **always).verdict == "holds"
    assert judged(replace(more, rounding=1e-6), **always).verdict != "holds"
    assert judged(c, quick=[INF] * 6, plain=[1.0] * 6).verdict == "fails"  # what diverged is no rounding
    assert judged(c, quick=[0.0] * 6, plain=[1e-9] * 6).per_seed == (-1e-9,) * 6  # relative to the values


def test_negative_values_have_no_ratio() -> None:
    with pytest.raises(ValueError, match=r"criterion 'c'.*>= 0, got -1.0"):
        judged(criterion(), quick=[-1.0, 1.0, 1.0], plain=[1.0, 1.0, 1.0])
    with pytest.raises(ValueError, match=r"criterion 'c'.*bound of a ratio must be > 0, got 0"):
        judged(criterion(bound=0.0), quick=[1.0], plain=[1.0])


# -- divergence ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("compare", "bound"), [("ratio", 1.0), ("difference", 0.0)])
def test_divergence_on_either_side(compare: Any, bound: float) -> None:
    c = criterion(compare=compare, bound=bound, rule="every")
    alone = judged(c, quick=[INF, 1.0, 1.0], plain=[1.0, 1.0, 1.0])
    assert (alone.per_seed[0], alone.verdict) == (INF, "fails")
    rival = judged(c, quick=[1.0, 1.0, 1.0], plain=[INF, 1.0, 1.0])
    assert (rival.per_seed[0], rival.verdict) == (0.0 if compare == "ratio" else -INF, "holds")
    both = judged(c, quick=[INF, 1.0, 1.0], plain=[INF, 1.0, 1.0])
    assert (both.per_seed[0], both.verdict, both.seeds_passing) == (INF, "fails", 2)
    assert both.improvement == pytest.approx(0.5)


def test_both_diverged_satisfies_no_criterion_upwards_either() -> None:
    for compare, least in (("ratio", 0.0), ("difference", -INF)):
        c = criterion(compare=compare, metric="score", op=">=", bound=0.5, rule="every")
        trials = [
            replace(t, diverged=t.seed == 0, values={"score": 0.0 if t.seed == 0 else t.values["score"]})
            for t in trials_of("score", quick=[0.0, 3.0, 3.0], plain=[0.0, 1.0, 1.0])
        ]
        (result,) = judge(claim_of(c), trials, range(3))
        assert (result.per_seed[0], result.verdict) == (least, "fails")


def test_both_diverged_to_a_finite_worst_is_no_tie() -> None:
    c = criterion(rule="every")
    metrics = (Metric(name="loss", label="", worst=10.0),)
    trials = [replace(t, diverged=True) for t in trials_of(quick=[10.0] * 3, plain=[10.0] * 3)]
    (result,) = judge(claim_of(c, metrics=metrics), trials, range(3))
    assert (result.verdict, result.seeds_passing) == ("fails", 0)


def test_a_rival_that_did_not_diverge_is_met_even_where_worst_is_mild() -> None:
    c = criterion(against=("plain", "other"), rule="every")
    trials = [
        replace(t, diverged=t.arm == "other") for t in trials_of(quick=[6.0] * 3, plain=[12.0] * 3, other=[10.0] * 3)
    ]
    (result,) = judge(claim_of(c), trials, range(3))
    assert result.per_seed == (0.5, 0.5, 0.5)


def test_worst_of_what_should_be_high_has_a_ratio() -> None:
    metrics = (Metric(name="score", label="", better="higher"),)
    c = criterion(metric="score", op=">=", rule="every")
    trials = trials_of("score", quick=[-INF, 2.0, 2.0], plain=[1.0, -INF, 1.0])
    (result,) = judge(claim_of(c, metrics=metrics), trials, range(3))
    assert result.per_seed == (0.0, INF, 2.0)


def test_one_divergence_does_not_win_the_mean() -> None:
    """The rival diverges once and is better otherwise: the mean is at infinity, but the evidence is not enough."""
    result = judged(criterion(), quick=[2.0] * 8, plain=[INF] + [1.0] * 7)
    assert (result.estimate, result.low, result.high) == (0.0, 0.0, INF)
    assert result.verdict == "undecided"


def test_divergence_of_every_trial_of_the_arm_fails() -> None:
    result = judged(criterion(), quick=[INF] * 5, plain=[1.0, 2.0, 3.0, 4.0, 5.0])
    assert (result.estimate, result.low, result.high) == (INF, INF, INF)
    assert (result.p_value, result.verdict, result.improvement) == (4**-4, "fails", 0.0)


def test_as_many_infinities_on_both_sides_leave_the_finite_ones() -> None:
    c = criterion(compare="difference", bound=0.0)
    result = judged(c, quick=[INF, 1.0, 1.0, 1.0, 1.0], plain=[1.0, INF, 2.0, 2.0, 2.0])
    assert result.estimate == pytest.approx(-0.6)
    assert (result.low, result.high) == (-INF, INF)
    assert not math.isnan(result.p_value)
    assert result.verdict == "undecided"


# -- rules -----------------------------------------------------------------------------------------------------------------


def test_every_seed_must_satisfy() -> None:
    c = criterion(rule="every", bound=0.5)
    assert judged(c, quick=[1.0, 1.0, 1.0], plain=[2.0, 3.0, 4.0]).verdict == "holds"
    one_bad = judged(c, quick=[1.0, 1.0, 1.0], plain=[2.0, 1.9, 4.0])
    assert (one_bad.verdict, one_bad.seeds_passing) == ("fails", 2)
    assert judged(replace(c, op="<"), quick=[1.0] * 3, plain=[2.0, 3.0, 4.0]).verdict == "fails"


def test_missing_trials_leave_it_undecided() -> None:
    result = judged(criterion(rule="every"), seeds=5, quick=[1.0] * 4, plain=[2.0] * 5)
    assert (result.verdict, result.note) == ("undecided", "trials are missing: 4 of 5 seeds are complete")
    nothing = judged(criterion(), seeds=5, quick=[])
    assert (nothing.verdict, nothing.per_seed, nothing.low, nothing.high) == ("undecided", (), 0.0, INF)


def test_two_seeds_are_too_few_unless_the_scale_declares_them() -> None:
    c = criterion(rule="every")
    trials = trials_of(quick=[1.0, 1.0], plain=[2.0, 2.0])
    (result,) = judge(claim_of(c), trials, range(2), scale="small")
    assert (result.verdict, result.note) == ("undecided", "2 seeds cannot decide: at least 3 are needed")
    (result,) = judge(claim_of(c, seeds=1), trials, range(2), scale="small")
    assert result.verdict == "holds"
    (result,) = judge(claim_of(replace(c, rule="mean"), seeds=1), trials, range(2), scale="small")
    assert result.note == "2 seeds cannot decide: at least 3 are needed"


QUICK, PLAIN = [1.0, 1.1, 0.9, 1.2, 1.0], [2.0, 2.1, 2.2, 1.9, 2.0]


@pytest.mark.parametrize("n", [3, 4, 5])
def test_the_mean_decides_by_students_t(n: int) -> None:
    quick, plain = QUICK[:n], PLAIN[:n]
    logs = np.log(np.divide(quick, plain))
    known = scipy.stats.ttest_1samp(logs, 0)
    ends = np.exp(known.confidence_interval(0.95))
    better = judged(criterion(), quick=quick, plain=plain)
    assert (better.verdict, better.improvement) == ("holds", 1.0)
    assert (better.p_value, better.adjusted) == pytest.approx((known.pvalue, known.pvalue), rel=1e-12)
    assert (better.estimate, better.low, better.high) == pytest.approx((np.exp(logs.mean()), *ends), rel=1e-12)
    worse = judged(criterion(), quick=plain, plain=quick)
    assert (worse.verdict, worse.improvement) == ("fails", 0.0)
    assert worse.p_value == pytest.approx(known.pvalue, rel=1e-12), "both sides are alike"
    # The same distance from another bound is as likely.
    assert judged(criterion(bound=0.1), quick=quick, plain=np.multiply(10, plain).tolist()).p_value == pytest.approx(
        known.pvalue, rel=1e-9
    )


def test_criteria_that_count_are_corrected_for_their_number() -> None:
    """Holm's steps, by hand: the smallest of three p-values counts three times, the next one twice."""
    rng = np.random.default_rng(3)
    spread = rng.standard_normal(5)
    shifts = {"a": -3.0, "b": -1.9, "c": -0.2}
    criteria = [criterion(name=name, metric=name, compare="difference", bound=0.0) for name in shifts]
    criteria += [criterion(name="told", metric="b", compare="difference", bound=0.0, gating=False)]
    metrics = tuple(Metric(name=name, label="") for name in shifts)
    trials = [
        TrialResult(task="parabola", arm=arm, seed=seed, purpose="report", point={}, curve=(), seconds=1.0,
                    values={name: (shift + spread[seed] if arm == "quick" else 0.0) for name, shift in shifts.items()})
        for arm in ("quick", "plain") for seed in range(5)
    ]  # fmt: skip
    results = {c.name: c for c in judge(claim_of(*criteria, metrics=metrics), trials, range(5))}
    own = {name: scipy.stats.ttest_1samp(shift + spread, 0).pvalue for name, shift in shifts.items()}
    assert own["a"] < own["b"] < 0.05 < 2 * own["b"] < own["c"]
    assert {name: c.p_value for name, c in results.items()} == pytest.approx(own | {"told": own["b"]})
    adjusted = {"a": 3 * own["a"], "b": 2 * own["b"], "c": own["c"], "told": own["b"]}
    assert {name: c.adjusted for name, c in results.items()} == pytest.approx(adjusted)
    verdicts = {"a": "holds", "b": "undecided", "c": "undecided", "told": "holds"}
    assert {name: c.verdict for name, c in results.items()} == verdicts
    assert "Holm" in results["b"].note
    assert results["c"].note == "the interval does not tell the mean from the bound"


def test_claims_are_corrected_together() -> None:
    (alone,) = judge(claim_of(criterion()), trials_of(quick=QUICK, plain=PLAIN), range(5))
    many = corrected([alone] * 4)
    assert [c.adjusted for c in many] == pytest.approx([4 * alone.p_value] * 4)
    assert corrected(many) == many
    every = judged(criterion(rule="every"), quick=QUICK, plain=PLAIN)
    assert corrected([every, alone]) == (every, alone), "what no mean decides takes no part"


def test_the_interval_must_clear_the_bound() -> None:
    quick, plain = [1.0, 1.1, 0.9, 1.2, 1.0], [2.0, 2.1, 2.2, 1.9, 2.0]
    result = judged(criterion(bound=0.5), quick=quick, plain=plain)
    assert result.verdict == "undecided"
    assert result.low < 0.5 < result.high
    assert result.note


def test_equal_values_need_no_interval() -> None:
    """Of two arms that are alike one pair in four at most differs by a certain amount: the n-th time is no surprise of 4^(1-n)."""
    result = judged(criterion(), quick=[1.0] * 5, plain=[2.0] * 5)
    assert (result.estimate, result.low, result.high) == pytest.approx((0.5, 0.5, 0.5))
    assert (result.verdict, result.p_value) == ("holds", 4**-4)
    three = judged(criterion(), quick=[1.0] * 3, plain=[2.0] * 3)
    assert (three.verdict, three.p_value) == ("undecided", 1 / 16)
    on_the_bound = judged(criterion(), quick=[2.0] * 5, plain=[2.0] * 5)
    assert (on_the_bound.verdict, on_the_bound.p_value) == ("undecided", 1.0)


def test_one_seed_has_no_interval() -> None:
    result = judged(criterion(), quick=[1.0], plain=[2.0])
    assert (result.estimate, result.low, result.high) == (0.5, 0.0, INF)


def test_upwards() -> None:
    c = criterion(metric="score", op=">=", compare="difference", bound=0.0)
    arms = {"quick": [0.8, 0.9, 0.85, 0.9, 0.7], "plain": [0.5, 0.4, 0.6, 0.55, 0.6]}
    result = judged(c, "score", **arms)
    assert (result.verdict, result.improvement) == ("holds", 1.0)
    assert judged(replace(c, op="<="), "score", **arms).verdict == "fails"


def test_improvement_counts_ties_half() -> None:
    result = judged(criterion(), quick=[1.0, 2.0, 3.0, 1.0], plain=[2.0, 2.0, 2.0, 2.0])
    assert result.improvement == (1 + 0.5 + 0 + 1) / 4


# -- over seeds ------------------------------------------------------------------------------------------------------------


def test_intervals_and_p_values_are_scipys() -> None:
    """Of numbers whose squares overflow or vanish, too."""
    values = np.random.default_rng(0).standard_normal((4, 3, 7)) + np.array([[0.0], [0.5], [1.0]])
    sizes = np.array([1e-200, 1.0, 1e200])
    found, known = intervals.mean(values * sizes[:, None]), scipy.stats.ttest_1samp(values, 0, axis=-1)
    ends = known.confidence_interval(0.95)
    assert found.mean / sizes == pytest.approx(values.mean(-1), rel=1e-12)
    assert found.p == pytest.approx(known.pvalue, rel=1e-9)
    assert (found.low / sizes, found.high / sizes) == (pytest.approx(ends.low), pytest.approx(ends.high))


@pytest.mark.parametrize(
    ("values", "low", "high", "p"),
    [
        # In the limit four of five infinities are four ones and a zero: t = 0.8 / 0.2.
        ([INF, INF, INF, INF, 3.0], INF, INF, 2 * scipy.stats.t.sf(4.0, 4)),
        ([-INF, -INF, -INF, -INF, 3.0], -INF, -INF, 2 * scipy.stats.t.sf(4.0, 4)),
        ([INF, 1.0, 2.0, 3.0, 4.0], -INF, INF, 2 * scipy.stats.t.sf(1.0, 4)),
        ([INF, -INF, 1.0, 2.0, 3.0], -INF, INF, 1.0),
        ([-INF] * 4, -INF, -INF, 4.0**-3),
        ([2.0], -INF, INF, 1.0),
    ],
)
def test_infinities_are_the_limit_of_large_numbers(values: list[float], low: float, high: float, p: float) -> None:
    found = intervals.mean(values)
    assert (found.low, found.high, found.p) == pytest.approx((low, high, p))
    finite = np.where(np.isinf(values), np.sign(values) * 1e12, values)
    if len(set(values)) > 1 and 0 < p < 1:
        assert float(intervals.mean(finite).p) == pytest.approx(p, rel=1e-6)


def level(rate: float, cases: int = 20_000) -> Any:
    """What a share of so many cases is, if the true one is ``rate``: within four standard errors."""
    return pytest.approx(rate, abs=4 * math.sqrt(rate * (1 - rate) / cases))


@pytest.mark.parametrize("n", [2, 3, 5, 10])
def test_intervals_and_p_values_have_their_level(n: int) -> None:
    """The interval holds the mean in 95 % of cases, and misses it on either side alike; a p-value below a is as rare as a."""
    found = intervals.mean(np.random.default_rng(n).standard_normal((20_000, n)))
    assert ((found.low <= 0) & (found.high >= 0)).mean() == level(0.95)
    assert ((found.low > 0).mean(), (found.high < 0).mean()) == (level(0.025), level(0.025))
    for rate in (0.01, 0.05, 0.3, 0.9):
        assert (found.p <= rate).mean() == level(rate)
    assert ((found.p <= intervals.LEVEL) == ((found.low > 0) | (found.high < 0))).all(), "they say the same"


@pytest.mark.parametrize("true", [6, 3])
def test_of_many_comparisons_any_wrong_one_is_as_rare_as_a_single_one(true: int) -> None:
    """Of six, all or half of them between equals, on seeds that they share; and corrected for no more than it takes."""
    rng = np.random.default_rng(true)
    finals = rng.standard_normal((20_000, 6, 5)) + 0.5 * rng.standard_normal((20_000, 1, 5))
    finals[:, true:] += 20.0
    p = intervals.holm(intervals.mean(finals).p)
    wrong = (p[:, :true] <= 0.05).any(-1).mean()
    assert 0.035 < wrong <= 0.05 + 4 * math.sqrt(0.05 * 0.95 / 20_000)
    assert (p[:, true:] <= 0.05).all()


@pytest.mark.parametrize("n", [3, 5, 10])
def test_intervals_of_shares_hold_every_probability(n: int) -> None:
    ends = np.array([intervals.share(count, n) for count in range(n + 1)])
    for probability in np.linspace(0.01, 0.99, 197):
        seen = scipy.stats.binom.pmf(np.arange(n + 1), n, probability)
        assert seen[(ends[:, 0] <= probability) & (probability <= ends[:, 1])].sum() >= 0.95


def test_no_spread_is_no_more_certain_than_it_can_be() -> None:
    """Outcomes that are one of two: equal differences on all seeds are the most frequent of all wrong decisions there."""
    rng = np.random.default_rng(1)
    for n in (4, 5):
        outcomes = rng.integers(2, size=(2, 100_000, n))
        found = intervals.mean(outcomes[0] - outcomes[1])
        equal = (found.low == found.high) & (found.mean != 0)
        assert equal.mean() < 4.0 ** (1 - n)
        assert (found.p <= 0.05).mean() < 0.05


def test_holm_over_the_last_axis() -> None:
    p = [[0.01, 0.04, 0.03], [0.02, 0.9, 0.5], [0.04, 0.04, 0.04]]
    assert intervals.holm(p) == pytest.approx(np.array([[0.03, 0.06, 0.06], [0.06, 1.0, 1.0], [0.12, 0.12, 0.12]]))


@pytest.mark.parametrize(("count", "n"), [(0, 5), (3, 5), (5, 5), (9, 10)])
def test_intervals_of_shares_are_exact(count: int, n: int) -> None:
    known = scipy.stats.binomtest(count, n).proportion_ci(0.95, "exact")
    assert intervals.share(count, n) == pytest.approx((known.low, known.high))
    assert 0 < intervals.share(2.5, 5)[0] < 0.5 < intervals.share(2.5, 5)[1] < 1


# -- controls and the claim's verdict --------------------------------------------------------------------------------------


def test_a_control_that_passes_makes_a_criterion_say_nothing() -> None:
    c = criterion(control="hollow", rule="every")
    arms = {"quick": [1.0] * 3, "plain": [2.0] * 3}
    empty = judged(c, **arms, hollow=[1.5] * 3)
    assert (empty.verdict, empty.control_verdict) == ("undecided", "holds")
    assert "says nothing" in empty.note
    sound = judged(c, **arms, hollow=[3.0] * 3)
    assert (sound.verdict, sound.control_verdict) == ("holds", "fails")


def test_a_control_excuses_no_failure() -> None:
    result = judged(criterion(control="hollow", rule="every"), quick=[3.0] * 3, plain=[2.0] * 3, hollow=[1.0] * 3)
    assert (result.verdict, result.control_verdict) == ("fails", "holds")


def test_a_control_is_not_its_own_rival() -> None:
    c = criterion(against=("plain", "hollow"), control="hollow", rule="every")
    result = judged(c, quick=[1.0] * 3, plain=[2.0] * 3, hollow=[3.0] * 3)
    assert (result.verdict, result.control_verdict) == ("holds", "fails")
    with pytest.raises(ValueError, match="its own rival"):
        judged(criterion(against="hollow", control="hollow"), quick=[1.0], hollow=[1.0])


def test_verdict_of_the_claim() -> None:
    holds = judged(criterion(rule="every"), quick=[1.0] * 3, plain=[2.0] * 3)
    fails = judged(criterion(rule="every"), quick=[3.0] * 3, plain=[2.0] * 3)
    open_ = judged(criterion(), quick=[1.0] * 3, plain=[2.0] * 3)
    assert verdict([holds, holds]) == "holds"
    assert verdict([holds, open_]) == "undecided"
    assert verdict([open_, fails, holds]) == "fails"
    assert verdict([holds, replace(fails, gating=False)]) == "holds"
    assert verdict([]) == "undecided"


def test_an_outcome_is_of_its_criterion_s_kind() -> None:
    for kind in KINDS:
        assert judged(criterion(kind=kind), quick=[1.0] * 3, plain=[2.0] * 3).kind == kind


def test_only_reported_trials_count() -> None:
    trials = trials_of(quick=[1.0] * 3, plain=[2.0] * 3)
    tuning = [replace(t, purpose="tuning", values={"loss": 100.0}) for t in trials]
    (result,) = judge(claim_of(criterion(rule="every")), trials + tuning, range(3))
    assert result.per_seed == (0.5, 0.5, 0.5)


def test_a_task_that_the_scale_leaves_out_is_reported_and_gates_nothing() -> None:
    claim = replace(
        claim_of(),
        criteria=(criterion(rule="every"), criterion(name="far", task="far", rule="every")),
        tasks=(Task(name="parabola", label=""), Task(name="far", label="")),
        scales=(Scale(name="small", says="", seeds=3, tasks=("parabola",)),),
    )
    results = judge(claim, trials_of(quick=[1.0] * 3, plain=[2.0] * 3), range(3), scale="small")
    assert [(r.verdict, r.gating) for r in results] == [("holds", True), ("undecided", False)]
    assert results[1].note == "scale 'small' leaves out task 'far'"
    assert verdict(results) == "holds"
