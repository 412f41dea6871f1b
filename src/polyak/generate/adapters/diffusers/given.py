"""A user's own process in place of the one that a configuration defines, and which of the configuration's options still act.

What makes a process is replaced, and kept for going back. All else acts, or is refused by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from polyak.generate.adapters.diffusers.levels import SHAPES, Table
from polyak.generate.adapters.diffusers.options import Acts, Origin
from polyak.generate.prediction import check_kind
from polyak.generate.process import EDM, Discrete, Flow, ProbabilityPath


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


ALWAYS = _names(
    "prediction_type sigma_data clip_sample clip_sample_range thresholding dynamic_thresholding_ratio sample_max_value "
    "variance_type"
)
ON_CHAINS = _names(
    "trained_betas num_train_timesteps timestep_spacing steps_offset set_alpha_to_one final_sigmas_type "
    "original_inference_steps lambda_min_clipped"
)
ON_FLOWS = _names(
    "num_train_timesteps shift flow_shift use_dynamic_shifting time_shift_type shift_terminal set_alpha_to_one "
    "final_sigmas_type"
)
# What the process replaces; refused only where it is written by hand.
MAKES = _names(
    "num_train_timesteps beta_start beta_end beta_schedule trained_betas snr_shift_scale sigma_min sigma_max rho "
    "sigma_schedule"
)
GRIDS = {"use_karras_sigmas": "karras", "use_lu_lambdas": "logsnr", "use_exponential_sigmas": "logsnr"}
SPACES = _names("timestep_spacing steps_offset final_sigmas_type set_alpha_to_one lambda_min_clipped")


def _is_flow_match(facts: Origin, process: ProbabilityPath) -> bool:
    """Whether the process is that of the configuration's own kind, a flow: then all of the options act."""
    return facts.family == "flow" and isinstance(process, Flow)


def _acting(facts: Origin, process: ProbabilityPath) -> frozenset[str]:
    acting = ALWAYS | set(GRIDS)
    if isinstance(process, Discrete):
        acting |= ON_CHAINS
    if isinstance(process, Flow):
        acting |= ON_FLOWS
    if _is_flow_match(facts, process):
        acting |= {"invert_sigmas", *SHAPES}
    return acting


def check(
    config: Mapping[str, Any],
    defaults: Mapping[str, Any],
    facts: Origin,
    process: ProbabilityPath,
    by_hand: frozenset[str],
) -> None:
    """ValueError for an option that cannot act on a process.

    Args:
        config: all options.
        defaults: those of the scheduler that they belong to, with which they mean nothing.
        facts: of this scheduler.
        process: the one that is given.
        by_hand: the options that were written beside it, and did not come with a configuration.
    """
    acting = _acting(facts, process)
    for name, value in config.items():
        if name in acting or not isinstance(facts.options.get(name), Acts):
            continue
        default = defaults.get(name)
        if value is None or value is False or value == default or (name in MAKES and name not in by_hand):
            continue
        raise ValueError(
            f"{name}={value!r} has no meaning for a process that is given, {process!r}; say {name}={default!r}"
        )


def grid_of(config: Mapping[str, Any], facts: Origin, process: ProbabilityPath) -> str | None:
    """The kind of grid that the options ask for."""
    if _is_flow_match(facts, process):
        return None
    return next((grid for name, grid in GRIDS.items() if config.get(name) and name in facts.options), None)


def make(config: Mapping[str, Any], facts: Origin, process: ProbabilityPath) -> dict[str, Any]:
    """What a plan says of a process that is given."""
    usual = {"flow": "flow_prediction", "trig": "v_prediction"}.get(facts.family, "epsilon")
    word = config.get("prediction_type") or usual
    kind: str = check_kind("prediction_type", "sample" if word == "original_sample" else word)
    gain, data = 1.0, config.get("sigma_data", 0.5)
    if facts.family == "edm" and kind in ("epsilon", "v_prediction"):
        kind, gain = "edm", 1.0 if kind == "epsilon" else -1.0
    elif facts.family == "levels" and kind == "v_prediction" and isinstance(process, EDM):
        kind, gain, data = "edm", -1.0, 1.0  # v of the scaled sample
    elif _is_flow_match(facts, process) and config.get("invert_sigmas"):
        gain = -1.0
    made = {"process": process, "kind": kind, "gain": gain, "sigma_data": data, "given": True}
    made["input_data"] = data if kind == "edm" else 1.0 if isinstance(process, EDM) else None
    if isinstance(process, Discrete):
        products = (2 * process._table).exp()
        made["table"] = Table((1 - products[1:] / products[:-1]).float(), products[1:].float())
    return made
