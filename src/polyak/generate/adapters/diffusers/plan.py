"""From a scheduler's configuration to what a run needs: the process, what the network's output is, what corrects it.

:func:`read` is a pure function. It refuses what it cannot take, by name; :mod:`.schedule` then finds the times of a run.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from diffusers import schedulers as theirs
from torch import Tensor

from polyak.core import checks
from polyak.generate.adapters.diffusers.levels import (
    SHAPES,
    SPACINGS,
    Arctan,
    ChainLevels,
    Table,
    Trig,
    table_of,
)
from polyak.generate.adapters.diffusers.options import (
    DEFAULTS,
    KNOWN,
    OLD,
    OWN,
    OWN_DEFAULTS,
    TABLE,
    Acts,
    Origin,
    Refused,
)
from polyak.generate.evaluate import Corrector, DynamicThresholding
from polyak.generate.prediction import check_kind
from polyak.generate.process import EDM, Discrete, Flow, ProbabilityPath

PARTS = ("solver", "process", "origin", "grid")  # of the configuration: our own
WORDS = {"flow": "flow_prediction", "eps": "epsilon", "x0": "sample", "v": "v_prediction"}  # ours to diffusers'
VALUES = {
    "timestep_spacing": SPACINGS,
    "final_sigmas_type": ("zero", "sigma_min"),
    "time_shift_type": ("exponential", "linear"),
    "interpolation_type": ("linear", "log_linear"),
    "timestep_type": ("discrete", "continuous"),
    "sigma_schedule": ("karras", "exponential"),
}
FLOW_END = 1e-9  # below it nothing is asked: the last step of a flow ends on clean data


class Clipping:
    """The predicted data, clipped to [-limit, limit]."""

    def __init__(self, limit: float) -> None:
        self.limit = checks.positive("clip_sample_range", limit)

    def __call__(self, x0: Tensor, t: float) -> Tensor:
        return x0.clamp(-self.limit, self.limit)


@dataclass(frozen=True)
class Plan:
    """What a configuration means.

    Attributes:
        origin: the diffusers scheduler that it belongs to; None for none.
        facts: of that scheduler.
        config: all options, with the defaults of the scheduler.
        process: what noise.
        kind: the dialect of the network's output, once multiplied by ``gain``.
        sigma_data: for "edm".
        input_data: the network is given ``y / sqrt(sigma_hat^2 + input_data^2)``; None: it is given the sample.
        corrector: of the predicted data.
        learned: whether a network's output may have a second half, of variances.
        table: the chain.
        given: whether the process was given, and not made from the options.
        grid: a kind of time grid that overrides the options.
    """

    origin: str | None
    facts: Origin
    config: Mapping[str, Any]
    process: Any
    kind: str
    gain: float = 1.0
    sigma_data: float = 0.5
    input_data: float | None = None
    corrector: Corrector | None = None
    learned: bool = False
    table: Table | None = None
    given: bool = False
    grid: str | None = None

    @property
    def train_steps(self) -> int:
        """``num_train_timesteps``."""
        return int(self.config["num_train_timesteps"])

    @property
    def is_flow(self) -> bool:
        return isinstance(self.process, Flow)

    @property
    def shape(self) -> str | None:
        """The option by which levels are spaced; None for the timesteps' own levels."""
        active = [name for name in SHAPES if self.config.get(name) and name in self.facts.options]
        return active[0] if active else None


def defaults_of(origin: str | None) -> dict[str, Any]:
    """The options of a scheduler, with the values they have when they are left out."""
    if origin is None:
        return dict(OWN_DEFAULTS)
    if origin in DEFAULTS:
        return dict(DEFAULTS[origin])
    found = getattr(theirs, origin, None)
    if found is None:
        raise ValueError(f"the installed diffusers has no {origin}")
    empty = inspect.Parameter.empty
    parameters = inspect.signature(found.__init__).parameters.items()
    return {name: p.default for name, p in parameters if name != "self" and p.default is not empty}


def names_of(origin: str | None) -> set[str]:
    """The options that a scheduler has."""
    return {*defaults_of(origin), *facts_of(origin).options}


def identify(config: Mapping[str, Any]) -> str | None:
    """The scheduler that a configuration in memory belongs to, which does not hold its name: by the options it has.

    Schedulers with the same options are told apart by the defaults that were used, and else mean the same to us.
    """
    keys, used = set(config), config.get("_use_default_values", ())
    best: tuple[int, int] = (0, 0)
    found = None
    for name in sorted(TABLE, key=lambda n: -len(keys & set(TABLE[n].options))):
        if len(keys & set(TABLE[name].options)) < best[0]:
            break
        if name not in DEFAULTS and not hasattr(theirs, name):
            continue
        defaults = defaults_of(name)
        names = set(defaults) or set(TABLE[name].options)
        score = (len(names), -sum(k in defaults and config[k] != defaults[k] for k in used))
        if names <= keys and all(k in names or k in PARTS for k in used) and score > best:
            best, found = score, name
    return found


