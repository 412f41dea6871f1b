"""Stochastic interpolants: paths, fields in closed form and from networks, losses, and what may not be asked."""

from __future__ import annotations

import math
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import multivariate_normal

from polyak.core.exact import Gaussian, Mixture
from polyak.generate import DDIM, VP, Denoiser, Euler, Flow, TrigFlow, check_process, sample
from polyak.generate.interpolants import (
    Fields,
    GaussianMixtureInterpolant,
    Interpolant,
    LinearPath,
    integrate,
    interpolant_loss,
)
from polyak.generate.problems import ExactDenoiser

RHO0 = Mixture([[-1.0, 0.5], [1.0, 0.0]], [[[0.5, 0.2], [0.2, 0.3]], [[0.4, -0.1], [-0.1, 0.6]]], [0.4, 0.6])
RHO1 = Mixture([[0.0, 1.0], [0.6, -1.0]], [[[0.3, 0.1], [0.1, 0.5]], [[0.6, 0.2], [0.2, 0.4]]], [0.7, 0.3])
VP_PATH = LinearPath(lambda t: (1 - t**2).sqrt(), lambda t: t, one_sided=True)
OWN = LinearPath(lambda t: (1 - t) ** 2, lambda t: t**3)
TWO_SIDED = [
    Interpolant(),
    Interpolant(a2=2.0),
    Interpolant("linear", "zero"),
    Interpolant("linear", "bsquared"),
    Interpolant("trig", "brownian"),
    Interpolant("trig", "sigmoid"),
    Interpolant("encdec", "sinesquared"),
    Interpolant(OWN, lambda t: t.sqrt() * (1 - t)),
]
ONE_SIDED = [Interpolant("onesided_linear"), Interpolant("onesided_trig"), Interpolant(VP_PATH)]
MIRROR = Interpolant("mirror", "bsquared")
ALL = [*TWO_SIDED, *ONE_SIDED, MIRROR, Interpolant("mirror")]
NOISY = [path for path in ALL if not path.latent_free]


def named(path: Interpolant) -> str:
    return "-".join(part if isinstance(part, str) else "own" for part in (path.path, path.noise)) + f"-{path.a2:g}"


def exact(path: Interpolant) -> GaussianMixtureInterpolant:
    return GaussianMixtureInterpolant(None if path.one_sided or path.mirror else RHO0, RHO1, path)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def points(n: int = 5, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, 2, dtype=torch.float64, generator=seeded(seed))


every_path = pytest.mark.parametrize("path", ALL, ids=named)
every_noisy = pytest.mark.parametrize("path", NOISY, ids=named)


# ------------------------------------------------------------------------------------------------------------------ paths


@every_path
def test_slopes_are_derivatives_and_ends_are_met(path: Interpolant) -> None:
    t, h = torch.tensor([0.07, 0.3, 0.49, 0.6, 0.93], dtype=torch.float64), 1e-6
    for name in ("a", "b", "gamma"):
        f, df = getattr(path, name), getattr(path, f"d{name}")
        assert torch.allclose(df(t), (f(t + h) - f(t - h)) / (2 * h), rtol=1e-7, atol=1e-8)
    assert torch.allclose(path.gg_dot(t), path.gamma(t) * path.dgamma(t), rtol=1e-12, atol=1e-15)
    ends = [(f(0.0), f(1.0)) for f in (path.a, path.b, path.gamma)]
    assert ends == [(0.0, 0.0), (1.0, 1.0), (0.0, 0.0)] if path.mirror else [(1.0, 0.0), (0.0, 1.0), (0.0, 0.0)]


