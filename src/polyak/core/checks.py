"""Argument checks. Each returns the value, or raises with the argument's name, the value and what is allowed."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Sequence
from numbers import Integral, Real
from typing import Any, TypeVar

T = TypeVar("T")


def real(name: str, value: Any) -> float:
    """A finite real number (a bool is none)."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number, got {value!r}")
    try:
        number = float(value)
    except OverflowError:  # an integer beyond the largest float
        number = math.inf
    if not math.isfinite(number):
        raise ValueError(f"{name} must be finite, got {value!r}")
    return number


def non_negative(name: str, value: Any) -> float:
    """A finite number >= 0."""
    if real(name, value) < 0:
        raise ValueError(f"{name} must be >= 0, got {value!r}")
    return float(value)


def positive(name: str, value: Any) -> float:
    """A finite number > 0."""
    if real(name, value) <= 0:
        raise ValueError(f"{name} must be > 0, got {value!r}")
    return float(value)


def between(name: str, value: Any, low: float, high: float, *, ends: str = "[]") -> float:
    """A finite number in an interval; ``ends`` says which ends belong to it: "[]", "[)", "(]" or "()"."""
    number = real(name, value)
    above = number >= low if ends[0] == "[" else number > low
    below = number <= high if ends[1] == "]" else number < high
    if not (above and below):
        raise ValueError(f"{name} must be in {ends[0]}{low:g}, {high:g}{ends[1]}, got {value!r}")
    return number


def integer(name: str, value: Any, *, least: int | None = None, most: int | None = None) -> int:
    """An integer, at least ``least`` and at most ``most``."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    number = int(value)
    if least is not None and number < least:
        raise ValueError(f"{name} must be at least {least}, got {value!r}")
    if most is not None and number > most:
        raise ValueError(f"{name} must be at most {most}, got {value!r}")
    return number


def one_of(name: str, value: T, allowed: Iterable[T]) -> T:
    """A member of ``allowed`` (1 is not True); a near miss is suggested."""
    options = list(allowed)
    if not any(isinstance(value, bool) == isinstance(o, bool) and value == o for o in options):
        listed = ", ".join(repr(o) for o in options)
        raise ValueError(f"{name} must be one of {listed}, got {value!r}{suggestion(value, options)}")
    return value


def betas(value: Any, count: int, owner: str) -> tuple[float, ...]:
    """``count`` retention factors, each in [0, 1)."""
    words = {1: "one beta", 2: "two betas", 3: "three betas"}
    if not isinstance(value, Sequence) or len(value) != count:
        got = len(value) if isinstance(value, Sequence) else repr(value)
        raise ValueError(f"{owner} needs {words.get(count, f'{count} betas')}, got {got}")
    return tuple(between(f"betas[{i}]", b, 0.0, 1.0, ends="[)") for i, b in enumerate(value))


def suggestion(value: object, options: Iterable[object]) -> str:
    """ "; did you mean 'adan'?" where one of the options is near, whatever its case, else ""."""
    given, known = str(value), [str(o) for o in options]
    near = difflib.get_close_matches(given.lower(), [name.lower() for name in known], n=1)
    if not near:
        return ""
    alike = [name for name in known if name.lower() == near[0]]
    return f"; did you mean {difflib.get_close_matches(given, alike, n=1, cutoff=0.0)[0]!r}?"
