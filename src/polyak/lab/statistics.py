"""Verdicts from trials: pure functions, with the intervals and p-values of :mod:`polyak.lab.intervals`.

How each rule decides is said in :class:`~polyak.lab.claim.Criterion`. What this file adds is care at the edges:

*Many criteria.* Those that count and are decided by a mean are corrected for their number (Holm): the chance that any of them is
decided wrongly is 5 % at most.

*Infinities.* A diverged trial scores infinitely badly (or its metric's ``worst``), so that a seed's statistic may be infinite.

*Both diverged.* Where the arm and all of its rivals diverged on a seed, the arm is not better: that seed's ratio or difference is
the one that satisfies the criterion least. A criterion may say that they are equal there instead.

*Ratios.* Of non-negative numbers only; 0/0 is 1.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from polyak.core import checks
from polyak.lab import intervals
from polyak.lab.claim import Claim, Criterion, Metric, Verdict
from polyak.lab.intervals import LEVEL
from polyak.lab.result import CriterionResult, TrialResult

LEAST_SEEDS = 3  # below, a verdict needs a scale that declares fewer, and a mean has none
UNCLEAR = "tell the mean from the bound"  # in the note of what is undecided for this reason alone
OPERATORS = {"<=": operator.le, "<": operator.lt, ">=": operator.ge, ">": operator.gt}


@checks.arguments(
    claim=checks.Instance(Claim, words="a Claim"), trials=checks.Several(checks.Instance(TrialResult, words="a TrialResult")),
    seeds=checks.Each(checks.Integer(0)), scale=checks.text | None,
)  # fmt: skip
def judge(
    claim: Claim, trials: Iterable[TrialResult], seeds: Sequence[int], *, scale: str | None = None
) -> tuple[CriterionResult, ...]:
    """Each of the claim's criteria, judged on the reported trials of ``seeds``.

    ``scale`` is where the trials were run: a scale may declare fewer seeds than the usual least number, and may leave tasks out
    (a criterion on such a task is reported as undecided, and the claim's verdict does not depend on it).

    Raises:
        ValueError: a ratio of negative values, a ratio's bound that is not positive, or a control that is its own rival.
    """
    reported = {(t.task, t.arm, t.seed): t for t in trials if t.purpose == "report"}
    least, there = LEAST_SEEDS, {t.name for t in claim.tasks}
    if scale is not None:
        least = min(least, claim.scale(scale).seeds)
        there = {t.name for t in claim.tasks_at(scale)}
    judged = [
        _Judged(claim, criterion, reported if criterion.task in there else None, tuple(seeds), least)
        for criterion in claim.criteria
    ]
    results = [_outcome(one) if one.trials is not None else _left_out(one, scale) for one in judged]
    return tuple(
        _with_control(result, one) if one.trials is not None else result
        for result, one in zip(corrected(results), judged, strict=True)
    )


def _left_out(judged: _Judged, scale: str | None) -> CriterionResult:
    note = f"scale {scale!r} leaves out task {judged.criterion.task!r}"
    return replace(_outcome(judged), verdict="undecided", gating=False, by_mean=False, note=note)


def corrected(results: Sequence[CriterionResult]) -> tuple[CriterionResult, ...]:
    """Verdicts of what means decide, by p-values that are corrected for the number of those that count (Holm).

    One that does not count stands for itself. Criteria of several claims may be given together.
    """
    family = [i for i, c in enumerate(results) if c.by_mean and c.gating]
    adjusted = {i: c.p_value for i, c in enumerate(results) if c.by_mean}
    if family:
        adjusted |= zip(family, map(float, intervals.holm([results[i].p_value for i in family])), strict=True)
    return tuple(
        _by_mean(c, adjusted[i], len(family) if c.gating else 1) if i in adjusted else c for i, c in enumerate(results)
    )


def _by_mean(c: CriterionResult, adjusted: float, among: int) -> CriterionResult:
    """A criterion's verdict by its mean."""
    if adjusted > LEVEL:
        note = f"the interval does not {UNCLEAR}"
        if c.p_value <= LEVEL:
            note = f"p = {c.p_value:.2g} by itself; among {among} criteria {adjusted:.2g} (Holm)"
        return replace(c, adjusted=adjusted, verdict="undecided", note=note)
    return replace(c, adjusted=adjusted, verdict="holds" if OPERATORS[c.op](c.estimate, c.bound) else "fails", note="")


@dataclass(frozen=True)
class _Judged:
    """A criterion with all that it is judged on."""

    claim: Claim
    criterion: Criterion
    trials: Mapping[tuple[str, str, int], TrialResult] | None  # None: the scale leaves its task out
    seeds: tuple[int, ...]
    least: int

    @property
    def where(self) -> str:
        return f"claim {self.claim.slug!r}, criterion {self.criterion.name!r}"

    @property
    def metric(self) -> Metric:
        return self.claim.metric(self.criterion.metric)

    @property
    def rival_metric(self) -> Metric:
        return self.claim.metric(self.criterion.against_metric or self.criterion.metric)

    def value(self, arm: str, metric: Metric, seed: int) -> tuple[float, bool] | None:
        """An arm's metric on one seed, and whether the trial diverged; None where it is missing."""
        trial = (self.trials or {}).get((self.criterion.task, arm, seed))
        if trial is None or metric.name not in trial.values:
            return None
        return float(trial.values[metric.name]), trial.diverged

    def pair(self, seed: int) -> tuple[tuple[float, bool], tuple[float, bool] | None] | None:
        """The arm's value and its best rival's (None where there are no rivals); None where a trial is missing."""
        own = self.value(self.criterion.arm, self.metric, seed)
        rivals = [self.value(name, self.rival_metric, seed) for name in self.criterion.rivals]
        there = [rival for rival in rivals if rival is not None]
        if own is None or len(there) < len(rivals):
            return None
        sign = 1.0 if self.rival_metric.better == "lower" else -1.0
        # A metric's `worst` may be better than what a rival that did not diverge reached: divergence counts first.
        return own, min(there, key=lambda rival: (rival[1], sign * rival[0]), default=None)


def _with_control(result: CriterionResult, judged: _Judged) -> CriterionResult:
    """A criterion's result, which says nothing where its control passes (by itself: that is the stricter way)."""
    criterion = judged.criterion
    if not criterion.control:
        return result
    if criterion.rivals == (criterion.control,):
        raise ValueError(f"{judged.where}: control {criterion.control!r} is its own rival")
    # Among several rivals the control must not meet itself.
    rivals = tuple(name for name in criterion.rivals if name != criterion.control)
    in_place = replace(criterion, arm=criterion.control, against=rivals, control="")
    (control,) = (c.verdict for c in corrected([_outcome(replace(judged, criterion=in_place))]))
    result = replace(result, control_verdict=control)
    if control != "holds":
        return result
    note = f"this criterion says nothing: its control {criterion.control!r} passes, too"
    # A method that fails has failed, whatever its control does.
    return replace(
        result,
        verdict="undecided" if result.verdict == "holds" else result.verdict,
        note="; ".join(filter(None, [result.note, note])),
    )


def _outcome(judged: _Judged) -> CriterionResult:
    criterion = judged.criterion
    logarithmic = criterion.compare == "ratio"
    if logarithmic and not criterion.bound > 0:
        raise ValueError(f"{judged.where}: the bound of a ratio must be > 0, got {criterion.bound!r}")
    pairs = [pair for pair in (judged.pair(seed) for seed in judged.seeds) if pair is not None]
    per_seed = [_statistic(judged, *pair) for pair in pairs]
    passing = sum(OPERATORS[criterion.op](s, criterion.bound) for s in per_seed)
    # What is averaged: on this scale the bound is at zero and both sides of it are alike.
    shifted = [_log(s) - math.log(criterion.bound) if logarithmic else s - criterion.bound for s in per_seed]
    middle, low, high, p_value = _mean_and_interval(shifted)
    decided, note = _decide(judged, len(per_seed), passing)

    def back(number: float) -> float:
        if math.isinf(number) or math.isnan(number):
            return _exp(number) if logarithmic else number
        return criterion.bound * _exp(number) if logarithmic else number + criterion.bound

    return CriterionResult(
        name=criterion.name,
        says=criterion.says,
        kind=criterion.kind,
        verdict=decided or "undecided",
        gating=criterion.gating,
        statistic=_words(criterion),
        op=criterion.op,
        bound=criterion.bound,
        estimate=back(middle),
        low=back(low),
        high=back(high),
        p_value=p_value,
        per_seed=tuple(per_seed),
        seeds_passing=passing,
        improvement=_improvement(judged, pairs, passing),
        by_mean=decided is None,
        adjusted=p_value,
        note=note,
    )


def _decide(judged: _Judged, n: int, passing: int) -> tuple[Verdict | None, str]:
    """A verdict, and why; None where the mean is to decide."""
    if n < len(judged.seeds):
        return "undecided", f"trials are missing: {n} of {len(judged.seeds)} seeds are complete"
    least = LEAST_SEEDS if judged.criterion.rule == "mean" else judged.least
    if n < least:
        return "undecided", f"{n} seed{'s' if n != 1 else ''} cannot decide: at least {least} are needed"
    if judged.criterion.rule == "mean":
        return None, ""
    return ("holds" if passing == n else "fails"), ""


# -- a seed's statistic ----------------------------------------------------------------------------------------------------


def _statistic(judged: _Judged, own: tuple[float, bool], rival: tuple[float, bool] | None) -> float:
    criterion = judged.criterion
    if rival is None:
        return own[0]
    if own[1] and rival[1]:
        if criterion.both_diverged == "equal":
            return 1.0 if criterion.compare == "ratio" else 0.0
        # The least satisfying value there is.
        if criterion.op in ("<=", "<"):
            return math.inf
        return 0.0 if criterion.compare == "ratio" else -math.inf
    if criterion.compare == "difference":
        return 0.0 if _same(criterion, own[0], rival[0]) else own[0] - rival[0]
    return _ratio(judged, *(_magnitude(judged, *side) for side in (own, rival)))


def _same(criterion: Criterion, own: float, rival: float) -> bool:
    return own == rival or (
        math.isfinite(own - rival) and abs(own - rival) <= criterion.rounding * max(abs(own), abs(rival))
    )


def _magnitude(judged: _Judged, value: float, diverged: bool) -> float:
    """A ratio's numerator or denominator. The worst of what should be high is as little as there can be: zero."""
    if diverged and value == -math.inf:
        return 0.0
    if value < 0:
        raise ValueError(f"{judged.where}: ratios need values >= 0, got {value!r}; compare a difference instead")
    return value


def _ratio(judged: _Judged, own: float, rival: float) -> float:
    if own == rival:
        return 1.0  # 0/0 and inf/inf among them
    return own / rival if rival else math.inf


def _improvement(judged: _Judged, pairs: Sequence[tuple], passing: int) -> float:
    """How often the arm is better than its best rival on the same seed, ties half; without rivals, how often it passes."""
    if not pairs:
        return 0.0
    if not judged.criterion.rivals:
        return passing / len(pairs)
    sign = 1.0 if judged.metric.better == "lower" else -1.0
    score = 0.0
    for (own, own_diverged), (rival, rival_diverged) in pairs:
        ours, theirs = (own_diverged, sign * own), (rival_diverged, sign * rival)
        # Two that diverged are alike, whatever they score.
        alike = own_diverged == rival_diverged and (own_diverged or _same(judged.criterion, own, rival))
        score += 0.5 if alike else float(ours < theirs)
    return score / len(pairs)


def _words(criterion: Criterion) -> str:
    if criterion.compare == "value":
        return f"value of {criterion.metric}, {criterion.arm}"
    rivals = criterion.rivals
    other = rivals[0] if len(rivals) == 1 else f"the best of {', '.join(rivals)}"
    if criterion.against_metric and criterion.against_metric != criterion.metric:
        other = f"{criterion.against_metric} of {other}"
    return f"{criterion.compare} of {criterion.metric}, {criterion.arm} {'/' if criterion.compare == 'ratio' else '-'} {other}"


# -- over seeds ------------------------------------------------------------------------------------------------------------


def _mean_and_interval(values: Sequence[float]) -> tuple[float, float, float, float]:
    """The mean, its interval, and its p-value."""
    if not values:
        return math.nan, -math.inf, math.inf, 1.0
    found = intervals.mean(values)
    return float(found.mean), float(found.low), float(found.high), float(found.p)


def _log(number: float) -> float:
    return math.log(number) if number > 0 else -math.inf


def _exp(number: float) -> float:
    try:
        return math.exp(number)
    except OverflowError:
        return math.inf
