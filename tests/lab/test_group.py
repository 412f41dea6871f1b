"""Trials of several processes: two of gloo, as torchrun would start them."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import group_claims_for_tests as examples
import psutil
import pytest
import torch

from polyak.cli import main
from polyak.lab import Store, collect, compare, run, spawning
from polyak.lab.claim import Trial
from polyak.lab.cluster import Cluster
from polyak.lab.compare import task as tasks
from polyak.lab.compare.examine import examine
from polyak.lab.compare.task import Facts
from polyak.lab.group import carry_out, environment, of_one
from polyak.lab.inprocess import InProcess
from polyak.lab.workers import STOPPED, Died, Ended, Job, Outcome, Processes, Trouble, call_apart

from .tasks_for_tests import REGRESSION, write

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("forked")]


class Here(InProcess):
    """Trials of several processes, whose ranks are started by this one."""

    def __init__(self) -> None:
        super().__init__()
        self.ended: list[Ended] = []

    def start(self, ticket: int, job: Job) -> bool:
        if job.processes == 1:
            return super().start(ticket, job)
        self.ended = [Ended(ticket, carry_out(job, lambda *_: None, lambda *_: True))]
        return True

    def events(self, timeout: float) -> Any:
        ended, self.ended = self.ended, []
        return ended or super().events(timeout)

    def call(self, function: Any, *arguments: Any, timeout: float) -> Any:
        """Tasks leave a process group in the process that they are looked at in."""
        return call_apart(function, *arguments, timeout=timeout)


def by_hand(seed: int, steps: int = 6) -> list[float]:
    """The same descent in one process, with both ranks' noise."""
    generators = [torch.Generator().manual_seed(1000 * seed + rank) for rank in (0, 1)]
    x = torch.full((4,), 1.0 + seed)
    losses = []
    for _ in range(steps):
        gradient = sum(2 * x + torch.randn(4, generator=g) for g in generators)
        x = x - 0.1 * gradient / 2
        losses.append(x.square().sum().item())
    return losses


