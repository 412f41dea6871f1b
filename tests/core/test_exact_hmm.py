"""Forward-backward against the enumeration of all paths; the score against differences."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from polyak.core.exact import FiniteHMM

S, T = 3, 5
INITIAL = torch.tensor([0.5, 0.2, 0.3], dtype=torch.float64)
EMISSION = torch.tensor([[0.6, 0.3, 0.1, 0.0], [0.1, 0.2, 0.3, 0.4], [0.25, 0.25, 0.25, 0.25]], dtype=torch.float64)
TRANSITIONS = {
    "dense": torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.5, 0.4], [0.3, 0.3, 0.4]], dtype=torch.float64),
    "sparse": torch.tensor([[0.7, 0.3, 0.0], [0.0, 0.6, 0.4], [0.9, 0.0, 0.1]], dtype=torch.float64),
}
SYMBOLS = torch.tensor([[0, 1, 3, 2, 0], [2, -1, 0, -1, 1], [1, 2, 3, 3, 0]])
PATHS = list(itertools.product(range(S), repeat=T))


def model(kind: str) -> FiniteHMM:
    return FiniteHMM(INITIAL, TRANSITIONS[kind], EMISSION)


def likelihoods() -> Tensor:
    """Of observations of any law; some exclude a state, and the last tells nothing."""
    y = 3 * torch.randn(3, T, S, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    y[1, 2, 0] = -math.inf
    y[:, -1] = 0.0
    return y


def emitted(y: Tensor) -> Tensor:
    if y.is_floating_point():
        return y.exp()
    return torch.where(y[..., None] < 0, 1.0, EMISSION.T[y.clamp(min=0)])


def weights(kind: str, e: Tensor, steps: int = T) -> Tensor:
    """p(path, y) of one series, of every path."""
    a = TRANSITIONS[kind]
    found = []
    for path in itertools.product(range(S), repeat=steps):
        p = INITIAL[path[0]] * e[0, path[0]]
        for t in range(1, steps):
            p = p * a[path[t - 1], path[t]] * e[t, path[t]]
        found.append(p)
    return torch.stack(found)


@pytest.mark.parametrize("what", ["symbols", "likelihoods"])
@pytest.mark.parametrize("kind", TRANSITIONS)
def test_every_quantity_against_all_paths(kind: str, what: str) -> None:
    y = SYMBOLS if what == "symbols" else likelihoods()
    hmm, e = model(kind), emitted(y)
    f, s = hmm.filter(y), hmm.smooth(y)
    paths, log_law = hmm.path_law(y)
    assert paths.tolist() == [list(p) for p in PATHS]
    for i in range(3):
        p = weights(kind, e[i])
        law = p / p.sum()
        assert hmm.log_likelihood(y)[i].item() == pytest.approx(p.sum().log().item(), abs=1e-12)
        assert f.log_likelihood[i].item() == pytest.approx(p.sum().log().item(), abs=1e-12)
        assert torch.allclose(log_law[i].exp(), law, atol=1e-13)
        marginals, pairs = torch.zeros(T, S).double(), torch.zeros(T - 1, S, S).double()
        for path, mass in zip(PATHS, law, strict=True):
            for t in range(T):
                marginals[t, path[t]] += mass
            for t in range(T - 1):
                pairs[t, path[t], path[t + 1]] += mass
        assert torch.allclose(s.probabilities[i], marginals, atol=1e-13)
        assert torch.allclose(s.pairs[i], pairs, atol=1e-13)
        assert torch.allclose(s.transition_counts[i], pairs.sum(0), atol=1e-13)
        seen = weights(kind, e[i], 3)
        last = seen.reshape(-1, S).sum(0)
        assert torch.allclose(f.probabilities[i, 2], last / last.sum(), atol=1e-13)
        blind = torch.cat([e[i, :2], torch.ones(1, S).double()])
        last = weights(kind, blind, 3).reshape(-1, S).sum(0)
        assert torch.allclose(f.predicted[i, 2], last / last.sum(), atol=1e-13)
    nested = y.reshape(3, 1, *y.shape[1:])
    assert torch.equal(hmm.smooth(nested).pairs[:, 0], s.pairs)


@pytest.mark.parametrize("kind", TRANSITIONS)
def test_the_score_is_the_derivative_in_every_entry(kind: str) -> None:
    # p(y) is a polynomial of the entries: the derivative in one is a difference over any step, of linear ones exactly.
    parameters = {"initial": INITIAL, "transition": TRANSITIONS[kind], "emission": EMISSION}
    score = model(kind).score(SYMBOLS)

    def likelihood(initial: Tensor, transition: Tensor, emission: Tensor, y: Tensor) -> Tensor:
        e = torch.cat([emission.mT, torch.ones(1, S).double()])[y]
        p = initial * e[0]
        for t in range(1, T):
            p = (p @ transition) * e[t]
        return p.sum().log()

    tracked = {n: p.clone().requires_grad_() for n, p in parameters.items()}
    hmm = FiniteHMM(**tracked)
    for i in range(3):
        expected = torch.autograd.grad(likelihood(**tracked, y=SYMBOLS[i]), list(tracked.values()))
        got = torch.autograd.grad(hmm.log_likelihood(SYMBOLS)[i], list(tracked.values()))
        for name, one, other in zip(tracked, expected, got, strict=True):
            assert torch.allclose(getattr(score, name)[i], one, atol=1e-11), name
            assert torch.allclose(other, one, atol=1e-11), name
    counts = model(kind).smooth(SYMBOLS).transition_counts
    assert torch.allclose(score.transition * TRANSITIONS[kind], counts, atol=1e-12)
    y = likelihoods().requires_grad_()
    total = model(kind).log_likelihood(y)
    (slope,) = torch.autograd.grad(total.sum(), y)
    assert torch.allclose(slope, model(kind).smooth(y.detach()).probabilities)
    assert model(kind).score(y).emission is None


def test_far_likelihoods_and_long_series_do_not_underflow() -> None:
    # The state that the first observation favours by 2000 nats cannot reach the one that the second asks for.
    hmm = FiniteHMM([0.5, 0.5, 0.0], [[1.0, 0.0, 0.0], [0.0, 0.0, 1.0], [0.0, 0.0, 1.0]])
    y = torch.tensor([[0.0, -2000.0, 0.0], [-9000.0, 0.0, 0.0]], dtype=torch.float64)
    assert hmm.log_likelihood(y).item() == pytest.approx(math.log(0.5) - 2000)
    assert hmm.smooth(y).probabilities.tolist() == [[0, 1, 0], [0, 0, 1]]
    assert model("dense").log_likelihood(1000 * likelihoods()).isfinite().all()
    states, symbols = model("dense").simulate(4000, generator=torch.Generator().manual_seed(0))
    assert symbols is not None
    f = model("dense").filter(symbols)
    assert -1.5 < f.log_likelihood.item() / 4000 < -1.2
    assert (f.probabilities.argmax(-1) == states).double().mean() > 0.5


def test_simulated_series_have_the_law() -> None:
    n, hmm = 20000, model("sparse")
    x, y = hmm.simulate(2, n, generator=torch.Generator().manual_seed(0))
    assert y is not None
    p = (
        INITIAL[:, None, None, None]
        * TRANSITIONS["sparse"][:, :, None, None]
        * EMISSION[:, None, :, None]
        * EMISSION[None, :, None, :]
    )
    index = ((x[:, 0] * S + x[:, 1]) * 4 + y[:, 0]) * 4 + y[:, 1]
    counts, p = torch.bincount(index, minlength=p.numel()).double(), p.flatten()
    assert bool((counts[p == 0] == 0).all())
    assert bool(((counts - n * p).abs() <= 4.5 * (n * p * (1 - p)).sqrt() + 1).all())
    assert FiniteHMM(INITIAL, TRANSITIONS["dense"]).simulate(2)[1] is None


def test_what_is_no_model_and_no_observation_is_refused() -> None:
    for arguments, message in (
        (([0.5, 0.4], [[1, 0], [0, 1]]), "initial must be probabilities"),
        (([0.5, 0.5], [[1, 0]]), r"transition must have shape \(2, 2\)"),
        (([0.5, 0.5], [[1, 0], [0.5, 0.6]]), "transition must be probabilities"),
        (([0.5, 0.5], [[1, 0], [0, 1]], [[1.0]]), r"emission must have shape \(2, n\), got \(1, 1\)"),
        (([0.5, 0.5], [[1, 0], [0, 1]], [[1.0], [0.9]]), "emission must be probabilities"),
    ):
        with pytest.raises(ValueError, match=message):
            FiniteHMM(*arguments)
    hmm = model("dense")
    for call in (hmm.filter, hmm.smooth, hmm.log_likelihood, hmm.score, hmm.path_law):
        for y, message in (
            (torch.tensor([0, 4]), r"y must be symbols 0 .. 3, or -1"),
            (torch.zeros(0, dtype=torch.int64), r"y must have shape \(\*batch, T\)"),
            (torch.zeros(T, 2), r"y must have shape \(\*batch, T, 3\)"),
            (torch.full((T, S), math.nan), "y must have log-likelihoods that are finite or -inf"),
        ):
            with pytest.raises(ValueError, match=message):
                call(y)
        with pytest.raises(TypeError, match="y must be a tensor of integers or of floats"):
            call(torch.ones(T, dtype=torch.bool))
    with pytest.raises(ValueError, match="y must be log-likelihoods of a model without emission"):
        FiniteHMM(INITIAL, TRANSITIONS["dense"]).filter(SYMBOLS)
    nothing = torch.full((T, S), -math.inf)
    assert hmm.log_likelihood(nothing) == -math.inf
    for call in (hmm.filter, hmm.smooth, hmm.score, hmm.path_law):
        with pytest.raises(ValueError, match="y must be possible"):
            call(nothing)
    with pytest.raises(ValueError, match="at most 1000000 paths, got 3\\^40"):
        hmm.path_law(torch.zeros(40, dtype=torch.int64))
