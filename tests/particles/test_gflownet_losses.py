"""The losses of GFlowNets: their optimum, their limits, each against a loop over its definition, and what they must not look at."""

from __future__ import annotations

import math
from itertools import combinations

import numpy as np
import pytest
import torch
from gflownet_cases import ENERGIES, A, K, Table, env, exact_table, law

from polyak.particles.gflownet import GFlowNet, Trajectories, db, exact_terminal_law, fl_db, fl_subtb, sample, subtb, tb

LOSSES = ("db", "tb", "subtb", "fl_db", "fl_subtb")
B, T = 5, 4


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def some(seed: int = 0, complete: bool = False):
    """Random numbers in place of a network's, for trajectories of different lengths, some incomplete."""
    g = generator(seed)
    lengths = torch.tensor([4, 2, 3, 1, 4])
    done = torch.tensor([True, True, False, True, False]) | complete
    traj = Trajectories(torch.zeros(B, T + 1, 1), torch.zeros(B, T, dtype=torch.int64), done, lengths)
    steps = [torch.randn(B, T, dtype=torch.float64, generator=g) for _ in range(2)]
    flow, energy = (torch.randn(B, T + 1, dtype=torch.float64, generator=g) for _ in range(2))
    return traj, *steps, flow, energy


def by_loop(kind: str, traj, log_pf, log_pb, flow, energy, reward, lam=0.9):
    """The definition, one residual at a time."""
    total, squares = [], []
    for b in range(B):
        n, ends = int(traj.lengths[b]), bool(traj.done[b])
        f = [float(v) for v in flow[b, : n + 1]]
        d = [float(log_pf[b, t] - log_pb[b, t]) for t in range(n)]
        if kind.startswith("fl"):
            d = [d[t] + float(energy[b, t + 1] - energy[b, t]) for t in range(n)]
        if ends:
            f[n] = 0.0 if kind.startswith("fl") else float(reward[b])
        pieces = [(i, j) for i in range(n) for j in range(i + 1, n + 1)]
        residual = {(i, j): f[i] + sum(d[i:j]) - f[j] for i, j in pieces}
        if kind.endswith("subtb"):
            weight = {p: lam ** (p[1] - p[0]) for p in pieces}
            total.append(sum(weight[p] * residual[p] ** 2 for p in pieces) / sum(weight.values()))
        elif kind == "tb":
            total.append(residual[0, n] ** 2)
        else:
            squares += [residual[t, t + 1] ** 2 for t in range(n)]
    return np.mean(squares or total)


@pytest.mark.parametrize("kind", LOSSES)
def test_a_loss_is_its_definition_whatever_the_padding(kind):
    traj, log_pf, log_pb, flow, energy = some(complete=kind == "tb")
    reward = -energy[torch.arange(B), traj.lengths]
    wanted = by_loop(kind, traj, log_pf, log_pb, flow, energy, reward)
    # Padding, and flows at terminal states, are not looked at; nor are rewards where nothing ended.
    log_pf, log_pb = (torch.where(traj.valid, v, math.nan) for v in (log_pf, log_pb))
    flow = torch.where(traj.terminal, math.nan, flow)
    reward = torch.where(traj.done, reward, math.nan)
    function = dict(db=db, tb=tb, subtb=subtb, fl_db=fl_db, fl_subtb=fl_subtb)[kind]
    worth = energy if kind.startswith("fl") else reward
    found = function(traj, log_pf, log_pb, flow, worth)
    assert found.item() == pytest.approx(wanted, rel=1e-12)


@pytest.mark.parametrize("kind", LOSSES)
@pytest.mark.parametrize("eps", [0.0, 1.0])
def test_at_the_exact_flows_every_loss_is_zero_and_so_is_its_gradient(kind, eps):
    """On the policy's own trajectories and on those of any other."""
    table = exact_table(forward_looking=kind.startswith("fl"))
    gfn = GFlowNet(env(), table, kind, fixed_pb=True, debug=True, generator=generator())
    if kind == "tb":
        gfn._log_z.data = table.values.data[0, -1].clone()
    traj = sample(env(), gfn.policy, 200, eps, generator=generator(1), debug=True)
    loss = gfn.loss(traj)
    loss.backward()
    assert loss.item() < 1e-28
    assert table.values.grad.abs().max() < 1e-13
    assert gfn.log_z.item() == pytest.approx(
        math.log(sum(np.exp(-ENERGIES.numpy()[list(x)].sum()) for x in combinations(range(A), K)))
    )


