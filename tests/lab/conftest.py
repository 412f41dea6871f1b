"""Reports to look at. Workers are started afresh and import the test claims by name, through ``sys.path``."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import pytest

from polyak.lab.pages import Pages
from polyak.lab.report import Entry, write_report
from polyak.lab.serve import Server

from .results_for_tests import optimizer_claim, optimizer_result, solver_claim, solver_result

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(scope="module", autouse=True)
def _without_workers(in_process: None) -> None:
    """Tests that are about processes ask for the fixture ``processes``."""


class Clock:
    """Stands in for the module ``time`` where trials are timed, so that a budget in time is the same steps on any machine.

    A second passes with each reading, and otherwise as something sleeps.
    """

    def __init__(self) -> None:
        self.now = 0.0

    def sleep(self, seconds: float) -> None:
        self.now += seconds

    def perf_counter(self) -> float:
        self.now += 1.0
        return self.now

    def process_time(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    for module in ("examine", "sampling", "trial"):
        monkeypatch.setattr(import_module(f"polyak.lab.compare.{module}"), "time", made)
    monkeypatch.setattr(time, "sleep", made.sleep)
    return made


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
