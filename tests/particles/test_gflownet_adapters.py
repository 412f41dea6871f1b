"""Environments with gymnasium's interface, and torchgfn's containers: by stand-ins with their documented attributes."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from polyak.particles.gflownet import (
    BitSequence,
    FlowNet,
    GFlowNet,
    GymEnv,
    Trajectories,
    exact_terminal_law,
    from_torchgfn,
    sample,
)

BITS = [[1, 0, 1], [0, 0, 1]]


class Bits:
    """gymnasium's interface to bits that are written one by one; the reward is minus what the distance from the modes grows by."""

    def __init__(self, fault: str = "", length: int = 3) -> None:
        self.action_space = SimpleNamespace(n=2)
        self.observation_space = SimpleNamespace(shape=(length,))
        self.fault, self.length, self.steps = fault, length, 0

    def distance(self):
        wrong = [sum(a != b for a, b in zip(self.bits, m, strict=False)) for m in BITS]
        return float(min(wrong))

    def observed(self):
        bits = self.bits if self.fault != "forgets" else sorted(self.bits)
        return np.array([*bits, *[-1] * (self.length - len(bits))], np.int64)

    def info(self):
        return {"action_mask": np.array([1, self.fault != "masked"], np.int8)}

    def reset(self, *, seed=None, options=None):
        self.bits = []
        return self.observed(), self.info()

    def step(self, action):
        self.steps += 1
        before = self.distance()
        self.bits.append(int(action))
        over = len(self.bits) == self.length
        reward = before - self.distance() + (0.3 * (self.steps % 7) if self.fault == "random" else 0.0)
        return (
            self.observed(),
            reward,
            over and self.fault != "truncated",
            self.fault == "truncated" and over,
            self.info(),
        )


class Many:
    """gymnasium's vectorised interface: the next step after an end resets, and what it was told is not looked at."""

    def __init__(self, n: int = 4, lengths=(3, 3, 3, 3), final: bool = False) -> None:
        self.num_envs, self.final = n, final
        self.single_action_space, self.action_space = SimpleNamespace(n=2), SimpleNamespace(nvec=[2] * n)
        self.envs = [Bits() for _ in range(n)]

    def infos(self):
        return {
            "action_mask": np.stack([e.info()["action_mask"] for e in self.envs]),
            "_action_mask": np.ones(self.num_envs, bool),
        }

    def reset(self, *, seed=None, options=None):
        self.over = [False] * self.num_envs
        return np.stack([e.reset()[0] for e in self.envs]), self.infos()

    def step(self, actions):
        assert isinstance(actions, np.ndarray)
        told = [
            (*e.reset(), 0.0, False) if over else e.step(a)
            for e, a, over in zip(self.envs, actions, self.over, strict=True)
        ]
        told = [(t[0], 0.0, False, False) if over else t[:4] for t, over in zip(told, self.over, strict=True)]
        observations, rewards, terminated, truncated = (np.array(column) for column in zip(*told, strict=True))
        self.over = list(terminated)
        return observations, rewards, terminated, truncated, self.infos()


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_an_environment_of_gymnasium_s_is_the_one_that_it_wraps():
    made, wrapped = BitSequence(BITS), GymEnv(Bits, max_length=3)

    def policy(s):
        return torch.stack([s.sum(1).float(), 0.3 * s[:, 0].float()], 1)

    a, b = exact_terminal_law(made, policy), exact_terminal_law(wrapped, policy)
    assert torch.equal(a.states.long(), b.states)
    torch.testing.assert_close(a.probs, b.probs)
    torch.testing.assert_close(made.log_reward(a.states), wrapped.log_reward(b.states))
    traj = sample(wrapped, policy, 5, generator=generator(), debug=True)
    for name in ("energy", "forward_mask", "backward_mask"):
        flat = traj.states.flatten(0, 1)
        torch.testing.assert_close(getattr(wrapped, name)(flat), getattr(made, name)(flat.to(torch.int8)))
    losses = [
        GFlowNet(env, FlowNet(env, 8, 0), batch=4, eps=1.0, generator=generator()).fit(3)
        for env in (GymEnv(Bits), wrapped)
    ]
    assert all(loss.isfinite().all() for loss in losses)
    steps = wrapped._pool[0].steps
    sample(wrapped, policy, 5, generator=generator())
    assert wrapped._pool[0].steps == steps  # it is remembered where each step leads


def test_vectorised_environments_build_as_many_as_they_are():

    def policy(s):
        return torch.zeros(len(s), 2)

    one, many = GymEnv(Bits, max_length=3), GymEnv(Many, max_length=3)
    for seed in range(3):
        a, b = (sample(env, policy, 4, generator=generator(seed)) for env in (one, many))
        assert torch.equal(a.states, b.states)
        torch.testing.assert_close(one.log_reward(a.last), many.log_reward(b.last))
    gfn = GFlowNet(many, FlowNet(many, 8, 0), "db", batch=4, generator=generator())
    assert gfn.fit(2).isfinite().all()
    assert gfn.log_z.isfinite()
    with pytest.raises(ValueError, match="n must be 4"):
        sample(many, policy, 3)
    with pytest.raises(ValueError, match="s must be where"):
        many.step(b.states[:, 1], torch.tensor([0, 0, 1, 1]))


