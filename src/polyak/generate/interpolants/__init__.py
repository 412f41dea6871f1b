"""Stochastic interpolants: bridges between any two laws, trained once, sampled by an ODE or by SDEs of any noise level.

In its own time t in [0, 1], with ``x0 ~ rho0`` (source), ``x1 ~ rho1`` (target) and ``z ~ N(0, I)``,

    x_t = I(t, x0, x1) + gamma(t) z,    I(0) = x0, I(1) = x1, gamma(0) = gamma(1) = 0.

Its law rho_t is that of ``dX = b dt`` and of ``dX = (b + eps s) dt + sqrt(2 eps) dW`` for every ``eps(t) >= 0``, where

    v = E[dI/dt | x_t = x],  eta = E[z | x_t = x],  s = grad log rho_t = -eta / gamma,  b = v + gamma' eta = v - gamma gamma' s

(Albergo, Boffi, Vanden-Eijnden, arXiv 2303.08797). Data to data is its use; a one-sided interpolant, whose source is noise, is a
process of this room: :meth:`Interpolant.as_process`.

Example:
    >>> bridge = Interpolant("linear", "brownian")
    >>> loss = interpolant_loss("b", net_b, x0, x1, bridge).mean() + interpolant_loss("s", net_s, x0, x1, bridge).mean()
    >>> y1 = integrate(Fields(bridge, b=net_b, s=net_s), y0, eps=0.5, steps=100)
"""

from polyak.generate.interpolants.fields import Fields
from polyak.generate.interpolants.losses import interpolant_loss
from polyak.generate.interpolants.mixtures import GaussianMixtureInterpolant
from polyak.generate.interpolants.path import Interpolant, LinearPath
from polyak.generate.interpolants.solve import integrate, log_likelihood, optimal_eps

__all__ = [
    "Fields",
    "GaussianMixtureInterpolant",
    "Interpolant",
    "LinearPath",
    "integrate",
    "interpolant_loss",
    "log_likelihood",
    "optimal_eps",
]
