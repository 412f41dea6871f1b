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
from polyak.lab import statistics, words
from polyak.lab.claim import KINDS
from polyak.lab.report import Entry, entry
from polyak.lab.result import ClaimResult, TrialResult, verdict

from .results_for_tests import criterion, optimizer_claim, optimizer_result, solver_claim, solver_result


@pytest.fixture
def entries() -> list[Entry]:
    swift, swerve, leap = optimizer_claim(), optimizer_claim("swerve", name="Swerve | fast"), solver_claim()
    idle = solver_claim("idle", name="Idle")
    return [
        Entry(swift, optimizer_result(swift)),
        Entry(swerve, optimizer_result(swerve, "fails")),
        Entry(leap, solver_result(leap)),
        Entry(idle, None),
    ]


def test_one_row_per_system_then_its_criteria(entries):
    text = board.scoreboard(entries)
    assert (
        "4 systems. Mechanism: 1 fails, 2 not asked, 1 not run. Effect: 1 holds, 1 not seen at this scale, 1 not asked, 1 not run."
        in text
    )
    assert "| [Swift](#swift) | – not asked | ✓ holds, 2 of 2 | small | At an equal budget" in text
    assert "0.214 [0.172 to 0.268], asked at most 0.5 | 5 | 2026-11-20 | torch 2.13.0, cpu |" in text
    assert "| [Leap](#leap) | ✗ fails, 0 of 1 | – not asked | small |" in text
    assert "| Idle | – not run | – not run |" in text
    assert text.count("\n## ") == 3
    for c in entries[0].result.criteria:
        assert c.says in text


def test_scales_stand_side_by_side(entries):
    swift = entries[0].claim
    swift = replace(swift, scales=(*swift.scales, replace(swift.scales[0], name="gpu")))
    small, large = entries[0].result, replace(optimizer_result(swift, "fails"), scale="gpu")
    found = entry(swift, (), {"small": small, "gpu": large})
    assert (found.result, found.results) == (small, (small, large))
    text = board.scoreboard([found])
    assert "| [Swift](#swift) | – not asked | ✓ holds, 2 of 2 | small |" in text
    assert "| [Swift](#swift) | – not asked | ✗ not seen at this scale, 1 of 2 | gpu |" in text
    assert text.index("### Swift at scale small") < text.index("### Swift at scale gpu")
    assert text.startswith("# Scoreboard")
    assert "1 system." in text
    assert "| – not asked (small); – not asked (gpu) | ✓ holds, 2 of 2 (small); ✗ not seen, 1 of 2 (gpu) |" in (
        board.systems_table([found])
    )
    assert entry(swift, [large], {"small": small}).result is large, "own results come before published ones"
    assert entry(swift, [large], {"small": small}, scale="small").published


def test_a_system_that_fails_is_named_by_what_fails(entries):
    row = next(line for line in board.scoreboard(entries).splitlines() if line.startswith("| [Swerve"))
    assert "✗ not seen at this scale, 1 of 2" in row
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
        replace(e, result=ClaimResult.from_json(json.loads(json.dumps(board.published_record(e.result)))))
        if e.result
        else e
        for e in entries
    ]
    assert board.scoreboard(again) == board.scoreboard(entries)
    assert board.systems_table(again) == board.systems_table(entries)


def test_nothing_yet():
    assert "No systems yet." in board.scoreboard([])


def test_the_readme_has_a_table_for_each_room(entries):
    elsewhere = replace(entries[0].claim, slug="toy", room="toys")
    parts = board.systems_table([entries[0], Entry(elsewhere, None), *entries[1:]]).split("### ")
    assert parts[0] == ""
    assert [part.partition("\n\n")[0] for part in parts[1:]] == [
        "optim: optimizers",
        "toys",
        "generate: samplers of diffusion and flow models",
    ]
    assert [part.count("\n| `") for part in parts[1:]] == [2, 1, 2]
    assert all(part.partition("\n\n")[2].startswith("| slug |") for part in parts[1:])
    assert "| `toy` |" in parts[2]


