"""Residuals of the Fokker-Planck equation, the gap of ODE and SDE, its bound and its loss, against closed forms and other code."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from polyak.core.distances import wasserstein_1d
from polyak.generate import (
    DDIM,
    EDM,
    OU,
    PFGMPP,
    VP,
    Denoiser,
    EnergyScore,
    Euler,
    Flow,
    Heun,
    PotentialNet,
    antisymmetric_gauge,
    denoising_loss,
    divergence,
    exact_ode_logdensity,
    fp_regularized_loss,
    histogram_w2,
    jacobian_asymmetry,
    log_fp_residual,
    log_likelihood,
    ode_sde_gap,
    sample,
    score_fp_residual,
    wasserstein_bound,
)
from polyak.generate.fokker_planck_gap.training import _score
from polyak.generate.problems import ExactDenoiser, Gaussian, Mixture

DOUBLE = torch.float64
LAW = Mixture([[-1.0, 0.3], [0.6, -0.5]], [[0.25, 0.5], [0.09, 0.3]], [0.4, 0.6])
PROCESSES = {"OU": OU(), "VP": VP(), "EDM": EDM(0.1, 10.0), "Flow": Flow(t_min=0.05, t_max=0.95)}
WRONG = Flow(t_min=0.0, t_max=0.9)  # no noise at t_min


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=DOUBLE, generator=seeded(seed))


def net(dim: int = 2, width: int = 8, depth: int = 2, beta: float = 5.0) -> PotentialNet:
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        return PotentialNet(dim, width, depth, beta).double()


def told(score, process) -> Denoiser:
    return Denoiser(score, process, "score", label=lambda t: t)


def bent(x: Tensor, t: Tensor) -> Tensor:
    """A potential that solves nothing."""
    return torch.sin(x).prod(1) * torch.exp(-t) - (1 + t) * x.square().sum(1) / 2 + (x[:, 0] * t).cos()


def by_hand(u, process, x: Tensor, t: Tensor) -> Tensor:
    """R by central differences of u, and the process's schedules in closed form: f and g^2 of OU and EDM."""
    f, g2 = {OU: (-1.0, torch.ones_like(t)), EDM: (0.0, 2 * t)}[type(process)]
    h, e, slope, lap = 1e-4, torch.eye(2, dtype=DOUBLE) * 1e-4, 0.0, 0.0
    grads = torch.stack([(u(x + e[i], t) - u(x - e[i], t)) / (2 * h) for i in range(2)], 1)
    for i in range(2):
        lap = lap + (u(x + e[i], t) - 2 * u(x, t) + u(x - e[i], t)) / h**2
    slope = (u(x, t + h) - u(x, t - h)) / (2 * h)
    return slope + f * 2 + f * (x * grads).sum(1) - g2 / 2 * (lap + grads.square().sum(1))


# --- residuals


@pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES)
@pytest.mark.parametrize("law", [Gaussian([0.3, -0.2], [[0.5, 0.2], [0.2, 0.4]]), LAW], ids=["normal", "mixture"])
def test_true_densities_have_no_residual(law, process):
    exact, x = ExactDenoiser(law, process), draw(6, 2)
    t = process.t_min + (process.t_max - process.t_min) * torch.linspace(0.05, 0.9, 6, dtype=DOUBLE)
    scale = exact.score(x, t).square().sum(1).max() * process.diffusion2(t).max()
    assert log_fp_residual(exact.log_prob, process, x, t).abs().max() < 1e-8
    assert score_fp_residual(exact, process, x, t).abs().max() < 1e-11 * scale
    # the normalization is part of the equation: c(t) adds c'(t)
    shifted = log_fp_residual(lambda x, t: exact.log_prob(x, t) + t.square(), process, x, t)
    assert torch.allclose(shifted, 2 * t, atol=1e-8)
    # and a score does not see it
    assert log_fp_residual(exact.log_prob, process, x, t[2].item()).shape == (6,)


@pytest.mark.parametrize("process", [OU(), EDM(0.1, 10.0)], ids=["OU", "EDM"])
def test_of_any_potential_it_is_what_differences_say(process):
    x, t = draw(5, 2), torch.linspace(0.3, 2.0, 5, dtype=DOUBLE)
    got = log_fp_residual(bent, process, x, t)
    assert torch.allclose(got, by_hand(bent, process, x, t), atol=3e-6)
    assert got.abs().min() > 0.1
    assert torch.equal(got, log_fp_residual(lambda x, t: bent(x, t)[:, None], process, x, t))
    # rows are on their own, of whatever shape, and may be none
    assert torch.allclose(log_fp_residual(bent, process, x[2:3], t[2].item()), got[2:3])
    folded = log_fp_residual(lambda x, t: bent(x[:, 0], t), process, x[:, None], t)
    assert torch.allclose(folded, got)
    assert log_fp_residual(bent, process, x[:0], t[:0]).shape == (0,)


