"""Running claims: an executor that runs trials, a store that keeps them, and a plan for each claim.

Every trial runs in a worker (:mod:`polyak.lab.workers`). The process that was called hands out trials, takes in results and
stores them; it alone writes. A worker that dies takes one trial with it, which is tried once more. Where another process has a
trial of ours in flight, we go on with the others and come back to it.
"""

from __future__ import annotations

import itertools
import pickle
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cached_property

from polyak.core import checks
from polyak.lab import limits
from polyak.lab import versions as facts
from polyak.lab.claim import Claim, Trial
from polyak.lab.result import ClaimResult, TrialResult
from polyak.lab.store import Planned, Store, Stored, StoreError
from polyak.lab.trackers import TRACK, Mirror, Tracker
from polyak.lab.tuning import Plan
from polyak.lab.workers import Began, Died, Ended, Executor, Heard, Job, Processes, Trouble

# How often signals and the trials of other processes are looked after.
_TICK_S = 0.2
# A device's name is asked for where trials run, which may have to be set up first.
_PATIENCE_S = 300.0

Listener = Callable[[Planned, Mapping[str, float], Mapping[str, float]], None]  # trial, at, values


@checks.arguments(
    claim=checks.text, done=checks.Integer(0), total=checks.Integer(0), cached=checks.Integer(0), running=checks.Each(checks.text),
    elapsed=checks.measured, eta_seconds=checks.measured | None,
)  # fmt: skip
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


_CLAIM = checks.Instance(Claim, words="a Claim")
_STORED: dict[str, checks.Kind] = dict(
    scale=checks.text, seeds=checks.Integer(1, limits.MOST["seeds"]) | None, device=checks.text,
    processes=checks.Integer(1, limits.MOST["processes"]), store=checks.Instance(Store, words="a Store"),
)  # fmt: skip
_RUN: dict[str, checks.Kind] = dict(
    **_STORED, jobs=checks.Integer(1, limits.MOST["jobs"]) | None,
    on_progress=checks.Function("a function of the Progress", 1) | None,
    executor=checks.Like("an executor", "slots", "open", "start") | None, track=TRACK,
)  # fmt: skip


@checks.arguments(claim=_CLAIM, **_RUN)
def run(
    claim: Claim,
    *,
    scale: str = "small",
    seeds: int | None = None,
    device: str = "cpu",
    jobs: int | None = None,
    store: Store,
    on_progress: Callable[[Progress], None] | None = None,
    executor: Executor | None = None,
    processes: int = 1,
    track: str | Tracker | Sequence[str | Tracker] = (),
) -> ClaimResult:
    """Run a claim's trials, those that are not stored yet, and judge it. See :func:`run_many`."""
    results = run_many(
        [claim],
        scale=scale,
        seeds=seeds,
        device=device,
        jobs=jobs,
        store=store,
        on_progress=on_progress,
        executor=executor,
        processes=processes,
        track=track,
    )
    return results[claim.slug]


