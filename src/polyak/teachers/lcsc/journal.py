"""A search's evaluations on disk, one line each, so that a search that was killed goes on where it was.

A search is a function of its seed and of the values it is told. A later one with the same settings is told the values in the
journal, without an evaluation, and is then where the first one was.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from torch import Tensor


class Journal:
    """Values by the order in which they are asked for.

    Args:
        path: the file; None keeps nothing.
        settings: what the search depends on; a file made with others is refused.

    Raises:
        ValueError: the file is no journal, or one of another search.
    """

    def __init__(self, path: str | Path | None, settings: dict[str, Any]) -> None:
        self.path = None if path is None else Path(path)
        self._known: list[dict[str, Any]] = []
        self._next = 0
        self._file: Any = None
        if self.path is None:
            return
        if self.path.exists():
            self._read(settings)
        else:
            # The first line is there as a whole or not at all.
            self.path.parent.mkdir(parents=True, exist_ok=True)
            fresh = self.path.with_name(f".{self.path.name}.{os.getpid()}")
            fresh.write_text(json.dumps({"lcsc": settings}) + "\n", encoding="utf-8")
            fresh.replace(self.path)
        self._file = self.path.open("a", encoding="utf-8")

    def _read(self, settings: dict[str, Any]) -> None:
        assert self.path is not None
        raw = self.path.read_bytes()
        whole = raw[: raw.rfind(b"\n") + 1]
        try:
            first, *rest = [json.loads(line) for line in whole.splitlines()]
            theirs = first["lcsc"]
            self._known = [{"what": r["what"], "at": r["at"], "value": float(r["value"])} for r in rest]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"resume={str(self.path)!r} is not the journal of a search: {error}") from error
        for name, ours in settings.items():
            if theirs.get(name) != ours:
                raise ValueError(
                    f"resume={str(self.path)!r} belongs to another search: its {name} is {theirs.get(name)!r}, here {ours!r}"
                )
        if len(whole) < len(raw):  # a line that was being written when its process died
            os.truncate(self.path, len(whole))

    def look_up(self, what: str, coefficients: Tensor) -> float | None:
        """The next evaluation's value, if it is known."""
        if self._next == len(self._known):
            return None
        known = self._known[self._next]
        if (known["what"], known["at"]) != (what, coefficients.tolist()):
            raise ValueError(
                f"resume={str(self.path)!r} belongs to another search: evaluation {self._next + 1} was of other coefficients"
            )
        self._next += 1
        return known["value"]

    def add(self, what: str, coefficients: Tensor, value: float) -> None:
        """Keep a value; it is on disk when this returns."""
        if self._file is not None:
            self._file.write(json.dumps({"what": what, "at": coefficients.tolist(), "value": value}) + "\n")
            self._file.flush()
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()
