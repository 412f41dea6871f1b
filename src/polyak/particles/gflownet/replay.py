"""A replay of trajectories that are drawn again in proportion to a power of their reward."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from polyak.core import checks
from polyak.core.particles import resample
from polyak.particles.gflownet.trajectories import Trajectories


class PrioritizedReplay:
    """The last ``capacity`` trajectories, drawn with probability proportional to ``R(x)^alpha``.

    Losses of GFlowNets have their minimum at the same policy wherever trajectories come from, so that what is drawn needs no
    weights. Trajectories live where they came from, in one block of memory.

    Args:
        capacity: how many are kept; the oldest go first.
        alpha: 0 for equal chances.
        scheme: of the resampling (:func:`polyak.core.particles.resample`).
    """

    @checks.arguments(
        capacity=checks.Integer(1, 10**9), alpha=checks.non_negative,
        scheme=checks.Choice("multinomial", "stratified", "systematic", "residual", "ssp"),
    )  # fmt: skip
    def __init__(self, capacity: int, alpha: float = 1.0, scheme: str = "stratified") -> None:
        self.capacity, self.alpha, self.scheme = capacity, alpha, scheme
        self._next = self._size = 0
        self._held: dict[str, Tensor] = {}
        self._complete = True  # of all that were added it is known

    def __len__(self) -> int:
        return self._size

    @checks.arguments(
        traj=checks.Instance(Trajectories, words="Trajectories"), log_priority=checks.Tensor(floating=True, ndim=1)
    )
    def add(self, traj: Trajectories, log_priority: Tensor) -> None:
        """Keep trajectories, with log R or any other log-priority, [B].

        Raises:
            ValueError: they do not start at the source, have another padding than those before, or another number of priorities.
        """
        if len(log_priority) != len(traj):
            raise ValueError(f"log_priority must have {len(traj)} numbers, one a trajectory, got {len(log_priority)}")
        if not traj.from_source:
            raise ValueError("traj must start at the source, got transitions")
        new = {
            "states": traj.states, "actions": traj.actions, "done": traj.done, "lengths": traj.lengths,
            "log_priority": log_priority.detach().double(),
        }  # fmt: skip
        if not self._held:
            self._held = {name: value.new_zeros(self.capacity, *value.shape[1:]) for name, value in new.items()}
        if self._held["states"].shape[1:] != traj.states.shape[1:]:
            raise ValueError(
                f"traj must have states of shape (B, {', '.join(map(str, self._held['states'].shape[1:]))}), "
                f"got {tuple(traj.states.shape)}"
            )
        self._complete = self._complete and traj.complete is True
        kept = min(len(traj), self.capacity)
        at = (self._next + torch.arange(kept, device=traj.actions.device)) % self.capacity
        for name, value in new.items():
            self._held[name][at] = value[-kept:]
        self._next = (self._next + kept) % self.capacity
        self._size = min(self._size + kept, self.capacity)

    @checks.arguments(n=checks.Integer(1), generator=checks.generator | None)
    def sample(self, n: int, generator: torch.Generator | None = None) -> Trajectories:
        """n trajectories, with replacement.

        Raises:
            ValueError: there are none, or all have priority 0.
        """
        if not self._size:
            raise ValueError(f"n must be 0 while the replay is empty, got {n}")
        logw = self.alpha * self._held["log_priority"][: self._size]
        rows = resample(logw, n, scheme=self.scheme, generator=generator)
        states, actions, done, lengths = (self._held[name][rows] for name in ("states", "actions", "done", "lengths"))
        return Trajectories(states, actions, done, lengths, complete=self._complete or None)

    def state_dict(self) -> dict[str, Any]:
        """What is kept, and where the next goes."""
        held = {name: value[: self._size].clone() for name, value in self._held.items()}
        return {"held": held, "next": self._next, "size": self._size, "complete": self._complete}

    @checks.arguments(state=checks.state_dict)
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a :meth:`state_dict` of a replay of the same capacity.

        Raises:
            ValueError: it has more than the capacity.
        """
        if state["size"] > self.capacity:
            raise ValueError(f"state must have at most {self.capacity} trajectories, got {state['size']}")
        self._next, self._size, self._complete = state["next"], state["size"], state.get("complete", False)
        self._held = {}
        for name, value in state["held"].items():
            self._held[name] = value.new_zeros(self.capacity, *value.shape[1:])
            self._held[name][: self._size] = value
