"""Kinetic-optimal paths: the Gaussian path (alpha, sigma) along which a given data set moves least.

Shaul, Chen, Nickel, Le and Lipman, "On Kinetic Optimal Probability Paths for Generative Models", arXiv 2306.06626. The kinetic
energy per dimension of ``x_t = a x1 + m x0`` depends on the data by one function alone, their separation function lambda:

    KE = int a'^2 + m'^2 - (1 - lambda(a / m)) m^2 ((a / m)')^2 dt

:func:`separation_function` estimates it from data, a law or a trained denoiser; :class:`KineticOptimal` is the process of least
energy; :func:`kinetic_energy` is that of any process; :func:`reparametrize` samples a trained model along another path.
"""

from polyak.generate.equal_snr import reparametrize
from polyak.generate.kinetic_optimal.flow_matching import conditional_flow_matching_loss
from polyak.generate.kinetic_optimal.path import KineticOptimal, kinetic_energy
from polyak.generate.kinetic_optimal.separation import Separation, gaussian_separation, separation_function

__all__ = [
    "KineticOptimal",
    "Separation",
    "conditional_flow_matching_loss",
    "gaussian_separation",
    "kinetic_energy",
    "reparametrize",
    "separation_function",
]
