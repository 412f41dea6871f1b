"""Resampling schemes against their laws, and weights against formulas."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from polyak.core.particles import SCHEMES, _native, cess, counts, ess, normalize, resample, resample_conditional

CONDITIONAL = ("multinomial", "systematic", "killing")
LAST = 1 - 2**-53  # the largest that torch.rand draws
ROUNDS = ("systematic", "ssp")


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def log_weights(*shape: int, scale: float = 1.0, seed: int = 0) -> Tensor:
    return scale * torch.randn(*shape, dtype=torch.float64, generator=seeded(seed))


def uniforms(scheme: str, shape: tuple[int, ...], n: int, value: float | None = None, seed: int = 0) -> Tensor:
    """As many as a scheme takes: of one value, or drawn."""
    own = {"systematic": (), "residual-systematic": (), "ssp": (shape[-1] - 1,), "killing": (2 * n,)}.get(scheme, (n,))
    size = (*shape[:-1], *own)
    if value is not None:
        return torch.full(size, value, dtype=torch.float64)
    return torch.rand(size, dtype=torch.float64, generator=seeded(seed))


def by_inversion(logw: Tensor, points: np.ndarray) -> np.ndarray:
    """``#{i: c_i <= u}`` in NumPy, and how far each point is from the nearest edge."""
    w = np.exp(logw.numpy() - logw.numpy().max())
    c = np.cumsum(w / w.sum())
    drawn = np.searchsorted(c, points, side="right")
    far = np.abs(points[:, None] - c[None, :]).min(1) > 1e-12
    return np.where(far, drawn, -1)


WEIGHTS = {
    "zeros": [0.0, 0.3, 0.0, 0.0, 0.5, 0.2, 0.0, 0.0],
    "one large": [0.02, 0.01, 0.9, 0.03, 0.01, 0.005, 0.015, 0.01],
    "uniform": [0.125] * 8,
}


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("n", [8, 5, 13])
def test_expected_offspring_are_n_times_the_weight(scheme: str, weights: str, n: int) -> None:
    if scheme == "killing" and n != 8:
        pytest.skip("n is N")
    W, runs = torch.tensor(WEIGHTS[weights], dtype=torch.float64), 10_000
    ancestors = resample(W.log().expand(runs, 8), n, scheme=scheme, generator=seeded())
    assert ancestors.dtype == torch.int64
    assert ancestors.shape == (runs, n)
    drawn = counts(ancestors, 8).double()
    assert torch.equal(drawn.sum(-1), torch.full((runs,), float(n), dtype=torch.float64))
    assert bool((drawn[:, W == 0] == 0).all())
    error = (drawn.var(0) / runs).sqrt()
    assert bool(((drawn.mean(0) - n * W).abs() <= 5 * error + 1e-9).all())
    below, above = (n * W).floor(), (n * W).ceil()
    if scheme in ROUNDS:
        assert bool(((drawn >= below) & (drawn <= above)).all())
    if scheme == "stratified":
        assert bool(((drawn - n * W).abs() < 2).all())
    if scheme.startswith("residual"):
        assert bool((drawn >= below).all())
    if scheme == "multinomial":
        variance = n * W * (1 - W)
        assert torch.allclose(drawn.var(0), variance, rtol=0.1, atol=1e-9)


@pytest.mark.parametrize("scheme", ["systematic", "stratified", "ssp", "residual", "residual-systematic", "killing"])
@pytest.mark.parametrize("value", [0.0, LAST, None])
def test_equal_weights_give_every_particle_once(scheme: str, value: float | None) -> None:
    for size in (1, 2, 3, 7, 64, 1000, 4097):
        u = uniforms(scheme, (3, size), size, value)
        ancestors = resample(torch.full((3, size), -2.5, dtype=torch.float64), scheme=scheme, u=u)
        assert torch.equal(ancestors, torch.arange(size).expand(3, size)), size


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("value", [0.0, LAST])
def test_no_particle_without_weight_is_drawn_at_the_ends(scheme: str, value: float) -> None:
    logw = log_weights(50, 40, scale=3)
    logw[:, :3] = logw[:, -3:] = logw[:, 10:20] = -torch.inf
    ancestors = resample(logw, scheme=scheme, u=uniforms(scheme, (50, 40), 40, value))
    assert bool((logw.gather(-1, ancestors) > -torch.inf).all())
    if scheme == "multinomial":
        assert bool((ancestors == (3 if value == 0 else 36)).all())


