"""Solving stochastic interpolants: marginals, orders, what goes forward and back, and likelihoods."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from polyak.core.exact import Gaussian, Mixture
from polyak.generate.interpolants import (
    Fields,
    GaussianMixtureInterpolant,
    Interpolant,
    integrate,
    log_likelihood,
    optimal_eps,
)

NARROW, WIDE = Gaussian([0.0], 0.25), Gaussian([0.0], 2.0)
TWO, THREE = Mixture([[-1.5], [1.5]], 0.3), Mixture([[-2.0], [0.5], [2.5]], [0.2, 0.3, 0.1], [0.3, 0.5, 0.2])
BRIDGE = GaussianMixtureInterpolant(TWO, THREE)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class Watched(Fields):
    """Exact fields, and what was asked of them."""

    def __init__(self, exact: GaussianMixtureInterpolant) -> None:
        self.__dict__.update(exact.__dict__)
        self.exact, self.asked = exact, []

    def _both(self, x: Any, t: Any, *, score: bool) -> Any:
        self.asked.append((t, x))
        return self.exact._both(x, t, score=score)

    def s(self, x: Any, t: Any) -> Any:
        return self.exact.s(x, t)


# --------------------------------------------------------------------------------------------------------------- marginals


@pytest.mark.parametrize(
    ("eps", "method", "direction"),
    [
        (0.0, "euler", "forward"),
        (0.5, "euler", "forward"),
        (0.5, "heun", "forward"),
        (2.0, "euler", "forward"),
        (2.0, "euler", "backward"),
        (0.5, "heun", "backward"),
    ],
)
def test_the_law_on_the_way_is_that_of_the_interpolant(eps: float, method: str, direction: str) -> None:
    n, fields = 4000, Watched(BRIDGE)
    x0, x1 = TWO.sample(n, generator=seeded(1)), THREE.sample(n, generator=seeded(2))
    start, goal = (x0, x1) if direction == "forward" else (x1, x0)
    end = integrate(fields, start, eps, 80, method, direction, generator=seeded(3))
    times = [t for t, _ in fields.asked]
    for t in (0.25, 0.5, 0.75):
        at = min(range(len(times)), key=lambda i: abs(times[i] - t))
        want = BRIDGE.interpolant.sample(times[at], x0, x1, generator=seeded(4))[0]
        same_law(fields.asked[at][1], want)
    same_law(end, goal)


def same_law(x: torch.Tensor, want: torch.Tensor) -> None:
    """Four moments, to five standard errors and 80 steps of first order."""
    for power in (1, 2, 3, 4):
        a, b = x**power, want**power
        error = ((a.var() + b.var()) / len(x)).sqrt()
        assert abs(a.mean() - b.mean()) < 5 * error + 0.04 * b.abs().mean()


def test_quantiles_are_carried_to_quantiles() -> None:
    levels = torch.linspace(0.02, 0.98, 9, dtype=torch.float64)
    start, end = quantiles(TWO, levels), quantiles(THREE, levels)
    for path in (Interpolant(), Interpolant("trig", "bsquared"), Interpolant("linear", "zero")):
        fields = GaussianMixtureInterpolant(TWO, THREE, path)
        got = integrate(fields, start, steps=50, method="rk4", t0=0.0)
        assert (got - end).abs().max() < 1e-5
    back = integrate(fields, got, steps=50, method="rk4", t0=0.0, direction="backward")
    assert (back - start).abs().max() < 1e-5


def quantiles(law: Mixture, levels: torch.Tensor) -> torch.Tensor:
    low, high = torch.full_like(levels, -9.0), torch.full_like(levels, 9.0)
    for _ in range(60):
        middle = (low + high) / 2
        share = torch.special.ndtr((middle[:, None] - law.means[:, 0]) / law.variances[:, 0].sqrt()) @ law.weights
        low, high = torch.where(share < levels, middle, low), torch.where(share < levels, high, middle)
    return ((low + high) / 2)[:, None]


# ------------------------------------------------------------------------------------------------------------------ orders


@pytest.mark.parametrize(("method", "order"), [("euler", 1), ("heun", 2), ("rk4", 4)])
def test_the_order_of_the_ode_inside(method: str, order: int) -> None:
    x = torch.tensor([[-2.0], [-0.3], [1.0]], dtype=torch.float64)
    exact = integrate(BRIDGE, x, steps=100 if order < 4 else 160, method="rk4", t0=0.1)
    coarse, fine = ((integrate(BRIDGE, x, steps=n, method=method, t0=0.1) - exact).norm() for n in (24, 48))
    assert math.log2(coarse / fine) == pytest.approx(order, abs=0.2)


class Scripted:
    """Noise that is 1 in one step of one row: with a linear drift it shows what each step adds to the variance."""

    def __init__(self) -> None:
        self.step = 0

    def __call__(self, shape: Any, **how: Any) -> torch.Tensor:
        self.step += 1
        return torch.nn.functional.one_hot(torch.tensor(self.step), shape[0])[:, None].double()


@pytest.mark.parametrize("eps", [0.5, 2.0, lambda t: 1 + t], ids=["0.5", "2", "1+t"])
@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("method", ["euler", "heun"])
def test_the_weak_order_of_the_sde(monkeypatch: pytest.MonkeyPatch, eps: Any, method: str, direction: str) -> None:
    """The variance of the discrete chain, without a sample, tends to that of the bridge with order 1."""
    fields = GaussianMixtureInterpolant(NARROW, WIDE)
    path, t0 = fields.interpolant, 0.1
    ends = [path.a(t) ** 2 * 0.25 + path.b(t) ** 2 * 2 + path.gamma(t) ** 2 for t in (t0, 1 - t0)]
    start, goal = ends if direction == "forward" else ends[::-1]
    errors = []
    for steps in (60, 120):
        x = torch.zeros(steps + 1, 1, dtype=torch.float64)
        x[0] = start**0.5
        with monkeypatch.context() as patch:
            patch.setattr(torch, "randn", Scripted())
            errors.append(abs(integrate(fields, x, eps, steps, method, direction, t0).square().sum().item() - goal))
    assert math.log2(errors[0] / errors[1]) > 0.85
    assert errors[1] < 0.06 * goal


def test_noise_first_heun_looks_at_the_end_of_the_step() -> None:
    fields = Watched(BRIDGE)
    integrate(fields, torch.zeros(3, 1), 1.0, 4, "heun", t0=0.1, generator=seeded())
    assert [t for t, _ in fields.asked] == pytest.approx([0.3, 0.3, 0.5, 0.5, 0.7, 0.7, 0.9, 0.9])


@pytest.mark.parametrize("steps", [1, 2, 3, 6, 7, 200])
def test_steps_are_equal_from_t0_and_an_even_number_meets_the_middle(steps: int) -> None:
    fields = Watched(BRIDGE)
    integrate(fields, torch.zeros(1, 1), steps=steps, method="euler", t0=1e-3)
    forward = [t for t, _ in fields.asked]
    assert forward == pytest.approx(np.linspace(1e-3, 1 - 1e-3, steps + 1)[:-1], abs=1e-15)
    fields.asked.clear()
    integrate(fields, torch.zeros(1, 1), steps=steps, method="euler", t0=1e-3, direction="backward")
    assert [t for t, _ in fields.asked] == pytest.approx(np.linspace(1 - 1e-3, 1e-3, steps + 1)[:-1], abs=1e-15)
    assert steps % 2 or 0.5 in forward


# ------------------------------------------------------------------------------------------------------------- trajectories


def test_a_golden_trajectory() -> None:
    """By NumPy, from the equations: N(1, 1/4) to N(-1, 2), linear, brownian, eps = 1/2, noise first."""
    fields = GaussianMixtureInterpolant(Gaussian([1.0], 0.25), Gaussian([-1.0], 2.0))
    got = integrate(
        fields, torch.tensor([[0.3], [1.8]], dtype=torch.float64), 0.5, 6, "heun", t0=0.05, generator=seeded(9)
    )
    draw, x, h, eps = seeded(9), np.array([[0.3], [1.8]]), 0.9 / 6, 0.5

    def drift(x: np.ndarray, t: float) -> np.ndarray:
        off = x - (1 - 2 * t)
        spread = (1 - t) ** 2 / 4 + 2 * t**2 + t * (1 - t)
        turn = -(1 - t) / 4 + 2 * t + (1 - 2 * t) / 2
        return -2 + (turn - eps) * off / spread

    for i in range(6):
        t = 0.05 + (i + 1) * h
        x = x + math.sqrt(2 * eps * h) * torch.randn(2, 1, dtype=torch.float64, generator=draw).numpy()
        k1 = drift(x, t)
        x = x + h * (k1 + drift(x + h * k1, t)) / 2
    assert np.allclose(got.numpy(), x, rtol=1e-12)
    assert np.allclose(got.numpy(), GOLDEN, rtol=1e-9)


GOLDEN = [[-0.8965907249], [2.3818132426]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("eps", "method"), [(0.0, "rk4"), (0.7, "heun"), (0.7, "euler")])
def test_the_result_follows_the_start(dtype: torch.dtype, eps: float, method: str) -> None:
    told = []

    def net(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        told.append((x.dtype, t.dtype, tuple(t.shape)))
        return -x

    fields = Fields(Interpolant(), b=net, s=net)
    x = torch.linspace(-1, 1, 12).reshape(3, 1, 2, 2).to(dtype)
    before = x.clone()
    got = [integrate(fields, x, eps, 20, method, generator=seeded(), finish=True) for _ in range(2)]
    assert torch.equal(x, before)
    assert torch.equal(*got)
    assert (got[0].dtype, got[0].shape) == (dtype, x.shape)
    assert set(told) == {(dtype, dtype, (3,))}
    assert integrate(fields, x[:0], eps, 3, method, generator=seeded()).shape == (0, 1, 2, 2)


def test_a_state_that_is_not_finite_is_refused_with_its_step_and_time() -> None:
    def net(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return torch.where(t[:, None] > 0.6, math.nan, -x)

    fields, x = Fields(Interpolant(), b=net, s=lambda x, t: -x), torch.ones(3, 1)
    for eps, method, step in ((0.0, "euler", 5), (0.0, "rk4", 4), (0.5, "euler", 5), (0.5, "heun", 4)):
        with pytest.raises(ValueError, match=rf"the state is not finite after step {step}, at t=0\.[79]99"):
            integrate(fields, x, eps, 5, method, generator=seeded())
    for eps in (0.0, 0.5):
        with pytest.raises(ValueError, match=r"the state is not finite after step 1, at t=0\.7994"):
            log_likelihood(fields, x, NARROW.log_prob, eps=eps, steps=5, generator=seeded())


@pytest.mark.parametrize(("dtype", "slack"), [(torch.bfloat16, 0.06), (torch.float16, 0.01)])
@pytest.mark.parametrize("eps", [0.0, 0.5])
def test_the_likelihood_of_points_in_half_precision_is_solved_in_single(dtype: Any, slack: float, eps: float) -> None:
    told = set()

    def net(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        told.add((x.dtype, t.dtype))
        return -0.7 * x

    x = torch.linspace(-2, 2, 40).reshape(4, 10)
    normal = Gaussian(torch.zeros(10))
    how: dict[str, Any] = dict(eps=eps, steps=24, method="euler")
    got, want = (
        log_likelihood(Fields(Interpolant(), b=net, s=net), y, normal.log_prob, generator=seeded(), **how)
        for y in (x.to(dtype), x.to(dtype).float())
    )
    assert got.dtype == torch.float32
    assert (dtype, dtype) in told
    assert (got - want).abs().max() < slack


def test_it_may_end_in_the_posterior_mean() -> None:
    x = TWO.sample(50, generator=seeded())
    for direction, mean, t in (("forward", BRIDGE.x1, 0.95), ("backward", BRIDGE.x0, 0.05)):
        plain, finished = (
            integrate(BRIDGE, x, 0.3, 40, "euler", direction, 0.05, seeded(1), finish=finish)
            for finish in (False, True)
        )
        assert torch.equal(finished, mean(plain, t))


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"eps": -0.1}, ValueError, "eps must be >= 0"),
        ({"eps": lambda t: -1.0}, ValueError, r"eps\(0.001\) must be >= 0"),
        ({"eps": 1.0, "method": "rk4"}, ValueError, "method must be 'euler' or 'heun' for eps > 0"),
        ({"method": "huen"}, ValueError, "did you mean 'heun'"),
        ({"direction": "up"}, ValueError, "direction must be one of"),
        ({"steps": 0}, ValueError, "steps must be at least 1"),
        ({"t0": 0.5}, ValueError, "t0 must be in"),
        ({"t0": -0.1}, ValueError, "t0 must be in"),
        ({"x0": torch.zeros(2, 1).long()}, ValueError, "x0 must be a floating-point tensor"),
        ({"generator": [seeded()], "eps": 1.0}, ValueError, "generator must be one, or one for each of the 2 rows"),
        (
            {"fields": GaussianMixtureInterpolant(NARROW, Gaussian([0.0], 0.0)), "t0": 0.0, "direction": "backward"},
            ValueError,
            "t must be where rho_t has a density",
        ),
        ({"fields": 3}, TypeError, "fields must be a Fields"),
        ({"fields": Fields(Interpolant(), v=lambda x, t: x, eta=lambda x, t: x), "t0": 0.0}, ValueError, "use t0 > 0"),
        ({"fields": Fields(Interpolant(), b=lambda x, t: x), "eps": 1.0}, ValueError, "s or eta must be given"),
    ],
)
def test_what_cannot_be_solved_is_refused(given: dict[str, Any], error: type, message: str) -> None:
    call = {"fields": BRIDGE, "x0": torch.zeros(2, 1), "steps": 2, **given}
    with pytest.raises(error, match=message):
        integrate(**call)


def test_equations_are_callable_as_torchdiffeq_and_torchsde_do() -> None:
    x, t = TWO.sample(4, generator=seeded()), torch.tensor(0.4, dtype=torch.float64)
    ode, sde = BRIDGE.equation(), BRIDGE.equation(1.5)
    assert torch.equal(ode(t, x), BRIDGE.b(x, 0.4))
    assert torch.allclose(sde.f(t, x), BRIDGE.b(x, 0.4) + 1.5 * BRIDGE.s(x, 0.4))
    assert torch.equal(sde.g(t, x), torch.full_like(x, 3.0**0.5))
    assert (sde.noise_type, sde.sde_type) == ("diagonal", "ito")
    with pytest.raises(ValueError, match="eps must be >= 0"):
        BRIDGE.equation(-1.0)


# -------------------------------------------------------------------------------------------------------------- likelihoods

FLAT0 = Gaussian([0.5, -0.5], [[1.0, 0.3], [0.3, 0.5]])
FLAT1 = Gaussian([-1.0, 0.0], [[0.4, -0.1], [-0.1, 0.8]])
POINTS = FLAT1.sample(6, generator=seeded(5))


def test_the_likelihood_of_the_ode_is_the_closed_form() -> None:
    fields, want = GaussianMixtureInterpolant(FLAT0, FLAT1), FLAT1.log_prob(POINTS)
    got = log_likelihood(fields, POINTS, FLAT0.log_prob, steps=60, method="rk4", t0=0.0)
    assert torch.allclose(got, want, atol=1e-6)
    # Linear fields: the expected estimate is the divergence itself, whose off-diagonal part has mean 0.
    rows = POINTS[:1].repeat(2000, 1)
    guess = log_likelihood(fields, rows, FLAT0.log_prob, steps=20, t0=0.0, probes=1, generator=seeded())
    assert abs(guess.mean() - want[0]) < 5 * guess.std() / 2000**0.5 + 0.01
    assert guess.std() > 1e-3


def test_the_likelihood_of_the_sde_is_the_closed_form_on_average() -> None:
    fields, rows = GaussianMixtureInterpolant(FLAT0, FLAT1), POINTS[:2].repeat_interleave(600, 0)
    for eps in (0.5, lambda t: 0.2 + t):
        got = log_likelihood(fields, rows, FLAT0.log_prob, eps=eps, steps=60, generator=seeded()).reshape(2, 600)
        off = got.mean(1) - FLAT1.log_prob(POINTS[:2])
        assert (off.abs() < 5 * got.std(1) / 600**0.5 + 0.03).all()
        assert (5 * got.std(1) / 600**0.5 < 0.5).all()
    how: dict[str, Any] = {"eps": 0.5, "steps": 2, "probes": 2}
    one = log_likelihood(fields, POINTS, FLAT0.log_prob, samples=3, generator=seeded(), **how)
    each = log_likelihood(fields, POINTS.repeat_interleave(3, 0), FLAT0.log_prob, generator=seeded(), **how)
    assert torch.allclose(one, each.reshape(6, 3).mean(1))


def test_one_sided_likelihood_has_a_normal_source_and_many_dimensions_are_estimated() -> None:
    law = Gaussian(torch.zeros(24), 0.5)
    fields, x = GaussianMixtureInterpolant(None, law, Interpolant("onesided_linear")), law.sample(3, generator=seeded())
    # An isotropic field's divergence is the same for every choice of signs.
    got = log_likelihood(fields, x, steps=60, method="rk4", t0=0.0, generator=seeded())
    assert torch.allclose(got, law.log_prob(x), atol=1e-5)
    for size in (20, 21):
        mixing = torch.randn(size, size, dtype=torch.float64, generator=seeded()) / 20
        mixed = Fields(Interpolant("onesided_linear"), b=lambda x, t, mixing=mixing: x @ mixing)
        y = torch.zeros(1, size, dtype=torch.float64)
        one, two = (log_likelihood(mixed, y, steps=1, generator=seeded(seed)) for seed in (0, 1))
        assert bool(torch.equal(one, two)) == (size == 20)
    still = Fields(Interpolant("onesided_linear"), b=lambda x, t: torch.zeros_like(x))
    image = torch.randn(2, 1, 5, 5, dtype=torch.float64, generator=seeded())
    want = -image.flatten(1).square().sum(1) / 2 - 12.5 * math.log(2 * math.pi)
    assert torch.allclose(log_likelihood(still, image, steps=2), want)
    with pytest.raises(ValueError, match="log_prob0 must be given"):
        log_likelihood(BRIDGE, torch.zeros(2, 1, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"log_prob0 must return shape \(2,\)"):
        log_likelihood(BRIDGE, torch.zeros(2, 1, dtype=torch.float64), lambda x: x, steps=2)


def test_the_kl_of_the_sde_is_within_the_bound_of_the_losses_and_not_within_half_of_it(monkeypatch: Any) -> None:
    """N(0, 1) to itself with b = 0: fields that are off by d and d / eps move the mean alone, so that KL is known."""
    exact, delta, eps = GaussianMixtureInterpolant(Gaussian([0.0]), Gaussian([0.0]), Interpolant("trig")), 0.5, 1.25
    assert exact.b(torch.ones(1, 1), 0.3).abs().max() < 1e-12
    off = Fields(exact.interpolant, b=lambda x, t: exact.b(x, t) + delta, s=lambda x, t: exact.s(x, t) + delta / eps)
    monkeypatch.setattr(torch, "randn", lambda shape, **how: torch.zeros(shape, dtype=how["dtype"]))
    mean = integrate(off, torch.zeros(1, 1, dtype=torch.float64), eps, 100, "heun", t0=0.0).item()
    assert mean == pytest.approx(2 * delta * (1 - math.exp(-eps)) / eps, rel=2e-2)
    excess_b, excess_s = delta**2 / 2, (delta / eps) ** 2 / 2
    bound = excess_b / eps + eps * excess_s
    assert bound / 2 < mean**2 / 2 <= bound
    assert optimal_eps(excess_b, excess_s) == pytest.approx(eps)
    for wrong in ((-1.0, 1.0), (1.0, 0.0)):
        with pytest.raises(ValueError, match=r"excess_[bs] must be"):
            optimal_eps(*wrong)
