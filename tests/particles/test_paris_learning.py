"""Models, scores and learning by PaRIS, and what is refused."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.distributions import Independent, MultivariateNormal
from torch.distributions import Normal as TorchNormal

from polyak.claims.particles import _state_spaces as S
from polyak.core import exact
from polyak.particles import (
    FisherScore,
    LinearGaussian,
    NeuralSSM,
    PaRIS,
    ParisParticleGibbs,
    StateSpaceModel,
    StochasticVolatility,
    fit,
    particle_gibbs,
)
from polyak.particles.paris import Normal
from polyak.particles.paris.learning import sweep_score

DOUBLE = torch.float64


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def draw(*shape, seed=0):
    return torch.randn(*shape, dtype=DOUBLE, generator=seeded(seed))


def neural():
    torch.manual_seed(0)
    return NeuralSSM(3, 2, 8).double()


def vector():
    A = torch.tensor([[0.9, 0.2], [-0.1, 0.8]], dtype=DOUBLE)
    return LinearGaussian(
        A, C=[[1.0, 0.5]], Q=[[0.3, 0.1], [0.1, 0.2]], R=[[0.2]], m0=[0.5, -0.5], P0=[[1.0, 0.2], [0.2, 0.5]]
    )


# Models: densities by torch.distributions


def laws(model, x):
    """Initial, transition and observation."""
    if isinstance(model, StochasticVolatility):
        phi, sigma, beta = model.phi, model.sigma, model.beta
        return (
            TorchNormal(0.0, sigma / (1 - phi**2).sqrt()),
            TorchNormal(phi * x, sigma),
            TorchNormal(0.0, beta * (x / 2).exp()),
        )
    if isinstance(model, NeuralSSM):
        given = ((model.m0, model.log_s0), (x + model.drift(x), model.log_s), (model.readout(x), model.log_r))
        return tuple(Independent(TorchNormal(mean, log.exp()), 1) for mean, log in given)
    if not model.state_shape:
        return (
            TorchNormal(model.m0, model.P0.sqrt()),
            TorchNormal(model.A * x, model.Q.sqrt()),
            TorchNormal(model.C * x, model.R.sqrt()),
        )
    return (
        MultivariateNormal(model.m0, model.P0),
        MultivariateNormal(x @ model.A.mT, model.Q),
        MultivariateNormal(x @ model.C.mT, model.R),
    )


MODELS = {
    "scalar": lambda: LinearGaussian(torch.tensor(0.9, dtype=DOUBLE), C=0.7, Q=0.5, R=0.3, m0=0.2, P0=2.0),
    "vector": vector,
    "volatility": lambda: StochasticVolatility(0.95, 0.3, 1.5, dtype=DOUBLE),
    "neural": neural,
}


@pytest.mark.parametrize("name", MODELS)
def test_densities_are_those_of_torch(name):
    model = MODELS[name]()
    x, new, y = (
        draw(7, *model.state_shape),
        draw(7, *model.state_shape, seed=1),
        draw(7, *model.observation_shape, seed=2),
    )
    start, move, see = laws(model, x)
    for made, law, value in (
        (model.initial().log_prob(x), start, x),
        (model.log_transition(x, new, 0), move, new),
        (model.log_observation(x, y, 0), see, y),
    ):
        torch.testing.assert_close(made, law.log_prob(value), rtol=1e-12, atol=1e-12)
    pairs = model.log_transition(x[None], new[:, None], 0)
    torch.testing.assert_close(pairs.diagonal(), model.log_transition(x, new, 0), rtol=1e-12, atol=1e-12)
    peak = laws(model, x)[1]
    top = peak.log_prob(peak.mean)
    torch.testing.assert_close(torch.full_like(top, model.q_max(0).log().item()), top, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", MODELS)
def test_draws_have_the_moments_of_their_law(name):
    model, n = MODELS[name](), 20_000
    x, y = model.simulate(2, (n,), generator=seeded(1))
    assert x.shape == (n, 2, *model.state_shape)
    assert y.shape == (n, 2, *model.observation_shape)
    first = laws(model, x[:, 0])[0]
    for made, law, value in (
        (x[:, 0], first, x[:, 0]), (x[:, 1], laws(model, x[:, 0])[1], x[:, 1]), (y[:, 1], laws(model, x[:, 1])[2], y[:, 1]),
    ):  # fmt: skip
        gap = (made - law.mean) / law.variance.sqrt()
        assert (gap.mean(0).abs() < 4.5 / n**0.5).all()
        assert ((gap.square().mean(0) - 1).abs() < 4.5 * (2 / n) ** 0.5).all()
        assert torch.isfinite(law.log_prob(value)).all()


def test_covariances_come_back_from_their_free_parameters():
    model = vector()
    torch.testing.assert_close(model.Q, torch.tensor([[0.3, 0.1], [0.1, 0.2]], dtype=DOUBLE), rtol=1e-14, atol=0)
    assert {n for n, _ in model.named_parameters()} == {"A", "C", "raw_Q", "raw_R", "raw_P0", "m0"}


def test_a_network_sees_each_particle_once_not_each_pair():
    model, seen = neural(), []
    model.drift.register_forward_hook(lambda module, given, made: seen.append(made.shape[:-1].numel()))
    y = torch.zeros(3, 2, dtype=DOUBLE)
    S.run(PaRIS(model, lambda x, x_next, t: x[..., 0], 50, generator=seeded()), y)
    assert max(seen) == 50


# Scores


def kalman_score(model, y, parameters):
    """By autograd through Kalman's filter, in the same parameters."""
    wide = [p if p.ndim else p.reshape(1, 1) for p in (model.A, model.C, model.Q, model.R)]
    start, spread = model.m0.reshape(-1), model.P0 if model.P0.ndim else model.P0.reshape(1, 1)
    kalman = exact.LinearGaussian(*wide, start, spread)
    value = kalman.log_likelihood(y if model.observation_shape else y[:, None])
    return torch.cat([g.flatten() for g in torch.autograd.grad(value, parameters)])


