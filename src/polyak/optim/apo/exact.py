"""APO without a network: policies as tables, every round solved exactly.

Round t's maximizer of ``E_pi[r] - beta KL(pi || pi_t)`` is ``pi^_{t+1} ~ pi_t exp(r / beta)``. Then
``pi_{t+1} ~ pi^_{t+1} (pi^_{t+1} / pi^_t)^alpha``. For a reward that does not change with t this is, with the exponent
:func:`exponent`, ``pi^_{T+1} ~ pi_ref exp(s_T r / beta)``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from polyak.core import checks


@checks.arguments(trained=checks.tensor, extrapolated=checks.tensor)
class Rounds(NamedTuple):
    """Log-policies of all rounds, (T + 1, ..., K): index t is after t rounds, 0 the reference.

    Attributes:
        trained: ``log pi^``, what a run of T rounds gives is its last.
        extrapolated: ``log pi``, what is sampled from and stayed close to in the following round.
    """

    trained: Tensor
    extrapolated: Tensor


ALPHA = checks.retention  # a factor of extrapolation: with 1 and more, the steps of the recursion grow without bound


@checks.arguments(
    reward=checks.floating | checks.Function("a function of the probabilities", 1),
    ref=checks.floating, beta=checks.positive, alpha=ALPHA, T=checks.Integer(1),
    log=checks.flag,
)  # fmt: skip
def tabular(
    reward: Tensor | Callable[[Tensor], Tensor], ref: Tensor, beta: float, alpha: float, T: int, *, log: bool = False
) -> Rounds:
    """T exact rounds of APO on K responses to each of any number of prompts, in float64.

    Args:
        reward: (..., K); or a function of the round's probabilities ``pi_t`` (..., K) that gives it, such as
            ``lambda pi: pi @ preferences.mT`` for ``P(y beats pi_t)`` in a game.
        ref: the reference policy's probabilities (..., K), positive, with sum 1; its log where ``log=True``.
        beta: > 0.
        alpha: in [0, 1); 0 is iterative DPO.
        T: rounds, at least 1.

    Raises:
        ValueError: a number out of range, shapes that do not fit, probabilities that are none.
    """
    if not ref.ndim:
        raise ValueError("ref must have shape (..., K), got ()")
    start = ref.to(torch.float64)
    if not log:
        if not bool((start > 0).all()):
            raise ValueError("ref must hold positive probabilities: no reward brings back what has probability 0")
        start = start.log()
    total = start.logsumexp(-1)
    if not torch.allclose(total, torch.zeros_like(total), atol=1e-6):
        raise ValueError(f"ref must sum to 1 over the last axis, got a sum of {total.exp().flatten()[0].item():g}")
    if isinstance(reward, Tensor) and reward.shape[-1:] != start.shape[-1:]:
        raise ValueError(f"reward must have shape (..., {start.shape[-1]}), got {tuple(reward.shape)}")
    trained, extrapolated = [start.log_softmax(-1)], [start.log_softmax(-1)]
    for _ in range(T):
        r = reward if isinstance(reward, Tensor) else reward(extrapolated[-1].exp())
        new = (extrapolated[-1] + r.to(torch.float64) / beta).log_softmax(-1)
        extrapolated.append((new + alpha * (new - trained[-1])).log_softmax(-1))
        trained.append(new)
    shape = trained[-1].shape
    return Rounds(*(torch.stack([p.expand(shape) for p in path]) for path in (trained, extrapolated)))


@checks.arguments(alpha=ALPHA, T=checks.Integer(0))
def exponent(alpha: float, T: int) -> float:
    """``s_T = sum over k = 1..T of (1 - alpha^k) / (1 - alpha)``: how many rounds of iterative DPO T rounds of APO amount to."""
    return sum((1 - alpha**k) / (1 - alpha) for k in range(1, T + 1))
