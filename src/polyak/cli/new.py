"""``polyak new``: the skeleton of a system, in a checkout. It passes `make check`; its tests fail until they are written."""

import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from string import Template
from typing import Annotated

import typer

from polyak import claims
from polyak.cli import shared
from polyak.core import checks
from polyak.lab.scoreboard import ROOMS

SKELETON = Path(__file__).with_name("skeleton")


def new(
    slug: Annotated[str, typer.Argument(help="The system's slug: lower case, as a Python name.", show_default=False)],
    room: Annotated[str, typer.Option(help=f"Where it belongs: {', '.join(ROOMS)}.", show_default=False)],
    name: Annotated[
        str, typer.Option(help="Its class (default: the slug in capitals, as in AdamP).", show_default=False)
    ] = "",
) -> None:
    """Write the skeleton of a system: part, claim, picture, tests and page.

    For those who work in a checkout. `make check` passes with it; its tests fail until they are written. Nothing that is there is
    overwritten.
    """
    root = shared.need_checkout()
    shared.check("--room", room, list(ROOMS))
    if not re.fullmatch(r"[a-z][a-z0-9_]*[a-z0-9]", slug):
        shared.wrong(f"must be lower-case letters, digits and _, got {checks.shown(slug)}", "SLUG")
    if slug in claims.slugs():
        shared.wrong(f"there is a system {slug!r} already", "SLUG")
    name = name or "".join(part.capitalize() for part in slug.split("_"))
    if not name.isidentifier() or not name[0].isupper():
        shared.wrong(f"must be the name of a class, got {checks.shown(name)}", "--name")
    files = _files(slug, room, name)
    if there := [path for path in files if (root / path).exists()]:
        shared.stop(f"{there[0]} is there already; nothing was written")
    project = root / "pyproject.toml"
    text = project.read_text(encoding="utf-8")
    text = joined(text, "No claim imports another", f"polyak.claims.{room}.{slug}")
    text = joined(text, f"No system of {room}/ imports another", f"polyak.{room}.{slug}")
    if f"src/polyak/{room}/__init__.py" in files:
        text = joined(text, "The rooms do not need what only the lab needs", f"polyak.{room}", key="source_modules")
    for path, content in files.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(content, encoding="utf-8")
    project.write_text(text, encoding="utf-8")
    _export(root / "src" / "polyak" / room / "__init__.py", f"polyak.{room}.{slug}", name)
    _tidy(root, [*(p for p in files if p.endswith(".py")), f"src/polyak/{room}/__init__.py"])
    for path in files:
        print(path)
    print("Write the part, its tests, the claim and the picture; CONTRIBUTING.md has the order. Run them by:")
    print(f"  pytest tests/{room}/test_{slug}.py tests/claims/test_{slug}_claim.py")


def _files(slug: str, room: str, name: str) -> dict[str, str]:
    """Path -> content, of all that is written; a room that is new comes with its packages."""
    part = f"part_{room}.txt" if (SKELETON / f"part_{room}.txt").exists() else "part.txt"
    made = {
        f"src/polyak/{room}/{slug}.py": part,
        f"src/polyak/claims/{room}/{slug}.py": "claim.txt",
        f"src/polyak/claims/_pictures/{slug}.py": "picture.txt",
        f"tests/{room}/test_{slug}.py": "test_part.txt",
        f"tests/claims/test_{slug}_claim.py": "test_claim.txt",
        f"docs/systems/{slug}.md": "page.txt",
    }
    words = {"slug": slug, "room": room, "name": name}
    files = {path: _filled(source, words) for path, source in made.items()}
    if room not in {claim.room for claim in claims.catalogue().values()}:
        files[f"src/polyak/{room}/__init__.py"] = f'"""{ROOMS[room].capitalize()}."""\n\n__all__ = []\n'
        files[f"src/polyak/claims/{room}/__init__.py"] = f'"""Claims of the systems in `polyak.{room}`."""\n'
    return files


def _filled(source: str, words: Mapping[str, str]) -> str:
    return Template((SKELETON / source).read_text(encoding="utf-8")).substitute(words)


def joined(project: str, contract: str, module: str, *, key: str = "modules") -> str:
    """pyproject.toml with a module in a list of a contract; a contract of independence is added where it is missing."""
    head = f'[[tool.importlinter.contracts]]\nname = "{contract}"\n'
    start = project.find(head)
    if start < 0:
        return f'{project.rstrip()}\n\n{head}type = "independence"\nmodules = ["{module}"]\n'
    at = project.index(f"{key} = [", start) + len(f"{key} = [")
    end = project.index("]", at)
    listed = sorted({*re.findall(r'"([^"]+)"', project[at:end]), module})
    lines = "".join(f'\n    "{one}",' for one in listed)
    return f"{project[:at]}{lines}\n{project[end:]}"


def _export(package: Path, module: str, name: str) -> None:
    """The class among the names of its room."""
    text = package.read_text(encoding="utf-8")
    head, listed, rest = text.partition("__all__ = [")
    package.write_text(f'{head}from {module} import {name}\n\n{listed}\n    "{name}",{rest}', encoding="utf-8")


def _tidy(root: Path, files: list[str]) -> None:
    """Imports in order and lines of the house's length, by the linter that checks them."""
    for arguments in (["check", "--fix", "--quiet"], ["format", "--quiet"]):
        subprocess.run([sys.executable, "-m", "ruff", *arguments, *files], cwd=root, check=False)
