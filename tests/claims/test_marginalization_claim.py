"""The claim of marginalization models at a tiny scale: every arm runs and measures, and a trial is a function of its seed."""

from __future__ import annotations

import math

import pytest

from polyak.claims.generate import _marginals as m
from polyak.claims.generate.marginalization import CLAIM
from polyak.core.exact import Ising
from polyak.lab.claim import Measurement, Trial

PAIRS = [(task.name, arm.name) for task in CLAIM.tasks for arm in CLAIM.arms_on(task.name)]
TIMED = ("step_ms", "speedup")
TINY = {
    "exact": {"length": 3},
    "digits": {"steps": 2, "marginal_steps": 2, "orders": 1, "hidden": 8, "batch": 8, "at_once": 4},
    "energy": {"side": 3, "budget": 400, "hidden": 8, "batch": 8, "samples": 20},
    "subsets": {"side": 3, "budget": 400, "hidden": 8, "batch": 8, "samples": 20, "subsets": 20},
}


def run(task: str, arm: str, seed: int = 0) -> list[Measurement]:
    options = {**CLAIM.options("small", task, arm, CLAIM.arm(arm).points[0]), **TINY[task]}
    return list(
        CLAIM.trial(Trial(claim="marginalization", scale="small", task=task, arm=arm, seed=seed, options=options))
    )


@pytest.mark.parametrize(("task", "arm"), PAIRS)
def test_an_arm_measures_what_is_asked_of_it(task, arm):
    *_, final = run(task, arm)
    asked = {c.metric for c in CLAIM.criteria if c.task == task and arm in (c.arm, c.control, *c.rivals)}
    assert final.at is None
    assert asked <= final.values.keys() <= {m.name for m in CLAIM.metrics}
    assert all(math.isfinite(value) for value in final.values.values())


@pytest.mark.parametrize("task", [task.name for task in CLAIM.tasks])
def test_a_trial_is_a_function_of_its_seed(task):
    arm = CLAIM.arms_on(task)[0].name

    def values(seed):
        *_, final = run(task, arm, seed)
        return {k: v for k, v in final.values.items() if k not in TIMED}

    assert values(0) == values(0)
    assert values(0) != values(1)


def test_what_is_proved_is_so_and_its_controls_are_not():
    finals = {arm.name: run("exact", arm.name)[-1].values for arm in CLAIM.arms_on("exact")}
    for c in CLAIM.criteria:
        if c.kind == "mechanism":
            assert finals[c.arm][c.metric] <= c.bound
            assert not c.control or finals[c.control][c.metric] > 10 * c.bound


@pytest.mark.parametrize(
    ("arm", "count"), [("mam", 16), ("no_consistency", 16), ("arm_mc", 8), ("arm_all", 8), ("arm_full", 304)]
)
def test_passes_are_those_that_the_perceptrons_make(arm, count, monkeypatch):
    """Rows with gradients count as three, without as one."""
    made = []

    def counted(self, x):
        made.append(len(x) * (3 if torch_grad() else 1))
        return forward(self, x)

    from polyak.generate.marginalization import networks

    forward = networks._Residual.forward
    monkeypatch.setattr(networks._Residual, "forward", counted)
    m.on_energy(arm, 0, side=10, hidden=4, layers=1, batch=50, lr=1e-3, budget=1, decay=False, alpha=4.0)
    assert m.passes(arm, 100) == count
    assert sum(made) / (2 * 50) == pytest.approx(count, abs=3 / 50)  # and one row of nothing known, in a step


def torch_grad():
    import torch

    return torch.is_grad_enabled()


def test_the_target_is_that_of_the_paper():
    assert Ising(10, m.COUPLING, m.FIELD).log_z.item() == pytest.approx(78.688056, abs=5e-7)