def test_the_table_goes_between_its_markers(entries):
    table = board.systems_table(entries)
    assert "| `swift` | Swift | Adam-style" in table
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
    record = board.published_record(entries[0].result)
    assert "trials" not in record
    assert len(json.dumps(record)) < board.LARGEST / 5
    result = entries[0].result
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
        (999.6, "1,000"),
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


def test_a_number_of_more_digits_has_its_commas():
    assert [words.number(v, 5) for v in (1234.5, 12_345.0, 0.12345)] == ["1,234.5", "12,345", "0.12345"]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0 s"), (0.04, "0.04 s"), (45.2, "45 s"), (59.7, "1 min 00 s"), (200, "3 min 20 s"), (7500, "2 h 05 min")],
)
def test_duration(seconds, text):
    assert words.duration(seconds) == text


def test_findings():
    claim = optimizer_claim()
    assert words.finding(claim, None) == "Nothing yet: it has not been run."
    assert words.finding(claim, optimizer_result(claim)).startswith("Effect: holds, 2 of 2. At an equal budget")
    fails = words.finding(claim, optimizer_result(claim, "fails"))
    assert fails.startswith("Effect: not seen at this scale, 1 of 2. At half the budget")
    assert fails.endswith("measured ∞, asked at most 2.")
    assert "the control, which lacks the method's key ingredient, passes too" in words.finding(
        claim, optimizer_result(claim, "undecided")
    )
    one = solver_claim()
    assert words.finding(one, solver_result(one)).startswith("Mechanism: fails, 0 of 1. At 40")


@pytest.mark.parametrize(
    ("mechanism", "effect", "told", "named"),
    [
        (
            ("holds", "holds"),
            ("fails", "holds", "undecided"),
            "holds, 2 of 2|not seen at this scale, 1 of 3",
            ["effect0"],
        ),
        (("holds", "undecided"), ("holds",), "undecided, 1 of 2|holds, 1 of 1", ["mechanism1"]),
        (("fails",), ("undecided", "fails"), "fails, 0 of 1|not seen at this scale, 0 of 2", ["mechanism0", "effect1"]),
        (("holds",), ("holds", "holds"), "holds, 1 of 1|holds, 2 of 2", ["effect0"]),
        ((), ("holds",), "not asked|holds, 1 of 1", ["effect0"]),
        (("holds",), (), "holds, 1 of 1|not asked", ["mechanism0"]),
    ],
)
def test_each_kind_has_a_verdict_with_how_many_are_met(mechanism, effect, told, named):
    claim = optimizer_claim()
    loss, _, reported, _ = optimizer_result(claim).criteria
    found = [
        replace(loss, name=f"{kind}{i}", says=f"{kind} {i}", kind=kind, verdict=v)
        for kind, verdicts in (("mechanism", mechanism), ("effect", effect)) for i, v in enumerate(verdicts)
    ]  # fmt: skip
    aside = [
        replace(reported, name=f"aside {kind}", kind=kind, verdict="fails") for kind in KINDS
    ]  # these do not count
    result = replace(optimizer_result(claim), criteria=(*aside, *found), verdict=verdict(found))
    assert [words.said_of(result, kind) for kind in KINDS] == told.split("|")
    assert [c.name for c in words.deciding(result)] == named
    row = board.systems_table([Entry(claim, result)]).splitlines()[-1]
    assert row.endswith(" | ".join(words.marked(result, kind) for kind in KINDS) + " |")
    stated = result.to_json()["verdicts"]
    assert stated == {v.kind: {"verdict": v.verdict, "met": v.met, "of": v.total} for v in result.verdicts}
    assert list(stated) == [kind for kind, verdicts in (("mechanism", mechanism), ("effect", effect)) if verdicts]


def test_what_was_published_before_there_were_kinds_stays_readable():
    result = optimizer_result(optimizer_claim())
    old = json.loads(json.dumps(board.published_record(result)))
    del old["verdicts"]
    for c in old["criteria"]:
        del c["kind"]
    assert [c.kind for c in ClaimResult.from_json(old, kinds={"half": "mechanism"}).criteria] == [
        "effect", "mechanism", "effect", "effect",
    ]  # fmt: skip
    new = json.loads(json.dumps(board.published_record(result)))
    assert {c.kind for c in ClaimResult.from_json(new, kinds={"half": "mechanism"}).criteria} == {"effect"}