@pytest.mark.parametrize("name", ["scalar", "vector"])
def test_the_score_is_the_gradient_of_kalmans_likelihood(name):
    model = MODELS[name]()
    y = model.simulate(6, generator=seeded(3))[1]
    y[2] = math.nan
    parameters = list(model.parameters())
    wanted = kalman_score(model, y, parameters)
    score = FisherScore(model)
    made = (
        ParisParticleGibbs(model, score, 24, sweeps=4, burn_in=1, generator=seeded())
        .run(y.expand(60, *y.shape))
        .estimate
    )
    assert made.shape == (60, len(wanted))
    kept = wanted.abs() + made.std(0) > 1e-12  # a Cholesky factor's upper triangle is no parameter
    gap = (made.mean(0) - wanted).abs() / (made.std(0) / 60**0.5)
    assert (gap[kept] < 4.5).all()
    assert [p.shape for p in score.split(made)] == [(60, *p.shape) for p in parameters]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("engine", ["dense", "ancestor"])
def test_one_backward_pass_gives_the_score_that_particles_would_carry(name, engine):
    model = MODELS[name]()
    y = model.simulate(5, (2,), generator=seeded(1))[1]
    y[0, 1] = math.nan
    chain = ParisParticleGibbs(model, FisherScore(model), 6, 2, 1, 0, engine, seeded())
    times, draws = list(y.unbind(1)), []
    with torch.no_grad():
        path = chain._sweep(times, None)
        chain._sweep(times, path, draws)
    carried = chain._paris._mean().mean(0)
    passed = torch.cat(
        [g.flatten() for g in sweep_score(model, times, chain._paris.cloud, draws, list(model.parameters()))]
    )
    torch.testing.assert_close(passed, carried, rtol=1e-10, atol=1e-10)


