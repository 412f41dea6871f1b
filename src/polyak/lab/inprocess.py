"""Trials in the process that asks for them, one after another: to step through one with a debugger, and to test what is around."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Generator
from typing import Any

from polyak.lab.jobs import Began, Ended, Heard, Job, Trouble, on_the_way


class InProcess:
    """An executor that starts no process: ``run(claim, store=store, executor=InProcess())``.

    Trials are not kept apart as workers keep them: what one leaves behind (a module's state, a patched function) the next one
    finds, a trial that kills its process ends the run, and strings are hashed as in the calling process. So give it a store of
    its own. Ctrl-C and deadlines are heeded between a trial's measurements, and the calling process is set to one thread.
    """

    def __init__(self) -> None:
        self.slots = 1
        self._way: Generator[Any, bool | None, Any] | None = None  # of the trial in flight
        self._ticket, self._stream = 0, ""
        self._go_on: bool | None = None

    def open(self) -> None:
        """There is nothing to make ready."""

    def apart(self) -> None:
        """Trials never share the process."""

    def call(self, function: Callable[..., Any], *arguments: Any, timeout: float) -> Any:
        """``function(*arguments)``, which nothing ends: ``timeout`` has no effect here."""
        try:
            return function(*arguments)
        except (Exception, SystemExit):
            raise RuntimeError(traceback.format_exc()) from None

    def start(self, ticket: int, job: Job) -> bool:
        """
        Raises:
            ValueError: a trial of several processes.
        """
        if job.processes > 1:
            raise ValueError(f"processes must be 1 where trials run in this process, got {job.processes}")
        self._way, self._ticket, self._stream, self._go_on = on_the_way(job), ticket, job.stream, None
        return True

    def events(self, timeout: float) -> list[Began | Heard | Ended]:
        """Go on with the trial, to what is to be heard of it, or to its first measurement after ``timeout`` seconds."""
        until = time.monotonic() + timeout
        while self._way is not None:
            try:
                at, values = self._way.send(self._go_on)
            except StopIteration as ended:
                self._way = None
                return [Ended(self._ticket, ended.value)]
            except (Exception, SystemExit):
                self._way = None
                return [Ended(self._ticket, Trouble(traceback.format_exc()))]
            self._go_on = None
            if self._stream:
                return [Heard(self._ticket, at, values)]
            if time.monotonic() >= until:
                break
        return []

    def answer(self, ticket: int, go_on: bool) -> None:
        self._go_on = go_on

    def stop(self, ticket: int) -> None:
        self.close()

    def close(self) -> None:
        if self._way is not None:
            self._way.close()
            self._way = None
