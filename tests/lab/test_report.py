"""The report: what its pages say, and how they look in a browser."""

from __future__ import annotations

import html
import json
import math
import re
from dataclasses import replace
from html.parser import HTMLParser
from itertools import pairwise

import pytest

from polyak.lab import plots, strips
from polyak.lab.claim import Plot
from polyak.lab.report import Entry, claim_page, index_page, write_report
from polyak.lab.result import ClaimResult

from .results_for_tests import criterion, optimizer_claim, optimizer_result, solver_claim, solver_result

VOID = {"meta", "link", "br", "img", "hr", "input"}


class Checker(HTMLParser):
    """Tags that close in order, identifiers that are unique, and all that a page would load."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.identifiers: list[str] = []
        self.loads: list[str] = []
        self.text = ""
        self.feed(page)
        assert self.open == []
        assert len(set(self.identifiers)) == len(self.identifiers)

    def handle_starttag(self, tag, attrs):
        facts = dict(attrs)
        if "id" in facts:
            self.identifiers.append(facts["id"])
        if "src" in facts or (
            tag in ("link", "use", "image") and not (facts.get("href") or "").startswith(("#", "data:"))
        ):
            self.loads.append(self.get_starttag_text())
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("script", "style"):
            self.text += data + " "


def test_every_page_is_well_formed_and_loads_nothing(pages):
    assert set(pages) == {"index", "swift", "swerve", "sway", "leap", "idle"}
    for path in pages.values():
        page = path.read_text(encoding="utf-8")
        assert Checker(page).loads == []
        assert not re.search(r"@import|url\((?!#)|xmlns:|https?://www\.w3", page)
        assert set(re.findall(r'https?://[^"<\s]+', page)) <= {
            "https://arxiv.org/abs/2201.00001",
            "https://example.org/swift",
        }


def test_the_first_screen_answers(pages):
    text = " ".join(Checker(pages["swift"].read_text(encoding="utf-8")).text.split())
    assert (
        "✓ Holds at scale small, on 5 seeds Both criteria are met. At an equal budget the training loss is at most half of "
        "AdamW's: measured 0.214 (interval 0.172 to 0.268), asked at most 0.5. "
        "2 reported trials diverged, counted at the worst value. training loss, ratio: Swift ÷ AdamW"
    ) in text
    assert "Asked Against AdamW, with equal budgets counted in optimizer steps" in text
    assert "Transformer-XL reaches a perplexity of 24.2" in text
    places = ["Both criteria are met", "0.214 (95 %: 0.172 to 0.268)", "Asked Against", "The paper says", "Criteria"]
    assert sorted(places, key=text.index) == places


def test_many_criteria_that_are_only_reported_are_folded():
    claim = optimizer_claim()
    result = optimizer_result(claim)
    more = [replace(claim.criteria[2], name=f"more{i}", says=f"More {i}") for i in range(3)]
    found = [replace(result.criteria[2], name=c.name, says=c.says) for c in more]
    page = claim_page(
        Entry(replace(claim, criteria=(*claim.criteria, *more)), replace(result, criteria=(*result.criteria, *found)))
    )
    text = " ".join(Checker(page).text.split())
    assert "5 more that are only reported: 4 ✗ fails, 1 ? undecided" in text
    assert page.index("At half the budget") < page.index("5 more that are only reported") < page.index("<h3>More 2")


def test_a_page_says_all_that_was_run(pages):
    text = " ".join(Checker(pages["swift"].read_text(encoding="utf-8")).text.split())
    for fact in (
        "lr: 0.002, 0.004, 0.008",
        "lr = 0.004",
        "fraction = 0.5",
        "0, 1, 2, 3, 4; the same data order",
        "1000, never reported",
        "20 min 34 s for all trials together",
        "torch 2.13.0",
        "processor x86_64",
        "2026-11-20",
        "The official code clips p.grad in place; ours does not.",
        "Control: Swift without the gradient difference, put in its place, fails, as it should.",
        "from polyak.optim.swift import Swift",
        "42 trials, tuning included",
        "× loss is nan at step 200",
        "epochs = 40",
    ):
        assert fact in text


def test_a_control_that_passes_is_told(pages):
    text = " ".join(Checker(pages["sway"].read_text(encoding="utf-8")).text.split())
    assert "? Undecided" in text
    assert "put in its place, passes, too." in text
    assert "This verdict was published with polyak" in text
    assert "Every trial" not in text


def test_a_claim_that_was_not_run(pages):
    text = " ".join(Checker(pages["idle"].read_text(encoding="utf-8")).text.split())
    assert "– Not run" in text
    assert "polyak reproduce idle" in text
    assert "What was planned" in text
    assert "path RMSE of Leap-3 on Mixture of eight Gaussians, at most 0.25 as a ratio. Every seed must pass." in text


def test_a_criterion_whose_task_the_scale_leaves_out_does_not_count():
    claim = optimizer_claim()
    result = optimizer_result(claim)
    absent = replace(result.criteria[1], gating=False, estimate=math.nan, low=math.nan, high=math.nan, per_seed=())
    page = claim_page(Entry(claim, replace(result, criteria=(result.criteria[0], absent, *result.criteria[2:]))))
    asked = page[page.index('class="asked"') : page.index("<dt>The paper says")]
    assert "At an equal budget" in asked
    assert "At half the budget" not in asked


def test_the_index_lists_everything(pages, entries):
    page = pages["index"].read_text(encoding="utf-8")
    text = " ".join(Checker(page).text.split())
    assert "5 systems: 1 ✓ holds 2 ✗ fails 1 ? undecided 1 – not run" in text
    assert page.count('<a href="') == 5
    assert re.findall(r"<td>(optim|generate)</td>", page) == ["generate", "generate", "optim", "optim", "optim"]
    assert "published with polyak" in text
    assert 'href="leap.html"' not in index_page(entries, linked={"swift"})


def test_only_the_pages_asked_for_are_written_and_linked(entries, tmp_path):
    index = write_report(entries, tmp_path / "new" / "folder", pages={"leap"})
    assert sorted(p.name for p in index.parent.iterdir()) == ["index.html", "leap.html"]
    assert index.read_text(encoding="utf-8").count('<a href="') == 1


def test_everything_is_escaped():
    nasty = "<script>alert('x')</script>\"&</script>$^{a}$"
    claim = optimizer_claim(name=nasty, summary=nasty, says=nasty, budget=nasty, departures=(nasty,), usage=nasty)
    claim = replace(
        claim,
        arms=tuple(replace(a, label=f"{a.name} {nasty}", says=nasty) for a in claim.arms),
        tasks=tuple(replace(t, label=f"{t.name} {nasty}", says=nasty) for t in claim.tasks),
        metrics=tuple(replace(m, label=f"{m.name} {nasty}", unit=nasty) for m in claim.metrics),
        criteria=tuple(replace(c, says=nasty) for c in claim.criteria),
        paper=replace(claim.paper, title=nasty, code="javascript:alert(1)"),
    )
    result = optimizer_result(claim)
    result = replace(result, notes=(nasty,), trials=tuple(replace(t, message=nasty) for t in result.trials))
    page = claim_page(Entry(claim, result))
    assert "<script>alert" not in page
    assert "javascript:" not in page
    assert page.count("</script>") == 2
    Checker(page)
    assert "<script>alert" not in index_page([Entry(claim, result)], linked=())


def test_the_data_is_all_there(pages, entries):
    page = pages["swerve"].read_text(encoding="utf-8")
    [data] = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    again = ClaimResult.from_json(json.loads(data))
    assert again.to_json() == entries[1].result.to_json()


# -------------------------------------------------------------------------------------------------------------- the drawings


def test_a_plot_takes_its_colours_from_the_page():
    claim = optimizer_claim()
    svg = plots.curves(claim, claim.tasks[0], claim.tasks[0].plots[0], optimizer_result(claim))
    assert not [color for color in plots.VARIABLES if color in svg]
    assert "#0102" not in svg
    for variable in ("--neutral", "--series-1", "--series-4", "--muted", "--line"):
        assert f"var({variable})" in svg
    assert set(re.findall(r"#[0-9a-f]{6}\b", svg)) <= {"#ffffff", "#000000"}
    text = html.unescape(svg)
    assert "font-family" not in svg
    for label in ("AdamW", "(2 of 5 diverged)", "optimizer step", "training loss (nats), log scale; lower is better"):
        assert label in text


def test_drawing_twice_gives_the_same():
    claim = solver_claim()
    drawn = [plots.curves(claim, claim.tasks[0], claim.tasks[0].plots[0], solver_result(claim)) for _ in range(2)]
    assert drawn[0] == drawn[1]


def shown(plot: Plot, **changes) -> dict[str, plots.Line]:
    claim = optimizer_claim()
    result = optimizer_result(claim)
    result = replace(result, **{k: v(result) for k, v in changes.items()})
    return {line.arm.name: line for line in plots.lines(claim, claim.tasks[0], plot, result)}


def test_no_two_arms_differ_by_colour_alone():
    claim = optimizer_claim()
    roles = ["baseline", *["method"] * 11], ["baseline"] * 12, ["baseline", "method", "ablation", "control"] * 3
    many = [
        replace(
            claim, arms=tuple(replace(claim.arms[0], name=f"arm{i}", role=r) for i, r in enumerate(rs)), criteria=()
        )
        for rs in roles
    ]
    for c in (claim, solver_claim(), *many):
        looks = {(plots.style(c, arm)[1], plots.shape(c, arm)) for arm in c.arms}
        assert len(looks) == len(c.arms)
        assert len({plots.swatch(c, arm) for arm in c.arms}) == len(c.arms)


def test_a_plot_of_many_arms_grows_with_their_labels():
    claim = optimizer_claim()
    result = optimizer_result(claim)
    arms = [replace(claim.arms[0], name=f"arm{i}", label=f"An arm with the long name {i}") for i in range(12)]
    trials = [replace(t, arm=a.name) for a in arms for t in result.trials if t.arm == "adamw" and t.task == "digits"]
    many = replace(claim, arms=tuple(arms), criteria=())
    svg = plots.curves(many, many.tasks[0], many.tasks[0].plots[0], replace(result, trials=tuple(trials)))
    _, _, width, height = (float(v) for v in re.search(r'viewBox="([^"]*)"', svg)[1].split())
    assert width == plots.WIDTH
    assert height > plots.HEIGHT
    places = [float(y) for y in re.findall(r'<text [^>]* y="([-\d.]+)"', svg)]
    assert len(places) >= 24
    assert all(0 <= y <= height for y in places)


def test_the_baseline_is_neutral_and_first():
    claim = solver_claim()
    styles = [plots.style(claim, arm) for arm in claim.arms]
    assert styles == [("neutral", ""), ("neutral", "6 3"), ("series-1", ""), ("series-2", "")]


def test_a_median_counts_a_diverged_seed_as_the_worst():
    accuracy = shown(Plot(x="step", y="accuracy"))["wild"]
    assert len(accuracy.crosses) == 2
    assert accuracy.x[-1] == 560
    assert accuracy.middle[-1] == accuracy.low[-1]  # two at 0, so the median is the lowest that lives
    loss = shown(Plot(x="step", y="train_loss", log_y=True))["wild"]
    assert loss.middle[-1] == loss.high[-1]


def test_an_arm_that_always_diverges_is_shown():
    def all_diverge(result):
        return tuple(
            replace(t, diverged=True, curve=t.curve[:5]) if t.arm == "swift" else t
            for t in result.trials
            if t.arm != "wild"
        )

    line = shown(Plot(x="step", y="train_loss"), trials=all_diverge)["swift"]
    assert len(line.crosses) == 5
    assert "(5 of 5 diverged)" in line.label
    assert line.end is not None
    claim = optimizer_claim()
    result = optimizer_result(claim)
    assert "5 of 5" in html.unescape(
        plots.curves(claim, claim.tasks[0], claim.tasks[0].plots[0], replace(result, trials=all_diverge(result)))
    )


def test_seeds_measured_at_different_places_are_drawn_alone():
    def scattered(result):
        return tuple(
            replace(t, curve=tuple(({"step": at["step"] + t.seed / 10}, values) for at, values in t.curve))
            for t in result.trials
        )

    lines = shown(Plot(x="step", y="train_loss"), trials=scattered)
    assert len(lines["swift"].singles) == 5
    assert lines["swift"].x == []


def test_nothing_to_draw():
    claim = solver_claim()
    result = replace(solver_result(claim), trials=())
    assert plots.curves(claim, claim.tasks[0], claim.tasks[0].plots[0], result) == ""
    assert plots.curves(claim, claim.tasks[0], Plot(x="elsewhere", y="rmse"), solver_result(claim)) == ""


@pytest.mark.parametrize(
    ("wanted", "heights"),
    [([10, 11, 12], [20, 20, 20]), ([5, 5], [15, 30]), ([0, 299, 150], [20, 40, 20]), ([200], [300])],
)
def test_labels_are_pushed_apart(wanted, heights):
    centres = plots.spread(wanted, heights, low=0, high=300)
    boxes = sorted((c - h / 2, c + h / 2) for c, h in zip(centres, heights, strict=True))
    assert all(below[1] <= above[0] + 1e-9 for below, above in pairwise(boxes))
    assert boxes[0][0] >= -1e-9
    assert boxes[-1][1] <= 300 + 1e-9


@pytest.mark.parametrize("compare", ["ratio", "difference", "value"])
@pytest.mark.parametrize(
    ("estimate", "low", "high"),
    [
        (0.3, 0.2, 0.4),
        (math.inf, 0.1, math.inf),
        (math.nan, math.nan, math.nan),
        (2.0, 2.0, 2.0),
        (1e-9, 1e-12, 1e3),
        (-3.0, -4.0, -2.0),
        (0.0, 0.0, 0.1),
    ],
)
def test_a_strip_stays_inside_its_box(compare, estimate, low, high):
    c = criterion(optimizer_claim(), "half", "undecided", estimate, low, high)
    svg = strips.strip(c, compare)
    assert "nan" not in svg
    assert "inf%" not in svg
    places = [float(p) for p in re.findall(r'(?:x|x1|x2|cx)="([-\d.]+)%"', svg)]
    assert places
    assert all(0 <= p <= 100 for p in places)
    assert "asked: at most 2" in svg
