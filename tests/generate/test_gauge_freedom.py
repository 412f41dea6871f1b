"""Gauges, the split of a field, and dimensions, against finite differences, closed forms and code that is independent of them."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from polyak.generate import (
    EDM,
    RK4,
    VE,
    VP,
    Denoiser,
    EnergyScore,
    Flow,
    Heun,
    antisymmetric_gauge,
    conservativity_penalty,
    denoising_loss,
    divergence,
    flow_jacobian,
    gauge_moments,
    gauge_residual,
    intrinsic_dimension,
    invert,
    jacobian_asymmetry,
    log_likelihood,
    matrix_gauge,
    project_conservative,
    sample,
    train_denoiser,
)
from polyak.generate.problems import ExactDenoiser, Gaussian, Mixture

DOUBLE = torch.float64
PROCESS = EDM(0.05, 3.0)
LAW = Mixture([[-1.0, 0.3, 0.5], [0.6, -0.5, 0.0]], [[0.25, 0.5, 0.3], [0.09, 0.3, 0.6]], [0.4, 0.6])
TURN = torch.tensor([[0.0, 1.0, -0.5], [-1.0, 0.0, 2.0], [0.5, -2.0, 0.0]], dtype=DOUBLE)
PLAIN = torch.tensor([[0.0, 1.0], [-1.0, 0.0]], dtype=DOUBLE)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=DOUBLE, generator=seeded(seed))


def told(field, process=PROCESS) -> Denoiser:
    """A denoiser with this field for its score."""
    return Denoiser(field, process, "score", label=lambda t: t)


def waves(x: Tensor, t: float | Tensor) -> Tensor:
    """An antisymmetric matrix field in three dimensions."""
    a, b, c = torch.sin(x).cumsum(1).div(2 + torch.as_tensor(t).reshape(-1, 1)).unbind(1)
    zero = torch.zeros_like(a)
    rows = [[zero, a, b], [-a, zero, c.square()], [-b, -c.square(), zero]]
    return torch.stack([torch.stack(row, 1) for row in rows], 1)


GAUGES = {
    "constant": lambda score: antisymmetric_gauge(score, TURN, 0.7),
    "of x": lambda score: matrix_gauge(score, waves),
}


@pytest.fixture(scope="module")
def exact() -> ExactDenoiser:
    return ExactDenoiser(LAW, PROCESS)


# --- gauges


@pytest.mark.parametrize("gauge", GAUGES.values(), ids=GAUGES)
def test_gauges_keep_every_density(exact, gauge):
    t, x = 0.4, draw(20, 3)
    field = gauge(exact)
    # div(p R) / p by differences of the density and the field, which know nothing of scores' Jacobians
    rest, h = torch.zeros(20, dtype=DOUBLE), 1e-5
    flux = lambda y: exact.log_prob(y, t).exp()[:, None] * (field(y, t) - exact.score(y, t))  # noqa: E731
    for i in range(3):
        e = torch.zeros(3, dtype=DOUBLE)
        e[i] = h
        rest += ((flux(x + e) - flux(x - e)) / (2 * h))[:, i]
    remainder = field(x, t) - exact.score(x, t)
    scale = (remainder * exact.score(x, t)).abs().sum(1)
    assert ((rest / exact.log_prob(x, t).exp()).abs() < 1e-6 * scale).all()
    # and by ours
    assert (gauge_residual(field, exact, x, t).abs() < 1e-12 * scale).all()
    assert remainder.norm(dim=1).min() > 0.01


def test_the_condition_is_neither_no_divergence_nor_no_curl(exact):
    x, t = draw(20, 3), 0.4
    score = lambda y, t: exact.score(y, t)  # noqa: E731
    # without divergence, and yet no gauge: turned about another centre
    turned = lambda y, t: score(y, t) + (y - 1) @ TURN.mT  # noqa: E731
    assert divergence(lambda y, t: turned(y, t) - score(y, t), x, t).abs().max() < 1e-12
    assert gauge_residual(turned, exact, x, t).abs().min() > 0.01
    # without curl, and yet no gauge
    pulled = lambda y, t: score(y, t) - 0.3 * y  # noqa: E731
    assert jacobian_asymmetry(pulled, x, t, generator=seeded()).max() < 1e-12
    assert gauge_residual(pulled, exact, x, t).abs().mean() > 0.1
    # with divergence, and yet a gauge
    field = GAUGES["of x"](exact)
    assert divergence(lambda y, t: field(y, t) - score(y, t), x, t).abs().mean() > 0.1
    assert gauge_residual(field, exact, x, t).abs().max() < 1e-10
    # a field of no kind
    assert gauge_residual(lambda y, t: score(y, t) + torch.sin(3 * y.flip(1)) * y, exact, x, t).abs().mean() > 0.1


def test_the_residual_can_be_estimated(exact):
    x = draw(1, 3).expand(4000, 3)
    field = lambda y, t: exact.score(y, t) + y.flip(1) * y  # noqa: E731
    want = gauge_residual(field, exact, x[:1], 0.4)
    got = gauge_residual(field, exact, x, 0.4, method="hutchinson", generator=seeded())
    assert (got.mean() - want).abs() < 5 * got.std() / math.sqrt(4000)


@pytest.mark.parametrize("gauge", GAUGES.values(), ids=GAUGES)
def test_likelihoods_with_a_gauge_are_exact(exact, gauge):
    # It takes both: the path and the divergence of the field that is there. That of the second gauge is not zero.
    x = LAW.sample(5, sigma=0.05, generator=seeded())
    got = log_likelihood(told(gauge(exact)), PROCESS, x, steps=32, prior=lambda end: exact.log_prob(end, 3.0))
    assert torch.allclose(got, exact.log_prob(x, 0.05), rtol=0, atol=1e-4)
    wrong = told(lambda y, t: exact.score(y, t) / 1.2)
    got = log_likelihood(wrong, PROCESS, x, steps=8, prior=lambda end: exact.log_prob(end, 3.0))
    assert (got - exact.log_prob(x, 0.05)).abs().mean() > 0.1


def test_moments_need_no_score():
    law = Gaussian([0.0, 0.0], [2.0, 0.5])
    exact, x = ExactDenoiser(law, PROCESS), law.sample(20_000, sigma=0.5, generator=seeded())
    rest = lambda y, t: exact.score(y, t) @ PLAIN.mT  # noqa: E731
    of_gauge = gauge_moments(rest, x, 0.5, generator=seeded())
    # each moment's standard error is at most sqrt(2) |R . w| / sqrt(n), and w has deviation 1 / 2.3
    assert of_gauge.shape == (64,)
    assert of_gauge.abs().max() < 5 * math.sqrt(2 / 20_000) * 3.0 * rest(x, 0.5).norm(dim=1).mean()
    # the same field is no gauge of another law
    of_none = gauge_moments(lambda y, t: y @ PLAIN.mT, x, 0.5, generator=seeded())
    assert of_none.square().sum() > 20 * of_gauge.square().sum()
    weight = torch.tensor(0.3, dtype=DOUBLE, requires_grad=True)
    gauge_moments(lambda y, t: weight * y, x, 0.5, bandwidth=1.0, generator=seeded()).square().sum().backward()
    assert weight.grad > 0


def test_moments_are_means_of_waves_gradients():
    x, rest = draw(30, 2), lambda y, t: torch.tanh(y).flip(1)
    for bandwidth in (None, 0.7):
        got, draws = gauge_moments(rest, x, 0.5, features=5, bandwidth=bandwidth, generator=seeded(4)), seeded(4)
        # the root mean square distance between two of the samples, each with itself among the pairs
        scale = bandwidth or torch.cdist(x, x).square().mean().sqrt()
        w = torch.randn(5, 2, dtype=DOUBLE, generator=draws) / scale
        b = 2 * math.pi * torch.rand(5, dtype=DOUBLE, generator=draws)
        y = x.clone().requires_grad_()
        psi = math.sqrt(2) * torch.cos(y @ w.T + b)
        want = [
            (torch.autograd.grad(psi[:, i].sum(), y, retain_graph=True)[0] * rest(x, 0)).sum(1).mean() for i in range(5)
        ]
        assert torch.allclose(got, torch.stack(want), rtol=1e-10)
    assert gauge_moments(rest, torch.ones(3, 2), 0.5).isfinite().all()  # all samples equal


# --- the split of a field


class Quadratic(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.S, self.b = nn.Parameter(torch.eye(2, dtype=DOUBLE)), nn.Parameter(torch.zeros(2, dtype=DOUBLE))

    def forward(self, x: Tensor, t) -> Tensor:
        return ((x @ self.S) * x).sum(1) / 2 + x @ self.b


GRADIENT = torch.tensor([[-1.5, 0.4], [0.4, -0.7]], dtype=DOUBLE)


def square(deviations: list[float]) -> Tensor:
    """Four points with the mean and covariance of N(0, diag(deviations^2))."""
    axes = math.sqrt(2) * torch.diag(torch.tensor(deviations, dtype=DOUBLE))
    return torch.cat([axes, -axes])


def test_a_gradient_is_its_own_projection_and_the_potential_stays_as_it_is():
    potential = Quadratic()
    before = {k: v.clone() for k, v in potential.state_dict().items()}
    x = draw(50, 2)
    field = lambda y, t: y @ GRADIENT + 0.3  # noqa: E731
    found = project_conservative(field, x, 0.5, potential, 300, lr=0.1)
    gradient, remainder, cos = found
    assert torch.allclose(gradient(x, 0.5), field(x, 0.5), atol=1e-4)
    assert remainder < 1e-4
    assert cos.abs() <= 1
    assert all(torch.equal(v, before[k]) for k, v in potential.state_dict().items())


def test_the_rate_of_the_fit_falls_to_zero_by_a_cosine():
    # Adam's steps are as long as the rate while the gradient's sign stays
    found = project_conservative(lambda y, t: torch.full_like(y, 1e3), square([1.0, 1.0]), 0.5, Quadratic(), 4, lr=0.01)
    want = 0.01 * sum((1 + math.cos(math.pi * i / 4)) / 2 for i in range(4))
    assert torch.allclose(
        found.gradient(torch.zeros(1, 2, dtype=DOUBLE), 0.5), torch.full((1, 2), want, dtype=DOUBLE), rtol=1e-4
    )


def test_a_rotation_is_a_gauge_of_the_normal_law_and_is_left_out():
    x = square([1.0, 1.0])
    field = lambda y, t: y @ PLAIN.mT + y @ GRADIENT  # noqa: E731
    found = project_conservative(field, x, 0.5, Quadratic(), 300, lr=0.1)
    assert torch.allclose(found.gradient(x, 0.5), x @ GRADIENT, atol=1e-4)
    assert found.cos.abs() < 1e-4
    assert found.remainder_norm.item() == pytest.approx(math.sqrt(2), rel=1e-5)
    # errors add up: E|s - s*|^2 = E|grad phi - s*|^2 + E|R|^2
    score, mean = -x, lambda v: v.square().sum(1).mean()
    sides = mean(found.gradient(x, 0.5) - score) + found.remainder_norm**2
    assert mean(field(x, 0.5) - score).item() == pytest.approx(sides.item(), rel=1e-4)


def test_the_split_is_one_in_the_law_of_the_samples():
    # A C^-1 x is a gauge of N(0, C): nothing is left of it on samples of that law, and something on others.
    C = torch.tensor([4.0, 0.25], dtype=DOUBLE)
    field = lambda y, t: (y / C) @ PLAIN.mT  # noqa: E731
    within = project_conservative(field, square([2.0, 0.5]), 0.5, Quadratic(), 300, lr=0.2)
    assert within.gradient(square([2.0, 0.5]), 0.5).abs().max() < 1e-3
    elsewhere = project_conservative(field, square([1.0, 1.0]), 0.5, Quadratic(), 300, lr=0.2)
    assert elsewhere.gradient(square([1.0, 1.0]), 0.5).abs().max() > 0.5


class Scalar(nn.Module):
    """A potential of x and the time."""

    def __init__(self, size: int = 3, dtype: torch.dtype = DOUBLE) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(size + 1, 16), nn.SiLU(), nn.Linear(16, 1)).to(dtype)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        t = torch.as_tensor(t, dtype=x.dtype).expand(len(x))
        return self.layers(torch.cat([x, t[:, None]], 1))


def test_after_projection_the_parts_are_orthogonal_in_batches_and_for_times_of_their_own():
    torch.manual_seed(0)
    x, t = draw(512, 3), torch.rand(512, dtype=DOUBLE, generator=seeded())
    field = lambda y, t: torch.tanh(y) * (1 + t[:, None]) + y @ TURN.mT  # noqa: E731
    found = project_conservative(field, x, t, Scalar(), 300, batch=256, generator=seeded())
    assert found.cos.abs() < 0.02
    off = (found.gradient(x, t) - torch.tanh(x) * (1 + t[:, None])).square().sum(1).mean()
    assert off < 0.1 * field(x, t).square().sum(1).mean()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_it_is_fitted_wherever_it_is_called_and_leaves_its_inputs_alone(mode):
    want = project_conservative(lambda y, t: -y, draw(8, 2), 0.5, Quadratic(), 3).gradient(draw(8, 2), 0.5)
    with mode():
        x, potential = draw(8, 2), Quadratic()
        found = project_conservative(lambda y, t: -y, x, torch.full((8,), 0.5), potential, 3)
        assert torch.equal(found.gradient(x, 0.5), want)
    x = draw(8, 2).requires_grad_()
    project_conservative(lambda y, t: -y, x, 0.5, Quadratic(), 3)
    assert x.grad is None


def test_an_energy_network_is_a_gradient_and_a_network():
    torch.manual_seed(0)
    net, x, t = EnergyScore(Scalar()), draw(5, 3), torch.rand(5, dtype=DOUBLE, generator=seeded())
    y = x.clone().requires_grad_()
    (want,) = torch.autograd.grad(net.energy(y, t).sum(), y)
    assert torch.allclose(net(x, t), want)
    assert jacobian_asymmetry(net, x, t, generator=seeded()).max() < 1e-12
    single = EnergyScore(Scalar(dtype=torch.float32))
    assert jacobian_asymmetry(single, x.float(), 0.5, generator=seeded()).max() < 1e-6
    # in every dialect: what is added is a multiple of x
    for kind in ("epsilon", "sample", "v_prediction", "edm"):
        assert jacobian_asymmetry(Denoiser(net, VP(), kind), x, 0.4, generator=seeded()).max() < 1e-6
    # sampled and trained, saved and loaded
    denoiser = Denoiser(net, VP(), "epsilon")
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            assert sample(denoiser, x.clone(), solver=Heun(), steps=2).isfinite().all()
    denoising_loss(denoiser, x, generator=seeded()).sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in list(net.parameters())[:3])
    other = EnergyScore(Scalar())
    other.load_state_dict(net.state_dict())
    assert torch.equal(other(x, t), net(x, t))
    trained = train_denoiser(single, x.float(), VP(), steps=2, batch=4, generator=seeded())
    assert isinstance(trained, EnergyScore)


def test_asymmetry_and_penalty_estimate_frobenius_norms():
    M, x = draw(3, 3), draw(2, 3)
    field = lambda y, t: y @ M.mT  # noqa: E731
    got = jacobian_asymmetry(field, x, 0.5, 20_000, seeded())
    assert torch.allclose(got, (torch.norm(M - M.T) / torch.norm(M + M.T)).expand(2), rtol=0.03)
    penalty = conservativity_penalty(field, x, 0.5, 20_000, seeded())
    assert torch.allclose(penalty, (M - M.T).square().sum().expand(2), rtol=0.03)
    # in two dimensions any signs give the norm itself
    once = conservativity_penalty(lambda y, t: y @ M[:2, :2].mT, x[:, :2], 0.5)
    assert torch.allclose(once, (M[:2, :2] - M[:2, :2].T).square().sum().expand(2))


def test_the_asymmetry_has_a_slope_where_it_is_zero():
    weight = torch.tensor(2.0, dtype=DOUBLE, requires_grad=True)
    zero = jacobian_asymmetry(lambda y, t: weight * y, draw(3, 2), 0.5, generator=seeded())
    assert zero.tolist() == [0, 0, 0]
    zero.sum().backward()
    assert weight.grad == 0
    assert jacobian_asymmetry(lambda y, t: math.nan * y, draw(3, 2), 0.5).isnan().all()


def test_the_penalty_trains_a_field_to_be_conservative():
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(3, 16), nn.SiLU(), nn.Linear(16, 3)).double(), draw(32, 3)
    field = lambda y, t: net(y)  # noqa: E731
    optimizer = torch.optim.Adam(net.parameters(), 0.02)
    first = jacobian_asymmetry(field, x, 0.0, generator=seeded()).mean()
    generator = seeded(1)
    for _ in range(40):
        optimizer.zero_grad()
        loss = (net(x) + x).square().sum(1).mean() + conservativity_penalty(field, x, 0.0, 1, generator).mean()
        loss.backward()
        optimizer.step()
    assert jacobian_asymmetry(field, x, 0.0, generator=seeded()).mean() < 0.3 * first


# --- the flow's Jacobian


@pytest.mark.parametrize("kappa", [0.0, 3.0])
def test_the_flow_takes_covariances_to_covariances(kappa):
    C = torch.tensor([[0.8, 0.3], [0.3, 0.4]], dtype=DOUBLE)
    exact, s, t = ExactDenoiser(Gaussian([0.0, 0.0], C), PROCESS), 0.4, 0.1
    denoiser = told(antisymmetric_gauge(exact, PLAIN, kappa))
    _, Y = flow_jacobian(denoiser, PROCESS, draw(2, 2), PROCESS.grid(64, start=s, end=t))
    one = torch.eye(2, dtype=DOUBLE)
    assert torch.allclose(Y @ (C + s**2 * one) @ Y.mT, (C + t**2 * one).expand(2, 2, 2), rtol=0, atol=1e-8)
    if kappa == 0:
        c = torch.linalg.eigvalsh(C).flip(0)
        want = ((c + t**2) / (c + s**2)).sqrt().sort(descending=True).values
        assert torch.allclose(torch.linalg.svdvals(Y), want.expand(2, 2), atol=1e-8)
    else:
        # O of Y = Sigma_t^(1/2) O Sigma_s^(-1/2) is another rotation than without the gauge: Y is no longer symmetric.
        assert (Y - Y.mT).norm() > 0.02


def test_a_golden_flow_of_an_isotropic_law():
    # dx/dsigma = sigma / (c + sigma^2) (1 + kappa A) x: it shrinks and turns, by closed forms
    c, kappa, s, t = 0.5, 2.0, 2.0, 0.2
    shrink = math.sqrt((c + t**2) / (c + s**2))
    turn = kappa * math.log(shrink)
    Y = shrink * np.array([[math.cos(turn), math.sin(turn)], [-math.sin(turn), math.cos(turn)]])
    denoiser = told(antisymmetric_gauge(ExactDenoiser(Gaussian([0.0, 0.0], c), PROCESS), PLAIN, kappa))
    x, times = draw(3, 2), PROCESS.grid(48, start=s, end=t)
    x_t, Y_t = flow_jacobian(denoiser, PROCESS, x, times)
    assert np.allclose(x_t, x.numpy() @ Y.T, rtol=1e-5)
    assert np.allclose(Y_t, Y, rtol=1e-5)
    assert torch.allclose(sample(denoiser, x, solver=RK4(), grid=times), x_t, rtol=1e-9)


@pytest.mark.parametrize("process", [VP(), Flow(t_min=1e-3, t_max=0.99)], ids=["VP", "Flow"])
def test_it_is_the_derivative_of_the_solvers_result(process):
    denoiser, x = ExactDenoiser(LAW, process), draw(2, 3)
    times = process.grid(6, "time", end=0.3)
    x_t, Y = flow_jacobian(denoiser, process, x, times)
    run = lambda y: sample(denoiser, y, solver=RK4(), grid=times)  # noqa: E731
    assert torch.allclose(run(x), x_t, rtol=1e-10)
    for j in range(3):
        e = torch.zeros_like(x)
        e[:, j] = 1e-5
        assert torch.allclose((run(x + e) - run(x - e)) / 2e-5, Y[:, :, j], atol=1e-8)
    y = x.clone().requires_grad_()
    (row,) = torch.autograd.grad(flow_jacobian(denoiser, process, y, times)[0][:, 1].sum(), y)
    assert torch.allclose(row, Y[:, 1], rtol=1e-10)
    # in two pieces, and of a row of another shape
    half, first = flow_jacobian(denoiser, process, x, times[:4])
    again = flow_jacobian(denoiser, process, half, times[3:], first)
    assert torch.allclose(again[1], Y, rtol=1e-12)


def test_rows_have_any_shape_and_batches_may_be_empty():
    net = Denoiser(lambda x, t: torch.sin(x).flip(2), VP())
    flat = Denoiser(lambda x, t: torch.sin(x).reshape(-1, 2, 2).flip(2).flatten(1), VP())
    x, times = draw(3, 2, 2), VP().grid(3)
    got, want = flow_jacobian(net, VP(), x, times), flow_jacobian(flat, VP(), x.flatten(1), times)
    assert got[0].shape == (3, 2, 2)
    assert torch.allclose(got[1], want[1])
    assert [v.shape for v in flow_jacobian(net, VP(), x[:0], times)] == [(0, 2, 2), (0, 4, 4)]
    assert intrinsic_dimension(net, VP(), x[:0], steps=2).k.shape == (0,)
    assert intrinsic_dimension(net, VP(), x[:0], "score").k.shape == (0,)


# --- intrinsic dimension


def surface(size: int = 5, flat: int = 2, process=None) -> tuple[ExactDenoiser, Tensor]:
    """A normal law on a plane in ``size`` dimensions, and an orthonormal basis whose first vectors are tangent."""
    basis = torch.linalg.qr(draw(size, size, seed=3))[0]
    variances = torch.tensor([1.0, 0.5, 2.0][:flat] + [0.0] * (size - flat), dtype=DOUBLE)
    law = Gaussian(torch.zeros(size), basis @ torch.diag(variances) @ basis.T)
    return ExactDenoiser(law, process or EDM()), basis


@pytest.mark.parametrize("process", [EDM(), VP(), Flow()], ids=["EDM", "VP", "Flow"])
@pytest.mark.parametrize("flat", [1, 3])
def test_the_flow_finds_the_dimension_and_the_tangent_space(process, flat):
    denoiser, basis = surface(5, flat, process)
    x = draw(3, flat) @ basis[:, :flat].T
    found = intrinsic_dimension(denoiser, process, x, steps=12)
    assert found.k.tolist() == [flat] * 3
    assert found.singular_values.shape == (3, 5)
    tangent = found.tangent[:, :, :flat]
    assert torch.allclose(tangent @ tangent.mT, (basis[:, :flat] @ basis[:, :flat].T).expand(3, 5, 5), atol=1e-5)


def test_the_flow_starts_where_it_is_told_and_keeps_singular_values():
    c, denoiser = torch.tensor([1.0, 0.0], dtype=DOUBLE), ExactDenoiser(Gaussian([0.0, 0.0], [1.0, 0.0]), EDM())
    found = intrinsic_dimension(denoiser, EDM(), torch.zeros(1, 2, dtype=DOUBLE), sigma_start=3.0, steps=24)
    want = ((c + 0.02**2) / (c + 9.0)).sqrt()
    assert torch.allclose(found.singular_values[0], want, rtol=1e-4)
    wide = ExactDenoiser(denoiser.law, EDM(sigma_max=200.0))
    found = intrinsic_dimension(wide, wide.process, torch.zeros(1, 2, dtype=DOUBLE), steps=16)
    assert torch.allclose(found.singular_values[0], ((c + 0.02**2) / (c + 80.0**2)).sqrt(), rtol=0.05)
    # a direction is one of the manifold's while the law is wider there than the noise: slope sigma^2 / (c + sigma^2)
    thick = ExactDenoiser(Gaussian([0.0, 0.0], [1.0, 0.05**2]), EDM())
    dims = [
        intrinsic_dimension(thick, EDM(), torch.zeros(1, 2).double(), sigma_lo=lo, sigma_hi=2 * lo, steps=10).k
        for lo in (0.01, 0.2)
    ]
    assert [k.item() for k in dims] == [2, 1]


def test_levels_are_in_the_datas_own_units():
    # slope log((c + hi^2) / (c + lo^2)) / 2 log(hi / lo) = 0.52 in x / alpha; in x itself it would be 0.47 under Flow
    hi, lo = 0.1, 0.02
    c = (hi**2 - (hi / lo) ** 1.04 * lo**2) / ((hi / lo) ** 1.04 - 1)
    denoiser = ExactDenoiser(Gaussian([0.0, 0.0], [1.0, c]), Flow())
    assert intrinsic_dimension(denoiser, Flow(), torch.zeros(1, 2, dtype=DOUBLE), steps=24).k.item() == 1


def test_the_flow_is_the_one_into_the_point():
    # sigma / alpha is 0.5 and 4 at these ends
    process = Flow(t_min=1 / 3, t_max=0.8)
    denoiser, x = ExactDenoiser(LAW, process), draw(2, 3)
    found = intrinsic_dimension(denoiser, process, x, sigma_lo=0.5, sigma_hi=1.0, steps=12)
    noise = invert(denoiser, 2 / 3 * x, solver=RK4(), steps=12, grid="logsnr")
    _, Y = flow_jacobian(denoiser, process, noise, process.grid(12))
    assert torch.allclose(found.singular_values, torch.linalg.svdvals(Y), rtol=1e-4)


def gauged(kappa: float) -> Denoiser:
    pair = torch.zeros(5, 5, dtype=DOUBLE)
    pair[0, 4], pair[4, 0] = kappa, -kappa
    plane = ExactDenoiser(Gaussian([0.0] * 5, [1.0, 1.0, 0.0, 0.0, 0.0]), EDM())
    return told(matrix_gauge(plane, lambda x, t: torch.cos(x[:, 2] / t)[:, None, None] * pair), EDM())


@pytest.mark.parametrize(("kappa", "k", "low", "high"), [(0.0, 2, 0, 1), (3.0, 1, 60, 80)])
def test_a_gauge_misleads_the_score_and_not_the_flow(kappa, k, low, high):
    x = torch.tensor([[0.16, 0.12, 0.0, 0.0, 0.0]], dtype=DOUBLE)
    found = intrinsic_dimension(gauged(kappa), EDM(), x, "score", sigma_lo=0.05, points=500, generator=seeded(1))
    assert found.k.item() == k
    cosine = torch.linalg.svdvals(found.tangent[0, 2:, 2:]).min().clamp(max=1)
    assert low <= math.degrees(math.acos(cosine)) <= high
    assert intrinsic_dimension(gauged(kappa), EDM(), x, sigma_lo=0.05, sigma_hi=0.2, steps=9).k.item() == 2


@pytest.mark.parametrize("process", [EDM(), VP()], ids=["EDM", "VP"])
def test_scores_are_not_centred_and_each_point_has_its_own(process):
    denoiser, basis = surface(4, 2, process)
    x = 0.1 * draw(3, 2) @ basis[:, :2].T
    found = intrinsic_dimension(denoiser, process, x, "score", sigma_lo=0.03, points=40, generator=seeded())
    t = process.t_of_lam(-math.log(0.03))
    near = process.alpha(t) * x.repeat_interleave(40, 0) + process.sigma(t) * draw(120, 4)
    scores = denoiser.score(near, t).reshape(3, 40, 4).numpy()
    want = [np.linalg.svd(s, compute_uv=False) / math.sqrt(40) for s in scores]
    assert np.allclose(found.singular_values, want)
    assert found.k.tolist() == [2, 2, 2]
    assert torch.allclose(found.tangent.mT @ found.tangent, torch.eye(4, dtype=DOUBLE).expand(3, 4, 4), atol=1e-12)
    normal = found.tangent[:, :, 2:]
    assert torch.allclose(normal @ normal.mT, (basis[:, 2:] @ basis[:, 2:].T).expand(3, 4, 4), atol=1e-2)
    # a constant score has no spread, but is large
    rows = []
    constant = told(lambda y, t: rows.append(len(y)) or torch.ones_like(y) * 3, process)
    sizes = intrinsic_dimension(constant, process, x, "score", sigma_lo=0.03, generator=seeded()).singular_values
    assert sizes[0, 0].item() == pytest.approx(6.0)
    assert rows == [3 * 16]  # 4 D for each point


@pytest.mark.parametrize("dtype", [DOUBLE, torch.float32])
def test_directions_that_the_score_does_not_know_are_all_tangent(dtype):
    # zeros have no ratio among them
    sizes = torch.tensor([1.0, 0.9, 0, 0, 0], dtype=dtype)
    denoiser, x = told(lambda y, t: -y * sizes / t[:, None] ** 2, EDM()), torch.zeros(2, 5, dtype=dtype)
    found = intrinsic_dimension(denoiser, EDM(), x, "score", sigma_lo=0.05, generator=seeded())
    assert found.k.tolist() == [3, 3]


def test_the_split_is_by_ratios_not_by_differences():
    # sizes 20, 5 and 0.001: by differences one would be large
    law = Gaussian([0.0, 0.0, 0.0], [0.0, 0.0075, 50.0])
    x = torch.zeros(1, 3, dtype=DOUBLE)
    found = intrinsic_dimension(
        ExactDenoiser(law, EDM()), EDM(), x, "score", sigma_lo=0.05, points=400, generator=seeded()
    )
    assert np.allclose(found.singular_values[0], [20, 5, 0.001], rtol=0.1)
    assert found.k.item() == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_the_models_and_not_the_paths(dtype):
    # of this model nothing is rounded but what it says
    asked = set()
    denoiser = told(lambda y, t: asked.add(y.dtype) or -2.0 * y, EDM())
    x, times = torch.tensor([[1.0, 0.5]], dtype=dtype), EDM().grid(30, start=1.0, end=0.1)
    for got, want in zip(
        flow_jacobian(denoiser, EDM(), x, times), flow_jacobian(denoiser, EDM(), x.double(), times), strict=True
    ):
        assert got.dtype == dtype
        assert torch.allclose(got.double(), want, rtol=2 * torch.finfo(dtype).eps)
    plane = ExactDenoiser(Gaussian([0.0] * 3, [1.0, 1.0, 0.0]), EDM())
    for method in ("flow", "score"):
        found = intrinsic_dimension(plane, EDM(), torch.zeros(2, 3, dtype=dtype), method, steps=6, generator=seeded())
        assert found.k.tolist() == [2, 2]
        assert found.singular_values.dtype == found.tangent.dtype == dtype
    assert asked == {dtype, DOUBLE}


# --- bad input


class Heavy(VE):
    """A process whose noise is not Gaussian."""

    is_gaussian = False


def plain(x, t):
    return -x


X = torch.ones(2, 3)
NET = Denoiser(plain, EDM())
BAD = {
    "not Gaussian": (lambda: flow_jacobian(Denoiser(plain, Heavy()), Heavy(), X, [1.0, 0.5]), "process must have Gaussian"),
    "another process": (lambda: intrinsic_dimension(NET, VP(), X), "process must be the denoiser's own"),
    "sigma_lo": (lambda: intrinsic_dimension(NET, EDM(), X, sigma_lo=0.001), "sigma_lo must be at least the model's.*0.002"),
    "sigma_lo of the score": (lambda: intrinsic_dimension(NET, EDM(), X, "score", sigma_lo=90.0), "sigma_lo must be at most"),
    "levels": (lambda: intrinsic_dimension(NET, EDM(), X, sigma_hi=0.01), "sigma_lo < sigma_hi < sigma_start must hold"),
    "start": (lambda: intrinsic_dimension(NET, EDM(), X, sigma_start=81.0), "sigma_start be at most the model's largest, 80"),
    "points": (lambda: intrinsic_dimension(NET, EDM(), X, "score", points=2), "points must be at least 3: need at least D"),
    "one element": (lambda: intrinsic_dimension(NET, EDM(), X[:, :1], "score"), "x must have at least 2 elements"),
    "no element": (lambda: intrinsic_dimension(NET, EDM(), X[:, :0]), "x must have at least one element"),
    "method": (lambda: intrinsic_dimension(NET, EDM(), X, "fisher"), "method must be one of 'flow', 'score'"),
    "A": (lambda: antisymmetric_gauge(NET, torch.eye(3)), "A must satisfy A = -A\\^T"),
    "A's shape": (lambda: antisymmetric_gauge(NET, torch.ones(3)), "A must be a square matrix"),
    "A's size": (lambda: antisymmetric_gauge(NET, PLAIN)(X, 0.5), "A must have the size of x's rows, 3"),
    "B": (lambda: matrix_gauge(plain, lambda x, t: x)(X, 0.5), r"B must return shape \(2, 3, 3\)"),
    "many dimensions": (lambda: flow_jacobian(NET, EDM(), torch.ones(1, 4097), [1.0, 0.5]), "at most 4096 elements"),
    "times": (lambda: flow_jacobian(NET, EDM(), X, [0.5, 1.0]), "times must decrease strictly"),
    "Y": (lambda: flow_jacobian(NET, EDM(), X, [1.0, 0.5], torch.ones(2, 2, 2)), r"Y must have shape \(2, 3, 3\)"),
    "potential's shape": (lambda: project_conservative(plain, X, 0.5, Shapeless()), r"potential must return shape \(2,\)"),
    "no parameters": (lambda: project_conservative(plain, X, 0.5, nn.SiLU()), "potential must have parameters to fit"),
    "a field of NaN": (lambda: project_conservative(lambda x, t: x / 0 * 0, X, 0.5, Quadratic()), "field must be finite"),
    "no samples": (lambda: project_conservative(plain, X[:0], 0.5, Quadratic()), "samples must not be empty"),
    "times of rows": (lambda: jacobian_asymmetry(plain, X, torch.ones(3)), r"t must be a number or have shape \(2,\)"),
}  # fmt: skip


class Shapeless(nn.Linear):
    def __init__(self) -> None:
        super().__init__(3, 2)

    def forward(self, x: Tensor, t) -> Tensor:
        return super().forward(x)


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named(case):
    call, message = BAD[case]
    with pytest.raises((ValueError, TypeError), match=message):
        call()


def test_a_jacobian_that_is_not_finite_is_found_with_its_time():
    broken = Denoiser(lambda x, t: torch.where(t[:, None] < 0.6, math.nan, 1.0) * x, VP())
    with pytest.raises(ValueError, match=r"the Jacobian of denoiser is not finite at t=0\.5"):
        flow_jacobian(broken, VP(), X, [1.0, 0.9, 0.7, 0.5, 0.3])
    with pytest.raises(ValueError, match="the score of denoiser is not finite at t="):
        intrinsic_dimension(broken, VP(), X, "score")
