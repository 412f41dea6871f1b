"""The Ising model on a small square lattice: by enumeration up to 4 x 4, by transfer matrices up to 10 x 10.

    p(s) = exp(J sum_<ij> s_i s_j + sum_i h_i s_i) / Z,   s_i = -1 or +1

Rows of the lattice are the steps of a chain of ``2^L`` states. With ``E_i(r)`` the exponent of row i alone, and ``K(r, r')`` the
product of ``exp(J r_j r'_j)`` over columns, ``Z = tr prod_i (diag exp E_i) K`` on a torus (Kramers and Wannier 1941). K is a
Kronecker product, so that a row costs about ``4^L 2^(L/2)`` operations.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property

import torch
from torch import Tensor

from polyak.core import checks

_ENUMERATED = 4  # the largest length of which all states are listed
_STRONGEST = 10.0  # exponents of a row of 10 spins then differ by at most 600: no exponential is zero
_AT_ONCE = 64  # partial states compared with all states


class Ising:
    """An Ising model of ``length x length`` spins.

    Args:
        length: L, from 2 to 10.
        coupling: J, of every bond, from -10 to 10; positive is ferromagnetic.
        field: h, a number or (L, L), from -10 to 10.
        torus: whether opposite sides are joined. Each site then has one bond to its right and one downwards, so that on
            2 x 2 sites each pair of neighbours has two.

    States are (*batch, L * L), row by row, -1 or +1; 0 is a spin that is not known. Code that writes the energy as
    ``s'As`` with a symmetric adjacency A counts every bond twice: its coupling is half of this J.

    Example:
        >>> round(Ising(10, 0.2, 0.2).log_z.item(), 6)
        78.688056
    """

    @checks.arguments(
        length=checks.Integer(2, 10),
        coupling=checks.Number(-_STRONGEST, _STRONGEST),
        field=checks.array,
        torus=checks.flag,
    )
    def __init__(
        self,
        length: int,
        coupling: float,
        field: float | Tensor | Sequence[Sequence[float]] = 0.0,
        torus: bool = True,
    ) -> None:
        self.length, self.coupling, self.torus = length, float(coupling), torus
        given = torch.as_tensor(field, dtype=torch.float64)
        if given.shape not in ((), (length, length)) or not bool((given.abs() <= _STRONGEST).all()):
            raise ValueError(
                f"field must be a number or have shape ({length}, {length}), at most {_STRONGEST:g} in size, got "
                f"{checks.shown(field)}"
            )
        self.field = given.expand(length, length).clone()
        sites = torch.arange(length**2, device=given.device).reshape(length, length)
        right, down = sites.roll(-1, 1), sites.roll(-1, 0)
        bonds = [(sites, right), (sites, down)] if torus else [(sites[:, :-1], right[:, :-1]), (sites[:-1], down[:-1])]
        self._ends = tuple(torch.cat([pair[end].flatten() for pair in bonds]) for end in (0, 1))

    def __repr__(self) -> str:
        return f"Ising({self.length}, coupling={self.coupling:g}, torus={self.torus})"

    @cached_property
    def log_z(self) -> Tensor:
        """``log Z``, a number."""
        return self._log_sum(self.field, None)

    @cached_property
    def states(self) -> Tensor:
        """All states, (2^(L L), L L), the first spin slowest; for L <= 4."""
        self._check_enumerable()
        return _spins(self.length**2, self.field.device)

    @cached_property
    def _log_law(self) -> Tensor:
        return self.log_density(self.states).log_softmax(0)

    def log_density(self, x: Tensor) -> Tensor:
        """``J sum s_i s_j + sum h_i s_i``, which is ``log p + log Z``; (*batch,)."""
        s = self._known(x, partial=False)
        pairs = (s[..., self._ends[0]] * s[..., self._ends[1]]).sum(-1)
        return self.coupling * pairs + s @ self.field.flatten()

    def log_prob(self, x: Tensor) -> Tensor:
        """``log p(s)``, (*batch,)."""
        return self.log_density(x) - self.log_z

    def log_marginal(self, x: Tensor) -> Tensor:
        """``log p(s_S)`` of the spins that are known, (*batch,). Where L > 4 each costs as much as ``log_z``."""
        s = self._known(x)
        flat = s.reshape(-1, s.shape[-1])
        if self.length <= _ENUMERATED:
            found = [self._agreeing(part).logsumexp(-1) for part in flat.split(_AT_ONCE)]
            return torch.cat([*found, flat.new_zeros(0)]).reshape(s.shape[:-1])
        sums = [self._log_sum(self.field, row.reshape(self.length, -1)) - self.log_z for row in flat]
        return torch.stack([*sums, self.log_z])[:-1].reshape(s.shape[:-1])

    def conditionals(self, x: Tensor) -> Tensor:
        """``p(s_j = -1 | s_S)`` and ``p(s_j = +1 | s_S)``, (*batch, L L, 2); for L <= 4."""
        self._check_enumerable()
        s = self._known(x)
        flat = s.reshape(-1, s.shape[-1])
        up = [self._agreeing(part).softmax(-1) @ (self.states > 0).to(s) for part in flat.split(_AT_ONCE)]
        law = torch.cat([*up, flat[:0]]).clamp(max=1.0).reshape(s.shape)
        return torch.stack([1 - law, law], -1)

    @cached_property
    def means(self) -> Tensor:
        """``E[s]``, (L, L): the derivative of ``log Z`` in the field."""
        with torch.enable_grad():
            field = self.field.detach().clone().requires_grad_()
            return torch.autograd.grad(self._log_sum(field, None), field)[0]

    @checks.arguments(n=checks.Integer(0), generator=checks.generator | None)
    def sample(self, n: int, *, generator: torch.Generator | None = None) -> Tensor:
        """n independent states, (n, L L), float64; for L <= 4."""
        self._check_enumerable()
        ends = self._log_law.exp().cumsum(0)
        levels = torch.rand(n, dtype=ends.dtype, device=ends.device, generator=generator) * ends[-1]
        return self.states[torch.searchsorted(ends, levels, right=True).clamp(max=len(ends) - 1)]

    def _log_sum(self, field: Tensor, known: Tensor | None) -> Tensor:
        """``log sum exp(log_density)`` over the states that agree with what is known, (L, L)."""
        L, J = self.length, self.coupling
        rows = _spins(L, field.device)
        within = J * (rows * rows.roll(-1, 1))[:, : L if self.torus else L - 1].sum(-1)
        energies = within + field @ rows.mT  # (L, 2^L)
        if known is not None:
            clash = (known[:, None] * rows < 0).any(-1)
            energies = energies.masked_fill(clash, -torch.inf)
        couple = _coupled(J, L, field.device)
        top = energies.amax(-1)
        weights = (energies - top[:, None]).exp()
        total = top.sum() + abs(J) * L * (L if self.torus else L - 1)
        ways = torch.diag_embed(weights[0]) if self.torus else weights[:1]  # (first row, present row)
        log_scale = field.new_zeros(len(ways))
        for i in range(1, L):
            ways = couple(ways) * weights[i]
            size = ways.detach().amax(-1)
            size = torch.where(size > 0, size, 1.0)
            ways, log_scale = ways / size[:, None], log_scale + size.log()
        closed = couple(ways).diagonal() if self.torus else ways.sum(-1)
        return total + (closed.log() + log_scale).logsumexp(0)

    def _agreeing(self, s: Tensor) -> Tensor:
        """``log p`` of all states, -inf where one does not agree with what is known: (B, 2^(L L))."""
        agree = s @ self.states.mT == s.abs().sum(-1, keepdim=True)
        return self._log_law.masked_fill(~agree, -torch.inf)

    def _check_enumerable(self) -> None:
        if self.length > _ENUMERATED:
            raise ValueError(
                f"length must be at most {_ENUMERATED} for this, which lists all states, got {self.length}"
            )

    def _known(self, x: Tensor, *, partial: bool = True) -> Tensor:
        if not isinstance(x, Tensor) or x.is_complex() or x.dtype == torch.bool:
            raise TypeError(f"x must be a tensor of numbers, got {checks.shown(x)}")
        if x.ndim < 1 or x.shape[-1] != self.length**2:
            raise ValueError(f"x must have shape (*batch, {self.length**2}), got {tuple(x.shape)}")
        s = x.to(self.field)
        if not bool(((s.abs() == 1) | ((s == 0) & partial)).all()):
            raise ValueError(f"x must be spins, -1 or +1{', or 0 where one is not known' if partial else ''}")
        return s


def _spins(count: int, device: torch.device) -> Tensor:
    """(2^count, count): all of -1 and +1, the first slowest, float64."""
    bits = torch.arange(2**count, device=device)[:, None] >> torch.arange(count - 1, -1, -1, device=device)
    return 2.0 * (bits & 1).to(torch.float64) - 1


def _coupled(coupling: float, length: int, device: torch.device) -> Callable[[Tensor], Tensor]:
    """Multiplication of (n, 2^L) by ``K exp(-|J| L)``, as one of two smaller ones."""
    halves = [_spins(size, device) for size in (length // 2, length - length // 2)]
    high, low = ((coupling * (s @ s.mT) - abs(coupling) * s.shape[1]).exp() for s in halves)

    def multiply(ways: Tensor) -> Tensor:
        return (high @ ways.reshape(len(ways), len(high), len(low)) @ low).flatten(1)

    return multiply
