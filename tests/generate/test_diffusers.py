"""The scheduler gives what the sampling loop gives, agrees with diffusers' own, and drives real pipelines."""

from __future__ import annotations

import importlib
import sys
from typing import Any

import pytest
import torch
from generate_cases import BETAS, exact, noise, stable_diffusion

from polyak.generate import DDIM, EDM, RK4, VP, Denoiser, Discrete, DPMSolver, Euler, Flow, Heun, Process, sample
from polyak.generate.sampling import DynamicThresholding

diffusers = pytest.importorskip("diffusers")

from polyak.generate.adapters.diffusers import PolyakScheduler, as_diffusers  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:diffusers")

TWO_M = DPMSolver(order=2, form="data", method="multistep")
SOLVERS = [
    DDIM(),
    DDIM(0.5),
    Euler(),
    Heun(),
    RK4(),
    DPMSolver(),
    DPMSolver(order=2, kind="taylor"),
    DPMSolver(form="data", method="singlestep"),
    TWO_M,
    DPMSolver(order=3, method="multistep", start="singlestep"),
    DPMSolver(order=3, form="data", method="multistep", sde=True),
    DPMSolver(order=2, method="fast", denoise_to_zero=True),
]


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def network(x: torch.Tensor, t: Any) -> torch.Tensor:
    """Stands for a model that was trained on labels 0 .. 999."""
    label = torch.as_tensor(t, dtype=torch.float64).reshape(-1, *[1] * (x.ndim - 1)).to(x.dtype)
    return torch.tanh(0.7 * x + 0.001 * label)


def push(scheduler: Any, n: int, x: torch.Tensor, model: Any = network, **kwargs: Any) -> torch.Tensor:
    """The loop of every diffusers pipeline."""
    scheduler.set_timesteps(n)
    for t in scheduler.timesteps:
        x = scheduler.step(model(x, t), t, x, **kwargs).prev_sample
    return x


# --- the same numbers as our own loop


@pytest.mark.parametrize("solver", SOLVERS, ids=repr)
@pytest.mark.parametrize("process", [VP(), EDM(), Discrete(BETAS)], ids=repr)
def test_push_and_pull_agree_bit_for_bit(process: Process, solver: Any) -> None:
    x = process.prior((4, 2), generator=rng(), dtype=torch.float64)
    denoiser = Denoiser(lambda x, t: torch.tanh(x), process, "sample")
    want, info = sample(denoiser, x, solver=solver, steps=9, generator=rng(1), return_info=True)
    scheduler = as_diffusers(solver, process, "sample", grid=solver.grid)
    scheduler.set_timesteps(9)
    got = x
    for t in scheduler.timesteps:
        # EDM scales what an eps model sees; this one is told x0 and wants x itself
        got = scheduler.step(
            torch.tanh(got), t, got, generator=rng(1) if t == scheduler.timesteps[0] else None
        ).prev_sample
    assert torch.equal(got, want)
    assert len(scheduler.timesteps) == info.nfe
    with pytest.raises(ValueError, match="the run is complete"):
        scheduler.step(got, 0, got)


@pytest.mark.parametrize("solver", [DDIM(), TWO_M, DPMSolver()], ids=repr)
def test_half_precision_keeps_its_state_in_float32(solver: Any) -> None:
    x = noise(4, 2).bfloat16()
    denoiser = Denoiser(lambda x, t: torch.tanh(x), Discrete(BETAS), "sample")
    want = sample(denoiser, x, solver=solver, steps=12)
    scheduler = as_diffusers(solver, Discrete(BETAS), "sample", grid=solver.grid)
    assert torch.equal(push(scheduler, 12, x, lambda x, t: torch.tanh(x)), want)
    assert want.dtype == torch.bfloat16


def test_a_sample_changed_between_steps_is_gone_on_from() -> None:
    # As inpainting does it: the solver must not hold on to its own idea of x.
    process = Discrete(BETAS)
    scheduler = as_diffusers(DDIM(), process, "sample")
    scheduler.set_timesteps(3)
    x = noise(3, 2)
    x = scheduler.step(torch.zeros_like(x), scheduler.timesteps[0], x).prev_sample
    changed = torch.ones_like(x)
    out = scheduler.step(torch.zeros_like(x), scheduler.timesteps[1], changed)
    assert not torch.allclose(changed, x)
    s, t = scheduler._times[1:3]
    assert torch.allclose(out.prev_sample, changed * (process.sigma(t) / process.sigma(s)))
    assert torch.equal(out.pred_original_sample, torch.zeros_like(x))


