"""Finds the state that one run of a task's code leaves for the next, by comparing what its modules hold before and after.

This is looked at once numbers have been found to differ, to name the cause.
"""

from __future__ import annotations

import itertools
import random
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

from polyak.lab.compare.contents import digest

_DEPTH = 4  # of what objects hold
_SHOWN = 3  # names in a message
_LONG = 20  # characters of a value that is shown


def held(file: str) -> dict[str, str]:
    """What the task's module, and those beside it, hold by name: short values in words, others as digests."""
    folder, found = Path(file).resolve().parent, {}
    for module in list(sys.modules.values()):
        at = getattr(module, "__file__", None)
        if not isinstance(module, ModuleType) or not at or Path(at).resolve().parent != folder:
            continue
        head = "" if Path(at).resolve() == Path(file).resolve() else f"{module.__name__}."
        for name, value in list(vars(module).items()):
            if not name.startswith("__") and not isinstance(value, ModuleType):
                for part, state in _states(value, module.__name__):
                    found[f"{head}{name}{part}"] = state
    return found


def changed(before: Mapping[str, str], after: Mapping[str, str]) -> str:
    """What has changed, in words ("STEP (7, then 14)"); "" where nothing has."""
    names = [name for name in after if name in before and before[name] != after[name]]
    said = [
        f"{n} ({before[n]}, then {after[n]})" if max(len(before[n]), len(after[n])) <= _LONG else n
        for n in names[:_SHOWN]
    ]
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(said) + more


def _states(value: Any, module: str, part: str = "", depth: int = 0) -> Iterator[tuple[str, str]]:
    """(part of a name, state) of all that a value holds which may change."""
    import numpy as np
    import torch

    if depth > _DEPTH:
        return
    if isinstance(value, (bool, int, float, str, type(None), itertools.count)):
        yield part, repr(value)
    elif isinstance(value, torch.Generator):
        yield part, digest(value.get_state())
    elif isinstance(value, np.random.Generator):
        yield part, digest(repr(value.bit_generator.state))
    elif isinstance(value, random.Random):
        yield part, digest(value.getstate())
    elif isinstance(value, torch.nn.Module):
        yield part, digest(dict(value.state_dict()))
    elif isinstance(value, (Mapping, list, tuple, torch.Tensor, np.ndarray)):
        yield part, digest(value)
    elif isinstance(value, (set, frozenset)):
        yield part, digest(sorted(map(repr, value)))
    elif isinstance(value, FunctionType):
        if value.__module__ == module:
            inner = _kept(value)
            for name, content in (*vars(value).items(), *inner.items()):
                yield from _states(content, module, f"{part}.{name}", depth + 1)
    elif getattr(value, "__module__", None) == module or type(value).__module__ == module:
        for name, content in list(getattr(value, "__dict__", {}).items()):
            if not name.startswith("__"):
                yield from _states(content, module, f"{part}.{name}", depth + 1)


def _kept(function: FunctionType) -> dict[str, Any]:
    """What a function keeps between calls: defaults that are objects, and the variables around it."""
    code, found = function.__code__, {}
    defaults = function.__defaults__ or ()
    names = code.co_varnames[: code.co_argcount][len(code.co_varnames[: code.co_argcount]) - len(defaults) :]
    found |= zip(names, defaults, strict=True)
    found |= function.__kwdefaults__ or {}
    for name, cell in zip(code.co_freevars, function.__closure__ or (), strict=True):
        try:
            found[name] = cell.cell_contents
        except ValueError:  # not filled yet
            continue
    return found
