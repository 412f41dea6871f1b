"""Meta flow matching against references that are independent of it: loops over points, closed forms, SciPy."""

from __future__ import annotations

import copy
import itertools
import math
import sys
import warnings

import numpy as np
import pytest
import torch
from torch import nn

from polyak.core import integrators
from polyak.generate import Denoiser, Euler, Flow, MetaFlowMatching, MetaVelocity, PopulationEncoder, sample
from polyak.generate.meta_flow import encoder as encoders
from polyak.generate.meta_flow import mmd_rbf, wasserstein

DOUBLE = torch.float64


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def draw(*shape, seed=0, dtype=DOUBLE):
    return torch.randn(*shape, generator=seeded(seed), dtype=dtype)


def encoder(seed=0, dtype=DOUBLE, **options):
    torch.manual_seed(seed)
    return PopulationEncoder(**{"dim": 2, "width": 8, "layers": 3, "k": 4, **options}).to(dtype)


def velocity(seed=0, dtype=DOUBLE, **options):
    torch.manual_seed(seed)
    return MetaVelocity(**{"dim": 2, "embed": 8, "hidden": 16, "layers": 3, "fourier": 4, **options}).to(dtype)


def model(dtype=DOUBLE, k=4, **options):
    return MetaFlowMatching(encoder(k=k, dtype=dtype), velocity(dtype=dtype), **options)


class Mean(nn.Module):
    """A population's mean, for its embedding."""

    def forward(self, x, mask=None, features=None):
        return x.mean(1) if mask is None else torch.where(mask[..., None], x, 0).sum(1) / mask.sum(1, keepdim=True)


class Contraction(nn.Module):
    """The exact field of ``x1 = m + a (x0 - m)`` with m for the embedding; it counts its calls."""

    def __init__(self, a=0.3):
        super().__init__()
        self.a, self.seen = a, []

    def forward(self, t, x, e, cond=None):
        self.seen.append((t, x, e, cond))
        t = torch.as_tensor(t, dtype=x.dtype)[..., None]
        return (self.a - 1) * (x - e[:, None]) / (1 + (self.a - 1) * t)


# The encoder


def by_hand(one, points, features=None):
    """The embedding of one population, point by point, in NumPy."""
    at = points.numpy()
    n = len(at)
    near = [sorted((j for j in range(n) if j != i), key=lambda j: math.dist(at[i], at[j]))[: one.k] for i in range(n)]
    h = at if features is None else np.concatenate([at, features.numpy()], 1)
    for depth, layer in enumerate(one.layers):
        h = np.maximum(h, 0) if depth else h
        matrix = np.zeros((n, n))  # D^-1/2 (A + I) D^-1/2, where i receives from its nearest
        for i in range(n):
            matrix[i, [i, *near[i]]] = 1
        degree = matrix.sum(1)
        h = (
            matrix / np.sqrt(np.outer(degree, degree))
        ) @ h @ layer.weight.detach().numpy().T + layer.bias.detach().numpy()
    e = h.mean(0)
    return e / np.linalg.norm(e) if one.normalize else e


@pytest.mark.parametrize("k", [0, 1, 4])
@pytest.mark.parametrize("features", [0, 3])
@pytest.mark.parametrize("normalize", [True, False])
def test_an_embedding_is_that_of_graph_convolutions_by_hand(k, features, normalize):
    one = encoder(k=k, features=features, normalize=normalize)
    x, f = draw(2, 9, 2), draw(2, 9, features, seed=1) if features else None
    e = one(x, features=f)
    for p in range(2):
        expected = torch.tensor(by_hand(one, x[p], None if f is None else f[p]))
        torch.testing.assert_close(e[p].detach(), expected, rtol=0, atol=1e-13)
    if normalize:
        torch.testing.assert_close(e.norm(dim=1), torch.ones(2, dtype=DOUBLE), rtol=0, atol=1e-14)


@pytest.mark.parametrize("k", [0, 4])
def test_the_order_of_points_does_not_matter(k):
    one, x = encoder(k=k), draw(3, 20, 2)
    order = torch.randperm(20, generator=seeded())
    torch.testing.assert_close(one(x[:, order]), one(x), rtol=0, atol=1e-13)


@pytest.mark.parametrize("dense", [0, 2048])
def test_a_mask_is_removal_whatever_is_padded(dense, monkeypatch):
    monkeypatch.setattr(encoders, "_DENSE", dense)
    one, x, f = encoder(features=1), draw(2, 12, 2), draw(2, 12, 1, seed=1)
    mask = torch.ones(2, 12, dtype=torch.bool)
    mask[0, [0, 5, 11]] = False
    padded = torch.where(mask[..., None], x, math.nan)
    e = one(padded, mask, torch.where(mask[..., None], f, math.nan))
    torch.testing.assert_close(e[:1], one(x[:1, mask[0]], None, f[:1, mask[0]]), rtol=0, atol=1e-13)
    torch.testing.assert_close(e[1:], one(x[1:], None, f[1:]), rtol=0, atol=1e-13)


