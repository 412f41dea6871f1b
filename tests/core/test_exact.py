"""Exact models against quadrature, autograd and simulation; distances against closed forms."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from polyak.core.distances import (
    energy_distance,
    frechet_distance,
    gaussian_w2,
    precision_recall,
    sliced_wasserstein,
    wasserstein_1d,
)
from polyak.core.exact import Gaussian, Mixture

FULL = torch.tensor([[[0.5, 0.2], [0.2, 0.3]], [[0.1, 0.0], [0.0, 0.4]], [[0.3, -0.1], [-0.1, 0.2]]])
MEANS = [[1.0, 0.0], [-1.0, 0.5], [0.0, -1.0]]
WEIGHTS = [0.5, 0.3, 0.2]
KINDS = {
    "scalar": 0.25,
    "isotropic": [0.5, 0.1, 0.3],
    "diagonal": [[0.5, 0.2], [0.1, 0.4], [0.3, 0.3]],
    "full": FULL,
    "points": 0.0,
}


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def points(n: int = 7, d: int = 2, seed: int = 0) -> Tensor:
    return torch.randn(n, d, dtype=torch.float64, generator=generator(seed))


def matrices(covariances: object) -> Tensor:
    c = torch.as_tensor(covariances, dtype=torch.float64)
    if c.ndim < 2:
        return torch.diag_embed(c.reshape(-1, 1).expand(3, 2))
    return torch.diag_embed(c) if c.ndim == 2 else c


@pytest.mark.parametrize("kind", KINDS)
def test_every_quantity_against_torch_distributions(kind: str) -> None:
    alpha, sigma = 0.8, 0.6
    model = Mixture(MEANS, KINDS[kind], WEIGHTS)
    c, means = matrices(KINDS[kind]), torch.tensor(MEANS, dtype=torch.float64)
    noised = alpha**2 * c + sigma**2 * torch.eye(2, dtype=torch.float64)
    x = points().requires_grad_()
    parts = [
        torch.distributions.MultivariateNormal(alpha * m, s).log_prob(x) for m, s in zip(means, noised, strict=True)
    ]
    joint = torch.stack(parts, -1) + torch.tensor(WEIGHTS, dtype=torch.float64).log()
    log_prob = joint.logsumexp(-1)
    (score,) = torch.autograd.grad(log_prob.sum(), x, create_graph=True)
    divergence = sum(torch.autograd.grad(score[:, i].sum(), x, retain_graph=True)[0][:, i] for i in range(2))
    x = x.detach()
    assert torch.allclose(model.log_prob(x, alpha, sigma), log_prob, rtol=1e-11, atol=1e-11)
    assert torch.allclose(model.responsibilities(x, alpha, sigma), joint.softmax(-1), atol=1e-11)
    assert torch.allclose(model.score(x, alpha, sigma), score, atol=1e-10)
    assert torch.allclose(model.score_divergence(x, alpha, sigma), torch.as_tensor(divergence), atol=1e-9)
    # Tweedie's formula ties the posterior mean to the score.
    mean = (x + sigma**2 * score) / alpha
    assert torch.allclose(model.posterior_mean(x, alpha, sigma), mean, atol=1e-10)


def test_posterior_mean_is_the_conditional_expectation_by_quadrature() -> None:
    model, alpha, sigma = Mixture([[-1.0], [0.7]], [0.09, 0.25], [0.3, 0.7]), 0.6, 0.4
    grid = torch.linspace(-6, 6, 20001, dtype=torch.float64)
    prior = model.log_prob(grid[:, None]).exp()
    for x in (-1.3, 0.0, 0.9):
        weight = prior * torch.exp(-0.5 * ((x - alpha * grid) / sigma) ** 2)
        expected = (weight * grid).sum() / weight.sum()
        got = model.posterior_mean(torch.tensor([[x]], dtype=torch.float64), alpha, sigma)
        assert got.item() == pytest.approx(expected.item(), abs=1e-10)


def test_coefficients_per_sample_batches_of_any_shape_and_the_input_dtype() -> None:
    model, x = Mixture(MEANS, FULL, WEIGHTS), points(6)
    alphas, sigmas = torch.linspace(0.2, 1, 6), torch.linspace(1, 0.1, 6)
    rows = [model.posterior_mean(x[i], alphas[i].item(), sigmas[i].item()) for i in range(6)]
    assert torch.allclose(model.posterior_mean(x, alphas, sigmas), torch.stack(rows), atol=1e-12)
    grid = x.reshape(2, 3, 2)
    assert torch.equal(model.posterior_mean(grid, 0.5, 0.5).reshape(6, 2), model.posterior_mean(x, 0.5, 0.5))
    assert model.log_prob(grid, 0.5, 0.5).shape == (2, 3)
    low = model.posterior_mean(x.float(), 0.5, 0.5)
    assert low.dtype == torch.float32
    assert torch.allclose(low.double(), model.posterior_mean(x.float().double(), 0.5, 0.5), atol=1e-6)


def test_far_points_do_not_underflow() -> None:
    model = Mixture([[-1.0], [1.0]], 0.0)
    x = torch.tensor([[50.0], [-50.0]], dtype=torch.float64)
    assert torch.equal(model.posterior_mean(x, 1.0, 0.1), torch.tensor([[1.0], [-1.0]], dtype=torch.float64))
    assert bool(model.log_prob(x, 1.0, 0.1).isfinite().all())


def test_gaussian_flow_maps_marginals_and_solves_the_ode() -> None:
    law = Gaussian([0.5, -0.3], torch.tensor([[0.5, 0.2], [0.2, 0.3]]))
    start, end = (0.3, 0.9), (0.9, 0.2)
    x = points(20000)
    root = torch.linalg.cholesky(0.09 * law.covariance + 0.81 * torch.eye(2))
    y = law.flow(0.3 * law.mean + x @ root.T, start, end)
    assert torch.allclose(y.mean(0), 0.9 * law.mean, atol=0.02)
    assert torch.allclose(torch.cov(y.T), 0.81 * law.covariance + 0.04 * torch.eye(2), atol=0.02)
    # dx/dsigma = (x - x0_hat) / sigma at alpha = 1, by central differences.
    x = points(5)
    for sigma in (0.1, 1.0):
        step = 1e-4 * sigma
        ahead, behind = (law.flow(x, (1.0, sigma), (1.0, sigma + d)) for d in (step, -step))
        slope = (x - law.posterior_mean(x, 1.0, sigma)) / sigma
        assert torch.allclose((ahead - behind) / (2 * step), slope, atol=1e-7)
    assert torch.allclose(law.flow(law.flow(x, start, end), end, start), x, atol=1e-12)


def test_samples_have_the_models_moments() -> None:
    model = Mixture(MEANS, FULL, WEIGHTS)
    x = model.sample(40000, alpha=0.8, sigma=0.6, generator=generator())
    assert torch.allclose(x.mean(0), 0.8 * model.mean, atol=0.02)
    assert torch.allclose(torch.cov(x.T), 0.64 * model.covariance + 0.36 * torch.eye(2), atol=0.03)
    assert torch.equal(model.sample(5, generator=generator(3)), model.sample(5, generator=generator(3)))


def test_classes_and_components() -> None:
    model, x = Mixture(MEANS, FULL, WEIGHTS, labels=[0, 1, 0]), points()
    part = model.of_class(0)
    assert len(part) == 2
    assert torch.allclose(part.weights, torch.tensor([5 / 7, 2 / 7], dtype=torch.float64))
    posterior = model.class_posterior(x, 0.5, 0.5)
    r = model.responsibilities(x, 0.5, 0.5)
    assert torch.allclose(posterior, torch.stack([r[:, 0] + r[:, 2], r[:, 1]], 1))
    # Bayes: p(x) p(class | x) = p(class) p(x | class)
    left = model.log_prob(x, 0.5, 0.5) + posterior[:, 0].log()
    assert torch.allclose(left, math.log(0.7) + part.log_prob(x, 0.5, 0.5))
    with pytest.raises(ValueError, match=r"label must be one of \[0, 1\], got 2"):
        model.of_class(2)
    with pytest.raises(ValueError, match="no labels"):
        Mixture(MEANS).of_class(0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([1.0, 2.0],), "means must have shape"),
        ((MEANS, [0.1, 0.2]), "covariances must be a number"),
        ((MEANS, -0.1), "positive semidefinite"),
        ((MEANS, 0.1, [1.0, 0.0, 1.0]), "weights must be 3 positive numbers"),
        ((MEANS, 0.1, None, [0, 1]), r"labels must have shape \(3,\)"),
    ],
)
def test_bad_models_are_refused(arguments: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Mixture(*arguments)


def test_bad_points_are_refused() -> None:
    model = Mixture(MEANS)
    with pytest.raises(ValueError, match="sigma must be > 0 where a component has zero variance"):
        model.log_prob(points(), 1.0, 0.0)
    with pytest.raises(ValueError, match=r"x must have shape \(\*batch, 2\), got \(7, 3\)"):
        model.log_prob(points(7, 3), 1.0, 1.0)
    with pytest.raises(ValueError, match=r"x must be floating point, got torch.int64"):
        model.log_prob(torch.zeros(1, 2, dtype=torch.int64), 1.0, 1.0)


def test_wasserstein_in_one_dimension() -> None:
    x = torch.tensor([[0.0], [1.0]], dtype=torch.float64)
    assert wasserstein_1d(x, x + 3).item() == pytest.approx(3.0)
    # Unequal sizes: three quarters of the mass of y is moved by 0, 1, 1 ... exactly as after repeating the points.
    y = torch.tensor([[0.0], [2.0], [5.0]], dtype=torch.float64)
    repeated = wasserstein_1d(x.repeat_interleave(3, 0), y.repeat_interleave(2, 0))
    assert wasserstein_1d(x, y).item() == pytest.approx(repeated.item(), abs=1e-14)
    assert wasserstein_1d(x, y, p=1.0).item() == pytest.approx((0 + 0 + 2 + 1 + 4 + 4) / 6)


def test_sliced_wasserstein_of_a_shift_and_of_one_dimension() -> None:
    x, shift = points(500, 3), torch.tensor([1.0, 2.0, 2.0], dtype=torch.float64)
    # E (u.s)^2 = |s|^2 / d over uniform directions
    got = sliced_wasserstein(x, x + shift, projections=20000, generator=generator())
    assert got == pytest.approx(math.sqrt(9 / 3), rel=0.02)
    flat = points(50, 1), points(60, 1, 1)
    assert sliced_wasserstein(*flat, generator=generator()) == pytest.approx(wasserstein_1d(*flat).item())


def test_energy_distance() -> None:
    x, y = points(40), points(30, seed=1)
    assert energy_distance(x, x) == 0
    far = energy_distance(x, y + 1000)
    # of two distant clouds: twice the distance, less the spreads within
    spread = torch.cdist(x, x).mean() + torch.cdist(y, y).mean()
    assert far == pytest.approx(2 * torch.cdist(x, y + 1000).mean().item() - spread.item())
    a, b = torch.zeros(1, 1), torch.ones(1, 1)
    assert energy_distance(a, b) == 2.0


def test_gaussian_distances() -> None:
    eye = torch.eye(2, dtype=torch.float64)
    zero = torch.zeros(2, dtype=torch.float64)
    assert gaussian_w2(zero, eye, zero + 3, 4 * eye) == pytest.approx(math.sqrt(18 + 2))
    c1, c2 = FULL[0].double(), FULL[2].double()
    # The transport map of N(0, c1) to N(0, c2) is A = c1^-1/2 (c1^1/2 c2 c1^1/2)^1/2 c1^-1/2; W2^2 = tr((I-A) c1 (I-A)).
    values, vectors = torch.linalg.eigh(c1)
    root = vectors @ values.sqrt().diag() @ vectors.T
    values, vectors = torch.linalg.eigh(root @ c2 @ root)
    inner = vectors @ values.sqrt().diag() @ vectors.T
    a = torch.linalg.solve(root, torch.linalg.solve(root, inner).T)
    square = torch.trace((eye - a) @ c1 @ (eye - a).T)
    assert gaussian_w2(zero, c1, zero, c2) == pytest.approx(square.sqrt().item(), rel=1e-10)
    x = points(200)
    assert frechet_distance(x, x + 2) == pytest.approx(8.0)
    assert frechet_distance(x, 3 * x) == pytest.approx(
        (4 * x.mean(0).square().sum() + 4 * torch.cov(x.T).trace()).item(), rel=1e-9
    )


def test_precision_and_recall() -> None:
    real = points(200)
    assert precision_recall(real, real) == (1.0, 1.0)
    assert precision_recall(real, real + 100) == (0.0, 0.0)
    half = real[real[:, 0] > 0]
    precision, recall = precision_recall(real, half)
    assert precision == 1.0
    assert 0.4 < recall < 0.8
    line = torch.arange(5.0)[:, None]
    # with k=1 each ball of the line has radius 1: 4.5 lies in one, 6 in none
    assert precision_recall(line, torch.tensor([[4.5], [6.0]]), k=1)[0] == 0.5


def test_bad_samples_are_refused() -> None:
    with pytest.raises(ValueError, match=r"x must have shape \(n, d\)"):
        energy_distance(torch.zeros(3), torch.zeros(3, 1))
    with pytest.raises(ValueError, match="one dimension, got 2 and 3"):
        energy_distance(torch.zeros(3, 2), torch.zeros(3, 3))
    with pytest.raises(ValueError, match="at most 2"):
        precision_recall(torch.zeros(3, 2), torch.zeros(3, 2))
