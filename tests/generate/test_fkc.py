"""Feynman-Kac correctors: the rate, laws in closed form, and the published code's departures."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from fkc_cases import FIRST, PROCESS, SECOND, normal, rng, run, vectors
from torch import Tensor

from polyak.core.exact import Mixture
from polyak.generate import EDM, VP, Composed, FeynmanKacCorrector, ReverseSDE, fkc_weight, initial_scale, sample
from polyak.generate.problems import ExactDenoiser


def weighted(x: Tensor, info: Any) -> tuple[float, float]:
    """The mean and variance of the weighted particles of one system, one coordinate."""
    w, x = info.steering.logw[0].softmax(0), x[:, 0].double()
    mean = (w * x).sum()
    return mean.item(), (w * (x - mean).square()).sum().item()


# --- the rate


def test_the_rate_of_special_cases() -> None:
    s, u, f, grad = (vectors(3, 5, 2, seed=i) for i in range(4))
    inner = lambda a, b: (a * b).sum(-1)  # noqa: E731
    known = dict(rtol=1e-12, atol=1e-12)
    for beta in (0.3, 3.0):
        want = 0.7 * beta * (beta - 1) / 2 * inner(s, s)
        assert torch.allclose(fkc_weight(beta * s, [s], [beta], 0.7), want, **known)
    assert torch.allclose(fkc_weight(s + u, [s, u], [1.0, 1.0], 0.7), 0.7 * inner(s, u), **known)
    for w in (-0.5, 0.4, 3.0):
        S = (1 - w) * u + w * s
        assert torch.allclose(fkc_weight(S, [u, s], [1 - w, w], 0.7), 0.35 * w * (w - 1) * inner(s - u, s - u), **known)
    b = 1.7  # a product at the inverse temperature b
    want = 0.35 * (b**2 * inner(s + u, s + u) - b * inner(s, s) - b * inner(u, u))
    assert torch.allclose(fkc_weight(b * (s + u), [s, u], [b, b], 0.7), want, **known)
    slope = vectors(3, 5, seed=9)
    assert torch.allclose(
        fkc_weight(s, [s], [1.0], 0.7, f, grad, slope), slope + inner(grad, 0.35 * s - f), **known
    )  # a reward
    flat = fkc_weight(s.reshape(3, 10), [s.reshape(3, 10), u.reshape(3, 10)], [2.0, 0.5], 0.7)
    assert torch.allclose(fkc_weight(s, [s, u], [2.0, 0.5], 0.7, event_dims=2), flat, **known)
    half = fkc_weight(s.half(), [s.half()], [2.0], 0.7)
    assert half.dtype == torch.float64
    assert torch.equal(half, fkc_weight(s.half().double(), [s.half().double()], [2.0], 0.7))


def test_experts_may_be_reordered_and_split() -> None:
    x, t = vectors(20, 1), 0.8
    a, b = normal(FIRST), normal(SECOND)
    made = [
        Composed(experts)(x, t)
        for experts in (
            [(a, 1.5), (b, -0.4)],
            [(b, -0.4), (a, 1.5)],
            [(a, 0.75), (b, -0.4), (a, 0.75)],
            [(a, 1.1), (b, -0.2), (a, 0.4), (b, -0.2)],
        )
    ]
    rates = [fkc_weight(p.composed_score, [e.score for e in p.experts], p.betas, 1.6) for p in made]
    for p, rate in zip(made[1:], rates[1:], strict=True):
        assert torch.allclose(p.score, made[0].score, rtol=1e-12)
        assert torch.allclose(rate, rates[0], rtol=1e-12)


@pytest.mark.parametrize("process", [PROCESS, EDM(), VP()], ids=["VE", "EDM", "VP"])
@pytest.mark.parametrize("zeta", [1.0, 1.6])
def test_a_run_by_hand(process: Any, zeta: float) -> None:
    """Scores in closed form, the diffusion coefficient, and time that runs downwards."""
    (m, v), (n, u), powers = FIRST, SECOND, (1.4, -0.3)
    draw, times = rng(3), process.grid(4, "logsnr", start=process.t_of_lam(-1.0), end=process.t_of_lam(1.0)).tolist()
    x = vectors(6, 1, seed=2)
    composed = Composed([(normal(FIRST, process), powers[0]), (normal(SECOND, process), powers[1])])
    corrector = FeynmanKacCorrector("product", num_particles=3, ess_threshold=0.0, zeta=zeta)
    got, info = sample(
        composed, x, solver=ReverseSDE(zeta), grid=times, steering=corrector, generator=draw, return_info=True
    )
    draw, logw, level = rng(3), torch.zeros(2, 3, dtype=torch.float64), 0.0
    for s, t in itertools.pairwise(times):
        near = 1e-6  # slopes of the schedule by differences
        (a, c), (a1, c1), (a0, c0) = ((process.alpha(r), process.sigma(r)) for r in (s, s + near, s - near))
        f = (math.log(a1) - math.log(a0)) / (2 * near)
        sigma2 = (c1**2 - c0**2) / (2 * near) - 2 * f * c**2
        one, two = ((a * mean - x) / (a * a * var + c * c) for mean, var in ((m, v), (n, u)))
        S = powers[0] * one + powers[1] * two
        g = sigma2 / 2 * (S**2 - powers[0] * one**2 - powers[1] * two**2)
        logw, level = logw + (s - t) * g.reshape(2, 3), level + (s - t) * 0.1 * f
        z = torch.randn(6, 1, dtype=torch.float64, generator=draw)
        x = x + (s - t) * (-f * x + (1 + zeta**2) / 2 * sigma2 * S) + zeta * math.sqrt(sigma2 * (s - t)) * z
    assert torch.allclose(got, x, rtol=1e-6, atol=1e-6)
    state = info.steering
    assert torch.allclose(state.log_z, logw.logsumexp(1) - math.log(3) + level, rtol=1e-6, atol=1e-6)
    assert torch.allclose(state.logw.softmax(1), logw.softmax(1), rtol=1e-6)
    assert logw.std() > 0.05


# After the published equations, in float64 and without this library but for the uniforms.
GOLDEN = [
    0.750590506633518,
    1.7709183799803971,
    1.6307030564217635,
    1.832438255357962,
    1.625601104295702,
    2.085441438252125,
]
GOLDEN_LOG_Z = [0.17788671714647375, 0.3150562286456212]


def test_a_golden_trajectory() -> None:
    """From the equations in float64, three particles of two systems; systematic resampling from one uniform each."""
    x = torch.tensor([[2.0], [1.0], [0.5], [1.8], [2.5], [-0.2]], dtype=torch.float64)
    corrector = FeynmanKacCorrector("anneal", num_particles=3, ess_threshold=None, generator=rng(5))
    got, info = sample(
        Composed([(normal(FIRST, EDM()), 1.5)]), x, solver=ReverseSDE(), grid=[1.0, 0.8, 0.6, 0.4], steering=corrector,
        generator=rng(4), return_info=True,
    )  # fmt: skip
    assert got.flatten().tolist() == pytest.approx(GOLDEN, rel=1e-10)
    assert info.steering.log_z.tolist() == pytest.approx(GOLDEN_LOG_Z, rel=1e-10)


# --- laws


@pytest.mark.parametrize(
    ("powers", "mean", "var"),
    [((3.0,), 1.5, 1 / 6), ((1.0, 1.0), 1.1, 0.4), ((2.0, -1.0), 1.785714, 0.285714)],
    ids=["annealed", "product", "guided"],
)
def test_normals(powers: tuple[float, ...], mean: float, var: float) -> None:
    experts = [(normal(law), beta) for law, beta in zip((FIRST, SECOND), powers, strict=False)]
    corrector = FeynmanKacCorrector("product" if len(experts) > 1 else "anneal", num_particles=600)
    x, info = run(Composed(experts), (8, 1), corrector, 80)
    x = x.view(8, 600)
    # Five standard errors of eight systems, which have 0.06 and an eighth of the variance each, and the order of 80 steps.
    assert x.mean().item() == pytest.approx(mean, abs=0.1)
    assert x.var(1).mean().item() == pytest.approx(var, rel=0.22)
    assert not info.steering.logw.any()  # all alike: the last step resamples
    plain, _ = run(Composed(experts), (1500, 1), None, 80)
    if len(powers) == 1:
        assert plain.var().item() == pytest.approx(0.1, rel=0.16)  # v / (2 beta - 1)
    else:
        assert abs(plain.mean().item() - mean) > 0.12 or abs(plain.var().item() / var - 1) > 0.25


def moments(steps: int, beta: float = 3.0, zeta: float = 1.0) -> tuple[float, float, float]:
    """Of the weighted law of an annealed normal, step by step, without particles: mean, variance, log Z."""
    m, v = FIRST
    times = PROCESS.grid(steps, "karras").tolist()
    mean, var, log_z = m, (v + 64) / beta, 0.0
    rate = 2 * math.log(8.0 / 0.01)
    for s, t in itertools.pairwise(times):
        noise = (0.01 * 800**s) ** 2
        sigma2, V = rate * noise, v + noise
        c = sigma2 / 2 * beta * (beta - 1) / V**2 * (s - t)  # g dtau = c (x - m)^2
        log_z -= math.log(1 - 2 * c * var) / 2
        var = var / (1 - 2 * c * var)
        slope = 1 - (s - t) * (1 + zeta**2) / 2 * sigma2 * beta / V
        var = slope**2 * var + zeta**2 * sigma2 * (s - t)
    return mean, var, log_z


def log_integral(beta: float, v: float, d: int = 1) -> float:
    """log of the integral of N(x; m, v I)^beta in d dimensions."""
    return d / 2 * ((1 - beta) * math.log(2 * math.pi * v) - math.log(beta))


def test_first_order_and_the_evidence() -> None:
    v = FIRST[1]
    want = (v + 1e-4) / 3, log_integral(3, v + 1e-4) - log_integral(3, v + 64)
    errors = [[abs(got - w) for got, w in zip(moments(n)[1:], want, strict=True)] for n in (1600, 3200, 6400)]
    for coarse, fine in itertools.pairwise(errors):
        assert [math.log2(a / b) for a, b in zip(coarse, fine, strict=True)] == pytest.approx([1.0, 1.0], abs=0.12)
    # Particles are these equations: 24 steps, which the error of the steps is seen in.
    x = 1.5 + vectors(20000, 1) * math.sqrt((v + 64) / 1.5)
    made, info = run(Composed([(normal(FIRST), 1.5)]), x, FeynmanKacCorrector(num_particles=20000), 24)
    mean, var, log_z = moments(24, 1.5)
    assert abs(log_z - log_integral(1.5, v + 1e-4) + log_integral(1.5, v + 64)) > 0.1
    assert info.steering.log_z.item() == pytest.approx(log_z, abs=0.06)
    assert weighted(made, info) == pytest.approx((mean, var), abs=0.02)


@pytest.mark.parametrize("scheme", ["systematic", "birth_death"])
@pytest.mark.parametrize("process", [PROCESS, VP()], ids=["VE", "VP"])
def test_the_evidence_has_the_drifts_divergence(process: Any, scheme: str) -> None:
    """In two dimensions, where for VP it is one."""
    v, beta = 0.5, 1.5
    law = Mixture([[0.3, -0.2]], v)
    grid = process.grid(100, "logsnr", start=process.t_of_lam(-1.0), end=process.t_of_lam(2.0)).tolist()
    spread = [process.alpha(t) ** 2 * v + process.sigma(t) ** 2 for t in (grid[-1], grid[0])]
    want = log_integral(beta, spread[0], 2) - log_integral(beta, spread[1], 2)
    x = process.alpha(grid[0]) * law.means + vectors(3000, 2) * math.sqrt(spread[1] / beta)
    corrector = FeynmanKacCorrector(num_particles=1500, scheme=scheme)
    _, info = run(Composed([(ExactDenoiser(law, process), beta)]), x, corrector, None, grid=grid)
    assert info.steering.log_z.tolist() == pytest.approx([want, want], abs=0.1)


def test_the_start_is_narrower() -> None:
    assert initial_scale([3.0], PROCESS) == pytest.approx(8 / math.sqrt(3))
    assert initial_scale([1.5, 0.5], VP()) == pytest.approx(1 / math.sqrt(2), rel=1e-4)
    composed = Composed([(normal(FIRST), 1.5), (normal(SECOND), 2.5)])
    x = composed.prior((20000, 1), generator=rng())
    assert x.std().item() == pytest.approx(4.0, rel=0.03)
    seen: list[Tensor] = []
    run(composed, (20000, 1), None, 2, callback=lambda step: seen.append(step.x))
    one = run(Composed([(normal(FIRST), 1.0)]), (500, 1), None, 2)[0]
    assert torch.equal(one, run(normal(FIRST), (500, 1), None, 2)[0])


@pytest.mark.parametrize("process", [PROCESS, VP()], ids=["VE", "VP"])
@pytest.mark.parametrize("zeta", [1.0, 1.4])
def test_a_linear_reward_shifts(process: Any, zeta: float) -> None:
    law, pull = (
        Mixture([[-1.0, 0.0], [1.0, 0.5]], [0.2, 0.4], [0.7, 0.3]),
        torch.tensor([0.8, -0.5], dtype=torch.float64),
    )
    target = law.tilt(pull)[0]
    composed = Composed(
        [(ExactDenoiser(law, process), 1.0)], lambda x, t: (1 - t / process.t_max) * (x @ pull), zeta=zeta
    )
    corrector = FeynmanKacCorrector("tilt", num_particles=1200, zeta=zeta)
    grid = "karras" if process is PROCESS else "quadratic"
    x, info = run(composed, (1, 2), corrector, 80, grid=grid, solver=ReverseSDE(zeta))
    assert torch.allclose(x.mean(0), target.mean, atol=0.12)
    assert (law.mean - target.mean).abs().max() > 0.4
    means = law.means @ pull + law.variances[:, 0] * pull.square().sum() / 2
    want = math.log((law.weights * means.exp()).sum().item())
    assert info.steering.log_z.item() == pytest.approx(want, abs=0.1)


def test_powers_that_change_in_time() -> None:
    """From beta = 1 at the start to 3 at the end, with the log-density that its derivative multiplies."""
    corrector = FeynmanKacCorrector(num_particles=600)
    composed = Composed([(normal(FIRST), lambda t: 3 - 2 * t)])
    x = run(composed, (8, 1), corrector, 80)[0].view(8, 600)
    assert x.mean().item() == pytest.approx(1.5, abs=0.1)
    assert x.var(1).mean().item() == pytest.approx(1 / 6, rel=0.2)


@pytest.mark.parametrize("window", [(0.0, 1.0), (0.2, 0.8)])
def test_births_and_deaths_have_the_law_of_resampling(window: tuple[float, float]) -> None:
    composed = Composed([(normal(FIRST), 3.0)])
    for scheme in ("systematic", "birth_death"):
        corrector = FeynmanKacCorrector(num_particles=1000, scheme=scheme, ess_threshold=None, window=window)
        x, info = run(composed, (4, 1), corrector, 100)
        x = x.view(4, 1000)
        assert x.mean().item() == pytest.approx(1.5, abs=0.1)
        assert x.var(1).mean().item() == pytest.approx(moments(100)[1], rel=0.2)
        assert not info.steering.logw.any()


def test_thresholds_are_exponential() -> None:
    corrector = FeynmanKacCorrector(num_particles=20000, scheme="birth_death")
    seen: list[Any] = []
    run(Composed([(normal(FIRST), 1.0)]), (1, 1), corrector, 1, callback=lambda step: seen.append(step.steering))
    limits = [seen.pop().limits[0]]  # no one dies of equal rates
    run(Composed([(normal(FIRST), 3.0)]), (1, 1), corrector, 30, callback=lambda step: seen.append(step.steering))
    for before, after in itertools.pairwise(seen):
        limits.append(after.limits[before.limits != after.limits])  # only the dead have new ones
    assert sum(map(len, limits)) > 30_000
    for drawn in (limits[0], torch.cat(limits[1:])):
        assert drawn.mean().item() == pytest.approx(1.0, abs=0.05)
        assert drawn.var().item() == pytest.approx(1.0, abs=0.15)
    for state in seen:
        moved = state.ancestors != torch.arange(20000)
        assert (state.deaths[0, moved] == 0).all()
        assert (state.deaths < state.limits).all()


# --- the published code


def test_raised_probabilities_draw_the_dead() -> None:
    """Probabilities that are raised to 1e-6 before they are summed: of 10^4 particles one has all weight, and one in a hundred
    has a mass that it should not: those before the one are drawn, those after it fall off the end. Ours draws none."""
    k = 10_000
    logw = torch.full((1, k), -1e3, dtype=torch.float64)
    logw[0, k // 2] = 0.0
    sums = logw.softmax(1).clamp(1e-6, 1.0).cumsum(1)[0]
    places = (torch.arange(k, dtype=torch.float64) + 0.3) / k
    published = torch.searchsorted(sums, places).clamp(max=k - 1)
    assert (published != k // 2).double().mean().item() == pytest.approx(0.005, rel=0.03)
    assert sums[-1].item() == pytest.approx(1.01, rel=1e-3)
    corrector = FeynmanKacCorrector(num_particles=k)
    state = replace(corrector.init(1, k), logw=logw)
    x, pred = vectors(k, 1), Composed([(normal(FIRST), 1.0)])(vectors(k, 1), 0.5)
    _, state = corrector.step(state, x, pred=pred, step=0, t=0.5, t_next=0.4, last=True, mean=x, generator=rng())
    assert torch.equal(state.ancestors, torch.full((k,), k // 2))


def test_changing_powers_need_the_density() -> None:
    """Their derivative alone is the same for all particles and does nothing: the law is another one."""

    class Published(FeynmanKacCorrector):
        def _rate(self, pred: Any, *others: Any) -> Any:
            pred.dlog = -torch.ones_like(pred.dlog)
            return super()._rate(pred, *others)

    law = Mixture([[-2.0], [2.0]], [0.3, 0.1], [0.4, 0.6])
    target = law.power_of_modes(3.0)[0].weights[1].item()
    composed = Composed([(ExactDenoiser(law, PROCESS), lambda t: 3 - 2 * min(1.0, t / 0.4))])
    made = [run(composed, (4, 1), kind(num_particles=400), 80)[0] for kind in (FeynmanKacCorrector, Published)]
    right, published = ((x > 0).double().mean().item() for x in made)
    assert abs(right - target) < 0.06
    assert abs(published - target) > 0.2
