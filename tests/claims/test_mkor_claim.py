"""MKOR's claim at a tiny scale: every arm runs and measures, arms of a seed meet the same problem; and K-FAC, its reference."""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
import pytest
import torch

from polyak.claims import _problems
from polyak.claims._kfac import KFAC
from polyak.claims.optim import _mkor_exact, mkor
from polyak.claims.optim.mkor import CLAIM, TRAINED
from polyak.lab import data
from polyak.lab.claim import Diverged, Measurement, Trial

TINY = {"autoencoder": {"inv_freq": 1}, "mnist": {"inv_freq": 1}, "width": {"widths": "784-64-10"}, "equations": {}}
PAIRS = [(task, arm.name) for task in (*TRAINED, "width") for arm in CLAIM.arms_on(task)]


@lru_cache
def noise() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    return rng.integers(0, 256, (10_000, 28, 28), dtype=np.uint8), rng.integers(0, 10, 10_000)


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """One thread; and images of noise where MNIST is, narrow, so that nothing has to be at hand."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.setattr(data, "mnist", lambda split: noise())
    yield
    torch.set_num_threads(before)


@lru_cache
def run(task: str, arm: str, seed: int = 0, **options: object) -> tuple[Measurement, ...]:
    point = CLAIM.arm(arm).points[0]
    given = {**CLAIM.options("small", task, arm, point), "steps": 4, "every": 2, "batch": 32, **TINY[task], **options}
    return tuple(CLAIM.trial(Trial(claim="mkor", scale="small", task=task, arm=arm, seed=seed, options=given)))


@pytest.mark.parametrize(("task", "arm"), PAIRS)
def test_an_arm_runs_and_measures_what_criteria_and_tuning_ask(task, arm):
    *curve, final = run(task, arm)
    assert final.at is None
    assert [m.at["step"] for m in curve if m.at] == ([1, 2, 3, 4] if task == "width" else [2, 4])
    asked = {c.metric for c in CLAIM.criteria if c.task == task} | ({CLAIM.task(task).tune} - {""})
    assert asked <= final.values.keys() <= {m.name for m in CLAIM.metrics}
    assert all(math.isfinite(v) for m in (*curve, final) for v in m.values.values())


def test_the_equations_hold_and_the_controls_do_not():
    finals = {a.name: run("equations", a.name)[-1].values for a in CLAIM.arms_on("equations")}
    asked = [c for c in CLAIM.criteria if c.task == "equations"]
    assert len(asked) == 7
    for c in asked:
        assert (finals[c.arm][c.metric] <= c.bound) == (c.op == "<=")
        assert not c.control or finals[c.control][c.metric] > 1.2 * c.bound


def test_an_updates_work_is_that_of_the_formulas():
    # P v and v . P v for both sides; for K-FAC two Gram matrices and two inversions
    assert _mkor_exact._work("mkor", 64) == 2 * (2 * 64**2 + 2 * 64)
    assert _mkor_exact._work("kfac", 64) == 2 * (2 * _mkor_exact.ROWS * 64**2 + 64**3 // 3 + 2 * 64**3 // 3)


@pytest.mark.parametrize("task", TRAINED)
def test_a_trial_is_a_function_of_its_seed(task):
    def losses(seed, run=run):
        return [m.values["train_loss"] for m in run(task, "mkor", seed)]

    assert losses(0) == losses(0, run.__wrapped__)
    assert losses(0) != losses(1)


@pytest.mark.parametrize("task", TRAINED)
def test_the_control_is_the_base(task):
    """And MKOR is not: all arms of a seed start alike, and differ by their steps alone."""
    losses = {arm: [m.values["train_loss"] for m in run(task, arm)] for arm in ("sgd", "no_update", "mkor")}
    assert losses["no_update"] == losses["sgd"]
    assert losses["mkor"] != losses["sgd"]


def test_steps_to_the_target():
    *curve, final = run("autoencoder", "sgd", steps=20, every=5, lr=0.3)
    losses = [m.values["train_loss"] for m in curve]
    assert final.values["steps"] == 40
    assert final.values["seconds"] == 2 * curve[-1].at["seconds"]
    for n, loss in enumerate(losses):
        *others, reached = run("autoencoder", "sgd", steps=20, every=5, lr=0.3, target=loss)
        first = next(i for i, other in enumerate(losses) if other <= loss)
        assert reached.values["steps"] == 5 * (first + 1), n
        assert reached.values["seconds"] == others[first].at["seconds"] > 0


def test_divergence_is_told():
    with pytest.raises(Diverged, match="step"):
        run("autoencoder", "sgd", steps=100, lr=1e9)


def test_what_is_trained_on_is_not_held_out():
    options = {**CLAIM.options("small", "autoencoder", "sgd"), "batch": 100}
    problem = mkor._problem(Trial(claim="mkor", scale="small", task="autoencoder", arm="sgd", seed=0, options=options))
    rows = torch.cat([next(problem.batches) for _ in range(14)])
    assert len(rows.unique()) == 1400
    x, _ = _problems.digit_images("cpu")
    assert rows.max() < len(x) - _problems.TEST_DIGITS
    with torch.no_grad():
        outside = x[-_problems.TEST_DIGITS :]
        expected = (problem.model(outside) - outside).square().mean().item()
    assert problem.results()["test_loss"] == pytest.approx(expected, rel=1e-6)
    assert float(x.mean()) > 0.2, "inputs are not centred"


def test_every_tuned_arm_gets_as_many_rates():
    assert {len(a.points) for a in CLAIM.arms if a.grid} == {4}
    assert {a.tasks for a in CLAIM.arms if not a.grid} == {("width",), ("equations",)}


def test_kfac_is_the_damped_inverse_of_the_moving_averages():
    model = _problems.seeded(lambda: _problems.dense(3, 4, 2, activation=torch.nn.Tanh), 0, "cpu")
    kfac = KFAC(model, damping=0.1, decay=0.8, every=1, clip=1e9)
    generator = torch.Generator().manual_seed(0)
    A, G = np.eye(4), np.eye(4)
    for _ in range(3):
        x = torch.randn(6, 3, generator=generator)
        model.zero_grad()
        hidden = model[0](x)
        hidden.retain_grad()
        model[2](torch.tanh(hidden)).square().mean().backward()
        a = torch.cat([x, torch.ones(6, 1)], 1).double().numpy()
        g = 6 * hidden.grad.double().numpy()
        A, G = 0.8 * A + 0.2 * a.T @ a / 6, 0.8 * G + 0.2 * g.T @ g / 6
        grad = torch.cat([model[0].weight.grad, model[0].bias.grad[:, None]], 1).double().numpy()
        kfac.precondition(lr=0.1)
        U = np.linalg.inv(G + 0.1 * np.eye(4)) @ grad @ np.linalg.inv(A + 0.1 * np.eye(4))
        found = torch.cat([model[0].weight.grad, model[0].bias.grad[:, None]], 1).double().numpy()
        # Inverses of condition below 1e3 in float32.
        np.testing.assert_allclose(found, U, rtol=1e-3, atol=1e-5)


def test_kfac_clips_its_step():
    """Clipped, ``lr^2 sum <U, grad>`` is the geometric mean of the clip and of what it was."""
    model = _problems.seeded(lambda: _problems.dense(3, 4, 2, activation=torch.nn.Tanh), 0, "cpu")
    x, products = torch.randn(6, 3, generator=torch.Generator().manual_seed(0)), []
    for clip in (1e-3, 1e12):
        kfac = KFAC(model, clip=clip)
        model.zero_grad()
        model(x).square().mean().backward()
        grads = [p.grad.clone() for p in model.parameters()]
        kfac.precondition(lr=2.0)
        products.append(4.0 * sum((p.grad * g).sum().item() for p, g in zip(model.parameters(), grads, strict=True)))
    clipped, whole = products
    assert whole > 1e-3
    assert clipped == pytest.approx(math.sqrt(1e-3 * whole), rel=1e-4)
