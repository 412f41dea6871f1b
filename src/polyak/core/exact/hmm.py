"""Hidden Markov models of finitely many states: forward-backward, the likelihood and its score, and the law of paths.

    x_0 ~ pi,   x_t | x_{t-1} = i ~ a_i,   y_t | x_t = i ~ e_i,   t = 0 .. T-1

Forward ``alpha_t(j) = e_j(y_t) sum_i alpha_{t-1}(i) a_ij`` and backward ``beta_t(i) = sum_j a_ij e_j(y_{t+1}) beta_{t+1}(j)``, in
logarithms (Rabiner 1989). Then ``p(y) = sum_i alpha_{T-1}(i)``, ``P(x_t = i | y) = alpha_t(i) beta_t(i) / p(y)`` and
``P(x_t = i, x_{t+1} = j | y) = alpha_t(i) a_ij e_j(y_{t+1}) beta_{t+1}(j) / p(y)``.

Series are independent: what depends on y begins with its batch. Everything is float64.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from polyak.core import checks
from polyak.core.exact._categorical import advanced, drawn, is_dense, probabilities

_MOST_PATHS = 1_000_000


@checks.arguments(probabilities=checks.tensor, predicted=checks.tensor, log_likelihood=checks.tensor)
class FilteredStates(NamedTuple):
    """The law of x_t given y_0 .. y_t, and (predicted) given y_0 .. y_{t-1}."""

    probabilities: Tensor  # (*batch, T, S)
    predicted: Tensor  # (*batch, T, S)
    log_likelihood: Tensor  # (*batch,)


@checks.arguments(probabilities=checks.tensor, pairs=checks.tensor, log_likelihood=checks.tensor)
class SmoothedStates(NamedTuple):
    """The law of x_t, and of ``(x_t, x_{t+1})``, given all of y."""

    probabilities: Tensor  # (*batch, T, S)
    pairs: Tensor  # (*batch, T-1, S, S)
    log_likelihood: Tensor  # (*batch,)

    @property
    def transition_counts(self) -> Tensor:
        """``E[sum_t 1(x_t = i, x_{t+1} = j) | y]``, (*batch, S, S)."""
        return self.pairs.sum(-3)


@checks.arguments(initial=checks.tensor, transition=checks.tensor, emission=checks.tensor | None)
class HMMScore(NamedTuple):
    """Derivatives of the log-likelihood in every entry on its own, which need not keep rows adding up to 1."""

    initial: Tensor  # (*batch, S)
    transition: Tensor  # (*batch, S, S)
    emission: Tensor | None  # (*batch, S, V)


class FiniteHMM:
    """A hidden Markov model of S states.

    Args:
        initial: (S,), the law of x_0.
        transition: (S, S), row i the law of what follows state i.
        emission: (S, V), row i the law of the symbol that is seen in state i. Without it, observations are given by
            their log-likelihoods.

    Observations y are one of: integers (*batch, T), symbols 0 .. V-1, or -1 where one is missing; floats (*batch, T, S),
    ``log p(y_t | x_t = i)`` whatever the law of y_t, -inf allowed, and 0 where one is missing.

    Example:
        >>> model = FiniteHMM([0.5, 0.5], [[0.9, 0.1], [0.2, 0.8]], [[0.7, 0.3], [0.1, 0.9]])
        >>> states, symbols = model.simulate(50, n=4, generator=torch.Generator().manual_seed(0))
        >>> model.smooth(symbols).transition_counts.shape, model.log_likelihood(symbols).shape
        (torch.Size([4, 2, 2]), torch.Size([4]))
    """

    @checks.arguments(initial=checks.array, transition=checks.array, emission=checks.array | None)
    def __init__(
        self,
        initial: Tensor | Sequence[float],
        transition: Tensor | Sequence[Sequence[float]],
        emission: Tensor | Sequence[Sequence[float]] | None = None,
    ) -> None:
        self.initial = probabilities("initial", initial, (None,))
        states, device = len(self.initial), self.initial.device
        self.transition = probabilities("transition", transition, (states, states), device)
        self.emission = None if emission is None else probabilities("emission", emission, (states, None), device)
        self._dense = is_dense(self.transition)

    def __repr__(self) -> str:
        symbols = "" if self.emission is None else f", symbols={self.emission.shape[1]}"
        return f"FiniteHMM(states={len(self.initial)}{symbols})"

    @checks.arguments(T=checks.Integer(1), n=checks.Integer(0), generator=checks.generator | None)
    def simulate(self, T: int, n: int = 1, *, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor | None]:
        """n independent series: states (n, T), and symbols (n, T) where the model has an emission; int64."""
        with torch.no_grad():
            states = [drawn(self.initial.expand(n, -1), generator)]
            for _ in range(1, T):
                states.append(drawn(self.transition[states[-1]], generator))
            x = torch.stack(states, 1)
            return x, None if self.emission is None else drawn(self.emission[x], generator)

    def filter(self, y: Tensor) -> FilteredStates:
        """The forward pass; ValueError where y has probability zero."""
        with torch.no_grad():
            alpha, ahead = self._forward(self._emitted(y))
            total = self._possible(alpha)
            return FilteredStates(alpha.softmax(-1), ahead.softmax(-1), total)

    def smooth(self, y: Tensor) -> SmoothedStates:
        """Forward and backward; ValueError where y has probability zero."""
        with torch.no_grad():
            emitted = self._emitted(y)
            alpha, _ = self._forward(emitted)
            beta, total = self._backward(emitted), self._possible(alpha)
            ratio = self._pair_ratio(alpha, beta + emitted, total)
            return SmoothedStates((alpha + beta).softmax(-1), (ratio + self.transition.log()).exp(), total)

    def log_likelihood(self, y: Tensor) -> Tensor:
        """``log p(y)``, (*batch,); -inf where y is impossible.

        It can be differentiated once, in the parameters and in log-likelihoods that are given, by the identities of
        :meth:`score`: also where entries are zero.
        """
        with torch.no_grad():
            emitted = self._emitted(y)
            total = self._forward(emitted)[0][..., -1, :].logsumexp(-1)
        asked = [p for p in (self.initial, self.transition, self.emission, y) if p is not None and p.requires_grad]
        if not asked or not torch.is_grad_enabled():
            return total
        score = self.score(y)
        for parameter, slope in zip((self.initial, self.transition, self.emission), score, strict=True):
            if parameter is not None and slope is not None and parameter.requires_grad:
                total = total + ((parameter - parameter.detach()) * slope).flatten(total.ndim).sum(-1)
        if y.requires_grad:
            finite = torch.where(y.isinf(), 0.0, y).to(total)
            total = total + ((finite - finite.detach()) * self.smooth(y.detach()).probabilities).sum((-2, -1))
        return total

    def score(self, y: Tensor) -> HMMScore:
        """The derivative of :meth:`log_likelihood` in every entry, by Fisher's identity: ``E[N_ij | y] / a_ij`` where ``a_ij > 0``.

        emission is None where observations are given by their log-likelihoods.
        """
        with torch.no_grad():
            y = y.detach()
            emitted = self._emitted(y)
            alpha, ahead = self._forward(emitted)
            beta, total = self._backward(emitted), self._possible(alpha)
            initial = (emitted[..., 0, :] + beta[..., 0, :] - total[..., None]).exp()
            transition = self._pair_ratio(alpha, beta + emitted, total).exp().sum(-3)
            emission = None
            if not y.is_floating_point():
                assert self.emission is not None
                scales = (ahead + beta - total[..., None, None]).exp()
                symbols = y.to(alpha.device, torch.long) + 1  # 0 where one is missing
                seen = torch.nn.functional.one_hot(symbols, self.emission.shape[1] + 1)[..., 1:]
                emission = scales.mT @ seen.to(scales)
            return HMMScore(initial, transition, emission)

    def path_law(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """All paths (S^T, T), int64, and their log-probabilities given y, (*batch, S^T): for at most a million paths."""
        with torch.no_grad():
            emitted = self._emitted(y)
            T, states = emitted.shape[-2:]
            if states**T > _MOST_PATHS:
                raise ValueError(f"y must be so short that there are at most {_MOST_PATHS} paths, got {states}^{T}")
            paths = torch.cartesian_prod(*[torch.arange(states, device=emitted.device)] * T).reshape(-1, T)
            log_p = self.initial.log()[paths[:, 0]] + self.transition.log()[paths[:, :-1], paths[:, 1:]].sum(-1)
            for t in range(T):
                log_p = log_p + emitted[..., t, :][..., paths[:, t]]
            total = log_p.logsumexp(-1, keepdim=True)
            if bool(total.isinf().any()):
                raise ValueError(_IMPOSSIBLE)
            return paths, log_p - total

    def _emitted(self, y: Tensor) -> Tensor:
        """``log p(y_t | x_t = i)``, (*batch, T, S)."""
        states, device = len(self.initial), self.initial.device
        if not isinstance(y, Tensor) or y.is_complex() or y.dtype == torch.bool:
            raise TypeError(f"y must be a tensor of integers or of floats, got {checks.shown(y)}")
        if y.is_floating_point():
            if y.ndim < 2 or y.shape[-1] != states or y.shape[-2] == 0:
                raise ValueError(
                    f"y must have shape (*batch, T, {states}) where it is log-likelihoods, got {tuple(y.shape)}"
                )
            if bool((y.isnan() | (y == torch.inf)).any()):
                raise ValueError("y must have log-likelihoods that are finite or -inf, got NaN or inf")
            return y.detach().to(device, torch.float64)
        if self.emission is None:
            raise ValueError("y must be log-likelihoods of a model without emission, got integers")
        if y.ndim < 1 or y.shape[-1] == 0:
            raise ValueError(f"y must have shape (*batch, T) where it is symbols, got {tuple(y.shape)}")
        symbols = self.emission.shape[1]
        y = y.to(device, torch.long)
        if bool(((y < -1) | (y >= symbols)).any()):
            raise ValueError(f"y must be symbols 0 .. {symbols - 1}, or -1 where one is missing")
        table = torch.cat([self.emission.mT, self.emission.new_ones(1, states)]).log()
        return table[y]

    def _forward(self, emitted: Tensor) -> tuple[Tensor, Tensor]:
        """``log alpha`` and what it is before the observation, (*batch, T, S)."""
        ahead = [self.initial.log().expand(emitted[..., 0, :].shape)]
        alpha = [ahead[0] + emitted[..., 0, :]]
        for t in range(1, emitted.shape[-2]):
            ahead.append(advanced(alpha[-1], self.transition, self._dense))
            alpha.append(ahead[-1] + emitted[..., t, :])
        return torch.stack(alpha, -2), torch.stack(ahead, -2)

    def _backward(self, emitted: Tensor) -> Tensor:
        """``log beta``, (*batch, T, S)."""
        beta = [torch.zeros_like(emitted[..., 0, :])]
        for t in range(emitted.shape[-2] - 1, 0, -1):
            beta.append(advanced(beta[-1] + emitted[..., t, :], self.transition.mT, self._dense))
        return torch.stack(beta[::-1], -2)

    def _pair_ratio(self, alpha: Tensor, right: Tensor, total: Tensor) -> Tensor:
        """``log(alpha_t(i) e_j(y_{t+1}) beta_{t+1}(j) / p(y))``, (*batch, T-1, S, S): a pair's probability but for a_ij."""
        return alpha[..., :-1, :, None] + right[..., 1:, None, :] - total[..., None, None, None]

    def _possible(self, alpha: Tensor) -> Tensor:
        """``log p(y)`` where it is finite."""
        total = alpha[..., -1, :].logsumexp(-1)
        if bool(total.isinf().any()):
            raise ValueError(_IMPOSSIBLE)
        return total


_IMPOSSIBLE = "y must be possible: a series has probability zero under the model"
