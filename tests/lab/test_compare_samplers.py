"""Samplers on a denoiser and in a pipeline: whose options are whose, what a budget buys, and what is said of the rest."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from polyak.generate import DPMSolver
from polyak.lab.claim import Diverged, Trial
from polyak.lab.compare.arms import parse
from polyak.lab.compare.rehearsal import try_arms
from polyak.lab.compare.sampling import Draw, sampler
from polyak.lab.compare.spec import ArmError, find
from polyak.lab.compare.task import SamplingTask, load

from .tasks_for_tests import DRAWING, PIPELINE, SAMPLING, write


def loaded(path: Path) -> SamplingTask:
    task = load(str(path), 0, "cpu")
    assert isinstance(task, SamplingTask)
    return task


def tried(path: Path, arm: str, evaluations: int = 10) -> str:
    """What is wrong with an arm's words on a task, beside DDIM; nothing where nothing is."""
    given = []
    for spec in parse(f"ddim,{arm}", "sampling"):
        centre = {name: r.centre for name, r in spec.space.items()}
        shared = {"class": spec.target, "fixed": dict(spec.fixed), "budget": {"evaluations": evaluations}}
        given.append((spec.text, {**shared, "tuned": sorted(centre), **centre}))
    wrong = try_arms(str(path), "cpu", given)
    assert wrong is None or isinstance(wrong, ArmError), wrong
    return str(wrong or "")


# ------------------------------------------------------------------------------------------------------ whose options

DIFFUSERS = "diffusers:DDIMScheduler"


@pytest.mark.parametrize("option", ["guidance=CFG", "guidance.scale=2", "steering=Steering", "grid=karras"])
def test_what_is_for_polyaks_solvers_alone_is_no_option_of_a_scheduler(option: str) -> None:
    pytest.importorskip("diffusers")
    name = option.partition("=")[0].partition(".")[0]
    own = "" if name == "grid" else ", whose guidance is its own: give that in the task's `call`"
    with pytest.raises(ArmError) as caught:
        parse(f"ddim,{DIFFUSERS}:{option}", "sampling")
    assert str(caught.value) == (
        f"arm '{DIFFUSERS}:{option}': {name} is for polyak's solvers; DDIMScheduler is a scheduler of a pipeline{own}"
    )


def test_only_a_schedulers_own_options_are_offered() -> None:
    pytest.importorskip("diffusers")
    with pytest.raises(ArmError, match="did you mean 'beta_start'") as caught:
        parse(f"ddim,{DIFFUSERS}:beta_strat=1", "sampling")
    offered = str(caught.value).partition("It has ")[2].split(", ")
    assert "beta_schedule" in offered
    assert not {"guidance", "steering", "grid"} & set(offered)


@pytest.mark.parametrize("option", ["guidance=CFG", "guidance=CFG:guidance.scale=1..8", "steering=Steering"])
def test_guidance_and_steering_are_no_options_in_a_pipeline(tmp_path: Path, option: str) -> None:
    name = option.partition("=")[0]
    assert tried(write(tmp_path, DRAWING), f"heun:{option}") == (
        f"arm 'heun:{option}': {name} cannot be an arm's in a pipeline, whose guidance is its own: give that in the task's `call`"
    )


def test_what_a_trial_gives_a_pipeline_is_no_option(tmp_path: Path) -> None:
    path = write(tmp_path, DRAWING)
    assert tried(path, "heun:call.num_inference_steps=5") == (
        "arm 'heun:call.num_inference_steps=5': call.num_inference_steps cannot be an arm's: it is the budget's affair"
    )
    assert tried(path, "heun:call.generator=5").endswith("call.generator cannot be an arm's: it is the seed's affair")


def test_a_scheduler_needs_a_pipeline(tmp_path: Path) -> None:
    pytest.importorskip("diffusers")
    assert tried(write(tmp_path, SAMPLING), DIFFUSERS) == (
        f"arm '{DIFFUSERS}': DDIMScheduler is a diffusers scheduler, which goes into a pipeline: it needs a task that returns a "
        "`pipeline`, and this one returns a denoiser"
    )


def test_a_grid_in_a_pipeline_is_that_of_the_scheduler_around_the_solver(tmp_path: Path) -> None:
    pytest.importorskip("diffusers")
    path, options = write(tmp_path, PIPELINE), {"order": 2, "form": "data", "method": "multistep"}

    def drawn(**more: str) -> Any:
        given = {"class": "polyak.generate:DPMSolver", "fixed": {**options, **more}, "tuned": []}
        samples, spent = sampler(loaded(path), given, "cpu").draw(5, seed=3)
        assert spent == 5
        return samples

    by_hand = loaded(path)
    pipe, solver = by_hand.pipeline, DPMSolver(order=2, form="data", method="multistep")
    adapter = find("polyak.generate.adapters.diffusers:PolyakScheduler")
    pipe.scheduler = adapter.from_config(pipe.scheduler.config, solver=solver, grid="karras")
    wanted = pipe(**by_hand.call, num_inference_steps=5, generator=torch.Generator().manual_seed(3)).images
    assert (drawn(grid="karras") == wanted).all()
    assert abs(drawn() - wanted).max() > 1e-3
    assert tried(path, "heun:grid=karras") == ""
    assert "karrras" in tried(path, "heun:grid=karrras")


