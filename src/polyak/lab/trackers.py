"""Mirroring measurements in other trackers: TensorBoard, MLflow, Weights & Biases.

Whatever is mirrored, the store is what counts. A tracker works in a thread of its own, so that a slow one holds nothing up; one
that fails is left out from then on, with one warning. Only trials that run are mirrored: what is stored already is not again.
"""

from __future__ import annotations

import json
import queue
import re
import shutil
import threading
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, Protocol

from polyak.core import checks
from polyak.lab.store import Planned

Status = Literal["done", "diverged", "failed", "killed"]
_CLOSE_S = 30.0  # for what is still to be told at the end of a run
_STEPS = ("step", "steps", "evaluations", "nfe", "epoch", "iteration")  # coordinates that count, the best first


class TrackerError(RuntimeError):
    """A tracker cannot be used."""


class Tracker(Protocol):
    """Where measurements are mirrored to. Its methods are called from one thread; what they raise ends the mirroring."""

    name: str

    def begin(self, trial: Planned) -> None:
        """A trial begins (anew, where its process had died)."""
        ...

    def measured(self, trial: Planned, at: Mapping[str, float], values: Mapping[str, float]) -> None:
        """A measurement on the way."""
        ...

    def end(self, trial: Planned, status: Status, values: Mapping[str, float], message: str) -> None:
        """A trial's end, with its final values where it has any."""
        ...

    def close(self) -> None:
        """The run's end."""
        ...


_TRACKER = checks.text | checks.Like("a Tracker", "name", "begin", "measured", "end", "close")
TRACK = _TRACKER | checks.Each(_TRACKER)


def make(what: str) -> Tracker:
    """A tracker from words: ``tensorboard``, ``mlflow`` or ``wandb``, with ``:WHERE`` if need be.

    WHERE is TensorBoard's folder (default: ``runs``), MLflow's tracking URI (default: as MLflow has it), the W&B project
    (default: ``polyak``).

    Raises:
        ValueError: the name is unknown.
        TrackerError: its library is not installed, or refuses WHERE.
    """
    name, _, where = what.partition(":")
    kind = _KINDS[checks.one_of("track", name, list(_KINDS))]
    try:
        return kind(where)
    except ModuleNotFoundError as missing:
        raise TrackerError(
            f"tracking with {name} needs {missing.name}, of the extra `{name}`: pip install 'polyak[{name}]'"
        ) from None
    except Exception as error:
        raise TrackerError(f"tracking with {what} cannot begin: {error}") from error


class Mirror:
    """Trackers, each in its own thread; none can stop or slow down a run."""

    def __init__(
        self, track: str | Tracker | Sequence[str | Tracker], warn: Callable[[str], None] | None = None
    ) -> None:
        given = track if isinstance(track, Sequence) and not isinstance(track, str) else [track]
        made = [make(t) if isinstance(t, str) else t for t in given]
        self._threads = [_Thread(t, warn or (lambda message: warnings.warn(message, stacklevel=2))) for t in made]

    @property
    def wanted(self) -> bool:
        """Whether there is any."""
        return bool(self._threads)

    def begin(self, trial: Planned) -> None:
        self._tell("begin", trial)

    def measured(self, trial: Planned, at: Mapping[str, float], values: Mapping[str, float]) -> None:
        self._tell("measured", trial, at, values)

    def end(self, trial: Planned, status: Status, values: Mapping[str, float], message: str) -> None:
        self._tell("end", trial, status, values, message)

    def close(self) -> None:
        """Wait until all is told, or for as long as that is worth."""
        for thread in self._threads:
            thread.tell("close")
        until = time.monotonic() + _CLOSE_S
        for thread in self._threads:
            thread.finish(until)

    def _tell(self, what: str, *arguments: Any) -> None:
        for thread in self._threads:
            thread.tell(what, *arguments)


