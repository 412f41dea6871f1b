"""The specification of an arm, and the grammar that it is written in: names, options, ranges."""

from __future__ import annotations

import ast
import importlib
import inspect
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal

from polyak.core import checks
from polyak.lab import words

Kind = Literal["training", "sampling"]


class ArmError(ValueError):
    """An arm's words cannot be understood; the message says what is known."""


@dataclass(frozen=True)
class Range:
    """Values to be tuned over, evenly spread in the logarithm where all are positive."""

    low: float
    high: float
    whole: bool = False  # integers
    open: bool = False  # grows where the best value is at an end: nobody asked for these ends

    @property
    def log(self) -> bool:
        return self.low > 0 and not self.whole

    @property
    def centre(self) -> float:
        middle = math.sqrt(self.low * self.high) if self.log else (self.low + self.high) / 2
        return round(middle) if self.whole else middle

    def at(self, part: float) -> float:
        """The value at 0 (low) to 1 (high)."""
        if self.log:
            return self.low * (self.high / self.low) ** part
        value = self.low + (self.high - self.low) * part
        return round(value) if self.whole else value

    def __str__(self) -> str:
        return f"{words.number(self.low)} to {words.number(self.high)}"


@dataclass(frozen=True, kw_only=True)
class ArmSpec:
    """One competitor: a class and its options."""

    text: str  # as it was given
    target: str  # "torch.optim:AdamW"
    fixed: Mapping[str, Any] = field(default_factory=dict)
    space: Mapping[str, Range] = field(default_factory=dict)
    says: str = ""  # where the ranges come from

    @property
    def class_name(self) -> str:
        return self.target.rpartition(":")[2]

    @property
    def pieces(self) -> list[str]:
        """Its words, taken apart: "my_module", "MyOpt", "beta=0.9"."""
        return split(self.text, ":")

    @cached_property
    def own(self) -> tuple[str, ...]:
        """The options that were given, for people: ("weight_decay 0.02",), ("eta 0 to 1",)."""
        given = [piece.partition("=")[::2] for piece in self.pieces if "=" in piece]
        return tuple(f"{name} {self.space.get(name, value)}" for name, value in given)

    @property
    def label(self) -> str:
        """For people, with the options that were given: "Adan (weight_decay 0.02)", "DDIM (eta 0 to 1)"."""
        return self.labelled(self.own)

    def labelled(self, options: Sequence[str]) -> str:
        return f"{self.class_name} ({', '.join(options)})" if options else self.class_name


def split(text: str, separator: str) -> list[str]:
    """Pieces between separators that are outside of brackets."""
    pieces, depth = [""], 0
    for character in text:
        depth += (character in "([{") - (character in ")]}")
        if character == separator and depth == 0:
            pieces.append("")
        else:
            pieces[-1] += character
    return pieces


_UNREADABLE = (ValueError, SyntaxError, RecursionError, MemoryError)  # what Python raises at what is no literal


def read(text: str, what: str) -> Any:
    """A literal, a range, or the word itself."""
    if match := re.fullmatch(r"([^.]\S*?)\.\.(\S+)", text):
        try:
            low, high = (ast.literal_eval(part) for part in match.groups())
            for end, value in (("low", low), ("high", high)):
                checks.real(f"{what}'s {end} end", value)
        except (*_UNREADABLE, TypeError) as error:
            why = f" ({error})" if "end must be" in str(error) else ""
            raise ArmError(f"{what} must be low..high, two numbers, got {text!r}{why}") from None
        if not low < high:
            raise ArmError(f"{what}: the low end must be below the high end, got {text!r}")
        return Range(low, high, whole=isinstance(low, int) and isinstance(high, int))
    try:
        return ast.literal_eval(text)
    except _UNREADABLE:
        return text


# -- names -----------------------------------------------------------------------------------------------------------------


def find(target: str, text: str = "") -> Any:
    """What ``module:name`` names.

    Raises:
        ArmError: there is no such module, or it has no such name.
    """
    module, _, name = target.partition(":")
    if module == "__main__":
        raise ArmError(
            f"arm {text or target!r}: trials run in processes of their own, which do not see what a notebook or script holds. "
            f"Write the class to a file (in a notebook: a cell that begins with %%writefile mine.py), and name it mine:{name}"
        )
    try:
        found = importlib.import_module(module)
    except ImportError as error:
        raise ArmError(f"arm {text or target!r}: module {module!r} cannot be imported ({error})") from error
    if not hasattr(found, name):
        hint = checks.suggestion(name, [n for n in dir(found) if not n.startswith("_")])
        raise ArmError(f"arm {text or target!r}: {module} has no {name!r}{hint}")
    return getattr(found, name)


def target_of(name: str, kind: Kind) -> str:
    known = names(kind)
    if name.lower() in known:
        return known[name.lower()]
    if kind == "sampling" and _has(f"diffusers:{name}"):
        return f"diffusers:{name}"
    raise ArmError(
        f"no arm is called {name!r}{checks.suggestion(name.lower(), known) or '.'} There are {', '.join(sorted(known))}, and "
        "anything else is named by module:Class"
    )


def _has(target: str) -> bool:
    try:
        find(target)
    except ArmError:
        return False
    return True


def names(kind: Kind) -> dict[str, str]:
    """Short name (lower case) -> ``module:Class``."""
    base, rooms = {
        "training": ("torch.optim:Optimizer", ("torch.optim", "polyak.optim")),
        "sampling": ("polyak.generate:Solver", ("polyak.generate",)),
    }[kind]
    parent = find(base)
    found: dict[str, str] = {}
    for room in rooms:  # the later has the last word
        module = importlib.import_module(room)
        for name in getattr(module, "__all__", None) or dir(module):
            value = getattr(module, name)
            if isinstance(value, type) and issubclass(value, parent) and value is not parent:
                found[name.lower()] = f"{room}:{name}"
    return found


# -- options ---------------------------------------------------------------------------------------------------------------


def typed(value: Any, default: Any) -> Any:
    """A range of whole numbers is one of integers only where the option's default is an integer, too."""
    if isinstance(value, Range) and not (isinstance(default, int) and not isinstance(default, bool)):
        return replace(value, whole=False)
    return value


def defaults(cls: Any) -> tuple[dict[str, Any], bool]:
    """A class's options with their defaults, and whether it takes any others."""
    try:
        parameters = list(inspect.signature(cls).parameters.values())
    except (TypeError, ValueError):
        return {}, True
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters)
    return {p.name: _default(p) for p in parameters if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)}, takes_any


def _default(parameter: inspect.Parameter) -> Any:
    """Of what is declared to be a float (PyTorch's ``momentum: float = 0``) a float: it is not of whole numbers."""
    value = parameter.default
    declared = "float" in str(parameter.annotation)
    return float(value) if declared and isinstance(value, int) and not isinstance(value, bool) else value


def check_options(text: str, cls: Any, values: Iterable[str], known: Mapping[str, Any], takes_any: bool) -> None:
    for name in values:
        if name not in known and not takes_any:
            hint = checks.suggestion(name, known) or "."
            raise ArmError(f"arm {text!r}: {cls.__name__} has no option {name!r}{hint} It has {', '.join(known)}")
