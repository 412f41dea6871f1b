"""Markov chains over strings: exact conditionals given any revealed symbols, which is what masked diffusion learns.

    p(x) = pi(x_0) prod_{j >= 1} a(x_{j-1}, x_j)

With some positions S revealed, ``p(x_j | x_S)`` follows from one pass in each direction, of ``log(pi A^..)`` restricted to what is
revealed: :class:`MarkovChain` is the exact denoiser of masked diffusion, and ``log p(x_S)`` the exact marginal of any subset.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from polyak.core import checks
from polyak.core.exact._categorical import advanced, drawn, probabilities

_MOST_STRINGS = 10_000_000


class MarkovChain:
    """A Markov chain over V symbols, read as a law of strings of any length L.

    Args:
        initial: (V,), the law of the first symbol.
        transition: (V, V), row i the law of what follows symbol i.

    Strings are integers (*batch, L), symbols 0 .. V-1, or -1 where one is hidden.

    Example:
        >>> chain = MarkovChain([0.5, 0.5], [[0.9, 0.1], [0.1, 0.9]])
        >>> chain.conditionals(torch.tensor([0, -1, 0]))[1]
        tensor([0.9878, 0.0122], dtype=torch.float64)
    """

    @checks.arguments(initial=checks.array, transition=checks.array)
    def __init__(self, initial: Tensor | Sequence[float], transition: Tensor | Sequence[Sequence[float]]) -> None:
        self.initial = probabilities("initial", initial, (None,))
        symbols = len(self.initial)
        self.transition = probabilities("transition", transition, (symbols, symbols), self.initial.device)

    def __repr__(self) -> str:
        return f"MarkovChain(symbols={len(self.initial)})"

    @property
    def stationary(self) -> Tensor:
        """(V,): the law that a step leaves as it is; where there are several, one of them."""
        eye = torch.eye(len(self.initial), dtype=torch.float64, device=self.initial.device)
        equations = torch.cat([(self.transition - eye).mT, torch.ones_like(self.initial)[None]])
        right = torch.cat([torch.zeros_like(self.initial), torch.ones_like(self.initial[:1])])
        return (torch.linalg.pinv(equations) @ right).clamp(min=0)

    def log_prob(self, x: Tensor) -> Tensor:
        """``log p(x_S)`` of what is revealed, (*batch,): of whole strings, and of any parts of them. -inf where impossible."""
        allowed = self._allowed(x)
        return self._forward(allowed)[..., -1, :].logsumexp(-1)

    def conditionals(self, x: Tensor) -> Tensor:
        """``p(x_j = v | x_S)``, (*batch, L, V); one-hot where x is revealed. ValueError where what is revealed is impossible."""
        allowed = self._allowed(x)
        alpha = self._forward(allowed)
        self._possible(alpha)
        return (alpha + self._backward(allowed)).softmax(-1)

    def pair_conditionals(self, x: Tensor) -> Tensor:
        """``p(x_j = u, x_{j+1} = v | x_S)``, (*batch, L-1, V, V)."""
        allowed = self._allowed(x)
        alpha, beta = self._forward(allowed), self._backward(allowed)
        total = self._possible(alpha)
        right = (allowed + beta)[..., 1:, None, :]
        return (alpha[..., :-1, :, None] + self.transition.log() + right - total[..., None, None, None]).exp()

    @checks.arguments(length=checks.Integer(1), n=checks.Integer(0), generator=checks.generator | None)
    def sample(self, length: int, n: int = 1, *, generator: torch.Generator | None = None) -> Tensor:
        """n strings, (n, length), int64."""
        x = [drawn(self.initial.expand(n, -1), generator)]
        for _ in range(1, length):
            x.append(drawn(self.transition[x[-1]], generator))
        return torch.stack(x, 1)

    @checks.arguments(x=checks.tensor, generator=checks.generator | None)
    def fill(self, x: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """What is hidden in each string, drawn jointly from ``p(x | x_S)``; x's shape, int64."""
        allowed = self._allowed(x)
        alpha = self._forward(allowed)
        self._possible(alpha)
        filled = [drawn(alpha[..., -1, :].softmax(-1), generator)]
        for j in range(alpha.shape[-2] - 2, -1, -1):
            filled.append(drawn((alpha[..., j, :] + self.transition.log().mT[filled[-1]]).softmax(-1), generator))
        return torch.stack(filled[::-1], -1)

    @checks.arguments(length=checks.Integer(1))
    def entropy(self, length: int) -> Tensor:
        """``-E[log p(x)]`` of strings of a length, in nats: a number."""
        step = -torch.special.xlogy(self.transition, self.transition).sum(-1)
        law, total = self.initial, -torch.special.xlogy(self.initial, self.initial).sum()
        for _ in range(1, length):
            total = total + law @ step
            law = law @ self.transition
        return total

    @checks.arguments(length=checks.Integer(1))
    def marginals(self, length: int) -> Tensor:
        """The law of each symbol, (length, V)."""
        laws = [self.initial]
        for _ in range(1, length):
            laws.append(laws[-1] @ self.transition)
        return torch.stack(laws)

    @checks.arguments(n=checks.Integer(1), length=checks.Integer(1))
    def ngrams(self, n: int, length: int) -> Tensor:
        """The law of n symbols in a row, at a place drawn evenly from a string of a length: shape (V,) * n."""
        symbols = len(self.initial)
        if n > length:
            raise ValueError(f"n must be at most the length {length}, got {n}")
        _few(symbols, n, "n")
        law = self.marginals(length)[: length - n + 1].mean(0)
        for _ in range(1, n):
            law = law[..., None] * self.transition
        return law

    @checks.arguments(length=checks.Integer(1))
    def law(self, length: int) -> Tensor:
        """The probability of every string, shape (V,) * length; at most ten million."""
        return self.ngrams(length, length)

    def _allowed(self, x: Tensor) -> Tensor:
        """0 where a symbol agrees with what is revealed, else -inf: (*batch, L, V)."""
        symbols = len(self.initial)
        if not isinstance(x, Tensor) or x.is_floating_point() or x.is_complex() or x.dtype == torch.bool:
            raise TypeError(f"x must be a tensor of integers, got {checks.shown(x)}")
        if x.ndim < 1 or x.shape[-1] == 0:
            raise ValueError(f"x must have shape (*batch, L) with L > 0, got {tuple(x.shape)}")
        x = x.to(self.initial.device, torch.long)
        if bool(((x < -1) | (x >= symbols)).any()):
            raise ValueError(f"x must be symbols 0 .. {symbols - 1}, or -1 where one is hidden")
        table = torch.eye(symbols + 1, symbols, dtype=torch.float64, device=x.device)
        table[symbols] = 1.0  # index -1
        return table.log()[x]

    # As products, which are many times faster: what is rarer than 1e-308 given the rest counts as impossible.
    def _forward(self, allowed: Tensor) -> Tensor:
        alpha = [self.initial.log() + allowed[..., 0, :]]
        for j in range(1, allowed.shape[-2]):
            alpha.append(advanced(alpha[-1], self.transition, dense=True) + allowed[..., j, :])
        return torch.stack(alpha, -2)

    def _backward(self, allowed: Tensor) -> Tensor:
        beta = [torch.zeros_like(allowed[..., 0, :])]
        for j in range(allowed.shape[-2] - 1, 0, -1):
            beta.append(advanced(beta[-1] + allowed[..., j, :], self.transition.mT, dense=True))
        return torch.stack(beta[::-1], -2)

    def _possible(self, alpha: Tensor) -> Tensor:
        total = alpha[..., -1, :].logsumexp(-1)
        if bool(total.isinf().any()):
            raise ValueError("x must be possible: what is revealed has probability zero")
        return total


def _few(symbols: int, length: int, name: str) -> None:
    if symbols**length > _MOST_STRINGS:
        raise ValueError(
            f"{name} must be so small that there are at most {_MOST_STRINGS} strings, got {symbols}^{length}"
        )
