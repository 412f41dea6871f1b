"""Fields that are advected, our own data: what they are, a network that forecasts them, and forecasts without one.

This module imports torch.
"""

from __future__ import annotations

from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, interpolate

from polyak.generate import (
    ContextDropout,
    Denoiser,
    DPMSolverMultistep,
    Flow,
    context_denoiser,
    ensemble_forecast,
    train_denoiser,
)
from polyak.generate.cogdpm import Forecast

FLOW = Flow(t_min=1e-3, t_max=0.999)

SIZE, PAST, AHEAD, BAND, JUMP = 16, 4, 4, 8, 0.4  # pixels, frames of context and ahead, rows of a band, pixels a frame


def advected(n: int, draw: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Two bands of a tracer, each carried along its rows by a wind of its own, on a periodic square.

    A band is warm (its tracer about 0.5) or cold (about -0.5). The wind of a cold band stays; that of a warm one jumps after the
    last frame of the context, by a normal number of deviation 0.4 pixels a frame.

    Returns:
        Frames (n, 8, 16, 16); which bands are warm, (n, 2); the winds before, (n, 2), in pixels a frame.
    """
    shape = (n, SIZE // BAND)
    warm = torch.rand(shape, generator=draw) < 0.5
    wind = 2 * torch.rand(shape, generator=draw) - 1
    jump = JUMP * torch.randn(shape, generator=draw) * warm
    frames = torch.arange(PAST + AHEAD)
    moved = wind[..., None] * frames + jump[..., None] * (frames - PAST + 1).clamp(min=0)
    k = torch.arange(SIZE // 2 + 1)
    # A smooth random field in each band: few waves along the rows, and two across them.
    size = torch.exp(-((k / 2.0) ** 2)) * (k > 0)
    waves = torch.complex(*torch.randn(2, *shape, 2, len(k), generator=draw)) * size
    rows = torch.arange(BAND) / BAND * torch.pi
    across = torch.stack([rows.cos(), rows.sin()], 1).to(waves.dtype)
    still = torch.einsum("rm,nbmk->nbrk", across, waves)
    turn = _turn(moved, k)  # (n, bands, frames, k)
    field = torch.fft.irfft(still[:, :, None] * turn[:, :, :, None], SIZE, norm="forward")
    field = 0.35 * field + (warm.float() - 0.5)[..., None, None, None]
    whole = field.permute(0, 2, 1, 3, 4).reshape(n, PAST + AHEAD, SIZE, SIZE)
    return whole, warm, wind


class Block(nn.Module):
    """Two convolutions about the time's embedding, on a periodic square, and what they are added to."""

    def __init__(self, inside: int, out: int, embed: int) -> None:
        super().__init__()
        conv: Any = dict(kernel_size=3, padding=1, padding_mode="circular")
        self.first = nn.Sequential(nn.GroupNorm(4, inside), nn.SiLU(), nn.Conv2d(inside, out, **conv))
        self.time = nn.Linear(embed, out)
        self.second = nn.Sequential(nn.GroupNorm(4, out), nn.SiLU(), nn.Conv2d(out, out, **conv))
        self.skip = nn.Conv2d(inside, out, 1) if inside != out else nn.Identity()

    def forward(self, x: Tensor, e: Tensor) -> Tensor:
        return self.skip(x) + self.second(self.first(x) + self.time(e)[:, :, None, None])


class Net(nn.Module):
    """A U-Net of three levels: ``(x, label of t, told) -> output``, all told as further channels."""

    def __init__(self, width: int = 16, embed: int = 32) -> None:
        super().__init__()
        w = width
        self.time = nn.Sequential(nn.Linear(16, embed), nn.SiLU(), nn.Linear(embed, embed))
        self.enter = nn.Conv2d(AHEAD + PAST + 1, w, 3, padding=1, padding_mode="circular")
        self.high, self.middle, self.low = Block(w, w, embed), Block(w, 2 * w, embed), Block(2 * w, 2 * w, embed)
        self.rise, self.top = Block(4 * w, 2 * w, embed), Block(3 * w, w, embed)
        self.leave = nn.Conv2d(w, AHEAD, 3, padding=1, padding_mode="circular")

    def forward(self, x: Tensor, label: Tensor, told: Tensor) -> Tensor:
        waves = label[:, None].to(x.dtype) * 2.0 ** torch.arange(-3, 5, device=x.device)
        e = self.time(torch.cat([waves.sin(), waves.cos()], 1))
        high = self.high(self.enter(torch.cat([x, told], 1)), e)
        middle = self.middle(avg_pool2d(high, 2), e)
        low = self.low(avg_pool2d(middle, 2), e)
        middle = self.rise(torch.cat([middle, interpolate(low, scale_factor=2.0)], 1), e)
        return self.leave(self.top(torch.cat([high, interpolate(middle, scale_factor=2.0)], 1), e))


class Rows(nn.Module):
    """A network that is told the context of a row of the data, or nothing, for :func:`polyak.generate.train_denoiser`."""

    def __init__(self, network: Net, contexts: Tensor, drop: float) -> None:
        super().__init__()
        self.network, self.drop = network, ContextDropout(drop)
        self.contexts = contexts

    def forward(self, x: Tensor, label: Tensor, rows: Tensor) -> Tensor:
        return self.network(x, label, self.drop(self.contexts[rows]))


def trained(seed: int, *, sequences: int, steps: int, batch: int, width: int, lr: float) -> Net:
    """A network of so many steps of Adam, on as many sequences of the seed's."""
    draw = torch.Generator().manual_seed(seed)
    frames, _, _ = advected(sequences, draw)
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)  # initial weights and dropout come from torch's global generator
        rows = Rows(Net(width), frames[:, :PAST], 0.15)
        made = train_denoiser(
            rows, frames[:, PAST:], FLOW, "flow", labels=torch.arange(sequences), drop=0.0, steps=steps, batch=batch,
            lr=lr, generator=draw,
        )  # fmt: skip
    return made.network.requires_grad_(False)


