"""The page of a comparison: what it says, and how it looks in a browser."""

from __future__ import annotations

import json
import math
import random
import re
from dataclasses import replace
from pathlib import Path

import pytest
from matplotlib.figure import Figure

from polyak.lab import words
from polyak.lab.compare import figures
from polyak.lab.compare.answer import TaskComparison
from polyak.lab.compare.budget import Budget
from polyak.lab.compare.comparison import Comparison
from polyak.lab.compare.notebook import Drawing
from polyak.lab.compare.page import page, summary, why

from .tasks_for_tests import falling, made_up, together
from .test_report import Checker
from .test_report_browser import labels_are_apart

FINALS = {
    "adamw": [0.50, 0.52, 0.49, 0.51, 0.53],
    "adan:weight_decay=0.02": [0.41, 0.43, 0.38, 0.42, 0.42],
    "adan:weight_decay=0.2": [0.46, 0.51, 0.5, math.inf, 0.52],
    "lion": [0.61, 0.6, 0.58, 0.63, 0.61],
}
TUNING = {arm: [(10**-i, 0.4 + 0.3 * (i - 3) ** 2 if i > 1 else math.inf) for i in range(1, 6)] for arm in FINALS}


def comparison(*names: str, **changes) -> Comparison:
    rng = random.Random(0)
    curves = {arm: [falling(rng, v) for v in values] for arm, values in FINALS.items()}
    return together(*(made_up(FINALS, name=name, curves=curves, tuning=TUNING, **changes) for name in names))


@pytest.fixture(scope="module")
def found() -> dict[str, Comparison]:
    return {
        "one": comparison("digits", unit="seconds", warnings=("the target is <among> the inputs",)),
        "three": comparison("digits", "letters", "a_task_with_a_long_name", target=0.45),
    }


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory, found: dict[str, Comparison]) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pages")
    return {name: c.save(folder / "new" / f"{name}.html") for name, c in found.items()}


def test_what_was_spent_is_a_column_where_it_is_not_the_budget() -> None:
    """Made up trials take 4 steps; a solver may leave some of its evaluations over."""
    t = comparison("digits").task()
    assert '<span class="small">done</span>' not in page(Comparison(setup=t.setup, tasks=(t,)))
    setup = replace(t.setup, budget=Budget("steps", 5))
    more = replace(t, setup=setup)
    assert '<span class="small">done</span>' in page(Comparison(setup=setup, tasks=(more,)))


@pytest.mark.xdist_group("browser")  # the worker that draws the pages
def test_a_page_is_whole_and_loads_nothing(pages: dict[str, Path], found: dict[str, Comparison]) -> None:
    for name, path in pages.items():
        text = path.read_text(encoding="utf-8")
        checked = Checker(text)
        assert checked.loads == []
        assert found[name].answer in " ".join(checked.text.split())
        embedded = re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)
        assert embedded
        assert json.loads(embedded[1]) == found[name].to_json()


@pytest.mark.xdist_group("browser")  # the worker that draws the pages
def test_a_page_says_what_was_found_and_how(pages: dict[str, Path]) -> None:
    said = " ".join(Checker(pages["one"].read_text(encoding="utf-8")).text.split())
    for phrase in (
        "the target is <among> the inputs",
        "Adan (weight_decay 0.02) against AdamW",
        "4 s for each trial, the same for every arm",
        "counts taking batches, gradients and the optimizer's steps",
        "Trials ran one at a time",
        "5 trials for every arm, anew for each seed: a grid of the learning rate",
        "Chosen by the same numbers that are reported",
        "0 to 4 are reported; tuning used 10000 to 10004, one for each, never reported",
        "initial weights, and batches in the same order",
        "The 3 verdicts are corrected for their number (Holm)",
        "Not covered Other data, other tasks",
        "not reached",
        "1 of 5",
        "1.5 MB",
        "Sensitivity: what tuning trials reached",
    ):
        assert phrase in said, phrase
    several = " ".join(Checker(pages["three"].read_text(encoding="utf-8")).text.split())
    assert "Performance profiles" in several
    assert "the target that was asked for" in several


MANY = {
    "adamw": FINALS["adamw"],
    **{f"sgd:momentum=0.{i}": [v + 0.1 * (i - 3) for v in FINALS["adamw"]] for i in range(1, 8)},
}


