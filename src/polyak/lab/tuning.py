"""Which trials a claim needs, and how each arm's grid is tuned.

Grids are known in advance, so that the tuning trials of all arms and tasks can run at once. Every arm that is tuned gets
equally many (the claim is refused otherwise), per task, on seeds that are never reported; the best point runs the reported
seeds. Seeds 0, 1, 2, ... are reported; tuning seeds start at :data:`FIRST_TUNING_SEED`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

from polyak.core import checks
from polyak.lab import statistics, words
from polyak.lab import versions as facts
from polyak.lab.claim import Arm, Claim, Metric
from polyak.lab.result import ClaimResult, TrialResult
from polyak.lab.store import Planned, Store, Stored

FIRST_TUNING_SEED = 10_000
_NODES_NAMED = 8  # of a cluster, in a note
Key = tuple[str, str]  # task, arm


class Plan:
    """All trials of one claim at one scale, and what is known of them so far.

    Args:
        claim: what is run.
        scale: a name of the claim's scales.
        seeds: how many are reported; None: as many as the scale declares.
        device: its kind, under which results are stored.
        versions: what results depend on, with the fingerprint.
    """

    def __init__(
        self, claim: Claim, *, scale: str, seeds: int | None, device: str, versions: Mapping[str, str]
    ) -> None:
        at = claim.scale(scale)
        count = checks.integer("seeds", at.seeds if seeds is None else seeds, least=1, most=FIRST_TUNING_SEED)
        extra = checks.integer(f"tuning_seeds of scale {scale!r}", at.tuning_seeds, least=1)
        self.claim, self.scale, self.device, self.versions = claim, scale, device, dict(versions)
        self.seeds = tuple(range(count))
        self.tuning_seeds = tuple(range(FIRST_TUNING_SEED, FIRST_TUNING_SEED + extra))
        self.found: dict[str, Stored] = {}
        self.chosen: dict[Key, dict[str, Any]] = {}
        self.notes: list[str] = []
        self._arms = {(t.name, a.name): a for t in claim.tasks_at(scale) for a in claim.arms_on(t.name)}
        self._tuning: dict[Key, list[list[Planned]]] = {}
        for (task, name), arm in self._arms.items():
            if len(arm.points) == 1:
                self.chosen[task, name] = arm.points[0]  # no choice, no tuning
            else:
                self._tuning[task, name] = [
                    [self._trial((task, name), "tuning", point, seed) for seed in self.tuning_seeds]
                    for point in arm.points
                ]

    def _trial(self, key: Key, purpose: Literal["tuning", "report"], point: Mapping[str, Any], seed: int) -> Planned:
        task, arm = key
        return Planned(
            claim=self.claim.slug,
            scale=self.scale,
            task=task,
            arm=arm,
            seed=seed,
            purpose=purpose,
            point=point,
            options=self.claim.options(self.scale, task, arm, point),
            device=self.device,
            versions=self.versions,
        )

    deadline: float | None = None  # seconds after which a trial is stopped

    def libraries(self) -> tuple[str, ...]:
        """Which of numpy and torch must be loaded before a trial begins."""
        return facts.libraries(self.claim)

    def needed(self, trial: Planned) -> frozenset[str]:
        """The metrics that the claim's criteria and tuning ask of a trial."""
        if trial.purpose == "tuning":
            return frozenset([self.claim.task(trial.task).tune])
        needed: set[str] = set()
        for c in self.claim.criteria:
            if c.task == trial.task:
                if trial.arm in (c.arm, c.control):
                    needed.add(c.metric)
                if trial.arm in c.rivals:
                    needed.add(c.against_metric or c.metric)
        return frozenset(needed)

    def asks(self, trial: Planned) -> bool:
        """Whether a trial waits after each measurement to hear if it should go on."""
        return False

    def heard(self, trial: Planned, at: Mapping[str, float], values: Mapping[str, float]) -> bool:
        """Take in a measurement of a trial that asks. Whether it should go on."""
        return True

    @property
    def tunes(self) -> bool:
        """Whether any arm is tuned."""
        return bool(self._tuning)

    @property
    def total(self) -> int:
        """How many trials there are, the ones whose options are not known yet among them."""
        tuning = sum(len(trials) for points in self._tuning.values() for trials in points)
        return tuning + len(self._arms) * len(self.seeds)

    @property
    def complete(self) -> bool:
        return len(self.found) == self.total

    def known(self) -> Iterator[Planned]:
        """The trials that can be named by now: all for tuning, and the reported ones of arms whose point is chosen."""
        for points in self._tuning.values():
            for trials in points:
                yield from trials
        for key in self._arms:
            if key in self.chosen:
                yield from self.reported(key)

    def reported(self, key: Key) -> list[Planned]:
        """The reported trials of one arm on one task, whose point is chosen."""
        return [self._trial(key, "report", self.chosen[key], seed) for seed in self.seeds]

    def add(self, trial: Planned, stored: Stored) -> list[Planned]:
        """Take in a result. Returns the trials that can be named now and could not before."""
        self.found[trial.digest] = stored
        key = (trial.task, trial.arm)
        if key in self.chosen:
            return []
        if any(t.digest not in self.found for trials in self._tuning[key] for t in trials):
            return []
        arm = self._arms[key]
        results = [[self.found[t.digest].result for t in trials] for trials in self._tuning[key]]
        tuned_by = self.claim.metric(self.claim.task(trial.task).tune)
        self.chosen[key], note = choose(arm, tuned_by, results)
        if note:
            self.notes.append(f"{arm.name} on {trial.task}: {note}")
        return self.reported(key)

    def load(self, store: Store) -> list[Planned]:
        """Take in all that is stored of what is known. Returns the known trials that are missing."""
        missing: list[Planned] = []
        waiting = list(self.known())
        while waiting:
            stored = store.results(waiting)
            named: list[Planned] = []
            for trial in waiting:
                if trial.digest in stored:
                    named += self.add(trial, stored[trial.digest])
                else:
                    missing.append(trial)
            waiting = named
        return missing

    def result(self) -> ClaimResult:
        """The claim's verdict with all that it stands on; every trial must have been found."""
        stored = [self.found[trial.digest] for trial in self.known()]
        trials = tuple(s.result for s in stored)
        criteria = statistics.judge(self.claim, trials, self.seeds, scale=self.scale)
        latest = max(stored, key=lambda s: s.finished)
        chosen: dict[str, dict[str, dict[str, Any]]] = {}
        for task, arm in self._arms:
            chosen.setdefault(task, {})[arm] = self.chosen[task, arm]
        return ClaimResult(
            slug=self.claim.slug,
            scale=self.scale,
            device=self.device,
            verdict=statistics.verdict(criteria),
            criteria=criteria,
            trials=trials,
            chosen=chosen,
            seeds=self.seeds,
            tuning_seeds=self.tuning_seeds if self.tunes else (),
            date=latest.finished,
            seconds=sum(t.seconds for t in trials),
            versions=self.versions,
            machine={name: fact for name, fact in latest.machine.items() if name != "node"},
            notes=(*sorted(self.notes), *_divergences(trials), *_places([s.machine for s in stored])),
        )

    def so_far(self) -> ClaimResult:
        """The trials that have ended, for their curves; nothing is judged."""
        stored = list(self.found.values())
        chosen: dict[str, dict[str, dict[str, Any]]] = {}
        for (task, arm), point in self.chosen.items():
            chosen.setdefault(task, {})[arm] = point
        return ClaimResult(
            slug=self.claim.slug,
            scale=self.scale,
            device=self.device,
            verdict="undecided",
            criteria=(),
            trials=tuple(s.result for s in stored),
            chosen=chosen,
            seeds=self.seeds,
            tuning_seeds=(),
            date=max((s.finished for s in stored), default=""),
            seconds=sum(s.result.seconds for s in stored),
            versions=self.versions,
            machine={},
        )


