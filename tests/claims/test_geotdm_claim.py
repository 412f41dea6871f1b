"""Geometric trajectory diffusion's claim at a tiny scale: every arm runs and measures, and a trial is a function of its seed."""

from __future__ import annotations

import functools
import math

import pytest
import torch

from polyak.claims.generate import _symmetries
from polyak.claims.generate import _trajectories as p
from polyak.claims.generate.geotdm import CLAIM, NET
from polyak.generate.geotdm import simulate_nbody
from polyak.lab.claim import Diverged, Measurement, Trial

PAIRS = [(task.name, arm.name) for task in CLAIM.tasks for arm in CLAIM.arms_on(task.name)]
TINY = {"count": 2, "chain": 2, "steps": 2, "train": 4, "test": 2, "batch": 2, "width": 8, "layers": 1}
# What they return follows from their arguments, and takes thousands of steps.
bodies, simulator = (functools.cache(one) for one in (_symmetries.bodies, _symmetries.simulator))


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    """A chain that does not diverge without training, and bodies that take few steps."""
    monkeypatch.setattr(p, "STEPS", 1000)
    monkeypatch.setattr(p, "DT", 0.1)
    monkeypatch.setattr(_symmetries, "bodies", bodies)
    monkeypatch.setattr(_symmetries, "simulator", simulator)
    monkeypatch.setattr(p.GeometricTrajectoryDiffusion, "sample", _end)


def _end(model, h, *, x_given, cond_mask, edge_attr, generator):
    x = torch.cat([x_given, x_given.repeat(1, 1, 1, 2)[..., :6]], -1)
    return model.refine(x, 2, h, edge_attr=edge_attr, cond_mask=cond_mask, generator=generator)[None]


def run(task: str, arm: str, seed: int = 0) -> list[Measurement]:
    options = {**CLAIM.options("small", task, arm, CLAIM.arm(arm).points[0]), **TINY}
    return list(CLAIM.trial(Trial(claim="geotdm", scale="small", task=task, arm=arm, seed=seed, options=options)))


@pytest.mark.parametrize(("task", "arm"), PAIRS)
def test_an_arm_measures_what_is_asked_of_it(task, arm):
    *_, final = run(task, arm)
    asked = {c.metric for c in CLAIM.criteria if c.task == task and arm in (c.arm, *c.rivals)}
    asked |= {c.metric for c in CLAIM.criteria if c.task == task and arm == c.control}
    assert final.at is None
    assert asked <= final.values.keys() <= {m.name for m in CLAIM.metrics}
    assert all(math.isfinite(value) for value in final.values.values())


@pytest.mark.parametrize(("task", "arm"), [("exact", "transformer"), ("springs", "learned"), ("flat", "egtn")])
def test_a_trial_is_a_function_of_its_seed(task, arm):
    assert run(task, arm) == run(task, arm)
    assert run(task, arm) != run(task, arm, seed=1)


def test_what_is_proved_is_so_and_its_control_is_not():
    finals = {arm: run("exact", arm)[-1].values for arm in ("egtn", "transformer")}
    for c in CLAIM.criteria:
        if c.kind == "mechanism":
            assert finals["egtn"][c.metric] <= c.bound
            assert not c.control or finals["transformer"][c.metric] > 100 * c.bound


def test_a_sample_that_is_not_finite_is_a_divergence(monkeypatch):
    def explodes(*args, **options):
        raise ValueError("NaN in the prediction of evaluation 1 at t=1")

    monkeypatch.setattr(p.GeometricTrajectoryDiffusion, "sample", explodes)
    monkeypatch.setattr(p, "turns", explodes)
    for task, arm in (("springs", "com"), ("flat", "transformer")):
        with pytest.raises(Diverged, match="evaluation 1"):
            run(task, arm)


def test_the_transformer_has_no_fewer_weights_than_the_network_that_it_is_compared_with():
    own, other = (p.model(kind, "last", 0, NET["width"], NET["layers"]).net for kind in ("egtn", "transformer"))
    used = sum(v.numel() for name, v in own.named_parameters() if not name.startswith(("ref", "gamma")))
    assert used <= sum(v.numel() for v in other.parameters()) <= 1.3 * used


def test_arms_are_trained_alike(monkeypatch):
    """The same rows, steps of the chain and noise."""
    told = []
    original = p.GeometricTrajectoryDiffusion.loss

    def loss(model, x, *args, **options):
        told.append((x, options["generator"].get_state()))
        return original(model, x, *args, **options)

    monkeypatch.setattr(p.GeometricTrajectoryDiffusion, "loss", loss)
    for reference in ("learned", "com"):
        p.train(p.model("egtn", reference, 0, 8, 1), p.springs(0, 4), 3, 2, 2, 1e-3)
    for (x, state), (other, its) in zip(told[:2], told[2:], strict=True):
        assert torch.equal(x, other)
        assert torch.equal(state, its)


def test_the_closed_form_goes_on_as_the_simulator_does():
    x, _, edges, charges = simulate_nbody(
        "springs", 6, p.BODIES, 1201, save_every=120, dt=0.005, generator=torch.Generator().manual_seed(0)
    )
    known = p.data(x, edges / p.STIFFNESS, charges, torch.float64)
    assert (p.continued(known) - known.future).abs().max() < 0.005
    free = p.Data(known.x, known.h, torch.zeros_like(known.edge_attr))
    torch.testing.assert_close(p.continued(free), p.straight(free), rtol=0, atol=1e-9)


def test_flat_data_are_in_a_plane_and_turned_ones_in_another():
    known = p.springs(0, 3, flat=True)
    assert not known.x[:, :, 2].any()
    q, _ = p.motion(1, torch.float32)
    assert known.turned(q).x[:, :, 2].abs().max() > 0.1
    assert torch.linalg.det(q).item() == pytest.approx(1, abs=1e-5)
    assert torch.linalg.det(p.motion(1, torch.float32, mirrored=True)[0]).item() == pytest.approx(-1, abs=1e-5)
