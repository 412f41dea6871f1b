"""The gap between samples of the ODE and of the SDE, seen through the Fokker-Planck equation: measured, bounded, and closed.

Deveney, Stanczuk, Kreusser, Budd, Schoenlieb, "Closing the ODE-SDE gap in score-based diffusion models through the
Fokker-Planck equation", arXiv 2311.15996; Phil. Trans. R. Soc. A 383, 20240503 (2025). With the forward process
``dx = f dt + g dW`` and a network ``u(x, t) ~ log p_t(x)`` whose gradient is the score, the true log density has no residual

    R = u_t + div f + f.grad u - g^2/2 (lap u + |grad u|^2).

With the true score the probability-flow ODE and the reverse SDE make one law. With a learned one they do not, and R says by how
much: ``R = 0`` and ``u(., T) = log prior`` give ``p_ODE = p_SDE = e^u``.

- Diagnose: :func:`log_fp_residual` of a potential, :func:`score_fp_residual` of any denoiser; :func:`ode_sde_gap` by sampling;
  :func:`wasserstein_bound`, what the gap can be at most; :func:`exact_ode_logdensity`, what R does to the ODE's density.
- Train: :func:`fp_regularized_loss` for a :class:`PotentialNet`, or any smooth scalar network.
- The paper's measure: :func:`histogram_w2`.
"""

from polyak.generate.fokker_planck_gap.density import GapBound, exact_ode_logdensity, wasserstein_bound
from polyak.generate.fokker_planck_gap.gap import Gap, histogram_w2, ode_sde_gap
from polyak.generate.fokker_planck_gap.residual import log_fp_residual, score_fp_residual
from polyak.generate.fokker_planck_gap.training import PotentialNet, fp_regularized_loss

__all__ = [
    "Gap",
    "GapBound",
    "PotentialNet",
    "exact_ode_logdensity",
    "fp_regularized_loss",
    "histogram_w2",
    "log_fp_residual",
    "ode_sde_gap",
    "score_fp_residual",
    "wasserstein_bound",
]
