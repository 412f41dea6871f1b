"""`polyak new`: the skeleton of a system passes the checks, and its tests fail until they are written."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import polyak
from polyak.cli import new
from polyak.cli.app import run

ROOT = Path(polyak.__file__).resolve().parents[2]
pytestmark = pytest.mark.skipif(not (ROOT / "pyproject.toml").exists(), reason="no checkout")


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    """A copy of this one, with two systems more: one of a room that has a skeleton of its own, one of a room that is new."""
    root = tmp_path_factory.mktemp("checkout")
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, root)
    shutil.copytree(ROOT / "src", root / "src", ignore=shutil.ignore_patterns("__pycache__"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("polyak.cli.shared.CHECKOUT", root)
        for arguments in (["anew", "--room", "optim"], ["late_one", "--room", "physics", "--name", "Late"]):
            with pytest.raises(SystemExit) as ended:
                run(["new", *arguments])
            assert ended.value.code == 0
    return root


def there(checkout: Path, *command: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(checkout / "src")}
    return subprocess.run(
        [sys.executable, "-m", *command], cwd=checkout, env=environment, capture_output=True, text=True
    )


def test_it_passes_the_checks(checkout):
    made = [str(p.relative_to(checkout)) for p in checkout.rglob("*.py") if "anew" in p.name or "late_one" in p.name]
    assert len(made) == 10
    rooms = ["src/polyak/optim/__init__.py", "src/polyak/physics/__init__.py"]
    for command in (
        ["ruff", "check", *made, *rooms],
        ["ruff", "format", "--check", *made, *rooms],
        ["pyright", "--pythonpath", sys.executable, *(p for p in made if p.startswith("src"))],
    ):
        done = there(checkout, *command)
        assert done.returncode == 0, done.stdout + done.stderr
    contracts = "import sys; from importlinter.cli import lint_imports; sys.exit(lint_imports(no_cache=True))"
    environment = {**os.environ, "PYTHONPATH": str(checkout / "src")}
    done = subprocess.run(
        [sys.executable, "-c", contracts], cwd=checkout, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout
    assert "No system of physics/ imports another KEPT" in done.stdout


def test_its_tests_fail_until_they_are_written(checkout):
    files = [
        f"tests/{where}" for where in ("optim/test_anew.py", "claims/test_anew_claim.py", "physics/test_late_one.py")
    ]
    done = there(checkout, "pytest", "-p", "no:cacheprovider", *files)
    assert done.returncode == 1, done.stdout
    assert "14 failed" in done.stdout
    assert "passed" not in done.stdout


def test_it_is_in_the_catalogue_and_in_its_room(checkout):
    code = "from polyak import claims; from polyak.optim import Anew; from polyak.physics import Late; print(claims.slugs())"
    environment = {**os.environ, "PYTHONPATH": str(checkout / "src")}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert "'anew'" in done.stdout
    assert "'late_one'" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["Lion2", "--room", "optim"], "SLUG: must be lower-case"),
        (["lion", "--room", "optim"], "there is a system 'lion' already"),
        (["two", "--room", "optimm"], "did you mean 'optim'"),
        (["two", "--room", "optim", "--name", "a b"], "--name: must be the name of a class"),
    ],
)
def test_what_is_wrong_is_said_and_nothing_written(arguments, says, capsys):
    before = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    with pytest.raises(SystemExit) as ended:
        run(["new", *arguments])
    assert ended.value.code == 2
    assert says in capsys.readouterr().err
    assert (ROOT / "pyproject.toml").read_text(encoding="utf-8") == before


def test_a_file_that_is_there_stays(checkout, monkeypatch, capsys):
    monkeypatch.setattr("polyak.cli.shared.CHECKOUT", checkout)
    before = {p: p.read_bytes() for p in checkout.rglob("*") if p.is_file() and "__pycache__" not in p.parts}
    monkeypatch.setattr(new.claims, "slugs", list)
    with pytest.raises(SystemExit) as ended:
        run(["new", "anew", "--room", "optim"])
    assert ended.value.code == 3
    assert "src/polyak/optim/anew.py is there already" in capsys.readouterr().err
    assert {p: p.read_bytes() for p in before} == before


def test_a_module_joins_a_contract_once():
    project = '[[tool.importlinter.contracts]]\nname = "Rooms"\ntype = "independence"\nmodules = ["b"]\n\n[x]\n'
    once = new.joined(project, "Rooms", "a")
    assert '    "a",\n    "b",\n]\n\n[x]' in once
    assert new.joined(once, "Rooms", "a") == once
    assert new.joined(project, "Other", "a").endswith('name = "Other"\ntype = "independence"\nmodules = ["a"]\n')
