"""The interface between the lab and whatever runs trials: jobs, what is heard of them, and the function that runs one.

A :class:`Job` is a trial function and what it is given, all of it picklable; what comes back are :class:`Heard` measurements, where
the job asks for that, and one :class:`Ended`. An :class:`Executor` knows nothing of stores, plans or statistics.
"""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from numbers import Real
from typing import Any, Literal, Protocol

from polyak.core import checks
from polyak.lab.claim import Diverged, Measurement, Trial, TrialFunction

STOPPED = "stopped early"  # how the message of a trial begins that was told to stop
Tell = Callable[[Mapping[str, float], Mapping[str, float]], None]  # at, values
Ask = Callable[[Mapping[str, float], Mapping[str, float]], bool]


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


def carry_out(job: Job, tell: Tell, ask: Ask) -> Outcome:
    """Run a trial. Measurements on the way go to ``tell`` or ``ask`` if the job says so.

    Raises:
        TypeError, ValueError: the trial breaks the rules of measurements; whatever the trial function raises.
    """
    way, go_on = on_the_way(job), None
    while True:
        try:
            at, values = way.send(go_on)
        except StopIteration as ended:
            return ended.value
        if job.stream == "tell":
            tell(at, values)
        elif job.stream == "ask":
            go_on = ask(at, values)


def on_the_way(job: Job) -> Generator[tuple[Mapping[str, float], Mapping[str, float]], bool | None, Outcome]:
    """A trial's measurements on the way, as they are made; the trial stops early where False is sent back. Returns its outcome."""
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
            if (yield at, values) is False:
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
