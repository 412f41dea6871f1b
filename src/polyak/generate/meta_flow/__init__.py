"""Meta flow matching: one vector field that transports whole populations, told by an embedding which one it moves.

Atanackovic, Zhang, Amos, Blanchette, Lee, Bengio, Tong, Neklyudov, "Meta Flow Matching: Integrating Vector Fields on the
Wasserstein Manifold" (ICLR 2025, arXiv 2408.14608). Of populations i = 1..I the points before, X0, and after, X1, are known; the
field sees a learned embedding of all points before, and so moves populations that were not in training:

    L = E_i E_t E_(x0, x1)~pi_i |v_t(x_t | phi(X0_i)) - (x1 - x0)|^2,    x_t = (1 - t) x0 + t x1,

with t uniform in [0, 1] for each point; a new population follows ``dx/dt = v_t(x | phi(X0))`` from t = 0 to 1.

P populations of N points in D dimensions are a tensor [P, N, D]. Where they differ in size they are padded: a mask [P, N] is True
where there is a point, and what stands elsewhere, NaN too, is not looked at. (NaN among the points is looked for on the CPU, and
where a mask is given.)

    >>> meta = MetaFlowMatching(PopulationEncoder(2), MetaVelocity(2, 64))
    >>> loss = meta.loss(x0, x1, generator=generator)  # to be minimized over meta.parameters()
    >>> predicted = meta.transport(unseen)
"""

from __future__ import annotations

from polyak.generate.meta_flow.distances import mmd_rbf, wasserstein
from polyak.generate.meta_flow.encoder import PopulationEncoder
from polyak.generate.meta_flow.matching import MetaFlowMatching
from polyak.generate.meta_flow.velocity import MetaVelocity

__all__ = ["MetaFlowMatching", "MetaVelocity", "PopulationEncoder", "mmd_rbf", "wasserstein"]
