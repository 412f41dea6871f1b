"""How much processor time a system's tests take, which has a limit: wall time would depend on what else runs.

Each phase of a test is measured where it runs, with the processes that it started and waited for. With pytest-xdist the workers'
reports carry the numbers to the process that sums them.
"""

from __future__ import annotations

import resource
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import PurePosixPath
from typing import Any

import pytest

from polyak import claims

LIMIT_S = 12.0  # of a system's tests, its claim's among them
# The same work takes longer on a slower processor, and on one whose caches others use, too.
MARGIN = 1.5
_PROPERTY = "processor time"


def used() -> float:
    """Seconds of processor time of this process, and of those that it started and waited for."""
    both = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in both)


def system_of(nodeid: str, slugs: Iterable[str]) -> str | None:
    """The system that a test is of: adan of ``tests/optim/test_adan_use.py`` and ``tests/claims/test_adan_claim.py``."""
    name = PurePosixPath(nodeid.partition("::")[0]).stem.removeprefix("test_")
    return max((slug for slug in slugs if f"{name}_".startswith(f"{slug}_")), key=len, default=None)


def over(spent: Mapping[str, float]) -> list[str]:
    """What to say of each system whose tests take too much."""
    return [
        f"{slug}'s tests took {seconds:.1f} s of processor time; at most {LIMIT_S:g}"
        for slug, seconds in sorted(spent.items())
        if seconds > LIMIT_S * MARGIN
    ]


class ProcessorTime:
    """A plugin of pytest that measures tests, sums them by system, and names those that take too much.

    A run with ``--processor-time`` fails then; any other only says so, since a busy machine must not decide whether tests pass.

    Args:
        table: whether to say what each file's and each system's tests took.
        judges: whether this is the process that sums, and of a run of all tests: in a run of one system's alone what libraries
            take to import is among its tests' time.
    """

    def __init__(self, *, table: bool, judges: bool) -> None:
        self.table, self.judges = table, judges
        self.slugs = claims.slugs()
        self.systems: Counter[str] = Counter()
        self.files: Counter[str] = Counter()
        self._since = used()

    def pytest_runtest_logstart(self) -> None:
        self._since = used()

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self) -> Iterator[Any]:
        report = yield
        now = used()
        report.user_properties.append((_PROPERTY, now - self._since))
        self._since = now
        return report

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        seconds = sum(value for name, value in report.user_properties if name == _PROPERTY)
        self.files[report.nodeid.partition("::")[0]] += seconds
        if slug := system_of(report.nodeid, self.slugs):
            self.systems[slug] += seconds

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if self.table and self.judges and session.exitstatus == 0 and over(self.systems):
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        if self.table:
            terminalreporter.section("processor time")
            for name, seconds in [*self.files.most_common(), *self.systems.most_common()]:
                terminalreporter.write_line(f"{seconds:7.1f} s  {name}")
            terminalreporter.write_line(f"{sum(self.files.values()):7.1f} s  in all, without collection")
        for line in over(self.systems) if self.judges else ():
            terminalreporter.write_line(line, red=True)
