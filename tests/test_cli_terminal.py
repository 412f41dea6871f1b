"""What the terminal shows of a comparison, at the widths that terminals have."""

from __future__ import annotations

import io
import math
from dataclasses import replace

import pytest
from rich.console import Console

from polyak.cli import terminal
from polyak.lab.report import Entry
from polyak.lab.run import Progress

from .lab.results_for_tests import optimizer_claim, optimizer_result
from .lab.tasks_for_tests import made_up, together

FINALS = {
    "adamw": [0.50, 0.52, 0.49, 0.51, 0.53],
    "adan:weight_decay=0.02": [0.41, 0.43, 0.38, 0.42, 0.42],
    "adan:weight_decay=0.2": [0.46, 0.51, 0.5, math.inf, 0.52],
    "lion": [0.61, 0.6, 0.58, 0.63, 0.61],
}
# Per arm: its name, its final value, its difference, both ends of the interval, its verdict.
SAID = [
    ("AdamW", "0.51", "baseline"),
    ("Adan (weight_decay 0.02)", "0.412", "−0.1", "−0.11", "to −0.08", "✓ better"),
    ("Adan (weight_decay 0.2)", "∞", "∞", "−∞", "to ∞", "? undecided"),
    ("Lion", "0.606", "0.1", "0.07", "to 0.12", "✗ worse"),
]


def shown(width: int, *names: str, **changes) -> list[str]:
    """The lines after the answer."""
    out = io.StringIO()
    found = together(*(made_up(FINALS, name=name, **changes) for name in names or ("made",)))
    console = Console(file=out, width=width, highlight=False)
    terminal.comparison(console, found)
    answer = io.StringIO()
    Console(file=answer, width=width, highlight=False).print(found.answer)
    return out.getvalue()[len(answer.getvalue()) :].splitlines()


def rows(lines: list[str], firsts: list[str]) -> list[str]:
    """A table's rows, each of all its lines: where these names begin one."""
    rule = next(i for i, line in enumerate(lines) if set(line.strip()) == {"─"})
    found: list[str] = []
    for line in lines[rule + 1 :]:
        if len(found) < len(firsts) and line.strip().startswith(firsts[len(found)]):
            found.append("")
        if found:
            found[-1] += f" {line.strip()}"
    return found


@pytest.mark.parametrize("width", [60, 70, 80, 100, 120, 200])
def test_no_width_loses_an_arm_a_number_or_a_verdict(width: int) -> None:
    lines = shown(width)
    assert all(len(line) <= width for line in lines)
    assert not any("…" in line for line in lines)
    found = rows(lines, [said[0].split()[0] for said in SAID])
    for row, said in zip(found, SAID, strict=True):
        # A name of several words may take several lines; numbers and verdicts are whole.
        words = [w for part in said[:1] for w in part.split()] + list(said[1:])
        assert [w for w in words if w not in row] == []


@pytest.mark.parametrize("width", [30, 60, 80, 120, 200])
def test_columns_that_are_left_out_are_told(width: int) -> None:
    said = " ".join(" ".join(shown(width)).split())
    whole = all(head in said for head in ("steps", "time", "chance", "diverged"))
    assert whole == (width >= 120)
    assert said.endswith("More columns: in a wider terminal, or on the page.") == (not whole)
    assert " ".join(shown(width, "one", "two")).count("More columns") == (not whole)


def test_eighty_columns_have_a_line_for_a_name_and_what_reaching_the_target_took() -> None:
    lines = shown(80)
    assert all(any(line.strip().startswith(said[0]) for line in lines) for said in SAID)
    short = {"adamw": FINALS["adamw"], "lion": FINALS["lion"]}
    out = io.StringIO()
    terminal.comparison(Console(file=out, width=80, highlight=False), together(made_up(short)))
    assert "steps" in out.getvalue()
    assert "not reached" in out.getvalue()


@pytest.mark.parametrize("width", [30, 45])
def test_narrower_still_each_arm_is_a_sentence(width: int) -> None:
    said = " ".join(" ".join(shown(width)).split())
    assert "Adan (weight_decay 0.02): loss 0.412, difference −0.1 (95 %: −0.11 to −0.08), ✓ better" in said
    assert "Adan (weight_decay 0.2): loss ∞, difference ∞ (95 %: −∞ to ∞), 1 of 5 diverged, ? undecided" in said


