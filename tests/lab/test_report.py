"""The report: what its pages say, and how they look in a browser."""

from __future__ import annotations

import html
import json
import math
import re
from dataclasses import replace
from html.parser import HTMLParser
from importlib.resources import files
from itertools import combinations, pairwise

import numpy as np
import pytest
from matplotlib.lines import Line2D

from polyak.lab import plots, strips, words
from polyak.lab.claim import Arm, Claim, Plot
from polyak.lab.report import Entry, breakable, claim_page, index_page, write_report
from polyak.lab.result import ClaimResult

from .results_for_tests import criterion, optimizer_claim, optimizer_result, solver_claim, solver_result

VOID = {"meta", "link", "br", "img", "hr", "input", "wbr"}


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
    assert set(pages) == {"index", "gallery", "swift", "swerve", "sway", "leap", "idle"}
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
        "Mechanism: – not asked Effect: ✓ holds, 2 of 2 at scale small, on 5 seeds At an equal budget the training loss is at "
        "most half of AdamW's: measured 0.214 (interval 0.172 to 0.268), asked at most 0.5. "
        "2 reported trials diverged, counted at the worst value. training loss, ratio: Swift ÷ AdamW"
    ) in text
    assert "Asked Against AdamW, with equal budgets counted in optimizer steps" in text
    assert "Transformer-XL reaches a perplexity of 24.2" in text
    places = ["holds, 2 of 2", "0.214 (95 %: 0.172 to 0.268)", "Asked Against", "The paper says", "Criteria"]
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
    assert "Effect: ? undecided, 1 of 2 at scale small" in text
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
    absent = replace(
        result.criteria[1], gating=False, estimate=math.nan, low=math.nan, high=math.nan, per_seed=(), note="left out"
    )
    page = claim_page(Entry(claim, replace(result, criteria=(result.criteria[0], absent, *result.criteria[2:]))))
    asked = page[page.index('class="asked"') : page.index("<dt>The paper says")]
    assert "At an equal budget" in asked
    assert "At half the budget" not in asked
    # Nothing was measured of it, so that there is no strip, and there are no numbers.
    assert page.count('<svg class="strip"') == 1 + len(result.criteria) - 1
    said = page[page.index("<h3>At half the budget") :].partition("</article>")[0]
    assert "seeds pass" not in said
    assert absent.note in said


def test_a_long_list_of_criteria_is_folded():
    claim = optimizer_claim()
    result = optimizer_result(claim)
    more = [replace(claim.criteria[0], name=f"more{i}", says=f"More {i}") for i in range(11)]
    found = [replace(result.criteria[0], name=c.name, says=c.says, verdict="fails") for c in more]

    def asked(n: int) -> str:
        criteria = (*claim.criteria, *more[:n])
        page = claim_page(
            Entry(replace(claim, criteria=criteria), replace(result, criteria=(*result.criteria, *found[:n])))
        )
        return page[page.index("<dt>Asked") : page.index("<dt>The paper says")]

    assert "<details>" not in asked(10)
    assert "<summary>13 criteria: 2 ✓ holds, 11 ✗ fails</summary>" in asked(11)
    assert asked(11).count("<li>") == 13


def test_the_index_lists_everything(pages, entries):
    page = pages["index"].read_text(encoding="utf-8")
    text = " ".join(Checker(page).text.split())
    assert "5 systems. Mechanism: 1 ✗ fails 1 – not run" in text
    assert "Effect: 1 ✓ holds 1 ✗ not seen 1 ? undecided 1 – not run" in text
    assert page.count('<a href="') == 6
    assert re.findall(r"<td>(optim|generate)</td>", page) == ["generate", "generate", "optim", "optim", "optim"]
    assert "published with polyak" in text
    assert 'href="leap.html"' not in index_page(entries, linked={"swift"})


def test_only_the_pages_asked_for_are_written_and_linked(entries, tmp_path):
    index = write_report(entries, tmp_path / "new" / "folder", pages={"leap"})
    assert sorted(p.name for p in index.parent.iterdir()) == ["gallery.html", "index.html", "leap.html"]
    assert index.read_text(encoding="utf-8").count('<a href="') == 2  # the gallery, and the one page


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
    assert page.count("</script>") == 3
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


def many_arms(count: int) -> Claim:
    """A baseline and methods, as a comparison has them."""
    claim = optimizer_claim()
    roles = ["baseline", *["method"] * (count - 1)]
    arms = [replace(claim.arms[0], name=f"arm{i}", label=f"Arm {i}", role=r) for i, r in enumerate(roles)]
    return replace(claim, arms=tuple(arms), criteria=())


def test_of_fourteen_arms_any_two_differ_in_two_ways():
    claim = many_arms(14)
    looks = [(*plots.style(claim, arm), plots.shape(claim, arm)) for arm in claim.arms]
    for one, other in combinations(looks, 2):
        assert sum(a != b for a, b in zip(one, other, strict=True)) >= 2