@pytest.mark.parametrize("kind", LOSSES)
@pytest.mark.parametrize("wrong", ["sign of the energies", "P_B of the wrong state", "behaviour's probabilities"])
def test_what_is_wrong_is_not_zero_at_the_exact_flows(kind, wrong):
    """These are what the losses above would be with a usual mistake in the numbers that they are given."""
    if wrong == "sign of the energies" and not kind.startswith("fl"):
        pytest.skip("has no energies")
    gfn = GFlowNet(env(), exact_table(forward_looking=kind.startswith("fl")), kind, fixed_pb=True)
    traj = sample(env(), gfn.policy, 100, 1.0, generator=generator(1))
    log_pf, log_pb, flow = gfn.log_probs(traj)
    energy = env().energy(traj.states.flatten(0, 1)).unflatten(0, traj.states.shape[:2])
    if wrong == "sign of the energies":
        energy = -energy
    elif wrong == "P_B of the wrong state":
        log_pb = -torch.arange(K).clamp(min=1).double().log().expand(100, K)
    else:
        log_pf = -torch.arange(A, A - K, -1).double().log().expand(100, K)
    function = dict(db=db, tb=tb, subtb=subtb, fl_db=fl_db, fl_subtb=fl_subtb)[kind]
    worth = energy if kind.startswith("fl") else -energy[:, -1]
    assert function(traj, log_pf, log_pb, flow, worth).item() > 1e-2


def test_the_exact_flows_sample_rewards():
    found = exact_terminal_law(env(), exact_table(forward_looking=True))
    wanted = law()
    assert len(found.states) == len(wanted) == 20
    for state, p in zip(found.states, found.probs, strict=True):
        assert p.item() == pytest.approx(wanted[tuple(state.nonzero()[:, 0].tolist())], rel=1e-12)


def test_a_constant_for_each_element_changes_no_policy():
    """Energies of sets that grow by c per element, of all sets alike: the same P_F, with flows that are moved along."""
    c, table = 0.8, exact_table(forward_looking=True)
    traj = sample(env(), table, 100, 1.0, generator=generator())
    gfn = GFlowNet(env(), table, fixed_pb=True)
    log_pf, log_pb, flow = gfn.log_probs(traj)
    sizes = torch.arange(K + 1, dtype=torch.float64)
    energy = env().energy(traj.states.flatten(0, 1)).unflatten(0, traj.states.shape[:2]) + c * sizes
    assert fl_db(traj, log_pf, log_pb, flow + c * (sizes - K), energy).item() < 1e-28


def test_energies_that_come_at_the_end_make_it_detailed_balance():
    traj, log_pf, log_pb, flow, energy = some()
    last = torch.where(traj.terminal, energy, 0)
    reward = torch.where(traj.done, -energy[torch.arange(B), traj.lengths], 0)
    for looking, plain in ((fl_db, db), (fl_subtb, subtb)):
        a, b = looking(traj, log_pf, log_pb, flow, last), plain(traj, log_pf, log_pb, flow, reward)
        assert a.item() == pytest.approx(b.item(), rel=1e-12)


def test_forward_looking_trajectory_balance_is_trajectory_balance():
    """lam to infinity leaves whole trajectories, where energies add up: with E(s0) = 0, or with log Z, for any E(s0)."""
    traj, log_pf, log_pb, flow, energy = some(complete=True)
    reward = -energy[torch.arange(B), traj.lengths]
    log_z = torch.tensor(0.7, dtype=torch.float64)
    for z in (None, log_z):
        start = energy.clone()
        if z is None:
            start[:, 0] = 0
        whole = tb(traj, log_pf, log_pb, flow, reward, z)
        assert fl_subtb(traj, log_pf, log_pb, flow, start, z, lam=1e12).item() == pytest.approx(whole.item(), rel=1e-10)


def test_sub_trajectory_balance_lies_between_the_other_two():
    traj, log_pf, log_pb, flow, energy = some(complete=True)
    traj = Trajectories(
        traj.states, traj.actions, traj.done, torch.full_like(traj.lengths, T)
    )  # of one length: means agree
    reward = -energy[:, -1]
    given = (traj, log_pf, log_pb, flow, reward)
    assert subtb(*given, lam=1e-12).item() == pytest.approx(db(*given).item(), rel=1e-10)
    assert subtb(*given, lam=1e12).item() == pytest.approx(tb(*given).item(), rel=1e-10)
    assert math.isfinite(subtb(*given, lam=1e300).item())


