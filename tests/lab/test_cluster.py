"""Trials on Ray: the same numbers as here, whatever dies; clear words where there is no cluster."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import claims_for_tests as examples
import psutil
import pytest

from polyak.cli import main
from polyak.lab import Progress, Store, TrialError, compare, run
from polyak.lab.claim import Trial
from polyak.lab.cluster import Cluster, ClusterError
from polyak.lab.result import ClaimResult
from polyak.lab.store import Planned
from polyak.lab.workers import STOPPED, Began, Ended, Heard, Job

from .tasks_for_tests import REGRESSION, write

ray = pytest.importorskip("ray")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.xdist_group("ray"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


# Dead nodes are noticed sooner. One that is only slow is not taken for dead: its end would end this process, too.
PATIENT = {"health_check_period_ms": 1000, "health_check_timeout_ms": 600_000, "worker_register_timeout_seconds": 600}


@pytest.fixture(scope="module")
def nodes() -> Iterator[Any]:
    """A Ray cluster on this machine: a head without room for trials, and two nodes with room for one each."""
    from ray.cluster_utils import Cluster as Nodes

    made = Nodes(
        initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False, "_system_config": PATIENT}
    )
    for _ in range(2):
        made.add_node(num_cpus=1)
    yield made
    made.shutdown()


def numbers(result: ClaimResult) -> list[Any]:
    """What trials measured, all but their times."""
    return [(t.task, t.arm, t.seed, t.point, t.values, t.curve, t.diverged, t.message) for t in result.trials]


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Any], list[Any]]:
    """What a claim's trials measure without a cluster."""

    def measured(claim: Any) -> list[Any]:
        with Store(tmp_path_factory.mktemp("here")) as store:
            return numbers(run(claim, store=store))

    return measured


def tasks(nodes: Any, name: str) -> list[psutil.Process]:
    """The processes of these nodes that run a task or actor; another test process may have nodes of its own."""
    return [task for node in nodes.list_all_nodes() for task in tasks_on(node, name)]


def tasks_on(node: Any, name: str) -> list[psutil.Process]:
    found = []
    for child in psutil.Process(node.all_processes["raylet"][0].process.pid).children():
        with suppress(psutil.NoSuchProcess):
            if "".join(child.cmdline())[:30].startswith(f"ray::{name}"):
                found.append(child)
    return found


def until(condition: Callable[[], Any]) -> None:
    while not condition():
        time.sleep(0.05)


# -- the same, whatever happens --------------------------------------------------------------------------------------------


def test_the_same_numbers_with_and_without(nodes: Any, here: Any, tmp_path: Path) -> None:
    heard: list[tuple[str, bool]] = []

    def progress(p: Progress) -> None:
        assert len(p.running) <= 2

    with Store(tmp_path) as store:
        result = run(
            examples.make(), store=store, executor=Cluster(nodes.address), on_progress=progress, track=_Recorder(heard)
        )
        assert numbers(result) == here(examples.make())
        assert not ray.is_initialized()
        [note] = result.notes
        assert note.startswith("trials ran on 2 nodes of a cluster: ")
        counted = [int(part.split(" on node ")[0].split()[-1]) for part in note.split("cluster: ")[1].split("), ")]
        assert sum(counted) == 5 * 2 * (3 + 1)  # of each seed's arms the tuning, and what is reported
        assert "node" not in result.machine
        machines = {json.loads(m)["node"] for (m,) in store._db.execute("SELECT machine FROM trials")}
        assert len(machines) == 2
        assert numbers(run(examples.make(), store=store)) == numbers(result), "stored, by what it is and not by where"
    # 20 measurements on the way and an end, unless a trial diverges on its way; all that was measured arrived before the end.
    for trial in result.trials:
        of = f"{trial.arm} {trial.seed} {dict(trial.point)}"
        assert [ended for name, ended in heard if name == of] == [False] * len(trial.curve) + [True]


class _Recorder:
    name = "recorder"

    def __init__(self, heard: list[tuple[str, bool]]) -> None:
        self.heard, self.ends = heard, list[str]()

    def begin(self, trial: Planned) -> None:
        pass

    def measured(self, trial: Planned, at: Any, values: Any) -> None:
        self.heard.append((f"{trial.arm} {trial.seed} {dict(trial.point)}", False))

    def end(self, trial: Planned, status: Any, values: Any, message: str) -> None:
        self.heard.append((f"{trial.arm} {trial.seed} {dict(trial.point)}", True))
        self.ends.append(status)

    def close(self) -> None:
        pass


