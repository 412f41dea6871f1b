"""PFGM++ against its equations (written here again), SciPy's laws and closed forms in one dimension."""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor, nn

from polyak.core.exact import Gaussian
from polyak.generate import (
    CFG,
    DDIM,
    EDM,
    GHVB,
    PFGMPP,
    RK4,
    Denoiser,
    DPMSolver,
    DPMSolverAdaptive,
    DPMSolverMultistep,
    DPMSolverSDE,
    DPMSolverSinglestep,
    Euler,
    Heun,
    Prediction,
    check_process,
    check_solver,
    inject_noise,
    invert,
    pfgmpp_loss,
    quantize_weights,
    sample,
    stf_target,
)  # fmt: skip
from polyak.generate.problems import ExactDenoiser, StudentDenoiser, gaussian_flow

INF = math.inf
F64 = torch.float64


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def zeros(n: int, *shape: int) -> Tensor:
    return torch.zeros(n, *shape, dtype=F64)


# --- the kernel: what is drawn


# 5, 50 and 95 % of the radius for N = 64, sigma = 1; of the root of D times a ratio of chi^2, by SciPy's beta law below
@pytest.mark.parametrize(
    ("D", "want"),
    [(1.0, (4.00, 11.8, 128)), (64.0, (6.51, 8.00, 9.84)), (2048.0, (6.81, 7.96, 9.17)), (INF, (6.82, 7.96, 9.15))],
)
def test_quantiles_of_the_radius(D: float, want: tuple[float, ...]) -> None:
    levels = torch.tensor([0.05, 0.5, 0.95], dtype=F64)
    n = 20_000
    drawn = PFGMPP(D, 64).radius(1.0, n, generator=rng())
    # A quantile's standard error, from the levels three of them away; 1 % is that of the figures above.
    spread = 3 * (levels * (1 - levels) / n).sqrt()
    low, high = (torch.quantile(drawn, levels + s) for s in (-spread, spread))
    assert bool((low < 1.005 * torch.tensor(want)).all())
    assert bool((high > 0.995 * torch.tensor(want)).all())
    x, _ = PFGMPP(D, 64).perturb(zeros(n, 64), 1.0, generator=rng(1))
    assert stats.ks_2samp(drawn.numpy(), x.norm(dim=1).numpy()).pvalue > 1e-3


@pytest.mark.parametrize(("D", "shape"), [(1.0, (3, 2, 2)), (7.5, (5,)), (64.0, (4, 4)), (0.5, (2,))])
@pytest.mark.parametrize("draw", ["perturb", "prior", "radius"])
def test_the_radius_is_that_of_a_beta_law_and_its_parameters_are_not_swapped(
    D: float, shape: tuple[int, ...], draw: str
) -> None:
    n, sigma, N = 4000, 0.3, math.prod(shape)
    process = PFGMPP(D, N, sigma_max=sigma)
    if draw == "perturb":
        made = process.perturb(zeros(n, *shape), sigma, generator=rng(3))[0].flatten(1).norm(dim=1)
    elif draw == "prior":
        made = process.prior((n, *shape), generator=rng(3), dtype=F64).flatten(1).norm(dim=1)
    else:
        made = process.radius(sigma, n, generator=rng(3))
    squared = (made / (sigma * math.sqrt(D))).square()
    b = (squared / (1 + squared)).numpy()
    assert stats.kstest(b, stats.beta(N / 2, D / 2).cdf).pvalue > 1e-3
    assert stats.kstest(b, stats.beta(D / 2, N / 2).cdf).pvalue < 1e-6


@pytest.mark.parametrize("D", [1.0, 64.0])
def test_directions_are_uniform_and_one_radius_is_that_of_the_whole_sample(D: float) -> None:
    n = 20_000
    x, noise = PFGMPP(D).perturb(zeros(n, 2, 3), 0.5, generator=rng(1))
    u = (x / x.flatten(1).norm(dim=1)[:, None, None]).flatten(1)
    assert bool((u.mean(0).abs() < 4 / math.sqrt(6 * n)).all())
    # E u u^T = I / 6; the fourth moments of a uniform direction are below 3 / 48.
    assert bool((u.T @ u / n - torch.eye(6, dtype=F64) / 6).abs().max() < 4 * math.sqrt(3 / 48 / n))
    # Were each channel drawn by itself, their radii would not go together.
    first, second = noise.norm(dim=2).log().T
    assert torch.corrcoef(torch.stack([first, second]))[0, 1] > {1.0: 0.6, 64.0: 0.02}[D]


def test_the_mean_squared_radius() -> None:
    n, D, N = 40_000, 12.0, 20
    squared = PFGMPP(D, N).radius(2.0, n, generator=rng()).square()
    assert abs(squared.mean().item() - N * 4 * D / (D - 2)) < 4 * squared.std().item() / math.sqrt(n)
    each = PFGMPP(D, N).radius(torch.full((n,), 2.0), n, generator=rng())
    assert torch.equal(each, squared.sqrt())


