"""Whose configuration it is, what it says, and whether somebody changed it."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from diffusers.configuration_utils import FrozenDict

from polyak.generate.adapters.diffusers.options import TABLE
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
    given = {**ours, **{k: v for k, v in overrides.items() if k not in ("solver", "origin") or v is not None}}
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
    if isinstance(a, np.ndarray | torch.Tensor) or isinstance(b, np.ndarray | torch.Tensor):
        return type(a) is type(b) and a.shape == b.shape and bool(np.array_equal(np.asarray(a), np.asarray(b)))
    return type(a) is type(b) and a == b


def snapshot(config: Mapping[str, Any]) -> dict[str, Any]:
    """What a configuration says, in copies: lists and arrays may be changed in place."""
    return {k: copy.deepcopy(v) if isinstance(v, list | dict | np.ndarray) else v for k, v in config.items()}


def plain(value: Any) -> Any:
    """NumPy's and PyTorch's numbers as Python's, which JSON can hold; in lists and dicts, too."""
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, torch.Tensor):
        return value.tolist()
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple) and any(
        isinstance(v, np.generic | torch.Tensor | list | tuple | dict) for v in value
    ):
        return type(value)(plain(v) for v in value)
    return value
