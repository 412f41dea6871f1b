"""Every process against its defining equations, numerically."""

from __future__ import annotations

import math

import pytest
import torch
from generate_cases import BETAS, every_process

from polyak.generate import EDM, OU, VE, VP, CosineVP, Discrete, Flow, Process, TrigFlow


def inside(process: Process, n: int = 9) -> torch.Tensor:
    """Times within the range, off the knots of the discrete chain."""
    span = process.t_max - process.t_min
    return process.t_min + span * (torch.arange(n, dtype=torch.float64) + 0.50025) / n


def test_the_constants_of_the_usual_vp() -> None:
    process = VP(0.1, 20.0)
    assert process.alpha(0.5) == pytest.approx(0.2811828807967524, rel=1e-15)
    assert process.sigma(0.5) == pytest.approx(0.9596542020680363, rel=1e-15)
    assert process.lam(1.0) == pytest.approx(-5.024978406659204, rel=1e-15)
    assert process.lam(1e-3) == pytest.approx(4.557714932729898, rel=1e-14)


@every_process
def test_the_schedules_belong_together(process: Process) -> None:
    t = inside(process)
    alpha, sigma = process.alpha(t), process.sigma(t)
    assert torch.allclose(process.log_alpha(t).exp(), alpha, rtol=1e-14)
    assert torch.allclose(process.lam(t), alpha.log() - sigma.log(), atol=1e-12)
    assert torch.allclose(process.sigma_hat(t), sigma / alpha, rtol=1e-13)
    assert torch.allclose(process.t_of_lam(process.lam(t)), t, rtol=1e-12)
    assert bool((torch.diff(process.lam(t)) < 0).all())
    if isinstance(process, (VP, CosineVP, Discrete, TrigFlow)):
        assert torch.allclose(alpha**2 + sigma**2, torch.ones_like(t), rtol=1e-14)


@every_process
def test_derivatives_against_central_differences(process: Process) -> None:
    t = inside(process)
    h = 1e-6 * t
    for schedule, derivative in ((process.alpha, process.dalpha), (process.sigma, process.dsigma)):
        slope = (schedule(t + h) - schedule(t - h)) / (2 * h)
        assert torch.allclose(derivative(t), slope, rtol=1e-5, atol=1e-8)
    f, alpha, sigma = process.drift(t), process.alpha(t), process.sigma(t)
    assert torch.allclose(f, process.dalpha(t) / alpha, rtol=1e-10, atol=1e-14)
    # g^2 = d sigma^2/dt - 2 f sigma^2
    assert torch.allclose(process.diffusion2(t), 2 * sigma * process.dsigma(t) - 2 * f * sigma**2, rtol=1e-10)


def test_known_closed_forms() -> None:
    t = 0.37
    assert VP().diffusion2(t) == pytest.approx(0.1 + 19.9 * t)
    assert VP().drift(t) == pytest.approx(-0.5 * (0.1 + 19.9 * t))
    assert OU().diffusion2(t) == pytest.approx(1.0)
    assert OU().sigma(t) ** 2 == pytest.approx((1 - math.exp(-2 * t)) / 2)
    assert VE().sigma(0.5) == pytest.approx(math.sqrt(0.01 * 50))
    assert EDM().diffusion2(3.0) == pytest.approx(6.0)  # d sigma^2/dt = 2t
    assert (Flow().alpha(t), Flow().sigma(t)) == (pytest.approx(1 - t), pytest.approx(t))
    assert TrigFlow().alpha(t) == pytest.approx(math.cos(math.pi * t / 2))
    angle = math.pi / 2 / 1.008
    assert CosineVP().alpha(t) == pytest.approx(math.cos((t + 0.008) * angle) / math.cos(0.008 * angle))


def test_sigma_of_vp_keeps_its_digits_at_small_times() -> None:
    # sigma^2 = beta0 t + O(t^2): the naive 1 - alpha^2 has no digit left at t = 1e-14.
    process = VP(t_min=1e-15)
    assert process.sigma(1e-14) == pytest.approx(math.sqrt(0.1 * 1e-14), rel=1e-10)
    assert process.t_of_lam(process.lam(1e-14)) == pytest.approx(1e-14, rel=1e-10)


