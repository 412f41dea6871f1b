"""Solvers and processes as entries of a scheduler's configuration: to JSON, and back."""

from __future__ import annotations

import dataclasses
import importlib
from typing import Any

from polyak.core import checks
from polyak.generate.adapters.diffusers.levels import ChainLevels
from polyak.generate.adapters.diffusers.values import plain
from polyak.generate.process import Discrete, ProbabilityPath
from polyak.generate.solver import Solver

ROOM = "polyak.generate."
LEVELS = "adapters.diffusers.levels"  # of other schedulers' processes


def dump(part: Any) -> dict[str, Any]:
    """Of this room: its class and its fields. Of anybody else: the path of its class, from which it is not made again."""
    kind = type(part)
    module = kind.__module__
    if not module.startswith(ROOM) or kind.__qualname__ != kind.__name__:
        return {"class": f"{module}.{kind.__qualname__}"}
    home = module.removeprefix(ROOM)
    home = home if home == LEVELS else home.split(".")[0]
    fields = {f.name: getattr(part, f.name) for f in dataclasses.fields(part)} if dataclasses.is_dataclass(part) else {}
    fields = {name: dump(value) if isinstance(value, ProbabilityPath) else value for name, value in fields.items()}
    if isinstance(part, Discrete):
        fields = {"alphas_cumprod": (2 * part._table[1:]).exp().tolist(), "label_scale": part.label_scale}
        fields["lam_min"] = part.lam(part.t_max) - 1e-9
    if isinstance(part, ChainLevels):
        fields["logs"] = part.logs
    return {"part": f"{home}:{kind.__name__}", **plain(fields)}


def load(given: Any, kind: type[Solver] | type[ProbabilityPath]) -> Any:
    """A solver or process from itself, or from what :func:`dump` made of it; nothing outside this room is ever loaded.

    Raises:
        ValueError: neither; or a class from elsewhere, which has to be passed.
    """
    name = "solver" if kind is Solver else "process"
    if isinstance(given, kind):
        return given
    if isinstance(given, dict) and "class" in given:
        raise ValueError(
            f"the configuration was saved with a {name} from elsewhere, {given['class']}, which is not loaded from a file: "
            f"pass {name}="
        )
    if not isinstance(given, dict) or not isinstance(given.get("part"), str):
        raise ValueError(f"{name} must be a {kind.__name__}, got {checks.shown(given)}")
    module, _, found_name = given["part"].partition(":")
    homes = (
        [f"{ROOM}{module}", ROOM.rstrip(".")] if module.isidentifier() or module == LEVELS else []
    )  # parts of older versions have moved
    found = next((f for f in (getattr(_module(h), found_name, None) for h in homes) if f), None)
    if not (isinstance(found, type) and issubclass(found, kind)):
        raise ValueError(f"{name}: no {kind.__name__} is called {given['part']!r}")
    inner = {k: load(v, ProbabilityPath) if isinstance(v, dict) else v for k, v in given.items() if k != "part"}
    return found(**inner)


def _module(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError:
        return None
