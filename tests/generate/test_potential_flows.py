"""Potential flows against closed forms, finite differences, and derivatives taken by plain autograd or by hand in NumPy."""

from __future__ import annotations

import copy
import itertools
import math
import sys
import types
import warnings

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from polyak.generate import (
    PairClassifier,
    PotentialFlow,
    divergence,
    jacobian_asymmetry,
    potential_flow_loss,
    variation_predictability,
    wave_residual,
)

DOUBLE = torch.float64
DIM, K, STEPS, B = 4, 3, 8, 5


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=DOUBLE, generator=seeded(seed))


def made(dim: int = DIM, **options) -> PotentialFlow:
    """A flow whose weights are large enough for every term to count."""
    torch.manual_seed(3)
    flow = PotentialFlow(dim, **{"k": K, "steps": STEPS, "c_init": 0.7, **options}).double()
    for p in flow.potentials.parameters():
        p.data *= 2.0
    return flow


class Function(nn.Module):
    """A potential that is a formula."""

    def __init__(self, f) -> None:
        super().__init__()
        self.f = f

    def forward(self, z, t):
        return self.f(z, t)


def formula(f, steps: int = STEPS) -> PotentialFlow:
    flow = made(steps=steps)
    flow.potentials[0] = Function(f)
    return flow


def images(z: Tensor) -> Tensor:
    """Smooth images, (B, 1, 2, 2)."""
    return torch.sin(z @ draw(z.shape[1], 4, seed=9).to(z)).unflatten(1, (1, 2, 2))


def told(before: Tensor, after: Tensor) -> Tensor:
    """Logits that know the order of a pair."""
    return torch.cat([before, 2 * after], 1).flatten(1) @ draw(8, K, seed=8)


N = torch.tensor([0.5, -0.5, 0.5, 0.5], dtype=DOUBLE)  # of length one
PLANE = (lambda z, t: torch.sin(z @ N - 0.7 * t), 0.7)
WAVES = torch.tensor([0.4, 1.1, -0.3, 0.8], dtype=DOUBLE)
STANDING = (lambda z, t: torch.cos(0.7 * t * WAVES.norm()) * torch.cos(z @ WAVES), 0.7)


@pytest.mark.parametrize("time", [1.3, torch.linspace(0.0, 2.0, B, dtype=DOUBLE)])
@pytest.mark.parametrize(("u", "c"), [PLANE, STANDING])
def test_waves_leave_no_residual_and_the_official_one_is_another(u, c, time):
    z = draw(B, DIM)
    assert wave_residual(u, z, time, c).abs().max() < 1e-14
    assert wave_residual(u, z, time, torch.full((B,), c, dtype=DOUBLE)).abs().max() < 1e-14
    assert wave_residual(u, z, time, 1.2 * c).abs().max() > 0.05
    assert wave_residual(u, z, 1.3, c, "official").abs().max() > 0.5


def test_the_residual_is_that_of_finite_differences():
    flow, z, h = made(), draw(B, DIM), 1e-3
    u = flow.potentials[1]
    t = torch.linspace(0.5, 3.0, B, dtype=DOUBLE)
    twice = (u(z, t + h) - 2 * u(z, t) + u(z, t - h)) / h**2
    shifts = torch.eye(DIM, dtype=DOUBLE) * h
    laplacian = sum((u(z + e, t) - 2 * u(z, t) + u(z - e, t)) / h**2 for e in shifts)
    found = wave_residual(u, z, t, 0.7)
    assert found.shape == (B,)
    torch.testing.assert_close(found, twice - 0.49 * laplacian, rtol=1e-4, atol=1e-5)
    assert min(laplacian.abs().max(), twice.abs().max()) > 0.05


def by_autograd(u, z: Tensor, t: float, c) -> Tensor:
    """The published residual: row sums of the Hessian, and u_tt of one time that all rows share."""
    at = torch.full((1, 1), t, dtype=DOUBLE, requires_grad=True)
    z = z.clone().requires_grad_()
    value = u(z, at[0]).sum()
    u_t = torch.autograd.grad(value, at, create_graph=True)[0]
    u_tt = torch.autograd.grad(u_t.sum(), at, create_graph=True)[0]
    u_z = torch.autograd.grad(value, z, create_graph=True)[0]
    return u_tt - c**2 * torch.autograd.grad(u_z.sum(), z, create_graph=True)[0]


