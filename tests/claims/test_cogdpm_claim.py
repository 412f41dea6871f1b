"""CogDPM's claim at a tiny scale: every arm runs and measures, a seed decides, and what equations promise holds."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from polyak.claims.generate import _advection as a
from polyak.claims.generate import _forecasts as f
from polyak.claims.generate.cogdpm import CLAIM
from polyak.generate import EDM
from polyak.lab.claim import Measurement, Trial

TINY: dict[str, dict[str, Any]] = {
    "equations": {},
    "known": {"cases": 8, "members": 4},
    "advection": {"cases": 4, "members": 2, "sequences": 20, "steps": 2, "batch": 2, "width": 4},
}
PAIRS = [(task.name, arm.name) for task in CLAIM.tasks for arm in CLAIM.arms_on(task.name)]


@pytest.fixture(autouse=True)
def two_scales(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(f, "GRID", (0.5, 2.0))


def run(task: str, arm: str, seed: int = 0) -> Measurement:
    given = {**CLAIM.options("small", task, arm), **TINY[task]}
    (final,) = CLAIM.trial(Trial(claim="cogdpm", scale="small", task=task, arm=arm, seed=seed, options=given))
    return final


@pytest.mark.parametrize(("task", "arm"), PAIRS)
def test_an_arm_runs_and_measures_what_criteria_ask(task: str, arm: str) -> None:
    final = run(task, arm)
    asked = {c.metric for c in CLAIM.criteria if c.task == task and arm in (c.arm, c.control, *c.rivals)}
    assert asked <= final.values.keys() <= {m.name for m in CLAIM.metrics}
    assert all(map(math.isfinite, final.values.values()))


@pytest.mark.parametrize("task", ["known", "advection"])
def test_the_seed_decides(task: str) -> None:
    first = run(task, "pw", 1)
    a.problem.cache_clear()
    assert run(task, "pw", 1) == first
    assert run(task, "pw", 2) != first


def test_what_equations_promise_holds_and_not_without_the_ingredient() -> None:
    finals = {arm.name: run("equations", arm.name).values for arm in CLAIM.arms_on("equations")}
    for c in CLAIM.criteria:
        if c.kind == "mechanism":
            held = {
                arm: v[c.metric] <= c.bound if c.op == "<=" else v[c.metric] >= c.bound for arm, v in finals.items()
            }
            assert held[c.arm], c.name
            assert not c.control or not held[c.control], c.name


def test_fields_are_moved_by_their_winds() -> None:
    frames, warm, wind = a.advected(40, torch.Generator().manual_seed(0))
    bands = frames.unflatten(2, (-1, a.BAND))
    cold = ~warm
    # A cold band's frame n is its first, moved by n winds; of a warm one the first four frames are.
    spectrum = (
        torch.fft.rfft(bands[:, :1]) * a._turn(torch.arange(8)[:, None] * wind[:, None], torch.arange(9))[..., None, :]
    )
    moved = torch.fft.irfft(spectrum, a.SIZE)
    off = (moved - bands).abs().amax((-2, -1)).movedim(1, 2)
    assert off[cold].max() < 1e-5
    assert off[warm][:, :4].max() < 1e-5
    assert off[warm][:, 4:].mean() > 0.05
    assert bands.movedim(2, 1)[warm].mean() == pytest.approx(0.5, abs=1e-5)
    # The extrapolation finds a cold band's wind, and moves its last frame on.
    miss = (a.extrapolated(frames[:, :4]) - frames[:, 4:]).unflatten(2, (-1, a.BAND)).abs().mean((1, 3, 4))
    assert miss[cold].mean() < 0.03
    assert miss[warm].mean() > 3 * miss[cold].mean()


def test_the_exact_denoiser_forecasts_a_cold_band_and_spreads_over_a_warm_one() -> None:
    frames, warm, wind = (v[0] for v in a.advected(1, torch.Generator().manual_seed(12)))
    assert warm.tolist() == [True, True]
    known = torch.tensor([True, False])
    denoiser = a.exact(frames[3], known, wind, EDM())
    x = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    data = denoiser(x, 1.0).x0
    still = torch.fft.rfft(frames[3, 8:])[None] * a._turn(torch.arange(1, 5)[:, None] * wind[1], torch.arange(9))
    assert torch.allclose(data[:, :, 8:], torch.fft.irfft(still, 16).expand(2, -1, -1, -1), atol=1e-5)
    assert not torch.allclose(data[0, :, :8], data[1, :, :8], atol=1e-2)
