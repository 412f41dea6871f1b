"""The documentation's site: it builds, is complete, says what the verdicts say, and needs no network."""

from __future__ import annotations

import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from polyak import claims
from polyak.lab import report, words
from polyak.lab.claim import KINDS

from .looks_for_tests import faults, scrolling
from .test_docs import ROOT, environment, hooks


class Page(HTMLParser):
    """A page's words, and what it loads."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.skip, self.words, self.loads, self.equations = 0, [], [], 0
        self.feed(path.read_text(encoding="utf-8"))
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag, attrs):
        self.skip += tag in ("script", "style")
        self.equations += tag == "math"
        if tag in ("link", "script", "img", "iframe", "source", "video", "audio", "embed", "object", "use", "image"):
            self.loads += [v for k, v in attrs if k in ("src", "href", "srcset", "data", "xlink:href") and v]
        self.loads += re.findall(r"url\(([^)]*)\)", dict(attrs).get("style") or "")

    def handle_endtag(self, tag):
        self.skip -= tag in ("script", "style")

    def handle_data(self, data):
        if not self.skip:
            self.words.append(data)


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    pytest.importorskip("mkdocs")
    out = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment())
    assert done.returncode == 0, done.stdout + done.stderr
    return out


pages = pytest.mark.xdist_group("site")  # one worker builds it, once


def words_of(text: str) -> str:
    return " ".join(text.split())


@pages
@pytest.mark.slow
def test_every_system_has_a_page_with_its_verdict(site):
    for slug, claim in claims.catalogue().items():
        page = Page(site / "systems" / f"{slug}.html")
        result = claims.published(slug)
        assert words_of(claim.says) in page.text
        assert words_of(" ".join(words.decisions(claim, result))) in page.text
        told = [f"{kind.capitalize()}: {words.marked(result, kind)}" for kind in KINDS] if result else ["Not run"]
        assert all(words_of(verdict) in page.text for verdict in told)
        assert words_of(claim.departures[0] if claim.departures else claim.summary) in page.text
        if result is not None:
            assert words.where(result) in page.text
        for criterion in result.criteria if result else claim.criteria:
            assert words_of(criterion.says) in page.text
        strips = (site / "systems" / f"{slug}.html").read_text(encoding="utf-8").count('<svg class="strip"')
        assert strips == sum(bool(c.per_seed) for r in claims.published_at(slug).values() for c in r.criteria)
        assert claim.name in Page(site / "systems" / "index.html").text
        for section in ("Method", "Use", "Verdict", "The experiment", "Reference"):
            assert f" {section} ¶ " in page.text
        for section in hooks.fragment(slug):
            assert f" {section} ¶ " in page.text


@pages
@pytest.mark.slow
def test_the_pages_are_all_there(site):
    for page in (
        "index",
        "gallery",
        "errata",
        "quickstart",
        "fairness",
        "adding",
        "benchmarks",
        "scoreboard",
        "api/cli",
    ):
        assert len(Page(site / f"{page}.html").text) > 500, page
    for room in hooks.rooms():
        assert f"polyak.{room}" in Page(site / "api" / f"{room}.html").text
    reference = Page(site / "api" / "optim.html").text
    assert "AdamW that takes 5 to 10 times its learning rate" in reference  # Adan's docstring
    assert not re.search(r":(class|func|meth|mod):", reference)
    for name in ("reproduce", "record", "scoreboard"):
        assert f"polyak {name}" in Page(site / "api" / "cli.html").text
    assert (site / "search" / "search_index.js").exists()


@pages
@pytest.mark.slow
def test_pictures_open_the_start_page_the_gallery_and_every_systems_page(site):
    catalogue = claims.catalogue()
    entries = [report.Entry(claim, None) for claim in catalogue.values()]
    start, gallery = ((site / f"{name}.html").read_text(encoding="utf-8") for name in ("index", "gallery"))
    tiles = re.findall(r'<a class="tile" href="systems/(\w+)\.html">\s*<svg class="curves"', start)
    assert tiles == [e.claim.slug for e in report.some_tiles(entries)]
    shown = re.findall(r'<a class="tile" href="systems/(\w+)\.html">\s*<svg class="curves"', gallery)
    assert shown == [slug for slug, claim in catalogue.items() if claim.picture]
    for slug, claim in catalogue.items():
        page = (site / "systems" / f"{slug}.html").read_text(encoding="utf-8")
        assert (page.count('<figure class="picture">') == 1) == bool(claim.picture)
        assert page.index('class="lead"') < page.index('<figure class="picture">') < page.index('aria-label="Verdict"')


@pages
@pytest.mark.slow
def test_errata_are_on_their_page_with_their_tests_and_on_the_systems(site):
    page = Page(site / "errata.html").text
    raw = (site / "errata.html").read_text(encoding="utf-8")
    for slug, claim in claims.catalogue().items():
        system = Page(site / "systems" / f"{slug}.html").text
        assert ("What official code gets wrong" in system.partition("The experiment ¶")[2]) == bool(claim.errata)
        assert (f'href="systems/{slug}.html">{claim.name}' in raw) == bool(claim.errata)
        for erratum in claim.errata:
            name = erratum.test.rpartition("::")[2]
            assert re.search(rf"{re.escape(erratum.test)}.*?def {name} ?\(", page)
            for said in (erratum.what, erratum.where, erratum.effect):
                assert words_of(said) in page
                assert words_of(said) in system


@pages
def test_tests_of_a_group_run_together(request):
    """By its name the scheduler knows a test's group. Where that fails nothing says so: the site is just built twice."""
    if not getattr(request.config.option, "loadgroup", False):
        pytest.skip("not one worker of several")
    assert request.node.nodeid.endswith("@site")


