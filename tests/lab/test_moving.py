"""A store that goes to another machine and back: what is in the file, and that a run goes on where it stopped."""

from __future__ import annotations

import sqlite3
from dataclasses import replace
from pathlib import Path

import claims_for_tests as examples
import pytest

from polyak.lab import kept
from polyak.lab.moving import export, take_in
from polyak.lab.result import TrialResult
from polyak.lab.run import collect, run
from polyak.lab.store import Planned, Store
from polyak.lab.tuning import Plan

VERSIONS = {"python": "3.11.0", "torch": "2.10.0", "numpy": "2.0.0", "polyak": "0.1.0", "fingerprint": "abc"}


def planned(seed: int, **changes: object) -> Planned:
    facts = dict(claim="parabola", scale="small", task="bowl", arm="new", purpose="report", point={}, options={})
    return Planned(**{**facts, "seed": seed, "device": "cpu", "versions": VERSIONS, **changes})


def ended(trial: Planned, value: float) -> TrialResult:
    return TrialResult(
        task=trial.task,
        arm=trial.arm,
        seed=trial.seed,
        purpose=trial.purpose,
        point=trial.point,
        values={"loss": value},
        curve=(({"step": 1}, {"loss": 2.0}),),
        seconds=0.5,
    )


def put(store: Store, trial: Planned, value: float) -> None:
    assert store.claim_trial(trial) == "mine"
    store.finish(trial, ended(trial, value), {"system": "Linux"})


def test_finished_trials_travel_and_nothing_is_lost_or_doubled(tmp_path: Path) -> None:
    file = tmp_path / "deep" / "parcel"
    with Store(tmp_path / "here") as here, Store(tmp_path / "there") as there:
        put(here, planned(0), 0.5)
        put(here, planned(1), 0.25)
        assert here.claim_trial(planned(2)) == "mine"  # in flight: it stays
        here.note("compare-task", {"asked": 1})
        assert export(here, file) == 2
        put(there, planned(1), 0.75)  # the first result of a trial stays
        there.claim_trial(planned(0))
        there.fail(planned(0), "no memory")
        put(there, planned(3), 0.125)
        assert take_in(there, file) == (1, 2)
        found = there.results(planned(i) for i in range(4))
        values = {i: found[planned(i).digest].result.values["loss"] for i in (0, 1, 3)}
        assert values == {0: 0.5, 1: 0.75, 3: 0.125}
        assert there.results([planned(0)]) == here.results([planned(0)])
        assert [c.slug for c in there.comparisons()] == ["compare-task"]
        assert take_in(there, file) == (0, 2)
        assert export(here, file) == 2, "an exported file is written again"
    assert sorted(p.name for p in file.parent.iterdir()) == ["parcel"]


def test_some_claims_alone(tmp_path: Path) -> None:
    with Store(tmp_path / "here") as here, Store(tmp_path / "there") as there:
        put(here, planned(0), 0.5)
        put(here, planned(0, claim="other"), 0.5)
        here.note("compare-task", {"asked": 1})
        assert export(here, tmp_path / "parcel", claims=["other"]) == 1
        assert take_in(there, tmp_path / "parcel") == (1, 1)
        assert [r.claim for r in there.runs()] == ["other"]
        assert there.comparisons() == []


@pytest.mark.parametrize("content", [b"", b"words", None])
def test_what_is_no_exported_store_is_refused_and_kept(tmp_path: Path, content: bytes | None) -> None:
    file = tmp_path / "file"
    if content is None:
        database = sqlite3.connect(file)
        database.execute("CREATE TABLE trials (digest)")
        database.close()
    else:
        file.write_bytes(content)
    before = file.read_bytes()
    with Store(tmp_path / "here") as here:
        with pytest.raises(ValueError, match="no exported store"):
            take_in(here, file)
        with pytest.raises(ValueError, match="name another file"):
            export(here, file)
        with pytest.raises(ValueError, match="there is no file"):
            take_in(here, tmp_path / "missing")
    assert file.read_bytes() == before


def test_a_run_goes_on_elsewhere_and_its_result_is_read_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two seeds here, all on another machine with another Python: there the two are not run again here, and all are read here."""
    claim = examples.make()
    with Store(tmp_path / "here") as here, Store(tmp_path / "there") as there:
        few = run(claim, seeds=2, store=here, jobs=1)
        export(here, tmp_path / "parcel")
        take_in(there, tmp_path / "parcel")
        told: list[int] = []
        whole = run(claim, store=there, jobs=1, on_progress=lambda p: told.append(p.cached))
        assert told[0] == len(few.trials)
        export(there, tmp_path / "back")
        take_in(here, tmp_path / "back")
        assert kept.results(claim, here) == {"small": whole}
        monkeypatch.setattr("polyak.lab.versions.platform.python_version", lambda: "3.99.0")
        assert collect(claim, store=here) is None, "of the present versions there is none"
        assert kept.results(claim, here) == {"small": whole}, "what decides is the code"
        assert kept.results(claim, here, device="cuda") == {}
        assert kept.results(claim, here, processes=2) == {}
        other = replace(claim, part="polyak.core.schedules:Cosine")
        assert kept.results(other, here) == {}, "of other code nothing counts"


def test_results_of_this_machines_libraries_come_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    claim = examples.make()
    with Store(tmp_path / "here") as here:
        own = run(claim, store=here, jobs=1)
        monkeypatch.setattr("polyak.lab.versions.platform.python_version", lambda: "3.99.0")
        later = run(claim, store=here, jobs=1)
        assert later.versions["python"] == "3.99.0"
        assert kept.results(claim, here)["small"].versions["python"] == "3.99.0"
        monkeypatch.undo()
        assert kept.results(claim, here)["small"] == own
        made = {kept.made(r) for r in here.runs()}
        assert len(made) == 2
        assert isinstance(kept.loaded(claim, here, here.runs()[-1:]), Plan)
