"""Momentum in multistep solvers: wider stability at few steps and under strong guidance.

Wizadwongsa, Chinchuthakun, Khungurn, Raj and Suwajanakorn, "Diffusion Sampling with Momentum for Mitigating Divergence
Artifacts", ICLR 2024, arXiv 2307.11118.

In ``y = x / alpha`` and ``s = sigma / alpha`` every diffusion ODE is ``dy/ds = eps``. A linear multistep method steps by
``y + delta M_k(eps)``; heavy-ball momentum averages what is stepped by,

    v_n = (1 - beta) v_(n-1) + beta M_k(eps),        y_(n+1) = y_n + delta v_n            (HB, first order)
    v_n = (1 - beta) v_(n-1) + beta eps_n,           y_(n+1) = y_n + delta M_k(v; beta)   (GHVB, order k)

with ``delta = s_(n+1) - s_n``. beta = 1 is the method without momentum.
"""

from polyak.generate.ghvb.artifacts import artifact_score
from polyak.generate.ghvb.coefficients import ab_coefficients, stability_limit, stability_region
from polyak.generate.ghvb.dpm import HeavyBallDPM
from polyak.generate.ghvb.multistep import GHVB, HeavyBall, Nesterov

__all__ = [
    "GHVB",
    "HeavyBall",
    "HeavyBallDPM",
    "Nesterov",
    "ab_coefficients",
    "artifact_score",
    "stability_limit",
    "stability_region",
]
