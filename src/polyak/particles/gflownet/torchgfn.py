"""Trajectories and transitions of torchgfn (GFNOrg/torchgfn) as ours. torchgfn itself is not imported.

There a terminating trajectory ends with an exit action into a sink state, which stands for no object. Here the last state is the
object that was left, and the step into it is the exit action.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from polyak.core import checks
from polyak.particles.gflownet.trajectories import Trajectories


@checks.arguments(container=checks.Like("torchgfn's Trajectories or Transitions", "states", "actions"))
def from_torchgfn(container: Any) -> tuple[Trajectories, Tensor | None]:
    """torchgfn's ``Trajectories`` or ``Transitions`` as ours, and their log-rewards, [B].

    What is read: ``states.tensor``, ``actions.tensor`` and ``log_rewards``; of trajectories ``terminating_idx``; of transitions
    ``next_states.tensor`` and ``is_terminating`` (``is_done`` before version 2). The losses then take log-probabilities and
    log-flows that torchgfn's estimators return. Log-rewards of transitions that do not end are 0; they are not looked at.

    Raises:
        ValueError: backward trajectories, or states that are no tensors (graphs).
    """
    if getattr(container, "is_backward", False):
        raise ValueError("container must hold forward trajectories, got backward ones")
    states, actions = (getattr(getattr(container, name), "tensor", None) for name in ("states", "actions"))
    if not isinstance(states, Tensor) or not isinstance(actions, Tensor):
        raise ValueError("container must hold tensors as states and actions, got others; graphs are not supported")
    log_rewards = getattr(container, "log_rewards", None)
    if hasattr(container, "next_states"):
        ends = container.is_terminating if hasattr(container, "is_terminating") else container.is_done
        after = container.next_states.tensor
        shaped = ends.reshape(-1, *[1] * (states.ndim - 1))
        pair = torch.stack([states, torch.where(shaped, states, after)], 1)
        traj = Trajectories(pair, actions.reshape(-1, 1).long(), ends, torch.ones_like(ends, dtype=torch.int64), False)
        return traj, None if log_rewards is None else torch.where(ends, log_rewards, 0)
    lengths = container.terminating_idx.long()
    most, b = actions.shape[:2]
    t = torch.arange(most + 1, device=lengths.device)
    kept = torch.minimum(t, (lengths[:, None] - 1).clamp(min=0))  # the sink, and padding, as the object that was left
    rows = torch.arange(b, device=lengths.device)[:, None]
    taken = actions.reshape(most, b).T.long()
    taken = torch.where(t[:-1] < lengths[:, None], taken, 0)
    done = torch.ones_like(lengths, dtype=torch.bool)
    return Trajectories(states.transpose(0, 1)[rows, kept], taken, done, lengths, True, True), log_rewards
