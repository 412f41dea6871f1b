"""Markov chains over strings against the enumeration of all strings."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from polyak.core.exact import MarkovChain

V, L = 3, 5
INITIAL = [0.5, 0.2, 0.3]
TRANSITION = [[0.7, 0.2, 0.1], [0.0, 0.4, 0.6], [0.5, 0.5, 0.0]]  # some steps are impossible
CHAIN = MarkovChain(INITIAL, TRANSITION)
STRINGS = list(itertools.product(range(V), repeat=L))


def probability(string: tuple[int, ...]) -> float:
    p = INITIAL[string[0]]
    for i, j in itertools.pairwise(string):
        p *= TRANSITION[i][j]
    return p


def masked() -> Tensor:
    """Every string of the chain, with every set of positions hidden in one of them."""
    strings = torch.tensor([s for s in STRINGS if probability(s) > 0])
    patterns = torch.cartesian_prod(*[torch.tensor([False, True])] * L)
    picked = strings[torch.arange(len(patterns)) * 7 % len(strings)]
    return torch.where(patterns, -1, picked)


def agreeing(x: list[int]) -> list[tuple[tuple[int, ...], float]]:
    return [(s, probability(s)) for s in STRINGS if all(r in (-1, c) for r, c in zip(x, s, strict=True))]


def test_conditionals_and_marginals_of_every_revealed_set() -> None:
    x = masked()
    law, pairs, log_p = CHAIN.conditionals(x), CHAIN.pair_conditionals(x), CHAIN.log_prob(x)
    assert (law.shape, pairs.shape) == ((32, L, V), (32, L - 1, V, V))
    for row, string in enumerate(x.tolist()):
        total = sum(p for _, p in agreeing(string))
        expected = torch.zeros(L, V, dtype=torch.float64)
        two = torch.zeros(L - 1, V, V, dtype=torch.float64)
        for s, p in agreeing(string):
            for j in range(L):
                expected[j, s[j]] += p / total
            for j in range(L - 1):
                two[j, s[j], s[j + 1]] += p / total
        assert log_p[row].item() == pytest.approx(math.log(total), abs=1e-12)
        assert torch.allclose(law[row], expected, atol=1e-13)
        assert torch.allclose(pairs[row], two, atol=1e-13)
    shaped = x.reshape(4, 8, L).to(torch.int16)
    assert torch.equal(CHAIN.conditionals(shaped).reshape(32, L, V), law)


def test_laws_of_strings_and_of_ngrams() -> None:
    law = CHAIN.law(L)
    assert torch.allclose(law.flatten(), torch.tensor([probability(s) for s in STRINGS], dtype=torch.float64))
    assert torch.allclose(CHAIN.log_prob(torch.tensor(STRINGS)).exp(), law.flatten())
    two = torch.zeros(V, V, dtype=torch.float64)
    for s in STRINGS:
        for i, j in itertools.pairwise(s):
            two[i, j] += probability(s) / (L - 1)
    assert torch.allclose(CHAIN.ngrams(2, L), two)
    assert torch.allclose(CHAIN.ngrams(1, L), CHAIN.marginals(L).mean(0))
    entropy = -sum(probability(s) * math.log(probability(s)) for s in STRINGS if probability(s) > 0)
    assert CHAIN.entropy(L).item() == pytest.approx(entropy, abs=1e-12)
    assert torch.allclose(CHAIN.stationary @ CHAIN.transition, CHAIN.stationary)
    assert torch.allclose(CHAIN.marginals(200)[-1], CHAIN.stationary)


@pytest.mark.parametrize("revealed", [[-1] * 4, [-1, 2, -1, 1], [0, -1, -1, -1]])
def test_draws_have_the_law(revealed: list[int]) -> None:
    n, x = 20000, torch.tensor(revealed)
    generator = torch.Generator().manual_seed(0)
    drawn = CHAIN.fill(x.expand(n, -1), generator=generator)
    assert bool(((drawn == x) | (x == -1)).all())
    for found in [drawn] + ([CHAIN.sample(4, n, generator=generator)] if max(revealed) < 0 else []):
        counts = torch.zeros(V**4).index_add(0, found @ torch.tensor([27, 9, 3, 1]), torch.ones(n)).double()
        keep = torch.tensor(
            [all(r in (-1, c) for r, c in zip(revealed, s, strict=True)) for s in itertools.product(range(V), repeat=4)]
        )
        law = torch.where(keep, CHAIN.law(4).flatten(), 0.0)
        law = law / law.sum()
        assert bool((counts[law == 0] == 0).all())
        assert bool(((counts - n * law).abs() <= 4.5 * (n * law * (1 - law)).sqrt()).all())


@pytest.mark.parametrize("level", [0.0, 1.0])
def test_symbols_of_probability_zero_are_never_drawn(level: float, monkeypatch: pytest.MonkeyPatch) -> None:
    # A level of 0 is drawn now and then, and one just below 1 may round to the sum.
    monkeypatch.setattr(torch, "rand", lambda *shape, **_: torch.full(shape, level, dtype=torch.float64))
    chain = MarkovChain([0.0, 0.6, 0.4, 0.0], [[0.25] * 4, [0.0, 0.5, 0.5, 0.0], [0.0, 0.5, 0.5, 0.0], [0.25] * 4])
    assert chain.sample(4, 2).tolist() == [[1 + int(level)] * 4] * 2


def test_long_strings_do_not_underflow() -> None:
    x = torch.full((2, 3000), -1)
    x[0] = CHAIN.sample(3000, generator=torch.Generator().manual_seed(0))[0]
    x[1, 0], x[1, -1] = 0, 2
    steps = sum(math.log(TRANSITION[i][j]) for i, j in itertools.pairwise(x[0].tolist()))
    log_p = CHAIN.log_prob(x)
    assert log_p[0].item() == pytest.approx(math.log(INITIAL[x[0, 0]]) + steps, rel=1e-12)
    assert log_p[1].item() == pytest.approx(math.log(0.5 * CHAIN.stationary[2]), abs=1e-10)
    assert torch.allclose(CHAIN.conditionals(x)[1, 1500], CHAIN.stationary)


def test_what_is_no_chain_and_no_string_is_refused() -> None:
    for arguments, message in (
        (([0.5, 0.6], [[1, 0], [0, 1]]), "initial must be probabilities"),
        (([1.0], [[0.5, 0.5]]), r"transition must have shape \(1, 1\), got \(1, 2\)"),
        (([0.5, 0.5], [[1.5, -0.5], [0, 1]]), "transition must be probabilities"),
        (([[1.0]], [[1.0]]), r"initial must have shape \(n,\), got \(1, 1\)"),
    ):
        with pytest.raises(ValueError, match=message):
            MarkovChain(*arguments)
    for call in (CHAIN.log_prob, CHAIN.conditionals, CHAIN.pair_conditionals, CHAIN.fill):
        for x, message in (
            (torch.tensor([0, 3]), r"x must be symbols 0 .. 2, or -1"),
            (torch.tensor([-2, 1]), r"x must be symbols 0 .. 2, or -1"),
            (torch.zeros(2, 0, dtype=torch.int64), "L > 0"),
        ):
            with pytest.raises(ValueError, match=message):
                call(x)
        with pytest.raises(TypeError, match="x must be a tensor"):
            call(torch.tensor([0.0, 1.0]))
    impossible = torch.tensor([[0, 0], [1, 0]])
    assert CHAIN.log_prob(impossible).tolist() == [pytest.approx(math.log(0.35)), -math.inf]
    with pytest.raises(ValueError, match="x must be possible"):
        CHAIN.conditionals(impossible)
    with pytest.raises(ValueError, match="n must be at most the length 2, got 3"):
        CHAIN.ngrams(3, 2)
    with pytest.raises(ValueError, match="n must be so small that there are at most 10000000 strings, got 3\\^40"):
        CHAIN.law(40)