def test_large_populations_are_averaged_in_pieces_with_the_same_gradient(monkeypatch):
    one, x = encoder(), draw(2, 30, 2).requires_grad_()
    (dense,) = torch.autograd.grad(one(x).square().sum(1).sub(draw(2)).pow(3).sum() + one(x)[:, 0].sum(), x)
    monkeypatch.setattr(encoders, "_DENSE", 0)
    monkeypatch.setattr(encoders, "_AT_ONCE", 500)  # 8 rows of distances, and single points' neighbours
    (pieces,) = torch.autograd.grad(one(x).square().sum(1).sub(draw(2)).pow(3).sum() + one(x)[:, 0].sum(), x)
    torch.testing.assert_close(pieces, dense, rtol=0, atol=1e-13)


def test_a_population_twice_is_the_same_without_neighbours_only():
    x = draw(2, 20, 2)
    twice = torch.cat([x, x], 1)
    torch.testing.assert_close(encoder(k=0)(twice), encoder(k=0)(x), rtol=0, atol=1e-14)
    assert (encoder(k=4)(twice) - encoder(k=4)(x)).abs().max() > 1e-3  # the nearest is now the double


def test_who_is_near_does_not_depend_on_where_the_origin_is():
    """Distances by a matrix product lose eight digits at 1e4 in float32, and with them the neighbours."""
    far = draw(1, 200, 2, dtype=torch.float32) + 1e4
    near = encoders._averaging(far, torch.ones(1, 200, dtype=torch.bool), 5)
    own = encoders._averaging(far - 1e4, torch.ones(1, 200, dtype=torch.bool), 5)
    assert torch.equal(near(torch.eye(200)[None]), own(torch.eye(200)[None]))


def test_features_do_not_decide_who_is_near():
    one, x = encoder(features=1, layers=1, normalize=False), draw(1, 20, 2)
    f = draw(1, 20, 1, seed=2)
    jumps = [
        (one(x, None, 1e3 * f) - one(x, None, 0 * f)).abs().max(),
        (one(x, None, f) - one(x, None, 0 * f)).abs().max(),
    ]
    assert (jumps[0] / jumps[1]).item() == pytest.approx(1e3)  # one layer is linear in them, whatever their size


def test_few_points_are_all_neighbours_with_a_warning():
    x, mask = draw(2, 6, 2), torch.tensor([[True] * 6, [True] * 3 + [False] * 3])
    with pytest.warns(UserWarning, match="k is 5, and a population has 3 points"):
        e = encoder(k=5)(x, mask)
    with pytest.warns(UserWarning, match="a population has 3 points"):
        torch.testing.assert_close(e[1:], encoder(k=9)(x[1:, :3]), rtol=0, atol=1e-13)
    with pytest.warns(UserWarning, match="a population has 1 points"):
        assert encoder(k=1)(x[:, :1]).isfinite().all()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        encoder(k=5)(x)
        encoder(k=0)(x[:, :1])


@pytest.mark.parametrize("dtype", [DOUBLE, torch.float16])
def test_an_embedding_of_zero_stays_zero_with_a_finite_gradient(dtype):
    one = encoder(dtype=dtype, k=0)
    nn.init.zeros_(one.layers[-1].weight)
    nn.init.zeros_(one.layers[-1].bias)
    e = one(draw(1, 5, 2, dtype=DOUBLE).to(dtype))
    assert not e.any()
    if dtype == DOUBLE:
        e.sum().backward()
        assert all(p.grad.isfinite().all() for p in one.parameters())


def test_two_layers_tell_populations_of_one_mean_apart():
    """Official code leaves the first ReLU out where a single population has cell types: its two layers see the mean alone."""
    one = encoder(k=0, layers=2, features=1)
    x = draw(1, 40, 2)
    x = x - x.mean(1, keepdim=True)
    apart = (one(x, None, x[..., :1]) - one(3 * x, None, 3 * x[..., :1])).norm()
    assert apart > 1e-2
    linear = list(one.layers)
    means = [linear[1](linear[0](torch.cat([s * x, s * x[..., :1]], -1))).mean(1) for s in (1, 3)]
    torch.testing.assert_close(means[0], means[1], rtol=0, atol=1e-14)


# The velocity


def perceptron(net, t, x, e, cond=None):
    """The field at one point of one population, in NumPy."""
    frequency = np.exp(-math.log(10_000) * np.arange(64) / 63)
    wave = 2 * math.pi * x @ net.B.numpy()
    inputs = [
        e,
        *([] if cond is None else [cond]),
        np.sin(t * frequency),
        np.cos(t * frequency),
        np.cos(wave),
        np.sin(wave),
        x,
    ]

    def selu(h):
        return 1.0507009873554804934 * np.where(h > 0, h, 1.6732632423543772848 * np.expm1(h))

    def linear(layer, h):
        return layer.weight.detach().numpy() @ h + layer.bias.detach().numpy()

    h = selu(linear(net.first, np.concatenate(inputs)))
    for layer in net.middle:
        h = selu(linear(layer, h) + (h if net.skip else 0))
    return linear(net.last, h)