def test_a_wrong_diffusion_is_seen():
    class Doubled(OU):
        def diffusion2(self, t):
            return 2 * super().diffusion2(t)

    exact, x = ExactDenoiser(LAW, OU()), draw(6, 2)
    assert log_fp_residual(exact.log_prob, Doubled(), x, 0.5).abs().min() > 0.1


def test_the_residual_of_a_score_is_the_gradient_of_that_of_its_potential():
    model, process, x, t = net(), VP(), draw(5, 2), torch.linspace(0.1, 0.9, 5, dtype=DOUBLE)
    y = x.clone().requires_grad_()
    (want,) = torch.autograd.grad(log_fp_residual(bent, process, y, t).sum(), y)
    for score in (EnergyScore(bent_module()), told(EnergyScore(bent_module()), process)):
        assert torch.allclose(score_fp_residual(score, process, x, t), want, rtol=1e-9, atol=1e-9)
    # what turns has no potential, and says so
    turned = antisymmetric_gauge(model.score, [[0.0, 1.0], [-1.0, 0.0]])
    assert jacobian_asymmetry(turned, x, 0.5, generator=seeded()).min() > 0.05
    assert score_fp_residual(turned, process, x, 0.5).abs().max() > 1e-3


def bent_module() -> nn.Module:
    module = nn.Module()
    module.forward = bent
    return module


def test_estimates_are_unbiased():
    x, t = draw(1, 2).expand(4000, 2), torch.full((4000,), 0.4, dtype=DOUBLE)
    for f in (log_fp_residual, score_fp_residual):
        model = bent if f is log_fp_residual else EnergyScore(bent_module())
        exact, some = f(model, OU(), x[:1], t[:1]), f(model, OU(), x, t, "hutchinson", generator=seeded())
        assert ((some.mean(0) - exact[0]).abs() < 5 * some.std(0) / math.sqrt(4000)).all()
        assert some.std(0).max() > 1e-3
        more = f(model, OU(), x, t, "hutchinson", 16, seeded())
        assert (more.std(0) < 0.3 * some.std(0)).all()


def test_it_is_differentiated_in_x_and_in_parameters_and_where_gradients_are_off():
    model, x = net(width=4), draw(3, 2).requires_grad_()
    weights = list(model.parameters())
    torch.autograd.gradcheck(lambda x, *_: log_fp_residual(model, OU(), x, 0.4), (x, *weights), atol=1e-6)
    torch.autograd.gradcheck(lambda x: score_fp_residual(model.score, OU(), x, 0.4), (x,), atol=1e-6)
    want = log_fp_residual(model, OU(), x, 0.4).detach()
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            assert torch.allclose(log_fp_residual(model, OU(), x.detach(), 0.4), want)


def test_single_precision_stays():
    model, x = net().float(), draw(3, 2).float()
    for made in (log_fp_residual(model, VP(), x, 0.3), score_fp_residual(model.score, VP(), x, 0.3)):
        assert made.dtype == torch.float32
    double = log_fp_residual(net(), VP(), x.double(), 0.3)
    assert torch.allclose(log_fp_residual(model, VP(), x, 0.3).double(), double, rtol=1e-3, atol=1e-4)


def test_a_network_of_edm_is_diagnosed():
    exact = ExactDenoiser(LAW, EDM(0.1, 10.0))

    def F(y: Tensor, label: Tensor) -> Tensor:
        sigma = torch.exp(4 * label)[:, None]
        total = sigma**2 + 0.25
        x = y * total.sqrt()
        x0 = x + sigma**2 * exact.score(x, sigma[:, 0])
        return (x0 - 0.25 / total * x) / (0.5 * sigma / total.sqrt())

    t = torch.linspace(0.2, 5.0, 6, dtype=DOUBLE)
    assert score_fp_residual(Denoiser(F, exact.process, "edm"), exact.process, draw(6, 2), t).abs().max() < 1e-8