class _Thread:
    """One tracker's."""

    def __init__(self, tracker: Tracker, warn: Callable[[str], None]) -> None:
        self._tracker, self._warn = tracker, warn
        self._waiting: queue.SimpleQueue[tuple[str, tuple[Any, ...]]] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name=f"polyak-{tracker.name}", daemon=True)
        self._thread.start()

    def tell(self, what: str, *arguments: Any) -> None:
        self._waiting.put((what, arguments))

    def finish(self, until: float) -> None:
        self._thread.join(max(0.0, until - time.monotonic()))
        if self._thread.is_alive():
            self._warn(f"{self._tracker.name} has not taken all measurements in time; the store has them")

    def _work(self) -> None:
        what = ""
        try:
            while what != "close":
                what, arguments = self._waiting.get()
                getattr(self._tracker, what)(*arguments)
        except Exception as error:
            self._warn(
                f"{self._tracker.name} failed, and is left out from now on ({type(error).__name__}: {error}); "
                "the run goes on, and the store has all measurements"
            )


# -- what they share -----------------------------------------------------------------------------------------------------------


class _Steps:
    """An integer for every measurement of a trial, which these libraries ask for: a coordinate that counts, else its number."""

    def __init__(self) -> None:
        self._number = -1

    def of(self, at: Mapping[str, float]) -> int:
        self._number += 1
        name = next((name for name in _STEPS if name in at), None)
        return self._number if name is None else round(at[name])


def _facts(trial: Planned) -> dict[str, Any]:
    """A trial in plain values: what it is of, and its options."""
    own = {"claim": trial.claim, "task": trial.task, "arm": trial.arm, "seed": trial.seed, "scale": trial.scale}
    more = {"purpose": trial.purpose, "device": trial.device}
    return {**{name: _plain(value) for name, value in trial.options.items()}, **own, **more}


def _plain(value: Any) -> str | int | float | bool:
    return value if isinstance(value, (str, int, float, bool)) else json.dumps(value)


def _short(trial: Planned) -> str:
    """ "seed 3" or "tuning lr=0.01"."""
    return trial.label.partition(f" on {trial.task}, ")[2]


def _final(values: Mapping[str, float]) -> dict[str, float]:
    return {f"final/{name}": value for name, value in values.items()}


# -- the three -----------------------------------------------------------------------------------------------------------------


class TensorBoard:
    """A folder of event files for each trial: ``FOLDER/claim/task/arm/seed 3 [digest]``, with hyperparameters."""

    name = "tensorboard"

    def __init__(self, where: str = "") -> None:
        import_module("tensorboard")
        from torch.utils.tensorboard import SummaryWriter

        self.folder = Path(where or "runs")
        self._writer = SummaryWriter
        self._open: dict[str, tuple[Any, _Steps]] = {}

    def path(self, trial: Planned) -> Path:
        names = (trial.claim, trial.task, trial.arm, f"{_short(trial)} [{trial.digest[:8]}]")
        return self.folder.joinpath(*(re.sub(r"[^\w.,=+\[\]: -]", "_", name) for name in names))

    def begin(self, trial: Planned) -> None:
        folder = self.path(trial)
        # What an earlier attempt at this very trial left would be drawn together with this one.
        shutil.rmtree(folder, ignore_errors=True)
        self._open[trial.digest] = self._writer(str(folder), flush_secs=10), _Steps()

    def measured(self, trial: Planned, at: Mapping[str, float], values: Mapping[str, float]) -> None:
        writer, steps = self._open[trial.digest]
        step = steps.of(at)
        for name, value in values.items():
            writer.add_scalar(name, value, step)

    def end(self, trial: Planned, status: Status, values: Mapping[str, float], message: str) -> None:
        from torch.utils.tensorboard.summary import hparams

        writer, _ = self._open.pop(trial.digest)
        for name, value in _final(values).items():
            writer.add_scalar(name, value, 0)
        writer.add_text("status", f"{status} {message}".strip())
        # As add_hparams does, which would begin a further file.
        for summary in hparams(_facts(trial), _final(values)):
            writer.file_writer.add_summary(summary)
        writer.close()

    def close(self) -> None:
        for writer, _ in self._open.values():
            writer.close()


