"""Trials on a Ray cluster: an executor that makes each trial a task. Store, plans and trackers stay with the driver.

A task runs a trial as a local worker does, in a process with one thread, and what it measures on the way comes to the driver
through an actor, as do the driver's answers. Ray retries nothing by itself: a trial whose process or node died is reported so, and
begun anew by whoever asked for it. Nodes must have the driver's versions and code of polyak, or refuse.
"""

from __future__ import annotations

import hashlib
import math
import os
import pickle
import socket
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import polyak
from polyak.core import checks
from polyak.lab import versions as facts
from polyak.lab.workers import (
    THREADS,
    Began,
    Died,
    Ended,
    Heard,
    Job,
    Trouble,
    carry_out_anyhow,
    settled_hashes,
)

_CONNECT_S = 10.0  # for a first sign of life; Ray itself goes on for minutes
_LOOK_S = 5.0  # how often it is looked which nodes there are
_CHANCES = 5  # of a trial whose node dies: where nodes come and go that says nothing of the trial
_SHORT = 8  # digits of a node's name
_CALL = -1  # the ticket of what is no trial
_FORWARDED = (
    "POLYAK_",
)  # variables of the driver's environment that tasks find, too, where a node has none of its own


_Driver = tuple[Mapping[str, str], Mapping[str, str], list[str]]  # its versions, variables, sys.path


class ClusterError(RuntimeError):
    """The cluster cannot be used."""


