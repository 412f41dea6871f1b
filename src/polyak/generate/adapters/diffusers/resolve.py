"""Which scheduler class a configuration is of, what its options are, and whether somebody has changed them since."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

from diffusers.configuration_utils import FrozenDict

from polyak.generate.adapters.diffusers.options import TABLE, TWINS
from polyak.generate.adapters.diffusers.plan import PARTS, defaults_of, facts_of, identify
from polyak.generate.adapters.diffusers.values import same


def resolve(
    config: Mapping[str, Any], overrides: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Any], list[str]]:
    """A configuration as the arguments of a :class:`PolyakScheduler`.

    Returns:
        ``(options, given, used)``: its options, what overrides them (with solver, process, origin, grid), and which of the
        options are there because diffusers fills in defaults.
    """
    options = {k: v for k, v in config.items() if k not in ("_use_default_values", *PARTS)}
    used = [k for k in config.get("_use_default_values", ()) if k in options]
    ours = _ours(config, overrides.get("origin"))
    if overrides.get("origin") not in (None, ours.get("origin")):  # as diffusers does from one class to another
        options = {k: v for k, v in options.items() if k not in used}
    given = {**ours, **{k: v for k, v in overrides.items() if k not in ("solver", "origin") or v is not None}}
    facts_of(given.get("origin"))
    defaults = defaults_of(given.get("origin"))
    filled = [k for k in used if k in options and k not in given and same(options[k], defaults.get(k, ...))]
    return options, given, filled


def _ours(config: Mapping[str, Any], said: str | None) -> dict[str, Any]:
    """solver, process, origin and grid, as far as a configuration says."""
    name = config.get("_class_name")
    if "solver" in config and name not in TABLE:  # of a PolyakScheduler
        return {k: config[k] for k in PARTS if config.get(k) is not None}
    if isinstance(name, str):
        return {"origin": name}
    if not isinstance(config, FrozenDict) and "_use_default_values" not in config:
        return {}
    found = identify(config)
    if found in TWINS and said is None:
        warnings.warn(
            f"this configuration may be {found}'s or {TWINS[found]}'s, which are alike; it is taken as {found}'s: say origin=",
            stacklevel=4,
        )
    return {"origin": found}


def entries(config: Any, seen: Mapping[str, Any]) -> dict[str, Any]:
    """What a configuration says now: diffusers reads its attributes, others write its entries; what changed counts."""
    now = {}
    for name, value in config.items():
        attribute = getattr(config, name, value)
        now[name] = value if attribute is value or same(attribute, seen.get(name)) else attribute
    return now
