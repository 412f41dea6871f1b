"""Trials in the calling process: the same numbers as in workers, and the same heed to whoever asks."""

from __future__ import annotations

import math
import os
import signal
from pathlib import Path
from typing import Any

import claims_for_tests as examples
import pytest

from polyak.lab import Store, TrialError, run, versions
from polyak.lab.claim import Trial
from polyak.lab.inprocess import InProcess
from polyak.lab.jobs import STOPPED, Ended, Heard, Job


def job(function: Any = examples.descend, stream: Any = "", **options: Any) -> Job:
    trial = Trial(
        claim="c", scale="s", task="parabola", arm="quick", seed=1, options={"lr": 0.1, "steps": 4, **options}
    )
    worst = dict.fromkeys(("loss", "global_draw"), math.inf)
    return Job(function=function, trial=trial, worst=worst, needed=frozenset(), libraries=(), stream=stream)


@pytest.mark.usefixtures("processes")
def test_the_same_numbers_as_in_workers(tmp_path: Path) -> None:
    found = []
    for name, executor in (("here", InProcess()), ("there", None)):
        with Store(tmp_path / name) as store:
            result = run(examples.make(), store=store, executor=executor)
        found.append([(t.arm, t.seed, t.point, t.values, t.curve, t.diverged, t.message) for t in result.trials])
    assert found[0] == found[1]


def test_measurements_are_told_one_by_one_where_they_are_asked_for() -> None:
    here = InProcess()
    assert here.start(7, job(stream="tell"))
    told = [event for _ in range(5) for event in here.events(60.0)]
    assert [type(event) for event in told] == [Heard] * 4 + [Ended]
    assert [event.ticket for event in told] == [7] * 5
    assert [event.at for event in told[:4]] == [{"step": float(step)} for step in range(4)]
    here.start(8, job())
    [ended] = here.events(60.0)
    assert (ended.ticket, ended.answer.values) == (8, told[-1].answer.values)
    assert here.events(60.0) == []


def test_a_trial_stops_where_it_is_told_to() -> None:
    here = InProcess()
    here.start(0, job(stream="ask"))
    for go_on in (True, False):
        [heard] = here.events(60.0)
        here.answer(0, go_on)
    [ended] = here.events(60.0)
    assert (ended.answer.message, ended.answer.values) == (STOPPED, heard.values)
    assert len(ended.answer.curve) == 2


def test_the_caller_has_its_turn_between_measurements() -> None:
    here = InProcess()
    here.start(0, job())
    assert [here.events(0.0) for _ in range(4)] == [[]] * 4
    here.stop(0)
    assert here.events(0.0) == []
    here.start(1, job())
    here.close()
    assert here.events(60.0) == []


def test_an_error_is_told_with_its_trace(tmp_path: Path) -> None:
    with Store(tmp_path) as store, pytest.raises(TrialError, match="RuntimeError: a bug in the trial"):
        run(examples.bad("raise"), store=store, executor=InProcess())
    with pytest.raises(RuntimeError, match="ZeroDivisionError"):
        InProcess().call(divmod, 1, 0, timeout=1.0)
    assert InProcess().call(divmod, 7, 2, timeout=1.0) == (3, 1)


def test_an_interrupt_is_heeded_between_measurements(tmp_path: Path) -> None:
    def interrupt(progress: Any) -> None:
        if progress.done == 3:
            os.kill(os.getpid(), signal.SIGINT)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    try:
        with Store(tmp_path) as store, pytest.raises(KeyboardInterrupt):
            run(examples.make(), store=store, executor=InProcess(), on_progress=interrupt)
    finally:
        signal.signal(signal.SIGINT, before)
    with Store(tmp_path) as store:
        [what] = store.runs()
    assert what.done == 3


def test_a_trial_of_several_processes_is_refused(tmp_path: Path) -> None:
    with (
        Store(tmp_path) as store,
        pytest.raises(ValueError, match="processes must be 1 where trials run in this process"),
    ):
        run(examples.make(), store=store, executor=InProcess(), processes=2)


class Elsewhere(InProcess):
    """Says that trials ran on a machine that differs from this one."""

    def __init__(self, **machine: str) -> None:
        super().__init__()
        self.machine = {**versions.machine("cpu"), **machine}

    def events(self, timeout: float) -> Any:
        return [
            Ended(event.ticket, event.answer, self.machine) if isinstance(event, Ended) else event
            for event in super().events(timeout)
        ]


def test_what_ran_on_another_device_is_not_stored_as_what_was_asked_for(tmp_path: Path) -> None:
    with Store(tmp_path) as store:
        with pytest.raises(
            TrialError, match="it ran on NVIDIA H200, and this run is of cpu: a cluster's devices must be alike"
        ):
            run(examples.slow(sleep=0.0), store=store, executor=Elsewhere(accelerator="NVIDIA H200"))
        [what] = store.runs()
        assert (what.done, what.failed) == (0, 1)
        result = run(examples.slow(sleep=0.0), store=store, executor=Elsewhere(node="another"))
    assert len(result.trials) == 12
