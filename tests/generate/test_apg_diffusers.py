"""APG in diffusers: as a guider, beside diffusers' own; and in pipelines that guide inside, with nothing of them changed."""

from __future__ import annotations

import copy
import types
from functools import cache
from typing import Any

import pytest
import torch
from diffusers_cases import SCALED, diffusers, rng
from generate_cases import stable_diffusion
from torch import Tensor, nn

from polyak.generate import APG, CFG, DDIM, Denoiser, DPMSolver, Euler, Heun, sample
from polyak.generate.adapters.diffusers import APGGuider, PolyakScheduler, guide

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning:diffusers", "ignore::FutureWarning"),
    pytest.mark.xdist_group("diffusers pipelines"),
]
SHAPE = (2, 4, 8, 8)
OPTIONS = {"norm_threshold": 3.0, "momentum": -0.5}
FLOW = {"shift": 3.0}
DIALECTS: list[tuple[str, dict[str, Any]]] = [
    ("DDIMScheduler", {"prediction_type": "epsilon", "clip_sample": False}),
    ("DDIMScheduler", {"prediction_type": "v_prediction", "clip_sample": False}),
    ("DDIMScheduler", {"prediction_type": "sample", "clip_sample": False}),
    ("EulerDiscreteScheduler", {**SCALED}),  # whose samples are scaled for the network
    ("FlowMatchEulerDiscreteScheduler", FLOW),
]
every_dialect = pytest.mark.parametrize(("name", "options"), DIALECTS, ids=str)


def ours(name: str, options: dict[str, Any], solver: Any = None) -> PolyakScheduler:
    theirs = getattr(diffusers, name)(**options)
    return PolyakScheduler.from_config(theirs.config, solver=solver or Euler())


class Network(nn.Module):
    """A network that is told its condition as a number; with tuple outputs, as pipelines ask for."""

    def forward(self, sample: Tensor, t: Any, condition: Any) -> tuple[Tensor]:
        turn = torch.as_tensor(condition, dtype=sample.dtype).reshape(-1, *[1] * (sample.ndim - 1))
        return (torch.tanh(0.7 * sample + turn * sample.flip(-1)) + 0.3 * turn,)


def guided_by(guider: Any, scheduler: Any, x: Tensor, steps: int, network: Any = None, **hand: bool) -> Tensor:
    """The loop of a modular pipeline."""
    network = network or Network()
    scheduler.set_timesteps(steps)
    for i, t in enumerate(scheduler.timesteps):
        scaled = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        guider.set_state(step=i, num_inference_steps=len(scheduler.timesteps), timestep=t)
        given = x[..., :4] if hand.get("packed") else x
        latents = {"latents": (given, given)} if hand.get("latents") else {}
        batches = guider.prepare_inputs({"condition": (0.8, -0.2), **latents})
        for batch in batches:
            guider.prepare_models(network)
            batch.noise_pred = network(scaled, t, batch.condition)[0]
            guider.cleanup_models(network)
        x = scheduler.step(guider(batches).pred, t, x, return_dict=False)[0]
    return x


def loop(scheduler: Any, x: Tensor, steps: int, network: nn.Module, *, both: bool = True, scale: float = 4.0) -> Tensor:
    """The loop of a pipeline that guides inside: both predictions in one batch, or one after the other."""
    scheduler.set_timesteps(steps)
    for t in scheduler.timesteps:
        if both:
            seen = scheduler.scale_model_input(torch.cat([x] * 2), t)
            u, c = network(seen, t, [-0.2] * len(x) + [0.8] * len(x))[0].chunk(2)
        else:
            seen = scheduler.scale_model_input(x, t)
            c, u = network(seen, t, 0.8)[0], network(seen, t, -0.2)[0]
        x = scheduler.step(u + scale * (c - u), t, x, return_dict=False)[0]
    return x


