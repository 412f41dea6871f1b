"""FK steering's claim at a tiny scale: every arm runs, what is measured is right, and the seed decides."""

from __future__ import annotations

import math
from functools import lru_cache

import pytest
import torch

from polyak.claims.generate import _steered
from polyak.claims.generate.fk_steering import CLAIM
from polyak.lab.claim import Measurement, Trial

TINY = {
    "tilt": {"steps": 20, "systems": 20},
    "rare": {"systems": 100, "share": 0.05},
    "digits": {"systems": 40, "steps": 15, "training": 20, "classifying": 40},
    "prompted": {"systems": 40, "steps": 15, "training": 20, "classifying": 40},
}
RUNS = [(task, arm.name) for task in TINY for arm in CLAIM.arms_on(task)]


@lru_cache
def run(task: str, arm: str, seed: int = 0) -> Measurement:
    given = {**CLAIM.options("small", task, arm), **TINY[task]}
    found = list(CLAIM.trial(Trial(claim=CLAIM.slug, scale="small", task=task, arm=arm, seed=seed, options=given)))
    assert len(found) == 1
    return found[0]


@pytest.mark.parametrize(("task", "arm"), RUNS)
def test_an_arm_runs_and_measures_what_criteria_ask(task, arm):
    values = run(task, arm).values
    assert {
        c.metric for c in CLAIM.criteria if c.task == task and arm in (c.arm, c.control, *c.rivals)
    } <= values.keys()
    assert all(math.isfinite(v) for v in values.values())


def test_what_mathematics_decides_holds_at_any_scale_and_not_for_the_control():
    for c in CLAIM.criteria:
        if c.rule == "every":
            assert run(c.task, c.arm).values[c.metric] <= c.bound
            assert not c.control or run(c.task, c.control).values[c.metric] > 1e6 * c.bound


def test_rewards_are_counted_and_particles_find_what_is_rare():
    assert {arm: run("rare", arm).values["rewards"] for arm in ("bon8", "fk8", "bon4", "fk4")} == {
        "bon8": 8, "fk8": 80, "bon4": 4, "fk4": 40,
    }  # fmt: skip
    best, steered = (run("rare", arm).values["success"] for arm in ("bon8", "fk8"))
    assert abs(best - (1 - 0.95**8)) < 0.2
    assert steered > best + 0.2


def test_the_seed_decides():
    assert run.__wrapped__("rare", "fk4") == run("rare", "fk4")
    assert run("rare", "fk4", 1) != run("rare", "fk4")
    net = _steered.trained(0, 128, 20)
    _steered.trained.cache_clear()
    assert all(
        torch.equal(a, b) for a, b in zip(net.parameters(), _steered.trained(0, 128, 20).parameters(), strict=True)
    )


def test_the_judge_has_not_seen_what_the_critic_has():
    x, y = _steered.images()
    halves = [torch.randperm(len(x), generator=_steered.rng(1234))[half::2] for half in (0, 1)]
    assert not set(halves[0].tolist()) & set(halves[1].tolist())
    critic = _steered.classifier(0, 1, 40)
    assert (critic(x[halves[0]]).argmax(1) == y[halves[0]]).double().mean() > 0.6
