"""Gauge freedom: which part of a learned score decides samples and densities, and which only the local geometry.

Horvat and Pfister, "On gauge freedom, conservativity and intrinsic dimensionality estimation in diffusion models", ICLR 2024,
arXiv 2402.03845. Let p be the law at t, ``s* = grad log p`` its score, s a learned field. Every s splits in one way into

    s = grad phi + R,     div(p R) = 0,     E_p[grad phi . R] = 0.

R is a *gauge*: it moves samples about within p and leaves p as it is. Where ``grad phi = s*`` at all t, the probability-flow ODE
and the reverse SDE with s have exactly the marginals p_t, and likelihoods by the ODE are exact, whatever R. Whether s has a
potential (is conservative) is another matter: a field with one can be wrong, one without can be exact. But R adds components along
the data's manifold that are as large as the score, and what is read from the field at a point changes with it.

- Gauges: :func:`gauge_residual` and :func:`gauge_moments` measure how far a field is from the score up to a gauge;
  :func:`antisymmetric_gauge` and :func:`matrix_gauge` make fields that differ from a score by a gauge.
- The split: :func:`project_conservative`; :class:`EnergyScore` is a network without R, :func:`conservativity_penalty` trains it
  away, :func:`jacobian_asymmetry` measures it.
- Geometry: :func:`flow_jacobian` and :func:`intrinsic_dimension`.
- :func:`log_likelihood` is the room's.
"""

from polyak.generate.fields import log_likelihood
from polyak.generate.gauge_freedom.conservative import (
    EnergyScore,
    Projection,
    conservativity_penalty,
    jacobian_asymmetry,
    project_conservative,
)
from polyak.generate.gauge_freedom.dimension import Dimension, flow_jacobian, intrinsic_dimension
from polyak.generate.gauge_freedom.gauges import antisymmetric_gauge, gauge_moments, gauge_residual, matrix_gauge

__all__ = [
    "Dimension",
    "EnergyScore",
    "Projection",
    "antisymmetric_gauge",
    "conservativity_penalty",
    "flow_jacobian",
    "gauge_moments",
    "gauge_residual",
    "intrinsic_dimension",
    "jacobian_asymmetry",
    "log_likelihood",
    "matrix_gauge",
    "project_conservative",
]
