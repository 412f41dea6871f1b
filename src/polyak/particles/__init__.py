"""Particles: many weighted copies of a state at once, such as sequential Monte Carlo, smoothing and flow networks.

Weights, effective sample size and resampling are in ``polyak.core.particles``; models whose laws are known exactly in
``polyak.core.exact``. The losses of GFlowNets, trajectories and adapters are in ``polyak.particles.gflownet``.

>>> from polyak.particles import GFlowNet, SetEnv
>>> gfn = GFlowNet(SetEnv(energies, k=20), loss="fl_db", eps=0.1)
>>> gfn.fit(2000)
>>> sets = gfn.sample(64)
"""

from polyak.particles.gflownet import (
    BitSequence,
    FlowNet,
    GFlowNet,
    GymEnv,
    HyperGrid,
    IsingGrow,
    PrioritizedReplay,
    SetEnv,
    exact_terminal_law,
)
from polyak.particles.paris import (
    FisherScore,
    LinearGaussian,
    NeuralSSM,
    PaRIS,
    ParisParticleGibbs,
    StateSpaceModel,
    StochasticVolatility,
    fit,
    particle_gibbs,
)

__all__ = [
    "BitSequence",
    "FisherScore",
    "FlowNet",
    "GFlowNet",
    "GymEnv",
    "HyperGrid",
    "IsingGrow",
    "LinearGaussian",
    "NeuralSSM",
    "PaRIS",
    "ParisParticleGibbs",
    "PrioritizedReplay",
    "SetEnv",
    "StateSpaceModel",
    "StochasticVolatility",
    "exact_terminal_law",
    "fit",
    "particle_gibbs",
]
