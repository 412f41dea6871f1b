"""The claim of Feynman-Kac correctors at a tiny scale: every arm runs, the seed decides, and weights are what tells arms apart."""

from __future__ import annotations

import math
from functools import lru_cache

import pytest
import sklearn.datasets  # noqa: F401 - it and the next take seconds to import, which are not the claim's
import torch._dynamo  # noqa: F401

from polyak.claims.generate import fkc
from polyak.claims.generate.fkc import CLAIM
from polyak.lab.claim import Trial

TINY = {
    "exact": {"steps": 64},
    "ring": {"particles": 300, "steps": 40},
    "product": {"particles": 200, "steps": 20},
    "digits": {"particles": 2, "steps": 3},
}


@pytest.fixture(scope="module", autouse=True)
def untrained() -> object:
    """In the place of a U-Net, which other claims train in their tests."""
    with pytest.MonkeyPatch.context() as patch:
        network = lambda x, c, labels: 0.1 * x * labels[:, None, None, None]  # noqa: E731
        patch.setattr("polyak.claims._images.train", lambda recipe, device: network)
        fkc._trained.cache_clear()
        yield
    fkc._trained.cache_clear()


@lru_cache
def run(task: str, arm: str, seed: int = 0) -> dict[str, float]:
    given = {**CLAIM.options("small", task, arm), **TINY[task]}
    (final,) = CLAIM.trial(Trial(claim=CLAIM.slug, scale="small", task=task, arm=arm, seed=seed, options=given))
    return final.values


@pytest.mark.parametrize(("task", "arm"), [(task, a.name) for task in TINY for a in CLAIM.arms_on(task)])
def test_an_arm_runs_and_measures_what_criteria_ask(task, arm):
    found = run(task, arm)
    asked = {c.metric for c in CLAIM.criteria if c.task == task and arm in (c.arm, c.control, *c.rivals)}
    assert asked <= found.keys()
    assert all(math.isfinite(v) for v in found.values())


def test_equations_hold_with_weights_alone():
    exact, unweighted, no_log = (run("exact", arm) for arm in ("exact", "unweighted", "no_log"))
    assert exact["unbalance"] < 1e-4
    assert unweighted["unbalance"] > 0.5
    assert exact["changing"] < 1e-4
    assert no_log["changing"] > 0.1
    assert exact["moments"] < unweighted["moments"]
    assert exact["order"] > 0.9


def test_the_seed_decides_and_weights_help():
    assert run("ring", "fkc")["tv"] < run("ring", "none")["tv"]
    assert run("ring", "fkc", 1) != run("ring", "fkc", 0)
    first = run("ring", "fkc")
    run.cache_clear()
    assert run("ring", "fkc") == first
