"""APO's claim at a tiny scale: every arm runs, the seed decides, and the problems are what they say."""

from __future__ import annotations

import itertools
import math
from functools import lru_cache

import pytest
import torch

from polyak.claims import _preferences, _problems
from polyak.claims.optim.apo import CLAIM
from polyak.lab import data
from polyak.lab.claim import Measurement, Trial
from polyak.optim.apo import exponent

CASES = [(task.name, arm.name) for task in CLAIM.tasks for arm in CLAIM.arms_on(task.name)]
TINY = {
    "exact": {"problems": 20, "target": 0.05},
    "sampled": {"problems": 3, "responses": 5, "pairs": 50, "steps": 5},
    "vowels": {
        "length": 6,
        "given": 4,
        "dim": 8,
        "pretraining": 20,
        "prompts": 8,
        "batch": 4,
        "updates": 2,
        "judged": 16,
    },
}


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@lru_cache
def run(task: str, arm: str, seed: int = 0) -> tuple[Measurement, ...]:
    options = {**CLAIM.options("small", task, arm), **TINY[task]}
    return tuple(CLAIM.trial(Trial(claim="apo", scale="small", task=task, arm=arm, seed=seed, options=options)))


@pytest.mark.parametrize(("task", "arm"), CASES)
def test_an_arm_runs_and_measures_what_criteria_ask(task, arm):
    *curve, final = run(task, arm)
    criteria = [c for c in CLAIM.criteria if c.task == task]
    asked = {c.metric for c in criteria if arm in (c.arm, c.control)}
    asked |= {c.against_metric or c.metric for c in criteria if arm in c.rivals}
    assert asked <= final.values.keys() <= {m.name for m in CLAIM.metrics}
    assert all(math.isfinite(v) for m in (*curve, final) for v in m.values.values())
    assert {plot.y for plot in CLAIM.task(task).plots} <= {name for m in curve for name in m.values}


@pytest.mark.parametrize("task", list(TINY))
def test_the_seed_decides(task):
    once = run(task, "apo")
    assert once == run.__wrapped__(task, "apo")
    assert once != run(task, "apo", 1)


def test_all_arms_are_one_until_the_first_round_is_over():
    for task, first in (("sampled", 2), ("vowels", 2)):
        runs = [run(task, arm.name) for arm in CLAIM.arms_on(task)]
        assert all(each[:first] == runs[0][:first] for each in runs)
        assert all(a[-1] != b[-1] for a, b in itertools.combinations(runs, 2))


@pytest.mark.parametrize(
    ("arm", "expected"),
    [("dpo", lambda t: t), ("apo", lambda t: exponent(0.5, t)), ("from_reference", lambda t: 1.5 * t - 0.5)],
)
def test_arms_move_along_the_tilted_policies_as_far_as_they_should(arm, expected):
    problems = _preferences.bandits(0, 4, 6)
    for t, policy in zip(range(1, 6), _preferences.exact_rounds(problems, arm, 0.5, 2.0, 0), strict=False):
        closed = (problems.ref + expected(t) * problems.reward / 2.0).log_softmax(-1)
        torch.testing.assert_close(policy, closed, rtol=0, atol=1e-13)


def test_the_random_step_is_as_long_as_extrapolations():
    problems = _preferences.bandits(0, 4, 6)
    policy = _preferences.Table(problems.ref)
    between = _preferences.Between(policy, "random", 0.5, 0)
    policy.logits.data += problems.reward
    trained = policy.logits.detach().clone()
    between.after_round()
    step = policy.logits.detach() - trained
    assert float(step.norm()) == pytest.approx(0.5 * float(problems.reward.norm()))
    assert abs(float((step * problems.reward).sum() / step.norm() / problems.reward.norm())) < 0.9
    assert torch.equal(between.reference.logits, policy.logits)
    assert torch.equal(between.apo.kept["logits"], trained)


