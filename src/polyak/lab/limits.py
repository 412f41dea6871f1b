"""Ranges of counts and durations that users give: wide, but they refuse slips such as ``--seeds 20000``."""

from __future__ import annotations

from polyak.core import checks

MOST: dict[str, int] = {
    "seeds": 1000,  # reported
    "trials": 1000,  # of an arm's tuning
    "points": 10_000,  # at which a trial is measured
    "jobs": 4096,  # trials at once
    "processes": 1024,  # of a trial
}
MOST_SECONDS = 1e9  # thirty years
MOST_COUNT = 10**12  # steps, evaluations or gradients of a trial
ARMS, WORDS = 100, 1000  # arms of a comparison, and characters of one


def count(name: str, value: int, *, least: int = 1, called: str = "") -> int:
    """A number of seeds, trials, ... (``name``) in its range; ``called`` so in the message."""
    return checks.integer(called or name, value, least=least, most=MOST[name])


def seconds(name: str, value: float) -> float:
    """A time that ends."""
    if checks.positive(name, value) > MOST_SECONDS:
        raise ValueError(f"{name} must be at most {MOST_SECONDS:g} s, got {value!r}")
    return float(value)


def short(text: str, most: int = 80) -> str:
    """A text for a message: of a long one its beginning."""
    return text if len(text) <= most else f"{text[:most]}… ({len(text):,} characters)"
