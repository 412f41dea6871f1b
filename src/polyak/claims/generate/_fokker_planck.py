"""What the trials of the ODE-SDE gap measure: exact densities, and trained potentials on the line. This module imports torch."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from scipy.linalg import solve_banded
from torch import Tensor

from polyak.claims.generate._interpolants import bernoulli, quantiles
from polyak.core.distances import wasserstein_1d
from polyak.generate import (
    EDM,
    OU,
    VP,
    Denoiser,
    Heun,
    PotentialNet,
    Process,
    exact_ode_logdensity,
    fp_regularized_loss,
    log_fp_residual,
    log_likelihood,
    sample,
    score_fp_residual,
    wasserstein_bound,
)
from polyak.generate.problems import ExactDenoiser, Mixture

LAW = Mixture([[-1.5], [0.0], [1.8]], [0.15**2, 0.1**2, 0.25**2], [0.5, 0.3, 0.2])
PLANE = Mixture([[-1.0, 0.3], [0.6, -0.5]], torch.tensor([[0.25, 0.5], [0.09, 0.3]]), [0.4, 0.6])
PROCESSES = (OU(), VP(), EDM(0.1, 10.0))
CELLS, REACH, LEVELS = 1000, 6.0, 4000  # of the line: cells, half width, quantiles


class Doubled(Process):
    """Another process with ``g^2`` where the equation has ``g^2 / 2``."""

    def __init__(self, process: Process) -> None:
        self.process, self.t_min, self.t_max = process, process.t_min, process.t_max

    def _log_alpha(self, t: Tensor) -> Tensor:
        return self.process._log_alpha(t)

    def _log_sigma(self, t: Tensor) -> Tensor:
        return self.process._log_sigma(t)

    def diffusion2(self, t: Any) -> Any:
        return 2 * self.process.diffusion2(t)


class Anchored(PotentialNet):
    """The log density of OU's prior, up to a constant, and a network: with no data far out, its score is right there."""

    def forward(self, x: Tensor, t: float | Tensor) -> Tensor:
        return super().forward(x, t) - x.flatten(1).square().sum(1)


def made(kind: type[PotentialNet], dim: int, seed: int, width: int, beta: float, dtype: torch.dtype) -> PotentialNet:
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        return kind(dim, width, beta=beta).to(dtype)


def denoiser(score: Any, process: OU) -> Denoiser:
    return Denoiser(score, process, "score", label=lambda t: t)


def train(o: Any, seed: int, device: str) -> PotentialNet:
    """Adam whose rate falls by a cosine. ``only_end`` leaves the residual out, and keeps the terminal term."""
    process, weight = OU(t_min=1e-3, t_max=o["t_max"]), o["weight"]
    net = made(Anchored if o["anchored"] else PotentialNet, 1, seed, o["width"], o["beta"], torch.float32).to(device)
    draw, end = (torch.Generator(device).manual_seed(seed + k) for k in (0, 1000))
    # The same data and the same order for all arms of a seed.
    data = LAW.sample(o["steps"] * o["batch"], generator=torch.Generator().manual_seed(seed)).float().to(device)
    optimizer = torch.optim.Adam(net.parameters(), o["lr"])
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, o["steps"])
    for x0 in data.split(o["batch"]):
        loss = fp_regularized_loss(net, process, x0, 0.0 if o["only_end"] else weight, o["preset"], generator=draw)[
            "loss"
        ]
        if o["only_end"]:
            x = process.prior(x0.shape, generator=end)
            loss = loss + weight * (net.score(x, process.t_max) + x / process.prior_std**2).square().mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
    return net.requires_grad_(False).cpu()


def judged(net: PotentialNet, o: Any, seed: int) -> dict[str, float]:
    """Distances between the laws of the ODE's samples, of the SDE's, and of the data; what is left of both losses."""
    process = OU(t_min=1e-3, t_max=o["t_max"])
    ode, sde, data = laws(denoiser(net.score, process), process, o["ode_steps"], o["sde_steps"], torch.float32)
    draw = torch.Generator().manual_seed(seed + 2000)
    with torch.no_grad():
        left = fp_regularized_loss(net, process, LAW.sample(4096, generator=draw).float(), 1.0, generator=draw)
    ways = {"ode_sde": (ode, sde), "ode_data": (ode, data), "sde_data": (sde, data)}
    found = {name: wasserstein_1d(x, y).item() for name, (x, y) in ways.items()}
    return found | {"residual": left["residual"].sqrt().item(), "loss": left["dsm"].item()}


def laws(
    field: Denoiser, process: OU, ode_steps: int, sde_steps: int, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Tensor]:
    """Quantiles of the ODE's law, of the SDE's and of the data's at t_min, (n, 1): no noise of sampling."""
    levels = (torch.arange(LEVELS, dtype=torch.float64) + 0.5) / LEVELS
    # On the line the ODE keeps the order of its points: it takes quantiles to quantiles.
    start = torch.special.ndtri(levels)[:, None] * process.prior_std
    ode = sample(field, start.to(dtype), solver=Heun(), steps=ode_steps, grid="quadratic").double()
    alpha, sigma = process.alpha(process.t_min), process.sigma(process.t_min)
    data = Mixture(alpha * LAW.means, alpha**2 * LAW.variances[:, 0] + sigma**2, LAW.weights)
    return ode, _sde_quantiles(field, process, levels, sde_steps, dtype), quantiles(data, levels)


