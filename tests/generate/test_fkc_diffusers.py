"""The corrector in a real diffusers pipeline: it is sample's own loop, and pipelines that tell too little are refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers_cases import diffusers, rng
from generate_cases import stable_diffusion
from torch import Tensor

from polyak.generate import CFG, DDIM, Denoiser, FeynmanKacCorrector, ReverseSDE, sample
from polyak.generate.adapters.diffusers import PolyakScheduler, fk_callback, guide

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning:diffusers", "ignore::FutureWarning"),
    pytest.mark.xdist_group("diffusers pipelines"),
]
K, SCALE = 4, 3.0


def prompts() -> dict[str, Tensor]:
    return {
        name: 6 * torch.randn(2, 8, 8, generator=rng(i)) for i, name in enumerate(("prompt_embeds", "negative_prompt_embeds"))
    }  # fmt: skip


def draw(pipe: Any, callback: Any = None, **options: Any) -> Tensor:
    given = {"height": 16, "width": 16, "num_inference_steps": 8, "output_type": "latent", "generator": rng(3)}
    if callback is not None:
        given["callback_on_step_end"] = callback
    return pipe(**prompts(), num_images_per_prompt=K, guidance_scale=2.0, **{**given, **options}).images


def corrector(**options: Any) -> FeynmanKacCorrector:
    return FeynmanKacCorrector(
        **{**dict(target="cfg", num_particles=K, ess_threshold=None, generator=rng(5)), **options}
    )


@pytest.mark.parametrize("solver", [ReverseSDE(), DDIM(eta=1.0)], ids=["EM", "DDIM"])
def test_a_pipeline_is_corrected_as_sample_is(solver: Any) -> None:
    pipe = stable_diffusion(PolyakScheduler(solver=solver, num_train_timesteps=1000))
    with guide(pipe, CFG(SCALE)):
        plain = draw(pipe)
        with fk_callback(pipe, corrector(ess_threshold=0.0)) as callback:
            assert torch.equal(draw(pipe, callback), plain)
            assert callback.state.logw.std(1).min() > 1e-6
        with fk_callback(pipe, corrector()) as callback:
            got = draw(pipe, callback)
            state = callback.state
            assert len(callback.select(got)) == 2 * K
    assert not torch.equal(got, plain)
    # The same in our loop, at the pipeline's own times.
    told, pair = pipe.scheduler, prompts()

    def network(x: Tensor, t: Tensor, name: str) -> Tensor:
        label = told.timesteps[(told_times - t[0]).abs().argmin()]
        return pipe.unet(x, label, encoder_hidden_states=pair[name].repeat_interleave(K, 0)).sample

    told_times = torch.tensor(told._times[:-1])
    denoiser = Denoiser(
        lambda x, t: network(x, t, "prompt_embeds"), told.process, label=lambda t: t,
        unconditional=lambda x, t: network(x, t, "negative_prompt_embeds"),
    )  # fmt: skip
    noise = rng(3)
    start = torch.randn(2 * K, 4, 8, 8, generator=noise) * told.init_noise_sigma
    with torch.no_grad():
        want, info = sample(
            denoiser, start, solver=solver, grid=told._times, guidance=CFG(SCALE), steering=corrector(), generator=noise,
            return_info=True,
        )  # fmt: skip
    assert torch.allclose(got, want, rtol=1e-3, atol=1e-3 * float(want.abs().max()))
    assert torch.allclose(state.log_z, info.steering.log_z, rtol=1e-3, atol=1e-6)


def test_what_tells_too_little_is_refused() -> None:
    pipe = stable_diffusion(diffusers.DDIMScheduler(steps_offset=1, clip_sample=False))
    words = r"does not tell them: use a PolyakScheduler, guide\(pipe, CFG\(scale\)\)"
    with fk_callback(pipe, corrector()) as callback, pytest.raises(ValueError, match=words):
        draw(pipe, callback, eta=1.0)
    pipe = stable_diffusion(PolyakScheduler(solver=DDIM(eta=1.0), num_train_timesteps=1000))
    with fk_callback(pipe, corrector()) as callback, pytest.raises(ValueError, match=words):
        draw(pipe, callback)  # guided inside
    with (
        guide(pipe, CFG(SCALE)),
        fk_callback(pipe, corrector(target="anneal")) as callback,
        pytest.raises(ValueError, match="'anneal' needs a Composed one without guidance"),
    ):
        draw(pipe, callback)
