"""The lab: it runs claims and comparisons. Trials, seeds, budgets, tuning, statistics, storage, reports.

``from polyak.lab import Store, run``: names are imported when they are first used, so that this package stays light.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from polyak.lab.cluster import Cluster, ClusterError
    from polyak.lab.compare.comparison import Comparison
    from polyak.lab.compare.main import compare
    from polyak.lab.compare.spec import ArmError
    from polyak.lab.compare.task import SamplingTask, TaskError, TrainingTask
    from polyak.lab.data import DataError
    from polyak.lab.result import verdict
    from polyak.lab.run import Progress, TrialError, collect, run, run_many
    from polyak.lab.statistics import judge
    from polyak.lab.store import Store, StoreError
    from polyak.lab.trackers import Tracker, TrackerError

__all__ = [
    "ArmError",
    "Cluster",
    "ClusterError",
    "Comparison",
    "DataError",
    "Progress",
    "SamplingTask",
    "Store",
    "StoreError",
    "TaskError",
    "Tracker",
    "TrackerError",
    "TrainingTask",
    "TrialError",
    "collect",
    "compare",
    "judge",
    "run",
    "run_many",
    "verdict",
]

_HOMES = {
    "cluster": ("Cluster", "ClusterError"),
    "compare.spec": ("ArmError",),
    "compare.comparison": ("Comparison",),
    "compare.main": ("compare",),
    "compare.task": ("SamplingTask", "TaskError", "TrainingTask"),
    "data": ("DataError",),
    "result": ("verdict",),
    "run": ("Progress", "TrialError", "collect", "run", "run_many"),
    "statistics": ("judge",),
    "store": ("Store", "StoreError"),
    "trackers": ("Tracker", "TrackerError"),
}


def __getattr__(name: str) -> Any:
    for module, names in _HOMES.items():
        if name in names:
            return getattr(import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))


class _Lab(ModuleType):
    """This package. Importing ``run`` or ``compare`` would put a module in the place of the function of that name."""

    def __setattr__(self, name: str, value: object) -> None:
        if not (name in ("run", "compare") and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Lab