def test_named_paths_are_those_of_the_paper() -> None:
    t = torch.linspace(0.01, 0.99, 9, dtype=torch.float64)
    gamma = {
        "brownian": (t * (1 - t)).sqrt(),
        "bsquared": t * (1 - t),
        "sinesquared": torch.sin(torch.pi * t) ** 2,
        "sigmoid": torch.sigmoid(10 * t - 4)
        - torch.sigmoid(10 * t - 6)
        - 1 / (1 + math.exp(4))
        + 1 / (1 + math.exp(6)),
    }
    for name, want in gamma.items():
        assert torch.allclose(Interpolant("linear", name).gamma(t), want, rtol=1e-12)
    trig = Interpolant("trig", a2=3.0)
    assert torch.allclose(trig.a(t) ** 2 + trig.b(t) ** 2 + trig.gamma(t) ** 2, torch.ones_like(t))
    encdec = Interpolant("encdec")
    assert torch.allclose(encdec.a(t) + encdec.b(t), torch.cos(torch.pi * t) ** 2)
    assert bool((encdec.a(t) * encdec.b(t) == 0).all())


def test_gamma_gamma_dot_is_finite_where_gamma_dot_is_not() -> None:
    path = Interpolant(a2=3.0)
    assert (path.gg_dot(0.0), path.gg_dot(1.0)) == (1.5, -1.5)
    ends = torch.tensor([0.0, 1.0])
    assert path.gg_dot(ends).tolist() == [1.5, -1.5]
    for t, at in ((0.0, 0), (1.0, 1), (ends, 0)):
        with pytest.raises(ValueError, match=rf"got t={at}: the score is singular at the endpoint; use t0 > 0"):
            path.dgamma(t)


def test_what_single_precision_misses_of_an_end_is_forgiven() -> None:
    path = Interpolant()
    for t in (1 + 1e-7, torch.tensor(1.0000001), torch.tensor([-1e-7, 1.0000001])):
        assert bool((torch.as_tensor(path.gamma(t)) == 0).all())


def test_half_way_encoding_is_noise_alone() -> None:
    path, x0, x1 = Interpolant("encdec", "sinesquared"), points(seed=1), points(seed=2)
    x, z = path.sample(0.5, x0, x1, generator=seeded())
    assert torch.equal(x, z)
    assert (path.a(0.5), path.b(0.5)) == (0.0, 0.0)