# --- agreement with diffusers' own schedulers


@pytest.mark.parametrize("spacing", ["linspace", "leading", "trailing"])
@pytest.mark.parametrize("final", ["zero", "sigma_min"])
@pytest.mark.parametrize(("kind", "theirs"), [("midpoint", "midpoint"), ("taylor", "heun")])
@pytest.mark.parametrize("order", [1, 2, 3])
def test_multistep_agrees_with_diffusers(order: int, kind: Any, theirs: str, final: str, spacing: str) -> None:
    their = diffusers.DPMSolverMultistepScheduler(
        solver_order=order, solver_type=theirs, final_sigmas_type=final, timestep_spacing=spacing
    )
    solver = DPMSolver(order=order, form="data", method="multistep", kind=kind, lower_order_final=15, parity="official")
    ours = PolyakScheduler.from_config(their.config, solver=solver)
    x = torch.randn(2, 3, 4, 4, generator=rng())
    for n in (5, 20):
        want, got = push(their, n, x), push(ours, n, x)
        assert torch.equal(their.timesteps, ours.timesteps)
        # Their betas and coefficients are float32: 20 steps of rounding, relative to the largest values on the way.
        assert (want - got).abs().max() < 1e-5 * want.abs().max()


@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
def test_prediction_types_and_scaled_schedules_agree(prediction: str) -> None:
    config: dict[str, Any] = {
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "prediction_type": prediction,
        "steps_offset": 1,
        "timestep_spacing": "leading",
    }
    their = diffusers.DPMSolverMultistepScheduler(**config)
    solver = DPMSolver(order=2, form="data", method="multistep", lower_order_final=15)
    ours = PolyakScheduler.from_config(their.config, solver=solver)
    x = torch.randn(2, 3, 4, 4, generator=rng())
    want, got = push(their, 12, x), push(ours, 12, x)
    assert (want - got).abs().max() < 1e-5 * want.abs().max().clamp(min=1)


@pytest.mark.parametrize("schedule", ["linear", "scaled_linear", "squaredcos_cap_v2"])
def test_the_chain_is_diffusers_chain(schedule: str) -> None:
    their = diffusers.DDPMScheduler(beta_schedule=schedule)
    ours = PolyakScheduler.from_config(their.config, solver=DDIM())
    t = torch.arange(1, 1001, dtype=torch.float64) / 1000
    assert torch.allclose(ours.process.alpha(t) ** 2, their.alphas_cumprod.double(), rtol=1e-4, atol=1e-9)
    x0, z = torch.randn(2, 3, 4, generator=rng())[:, None].expand(2, 4, 3, 4)
    steps = torch.tensor([0, 10, 500, 999])
    assert torch.allclose(ours.add_noise(x0, z, steps), their.add_noise(x0, z, steps), rtol=1e-4, atol=1e-5)


def test_sde_agrees_with_diffusers_for_given_noise() -> None:
    their = diffusers.DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++", solver_order=2)
    solver = DPMSolver(order=2, form="data", method="multistep", sde=True, lower_order_final=15)
    ours = PolyakScheduler.from_config(their.config, solver=solver)
    x = torch.randn(2, 3, 4, 4, generator=rng())
    g, h = rng(1), rng(1)
    want, got = push(their, 12, x, generator=g), push(ours, 12, x, generator=h)
    assert (want - got).abs().max() < 1e-5 * want.abs().max()


