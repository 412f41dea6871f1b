"""GFlowNets: sampling, the exact law, training, checkpoints, replay, and what they refuse."""

from __future__ import annotations

import dataclasses
import io
import math
import warnings
from itertools import product

import numpy as np
import pytest
import torch
from gflownet_cases import ENERGIES, A, K, Table, env, exact_table
from torch import nn

from polyak.core.exact.ising import Ising
from polyak.core.exact.rewards import HyperGrid as GridLaw
from polyak.particles.gflownet import (
    BitSequence,
    FlowNet,
    GFlowNet,
    HyperGrid,
    IsingGrow,
    PrioritizedReplay,
    SetEnv,
    Trajectories,
    concatenate,
    exact_terminal_law,
    sample,
)

MODES = torch.tensor([[1, 0, 1, 1], [0, 0, 0, 1]])
ENVS = {
    "set": lambda: SetEnv(ENERGIES, K),
    "grid": lambda: HyperGrid(2, 4, dtype=torch.float64),
    "bits": lambda: BitSequence(MODES, word=2, beta=0.7),
    "ising": lambda: IsingGrow(2, 0.3, 0.2, dtype=torch.float64),
}


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def uniform(made):
    return lambda s: torch.zeros(len(s), made.n_actions)


def edges(made):
    """Every step between states, by going through all: {state: {action: state}}, and the terminal states."""
    found, ends, queue = {}, set(), [made.reset(1)[0]]
    while queue:
        s = queue.pop()
        key = tuple(s.tolist())
        if key in found:
            continue
        found[key] = {}
        for a in made.forward_mask(s[None])[0].nonzero()[:, 0].tolist():
            after, done = made.step(s[None], torch.tensor([a]))
            found[key][a] = tuple(after[0].tolist())
            if done:
                ends.add(found[key][a])
            else:
                queue.append(after[0])
    return found, ends


@pytest.mark.parametrize("name", ENVS)
def test_an_environment_is_a_graph_whose_parents_its_mask_counts(name):
    made = ENVS[name]()
    found, ends = edges(made)
    parents: dict = {}
    for s, children in found.items():
        for a, after in children.items():
            assert a not in parents.setdefault(after, {}), "an action and a state say which parent"
            parents[after][a] = s
    kind = made.reset(1)
    states = torch.tensor(sorted({*parents, *found})).to(kind.dtype)
    masks = made.backward_mask(states)
    for s, mask in zip(states, masks, strict=True):
        assert set(mask.nonzero()[:, 0].tolist()) == set(parents.get(tuple(s.tolist()), {}))
    x = torch.tensor(sorted(ends)).to(kind.dtype)
    assert not made.forward_mask(x).any()
    torch.testing.assert_close(made.energy(x), -made.log_reward(x), rtol=0, atol=0)
    assert made.energy(states).shape == (len(states),)
    depth = max(len(p) for p in _paths(found))
    assert depth == made.max_length
    law = exact_terminal_law(made, uniform(made))
    assert {tuple(s.tolist()) for s in law.states} == ends
    assert law.probs.sum().item() == pytest.approx(1, abs=1e-12)


def _paths(found):
    path, s = [], next(iter(found))
    while found.get(s):
        a = min(found[s])  # of the grid: up before stopping
        path.append(a)
        s = found[s][a]
    return [path]


