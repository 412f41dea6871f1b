"""Environments with gymnasium's interface, one by one or vectorised. gymnasium itself is not imported: what has its methods is one.

Gymnasium's environments keep where they are to themselves, and tell of masks and rewards once. Here what was told is remembered for
each state, so that a state can be asked about, and gone on from, later.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from polyak.core import checks

_MASK = checks.Function("a function of states [n, ...] that returns truths [n, A]", 1) | None


@dataclass
class _Node:
    """What is known of a state."""

    state: np.ndarray
    energy: float
    mask: np.ndarray
    done: bool
    path: tuple[int, ...]  # of actions from the source
    children: dict[int, bytes] = field(default_factory=dict)


class GymEnv:
    """An environment with gymnasium's interface as an :class:`~polyak.particles.gflownet.Env`.

    The episode's return is the log-reward: ``R(x) = exp(sum of rewards)``, so that the rewards so far are minus the energy of
    a partial object, and each reward is what a step is worth to the forward-looking losses. The environment must be deterministic,
    with discrete actions and numbers as observations. An observation must say all about the state, and never come back in an
    episode.

    Of ``reset`` and ``step`` are read: the observation, the reward, ``terminated``, and ``info["action_mask"]`` where it is given
    (else ``action_masks()``, else all actions are allowed).

    Args:
        make: a function that makes an environment, as ``lambda: gymnasium.make("...")`` or ``lambda: gymnasium.make_vec(...)``. Of
            one that is not vectorised as many are made as objects are built at once. A vectorised one builds ``num_envs`` at once.
        forward_mask: in place of ``action_mask``, of states.
        backward_mask: which actions may have led to a state. Left out, each state is taken to have one parent.
        max_length: steps after which every episode has ended, where that is known.

    Raises:
        ValueError: actions that are not discrete. On the way: an episode that was truncated, a second parent without
            ``backward_mask``, rewards that do not add up to a function of the state, an observation that is no array of numbers.
    """

    @checks.arguments(
        make=checks.Function("a function that makes an environment", 0, classes=True), forward_mask=_MASK, backward_mask=_MASK,
        max_length=checks.Integer(1) | None, device=checks.device | None,
    )  # fmt: skip
    def __init__(
        self,
        make: Callable[[], Any],
        *,
        forward_mask: Callable[[Tensor], Tensor] | None = None,
        backward_mask: Callable[[Tensor], Tensor] | None = None,
        max_length: int | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        self._make, self._forward, self._backward, self.device = make, forward_mask, backward_mask, device
        first = make()
        missing = [name for name in ("reset", "step", "action_space") if not hasattr(first, name)]
        if missing:
            raise ValueError(f"make must return an environment with {', '.join(missing)}, got {checks.shown(first)}")
        self.vectorised = hasattr(first, "num_envs")
        space = getattr(first, "single_action_space", first.action_space)
        if not hasattr(space, "n"):
            raise ValueError(f"make must return an environment with discrete actions, got {checks.shown(space)}")
        self.n_actions = int(space.n)
        self._start = int(getattr(space, "start", 0))
        if max_length is not None:
            self.max_length = max_length
        self._pool: list[Any] = [first]
        self._known: dict[bytes, _Node] = {}
        observation, info = first.reset()
        if self.vectorised:
            observation, info = np.asarray(observation)[0], _row(info, 0)
        self._source = self._remember(observation, 0.0, self._mask_of(first, info), False, ())
        self._at: list[bytes | None] = [None]

    def reset(self, n: int) -> Tensor:
        return self._stacked([self._source] * n)

    def step(self, s: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
        keys, actions = self._keys(s), [int(i) for i in a.tolist()]
        ends = (
            self._step_all(keys, actions)
            if self.vectorised
            else list(map(self._step_one, range(len(keys)), keys, actions))
        )
        done = torch.tensor([self._known[key].done for key in ends], device=s.device)
        return self._stacked(ends), done

    def forward_mask(self, s: Tensor) -> Tensor:
        nodes = self._nodes(s)
        if self._forward is not None:
            return self._forward(s) & ~torch.tensor([node.done for node in nodes], device=s.device)[:, None]
        return torch.from_numpy(np.stack([node.mask for node in nodes])).to(s.device)

    def backward_mask(self, s: Tensor) -> Tensor:
        if self._backward is not None:
            return self._backward(s)
        led = [node.path[-1] if node.path else -1 for node in self._nodes(s)]
        return torch.tensor(led, device=s.device)[:, None] == torch.arange(self.n_actions, device=s.device)

    def energy(self, s: Tensor) -> Tensor:
        return torch.tensor([node.energy for node in self._nodes(s)], device=s.device)

    def log_reward(self, x: Tensor) -> Tensor:
        return -self.energy(x)

    def _step_one(self, i: int, key: bytes, action: int) -> bytes:
        """Where an action leads: as remembered, or by an environment that is brought to the state."""
        node = self._known[key]
        if node.done:
            return key
        if action in node.children:
            return node.children[action]
        while i >= len(self._pool):
            self._pool.append(self._make())
            self._at.append(None)
        env = self._pool[i]
        if self._at[i] != key:
            env.reset()
            for earlier in node.path:
                env.step(earlier + self._start)
        observation, reward, terminated, truncated, info = env.step(action + self._start)
        self._at[i] = self._reached(node, action, observation, reward, terminated, truncated, self._mask_of(env, info))
        return node.children[action]

    def _step_all(self, keys: list[bytes], actions: list[int]) -> list[bytes]:
        env = self._pool[0]
        if len(keys) != env.num_envs:
            raise ValueError(f"n must be {env.num_envs}, the number of the vectorised environments, got {len(keys)}")
        if all(key == self._source for key in keys):
            env.reset()
            self._at = [self._source] * len(keys)
        going = [not self._known[key].done for key in keys]
        if any(on and at != key for on, at, key in zip(going, self._at, keys, strict=True)):
            raise ValueError("s must be where the vectorised environments are: they cannot be brought to other states")
        observations, rewards, terminated, truncated, infos = env.step(np.asarray(actions) + self._start)
        for i, (key, action) in enumerate(zip(keys, actions, strict=True)):
            if going[i]:
                info = _row(infos, i)
                seen = info.get("final_obs", observations[i]) if terminated[i] else observations[i]
                told = (seen, rewards[i], terminated[i], truncated[i], self._mask_of(None, info))
                self._at[i] = self._reached(self._known[key], action, *told)
        return [self._known[key].children[a] if on else key for on, key, a in zip(going, keys, actions, strict=True)]

    def _reached(
        self, node: _Node, action: int, observation: Any, reward: Any, terminated: Any, truncated: Any, mask: Any
    ) -> bytes:
        path = (*node.path, action)
        if truncated and not terminated:
            raise ValueError(f"make must return an environment without a limit of time; it was truncated after {path}")
        key = self._remember(observation, node.energy - float(reward), mask, bool(terminated), path)
        node.children[action] = key
        return key

    def _remember(self, observation: Any, energy: float, mask: Any, done: bool, path: tuple[int, ...]) -> bytes:
        state = np.atleast_1d(np.asarray(observation))
        if state.dtype.kind not in "biuf":
            raise ValueError(
                f"make must return an environment whose observations are numbers, got {checks.shown(observation)}"
            )
        key = np.ascontiguousarray(state).tobytes()
        allowed = np.ones(self.n_actions, bool) if mask is None else np.array(mask, bool)
        allowed = allowed & (not done)
        node = self._known.setdefault(key, _Node(state.copy(), energy, allowed, done, path))
        if self._backward is None and node.path != path:
            raise ValueError(f"backward_mask must be given: actions {node.path} and {path} lead to one state")
        if abs(node.energy - energy) > 1e-4 * (1 + abs(energy)):
            raise ValueError(
                f"rewards must add up to a function of the state, got {-node.energy:g} after {node.path}, {-energy:g} after {path}"
            )
        return key

    def _mask_of(self, env: Any, info: Any) -> Any:
        if "action_mask" in info:
            return info["action_mask"]
        return env.action_masks() if hasattr(env, "action_masks") else None

    def _keys(self, s: Tensor) -> list[bytes]:
        kind = self._known[self._source].state.dtype
        return [np.ascontiguousarray(row).tobytes() for row in s.cpu().numpy().astype(kind, copy=False)]

    def _nodes(self, s: Tensor) -> list[_Node]:
        found = [self._known.get(key) for key in self._keys(s)]
        if (i := next((i for i, node in enumerate(found) if node is None), None)) is not None:
            raise ValueError(f"s must be states that were visited, got {s[i].tolist()}")
        return found  # type: ignore[return-value]

    def _stacked(self, keys: list[bytes]) -> Tensor:
        return torch.from_numpy(np.stack([self._known[key].state for key in keys])).to(self.device)


def _row(infos: Any, i: int) -> dict[str, Any]:
    """What vectorised environments tell of their i-th; where marks say who has an entry, those that are marked."""
    told = {}
    for name, values in infos.items():
        marks = infos.get(f"_{name}")
        if not name.startswith("_") and (marks is None or marks[i]):
            told[name] = values[i]
    return told