def test_a_free_flow_at_the_end_leaves_the_law_open():
    """What the official code of sets does: any terminal flows have policies of loss zero, whose law is not the reward's."""
    tilt = {x: 2.0 * (3 in x) for x in combinations(range(A), K)}
    table = exact_table(forward_looking=True, tilt=tilt)
    gfn = GFlowNet(env(), table, "fl_db", fixed_pb=True, parity="official")
    traj = sample(env(), table, 100, 1.0, generator=generator())
    assert gfn.loss(traj).item() < 1e-28
    found, wanted = exact_terminal_law(env(), table), law()
    tv = 0.5 * sum(
        abs(p.item() - wanted[tuple(s.nonzero()[:, 0].tolist())])
        for s, p in zip(found.states, found.probs, strict=True)
    )
    assert tv > 0.3
    gfn.parity = None
    assert gfn.loss(traj).item() > 0.1
    right = GFlowNet(env(), exact_table(forward_looking=True), "fl_db", fixed_pb=True, parity="official")
    assert right.loss(traj).item() < 1e-28  # the reward's own flows are one of many


def test_the_flow_before_the_end_in_place_of_the_end_s_has_another_optimum():
    """What the official code of molecules does: the flow drops out of the last step, which the exact flows then do not satisfy."""
    gfn = GFlowNet(env(), exact_table(forward_looking=True), "fl_db", fixed_pb=True, parity="official-molecules")
    traj = sample(env(), gfn.policy, 100, 1.0, generator=generator())
    assert gfn.loss(traj).item() > 1e-2
    log_pf, log_pb, _ = gfn.log_probs(traj)
    added = traj.actions[:, -1]
    last = log_pf[:, -1] - log_pb[:, -1] + ENERGIES[added]  # without a flow
    assert gfn.loss(traj).item() == pytest.approx(last.square().sum().item() / (100 * K), rel=1e-10)


def test_steps_are_learned_from_without_an_end():
    """A step between sets that are not finished needs no reward; whole trajectories are refused where they are needed."""
    table = exact_table(forward_looking=True)
    gfn = GFlowNet(env(), table, fixed_pb=True)
    whole = sample(env(), table, 50, 1.0, generator=generator())
    cut = whole.truncated(K - 1)
    assert not cut.done.any()
    assert gfn.loss(cut).item() < 1e-28
    steps = whole.transitions()
    assert len(steps) == 50 * K
    random = GFlowNet(env(), Table(torch.randn(2**A, 2 * A + 1, dtype=torch.float64, generator=generator())))
    assert random.loss(steps).item() == pytest.approx(random.loss(whole).item(), rel=1e-12)
    log_pf, log_pb, flow = gfn.log_probs(cut)
    reward = torch.zeros(50, dtype=torch.float64)
    with pytest.raises(ValueError, match="traj must have complete"):
        tb(cut, log_pf, log_pb, flow, reward)
    log_pf, log_pb, flow = gfn.log_probs(steps)
    with pytest.raises(ValueError, match="log_z must be left out"):
        db(steps, log_pf, log_pb, flow, torch.zeros(len(steps)), torch.tensor(1.0))
    with pytest.raises(ValueError, match="traj must have complete"):
        tb(steps, log_pf, log_pb, flow, torch.zeros(len(steps)))


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (dict(log_pf=torch.zeros(5, 3)), "log_pf must have shape"),
        (dict(log_pb=torch.zeros(4, 4)), "log_pb must have shape"),
        (dict(log_flow=torch.zeros(5, 4)), "log_flow must have shape"),
        (dict(energies=torch.zeros(5, 4)), "energies must have shape"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(change, match):
    traj, log_pf, log_pb, flow, energy = some()
    given = dict(traj=traj, log_pf=log_pf, log_pb=log_pb, log_flow=flow, energies=energy) | change
    for loss in (fl_db, fl_subtb):
        with pytest.raises(ValueError, match=match):
            loss(**given)


def test_half_precision_is_computed_in_float32():
    traj, log_pf, log_pb, flow, energy = some()
    given = [v.bfloat16() for v in (log_pf, log_pb, flow, energy)]
    loss = fl_db(traj, *given)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(fl_db(traj, *[v.float() for v in given]).item(), rel=1e-6)
