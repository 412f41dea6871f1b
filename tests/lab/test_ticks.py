"""What is written at the ticks of axes."""

from __future__ import annotations

import re
from dataclasses import replace
from itertools import pairwise

import pytest
from matplotlib.figure import Figure

from polyak.lab import plots, strips, ticks
from polyak.lab.claim import Plot

from .results_for_tests import criterion, optimizer_claim
from .tasks_for_tests import made_up, together

# The first is one that a user had: 0.132, 0.132, 0.131, 0.131, 0.131.
RANGES = [(0.1306, 0.1322), (0.13, 0.13 + 1e-7), (1000.2, 1001.1), (1e7, 1e7 + 40), (-0.3001, -0.2999), (0.0, 3e-9),
          (0.997, 1.0), (0.12, 0.6), (0.5, 300.0), (1e-6, 1e3), (9990.0, 10_020.0), (1e5, 1.001e5)]  # fmt: skip


def drawn(low: float, high: float, *, log: bool) -> Figure:
    claim = optimizer_claim()
    line = plots.Line(claim.arms[0], x=[low, high], middle=[low, high], low=[low, high], high=[low, high], label="one")
    return plots.draw(claim, [line], Plot(x="x", y="y", log_x=log, log_y=log), above="")


def read(text: str) -> float:
    return float(text.replace("−", "-").replace(",", ""))


@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize(("low", "high"), RANGES)
def test_labels_say_their_ticks_and_no_two_are_equal(low: float, high: float, log: bool) -> None:
    if log and low <= 0:
        low, high = -high if high < 0 else 1e-12, -low if high < 0 else high
    axes = drawn(low, high, log=log).axes[0]
    for axis in (axes.xaxis, axes.yaxis):
        first, last = sorted(axis.get_view_interval())
        written = {
            float(at): label.get_text()
            for at, label in zip(axis.get_majorticklocs(), axis.get_ticklabels(), strict=True)
            if first <= at <= last
        }
        assert len(written) >= 2
        assert len(set(written.values())) == len(written)
        step = min(abs(a - b) for a in written for b in written if a != b)
        assert all(abs(read(text) - at) <= 0.01 * step + 1e-12 * abs(at) for at, text in written.items())


def test_three_digits_where_they_are_enough() -> None:
    assert ticks.labels([0.0, 0.25, 0.5]) == ["0", "0.25", "0.5"]
    assert ticks.labels([1000.0, 2000.0]) == ["1,000", "2,000"]
    assert ticks.labels([0.1305, 0.131, 0.1315]) == ["0.1305", "0.131", "0.1315"]
    assert ticks.labels([0.5]) == ["0.5"]
    assert ticks.labels([]) == []


def test_a_strips_labels_differ_and_have_room() -> None:
    c = criterion(optimizer_claim(), "half", "undecided", 0.1311, 0.1306, 0.1322)
    c = replace(c, bound=0.1312, per_seed=(0.1309, 0.1312))
    svg = strips.strip(c, "value")
    found = [(float(x), text) for x, text in re.findall(r'<text class="tick" x="([\d.]+)%"[^>]*>(.*?)</text>', svg)]
    texts = [text for _, text in found]
    assert len(set(texts)) == len(texts) >= 2
    apart = [b - a for (a, _), (b, _) in pairwise(found)]
    assert min(apart) >= max(100 * strips.GLYPH * len(text) / strips.NARROW for text in texts)


# ------------------------------------------------------------------------------------------------------------ whole numbers


@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize("places", [(1, 2, 3), (1, 3), (2, 4), (5, 5), (1, 30), (0, 1)])
def test_between_whole_numbers_there_are_no_ticks(places: tuple[float, ...], log: bool) -> None:
    if log and not all(places):
        return
    claim = optimizer_claim()
    x = [float(p) for p in places]
    line = plots.Line(claim.arms[0], x=x, middle=[0.5] * len(x), low=[0.5] * len(x), high=[0.5] * len(x), label="one")
    axis = plots.draw(claim, [line], Plot(x="x", y="y", log_x=log), above="").axes[0].xaxis
    first, last = sorted(axis.get_view_interval())
    at = [float(t) for t in axis.get_majorticklocs() if first <= t <= last]
    assert at
    assert all(t == round(t) for t in at)


def test_a_whole_option_has_an_even_axis_with_a_tick_for_each_value() -> None:
    arm = "muon:lr=0.02:weight_decay=0.1:ns_steps=1..3"
    t = made_up({"sgd:lr=0.1:weight_decay=0": [0.5] * 5, arm: [0.4] * 5}, tuning={arm: [(1, 0.4), (2, 0.5), (3, 0.6)]})
    trials = [replace(x, point={"ns_steps": x.point["lr"]}) if x.purpose == "tuning" else x for x in t.result.trials]
    axes = together(replace(t, result=replace(t.result, trials=tuple(trials)))).figure("sensitivity").axes[0]
    first, last = axes.get_xlim()
    assert axes.get_xscale() == "linear"
    assert [x for x in axes.get_xticks() if first <= x <= last] == [1, 2, 3]
