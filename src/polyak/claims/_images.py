"""Small image models for claims about sampling, trained here: digits or MNIST, a U-Net or a transformer, four processes.

``polyak train digits --network unet --process edm`` trains one and saves it; a claim trains its own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from polyak.generate.networks import ImageNetwork
    from polyak.generate.process import Process

DATA, NETWORKS = ("digits", "mnist"), ("unet", "dit")
CLASSES = 10


@dataclass(frozen=True)
class Recipe:
    """How a model is trained. Images are in [-1, 1], one channel; MNIST's are padded to 32 x 32.

    Args:
        data: "digits" (1797 images, 8 x 8) or "mnist" (10,000 images, 32 x 32).
        network: "unet" or "dit"; ``width`` as these take it.
        process: "vp", "edm", "flow" or "pfgmpp".
        seed: of the initial weights, the batches and the noise.
    """

    data: str = "digits"
    network: str = "unet"
    process: str = "edm"
    width: int = 32
    steps: int = 1500
    batch: int = 64
    lr: float = 2e-3
    seed: int = 0

    @property
    def noise(self) -> tuple[Process, str, float]:
        """The process, the dialect of the network's output, and the data's standard deviation."""
        from polyak import generate as g

        return {
            "vp": lambda: (g.VP(), "v_prediction", 0.5),
            "edm": lambda: (g.EDM(), "edm", 0.5),
            "flow": lambda: (g.Flow(), "flow", 0.5),
            "pfgmpp": lambda: (g.PFGMPP(128.0), "edm", 0.5),
        }[self.process]()


PROCESSES = ("vp", "edm", "flow", "pfgmpp")


def images(name: str, device: str = "cpu") -> tuple[torch.Tensor, torch.Tensor]:
    """Images (n, 1, size, size) in [-1, 1], float32, and their classes (n,)."""
    import torch

    from polyak.lab import data

    if name == "digits":
        x, y = data.digits()
        shown = torch.tensor(x, dtype=torch.float32).reshape(-1, 1, 8, 8) / 8 - 1
    else:
        x, y = data.mnist()
        shown = torch.nn.functional.pad(torch.tensor(x, dtype=torch.float32)[:, None] / 127.5 - 1, [2] * 4, value=-1.0)
    return shown.to(device), torch.tensor(y, device=device)


def train(recipe: Recipe, device: str = "cpu", progress: Callable[[int, float], None] | None = None) -> ImageNetwork:
    """The network that a recipe makes, with averaged weights."""
    import torch

    from polyak.generate.networks import dit, unet
    from polyak.generate.training import train_denoiser

    x, y = images(recipe.data, device)
    with torch.random.fork_rng([] if device == "cpu" else None):
        torch.manual_seed(recipe.seed)  # initial weights come from torch's global generator
        make: Any = {"unet": unet, "dit": dit}[recipe.network]
        network: ImageNetwork = make(x.shape[-1], width=recipe.width, classes=CLASSES).to(device)
    process, prediction, sigma_data = recipe.noise
    return train_denoiser(
        network, x, process, prediction, labels=y, none=CLASSES, steps=recipe.steps, batch=recipe.batch, lr=recipe.lr,
        sigma_data=sigma_data, generator=torch.Generator(device).manual_seed(recipe.seed), progress=progress,
    )  # fmt: skip
