"""The scale gpu of the claims that have one: every arm runs with its options made smaller, on the CPU and on a GPU."""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
import pytest
import torch

from polyak import claims
from polyak.lab import data
from polyak.lab.claim import Trial

CLAIMS = {claim.slug: claim for claim in claims.catalogue().values() if any(s.name == "gpu" for s in claim.scales)}
SMALLER = {
    "adan": {"steps": 2, "dim": 16, "depth": 1, "batch": 8, "context": 8},
    "apo": {
        "problems": 2, "responses": 4, "pairs": 8, "steps": 2, "dim": 16, "pretraining": 2, "prompts": 4, "batch": 2,
        "updates": 1, "judged": 4, "given": 4, "length": 4,
    },
    "mkor": {"steps": 2, "every": 1, "batch": 16, "widths": "784-8-784"},
    "monna": {"steps": 1, "hidden": 4, "n": 6, "f": 1},
    "spam": {"steps": 2, "dim": 8, "depth": 1, "context": 8, "batch": 2},
}  # fmt: skip
CASES = [
    (slug, task.name, arm.name)
    for slug, claim in CLAIMS.items()
    for task in claim.tasks_at("gpu")
    for arm in claim.arms_on(task.name)
]
GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@lru_cache
def noise():
    rng = np.random.default_rng(0)
    return rng.integers(0, 256, (10_000, 28, 28), dtype=np.uint8), rng.integers(0, 10, 10_000)


@pytest.fixture(autouse=True)
def noise_for_mnist(monkeypatch):
    """One thread, and images of noise where MNIST is."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.setattr(data, "mnist", lambda split: noise())
    yield
    torch.set_num_threads(before)


def finals(slug: str, task: str, arm: str, device: str) -> dict[str, float]:
    claim = CLAIMS[slug]
    given = claim.options("gpu", task, arm, claim.arm(arm).points[0])
    smaller = {name: value for name, value in SMALLER[slug].items() if name in given}
    options = {**given, **smaller}
    trial = Trial(claim=slug, scale="gpu", task=task, arm=arm, seed=0, device=device, options=options)
    *_, final = claim.trial(trial)
    return dict(final.values)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=GPU)])
@pytest.mark.parametrize(("slug", "task", "arm"), CASES)
def test_an_arm_runs_and_measures_what_criteria_ask(slug, task, arm, device):
    found = finals(slug, task, arm, device)
    criteria = [c for c in CLAIMS[slug].criteria if c.task == task]
    assert {c.metric for c in criteria if arm in (c.arm, c.control)} <= found.keys()
    assert {c.against_metric or c.metric for c in criteria if arm in c.rivals} <= found.keys()
    assert all(math.isfinite(v) for v in found.values())


def test_reported_seeds_are_those_that_no_pilot_used():
    assert all(s.first_seed >= 100 and s.seeds >= 10 for c in CLAIMS.values() for s in c.scales if s.name == "gpu")
    assert all(
        s.first_seed >= 100 and s.seeds >= 5 for c in claims.catalogue().values() for s in c.scales if s.name == "small"
    )
