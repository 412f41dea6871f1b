"""Measured orders of convergence, reversibility, symplecticity, and the law of the stochastic step."""

import itertools
import math

import pytest
import torch

from polyak.core import integrators as it

DOUBLE = torch.float64


def follow(step, n, span=1.0):
    """x' = x cos t + t, from x(0) = (1, -0.5), with n steps."""
    x, dt = torch.tensor([1.0, -0.5], dtype=DOUBLE), span / n
    for k in range(n):
        x = step(lambda x, t: x * math.cos(t) + t, x, k * dt, dt)
    return x


@pytest.mark.parametrize(("step", "order"), [(it.euler, 1), (it.heun, 2), (it.midpoint, 2), (it.rk4, 4)])
def test_orders(step, order):
    truth = follow(it.rk4, 4096)
    errors = [float((follow(step, n) - truth).norm()) for n in (16, 32, 64, 128)]
    slopes = [math.log2(a / b) for a, b in itertools.pairwise(errors)]
    assert slopes[-1] == pytest.approx(order, abs=0.1)
    assert errors[-1] < errors[0]


@pytest.mark.parametrize(("step", "degree"), [(it.euler, 0), (it.heun, 1), (it.midpoint, 1), (it.rk4, 3)])
@pytest.mark.parametrize("dt", [0.3, -0.3])
def test_polynomials_in_time_are_integrated_exactly_up_to_the_order(step, degree, dt):
    t = 0.7
    for k in range(degree + 1):
        x = step(lambda x, s, k=k: torch.ones_like(x) * s**k, torch.zeros(1, dtype=DOUBLE), t, dt)
        assert float(x) == pytest.approx(((t + dt) ** (k + 1) - t ** (k + 1)) / (k + 1), rel=1e-13)
    k = degree + 1
    x = step(lambda x, s: torch.ones_like(x) * s**k, torch.zeros(1, dtype=DOUBLE), t, dt)
    assert float(x) != pytest.approx(((t + dt) ** (k + 1) - t ** (k + 1)) / (k + 1), rel=1e-9)


@pytest.mark.parametrize(("step", "count"), [(it.euler, 1), (it.heun, 2), (it.midpoint, 2), (it.rk4, 4)])
def test_costs(step, count):
    calls = []
    x = torch.ones(2)
    step(lambda x, t: calls.append(t) or x, x, 0.0, 0.1)
    assert len(calls) == count
    assert x.tolist() == [1, 1]


def test_time_steps_that_broadcast():
    x = torch.ones(3, 2, dtype=DOUBLE)
    dt = torch.tensor([[0.1], [0.2], [0.3]], dtype=DOUBLE)
    for step in (it.euler, it.heun, it.midpoint, it.rk4):
        together = step(lambda x, t: -x * (1 + t), x, torch.zeros(3, 1, dtype=DOUBLE), dt)
        for i in range(3):
            alone = step(lambda x, t: -x * (1 + t), x[i], 0.0, float(dt[i]))
            torch.testing.assert_close(together[i], alone, atol=1e-15, rtol=0)


def pendulum(q):
    return -torch.sin(q)


def swing(n, span):
    q, p = torch.tensor([1.0], dtype=DOUBLE), torch.tensor([0.3], dtype=DOUBLE)
    for _ in range(n):
        q, p = it.leapfrog(pendulum, q, p, span / n)
    return torch.cat([q, p])


def test_leapfrog_order():
    truth = swing(20_000, 2.0)
    errors = [float((swing(n, 2.0) - truth).norm()) for n in (50, 100, 200)]
    assert math.log2(errors[1] / errors[2]) == pytest.approx(2, abs=0.05)


def test_leapfrog_is_reversible():
    start = q, p = torch.tensor([1.0, -2.0], dtype=DOUBLE), torch.tensor([0.3, 0.9], dtype=DOUBLE)
    for _ in range(100):
        q, p = it.leapfrog(pendulum, q, p, 0.1)
    assert float((q - start[0]).abs().max()) > 0.1
    back, reversed_p = q, -p
    for _ in range(100):
        back, reversed_p = it.leapfrog(pendulum, back, reversed_p, 0.1)
    torch.testing.assert_close((back, -reversed_p), start, atol=1e-12, rtol=0)
    for _ in range(100):
        q, p = it.leapfrog(pendulum, q, p, -0.1)
    torch.testing.assert_close((q, p), start, atol=1e-12, rtol=0)


