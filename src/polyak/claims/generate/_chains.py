"""Denoising MCMC on problems with known answers, on digits whose denoiser has a formula, and on a model that is trained here."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from polyak.claims._images import images
from polyak.core.distances import KernelDistance, minus_distance
from polyak.generate import EDM, VE, Denoiser, DPMSolver, Process, train_denoiser
from polyak.generate.dmcmc import (
    DenoisingLangevinGibbs,
    Integrator,
    KarrasHeun,
    NoiseClassifier,
    NoisePosterior,
    PerSample,
    autocorrelation,
    effective_sample_size,
    heun_per_sample,
    noise_classifier_loss,
    noise_levels,
)
from polyak.generate.dmcmc.scaled import Scaled
from polyak.generate.problems import ExactDenoiser, Gaussian, Mixture, kde

KNOWN, BANDWIDTH, TOP = 400, 0.15, 50.0


# --- solved in closed form


class _Nothing(Integrator):
    """The chain's own state."""

    def __call__(self, scaled: Any, y: Tensor, sigma: Tensor, generator: Any = None) -> Tensor:
        return y


def bias(seed: int, update: str, eta: float, points: int = 320, reach: float = 10.0) -> float:
    """How far what the chain on the line tends to is from what it should: total variation of the law of x, by quadrature.

    The kernel ``sum_sigma p(sigma | x) N(x'; m(x, sigma), eta)`` is made on a grid, m from the part itself (its step less its
    noise), and its stationary law is solved for. The data are a random mixture of two normals; 24 levels from 0.3 to 2.4.
    """
    draw = torch.Generator().manual_seed(seed)
    place, width = torch.rand(2, 2, generator=draw, dtype=torch.float64)
    law = Mixture((2 * place - 1)[:, None], 0.2 + 0.3 * width)
    levels = noise_levels(0.3, 2.4, 24)
    posterior, process = NoisePosterior.exact(law, levels), EDM()
    x = torch.linspace(-reach, reach, points, dtype=torch.float64)
    chance = posterior(x[:, None]).softmax(1)
    if update == "argmax":
        chance = nn.functional.one_hot(chance.argmax(1), len(levels)).double()
    chains = DenoisingLangevinGibbs(
        ExactDenoiser(law, process), process, posterior, eta, 1, integrator=_Nothing(), select="last"
    )
    noise = torch.Generator().manual_seed(seed)
    state = {
        "x": x.repeat_interleave(len(levels))[:, None], "sigma": levels.repeat(points), "generator": noise.get_state(),
        "dtype": torch.float64, "nfe": 0, "warmup_nfe": 0, "emitted": 0, "classified": 0,
    }  # fmt: skip
    chains.load_state_dict(state)
    z = torch.randn(state["x"].shape, generator=noise, dtype=torch.float64)
    mean = (chains.sample(len(z)) - math.sqrt(eta) * z).reshape(points, len(levels), 1)
    to = torch.exp(-((x - mean) ** 2) / (2 * eta))
    kernel = (chance[..., None] * to / to.sum(2, keepdim=True)).sum(1)
    system = torch.cat([kernel.T - torch.eye(points, dtype=torch.float64), torch.ones(1, points, dtype=torch.float64)])
    right = torch.zeros(points + 1, 1, dtype=torch.float64)
    right[-1] = 1
    stationary = torch.linalg.lstsq(system, right).solution[:, 0]
    wanted = torch.stack([law.log_prob(x[:, None], 1.0, s.item()).exp() for s in levels]).mean(0)
    return 0.5 * (stationary - wanted / wanted.sum()).abs().sum().item()


def heun_error(seed: int, steps: int, shared: bool) -> float:
    """The largest error of Heun's method from 16 levels of random rows, on a normal law whose flow is known."""
    draw = torch.Generator().manual_seed(seed)
    law, process = Gaussian([0.3, -0.2], [0.5, 0.05]), EDM(1e-6, 80.0)
    start = torch.exp(4 * torch.rand(16, generator=draw, dtype=torch.float64) - 1)
    x = start[:, None] * torch.randn(16, 2, generator=draw, dtype=torch.float64)
    level = start.median().expand(16) if shared else start
    got = heun_per_sample(ExactDenoiser(law, process), x, level, steps, sigma_min=1e-4)
    want = torch.cat([law.flow(x[i : i + 1], (1.0, s.item()), (1.0, 0.0)) for i, s in enumerate(start)])
    return (got - want).abs().max().item()


def exchange(seed: int, n_skip: int = 3, steps: int = 3) -> tuple[float, float]:
    """How far chains are from themselves in another order; and evaluations that were counted less those that there should be."""
    law, process = Mixture([[-1.0, 0.0], [0.6, 0.5]], [0.1, 0.2]), VE()
    posterior = NoisePosterior.exact(law, noise_levels(n=50))
    order = torch.randperm(6, generator=torch.Generator().manual_seed(seed)).tolist()
    made, counted = [], 0.0
    for rows in (range(6), order):
        denoiser = ExactDenoiser(law, process)
        chains = DenoisingLangevinGibbs(denoiser, process, posterior, 0.2, n_skip, "sample", KarrasHeun(steps, 80.0))
        chains.warmup((6, 2), [torch.Generator().manual_seed(100 * seed + i) for i in rows], dtype=torch.float64)
        before = denoiser.nfe
        made.append(chains.sample(12).reshape(2, 6, 2))
        counted += abs(denoiser.nfe - before - 2 * (n_skip + 2 * steps - 1)) + abs(chains.warmup_nfe - before)
    return (made[0][:, order] - made[1]).abs().max().item(), counted


