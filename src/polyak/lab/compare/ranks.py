"""Whether the processes of one trial draw different batches, where a trial runs in several processes."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from polyak.lab import group
from polyak.lab.claim import Measurement, Trial
from polyak.lab.compare.contents import digest
from polyak.lab.compare.task import TrainingTask, endless, load
from polyak.lab.workers import Job, Outcome

SEED = 20_000  # of what is looked at before a comparison: neither tuned on nor reported
BATCHES = 3  # are compared


@dataclass(frozen=True)
class _FirstBatches:
    """A trial function: whether all ranks have the same first batches. They meet at the store that was there before them."""

    file: str

    def __call__(self, trial: Trial) -> Iterator[Measurement]:
        from torch.distributed import TCPStore

        task, own = load(self.file, trial.seed, trial.device), ""
        if isinstance(task, TrainingTask):
            batches = list(islice(endless(task.batches, Path(self.file).name), BATCHES))
            own = digest(batches) if _is_data(batches) else ""
        store = TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
        store.set(f"polyak/{os.environ['RANK']}", own)
        found = {store.get(f"polyak/{rank}").decode() for rank in range(int(os.environ["WORLD_SIZE"]))}
        yield Measurement(values={"same": float(len(found) == 1 and "" not in found)})


def same_batches(file: str, device: str, processes: int) -> tuple[str, ...]:
    """A warning where a task gives the same to all processes of a trial, which then do the same work."""
    name, trial = Path(file).name, Trial(claim="", scale="", task="", arm="", seed=SEED, device=device)
    job = Job(
        function=_FirstBatches(file),
        trial=trial,
        worst={"same": 0.0},
        needed=frozenset(["same"]),
        libraries=("numpy", "torch"),
        processes=processes,
    )
    found = group.carry_out(job, lambda *_: None, lambda *_: True)
    # What goes wrong here goes wrong in a trial, too, which says so.
    if not isinstance(found, Outcome) or not found.values["same"]:
        return ()
    all_ = "both" if processes == 2 else f"all {processes}"
    return (
        f"{name} gives {all_} processes of a trial the same batches: unless its loss or its model shares them out, each does the "
        "same work. Give every rank batches of its own: by torch.distributed.get_rank() or the variable RANK, with a "
        "DistributedSampler, or with accelerate",
    )


def _is_data(batches: Sequence[Any]) -> bool:
    """Whether a digest sees all of some batches, and they are more than numbers of steps, for which a loss makes its own data."""
    import numpy as np
    import torch

    data, parts = (torch.Tensor, np.ndarray, str), list(_leaves(batches))
    known = all(isinstance(part, (*data, int, float, type(None))) for part in parts)
    return known and any(isinstance(part, data) for part in parts)


def _leaves(value: Any) -> Iterator[Any]:
    if not isinstance(value, (Mapping, list, tuple)):
        yield value
        return
    for part in value.values() if isinstance(value, Mapping) else value:
        yield from _leaves(part)
