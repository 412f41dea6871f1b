"""What must be true of every system in the catalogue, and of the catalogue itself."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
import time
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import pytest

import polyak
from polyak import claims
from polyak.lab import pictures
from polyak.lab.claim import Claim

ROOT = Path(polyak.__file__).parent
FILES = sorted(
    p.parent if p.name == "__init__.py" else p
    for pattern in ("*/*.py", "*/*/__init__.py")
    for p in (ROOT / "claims").glob(pattern)
    if not p.name.startswith("__init__") or p.parent.parent != ROOT / "claims"
)
SYSTEMS = [p for p in FILES if not p.name.startswith("_") and not p.parent.name.startswith("_")]
TESTS = Path(__file__).parents[1]
HEAVY = ("torch", "numpy", "scipy", "matplotlib", "sklearn", "pandas", "optuna")


def test_the_catalogue_is_what_lies_in_the_folders():
    assert sorted(claims.slugs()) == sorted(p.stem for p in SYSTEMS)
    assert list(claims.catalogue()) == claims.slugs()


@pytest.mark.parametrize("path", SYSTEMS, ids=lambda p: p.stem)
def test_a_system_is_found_by_its_name(path):
    claim = claims.load(path.stem)
    assert isinstance(claim, Claim)
    assert (claim.slug, claim.room) == (path.stem, path.parent.name)
    assert claims.verdict_path(claim.slug) == path.parent / f"{claim.slug}.small.verdict.json"


@pytest.mark.parametrize("slug", claims.slugs())
def test_a_claim_says_what_it_must(slug):
    claim = claims.load(slug)
    module, _, name = claim.part.partition(":")
    assert name.isidentifier()
    assert module.startswith(f"polyak.{claim.room}.")
    path = ROOT.joinpath(*module.split(".")[1:])
    assert path.with_suffix(".py").exists() or (path / "__init__.py").exists(), f"{module} has no file"
    assert all(find_spec(source) for source in claim.sources)
    assert "small" in {s.name for s in claim.scales}
    assert "\n" not in claim.summary
    assert len(claim.summary) <= 120
    assert len(claim.usage.splitlines()) in (0, 2, 3, 4)
    assert any(c.gating for c in claim.criteria)
    compile(claim.usage, "usage", "exec")


VERDICTS = sorted((ROOT / "claims").rglob("*.verdict.json"))


@pytest.mark.parametrize("path", VERDICTS, ids=lambda p: p.name.removesuffix(".verdict.json"))
def test_a_published_verdict_is_small_and_of_this_claim(path):
    slug, scale = path.name.removesuffix(".verdict.json").split(".")
    assert path == claims.verdict_path(slug, scale)
    claim, result = claims.load(slug), claims.published(slug, scale)
    assert result is not None
    assert path.stat().st_size < 50_000
    assert (result.slug, result.scale, result.trials) == (slug, scale, ())
    assert scale in {s.name for s in claim.scales}
    assert [c.name for c in result.criteria] == [c.name for c in claim.criteria]
    assert [c.says for c in result.criteria] == [c.says for c in claim.criteria]
    assert [c.kind for c in result.criteria] == [c.kind for c in claim.criteria]
    assert [(c.op, c.bound) for c in result.criteria] == [(c.op, c.bound) for c in claim.criteria]
    assert "trials" not in json.loads(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("slug", claims.slugs())
def test_a_picture_is_drawn_in_seconds_and_says_what_it_shows(slug):
    claim = claims.load(slug)
    assert claim.picture is not None, f"{slug} has no picture"
    import_module("matplotlib.figure")
    import_module(claim.part.partition(":")[0])  # what importing takes is not the picture's
    start = time.thread_time()
    svg = pictures.draw(claim)
    assert time.thread_time() - start < 3, (
        "a picture takes two seconds of processor time; the third is for a busy machine"
    )
    assert len(svg.encode()) <= 60_000
    assert len(pictures.description(svg)) >= 60
    paths = re.findall(r' d="([^"]*)"', svg)
    assert paths
    assert not any(re.search(r"nan|inf", path, flags=re.IGNORECASE) for path in paths)
    assert re.search(r"var\(--series-\d\)", svg), "drawn in the reports' colours"


@pytest.mark.parametrize("slug", claims.slugs())
def test_what_official_code_gets_wrong_is_shown_by_a_test(slug):
    for erratum in claims.load(slug).errata:
        assert min(len(erratum.what), len(erratum.where), len(erratum.effect)) >= 12
        assert "\n" not in erratum.what + erratum.where + erratum.effect
        path, _, name = erratum.test.partition("::")
        assert (TESTS.parent / path).is_relative_to(TESTS)
        defined = {
            n.name
            for n in ast.walk(ast.parse((TESTS.parent / path).read_text("utf-8")))
            if isinstance(n, ast.FunctionDef)
        }
        assert name in defined
        assert name.startswith("test_")


def test_every_test_of_errata_is_named_by_an_erratum():
    named = {e.test for claim in claims.catalogue().values() for e in claim.errata}
    for path in TESTS.glob("*/test_errata.py"):
        tests = re.findall(r"^def (test_\w+)", path.read_text("utf-8"), flags=re.MULTILINE)
        assert {f"tests/{path.parent.name}/{path.name}::{test}" for test in tests} <= named


def test_reading_all_claims_is_light():
    code = f"import sys; from polyak import claims; claims.catalogue(); print([m for m in {HEAVY} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("[]\n", "")


def made_up(folder: Path, *files: str) -> list[str]:
    for file in files:
        path = folder / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(
            "CLAIM = __name__\n" if path.name != "__init__.py" or len(path.relative_to(folder).parts) > 2 else ""
        )
    return [str(folder)]


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    def use(*files: str) -> None:
        monkeypatch.setattr(claims, "__path__", made_up(tmp_path, *files))

    yield use
    for name in list(sys.modules):
        if name.startswith(("polyak.claims.aa", "polyak.claims.bb")):
            del sys.modules[name]


def test_shared_helpers_are_no_systems_and_folders_are(elsewhere):
    elsewhere("bb/__init__.py", "bb/two.py", "bb/_shared.py", "bb/one/__init__.py", "aa/__init__.py", "aa/three.py")
    assert claims.slugs() == ["three", "one", "two"]
    assert claims.load("one") == "polyak.claims.bb.one"
    assert claims.verdict_path("one").parent.name == "bb"
    assert claims.published("one") is None


def test_an_unknown_slug_suggests_a_near_one(elsewhere):
    elsewhere("aa/__init__.py", "aa/three.py")
    with pytest.raises(LookupError, match="there is no system 'thre'; did you mean 'three'"):
        claims.load("thre")


def test_two_rooms_cannot_share_a_slug(elsewhere):
    elsewhere("aa/__init__.py", "aa/same.py", "bb/__init__.py", "bb/same.py")
    with pytest.raises(ValueError, match="share the slug 'same'"):
        claims.slugs()
