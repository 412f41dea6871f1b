"""From a scheduler's configuration to what a run needs: the process, the kind of prediction, the correction of data.

:func:`read` is a pure function. It refuses what it cannot take, by name; :mod:`.schedule` then finds the times of a run.
"""

from __future__ import annotations

import difflib
import inspect
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from diffusers import schedulers as theirs
from torch import Tensor

from polyak.core import checks
from polyak.generate.adapters.diffusers import given
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
    Idle,
    Origin,
    Refused,
)
from polyak.generate.adapters.diffusers.values import same
from polyak.generate.evaluate import Corrector, DynamicThresholding
from polyak.generate.prediction import check_kind
from polyak.generate.process import EDM, Flow, ProbabilityPath, Process
from polyak.generate.process.path import GRIDS

PARTS = ("solver", "process", "origin", "grid")  # of the configuration: our own
WORDS = {"flow": "flow_prediction", "eps": "epsilon", "x0": "sample", "v": "v_prediction"}  # ours to diffusers'
VALUES = {
    "timestep_spacing": SPACINGS,
    "final_sigmas_type": ("zero", "sigma_min"),
    "time_shift_type": ("exponential", "linear"),
    "interpolation_type": ("linear", "log_linear"),
    "timestep_type": ("discrete", "continuous"),
    "sigma_schedule": ("karras", "exponential"),
    "variance_type": (
        "fixed_small",
        "fixed_small_log",
        "fixed_large",
        "fixed_large_log",
        "learned",
        "learned_range",
    ),
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


def idle_of(origin: str | None) -> set[str]:
    """The options that have no meaning here."""
    return {name for name, rule in facts_of(origin).options.items() if isinstance(rule, Idle)}


def identify(config: Mapping[str, Any]) -> str | None:
    """The scheduler that a configuration in memory belongs to, which does not hold its name: by the options it has.

    Schedulers with the same options are told apart by the defaults that were used, then by all values.
    """
    keys, used = set(config), config.get("_use_default_values", ())
    best: tuple[int, int, int] = (0, 0, 0)
    found = None
    for name in sorted(TABLE, key=lambda n: -len(keys & set(TABLE[n].options))):
        if len(keys & set(TABLE[name].options)) < best[0]:
            break
        if name not in DEFAULTS and not hasattr(theirs, name):
            continue
        defaults = defaults_of(name)
        names = set(defaults) or set(TABLE[name].options)
        changed = {k for k in defaults if k in config and not same(config[k], defaults[k])}
        score = (len(names), -len(changed & set(used)), -len(changed))
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
    return _is_known(name) and (origin is not None or value is None or value is False)


def _is_known(name: str) -> bool:
    return name in KNOWN or any(name in defaults_of(c) for c in TABLE if c not in DEFAULTS and hasattr(theirs, c))


def notes_of(config: Mapping[str, Any], origin: str | None) -> list[str]:
    """Entries of a configuration that are no options, nor meant to be: what somebody wrote there for himself."""
    names = [n for n in config if n not in PARTS and n[0] != "_" and n not in names_of(origin)]
    return [
        n for n in names if n not in OLD and not _is_known(n) and not difflib.get_close_matches(n, KNOWN, cutoff=0.8)
    ]


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
    by_hand: frozenset[str] = frozenset(),
) -> Plan:
    """The plan of a configuration.

    Args:
        config: a scheduler's options; what is left out has its default.
        origin: the name of the diffusers scheduler that it belongs to; None for our own.
        process: instead of the one that the options make.
        grid: a kind of time grid of the process, instead of the options' timesteps.
        by_hand: options that did not come with a configuration: nobody wants them kept for going back.

    Raises:
        ValueError: what cannot be taken, by name and value.
    """
    facts = facts_of(origin)
    check_options(config, origin)
    written = {name: config[name] for name in by_hand & set(config)}
    config = {**defaults_of(origin), **config}
    for name, allowed in VALUES.items():
        if name in facts.options and config.get(name) is not None:
            checks.one_of(name, config[name], allowed)
    _refuse_idle(written, origin, facts, process is not None)
    if config.get("sigma_data") is not None and "sigma_data" in facts.options:
        checks.positive("sigma_data", config["sigma_data"])
    if process is not None:
        given.check(config, defaults_of(origin), facts, process, by_hand)
        made, grid = given.make(config, facts, process), grid or given.grid_of(config, facts, process)
    else:
        made = MAKERS[facts.family](config, origin)
    if grid is not None:
        _check_grid(config, origin, grid, process, by_hand)
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


def _check_grid(
    config: Mapping[str, Any], origin: str | None, grid: str, process: ProbabilityPath | None, by_hand: frozenset[str]
) -> None:
    """ValueError for a kind of grid that there is not, and for options that would space times beside it."""
    if process is None or type(process).grid in (Process.grid, ProbabilityPath.grid):
        checks.one_of("grid", grid, GRIDS)
    defaults = defaults_of(origin)
    for name in given.SPACES & by_hand & set(facts_of(origin).options):
        if config[name] not in (None, defaults.get(name)):
            raise ValueError(f"{name}={config[name]!r} has no meaning beside grid={grid!r}, which spaces the times")


def _refuse_idle(written: Mapping[str, Any], origin: str | None, facts: Origin, own: bool) -> None:
    """ValueError for an option that was written by hand, and that does nothing here."""
    defaults = defaults_of(origin)
    for name, value in written.items():
        rule = facts.options.get(name)
        if isinstance(rule, Idle) and value is not defaults.get(name, ...) and value != defaults.get(name, ...):
            raise ValueError(f"{name}={value!r} has no meaning here: it is {rule.why}")
        if name == "variance_type" and not str(value).startswith("learned") and value is not None and origin is None:
            raise ValueError(f"variance_type={value!r} has no meaning here: noise is the solver's own")
        if name == "prediction_type" and facts.family in ("flow", "trig") and not own:
            checks.one_of(name, value, ("flow_prediction",) if facts.family == "flow" else ("v_prediction",))


def _corrector(config: Mapping[str, Any], facts: Origin) -> Corrector | None:
    if config.get("thresholding") and isinstance(facts.options.get("thresholding"), Acts):
        ratio, ceiling = config.get("dynamic_thresholding_ratio", 0.995), config.get("sample_max_value")
        return DynamicThresholding(ratio, ceiling=math.inf if ceiling is None else ceiling)
    if config.get("clip_sample") and isinstance(facts.options.get("clip_sample"), Acts):
        return Clipping(config.get("clip_sample_range", 1.0))
    return None


def _word(config: Mapping[str, Any], allowed: tuple[str, ...]) -> str:
    """The dialect; "original_sample" is an old word of EulerDiscreteScheduler."""
    given = config["prediction_type"]
    return checks.one_of("prediction_type", "sample" if given == "original_sample" else given, allowed)


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
