"""Generative marginalization models: a network that says log p(x_S) for every subset S of discrete variables, in one call.

Liu, Ramadge, Adams, "Generative Marginalization Models", ICML 2024, arXiv 2310.12920. For x in {1..K}^D, with 0 for what is
unknown, a network has two heads on a partly known x_S: an unnormalized log marginal f(x_S), and the conditionals of all
unknown positions, phi. They belong together where, for every order sigma of the positions and every step d (equation 4),

    f(x_{sigma(<d)}) + log p_phi(x_{sigma(d)} | x_{sigma(<d)}) = f(x_{sigma(<=d)}),        log p(x_S) = f(x_S) - f(nothing)

Training makes the squared error of that small, beside a fit to data (:func:`data_loss`) or to a density that is known up to its
normalizer (:func:`energy_loss`).

    model = MarginalizationModel(MLPDual(num_values=2, length=64), num_values=2, length=64)
    model.log_prob(x)                   # one call of the network
    model.log_prob(x, "chain")          # the product of conditionals: D evaluations
    model.log_marginal(partly_known)    # one call
    model.sample(16, given=partly_known[0])
"""

from polyak.generate.marginalization.chain import PersistentChain
from polyak.generate.marginalization.losses import consistency_loss, data_loss, energy_loss
from polyak.generate.marginalization.model import MarginalizationModel
from polyak.generate.marginalization.networks import MLPDual, TransformerDual

__all__ = [
    "MLPDual",
    "MarginalizationModel",
    "PersistentChain",
    "TransformerDual",
    "consistency_loss",
    "data_loss",
    "energy_loss",
]