@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize("cond", [0, 3])
def test_a_velocity_is_that_of_a_perceptron_by_hand(skip, cond):
    net = velocity(skip=skip, cond=cond)
    assert len(net.middle) == (2 if skip else 1)
    x, e, t = draw(2, 4, 2), draw(2, 8, seed=1), torch.rand(2, 4, dtype=DOUBLE, generator=seeded())
    c = draw(2, cond, seed=2) if cond else None
    v, at_once = net(t, x, e, c), net(0.3, x, e, c)
    for p, n in itertools.product(range(2), range(4)):
        told = (x[p, n].numpy(), e[p].numpy(), None if c is None else c[p].numpy())
        assert v[p, n].tolist() == pytest.approx(perceptron(net, t[p, n].item(), *told), abs=1e-5)
        assert at_once[p, n].tolist() == pytest.approx(perceptron(net, 0.3, *told), abs=1e-5)
    torch.testing.assert_close(net(torch.full((2, 4), 0.3, dtype=DOUBLE), x, e, c), at_once, rtol=0, atol=1e-13)


def test_fourier_features_are_saved():
    first, second = velocity(seed=0), velocity(seed=1)
    x, e = draw(1, 5, 2), draw(1, 8)
    second.load_state_dict(dict(first.named_parameters()), strict=False)
    assert not torch.equal(second(0.5, 10 * x, e), first(0.5, 10 * x, e))  # weights are not all
    second.load_state_dict(first.state_dict())
    assert torch.equal(second(0.5, 10 * x, e), first(0.5, 10 * x, e))
    assert "B" not in dict(first.named_parameters())


# The loss


def test_the_loss_is_the_formula_with_a_time_for_each_point():
    meta = model()
    x0, x1 = draw(3, 7, 2), draw(3, 7, 2, seed=1)
    mask = torch.ones(3, 7, dtype=torch.bool)
    mask[1, 5:] = False
    loss = meta.loss(torch.where(mask[..., None], x0, math.nan), x1, mask, mask, generator=seeded(5))
    t = torch.rand(3, 7, generator=seeded(5), dtype=DOUBLE)
    total = 0.0
    for p in range(3):
        e = torch.tensor(by_hand(meta.encoder, x0[p][mask[p]])).float()  # of x0, not of x_t, nor of x1
        square = []
        for n in mask[p].nonzero()[:, 0].tolist():
            xt = (1 - t[p, n]) * x0[p, n] + t[p, n] * x1[p, n]
            v = meta.velocity(t[p : p + 1, n : n + 1], xt[None, None], e.double()[None])[0, 0]
            square.append((v - (x1[p, n] - x0[p, n])).square().sum().item())
        total += sum(square) / len(square) / 3
    assert loss.item() == pytest.approx(total, rel=1e-6)
    assert t.unique().numel() == 21


def test_a_constant_embedding_is_plain_flow_matching_bit_for_bit():
    class Constant(nn.Module):
        def forward(self, x, mask=None, features=None):
            return torch.ones(len(x), 8, dtype=x.dtype)

    meta, x0, x1 = MetaFlowMatching(Constant(), velocity()), draw(2, 6, 2), draw(2, 6, 2, seed=1)
    generator = seeded(3)
    t = torch.rand(2, 6, dtype=DOUBLE, generator=generator)
    v = meta.velocity(t, x0 + t[..., None] * (x1 - x0), torch.ones(2, 8, dtype=DOUBLE))
    plain = (v - (x1 - x0)).square().sum(-1).mean(1).mean()
    assert torch.equal(meta.loss(x0, x1, generator=seeded(3)), plain)
    alone = meta.transport(x0[:1], solver="rk4")
    torch.testing.assert_close(alone, meta.transport(x0, solver="rk4")[:1], rtol=0, atol=1e-13)


def test_its_gradient_is_that_of_the_official_loss():
    """``|b|^2 - 2 <b, u>``, which may be negative, differs by what does not depend on the weights."""
    meta, x0, x1 = model(), draw(2, 6, 2), draw(2, 6, 2, seed=1)
    meta.loss(x0, x1, generator=seeded(3)).backward()
    ours = [p.grad.clone() for p in meta.parameters()]
    meta.zero_grad()
    t = torch.rand(2, 6, dtype=DOUBLE, generator=seeded(3))
    b = meta.velocity(t, x0 + t[..., None] * (x1 - x0), meta.encoder(x0))
    (b.square().sum(-1) - 2 * (b * (x1 - x0)).sum(-1)).mean().backward()
    for mine, p in zip(ours, meta.parameters(), strict=True):
        torch.testing.assert_close(mine, p.grad, rtol=0, atol=1e-13)


class Recorded(nn.Module):
    """A velocity of zero, from whose loss x_t and the target are read."""

    def forward(self, t, x, e, cond=None):
        self.t, self.x, self.e, self.cond = t, x, e, cond
        return torch.zeros_like(x)


def pairs(coupling, x0, x1, mask0=None, mask1=None, seed=0, **options):
    """The ends of the paths that a loss is of: x_t at two times, taken apart."""
    meta, generator = MetaFlowMatching(Mean(), Recorded(), coupling, **options), seeded(seed)
    meta.loss(x0, x1, mask0, mask1, generator=generator)
    return meta.velocity


