"""The commands, on a catalogue of made-up systems that run in no time."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import cast

import pytest
from rich.console import Console

import polyak
from polyak import claims
from polyak.cli import main, terminal
from polyak.lab.report import Entry

from .lab.results_for_tests import optimizer_claim, optimizer_result
from .processor_time_for_tests import used

pytestmark = pytest.mark.usefixtures("in_process")

# Workers import trial functions by name, so that these are in a module of their own on sys.path.
TRIALS = '''
import os, signal, time
from polyak.lab.claim import Diverged, measure

class Part:
    """Made up."""

def trial(trial):
    if trial["how"] == "break" and trial.arm == "new":
        raise RuntimeError("the wheels came off")
    if trial["how"] == "hang":
        open("hanging", "w").close()
        time.sleep(6000)
    if trial["how"] == "diverge" and trial.arm == "new" and trial.seed == trial["last"]:
        raise Diverged("too fast")
    gain = {"holds": 0.2, "fails": 1.7, "mixed": 0.2 + 1.5 * (trial.seed % 2)}.get(trial["how"], 0.2)
    loss = 1 + trial.seed / 100
    yield measure({"step": 1}, loss=2.0)
    yield measure(loss=loss if trial.arm == "old" else gain * loss)
'''
CLAIM = """
import toy_trials
from polyak.lab.claim import Arm, Claim, Criterion, Metric, Paper, Plot, Scale, Task

