"""Trials of several processes, which meet through torch.distributed. A module of its own: workers import torch where it is used."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from typing import Any

import claims_for_tests as examples

from polyak.lab.claim import Arm, Claim, Diverged, Measurement, Metric, Scale, Trial, measure

RANK_METRICS = (Metric(name="rank", label="rank"), Metric(name="size", label="size"), Metric(name="threads", label=""))


def average(trial: Trial) -> Iterator[Measurement]:
    """Gradient descent on a parabola, each rank with its own half of the noise, whose gradients are averaged by all-reduce."""
    import torch
    from torch import distributed as dist

    how, rank = trial["how"], int(os.environ["RANK"])
    failing = rank == trial["failing"] and trial.seed == 1
    dist.init_process_group("gloo")
    generator = torch.Generator().manual_seed(1000 * trial.seed + rank)
    x = torch.full((4,), 1.0 + trial.seed)
    for step in range(trial["steps"]):
        if failing and step == 3:
            match how:
                case "die":
                    os.kill(os.getpid(), signal.SIGKILL)
                case "raise":
                    raise RuntimeError("a bug in this rank")
                case "diverge":
                    raise Diverged("too big")
                case "hang":
                    time.sleep(600)
        gradient = 2 * x + torch.randn(4, generator=generator)
        dist.all_reduce(gradient)
        x = x - 0.1 * gradient / dist.get_world_size()
        yield measure({"step": step}, loss=x.square().sum().item(), rank=rank)
    numbers = {"rank": rank, "size": dist.get_world_size(), "threads": torch.get_num_threads()}
    yield measure(loss=x.square().sum().item(), **numbers)


def make(how: str = "", failing: int = 1, *, seeds: int = 2) -> Claim:
    """One arm; with seed 1 the rank ``failing`` goes wrong in the way ``how``."""
    options: dict[str, Any] = {"steps": 6, "how": how, "failing": failing}
    return examples.make(
        "group",
        arms=(Arm(name="plain", label="Plain", role="baseline", options=options),),
        scales=(Scale(name="small", says="seconds", seeds=seeds),),
        metrics=(*examples.METRICS, *RANK_METRICS),
        criteria=(),
        trial=average,
    )