@pytest.mark.parametrize(("n", "m"), [(8, 8), (8, 5), (5, 8), (6, 3)])
def test_independent_pairs_use_every_point_as_often_as_they_can(n, m):
    x0, x1 = torch.zeros(2, n, 1, dtype=DOUBLE), torch.arange(1.0, m + 1, dtype=DOUBLE).expand(2, m)[..., None]
    counts, together = torch.zeros(n, m), []
    for seed in range(200):
        at = pairs("independent", x0, x1, seed=seed)
        ends = (at.x[..., 0] / at.t).round().long() - 1
        used = torch.bincount(ends[0], minlength=m)
        assert used.max() - used.min() <= 1
        together.append(torch.equal(ends[0], ends[1]))
        counts += torch.nn.functional.one_hot(ends, m).sum(0)
    assert (counts / 400 - 1 / m).abs().max() < 5 * math.sqrt(1 / m / 400)  # every pair is as likely
    assert not all(together)


def test_pairs_of_padded_populations_are_of_points():
    x0, x1 = torch.zeros(2, 6, 1, dtype=DOUBLE), torch.ones(2, 4, 1, dtype=DOUBLE)
    mask1 = torch.tensor([[True, False, True, False], [True] * 4])
    for coupling in ("independent", "ot"):
        at = pairs(coupling, x0, torch.where(mask1[..., None], x1, math.nan), None, mask1)
        torch.testing.assert_close(at.x[..., 0], at.t)


@pytest.mark.parametrize(("n", "m"), [(5, 5), (5, 7)])
@pytest.mark.parametrize("base", ["source", "gaussian"])
def test_ot_pairs_are_of_the_least_cost_from_where_paths_start(base, n, m):
    x0, x1 = draw(2, n, 2), draw(2, m, 2, seed=1) + 3
    if base == "gaussian":
        at, x0 = pairs("ot", x0, x1, base=base, seed=2), draw(2, n, 2, seed=2)
    else:
        at = pairs("ot", x0, x1)
    ends = x0 + (at.x - x0) / at.t[..., None]
    for p in range(2):
        cost = (x0[p][:, None] - ends[p][None]).square().sum(-1)
        least = min(sum(cost[i, j].item() for i, j in enumerate(order)) for order in itertools.permutations(range(n)))
        assert cost.diagonal().sum().item() == pytest.approx(least, rel=1e-9)
        distance = torch.cdist(ends[p], x1[p])
        assert distance.min(1).values.max() < 1e-9  # they are points of x1, each once
        assert distance.argmin(1).unique().numel() == n


def test_ot_pairs_of_padded_populations_are_of_the_least_cost():
    x0, x1, mask = draw(1, 6, 2), draw(1, 4, 2, seed=1), torch.tensor([[False, True, True, False, True, True]])
    at = pairs("ot", torch.where(mask[..., None], x0, math.nan), x1, mask)
    real = x0[mask]
    ends = real + (at.x[mask] - real) / at.t[mask][:, None]
    cost = torch.cdist(real, x1[0]).square()
    least = min(sum(cost[i, j].item() for i, j in enumerate(order)) for order in itertools.permutations(range(4)))
    assert (real - ends).square().sum().item() == pytest.approx(least, rel=1e-9)
    assert torch.cdist(ends, x1[0]).argmin(1).unique().numel() == 4


def test_a_gaussian_base_starts_at_noise_and_embeds_x0():
    x0, x1 = draw(2, 500, 2) + 10, draw(2, 500, 2, seed=1) - 3
    at = pairs("paired", x0, x1, base="gaussian")
    torch.testing.assert_close(at.e, x0.mean(1))
    start = (at.x - at.t[..., None] * x1) / (1 - at.t[..., None])
    assert start.mean().abs() < 0.15
    assert start.std() == pytest.approx(1, abs=0.1)
    meta = MetaFlowMatching(Mean(), Recorded(), base="gaussian")
    noise = meta.transport(x0, generator=seeded(7))
    assert torch.equal(noise, torch.randn(x0.shape, dtype=DOUBLE, generator=seeded(7)))
    assert torch.equal(meta.velocity.e, x0.mean(1))


def test_a_condition_is_given_on_only_where_there_is_one():
    field = Recorded()
    meta, x, c = MetaFlowMatching(Mean(), field), draw(2, 5, 2), draw(2, 3)
    meta.loss(x, x, cond=c)
    assert field.cond is c
    meta.transport(x, cond=c)
    assert field.cond is c
    field.forward = lambda t, x, e: torch.zeros_like(x)  # takes none
    meta.loss(x, x)
    meta.transport(x)


# Alternating


def test_alternating_steps_train_one_of_the_two_with_the_other_as_it_is():
    meta = model(alternate=True)
    x0, x1, index = draw(2, 6, 2), draw(2, 6, 2, seed=1), torch.tensor([4, 9])
    for call in range(4):
        meta.zero_grad()
        meta.loss(x0, x1, index=index, generator=seeded(call)).backward()
        moved, fixed = (meta.encoder, meta.velocity) if call % 2 else (meta.velocity, meta.encoder)
        assert all(p.grad is None for p in fixed.parameters())
        trained = [p.grad.clone() for p in moved.parameters()]
        joint = model()  # the same weights
        joint.loss(x0, x1, generator=seeded(call)).backward()
        other = joint.encoder if call % 2 else joint.velocity
        for ours, p in zip(trained, other.parameters(), strict=True):
            torch.testing.assert_close(ours, p.grad, rtol=0, atol=1e-14)


