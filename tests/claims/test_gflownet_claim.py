"""The claim of GFlowNets at a tiny scale: every arm runs and measures, and a trial is a function of its seed."""

from __future__ import annotations

import math

import pytest

from polyak.claims.particles import _flows
from polyak.claims.particles.gflownet import CLAIM
from polyak.lab.claim import Measurement, Trial
from polyak.particles.gflownet import SetEnv

PAIRS = [(task.name, arm.name) for task in CLAIM.tasks for arm in CLAIM.arms_on(task.name)]
TINY = {
    "exact": {"size": 6, "k": 3, "batch": 8},
    "grid": {"height": 3, "hidden": 4, "batch": 2, "steps": 2, "every": 1},
    "sets": {"size": 5, "k": 3, "hidden": 4, "batch": 2, "steps": 4, "samples": 10},
    "incomplete": {"size": 5, "k": 3, "hidden": 4, "batch": 2, "steps": 4, "samples": 10, "complete": 0.5},
}


def run(task: str, arm: str, seed: int = 0) -> list[Measurement]:
    options = {**CLAIM.options("small", task, arm, CLAIM.arm(arm).points[0]), **TINY[task]}
    return list(CLAIM.trial(Trial(claim="gflownet", scale="small", task=task, arm=arm, seed=seed, options=options)))


@pytest.mark.parametrize(("task", "arm"), PAIRS)
def test_an_arm_measures_what_is_asked_of_it(task, arm):
    *_, final = run(task, arm)
    asked = {c.metric for c in CLAIM.criteria if c.task == task and arm in (c.arm, *c.rivals, c.control)}
    assert final.at is None
    assert asked <= final.values.keys() <= {m.name for m in CLAIM.metrics}
    assert all(math.isfinite(value) for value in final.values.values())


@pytest.mark.parametrize("task", [task.name for task in CLAIM.tasks])
def test_a_trial_is_a_function_of_its_seed(task):
    arm = CLAIM.arms_on(task)[-1].name
    assert run(task, arm) == run(task, arm)
    assert run(task, arm) != run(task, arm, seed=1)


def test_what_is_proved_is_so_and_its_controls_are_not():
    finals = {arm.name: run("exact", arm.name)[-1].values for arm in CLAIM.arms_on("exact")}
    for c in CLAIM.criteria:
        if c.kind == "mechanism":
            value = finals[c.arm][c.metric]
            assert value <= c.bound if c.op == "<=" else value >= c.bound, c.name
            assert not c.control or finals[c.control][c.metric] > 10 * c.bound


def test_what_is_cut_is_all_but_the_last_step():
    env = SetEnv(_flows.elements(0, 6, 1.0), 4)
    data = _flows.cut_short(env, 0, 64, 0.25)
    done = sum(next(data).done.sum().item() for _ in range(10))
    assert 100 < done < 220
    traj = next(data)
    assert (traj.lengths == 3 + traj.done.long()).all()
    assert (traj.last.sum(1) == traj.lengths).all()


def test_energies_have_ten_values():
    energies = _flows.elements(3, 1000, 3.0)
    assert len(energies.unique()) == 10
    assert energies.max() - energies.min() <= 6
    assert abs(energies.mean().item()) < 1e-6
