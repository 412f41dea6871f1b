"""Carrying trials out: a few worker processes, one store, and a plan for each claim.

Every trial runs in a worker process that lives for the whole run, on one thread. The process that was called hands out trials,
takes in results and stores them; it alone writes. A worker that dies takes one trial with it, which is tried once more. Where
another process has a trial of ours in flight, we go on with the others and come back to it.
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
from dataclasses import dataclass, field
from importlib import import_module
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from numbers import Real

from polyak.core import checks
from polyak.lab import versions as facts
from polyak.lab.claim import Claim, Diverged, Measurement, Trial, TrialFunction
from polyak.lab.result import ClaimResult, TrialResult
from polyak.lab.store import Planned, Store, Stored, StoreError
from polyak.lab.tuning import Plan

# How often signals and the trials of other processes are looked after.
_TICK_S = 0.2
# A worker that died may have been the victim of others' use of memory: its trial gets a second chance, and no third.
_ATTEMPTS = 2
_THREADS = (
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "VECLIB_MAXIMUM_THREADS",
    "NUMEXPR_NUM_THREADS",
)


@dataclass(frozen=True, kw_only=True)
class Progress:
    """How far one claim's run has come."""

    claim: str  # its slug
    done: int  # trials that have a result, the cached ones among them
    total: int
    cached: int  # trials whose result was stored before this run
    running: tuple[str, ...]  # labels of this claim's trials in flight here
    elapsed: float  # seconds since the run began
    eta_seconds: float | None  # until all claims of the run are done; None while too little is known


class TrialError(RuntimeError):
    """A trial could not be run: its code raised, broke the rules of measurements, or its process died twice.

    Attributes:
        trial: what was to run.
        trace: the traceback's text, or what happened to the process.
    """

    def __init__(self, trial: Planned, trace: str, others: int = 0) -> None:
        self.trial, self.trace = trial, trace
        more = f" ({others} further claims have such an error, too)" if others else ""
        super().__init__(f"{trial.claim}: could not run {trial.label}{more}\n{trace.rstrip()}")


def run(
    claim: Claim,
    *,
    scale: str = "small",
    seeds: int | None = None,
    device: str = "cpu",
    jobs: int | None = None,
    store: Store,
    on_progress: Callable[[Progress], None] | None = None,
) -> ClaimResult:
    """Run a claim's trials, those that are not stored yet, and judge it. See :func:`run_many`."""
    results = run_many(
        [claim], scale=scale, seeds=seeds, device=device, jobs=jobs, store=store, on_progress=on_progress
    )
    return results[claim.slug]


def run_many(
    claims: Sequence[Claim],
    *,
    scale: str = "small",
    seeds: int | None = None,
    device: str = "cpu",
    jobs: int | None = None,
    store: Store,
    on_progress: Callable[[Progress], None] | None = None,
) -> dict[str, ClaimResult]:
    """Run several claims through one set of worker processes, so that none idles before all is done.

    Args:
        claims: what to run; their slugs differ.
        scale: the name of a scale that every claim has.
        seeds: how many seeds are reported, at least 1. Default: as many as each claim's scale declares.
        device: "cpu", "cuda" or "cuda:N".
        jobs: worker processes. Default: as many as there are cores to use; on an accelerator one, since trials that share it
            slow each other down.
        store: where results are taken from and go to.
        on_progress: called with a claim's progress as its trials begin and end.

    Returns:
        Slug -> result, in the order of ``claims``.

    Raises:
        TrialError: a trial could not be run. No more of its claim's trials are begun; those in flight end and are stored, and
            the other claims are run to their end before it is raised.
        KeyboardInterrupt: on SIGINT or SIGTERM. The workers are stopped; what has ended is stored, and a later run goes on
            from there.
        StoreError: the store cannot be read or written.
    """
    jobs = checks.integer("jobs", (facts.cores() if device == "cpu" else 1) if jobs is None else jobs, least=1)
    kind = facts.device_kind(device)
    plans: dict[str, Plan] = {}
    for claim in claims:
        if claim.slug in plans:
            raise ValueError(f"claims must have slugs of their own, got {claim.slug!r} twice")
        _check_importable(claim)
        plans[claim.slug] = Plan(claim, scale=scale, seeds=seeds, device=kind, versions=_versions(claim))
    _Run(plans, device=device, jobs=jobs, store=store, on_progress=on_progress).carry_out()
    return {slug: plan.result() for slug, plan in plans.items()}


