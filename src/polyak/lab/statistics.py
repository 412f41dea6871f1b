"""From trials to verdicts: pure functions, with every test and interval taken from scipy.

How each rule decides is said in :class:`~polyak.lab.claim.Criterion`. What this file adds is care at the edges:

*Infinities.* A diverged trial scores infinitely badly (or its metric's ``worst``), so that a seed's statistic may be infinite.
Means, resampled means and sign flips with infinities are taken as the limit of ever larger numbers put in their place: how often
each sign of infinity occurs decides first, the finite values decide between equals. Nothing becomes NaN on the way.

*Both diverged.* Where the arm and all of its rivals diverged on a seed, the arm is not better: that seed's ratio or difference is
the one that satisfies the criterion least. A criterion may say that they are equal there instead.

*Ratios.* Of non-negative numbers only; 0/0 is 1.
"""

from __future__ import annotations

import math
import operator
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from polyak.lab.claim import Claim, Criterion, Metric, Verdict
from polyak.lab.result import CriterionResult, TrialResult

if TYPE_CHECKING:
    import numpy as np

LEVEL = 0.05  # of the sign-flip test; the interval holds 1 - LEVEL
LEAST_SEEDS = 3  # below, a verdict needs a scale that declares fewer
UNCLEAR = "the sign-flip test does not tell the mean from the bound"
LEAST_SEEDS_MEAN = 5  # 2^-5 is the first power of a half below LEVEL
OPERATORS = {"<=": operator.le, "<": operator.lt, ">=": operator.ge, ">": operator.gt}
# Up to 14 seeds all sign flips are counted; beyond, this many are drawn.
_FLIPS = 2**14
_RESAMPLES = 9999


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
    results = []
    for criterion in claim.criteria:
        if criterion.task in there:
            results.append(_judge(_Judged(claim, criterion, reported, tuple(seeds), least)))
        else:
            absent = _Judged(claim, criterion, {}, tuple(seeds), least)
            note = f"scale {scale!r} leaves out task {criterion.task!r}"
            results.append(replace(_outcome(absent), verdict="undecided", gating=False, note=note))
    return tuple(results)


def verdict(criteria: Iterable[CriterionResult]) -> Verdict:
    """The claim's: ``fails`` where any gating criterion fails, ``holds`` where all hold, else ``undecided``."""
    gating = [c.verdict for c in criteria if c.gating]
    if "fails" in gating:
        return "fails"
    return "holds" if gating and all(v == "holds" for v in gating) else "undecided"


@dataclass(frozen=True)
class _Judged:
    """A criterion with all that it is judged on."""

    claim: Claim
    criterion: Criterion
    trials: Mapping[tuple[str, str, int], TrialResult]
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
        trial = self.trials.get((self.criterion.task, arm, seed))
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


def _judge(judged: _Judged) -> CriterionResult:
    criterion = judged.criterion
    result = _outcome(judged)
    if not criterion.control:
        return result
    if criterion.rivals == (criterion.control,):
        raise ValueError(f"{judged.where}: control {criterion.control!r} is its own rival")
    # Among several rivals the control must not meet itself.
    rivals = tuple(name for name in criterion.rivals if name != criterion.control)
    in_place = replace(criterion, arm=criterion.control, against=rivals, control="")
    control = _outcome(replace(judged, criterion=in_place)).verdict
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
    mean, low, high = _mean_and_interval(shifted)
    below = mean <= 0 if criterion.op in ("<=", "<") else mean < 0
    p_value = _sign_flip(shifted, below=below)
    decided, note = _decide(judged, len(per_seed), passing, low, high, p_value, below=below)

    def back(number: float) -> float:
        if math.isinf(number) or math.isnan(number):
            return _exp(number) if logarithmic else number
        return criterion.bound * _exp(number) if logarithmic else number + criterion.bound

    return CriterionResult(
        name=criterion.name,
        says=criterion.says,
        verdict=decided,
        gating=criterion.gating,
        statistic=_words(criterion),
        op=criterion.op,
        bound=criterion.bound,
        estimate=back(mean),
        low=back(low),
        high=back(high),
        p_value=p_value,
        per_seed=tuple(per_seed),
        seeds_passing=passing,
        improvement=_improvement(judged, pairs, passing),
        note=note,
    )


