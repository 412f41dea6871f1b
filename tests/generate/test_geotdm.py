"""Geometric trajectory diffusion: its symmetries, its network by hand, its chain, and what it refuses."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from polyak.generate import DDIM, VP, Discrete, DPMSolverMultistep, Heun, sample
from polyak.generate.geotdm import EGTN, GeometricTrajectoryDiffusion, diffusion, simulate_nbody
from polyak.generate.geotdm.graphs import Inputs, graph_of
from polyak.generate.geotdm.network import waves

DOUBLE = torch.float64
T, GIVEN = 5, 2
MASK = torch.arange(T) < GIVEN
INTERPOLATED = torch.tensor([True, False, False, True, True])


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=DOUBLE, generator=seeded(seed))


def egtn(seed: int = 0, **options) -> EGTN:
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        return EGTN(
            **{**dict(node_dim=2, edge_dim=1, hidden=8, layers=2, time_dim=6, future=T - GIVEN), **options}
        ).double()


class Bounded(nn.Module):
    """An EGTN whose noise has a bound, so that what it samples without training has, too; it counts its calls."""

    def __init__(self, net: EGTN) -> None:
        super().__init__()
        self.net, self.future, self.seen, self.references = net, net.future, [], 0

    def forward(self, x, tau, *rest):
        self.seen.append((x.detach().clone(), tau.clone()))
        eps = self.net(x, tau, *rest)
        return eps / (1 + torch.linalg.vector_norm(eps, dim=-2, keepdim=True))

    def reference(self, *given):
        self.references += 1
        return self.net.reference(*given)


class Linear(nn.Module):
    """What a network may be: the noise is a linear function of the trajectory; it remembers what it was told."""

    def __init__(self) -> None:
        super().__init__()
        self.told = []

    def forward(self, x, tau, h, edge_index=None, edge_attr=None, batch=None, cond_mask=None):
        self.told.append((x.detach().clone(), tau.clone()))
        step = tau if batch is None else tau[batch]
        eps = 0.3 * x - 0.1 * x.flip(-1) + 0.01 * step.to(x.dtype).reshape(-1, *[1] * (x.ndim - 1))
        return eps if cond_mask is None else eps[..., ~cond_mask]


def graphs(n: int = 4, b: int = 3, seed: int = 1) -> dict[str, torch.Tensor]:
    edges = draw(b, n, n, 1, seed=seed)
    return dict(h=draw(b, n, 2, seed=seed + 1), edge_attr=edges)


def sparse(given: dict[str, torch.Tensor], sizes: list[int]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The first points of dense graphs, as one graph of many parts; and where they are among all points."""
    n = given["h"].shape[1]
    rows = torch.cat([i * n + torch.arange(size) for i, size in enumerate(sizes)])
    pairs, attr, start = [], [], 0
    for i, size in enumerate(sizes):
        for a in range(size):
            for b in range(size):
                if a != b:
                    pairs.append((start + a, start + b))
                    attr.append(given["edge_attr"][i, a, b])
        start += size
    batch = torch.cat([torch.full((size,), i) for i, size in enumerate(sizes)])
    edge_attr = torch.stack(attr) if attr else torch.zeros(0, 1, dtype=DOUBLE)
    index = torch.tensor(pairs).reshape(-1, 2).T
    return rows, dict(h=given["h"].flatten(0, 1)[rows], edge_index=index, edge_attr=edge_attr, batch=batch)


