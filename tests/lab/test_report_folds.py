"""What a report shows at once, what it folds, and the pictures that it opens with."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from polyak.lab import pictures
from polyak.lab.claim import Erratum, Plot
from polyak.lab.report import TILES, Entry, claim_page, gallery_page, index_page, some_tiles, write_report

from .results_for_tests import optimizer_claim, optimizer_result

FOLD = re.compile(r"<details[^>]*>\s*<summary>(.*?)</summary>", flags=re.DOTALL)


def folds(page: str) -> list[str]:
    return [" ".join(text.split()) for text in FOLD.findall(page)]


def entry_with(count: int, *kinds: str) -> Entry:
    """A claim with so many criteria that count beside its own two, of these kinds in turn; the first of them fails."""
    claim = optimizer_claim()
    result = optimizer_result(claim)
    more = [
        replace(claim.criteria[0], name=f"more{i}", says=f"More {i}", kind=kinds[i % len(kinds)]) for i in range(count)
    ]
    found = [
        replace(result.criteria[0], name=c.name, says=c.says, kind=c.kind, verdict="holds" if i else "fails")
        for i, c in enumerate(more)
    ]
    return Entry(
        replace(claim, criteria=(*claim.criteria, *more)), replace(result, criteria=(*result.criteria, *found))
    )


def test_few_criteria_are_all_shown():
    assert not any("criteri" in fold for fold in folds(claim_page(entry_with(1, "effect"))))


def test_of_many_criteria_those_that_decide_are_shown_and_the_others_folded_by_kind():
    page = claim_page(entry_with(6, "mechanism", "effect"))
    said = folds(page)
    assert "Mechanism: 2 more criteria: 2 ✓ holds" in said
    assert "Effect: 5 criteria: 5 ✓ holds" in said
    section = page[page.index("<h2>Criteria") :]
    first, second = section.index("Mechanism: 2 more"), section.index("Effect: ")
    assert (
        section.index("<h3>More 0</h3>")
        < first
        < section.index("<h3>More 2</h3>")
        < second
        < section.index("<h3>More 1</h3>")
    )
    for i in range(6):
        assert section.count(f"<h3>More {i}</h3>") == 1
    assert section.count("<details") == section.count("</details>")


def test_a_claim_that_was_not_run_folds_all_of_many_criteria():
    said = folds(claim_page(replace(entry_with(6, "mechanism"), result=None)))
    assert "Mechanism: 6 criteria" in said
    assert "Effect: 2 criteria" in said


def test_the_experiments_table_and_many_departures_are_folded():
    claim = optimizer_claim()
    page = claim_page(Entry(claim, optimizer_result(claim)))
    assert any(fold.startswith("5 arms: AdamW; ") for fold in folds(page))
    assert "Departures from the paper and its code (3)" not in folds(page)
    many = replace(claim, departures=(*claim.departures, "A third."))
    assert "Departures from the paper and its code (3)" in folds(claim_page(Entry(many, optimizer_result(many))))


def test_results_of_many_tasks_or_curves_are_folded():
    claim = optimizer_claim()
    digits = claim.task("digits")

    def folded(plots: int) -> bool:
        task = replace(digits, plots=(Plot("step", "train_loss"),) * plots)
        changed = replace(claim, tasks=tuple(task if t.name == "digits" else t for t in claim.tasks))
        return digits.label in folds(claim_page(Entry(changed, optimizer_result(changed))))

    assert not folded(4)
    assert folded(5)


def test_errata_are_on_the_page():
    erratum = Erratum(what="It adds <b>.", where="a/b, c.py", effect="All is wrong.", test="tests/test_x.py::test_y")
    claim = optimizer_claim(errata=(erratum,))
    page = claim_page(Entry(claim, optimizer_result(claim)))
    section = page[page.index("What official code gets wrong") :]
    for said in ("It adds &lt;b&gt;.", "a/b, c.py", "All is wrong.", "<code>tests/test_x.py::test_y</code>"):
        assert said in section
    assert "What official code" not in claim_page(Entry(optimizer_claim(), None))


@pytest.fixture
def drawn(monkeypatch) -> None:
    """Pictures without drawing."""

    def svg(claim):
        return f'<svg aria-label="What {claim.name} does &amp; not"></svg>' if claim.picture else ""

    monkeypatch.setattr(pictures, "drawn", svg)


def pictured(slug: str, room: str) -> Entry:
    return Entry(optimizer_claim(slug, name=slug.title(), room=room, picture=lambda: None), None)


def test_the_picture_is_on_top_of_a_claims_page(drawn):
    page = claim_page(pictured("swift", "optim"))
    figure = page.index('<figure class="picture">')
    assert page.index("<h1>") < figure < page.index('aria-label="What Swift does') < page.index('aria-label="Verdict"')
    assert '<figcaption class="small">What Swift does &amp; not</figcaption>' in page
    assert "<figure class" not in claim_page(Entry(optimizer_claim(), None)).partition('aria-label="Verdict"')[0]


def test_tiles_open_the_index_from_every_room_in_turn(drawn, tmp_path):
    many = [pictured(f"a{i}", "optim") for i in range(TILES)] + [
        pictured("b", "pde"),
        Entry(optimizer_claim("c"), None),
    ]
    assert [e.claim.slug for e in some_tiles(many)] == ["a0", "b", *(f"a{i}" for i in range(1, TILES - 1))]
    page = index_page(many, linked={"b"})
    assert page.count('<svg aria-label="What') == TILES
    assert '<a class="tile" href="b.html">' in page
    assert '<div class="tile">' in page
    assert page.index('class="tiles"') < page.index("<h2>Systems")
    index = write_report(many[-2:], tmp_path)
    assert 'href="gallery.html"' in index.read_text(encoding="utf-8")
    assert 'href="b.html"' in (tmp_path / "gallery.html").read_text(encoding="utf-8")
    assert "tiles" not in index_page([Entry(optimizer_claim(), None)], linked=()).partition("<h1>")[2]


def test_the_gallery_has_every_picture_by_room(drawn):
    page = gallery_page([pictured("a", "optim"), pictured("b", "pde"), Entry(optimizer_claim("c"), None)], linked={"a"})
    assert re.findall(r"<h2>(\w+)</h2>", page) == ["optim", "pde"]
    assert re.findall(r"<b>(\w+)</b>", page) == ["A", "B"]
    assert page.count("What A does &amp; not</span>") == 1