@checks.arguments(
    claims=checks.Each(_CLAIM, words="a sequence of claims"),
    on_result=checks.Function("a function of the result", 1) | None,
    **_RUN,
)
def run_many(
    claims: Sequence[Claim],
    *,
    scale: str = "small",
    seeds: int | None = None,
    device: str = "cpu",
    jobs: int | None = None,
    store: Store,
    on_progress: Callable[[Progress], None] | None = None,
    executor: Executor | None = None,
    processes: int = 1,
    track: str | Tracker | Sequence[str | Tracker] = (),
    on_result: Callable[[ClaimResult], None] | None = None,
) -> dict[str, ClaimResult]:
    """Run several claims through one set of worker processes, so that none idles before all is done.

    Args:
        claims: what to run, the first first; their slugs differ.
        scale: the name of a scale that every claim has.
        seeds: how many seeds are reported, at least 1. Default: as many as each claim's scale declares.
        device: "cpu", "cuda" or "cuda:N".
        jobs: trials at once on this machine. Default: as many as there are cores for; on an accelerator one, since trials that
            share it slow each other down.
        store: where results are taken from and go to.
        on_progress: called with a claim's progress as its trials begin and end.
        executor: where trials run, in place of ``jobs`` processes of this machine: a :class:`polyak.lab.cluster.Cluster`. It
            is closed at the end.
        processes: of each trial (:mod:`polyak.lab.group`).
        track: where measurements are mirrored to, e.g. "tensorboard" (:mod:`polyak.lab.trackers`).
        on_result: called with each claim's result as soon as all of its trials have ended.

    Returns:
        Slug -> result, in the order of ``claims``.

    Raises:
        TrialError: a trial could not be run. No more of its claim's trials are begun; those in flight end and are stored, and
            the other claims are run to their end before it is raised.
        KeyboardInterrupt: on SIGINT or SIGTERM. The workers are stopped; what has ended is stored, and a later run goes on
            from there.
        StoreError: the store cannot be read or written.
        ClusterError: the cluster cannot be used.
        TrackerError: a tracker cannot be used.
    """
    kind = device_kind(device, processes, executor)
    plans: dict[str, Plan] = {}
    for claim in claims:
        if claim.slug in plans:
            raise ValueError(f"claims must have slugs of their own, got {claim.slug!r} twice")
        _check_importable(claim)
        plans[claim.slug] = Plan(claim, scale=scale, seeds=seeds, device=kind, versions=_versions(claim))
    carry_out(
        plans.values(),
        device=device,
        jobs=jobs,
        store=store,
        on_progress=on_progress,
        executor=executor,
        processes=processes,
        track=track,
        on_complete=None if on_result is None else lambda plan: on_result(plan.result()),
    )
    return {slug: plan.result() for slug, plan in plans.items()}