def test_an_arm_leaves_a_shared_pipeline_as_it_was(tmp_path: Path) -> None:
    """Else the next one would be made from the options of the one before."""
    pytest.importorskip("diffusers")
    shared = {"\n\ndef task": "\n\nPIPE = Pipe()\n\n\ndef task", '"pipeline": Pipe()': '"pipeline": PIPE'}
    path = write(tmp_path, DRAWING, replaced=PLANNED | shared)
    pipe = loaded(path).pipeline
    own = pipe.scheduler
    for cls, fixed in (("DDIMScheduler", {"beta_end": 0.5}), ("EulerDiscreteScheduler", {})):
        arm = sampler(loaded(path), {"class": f"diffusers:{cls}", "fixed": fixed, "tuned": []}, "cpu")
        used = arm._scheduler  # pyright: ignore[reportAttributeAccessIssue]
        assert used.config["beta_end"] == fixed.get("beta_end", own.config["beta_end"])
        assert arm.draw(4, seed=0)[1] == 4
        assert pipe.scheduler is own


# ------------------------------------------------------------------------------------------------- what a budget buys

GUIDED = {"ExactDenoiser(law, VP())": "Denoiser(lambda x, t: 0.1 * x, VP(), unconditional=lambda x, t: 0.1 * x)"}
GUIDED["import VP"] = "import VP, Denoiser"


@pytest.mark.parametrize(
    ("arm", "evaluations", "says"),
    [
        ("rk4", 3, "RK4() takes at least 4 evaluations for a sample, and there are 3"),
        ("rk4:guidance=CFG", 6, "RK4() with CFG(scale=7.5) takes at least 8 evaluations for a sample, and there are 6"),
        ("rk4:guidance=CFG:guidance.scale=3", 7, "RK4() with CFG(scale=3) takes at least 8 evaluations for a sample"),
        ("rk4:guidance=CFG", 8, ""),
        ("ddim:guidance=CFG:guidance.scale=1..8", 1, "takes at least 2 evaluations for a sample, and there are 1"),
        (
            "dpmsolver:order=3:method=multistep:guidance=CFG",
            5,
            "takes at least 6 evaluations for a sample, and there are 5",
        ),
        ("dpmsolver:order=3:method=multistep:guidance=CFG", 6, ""),
        ("rk4:guidance=CFG:grid=karas", 6, "karas"),
        ("rk4:guidance=CFG:grid=karas", 8, "karas"),
    ],
)
def test_a_budget_that_is_too_small_is_told_in_evaluations(
    tmp_path: Path, arm: str, evaluations: int, says: str
) -> None:
    found = tried(write(tmp_path, SAMPLING, replaced=GUIDED), arm, evaluations)
    assert says in found
    assert bool(says) == bool(found)


PRK = "PNDMScheduler"  # its first steps are of several evaluations, and it cannot plan fewer than four
PLANNED = {
    "import torch\n": "import torch\nfrom diffusers import DDIMScheduler\n",
    " = Scheduler()": " = DDIMScheduler()",
}


def test_a_budget_that_is_too_small_for_a_scheduler_is_told(tmp_path: Path) -> None:
    pytest.importorskip("diffusers")
    path = write(tmp_path, DRAWING, replaced=PLANNED)
    assert tried(path, PRK) == (
        f"arm '{PRK}': PNDMScheduler cannot draw on this task: ValueError: 4 steps of PNDMScheduler take 13 evaluations, and there "
        "are 10; it cannot plan fewer steps"
    )
    assert tried(path, PRK, 13) == ""
    assert tried(path, "KDPM2DiscreteScheduler", 1) == ""
    said = tried(path, "rk4:grid=time", 3)
    assert said.endswith("ValueError: 1 step of PolyakScheduler takes 4 evaluations, and there are 3")
    assert "RK4 cannot draw on this task: ValueError: grid must be one of 'logsnr', " in tried(path, "rk4:grid=tim")
    said = tried(path, "DDIMScheduler:timestep_spacing=wide")
    assert "DDIMScheduler.set_timesteps(10) raised ValueError: wide is not supported" in said


# -------------------------------------------------------------------------------------------------- what is not finite


@pytest.mark.parametrize(
    ("text", "changes", "why"),
    [
        (SAMPLING, {".mean()": ".mean() * float('nan')"}, "off is nan"),
        (SAMPLING, {".mean()}": ".mean() / 0}"}, "off is inf"),
        (
            DRAWING,
            {"0.9**num_inference_steps": "(float('nan') if num_inference_steps > 2 else 1)"},
            "samples are not finite",
        ),
        (
            DRAWING,
            {
                "return (x * 0.9**num_inference_steps,)": "return x.numpy() * (float('inf') if num_inference_steps > 2 else 1)"
            }
            | {"x.norm(dim=1)": "x"},
            "samples are not finite",
        ),
    ],
)
def test_why_a_trial_diverged_is_said(tmp_path: Path, text: str, changes: dict[str, str], why: str) -> None:
    pytest.importorskip("diffusers")
    changes = changes | ({} if text is SAMPLING else PLANNED)
    path = write(tmp_path, text, replaced=changes)
    options = {"class": "polyak.generate:DDIM", "fixed": {}, "tuned": [], "budget": {"evaluations": 4}, "points": 4}
    one = Trial(claim="c", scale="s", task="t", arm="a", seed=3, device="cpu", options=options)
    with pytest.raises(Diverged, match=why):
        list(Draw(str(path))(one))
