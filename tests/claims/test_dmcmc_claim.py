"""Dmcmc's claim at a tiny scale: every arm runs and measures, and a trial is a function of its seed."""

from __future__ import annotations

import math

import pytest

from polyak.claims.generate.dmcmc import CLAIM
from polyak.lab.claim import Measurement, Trial

PAIRS = [(task.name, arm.name) for task in CLAIM.tasks for arm in CLAIM.arms_on(task.name)]


def run(task: str, arm: str, seed: int = 0, **tiny: object) -> list[Measurement]:
    options = {**CLAIM.options("small", task, arm, CLAIM.arm(arm).points[0]), **tiny}
    return list(CLAIM.trial(Trial(claim="dmcmc", scale="small", task=task, arm=arm, seed=seed, options=options)))


@pytest.mark.parametrize(("task", "arm"), PAIRS)
def test_an_arm_measures_what_is_asked_of_it(task, arm):
    *_, final = run(task, arm, steps=4)
    asked = {c.metric for c in CLAIM.criteria if c.task == task and arm in (c.arm, c.control, *c.rivals)}
    assert final.at is None
    assert asked <= final.values.keys() <= {m.name for m in CLAIM.metrics}
    assert all(math.isfinite(value) for value in final.values.values())


@pytest.mark.parametrize("task", [task.name for task in CLAIM.tasks])
def test_a_trial_is_a_function_of_its_seed(task):
    arm = CLAIM.arms_on(task)[-1].name
    assert run(task, arm, steps=4) == run(task, arm, steps=4)
