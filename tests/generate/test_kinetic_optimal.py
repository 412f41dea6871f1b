"""Kinetic-optimal paths against closed forms, brute force and SciPy; the separation function against laws that are known."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from scipy import integrate, optimize
from torch import Tensor

from polyak.generate import (
    CFG,
    VP,
    Denoiser,
    DPMSolverMultistep,
    Euler,
    Flow,
    KineticOptimal,
    Separation,
    TrigFlow,
    check_process,
    conditional_flow_matching_loss,
    denoising_loss,
    gaussian_separation,
    kinetic_energy,
    reparametrize,
    sample,
    separation_function,
)
from polyak.generate.kinetic_optimal import separation as module
from polyak.generate.kinetic_optimal.separation import metric_of
from polyak.generate.problems import ExactDenoiser, Gaussian, Mixture, gaussian_flow, kde

SPECTRUM = [3.0, 0.6, 0.4, 0.0]
SEPARATION = gaussian_separation(SPECTRUM)
KO = KineticOptimal(SEPARATION)
T = torch.linspace(0, 1, 41, dtype=torch.float64)
LADDER = [0.05, 0.3, 1.0, 3.0, 10.0]


def ones(snr: Tensor) -> Tensor:
    return torch.ones_like(snr)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def cloud(n: int, d: int, seed: int = 0) -> Tensor:
    """n points of mean 0 and mean square 1."""
    x = torch.randn(n, d, generator=seeded(seed), dtype=torch.float64)
    x = x - x.mean(0)
    return x / x.square().mean().sqrt()


def speed(process: Any, t: Tensor) -> Tensor:
    """The energy of N(0, diag SPECTRUM)'s velocity: mode i moves as sqrt(a^2 c + m^2), independently of the part."""
    c = torch.tensor(SPECTRUM, dtype=torch.float64)
    a, m, da, dm = (f(t)[:, None] for f in (process.alpha, process.sigma, process.dalpha, process.dsigma))
    return ((a * da * c + m * dm).square() / (a**2 * c + m**2)).mean(1)


# ------------------------------------------------------------------------------------------------------------------ the path


def test_where_the_separation_is_one_the_path_is_cond_ot() -> None:
    process = KineticOptimal(ones)
    assert torch.allclose(process.alpha(T), 1 - T, rtol=0, atol=1e-13)
    assert torch.allclose(process.sigma(T), T, rtol=0, atol=1e-13)
    assert torch.allclose(process.dalpha(T), torch.full_like(T, -1.0), rtol=1e-12)
    assert (process.phi_total, process.energy) == (pytest.approx(math.pi / 2), pytest.approx(2.0))


def test_where_nothing_must_move_nothing_does() -> None:
    process = KineticOptimal(gaussian_separation([1.0, 1.0]))
    assert process.energy < 1e-7
    assert torch.allclose(process.alpha(T).square() + process.sigma(T).square(), torch.ones_like(T), atol=1e-7)
    assert bool((process.lam(T).diff() < 0).all())


@pytest.mark.parametrize(
    "separation", [ones, SEPARATION, gaussian_separation([1.0]), lambda g: 1 - 1 / (1 + g**2) ** 2]
)
def test_ends_are_exact_and_all_else_is_monotone_and_finite(separation: Callable[[Tensor], Tensor]) -> None:
    process = KineticOptimal(separation)
    assert (process.alpha(0.0), process.sigma(0.0), process.alpha(1.0), process.sigma(1.0)) == (1.0, 0.0, 0.0, 1.0)
    assert (process.t_of_lam(math.inf), process.t_of_lam(-math.inf)) == (0.0, 1.0)
    fine = torch.linspace(0, 1, 3001, dtype=torch.float64)
    assert bool((process.alpha(fine).diff() < 0).all() & (process.sigma(fine).diff() > 0).all())
    for schedule in (process.dalpha, process.dsigma):
        assert bool(schedule(fine).isfinite().all())
    assert 0 < process.phi_total <= math.pi / 2 + 1e-12
    check_process(KineticOptimal(separation, t_min=1e-3, t_max=0.999))


