"""The claim of stochastic interpolants at a tiny scale: every arm runs, mechanisms hold and their controls do not."""

from __future__ import annotations

import math
from functools import lru_cache

import pytest
import torch

from polyak.claims.generate import _interpolants as problems
from polyak.claims.generate.interpolants import CLAIM
from polyak.lab.claim import Measurement, Trial

TINY = {
    "exact": {"steps": 60},
    "line": {"points": 300, "steps": 30},
    "checkerboard": {"points": 200, "steps": 10, "train": 20, "batch": 50, "width": 16, "depth": 2},
}


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(problems, "CELLS", 250)
    monkeypatch.setattr(problems, "MOMENTS", 100)


@lru_cache
def run(task: str, arm: str, seed: int = 0) -> Measurement:
    given = {**CLAIM.options("small", task, arm), **TINY[task]}
    (final,) = CLAIM.trial(Trial(claim=CLAIM.slug, scale="small", task=task, arm=arm, seed=seed, options=given))
    return final


@pytest.mark.parametrize(("task", "arm"), [(task, a.name) for task in TINY for a in CLAIM.arms_on(task)])
def test_an_arm_runs_and_measures_what_criteria_ask(task: str, arm: str) -> None:
    final = run(task, arm)
    asked = {c.metric for c in CLAIM.criteria if c.task == task and arm in (c.arm, c.control, *c.rivals)}
    assert asked <= final.values.keys()
    assert all(math.isfinite(v) and v >= 0 for v in final.values.values())


def test_mechanisms_hold_and_their_controls_do_not() -> None:
    for seed in (0, 3):  # two of the paths
        finals = {a.name: run("exact", a.name, seed).values for a in CLAIM.arms_on("exact")}
        for c in CLAIM.criteria:
            if c.task == "exact":
                assert finals[c.arm][c.metric] <= c.bound
                assert finals[c.control][c.metric] > 3 * c.bound


def test_the_grid_s_density_is_the_bridge_s_where_nothing_is_amiss() -> None:
    # The share of the bound that discretisation takes, at an error a thousand times smaller than the claim's.
    fields = problems.Wrong(problems.random_bridge(0), 1e-3)
    assert problems.over_bound(fields) * 1e-6 < 0.02
    w = torch.tensor([-700.0, -2.0, -1e-9, 0.0, 1e-9, 3.0]).double().numpy()
    assert problems.bernoulli(w) == pytest.approx([700.0, 2 / (1 - math.exp(-2)), 1.0, 1.0, 1.0, 3 / (math.exp(3) - 1)])


def test_the_board_is_a_board() -> None:
    x = problems.checkerboard(2000, torch.Generator().manual_seed(0))
    assert problems.off_the_board(x) == 0
    assert problems.off_the_board(x + torch.tensor([2.0, 0.0])) == 1
    # Half a square along the diagonal: a quarter stays, and of another quarter 5 in 8 find the next square.
    assert problems.off_the_board(x + 1) == pytest.approx(1 - 0.25 * (1 + 5 / 8), abs=0.05)
    assert (x.min() > -4, x.max() < 4) == (True, True)
    assert x.mean(0).abs().max() < 0.3


def test_the_seed_decides() -> None:
    first = run("checkerboard", "sde", 1)
    problems.trained.cache_clear()
    assert run.__wrapped__("checkerboard", "sde", 1) == first
    assert run("checkerboard", "sde", 2) != first
    assert run("line", "sde", 1) == run.__wrapped__("line", "sde", 1)