def test_the_answer_of_many_arms_is_a_list_with_the_best_first() -> None:
    t = made_up(MANY)
    for found in (together(t), together(t, made_up(MANY, name="other"))):
        text = page(found)
        [said] = re.findall(r'<section class="answer".*?</section>', text, re.DOTALL)
        assert f'<p class="verdict long">{found.said.head}.</p>' in said
        assert re.findall("<li>(.*?)</li>", said) == list(found.said.rest)
        assert len(found.said.rest) == 6
        assert json.loads(re.search(r'id="data">(.*?)</script>', text, re.DOTALL)[1])["answer"] == found.answer
        shown = summary(found)
        assert f"<strong>{found.said.head}.</strong>" in shown
        assert all(f"<li>{clause}</li>" in shown for clause in found.said.rest)
    assert t.said.head.startswith("Use SGD (momentum 0.1): SGD (momentum 0.1) beats AdamW by 0.2")
    assert page(together(t, made_up(MANY, name="other"))).count(f'<p class="found">{t.said.head}.</p>') == 2
    few = made_up({arm: values[:2] for arm, values in MANY.items()})
    assert "<p>2 seeds cannot decide anything: at least 3 can.</p>" in page(together(few))


def test_no_tuning_is_said(found: dict[str, Comparison]) -> None:
    said = page(together(made_up({"adamw:lr=0.1:weight_decay=0": [1.0] * 5, "sgd:lr=0.1:weight_decay=0": [1.1] * 5})))
    assert "none: all options were given." in said
    assert "Sensitivity" not in said


@pytest.mark.parametrize(
    ("trials", "says"),
    [
        (1, "1 trial for every arm, anew for each seed: the centre of all ranges. "),
        (2, "2 trials for every arm, anew for each seed: two values of the learning rate, "),
    ],
)
def test_little_tuning_is_said(found: dict[str, Comparison], trials: int, says: str) -> None:
    one = found["one"]
    said = page(replace(one, setup=replace(one.setup, trials=trials)))
    assert says in said
    assert "TPE" not in said


def test_a_notebook_needs_no_style(found: dict[str, Comparison]) -> None:
    shown = summary(found["one"])
    Checker(shown)
    assert "the target is &lt;among&gt; the inputs" in shown
    assert "style" not in shown


def trials_of(t: TaskComparison) -> str:
    return "".join(re.findall(r'<table class="sortable trials">.*?</table>', page(together(t)), re.DOTALL))


def test_every_trial_says_what_became_of_it() -> None:
    t = halted(
        made_up(
            {"adamw": [0.5, 0.6], "adan": [0.4, math.inf]}, tuning={"adan": [(0.1, 0.5), (0.2, 0.8), (9.0, math.inf)]}
        )
    )
    table = trials_of(t)
    heads = re.findall(r'<th scope="col"[^>]*>(.*?)</th>', table)
    # Neither the task, nor evaluations that are as many as the steps, nor two times.
    assert heads == ["Arm", "Seed", "Purpose", "Tuned point", "loss", "loss in tuning", "training loss", *heads[7:]]
    assert [h.lower() for h in heads].count("seconds") == 1
    assert "gradients" not in heads
    rows = [re.findall(r"<td[^>]*>(.*?)</td>", row) for row in re.findall(r"<tr.*?</tr>", table)[1:]]
    [lost] = [row for row in rows if row[0] == "Adan" and row[1] == "1"]
    assert lost[4] == "∞"  # the main metric alone: nothing else was measured
    assert set(lost[5:-1]) == {"–"}
    assert lost[-1] == "× nan"
    purposes = [(row[2], row[3]) for row in rows if row[2].startswith("tuning")]
    assert purposes == [("tuning", "lr = 0.1"), ("tuning, stopped early", "lr = 0.2"), ("tuning", "lr = 9")] * 2
    often = [replace(trial, values={**trial.values, "evaluations": 9.0}) for trial in t.result.trials]
    assert ">gradients<" in trials_of(replace(t, result=replace(t.result, trials=tuple(often))))


