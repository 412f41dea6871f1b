"""Exactly solvable models, to test filters, smoothers, samplers and learners against: what they should find is known.

- :class:`Mixture`, :class:`Gaussian`: Gaussian mixtures under noise, with scores, denoisers and posteriors; their tilts,
  products and powers, with normalizers.
- :class:`LinearGaussian`: Kalman filter and smoother, likelihood, score.
- :class:`FiniteHMM`: forward-backward, likelihood, score, the law of paths.
- :class:`MarkovChain`: strings with any symbols revealed.

All compute in float64, in batches, on the device of their parameters.
"""

from polyak.core.exact.hmm import FilteredStates, FiniteHMM, HMMScore, SmoothedStates
from polyak.core.exact.linear_gaussian import FilteredMoments, LinearGaussian, LinearGaussianScore, SmoothedMoments
from polyak.core.exact.mixtures import Gaussian, Mixture, product_of_powers
from polyak.core.exact.strings import MarkovChain

__all__ = [
    "FilteredMoments",
    "FilteredStates",
    "FiniteHMM",
    "Gaussian",
    "HMMScore",
    "LinearGaussian",
    "LinearGaussianScore",
    "MarkovChain",
    "Mixture",
    "SmoothedMoments",
    "SmoothedStates",
    "product_of_powers",
]
