"""Comparisons from end to end, on a task of milliseconds."""

from __future__ import annotations

import json
import math
import sqlite3
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from polyak.lab import ArmError, Store, StoreError, TaskError, TrialError, compare
from polyak.lab.claim import Trial
from polyak.lab.compare.budget import parse
from polyak.lab.compare.comparison import Comparison
from polyak.lab.compare.main import _deadline
from polyak.lab.compare.search import Search
from polyak.lab.compare.task import Facts
from polyak.lab.compare.trial import Train
from polyak.lab.database import FILE, SCHEMA
from polyak.lab.inprocess import InProcess
from polyak.lab.tuning import FIRST_TUNING_SEED
from polyak.lab.workers import Job, Processes, carry_out

from .conftest import Clock
from .tasks_for_tests import PIPELINE, REGRESSION, SAMPLING, write

ARMS = "adamw,adan,sgd:weight_decay=0"
SMALL: dict[str, Any] = {"budget": "30steps", "seeds": 5, "trials": 4, "points": 10, "jobs": 1, "progress": False}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("tasks"), REGRESSION)


@pytest.fixture(scope="module")
def small(home: Path, task: Path) -> Comparison:
    return compare(task, ARMS, store=home, **{**SMALL, "jobs": 2})


shared = pytest.mark.xdist_group("small")  # one worker runs it, once


def trials(comparison: Comparison, purpose: str) -> list[Any]:
    return [t for t in comparison.task().result.trials if t.purpose == purpose]


# ---------------------------------------------------------------------------------------------------------------- fairness


@shared
def test_every_arm_gets_the_same(small: Comparison) -> None:
    tuning, reported = trials(small, "tuning"), trials(small, "report")
    names = ["adamw", "adan", "sgd:weight_decay=0"]
    assert Counter((t.arm, t.seed) for t in tuning) == {
        (name, FIRST_TUNING_SEED + seed): 4 for name in names for seed in range(5)
    }
    assert Counter(t.arm for t in reported) == dict.fromkeys(names, 5)
    assert {t.seed for t in reported} == set(range(5))
    assert {t.values["steps"] for t in reported} == {30}
    for seed in range(5):
        starts = {t.curve[0][1]["distance"] for t in reported if t.seed == seed}
        assert len(starts) == 1, "the same initial weights"
    assert len({t.curve[0][1]["distance"] for t in reported}) == 5
    assert [at["used"] for at, _ in reported[0].curve] == [i / 10 for i in range(11)]


def trial(task: Path, optimizer: str, seed: int = 0, device: str = "cpu", **options: Any) -> tuple[list[Any], Any]:
    """Measurements of one trial in this process."""
    facts = {
        "class": optimizer,
        "fixed": {},
        "tuned": ["lr"],
        "lr": 0.01,
        "budget": {"steps": 12},
        "points": 4,
        **options,
    }
    job = Job(
        function=Train(str(task)),
        trial=Trial(claim="c", scale="s", task="line", arm="a", seed=seed, device=device, options=facts),
        worst=dict.fromkeys(
            ("distance", "train_loss", "steps", "evaluations", "seconds", "memory", "processor", "validation"), math.inf
        ),
        needed=frozenset(),
        libraries=("numpy", "torch"),
    )
    heard: list[Any] = []
    outcome = carry_out(job, lambda at, values: heard.append((at, values)), lambda *_: True)
    return list(outcome.curve), outcome


GREEDY = """
import torch


class Greedy(torch.optim.SGD):
    def step(self, closure=None):
        torch.rand(7)  # of the global generator, from which this task's batches come, too
        return super().step(closure)
"""
GLOBAL = {"(8,), generator=g)": "(8,)); SEEN.append((seed, tuple(i.tolist())))", "TRUTH = ": "SEEN = []\nTRUTH = "}


def test_batches_are_the_same_whatever_an_optimizer_draws(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "greedy.py").write_text(GREEDY)
    monkeypatch.syspath_prepend(str(tmp_path))
    path = write(tmp_path, REGRESSION, "global_batches.py", replaced=GLOBAL)
    curves = [trial(path, arm)[0] for arm in ("torch.optim:SGD", "greedy:Greedy")]
    seen = sys.modules["global_batches"].SEEN
    assert len(seen) == 26, "twelve, and before them one to warm up with, for either"
    assert seen[1:13] == seen[14:]
    assert [v for _, v in curves[0]] == [v for _, v in curves[1]]
    assert len(set(seen[1:13])) == 12


