"""HB, GHVB and Nesterov against their recurrences (written here again, in plain numbers), their orders and their stability."""

from __future__ import annotations

import dataclasses
import itertools
import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from generate_cases import every_process, exact, noise

from polyak.generate import (
    GHVB,
    VP,
    Change,
    Denoiser,
    DPMSolverMultistep,
    Flow,
    HeavyBall,
    HeavyBallDPM,
    LinearSolver,
    Nesterov,
    Prediction,
    Process,
    Stage,
    ab_coefficients,
    artifact_score,
    check_solver,
    drive,
    invert,
    sample,
    stability_limit,
    stability_region,
)
from polyak.generate.problems import path_rmse, reference

METHODS: dict[str, Any] = {"hb": HeavyBall, "ghvb": GHVB, "nt": Nesterov}
BETAS = (1.0, 0.8, 0.3)
every_method = pytest.mark.parametrize("method", METHODS)

# --- the recurrences, in plain numbers

CLASSICAL = {1: [1], 2: [3, -1], 3: [23, -16, 5], 4: [55, -59, 37, -9], 5: [1901, -2774, 2616, -1274, 251]}
MIXED = {
    1: lambda b: [1],
    2: lambda b: [(2 + b) / (2 * b), -(2 - b) / (2 * b)],
    3: lambda b: [(18 + 5 * b) / (12 * b), -(24 - 8 * b) / (12 * b), (6 - b) / (12 * b)],
    4: lambda b: [c / (24 * b) for c in (46 + 9 * b, -(78 - 19 * b), 42 - 5 * b, -(10 - b))],
    5: lambda b: [
        c / (720 * b) for c in (1650 + 251 * b, -(3420 - 646 * b), 2880 - 264 * b, -(1380 - 106 * b), 270 - 19 * b)
    ],
}


def mix(values: list[float], k: int, b: float) -> float:
    """M_k, newest first."""
    count = min(k, len(values))
    return sum(c * v for c, v in zip(MIXED[count](b), values, strict=False))


def velocities(method: Any, k: int, beta: float):
    """A function from g_n to what is stepped by, with its memory."""
    past: list[float] = []
    v = None

    def step(g: float) -> float:
        nonlocal v
        v = g if v is None else v  # v_(-1) = g_0
        if method == "ghvb":
            v = (1 - beta) * v + beta * g
            past.insert(0, v)
            return mix(past, k, beta)
        past.insert(0, g)
        p = mix(past, k, 1.0)
        v = (1 - beta) * v + beta * p
        return v if method == "hb" else (1 - beta) * v + beta * p

    return step


def alpha(t: float) -> float:
    return math.exp(-19.9 * t * t / 4 - 0.05 * t)


def eps_of(x: float, t: float) -> float:
    """The noise in x at t for the mixture 0.4 N(-1, 0.25) + 0.6 N(0.6, 0.09) under VP(0.1, 20)."""
    a = alpha(t)
    s = math.sqrt(1 - a * a)
    parts = [(0.4, -1.0, 0.25), (0.6, 0.6, 0.09)]
    total = [(w, m, v, a * a * v + s * s) for w, m, v in parts]
    weights = [w * math.exp(-((x - a * m) ** 2) / 2 / c) / math.sqrt(c) for w, m, _, c in total]
    means = [m + a * v / c * (x - a * m) for _, m, v, c in total]
    return (x - a * sum(w * m for w, m in zip(weights, means, strict=True)) / sum(weights)) / s


def golden(method: Any, k: int, beta: float, x: float, times: list[float]) -> float:
    step = velocities(method, k, beta)
    level = lambda t: math.sqrt(1 / alpha(t) ** 2 - 1)  # noqa: E731
    y = x / alpha(times[0])
    for s, t in itertools.pairwise(times):
        y += (level(t) - level(s)) * step(eps_of(y * alpha(s), s))
    return y * alpha(times[-1])


STARTS = [-1.5, 0.1, 0.8]
TIMES = [1.0, 0.85, 0.7, 0.5, 0.35, 0.2, 0.1, 0.03, 0.001]