def test_the_path_is_scipys() -> None:
    """The golden path: G from mean c = 1, phi by adaptive quadrature, its inverse by Brent's method."""

    def metric(angle: float) -> float:
        return 1 - sum(c / (math.cos(angle) ** 2 + c * math.sin(angle) ** 2) for c in SPECTRUM) / len(SPECTRUM)

    def phi(angle: float) -> float:
        return integrate.quad(lambda q: math.sqrt(max(metric(q), 0.0)), 0, angle, epsabs=1e-12, limit=200)[0]

    total = phi(math.pi / 2 - 1e-12)
    assert KO.phi_total == pytest.approx(total, abs=2e-6)
    golden = {
        0.9: (0.3309497931682, 0.9215160321143),
        0.5: (0.7472455755190, 0.5718008127202),
        0.1: (0.9709150780176, 0.1266628371694),
    }
    for t, pinned in golden.items():
        x, y = t + (1 - t) * math.cos(total), (1 - t) * math.sin(total)
        to = math.atan2(y, x)
        angle = optimize.brentq(lambda q, to=to: phi(q) - to, 1e-9, math.pi / 2 - 1e-9, xtol=1e-13)
        want = math.hypot(x, y) * math.sin(angle), math.hypot(x, y) * math.cos(angle)
        assert (KO.alpha(t), KO.sigma(t)) == (pytest.approx(want[0], abs=1e-5), pytest.approx(want[1], abs=1e-5))
        assert want == pytest.approx(pinned, abs=1e-9)


def test_the_speed_is_constant_and_the_energy_is_its_square() -> None:
    inner = torch.linspace(1e-4, 1 - 1e-4, 500, dtype=torch.float64)
    assert torch.allclose(speed(KO, inner), torch.full_like(inner, KO.energy), rtol=1e-3)
    assert KO.energy == pytest.approx(4 * math.sin(KO.phi_total / 2) ** 2)
    assert kinetic_energy(KO, SEPARATION) == pytest.approx(KO.energy, rel=1e-4)
    assert float(speed(Flow(), inner).std()) > 0.1


def test_no_change_of_the_path_lowers_the_energy() -> None:
    """The first variation is zero in every direction that keeps the ends, and the second is not negative."""

    class Changed(KineticOptimal):
        def bend(self, by: tuple[float, float], k: int) -> Changed:
            self.by, self.k = by, k
            return self

        def _alpha(self, t: Tensor) -> Tensor:
            return super()._alpha(t) + self.by[0] * torch.sin(math.pi * self.k * t)

        def _sigma(self, t: Tensor) -> Tensor:
            return super()._sigma(t) + self.by[1] * torch.sin(math.pi * self.k * t)

        def _dalpha(self, t: Tensor) -> Tensor:
            return super()._dalpha(t) + self.by[0] * math.pi * self.k * torch.cos(math.pi * self.k * t)

        def _dsigma(self, t: Tensor) -> Tensor:
            return super()._dsigma(t) + self.by[1] * math.pi * self.k * torch.cos(math.pi * self.k * t)

    def energy(*by: float, k: int) -> float:
        return kinetic_energy(Changed(SEPARATION).bend((by[0], by[1]), k), SEPARATION, 4000)

    eps, least = 1e-3, energy(0.0, 0.0, k=1)
    for k in (1, 2):
        for by in ((eps, 0.0), (0.0, eps), (eps, eps), (eps, -eps)):
            up, down = energy(*by, k=k), energy(-by[0], -by[1], k=k)
            assert abs(up - down) / 2 < 1e-3 * eps
            assert min(up, down) > least - 1e-9


# -------------------------------------------------------------------------------------------------------------------- energy


def test_energies_in_closed_form() -> None:
    assert kinetic_energy(Flow(), ones) == pytest.approx(2.0, rel=1e-12)
    assert kinetic_energy(TrigFlow(), ones) == pytest.approx(math.pi**2 / 4, rel=1e-12)
    assert kinetic_energy(TrigFlow(), gaussian_separation([1.0])) == pytest.approx(0.0, abs=1e-12)
    for process in (Flow(), TrigFlow(), VP(), VP(t_min=0.1), KO):
        low, high = process.t_min, process.t_max
        t = low + (high - low) * torch.sin(math.pi / 2 * (torch.arange(20000, dtype=torch.float64) + 0.5) / 20000) ** 2
        want = torch.trapezoid(speed(process, t), t).item()
        assert kinetic_energy(process, SEPARATION) == pytest.approx(want, rel=2e-4)
        assert KO.energy <= want * (1 + 1e-5) or process.t_min > 0.01
    # Trigonometric: theta' is pi / 2 throughout.
    angle = math.pi / 2 * (torch.arange(2000, dtype=torch.float64) + 0.5) / 2000
    want = math.pi / 2 * SEPARATION._metric(angle).mean().item() * math.pi / 2
    assert kinetic_energy(TrigFlow(), SEPARATION) == pytest.approx(want, rel=1e-5)