def _decide(
    judged: _Judged, n: int, passing: int, low: float, high: float, p_value: float, *, below: bool
) -> tuple[Verdict, str]:
    criterion = judged.criterion
    if n < len(judged.seeds):
        return "undecided", f"trials are missing: {n} of {len(judged.seeds)} seeds are complete"
    if n < judged.least:
        return "undecided", f"{n} seed{'s' if n != 1 else ''} cannot decide: at least {judged.least} are needed"
    if criterion.rule == "every":
        return ("holds" if passing == n else "fails"), ""
    if n < LEAST_SEEDS_MEAN:
        return (
            "undecided",
            f"{n} seed{'s' if n != 1 else ''} cannot decide: the exact test at {LEVEL:.0%} needs at least {LEAST_SEEDS_MEAN}",
        )
    if p_value > LEVEL:
        return "undecided", f"{UNCLEAR} (p = {p_value:.3g})"
    # The interval must not reach over to the other side; whether it may touch the bound, the operator says.
    in_bounds = OPERATORS[criterion.op]
    wants_below = criterion.op in ("<=", "<")
    nearest, farthest = (high, low) if wants_below else (low, high)
    if below == wants_below and in_bounds(nearest, 0.0):
        return "holds", ""
    if below != wants_below and not in_bounds(farthest, 0.0):
        return "fails", ""
    return "undecided", "the interval holds the bound"


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


def _mean_and_interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Mean and 95% bootstrap interval: BCa, or percentile where BCa is not defined."""
    if not values:
        return math.nan, -math.inf, math.inf
    array, beyond = _finite(values)
    mean = float(array.mean())
    if len(values) == 1:
        return values[0], -math.inf, math.inf  # one seed says nothing about the others
    if (array == array[0]).all():
        # No spread, so no interval to estimate; the mean's rounding must not open one.
        return values[0], values[0], values[0]
    low, high = _bootstrap(array)

    def limit(number: float) -> float:
        return number if abs(number) <= beyond else math.copysign(math.inf, number)

    return limit(mean), limit(low), limit(high)


def _bootstrap(array: np.ndarray) -> tuple[float, float]:
    import numpy as np
    from scipy import stats

    for method in ("BCa", "percentile"):
        with warnings.catch_warnings():
            # BCa is undefined where all resamples lie on one side of the estimate; the percentiles then serve.
            warnings.simplefilter("ignore", stats.DegenerateDataWarning)
            warnings.simplefilter("ignore", RuntimeWarning)
            interval = stats.bootstrap(
                (array,),
                np.mean,
                confidence_level=1 - LEVEL,
                n_resamples=_RESAMPLES,
                method=method,
                rng=np.random.default_rng(0),
            ).confidence_interval
        if not (math.isnan(interval.low) or math.isnan(interval.high)):
            break
    return float(interval.low), float(interval.high)


def _sign_flip(values: Sequence[float], *, below: bool) -> float:
    """The exact one-sided p-value of a mean this far below (or above) zero, were the signs a matter of chance."""
    if not values:
        return 1.0
    if len(values) == 1:
        return 0.5 if values[0] else 1.0  # two flips, which scipy does not count for one value
    import numpy as np
    from scipy import stats

    test = stats.permutation_test(
        (_finite(values)[0],),
        np.mean,
        permutation_type="samples",
        vectorized=True,
        n_resamples=_FLIPS,
        alternative="less" if below else "greater",
        rng=np.random.default_rng(0),
    )
    return float(test.pvalue)


def _finite(values: Sequence[float]) -> tuple[np.ndarray, float]:
    """Values with numbers for infinities, so large that any one outweighs all that is finite in every mean.

    Returns them with the largest size that a mean of finite ones may have: a mean beyond it stands for an infinite one.
    """
    import numpy as np

    array = np.asarray(values, dtype=np.float64)
    infinite = np.isinf(array)
    if not infinite.any():
        return array, math.inf
    largest = float(np.abs(array[~infinite]).max(initial=0.0))
    # A mean of n with one such number and n - 1 of the largest finite ones against it is still beyond all finite ones.
    array[infinite] = np.sign(array[infinite]) * len(array) * (2 * largest + 1)
    return array, largest * (1 + 1e-9)  # a mean of equal numbers may exceed them by rounding


def _log(number: float) -> float:
    return math.log(number) if number > 0 else -math.inf


def _exp(number: float) -> float:
    try:
        return math.exp(number)
    except OverflowError:
        return math.inf
