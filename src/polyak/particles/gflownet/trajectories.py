"""Trajectories: how they are held, cut and put together, and how they are drawn from a policy."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from polyak.core import checks
from polyak.particles.gflownet.envs import ENV, Env

POLICY = checks.Function("a function of states [n, ...] that returns forward logits [n, A]", 1)


@checks.arguments(
    states=checks.Tensor(least_ndim=2), actions=checks.Tensor(ndim=2), done=checks.Tensor(ndim=1),
    lengths=checks.Tensor(ndim=1), from_source=checks.flag, complete=checks.optional_flag,
)  # fmt: skip
@dataclass(frozen=True)
class Trajectories:
    """B trajectories of at most T steps, padded to T.

    Attributes:
        states: [B, T + 1, ...]; after a trajectory's last state it is repeated.
        actions: [B, T] integers; 0 where there is no step.
        done: [B], whether the last state is terminal; where it is not the trajectory is incomplete.
        lengths: [B] integers, how many steps there are.
        from_source: whether they start at the source; transitions taken out of trajectories do not.
        complete: True where it is known that all start at the source and end in terminal states; None where it is not known.

    Raises:
        ValueError: shapes that do not fit, or lengths that are not in [0, T] (which is looked at on the CPU only).
    """

    states: Tensor
    actions: Tensor
    done: Tensor
    lengths: Tensor
    from_source: bool = True
    complete: bool | None = None

    def __post_init__(self) -> None:
        b, t = self.actions.shape
        if self.states.shape[:2] != (b, t + 1):
            raise ValueError(
                f"states must have shape ({b}, {t + 1}, ...) for actions of shape {(b, t)}, got {tuple(self.states.shape)}"
            )
        for name, dtypes in (("actions", (torch.int64,)), ("done", (torch.bool,)), ("lengths", (torch.int64,))):
            value = getattr(self, name)
            if value.dtype not in dtypes or len(value) != b:
                raise ValueError(f"{name} must be {dtypes[0]} with {b} rows, got {value.dtype} {tuple(value.shape)}")
        if self.lengths.device.type == "cpu" and not bool(((self.lengths >= 0) & (self.lengths <= t)).all()):
            raise ValueError(f"lengths must be in [0, {t}], got {self.lengths.tolist()}")

    def __len__(self) -> int:
        return len(self.actions)

    @property
    def valid(self) -> Tensor:
        """[B, T], True where there is a step."""
        return torch.arange(self.actions.shape[1], device=self.lengths.device) < self.lengths[:, None]

    @property
    def terminal(self) -> Tensor:
        """[B, T + 1], True at the terminal states, and where they are repeated."""
        at = torch.arange(self.states.shape[1], device=self.lengths.device)
        return (at >= self.lengths[:, None]) & self.done[:, None]

    @property
    def last(self) -> Tensor:
        """[B, ...], the last states: of complete trajectories, what was built."""
        return self.states[torch.arange(len(self), device=self.lengths.device), self.lengths]

    def all_complete(self) -> bool:
        """Whether all start at the source and end in a terminal state. It waits for the device where it is not known."""
        return self.from_source and (bool(self.done.all()) if self.complete is None else self.complete)

    def __getitem__(self, rows: Tensor | slice | Sequence[int]) -> Trajectories:
        """Some of them: a slice, indices or truths."""
        known = True if self.complete else None
        states, actions, done, lengths = (v[rows] for v in (self.states, self.actions, self.done, self.lengths))
        return Trajectories(states, actions, done, lengths, self.from_source, known)

    @checks.arguments(length=checks.Integer(1))
    def truncated(self, length: int) -> Trajectories:
        """The first ``length`` steps of each: incomplete trajectories, where there were more."""
        cut = self.lengths.clamp(max=length)
        return Trajectories(
            self.states[:, : length + 1],
            self.actions[:, :length],
            self.done & (self.lengths <= length),
            cut,
            self.from_source,
        )

    def transitions(self) -> Trajectories:
        """Each step as a trajectory of its own. It waits for the device, to know how many there are."""
        row, t = self.valid.nonzero(as_tuple=True)
        ends = self.done[row] & (t + 1 == self.lengths[row])
        pair = torch.stack([self.states[row, t], self.states[row, t + 1]], 1)
        return Trajectories(pair, self.actions[row, t][:, None], ends, torch.ones_like(t), from_source=False)


@checks.arguments(several=checks.Each(checks.Instance(Trajectories, words="Trajectories"), least=1))
def concatenate(several: Sequence[Trajectories]) -> Trajectories:
    """One batch of several, padded to the longest."""
    most = max(one.actions.shape[1] for one in several)
    states, actions = [], []
    for one in several:
        more = most - one.actions.shape[1]
        repeated = one.states[:, -1:].expand(-1, more, *one.states.shape[2:])
        states.append(torch.cat([one.states, repeated], 1) if more else one.states)
        actions.append(torch.nn.functional.pad(one.actions, (0, more)))
    done, lengths = (torch.cat([getattr(one, name) for one in several]) for name in ("done", "lengths"))
    source = all(one.from_source for one in several)
    complete = True if all(one.complete for one in several) else None
    return Trajectories(torch.cat(states), torch.cat(actions), done, lengths, source, complete)


@checks.arguments(
    env=ENV, policy=POLICY, n=checks.Integer(1), eps=checks.fraction, temperature=checks.positive,
    generator=checks.generator | None, length=checks.Integer(1) | None, debug=checks.flag,
)  # fmt: skip
@torch.no_grad()
def sample(
    env: Env,
    policy: Callable[[Tensor], Tensor],
    n: int,
    eps: float = 0.0,
    temperature: float = 1.0,
    generator: torch.Generator | None = None,
    *,
    length: int | None = None,
    debug: bool = False,
) -> Trajectories:
    """Build n objects at once, by one call of the policy for each step.

    The behaviour is ``(1 - eps) softmax(logits / temperature) + eps uniform`` over the actions that are allowed. With eps = 1 the
    policy is not asked.

    Args:
        policy: states [n, ...] to logits [n, A], or to more columns of which the first A are the logits.
        generator: on the environment's device.
        length: stop after so many steps, with trajectories that are incomplete where they were not finished.
        debug: look at everything, also on an accelerator: masks that contradict steps, states that come back.

    Raises:
        ValueError: a state that is not terminal has no action, logits are NaN, or steps end after ``max_length`` (looked at on the
            CPU, and with ``debug``); with ``debug``, an environment that goes in a circle or whose masks are wrong.
    """
    s = env.reset(n)
    look = debug or s.device.type == "cpu"
    limit = getattr(env, "max_length", None)
    horizon = limit if length is None else length if limit is None else min(length, limit)
    states, actions, chances = [s], [], []
    done = torch.zeros(n, dtype=torch.bool, device=s.device)
    lengths = torch.zeros(n, dtype=torch.int64, device=s.device)
    while len(actions) != horizon:
        if horizon is None and bool(done.all()):
            break
        mask = env.forward_mask(s)
        logits = None if eps == 1 else policy(s)[:, : env.n_actions]
        a, p = _draw(logits, mask, eps, temperature, generator)
        a = a.masked_fill(done, 0)
        if debug:
            _look(s[:, None], p[:, None], ~done[:, None])
        new, ended = env.step(s, a)
        new = torch.where(done.reshape(-1, *[1] * (s.ndim - 1)), s, new)
        if debug:
            _check_step(env, states, a, new, done)
        lengths += ~done
        done = done | ended
        s = new
        states.append(s)
        actions.append(a)
        chances.append(p)
    if look:
        _look(torch.stack(states, 1), torch.stack(chances, 1), torch.arange(len(chances)) < lengths.cpu()[:, None])
    if look and horizon == limit and limit is not None and not bool(done.all()):
        raise ValueError(f"env.max_length must be enough to finish: after {limit} steps there is {_shown(s[~done][0])}")
    complete = True if length is None or horizon == limit else None
    return Trajectories(torch.stack(states, 1), torch.stack(actions, 1), done, lengths, True, complete)


def _draw(logits: Tensor | None, mask: Tensor, eps: float, temperature: float, generator: Any) -> tuple[Tensor, Tensor]:
    """An action for each row and its chance, by the inverse of the cumulative sum: no wait, and what is masked is never drawn."""
    if logits is None:
        p = mask.to(torch.float32)
    else:
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        wide = wide if temperature == 1 else wide / temperature
        p = wide.masked_fill(~mask, -torch.inf).softmax(1)
        if eps:
            p = (1 - eps) * p + eps * mask / mask.sum(1, keepdim=True)
    summed = p.cumsum(1).masked_fill_(~(p > 0), -1)
    u = torch.rand(len(p), 1, dtype=p.dtype, device=p.device, generator=generator) * summed.amax(1, keepdim=True)
    a = (summed > u).to(torch.uint8).argmax(1)  # the first
    return a, p.gather(1, a[:, None])[:, 0]


def _look(states: Tensor, chances: Tensor, valid: Tensor) -> None:
    """Every action that was taken had a chance: none where nothing was allowed, or where the policy returned NaN."""
    bad = ~(chances > 0) & valid.to(chances.device)
    if bool(bad.any()):
        state = states[:, : bad.shape[1]][bad][0]
        raise ValueError(
            f"env.forward_mask must allow an action where an object is not finished, and policy return no NaN, in {_shown(state)}"
        )


def _check_step(env: Env, states: list[Tensor], a: Tensor, new: Tensor, done: Tensor) -> None:
    for old in states:
        again = (old == new).flatten(1).all(1) & ~done
        if bool(again.any()):
            raise ValueError(f"env.step must not lead back to a state that was visited, got {_shown(new[again][0])}")
    for name, s in (("forward_mask", states[-1]), ("backward_mask", new)):
        wrong = ~getattr(env, name)(s).gather(1, a[:, None])[:, 0] & ~done
        if bool(wrong.any()):
            raise ValueError(f"env.{name} must allow the action {a[wrong][0].item()} in {_shown(s[wrong][0])}")


def _shown(state: Tensor) -> str:
    return f"the state {state.tolist()}"
