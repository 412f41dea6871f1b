"""Bodies on springs, what becomes of them in closed form, and models that learn it: for the claim of geometric trajectories."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from polyak.generate import DDIM, sample
from polyak.generate.geotdm import EGTN, GeometricTrajectoryDiffusion, ade, simulate_nbody
from polyak.generate.geotdm.network import waves

BODIES, FRAMES, GIVEN = 3, 10, 4
GAP, DT = 0.6, 0.002  # time between frames, and of the simulator's steps
STIFFNESS, STEPS, TIMES = 0.1, 50, 32
MASK = torch.arange(FRAMES) < GIVEN
FLAT = (1.0, 1.0, 0.0)


@dataclass(frozen=True)
class Data:
    """Trajectories [B, N, 3, T], and what networks are told of their bodies."""

    x: Tensor
    h: Tensor
    edge_attr: Tensor

    def rows(self, rows: Any) -> Data:
        return Data(self.x[rows], self.h[rows], self.edge_attr[rows])

    def turned(self, q: Tensor) -> Data:
        return Data(q @ self.x, self.h, self.edge_attr)

    @property
    def told(self) -> dict[str, Tensor]:
        return {"h": self.h, "edge_attr": self.edge_attr}

    @property
    def given(self) -> Tensor:
        return self.x[..., :GIVEN]

    @property
    def future(self) -> Tensor:
        return self.x[..., GIVEN:]


def springs(seed: int, count: int, flat: bool = False, dtype: torch.dtype = torch.float32) -> Data:
    """Bodies on springs, ten frames at 0.6, 1.2, ...; where flat, all that they start with is in one plane."""
    generator = torch.Generator().manual_seed(seed)
    initial = None
    if flat:
        x, v = (0.5 * torch.randn(count, BODIES, 3, dtype=torch.float64, generator=generator) for _ in range(2))
        v = 0.5 * v / torch.linalg.vector_norm(v, dim=-1, keepdim=True)
        plane = torch.tensor(FLAT, dtype=torch.float64)
        initial = (plane * x, plane * v)
    every = round(GAP / DT)
    x, _, edges, charges = simulate_nbody(
        "springs", count, BODIES, FRAMES * every + 1, save_every=every, dt=DT, generator=generator, initial=initial
    )
    return data(x, edges / STIFFNESS, charges, dtype)


def data(x: Tensor, edges: Tensor, charges: Tensor, dtype: torch.dtype) -> Data:
    """Of what the simulator returns."""
    return Data(x.permute(0, 2, 3, 1).contiguous().to(dtype), charges[..., None].to(dtype), edges[..., None].to(dtype))


def straight(known: Data) -> Tensor:
    """At the velocity between the last two frames that are given."""
    last = known.given[..., -1:]
    ahead = torch.arange(1, FRAMES - GIVEN + 1, dtype=last.dtype)
    return last + (last - known.given[..., -2:-1]) * ahead


def continued(known: Data) -> Tensor:
    """In closed form, by the last two frames: each mode of the springs swings by itself."""
    k = STIFFNESS * known.edge_attr[..., 0].double()
    squares, modes = torch.linalg.eigh(torch.diag_embed(k.sum(-1)) - k)
    omega = squares.clamp(min=0).sqrt()[..., None, None]
    before, last = (modes.mT @ known.given[..., i].double() for i in (-2, -1))
    before, last = before[..., None], last[..., None]
    ahead = GAP * torch.arange(1, FRAMES - GIVEN + 1, dtype=torch.float64)
    # sin(w t) / sin(w gap), which is t / gap for the modes that no spring holds
    held = omega > 1e-6
    ratio = torch.where(held, (omega * ahead).sin() / torch.where(held, (omega * GAP).sin(), 1.0), ahead / GAP)
    swung = last * (omega * ahead).cos() + ratio * (last * (omega * GAP).cos() - before)
    return (modes @ swung.flatten(2)).unflatten(2, swung.shape[2:]).to(known.x.dtype)


class Transformer(nn.Module):
    """A network that knows nothing of turns: attention between all points and frames, of their raw coordinates."""

    def __init__(self, width: int, layers: int, future: int = FRAMES - GIVEN) -> None:
        super().__init__()
        self.future = future
        self.enter = nn.Linear(3 + 1 + BODIES + 1 + TIMES, width)
        self.place = nn.Parameter(0.1 * torch.randn(BODIES, FRAMES, width))
        layer = nn.TransformerEncoderLayer(width, 4, 2 * width, 0.0, "gelu", batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.leave = nn.Linear(width, 3)

    def forward(
        self,
        x: Tensor,
        tau: Tensor,
        h: Tensor,
        edge_index: Any,
        edge_attr: Tensor,
        batch: Any,
        cond_mask: Tensor | None,
    ) -> Tensor:
        b, n, _, t = x.shape
        mask = torch.zeros(t, dtype=torch.bool) if cond_mask is None else cond_mask
        parts = (
            x.mT,
            h[:, :, None].expand(b, n, t, 1),
            edge_attr.mT.flatten(2)[:, :, None].expand(b, n, t, n),
            mask.to(x.dtype)[:, None].expand(b, n, t, 1),
            waves(tau.to(torch.float64), TIMES, x.dtype)[:, None, None].expand(b, n, t, TIMES),
        )
        y = self.layers((self.enter(torch.cat(parts, -1)) + self.place[:, :t]).flatten(1, 2))
        return self.leave(y).unflatten(1, (n, t)).mT[..., ~mask]


def model(kind: str, reference: str | None, seed: int, width: int, layers: int) -> GeometricTrajectoryDiffusion:
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        if kind == "transformer":
            net: nn.Module = Transformer(3 * width // 2, layers)
        else:
            net = EGTN(1, 1, width, layers, TIMES, future=FRAMES - GIVEN)
    return GeometricTrajectoryDiffusion(net, STEPS, reference)


def train(model: GeometricTrajectoryDiffusion, known: Data, seed: int, steps: int, batch: int, lr: float) -> None:
    """By Adam; the same batches, steps of the diffusion and noise for all models of a seed."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(model.parameters(), lr, fused=True)
    mask = None if model.reference is None else MASK
    for _ in range(steps):
        some = known.rows(torch.randint(len(known.x), (batch,), generator=generator))
        optimizer.zero_grad(set_to_none=True)
        model.loss(some.x, **some.told, cond_mask=mask, generator=generator).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()


