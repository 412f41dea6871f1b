"""What several tests of this room run on: every process, a 1-D mixture with its exact answers, a pipeline."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch

from polyak.generate import (
    EDM,
    OU,
    VE,
    VP,
    CosineVP,
    Discrete,
    Flow,
    KineticOptimal,
    LinearVPPath,
    PolynomialPath,
    Process,
    Query,
    Solver,
    Step,
    TrigFlow,
    gaussian_separation,
)
from polyak.generate.problems import ExactDenoiser, Mixture

BETAS = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
# With ends at which everything is finite.
PROCESSES: dict[str, Process] = {
    "VP": VP(),
    "CosineVP": CosineVP(),
    "VE": VE(),
    "EDM": EDM(),
    "Flow": Flow(t_min=1e-3, t_max=0.999),
    "TrigFlow": TrigFlow(t_min=1e-3, t_max=0.999),
    "LinearVPPath": LinearVPPath(t_min=1e-3, t_max=0.999),
    "PolynomialPath": PolynomialPath(1.5, t_min=1e-3, t_max=0.999),
    "OU": OU(),
    "Discrete": Discrete(BETAS),
    "KineticOptimal": KineticOptimal(gaussian_separation([2.0, 0.7, 0.3]), t_min=1e-3, t_max=0.999),
}
every_process = pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES.keys())

MIXTURE = Mixture([[-1.0], [0.6]], [0.25, 0.09], [0.4, 0.6], labels=[0, 1])


class Sine(Process):
    """A process of the user's own: TrigFlow."""

    t_min, t_max = 0.01, 0.99

    def _alpha(self, t: torch.Tensor) -> torch.Tensor:
        return torch.cos(torch.pi / 2 * t)

    def _sigma(self, t: torch.Tensor) -> torch.Tensor:
        return torch.sin(torch.pi / 2 * t)


class Mine(Solver):
    """A solver of the user's own: Euler, as a coroutine."""

    def run(self, x: Any, times: Any, process: Any, *, generator: Any = None) -> Any:
        for i, (s, t) in enumerate(pairwise(times)):
            p = yield Query(x, s)
            x = p.x + (t - s) * p.flow
            yield Step(x, s, t, i, i == len(times) - 2)
        return x


def exact(process: Process | None = None) -> ExactDenoiser:
    """The exact denoiser of a smooth 1-D mixture."""
    return ExactDenoiser(MIXTURE, process or VP())


def noise(n: int = 32, d: int = 1, seed: int = 0) -> torch.Tensor:
    """Starts at t_max of VP, float64."""
    return torch.randn(n, d, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def stable_diffusion(scheduler: Any = None, image_to_image: bool = False, tokenizer: Any = None) -> Any:
    """A tiny pipeline with random weights; by default with its DDIM scheduler."""
    diffusers = pytest.importorskip("diffusers")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    net = diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=8,
        attention_head_dim=4,
        norm_num_groups=4,
    )
    vae = diffusers.AutoencoderKL(block_out_channels=(8, 8), norm_num_groups=4, latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2)  # fmt: skip
    config = transformers.CLIPTextConfig(
        hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=100,
        max_position_embeddings=8, bos_token_id=0, eos_token_id=1, pad_token_id=1,
    )  # fmt: skip
    kind = diffusers.StableDiffusionImg2ImgPipeline if image_to_image else diffusers.StableDiffusionPipeline
    pipe = kind(
        vae=vae, unet=net, text_encoder=transformers.CLIPTextModel(config), tokenizer=tokenizer,
        scheduler=scheduler or diffusers.DDIMScheduler(steps_offset=1, clip_sample=False),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    return pipe
