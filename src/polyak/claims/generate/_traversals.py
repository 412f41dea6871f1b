"""Two generators to walk in, the edits that compete, and what is measured of them."""

from __future__ import annotations

import functools
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from polyak.generate.potential_flows import PotentialFlow, potential_flow_loss, variation_predictability, wave_residual

LATENT = 8
FACTORS = 5  # x, y, size, aspect ratio, angle


class VAE(nn.Module):
    """A small variational autoencoder of digits, 8 x 8 pixels in [0, 1]."""

    def __init__(self, hidden: int = 128) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(64, hidden), nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU())
        self.heads = nn.Linear(hidden, 2 * LATENT)
        self.decoder = nn.Sequential(
            nn.Linear(LATENT, hidden), nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU(), nn.Linear(hidden, 64)
        )

    def forward(self, z: Tensor) -> Tensor:
        """Images (B, 1, 8, 8) of latents."""
        return torch.sigmoid(self.decoder(z)).unflatten(1, (1, 8, 8))

    def loss(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """Minus the evidence's lower bound, for each image."""
        mean, log_var = self.heads(self.encoder(x)).chunk(2, 1)
        z = mean + (log_var / 2).exp() * torch.randn(mean.shape, generator=generator)
        seen = F.binary_cross_entropy_with_logits(self.decoder(z), x, reduction="none").sum(1)
        return (seen - (1 + log_var - mean.square() - log_var.exp()).sum(1) / 2).mean()


@functools.lru_cache(1)
def digits(seed: int, epochs: int) -> nn.Module:
    """A VAE that was trained on the 1797 digits."""
    from polyak.lab import data

    x = torch.tensor(data.digits()[0], dtype=torch.float32) / 16
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        vae = VAE()
    steps = epochs * (len(x) // 128)
    optimizer = torch.optim.Adam(vae.parameters(), 3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    for _ in range(steps):
        rows = torch.randint(len(x), (128,), generator=generator)
        loss = vae.loss(x[rows], generator)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
    return vae.requires_grad_(False).eval()


class Ellipses(nn.Module):
    """Anti-aliased ellipses whose five factors are a fixed random function of the latent: two layers with tanh between."""

    def __init__(self, seed: int, size: int = 16) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.first = nn.Parameter(torch.randn(LATENT, 16, generator=generator) / math.sqrt(LATENT) * 1.5, False)
        self.last = nn.Parameter(torch.randn(16, FACTORS, generator=generator) / 4 * 1.5, False)
        grid = (torch.arange(size) + 0.5) / size * 2 - 1
        self.grid = nn.Parameter(torch.stack(torch.meshgrid(grid, grid, indexing="xy")), False)

    def factors(self, z: Tensor) -> Tensor:
        """(B, 5), each in (-1, 1)."""
        return torch.tanh(torch.tanh(z @ self.first) @ self.last)

    def forward(self, z: Tensor) -> Tensor:
        """Images (B, 1, size, size)."""
        x, y, size, aspect, angle = self.factors(z)[..., None, None].unbind(1)
        radius, stretch, turn = 0.4 + 0.15 * size, torch.exp(0.5 + 0.3 * aspect), angle * (math.pi / 3)
        u, v = self.grid[0] - 0.4 * x, self.grid[1] - 0.4 * y
        a, b = turn.cos() * u + turn.sin() * v, turn.cos() * v - turn.sin() * u
        distance = (a.square() / stretch + b.square() * stretch + 1e-6).sqrt()
        return torch.sigmoid((radius - distance) * self.grid.shape[1] / 2)[:, None]


class Straight(nn.Module):
    """The potential ``length v . z`` with |v| = 1: every step is the same."""

    def __init__(self, v: Tensor, length: float) -> None:
        super().__init__()
        self.v, self.length = nn.Parameter(v), length

    def forward(self, z: Tensor, t: Tensor) -> Tensor:
        return self.length * (z @ self.v) / self.v.norm()


class Judge(nn.Module):
    """Logits of a pair of images, by a perceptron."""

    def __init__(self, pixels: int, k: int) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2 * pixels, 128), nn.SiLU(), nn.Linear(128, 64), nn.SiLU(), nn.Linear(64, k))

    def forward(self, before: Tensor, after: Tensor) -> Tensor:
        return self.net(torch.cat([before.flatten(1), after.flatten(1)], 1))


def principal(generator_fn: nn.Module, count: int, seed: int) -> Tensor:
    """Orthonormal directions in which images change most, (count, d): eigenvectors of the mean of J^T J."""
    z = torch.randn(256, LATENT, generator=torch.Generator().manual_seed(seed))
    jacobian = torch.func.vmap(torch.func.jacrev(lambda one: generator_fn(one[None])[0].flatten()))(z)
    return torch.linalg.eigh((jacobian.mT @ jacobian).mean(0))[1].T.flip(0)[:count]


def edits(arm: str, generator_fn: nn.Module, seed: int, k: int, steps: int, length: float) -> PotentialFlow:
    """An arm's edits before training: potentials, or directions as potentials that are linear in z."""
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        flow = PotentialFlow(LATENT, k, steps)
        directions = torch.randn(k, LATENT)
    if arm in ("flow", "no_pde"):
        return flow
    if arm == "principal":
        directions = principal(generator_fn, k, seed)
    for i, v in enumerate(directions):
        flow.potentials[i] = Straight(v, length)
    return flow


def train(
    flow: PotentialFlow, generator_fn: nn.Module, seed: int, *, pde: bool, iterations: int, batch: int, lr: float,
    lr_judge: float, lambda_pde: float,
) -> None:  # fmt: skip
    """Train edits and the judge of pairs together; latents and times of an iteration follow from the seed.

    An iteration takes the mean of all edits' losses: a judge that sees one edit at a time forgets the others.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        judge = Judge(generator_fn(torch.zeros(1, LATENT)).numel(), flow.k)
    optimizer = torch.optim.Adam([dict(params=flow.parameters(), lr=lr), dict(params=judge.parameters(), lr=lr_judge)])
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda i: 0.05 + 0.475 * (1 + math.cos(math.pi * i / iterations))
    )
    for _ in range(iterations):
        s = int(torch.randint(flow.half - 1, (1,), generator=generator))
        optimizer.zero_grad(set_to_none=True)
        for k in range(flow.k):
            z = torch.randn(batch, LATENT, generator=generator)
            parts = potential_flow_loss(flow, generator_fn, z, k, s, judge, lambda_pde=lambda_pde)
            # Without the equation; of a straight edit it is zero in any case.
            loss = parts["loss"] if pde else parts["loss"] - lambda_pde * parts["pde"]
            (loss / flow.k).backward()
        optimizer.step()
        schedule.step()


@torch.no_grad()
def predictability(flow: PotentialFlow, generator_fn: nn.Module, seed: int, pairs: int, steps: int) -> dict[str, float]:
    """How well 2 % of pairs of first and last images teach which edit it was; the walks' length; of ellipses, factors' shares."""
    generator = torch.Generator().manual_seed(seed + 1)
    z = torch.randn(flow.k, pairs // flow.k, LATENT, generator=generator)
    ends = torch.stack([flow.traverse(rows, k)[-1] for k, rows in enumerate(z)])
    seen = torch.stack([generator_fn(rows.flatten(0, 1)) for rows in (z, ends)], 1)
    labels = torch.arange(flow.k).repeat_interleave(pairs // flow.k)
    told = variation_predictability(seen, labels, 0.02, steps=steps, generator=generator)
    values = {"vp": told, "length": (ends - z).norm(dim=-1).mean().item()}
    if isinstance(generator_fn, Ellipses):
        energy = (generator_fn.factors(ends) - generator_fn.factors(z)).square().mean(1)
        values["share"] = (energy.max(1).values / energy.sum(1)).mean().item()
    return values


@torch.no_grad()
def obedience(flow: PotentialFlow, seed: int, count: int, fitted: bool) -> dict[str, float]:
    """What potentials leave of the wave equation along their walks: relative to its two terms, and to the steps.

    With ``fitted`` the speeds are those that fit best, for potentials whose speeds are not learned.
    """
    z = torch.randn(flow.k, count, LATENT, generator=torch.Generator().manual_seed(seed + 2))
    squares, terms, moved = 0.0, 0.0, 0.0
    for k in range(flow.k):
        path = flow.traverse(z[k], k)
        u_tt, laplacian = [], []
        for t, at in enumerate(path[:-1]):
            u_tt.append(wave_residual(flow.potentials[k], at, float(t), 0.0))
            laplacian.append(u_tt[-1] - wave_residual(flow.potentials[k], at, float(t)))
        a, b = torch.stack(u_tt), torch.stack(laplacian)
        c2 = ((a * b).sum() / b.square().sum()).clamp(min=0) if fitted else flow.c[k].square()
        squares += (a - c2 * b).square().mean().item()
        terms += (a.square() + (c2 * b).square()).mean().item()
        moved += path.diff(dim=0).square().sum(2).mean().item()
    return {"residual": squares / terms, "defect": math.sqrt(squares / moved)}