@pytest.mark.parametrize(
    ("fault", "match"),
    [
        ("truncated", "make must return an environment without a limit of time"),
        ("random", "rewards must add up to a function of the state"),
        ("forgets", "backward_mask must be given"),
    ],
)
def test_what_gymnasium_s_environments_cannot_be_is_told(fault, match):
    wrapped = GymEnv(lambda: Bits(fault))
    if fault == "random":  # the same steps, in environments of their own
        wrapped = GymEnv(lambda: Bits(fault), backward_mask=lambda s: torch.ones(len(s), 2, dtype=torch.bool))
        wrapped.step(wrapped.reset(1), torch.tensor([0]))
        wrapped._known[wrapped._source].children.clear()
        with pytest.raises(ValueError, match=match):
            wrapped.step(wrapped.reset(1), torch.tensor([0]))
        return
    with pytest.raises(ValueError, match=match):
        sample(wrapped, lambda s: torch.zeros(len(s), 2), 64, generator=generator())


def test_masks_come_from_infos_methods_or_functions():
    assert not GymEnv(lambda: Bits("masked")).forward_mask(torch.full((1, 3), -1))[0, 1]

    class Methods(Bits):
        def info(self):
            return {}

        def action_masks(self):
            return np.array([False, True])

    assert GymEnv(Methods).forward_mask(torch.full((2, 3), -1)).tolist() == [[False, True]] * 2
    own = GymEnv(Bits, forward_mask=lambda s: (s[:, :1] < 0).expand(-1, 2) & torch.tensor([True, False]))
    assert own.forward_mask(own.reset(1)).tolist() == [[True, False]]
    with pytest.raises(ValueError, match="s must be states that were visited"):
        own.energy(torch.tensor([[0, 0, 0]]))
    with pytest.raises(ValueError, match="discrete actions"):
        GymEnv(lambda: SimpleNamespace(action_space=SimpleNamespace(shape=(2,)), reset=None, step=None))
    with pytest.raises(ValueError, match="reset, step"):
        GymEnv(lambda: SimpleNamespace(action_space=SimpleNamespace(n=2)))

    class Words(Bits):
        def observed(self):
            return {"bits": 1}

    with pytest.raises(ValueError, match="observations are numbers"):
        GymEnv(Words)


def test_trajectories_of_torchgfn_s():
    """[time, batch], an exit action at the end, and a sink of -1 behind it."""
    tensor = torch.tensor([[[0, 0], [0, 0]], [[1, 0], [-1, -1]], [[1, 1], [-1, -1]], [[-1, -1], [-1, -1]]]).float()
    actions = torch.tensor([[[0], [2]], [[1], [-1]], [[2], [-1]]])
    given = SimpleNamespace(
        states=SimpleNamespace(tensor=tensor), actions=SimpleNamespace(tensor=actions), is_backward=False,
        terminating_idx=torch.tensor([3, 1]), log_rewards=torch.tensor([0.5, -0.5]),
    )  # fmt: skip
    traj, log_rewards = from_torchgfn(given)
    assert isinstance(traj, Trajectories)
    assert traj.states.tolist() == [[[0, 0], [1, 0], [1, 1], [1, 1]], [[0, 0]] * 4]
    assert traj.actions.tolist() == [[0, 1, 2], [2, 0, 0]]
    assert traj.lengths.tolist() == [3, 1]
    assert traj.last.tolist() == [[1, 1], [0, 0]]
    assert traj.all_complete()
    assert torch.equal(log_rewards, given.log_rewards)
    for change in (dict(is_backward=True), dict(states=SimpleNamespace(tensor=[]))):
        with pytest.raises(ValueError, match="container must hold"):
            from_torchgfn(SimpleNamespace(**vars(given) | change))


@pytest.mark.parametrize("name", ["is_terminating", "is_done"])
def test_transitions_of_torchgfn_s(name):
    states, after = torch.tensor([[0.0, 0.0], [1.0, 0.0]]), torch.tensor([[1.0, 0.0], [-1.0, -1.0]])
    given = SimpleNamespace(
        states=SimpleNamespace(tensor=states), next_states=SimpleNamespace(tensor=after),
        actions=SimpleNamespace(tensor=torch.tensor([[0], [2]])), log_rewards=torch.tensor([-torch.inf, 0.7]),
        **{name: torch.tensor([False, True])},
    )  # fmt: skip
    traj, log_rewards = from_torchgfn(given)
    assert traj.states.tolist() == [[[0, 0], [1, 0]], [[1, 0], [1, 0]]]
    assert traj.actions.tolist() == [[0], [2]]
    assert traj.done.tolist() == [False, True]
    assert not traj.all_complete()
    assert log_rewards.tolist() == [0, pytest.approx(0.7)]