def carry_out(
    plans: Iterable[Plan],
    *,
    device: str = "cpu",
    jobs: int | None = None,
    store: Store,
    on_progress: Callable[[Progress], None] | None = None,
    on_measurement: Listener | None = None,
    executor: Executor | None = None,
    processes: int = 1,
    track: str | Tracker | Sequence[str | Tracker] = (),
    on_complete: Callable[[Plan], None] | None = None,
) -> None:
    """Run what is missing of plans, until every plan is complete. Arguments and errors are those of :func:`run_many`.

    Args:
        on_measurement: hears every measurement on the way of every trial that runs here, as it is made, and once more the
            final one, with empty coordinates.
        on_complete: called with each plan as soon as all of its trials have ended.
    """
    default = max(1, facts.cores() // processes) if device == "cpu" else 1
    jobs = checks.integer("jobs", default if jobs is None else jobs, least=1)
    mirror = Mirror(track)
    if executor is None:
        executor = Processes(jobs)
    executor.open()
    _Run(
        {plan.claim.slug: plan for plan in plans},
        device=device,
        executor=executor,
        store=store,
        on_progress=on_progress,
        on_measurement=on_measurement,
        processes=processes,
        mirror=mirror,
        on_complete=on_complete,
    ).carry_out()


def device_kind(device: str, processes: int = 1, executor: Executor | None = None) -> str:
    """What results are stored under: the device's kind there where trials run, with the number of a trial's processes.

    Raises:
        ValueError: there is no such device, or not one for each process.
    """
    checks.integer("processes", processes, least=1)
    if (processes > 1 or executor is not None) and device not in ("cpu", "cuda"):
        raise ValueError(
            f"device must be 'cpu' or 'cuda' where trials have several processes or a cluster, got {device!r}"
        )
    if executor is None or device == "cpu":
        if device == "cuda" and processes > 1:
            facts.device_kind(f"cuda:{processes - 1}")
        return facts.times(processes, facts.device_kind(device))
    return facts.times(processes, executor.call(facts.device_kind, device, timeout=_PATIENCE_S))


@checks.arguments(claim=_CLAIM, **_STORED)
def collect(
    claim: Claim,
    *,
    scale: str = "small",
    seeds: int | None = None,
    device: str = "cpu",
    processes: int = 1,
    store: Store,
) -> ClaimResult | None:
    """The result from what is stored for the present code and versions, without running anything; None where it is incomplete.

    ``seeds`` asks for that many. By default all seeds count that are complete, if they are as many as the scale declares.
    """
    settings = {"scale": scale, "device": device_kind(device, processes), "versions": _versions(claim)}
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


# -- in the process that was called ----------------------------------------------------------------------------------------


@dataclass(eq=False)
class _Task:
    """A trial on its way through a run."""

    plan: Plan
    trial: Planned
    attempts: int = 0
    since: float | None = None  # when it began; None while it waits for a place


@dataclass(eq=False)
class _Run:
    """One call of :func:`carry_out`."""

    plans: Mapping[str, Plan]
    device: str
    executor: Executor
    store: Store
    on_progress: Callable[[Progress], None] | None
    on_measurement: Listener | None
    processes: int
    mirror: Mirror
    on_complete: Callable[[Plan], None] | None = None
    queue: list[_Task] = field(default_factory=list)
    flight: dict[int, _Task] = field(default_factory=dict)  # by ticket
    tickets: Iterator[int] = field(default_factory=itertools.count)
    expected: dict[tuple[str, str, str], float] = field(default_factory=dict)  # seconds, by claim, task, arm
    cached: dict[str, int] = field(default_factory=dict)
    errors: dict[str, TrialError] = field(default_factory=dict)
    libraries: dict[str, tuple[str, ...]] = field(default_factory=dict)
    began: float = field(default_factory=time.monotonic)

    @cached_property
    def machine(self) -> Mapping[str, str]:
        return facts.machine(self.device)

    def carry_out(self) -> None:
        with _stop_signals() as stop:
            try:
                self._prepare()
                while not stop and self._hand_out():
                    for event in self.executor.events(_TICK_S):
                        self._take_in(event)
                    self._stop_overdue()
                if stop:
                    for event in self.executor.events(0):
                        self._take_in(event)
                    raise KeyboardInterrupt
            finally:
                self._end()
        if self.errors:
            error = next(iter(self.errors.values()))
            raise TrialError(error.trial, error.trace, len(self.errors) - 1) if len(self.errors) > 1 else error

    def _prepare(self) -> None:
        for slug, plan in self.plans.items():
            self._enqueue(plan, plan.load(self.store))
            self.cached[slug] = len(plan.found)
            self.libraries[slug] = plan.libraries()
            durations = self.store.durations(slug, plan.scale, plan.device)
            self.expected.update({(slug, task, arm): seconds for (task, arm), seconds in durations.items()})
        self._sort()
        for slug, plan in self.plans.items():
            self._report(slug)
            self._tell(plan)

    def _hand_out(self) -> bool:
        """Fill the executor's slots. Whether there is anything left to wait for."""
        for task in list(self.queue):
            if len(self.flight) == self.executor.slots:
                break
            state = self.store.claim_trial(task.trial)
            if state == "elsewhere":
                continue
            self.queue.remove(task)
            if state == "done":
                self._found(task, self.store.results([task.trial])[task.trial.digest])
            else:
                self._start(task)
        if not self.flight and self.queue:
            time.sleep(_TICK_S)  # all that is left is in flight in other processes
        return bool(self.flight or self.queue)

    def _start(self, task: _Task) -> None:
        claim, trial = task.plan.claim, task.trial
        job = Job(
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
            needed=task.plan.needed(trial),
            libraries=self.libraries[claim.slug],
            stream="ask" if task.plan.asks(trial) else "tell" if self.on_measurement or self.mirror.wanted else "",
            processes=self.processes,
        )
        ticket = next(self.tickets)
        self.flight[ticket] = task
        task.attempts += 1
        task.since = time.monotonic() if self.executor.start(ticket, job) else None
        self.mirror.begin(trial)
        self._report(claim.slug)

    def _take_in(self, event: Began | Heard | Ended) -> None:
        if isinstance(event, Began):
            self.flight[event.ticket].since = time.monotonic()
            return
        if isinstance(event, Heard):
            task = self.flight[event.ticket]
            self.mirror.measured(task.trial, event.at, event.values)
            if self.on_measurement is not None:
                self.on_measurement(task.trial, event.at, event.values)
            if task.plan.asks(task.trial):
                self.executor.answer(event.ticket, task.plan.heard(task.trial, event.at, event.values))
            return
        task, answer = self.flight.pop(event.ticket), event.answer
        trial = task.trial
        if isinstance(answer, Died):
            self._bury(task, answer)
            return
        if isinstance(answer, Trouble):
            self._fail(task, answer.trace)
            return
        machine = event.machine or self.machine
        if (ran_on := facts.times(self.processes, facts.kind_of(machine))) != task.plan.device:
            self._fail(
                task, f"it ran on {ran_on}, and this run is of {task.plan.device}: a cluster's devices must be alike"
            )
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
        self.store.finish(trial, result, machine)
        self.expected[trial.claim, trial.task, trial.arm] = answer.seconds
        if self.on_measurement is not None:
            self.on_measurement(trial, {}, answer.values)
        self.mirror.end(trial, "diverged" if answer.diverged else "done", answer.values, answer.message)
        # From the store, so that a result is the same whether it was just made or stored long ago.
        self._found(task, self.store.results([trial])[trial.digest])

    def _found(self, task: _Task, stored: Stored) -> None:
        self._enqueue(task.plan, task.plan.add(task.trial, stored))
        self._sort()
        self._report(task.trial.claim)
        self._tell(task.plan)

    def _tell(self, plan: Plan) -> None:
        if plan.complete and self.on_complete is not None:
            self.on_complete(plan)

    def _bury(self, task: _Task, death: Died) -> None:
        if task.attempts < death.chances:
            self.mirror.end(task.trial, "killed", {}, f"its process died with {death.how}; it is begun anew")
            self.queue.insert(0, task)
            return
        self._fail(task, f"its process died {task.attempts} times, the last time with {death.how}")

    def _stop_overdue(self) -> None:
        """A trial that is not done at its deadline never will be: its process is ended."""
        now = time.monotonic()
        for ticket, task in list(self.flight.items()):
            limit = task.plan.deadline
            if limit is not None and task.since is not None and now - task.since > limit:
                self.executor.stop(ticket)
                del self.flight[ticket]
                self._fail(task, f"it did not end, and was stopped at its deadline after {limit:g} s")

    def _fail(self, task: _Task, trace: str) -> None:
        slug = task.trial.claim
        self.store.fail(task.trial, trace)
        self.mirror.end(task.trial, "failed", {}, trace)
        self.errors.setdefault(slug, TrialError(task.trial, trace))
        self.queue = [other for other in self.queue if other.trial.claim != slug]
        self._report(slug)

    def _enqueue(self, plan: Plan, trials: Sequence[Planned]) -> None:
        if plan.claim.slug not in self.errors:
            self.queue += [_Task(plan, trial) for trial in trials]

    def _sort(self) -> None:
        """Claim by claim; of each the tuning first, since other trials wait for it, then the longest, so that none is left over
        at the end.

        Where it is unknown how long a trial takes it comes before those that are known, in the order given. One at a time they go
        seed by seed, so that a machine which slows down does so for all arms alike.
        """

        order = {slug: i for i, slug in enumerate(self.plans)}

        def place(task: _Task) -> tuple[int, bool, float]:
            alone = self.executor.slots == 1
            tunes = task.trial.purpose == "tuning"
            return (
                order[task.trial.claim],
                not tunes,
                task.trial.seed if alone else -self._expect(task.trial, float("inf")),
            )

        self.queue.sort(key=place)

    def _expect(self, trial: Planned, otherwise: float) -> float:
        return self.expected.get((trial.claim, trial.task, trial.arm), otherwise)

    def _report(self, slug: str) -> None:
        if self.on_progress is not None:
            plan = self.plans[slug]
            running = tuple(task.trial.label for task in self.flight.values() if task.trial.claim == slug)
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
        running = list(self.flight.values())
        rest = [max(0.0, self._expect(task.trial, typical) - (now - (task.since or now))) for task in running]
        queued = [self._expect(task.trial, typical) for task in self.queue]
        unnamed = max(0, left - len(running) - len(queued)) * typical
        total = sum(rest) + sum(queued) + unnamed
        return max(total / min(self.executor.slots, left), max(rest, default=0.0))

    def _end(self) -> None:
        """End what runs, and give up what is in flight."""
        self.executor.close()
        for task in self.flight.values():
            self.mirror.end(task.trial, "killed", {}, "interrupted")
            # Where the store cannot be written any more, the marks end with this process.
            with suppress(StoreError):
                self.store.release(task.trial)
        self.mirror.close()


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
