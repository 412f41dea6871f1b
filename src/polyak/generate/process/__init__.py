"""Noising processes ``x_t = alpha(t) x0 + sigma(t) eps``: data at small t, noise at large t, always.

A process is its two schedules. All else follows from them, for every process alike:

- half log-SNR ``lam = log alpha - log sigma`` (decreases in t), ``sigma_hat = sigma / alpha = exp(-lam)``;
- forward SDE ``dx = f x dt + g dW`` with ``f = d log alpha / dt`` and ``g^2 = -2 sigma^2 dlam/dt``;
- probability-flow ODE ``dx/dt = f x - g^2 score / 2 = alpha' x0_hat + sigma' eps_hat``.

Schedules are computed in float64, whatever the dtype of t, and returned in t's dtype: a number gives a number, a tensor a
tensor of its shape. Sources: Song et al., arXiv 2011.13456 (VP, VE); Nichol and Dhariwal, arXiv 2102.09672 (cosine);
Karras et al., arXiv 2206.00364 (EDM, the rho grid); Lipman et al., arXiv 2210.02747 (Flow); Lu and Song, arXiv 2410.11081
(TrigFlow); Lu et al., arXiv 2206.00927 (inverses in lam, the logSNR grid).
"""

from polyak.generate.process.base import RHO, Process
from polyak.generate.process.conversion import convert
from polyak.generate.process.interpolant import Interpolant, LinearVPPath, PolynomialPath
from polyak.generate.process.masked import MaskedProcess
from polyak.generate.process.path import (
    GRIDS,
    Generators,
    Moment,
    Moments,
    ProbabilityPath,
    check_batch,
    expand,
    standard_normal,
    wide,
)
from polyak.generate.process.schedules import EDM, OU, VE, VP, CosineVP, Discrete, Flow, TrigFlow

# As papers on flow models call them.
LinearPath, VPPath, CosinePath = Flow, VP, TrigFlow

__all__ = [
    "EDM",
    "GRIDS",
    "OU",
    "RHO",
    "VE",
    "VP",
    "CosinePath",
    "CosineVP",
    "Discrete",
    "Flow",
    "Generators",
    "Interpolant",
    "LinearPath",
    "LinearVPPath",
    "MaskedProcess",
    "Moment",
    "Moments",
    "PolynomialPath",
    "ProbabilityPath",
    "Process",
    "TrigFlow",
    "VPPath",
    "check_batch",
    "convert",
    "expand",
    "standard_normal",
    "wide",
]
