"""Potential flows: edits of a generated sample along the gradients of learned potentials that obey the wave equation.

Song, Keller, Sebe, Welling, "Latent Traversals in Generative Models as Potential Flows" (ICML 2023, arXiv 2304.12944). A generator
x = G(z) is given, and stays as it is. Each of K potentials u_k(z, t) is a small network, and an edit is a walk along its gradient,

    z_{t+1} = z_t + grad_z u_k(z_t, t),    t = 0, 1, ...,    with    u_tt = c_k^2 laplacian_z u,    grad_z u(z, 0) = 0.

They are trained without labels: the equation is a penalty, images should change as much as they can along a step, and a classifier
should tell from an image before a step and one after it which of the K potentials moved it.

    >>> flow = PotentialFlow(dim=8, k=4)
    >>> loss = potential_flow_loss(flow, decoder, z, k=2, s=0, reconstructor=PairClassifier(4, channels=1))["loss"]
    >>> path = flow.traverse(z, k=2, steps=5)  # (6, B, 8)

- :class:`PotentialFlow` has the potentials and walks; :func:`wave_residual` says how far a function is from the equation.
- :func:`potential_flow_loss` trains them, with a :class:`PairClassifier`.
- :func:`variation_predictability` judges edits by how well few labelled pairs teach a new classifier to tell them apart.
"""

from __future__ import annotations

from polyak.generate.potential_flows.classifier import PairClassifier, variation_predictability
from polyak.generate.potential_flows.flow import PotentialFlow
from polyak.generate.potential_flows.losses import potential_flow_loss
from polyak.generate.potential_flows.wave import wave_residual

__all__ = ["PairClassifier", "PotentialFlow", "potential_flow_loss", "variation_predictability", "wave_residual"]
