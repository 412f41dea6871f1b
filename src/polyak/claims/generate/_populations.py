"""Populations that are moved, and models that learn it: for the claim of meta flow matching."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from polyak.generate.meta_flow import MetaFlowMatching, MetaVelocity, PopulationEncoder, wasserstein

DIM, SPREAD, LEFT = 2, 2.0, 0.3
BLIND = math.sqrt((SPREAD**2 + LEFT**2) / (SPREAD**2 + 1))  # slope of the best map that knows no population


@dataclass(frozen=True)
class Data:
    """Training and test populations, each [P, N, 2], before and after."""

    x0: Tensor
    x1: Tensor
    test0: Tensor
    test1: Tensor


def contraction(seed: int, train: int, test: int, points: int, dtype: torch.dtype = torch.float32) -> Data:
    """Populations ``N(m, I)``, m of deviation 2, each contracted to 0.3 of its size about its own centre m."""
    generator = torch.Generator().manual_seed(seed)
    centre = SPREAD * torch.randn(train + test, 1, DIM, dtype=dtype, generator=generator)
    offset = torch.randn(train + test, points, DIM, dtype=dtype, generator=generator)
    x0, x1 = centre + offset, centre + LEFT * offset
    return Data(x0[:train], x1[:train], x0[train:], x1[train:])


def letters(seed: int, angles: int, test: int, points: int, noise: float) -> Data:
    """The letters A to Z as clouds of points in [-3, 3], each turned by so many angles; before, with noise.

    One letter, by the seed, is in the test populations only, and those have no other.
    """
    generator = torch.Generator().manual_seed(seed)
    ink = torch.stack([_glyph(chr(ord("A") + i)) for i in range(26)])  # [26, pixels, pixels]
    held = torch.arange(26) == seed % 26
    which = torch.cat([(~held).nonzero()[:, 0].repeat(angles), held.nonzero()[:, 0].repeat(test)])
    angle = 2 * math.pi * torch.rand(len(which), generator=generator)
    turned = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], -1).reshape(-1, DIM, DIM)

    def drawn(which: Tensor, turn: Tensor) -> Tensor:
        pixels = torch.multinomial(ink[which].flatten(1), points, replacement=True, generator=generator)
        size = ink.shape[1]
        place = torch.stack([pixels % size, size - 1 - pixels // size], -1) + torch.rand(
            *pixels.shape, DIM, generator=generator
        )
        return (6 * place / size - 3) @ turn

    x1 = drawn(which, turned)
    x0 = x1 + noise * torch.randn(x1.shape, generator=generator)
    n = angles * 25
    return Data(x0[:n], x1[:n], x0[n:], x1[n:])


def _glyph(letter: str, size: int = 48) -> Tensor:
    """The ink of a letter that fills a square, from the font that matplotlib comes with."""
    from pathlib import Path

    import matplotlib
    import numpy as np
    from PIL import Image, ImageDraw, ImageFont

    font = ImageFont.truetype(str(Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf")), 2 * size)
    canvas = Image.new("L", (4 * size, 4 * size))
    ImageDraw.Draw(canvas).text((size, size), letter, fill=255, font=font)
    box = canvas.getbbox()
    assert box is not None
    width, height = box[2] - box[0], box[3] - box[1]
    side = max(width, height)
    square = Image.new("L", (side, side))
    square.paste(canvas.crop(box), ((side - width) // 2, (side - height) // 2))
    return torch.from_numpy(np.asarray(square.resize((size, size)), dtype=np.float32).copy())


class Centre(nn.Module):
    """A population's mean, for its embedding."""

    def forward(self, x: Tensor, mask: Tensor | None = None, features: Tensor | None = None) -> Tensor:
        return x.mean(1)


