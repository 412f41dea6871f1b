"""A trial that is several processes of one machine, started as torchrun starts them.

Every process runs the trial function and finds RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT and their like in its
environment, so that ``torch.distributed.init_process_group()`` and accelerate work as they are. As under torchrun the store that
they meet at is there before them, on a port that the system chose. What rank 0 measures counts. A rank that fails ends all.
"""

from __future__ import annotations

import os
import pickle
import time
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from multiprocessing.connection import Connection, wait
from typing import Any

from polyak.lab.claim import Diverged
from polyak.lab.jobs import STOPPED, Ask, Died, Job, Outcome, Tell, Trouble, settle
from polyak.lab.jobs import carry_out as carry_out_alone
from polyak.lab.spawning import Worker, begin_process, end, end_of
from polyak.lab.spawning import begin as begin_life

_HOST = "127.0.0.1"
# Where one rank fails the others often fail for want of it: for this long the first cause is waited for.
_GRACE_S = 2.0
# A rank that diverged may leave the others waiting for it; if they see the same numbers they end by themselves.
_DIVERGED_GRACE_S = 10.0


def carry_out(job: Job, tell: Tell, ask: Ask) -> Outcome | Trouble | Died:
    """Run a trial of several processes. ``tell`` and ``ask`` are as for one, and hear of rank 0."""
    from torch.distributed import TCPStore

    # The ranks are this store's clients; it lives for as long as the variable.
    store = TCPStore(_HOST, 0, is_master=True, wait_for_workers=False)
    workers = [Worker(*begin_process(_rank)) for _ in range(job.processes)]
    try:
        for rank, worker in enumerate(workers):
            device = f"cuda:{rank}" if job.trial.device == "cuda" else job.trial.device
            own = replace(job, trial=replace(job.trial, device=device), processes=1, stream=job.stream or "tell")
            # A rank that is dead already is found so when it is listened to.
            with suppress(OSError):
                worker.connection.send(environment(rank, job.processes, store.port))
                worker.connection.send_bytes(pickle.dumps(own))
        return _Group(job, workers, tell, ask).outcome()
    finally:
        end(workers)


@contextmanager
def of_one() -> Iterator[None]:
    """Have this process find itself the only rank of a group, where a task is looked at that expects to be in one."""
    from torch.distributed import TCPStore

    store = TCPStore(_HOST, 0, is_master=True, wait_for_workers=False)
    own = environment(0, 1, store.port)
    before = {name: os.environ[name] for name in own if name in os.environ}
    os.environ.update(own)
    try:
        yield
    finally:
        for name in own:
            os.environ.pop(name, None)
        os.environ.update(before)


def environment(rank: int, size: int, port: int) -> dict[str, str]:
    """What torchrun puts into a rank's environment, on one machine."""
    numbers = {
        "RANK": rank,
        "LOCAL_RANK": rank,
        "ROLE_RANK": rank,
        "GROUP_RANK": 0,
        "WORLD_SIZE": size,
        "LOCAL_WORLD_SIZE": size,
        "ROLE_WORLD_SIZE": size,
        "GROUP_WORLD_SIZE": 1,
        "MASTER_PORT": port,
        "TORCHELASTIC_RESTART_COUNT": 0,
        "TORCHELASTIC_MAX_RESTARTS": 0,
    }
    texts = {"MASTER_ADDR": _HOST, "TORCHELASTIC_RUN_ID": "polyak", "TORCHELASTIC_USE_AGENT_STORE": "True"}
    return {**{name: str(number) for name, number in numbers.items()}, **texts}


class _Group:
    """The ranks of a trial while it runs."""

    def __init__(self, job: Job, workers: list[Worker], tell: Tell, ask: Ask) -> None:
        self.job, self.workers, self.tell, self.ask = job, workers, tell, ask
        self.running = {worker.connection: rank for rank, worker in enumerate(workers)}
        self.curve: list[tuple[Mapping[str, float], Mapping[str, float]]] = []
        self.first: Outcome | None = None  # rank 0's
        self.failure: Outcome | Trouble | None = None  # of whichever rank came to one first
        self.until: float | None = None  # when to wait no longer

    def outcome(self) -> Outcome | Trouble | Died:
        while self.running:
            left = None if self.until is None else self.until - time.monotonic()
            if left is not None and left <= 0:
                break
            for connection in wait(list(self.running), timeout=left):
                assert isinstance(connection, Connection)
                rank = self.running[connection]
                try:
                    said = connection.recv()
                except (EOFError, OSError):
                    # The first cause, whatever the others say for want of this rank.
                    return Died(self._of(rank, end_of(self.workers[rank].process)))
                if (answer := self._take_in(connection, rank, said)) is not None:
                    return answer
        if isinstance(self.failure, Outcome):
            # Only now is all there that rank 0 measured until it waited for the other.
            return replace(self.failure, curve=tuple(self.curve))
        if self.failure is not None:
            return self.failure
        assert self.first is not None
        return self.first

    def _take_in(self, connection: Connection, rank: int, said: Any) -> Outcome | None:
        """What a rank said; the trial's outcome where that settles it."""
        if isinstance(said, tuple):
            self.curve.append(said)
            if self.job.stream == "tell":
                self.tell(*said)
            elif self.job.stream == "ask":
                go_on = self.ask(*said)
                with suppress(OSError):
                    connection.send(go_on)
            return None
        del self.running[connection]
        if isinstance(said, Trouble):
            self._failed(Trouble(self._of(rank, said.trace)), _GRACE_S)
            return None
        if rank == 0:
            self.first = said
            # The other ranks may wait for one that has left its loop.
            return said if said.diverged or said.message == STOPPED else None
        if said.diverged:
            self._failed(replace(said, message=self._of(rank, said.message)), _DIVERGED_GRACE_S)
        return None

    def _failed(self, failure: Outcome | Trouble, grace: float) -> None:
        if self.failure is None:
            self.failure, self.until = failure, time.monotonic() + grace

    def _of(self, rank: int, text: str) -> str:
        return f"rank {rank} of {self.job.processes}: {text}"


# -- in a rank's process -------------------------------------------------------------------------------------------------------


def _rank(connection: Connection) -> None:
    begin_life()

    def tell(at: Mapping[str, float], values: Mapping[str, float]) -> None:
        connection.send((at, values))

    def ask(at: Mapping[str, float], values: Mapping[str, float]) -> bool:
        connection.send((at, values))
        return connection.recv()

    try:
        # The environment is in place before the job is unpacked, which imports what reads it.
        os.environ.update(connection.recv())
        packed = connection.recv_bytes()
    except EOFError:
        return
    try:
        job = pickle.loads(packed)
        answer = carry_out_alone(job, tell, ask) if os.environ["RANK"] == "0" else _follow(job)
    except (Exception, SystemExit):
        answer = Trouble(traceback.format_exc())
    connection.send(answer)
    try:
        connection.recv_bytes()  # until all ranks have ended: what this one holds may be in use
    except EOFError:
        return


def _follow(job: Job) -> Outcome:
    """Run a trial for the sake of rank 0: what is measured here is passed over."""
    settle(job.libraries, job.trial.seed)
    began = time.perf_counter()
    try:
        for _ in job.function(job.trial):
            pass
    except Diverged as error:
        return Outcome(job.worst, (), time.perf_counter() - began, True, str(error) or "diverged")
    return Outcome({}, (), time.perf_counter() - began)