def test_rewards_are_those_of_the_exact_models():
    for height in (8, 11, 21):  # 11 and 21 have points on the modes' bounds
        made, law = HyperGrid(2, height, dtype=torch.float64), GridLaw(2, height)
        points = torch.cartesian_prod(torch.arange(height), torch.arange(height))
        stopped = torch.nn.functional.pad(points, (0, 1), value=1)
        torch.testing.assert_close(made.log_reward(stopped), law.log_reward(points))
    for size in (2, 3):
        made, law = IsingGrow(size, 0.3, 0.2, dtype=torch.float64), Ising(size, 0.3, 0.2)
        spins = torch.tensor(list(product((-1, 1), repeat=size * size)), dtype=torch.int8)
        assert made.log_reward(spins).logsumexp(0).item() == pytest.approx(law.log_z.item(), rel=1e-12)
    bits = torch.tensor(list(product((0, 1), repeat=4)), dtype=torch.int8)
    distance = [min(sum(abs(a - b) for a, b in zip(x, m, strict=True)) for m in MODES.tolist()) for x in bits.tolist()]
    torch.testing.assert_close(ENVS["bits"]().log_reward(bits), -0.7 * torch.tensor(distance, dtype=torch.float32))
    begun = torch.tensor([[1, 1, -1, -1], [0, 0, -1, -1], [-1, -1, -1, -1]], dtype=torch.int8)
    torch.testing.assert_close(ENVS["bits"]().energy(begun), torch.tensor([0.7, 0.0, 0.0]))


@pytest.mark.parametrize(("eps", "temperature"), [(0.0, 1.0), (0.3, 2.0), (1.0, 1.0)])
def test_what_is_drawn_has_the_law_of_the_behaviour(eps, temperature):
    """Against the exact law of the mixture, by Pearson's statistic: 13 or 19 degrees of freedom, mean 19, deviation 6."""
    made, table = env(), Table(torch.randn(2**A, 2 * A + 1, dtype=torch.float64, generator=generator()))

    def behaviour(s):
        p = (table(s)[:, :A] / temperature).masked_fill(~made.forward_mask(s), -torch.inf).softmax(1)
        return ((1 - eps) * p + eps * made.forward_mask(s) / made.forward_mask(s).sum(1, keepdim=True)).log()

    n = 20_000
    law = exact_terminal_law(made, behaviour)
    traj = sample(made, table, n, eps, temperature, generator(3), debug=True)
    same = (traj.last[:, None] == law.states).all(2)
    statistic = ((same.sum(0) - n * law.probs).square() / (n * law.probs)).sum()
    assert statistic < 19 + 4 * 6.2
    assert bool(traj.done.all() & (traj.lengths == K).all())


def test_log_probabilities_are_the_policy_s_not_the_behaviour_s():
    made, table = env(), Table(torch.randn(2**A, 2 * A + 1, dtype=torch.float64, generator=generator()))
    for fixed in (False, True):
        gfn = GFlowNet(made, table, fixed_pb=fixed, eps=0.7, temperature=3.0)
        traj = sample(made, table, 20, 0.7, 3.0, generator())
        log_pf, log_pb, flow = gfn.log_probs(traj)
        for b in range(20):
            for t in range(K):
                s, after, a = traj.states[b, t], traj.states[b, t + 1], traj.actions[b, t]
                allowed = [i for i in range(A) if not s[i]]
                out, out_after = table(s[None])[0], table(after[None])[0]
                assert log_pf[b, t].item() == pytest.approx((out[a] - out[allowed].logsumexp(0)).item())
                back = [A + i for i in range(A) if after[i]]
                wanted = -math.log(t + 1) if fixed else (out_after[A + a] - out_after[back].logsumexp(0)).item()
                assert log_pb[b, t].item() == pytest.approx(wanted)
                assert flow[b, t].item() == out[-1].item()


def test_trajectories_end_at_different_lengths():
    made = HyperGrid(2, 4)
    traj = sample(made, uniform(made), 200, generator=generator(), debug=True)
    assert len(traj.lengths.unique()) > 3
    at = torch.arange(200)
    assert (traj.states[at, traj.lengths, -1] == 1).all()
    assert (traj.states[at, traj.lengths - 1, -1] == 0).all()
    assert (traj.actions[~traj.valid] == 0).all()
    assert torch.equal(traj.states[:, -1], traj.last)
    free = HyperGrid(2, 4)
    del free.max_length  # then it is looked after each step whether all have ended
    shorter = sample(free, uniform(free), 200, generator=generator())
    n = shorter.actions.shape[1]
    assert n == traj.lengths.max()
    assert torch.equal(shorter.actions, traj.actions[:, :n])
    gfn = GFlowNet(made, loss="subtb", generator=generator())
    parts = [traj[:50], traj[50:]]
    assert gfn.loss(traj).item() == pytest.approx(gfn.loss(concatenate([shorter[:50], parts[1]])).item(), rel=1e-5)
    few = traj[torch.tensor([3, 5])]
    assert torch.equal(few.last, traj.last[[3, 5]])