# --- digits


@lru_cache(maxsize=1)
def digits() -> Tensor:
    """(1797, 64) in [-1, 1], float64."""
    return images("digits")[0].flatten(1).double()


def known(seed: int) -> tuple[Denoiser, NoisePosterior, tuple[int, ...], torch.dtype]:
    """The exact denoiser and posterior of 400 digits, each with a little noise."""
    law = kde(digits()[:KNOWN], BANDWIDTH)
    return ExactDenoiser(law, VE()), NoisePosterior.exact(law, noise_levels(n=100)), (64,), torch.float64


class _Net(nn.Module):
    """``(x, label) -> output``: the image with sines and cosines of its label, through three hidden layers."""

    frequencies: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("frequencies", torch.arange(1.0, 5.0), persistent=False)
        inner = [m for i in (72, width, width) for m in (nn.Linear(i, width), nn.SiLU())]
        self.layers = nn.Sequential(*inner, nn.Linear(width, 64))

    def forward(self, x: Tensor, label: Tensor) -> Tensor:
        angle = label[:, None] * self.frequencies
        return self.layers(torch.cat([x.flatten(1), angle.sin(), angle.cos()], 1)).reshape(x.shape)


@lru_cache(maxsize=8)
def trained(
    seed: int, steps: int, width: int, classifier_steps: int, classes: int
) -> tuple[Denoiser, NoiseClassifier, tuple[int, ...], torch.dtype]:
    """A denoiser of digits, and a noise classifier, both trained here."""
    x, _ = images("digits")
    process, sd = EDM(0.01, TOP), x.std().item()
    draw = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        net, classifier = _Net(width), NoiseClassifier((1, 8, 8), classes)
    net = train_denoiser(net, x, process, "edm", steps=steps, sigma_data=sd, generator=draw)  # type: ignore[arg-type]
    optimizer = torch.optim.Adam(classifier.parameters(), lr=1e-3)
    for _ in range(classifier_steps):
        rows = torch.randint(len(x), (100,), generator=draw)
        loss = noise_classifier_loss(classifier, x[rows], draw)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
    classifier.requires_grad_(False)
    return Denoiser(net, process, "edm", sigma_data=sd), classifier, (1, 8, 8), torch.float32


def integrator(name: str, evaluations: int) -> Integrator:
    """One of so many evaluations."""
    if name == "dpm":
        return PerSample(DPMSolver(order=2, form="data", method="multistep"), evaluations, "logsnr")
    return KarrasHeun((evaluations + 1) // 2, 80.0 if name == "churn" else None)


def from_noise(problem: Any, seed: int, name: str, evaluations: int, count: int, level: float = TOP) -> float:
    """The energy distance of samples that are integrated from noise of one level."""
    denoiser, _, shape, dtype = problem
    draw = torch.Generator().manual_seed(seed)
    x = level * torch.randn((count, *shape), generator=draw, dtype=dtype)
    process: Process = denoiser.process
    scaled, start = Scaled(denoiser, process), torch.full((count,), level, dtype=torch.float64)
    with torch.no_grad():
        return distance([integrator(name, evaluations)(scaled, x, start, draw).flatten(1).double()])


def from_chains(problem: Any, seed: int, name: str, options: Any, n_skip: int, evaluations: int) -> Any:
    """Chains that have begun, and their samples as they are asked for, (chains, d), float64."""
    denoiser, posterior, shape, dtype = problem
    chains = DenoisingLangevinGibbs(
        denoiser, denoiser.process, posterior, options["eta"], n_skip, options["update"], integrator(name, evaluations),
        options["select"],
    )  # fmt: skip
    chains.warmup((options["chains"], *shape), torch.Generator().manual_seed(seed), dtype=dtype)
    return chains, (x.flatten(1).double() for x in chains)


@lru_cache(maxsize=1)
def _to_digits() -> KernelDistance:
    return KernelDistance(digits(), minus_distance)


def distance(made: list[Tensor]) -> float:
    """The energy distance of samples to all digits."""
    return _to_digits()(torch.cat(made))


def of_chains(made: list[Tensor]) -> dict[str, float]:
    """The share of samples that are a copy of the one before; the correlation of neighbours' first principal component."""
    samples, data = torch.stack(made), digits()
    _, _, v = torch.linalg.svd(data - data.mean(0), full_matrices=False)
    statistic = (samples - data.mean(0)) @ v[0]
    return {
        "copies": (samples[1:] == samples[:-1]).all(2).double().mean().item(),
        "lag_1": autocorrelation(statistic)[1].item(),
        "effective": effective_sample_size(statistic) / statistic.numel(),
    }
