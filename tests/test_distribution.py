"""What others install: the wheel and the sdist, each in an environment that has nothing of this checkout."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import venv
import zipfile
from importlib.util import find_spec
from pathlib import Path

import pytest

import polyak

ROOT = Path(__file__).parents[1]
pytest.importorskip("hatchling")
pytestmark = pytest.mark.xdist_group("distribution")  # one worker builds and installs
# torch and the others come from the environment that runs the tests, so that nothing is fetched.
_FOUND = [find_spec(name) for name in ("hatchling", "torch", "typer")]
LIBRARIES = sorted({str(Path(spec.origin).parents[1]) for spec in _FOUND if spec is not None and spec.origin})

LION = """
import polyak, torch
from polyak.optim import Lion

x = torch.tensor([1.0, -2.0], requires_grad=True)
lion = Lion([x], lr=0.25)
for _ in range(3):
    lion.zero_grad()
    x.square().sum().backward()
    lion.step()
print(polyak.__file__, x.tolist())
"""


def ran(*command: object, cwd: Path | None = None, **environment: str) -> str:
    """What a command prints. It finds no code of this checkout, and no settings of who runs the tests."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "PIP_", "POLYAK_"))}
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, env=clean | environment, cwd=cwd)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The wheel, made from the checkout, and the sdist."""
    folder = tmp_path_factory.mktemp("dist")
    options = ["-d", folder, "-t", "wheel", "-t", "sdist"]
    ran(sys.executable, "-m", "hatchling", "build", *options, cwd=ROOT, PYTHONPATH=os.pathsep.join(LIBRARIES))
    [wheel], [sdist] = folder.glob("*.whl"), folder.glob("*.tar.gz")
    return wheel, sdist


def installed(archive: Path, folder: Path) -> Path:
    """The Python of a new environment that has the package, and nothing else that pip put there."""
    venv.create(folder, with_pip=False, symlinks=True)
    python = folder / "bin" / "python"
    options = ["--quiet", "--no-deps", "--no-index", "--no-build-isolation", "--ignore-installed"]
    quiet = {"PIP_DISABLE_PIP_VERSION_CHECK": "1", "PYTHONPATH": os.pathsep.join(LIBRARIES)}
    ran(sys.executable, "-m", "pip", "--python", python, "install", *options, archive, **quiet)
    [own] = folder.glob("lib/python*/site-packages")
    (own / "libraries.pth").write_text("\n".join(LIBRARIES))
    return python


def package(python: Path) -> dict[str, bytes]:
    """The files of an installed package."""
    [own] = python.parents[1].glob("lib/python*/site-packages/polyak")
    return {str(p.relative_to(own)): p.read_bytes() for p in own.rglob("*") if p.is_file() and p.suffix != ".pyc"}


@pytest.fixture(scope="module")
def from_wheel(built: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return installed(built[0], tmp_path_factory.mktemp("wheel") / "env")


def test_the_wheel_has_the_package_and_nothing_else(built: tuple[Path, Path]) -> None:
    names = zipfile.ZipFile(built[0]).namelist()
    assert {name.partition("/")[0] for name in names} == {"polyak", f"polyak-{polyak.__version__}.dist-info"}
    source = ROOT / "src" / "polyak"
    ours = {f"polyak/{p.relative_to(source)}" for p in source.rglob("*") if p.is_file() and p.suffix != ".pyc"}
    assert {name for name in names if name.startswith("polyak/")} == ours
    assert {Path(name).suffix for name in ours} <= {".py", ".c", ".json", ".html", ".css", ".js", ".typed", ".txt"}
    tests = [name for name in ours if Path(name).name.startswith("test_") or "for_tests" in name]
    assert [name for name in tests if not name.startswith("polyak/cli/skeleton/")] == [], (
        "what `polyak new` writes alone"
    )
    assert not [name for name in ours if name.endswith("sqlite3")]


def test_the_sdist_has_what_the_wheel_is_built_from(built: tuple[Path, Path]) -> None:
    with tarfile.open(built[1]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"pyproject.toml", "README.md", "LICENSE", "src/polyak/__init__.py", "PKG-INFO"} <= names
    assert not [
        name for name in names if name.startswith((".venv", "demo/", "site/")) or name.endswith((".pyc", "sqlite3"))
    ]


def test_the_wheel_lists_runs_a_part_and_writes_a_report(from_wheel: Path, tmp_path: Path) -> None:
    home = {"POLYAK_HOME": str(tmp_path / "home")}
    assert "Lion" in ran(from_wheel.with_name("polyak"), "list", **home)
    where, _, x = ran(from_wheel, "-c", LION).partition(" ")
    assert Path(where).is_relative_to(from_wheel.parents[1])
    assert x == "[0.25, -1.25]\n"
    ran(from_wheel, "-m", "polyak", "report", "--out", tmp_path / "report", **home)
    assert "<title>" in (tmp_path / "report" / "lion.html").read_text(encoding="utf-8")


def test_the_sdist_installs_the_same_files(built: tuple[Path, Path], from_wheel: Path, tmp_path: Path) -> None:
    python = installed(built[1], tmp_path / "env")
    assert package(python) == package(from_wheel)
    assert "Lion" in ran(python, "-m", "polyak", "list", POLYAK_HOME=str(tmp_path / "home"))