def test_official_laplacian_is_the_row_sums_of_the_hessian():
    u, z = made().potentials[0], draw(B, DIM)
    found = wave_residual(u, z, 2.0, 0.7, "official")
    assert found.shape == z.shape
    torch.testing.assert_close(found, by_autograd(u, z, 2.0, 0.7), rtol=0, atol=1e-13)
    speeds = torch.linspace(0.2, 1.0, B, dtype=DOUBLE)
    found = wave_residual(u, z, 2.0, speeds, "official")
    torch.testing.assert_close(found, by_autograd(u, z, 2.0, speeds[:, None]), rtol=0, atol=1e-13)
    still = wave_residual(lambda y, t: 0.5 * ((y @ N) ** 2), z, 0.0, 1.0, "official")
    torch.testing.assert_close(still, (-N.sum() * N).expand(B, DIM), rtol=0, atol=1e-13)  # H = n n^T, its trace is 1


def test_official_second_derivative_grows_with_the_batch():
    u, z = made().potentials[0], draw(B, DIM)
    once, twice = (wave_residual(u, z.repeat(n, 1), 2.0, 0.0, "official") for n in (1, 2))
    torch.testing.assert_close(twice[:B], 2 * once)
    torch.testing.assert_close(once[0, 0], wave_residual(u, z, 2.0, 0.0).sum())


def test_hutchinson_has_the_traces_mean_and_is_exact_for_a_diagonal_hessian():
    u, z = made().potentials[0], draw(B, DIM)
    probes = 4000
    exact, found = (
        wave_residual(u, z, 2.0, 0.7),
        wave_residual(u, z, 2.0, 0.7, "hutchinson", probes=probes, generator=seeded()),
    )
    hessian = torch.stack(
        [torch.autograd.functional.hessian(lambda y: u(y[None], torch.tensor(2.0)).sum(), row) for row in z]
    )
    off = hessian - torch.diag_embed(hessian.diagonal(dim1=1, dim2=2))
    deviation = 0.49 * (2 * off.square().sum((1, 2)) / probes).sqrt()  # Hutchinson's variance
    assert ((found - exact).abs() < 5 * deviation).all()
    plain = wave_residual(lambda y, t: y.sin().sum(1), z, 2.0, 0.7, "hutchinson", generator=seeded())
    torch.testing.assert_close(plain, 0.49 * z.sin().sum(1), rtol=0, atol=1e-14)


@pytest.mark.parametrize("dim", [4, 5])
def test_a_velocity_is_the_potentials_gradient_and_has_no_curl(dim):
    flow, z = made(dim), draw(B, dim).requires_grad_()
    for t in (0.0, 3, torch.linspace(0, 7, B, dtype=DOUBLE)):
        expected = torch.autograd.grad(flow.potential(1, z, t).sum(), z)[0]
        torch.testing.assert_close(flow.velocity(1, z, t), expected, rtol=0, atol=1e-15)
    asymmetry = jacobian_asymmetry(lambda y, t: flow.velocity(1, y, t), z.detach(), 2.0, generator=seeded())
    assert asymmetry.max() < 1e-6
    spread = divergence(lambda y, t: flow.velocity(1, y, t), z.detach(), 2.0)
    still = wave_residual(lambda y, t: flow.potentials[1](y, torch.tensor(2.0, dtype=DOUBLE)), z.detach(), 2.0, 1.0)
    torch.testing.assert_close(spread, -still)


def test_potentials_share_nothing():
    flow, z = made(), draw(B, DIM)
    before = [flow.potential(k, z, 1.0) for k in range(K)]
    assert all((a - b).abs().max() > 1e-3 for a, b in itertools.combinations(before, 2))
    for p in flow.potentials[1].parameters():
        p.data.zero_()
    after = [flow.potential(k, z, 1.0) for k in range(K)]
    assert [torch.equal(a, b) for a, b in zip(before, after, strict=True)] == [True, False, True]
    shapes = {tuple(p.shape) for p in flow.potentials[0].parameters()}
    assert shapes == {(DIM, DIM), (DIM,), (1, DIM), (1,)}