def motion(seed: int = 0, mirrored: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """A rotation, or one with a reflection, and a translation."""
    q, _ = torch.linalg.qr(draw(3, 3, seed=seed))
    q = q * torch.linalg.det(q)
    return (-q if mirrored else q), 3 * draw(3, 1, seed=seed + 1)


# The network by hand


def silu(a):
    return a / (1 + np.exp(-a))


def perceptron(net, v):
    first, second = (tuple(p.detach().numpy() for p in (net[i].weight, net[i].bias)) for i in (0, 2))
    return second[0] @ silu(first[0] @ v + first[1]) + second[1]


def wave(t, dim):
    angle = [t * 10_000.0 ** (-i / (dim // 2 - 1)) for i in range(dim // 2)]
    return np.array([*map(math.sin, angle), *map(math.cos, angle)])


def through_by_hand(blocks, x, h, a, times, dim):
    """x [N, T, 3], h [N, T, H], a [N, N, E]: one point, one frame and one pair after the other."""
    n, frames, _ = x.shape
    for block in blocks:
        spatial, temporal = block.spatial, block.temporal
        new_x, new_h = x.copy(), h.copy()
        for i in range(n):
            for t in range(frames):
                total, moved = np.zeros(h.shape[2]), np.zeros(3)
                for j in set(range(n)) - {i}:
                    d = x[i, t] - x[j, t]
                    m = silu(perceptron(spatial.edge, np.concatenate([h[i, t], h[j, t], [d @ d], a[i, j]])))
                    total = total + m
                    moved += perceptron(spatial.coordinate, m) * d / (math.sqrt(d @ d + 1e-8) + 1) / (n - 1)
                new_x[i, t] += moved
                new_h[i, t] = perceptron(spatial.node, np.concatenate([h[i, t], total]))
        x, h = new_x, new_h
        new_x, new_h = x.copy(), h.copy()
        weight, bias = (p.detach().numpy() for p in temporal.relative.parameters())
        for i in range(n):
            for t in range(frames):
                r = [weight @ wave(times[t] - times[s], dim) + bias for s in range(frames)]
                v = [perceptron(temporal.value, h[i, s]) for s in range(frames)]
                q = perceptron(temporal.query, h[i, t])
                score = np.exp([q @ (perceptron(temporal.key, h[i, s]) + r[s]) for s in range(frames)])
                for s in range(frames):
                    share = score[s] / score.sum()
                    new_h[i, t] += share * (v[s] + r[s])
                    new_x[i, t] += share * perceptron(temporal.coordinate, v[s]) * (x[i, t] - x[i, s])
        x, h = new_x, new_h
    return x, h


def eps_by_hand(net, x, tau, h, a):
    frames = x.shape[2]
    weight, bias = (p.detach().numpy() for p in net.enter.parameters())
    told = [weight @ np.concatenate([row, wave(tau, net.time_dim)]) + bias for row in h]
    start = np.moveaxis(x, 1, 2)
    end, _ = through_by_hand(net.blocks, start, np.stack([told] * frames, 1), a, list(range(frames)), net.time_dim)
    return np.moveaxis(end - start, 2, 1)


def reference_by_hand(net, x, h, a, times):
    weight, bias = (p.detach().numpy() for p in net.ref_enter.parameters())
    told = h @ weight.T + bias
    y, hidden = through_by_hand(
        net.ref_blocks, np.moveaxis(x, 1, 2), np.stack([told] * len(times), 1), a, times, net.time_dim
    )
    weights = hidden.mean(2)[:, :, None] * net.gamma.detach().numpy()  # [N, T_c, future]
    weights[:, -1] = 1 - weights[:, :-1].sum(1)
    assert np.allclose(weights.sum(1), 1)
    return np.einsum("ntf,ntc->ncf", weights, y)


@pytest.mark.parametrize("n", [1, 3])
def test_the_network_is_that_of_the_paper_by_hand(n):
    net, x, given = egtn(), draw(2, n, 3, T), graphs(n, 2)
    net.gamma.data = draw(T - GIVEN, seed=9)
    tau, numbers = torch.tensor([3, 40]), [g.numpy() for g in given.values()]
    eps, future = net(x, tau, **given), net(x, tau, **given, cond_mask=INTERPOLATED)
    when = [0, 3, 4]
    x_r = net.reference(x[..., when], **given, cond_mask=torch.tensor([True, False, False, True, True, False]))
    for i in range(2):
        h, a = (one[i] for one in numbers)
        want = eps_by_hand(net, x[i].numpy(), int(tau[i]), h, a)
        assert eps[i].detach().numpy() == pytest.approx(want, abs=1e-12)
        assert future[i].detach().numpy() == pytest.approx(want[..., [1, 2]], abs=1e-12)
        want = reference_by_hand(net, x[i][..., when].numpy(), h, a, when)
        assert x_r[i].detach().numpy() == pytest.approx(want, abs=1e-12)


def test_a_graph_of_many_parts_is_each_by_itself():
    """Other sizes, a point without edges among them; a mean over no edges is zero."""
    net, x, given, sizes = egtn(), draw(3, 4, 3, T), graphs(), [4, 1, 3]
    rows, parts = sparse(given, sizes)
    tau, flat = torch.tensor([5, 0, 20]), x.flatten(0, 1)[rows]
    eps, x_r = net(flat, tau, **parts, cond_mask=MASK), net.reference(flat[..., :GIVEN], **parts)
    start = 0
    for i, size in enumerate(sizes):
        one = dict(h=given["h"][i : i + 1, :size], edge_attr=given["edge_attr"][i : i + 1, :size, :size])
        alone = net(x[i : i + 1, :size], tau[i : i + 1], **one, cond_mask=MASK)[0]
        torch.testing.assert_close(eps[start : start + size], alone, rtol=0, atol=1e-12)
        alone = net.reference(x[i : i + 1, :size, :, :GIVEN], **one)[0]
        torch.testing.assert_close(x_r[start : start + size], alone, rtol=0, atol=1e-12)
        start += size
    order = torch.randperm(len(parts["edge_attr"]), generator=seeded())
    turned = {**parts, "edge_index": parts["edge_index"][:, order], "edge_attr": parts["edge_attr"][order]}
    torch.testing.assert_close(net(flat, tau, **turned, cond_mask=MASK), eps, rtol=0, atol=1e-12)


# Its symmetries


@pytest.mark.parametrize("mirrored", [False, True])
@pytest.mark.parametrize("kind", ["springs", "charged", "gravity"])
def test_it_turns_and_moves_with_trajectories_of_bodies(kind, mirrored):
    x, _, edges, charges = simulate_nbody(kind, 2, 4, 500, save_every=90, generator=seeded())
    x, given = x.permute(0, 2, 3, 1), dict(h=charges[..., None], edge_attr=edges[..., None])
    net, (q, shift), tau = egtn(node_dim=1), motion(mirrored=mirrored), torch.tensor([2, 30])
    for mask in (None, MASK):
        eps, there = (net(y, tau, **given, cond_mask=mask) for y in (x, q @ x + shift))
        assert eps.abs().max() > 1e-3
        assert (there - q @ eps).abs().max() < 1e-12 * max(1, eps.abs().max())
    x_r, there = (net.reference(y[..., :GIVEN], **given) for y in (x, q @ x + shift))
    torch.testing.assert_close(there, q @ x_r + shift, rtol=0, atol=1e-12)


def test_its_points_have_no_order():
    net, x, given, order = egtn(), draw(3, 4, 3, T), graphs(), torch.tensor([2, 0, 3, 1])
    other = dict(h=given["h"][:, order], edge_attr=given["edge_attr"][:, order][:, :, order])
    tau = torch.tensor([1, 2, 3])
    torch.testing.assert_close(net(x[:, order], tau, **other), net(x, tau, **given)[:, order], rtol=0, atol=1e-12)
    there = net.reference(x[:, order], **other)
    torch.testing.assert_close(there, net.reference(x, **given)[:, order], rtol=0, atol=1e-12)


def test_time_has_a_direction():
    net, x, given, tau = egtn(), draw(3, 4, 3, T), graphs(), torch.zeros(3).long()
    assert (net(x.flip(-1), tau, **given).flip(-1) - net(x, tau, **given)).abs().max() > 1e-3


def test_without_weights_the_reference_is_the_last_frame_that_is_given():
    net, x = egtn(), draw(3, 4, 3, T)
    for block in net.ref_blocks:
        for p in block.parameters():
            p.data.zero_()
    net.ref_enter.weight.data.zero_()
    net.ref_enter.bias.data.zero_()
    assert torch.equal(net.reference(x, **graphs()), x[..., -1:].expand(-1, -1, -1, net.future))


def test_points_at_one_place_have_gradients():
    net, x = egtn(), torch.zeros(1, 3, 3, T, dtype=DOUBLE, requires_grad=True)
    net(x, torch.tensor([3]), **graphs(3, 1)).sum().backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("reference", ["learned", "last", "com", None])
@pytest.mark.parametrize("solver", [None, DDIM()])
def test_with_noise_that_is_turned_a_sample_is(reference, solver, monkeypatch):
    model = GeometricTrajectoryDiffusion(Bounded(egtn()), 20, reference)
    model.process = Discrete(
        [0.02] * 20, lam_min=-math.inf
    )  # little noise: without training the paper's is never taken off
    x, given, (q, shift) = draw(3, 4, 3, T), graphs(), motion()
    options = dict(num_frames=T) if reference is None else dict(cond_mask=MASK)

    def made(turn, move):
        def normal(shape, **options):
            return turn @ plain(shape, **options)

        monkeypatch.setattr(diffusion, "standard_normal", normal)
        monkeypatch.setattr("polyak.generate.linear.standard_normal", normal)
        x_given = None if reference is None else turn @ x[..., :GIVEN] + move
        return model.sample(**given, x_given=x_given, **options, num_samples=2, solver=solver, generator=seeded())

    plain = diffusion.standard_normal
    here, there = made(torch.eye(3, dtype=DOUBLE), 0.0), made(q, shift)
    moved = q @ here + (0 if reference is None else shift)
    assert here.std() > 0.1
    assert (there - moved).abs().max() < 1e-10 * here.abs().max()


# The chain


@pytest.mark.parametrize(("steps", "first", "last"), [(1000, 1e-4, 0.02), (100, 1e-3, 0.2), (20, 5e-3, 0.999)])
def test_betas_are_those_of_the_paper(steps, first, last):
    model = GeometricTrajectoryDiffusion(Linear(), steps, None)
    assert model.betas.shape == (steps,)
    assert model.betas[[0, -1]].tolist() == pytest.approx([first, last], rel=1e-12)
    assert model.betas[1].item() == pytest.approx(1000 / steps * (1e-4 + 0.0199 / (steps - 1)), rel=1e-9)
    product = np.cumprod(1 - model.betas.numpy())
    assert model.alphas_bar.numpy() == pytest.approx(product, rel=1e-12)
    times = (torch.arange(steps, dtype=DOUBLE) + 1) / steps
    assert model.process.alpha(times).square().numpy() == pytest.approx(product, rel=1e-9)
    assert model.process.t_max == 1


@pytest.mark.parametrize("layout", ["dense", "sparse"])
@pytest.mark.parametrize("mask", [None, MASK, INTERPOLATED], ids=["all", "first", "between"])
def test_the_loss_is_the_papers(layout, mask):
    x, given, sizes = draw(3, 4, 3, T), graphs(), [4, 2, 3]
    if layout == "sparse":
        rows, given = sparse(given, sizes)
        x, batch = x.flatten(0, 1)[rows], given["batch"]
    net = Linear()
    model = GeometricTrajectoryDiffusion(net, 50, None if mask is None else "com")
    loss = model.loss(x, **given, cond_mask=mask, generator=seeded(4))
    generator = seeded(4)
    tau = torch.randint(50, (3,), generator=generator)
    keep = torch.ones(T, dtype=torch.bool) if mask is None else ~mask
    noise = torch.randn(*x.shape[:-1], int(keep.sum()), dtype=DOUBLE, generator=generator)
    parts = (
        list(zip(x, noise, strict=True))
        if layout == "dense"
        else [(x[batch == i], noise[batch == i]) for i in range(3)]
    )
    losses = []
    for i, (one, z) in enumerate(parts):
        whole = one.clone()
        if mask is None:
            clean, z, x_r = one - one.mean((0, 2), keepdim=True), z - z.mean((0, 2), keepdim=True), 0.0
        else:
            x_r = one[..., mask].mean((0, 2), keepdim=True)
            clean = one[..., keep] - x_r
        bar = model.alphas_bar[tau[i]]
        whole[..., keep] = bar.sqrt() * clean + (1 - bar).sqrt() * z + x_r
        eps = (0.3 * whole - 0.1 * whole.flip(-1) + 0.01 * tau[i].double())[..., keep]
        if mask is None:
            eps = eps - eps.mean((0, 2), keepdim=True)
        losses.append((eps - z).square().mean())
        told = net.told[0][0][i] if layout == "dense" else net.told[0][0][batch == i]
        torch.testing.assert_close(told, whole, rtol=0, atol=1e-12)
    assert loss.item() == pytest.approx(torch.stack(losses).mean().item(), rel=1e-12)
    assert torch.equal(net.told[0][1], tau)


def test_the_reference_is_learned_and_made_once():
    net = Bounded(egtn())
    model, x, given = GeometricTrajectoryDiffusion(net, 10), draw(3, 4, 3, T), graphs()
    model.loss(x, **given, generator=seeded()).backward()
    assert net.net.gamma.grad is not None
    assert net.net.gamma.grad.abs().min() > 0
    assert all(p.grad is not None for p in net.net.ref_blocks[0].spatial.parameters())
    net.references = 0
    made = model.sample(**given, x_given=x[..., :GIVEN], num_samples=3, generator=seeded())
    assert net.references == 1
    assert made.shape == (3, 3, 4, 3, T - GIVEN)
    assert not made.requires_grad
    assert model.prior(x[..., :GIVEN], **given).requires_grad
    assert [tau.tolist() for _, tau in net.seen[1:]] == [[i] * 9 for i in reversed(range(10))]
    assert not any(tau.is_floating_point() for _, tau in net.seen)
    assert all(torch.equal(seen[..., :GIVEN], x[..., :GIVEN].repeat(3, 1, 1, 1)) for seen, _ in net.seen[1:])


@pytest.mark.parametrize("reference", ["last", "com", None])
def test_a_golden_trajectory(reference):
    """Ancestral sampling by the equations of DDPM, with variance beta and no noise at the end."""
    steps, net, x = 20, Linear(), draw(2, 4, 3, T)
    model = GeometricTrajectoryDiffusion(net, steps, reference)
    mask = None if reference is None else INTERPOLATED
    options = dict(num_frames=T) if mask is None else dict(x_given=x[..., mask], cond_mask=mask)
    made = model.sample(draw(2, 4, 2), **options, generator=seeded(7))[0].numpy()
    generator, frames = seeded(7), T if mask is None else 2
    betas = np.minimum(np.linspace(1e-4, 0.02, steps) * 1000 / steps, 0.999)
    bars = np.cumprod(1 - betas)

    def normal():
        z = torch.randn(2, 4, 3, frames, dtype=DOUBLE, generator=generator).numpy()
        return z - z.mean((1, 3), keepdims=True) if mask is None else z

    x_r = 0.0
    if mask is not None:
        known = x[..., mask].numpy()
        x_r = known[..., -1:] if reference == "last" else known.mean((1, 3), keepdims=True)
    z, whole = normal(), x.numpy().copy()
    for tau in reversed(range(steps)):
        whole[..., slice(None) if mask is None else ~mask.numpy()] = z + x_r
        eps = 0.3 * whole - 0.1 * whole[..., ::-1] + 0.01 * tau
        eps = eps - eps.mean((1, 3), keepdims=True) if mask is None else eps[..., ~mask.numpy()]
        z = (z - betas[tau] / math.sqrt(1 - bars[tau]) * eps) / math.sqrt(1 - betas[tau])
        if tau:
            z = z + math.sqrt(betas[tau]) * normal()
    assert made == pytest.approx(z + x_r, rel=1e-9, abs=1e-9)


def test_without_given_frames_all_is_centred_over_points_and_frames():
    net = Bounded(egtn())
    model, given = GeometricTrajectoryDiffusion(net, 20, None), graphs()
    made = model.sample(**given, num_frames=T, generator=seeded())
    for x in (*(seen for seen, _ in net.seen), made[0]):
        assert x.mean((1, 3)).abs().max() < 1e-12 * x.abs().max()
        assert x.mean(1).abs().max() > 1e-3  # frames by themselves are not
    graph = graph_of(Inputs(torch.zeros(4000, 2, 1)))
    noise = diffusion._centred(draw(4000, 2, 3, 3), graph)
    assert torch.allclose(diffusion._centred(noise, graph), noise, rtol=0, atol=1e-14)
    assert noise.var(0).mean().item() == pytest.approx(1 - 1 / 6, abs=5 * math.sqrt(2 / 4000 / 18))


def test_the_room_samples_what_it_predicts():
    """Any solver on x - x_r; of a point, x = 1, the exact noise leads every solver to it."""
    x, given = torch.ones(3, 4, 3, T, dtype=DOUBLE), graphs()

    class Exact(nn.Module):
        def forward(self, y, tau, h, edge_index=None, edge_attr=None, batch=None, cond_mask=None):
            bar = model.process.alpha((tau.double() + 1) / 50).square().reshape(-1, 1, 1, 1)
            return ((y[..., GIVEN:] - 4) - bar.sqrt() * -3) / (1 - bar).sqrt()

    model = GeometricTrajectoryDiffusion(Exact(), 50, "last")
    known = torch.full((3, 4, 3, GIVEN), 4.0, dtype=DOUBLE)
    denoiser = model.denoiser(**given, x_given=known, cond_mask=MASK)
    start = draw(3, 4, 3, T - GIVEN)
    x_r = model.prior(known, **given, cond_mask=MASK)
    assert torch.equal(x_r, torch.full_like(start, 4.0))
    for solver, steps in (
        (None, None),
        (None, 7),
        (DDIM(), 50),
        (DDIM(eta=1.0), 50),
        (DDIM(), 5),
        (Heun(), 20),
        (DPMSolverMultistep(order=2, form="data"), 10),
    ):
        made = model.sample(**given, x_given=known, cond_mask=MASK, solver=solver, steps=steps, generator=seeded())
        error = 0.5 if isinstance(solver, Heun) else 1e-9  # Heun's is not the flow of a point's own time
        assert (made[0] - x[..., GIVEN:]).abs().max() < error
        assert made.shape == (1, 3, 4, 3, T - GIVEN)
    room = sample(denoiser, start, solver=DDIM(), grid=model.process.grid(50, "time", end=0)) + x_r
    assert (room - x[..., GIVEN:]).abs().max() < 1e-9


@pytest.mark.parametrize("reference", ["learned", None])
def test_several_samples_of_graphs_of_many_parts(reference):
    """Each as if it were of dense graphs of their own; of one batch, with the noise of each."""
    net = Bounded(egtn())
    model, x, given, sizes = GeometricTrajectoryDiffusion(net, 6, reference), draw(2, 3, 3, T), graphs(3, 2), [3, 3]
    rows, parts = sparse(given, sizes)
    assert torch.equal(rows, torch.arange(6))
    options, flat = dict(num_frames=T), dict(num_frames=T)
    if reference:
        options, flat = (dict(x_given=y[..., MASK], cond_mask=MASK) for y in (x, x.flatten(0, 1)))
    made = model.sample(**given, **options, num_samples=3, generator=seeded())
    there = model.sample(**parts, **flat, num_samples=3, generator=seeded())
    assert there.shape == (3, 6, *made.shape[3:])
    torch.testing.assert_close(there, made.flatten(1, 2), rtol=1e-9, atol=1e-9)


def test_between_two_ends_frames_are_in_their_places():
    net = Bounded(egtn(future=2))
    model, x, given = GeometricTrajectoryDiffusion(net, 8), draw(3, 4, 3, T), graphs()
    made = model.sample(**given, x_given=x[..., INTERPOLATED], cond_mask=INTERPOLATED, generator=seeded())
    assert made.shape == (1, 3, 4, 3, 2)
    for seen, _ in net.seen:
        assert torch.equal(seen[..., INTERPOLATED], x[..., INTERPOLATED])


@pytest.mark.parametrize("reference", ["learned", None])
def test_a_trajectory_is_refined(reference):
    model, x, given = GeometricTrajectoryDiffusion(Bounded(egtn()), 50, reference), draw(3, 4, 3, T) + 7, graphs()
    mask, keep = (MASK, ~MASK) if reference else (None, torch.ones(T, dtype=torch.bool))
    little, much = (model.refine(x, step, **given, cond_mask=mask, generator=seeded()) for step in (1, 25))
    assert little.shape == x[..., keep].shape
    assert (little - x[..., keep]).abs().max() < 0.5 < (much - x[..., keep]).abs().max()
    if reference is None:  # it stays where it is; the official code has no reference to add
        for made in (little, much):
            torch.testing.assert_close(made.mean((1, 3)), x.mean((1, 3)), rtol=0, atol=1e-9)
    with pytest.raises(ValueError, match="step must be at most the 50 steps of the chain, got 51"):
        model.refine(x, 51, **given, cond_mask=mask)


@pytest.mark.parametrize("shape", [(2, 1, 3, 4), (2, 3, 3, 1), (0, 3, 3, 4)])
def test_one_point_one_frame_or_no_graph(shape):
    b, n, _, frames = shape
    model, given = GeometricTrajectoryDiffusion(Bounded(egtn()), 30, None), graphs(n, max(b, 1))
    given = {name: value[:b] for name, value in given.items()}
    assert model.sample(**given, num_frames=frames, num_samples=2).shape == (2, *shape)
    if b:
        assert model.loss(draw(*shape), **given).isfinite()


def test_it_is_learned_and_saved():
    """The loss falls; a copy from the state dict says the same."""
    x, _, edges, charges = simulate_nbody("springs", 32, 3, 2001, save_every=400, generator=seeded())
    x, given = x.permute(0, 2, 3, 1), dict(h=charges[..., None], edge_attr=10 * edges[..., None])
    model = GeometricTrajectoryDiffusion(egtn(node_dim=1), 20)
    optimizer, losses = torch.optim.Adam(model.parameters(), 5e-3), []
    for i in range(25):
        optimizer.zero_grad()
        loss = model.loss(x, **given, generator=seeded(i))
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    assert np.mean(losses[-8:]) < 0.5 * np.mean(losses[:4])
    copy = GeometricTrajectoryDiffusion(egtn(node_dim=1, seed=3), 20)
    copy.load_state_dict(model.state_dict())
    assert torch.equal(copy.loss(x, **given, generator=seeded()), model.loss(x, **given, generator=seeded()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_types_are_those_of_the_input(dtype):
    net, x, given = egtn(), draw(3, 4, 3, T), graphs()
    exact = net(x, torch.tensor([7, 8, 9]), **given)
    low = net.to(dtype)(x.to(dtype), torch.tensor([7, 8, 9]), **given)
    assert low.dtype == dtype
    assert (low.double() - exact).abs().max() < 50 * torch.finfo(dtype).eps * exact.abs().max()
    model = GeometricTrajectoryDiffusion(Bounded(net), 40)
    assert model.loss(x.to(dtype), **given).dtype == dtype
    assert model.sample(**given, x_given=x[..., :GIVEN].to(dtype)).dtype == dtype
    assert (
        GeometricTrajectoryDiffusion(Linear(), 4, None)
        .sample(torch.ones(1, 2, 1).long(), num_frames=2)
        .isfinite()
        .all()
    )


def test_waves_of_steps_are_exact_in_half_precision_too():
    far = waves(torch.tensor([999.0], dtype=DOUBLE), 6, torch.bfloat16)
    assert far.double().numpy() == pytest.approx(wave(999, 6)[None], abs=4e-3)


# Bad input

X, GRAPHS = draw(2, 3, 3, T), graphs(3, 2)
HOLE = X.clone()
HOLE[1, 2, 0, 1] = math.nan
_, PARTS = sparse(GRAPHS, [3, 2])
FLAT = draw(5, 3, T)
H = GRAPHS["h"]
ALL = torch.ones(T, dtype=torch.bool)
WRONG = {
    "all frames given": (lambda m: m.loss(X, **GRAPHS, cond_mask=ALL), r"cond_mask must be True at some frames and"),
    "no frame given": (lambda m: m.loss(X, **GRAPHS, cond_mask=~ALL), r"cond_mask must be True at some frames and"),
    "a mask of numbers": (lambda m: m.loss(X, **GRAPHS, cond_mask=ALL.long()), r"cond_mask must be a tensor of bool"),
    "a short mask": (
        lambda m: m.loss(X, **GRAPHS, cond_mask=MASK[1:]),
        r"cond_mask must have one for each of the 5 fr",
    ),
    "another future": (
        lambda m: m.loss(X, **GRAPHS, cond_mask=INTERPOLATED),
        r"cond_mask must leave the 3 frames of net.reference \(its future\), got 2",
    ),
    "other given frames": (
        lambda m: m.sample(**GRAPHS, x_given=X[..., :3], cond_mask=MASK),
        r"cond_mask must be True at the 3 frames of x_given, got 2",
    ),
    "other drawn frames": (
        lambda m: m.sample(**GRAPHS, x_given=X[..., :2], cond_mask=MASK, num_frames=4),
        r"num_frames must be the 3 frames that are not given, got 4",
    ),
    "too few frames": (lambda m: m.loss(X[..., :3], **GRAPHS), r"cond_mask must say which frames are given: 0 before"),
    "a mask without a reference": (
        lambda m: GeometricTrajectoryDiffusion(m.net, 9, None).loss(X, **GRAPHS, cond_mask=MASK),
        r"cond_mask must be None with reference=None",
    ),
    "given frames without a reference": (
        lambda m: GeometricTrajectoryDiffusion(m.net, 9, None).sample(**GRAPHS, x_given=X[..., :2]),
        r"x_given must be None with reference=None",
    ),
    "a prior without a reference": (
        lambda m: GeometricTrajectoryDiffusion(m.net, 9, None).prior(X[..., :2], **GRAPHS),
        r"reference must not be None where frames are given",
    ),
    "no number of frames": (
        lambda m: GeometricTrajectoryDiffusion(m.net, 9, None).sample(**GRAPHS),
        r"num_frames must say how many",
    ),
    "nothing given": (lambda m: m.sample(**GRAPHS), r"x_given must be a floating-point tensor"),
    "another reference": (
        lambda m: GeometricTrajectoryDiffusion(m.net, 9, "point"),
        r"reference must be one of 'learned', 'last', 'com', None",
    ),
    "a network without a reference": (
        lambda m: GeometricTrajectoryDiffusion(Linear(), 9),
        r"net must have a method reference",
    ),
    "one step": (lambda m: GeometricTrajectoryDiffusion(m.net, 1), r"steps must be at least 2"),
    "NaN": (lambda m: m.loss(HOLE, **GRAPHS), r"x must be finite"),
    "NaN among given frames": (lambda m: m.sample(**GRAPHS, x_given=HOLE[..., :2]), r"x_given must be finite"),
    "NaN to refine": (lambda m: m.refine(HOLE, 2, **GRAPHS), r"x must be finite"),
    "no step to refine": (lambda m: m.refine(X, 0, **GRAPHS), r"step must be at least 1"),
    "whole numbers": (lambda m: m.loss(X.long(), **GRAPHS), r"x must be a floating-point tensor"),
    "other numbers of frames": (
        lambda m: m.loss([*X], **GRAPHS),
        r"x must be a floating-point tensor of shape \[B, N, 3",
    ),
    "coordinates in the plane": (
        lambda m: m.loss(X[:, :, :2], **GRAPHS),
        r"x must have shape \[B, N, 3, T\] or \[M, 3",
    ),
    "features of others": (lambda m: m.loss(X, H[:1]), r"h must have shape \(2, 3, 'H'\) for the points of x"),
    "other features": (lambda m: m.net(X, torch.zeros(2), H[..., :1]), r"h must have 2 features \(node_dim\), got 1"),
    "no attributes": (lambda m: m.net(X, torch.zeros(2), H), r"edge_attr must have 1 features \(edge_dim\), got None"),
    "attributes of others": (
        lambda m: m.loss(X, H, edge_attr=GRAPHS["edge_attr"][:, :2]),
        r"edge_attr must have shape \(2, 3, 3, 'E'\)",
    ),
    "edges of all": (
        lambda m: m.loss(X, H, torch.zeros(2, 1).long()),
        r"edge_index must be None where h is \[B, N, H\]",
    ),
    "a batch of all": (
        lambda m: m.loss(X, **GRAPHS, batch=torch.zeros(2)),
        r"batch must be None where h is \[B, N, H\]",
    ),
    "no edges": (lambda m: m.loss(FLAT, PARTS["h"]), r"edge_index must be integers of shape \[2, E\]"),
    "edges to nowhere": (
        lambda m: m.loss(FLAT, **{**PARTS, "edge_index": PARTS["edge_index"] + 1}),
        r"edge_index must be in \[0, 5\)",
    ),
    "edges between graphs": (
        lambda m: m.loss(FLAT, **{**PARTS, "batch": torch.tensor([0, 0, 1, 1, 1])}),
        r"edge_index must join points of one graph",
    ),
    "an unsorted batch": (
        lambda m: m.loss(FLAT, **{**PARTS, "batch": torch.tensor([0, 1, 0, 1, 1])}),
        r"batch must be sorted",
    ),
    "a batch of others": (
        lambda m: m.loss(FLAT, **{**PARTS, "batch": torch.zeros(4).long()}),
        r"batch must be 5 integers",
    ),
    "steps of others": (lambda m: m.net(X, torch.zeros(3), **GRAPHS), r"tau must have shape \[B\]"),
    "steps of points": (lambda m: m.net(FLAT, torch.zeros(5), **PARTS), r"tau must have shape \[B\]"),
    "a solver's class": (lambda m: m.sample(**GRAPHS, x_given=X[..., :2], solver=DDIM), r"solver must be a Solver"),
    "an odd embedding": (lambda m: egtn(time_dim=7), r"time_dim must be even, got 7"),
}


@pytest.mark.parametrize("what", WRONG)
def test_bad_input_is_refused_by_name(what):
    call, says = WRONG[what]
    with pytest.raises((TypeError, ValueError), match=says):
        call(GeometricTrajectoryDiffusion(egtn(), 9))


def test_a_sample_that_diverges_says_when():
    class Exploding(nn.Module):
        def forward(self, x, tau, *rest):
            return x * math.inf

    with pytest.raises(ValueError, match="evaluation 1 at t=1"):
        GeometricTrajectoryDiffusion(Exploding(), 9, None).sample(**GRAPHS, num_frames=2)


def test_a_process_of_its_own_is_a_chain_of_the_room():
    model = GeometricTrajectoryDiffusion(Linear(), 100, None)
    assert model.denoiser(H).process is model.process
    with pytest.raises(ValueError, match="process must be the denoiser's own"):
        sample(model.denoiser(H), draw(2, 3, 3, T), process=VP(), solver=DDIM(), steps=2)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_a_gpu_it_is_the_same():
    net, x, given = egtn(), draw(3, 4, 3, T), graphs()
    tau = torch.tensor([1, 2, 3])
    eps, x_r = net(x, tau, **given, cond_mask=INTERPOLATED), net.reference(x[..., INTERPOLATED], **given)
    there = {name: value.cuda() for name, value in given.items()}
    net.cuda()
    torch.testing.assert_close(
        net(x.cuda(), tau.cuda(), **there, cond_mask=INTERPOLATED).cpu(), eps, rtol=0, atol=1e-10
    )
    torch.testing.assert_close(net.reference(x.cuda()[..., INTERPOLATED], **there).cpu(), x_r, rtol=0, atol=1e-10)
    model = GeometricTrajectoryDiffusion(Bounded(net), 10)
    made = model.sample(**there, x_given=x.cuda()[..., :GIVEN], generator=torch.Generator("cuda").manual_seed(1))
    assert made.is_cuda
    assert model.loss(x.cuda(), **there).isfinite()
