r"""Feynman-Kac correctors: samples of annealed, composed, guided and tilted models that follow the law they are said to follow.

Skreta et al., "Feynman-Kac Correctors in Diffusion: Annealing, Guidance, and Product of Experts" (ICML 2025, arXiv 2503.02819).
Scores that are multiplied or added do not generate the product of the models. With experts ``q_t^i`` of one process
``dx = f dt + sigma dW``, scores ``s_i``, powers ``beta_i``, ``S = sum_i beta_i s_i`` and reverse time ``tau``, particles that move
by

    dx = [-f + (1 + zeta^2)/2 sigma^2 S + zeta^2/2 sigma^2 grad rho] dtau + zeta sigma dW

and carry log-weights ``dw = g dtau``,

    g = (sum_i beta_i - 1) div f + sigma^2/2 (|S|^2 - sum_i beta_i |s_i|^2)
        + d_tau rho + <grad rho, sigma^2/2 S - f> + sum_i (d_tau beta_i) log q_t^i,

follow ``p_t`` proportional to ``prod_i (q_t^i)^{beta_i} exp(rho_t)`` once they are weighed, whatever ``zeta >= 0`` is. One expert
is annealing, several are a product, powers (1 - w, w) are guidance, rho is a reward.

- :class:`Composed`: experts and their powers as one denoiser. It starts from the law that it needs, which is not the process's.
- :class:`FeynmanKacCorrector`: the weights and the resampling, a steering.
- :class:`ReverseSDE`: the Euler-Maruyama steps above, for any zeta; the room's other stochastic solvers have zeta = 1.
- :func:`fkc_weight`, :func:`initial_scale`: the formulas by themselves.

At a third of the temperature, two hundred particles for each of four systems:

    >>> cold = Composed([(denoiser, 3.0)])
    >>> corrector = FeynmanKacCorrector("anneal", num_particles=200)
    >>> x = sample(cold, (4, 2), solver=ReverseSDE(), steps=200, grid="karras", steering=corrector)
"""

from polyak.generate.fkc.composed import Composed
from polyak.generate.fkc.corrector import FeynmanKacCorrector, FKCState
from polyak.generate.fkc.reverse import ReverseSDE
from polyak.generate.fkc.weight import fkc_weight, initial_scale

__all__ = [
    "Composed",
    "FKCState",
    "FeynmanKacCorrector",
    "ReverseSDE",
    "fkc_weight",
    "initial_scale",
]