def test_a_golden_trajectory():
    """The inverse of the cumulative probabilities at each uniform, by NumPy; the actions are pinned."""
    table, g = exact_table(forward_looking=True), generator(7)
    states, drawn = np.zeros((3, A), bool), []
    for _ in range(K):
        u = torch.rand(3, 1, dtype=torch.float64, generator=g).numpy()[:, 0]
        logits = table(torch.from_numpy(states)).detach().numpy()[:, :A]
        p = np.where(states, 0, np.exp(logits))
        p = 0.8 * p / p.sum(1, keepdims=True) + 0.2 * ~states / (~states).sum(1, keepdims=True)
        drawn.append(
            [int(np.searchsorted(row.cumsum(), at * row.sum(), side="right")) for row, at in zip(p, u, strict=True)]
        )
        states[np.arange(3), drawn[-1]] = True
    found = sample(env(), table, 3, 0.2, generator=generator(7)).actions
    assert found.T.tolist() == drawn == GOLDEN


GOLDEN = [[1, 1, 4], [4, 5, 3], [0, 2, 2]]


@pytest.mark.parametrize("loss", ["db", "tb", "subtb", "fl_db", "fl_subtb"])
def test_training_reaches_the_reward_s_law(loss):
    made = SetEnv(ENERGIES.float(), K)
    torch.manual_seed(0)
    gfn = GFlowNet(made, FlowNet(made, 32, 1), loss, eps=0.2, batch=32, lr=1e-2, generator=generator())
    gfn.fit(150)
    law = exact_terminal_law(made, gfn.policy)
    target = made.log_reward(law.states).double()
    assert 0.5 * (law.probs - target.softmax(0)).abs().sum() < 0.06
    assert abs(gfn.log_z.item() - target.logsumexp(0).item()) < 0.1
    x = gfn.sample(5)
    assert x.shape == (5, A)
    assert (x.sum(1) == K).all()


def make(loss, replay, seed=0):
    torch.manual_seed(seed)
    made = HyperGrid(2, 4)
    given = PrioritizedReplay(20) if replay else None
    return GFlowNet(made, FlowNet(made, 8, 1), loss, eps=0.1, batch=8, replay=given, generator=generator(seed))


@pytest.mark.parametrize(("loss", "replay"), [("tb", True), ("fl_db", False)])
def test_a_run_that_is_saved_goes_on_as_if_it_had_not_been(loss, replay):
    whole = make(loss, replay)
    wanted = torch.cat([whole.fit(4), whole.fit(3)])
    first = make(loss, replay)
    before = first.fit(4)
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second = make(loss, replay, seed=1)
    second.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(torch.cat([before, second.fit(3)]), wanted)
    assert second.steps == whole.steps == 7
    assert torch.equal(second.sample(4), whole.sample(4))
    with pytest.raises(ValueError, match="state must fit"):
        make("db" if loss == "tb" else "tb", replay).load_state_dict(first.state_dict())


def test_log_z_is_learned_a_hundred_times_as_fast_as_weights():
    gfn = make("tb", False)
    assert [group["lr"] for group in gfn.optimizer.param_groups] == [1e-3, 0.1]
    gfn.fit(1)
    assert abs(gfn.log_z.item()) == pytest.approx(0.1, rel=1e-3)  # Adam's first step


