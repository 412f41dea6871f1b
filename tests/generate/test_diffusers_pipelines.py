"""Real pipelines with random weights: text to image, image to image, inpainting; ours draws diffusers' own picture.

Flow pipelines (Flux, Stable Diffusion 3, Wan, Sana) hand over levels of their own, shift them, and begin with scale_noise.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from diffusers_cases import SCALED, TWO_M, diffusers, rng
from generate_cases import stable_diffusion

from polyak.generate import DDIM, RK4, DPMSolver, Euler, Heun, Solver
from polyak.generate.adapters.diffusers import PolyakScheduler

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning:diffusers", "ignore::FutureWarning"),
    pytest.mark.xdist_group("diffusers pipelines"),  # one worker builds them
]
OTHERS = [TWO_M, Heun(), RK4(), DPMSolver()]
IMAGE = torch.rand(1, 3, 16, 16, generator=rng(2))
MASK = (torch.arange(16) >= 8).float().expand(1, 1, 16, 16)
Build = Callable[..., Any]


def prompt(width: int, pooled: bool = True, batch: int = 1) -> dict[str, torch.Tensor]:
    given = {"prompt_embeds": torch.randn(batch, 6, width, generator=rng(0))}
    return given | ({"pooled_prompt_embeds": torch.randn(batch, width, generator=rng(1))} if pooled else {})


@cache
def autoencoder(channels: int) -> Any:
    torch.manual_seed(0)
    return diffusers.AutoencoderKL(
        block_out_channels=(4, 4), latent_channels=channels, norm_num_groups=1, use_quant_conv=False,
        use_post_quant_conv=False, shift_factor=0.06, scaling_factor=1.5, down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
    )  # fmt: skip


@cache
def flux_transformer() -> Any:
    torch.manual_seed(0)
    return diffusers.FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=16, pooled_projection_dim=16, axes_dims_rope=(2, 2, 4),
    )  # fmt: skip


@cache
def sd3_transformer() -> Any:
    torch.manual_seed(0)
    return diffusers.SD3Transformer2DModel(
        sample_size=8, patch_size=1, in_channels=16, out_channels=16, num_layers=1, attention_head_dim=8,
        num_attention_heads=2, caption_projection_dim=16, joint_attention_dim=16, pooled_projection_dim=16,
    )  # fmt: skip


def flux(kind: str, scheduler: Any, **options: Any) -> torch.Tensor:
    pipe = getattr(diffusers, kind)(
        scheduler=scheduler, text_encoder=None, tokenizer=None, text_encoder_2=None, tokenizer_2=None,
        transformer=flux_transformer(), vae=autoencoder(1),
    )  # fmt: skip
    return run(pipe, **prompt(16), guidance_scale=0.0, **options)


def sd3(kind: str, scheduler: Any, **options: Any) -> torch.Tensor:
    kind = kind.replace("Flux", "StableDiffusion3")
    pipe = getattr(diffusers, kind)(
        scheduler=scheduler, text_encoder=None, tokenizer=None, text_encoder_2=None, tokenizer_2=None,
        text_encoder_3=None, tokenizer_3=None, transformer=sd3_transformer(), vae=autoencoder(16),
    )  # fmt: skip
    negative = {f"negative_{k}": torch.zeros_like(v) for k, v in prompt(16).items()}
    return run(pipe, **prompt(16), **negative, guidance_scale=3.0, **options)


def run(pipe: Any, steps: int = 5, **options: Any) -> torch.Tensor:
    pipe.set_progress_bar_config(disable=True)
    size = {"height": 16, "width": 16, "num_inference_steps": steps, "generator": rng(3), "output_type": "latent"}
    made = pipe(**{**size, **options})
    return made.frames if hasattr(made, "frames") else made.images


def task(kind: str, strength: float) -> dict[str, Any]:
    if kind == "FluxPipeline":
        return {}
    return {"image": IMAGE, "strength": strength} | ({"mask_image": MASK} if "Inpaint" in kind else {})


@pytest.mark.parametrize("kind", ["FluxPipeline", "FluxImg2ImgPipeline", "FluxInpaintPipeline"])
@pytest.mark.parametrize("build", [flux, sd3])
@pytest.mark.parametrize("dynamic", [False, True])
def test_flow_pipelines(build: Build, kind: str, dynamic: bool) -> None:
    options = {"shift": 3.0, "use_dynamic_shifting": dynamic}
    for strength in (0.25, 0.8):
        theirs = diffusers.FlowMatchEulerDiscreteScheduler(**options)
        want = build(kind, theirs, **task(kind, strength))
        ours = PolyakScheduler.from_config(theirs.config, solver=Euler())
        for _ in range(2):  # a scheduler serves any number of runs
            assert (build(kind, ours, **task(kind, strength)) - want).abs().max() < 1e-5 * want.abs().max()
        assert torch.allclose(ours.timesteps, theirs.timesteps, rtol=1e-6)
        if dynamic:
            continue
        for solver in OTHERS:
            other = build(kind, PolyakScheduler.from_config(theirs.config, solver=solver), **task(kind, strength))
            assert bool(other.isfinite().all()), solver
            assert other.shape == want.shape


def test_heun_is_theirs_in_a_flow_pipeline() -> None:
    theirs = diffusers.FlowMatchHeunDiscreteScheduler(shift=3.0)
    ours = PolyakScheduler.from_config(theirs.config, solver=Heun())
    theirs.init_noise_sigma = 1.0
    want, got = (sd3("FluxPipeline", s) for s in (theirs, ours))
    assert (got - want).abs().max() < 1e-5 * want.abs().max()


UNIPC = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}


@pytest.mark.parametrize(
    ("theirs", "solver", "same"),
    [
        (diffusers.FlowMatchEulerDiscreteScheduler(shift=7.0), Euler(), True),
        (diffusers.DPMSolverMultistepScheduler(**UNIPC), TWO_M, True),
        (diffusers.UniPCMultistepScheduler(**UNIPC), TWO_M, False),  # another method, to the same end
    ],
    ids=["FlowMatchEuler", "DPMSolverMultistep", "UniPC"],
)
def test_wan(theirs: Any, solver: Solver, same: bool) -> None:
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKLWan(
        base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True]
    )
    transformer = diffusers.WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=16, out_channels=16, text_dim=16,
        freq_dim=32, ffn_dim=16, num_layers=1, cross_attn_norm=True, qk_norm="rms_norm_across_heads", rope_max_seq_len=32,
    )  # fmt: skip
    results = []
    for scheduler in (theirs, PolyakScheduler.from_config(theirs.config, solver=solver)):
        pipe = diffusers.WanPipeline(
            tokenizer=None, text_encoder=None, vae=vae, scheduler=scheduler, transformer=transformer
        )
        negative = {"negative_prompt_embeds": torch.zeros(1, 6, 16)}
        results.append(run(pipe, num_frames=5, guidance_scale=3.0, **prompt(16, pooled=False), **negative))
    want, got = results
    assert (got - want).abs().max() < (1e-5 if same else 0.1) * want.abs().max()


def test_sana() -> None:
    torch.manual_seed(0)
    blocks = {
        "encoder_block_types": ("ResBlock", "EfficientViTBlock"), "decoder_block_types": ("ResBlock", "EfficientViTBlock"),
        "encoder_block_out_channels": (8, 8), "decoder_block_out_channels": (8, 8), "encoder_layers_per_block": (1, 1),
        "decoder_layers_per_block": (1, 1), "encoder_qkv_multiscales": ((), (5,)), "decoder_qkv_multiscales": ((), (5,)),
    }  # fmt: skip
    vae = diffusers.AutoencoderDC(in_channels=3, latent_channels=4, attention_head_dim=2, **blocks)
    transformer = diffusers.SanaTransformer2DModel(
        patch_size=1, in_channels=4, out_channels=4, num_layers=1, num_attention_heads=2, attention_head_dim=4,
        num_cross_attention_heads=2, cross_attention_head_dim=4, cross_attention_dim=8, caption_channels=8, sample_size=8,
    )  # fmt: skip
    theirs = diffusers.DPMSolverMultistepScheduler(**UNIPC)
    ours = PolyakScheduler.from_config(theirs.config, solver=TWO_M)
    mask = torch.ones(1, 6)
    given = {"prompt_attention_mask": mask, "negative_prompt_attention_mask": mask, "use_resolution_binning": False}
    results = []
    for scheduler in (theirs, ours):
        pipe = diffusers.SanaPipeline(
            tokenizer=None, text_encoder=None, vae=vae, transformer=transformer, scheduler=scheduler
        )
        negative = {"negative_prompt_embeds": torch.zeros(1, 6, 8), "negative_prompt": None}
        results.append(
            run(pipe, height=32, width=32, guidance_scale=3.0, **prompt(8, pooled=False), **negative, **given)
        )
    want, got = results
    assert (got - want).abs().max() < 1e-5 * want.abs().max()


@pytest.mark.parametrize("name", ["EulerDiscreteScheduler", "HeunDiscreteScheduler", "DDIMScheduler"])
@pytest.mark.parametrize("strength", [None, 0.3, 0.7])
def test_stable_diffusion_with_the_solver_that_its_scheduler_is(name: str, strength: float | None) -> None:
    # Euler's and Heun's samples are scaled for the network, from the noise that begins a run to the image's.
    solver = {"E": Euler(), "H": Heun(), "D": DDIM()}[name[0]]
    options = {**SCALED, "steps_offset": 1, "timestep_spacing": "leading"}
    theirs = getattr(diffusers, name)(**options, **({"clip_sample": False} if name[0] == "D" else {}))
    embeds = {
        k: torch.randn(1, 8, 8, generator=rng(i)) for i, k in enumerate(("prompt_embeds", "negative_prompt_embeds"))
    }
    given = {"image": IMAGE, "strength": strength} if strength else {"height": 16, "width": 16}
    results = []
    for scheduler in (theirs, PolyakScheduler.from_config(theirs.config, solver=solver)):
        pipe = stable_diffusion(scheduler, image_to_image=strength is not None)
        made = pipe(**embeds, **given, num_inference_steps=10, generator=rng(3), output_type="latent")
        results.append(made.images)
    want, got = results
    assert (got - want).abs().max() < 1e-4 * want.abs().max()