class Images(nn.Module):
    """Of what image networks are made: convolutions, group norms and attention."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last, self.norm = (
            nn.Conv2d(1, 4, 3, padding=1),
            nn.Conv2d(4, 1, 3, padding=1),
            nn.GroupNorm(2, 4),
        )

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        h = self.norm(self.first(x)) + torch.sin(4 * t)[:, None, None, None]
        places = h.flatten(2).mT
        h = h + nn.functional.scaled_dot_product_attention(places, places, places).mT.unflatten(2, h.shape[2:])
        return self.last(nn.functional.silu(h).transpose(2, 3))


def test_a_network_of_images_is_diagnosed():
    from torch.nn.attention import SDPBackend, sdpa_kernel

    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        denoiser = Denoiser(Images(), VP(), "epsilon")
    x, process, h = draw(2, 1, 4, 4).float(), VP(), 1e-2
    y = x.clone().requires_grad_()
    got = score_fp_residual(denoiser, process, x, 0.5, "hutchinson", generator=seeded())
    with torch.no_grad():
        again = score_fp_residual(denoiser, process, x, 0.5, "hutchinson", generator=seeded())
    assert not again.requires_grad
    assert torch.allclose(again, got, rtol=1e-4, atol=1e-4 * got.abs().max().item())
    with sdpa_kernel(SDPBackend.MATH):  # fused attention has no second derivatives
        s = denoiser(y, 0.5).score
        inner = process.drift(0.5) * (y * s).sum() - process.diffusion2(0.5) / 2 * (
            s.square().sum() + divergence(denoiser, y, 0.5, method="hutchinson", generator=seeded()).sum()
        )
        (gradient,) = torch.autograd.grad(inner, y)
        with torch.no_grad():
            moved = (denoiser(x, 0.5 + h).score - denoiser(x, 0.5 - h).score) / (2 * h)
    assert torch.allclose(got, gradient + moved, atol=2e-2 * moved.abs().max().item())


def test_potentials_with_attention_are_diagnosed_and_trained():
    class Attentive(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.tensor(0.7))

        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            tokens = (self.weight * (x + t[:, None]))[:, None, :, None].repeat(1, 1, 1, 4)
            return torch.nn.functional.scaled_dot_product_attention(tokens, tokens, tokens).square().sum((1, 2, 3))

    model, x = Attentive(), draw(4, 3).float()
    with torch.no_grad():
        there = log_fp_residual(model, OU(), x, 0.5)
    assert torch.allclose(there, log_fp_residual(model.double(), OU(), x.double(), 0.5).float(), rtol=1e-3)
    for weight in (0.0, 0.1):
        fp_regularized_loss(model.float(), OU(), x, weight, generator=seeded())["loss"].backward()
        assert model.weight.grad.isfinite()


# --- densities, and the bound


def test_densities_by_the_residual_are_those_by_the_divergence():
    process, x = OU(t_min=0.01, t_max=2.0), draw(6, 2)
    by_divergence = log_likelihood(told(EnergyScore(bent_module()), process), process, x, steps=60, grid="quadratic")
    errors = [
        (exact_ode_logdensity(bent, process, x, n, grid="quadratic") - by_divergence).abs().max() for n in (15, 30)
    ]
    assert errors[1] < 1e-4
    assert errors[0] > 5 * errors[1]
    # without R, or without the end, it is another number
    assert (bent(x, torch.full((6,), process.t_min)) - by_divergence).abs().min() > 0.1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_half_precision_paths_are_followed_in_float32(dtype):
    process, x = OU(t_min=0.01, t_max=2.0), draw(4, 2).to(dtype)
    u = lambda x, t: -x.square().sum(1) / (1 + t)  # noqa: E731
    made = exact_ode_logdensity(u, process, x, 12, grid="quadratic")
    want = exact_ode_logdensity(u, process, x.double(), 12, grid="quadratic")
    assert made.dtype == dtype
    assert torch.allclose(made.double(), want, rtol=0, atol=6 * torch.finfo(dtype).eps)
    denoiser = told(lambda x, t: -x, process)
    found = wasserstein_bound(denoiser, process, (2,), 20, 2, seeded(), dtype=dtype)
    assert torch.allclose(
        found.lipschitz, torch.full_like(found.lipschitz, 0.5), atol=0.01
    )  # of dx/dt = x - x/2, run back


def test_a_true_density_is_that_of_its_ode():
    exact, process = ExactDenoiser(LAW, VP()), VP()
    x = LAW.sample(6, alpha=process.alpha(1e-3), sigma=process.sigma(1e-3), generator=seeded())
    got = exact_ode_logdensity(exact.log_prob, process, x, 25, prior=lambda end: exact.log_prob(end, 1.0))
    assert torch.allclose(got, exact.log_prob(x, 1e-3), atol=1e-4)
    plain = exact_ode_logdensity(exact.log_prob, process, x, 25)
    assert 1e-6 < (plain - got).abs().max() < 0.1  # the normal prior is not quite the law at t_max


@pytest.mark.parametrize("stretch", [0.8, 1.2])
def test_the_bound_holds_and_is_near_where_all_is_normal(stretch):
    # s = -k x / v under OU: both laws are normal, and so is what the bound is made of
    process, c = OU(t_min=0.1, t_max=3.0), 0.3
    v = lambda t: c * np.exp(-2 * t) + (1 - np.exp(-2 * t)) / 2  # noqa: E731
    t = np.linspace(3.0, 0.1, 20_001)
    h = t[0] - t[1]
    q = np.empty_like(t)  # the variance of the SDE's law, by Euler's rule
    q[0] = 0.5
    for i in range(len(t) - 1):
        q[i + 1] = q[i] + h * (2 * (1 - stretch / v(t[i])) * q[i] + 1)
    # r = s_t + (f x s - g^2/2 |s|^2)' is linear in x, too
    slope = -(2 * c - 1) * np.exp(-2 * t)
    r = stretch * (slope / v(t) ** 2 + 2 / v(t)) - stretch**2 / v(t) ** 2
    size = lambda values: np.concatenate([[0.0], np.cumsum((values[1:] + values[:-1]) / 2) * h])  # noqa: E731
    error = (np.exp(-3) * abs(2 - stretch / v(3.0)) * math.sqrt(0.5) + size(np.exp(-t) * abs(r) * np.sqrt(q))) / np.exp(
        -t
    )
    true_error = abs(stretch / v(t) - 1 / q) * np.sqrt(q)
    L = 1 - stretch / (2 * v(t))
    want = size(np.exp(size(L)[-1] - size(L)) / 2 * error)[-1]
    gap = abs(math.sqrt(0.5) * math.exp(size(L)[-1]) - math.sqrt(q[-1]))

    def score(x, t):
        decay = torch.exp(-2 * torch.as_tensor(t, dtype=DOUBLE).reshape(-1, 1))
        return -stretch * x / (c * decay + (1 - decay) / 2)

    field = told(score, process)
    found = wasserstein_bound(field, process, (1,), 4000, 60, seeded(), dtype=DOUBLE)
    assert found.w2.item() == pytest.approx(want, rel=0.05)
    assert gap <= want <= 4 * gap
    assert (true_error <= error * (1 + 1e-6)).all()
    assert found.times[[0, -1]].tolist() == [3.0, 0.1]
    assert found.lipschitz[-1].item() == pytest.approx(L[-1], rel=1e-6)
    given = wasserstein_bound(field, process, (1,), 4000, 60, seeded(), dtype=DOUBLE, lipschitz=lambda t: 1.0)
    assert given.w2 > 2 * found.w2
    assert torch.equal(given.residual, found.residual)


def test_of_the_true_score_the_bound_is_only_what_the_prior_misses():
    process = OU(t_max=5.0)
    exact = ExactDenoiser(Gaussian([0.0, 0.0], [0.3, 0.6]), process)
    found = wasserstein_bound(exact, process, (2,), 50, 20, seeded(), dtype=DOUBLE)
    assert found.residual.max() < 1e-8
    assert found.w2 < 1e-3


# --- the gap


def test_with_the_true_score_a_gauge_and_a_wrong_one():
    process, law = OU(t_max=5.0), Gaussian([0.0, 0.0], [0.4, 0.2])
    exact = ExactDenoiser(law, process)
    data = law.sample(4000, alpha=process.alpha(1e-3), sigma=process.sigma(1e-3), generator=seeded(5))
    turned = antisymmetric_gauge(exact, [[0.0, 1.0], [-1.0, 0.0]])
    fields = {
        "true": exact,
        "gauge": told(turned, process),
        "wrong": told(lambda x, t: 1.2 * exact.score(x, t), process),
    }
    gaps = {
        name: ode_sde_gap(field, process, 4000, 60, seeded(), "sliced", data=data, grid="quadratic")
        for name, field in fields.items()
    }
    # two samples of 4000 are 0.01 to 0.03 apart
    assert max(gaps["true"]) < 0.04
    assert max(gaps["gauge"]) < 0.04
    assert gaps["wrong"].ode_sde > 0.08
    assert gaps["wrong"].sde_data > 0.04


def test_the_gap_in_one_dimension_is_the_sorted_distance_of_its_samples():
    process = OU()
    exact = ExactDenoiser(Gaussian([0.0], 0.3), process)
    field = told(lambda x, t: 1.3 * exact.score(x, t), process)
    got = ode_sde_gap(field, process, 50, 10, seeded(), shape=(1,), ode=Euler(), grid="quadratic", dtype=DOUBLE)
    assert got.ode_data is None
    assert got.sde_data is None
    times, generator = process.grid(10, "quadratic").tolist(), seeded()
    start = torch.randn(50, 1, dtype=DOUBLE, generator=generator) * math.sqrt(0.5)
    x, y = start.clone(), start.clone()
    # by hand: half of the score for the ODE, dt < 0; for the SDE the exponential rule of DDIM with eta = 1
    for s, t in pairwise(times):
        x = x + (t - s) * (-x - field(x, s).score / 2)
    for s, t in pairwise(times):
        (a, sa), (b, sb) = ((process.alpha(u), process.sigma(u)) for u in (s, t))
        std = sb * math.sqrt(1 - (sb * a / (sa * b)) ** 2)
        eps = -sa * field(y, s).score
        y = b * (y - sa * eps) / a + math.sqrt(sb**2 - std**2) * eps
        y = y + std * torch.randn(50, 1, dtype=DOUBLE, generator=generator)
    assert got.ode_sde == pytest.approx(wasserstein_1d(x, y).item(), rel=1e-8)


def test_in_the_plane_it_is_the_root_of_the_histograms_distance():
    process = OU()
    exact = ExactDenoiser(Gaussian([0.0, 0.0], 0.3), process)
    data = draw(200, 2, seed=3) * 0.5
    got = ode_sde_gap(exact, process, 200, 8, seeded(), data=data, bins=8, box=2.5, sde=DDIM(eta=1.0))
    generator = seeded()
    start = process.prior((200, 2), generator=generator, dtype=DOUBLE)
    ode, sde = (
        sample(exact, start, process=process, solver=solver, steps=8, generator=generator)
        for solver in (Heun(), DDIM(eta=1.0))
    )
    pairs = (ode, sde), (ode, data), (sde, data)
    assert got == pytest.approx([histogram_w2(x, y, 8, 2.5) ** 0.5 for x, y in pairs], rel=1e-8)


# --- histograms


def test_two_masses_a_cell_apart_and_the_square_is_squared():
    cell = 8 / 63
    x, y = torch.zeros(3, 2), torch.zeros(3, 2)
    x[:], y[:] = torch.tensor([cell / 2, cell / 2]), torch.tensor([cell / 2, 1.5 * cell])
    assert histogram_w2(x, y) == pytest.approx(cell**2, rel=1e-9)
    assert histogram_w2(x, x) == 0.0
    y[:] = torch.tensor([2.5 * cell, 1.5 * cell])
    assert histogram_w2(x, y) == pytest.approx(5 * cell**2, rel=1e-9)


def test_the_transport_is_that_of_the_full_program():
    from scipy.optimize import linear_sum_assignment

    x, y = draw(40, 2).clamp(-2.9, 2.9), draw(40, 2, seed=1) * 0.7 + 0.4
    h = 6 / 11
    nodes = [torch.round((p + 3) / h) for p in (x, y)]
    inside = [n[(p.abs() < 3).all(1)] for n, p in zip(nodes, (x, y), strict=True)]
    assert len(inside[0]) == len(inside[1]) == 40
    cost = torch.cdist(*inside).square().numpy() * h**2
    rows, columns = linear_sum_assignment(cost)
    assert histogram_w2(x, y, 12, 3.0) == pytest.approx(cost[rows, columns].mean(), rel=1e-8)
    # what is outside is dropped, and sizes may differ
    far = torch.cat([x, torch.full((5, 2), 3.0, dtype=DOUBLE)])
    assert histogram_w2(far, y, 12, 3.0) == pytest.approx(histogram_w2(x, y, 12, 3.0), rel=1e-8)
    assert histogram_w2(torch.cat([x, x]), y, 12, 3.0) == pytest.approx(histogram_w2(x, y, 12, 3.0), rel=1e-8)


def test_histograms_of_one_box_judged_in_another_are_too_far_apart():
    # What official code does with its stored histograms: made in [-3.5, 3.5]^2, judged in [-4, 4]^2.
    x, y = draw(60, 2), draw(60, 2, seed=1) * 0.8
    made = histogram_w2(x, y, 16, 3.5)
    nodes = [torch.round((p[(p.abs() < 3.5).all(1)] + 3.5) * 15 / 7) * 8 / 15 - 4 for p in (x, y)]
    judged = histogram_w2(*(n * (1 - 1e-12) for n in nodes), 16, 4.0)
    assert judged == pytest.approx((8 / 7) ** 2 * made, rel=1e-6)


# --- the loss


def test_without_a_weight_it_is_denoising_score_matching():
    model, process, x0 = net(), OU(), draw(16, 2)
    t = torch.linspace(0.01, 4.0, 16, dtype=DOUBLE)
    got = fp_regularized_loss(model, process, x0, 0.0, t=t, generator=seeded())
    want = denoising_loss(told(model.score, process), x0, t=t, generator=seeded()).mean()
    assert got.keys() == {"loss", "dsm"}
    assert got["loss"] is got["dsm"]
    assert torch.allclose(got["loss"], want, rtol=1e-14)
    # the paper's is not weighted
    plain = fp_regularized_loss(model, process, x0, 0.0, "paper", t=t, generator=seeded())["dsm"]
    x, _ = process.perturb(x0, t, generator=seeded())
    kernel = -(x - torch.exp(-t)[:, None] * x0) / ((1 - torch.exp(-2 * t)) / 2)[:, None]
    assert torch.allclose(plain, (model.score(x, t) - kernel).square().mean(), rtol=1e-10)


def test_its_parts_are_what_they_say():
    model, process, x0 = net(), OU(t_max=3.0), draw(16, 2)
    t = torch.linspace(0.01, 2.5, 16, dtype=DOUBLE)
    got = fp_regularized_loss(model, process, x0, 0.3, t=t, generator=seeded())
    generator = seeded()
    x, noise = process.perturb(x0, t, generator=generator)
    sigma = process.sigma(t)
    end = process.prior(x0.shape, generator=generator, dtype=DOUBLE)
    want = {
        "dsm": (sigma[:, None] * model.score(x, t) + noise).square().mean(),
        "residual": (sigma**2 * log_fp_residual(model, process, x, t)).square().mean(),
        "terminal": (model.score(end, 3.0) + 2 * end).square().mean(),
    }
    want["loss"] = want["dsm"] + 0.3 * (want["residual"] + want["terminal"])
    assert got.keys() == want.keys()
    assert all(torch.allclose(got[name], want[name], rtol=1e-10) for name in want)
    less = fp_regularized_loss(model, process, x0, 0.3, terminal=False, t=t, generator=seeded())
    assert less.keys() == {"loss", "dsm", "residual"}
    assert torch.allclose(less["loss"], want["dsm"] + 0.3 * want["residual"])


def test_the_papers_points_are_uniform_in_the_box_and_in_time():
    seen: list[tuple[Tensor, Tensor]] = []
    process = OU(t_max=10.0)

    def spy(x: Tensor, t: Tensor) -> Tensor:
        seen.append((x.detach(), t.detach()))
        return -x.square().sum(1)

    got = fp_regularized_loss(spy, process, draw(4000, 2), 1.0, "paper", generator=seeded())
    assert got.keys() == {"loss", "dsm", "residual"}
    (_, drawn), (points, when) = seen[0], seen[-1]
    # Beta(1, 2) has the mean 1/3 and the variance 1/18
    assert drawn.mean() / 10 == pytest.approx(1 / 3, abs=5 * math.sqrt(1 / 18 / 4000))
    for values, low, high in ((points, -3.5, 3.5), (when, 0.0, 10.0)):
        assert values.min() >= low
        assert values.max() <= high
        assert values.mean() == pytest.approx((low + high) / 2, abs=5 * (high - low) / math.sqrt(12 * 4000))
        assert values.std() == pytest.approx((high - low) / math.sqrt(12), rel=0.05)
    assert got["residual"] < 1e-20  # the stationary law solves the equation everywhere
    fp_regularized_loss(spy, process, draw(50, 2), 1.0, "paper", 0.5, generator=seeded())
    assert seen[-1][0].abs().max() <= 0.5


@pytest.mark.parametrize("preset", ["data", "paper"])
def test_its_gradient_is_right(preset):
    model, x0 = net(width=3, depth=1), draw(4, 2)
    weights = list(model.parameters())

    def loss(*_):
        return fp_regularized_loss(model, OU(), x0, 0.5, preset, generator=seeded())["loss"]

    torch.autograd.gradcheck(loss, weights, atol=1e-5)


def test_a_small_residual_alone_proves_nothing():
    # u = d t under OU has no residual, no score, and is no density
    process, x = OU(), draw(5, 2)
    spurious = lambda x, t: 2 * t + 0 * x.square().sum(1)  # noqa: E731
    assert log_fp_residual(spurious, process, x, 0.7).abs().max() < 1e-12
    field = told(EnergyScore(nn.Identity()), process)
    field.model = lambda x, t: 0 * x
    gap = ode_sde_gap(field, process, 500, 20, seeded(), "sliced", shape=(2,), dtype=DOUBLE, grid="quadratic")
    assert gap.ode_sde > 10
    # the terminal term is what sees it
    assert fp_regularized_loss(spurious, process, x, 1.0, generator=seeded())["terminal"] > 0.5


def test_the_network():
    model, x, t = net(dim=4, width=6, depth=3), draw(3, 2, 2), torch.tensor([0.1, 0.2, 0.3], dtype=DOUBLE)
    z = torch.cat([t[:, None], x.flatten(1)], 1)
    linear = [m for m in model.modules() if isinstance(m, nn.Linear)]
    assert [(m.in_features, m.out_features) for m in linear] == [(5, 6), (6, 6), (6, 6), (6, 1)]
    for m in linear[:-1]:
        z = torch.log1p(torch.exp(5 * (z @ m.weight.T + m.bias))) / 5
    want = (z @ linear[-1].weight.T + linear[-1].bias)[:, 0]
    assert torch.allclose(model(x, t), want, rtol=1e-9)
    y = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(model(y, t).sum(), y)
    assert torch.allclose(model.score(x, t), gradient)
    assert torch.allclose(_score(model, x, t), gradient)
    assert sum(p.numel() for p in PotentialNet(2).parameters()) == 3 * 80 + 80 + 2 * (80 * 80 + 80) + 81


def test_a_golden_descent():
    # Three steps of plain gradient descent on the regularized loss of u = -a x^2 / 2 + b t, by formulas:
    # score -a x, R = b - 1 + a x^2 + (a - a^2 x^2) / 2 under OU in one dimension
    a, b, process = 1.5, 0.2, OU(t_max=2.0)
    pa, pb = (torch.tensor(v, dtype=DOUBLE, requires_grad=True) for v in (a, b))
    x0, t = draw(6, 1), torch.linspace(0.1, 1.9, 6, dtype=DOUBLE)
    u = lambda x, t: -pa * x.square().sum(1) / 2 + pb * t  # noqa: E731
    for step in range(3):
        loss = fp_regularized_loss(u, process, x0, 0.5, t=t, generator=seeded(step))["loss"]
        ga, gb = torch.autograd.grad(loss, (pa, pb))
        with torch.no_grad():
            pa -= 0.1 * ga
            pb -= 0.1 * gb
        g = seeded(step)
        eps = torch.randn(6, 1, dtype=DOUBLE, generator=g).numpy()[:, 0]
        v = (1 - np.exp(-2 * t.numpy())) / 2
        x = np.exp(-t.numpy()) * x0.numpy()[:, 0] + np.sqrt(v) * eps
        e = torch.randn(6, 1, dtype=DOUBLE, generator=g).numpy()[:, 0] * math.sqrt(0.5)
        R = b - 1 + a * x**2 + (a - a**2 * x**2) / 2
        da = np.mean(2 * (eps - np.sqrt(v) * a * x) * -np.sqrt(v) * x)
        da += 0.5 * np.mean(2 * v**2 * R * (x**2 + 0.5 - a * x**2)) + 0.5 * np.mean(2 * (2 - a) * -(e**2))
        db = 0.5 * np.mean(2 * v**2 * R)
        a, b = a - 0.1 * da, b - 0.1 * db
    assert (pa.item(), pb.item()) == pytest.approx((a, b), rel=1e-12)


# --- what is refused


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda x: log_fp_residual(lambda x, t: -x, OU(), x, 0.5), r"potential must return shape \(3,\) or \(3, 1\), got"),
        (lambda x: log_fp_residual(nn.Sequential(nn.ReLU()), OU(), x, 0.5), "ReLU potentials have no Laplacian; use a smooth"),
        (lambda x: score_fp_residual(potential_of_relu().score, OU(), x, 0.5), "score_fn must be smooth, got one with ReLU"),
        (lambda x: score_fp_residual(relu(), OU(), x, 0.5), "score_fn must be smooth, got one with LeakyReLU"),
        (lambda x: fp_regularized_loss(nn.Sequential(nn.ReLU()), OU(), x), "potential must be smooth"),
        (lambda x: log_fp_residual(bent, WRONG, x, 0.0), "t must be where noise is positive and the drift finite, not 0.0"),
        (lambda x: log_fp_residual(bent, WRONG, x, torch.zeros(3)), "t must be where noise is positive"),
        (lambda x: log_fp_residual(bent, Flow(), x, 1.0), "t must be where noise is positive and the drift finite, not 1.0"),
        (lambda x: log_fp_residual(bent, OU(), x, 9.0), "t must be in .*got 9.0"),
        (lambda x: log_fp_residual(bent, OU(), x, torch.ones(2)), "t must be a number or have shape"),
        (lambda x: fp_regularized_loss(bent, WRONG, x), "process must have positive noise at t_min and a finite drift"),
        (lambda x: fp_regularized_loss(bent, OU(), x, -0.1), "weight must be >= 0, got -0.1"),
        (lambda x: fp_regularized_loss(bent, OU(), x, box=2.0), "box is of preset='paper'"),
        (lambda x: fp_regularized_loss(bent, OU(), x[:0]), "x0 must not be empty"),
        (lambda x: fp_regularized_loss(bent, OU(), x, t=torch.ones(2)), r"t must have shape \(3,\)"),
        (lambda x: log_fp_residual(bent, PFGMPP(), x, 0.5), "process must have Gaussian noise"),
        (lambda x: score_fp_residual(bent, PFGMPP(), x, 0.5), "process must have Gaussian noise"),
        (lambda x: fp_regularized_loss(bent, PFGMPP(), x), "process must have Gaussian noise"),
        (lambda x: ode_sde_gap(told(bent, OU()), PFGMPP(), shape=(2,)), "process must have Gaussian noise"),
        (lambda x: ode_sde_gap(told(bent, OU()), VP(), shape=(2,)), "process must be the denoiser's own"),
        (lambda x: wasserstein_bound(told(bent, OU()), PFGMPP(), (2,)), "process must have Gaussian noise"),
        (lambda x: exact_ode_logdensity(bent, PFGMPP(), x), "process must have Gaussian noise"),
        (lambda x: exact_ode_logdensity(bent, OU(), x, 1, prior=lambda x: x), r"prior must return a tensor of shape \(3,\)"),
        (lambda x: log_fp_residual(bent, OU(), torch.ones(1, 5000), 0.5), "at most 4096 elements in a row"),
        (lambda x: ode_sde_gap(told(bent, OU()), OU()), "data or shape is needed"),
        (lambda x: ode_sde_gap(told(bent, OU()), OU(), data=x, shape=(3,)), r"shape must be that of the data, \(2,\)"),
        (lambda x: ode_sde_gap(told(bent, OU()), OU(), shape=(3,)), "metric must be 'sliced' in more than two dimensions"),
        (lambda x: ode_sde_gap(told(bent, OU()), OU(), data=x, sde=Euler()), "sde must be a stochastic solver"),
        (lambda x: ode_sde_gap(told(bent, OU()), OU(), data=x, ode=DDIM(eta=1.0)), "ode must be a deterministic solver"),
        (lambda x: ode_sde_gap(told(lambda x, t: x * math.nan, OU()), OU(), 4, 2, data=x, grid="time"), "NaN in the prediction"),
        (lambda x: histogram_w2(x * math.nan, x), "x must be finite"),
        (lambda x: histogram_w2(x, x + 9), "y must have points inside the box, all 3 have a coordinate of 4 or more"),
        (lambda x: histogram_w2(x[:, :1], x), r"x must have shape \(n, 2\)"),
        (lambda x: net()(x[:, :1], 0.5), "x must have 2 elements in a row"),
    ],
)  # fmt: skip
def test_refused(call, words):
    with pytest.raises(ValueError, match=words):
        call(draw(3, 2).clamp(-1, 1))


def potential_of_relu() -> PotentialNet:
    net = PotentialNet(2, 8, 1)
    net.net[1] = nn.ReLU()
    return net


def relu() -> Denoiser:
    return told(nn.Sequential(nn.Linear(2, 2), nn.LeakyReLU()), OU())