def _sde_quantiles(field: Denoiser, process: OU, levels: Tensor, steps: int, dtype: torch.dtype) -> Tensor:
    """From the Fokker-Planck equation of the reverse SDE: fluxes of Scharfetter and Gummel, by the trapezoidal rule."""
    h = 2 * REACH / CELLS
    edges = torch.linspace(-REACH, REACH, CELLS + 1, dtype=torch.float64)
    mass, faces = np.diff(torch.special.ndtr(edges / process.prior_std).numpy()), edges[1:-1, None]
    for s, t in pairwise(process.grid(steps, "quadratic").tolist()):
        dt, at = s - t, (s + t) / 2
        g2 = process.diffusion2(at)
        drift = g2 * field(faces.to(dtype), at).score.double() - process.drift(at) * faces
        peclet = np.clip(drift[:, 0].numpy() * h / (g2 / 2), -600, 600)
        up, down = (g2 / 2 / h**2 * bernoulli(w) for w in (-peclet, peclet))  # of mass that crosses a face
        across = dt / 2 * (up * mass[:-1] - down * mass[1:])
        mass = mass - np.append(across, 0) + np.append(0, across)
        band = np.ones((3, CELLS))
        band[0, 1:], band[2, :-1] = -dt / 2 * down, -dt / 2 * up
        band[1, :-1] += dt / 2 * up
        band[1, 1:] += dt / 2 * down
        mass = solve_banded((1, 1), band, mass)
    below = np.concatenate([[0.0], np.cumsum(mass)])
    return torch.from_numpy(np.interp(levels.numpy(), below / below[-1], edges.numpy()))[:, None]


def equations(seed: int, o: Any) -> dict[str, float]:
    """The largest errors of what is exact: the equation of true densities, of any network's, and of densities by the ODE."""
    draw = torch.Generator().manual_seed(seed)
    found = dict[str, float]()
    x = 1.5 * torch.randn(o["points"], 2, dtype=torch.float64, generator=draw)
    residuals, shifts = list[Tensor](), list[Tensor]()
    for process in PROCESSES:
        exact = ExactDenoiser(PLANE, process)
        t = process.t_min + (process.t_max - process.t_min) * (0.05 + 0.9 * torch.rand(len(x), generator=draw).double())
        asked = Doubled(process) if o["doubled"] else process

        def wrong(x: Tensor, t: Any, exact: ExactDenoiser = exact) -> Tensor:
            return exact.log_prob(x, t) * o["stretch"]

        plain = log_fp_residual(wrong, asked, x, t)
        residuals.append(plain.abs().max())
        shifted = log_fp_residual(lambda x, t, wrong=wrong: wrong(x, t) + torch.sin(t), asked, x, t)
        shifts.append((shifted - plain - torch.cos(t)).abs().max())
    found["missed"], found["shift"] = max(residuals).item(), max(shifts).item()
    process, net = OU(t_max=2.0), made(PotentialNet, 2, seed, 24, 5.0, torch.float64)
    y = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(log_fp_residual(net, process, y, 0.3).sum(), y)
    off = score_fp_residual(net.score, process, x, 0.3) - gradient
    found["gradient"] = (off.abs().max() / gradient.abs().max()).item()
    told = log_likelihood(denoiser(net.score, process), process, x, steps=100, grid="quadratic")
    if o["ignored"]:  # as if e^u were the ODE's density
        ours = net(x, process.t_min)
    else:
        ours = exact_ode_logdensity(net, process, x, 100, grid="quadratic")
    return found | {"density": (ours - told).abs().max().item()}


def contracted(seed: int, stretch: float, o: Any) -> dict[str, float]:
    """N(0, 0.3) with ``stretch`` times its score: the gap in closed form, and what the bound says."""
    process, c = OU(t_min=1e-2, t_max=3.0), 0.3
    exact = ExactDenoiser(Mixture([[0.0]], c), process)

    def field(x: Tensor, t: Any) -> Tensor:
        return stretch * exact.score(x, t)

    bound = wasserstein_bound(
        denoiser(field, process), process, (1,), o["samples"], o["bound_steps"],
        torch.Generator().manual_seed(seed), dtype=torch.float64,
    )  # fmt: skip
    log_ode, variance, n = math.log(process.prior_std), process.prior_std**2, 20_000
    times = process.grid(n, "quadratic").tolist()
    for s, t in pairwise(times):  # Euler's rule at the middle: both are off by 1e-7 at most
        at, dt = (s + t) / 2, s - t
        v = math.exp(-2 * at) * (c - 0.5) + 0.5
        log_ode += dt * (1 - stretch / (2 * v))
        rate = 2 * (1 - stretch / v)
        variance = variance * math.exp(rate * dt) + math.expm1(rate * dt) / rate
    w2 = abs(math.exp(log_ode) - math.sqrt(variance))
    return {"over_bound": w2 / bound.w2.item(), "gap": w2, "bound": bound.w2.item()}
