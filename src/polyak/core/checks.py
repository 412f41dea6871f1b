"""Argument checks. Each returns the value, or raises with the argument's name, the value and what is allowed."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Sequence
from itertools import islice
from numbers import Integral, Real
from typing import Any, TypeVar

T = TypeVar("T")

SHOWN = 4  # of a list's members in a message
LONGEST = 200  # characters of one value


def real(name: str, value: Any) -> float:
    """A finite real number (a bool is none)."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number, got {shown(value)}")
    try:
        number = float(value)
    except OverflowError:  # an integer beyond the largest float
        number = math.inf
    if not math.isfinite(number):
        raise ValueError(f"{name} must be finite, got {shown(value)}")
    return number


def non_negative(name: str, value: Any) -> float:
    """A finite number >= 0."""
    if real(name, value) < 0:
        raise ValueError(f"{name} must be >= 0, got {shown(value)}")
    return float(value)


def positive(name: str, value: Any) -> float:
    """A finite number > 0."""
    if real(name, value) <= 0:
        raise ValueError(f"{name} must be > 0, got {shown(value)}")
    return float(value)


def between(name: str, value: Any, low: float, high: float, *, ends: str = "[]") -> float:
    """A finite number in an interval; ``ends`` says which ends belong to it: "[]", "[)", "(]" or "()"."""
    number = real(name, value)
    above = number >= low if ends[0] == "[" else number > low
    below = number <= high if ends[1] == "]" else number < high
    if not (above and below):
        raise ValueError(f"{name} must be in {ends[0]}{low:g}, {high:g}{ends[1]}, got {shown(value)}")
    return number


def integer(name: str, value: Any, *, least: int | None = None, most: int | None = None) -> int:
    """An integer, at least ``least`` and at most ``most``."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name} must be an integer, got {shown(value)}")
    number = int(value)
    if least is not None and number < least:
        raise ValueError(f"{name} must be at least {least}, got {shown(value)}")
    if most is not None and number > most:
        raise ValueError(f"{name} must be at most {most}, got {shown(value)}")
    return number


def one_of(name: str, value: T, allowed: Iterable[T]) -> T:
    """A member of ``allowed`` (1 is not True); a near miss is suggested."""
    options = list(allowed)
    whole = math.prod(getattr(value, "shape", ())) == 1  # comparing larger tensors gives no truth
    if type(value).__module__ == "numpy" and hasattr(value, "item") and whole:
        value = value.item()  # type: ignore[attr-defined]  # NumPy's numbers and truths are Python's
    if not whole or not any(isinstance(value, bool) == isinstance(o, bool) and value == o for o in options):
        listed = ", ".join(repr(o) for o in options)
        raise ValueError(f"{name} must be one of {listed}, got {shown(value)}{suggestion(value, options)}")
    return value


def betas(value: Any, count: int, owner: str) -> tuple[float, ...]:
    """``count`` retention factors, each in [0, 1); tensors of one element are read."""
    words = {1: "one beta", 2: "two betas", 3: "three betas"}
    if not isinstance(value, Sequence) or len(value) != count:
        got = len(value) if isinstance(value, Sequence) else shown(value)
        raise ValueError(f"{owner} needs {words.get(count, f'{count} betas')}, got {got}")
    numbers = [b.item() if _is_one_element(b) else b for b in value]
    return tuple(between(f"betas[{i}]", b, 0.0, 1.0, ends="[)") for i, b in enumerate(numbers))


def _is_one_element(value: Any) -> bool:
    return hasattr(value, "item") and math.prod(getattr(value, "shape", (0,))) == 1


def suggestion(value: object, options: Iterable[object]) -> str:
    """ "; did you mean 'adan'?" where one of the options is near, whatever its case, else ""."""
    given, known = value if isinstance(value, str) else shown(value), [str(o) for o in options]
    near = difflib.get_close_matches(given.lower(), [name.lower() for name in known], n=1)
    if not near:
        return ""
    alike = [name for name in known if name.lower() == near[0]]
    return f"; did you mean {difflib.get_close_matches(given, alike, n=1, cutoff=0.0)[0]!r}?"


def shown(value: object) -> str:
    """A value for a message: plain ones as they are, of tensors type and shape, never their contents."""
    shape = getattr(value, "shape", None)
    if shape is not None and hasattr(value, "dtype") and math.prod(shape) != 1:
        return f"{type(value).__name__} of shape {tuple(shape)}, {value.dtype}"  # type: ignore[attr-defined]
    if isinstance(value, (list, tuple, set, frozenset, dict)) and value:
        parts = (
            [f"{shown(k)}: {shown(v)}" for k, v in islice(value.items(), SHOWN)]
            if isinstance(value, dict)
            else [shown(v) for v in islice(value, SHOWN)]
        )
        more = f", and {len(value) - SHOWN} more" if len(value) > SHOWN else ""
        opened, closed = {list: "[]", tuple: "()"}.get(type(value), "{}")
        comma = "," if isinstance(value, tuple) and len(value) == 1 else ""
        return f"{opened}{', '.join(parts)}{comma}{more}{closed}"
    text = repr(value)
    plain = len(text) <= LONGEST and "\n" not in text and not hasattr(value, "named_parameters")
    return text if plain else f"an object of type {type(value).__name__}"
