"""DPM-Solver and DPM-Solver++: exponential integrators for the diffusion ODE in half-logSNR time.

Lu et al., "DPM-Solver: A Fast ODE Solver for Diffusion Probabilistic Model Sampling in Around 10 Steps", NeurIPS 2022, arXiv
2206.00927; "DPM-Solver++", arXiv 2211.01095. With lam = log(alpha / sigma), a step s -> t of length h = lam_t - lam_s is exactly

    eps form:   x_t = (alpha_t / alpha_s) x_s - alpha_t  int_{lam_s}^{lam_t} exp(-lam) eps(x_lam, lam) dlam
    data form:  x_t = (sigma_t / sigma_s) x_s + sigma_t  int_{lam_s}^{lam_t} exp(+lam)  x0(x_lam, lam) dlam

and a method of order k replaces the network's value m (eps or x0) in the integral by a polynomial of degree k - 1. With
z = h (eps) or -h (data), rho the fraction of the step, ``m ~ m_0 + rho D1 + rho^2 D2 / 2`` gives, for both forms,

    x_t = A x_s - B z [phi_1(z) m_0 + phi_2(z) D1 + phi_3(z) D2],     phi_k(z) = sum_j z^j / (j + k)!

with A = alpha_t / alpha_s, B = sigma_t (eps) or A = sigma_t / sigma_s, B = alpha_t (data). Singlestep methods take m at nodes
rho > 0 within the step, multistep methods at nodes rho < 0, the steps before: one formula (:func:`dpm_step`) serves both.

Usual choices: for unconditional models or weak guidance ``DPMSolverFast()``, order 3, logSNR grid; for strong guidance
``DPMSolverMultistep(order=2, form="data", grid="time")``.
"""

from polyak.generate.dpm_solver.adaptive import DPMSolverAdaptive
from polyak.generate.dpm_solver.base import DPMSolver
from polyak.generate.dpm_solver.multistep import DPMSolverMultistep, DPMSolverSDE
from polyak.generate.dpm_solver.singlestep import DPMSolverFast, DPMSolverSinglestep
from polyak.generate.dpm_solver.step import dpm_step
from polyak.generate.sampling import invert

__all__ = [
    "DPMSolver",
    "DPMSolverAdaptive",
    "DPMSolverFast",
    "DPMSolverMultistep",
    "DPMSolverSDE",
    "DPMSolverSinglestep",
    "dpm_step",
    "invert",
]
