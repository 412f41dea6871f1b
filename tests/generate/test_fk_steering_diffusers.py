"""Steering in real diffusers pipelines with random weights: what moves, what is refused, and that it is sample's own loop."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from diffusers_cases import diffusers, rng
from generate_cases import stable_diffusion
from torch import Tensor

from polyak.generate import CFG, DDIM, DPMSolverSDE, FKSteering
from polyak.generate.adapters.diffusers import FlowSDEScheduler, PolyakScheduler, fk_callback, guide

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning:diffusers", "ignore::FutureWarning"),
    pytest.mark.xdist_group("diffusers pipelines"),
]
K = 3
DEFAULT = {"steps_offset": 1, "clip_sample": False}


def bright(samples: Tensor) -> Tensor:
    return samples.flatten(2).mean(2)


def prompts(batch: int) -> dict[str, Tensor]:
    return {
        name: torch.randn(batch, 8, 8, generator=rng(i)) for i, name in enumerate(("prompt_embeds", "negative_prompt_embeds"))
    }  # fmt: skip


@cache
def unet() -> Any:
    torch.manual_seed(0)
    return diffusers.UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4,
        down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2,
    )  # fmt: skip


def steering(**options: Any) -> FKSteering:
    given = dict(lam=30.0, num_particles=K, schedule=[2, 4], generator=rng(5))
    return FKSteering(bright, **{**given, **options})


def draw(pipe: Any, batch: int = 2, callback: Any = None, **options: Any) -> Tensor:
    given = {"height": 16, "width": 16, "num_inference_steps": 8, "output_type": "latent", "generator": rng(3)}
    if callback is not None:
        given["callback_on_step_end"] = callback
    return pipe(**prompts(batch), num_images_per_prompt=K, **{**given, **options}).images


STOCHASTIC: dict[str, Any] = {
    "DDIM": (lambda: diffusers.DDIMScheduler(**DEFAULT), {"eta": 1.0}),
    "DDPM": (lambda: diffusers.DDPMScheduler(clip_sample=False), {}),
    "Euler ancestral": (diffusers.EulerAncestralDiscreteScheduler, {}),
    "LCM": (diffusers.LCMScheduler, {}),
    "SDE-DPM++ 2M": (lambda: diffusers.DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++"), {}),
    "polyak DDIM": (lambda: PolyakScheduler(solver=DDIM(eta=1.0), num_train_timesteps=1000), {}),
    "polyak SDE": (lambda: PolyakScheduler(solver=DPMSolverSDE(order=2), num_train_timesteps=1000), {}),
}


@pytest.mark.parametrize("name", STOCHASTIC)
def test_a_pipeline_is_steered_towards_the_reward(name: str) -> None:
    make, options = STOCHASTIC[name]
    pipe = stable_diffusion(make())
    plain = draw(pipe, **options)
    # Without a tilt the same images come out, and more than one run may be made.
    with fk_callback(pipe, steering(lam=0.0)) as callback:
        for _ in range(2 if name == "DDIM" else 1):
            assert torch.equal(draw(pipe, callback=callback, **options), plain)
    with fk_callback(pipe, steering(lam=1e7)) as callback:
        steered = draw(pipe, callback=callback, **options)
        assert steered.shape == plain.shape
        means = steered.flatten(1).mean(1).view(2, K)
        assert torch.allclose(callback.state.reward, means.double(), atol=1e-6 * float(steered.abs().max()))
        best = callback.select(steered)
        assert torch.equal(best.flatten(1).mean(1), means.amax(1))
        # With this tilt each weighing leaves but the best of each prompt.
        assert not means.diff(dim=1).any()
        assert best.mean() > plain.mean()
        assert len(callback.select(list(range(2 * K)))) == 2
    assert "step" not in vars(pipe.scheduler)


@pytest.mark.parametrize("name", ["SDE-DPM++ 2M", "polyak SDE"])
def test_what_a_scheduler_remembers_moves(name: str, monkeypatch: Any) -> None:
    """One particle of each prompt takes over: the run that goes on is that of its copies, with their rows' noise."""
    make, _ = STOCHASTIC[name]
    pipe = stable_diffusion(make())
    generators: Any = [rng(i) for i in range(2 * K)]
    latents: list[Tensor] = []
    callback = fk_callback(pipe, steering(schedule=[3], lam=1e6))
    taken: list[Tensor] = []

    def both(pipe: Any, step: int, t: Any, kwargs: Any) -> Any:
        kwargs = callback(pipe, step, t, kwargs)
        latents.append(kwargs["latents"].clone())
        if step == 3:
            taken.append(callback.state.ancestors)
        return kwargs

    draw(pipe, callback=both, generator=generators)
    callback.remove()
    rows = taken[0]
    assert rows.tolist() == [rows[0]] * K + [rows[K]] * K

    # By hand: in every row the winner's start and noise, and from there on the row's own noise.
    copies, own, seen = [rng(int(row)) for row in rows], [rng(i) for i in range(2 * K)], []
    shape = latents[0].shape[1:]

    def switch(pipe: Any, step: int, t: Any, kwargs: Any) -> Any:
        seen.append(kwargs["latents"].clone())
        if step == 3:
            for copy, generator in zip(copies, own, strict=True):
                torch.randn(5, *shape, generator=generator)  # the start, and the noise of four steps
                copy.set_state(generator.get_state())
        return kwargs

    draw(pipe, callback=switch, generator=copies)
    for step in (3, 4, 5, 6):
        assert torch.allclose(latents[step], seen[step], rtol=1e-4, atol=1e-4), step