LAW = Mixture([[-1.2, 0.4], [0.9, -0.3]], [[0.05, 0.2], [0.3, 0.02]], [0.4, 0.6])


def test_the_formula_against_brute_force() -> None:
    """Monte Carlo of the velocity with the exact posterior of a 2-D mixture, along three paths."""
    scale = torch.diagonal(LAW.covariance).mean().sqrt()
    law = Mixture((LAW.means - LAW.mean) / scale, LAW.variances / scale**2, LAW.weights)
    separation = separation_function(law, torch.logspace(-2, 2, 60), 20_000, seeded(1))
    n, draws = 300, 300
    for process in (Flow(), VP(t_min=0.02), KineticOptimal(separation, t_max=0.9999)):
        t = process.t_min + (process.t_max - process.t_min) * (torch.arange(n, dtype=torch.float64) + 0.5) / n
        each = t.repeat_interleave(draws)
        x, _ = process.perturb(law.sample(n * draws, generator=seeded(2)), each, generator=seeded(3))
        u = ExactDenoiser(law, process)(x, each).flow
        want = u.square().mean().item() * (process.t_max - process.t_min)
        assert kinetic_energy(process, separation) == pytest.approx(want, rel=0.02)


# ---------------------------------------------------------------------------------------------------------------- separation


def test_monte_carlo_meets_the_closed_form() -> None:
    law = Gaussian([0.0] * 4, SPECTRUM)
    found = separation_function(law, LADDER, 4000, seeded())
    want = torch.tensor([SEPARATION(g) for g in LADDER], dtype=torch.float64)
    assert bool(((found.values - want).abs() <= 3 * found.stderr).all())
    assert bool((found.stderr < 0.02).all() & (found.stderr > 0).all())
    assert found.estimates is not None
    # Either estimate is one of lambda by itself, and their combination is no worse than the better.
    assert torch.allclose(found.estimates, want.expand(2, -1), atol=0.1)
    assert torch.allclose(found.lower_bound, torch.tensor([g**2 / (1 + g**2) for g in LADDER], dtype=torch.float64))


def test_it_is_of_the_reconstructions_square_and_no_cosine() -> None:
    """Two points at +-v, |v|^2 = d: E[x1 | y] = v tanh(g <v, y>), so that lambda = E tanh(g d (g + z / sqrt(d)))^2."""
    d, g = 3, 0.7
    points = torch.tensor([[1.0, 1, 1], [-1, -1, -1]], dtype=torch.float64)
    want = integrate.quad(
        lambda z: math.tanh(g * d * (g + z / math.sqrt(d))) ** 2 * math.exp(-z * z / 2) / math.sqrt(2 * math.pi), -9, 9
    )[0]
    found = separation_function(points, [g, 1.0], 20_000, seeded())
    assert found.values[0].item() == pytest.approx(want, abs=3 * found.stderr[0].item())
    assert found.stderr[0] < 3e-3


def test_a_bandwidth_is_of_the_kernel_density_estimate() -> None:
    points = cloud(6, 3) * math.sqrt(1 - 0.09)
    found = separation_function(points, LADDER, 4000, seeded(), h=0.3)
    want = separation_function(kde(points, 0.3), LADDER, 40_000, seeded(1))
    assert bool(((found.values - want.values).abs() < 5 * found.stderr).all())
    assert separation_function(points, n_samples=16, generator=seeded(), h=0.3).snr[-1] == pytest.approx(10 / 0.3)
    assert found.values[-1] < 0.995 < separation_function(cloud(6, 3), LADDER, 4000, seeded()).values[-1]


