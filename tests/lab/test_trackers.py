"""Mirrors of measurements: read back, where the libraries are installed; a tracker that fails stops nothing."""

from __future__ import annotations

import sys
import threading
import types
from pathlib import Path
from typing import Any

import claims_for_tests as examples
import pytest

from polyak.cli import main
from polyak.lab import Store, TrialError, run, trackers
from polyak.lab.result import ClaimResult, TrialResult
from polyak.lab.store import Planned


@pytest.fixture(autouse=True)
def _trackers_have_all_the_time_they_need(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trackers, "_CLOSE_S", 3000.0)


def mirrored(tmp_path: Path, track: Any, claim: Any = None, **options: Any) -> ClaimResult:
    with Store(tmp_path / "home") as store:
        return run(claim or examples.slow(seeds=2, sleep=0.0), store=store, track=track, jobs=2, **options)


def losses(trial: TrialResult) -> list[tuple[int, float]]:
    return [(int(at["step"]), values["loss"]) for at, values in trial.curve]


class Recorder:
    """A tracker that keeps what it is told, and fails where it is told to."""

    name = "recorder"

    def __init__(self, fails: str = "", until: threading.Event | None = None) -> None:
        self.told: list[tuple[Any, ...]] = []
        self.fails, self.until, self.calls = fails, until, 0

    def _take(self, what: str, *arguments: Any) -> None:
        self.calls += 1
        if self.until is not None:
            self.until.wait()
        if what == self.fails:
            raise ConnectionError("the network is down")
        self.told.append((what, *arguments))

    def begin(self, trial: Planned) -> None:
        self._take("begin", trial.label)

    def measured(self, trial: Planned, at: Any, values: Any) -> None:
        self._take("measured", trial.label, dict(at), dict(values))

    def end(self, trial: Planned, status: Any, values: Any, message: str) -> None:
        self._take("end", trial.label, status, dict(values), message)

    def close(self) -> None:
        self._take("close")


# -- what trackers are told ------------------------------------------------------------------------------------------------


def test_a_trial_is_told_from_beginning_to_end(tmp_path: Path) -> None:
    recorder = Recorder()
    result = mirrored(tmp_path, recorder)
    assert recorder.told[-1] == ("close",)
    for trial in result.trials:
        label = f"{trial.arm} on parabola, seed {trial.seed}"
        told = [t for t in recorder.told[:-1] if t[1] == label]
        measured = [("measured", label, dict(at), dict(values)) for at, values in trial.curve]
        assert told == [("begin", label), *measured, ("end", label, "done", dict(trial.values), "")]
    again = Recorder()
    mirrored(tmp_path, again)
    assert again.told == [("close",)], "what is stored is not mirrored again"


@pytest.mark.usefixtures("processes")
def test_how_trials_end(tmp_path: Path) -> None:
    def ends(how: str, **more: Any) -> list[tuple[str, str]]:
        recorder = Recorder()
        try:
            mirrored(tmp_path, recorder, examples.bad(how, seeds=2, **more))
        except TrialError:
            assert how == "raise"
        return [
            (t[2], t[4].strip().splitlines()[-1]) for t in recorder.told if t[0] == "end" and "quick" in t[1] and t[4]
        ]

    assert ends("diverge") == [("diverged", "too big")]
    assert ends("raise") == [("failed", "RuntimeError: a bug in the trial")]
    [(status, why)] = ends("die once", mark=str(tmp_path / "mark"))
    assert (status, why.partition(" with ")[0]) == ("killed", "its process died")


@pytest.mark.usefixtures("processes")
def test_interrupted_trials_are_told_so(tmp_path: Path) -> None:
    recorder = Recorder()

    def interrupt(progress: Any) -> None:
        if progress.done == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        mirrored(tmp_path, recorder, examples.slow(seeds=4, sleep=0.2), on_progress=interrupt)
    begun = {t[1] for t in recorder.told if t[0] == "begin"}
    ended = {t[1]: t[2] for t in recorder.told if t[0] == "end"}
    assert begun == ended.keys()
    assert "killed" in ended.values()


@pytest.mark.parametrize("fails", ["begin", "measured", "end", "close"])
def test_a_tracker_that_fails_warns_once_and_stops_nothing(tmp_path: Path, fails: str) -> None:
    failing, sound = Recorder(fails), Recorder()
    with pytest.warns(
        UserWarning, match="recorder failed.*ConnectionError: the network is down.*the run goes on"
    ) as caught:
        result = mirrored(tmp_path, [failing, sound])
    assert len([w for w in caught if "recorder failed" in str(w.message)]) == 1
    assert len(result.trials) == 4
    assert len([t for t in sound.told if t[0] == "end"]) == 4
    if fails == "begin":
        assert failing.calls == 1