def test_an_undecided_difference_is_explained_in_plain_words() -> None:
    # Differences of 0.01 four times and 0.02 once, whose mean is zero.
    said = [
        why(row)
        for row in made_up(
            {"adamw": FINALS["adamw"], "adan": [0.49, 0.53, 0.50, 0.49, 0.54], "lion": FINALS["lion"]}
        ).rows
    ]
    assert said == [
        "",
        "This may be chance: were both equally good, 100 % of such comparisons would look like this or clearer.",
        "",
    ]
    [_, few] = made_up({"adamw": [0.5, 0.6], "adan": [0.4, 0.5]}).rows
    assert why(few) == "2 seeds cannot decide anything: at least 3 can."
    near = [a - d for a, d in zip(FINALS["adamw"], (0.02, 0.05, 0.03, 0.01, 0.01), strict=True)]
    others = {f"sgd:momentum=0.{i}": FINALS["adamw"] for i in range(4)}
    many = made_up({"adamw": FINALS["adamw"], "adan": near, **others}).rows
    assert why(many[1]) == (
        "By itself this would be decided: were both equally good, 3.3 % of such comparisons would look like this or clearer. But "
        "of so many arms one looks like this more often by chance: p = 0.16 for all of them together."
    )


def test_seeds_that_do_not_reach_the_target_are_counted() -> None:
    slow, fast = [0.9, 0.8, 0.6, 0.5], [0.6, 0.5, 0.45, 0.4]
    curves = {"adamw": [slow] * 5, "adan": [fast] * 3 + [[0.9] * 4] * 2}
    t = made_up({name: [c[-1] for c in runs] for name, runs in curves.items()}, curves=curves)
    said = " ".join(Checker(page(together(t))).text.split())
    # Three seeds take 1/4 to where both come, two 1/4 to the end of the slower one.
    ratio = t.rows[1].spent_ratio
    assert ratio is not None
    assert f"2, 0.2 s 3 of 5 seeds steps: {words.times(ratio.value, ratio.low, ratio.high)} time: " in said
    assert "to the worse of both ends: to its own end even a copy of AdamW would come later" in said


# ------------------------------------------------------------------------------------------------------------- the drawings


def halted(t: TaskComparison, *values: float) -> TaskComparison:
    """As if the tuning trials with these values (0.8) had been stopped early."""
    trials = [
        replace(trial, message="stopped early") if trial.values.get("validation") in (values or (0.8,)) else trial
        for trial in t.result.trials
    ]
    return replace(t, result=replace(t.result, trials=tuple(trials)))


def markers(figure: Figure) -> dict[str, list[tuple[float, float]]]:
    """What stands alone on a figure, by its look."""
    found: dict[str, list[tuple[float, float]]] = {}
    for line in figure.axes[0].lines:
        if line.get_linestyle() == "None":
            look = {"x": "diverged", "|": "stopped"}.get(
                str(line.get_marker()), "chosen" if line.get_markersize() > 12 else "other"
            )
            found.setdefault(look, []).extend(tuple(p) for p in line.get_xydata().tolist())
    return found


def test_all_tuning_trials_are_in_the_sensitivity_plot() -> None:
    grid = [(10**-i, 0.4 + 0.11 * (i - 2) ** 2) for i in range(1, 6)]
    t = halted(
        made_up(
            {"adamw": [0.5] * 5, "adan": [0.4] * 5},
            tuning={"adamw": grid, "adan": [*grid, (0.5, 0.8), (0.9, math.inf)]},
        )
    )
    trials = list(t.result.trials)
    # Two points that were asked of the estimator: others than the centre of what else is tuned.
    extra = [(0.03, 0.45, ""), (0.7, 0.98, "stopped early")]
    like = next(trial for trial in trials if trial.purpose == "tuning" and trial.arm == "adan")
    points = [
        replace(trial, point={**trial.point, "weight_decay": 0.02}) if trial.arm == "adan" else trial
        for trial in trials
    ]
    asked = [
        replace(
            like,
            seed=10_000 + seed,
            point={"lr": lr, "weight_decay": 0.07},
            values={"validation": value},
            message=message,
        )
        for seed in range(5)
        for lr, value, message in extra
    ]
    chosen = {t.name: {**t.result.chosen[t.name], "adan": ({"lr": 0.03, "weight_decay": 0.07},) * 5}}
    t = replace(t, result=replace(t.result, trials=(*points, *asked), chosen=chosen))
    figure = together(t).figure("sensitivity")
    lines = {
        line.get_color(): [tuple(p) for p in line.get_xydata().tolist()]
        for line in figure.axes[0].lines
        if line.get_linestyle() != "None"
    }
    assert list(lines.values()) == [sorted(grid), sorted(grid)]
    assert markers(figure) == {
        "other": [(0.03, 0.45)] * 5,
        "stopped": [(0.5, 0.8), (0.7, 0.98)] * 5,
        "diverged": [(0.9, sorted(grid)[0][1])] * 5,  # as high as the worst
        "chosen": [*[(0.01, 0.4)] * 5, *[(0.03, 0.45)] * 5],
    }
    said = {text.get_text() for text in figure.texts}
    assert {"other points", "stopped early, with its last value", "diverged", "chosen", "AdamW", "Adan"} <= said
    plain = made_up(dict.fromkeys(("adamw", "adan"), [1.0] * 5), tuning={"adamw": grid})
    assert "chosen" in figures.sensitivity(plain)
    assert "diverged" not in figures.sensitivity(plain)