def collect(
    claim: Claim, *, scale: str = "small", seeds: int | None = None, device: str = "cpu", store: Store
) -> ClaimResult | None:
    """The result from what is stored for the present code and versions, without running anything; None where it is incomplete.

    ``seeds`` asks for that many. By default all seeds count that are complete, if they are as many as the scale declares.
    """
    settings = {"scale": scale, "device": facts.device_kind(device), "versions": _versions(claim)}
    plan = Plan(claim, seeds=seeds, **settings)
    plan.load(store)
    if not plan.complete:
        return None
    while seeds is None:
        longer = Plan(claim, seeds=len(plan.seeds) + 1, **settings)
        longer.load(store)
        if not longer.complete:
            break
        plan = longer
    return plan.result()


def _versions(claim: Claim) -> dict[str, str]:
    return {**facts.versions(), "fingerprint": facts.fingerprint(claim)}


def _check_importable(claim: Claim) -> None:
    try:
        pickle.dumps(claim.trial)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise ValueError(
            f"claim {claim.slug!r}: trial must be a function at the top level of a module, so that worker processes find it, "
            f"got {claim.trial!r}"
        ) from error


# -- in a worker process ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _Job:
    """What a worker needs to know of a trial."""

    function: TrialFunction
    trial: Trial
    worst: Mapping[str, float]  # every metric's worst value
    needed: frozenset[str]  # metrics that the final measurement must hold
    libraries: tuple[str, ...]


@dataclass(frozen=True)
class _Outcome:
    values: Mapping[str, float]
    curve: tuple[tuple[Mapping[str, float], Mapping[str, float]], ...]
    seconds: float
    diverged: bool = False
    message: str = ""


@dataclass(frozen=True)
class _Trouble:
    """Why a trial gave no outcome: the traceback's text."""

    trace: str


def _work(connection: Connection) -> None:
    """A worker's life: take a job, send its outcome, until nobody asks any more."""
    # Before numpy or torch are imported, which read these once.
    os.environ.update(dict.fromkeys(_THREADS, "1"))
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    while True:
        try:
            packed = connection.recv_bytes()
        except EOFError:
            return
        try:
            answer = _carry_out(pickle.loads(packed))
        except (Exception, SystemExit):
            answer = _Trouble(traceback.format_exc())
        connection.send(answer)


def _end_with(parent: BaseProcess) -> None:
    """End at once when the parent is gone, in the middle of a trial too: nobody would take its result."""
    wait([parent.sentinel])
    os._exit(1)


def _carry_out(job: _Job) -> _Outcome:
    _settle(job.libraries, job.trial.seed)
    curve: list[tuple[Mapping[str, float], Mapping[str, float]]] = []
    final: Mapping[str, float] | None = None
    began = time.perf_counter()
    try:
        for measurement in job.function(job.trial):
            values, at = _checked(measurement, job.worst)
            if final is not None:
                raise ValueError(
                    "a trial's final measurement (one without coordinates) must be its last, and the only one"
                )
            if at is None:
                final = values
            else:
                curve.append((at, values))
    except Diverged as error:
        return _Outcome(job.worst, tuple(curve), time.perf_counter() - began, True, str(error) or "diverged")
    seconds = time.perf_counter() - began
    if final is None:
        raise ValueError("a trial must end with a final measurement (one without coordinates), got none")
    if missing := sorted(job.needed - final.keys()):
        raise ValueError(
            f"the final measurement must hold {missing}, which criteria or tuning use; it has {sorted(final)}"
        )
    if infinite := {name: value for name, value in final.items() if not abs(value) < float("inf")}:
        message = "final " + ", ".join(f"{name} = {value}" for name, value in infinite.items())
        return _Outcome(job.worst, tuple(curve), seconds, True, message)
    return _Outcome(final, tuple(curve), seconds)


def _settle(libraries: Sequence[str], seed: int) -> None:
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


# -- in the process that was called ----------------------------------------------------------------------------------------


@dataclass(eq=False)
class _Task:
    """A trial on its way through a run."""

    plan: Plan
    trial: Planned
    attempts: int = 0


@dataclass(eq=False)
class _Worker:
    process: BaseProcess
    connection: Connection
    task: _Task | None = None
    since: float = 0.0


