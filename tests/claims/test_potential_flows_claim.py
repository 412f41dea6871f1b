"""Potential flows' claim at a tiny scale: every arm runs and measures, and a trial is a function of its seed."""

from __future__ import annotations

import math

import pytest
import torch

from polyak.claims.generate import _traversals
from polyak.claims.generate.potential_flows import CLAIM
from polyak.lab.claim import Measurement, Trial

PAIRS = [(task.name, arm.name) for task in CLAIM.tasks for arm in CLAIM.arms_on(task.name)]
TINY = {"iterations": 1, "batch": 4, "pairs": 200, "judged": 1, "points": 5, "epochs": 1}


def run(task: str, arm: str, seed: int = 0) -> list[Measurement]:
    options = {**CLAIM.options("small", task, arm), **TINY}
    return list(CLAIM.trial(Trial(claim=CLAIM.slug, scale="small", task=task, arm=arm, seed=seed, options=options)))


@pytest.mark.parametrize(("task", "arm"), PAIRS)
def test_an_arm_measures_what_is_asked_of_it(task, arm):
    *_, final = run(task, arm)
    asked = {c.metric for c in CLAIM.criteria if c.task == task and arm in (c.arm, *c.rivals, c.control)}
    assert final.at is None
    assert asked <= final.values.keys() <= {m.name for m in CLAIM.metrics}
    assert all(math.isfinite(value) for value in final.values.values())


@pytest.mark.parametrize("task", ["digits", "ellipses"])
def test_a_trial_is_a_function_of_its_seed(task):
    first = run(task, "flow")
    _traversals.digits.cache_clear()
    assert run(task, "flow") == first
    assert run(task, "flow", seed=1) != first


def test_what_is_proved_is_so_and_its_controls_are_not():
    finals = {arm.name: run("exact", arm.name)[-1].values for arm in CLAIM.arms_on("exact")}
    for c in CLAIM.criteria:
        if c.kind == "mechanism":
            assert finals[c.arm][c.metric] <= c.bound
            assert not c.control or finals[c.control][c.metric] > 1e6 * c.bound


def test_factors_are_what_is_drawn():
    """The centre of an ellipse's pixels is where its factors say, and its area grows with the size."""
    drawn, z = _traversals.Ellipses(0), torch.randn(50, _traversals.LATENT, generator=torch.Generator().manual_seed(0))
    factors, images = drawn.factors(z), drawn(z)[:, 0]
    for i in (0, 1):
        centre = (images * drawn.grid[i]).sum((1, 2)) / images.sum((1, 2))
        assert torch.corrcoef(torch.stack([centre, factors[:, i]]))[0, 1] > 0.95
    assert torch.corrcoef(torch.stack([images.sum((1, 2)), factors[:, 2]]))[0, 1] > 0.7
    assert factors.std(0).min() > 0.2


def test_principal_directions_are_those_of_a_linear_generator():
    scales = torch.tensor([3.0, 5.0, 1.0, 2.0, 0.1, 0.2, 0.3, 0.4])
    found = _traversals.principal(torch.nn.Linear(8, 8).requires_grad_(False), 2, 0)
    torch.testing.assert_close(found @ found.T, torch.eye(2))
    plain = torch.nn.Linear(8, 8, bias=False)
    plain.weight.data = torch.diag(scales)
    order = _traversals.principal(plain.requires_grad_(False), 3, 0).abs().argmax(1)
    assert order.tolist() == [1, 0, 3]


def test_waves_obey_and_others_do_not():
    flow = _traversals.edits("flow", _traversals.Ellipses(0), 0, 2, 6, 0.65).double()
    n = torch.ones(8, dtype=torch.float64) / math.sqrt(8)

    class Wave(torch.nn.Module):
        def forward(self, z, t):
            return torch.sin(z.double() @ n - 0.8 * t.double()).to(z)

    flow.potentials[0] = flow.potentials[1] = Wave()
    flow = flow.float()
    assert _traversals.obedience(flow, 0, 20, fitted=True)["residual"] < 1e-6
    assert 0.01 < _traversals.obedience(flow, 0, 20, fitted=False)["residual"] < 1  # the speed is 1, not 0.8
