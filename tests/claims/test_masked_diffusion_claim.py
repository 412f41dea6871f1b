"""Masked diffusion's claim at a tiny scale: every arm measures what is asked, and its own references are right."""

from __future__ import annotations

import math

import pytest
import torch

from polyak.claims.generate import _masked
from polyak.claims.generate.masked_diffusion import CLAIM
from polyak.core.exact import MarkovChain
from polyak.generate import FirstHitting
from polyak.generate.discrete import categorical
from polyak.lab.claim import Measurement, Trial

PAIRS = [(task.name, arm.name) for task in CLAIM.tasks for arm in CLAIM.arms_on(task.name)]
TINY = {
    "chain": {"strings": 400},
    "noise": {"tokens": 400, "steps": 30, "small": 20, "draws": 3000, "positions": 200, "races": 200_000},
    "vocabulary": {"tokens": 300, "length": 6, "steps": 12},
    "text": {"length": 16, "dim": 8, "steps": 3, "batch": 4, "rows": 8, "rounds": 1, "samples": 4},
    "digits": {"dim": 8, "steps": 3, "batch": 4, "samples": 8},
}


def run(task: str, arm: str, seed: int = 0) -> list[Measurement]:
    options = {**CLAIM.options("small", task, arm, CLAIM.arm(arm).points[0]), **TINY[task]}
    return list(CLAIM.trial(Trial(claim=CLAIM.slug, scale="small", task=task, arm=arm, seed=seed, options=options)))


@pytest.mark.parametrize(("task", "arm"), PAIRS)
def test_an_arm_measures_what_is_asked_of_it(task, arm):
    (final,) = run(task, arm)
    asked = {c.metric for c in CLAIM.criteria if c.task == task and arm in (c.arm, c.control, *c.rivals)}
    assert final.at is None
    assert asked <= final.values.keys() <= {m.name for m in CLAIM.metrics}
    assert all(math.isfinite(value) for value in final.values.values())


@pytest.mark.parametrize("task", ["chain", "digits"])
def test_a_trial_is_a_function_of_its_seed(task):
    _masked.trained.cache_clear()
    first = run(task, "first_hitting")
    _masked.trained.cache_clear()
    assert run(task, "first_hitting") == first
    assert run(task, "first_hitting", seed=1) != first


def test_what_is_proved_is_so_and_its_controls_are_not():
    exact, ancestral = (run("chain", arm)[0].values for arm in ("first_hitting", "ancestral_8"))
    assert exact["calls"] == 12
    assert ancestral["calls"] == 8
    assert exact["excess"] < 4.5 < ancestral["excess"]
    joint = run("noise", "joint")[0].values
    assert joint["rounded"] < 4.5
    assert joint["conditioned"] > 4.5


def test_judges_know_exact_strings_from_others():
    law = _masked.chain(1, 4)
    x = law.sample(8, 4000, generator=torch.Generator().manual_seed(0))
    right, wrong = _masked.judge(law, x), _masked.judge(law, x.flip(1))
    assert right["p_value"] > 1e-3 > wrong["p_value"]
    assert abs(right["divergence"]) < 0.1 < wrong["divergence"]
    assert right["excess"] < 4 < wrong["excess"]


def test_laws_over_many_steps():
    """Against a run of every step, and against what is lost where nothing is rounded."""
    p = _masked.zipf(60)
    assert torch.allclose(_masked.revealed_law(p, 10, "rounded"), p, rtol=1e-4)
    for law in ("rounded", "conditioned"):
        coarse = _masked.entropy(p) - _masked.entropy(_masked.revealed_law(p, 20_000, law))
        assert 0.0 < coarse < _masked.entropy(p)
    # Of 50257 tokens; the second is the spec's figure by the paper's law.
    assert _masked.lost(50_257, 100, "rounded") == pytest.approx(0.306, abs=5e-3)
    assert _masked.lost(50_257, 100, "conditioned") == pytest.approx(7.566 - 7.081, abs=5e-3)


def test_the_exact_denoiser_draws_strings_of_its_chain():
    law = MarkovChain([1.0, 0.0], [[0.0, 1.0], [1.0, 0.0]])
    x, calls = _masked.drawn(_masked.exact(law), FirstHitting(), 5, 6, 0)
    assert calls == 6
    assert x.tolist() == [[0, 1, 0, 1, 0, 1]] * 5


def test_networks_and_data():
    train, held = _masked.digits()
    assert (len(train), len(held)) == (1197, 600)
    assert set(train.unique().tolist()) == {0, 1}
    net = _masked.TokenNet(5, 7, dim=8, depth=1, timed=True)
    x = torch.randint(6, (3, 7))
    assert net(x, torch.rand(3)).shape == (3, 7, 5)
    tokens, held, vocabulary = _masked.text()
    assert len(held) > 90_000
    assert int(tokens.max()) < vocabulary
    assert _masked.triples(torch.tensor([[0, 1, 2, 0]]), 3)[5] == 0.5  # 0, 1, 2 and 1, 2, 0
    assert categorical(_masked.zipf(3).log().expand(4, 3)).shape == (4,)