@dataclass(eq=False)
class _Run:
    """One call of :func:`run_many`."""

    plans: Mapping[str, Plan]
    device: str
    jobs: int
    store: Store
    on_progress: Callable[[Progress], None] | None
    queue: list[_Task] = field(default_factory=list)
    workers: list[_Worker] = field(default_factory=list)
    expected: dict[tuple[str, str, str], float] = field(default_factory=dict)  # seconds, by claim, task, arm
    cached: dict[str, int] = field(default_factory=dict)
    errors: dict[str, TrialError] = field(default_factory=dict)
    libraries: dict[str, tuple[str, ...]] = field(default_factory=dict)
    machine: Mapping[str, str] = field(init=False)
    began: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        self.machine = facts.machine(self.device)

    def carry_out(self) -> None:
        for slug, plan in self.plans.items():
            self._enqueue(plan, plan.load(self.store))
            self.cached[slug] = len(plan.found)
            self.libraries[slug] = facts.libraries(plan.claim)
            durations = self.store.durations(slug, plan.scale, plan.device)
            self.expected.update({(slug, task, arm): seconds for (task, arm), seconds in durations.items()})
        self._sort()
        for slug in self.plans:
            self._report(slug)
        with _stop_signals() as stop:
            try:
                while not stop and self._hand_out():
                    for connection in wait([w.connection for w in self.workers if w.task], timeout=_TICK_S):
                        self._take_in(next(w for w in self.workers if w.connection is connection))
                if stop:
                    for worker in self.workers:
                        if worker.task and worker.connection.poll():
                            self._take_in(worker)
                    raise KeyboardInterrupt
            finally:
                self._end()
        if self.errors:
            error = next(iter(self.errors.values()))
            raise TrialError(error.trial, error.trace, len(self.errors) - 1) if len(self.errors) > 1 else error

    def _hand_out(self) -> bool:
        """Give idle workers something to do. Whether there is anything left to wait for."""
        busy = [w for w in self.workers if w.task]
        for task in list(self.queue):
            if len(busy) == self.jobs:
                break
            state = self.store.claim_trial(task.trial)
            if state == "elsewhere":
                continue
            self.queue.remove(task)
            if state == "done":
                self._found(task, self.store.results([task.trial])[task.trial.digest])
            else:
                busy.append(self._start(task))
        if not busy and self.queue:
            time.sleep(_TICK_S)  # all that is left is in flight in other processes
        return bool(busy or self.queue)

    def _start(self, task: _Task) -> _Worker:
        worker = next((w for w in self.workers if not w.task), None) or self._hire()
        worker.task, worker.since = task, time.monotonic()
        task.attempts += 1
        claim, trial = task.plan.claim, task.trial
        job = _Job(
            function=claim.trial,
            trial=Trial(
                claim=claim.slug,
                scale=trial.scale,
                task=trial.task,
                arm=trial.arm,
                seed=trial.seed,
                device=self.device,
                options=trial.options,
            ),
            worst={metric.name: metric.worst_value for metric in claim.metrics},
            needed=_needed(claim, trial),
            libraries=self.libraries[claim.slug],
        )
        with suppress(OSError):  # a worker that has died meanwhile is found dead when its answer is waited for
            worker.connection.send_bytes(pickle.dumps(job))
        self._report(claim.slug)
        return worker

    def _hire(self) -> _Worker:
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        process = context.Process(target=_work, args=(theirs,), daemon=True)
        with _sigint_blocked():
            process.start()
        theirs.close()
        worker = _Worker(process, ours)
        self.workers.append(worker)
        return worker

    def _take_in(self, worker: _Worker) -> None:
        """A worker's answer, or its end."""
        task, worker.task = worker.task, None
        assert task is not None
        trial = task.trial
        try:
            answer = worker.connection.recv()
        except (EOFError, OSError):
            self._bury(worker, task)
            return
        if isinstance(answer, _Trouble):
            self._fail(task, answer.trace)
            return
        result = TrialResult(
            task=trial.task,
            arm=trial.arm,
            seed=trial.seed,
            purpose=trial.purpose,
            point=trial.point,
            values=answer.values,
            curve=answer.curve,
            seconds=answer.seconds,
            diverged=answer.diverged,
            message=answer.message,
        )
        self.store.finish(trial, result, self.machine)
        self.expected[trial.claim, trial.task, trial.arm] = answer.seconds
        # From the store, so that a result is the same whether it was just made or stored long ago.
        self._found(task, self.store.results([trial])[trial.digest])

    def _found(self, task: _Task, stored: Stored) -> None:
        self._enqueue(task.plan, task.plan.add(task.trial, stored))
        self._sort()
        self._report(task.trial.claim)

    def _bury(self, worker: _Worker, task: _Task) -> None:
        worker.process.join(5)
        self.workers.remove(worker)
        if task.attempts < _ATTEMPTS:
            self.queue.insert(0, task)
            return
        code = worker.process.exitcode or 0
        how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"
        hint = "; the system kills processes where memory runs out" if code == -getattr(signal, "SIGKILL", 9) else ""
        self._fail(task, f"its process died {task.attempts} times, the last time with {how}{hint}")

    def _fail(self, task: _Task, trace: str) -> None:
        slug = task.trial.claim
        self.store.fail(task.trial, trace)
        self.errors.setdefault(slug, TrialError(task.trial, trace))
        self.queue = [other for other in self.queue if other.trial.claim != slug]
        self._report(slug)

    def _enqueue(self, plan: Plan, trials: Sequence[Planned]) -> None:
        if plan.claim.slug not in self.errors:
            self.queue += [_Task(plan, trial) for trial in trials]

    def _sort(self) -> None:
        """Tuning first, since other trials wait for it; then the longest, so that none is left over at the end.

        Where it is unknown how long a trial takes it comes before those that are known, in the order given.
        """
        self.queue.sort(key=lambda task: (task.trial.purpose != "tuning", -self._expect(task.trial, float("inf"))))

    def _expect(self, trial: Planned, otherwise: float) -> float:
        return self.expected.get((trial.claim, trial.task, trial.arm), otherwise)

    def _report(self, slug: str) -> None:
        if self.on_progress is not None:
            plan = self.plans[slug]
            running = tuple(w.task.trial.label for w in self.workers if w.task and w.task.trial.claim == slug)
            self.on_progress(
                Progress(
                    claim=slug,
                    done=len(plan.found),
                    total=plan.total,
                    cached=self.cached[slug],
                    running=running,
                    elapsed=time.monotonic() - self.began,
                    eta_seconds=self._eta(),
                )
            )

    def _eta(self) -> float | None:
        """The expected time of all trials to come, shared out among the workers."""
        left = sum(plan.total - len(plan.found) for slug, plan in self.plans.items() if slug not in self.errors)
        if not left:
            return 0.0
        if not self.expected:
            return None
        typical = sum(self.expected.values()) / len(self.expected)
        now = time.monotonic()
        running = [w for w in self.workers if w.task]
        rest = [max(0.0, self._expect(w.task.trial, typical) - (now - w.since)) for w in running if w.task]
        queued = [self._expect(task.trial, typical) for task in self.queue]
        unnamed = max(0, left - len(running) - len(queued)) * typical
        total = sum(rest) + sum(queued) + unnamed
        return max(total / min(self.jobs, left), max(rest, default=0.0))

    def _end(self) -> None:
        """Stop the workers, which hold nothing that is worth an orderly end, and give up what is in flight."""
        for worker in self.workers:
            worker.process.kill()
        for worker in self.workers:
            worker.process.join(5)
            worker.connection.close()
            if worker.task:
                # Where the store cannot be written any more, the marks end with this process.
                with suppress(StoreError):
                    self.store.release(worker.task.trial)


def _needed(claim: Claim, trial: Planned) -> frozenset[str]:
    """The metrics that the claim's criteria and tuning ask of a trial."""
    needed: set[str] = set()
    for c in claim.criteria:
        if c.task == trial.task:
            if trial.arm in (c.arm, c.control):
                needed.add(c.metric)
            if trial.arm in c.rivals:
                needed.add(c.against_metric or c.metric)
    if trial.purpose == "tuning":
        return frozenset([claim.task(trial.task).tune])
    return frozenset(needed)


@contextmanager
def _stop_signals() -> Iterator[list[int]]:
    """SIGINT and SIGTERM are noted instead of raised, so that they interrupt no transaction; only the main thread gets them."""
    noted: list[int] = []
    before = {}
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            handler = signal.getsignal(number)
            # A signal that is ignored (a shell's background job) stays so; a handler unknown to Python could not be restored.
            if handler not in (signal.SIG_IGN, None):
                before[number] = signal.signal(number, lambda signum, _frame: noted.append(signum))
    try:
        yield noted
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


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
