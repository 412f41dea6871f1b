"""Grids and sets against their enumeration."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import pytest
import torch

from polyak.core.exact import HyperGrid, SubsetLaw, log_elementary_symmetric

N, K = 6, 3
LOG_W = [0.5, -1.0, 0.0, 2.0, -0.3, 0.9]
SETS = list(itertools.combinations(range(N), K))


def mass(chosen: tuple[int, ...]) -> float:
    return math.exp(sum(LOG_W[a] for a in chosen))


def vector(chosen: tuple[int, ...]) -> list[int]:
    return [int(a in chosen) for a in range(N)]


@pytest.mark.parametrize(("ndim", "height"), [(2, 8), (3, 5), (2, 21), (1, 2), (1, 11)])
def test_the_grid_in_fractions(ndim: int, height: int) -> None:
    # Heights 11 and 21 have coordinates on the bounds, which are excluded.
    grid = HyperGrid(ndim, height, 0.01, 0.4, 3.0)
    cells = list(itertools.product(range(height), repeat=ndim))
    rewards = []
    for cell in cells:
        u = [abs(Fraction(c, height - 1) - Fraction(1, 2)) for c in cell]
        corner, ridge = all(v > Fraction(1, 4) for v in u), all(Fraction(3, 10) < v < Fraction(4, 10) for v in u)
        rewards.append(0.01 + 0.4 * corner + 3.0 * ridge)
    x = torch.tensor(cells)
    assert torch.allclose(grid.log_reward(x).exp(), torch.tensor(rewards, dtype=torch.float64), rtol=1e-12)
    assert grid.log_z.item() == pytest.approx(math.log(sum(rewards)), abs=1e-12)
    law = grid.law()
    assert law.shape == (height,) * ndim
    assert law.sum().item() == pytest.approx(1.0)
    assert torch.allclose(law.flatten(), torch.tensor(rewards, dtype=torch.float64) / sum(rewards))


def test_the_sums_of_a_large_grid_and_rewards_of_zero() -> None:
    grid = HyperGrid(20, 64)
    inside = [abs(x / 63 - 0.5) for x in range(64)]
    corner, ridge = sum(u > 0.25 for u in inside), sum(0.3 < u < 0.4 for u in inside)
    expected = math.log(0.1) + 20 * math.log(64) + math.log1p(5 * (corner / 64) ** 20 + 20 * (ridge / 64) ** 20)
    assert grid.log_z.item() == pytest.approx(expected, abs=1e-10)
    assert HyperGrid(2, 8, R0=0.0).log_reward(torch.tensor([3, 0])) == -math.inf
    with pytest.raises(ValueError, match="the grid must have at most 10000000 cells, got 64\\^20"):
        grid.law()
    with pytest.raises(ValueError, match="R0, R1 and R2 must leave some reward"):
        HyperGrid(2, 2, 0.0, 0.0, 2.0)
    for x, message in (
        (torch.tensor([0, 8]), r"x must be coordinates 0 .. 7"),
        (torch.tensor([0]), r"x must have shape \(\*batch, 2\)"),
    ):
        with pytest.raises(ValueError, match=message):
            HyperGrid(2, 8).log_reward(x)
    with pytest.raises(TypeError, match="x must be a tensor of integers"):
        HyperGrid(2, 8).log_reward(torch.tensor([0.0, 1.0]))


def test_elementary_symmetric_polynomials_are_the_coefficients() -> None:
    rows = torch.tensor([LOG_W, [*LOG_W[:4], -math.inf, -math.inf]], dtype=torch.float64)
    got = log_elementary_symmetric(rows, N)
    for row, present in zip(got, (LOG_W, LOG_W[:4]), strict=True):
        for k in range(N + 1):
            total = sum(math.exp(sum(c)) for c in itertools.combinations(present, k))
            assert row[k].item() == (pytest.approx(math.log(total), abs=1e-12) if total else -math.inf)
    # e_k of n ones is n choose k; shifted weights shift the logarithm.
    ones = log_elementary_symmetric(torch.full((100,), 700.0, dtype=torch.float64), 80)
    assert ones[80].item() == pytest.approx(80 * 700 + math.log(math.comb(100, 80)), rel=1e-13)
    with pytest.raises(ValueError, match="log_weights must be finite or -inf"):
        log_elementary_symmetric(torch.tensor([math.nan]), 1)


def test_the_law_of_sets() -> None:
    law, total = SubsetLaw(LOG_W, K), sum(map(mass, SETS))
    assert law.log_z.item() == pytest.approx(math.log(total), abs=1e-12)
    inclusion = [sum(mass(s) for s in SETS if a in s) / total for a in range(N)]
    assert law.inclusion.tolist() == pytest.approx(inclusion, abs=1e-13)
    x = torch.tensor([vector(s) for s in SETS])
    expected = torch.tensor([mass(s) / total for s in SETS], dtype=torch.float64)
    assert torch.allclose(law.log_prob(x).exp(), expected)
    assert law.log_prob(torch.ones(N)) == -math.inf
    for size in range(K + 1):
        for part in itertools.combinations(range(N), size):
            completed = sum(mass(s) / mass(part) for s in SETS if set(part) <= set(s))
            got = law.log_completions(torch.tensor(vector(part), dtype=torch.bool))
            assert got.item() == pytest.approx(math.log(completed), abs=1e-12)
    n = 20000
    drawn = law.sample(n, generator=torch.Generator().manual_seed(0))
    counts = torch.stack([(drawn == x[i].bool()).all(1).sum() for i in range(len(SETS))]).double()
    assert counts.sum() == n
    assert bool(((counts - n * expected).abs() <= 4.5 * (n * expected * (1 - expected)).sqrt() + 1).all())
    assert SubsetLaw(LOG_W, 0).inclusion.tolist() == [0.0] * N
    assert SubsetLaw(LOG_W, N).inclusion.tolist() == pytest.approx([1.0] * N)
    assert bool(SubsetLaw(LOG_W, N).sample(3).all())


def test_the_flows_of_the_optimum_balance() -> None:
    # Ft(s) = e_{K-|s|}(rest) / C(K, |s|) with uniform backward steps: what flows in at s is what flows out.
    law = SubsetLaw(LOG_W, K)
    for size in range(K):
        for part in itertools.combinations(range(N), size):
            flow = law.log_completions(torch.tensor(vector(part))).exp().item() / math.comb(K, size)
            out = 0.0
            for a in set(range(N)) - set(part):
                then = law.log_completions(torch.tensor(vector((*part, a)))).exp().item() / math.comb(K, size + 1)
                out += math.exp(LOG_W[a]) * then / (size + 1)
            assert out == pytest.approx(flow, rel=1e-12)


def test_what_are_no_sets_is_refused() -> None:
    for arguments, message in (
        (([[1.0]], 1), r"log_weights must have shape \(n,\)"),
        (([1.0, 2.0], 3), "k must be at most 2"),
        (([1.0, math.nan], 1), "log_weights must be finite"),
        (([1.0], -1), "k must be at least 0"),
    ):
        with pytest.raises(ValueError, match=message):
            SubsetLaw(*arguments)
    law = SubsetLaw(LOG_W, K)
    for call in (law.log_prob, law.log_completions):
        for x, message in (
            (torch.zeros(3), r"x must have shape \(\*batch, 6\)"),
            (torch.full((N,), 2), "x must be 1 where an element is in a set, else 0"),
        ):
            with pytest.raises(ValueError, match=message):
                call(x)
        with pytest.raises(TypeError, match="x must be a tensor"):
            call([0] * N)
    with pytest.raises(ValueError, match="x must be sets of at most 3 elements, got 6"):
        law.log_completions(torch.ones(N))