def test_remembered_embeddings_are_those_of_the_last_encoder_step():
    meta = model(alternate=True)
    x0, x1, index = draw(2, 6, 2), draw(2, 6, 2, seed=1), torch.tensor([4, 9])
    first = meta.encoder(x0).detach()
    seen = []
    meta.velocity.register_forward_pre_hook(lambda module, given: seen.append(given[2].detach()))

    def shake(by):
        with torch.no_grad():
            for p in meta.encoder.parameters():
                p.mul_(by)

    meta.loss(x0, x1, index=index)
    shake(1.3)
    second = meta.encoder(x0).detach()
    meta.loss(x0[:1], x1[:1], index=index[:1])  # the encoder's turn; population 9 is not in it
    shake(0.7)
    meta.loss(x0, x1, index=index)
    torch.testing.assert_close(seen[0], first)
    torch.testing.assert_close(seen[1], second[:1])
    torch.testing.assert_close(seen[2], torch.stack([second[0], first[1]]))
    meta.loss(x0, x1, index=index)
    meta.loss(x0, x1, index=index)
    torch.testing.assert_close(seen[4], meta.encoder(x0).detach())
    meta.loss(x0, x1, index=index)
    meta.loss(x0, x1, index=torch.tensor([4, 77]))  # one that was not seen is embedded
    torch.testing.assert_close(seen[6], meta.encoder(x0).detach())


def test_evaluation_neither_counts_nor_remembers():
    meta = model(alternate=True).eval()
    x = draw(2, 6, 2)
    joint = model().loss(x, x + 1, generator=seeded(1))
    assert torch.equal(meta.loss(x, x + 1, generator=seeded(1)), joint)
    assert meta.get_extra_state() == {"calls": 0}


@pytest.mark.parametrize("at", [2, 3])
def test_saved_and_loaded_half_way_is_the_uninterrupted_run(at, tmp_path):
    def run(meta, optimizer, start, end):
        for i in range(start, end):
            loss = meta.loss(x0[i % 3], x1[i % 3], index=torch.tensor([i % 3, 5 + i % 2]), generator=seeded(i))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    x0, x1 = draw(3, 2, 6, 2), draw(3, 2, 6, 2, seed=1)
    straight = model(alternate=True)
    run(straight, torch.optim.SGD(straight.parameters(), 0.1), 0, 6)
    first = model(alternate=True)
    run(first, torch.optim.SGD(first.parameters(), 0.1), 0, at)
    torch.save(first.state_dict(), tmp_path / "meta.pt")
    second = MetaFlowMatching(encoder(seed=8), velocity(seed=9), alternate=True)
    second.load_state_dict(torch.load(tmp_path / "meta.pt", weights_only=True))
    run(second, torch.optim.SGD(second.parameters(), 0.1), at, 6)
    for a, b in zip(straight.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)


# The transport


@pytest.mark.parametrize(("solver", "error"), [("dopri5", 1e-4), ("rk4", 1e-8), ("euler", 3e-2)])
def test_the_exact_field_moves_populations_to_where_they_go(solver, error):
    x0 = draw(3, 20, 2) + 4 * draw(3, 1, 2, seed=1)
    truth = x0.mean(1, keepdim=True) * 0.7 + 0.3 * x0
    meta = MetaFlowMatching(Mean(), Contraction())
    x1 = meta.transport(x0, solver=solver)
    assert (x1 - truth).abs().max() < error
    assert not x1.requires_grad
    path = meta.transport(x0, solver=solver, steps=8, return_path=True)
    assert path.shape == (9, 3, 20, 2)
    assert torch.equal(path[0], x0)
    s = torch.linspace(0, 1, 9, dtype=DOUBLE)[:, None, None, None]
    assert (path - (s * truth + (1 - s) * x0)).abs().max() < max(error, 1e-4) * 10
    if solver == "dopri5":
        assert torch.equal(path[-1], x1)
        assert len(meta.velocity.seen) < 120


def test_it_embeds_once_and_what_it_is_told_to():
    class Counted(Mean):
        calls = 0

        def forward(self, x, mask=None, features=None):
            Counted.calls += 1
            return super().forward(x, mask)

    meta, x0, whole = MetaFlowMatching(Counted(), Contraction()), draw(2, 5, 2), draw(2, 50, 2, seed=1)
    x1 = meta.transport(x0, context=whole)
    assert Counted.calls == 1
    torch.testing.assert_close(x1, 0.7 * whole.mean(1, keepdim=True) + 0.3 * x0, rtol=0, atol=1e-4)
    mask = torch.arange(5).expand(2, 5) < 3  # of x0, and not of its context
    x1 = meta.transport(x0, mask, context=whole[:, :5])
    moved = 0.7 * whole[:, :5].mean(1, keepdim=True) + 0.3 * x0
    torch.testing.assert_close(x1, torch.where(mask[..., None], moved, x0), rtol=0, atol=1e-4)


