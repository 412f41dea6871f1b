"""Where trials run: a few processes of this machine, behind an interface that other places can have, too.

An :class:`Executor` takes jobs and tells what comes of them. It knows nothing of stores, plans or statistics. A job is a trial
function and what it is given, all of it picklable; what comes back are :class:`Heard` measurements, where the job asks for
that, and one :class:`Ended`.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import random
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib import import_module
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from numbers import Real
from typing import Any, Literal, Protocol

from polyak.core import checks
from polyak.lab.claim import Diverged, Measurement, Trial, TrialFunction

STOPPED = "stopped early"  # how the message of a trial begins that was told to stop
THREADS = (
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "VECLIB_MAXIMUM_THREADS",
    "NUMEXPR_NUM_THREADS",
)
HASHES = "PYTHONHASHSEED"  # by which strings are hashed, which Python reads at its start; else at random


@dataclass(frozen=True, kw_only=True)
class Job:
    """What a worker needs to know of a trial.

    ``stream``: "" collects measurements until the end; "tell" sends each on its way, too; "ask" also waits after each to hear
    whether to go on. ``processes``: how many the trial is (:mod:`polyak.lab.group`).
    """

    function: TrialFunction
    trial: Trial
    worst: Mapping[str, float]  # every metric's worst value
    needed: frozenset[str]  # metrics that the final measurement must hold
    libraries: tuple[str, ...]
    stream: Literal["", "tell", "ask"] = ""
    processes: int = 1


@dataclass(frozen=True)
class Outcome:
    """What a trial yielded."""

    values: Mapping[str, float]
    curve: tuple[tuple[Mapping[str, float], Mapping[str, float]], ...]
    seconds: float
    diverged: bool = False
    message: str = ""


@dataclass(frozen=True)
class Trouble:
    """Why a trial gave no outcome: the traceback's text."""

    trace: str


@dataclass(frozen=True)
class Died:
    """A worker's end in the middle of a trial, in words, and how often a trial is begun at most that ends so.

    A worker that died may have been the victim of others' use of memory: its trial gets a second chance, and no third.
    """

    how: str
    chances: int = 2


@dataclass(frozen=True)
class Began:
    """A job that had to wait for a place has begun."""

    ticket: int


@dataclass(frozen=True)
class Heard:
    """A measurement on the way."""

    ticket: int
    at: Mapping[str, float]
    values: Mapping[str, float]


@dataclass(frozen=True)
class Ended:
    """A job's end, and the machine that it ran on where that is another than the caller's."""

    ticket: int
    answer: Outcome | Trouble | Died
    machine: Mapping[str, str] | None = None


class Executor(Protocol):
    """Where jobs run. A ticket is the caller's number for a job."""

    @property
    def slots(self) -> int:
        """How many jobs may run at once."""
        ...

    def open(self) -> None:
        """Make ready for jobs; may be called again."""
        ...

    def apart(self) -> None:
        """From now on have no two jobs share a machine, so that none slows another down."""
        ...

    def call(self, function: Callable[..., Any], *arguments: Any, timeout: float) -> Any:
        """``function(*arguments)`` where jobs run; errors are those of :func:`call_apart`."""
        ...

    def start(self, ticket: int, job: Job) -> bool:
        """Begin a job; at most ``slots`` are in flight. Whether it has begun: if not, :class:`Began` tells when."""
        ...

    def events(self, timeout: float) -> list[Began | Heard | Ended]:
        """What has happened, as soon as anything has, or nothing after ``timeout`` seconds."""
        ...

    def answer(self, ticket: int, go_on: bool) -> None:
        """Answer a job that asked whether to go on."""
        ...

    def stop(self, ticket: int) -> None:
        """End a job at once, wherever it is; nothing more is heard of it."""
        ...

    def close(self) -> None:
        """End all that runs."""
        ...


# -- this machine's processes ----------------------------------------------------------------------------------------------


@dataclass(eq=False)
class Worker:
    """A process, the pipe to it, and what it is at."""

    process: BaseProcess
    connection: Connection
    ticket: int | None = None


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


Tell = Callable[[Mapping[str, float], Mapping[str, float]], None]  # at, values
Ask = Callable[[Mapping[str, float], Mapping[str, float]], bool]


def carry_out_anyhow(job: Job, tell: Tell, ask: Ask) -> Outcome | Trouble | Died:
    """Run a trial, in this process or in several."""
    if job.processes == 1:
        return carry_out(job, tell, ask)
    from polyak.lab import group

    return group.carry_out(job, tell, ask)


def carry_out(job: Job, tell: Tell, ask: Ask) -> Outcome:
    """Run a trial. Measurements on the way go to ``tell`` or ``ask`` if the job says so.

    Raises:
        TypeError, ValueError: the trial breaks the rules of measurements; whatever the trial function raises.
    """
    settle(job.libraries, job.trial.seed)
    curve: list[tuple[Mapping[str, float], Mapping[str, float]]] = []
    final: Mapping[str, float] | None = None
    began = time.perf_counter()
    message = ""
    try:
        for measurement in job.function(job.trial):
            values, at = _checked(measurement, job.worst)
            if final is not None:
                raise ValueError(
                    "a trial's final measurement (one without coordinates) must be its last, and the only one"
                )
            if at is None:
                final = values
                continue
            curve.append((at, values))
            if job.stream == "tell":
                tell(at, values)
            elif job.stream == "ask" and not ask(at, values):
                final, message = values, STOPPED
                break
    except Diverged as error:
        return Outcome(job.worst, tuple(curve), time.perf_counter() - began, True, str(error) or "diverged")
    seconds = time.perf_counter() - began
    if final is None:
        raise ValueError("a trial must end with a final measurement (one without coordinates), got none")
    if missing := sorted(job.needed - final.keys()):
        raise ValueError(
            f"the final measurement must hold {missing}, which criteria or tuning use; it has {sorted(final)}"
        )
    if infinite := {name: value for name, value in final.items() if not abs(value) < float("inf")}:
        message = "final " + ", ".join(f"{name} = {value}" for name, value in infinite.items())
        return Outcome(job.worst, tuple(curve), seconds, True, message)
    return Outcome(final, tuple(curve), seconds, message=message)


def settle(libraries: Sequence[str], seed: int) -> None:
    """Make every trial start alike, whatever this worker did before: libraries loaded, one thread, generators seeded.

    A trial makes its own generators; the global ones are seeded so that a use by oversight depends on the seed alone.
    """
    for name in libraries:
        import_module(name)
    random.seed(seed)
    if numpy := sys.modules.get("numpy"):
        numpy.random.seed(seed)
    if torch := sys.modules.get("torch"):
        torch.set_num_threads(1)
        torch.manual_seed(seed)


def _checked(measurement: object, metrics: Mapping[str, float]) -> tuple[dict[str, float], dict[str, float] | None]:
    """A measurement's values and coordinates as plain floats."""
    if not isinstance(measurement, Measurement):
        raise TypeError(f"a trial must yield measurements (polyak.lab.claim.measure), got {measurement!r}")
    for name in measurement.values:
        checks.one_of("a measurement's metric", name, metrics)
    values = {name: _number(name, value) for name, value in measurement.values.items()}
    if measurement.at is None:
        return values, None
    return values, {name: _number(name, value) for name, value in measurement.at.items()}


def _number(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"measured {name} must be a number (a tensor's is had by .item()), got {value!r}")
    return float(value)
