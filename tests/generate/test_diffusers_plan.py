"""What every option of every scheduler means: the table is complete, and what acts acts as it does in diffusers."""

from __future__ import annotations

import inspect
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers_cases import (
    PLANS,
    SAME,
    SCALED,
    SHAPED,
    TWO_M,
    Options,
    both,
    diffusers,
    network,
    push,
    rng,
    saved,
    scheduler_class,
)

from polyak.generate import DDIM, EDM, RK4, Discrete, DPMSolver, Euler, Flow
from polyak.generate.adapters.diffusers import PolyakScheduler
from polyak.generate.adapters.diffusers.levels import ChainLevels
from polyak.generate.adapters.diffusers.options import DEFAULTS, OWN, TABLE, Acts, Idle, Refused
from polyak.generate.adapters.diffusers.plan import defaults_of, identify, read
from polyak.generate.adapters.diffusers.tables import markdown

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:diffusers")
TAKEN = [name for name, origin in TABLE.items() if not origin.refused]
INSTALLED = [
    name
    for name in dir(diffusers.schedulers)
    if name.endswith("Scheduler") and not name.startswith("Flax") and name not in ("SchedulerMixin",)
]


# --- the table


def test_every_scheduler_of_diffusers_is_in_the_table() -> None:
    assert set(INSTALLED) == set(TABLE)
    assert set(PLANS) == set(TAKEN)


@pytest.mark.parametrize("name", TABLE)
def test_every_option_is_in_the_table(name: str) -> None:
    # A diffusers that adds an option fails here: say what it means.
    parameters = inspect.signature(scheduler_class(name).__init__).parameters
    options = {k: p.default for k, p in parameters.items() if k not in ("self", "kwargs")}
    assert set(options) == set(TABLE[name].options)
    for rule in TABLE[name].options.values():
        assert isinstance(rule, Acts | Idle | Refused)
        if isinstance(rule, Idle | Refused):
            assert rule.why
    if name in DEFAULTS:
        assert options == DEFAULTS[name]


def test_the_documentation_shows_the_table() -> None:
    page = Path(__file__).parents[2] / "docs" / "diffusers.md"
    assert markdown() in page.read_text(), "write polyak.generate.adapters.diffusers.tables.markdown() into the page"


@pytest.mark.parametrize("name", [n for n, origin in TABLE.items() if origin.refused])
def test_a_scheduler_that_cannot_be_taken_says_why(name: str) -> None:
    with pytest.raises(ValueError, match=f"a configuration of {name} cannot be taken: "):
        PolyakScheduler.from_config({"_class_name": name}, solver=DDIM())


def test_what_is_refused_is_refused_where_it_is_constructed() -> None:
    cases: list[tuple[Options, str]] = [
        ({"_class_name": "FlowMatchEulerDiscreteScheduler", "stochastic_sampling": True}, "stochastic_sampling=True"),
        ({"_class_name": "FlowMatchLCMScheduler", "scale_factors": [0.5]}, r"scale_factors=\[0.5\]"),
        ({"_class_name": "CogVideoXDDIMScheduler", "clip_sample": True}, "clip_sample=True of CogVideoX"),
        ({"_class_name": "IPNDMScheduler", "trained_betas": [0.1, 0.2]}, r"trained_betas=\[0.1, 0.2\]"),
        ({"_class_name": "DPMSolverSDEScheduler", "noise_sampler_seed": 7}, "noise_sampler_seed=7"),
        (
            {"_class_name": "DDIMScheduler", "clip_sampel": True},
            "clip_sampel=True is not an option of DDIMScheduler: unknown",
        ),
        ({"_class_name": "MyScheduler"}, "no meaning is known for a configuration of 'MyScheduler'"),
        ({"clip_sampel": True}, "clip_sampel=True is not an option of PolyakScheduler: unknown"),
        ({"rho": 7.0}, r"rho=7.0 is not an option of PolyakScheduler: it belongs to EDMEulerScheduler, .*origin="),
        ({"interpolation_type": "log_linear"}, "interpolation_type='log_linear' .* belongs to EulerDiscreteScheduler"),
        ({"sigma_max": 80.0}, "sigma_max=80.0 has no meaning without one of use_karras_sigmas"),
        ({"sigma_max": 700.0, "use_karras_sigmas": True}, "sigma_max=700.0 is outside of the chain"),
        ({"use_karras_sigmas": True, "use_beta_sigmas": True}, "only one of use_karras_sigmas, use_beta_sigmas"),
        ({"use_karras_sigmas": True, "use_flow_sigmas": True}, "use_karras_sigmas cannot be used with use_flow_sigmas"),
        ({"shift_terminal": 0.1}, "shift_terminal=0.1 needs use_flow_sigmas"),
        ({"use_flow_sigmas": True, "prediction_type": "v_prediction"}, "prediction_type='v_prediction' cannot be used"),
        ({"predict_epsilon": False}, "predict_epsilon=False"),
        ({"timestep_spacing": "even"}, "timestep_spacing must be one of"),
        ({"_class_name": "EDMEulerScheduler", "sigma_schedule": "linear"}, "sigma_schedule must be one of"),
        (
            {"_class_name": "EulerDiscreteScheduler", "prediction_type": "flow_prediction"},
            "prediction_type must be one of",
        ),
    ]
    for config, message in cases:
        with pytest.raises(ValueError, match=message):
            PolyakScheduler.from_config(config, solver=TWO_M)