@pytest.mark.usefixtures("processes")
def test_two_processes_are_one_trial(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of them started afresh, as for users."""
    monkeypatch.setattr(spawning, "multiprocessing", multiprocessing)
    claim = examples.make(seeds=1)
    with Store(tmp_path) as store:
        result = run(claim, store=store, processes=2, jobs=1)
        assert result.device == "2 × cpu"
        for trial in result.trials:
            losses = by_hand(trial.seed)
            assert [values["loss"] for _, values in trial.curve] == losses
            assert dict(trial.values) == {"loss": losses[-1], "rank": 0.0, "size": 2.0, "threads": 1.0}
        assert collect(claim, store=store) is None, "what one process does is another experiment"
        assert collect(claim, processes=2, store=store) == result


def ranks() -> list[psutil.Process]:
    """All descendants but the server that they are forked from, and what looks after shared memory."""
    children = psutil.Process().children()
    return [p for child in children for p in child.children() if "resource_tracker" not in " ".join(p.cmdline())]


def job(how: str, stream: Any = "") -> Job:
    options = {"steps": 6, "how": how, "failing": 1}
    trial = Trial(claim="group", scale="small", task="parabola", arm="plain", seed=1, options=options)
    worst = dict.fromkeys(("loss", "rank", "size", "threads"), math.inf)
    return Job(
        function=examples.average,
        trial=trial,
        worst=worst,
        needed=frozenset(["loss"]),
        libraries=("torch",),
        stream=stream,
        processes=2,
    )


def test_a_rank_that_fails_fails_the_trial() -> None:
    died = carry_out(job("die"), lambda *_: None, lambda *_: True)
    assert isinstance(died, Died)
    assert died.how.startswith("rank 1 of 2: signal SIGKILL")
    raised = carry_out(job("raise"), lambda *_: None, lambda *_: True)
    assert isinstance(raised, Trouble)
    assert raised.trace.startswith("rank 1 of 2: Traceback")
    assert raised.trace.rstrip().endswith("RuntimeError: a bug in this rank")
    assert not ranks()


def test_a_rank_that_diverges_makes_the_trial_diverge(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("polyak.lab.group._DIVERGED_GRACE_S", 3.0)
    outcome = carry_out(job("diverge"), lambda *_: None, lambda *_: True)
    assert isinstance(outcome, Outcome)
    assert outcome.diverged
    assert outcome.message == "rank 1 of 2: too big"
    assert [values["loss"] for _, values in outcome.curve] == by_hand(1)[:3]
    assert set(outcome.values.values()) == {math.inf}


def test_rank_0_is_told_to_stop() -> None:
    heard: list[Any] = []

    def ask(at: Any, values: Any) -> bool:
        heard.append(values["loss"])
        return len(heard) < 2

    outcome = carry_out(job("", "ask"), lambda *_: None, ask)
    assert isinstance(outcome, Outcome)
    assert outcome.message == STOPPED
    assert heard == by_hand(1)[:2]
    assert not ranks()


def test_the_environment_is_torchruns(tmp_path: Path) -> None:
    """All that a script under torchrun finds, but for what is its agent's own, a rank finds here, too."""
    script, out = tmp_path / "script.py", tmp_path / "out"
    script.write_text("import os, json, sys; open(sys.argv[1], 'w').write(json.dumps(dict(os.environ)))")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1", script, out]
    subprocess.run(command, check=True, capture_output=True)
    theirs = json.loads(out.read_text())
    words = ("RANK", "WORLD_SIZE", "MASTER", "TORCHELASTIC")
    found = {name for name in theirs.keys() - os.environ.keys() if any(word in name for word in words)}
    ours = environment(0, 1, 29500)
    assert found - {"TORCHELASTIC_ERROR_FILE", "TORCHELASTIC_SIGNALS_TO_HANDLE"} <= ours.keys()
    for name in ours.keys() - {"MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID"}:
        assert ours[name] == theirs[name], name


ARMS = ["adamw:lr=0.01:weight_decay=0", "sgd:lr=0.01:weight_decay=0"]
DATA_PARALLEL = {
    "    model = nn.Linear(2, 1)\n": """    from accelerate import Accelerator
    accelerator = Accelerator(cpu=True)
    model = accelerator.prepare(nn.Linear(2, 1))
""",
    '{"distance": (model.weight - TRUTH).norm()}': (
        '{"distance": (accelerator.unwrap_model(model).weight - TRUTH).norm(), "ranks": accelerator.num_processes * '
        "isinstance(model, nn.parallel.DistributedDataParallel)}"
    ),
}


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
def test_a_comparison_under_accelerate(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    task = write(tmp_path, REGRESSION, replaced=DATA_PARALLEL)
    small: dict[str, Any] = {"budget": "10steps", "seeds": 1, "trials": 1, "points": 5, "jobs": 1, "progress": False}
    two = compare(task, ARMS, store=tmp_path, processes=2, executor=Here(), **small).task()
    one = compare(task, ARMS, store=tmp_path, executor=Processes(1), **small).task()
    assert [t.values["ranks"] for t in two.trials(ARMS[0])] == [2]
    assert [t.values["ranks"] for t in one.trials(ARMS[0])] == [0]
    # Both ranks have the same batches here, and the mean of two equal gradients is exact.
    assert [t.values["distance"] for t in two.trials(ARMS[0])] == [t.values["distance"] for t in one.trials(ARMS[0])]
    assert two.warnings[0].startswith("line.py gives both processes of a trial the same batches: ")
    assert not any("processes" in w for w in one.warnings)


RANK = (
    "\n    import os\n    rank, size = int(os.environ.get('RANK', 0)), int(os.environ.get('WORLD_SIZE', 1))\n    g = "
)
YIELDS = "yield x[i], y[i]"
OWN = "class Own:\n    def __init__(self, i):\n        self.i = i\n\n\ndef task("


@pytest.mark.parametrize(
    ("processes", "changes", "says"),
    [
        (2, {}, "line.py gives both processes of a trial the same batches: "),
        (
            3,
            {YIELDS: "yield {'x': x[i], 'y': [y[i], 7]}"},
            "line.py gives all 3 processes of a trial the same batches: ",
        ),
        (2, {"(8,), generator=g)": "(8,), generator=g)[rank::size]"}, ""),
        # Two of three, as where a model is spread over two and there are several of it.
        (3, {"(8,), generator=g)": "(8,), generator=g)[rank // 2::2]"}, ""),
        # What the loss makes data of, and what a digest does not see.
        (2, {YIELDS: "yield 7"}, ""),
        (2, {YIELDS: "yield {'x': Own(i + rank), 'y': y[:8]}", "def task(": OWN}, ""),
        # A rank that fails is for the trials to tell.
        (2, {YIELDS: "assert not rank; yield x[i], y[i]"}, ""),
    ],
)
def test_a_task_that_gives_all_ranks_the_same_batches_is_told(
    tmp_path: Path, processes: int, changes: dict[str, str], says: str
) -> None:
    text = REGRESSION.replace("model(batch[0]) - batch[1]", "model(x) - y").replace("\n    g = ", RANK)
    path = write(tmp_path, text, replaced=changes)
    tasks._module.cache_clear()
    found = examine(str(path), "cpu", processes)
    assert isinstance(found, Facts)
    assert [w.startswith(says) for w in found.warnings] == [True] * bool(says)
    assert not ranks()


def test_accelerate_shares_a_loader_out(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    shared = {
        '"batches": batches()': '"batches": accelerator.prepare(torch.utils.data.DataLoader(list(zip(x, y)), batch_size=4))',
        "    def batches": "    from accelerate import Accelerator\n    accelerator = Accelerator(cpu=True)\n\n    def unused",
    }
    found = call_apart(examine, str(write(tmp_path, REGRESSION, replaced=shared)), "cpu", 2, timeout=3000)
    assert isinstance(found, Facts), found
    assert found.warnings == ()


TORCHRUNS = {
    "    model = nn.Linear(2, 1)\n": """    from torch import distributed as dist
    if not dist.is_initialized():
        dist.init_process_group("gloo")
    model = nn.parallel.DistributedDataParallel(nn.Linear(2, 1))
""",
    "(8,), generator=g)": "(8,), generator=g)[dist.get_rank()::dist.get_world_size()]",
    '{"distance": (model.weight - TRUTH).norm()}': (
        '{"distance": (model.module.weight - TRUTH).norm(), "loss": dist.get_world_size()}'
    ),
}


def test_a_task_that_is_written_for_torchrun(tmp_path: Path) -> None:
    """It is examined as the one rank of a group. Two that share each batch do what one process does with all of it."""
    small: dict[str, Any] = {"budget": "10steps", "seeds": 1, "trials": 1, "points": 5, "jobs": 1, "progress": False}
    task = write(tmp_path, REGRESSION, replaced=TORCHRUNS)
    two = compare(task, ARMS, store=tmp_path, processes=2, executor=Here(), **small).task()
    assert not any("processes" in w for w in two.warnings)
    assert [t.values["loss"] for t in two.trials(ARMS[0])] == [2]
    tasks._module.cache_clear()
    one = compare(write(tmp_path, REGRESSION, "alone.py"), ARMS, store=tmp_path, **small).task()
    found, expected = ([t.values["distance"] for t in c.trials(ARMS[1])] for c in (two, one))
    assert found == pytest.approx(expected, rel=1e-5)


def test_the_environment_of_one_rank_is_left_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "3")
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    before = dict(os.environ)
    with of_one():
        assert (os.environ["RANK"], os.environ["WORLD_SIZE"]) == ("0", "1")
        torch.distributed.init_process_group("gloo")
        assert torch.distributed.get_world_size() == 1
        torch.distributed.destroy_process_group()
    assert dict(os.environ) == before


def test_budgets_in_time_are_for_one_process(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is a count like 500steps, got '1s/trial'"):
        compare(
            write(tmp_path, REGRESSION), "adamw,sgd", budget="1s/trial", processes=2, store=tmp_path, progress=False
        )


def test_devices_are_checked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with (
        Store(tmp_path) as store,
        pytest.raises(ValueError, match="device must be 'cpu' or 'cuda' where trials have several"),
    ):
        run(examples.make(), store=store, processes=2, device="cuda:1")
    with pytest.raises(SystemExit) as left:
        main(["reproduce", "lion", "--nproc-per-trial", "2", "--device", "cuda:1", "--home", str(tmp_path)])
    assert left.value.code == 2


@pytest.mark.xdist_group("ray")
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_on_a_cluster_they_share_a_node(tmp_path: Path) -> None:
    pytest.importorskip("ray")
    with Store(tmp_path) as store:
        result = run(examples.make(seeds=1), store=store, processes=2, executor=Cluster("local", processes=2))
    assert [values["loss"] for _, values in result.trials[0].curve] == by_hand(0)
