"""APG's claim at a tiny scale: every arm runs, the same seed gives the same numbers, and the exact criteria hold."""

from __future__ import annotations

import math

import pytest

from polyak.claims.generate import apg
from polyak.claims.generate.apg import CLAIM
from polyak.lab.claim import Measurement, Trial

TINY = {"digits": {"samples": 12, "classes": 2}, "exact": {}}


def run(task: str, arm: str, seed: int = 0, **options: object) -> Measurement:
    given = {**CLAIM.options("small", task, arm), **TINY[task], **options}
    (final,) = CLAIM.trial(Trial(claim=CLAIM.slug, scale="small", task=task, arm=arm, seed=seed, options=given))
    return final


@pytest.mark.parametrize("arm", [a.name for a in CLAIM.arms_on("digits")])
def test_an_arm_runs_and_measures_what_criteria_ask(arm):
    final = run("digits", arm)
    asked = {c.metric for c in CLAIM.criteria if c.task == "digits" and arm in (c.arm, c.control, *c.rivals)}
    assert asked <= final.values.keys()
    assert all(map(math.isfinite, final.values.values()))


def test_the_seed_decides():
    first = run("digits", "apg", seed=1)
    apg._problem.cache_clear()
    assert run("digits", "apg", seed=1) == first
    assert run("digits", "apg", seed=2) != first


def test_without_guidance_nothing_is_added():
    assert run("digits", "apg", scale=1.0).values["excess"] == 0


def test_what_equations_promise_holds_and_not_without_the_ingredient():
    finals = {a.name: run("exact", a.name).values for a in CLAIM.arms_on("exact")}
    for c in CLAIM.criteria:
        if c.kind == "mechanism":
            assert finals[c.arm][c.metric] <= c.bound
            assert finals[c.control][c.metric] > max(1.5 * c.bound, 1e-3)
