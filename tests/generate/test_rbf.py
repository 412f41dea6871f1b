"""Flow models as SDEs and in other interpolants: exact laws, the algebra of conversion, and the solver in ``sample``."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from generate_cases import MIXTURE, exact

from polyak.generate import (
    DDIM,
    EDM,
    OU,
    PFGMPP,
    SVDD,
    VP,
    BestOfN,
    Denoiser,
    Euler,
    FKSteering,
    Flow,
    FlowSDE,
    LinearVPPath,
    PolynomialPath,
    Prediction,
    Process,
    Query,
    TrigFlow,
    check_process,
    check_solver,
    convert,
    drive,
    sample,
)
from polyak.generate.process import CosinePath, Interpolant, LinearPath, VPPath
from polyak.generate.process.conversion import matched
from polyak.generate.rbf.solver import SHAPES

LATE_VP = VP(t_min=0.05)  # sigma' is not large
PATHS: dict[str, Process] = {
    "linear": Flow(),
    "vp": LATE_VP,
    "cosine": TrigFlow(),
    "linear vp": LinearVPPath(t_max=0.98),
    "polynomial": PolynomialPath(1.5, t_max=0.98),
    "own": Interpolant(lambda t: 1 - t, lambda t: t.square(), snr_inverse=None, t_min=0.02, t_max=0.98),
}
MU, V = 0.7, 0.5


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def velocity(process: Any) -> Any:
    """The exact velocity of the mixture, as a network."""

    def network(x: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        t = process.t_of_label(label.double())
        x0 = MIXTURE.posterior_mean(x.double(), process.alpha(t), process.sigma(t))
        return Prediction(x0, x.double(), t, process, "sample").flow.to(x.dtype)

    return network


# ------------------------------------------------------------------------------------------------------------- processes


def test_the_names_of_flow_papers_are_processes_of_the_room() -> None:
    assert (LinearPath(), VPPath(0.1, 20.0), CosinePath()) == (Flow(), VP(), TrigFlow())
    path = VPPath(0.1, 20.0)
    assert path.alpha(1.0) == pytest.approx(math.exp(-0.5 * (0.5 * 19.9 + 0.1)), rel=1e-14)
    assert path.sigma(0.3) ** 2 == pytest.approx(-math.expm1(-(0.09 * 19.9 / 2 + 0.03)), rel=1e-13)


@pytest.mark.parametrize("slopes", [False, True])
def test_interpolants_of_ones_own(slopes: bool) -> None:
    ends = dict(t_min=1e-3, t_max=0.999)
    known = [lambda t: -2 * (1 - t), lambda t: 2 * (1 - t), lambda q: 1 - (q / (1 + q)).sqrt()] if slopes else []
    mine = Interpolant(lambda t: (1 - t) ** 2, lambda t: 1 - (1 - t) ** 2, *known, **ends)
    check_process(mine)
    t = torch.tensor([0.1, 0.6], dtype=torch.float64)
    theirs = PolynomialPath(2.0, **ends)
    for name in ("alpha", "sigma", "dalpha", "dsigma", "diffusion2"):
        assert torch.allclose(getattr(mine, name)(t), getattr(theirs, name)(t), rtol=1e-12)
    assert torch.allclose(LinearVPPath().alpha(t), (1 - t**2).sqrt())


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: Interpolant(lambda t: t, lambda t: 1 - t), "must be positive and decrease"),
        (lambda: Interpolant(lambda t: t.sum(), lambda t: t), "alpha must be a function of a float64 tensor"),
        (lambda: Interpolant(lambda t: 1 - t, lambda t: t, None, None, lambda q: q), "snr_inverse must be the inverse"),
        (lambda: LinearVPPath(0.5, 0.5), "t_max must be in"),
        (lambda: PolynomialPath(0.0), "n must be > 0"),
        (lambda: convert(exact(VP()), Flow(), VP()), "source must be the denoiser's own"),
        (lambda: convert(velocity(Flow()), Flow(), PFGMPP()), "target must have Gaussian noise"),
        (lambda: FlowSDE(g="cube"), "g must be one of"),
        (lambda: FlowSDE(norm=-1.0), "norm must be >= 0"),
        (lambda: FlowSDE().table([5.0, 1.0], EDM()), "is for times in"),
        (lambda: FlowSDE().table([5.0, 1.0], OU()), "is for times in"),
        (lambda: FlowSDE(g=lambda t: -t).table([0.5, 0.1], Flow()), "g must give a number that is not negative"),
        (lambda: sample(Denoiser(lambda x, t: x, PFGMPP()), (2, 1), solver=FlowSDE(), steps=2), "needs Gaussian noise"),
        (lambda: sample(exact(Flow()), (2, 1), solver=FlowSDE(norm=0.0), steps=2, steering=SVDD(len)), "deterministic solver"),
    ],
)  # fmt: skip
def test_what_makes_no_sense_is_refused(make: Any, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        make()


# ------------------------------------------------------------------------------------------------------------ conversion

EVERY = [Flow(), VP(), TrigFlow(), LinearVPPath(), PolynomialPath(1.5), Flow(label_scale=1000.0)]


@pytest.mark.parametrize("source", EVERY, ids=str)
@pytest.mark.parametrize("target", EVERY, ids=str)
def test_conversion_moves_nothing_but_the_scale(source: Any, target: Any) -> None:
    """t', c' against autograd of t(r), c(r); x0_hat as that of the target, the score that of the source over c."""
    r = torch.linspace(0.1, 0.9, 5, dtype=torch.float64, requires_grad=True)
    at = matched(source, target, r.detach())
    t = source._t_of_lam(target._log_alpha(r) - target._log_sigma(r))
    c = target._log_sigma(r).exp() / source._log_sigma(t).exp()
    for got, value in ((at.dt, t), (at.dc, c)):
        (slope,) = torch.autograd.grad(value.sum(), r, retain_graph=True)
        assert torch.allclose(got, slope, rtol=1e-9, atol=1e-12)
    x = torch.linspace(-1.5, 1.5, 5, dtype=torch.float64)[:, None]
    moved = Denoiser(convert(velocity(source), source, target), target, "flow")(x, r.detach())
    there = Denoiser(velocity(source), source, "flow")(x / at.c[:, None], at.t)
    # Labels of the source may be a thousand times as large, and are rounded as x is.
    assert torch.allclose(moved.x0, there.x0, rtol=1e-9)
    assert torch.allclose(moved.score, there.score / at.c[:, None], rtol=1e-9)
    assert torch.allclose(moved.x0, exact(target)(x, r.detach()).x0, rtol=1e-9)
    assert torch.allclose(convert(exact(source), source, target)(x, r.detach()).x0, moved.x0, rtol=1e-9)


def test_to_the_same_interpolant_nothing_is_converted() -> None:
    network, denoiser = velocity(Flow()), exact(Flow())
    assert convert(network, Flow(), Flow()) is network
    assert convert(denoiser, Flow(), Flow()) is denoiser


@pytest.mark.parametrize("source", EVERY[:5], ids=str)
@pytest.mark.parametrize("target", EVERY[:5], ids=str)
def test_at_the_ends_all_is_finite(source: Any, target: Any) -> None:
    model = convert(lambda x, label: 0.3 * x, source, target)
    for r in (target.t_min, target.t_max):
        said = model(torch.ones(2, 1, dtype=torch.float64), torch.full((2,), r, dtype=torch.float64))
        assert bool(said.isfinite().all()), r


def test_beyond_the_ends_of_the_source_what_there_is_most_of_keeps_its_size() -> None:
    """Noise at the noisy end, data at the other: c is the ratio of their scales."""
    source, target = Flow(0.1, 0.9), VP()
    at = matched(source, target, torch.tensor([target.t_min, target.t_max], dtype=torch.float64))
    assert at.t.tolist() == [0.1, 0.9]
    assert at.c.tolist() == pytest.approx([target.alpha(target.t_min) / 0.9, target.sigma(1.0) / 0.9])


def test_a_converted_ode_ends_where_the_ode_does() -> None:
    """From the same noise, up to alpha(1) = 0.0066 of what the VP interpolant still has of the data."""
    noise = torch.randn(16, 1, dtype=torch.float64, generator=rng())
    want = sample(exact(Flow()), noise, solver=FlowSDE(norm=0.0), steps=400)
    process = VP(t_min=1e-4)
    model = Denoiser(convert(velocity(Flow()), Flow(), process), process, "flow")
    got = sample(model, noise, solver=FlowSDE(norm=0.0, grid="uniform"), steps=400)
    assert (got - want).abs().max() < 0.03
    assert (got - noise).abs().max() > 0.3


def test_half_precision_is_converted_in_single() -> None:
    model, x = convert(velocity(Flow()), Flow(), VP()), torch.randn(64, 1, generator=rng())
    low = model(x.bfloat16(), torch.full((64,), 0.98))
    assert low.dtype == torch.float32
    seen = Denoiser(lambda x, t: low, VP(), "flow")(x.bfloat16().float(), 0.98).x0
    want = Denoiser(model, VP(), "flow")(x.bfloat16().float(), 0.98).x0
    # VP's x0 divides the velocity by 0.07: rounded to bfloat16 it would be off by 0.05.
    assert (seen - want).abs().max() < 0.02


# ---------------------------------------------------------------------------------------------------------------- solver


def miss(solver: FlowSDE, process: Process, steps: int) -> float:
    """The largest relative error of the variance, or error of the mean, of Gaussian data along a run: linear, so known."""
    at = process.moments(process.check_times(solver.times(process, steps=steps, grid="time")))
    alpha, sigma, d_alpha, d_sigma = at.alpha, at.sigma, at.dalpha, at.dsigma
    true = [a**2 * V + s**2 for a, s in zip(alpha, sigma, strict=True)]
    mean, variance, worst = alpha[0] * MU, true[0], 0.0
    for i, stage in enumerate(solver.table(at, process)):
        slope = (alpha[i] * d_alpha[i] * V + sigma[i] * d_sigma[i]) / true[i]  # of the flow, in x
        mean = stage.base * mean + stage.value * (d_alpha[i] * MU + slope * (mean - alpha[i] * MU))
        variance = (stage.base + stage.value * slope) ** 2 * variance + stage.std**2
        worst = max(worst, abs(mean - alpha[i + 1] * MU), abs(variance / true[i + 1] - 1))
    return worst


@pytest.mark.parametrize("g", SHAPES)
@pytest.mark.parametrize("process", PATHS.values(), ids=PATHS)
def test_every_g_has_the_marginals_of_the_flow(process: Process, g: str) -> None:
    """Twice the steps halve the error, for a strength of noise at which without the score the law would be another."""
    solver = FlowSDE(g, 0.5 if g == "tan" else 1.5)
    coarse, fine = miss(solver, process, 160), miss(solver, process, 320)
    assert fine < 0.05
    assert 1.7 < coarse / fine < 2.6


def test_strengths() -> None:
    t = torch.tensor([0.3, 0.96], dtype=torch.float64)
    tan = [math.tan(0.15 * math.pi), math.tan(0.475 * math.pi)]
    want = {
        "square": [0.09, 0.9216], "constant": [1, 1], "linear": [0.3, 0.96], "clipping": [0, 0.92], "tan": tan,
        "sin": [math.sin(0.15 * math.pi), math.sin(0.48 * math.pi)], "exp": [math.exp(-49), math.exp(-0.16)],
        "sigma": VP().sigma(t).tolist(),
    }  # fmt: skip
    assert set(want) == set(SHAPES)
    for g, values in want.items():
        assert FlowSDE(g, 2.0).strength(VP(), t).tolist() == pytest.approx([2 * v for v in values])
    free = lambda t: VP().diffusion2(t).sqrt()  # noqa: E731 - the forward SDE without a score
    assert FlowSDE(free, 1.0).strength(VP(), t).square().tolist() == pytest.approx([0.1 + 19.9 * r for r in t.tolist()])


def test_without_noise_it_is_eulers_method_bit_for_bit() -> None:
    x = torch.randn(8, 1, dtype=torch.float64, generator=rng())
    for process in (Flow(), LATE_VP):
        ours = sample(exact(process), x, solver=FlowSDE(norm=0.0, grid="uniform"), steps=7)
        assert torch.equal(ours, sample(exact(process), x, solver=Euler(), steps=7))


def test_the_time_grid_takes_small_steps_first() -> None:
    q = torch.arange(10, -1, -1, dtype=torch.float64) / 10
    wide = FlowSDE(grid="vp").times(Flow(), steps=10)
    assert torch.allclose(wide, (1 - (1 - q) ** 2).sqrt())
    assert torch.allclose(FlowSDE().times(Flow(), steps=10), q)
    by_itself = FlowSDE().times(VP(), steps=10)
    assert torch.allclose(by_itself, 1e-3 + 0.999 * wide)
    assert by_itself[9].item() == pytest.approx(0.436, abs=1e-3)
    assert torch.equal(FlowSDE().times(VP(), steps=4, grid="time"), VP().grid(4, "time"))


def test_the_last_step_adds_no_more_noise_than_there_is() -> None:
    *steps, last = FlowSDE().table([1.0, 0.9, 0.5, 0.0], Flow())
    assert last.std == 0
    assert (last.base, last.value) == (1.0, -0.5)
    assert [s.std for s in steps] == pytest.approx([3 * 0.1**0.5, 3 * 0.81 * 0.4**0.5])
    assert FlowSDE().table([0.9, 0.5], Flow())[-1].std == 0
    assert FlowSDE().table([0.6, 0.5], Flow())[-1].std == pytest.approx(3 * 0.36 * 0.1**0.5)


def test_a_golden_trajectory() -> None:
    """The paper's step in NumPy, of a velocity that is made up, with the noise that ``sample`` draws."""
    process, b = VP(), 19.9
    x = torch.linspace(-1, 1, 4, dtype=torch.float64)[:, None]
    source = rng(5)
    got = sample(
        Denoiser(lambda x, t: torch.sin(x) * t[:, None].double(), process, "flow", label=lambda t: t),
        x, solver=FlowSDE(norm=1.5), grid=[1.0, 0.8, 0.5, 0.3], generator=source,
    )  # fmt: skip
    noise, y = rng(5), x.numpy()
    for t, end in ((1.0, 0.8), (0.8, 0.5), (0.5, 0.3)):
        u, h, g, big = np.sin(y) * t, t - end, 1.5 * t**2, 0.5 * t**2 * b + 0.1 * t
        alpha, sigma = np.exp(-big / 2), np.sqrt(1 - np.exp(-big))
        d_alpha, d_sigma = -(b * t + 0.1) / 2 * alpha, (b * t + 0.1) / 2 * np.exp(-big) / sigma
        score = (alpha * u - d_alpha * y) / (d_alpha * sigma - alpha * d_sigma) / sigma
        y = y + (-u + g**2 / 2 * score) * h
        y = y + g * np.sqrt(h) * torch.randn(4, 1, dtype=torch.float64, generator=noise).numpy()
    assert np.allclose(got.numpy(), y, rtol=1e-9, atol=1e-9)


