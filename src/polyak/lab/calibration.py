"""Simulations with known answers: how often a whole comparison or claim, tuning included, decides wrongly.

Nothing is trained: what a trial yields is drawn from a surface over the learning rate. All else is as it is for a user: the plans
that tune and choose, and the judge. ``python -m polyak.lab.calibration`` runs thousands of them; the tests run hundreds.

A surface is a valley in the logarithm of the learning rate. Its place, and the noise of a seed, are the same for all arms; the
noise of a trial is its own. So one tuning run is as misleading as it is on a small task.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from polyak.lab.claim import Arm, Claim, Criterion, Measurement, Metric, Paper, Scale, Task, Trial
from polyak.lab.compare import arms as specs
from polyak.lab.compare.budget import Budget
from polyak.lab.compare.record import AskedTask, Record
from polyak.lab.compare.rows import Setup
from polyak.lab.compare.search import MEASURE
from polyak.lab.compare.task import Facts
from polyak.lab.result import ClaimResult, CriterionResult, TrialResult
from polyak.lab.store import Planned, Stored
from polyak.lab.tuning import Plan

if TYPE_CHECKING:
    import numpy as np

_CENTRE = -3.0  # of the valley, a power of ten
_SHIFTS = (
    1.0,
    1.27,
    1.58,
    2.0,
    2.53,
    3.16,
)  # where an arm's range begins, over the first one's: less than a step of a grid
_LOSS = 1.0
_VERSIONS = {"fingerprint": "simulated"}


@dataclass(frozen=True)
class Surface:
    """How a trial's loss comes about.

    Args:
        curvature: loss by the square of the distance from the best learning rate, in powers of ten.
        wander: of the valley's place from seed to seed (standard deviation).
        shared: noise of a seed that all arms share.
        noise: of a trial.
        tail: degrees of freedom of this noise (Student's t); infinite: normal.
        cliff: this far above the best learning rate trials diverge.
    """

    curvature: float = 0.1
    wander: float = 0.1
    shared: float = 0.05
    noise: float = 0.05
    tail: float = math.inf
    cliff: float = math.inf

    def losses(self, rng: np.random.Generator) -> Callable[[int, float, float], float]:
        """A loss by seed, learning rate and what an arm is worse by; infinite where it diverges."""
        seeds: dict[int, tuple[float, float]] = {}

        def loss(seed: int, lr: float, worse: float) -> float:
            if seed not in seeds:
                seeds[seed] = rng.normal(_CENTRE, self.wander), rng.normal(0.0, self.shared)
            place, luck = seeds[seed]
            away = math.log10(lr) - place
            if away > self.cliff:
                return math.inf
            own = rng.standard_normal() if math.isinf(self.tail) else rng.standard_t(self.tail)
            return _LOSS + worse + self.curvature * away**2 + luck + self.noise * own

        return loss


SURFACES: Mapping[str, Surface] = {
    "noisy": Surface(curvature=0.02),
    "usual": Surface(),
    "steep": Surface(curvature=1.0, noise=0.02),
    "heavy tails": Surface(tail=3.0),
    "a cliff": Surface(cliff=0.4),
}


def compared(
    surface: Surface, worse: Sequence[float], seeds: int, trials: int, rng: np.random.Generator
) -> tuple[CriterionResult, ...]:
    """A comparison as ``polyak compare`` makes it. ``worse``: each arm's true difference to the first, the baseline."""
    loss, setting = surface.losses(rng), _setting(len(worse), seeds, trials, str(rng.random()))
    [plan] = plans = setting.plans()
    arms = {arm.text: own for arm, own in zip(setting.setup.arms, worse, strict=True)}
    waiting = list(plan.known())
    while waiting:
        trial = waiting.pop()
        value = loss(trial.seed, trial.point["lr"], arms[trial.arm])
        waiting += plan.add(trial, _ended(trial, MEASURE if trial.purpose == "tuning" else "loss", value))
    return setting.comparison(plans).tasks[0].result.criteria


def claimed(
    surface: Surface, worse: Sequence[float], seeds: int, trials: int, rng: np.random.Generator
) -> tuple[CriterionResult, ...]:
    """A claim as ``polyak reproduce`` runs it: grids of so many points, and a criterion for each arm but the first."""
    loss, claim = surface.losses(rng), _claim(len(worse), trials)
    arms = {arm.name: own for arm, own in zip(claim.arms, worse, strict=True)}
    plan = Plan(claim, scale="small", seeds=seeds, device="cpu", versions=_VERSIONS)
    waiting = list(plan.known())
    while waiting:
        trial = waiting.pop()
        waiting += plan.add(trial, _ended(trial, "loss", loss(trial.seed, trial.point["lr"], arms[trial.arm])))
    result: ClaimResult = plan.result()
    return result.criteria


def _ended(trial: Planned, metric: str, value: float) -> Stored:
    values = {metric: value, **dict.fromkeys(_OTHERS, 1.0)}
    result = TrialResult(
        task=trial.task,
        arm=trial.arm,
        seed=trial.seed,
        purpose=trial.purpose,
        point=trial.point,
        values=values,
        curve=(),
        seconds=0.0,
        diverged=math.isinf(value),
    )
    return Stored(result=result, finished="", machine={})


_OTHERS = ("steps", "seconds", "memory", "processor")


def _setting(arms: int, seeds: int, trials: int, identity: str) -> Record:
    words = [f"adamw:weight_decay=0:lr={3.16e-5 * shift:.3g}..{3.16e-2 * shift:.3g}" for shift in _SHIFTS[:arms]]
    setup = Setup(
        budget=Budget("steps", 1),
        arms=specs.parse(words, "training"),
        trials=trials,
        points=2,
        target=None,
        jobs=1,
        seeds=seeds,
        device="cpu",
        versions=_VERSIONS,
    )
    facts = Facts(kind="training", says="", better={"loss": "lower"}, identity=identity)
    prints = {arm.text: "simulated" for arm in setup.arms}
    return Record(setup=setup, tasks=(AskedTask(file=Path("simulated.py"), facts=facts, fingerprints=prints),))


def _claim(arms: int, points: int) -> Claim:
    grid = [3.16e-5 * 10 ** (3 * (i + 0.5) / points) for i in range(points)]
    names = [f"arm{i}" for i in range(arms)]
    return Claim(
        slug="simulated",
        room="lab",
        name="",
        summary="",
        says="",
        paper=Paper(title="", year=0),
        part="",
        budget="steps",
        tasks=(Task(name="surface", label="", tune="loss"),),
        arms=tuple(
            Arm(name=name, label=name, role="method" if i else "baseline", grid={"lr": grid})
            for i, name in enumerate(names)
        ),
        scales=(Scale(name="small", says="", seeds=3),),
        metrics=(Metric(name="loss", label="loss"),),
        criteria=tuple(
            Criterion(
                name=name,
                says="",
                kind="effect",
                task="surface",
                metric="loss",
                arm=name,
                against=names[0],
                compare="difference",
                bound=0.0,
                both_diverged="equal",
            )
            for name in names[1:]
        ),
        trial=_never,
    )


def _never(trial: Trial) -> Iterator[Measurement]:
    raise AssertionError("what is simulated is not run")
    yield


@dataclass
class Tally:
    """What many comparisons found of arms whose true differences are known."""

    comparisons: int = 0
    wrong: int = 0  # comparisons with any verdict that is wrong
    covered: int = 0  # intervals that hold the true difference
    intervals: int = 0
    found: int = 0  # true differences that were decided, rightly
    true: int = 0

    def add(self, criteria: Sequence[CriterionResult], worse: Sequence[float]) -> None:
        self.comparisons += 1
        right = {-1: "holds", 0: "undecided", 1: "fails"}
        wrong = False
        for c, own in zip(criteria, worse[1:], strict=True):
            sign = (own > 0) - (own < 0)
            wrong = wrong or c.verdict not in (right[sign], "undecided")
            self.covered += c.low <= own <= c.high
            self.intervals += 1
            self.true += own != 0
            self.found += own != 0 and c.verdict == right[sign]
        self.wrong += wrong

    @property
    def coverage(self) -> float:
        return self.covered / self.intervals

    @property
    def power(self) -> float:
        return self.found / self.true if self.true else math.nan


Way = Callable[..., tuple[CriterionResult, ...]]


def simulate(
    way: Way, surface: Surface, worse: Sequence[float], *, seeds: int, trials: int, comparisons: int, number: int = 0
) -> Tally:
    """Many comparisons of one kind. ``number``: of the random generator."""
    import numpy as np

    rng, tally = np.random.default_rng(number), Tally()
    for _ in range(comparisons):
        tally.add(way(surface, worse, seeds, trials, rng), worse)
    return tally


def main() -> None:
    """Print a table: how often something is decided wrongly, how often intervals hold the truth, and how much is found."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--comparisons", type=int, default=1000)
    parser.add_argument("--trials", type=int, default=6, help="tuning trials of every arm for each seed")
    given = parser.parse_args()
    print(
        f"{given.comparisons} comparisons of six arms each; 'wrong': those with any wrong verdict over all arms together"
    )
    heads = f"{'identical: wrong':>17} {'coverage':>9} {'differ: wrong':>14} {'coverage':>9} {'power':>6}"
    print(f"{'surface':12} {'by':8} {'seeds':>5} {heads}")
    ways: dict[str, Way] = {"compare": compared, "claim": claimed}
    for name, surface in SURFACES.items():
        for by, way in ways.items():
            for seeds in (3, 5, 10):
                how: dict[str, Any] = {"seeds": seeds, "trials": given.trials, "comparisons": given.comparisons}
                same = simulate(way, surface, [0.0] * 6, **how)
                unlike = simulate(way, surface, [0.0, -0.1, -0.05, 0.05, 0.1, 0.2], **how)
                print(
                    f"{name:12} {by:8} {seeds:5} {same.wrong / same.comparisons:17.2%} {same.coverage:9.2%} "
                    f"{unlike.wrong / unlike.comparisons:14.2%} {unlike.coverage:9.2%} {unlike.power:6.1%}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
