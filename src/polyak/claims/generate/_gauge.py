"""What the trials of gauge freedom measure: exact fields, a plane, and learned models of surfaces. This module imports torch."""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch
from torch import Tensor, nn

from polyak.generate import (
    EDM,
    RK4,
    Denoiser,
    DPMSolverSDE,
    EnergyScore,
    antisymmetric_gauge,
    denoising_loss,
    gauge_residual,
    intrinsic_dimension,
    jacobian_asymmetry,
    log_likelihood,
    matrix_gauge,
    project_conservative,
    sample,
    train_denoiser,
)
from polyak.generate.problems import ExactDenoiser, Gaussian, Mixture

EXACT = EDM(sigma_min=0.02, sigma_max=8.0)
TURN = torch.tensor([[0.0, 1.0], [-1.0, 0.0]])
MEANS = torch.tensor([[-1.5, 0.0], [1.0, 1.0], [0.5, -1.5]], dtype=torch.float64)
VARIANCES = torch.tensor([0.1, 0.2, 0.15], dtype=torch.float64)
AT = 0.3  # the sigma at which single fields are looked at


def law(task: str, stretch: float = 1.0) -> Mixture:
    """The data's law; ``stretch`` multiplies its variances, those between the components included."""
    if task == "gaussian":
        return Gaussian([0.0, 0.0], [4.0 * stretch, 0.25 * stretch])
    return Mixture(MEANS * math.sqrt(stretch), VARIANCES * stretch, [0.3, 0.4, 0.3])


def exact(task: str, seed: int, kappa: float, stretch: float, o: Any) -> dict[str, float]:
    """What is exact of the field ``s + kappa A s``, s the score of the stretched law, and how its samples are distributed."""
    draw = torch.Generator().manual_seed(seed)
    true, model = ExactDenoiser(law(task), EXACT), ExactDenoiser(law(task, stretch), EXACT)
    field = antisymmetric_gauge(model, TURN, kappa)
    denoiser = Denoiser(field, EXACT, "score", label=lambda t: t)
    x = true.law.sample(o["points"], sigma=EXACT.sigma_min, generator=draw)
    told = log_likelihood(denoiser, EXACT, x, steps=o["steps"], prior=lambda end: true.log_prob(end, EXACT.t_max))
    missed = (told - true.log_prob(x, EXACT.t_min)).abs()
    x = true.law.sample(o["points"], sigma=AT, generator=draw)
    scale = true.score(x, AT).square().sum(1).mean()
    found = {
        "missed_most": missed.max(), "missed": missed.mean(), "curl": jacobian_asymmetry(field, x, AT, 2, draw).mean(),
        "residual": gauge_residual(field, true, x, AT).abs().max() / scale,
    }  # fmt: skip
    if task == "gaussian":
        found |= split(true, field, o["fit_steps"])
    start = true.law.sample(o["batches"] * o["samples"], sigma=EXACT.sigma_max, generator=draw)
    for name, solver, steps in (("ode", RK4(), o["ode_steps"]), ("sde", DPMSolverSDE(order=2), o["sde_steps"])):
        made = sample(denoiser, start, solver=solver, steps=steps, grid="logsnr", generator=draw)
        fresh = true.law.sample(len(made), sigma=EXACT.sigma_min, generator=draw)
        pairs = zip(made.split(o["samples"]), fresh.split(o["samples"]), strict=True)
        found[f"z_{name}"] = torch.stack([excess(a, b, o["permutations"], draw) for a, b in pairs]).mean()
    return {name: float(value) for name, value in found.items()}


