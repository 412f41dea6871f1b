"""PFGM++'s claim at a tiny scale: arms run, a seed gives the same numbers, and what is solved in closed form is."""

from __future__ import annotations

import math

import pytest
import torch
from scipy import stats

from polyak.claims.generate import pfgmpp
from polyak.claims.generate.pfgmpp import CLAIM
from polyak.generate import PFGMPP
from polyak.lab.claim import Measurement, Trial

TINY = {"digits": {"steps": 6, "batch": 16, "width": 8, "images": 60, "samples": 20}}


def run(task: str, arm: str, seed: int = 0) -> list[Measurement]:
    given = {**CLAIM.options("small", task, arm), **TINY.get(task, {})}
    return list(CLAIM.trial(Trial(claim=CLAIM.slug, scale="small", task=task, arm=arm, seed=seed, options=given)))


@pytest.fixture(scope="module")
def drawn() -> dict[str, list[Measurement]]:
    return {a.name: run("digits", a.name) for a in CLAIM.arms_on("digits")}


def test_arms_run_and_measure_what_criteria_ask(drawn):
    for arm, (*curve, final) in drawn.items():
        asked = {c.metric for c in CLAIM.criteria if c.task == "digits" and arm in (c.arm, c.control, *c.rivals)}
        assert asked <= final.values.keys()
        assert all(math.isfinite(v) and v > 0 for v in final.values.values())
        assert [m.at for m in curve] == [{"alpha": a} for a in pfgmpp.ALPHAS]
        assert final.values["noise_3"] == curve[-1].values["energy"]
    assert len({tuple(final.values.values()) for *_, final in drawn.values()}) == len(drawn)


def test_the_seed_decides(drawn):
    pfgmpp._trained.cache_clear()
    assert run("digits", "d16") == drawn["d16"]
    assert run("digits", "d16", seed=1) != drawn["d16"]


def test_the_controls_noise_has_the_same_law_and_no_common_radius():
    options = CLAIM.options("small", "digits", "apart") | TINY["digits"] | {"steps": 1}
    names = ("steps", "batch", "width", "lr", "P_mean", "images")
    process = pfgmpp._trained(16.0, False, 0, "cpu", *(options[n] for n in names)).process
    x0 = torch.zeros(4000, 64, dtype=torch.float64)
    shared, apart = (p.perturb(x0, 1.0, generator=torch.Generator().manual_seed(0))[0] for p in (PFGMPP(16.0), process))
    assert stats.kstest(apart[:, 5].numpy(), stats.t(16).cdf).pvalue > 1e-3
    assert stats.kstest(shared[:, 5].numpy(), stats.t(16).cdf).pvalue > 1e-3
    spread = [(x.norm(dim=1).log().std() * math.sqrt(2 * 64)).item() for x in (shared, apart)]
    assert spread[0] > 2 > 1.3 > spread[1] > 0.9


@pytest.mark.parametrize("seed", [0, 1])
def test_in_closed_form_the_method_is_exact_and_its_control_is_not(seed):
    finals = {a.name: run("solvable", a.name, seed)[-1].values for a in CLAIM.arms_on("solvable")}
    for c in CLAIM.criteria:
        if c.task == "solvable":
            assert finals[c.arm][c.metric] <= c.bound
            assert finals[c.control][c.metric] > 10 * c.bound


@pytest.mark.parametrize("D", [1, 2, 4, 64])
def test_the_distribution_function_is_students(D):
    x = torch.linspace(-9, 9, 41, dtype=torch.float64)
    assert pfgmpp._cdf(x, D).tolist() == pytest.approx(stats.t(D).cdf(x.numpy()).tolist(), abs=1e-13)
