"""Denoising MCMC: a Markov chain near the data, and from it short reverse integrations, in the place of long ones from noise.

Kim and Ye, "Denoising MCMC for Accelerating Diffusion-Based Generative Models" (ICML 2023, arXiv 2209.14593). In the scaled
variable x (of a process with alpha = 1 the state itself) the chain moves in the product of data and noise level,

    p(x, sigma) = p(sigma) (p_data * N(0, sigma^2 I))(x),    p(sigma) uniform in log sigma,

by Denoising Langevin Gibbs: with s the score at level sigma, and xi standard normal,

    x <- x + eta/2 s(x, sigma) + sqrt(eta) xi,    sigma <- from p(sigma | x),

of which the second is a small classifier's answer. From a state (x, sigma) a sample is the solution of the reverse ODE or SDE from
x at its own sigma down to 0. That takes few evaluations, since sigma is far below the largest level.

- :class:`DenoisingLangevinGibbs`: the chains and their samples.
- :class:`NoiseClassifier`, :func:`noise_classifier_loss`, :class:`NoisePosterior`, :func:`noise_levels`: who tells sigma.
- :class:`KarrasHeun` (:func:`heun_per_sample`), :class:`ReverseDiffusion`, :class:`RK45`, :class:`PerSample` (any linear solver of
  the room): integrators that start every row of a batch at a level of its own.
- :func:`autocorrelation`, :func:`effective_sample_size`: how far the samples of a chain are independent.

Two hundred chains, nine evaluations for each sample:

    >>> chains = DenoisingLangevinGibbs(denoiser, process, classifier, eta=0.5, n_skip=4, integrator=KarrasHeun(3))
    >>> chains.warmup((200, 3, 32, 32), generator)
    >>> x = chains.sample(50_000)
"""

from polyak.generate.dmcmc.chain import DenoisingLangevinGibbs
from polyak.generate.dmcmc.correlation import autocorrelation, effective_sample_size
from polyak.generate.dmcmc.integrators import RK45, Integrator, KarrasHeun, PerSample, ReverseDiffusion, heun_per_sample
from polyak.generate.dmcmc.levels import NoiseClassifier, NoisePosterior, noise_classifier_loss, noise_levels

__all__ = [
    "RK45",
    "DenoisingLangevinGibbs",
    "Integrator",
    "KarrasHeun",
    "NoiseClassifier",
    "NoisePosterior",
    "PerSample",
    "ReverseDiffusion",
    "autocorrelation",
    "effective_sample_size",
    "heun_per_sample",
    "noise_classifier_loss",
    "noise_levels",
]