def test_a_slow_tracker_holds_nothing_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that takes nothing in, until all is over."""
    monkeypatch.setattr(trackers, "_CLOSE_S", 0.2)
    over, before = threading.Event(), {*threading.enumerate()}  # compiled code that other tests ran keeps threads
    with pytest.warns(UserWarning, match="has not taken all measurements in time"):
        result = mirrored(tmp_path, Recorder(until=over))
    assert len(result.trials) == 4
    for thread in {*threading.enumerate()} - before:
        assert thread.daemon or thread is threading.main_thread() or "polyak" not in thread.name
    over.set()


def test_names_and_missing_libraries(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ValueError, match="did you mean 'tensorboard'"):
        trackers.make("tensorbord")
    for name in ("tensorboard", "mlflow", "wandb"):
        monkeypatch.setitem(sys.modules, name, None)
        with pytest.raises(trackers.TrackerError, match=rf"pip install 'polyak\[{name}\]'"):
            trackers.make(name)

    def status(track: str) -> int:
        with pytest.raises(SystemExit) as left:
            main(["reproduce", "lion", "--track", track, "--home", str(tmp_path)])
        return int(left.value.code or 0)

    assert status("wandb") == 3
    assert "pip install 'polyak[wandb]'" in capsys.readouterr().err
    assert status("nosuch") == 2


# -- TensorBoard -----------------------------------------------------------------------------------------------------------


def test_tensorboard_is_read_back(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = tmp_path / "runs"
    result = mirrored(tmp_path, f"tensorboard:{folder}")
    found = list(folder.rglob("events.out.tfevents.*"))
    assert len(found) == 4, "one file for each trial"
    for trial in result.trials:
        [path] = (folder / "slow" / "parabola" / trial.arm).glob(f"seed {trial.seed} *")
        events = EventAccumulator(str(path), size_guidance={"scalars": 0}).Reload()
        read = [(event.step, event.value) for event in events.Scalars("loss")]
        # Event files hold single precision.
        assert [step for step, _ in read] == [step for step, _ in losses(trial)]
        assert [value for _, value in read] == pytest.approx([value for _, value in losses(trial)], rel=2**-23)
        [final] = events.Scalars("final/loss")
        assert final.value == pytest.approx(trial.values["loss"], rel=2**-23)
        plugin = events.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
        assert b"lr" in plugin
        assert trial.arm.encode() in plugin


def test_a_second_attempt_takes_the_place_of_the_first(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    folder = tmp_path / "runs"
    mirrored(tmp_path / "one", f"tensorboard:{folder}")
    mirrored(tmp_path / "two", f"tensorboard:{folder}")
    assert len(list(folder.rglob("events.out.tfevents.*"))) == 4


def test_diverged_numbers_are_mirrored(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    mirrored(tmp_path, f"tensorboard:{tmp_path / 'runs'}", examples.bad("nan", seeds=2))
    [path] = (tmp_path / "runs" / "bad" / "parabola" / "quick").glob("seed 1 *")
    [final] = EventAccumulator(str(path)).Reload().Scalars("final/loss")
    assert final.value == float("inf")


# -- MLflow ----------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("where", ["sqlite:///{}/mlflow.db", "file:{}/mlruns"], ids=["database", "folder"])
def test_mlflow_is_read_back_from_a_local_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # which MLflow 3.17 asks for where a folder is the store
    uri = where.format(tmp_path)
    result = mirrored(tmp_path, f"mlflow:{uri}")
    client = mlflow.MlflowClient(tracking_uri=uri)
    experiment = client.get_experiment_by_name("polyak/slow")
    runs = client.search_runs([experiment.experiment_id])
    assert len(runs) == 4
    by_name = {run.info.run_name: run for run in runs}
    for trial in result.trials:
        found = by_name[f"{trial.arm} on parabola, seed {trial.seed}"]
        assert found.info.status == "FINISHED"
        history = client.get_metric_history(found.info.run_id, "loss")
        assert sorted((m.step, m.value) for m in history) == losses(trial)
        assert found.data.metrics["final/loss"] == trial.values["loss"]
        assert (found.data.params["arm"], found.data.params["seed"]) == (trial.arm, str(trial.seed))
    mirrored(tmp_path, f"mlflow:{uri}")
    assert len(client.search_runs([experiment.experiment_id])) == 4


def test_a_store_that_mlflow_refuses(tmp_path: Path) -> None:
    pytest.importorskip("mlflow")
    with pytest.raises(trackers.TrackerError, match=r"tracking with mlflow:nosuch://there cannot begin: .*nosuch"):
        mirrored(tmp_path, "mlflow:nosuch://there")


# -- Weights & Biases ------------------------------------------------------------------------------------------------------


def test_wandb_is_told_in_its_own_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against a stand-in for the library: its calls, as of wandb 0.20 and later."""
    made: list[Any] = []

    class Run:
        def __init__(self, **options: Any) -> None:
            self.options, self.logged, self.summary, self.exit_code = options, [], {}, None
            made.append(self)

        def log(self, data: dict[str, Any]) -> None:
            self.logged.append(data)

        def finish(self, exit_code: int) -> None:
            self.exit_code = exit_code

    module: Any = types.ModuleType("wandb")
    module.init, module.Settings = Run, lambda **options: options
    monkeypatch.setitem(sys.modules, "wandb", module)
    result = mirrored(tmp_path, "wandb:mine")
    assert len(made) == 4
    for trial in result.trials:
        [run_] = [r for r in made if r.options["name"] == f"{trial.arm} on parabola, seed {trial.seed}"]
        assert run_.options["project"] == "mine"
        assert run_.options["config"]["lr"] == {"plain": 0.001, "quick": 0.2}[trial.arm]
        assert run_.logged == [{**at, **values} for at, values in trial.curve]
        assert run_.summary == {
            "final/loss": trial.values["loss"],
            "final/global_draw": trial.values["global_draw"],
            "status": "done",
            "message": "",
        }
        assert run_.exit_code == 0


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_wandb_writes_offline_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    result = mirrored(tmp_path, "wandb")
    # The files are W&B's own format, whose reader is no public part of it: names and numbers are in there as plain text.
    written = [path.read_bytes() for path in tmp_path.rglob("run-*.wandb")]
    assert len(written) == 4
    for trial in result.trials:
        [content] = [text for text in written if f"{trial.arm} on parabola, seed {trial.seed}".encode() in text]
        for _, loss in losses(trial):
            assert repr(loss).encode() in content