def test_incomplete_trajectories_are_trained_on():
    gfn = GFlowNet(env(), FlowNet(env(), 8), length=2, batch=4, generator=generator())
    assert gfn.fit(2).isfinite().all()
    plain = GFlowNet(env(), FlowNet(env(), 8), "db", generator=generator())
    data = [sample(env(), uniform(env()), 4, generator=generator(i)) for i in range(2)]
    mixed = [concatenate([traj.truncated(2), traj]) for traj in data]
    assert len(plain.fit(5, data=mixed)) == 2
    seen = []
    plain.fit(3, callback=lambda step, loss: seen.append((step, loss.ndim)))
    assert seen == [(3, 0), (4, 0), (5, 0)]


def test_replay_draws_by_reward():
    replay = PrioritizedReplay(4, alpha=2.0)
    traj = sample(env(), uniform(env()), 6, generator=generator())
    logs = torch.tensor([9.0, 9.0, -math.inf, 0.0, math.log(2.0), math.log(3.0)])
    replay.add(traj[:3], logs[:3])
    replay.add(traj[3:], logs[3:])  # the first two go
    assert len(replay) == 4
    drawn = replay.sample(14_000, generator())
    counts = [(drawn.states == traj.states[i]).flatten(1).all(1).sum().item() for i in range(6)]
    assert counts == [0, 0, 0, 1000, 4000, 9000]  # squares; stratified draws of whole numbers
    with pytest.raises(ValueError, match="log_priority"):
        replay.add(traj, logs[:2])
    with pytest.raises(ValueError, match="traj must start"):
        replay.add(traj.transitions(), torch.zeros(18))
    with pytest.raises(ValueError, match="traj must have states"):
        replay.add(traj.truncated(2), logs)
    with pytest.raises(ValueError, match="n must be 0"):
        PrioritizedReplay(2).sample(1)
    with pytest.raises(ValueError, match="at most 2"):
        PrioritizedReplay(2).load_state_dict(replay.state_dict())
    many = PrioritizedReplay(2)
    many.add(traj, torch.zeros(6))  # more than there is room for: the last stay
    assert torch.equal(many.state_dict()["held"]["states"], traj.states[-2:])


def test_a_replay_knows_whether_all_it_holds_is_complete():
    """Else a loss that needs complete trajectories waits for the device to see it."""
    replay, again = PrioritizedReplay(8), PrioritizedReplay(8)
    traj = sample(env(), uniform(env()), 4, generator=generator())
    replay.add(traj, torch.zeros(4))
    again.load_state_dict(replay.state_dict())
    for held in (replay, again):
        assert held.sample(3, generator()).complete
    assert concatenate([traj, replay.sample(3, generator())]).complete
    replay.add(dataclasses.replace(traj, complete=None), torch.zeros(4))
    again.load_state_dict(replay.state_dict())
    for held in (replay, again):
        assert held.sample(3, generator()).complete is None


class Broken(SetEnv):
    """A set whose environment has one fault."""

    def __init__(self, fault: str) -> None:
        super().__init__(ENERGIES.float(), K)
        self.fault = fault

    def forward_mask(self, s):
        mask = super().forward_mask(s)
        return mask & (s.sum(1, keepdim=True) < 2) if self.fault == "stuck" else mask

    def backward_mask(self, s):
        return ~s if self.fault == "back" else s

    def step(self, s, a):
        new, done = super().step(s, a)
        return (torch.zeros_like(s), done) if self.fault == "circle" else (new, done & (self.fault != "endless"))

    def energy(self, s):
        factor = {"nan": math.nan, "apart": 2.0}.get(self.fault, 1.0)
        return super().energy(s) * factor

    def log_reward(self, x):
        worth = -super().energy(x)
        return torch.where(x[:, 0], -math.inf, worth) if self.fault == "zero" else worth


@pytest.mark.parametrize(
    ("fault", "match"),
    [
        ("stuck", r"env.forward_mask must allow .* state \[(True|False), "),
        ("circle", "env.step must not lead back to a state that was visited"),
        ("back", "env.backward_mask must allow the action"),
        ("endless", "env.max_length must be enough"),
        ("nan", "env.energy must return no NaN"),
        ("apart", "env.energy must be -env.log_reward at terminal states"),
    ],
)
def test_what_an_environment_does_wrong_is_told(fault, match):
    with pytest.raises(ValueError, match=match):
        GFlowNet(Broken(fault), debug=fault in ("circle", "back"), generator=generator()).fit(1)


