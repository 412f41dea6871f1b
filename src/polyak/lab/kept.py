"""The results of a claim in a store, judged: one for each scale, also where they were made on another machine.

What decides is the code: a run counts whose fingerprint is the present one. Versions of Python and of libraries are told with a
result; where there are several runs, one with those of this machine comes first, then the latest.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from polyak.lab import versions as facts
from polyak.lab.claim import Claim
from polyak.lab.result import ClaimResult
from polyak.lab.store import Run, Store
from polyak.lab.tuning import Plan

Made = tuple[str, str, str, tuple[str | None, ...]]  # claim, scale, device kind, versions of Python and libraries
LIBRARIES = ("python", "torch", "numpy")


def made(run: Run) -> Made:
    """What runs have in common whose trials are one experiment: polyak's version may differ, its code may not."""
    return run.claim, run.scale, run.device, tuple(run.versions.get(name) for name in LIBRARIES)


def is_current(claim: Claim, run: Run, fingerprint: str) -> bool:
    """Whether a run is of this claim by the present code, at a scale that there is."""
    there = run.claim == claim.slug and run.scale in [s.name for s in claim.scales]
    return there and run.versions.get("fingerprint") == fingerprint


def loaded(claim: Claim, store: Store, runs: Sequence[Run]) -> Plan:
    """What is stored of runs that are one experiment: with all seeds that are complete, or those that the scale declares."""
    run = runs[-1]
    declared = claim.scale(run.scale).seeds
    for seeds in range(max(declared, *(store.seeds(r) for r in runs)), declared, -1):
        longer = empty(claim, run, seeds)
        longer.load(store)
        if longer.complete:
            return longer
    plan = empty(claim, run, declared)
    plan.load(store)
    return plan


def empty(claim: Claim, run: Run, seeds: int) -> Plan:
    """The plan of a run with so many seeds, before anything is read."""
    return Plan(claim, scale=run.scale, seeds=seeds, device=run.device, versions=run.versions)


def results(
    claim: Claim, store: Store, *, scale: str | None = None, device: str | None = None, processes: int = 1
) -> dict[str, ClaimResult]:
    """Scale -> the result of a complete run of the present code.

    Args:
        claim: whose runs are meant.
        store: where they are.
        scale: this one alone; None: all that the claim has.
        device: "cpu" or "cuda", made on any accelerator; None: on either.
        processes: of each trial.
    """
    fingerprint, here = facts.fingerprint(claim), facts.versions()
    groups: dict[Made, list[Run]] = {}
    for run in store.runs(claim.slug):
        if is_current(claim, run, fingerprint) and scale in (None, run.scale) and _on(run, device, processes):
            groups.setdefault(made(run), []).append(run)
    found: dict[str, list[tuple[bool, ClaimResult]]] = {}
    for (_, at, _, libraries), runs in groups.items():
        plan = loaded(claim, store, runs)
        if plan.complete:
            own = libraries == tuple(here.get(name) for name in LIBRARIES)
            found.setdefault(at, []).append((own, plan.result()))
    best: Mapping[str, tuple[bool, ClaimResult]] = {
        at: max(several, key=lambda one: (one[0], one[1].date)) for at, several in found.items()
    }
    return {s.name: best[s.name][1] for s in claim.scales if s.name in best}


def _on(run: Run, device: str | None, processes: int) -> bool:
    count, kind = facts.apart(run.device)
    return count == processes and (device is None or (kind == "cpu") == (device == "cpu"))