class Cluster:
    """Where trials run: a Ray cluster.

    Args:
        address: "auto" for the cluster that this machine is part of, "local" for a new one of this machine alone, else
            "host:port" or "ray://host:port".
        jobs: trials at once. Default: as many as have a place. A cluster that grows on demand needs to be asked for more.
        processes: of each trial (``carry_out``'s); a CPU core for each.
        gpus: for each trial; a fraction shares one.

    Nothing is connected to before the first use. A connection that this process already has to Ray is used, and kept.
    """

    @checks.arguments(
        address=checks.text,
        jobs=checks.Integer(1, 4096) | None,
        processes=checks.Integer(1, 1024),
        gpus=checks.Number(0, 1024),
    )
    def __init__(self, address: str = "auto", *, jobs: int | None = None, processes: int = 1, gpus: float = 0) -> None:
        self.address, self.processes, self.gpus, self._jobs = address, processes, gpus, jobs
        self._ray: Any = None
        self._ours = False  # whether the connection is
        self._apart = False
        self._flight: dict[int, Any] = {}  # ticket -> reference of the task's result
        self._places: dict[int, str] = {}  # ticket -> the node that it was given to
        self._nodes: list[Mapping[str, Any]] = []  # those that have room for a trial
        self._looked = -math.inf

    def __enter__(self) -> Cluster:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- the executor's interface ----------------------------------------------------------------------------------------

    @property
    def slots(self) -> int:
        if self._apart:
            return max(1, min(len(self._nodes), self._jobs or len(self._nodes)))
        return self._jobs or max(1, sum(self._room(node) for node in self._nodes))

    def open(self) -> None:
        if self._ray is not None:
            return
        ray = _ray()
        self._ours = not ray.is_initialized()
        if self._ours:
            self._connect(ray)
        self._ray = ray
        self._look()
        if not self._nodes and self._jobs is None:
            has = ", ".join(_resources(node) for node in ray.nodes() if node["Alive"])
            asked = f"{self.processes} CPU{'s' if self.processes > 1 else ''} and {self.gpus:g} GPUs"
            self.close()
            raise ClusterError(
                f"no node of the cluster has room for a trial, which needs {asked}; there are: {has or 'none'}. "
                "(If it grows on demand, say with --jobs how many trials to run at once.)"
            )
        # On the driver's own node: it dies with the driver, and not before.
        here = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(
            ray.get_runtime_context().get_node_id(), soft=False
        )
        # Ray may send it by way of a node that is dead without being known to be: it begins anew elsewhere.
        mailbox = ray.remote(num_cpus=0, scheduling_strategy=here, max_restarts=3, max_task_retries=3)(_Mailbox)
        self._mailbox: Any = mailbox.remote()
        ray.get(self._mailbox.left.remote())
        self._news = self._mailbox.take.remote()

    def apart(self) -> None:
        self._apart = True

    def call(self, function: Callable[..., Any], *arguments: Any, timeout: float) -> Any:
        self.open()
        self._submit(_CALL, _call, (function, arguments))
        reference = self._flight[_CALL]
        try:
            self._ray.wait([reference, self._news], num_returns=1)  # the time until it has a place does not count
            if not self._ray.wait([reference], timeout=timeout)[0]:
                raise TimeoutError(f"not done after {timeout:g} s")
            answer = self._ended(_CALL).answer
        finally:
            self.stop(_CALL)
        if isinstance(answer, Died):
            raise RuntimeError(f"its process died with {answer.how}")
        if isinstance(answer, Trouble):
            raise RuntimeError(answer.trace)
        return answer

    def start(self, ticket: int, job: Job) -> bool:
        self._submit(ticket, _trial, job)
        return False

    def events(self, timeout: float) -> list[Began | Heard | Ended]:
        ray = self._ray
        if time.monotonic() - self._looked > _LOOK_S:
            self._look()
        waited_for = [*self._flight.values(), self._news]
        if not ray.wait(waited_for, num_returns=1, timeout=timeout)[0]:
            return []
        ready = ray.wait(waited_for, num_returns=len(waited_for), timeout=0)[0]
        ended = [ticket for ticket, reference in self._flight.items() if reference in ready]
        try:
            if ended:
                # What they said on the way has arrived, and comes first.
                ray.get(self._mailbox.wake.remote())
            said = ray.get(self._news)
            said += ray.get(self._mailbox.left.remote()) if ended else []
        except ray.exceptions.RayError as error:
            raise ClusterError(f"the connection to the cluster is lost: {error}") from None
        self._news = self._mailbox.take.remote()
        found: list[Began | Heard | Ended] = [
            Began(ticket) if what is None else Heard(ticket, *what) for ticket, what in said if ticket in self._flight
        ]
        return [*found, *(self._ended(ticket) for ticket in ended)]

    def answer(self, ticket: int, go_on: bool) -> None:
        self._mailbox.answer.remote(ticket, go_on)

    def stop(self, ticket: int) -> None:
        reference = self._flight.pop(ticket, None)
        self._places.pop(ticket, None)
        if reference is not None:
            self._ray.cancel(reference, force=True)

    def close(self) -> None:
        if self._ray is None:
            return
        if self._ours:
            self._ray.shutdown()  # which ends all that this driver has begun
            self._flight.clear()
        else:
            ended = list(self._flight.values())
            for ticket in list(self._flight):
                self.stop(ticket)
            # A task that lost its mailbox before its life would end otherwise than it is asked to.
            if ended:
                self._ray.wait(ended, num_returns=len(ended), timeout=_CONNECT_S)
            self._ray.kill(self._mailbox)
        self._ray = None

    # -- beneath ---------------------------------------------------------------------------------------------------------

    def _connect(self, ray: ModuleType) -> None:
        options: dict[str, Any] = {"include_dashboard": False} if self.address == "local" else {}
        _knock(self.address)
        try:
            # What trials print stays in Ray's logs: the driver's output may be JSON.
            ray.init(address=self.address, log_to_driver=False, logging_level="ERROR", **options)
        except (ConnectionError, ValueError, RuntimeError) as error:
            if self.address == "auto":
                raise ClusterError(
                    "no Ray cluster runs on this machine: start one with `ray start --head`, or name one: --cluster HOST:PORT"
                ) from error
            why = str(error).strip().splitlines()
            raise ClusterError(
                f"cannot use a Ray cluster at {self.address!r}: {why[0] if why else error!r} (if it asks for a token: set "
                "RAY_AUTH_MODE=token here, too)"
            ) from error

    def _look(self) -> None:
        self._nodes = [node for node in self._ray.nodes() if node["Alive"] and self._room(node)]
        self._looked = time.monotonic()

    def _room(self, node: Mapping[str, Any]) -> int:
        """How many trials have a place on a node."""
        resources = node["Resources"]
        room = resources.get("CPU", 0) // self.processes
        return int(min(room, resources.get("GPU", 0) / self.gpus) if self.gpus else room)

    def _submit(self, ticket: int, function: Callable[..., Any], what: Any) -> None:
        strategies = self._ray.util.scheduling_strategies
        options: dict[str, Any] = {}
        if self._apart and self._nodes:
            taken = [*self._places.values()]
            node = min((n["NodeID"] for n in self._nodes), key=taken.count)
            self._places[ticket] = node
            options["scheduling_strategy"] = strategies.NodeAffinitySchedulingStrategy(node, soft=True)
        task = self._ray.remote(
            num_cpus=self.processes,
            num_gpus=self.gpus,
            max_retries=0,
            runtime_env={"env_vars": {**dict.fromkeys(THREADS, "1"), **settled_hashes()}},
            **options,
        )(function)
        variables = {name: value for name, value in os.environ.items() if name.startswith(_FORWARDED)}
        self._flight[ticket] = task.remote(
            pickle.dumps(what), ticket, self._mailbox, (_site(), variables, list(sys.path))
        )

    def _ended(self, ticket: int) -> Ended:
        errors = self._ray.exceptions
        reference = self._flight.pop(ticket)
        self._places.pop(ticket, None)
        try:
            answer, machine = self._ray.get(reference)
        except (errors.RayTaskError, errors.RuntimeEnvSetupError) as error:
            return Ended(ticket, Trouble(str(error)))
        except errors.OutOfMemoryError:
            return Ended(ticket, Died("a kill by Ray, as its node ran out of memory"))
        except (errors.NodeDiedError, errors.ObjectLostError, errors.TaskUnschedulableError):
            return Ended(ticket, Died("its node", _CHANCES))
        except errors.RayError as error:
            return Ended(ticket, Died(str(error).strip().partition("\n")[0]))
        return Ended(ticket, answer, machine)


