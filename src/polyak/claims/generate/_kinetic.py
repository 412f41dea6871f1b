"""What kinetic_optimal's claim measures, on laws that are known and on digits. This module imports torch."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import pairwise

import torch
from torch import Tensor, nn

from polyak.generate import (
    VP,
    Denoiser,
    Euler,
    Flow,
    KineticOptimal,
    Process,
    Separation,
    TrigFlow,
    gaussian_separation,
    kinetic_energy,
    sample,
    separation_function,
    train_denoiser,
)
from polyak.generate.problems import ExactDenoiser, Mixture, kde, sliced_wasserstein

DIM, EPS = 64, 1e-3
INNER = 1e-4  # of the range of times at either end, where the speed is not looked at
OTHER = [8.0] + [0.5] * 14  # a spectrum that is not the digits'


def path(name: str, separation: Separation | None, t_min: float | None = None, t_max: float = 1.0) -> Process:
    """An arm's path; the method's is made from the separation function."""
    if name == "vp":
        return VP(beta0=0.1, beta1=20.0, t_min=1e-3 if t_min is None else t_min, t_max=t_max)
    if name == "ko":
        assert separation is not None
        return KineticOptimal(separation, t_min=t_min or 0.0, t_max=t_max)
    if name == "other":
        return KineticOptimal(gaussian_separation(OTHER))
    return {"cond_ot": Flow, "trig": TrigFlow}[name](t_min=t_min or 0.0, t_max=t_max)


def normalised(x: Tensor, square: float = 1.0) -> Tensor:
    """Mean 0, and one scale for all features."""
    x = x - x.mean(0)
    return x * (square / x.square().mean()).sqrt()


def digits(n: int, generator: torch.Generator) -> Tensor:
    """n of the digits in random order, (n, 64)."""
    from polyak.lab import data

    x = torch.from_numpy(data.digits()[0]).to(torch.float64)
    return x[torch.randperm(len(x), generator=generator)[:n]]


# --------------------------------------------------------------------------------------------- Gaussians, in closed form


class Spectrum:
    """N(0, diag c) with c log-normal, of mean 1: mode i moves as ``sqrt(alpha^2 c_i + sigma^2)``, whence speeds and energies."""

    def __init__(self, seed: int, modes: int = 12) -> None:
        self.draw = torch.Generator().manual_seed(seed)
        c = torch.randn(modes, generator=self.draw, dtype=torch.float64).mul(1.2).exp()
        self.c = c / c.mean()
        self.separation = gaussian_separation(self.c)

    def least(self, points: int = 100_000) -> float:
        """``4 sin^2(Phi / 2)``, Phi by the midpoint rule."""
        q = math.pi / 2 * (torch.arange(points, dtype=torch.float64) + 0.5) / points
        cos, sin = q.cos().square(), q.sin().square()
        metric = 1 - torch.stack([c / (cos + c * sin) for c in self.c]).mean(0)
        return 4 * math.sin(metric.clamp(min=0).sqrt().mean().item() * math.pi / 4) ** 2

    def speeds(self, a: Tensor, m: Tensor, da: Tensor, dm: Tensor) -> Tensor:
        a, m, da, dm = (x[:, None] for x in (a, m, da, dm))
        return ((a * da * self.c + m * dm).square() / (a**2 * self.c + m**2)).mean(1)

    def measure(self, process: Process) -> dict[str, float]:
        n, span = 20_000, process.t_max - process.t_min
        turn = math.pi * (torch.arange(n, dtype=torch.float64) + 0.5) / n
        t = process.t_min + span * torch.sin(turn / 2).square()
        length = span * math.sin(math.pi / (2 * n)) * turn.sin()
        given = process.alpha(t), process.sigma(t), process.dalpha(t), process.dsigma(t)
        speeds = self.speeds(*given)
        energy = (speeds * length).sum().item()
        formula = abs(kinetic_energy(process, self.separation, 4000) / energy - 1)
        inner = (t - process.t_min > INNER * span) & (process.t_max - t > INNER * span)
        steady = (speeds[inner] / energy - 1).abs().max().item()
        share, k = (t[:, None] - process.t_min) / span, math.pi * torch.arange(1, 4, dtype=torch.float64)
        sines, slopes = (k * share).sin().T, (k / span * (k * share).cos()).T
        first, gain = 0.0, 0.0
        for _ in range(12):  # directions, which keep the ends
            by = torch.randn(2, 3, generator=self.draw, dtype=torch.float64)
            change = [*(by @ sines), *(by @ slopes)]
            moved = [
                (self.speeds(*(x + s * dx for x, dx in zip(given, change, strict=True))) * length).sum().item() - energy
                for s in (EPS, -EPS)
            ]
            first = max(first, abs(moved[0] - moved[1]) / (2 * EPS))
            gain = max(gain, -min(moved))
        return {
            "formula": formula,
            "steady": steady,
            "over_least": energy / self.least(),
            "variation": first,
            "gain": gain,
        }


# ----------------------------------------------------------------------------------------------------- energies of data sets


@lru_cache(maxsize=64)
def separation(kind: str, n: int, d: int, seed: int, draws: int, which: int) -> Separation:
    """Of a data set. The first estimate is the one that a path is made of; by the second all paths are judged."""
    draw = torch.Generator().manual_seed(seed)
    x = digits(n, draw) if kind == "digits" else torch.randn(n, d, generator=draw, dtype=torch.float64)
    return separation_function(
        normalised(x), n_samples=draws, generator=torch.Generator().manual_seed(2 * seed + which)
    )


def energy(arm: str, kind: str, n: int, d: int, seed: int, draws: int) -> tuple[float, float]:
    """An arm's energy, and its excess over the least possible, relative to this."""
    judge = separation(kind, n, d, seed, draws, 1)
    own = separation(kind, n, d, seed, draws, 0) if arm == "ko" else None
    found = kinetic_energy(path(arm, own), judge)
    return found, found / KineticOptimal(judge).energy - 1