def test_another_path_in_the_models_own_coordinates_is_its_conversion() -> None:
    """Same noise, same states up to c; g is of the path's time, not of the model's."""
    path = VP()
    times = path.check_times(FlowSDE().times(path, steps=10))
    at = matched(Flow(), path, torch.tensor(times, dtype=torch.float64))
    own = Flow(t_min=at.t[-1].item(), t_max=at.t[0].item())
    x = torch.randn(6, 1, dtype=torch.float64, generator=rng())
    want = sample(convert(exact(Flow()), Flow(), path), x, solver=FlowSDE(), grid=times, generator=rng(1))
    solver = FlowSDE(path=path)
    assert torch.allclose(solver.times(own, steps=10), at.t, atol=1e-12)
    got = sample(exact(own), x / at.c[0], solver=solver, steps=10, generator=rng(1))
    assert torch.allclose(got * at.c[-1], want, rtol=1e-9, atol=1e-9)


def test_a_path_begins_and_ends_where_the_model_does() -> None:
    solver = FlowSDE(path=VP())
    times = solver.times(Flow(), steps=10).tolist()
    assert (times[0], times[-1]) == (1.0, 0.0)
    # Beyond VP's own ends, at t = 0.9935 and 0.0104 of the flow, the flow is followed.
    first, *_, last = solver.table([1.0, 0.998, 0.9, 0.5, 0.01, 0.0], Flow())
    for stage in (first, last):
        assert stage.std == 0
        assert (stage.base, stage.value) == (pytest.approx(1.0), pytest.approx(stage.to - stage.t))
    x = sample(exact(Flow()), (4000, 1), solver=solver, steps=200, generator=rng(), dtype=torch.float64)
    law = MIXTURE.sample(4000, generator=rng(1))
    assert abs(x.mean() - law.mean()) < 0.08
    assert abs(x.std() - law.std()) < 0.05


