"""Gauge freedom's claim at a tiny scale: every arm measures what is asked, and what is exact holds, and fails in the controls."""

from __future__ import annotations

import math
from functools import lru_cache

import pytest
import torch

from polyak.claims.generate import _gauge
from polyak.claims.generate.gauge_freedom import CLAIM
from polyak.core.distances import energy_distance
from polyak.lab.claim import Measurement, Trial

EXACT = {
    "points": 8,
    "samples": 60,
    "batches": 2,
    "ode_steps": 10,
    "sde_steps": 10,
    "permutations": 10,
    "steps": 30,
}
TINY = {
    "gaussian": EXACT,
    "mixture": EXACT,
    "plane": {"points": 200, "steps": 8},
    "sphere": {"data": 64, "points": 4, "width": 8, "batch": 16, "ode_steps": 6, "steps": 4},
    "roll": {"data": 64, "points": 4, "width": 8, "batch": 16, "ode_steps": 6, "steps": 4},
}


@lru_cache
def run(task: str, arm: str, seed: int = 0) -> tuple[Measurement, ...]:
    options = {**CLAIM.options("small", task, arm), **TINY[task]}
    return tuple(CLAIM.trial(Trial(claim=CLAIM.slug, scale="small", task=task, arm=arm, seed=seed, options=options)))


@pytest.fixture(scope="module")
def finals() -> dict[tuple[str, str], dict[str, float]]:
    found = {}
    for task in CLAIM.tasks:
        for arm in CLAIM.arms_on(task.name):
            [final] = run(task.name, arm.name)
            assert final.at is None
            found[task.name, arm.name] = dict(final.values)
    return found


def test_arms_measure_what_is_asked_of_them(finals):
    known = {m.name for m in CLAIM.metrics}
    for (task, arm), values in finals.items():
        asked = {c.metric for c in CLAIM.criteria if c.task == task and arm in (c.arm, c.control, *c.rivals)}
        assert asked <= values.keys() <= known
        assert all(math.isfinite(v) for v in values.values()), (task, arm)


def test_what_is_exact_holds_and_its_controls_fail(finals):
    for c in CLAIM.criteria:
        if c.kind == "mechanism":
            # a seventh of the steps, where the error of likelihoods, of fourth order, is 2e-4
            bound = 200 * c.bound if c.metric == "missed_most" else c.bound
            holds = {"<=": lambda v, b=bound: v <= b, ">=": lambda v, b=bound: v >= b}[c.op]
            assert holds(finals[c.task, c.arm][c.metric]), c.name
            assert not c.control or not holds(finals[c.task, c.control][c.metric]), c.name


@pytest.mark.parametrize(("task", "arm"), [("sphere", "free"), ("roll", "energy")])
def test_a_trial_is_a_function_of_its_seed(task, arm):
    first = run(task, arm)
    assert run.__wrapped__(task, arm) == first
    assert run(task, arm, seed=1) != first


def test_the_excess_is_that_of_the_energy_distance():
    draw = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, 40, 2, dtype=torch.float64, generator=draw)
    y = y + 0.4
    both, distances = torch.cat([x, y]), []
    for _ in range(400):
        order = torch.randperm(80, generator=draw)
        distances.append(energy_distance(both[order[:40]], both[order[40:]]))
    others = torch.tensor(distances)
    want = (energy_distance(x, y) - others.mean()) / others.std()
    assert _gauge.excess(x, y, 400, draw).item() == pytest.approx(want.item(), rel=0.25)
    alike = [_gauge.excess(*torch.randn(2, 40, 2, generator=draw), 40, draw).item() for _ in range(60)]
    assert abs(sum(alike) / 60) < 0.6


@pytest.mark.parametrize("shape", ["sphere", "roll"])
def test_surfaces_have_two_dimensions_and_their_size(shape):
    x = _gauge.surface(shape, 5, 4000, 0).double()
    assert torch.linalg.matrix_rank(x, rtol=1e-4).item() == 3
    assert 0.4 < (x.square().sum(1).mean() / 3).sqrt() < 0.6
    if shape == "sphere":
        assert torch.allclose(x.norm(dim=1), torch.full((4000,), math.sqrt(0.75)).double(), atol=1e-5)
