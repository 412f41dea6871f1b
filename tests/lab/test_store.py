"""The store: what it keeps, who may have a trial in flight, and what it says where it cannot work."""

from __future__ import annotations

import math
import os
import sqlite3
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from polyak.lab.database import FILE, SCHEMA
from polyak.lab.result import TrialResult
from polyak.lab.store import Planned, Store, StoreError

MACHINE = {"system": "Linux", "processor": "a processor", "cores": "2", "accelerator": "none"}
VERSIONS = {"python": "3.11.7", "torch": "2.10.0", "numpy": "2.0.0", "polyak": "0.1.0", "fingerprint": "abc"}


def planned(seed: int = 0, **changes: Any) -> Planned:
    facts: dict[str, Any] = {
        "claim": "parabola",
        "scale": "small",
        "task": "parabola",
        "arm": "quick",
        "seed": seed,
        "purpose": "report",
        "point": {"lr": 0.1},
        "options": {"lr": 0.1, "steps": 10},
        "device": "cpu",
        "versions": VERSIONS,
    }
    return Planned(**{**facts, **changes})


def result_of(trial: Planned, loss: float = 0.5, letters: int = 0) -> TrialResult:
    return TrialResult(
        task=trial.task,
        arm=trial.arm,
        seed=trial.seed,
        purpose=trial.purpose,
        point=trial.point,
        values={"loss": loss},
        curve=(({"step": 0.0}, {"loss": 2.0}), ({"step": 1.0}, {"loss": math.nan})),
        seconds=1.5,
        message="x" * letters,
    )


def keep(store: Store, trial: Planned, **options: Any) -> TrialResult:
    assert store.claim_trial(trial) == "mine"
    result = result_of(trial, **options)
    store.finish(trial, result, MACHINE)
    return result


# -- what it keeps ---------------------------------------------------------------------------------------------------------


def test_results_come_back_as_they_were(tmp_path: Path) -> None:
    trial = planned()
    with Store(tmp_path) as store:
        result = replace(result_of(trial, loss=0.1 + 0.2), values={"loss": 0.1 + 0.2, "far": math.inf}, diverged=True)
        assert store.claim_trial(trial) == "mine"
        store.finish(trial, result, MACHINE)
    with Store(tmp_path) as store:
        stored = store.results([planned(1), trial])[trial.digest]
        assert store.claim_trial(trial) == "done"
    assert repr(stored.result) == repr(result)  # by their text: the NaN on the way equals nothing
    assert stored.machine == MACHINE
    assert stored.finished.endswith("+00:00")


def test_the_key_is_what_determines_the_result() -> None:
    trial = planned()
    changes: list[dict[str, Any]] = [
        {"claim": "other"},
        {"scale": "paper"},
        {"task": "other"},
        {"arm": "plain"},
        {"seed": 1},
        {"purpose": "tuning"},
        {"options": {"lr": 0.1, "steps": 11}},
        {"device": "NVIDIA H100"},
        *({"versions": {**VERSIONS, name: "9"}} for name in ("python", "torch", "numpy", "fingerprint")),
    ]
    assert len({planned(**change).digest for change in changes} | {trial.digest}) == len(changes) + 1
    same = planned(options={"steps": 10, "lr": 0.1}, versions={**VERSIONS, "polyak": "0.2.0"})
    assert same.digest == trial.digest


def test_options_that_are_no_data_are_refused() -> None:
    with pytest.raises(TypeError, match=r"must be numbers, strings.*got <object"):
        _ = planned(options={"x": object()}).digest