class First(nn.Module):
    """A control: the embedding of a population's first point, not of all."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, x: Tensor, mask: Tensor | None = None, features: Tensor | None = None) -> Tensor:
        return self.encoder(x[:, :1], None if mask is None else mask[:, :1], features)


class Exact(nn.Module):
    """``E[x1 - x0 | x_t]`` of the contraction: where its population's centre is known, and where none is."""

    def __init__(self, told: bool) -> None:
        super().__init__()
        self.told = told

    def forward(self, t: Tensor, x: Tensor, e: Tensor) -> Tensor:
        size = (1 + (LEFT - 1) * t)[..., None]  # of the population at t
        if self.told:
            return (LEFT - 1) * (x - e[:, None]) / size
        return (LEFT - 1) * size * x / (SPREAD**2 + size**2)


class Nothing(nn.Module):
    """An embedding of no numbers: flow matching that is told no population."""

    def forward(self, x: Tensor, mask: Tensor | None = None, features: Tensor | None = None) -> Tensor:
        return x.new_zeros(len(x), 0)


class Other(nn.Module):
    """A population's neighbour in the batch is embedded in its place."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, x: Tensor, mask: Tensor | None = None, features: Tensor | None = None) -> Tensor:
        return self.encoder(x, mask, features).roll(1, 0)


def model(
    kind: str,
    seed: int,
    populations: int,
    *,
    width: int,
    layers: int,
    k: int,
    hidden: int,
    depth: int,
    fourier: int,
    scale: float,
) -> Any:
    """A model of a kind, "fm", "cgfm", "mfm" or "shuffled"; those without an encoder are as much wider as it has weights."""

    def made(kind: str, hidden: int) -> MetaFlowMatching:
        with torch.random.fork_rng([]):
            torch.manual_seed(seed)
            if kind == "fm":
                return MetaFlowMatching(Nothing(), MetaVelocity(DIM, 0, hidden, depth, fourier, scale))
            if kind == "cgfm":
                return MetaFlowMatching(
                    Nothing(), MetaVelocity(DIM, 0, hidden, depth, fourier, scale, cond=populations)
                )
            encoder = PopulationEncoder(DIM, width, layers, k)
            velocity = MetaVelocity(DIM, width, hidden, depth, fourier, scale)
            return MetaFlowMatching(Other(encoder) if kind == "shuffled" else encoder, velocity)

    def weights(made: nn.Module) -> int:
        return sum(p.numel() for p in made.parameters())

    if kind not in ("fm", "cgfm"):
        return made(kind, hidden)
    enough = weights(made("mfm", hidden))
    return next(found for h in range(hidden, 100 * hidden) if weights(found := made(kind, h)) >= enough)


def train(meta: MetaFlowMatching, data: Data, seed: int, *, steps: int, batch: int, points: int, lr: float) -> None:
    """Adam with a cosine to zero, on ``points`` of ``batch`` populations a step, the same for all models."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(meta.parameters(), lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        which = torch.randperm(len(data.x0), generator=generator)[:batch]
        some = torch.randperm(data.x0.shape[1], generator=generator)[:points]
        cond = condition(meta, which, len(data.x0))
        loss = meta.loss(data.x0[which][:, some], data.x1[which][:, some], cond=cond, generator=generator)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()


def condition(meta: MetaFlowMatching, which: Tensor | None, populations: int, count: int = 0) -> Tensor | None:
    """One-hot, of a training population; equal parts of all, of others, as the official code has it."""
    velocity: Any = meta.velocity
    if not velocity.cond:
        return None
    if which is None:
        return torch.full((count, populations), 1 / populations)
    return torch.nn.functional.one_hot(which, populations).float()


def predict(meta: MetaFlowMatching, data: Data) -> Tensor:
    """The test populations after, predicted from those before."""
    return meta.transport(data.test0, cond=condition(meta, None, len(data.x0), len(data.test0)))


def rms_w2(predicted: Tensor, true: Tensor) -> float:
    """The root of the mean over populations of the squared 2-Wasserstein distance."""
    each = [wasserstein(a, b) ** 2 for a, b in zip(predicted, true, strict=True)]
    return math.sqrt(sum(each) / len(each))
