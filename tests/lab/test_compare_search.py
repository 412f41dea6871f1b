"""Tuning: the grid, the steps beyond it, early stops, and the same questions after an interruption."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pytest

from polyak.lab.compare.search import Search
from polyak.lab.compare.spec import Range

SPACE = {"lr": Range(1e-4, 1e-1, open=True), "weight_decay": Range(1e-3, 1e-1, open=True)}


def drive(search: Search, f: Callable[[dict[str, float]], float]) -> list[dict[str, float]]:
    """Ask until nothing is left, tell in order."""
    asked: list[dict[str, float]] = []
    while new := search.ask():
        for point in new:
            asked.append(point)
            search.tell(len(asked) - 1, f(point), stopped=False)
    return asked


def bowl(best: float) -> Callable[[dict[str, float]], float]:
    return lambda point: math.log(point["lr"] / best) ** 2 + 0.01 * math.log(point["weight_decay"] / 0.01) ** 2


def test_the_first_trials_are_a_grid_of_the_learning_rate() -> None:
    search = Search(SPACE, 10, "lower", 10)
    first = search.ask()
    assert search.grid == len(first) == 6
    assert search.ask() == [], "nothing more until all of the grid is told"
    rates = [point["lr"] for point in first]
    assert 1e-4 <= rates[0] < 1e-4 * 10**0.5
    assert [b / a for a, b in pairwise(rates)] == pytest.approx([10**0.5] * 5, rel=2e-3)
    assert {point["weight_decay"] for point in first} == {0.01}


def test_grids_begin_anywhere_in_their_first_step() -> None:
    """So that what one arm's grid happens to hit is noise between seeds, and no lasting gain: each part is as likely."""
    seeds = [i * 2**32 // 100 for i in range(100)]
    starts = [Search(SPACE, 3, "lower", 10, seed).ask()[0]["lr"] for seed in seeds]
    parts = np.log10(np.divide(starts, 1e-4))  # the step is a power of ten
    assert parts == pytest.approx(np.arange(100) / 100, abs=1e-3)
    again = [Search({"lr": Range(2e-4, 2e-1)}, 3, "lower", 10, seed).ask()[0]["lr"] for seed in seeds]
    assert np.divide(again, starts) == pytest.approx([2.0] * 100, rel=2e-3), "of one seed all arms' begin alike"
    orders = {"order": Range(1, 3, whole=True)}
    assert [p["order"] for p in Search(orders, 3, "lower", 5, seed=7).ask()] == [1, 2, 3]


@pytest.mark.parametrize(("trials", "rates"), [(1, [-2.5]), (2, [-3.25, -1.75])])
def test_few_trials_are_inside_of_the_range(trials: int, rates: list[float]) -> None:
    """In the middle of it or of its halves, so that no value of it is farther from one that is tried than need be."""
    first = Search(SPACE, trials, "lower", 10).ask()
    assert [math.log10(point["lr"]) for point in first] == pytest.approx(rates, abs=1e-3)
    assert {point["weight_decay"] for point in first} == {0.01}


@pytest.mark.parametrize("trials", [1, 2])
@pytest.mark.parametrize("best", [1e-5, 1.0])
def test_few_trials_go_nowhere_else(trials: int, best: float) -> None:
    search = Search(SPACE, trials, "lower", 10)
    asked = drive(search, bowl(best))
    assert len(asked) == trials
    assert search.space == SPACE
    assert search.best == (trials - 1 if best == 1.0 else 0)


def test_two_whole_numbers_are_two() -> None:
    for high in (2, 3, 4, 5):
        asked = drive(Search({"order": Range(1, high, whole=True)}, 2, "lower", 5), lambda p: p["order"])
        assert [p["order"] for p in asked] == [1, high]
    [asked] = drive(Search({"scale": Range(0.0, 8.0), "lr": SPACE["lr"]}, 1, "lower", 5), lambda p: p["lr"])
    assert asked["scale"] == 4.0
    assert [p["scale"] for p in drive(Search({"scale": Range(0.0, 8.0)}, 2, "lower", 5), lambda p: 0.0)] == [2.0, 6.0]


def test_the_same_number_of_trials_and_a_good_end() -> None:
    search = Search(SPACE, 12, "lower", 10)
    asked = drive(search, bowl(4e-3))
    assert len(asked) == 12
    assert abs(math.log10(asked[search.best]["lr"] / 4e-3)) < 0.35
    mirrored = Search(SPACE, 12, "higher", 10)
    assert drive(mirrored, lambda p: -bowl(4e-3)(p)) == asked


@pytest.mark.parametrize(("best", "side"), [(2.0, "high"), (5e-6, "low")])
def test_it_goes_beyond_an_end_where_the_best_is(best: float, side: str) -> None:
    search = Search(SPACE, 10, "lower", 10)
    asked = drive(search, bowl(best))
    beyond = [point["lr"] for point in asked[6:]]
    step = 10**0.5 if side == "high" else 10**-0.5
    start = asked[5 if side == "high" else 0]["lr"]
    reached = [start * step**i for i in (1, 2, 3, 4)]
    # The last step is past the best, and worse than the one before: no further one is taken.
    count = 1 + next(
        (i for i in range(4) if abs(math.log(reached[i] / best)) > abs(math.log(reached[i - 1] / best)) and i), 3
    )
    assert count >= 3
    assert beyond[:count] == pytest.approx(reached[:count], rel=3e-3)
    assert abs(math.log10(asked[search.best]["lr"] / best)) < 0.3
    closed = Search({"lr": Range(1e-4, 1e-1)}, 10, "lower", 10)
    ends = [p["lr"] for p in drive(closed, lambda p: math.log(p["lr"] / best) ** 2)]
    assert min(ends) >= 1e-4, "ends that were asked for stay"
    assert max(ends) <= 1e-1


def test_one_option_is_halved_about_the_best() -> None:
    """What is found does not depend on where in its range the best rate is: a tree-structured Parzen estimator's would."""
    step = 10**0.5  # of the grid of six

    def valley(best: float) -> Callable[[dict[str, float]], float]:
        return lambda point: math.log(point["lr"] / best) ** 2

    def rates(low: float, better: str = "lower", sign: float = 1.0) -> list[float]:
        f = valley(4e-3)
        search = Search({"lr": Range(low, 1e3 * low)}, 10, better, 10)  # type: ignore[arg-type]
        return [p["lr"] for p in drive(search, lambda p: sign * f(p))]

    asked = rates(1e-4)
    assert asked[6:8] == pytest.approx([3.162e-3 * step**0.5, 3.162e-3 * step**-0.5], rel=2e-3)
    assert asked[8] == pytest.approx(3.162e-3 * step**0.25, rel=2e-3)
    assert asked[9] == pytest.approx(3.162e-3 * step**0.125, rel=2e-3)
    for k in (-1, 1, 2):
        moved = rates(1e-4 * step**k)
        assert moved[6:] == pytest.approx(asked[6:], rel=3e-3), "whichever grid point of its range it is"
    assert rates(1e-4, "higher", -1.0) == asked
    plain = drive(Search({"scale": Range(-4.0, 4.0)}, 10, "lower", 10), lambda p: (p["scale"] - 0.5) ** 2)
    best = min(plain, key=lambda p: abs(p["scale"] - 0.5))
    assert abs(best["scale"] - 0.5) < 0.2


def test_halving_goes_on_beside_trials_that_were_stopped_or_diverged() -> None:
    search = Search({"lr": Range(1e-4, 1e-1)}, 10, "lower", 10)
    asked = drive(search, lambda p: math.inf if p["lr"] > 2e-3 else math.log(p["lr"] / 4e-3) ** 2)
    assert 1e-3 < asked[search.best]["lr"] <= 2e-3
    assert len(asked) == 10


def test_what_is_asked_follows_from_what_was_told() -> None:
    assert drive(Search(SPACE, 12, "lower", 10), bowl(3e-3)) == drive(Search(SPACE, 12, "lower", 10), bowl(3e-3))


def test_infinite_values_are_told_as_they_are() -> None:
    search = Search(SPACE, 8, "lower", 10)
    asked = drive(search, lambda p: math.inf if p["lr"] > 1e-3 else bowl(1e-2)(p))
    assert asked[search.best]["lr"] <= 1e-3
    lost = Search(SPACE, 8, "higher", 10)
    assert len(drive(lost, lambda p: -math.inf)) == 8
    assert lost.best == 0


def test_only_those_after_the_grid_stop_early_and_only_where_they_are_worse_than_the_median() -> None:
    search = Search({"lr": Range(1e-4, 1e-1)}, 10, "lower", 10)
    grid = search.ask()
    for number, _ in enumerate(grid):
        for point in range(1, 11):
            assert search.heard(number, point / 10, 100.0 + number), "the grid runs to its end"
        search.tell(number, 100.0 + number, stopped=False)
    (_,) = search.ask()
    # The median at every point is 102.5; worse than it is stopped, once a third of the budget is used.
    went_on = [search.heard(6, point / 10, 102.6) for point in range(1, 11)]
    assert went_on.index(False) == 2
    search.tell(6, 102.6, stopped=True)
    (_,) = search.ask()
    assert all(search.heard(7, point / 10, 102.4) for point in range(1, 11))
    search.tell(7, 102.4, stopped=False)
    assert search.best == 0, "a trial that was stopped is never the best"


def test_few_trials_and_whole_numbers() -> None:
    assert len(drive(Search(SPACE, 1, "lower", 5), bowl(1e-2))) == 1
    orders = drive(Search({"order": Range(1, 3, whole=True)}, 5, "lower", 5), lambda p: abs(p["order"] - 2))
    assert {p["order"] for p in orders} <= {1, 2, 3}
    assert all(isinstance(p["order"], int) for p in orders)