def test_scale_and_rotation_change_nothing_and_features_are_not_standardised() -> None:
    x = cloud(30, 4) * torch.tensor([2.0, 1, 0.5, 0.1], dtype=torch.float64)
    x = x / x.square().mean().sqrt()
    one = separation_function(x, LADDER, 2000, seeded())
    with pytest.warns(UserWarning, match=r"mean square 49 about their mean.*\(data - shift\) / scale"):
        other = separation_function(7 * x + 3, LADDER, 2000, seeded())
    assert torch.allclose(one.values, other.values, rtol=1e-9)
    assert other.scale == pytest.approx(7.0, rel=1e-9)
    assert torch.allclose(torch.as_tensor(other.shift), torch.full((4,), 3.0, dtype=torch.float64))
    turn, _ = torch.linalg.qr(torch.randn(4, 4, generator=seeded(5), dtype=torch.float64))
    turned = separation_function(x @ turn, LADDER, 2000, seeded(9))
    assert bool(((one.values - turned.values).abs() < 5 * (one.stderr + turned.stderr)).all())
    separate = separation_function(x / x.square().mean(0).sqrt(), LADDER, 2000, seeded())
    assert (one.values - separate.values).abs().max() > 10 * one.stderr.max()


def test_images_are_flattened_and_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    x = cloud(20, 12)
    flat = separation_function(x, LADDER, 100, seeded())
    monkeypatch.setattr(module, "_ENTRIES", 64)
    images = separation_function(x.reshape(20, 3, 2, 2), LADDER, 100, seeded())
    assert torch.allclose(images.values, flat.values, rtol=1e-12)
    assert torch.as_tensor(images.shift).shape == (3, 2, 2)


def test_the_table_is_monotone_between_its_bounds_everywhere() -> None:
    found = separation_function(cloud(40, 16), n_samples=200, generator=seeded())
    g = torch.cat([torch.zeros(1), torch.logspace(-4, 5, 4000), torch.tensor([math.inf])]).double()
    values = found(g)
    assert bool((values.diff() >= -1e-12).all() & (values <= 1).all() & (values >= 1 / (1 + g**-2) - 1e-12).all())
    assert (values[0], values[-1]) == (0.0, 1.0)
    assert torch.allclose(found(found.snr), found.values, rtol=1e-12)
    assert found(1.3) == pytest.approx(found(torch.tensor([1.3], dtype=torch.float64)).item())
    assert found(torch.tensor(1.3)).dtype == torch.float32
    metric = metric_of(found, torch.linspace(0, math.pi / 2, 500, dtype=torch.float64))
    assert bool((metric >= 0).all() & (metric <= 1).all())
    # Below the table lambda is proportional to g^2.
    assert Separation([0.5, 1.0], [0.4, 0.8])(0.05) == pytest.approx(0.004)
    # A third of the default grid is where so few points are suddenly remembered.
    jump = math.sqrt(2 * math.log(40) / 16)
    near = ((found.snr > jump / 2) & (found.snr < 2 * jump)).sum().item()
    assert near >= 20


def test_a_table_of_a_closed_form_is_the_closed_form() -> None:
    g = torch.logspace(-2, 2, 60, dtype=torch.float64)
    table = Separation(g, SEPARATION(g))
    fine = torch.logspace(-4, 4, 777, dtype=torch.float64)
    assert torch.allclose(table(fine), SEPARATION(fine), atol=2e-4)
    assert KineticOptimal(table).energy == pytest.approx(KO.energy, rel=3e-3)
    assert SEPARATION(math.inf) == 1.0
    # 0 at pi / 2 but for the eigenvalues that are 0.
    assert SEPARATION._metric(torch.tensor([0.0, math.pi / 2], dtype=torch.float64)).tolist() == pytest.approx(
        [0, 0.25]
    )


def test_separation_of_a_trained_denoiser_is_a_lower_bound() -> None:
    law = Gaussian([0.0] * 4, SPECTRUM)
    data = law.sample(3000, generator=seeded(4))
    data = (data - data.mean(0)) / (data - data.mean(0)).square().mean().sqrt()
    exact = ExactDenoiser(law, VP())
    found = separation_function(exact, LADDER, 3000, seeded(), data=data)
    want = torch.tensor([SEPARATION(g) for g in LADDER], dtype=torch.float64)
    # Data of the law, and not the law: 1 / sqrt(3000), more or less.
    assert torch.allclose(found.values, want, atol=0.06)
    poor = Denoiser(lambda x, t: 0.7 * exact(x, t[0].item()).x0, VP(), "sample")
    less = separation_function(poor, LADDER, 3000, seeded(), data=data)
    assert bool((less.values <= found.values + 1e-12)[1:].all() & (less.values >= less.lower_bound).all())
    assert less.values[2] < found.values[2] - 0.02