@pytest.mark.parametrize("scheme", ["multinomial", "stratified", "systematic"])
def test_ancestors_invert_the_distribution(scheme: str) -> None:
    for size, n, scale in ((1, 4, 1.0), (30, 30, 1.0), (1000, 700, 4.0), (20, 500, 10.0)):
        logw = log_weights(size, scale=scale)
        u = uniforms(scheme, (size,), n)
        points = {
            "multinomial": lambda u=u: u.numpy(),
            "stratified": lambda u=u, n=n: (np.arange(n) + u.numpy()) / n,
            "systematic": lambda u=u, n=n: (np.arange(n) + u.item()) / n,
        }[scheme]()
        expected = by_inversion(logw, points)
        ancestors = resample(logw, n, scheme=scheme, u=u).numpy()
        assert np.array_equal(ancestors[expected >= 0], expected[expected >= 0])
        assert (expected >= 0).mean() > 0.99


@pytest.mark.parametrize("scheme", SCHEMES)
def test_systems_are_independent_and_shifts_change_nothing(scheme: str) -> None:
    logw = log_weights(2, 3, 50, scale=2)
    logw[1, 1, 7] = -torch.inf
    u = uniforms(scheme, (2, 3, 50), 50)
    ancestors = resample(logw, scheme=scheme, u=u)
    rows = [[resample(logw[i, j], scheme=scheme, u=u[i, j]) for j in range(3)] for i in range(2)]
    assert torch.equal(ancestors, torch.stack([torch.stack(row) for row in rows]))
    logw = (logw * 256).round() / 256  # such that a shift is exact
    assert torch.equal(resample(logw, scheme=scheme, u=u), resample(logw + 1e4, scheme=scheme, u=u))
    assert torch.equal(resample(logw, scheme=scheme, u=u), resample(logw - 1e4, scheme=scheme, u=u))


def test_no_scheme_has_more_variance_than_multinomial() -> None:
    runs, size = 4000, 20
    made: dict[str, Tensor] = {}
    for scheme in ("multinomial", "residual", "stratified", "systematic", "ssp"):
        logw, f = log_weights(6, 1, size, seed=1), log_weights(6, 1, size, seed=2)
        ancestors = resample(logw.expand(6, runs, size), scheme=scheme, generator=seeded(3))
        made[scheme] = f.expand(6, runs, size).gather(-1, ancestors).mean(-1).var(-1)
    for scheme, variance in made.items():  # the variance of a variance: sqrt(2 / runs) of it
        assert bool((variance <= made["multinomial"] * (1 + 5 * math.sqrt(4 / runs))).all()), scheme
    assert bool((made["ssp"] < 0.7 * made["multinomial"]).all())


@pytest.mark.parametrize("scheme", CONDITIONAL)
def test_a_reference_and_the_rest_given_it_are_what_the_scheme_draws(scheme: str) -> None:
    """Offspring counts of: ref from W, then the conditional scheme; against the scheme itself, by chi-square."""
    W, runs = torch.tensor([0.1, 0.45, 0.15, 0.3], dtype=torch.float64), 40_000
    logw = W.log().expand(runs, 4)
    ref = torch.searchsorted(W.cumsum(0), torch.rand(runs, dtype=torch.float64, generator=seeded(5)), right=True)
    conditional = resample_conditional(logw, scheme=scheme, ref=ref, generator=seeded(6))
    assert torch.equal(conditional.gather(-1, ref.unsqueeze(-1)).squeeze(-1), ref)
    key = 5 ** torch.arange(4)
    a, b = ((counts(x, 4) * key).sum(-1) for x in (conditional, resample(logw, scheme=scheme, generator=seeded(7))))
    both = torch.stack([torch.bincount(x, minlength=625) for x in (a, b)]).double()
    both = both[:, both.sum(0) > 20]
    statistic = ((both[0] - both[1]).square() / both.sum(0)).sum().item()
    cells = both.shape[1]
    assert statistic < cells + 5 * math.sqrt(2 * cells)


