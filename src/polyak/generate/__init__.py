"""Generation from four orthogonal parts: a process (what noise), a solver (how to step), guidance and steering.

Example:
    >>> import torch
    >>> from polyak.generate import VP, Denoiser, DPMSolver, sample
    >>> denoiser = Denoiser(network, VP())  # network(x, t) predicts the noise
    >>> x = sample(denoiser, (16, 3, 32, 32), solver=DPMSolver(), nfe=12, generator=torch.Generator().manual_seed(0))

Problems with known answers are in ``polyak.generate.problems``, schedulers for diffusers in
``polyak.generate.adapters.diffusers``.
"""

from polyak.generate.dpm_solver import DPMSolver, dpm_step
from polyak.generate.guidance import CFG, Guidance
from polyak.generate.prediction import Denoiser, Prediction
from polyak.generate.process import EDM, OU, VE, VP, CosineVP, Discrete, Flow, Process, TrigFlow
from polyak.generate.sampling import DynamicThresholding, SamplingInfo, invert, sample
from polyak.generate.solver import DDIM, RK4, Change, Euler, Heun, Query, RungeKutta, Solver, Step
from polyak.generate.steering import Steering, SteeringState

__all__ = [
    "CFG",
    "DDIM",
    "EDM",
    "OU",
    "RK4",
    "VE",
    "VP",
    "Change",
    "CosineVP",
    "DPMSolver",
    "Denoiser",
    "Discrete",
    "DynamicThresholding",
    "Euler",
    "Flow",
    "Guidance",
    "Heun",
    "Prediction",
    "Process",
    "Query",
    "RungeKutta",
    "SamplingInfo",
    "Solver",
    "Steering",
    "SteeringState",
    "Step",
    "TrigFlow",
    "dpm_step",
    "invert",
    "sample",
]
