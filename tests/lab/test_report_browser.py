"""The report as it looks in a browser."""

from __future__ import annotations

import json
import re

import pytest

from ..looks_for_tests import faults


@pytest.mark.browser
@pytest.mark.xdist_group("browser")
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_pages_in_a_browser(chromium, pages, width, scheme):
    context = chromium.new_context(viewport={"width": width, "height": 844}, color_scheme=scheme)
    page = context.new_page()
    troubles, requests = [], []
    page.on("console", lambda message: troubles.append(message.text))
    page.on("pageerror", lambda error: troubles.append(str(error)))
    page.on("request", lambda request: requests.append(request.url))
    for name, path in pages.items():
        page.goto(path.as_uri())
        assert page.evaluate("document.documentElement.scrollWidth") <= width, name
        assert page.evaluate("document.querySelector('h1').scrollWidth <= innerWidth")
        background = page.evaluate("getComputedStyle(document.body).backgroundColor")
        light = sum(int(c) for c in re.findall(r"\d+", background)[:3]) / 3 / 255
        assert light < 0.2 if scheme == "dark" else light > 0.9
        assert faults(page) == [], name
        # No text of a drawing is cut off at the page's edge, none is too small to read.
        for box in page.evaluate(
            "[...document.querySelectorAll('svg text')].map(t => t.getBoundingClientRect().toJSON())"
        ):
            assert box["left"] >= 0, (name, box)
            assert box["right"] <= width, (name, box)
            assert box["height"] >= 9
    page.goto(pages["swift"].as_uri())
    assert page.locator(".verdict").inner_text().endswith("Effect: ✓ holds, 2 of 2\nat scale small, on 5 seeds")
    assert page.locator("svg.curves").count() == 3
    assert page.locator("svg.strip").count() == 5  # the deciding one first, then each criterion's
    page.goto(pages["index"].as_uri())
    page.get_by_role("link", name="Swerve").click()
    assert (
        page.locator(".verdict")
        .inner_text()
        .endswith("Effect: ✗ not seen at this scale, 1 of 2\nat scale small, on 5 seeds")
    )
    assert troubles == []
    assert {url.partition(":")[0] for url in requests} == {"file"}
    page.set_viewport_size({"width": 800, "height": 1000})  # a tablet
    page.goto(pages["index"].as_uri())
    assert faults(page) == []
    context.close()


@pytest.mark.browser
@pytest.mark.xdist_group("browser")
@pytest.mark.parametrize(("width", "height"), [(390, 844), (1280, 800)])
def test_the_first_screen_shows_the_deciding_interval(chromium, pages, width, height):
    page = chromium.new_page(viewport={"width": width, "height": height})
    for name in ("swift", "swerve", "sway", "leap"):
        page.goto(pages[name].as_uri())
        for part in (".verdict", ".answer figcaption", ".answer svg.strip"):
            box = page.locator(part).bounding_box()
            assert box["y"] + box["height"] <= height, (name, part)
    page.goto(pages["index"].as_uri())
    box = page.locator(".tally").last.bounding_box()
    assert box["y"] + box["height"] <= height / 3
    assert page.locator("table.systems tbody tr").nth(1).bounding_box()["y"] < height
    page.close()


def labels_are_apart(page, name: str) -> None:
    for svg in page.locator("svg.curves, svg.strip").all():
        boxes = svg.evaluate(
            "e => [...e.querySelectorAll('text')].map(t => [t.textContent, t.getBoundingClientRect()])"
        )
        texts = [(text, b["left"], b["right"], b["top"], b["bottom"]) for text, b in boxes if text != "×"]
        for i, a in enumerate(texts):
            for b in texts[i + 1 :]:
                apart = a[2] <= b[1] or b[2] <= a[1] or a[4] <= b[3] + 4 or b[4] <= a[3] + 4
                assert apart, (name, a, b)


@pytest.mark.browser
@pytest.mark.xdist_group("browser")
@pytest.mark.parametrize("width", [390, 1280])
def test_labels_in_a_browser_do_not_overlap(chromium, pages, width):
    page = chromium.new_page(viewport={"width": width, "height": 900})
    for name in ("swift", "swerve", "leap"):
        page.goto(pages[name].as_uri())
        labels_are_apart(page, name)
    page.close()


CONTRASTS = """() => {
  const probe = document.createElement("canvas").getContext("2d");
  const rgb = (name) => {
    probe.fillStyle = getComputedStyle(document.documentElement).getPropertyValue("--" + name);
    return [1, 3, 5].map((i) => parseInt(probe.fillStyle.slice(i, i + 2), 16) / 255);
  };
  const light = (name) => {
    const [r, g, b] = rgb(name).map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const names = ["ink", "muted", "link", "holds", "fails", "undecided", "neutral", ...[1, 2, 3, 4, 5, 6].map((i) => "series-" + i)];
  return names.map((name) => {
    const [a, b] = [light(name), light("paper")].sort();
    return [name, (b + 0.05) / (a + 0.05)];
  });
}"""