def test_all_D_share_their_normals_and_D_inf_is_EDM_itself() -> None:
    x0 = torch.randn(5, 3, 4, generator=rng(1))
    t = torch.rand(5, generator=rng(2)) + 0.1
    edm, _ = EDM().perturb(x0, t, generator=rng())
    gaussian, noise = PFGMPP(INF).perturb(x0, t, generator=rng())
    assert torch.equal(edm, gaussian)
    assert torch.equal(PFGMPP(INF).prior((4, 3), generator=rng()), EDM().prior((4, 3), generator=rng()))
    x, student = PFGMPP(3.0).perturb(x0, t, generator=rng())
    ratio = (student / noise).flatten(1)
    assert torch.allclose(ratio, ratio[:, :1].expand_as(ratio), rtol=1e-5)
    assert torch.allclose(x, x0 + t[:, None, None] * student, rtol=1e-5, atol=1e-6)
    big, _ = PFGMPP(1e10).perturb(x0, t, generator=rng())
    assert torch.allclose(big, edm, rtol=0, atol=1e-3)


def test_a_generator_for_each_row_makes_rows_independent_of_their_batch() -> None:
    process = PFGMPP(4.0)
    whole = process.prior((3, 2), generator=[rng(i) for i in range(3)])
    assert torch.equal(whole[1:2], process.prior((1, 2), generator=[rng(1)]))
    x, _ = process.perturb(torch.ones(3, 2), 0.5, generator=[rng(i) for i in range(3)])
    assert torch.equal(x[2:], process.perturb(torch.ones(1, 2), 0.5, generator=rng(2))[0])
    assert process.prior((0, 2), generator=[]).shape == (0, 2)
    assert process.perturb(torch.ones(0, 2), torch.ones(0))[0].shape == (0, 2)


# --- clip


def test_clip_bounds_training_and_never_the_prior() -> None:
    bound = math.sqrt(0.999 / 0.001)
    process = PFGMPP(1.0, 3072, clip=1e-3, sigma_max=1.0)
    x, _ = process.perturb(zeros(400, 3072), 1.0, generator=rng())
    radii = x.norm(dim=1)
    assert radii.max().item() <= bound * (1 + 1e-12)
    assert process.radius(1.0, 400, generator=rng()).max().item() <= bound * (1 + 1e-12)
    prior = process.prior((400, 3072), generator=rng(), dtype=F64).norm(dim=1)
    assert (prior > 1.01 * bound).double().mean().item() > 0.8
    narrow = PFGMPP(64.0, 2, clip=0.2)  # at the lower end, too
    assert narrow.perturb(zeros(400, 2), 1.0, generator=rng())[0].norm(dim=1).min().item() >= 8 * 0.5 * (1 - 1e-12)


def test_official_training_clips_most_radii_of_small_D() -> None:
    """Official code clips b to 1 - 1e-3 in training and not in sampling: with N = 3072 nearly all of PFGM's radii (D = 1)."""
    clipped = []
    for D in (1, 4, 16, 64, 128):
        beyond = stats.beta(3072 / 2, D / 2).sf(1 - 1e-3)
        radii = PFGMPP(D, 3072, clip=1e-3).radius(1.0, 4000, generator=rng())
        at_bound = (radii >= math.sqrt(D * 999) * (1 - 1e-9)).double().mean().item()
        assert abs(at_bound - beyond) < 4 * math.sqrt(max(beyond * (1 - beyond), 1e-6) / 4000)
        clipped.append(round(at_bound, 2))
    assert clipped[0] > 0.9
    assert clipped[1] > 0.4
    assert clipped[3:] == [0.0, 0.0]


# --- the kernel: its density


@pytest.mark.parametrize("D", [0.5, 1.0, 4.0, 64.0, 199.0, 201.0, 5000.0, INF])
@pytest.mark.parametrize("N", [1, 2, 7])
def test_log_kernel_is_that_of_scipy(D: float, N: int) -> None:
    x, y = torch.randn(2, 6, N, dtype=F64, generator=rng()) * 3
    sigma = 0.7
    got = PFGMPP(D, N).log_kernel(x, y, sigma)
    shape = np.eye(N) * sigma**2
    for i in range(6):
        law = (
            stats.multivariate_normal(y[i].numpy(), shape)
            if D == INF
            else stats.multivariate_t(y[i].numpy(), shape, df=D)
        )
        assert got[i].item() == pytest.approx(law.logpdf(x[i].numpy()), rel=1e-11, abs=1e-11)


@pytest.mark.parametrize("D", [1.0, 4.0, 64.0, INF])
def test_log_kernel_integrates_to_one(D: float) -> None:
    # x = s tan(u) carries the tails of one dimension; in two, the density of the radius is 2 pi R p(R).
    u = (torch.arange(20_000, dtype=F64) + 0.5) / 20_000
    line = math.pi * (u - 0.5)
    x, sigma = line.tan()[:, None], 0.7
    density = PFGMPP(D).log_kernel(x, torch.zeros_like(x), sigma).exp()
    assert (density * (1 + x[:, 0] ** 2)).mean().item() * math.pi == pytest.approx(1, abs=1e-6)
    radius = (math.pi / 2 * u).tan()
    plane = torch.stack([radius * math.cos(0.3), radius * math.sin(0.3)], 1)
    density = PFGMPP(D).log_kernel(plane, torch.zeros_like(plane), sigma).exp()
    total = (density * 2 * math.pi * radius * (1 + radius**2)).mean().item() * math.pi / 2
    assert total == pytest.approx(1, abs=1e-6 if D != 1 else 1e-3)  # D = 1: the integrand ends at a finite slope