def test_the_ends_of_flows_are_exact() -> None:
    for process in (Flow(), TrigFlow()):
        assert (process.alpha(0.0), process.sigma(0.0)) == (1.0, 0.0)
        assert (process.alpha(1.0), process.sigma(1.0)) == (0.0, 1.0)
        assert process.lam(1.0) == -math.inf
        assert process.t_of_lam(-math.inf) == 1.0
        assert math.isfinite(process.dalpha(1.0))
        assert math.isfinite(process.dsigma(1.0))


def test_discrete_reads_its_table() -> None:
    process = Discrete(BETAS)
    products = torch.cumprod(1 - BETAS, 0)
    t = torch.arange(1, 1001, dtype=torch.float64) / 1000
    # alpha is the square root of alphas_cumprod
    assert torch.allclose(process.alpha(t), products.sqrt(), rtol=1e-12)
    assert torch.allclose(Discrete(alphas_cumprod=products).alpha(t), products.sqrt(), rtol=1e-12)
    assert torch.allclose(process.label(t), torch.arange(1000, dtype=torch.float64), atol=1e-9)
    assert torch.allclose(process.t_of_label(process.label(t)), t, rtol=1e-12)
    middle = process.log_alpha(0.5005)
    assert middle == pytest.approx((process.log_alpha(0.5) + process.log_alpha(0.501)) / 2, rel=1e-12)
    assert (process.alpha(0.0), process.sigma(0.0)) == (1.0, 0.0)
    assert (process.t_min, process.t_max) == (1e-3, 1.0)


def test_discrete_labels_have_their_own_scale() -> None:
    process = Discrete(torch.full((100,), 0.05), label_scale=1000)
    assert process.label(1.0) == pytest.approx(990.0)  # the factor is 1000, not N
    assert Discrete(torch.full((100,), 0.05)).label(1.0) == pytest.approx(99.0)


def test_discrete_leaves_out_the_hopeless_tail() -> None:
    t = torch.arange(1001, dtype=torch.float64) / 1000
    bar = torch.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2
    betas = (1 - bar[1:] / bar[:-1]).clamp(max=0.999)
    process = Discrete(betas)
    assert process.lam(process.t_max) >= -5.1 > process.lam(process.t_max + 1e-3)
    assert Discrete(betas, lam_min=-math.inf).t_max == 1.0
    # zero terminal SNR: alpha = 0 at the last point
    table = torch.linspace(0.9, 0.0, 10, dtype=torch.float64) ** 2
    assert Discrete(alphas_cumprod=table).t_max == 0.9


@pytest.mark.parametrize("kind", ["logsnr", "time", "quadratic", "karras"])
@every_process
def test_grids_decrease_from_end_to_end(process: Process, kind: str) -> None:
    times = process.grid(7, kind)
    assert times.dtype == torch.float64
    assert len(times) == 8
    assert (times[0].item(), times[-1].item()) == (process.t_max, process.t_min)
    assert bool((torch.diff(times) < 0).all())
    even = {
        "logsnr": process.lam(times),
        "time": times,
        "quadratic": times.sqrt(),
        "karras": process.sigma_hat(times) ** (1 / 7),
    }[kind]
    steps = torch.diff(even)
    assert torch.allclose(steps, steps.mean().expand_as(steps), rtol=1e-8)


def test_the_edm_grid_is_the_papers() -> None:
    n, rho = 18, 7
    i = torch.arange(n, dtype=torch.float64)
    low, high = 0.002 ** (1 / rho), 80.0 ** (1 / rho)
    expected = torch.cat([(high + i / (n - 1) * (low - high)) ** rho, torch.zeros(1, dtype=torch.float64)])
    assert torch.allclose(EDM().grid(n, "karras", end=0), expected, rtol=1e-12)
    assert EDM().grid(1, "karras", end=0).tolist() == [80.0, 0.0]


