"""The command line: ``polyak list``, ``show``, ``reproduce``, ``report``, ``serve``, ``compare``, and ``record`` to publish."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Sequence
from typing import NoReturn

# What the extra `lab` brings, directly or not, by import name: if one is missing, the extra is what is missing.
_EXTRA = {
    "filelock",
    "jinja2",
    "joblib",
    "markupsafe",
    "matplotlib",
    "optuna",
    "platformdirs",
    "rich",
    "scipy",
    "sklearn",
    "tqdm",
    "typer",
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line (on ``sys.argv`` by default) and exit with its status."""
    try:
        from polyak.cli.app import run

        run(arguments)
    except ModuleNotFoundError as missing:
        name = (missing.name or "").partition(".")[0]
        if name not in _EXTRA:
            _mistake()
        print(
            f"polyak: this command needs {name}, of the extra `lab`: pip install 'polyak[lab]' (or '.[lab]' in a checkout)",
            file=sys.stderr,
        )
        raise SystemExit(3) from None
    except Exception:
        _mistake()


def _mistake() -> NoReturn:
    """End after an error that nobody foresaw. Python's own status would be 1, which says that a claim fails."""
    traceback.print_exc()
    print("polyak: this is a mistake in polyak; please report it, with the lines above", file=sys.stderr)
    raise SystemExit(3) from None