def test_flow_matching_pipelines() -> None:
    their = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    ours = PolyakScheduler.from_config(their.config, solver=Euler())
    x = torch.randn(2, 3, 4, 4, generator=rng())
    assert torch.allclose(push(their, 7, x), push(ours, 7, x), atol=1e-5)
    assert torch.allclose(their.timesteps, ours.timesteps, rtol=1e-6)
    sigmas = [1.0, 0.6, 0.2]
    their.set_timesteps(sigmas=sigmas)
    ours.set_timesteps(sigmas=sigmas)
    assert torch.allclose(their.timesteps, ours.timesteps, rtol=1e-6)
    dynamic = PolyakScheduler.from_config(their.config, solver=TWO_M, use_dynamic_shifting=True)
    with pytest.raises(ValueError, match="mu is needed"):
        dynamic.set_timesteps(4)
    dynamic.set_timesteps(4, mu=0.5)
    assert dynamic.timesteps[0] == 1000
    assert isinstance(dynamic.process, Flow)


def test_edm_scales_its_input_as_diffusers_does() -> None:
    their = diffusers.EDMEulerScheduler()
    ours = as_diffusers(Euler(), EDM(), "edm", grid="karras")
    their.set_timesteps(5)
    ours.set_timesteps(timesteps=their.timesteps.tolist())
    assert torch.allclose(their.timesteps, ours.timesteps, atol=1e-6)
    x = 80 * torch.randn(2, 3, 4, 4, generator=rng())
    a, b = x, x
    for t in ours.timesteps:
        ia, ib = their.scale_model_input(a, t), ours.scale_model_input(b, t)
        assert torch.allclose(ia, ib, rtol=1e-4, atol=1e-5)
        a, b = their.step(torch.tanh(ia), t, a).prev_sample, ours.step(torch.tanh(ib), t, b).prev_sample
    assert torch.allclose(a, b, rtol=1e-4, atol=1e-4)
    assert ours.init_noise_sigma == 80


# --- pipelines


def unet() -> Any:
    torch.manual_seed(0)
    return diffusers.UNet2DModel(
        sample_size=8,
        block_out_channels=(8, 8),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
    ).eval()


@pytest.mark.parametrize("kind", ["DDPMPipeline", "DDIMPipeline"])
@pytest.mark.parametrize("solver", [TWO_M, DPMSolver(), Heun(), DDIM(1.0)], ids=repr)
def test_in_an_unconditional_pipeline(solver: Any, kind: str) -> None:
    pipe = getattr(diffusers, kind)(unet(), diffusers.DDPMScheduler(clip_sample=False))
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = PolyakScheduler.from_config(pipe.scheduler.config, solver=solver)
    kwargs = {"batch_size": 2, "num_inference_steps": 5, "output_type": "np"}
    images = pipe(generator=rng(), **kwargs).images
    assert images.shape == (2, 8, 8, 3)
    # the same by our own loop
    g = rng()
    x = torch.randn(2, 3, 8, 8, generator=g)
    denoiser = Denoiser(lambda x, t: pipe.unet(x, t).sample, pipe.scheduler.process)
    times = pipe.scheduler._times
    reached = len(times) if solver.reaches_zero else -1  # else the last step is of first order, onto the predicted data
    ours = sample(denoiser, x, solver=solver, grid=times[:reached], generator=g)
    if not solver.reaches_zero:
        ours = denoiser(ours, times[-2]).x0.detach()
    want = (ours / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()
    assert abs(images - want).max() < 1e-4


def test_noise_is_the_solvers_own() -> None:
    pipe = diffusers.DDIMPipeline(unet(), diffusers.DDPMScheduler())
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = PolyakScheduler.from_config(pipe.scheduler.config, solver=DDIM())
    with pytest.raises(ValueError, match=r"eta must be 0, got 0\.5: noise is the solver's own"):
        pipe(num_inference_steps=2, eta=0.5)


SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}


def prompt(seed: int = 0) -> dict[str, torch.Tensor]:
    g = rng(seed)
    return {k: torch.randn(1, 8, 8, generator=g) for k in ("prompt_embeds", "negative_prompt_embeds")}


