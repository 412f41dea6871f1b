"""What every option of every diffusers scheduler means to :class:`PolyakScheduler`, as data.

Each option of a scheduler that is taken either *acts*, or is *idle* (it belongs to what our solver replaces; going back keeps
it), or is *refused* unless it has the value that means nothing. Schedulers that cannot be taken are refused whole, with the
reason. A test holds this against the installed diffusers, and the documentation shows it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Family = Literal["chain", "levels", "edm", "flow", "trig"]


@dataclass(frozen=True)
class Acts:
    """The option has its diffusers meaning."""


@dataclass(frozen=True)
class Idle:
    """The option has no meaning here."""

    why: str


@dataclass(frozen=True)
class Refused:
    """The option is refused unless its value is one of ``unless``."""

    why: str
    unless: tuple[Any, ...] = (None, False)


Rule = Acts | Idle | Refused


@dataclass(frozen=True)
class Origin:
    """How one scheduler of diffusers is understood.

    Attributes:
        family: "chain": a chain of betas, samples scaled as alpha x0 + sigma eps; "levels": a chain whose samples are
            x0 + sigma eps; "edm": preconditioned networks; "flow"; "trig": iPNDM.
        options: a rule for each option of its ``__init__``.
        spacing: the way in which its timesteps are spaced.
        final: "option": ``final_sigmas_type``; "alpha": ``set_alpha_to_one``; "zero" or "lowest" always; "last": as
            "lowest", and the last level twice where the levels are spaced by sigma.
        rounds: whether timesteps found for Karras sigmas are rounded.
        gives_x0: whether its step returns the predicted clean data beside the next sample.
        keeps_eps: whether its step clips the predicted data, and not the predicted noise.
        refused: why it is not taken; "" if it is.
    """

    family: Family = "chain"
    options: Mapping[str, Rule] = field(default_factory=dict)
    spacing: Literal["ddim", "dpm", "euler", "lcm"] = "dpm"
    final: Literal["option", "alpha", "zero", "lowest", "last"] = "option"
    rounds: bool = False
    gives_x0: bool = False
    keeps_eps: bool = False
    refused: str = ""


SOLVERS = "of the solver that ours replaces"
PIPELINES = "pipelines compute mu from it"
ACTS = Acts()


def _acts(names: str) -> dict[str, Rule]:
    return dict.fromkeys(names.split(), ACTS)


def _idle(names: str, why: str = SOLVERS) -> dict[str, Rule]:
    return dict.fromkeys(names.split(), Idle(why))


def _refused(why: str, names: str) -> Origin:
    return Origin(options=_idle(names, "refused with its scheduler"), refused=why)


CHAIN = _acts("num_train_timesteps beta_start beta_end beta_schedule trained_betas prediction_type")
SPACED = _acts("timestep_spacing steps_offset")
SHAPES = _acts("use_karras_sigmas use_exponential_sigmas use_beta_sigmas")
FLOW_SIGMAS = _acts("use_flow_sigmas flow_shift")
DYNAMIC = _acts("use_dynamic_shifting time_shift_type")
CLIPPED = _acts("clip_sample clip_sample_range")
THRESHOLD = _acts("thresholding dynamic_thresholding_ratio sample_max_value")
ZERO_SNR = _acts("rescale_betas_zero_snr")
DPM = CHAIN | THRESHOLD | SHAPES | FLOW_SIGMAS
DPM_SOLVER = _idle("solver_order algorithm_type solver_type lower_order_final")

DDIM = CHAIN | SPACED | CLIPPED | THRESHOLD | ZERO_SNR | _acts("set_alpha_to_one")
DDPM = CHAIN | SPACED | CLIPPED | THRESHOLD | ZERO_SNR | _acts("variance_type")
COGVIDEOX = (
    CHAIN
    | SPACED
    | ZERO_SNR
    | _acts("set_alpha_to_one snr_shift_scale")
    | _idle("clip_sample_range sample_max_value", "CogVideoX's schedulers do not clip")
    | {
        "clip_sample": Refused(
            "it is the default, but CogVideoX's schedulers do not clip, and its models were not trained for it; say "
            "PolyakScheduler.from_config(config, solver=..., clip_sample=False)"
        )
    }
)
LEVELS = CHAIN | SPACED | SHAPES
LCM = DDIM | _acts("original_inference_steps") | _idle("timestep_scaling", "of the distilled model's own step")
TCD = LCM | _idle(
    "clip_sample clip_sample_range thresholding dynamic_thresholding_ratio sample_max_value",
    "TCD's step does not act on it",
)
EDM = _acts("sigma_min sigma_max sigma_data sigma_schedule num_train_timesteps prediction_type rho final_sigmas_type")
FLOW_MATCH = (
    _acts("num_train_timesteps shift use_dynamic_shifting invert_sigmas shift_terminal time_shift_type")
    | SHAPES
    | _idle("base_shift max_shift base_image_seq_len max_image_seq_len", PIPELINES)
)
OWN_NOISE = "noise is the solver's own, as in DDIM(eta=1)"
TOKENS = "its states are discrete tokens"
STAGES = "its stages start at resolutions of their own, with noise added in between"
DISTILLED = "its network predicts the end of a trajectory, not a field that a solver could follow"
INVERTS = "it goes from data to noise; use polyak.generate.invert"

TABLE: dict[str, Origin] = {
    "DDIMScheduler": Origin("chain", DDIM, "ddim", "alpha", gives_x0=True, keeps_eps=True),
    "DDIMParallelScheduler": Origin("chain", DDIM, "ddim", "alpha", gives_x0=True, keeps_eps=True),
    "DDPMScheduler": Origin("chain", DDPM, "ddim", "zero", gives_x0=True),
    "DDPMParallelScheduler": Origin("chain", DDPM, "ddim", "zero", gives_x0=True),
    "PNDMScheduler": Origin(
        "chain", CHAIN | SPACED | _acts("set_alpha_to_one") | _idle("skip_prk_steps"), "ddim", "alpha"
    ),
    "CogVideoXDDIMScheduler": Origin("chain", COGVIDEOX, "ddim", "alpha", gives_x0=True),
    "CogVideoXDPMScheduler": Origin("chain", COGVIDEOX, "ddim", "alpha", gives_x0=True),
    "LCMScheduler": Origin("chain", LCM, "lcm", "zero", gives_x0=True),
    "TCDScheduler": Origin("chain", TCD, "lcm", "lowest", gives_x0=True),
    "DPMSolverMultistepScheduler": Origin(
        "chain",
        DPM
        | SPACED
        | ZERO_SNR
        | DYNAMIC
        | DPM_SOLVER
        | _idle("euler_at_final")
        | _acts("use_lu_lambdas final_sigmas_type lambda_min_clipped variance_type"),
        "dpm",
        rounds=True,
    ),
    "DPMSolverSinglestepScheduler": Origin(
        "chain",
        DPM | DYNAMIC | DPM_SOLVER | _acts("final_sigmas_type lambda_min_clipped variance_type"),
        "dpm",
        rounds=True,
    ),
    "UniPCMultistepScheduler": Origin(
        "chain",
        DPM
        | SPACED
        | ZERO_SNR
        | DYNAMIC
        | _idle("solver_order predict_x0 solver_type lower_order_final disable_corrector solver_p")
        | _acts("final_sigmas_type sigma_min sigma_max shift_terminal"),
        "dpm",
        rounds=True,
    ),
    "DEISMultistepScheduler": Origin("chain", DPM | SPACED | DYNAMIC | DPM_SOLVER, "dpm", "last", rounds=True),
    "SASolverScheduler": Origin(
        "chain",
        DPM
        | SPACED
        | _acts("lambda_min_clipped variance_type")
        | _idle("predictor_order corrector_order tau_func algorithm_type lower_order_final"),
        "dpm",
        "last",
        rounds=True,
    ),
    "EulerDiscreteScheduler": Origin(
        "levels",
        LEVELS | ZERO_SNR | _acts("interpolation_type sigma_min sigma_max timestep_type final_sigmas_type"),
        "euler",
        gives_x0=True,
    ),
    "EulerAncestralDiscreteScheduler": Origin("levels", CHAIN | SPACED | ZERO_SNR, "euler", "zero", gives_x0=True),
    "HeunDiscreteScheduler": Origin("levels", LEVELS | CLIPPED, "euler", "zero", gives_x0=True),
    "LMSDiscreteScheduler": Origin("levels", LEVELS, "euler", "zero", gives_x0=True),
    "KDPM2DiscreteScheduler": Origin("levels", LEVELS, "euler", "zero", rounds=True),
    "KDPM2AncestralDiscreteScheduler": Origin("levels", LEVELS, "euler", "zero", rounds=True),
    "DPMSolverSDEScheduler": Origin(
        "levels",
        LEVELS | {"noise_sampler_seed": Refused("noise comes from the generator that step is given")},
        "euler",
        "zero",
    ),
    "EDMEulerScheduler": Origin("edm", EDM, gives_x0=True),
    "EDMDPMSolverMultistepScheduler": Origin("edm", EDM | THRESHOLD | DPM_SOLVER | _idle("euler_at_final")),
    "CosineDPMSolverMultistepScheduler": Origin(
        "edm", EDM | _idle("solver_order solver_type lower_order_final euler_at_final")
    ),
    "IPNDMScheduler": Origin(
        "trig",
        _acts("num_train_timesteps") | {"trained_betas": Refused("they are a schedule for one number of steps")},
        final="zero",
    ),
    "FlowMatchEulerDiscreteScheduler": Origin(
        "flow", FLOW_MATCH | {"stochastic_sampling": Refused(OWN_NOISE)}, final="zero"
    ),
    "FlowMatchHeunDiscreteScheduler": Origin("flow", _acts("num_train_timesteps shift"), final="zero"),
    "FlowMatchLCMScheduler": Origin(
        "flow",
        FLOW_MATCH
        | {"scale_factors": Refused("a solver keeps the size of its samples", (None, (), []))}
        | _idle("upscale_mode", "of scale_factors"),
        final="zero",
    ),
    "DDIMInverseScheduler": _refused(
        INVERTS,
        "num_train_timesteps beta_start beta_end beta_schedule trained_betas clip_sample set_alpha_to_one "
        "steps_offset prediction_type clip_sample_range timestep_spacing rescale_betas_zero_snr",
    ),
    "DPMSolverMultistepInverseScheduler": _refused(
        INVERTS,
        "num_train_timesteps beta_start beta_end beta_schedule trained_betas solver_order prediction_type "
        "thresholding dynamic_thresholding_ratio sample_max_value algorithm_type solver_type "
        "lower_order_final euler_at_final use_karras_sigmas use_exponential_sigmas use_beta_sigmas "
        "use_flow_sigmas flow_shift lambda_min_clipped variance_type timestep_spacing steps_offset",
    ),
    "CMStochasticIterativeScheduler": _refused(
        DISTILLED,
        "num_train_timesteps sigma_min sigma_max sigma_data s_noise rho clip_denoised",
    ),
    "ConsistencyDecoderScheduler": _refused(
        DISTILLED,
        "num_train_timesteps sigma_data",
    ),
    "FlowMapEulerDiscreteScheduler": _refused(
        DISTILLED,
        "num_train_timesteps shift",
    ),
    "PiflowScheduler": _refused(
        DISTILLED,
        "num_train_timesteps shift n_grid eps final_step_size_scale num_policy_substeps",
    ),
    "SCMScheduler": _refused(
        DISTILLED,
        "num_train_timesteps prediction_type sigma_data",
    ),
    "HeliosScheduler": _refused(
        STAGES,
        "num_train_timesteps shift stages stage_range gamma thresholding prediction_type solver_order "
        "predict_x0 solver_type lower_order_final disable_corrector solver_p use_flow_sigmas scheduler_type "
        "use_dynamic_shifting time_shift_type",
    ),
    "HeliosDMDScheduler": _refused(
        STAGES,
        "num_train_timesteps shift stages stage_range gamma prediction_type use_flow_sigmas "
        "use_dynamic_shifting time_shift_type",
    ),
    "LTXEulerAncestralRFScheduler": _refused(
        "its timesteps hold the end, at which no network is asked",
        "num_train_timesteps eta s_noise",
    ),
    "MiniMaxH3Scheduler": _refused(
        "its network is told 1 - sigma and answers the negative velocity",
        "shift",
    ),
    "RFD4ProteinaScheduler": _refused(
        "it scales noise and score of a protein's frames apart",
        "schedule_mode noise_mode tsr_k tsr_sigma tail_steps tail_step_multiplier t_lim_ode t_lim_ode_below",
    ),
    "RePaintScheduler": _refused(
        "it jumps back in time, and its step wants the known part of the image",
        "num_train_timesteps beta_start beta_end beta_schedule eta trained_betas clip_sample",
    ),
    "UnCLIPScheduler": _refused(
        "its pipelines hand the previous timestep to step",
        "num_train_timesteps variance_type clip_sample clip_sample_range prediction_type beta_schedule",
    ),
    "DDPMWuerstchenScheduler": _refused(
        "its timesteps hold the end, and its pipelines ask at them row by row",
        "scaler s",
    ),
    "ScoreSdeVeScheduler": _refused(
        "its pipeline calls step_pred and step_correct, a predictor and a corrector",
        "num_train_timesteps snr sigma_min sigma_max sampling_eps correct_steps",
    ),
    "ScoreSdeVpScheduler": _refused(
        "its pipeline calls step_pred",
        "num_train_timesteps beta_min beta_max sampling_eps",
    ),
    "KarrasVeScheduler": _refused(
        "its pipeline calls add_noise_to_input and step_correct",
        "sigma_min sigma_max s_noise s_churn s_min s_max",
    ),
    "AmusedScheduler": _refused(
        TOKENS,
        "mask_token_id masking_schedule",
    ),
    "BlockRefinementScheduler": _refused(
        TOKENS,
        "block_length num_inference_steps threshold editing_threshold minimal_topk",
    ),
    "DiscreteDDIMScheduler": _refused(
        TOKENS,
        "num_inference_steps corrector_steps corrector_k corrector_selection corrector_selection_tau",
    ),
    "EntropyBoundScheduler": _refused(
        TOKENS,
        "entropy_bound t_max t_min num_inference_steps",
    ),
    "VQDiffusionScheduler": _refused(
        TOKENS,
        "num_vec_classes num_train_timesteps alpha_cum_start alpha_cum_end gamma_cum_start gamma_cum_end",
    ),
}

# PolyakScheduler without a scheduler that it came from: as DPMSolverMultistepScheduler, with what others have.
_DPM = TABLE["DPMSolverMultistepScheduler"]
_LEVELS_ONLY = 'it belongs to EulerDiscreteScheduler; say so with origin="EulerDiscreteScheduler"'
OWN = Origin(
    "chain",
    {
        **_DPM.options,
        **CLIPPED,
        **_acts("set_alpha_to_one snr_shift_scale sigma_min sigma_max sigma_data shift_terminal"),
        **_idle("skip_prk_steps predict_x0 disable_corrector solver_p"),
        "interpolation_type": Refused(_LEVELS_ONLY, (None, "linear")),
        "timestep_type": Refused(_LEVELS_ONLY, (None, "discrete")),
    },
    "dpm",
    rounds=True,
    gives_x0=True,
)
OWN_DEFAULTS: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "trained_betas": None,
    "prediction_type": "epsilon",
    "timestep_spacing": "linspace",
    "steps_offset": 0,
    "rescale_betas_zero_snr": False,
    "sigma_data": 0.5,
}

# Of diffusers' classes that need torchsde, which cannot be asked where it is not installed.
DEFAULTS: dict[str, dict[str, Any]] = {
    "CosineDPMSolverMultistepScheduler": {
        "sigma_min": 0.3,
        "sigma_max": 500,
        "sigma_data": 1.0,
        "sigma_schedule": "exponential",
        "num_train_timesteps": 1000,
        "solver_order": 2,
        "prediction_type": "v_prediction",
        "rho": 7.0,
        "solver_type": "midpoint",
        "lower_order_final": True,
        "euler_at_final": False,
        "final_sigmas_type": "zero",
    },
    "DPMSolverSDEScheduler": {
        "num_train_timesteps": 1000,
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "linear",
        "trained_betas": None,
        "prediction_type": "epsilon",
        "use_karras_sigmas": False,
        "use_exponential_sigmas": False,
        "use_beta_sigmas": False,
        "noise_sampler_seed": None,
        "timestep_spacing": "linspace",
        "steps_offset": 0,
    },
}

# Schedulers whose configurations are the same to the last value, and do not mean the same.
TWINS = {"LCMScheduler": "TCDScheduler"}
# Of versions of diffusers that no longer are: with these values they mean what is done now.
OLD: dict[str, tuple[Any, ...]] = {
    "tensor_format": ("pt", None),
    "timestep_values": (None,),
    "predict_epsilon": (True, None),
    "set_alpha_to_zero": (None,),
}
# What some schedulers' step takes besides, with the values that ask for nothing; ... is any.
STEPS: dict[str, tuple[Any, ...]] = {
    "s_churn": (0, 0.0),
    "s_tmin": (...,),
    "s_tmax": (...,),
    "s_noise": (...,),
    "order": (...,),  # of LMSDiscreteScheduler
    "variance_noise": (None,),
    "per_token_timesteps": (None,),
    "pred_original_sample": (None,),
    "prev_timestep": (None,),
}
# Every option of any scheduler: what one class does not have is kept for the others, as diffusers keeps it.
KNOWN = {name for origin in TABLE.values() for name in origin.options} | set(OWN.options)