@every_method
@pytest.mark.parametrize("k", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("beta", BETAS)
def test_golden(method: Any, k: int, beta: float) -> None:
    x = torch.tensor(STARTS, dtype=torch.float64)[:, None]
    made = sample(exact(), x, solver=METHODS[method](k, beta), grid=TIMES)[:, 0].tolist()
    assert made == pytest.approx([golden(method, k, beta, x, TIMES) for x in STARTS], rel=1e-9, abs=1e-10)


def test_golden_numbers() -> None:
    """Pinned: what the code above gave."""
    x = torch.tensor(STARTS, dtype=torch.float64)[:, None]
    for method, want in PINNED.items():
        assert sample(exact(), x, solver=METHODS[method](4, 0.8), grid=TIMES)[:, 0].tolist() == pytest.approx(
            want, rel=1e-9
        )


PINNED: dict[str, list[float]] = {
    "hb": [-1.4142420540801994, 0.362642889020747, 0.6851807042707765],
    "ghvb": [-1.5029159339235467, 0.38624027869115335, 0.7194190453057324],
    "nt": [-1.4860870543350453, 0.3790640031811859, 0.7133714022677565],
}


def integral_weights(values: Any, length: int) -> np.ndarray:
    """For which the values of 1, u, u^2, ... sum to their means over [0, 1]."""
    return np.linalg.solve(np.array([values(m) for m in range(length)]), 1 / np.arange(1, length + 1))


def golden_on_actual_steps(method: Any, k: int, beta: float, runge_kutta: bool, x: float, times: list[float]) -> float:
    level = lambda t: math.sqrt(1 / alpha(t) ** 2 - 1)  # noqa: E731
    levels = [level(t) for t in times]
    y, g, v, averages = x / alpha(times[0]), [], None, []
    for i, t in enumerate(times[:-1]):
        here, delta = levels[i], levels[i + 1] - levels[i]
        g.insert(0, eps_of(y * alpha(t), t))
        q = min(i + 1, k)
        nodes = [(levels[j] - here) / delta for j in range(i + 1)]  # oldest first
        if method == "ghvb":
            averages.insert(0, g[0] if v is None else (1 - beta) * v + beta * g[0])
            v = averages[0]

            def averaged(m: int, nodes: list[float] = nodes, q: int = q) -> list[float]:
                made = [nodes[0] ** m]
                for node in nodes[1:]:
                    made.append((1 - beta) * made[-1] + beta * node**m)
                return made[::-1][:q]

            direction = integral_weights(averaged, q) @ averages[:q]
        else:
            p = integral_weights(lambda m, q=q, nodes=nodes: [u**m for u in nodes[::-1][:q]], q) @ g[:q]
            v = p if v is None else (1 - beta) * v + beta * p
            direction = v if method == "hb" else (1 - beta) * v + beta * p
        if runge_kutta and i < k - 1:
            middle = VP().t_of_lam(-math.log(here + delta / 2))
            two = eps_of((y + delta / 2 * g[0]) * alpha(middle), middle)
            three = eps_of((y + delta / 2 * two) * alpha(middle), middle)
            four = eps_of((y + delta * three) * alpha(times[i + 1]), times[i + 1])
            direction = (g[0] + 2 * two + 2 * three + four) / 6
        y += delta * direction
    return y * alpha(times[-1])


@every_method
@pytest.mark.parametrize("start", ["lower", "rk"])
@pytest.mark.parametrize(("k", "beta"), [(3, 0.7), (4, 0.3), (2, 1.0)])
def test_golden_on_actual_steps(method: Any, k: int, beta: float, start: Any) -> None:
    x = torch.tensor(STARTS, dtype=torch.float64)[:, None]
    made = sample(exact(), x, solver=METHODS[method](k, beta, "variable", start), grid=TIMES)[:, 0].tolist()
    want = [golden_on_actual_steps(method, k, beta, start == "rk", x, TIMES) for x in STARTS]
    assert made == pytest.approx(want, rel=1e-8, abs=1e-8)


# --- identities


@pytest.mark.parametrize("k", [1, 2, 3, 4, 5])
def test_without_momentum_all_are_adams_bashforth(k: int) -> None:
    ends = [sample(exact(), noise(), solver=m(k, 1.0), steps=9) for m in METHODS.values()]
    assert all(torch.allclose(end, ends[0], rtol=0, atol=1e-12) for end in ends)
    total = sum(CLASSICAL[k])
    assert ab_coefficients(k) == pytest.approx([c / total for c in CLASSICAL[k]], rel=1e-14)


@pytest.mark.parametrize("beta", BETAS)
def test_of_first_order_ghvb_is_hb(beta: float) -> None:
    ends = [sample(exact(), noise(), solver=m(1, beta), steps=9) for m in (GHVB, HeavyBall)]
    assert torch.allclose(*ends, rtol=0, atol=1e-12)


@pytest.mark.parametrize("k", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("beta", [Fraction(1), Fraction(4, 5), Fraction(1, 7)])
def test_the_weights_recover_the_order_from_averages(k: int, beta: Fraction) -> None:
    # For g = n^m the average over all steps before is a polynomial: v_n - (1 - beta) v_(n-1) = beta n^m.
    weights = ab_coefficients(k, float(beta))
    assert sum(weights) == pytest.approx(1, abs=1e-12)
    for m in range(k):
        v = [Fraction(0)] * (m + 1)  # by powers of n
        for d in range(m, -1, -1):
            others = sum(v[e] * math.comb(e, d) * (-1) ** (e - d) for e in range(d + 1, m + 1))
            v[d] = ((beta if d == m else 0) + (1 - beta) * others) / beta
        at = lambda n, v=v: sum(c * n**d for d, c in enumerate(v))  # noqa: E731
        got = sum(w * float(at(Fraction(-i))) for i, w in enumerate(weights))
        scale = sum(abs(w * float(at(Fraction(-i)))) for i, w in enumerate(weights))
        assert got == pytest.approx(1 / (m + 1), abs=1e-13 * scale)  # the integral of u^m over [0, 1]


@every_method
@every_process
def test_constant_noise_is_integrated_exactly(method: Any, process: Process) -> None:
    denoiser = Denoiser(lambda x, t: torch.full_like(x, 0.7), process, "epsilon")
    times = process.grid(7, "time").tolist()
    x = noise(3)
    for options in ({}, {"spacing": "variable"}, {"start": "rk"}):
        got = sample(denoiser, x, solver=METHODS[method](3, 0.6, **options), grid=times)
        s, t = times[0], times[-1]
        want = process.alpha(t) * (x / process.alpha(s) + 0.7 * (process.sigma_hat(t) - process.sigma_hat(s)))
        assert torch.allclose(got, want, rtol=1e-11, atol=1e-11 * process.sigma_hat(s) * process.alpha(t))


def test_it_is_no_average_of_increments_in_x_and_v_does_not_start_at_zero() -> None:
    x, beta = 0.8, 0.8
    got = sample(exact(), torch.tensor([[x]], dtype=torch.float64), solver=HeavyBall(1, beta), grid=TIMES).item()
    ends = {}
    for wrong in ("increments of x", "from zero"):
        z, average = x, 0.0 if wrong == "from zero" else None
        for s, t in itertools.pairwise(TIMES):
            a, b = alpha(s), alpha(t)
            g, delta = eps_of(z, s), math.sqrt(1 / b**2 - 1) - math.sqrt(1 / a**2 - 1)
            new = g if wrong == "from zero" else b / a * z + b * delta * g - z
            average = new if average is None else (1 - beta) * average + beta * new
            z = b / a * z + b * delta * average if wrong == "from zero" else z + average
        ends[wrong] = z
    assert all(abs(end - got) > 1e-3 for end in ends.values()), (ends, got)


@pytest.mark.parametrize(
    ("decimal", "order", "beta"), [(3.8, 4, 0.8), (0.7, 1, 0.7), (4.0, 4, 1.0), (5, 5, 1.0), (2.3, 3, 0.3)]
)
@every_method
def test_orders_as_decimals(method: Any, decimal: float, order: int, beta: float) -> None:
    # 3.8 % 1 is 0.7999999999999998
    assert METHODS[method].from_decimal(decimal) == METHODS[method](order, beta)
    with pytest.raises(ValueError, match=r"order must be in \(0, 5\], got 5.5"):
        METHODS[method].from_decimal(5.5)


@every_method
@pytest.mark.parametrize("kind", ["sample", "v_prediction", "flow", "score"])
def test_what_is_averaged_is_the_noise_whatever_the_network_says(method: Any, kind: Any) -> None:
    """The official code starts v with the raw output of a network that predicts v, before it is converted."""
    process, solver = VP(), METHODS[method](3, 0.7)
    noisy = exact()

    def network(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        p = noisy(x, t[0].item())
        return {"sample": p.x0, "v_prediction": p.v, "flow": p.flow, "score": p.score}[kind]

    denoiser = Denoiser(network, process, kind, label=lambda t: t)
    assert torch.allclose(
        sample(denoiser, noise(4), solver=solver, steps=7), sample(noisy, noise(4), solver=solver, steps=7), rtol=1e-9
    )


# --- stability


def companion(method: Any, k: int, beta: float, z: complex) -> np.ndarray:
    """One step of ``y' = z y`` as a matrix, found by running the recurrence on unit vectors: of (y, v, past values)."""
    size = 1 + 1 + max(k - 1, 0)
    columns = []
    for unit in np.eye(size):
        y, v, past = unit[0], unit[1], list(unit[2:])
        g = z * y
        if method == "ghvb":
            v = (1 - beta) * v + beta * g
            values = [v, *past]
            y = y + sum(c * w for c, w in zip(MIXED[k](beta), values, strict=True))
        else:
            values = [g, *past]
            p = sum(c * w for c, w in zip(MIXED[k](1.0), values, strict=True))
            v = (1 - beta) * v + beta * p
            y = y + (v if method == "hb" else (1 - beta) * v + beta * p)
        columns.append([y, v, *values[: k - 1]])
    return np.array(columns).T


def radius(method: Any, k: int, beta: float, z: complex) -> float:
    return abs(np.linalg.eigvals(companion(method, k, beta, z))).max()


@every_method
@pytest.mark.parametrize("k", [1, 2, 3, 4, 5])
def test_the_limit_is_where_the_spectral_radius_crosses_one(method: Any, k: int) -> None:
    limits = []
    for beta in (1.0, 0.8, 0.5, 0.2):
        limit = stability_limit(method, k, beta)
        limits.append(limit)
        # Stable all the way up to it, and not beyond.
        assert max(radius(method, k, beta, -f * limit) for f in (0.05, 0.2, 0.5, 0.8, 0.95, 0.999)) <= 1 + 1e-9
        assert radius(method, k, beta, -1.001 * limit) > 1
        z = torch.tensor([-1e-3, -0.5, -0.999, -1.001, -1.5, 1e-3], dtype=torch.float64) * limit
        assert stability_region(method, k, beta, z).tolist() == [True, True, True, False, False, False]
    assert limits == sorted(limits)
    assert len(set(limits)) == len(limits)


L = {1: 2, 2: 1, 3: 6 / 11, 4: 3 / 10}
CLOSED = {
    "hb": lambda k, b: L[k] * (2 - b) / b,
    "nt": lambda k, b: L[k] * (2 - b) / (b * (3 - 2 * b)),
    "ghvb": lambda k, b: {1: 2 * (2 - b) / b, 2: 2 - b, 3: 6 * (2 - b) / (12 - b), 4: 3 * (2 - b) / (11 - b)}[k],
}


@every_method
@pytest.mark.parametrize("beta", BETAS)
def test_limits_in_closed_form(method: Any, beta: float) -> None:
    for k in L:
        assert stability_limit(method, k, beta) == pytest.approx(CLOSED[method](k, beta), rel=1e-13)
    assert stability_limit("ghvb", 5, beta) == pytest.approx(90 * (2 - beta) / (600 - 49 * beta), rel=1e-13)


@every_method
def test_the_region_in_the_plane(method: Any) -> None:
    z = torch.complex(*torch.meshgrid(torch.linspace(-2.5, 0.5, 7), torch.linspace(-1.5, 1.5, 5), indexing="ij"))
    for k, beta in ((1, 0.8), (2, 0.6), (4, 0.8)):
        made = stability_region(method, k, beta, z)
        want = [[radius(method, k, beta, complex(c)) <= 1 + 1e-9 for c in row] for row in z]
        assert made.tolist() == want
    assert stability_region(method, 2, 0.5, z[:0]).shape == (0, 5)


# --- orders


class Level(Process):
    """alpha = 1 and sigma = 3 u^power: a uniform grid in u is one of sigma for power 1."""

    t_min, t_max = 0.0, 1.0

    def __init__(self, power: int) -> None:
        self.power = power

    def _alpha(self, t: torch.Tensor) -> torch.Tensor:
        return torch.ones_like(t)

    def _sigma(self, t: torch.Tensor) -> torch.Tensor:
        return 3 * t**self.power

    def _t_of_lam(self, lam: torch.Tensor) -> torch.Tensor:
        return ((-lam).exp() / 3) ** (1 / self.power)


def slope(solver: Any, power: int) -> float:
    """Of the error on ``dy/ds = y sin s`` from s = 3 to 0."""
    process, errors = Level(power), []
    field = lambda x, t: Prediction(x * math.sin(process.sigma(float(t))), x, t, process, "epsilon")  # noqa: E731
    for n in (160, 320):
        made = sample(field, torch.ones(1, 1, dtype=torch.float64), process=process, solver=solver, steps=n)
        errors.append(abs(made.item() - math.exp(math.cos(3) - 1)))
    return math.log2(errors[0] / errors[1])


@pytest.mark.parametrize(
    ("solver", "power", "order"),
    [
        (HeavyBall(2, 1.0), 1, 2),
        (HeavyBall(4, 0.8), 1, 1),
        (Nesterov(4, 0.5), 1, 1),
        (GHVB(1, 0.8), 1, 1),
        (GHVB(2, 0.8), 1, 2),
        # A first step of Euler's leaves an error of second order.
        (HeavyBall(4, 1.0), 1, 2),
        (GHVB(3, 0.8), 1, 2),
        (HeavyBall(3, 1.0, start="rk"), 1, 3),
        (HeavyBall(4, 1.0, start="rk"), 1, 4),
        (HeavyBall(4, 0.8, start="rk"), 1, 1),
        (GHVB(3, 0.8, start="rk"), 1, 3),
        (GHVB(4, 0.8, start="rk"), 1, 4),
        # The weights of a uniform grid are of second order on any other.
        (HeavyBall(4, 1.0), 2, 2),
        (HeavyBall(4, 1.0, start="rk"), 2, 2),
        (GHVB(4, 0.8, start="rk"), 2, 2),
        (HeavyBall(3, 1.0, "variable", "rk"), 2, 3),
        (HeavyBall(4, 1.0, "variable", "rk"), 2, 4),
        (GHVB(3, 0.8, "variable", "rk"), 2, 3),
        (GHVB(4, 0.8, "variable", "rk"), 2, 4),
        (HeavyBall(4, 1.0, "variable"), 2, 2),
    ],
    ids=lambda value: repr(value),
)
def test_orders_of_convergence(solver: Any, power: int, order: int) -> None:
    assert slope(solver, power) == pytest.approx(order, abs=0.3)


@pytest.mark.parametrize("beta", [0.8, 0.3])
@pytest.mark.parametrize("k", [2, 4, 5])
@every_method
def test_averages_after_runge_kutta_are_those_that_had_always_gone_on(method: Any, k: int, beta: float) -> None:
    # The polynomial through g_0, ..., g_(k-1), continued backwards over as many steps as are felt.
    solver, g = METHODS[method](k, beta, start="rk"), np.random.default_rng(0).normal(size=k)
    polynomial = np.polynomial.Polynomial.fit(range(k), g, k - 1)
    step = velocities(method, k, beta)
    for n in range(-math.ceil(37 / -math.log(1 - beta)) - k, k):
        direction = step(float(polynomial(n)))
    weights = [ab_coefficients(min(i + 1, k), beta if method == "ghvb" else 1.0) for i in range(k)]
    row = solver._row(k - 1, weights[k - 1], solver._start(weights))
    # Backwards values grow as n^(k-1) and are weighted by (1 - beta)^n: some digits cancel.
    assert np.dot(row.direction, g[::-1]) == pytest.approx(direction, rel=1e-7)


@pytest.mark.parametrize("k", [2, 4])
def test_weights_of_actual_steps_are_constant_ones_on_a_uniform_grid(k: int) -> None:
    levels = torch.linspace(3, 0, 60, dtype=torch.float64).tolist()
    for method in METHODS.values():
        made = method(k, 0.6, "variable")._weights(levels)[-1]
        assert made == pytest.approx(method(k, 0.6)._weights(levels)[-1], rel=1e-8)


# --- in the room


@pytest.mark.parametrize(
    "solver",
    [HeavyBall(), GHVB(), GHVB(3, 0.8, "variable", "rk"), HeavyBallDPM()],
    ids=repr,
)
def test_every_solver_is_sound(solver: Any) -> None:
    check_solver(solver)


@every_process
def test_every_process_is_solved(process: Process) -> None:
    solver = GHVB(2, 0.6, "variable")
    x = process.prior((16, 1), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    want = reference(exact(process), x, nfe=120)
    coarse, fine = (path_rmse(sample(exact(process), x, solver=solver, steps=n, grid="logsnr"), want) for n in (16, 64))
    assert fine < 0.5 * coarse
    assert fine < 0.1


@pytest.mark.parametrize(
    "solver",
    [HeavyBall(3, 0.5), GHVB(3, 0.5), Nesterov(3, 0.5), HeavyBallDPM(0.5)],
    ids=repr,
)
def test_momentum_and_history_move_with_the_rows(solver: Any) -> None:
    process = VP()
    times, rows = process.grid(8, "logsnr").tolist(), torch.tensor([1, 2, 0, 4, 5, 3])

    def answer(query: Any) -> Prediction:
        return exact()(query.x, query.t)

    plain = drive(solver.run(noise(6), times, process), answer)
    moved = drive(solver.run(noise(6), times, process), answer, lambda step: Change(step.x[rows], rows))
    back = torch.arange(6)
    for _ in range(8):
        back = back[rows]
    assert torch.allclose(moved, plain[back], rtol=1e-12)
    kept = drive(solver.run(noise(6), times, process), answer, lambda step: Change(step.x[rows]))
    assert not torch.allclose(kept, plain[back], rtol=1e-3)


@pytest.mark.parametrize("beta", [0.6, 1.0])
def test_it_remembers_as_much_as_it_says(beta: float) -> None:
    average = beta < 1
    for solver, count in (
        (HeavyBall(4, beta), 3 + average), (Nesterov(2, beta), 1 + average), (GHVB(4, beta), 3), (GHVB(2, beta), 1),
        (HeavyBallDPM(beta), 1 + average), (HeavyBallDPM(beta, True), 1 + average),
    ):  # fmt: skip
        steps: list[Any] = []
        sample(exact(), noise(2), solver=solver, steps=8, callback=steps.append)
        assert max(len(step.memory.values) for step in steps) == solver.history == count


def test_nothing_is_left_over_between_trajectories() -> None:
    solver = GHVB(3, 0.4)
    first = sample(exact(), noise(), solver=solver, steps=6)
    sample(exact(), noise(seed=1), solver=solver, steps=6)
    assert torch.equal(sample(exact(), noise(), solver=solver, steps=6), first)


@pytest.mark.parametrize("solver", [HeavyBall(4, 0.8), GHVB(4, 0.8), HeavyBallDPM(0.8)], ids=repr)
def test_in_half_precision_the_state_and_what_is_averaged_are_in_single(solver: Any) -> None:
    steps: list[Any] = []
    denoiser = Denoiser(lambda x, t: torch.tanh(x.float()).to(x.dtype), VP())
    x = noise(16).bfloat16()
    made = sample(denoiser, x, solver=solver, steps=10, callback=steps.append)
    assert made.dtype == torch.bfloat16
    assert {step.x.dtype for step in steps} == {torch.float32}
    assert {v.dtype for step in steps for v in step.memory.values} == {torch.float32}
    want = sample(Denoiser(lambda x, t: torch.tanh(x), VP()), x.double(), solver=solver, steps=10)
    # What is left is the rounding of the network's input and output, 2^-9 each.
    assert path_rmse(made, want) < 0.02 * want.square().mean().sqrt()


def test_the_fast_loop_is_the_coroutine() -> None:
    denoiser = Denoiser(lambda x, t: torch.sin(3 * x + t[:, None]), VP())
    for solver in (HeavyBall(), GHVB(3, 0.7, "variable", "rk"), Nesterov(), HeavyBallDPM()):
        fast = sample(denoiser, noise(), solver=solver, steps=12)
        assert torch.equal(fast, sample(denoiser, noise(), solver=solver, steps=12, callback=lambda step: None))


def test_evaluations_are_counted() -> None:
    for solver, nfe, asked in (
        (HeavyBall(4), 10, 10), (GHVB(4, start="rk"), 20, 20), (GHVB(4, start="rk"), 13, 13), (GHVB(1, start="rk"), 5, 5),
    ):  # fmt: skip
        _, info = sample(exact(), noise(2), solver=solver, nfe=nfe, return_info=True)
        assert info.nfe == asked
    assert len(GHVB(4, start="rk").times(VP(), nfe=20)) == 1 + 20 - 9


def test_it_runs_towards_the_noise() -> None:
    solver = GHVB(3, 0.8, "variable")
    x = sample(exact(), noise(), solver=solver, steps=100)
    assert path_rmse(invert(exact(), x, solver=solver, steps=100), noise()) < 0.02


def test_a_stage_cannot_weigh_what_is_not_remembered() -> None:
    class Wrong(LinearSolver):
        def table(self, times: Any, process: Any, kind: str = "flow") -> list[Stage]:
            at = process.moments(times)
            return [Stage(s, t, "eps", 1.0, 1.0, keep=(-1,), mixed=((1.0, 0.5),)) for s, t in itertools.pairwise(at)]

    with pytest.raises(ValueError, match="weighs 1 remembered values, and there are 0"):
        sample(exact(), noise(2), solver=Wrong(), steps=2)


# --- on DPM-Solver++


def dpm(beta: float, warm: bool, x: float, times: list[float]) -> float:
    """The official recurrence, in plain numbers."""
    sigma = lambda t: math.sqrt(1 - alpha(t) ** 2)  # noqa: E731
    lam = lambda t: math.log(alpha(t) / sigma(t))  # noqa: E731
    last, v = None, None
    for i, (s, t) in enumerate(itertools.pairwise(times)):
        m0, h = (x - sigma(s) * eps_of(x, s)) / alpha(s), lam(t) - lam(s)
        if last is None:
            d, v = m0, m0 if warm else None
        else:
            d = m0 + (m0 - last) * h / (lam(s) - lam(times[i - 1])) / 2
            v = d = d if v is None else (1 - beta) * v + beta * d
        x = sigma(t) / sigma(s) * x - alpha(t) * math.expm1(-h) * d
        last = m0
    return x


@pytest.mark.parametrize("warm", [False, True])
@pytest.mark.parametrize("beta", BETAS)
def test_golden_dpm(beta: float, warm: bool) -> None:
    x = torch.tensor(STARTS, dtype=torch.float64)[:, None]
    made = sample(exact(), x, solver=HeavyBallDPM(beta, warm), grid=TIMES)[:, 0].tolist()
    assert made == pytest.approx([dpm(beta, warm, x, TIMES) for x in STARTS], rel=1e-9)


@every_process
def test_without_momentum_it_is_dpm_solver(process: Process) -> None:
    x = process.prior((8, 1), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    two_m = DPMSolverMultistep(2, "data", lower_order_final=False)
    ends = [sample(exact(process), x, solver=s, steps=9) for s in (HeavyBallDPM(1.0), two_m)]
    assert torch.allclose(*ends, rtol=1e-10, atol=1e-10)


def test_the_data_form_starts_without_signal_and_ends_on_clean_data() -> None:
    flow = Flow()
    assert flow.alpha(1.0) == 0
    times = [1.0, 0.8, 0.5, 0.2, 0.0]
    made = sample(exact(flow), noise(), solver=HeavyBallDPM(0.7), grid=times)
    last: list[torch.Tensor] = []
    sample(exact(flow), noise(), solver=HeavyBallDPM(0.7), grid=times, callback=lambda step: last.append(step.x))
    assert torch.allclose(made, exact(flow)(last[-2], 0.2).x0, rtol=1e-12)  # the last step has no momentum
    for solver in (GHVB(), GHVB(start="rk"), HeavyBall(2, 0.5, "variable", "rk")):
        with pytest.raises(ValueError, match=r"alpha is 0 at t=1 of Flow.*use HeavyBallDPM"):
            sample(exact(flow), noise(), solver=solver, grid=times)
    assert torch.isfinite(sample(exact(flow), noise(), solver=GHVB(3), grid=times[1:])).all()
    with pytest.raises(ValueError, match="sigma is 0 at t=0, where DPM-Solver"):
        HeavyBallDPM().table(times[::-1], flow)


# --- bad input


@pytest.mark.parametrize("make", [*METHODS.values(), lambda order, beta: HeavyBallDPM(beta)])
@pytest.mark.parametrize("beta", [0, 0.0, -0.1, 1.1, 2])
def test_beta_out_of_range(make: Any, beta: float) -> None:
    with pytest.raises(ValueError, match=r"beta must be in \(0, 1\], got "):
        make(4, beta)


@every_method
def test_bad_input(method: Any) -> None:
    make = METHODS[method]
    for order, words in ((0, "at least 1, got 0"), (6, "at most 5, got 6")):
        with pytest.raises(ValueError, match=f"order must be {words}"):
            make(order)
        with pytest.raises(ValueError, match=f"k must be {words}"):
            stability_limit(method, order)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"order must be an integer, got 3\.8"):
        make(3.8)
    with pytest.raises(ValueError, match="spacing must be one of 'constant', 'variable', got 'uniform'"):
        make(spacing="uniform")
    with pytest.raises(ValueError, match="steps=3 is too few for order 4"):
        sample(exact(), noise(2), solver=make(), steps=3)
    with pytest.raises(ValueError, match="nfe=12 is too few for order 4 with start='rk'"):
        sample(exact(), noise(2), solver=make(start="rk"), nfe=12)
    with pytest.raises(ValueError, match="times must decrease strictly"):
        sample(exact(), noise(2), solver=make(), grid=[1.0, 0.5, 0.6, 0.1])
    with pytest.raises(ValueError, match="sigma / alpha must decrease strictly"):
        make().table([1.0, 0.5, 0.5, 0.1], VP())
    asked = itertools.count(1)
    with pytest.raises(ValueError, match="NaN in the prediction of evaluation 3 at t="):
        sample(Denoiser(lambda x, t: x * (math.nan if next(asked) == 3 else 1), VP()), noise(2), solver=make(), steps=5)
    assert sample(exact(), noise(0), solver=make(), steps=5).shape == (0, 1)


def test_bad_grids_of_the_region() -> None:
    with pytest.raises(ValueError, match=r"grid must be finite, got \[nan\]"):
        stability_region("hb", 2, 0.5, torch.tensor([0.0, math.nan]))
    with pytest.raises(ValueError, match="method must be one of 'hb', 'ghvb', 'nt', got 'plms'"):
        stability_limit("plms", 2)  # type: ignore[arg-type]


# --- artifacts

MEAN, STD = [0.1, -0.2, 0.0], [1.0, 2.0, 0.5]


def test_the_score_is_that_of_loops() -> None:
    latents = 2 * torch.randn(2, 3, 9, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    got = artifact_score(latents, MEAN, torch.tensor(STD), kernel=4, threshold=3.0)
    for picture, score in zip(latents.tolist(), got.tolist(), strict=True):
        pooled = []
        for i, j in itertools.product((0, 4), (0, 4)):  # the ninth row is left over
            square = itertools.product(range(3), range(i, i + 4), range(j, j + 4))
            largest = max(abs(picture[c][a][b] - MEAN[c]) / STD[c] for c, a, b in square)
            pooled.append(largest if largest >= 3 else 0.0)
        assert score == pytest.approx(sum(pooled) / 4, rel=1e-14)
    assert (got > 0).all()


def test_a_blob_is_seen_and_ordinary_latents_are_not() -> None:
    latents = torch.zeros(2, 3, 16, 16)
    latents[1, 2, 5, 6] = 5.0  # ten standard deviations, in one of 16 squares
    assert artifact_score(latents, [0.0] * 3, STD).tolist() == pytest.approx([0.0, 10 / 16])
    assert artifact_score(latents, [0.0] * 3, STD, threshold=10.0).tolist() == pytest.approx([0.0, 10 / 16])
    assert artifact_score(latents, [0.0] * 3, STD, threshold=10.5).tolist() == [0.0, 0.0]
    half = 3 * torch.randn(64, 3, 8, 8, generator=torch.Generator().manual_seed(0)).half()
    far = [100.02] * 3  # which half precision has as 100
    made = artifact_score(half, far, STD)
    assert made.dtype == torch.float16
    assert torch.equal(made, artifact_score(half.float(), far, STD).half())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mean": [0.0]}, r"mean must have shape \(3,\), one for each channel, got \(1,\)"),
        ({"std": [1.0, 0.0, 1.0]}, "std must be > 0"),
        ({"kernel": 9}, "kernel must be at most 8, the picture's size, got 9"),
        ({"threshold": -1.0}, "threshold must be >= 0, got -1.0"),
        ({"latents": torch.zeros(3, 8, 8)}, "latents must be a floating-point tensor of 4 dimensions"),
    ],
)
def test_bad_arguments_of_the_score(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        artifact_score(**{"latents": torch.zeros(1, 3, 8, 8), "mean": MEAN, "std": STD, **changes})


# --- in diffusers


def test_schedulers_run_as_the_official_wrapper() -> None:
    diffusers = pytest.importorskip("diffusers")
    from polyak.generate.adapters.diffusers import GHVBScheduler, HeavyBallScheduler

    theirs = diffusers.DDIMScheduler(clip_sample=False, steps_offset=1)
    for method, make in (("hb", HeavyBallScheduler), ("ghvb", GHVBScheduler)):
        scheduler = make.from_config(theirs.config, order=3, beta=0.7)
        scheduler.set_timesteps(7)
        theirs.set_timesteps(7)
        assert scheduler.timesteps.tolist() == theirs.timesteps.tolist()
        table = theirs.alphas_cumprod.double().tolist()
        x, want, step = torch.full((1, 1, 1, 1), 0.8, dtype=torch.float64), 0.8, velocities(method, 3, 0.7)
        for t in theirs.timesteps.tolist():
            x = scheduler.step(torch.sin(3 * x), t, x).prev_sample
            before = t - 1000 // 7
            a, b = (math.sqrt(table[i]) if i >= 0 else 1.0 for i in (t, before))
            delta = math.sqrt(1 - b * b) / b - math.sqrt(1 - a * a) / a
            want = b * (want / a + delta * step(math.sin(3 * want)))
        assert x.item() == pytest.approx(want, rel=1e-5)  # diffusers' tables are in single precision


def test_schedulers_keep_their_solver_and_change_its_options() -> None:
    diffusers = pytest.importorskip("diffusers")
    from polyak.generate.adapters.diffusers import GHVBScheduler, HeavyBallScheduler, PolyakScheduler

    config = diffusers.EulerDiscreteScheduler().config
    made = GHVBScheduler.from_config(config, order=2, beta=0.6, spacing="variable")
    assert made.solver == GHVB(2, 0.6, "variable")
    assert GHVBScheduler.from_config(made.config).solver == made.solver
    assert GHVBScheduler.from_config(made.config, beta=0.9).solver == dataclasses.replace(made.solver, beta=0.9)
    assert HeavyBallScheduler.from_config(made.config).solver == HeavyBall()
    assert HeavyBallScheduler.from_config(config, solver=HeavyBall(2)).solver == HeavyBall(2)
    assert isinstance(diffusers.EulerDiscreteScheduler.from_config(made.config), diffusers.EulerDiscreteScheduler)
    for scheduler in (made, PolyakScheduler.from_config(config, solver=made.solver)):
        scheduler.set_timesteps(5)
    assert made.timesteps.tolist() == scheduler.timesteps.tolist()
    with pytest.raises(ValueError, match=r"beta must be in \(0, 1\], got 0"):
        HeavyBallScheduler.from_config(config, beta=0.0)
    with pytest.raises(ValueError, match="solver must be a GHVB, got HeavyBall"):
        GHVBScheduler.from_config(config, solver=HeavyBall())
    with pytest.raises(ValueError, match="velocity"):
        GHVBScheduler.from_config(config, velocity=0.5)
