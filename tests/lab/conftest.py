"""Reports to look at. Workers are started afresh and import the test claims by name, through ``sys.path``."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from polyak.lab.pages import Pages
from polyak.lab.report import Entry, write_report
from polyak.lab.serve import Server

from .results_for_tests import optimizer_claim, optimizer_result, solver_claim, solver_result

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(scope="session")
def entries() -> list[Entry]:
    swift, swerve = optimizer_claim(), optimizer_claim("swerve", name="Swerve")
    sway, leap, idle = optimizer_claim("sway", name="Sway"), solver_claim(), solver_claim("idle", name="Idle")
    return [
        Entry(swift, optimizer_result(swift)),
        Entry(swerve, optimizer_result(swerve, "fails")),
        Entry(sway, replace(optimizer_result(sway, "undecided"), trials=()), published=True),
        Entry(leap, solver_result(leap)),
        Entry(idle, None),
    ]


@pytest.fixture(scope="session")
def pages(entries, tmp_path_factory) -> dict[str, Path]:
    out = tmp_path_factory.mktemp("report")
    write_report(entries, out)
    return {path.stem: path for path in out.glob("*.html")}


@pytest.fixture
def served() -> Iterator[Callable[[Pages], Server]]:
    """Starts servers of pages, and ends them."""
    with_threads: list[tuple[Server, threading.Thread]] = []

    def start(pages: Pages) -> Server:
        server = Server(pages)
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        with_threads.append((server, thread))
        return server

    yield start
    for server, thread in with_threads:
        server.shutdown()
        server.server_close()
        thread.join()