def test_leapfrog_is_symplectic_and_others_are_not():
    z = torch.tensor([0.7, -0.4, 1.1, 0.2], dtype=DOUBLE)  # two coupled degrees of freedom
    j = torch.zeros(4, 4, dtype=DOUBLE)
    j[:2, 2:], j[2:, :2] = torch.eye(2, dtype=DOUBLE), -torch.eye(2, dtype=DOUBLE)

    def force(q):
        return -torch.sin(q) - 0.3 * (q - q.flip(0))

    def drift_kick(z):
        return torch.cat(it.leapfrog(force, z[:2], z[2:], 0.5))

    def runge_kutta(z):
        return it.rk4(lambda z, t: torch.cat([z[2:], force(z[:2])]), z, 0.0, 0.5)

    def defect(step):
        jacobian = torch.autograd.functional.jacobian(step, z)
        return float((jacobian.T @ j @ jacobian - j).abs().max())

    assert defect(drift_kick) < 1e-13
    assert defect(runge_kutta) > 1e-6


def test_leapfrog_keeps_energy():
    q, p = torch.tensor([1.0], dtype=DOUBLE), torch.tensor([0.0], dtype=DOUBLE)
    energies = []
    for _ in range(20_000):
        q, p = it.leapfrog(pendulum, q, p, 0.2)
        energies.append(float(p**2 / 2 - torch.cos(q)))
    # Bounded by O(dt^2) forever, no drift: the mean of the last tenth is that of the first.
    assert max(energies) - min(energies) < 0.2**2 / 4
    assert abs(sum(energies[:2000]) - sum(energies[-2000:])) / 2000 < 1e-3


@pytest.mark.parametrize("dt", [0.25, -0.25, torch.tensor(0.25)])
def test_euler_maruyama_is_its_equation(dt):
    x = torch.tensor([1.0, 2.0], dtype=DOUBLE)
    z = torch.tensor([1.0, -1.0], dtype=DOUBLE)
    result = it.euler_maruyama(lambda x, t: -x * t, lambda x, t: 2 * x, x, 3.0, dt, noise=z)
    torch.testing.assert_close(result, x - 3 * x * float(dt) + 2 * x * 0.5 * z, atol=1e-15, rtol=0)


def test_euler_maruyama_draws():
    x = torch.zeros(100_000)
    results = [
        it.euler_maruyama(
            lambda x, t: 1.0, lambda x, t: 3.0, x, 0.0, -0.04, generator=torch.Generator().manual_seed(seed)
        )
        for seed in (0, 0, 1)
    ]
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])
    # mean -0.04, standard deviation 3 sqrt(0.04) = 0.6; six standard errors
    assert abs(float(results[0].mean()) + 0.04) < 6 * 0.6 / math.sqrt(1e5)
    assert abs(float(results[0].std()) - 0.6) < 6 * 0.6 / math.sqrt(2e5)
    assert results[0].dtype == torch.float32


def test_euler_maruyama_without_noise_is_euler():
    x = torch.ones(3, dtype=DOUBLE)
    quiet = it.euler_maruyama(lambda x, t: -x, lambda x, t: torch.zeros_like(x), x, 0.0, 0.1)
    assert torch.equal(quiet, it.euler(lambda x, t: -x, x, 0.0, 0.1))