def test_in_stable_diffusion_it_draws_diffusers_own_picture() -> None:
    pipe = stable_diffusion(diffusers.DPMSolverMultistepScheduler(**SD))
    latents = torch.randn(1, 4, 8, 8, generator=rng())
    kwargs: dict[str, Any] = {
        **prompt(), "latents": latents, "num_inference_steps": 6, "guidance_scale": 5.0, "output_type": "latent"
    }  # fmt: skip
    want = pipe(**kwargs).images
    solver = DPMSolver(order=2, form="data", method="multistep", lower_order_final=15)
    pipe.scheduler = PolyakScheduler.from_config(pipe.scheduler.config, solver=solver)
    assert (pipe(**kwargs).images - want).abs().max() < 1e-4 * want.abs().max()
    again = pipe(**kwargs).images  # a scheduler serves any number of runs
    assert torch.equal(again, pipe(**kwargs).images)
    for other in (DPMSolver(), Heun(), DDIM(1.0)):
        pipe.scheduler = PolyakScheduler.from_config(pipe.scheduler.config, solver=other)
        assert bool(pipe(**kwargs).images.isfinite().all())


def test_image_to_image_starts_in_the_middle() -> None:
    solver = DPMSolver(order=2, form="data", method="multistep", lower_order_final=15)
    image = torch.rand(1, 3, 16, 16, generator=rng())
    pictures = []
    for scheduler in (
        diffusers.DPMSolverMultistepScheduler(**SD),
        PolyakScheduler(solver=solver, **SD),
        PolyakScheduler(solver=Heun(), **SD),
    ):
        pipe = stable_diffusion(scheduler, image_to_image=True)
        kwargs: dict[str, Any] = {**prompt(), "image": image, "strength": 0.5, "num_inference_steps": 8}
        pictures.append(pipe(**kwargs, generator=rng(), output_type="latent").images)
    want, got, heun = pictures
    assert (got - want).abs().max() < 1e-4 * want.abs().max()
    assert bool(heun.isfinite().all())


# --- the plan


def test_more_steps_than_integers_and_a_start_by_value() -> None:
    # diffusers issue 12771: rounded timesteps collide
    scheduler = PolyakScheduler(solver=TWO_M, num_train_timesteps=10)
    scheduler.set_timesteps(17)
    assert len(scheduler.timesteps) == 17
    assert bool((torch.diff(scheduler.timesteps) < 0).all())
    x = noise(2, 2)
    for t in scheduler.timesteps[5:]:
        x = scheduler.step(network(x, t), t, x).prev_sample
    assert scheduler.step_index == 17
    assert bool(x.isfinite().all())


@pytest.mark.parametrize("n", range(1, 13))
@pytest.mark.parametrize("final", ["sigma_min", None])
def test_no_step_count_yields_nan_or_leftover_noise(n: int, final: str | None) -> None:
    # diffusers issues 9007 and 5689: singlestep order 3 onto sigma = 0, and a last sigma that is not 0
    for solver in (DPMSolver(), DPMSolver(order=2, form="data"), DDIM(), *([TWO_M] if n > 1 else [])):
        # without options the timesteps are those of the chain, and the end is clean data where the solver can reach it
        scheduler = PolyakScheduler(solver=solver, prediction_type="sample", final_sigmas_type=final)
        x = push(scheduler, n, noise(4, 2), lambda x, t: torch.zeros_like(x))
        if solver.reaches_zero and final is None:
            assert torch.equal(x, torch.zeros_like(x))
        elif solver.reaches_zero:  # these are exact for x0 = 0: the noise shrinks with sigma
            process = scheduler.process
            ratio = process.sigma(process.t_min) / process.sigma(scheduler._times[0])
            assert torch.allclose(x, noise(4, 2) * ratio)
        assert bool(x.isfinite().all())


def test_grids_between_the_integers() -> None:
    for kind in ("logsnr", "karras"):
        scheduler = PolyakScheduler(solver=TWO_M, grid=kind)
        scheduler.set_timesteps(6)
        process = scheduler.process
        assert scheduler._times == process.grid(6, kind).tolist()
        want = [process.label(t) for t in process.grid(6, kind)[:-1].tolist()]
        assert scheduler.timesteps.tolist() == pytest.approx(want, rel=1e-5)
    assert scheduler.timesteps.dtype == torch.float32
    assert PolyakScheduler(solver=TWO_M).timesteps.dtype == torch.int64


