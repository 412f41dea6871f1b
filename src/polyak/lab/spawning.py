"""Starting worker processes: fresh ones, with one thread and settled hashes, that end with the process that started them."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess

THREADS = (
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "VECLIB_MAXIMUM_THREADS",
    "NUMEXPR_NUM_THREADS",
)
HASHES = "PYTHONHASHSEED"  # by which strings are hashed, which Python reads at its start; else at random


@dataclass(eq=False)
class Worker:
    """A process, the pipe to it, and what it is at."""

    process: BaseProcess
    connection: Connection
    ticket: int | None = None


def begin_process(target: Callable[[Connection], None]) -> tuple[BaseProcess, Connection]:
    """A process that runs ``target`` with one end of a pipe; the other end."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    # No daemon, since these may start no processes; :func:`begin` has it end with this process all the same.
    process = context.Process(target=target, args=(theirs,))
    with _sigint_blocked(), _sets_in_one_order():
        process.start()
    theirs.close()
    return process, ours


def end(workers: Sequence[Worker]) -> None:
    """Kill processes, and wait until they are gone."""
    for worker in workers:
        worker.process.kill()
    for worker in workers:
        worker.process.join(5)
        worker.connection.close()


def end_of(process: BaseProcess) -> str:
    """How a process ended, in words."""
    process.join(5)
    code = process.exitcode or 0
    if code >= 0:
        return f"exit status {code}"
    hint = "; the system kills processes where memory runs out" if code == -getattr(signal, "SIGKILL", 9) else ""
    return f"signal {signal.Signals(-code).name}{hint}"


@contextmanager
def _sigint_blocked() -> Iterator[None]:
    """A process started here never sees a terminal's Ctrl-C: it is ours to end it."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def settled_hashes() -> dict[str, str]:
    """What has processes hash alike: what a task makes from a set (a vocabulary) is then the same in each, for every arm."""
    before = os.environ.get(HASHES, "")
    return {HASHES: before if before.isdigit() else "0"}


@contextmanager
def _sets_in_one_order() -> Iterator[None]:
    before = os.environ.get(HASHES)
    os.environ.update(settled_hashes())
    try:
        yield
    finally:
        if before is None:
            del os.environ[HASHES]
        else:
            os.environ[HASHES] = before


# -- in a process that was started ----------------------------------------------------------------------------------------


def begin() -> None:
    """What a process does first: numerical libraries get one thread, and it ends when its parent does."""
    # Before numpy or torch are imported, which read these once.
    os.environ.update(dict.fromkeys(THREADS, "1"))
    # What a trial prints must not get into what the command prints, which may be JSON.
    with suppress(OSError):
        os.dup2(2, 1)
    # A process that is spawned would spawn its own: a loader's workers would import torch at every epoch, and take no lambda.
    multiprocessing.set_start_method(multiprocessing.get_all_start_methods()[0], force=True)
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: BaseProcess) -> None:
    """End at once when the parent is gone, in the middle of a trial too: nobody would take its result."""
    wait([parent.sentinel])
    os._exit(1)