def test_a_few_trials_far_beyond_the_untrained_model_do_not_flatten_the_others() -> None:
    tuning = {"adamw": [(0.001, 0.9), (0.01, 0.4), (0.1, 0.6), (1.0, 5e6)]}
    finals = {"adamw": [0.5] * 5, "adan": [0.4] * 5}
    figure = together(made_up(finals, tuning=tuning, initial={"loss": 1.0})).figure("sensitivity")
    low, high = figure.axes[0].get_ylim()
    assert low < 0.4
    assert 0.9 < high < 1.6
    assert "out of view: up to 5,000,000" in {text.get_text() for text in figure.texts}


def test_of_samplers_all_that_tuning_reached_is_in_view() -> None:
    """Their first numbers are of noise, beside which all else is near or far."""
    tuning = {"adamw": [(1.0, 0.549), (2.0, 0.14), (3.0, 0.15)]}
    t = made_up(dict.fromkeys(("adamw", "adan"), [0.14] * 5), tuning=tuning, initial={"loss": 0.16})
    drawn = replace(t, facts=replace(t.facts, kind="sampling"))
    assert together(t).figure("sensitivity").axes[0].get_ylim()[1] < 0.549
    assert together(drawn).figure("sensitivity").axes[0].get_ylim()[1] >= 0.549


def seen(curves: dict[str, list[float]], **changes) -> tuple[float, float, set[str]]:
    """From where to where the main metric's axis goes, and what is said."""
    finals = {arm: [values[-1]] * 5 for arm, values in curves.items()}
    t = made_up(finals, curves={arm: [values] * 5 for arm, values in curves.items()}, **changes)
    figure = together(t).figure()
    return *figure.axes[0].get_ylim(), {text.get_text() for text in figure.texts}


def test_an_axis_shows_the_answer() -> None:
    """Curves that fall from 1 to 0.12 and 0.117, as fast as they do in practice."""
    falls = {arm: [end + 0.9 * 0.5**i for i in range(20)] for arm, end in (("adamw", 0.122), ("adan", 0.117))}
    low, high, said = seen(falls)
    assert low < 0.117
    assert high < 0.14
    assert "out of view: up to 1.02" in said
    # The same for what rises to nearly 1.
    rises = {arm: [1 - v / 10 for v in values] for arm, values in falls.items()}
    low, high, said = seen(rises, better="higher", metric="accuracy")
    assert 0.98 < low < 1 - 0.0122
    assert 1 - 0.0117 < high < 1
    assert "out of view: down to 0.898" in said


def test_an_axis_shows_all_where_all_can_be_told_apart() -> None:
    apart = {"adamw": [1.0, 0.8, 0.6, 0.5], "adan": [1.0, 0.5, 0.3, 0.2]}
    low, high, said = seen(apart)
    assert low < 0.2
    assert high > 1.0
    assert not any("out of view" in text for text in said)
    for flat in (0.5, 0.0, 1e-9, -3.0):
        low, high, said = seen({"adamw": [flat] * 4, "adan": [flat] * 4})
        assert low < flat < high
        assert not any("out of view" in text for text in said)
    low, high, said = seen({"adamw": [1.0, *[0.25] * 19], "adan": [1.0, *[0.25] * 19]})
    assert low < 0.25 < high


def test_a_loss_over_decades_has_a_logarithmic_axis() -> None:
    _, _, said = seen({"adamw": [10.0, 1.0, 0.1, 0.01], "adan": [10.0, 0.5, 0.01, 0.001]})
    assert "loss, log scale; lower is better" in said