@pytest.mark.parametrize("width", [60, 80, 120])
def test_divergence_is_said_at_every_width(width: int) -> None:
    assert "1 of 5" in " ".join(shown(width))


def test_times_are_told_apart_and_seeds_that_do_not_reach_the_target() -> None:
    slow, fast = [0.9, 0.8, 0.6, 0.5], [0.6, 0.5, 0.45, 0.4]
    curves = {"adamw": [slow] * 5, "adan": [fast] * 3 + [slow, [0.9] * 4], "lion": [[0.9] * 4] * 4 + [fast]}
    finals = {name: [c[-1] for c in runs] for name, runs in curves.items()}
    out = io.StringIO()
    terminal.comparison(
        Console(file=out, width=120, highlight=False), together(made_up(finals, curves=curves, unit="seconds"))
    )
    adamw, adan, lion = rows(out.getvalue().splitlines(), ["AdamW", "Adan", "Lion"])
    assert " 0.4 s " in adamw
    assert "seeds" not in adamw
    assert " 0.2 s " in adan
    assert "4 of 5 seeds" in adan
    assert "reached by" in lion
    assert "1 of 5 seeds" in lion


def test_several_tasks_have_a_table_each() -> None:
    lines = shown(80, "one", "two")
    assert [line for line in lines if line in ("one", "two")] == ["one", "two"]
    assert sum("95 %" in line for line in lines) == 2


def test_lines_of_progress_count_the_trials_of_all_claims(capsys) -> None:
    def news(claim: str, done: int, elapsed: float, running: tuple[str, ...] = ("one",)) -> Progress:
        eta = 60.0 if done else None
        return Progress(claim=claim, done=done, total=10, cached=0, running=running, elapsed=elapsed, eta_seconds=eta)

    with terminal.progress() as tell:
        for claim in ("adan", "lion", "spam"):
            tell(news(claim, 0, 0.0, running=()))
        tell(news("adan", 0, 0.1))
        tell(news("lion", 0, 0.2))
        tell(news("adan", 3, terminal.REST_S - 1))  # too soon after the last
        tell(news("spam", 4, terminal.REST_S + 1))
        for claim in ("adan", "lion", "spam"):
            tell(news(claim, 10, terminal.REST_S + 2, running=()))
    assert capsys.readouterr().err.splitlines() == [
        "0 of 30 trials, estimating the time",
        "7 of 30 trials, 1 min 00 s left",
        "30 of 30 trials, done",
    ]


def test_the_answer_of_many_arms_has_a_line_for_each() -> None:
    finals = {"adamw": FINALS["adamw"], **{f"sgd:momentum=0.{i}": [0.1 * i] * 5 for i in range(1, 6)}}
    out = io.StringIO()
    found = together(made_up(finals))
    terminal.comparison(Console(file=out, width=120, highlight=False), found)
    lines = [line.rstrip() for line in out.getvalue().splitlines()]
    assert lines[:5] == [f"{found.said.head}.", *(f"  {clause}" for clause in found.said.rest)]


@pytest.mark.parametrize("width", [60, 120])
def test_a_system_shows_the_verdicts_of_all_its_scales(width: int) -> None:
    claim = optimizer_claim()
    claim = replace(claim, scales=(*claim.scales, replace(claim.scales[0], name="gpu")))
    small = optimizer_result(claim)
    entry = Entry(claim, small, more=(replace(optimizer_result(claim, "fails"), scale="gpu"),))
    out = io.StringIO()
    console = Console(file=out, width=width, highlight=False)
    console.print(terminal.listing([entry], width))
    terminal.sheet(console, entry)
    text = out.getvalue()
    assert "✓ holds, 2 of 2 (small)" in text
    assert "✗ not seen, 1 of 2 (gpu)" in text
    assert "at scale small, on 5 seeds" in text
    assert "at scale gpu, on 5 seeds" in text
    assert max(map(len, text.splitlines())) <= width
