"""DPM-Solver against its equations (written here again, independently), its exactness and its orders."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from generate_cases import BETAS, PROCESSES, every_process, exact, noise
from torch import Tensor

from polyak.generate import DDIM, RK4, VP, Denoiser, Discrete, DPMSolver, Flow, Process, dpm_step, sample
from polyak.generate.dpm_solver import invert
from polyak.generate.problems import ExactDenoiser, Gaussian, gaussian_flow, path_rmse

FORMS = ["eps", "data"]
METHODS = ["fast", "singlestep", "multistep"]


def counted(solver: Any, **budget: Any) -> tuple[list[float], list[tuple[float, float]]]:
    denoiser = Denoiser(lambda x, t: torch.zeros_like(x), VP())
    _, info = sample(denoiser, torch.zeros(1, 1, dtype=torch.float64), solver=solver, return_info=True, **budget)
    assert info.nfe == denoiser.nfe
    return info.queries, info.steps


# --- golden trajectories: the paper's update formulas, in plain floats


class Vp:
    """VP(0.1, 20) in plain math."""

    @staticmethod
    def log_alpha(t: float) -> float:
        return -19.9 * t * t / 4 - 0.05 * t

    def alpha(self, t: float) -> float:
        return math.exp(self.log_alpha(t))

    def sigma(self, t: float) -> float:
        return math.sqrt(1 - math.exp(2 * self.log_alpha(t)))

    def lam(self, t: float) -> float:
        return self.log_alpha(t) - math.log(self.sigma(t))

    def t(self, lam: float) -> float:
        low, high = 1e-9, 1.0
        for _ in range(200):
            mid = (low + high) / 2
            low, high = (mid, high) if self.lam(mid) > lam else (low, mid)
        return (low + high) / 2


VPM = Vp()


def network(x: float, t: float) -> tuple[float, float]:
    """(eps, x0) of the mixture 0.4 N(-1, 0.25) + 0.6 N(0.6, 0.09)."""
    a, s = VPM.alpha(t), VPM.sigma(t)
    parts = [(0.4, -1.0, 0.25), (0.6, 0.6, 0.09)]
    weights = [
        w * math.exp(-((x - a * m) ** 2) / 2 / (a * a * v + s * s)) / math.sqrt(a * a * v + s * s) for w, m, v in parts
    ]
    means = [m + a * v / (a * a * v + s * s) * (x - a * m) for _, m, v in parts]
    x0 = sum(w * m for w, m in zip(weights, means, strict=True)) / sum(weights)
    return (x - a * x0) / s, x0


def singlestep_eps(x: float, s: float, t: float, order: int) -> float:
    """Algorithms 1 and 2 of arXiv 2206.00927 with r1 = 1/2, and 1/3, 2/3."""
    lam_s, lam_t = VPM.lam(s), VPM.lam(t)
    h = lam_t - lam_s
    e_s = network(x, s)[0]
    if order == 1:
        return VPM.alpha(t) / VPM.alpha(s) * x - VPM.sigma(t) * math.expm1(h) * e_s
    if order == 2:
        s1 = VPM.t(lam_s + h / 2)
        u = VPM.alpha(s1) / VPM.alpha(s) * x - VPM.sigma(s1) * math.expm1(h / 2) * e_s
        return VPM.alpha(t) / VPM.alpha(s) * x - VPM.sigma(t) * math.expm1(h) * network(u, s1)[0]
    r1, r2 = 1 / 3, 2 / 3
    s1, s2 = VPM.t(lam_s + r1 * h), VPM.t(lam_s + r2 * h)
    u1 = VPM.alpha(s1) / VPM.alpha(s) * x - VPM.sigma(s1) * math.expm1(r1 * h) * e_s
    d1 = network(u1, s1)[0] - e_s
    u2 = (
        VPM.alpha(s2) / VPM.alpha(s) * x
        - VPM.sigma(s2) * math.expm1(r2 * h) * e_s
        - VPM.sigma(s2) * r2 / r1 * (math.expm1(r2 * h) / (r2 * h) - 1) * d1
    )
    d2 = network(u2, s2)[0] - e_s
    return (
        VPM.alpha(t) / VPM.alpha(s) * x
        - VPM.sigma(t) * math.expm1(h) * e_s
        - VPM.sigma(t) / r2 * (math.expm1(h) / h - 1) * d2
    )


def multistep_data(x: float, times: list[float], order: int) -> float:
    """Algorithm 2 of arXiv 2211.01095 (2M), and the exact integral of the quadratic through three values (3M)."""
    n = len(times) - 1
    history: list[tuple[float, float]] = []
    for i in range(n):
        s, t = times[i], times[i + 1]
        lam_s, lam_t = VPM.lam(s), VPM.lam(t)
        h = lam_t - lam_s
        history.insert(0, (lam_s, network(x, s)[1]))
        k = min(order, i + 1, n - i)
        ratio, scale = VPM.sigma(t) / VPM.sigma(s), VPM.alpha(t)
        d = history[0][1]
        if k == 2:
            r0 = (lam_s - history[1][0]) / h
            d = d + (d - history[1][1]) / (2 * r0)
        if k < 3:
            x = ratio * x - scale * math.expm1(-h) * d
            continue
        # sigma_t int exp(lam) p(lam) dlam by quadrature, p the Lagrange polynomial: Gauss-Legendre with 3 x 40 points
        nodes, weights = GAUSS
        integral = 0.0
        for y, w in zip(nodes, weights, strict=True):
            lam = lam_s + (y + 1) / 2 * h
            p = 0.0
            for j in range(3):
                basis = math.prod((lam - history[q][0]) / (history[j][0] - history[q][0]) for q in range(3) if q != j)
                p += history[j][1] * basis
            integral += w * h / 2 * math.exp(lam) * p
        x = ratio * x + VPM.sigma(t) * integral
    return x


def gauss_legendre(n: int) -> tuple[list[float], list[float]]:
    """Golub and Welsch."""
    k = torch.arange(1, n, dtype=torch.float64)
    off = k / (4 * k**2 - 1).sqrt()
    values, vectors = torch.linalg.eigh(torch.diag(off, 1) + torch.diag(off, -1))
    return values.tolist(), (2 * vectors[0] ** 2).tolist()


GAUSS = gauss_legendre(12)
STARTS = [-1.5, 0.1, 0.8]


def run_ours(solver: DPMSolver, nfe: int) -> list[float]:
    x = torch.tensor(STARTS, dtype=torch.float64)[:, None]
    return sample(exact(), x, solver=solver, nfe=nfe)[:, 0].tolist()


def golden_fast(x: float, nfe: int) -> float:
    orders = {6: [3, 2, 1], 7: [3, 3, 1], 8: [3, 3, 2]}[nfe]
    lams = [VPM.lam(1.0) + (VPM.lam(1e-3) - VPM.lam(1.0)) * i / len(orders) for i in range(len(orders) + 1)]
    times = [1.0, *(VPM.t(lam) for lam in lams[1:-1]), 1e-3]
    for order, s, t in zip(orders, times, times[1:], strict=False):
        x = singlestep_eps(x, s, t, order)
    return x


@pytest.mark.parametrize("nfe", [6, 7, 8])
def test_golden_fast(nfe: int) -> None:
    assert run_ours(DPMSolver(), nfe) == pytest.approx([golden_fast(x, nfe) for x in STARTS], rel=1e-9, abs=1e-10)


@pytest.mark.parametrize("order", [1, 2, 3])
def test_golden_multistep(order: int) -> None:
    lams = [VPM.lam(1.0) + (VPM.lam(1e-3) - VPM.lam(1.0)) * i / 7 for i in range(8)]
    times = [1.0, *(VPM.t(lam) for lam in lams[1:-1]), 1e-3]
    want = [multistep_data(x, times, order) for x in STARTS]
    assert run_ours(DPMSolver(order=order, form="data", method="multistep"), 7) == pytest.approx(want, rel=1e-9)


def test_golden_numbers() -> None:
    """Pinned: what the independent code above gave on 2026-11-24."""
    assert run_ours(DPMSolver(), 7) == pytest.approx(PINNED["fast"], rel=1e-9)
    assert run_ours(DPMSolver(order=2, form="data", method="multistep"), 7) == pytest.approx(PINNED["2M"], rel=1e-9)
    assert run_ours(DPMSolver(order=3, form="data", method="multistep"), 7) == pytest.approx(PINNED["3M"], rel=1e-9)


PINNED: dict[str, list[float]] = {
    "fast": [-1.8354682286579485, 0.605322956391559, 0.8290209803019349],
    "2M": [-1.5586418613443431, 0.38625954707257854, 0.7760815087771656],
    "3M": [-1.9320813719947583, 0.5196386579751539, 0.9410510892241767],
}


# --- identities


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("method", METHODS)
@every_process
def test_order_one_is_ddim(process: Process, form: Any, method: Any) -> None:
    denoiser, x = exact(process), noise()
    solver = DPMSolver(order=1, form=form, method=method)
    want = sample(denoiser, x, solver=DDIM(), nfe=7, grid="logsnr")
    assert torch.allclose(sample(denoiser, x, solver=solver, nfe=7), want, rtol=1e-12, atol=1e-12)


def test_sde_of_order_one_is_ancestral_sampling() -> None:
    # Both draw the same noise; the two forms are the same SDE only up to their discretisation.
    x, g = noise(), torch.Generator()
    solver = DPMSolver(order=1, form="data", method="multistep", sde=True)
    want = sample(exact(), x, solver=DDIM(1.0), nfe=9, grid="logsnr", generator=g.manual_seed(1))
    assert torch.allclose(sample(exact(), x, solver=solver, nfe=9, generator=g.manual_seed(1)), want, atol=1e-12)


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("form", FORMS)
def test_the_sde_has_the_right_law(form: Any, order: int) -> None:
    law = Gaussian([0.4], 0.3)
    solver = DPMSolver(order=order, form=form, method="multistep", sde=True)
    x = sample(ExactDenoiser(law, VP()), noise(4000), solver=solver, nfe=80, generator=torch.Generator().manual_seed(0))
    assert x.mean().item() == pytest.approx(0.4, abs=0.05)
    assert x.var().item() == pytest.approx(0.3, rel=0.12)


@pytest.mark.parametrize("order", [2, 3])
def test_the_sde_mean_is_the_exact_solution_for_a_constant_prediction(order: int) -> None:
    # d(x/sigma) for constant x0 under the reverse SDE: E x_t = (sigma_t/sigma_s) e^-h x + alpha_t (1 - e^-2h) x0
    process, x = VP(), torch.ones(1, dtype=torch.float64)
    s, t = 0.8, 0.5
    h = process.lam(t) - process.lam(s)
    r = (-0.7, -1.9)[: order - 1]
    got = dpm_step(x, s, t, [2 * x] * order, process, r=r, form="data", sde=True)
    want = process.sigma(t) / process.sigma(s) * math.exp(-h) + process.alpha(t) * (1 - math.exp(-2 * h)) * 2
    assert got.item() == pytest.approx(want, rel=1e-12)
    z = dpm_step(x, s, t, [2 * x], process, form="data", sde=True, noise=torch.ones(1, dtype=torch.float64))
    assert (z - got).item() == pytest.approx(process.sigma(t) * math.sqrt(1 - math.exp(-2 * h)), rel=1e-10)


def solution(form: str, process: Process, x: float, s: float, t: float, m: Callable[[float], float]) -> float:
    """The exact solution for a network value m(lam) that does not depend on x, by quadrature."""
    lam_s, lam_t = process.lam(s), process.lam(t)
    nodes, weights = gauss_legendre(40)
    sign = -1 if form == "eps" else 1
    points = [lam_s + (y + 1) / 2 * (lam_t - lam_s) for y in nodes]
    integral = (
        sum(w * math.exp(sign * lam) * m(lam) for w, lam in zip(weights, points, strict=True)) * (lam_t - lam_s) / 2
    )
    if form == "eps":
        return process.alpha(t) / process.alpha(s) * x - process.alpha(t) * integral
    return process.sigma(t) / process.sigma(s) * x + process.sigma(t) * integral


class Oracle:
    """A denoiser whose network value depends on lam only."""

    def __init__(self, form: str, m: Callable[[float], float]) -> None:
        self.form, self.m = form, m

    def over(self, process: Process) -> Denoiser:
        kind = "epsilon" if self.form == "eps" else "sample"
        return Denoiser(lambda x, t: torch.full_like(x, self.m(process.lam(t[0].item()))), process, kind)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("degree", "solvers"),
    [
        (
            0,
            [
                DPMSolver(order=k, method=m, lower_order_final=False)
                for k in (1, 2, 3)
                for m in ("singlestep", "multistep")
            ]
            + [DPMSolver(order=k, method="singlestep", kind="taylor") for k in (1, 2, 3)],
        ),
        (
            1,
            [
                DPMSolver(order=2, method="singlestep", kind="taylor"),
                DPMSolver(order=3, method="singlestep"),
                DPMSolver(order=3, method="singlestep", kind="taylor"),
                DPMSolver(order=2, method="multistep", kind="taylor", start="singlestep", lower_order_final=False),
                DPMSolver(order=3, method="multistep", start="singlestep", lower_order_final=False),
            ],
        ),
        (
            2,
            [
                DPMSolver(order=3, method="singlestep", kind="taylor"),
                DPMSolver(order=3, method="multistep", kind="taylor", start="singlestep", lower_order_final=False),
            ],
        ),
    ],
)
def test_polynomials_in_lam_are_solved_exactly(form: Any, degree: int, solvers: list[DPMSolver]) -> None:
    # The time grid makes all steps and nodes unequal in lam.
    process, m = VP(), lambda lam: 0.7 + (0.3 * lam if degree else 0) + (0.2 * lam**2 if degree == 2 else 0)
    x = torch.full((1, 1), 0.9, dtype=torch.float64)
    want = solution(form, process, 0.9, 1.0, 0.4, m)
    for template in solvers:
        solver = dataclasses.replace(template, form=form)
        times = process.grid(6, "time", end=0.4)
        got = sample(Oracle(form, m).over(process), x, solver=solver, grid=times)
        assert got.item() == pytest.approx(want, rel=1e-11), solver


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("method", ["singlestep", "multistep"])
def test_midpoint_order_two_is_not_exact_for_linear_values(form: Any, method: Any) -> None:
    process, m = VP(), lambda lam: 0.7 + 0.3 * lam
    solver = DPMSolver(order=2, form=form, method=method, start="singlestep" if method == "multistep" else "lower")
    x = torch.full((1, 1), 0.9, dtype=torch.float64)
    got = sample(Oracle(form, m).over(process), x, solver=solver, grid=process.grid(4, "time", end=0.4)).item()
    assert abs(got / solution(form, process, 0.9, 1.0, 0.4, m) - 1) > 1e-4


@pytest.mark.parametrize("form", FORMS)
def test_official_three_m_halves_the_curvature(form: Any) -> None:
    # Exact for linear values; for quadratic ones off by exactly half the phi_3 term.
    process, s, t, r = VP(), 0.8, 0.6, (-0.9, -2.1)
    lam_s, lam_t = process.lam(s), process.lam(t)
    h, x = lam_t - lam_s, torch.full((1,), 0.9, dtype=torch.float64)
    for curvature in (0.0, 0.5):
        m = lambda lam, c=curvature: 0.7 + 0.3 * (lam - lam_s) + c * (lam - lam_s) ** 2  # noqa: E731
        values = [torch.full((1,), m(lam_s + rho * h), dtype=torch.float64) for rho in (0.0, *r)]
        ours = dpm_step(x, s, t, values, process, r=r, form=form)
        official = dpm_step(x, s, t, values, process, r=r, form=form, parity="official")
        assert ours.item() == pytest.approx(solution(form, process, 0.9, s, t, m), rel=1e-12)
        z = h if form == "eps" else -h
        third = (math.expm1(z) / z - 1) / z - 0.5
        scale = process.sigma(t) if form == "eps" else process.alpha(t)
        assert (official - ours).item() == pytest.approx(scale * third * curvature * h**2, rel=1e-8, abs=1e-14)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("h", [1e-7, 1e-4, 0.3, 0.999, 1.001, 8.0])
def test_coefficients_keep_their_digits(form: Any, h: float) -> None:
    # phi functions with 60 digits, from their series in exact rational arithmetic
    from fractions import Fraction

    from polyak.generate.dpm_solver.step import _z_phi

    z = h if form == "eps" else -h
    exact_z = Fraction(z)
    for k, got in enumerate(_z_phi(z, 3), start=1):
        want = sum(exact_z ** (j + 1) / math.factorial(j + k) for j in range(80))
        assert got == pytest.approx(float(want), rel=1e-13)


# --- order of convergence


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("options", "slope"),
    [
        ({"order": 1, "method": "singlestep"}, 1.0),
        ({"order": 2, "method": "singlestep"}, 2.0),
        ({"order": 2, "method": "singlestep", "kind": "taylor"}, 2.0),
        ({"order": 3, "method": "singlestep"}, 3.0),
        ({"order": 3, "method": "singlestep", "kind": "taylor"}, 3.0),
        ({"order": 2, "method": "multistep"}, 2.0),
        ({"order": 2, "method": "multistep", "kind": "taylor"}, 2.0),
        ({"order": 3, "method": "multistep"}, 3.0),
        ({"order": 3, "method": "multistep", "start": "singlestep"}, 3.0),
        ({"order": 3, "method": "multistep", "start": "singlestep", "parity": "official"}, 2.0),
    ],
)
def test_slopes(form: Any, options: dict[str, Any], slope: float, smooth: tuple[Tensor, Tensor]) -> None:
    x, ref = smooth
    solver = DPMSolver(form=form, **options)
    stages = solver.stages
    errors = [path_rmse(sample(exact(), x, solver=solver, nfe=n * stages), ref) for n in (128, 256)]
    assert math.log2(errors[0] / errors[1]) == pytest.approx(slope, abs=0.12)


@pytest.fixture(scope="module")
def smooth() -> tuple[Tensor, Tensor]:
    x = noise(16)
    return x, sample(
        exact(), x, solver=RK4(), steps=400, grid="logsnr"
    )  # to 2e-9, where what is judged has 2e-7 or more


def test_gaussian_data_against_the_closed_form() -> None:
    law = Gaussian([0.5, -0.3], torch.tensor([[0.5, 0.2], [0.2, 0.3]]))
    denoiser, x = ExactDenoiser(law, VP()), noise(16, 2)
    want = gaussian_flow(law, VP(), x, 1.0, 1e-3)
    for solver, tolerance in ((DPMSolver(), 3e-4), (DPMSolver(order=2, form="data", method="multistep"), 2e-2)):
        assert path_rmse(sample(denoiser, x, solver=solver, nfe=60), want) < tolerance


# --- planning


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("order", [1, 2, 3])
def test_every_budget_is_met_exactly(order: int, method: Any) -> None:
    solver = DPMSolver(order=order, method=method)
    for nfe in range(1, 41):
        if nfe < (1 if method == "fast" else order):
            with pytest.raises(ValueError, match=r"too few for order|must be at least order"):
                counted(solver, nfe=nfe)
            continue
        asked, steps = counted(solver, nfe=nfe)
        spent = order * (nfe // order) if method == "singlestep" else nfe
        assert len(asked) == spent
        assert (steps[0][0], steps[-1][1]) == (1.0, 1e-3)
        assert all(a[1] == b[0] for a, b in itertools.pairwise(steps))
        assert [(s, t) for _, s, t in solver.plan(nfe, VP())] == steps


@pytest.mark.parametrize(
    ("nfe", "orders"), [(1, [1]), (2, [2]), (3, [2, 1]), (10, [3, 3, 3, 1]), (11, [3, 3, 3, 2]), (12, [3, 3, 3, 2, 1])]
)
def test_the_plan_of_fast(nfe: int, orders: list[int]) -> None:
    plan = DPMSolver().plan(nfe, VP())
    assert [k for k, _, _ in plan] == orders
    assert len(orders) == nfe // 3 + 1
    lams = [VP().lam(t) for t in (plan[0][1], *(t for _, _, t in plan))]
    steps = [b - a for a, b in itertools.pairwise(lams)]
    assert steps == pytest.approx([steps[0]] * len(steps))


@pytest.mark.parametrize("grid", ["time", "quadratic"])
def test_other_grids_take_outer_points_from_the_fine_grid(grid: str) -> None:
    fine = VP().grid(10, grid).tolist()
    plan = DPMSolver(grid=grid).plan(10, VP())
    assert [(s, t) for _, s, t in plan] == [
        (fine[0], fine[3]),
        (fine[3], fine[6]),
        (fine[6], fine[9]),
        (fine[9], fine[10]),
    ]
    asked, _ = counted(DPMSolver(grid=grid), nfe=10)
    assert asked == fine[:-1]


def test_inner_nodes_are_fractions_of_lam_not_of_t() -> None:
    # On the time grid a third-order step has to use its true r1, r2: with 1/3, 2/3 a linear value is not solved exactly.
    process, m = VP(), lambda lam: 0.3 * lam
    x = torch.zeros(1, 1, dtype=torch.float64)
    times = process.grid(3, "time", end=0.2)
    got = sample(Oracle("eps", m).over(process), x, solver=DPMSolver(), grid=times[[0, 1, 2, 3]])
    orders = [k for k, _, _ in DPMSolver().plan(3, process)]
    assert orders == [2, 1]
    single = sample(Oracle("eps", m).over(process), x, solver=DPMSolver(method="singlestep"), grid=times)
    assert single.item() == pytest.approx(solution("eps", process, 0.0, 1.0, 0.2, m), rel=1e-11)
    assert got.item() != pytest.approx(single.item(), rel=1e-4)


def test_multistep_ends_with_lower_orders_where_steps_are_few() -> None:
    def orders(solver: DPMSolver, n: int) -> list[int]:
        return [k for k, _, _ in solver.plan(n, VP())]

    base: dict[str, Any] = {"order": 3, "method": "multistep"}
    assert orders(DPMSolver(**base), 6) == [1, 2, 3, 3, 2, 1]
    assert orders(DPMSolver(**base), 10) == [1, 2] + [3] * 8
    assert orders(DPMSolver(**base, lower_order_final=False), 6) == [1, 2, 3, 3, 3, 3]
    assert orders(DPMSolver(**base, lower_order_final=15), 10) == [1, 2, 3, 3, 3, 3, 3, 3, 2, 1]
    assert orders(DPMSolver(**base, start="singlestep", lower_order_final=False), 9) == [3] * 5


def test_denoise_to_zero_spends_one_evaluation_more() -> None:
    solver = DPMSolver(denoise_to_zero=True)
    asked, _ = counted(solver, nfe=7)
    assert len(asked) == 7
    assert asked[-1] == 1e-3
    x = sample(exact(), noise(), solver=solver, nfe=7)
    before = sample(exact(), noise(), solver=DPMSolver(), nfe=6)
    assert torch.allclose(x, exact()(before, 1e-3).x0)
    with pytest.raises(ValueError, match="denoise_to_zero"):
        invert(exact(), noise(), solver=solver, nfe=7)


def test_discrete_models_are_asked_within_their_range() -> None:
    process = Discrete(BETAS)
    _, info = sample(exact(process), noise(), solver=DPMSolver(), nfe=20, return_info=True)
    assert min(info.queries) >= process.t_min
    assert info.steps[-1][1] == process.t_min == 1e-3


# --- running


def test_inversion_returns_to_the_noise() -> None:
    x = noise()

    def error(solver: DPMSolver, nfe: int, grid: str) -> float:
        data = sample(exact(), x, solver=solver, nfe=nfe, grid=grid)
        return path_rmse(invert(exact(), data, solver=solver, nfe=nfe, grid=grid), x)

    assert error(DPMSolver(method="singlestep", kind="taylor"), 60, "quadratic") < 1e-4
    assert error(DPMSolver(), 60, "logsnr") < 1e-3
    third = DPMSolver(method="singlestep")
    ratio = error(third, 240, "logsnr") / error(third, 480, "logsnr")
    assert math.log2(ratio) == pytest.approx(3, abs=0.3)


@pytest.mark.parametrize("order", [2, 3])
def test_adaptive_tightens(order: int, smooth: tuple[Tensor, Tensor]) -> None:
    x, ref = smooth
    errors, spent = [], []
    for factor in (1.0, 0.1, 0.01):
        solver = DPMSolver(order=order, method="adaptive", atol=0.0078 * factor, rtol=0.05 * factor)
        got, info = sample(exact(), x, solver=solver, return_info=True)
        errors.append(path_rmse(got, ref))
        spent.append(info.nfe)
        assert info.nfe % order == 0
        assert (info.steps[0][0], info.steps[-1][1]) == (1.0, 1e-3)
    assert errors[0] > errors[1] > errors[2]
    assert spent[0] < spent[1] < spent[2]
    assert errors[2] < 1e-3


def test_adaptive_reports_errors_and_steps_on_after_rejections() -> None:
    steps: list[Any] = []
    solver = DPMSolver(order=3, method="adaptive", h_init=5.0)
    _, info = sample(exact(), noise(), solver=solver, callback=steps.append, return_info=True)
    assert info.nfe > 3 * len(info.steps)  # the first trial, half the range, was rejected, and counted
    assert all(step.error.shape == (32,) and bool((step.error <= 1).all()) for step in steps)
    assert steps[-1].last


def test_adaptive_gives_up_loudly() -> None:
    with pytest.raises(RuntimeError, match=r"spent 30 evaluations \(max_nfe=30\) and is at t=.* error"):
        sample(exact(), noise(), solver=DPMSolver(method="adaptive", rtol=1e-9, atol=1e-9, max_nfe=30))
    wild = Denoiser(lambda x, t: torch.sin(1e12 * (x + t[:, None])), VP())
    with pytest.raises(RuntimeError, match=r"no progress at t=.*: error .* with a step of"):
        sample(wild, noise(), solver=DPMSolver(method="adaptive", rtol=1e-12, atol=1e-12))
    with pytest.raises(ValueError, match="adaptive needs a finite lam"):
        sample(exact(Flow()), noise(), solver=DPMSolver(method="adaptive"))


@pytest.mark.parametrize(
    "solver",
    [DPMSolver(), DPMSolver(form="data"), DPMSolver(order=2, form="data", method="singlestep")],
)
def test_infinite_lam_is_refused_where_it_cannot_be_stepped(solver: DPMSolver) -> None:
    with pytest.raises(ValueError, match="lam is infinite"):
        sample(exact(Flow()), noise(), solver=solver, nfe=8, grid="time")
    with pytest.raises(ValueError, match="lam is infinite"):
        sample(exact(Flow(t_max=0.99)), noise(), solver=solver, nfe=8, grid="time")


def test_flow_from_pure_noise_to_clean_data() -> None:
    # alpha = 0 and sigma = 0 at the ends: the reference stops short of both
    near = Flow(t_min=1e-9, t_max=1 - 1e-9)
    ref = sample(exact(near), noise(), solver=DPMSolver(method="singlestep"), nfe=900)
    for order in (1, 2, 3):
        solver = DPMSolver(order=order, form="data", method="multistep", lower_order_final=False)
        x = sample(exact(Flow()), noise(), solver=solver, nfe=400, grid="time")
        assert path_rmse(x, ref) < (0.02 if order == 1 else 1e-3)


def test_start_is_the_processes_own_dtype_and_step_is_pure() -> None:
    process, x = PROCESSES["VP"], noise(3).float()
    values = [torch.ones_like(x), torch.zeros_like(x)]
    before = [v.clone() for v in (x, *values)]
    out = dpm_step(x, 0.8, 0.5, values, process, r=(0.5,))
    assert out.dtype == torch.float32
    assert all(torch.equal(a, b) for a, b in zip(before, (x, *values), strict=True))
    with pytest.raises(ValueError, match="values must be 1 to 3, and r one fewer, got 2 and 0"):
        dpm_step(x, 0.8, 0.5, values, process)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"order": 4}, "order must be at most 3, got 4"),
        ({"order": 0}, "order must be at least 1, got 0"),
        ({"form": "x0"}, "form must be one of 'eps', 'data', got 'x0'"),
        ({"method": "singlestep_fixed"}, "method must be one of"),
        ({"kind": "heun"}, "kind must be one of"),
        ({"order": 1, "method": "adaptive"}, 'order must be 2 or 3 for method="adaptive", got 1'),
        ({"sde": True}, 'sde needs method="multistep"'),
        ({"start": "singlestep"}, 'start="singlestep" needs'),
        ({"rtol": 0.0}, "rtol must be > 0, got 0.0"),
        ({"theta": 1.0}, "theta must be in"),
    ],
)
def test_bad_options_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DPMSolver(**options)


def test_bad_budgets_are_named() -> None:
    with pytest.raises(ValueError, match="nfe=2 is too few for order 3"):
        counted(DPMSolver(method="multistep"), nfe=2)
    with pytest.raises(ValueError, match="nfe=6 is too few for order 3 with start='singlestep'"):
        counted(DPMSolver(method="multistep", start="singlestep"), nfe=6)
    with pytest.raises(ValueError, match="needs a multiple of 3 intervals, got 4"):
        counted(DPMSolver(method="singlestep"), grid=VP().grid(4))
    with pytest.raises(ValueError, match="there is no plan"):
        DPMSolver(method="adaptive").plan(10, VP())
