"""Meta flow matching's claim at a tiny scale: every arm runs and measures, and a trial is a function of its seed."""

from __future__ import annotations

import math

import pytest
import torch

from polyak.claims.generate import _populations
from polyak.claims.generate.meta_flow_matching import CLAIM, NET
from polyak.lab.claim import Measurement, Trial

PAIRS = [(task.name, arm.name) for task in CLAIM.tasks for arm in CLAIM.arms_on(task.name)]
TINY = {
    "exact": {"test": 3, "stored": 40},
    "contraction": {"steps": 2, "train": 4, "test": 2, "stored": 30, "batch": 2, "points": 20},
    "letters": {"steps": 2, "angles": 1, "test": 2, "stored": 30, "batch": 2, "points": 20},
}


def run(task: str, arm: str, seed: int = 0) -> list[Measurement]:
    options = {**CLAIM.options("small", task, arm, CLAIM.arm(arm).points[0]), **TINY[task]}
    return list(
        CLAIM.trial(Trial(claim="meta_flow_matching", scale="small", task=task, arm=arm, seed=seed, options=options))
    )


@pytest.mark.parametrize(("task", "arm"), PAIRS)
def test_an_arm_measures_what_is_asked_of_it(task, arm):
    *_, final = run(task, arm)
    asked = {c.metric for c in CLAIM.criteria if c.task == task and arm in (c.arm, *c.rivals)}
    asked |= {c.metric for c in CLAIM.criteria if c.task == task and arm == c.control}
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
            assert finals[c.arm][c.metric] <= c.bound
            assert not c.control or finals[c.control][c.metric] > 10 * c.bound


def test_no_baseline_has_fewer_weights():
    counts = {
        kind: sum(p.numel() for p in _populations.model(kind, 0, 256, **NET).parameters())
        for kind in ("fm", "cgfm", "mfm", "shuffled")
    }
    assert counts["mfm"] == counts["shuffled"]
    assert counts["mfm"] <= counts["fm"] <= 1.05 * counts["mfm"]
    assert counts["mfm"] <= counts["cgfm"]


def test_the_best_blind_map_leaves_what_is_derived():
    slope = _populations.BLIND
    assert slope == pytest.approx(0.9044, abs=5e-5)
    left = (1 - slope) ** 2 * 2 * _populations.SPREAD**2 + 2 * (slope - _populations.LEFT) ** 2
    assert math.sqrt(left) == pytest.approx(0.8965, abs=5e-5)


def test_a_letter_is_held_out():
    data = _populations.letters(27, 2, 3, 200, 0.5)
    assert data.x0.shape == (50, 200, 2)
    assert data.test0.shape == (3, 200, 2)
    assert data.x1.abs().max() <= 3 * math.sqrt(2)
    noise = torch.cat([data.x0 - data.x1, data.test0 - data.test1])
    assert noise.std() == pytest.approx(0.5, abs=0.02)
    assert data.x1.std() > 1  # they are not in one place