@pytest.mark.parametrize("solver", ["dopri5", "rk4"])
def test_what_is_padded_stays_and_changes_nothing(solver):
    meta, x0 = model(), draw(2, 9, 2)
    mask = torch.ones(2, 9, dtype=torch.bool)
    mask[0, 6:] = False
    padded = torch.where(mask[..., None], x0, math.nan)
    x1 = meta.transport(padded, mask, solver=solver)
    assert x1[0, 6:].isnan().all()
    both = meta.transport(x0[:, :6], solver=solver)[:1]
    torch.testing.assert_close(x1[:1, :6], both, rtol=0, atol=2e-3 if solver == "dopri5" else 1e-12)
    other = torch.where(mask[..., None], x0, 1e9)
    assert torch.equal(meta.transport(other, mask, solver=solver)[mask], x1[mask])


def test_no_step_is_taken_for_what_is_padded():
    class Restless(nn.Module):
        calls = 0

        def forward(self, t, x, e, cond=None):
            self.calls += 1
            return 1 + 100 * (100 * t).cos() * (x.norm(dim=-1, keepdim=True) < 1)  # only near the origin

    meta, x0 = MetaFlowMatching(Mean(), Restless()), draw(1, 9, 2).abs() + 3
    meta.transport(x0[:, :6])
    calls, meta.velocity.calls = meta.velocity.calls, 0
    meta.transport(x0, torch.arange(9)[None] < 6)
    assert meta.velocity.calls == calls < 30


def test_half_way_twice_is_the_way():
    meta, x0 = model(), draw(2, 9, 2)
    e = meta.encoder(x0)

    def field(x, t):
        return meta.velocity(t, x, e)

    with torch.no_grad():
        half = integrators.dopri5(field, x0, (0.0, 0.5), rtol=1e-9, atol=1e-9)[-1]
        way = integrators.dopri5(field, half, (0.5, 1.0), rtol=1e-9, atol=1e-9)[-1]
    assert (meta.transport(x0) - way).abs().max() < 1e-3
    torch.testing.assert_close(meta.transport(x0, solver="rk4", steps=50), way, rtol=0, atol=1e-5)  # SELU has a kink
    middle = meta.transport(x0, solver="rk4", steps=50, return_path=True)[25]
    torch.testing.assert_close(middle, half, rtol=0, atol=1e-5)


def test_a_golden_trajectory():
    """Euler's of the perceptron by hand, with the embedding by hand."""
    meta, x0 = model(), draw(1, 6, 2)
    e = by_hand(meta.encoder, x0[0])
    x = x0[0].numpy()
    for i in range(4):
        x = x + 0.25 * np.stack([perceptron(meta.velocity, i / 4, point, e) for point in x])
    assert meta.transport(x0, solver="euler", steps=4)[0].numpy() == pytest.approx(x, abs=1e-5)


@pytest.mark.parametrize("base", ["source", "gaussian"])
def test_centred_it_moves_with_the_data(base):
    x0, x1, by = draw(2, 9, 2), draw(2, 9, 2, seed=1), torch.tensor([50.0, -30.0], dtype=DOUBLE)
    meta = model(center=True, base=base)
    here, there = (meta.transport(x0 + s, generator=seeded(1)) for s in (0, by))
    torch.testing.assert_close(there, here + by, rtol=0, atol=1e-11)
    torch.testing.assert_close(
        meta.loss(x0 + by, x1 + by, generator=seeded(1)), meta.loss(x0, x1, generator=seeded(1)), rtol=1e-12, atol=0
    )
    fixed = MetaFlowMatching(meta.encoder, meta.velocity, base=base)
    here, there = (fixed.transport(x0 + s, generator=seeded(1)) for s in (0, by))
    assert (there - here - by).abs().max() > 1e-2  # it is not built in


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_types_are_those_of_the_input(dtype):
    meta, x0 = model(dtype=torch.float32), draw(2, 9, 2, dtype=torch.float32)
    exact = meta.transport(x0)
    low = meta.to(dtype).transport(x0.to(dtype))
    assert low.dtype == dtype
    assert (low.float() - exact).abs().max() < 20 * torch.finfo(dtype).eps + 1e-4
    calls = []
    meta.velocity.register_forward_hook(lambda *of: calls.append(of))
    meta.transport(x0.to(dtype))
    assert len(calls) < 30  # rounding in the field is no error of a step
    assert meta.loss(x0.to(dtype), x0.to(dtype)).dtype == dtype
    assert meta.transport(x0[:0].to(dtype)).shape == (0, 9, 2)


def test_it_is_a_denoiser_of_the_rooms_solvers():
    """Flow's time runs from noise to data backwards: s = 1 - t, and its flow is ``-v``."""
    meta, x0 = model(), draw(3, 5, 2)
    e = meta.encoder(x0).detach()
    denoiser = Denoiser(lambda x, s: -meta.velocity((1 - s)[:, None].expand(3, 5), x, e), Flow(), "flow")
    with torch.no_grad():
        x = sample(denoiser, x0, solver=Euler(), grid=torch.linspace(1, 0, 21, dtype=DOUBLE))
    torch.testing.assert_close(x, meta.transport(x0, solver="euler", steps=20), rtol=0, atol=1e-12)


