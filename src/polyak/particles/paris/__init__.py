"""PaRIS and Parisian particle Gibbs: smoothed sums over the hidden path of a state-space model, and learning by them.

Cardoso, Janati, Le Corff, Moulines and Olsson, "State and parameter learning with PaRIS particle Gibbs", ICML 2023, arXiv
2301.00900; PaRIS: Olsson and Westerborn, Bernoulli 23, 2017. For ``h_n = sum_{t < n} h_t(x_t, x_{t+1})`` and N weighted particles

    tau_{t+1}^i = 1/M sum_j [tau_t^{J} + h_t(x_t^{J}, x_{t+1}^i)],   J = J^{i,j} ~ w_t^l q(x_t^l, x_{t+1}^i),
    E[h_n | y_{0:n}] ~ sum_i W_n^i tau_n^i,

online and in memory that does not grow: :class:`PaRIS`. Its bias is O(n / N). :class:`ParisParticleGibbs` repeats it, given a
path that the last pass drew; then the bias falls geometrically with the passes. With h the gradient of the model's log-densities
the sum is the score: :func:`fit`.

Here the weights of the last observation are used, so that estimates are of the law given y_{0:n}; the paper's particles are those
after resampling, which average alike.
"""

from polyak.particles.paris.functional import FisherScore
from polyak.particles.paris.gibbs import ParisParticleGibbs, Smoothed, particle_gibbs
from polyak.particles.paris.learning import Fitted, fit
from polyak.particles.paris.models import (
    GaussianModel,
    LinearGaussian,
    NeuralSSM,
    Normal,
    StateSpaceModel,
    StochasticVolatility,
)
from polyak.particles.paris.smoothing import PaRIS

__all__ = [
    "FisherScore",
    "Fitted",
    "GaussianModel",
    "LinearGaussian",
    "NeuralSSM",
    "Normal",
    "PaRIS",
    "ParisParticleGibbs",
    "Smoothed",
    "StateSpaceModel",
    "StochasticVolatility",
    "fit",
    "particle_gibbs",
]