@pytest.mark.parametrize("kind", ["DDPMPipeline", "DDIMPipeline"])
def test_pipelines_without_a_callback(kind: str) -> None:
    scheduler = diffusers.DDPMScheduler() if kind == "DDPMPipeline" else diffusers.DDIMScheduler()
    pipe = getattr(diffusers, kind)(unet(), scheduler)
    pipe.set_progress_bar_config(disable=True)
    given: dict[str, Any] = {"batch_size": 2 * K, "num_inference_steps": 8, "output_type": "np"}
    given |= {} if kind == "DDPMPipeline" else {"eta": 1.0}
    plain = pipe(**given, generator=rng(1)).images
    with fk_callback(pipe, steering(lam=0.0)):
        for _ in range(2):
            assert (pipe(**given, generator=rng(1)).images == plain).all()
    with fk_callback(pipe, steering()) as callback:
        steered = pipe(**given, generator=rng(1)).images
        best = callback.select(steered)
        assert best.shape == (2, *plain.shape[1:])
        assert best.mean() > plain.mean()
        assert best.mean((1, 2, 3)).tolist() == steered.reshape(2, K, -1).mean(2).max(1).tolist()
    if kind == "DDIMPipeline":
        with fk_callback(pipe, steering()), pytest.raises(ValueError, match=r"eta=1.0, got eta=0"):
            pipe(**{**given, "eta": 0.0})


def test_flow_matching_with_noise() -> None:
    torch.manual_seed(0)
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=8, patch_size=1, in_channels=4, out_channels=4, num_layers=1, attention_head_dim=8,
        num_attention_heads=2, caption_projection_dim=16, joint_attention_dim=16, pooled_projection_dim=16,
    )  # fmt: skip
    vae = diffusers.AutoencoderKL(
        block_out_channels=(4, 4), latent_channels=4, norm_num_groups=1, use_quant_conv=False, use_post_quant_conv=False,
        shift_factor=0.06, scaling_factor=1.5, down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
    )  # fmt: skip
    given: dict[str, Any] = {
        "prompt_embeds": torch.randn(2, 6, 16, generator=rng(0)).repeat_interleave(K, 0),
        "pooled_prompt_embeds": torch.randn(2, 16, generator=rng(1)).repeat_interleave(K, 0),
        "guidance_scale": 0.0, "height": 16, "width": 16, "output_type": "latent",
        "num_inference_steps": 8,
    }  # fmt: skip

    def pipeline(scheduler: Any) -> Any:
        pipe = diffusers.StableDiffusion3Pipeline(
            scheduler=scheduler, text_encoder=None, tokenizer=None, text_encoder_2=None, tokenizer_2=None,
            text_encoder_3=None, tokenizer_3=None, transformer=transformer, vae=vae,
        )  # fmt: skip
        pipe.set_progress_bar_config(disable=True)
        return pipe

    noisy = diffusers.FlowMatchEulerDiscreteScheduler(stochastic_sampling=True)
    for scheduler in (
        noisy,
        PolyakScheduler.from_config(noisy.config, solver=DDIM(eta=1.0), stochastic_sampling=False),
        FlowSDEScheduler(path="vp", grid="vp", shift=3.0),
    ):
        pipe = pipeline(scheduler)
        torch.manual_seed(7)  # this scheduler's noise comes from nowhere else
        plain = pipe(**given, generator=rng(3)).images
        with fk_callback(pipe, steering()) as callback:
            torch.manual_seed(7)
            steered = pipe(**given, generator=rng(3), callback_on_step_end=callback).images
        assert callback.select(steered).mean() > plain.mean()
    with (
        fk_callback(pipeline(FlowSDEScheduler(norm=0.0)), steering()) as callback,
        pytest.raises(ValueError, match="deterministic solver FlowSDE"),
    ):
        callback.pipe(**given, callback_on_step_end=callback)
    # Without noise it is found out by the copies that stay together.
    pipe = pipeline(diffusers.FlowMatchEulerDiscreteScheduler())
    callback = fk_callback(pipe, steering())
    with pytest.raises(ValueError, match="deterministic solver FlowMatchEulerDiscreteScheduler"):
        pipe(**given, callback_on_step_end=callback)