def test_a_node_that_dies_in_the_middle_costs_nothing(nodes: Any, here: Any, tmp_path: Path) -> None:
    claim = examples.slow(seeds=4, sleep=3.0)
    victim = nodes.add_node(num_cpus=1)
    nodes.wait_for_nodes()
    killed: list[Progress] = []
    recorder = _Recorder([])

    def kill(p: Progress) -> None:
        if p.done >= 3 and len(p.running) == 3 and not killed:  # one on each node
            until(lambda: tasks_on(victim, "_trial"))
            killed.append(p)
            nodes.remove_node(victim, allow_graceful=False)

    with Store(tmp_path) as store:
        result = run(claim, store=store, executor=Cluster(nodes.address), on_progress=kill, track=recorder)
    assert killed
    assert [status for status in recorder.ends if status != "done"] == ["killed"], "a trial was in the middle"
    assert numbers(result) == here(claim)


def test_a_worker_that_dies_is_tried_once_more(nodes: Any, here: Any, tmp_path: Path) -> None:
    claim = examples.bad("die once", mark=str(tmp_path / "mark"))
    with Store(tmp_path) as store:
        result = run(claim, store=store, executor=Cluster(nodes.address))
    assert (tmp_path / "mark").exists()
    assert numbers(result) == here(claim)
    with Store(tmp_path / "again") as store, pytest.raises(TrialError, match="its process died 2 times, the last time"):
        run(examples.bad("die"), store=store, executor=Cluster(nodes.address))


def test_an_error_in_a_trial_is_told(nodes: Any, tmp_path: Path) -> None:
    with Store(tmp_path) as store, pytest.raises(TrialError, match="RuntimeError: a bug in the trial"):
        run(examples.bad("raise"), store=store, executor=Cluster(nodes.address))


def test_a_comparison_is_the_same_with_and_without(nodes: Any, tmp_path: Path) -> None:
    task = write(tmp_path, REGRESSION)
    options: dict[str, Any] = {"budget": "30steps", "seeds": 2, "trials": 4, "points": 10, "progress": False}
    there = compare(task, "adamw,adan", store=tmp_path / "there", executor=Cluster(nodes.address), **options)
    local = compare(task, "adamw,adan", store=tmp_path / "here", jobs=2, **options)

    def measured(comparison: Any) -> list[Any]:
        clock = ("seconds", "processor")
        return [
            (t.arm, t.seed, t.point, t.message, {n: v for n, v in t.values.items() if n not in clock})
            for t in comparison.task().result.trials
        ]

    assert measured(there) == measured(local)
    assert not there.setup.alone


def test_trials_are_told_to_stop_and_are_stopped(nodes: Any) -> None:
    worst = {"loss": float("inf"), "global_draw": float("inf")}

    def job(**options: float) -> Job:
        trial = Trial(claim="c", scale="s", task="t", arm="a", seed=0, options={"lr": 0.1, "steps": 20, **options})
        return Job(function=examples.descend, trial=trial, worst=worst, needed=frozenset(), libraries=(), stream="ask")

    heard: dict[int, list[Any]] = {1: [], 2: [], 3: []}
    cluster = Cluster(nodes.address, jobs=3)
    try:
        cluster.open()
        assert [cluster.start(ticket, job(sleep=600.0 * (ticket == 2))) for ticket in (1, 2, 3)] == [False] * 3
        while not (heard[2] and all(heard[t] and isinstance(heard[t][-1], Ended) for t in (1, 3))):
            for event in cluster.events(0.2):
                heard[event.ticket].append(event)
                if isinstance(event, Heard):
                    cluster.answer(event.ticket, event.at["step"] < 3)
        cluster.stop(2)
        until(lambda: len(tasks(nodes, "_trial")) == 0)
        assert cluster.events(0.2) == []
    finally:
        cluster.close()
    for ticket in (1, 3):  # the third had to wait for a place
        assert [type(event) for event in heard[ticket]] == [Began, *[Heard] * 4, Ended]
    outcome = heard[1][-1].answer
    assert outcome.message == STOPPED
    assert outcome.values == outcome.curve[-1][1]
    assert [type(event) for event in heard[2]] == [Began]


def test_a_budget_in_time_takes_one_node_for_each_trial(nodes: Any) -> None:
    node = nodes.add_node(num_cpus=4)
    nodes.wait_for_nodes()
    cluster = Cluster(nodes.address)
    try:
        cluster.open()
        assert cluster.slots == 6
        cluster.apart()
        assert cluster.slots == 3
    finally:
        cluster.close()
        nodes.remove_node(node)