@pages
def test_examples_in_the_reference_are_code(site):
    """A doctest is no quotation within quotations, and "> 0" is none either."""
    for page in sorted((site / "api").glob("*.html")):
        assert "<blockquote" not in page.read_text(encoding="utf-8"), page.name
    reference = (site / "api" / "optim.html").read_text(encoding="utf-8")
    assert reference.count('<code><span class="gp">&gt;&gt;&gt; ') > 10


@pages
@pytest.mark.slow
def test_the_site_loads_nothing_from_elsewhere(site):
    found = list(site.rglob("*.html"))
    assert len(found) > len(claims.slugs()) + len(hooks.rooms())
    for path in found:
        assert [load for load in Page(path).loads if re.match(r"(?:\w+:)?//", load)] == [], path.name
    for path in site.rglob("*.css"):
        assert not re.search(r"(@import|url\()\s*[\"']?(?:\w+:)?//", path.read_text(encoding="utf-8")), path.name


@pages
@pytest.mark.slow
def test_equations_are_mathml(site):
    assert Page(site / "fairness.html").equations >= 5
    for path in site.rglob("*.html"):
        assert 'class="arithmatex"' not in path.read_text(encoding="utf-8")


@pytest.mark.parametrize("path", sorted((ROOT / "docs" / "systems").glob("*.md")), ids=lambda p: p.stem)
def test_a_fragment_can_be_a_part_of_a_page(path):
    pytest.importorskip("latex2mathml")
    markdown = pytest.importorskip("markdown")
    found = hooks.fragment(path.stem)
    assert set(found) == set(hooks.SECTIONS)
    extensions = ["tables", "pymdownx.arithmatex"]
    html = markdown.markdown(
        "\n\n".join(found.values()), extensions=extensions, extension_configs={"pymdownx.arithmatex": {"generic": True}}
    )
    shown = hooks.on_page_content(html, page=None, config=None, files=None)
    assert shown.count("<math") == html.count('class="arithmatex"') > 0
    assert "$" not in shown