def test_pfgm_on_the_line_is_cauchy_and_many_dimensions_are_gaussian() -> None:
    x = torch.linspace(-5, 5, 11, dtype=F64)[:, None]
    r = 0.4
    cauchy = -(math.pi * r * (1 + (x[:, 0] / r) ** 2)).log()
    assert torch.allclose(PFGMPP(1.0).log_kernel(x, zeros(1, 1), r), cauchy, rtol=1e-13)
    far = torch.randn(8, 64, dtype=F64, generator=rng())
    for D, bound in ((1e6, 1e-3), (1e12, 1e-9)):
        gap = PFGMPP(D).log_kernel(far, zeros(1, 64), 1.0) - PFGMPP(INF).log_kernel(far, zeros(1, 64), 1.0)
        assert gap.abs().max().item() < bound


@pytest.mark.parametrize("D", [3.0, 199.0, 201.0, 1e4, 1e8, 1e13])
def test_the_kernels_largest_value_keeps_its_digits_at_any_D(D: float) -> None:
    # With two dimensions more it is (N + D) / D / (2 pi sigma^2) times as large.
    sigma = 1 / math.sqrt(2 * math.pi)
    top = [PFGMPP(D).log_kernel(zeros(1, N), zeros(1, N), sigma).item() for N in (64, 66)]
    assert top[1] - top[0] == pytest.approx(math.log1p(64 / D), abs=1e-12)


def test_weights_of_thousands_of_dimensions_neither_vanish_nor_overflow() -> None:
    N, D, sigma = 3072, 2048.0, 0.01
    data = torch.randn(5, N, dtype=F64, generator=rng())
    x = (data[:2] + 0.5 * data[2:4]).float()
    logs = PFGMPP(D).posterior_weights(x, data, sigma).log()
    distances = np.square((x.double()[:, None] - data).numpy()).sum(2)
    want = -(N + D) / 2 * np.log(distances + D * sigma**2)
    want -= np.log(np.exp(want - want.max(1, keepdims=True)).sum(1, keepdims=True)) + want.max(1, keepdims=True)
    assert np.allclose(logs.exp().numpy(), np.exp(want), atol=1e-12)
    assert logs.isnan().sum().item() == 0
    assert logs.exp().sum(1).tolist() == pytest.approx([1, 1])
    near = PFGMPP(D).posterior_weights(data[:2] + 1e-3, data, 1e-4)  # N + D = 5120 as an exponent
    assert near.argmax(1).tolist() == [0, 1]
    assert bool(near.isfinite().all())
    far = [PFGMPP(4.0).posterior_weights(data[:2, :3] + c, data[:, :3] + c, 0.5) for c in (0.0, 1e7)]
    assert torch.allclose(*far, atol=1e-6)  # distances are of differences, not of squares


# --- the equation


def student_cdf(x: Tensor, D: float) -> Tensor:
    return torch.from_numpy(stats.norm.cdf(x) if D == INF else stats.t(D).cdf(x))


def quantiles(points: Tensor, levels: Tensor, sigma: float, D: float) -> Tensor:
    """Of the points' mixture of Student laws, by bisection."""
    low, high = (torch.full_like(levels, sign * (1e3 + 1e3 * sigma)) for sign in (-1, 1))
    for _ in range(90):
        x = (low + high) / 2
        below = student_cdf((x[:, None] - points) / sigma, D).mean(1) < levels
        low, high = torch.where(below, x, low), torch.where(below, high, x)
    return x


POINTS = torch.tensor([[-1.0], [0.3], [1.1]], dtype=F64)
LEVELS = torch.tensor([0.07, 0.2, 0.45, 0.6, 0.8, 0.93], dtype=F64)
SOLVERS = (
    (Euler(), 0.2), (DDIM(), 0.2), (Heun(), 2e-3), (RK4(), 2e-4), (DPMSolver(order=3), 2e-3), (DPMSolverSinglestep(), 2e-3),
    (DPMSolverMultistep(order=2, form="data"), 1e-2), (DPMSolverAdaptive(), 0.05),
)  # fmt: skip


@pytest.mark.parametrize(("solver", "bound"), SOLVERS, ids=repr)
@pytest.mark.parametrize("D", [1.0, 4.0, INF])
def test_every_ode_solver_keeps_the_quantiles_of_the_student_law(D: float, solver: Any, bound: float) -> None:
    """On the line the field moves mass without changing its order: x(sigma) is the same quantile at every sigma."""
    process = PFGMPP(D, sigma_min=0.1, sigma_max=3.0)
    start, end = (quantiles(POINTS[:, 0], LEVELS, s, D)[:, None] for s in (3.0, 0.1))
    denoiser = StudentDenoiser(POINTS, process)
    how: dict[str, Any] = {} if solver.adaptive else {"nfe": 96, "grid": "logsnr"}
    got = sample(denoiser, start, solver=solver, **how)
    assert (got - end).abs().max().item() < bound
    if D == 1.0 and solver.order > 1 and not solver.adaptive:
        back = invert(denoiser, got, solver=solver, nfe=96, grid="logsnr")
        assert (back / start - 1).abs().max().item() < 10 * bound
        gaussian = Denoiser(StudentDenoiser(POINTS, PFGMPP(INF))._posterior, process, "sample", label=lambda t: t)
        wrong = sample(gaussian, start, solver=solver, nfe=96, grid="logsnr")
        assert (wrong - end).abs().max().item() > 0.1


