"""GFlowNets: policies that build x step by step with probability R(x) / Z, and their forward-looking losses.

Pan, Malkin, Zhang, Bengio, "Better Training of GFlowNets with Local Credit and Incomplete Trajectories" (ICML 2023, arXiv
2302.01687). States are the nodes of a directed graph without cycles, from a source s0 to terminal states x of reward
``R(x) = exp(-E(x))``. A forward policy P_F, a backward policy P_B and a flow F that satisfy, at every step from s to s',

    F(s) P_F(s'|s) = F(s') P_B(s|s'),    F(x) = R(x),

sample x with probability R(x) / Z, and Z = F(s0). Where states on the way have energies too, with
``F(s) = exp(-E(s)) Ft(s)``, the same is (equation 9)

    log Ft(s) + log P_F(s'|s) = log Ft(s') + log P_B(s|s') - (E(s') - E(s)),    Ft(x) = 1:

each step tells what it is worth, and steps of trajectories that were never finished can be learned from.

    >>> env = SetEnv(torch.linspace(-1, 1, 30), k=20)
    >>> gfn = GFlowNet(env, loss="fl_db", eps=0.1)
    >>> gfn.fit(2000)
    >>> sets = gfn.sample(64)
"""

from __future__ import annotations

from polyak.particles.gflownet.envs import BitSequence, Env, HyperGrid, IsingGrow, SetEnv
from polyak.particles.gflownet.exact import TerminalLaw, exact_terminal_law
from polyak.particles.gflownet.gym import GymEnv
from polyak.particles.gflownet.losses import db, fl_db, fl_subtb, subtb, tb
from polyak.particles.gflownet.model import FlowNet, GFlowNet
from polyak.particles.gflownet.replay import PrioritizedReplay
from polyak.particles.gflownet.torchgfn import from_torchgfn
from polyak.particles.gflownet.trajectories import Trajectories, concatenate, sample

__all__ = [
    "BitSequence",
    "Env",
    "FlowNet",
    "GFlowNet",
    "GymEnv",
    "HyperGrid",
    "IsingGrow",
    "PrioritizedReplay",
    "SetEnv",
    "TerminalLaw",
    "Trajectories",
    "concatenate",
    "db",
    "exact_terminal_law",
    "fl_db",
    "fl_subtb",
    "from_torchgfn",
    "sample",
    "subtb",
    "tb",
]