def test_draws() -> None:
    path, x0, x1 = Interpolant("trig", "bsquared"), points(seed=1), points(seed=2)
    t = torch.tensor([0.0, 0.2, 0.5, 0.9, 1.0])
    x, z = path.sample(t, x0, x1, generator=seeded())
    assert torch.equal(z, torch.randn(5, 2, dtype=torch.float64, generator=seeded()))
    u = t.double()[:, None]
    want = path.a(u) * x0 + path.b(u) * x1 + path.gamma(u) * z
    assert torch.allclose(x, want, rtol=1e-14)
    assert torch.equal(path.sample(t, x0, x1, z)[0], x)
    assert torch.allclose(path.dt(t, x0, x1), path.da(u) * x0 + path.db(u) * x1, rtol=1e-14)
    one = Interpolant("onesided_linear")
    x, z = one.sample(0.25, None, x1, generator=seeded())
    assert torch.allclose(x, 0.75 * z + 0.25 * x1)
    assert torch.equal(one.sample(0.25, z, x1)[1], z)
    x, z = MIRROR.sample(0.5, None, x1.float(), generator=seeded())
    assert x.dtype == z.dtype == torch.float32
    assert torch.allclose(x, x1.float() + 0.25 * z)
    assert torch.equal(MIRROR.dt(0.5, None, x1), torch.zeros_like(x1))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Interpolant("linear", lambda t: t), "gamma must be 0 at t=0 and t=1, got 0 and 1"),
        (lambda: Interpolant("linear", lambda t: -t * (1 - t)), "gamma must be > 0 inside"),
        (lambda: Interpolant("linear", lambda t: t * (1 - t) * (t - 0.5) ** 2), "gamma must be > 0 inside"),
        (lambda: Interpolant().a(1.00001), r"t must be in \[0, 1\], got 1.00001"),
        (lambda: Interpolant("linear", lambda t: 0.0), "gamma must be a function of a float64 tensor"),
        (lambda: Interpolant("lineal"), "did you mean 'linear'"),
        (lambda: Interpolant("linear", "brown"), "gamma must be one of"),
        (lambda: Interpolant("onesided_linear", "brownian"), "gamma must be 'zero' of a one-sided path"),
        (lambda: Interpolant("mirror", "zero"), "gamma must not be 'zero' of the mirror path"),
        (lambda: Interpolant("trig", "sinesquared"), "gamma must be below 1 for the trig path"),
        (lambda: Interpolant("trig", a2=4.0), "gamma must be below 1"),
        (lambda: Interpolant("linear", "bsquared", a2=2.0), "a2 is of the brownian gamma alone"),
        (lambda: Interpolant(a2=0.0), "a2 must be > 0"),
        (lambda: Interpolant(LinearPath(lambda t: 1 - t, lambda t: 2 * t)), "b must go from 0 to 1, got 0 to 2"),
        (lambda: Interpolant(LinearPath(lambda t: 1.0, lambda t: t)), "a must be a function of a float64 tensor"),
        (lambda: Interpolant().sample(1.5, points(), points()), r"t must be in \[0, 1\], got 1.5"),
        (lambda: Interpolant().sample(torch.tensor([-0.1]), points(1), points(1)), r"t must be in \[0, 1\]"),
        (lambda: Interpolant().sample(torch.zeros(3), points(), points()), r"t must be a number or have shape \(5,\)"),
        (lambda: Interpolant().a(torch.tensor(1)), "t must be floating point"),
        (lambda: Interpolant().sample(0.5, points(4), points(5)), "x0 and x1 must have one shape"),
        (lambda: Interpolant().dt(0.5, points(4), points(5)), "x0 and x1 must have one shape"),
        (lambda: Interpolant().sample(0.5, points(), points(), points(4)), r"z must have shape \(5, 2\)"),
        (lambda: Interpolant().sample(0.5, None, points()), "x0 must be given"),
        (lambda: Interpolant().dt(0.5, None, points()), "x0 must be given"),
        (lambda: MIRROR.sample(0.5, points(), points()), "x0 must be left out: the mirror path"),
        (lambda: interpolant_loss("b", exact(MIRROR).b, points(), points(), MIRROR), "x0 must be left out"),
        (lambda: ONE_SIDED[0].sample(0.5, points(), points(), points()), "z must be left out"),
        (lambda: Interpolant().as_process(), "path must be one-sided to be a process"),
        (lambda: GaussianMixtureInterpolant(None, RHO1), "rho0 must be given"),
        (lambda: GaussianMixtureInterpolant(RHO0, RHO1, MIRROR), "rho0 must be left out"),
        (lambda: GaussianMixtureInterpolant(Gaussian([0.0]), RHO1), "one dimension, got 1 and 2"),
        (lambda: exact(Interpolant()).b(torch.zeros(3, 1), 0.5), r"x must have shape \(B, 2\)"),
        (lambda: Fields(Interpolant()), "b or v, or s or eta, must be given"),
        (lambda: Fields(Interpolant(), b=torch.add, v=torch.add), "b and v: give one"),
        (lambda: Fields(Interpolant(), s=torch.add, eta=torch.add), "s and eta: give one"),
        (lambda: Fields(MIRROR, v=torch.add), "v must be left out"),
        (lambda: Fields(Interpolant(), b=lambda x, t: x[:1]).b(points(), 0.5), r"b must return a tensor.* got \(1, 2\)"),
        (lambda: Fields(Interpolant(), b=lambda x, t: (x,)).b(points(), 0.5), r"b must return a tensor.* got \(Tensor"),
        (lambda: Fields(Interpolant(), b=lambda x, t: x).s(points(), 0.5), "s or eta must be given"),
        (lambda: Fields(Interpolant(), s=lambda x, t: x).b(points(), 0.5), "b or v must be given"),
        (lambda: Fields(MIRROR, b=lambda x, t: x).s(points(), 0.5), "s or eta must be given"),
        (lambda: Fields(Interpolant("linear", "zero"), s=lambda x, t: x).eta(points(), 0.5), "eta must be given"),
        (lambda: Fields(Interpolant(), eta=lambda x, t: x).s(points(), 0.0), "singular at the endpoint; use t0 > 0"),
        (lambda: Fields(Interpolant(), eta=lambda x, t: x).s(points(2), torch.tensor([0.5, 1.0])), "singular"),
        (lambda: Fields(ONE_SIDED[0], b=lambda x, t: x).s(points(), 1.0), "singular at the endpoint"),
        (lambda: Fields(ONE_SIDED[0], s=lambda x, t: x).b(points(), 0.0), "t must be > 0"),
        (lambda: exact(Interpolant("encdec", "sinesquared")).x1(points(), 0.3), "never holds both ends"),
        (lambda: exact(MIRROR).x0(points(), 0.3), "the mirror path has no x0"),
        (lambda: interpolant_loss("s", torch.add, points(), points(), Interpolant(gamma="zero")), "kind must be 'b' or"),
        (lambda: interpolant_loss("v", torch.add, None, points(), MIRROR), "kind must not be 'v'"),
        (lambda: interpolant_loss("b", lambda x, t: x[:, :1], points(), points(), Interpolant()), "net must return"),
        (lambda: interpolant_loss("b", lambda x, t: (x,), points(), points(), Interpolant()), "net must return a tensor"),
        (lambda: interpolant_loss("b", lambda x, t: x[:1], points(), points(), Interpolant(), antithetic=False), "net must return"),
        (
            lambda: interpolant_loss("b", torch.add, points(), points(), Interpolant(), t=torch.rand(3)),
            r"t must have shape \(5,\)",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_a_bridge_is_refused_by_the_sampling_loop_with_the_reason() -> None:
    bridge, one = Interpolant(), Interpolant("onesided_linear")
    for solver in (DDIM(), Euler()):
        for path, way in ((bridge, "integrate"), (one, "as_process")):
            denoiser = Denoiser(lambda x, t: x, path, "flow")
            with pytest.raises(ValueError, match=rf"process must run from noise to data.*{way}"):
                sample(denoiser, points(), solver=solver, steps=4)
            with pytest.raises(ValueError, match="process must run from noise to data"):
                sample(denoiser, points(), solver=solver, grid=[0.9, 0.5, 0.1])
            with pytest.raises(ValueError, match="process must run from noise to data"):
                sample(denoiser, (2, 2), solver=solver, steps=4)


def test_official_encoding_decoding_slope_is_too_small() -> None:
    path, t = Interpolant("encdec"), 0.2
    official = -0.5 * math.sin(math.pi * t) * math.cos(math.pi * t)
    assert path.da(t) == pytest.approx(4 * math.pi * official)


def test_official_one_sided_slope_has_other_noise_than_its_path() -> None:
    """With the noise of the path itself the slope goes with x_t; with noise drawn anew there is no such part."""
    path, x1, t = ONE_SIDED[0], torch.zeros(4000, 1), 0.5
    x, z = path.sample(t, None, x1, generator=seeded(1))
    anew = torch.randn(4000, 1, generator=seeded(2))
    ours, official = ((path.dt(t, noise, x1) * x).mean() / x.square().mean() for noise in (z, anew))
    assert ours == pytest.approx(-1 / (1 - t), rel=1e-5)  # b(x, t) = -x / (1 - t)
    assert abs(official) < 0.2


# ----------------------------------------------------------------------------------------------------------------- fields


@every_path
def test_the_law_is_the_mixture_of_all_pairs(path: Interpolant) -> None:
    x, t = points(), 0.37
    a, b, gamma = path.a(t), path.b(t), path.gamma(t)
    m0s, c0s, p = (
        (np.zeros((1, 2)), np.eye(2)[None], [1.0])
        if path.one_sided or path.mirror
        else (RHO0.means.numpy(), RHO0.covariances.numpy(), RHO0.weights.numpy())
    )
    density = np.zeros(len(x))
    for (m0, c0, w0), (m1, c1, w1) in product(
        zip(m0s, c0s, p, strict=True),
        zip(RHO1.means.numpy(), RHO1.covariances.numpy(), RHO1.weights.numpy(), strict=True),
    ):
        mean, cov = a * m0 + b * m1, a**2 * c0 + b**2 * c1 + gamma**2 * np.eye(2)
        density += w0 * w1 * multivariate_normal(mean, cov).pdf(x.numpy())
    assert np.allclose(exact(path).log_prob(x, t).numpy(), np.log(density), rtol=1e-12)


@every_path
def test_closed_form_fields_satisfy_transport_and_both_fokker_planck_equations(path: Interpolant) -> None:
    fields, h = exact(path), 1e-4
    x, eye = points(), h * torch.eye(2, dtype=torch.float64)

    def density(x: torch.Tensor, t: float) -> torch.Tensor:
        return fields.log_prob(x, t).exp()

    def divergence(current: Any) -> torch.Tensor:
        return sum((current(x + e) - current(x - e))[:, i] for i, e in enumerate(eye)) / (2 * h)  # type: ignore[return-value]

    for t in (0.2, 0.45, 0.8):
        moved = (density(x, t + h) - density(x, t - h)) / (2 * h)
        spread = sum((density(x + e, t) + density(x - e, t) - 2 * density(x, t)) / h**2 for e in eye)
        for eps in (0.0, 0.7, -0.7):  # -eps: b_B, and + eps laplacian
            out = divergence(lambda y, t=t, e=eps: fields.drift(y, t, e) * density(y, t)[:, None])
            assert (moved + out - eps * spread).abs().max() < 1e-4 * (1 + moved.abs().max())
        s = torch.stack([(fields.log_prob(x + e, t) - fields.log_prob(x - e, t)) / (2 * h) for e in eye], 1)
        assert torch.allclose(fields.s(x, t), s, rtol=1e-5, atol=1e-6)
        assert torch.allclose(fields.b(x, t), fields.v(x, t) - path.gg_dot(t) * s, rtol=1e-5, atol=1e-6)


@every_path
def test_times_for_each_row_are_times_one_by_one(path: Interpolant) -> None:
    fields, x = exact(path), points().float()
    t = torch.tensor([0.1, 0.3, 0.5, 0.7, 0.9])
    for name in ("b", "v", "s", "eta", "log_prob"):
        together = getattr(fields, name)(x, t)
        alone = torch.cat([getattr(fields, name)(x[i : i + 1], float(t[i])) for i in range(5)])
        assert together.dtype == torch.float32
        assert torch.allclose(together, alone, rtol=1e-5, atol=1e-6)


@every_noisy
def test_eta_is_the_mean_of_the_latent(path: Interpolant) -> None:
    n, t = 40_000, 0.3
    x1 = RHO1.sample(n, generator=seeded(1))
    x0 = None if path.mirror or path.one_sided else RHO0.sample(n, generator=seeded(2))
    x, z = path.sample(t, x0, x1, generator=seeded(3))
    eta = exact(path).eta(x, t)
    gap = ((z - eta) * eta).sum(1)  # orthogonal, if eta is the conditional mean; of the other sign it is -2 |eta|^2
    assert abs(gap.mean()) < 5 * gap.std() / n**0.5
    assert 10 * gap.std() / n**0.5 < eta.square().sum(1).mean()


GIVEN = ["b", "v", "s", "eta", "b s", "b eta", "v s", "v eta"]
ALL_FOUR = {"b", "v", "s", "eta"}


def follows(path: Interpolant, given: set[str]) -> set[str]:
    """Which fields are determined by those that are given."""
    moves, scores = bool(given & {"b", "v"}), bool(given & {"s", "eta"})
    if path.one_sided or (moves and scores and not path.latent_free) or (path.mirror and scores):
        return ALL_FOUR
    if path.latent_free:
        return ({"b", "v"} if moves else set()) | (given & {"s"})
    if path.mirror:
        return {"b", "v"}
    return given if moves else {"s", "eta"}


@every_path
@pytest.mark.parametrize("given", GIVEN)
def test_fields_convert(path: Interpolant, given: str) -> None:
    names = set(given.split())
    if (path.mirror and "v" in names) or (path.latent_free and "eta" in names):
        return  # there are no such fields
    want, x, t, calls = exact(path), points(), 0.3, []

    def net(name: str) -> Any:
        def say(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            assert t.shape == (5,)
            calls.append(name)
            return getattr(want, name)(x, t)

        return say

    fields, known = Fields(path, **{name: net(name) for name in names}), follows(path, names)
    for name in ALL_FOUR:
        if name in known:
            assert torch.allclose(getattr(fields, name)(x, t), getattr(want, name)(x, t), rtol=1e-9, atol=1e-9), name
        else:
            with pytest.raises(ValueError, match="must be given"):
                getattr(fields, name)(x, t)
    if {"b", "s"} <= known:
        calls.clear()
        drift = fields.drift(x, t, 0.7)
        assert torch.allclose(drift, want.b(x, t) + 0.7 * want.s(x, t), rtol=1e-9, atol=1e-9)
        assert sorted(calls) == sorted(names)  # every network once
        if path.path != "encdec":
            assert torch.allclose(fields.x1(x, t), posterior(path, x, t, 1), rtol=1e-8)
            if not path.mirror:
                assert torch.allclose(fields.x0(x, t), posterior(path, x, t, 0), rtol=1e-8)


def posterior(path: Interpolant, x: torch.Tensor, t: float, end: int) -> torch.Tensor:
    """``E[x_end | x_t = x]`` by Gaussian conditioning, pair by pair."""
    a, b, gamma = path.a(t), path.b(t), path.gamma(t)
    eye = torch.eye(2, dtype=torch.float64)
    whole = path.one_sided or path.mirror
    first = [(torch.zeros(2, dtype=torch.float64), eye, 1.0)] if whole else list(
        zip(RHO0.means, RHO0.covariances, RHO0.weights, strict=True)
    )  # fmt: skip
    total, mean = torch.zeros(len(x), 1, dtype=torch.float64), torch.zeros_like(x)
    for (m0, c0, p), (m1, c1, q) in product(first, zip(RHO1.means, RHO1.covariances, RHO1.weights, strict=True)):
        centre, cov = a * m0 + b * m1, a**2 * c0 + b**2 * c1 + gamma**2 * eye
        m, c, scale = (m1, c1, b) if end else (m0, c0, a)
        gain = scale * c @ torch.linalg.inv(cov)
        density = torch.from_numpy(np.atleast_1d(multivariate_normal(centre.numpy(), cov.numpy()).pdf(x.numpy())))
        weight = p * q * density[:, None]
        total, mean = total + weight, mean + weight * (m + (x - centre) @ gain.T)
    return mean / total


@pytest.mark.parametrize("t", [0.3, torch.tensor(0.3, dtype=torch.float64), torch.full((5,), 0.3, dtype=torch.float64)])
def test_networks_are_told_a_time_for_each_row_in_the_states_type(t: Any) -> None:
    told = []
    fields = Fields(Interpolant(), b=lambda x, t: told.append((t.dtype, tuple(t.shape))) or x)
    assert fields.b(points().float(), t).dtype == torch.float32
    assert told == [(torch.float32, (5,))]


def test_on_the_linear_path_the_denoiser_is_the_papers() -> None:
    fields, x, t = exact(Interpolant()), points(), 0.4
    want = x + (1 - t) * fields.v(x, t) + t * (1 - t) * fields.s(x, t)
    assert torch.allclose(fields.x1(x, t), want, rtol=1e-12)


# ----------------------------------------------------------------------------------------------------------------- losses


def pairs(path: Interpolant, n: int) -> tuple[torch.Tensor | None, torch.Tensor]:
    x0 = None if path.mirror or path.one_sided else RHO0.sample(n, generator=seeded(5))
    return x0, RHO1.sample(n, generator=seeded(6))


KIND_PATH = [(k, p) for k in ("b", "v", "s", "eta") for p in (TWO_SIDED[0], TWO_SIDED[5], ONE_SIDED[1], MIRROR)]


@pytest.mark.parametrize(("kind", "path"), [(k, p) for k, p in KIND_PATH if not (p.mirror and k == "v")],
                         ids=lambda v: v if isinstance(v, str) else named(v))  # fmt: skip
def test_a_loss_is_least_at_the_exact_field_and_grows_by_half_a_square(kind: str, path: Interpolant) -> None:
    n, shift = 3000, torch.tensor([0.6, -0.8], dtype=torch.float64)
    x0, x1 = pairs(path, n)
    t = 0.2 + 0.6 * torch.rand(n, dtype=torch.float64, generator=seeded(7))
    field = getattr(exact(path), kind)
    means = []
    for antithetic in (True, False):
        at, off = (
            interpolant_loss(kind, lambda x, t, c=c: field(x, t) + c * shift, x0, x1, path, seeded(8), antithetic, t=t)
            for c in (0, 1)
        )
        gain = off - at
        assert abs(gain.mean() - 0.5) < 5 * gain.std() / n**0.5
        assert 10 * gain.std() / n**0.5 < 1
        means.append((at.mean(), at.var() / n))
    (one, v1), (two, v2) = means
    assert abs(one - two) < 5 * (v1 + v2).sqrt()  # antithetic and plain have one expectation


@pytest.mark.parametrize("kind", ["b", "s"])
@pytest.mark.parametrize("late", [False, True])
def test_antithetic_pairs_take_the_variance_at_the_ends_away(kind: str, late: bool) -> None:
    path, n = Interpolant(), 2000
    x0, x1 = pairs(path, n)
    field = getattr(exact(path), kind)

    def variances(t: float) -> list[float]:
        times = torch.full((n,), 1 - t if late else t, dtype=torch.float64)
        made = (interpolant_loss(kind, field, x0, x1, path, seeded(8), anti, t=times) for anti in (False, True))
        return [loss.var().item() for loss in made]

    (plain, both), (nearer, same) = variances(1e-3), variances(1e-4)
    assert 8 < nearer / plain < 12  # it grows as 1 / t
    assert 0.8 < same / both < 1.25
    assert nearer > 100 * same


def test_losses_by_hand() -> None:
    path, x0, x1 = Interpolant("linear", "bsquared"), points(3, 1), points(3, 2)
    t = torch.tensor([0.2, 0.5, 0.9], dtype=torch.float64)
    z = torch.randn(3, 2, dtype=torch.float64, generator=seeded(4))
    u = t[:, None]
    targets = {"b": x1 - x0 + (1 - 2 * u) * z, "v": x1 - x0, "s": -z / (u * (1 - u)), "eta": z}

    def net(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return 0.3 * x + t[:, None]

    for kind, target in targets.items():
        said = net((1 - u) * x0 + u * x1 + u * (1 - u) * z, t)
        got = interpolant_loss(kind, net, x0, x1, path, seeded(4), False, t=t)
        assert torch.allclose(got, (said**2 / 2 - target * said).sum(1), rtol=1e-12)
        mse = interpolant_loss(kind, net, x0, x1, path, seeded(4), False, t=t, mse=True)
        assert torch.allclose(mse, ((said - target) ** 2).sum(1) / 2, rtol=1e-12)
        anti = interpolant_loss(kind, net, x0, x1, path, seeded(4), t=t, mse=True)
        other = net((1 - u) * x0 + u * x1 - u * (1 - u) * z, t)
        flipped = 2 * (x1 - x0) - target if kind == "b" else target if kind == "v" else -target
        assert torch.allclose(anti, (mse + ((other - flipped) ** 2).sum(1) / 2) / 2, rtol=1e-12)


def test_a_network_learns_the_score_in_any_shape_and_type() -> None:
    path = Interpolant("onesided_linear")
    weight = torch.zeros((), requires_grad=True)
    x1 = torch.zeros(64, 1, 2, 2)
    loss = interpolant_loss("b", lambda x, t: weight * x, None, x1, path, seeded())
    assert loss.shape == (64,)
    assert loss.dtype == torch.float32
    loss.mean().backward()
    assert weight.grad is not None
    assert weight.grad.isfinite()
    assert torch.equal(x1, torch.zeros(64, 1, 2, 2))
    assert interpolant_loss("b", lambda x, t: x, None, x1[:0], path, seeded()).shape == (0,)
    line = points()[:, 0]
    assert interpolant_loss("eta", lambda x, t: x, line, line, Interpolant(), seeded()).shape == (5,)


def test_a_time_that_is_drawn_at_an_end_is_moved_inside(monkeypatch: pytest.MonkeyPatch) -> None:
    x0, x1 = points(seed=1), points(seed=2)
    for end in (0.0, 1.0):
        monkeypatch.setattr(torch, "rand", lambda n, end=end, **how: torch.full((n,), end, dtype=how["dtype"]))
        for kind in ("b", "s"):
            assert interpolant_loss(kind, lambda x, t: x, x0, x1, Interpolant(), seeded()).isfinite().all()


@pytest.mark.parametrize(("path", "rows"), [(TWO_SIDED[0], 10), (TWO_SIDED[2], 5), (ONE_SIDED[0], 10), (MIRROR, 10)])
def test_pairs_are_evaluated_twice_where_there_is_a_latent(path: Interpolant, rows: int) -> None:
    told = []
    x0 = None if path.mirror else points(seed=1)
    interpolant_loss("b", lambda x, t: told.append((len(x), len(t))) or x, x0, points(seed=2), path, seeded())
    assert told == [(rows, rows)]


# ---------------------------------------------------------------------------------------------- one-sided paths, processes


def test_one_sided_paths_are_processes_of_the_room() -> None:
    assert ONE_SIDED[0].as_process() == Flow()
    assert ONE_SIDED[1].as_process() == TrigFlow()
    process = Interpolant(VP_PATH).as_process()
    t = torch.tensor([0.2, 0.6], dtype=torch.float64)
    assert torch.allclose(process.alpha(t), 1 - t)
    assert torch.allclose(process.sigma(t), (1 - (1 - t) ** 2).sqrt())
    assert process == Interpolant(VP_PATH).as_process()


@pytest.mark.parametrize("path", ONE_SIDED, ids=named)
def test_a_one_sided_interpolant_samples_as_its_process_does(path: Interpolant) -> None:
    fields, x, process = exact(path), points(), path.as_process()
    own = integrate(fields, x, steps=20, method="euler", t0=0.01)
    denoiser = Denoiser(lambda x, t: -fields.b(x, 1 - t), process, "flow")
    grid = process.grid(20, "time", start=0.99, end=0.01)
    assert torch.allclose(sample(denoiser, x, solver=Euler(), grid=grid), own, rtol=1e-10)
    law = ExactDenoiser(RHO1, process)
    assert torch.allclose(fields.s(x, 0.3), law.score(x, 0.7), rtol=1e-10)
    assert torch.allclose(fields.x1(x, 0.3), law(x, 0.7).x0, rtol=1e-10)


def test_the_variance_preserving_case_is_ddim() -> None:
    vp, x = VP(), points()
    times = vp.grid(12, "logsnr")
    process = Interpolant(VP_PATH).as_process()
    want = sample(ExactDenoiser(RHO1, vp), x, solver=DDIM(), grid=times)
    got = sample(ExactDenoiser(RHO1, process), x, solver=DDIM(), grid=1 - vp.alpha(times))
    assert torch.allclose(got, want, rtol=1e-8)


def test_its_process_is_a_right_one() -> None:
    smooth = LinearPath(lambda t: torch.sin(torch.pi / 2 * (1 - t)), lambda t: torch.sin(torch.pi / 2 * t), True)
    check_process(Interpolant(smooth).as_process())