@pytest.mark.parametrize("D", [1.0, 4.0, 64.0])
def test_the_prior_is_carried_to_the_data(D: float) -> None:
    data = torch.tensor([[1.0, 0.0], [-1.0, 0.5], [-1.0, 0.5]], dtype=F64)  # one of two points counts twice
    n = 1500
    process = PFGMPP(D, 2, sigma_min=0.002, sigma_max=60.0)
    grid = process.grid(24, "karras", end=0)
    x = sample(StudentDenoiser(data, process), (n, 2), solver=Heun(), grid=grid, generator=rng(), dtype=F64)
    distances = torch.cdist(x, data[:2])
    assert (distances.min(1).values < 0.02).double().mean().item() > 0.99
    share = (distances.argmin(1) == 0).double().mean().item()
    assert abs(share - 1 / 3) < 3 * math.sqrt(2 / 9 / n)


@pytest.mark.parametrize("D", [1.0, 7.0, INF])
def test_the_denoiser_of_one_point_is_that_point(D: float) -> None:
    one = torch.tensor([[0.3, -2.0]], dtype=F64)
    made = StudentDenoiser(one, PFGMPP(D))(torch.randn(5, 2, generator=rng()), 0.7)
    assert torch.allclose(made.x0, one.float().expand(5, 2))


def test_the_equation_in_r_and_in_sigma_has_one_solution() -> None:
    D, data = 6.0, POINTS.numpy()[:, 0]

    def field(x: np.ndarray, r: float) -> np.ndarray:
        """E_x / E_r of the charges, equation (4), without sigma."""
        gap = x[:, None] - data
        strength = (gap**2 + r**2) ** (-(1 + D) / 2)
        return (strength * gap).sum(1) / (strength * r).sum(1)

    process = PFGMPP(D, sigma_min=0.2, sigma_max=2.0)
    start = np.array([-3.0, -0.4, 0.9, 5.0])
    times = process.grid(40, "logsnr").numpy() * math.sqrt(D)  # r
    x = start
    for a, b in itertools.pairwise(times):
        h = b - a
        k1 = field(x, a)
        k2 = field(x + h / 2 * k1, a + h / 2)
        k3 = field(x + h / 2 * k2, a + h / 2)
        k4 = field(x + h * k3, b)
        x = x + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
    got = sample(
        StudentDenoiser(POINTS, process), torch.from_numpy(start)[:, None], solver=RK4(), steps=40, grid="logsnr"
    )
    assert np.allclose(got[:, 0].numpy(), x, rtol=0, atol=1e-12)


def golden(x: float, D: float, points: list[float], times: list[float]) -> float:
    """EDM's Heun in plain floats, the last step Euler's."""

    def slope(x: float, s: float) -> float:
        weights = [((x - y) ** 2 + D * s * s) ** (-(1 + D) / 2) for y in points]
        return (x - sum(w * y for w, y in zip(weights, points, strict=True)) / sum(weights)) / s

    for a, b in itertools.pairwise(times):
        first = slope(x, a)
        x, ahead = x + (b - a) * first, x
        if b:
            x = ahead + (b - a) * (first + slope(x, b)) / 2
    return x


PINNED = [-0.9784303660915289, 0.35978555447335037, 1.0607093541756003]


def test_golden_trajectory() -> None:
    smin, smax, n = 0.3, 20.0, 5
    times = [(smax ** (1 / 7) + i / (n - 1) * (smin ** (1 / 7) - smax ** (1 / 7))) ** 7 for i in range(n)] + [0.0]
    process = PFGMPP(4.0, sigma_min=smin, sigma_max=smax)
    starts = [-30.0, 1.0, 17.0]
    grid = process.grid(n, "karras", end=0)
    x = torch.tensor(starts, dtype=F64)[:, None]
    got, info = sample(StudentDenoiser(POINTS, process), x, solver=Heun(), grid=grid, return_info=True)
    assert info.nfe == 2 * n - 1
    want = [golden(s, 4.0, POINTS[:, 0].tolist(), times) for s in starts]
    assert got[:, 0].tolist() == pytest.approx(want, rel=1e-10)
    assert got[:, 0].tolist() == pytest.approx(PINNED, rel=1e-9)


# --- how it fits the room


@pytest.mark.parametrize("D", [1.0, 2.5, 128.0, INF])
def test_it_is_a_process(D: float) -> None:
    process = PFGMPP(D)
    check_process(process)
    assert process.is_gaussian is (D == INF)
    assert process == PFGMPP(D) != PFGMPP(D, sigma_max=81.0)
    assert torch.equal(process.grid(7, "karras", end=0), EDM().grid(7, "karras", end=0))
    assert dataclasses.replace(process, sigma_max=300.0).D == D


STOCHASTIC = (DDIM(1.0), DPMSolverSDE())


@pytest.mark.parametrize("solver", STOCHASTIC, ids=repr)
def test_stochastic_solvers_are_refused_with_the_reason(solver: Any) -> None:
    denoiser = StudentDenoiser(POINTS, PFGMPP(4.0))
    with pytest.raises(ValueError, match=r"needs Gaussian noise, which PFGMPP.* has not; use a deterministic solver"):
        sample(denoiser, (2, 1), solver=solver, steps=5)
    assert sample(StudentDenoiser(POINTS, PFGMPP(INF)), (2, 1), solver=solver, steps=5).shape == (2, 1)
    diffusers = pytest.importorskip("polyak.generate.adapters.diffusers")
    with pytest.raises(ValueError, match="Gaussian"):
        diffusers.as_diffusers(solver, PFGMPP(4.0), "sample").set_timesteps(5)


