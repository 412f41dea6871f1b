"""Lion's claim at a tiny scale: every arm runs, the seed decides, and the minima it is measured against are right."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.optimize import minimize

from polyak.claims import _convex
from polyak.claims.optim.lion import ACCURACY, CLAIM, CONVEX, _rises
from polyak.lab.claim import Measurement, Trial

CASES = [(task.name, arm.name) for task in CLAIM.tasks for arm in CLAIM.arms_on(task.name)]


def run(task: str, arm: str, seed: int = 0) -> list[Measurement]:
    point = CLAIM.arm(arm).points[0]
    given = {**CLAIM.options("small", task, arm, point), "steps": 50, "watched_steps": 8}
    return list(CLAIM.trial(Trial(claim=CLAIM.slug, scale="small", task=task, arm=arm, seed=seed, options=given)))


@pytest.mark.parametrize(("task", "arm"), CASES)
def test_an_arm_runs_and_measures_what_criteria_ask(task, arm):
    final = run(task, arm)[-1]
    asked = {c.metric for c in CLAIM.criteria if c.task == task and arm in (c.arm, c.control, *c.rivals)}
    assert asked <= final.values.keys()
    assert all(math.isfinite(v) for v in final.values.values())
    assert torch.get_default_dtype() == torch.float32


@pytest.mark.parametrize(("task", "steps"), [("least_squares", 40), ("softmax", 220)])
def test_h_never_rises_but_under_every_k_with_reversed_betas(task, steps):
    def rises(arm):
        given = {**CLAIM.options("small", task, arm), "watched_steps": steps}
        trial = Trial(claim=CLAIM.slug, scale="small", task=task, arm=arm, seed=3, options=given)
        return [_rises(trial, name) for name in CONVEX[task]]

    assert not any(rises("lion"))
    assert all(rises("reversed"))


@pytest.mark.parametrize(("task", "arm"), [("least_squares", "lion"), ("network", "network_lion_1")])
def test_the_seed_decides(task, arm):
    assert run(task, arm, seed=1) == run(task, arm, seed=1)
    assert run(task, arm, seed=1) != run(task, arm, seed=2)


@pytest.mark.parametrize("task", ["logistic", "least_squares"])
def test_the_minimum_in_the_box_is_scipys(task):
    f, options = _convex.convex(task), CLAIM.task(task).options
    decay = options["weight_decay"]

    def value_and_slope(x):
        y = torch.as_tensor(x)
        return f.value(y), f.gradient(y).numpy()

    found = minimize(
        value_and_slope, np.zeros(f.shape), jac=True, method="L-BFGS-B", bounds=[(-1 / decay, 1 / decay)] * f.shape[0],
        options={"maxiter": 20_000, "ftol": 1e-16, "gtol": 1e-10},
    )  # fmt: skip
    least = _convex.minimum(task, "sign", decay, options["width"], ACCURACY)
    assert abs(least - found.fun) < 1e-8


@pytest.mark.parametrize(("task", "name"), [(task, name) for task, names in CONVEX.items() for name in names])
def test_no_feasible_point_is_below_the_minimum(task, name):
    f, options = _convex.convex(task), CLAIM.task(task).options
    penalty = _convex.penalty(name, options["weight_decay"], options["width"])
    least = _convex.minimum(task, name, options["weight_decay"], options["width"], ACCURACY)
    generator = torch.Generator().manual_seed(0)
    for _ in range(30):
        x = penalty.project(torch.randn(f.shape, dtype=torch.float64, generator=generator))
        assert f.value(x) + penalty.value(x) >= least - ACCURACY


@pytest.mark.parametrize("task", CONVEX)
def test_gradients_are_those_of_the_values(task):
    f = _convex.convex(task)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(f.shape, dtype=torch.float64, generator=generator)
    v = torch.randn(f.shape, dtype=torch.float64, generator=generator)
    h = 1e-5  # central differences: truncation h^2, rounding 1e-16 / h
    slope = (f.value(x + h * v) - f.value(x - h * v)) / (2 * h)
    assert abs(slope - float((f.gradient(x) * v).sum())) < 1e-7 * (1 + abs(slope))
