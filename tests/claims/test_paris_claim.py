"""PaRIS particle Gibbs' claim at a tiny scale: every arm runs and measures, and a trial is a function of its seed."""

from __future__ import annotations

import math
from functools import lru_cache

import pytest
import torch

from polyak.claims.particles import _state_spaces
from polyak.claims.particles.paris import CLAIM
from polyak.lab.claim import Measurement, Trial

PAIRS = [(task.name, arm.name) for task in CLAIM.tasks for arm in CLAIM.arms_on(task.name)]
TINY = {
    "exact": {"steps": 8, "long": 14, "n": 8},
    "paths": {"chains": 20_000},
    "smoothing": {"steps": 8, "series": 2, "replicates": 2},
    "learning": {"steps": 8, "series": 2, "iterations": 2, "chains": 1},
    "returns": {"steps": 8, "iterations": 2, "chains": 1, "large": 50},
}


@lru_cache
def run(task: str, arm: str, seed: int = 0) -> tuple[Measurement, ...]:
    options = {**CLAIM.options("small", task, arm), **TINY[task]}
    return tuple(CLAIM.trial(Trial(claim="paris", scale="small", task=task, arm=arm, seed=seed, options=options)))


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
    assert run(task, arm) == run.__wrapped__(task, arm)
    assert run(task, arm) != run(task, arm, seed=1)


def test_what_is_proved_is_so_and_its_controls_are_not():
    for c in CLAIM.criteria:
        if c.kind == "mechanism":
            assert run(c.task, c.arm)[-1].values[c.metric] <= c.bound
            assert not c.control or run(c.task, c.control)[-1].values[c.metric] > 5 * c.bound


def test_arms_have_equal_budgets():
    spent = {}
    for arm in CLAIM.arms_on("smoothing"):
        options = CLAIM.options("small", "smoothing", arm.name)
        spent[arm.name] = options["n"] * (options["sweeps"] or options["runs"])
    assert spent.pop("paris64") == 64  # as many pairs as the chain: 64^2 = 16 * 16^2
    assert set(spent.values()) == {256}


def test_the_maximum_of_the_likelihood_is_found():
    y, (a, q, r) = _state_spaces.most_likely(3, 10, 6)

    def value(a, q, r):
        return _state_spaces.kalman(a, math.exp(2 * q), math.exp(2 * r)).log_likelihood(y[..., None]).mean()

    top = value(a, q, r)
    for da, dq, dr in ((1, 0, 0), (0, 1, 0), (0, 0, 1)):
        assert all(value(a + s * da, q + s * dq, r + s * dr) < top for s in (-0.02, 0.02))


def test_returns_are_percent_a_day_without_their_mean():
    made = _state_spaces.returns(150)
    assert made.shape == (150,)
    assert made.dtype == torch.float64
    assert abs(made.mean()) < 1e-12
    assert 1 < made.std() < 5