def _ray() -> ModuleType:
    try:
        import ray
        import ray.exceptions
        import ray.util.scheduling_strategies
    except ModuleNotFoundError as missing:
        if (missing.name or "").partition(".")[0] != "ray":
            raise
        raise ClusterError("a cluster needs ray, of the extra `cluster`: pip install 'polyak[cluster]'") from None
    return ray


def _knock(address: str) -> None:
    """Whether anybody is there."""
    if address in ("auto", "local"):
        return
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdigit():
        raise ClusterError(f"a cluster's address is auto, local, HOST:PORT or ray://HOST:PORT, got {address!r}")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_CONNECT_S).close()
    except OSError as error:
        raise ClusterError(f"no Ray cluster answers at {address}: {error.strerror or error}") from None


def _resources(node: Mapping[str, Any]) -> str:
    resources = node["Resources"]
    return f"{resources.get('CPU', 0):g} CPUs with {resources.get('GPU', 0):g} GPUs"


# -- on the cluster's nodes --------------------------------------------------------------------------------------------------


class _Mailbox:
    """Carries what tasks say to the driver, and its answers back. An actor, whose methods run side by side while they wait."""

    def __init__(self) -> None:
        import asyncio

        self._said: list[tuple[int, Any]] = []
        self._news = asyncio.Event()
        self._future = lambda: asyncio.get_running_loop().create_future()
        self._asked: dict[int, Any] = {}

    async def say(self, ticket: int, what: Any) -> None:
        self._said.append((ticket, what))
        self._news.set()

    async def ask(self, ticket: int, what: Any) -> bool:
        future = self._asked[ticket] = self._future()
        await self.say(ticket, what)
        return await future

    async def answer(self, ticket: int, go_on: bool) -> None:
        self._asked.pop(ticket).set_result(go_on)

    async def take(self) -> list[tuple[int, Any]]:
        """All that was said and not taken yet, as soon as there is something, or the driver is to be woken."""
        await self._news.wait()
        return await self.left()

    async def left(self) -> list[tuple[int, Any]]:
        self._news.clear()
        said, self._said = self._said, []
        return said

    async def wake(self) -> None:
        self._news.set()


def _trial(packed: bytes, ticket: int, mailbox: Any, driver: _Driver) -> tuple[Any, Mapping[str, str]]:
    """A task: a trial's outcome, and the machine it ran on."""
    import ray

    last = [mailbox.say.remote(ticket, None)]

    def tell(at: Mapping[str, float], values: Mapping[str, float]) -> None:
        last[0] = mailbox.say.remote(ticket, (at, values))

    def ask(at: Mapping[str, float], values: Mapping[str, float]) -> bool:
        return ray.get(mailbox.ask.remote(ticket, (at, values)))

    machine: Mapping[str, str] = {}
    try:
        _settle_in(driver)
        job: Job = pickle.loads(packed)
        machine = {**facts.machine(job.trial.device), "node": ray.get_runtime_context().get_node_id()[:_SHORT]}
        answer = carry_out_anyhow(job, tell, ask)
    except (Exception, SystemExit):
        answer = Trouble(traceback.format_exc())
    ray.get(last[0])  # what was said before has arrived, too
    return answer, machine


def _call(packed: bytes, ticket: int, mailbox: Any, driver: _Driver) -> tuple[Any, None]:
    """A task that is no trial."""
    import ray

    ray.get(mailbox.say.remote(ticket, None))
    try:
        _settle_in(driver)
        function, arguments = pickle.loads(packed)
        return function(*arguments), None
    except (Exception, SystemExit):
        return Trouble(traceback.format_exc()), None


def _settle_in(driver: _Driver) -> None:
    """Take over what is found by name at the driver: variables, and where modules are.

    Raises:
        ClusterError: this node has other versions than the driver, so that its numbers would be stored for what they are not.
    """
    site, variables, path = driver
    for name, value in variables.items():
        os.environ.setdefault(name, value)
    sys.path += [folder for folder in path if folder not in sys.path]
    here = _site()
    if different := [
        f"{name} {here.get(name)} (the driver: {value})" for name, value in site.items() if here.get(name) != value
    ]:
        raise ClusterError(f"a node of the cluster has other versions than the driver: {', '.join(different)}")


@cache
def _site() -> Mapping[str, str]:
    """The versions that results depend on, and a digest of polyak's code, which may have been edited."""
    root = Path(polyak.__file__).parent
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(f"{path.relative_to(root).as_posix()} {hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    return {**facts.versions(), "polyak's code": digest.hexdigest()[:16]}
