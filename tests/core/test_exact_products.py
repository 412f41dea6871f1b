"""Posteriors, tilts, products and powers of mixtures: as identities of densities at any point, and by quadrature."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from polyak.core.exact import Gaussian, Mixture, product_of_powers

from .test_exact import FULL, KINDS, MEANS, WEIGHTS, generator, points

SMOOTH = [kind for kind in KINDS if kind != "points"]
B_KINDS = {"none": None, "number": 0.7, "diagonal": [0.5, -0.4], "full": [[0.5, 0.3], [0.3, -0.2]]}


def quadrature(log_f, low: float = -9.0, high: float = 9.0, n: int = 601) -> float:
    """``log int exp(log_f)`` over the plane; a sum over a grid is exact to rounding for what is smooth and dies out."""
    line = torch.linspace(low, high, n, dtype=torch.float64)
    x = torch.cartesian_prod(line, line)
    return (log_f(x).logsumexp(0) + 2 * math.log(line[1] - line[0])).item()


@pytest.mark.parametrize("kind", KINDS)
def test_posterior_is_bayes_rule_and_its_mean_is_the_denoiser(kind: str) -> None:
    model, alpha, sigma = Mixture(MEANS, KINDS[kind], WEIGHTS, labels=[0, 1, 0]), 0.8, 0.6
    x, x0 = points(1)[0], points(9, seed=1)
    posterior = model.posterior(x, alpha, sigma)
    assert torch.allclose(posterior.mean, model.posterior_mean(x, alpha, sigma), atol=1e-12)
    assert torch.equal(posterior.labels, model.labels)
    if kind == "points":
        assert torch.equal(posterior.covariances, torch.zeros(3, 2, 2, dtype=torch.float64))
        return
    noise = torch.distributions.Normal(alpha * x0, sigma).log_prob(x).sum(-1)
    expected = model.log_prob(x0) + noise - model.log_prob(x, alpha, sigma)
    assert torch.allclose(posterior.log_prob(x0), expected, atol=1e-10)
    # It is also a tilt of the prior.
    tilted, log_z = model.tilt(alpha * x / sigma**2, alpha**2 / sigma**2)
    assert torch.allclose(tilted.log_prob(x0), expected, atol=1e-10)
    constant = -0.5 * (x.square().sum() / sigma**2) - math.log(2 * math.pi * sigma**2)
    assert log_z + constant == pytest.approx(model.log_prob(x, alpha, sigma).item(), abs=1e-10)


@pytest.mark.parametrize("kind", ["isotropic", "full", "points"])
def test_draws_from_the_posterior_of_every_point(kind: str) -> None:
    model, sigmas = Mixture(MEANS, KINDS[kind], WEIGHTS), torch.tensor([0.3, 0.9, 2.0])
    x = points(3)
    drawn = model.sample_posterior(x.repeat(20000, 1), 0.8, sigmas.repeat(20000), generator=generator())
    drawn = drawn.reshape(20000, 3, 2)
    for i in range(3):
        law = model.posterior(x[i], 0.8, sigmas[i].item())
        error = (law.covariance.diagonal() / 20000).sqrt() * 4.5 + 1e-12
        assert bool(((drawn[:, i].mean(0) - law.mean).abs() <= error).all())
        assert torch.allclose(torch.cov(drawn[:, i].T), law.covariance, atol=0.02)
    assert model.sample_posterior(x.float()[0], 0.8, 0.5).dtype == torch.float32


def test_velocity_carries_the_marginals() -> None:
    # d/dt log p_t along dx/dt = v is -div v; on the linear path, by central differences in t, and of div v in x.
    model, t, h = Mixture(MEANS, FULL, WEIGHTS), 0.4, 1e-4
    x = points(5)
    v = model.velocity(x, 1 - t, t)
    eps = (x - (1 - t) * model.posterior_mean(x, 1 - t, t)) / t
    assert torch.allclose(v, eps - model.posterior_mean(x, 1 - t, t), atol=1e-12)
    ahead, behind = (model.log_prob(x + s * v, 1 - t - s, t + s) for s in (h, -h))
    eye = torch.eye(2, dtype=torch.float64)
    divergence = sum(
        (model.velocity(x + h * e, 1 - t, t) - model.velocity(x - h * e, 1 - t, t)) @ e / (2 * h) for e in eye
    )
    assert torch.allclose((ahead - behind) / (2 * h), -torch.as_tensor(divergence), atol=1e-6)
    # Any path: VP at an angle, one coefficient for each point; and without noise.
    angle = torch.linspace(0.3, 1.2, 5, dtype=torch.float64)
    got = model.velocity(x, angle.cos(), angle.sin(), -angle.sin(), angle.cos())
    x0 = model.posterior_mean(x, angle.cos(), angle.sin())
    eps = (x - angle.cos()[:, None] * x0) / angle.sin()[:, None]
    assert torch.allclose(got, -angle.sin()[:, None] * x0 + angle.cos()[:, None] * eps, atol=1e-12)
    assert torch.allclose(model.velocity(x, 1.0, 0.0), -x, atol=1e-12)
    assert model.velocity(x[0].float(), 0.5, 0.5).shape == (2,)


@pytest.mark.parametrize("bend", B_KINDS)
@pytest.mark.parametrize("kind", SMOOTH)
def test_tilts_multiply_the_density(kind: str, bend: str) -> None:
    model, b, given = Mixture(MEANS, KINDS[kind], WEIGHTS, labels=[0, 1, 0]), [0.8, -0.5], B_KINDS[bend]
    tilted, log_z = model.tilt(b, given)
    matrix = torch.as_tensor(0.0 if given is None else given, dtype=torch.float64)
    matrix = matrix if matrix.ndim == 2 else torch.diag_embed(matrix.expand(2))

    def log_f(x: Tensor) -> Tensor:
        return x @ torch.tensor(b, dtype=torch.float64) - 0.5 * ((x @ matrix) * x).sum(-1) + model.log_prob(x)

    x = points(9)
    assert torch.allclose(tilted.log_prob(x) + log_z, log_f(x), atol=1e-10)
    assert torch.equal(tilted.labels, model.labels)
    assert (tilted.basis is None) == (kind in ("scalar", "isotropic") and bend in ("none", "number"))
    if bend in ("none", "full"):
        assert log_z.item() == pytest.approx(quadrature(log_f), abs=1e-9)


def test_a_tilt_as_the_specification_writes_it_and_of_singular_laws() -> None:
    s, m, b = FULL.double(), torch.tensor(MEANS, dtype=torch.float64), torch.tensor([0.8, -0.5], dtype=torch.float64)
    bend = torch.tensor([[0.5, 0.3], [0.3, -0.2]], dtype=torch.float64)
    tilted, log_z = Mixture(m, s, WEIGHTS).tilt(b, bend)
    new = torch.linalg.inv(torch.linalg.inv(s) + bend)
    mean = (new @ (torch.linalg.solve(s, m[..., None]) + b[:, None]))[..., 0]
    quadratic = [(v * torch.linalg.solve(c, v[..., None])[..., 0]).sum(-1) for v, c in ((mean, new), (m, s))]
    log_w = torch.tensor(WEIGHTS, dtype=torch.float64).log() + 0.5 * (
        quadratic[0] - quadratic[1] + torch.logdet(new) - torch.logdet(s)
    )
    assert torch.allclose(tilted.covariances, new, atol=1e-12)
    assert torch.allclose(tilted.means, mean, atol=1e-12)
    assert torch.allclose(tilted.weights, log_w.softmax(0), atol=1e-12)
    assert log_z.item() == pytest.approx(log_w.logsumexp(0).item(), abs=1e-12)
    # Point masses stay, and are weighed.
    atoms, log_z = Mixture(MEANS, 0.0, WEIGHTS).tilt(b, bend)
    log_w = torch.tensor(WEIGHTS, dtype=torch.float64).log() + m @ b - 0.5 * ((m @ bend) * m).sum(-1)
    assert torch.equal(atoms.means, m)
    assert torch.allclose(atoms.weights, log_w.softmax(0))
    # A mass so small that it is zero is one: nothing else changes.
    far, log_z = Mixture([[0.0], [-2000.0]], 1.0).tilt([1.0])
    assert far.weights.tolist() == [1.0, 0.0]
    assert log_z.item() == pytest.approx(0.5 - math.log(2))
    assert bool(far.score(torch.zeros(1, 1)).isfinite().all())
    assert far.power(2)[1].item() == pytest.approx(-0.5 * math.log(4 * math.pi))


@pytest.mark.parametrize("second", ["scalar", "diagonal", "full", "points"])
@pytest.mark.parametrize("first", SMOOTH)
def test_products_multiply_the_densities(first: str, second: str) -> None:
    one = Mixture(MEANS, KINDS[first], WEIGHTS)
    two = Mixture([[0.5, 0.3], [-0.4, -0.2], [1.0, 1.0]], KINDS[second], [0.1, 0.6, 0.3])
    law, log_z = one.product(two)
    assert len(law) == 9
    assert law.labels is None
    if second == "points":
        assert log_z.item() == pytest.approx((two.weights @ one.log_prob(two.means).exp()).log().item())
        assert torch.allclose(law.means.reshape(3, 3, 2)[0], two.means, atol=1e-12)
        return
    x = points(9)
    assert torch.allclose(law.log_prob(x) + log_z, one.log_prob(x) + two.log_prob(x), atol=1e-9)
    swapped, same = two.product(one)
    assert same.item() == pytest.approx(log_z.item(), abs=1e-12)
    assert torch.allclose(swapped.means.reshape(3, 3, 2).mT, law.means.reshape(3, 3, 2).permute(1, 2, 0), atol=1e-12)
    if (first, second) == ("full", "full"):
        assert log_z.item() == pytest.approx(quadrature(lambda x: one.log_prob(x) + two.log_prob(x)), abs=1e-9)


def test_the_numbers_of_the_specification() -> None:
    one, two = Gaussian([1.5], 0.5), Gaussian([-0.5], 2.0)
    annealed, log_z = one.power(3.0)
    assert isinstance(annealed, Gaussian)
    assert (annealed.mean.item(), annealed.covariance.item()) == pytest.approx((1.5, 1 / 6))
    assert log_z.item() == pytest.approx((1 - 3) / 2 * math.log(2 * math.pi * 0.5) - 0.5 * math.log(3))
    product, log_z = one.product(two)
    assert isinstance(product, Gaussian)
    assert (product.mean.item(), product.covariance.item()) == pytest.approx((1.1, 0.4))
    assert log_z.item() == pytest.approx(Gaussian([-0.5], 2.5).log_prob(torch.tensor([1.5]).double()).item())
    same, log_same = product_of_powers([one, two], [1.0, 1.0])
    assert (same.mean.item(), same.covariance.item(), log_same.item()) == pytest.approx((1.1, 0.4, log_z.item()))
    guided, log_z = product_of_powers([two, one], [-1.0, 2.0])
    assert (guided.mean.item(), guided.covariance.item()) == pytest.approx((1.785714, 0.285714), abs=1e-6)
    x = points(5, 1)
    expected = 2 * one.log_prob(x) - two.log_prob(x)
    assert torch.allclose(guided.log_prob(x) + log_z, expected, atol=1e-12)
    assert guided.flow(x, (1.0, 1.0), (1.0, 0.1)).shape == (5, 1)


@pytest.mark.parametrize("kind", SMOOTH)
def test_powers_of_mixtures(kind: str) -> None:
    model, x = Mixture(MEANS, KINDS[kind], WEIGHTS), points(9)
    for beta in (1, 2, 3):
        law, log_z = model.power(beta)
        assert len(law) == math.comb(3 + beta - 1, beta)
        assert torch.allclose(law.log_prob(x) + log_z, beta * model.log_prob(x), atol=1e-9)
    assert log_z.item() == pytest.approx(quadrature(lambda x: 3 * model.log_prob(x)), abs=1e-9)
    one, log_z = model.select([1]).power(0.4)
    assert torch.allclose(one.log_prob(x) + log_z, 0.4 * model.select([1]).log_prob(x), atol=1e-10)


def test_modes_that_do_not_overlap_have_the_masses_of_the_ring() -> None:
    weights = torch.tensor([0.3, 0.25, 0.2, 0.1, 0.1, 0.05], dtype=torch.float64)
    v = torch.tensor([0.05, 0.1, 0.2, 0.1, 0.3, 0.2], dtype=torch.float64)
    angle = torch.arange(6) * math.pi / 3
    model = Mixture(3 * torch.stack([angle.cos(), angle.sin()], 1), v, weights, labels=torch.arange(6))
    law, log_z = model.power_of_modes(3.0)
    masses = weights**3 * v**-2
    assert torch.allclose(law.weights, masses / masses.sum())
    assert torch.allclose(law.variances[:, 0], v / 3)
    assert torch.equal(law.labels, torch.arange(6))
    exact, log_exact = model.power(3)
    assert len(exact) == 56
    assert log_z.item() == pytest.approx(log_exact.item(), abs=2e-3)  # what the modes share
    assert log_z < log_exact


def test_what_cannot_be_multiplied_is_refused() -> None:
    model, atoms = Mixture(MEANS, 0.25), Mixture(MEANS)
    for call, message in (
        (lambda: model.tilt([1.0]), r"b must have shape \(2,\), got \(1,\)"),
        (lambda: model.tilt([1.0, math.nan]), "b must be finite"),
        (lambda: model.tilt([1.0, 0.0], [[1.0, 0.5], [0.0, 1.0]]), "B must be a number"),
        (lambda: model.tilt([1.0, 0.0], -4.0), "B leaves nothing to normalise"),
        (lambda: model.product(Mixture([[0.0]], 1.0)), "other must be of dimension 2, got 1"),
        (lambda: atoms.product(atoms), "other and this law both have a component without spread"),
        (lambda: atoms.power(2), "a law without density has no powers"),
        (lambda: model.power(0.5), "beta must be whole"),
        (lambda: model.power(1000), "at most 100000 components"),
        (lambda: model.power(0.0), "beta must be > 0"),
        (lambda: model.posterior(points(3), 0.5, 0.5), r"x must be one point, of shape \(2,\), got \(3, 2\)"),
        (lambda: atoms.posterior(points(1)[0], 1.0, 0.0), "sigma must be > 0"),
        (lambda: product_of_powers([Gaussian([0.0]), Gaussian([1.0])], [1.0]), "betas must be 2 numbers"),
        (lambda: product_of_powers([Gaussian([0.0]), Gaussian([1.0])], [1.0, -1.0]), "betas must leave a law"),
        (lambda: product_of_powers([model], [1.0]), "laws must each have one component"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(TypeError, match="other must be a Mixture"):
        model.product(2.0)