def test_some_of_the_parameters_in_their_order():
    model = MODELS["scalar"]()
    y = model.simulate(5, generator=seeded(1))[1]
    whole = PaRIS(model, FisherScore(model, [model.raw_R, model.A]), 8, generator=seeded())
    S.run(whole, y)
    each = PaRIS(model, FisherScore(model), 8, generator=seeded())
    S.run(each, y)
    at = [n for n, _ in model.named_parameters()]
    assert torch.equal(whole.estimate(), each.estimate()[[at.index("raw_R"), at.index("A")]])


# Learning


def series(steps=40, seed=2):
    return S.linear().simulate(steps, (4,), generator=seeded(seed))[1]


@pytest.mark.parametrize(("estimator", "maximize"), [("ppg", True), ("msc", False), ("paris", True), ("rml", False)])
def test_every_estimator_climbs_the_likelihood(estimator, maximize):
    model, y = S.linear(0.3), series(12)
    make = torch.optim.SGD([model.A], lr=0.03 if estimator != "rml" else 0.1, maximize=maximize)
    before = S.kalman(0.3).log_likelihood(y[..., None]).mean()
    more = {"ppg": dict(sweeps=2), "paris": dict(sweeps=2)}.get(estimator, {})
    made = fit(model, y, make, estimator, 4, n=12, generator=seeded(), **more)
    after = S.kalman(model.A.detach()).log_likelihood(y[..., None]).mean()
    assert after > before + 0.5
    assert made.parameters.shape == made.scores.shape == (4, 1)
    assert made.parameters[-1] == model.A
    assert (made.path is None) == (estimator in ("paris", "rml"))
    assert make.param_groups[0]["lr"] in (0.03, 0.1)


def test_optimizers_see_the_same_score_and_the_path_goes_on():
    y, seen = series(10), []
    model = S.linear(0.5)
    made = fit(
        model, y, torch.optim.Adam(model.parameters(), lr=0.0), "msc", 2, n=6, callback=seen.append, generator=seeded()
    )
    assert seen == [0, 1]
    chain = ParisParticleGibbs(model, FisherScore(model), 6, sweeps=2, burn_in=0, generator=seeded())
    run = chain.run(y)
    torch.testing.assert_close(made.scores, run.per_sweep.mean(1), rtol=1e-10, atol=1e-10)
    assert torch.equal(made.path, run.path)


def test_stochastic_volatility_and_a_network_are_learned_with_missing_observations():
    for model, lr in ((StochasticVolatility(0.5, 0.5, 0.5), 0.05), (NeuralSSM(2, 1, 4), 0.02)):
        truth = StochasticVolatility(0.9, 0.3, 2.0) if isinstance(model, StochasticVolatility) else model
        y = truth.simulate(12, (2,), generator=seeded())[1].clone()
        y[0, 3] = math.nan
        before = [p.detach().clone() for p in model.parameters()]
        made = fit(model, y, torch.optim.Adam(model.parameters(), lr=lr), "msc", 2, n=8, generator=seeded())
        assert made.scores.isfinite().all()
        assert any((p != q).any() for p, q in zip(before, model.parameters(), strict=True))


def test_a_model_may_be_any_object_with_the_methods():
    class Walk:
        state_shape = observation_shape = ()

        def initial(self):
            return Normal(torch.tensor(0.0, dtype=DOUBLE), torch.tensor(1.0, dtype=DOUBLE))

        def log_transition(self, x, x_next, t):
            return -0.5 * (x_next - x) ** 2

        def sample_transition(self, x, t, generator):
            return x + torch.randn(x.shape, dtype=DOUBLE, generator=generator)

        def log_observation(self, x, y, t):
            return torch.where(y == x.round(), 0.0, -1.0)

    counts = torch.tensor([0, 1, 1])  # integers, none of which is missing
    assert ParisParticleGibbs(Walk(), S.product, 8, generator=seeded()).run(counts).estimate.isfinite()
    with pytest.raises(ValueError, match="q_max"):
        PaRIS(Walk(), S.product, backward="rejection")
    with pytest.raises(TypeError, match="model must be a torch"):
        FisherScore(Walk())


