"""A process that is given: every option of a configuration acts on it, belongs to what it replaces, or is refused by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers_cases import PLANS, TWO_M, Options, diffusers, rng, saved, scheduler_class
from generate_cases import BETAS

from polyak.generate import DDIM, EDM, VP, Denoiser, Discrete, Euler, Flow, Process, TrigFlow, sample
from polyak.generate.adapters.diffusers import PolyakScheduler, as_diffusers
from polyak.generate.adapters.diffusers.levels import Arctan, ChainLevels, Trig

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:diffusers")
FLOW_MATCH = "FlowMatchEulerDiscreteScheduler"


def defaults(name: str) -> Options:
    """A configuration of every scheduler, as a file has it."""
    options = {"clip_sample": False} if name.startswith("CogVideoX") else {}
    return saved(scheduler_class(name)(**options))


# --- flows on flows


@pytest.mark.parametrize(
    "options",
    [
        {"shift": 3.0},
        {"shift": 3.0, "shift_terminal": 0.1},
        {"shift": 2.0, "invert_sigmas": True},
        {"use_karras_sigmas": True},
        {"use_beta_sigmas": True},
        {"use_dynamic_shifting": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("request_", [{"num_inference_steps": 4}, {"sigmas": [1.0, 0.7, 0.2]}], ids=["steps", "sigmas"])
def test_the_options_of_a_flow_act_on_a_flow_that_is_given(options: Options, request_: Options) -> None:
    own = PolyakScheduler.from_config(saved(diffusers.FlowMatchEulerDiscreteScheduler(**options)), solver=Euler())
    given = PolyakScheduler.from_config(own.config, process=Flow(label_scale=1000.0))
    by_hand = PolyakScheduler(solver=Euler(), process=Flow(label_scale=1000.0), origin=FLOW_MATCH, **options)
    mu = {"mu": 0.8} if "use_dynamic_shifting" in options else {}
    x, results = torch.randn(2, 3, dtype=torch.float64, generator=rng()), []
    for s in (own, given, by_hand):
        s.set_timesteps(**request_, **mu)
        y = x
        for t in s.timesteps:
            y = s.step(torch.tanh(y), t, y).prev_sample
        results.append((s.timesteps, s.sigmas, y))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_a_flow_that_is_given_has_its_own_range_and_labels() -> None:
    scheduler = PolyakScheduler(solver=Euler(), process=Flow(0.05, 0.9, label_scale=10.0), shift=1.0)
    scheduler.set_timesteps(3)
    assert scheduler.timesteps.tolist() == pytest.approx([9.0, 4.75, 0.5])
    assert scheduler.sigmas.tolist() == pytest.approx([0.9, 0.475, 0.05, 0.0])
    chain = PolyakScheduler(solver=Euler(), process=Flow(), prediction_type="flow", flow_shift=3.0)
    chain.set_timesteps(sigmas=[0.5])
    assert chain._times[0] == pytest.approx(0.75)


# --- every configuration with every process


@pytest.mark.parametrize("process", [VP(), Flow(), EDM(), Discrete(BETAS), TrigFlow()], ids=lambda p: type(p).__name__)
@pytest.mark.parametrize("name", PLANS)
def test_a_process_takes_the_place_of_any_configurations_own(name: str, process: Process) -> None:
    # Where there is no signal at the start, noise says nothing of the data.
    said = {"prediction_type": "sample"} if isinstance(process, Flow | TrigFlow) and name != "IPNDMScheduler" else {}
    said = {} if name.startswith("FlowMatch") else said
    scheduler = PolyakScheduler.from_config(defaults(name), solver=DDIM(), process=process, **said)
    assert scheduler.process == process
    scheduler.set_timesteps(4)
    x = torch.ones(1, 2, dtype=torch.float64)
    for t in scheduler.timesteps:
        x = scheduler.step(torch.tanh(scheduler.scale_model_input(x, t)), t, x).prev_sample
    assert bool(x.isfinite().all())
    again = PolyakScheduler.from_config(scheduler.config)
    assert again.process == process
    again.set_timesteps(4)
    assert torch.equal(again.timesteps, scheduler.timesteps)


@pytest.mark.parametrize(
    ("name", "options", "kind"),
    [
        ("DDIMScheduler", {"prediction_type": "v_prediction"}, "v_prediction"),
        ("EulerDiscreteScheduler", {"prediction_type": "original_sample"}, "sample"),
        (FLOW_MATCH, {}, "flow"),
        ("IPNDMScheduler", {}, "v_prediction"),
        ("EDMEulerScheduler", {}, "edm"),
    ],
)
def test_the_network_says_what_its_configuration_says(name: str, options: Options, kind: str) -> None:
    config = saved(scheduler_class(name)(**options))
    assert PolyakScheduler.from_config(config, solver=DDIM(), process=VP())._plan.kind == kind


@pytest.mark.parametrize("name", ["EDMEulerScheduler", "EulerDiscreteScheduler"])
def test_v_of_preconditioned_networks_keeps_its_sign(name: str) -> None:
    theirs = scheduler_class(name)(prediction_type="v_prediction")
    own = PolyakScheduler.from_config(saved(theirs), solver=Euler())
    given = PolyakScheduler.from_config(saved(theirs), solver=Euler(), process=own.process)
    levels = [9.0, 1.0, 0.3]
    own.set_timesteps(sigmas=[*levels, 0.0])
    given.set_timesteps(sigmas=levels)
    x = torch.ones(1, 2, dtype=torch.float64)
    results = [s.step(torch.tanh(x), s.timesteps[0], x).prev_sample for s in (own, given)]
    assert torch.allclose(*results, rtol=1e-12)


# --- what is refused


@pytest.mark.parametrize(
    ("process", "options", "name"),
    [
        (VP(), {"timestep_spacing": "trailing"}, "timestep_spacing='trailing'"),
        (VP(), {"steps_offset": 3}, "steps_offset=3"),
        (VP(), {"final_sigmas_type": "sigma_min"}, "final_sigmas_type='sigma_min'"),
        (VP(), {"lambda_min_clipped": -1.0}, "lambda_min_clipped=-1.0"),
        (VP(), {"beta_schedule": "squaredcos_cap_v2"}, "beta_schedule='squaredcos_cap_v2'"),
        (VP(), {"flow_shift": 3.0}, "flow_shift=3.0"),
        (VP(), {"shift": 3.0}, "shift=3.0"),
        (VP(), {"origin": FLOW_MATCH, "use_dynamic_shifting": True}, "use_dynamic_shifting=True"),
        (VP(), {"origin": FLOW_MATCH, "invert_sigmas": True}, "invert_sigmas=True"),
        (Flow(), {"steps_offset": 1}, "steps_offset=1"),
        (Flow(), {"beta_start": 0.1}, "beta_start=0.1"),
        (EDM(), {"origin": "EDMEulerScheduler", "rho": 5.0}, "rho=5.0"),
        (EDM(), {"origin": "EDMEulerScheduler", "sigma_max": 50.0}, "sigma_max=50.0"),
        (Discrete(BETAS), {"flow_shift": 2.0}, "flow_shift=2.0"),
        (Discrete(BETAS), {"rescale_betas_zero_snr": True}, "rescale_betas_zero_snr=True"),
    ],
    ids=str,
)
def test_what_cannot_act_on_a_process_is_refused_where_it_is_written(
    process: Process, options: Options, name: str
) -> None:
    with pytest.raises(ValueError, match=f"{name} has no meaning for a process that is given, .*; say "):
        PolyakScheduler(solver=DDIM(), process=process, **options)
    scheduler = PolyakScheduler(solver=DDIM(), process=process, origin=options.get("origin"))
    if "shift" not in options:
        scheduler.register_to_config(**{k: v for k, v in options.items() if k != "origin"})
        with pytest.raises(ValueError, match=f"{name} has no meaning for a process that is given"):
            scheduler.set_timesteps(3)


def test_what_a_process_replaces_is_kept_but_not_written() -> None:
    # A configuration's betas belong to the chain that the process replaces; an override is written for nothing.
    theirs = diffusers.DDIMScheduler(beta_schedule="scaled_linear", beta_start=0.00085)
    ours = PolyakScheduler.from_config(saved(theirs), solver=DDIM(), process=VP())
    assert diffusers.DDIMScheduler.from_config(ours.config).config.beta_start == 0.00085
    with pytest.raises(ValueError, match=r"beta_start=0\.1 has no meaning for a process that is given"):
        PolyakScheduler.from_config(saved(theirs), solver=DDIM(), process=VP(), beta_start=0.1)
    with pytest.raises(ValueError, match="timestep_spacing='trailing' has no meaning for a process that is given"):
        PolyakScheduler.from_config(
            saved(diffusers.DDIMScheduler(timestep_spacing="trailing")), solver=DDIM(), process=VP()
        )
    with pytest.raises(ValueError, match="num_train_timesteps=7 is not that of the process that is given"):
        PolyakScheduler(solver=DDIM(), process=Discrete(BETAS), num_train_timesteps=7)


def test_options_beside_a_grid_are_refused_where_they_are_written() -> None:
    for option in ({"timestep_spacing": "trailing"}, {"steps_offset": 1}, {"final_sigmas_type": "zero"}):
        with pytest.raises(ValueError, match="has no meaning beside grid='karras', which spaces the times"):
            PolyakScheduler(solver=TWO_M, grid="karras", **option)
    leading = saved(diffusers.DDIMScheduler(timestep_spacing="trailing"))
    assert PolyakScheduler.from_config(leading, solver=TWO_M, grid="karras")._plan.grid == "karras"


# --- there and back


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("EulerDiscreteScheduler", ChainLevels),
        ("CosineDPMSolverMultistepScheduler", Arctan),
        ("IPNDMScheduler", Trig),
        ("DDIMScheduler", Discrete),
        ("EDMEulerScheduler", EDM),
        (FLOW_MATCH, Flow),
    ],
)
def test_the_process_of_another_scheduler_comes_back(name: str, kind: type, tmp_path: Any) -> None:
    process = PolyakScheduler.from_config(defaults(name), solver=Euler()).process
    assert type(process) is kind
    scheduler = PolyakScheduler(solver=Euler(), process=process)
    scheduler.save_pretrained(tmp_path)
    for again in (PolyakScheduler.from_config(scheduler.config), PolyakScheduler.from_pretrained(tmp_path)):
        assert again.process == process
        for s in (scheduler, again):
            s.set_timesteps(3)
        assert torch.equal(again.timesteps, scheduler.timesteps)


def test_a_process_and_a_grid_can_be_taken_away() -> None:
    ours = as_diffusers(DDIM(), VP(), grid="quadratic")
    without = PolyakScheduler.from_config(ours.config, process=None, grid=None)
    assert isinstance(without.process, Discrete)
    assert (without.config["process"], without.config["grid"]) == (None, None)
    assert isinstance(PolyakScheduler.from_config(ours.config, solver=None, origin=None).process, VP)
    ours.register_to_config(process=EDM())
    ours.set_timesteps(3)
    assert ours.process == EDM()
    want = sample(Denoiser(lambda x, t: 0 * x, EDM()), torch.ones(1, 1), solver=DDIM(), steps=3, grid="quadratic")
    x = torch.ones(1, 1)
    for t in ours.timesteps:
        x = ours.step(0 * x, t, x).prev_sample
    assert torch.equal(x, want)