def test_a_linear_gaussian_case_is_learned():
    """v(x, t | e) against E[x1 - x0 | x_t, i] on populations not seen, for N(m, I) taken to N(-m, I) in independent pairs.

    There x_t has the mean (1 - 2t) m and the variance t^2 + (1 - t)^2, and x1 - x0 the covariance 2t - 1 with it.
    """
    torch.manual_seed(0)
    meta = MetaFlowMatching(PopulationEncoder(2, 32, 2, 0), MetaVelocity(2, 32, 64, 3, 0), "independent")
    optimizer, generator, steps = torch.optim.Adam(meta.parameters(), 1e-2), seeded(1), 350
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)

    def populations(count, points):
        m = 2 * torch.randn(count, 1, 2, generator=generator)
        return m, *(s * m + torch.randn(count, points, 2, generator=generator) for s in (1, -1))

    for _ in range(steps):
        loss = meta.loss(*populations(32, 32)[1:], generator=generator)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    m, x0, x1 = populations(50, 100)
    t = torch.rand(50, 100, 1, generator=generator)
    x = (1 - t) * x0 + t * x1
    u = -2 * m + (2 * t - 1) / (t**2 + (1 - t) ** 2) * (x - (1 - 2 * t) * m)
    with torch.no_grad():
        v = meta.velocity(t[..., 0], x, meta.encoder(x0))
    assert torch.corrcoef(torch.stack([v.flatten(), u.flatten()]))[0, 1] > 0.99


# Distances


@pytest.mark.parametrize("p", [1, 2, 3.5])
def test_wasserstein_is_exact(p):
    x, y = draw(5, 2), draw(5, 2, seed=1)
    cost = torch.cdist(x, y) ** p
    least = min(sum(cost[i, j].item() for i, j in enumerate(order)) for order in itertools.permutations(range(5))) / 5
    assert wasserstein(x, y, p) == pytest.approx(least ** (1 / p), rel=1e-9)
    twice = wasserstein(torch.cat([x, x]), y, p)  # the same law, by the linear program
    assert twice == pytest.approx(least ** (1 / p), rel=1e-9)
    assert wasserstein(x, y.repeat(3, 1), p) == pytest.approx(twice, rel=1e-9)


def test_wasserstein_of_different_sizes_is_scipys_on_the_line():
    from scipy.stats import wasserstein_distance

    x, y = draw(7, 1), draw(11, 1, seed=1)
    assert wasserstein(x, y, 1) == pytest.approx(wasserstein_distance(x[:, 0].numpy(), y[:, 0].numpy()), rel=1e-9)
    assert wasserstein(1e-150 * x, 1e-150 * y) == pytest.approx(1e-150 * wasserstein(x, y), rel=1e-6)
    assert wasserstein(x, x) == 0
    assert wasserstein(x + 5, x.float().double()) == pytest.approx(5, rel=1e-6)


def test_mmd_is_scikit_learns():
    from sklearn.metrics.pairwise import rbf_kernel

    x, y, gammas = draw(9, 3), draw(6, 3, seed=1) + 1, (2, 1, 0.5, 0.1, 0.01, 0.005)
    each = [rbf_kernel(x, x, g).mean() + rbf_kernel(y, y, g).mean() - 2 * rbf_kernel(x, y, g).mean() for g in gammas]
    assert mmd_rbf(x, y) == pytest.approx(np.mean(each), rel=1e-12)
    assert mmd_rbf(x, y, [0.5]) == pytest.approx(each[2], rel=1e-12)
    assert mmd_rbf(x, x) == pytest.approx(0, abs=1e-15)


def test_without_scipy_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy.optimize", None)
    with pytest.raises(ImportError, match=r"pip install 'polyak\[lab\]'"):
        wasserstein(draw(3, 2), draw(3, 2, seed=1))
    assert model().loss(draw(1, 5, 2), draw(1, 5, 2)).isfinite()


# Bad input

