"""``polyak compare`` and ``polyak init-task``, as commands."""

from __future__ import annotations

import json
import signal
from importlib import import_module
from pathlib import Path

import pytest

from polyak.cli import main
from polyak.cli.compare import _page
from polyak.lab import Store

from .lab.tasks_for_tests import REGRESSION, write

pytestmark = pytest.mark.usefixtures("in_process")

QUICK = ("--budget", "20steps", "--trials", "2", "--points", "4", "--jobs", "1")


@pytest.fixture
def call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setenv("POLYAK_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as stopped:
            main(arguments)
        code = stopped.value.code
        return (code if isinstance(code, int) else 0 if code is None else -1), *capsys.readouterr()

    return run


def test_from_an_example_to_a_page(call, tmp_path, monkeypatch) -> None:
    code, out, _ = call("init-task", "optim")
    assert code == 0
    assert "polyak compare task.py --arms adamw,adan,lion" in out
    code, out, err = call("init-task", "optim")
    assert (code, out) == (3, "")
    assert "task.py is there already; name another with --out" in err

    opened: list[str] = []
    monkeypatch.setattr("webbrowser.open", opened.append)
    code, out, err = call("compare", "task.py", "--arms", "adamw,adan,lion", "--seeds", "2", "--open", *QUICK)
    assert code == 0
    assert "2 seeds cannot decide anything: at least 3 can." in " ".join(out.split())
    assert "baseline" in out
    page = Path("polyak-report/compare-task-20steps.html")
    assert out.endswith(f"The page, with curves and all trials: {page}\n")
    assert opened == [(tmp_path / page).as_uri()]
    assert "18 of 18 trials, done" in err
    assert err.startswith("checking task.py\ntrying each arm on task.py\n")

    code, out, _ = call("compare", "task.py", "--arms", "adamw,adan,lion", "--seeds", "3", "--json", *QUICK)
    data = json.loads(out)
    assert code == 0
    assert [row["arm"] for row in data["table"]] == ["adamw", "adan", "lion"]
    assert [row["metric"] for row in data["table"]] == ["accuracy"] * 3

    code, out, _ = call("compare", "task.py", "--arms", "adamw,adan,lion", "--seeds", "3", *QUICK)
    assert out.endswith(f"The page, with curves and all trials: {page} (it replaces an earlier one)\n")


@pytest.mark.parametrize(
    ("tasks", "budget", "name"),
    [
        (["moons"], "10nfe", "compare-moons-10nfe.html"),
        (["moons"], " 20s/trial ", "compare-moons-20s-trial.html"),
        (["a", "b", "c", "d"], "1.5 m", "compare-a-b-c-1.5-m.html"),
    ],
)
def test_a_page_has_the_name_of_its_budget(tasks, budget, name) -> None:
    assert _page(tasks, budget) == Path("polyak-report", name)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--arms", "adamw,adan:wieght_decay=1"), "did you mean 'weight_decay'?"),
        (("--arms", "ddim,heun"), "no arm is called 'ddim'"),
        ((), "Missing option '--arms'"),
    ],
)
def test_a_wrong_command_says_what_is_allowed(call, tmp_path, monkeypatch, arguments, says) -> None:
    from polyak.lab.compare.examine import examine

    write(tmp_path, REGRESSION)
    main_module = __import__("polyak.lab.compare.main", fromlist=["main"])
    monkeypatch.setattr(main_module, "call_apart", lambda f, *given, timeout: examine(*given))
    code, out, err = call("compare", "line.py", *arguments)
    assert (code, out) == (2, "")
    assert says in " ".join(err.replace("│", " ").split())
    assert "Traceback" not in err


MILLION = "adamw," + "adan:weight_decay=0.01," * 40_000
OF_COMPARE = [
    (("--arms", "adamw,lionn"), "no arm is called 'lionn'; did you mean 'lion'?"),
    (("--arms", "ddim,huen"), "no arm is called 'huen'; did you mean 'heun'?"),
    (("--arms", MILLION), "arms must be at most 100,000 characters"),
    (("--arms", "adamw," + "adan," * 101), "there must be at most 100 arms to compare, got 102"),
    (("--arms", f"adamw,adan:betas={'(' * 2000}"), "an arm must be at most 1,000 characters"),
    (("--arms", f"adamw,adan:betas={'(' * 900}"), "betas must be a tuple"),
    (("--arms", f"adamw,sgd:lr=0.1..1{'0' * 400}"), "lr must be low..high, two numbers"),
    (("--arms", "adamw,sgd:lr=0.1..1e999"), "lr must be low..high, two numbers"),
    (("--budget", "5mm"), "budget must be a time for all"),
    (("--budget", f"{'9' * 400}h"), "budget must be at most 1e+09 s"),
    (("--budget", f"{'9' * 400}steps"), "budget must be a whole number of steps, from 1 to 1e+12"),
    (("--budget", "9" * 100_000), "budget must be a time for all"),
    (("--budget", "20nfe"), "budget for training is a time or a count like 500steps, got 20 evaluations"),
    (("--baseline", "lion"), "baseline must be one of the arms adamw, adan"),
    (("--deadline", "0s"), "--deadline must be a time such as 90s"),
    (("--deadline", "later"), "--deadline must be a time such as 90s"),
    (("--deadline", f"{'9' * 400}h"), "--deadline must be at most 1e+09 s"),
    (("--target", "inf"), "target must be finite, got inf"),
    (("--target", "nan"), "target must be finite, got nan"),
    (("--trials", "1001"), "--trials must be at most 1000, got 1001"),
    (("--points", "1"), "points must be at least 2, got 1"),
    (("--points", "10001"), "--points must be at most 10000"),
]
OF_BOTH = [
    (("--seeds", "0"), "--seeds must be at least 1, got 0"),
    (("--seeds", "20000"), "--seeds must be at most 1000, got 20000"),
    (("--seeds", f"1{'0' * 400}"), "--seeds must be at most 1000"),
    (("--jobs", "0"), "--jobs must be at least 1, got 0"),
    (("--jobs", "10000000"), "--jobs must be at most 4096"),
    (("--nproc-per-trial", "0"), "--nproc-per-trial must be at least 1"),
    (("--nproc-per-trial", "100000"), "--nproc-per-trial must be at most 1024"),
    (("--device", "gpu"), "got 'gpu'"),
    (("--cluster", "auto", "--gpus-per-trial", "inf"), "gpus must be finite, got inf"),
    (("--cluster", "auto", "--gpus-per-trial", "-1"), "gpus must be in [0, 1024], got -1"),
]