def test_an_equation_that_has_no_mathml_stops_the_build():
    pytest.importorskip("latex2mathml")
    for latex in (r"\nosuch{x}", r"\begin{aligned} a &= b \end{aligned}"):
        with pytest.raises(ValueError, match="no MathML for"):
            hooks.on_page_content(rf'<span class="arithmatex">\({latex}\)</span>', page=None, config=None, files=None)


def cells(kind: str, *texts: str) -> str:
    return f"<tr>\n{''.join(f'<{kind}>{text}</{kind}>' for text in texts)}\n</tr>"


def table(heads: list[str], *rows: list[str]) -> str:
    """A table as Markdown makes it, after the hooks."""
    body = "\n".join(cells("td", *row) for row in rows)
    made = f"<table>\n<thead>\n{cells('th', *heads)}\n</thead>\n<tbody>\n{body}\n</tbody>\n</table>"
    return hooks.on_page_content(f"<p>x</p>\n{made}", page=None, config=None, files=None)


def test_a_table_of_text_that_a_phone_has_no_room_for_becomes_rows():
    text = "A sentence that is long enough to be one, and to take several lines of a cell."
    wide = table(["what", "it <em>is</em> & was", "when"], ["a title", text, "2026-01-02"], ["b", "no", "at most 0.25"])
    assert '<div class="wide rows" tabindex="0">' in wide
    assert '<td style="min-width: 11em" data-head="it is &amp; was">A sentence' in wide
    assert '<td class="short" data-head="when">2026-01-02</td>' in wide
    assert wide.count("data-head=") == 4  # not of the first column, which is the row's title
    # Two columns need no names; numbers stay a table however wide; what fits stays as it is.
    two = table(["option", ""], ["<code>--a-rather-long-option</code>", text])
    assert "wide rows" in two
    assert "data-head" not in two
    assert "rows" not in table([f"a column's name {i}" for i in range(9)], ["Adan"] + ["0.25"] * 8)
    assert "rows" not in table(["word", "meaning"], ["trial", "one arm on one task with one seed"])
    aligned = table(["a", "b"], ["1", "2"]).replace("<td", '<td style="text-align: right;"')
    assert hooks.on_page_content(aligned, page=None, config=None, files=None) == aligned  # made once


def test_no_line_ends_within_an_option():
    def made(content: str) -> str:
        return hooks.on_page_content(content, page=None, config=None, files=None)

    assert made("<code>ray --head -- x--y</code>") == '<code>ray <span class="whole">--head</span> -- x--y</code>'
    assert made("<pre><span></span><code>ray --head</code></pre>") == "<pre><span></span><code>ray --head</code></pre>"


def test_the_style_of_the_report_serves_both_schemes():
    style = hooks.style()
    assert style.count("--holds:") == 2
    for part in (
        '[data-md-color-scheme="default"]',
        '[data-md-color-scheme="slate"]',
        ".report {",
        "svg.strip",
        ".chip",
    ):
        assert part in style
    assert style.count("{") == style.count("}")
    assert ":root" not in style
    assert not re.search(r"^(body|html|a|nav) \{", style, flags=re.MULTILINE)


def test_links_of_included_files_lead_to_pages():
    for source in hooks.INCLUDED:
        for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", hooks.included(source)):
            assert target in hooks.INCLUDED.values() or (ROOT / "docs" / target).exists(), (source, target)


@pytest.mark.browser
@pages
@pytest.mark.slow
@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_site_in_a_browser(chromium, site, width, scheme):
    context = chromium.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
    page = context.new_page()
    troubles, requests = [], []
    page.on("console", lambda message: troubles.append(message.text))
    page.on("pageerror", lambda error: troubles.append(str(error)))
    page.on("request", lambda request: requests.append(request.url))
    for name in (
        "index",
        "quickstart",
        "fairness",
        "benchmarks",
        "scoreboard",
        *(f"systems/{s}" for s in claims.slugs()),
    ):
        page.goto((site / f"{name}.html").as_uri())
        assert page.evaluate("document.documentElement.scrollWidth") <= width, name
        background = page.evaluate("getComputedStyle(document.body).backgroundColor")
        light = sum(int(c) for c in re.findall(r"\d+", background)[:3]) / 3 / 255
        assert light < 0.2 if scheme == "dark" else light > 0.9
    if width > 1000:
        page.locator(".md-search__input").fill("bootstrap")  # from disk, where browsers start no worker
        page.locator(".md-search-result__item", has_text="Fair").first.wait_for()
    assert troubles == []
    assert {url.partition(":")[0] for url in requests} <= {"file", "data", "blob"}
    context.close()