def test_runs_and_durations(tmp_path: Path) -> None:
    later = {**VERSIONS, "fingerprint": "def"}
    with Store(tmp_path) as store:
        for seed in range(3):
            keep(store, planned(seed))
        keep(store, planned(versions=later))
        store.claim_trial(planned(1, versions=later))
        store.fail(planned(1, versions=later), "a bug")
        store.claim_trial(planned(2, versions=later))
        keep(store, planned(claim="other"))
        runs = store.runs("parabola")
        assert [(r.versions["fingerprint"], r.done, r.failed, r.seconds) for r in runs] == [
            ("abc", 3, 0, 4.5),
            ("def", 1, 1, 1.5),
        ]
        assert {r.claim for r in store.runs()} == {"parabola", "other"}
        assert store.runs("none") == []
        assert store.durations("parabola", "small", "cpu") == {("parabola", "quick"): 1.5}


def test_many_results_at_once(tmp_path: Path) -> None:
    trials = [planned(seed) for seed in range(1200)]
    with Store(tmp_path) as store:
        for trial in (trials[0], trials[700], trials[1199]):
            keep(store, trial)
        assert [s.result.seed for s in store.results(trials).values()] == [0, 700, 1199]


def test_home_comes_from_the_environment_or_the_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POLYAK_HOME", str(tmp_path / "here"))
    with Store() as store:
        assert store.path == tmp_path / "here" / FILE
        assert store.path.exists()
    monkeypatch.delenv("POLYAK_HOME")
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    monkeypatch.setenv("HOME", str(tmp_path))
    with Store() as store:
        assert store.home.name == "polyak"
        assert tmp_path in store.home.parents


# -- trials in flight ------------------------------------------------------------------------------------------------------


def test_a_trial_in_flight_is_left_to_its_owner(tmp_path: Path) -> None:
    with Store(tmp_path) as one, Store(tmp_path) as two:
        assert one.claim_trial(planned()) == "mine"
        assert one.claim_trial(planned()) == "mine"
        assert two.claim_trial(planned()) == "elsewhere"
        assert two.claim_trial(planned(1)) == "mine"
        one.release(planned())
        assert two.claim_trial(planned()) == "mine"
        two.finish(planned(), result_of(planned()), MACHINE)
        assert one.claim_trial(planned()) == "done"


def test_closing_gives_up_what_is_in_flight_and_leaves_no_lock(tmp_path: Path) -> None:
    with Store(tmp_path) as one, Store(tmp_path) as two:
        assert one.claim_trial(planned()) == "mine"
        one.close()
        assert two.claim_trial(planned()) == "mine"
    assert list((tmp_path / "running").iterdir()) == []


def test_a_failed_trial_is_tried_again(tmp_path: Path) -> None:
    with Store(tmp_path) as store:
        store.claim_trial(planned())
        store.fail(planned(), "a bug")
        assert store.results([planned()]) == {}
        assert store.claim_trial(planned()) == "mine"
        assert store.runs() == []


def test_the_first_result_stays(tmp_path: Path) -> None:
    with Store(tmp_path) as store:
        keep(store, planned(), loss=1.0)
        store.finish(planned(), result_of(planned(), loss=2.0), MACHINE)
        store.release(planned())
        assert store.results([planned()])[planned().digest].result.values == {"loss": 1.0}