def test_the_others_of_a_multinomial_reference_are_independent_draws() -> None:
    W, runs = torch.tensor([0.6, 0.1, 0.3], dtype=torch.float64), 20_000
    ancestors = resample_conditional(W.log().expand(runs, 3), 5, ref=1, generator=seeded())
    assert bool((ancestors[:, 1] == 1).all())
    drawn = counts(ancestors, 3).double()
    drawn[:, 1] -= 1
    assert torch.allclose(drawn.mean(0), 4 * W, atol=5 * (4 * 0.25 / runs) ** 0.5)
    assert torch.allclose(drawn.var(0), 4 * W * (1 - W), rtol=0.1)


def test_weights_and_effective_sizes() -> None:
    logw = log_weights(3, 100, scale=2)
    W, log_mean = normalize(logw + 1e4)
    assert torch.allclose(W, logw.exp() / logw.exp().sum(-1, keepdim=True), rtol=1e-11)
    assert torch.allclose(log_mean, 1e4 + logw.exp().mean(-1).log(), rtol=1e-14)
    assert torch.allclose(ess(logw - 1e4), 1 / W.square().sum(-1), rtol=1e-10)
    moved, mean = normalize(logw.T, dim=0)
    assert torch.equal(moved.T, normalize(logw)[0])
    assert torch.equal(mean, normalize(logw)[1])
    increments = log_weights(3, 100, seed=4)
    v = increments.exp()
    expected = 100 * (W * v).sum(-1).square() / (W * v.square()).sum(-1)
    assert torch.allclose(cess(logw, increments), expected, rtol=1e-11)
    assert torch.allclose(cess(logw, torch.full((3, 1), 7.0, dtype=torch.float64)), torch.tensor(100.0).double())
    many = ess(log_weights(1_000_000)).item() / 1_000_000
    assert many == pytest.approx(math.exp(-1), rel=0.02)  # its error is about sqrt(var) = sqrt(40 / 1e6)


def test_weights_have_gradients() -> None:
    logw = log_weights(2, 5).requires_grad_()
    for f in (lambda w: normalize(w)[0], lambda w: normalize(w)[1], ess, lambda w: cess(w, w.square())):
        assert torch.autograd.gradcheck(f, (logw,))


BAD: dict[str, tuple[Any, str]] = {
    "NaN": (lambda w: w.index_put((torch.tensor(3), torch.tensor(2)), torch.tensor(math.nan).double()), r"NaN in system \(3,\)"),
    "two atoms": (lambda w: w.index_fill(-1, torch.tensor([1, 2]), math.inf), r"more than one \+inf in systems \(0,\)"),
    "collapse": (lambda w: w.index_fill(0, torch.tensor(4), -math.inf), r"-inf for every particle in system \(4,\)"),
    "integers": (lambda w: w.long(), "logw must be a floating-point tensor"),
    "nothing": (lambda w: w[:, :0], "logw must have at least one particle"),
}  # fmt: skip


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("f", [normalize, ess, resample, resample_conditional])
def test_bad_weights_are_refused_with_their_system(f: Any, bad: str) -> None:
    spoil, says = BAD[bad]
    with pytest.raises(ValueError, match=says):
        f(spoil(log_weights(6, 5)))


def test_a_single_infinite_weight_has_all() -> None:
    logw = log_weights(2, 5)
    logw[0, 3] = torch.inf
    W, log_mean = normalize(logw)
    assert W[0].tolist() == [0, 0, 0, 1, 0]
    assert log_mean[0] == torch.inf
    assert ess(logw)[0] == 1
    for scheme in SCHEMES:
        assert resample(logw, scheme=scheme, generator=seeded())[0].tolist() == [3] * 5


@pytest.mark.parametrize("f", [normalize, ess, resample])
def test_a_system_without_weight_may_have_equal_weights(f: Any) -> None:
    logw = log_weights(2, 5)
    logw[1] = -torch.inf
    made = f(logw, on_collapse="uniform")
    if f is normalize:
        assert made[0][1].tolist() == [0.2] * 5
        assert made[1][1] == -torch.inf
    elif f is ess:
        assert made[1] == 5
    else:
        assert made[1].tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("bad", [-1, 5, 10**9])
