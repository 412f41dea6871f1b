"""Adan's claim at a tiny scale: every arm runs and measures, and all arms of one seed meet the same problem."""

from __future__ import annotations

import dataclasses
import itertools
import math

import numpy as np
import pytest
import torch

from polyak.claims import _problems
from polyak.claims.optim import adan
from polyak.claims.optim.adan import CLAIM, TRAINED
from polyak.lab.claim import Measurement, Trial
from polyak.optim.adan import Adan

PROBLEMS = {"vit": _problems.digits_vit, "char_lm": _problems.char_lm, "autoencoder": _problems.digits_autoencoder}
PAIRS = [(task, arm.name) for task in TRAINED for arm in CLAIM.arms_on(task)]


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def trial_of(task: str, arm: str, seed: int = 0, **options: object) -> Trial:
    point = CLAIM.arm(arm).points[0]
    given = {**CLAIM.options("small", task, arm, point), "steps": 4, **options}
    return Trial(claim="adan", scale="small", task=task, arm=arm, seed=seed, options=given)


def run(task: str, arm: str, seed: int = 0, **options: object) -> list[Measurement]:
    return list(CLAIM.trial(trial_of(task, arm, seed, **options)))


@pytest.mark.parametrize(("task", "arm"), PAIRS)
def test_an_arm_runs_and_measures_what_criteria_and_tuning_ask(task, arm):
    *curve, final = run(task, arm)
    budget = CLAIM.arm(arm).options["budget"]
    assert [m.at for m in curve] == [{"step": i + 1} for i in range(int(4 * budget))]
    assert final.at is None
    asked = {c.metric for c in CLAIM.criteria if c.task == task} | {CLAIM.task(task).tune}
    assert asked <= final.values.keys() <= {m.name for m in CLAIM.metrics}
    assert all(math.isfinite(v) for m in (*curve, final) for v in m.values.values())


def test_the_equations_hold_and_the_controls_do_not():
    finals = {a.name: run("equations", a.name)[-1].values for a in CLAIM.arms_on("equations")}
    asked = [c for c in CLAIM.criteria if c.task == "equations"]
    assert len(asked) == 4
    for c in asked:
        assert finals[c.arm][c.metric] <= c.bound
        assert finals[c.control][c.metric] > 0.1


@pytest.mark.parametrize("task", TRAINED)
def test_a_trial_is_a_function_of_its_seed(task):
    assert run(task, "adan") == run(task, "adan")
    assert run(task, "adan") != run(task, "adan", seed=1)


@pytest.mark.parametrize("task", TRAINED)
def test_all_arms_of_a_seed_start_alike_and_see_the_same_data(task):
    # The first step's loss is taken before any optimizer has moved; the batches know nothing of the optimizer.
    firsts = {run(task, arm.name)[0].values["train_loss"] for arm in CLAIM.arms_on(task)}
    assert len(firsts) == 1
    one, two = PROBLEMS[task](3), PROBLEMS[task](3)
    for a, b in zip(one.model.parameters(), two.model.parameters(), strict=True):
        assert torch.equal(a, b)
    list(_problems.train(one, Adan(one.model.parameters()), steps=2, schedule=_problems.warmup_cosine(2)))
    next(two.batches), next(two.batches)
    for a, b in itertools.islice(zip(one.batches, two.batches, strict=False), 15):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_the_global_generator_is_left_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    _problems.digits_vit(0)
    assert torch.equal(torch.rand(3), expected)


def test_the_reported_loss_of_the_vit_is_over_all_training_digits():
    problem = _problems.digits_vit(0)
    seen: list[torch.Tensor] = [next(problem.batches)[0] for _ in range(11)]
    assert sum(map(len, seen)) == 11 * 128
    x, y = _problems.digit_images("cpu")
    assert len(x) - _problems.TEST_DIGITS == 1437
    x = _problems._standardized(x)
    tokens = torch.stack(
        [x.view(-1, 8, 8)[:, i : i + 2, j : j + 2].flatten(1) for i in (0, 2, 4, 6) for j in (0, 2, 4, 6)], 1
    )
    with torch.no_grad():
        logits = problem.model(tokens)
    inside, outside = slice(0, 1437), slice(1437, None)
    results = problem.results()
    expected = torch.nn.functional.cross_entropy(logits[inside], y[inside])
    assert results["train_loss"] == pytest.approx(expected.item(), rel=1e-5)
    assert results["accuracy"] == pytest.approx((logits[outside].argmax(1) == y[outside]).double().mean().item())