def test_rewards_are_of_predicted_images() -> None:
    """Decoded by the pipeline's own autoencoder, two at a time; the last is of the image that comes out."""
    pipe, sizes = stable_diffusion(), []

    def decode(latents: Tensor) -> Tensor:
        sizes.append(len(latents))
        return pipe.vae.decode(latents / pipe.vae.config.scaling_factor).sample

    seen: list[Tensor] = []

    def reward(images: Tensor) -> list[float]:
        seen.append(images)
        return bright(images).flatten().tolist()

    rule = FKSteering(reward, num_particles=K, schedule=[3], decode=decode, reward_batch_size=2)
    with fk_callback(pipe, rule) as callback:
        images = draw(pipe, callback=callback, eta=1.0, output_type="pt")
        assert max(sizes) == 2
        assert sum(sizes) == 2 * 2 * K
        rewards = (images * 2 - 1).flatten(1).mean(1)  # clipped, as the reward's are not
        assert images.shape[0] == 2 * K
        assert (rewards.view(2, K) - callback.state.reward.float()).abs().max() < 0.5
        assert seen[0].shape[2:] == (3, 16, 16)


def test_guidance_inside_and_of_ours() -> None:
    pipe = stable_diffusion(PolyakScheduler(solver=DDIM(eta=1.0), num_train_timesteps=1000))
    inside = draw(pipe, guidance_scale=3.0)
    with guide(pipe, CFG(3.0)), fk_callback(pipe, steering(lam=0.0)) as callback:
        ours = draw(pipe, guidance_scale=2.0, callback=callback)
    assert (ours - inside).abs().max() < 1e-4 * inside.abs().max()


@pytest.mark.parametrize(
    ("make", "options", "words"),
    [
        (lambda: diffusers.DDIMScheduler(**DEFAULT), {}, "call the pipeline with eta=1.0, got eta=0"),
        (lambda: PolyakScheduler(solver=DDIM(), num_train_timesteps=1000), {}, r"deterministic solver DDIM\(\)"),
        (diffusers.EulerDiscreteScheduler, {}, "deterministic solver EulerDiscreteScheduler: resampled copies"),
        (diffusers.PNDMScheduler, {}, "PNDMScheduler does not tell its predicted data"),
    ],
)
def test_schedulers_that_are_refused(make: Any, options: dict[str, Any], words: str) -> None:
    pipe = stable_diffusion(make())
    with fk_callback(pipe, steering(lam=1e4)) as callback, pytest.raises(ValueError, match=words):
        draw(pipe, callback=callback, **options)
    if "tell" not in words:  # nothing is copied: nothing is refused
        with fk_callback(pipe, steering(potential="bon")) as callback:
            assert len(callback.select(draw(pipe, callback=callback, **options))) == 2


def test_what_else_is_refused() -> None:
    pipe = stable_diffusion()
    callback = fk_callback(pipe, steering(num_particles=4))
    with pytest.raises(ValueError, match="steered already"):
        fk_callback(pipe, steering())
    with pytest.raises(ValueError, match="needs a run"):
        callback.select([])
    with pytest.raises(ValueError, match=r"k=4 samples for each prompt \(num_images_per_prompt=4\), got 6 rows"):
        draw(pipe, callback=callback, eta=1.0)
    callback.remove()
    callback.remove()
    callback = fk_callback(pipe, steering())
    with pytest.raises(ValueError, match="hand it to the pipeline, callback_on_step_end="):
        draw(pipe, eta=1.0)
    steered = draw(pipe, callback=callback, eta=1.0)  # the next run is not harmed
    with pytest.raises(ValueError, match="images must be all 6 of the last run, got 5"):
        callback.select(steered[:5])
    with pytest.raises(ValueError, match="callback_on_step_end_tensor_inputs must have"):
        draw(pipe, callback=callback, eta=1.0, callback_on_step_end_tensor_inputs=["prompt_embeds"])
    pipe.scheduler = diffusers.DDIMScheduler(**DEFAULT)
    with pytest.raises(ValueError, match="another scheduler than when fk_callback was called"):
        draw(pipe, callback=callback, eta=1.0)
    with pytest.raises(ValueError, match="pipe must have a scheduler that can step"):
        fk_callback(type("Pipe", (), {"scheduler": None})(), steering())
