"""Strips: a drawing of one criterion with its estimate, interval, seeds and bound, as SVG with coordinates in percent."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape

from polyak.lab import ticks, words
from polyak.lab.result import CriterionResult

_TICKS = 5  # on a strip, at most
NARROW, GLYPH = 320, 6.8  # pixels: a strip's width on a phone, and a glyph's at most on average


def strip(
    c: CriterionResult,
    compare: str,
    sides: tuple[str, str] = ("", ""),
    among: Sequence[CriterionResult] = (),
    said: tuple[str, str] = ("", ""),
) -> str:
    """A criterion's interval against its bound: estimate, 95 % interval, one dot per seed, the side that passes shaded.

    ``sides`` are said to the left and to the right of the bound; by default what is asked. With ``among`` the scale is one for all
    of these. ``said`` are the estimate and its interval in words; by default with three digits.
    """
    asked = f"asked: {words.bound(c)}"
    neutral = {"ratio": [1.0], "difference": [0.0]}.get(compare, [])
    seen = [v for o in (c, *among) for v in (o.estimate, o.low, o.high, o.bound, *o.per_seed)]
    values = [v for v in (*seen, *neutral) if math.isfinite(v)]
    log = compare == "ratio" and min(values) > 0
    axis = _Axis(min(values), max(values), log)
    at = axis.place(c.bound)
    passes_left = c.op in ("<=", "<")
    left, width = (0.0, at) if passes_left else (at, 100 - at)
    parts = [f'<rect class="passing" x="{left:.2f}%" y="36" width="{width:.2f}%" height="44"/>']
    # What the bound is need not be said twice.
    equal = [] if any(sides) else neutral
    for value in equal:
        x, text = axis.place(value), f"{words.number(value)} (equal)"
        parts.append(f'<line class="neutral" x1="{x:.2f}%" x2="{x:.2f}%" y1="36" y2="84"/>')
        parts.append(_text(x, 98, text, "tick"))
    at_ticks = axis.ticks(c.bound)
    for tick, text in zip(at_ticks, ticks.labels(at_ticks), strict=True):
        x = axis.place(tick)
        parts.append(f'<line class="tick" x1="{x:.2f}%" x2="{x:.2f}%" y1="80" y2="84"/>')
        if all(abs(x - axis.place(v)) > _width(text) / 2 + _width("1 (equal)") for v in equal):
            parts.append(_text(x, 98, text, "tick"))
    parts.append('<line class="tick" x1="0" x2="100%" y1="80" y2="80"/>')
    parts += [_dot(axis, seed) for seed in c.per_seed]
    if not (math.isnan(c.low) or math.isnan(c.high)):
        low, high = axis.place(c.low), axis.place(c.high)
        parts.append(f'<line class="interval" x1="{low:.2f}%" x2="{high:.2f}%" y1="52" y2="52"/>')
    parts.append(f'<line class="bound" x1="{at:.2f}%" x2="{at:.2f}%" y1="36" y2="80"/>')
    estimate, interval = (
        own or usual for own, usual in zip(said, (words.number(c.estimate), words.interval(c)), strict=True)
    )
    if not math.isnan(c.estimate):
        x, within = axis.place(c.estimate), "" if interval == "none" else f" (95 %: {interval})"
        parts.append(f'<circle class="estimate" cx="{x:.2f}%" cy="52" r="5.5"/>')
        parts.append(_text(x, 12, estimate + within, "estimate"))
    if any(sides):
        parts += _sides(at, sides)
    else:
        parts.append(_text(at, 30, f"← {asked}" if passes_left else f"{asked} →", "bound"))
    name = f"estimate {estimate}, interval {interval}, {asked}"
    return f'<svg class="strip" height="104" role="img" aria-label="{escape(name)}">{"".join(parts)}</svg>'


def _sides(at: float, sides: tuple[str, str]) -> Iterator[str]:
    """What lies to the left and to the right of a place, where there is room for it."""
    texts = f"← {sides[0]}", f"{sides[1]} →"
    for text, anchor, room, x in zip(texts, ("end", "start"), (at, 100 - at), (at - 1.5, at + 1.5), strict=True):
        if _width(text) + 1.5 <= room:
            yield f'<text class="bound" x="{x:.2f}%" y="30" text-anchor="{anchor}">{escape(text)}</text>'


@dataclass(frozen=True)
class _Axis:
    """Values to percent of the width, with room at both ends; infinities sit at the very ends."""

    low: float
    high: float
    log: bool

    def place(self, value: float) -> float:
        if math.isinf(value):
            return 99.0 if value > 0 else 1.0
        low, high, v = (math.log(x) if self.log else x for x in (self.low, self.high, value))
        return 8 + 84 * (v - low) / (high - low) if high > low else 50.0

    def ticks(self, kept: float) -> list[float]:
        """A few round values, ``kept`` among them where it is one; as many as have room for what is written at them."""
        if self.high <= self.low:
            return [self.low]
        there = ticks.locator(self.low, self.high, log=self.log, most=4).tick_values(self.low, self.high)
        found = [float(t) for t in there if self.low <= t <= self.high]
        room = max(map(_width, ticks.labels(found)), default=0.0) + _width("0")
        every = max(1, math.ceil(len(found) / max(1, min(_TICKS, int(100 / room)))))
        return found[found.index(kept) % every if kept in found else 0 :: every]


def _dot(axis: _Axis, seed: float) -> str:
    if math.isnan(seed):
        return ""
    if math.isinf(seed):
        return f'<text class="lost" x="{axis.place(seed):.2f}%" y="75" text-anchor="middle">×</text>'
    return f'<circle class="seed" cx="{axis.place(seed):.2f}%" cy="70" r="3"/>'


def _width(text: str) -> float:
    """How much of a strip a text takes on a phone, in percent."""
    return 100 * GLYPH * len(text) / NARROW


def _text(x: float, y: int, text: str, kind: str) -> str:
    """A text at a place, centred where it fits."""
    wide = min(_width(text), 100.0)
    if wide / 2 <= x <= 100 - wide / 2:
        anchor = "middle"
    elif x < 50:
        anchor, x = "start", min(x, 100 - wide)
    else:
        anchor, x = "end", max(x, wide)
    return f'<text class="{kind}" x="{x:.2f}%" y="{y}" text-anchor="{anchor}">{escape(text)}</text>'