def _is_one_of(value: Any, allowed: tuple[Any, ...]) -> bool:
    return any(value is a or (type(value) is type(a) and value == a) for a in allowed)


def _passes(name: str, value: Any, origin: str | None) -> bool:
    """Whether an option that the scheduler is not known to have may be there: it means nothing, or belongs to another one."""
    if name in OLD:
        return _is_one_of(value, OLD[name])
    if name in (own := defaults_of(origin)):  # of a newer diffusers
        return _is_one_of(value, (own[name],))
    known = name in KNOWN or any(name in defaults_of(c) for c in TABLE if c not in DEFAULTS and hasattr(theirs, c))
    return known and (origin is not None or value is None or value is False)


def check_options(config: Mapping[str, Any], origin: str | None) -> None:
    """Refuse what is not taken: a whole scheduler, an option, or an option that nobody knows."""
    facts = facts_of(origin)
    whose = origin or "PolyakScheduler"
    for name, value in config.items():
        if name.startswith("_") or name in PARTS:
            continue
        rule = facts.options.get(name)
        if isinstance(rule, Refused) and not _is_one_of(value, rule.unless):
            raise ValueError(f"{name}={value!r} of {whose} cannot be taken: {rule.why}")
        if rule is None and not _passes(name, value, origin):
            owners = [n for n, o in TABLE.items() if isinstance(o.options.get(name), Acts)]
            belongs = f"it belongs to {', '.join(owners)}; say whose configuration this is with origin="
            raise ValueError(f"{name}={value!r} is not an option of {whose}: {belongs if owners else 'unknown'}")
    active = [name for name in SHAPES if config.get(name) and name in facts.options]
    if len(active) > 1:
        raise ValueError(f"only one of {', '.join(active)} can be used")
    if config.get("use_flow_sigmas") and "use_flow_sigmas" in facts.options:
        karras = origin == "UniPCMultistepScheduler" and active == ["use_karras_sigmas"]
        if active and not karras:
            raise ValueError(
                f"{active[0]} cannot be used with use_flow_sigmas: it spaces the levels of a chain of betas"
            )
    elif config.get("shift_terminal") and "flow_shift" in facts.options:
        raise ValueError(f"shift_terminal={config['shift_terminal']!r} needs use_flow_sigmas")
    if origin is None and not active:
        for name in ("sigma_min", "sigma_max"):
            if config.get(name) is not None:
                raise ValueError(f"{name}={config[name]!r} has no meaning without one of {', '.join(SHAPES)}")
    if active and config.get("grid") is not None:
        raise ValueError(f"grid={config['grid']!r} and {active[0]} exclude each other")


def facts_of(origin: str | None) -> Origin:
    """How a scheduler is understood; ValueError if it is not."""
    if origin is None:
        return OWN
    if origin not in TABLE:
        raise ValueError(
            f"no meaning is known for a configuration of {origin!r}; if it is like one of diffusers', say "
            f"origin=, one of {', '.join(n for n, o in TABLE.items() if not o.refused)}"
        )
    if TABLE[origin].refused:
        raise ValueError(f"a configuration of {origin} cannot be taken: {TABLE[origin].refused}")
    return TABLE[origin]


def read(
    config: Mapping[str, Any],
    origin: str | None = None,
    *,
    process: ProbabilityPath | None = None,
    grid: str | None = None,
) -> Plan:
    """The plan of a configuration.

    Args:
        config: a scheduler's options; what is left out has its default.
        origin: the name of the diffusers scheduler that it belongs to; None for our own.
        process: instead of the one that the options make.
        grid: a kind of time grid of the process, instead of the options' timesteps.

    Raises:
        ValueError: what cannot be taken, by name and value.
    """
    facts = facts_of(origin)
    check_options(config, origin)
    config = {**defaults_of(origin), **config}
    for name, allowed in VALUES.items():
        if name in facts.options and config.get(name) is not None:
            checks.one_of(name, config[name], allowed)
    if process is not None:
        made, grid = _given(config, facts, process), grid or _grid_of(config, facts)
    else:
        made = MAKERS[facts.family](config, origin)
    learned = config.get("variance_type") in ("learned", "learned_range") and "variance_type" in facts.options
    return Plan(
        origin,
        facts,
        config,
        corrector=_corrector(config, facts),
        learned=learned,
        grid=grid,
        **made,
    )


def _corrector(config: Mapping[str, Any], facts: Origin) -> Corrector | None:
    if config.get("thresholding") and "thresholding" in facts.options:
        ratio, ceiling = config.get("dynamic_thresholding_ratio", 0.995), config.get("sample_max_value")
        return DynamicThresholding(ratio, ceiling=math.inf if ceiling is None else ceiling)
    if config.get("clip_sample") and "clip_sample" in facts.options:
        return Clipping(config.get("clip_sample_range", 1.0))
    return None


def _word(config: Mapping[str, Any], allowed: tuple[str, ...]) -> str:
    """The dialect; "original_sample" is an old word of EulerDiscreteScheduler."""
    given = config["prediction_type"]
    return checks.one_of("prediction_type", "sample" if given == "original_sample" else given, allowed)