# ------------------------------------------------------------------------------------------------------- samples of digits


@lru_cache(maxsize=8)
def _law(seed: int, n: int, h: float, samples: int, draws: int) -> tuple[Mixture, Separation, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    points = normalised(digits(n, draw), 1 - h**2)
    own = separation_function(points, n_samples=draws, generator=draw, h=h)
    law = kde(points, h)
    noise = torch.randn(samples, DIM, generator=draw, dtype=torch.float64)
    return law, own, noise, law.sample(4 * samples, generator=draw)


def distance(x: Tensor, truth: Tensor, seed: int) -> float:
    return sliced_wasserstein(x, truth, projections=200, generator=torch.Generator().manual_seed(seed))


def distances(
    arm: str, seed: int, budgets: Sequence[int], *, n: int, h: float, samples: int, draws: int, low: float, high: float
) -> Iterator[tuple[int, float]]:
    """Of samples by Euler's method from the exact denoiser, in equal steps of an arm's own time, from an snr to another."""
    law, own, noise, truth = _law(seed, n, h, samples, draws)
    process = path(arm, own)
    first, last = (process.t_of_lam(math.log(snr)) for snr in (low, high))
    start = (
        math.hypot(process.alpha(first), process.sigma(first)) * noise
    )  # of the variance that normalised data have there
    for steps in budgets:
        grid = process.grid(steps, "time", start=first, end=last)
        x = sample(ExactDenoiser(law, process), start, solver=Euler(), grid=grid) / process.alpha(last)
        yield steps, distance(x, truth, seed)


# ------------------------------------------------------------------------------------------------------------------ training


class Net(nn.Module):
    """A velocity field on 64 pixels: three hidden layers, told the time by sines."""

    rates: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        sizes = (DIM + 32, width, width, width)
        hidden = [layer for a, b in pairwise(sizes) for layer in (nn.Linear(a, b), nn.SiLU())]
        self.layers = nn.Sequential(*hidden, nn.Linear(width, DIM))
        self.register_buffer("rates", torch.logspace(0, 2, 16))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        angle = t[:, None] * self.rates
        return self.layers(torch.cat([x, angle.sin(), angle.cos()], -1))


def trained(
    arm: str,
    seed: int,
    budgets: Sequence[int],
    *,
    h: float,
    draws: int,
    low: float,
    high: float,
    steps: int,
    width: int,
) -> dict[str, float]:
    """A network that has learned the flow along an arm's path: its samples' distances to test images, and their likelihood.

    Images carry Gaussian noise of deviation h, so that they have a density. Every fifth is for testing.
    """
    draw = torch.Generator().manual_seed(seed)
    points = normalised(digits(1797, draw), 1 - h**2)
    train, test = points[len(points) // 5 :], points[: len(points) // 5]

    def noisy(x: Tensor, copies: int) -> Tensor:
        x = x.repeat(copies, 1)
        return x + h * torch.randn(x.shape, generator=draw, dtype=torch.float64)

    images, truth, held = noisy(train, 8), noisy(test, 4), noisy(test, 1)
    noise = torch.randn(1000, DIM, generator=draw, dtype=torch.float64)
    sign = torch.randint(2, held.shape, generator=draw).double() * 2 - 1
    draws_of = torch.Generator().manual_seed(seed)
    own = (
        separation_function(normalised(train, 1 - h**2), n_samples=draws, generator=draws_of, h=h)
        if arm == "ko"
        else None
    )
    whole = path(arm, own)
    last, first = (whole.t_of_lam(math.log(snr)) for snr in (high, low))
    process = path(arm, own, t_min=last, t_max=first)
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)  # the initial weights are drawn from torch's global generator
        net = Net(width)
    net = train_denoiser(net, images.float(), process, "flow", steps=steps, ema=0.99, generator=draw)
    denoiser = Denoiser(net, process, "flow")
    found = {}
    for budget in budgets:
        x = sample(denoiser, (process.prior_std * noise).float(), solver=Euler(), steps=budget, grid="time")
        found[f"w2_{budget}"] = distance(x / process.alpha(last), truth, seed)
    return {**found, "nll": nll(net, process, held, sign)}


def nll(net: nn.Module, process: Process, x1: Tensor, sign: Tensor, steps: int = 40) -> float:
    """Nats per dimension, along the flow from data to noise by Heun's method; divergences by Hutchinson's estimate, given signs."""
    times = process.grid(steps, "logsnr").flip(0).tolist()
    x, total = (process.alpha(times[0]) * x1).float(), torch.zeros(len(x1), dtype=torch.float64)

    def field(x: Tensor, t: float) -> tuple[Tensor, Tensor]:
        x = x.detach().requires_grad_()
        v = net(x, torch.full((len(x),), t))
        (slope,) = torch.autograd.grad(v, x, sign.float())
        return v.detach(), (slope * sign).sum(1).double()

    for s, t in pairwise(times):
        v, div = field(x, s)
        w, other = field(x + (t - s) * v, t)
        x, total = x + (t - s) / 2 * (v + w), total + (t - s) / 2 * (div + other)
    std = process.prior_std
    log_prob = -0.5 * (x.double() / std).square().sum(1) - DIM * math.log(std * math.sqrt(2 * math.pi))
    return -((log_prob + total).mean().item() / DIM + math.log(process.alpha(times[0])))
