"""Exactly solvable models, to test filters, smoothers, samplers and learners against: what they should find is known.

- :class:`Mixture`, :class:`Gaussian`: Gaussian mixtures under noise, with scores, denoisers and posteriors; their tilts,
  products and powers, with normalizers.
- :class:`LinearGaussian`: Kalman filter and smoother, likelihood, score.
- :class:`FiniteHMM`: forward-backward, likelihood, score, the law of paths.
- :class:`MarkovChain`: strings with any symbols revealed.
- :class:`Ising`: small lattices, with ``log Z`` and the marginals of any spins.
- :class:`HyperGrid`, :class:`SubsetLaw`: what GFlowNets should sample.

All compute in float64, in batches, on the device of their parameters.
"""

from polyak.core.exact.hmm import FilteredStates, FiniteHMM, HMMScore, SmoothedStates
from polyak.core.exact.ising import Ising
from polyak.core.exact.linear_gaussian import FilteredMoments, LinearGaussian, LinearGaussianScore, SmoothedMoments
from polyak.core.exact.mixtures import Gaussian, Mixture, product_of_powers
from polyak.core.exact.rewards import HyperGrid, SubsetLaw, log_elementary_symmetric
from polyak.core.exact.strings import MarkovChain

__all__ = [
    "FilteredMoments",
    "FilteredStates",
    "FiniteHMM",
    "Gaussian",
    "HMMScore",
    "HyperGrid",
    "Ising",
    "LinearGaussian",
    "LinearGaussianScore",
    "MarkovChain",
    "Mixture",
    "SmoothedMoments",
    "SmoothedStates",
    "SubsetLaw",
    "log_elementary_symmetric",
    "product_of_powers",
]
