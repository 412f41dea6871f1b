"""Denoising MCMC's claim at a tiny scale: every arm runs and measures, what is exact holds, and a trial is its seed's function."""

from __future__ import annotations

import math

import pytest
import torch

from polyak.claims.generate import _chains
from polyak.claims.generate.dmcmc import BUDGETS, CLAIM
from polyak.lab.claim import Measurement, Trial

TINY = {
    "line": {},
    "known": {"chains": 4},
    "trained": {"chains": 3, "steps": 4, "width": 8, "classifier_steps": 1, "classes": 20},
}


@pytest.fixture(scope="module", autouse=True)
def small() -> object:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_chains, "KNOWN", 20)
        few = _chains.digits()[:200]
        patch.setattr(_chains, "digits", lambda: few)
        _chains._to_digits.cache_clear()
        patch.setattr("polyak.claims.generate.dmcmc.MANY", 7)
        yield
    _chains._to_digits.cache_clear()


def run(task: str, arm: str, seed: int = 0) -> list[Measurement]:
    options = {**CLAIM.options("small", task, arm), **TINY[task]}
    return list(CLAIM.trial(Trial(claim=CLAIM.slug, scale="small", task=task, arm=arm, seed=seed, options=options)))


@pytest.fixture(scope="module")
def made() -> dict[tuple[str, str], list[Measurement]]:
    return {(t.name, a.name): run(t.name, a.name) for t in CLAIM.tasks for a in CLAIM.arms_on(t.name)}


def test_arms_measure_what_is_asked_of_them(made):
    known = {m.name for m in CLAIM.metrics}
    for (task, arm), (*curve, final) in made.items():
        asked = {c.metric for c in CLAIM.criteria if c.task == task and arm in (c.arm, c.control, *c.rivals)}
        assert asked <= final.values.keys() <= known, (task, arm)
        assert all(math.isfinite(v) for v in final.values.values())
        assert bool(curve) == (task != "line")


def test_arms_spend_what_they_say(made):
    for (task, arm), (*curve, final) in made.items():
        if arm.startswith("dlg"):
            assert [m.at["nfe"] for m in curve] == (list(BUDGETS) if arm == "dlg" else [9])
            # 57 evaluations of the warm-up for each chain, 9 for each sample
            assert final.values["nfe_five"] == pytest.approx(9 + 57 / 5), (task, arm)
            if arm == "dlg":
                assert final.values["nfe_forty"] == pytest.approx(9 + 57 / 7)
    for name in ("heun", "churn", "dpm"):
        for nfe in (5, 7, 9, 11):
            denoiser, *rest = _chains.known(0)
            _chains.from_noise((denoiser, *rest), 0, name, nfe, 3)
            assert denoiser.nfe == nfe


def test_what_is_exact_holds_and_its_controls_fail(made):
    for c in CLAIM.criteria:
        if c.kind == "mechanism":
            holds = {"<=": lambda v, b=c.bound: v <= b, ">=": lambda v, b=c.bound: v >= b}[c.op]
            assert holds(made[c.task, c.arm][-1].values[c.metric]), c.name
            assert not c.control or not holds(made[c.task, c.control][-1].values[c.metric]), c.name


@pytest.mark.parametrize(("task", "arm"), [("known", "dlg_sample"), ("trained", "no_chain")])
def test_a_trial_is_a_function_of_its_seed(made, task, arm):
    _chains.trained.cache_clear()
    assert run(task, arm) == made[task, arm]
    assert run(task, arm, seed=1) != made[task, arm]


def test_copies_are_counted():
    x = torch.randn(3, 4, 64, dtype=torch.float64)
    x[1, 2] = x[0, 2]
    found = _chains.of_chains(list(x))
    assert found["copies"] == 1 / 8
