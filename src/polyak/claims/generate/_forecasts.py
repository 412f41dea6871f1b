"""Forecasts that are known, and fields that are advected by us: data, networks and scores. This module imports torch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, interpolate

from polyak.generate import EDM, ContextDropout, Denoiser, Euler, Flow, ensemble_forecast, train_denoiser
from polyak.generate.cogdpm import Forecast

PIXELS, NARROW, WIDE = 64, 0.02, 0.98
FLOW = Flow(t_min=1e-3, t_max=0.999)
PROCESS = EDM(sigma_min=0.01, sigma_max=20.0)


class Known:
    """Pixels ``x = sqrt(1 - c) z + sqrt(c) e``, z and e standard normal: after z their variance is c, without it 1.

    The model under-uses its context: its mean is ``(1 - 0.6 c) sqrt(1 - c) z``, so that guidance away from the law without
    context, N(0, 1), has something to mend where the variance is large.
    """

    def __init__(self, seed: int, cases: int) -> None:
        draw = torch.Generator().manual_seed(seed)
        self.variance = torch.linspace(NARROW, WIDE, PIXELS, dtype=torch.float64)
        self.context = torch.randn(cases, PIXELS, generator=draw, dtype=torch.float64)
        noise = torch.randn(cases, PIXELS, generator=draw, dtype=torch.float64)
        self.truth = (1 - self.variance).sqrt() * self.context + self.variance.sqrt() * noise
        self.seed = seed

    def mean(self, context: Tensor) -> Tensor:
        return (1 - 0.6 * self.variance) * (1 - self.variance).sqrt() * context

    def denoiser(self, context: Tensor) -> Denoiser:
        mean = self.mean(context)

        def of(mean: Any, variance: Any) -> Any:
            return lambda x, s: mean + variance / (variance + s[:, None] ** 2) * (x - mean)

        return Denoiser(
            of(mean, self.variance), PROCESS, "sample", unconditional=of(0.0, torch.ones(())), label=lambda t: t
        )

    def forecast(self, guidance: Any, members: int, steps: int = 18) -> Forecast:
        draw = torch.Generator().manual_seed(self.seed + 10_000)
        return ensemble_forecast(
            self.denoiser, self.context, solver=Euler(), steps=steps, grid="karras", members=members, guidance=guidance,
            generator=draw,
        )  # fmt: skip


def ranks(x: Tensor) -> Tensor:
    return x.argsort(-1).argsort(-1).to(torch.float64)


def spearman(x: Tensor, y: Tensor) -> Tensor:
    """The rank correlation over the last dimension, without ties."""
    a, b = (ranks(v) - (v.shape[-1] - 1) / 2 for v in (x, y))
    return (a * b).sum(-1) / (a.square().sum(-1) * b.square().sum(-1)).sqrt()


# --- advection

SIZE, PAST, AHEAD, BAND = 16, 4, 4, 8  # pixels, frames of context, frames ahead, rows of one band


def advected(n: int, draw: torch.Generator) -> tuple[Tensor, Tensor]:
    """Two bands of a tracer, each carried along its rows by a wind of its own, on a periodic square: frames (n, 8, 16, 16).

    A band is warm (its tracer about 0.5) or cold (about -0.5). The wind of a cold band stays; that of a warm one jumps after the
    last frame of the context by a normal number of one pixel a frame. Also returned: which pixels are warm, (n, 1, 16, 16).
    """
    shape = (n, SIZE // BAND)
    warm = torch.rand(shape, generator=draw) < 0.5
    wind = 2 * torch.rand(shape, generator=draw) - 1
    jump = torch.randn(shape, generator=draw) * warm
    frames = torch.arange(PAST + AHEAD)
    moved = wind[..., None] * frames + jump[..., None] * (frames - PAST + 1).clamp(min=0)
    k = torch.arange(SIZE // 2 + 1)
    # A smooth random field in each band: few waves along the rows, and two across them.
    size = torch.exp(-((k / 2.0) ** 2)) * (k > 0)
    waves = torch.complex(*torch.randn(2, *shape, 2, len(k), generator=draw)) * size
    rows = torch.arange(BAND) / BAND * torch.pi
    across = torch.stack([rows.cos(), rows.sin()], 1).to(waves.dtype)
    still = torch.einsum("rm,nbmk->nbrk", across, waves)
    turn = torch.exp(-2j * torch.pi / SIZE * moved[..., None] * k)  # (n, bands, frames, k)
    field = torch.fft.irfft(still[:, :, None] * turn[:, :, :, None], SIZE, norm="forward")
    field = 0.35 * field + (warm.float() - 0.5)[..., None, None, None]
    whole = field.permute(0, 2, 1, 3, 4).reshape(n, PAST + AHEAD, SIZE, SIZE)
    where = warm[:, :, None, None].expand(-1, -1, BAND, SIZE).reshape(n, 1, SIZE, SIZE)
    return whole, where


class Block(nn.Module):
    """Two convolutions about the time's embedding, on a periodic square, and what they are added to."""

    def __init__(self, inside: int, out: int, embed: int) -> None:
        super().__init__()
        conv = dict(kernel_size=3, padding=1, padding_mode="circular")
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
    frames, _ = advected(sequences, draw)
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)  # initial weights and dropout come from torch's global generator
        rows = Rows(Net(width), frames[:, :PAST], 0.15)
        made = train_denoiser(
            rows, frames[:, PAST:], FLOW, "flow", labels=torch.arange(sequences), drop=0.0, steps=steps, batch=batch,
            lr=lr, generator=draw,
        )  # fmt: skip
    return made.network