def choose(arm: Arm, metric: Metric, results: Sequence[Sequence[TrialResult]]) -> tuple[dict[str, Any], str]:
    """The best point of an arm's grid, by the mean of a metric over the tuning seeds, and a note ("" where there is none).

    ``results`` holds, for each of the grid's points in order, the trials on all tuning seeds. A diverged trial counts as the
    metric's worst; of equal points the first is taken, and of a grid whose every trial diverged the first of all.
    """
    import optuna

    if all(trial.diverged for trials in results for trial in trials):
        return arm.points[0], "every tuning trial diverged; the grid's first point is used"
    quiet = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)  # a study says at once that it was made
    try:
        study = optuna.create_study(direction="minimize" if metric.better == "lower" else "maximize")
        space: dict[str, optuna.distributions.BaseDistribution] = {
            name: optuna.distributions.CategoricalDistribution(list(values)) for name, values in arm.grid.items()
        }
        for point, trials in zip(arm.points, results, strict=True):
            mean = sum(t.values[metric.name] for t in trials) / len(trials)
            study.add_trial(optuna.trial.create_trial(params=point, distributions=space, value=mean))
    finally:
        optuna.logging.set_verbosity(quiet)
    return arm.points[study.best_trial.number], ""


def _divergences(trials: Sequence[TrialResult]) -> list[str]:
    """A note for each arm and task with reported trials that diverged."""
    groups: dict[Key, list[TrialResult]] = {}
    for trial in trials:
        if trial.purpose == "report":
            groups.setdefault((trial.task, trial.arm), []).append(trial)
    return [
        f"{arm} on {task}: {sum(t.diverged for t in group)} of {len(group)} reported trials diverged"
        for (task, arm), group in groups.items()
        if any(t.diverged for t in group)
    ]


def _places(machines: Sequence[Mapping[str, str]]) -> list[str]:
    """Where trials ran, if any ran on the nodes of a cluster: on how many, and which."""
    if not any("node" in machine for machine in machines):
        return []
    counted = Counter((machine.get("node", ""), _kind(machine)) for machine in machines)
    nodes = sorted(counted.items(), key=lambda item: (-item[1], item[0]))
    said = [f"{count} on {f'node {name}' if name else 'another machine'} ({kind})" for (name, kind), count in nodes]
    more = f", and others on {len(said) - _NODES_NAMED} further ones" if len(said) > _NODES_NAMED else ""
    unlike = "; these are not alike, so that times on them are not" if len({kind for _, kind in counted}) > 1 else ""
    where = words.count(sum(bool(name) for name, _ in counted), "node")
    return [f"trials ran on {where} of a cluster: {', '.join(said[:_NODES_NAMED])}{more}{unlike}"]


def _kind(machine: Mapping[str, str]) -> str:
    accelerator = machine["accelerator"]
    return f"{machine['processor']}, {machine['cores']} cores{'' if accelerator == 'none' else f', {accelerator}'}"