@pytest.mark.parametrize(
    "solver", [FlowSDE(), FlowSDE(norm=0.0), FlowSDE("sigma", 1.0, path=TrigFlow(0.01, 0.99))], ids=repr
)
def test_it_does_what_the_sampling_loop_relies_on(solver: FlowSDE) -> None:
    check_solver(solver)


def test_a_step_gives_its_law_and_what_guidance_changes_of_it() -> None:
    """What steering needs of a flow model: mean, deviation, and the gain of the prediction's flow."""
    seen: list[Any] = []
    process, asked = Flow(), list[Any]()
    x = torch.randn(5, 1, dtype=torch.float64, generator=rng())

    def answer(query: Query) -> Prediction:
        asked.append(exact(process)(query.x, query.t))
        return asked[-1]

    drive(FlowSDE().run(x, [0.9, 0.6, 0.4], process, generator=rng(3)), answer, lambda step: seen.append(step))
    noise = torch.randn(5, 1, dtype=torch.float64, generator=rng(3))
    assert seen[0].std == pytest.approx(3 * 0.81 * 0.3**0.5)
    assert torch.allclose(seen[0].x, seen[0].mean + seen[0].std * noise)
    view, weight = seen[0].gain
    other = FlowSDE().run(x, [0.9, 0.6, 0.4], process, generator=rng(3))
    query = next(other)
    shifted = other.send(asked[0].replace(asked[0].flow + 0.5, "flow"))
    assert torch.allclose(shifted.mean - seen[0].mean, torch.full_like(x, 0.5 * weight))
    assert (view, query.t) == ("flow", 0.9)