@pytest.mark.browser
@pages
@pytest.mark.slow
@pytest.mark.parametrize("width", [390, 1280])
def test_nothing_on_any_page_is_cut_off_or_squeezed(chromium, site, width):
    page = chromium.new_page(viewport={"width": width, "height": 900})
    for path in sorted(site.rglob("*.html")):
        if path.name == "404.html":  # its style sheets lie where a server has them
            continue
        page.goto(path.as_uri())
        assert faults(page) == [], path.name
        # A desk has room for every table; a phone lists the rows of one that reads as text, and scrolls numbers.
        assert (width < 1000 and path.stem == "benchmarks") or scrolling(page) == [], path.name
    page.close()


@pytest.mark.browser
@pages
@pytest.mark.slow
def test_no_systems_page_is_long_on_a_phone(chromium, site):
    page = chromium.new_page(viewport={"width": 390, "height": 844})
    heights = {}
    for path in [*sorted((site / "systems").glob("*.html")), site / "index.html", site / "errata.html"]:
        page.goto(path.as_uri())
        heights[path.name] = page.evaluate("document.documentElement.scrollHeight")
    page.close()
    assert {name: height for name, height in heights.items() if height >= 8000} == {}


@pytest.mark.browser
@pages
@pytest.mark.slow
def test_the_list_of_systems_can_be_searched(chromium, site):
    page = chromium.new_page()
    page.goto((site / "systems" / "index.html").as_uri())
    names, rooms = page.locator(".systems > li b"), page.locator("[data-room] .room")

    def visible(these) -> list[str]:
        return [one.inner_text() for one in these.all() if one.is_visible()]

    assert len(visible(names)) == len(claims.slugs())
    page.locator(".find input").fill("teachers")
    assert (visible(names), visible(rooms)) == (["LCSC"], ["polyak.teachers"])
    page.locator(".find input").fill("constraint optim")
    assert (visible(names), visible(rooms)) == (["Lion-K"], ["polyak.optim"])
    page.close()


@pytest.mark.browser
@pages
@pytest.mark.slow
def test_on_a_phone_a_table_of_text_is_a_list_of_its_rows(chromium, site):
    page = chromium.new_page(viewport={"width": 390, "height": 844})
    page.goto((site / "scoreboard.html").as_uri())
    first = page.locator(".rows table").first
    assert not first.locator("thead").is_visible()
    boxes = (
        first.locator("tbody tr")
        .first.locator("td")
        .evaluate_all(
            "cells => cells.map(c => [getComputedStyle(c, '::before').content, c.getBoundingClientRect().toJSON()])"
        )
    )
    labels = [label.strip('"') for label, _ in boxes]
    assert labels[:3] == ["none", "mechanism: ", "effect: "]
    assert "decided by: " in labels
    title, *others = (box for _, box in boxes)
    assert title["width"] > 300
    assert all(box["top"] >= title["bottom"] and box["right"] <= 390 for box in others)
    page.goto((site / "benchmarks.html").as_uri())  # numbers stay beside what they are of
    box = page.locator(".wide").first
    box.evaluate("e => e.scrollTo(60, 0)")
    assert box.evaluate("e => e.scrollLeft") == 60
    name = box.locator("tbody td").first.bounding_box()
    assert name["x"] == box.bounding_box()["x"]
    page.close()