@pytest.mark.parametrize("dim", [6, 7, 2])
def test_a_walk_is_the_one_computed_by_hand(dim):
    """A golden trajectory: every derivative by the chain rule in NumPy, weights from a formula."""
    flow, count = PotentialFlow(dim, k=2, steps=6).double(), 0
    for p in flow.potentials[1].parameters():
        n = p.numel()
        p.data = torch.sin(torch.arange(count, count + n, dtype=DOUBLE) * 0.7).reshape(p.shape) * 0.6
        count += n
    w = {name: p.detach().numpy() for name, p in flow.potentials[1].named_parameters()}
    z = np.linspace(-1.0, 1.2, 2 * dim).reshape(2, dim)
    path = [z]
    for t in range(4):
        i = np.arange(dim // 2)
        angle = t * np.exp(-np.log(1e4) * i / max(dim // 2 - 1, 1))
        wave = np.concatenate([np.sin(angle), np.cos(angle), np.zeros(dim % 2)])
        a = w["time.0.weight"] @ wave + w["time.0.bias"]
        gelu = np.array([x * (1 + math.erf(x / math.sqrt(2))) / 2 for x in a])
        e = w["time.2.weight"] @ gelu + w["time.2.bias"]
        h1 = np.tanh(path[-1] @ w["latent.weight"].T + w["latent.bias"])
        h2 = np.tanh((h1 + e) @ w["fusion.weight"].T + w["fusion.bias"])
        u = np.tanh(h2 @ w["out.weight"].T + w["out.bias"])
        back = (1 - u**2) * w["out.weight"] * (1 - h2**2)
        path.append(path[-1] + ((back @ w["fusion.weight"]) * (1 - h1**2)) @ w["latent.weight"])
    walked = flow.traverse(torch.from_numpy(z), 1, 4)
    np.testing.assert_allclose(walked.detach().numpy(), np.stack(path), rtol=0, atol=1e-13)
    if dim == 6:  # so that no release changes it
        np.testing.assert_allclose(path[-1][0], GOLDEN, rtol=0, atol=1e-12)


GOLDEN = [
    -1.04256549836168,
    -0.82632390586908,
    -0.59770176912387,
    -0.37016052627056,
    -0.15665325416684,
    0.03646736605996,
]


def test_walks_with_known_ends():
    v, z = draw(DIM, seed=4), draw(B, DIM)
    straight = formula(lambda y, t: y @ v).traverse(z, 0, 6)
    torch.testing.assert_close(straight, z + torch.arange(7, dtype=DOUBLE)[:, None, None] * v, rtol=0, atol=1e-13)
    halved = formula(lambda y, t: -y.square().sum(1) / 4).traverse(z, 0, 6)
    torch.testing.assert_close(halved, z * 0.5 ** torch.arange(7, dtype=DOUBLE)[:, None, None], rtol=0, atol=1e-13)
    timed = formula(lambda y, t: t * (y @ v)).traverse(z, 0, 4)  # 0 + 1 + 2 + 3: times start at zero, and are one apart
    torch.testing.assert_close(timed[-1], z + 6 * v, rtol=0, atol=1e-13)


def test_backwards_is_the_mirror_image():
    flow, z = made(), draw(B, DIM)
    ahead, back = flow.traverse(z, 1), flow.traverse(z, 1, direction=-1)
    assert ahead.shape == (STEPS // 2 + 1, B, DIM)
    torch.testing.assert_close(back, 2 * z - ahead, rtol=0, atol=0)
    for steps, rows in ((0, B), (3, 0)):
        path = flow.traverse(z[:rows], 1, steps, direction=-1)
        assert path.shape == (steps + 1, rows, DIM)
        assert torch.equal(path[0], z[:rows])


@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE])
def test_a_walk_needs_no_graph_and_keeps_the_type(dtype):
    flow = made().to(dtype)
    with torch.no_grad():
        path = flow.traverse(draw(B, DIM).to(dtype), 0)
    assert path.dtype == dtype
    assert not path.requires_grad
    again = made()
    again.load_state_dict(flow.state_dict())
    assert torch.equal(again.to(dtype).traverse(path[0], 0), path)


def test_a_saturated_potential_does_not_move_and_without_its_tanh_it_is_another():
    flow, z = made(), draw(B, DIM)
    potential = flow.potentials[0]
    u = flow.potential(0, z, 1.0)
    plain = formula(lambda y, t: torch.atanh(potential(y, t)))
    torch.testing.assert_close(plain.velocity(0, z, 1.0) * (1 - u**2)[:, None], flow.velocity(0, z, 1.0))
    potential.out.bias.data += 20.0
    assert flow.potential(0, z, 1.0).abs().max() <= 1
    assert flow.velocity(0, z, 1.0).abs().max() < 1e-12


def reference(flow: PotentialFlow, z: Tensor, k: int, s: int, direction: int) -> dict[str, Tensor]:
    """The algorithm by plain autograd, one time after another; images' change by central differences."""
    u, c, half = flow.potentials[k], flow.c[k], flow.steps // 2

    def slope(y: Tensor, t: int) -> Tensor:
        y = y.clone().requires_grad_()
        return torch.autograd.grad(u(y, torch.tensor(float(t), dtype=DOUBLE)).sum(), y, create_graph=True)[0]

    path, squares = [z], []
    for t in range(half):
        if flow.laplacian == "official":
            squares.append(by_autograd(u, path[-1], t, c).square().mean())
        else:
            y = path[-1].clone().requires_grad_()
            at = torch.full((len(z),), float(t), dtype=DOUBLE, requires_grad=True)
            g, u_t = torch.autograd.grad(u(y, at).sum(), (y, at), create_graph=True)
            u_tt = torch.autograd.grad(u_t.sum(), at, create_graph=True)[0]
            lap = sum(torch.autograd.grad(g[:, i].sum(), y, create_graph=True)[0][:, i] for i in range(z.shape[1]))
            squares.append((u_tt - c**2 * lap).square().mean())
        path.append(path[-1] + slope(path[-1], t))
    before, after, h = path[s + 1], path[s + 2], 1e-5
    v = slope(before, s + 1)
    change = (images(before + h * v) - images(before - h * v)) / (2 * h)
    ic, pde, jvp = slope(z, 0).square().mean(), torch.stack(squares).mean(), change.square().mean()
    pair = (before, after) if direction == 1 else (2 * z - after, 2 * z - before)
    cls = -torch.log_softmax(told(*map(images, pair)), 1)[:, k].mean()
    wave = ic + pde - jvp
    return dict(loss=0.5 * cls + 2.0 * wave, cls=cls, wave=wave, ic=ic, pde=pde, jvp=jvp, before=before, after=after)


@pytest.mark.parametrize(("laplacian", "s", "direction"), [("trace", 0, 1), ("trace", 2, -1), ("official", 1, 1)])
def test_the_loss_and_its_gradients_are_those_of_plain_autograd(laplacian, s, direction):
    flow, z = made(laplacian=laplacian), draw(B, DIM)
    found = potential_flow_loss(flow, images, z, 1, s, told, 0.5, 2.0, direction=direction)
    expected = reference(flow, z, 1, s, direction)
    assert found["logits"].shape == (B, K)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-8, atol=1e-9)
    assert min(found[name].item() for name in ("cls", "ic", "pde", "jvp")) > 1e-3
    weights = [*flow.potentials[1].parameters(), flow.c]
    ours, theirs = (torch.autograd.grad(d["loss"], weights) for d in (found, expected))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8)


