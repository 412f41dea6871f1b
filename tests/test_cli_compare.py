"""``polyak compare`` and ``polyak init-task``, as commands."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from polyak.cli import main
from polyak.cli.compare import _page

from .lab.tasks_for_tests import REGRESSION, write

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
        (("--arms", "adamw,lionn"), "no arm is called 'lionn'; did you mean 'lion'?"),
        (("--arms", "adamw,adan:wieght_decay=1"), "did you mean 'weight_decay'?"),
        (("--arms", "adamw,adan", "--budget", "soon"), "budget must be a time for all"),
        (("--arms", "adamw,adan", "--baseline", "lion"), "baseline must be one of the arms adamw, adan"),
        (("--arms", "adamw,adan", "--deadline", "later"), "--deadline must be a time such as 90s"),
        (("--arms", "adamw,adan", "--seeds", "0"), "must be at least 1, got 0"),
        (("--arms", "adamw,adan", "--jobs", "0"), "must be at least 1, got 0"),
        (("--arms", "adamw,adan", "--device", "gpu"), "got 'gpu'"),
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


def test_what_a_task_prints_does_not_get_into_the_data(tmp_path) -> None:
    write(tmp_path, REGRESSION, replaced={"import torch\n": "import torch\nprint('hello')\n"})
    command = [
        "import sys; from polyak.cli import main; main(sys.argv[1:])",
        "compare",
        "line.py",
        "--arms",
        "adamw,sgd",
    ]
    options = ["--json", "--seeds", "1", "--home", "home", *QUICK]
    done = subprocess.run([sys.executable, "-c", *command, *options], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert len(json.loads(done.stdout)["table"]) == 2
    assert "hello" in done.stderr


def test_ctrl_c_keeps_what_is_finished(tmp_path) -> None:
    slow = {'{"distance": (': '{"distance": time.sleep(0.2) or (', "import torch\n": "import time\nimport torch\n"}
    write(tmp_path, REGRESSION, replaced=slow)
    code = """
        import os, signal, sys, threading, time
        from polyak.cli import main
        from polyak.lab.store import Store

        def interrupt():
            while not any(r.done for r in Store("home").runs()):
                time.sleep(0.1)
            os.kill(os.getpid(), signal.SIGINT)

        if __name__ == "__main__":
            signal.signal(signal.SIGINT, signal.default_int_handler)
            threading.Thread(target=interrupt, daemon=True).start()
            main(["compare", "line.py", "--arms", "adamw,sgd", "--budget", "20steps", "--home", "home", "--jobs", "1"])
        """
    (tmp_path / "run.py").write_text(textwrap.dedent(code))
    done = subprocess.run([sys.executable, "run.py"], capture_output=True, text=True, cwd=tmp_path, env=os.environ)
    assert done.returncode == 130, done.stderr
    assert "Finished trials are kept" in done.stderr
    assert "Traceback" not in done.stderr