# What makes a process, or spaces its levels by those of a chain.
_MAKES = ("rescale_betas_zero_snr", "snr_shift_scale", "use_flow_sigmas", "use_beta_sigmas", "sigma_min", "sigma_max")
_GRIDS = {"use_karras_sigmas": "karras", "use_lu_lambdas": "logsnr", "use_exponential_sigmas": "logsnr"}


def _grid_of(config: Mapping[str, Any], facts: Origin) -> str | None:
    """The grid of a process that was given, where the options ask for one; ValueError for options that such a one has not."""
    for name in _MAKES:
        if config.get(name) and name in facts.options:
            raise ValueError(f"{name}={config[name]!r} has no meaning for a process that is given")
    return next((grid for name, grid in _GRIDS.items() if config.get(name) and name in facts.options), None)


def _given(config: Mapping[str, Any], facts: Origin, process: ProbabilityPath) -> dict[str, Any]:
    kind = check_kind("prediction_type", config["prediction_type"])
    data = config.get("sigma_data", 0.5)
    made = {"process": process, "kind": kind, "sigma_data": data, "given": True}
    made["input_data"] = data if kind == "edm" else 1.0 if isinstance(process, EDM) else None
    if isinstance(process, Discrete):
        products = (2 * process._table).exp()
        made["table"] = Table((1 - products[1:] / products[:-1]).float(), products[1:].float())
    return made


def _chain(config: Mapping[str, Any], origin: str | None) -> dict[str, Any]:
    kind = check_kind("prediction_type", config["prediction_type"])
    data = config.get("sigma_data", 0.5)
    divides = origin is None or "final_sigmas_type" in TABLE[origin].options
    table = table_of(config, faint=divides, exact=origin is None and config.get("trained_betas") is not None)
    if config.get("use_flow_sigmas"):
        if kind not in ("flow", "epsilon", "sample"):
            raise ValueError(
                f"prediction_type={config['prediction_type']!r} cannot be used with use_flow_sigmas: it is not one of "
                "flow_prediction, epsilon, sample"
            )
        scale = float(config["num_train_timesteps"])
        return {"process": Flow(t_min=FLOW_END, label_scale=scale), "kind": kind, "table": table}
    process = table.process()
    low, high = process.sigma_hat(process.t_min), process.sigma_hat(process.t_max)
    for name in ("sigma_min", "sigma_max"):
        sigma = config.get(name)
        if sigma is not None and any(config.get(s) for s in SHAPES) and not low * 0.999 <= sigma <= high * 1.001:
            raise ValueError(f"{name}={sigma!r} is outside of the chain, whose levels are {low:.4g} to {high:.4g}")
    return {
        "process": process,
        "kind": kind,
        "sigma_data": data,
        "input_data": data if kind == "edm" else None,
        "table": table,
    }


def _levels(config: Mapping[str, Any], origin: str | None) -> dict[str, Any]:
    kind = _word(config, ("epsilon", "sample", "v_prediction"))
    table = table_of(config, faint=True)
    sigmas = table.sigmas
    low, high = float(sigmas[0]), float(sigmas.max())
    if any(config.get(s) for s in SHAPES):
        low = low if config.get("sigma_min") is None else min(low, config["sigma_min"])
        high = high if config.get("sigma_max") is None else float(config["sigma_max"])
    process = ChainLevels(sigmas, low, high)
    if kind == "v_prediction":  # v of the scaled sample: EDM's network for data of unit variance, with its sign changed
        return {"process": process, "kind": "edm", "gain": -1.0, "sigma_data": 1.0, "input_data": 1.0, "table": table}
    return {"process": process, "kind": kind, "input_data": 1.0, "table": table}


def _edm(config: Mapping[str, Any], origin: str | None) -> dict[str, Any]:
    kind = _word(config, ("epsilon", "v_prediction"))
    made = Arctan if origin == "CosineDPMSolverMultistepScheduler" else EDM
    data = config["sigma_data"]
    return {
        "process": made(float(config["sigma_min"]), float(config["sigma_max"])),
        "kind": "edm",
        "gain": 1.0 if kind == "epsilon" else -1.0,
        "sigma_data": data,
        "input_data": data,
    }


def _flow(config: Mapping[str, Any], origin: str | None) -> dict[str, Any]:
    checks.positive("shift", config["shift"])
    # Inverted levels count the data's share: the network answers data - noise, and is told 1 - t.
    gain = -1.0 if config.get("invert_sigmas") else 1.0
    return {
        "process": Flow(t_min=FLOW_END, label_scale=float(config["num_train_timesteps"])),
        "kind": "flow",
        "gain": gain,
    }


def _trig(config: Mapping[str, Any], origin: str | None) -> dict[str, Any]:
    return {"process": Trig(), "kind": "v_prediction"}


MAKERS = {"chain": _chain, "levels": _levels, "edm": _edm, "flow": _flow, "trig": _trig}
