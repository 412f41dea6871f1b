"""GHVB's claim at a tiny scale: every arm runs, the same seed gives the same numbers, and what is proved tells methods apart."""

from __future__ import annotations

import math

import pytest

from polyak.claims.generate import _momentum, ghvb
from polyak.claims.generate.ghvb import CLAIM, STEPS
from polyak.generate import DDIM, DPMSolverMultistep, HeavyBall
from polyak.lab.claim import Measurement, Trial

TINY = {"samples": 30, "reference_nfe": 90}


def run(task: str, arm: str, seed: int = 0, **options: object) -> list[Measurement]:
    given = {**CLAIM.options("small", task, arm), **({} if task == "solvable" else TINY), **options}
    return list(CLAIM.trial(Trial(claim=CLAIM.slug, scale="small", task=task, arm=arm, seed=seed, options=given)))


@pytest.mark.parametrize(("task", "arm"), [(task, a.name) for task in ("ring", "digits") for a in CLAIM.arms_on(task)])
def test_an_arm_runs_and_measures_what_criteria_ask(task, arm):
    *curve, final = run(task, arm)
    asked = {c.metric for c in CLAIM.criteria if c.task == task and arm in (c.arm, c.control, *c.rivals)}
    assert asked <= final.values.keys()
    assert all(math.isfinite(v) and v >= 0 for v in final.values.values())
    assert [m.at["nfe"] for m in curve] == list(STEPS)
    assert final.values["rmse_20"] < final.values["rmse_8"]


def test_the_seed_decides():
    first = run("ring", "hb4", seed=1)
    ghvb._problem.cache_clear()
    assert run("ring", "hb4", seed=1) == first
    assert run("ring", "hb4", seed=2) != first


def test_what_is_proved_tells_methods_and_controls_apart(monkeypatch):
    monkeypatch.setattr(_momentum, "RUN", 60)
    monkeypatch.setattr(_momentum, "STEPS", (80, 160))
    finals = {a.name: run("solvable", a.name)[-1].values for a in CLAIM.arms_on("solvable")}
    for c in CLAIM.criteria:
        if c.task == "solvable":
            holds = {"<=": lambda a, b: a <= b, ">": lambda a, b: a > b, ">=": lambda a, b: a >= b}[c.op]
            assert holds(finals[c.arm][c.metric], c.bound), c.name
            assert not c.control or not holds(finals[c.control][c.metric], c.bound), c.name


def test_orders_and_limits_are_measured_right():
    assert _momentum.order(DDIM(), 3, 0.0) == pytest.approx(1, abs=0.1)
    assert _momentum.order(DPMSolverMultistep(2, "eps", lower_order_final=False), 3, 1.5) == pytest.approx(2, abs=0.2)
    assert _momentum.limit(DDIM(), 0) == pytest.approx(2, rel=1e-3)  # Euler's
    assert _momentum.limit(HeavyBall(2, 1.0), 0) == pytest.approx(1, rel=1e-3)
