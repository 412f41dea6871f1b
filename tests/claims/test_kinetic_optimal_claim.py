"""Kinetic-optimal paths' claim at a tiny scale: every arm runs and measures, the seed decides, and in closed form it holds."""

from __future__ import annotations

import math

import pytest
import torch

from polyak.claims.generate import _kinetic
from polyak.claims.generate import kinetic_optimal as claim
from polyak.claims.generate.kinetic_optimal import CLAIM
from polyak.lab.claim import Measurement, Trial

TINY = {
    "gaussians": {},
    "energies": {"draws": 40},
    "clouds": {"draws": 40},
    "sampled": {"n": 60, "samples": 60, "draws": 40},
    "trained": {"draws": 16, "steps": 3, "width": 16},
}


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claim, "SPACES", (64, 256))
    monkeypatch.setattr(claim, "SIZES", (2, 50))
    monkeypatch.setattr(claim, "LEARNED", (4, 6, 24))


def run(task: str, arm: str, seed: int = 0) -> list[Measurement]:
    given = {**CLAIM.options("small", task, arm), **TINY[task]}
    return list(CLAIM.trial(Trial(claim=CLAIM.slug, scale="small", task=task, arm=arm, seed=seed, options=given)))


@pytest.mark.parametrize(
    ("task", "arm"), [(t, a.name) for t in TINY for a in CLAIM.arms_on(t) if (t, a.name) != ("trained", "trig")]
)
def test_an_arm_runs_and_measures_what_criteria_ask(task: str, arm: str) -> None:
    before = torch.get_rng_state()
    *_, final = run(task, arm)
    asked = {c.metric for c in CLAIM.criteria if c.task == task and arm in (c.arm, c.control, *c.rivals)}
    assert {m for m in asked if not m.endswith(("_800", "_1024", "_4096"))} <= final.values.keys()
    assert final.values.keys() <= {m.name for m in CLAIM.metrics}
    assert all(math.isfinite(v) for v in final.values.values())
    assert torch.equal(before, torch.get_rng_state())


def test_the_seed_decides() -> None:
    first = run("sampled", "ko", seed=1)
    _kinetic._law.cache_clear()
    assert run("sampled", "ko", seed=1) == first
    assert run("sampled", "ko", seed=2) != first


def test_in_closed_form_the_criteria_hold_and_the_controls_do_not() -> None:
    finals = {a.name: run("gaussians", a.name)[-1].values for a in CLAIM.arms_on("gaussians")}
    asked = [c for c in CLAIM.criteria if c.task == "gaussians"]
    assert len(asked) == 7
    for c in asked:
        assert finals[c.arm][c.metric] <= c.bound
        assert not c.control or finals[c.control][c.metric] > c.bound


def test_the_energies_are_of_the_order_that_is_claimed() -> None:
    energies = {a.name: run("energies", a.name)[-1].values["energy_50"] for a in CLAIM.arms_on("energies")}
    assert energies["ko"] < energies["cond_ot"] < energies["trig"] < energies["vp"]
    assert energies["other"] > energies["ko"]


def test_the_likelihood_of_a_normal_law_is_its_entropy() -> None:
    """A field that leaves x / r as it is takes N(0, I) to N(0, I)."""
    process = _kinetic.path("cond_ot", None, 1e-3, 0.99)

    class Still(torch.nn.Module):
        def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            a, m, da, dm = (f(t) for f in (process.alpha, process.sigma, process.dalpha, process.dsigma))
            return ((a * da + m * dm) / (a**2 + m**2))[:, None] * x

    x = torch.randn(50, _kinetic.DIM, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    want = (0.5 * x.square().mean() + 0.5 * math.log(2 * math.pi)).item()
    # The process ends at sigma = 0.99: its start is drawn with that deviation, and not with r.
    ratio = process.prior_std / math.hypot(process.alpha(0.99), process.sigma(0.99))
    want += 0.5 * x.square().mean().item() * (ratio**-2 - 1) + math.log(ratio)
    assert _kinetic.nll(Still(), process, x, torch.ones_like(x)) == pytest.approx(want, abs=2e-3)
