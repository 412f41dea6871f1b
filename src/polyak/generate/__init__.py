"""Generation from four orthogonal parts: a process (what noise), a solver (how to step), guidance and steering.

Example:
    >>> import torch
    >>> from polyak.generate import VP, Denoiser, DPMSolver, sample
    >>> denoiser = Denoiser(network, VP())  # network(x, t) predicts the noise
    >>> x = sample(denoiser, (16, 3, 32, 32), solver=DPMSolver(), nfe=12, generator=torch.Generator().manual_seed(0))

Problems with known answers are in ``polyak.generate.problems``, small networks to train in ``polyak.generate.networks``,
schedulers for diffusers in ``polyak.generate.adapters.diffusers``.
"""

from polyak.generate.apg import APG, APGState, normalized_guidance
from polyak.generate.checking import check_process, check_solver
from polyak.generate.cogdpm import (
    ContextDropout,
    Forecast,
    PrecisionGuidance,
    PrecisionState,
    context_denoiser,
    ensemble_forecast,
)
from polyak.generate.ddim import DDIM
from polyak.generate.dmcmc import (
    DenoisingLangevinGibbs,
    KarrasHeun,
    NoiseClassifier,
    NoisePosterior,
    PerSample,
    ReverseDiffusion,
    heun_per_sample,
    noise_classifier_loss,
    noise_levels,
)
from polyak.generate.dpm_solver import (
    DPMSolver,
    DPMSolverAdaptive,
    DPMSolverFast,
    DPMSolverMultistep,
    DPMSolverSDE,
    DPMSolverSinglestep,
    dpm_step,
)
from polyak.generate.evaluate import DynamicThresholding, Evaluator
from polyak.generate.fields import divergence, log_likelihood
from polyak.generate.fk_steering import FKSteering
from polyak.generate.fkc import (
    Composed,
    FeynmanKacCorrector,
    FKCState,
    ReverseSDE,
    fkc_weight,
    initial_scale,
)
from polyak.generate.fokker_planck_gap import (
    Gap,
    GapBound,
    PotentialNet,
    exact_ode_logdensity,
    fp_regularized_loss,
    histogram_w2,
    log_fp_residual,
    ode_sde_gap,
    score_fp_residual,
    wasserstein_bound,
)
from polyak.generate.gauge_freedom import (
    Dimension,
    EnergyScore,
    Projection,
    antisymmetric_gauge,
    conservativity_penalty,
    flow_jacobian,
    gauge_moments,
    gauge_residual,
    intrinsic_dimension,
    jacobian_asymmetry,
    matrix_gauge,
    project_conservative,
)
from polyak.generate.geotdm import EGTN, GeometricTrajectoryDiffusion
from polyak.generate.ghvb import (
    GHVB,
    HeavyBall,
    HeavyBallDPM,
    Nesterov,
    ab_coefficients,
    artifact_score,
    stability_limit,
    stability_region,
)
from polyak.generate.guidance import CFG, Guidance
from polyak.generate.interpolants import GaussianMixtureInterpolant, Interpolant, interpolant_loss
from polyak.generate.kinetic_optimal import (
    KineticOptimal,
    Separation,
    conditional_flow_matching_loss,
    gaussian_separation,
    kinetic_energy,
    reparametrize,
    separation_function,
)
from polyak.generate.linear import LinearSolver, Memory, Stage
from polyak.generate.meta_flow import MetaFlowMatching, MetaVelocity, PopulationEncoder
from polyak.generate.pfgmpp import PFGMPP, inject_noise, pfgmpp_loss, quantize_weights, stf_target
from polyak.generate.potential_flows import (
    PairClassifier,
    PotentialFlow,
    potential_flow_loss,
    variation_predictability,
    wave_residual,
)
from polyak.generate.prediction import Denoiser, Prediction, PredictionLike
from polyak.generate.process import (
    EDM,
    OU,
    VE,
    VP,
    CosineVP,
    Discrete,
    Flow,
    ProbabilityPath,
    Process,
    TrigFlow,
)
from polyak.generate.runge_kutta import RK4, Euler, Heun, RungeKutta
from polyak.generate.sampling import SamplingInfo, invert, sample
from polyak.generate.solver import Change, Query, Solver, Step, drive, resume
from polyak.generate.steering import Steering, SteeringState
from polyak.generate.training import denoising_loss, train_denoiser

__all__ = [
    "APG",
    "CFG",
    "DDIM",
    "EDM",
    "EGTN",
    "GHVB",
    "OU",
    "PFGMPP",
    "RK4",
    "VE",
    "VP",
    "APGState",
    "Change",
    "Composed",
    "ContextDropout",
    "CosineVP",
    "DPMSolver",
    "DPMSolverAdaptive",
    "DPMSolverFast",
    "DPMSolverMultistep",
    "DPMSolverSDE",
    "DPMSolverSinglestep",
    "Denoiser",
    "DenoisingLangevinGibbs",
    "Dimension",
    "Discrete",
    "DynamicThresholding",
    "EnergyScore",
    "Euler",
    "Evaluator",
    "FKCState",
    "FKSteering",
    "FeynmanKacCorrector",
    "Flow",
    "Forecast",
    "Gap",
    "GapBound",
    "GaussianMixtureInterpolant",
    "GeometricTrajectoryDiffusion",
    "Guidance",
    "HeavyBall",
    "HeavyBallDPM",
    "Heun",
    "Interpolant",
    "KarrasHeun",
    "KineticOptimal",
    "LinearSolver",
    "Memory",
    "MetaFlowMatching",
    "MetaVelocity",
    "Nesterov",
    "NoiseClassifier",
    "NoisePosterior",
    "PairClassifier",
    "PerSample",
    "PopulationEncoder",
    "PotentialFlow",
    "PotentialNet",
    "PrecisionGuidance",
    "PrecisionState",
    "Prediction",
    "PredictionLike",
    "ProbabilityPath",
    "Process",
    "Projection",
    "Query",
    "ReverseDiffusion",
    "ReverseSDE",
    "RungeKutta",
    "SamplingInfo",
    "Separation",
    "Solver",
    "Stage",
    "Steering",
    "SteeringState",
    "Step",
    "TrigFlow",
    "ab_coefficients",
    "antisymmetric_gauge",
    "artifact_score",
    "check_process",
    "check_solver",
    "conditional_flow_matching_loss",
    "conservativity_penalty",
    "context_denoiser",
    "denoising_loss",
    "divergence",
    "dpm_step",
    "drive",
    "ensemble_forecast",
    "exact_ode_logdensity",
    "fkc_weight",
    "flow_jacobian",
    "fp_regularized_loss",
    "gauge_moments",
    "gauge_residual",
    "gaussian_separation",
    "heun_per_sample",
    "histogram_w2",
    "initial_scale",
    "inject_noise",
    "interpolant_loss",
    "intrinsic_dimension",
    "invert",
    "jacobian_asymmetry",
    "kinetic_energy",
    "log_fp_residual",
    "log_likelihood",
    "matrix_gauge",
    "noise_classifier_loss",
    "noise_levels",
    "normalized_guidance",
    "ode_sde_gap",
    "pfgmpp_loss",
    "potential_flow_loss",
    "project_conservative",
    "quantize_weights",
    "reparametrize",
    "resume",
    "sample",
    "score_fp_residual",
    "separation_function",
    "stability_limit",
    "stability_region",
    "stf_target",
    "train_denoiser",
    "variation_predictability",
    "wasserstein_bound",
    "wave_residual",
]