class Quadratic(nn.Module):
    """``-x^T S x / 2 + b . x``: every linear field's conservative part in a Gaussian has such a potential."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.S = nn.Parameter(torch.eye(size, dtype=torch.float64))
        self.b = nn.Parameter(torch.zeros(size, dtype=torch.float64))

    def forward(self, x: Tensor, t: Any) -> Tensor:
        return -((x @ self.S) * x).sum(1) / 2 + x @ self.b


def split(true: ExactDenoiser, field: Any, steps: int) -> dict[str, Tensor]:
    """The conservative part of a linear field beside the score: relative distance, and the split's angle and Pythagoras.

    Four points that have the Gaussian's mean and covariance give the mean of a quadratic function without error.
    """
    spread = (true.law.covariance + AT**2 * torch.eye(2, dtype=torch.float64)).diagonal().sqrt()
    x = math.sqrt(2) * torch.cat([torch.diag(spread), -torch.diag(spread)])
    found = project_conservative(field, x, AT, Quadratic(2), steps, lr=0.2)
    with torch.no_grad():
        score, gradient = true.score(x, AT), found.gradient(x, AT)
    whole, off = (part.square().sum(1).mean() for part in (field(x, AT) - score, gradient - score))
    sides = off + found.remainder_norm**2
    size = score.square().sum(1).mean()
    return {"split": (off / size).sqrt(), "cos": found.cos.abs(), "pythagoras": (whole - sides).abs() / size}


def excess(x: Tensor, y: Tensor, permutations: int, generator: torch.Generator) -> Tensor:
    """The energy distance of two samples of one size, in standard deviations above its mean over random relabellings."""
    both = torch.cat([x, y])
    far = torch.cdist(both, both)
    side = torch.ones(len(both), dtype=both.dtype)
    side[len(x) :] = -1
    labels = torch.stack(
        [side, *(side[torch.randperm(len(side), generator=generator)] for _ in range(permutations))], 1
    )
    distance = -(labels * (far @ labels)).sum(0)  # 2 E|X-Y| - E|X-X'| - E|Y-Y'|, times n^2
    own, others = distance[0], distance[1:]
    return (own - others.mean()) / others.std()


PLANE, NEAR = EDM(), 0.05  # and the noise at which scores are taken
SIZE, FLAT = 5, 2


def plane(seed: int, kappa: float, o: Any) -> dict[str, float]:
    """A normal law on a plane of two dimensions in five, with a gauge that turns one tangent and one normal direction."""
    draw = torch.Generator().manual_seed(seed)
    true = ExactDenoiser(Gaussian([0.0] * SIZE, [1.0] * FLAT + [0.0] * (SIZE - FLAT)), PLANE)
    pair = torch.zeros(SIZE, SIZE, dtype=torch.float64)
    pair[0, 4], pair[4, 0] = kappa, -kappa

    def B(x: Tensor, t: Any) -> Tensor:
        return torch.cos(x[:, 2] / t)[:, None, None] * pair

    field = matrix_gauge(true, B)
    denoiser = Denoiser(field, PLANE, "score", label=lambda t: t)
    x = torch.zeros(1, SIZE, dtype=torch.float64)
    x[:, :FLAT] = torch.randn(1, FLAT, dtype=torch.float64, generator=draw)
    x *= o["radius"] / x.norm()
    by_score = intrinsic_dimension(denoiser, PLANE, x, "score", sigma_lo=NEAR, points=o["points"], generator=draw)
    by_flow = intrinsic_dimension(denoiser, PLANE, x, sigma_lo=NEAR, sigma_hi=4 * NEAR, steps=o["steps"])
    near = true.law.sample(o["points"], sigma=NEAR, generator=draw)
    scale = true.score(near, NEAR).square().sum(1).mean()
    cosines = torch.linalg.svdvals(by_score.tangent[0, FLAT:, FLAT:])  # between the true normal space and the estimate
    found = {
        "residual": gauge_residual(field, true, near, NEAR).abs().max() / scale,
        "off_score": (by_score.k - FLAT).abs(), "off_flow": (by_flow.k - FLAT).abs(),
        "angle": torch.rad2deg(torch.acos(cosines.min().clamp(max=1))),
    }  # fmt: skip
    return {name: float(value) for name, value in found.items()}


LEARNED = EDM(sigma_min=0.01, sigma_max=20.0)


def surface(shape: str, size: int, n: int, seed: int) -> Tensor:
    """n points of a surface in ``size`` dimensions, about 0.5 in standard deviation, turned by the seed, float32."""
    draw = torch.Generator().manual_seed(seed)
    turned = torch.linalg.qr(torch.randn(size, 3, generator=draw, dtype=torch.float64))[0]
    if shape == "sphere":
        x = torch.randn(n, 3, generator=draw, dtype=torch.float64)
        x = x * (math.sqrt(0.75) / x.norm(dim=1, keepdim=True))
    else:  # the Swiss roll, as scikit-learn has it, at half its size over 6.5
        angle, height = torch.rand(2, n, generator=draw, dtype=torch.float64)
        angle = 1.5 * math.pi * (1 + 2 * angle)
        x = torch.stack([angle * angle.cos(), 21 * height - 10.5, angle * angle.sin()], 1) / 13
    return (x @ turned.mT).float()


class MLP(nn.Module):
    """Three hidden layers of SiLU, told x and the noise's label."""

    def __init__(self, size: int, out: int, width: int) -> None:
        super().__init__()
        widths = [size + 1, width, width, width]
        layers = [f for a, b in itertools.pairwise(widths) for f in (nn.Linear(a, b), nn.SiLU())]
        self.layers = nn.Sequential(*layers, nn.Linear(width, out))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.layers(torch.cat([x, t[:, None]], 1))


def learned(shape: str, size: int, energy: bool, seed: int, device: str, o: Any) -> dict[str, float]:
    """A model of a surface, free or conservative by construction, and at how many of its points it shows two dimensions."""
    points = surface(shape, size, o["data"] + o["points"], seed).to(device)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = EnergyScore(MLP(size, 1, o["width"])) if energy else MLP(size, size, o["width"])
    draw = torch.Generator(device).manual_seed(seed)
    network = train_denoiser(
        network.to(device), points[: o["data"]], LEARNED, "edm", steps=o["steps"], batch=o["batch"], lr=o["lr"], ema=o["ema"],
        generator=draw,
    ).requires_grad_(False)  # fmt: skip
    denoiser = Denoiser(network, LEARNED, "edm")
    x = points[o["data"] :]
    found = intrinsic_dimension(
        denoiser, LEARNED, x, sigma_lo=o["sigma_lo"], sigma_hi=o["sigma_hi"], steps=o["ode_steps"]
    )
    near, _ = LEARNED.perturb(x, o["sigma_lo"], generator=draw)
    asymmetry = jacobian_asymmetry(denoiser, near, o["sigma_lo"], 4, draw)
    with torch.no_grad():
        loss = denoising_loss(denoiser, x.repeat(50, 1), generator=draw)
    found = {"correct": (found.k == 2).double(), "curl": asymmetry, "loss": loss}
    return {name: value.mean().item() for name, value in found.items()}
