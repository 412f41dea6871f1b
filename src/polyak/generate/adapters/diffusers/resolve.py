"""Whose configuration it is, what it says, and whether somebody changed it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from diffusers.configuration_utils import FrozenDict

from polyak.generate.adapters.diffusers.options import OWN, TABLE, Idle
from polyak.generate.adapters.diffusers.plan import PARTS, defaults_of, facts_of, identify


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
    ours = _ours(config)
    if overrides.get("origin") not in (None, ours.get("origin")):  # as diffusers does from one class to another
        options = {k: v for k, v in options.items() if k not in used}
    given = {**ours, **{k: v for k, v in overrides.items() if k not in PARTS or v is not None}}
    facts_of(given.get("origin"))
    defaults = defaults_of(given.get("origin"))
    filled = [k for k in used if k in options and k not in given and same(options[k], defaults.get(k, ...))]
    return options, given, filled


def _ours(config: Mapping[str, Any]) -> dict[str, Any]:
    """solver, process, origin and grid, as far as a configuration says."""
    name = config.get("_class_name")
    if "solver" in config and name not in TABLE:  # of a PolyakScheduler
        return {k: config[k] for k in PARTS if config.get(k) is not None}
    if isinstance(name, str):
        return {"origin": name}
    in_memory = isinstance(config, FrozenDict) or "_use_default_values" in config
    return {"origin": identify(config)} if in_memory else {}


def entries(config: Any, seen: Mapping[str, Any]) -> dict[str, Any]:
    """What a configuration says now: diffusers reads its attributes, others write its entries; what changed counts."""
    now = {}
    for name, value in config.items():
        attribute = getattr(config, name, value)
        now[name] = value if attribute is value or same(attribute, seen.get(name)) else attribute
    return now


def same(a: Any, b: Any) -> bool:
    """Whether two entries of a configuration are equal; arrays, element by element."""
    if a is b:
        return True
    if isinstance(a, np.ndarray) or isinstance(b, np.ndarray):
        return bool(np.array_equal(a, b))
    return type(a) is type(b) and a == b


def refuse_idle(options: Mapping[str, Any]) -> None:
    """An option that was written by hand, and that does nothing here."""
    for name, value in options.items():
        rule = OWN.options.get(name)
        if isinstance(rule, Idle):
            raise ValueError(f"{name}={value!r} has no meaning here: it is {rule.why}")
