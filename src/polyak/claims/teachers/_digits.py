"""Small generators of digits, trained from a seed: what LCSC's claim combines. This module imports torch.

A diffusion model (arXiv 2206.00364) and a consistency model (arXiv 2303.01469, training without a teacher), both an MLP of the
noised image and its noise level, sampled with few evaluations of the network and with one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor, nn

from polyak.core.momentum import ema_
from polyak.generate import EDM, Denoiser, DPMSolver, sample
from polyak.generate.prediction import edm_input_scaling, edm_label, edm_output_scaling
from polyak.lab import data
from polyak.lab.claim import Diverged

TRAIN, VALIDATION = 397, 700  # and 700 for the test
COMPONENTS = 20
SIGMA_DATA = 0.5
PROCESS = EDM(sigma_min=0.002, sigma_max=80.0)
TARGET_RATE = 0.95  # of the consistency model's own average, its training target
ONLINE_RATES = (0.98, 0.99, 0.995, 0.998, 0.999, 0.9995)
State = dict[str, Tensor]


class Net(nn.Module):
    """``(x, label) -> output``: x (n, 64) and sines and cosines of the label (n,), through three hidden layers."""

    frequencies: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("frequencies", 3 * torch.linspace(-2, 2, 8).exp(), persistent=False)
        sizes = (64 + 16, width, width, width)
        layers = [m for i, o in pairwise(sizes) for m in (nn.Linear(i, o), nn.SiLU())]
        self.layers = nn.Sequential(*layers, nn.Linear(width, 64))

    def forward(self, x: Tensor, label: Tensor) -> Tensor:
        angle = label[:, None] * self.frequencies
        return self.layers(torch.cat([x, angle.sin(), angle.cos()], dim=1))


@dataclass
class Run:
    """What a training left: states by step, and at its end the averages that were kept on the way, by their rate."""

    model: Net
    saved: dict[int, State] = field(default_factory=dict)
    online: dict[float, State] = field(default_factory=dict)


@dataclass(frozen=True)
class Digits:
    """Three disjoint sets of images in [-1, 1]^64, and the projection on the training set's principal components."""

    train: Tensor
    validation: Tensor
    test: Tensor
    mean: Tensor
    components: Tensor

    def features(self, x: Tensor) -> Tensor:
        """(n, 64) to (n, 20)."""
        return (x - self.mean) @ self.components


@lru_cache(maxsize=2)
def digits(device: str) -> Digits:
    """All 1,797 images, shuffled once for all seeds, since the set is in the order of its writers."""
    x, _ = data.digits()
    x = torch.from_numpy(x / 8 - 1).float()
    x = x[np.random.default_rng(0).permutation(len(x))].to(device)
    train, validation, test = x.split([TRAIN, VALIDATION, len(x) - TRAIN - VALIDATION])
    mean = train.mean(0)
    components = torch.linalg.svd(train - mean, full_matrices=False).Vh[:COMPONENTS].T
    return Digits(train, validation, test, mean, components)


@lru_cache(maxsize=16)
def trained(
    task: str,
    seed: int,
    device: str,
    *,
    steps: int,
    width: int,
    batch: int,
    lr: float,
    scales: int,
    every: int,
) -> Run:
    """A training from its seed, with its raw states every so many steps after its first quarter. All arms of a seed share it."""
    x = digits(device).train
    noise = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        model, target = Net(width), Net(width)
    target.load_state_dict(model.state_dict())
    model, target = model.to(device), target.to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=lr, fused=True)
    loss = _diffusion_loss if task == "diffusion" else _consistency_loss(target, scales)
    run = Run(model, online={rate: _copy(model) for rate in ONLINE_RATES})
    for step in range(1, steps + 1):
        drawn = x[torch.randint(len(x), (batch,), generator=noise).to(device)]
        optimizer.zero_grad()
        value = loss(model, drawn, noise)
        value.backward()
        optimizer.step()
        now = dict(model.state_dict())
        if task != "diffusion":
            ema_(dict(target.state_dict()), now, TARGET_RATE)
        for rate, average in run.online.items():
            ema_(average, now, rate)
        if step > steps // 4 and step % every == 0:
            run.saved[step] = _copy(model)
    if not math.isfinite(value.item()):
        raise Diverged(f"training loss {value.item()} at the last step")
    return run


def _copy(model: nn.Module) -> State:
    return {k: v.detach().clone() for k, v in model.state_dict().items()}


def _normal(like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(like.shape, generator=generator).to(like)


def _diffusion_loss(model: Net, images: Tensor, generator: torch.Generator) -> Tensor:
    """EDM's: ``ln sigma ~ N(-1.2, 1.2^2)``, and the weight with which all levels count alike for the network's output."""
    sigma = (1.2 * _normal(images[:, :1], generator) - 1.2).exp()
    x = images + sigma * _normal(images, generator)
    skip, out = edm_output_scaling(sigma, SIGMA_DATA)
    output = model(edm_input_scaling(sigma, SIGMA_DATA) * x, edm_label(sigma)[:, 0])  # type: ignore[index]
    return (output - (images - skip * x) / out).square().mean()


def consistency(model: Callable[[Tensor, Tensor], Tensor], x: Tensor, sigma: Tensor) -> Tensor:
    """``f(x, s) = c_skip x + c_out F(c_in x, s)``, the identity at the least noise. x: (n, 64), sigma: (n, 1)."""
    skip, _ = edm_output_scaling(sigma - PROCESS.sigma_min, SIGMA_DATA)
    out = SIGMA_DATA * (sigma - PROCESS.sigma_min) / (SIGMA_DATA**2 + sigma**2).sqrt()
    return skip * x + out * model(edm_input_scaling(sigma, SIGMA_DATA) * x, edm_label(sigma)[:, 0])  # type: ignore[index]


def _consistency_loss(target: Net, scales: int) -> Callable[[Net, Tensor, torch.Generator], Tensor]:
    levels = PROCESS.grid(scales - 1, "karras").flip(0).float()  # from the least noise up

    def loss(model: Net, images: Tensor, generator: torch.Generator) -> Tensor:
        n = torch.randint(scales - 1, (len(images), 1), generator=generator)
        low, high = levels[n].to(images), levels[n + 1].to(images)
        z = _normal(images, generator)
        with torch.no_grad():
            goal = consistency(target, images + low * z, low)
        return (consistency(model, images + high * z, high) - goal).square().mean()

    return loss


def sampler(task: str, nfe: int) -> Callable[[Net, int, torch.Generator], Tensor]:
    """``(model, n, generator) -> (n, 64)``: DPM-Solver++ 2M with ``nfe`` evaluations, or the consistency model's one."""

    def diffusion(model: Net, n: int, generator: torch.Generator) -> Tensor:
        denoiser = Denoiser(model, PROCESS, "edm", sigma_data=SIGMA_DATA)
        solver = DPMSolver(order=2, form="data", method="multistep")
        return sample(denoiser, (n, 64), solver=solver, nfe=nfe, grid="karras", generator=generator, check_finite=False)

    def one_step(model: Net, n: int, generator: torch.Generator) -> Tensor:
        x = PROCESS.prior((n, 64), generator=generator)
        return consistency(model, x, torch.full((n, 1), PROCESS.sigma_max, device=x.device))

    return diffusion if task == "diffusion" else one_step


def window(saved: Mapping[int, State], first: int, last: int, every: int) -> list[State]:
    """The states after ``first`` and up to ``last``, one every so many steps."""
    return [saved[step] for step in range(first + every, last + 1, every)]
