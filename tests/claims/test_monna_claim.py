"""MoNNA's claim at a tiny scale: every arm runs under every attack, and the exact part's constant is one."""

from __future__ import annotations

import math
from functools import lru_cache

import pytest
import torch

from polyak.claims.optim import monna
from polyak.claims.optim.monna import ATTACKS, CLAIM
from polyak.lab.claim import Measurement, Trial

PAIRS = [(task.name, arm.name) for task in CLAIM.tasks_at("small") for arm in CLAIM.arms_on(task.name)]


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@lru_cache
def run(task: str, arm: str, seed: int = 0, scale: str = "small", **options: object) -> tuple[Measurement, ...]:
    given = {**CLAIM.options(scale, task, arm), "steps": 2, **options}
    return tuple(CLAIM.trial(Trial(claim="monna", scale=scale, task=task, arm=arm, seed=seed, options=given)))


@pytest.mark.parametrize(("task", "arm"), PAIRS)
def test_an_arm_runs_and_measures_what_criteria_ask(task, arm):
    *curve, final = run(task, arm)
    assert final.at is None
    assert final.values.keys() <= {m.name for m in CLAIM.metrics}
    assert all(math.isfinite(v) for m in (*curve, final) for v in m.values.values())
    for c in CLAIM.criteria:
        if c.task == task and arm in (c.arm, c.control):
            assert c.metric in final.values
        if c.task == task and arm in c.rivals:
            assert (c.against_metric or c.metric) in final.values
    if task != "quadratic" and arm != "ceiling":
        assert {k for m in curve for k in m.values} == {f"accuracy_{a}" for a in ATTACKS}
        assert final.values["worst"] == min(final.values[f"accuracy_{a}"] for a in ATTACKS)


def test_a_trial_is_a_function_of_its_seed():
    once = run("digits_1", "monna")
    assert once == run.__wrapped__("digits_1", "monna")
    assert once != run("digits_1", "monna", seed=1)


def test_workers_evaluate_equally_many_gradients():
    counts = {arm: run("digits_1", arm)[-1].values["gradients"] for arm in ("ceiling", "dsgd", "monna", "scc")}
    assert set(counts.values()) == {2 * 9 * 25}


def test_attacks_break_averaging_and_not_monna():
    options = dict(steps=12, momentum=0.5)
    averaged = run("digits_5", "dsgd", **options)[-1].values
    robust = run("digits_5", "monna", **options)[-1].values
    assert averaged["worst_flip_foe"] < 0.4
    assert robust["worst"] > 0.8


def test_the_constant_bounds_what_any_push_can_do():
    """The mean's recursion, pushed each step with the worst sign, moves by the sum of the impulse response."""
    n, f, lr, b = 11, 2, 0.05, 0.9
    pushes, x, m = [], 1.0, 0.0
    for _ in range(2000):
        pushes.append(x)
        m = b * m + (1 - b) * x
        x -= lr * m
    x = m = 0.0
    for push in reversed([math.copysign(1.0, r) for r in pushes]):
        m = b * m + (1 - b) * x
        x = x - lr * m + push
    a = 4 * f / (n - f)
    moved = 2 * f / (n - f) * lr / (1 - a * (1 + lr)) * x
    assert monna.constant(n, f, lr, b) == pytest.approx(moved, rel=1e-9)
    with pytest.raises(ValueError, match=r"no bound for n=11, f=2, lr=0\.2"):
        monna.constant(11, 2, 0.2, 0.9)


def test_the_quadratic_part_tells_the_rules_apart():
    robust = run("quadratic", "monna", steps=30)[-1].values
    averaged = run("quadratic", "dsgd", steps=150, lr=0.1)[-1].values
    assert robust["excess"] < 1 < averaged["excess"]
    assert averaged["nonlinearity"] < 1e-6


def test_the_papers_network_has_the_papers_size(monkeypatch):
    from polyak.lab import data

    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (60, 28, 28), generator=generator, dtype=torch.uint8).numpy()
    monkeypatch.setattr(data, "mnist", lambda split: (pixels, (torch.arange(60) % 10).numpy()))
    model, (x, y), _ = monna._problem(
        Trial(claim="monna", scale="paper", task="mnist_1", arm="monna", seed=0, options={})
    )
    assert sum(p.numel() for p in model.parameters()) == 520 + 25_050 + 400_500 + 5_010
    assert x.shape == (60, 1, 28, 28)
    assert len(y) == 60
    monkeypatch.setattr(monna, "ATTACKS", ("sign_flip", "foe"))
    options = dict(n=4, f=1, steps=2, batch=4)
    for arm in ("monna", "learn"):
        final = run("mnist_1", arm, scale="paper", **options)[-1].values
        assert final["gradients"] == 3 * (2 * 4 if arm == "monna" else 1 + 2)