def test_what_is_no_course_is_in_view_from_its_beginning() -> None:
    """Samplers are measured at a few budgets, each of which is of interest."""
    t = made_up(
        dict.fromkeys(("adamw", "adan"), [0.1] * 5), curves=dict.fromkeys(("adamw", "adan"), [[9.0, 1.0, 0.1]] * 5)
    )
    [task] = t.claim.tasks
    plots = tuple(replace(plot, log_x=True) for plot in task.plots)
    figure = together(replace(t, claim=replace(t.claim, tasks=(replace(task, plots=plots),)))).figure()
    assert figure.axes[0].get_ylim()[1] > 9.0


def test_what_diverged_does_not_flatten_the_others() -> None:
    curves = {"adamw": [[1.0, 0.8, 0.6, 0.5]] * 5, "adan": [[1.0, 0.6, 0.4, 0.3]] * 5, "lion": [[1.0, 3e5, 1e9]] * 5}
    finals = {"adamw": [0.5] * 5, "adan": [0.3] * 5, "lion": [math.inf] * 5}
    t = made_up(finals, curves=curves)
    trials = [
        replace(
            trial,
            curve=tuple(
                ({"used": i / 4, "step": float(i), "seconds": 0.1 * i}, {"loss": v})
                for i, v in enumerate((1.0, 3e5, 1e9))
            ),
        )
        if trial.diverged
        else trial
        for trial in t.result.trials
    ]
    figure = together(replace(t, result=replace(t.result, trials=tuple(trials)))).figure()
    low, high = figure.axes[0].get_ylim()
    assert 0 < low < 0.3
    assert 0.9 < high < 1.2
    assert markers(figure)["diverged"] == [(2.0, high)] * 5
    assert "out of view: up to 1e9" in {text.get_text() for text in figure.texts}


def test_strips_have_one_scale(found: dict[str, Comparison]) -> None:
    strips = re.findall(r'<svg class="strip".*?</svg>', page(found["one"]), re.DOTALL)
    assert len(strips) == 3
    bounds = [re.search(r'<line class="bound" x1="([\d.]+)%"', s) for s in strips]
    assert len({bound[1] for bound in bounds if bound}) == 1
    ticks = [re.findall(r'<text class="tick" x="([\d.]+)%"[^>]*>(.*?)</text>', s) for s in strips]
    assert ticks[0] == ticks[1] == ticks[2]
    assert "0" in [text for _, text in ticks[0]]
    for strip in strips:
        assert "better" in strip
        assert "no difference" not in strip
        assert "(equal)" not in strip


def test_a_figure_shows_itself(found: dict[str, Comparison]) -> None:
    for what in figures.KINDS:
        figure = found["three"].figure(what, "" if what == "profiles" else "letters")
        assert isinstance(figure, Drawing)
        assert isinstance(figure, Figure)
        data, size = figure._repr_png_()
        assert data.startswith(b"\x89PNG")
        assert 500 < size["width"] < 900
        assert size["height"] > 300
        titles = [text.get_text() for text in figure.texts]
        assert titles[0].startswith("Share of tasks" if what == "profiles" else "letters: ")


# ------------------------------------------------------------------------------------------------------------- in a browser


@pytest.mark.browser
@pytest.mark.xdist_group("browser")
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_the_page_in_a_browser(chromium, pages, found, width, scheme):
    context = chromium.new_context(viewport={"width": width, "height": 844}, color_scheme=scheme)
    browser_page = context.new_page()
    troubles, requests = [], []
    browser_page.on("console", lambda message: troubles.append(message.text))
    browser_page.on("pageerror", lambda error: troubles.append(str(error)))
    browser_page.on("request", lambda request: requests.append(request.url))
    for name, path in pages.items():
        browser_page.goto(path.as_uri())
        assert browser_page.evaluate("document.documentElement.scrollWidth") <= width, name
        boxes = browser_page.evaluate(
            "[...document.querySelectorAll('svg text')].map(t => t.getBoundingClientRect().toJSON())"
        )
        assert boxes
        for box in boxes:
            assert box["left"] >= 0, (name, box)
            assert box["right"] <= width, (name, box)
            assert box["height"] >= 9
        assert browser_page.locator(".verdict").inner_text() == found[name].answer
        # Curves of the metric and of the training loss (in steps: against time, too), sensitivity; profiles over three tasks.
        assert browser_page.locator("svg.curves").count() == (3 if name == "one" else 3 * 4 + 1)
        assert browser_page.locator("svg.strip").count() == 3 * len(found[name].tasks)
        labels_are_apart(browser_page, name)
        browser_page.locator("summary").first.click()
        assert browser_page.locator("table.sortable").first.is_visible()
    with browser_page.expect_download() as download:
        browser_page.get_by_role("button", name="Download").click()
    assert download.value.suggested_filename == "compare.json"
    assert troubles == []
    assert {url.partition(":")[0] for url in requests} <= {"file", "blob"}
    context.close()


