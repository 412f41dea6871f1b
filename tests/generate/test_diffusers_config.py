"""Going to PolyakScheduler and back loses nothing; saving and loading; solvers and processes of the user's own."""

from __future__ import annotations

import inspect
import json
import warnings
from typing import Any

import pytest
import torch
from diffusers_cases import PLANS, TWO_M, Options, diffusers, push, saved, scheduler_class
from generate_cases import BETAS, Mine, Sine, stable_diffusion

from polyak.generate import (
    DDIM,
    EDM,
    VP,
    Denoiser,
    Discrete,
    DPMSolver,
    Euler,
    Flow,
    Heun,
    Process,
    sample,
)
from polyak.generate.adapters.diffusers import PolyakScheduler, as_diffusers
from polyak.generate.adapters.diffusers.options import DEFAULTS

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:diffusers", "ignore::FutureWarning")
OURS = {"solver", "process", "origin", "grid"}


def entries(config: Any) -> Options:
    return {k: v for k, v in config.items() if k != "_use_default_values"}


def in_turn(name: str) -> list[Options]:
    """Every option at its default, and a few configurations."""
    return [
        *([] if name == "CogVideoXDDIMScheduler" else PLANS[name][:1]),
        *PLANS[name][:: max(1, len(PLANS[name]) // 4)],
    ]


# --- there and back


@pytest.mark.parametrize("named", [True, False], ids=["from a file", "in memory"])
@pytest.mark.parametrize("name", PLANS)
def test_there_and_back_is_the_same_configuration(name: str, named: bool) -> None:
    kind = scheduler_class(name)
    for options in in_turn(name):
        theirs = kind(**options)
        if named:
            theirs = kind.from_config(saved(theirs))
        ours = PolyakScheduler.from_config(theirs.config, solver=DDIM(), origin=name)
        back = kind.from_config(ours.config)
        told = {"prediction_type"} if name.startswith("FlowMatch") else set()
        assert {k: v for k, v in entries(back.config).items() if k not in told} == entries(theirs.config)
        assert set(back.config.get("_use_default_values", ())) == set(theirs.config.get("_use_default_values", ()))
        again = PolyakScheduler.from_config(ours.config)
        assert entries(again.config) == entries(ours.config)
        assert again.config["origin"] == name


def test_what_one_goes_to_next_is_told() -> None:
    # The words are diffusers': our "flow" is its "flow_prediction", and a flow's shift stays.
    theirs = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    ours = PolyakScheduler.from_config(theirs.config, solver=Euler())
    assert "use_flow_sigmas" not in ours.config  # pipelines that find it do not hand over their own sigmas
    assert ours.config["prediction_type"] == "flow_prediction"
    assert diffusers.FlowMatchEulerDiscreteScheduler.from_config(ours.config).config.shift == 3.0
    assert diffusers.DPMSolverMultistepScheduler.from_config(ours.config).config.prediction_type == "flow_prediction"
    for word, theirs_word in (("flow", "flow_prediction"), ("v", "v_prediction"), ("eps", "epsilon"), ("x0", "sample")):
        assert PolyakScheduler(solver=DDIM(), prediction_type=word).config["prediction_type"] == theirs_word
    kept = PolyakScheduler.from_config(
        diffusers.EulerDiscreteScheduler(prediction_type="original_sample").config, solver=Euler()
    )
    assert diffusers.EulerDiscreteScheduler.from_config(kept.config).config.prediction_type == "original_sample"


def test_options_override_those_of_the_configuration() -> None:
    theirs = diffusers.DPMSolverMultistepScheduler()
    ours = PolyakScheduler.from_config(theirs.config, solver=TWO_M, use_karras_sigmas=True)
    assert ours.config["use_karras_sigmas"] is True
    assert diffusers.DPMSolverMultistepScheduler.from_config(ours.config).config.use_karras_sigmas is True
    with pytest.raises(
        ValueError, match="use_karas_sigmas=True is not an option of DPMSolverMultistepScheduler: unknown"
    ):
        PolyakScheduler.from_config(theirs.config, solver=TWO_M, use_karas_sigmas=True)
    ours, unused = PolyakScheduler.from_config(theirs.config, return_unused_kwargs=True, solver=TWO_M, foo=1)
    assert unused == {"foo": 1}
    # read as another scheduler's, as diffusers does from one class to another
    other = PolyakScheduler.from_config(
        diffusers.DDIMScheduler().config, solver=Euler(), origin="EulerDiscreteScheduler"
    )
    assert other.config["timestep_spacing"] == "linspace"


def test_a_pipeline_that_corrects_an_old_configuration_is_heard() -> None:
    # StableDiffusionPipeline writes steps_offset=1 and clip_sample=False into configurations that say otherwise.
    theirs = diffusers.DDIMScheduler()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipe = stable_diffusion(PolyakScheduler.from_config(theirs.config, solver=DDIM()))
    pipe.scheduler.set_timesteps(5)
    assert pipe.scheduler.timesteps.tolist() == [801, 601, 401, 201, 1]
    assert pipe.scheduler.corrector is None


def test_a_changed_configuration_is_read_again() -> None:
    # diffusers reads attributes when it plans; register_to_config, entries and attributes are all in use.
    def karras(config: Any) -> None:
        config["use_karras_sigmas"] = True

    def attribute(config: Any) -> None:
        config.use_karras_sigmas = True

    want = PolyakScheduler(solver=TWO_M, use_karras_sigmas=True)
    want.set_timesteps(5)
    for change in (karras, attribute):
        scheduler = PolyakScheduler.from_config(diffusers.DPMSolverMultistepScheduler().config, solver=TWO_M)
        scheduler.set_timesteps(5)
        assert not torch.equal(scheduler.timesteps, want.timesteps)
        change(scheduler.config)
        scheduler.set_timesteps(5)
        assert torch.equal(scheduler.timesteps, want.timesteps)
    scheduler = PolyakScheduler(solver=TWO_M)
    scheduler.register_to_config(use_karras_sigmas=True)
    scheduler.set_timesteps(5)
    assert torch.equal(scheduler.timesteps, want.timesteps)
    scheduler.register_to_config(timestep_spacing="even")
    with pytest.raises(ValueError, match="timestep_spacing must be one of"):
        scheduler.set_timesteps(5)


def test_options_that_do_nothing_are_refused_where_they_are_written_by_hand() -> None:
    with pytest.raises(ValueError, match="solver_order=3 has no meaning here: it is of the solver that ours replaces"):
        PolyakScheduler(solver=TWO_M, solver_order=3)
    for name, value in (("rescale_betas_zero_snr", True), ("use_flow_sigmas", True), ("use_beta_sigmas", True)):
        with pytest.raises(ValueError, match=f"{name}=True has no meaning for a process that is given"):
            as_diffusers(TWO_M, VP(), **{name: value})
    with pytest.raises(ValueError, match="grid='karras' and use_beta_sigmas exclude each other"):
        PolyakScheduler(solver=TWO_M, grid="karras", use_beta_sigmas=True)
    for option, grid in (
        ("use_karras_sigmas", "karras"),
        ("use_exponential_sigmas", "logsnr"),
        ("use_lu_lambdas", "logsnr"),
    ):
        asked, direct = as_diffusers(TWO_M, VP(), **{option: True}), as_diffusers(TWO_M, VP(), grid=grid)
        for s in (asked, direct):
            s.set_timesteps(5)
        assert torch.equal(asked.timesteps, direct.timesteps)


def test_saved_defaults_are_values_that_diffusers_knows(tmp_path: Any) -> None:
    PolyakScheduler(solver=DDIM()).save_pretrained(tmp_path)
    for name in ("DPMSolverMultistepScheduler", "EulerDiscreteScheduler", "DDIMScheduler", "UniPCMultistepScheduler"):
        theirs = getattr(diffusers, name).from_pretrained(tmp_path)
        theirs.set_timesteps(5)
        assert theirs.config.prediction_type == "epsilon"


# --- saving and loading


@pytest.mark.parametrize(
    "name", ["DDIMScheduler", "EulerDiscreteScheduler", "UniPCMultistepScheduler", "EDMEulerScheduler"]
)
def test_a_saved_configuration_keeps_its_origin(name: str, tmp_path: Any) -> None:
    theirs = scheduler_class(name)()
    theirs.save_pretrained(tmp_path)
    ours = PolyakScheduler.from_pretrained(tmp_path, solver=DPMSolver())
    ours.save_pretrained(tmp_path)
    again = PolyakScheduler.from_pretrained(tmp_path)
    assert (again.solver, again.config["origin"]) == (DPMSolver(), name)
    back = scheduler_class(name).from_pretrained(tmp_path)
    assert {k: back.config[k] for k in theirs.config if not k.startswith("_")} == {
        k: v for k, v in theirs.config.items() if not k.startswith("_")
    }
    # and a third time from there, though ours are still in that file
    third = PolyakScheduler.from_config(back.config, solver=Heun())
    assert (repr(third.solver), third.config["origin"]) == ("Heun()", name)


def test_what_another_scheduler_was_loaded_from_is_that_schedulers(tmp_path: Any) -> None:
    PolyakScheduler.from_config(diffusers.DDIMScheduler().config, solver=DPMSolver()).save_pretrained(tmp_path)
    theirs = diffusers.EulerDiscreteScheduler.from_pretrained(tmp_path)
    assert theirs.config["origin"] == "DDIMScheduler"  # diffusers keeps what it does not know
    ours = PolyakScheduler.from_config(theirs.config, solver=Euler())
    assert ours.config["origin"] == "EulerDiscreteScheduler"


def test_a_pipeline_is_saved_and_loaded_with_its_scheduler(tmp_path: Any) -> None:
    pipe = diffusers.DDPMPipeline(unet(), PolyakScheduler.from_config(diffusers.DDPMScheduler().config, solver=TWO_M))
    pipe.save_pretrained(tmp_path)
    again = diffusers.DDPMPipeline.from_pretrained(tmp_path)
    assert isinstance(again.scheduler, PolyakScheduler)
    assert again.scheduler.solver == TWO_M


def unet() -> Any:
    return diffusers.UNet2DModel(
        sample_size=8, block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4,
        down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2,
    )  # fmt: skip


@pytest.mark.parametrize(
    "process", [VP(), EDM(sigma_max=50.0), Flow(label_scale=1000.0), Discrete(BETAS), Discrete(BETAS[:20])]
)
def test_a_given_process_is_saved(process: Process, tmp_path: Any) -> None:
    scheduler = as_diffusers(DDIM(0.5), process, "edm" if isinstance(process, EDM) else "sample")
    scheduler.save_pretrained(tmp_path)
    again = PolyakScheduler.from_pretrained(tmp_path)
    assert again.process == process
    for s in (scheduler, again):
        s.set_timesteps(4)
    assert torch.equal(again.timesteps, scheduler.timesteps)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"part": "process:VP"}, "no Solver is called 'process:VP'"),
        ({"part": "os:system"}, "no Solver is called"),
        ({"part": "ddim.x:DDIM"}, "no Solver is called"),
        (DPMSolver(method="adaptive"), "needs the timesteps beforehand"),
        (None, r"solver is needed: PolyakScheduler.from_config\(config, solver=DPMSolver"),
    ],
)
def test_solvers_that_are_none(given: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PolyakScheduler(solver=given)


def test_configurations_of_older_versions_of_polyak() -> None:
    # as 0.1 wrote them: parts by the modules they were in then, DPMSolver with all options of all methods
    old = {
        "_class_name": "PolyakScheduler", "solver": {"part": "solver:Heun"}, "process": None, "use_flow_sigmas": False,
        "prediction_type": "epsilon", "flow_shift": 1.0, "timestep_spacing": "leading", "steps_offset": 1,
    }  # fmt: skip
    scheduler = PolyakScheduler.from_config(old)
    assert isinstance(scheduler.solver, Heun)
    old["solver"] = {
        "part": "dpm_solver:DPMSolver",
        "order": 2,
        "form": "data",
        "method": "multistep",
        "sde": False,
        "theta": 0.9,
    }
    assert PolyakScheduler.from_config(old).solver == DPMSolver(order=2, form="data", method="multistep")


# --- the user's own


def test_a_solver_of_ones_own(tmp_path: Any) -> None:
    scheduler = PolyakScheduler(solver=Mine())
    assert scheduler.order == 1
    euler = PolyakScheduler(solver=Euler())
    x = torch.randn(2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    results = []
    for s in (scheduler, euler):
        s.set_timesteps(5)
        results.append(push(s, x)[0])
    assert torch.allclose(*results, rtol=1e-12)
    scheduler.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "scheduler_config.json").read_text())
    assert written["solver"] == {"class": f"{Mine.__module__}.Mine"}
    with pytest.raises(ValueError, match=r"saved with a solver from elsewhere, .*\.Mine, .*: pass solver="):
        PolyakScheduler.from_pretrained(tmp_path)
    assert isinstance(PolyakScheduler.from_pretrained(tmp_path, solver=Mine()).solver, Mine)
    assert diffusers.DDIMScheduler.from_pretrained(tmp_path).config.beta_end == 0.02


def test_a_process_of_ones_own(tmp_path: Any) -> None:
    process = Sine()
    scheduler = as_diffusers(Heun(), process, "v_prediction")
    scheduler.set_timesteps(6)
    x = torch.randn(2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    got, _ = push(scheduler, x / process.prior_std, lambda x, t: torch.tanh(x) * (1 + t))
    denoiser = Denoiser(lambda x, t: torch.tanh(x) * (1 + t[:, None]), process, "v_prediction")
    want = sample(denoiser, x, solver=Heun(), steps=6)
    assert torch.allclose(got, want, rtol=1e-6)  # labels are in float32
    scheduler.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"saved with a process from elsewhere, .*Sine, .*: pass process="):
        PolyakScheduler.from_pretrained(tmp_path)
    again = PolyakScheduler.from_pretrained(tmp_path, process=Sine())
    again.set_timesteps(6)
    assert torch.equal(again.timesteps, scheduler.timesteps)


def test_the_defaults_of_schedulers_that_cannot_be_imported_are_theirs() -> None:
    for name, defaults in DEFAULTS.items():
        parameters = inspect.signature(scheduler_class(name).__init__).parameters
        assert {k: p.default for k, p in parameters.items() if k != "self"} == defaults