def cases_of(seed: int, cases: int) -> tuple[Tensor, Tensor]:
    """What is to be forecast: the frames seen, and those that come."""
    frames, _, _ = advected(cases, torch.Generator().manual_seed(seed + 10_000))
    return frames[:, :PAST], frames[:, PAST:]


class Advection:
    """The cases of a seed, and the forecasts of a network that was trained on others."""

    def __init__(self, seed: int, cases: int, members: int, **training: Any) -> None:
        self.seed, self.members = seed, members
        self.context, self.truth = cases_of(seed, cases)
        network = trained(seed, **training)
        self.make = partial(context_denoiser, network, process=FLOW, prediction="flow")

    def forecast(self, guidance: Any, rows: slice) -> Forecast:
        draw = torch.Generator().manual_seed(self.seed + 20_000)
        return ensemble_forecast(
            self.make, self.context[rows], solver=DPMSolverMultistep(order=2, form="data"), steps=10, members=self.members,
            guidance=guidance, generator=draw,
        )  # fmt: skip


@lru_cache(maxsize=8)
def problem(seed: int, cases: int, members: int, **training: Any) -> Advection:
    """The same for all arms of a seed."""
    return Advection(seed, cases, members, **training)


def persistence(context: Tensor) -> Tensor:
    """The last frame, for all frames ahead."""
    return context[:, -1:].expand(-1, AHEAD, -1, -1)


def extrapolated(context: Tensor, rows: int = 4) -> Tensor:
    """The last frame moved on by the wind that, for so many rows at a time, best explains the step from the frame before."""
    k = torch.arange(SIZE // 2 + 1)
    before, last = (torch.fft.rfft(context[:, i]) for i in (-2, -1))
    winds = torch.arange(-60, 61) / 20  # pixels a frame
    moved = torch.fft.irfft(before[:, None] * _turn(winds, k)[:, None], SIZE)
    miss = (moved - context[:, None, -1]).square().unflatten(-2, (-1, rows)).sum((-1, -2))
    wind = winds[miss.argmin(1)].repeat_interleave(rows, 1)  # (n, rows of the field)
    ahead = torch.arange(1, AHEAD + 1)[:, None] * wind[:, None]
    return torch.fft.irfft(last[:, None] * _turn(ahead, k), SIZE)


def _turn(moved: Tensor, k: Tensor) -> Tensor:
    return torch.exp(-2j * torch.pi / SIZE * moved[..., None] * k)


def exact(last: Tensor, warm: Tensor, wind: Tensor, process: Any, candidates: int = 81) -> Denoiser:
    """The best denoiser of the frames ahead of one last frame (16, 16), of bands and winds that are known, shape (2,).

    In a warm band the wind may have jumped by any of so many numbers, each as likely as a normal law says. Without the context it
    is the denoiser of independent pixels with the data's variance.
    """
    jump = torch.linspace(-3, 3, candidates)
    wave = torch.fft.rfft(last.reshape(-1, BAND, SIZE))[:, None, None]  # (bands, 1, 1, rows, waves)
    winds = wind[:, None] + JUMP * jump * warm[:, None]
    ahead = winds[:, :, None] * torch.arange(1, AHEAD + 1)
    turn = _turn(ahead, torch.arange(SIZE // 2 + 1))
    futures = torch.fft.irfft(wave * turn[:, :, :, None], SIZE)  # (bands, candidates, frames, rows, columns)

    def conditional(x: Tensor, label: Tensor) -> Tensor:
        s = label[0]
        seen = x.unflatten(2, (-1, BAND)).movedim(2, 1)  # (B, bands, frames, rows, columns)
        off = (seen[:, :, None] - futures).square().sum((-3, -2, -1)) / (2 * s**2)
        share = (-off - jump**2 / 2).softmax(2)
        return torch.einsum("bnk,nkfrc->bfnrc", share, futures).flatten(2, 3)

    def unconditional(x: Tensor, label: Tensor) -> Tensor:
        return 0.55 / (0.55 + label[0] ** 2) * x

    return Denoiser(conditional, process, "sample", unconditional=unconditional, label=lambda t: t)