@pytest.mark.parametrize(("process", "scale"), [(Flow(t_min=0.02, t_max=0.8), 1.0), (VP(), 30.0)])
def test_a_denoiser_says_nothing_of_more_noise_than_it_knows(process: Any, scale: float) -> None:
    """At t_max alpha / sigma is 0.25 and, in the data's own units, 0.0066 * 30: below it the bound is taken, and no more."""
    law = Gaussian([0.0] * 4, [c * scale**2 for c in SPECTRUM])
    data = law.sample(3000, generator=seeded(4))
    with pytest.warns(UserWarning, match="mean square"):
        found = separation_function(ExactDenoiser(law, process), LADDER, 1000, seeded(), data=1.1 * data)
    want = torch.tensor([SEPARATION(g) for g in LADDER], dtype=torch.float64)
    assert bool((found.values <= want + 0.06).all())
    assert found.values[0] == found.lower_bound[0]
    assert found.values[2] > found.lower_bound[2] + 0.1


def test_a_larger_space_is_separated_and_cond_ot_is_optimal_then() -> None:
    """lambda tends to 1 as n / sqrt(d) tends to 0: four times the dimension halves what Cond-OT wastes."""
    excess = []
    for d in (16, 64, 256):
        found = separation_function(cloud(12, d), n_samples=300, generator=seeded())
        excess.append(kinetic_energy(Flow(), found) / KineticOptimal(found).energy - 1)
    assert excess[1] < 0.6 * excess[0]
    assert excess[2] < 0.6 * excess[1]


# ------------------------------------------------------------------------------------------------------- process, as a value


def test_paths_are_compared_by_value() -> None:
    same = KineticOptimal(gaussian_separation(SPECTRUM))
    for other in (same, copy.deepcopy(KO), pickle.loads(pickle.dumps(KO))):
        assert other == KO
        assert hash(other) == hash(KO)
    assert len({KO, same, KineticOptimal(ones)}) == 2
    assert KineticOptimal(SEPARATION, t_max=0.9) != KO != KineticOptimal(SEPARATION, 513)
    assert KineticOptimal(gaussian_separation([2.0, 1, 1, 0])) != KO
    assert Flow() != KO
    assert "phi_total=" in repr(KO)


def test_tables_on_other_devices_do_not_travel() -> None:
    process = copy.deepcopy(KO)
    assert process.alpha(torch.tensor([0.5], device="meta")).device.type == "meta"
    assert list(process._on) == [torch.device("meta")]
    assert pickle.loads(pickle.dumps(process))._on == {}
    assert process == KO


def test_types_follow_the_time() -> None:
    t = torch.tensor([0.0, 0.3, 1.0])
    for schedule in (KO.alpha, KO.sigma, KO.dalpha, KO.dsigma, KO.lam):
        assert schedule(t).dtype == torch.float32
        assert torch.equal(schedule(t), schedule(t.double()).float())
    assert KO.prior_std == 1.0
    assert KineticOptimal(SEPARATION, t_max=0.9).prior_std == pytest.approx(math.hypot(KO.alpha(0.9), KO.sigma(0.9)))


def test_flow_matching_libraries_time_runs_from_noise_to_data() -> None:
    x0, x1 = torch.randn(2, 5, 3, generator=seeded(), dtype=torch.float64)
    t = torch.tensor([0.0, 0.2, 0.5, 0.9, 1.0], dtype=torch.float64)
    x, dx = KO.sample(t, x0, x1)
    assert torch.equal(x[0], x0[0])
    assert torch.equal(x[-1], x1[-1])
    h = 1e-6
    inner = t[1:4]
    slope = (KO.sample(inner + h, x0[1:4], x1[1:4])[0] - KO.sample(inner - h, x0[1:4], x1[1:4])[0]) / (2 * h)
    assert torch.allclose(dx[1:4], slope, rtol=1e-5)
    one = KO.sample(0.5, x0, x1)
    assert torch.allclose(one[0][2], x[2])


def test_the_loss_is_flow_matching_written_once() -> None:
    process, x1 = KineticOptimal(SEPARATION, t_max=0.99), cloud(64, 4)
    weight = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)

    def model(x: Tensor, t: Tensor) -> Tensor:
        return weight * x + t[:, None]

    loss = conditional_flow_matching_loss(model, x1, process, seeded(3))
    assert torch.equal(loss, denoising_loss(Denoiser(model, process, "flow"), x1, generator=seeded(3)).mean())
    loss.backward()
    draws = seeded(3)
    t = 0.99 * torch.rand(64, generator=draws, dtype=torch.float64)
    noise = torch.randn(64, 4, generator=draws, dtype=torch.float64)
    a, m, da, dm = (f(t)[:, None] for f in (process.alpha, process.sigma, process.dalpha, process.dsigma))
    want = (0.3 * (a * x1 + m * noise) + t[:, None] - (da * x1 + dm * noise)).square().mean()
    assert loss.item() == pytest.approx(want.item(), rel=1e-10)
    assert weight.grad is not None
    assert float(weight.grad) != 0