# What is refused


class Shift(StateSpaceModel):
    """Deterministic, and impossible where y > 5."""

    def initial(self):
        return S.linear().initial()

    def log_transition(self, x, x_next, t):
        return torch.where(x_next == x + 1, 0.0, -math.inf)

    def sample_transition(self, x, t, generator):
        return x + 1

    def log_observation(self, x, y, t):
        return torch.where(y > 5, -math.inf, 0.0) * torch.ones_like(x)


class Jump(Shift):
    """Its transition has no density where its draws are."""

    def log_transition(self, x, x_next, t):
        return torch.full(torch.broadcast_shapes(x.shape, x_next.shape), -math.inf, dtype=DOUBLE)


Y = torch.zeros(2, 3, dtype=DOUBLE)


def test_a_collapse_is_said_with_time_and_observation():
    y = Y.clone()
    y[1, 2] = 7.5
    with pytest.raises(ValueError, match=r"no particle has a weight at t=2 in system \(1,\).*y_t=7.5"):
        S.run(PaRIS(Shift(), S.product, 4, backward="ancestor"), y)
    with pytest.raises(ValueError, match="t=2"):
        particle_gibbs(Shift(), y, "ancestor", n=4)


@pytest.mark.parametrize("m", [2, math.inf])
@pytest.mark.parametrize("model", [Jump()])
def test_an_undefined_backward_kernel_is_said(model, m):
    with pytest.raises(ValueError, match=r"backward kernel undefined at t=0 in system \(0,\)"):
        S.run(PaRIS(model, S.product, 4, m), Y)


def test_a_deterministic_transition_has_one_past():
    smoother = PaRIS(Shift(), lambda x, x_next, t: x_next - x, 4, generator=seeded())
    S.run(smoother, Y)
    assert (smoother.estimate() == 2).all()


@pytest.mark.parametrize("kind", ["backward", "pgas"])
def test_an_impossible_path_is_refused(kind):
    path = torch.tensor([[0.0, 5.0, 6.0]] * 2, dtype=DOUBLE)  # nothing goes from 0 to 5
    with pytest.raises(ValueError, match="backward kernel undefined at t=0"):
        ParisParticleGibbs(Shift(), S.product, 4).run(Y, path)
    if kind == "pgas":
        with pytest.raises(ValueError, match="backward kernel undefined"):
            particle_gibbs(Shift(), Y, kind, n=4, path=path)

    class Positive(Shift):
        def log_observation(self, x, y, t):
            return torch.where(x > 3, -math.inf, 0.0)

    with pytest.raises(ValueError, match="path must be possible under the model, and has no weight at t=0"):
        ParisParticleGibbs(Positive(), S.product, 4).run(Y, torch.tensor([[4.0, 5.0, 6.0]] * 2, dtype=DOUBLE))


def gibbs(**options):
    return ParisParticleGibbs(S.linear(), S.product, **options)


def learn(**options):
    model = S.linear()
    return fit(
        model, Y, **{"optimizer": torch.optim.SGD(model.parameters(), lr=0.1), "iterations": 1, "n": 4, **options}
    )