class MLflow:
    """A run for each trial, in an experiment for each claim."""

    name = "mlflow"

    def __init__(self, where: str = "") -> None:
        from mlflow import MlflowClient  # pyright: ignore[reportMissingImports]

        self._client: Any = MlflowClient(tracking_uri=where or None)
        self._experiments: dict[str, str] = {}
        self._open: dict[str, tuple[str, _Steps]] = {}

    def begin(self, trial: Planned) -> None:
        from mlflow.entities import Param  # pyright: ignore[reportMissingImports]

        run = self._client.create_run(
            self._experiment(f"polyak/{trial.claim}"),
            run_name=trial.label,
            tags={"polyak.digest": trial.digest, "polyak.point": json.dumps(trial.point)},
        )
        self._open[trial.digest] = run.info.run_id, _Steps()
        facts = [Param(self._named(name), str(value)) for name, value in _facts(trial).items()]
        for first in range(0, len(facts), 100):  # which is how many MLflow takes at once
            self._client.log_batch(run.info.run_id, params=facts[first : first + 100])

    def measured(self, trial: Planned, at: Mapping[str, float], values: Mapping[str, float]) -> None:
        run, steps = self._open[trial.digest]
        step = steps.of(at)
        others = {name: value for name, value in at.items() if name not in _STEPS}
        self._log(run, {**others, **values}, step)

    def end(self, trial: Planned, status: Status, values: Mapping[str, float], message: str) -> None:
        run, _ = self._open.pop(trial.digest)
        self._log(run, _final(values), 0)
        self._client.set_tag(run, "polyak.status", status)
        if message:
            self._client.set_tag(run, "polyak.message", message[:5000])
        self._client.set_terminated(run, {"failed": "FAILED", "killed": "KILLED"}.get(status, "FINISHED"))

    def close(self) -> None:
        for run, _ in self._open.values():
            self._client.set_terminated(run, "KILLED")

    def _experiment(self, name: str) -> str:
        if name not in self._experiments:
            found = self._client.get_experiment_by_name(name)
            self._experiments[name] = found.experiment_id if found else self._client.create_experiment(name)
        return self._experiments[name]

    def _log(self, run: str, values: Mapping[str, float], step: int) -> None:
        from mlflow.entities import Metric  # pyright: ignore[reportMissingImports]

        now = round(1000 * time.time())
        metrics = [Metric(self._named(name), value, now, step) for name, value in values.items()]
        if metrics:
            self._client.log_batch(run, metrics=metrics)

    @staticmethod
    def _named(name: str) -> str:
        return re.sub(r"[^\w\-. :/]", "_", name)


class WandB:
    """A run for each trial, grouped by claim; offline where W&B is (``WANDB_MODE=offline``)."""

    name = "wandb"

    def __init__(self, where: str = "") -> None:
        self._wandb: Any = import_module("wandb")
        self.project = where or "polyak"
        self._open: dict[str, Any] = {}

    def begin(self, trial: Planned) -> None:
        run = self._wandb.init(
            project=self.project,
            group=f"{trial.claim}/{trial.task}",
            job_type=trial.arm,
            name=trial.label,
            config={**_facts(trial), "digest": trial.digest},
            reinit="create_new",  # several trials run at once
            settings=self._wandb.Settings(silent=True),
        )
        self._open[trial.digest] = run

    def measured(self, trial: Planned, at: Mapping[str, float], values: Mapping[str, float]) -> None:
        self._open[trial.digest].log({**at, **values})

    def end(self, trial: Planned, status: Status, values: Mapping[str, float], message: str) -> None:
        run = self._open.pop(trial.digest)
        run.summary.update({**_final(values), "status": status, "message": message})
        run.finish(exit_code=0 if status in ("done", "diverged") else 1)

    def close(self) -> None:
        for run in self._open.values():
            run.finish(exit_code=1)


_KINDS: dict[str, Callable[[str], Tracker]] = {"tensorboard": TensorBoard, "mlflow": MLflow, "wandb": WandB}
