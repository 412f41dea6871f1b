"""The page of a comparison: what it says, and how it looks in a browser."""

from __future__ import annotations

import json
import math
import random
import re
import shutil
from pathlib import Path

import pytest

from polyak.lab.compare.page import page, summary
from polyak.lab.compare.result import Comparison

from .tasks_for_tests import falling, made_up, together
from .test_report import Checker

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


def test_a_page_is_whole_and_loads_nothing(pages: dict[str, Path], found: dict[str, Comparison]) -> None:
    for name, path in pages.items():
        text = path.read_text(encoding="utf-8")
        checked = Checker(text)
        assert checked.loads == []
        assert found[name].answer in " ".join(checked.text.split())
        embedded = re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)
        assert embedded
        assert json.loads(embedded[1]) == found[name].to_json()


def test_a_page_says_what_was_found_and_how(pages: dict[str, Path]) -> None:
    said = " ".join(Checker(pages["one"].read_text(encoding="utf-8")).text.split())
    for words in (
        "the target is <among> the inputs",
        "Adan (weight_decay 0.02) against AdamW",
        "4 s for each trial, the same for every arm",
        "counts taking batches, gradients and the optimizer's steps",
        "Trials ran one at a time",
        "5 trials for every arm: a grid of the learning rate",
        "Chosen by the same numbers that are reported",
        "0, 1, 2, 3, 4 are reported; tuning used 10000, which is not",
        "initial weights, and batches in the same order",
        "no correction for their number",
        "not reached",
        "1 of 5",
        "1.5 MB",
        "Sensitivity: what tuning trials reached",
    ):
        assert words in said, words
    several = " ".join(Checker(pages["three"].read_text(encoding="utf-8")).text.split())
    assert "Performance profiles" in several
    assert "the target that was asked for" in several


def test_no_tuning_is_said(found: dict[str, Comparison]) -> None:
    said = page(together(made_up({"adamw:lr=0.1:weight_decay=0": [1.0] * 5, "sgd:lr=0.1:weight_decay=0": [1.1] * 5})))
    assert "none: all options were given." in said
    assert "Sensitivity" not in said


def test_a_notebook_needs_no_style(found: dict[str, Comparison]) -> None:
    shown = summary(found["one"])
    Checker(shown)
    assert "the target is &lt;among&gt; the inputs" in shown
    assert "style" not in shown


# ------------------------------------------------------------------------------------------------------------- in a browser


@pytest.fixture(scope="module")
def chromium():
    program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if program is None:
        pytest.skip("no Chromium")
    sync_api = pytest.importorskip("playwright.sync_api")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()


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
        browser_page.locator("summary").first.click()
        assert browser_page.locator("table.sortable").first.is_visible()
    with browser_page.expect_download() as download:
        browser_page.get_by_role("button", name="Download").click()
    assert download.value.suggested_filename == "compare.json"
    assert troubles == []
    assert {url.partition(":")[0] for url in requests} <= {"file", "blob"}
    context.close()
