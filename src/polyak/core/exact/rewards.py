"""Laws proportional to a reward, over grids and over sets: the truth that samplers of GFlowNets are held to.

A :class:`HyperGrid` is the grid of Bengio et al. (2021, section 4.1). A :class:`SubsetLaw` chooses k of n elements with probability
proportional to the product of their weights; its sums are elementary symmetric polynomials

    e_k(w) = sum_{|S| = k} prod_{a in S} w_a,   e_k(w_1 .. w_n) = e_k(w_1 .. w_{n-1}) + w_n e_{k-1}(w_1 .. w_{n-1}),

so that ``Z = e_k(w)`` and ``P(a in S) = w_a e_{k-1}(w without a) / e_k(w)``; all in logarithms, of positive terms alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from polyak.core import checks

_MOST_CELLS = 10_000_000


class HyperGrid:
    """``R(x) = R0 + R1 prod_i 1(1/4 < u_i) + R2 prod_i 1(3/10 < u_i < 4/10)`` with ``u_i = |x_i / (height - 1) - 1/2|``.

    Args:
        ndim: the number of coordinates.
        height: the values of each, 0 .. height - 1.
        R0, R1, R2: of everywhere, of the corners, and of the ridges within them.

    The bounds are compared in whole numbers: floats put a coordinate that lies on one on either side.

    Example:
        >>> grid = HyperGrid(2, 8)
        >>> grid.law().shape, round(grid.log_z.item(), 6)
        (torch.Size([8, 8]), 3.109061)
    """

    @checks.arguments(
        ndim=checks.Integer(1, 64),
        height=checks.Integer(2, 1_000_000),
        R0=checks.non_negative,
        R1=checks.non_negative,
        R2=checks.non_negative,
    )
    def __init__(self, ndim: int, height: int, R0: float = 0.1, R1: float = 0.5, R2: float = 2.0) -> None:
        self.ndim, self.height = ndim, height
        self.log_rewards = torch.tensor([R0, R1, R2], dtype=torch.float64).log()
        if self.log_z.isinf():
            raise ValueError(f"R0, R1 and R2 must leave some reward on the grid, got {R0:g}, {R1:g} and {R2:g}")

    def __repr__(self) -> str:
        return f"HyperGrid(ndim={self.ndim}, height={self.height})"

    @cached_property
    def log_z(self) -> Tensor:
        """``log sum_x R(x)``, a number; each of the three terms is a product of counts."""
        inside = self._inside(torch.arange(self.height)[:, None]).sum(0)
        return (self.log_rewards + self.ndim * inside.to(torch.float64).log()).logsumexp(0)

    def log_reward(self, x: Tensor) -> Tensor:
        """``log R(x)`` of coordinates x, (*batch, ndim) integers: (*batch,), float64; -inf where it is zero."""
        if not isinstance(x, Tensor) or x.is_floating_point() or x.is_complex() or x.dtype == torch.bool:
            raise TypeError(f"x must be a tensor of integers, got {checks.shown(x)}")
        if x.ndim < 1 or x.shape[-1] != self.ndim:
            raise ValueError(f"x must have shape (*batch, {self.ndim}), got {tuple(x.shape)}")
        if bool(((x < 0) | (x >= self.height)).any()):
            raise ValueError(f"x must be coordinates 0 .. {self.height - 1}")
        inside = self._inside(x.to(torch.int64))
        return self.log_rewards.to(x.device).expand(inside.shape).masked_fill(~inside, -torch.inf).logsumexp(-1)

    def log_prob(self, x: Tensor) -> Tensor:
        """``log R(x) - log Z``, (*batch,)."""
        return self.log_reward(x) - self.log_z.to(x.device)

    def law(self) -> Tensor:
        """The probability of every cell, (height,) * ndim; at most ten million."""
        if self.height**self.ndim > _MOST_CELLS:
            raise ValueError(f"the grid must have at most {_MOST_CELLS} cells, got {self.height}^{self.ndim}")
        axes = torch.meshgrid(*[torch.arange(self.height)] * self.ndim, indexing="ij")
        return self.log_prob(torch.stack(axes, -1)).exp()

    def _inside(self, x: Tensor) -> Tensor:
        """Whether x, (*batch, ndim), is where each of the three rewards is given: (*batch, 3)."""
        last = self.height - 1
        off = (2 * x - last).abs()  # 2 (height - 1) u
        corner, ridge = (2 * off > last).all(-1), ((5 * off > 3 * last) & (5 * off < 4 * last)).all(-1)
        return torch.stack([torch.ones_like(corner), corner, ridge], -1)


@checks.arguments(log_weights=checks.floating, degree=checks.Integer(0))
def log_elementary_symmetric(log_weights: Tensor, degree: int) -> Tensor:
    """``log e_0(w), .., log e_degree(w)`` of the weights in the last dimension.

    Args:
        log_weights: (*batch, n); -inf leaves an element out.

    Returns:
        (*batch, degree + 1), float64; -inf where there are fewer elements.
    """
    if log_weights.ndim < 1:
        raise ValueError(f"log_weights must have shape (*batch, n), got {tuple(log_weights.shape)}")
    if log_weights.device.type == "cpu" and bool((log_weights.isnan() | (log_weights == torch.inf)).any()):
        raise ValueError("log_weights must be finite or -inf, got NaN or inf")
    made = log_weights.to(torch.float64)
    sums = torch.full((*made.shape[:-1], degree + 1), -torch.inf, dtype=torch.float64, device=made.device)
    sums[..., 0] = 0.0
    for a in range(made.shape[-1]):
        sums = torch.cat([sums[..., :1], torch.logaddexp(sums[..., 1:], sums[..., :-1] + made[..., a, None])], -1)
    return sums


class SubsetLaw:
    """The law of sets S of k of n elements, ``P(S) = prod_{a in S} w_a / e_k(w)``.

    Args:
        log_weights: (n,), minus the elements' energies.
        k: the size of the sets.

    Sets are (*batch, n): 1 or True where an element is in.

    Example:
        >>> law = SubsetLaw([0.0, 0.0, 0.0], 2)
        >>> round(law.log_z.exp().item(), 6), round(law.inclusion.sum().item(), 6)
        (3.0, 2.0)
    """

    @checks.arguments(log_weights=checks.array, k=checks.Integer(0))
    def __init__(self, log_weights: Tensor | Sequence[float], k: int) -> None:
        self.log_weights = torch.as_tensor(log_weights, dtype=torch.float64)
        if self.log_weights.ndim != 1 or len(self.log_weights) == 0:
            raise ValueError(f"log_weights must have shape (n,), got {tuple(self.log_weights.shape)}")
        if k > len(self.log_weights):
            raise ValueError(f"k must be at most {len(self.log_weights)}, the number of log_weights, got {k}")
        self.k = k

    def __repr__(self) -> str:
        return f"SubsetLaw(n={len(self.log_weights)}, k={self.k})"

    @cached_property
    def log_z(self) -> Tensor:
        """``log e_k(w)``, a number."""
        return log_elementary_symmetric(self.log_weights, self.k)[-1]

    @cached_property
    def inclusion(self) -> Tensor:
        """``P(a in S)``, (n,); they add up to k."""
        if self.k == 0:
            return torch.zeros_like(self.log_weights)
        n = len(self.log_weights)
        others = self.log_weights.expand(n, n).masked_fill(
            torch.eye(n, dtype=torch.bool, device=self.log_weights.device), -torch.inf
        )
        return (self.log_weights + log_elementary_symmetric(others, self.k - 1)[:, -1] - self.log_z).exp()

    def log_prob(self, x: Tensor) -> Tensor:
        """``log P(S)``, (*batch,); -inf where S has not k elements."""
        chosen = self._sets(x)
        inside = torch.where(chosen, self.log_weights, 0.0).sum(-1) - self.log_z
        return inside.masked_fill(chosen.sum(-1) != self.k, -torch.inf)

    def log_completions(self, x: Tensor) -> Tensor:
        """``log e_{k - |s|}(w of what is not in s)`` of partial sets s, (*batch,): the mass of all ways to complete one.

        With a uniform backward policy ``e_{k - |s|} / C(k, |s|)`` is the forward-looking flow of a GFlowNet at s, whose
        energy is that of the elements in s.
        """
        chosen = self._sets(x)
        sizes = chosen.sum(-1)
        if bool((sizes > self.k).any()):
            raise ValueError(f"x must be sets of at most {self.k} elements, got {int(sizes.max())}")
        rest = self.log_weights.expand(chosen.shape).masked_fill(chosen, -torch.inf)
        return log_elementary_symmetric(rest, self.k).gather(-1, (self.k - sizes)[..., None])[..., 0]

    @checks.arguments(count=checks.Integer(0), generator=checks.generator | None)
    def sample(self, count: int, *, generator: torch.Generator | None = None) -> Tensor:
        """Independent sets, (count, n), bool: each element in turn, given how many are still to come."""
        n, like = len(self.log_weights), self.log_weights
        tails = [log_elementary_symmetric(like[a:], self.k) for a in range(n + 1)]  # of the elements from a on
        left = torch.full((count,), self.k, device=like.device)
        chosen = []
        for a in range(n):
            with_a = like[a] + tails[a + 1][(left - 1).clamp(min=0)] - tails[a][left]
            level = torch.rand(count, dtype=like.dtype, device=like.device, generator=generator)
            chosen.append((level < with_a.exp()) & (left > 0))
            left = left - chosen[-1].to(left)
        return torch.stack(chosen, 1)

    def _sets(self, x: Tensor) -> Tensor:
        n = len(self.log_weights)
        if not isinstance(x, Tensor) or x.is_complex():
            raise TypeError(f"x must be a tensor of truths, or of 0 and 1, got {checks.shown(x)}")
        if x.ndim < 1 or x.shape[-1] != n:
            raise ValueError(f"x must have shape (*batch, {n}), got {tuple(x.shape)}")
        if not bool(((x == 0) | (x == 1)).all()):
            raise ValueError("x must be 1 where an element is in a set, else 0")
        return (x == 1).to(self.log_weights.device)
