"""Workers: the executor that runs trials in a few processes of this machine."""

from __future__ import annotations

import pickle
import traceback
from collections.abc import Callable, Mapping
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from typing import Any

from polyak.lab import group
from polyak.lab.jobs import (
    STOPPED,
    Ask,
    Began,
    Died,
    Ended,
    Executor,
    Heard,
    Job,
    Outcome,
    Tell,
    Trouble,
    carry_out,
    settle,
)
from polyak.lab.spawning import THREADS, Worker, begin, begin_process, end, end_of, settled_hashes

__all__ = [
    "STOPPED",
    "THREADS",
    "Began",
    "Died",
    "Ended",
    "Executor",
    "Heard",
    "Job",
    "Outcome",
    "Processes",
    "Trouble",
    "call_apart",
    "carry_out",
    "carry_out_anyhow",
    "settle",
    "settled_hashes",
]


class Processes:
    """An executor: worker processes that are started afresh as they are needed, live on, and run each trial on one thread."""

    def __init__(self, slots: int) -> None:
        self.slots = slots
        self._workers: list[Worker] = []

    def open(self) -> None:
        """Processes are started as they are needed."""

    def apart(self) -> None:
        self.slots = 1

    def call(self, function: Callable[..., Any], *arguments: Any, timeout: float) -> Any:
        return call_apart(function, *arguments, timeout=timeout)

    def start(self, ticket: int, job: Job) -> bool:
        worker = next((w for w in self._workers if w.ticket is None), None) or self._hire()
        worker.ticket = ticket
        with suppress(OSError):  # a worker that has died meanwhile is found dead when its answer is waited for
            worker.connection.send_bytes(pickle.dumps(job))
        return True

    def events(self, timeout: float) -> list[Began | Heard | Ended]:
        busy = {worker.connection: worker for worker in self._workers if worker.ticket is not None}
        return [self._hear(busy[ready]) for ready in wait(list(busy), timeout=timeout)]  # pyright: ignore[reportArgumentType]

    def answer(self, ticket: int, go_on: bool) -> None:
        with suppress(OSError):
            self._worker(ticket).connection.send_bytes(pickle.dumps(go_on))

    def stop(self, ticket: int) -> None:
        worker = self._worker(ticket)
        self._workers.remove(worker)
        end([worker])

    def close(self) -> None:
        """Stop the workers, which hold nothing that is worth an orderly end."""
        end(self._workers)
        self._workers = []

    def _worker(self, ticket: int) -> Worker:
        return next(worker for worker in self._workers if worker.ticket == ticket)

    def _hire(self) -> Worker:
        worker = Worker(*begin_process(_work))
        self._workers.append(worker)
        return worker

    def _hear(self, worker: Worker) -> Heard | Ended:
        ticket = worker.ticket
        assert ticket is not None
        try:
            said = worker.connection.recv()
        except (EOFError, OSError):
            self._workers.remove(worker)
            return Ended(ticket, Died(end_of(worker.process)))
        if isinstance(said, tuple):
            return Heard(ticket, *said)
        worker.ticket = None
        return Ended(ticket, said)


def call_apart(function: Callable[..., Any], *arguments: Any, timeout: float) -> Any:
    """``function(*arguments)`` in a process of its own, which is ended after ``timeout`` seconds.

    Raises:
        TimeoutError: it did not end.
        RuntimeError: the process died, or the function raised (the message is the traceback's text).
    """
    worker = Worker(*begin_process(_call))
    try:
        worker.connection.send_bytes(pickle.dumps((function, arguments)))
        if not worker.connection.poll(timeout):
            raise TimeoutError(f"not done after {timeout:g} s")
        answer = worker.connection.recv()
    except (EOFError, BrokenPipeError, ConnectionResetError):
        raise RuntimeError(f"its process died with {end_of(worker.process)}") from None
    finally:
        end([worker])
    if isinstance(answer, Trouble):
        raise RuntimeError(answer.trace)
    return answer[0]


# -- in a worker process ---------------------------------------------------------------------------------------------------


def _work(connection: Connection) -> None:
    """A worker's life: take a job, send its outcome, until nobody asks any more."""
    begin()

    def tell(at: Mapping[str, float], values: Mapping[str, float]) -> None:
        connection.send((at, values))

    def ask(at: Mapping[str, float], values: Mapping[str, float]) -> bool:
        connection.send((at, values))
        return pickle.loads(connection.recv_bytes())

    while True:
        try:
            packed = connection.recv_bytes()
        except EOFError:
            return
        try:
            answer = carry_out_anyhow(pickle.loads(packed), tell, ask)
        except (Exception, SystemExit):
            answer = Trouble(traceback.format_exc())
        connection.send(answer)


def _call(connection: Connection) -> None:
    """The life of a process that makes one call."""
    begin()
    try:
        function, arguments = pickle.loads(connection.recv_bytes())
        answer = (function(*arguments),)
    except (Exception, SystemExit):
        answer = Trouble(traceback.format_exc())
    connection.send(answer)


def carry_out_anyhow(job: Job, tell: Tell, ask: Ask) -> Outcome | Trouble | Died:
    """Run a trial, in this process or in several."""
    if job.processes == 1:
        return carry_out(job, tell, ask)
    return group.carry_out(job, tell, ask)