def test_numbers_tensors_and_dtypes() -> None:
    process = VP()
    assert isinstance(process.alpha(0.5), float)
    t = torch.tensor([[0.1, 0.5]], dtype=torch.float32)
    assert process.lam(t).shape == t.shape
    assert process.lam(t).dtype == torch.float32
    # computed in float64, rounded once
    assert torch.equal(process.lam(t), process.lam(t.double()).float())
    assert process.alpha(torch.tensor(0.5, dtype=torch.float16)).dtype == torch.float16
    with pytest.raises(ValueError, match=r"t must be floating point, got a tensor of torch.int64"):
        process.alpha(torch.tensor(1))
    with pytest.raises(ValueError, match="got nan"):
        process.alpha(math.nan)


@every_process
def test_perturb_and_prior(process: Process) -> None:
    x0 = torch.ones(5, 3, 2, dtype=torch.float64)
    before = x0.clone()
    t = inside(process, 5)
    x, noise = process.perturb(x0, t, generator=torch.Generator().manual_seed(0))
    for i in range(5):
        ti = t[i].item()
        assert torch.allclose(x[i], process.alpha(ti) * x0[i] + process.sigma(ti) * noise[i])
    assert torch.equal(x0, before)
    again, _ = process.perturb(x0, t, noise)
    assert torch.equal(again, x)
    prior = process.prior((20000, 2), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert prior.std().item() == pytest.approx(process.prior_std, rel=0.02)
    unit = math.sqrt(process.alpha(process.t_max) ** 2 + process.sigma(process.t_max) ** 2)
    assert process.prior_std == pytest.approx(unit, rel=2e-3)


def test_perturb_refuses_what_does_not_fit() -> None:
    x0 = torch.zeros(4, 2)
    with pytest.raises(ValueError, match="x0 must be floating point"):
        VP().perturb(x0.long(), 0.5)
    with pytest.raises(ValueError, match=r"t must be a number or have shape \(4,\).*got \(3,\)"):
        VP().perturb(x0, torch.full((3,), 0.5))
    with pytest.raises(ValueError, match="noise must have x0's shape"):
        VP().perturb(x0, 0.5, torch.zeros(4, 3))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: VP(beta0=-1.0), "beta0 must be > 0, got -1.0"),
        (lambda: VP(beta0=5.0, beta1=1.0), "beta1 must be above beta0=5, got 1.0"),
        (lambda: VP(t_min=2.0), "t_max must be in"),
        (lambda: EDM(sigma_min=0.0), "sigma_min must be > 0"),
        (lambda: VE(sigma_min=2.0, sigma_max=1.0), "sigma_max must be above sigma_min=2, got 1.0"),
        (lambda: Flow(t_max=1.5), "t_max must be in"),
        (lambda: Discrete(), "give either betas or alphas_cumprod"),
        (lambda: Discrete([0.1]), "at least 2 numbers"),
        (lambda: Discrete([0.1, 0.0, 0.1]), "does not at index 1"),
        (lambda: Discrete(alphas_cumprod=[0.9, 0.95]), "does not at index 1"),
        (lambda: VP().grid(0), "n must be at least 1, got 0"),
        (lambda: VP().grid(5, "karas"), "did you mean 'karras'"),
        (lambda: VP().grid(5, start=1.5), r"start must be in \[0.001, 1\].*got 1.5"),
        (lambda: VP().grid(5, end=1e-5), r"end must be in .*got 1e-05"),
        (lambda: VP().grid(5, start=0.5, end=0.6), "end must be below start=0.5, got 0.6"),
        (lambda: Flow().grid(5, "logsnr"), "cannot reach t=1, where lam is infinite"),
        (lambda: Discrete(BETAS).check_time("t", 5e-4), r"t must be in \[0.001, 1\]"),
    ],
)
def test_bad_arguments_are_named(make: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()  # type: ignore[operator]