def test_an_option_of_a_newer_diffusers_is_taken_at_its_default(monkeypatch: pytest.MonkeyPatch) -> None:
    parameters = list(inspect.signature(diffusers.DDIMScheduler.__init__).parameters.values())
    added = inspect.Parameter("foo", inspect.Parameter.KEYWORD_ONLY, default=1.0)

    class Newer(diffusers.DDIMScheduler):
        def __init__(self, **options: Any) -> None:
            super().__init__(**{k: v for k, v in options.items() if k != "foo"})

    Newer.__init__.__signature__ = inspect.Signature([*parameters, added])  # type: ignore[attr-defined]
    monkeypatch.setattr(diffusers.schedulers, "DDIMScheduler", Newer)
    PolyakScheduler.from_config({"_class_name": "DDIMScheduler", "foo": 1.0}, solver=DDIM())
    with pytest.raises(ValueError, match=r"foo=2\.0 is not an option of DDIMScheduler: unknown"):
        PolyakScheduler.from_config({"_class_name": "DDIMScheduler", "foo": 2.0}, solver=DDIM())


def test_what_means_nothing_is_taken() -> None:
    # Options that belong to other schedulers are kept, as diffusers keeps them; those of old versions, too.
    stray = {"_class_name": "PNDMScheduler", "clip_sample": True, "skip_prk_steps": True, "tensor_format": "pt"}
    scheduler = PolyakScheduler.from_config(stray, solver=TWO_M)
    assert scheduler.corrector is None
    assert scheduler.config["clip_sample"] is True
    for name, default in (("stochastic_sampling", False), ("scale_factors", None)):
        PolyakScheduler.from_config({"shift": 1.0, name: default}, solver=Euler())


@pytest.mark.parametrize("name", INSTALLED)
def test_a_configuration_in_memory_is_recognized(name: str) -> None:
    # It does not hold its class's name. Schedulers with the same options and defaults mean the same here.
    if any(
        p.default is p.empty for p in list(inspect.signature(scheduler_class(name).__init__).parameters.values())[1:-1]
    ):
        pytest.skip("it has no default configuration")
    found = identify(scheduler_class(name)().config)
    same = {
        "DDIMParallelScheduler": "DDIMScheduler", "DDPMParallelScheduler": "DDPMScheduler",
        "CogVideoXDPMScheduler": "CogVideoXDDIMScheduler", "TCDScheduler": "LCMScheduler",
        "KDPM2AncestralDiscreteScheduler": "KDPM2DiscreteScheduler",
        "FlowMapEulerDiscreteScheduler": "FlowMatchHeunDiscreteScheduler",
    }  # fmt: skip
    if name not in DEFAULTS:
        assert found == same.get(name, name)


