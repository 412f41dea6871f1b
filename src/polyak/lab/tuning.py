"""Which trials a claim needs, and how each arm's grid is tuned.

Grids are known in advance, so that the tuning trials of all arms and tasks can run at once. Every arm that is tuned gets
equally many (the claim is refused otherwise), per task, on seeds that are never reported. Every reported seed has a tuning of its
own, on seeds of its own: seeds are then independent repeats of all that is random, and an interval over them holds the noise of
tuning, too. Successive seeds from the scale's first on (0, 1, 2, ...) are reported; tuning seeds start at
:data:`FIRST_TUNING_SEED`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

from polyak.core import checks
from polyak.lab import limits, statistics, words
from polyak.lab import versions as facts
from polyak.lab.claim import Arm, Claim, Metric
from polyak.lab.result import ClaimResult, TrialResult
from polyak.lab.store import Planned, Store, Stored

FIRST_TUNING_SEED = 10_000
_MOST_TUNING_SEEDS = 9  # for each reported one: with them all, what lies beyond twice the first is no trial's
_NODES_NAMED = 8  # of a cluster, in a note
Key = tuple[str, str, int]  # task, arm, reported seed


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
        count = limits.count("seeds", at.seeds if seeds is None else seeds)
        what = f"tuning_seeds of scale {scale!r}"
        self._extra = checks.integer(what, at.tuning_seeds, least=1, most=_MOST_TUNING_SEEDS)
        self.claim, self.scale, self.device, self.versions = claim, scale, device, dict(versions)
        first = checks.integer(f"first_seed of scale {scale!r}", at.first_seed, least=0, most=FIRST_TUNING_SEED - count)
        self.seeds = tuple(range(first, first + count))
        self.tuning_seeds = tuple(seed for s in self.seeds for seed in self._tuning_seeds(s))
        self.found: dict[str, Stored] = {}
        self.chosen: dict[Key, dict[str, Any]] = {}
        self._notes: dict[tuple[str, str, str], list[int]] = {}  # arm, task, what is said -> of which seeds
        self._arms = {(t.name, a.name): a for t in claim.tasks_at(scale) for a in claim.arms_on(t.name)}
        self._tuning: dict[Key, list[list[Planned]]] = {}
        self._places: dict[str, Key] = {}  # of tuning trials, by digest: whose they are
        for (task, name), arm in self._arms.items():
            for reported in self.seeds:
                key = (task, name, reported)
                if len(arm.points) == 1:
                    self.chosen[key] = arm.points[0]  # no choice, no tuning
                    continue
                self._tuning[key] = [
                    [self._trial(key, "tuning", point, seed) for seed in self._tuning_seeds(reported)]
                    for point in arm.points
                ]
                self._places |= {trial.digest: key for trials in self._tuning[key] for trial in trials}

    def _tuning_seeds(self, reported: int) -> range:
        """The seeds that the options of one reported seed are chosen on."""
        first = FIRST_TUNING_SEED + reported * self._extra
        return range(first, first + self._extra)

    def _trial(self, key: Key, purpose: Literal["tuning", "report"], point: Mapping[str, Any], seed: int) -> Planned:
        task, arm, _ = key
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
        yield from self._chosen_ones()

    def _chosen_ones(self) -> Iterator[Planned]:
        """The reported trials whose points are chosen, arm by arm."""
        for task, arm in self._arms:
            for seed in self.seeds:
                if (task, arm, seed) in self.chosen:
                    yield self.reported((task, arm, seed))

    def reported(self, key: Key) -> Planned:
        """A reported trial, whose point is chosen."""
        return self._trial(key, "report", self.chosen[key], key[2])

    def add(self, trial: Planned, stored: Stored) -> list[Planned]:
        """Take in a result. Returns the trials that can be named now and could not before."""
        self.found[trial.digest] = stored
        key = self._places.get(trial.digest)
        if key is None or any(t.digest not in self.found for trials in self._tuning[key] for t in trials):
            return []
        arm = self._arms[trial.task, trial.arm]
        results = [[self.found[t.digest].result for t in trials] for trials in self._tuning[key]]
        tuned_by = self.claim.metric(self.claim.task(trial.task).tune)
        self.chosen[key], note = choose(arm, tuned_by, results)
        if note:
            self._notes.setdefault((arm.name, trial.task, note), []).append(key[2])
        return [self.reported(key)]

    @property
    def notes(self) -> list[str]:
        """What is to be said of the tuning."""

        def which(seeds: list[int]) -> str:
            return "" if len(seeds) == len(self.seeds) else f" (seeds {', '.join(map(str, sorted(seeds)))})"

        return sorted(f"{arm} on {task}: {note}{which(seeds)}" for (arm, task, note), seeds in self._notes.items())

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
        return ClaimResult(
            slug=self.claim.slug,
            scale=self.scale,
            device=self.device,
            verdict=statistics.verdict(criteria),
            criteria=criteria,
            trials=trials,
            chosen=self._points(),
            seeds=self.seeds,
            tuning_seeds=self.tuning_seeds if self.tunes else (),
            date=latest.finished,
            seconds=sum(t.seconds for t in trials),
            versions=self.versions,
            machine={name: fact for name, fact in latest.machine.items() if name != "node"},
            notes=(*self.notes, *_divergences(trials), *_places([s.machine for s in stored])),
        )

    def _points(self) -> dict[str, dict[str, tuple[dict[str, Any], ...]]]:
        """By task and arm the points that were chosen, in the order of seeds."""
        points: dict[str, dict[str, tuple[dict[str, Any], ...]]] = {}
        for task, arm in self._arms:
            own = tuple(self.chosen[task, arm, s] for s in self.seeds if (task, arm, s) in self.chosen)
            points.setdefault(task, {})[arm] = own
        return points

    def so_far(self) -> ClaimResult:
        """The trials that have ended, for their curves; nothing is judged."""
        stored = list(self.found.values())
        return ClaimResult(
            slug=self.claim.slug,
            scale=self.scale,
            device=self.device,
            verdict="undecided",
            criteria=(),
            trials=tuple(s.result for s in stored),
            chosen=self._points(),
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
    if all(trial.diverged for trials in results for trial in trials):
        return arm.points[0], "every tuning trial diverged; the grid's first point is used"
    means = [sum(t.values[metric.name] for t in trials) / len(trials) for trials in results]
    best = (min if metric.better == "lower" else max)(range(len(means)), key=means.__getitem__)
    return arm.points[best], ""


def _divergences(trials: Sequence[TrialResult]) -> list[str]:
    """A note for each arm and task with reported trials that diverged."""
    groups: dict[tuple[str, str], list[TrialResult]] = {}
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