@pytest.mark.parametrize(("arguments", "says"), [*OF_COMPARE, *OF_BOTH], ids=lambda v: str(v)[:60])
def test_what_is_asked_for_is_understood_before_the_task_is_imported(call, tmp_path, arguments, says) -> None:
    """Its import may take minutes; and a wrong option is one line and status 2, never 1, which says that a claim fails."""
    (tmp_path / "job.py").write_text(f"open({str(tmp_path / 'imported')!r}, 'w')\nraise SystemExit(1)\n")
    given = arguments if "--arms" in arguments else ("--arms", "adamw,adan", *arguments)
    code, out, err = call("compare", "job.py", *given)
    assert (code, out) == (2, "")
    assert says in " ".join(err.replace("│", " ").split())
    assert "Traceback" not in err
    assert len(err) < 1500
    assert not (tmp_path / "imported").exists()


@pytest.mark.parametrize(("arguments", "says"), OF_BOTH, ids=lambda v: str(v)[:60])
def test_wrong_numbers_of_a_claims_run(call, arguments, says) -> None:
    code, out, err = call("reproduce", "dpm_solver", *arguments)
    assert (code, out) == (2, "")
    assert says in " ".join(err.replace("│", " ").split())
    assert "Traceback" not in err
    assert len(err) < 1500


def test_a_mistake_of_ours_is_no_claim_that_fails(call, monkeypatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise AssertionError("a mistake")

    monkeypatch.setattr(import_module("polyak.lab.run"), "run_many", broken)
    code, out, err = call("reproduce", "dpm_solver")
    assert (code, out) == (3, "")
    assert "AssertionError: a mistake" in err
    assert err.endswith("polyak: this is a mistake in polyak; please report it, with the lines above\n")


def test_a_task_that_cannot_be_used(call, tmp_path) -> None:
    write(tmp_path, REGRESSION, replaced={"import torch\n": "import torch\nimport nothing_like_this\n"})
    code, out, err = call("compare", "line.py", "--arms", "adamw,adan")
    assert (code, out) == (3, "")
    assert "polyak: line.py: importing it raised ModuleNotFoundError: No module named 'nothing_like_this'" in err
    code, _, err = call("compare", "nowhere.py", "--arms", "adamw,adan")
    assert code == 2
    assert "nowhere.py: there is no such file" in err
    code, _, err = call("compare", "line.py", "--arms", "adamw,", "adan")
    assert code == 2
    assert "separated by commas alone" in " ".join(err.replace("│", " ").split())
    code, _, err = call("init-task", "optimm")
    assert code == 2
    assert "did you mean 'optim'?" in err


def test_ctrl_c_keeps_what_is_finished(call, tmp_path) -> None:
    """The task sends it once a trial has ended: trials run in this process."""
    stop = (
        "def stop():\n    with Store.reader(Path('home')) or nullcontext() as store:\n"
        "        if store and any(r.done for r in store.runs()):\n            os.kill(os.getpid(), signal.SIGINT)\n\n\n"
    )
    lines = "import os, signal\nfrom contextlib import nullcontext\nfrom pathlib import Path\nfrom polyak.lab import Store\n"
    changes = {
        '{"distance": (': '{"distance": stop() or (',
        "def task(": f"{stop}def task(",
        "import torch\n": f"{lines}import torch\n",
    }
    write(tmp_path, REGRESSION, "interrupting.py", replaced=changes)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    try:
        code, out, err = call("compare", "interrupting.py", "--arms", "adamw,sgd", "--home", "home", *QUICK)
    finally:
        signal.signal(signal.SIGINT, before)
    assert (code, out) == (130, "")
    assert "Finished trials are kept" in err
    assert "Traceback" not in err
    with Store("home") as store:
        assert 1 <= sum(r.done for r in store.runs()) < 2 * 5 * 3
        assert store.in_flight() == []