def test_schedulers_with_the_same_options_are_told_apart_by_their_values() -> None:
    for name in ("LMSDiscreteScheduler", "KDPM2DiscreteScheduler"):
        explicit = scheduler_class(name)(**{**defaults_of(name), "use_karras_sigmas": True})
        assert identify(explicit.config) == name
    theirs, ours = (
        scheduler_class("KDPM2DiscreteScheduler")(**{**defaults_of("KDPM2DiscreteScheduler"), **SHAPED[1]})
        for _ in "12"
    )
    ours = PolyakScheduler.from_config(ours.config, solver=Euler())
    theirs.set_timesteps(4)
    ours.set_timesteps(4)
    assert torch.equal(ours.timesteps, torch.cat([theirs.timesteps[:1], theirs.timesteps[2::2]]))


def test_what_cannot_be_told_apart_is_said() -> None:
    config = diffusers.TCDScheduler().config
    with pytest.warns(UserWarning, match="may be LCMScheduler's or TCDScheduler's, .*: say origin="):
        taken = PolyakScheduler.from_config(config, solver=DDIM())
    assert taken.config["origin"] == "LCMScheduler"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert (
            PolyakScheduler.from_config(config, solver=DDIM(), origin="TCDScheduler").config["origin"] == "TCDScheduler"
        )
        PolyakScheduler.from_config(saved(diffusers.LCMScheduler()), solver=DDIM())


@pytest.mark.parametrize("options", [{"clip_sample": True, "clip_sample_range": 0.1}, {"thresholding": True}], ids=str)
def test_tcd_does_not_clip(options: Options) -> None:
    theirs, ours = both("TCDScheduler", options, DDIM())
    assert ours.corrector is None
    for s in (theirs, ours):
        s.set_timesteps(4)
    x = torch.randn(1, 3, 4, 4, dtype=torch.float64, generator=rng())
    want, got = push(theirs, x, eta=0.0)[0], push(ours, x)[0]
    assert torch.allclose(got, want, rtol=1e-5, atol=1e-5)


# --- timesteps and levels


@pytest.mark.parametrize("name", PLANS)
def test_timesteps_and_levels_are_those_of_diffusers(name: str) -> None:
    solver = SAME[name][0] if name in SAME else Euler() if name.startswith(("LMS", "KDPM2", "DPMSolverSDE")) else DDIM()
    for options in PLANS[name]:
        theirs, ours = both(name, options, solver)
        for n in (2, 7, 10):
            theirs.set_timesteps(n)
            ours.set_timesteps(n)
            want = theirs.timesteps.double()
            if name.startswith(("KDPM2", "DPMSolverSDE")):  # at every second one the step's start
                want = torch.cat([want[:1], want[2::2]])
            if name == "PNDMScheduler":  # it asks twice at its second one
                want = torch.cat([want[:1], want[2:]])
            # Where a label is a level's logarithm or sine, single precision decides its last digits.
            near = 0.0 if want.equal(want.round()) else 1e-6
            assert torch.allclose(ours.timesteps.double(), want, rtol=near, atol=near), (options, n)
            if name.startswith(("DDIM", "DDPM", "PNDM", "CogVideoX", "LCM", "TCD", "IPNDM", "KDPM2", "DPMSolverSDE")):
                continue
            levels = theirs.sigmas[: len(ours.sigmas)].double()
            assert torch.allclose(ours.sigmas.double(), levels, rtol=1e-6, atol=1e-9), (options, n)


@pytest.mark.parametrize("name", SAME)
def test_whole_trajectories_agree(name: str) -> None:
    solver, cases = SAME[name]
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64, generator=rng())
    for options in cases:
        theirs, ours = both(name, options, solver)
        for n in (2, 5, 10):
            theirs.set_timesteps(n)
            ours.set_timesteps(n)
            if hasattr(theirs, "set_begin_index"):  # else diffusers begins at the second of two equal timesteps
                theirs.set_begin_index(0)
            own = {"eta": 0.0} if name == "TCDScheduler" else {}
            want, largest = push(theirs, x, generator=rng(1), **own)
            got, _ = push(ours, x, generator=rng(1))
            # Their tables and states are in float32, and the large values on the way leave their rounding.
            bound = 1e-5 * float(want.abs().max()) + 3e-7 * largest
            assert (got - want).abs().max() < bound, (options, n)


