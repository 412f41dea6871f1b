"""What must be true of networks, references and samples under turns and moves, on trajectories of bodies; float64."""

from __future__ import annotations

import torch
from torch import Tensor

from polyak.claims.generate import _trajectories as p
from polyak.generate.geotdm import GeometricTrajectoryDiffusion, simulate_nbody

DOUBLE = torch.float64
KINDS = ("springs", "charged", "gravity")
WIDTH, LAYERS = 16, 2


def bodies(kind: str, seed: int, count: int) -> p.Data:
    generator = torch.Generator().manual_seed(seed)
    x, _, edges, charges = simulate_nbody(kind, count, p.BODIES, 1001, save_every=100, dt=0.005, generator=generator)
    return p.data(x, edges / (p.STIFFNESS if kind == "springs" else 1), charges, DOUBLE)


def off(got: Tensor, want: Tensor) -> float:
    return ((got - want).abs().max() / want.abs().max()).item()


@torch.no_grad()
def of_network(kind: str, seed: int, count: int) -> dict[str, float]:
    """The largest deviations of one evaluation, over all kinds of bodies, of a turn and of a turn with a reflection."""
    net = p.model(kind, None, seed, WIDTH, LAYERS).double().net
    tau = torch.linspace(0, p.STEPS - 1, count).long()
    network, reference, order = [], [], []
    for bodied in KINDS:
        known = bodies(bodied, seed, count)
        turn = torch.randperm(p.BODIES, generator=torch.Generator().manual_seed(seed))
        edges = known.edge_attr[:, turn][:, :, turn]
        for mask in (None, p.MASK):
            eps = net(known.x, tau, known.h, None, known.edge_attr, None, mask)
            other = net(known.x[:, turn], tau, known.h[:, turn], None, edges, None, mask)
            order.append(off(other, eps[:, turn]))
            for mirrored in (False, True):
                q, shift = p.motion(seed, DOUBLE, mirrored)
                moved = net(q @ known.x + shift, tau, known.h, None, known.edge_attr, None, mask)
                network.append(off(moved, q @ eps))
        if kind == "egtn":
            x_r = net.reference(known.given, **known.told)  # type: ignore[operator]
            for mirrored in (False, True):
                q, shift = p.motion(seed, DOUBLE, mirrored)
                there = net.reference(q @ known.given + shift, **known.told)  # type: ignore[operator]
                reference.append(off(there, q @ x_r + shift))
    return {"network": max(network), "order": max(order)} | ({"reference": max(reference)} if reference else {})


def of_samples(kind: str, seed: int, count: int, chain: int) -> dict[str, float]:
    """Of the last steps of a chain: without training no network takes off the noise of all."""
    conditional, unconditional, drift = [], [], []
    generator = torch.Generator().manual_seed(seed)
    q, shift = p.motion(seed, DOUBLE)
    for bodied in KINDS:
        known = bodies(bodied, seed, count)
        moved = p.Data(q @ known.x + shift, known.h, known.edge_attr)
        model = p.model(kind, "learned" if kind == "egtn" else "last", seed, WIDTH, LAYERS).double()
        start = torch.randn(known.future.shape, dtype=DOUBLE, generator=generator)
        there = p.flow(model, moved, q @ start, chain)
        conditional.append(off(there, q @ p.flow(model, known, start, chain) + shift))
        model = p.model(kind, None, seed, WIDTH, LAYERS).double()
        start = torch.randn(known.x.shape, dtype=DOUBLE, generator=generator)
        start = start - start.mean((1, 3), keepdim=True)
        unconditional.append(off(p.flow(model, moved, q @ start, chain), q @ p.flow(model, known, start, chain)))
        drift.append(_drift(model, known, chain, generator))
    return {"samples": max(conditional), "unconditional": max(unconditional), "drift": max(drift)}


def _drift(model: GeometricTrajectoryDiffusion, known: p.Data, step: int, generator: torch.Generator) -> float:
    """The largest mean over bodies and frames that the network sees, and of the end, in an ancestral chain."""
    means = []
    hook = model.net.register_forward_pre_hook(
        lambda net, given: means.append(given[0].mean((1, 3)).abs().max().item())
    )
    x = known.x - known.x.mean((1, 3), keepdim=True)
    made = model.refine(x, step, known.h, edge_attr=known.edge_attr, generator=generator)
    hook.remove()
    return max(*means, made.mean((1, 3)).abs().max().item())


def simulator(seed: int, count: int) -> float:
    """The largest distance of the simulator's springs from their closed form, over five units of time."""
    generator = torch.Generator().manual_seed(seed)
    x, v = (torch.randn(count, p.BODIES, 3, dtype=DOUBLE, generator=generator) for _ in range(2))
    there, _, k, _ = simulate_nbody(
        "springs", count, p.BODIES, 5001, save_every=500, generator=generator, initial=(x / 2, v / 2)
    )
    squares, modes = torch.linalg.eigh(torch.diag_embed(k.sum(-1)) - k)
    omega, at = squares.clamp(min=1e-12).sqrt()[:, None, :, None], 0.5 * torch.arange(1, 11, dtype=DOUBLE)
    angle = omega * at[:, None, None]
    start, speed = ((modes.mT @ one / 2)[:, None] for one in (x, v))
    return (modes[:, None] @ (start * angle.cos() + speed * angle.sin() / omega) - there).norm(dim=-1).max().item()
