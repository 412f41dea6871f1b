"""FlowSDE in the place of a flow pipeline's scheduler: without noise it is diffusers' own, with it the run of ``sample``."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers_cases import diffusers, rng
from generate_cases import exact
from test_diffusers_pipelines import flux, sd3

from polyak.generate import VP, Flow, FlowSDE, TrigFlow, sample
from polyak.generate.adapters.diffusers import FlowSDEScheduler, PolyakScheduler

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning:diffusers", "ignore::FutureWarning"),
    pytest.mark.xdist_group("diffusers pipelines"),
]


@pytest.mark.parametrize("build", [flux, sd3])
def test_pipelines_of_flux_and_sd3(build: Any) -> None:
    theirs = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    want = build("FluxPipeline", theirs)
    still = build("FluxPipeline", FlowSDEScheduler.from_config(theirs.config, norm=0.0))
    assert (still - want).abs().max() < 1e-5 * want.abs().max()
    for options in ({}, {"path": "vp"}, {"path": "vp", "grid": "vp"}):
        scheduler = FlowSDEScheduler.from_config(theirs.config, **options)
        made = []
        for _ in range(2):
            scheduler.generator = rng(5)  # pipelines do not give theirs to step
            made.append(build("FluxPipeline", scheduler))
        first, again = made
        assert torch.equal(first, again)
        assert bool(first.isfinite().all())
        assert (first - want).abs().max() > 0.1
        if "grid" not in options:
            assert torch.allclose(scheduler.timesteps, theirs.timesteps)


@pytest.mark.parametrize(
    "options",
    [{}, {"norm": 0.0}, {"path": "vp"}, {"path": "vp", "grid": "vp"}, {"g": "sigma", "norm": 1.0, "grid": "uniform"}],
    ids=str,
)
@pytest.mark.parametrize(
    "given", [{"num_inference_steps": 6}, {"sigmas": [1 - i / 6 for i in range(6)]}], ids=["n", "sigmas"]
)
def test_its_steps_are_those_of_sample(options: Any, given: Any, tmp_path: Any) -> None:
    theirs = diffusers.FlowMatchEulerDiscreteScheduler(shift=2.0)
    FlowSDEScheduler.from_config(theirs.config, **options).save_pretrained(tmp_path)
    scheduler = FlowSDEScheduler.from_pretrained(tmp_path)
    scheduler.set_timesteps(**given)
    start = torch.randn(5, 1, dtype=torch.float64, generator=rng(1))
    x, noise = start, rng(2)
    for t in scheduler.timesteps:
        x = scheduler.step(exact(Flow())(x, float(t) / 1000).flow, t, x, generator=noise).prev_sample
    times = scheduler.sigmas.double().tolist()
    assert (len(times), times[0], times[-1]) == (7, 1.0, 0.0)
    want = sample(exact(Flow()), start, solver=scheduler.solver, grid=times, generator=rng(2))
    assert torch.allclose(x, want, atol=1e-5)
    if "grid" in options:  # its own times, whatever the pipeline's
        assert torch.allclose(torch.tensor(times).double(), scheduler.solver.times(Flow(), steps=6), atol=1e-6)


def test_its_options_are_saved_with_it(tmp_path: Any) -> None:
    mine = FlowSDEScheduler(g="sin", norm=2.0, path=TrigFlow(0.01, 0.99), shift=3.0)
    mine.save_pretrained(tmp_path)
    solver = FlowSDEScheduler.from_pretrained(tmp_path).solver
    assert solver == FlowSDE("sin", 2.0, path=TrigFlow(0.01, 0.99))
    assert PolyakScheduler.from_pretrained(tmp_path).solver == solver
    changed = FlowSDEScheduler.from_config(mine.config, path="vp", norm=1.0)
    assert changed.solver == FlowSDE("sin", 1.0, path=VP())
    assert changed.config.shift == 3.0
    assert FlowSDEScheduler().config.origin == "FlowMatchEulerDiscreteScheduler"


@pytest.mark.parametrize("options", [{"g": "cube"}, {"norm": -1.0}, {"grid": "late"}, {"path": "ve"}], ids=str)
def test_what_it_refuses(options: Any) -> None:
    with pytest.raises((TypeError, ValueError), match=next(iter(options))):
        FlowSDEScheduler(**options)
