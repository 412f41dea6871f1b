"""What FK steering's claim measures: tilted mixtures with known answers, a rare component, and digits that are asked for."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from polyak.core.exact import Mixture
from polyak.generate import DDIM, VP, Denoiser, Discrete, FKSteering, sample, train_denoiser
from polyak.generate.problems import ExactDenoiser
from polyak.generate.rewards import RewardContext

DIGITS = 10
BETWEEN = ((1.0, 2.0), (0.6, 0.8), (0.3, 0.6))  # distances of the means from 0, weights of the left one, lam


def rng(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# --- a known tilt: exp(lam x) of two normals on the line, by a model whose steps are known exactly


def tilt(seed: int, options: Any) -> dict[str, float]:
    """Weights of the components, evidence, potentials of the paths, and the unsteered run."""
    generator = rng(seed)
    apart, share, lam = (low + (high - low) * torch.rand(1, generator=generator).item() for low, high in BETWEEN)
    law = Mixture([[-apart], [apart]], 0.1, [share, 1 - share])
    tilted, log_mass = law.tilt(torch.tensor([lam], dtype=torch.float64))
    how: dict[str, Any] = dict(
        solver=DDIM(eta=1.0), steps=options["steps"], grid="logsnr", generator=rng(seed + 1), dtype=torch.float64
    )
    denoiser = ExactDenoiser(law, VP())

    def run(k: int, systems: int, **changes: Any) -> tuple[Tensor, Any]:
        given = {"lam": lam, **{name: options[name] for name in ("potential", "ess_threshold", "parity")}, **changes}
        steering = FKSteering(lambda samples: samples[..., 0], num_particles=k, pick="all", **given)
        x, info = sample(denoiser, (systems, 1), steering=steering, return_info=True, **how)
        return x.view(systems, k), info.steering

    def errors(x: Tensor, state: Any) -> Tensor:
        return (state.logw.softmax(1) * (x > 0)).sum(1) - tilted.weights[1]

    few, many = run(16, options["systems"]), run(256, options["systems"] // 5)
    state, kept = few[1], run(8, 20, ess_threshold=0.0)[1]  # nothing is resampled: weights are all that there is
    found = {
        "bias": abs(errors(*many).mean().item()),
        "shrinks": (errors(*few).square().mean() / errors(*many).square().mean()).sqrt().item(),
        "product": (kept.logw - lam * kept.reward).abs().max().item(),
    }
    if options["parity"] is None:  # the published code estimates no evidence
        found["evidence"] = abs((state.log_z - log_mass).exp().mean().item() - 1)
    how["generator"] = rng(seed + 1)
    free = sample(denoiser, (160, 1), **how)
    how["generator"] = rng(seed + 1)
    return found | {"unsteered": (run(8, 20, lam=0.0)[0].flatten() - free[:, 0]).abs().max().item()}


# --- a rare component


def rare(seed: int, options: Any) -> dict[str, float]:
    """The share of systems whose best sample is of the component that one in 333 is of."""
    generator = rng(seed)
    means = torch.randn(10, 8, dtype=torch.float64, generator=generator)
    means = 3 * means / means.norm(dim=1, keepdim=True)
    weights = torch.full((10,), (1 - options["share"]) / 9, dtype=torch.float64)
    weights[0] = options["share"]
    law = Mixture(means, 0.3**2, weights)
    process = Discrete(torch.linspace(1e-4, 0.1, 100, dtype=torch.float64))
    calls = [0]

    def reward(samples: Tensor) -> Tensor:
        calls[0] += samples.shape[0] * samples.shape[1]
        return -(samples - means[0]).norm(dim=2)

    steering = FKSteering(
        reward, lam=10.0, potential=options["potential"], num_particles=options["particles"], parity=options["parity"],
        schedule=list(range(9, 100, 10)),
    )  # fmt: skip
    x = sample(
        ExactDenoiser(law, process), (options["systems"], 8), solver=DDIM(eta=1.0), steps=100, steering=steering,
        generator=rng(seed + 1), dtype=torch.float64,
    )  # fmt: skip
    hit = law.responsibilities(x).argmax(1) == 0
    return {"success": hit.double().mean().item(), "rewards": calls[0] / options["systems"]}


# --- digits


class Net(nn.Module):
    """A network of images as vectors, told the time and a class."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.classes = nn.Embedding(DIGITS + 1, 16)
        self.layers = nn.Sequential(
            nn.Linear(64 + 32, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(),
            nn.Linear(width, 64),
        )  # fmt: skip
        self.register_buffer("rates", 2.0 ** torch.arange(8))

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        y = torch.full((len(x),), DIGITS, device=x.device) if y is None else y
        angles = t[:, None] * self.rates  # type: ignore[operator]
        return self.layers(torch.cat([x, angles.sin(), angles.cos(), self.classes(y)], 1))


@lru_cache(maxsize=1)
def images() -> tuple[Tensor, Tensor]:
    from polyak.lab.data import digits

    x, y = digits()
    return torch.tensor(x, dtype=torch.float32).reshape(-1, 64) / 8 - 1, torch.tensor(y)


@lru_cache(maxsize=32)
def trained(seed: int, width: int, steps: int) -> Net:
    """A denoiser of all digits, conditional and not."""
    x, y = images()
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        net = Net(width)
    return train_denoiser(
        net, x, VP(), "v_prediction", labels=y, none=DIGITS, drop=0.3, steps=steps, generator=rng(seed)
    )


@lru_cache(maxsize=32)
def classifier(seed: int, half: int, steps: int) -> nn.Module:
    """A classifier of one half of the digits, somewhat noisy."""
    x, y = images()
    order = torch.randperm(len(x), generator=rng(1234))
    rows = order[half::2]
    x, y = x[rows], y[rows]
    with torch.random.fork_rng([]):
        torch.manual_seed(10 * seed + half)
        net = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, DIGITS))
    optimizer, generator = torch.optim.Adam(net.parameters(), 2e-3), rng(seed)
    for _ in range(steps):
        batch = torch.randint(len(x), (128,), generator=generator)
        noisy = x[batch] + 0.2 * torch.randn(128, 64, generator=generator)
        loss = nn.functional.cross_entropy(net(noisy), y[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return net.eval().requires_grad_(False)


def asked(seed: int, options: Any) -> dict[str, float]:
    """Digits that are asked for, each by as many systems: what a classifier says that the reward did not see, and variety."""
    net = trained(seed, options["width"], options["training"])
    judge, critic = (classifier(seed, half, options["classifying"]) for half in (0, 1))
    k, systems = options["particles"], options["systems"]
    target = torch.arange(systems) % DIGITS

    def reward(samples: Tensor, context: RewardContext) -> Tensor:
        log_p = critic(samples).log_softmax(2)
        wanted = target[list(context.systems)][:, None, None].expand(*samples.shape[:2], 1)
        return log_p.gather(2, wanted)[..., 0]

    told = target.repeat_interleave(k) if options["told"] else None
    denoiser = Denoiser(lambda x, t: net(x, t, told), VP(), "v_prediction")
    steering = FKSteering(reward, lam=options["lam"], potential=options["potential"], num_particles=k)
    with torch.no_grad():
        x = sample(
            denoiser,
            (systems, 64),
            solver=DDIM(eta=1.0),
            steps=options["steps"],
            steering=steering,
            generator=rng(seed + 1),
        )
        said = judge(x)
    spread = [torch.pdist(x[target == digit]).mean().item() for digit in range(DIGITS)]
    return {
        "accuracy": (said.argmax(1) == target).double().mean().item(),
        "likelihood": said.log_softmax(1).gather(1, target[:, None]).mean().item(),
        "spread": math.fsum(spread) / DIGITS,
    }
