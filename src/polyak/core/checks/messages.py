"""How a value looks in a message, and what may have been meant by a misspelt name."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable
from itertools import islice

SHOWN = 4  # of a list's members in a message
LONGEST = 200  # characters of one value


def suggestion(value: object, options: Iterable[object]) -> str:
    """ "; did you mean 'adan'?" where one of the options is near, whatever its case, else ""."""
    given, known = value if isinstance(value, str) else shown(value), [str(o) for o in options]
    near = difflib.get_close_matches(given.lower(), [name.lower() for name in known], n=1)
    if not near:
        return ""
    alike = [name for name in known if name.lower() == near[0]]
    return f"; did you mean {difflib.get_close_matches(given, alike, n=1, cutoff=0.0)[0]!r}?"


def shape_of(value: object) -> tuple[int, ...] | None:
    """The shape of a tensor or an array; None of what has none."""
    shape = getattr(value, "shape", None)
    return tuple(shape) if isinstance(shape, (tuple, list)) else None


def shown(value: object) -> str:
    """A value for a message: plain ones as they are, of tensors type and shape, never their contents."""
    shape = shape_of(value)
    if shape is not None and hasattr(value, "dtype") and math.prod(shape) != 1:
        return f"{type(value).__name__} of shape {shape}, {value.dtype}"  # type: ignore[attr-defined]
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
    try:
        text = repr(value)
    except Exception:  # whatever a value's own repr raises, the message is about the value
        text = ""
    plain = text and len(text) <= LONGEST and "\n" not in text and not hasattr(value, "named_parameters")
    return text if plain else f"an object of type {type(value).__name__}"