def test_steps_that_diffusers_and_we_take_differently() -> None:
    # The times of DDIM's steps are those at which it then asks: n timesteps that do not divide the chain stay consistent.
    theirs, ours = both("DDIMScheduler", {"timestep_spacing": "linspace", "clip_sample": False}, DDIM())
    theirs.set_timesteps(5)
    ours.set_timesteps(5)
    assert torch.equal(theirs.timesteps, ours.timesteps)
    x = torch.full((1, 1), 0.5, dtype=torch.float64)
    first = ours.step(x, ours.timesteps[0], x).prev_sample
    process, (s, t) = ours.process, ours._times[:2]
    alpha, sigma = (
        process.alpha(t) / process.alpha(s),
        process.sigma(t) - process.alpha(t) / process.alpha(s) * process.sigma(s),
    )
    assert first.item() == pytest.approx(0.5 * (alpha + sigma), rel=1e-12)
    # A last level that rises is not stepped to.
    options = {"use_karras_sigmas": True, "sigma_min": 0.002, "final_sigmas_type": "sigma_min"}
    _, ours = both("EulerDiscreteScheduler", options, Euler())
    ours.set_timesteps(3)
    assert ours.sigmas.tolist()[-2:] == pytest.approx([0.002, 0.002])


def test_inner_points_are_told_as_the_grids_are() -> None:
    for options, label in (({}, lambda t: 1000 * t), ({"invert_sigmas": True}, lambda t: 1000 * (1 - t))):
        _, ours = both("FlowMatchEulerDiscreteScheduler", {"shift": 2.0, **options}, RK4())
        ours.set_timesteps(3)
        assert ours.timesteps.tolist() == pytest.approx([label(t) for t in ours._asked], rel=1e-6)
    theirs, ours = both("EulerDiscreteScheduler", {"use_karras_sigmas": True}, RK4())
    ours.set_timesteps(3)
    logs = np.log(theirs.sigmas[:-1].flip(0).numpy())
    want = theirs._sigma_to_t(np.array(ours._asked[1:2]), logs)[0]
    assert float(ours.timesteps[1]) == pytest.approx(want, rel=1e-5)


def test_a_level_that_is_there_twice_is_an_evaluation_without_effect() -> None:
    for name, options in (
        ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True, "final_sigmas_type": "sigma_min"}),
        ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True, "final_sigmas_type": "sigma_min", **SCALED}),
        ("DEISMultistepScheduler", {"use_karras_sigmas": True}),
        ("PNDMScheduler", {}),
        ("EDMEulerScheduler", {"final_sigmas_type": "sigma_min"}),
    ):
        _, ours = both(name, options, TWO_M)
        ours.set_timesteps(5)
        assert ours._times[-1] == ours._times[-2]
        x = torch.full((1, 1), 0.3, dtype=torch.float64)
        for t in ours.timesteps:
            before, x = x, ours.step(network(x, t), t, x).prev_sample
        assert torch.allclose(x, before, rtol=1e-12)


# --- what a plan is made of


@pytest.mark.parametrize(
    ("name", "options", "process"),
    [
        ("DDIMScheduler", {}, Discrete),
        ("EulerDiscreteScheduler", {}, ChainLevels),
        ("EDMEulerScheduler", {}, EDM),
        ("FlowMatchEulerDiscreteScheduler", {}, Flow),
        ("DPMSolverMultistepScheduler", {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}, Flow),
    ],
)
def test_the_process_is_that_of_the_configuration(name: str, options: Options, process: type) -> None:
    plan = read(options, name)
    assert type(plan.process) is process
    assert plan.origin == name


