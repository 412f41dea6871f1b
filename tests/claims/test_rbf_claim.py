"""The claim of rollover budget forcing at a tiny scale: every arm measures what is asked, in its budget; what is exact holds."""

from __future__ import annotations

import math
from functools import lru_cache

import pytest
import torch

from polyak.claims.generate import _flows
from polyak.claims.generate.rbf import CLAIM, SEARCHED
from polyak.generate import Flow
from polyak.generate.problems import ExactDenoiser, Mixture
from polyak.lab.claim import Measurement, Trial

TINY = {"nfe": 120, "steps": 4, "systems": 1}


@lru_cache
def run(task: str, arm: str, seed: int = 0) -> Measurement:
    options = {**CLAIM.options("small", task, arm), **(TINY if task in SEARCHED else {})}
    [final] = CLAIM.trial(Trial(claim=CLAIM.slug, scale="small", task=task, arm=arm, seed=seed, options=options))
    return final


@pytest.mark.parametrize(("task", "arm"), [(task, a.name) for task in SEARCHED for a in CLAIM.arms_on(task)])
def test_an_arm_finds_something_within_the_budget(task: str, arm: str) -> None:
    final = run(task, arm).values
    assert math.isfinite(final["reward"])
    assert final["reward"] <= 0
    assert 84 <= final["calls"] <= 120
    run.cache_clear()
    assert run(task, arm).values == final
    assert {c.metric for c in CLAIM.criteria if c.task == task} <= final.keys()


def test_what_is_exact_holds_and_fails_in_the_control() -> None:
    finals = {a.name: run("solvable", a.name).values for a in CLAIM.arms_on("solvable")}
    for c in CLAIM.criteria:
        if c.kind != "mechanism":
            continue
        holds = {"<=": lambda x, c=c: x <= c.bound, ">=": lambda x, c=c: x >= c.bound}[c.op]
        assert holds(finals[c.arm][c.metric]), c.name
        assert not c.control or not holds(finals[c.control][c.metric]), c.name


def test_the_straight_flow_is_straight_and_ends_in_the_law() -> None:
    z, q = _flows.quantiles()
    noise = torch.randn(64, _flows.DIM, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    data = _flows.straight(noise, torch.ones(64))
    for t in (0.8, 0.3, 0.01):
        between = noise - (1 - t) * data
        assert torch.allclose(_flows.straight(between, torch.full((64,), t, dtype=torch.float64)), data, atol=1e-9)
    # Ranks of the noise are kept: a third of it goes to each mode.
    assert torch.all(torch.diff(q) > 0)
    third = math.sqrt(2) * torch.erfinv(torch.tensor(-1 / 3, dtype=torch.float64))
    at = int(torch.searchsorted(z, third))
    assert q[at - 2] < -0.75 < q[at + 2]
    inside = ((noise - data).abs() > 0.75).double().mean()
    assert inside.item() == pytest.approx(2 / 3, abs=0.05)


def test_the_blurred_flow_is_that_of_the_mixture() -> None:
    law = Mixture([[m] for m in _flows.MODES], [_flows.WIDTH**2] * 3)
    x = torch.linspace(-2, 2, 32, dtype=torch.float64).reshape(2, 16)
    for t in (0.9, 0.4, 0.05):
        want = ExactDenoiser(law, Flow())(x.reshape(-1, 1), t).flow.reshape(2, 16)
        assert torch.allclose(_flows.blurred(x, torch.full((2,), t, dtype=torch.float64)), want, rtol=1e-9)


def test_rewards() -> None:
    x = torch.tensor([1.5] * 11 + [-1.5] * 4 + [0.0])
    assert _flows.counting(x).item() == 0
    assert _flows.counting(-x).item() == -14
    assert _flows.corner(torch.tensor([1.5, -1.5] * 8)).item() == 0
    assert _flows.corner(torch.zeros(2, 16)).tolist() == pytest.approx([-6.0, -6.0])