def test_learned_variances_and_thresholding() -> None:
    x = noise(2, 3)
    plain, learned = (PolyakScheduler(solver=TWO_M, variance_type=v) for v in (None, "learned_range"))
    want = push(plain, 5, x)
    got = push(learned, 5, x, lambda x, t: torch.cat([network(x, t), 9 * torch.ones_like(x)], 1))
    assert torch.equal(got, want)
    process = Discrete(BETAS)
    thresholded = as_diffusers(TWO_M, process, "sample", thresholding=True, grid="logsnr")
    model = Denoiser(lambda x, t: 3 * x, process, "sample")
    want = sample(model, x, solver=TWO_M, nfe=5, grid="logsnr", corrector=DynamicThresholding())
    assert torch.equal(push(thresholded, 5, x, lambda x, t: 3 * x), want)


def test_saving_and_loading(tmp_path: Any) -> None:
    solver = DPMSolver(order=2, form="data", method="multistep", lower_order_final=15)
    for scheduler in (PolyakScheduler(solver=solver, **SD), as_diffusers(solver, EDM(sigma_max=50.0), "edm")):
        scheduler.save_pretrained(tmp_path)
        again = PolyakScheduler.from_pretrained(tmp_path)
        assert again.solver == solver
        assert again.process == scheduler.process or isinstance(again.process, Discrete)
        scheduler.set_timesteps(5)
        again.set_timesteps(5)
        assert torch.equal(again.timesteps, scheduler.timesteps)
    betas = torch.linspace(0.01, 0.2, 20)
    scheduler = as_diffusers(DDIM(0.5), Discrete(betas))
    again = PolyakScheduler.from_config(scheduler.config)
    t = torch.arange(1, 21, dtype=torch.float64) / 20
    assert torch.allclose(again.process.alpha(t), scheduler.process.alpha(t))
    assert len(again) == 20
    # and back to one of theirs
    assert diffusers.DDIMScheduler.from_config(PolyakScheduler(solver=solver, **SD).config).config.beta_start == 0.00085


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, r"solver is needed: PolyakScheduler.from_config\(config, solver=DPMSolver"),
        ({"solver": DPMSolver(method="adaptive")}, "an adaptive one has none|needs the timesteps beforehand"),
        ({"solver": {"part": "process:VP"}}, "no Solver is called 'process:VP'"),
        ({"solver": DDIM(), "prediction_type": "noise"}, "prediction_type must be one of"),
        ({"solver": DDIM(), "beta_schedule": "cosine"}, "beta_schedule must be one of"),
        ({"solver": DPMSolver(), "thresholding": True}, "thresholding cannot be used"),
        ({"solver": DDIM(), "timestep_spacing": "even"}, "timestep_spacing must be one of"),
    ],
)
def test_bad_options_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PolyakScheduler(**options)


def test_the_name_of_a_solver_is_none() -> None:
    with pytest.raises(TypeError, match=r"solver must be a Solver .*, got 'DDIM'"):
        PolyakScheduler(solver="DDIM")  # type: ignore[arg-type]


def test_steps_need_a_plan() -> None:
    scheduler, x = PolyakScheduler(solver=TWO_M), noise(2, 2)
    with pytest.raises(ValueError, match="call set_timesteps before the first step"):
        scheduler.step(x, 999, x)
    with pytest.raises(ValueError, match="give one of num_inference_steps, timesteps and sigmas"):
        scheduler.set_timesteps()


# --- imports


def test_a_missing_diffusers_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "polyak.generate.adapters.diffusers"
    loaded = sys.modules[name]
    for module in [m for m in sys.modules if m == "diffusers" or m.startswith("diffusers.")]:
        monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.delitem(sys.modules, name)
    with pytest.raises(ImportError, match=r"pip install 'polyak\[diffusers\]'"):
        importlib.import_module(name)
    monkeypatch.setitem(sys.modules, name, loaded)


def test_exact_denoisers_take_the_same_road() -> None:
    process = Discrete(BETAS)
    denoiser, scheduler = exact(process), as_diffusers(TWO_M, process, "sample", grid="logsnr")
    scheduler.set_timesteps(8)
    x = noise(5)
    want = sample(denoiser, x, solver=TWO_M, nfe=8)
    for time, t in zip(scheduler._asked, scheduler.timesteps, strict=True):
        x = scheduler.step(denoiser(x, time).x0, t, x).prev_sample
    assert torch.equal(x, want)
