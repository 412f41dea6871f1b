"""Transfer matrices against sums over all states, and against numbers that are known."""

from __future__ import annotations

import functools
import itertools
import math

import pytest
import torch
from torch import Tensor

from polyak.core.exact import Ising


@functools.cache
def all_states(count: int) -> Tensor:
    return torch.tensor(list(itertools.product([-1.0, 1.0], repeat=count)), dtype=torch.float64)


def exponents(length: int, coupling: float, field: Tensor, torus: bool) -> Tensor:
    """By loops over sites, of all states."""
    s = all_states(length**2).reshape(-1, length, length)
    total = (s * field).sum((1, 2))
    for i in range(length):
        for j in range(length):
            if torus or j + 1 < length:
                total = total + coupling * s[:, i, j] * s[:, i, (j + 1) % length]
            if torus or i + 1 < length:
                total = total + coupling * s[:, i, j] * s[:, (i + 1) % length, j]
    return total


def field_of(length: int, scale: float = 0.7) -> Tensor:
    return scale * torch.randn(length, length, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("torus", [True, False])
@pytest.mark.parametrize(("length", "coupling"), [(2, 0.4), (3, -0.6), (3, 9.0), (4, 0.5)])
def test_the_partition_function_and_the_means_are_those_of_all_states(
    length: int, coupling: float, torus: bool
) -> None:
    field = field_of(length)
    model, energy = Ising(length, coupling, field, torus), exponents(length, coupling, field, torus)
    assert torch.equal(model.states, all_states(length**2))
    assert torch.allclose(model.log_density(model.states), energy, atol=1e-10)
    assert model.log_z.item() == pytest.approx(energy.logsumexp(0).item(), abs=1e-10)
    law = energy.softmax(0)
    assert torch.allclose(model.means.flatten(), law @ model.states, atol=1e-10)
    assert torch.allclose(model.log_prob(model.states).exp(), law, atol=1e-12)


def test_log_z_of_ten_by_ten() -> None:
    assert Ising(10, 0.2, 0.2).log_z.item() == pytest.approx(78.688056, abs=5e-7)
    # Kaufman's sum of four products for the torus without a field (1949), evaluated by its own formulas.
    n, k = 6, 0.35
    gammas = []
    for r in range(2 * n):
        c = math.cosh(2 * k) ** 2 / math.sinh(2 * k) - math.cos(math.pi * r / n)
        gammas.append(math.acosh(c))
    gammas[0] = 2 * k + math.log(math.tanh(k))
    odd, even = gammas[1::2], gammas[0::2]
    four = (
        math.prod(2 * math.cosh(n * g / 2) for g in odd)
        + math.prod(2 * math.sinh(n * g / 2) for g in odd)
        + math.prod(2 * math.cosh(n * g / 2) for g in even)
        + math.prod(2 * math.sinh(n * g / 2) for g in even)
    )
    expected = -math.log(2) + 0.5 * n * n * math.log(2 * math.sinh(2 * k)) + math.log(four)
    assert Ising(n, k).log_z.item() == pytest.approx(expected, abs=1e-10)


def test_marginals_and_conditionals_of_every_part() -> None:
    field = field_of(3)
    model = Ising(3, 0.5, field)
    states, law = all_states(9), exponents(3, 0.5, field, True).softmax(0)
    generator = torch.Generator().manual_seed(0)
    x = states[torch.randint(512, (70,), generator=generator)] * (torch.rand(70, 9, generator=generator) < 0.5)
    x[0], x[1] = 0.0, states[5]
    log_p, conditionals = model.log_marginal(x), model.conditionals(x)
    for row in range(70):
        agree = ((states == x[row]) | (x[row] == 0)).all(1)
        mass = law[agree].sum()
        assert log_p[row].item() == pytest.approx(mass.log().item(), abs=1e-12)
        up = (law[agree, None] * (states[agree] > 0)).sum(0) / mass
        assert torch.allclose(conditionals[row], torch.stack([1 - up, up], -1), atol=1e-12)
    assert torch.equal(model.log_marginal(x.reshape(7, 10, 9).long()).flatten(), log_p)
    assert log_p[0].item() == pytest.approx(0.0, abs=1e-13)
    assert log_p[1].item() == pytest.approx(model.log_prob(states[5]).item())


def test_marginals_of_larger_lattices() -> None:
    small, field = Ising(4, 0.5, field_of(4)), torch.zeros(5, 5)
    x = small.states[[3, 77]] * (torch.arange(16) % 3 > 0)
    expected = torch.stack([small._log_sum(small.field, row.reshape(4, 4)) for row in x]) - small.log_z
    assert torch.allclose(small.log_marginal(x), expected, atol=1e-11)
    model = Ising(5, 0.3, field)
    site = torch.zeros(3, 25)
    site[0, 7], site[1, 7], site[1, 8], site[2, 7], site[2, 8] = 1.0, 1.0, 1.0, 1.0, -1.0
    one, same, other = model.log_marginal(site).exp().tolist()
    assert one == pytest.approx(0.5)
    assert same + other == pytest.approx(0.5)
    assert same > other
    assert model.log_marginal(site[:0]).shape == (0,)


def test_draws_have_the_law() -> None:
    n, model = 20000, Ising(2, 0.3, 0.2)
    s = model.sample(n, generator=torch.Generator().manual_seed(0))
    index = ((s > 0) * torch.tensor([8, 4, 2, 1])).sum(1)
    counts, law = torch.bincount(index, minlength=16).double(), model.log_prob(model.states).exp()
    assert bool(((counts - n * law).abs() <= 4.5 * (n * law * (1 - law)).sqrt() + 1).all())


def test_strong_couplings_and_fields_are_finite() -> None:
    # All spins are up: two bonds of 10 and a field of 10 for each.
    model = Ising(9, 10.0, 10.0)
    assert model.log_z.item() == pytest.approx(81 * 30.0, abs=1e-9)
    assert torch.allclose(model.means, torch.ones(9, 9).double())
    # Frustrated: 2 ground states on an even torus; on an odd one every row and every column breaks a bond.
    assert Ising(4, -10.0).log_z.item() == pytest.approx(32 * 10 + math.log(2), abs=1e-7)
    energy = exponents(3, -10.0, torch.zeros(3, 3), True)
    assert Ising(3, -10.0).log_z.item() == pytest.approx(energy.logsumexp(0).item(), abs=1e-9)
    # Rows with a field up and down in turn, all of which the coupling holds together: all up, or all down.
    stripes = 10.0 * (-1.0) ** torch.arange(10)[:, None].expand(10, 10)
    assert Ising(10, 10.0, stripes).log_z.item() == pytest.approx(2000 + math.log(2), abs=1e-9)
    assert bool(Ising(9, -10.0, 10.0).means.isfinite().all())


def test_what_is_no_lattice_and_no_state_is_refused() -> None:
    for arguments, message in (
        ((11, 0.1), "length must be at most 10, got 11"),
        ((1, 0.1), "length must be at least 2, got 1"),
        ((3, math.nan), "coupling must be finite"),
        ((3, 11.0), "coupling must be in"),
        ((3, 0.1, [[1.0]]), r"field must be a number or have shape \(3, 3\)"),
        ((3, 0.1, 11.0), "at most 10 in size"),
    ):
        with pytest.raises(ValueError, match=message):
            Ising(*arguments)
    model, large = Ising(2, 0.1), Ising(5, 0.1)
    for call in (model.log_density, model.log_prob, model.log_marginal, model.conditionals):
        for x, message in (
            (torch.zeros(3), r"x must have shape \(\*batch, 4\), got \(3,\)"),
            (torch.full((4,), 2.0), "x must be spins, -1 or \\+1"),
            (torch.full((4,), math.nan), "x must be spins"),
        ):
            with pytest.raises(ValueError, match=message):
                call(x)
        with pytest.raises(TypeError, match="x must be a tensor of numbers"):
            call([1, 1, 1, 1])
    with pytest.raises(ValueError, match=r"x must be spins, -1 or \+1$"):
        model.log_density(torch.tensor([1, 1, 0, 1]))
    for call in (lambda: large.states, lambda: large.sample(1), lambda: large.conditionals(torch.zeros(25))):
        with pytest.raises(ValueError, match="length must be at most 4 for this"):
            call()
