"""Sets whose law is known, and policies that build them: for the claim of GFlowNets."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from polyak.core.exact.rewards import SubsetLaw
from polyak.particles.gflownet import (
    FlowNet,
    GFlowNet,
    HyperGrid,
    SetEnv,
    Trajectories,
    concatenate,
    exact_terminal_law,
    sample,
)
from polyak.particles.gflownet.losses import LOSSES

VALUES = 10  # different energies


def elements(seed: int, size: int, scale: float, dtype: torch.dtype = torch.float32) -> Tensor:
    """Energies of the elements: each one of ten values, uniform in [-scale, scale]; then their mean is taken off.

    All sets have k elements, so that the mean changes no law: it is what a partial set should not be told is its worth.
    """
    generator = torch.Generator().manual_seed(seed)
    values = 2 * torch.rand(VALUES, generator=generator, dtype=torch.float64) - 1
    energies = values[torch.randint(VALUES, (size,), generator=generator)]
    return (scale * (energies - energies.mean())).to(dtype)


class ExactFlows(nn.Module):
    """The optimum with uniform P_B in closed form, in place of a network: ``Ft(s) = e_{k-|s|}(w of what is not in s) / C(k, |s|)``.

    Args:
        looking: whether flows are forward-looking, or ``F(s) = exp(-E(s)) Ft(s)``.
        free: of log-flows that terminal sets are given at will, from N(0, 1); without it they are 0, as they must be.
    """

    def __init__(self, env: SetEnv, looking: bool, free: torch.Generator | None = None) -> None:
        super().__init__()
        self.env, self.looking = env, looking
        self.law = SubsetLaw(-env.energies, env.k)
        self.start = nn.Parameter(torch.zeros((), dtype=torch.float64))  # nothing to learn
        sizes = torch.arange(env.k + 1, dtype=torch.float64)
        self.choices = math.lgamma(env.k + 1) - torch.lgamma(sizes + 1) - torch.lgamma(env.k - sizes + 1)
        self.table = None if free is None else self._table(free)

    def flow(self, s: Tensor) -> Tensor:
        """log Ft of sets, [n]."""
        if self.table is not None:
            return self.table[s.long() @ 2 ** torch.arange(s.shape[1])]
        return self.law.log_completions(s) - self.choices[s.sum(1)]

    def _table(self, generator: torch.Generator) -> Tensor:
        """log Ft of every set, backwards from the terminal ones: the sum over elements of ``exp(-e_a) Ft(s + a) P_B``."""
        n, k = self.env.n_actions, self.env.k
        rows = torch.arange(2**n)
        sets = (rows[:, None] >> torch.arange(n) & 1).bool()
        sizes = sets.sum(1)
        table = torch.full((2**n,), -torch.inf, dtype=torch.float64)
        table[sizes == k] = torch.randn(int((sizes == k).sum()), dtype=torch.float64, generator=generator)
        for size in range(k - 1, -1, -1):
            at = rows[sizes == size]
            after = at[:, None] | 2 ** torch.arange(n)
            into = table[after] - self.env.energies - math.log(size + 1)
            table[at] = into.masked_fill(sets[at], -torch.inf).logsumexp(1)
        return table

    def forward(self, s: Tensor) -> Tensor:
        n = self.env.n_actions
        after = s[:, None] | torch.eye(n, dtype=torch.bool)  # [rows, A, A]
        open_ = self.env.forward_mask(s)
        into = torch.zeros(s.shape, dtype=torch.float64)
        into[open_] = self.flow(after[open_])
        flow = self.flow(s) - (0 if self.looking else self.env.energy(s))
        return torch.cat([into - self.env.energies, torch.zeros_like(into), flow[:, None]], 1) + self.start


def net(env: SetEnv | HyperGrid, seed: int, hidden: int) -> FlowNet:
    """The paper's perceptron, the same for all arms."""
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        return FlowNet(env, hidden)


def distance(env: SetEnv | HyperGrid, gfn: GFlowNet) -> float:
    """Total variation between what is built and R / Z, exactly."""
    law = exact_terminal_law(env, gfn.policy)
    return 0.5 * (law.probs - env.log_reward(law.states).double().softmax(0)).abs().sum().item()


def inclusion_error(law: SubsetLaw, gfn: GFlowNet, samples: int) -> float:
    """The largest error of an element's probability to be chosen, by samples of the policy."""
    x = gfn.sample(samples, torch.Generator().manual_seed(0))
    return (x.double().mean(0) - law.inclusion).abs().max().item()


def cut_short(env: SetEnv, seed: int, batch: int, complete: float) -> Iterator[Trajectories]:
    """Uniformly random trajectories without their last step, and now and then a whole one: the same for all arms."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        traj = sample(env, lambda s: torch.zeros(s.shape), batch, 1.0, generator=generator)
        whole = torch.rand(batch, generator=generator) < complete
        cut = traj.truncated(env.k - 1)
        yield concatenate([part for part in (traj[whole], cut[~whole]) if len(part)])


def residue(gfn: GFlowNet, traj: Trajectories, sign: float) -> float:
    """The loss of some trajectories, with the energies' sign as it is or turned; log Z is the source's flow."""
    log_pf, log_pb, log_flow = gfn.log_probs(traj)
    energies = sign * gfn.env.energy(traj.states.flatten(0, 1)).unflatten(0, log_flow.shape)  # type: ignore[attr-defined]
    worth = energies if gfn.forward_looking else -energies[:, -1]
    options = {"parity": gfn.parity} if gfn.name == "fl_db" else {}
    return LOSSES[gfn.name](traj, log_pf, log_pb, log_flow, worth, **options).item()


def limits(kind: str, b: int, t: int, generator: torch.Generator) -> float:
    """How far sub-trajectory balance is, relatively, from detailed balance at a small lam and trajectory balance at a large one."""
    log_pf, log_pb = torch.randn(2, b, t, dtype=torch.float64, generator=generator)
    log_flow, energies = torch.randn(2, b, t + 1, dtype=torch.float64, generator=generator)
    energies[:, 0] = 0
    steps = torch.zeros(b, t, dtype=torch.int64)
    traj = Trajectories(torch.zeros(b, t + 1, 1), steps, torch.ones(b, dtype=torch.bool), torch.full((b,), t))
    given = (traj, log_pf, log_pb, log_flow)
    worth = energies if kind == "fl_subtb" else -energies[:, -1]
    single = LOSSES["fl_db" if kind == "fl_subtb" else "db"](*given, worth)
    whole = LOSSES["tb"](*given, -energies[:, -1])
    pairs = ((LOSSES[kind](*given, worth, lam=1e-14), single), (LOSSES[kind](*given, worth, lam=1e14), whole))
    return max(abs(a.item() / b.item() - 1) for a, b in pairs)