def test_a_trial_is_training_as_one_writes_it(task: Path) -> None:
    """Against the same loop by hand: schedule, batches, steps."""
    import importlib.util

    import torch

    spec = importlib.util.spec_from_file_location("line_by_hand", task)
    module = importlib.util.module_from_spec(spec)  # pyright: ignore[reportArgumentType]
    spec.loader.exec_module(module)  # pyright: ignore[reportOptionalMemberAccess]
    torch.manual_seed(3)
    made = module.task(3, "cpu")
    optimizer = torch.optim.AdamW(made["model"].parameters(), lr=0.01)
    distances = []
    for step, batch in zip(range(12), made["batches"], strict=False):
        used = 1000 * step / 12
        warm = (used + 1) / 51 if used < 50 else 0.5 * (1 + math.cos(math.pi * (used - 50) / 950))
        optimizer.param_groups[0]["lr"] = 0.01 * warm
        optimizer.zero_grad()
        made["loss"](made["model"], batch).backward()
        optimizer.step()
        if step % 3 == 2:
            distances.append(made["evaluate"](made["model"])["distance"].item())
    curve, outcome = trial(task, "torch.optim:AdamW", 3)
    assert [values["distance"] for _, values in curve[1:]] == distances
    assert [at["step"] for at, _ in curve] == [0, 3, 6, 9, 12]
    assert outcome.values["distance"] == distances[-1]
    assert outcome.values["memory"] == pytest.approx((3 * 2 + 3 * 2 + 2) * 4 / 1e6), (
        "3 weights, gradients, 2 moments, 2 counts"
    )


def test_a_time_budget_counts_training_and_not_evaluation(tmp_path: Path, clock: Clock) -> None:
    """Each step reads the clock four times, which then has two seconds more of training."""
    slow = {'{"distance": (': '{"distance": time.sleep(7) or (', "import torch\n": "import time\nimport torch\n"}
    path = write(tmp_path, REGRESSION, "slow.py", replaced=slow)
    curve, outcome = trial(path, "torch.optim:SGD", budget={"seconds": 40})
    assert (outcome.values["seconds"], outcome.values["steps"]) == (40, 20)
    assert clock.now >= 40 + 5 * 7
    assert [at["used"] for at, _ in curve] == [0, 0.25, 0.5, 0.75, 1]
    assert (curve[2][0]["seconds"], curve[2][0]["step"]) == (20, 10)


def test_an_optimizer_that_needs_a_closure_gets_one(task: Path) -> None:
    _, outcome = trial(task, "torch.optim:LBFGS", lr=0.5)
    assert outcome.values["evaluations"] > outcome.values["steps"] == 12
    assert outcome.values["distance"] < 0.5


@pytest.mark.gpu
def test_a_trial_on_a_gpu(tmp_path: Path) -> None:
    import torch

    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    there = {
        "nn.Linear(2, 1)": "nn.Linear(2, 1).to(device)",
        "yield x[i], y[i]": "yield x[i].to(device), y[i].to(device)",
    }
    there["(model.weight - TRUTH)"] = "(model.weight - TRUTH.to(device))"
    path = write(tmp_path, REGRESSION, "gpu.py", replaced=there)
    (ours, on_gpu), (_, on_cpu) = trial(path, "torch.optim:SGD", device="cuda"), trial(path, "torch.optim:SGD")
    assert on_gpu.values["memory"] > 0
    assert on_gpu.values["distance"] == pytest.approx(on_cpu.values["distance"], rel=1e-4)
    timed, outcome = trial(path, "torch.optim:SGD", device="cuda", budget={"seconds": 0.2})
    assert 0.2 <= outcome.values["seconds"] < 0.3
    assert len(ours) == len(timed) == 5


@pytest.mark.parametrize("what", ["loss", "evaluation"])
def test_divergence_is_a_measurement(tmp_path: Path, what: str) -> None:
    blow = {
        ".norm()}": ".norm() * (1 if SEEN.append(0) or len(SEEN) < 3 else float('inf'))}",
        "TRUTH = ": "SEEN = []\nTRUTH = ",
    }
    path = write(tmp_path, REGRESSION, f"{what}.py", replaced=blow if what == "evaluation" else {})
    _, outcome = trial(path, "torch.optim:SGD", lr=1e30 if what == "loss" else 0.01)
    assert outcome.diverged
    assert outcome.message.startswith("training loss" if what == "loss" else "distance is inf")
    assert outcome.values["distance"] == math.inf