# -------------------------------------------------------------------------------------------------------------- steering


def brightness(x: torch.Tensor) -> torch.Tensor:
    return x.flatten(2).sum(2)


@pytest.mark.parametrize("path", [None, TrigFlow()], ids=["linear", "trig"])
@pytest.mark.parametrize("potential", ["diff", "max"])
def test_feynman_kac_steering_of_a_flow_has_the_tilts_law_and_evidence(path: Any, potential: str) -> None:
    """Weights of a mixture's components, mean and variance, and log E[exp(lam x)], which are known for a reward that is linear."""
    lam, n = 0.9, 6000
    law, log_z = MIXTURE.tilt([lam])
    steering = FKSteering(
        lambda samples: samples[..., 0], lam=lam, potential=potential, num_particles=n, ess_threshold=0.5, pick="all"
    )
    x, info = sample(
        exact(Flow(0.02, 1.0)), (1, 1), solver=FlowSDE("sigma", 1.0, path=path), steps=60, steering=steering,
        generator=rng(3), dtype=torch.float64, return_info=True,
    )  # fmt: skip
    w, x = info.steering.logw.softmax(1)[0], x[:, 0]
    mean, second = w @ x, w @ x.square()
    # Six standard errors, of fewer independent particles than there are, and the order of sixty steps of 0.02.
    error = 6 * (law.covariance.item() / 1500) ** 0.5 + 0.02
    assert abs(mean - law.mean.item()) < error
    assert abs(second - mean.square() - law.covariance.item()) < 2 * error * law.covariance.item() ** 0.5
    assert abs(w @ law.responsibilities(x[:, None])[:, 1] - law.weights[1]) < error
    assert abs(info.steering.log_z.item() - log_z.item()) < error
    assert abs(MIXTURE.mean.item() - law.mean.item()) > 3 * error  # which it was before