# -- interrupted -----------------------------------------------------------------------------------------------------------


def test_ctrl_c_releases_the_cluster(nodes: Any, tmp_path: Path) -> None:
    task = write(tmp_path, REGRESSION)
    command = [
        sys.executable,
        "-c",
        "from polyak.cli import main; main()",
        "compare",
        str(task),
        "--arms",
        "adamw,sgd",
        "--budget",
        "5s/trial",
    ]
    command += ["--cluster", nodes.address, "--home", str(tmp_path / "home"), "--out", str(tmp_path / "page.html")]

    def heed_interrupts() -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)

    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=heed_interrupts
    ) as driver:
        until(lambda: len(tasks(nodes, "_trial")) == 2)  # the baseline's trial is run twice before
        driver.send_signal(signal.SIGINT)
        _, errors = driver.communicate()
    assert driver.returncode == 130, errors
    assert "interrupted" in errors
    until(lambda: not tasks(nodes, "_trial") and not tasks(nodes, "_Mailbox"))


def test_a_connection_that_is_there_is_kept(nodes: Any, tmp_path: Path) -> None:
    ray.init(address=nodes.address, log_to_driver=False, logging_level="ERROR")

    def interrupt(p: Progress) -> None:
        if p.done == 2:
            raise KeyboardInterrupt

    try:
        with Store(tmp_path) as store, pytest.raises(KeyboardInterrupt):
            run(examples.slow(seeds=3), store=store, executor=Cluster(), on_progress=interrupt)
        until(lambda: not tasks(nodes, "_trial") and not tasks(nodes, "_Mailbox"))
        with Store(tmp_path) as store:
            assert len(run(examples.slow(seeds=3), store=store, executor=Cluster()).trials) == 6
        assert ray.is_initialized()
    finally:
        ray.shutdown()


# -- no cluster ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def silent() -> str:
    """An address where nobody is."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{found.getsockname()[1]}"


def said(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    with pytest.raises(SystemExit) as left:
        main(["reproduce", "lion", "--seeds", "1", *arguments])
    return int(left.value.code or 0), capsys.readouterr().err


def test_an_address_where_nobody_is(tmp_path: Path, capsys: pytest.CaptureFixture[str], silent: str) -> None:
    status, error = said(capsys, "--cluster", silent, "--home", str(tmp_path))
    assert status == 3
    assert error.splitlines() == [f"polyak: no Ray cluster answers at {silent}: Connection refused"]
    status, error = said(capsys, "--cluster", "nonsense", "--home", str(tmp_path))
    assert (status, len(error.splitlines())) == (3, 1)
    assert "auto, local, HOST:PORT or ray://HOST:PORT, got 'nonsense'" in error


def test_no_cluster_on_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**_: Any) -> None:
        raise ConnectionError("Could not find any running Ray instance.")

    monkeypatch.setattr(ray, "init", refuse)
    with pytest.raises(ClusterError, match="start one with `ray start --head`"):
        Cluster("auto").open()


def test_without_ray(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    status, error = said(capsys, "--cluster", "auto", "--home", str(tmp_path))
    assert (status, error) == (
        3,
        "polyak: a cluster needs ray, of the extra `cluster`: pip install 'polyak[cluster]'\n",
    )


def test_options_that_do_not_fit(capsys: pytest.CaptureFixture[str]) -> None:
    assert said(capsys, "--gpus-per-trial", "1")[0] == 2
    assert said(capsys, "--cluster", "auto", "--device", "cuda:1")[0] == 2
    assert said(capsys, "--cluster", "auto", "--gpus-per-trial", "-1")[0] == 2
    assert said(capsys, "--nproc-per-trial", "0")[0] == 2


def test_no_node_has_room(nodes: Any) -> None:
    with pytest.raises(ClusterError, match="no node of the cluster has room for a trial, which needs 1 CPU and 3 GPUs"):
        Cluster(nodes.address, gpus=3).open()
    assert not ray.is_initialized()


def test_a_node_with_other_code_refuses(nodes: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from polyak.lab import cluster

    site = {**cluster._site(), "polyak's code": "other"}
    monkeypatch.setattr(cluster, "_site", lambda: site)
    with Store(tmp_path) as store, pytest.raises(TrialError, match=r"other versions than the driver: polyak's code"):
        run(examples.slow(seeds=1, sleep=0.0), store=store, executor=Cluster(nodes.address))


def test_importing_the_lab_imports_no_ray() -> None:
    code = "import polyak.lab.cluster, polyak.lab.trackers, polyak.lab.run, polyak.cli.app, sys; assert 'ray' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ.copy())