@pytest.mark.browser
@pytest.mark.xdist_group("browser")
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_all_that_is_coloured_is_legible(chromium, pages, scheme):
    """WCAG's contrast for text, which the colours of lines have as well: their labels are written in them."""
    page = chromium.new_page(color_scheme=scheme)
    page.goto(pages["swift"].as_uri())
    contrasts = dict(page.evaluate(CONTRASTS))
    assert len(contrasts) == 13
    assert {name: c for name, c in contrasts.items() if c < 4.5} == {}
    page.close()


@pytest.mark.browser
@pytest.mark.xdist_group("browser")
def test_in_print_nothing_is_cut_off_or_folded(chromium, pages):
    page = chromium.new_page(viewport={"width": 718, "height": 1000}, color_scheme="dark")  # A4 less its margins
    page.goto(pages["swift"].as_uri())
    page.emulate_media(media="print")
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert page.evaluate("document.documentElement.scrollWidth") <= 718
    for box in page.evaluate("[...document.querySelectorAll('td, th')].map(t => t.getBoundingClientRect().toJSON())"):
        assert box["right"] <= 719
        assert box["height"] > 0
    assert page.evaluate("getComputedStyle(document.documentElement).getPropertyValue('--ink')") == "#1d1f22"
    assert not page.locator("nav, .download").filter(visible=True).count()
    page.close()


@pytest.mark.browser
@pytest.mark.xdist_group("browser")
def test_the_index_sorts_by_keyboard(chromium, pages):
    for width in (390, 1280):
        page = chromium.new_page(viewport={"width": width, "height": 844})
        page.goto(pages["index"].as_uri())
        names = "[...document.querySelectorAll('table.systems tbody th a')].map(a => a.textContent)"
        assert page.evaluate(names) == ["Leap", "Idle", "Swift", "Swerve", "Sway"]
        for _ in range(3):  # past the link to the gallery and the field that finds
            page.keyboard.press("Tab")
        page.keyboard.press("Enter")
        head = page.locator("th", has_text="Verdict")
        assert head.get_attribute("aria-sort") == "ascending"
        assert page.evaluate(names) == ["Swift", "Leap", "Swerve", "Sway", "Idle"]
        page.keyboard.press("Space")
        assert head.get_attribute("aria-sort") == "descending"
        assert page.evaluate(names) == ["Idle", "Sway", "Leap", "Swerve", "Swift"]
        page.locator("th", has_text="Run").get_by_role("button").click()
        assert page.locator("[aria-sort]").count() == 1
        for _ in range(2):  # what was not run comes last in either direction
            assert page.evaluate(names)[-1] == "Idle"
            page.locator("th", has_text="Run").get_by_role("button").click()
        page.close()


@pytest.mark.browser
@pytest.mark.xdist_group("browser")
def test_the_table_sorts_and_the_data_downloads(chromium, pages, entries, tmp_path):
    page = chromium.new_page()
    page.goto(pages["swift"].as_uri())
    page.locator("summary", has_text="42 trials").click()
    head = page.locator("table.trials th", has_text="training loss")
    column = "[...document.querySelectorAll('table.trials tbody tr')].map(r => r.cells[5].dataset.value)"
    for direction, back in (("ascending", False), ("descending", True)):
        head.get_by_role("button").click()
        assert head.get_attribute("aria-sort") == direction
        values = [float(v) for v in page.evaluate(column)]
        assert values == sorted(values, reverse=back)
    finals = page.locator("table.finals").first
    finals.locator("th", has_text="training loss").get_by_role("button").click()
    assert finals.locator("tbody th").first.inner_text().strip() == "Swift"
    with page.expect_download() as download:
        page.get_by_role("button", name="Download").click()
    assert download.value.suggested_filename == "swift.small.json"
    download.value.save_as(tmp_path / "data.json")
    assert json.loads((tmp_path / "data.json").read_text(encoding="utf-8")) == entries[0].result.to_json()
    page.close()


@pytest.mark.browser
@pytest.mark.xdist_group("browser")
def test_on_a_phone_all_of_an_arm_is_in_view(chromium, pages):
    page = chromium.new_page(viewport={"width": 390, "height": 844})
    page.goto(pages["swift"].as_uri())
    page.locator("summary", has_text="5 arms: AdamW").click()
    rows = page.locator("table.arms tbody tr").evaluate_all(
        "rows => rows.map(r => [...r.cells].map(c => [c.dataset.head, c.innerText, c.getBoundingClientRect().toJSON()]))"
    )
    assert len(rows) == 5
    for (_, arm, title), *facts in rows:
        assert arm.strip()
        assert [head for head, *_ in facts] == ["Role", "Fixed", "Tuned over", "Chosen"]
        for _, text, box in facts:
            assert text.strip()
            assert box["top"] >= title["bottom"]
            assert 0 <= box["left"] < box["right"] <= 390
    # What scrolls keeps its first column, which says what the numbers are of.
    box = page.locator(".scroll", has=page.locator("table.finals")).first
    box.evaluate("e => { e.style.width = '220px'; e.scrollTo(50, 0); }")
    assert box.evaluate("e => e.scrollLeft") == 50
    assert box.locator("tbody th").first.bounding_box()["x"] == box.bounding_box()["x"]
    page.close()