def test_the_trial_of_a_dead_process_is_taken_over(tmp_path: Path) -> None:
    code = """
import os, signal, sys
sys.path.insert(0, sys.argv[2])
from test_store import Store, planned
store = Store(sys.argv[1])
assert store.claim_trial(planned()) == "mine"
print("claimed", flush=True)
sys.stdin.read()
"""
    command = [sys.executable, "-c", code, str(tmp_path), str(Path(__file__).parent)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "claimed\n"
        with Store(tmp_path) as store:
            assert store.claim_trial(planned()) == "elsewhere"
            process.kill()
            process.wait()
            assert store.claim_trial(planned()) == "mine"


# -- what it says where it cannot work -------------------------------------------------------------------------------------


def test_a_newer_schema_is_refused(tmp_path: Path) -> None:
    Store(tmp_path).close()
    with sqlite3.connect(tmp_path / FILE) as db:
        db.execute(f"PRAGMA user_version = {SCHEMA + 1}")
    db.close()
    with pytest.raises(StoreError, match=r"newer polyak \(schema 2, this one knows 1\): update polyak"):
        Store(tmp_path)


def test_another_program_s_database_is_refused(tmp_path: Path) -> None:
    with sqlite3.connect(tmp_path / FILE) as db:
        db.execute("CREATE TABLE music (title TEXT)")
    db.close()
    with pytest.raises(StoreError, match="another program"):
        Store(tmp_path)


@pytest.mark.parametrize("damage", ["no database", "overwritten pages"])
def test_a_damaged_file_is_refused_and_says_what_to_do(tmp_path: Path, damage: str) -> None:
    with Store(tmp_path) as store:
        keep(store, planned())
    path = tmp_path / FILE
    if damage == "no database":
        path.write_bytes(b"this is no database " * 500)
    else:
        path.write_bytes(path.read_bytes()[:100] + os.urandom(path.stat().st_size - 100))
    before = path.read_bytes()
    with pytest.raises(StoreError, match="move it aside") as caught, Store(tmp_path) as store:
        store.results([planned()])
    assert str(path) in str(caught.value)
    assert path.read_bytes() == before
    path.rename(path.with_suffix(".aside"))
    with Store(tmp_path) as store:
        keep(store, planned())


def test_a_full_disk_loses_nothing_that_was_stored(tmp_path: Path) -> None:
    first, second = planned(0), planned(1)
    with Store(tmp_path) as store:
        keep(store, first)
        assert store.claim_trial(second) == "mine"
        pages = store._db.execute("PRAGMA page_count").fetchone()[0]
        store._db.execute(f"PRAGMA max_page_count = {pages}")  # SQLite's own way to meet SQLITE_FULL
        with pytest.raises(StoreError, match=r"the disk is full.*as it was") as caught:
            store.finish(second, result_of(second, letters=100_000), MACHINE)
        assert getattr(caught.value.__cause__, "sqlite_errorcode", None) == sqlite3.SQLITE_FULL
        assert list(store.results([first, second])) == [first.digest]
        store._db.execute("PRAGMA max_page_count = 1000000")
        store.finish(second, result_of(second, letters=100_000), MACHINE)
    with Store(tmp_path) as store:
        assert list(store.results([first, second])) == [first.digest, second.digest]


@contextmanager
def read_only(folder: Path) -> Iterator[None]:
    """A folder that this process may read and not write; root steps down to nobody, whom permissions bind."""
    for path in folder.iterdir():
        path.chmod(0o444)
    folder.chmod(0o555)
    root = os.geteuid() == 0
    try:
        if root:
            os.seteuid(65534)
        yield
    finally:
        if root:
            os.seteuid(0)
        folder.chmod(0o755)
        for path in folder.iterdir():
            path.chmod(0o644)


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="permissions are not POSIX's here")
def test_a_read_only_folder_is_refused_and_loses_nothing() -> None:
    with tempfile.TemporaryDirectory() as name:  # pytest's own folders are closed to other users
        folder = Path(name)
        with Store(folder) as store:
            keep(store, planned())
        with read_only(folder), pytest.raises(StoreError, match="set POLYAK_HOME to another folder"):
            Store(folder)
        with Store(folder) as store:
            assert list(store.results([planned()])) == [planned().digest]


def test_a_file_in_the_folder_s_place_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StoreError, match="set POLYAK_HOME to another folder"):
        Store(tmp_path / "file")


def test_the_file_that_becomes_read_only(tmp_path: Path) -> None:
    with Store(tmp_path) as store:
        keep(store, planned())
        store._db.execute("PRAGMA query_only = ON")  # from here on SQLite answers SQLITE_READONLY
        with pytest.raises(StoreError, match="make file and folder writable"):
            store.claim_trial(planned(1))
        assert list(store.results([planned()])) == [planned().digest]
