"""A comparison's request (tasks, arms, budget, seeds): with the stored trials it gives the answer and the page again.

It is kept in the store, so that whoever reads that can show the comparison, also while some of its trials are still to come.
"""

from __future__ import annotations

import hashlib
import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

from polyak.lab import versions, words
from polyak.lab.compare.answer import TaskComparison
from polyak.lab.compare.budget import Budget
from polyak.lab.compare.comparison import Comparison
from polyak.lab.compare.experiment import experiment
from polyak.lab.compare.rows import Setup
from polyak.lab.compare.search import ComparisonPlan
from polyak.lab.compare.spec import ArmSpec, Range
from polyak.lab.compare.task import Facts
from polyak.lab.result import ClaimResult
from polyak.lab.statistics import corrected
from polyak.lab.store import COMPARISON

VERSION = 2  # of the form that records are stored in
_UNITS = {
    "seconds": "s/trial",
    "steps": "steps",
    "gradients": "grads",
    "evaluations": "nfe",
}  # as the command takes them


@dataclass(frozen=True, kw_only=True)
class AskedTask:
    """A task that arms are compared on."""

    file: Path  # its name alone in a record from the store
    facts: Facts
    fingerprints: Mapping[str, str]  # by arm, of the code that decides its results


@dataclass(frozen=True, kw_only=True)
class Record:
    """How arms are to be compared, and on what."""

    setup: Setup
    tasks: tuple[AskedTask, ...]

    @cached_property
    def slug(self) -> str:
        """What the comparison is known by; the same words on the same code are the same comparison."""
        facts = self.to_json()
        if self.setup.budget.unit != "seconds":
            del facts["jobs"]
        facts["tasks"] = [{**t, "facts": t["facts"]["identity"]} for t in facts["tasks"]]
        facts["versions"] = {name: version for name, version in facts["versions"].items() if name != "polyak"}
        return COMPARISON + hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]

    @property
    def title(self) -> str:
        """The tasks' names: "quick and slow"."""
        return words.listing([task.file.stem for task in self.tasks])

    @property
    def command(self) -> str:
        """The command that asks for it, where the task files are at hand."""
        setup, b = self.setup, self.setup.budget
        processes, kind = versions.apart(setup.device)
        said = {
            "--arms": ",".join(arm.text for arm in setup.arms),
            "--budget": f"{b.total:g}s" if b.total else f"{b.amount:g}{_UNITS[b.unit]}",
            "--seeds": str(setup.seeds),
            "--trials": str(setup.trials),
            "--points": str(setup.points),
            **({"--target": f"{setup.target:g}"} if setup.target is not None else {}),
            **({"--jobs": str(setup.jobs)} if b.unit == "seconds" and not setup.alone else {}),
            **({"--device": "cuda"} if kind != "cpu" else {}),
            **({"--nproc-per-trial": str(processes)} if processes > 1 else {}),
        }
        files = [shlex.quote(task.file.name) for task in self.tasks]
        return " ".join(["polyak compare", *files, *(f"{name} {shlex.quote(value)}" for name, value in said.items())])

    def plans(self) -> list[ComparisonPlan]:
        """Each task's trials, of which nothing has been found yet."""
        return [self._plan(task) for task in self.tasks]

    def _plan(self, task: AskedTask) -> ComparisonPlan:
        setup = self.setup
        tuning_points = max(2, setup.points // 2)
        arms = {arm.text: arm for arm in setup.arms}

        def options(name: str, purpose: str) -> dict[str, Any]:
            arm = arms[name]
            shared = {
                "class": arm.target,
                "fixed": dict(arm.fixed),
                "budget": {setup.budget.unit: setup.budget.amount},
            }
            if setup.budget.unit == "seconds" and not setup.alone:
                # At once, which makes times rough: not to be taken for those of trials that ran alone.
                shared["beside"] = setup.jobs
            if purpose == "tuning":
                return {**shared, "points": tuning_points, "main": task.facts.main}
            return {**shared, "points": setup.points}

        return ComparisonPlan(
            experiment(task.file, task.facts, setup.arms, setup.budget, setup.seeds),
            seeds=setup.seeds,
            device=setup.device,
            versions=setup.versions,
            options=options,
            specs=arms,
            trials=setup.trials,
            points=tuning_points,
            fingerprints=task.fingerprints,
            identity=task.facts.identity,
        )

    def comparison(self, plans: Sequence[ComparisonPlan]) -> Comparison:
        """What was found, once all trials have ended."""
        return self._judged(plans, [plan.result() for plan in plans])

    def so_far(self, plans: Sequence[ComparisonPlan]) -> Comparison:
        """The trials that have ended, for drawings; nothing is judged."""
        return self._judged(plans, [plan.so_far() for plan in plans])

    def _judged(self, plans: Sequence[ComparisonPlan], results: Sequence[ClaimResult]) -> Comparison:
        # What is found on any of the tasks is found in this comparison: the arms of all are corrected for together.
        criteria = iter(corrected([c for result in results for c in result.criteria]))
        tasks = [
            TaskComparison(
                name=t.file.stem,
                facts=t.facts,
                claim=p.claim,
                result=replace(r, criteria=tuple(islice(criteria, len(r.criteria)))),
                setup=self.setup,
            )
            for t, p, r in zip(self.tasks, plans, results, strict=True)
        ]
        return Comparison(setup=self.setup, tasks=tuple(tasks))

    def to_json(self) -> dict[str, Any]:
        """Plain data, without the folders of task files."""
        tasks = [{**asdict(t), "file": t.file.name, "fingerprints": dict(t.fingerprints)} for t in self.tasks]
        return {"version": VERSION, **asdict(self.setup), "tasks": tasks}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Record:
        """The inverse of :meth:`to_json`; ValueError for data of another version."""
        if data["version"] != VERSION:
            raise ValueError(f"version must be {VERSION}, got {data['version']!r}")
        given = {name: value for name, value in data.items() if name not in ("version", "tasks")}
        setup = Setup(**{**given, "budget": Budget(**data["budget"]), "arms": tuple(map(_arm, data["arms"]))})
        return cls(setup=setup, tasks=tuple(map(_task, data["tasks"])))


def _arm(data: Mapping[str, Any]) -> ArmSpec:
    # JSON has lists where options have tuples.
    fixed = {name: tuple(value) if isinstance(value, list) else value for name, value in data["fixed"].items()}
    return ArmSpec(**{**data, "fixed": fixed, "space": {name: Range(**r) for name, r in data["space"].items()}})


def _task(data: Mapping[str, Any]) -> AskedTask:
    facts = Facts(**{**data["facts"], "warnings": tuple(data["facts"]["warnings"])})
    return AskedTask(file=Path(data["file"]), facts=facts, fingerprints=data["fingerprints"])