# ------------------------------------------------------------------------------------------------------------ reparametrize

OLD, NEW = VP(t_min=1e-5), KineticOptimal(SEPARATION, t_min=1e-3, t_max=0.999)
MODES = Mixture([[-1.0, 0.5], [0.6, -0.2]], [0.2, 0.1], [0.4, 0.6], labels=[0, 1])


def test_a_trained_model_on_another_path_is_the_model_of_that_path() -> None:
    both = (
        ExactDenoiser(MODES.of_class(0), OLD, unconditional=MODES),
        ExactDenoiser(MODES.of_class(0), NEW, unconditional=MODES),
    )
    moved = reparametrize(both[0], OLD, NEW)
    x = torch.randn(5, 2, generator=seeded(), dtype=torch.float64)
    for t in (0.3, 0.95, torch.linspace(0.1, 0.9, 5, dtype=torch.float64)):
        for got, want in zip(moved.pair(x, t), both[1].pair(x, t), strict=True):
            assert torch.allclose(got.x0, want.x0, rtol=1e-9, atol=1e-11)
            assert torch.allclose(got.flow, want.flow, rtol=1e-8, atol=1e-10)
    assert moved.process == NEW
    how: dict[str, Any] = dict(solver=DPMSolverMultistep(), nfe=20, guidance=CFG(2.0))
    made = [sample(denoiser, x, **how) for denoiser in (moved, both[1])]
    assert torch.allclose(*made, rtol=1e-8)


def test_beyond_the_old_ends_the_model_is_asked_at_its_ends() -> None:
    asked: list[float] = []

    def network(x: Tensor, t: Tensor) -> Tensor:
        asked.append(t[0].item())
        return x

    moved = reparametrize(Denoiser(network, OLD), OLD, KineticOptimal(SEPARATION))
    x = sample(moved, (3, 4), solver=Euler(), steps=4, generator=seeded(), dtype=torch.float64)
    assert x.isfinite().all()
    assert asked[0] == pytest.approx(OLD.t_max, rel=1e-12)
    assert moved(x, 1e-12).x0.isfinite().all()
    assert asked[-1] == pytest.approx(OLD.t_min, rel=1e-9)


def test_a_path_is_sampled_to_its_law() -> None:
    """Along the path of its own spectrum a Gaussian is made by a few steps of Euler's method, from the exact solution's start."""
    law, process = Gaussian([0.0] * 4, SPECTRUM), KineticOptimal(SEPARATION, t_max=0.999)
    x = process.perturb(law.sample(200, generator=seeded()), 0.999, generator=seeded(1))[0]
    exact = gaussian_flow(law, process, x, 0.999, 0.05)
    errors = []
    for n in (8, 16, 32):
        got = sample(ExactDenoiser(law, process), x, solver=Euler(), grid=process.grid(n, "time", end=0.05))
        errors.append((got - exact).square().mean().sqrt().item())
    assert errors[0] / errors[2] > 3
    assert errors[2] < 0.02


# ----------------------------------------------------------------------------------------------------------------- bad input

POINTS = cloud(10, 3)