def test_suboptimality_is_relative_to_the_reference():
    problems = _preferences.bandits(3, 5, 7)
    torch.testing.assert_close(_preferences.suboptimality(problems, problems.ref), torch.ones(5, dtype=torch.float64))
    best = torch.where(problems.reward == problems.reward.amax(-1, keepdim=True), 0.0, -math.inf).double()
    torch.testing.assert_close(_preferences.suboptimality(problems, best), torch.zeros(5, dtype=torch.float64))


def test_fitting_many_pairs_gives_the_tilted_policy():
    problems = _preferences.bandits(0, 2, 4)
    policy = _preferences.Table(problems.ref)
    generator = torch.Generator().manual_seed(0)
    chosen, rejected = _preferences.sampled_pairs(problems, policy, 200_000, generator)
    _preferences.fit_table(policy, chosen, rejected, 0.5, 80, 0.3)
    log_odds = 0.5 * (policy().detach() - problems.ref)
    fitted = log_odds - log_odds.mean(-1, keepdim=True)
    # Fitted rewards have a standard error of about 2 / sqrt(pairs each response is in) = 0.006.
    torch.testing.assert_close(fitted, problems.reward - problems.reward.mean(-1, keepdim=True), rtol=0, atol=0.04)


@pytest.fixture
def world():
    return _preferences.Vowels(0, "cpu", given=4, length=6, dim=8, steps=20, lr=3e-3)


def test_kept_keys_and_values_write_what_whole_passes_would(world):
    gpt = world.model().gpt
    prompts = world.prompts(16, torch.Generator().manual_seed(1))
    written = _preferences.write(gpt, prompts, 6, torch.Generator().manual_seed(2))
    generator, slow = torch.Generator().manual_seed(2), torch.zeros_like(written)
    slow[:, :4] = prompts
    with torch.no_grad():
        for at in range(4, 10):  # the model takes whole contexts, and looks at nothing later
            slow[:, at] = torch.multinomial(gpt(slow)[:, at - 1].softmax(-1), 1, generator=generator)[:, 0]
    assert torch.equal(written, slow)


def test_the_reward_counts_vowels(world):
    tokens, _ = _problems._characters()
    text = data.text().text
    for start in (0, 777, 5000):
        piece = torch.from_numpy(tokens[start : start + 10])[None]
        assert int(world.reward(piece)) == sum(letter in "aeiouAEIOU" for letter in text[start + 4 : start + 10])


def test_pairs_are_of_one_prompt_and_the_better_one_is_chosen_more_often(world):
    batches, mean = world.pairs(world.model(), 512, 64, torch.Generator().manual_seed(0))
    assert len(batches) == 8
    ids = torch.stack([b["input_ids"] for b in batches])
    chosen, rejected = ids[:, :64].flatten(0, 1), ids[:, 64:].flatten(0, 1)
    assert torch.equal(chosen[:, :4], rejected[:, :4])
    rewards = world.reward(chosen), world.reward(rejected)
    assert float(torch.cat(rewards).mean()) == pytest.approx(mean, rel=1e-6)
    odds = (rewards[0] - rewards[1]).abs()
    # Of each pair the better is chosen with probability sigmoid(odds); ties are no evidence.
    won, expected = ((rewards[0] > rewards[1]).double(), odds.double().sigmoid())
    differ = odds > 0
    spread = float((expected * (1 - expected))[differ].sum().sqrt())
    assert abs(float((won - expected)[differ].sum())) < 4 * spread
    assert all(b["completion_mask"].sum() == 2 * 64 * 6 for b in batches)


def test_the_pretrained_model_is_at_no_distance_from_itself(world):
    assert world.judged(world.model(), 32)[1] == 0.0
    before = world.model().state_dict()
    other = world.model()
    other.gpt.head.weight.data.zero_()
    assert world.judged(other, 32)[1] > 0.0
    assert all(torch.equal(v, before[k]) for k, v in world.model().state_dict().items())
