"""The law of what a policy builds, exactly, where all states can be gone through."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from polyak.core import checks
from polyak.particles.gflownet.envs import ENV, Env
from polyak.particles.gflownet.trajectories import POLICY


@checks.arguments(states=checks.Tensor(least_ndim=1), probs=checks.Tensor(ndim=1))
class TerminalLaw(NamedTuple):
    """Terminal states, each once, and their probabilities.

    Attributes:
        states: [M, ...].
        probs: [M], float64.
    """

    states: Tensor
    probs: Tensor


@checks.arguments(env=ENV, policy=POLICY, limit=checks.Integer(1))
@torch.no_grad()
def exact_terminal_law(env: Env, policy: Callable[[Tensor], Tensor], *, limit: int = 1_000_000) -> TerminalLaw:
    """P(x) of every terminal state, by going through all states step by step from the source.

    Args:
        policy: as :func:`sample` takes it.
        limit: of the number of steps between states that are gone through.

    Raises:
        ValueError: there are more than ``limit``, or the policy returns NaN.
    """
    s = env.reset(1)
    p = torch.ones(1, dtype=torch.float64, device=s.device)
    ends: list[tuple[Tensor, Tensor]] = []
    seen = 0
    while len(s):
        mask = env.forward_mask(s)
        logits = policy(s)[:, : env.n_actions].double().masked_fill(~mask, -torch.inf)
        if bool(logits.isnan().any()):
            raise ValueError(f"policy must return no NaN, got some in the state {s[logits.isnan().any(1)][0].tolist()}")
        row, a = mask.nonzero(as_tuple=True)
        seen += len(row)
        if seen > limit:
            raise ValueError(f"limit must be at least the number of steps between states, got {limit}")
        new, done = env.step(s[row], a)
        reached = p[row] * logits.softmax(1)[row, a]
        ends.append((new[done], reached[done]))
        s, p = _merged(new[~done], reached[~done])
    return TerminalLaw(*_merged(torch.cat([x for x, _ in ends]), torch.cat([q for _, q in ends])))


def _merged(s: Tensor, p: Tensor) -> tuple[Tensor, Tensor]:
    """Equal states once, with the sum of their probabilities."""
    if not len(s):
        return s, p
    flat = s.flatten(1)
    once, where = torch.unique(flat.to(torch.uint8) if flat.dtype == torch.bool else flat, dim=0, return_inverse=True)
    return once.to(s.dtype).unflatten(1, s.shape[1:]), p.new_zeros(len(once)).index_add_(0, where, p)