def test_hutchinsons_loss_is_drawn_by_the_generator_and_near_the_trace():
    flow, z = made(laplacian="hutchinson"), draw(64, DIM)
    one, same, other = (potential_flow_loss(flow, images, z, 0, 0, generator=seeded(i))["pde"] for i in (0, 0, 1))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    many = potential_flow_loss(flow, images, z, 0, 0, generator=seeded(), probes=1000)["pde"]
    flow.laplacian = "trace"
    torch.testing.assert_close(many, potential_flow_loss(flow, images, z, 0, 0)["pde"], rtol=0.02, atol=0)


class Sine(torch.autograd.Function):
    """Without a derivative in forward mode."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    def backward(ctx, g):
        return g * ctx.saved_tensors[0].cos()


def test_a_generator_without_derivatives_in_forward_mode_is_differentiated_twice_backwards():
    flow, z, mix = made(), draw(B, DIM), draw(DIM, 4, seed=9)
    backwards = lambda y: Sine.apply(y @ mix).unflatten(1, (1, 2, 2))  # noqa: E731 - what images() says
    for how in ({}, {"reconstructor": told}):
        expected, found = (potential_flow_loss(flow, g, z, 1, 1, **how) for g in (images, backwards))
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=1e-12, atol=1e-13)
        weights = [*flow.potentials[1].parameters(), flow.c]
        for a, b in zip(*(torch.autograd.grad(d["loss"], weights) for d in (found, expected)), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
    with torch.no_grad():
        still = potential_flow_loss(flow, backwards, z, 1, 1, told)
    torch.testing.assert_close(still["loss"], found["loss"].detach())
    assert not still["loss"].requires_grad


@pytest.mark.parametrize(
    "layers",
    [
        lambda y: nn.functional.scaled_dot_product_attention(*[y.reshape(-1, 1, 2, DIM // 2)] * 3),
        lambda y: nn.functional.group_norm((y[:, None] * y.sin()[..., None]).mT.reshape(-1, DIM, 2, 2), 2),
    ],
    ids=["attention", "group norm"],
)
def test_operations_of_decoders_are_differentiated(layers):
    flow, z, h = made(), draw(B, DIM), 1e-5
    parts = potential_flow_loss(flow, layers, z, 0, 0)
    v = flow.velocity(0, parts["before"], 1.0)
    change = (layers(parts["before"] + h * v) - layers(parts["before"] - h * v)) / (2 * h)
    torch.testing.assert_close(parts["jvp"], change.square().mean(), rtol=1e-6, atol=0)
    parts["loss"].backward()


def test_gradients_reach_the_drawn_potential_alone():
    flow, z = made(), draw(B, DIM)
    judge = PairClassifier(K, 1, padding=2).double()
    potential_flow_loss(flow, lambda y: images(y).repeat(1, 1, 2, 2), z, 1, 0, judge)["loss"].backward()
    for k, potential in enumerate(flow.potentials):
        assert all((p.grad is not None and p.grad.abs().max() > 0) == (k == 1) for p in potential.parameters())
    assert (flow.c.grad != 0).tolist() == [False, True, False]
    assert all(p.grad is not None for p in judge.parameters())


def test_only_the_first_half_of_the_times_is_trained():
    flow, seen = formula(lambda y, t: seen.update(t.flatten().tolist()) or (t * y.sum(1)) / 9), set()
    for s in range(STEPS // 2 - 1):
        potential_flow_loss(flow, images, draw(B, DIM), 0, s)
    assert seen == set(range(STEPS // 2))
    flow.traverse(draw(B, DIM), 0, STEPS)
    assert seen == set(range(STEPS))


def test_a_loss_without_a_classifier_and_without_gradients():
    flow, z = made(), draw(B, DIM)
    with torch.no_grad():
        plain = potential_flow_loss(flow, images, z, 0, 1, lambda_pde=3.0)
    assert "cls" not in plain
    torch.testing.assert_close(plain["loss"], 3.0 * (plain["ic"] + plain["pde"] - plain["jvp"]))
    assert not plain["loss"].requires_grad


def test_derivatives_are_not_taken_in_half_precision():
    flow = made().float()
    net = nn.Sequential(nn.Linear(DIM, 4), nn.Tanh(), nn.Unflatten(1, (1, 2, 2)))
    z = draw(B, DIM).float()
    plain = potential_flow_loss(flow, net, z, 0, 0)
    with torch.autocast("cpu", torch.bfloat16):
        cast = potential_flow_loss(flow, net, z, 0, 0)
    assert all(torch.equal(cast[name], value) for name, value in plain.items())
    exact = potential_flow_loss(made(), copy.deepcopy(net).double(), draw(B, DIM), 0, 0)
    assert all(torch.allclose(value.double(), exact[name], rtol=1e-4, atol=1e-6) for name, value in plain.items())
    half = copy.deepcopy(net).half()
    low = potential_flow_loss(flow, lambda y: half(y.half()), z, 0, 0)
    assert low["jvp"].dtype == torch.float32  # 1e-3 of a change, squared, is nothing in half precision
    torch.testing.assert_close(low["jvp"], plain["jvp"], rtol=0.01, atol=0)


def test_training_that_is_saved_on_the_way_ends_alike():
    def trained(flow, optimizer, steps):
        for i in steps:
            optimizer.zero_grad()
            potential_flow_loss(flow, images, draw(B, DIM, seed=i), i % K, 0, told)["loss"].backward()
            optimizer.step()
        return flow.state_dict()

    def fresh():
        flow = made()
        return flow, torch.optim.Adam(flow.parameters(), 1e-2)

    whole = trained(*fresh(), range(4))
    flow, optimizer = fresh()
    kept = copy.deepcopy((trained(flow, optimizer, range(2)), optimizer.state_dict()))
    flow, optimizer = fresh()
    flow.load_state_dict(kept[0])
    optimizer.load_state_dict(kept[1])
    after = trained(flow, optimizer, range(2, 4))
    assert all(torch.equal(after[name], value) for name, value in whole.items())


@pytest.mark.parametrize(("size", "padding"), [(32, 0), (18, 1), (4, 2)])
def test_a_classifier_takes_images_from_its_least_size_on(size, padding):
    judge = PairClassifier(5, 2, padding=padding).eval()
    before, after = torch.rand(2, 3, 2, size, size, generator=seeded()).unbind()
    assert judge(before, after).shape == (3, 5)
    for pair in ((after, before), (before, before), (after, after)):
        assert not torch.equal(judge(before, after), judge(*pair))
    widths = [m.out_channels for m in judge.modules() if isinstance(m, nn.Conv2d)]
    assert widths == [6, 16, 120]
    with pytest.raises(ValueError, match=f"before must have at least {size} pixels"):
        judge(before[:, :, 1:], after[:, :, 1:])


def test_resnet_is_torchvisions_with_two_images_for_one(monkeypatch):
    class ResNet(nn.Module):
        def forward(self, x):
            return self.conv1(x).mean((2, 3))[:, :4]

    models = types.SimpleNamespace(resnet18=lambda weights, num_classes: ResNet())
    monkeypatch.setitem(sys.modules, "torchvision.models", models)
    judge = PairClassifier(4, 3, "resnet18")
    assert judge.features.conv1.weight.shape == (64, 6, 7, 7)
    assert judge(torch.zeros(2, 3, 9, 9), torch.zeros(2, 3, 9, 9)).shape == (2, 4)
    monkeypatch.setitem(sys.modules, "torchvision.models", None)
    with pytest.raises(ImportError, match="pip install torchvision"):
        PairClassifier(4, 3, "resnet18")


def pairs(count: int, told_apart: bool) -> tuple[Tensor, Tensor]:
    """Images that an edit brightens in one corner or another, or of which the label says nothing."""
    labels = torch.arange(count) % 3
    before = torch.rand(count, 1, 8, 8, generator=seeded())
    after = before.clone()
    spots = labels if told_apart else torch.randint(3, (count,), generator=seeded(1))
    after[torch.arange(count), 0, 2 * spots, 2 * spots] += 2.0
    return torch.stack([before, after], 1), labels


def test_predictability_is_high_for_edits_that_differ_and_chance_for_others():
    high = variation_predictability(*pairs(600, True), 0.1, steps=60, generator=seeded())
    low = variation_predictability(*pairs(600, False), 0.1, steps=60, generator=seeded())
    assert high > 0.95
    assert abs(low - 1 / 3) < 5 * math.sqrt(2 / 9 / 540)
    torch.manual_seed(5)
    state = torch.random.get_rng_state()
    images, labels = pairs(600, True)
    with torch.no_grad():  # it trains all the same
        assert variation_predictability(images, labels.int(), 0.1, steps=60, generator=seeded()) == high
    assert torch.equal(torch.random.get_rng_state(), state)


def test_predictability_is_judged_on_pairs_that_were_not_in_training():
    class Memory(nn.Module):
        """Knows what it was trained with, and nothing else."""

        def __init__(self):
            super().__init__()
            self.w, self.seen, self.asked = nn.Parameter(torch.zeros(())), {}, {}

        def forward(self, before, after):
            keys = [row.sum().item() for row in before]
            (self.seen if self.training else self.asked).update(dict.fromkeys(keys))
            known = torch.tensor([[1.0, float(key in self.seen)] for key in keys])
            return torch.nn.functional.pad(known, (0, 1)) + self.w

    memory = Memory().eval()
    share = variation_predictability(*pairs(90, True), 0.2, classifier=memory, steps=30, generator=seeded())
    assert (len(memory.seen), len(memory.asked)) == (18, 72)
    assert not memory.seen.keys() & memory.asked.keys()
    assert abs(share - 1 / 3) < 0.1  # all new ones are called 0
    assert share * 72 == pytest.approx(round(share * 72))


Z = draw(B, DIM)
BAD = {
    "t must be in": [
        lambda f: f.velocity(0, Z, STEPS), lambda f: f.potential(0, Z, -0.5), lambda f: f.velocity(0, Z, torch.full((B,), 8.0)),
    ],
    "steps must be at most 8": [lambda f: f.traverse(Z, 0, 9)],
    "k must be below 3": [lambda f: f.traverse(Z, 3), lambda f: potential_flow_loss(f, images, Z, 3, 0)],
    "s must be at most 2": [lambda f: potential_flow_loss(f, images, Z, 0, 3)],
    "z must have shape": [lambda f: f.velocity(0, Z[:, :3], 0), lambda f: potential_flow_loss(f, images, Z[:, :3], 0, 0)],
    "z must be finite": [
        lambda f: f.traverse(Z * math.nan, 0), lambda f: potential_flow_loss(f, images, Z * math.inf, 0, 0),
    ],
    "z must be torch.float64": [lambda f: f.traverse(Z.float(), 0)],
    "z must have at least one row": [lambda f: potential_flow_loss(f, images, Z[:0], 0, 0)],
    "z must be a floating-point tensor": [lambda f: f.traverse(Z.long(), 0)],
    "t must be a number or have shape": [
        lambda f: f.velocity(0, Z, torch.zeros(2)), lambda f: wave_residual(PLANE[0], Z, torch.zeros(2)),
    ],
    "t must be one time": [lambda f: wave_residual(PLANE[0], Z, torch.zeros(B), mode="official")],
    "c must be a number or have shape": [lambda f: wave_residual(PLANE[0], Z, 0.0, torch.ones(2))],
    "u_fn must return shape": [lambda f: wave_residual(lambda z, t: z, Z, 0.0)],
    "generator output does not depend on z": [
        lambda f: potential_flow_loss(f, lambda z: images(z.detach()), Z, 0, 0),
        lambda f: potential_flow_loss(f, lambda z: (255 * images(z)).long(), Z, 0, 0),
        lambda f: potential_flow_loss(f, lambda z: torch.ones(B, 1, 2, 2), Z, 0, 0),
        lambda f: potential_flow_loss(f, torch.no_grad()(images), Z, 0, 0),
    ],
    "generator_fn must return 5 images": [lambda f: potential_flow_loss(f, lambda z: images(z)[:2], Z, 0, 0)],
    "reconstructor must return shape": [lambda f: potential_flow_loss(f, images, Z, 0, 0, lambda a, b: a)],
    "k must be at least 2": [lambda f: PotentialFlow(4, 1), lambda f: PairClassifier(1)],
    "steps must be at least 4": [lambda f: PotentialFlow(4, 2, 3)],
    "dim must be at least 2": [lambda f: PotentialFlow(1)],
    "laplacian must be one of": [lambda f: PotentialFlow(4, laplacian="Trace")],
    "direction must be one of": [lambda f: f.traverse(Z, 0, direction=0)],
    "before and after must have shape": [lambda f: PairClassifier(2)(torch.zeros(2, 1, 32, 32), torch.zeros(2, 1, 32, 32))],
    "labels must be 6 whole numbers": [
        lambda f: variation_predictability(torch.rand(6, 2, 1, 8, 8), torch.zeros(6)),
        lambda f: variation_predictability(torch.rand(6, 2, 1, 8, 8), torch.zeros(5).long()),
    ],
    "labels must be 0 or more": [lambda f: variation_predictability(torch.rand(6, 2, 1, 8, 8), -torch.ones(6).long(), 0.5)],
    "pairs must be finite": [
        lambda f: variation_predictability(torch.rand(6, 2, 1, 8, 8) / 0, torch.zeros(6).long(), 0.5),
    ],
    "pairs must have shape": [lambda f: variation_predictability(torch.rand(6, 3, 1, 8, 8), torch.zeros(6).long())],
    "train_fraction must leave pairs": [lambda f: variation_predictability(torch.rand(6, 2, 1, 8, 8), torch.zeros(6).long())],
}  # fmt: skip


@pytest.mark.parametrize("message", BAD)
def test_what_cannot_be_is_refused_by_name(message):
    for call in BAD[message]:
        with pytest.raises(ValueError, match=message):
            call(made())


def test_a_generator_whose_batch_norm_mixes_samples_is_warned_of():
    net = nn.Sequential(nn.Linear(DIM, 4), nn.BatchNorm1d(4), nn.Unflatten(1, (1, 2, 2))).double()
    for generator_fn in (net, net.forward):
        with pytest.warns(UserWarning, match="mixes samples"):
            potential_flow_loss(made(), generator_fn, Z, 0, 0)
    net.eval()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        potential_flow_loss(made(), net, Z, 0, 0)