CLAIM = Claim(
    slug="{slug}", room="{room}", name="{slug}".title(), summary="A made-up system [with brackets].",
    says="New is better.", paper=Paper(title="On toys", year=2024, arxiv="2401.00001"), part="toy_trials:Part",
    budget="steps", trial=toy_trials.trial, tasks=(Task(name="t", label="Toy", plots=(Plot(x="step", y="loss"),)),),
    arms=(Arm(name="old", label="Old", role="baseline"), Arm(name="new", label="New", role="method")),
    scales=(Scale(name="small", says="Instant.", seeds=5, options={{"how": "{how}", "last": 4}}),),
    metrics=(Metric(name="loss", label="loss"),),
    criteria=(
        Criterion(
            name="half", says="New halves the loss", kind="effect", task="t", metric="loss", arm="new", against="old", bound=0.5,
        ),
    ),
)
"""
SYSTEMS = {
    "good": ("toys", "holds"),
    "bad": ("toys", "fails"),
    "mixed": ("games", "mixed"),
    "broken": ("games", "break"),
}


def add_claim(rooms: Path, slug: str, room: str, how: str) -> None:
    folder = rooms / room
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "__init__.py").touch()
    (folder / f"{slug}.py").write_text(CLAIM.format(slug=slug, room=room, how=how))


@pytest.fixture
def rooms(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A catalogue of made-up systems in place of polyak's, and a store of its own."""
    folder, modules = tmp_path / "rooms", tmp_path / "modules"
    modules.mkdir()
    (modules / "toy_trials.py").write_text(TRIALS)
    for slug, (room, how) in SYSTEMS.items():
        add_claim(folder, slug, room, how)
    monkeypatch.syspath_prepend(str(modules))
    monkeypatch.setattr(claims, "__path__", [str(folder)])
    monkeypatch.setenv("POLYAK_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    yield folder
    for name in list(sys.modules):
        if name == "toy_trials" or name.startswith(("polyak.claims.toys", "polyak.claims.games")):
            del sys.modules[name]


@pytest.fixture
def call(rooms, capsys):
    def run(*arguments: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as stopped:
            main(arguments)
        code = stopped.value.code
        return (code if isinstance(code, int) else 0 if code is None else -1), *capsys.readouterr()

    return run


def in_new_process(code: str, modules: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Beside ``modules`` it finds the code that this process runs, wherever that is installed."""
    places = [modules, Path(polyak.__file__).parents[1]]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(str(place) for place in places if place)}
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, env=environment
    )


# --------------------------------------------------------------------------------------------------------------- list, show


def test_list_shows_every_system(call):
    code, out, _ = call("list")
    assert code == 0
    assert [line.split()[0] for line in out.splitlines() if "made-up" in line] == ["broken", "mixed", "bad", "good"]
    assert out.count("– not run") == 2 * 4
    assert "[with brackets]" in out


def test_list_filters(call):
    code, out, _ = call("list", "--room", "toys", "--json")
    assert code == 0
    assert [s["slug"] for s in json.loads(out)] == ["bad", "good"]
    assert json.loads(call("list", "--status", "holds", "--json")[1]) == []
    assert len(json.loads(call("list", "--status", "not-run", "--json")[1])) == 4
    assert "No system" in call("list", "--status", "holds")[1]


def test_show_says_what_must_be_true(call):
    out = " ".join(call("show", "good")[1].split())
    asked = "loss, ratio: New ÷ Old: at most 0.5, the mean over seeds, on Toy"
    assert f"Criteria of effect New halves the loss {asked} Arms" in out
    [criterion] = json.loads(call("show", "good", "--json")[1])["criteria"]
    assert (criterion["asks"], criterion["kind"], criterion["bound"]) == (asked, "effect", 0.5)


def test_listing_makes_no_store(call, tmp_path):
    call("list")
    call("show", "good")
    assert not (tmp_path / "home").exists()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("show", "goood"), "did you mean 'good'"),
        (("reproduce", "good", "baad"), "did you mean 'bad'"),
        (("report", "zzz"), "`polyak list` shows all"),
        (("list", "--room", "toy"), "did you mean 'toys'"),
        (("list", "--status", "hold"), "'holds', 'fails', 'undecided', 'not-run', got 'hold'; did you mean 'holds'"),
        (("reproduce", "good", "--scale", "smal"), "must be one of 'small', got 'smal'; did you mean 'small'"),
        (("reproduce", "good", "--device", "gpu"), "'cpu', 'cuda' or 'cuda:N', got 'gpu'"),
        (("reproduce", "good", "--seeds", "0"), "must be at least 1, got 0"),
        (("reproduce", "good", "--jobs", "0"), "must be at least 1, got 0"),
        (("reproduce",), "--all"),
        (("reproduce", "good", "--all"), "--all"),
        (("record",), "SLUG"),
        (("lisst",), "lisst"),
    ],
)
def test_a_wrong_command_says_what_is_allowed(call, arguments, says):
    code, out, err = call(*arguments)
    assert (code, out) == (2, "")
    assert says in " ".join(err.split())
    assert "Traceback" not in err


def test_show(call):
    code, out, _ = call("show", "good")
    assert code == 0
    for text in ("New is better.", "On toys (2024)", "from toy_trials import Part", "New halves the loss", "not run"):
        assert text in out
    facts = json.loads(call("show", "good", "--json")[1])
    assert facts["paper"]["url"] == "https://arxiv.org/abs/2401.00001"
    assert facts["usage"] == ["from toy_trials import Part", "help(Part)"]
    assert facts["result"] is None


def test_version_and_help(call):
    assert call("--version")[1] == f"polyak {polyak.__version__}\n"
    code, out, _ = call("reproduce", "--help")
    assert code == 0
    assert "is undecided" in out
    assert "0 if all claims hold or are undecided" in " ".join(out.split())


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["list"], ["show", "good"], ["reproduce", "--help"]])
def test_reading_imports_nothing_heavy(rooms, arguments):
    code = f"""
        import sys
        import polyak.claims
        polyak.claims.__path__ = [{str(rooms)!r}]
        from polyak.cli import main
        try:
            main({arguments!r})
        except SystemExit as stopped:
            print(stopped.code, [m for m in ("torch", "matplotlib", "numpy", "scipy", "optuna", "jinja2") if m in sys.modules])
        """
    done = in_new_process(code, rooms.parent / "modules")
    assert done.stderr == ""
    assert done.stdout.splitlines()[-1] == "0 []"


def test_reading_starts_fast(rooms):
    code = f"""
        import polyak.claims
        polyak.claims.__path__ = [{str(rooms)!r}]
        from polyak.cli import main
        main(["list"])
        """

    def spent() -> float:
        """Processor time: a busy machine must not fail the test."""
        began = used()
        assert in_new_process(code, rooms.parent / "modules").returncode == 0
        return used() - began

    assert any(spent() < 0.5 for _ in range(5))


@pytest.mark.parametrize("missing", ["typer", "rich"])
def test_without_the_extra_one_line_says_what_to_install(missing):
    done = in_new_process(f"import sys; sys.modules[{missing!r}] = None; from polyak.cli import main; main(['list'])")
    assert done.returncode == 3
    assert done.stderr.count("\n") == 1
    assert "pip install 'polyak[lab]'" in done.stderr


# ---------------------------------------------------------------------------------------------------------------- reproduce


def test_a_run_of_few_seeds_does_not_send_to_the_report(call):
    _, out, _ = call("reproduce", "good", "--jobs", "1", "--seeds", "2")
    assert "polyak report" not in out
    assert "A report needs all seeds of the scale: run good without --seeds." in out


def test_reproduce_a_claim_that_holds(call):
    code, out, err = call("reproduce", "good", "--jobs", "1")
    assert code == 0
    assert out.startswith("Good at scale small, on 5 seeds\nmechanism: – not asked\neffect: ✓ holds, 1 of 1\n")
    assert "New halves the loss" in out
    assert "0.2 to 0.2" in out
    assert "5 of 5" in out
    assert "polyak report good" in out
    assert "10 of 10 trials" in err
    listed = {s["slug"]: s for s in json.loads(call("list", "--json")[1])}
    assert (listed["good"]["verdict"], listed["good"]["published"]) == ("holds", False)
    assert listed["good"]["verdicts"] == {"effect": {"verdict": "holds", "met": 1, "of": 1}}
    assert "effect: ✓ holds, 1 of 1" in call("show", "good")[1]
    assert "10 of them before" in call("reproduce", "good")[2]


def test_reproduce_exit_status(call):
    assert call("reproduce", "good", "bad", "--jobs", "1")[0] == 1
    code, out, _ = call("reproduce", "mixed", "--jobs", "1")
    assert code == 0
    assert out.startswith("Mixed at scale small, on 5 seeds\nmechanism: – not asked\neffect: ? undecided, 0 of 1\n")
    assert call("reproduce", "mixed", "--strict")[0] == 1
    assert call("reproduce", "good", "--strict")[0] == 0


def test_reproduce_json_is_all_that_stdout_holds(call, tmp_path):
    code, out, _ = call("reproduce", "good", "--json", "--jobs", "1", "--home", str(tmp_path / "elsewhere"))
    record = json.loads(out)["good"]
    assert code == 0
    assert (record["verdict"], record["verdicts"]["effect"]["met"]) == ("holds", 1)
    assert (record["criteria"][0]["kind"], record["criteria"][0]["seeds_passing"]) == ("effect", 5)
    assert "trials" not in record
    assert (tmp_path / "elsewhere").exists()
    assert not (tmp_path / "home").exists()


def test_diverged_trials_are_told(call, rooms):
    add_claim(rooms, "wild", "toys", "diverge")
    code, out, _ = call("reproduce", "wild", "--jobs", "1")
    assert code in (0, 1)
    assert "1 reported trial diverged" in out
    assert "∞" in out


def test_a_trial_that_cannot_run(call):
    code, out, err = call("reproduce", "broken", "--jobs", "1")
    assert (code, out) == (3, "")
    assert "polyak: broken: could not run" in err
    assert "RuntimeError: the wheels came off" in err
    assert "Traceback" not in err
    assert "Traceback" in call("reproduce", "broken", "--jobs", "1", "--verbose")[2]


def test_a_damaged_store(call, tmp_path):
    home = tmp_path / "home"
    home.mkdir()
    (home / "polyak.sqlite3").write_bytes(b"no database at all" * 100)
    for arguments in (("list",), ("reproduce", "good"), ("report",)):
        code, out, err = call(*arguments)
        assert (code, out) == (3, "")
        assert "polyak.sqlite3" in err
        assert "Traceback" not in err


def test_ctrl_c_keeps_what_is_finished(rooms, tmp_path):
    """In the middle of a trial."""
    add_claim(rooms, "slow", "toys", "hang")
    code = f"""
        import os, signal, threading, time
        import polyak.claims
        from polyak.cli import main

        def interrupt():
            while not os.path.exists("hanging"):
                time.sleep(0.02)
            os.kill(os.getpid(), signal.SIGINT)

        polyak.claims.__path__ = [{str(rooms)!r}]
        if __name__ == "__main__":
            signal.signal(signal.SIGINT, signal.default_int_handler)
            threading.Thread(target=interrupt, daemon=True).start()
            main(["reproduce", "slow", "--jobs", "1"])
        """
    done = in_new_process(code, rooms.parent / "modules")
    assert done.returncode == 130
    assert "Finished trials are kept" in done.stderr
    assert "Traceback" not in done.stderr


# -------------------------------------------------------------------------------------------------- report, record, scoreboard


def test_report(call, tmp_path):
    call("reproduce", "good", "--jobs", "1")
    code, out, err = call("report", "--out", "pages")
    assert (code, err) == (0, "")
    assert out == f"The report: {Path('pages/index.html')}\n"
    assert {p.name for p in (tmp_path / "pages").iterdir()} == {
        "gallery.html",
        "index.html",
        *(f"{slug}.html" for slug in SYSTEMS),
    }
    page = (tmp_path / "pages/good.html").read_text()
    assert "<title>Good: effect holds, 1 of 1</title>" in page
    assert page.count('<svg class="curves"') == 1


def test_report_of_some(call, tmp_path, monkeypatch):
    opened = []
    monkeypatch.setattr("webbrowser.open", opened.append)
    code, _, err = call("report", "bad", "--out", "pages", "--open")
    assert code == 0
    assert "bad has not been run: polyak reproduce bad" in err
    assert {p.name for p in (tmp_path / "pages").iterdir()} == {"gallery.html", "index.html", "bad.html"}
    assert 'href="good.html"' not in (tmp_path / "pages/index.html").read_text()
    assert opened == [(tmp_path / "pages/bad.html").as_uri()]


def test_a_report_that_cannot_be_written(call, tmp_path):
    (tmp_path / "pages").write_text("in the way")
    code, _, err = call("report", "--out", "pages")
    assert code == 3
    assert "pages" in err


@pytest.fixture
def checkout(tmp_path, monkeypatch) -> Path:
    root = tmp_path / "checkout"
    root.mkdir()
    (root / "pyproject.toml").touch()
    (root / "README.md").write_text("# polyak\n<!-- systems -->\nold\n<!-- /systems -->\nMore.\n")
    monkeypatch.setattr("polyak.cli.shared.CHECKOUT", root)
    return root


def test_record_publishes(call, checkout, rooms, tmp_path):
    code, _, err = call("record", "good")
    assert code == 3
    assert "no complete run of good at scale small" in err
    assert call("scoreboard", "--check")[0] == 1

    call("reproduce", "good", "--jobs", "1")
    code, out, _ = call("record", "good")
    assert (code, out) == (0, "good: effect holds, 1 of 1\n")
    record = json.loads((rooms / "toys/good.small.verdict.json").read_text())
    assert record["verdict"] == "holds"
    assert "✓ holds" in (checkout / "SCOREBOARD.md").read_text()
    readme = (checkout / "README.md").read_text()
    assert readme.startswith("# polyak\n<!-- systems -->\n### games\n\n| slug |")
    assert readme.endswith("<!-- /systems -->\nMore.\n")
    assert call("scoreboard", "--check") == (0, "", "")

    # With another store the published verdict is what is known.
    listed = {s["slug"]: s for s in json.loads(call("list", "--home", str(tmp_path / "empty"), "--json")[1])}
    assert (listed["good"]["verdict"], listed["good"]["published"]) == ("holds", True)
    assert "(published)" in call("list", "--home", str(tmp_path / "empty"))[1]
    assert "published" in call("show", "good", "--home", str(tmp_path / "empty"))[1]

    (checkout / "SCOREBOARD.md").write_text("tampered")
    code, _, err = call("scoreboard", "--check")
    assert code == 1
    assert "SCOREBOARD.md" in err
    assert call("scoreboard")[0] == 0
    assert call("scoreboard", "--check")[0] == 0


def test_record_writes_nothing_where_the_readme_has_no_place(call, checkout, rooms):
    (checkout / "README.md").write_text("# polyak\n")
    call("reproduce", "good", "--jobs", "1")
    code, _, err = call("record", "good")
    assert code == 3
    assert "<!-- systems -->" in err
    assert not (rooms / "toys/good.small.verdict.json").exists()


def test_a_store_travels_as_one_file(call, tmp_path):
    parcel, other = str(tmp_path / "parcel"), str(tmp_path / "other")
    code, _, err = call("export", parcel)
    assert code == 3
    assert "there is no store" in err
    call("reproduce", "good", "--jobs", "1")
    code, out, _ = call("export", parcel, "good")
    assert code == 0
    trials = int(re.match(r"(\d+) trials written", out)[1])
    assert call("import", parcel, "--home", other)[1] == f"{trials} trials in {parcel}, {trials} of them new here\n"
    listed = {s["slug"]: s for s in json.loads(call("list", "--home", other, "--json")[1])}
    assert listed["good"]["by_scale"]["small"]["effect"]["verdict"] == "holds"
    code, _, err = call("import", str(tmp_path / "missing"))
    assert code == 2
    assert "there is no file" in err
    assert call("export", parcel, "nothing")[0] == 2


def test_record_needs_a_checkout(call, tmp_path, monkeypatch):
    monkeypatch.setattr("polyak.cli.shared.CHECKOUT", tmp_path / "site-packages")
    code, _, err = call("record", "good")
    assert code == 3
    assert "checkout" in err


def test_results_fit_a_narrow_terminal(call, monkeypatch):
    call("reproduce", "good", "--jobs", "1")
    for width in ("60", "80", "100", "120"):
        monkeypatch.setattr("polyak.cli.terminal.PIPE_WIDTH", int(width))
        lines = call("show", "good")[1].splitlines()
        assert max(map(len, lines)) <= int(width)
        row = next(line for line in lines if "New halves the loss" in line and "✓ holds" in line)
        assert "5 of 5" in (row if width != "60" else " ".join(lines[lines.index(row) :]))


def test_the_list_fits_a_narrow_terminal(call, rooms, monkeypatch):
    long = "a_slug_of_thirty_characters_yes"
    add_claim(rooms, long, "toys", "holds")
    call("reproduce", "good", "--jobs", "1")
    for width in (60, 80, 100, 120):
        monkeypatch.setattr("polyak.cli.terminal.PIPE_WIDTH", width)
        out = call("list")[1]
        assert max(map(len, out.splitlines())) <= width
        for slug, verdict in (("good", "✓ holds, 1 of 1"), (long, "– not run")):
            between = ".*" if width >= 100 else r".*\n.*\n mechanism – not .*\n effect +"
            assert re.search(rf"^ {slug} {between}{verdict} ", out, flags=re.MULTILINE)
        assert "…" not in out
        assert out.count("toys") == 3


def test_a_published_verdict_says_so_in_any_width():
    entry = Entry(optimizer_claim(), optimizer_result(optimizer_claim()), published=True)
    for width in (60, 120):
        out = Console(file=io.StringIO(), width=width)
        out.print(terminal.listing([entry], width))
        assert cast(io.StringIO, out.file).getvalue().count("(published)") == 1
