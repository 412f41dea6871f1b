"""SCOREBOARD.md and the README's table: what they say, and that they say it the same each time."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

import polyak
from polyak import claims
from polyak.lab import scoreboard as board
from polyak.lab import words
from polyak.lab.result import ClaimResult

from .results_for_tests import criterion, optimizer_claim, optimizer_result, solver_claim, solver_result


@pytest.fixture
def entries() -> list[board.Entry]:
    swift, swerve, leap = optimizer_claim(), optimizer_claim("swerve", name="Swerve | fast"), solver_claim()
    idle = solver_claim("idle", name="Idle")
    return [
        (swift, optimizer_result(swift)),
        (swerve, optimizer_result(swerve, "fails")),
        (leap, solver_result(leap)),
        (idle, None),
    ]


def test_one_row_per_system_then_its_criteria(entries):
    text = board.scoreboard(entries)
    assert "4 systems: 1 holds, 2 fails, 1 not run." in text
    assert "| [Swift](#swift) | ✓ holds | small | At an equal budget" in text
    assert "0.214 [0.172 to 0.268], asked at most 0.5 | 5 | 2026-11-20 | torch 2.13.0, cpu |" in text
    assert "| Idle | – not run |" in text
    assert text.count("\n## ") == 3
    for c in entries[0][1].criteria:
        assert c.says in text


def test_a_system_that_fails_is_named_by_what_fails(entries):
    row = next(line for line in board.scoreboard(entries).splitlines() if line.startswith("| [Swerve"))
    assert "✗ fails" in row
    assert "At half the budget" in row
    assert "∞" in row


def test_every_row_has_as_many_cells_as_its_table(entries):
    widths = []
    for line in board.scoreboard(entries).splitlines():
        cells = line.replace(r"\|", "").count("|")
        widths = [*widths, cells] if line.startswith("|") else []
        assert len(set(widths)) <= 1, line
    assert r"Swerve \| fast" in board.scoreboard(entries)


def test_the_same_data_gives_the_same_bytes(entries):
    again = [
        (c, ClaimResult.from_json(json.loads(json.dumps(board.published_record(r)))) if r else None) for c, r in entries
    ]
    assert board.scoreboard(again) == board.scoreboard(entries)
    assert board.systems_table(again) == board.systems_table(entries)


def test_nothing_yet():
    assert "No systems yet." in board.scoreboard([])


def test_the_table_goes_between_its_markers(entries):
    table = board.systems_table(entries)
    assert "| `swift` | optim | Swift | Adam-style" in table
    assert "&lt;of the past>" in table
    readme = f"before\n{board.OPEN}\nold\n{board.CLOSE}\nafter\n"
    assert board.with_table(readme, table) == f"before\n{board.OPEN}\n{table}\n{board.CLOSE}\nafter\n"
    assert board.with_table(board.with_table(readme, table), table) == board.with_table(readme, table)


@pytest.mark.parametrize("readme", ["", board.OPEN, board.CLOSE + board.OPEN, 2 * (board.OPEN + board.CLOSE)])
def test_a_readme_without_a_place_is_refused(readme):
    with pytest.raises(ValueError, match=r"README\.md must have one"):
        board.with_table(readme, "table")


# --------------------------------------------------------------------------------------------------------------- the record


def test_what_is_published_is_small_and_has_no_trials(entries):
    record = board.published_record(entries[0][1])
    assert "trials" not in record
    assert len(json.dumps(record)) < board.LARGEST / 5
    result = entries[0][1]
    with pytest.raises(ValueError, match="at most 50,000"):
        board.published_record(replace(result, notes=("long",) * 10_000))


def test_json_round_trip():
    claim = optimizer_claim()
    result = optimizer_result(claim, "fails")
    again = ClaimResult.from_json(json.loads(json.dumps(result.to_json(), allow_nan=False)))
    assert math.isnan(again.criteria[1].low)
    assert again.criteria[1].high == math.inf
    assert again.trials == result.trials
    assert again.criteria[0] == result.criteria[0]
    assert again.to_json() == result.to_json()


# ---------------------------------------------------------------------------------------------------------------- the words


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.31234, "0.312"),
        (1.0, "1"),
        (-0.0123, "−0.0123"),
        (0.0000123, "1.23e−5"),
        (1234.5, "1,234"),
        (48_000_000.0, "4.8e7"),
        (-1234, "−1,234"),
        (5, "5"),
        (True, "True"),
        ("sgd", "sgd"),
        (math.inf, "∞"),
        (-math.inf, "−∞"),
        (math.nan, "none"),
        (0.0, "0"),
    ],
)
def test_number(value, text):
    assert words.number(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0 s"), (0.04, "0.04 s"), (45.2, "45 s"), (59.7, "1 min 00 s"), (200, "3 min 20 s"), (7500, "2 h 05 min")],
)
def test_duration(seconds, text):
    assert words.duration(seconds) == text


def test_findings():
    claim = optimizer_claim()
    assert words.finding(None) == "Nothing yet: it has not been run."
    assert words.finding(optimizer_result(claim)).startswith("Both criteria are met. At an equal budget")
    fails = words.finding(optimizer_result(claim, "fails"))
    assert fails.startswith("Of 2 criteria, 1 is met. At half the budget")
    assert fails.endswith("measured ∞, asked at most 2.")
    assert "the control, which lacks the method's key ingredient, passes too" in words.finding(
        optimizer_result(claim, "undecided")
    )
    one = solver_claim()
    assert words.finding(solver_result(one)).startswith("The criterion is not met.")
    straddles = criterion(claim, "half", "undecided", 2.0, 1.8, 2.3)
    assert words.why_undecided(straddles) == "the interval, 1.8 to 2.3, does not lie on one side of the bound"
    assert words.why_undecided(replace(straddles, note="2 seeds cannot decide")) == "2 seeds cannot decide"


# ------------------------------------------------------------------------------------------------------------ this checkout


def test_this_checkout_says_what_is_published():
    """As `polyak scoreboard --check` does."""
    root = Path(polyak.__file__).resolve().parents[2]
    published = [(claim, claims.published(slug)) for slug, claim in claims.catalogue().items()]
    if not (root / "pyproject.toml").exists() or not any(result for _, result in published):
        pytest.skip("no checkout, or nothing published yet")
    readme = (root / "README.md").read_text(encoding="utf-8")
    assert (root / "SCOREBOARD.md").read_text(encoding="utf-8") == board.scoreboard(published)
    assert board.with_table(readme, board.systems_table(published)) == readme
