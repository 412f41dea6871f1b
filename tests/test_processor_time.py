"""The limit on what a system's tests may take of a processor."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from .processor_time_for_tests import LIMIT_S, MARGIN, ProcessorTime, system_of


@pytest.mark.parametrize(
    ("nodeid", "system"),
    [
        ("tests/optim/test_adan.py::test_a[x::y]", "adan"),
        ("tests/optim/test_adan_of_two_use.py::test", "adan_of_two"),
        ("tests/claims/test_adan_claim.py::test", "adan"),
        ("tests/optim/test_adanx.py::test", None),
        ("tests/lab/test_run.py::test_adan", None),
    ],
)
def test_a_test_belongs_to_the_system_that_its_file_names(nodeid: str, system: str | None) -> None:
    assert system_of(nodeid, ["adan", "adan_of_two", "lion"]) == system


def run(seconds: float, judges: bool = True, table: bool = True) -> tuple[Any, list[str]]:
    """The exit status of a run whose tests of Lion took so long in all, in two workers, and what it says."""
    plugin, said = ProcessorTime(table=table, judges=judges), list[str]()
    for phase in range(2):
        properties = [("other", 1e9), ("processor time", seconds / 2)]
        report: Any = SimpleNamespace(nodeid=f"tests/optim/test_lion.py::test_{phase}", user_properties=properties)
        plugin.pytest_runtest_logreport(report)
    session: Any = SimpleNamespace(exitstatus=pytest.ExitCode.OK)
    plugin.pytest_sessionfinish(session)
    terminal: Any = SimpleNamespace(
        section=lambda title: None, write_line=lambda line, **_: said.append(line) if "at most" in line else None
    )
    plugin.pytest_terminal_summary(terminal)
    return session.exitstatus, said


def test_a_system_over_the_limit_is_named_and_fails_a_run_that_asks() -> None:
    assert run(MARGIN * LIMIT_S - 0.1) == (pytest.ExitCode.OK, [])
    says = ["lion's tests took 20.0 s of processor time; at most 12"]
    assert run(20.0) == (pytest.ExitCode.TESTS_FAILED, says)
    assert run(20.0, judges=False) == (pytest.ExitCode.OK, []), "a worker, and a run of a part"
    assert run(20.0, table=False) == (pytest.ExitCode.OK, says), "a busy machine does not decide whether tests pass"


def test_this_run_measures(request: pytest.FixtureRequest) -> None:
    [plugin] = [p for p in request.config.pluginmanager.get_plugins() if isinstance(p, ProcessorTime)]
    report = SimpleNamespace(user_properties=[])
    measured = plugin.pytest_runtest_makereport()
    next(measured)
    sum(range(10**6))
    with pytest.raises(StopIteration):
        measured.send(report)
    [(name, seconds)] = report.user_properties
    assert name == "processor time"
    assert 0.0 < seconds < LIMIT_S