def test_a_verdict_that_the_estimate_does_not_explain_comes_with_its_reason():
    claim = optimizer_claim()
    c = replace(criterion(claim, "half", "fails", 1.4, 1.02, 1.88), seeds_passing=4)
    asked = "measured 1.4 (interval 1.02 to 1.88), asked at most 2"
    assert words.measured(c) == f"{asked}; every seed must pass, and only 4 of 5 do"
    assert words.measured(replace(c, seeds_passing=1)) == f"{asked}; every seed must pass, and only 1 of 5 does"
    assert words.measured(replace(c, verdict="holds")) == asked
    beyond = replace(c, estimate=2.1, high=2.4)
    assert words.reason(beyond) == ""  # the estimate says it
    for op, estimate, explains in ((">=", 2.0, False), (">", 2.0, True), ("<", 2.0, True), ("<=", 2.0, False)):
        assert (words.reason(replace(c, op=op, estimate=estimate)) == "") == explains
    control = replace(c, verdict="undecided", control_verdict="holds", note="its control 'blind' passes, too")
    assert words.reason(control) == "the control, which lacks the method's key ingredient, passes too"


def test_the_reason_of_an_undecided_criterion_is_the_one_that_the_judge_gives():
    claim = optimizer_claim()

    def reason(*ratios: float) -> str:
        values = {"adamw": [1.0] * len(ratios), "half": ratios}
        trials = [
            TrialResult(
                task="digits", arm=arm, seed=seed, purpose="report", point={}, curve=(), seconds=1.0,
                values={"train_loss": loss, "accuracy": 0.9},
            )
            for arm, losses in values.items() for seed, loss in enumerate(losses)
        ]  # fmt: skip
        judged = statistics.judge(replace(claim, criteria=claim.criteria[1:2]), trials, range(len(ratios)))
        assert judged[0].verdict == "undecided"
        return words.reason(judged[0])

    assert reason(1.0, 3.0, 1.5, 2.5, 2.2) == "the interval reaches across the bound (p = 0.807)"
    assert (
        reason(1.1, 1.1, 1.1) == "the interval does not tell the mean from the bound"
    )  # it is a point, below the bound
    assert reason(1.0, 1.1) == "2 seeds cannot decide: at least 3 are needed"


def test_criteria_with_the_same_words_are_told_apart_by_their_tasks():
    claim = optimizer_claim()
    first, half, text, accuracy = claim.criteria
    same = replace(claim, criteria=(first, half, replace(text, says=half.says), accuracy))
    names = words.names(same, same.criteria)
    assert names["half"] == f"{half.says} (Vision transformer on digits)"
    assert names["text"] == f"{half.says} (Letters of Shakespeare)"
    assert names["loss"] == first.says
    result = optimizer_result(same, "fails")
    found = replace(result, criteria=tuple(replace(c, says=names[c.name].partition(" (")[0]) for c in result.criteria))
    assert f"{half.says} (Vision transformer on digits): measured ∞" in words.finding(same, found)
    board_of = board.scoreboard([Entry(same, found)])
    assert board_of.count(f"| {half.says} (Letters of Shakespeare) (reported only) |") == 1
    assert board_of.count(f"| {half.says} (Vision transformer on digits) |") == 2  # what decides, and its own row


# ------------------------------------------------------------------------------------------------------------ this checkout


def test_this_checkout_says_what_is_published():
    """As `polyak scoreboard --check` does."""
    root = Path(polyak.__file__).resolve().parents[2]
    published = [entry(claim, (), claims.published_at(slug)) for slug, claim in claims.catalogue().items()]
    if not (root / "pyproject.toml").exists() or not any(e.result for e in published):
        pytest.skip("no checkout, or nothing published yet")
    readme = (root / "README.md").read_text(encoding="utf-8")
    assert (root / "SCOREBOARD.md").read_text(encoding="utf-8") == board.scoreboard(published)
    assert board.with_table(readme, board.systems_table(published)) == readme
