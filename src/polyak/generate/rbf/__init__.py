"""Inference-time scaling of flow models: stochastic steps, another interpolant, and searches that spend a budget of calls.

Kim, Yoon, Hwang and Sung, "Inference-Time Scaling for Flow Models via Stochastic Generation and Rollover Budget Forcing", arXiv
2503.19385. A flow model is sampled by an ODE, in which nothing can be selected. Its SDE has the same marginals
(:class:`FlowSDE`); in the variance-preserving interpolant (:func:`polyak.generate.convert`) its candidates differ more; and a
budget of calls goes where it pays (:class:`RolloverBudget`). Beside it, with the same call: :class:`BestOfN`, :class:`SVDD`,
:class:`CoDe`, :class:`SoP`.

Example:
    >>> model = convert(lambda x, label: x, Flow(), VP())  # a velocity of rectified flow, in the VP interpolant
    >>> found = RolloverBudget(lambda x: -x.square().flatten(2).sum(2), nfe=60, steps=5, init=5).sample(model, VP(), (3,))
    >>> found.x.shape, found.nfe
    (torch.Size([1, 3]), 58)
"""

from polyak.generate.rbf.filtered import SVDD, BestOfN, CoDe
from polyak.generate.rbf.ground import SearchResult, SearchTrace
from polyak.generate.rbf.paths import SoP
from polyak.generate.rbf.rollover import RolloverBudget
from polyak.generate.rbf.solver import FlowSDE

__all__ = ["SVDD", "BestOfN", "CoDe", "FlowSDE", "RolloverBudget", "SearchResult", "SearchTrace", "SoP"]
