"""Axis ticks: where they are, and their labels."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

from polyak.lab import words

if TYPE_CHECKING:
    from matplotlib.ticker import Formatter, Locator

_LEAST, _MOST = 3, 15  # digits; a double has no more
_OFF = 0.01  # of the way to the next tick: how far a label may be from its tick


def locator(low: float, high: float, *, log: bool, most: int = 5, whole: bool = False) -> Locator:
    """Where ticks are from ``low`` to ``high``: a few round values; ``whole``: whole numbers alone, if there are any."""
    from matplotlib import ticker

    decades = math.log10(high / low) if log else 0.0
    if decades < 0.7:
        return ticker.MaxNLocator(min(most, 4) if log else most, integer=whole, min_n_ticks=1 if whole else 2)
    return ticker.LogLocator(subs=(1, 2, 5) if decades < 2.2 else (1,), numticks=6)


def formatter() -> Formatter:
    """Writes ticks with as many digits as all of an axis need."""
    from matplotlib import ticker

    class Labels(ticker.Formatter):
        def __call__(self, x: float, pos: int | None = None) -> str:
            return words.number(float(x))

        def format_ticks(self, values: Sequence[float]) -> list[str]:
            return labels(values)

    return Labels()


def digits(values: Iterable[float]) -> int:
    """How many digits ticks need (at least three), so that each label is its tick's value and no two are equal."""
    places = sorted({float(v) for v in values if math.isfinite(v)})
    gaps = [after - before for before, after in pairwise(places)]
    room = [min(pair) for pair in zip([math.inf, *gaps], [*gaps, math.inf], strict=True)] if gaps else []
    allowed = [(value, _OFF * gap) for value, gap in zip(places, room, strict=False)]
    enough = (n for n in range(_LEAST, _MOST) if all(abs(float(f"{v:.{n}g}") - v) <= off for v, off in allowed))
    return next(enough, _MOST)


def labels(values: Sequence[float]) -> list[str]:
    """Ticks in words."""
    enough = digits(values)
    return [words.number(float(v), enough) for v in values]