@pytest.mark.parametrize(
    "name", ["DDIMScheduler", "EulerDiscreteScheduler", "CogVideoXDDIMScheduler", "HeunDiscreteScheduler"]
)
@pytest.mark.parametrize("schedule", ["linear", "scaled_linear", "squaredcos_cap_v2"])
def test_chains_are_theirs_bit_for_bit(name: str, schedule: str) -> None:
    options = {"beta_schedule": schedule, **({"clip_sample": False} if name.startswith("Cog") else {})}
    theirs, ours = both(name, options, DDIM())
    for attribute in ("betas", "alphas", "alphas_cumprod"):
        assert torch.equal(getattr(ours, attribute), getattr(theirs, attribute)), attribute
    if hasattr(theirs, "final_alpha_cumprod"):
        assert float(ours.final_alpha_cumprod) == float(theirs.final_alpha_cumprod)


@pytest.mark.parametrize("betas", [{}, {"beta_schedule": "scaled_linear"}, {"beta_schedule": "squaredcos_cap_v2"}])
def test_zero_terminal_snr(betas: Options) -> None:
    # With linear betas 2^-24 is above the second last product: the chain still decreases, and its last level is theirs.
    options = {
        "timestep_spacing": "trailing",
        "prediction_type": "v_prediction",
        "rescale_betas_zero_snr": True,
        **betas,
    }
    theirs, ours = both("DPMSolverMultistepScheduler", options, TWO_M)
    assert torch.equal(ours.alphas_cumprod, theirs.alphas_cumprod)
    assert ours.process.sigma_hat(1.0) == pytest.approx(4096, rel=1e-6)
    t = torch.arange(1, 1001, dtype=torch.float64) / 1000
    assert bool((ours.process.lam(t).diff() < 0).all())


def test_own_options_are_those_of_dpm_solver_multistep() -> None:
    for options in ({}, {"use_karras_sigmas": True}, {"timestep_spacing": "trailing"}, {"lambda_min_clipped": -3.0}):
        _, theirs = both("DPMSolverMultistepScheduler", options, TWO_M)
        ours = PolyakScheduler(solver=TWO_M, **options)
        theirs.set_timesteps(6)
        ours.set_timesteps(6)
        assert torch.equal(ours.timesteps, theirs.timesteps)
        assert torch.equal(ours.sigmas, theirs.sigmas)
    shifted = PolyakScheduler(solver=TWO_M, snr_shift_scale=3.0)
    cogvideo = scheduler_class("CogVideoXDDIMScheduler")(beta_start=1e-4, beta_end=0.02, beta_schedule="linear")
    assert torch.allclose(shifted.alphas_cumprod, cogvideo.alphas_cumprod)
    assert isinstance(OWN.options["snr_shift_scale"], Acts)


def test_a_solver_that_cannot_end_on_clean_data_is_helped() -> None:
    # Configurations of newer versions say final_sigmas_type="zero"; diffusers' singlestep solver then ends with first order.
    for solver in (DPMSolver(), DPMSolver(form="data"), DPMSolver(order=2, form="data", denoise_to_zero=True)):
        scheduler = PolyakScheduler.from_config(saved(diffusers.DPMSolverMultistepScheduler()), solver=solver)
        for n in (1, 2, 6):
            scheduler.set_timesteps(n)
            assert len(scheduler.timesteps) == n
            x, _ = push(scheduler, torch.ones(1, 1, dtype=torch.float64), lambda x, t: torch.zeros_like(x))
            # eps = 0: x / alpha is the clean data at every time.
            assert x.item() == pytest.approx(1 / scheduler.process.alpha(scheduler._times[0]), rel=1e-9)


@pytest.mark.parametrize("shape", ["karras", "exponential", "beta"])
def test_custom_timesteps_and_sigmas(shape: str) -> None:
    theirs, ours = both("EulerDiscreteScheduler", {"timestep_spacing": "trailing"}, Euler())
    for request in (
        {"timesteps": [900, 500, 20]},
        {"sigmas": [14.6, 3.2, 0.4, 0.0]},
        {"sigmas": np.array([9.0, 1.0, 0.1])},
    ):
        theirs.set_timesteps(**request)
        ours.set_timesteps(**request)
        assert torch.allclose(ours.timesteps, theirs.timesteps, rtol=1e-6)
        assert torch.allclose(ours.sigmas, theirs.sigmas, rtol=1e-6)
    _, shaped = both("EulerDiscreteScheduler", {f"use_{shape}_sigmas": True}, Euler())
    with pytest.raises(ValueError, match=f"timesteps cannot be given with use_{shape}_sigmas"):
        shaped.set_timesteps(timesteps=[900, 500])
    for bad in ([1.0, 2.0], [], [1.0, float("nan")]):
        with pytest.raises(ValueError, match="sigmas must"):
            ours.set_timesteps(sigmas=bad)


