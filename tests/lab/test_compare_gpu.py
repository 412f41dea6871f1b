"""Comparisons on GPUs: the same numbers wherever trials run, and one GPU or several for each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from polyak.lab import compare
from polyak.lab.cluster import Cluster

from .tasks_for_tests import REGRESSION, write

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning"),
]
two = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")

ARMS = ["adamw:lr=0.01:weight_decay=0", "sgd:lr=0.01:weight_decay=0"]
SMALL: dict[str, Any] = {"budget": "12steps", "seeds": 2, "points": 4, "progress": False, "device": "cuda"}
# Beside the distance, which of the machine's GPUs this process sees, by their serial numbers.
THERE = {
    "import torch\n": "import zlib\nimport torch\n",
    "nn.Linear(2, 1)": "nn.Linear(2, 1).to(device)",
    "yield x[i], y[i]": "yield x[i].to(device), y[i].to(device)",
    '{"distance": (model.weight - TRUTH).norm()}': (
        '{"distance": (model.weight - TRUTH.to(device)).norm(), '
        '"gpu": zlib.crc32(str(torch.cuda.get_device_properties(device).uuid).encode()) % 1e6}'
    ),
}


def distances(comparison: Any) -> list[Any]:
    return [(t.arm, t.seed, t.values["distance"]) for t in comparison.task().result.trials]


def test_on_this_machine(tmp_path: Path) -> None:
    task = write(tmp_path, REGRESSION, replaced=THERE)
    found = compare(task, ARMS, store=tmp_path, jobs=2, **SMALL)
    assert found.task().result.device == torch.cuda.get_device_name()
    assert all(row.memory is not None and row.memory > 0 for row in found.task().rows)
    tuned = {**SMALL, "budget": "0.2s/trial", "trials": 2}
    timed = compare(task, ["adamw", ARMS[1]], store=tmp_path, **tuned).task()
    for trial in timed.trials("adamw"):
        assert 0.2 <= trial.values["seconds"] < 0.3
        assert trial.values["steps"] > 12


@two
def test_a_cluster_gives_every_trial_a_gpu_of_its_own(tmp_path: Path) -> None:
    pytest.importorskip("ray")
    task = write(tmp_path, REGRESSION, replaced=THERE)
    here = compare(task, ARMS, store=tmp_path / "here", jobs=1, **SMALL)
    there = compare(task, ARMS, store=tmp_path / "there", executor=Cluster("local", gpus=1), **SMALL)
    assert distances(there) == distances(here)
    assert {t.values["gpu"] for arm in ARMS for t in here.task().trials(arm)} < {
        t.values["gpu"] for arm in ARMS for t in there.task().trials(arm)
    }


# Data-parallel by accelerate; how many ranks there are that talk over NCCL is measured, too.
PARALLEL = {
    "    model = nn.Linear(2, 1)\n": """    from accelerate import Accelerator
    accelerator = Accelerator()
    device = accelerator.device
    model = accelerator.prepare(nn.Linear(2, 1))
""",
    "yield x[i], y[i]": "yield x[i].to(device), y[i].to(device)",
    '{"distance": (model.weight - TRUTH).norm()}': (
        '{"distance": (accelerator.unwrap_model(model).weight - TRUTH.to(device)).norm(), "ranks": '
        "accelerator.num_processes * isinstance(model, nn.parallel.DistributedDataParallel) "
        '* (torch.distributed.is_initialized() and torch.distributed.get_backend() == "nccl")}'
    ),
}


@two
@pytest.mark.parametrize("cluster", [False, True], ids=["here", "cluster"])
def test_a_trial_on_two_gpus(tmp_path: Path, cluster: bool) -> None:
    pytest.importorskip("accelerate")
    if cluster:
        pytest.importorskip("ray")
    task = write(tmp_path, REGRESSION, replaced=PARALLEL)
    small = {**SMALL, "seeds": 1}
    one = compare(task, ARMS, store=tmp_path, **small)
    executor = Cluster("local", gpus=2, processes=2) if cluster else None
    both = compare(task, ARMS, store=tmp_path, processes=2, executor=executor, **small)
    assert both.task().result.device == f"2 × {torch.cuda.get_device_name()}"
    assert [t.values["ranks"] for t in both.task().result.trials] == [2, 2]
    # Both ranks have the same batches, and the mean of two equal gradients is exact.
    assert distances(both) == distances(one)