def test_strong_order_of_euler_maruyama():
    """Geometric Brownian motion: the error against the exact path, with the same noise, falls as sqrt(dt)."""
    generator = torch.Generator().manual_seed(0)
    fine = torch.randn(256, 4000, generator=generator, dtype=DOUBLE)
    errors = []
    for n in (16, 64, 256):
        noise = fine.reshape(n, 256 // n, -1).sum(1) / math.sqrt(256 // n)
        x = torch.ones(4000, dtype=DOUBLE)
        for k in range(n):
            x = it.euler_maruyama(lambda x, t: 0.5 * x, lambda x, t: x, x, k / n, 1 / n, noise=noise[k])
        exact = torch.exp(fine.sum(0) / 16)  # (mu - sigma^2 / 2) = 0
        errors.append(float((x - exact).abs().mean()))
    assert math.log(errors[0] / errors[2], 16) == pytest.approx(0.5, abs=0.1)


def oscillator(x, t):
    return torch.stack([x[1], -x[0]])


@pytest.mark.parametrize("ends", [(0.0, 3.0), (3.0, -1.0)])
def test_dopri5_keeps_its_tolerance_also_between_steps_and_backwards(ends):
    times = torch.linspace(*ends, 40, dtype=DOUBLE)
    turned = times - times[0]
    exact = torch.stack([turned.cos(), -turned.sin()], 1)
    for tol in (1e-4, 1e-7, 1e-10):
        x = it.dopri5(oscillator, torch.tensor([1.0, 0.0], dtype=DOUBLE), times, rtol=tol, atol=tol)
        assert x.shape == (40, 2)
        assert 1e-3 * tol < float((x - exact).abs().max()) < 20 * tol
        alone = it.dopri5(oscillator, torch.tensor([1.0, 0.0], dtype=DOUBLE), ends, rtol=tol, atol=tol)
        assert torch.equal(alone[-1], x[-1])  # times between cost no step


def test_dopri5_is_scipys_method_step_by_step():
    from scipy.integrate import RK45

    ours, theirs = [], []
    x = torch.tensor([1.0, -0.5], dtype=DOUBLE)
    step = it.runge_kutta(it.DOPRI5, lambda x, t: x * math.cos(t) + t, x, 0.3, 0.2)
    peer = RK45(lambda t, x: x * math.cos(t) + t, 0.3, x.numpy(), 0.5, first_step=0.2, rtol=10.0, atol=10.0)
    peer.step()
    torch.testing.assert_close(step, torch.tensor(peer.y), rtol=0, atol=1e-15)
    between = peer.dense_output()
    for u in (0.1, 0.5, 0.9):
        slopes = [peer.K[i] for i in range(7)]
        ours.append(it._between(x, 0.2, [torch.tensor(k) for k in slopes], u))
        theirs.append(torch.tensor(between(0.3 + 0.2 * u)))
    torch.testing.assert_close(torch.stack(ours), torch.stack(theirs), rtol=0, atol=1e-14)


def test_dopri5_has_order_five_and_six_evaluations_a_step():
    truth = follow(it.rk4, 4096)
    errors = [float((follow(lambda *a: it.runge_kutta(it.DOPRI5, *a), n) - truth).norm()) for n in (4, 8, 16)]
    assert [math.log2(a / b) for a, b in itertools.pairwise(errors)][-1] == pytest.approx(5, abs=0.3)
    calls = []
    it.dopri5(lambda x, t: calls.append(t) or -x, torch.ones(1, dtype=DOUBLE), (0.0, 2.0))
    assert (len(calls) - 2) % 6 == 0
    assert len(calls) < 60


def test_dopri5_of_what_it_cannot_solve():
    one = torch.ones(1)
    with pytest.raises(ValueError, match=r"rtol must be at least 1.2e-05 in torch.float32, .* got 1e-06"):
        it.dopri5(lambda x, t: -x, one, (0.0, 1.0), rtol=1e-6)
    with pytest.raises(ValueError, match="times must increase, or decrease"):
        it.dopri5(lambda x, t: -x, one, (0.0, 1.0, 1.0))
    with pytest.raises(ValueError, match="x must be finite, got"):
        it.dopri5(lambda x, t: -x, one / 0, (0.0, 1.0))
    with pytest.raises(RuntimeError, match=r"at t=0 of 1: no progress"):
        it.dopri5(lambda x, t: x * math.nan, one, (0.0, 1.0))
    with pytest.raises(RuntimeError, match=r"at t=1\.00001 of 2: no progress"):
        it.dopri5(lambda x, t: x * x, one.double(), (0.0, 2.0))  # 1 / (1 - t)
    with pytest.raises(RuntimeError, match="max_steps=3 are spent"):
        it.dopri5(lambda x, t: (300 * t + x).cos() * 300, one, (0.0, 1.0), max_steps=3)
    assert it.dopri5(lambda x, t: x, torch.ones(0, 2), (0.0, 0.5, 1.0)).shape == (3, 0, 2)
    assert it.dopri5(lambda x, t: 0 * x, one, (0.0, 1.0)).tolist() == [[1.0], [1.0]]