def test_a_reward_of_zero_is_raised_to_the_floor_and_said():
    gfn = GFlowNet(Broken("zero"), loss="tb", floor=-20.0, generator=generator())
    with pytest.warns(UserWarning, match=r"log-rewards were below floor=-20"):
        assert gfn.fit(3).isfinite().all()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        GFlowNet(env(), loss="tb", floor=-20.0, generator=generator()).fit(2)


def test_what_does_not_go_together_is_refused():
    made = HyperGrid(2, 4)

    class Plain:
        n_actions, reset, step = made.n_actions, made.reset, made.step
        forward_mask, backward_mask, log_reward = made.forward_mask, made.backward_mask, made.log_reward

    plain = Plain()
    with pytest.raises(ValueError, match="env must have energy"):
        GFlowNet(plain, nn.Linear(3, 7))
    GFlowNet(plain, nn.Linear(3, 7), "tb")
    with pytest.raises(ValueError, match="length must be None"):
        GFlowNet(made, loss="tb", length=2)
    with pytest.raises(ValueError, match="parity"):
        GFlowNet(made, loss="db", parity="official")
    with pytest.raises(ValueError, match="k must be at most"):
        SetEnv([0.1, 0.2], 3)
    with pytest.raises(ValueError, match="word must divide"):
        BitSequence([[0, 1, 1]], word=2)
    with pytest.raises(ValueError, match="modes"):
        BitSequence([[0, 2]])
    edges_of_all = 6 + 6 * 5 + 15 * 4  # each set is gone through once, however it was reached
    assert len(exact_terminal_law(env(), uniform(env()), limit=edges_of_all).probs) == 20
    with pytest.raises(ValueError, match="limit"):
        exact_terminal_law(env(), uniform(env()), limit=edges_of_all - 1)
    with pytest.raises(ValueError, match="policy must return no NaN"):
        exact_terminal_law(env(), lambda s: torch.full((len(s), A), math.nan))
    with pytest.raises(ValueError, match="policy return no NaN"):
        sample(env(), lambda s: torch.full((len(s), A), math.nan), 3)
    traj = sample(env(), uniform(env()), 3, generator=generator())
    with pytest.raises(ValueError, match="lengths must be in"):
        Trajectories(traj.states, traj.actions, traj.done, traj.lengths + 1)
    with pytest.raises(ValueError, match="actions must be"):
        Trajectories(traj.states, traj.actions.int(), traj.done, traj.lengths)
    with pytest.raises(ValueError, match="states must have shape"):
        Trajectories(traj.states[:, 1:], traj.actions, traj.done, traj.lengths)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_networks_of_other_types(dtype):
    """Masks are applied in float32 at least: -1e9 would be -inf in half precision, and all masked NaN."""
    net = FlowNet(env(), 16).to(dtype)
    gfn = GFlowNet(env(), net, generator=generator())
    loss = gfn.loss(sample(env(), gfn.policy, 8, generator=generator(), debug=True))
    assert loss.dtype == torch.float64  # the energies'
    loss.backward()
    assert all(p.grad.isfinite().all() and p.dtype == dtype for p in net.parameters())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_nothing_waits_for_the_device():
    made = SetEnv(ENERGIES.float().cuda(), K)
    gfn = GFlowNet(made, loss="fl_subtb", generator=torch.Generator("cuda").manual_seed(0))
    gfn.fit(2)
    torch.cuda.set_sync_debug_mode("error")
    try:
        traj = sample(made, gfn.policy, 64, 0.1, generator=gfn.generator)
        gfn.loss(traj).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert np.isfinite(gfn.fit(2).cpu()).all()
