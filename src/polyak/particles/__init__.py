"""Particles: many weighted copies of a state at once, such as sequential Monte Carlo, smoothing and flow networks.

Weights, effective sample size and resampling are in ``polyak.core.particles``; models whose laws are known exactly in
``polyak.core.exact``.
"""

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
    "FisherScore",
    "LinearGaussian",
    "NeuralSSM",
    "PaRIS",
    "ParisParticleGibbs",
    "StateSpaceModel",
    "StochasticVolatility",
    "fit",
    "particle_gibbs",
]
