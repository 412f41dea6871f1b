"""A system's picture: how it is drawn, described and kept."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from polyak import claims
from polyak.lab import pictures
from polyak.lab.claim import Claim
from polyak.lab.report import Entry, Live, gallery_page, index_page

CALLS: list[int] = []


def picture():
    CALLS.append(1)
    figure, (left, right) = pictures.panels(2, titles=("Before", "After <x>"))
    left.plot([0, 1, 2], [0.123456789, 1, 0.5], color=pictures.SERIES[0])
    pictures.name(right, 0.5, 0.5, "a label", pictures.INK)
    return pictures.described(figure, 'Two panels: "before" & after')


def claim_with(picture_function) -> Claim:
    return replace(claims.load("apo"), picture=picture_function)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(pictures, "_folder", lambda: tmp_path / "pictures")
    CALLS.clear()
    return tmp_path / "pictures"


def test_a_picture_takes_the_pages_colours_and_says_what_it_shows():
    svg = pictures.draw(claim_with(picture))
    assert svg.startswith('<svg class="curves" viewBox="0 0 520 280" role="img" aria-label="Two panels:')
    assert pictures.description(svg) == 'Two panels: "before" & after'
    assert "var(--series-1)" in svg
    assert pictures.SERIES[0] not in svg
    assert "After &lt;x&gt;" in svg
    assert not re.search(r' d="[^"]*\.\d\d', svg), "a tenth of a pixel is enough"
    assert set(re.findall(r'\bid="(.{12})', svg)) == {"picture-apo-"}


def test_panels_are_as_asked():
    figure, axes = pictures.panels(3, rows=2, frame=False, height=300)
    assert len(axes) == len(figure.axes) == 3
    assert (figure.get_figwidth() * 72, figure.get_figheight() * 72) == (520, 300)
    assert [list(one.get_xticks()) for one in axes] == [[]] * 3
    _, (one, other) = pictures.panels(2, square=True, share=True)
    one.set_xlim(0, 7)
    assert other.get_xlim() == (0, 7)
    assert one.get_aspect() == 1


def test_a_picture_is_kept_until_its_code_changes(folder, monkeypatch):
    claim = claim_with(picture)
    first = pictures.drawn(claim)
    assert pictures.drawn(claim) == first
    assert (len(CALLS), len(list(folder.iterdir()))) == (1, 1)
    monkeypatch.setattr(pictures.facts, "code_of", lambda target: f"other code of {target}")
    assert pictures.drawn(claim) == first
    assert (len(CALLS), len(list(folder.iterdir()))) == (2, 2)


def test_without_a_place_to_keep_it_it_is_drawn_each_time(folder):
    folder.write_text("a file where the folder should be", encoding="utf-8")
    for _ in range(2):
        assert pictures.drawn(claim_with(picture)).startswith("<svg")
    assert len(CALLS) == 2
    assert pictures.drawn(claim_with(None)) == ""


def test_a_served_page_does_not_wait_for_pictures(folder):
    """It shows those that are drawn; a written one draws what is missing."""
    entry = Entry(claim_with(picture), None)
    served = {"linked": (), "live": Live()}
    assert "tile" not in gallery_page([entry], **served).partition("<main>")[2]
    assert not pictures.is_kept(entry.claim)
    assert CALLS == []
    assert 'class="tile"' in index_page([entry], linked=())
    assert CALLS == [1]
    assert 'class="tile"' in index_page([entry], **served)
    assert 'class="tile"' in gallery_page([entry], **served)
    assert CALLS == [1]