@pytest.mark.browser
@pytest.mark.xdist_group("browser")
def test_on_a_desk_the_whole_table_is_in_view(chromium, pages):
    browser_page = chromium.new_page(viewport={"width": 1280, "height": 900})
    for name, path in pages.items():
        browser_page.goto(path.as_uri())
        for table in browser_page.locator("table.results").all():
            edge = table.evaluate("t => t.parentElement.getBoundingClientRect().right")
            cells = table.evaluate(
                "t => [...t.querySelectorAll('th, td')].map(c => [c.getBoundingClientRect().right, c.scrollWidth - c.clientWidth])"
            )
            assert len(cells) == (9 if name == "one" else 8) * 5
            assert all(right <= edge + 0.5 and over <= 0 for right, over in cells), name
        # Strips meet zero at one place.
        places = {
            round(box["x"], 1) for box in (s.bounding_box() for s in browser_page.locator("line.bound").all()) if box
        }
        assert len(places) <= len(browser_page.locator("table.results").all())
        # No half of a row of plots is empty.
        for plots in browser_page.locator(".plots").all():
            boxes = plots.evaluate("p => [...p.children].map(c => c.getBoundingClientRect().toJSON())")
            *drawings, note = boxes
            assert (note["left"] > drawings[-1]["right"]) == (len(drawings) % 2 == 1)
    browser_page.close()


@pytest.mark.browser
@pytest.mark.xdist_group("browser")
def test_on_a_phone_each_arm_has_its_value_and_difference_in_view(chromium, pages, found):
    browser_page = chromium.new_page(viewport={"width": 390, "height": 844})
    browser_page.goto(pages["one"].as_uri())
    shown = browser_page.locator("table.results tbody tr").evaluate_all(
        "rows => rows.map(r => [...r.cells].map("
        "c => [c.innerText, c.getBoundingClientRect().toJSON(), c.scrollWidth - c.clientWidth, c.dataset.head]))"
    )
    rows = found["one"].tasks[0].rows
    assert len(shown) == len(rows) == 4
    for row, cells in zip(rows, shown, strict=True):
        (arm, *_), (value, first, *_), (difference, second, *_), *others = cells
        assert row.label in " ".join(arm.split())
        assert words.number(row.final) in value
        if row.difference:
            assert all(part in difference for part in words.compared(row.difference))
            assert abs(first["top"] - second["top"]) < 20  # side by side
        assert {"Steps, time to reach AdamW's end", "Chance to be better", "Memory"} <= {head for *_, head in others}
        for text, box, over, _ in cells:
            assert box["left"] >= 0, text
            assert box["right"] <= 390, text
            assert over <= 0 or not text, text
    # What was tuned leaves no blank stretches: a row is not higher than what it says.
    heights = browser_page.locator("table.tuned tbody tr").evaluate_all(
        "rows => rows.map(r => r.getBoundingClientRect().height)"
    )
    assert max(heights) < 260
    browser_page.close()


@pytest.mark.browser
@pytest.mark.xdist_group("browser")
def test_in_print_the_table_is_a_table_and_whole(chromium, pages):
    browser_page = chromium.new_page(viewport={"width": 718, "height": 1000})
    browser_page.goto(pages["one"].as_uri())
    browser_page.emulate_media(media="print")
    browser_page.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert browser_page.evaluate("document.documentElement.scrollWidth") <= 718
    rights = browser_page.evaluate("[...document.querySelectorAll('td, th')].map(t => t.getBoundingClientRect().right)")
    assert max(rights) <= 719
    assert browser_page.locator("table.results thead th").nth(3).is_visible()
    browser_page.close()


@pytest.mark.browser
@pytest.mark.xdist_group("browser")
def test_a_strips_number_is_not_on_its_line(chromium, pages):
    browser_page = chromium.new_page(viewport={"width": 390, "height": 844})
    browser_page.goto(pages["one"].as_uri())
    for strip in browser_page.locator("svg.strip").all():
        bottom = strip.evaluate("e => e.querySelector('text.estimate').getBoundingClientRect().bottom")
        top = strip.evaluate("e => e.querySelector('line.bound').getBoundingClientRect().top")
        assert bottom <= top
    browser_page.close()