def flow(model: GeometricTrajectoryDiffusion, known: Data, start: Tensor, steps: int = STEPS) -> Tensor:
    """Where the last steps of the deterministic sampler lead from a start: it has no noise but that."""
    given: dict[str, Any] = {} if model.reference is None else {"x_given": known.given, "cond_mask": MASK}
    denoiser = model.denoiser(**known.told, **given)
    with torch.no_grad():
        x = sample(denoiser, start, solver=DDIM(), grid=model.process.grid(steps, "time", start=steps / STEPS, end=0))
        return x if model.reference is None else x + model.prior(known.given, known.h, edge_attr=known.edge_attr)


def motion(seed: int, dtype: torch.dtype, mirrored: bool = False) -> tuple[Tensor, Tensor]:
    """A random rotation, or one with a reflection, and a translation."""
    generator = torch.Generator().manual_seed(seed)
    q, _ = torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64, generator=generator))
    q = q * torch.linalg.det(q) * (-1 if mirrored else 1)
    return q.to(dtype), torch.randn(3, 1, dtype=torch.float64, generator=generator).to(dtype)


def turns(model: GeometricTrajectoryDiffusion, known: Data, seed: int) -> tuple[float, float]:
    """The displacement error on data, and on the same data turned, from noise that is turned with them."""
    q, _ = motion(seed, known.x.dtype)
    generator = torch.Generator().manual_seed(seed)
    start = torch.randn(known.future.shape, dtype=known.x.dtype, generator=generator)
    other = known.turned(q)
    return ade(flow(model, known, start), known.future), ade(flow(model, other, q @ start), other.future)