@pytest.mark.parametrize(("call", "message"), [
    (lambda: gibbs(sweeps=4, burn_in=4), "burn_in must be below sweeps"),
    (lambda: gibbs(n=1), "n must be at least 2"),
    (lambda: gibbs(m=math.inf, backward="mcmc"), 'm=inf .* backward="dense"'),
    (lambda: gibbs().run(torch.zeros(())), "y must have shape"),
    (lambda: gibbs().run(torch.full((3,), math.inf)), "y must be finite, or NaN"),
    (lambda: gibbs().run(Y, torch.zeros(2, 4)), r"path must have shape \(2, 3\)"),
    (lambda: gibbs().run(Y, torch.full((2, 3), math.nan)), "path must be finite"),
    (lambda: particle_gibbs(S.linear(), Y, "pg"), "kind must be one of"),
    (lambda: particle_gibbs(S.linear(), Y, n=1), "n must be at least 2"),
    (lambda: PaRIS(S.linear(), S.product).update(Y[:, 0]), "call init"),
    (lambda: PaRIS(S.linear(), S.product).estimate(), "call init"),
    (lambda: PaRIS(vector(), S.product).init(torch.zeros(3)), r"y0 must have shape \(\*batch, 1\)"),
    (lambda: S.run(PaRIS(S.linear(), S.product, 4), Y).append(0) or _grown(), r"y_t must have shape \(2,\)"),
    (lambda: S.run(PaRIS(S.linear(), lambda x, x_next, t: x.sum(), 4), Y[:, :1]), None),
    (lambda: S.run(PaRIS(S.linear(), lambda x, x_next, t: torch.ones(7), 4), Y), "functional must return shape"),
    (lambda: S.run(PaRIS(S.linear(), lambda x, x_next, t: 1.0, 4), Y), "functional must return a tensor"),
    (lambda: FisherScore(S.linear(), [nn.Parameter(torch.ones(()))]), "parameters must be some of the model's"),
    (lambda: FisherScore(S.linear(), []), "parameters must be some of the model's"),
    (lambda: learn(optimizer=torch.optim.SGD([nn.Parameter(torch.ones(()))], lr=0.1)), "optimizer must be over the model's"),
    (lambda: learn(estimator="msc", sweeps=2), "sweeps does nothing with estimator='msc'"),
    (lambda: learn(estimator="rml", path=Y), "path does nothing with estimator='rml'"),
    (lambda: learn(estimator="paris", burn_in=1), "burn_in does nothing"),
    (lambda: LinearGaussian([[0.9, 0.1]]), "A must be a number or a square matrix"),
    (lambda: LinearGaussian(0.9, Q=0.0), "Q must be > 0"),
    (lambda: LinearGaussian(torch.eye(2), Q=[[1.0, 2.0], [2.0, 1.0]]), "Q must be a symmetric positive definite matrix"),
    (lambda: LinearGaussian(torch.eye(2), C=[[1.0]]), "C must have shape"),
    (lambda: LinearGaussian(torch.eye(2), m0=[1.0]), "m0 must have shape"),
    (lambda: LinearGaussian(torch.eye(2), R=1.0), "R must have shape"),
    (lambda: StochasticVolatility(phi=1.0), "phi must be in"),
    (lambda: Normal(torch.zeros(2), torch.eye(3), 1, True), "scale must be a square matrix"),
])  # fmt: skip
def test_bad_input_is_refused_by_name(call, message):
    if message is None:
        call()
        return
    with pytest.raises((ValueError, TypeError), match=message):
        call()


def _grown():
    smoother = PaRIS(S.linear(), S.product, 4)
    smoother.init(Y[:, 0])
    smoother.update(torch.zeros(3, dtype=DOUBLE))


@pytest.mark.parametrize("make", [PaRIS, ParisParticleGibbs])
def test_one_draw_is_warned_of(make):
    with pytest.warns(UserWarning, match="m=1 backward draw"):
        make(S.linear(), S.product, 8, 1)


def test_a_score_that_is_not_finite_ends_learning_before_a_step():
    class Broken(LinearGaussian):
        def log_observation(self, x, y, t):
            return super().log_observation(x, y, t) + (self.A - self.A.detach()) * math.nan

    model = Broken(torch.tensor(0.9, dtype=DOUBLE))
    with pytest.raises(ValueError):
        fit(model, Y, torch.optim.SGD(model.parameters(), lr=0.1), iterations=1, n=4)
    assert model.A == 0.9