def test_no_test_digit_is_trained_on_and_an_epoch_repeats_none():
    problem = _problems.digits_mlp(0, batch=100)
    x, _ = _problems.digit_images("cpu")
    rows = {tuple(r) for r in _problems._standardized(x)[:-360].tolist()}
    epoch = torch.cat([next(problem.batches)[0] for _ in range(14)])
    assert {tuple(r) for r in epoch.tolist()} <= rows
    assert len(np.unique(epoch.numpy(), axis=0)) == 1400


def test_the_language_model_sees_no_later_character():
    problem = _problems.char_lm(0)
    window = next(problem.batches)[:1, :-1]
    changed = window.clone()
    changed[0, 40:] = (changed[0, 40:] + 1) % 5
    with torch.no_grad():
        a, b = problem.model(window), problem.model(changed)
    torch.testing.assert_close(a[0, :40], b[0, :40])
    assert not torch.allclose(a[0, 40:], b[0, 40:])


def test_what_is_trained_on_and_what_is_held_out_are_apart(monkeypatch):
    numbers = np.arange(2000)
    monkeypatch.setattr(_problems, "_characters", lambda: (numbers, 2000))
    problem = _problems.char_lm(0, dim=8, heads=2)
    drawn = torch.cat([next(problem.batches) for _ in range(1000)])
    assert drawn.min() == 0
    assert drawn.max() == 1799
    assert (drawn.diff(dim=1) == 1).all()


def test_the_control_is_adam_with_other_betas():
    made = adan._optimizer(trial_of("vit", "no_difference"), [{"params": [torch.zeros(1)], "weight_decay": 0.02}])
    assert made.param_groups[0]["betas"] == (0.98, 0.0, 0.99)
    other = adan._optimizer(trial_of("vit", "adan"), [{"params": [torch.zeros(1)], "weight_decay": 0.02}])
    assert other.param_groups[0]["betas"] == (0.98, 0.92, 0.99)


def test_half_the_budget_is_half_the_steps_with_a_schedule_of_its_own():
    schedule = _problems.warmup_cosine(200)
    factors = [schedule(i) for i in range(200)]
    assert max(factors) == factors[20] == 1.0
    assert all(a < b for a, b in itertools.pairwise(factors[:21]))
    assert all(a > b for a, b in itertools.pairwise(factors[20:]))
    assert 0 < factors[-1] < 1e-3
    *curve, _ = run("autoencoder", "adan_half", steps=100)
    assert curve[-1].at == {"step": 50}


def test_divergence_is_told():
    problem = _problems.digits_autoencoder(0)
    optimizer = torch.optim.SGD(problem.model.parameters(), lr=1e20)
    with pytest.raises(_problems.Diverged, match="step"):
        list(_problems.train(problem, optimizer, steps=40, schedule=_problems.warmup_cosine(40, warmup=0.0)))


def test_accumulated_gradients_are_those_of_one_large_batch():
    big, small = _problems.digits_mlp(0, batch=128), _problems.digits_mlp(0, batch=32)
    small = dataclasses.replace(small, accumulate=4)
    for problem in (big, small):
        optimizer = torch.optim.SGD(problem.model.parameters(), lr=0.1)
        list(_problems.train(problem, optimizer, steps=3, schedule=lambda step: 1.0))
    for a, b in zip(big.model.parameters(), small.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_every_tuned_arm_gets_as_many_rates_and_only_matrices_decay():
    assert {len(a.points) for a in CLAIM.arms if a.grid} == {3}
    decayed, plain = _problems.decay_matrices(_problems.digits_vit(0).model, 0.02)
    assert all(p.dim() >= 2 for p in decayed["params"])
    assert all(p.dim() == 1 for p in plain["params"])
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.02, 0.0)


def test_the_papers_scale_says_what_it_lacks(monkeypatch):
    monkeypatch.setattr(_problems, "import_module", _missing)
    options = CLAIM.options("paper", "imagenet", "adan_deit")
    with pytest.raises(_problems.data.DataError, match="pip install timm"):
        next(
            iter(
                CLAIM.trial(
                    Trial(claim="adan", scale="paper", task="imagenet", arm="adan_deit", seed=0, options=options)
                )
            )
        )


def _missing(name: str) -> object:
    raise ImportError(name)