def test_best_of_n_as_a_steering_returns_the_best_of_each_system() -> None:
    search, x = BestOfN(brightness, nfe=40, steps=5), torch.randn(16, 1, dtype=torch.float64, generator=rng())
    assert (search.particles, search.resamples) == (8, False)
    whole = sample(exact(Flow()), x, solver=DDIM(), steps=5)
    best = sample(exact(Flow()), x, solver=DDIM(), steps=5, steering=search)
    assert torch.equal(best, whole.view(2, 8, 1).amax(1))


@pytest.mark.parametrize("half", [False, True])
def test_svdd_as_a_steering_draws_all_candidates_from_the_best(half: bool) -> None:
    """Written out for two chains of three candidates in each of two systems."""
    search, process = SVDD(brightness, chains=2, candidates=3), Flow()
    x = torch.randn(12, 1, dtype=torch.float64, generator=rng())
    x = x.bfloat16() if half else x
    got = sample(exact(process), x, solver=FlowSDE(), steps=4, steering=search, generator=rng(7))
    assert got.shape == (2, 1)
    assert got.dtype == x.dtype
    if half:
        return
    noise = rng(7)
    times = FlowSDE().times(process, steps=4).tolist()
    for i, stage in enumerate(FlowSDE().table(times, process)):
        said = exact(process)(x, times[i])
        mean = stage.base * x + stage.value * said.flow
        rows = [3 * c + int(said.x0[3 * c : 3 * c + 3].argmax()) for c in range(4) for _ in range(3)]
        fresh = torch.randn(12, 1, dtype=torch.float64, generator=noise) if stage.std else 0.0
        x = mean[rows] + stage.std * fresh
    assert torch.allclose(got, x.view(2, 6, 1).amax(1))