def test_there_is_no_score_no_likelihood_and_no_sde() -> None:
    process, x = PFGMPP(4.0), torch.ones(2, 1)
    with pytest.raises(ValueError, match="no Gaussian noise, hence no score"):
        _ = Prediction(x, x, 0.5, process, "epsilon").score
    with pytest.raises(ValueError, match="no Gaussian noise, hence no score"):
        Prediction(x, x, 0.5, process, "score")
    scores = Denoiser(lambda x, t: -x, process, "score")
    for solver in (Euler(), DPMSolver()):  # also where sample() folds the weights without a Prediction
        with pytest.raises(ValueError, match="hence no score"):
            sample(scores, (2, 1), solver=solver, steps=3)
    with pytest.raises(ValueError, match="no forward SDE and no Gaussian score: use an ODE solver"):
        process.diffusion2(0.5)
    assert PFGMPP(INF).diffusion2(0.5) == pytest.approx(EDM().diffusion2(0.5))
    with pytest.raises(ValueError, match="exact for Gaussian noise only"):
        ExactDenoiser(Gaussian([0.0]), process)
    with pytest.raises(ValueError, match="exact for Gaussian noise only"):
        gaussian_flow(Gaussian([0.0]), process, torch.ones(1, 1, dtype=F64), 2.0, 1.0)


def test_a_variance_is_asked_for_only_where_there_is_one() -> None:
    assert PFGMPP(10.0).prior_std == pytest.approx(80 * math.sqrt(10 / 8))
    for D in (0.5, 1.0, 2.0):
        with pytest.raises(ValueError, match=r"PFGM\+\+ with D <= 2 has infinite variance"):
            _ = PFGMPP(D).prior_std