def test_a_reference_out_of_range_is_refused(bad: int) -> None:
    logw = log_weights(2, 5)
    with pytest.raises(ValueError, match=r"ref must be (at least 0|in \[0, 5\)), got"):
        resample_conditional(logw, ref=bad)
    if bad > 0:
        with pytest.raises(ValueError, match=r"ref must be in \[0, 5\)"):
            resample_conditional(logw, ref=torch.tensor([0, bad]))
    with pytest.raises(ValueError, match=r"ref must be in \[0, 3\), got 4"):
        resample_conditional(logw, 3, ref=4)


@pytest.mark.parametrize("scheme", [s for s in SCHEMES if s not in CONDITIONAL])
def test_schemes_without_a_conditional_law_are_refused(scheme: str) -> None:
    with pytest.raises(
        ValueError, match=f"scheme must be one of 'multinomial', 'systematic', 'killing'.*got '{scheme}'"
    ):
        resample_conditional(log_weights(5), scheme=scheme)


def test_a_reference_without_weight_is_refused() -> None:
    logw = log_weights(3, 5)
    logw[1, 2] = -torch.inf
    with pytest.raises(ValueError, match=r"ref must be a particle with weight, got one without in system \(1,\)"):
        resample_conditional(logw, ref=2)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "n": ({"n": 0}, "n must be at least 1, got 0"),
    "scheme": ({"scheme": "systemic"}, "'multinomial', 'stratified', 'systematic', .*; did you mean 'systematic'"),
    "killing": ({"scheme": "killing", "n": 3}, "n must be the number of particles, 5, for scheme='killing', got 3"),
    "u's shape": ({"u": torch.zeros(5)}, r"u must have shape \(2,\)"),
    "u's range": ({"u": torch.tensor([0.5, 1.0])}, r"u must be in \[0, 1\), got 1"),
    "on_collapse": ({"on_collapse": "ignore"}, "on_collapse must be one of 'error', 'uniform'"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_bad_arguments_of_resampling_are_refused(name: str) -> None:
    given, says = REFUSED[name]
    with pytest.raises(ValueError, match=says):
        resample(log_weights(2, 5), **given)


def test_weights_are_double_precision_whatever_is_given() -> None:
    """A million equal weights of float32: sums in single precision, or probabilities that are clipped, drop the tail."""
    logw = torch.full((2, 1_000_000), -3.0)
    logw[1, 0] = 9.0
    W, _ = normalize(logw.bfloat16())
    assert W.dtype == torch.float64
    assert ess(logw).dtype == torch.float64
    ancestors = resample(logw, u=torch.tensor([0.5, 0.5]))
    assert torch.equal(ancestors[0], torch.arange(1_000_000))
    first = math.exp(12) / (math.exp(12) + 999_999)
    assert abs(int((ancestors[1] == 0).sum()) - 1e6 * first) < 1
    assert int(ancestors[1].max()) > 999_980


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize(("size", "n"), [(1, 3), (2, 2), (37, 37), (1000, 300), (300, 1000), (70_000, 70_000)])
def test_c_draws_what_the_formulas_say(scheme: str, size: int, n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    if not _native.takes(log_weights(2)):
        pytest.skip("no compiler")
    if scheme == "killing":
        n = size
    logw = log_weights(6, size, scale=2)
    logw[0], logw[1], logw[2, 0] = 0.0, math.nan, torch.inf
    logw[3:, 1::4] = -torch.inf
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    given = {"check": False, "on_collapse": "uniform"}
    made = resample(logw, n, scheme=scheme, generator=seeded(3), **given)
    monkeypatch.setattr(_native, "_functions", lambda: None)
    plain = resample(logw, n, scheme=scheme, generator=seeded(3), **given)
    assert (made != plain).double().mean() <= (1e-5 if size > 1000 else 0)  # points within rounding of an edge
    assert bool((logw[2:].gather(-1, made[2:]) > -math.inf).all())
