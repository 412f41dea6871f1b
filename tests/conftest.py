"""What tests of several folders share."""

import gc
import multiprocessing
import os
import shutil
from collections.abc import Callable, Iterator
from importlib import import_module
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from polyak.lab import spawning, workers
from polyak.lab.inprocess import InProcess
from polyak.lab.jobs import Job

from .processor_time_for_tests import ProcessorTime

# Triton's kernels run in its interpreter where there is no GPU; it reads this variable when it is first imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--processor-time",
        action="store_true",
        help="say what each file's and each system's tests took of it, and fail where a system's took too much",
    )


def pytest_configure(config: pytest.Config) -> None:
    of_all = config.args_source == pytest.Config.ArgsSource.TESTPATHS and not (
        config.option.keyword or config.option.markexpr
    )
    judges = of_all and not hasattr(config, "workerinput")
    config.pluginmanager.register(ProcessorTime(table=config.getoption("--processor-time"), judges=judges))


# By what :func:`forks` makes processes from, once.
IMPORTED = (
    "torch.distributed",
    "torch._dynamo",
    "accelerate",
    "polyak.optim.monna",
    "polyak.generate",
    "polyak.lab.compare.examine",
)


class _Here(InProcess):
    """A trial collects garbage before it is timed, which takes long where as much has been imported as here."""

    def start(self, ticket: int, job: Job) -> bool:
        gc.freeze()
        return super().start(ticket, job)


@pytest.fixture(scope="module")
def in_process() -> Iterator[None]:
    """The lab's trials and examinations run in this process, which takes a tenth of the time that starting others does."""
    with pytest.MonkeyPatch.context() as patch:
        _patch(patch, lambda jobs: _Here(), InProcess().call)
        yield
        gc.unfreeze()


@pytest.fixture
def processes(in_process: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """They run in processes of their own, as for users."""
    _patch(monkeypatch, workers.Processes, workers.call_apart)


@pytest.fixture(scope="session")
def forks() -> Any:
    """Makes processes from one that has imported libraries already, which takes each that is started afresh seconds."""
    made = multiprocessing.get_context("forkserver")
    made.set_forkserver_preload([*IMPORTED])
    return made


@pytest.fixture
def forked(forks: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The lab's processes are such."""
    monkeypatch.setattr(spawning, "multiprocessing", SimpleNamespace(get_context=lambda _: forks))


def _patch(patch: pytest.MonkeyPatch, executor: object, call: object) -> None:
    # By their modules: the package has functions of these names.
    patch.setattr(import_module("polyak.lab.run"), "Processes", executor)
    patch.setattr(import_module("polyak.lab.compare.main"), "call_apart", call)


@pytest.fixture(scope="module")
def chromium():
    """A headless browser, from Debian's package or another."""
    program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if program is None:
        pytest.skip("no Chromium")
    sync_api = pytest.importorskip("playwright.sync_api")
    quiet = ["disable-gpu", "disable-background-networking", "disable-component-update", "disable-sync", "no-first-run"]
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox", *(f"--{q}" for q in quiet)])

        def patient(make: Callable[..., Any]) -> Callable[..., Any]:
            def made(**options: Any) -> Any:
                one = make(**options)
                one.set_default_timeout(0)
                return one

            return made

        # What hangs is ended by pytest's own limit.
        browser.new_page, browser.new_context = patient(browser.new_page), patient(browser.new_context)
        yield browser
        browser.close()