def test_guidance_correction_and_steps_of_its_own_dtype() -> None:
    process = PFGMPP(8.0, sigma_max=10.0)
    one, two = (StudentDenoiser(p, process) for p in (POINTS[:1], POINTS[1:]))
    both = Denoiser(one._posterior, process, "sample", unconditional=two._posterior, label=lambda t: t)
    grid = process.grid(12, "karras", end=0)
    x = sample(both, (64, 1), solver=Heun(), grid=grid, guidance=CFG(0.0), generator=rng())
    assert torch.cdist(x.double(), POINTS[1:]).min(1).values.max() < 1e-2
    held = sample(two, (64, 1), solver=Heun(), grid=grid, corrector=lambda x0, t: x0.clamp(-0.5, 0.5), generator=rng())
    assert held.abs().max() <= 0.5 + 1e-3
    half = sample(one, (8, 1), solver=Heun(), grid=grid, generator=rng(), dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16
    assert bool((half.double() + 1).abs().max() < 0.02)


@pytest.mark.parametrize("D", [1.0, 128.0])
def test_it_runs_in_diffusers_as_in_sample(D: float, tmp_path: Any) -> None:
    """Only the initial latents differ from EDM's."""
    pytest.importorskip("diffusers")
    from polyak.generate.adapters.diffusers import PolyakScheduler, as_diffusers

    process = PFGMPP(D, 4)
    x = process.prior((3, 1, 2, 2), generator=rng(), dtype=F64)
    network = nn.Sequential(nn.Flatten(), nn.Linear(4, 4), nn.Unflatten(1, (1, 2, 2))).double()
    denoiser = Denoiser(lambda x, t: network(x) + t[:, None, None, None], process, "edm")
    want = sample(denoiser, x, solver=Heun(), steps=6, grid="karras")
    scheduler = as_diffusers(Heun(), process, "edm", grid="karras")
    scheduler.save_pretrained(tmp_path)
    scheduler = PolyakScheduler.from_pretrained(tmp_path)
    assert scheduler.process == process
    scheduler.set_timesteps(6)
    with torch.no_grad():
        for t in scheduler.timesteps:
            output = network(scheduler.scale_model_input(x, t)) + t
            x = scheduler.step(output, t, x).prev_sample
    assert torch.allclose(x, want, rtol=1e-5, atol=1e-6)  # timesteps are in single precision
    if D > 2:  # a pipeline multiplies the latents that it is given by this
        assert scheduler.init_noise_sigma == pytest.approx(80 * math.sqrt(128 / 126))


def test_configurations_of_edm_schedulers_take_it() -> None:
    diffusers = pytest.importorskip("diffusers")
    from polyak.generate.adapters.diffusers import PolyakScheduler

    config = diffusers.EDMEulerScheduler().config
    ours, theirs = (PolyakScheduler.from_config(config, solver=Heun(), process=p) for p in (PFGMPP(64.0), EDM()))
    x = PFGMPP(64.0).prior((2, 1, 2, 2), generator=rng())
    ends = []
    for scheduler in (ours, theirs):
        scheduler.set_timesteps(5)
        made = x
        for t in scheduler.timesteps:
            made = scheduler.step(torch.tanh(scheduler.scale_model_input(made, t)), t, made).prev_sample
        ends.append(made)
    assert torch.equal(*ends)
    assert not torch.equal(ends[0], x)


# --- training


class Net(nn.Module):
    """Two layers of the image and its label."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(5, 8), nn.Linear(8, 4)
        self.seen: list[tuple[Tensor, Tensor]] = []

    def forward(self, x: Tensor, label: Tensor) -> Tensor:
        self.seen.append((x.detach(), label.detach()))
        return self.outer(torch.tanh(self.inner(torch.cat([x.flatten(1), label[:, None]], 1)))).reshape(x.shape)


def net() -> Net:
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        return Net()


Y = torch.randn(6, 1, 2, 2, generator=torch.Generator().manual_seed(8))


def gradients(loss: Tensor, model: nn.Module) -> list[Tensor]:
    return list(torch.autograd.grad(loss, list(model.parameters())))


def test_the_loss_of_D_inf_is_edms_number_by_number() -> None:
    model, g = net(), rng(4)
    sigma = (1.2 * torch.randn(6, generator=g) - 1.2).exp()
    x, _ = EDM().perturb(Y, sigma, generator=g)
    weight = (sigma**2 + 0.25) / (sigma * 0.5) ** 2
    error = (Denoiser(model, EDM(), "edm")(x, sigma).x0 - Y).square()
    edm = (weight[:, None, None, None] * error).flatten(1).sum(1).mean()
    process = PFGMPP(INF, 4)
    ours = pfgmpp_loss(Denoiser(model, process, "edm"), Y, process, generator=rng(4))
    assert torch.equal(ours, edm)
    assert all(map(torch.equal, gradients(ours, model), gradients(edm, model)))
    finite = pfgmpp_loss(Denoiser(model, PFGMPP(16.0), "edm"), Y, PFGMPP(16.0), generator=rng(4))
    assert not torch.equal(finite, edm)


def test_the_loss_is_its_formula_and_networks_are_told_sigma_not_r() -> None:
    model, process, sd, g = net(), PFGMPP(9.0), 0.8, rng(5)
    sigma = (0.9 * torch.randn(6, generator=g) - 0.7).exp()
    x, _ = process.perturb(Y, sigma, generator=g)
    s = sigma[:, None, None, None].double()
    scaled = (x / (s**2 + sd**2).sqrt()).float()
    F = model(scaled, (sigma.double().log() / 4).float())
    x0 = sd**2 / (s**2 + sd**2) * x + s * sd / (s**2 + sd**2).sqrt() * F
    want = ((s**2 + sd**2) / (s * sd) ** 2 * (x0 - Y) ** 2).flatten(1).sum(1).mean()
    denoiser = Denoiser(model, process, "edm", sigma_data=sd)
    got = pfgmpp_loss(denoiser, Y, process, P_mean=-0.7, P_std=0.9, generator=rng(5))
    assert got.item() == pytest.approx(want.item(), rel=1e-5)
    (x_seen, label), (x_again, label_again) = model.seen
    assert torch.allclose(x_seen, x_again, rtol=1e-5)
    assert torch.allclose(label, label_again, rtol=1e-5)
    # The field's form (equation 10): the same error, weighted for f = (x - x0) sqrt(D) / r.
    f, target = (x - x0) / s, (x - Y) / s
    weight = (s**2 + sd**2) / sd**2
    assert got.item() == pytest.approx((weight * (f - target) ** 2).flatten(1).sum(1).mean().item(), rel=1e-5)
    assert pfgmpp_loss(denoiser, Y, process, sigma_data=0.5, generator=rng(5)).item() != pytest.approx(got.item())


def test_the_loss_of_data_in_half_precision_is_computed_in_single() -> None:
    process = PFGMPP(64.0, sigma_min=1e-5)
    denoiser = Denoiser(lambda x, label: torch.tanh(x), process, "edm")
    for dtype in (torch.float16, torch.bfloat16):  # at sigma = e^-6 the weight is beyond float16
        loss = pfgmpp_loss(denoiser, Y.to(dtype), process, P_mean=-6.0, P_std=0.0, generator=rng())
        assert loss.dtype == torch.float32
        assert 0 < loss.item() < 100


def test_samples_of_one_number_need_no_further_dimension() -> None:
    process = PFGMPP(4.0, 1, clip=1e-3)
    denoiser = Denoiser(lambda x, label: torch.tanh(x), process, "edm")

    def made(y: Tensor) -> list[Tensor]:
        x, _ = process.perturb(y, 0.5, generator=rng())
        laws = process.log_kernel(x, y, 0.5), process.posterior_weights(x, y, 0.5), stf_target(x, y, 0.5, process)
        return [x, *laws, pfgmpp_loss(denoiser, y, process, generator=rng())]

    flat = Y[:, 0, 0, 0]
    for one, other in zip(made(flat), made(flat[:, None]), strict=True):
        assert torch.allclose(one, other.reshape(one.shape))


def test_the_loss_is_least_at_the_exact_denoiser() -> None:
    process, generator = PFGMPP(4.0), rng()
    exact = StudentDenoiser(POINTS, process)
    gaussian = Denoiser(StudentDenoiser(POINTS, PFGMPP(INF))._posterior, process, "sample", label=lambda t: t)
    y = POINTS[torch.randint(3, (4000,), generator=generator)]
    own, other = (pfgmpp_loss(d, y, process, P_mean=-0.5, generator=rng(1)).item() for d in (exact, gaussian))
    assert own < 0.995 * other


def test_the_target_of_a_reference_batch() -> None:
    process, sigma = PFGMPP(5.0), torch.tensor([0.3, 0.9, 2.0])
    x, reference = torch.randn(3, 1, 2, 2, generator=rng()), torch.randn(7, 1, 2, 2, generator=rng(1))
    want = np.zeros((3, 4))
    for i in range(3):
        gap = x[i].double().flatten().numpy() - reference.double().flatten(1).numpy()
        w = ((gap**2).sum(1) + 5 * sigma[i].double().item() ** 2) ** (-(4 + 5) / 2)
        want[i] = w @ reference.double().flatten(1).numpy() / w.sum()
    got = stf_target(x, reference, sigma, process)
    assert got.shape == x.shape
    assert got.dtype == x.dtype
    assert not stf_target(x.clone().requires_grad_(), reference, sigma, process).requires_grad
    assert np.allclose(got.flatten(1).numpy(), want, atol=1e-6)
    assert torch.allclose(stf_target(x, Y[:1], sigma, process), Y[:1].expand_as(x))
    model = net()
    denoiser = Denoiser(model, process, "edm")
    alone, known = (pfgmpp_loss(denoiser, Y, process, generator=rng(2), reference=r) for r in (None, Y))
    assert alone.item() != known.item()
    assert all(map(torch.isfinite, (alone, known)))


# --- robustness


@pytest.mark.parametrize("solver", [Heun(), DPMSolver(order=3), DPMSolverMultistep(order=2, form="data")], ids=repr)
def test_no_noise_injected_is_the_solver_itself(solver: Any) -> None:
    denoiser = StudentDenoiser(POINTS, PFGMPP(4.0, sigma_max=5.0))
    want = sample(denoiser, (8, 1), solver=solver, nfe=12, generator=rng())
    same = inject_noise(solver, 0.0)
    assert torch.equal(sample(denoiser, (8, 1), solver=same, nfe=12, generator=rng()), want)
    assert not same.stochastic
    assert repr(same) == f"inject_noise({solver!r}, alpha=0)"


@pytest.mark.parametrize("solver", [Heun(), GHVB(3, 0.7), DPMSolverMultistep(order=2)], ids=repr)
def test_with_noise_a_solver_is_what_it_was_but_stochastic(solver: Any) -> None:
    noisy = inject_noise(solver, 0.3)
    for fact in ("order", "tapers", "stages", "needs_gaussian", "history", "grid", "no_corrector", "reaches_zero"):
        assert getattr(noisy, fact) == getattr(solver, fact), fact
    assert noisy.stochastic
    steps: list[Any] = []
    denoiser, states = StudentDenoiser(POINTS, PFGMPP(4.0, sigma_max=5.0)), []
    generator = rng(3)

    def heard(step: Any) -> None:
        steps.append(step)
        states.append(generator.get_state())

    run: dict[str, Any] = {"solver": noisy, "steps": 6, "generator": generator}
    whole = sample(denoiser, PFGMPP(4.0).prior((4, 1), generator=rng()), callback=heard, **run)
    generator.set_state(states[2])
    assert torch.equal(sample(denoiser, steps[2], **run), whole)  # with what the solver remembers


def test_a_solver_without_noise_passes_as_a_solver() -> None:
    check_solver(
        inject_noise(DPMSolverMultistep(order=2, form="data"), 0.0), PFGMPP(2.5, sigma_min=0.05, sigma_max=5.0)
    )


def test_noise_is_injected_before_every_step_and_sigma_stays() -> None:
    process, alpha = PFGMPP(4.0, sigma_max=5.0), 0.3
    denoiser, start = StudentDenoiser(POINTS, process), process.prior((4, 1), generator=rng(1), dtype=F64)
    grid = process.grid(5, "karras", end=0)
    got = sample(denoiser, start, solver=inject_noise(Heun(), alpha), grid=grid, generator=rng(2))
    x, g, times = start, rng(2), grid.tolist()
    for a, b in itertools.pairwise(times):
        x = x + alpha * a * torch.randn(4, 1, dtype=F64, generator=g)
        slope = (x - denoiser(x, a).x0) / a
        ahead = x + (b - a) * slope
        x = x + (b - a) * (slope + (ahead - denoiser(ahead, b).x0) / b) / 2 if b else ahead
    assert torch.allclose(got, x, rtol=1e-12, atol=1e-12)
    with pytest.raises(ValueError, match="only a deterministic solver can be inverted"):
        invert(denoiser, start, solver=inject_noise(Heun(), alpha), steps=5)
    with pytest.raises(ValueError, match="adaptive"):
        inject_noise(DPMSolverAdaptive(), alpha)
    with pytest.raises(ValueError, match="needs Gaussian noise"):
        sample(denoiser, start, solver=inject_noise(DDIM(1.0), alpha), steps=5)


@pytest.mark.parametrize("bits", [1, 2, 5, 16])
def test_weights_are_rounded_to_as_many_levels(bits: int) -> None:
    model = nn.Sequential(nn.Linear(30, 40), nn.LayerNorm(40), nn.Linear(40, 3))
    before = {name: p.clone() for name, p in model.named_parameters()}
    made = quantize_weights(model, bits)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    for name, p in made.named_parameters():
        w = before[name]
        if w.ndim < 2:
            assert torch.equal(p, w)
            continue
        step = (w.max() - w.min()).item() / (2**bits - 1)
        assert len(p.unique()) <= 2**bits
        assert (p - w).abs().max().item() <= step / 2 + 1e-7
        assert p.min() == w.min()
        assert p.max().item() == pytest.approx(w.max().item(), rel=1e-6)
    half = nn.Linear(30, 40).half()
    single = quantize_weights(half.float(), bits).weight
    assert torch.equal(quantize_weights(half.half(), bits).weight, single.half())
    tied = nn.Linear(4, 4)
    nn.init.constant_(tied.weight, 0.3)
    both = quantize_weights(nn.ModuleList([tied, tied]), 4)
    assert both[0] is both[1]
    assert torch.equal(both[0].weight, tied.weight)


# --- bad input


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: PFGMPP(0.0), "D must be > 0, got 0"),
        (lambda: PFGMPP(-3.0), "D must be > 0, got -3"),
        (lambda: PFGMPP(math.nan), "D must be"),
        (lambda: PFGMPP(4.0, 0), "N must be at least 1, got 0"),
        (lambda: PFGMPP(clip=0.5), "clip must be in"),
        (lambda: PFGMPP(sigma_min=2.0, sigma_max=1.0), "sigma_max must be above sigma_min"),
        (lambda: PFGMPP(4.0, 3).prior((2, 4)), r"a sample must have N=3 elements, got shape \(2, 4\)"),
        (lambda: PFGMPP(4.0, 3).perturb(torch.ones(2, 4), 0.5), r"a sample must have N=3 elements"),
        (lambda: PFGMPP(4.0, 3).log_kernel(torch.ones(2, 4), torch.ones(2, 4), 0.5), "N=3"),
        (lambda: PFGMPP(4.0).radius(1.0, 3), r"give PFGMPP\(N=...\)"),
        (lambda: PFGMPP(4.0, 3).radius(0.0, 3), "sigma must be > 0, got 0"),
        (lambda: PFGMPP(4.0).log_kernel(torch.ones(2, 4), torch.ones(2, 4), 0.0), "sigma must be > 0, got 0"),
        (lambda: PFGMPP(4.0).posterior_weights(torch.ones(2, 4), torch.ones(3, 4), torch.zeros(2)), "sigma must be > 0"),
        (lambda: PFGMPP(4.0).posterior_weights(torch.ones(2, 4), torch.ones(3, 4), torch.ones(3)), r"shape \(2,\)"),
        (lambda: PFGMPP(4.0).posterior_weights(torch.ones(2, 4), torch.ones(3, 5), 1.0),
         r"data must hold at least one sample of x's shape, got \(3, 5\) for x of shape \(2, 4\)"),
        (lambda: PFGMPP(4.0).posterior_weights(torch.ones(2, 4), torch.ones(0, 4), 1.0), "data must hold at least one sample"),
        (lambda: PFGMPP(4.0).log_kernel(torch.ones(2, 4), torch.ones(2, 5), 1.0), "y must have x's shape"),
        (lambda: PFGMPP(4.0).log_kernel(torch.ones(6, 4), torch.ones(2, 4), 1.0), "y must have x's shape"),
        (lambda: PFGMPP(4.0).log_kernel(torch.tensor(1.0), torch.tensor(1.0), 1.0), "x must be a .* at least 1 dimension"),
        (lambda: PFGMPP(4.0).perturb(torch.ones(2, 4).long(), 0.5), "x0 must be floating point"),
        (lambda: PFGMPP(4.0).perturb(torch.ones(2, 4), torch.ones(3)), r"shape \(2,\)"),
        (lambda: StudentDenoiser(torch.ones(3), PFGMPP()), r"points must have shape \(n, d\)"),
        (lambda: pfgmpp_loss(Denoiser(net(), PFGMPP(3.0), "edm"), Y, PFGMPP(4.0)), "process must be the denoiser's own"),
        (lambda: quantize_weights(net(), 0), "bits must be at least 1"),
        (lambda: inject_noise(Heun(), -0.1), "alpha must be >= 0"),
    ],
)  # fmt: skip
def test_bad_input_is_named(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_a_refused_draw_leaves_the_generator_as_it_was() -> None:
    g = rng()
    before = g.get_state()
    for bad in (dict(x0=torch.ones(2, 4), t=torch.ones(3)), dict(x0=torch.ones(2, 5), t=1.0)):
        with pytest.raises(ValueError, match="shape"):
            PFGMPP(4.0, 4).perturb(**bad, generator=g)
    assert torch.equal(g.get_state(), before)


def test_what_float16_cannot_hold_is_refused_or_clamped_and_counted() -> None:
    x0 = torch.zeros(500, 64, dtype=torch.float16)
    with pytest.raises(
        ValueError, match=r"D=1: \d+ of 32000 elements are beyond 65504.*draw in a wider dtype, or give clip="
    ):
        PFGMPP(1.0).perturb(x0, 500.0, generator=rng())
    with pytest.warns(RuntimeWarning, match="elements are beyond 65504, .*, and were clamped") as said:
        made = PFGMPP(1.0, clip=1e-9).prior((500, 64), generator=rng(), dtype=torch.float16)
    assert made.dtype == torch.float16
    assert f"{int((made.abs() == 65504).sum())} of 32000" in str(said[0].message)
    wide = PFGMPP(1.0).prior((500, 64), generator=rng(), dtype=torch.float32)
    assert bool(((made.abs() == 65504) == (wide.abs() > 65503)).double().mean() > 0.999)
    assert PFGMPP(128.0).prior((500, 64), generator=rng(), dtype=torch.float16).isfinite().all()
    with pytest.raises(ValueError, match="beyond"):
        PFGMPP(0.02).prior((500, 2), generator=rng(), dtype=torch.float32)


@pytest.mark.gpu
def test_on_a_gpu() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    process, g = PFGMPP(4.0, 2), torch.Generator("cuda").manual_seed(0)
    x = process.prior((20_000, 2), generator=g)
    assert x.device.type == "cuda"
    squared = (x.double().norm(dim=1) / 160).square()
    assert stats.kstest((squared / (1 + squared)).cpu().numpy(), stats.beta(1, 2).cdf).pvalue > 1e-3
    made = sample(StudentDenoiser(POINTS, PFGMPP(4.0)), (4, 1), solver=Heun(), steps=10, generator=g)
    assert made.device.type == "cuda"
    x, _ = process.perturb(torch.ones(4, 2, device="cuda"), torch.ones(4), generator=g)
    assert x.device.type == "cuda"
