"""Configurations that are edited: by hand, by pipelines, in place; with NumPy's and PyTorch's numbers in them."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from diffusers_cases import TWO_M, Options, diffusers, rng, saved
from generate_cases import Mine

from polyak.generate import DDIM, VP, DPMSolver, Euler, Heun, Solver
from polyak.generate.adapters.diffusers import PolyakScheduler, as_diffusers

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:diffusers")
BETAS = np.linspace(1e-4, 0.02, 100)
OTHERS = np.linspace(1e-4, 0.05, 100)


# --- shifts


@pytest.mark.parametrize("origin", [None, "DPMSolverMultistepScheduler", "UniPCMultistepScheduler"])
def test_a_flow_in_the_place_of_a_chain_can_be_shifted(origin: str | None) -> None:
    options: Options = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
    changed, made = (
        PolyakScheduler(solver=Euler(), origin=origin, **options, **shift) for shift in ({}, {"flow_shift": 5.0})
    )
    changed.set_timesteps(3)
    before = changed.timesteps
    changed.set_shift(5.0)
    for s in (changed, made):
        s.set_timesteps(3)
    assert torch.equal(changed.timesteps, made.timesteps)
    assert not torch.equal(before, made.timesteps)
    assert PolyakScheduler.from_config(changed.config).config["flow_shift"] == 5.0


def test_a_chain_cannot_be_shifted() -> None:
    for scheduler in (PolyakScheduler(solver=DDIM()), as_diffusers(DDIM(), VP())):
        with pytest.raises(ValueError, match=r"shift=3\.0 needs a flow: .* is none"):
            scheduler.set_shift(3.0)
    with pytest.raises(ValueError, match="shift must be > 0"):
        PolyakScheduler(solver=Euler(), shift=1.0).set_shift(-1.0)


# --- another solver


def assigned(s: PolyakScheduler) -> None:
    s.solver = DPMSolver()


def registered(s: PolyakScheduler) -> None:
    s.register_to_config(solver=DPMSolver())


def written(s: PolyakScheduler) -> None:
    s.config["solver"] = PolyakScheduler(solver=DPMSolver()).config["solver"]


def as_it_is_saved(s: PolyakScheduler) -> None:
    s.register_to_config(solver=PolyakScheduler(solver=DPMSolver()).config["solver"])


@pytest.mark.parametrize("change", [assigned, registered, written, as_it_is_saved])
def test_another_solver_is_the_solver_everywhere(change: Callable[[PolyakScheduler], None]) -> None:
    scheduler = PolyakScheduler(solver=Heun())
    scheduler.set_timesteps(6)
    assert scheduler.order == 2
    change(scheduler)
    scheduler.set_timesteps(6)
    assert scheduler.solver == DPMSolver()
    assert (scheduler.order, len(scheduler.timesteps)) == (1, 6)
    assert PolyakScheduler.from_config(scheduler.config).solver == DPMSolver()


def test_another_solver_is_checked_and_needs_a_plan_of_its_own() -> None:
    scheduler = PolyakScheduler(solver=Heun())
    scheduler.set_timesteps(6)
    with pytest.raises(ValueError, match="an adaptive solver has none"):
        scheduler.solver = DPMSolver(method="adaptive")
    assert scheduler.solver == Heun()
    scheduler.solver = Mine()
    with pytest.raises(ValueError, match="call set_timesteps before the first step"):
        scheduler.step(torch.ones(1, 1), 0, torch.ones(1, 1))
    with pytest.raises(ValueError, match="saved with a solver from elsewhere"):
        PolyakScheduler.from_config(scheduler.config)
    assert isinstance(PolyakScheduler.from_config(scheduler.config, solver=Mine()).solver, Mine)


# --- edits in place, and of options that nobody knows


def test_lists_that_are_changed_in_place_count() -> None:
    for betas in (BETAS.tolist(), BETAS.copy()):
        scheduler = PolyakScheduler(solver=DDIM(), trained_betas=betas)
        scheduler.set_timesteps(3)
        scheduler.config["trained_betas"][:] = OTHERS
        scheduler.set_timesteps(3)
        want = PolyakScheduler(solver=DDIM(), trained_betas=OTHERS.tolist())
        assert torch.allclose(scheduler.alphas_cumprod, want.alphas_cumprod, rtol=1e-6)
        again = PolyakScheduler.from_config(scheduler.config)
        assert torch.equal(again.alphas_cumprod, scheduler.alphas_cumprod)


def test_an_edit_counts_before_a_run_is_planned() -> None:
    x, z = torch.randn(2, 2, 3, generator=rng())
    t = torch.tensor([500, 20])
    want = PolyakScheduler(solver=DDIM(), beta_schedule="scaled_linear")
    scheduler = PolyakScheduler(solver=DDIM())
    scheduler.register_to_config(beta_schedule="scaled_linear")
    assert torch.equal(scheduler.add_noise(x, z, t), want.add_noise(x, z, t))
    scheduler.config["beta_schedule"] = "linear"
    assert torch.equal(scheduler.get_velocity(x, z, t), PolyakScheduler(solver=DDIM()).get_velocity(x, z, t))
    euler = PolyakScheduler.from_config(saved(diffusers.EulerDiscreteScheduler()), solver=Euler())
    euler.register_to_config(beta_schedule="scaled_linear")
    want = PolyakScheduler.from_config(euler.config)
    assert torch.equal(euler.scale_model_input(x, 20), want.scale_model_input(x, 20))


@pytest.mark.parametrize("origin", [None, "DDIMScheduler", "FlowMatchEulerDiscreteScheduler"])
def test_options_that_nobody_knows_are_refused_in_edits_too(origin: str | None) -> None:
    scheduler = PolyakScheduler(solver=DDIM(), origin=origin)
    scheduler.register_to_config(clip_sampel=True)
    with pytest.raises(ValueError, match=f"clip_sampel=True is not an option of {origin or 'PolyakScheduler'}"):
        scheduler.set_timesteps(3)


def test_a_note_in_a_configuration_comes_back(tmp_path: Any) -> None:
    scheduler = PolyakScheduler(solver=DDIM())
    scheduler.register_to_config(made_by="me", shots=3)
    assert PolyakScheduler.from_config(scheduler.config).config["shots"] == 3
    scheduler.set_timesteps(3)
    scheduler.save_pretrained(tmp_path)
    for again in (PolyakScheduler.from_config(scheduler.config), PolyakScheduler.from_pretrained(tmp_path)):
        again.set_timesteps(3)
        assert (again.config["made_by"], again.config["shots"]) == ("me", 3)
        again.register_to_config(shots=4)
        again.set_timesteps(3)
        assert PolyakScheduler.from_config(again.config).config["shots"] == 4


def test_what_pipelines_write_for_others_is_kept() -> None:
    # Cosmos writes options of EDM into the configuration of a flow, inpainting pipelines one of PNDM's.
    scheduler = PolyakScheduler(solver=Euler(), origin="FlowMatchEulerDiscreteScheduler", use_karras_sigmas=True)
    scheduler.register_to_config(sigma_max=0.9, sigma_min=0.1, sigma_data=1.0, final_sigmas_type="sigma_min")
    scheduler.set_timesteps(3)
    assert scheduler.sigmas[[0, 2]].tolist() == pytest.approx([0.9, 0.1])
    scheduler = PolyakScheduler.from_config(saved(diffusers.PNDMScheduler()), solver=DDIM())
    scheduler.register_to_config(skip_prk_steps=True)
    scheduler.set_timesteps(3)
    assert scheduler.config["skip_prk_steps"] is True


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"grid": "foo"}, "grid must be one of"),
        ({"prediction_type": "edm", "sigma_data": -1.0}, "sigma_data must be > 0"),
        ({"origin": "EDMEulerScheduler", "sigma_data": 0.0}, "sigma_data must be > 0"),
        (
            {"origin": "CogVideoXDDIMScheduler", "clip_sample": True},
            r"clip_sample=True .*from_config\(.*clip_sample=False",
        ),
        ({"variance_type": "large"}, "variance_type must be one of"),
        ({"variance_type": "fixed_large"}, "variance_type='fixed_large' has no meaning here: noise is the solver's"),
        ({"shift": 3.0, "prediction_type": "epsilon"}, "prediction_type must be one of 'flow_prediction'"),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused_where_it_is_constructed(options: Options, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PolyakScheduler(solver=DDIM(), **options)


def test_options_of_the_solver_that_is_replaced_are_no_overrides() -> None:
    config = saved(diffusers.DPMSolverMultistepScheduler(solver_order=3))
    assert PolyakScheduler.from_config(config, solver=TWO_M).config["solver_order"] == 3
    with pytest.raises(
        ValueError, match=r"algorithm_type='sde-dpmsolver\+\+' has no meaning here: it is of the solver"
    ):
        PolyakScheduler.from_config(config, solver=TWO_M, algorithm_type="sde-dpmsolver++")


# --- numbers of NumPy's and PyTorch's


@pytest.mark.parametrize(
    "options",
    [
        {"clip_sample": np.bool_(True), "clip_sample_range": np.float32(0.5)},
        {"steps_offset": np.int64(1), "beta_start": np.float32(2.0**-12)},
        {"num_train_timesteps": np.int32(500), "use_karras_sigmas": np.bool_(True)},
        {"trained_betas": torch.linspace(1e-4, 0.02, 50)},
        {"trained_betas": list(np.linspace(1e-4, 0.02, 50, dtype=np.float32))},
        {"trained_betas": BETAS},
        {"origin": "FlowMatchEulerDiscreteScheduler", "stochastic_sampling": np.bool_(False), "shift": np.float64(3)},
    ],
    ids=lambda o: ",".join(o),
)
def test_numbers_from_elsewhere_are_numbers(options: Options, tmp_path: Any) -> None:
    plain = {k: v.tolist() if isinstance(v, np.generic | np.ndarray | torch.Tensor) else v for k, v in options.items()}
    if isinstance(plain.get("trained_betas"), list):
        plain["trained_betas"] = [float(v) for v in plain["trained_betas"]]
    scheduler, want = (PolyakScheduler(solver=DDIM(), **o) for o in (options, plain))
    scheduler.save_pretrained(tmp_path)
    loaded = PolyakScheduler.from_pretrained(tmp_path)
    edited = PolyakScheduler(solver=DDIM(), origin=plain.get("origin"))
    edited.register_to_config(**{k: v for k, v in options.items() if k != "origin"})
    want.set_timesteps(3)
    for s in (scheduler, loaded, edited):
        s.set_timesteps(3)
        assert torch.equal(s.timesteps, want.timesteps)
        assert torch.equal(s.sigmas, want.sigmas)
        assert type(s.corrector) is type(want.corrector)
        json.loads(s.to_json_string())
    edited.register_to_config(**{k: v for k, v in options.items() if k != "origin"})  # again, unchanged
    edited.set_timesteps(3)


def test_numbers_from_elsewhere_in_solvers_and_processes(tmp_path: Any) -> None:
    scheduler = PolyakScheduler(solver=DDIM(np.float32(0.5)), process=VP(t_min=np.float64(0.01)))
    scheduler.save_pretrained(tmp_path)
    again = PolyakScheduler.from_pretrained(tmp_path)
    assert (again.solver, again.process) == (DDIM(0.5), VP(t_min=0.01))
    scheduler.set_timesteps(np.int64(3))
    assert len(scheduler.timesteps) == 3


def test_tensors_may_be_written_again() -> None:
    scheduler = PolyakScheduler(solver=DDIM(), trained_betas=torch.linspace(1e-4, 0.02, 50))
    scheduler.register_to_config(trained_betas=torch.linspace(1e-4, 0.03, 50))
    scheduler.set_timesteps(3)
    assert float(scheduler.betas[-1]) == pytest.approx(0.03)
    scheduler.config["trained_betas"] = torch.linspace(1e-4, 0.04, 50)
    scheduler.set_timesteps(3)
    assert float(scheduler.betas[-1]) == pytest.approx(0.04)
    json.loads(scheduler.to_json_string())


# --- public tensors

LEVELS_EDITS = [
    ("EulerDiscreteScheduler", {}, Euler()),
    ("EDMEulerScheduler", {}, Euler()),
    ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}, Euler()),
    ("FlowMatchEulerDiscreteScheduler", {"invert_sigmas": True}, Euler()),
    ("DPMSolverMultistepScheduler", {}, DPMSolver(order=2, form="data", method="multistep", lower_order_final=15)),
]


def repeat_last(s: Any) -> None:
    s.sigmas[-1] = s.sigmas[-2]


def lower_last(s: Any) -> None:
    s.sigmas[-1] = 0.5 * s.sigmas[-2] + 0.5 * s.sigmas[-1]


def assign(s: Any) -> None:
    s.sigmas = torch.cat([s.sigmas[:1], torch.lerp(s.sigmas[1:-1], s.sigmas[2:], 0.3), s.sigmas[-1:]])


@pytest.mark.parametrize("edit", [repeat_last, lower_last, assign])
@pytest.mark.parametrize(("name", "options", "solver"), LEVELS_EDITS, ids=lambda v: v if isinstance(v, str) else "")
def test_levels_that_are_changed_are_stepped_to(
    name: str, options: Options, solver: Solver, edit: Callable[[Any], None]
) -> None:
    theirs = getattr(diffusers, name)(**options)
    ours = PolyakScheduler.from_config(saved(theirs), solver=solver)
    x, results = torch.randn(2, 3, dtype=torch.float64, generator=rng()), []
    for s in (theirs, ours):
        s.set_timesteps(4)
        edit(s)
        y = x * float(s.init_noise_sigma) if hasattr(s, "init_noise_sigma") else x
        for t in s.timesteps:
            seen = s.scale_model_input(y, t) if hasattr(s, "scale_model_input") else y
            y = s.step(torch.tanh(seen), t, y, return_dict=False)[0]
        results.append(y)
    assert torch.allclose(*results, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("solver", [Heun(), DPMSolver(form="data")], ids=repr)
def test_levels_that_cannot_be_stepped_to_are_refused(solver: Solver) -> None:
    scheduler = PolyakScheduler(solver=solver)
    x = torch.ones(1, 1)
    scheduler.set_timesteps(5)
    scheduler.sigmas[-1] = 0.5
    if solver == Heun():
        with pytest.raises(ValueError, match=r"sigmas were changed though Heun\(\) asks between them"):
            scheduler.step(x, scheduler.timesteps[0], x)
    for change in (lambda s: s.sigmas.flip(0), lambda s: s.sigmas[1:]):
        plain = PolyakScheduler(solver=DDIM())
        plain.set_timesteps(5)
        plain.sigmas = change(plain)
        with pytest.raises(ValueError, match=r"sigmas were changed to .*: they must be 6, and decrease"):
            plain.step(x, plain.timesteps[0], x)
    running = PolyakScheduler(solver=DDIM())
    running.set_timesteps(5)
    running.step(x, running.timesteps[0], x)
    running.sigmas[3] *= 0.9
    with pytest.raises(ValueError, match="sigmas were changed within a run"):
        running.step(x, running.timesteps[1], x)


@pytest.mark.parametrize("inference", [False, True])
def test_timesteps_that_are_a_part_of_the_plan_are_followed(inference: bool) -> None:
    def run(change: Callable[[PolyakScheduler], None]) -> torch.Tensor:
        scheduler = PolyakScheduler(solver=TWO_M)
        scheduler.set_timesteps(6)
        scheduler.set_begin_index(2) if change is begin else change(scheduler)
        x = torch.ones(1, 2)
        for t in scheduler.timesteps[-4:]:
            x = scheduler.add_noise(x, x, t[None]) * 0.5
            x = scheduler.step(torch.tanh(x), t, x).prev_sample
        return x

    def begin(s: PolyakScheduler) -> None:
        raise NotImplementedError

    def cut(s: PolyakScheduler) -> None:
        s.timesteps = s.timesteps[2:]
        s.sigmas = s.sigmas.clone()

    def half(s: PolyakScheduler) -> None:
        s.timesteps = s.timesteps.to(torch.float16)[2:]

    with torch.inference_mode(inference):
        want = run(begin)
        assert torch.equal(run(cut), want)
        assert torch.allclose(run(half), want, rtol=0.02)


def test_timesteps_that_are_not_planned_are_refused() -> None:
    x = torch.ones(1, 1)
    for change in (lambda t: t - 1, lambda t: t[::2], lambda t: t.flip(0), lambda t: t[:0]):
        scheduler = PolyakScheduler(solver=DDIM())
        scheduler.set_timesteps(5)
        t, scheduler.timesteps = scheduler.timesteps[0], change(scheduler.timesteps)
        with pytest.raises(ValueError, match=r"timesteps were changed to .*, which are not a part of those planned"):
            scheduler.step(x, t, x)
    scheduler = PolyakScheduler(solver=DDIM())
    scheduler.set_timesteps(5)
    scheduler.timesteps[1] += 1
    with pytest.raises(ValueError, match="timesteps were changed"):
        scheduler.step(x, scheduler.timesteps[0], x)


def test_timesteps_beyond_the_chain_are_named_as_they_were_given() -> None:
    scheduler = PolyakScheduler(solver=DDIM(), timestep_spacing="leading", steps_offset=700)
    with pytest.raises(
        ValueError, match=r"timestep 1450 is outside of those that the network knows, 0 to 999: lower steps_off"
    ):
        scheduler.set_timesteps(3)
    flow = PolyakScheduler(solver=Euler(), shift=1.0)
    with pytest.raises(ValueError, match="sigmas must decrease from at most 1"):
        flow.set_timesteps(timesteps=[1200.0, 3.0])


# --- what else schedulers show


def test_a_flow_shows_its_shift() -> None:
    theirs = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    ours = PolyakScheduler.from_config(theirs.config, solver=Euler())
    assert (ours.shift, ours.sigma_min, ours.sigma_max) == pytest.approx((3.0, theirs.sigma_min, theirs.sigma_max))
    ours.set_shift(5.0)
    assert ours.shift == 5.0
    t = torch.tensor([0.2, 0.7])
    for kind in ("exponential", "linear"):
        theirs.register_to_config(time_shift_type=kind)
        ours.register_to_config(time_shift_type=kind)
        assert torch.allclose(ours.time_shift(1.3, 1.0, t), theirs.time_shift(1.3, 1.0, t))
    chain = PolyakScheduler(solver=DDIM())
    for name in ("shift", "sigma_min", "sigma_max"):
        assert not hasattr(chain, name)


def test_edm_scales_what_a_network_is_conditioned_on() -> None:
    theirs = diffusers.EDMEulerScheduler()
    ours = PolyakScheduler.from_config(theirs.config, solver=Euler())
    sigma = torch.tensor([0.3, 2.0])
    assert torch.allclose(ours._get_conditioning_c_in(sigma), theirs._get_conditioning_c_in(sigma))
    assert ours._get_conditioning_c_in(0.3) == pytest.approx(float(theirs._get_conditioning_c_in(0.3)))


@pytest.mark.parametrize(
    ("name", "there"), [("FlowMatchEulerDiscreteScheduler", False), ("EulerDiscreteScheduler", True)]
)
def test_the_predicted_data_are_made_where_the_origin_gives_them(name: str, there: bool) -> None:
    scheduler = PolyakScheduler.from_config(saved(getattr(diffusers, name)()), solver=Euler())
    scheduler.set_timesteps(3)
    x = torch.ones(1, 2)
    assert (scheduler.step(x, scheduler.timesteps[0], x).pred_original_sample is not None) == there