def spoilt(value: float) -> Tensor:
    x = POINTS.clone()
    x[2, 1] = value
    return x


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: separation_function(spoilt(math.nan), LADDER), "data_or_denoiser must be finite, got NaN or infinity"),
        (lambda: separation_function(spoilt(math.inf), LADDER), "data_or_denoiser must be finite"),
        (lambda: separation_function(POINTS[:1], LADDER), "a single point: the kinetic-optimal path is Cond-OT"),
        (lambda: separation_function(torch.ones(5, 3), LADDER), "at least 2 different points.*a single point.*Cond-OT"),
        (lambda: separation_function(torch.ones(5, 0), LADDER), r"must not be empty, got shape \(5, 0\)"),
        (lambda: separation_function(POINTS.long(), LADDER), "data_or_denoiser must be"),
        (lambda: separation_function(POINTS, [1.0, 1.0]), r"snr must increase, got \[1.0, 1.0\]"),
        (lambda: separation_function(POINTS, [-1.0, 1.0]), r"snr\[0\] must be > 0"),
        (lambda: separation_function(POINTS, [1.0]), "snr must be a sequence of at least 2"),
        (lambda: separation_function(POINTS, LADDER, 3), "n_samples must be at least 16, got 3"),
        (lambda: separation_function(POINTS, LADDER, h=-0.1), "h must be >= 0|h must be in"),
        (lambda: separation_function(Gaussian([0.0]), LADDER, h=0.1), "h is a bandwidth about the points of a data set"),
        (lambda: separation_function(Gaussian([0.0], 0.0), LADDER), "data_or_denoiser must have a variance > 0"),
        (lambda: separation_function(ExactDenoiser(Gaussian([0.0]), VP()), LADDER), "data is needed with a denoiser"),
        (lambda: separation_function(POINTS, LADDER, data=POINTS), "data is needed with a denoiser, and with nothing else"),
        (lambda: separation_function(Denoiser(lambda x, t: x * math.nan, VP()), LADDER, data=POINTS), "finite reconstructions"),
        (lambda: Separation([0.5, 1.0], [0.1, 0.9]), "values must be at least.*inconsistent: increase n_samples"),
        (lambda: Separation([0.5, 1.0], [0.3, 1.1]), "values must be at most 1 .*got 1.1 .* at snr=1"),
        (lambda: Separation([0.5, 1.0], [0.3]), "values must be a sequence of at least 2"),
        (lambda: Separation([0.5, 1.0], [0.3, 0.6, 0.7]), "values must have one number for each of the 2 snr, got 3"),
        (lambda: SEPARATION(-1.0), "snr must be"),
        (lambda: gaussian_separation([1.0, -0.1]), r"spectrum\[1\] must be >= 0"),
        (lambda: gaussian_separation([0.0, 0.0]), "spectrum must have a positive, finite mean, got 0"),
        (lambda: KineticOptimal(lambda g: 2 * g), r"separation must have values in \[0, 1\], got 0 to"),
        (lambda: KineticOptimal(lambda g: g * math.nan), r"separation must have values in \[0, 1\]"),
        (lambda: KineticOptimal(lambda g: 1.0), "separation must map a tensor"),
        (lambda: KineticOptimal(ones, 3), "n must be at least 8, got 3"),
        (lambda: KineticOptimal(ones, t_min=0.9, t_max=0.5), "t_max must be above t_min=0.9, got 0.5"),
        (lambda: KineticOptimal(ones).grid(5, "logsnr"), "cannot reach t=1, where lam is infinite"),
        (lambda: reparametrize(ExactDenoiser(LAW, VP()), Flow(), KO), "old_process must be the denoiser's own"),
        (lambda: KO.sample(0.5, torch.zeros(2, 3), torch.zeros(2, 4)), r"x0 must have x1's shape \(2, 4\), got \(2, 3\)"),
        (lambda: KO.sample(1.5, torch.zeros(2, 3), torch.zeros(2, 3)), "t must be in"),
        (lambda: kinetic_energy(VP(), ones, 1), "n must be at least 2, got 1"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_by_name(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_an_estimate_below_its_bound_is_refused_and_within_its_error_is_raised() -> None:
    raised = Separation([0.5, 1.0, 2.0], [0.19, 0.49, 0.85], [0.01, 0.01, 0.01])
    assert raised.values.tolist() == [0.2, 0.5, 0.85]
    assert Separation([0.5, 1.0, 2.0], [0.7, 0.66, 0.9], [0.02, 0.02, 0.02]).values.tolist() == [0.7, 0.7, 0.9]
    assert Separation([0.5, 1.0], [0.2 - 4.9e-3, 0.5], [1e-3, 1e-3]).values.tolist() == [0.2, 0.5]
    with pytest.raises(ValueError, match="increase n_samples"):
        Separation([0.5, 1.0], [0.2 - 5.1e-3, 0.5], [1e-3, 1e-3])
    # Fewer draws than a heavy tail needs: by chance below what is possible.
    with pytest.raises(ValueError, match=r"got 0.19 \+- 0.001 at snr=0.5: the separation estimate is inconsistent"):
        Separation([0.5, 1.0], [0.19, 0.5], [0.001, 0.001])