def test_cosmos_gives_edm_positions_between_its_ends() -> None:
    theirs, ours = both("EDMEulerScheduler", {"sigma_min": 0.01}, Euler())
    theirs.set_timesteps(sigmas=torch.linspace(0, 1, 6, dtype=torch.float64))
    ours.set_timesteps(sigmas=torch.linspace(0, 1, 6, dtype=torch.float64))
    assert torch.allclose(ours.sigmas, theirs.sigmas, rtol=1e-6)
    ours.set_timesteps(sigmas=[80.0, 2.0, 0.1])
    assert ours.sigmas.tolist() == pytest.approx([80.0, 2.0, 0.1, 0.0])


@pytest.mark.parametrize("kind", ["exponential", "linear"])
def test_dynamic_shifting(kind: str) -> None:
    options: dict[str, Any] = {"use_dynamic_shifting": True, "time_shift_type": kind, "shift": 3.0}
    theirs, ours = both("FlowMatchEulerDiscreteScheduler", options, Euler())
    for sigmas in (None, [1.0, 0.7, 0.3]):
        count = {"num_inference_steps": 4} if sigmas is None else {"sigmas": sigmas}
        theirs.set_timesteps(mu=1.3, **count)
        ours.set_timesteps(mu=1.3, **count)
        assert torch.allclose(ours.timesteps, theirs.timesteps, rtol=1e-6)
    with pytest.raises(ValueError, match="mu is needed"):
        ours.set_timesteps(4)
    # Without dynamic shifting mu is not looked at, as in diffusers.
    theirs, ours = both("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}, Euler())
    theirs.set_timesteps(4, mu=1.3)
    ours.set_timesteps(4, mu=1.3)
    assert torch.allclose(ours.timesteps, theirs.timesteps, rtol=1e-6)


def test_flow_timesteps_may_say_something_else_than_the_levels() -> None:
    theirs, ours = both("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}, Euler())
    for request in ({"timesteps": [900.0, 500.0]}, {"timesteps": [900.0, 500.0], "sigmas": [0.8, 0.3]}):
        theirs.set_timesteps(**request)
        ours.set_timesteps(**request)
        assert torch.allclose(ours.timesteps, theirs.timesteps, rtol=1e-6)
        assert torch.allclose(ours.sigmas, theirs.sigmas, rtol=1e-6)
    ours.set_timesteps(num_inference_steps=2, sigmas=[0.8, 0.3])  # diffusers allows the number beside them
    with pytest.raises(ValueError, match="give one of num_inference_steps"):
        ours.set_timesteps(num_inference_steps=3, sigmas=[0.8, 0.3])


def test_consistency_models_keep_the_timesteps_they_were_distilled_at() -> None:
    theirs, ours = both("LCMScheduler", {}, DDIM())
    theirs.set_timesteps(4, original_inference_steps=40, strength=0.5)
    ours.set_timesteps(4, original_inference_steps=40, strength=0.5)
    assert torch.equal(ours.timesteps, theirs.timesteps)
    for strength in (1.0, 0.5, 0.25):
        for scheduler in (theirs, ours):
            scheduler.set_timesteps(timesteps=[999, 759, 499, 259], strength=strength)
        assert torch.equal(ours.timesteps, theirs.timesteps)
    with pytest.raises(ValueError, match="at most 50, the number of distilled ones"):
        ours.set_timesteps(51)
    with pytest.raises(ValueError, match="original_inference_steps and strength are for configurations of LCM"):
        PolyakScheduler(solver=DDIM()).set_timesteps(4, original_inference_steps=40)