def reference(scheduler: PolyakScheduler, x: Tensor, guidance: Any, steps: int = 6) -> Tensor:
    """The same by our own sampling loop, on the scheduler's times."""
    scheduler.set_timesteps(steps)
    network, plan = Network(), scheduler._plan
    scales = dict(zip(scheduler._asked, scheduler._scales or [1.0] * len(scheduler._asked), strict=False))

    def asked(condition: float) -> Any:
        return lambda x, t: network(x * scales[t] if scheduler._scales else x, t, condition)[0]

    class Exactly(Denoiser):
        def _run(self, model: Any, x: Tensor, t: Any) -> Tensor:
            return model(x, float(t))

    denoiser = Exactly(asked(0.8), scheduler.process, plan.kind, unconditional=asked(-0.2), sigma_data=plan.sigma_data)
    return sample(denoiser, x, solver=scheduler.solver, grid=scheduler._times, guidance=guidance)


def start(dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(SHAPE, generator=rng(1), dtype=torch.float64).to(dtype)


# --- the guider, and diffusers' own

OWN: list[dict[str, Any]] = [
    {}, {"eta": 0.0}, {"eta": 0.3, "adaptive_projected_guidance_momentum": -0.75, "adaptive_projected_guidance_rescale": 2.5},
    {"use_original_formulation": True, "eta": 0.0, "adaptive_projected_guidance_momentum": -0.5},
    {"guidance_rescale": 0.7, "guidance_scale": 3.0}, {"start": 0.2, "stop": 0.7, "adaptive_projected_guidance_momentum": 0.5},
    {"guidance_scale": 1.0}, {"enabled": False}, {"adaptive_projected_guidance_rescale": 0.0, "eta": 0.0},
]  # fmt: skip


@pytest.mark.parametrize("options", OWN, ids=str)
def test_on_outputs_it_is_diffusers_own(options: dict[str, Any]) -> None:
    theirs = diffusers.AdaptiveProjectedGuidance(**options)
    mine = APGGuider.from_config(theirs.config, space="pred")
    x, network = start(), Network()
    for _ in range(2):  # a second image, with the same guiders
        want = guided_by(theirs, diffusers.DDIMScheduler(clip_sample=False), x, 5, network)
        got = guided_by(mine, diffusers.DDIMScheduler(clip_sample=False), x, 5, network)
        assert torch.allclose(got, want, rtol=1e-11, atol=1e-12)
    assert mine.num_conditions == theirs.num_conditions
    assert mine.is_conditional == theirs.is_conditional


def test_what_diffusers_guides_by_default_is_another_formula() -> None:
    """Its base is the prediction without the condition: at eta = 0 the condition's own shift along D_c is dropped."""
    c, u = start().unsqueeze(1).unbind()
    own, paper = (APGGuider(6.0, space="pred", base=base) for base in ("uncond", "cond"))
    theirs = diffusers.AdaptiveProjectedGuidance(6.0, eta=0.0, adaptive_projected_guidance_rescale=0.0)
    assert torch.allclose(own.forward(c, u).pred, theirs.forward(c, u).pred)
    missing = own.forward(c, u).pred - paper.forward(c, u).pred
    along = ((u - c) * c).sum() / (c * c).sum() * c
    assert torch.allclose(missing, along)  # and with eta = 1 nothing is
    one = [APGGuider(6.0, eta=1.0, space="pred", base=base).forward(c, u).pred for base in ("uncond", "cond")]
    assert torch.allclose(*one)


def test_half_precision_as_diffusers() -> None:
    c, u = (v.half() for v in start().unsqueeze(1).unbind())
    options = {"adaptive_projected_guidance_rescale": 2.0, "eta": 0.0}
    want = diffusers.AdaptiveProjectedGuidance(6.0, **options).forward(c, u).pred
    got = APGGuider(6.0, space="pred", use_original_formulation=False, **options).forward(c, u).pred
    assert got.dtype == torch.float16
    assert torch.allclose(got, want, atol=0.02)


def test_configuration(tmp_path: Any) -> None:
    guider = APGGuider(6.0, scheduler=ours(*DIALECTS[0]), **OPTIONS)
    again = guider.new(guidance_scale=3.0)
    assert again.guidance == APG(3.0, **OPTIONS)
    assert again.scheduler is guider.scheduler
    assert "scheduler" not in guider.config
    guider.save_pretrained(tmp_path)
    assert APGGuider.from_pretrained(tmp_path, scheduler=guider.scheduler).guidance == guider.guidance
    assert APGGuider.from_config(dict(guider.config), space="pred").guidance == APG(6.0, space="pred", **OPTIONS)
    with pytest.raises(ValueError, match="options that APGGuider does not know: perturbed"):
        APGGuider.from_config({"guidance_scale": 3.0, "perturbed": 1}, space="pred")
    twice = APGGuider(6.0, momentum=-0.5, adaptive_projected_guidance_momentum=-0.5, space="pred")  # but the same
    assert twice.guidance.momentum == -0.5
    _, unused = APGGuider.from_config({"perturbed": 1}, return_unused_kwargs=True, space="pred")
    assert unused == {"perturbed": 1}


@every_dialect
@pytest.mark.parametrize("latents", [False, True], ids=["seen", "given"])
def test_on_data_the_guider_is_our_own_loop(name: str, options: dict[str, Any], latents: bool) -> None:
    scheduler = ours(name, options)
    x = start() * float(scheduler.init_noise_sigma)
    guider = APGGuider(5.0, scheduler=scheduler, **OPTIONS)
    want = reference(ours(name, options), x, APG(5.0, **OPTIONS))
    for _ in range(2):
        assert torch.allclose(guided_by(guider, scheduler, x, 6, latents=latents), want, rtol=1e-8, atol=1e-9)
    if latents:  # of another shape than the prediction they are not the state
        made = guided_by(guider, scheduler, x, 6, latents=True, packed=True)
        assert torch.allclose(made, want, rtol=1e-8, atol=1e-9)


def test_a_run_of_one_step_begins_anew_each_time() -> None:
    scheduler = ours(*DIALECTS[0])
    guider = APGGuider(5.0, momentum=-0.5, scheduler=scheduler)
    assert torch.equal(*(guided_by(guider, scheduler, start(), 1) for _ in range(2)))


@pytest.mark.parametrize("counted", [0, 2], ids=["from 0", "on"])
def test_a_run_that_begins_on_the_way_begins_anew(counted: int) -> None:
    """As of image to image: some steps are left out, and pipelines count those that they take from 0, or go on counting."""
    scheduler, network, ends = ours(*DIALECTS[0]), Network(), []
    guider = APGGuider(5.0, scheduler=scheduler, **OPTIONS)
    for _ in range(2):
        scheduler.set_timesteps(6)
        scheduler.set_begin_index(2)
        x = start()
        for i, t in enumerate(scheduler.timesteps[2:]):
            guider.set_state(step=counted + i, num_inference_steps=6, timestep=t)
            batches = guider.prepare_inputs({"condition": (0.8, -0.2), "latents": (x, x)})
            for batch in batches:
                batch.noise_pred = network(x, t, batch.condition)[0]
            x = scheduler.step(guider(batches).pred, t, x, return_dict=False)[0]
        ends.append(x)
    assert torch.equal(*ends)
    fresh = APGGuider(5.0, scheduler=scheduler, **OPTIONS)
    assert torch.equal(*(guided_by(g, scheduler, start(), 6, latents=True) for g in (guider, fresh)))


@pytest.mark.parametrize("space", ["x0", "pred"])
def test_all_evaluations_of_a_heun_step_see_one_memory(space: str) -> None:
    scheduler = ours("FlowMatchEulerDiscreteScheduler", FLOW, Heun())
    want = reference(ours("FlowMatchEulerDiscreteScheduler", FLOW, Heun()), start(), APG(5.0, space=space, **OPTIONS))
    guider = APGGuider(5.0, scheduler=scheduler, space=space, **OPTIONS)
    assert torch.allclose(guided_by(guider, scheduler, start(), 6), want, rtol=1e-8, atol=1e-9)


def test_the_guider_refuses() -> None:
    scheduler = ours(*DIALECTS[0])
    for options, message in (
        ({}, 'space="x0" needs scheduler=pipe.scheduler'),
        ({"space": "pred", "momentum": 1.0}, r"momentum must be in \(-1, 1\)"),
        ({"space": "pred", "momentum": 0.1, "adaptive_projected_guidance_momentum": 0.2}, "momentum is given twice"),
        ({"space": "pred", "start": 0.7, "stop": 0.3}, "stop"),
        ({"space": "pred", "adaptive_projected_guidance_norm_dim": 1}, "norm_dim must be one of None"),
    ):
        with pytest.raises(ValueError, match=message):
            APGGuider(6.0, **options)  # type: ignore[arg-type]
    guider = APGGuider(6.0, scheduler=scheduler)
    c, u = start().unsqueeze(1).unbind()
    with pytest.raises(ValueError, match="APG needs both predictions; use guidance_scale=1 for none"):
        guider.forward(c)
    scheduler.set_timesteps(4)
    guider.set_state(0, 4, scheduler.timesteps[0])
    with pytest.raises(ValueError, match="needs the latents"):
        guider.forward(c, u)
    with pytest.raises(ValueError, match="is not one of the timesteps"):  # another scheduler than the pipeline's
        guided_by(guider, ours(*DIALECTS[0]), start(), 7)
    guider.scheduler = scheduler
    scheduler.set_timesteps(4)
    guided_by(guider, ours(*DIALECTS[0]), start(), 4)  # on the same timesteps it is as good
    guider.set_state(0, 4, scheduler.timesteps[0])
    with pytest.raises(ValueError, match="needs the latents"):  # what the network saw in a step before is not the state
        guider.forward(c, u)
    scheduler._begin(scheduler.timesteps[0])
    with pytest.raises(ValueError, match="give the guider the scheduler that the pipeline has"):
        guided_by(guider, ours(*DIALECTS[0]), start(), 4)


def test_a_modular_pipeline() -> None:
    """Stable Diffusion XL's own loop, unmodified, with Euler's scaled samples."""
    from diffusers.modular_pipelines.stable_diffusion_xl.denoise import StableDiffusionXLDenoiseStep

    class UNet(Network):
        config = types.SimpleNamespace(in_channels=4, time_cond_proj_dim=None)

        def forward(self, sample: Tensor, t: Any, encoder_hidden_states: Tensor, **others: Any) -> Any:
            return super().forward(sample, t, encoder_hidden_states.mean())

    name, options = DIALECTS[3]
    scheduler = ours(name, options)
    pipe = StableDiffusionXLDenoiseStep().init_pipeline()
    pipe.set_progress_bar_config(disable=True)
    pipe.update_components(unet=UNet(), scheduler=scheduler)
    pipe.update_components(guider=APGGuider(5.0, scheduler=pipe.scheduler, **OPTIONS))
    scheduler.set_timesteps(6)
    x = start() * float(scheduler.init_noise_sigma)
    embeds = {"prompt_embeds": torch.full((2, 3), 0.8), "negative_prompt_embeds": torch.full((2, 3), -0.2)}
    others = ("add_time_ids", "negative_add_time_ids", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
    given = embeds | dict.fromkeys(others, torch.zeros(2, 1))
    made = pipe(latents=x, timesteps=scheduler.timesteps, num_inference_steps=6, denoiser_input_fields=given)
    want = reference(ours(name, options), x, APG(5.0, **OPTIONS))
    assert torch.allclose(made.latents, want, rtol=1e-6, atol=1e-6)  # 0.8 is a single-precision number there


# --- pipelines that guide inside


def holder(scheduler: Any) -> Any:
    return types.SimpleNamespace(scheduler=scheduler, unet=Network())


@every_dialect
@pytest.mark.parametrize("both", [True, False], ids=["one batch", "two calls"])
def test_a_pipelines_loop_is_our_own(name: str, options: dict[str, Any], both: bool) -> None:
    scheduler = ours(name, options)
    pipe, x = holder(scheduler), start() * float(scheduler.init_noise_sigma)
    want = reference(ours(name, options), x, APG(5.0, **OPTIONS))
    plain = loop(scheduler, x, 6, pipe.unet, both=both)
    with guide(pipe, APG(5.0, **OPTIONS)):
        for scale in (4.0, 1.5):  # the pipeline's own scale has no effect
            got = loop(scheduler, x, 6, pipe.unet, both=both, scale=scale)
            assert torch.equal(got, want) or torch.allclose(got, want, rtol=1e-9, atol=1e-10)
    assert torch.equal(loop(scheduler, x, 6, pipe.unet, both=both), plain)  # and is as it was
    with guide(pipe, CFG(4.0)):
        assert torch.allclose(loop(scheduler, x, 6, pipe.unet, both=both), plain, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("solver", [Heun(), DPMSolver(order=2, form="data", method="multistep"), DDIM()], ids=repr)
def test_solvers(solver: Any) -> None:
    name, options = DIALECTS[0]
    pipe = holder(ours(name, options, solver))
    guidance = APG(5.0, start=0.2, stop=0.8, **OPTIONS)
    guide(pipe, guidance)
    want = reference(ours(name, options, solver), start(), guidance)
    assert torch.equal(loop(pipe.scheduler, start(), 6, pipe.unet), want)
    pipe.scheduler = ours(name, options, Euler())  # another scheduler later on is guided, too
    other = reference(ours(name, options, Euler()), start(), guidance)
    assert torch.equal(loop(pipe.scheduler, start(), 6, pipe.unet), other)


def test_corrected_data_are_the_guided_ones() -> None:
    options = {"clip_sample": True, "clip_sample_range": 0.5}
    pipe = holder(ours("DDIMScheduler", options, DDIM()))
    guide(pipe, APG(5.0))
    pipe.scheduler.set_timesteps(1)
    t, x = pipe.scheduler.timesteps[0], start()
    u, c = pipe.unet(torch.cat([x] * 2), t, [-0.2] * 2 + [0.8] * 2)[0].chunk(2)
    step = pipe.scheduler.step(u + 4 * (c - u), t, x)
    scheduler = ours("DDIMScheduler", {"clip_sample": False})
    scheduler.set_timesteps(1)
    guided = APG(5.0)(*(scheduler.read(p, x, scheduler._asked[0]) for p in (c, u))).x0
    assert torch.allclose(step.prev_sample, guided.clamp(-0.5, 0.5), rtol=1e-6, atol=1e-6)


def test_a_copy_within_a_run_goes_on_alike() -> None:
    pipe = holder(ours(*DIALECTS[0]))
    guide(pipe, APG(5.0, **OPTIONS))
    x = start()
    pipe.scheduler.set_timesteps(6)

    def steps(x: Tensor, which: Any) -> Tensor:
        for t in which:
            u, c = pipe.unet(torch.cat([x] * 2), t, [-0.2] * 2 + [0.8] * 2)[0].chunk(2)
            x = pipe.scheduler.step(u + 4 * (c - u), t, x, return_dict=False)[0]
        return x

    half, original = steps(x, pipe.scheduler.timesteps[:3]), pipe.scheduler
    for duplicate in (copy.copy, copy.deepcopy):
        pipe.scheduler = duplicate(original)
        ends = steps(half, original.timesteps[3:])
        pipe.scheduler = duplicate(original)
        assert torch.equal(steps(half, original.timesteps[3:]), ends)
    pipe.scheduler = original
    assert torch.equal(ends, loop(original, x, 6, pipe.unet))


@cache
def embeds() -> dict[str, Tensor]:
    return {
        k: torch.randn(1, 8, 8, generator=rng(i)) for i, k in enumerate(("prompt_embeds", "negative_prompt_embeds"))
    }


def test_stable_diffusion() -> None:
    pipe = stable_diffusion()
    run: dict[str, Any] = dict(embeds(), height=16, width=16, num_inference_steps=4, output_type="latent")

    def made(**options: Any) -> Tensor:
        return pipe(**{**run, "guidance_scale": 4.0, "generator": rng(3), **options}).images

    pipe.scheduler = PolyakScheduler.from_config(pipe.scheduler.config, solver=DDIM())
    plain = made()
    with guide(pipe, CFG(4.0)):
        assert torch.allclose(made(guidance_scale=9.0), plain, rtol=1e-4, atol=1e-4)
    with guide(pipe, APG(12.0, norm_threshold=0.5, momentum=-0.5)):
        guided = made()
        assert (guided - plain).abs().max() > 1e-2
        assert torch.equal(made(), guided)
        with pytest.raises(ValueError, match="needs both predictions, and the pipeline asks for one"):
            made(guidance_scale=1.0)
        with pytest.raises(ValueError, match="makes more of its two predictions"):
            made(guidance_rescale=0.7)
        pipe.scheduler = diffusers.DDIMScheduler.from_config(pipe.scheduler.config)
        with pytest.raises(ValueError, match="needs a PolyakScheduler, got DDIMScheduler"):
            made()
    assert torch.allclose(made(), plain, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="networks must name a module of the pipeline, got vq"):
        guide(pipe, APG(), networks=["vq"])


def test_the_order_of_the_two_is_found_and_other_pipelines_are_refused() -> None:
    x, pipe = start(), holder(ours(*DIALECTS[0]))
    want = reference(ours(*DIALECTS[0]), x, APG(5.0))
    guide(pipe, APG(5.0))

    def run(conditions: list[float], combine: Any) -> Tensor:
        pipe.scheduler.set_timesteps(6)
        y = x
        for t in pipe.scheduler.timesteps:
            parts = pipe.unet(torch.cat([y] * len(conditions)), t, [v for v in conditions for _ in range(2)])[0]
            y = pipe.scheduler.step(combine(*parts.chunk(len(conditions))), t, y, return_dict=False)[0]
        return y

    assert torch.equal(run([0.8, -0.2], lambda c, u: u + 4 * (c - u)), want)
    pipe.scheduler.set_timesteps(6)  # where the first two are equal, the next ones are looked at
    for t, (first, second) in zip(pipe.scheduler.timesteps[:2], ((0.5, 0.5), (0.8, -0.2)), strict=True):
        c, u = pipe.unet(torch.cat([x] * 2), t, [first] * 2 + [second] * 2)[0].chunk(2)
        step = pipe.scheduler.step(u + 4 * (c - u), t, x)
    assert pipe.scheduler._hearing.swapped
    read = [pipe.scheduler.read(p, x, pipe.scheduler._asked[1]) for p in (c, u)]
    assert torch.allclose(step.pred_original_sample, APG(5.0)(*read).x0)
    with pytest.raises(ValueError, match="does not ask for a prediction with and one without"):
        run([0.8, -0.2, 0.0], lambda c, u, v: u + 4 * (c - u))
    for other in (lambda c, u: (u + 4 * (c - u)).tanh(), lambda c, u: -(u + 4 * (c - u))):
        with pytest.raises(ValueError, match="makes more of its two predictions"):
            run([0.8, -0.2], other)
    pipe.scheduler.set_timesteps(6)
    with pytest.raises(ValueError, match=r"the network said \[\]"):
        pipe.scheduler.step(x, pipe.scheduler.timesteps[0], x)