# ------------------------------------------------------------------------------------------------------ the store, resuming


@shared
def test_what_is_stored_is_not_run_again(small: Comparison, home: Path, task: Path) -> None:
    begun: list[Any] = []
    again = compare(task, ARMS, store=home, on_measurement=lambda *heard: begun.append(heard), **SMALL)
    assert begun == []
    assert again.to_json() == small.to_json()


@shared
def test_another_arm_or_seed_leaves_the_others_as_they_are(small: Comparison, home: Path, task: Path) -> None:
    ran: set[str] = set()
    more = compare(
        task, f"{ARMS},lion", store=home, on_measurement=lambda t, *_: ran.add(t.arm), **{**SMALL, "seeds": 5}
    )
    assert ran == {"lion"}
    before, after = small.task().rows, more.task().rows[:3]
    alone = [row.difference and replace(row.difference, adjusted=0.0, verdict="undecided", note="") for row in after]
    assert [replace(row, difference=d) for row, d in zip(after, alone, strict=True)] == [
        replace(row, difference=row.difference and replace(row.difference, adjusted=0.0, verdict="undecided", note=""))
        for row in before
    ], "but for the correction for the number of arms"
    longer: Counter[tuple[str, int]] = Counter()

    def note(t: Any, at: Any, values: Any) -> None:
        longer[t.arm, t.seed] += not at

    compare(task, ARMS, store=home, on_measurement=note, **{**SMALL, "seeds": 6})
    own = [5, FIRST_TUNING_SEED + 5]
    assert set(longer) == {(arm.text, seed) for arm in small.setup.arms for seed in own}


@shared
def test_a_change_of_the_task_counts_and_one_of_its_comments_does_not(
    small: Comparison, home: Path, task: Path, tmp_path: Path
) -> None:
    ran: list[Any] = []
    text = task.read_text()
    keywords = {**SMALL, "store": home, "on_measurement": lambda *heard: ran.append(heard)}
    compare(write(tmp_path, "# New.\n" + text), ARMS, **keywords)
    assert ran == [], "moved and commented"
    compare(write(tmp_path, text.replace("0.05", "0.06")), "adamw,adan", **{**keywords, "seeds": 1, "trials": 1})
    assert ran


@shared
def test_an_interrupted_comparison_asks_the_same_again(small: Comparison, task: Path, tmp_path: Path) -> None:
    class EnoughError(Exception):
        pass

    finished = 0

    def stop(_: Any, at: Any, __: Any) -> None:
        nonlocal finished
        finished += not at
        if finished == 11:
            raise EnoughError

    with pytest.raises(EnoughError):
        compare(task, ARMS, store=tmp_path, on_measurement=stop, **SMALL)
    with Store(tmp_path) as store:
        (run,) = {r.claim for r in store.runs()}
        kept = sum(r.done for r in store.runs())
    assert run == "compare-line"
    assert kept >= 10
    resumed = compare(task, ARMS, store=tmp_path, **SMALL)

    def points(comparison: Comparison) -> list[Any]:
        return sorted(
            (t.arm, t.purpose, t.seed, str(t.point), t.values["train_loss"])
            for t in comparison.task().result.trials
            if "train_loss" in t.values
        )

    assert points(resumed) == points(small), "with one worker or two, at once or in two parts"