def beside_its_point(claim: Claim, arm: Arm) -> tuple[bool, ...]:
    """Where an arm's swatch has ink to the left and to the right of the point."""
    svg = plots.swatch(claim, arm)
    dashes = [float(d) for d in re.search(r'stroke-dasharray="([^"]*)"', svg)[1].split()] or [99.0, 0.0]
    around = [float(x) for x in re.findall(r"([\d.]+),", re.search(r'points="([^"]*)"', svg)[1])]
    inked = []
    for i in range(96):
        x, at, place = i / 4, 0, (i / 4) % sum(dashes)
        while place >= dashes[at]:
            place, at = place - dashes[at], at + 1
        if not min(around) <= x <= max(around):
            inked.append(at % 2 == 0)
    return tuple(inked)


def test_dashes_show_in_swatches():
    claim = many_arms(14)
    looks = {plots.style(claim, arm)[1]: beside_its_point(claim, arm) for arm in claim.arms}
    assert len(looks) == 3
    shares = {dashes: sum(inked) / len(inked) for dashes, inked in looks.items()}
    assert shares.pop("") == 1
    assert all(share < 0.9 for share in shares.values())


# What is left of linear RGB without one kind of cones (Machado, Oliveira and Fernandes, 2009, at severity 1).
SIGHTS = {
    "all": np.eye(3),
    "no red": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "no green": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "no blue": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}
XYZ = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])  # of linear sRGB


def seen_as(color: str, sight: str) -> np.ndarray:
    """A colour in CIELAB, as such eyes see it."""
    v = np.array([int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    linear = np.where(v <= 0.04045, v / 12.92, ((v + 0.055) / 1.055) ** 2.4)
    xyz = XYZ @ np.clip(np.asarray(SIGHTS[sight]) @ linear, 0, 1) / XYZ.sum(axis=1)
    f = np.where(xyz > 216 / 24389, np.cbrt(xyz), (24389 / 27 * xyz + 16) / 116)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


@pytest.mark.parametrize("sight", SIGHTS)
def test_no_two_colours_of_lines_are_alike_to_any_eyes(sight):
    style = (files("polyak.lab") / "templates" / "style.css").read_text(encoding="utf-8")
    light, dark = (dict(re.findall(r"--(neutral|series-\d): (#\w{6})", part)) for part in style.split("@media", 2)[:2])
    assert light == {name: color for color, name in plots.VARIABLES.items() if name in light}
    for colors in (light, dark):
        assert len(colors) == 7
        shades = [seen_as(color, sight) for color in colors.values()]
        # Two patches are told apart from 2 on; thin lines need several times that.
        assert min(np.linalg.norm(a - b) for a, b in combinations(shades, 2)) > 10


def test_labels_are_not_broken_inside_words():
    names = {
        "KDPM2DiscreteScheduler": ["KDPM2Discrete", "Scheduler"],
        "DPMSolver (order 2, method multistep)": ["DPMSolver (order", "2, method", "multistep)"],
        "my_own_optimizer_module:Descent": ["my_own_optimizer_", "module:Descent"],
        "DPMSolverMultistepScheduler": ["DPMSolverMultistep", "Scheduler"],
        "AdamW": ["AdamW"],
        "averylongnameofoneword": ["averylongnameofone", "word"],
    }
    assert {name: words.lines(name, plots.NAME) for name in names} == names
    claim = many_arms(len(names))
    shown = [
        plots.Line(arm, x=[1, 2], middle=[i, i], low=[i, i], high=[i, i], label=name)
        for i, (arm, name) in enumerate(zip(claim.arms, names, strict=True))
    ]
    figure = plots.draw(claim, shown, Plot(x="x", y="y"), above="")
    assert {line for lines in names.values() for line in lines} <= {text.get_text() for text in figure.texts}


def test_where_there_are_many_lines_a_label_has_its_point():
    for count in (plots.FEW, 14):
        claim = many_arms(count)
        shown = [
            plots.Line(arm, x=[1, 2], middle=[i, i], low=[i, i], high=[i, i], label=arm.label)
            for i, arm in enumerate(claim.arms)
        ]
        figure = plots.draw(claim, shown, Plot(x="x", y="y"), above="")
        points = [a.get_marker() for a in figure.findobj(Line2D) if a.axes is None and a.get_linewidth() == 0]
        assert all(outline[0] == outline[-1] for outline in points)  # closed, for those that are hollow
        expected = [plots.shape(claim, arm) for arm in claim.arms] if count > plots.FEW else []
        assert [outline[:-1] for outline in points] == expected


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


def test_a_long_name_may_be_broken_between_its_parts():
    assert str(breakable("DPMSolverMultistepScheduler (order <2)")) == (
        "DPM<wbr>Solver<wbr>Multistep<wbr>Scheduler (order &lt;2)"
    )
    assert str(breakable("AdamW")) == "AdamW"
