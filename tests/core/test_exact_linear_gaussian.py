"""Kalman filter and smoother against the joint Gaussian of all states and observations, written out; the score against autograd."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from polyak.core.exact import LinearGaussian

T = 6
A = [[0.9, 0.2], [-0.3, 0.7]]
C = [[1.0, 0.5], [0.0, 1.0], [0.3, -0.2]]
Q = [[0.5, 0.1], [0.1, 0.3]]
R = [[0.4, 0.1, 0.0], [0.1, 0.3, 0.05], [0.0, 0.05, 0.6]]
M0, P0 = [0.5, -1.0], [[1.0, 0.3], [0.3, 0.8]]
NAMES = ("A", "C", "Q", "R", "m0", "P0")
PARAMETERS = dict(zip(NAMES, (A, C, Q, R, M0, P0), strict=True))
MODEL = LinearGaussian(**PARAMETERS)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def gaps() -> Tensor:
    """Three series: all there, rows missing, parts of rows missing."""
    y = MODEL.simulate(T, 3, generator=generator())[1]
    y[1, [0, 3, 5]] = math.nan
    y[2, 1, 0] = y[2, 4, 1:] = y[2, 2] = math.nan
    return y


def joint(model: LinearGaussian, steps: int) -> tuple[Tensor, Tensor]:
    """Mean and covariance of (x_0 .. x_{T-1}, y_0 .. y_{T-1}): every one is a matrix times independent noises."""
    d, p = len(model.m0), len(model.C)
    eye = torch.eye(steps * d, dtype=torch.float64)
    shift = torch.zeros_like(eye)
    for t in range(1, steps):
        shift[t * d : (t + 1) * d, (t - 1) * d : t * d] = model.A
    states = torch.linalg.inv(eye - shift)  # x = states (x_0's noise, w_1, ...)
    noise = torch.block_diag(model.P0, *[model.Q] * (steps - 1))
    mean = states[:, :d] @ model.m0
    observe = torch.block_diag(*[model.C] * steps)
    whole = torch.cat([torch.eye(steps * d, dtype=torch.float64), observe])
    covariance = whole @ states @ noise @ states.T @ whole.T
    covariance[steps * d :, steps * d :] += torch.block_diag(*[model.R] * steps)
    assert covariance.shape == (steps * (d + p),) * 2
    return whole @ mean, covariance


def conditioned(model: LinearGaussian, y: Tensor, upto: int) -> tuple[Tensor, Tensor, Tensor]:
    """The law of all states given y_0 .. y_{upto - 1} (what is not NaN), and the log-density of those."""
    steps, d = len(y), len(model.m0)
    mean, covariance = joint(model, steps)
    seen = ~y.isnan()
    seen[upto:] = False
    index = steps * d + seen.flatten().nonzero()[:, 0]
    if len(index) == 0:
        return mean[: steps * d], covariance[: steps * d, : steps * d], torch.zeros((), dtype=torch.float64)
    marginal = torch.distributions.MultivariateNormal(mean[index], covariance[index][:, index])
    gain = torch.linalg.solve(covariance[index][:, index], covariance[index][:, : steps * d]).T
    value = y.flatten()[seen.flatten()]
    return (
        mean[: steps * d] + gain @ (value - mean[index]),
        covariance[: steps * d, : steps * d] - gain @ covariance[index][:, : steps * d],
        marginal.log_prob(value),
    )


@pytest.mark.parametrize("series", range(3))
def test_filter_smoother_and_likelihood_are_those_of_the_joint_gaussian(series: int) -> None:
    y = gaps()
    f, s, d = MODEL.filter(y), MODEL.smooth(y), 2
    close = {"rtol": 0.0, "atol": 1e-11}
    for t in range(T):
        block = slice(t * d, (t + 1) * d)
        for upto, mean, covariance in (
            (t, f.predicted_means, f.predicted_covariances),
            (t + 1, f.means, f.covariances),
            (T, s.means, s.covariances),
        ):
            m, c, _ = conditioned(MODEL, y[series], upto)
            assert torch.allclose(mean[series, t], m[block], **close)
            assert torch.allclose(covariance[series, t], c[block, block], **close)
    m, c, log_p = conditioned(MODEL, y[series], T)
    assert f.log_likelihood[series].item() == pytest.approx(log_p.item(), abs=1e-11)
    assert s.log_likelihood[series] == f.log_likelihood[series]
    outer = c + m[:, None] * m
    for t in range(T - 1):
        here, ahead = slice(t * d, (t + 1) * d), slice((t + 1) * d, (t + 2) * d)
        assert torch.allclose(s.lag_one[series, t], c[here, ahead], **close)
        assert torch.allclose(s.cross_moments[series, t], outer[here, ahead], **close)
        assert torch.allclose(s.second_moments[series, t], outer[here, here], **close)


def test_batches_are_series_on_their_own_and_float32_is_read() -> None:
    y = gaps()
    f, s = MODEL.filter(y), MODEL.smooth(y)
    for i in range(3):
        for whole, one in ((f, MODEL.filter(y[i])), (s, MODEL.smooth(y[i]))):
            for a, b in zip(whole, one, strict=True):
                assert torch.allclose(a[i], b, atol=1e-13)
    there = y[:1].expand(4, 5, T, 3)  # nothing is missing: covariances are computed once
    assert MODEL.filter(there).covariances.shape == (4, 5, T, 2, 2)
    assert torch.allclose(MODEL.smooth(there).lag_one[2, 3], s.lag_one[0], atol=1e-13)
    assert MODEL.filter(y.float()).means.dtype == torch.float64
    assert MODEL.smooth(y[:, :1]).lag_one.shape == (3, 0, 2, 2)


def test_the_score_by_fishers_identity_is_the_derivative() -> None:
    y = gaps()[:2]
    parameters = {n: torch.tensor(v, dtype=torch.float64, requires_grad=True) for n, v in PARAMETERS.items()}
    model = LinearGaussian(**parameters)
    score = model.score(y)
    for i in range(2):
        slopes = torch.autograd.grad(model.log_likelihood(y)[i], list(parameters.values()))
        for name, slope in zip(NAMES, slopes, strict=True):
            if name in ("Q", "R", "P0"):
                slope = (slope + slope.mT) / 2
            assert torch.allclose(getattr(score, name)[i], slope, atol=1e-10), name
    # And of y: minus the residual, weighed.
    seen = y[:1].clone().requires_grad_()
    assert torch.autograd.gradcheck(MODEL.log_likelihood, (seen[:, :2],))
    h = 1e-6
    moved = [LinearGaussian(**{**PARAMETERS, "A": torch.tensor(A).double() + s * torch.eye(2)}) for s in (h, -h)]
    slope = (moved[0].log_likelihood(y) - moved[1].log_likelihood(y)) / (2 * h)
    assert torch.allclose(score.A.diagonal(dim1=-2, dim2=-1).sum(-1), slope, atol=1e-7)


def test_simulated_series_have_the_moments_of_the_joint_gaussian() -> None:
    n = 40000
    x, y = MODEL.simulate(3, n, generator=generator(1))
    assert (x.shape, y.shape) == ((n, 3, 2), (n, 3, 3))
    mean, covariance = joint(MODEL, 3)
    draws = torch.cat([x.flatten(1), y.flatten(1)], 1)
    variances = covariance.diagonal()
    assert bool(((draws.mean(0) - mean).abs() < 4.5 * (variances / n).sqrt()).all())
    error = ((variances[:, None] * variances + covariance**2) / n).sqrt()
    assert bool(((torch.cov(draws.T) - covariance).abs() < 4.5 * error).all())
    assert torch.equal(MODEL.simulate(3, 2, generator=generator(3))[1], MODEL.simulate(3, 2, generator=generator(3))[1])


def test_without_noise_of_the_states_there_is_one_unknown() -> None:
    # x_t = A^t x_0, and one coordinate of x_0 is known: least squares on the other.
    model = LinearGaussian(A, C, [[0.0, 0.0], [0.0, 0.0]], R, M0, [[1.0, 0.0], [0.0, 0.0]])
    y = MODEL.simulate(T, 1, generator=generator())[1][0]
    s = model.smooth(y)
    m, c, log_p = conditioned(model, y, T)
    assert torch.allclose(s.means.flatten(), m, atol=1e-11)
    for t in range(T - 1):
        assert torch.allclose(s.lag_one[t], c[2 * t : 2 * t + 2, 2 * t + 2 : 2 * t + 4], atol=1e-11)
    assert s.log_likelihood.item() == pytest.approx(log_p.item(), abs=1e-11)
    with pytest.raises(ValueError, match="Q must be positive definite for Fisher's identity"):
        model.score(y)


def test_covariances_stay_symmetric_and_positive_where_observations_are_sharp() -> None:
    model = LinearGaussian(A, C[:2], Q, [[1e-14, 0.0], [0.0, 1e-14]], M0, [[1e6, 0.0], [0.0, 1e6]])
    f = model.filter(model.simulate(50, 1, generator=generator())[1])
    assert torch.equal(f.covariances, f.covariances.mT)
    assert bool((torch.linalg.eigvalsh(f.covariances) > 0).all())


def test_golden_local_level() -> None:
    # By hand: P0 = Q = R = 1, A = C = 1. S = 2, K = 1/2, P = 1/2; then P- = 3/2, S = 5/2, K = 3/5, P = 3/5.
    model = LinearGaussian([[1.0]], [[1.0]], [[1.0]], [[1.0]], [0.0], [[1.0]])
    f = model.filter(torch.tensor([[2.0], [3.0]]))
    assert f.means.flatten().tolist() == pytest.approx([1.0, 1 + 0.6 * 2])
    assert f.covariances.flatten().tolist() == pytest.approx([0.5, 0.6])
    assert f.log_likelihood.item() == pytest.approx(
        -0.5 * (4 / 2 + 4 / 2.5 + math.log(2 * 2.5)) - math.log(2 * math.pi)
    )
    s = model.smooth(torch.tensor([[2.0], [3.0]]))
    assert s.means.flatten().tolist() == pytest.approx([1 + (0.5 / 1.5) * 1.2, 2.2])
    assert s.lag_one.item() == pytest.approx(0.5 / 1.5 * 0.6)


BAD = [
    ({"A": [[1.0, 2.0]]}, r"A must have shape \(d, d\), got \(1, 2\)"),
    ({"C": [[1.0]]}, r"C must have shape \(p, 2\), got \(1, 1\)"),
    ({"m0": [0.0]}, r"m0 must have shape \(2,\)"),
    ({"Q": [[1.0]]}, r"Q must have shape \(2, 2\), got \(1, 1\)"),
    ({"Q": [[1.0, 2.0], [2.0, 1.0]]}, "Q must be symmetric and positive semidefinite"),
    ({"R": [[1.0, 0.5, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]]}, "R must be symmetric"),
    ({"P0": [[1.0, math.nan], [0.0, 1.0]]}, "P0 must be finite numbers"),
]


@pytest.mark.parametrize(("change", "message"), BAD)
def test_bad_models_are_refused(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LinearGaussian(**{**PARAMETERS, **change})


def test_bad_observations_are_refused() -> None:
    y = gaps()
    for bad, message in (
        (y[0, 0], r"y must have shape \(\*batch, T, 3\)"),
        (y[..., :2], r"y must have shape \(\*batch, T, 3\)"),
        (y[:, :0], "T > 0"),
        (torch.full((2, 3), math.inf), "y must be finite, or NaN"),
    ):
        for method in (MODEL.filter, MODEL.smooth, MODEL.score, MODEL.log_likelihood):
            with pytest.raises(ValueError, match=message):
                method(bad)
    with pytest.raises(TypeError, match="y must be a floating-point tensor"):
        MODEL.filter(torch.zeros(2, 3, dtype=torch.int64))
    with pytest.raises(ValueError, match="y must have rows that are there or NaN throughout"):
        MODEL.score(y)
    certain = LinearGaussian(A, C, Q, [[0.0] * 3] * 3, M0, P0)  # three numbers of two states, without noise
    with pytest.raises(ValueError, match="y has no density under the model"):
        certain.filter(y[:1])
    with pytest.raises(ValueError, match="T must be at least 1"):
        MODEL.simulate(0)