X, ONE = draw(2, 5, 2), torch.ones(2, 5, dtype=torch.bool)
NO_ONE = ONE & torch.tensor([[True], [False]])
HOLE = X.clone()
HOLE[1, 2, 0] = math.nan
WRONG = {
    "an empty population": (lambda m: m.loss(X, X, NO_ONE, NO_ONE), r"x0 must have a point .* none in number 1"),
    "an empty one to move": (lambda m: m.transport(X, NO_ONE), r"x0 must have a point"),
    "an empty one to embed": (lambda m: m.encoder(X, NO_ONE), r"x must have a point"),
    "no points": (lambda m: m.transport(X[:, :0]), r"x0 must have shape \[P, N, D\] with N > 0, got \(2, 0, 2\)"),
    "no populations": (lambda m: m.loss(X[:0], X[:0]), r"x0 and x1 must have the same populations, one or more"),
    "other populations": (lambda m: m.loss(X, X[:1]), r"x0 and x1 must have the same populations, .* 2 and 1"),
    "other counts": (lambda m: m.loss(X, X[:, :4]), r'x0 and x1 .* coupling="paired", got \[5, 5\] and \[4, 4\]'),
    "another mask": (lambda m: m.loss(X, X, ONE, ONE & (torch.arange(5) > 0)), r"x0 and x1 must have the same points"),
    "another dimension": (lambda m: m.loss(X, X[..., :1]), r"x1 must have shape \[P, N, 2\] with N > 0"),
    "NaN before": (lambda m: m.loss(HOLE, X), r"x0 must be finite, got NaN or infinity in population 1"),
    "NaN after": (lambda m: m.loss(X, HOLE), r"x1 must be finite"),
    "NaN to move": (lambda m: m.transport(HOLE), r"x0 must be finite"),
    "NaN around": (lambda m: m.transport(X, context=HOLE), r"context must be finite"),
    "other contexts": (
        lambda m: m.transport(X, context=X[:1]),
        r"context must have as many populations as x0, 2, got 1",
    ),
    "a mask of numbers": (
        lambda m: m.loss(X, X, ONE.float(), ONE),
        r"mask of x0 must be a tensor of bool, shape \(2, 5\)",
    ),
    "a short mask": (lambda m: m.transport(X, ONE[:, :4]), r"mask of x0 must be"),
    "whole numbers": (lambda m: m.loss(X.long(), X), r"x0 must be a floating-point tensor"),
    "no index": (lambda m: m.loss(X, X), r"index must say which populations"),
    "an index of others": (lambda m: m.loss(X, X, index=torch.arange(3)), r"index must be a tensor of 2 integers"),
    "an index of numbers": (lambda m: m.loss(X, X, index=torch.ones(2)), r"index must be a tensor of 2 integers"),
    "features that are not known": (lambda m: m.encoder(X, features=X), r"features must have shape \(2, 5, 0\)"),
    "a condition that is not known": (
        lambda m: m.transport(X, cond=X[:, 0]),
        r"cond must have shape \(2, 0\) \(cond=0\)",
    ),
    "another solver": (lambda m: m.transport(X, solver="rk5"), r"solver must be one of .* did you mean 'rk4'"),
    "no steps": (lambda m: m.transport(X, steps=0), r"steps must be at least 1"),
    "another coupling": (lambda m: model(coupling="OT"), r"coupling must be one of .* did you mean 'ot'"),
    "another base": (lambda m: model(base="noise"), r"base must be one of 'source', 'gaussian'"),
    "a class for a module": (lambda m: MetaFlowMatching(Mean, Mean()), r"encoder must be a torch.nn.Module"),
    "another pool": (lambda m: encoder(pool="max"), r"pool must be one of 'mean', got 'max'"),
    "one plain layer": (lambda m: velocity(skip=False, layers=1), r"layers must be at least 2 with skip=False"),
    "times of others": (
        lambda m: m.velocity(torch.ones(2), X, draw(2, 8)),
        r"t must be one time, or of shape \(2, 5\)",
    ),
    "embeddings of others": (lambda m: m.velocity(0.5, X, draw(3, 8)), r"e must have shape \(2, 8\), got \(3, 8\)"),
    "points of one population": (lambda m: m.velocity(0.5, X[0], draw(2, 8)), r"x must have shape \[P, N, 2\]"),
    "samples of nothing": (lambda m: wasserstein(X[0, :0], X[0]), r"x must have points"),
    "samples of NaN": (lambda m: wasserstein(X[1], HOLE[1]), r"y must have points, all of them finite"),
    "samples of two sizes": (lambda m: wasserstein(X[0], X[0, :, :1]), r"x and y must have one dimension, got 2 and 1"),
}


@pytest.mark.filterwarnings("ignore:k is")
@pytest.mark.parametrize("what", WRONG)
def test_bad_input_is_refused_by_name_and_changes_nothing(what):
    meta, (call, says) = model(alternate=True), WRONG[what]
    before = copy.deepcopy(meta.state_dict())
    with pytest.raises((TypeError, ValueError), match=says):
        call(meta)
    after = meta.state_dict()
    assert before.pop("_extra_state") == after.pop("_extra_state")
    assert all(torch.equal(a, after[name]) for name, a in before.items())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("k", [0, 4])
def test_on_a_gpu_it_is_the_same(k):
    meta, x0 = model(k=k), draw(2, 9, 2)
    loss, moved = meta.loss(x0, x0 + 1, generator=seeded(1)), meta.transport(x0)
    mask = torch.ones(2, 9, dtype=torch.bool)
    meta, there = meta.cuda(), x0.cuda()
    torch.testing.assert_close(meta.transport(there, mask.cuda()).cpu(), moved, rtol=0, atol=1e-10)
    assert meta.loss(there, there + 1, generator=torch.Generator("cuda").manual_seed(1)).item() == pytest.approx(
        loss.item(), rel=0.5
    )
    assert MetaFlowMatching(meta.encoder, meta.velocity, "ot").loss(there, there + 1).isfinite()