def test_trials_stop_early_and_are_counted(tmp_path: Path, task: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hear = Search.heard

    def strict(self: Search, number: int, used: float, value: float) -> bool:
        hear(self, number, used, value)
        return number != 6 or used < 0.5

    monkeypatch.setattr(Search, "heard", strict)
    keywords = {**SMALL, "seeds": 1, "trials": 8}
    found = compare(task, "adamw,adan", store=tmp_path, **keywords)
    tuning = trials(found, "tuning")
    assert Counter(t.arm for t in tuning) == {"adamw": 8, "adan": 8}
    stopped = [t for t in tuning if t.message == "stopped early"]
    assert [t.arm for t in stopped] == ["adamw", "adan"]
    for t in stopped:
        assert t.curve[-1][0]["used"] == pytest.approx(0.6)
        assert t.values["validation"] == t.curve[-1][1]["validation"]
        assert t.point not in found.task().result.chosen["line"][t.arm]
    assert compare(task, "adamw,adan", store=tmp_path, **keywords).to_json() == found.to_json()


# ------------------------------------------------------------------------------------------------------------ what goes wrong


@pytest.mark.usefixtures("forked")
def test_a_trial_that_does_not_end_is_stopped_at_its_deadline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once it hangs the clock goes faster, so that no trial which is only slow comes to its deadline."""
    mark = tmp_path / "mark"
    hang = {
        '{"distance": (': f'{{"distance": seed == 2 and hang({str(mark)!r}) or (',
        "def task(": "def hang(mark):\n    open(mark, 'w').close()\n    time.sleep(6000)\n\n\ndef task(",
        "import torch\n": "import time\nimport torch\n",
    }
    path = write(tmp_path, REGRESSION, "hang.py", replaced=hang)
    real = time.monotonic
    clock = SimpleNamespace(monotonic=lambda: real() + 1e6 * mark.exists(), sleep=time.sleep)
    monkeypatch.setattr(sys.modules["polyak.lab.run"], "time", clock)
    monkeypatch.setattr(sys.modules["polyak.lab.run"], "Processes", Processes)
    arms = "adamw:lr=0.01:weight_decay=0,sgd:lr=0.01:weight_decay=0"
    with pytest.raises(TrialError, match=r"seed 2\n.*did not end, and was stopped at its deadline after 300 s"):
        compare(path, arms, store=tmp_path, deadline=300, **SMALL)
    with Store(tmp_path) as store:
        assert sum(r.done for r in store.runs()) >= 2, "finished trials are kept"


@pytest.mark.usefixtures("processes", "forked")
@pytest.mark.parametrize(
    ("instead", "deadline", "says"),
    [
        ("time.sleep(6000)", 1, r"odd_task.py: not ready after 1 s"),
        ("os._exit(5)", 300, r"odd_task.py: its process died with exit status 5"),
    ],
)
def test_a_task_that_does_not_end_or_kills_its_process_is_told(
    tmp_path: Path, instead: str, deadline: float, says: str
) -> None:
    path = write(tmp_path, REGRESSION, "odd_task.py", {"    g = ": f"    import os, time; {instead}\n    g = "})
    with pytest.raises(TaskError, match=says):
        compare(path, ARMS, store=tmp_path, deadline=deadline, **SMALL)


def test_arguments_are_checked(tmp_path: Path, task: Path) -> None:
    def refused(
        says: str, error: type[Exception] = ValueError, arms: str = ARMS, tasks: Any = task, **changes: Any
    ) -> None:
        with pytest.raises(error, match=says):
            compare(tasks, arms, store=tmp_path, **{**SMALL, **changes})

    refused("seeds must be at least 1, got 0", seeds=0)
    refused("trials must be at least 1, got 0", trials=0)
    refused("points must be at least 2, got 1", points=1)
    refused("deadline must be in \\(0", deadline=0)
    refused("device must be 'cpu', 'cuda' or 'cuda:N'", device="tpu")
    refused("budget must be a time for all", budget="soon")
    refused("budget for training is a time or a count like 500steps, got 20 evaluations", budget="20nfe")
    refused("budget is too small", budget="0.00001s")
    refused("baseline must be one of the arms .*; did you mean 'adamw'", baseline="adamww")
    refused("did you mean 'lion'", ArmError, arms="adamw,lionn")
    refused("no such file", TaskError, tasks=tmp_path / "none.py")
    sampling = write(tmp_path, SAMPLING, "sampling.py")
    refused("tasks must be alike", TaskError, tasks=[task, sampling])
    refused("budget for sampling is a time or a count like 20nfe", arms="ddim,heun", tasks=sampling)
    refused("no arm is called 'adamw'", ArmError, tasks=sampling)


def test_an_optimizer_that_cannot_train_the_task(tmp_path: Path) -> None:
    """It is told before the first trial has run."""
    (tmp_path / "odd.py").write_text(ODD)
    here = write(tmp_path, REGRESSION)

    def refused(arm: str, says: str) -> None:
        with pytest.raises(ArmError, match=says):
            compare(here, f"adamw,{arm}", store=tmp_path / "home", **SMALL)

    only = "MatricesOnly cannot be made: ValueError: 2D parameters only; if it is for matrices alone, name one for the rest: "
    refused("odd:MatricesOnly", f"arm 'odd:MatricesOnly': {only}odd:MatricesOnly:rest=adamw")
    refused("sgd:momentum=-1", "arm 'sgd:momentum=-1': SGD cannot be made: ValueError: Invalid momentum value: -1")
    refused("odd:Breaks", "arm 'odd:Breaks': a step of Breaks raised ZeroDivisionError: division by zero")
    refused(
        "odd:Nothing", "arm 'odd:Nothing': Nothing is no optimizer: it has no step and no zero_grad and no param_groups"
    )
    with Store(tmp_path / "home") as store:
        assert store.runs() == []


def test_samplers_are_tried_before_the_first_trial(tmp_path: Path) -> None:
    path = write(tmp_path, SAMPLING)
    with pytest.raises(ArmError, match=r"DPMSolver cannot draw on this task: ValueError: .*adaptive"):
        compare(path, "ddim,dpmsolver:method=adaptive", store=tmp_path, **{**SMALL, "budget": "10nfe"})


@pytest.mark.usefixtures("clock")
def test_samplers_with_a_budget_in_time(tmp_path: Path) -> None:
    """Of evaluations that take three seconds each."""
    slow = {
        "ExactDenoiser(law, VP())": "Slow(law, VP())",
        "def task(": "class Slow(ExactDenoiser):\n    def __call__(self, *given, **options):\n        time.sleep(3)\n"
        "        return super().__call__(*given, **options)\n\n\ndef task(",
        "import torch\n": "import time\nimport torch\n",
    }
    path = write(tmp_path, SAMPLING, "slow_sampling.py", slow)
    found = compare(path, "ddim,heun", store=tmp_path, **{**SMALL, "budget": "50s/trial", "seeds": 3})
    assert "at equal time" in found.answer
    assert found.save(tmp_path / "page.html").exists()
    # Eight evaluations and a reading of the clock: 25 seconds.
    assert [(row.spent, row.seconds) for row in found.task().rows] == [(16, 49), (16, 49)]


ODD = """
import torch


class MatricesOnly(torch.optim.SGD):
    def __init__(self, params, lr=0.1):
        params = list(params)
        if any(p.ndim != 2 for p in params):
            raise ValueError("2D parameters only")
        super().__init__(params, lr)


class Breaks(torch.optim.SGD):
    def step(self, closure=None):
        1 / 0


class Nothing:
    def __init__(self, params, lr=0.1):
        pass


class Frozen(torch.optim.SGD):
    def step(self, closure=None):
        pass


class TakesTheGradientThatIsThere(torch.optim.SGD):
    def step(self, closure=None):
        return super().step()


class Bare(torch.optim.SGD):
    def step(self):
        return super().step()
"""


def test_an_optimizer_may_leave_its_closure_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "odd_too.py").write_text(ODD)
    monkeypatch.syspath_prepend(str(tmp_path))
    path = write(tmp_path, REGRESSION)
    plain, outcome = trial(path, "torch.optim:SGD")
    for name in ("TakesTheGradientThatIsThere", "Bare"):
        curve, found = trial(path, f"odd_too:{name}")
        assert [v for _, v in curve] == [v for _, v in plain]
        assert found.values["evaluations"] == outcome.values["evaluations"] == 12


def test_an_optimizer_around_another(task: Path) -> None:
    """Against the same by hand."""
    options = {"fixed": {"base": "torch.optim:SGD", "base.momentum": 0.9, "inv_freq": 3}, "lr": 0.01}
    curve, outcome = trial(task, "polyak.optim:MKOR", **options)
    assert len(curve) == 5
    assert outcome.values["distance"] < curve[0][1]["distance"]
    import importlib.util

    import torch

    from polyak.lab.compare.task import SCHEDULES
    from polyak.optim import MKOR

    spec = importlib.util.spec_from_file_location("line_around", task)
    module = importlib.util.module_from_spec(spec)  # pyright: ignore[reportArgumentType]
    spec.loader.exec_module(module)  # pyright: ignore[reportOptionalMemberAccess]
    torch.manual_seed(0)
    made = module.task(0, "cpu")
    optimizer = MKOR(made["model"], torch.optim.SGD(made["model"].parameters(), lr=0.01, momentum=0.9), inv_freq=3)
    made["model"].train()
    for step in range(12):
        optimizer.param_groups[0]["lr"] = 0.01 * SCHEDULES["cosine"](step / 12 * 1000)
        optimizer.zero_grad()
        made["loss"](made["model"], next(made["batches"])).backward()
        optimizer.step()
    assert outcome.values["distance"] == pytest.approx(made["evaluate"](made["model"])["distance"].item(), abs=1e-12)


def test_an_arm_that_changes_nothing_is_doubted(tmp_path: Path) -> None:
    (tmp_path / "odd_three.py").write_text(ODD)
    found = compare(write(tmp_path, REGRESSION), "sgd:lr=0.1,odd_three:Frozen:lr=0.1", store=tmp_path, **SMALL)
    assert "Frozen (lr 0.1) never changes the distance: does its step() move the parameters?" in found.warnings


def test_what_a_task_stands_on_makes_trials_anew(tmp_path: Path) -> None:
    """A module beside it, data that it reads; and what nothing shows, on demand."""
    ran: Counter[bool] = Counter()

    def run(**options: Any) -> int:
        ran.clear()
        arms = ["sgd:lr=0.1:weight_decay=0", "adamw:lr=0.1:weight_decay=0"]
        hear = {"on_measurement": lambda t, at, v: ran.update([not at])}
        compare(tmp_path / "line.py", arms, store=tmp_path / "home", **{**SMALL, "seeds": 1, **hear, **options})
        return ran[True]

    outside = {"import torch\n": "import torch\nfrom pathlib import Path\n", "0.05 * torch": "NOISE * torch"}
    outside["TRUTH = "] = "NOISE = float((Path(__file__).parent / 'noise.txt').read_text())\nTRUTH = "
    outside["model = nn.Linear(2, 1)"] = "import a_helper; model = a_helper.make()"
    write(tmp_path, REGRESSION, replaced=outside)
    (tmp_path / "noise.txt").write_text("0.05")
    helper = tmp_path / "a_helper.py"
    helper.write_text("from torch import nn\ndef make():\n    return nn.Linear(2, 1)\n")
    sys.modules.pop("line", None)
    assert (run(), run()) == (2, 0)
    (tmp_path / "noise.txt").write_text("0.5")
    sys.modules["polyak.lab.compare.task"]._module.cache_clear()
    assert (run(), run()) == (2, 0)
    helper.write_text(helper.read_text() + "x = 1\n")
    assert (run(), run()) == (2, 0)
    assert (run(fresh=True), run()) == (2, 0)


def test_fresh_leaves_nothing_that_a_later_command_would_take_for_new(tmp_path: Path, task: Path) -> None:
    ran: Counter[tuple[str, int]] = Counter()

    def note(t: Any, at: Any, values: Any) -> None:
        ran[t.arm, t.seed] += not at

    arms = ["sgd:lr=0.1:weight_decay=0", "adamw:lr=0.1:weight_decay=0"]

    def run(arms: list[str], seeds: int, **options: Any) -> list[tuple[str, int]]:
        ran.clear()
        compare(task, arms, store=tmp_path, on_measurement=note, **{**SMALL, "seeds": seeds, **options})
        return sorted(ran)

    third = "adan:lr=0.1:weight_decay=0"
    assert len(run([*arms, third], 3)) == 9
    assert len(run(arms, 1, fresh=True)) == 2
    assert run([*arms, third], 3) == [(arm, seed) for arm in sorted(arms) for seed in (1, 2)]


def test_one_at_a_time_arms_take_turns(tmp_path: Path, task: Path) -> None:
    """A machine that slows down must not do so for the arm that comes last."""
    ended: list[Any] = []
    compare(
        task,
        "sgd:weight_decay=0,adamw:weight_decay=0",
        store=tmp_path,
        on_measurement=lambda t, at, v: None if at or t.purpose == "tuning" else ended.append(t.seed),
        **{**SMALL, "seeds": 3, "trials": 2},
    )
    assert ended == [0, 0, 1, 1, 2, 2]


@pytest.mark.usefixtures("clock")
def test_times_of_trials_beside_each_other_are_not_taken_for_those_of_trials_alone(tmp_path: Path, task: Path) -> None:
    ended: list[Any] = []
    keywords = {**SMALL, "budget": "20s/trial", "seeds": 1, "points": 2}
    for jobs, ran in ((2, 2), (2, 0), (None, 2), (1, 0)):
        ended.clear()
        found = compare(
            task,
            ["sgd:lr=0.1:weight_decay=0", "adamw:lr=0.1:weight_decay=0"],
            store=tmp_path,
            on_measurement=lambda t, at, v: None if at else ended.append(t),
            **{**keywords, "jobs": jobs},
        )
        assert len(ended) == ran
        assert found.setup.alone == (jobs != 2)


def test_a_deadline_leaves_time_for_what_the_task_takes() -> None:
    def limit(words: str, **seconds: float) -> float:
        return _deadline(parse(words, 1), Facts(kind="training", says="", better={}, **seconds), 20)

    assert limit("5s") == 60 + 4 * 5
    assert limit("5s", evaluating=10.0, building=3.0) == 60 + 4 * (5 + 21 * 10 + 3)
    assert limit("10steps") == 1800
    assert limit("100000steps", seconds=0.1) > 3 * 100_000 * 0.1


def test_what_is_no_file_is_told(tmp_path: Path, task: Path) -> None:
    with pytest.raises(TaskError, match=r"a task is a file, got a function: .* %%writefile task.py"):
        compare(lambda seed, device: {}, ARMS, store=tmp_path, **SMALL)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ArmError, match=r"arm '__main__:Mine': .* %%writefile mine.py\), and name it mine:Mine"):
        compare(task, "adamw,__main__:Mine", store=tmp_path, **SMALL)
    with pytest.raises(ValueError, match=r"budget must be a time for all .*, in words, got 300"):
        compare(task, ARMS, store=tmp_path, **{**SMALL, "budget": 300})
    with pytest.raises(ArmError, match="an arm is a name, module:Class, or a class, got 3"):
        compare(task, ["adamw", 3], store=tmp_path, **SMALL)  # pyright: ignore[reportArgumentType]


@pytest.mark.usefixtures("clock")
def test_a_changed_share_of_the_budget_is_told(tmp_path: Path, task: Path, caplog: pytest.LogCaptureFixture) -> None:
    short = {**SMALL, "seeds": 1, "points": 2}
    arms = ["sgd:lr=0.1:weight_decay=0", "adamw:lr=0.1:weight_decay=0"]
    compare(task, arms, store=tmp_path, **{**short, "budget": "60s"})
    assert not caplog.records
    compare(task, [*arms, "adan:lr=0.1:weight_decay=0"], store=tmp_path, **{**short, "budget": "60s"})
    [said] = [r.getMessage() for r in caplog.records]
    assert said == (
        "each trial now gets 20 s; stored ones got 30 s, and are not used (they are with a budget of 30s/trial)"
    )
    compare(task, [*arms, "lion:lr=0.1:weight_decay=0"], store=tmp_path, **{**short, "budget": "30s/trial"})
    assert len(caplog.records) == 1


def test_arms_may_be_beside_the_task_whatever_it_is_called(tmp_path: Path) -> None:
    path = write(tmp_path, REGRESSION, "random.py")
    (tmp_path / "own_optimizer.py").write_text("import torch\n\n\nclass Mine(torch.optim.SGD):\n    pass\n")
    arms = "sgd:lr=0.1:weight_decay=0,own_optimizer:Mine:lr=0.1:weight_decay=0"
    found = compare(path, arms, store=tmp_path, **{**SMALL, "seeds": 1, "trials": 1})
    theirs, mine = found.task().rows
    assert theirs.final == mine.final
    assert mine.label == "Mine (lr 0.1, weight_decay 0)"


def test_a_store_of_a_newer_polyak(tmp_path: Path, task: Path) -> None:
    Store(tmp_path).close()
    with sqlite3.connect(tmp_path / FILE) as db:
        db.execute(f"PRAGMA user_version = {SCHEMA + 1}")
    with pytest.raises(StoreError, match="written by a newer polyak"):
        compare(task, ARMS, store=tmp_path, **SMALL)


def test_a_full_disk_keeps_what_is_finished(tmp_path: Path, task: Path) -> None:
    with Store(tmp_path) as store:
        store._db.execute("PRAGMA max_page_count = 12")
        with pytest.raises(StoreError, match="the disk is full"):
            compare(task, ARMS, store=store, **SMALL)
        kept = sum(r.done for r in store.runs())
    assert kept > 0
    ran: Counter[bool] = Counter()
    compare(task, ARMS, store=tmp_path, on_measurement=lambda t, at, v: ran.update([not at]), **SMALL)
    assert ran[True] == 3 * 5 * (4 + 1) - kept


# -------------------------------------------------------------------------------------------------------------------- seams


class Recorder(InProcess):
    """Another place where trials run: what a cluster's executor has to be."""

    def __init__(self) -> None:
        super().__init__()
        self.started, self.closed = 0, False

    def start(self, ticket: int, job: Job) -> bool:
        self.started += 1
        return super().start(ticket, job)

    def close(self) -> None:
        self.closed = True
        super().close()


def test_trials_run_where_an_executor_runs_them(tmp_path: Path, task: Path) -> None:
    elsewhere = Recorder()
    found = compare(task, "adamw,sgd", store=tmp_path, executor=elsewhere, **{**SMALL, "seeds": 1, "trials": 2})
    assert elsewhere.closed
    assert elsewhere.started == 2 * (2 + 1) == len(found.task().result.trials)


def test_measurements_can_be_listened_to(tmp_path: Path, task: Path) -> None:
    heard: list[tuple[Any, Any, Any]] = []
    found = compare(
        task,
        "adamw:lr=0.01:weight_decay=0,sgd:lr=0.01:weight_decay=0",
        store=tmp_path,
        on_measurement=lambda *told: heard.append(told),
        **{**SMALL, "seeds": 1},
    )
    assert not trials(found, "tuning"), "nothing was left to tune"
    for t in trials(found, "report"):
        told = [(at, values) for planned, at, values in heard if planned.arm == t.arm]
        assert told == [*t.curve, ({}, t.values)]


def test_samplers(tmp_path: Path) -> None:
    path = write(tmp_path, SAMPLING, "sampling.py")
    found = compare(path, "ddim,heun,dpmsolver:order=1..3", store=tmp_path, **{**SMALL, "budget": "16nfe", "seeds": 5})
    row = {r.arm: r for r in found.task().rows}
    assert len({r.final for r in row.values()}) == 3
    assert {r.spent for r in row.values()} == {16}
    assert row["dpmsolver:order=1..3"].point["order"] in (2, 3)
    one = next(t for t in trials(found, "report") if t.arm == "ddim")
    assert [at["evaluations"] for at, _ in one.curve] == [2, 4, 8, 16]
    starts = {t.seed: t.values["off"] for t in trials(found, "report") if t.arm == "ddim"}
    assert len(set(starts.values())) == 5


def test_schedulers_of_a_pipeline(tmp_path: Path) -> None:
    pytest.importorskip("diffusers")
    # Both read the configuration as its own scheduler does: with DDIM's they would stop at different timesteps.
    path = write(tmp_path, PIPELINE, "pipe.py", {"DDIMScheduler": "DPMSolverMultistepScheduler"})
    arms = "DDIMScheduler,DPMSolverMultistepScheduler,dpmsolver:order=2:form=data:method=multistep"
    found = compare(path, arms, store=tmp_path, **{**SMALL, "budget": "9nfe", "seeds": 2})
    assert [r.spent for r in found.task().rows] == [9, 9, 9]
    ddim, theirs, ours = (r.final for r in found.task().rows)
    assert ours == pytest.approx(theirs, rel=1e-5), "one method, in diffusers' scheduler and in ours"
    assert abs(ddim - ours) > 1e-3
    assert {t.seed for t in trials(found, "report")} == {0, 1}


# ------------------------------------------------------------------------------------------------------- for other programs


@shared
def test_results_go_to_pandas_and_json(small: Comparison) -> None:
    table = small.to_pandas()
    assert list(table["arm"]) == ["adamw", "adan", "sgd:weight_decay=0"]
    assert table["verdict"][0] == "baseline"
    assert set(table["verdict"][1:]) <= {"better", "worse", "undecided"}
    assert table["lr"].notna().all()
    data = json.loads(json.dumps(small.to_json(), allow_nan=False))
    assert data["answer"] == small.answer
    assert len(data["tasks"][0]["result"]["trials"]) == 3 * 5 * (4 + 1)
    assert data["arms"][2]["fixed"] == {"weight_decay": 0}


@shared
def test_figures(small: Comparison) -> None:
    for what in ("curves", "sensitivity"):
        drawn = small.figure(what)
        assert {t.get_text().split()[0] for t in drawn.texts} >= {"AdamW", "Adan", "SGD"}
    with pytest.raises(ValueError, match="figure must be one of 'curves', 'sensitivity', 'profiles', got 'curve'"):
        small.figure("curve")


@shared
def test_a_notebook_shows_the_answer(small: Comparison) -> None:
    shown = small._repr_html_()
    assert small.answer in shown
    assert shown.count("<tr>") == 4
