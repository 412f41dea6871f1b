"""What robustness costs MoNNA: gradients, communication and time of a step, against plain averaging, as f / n grows.

    python bench/monna.py                  # the CPU, and the GPU where there is one
    python bench/monna.py --device cpu --workers 16 --elements 1000000 --peers 8

Three tables, in ratios to plain averaging on the same machine in the same run:

- rules: the time that one worker takes to mix n vectors of d elements (float32);
- overhead: with f of n workers faulty, how many gradients all workers evaluate for each one that an honest worker evaluates,
  what a worker sends, and the time of a simulated step of all workers (a network of 4,810 parameters, batch 25);
- exchange (CPU): the time of a step of real processes over :class:`polyak.optim.monna.Peers`, with f silent, and over gloo.

Times are medians of repetitions.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

import polyak
from polyak.optim import MoNNA
from polyak.optim.monna import Batches, Peers, Simulator, dirichlet_split, mixer
from polyak.optim.monna.attacks import SignFlip

RULES = (
    "mean", "nna", "trimmed_mean", "median", "geometric_median", "self_centered_clip", "krum", "multi_krum",
)  # fmt: skip


def clock(call: Callable[[], Any], device: str, *, least: float = 0.3, repetitions: int = 5) -> float:
    """Milliseconds of one call: the median of some repetitions, each as many calls as take a while."""

    def wait() -> None:
        if device == "cuda":
            torch.cuda.synchronize()

    call()
    wait()
    start, count = time.perf_counter(), 0
    while time.perf_counter() - start < least / repetitions or count == 0:
        call()
        wait()
        count += 1
    found = []
    for _ in range(repetitions):
        wait()
        start = time.perf_counter()
        for _ in range(count):
            call()
        wait()
        found.append((time.perf_counter() - start) / count * 1e3)
    return statistics.median(found)


def fractions(n: int) -> list[int]:
    """Numbers of faulty workers up to those that NNA's guarantee allows, n > 5 f, and the largest that any rule does."""
    return sorted({0, 1, (n - 1) // 10, (n - 1) // 5, (n - 1) // 3, (n - 1) // 2})


def rules(device: str, n: int, d: int) -> list[dict[str, Any]]:
    x = torch.randn(n, d, generator=torch.Generator().manual_seed(0)).to(device)
    rows = list(x)
    base = clock(lambda: mixer("mean").mix(rows[0], rows, 0), device)
    found = []
    for name, f in itertools.product(RULES, fractions(n)):
        made = mixer(name)
        if name in ("mean", "median", "geometric_median", "self_centered_clip") and f:
            continue  # these do not know f
        ms = clock(lambda made=made, f=f: made.mix(rows[0], rows[1:] if made.centred else rows, f), device)
        found.append(dict(table="rules", device=device, n=n, d=d, rule=name, f=f, ms=ms, ratio=ms / base))
    return found


def overhead(device: str, n: int) -> list[dict[str, Any]]:
    """All n workers evaluate a gradient a step, and n - f of those count: n / (n - f), linear in f / n as long as it is small."""
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(2000, 64, generator=generator).to(device), torch.randint(0, 10, (2000,), generator=generator)
    model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 10)).to(device)
    found, base = [], 0.0
    for f, rule in ((0, "mean"), *((f, "nna") for f in fractions(n))):
        split = dirichlet_split(y, n - f, 1.0, generator=generator)
        simulator = Simulator(
            model, Batches(x, y.to(device), split, 25, generator=generator), n=n, f=f, lr=0.1, mixer=rule,
            attack=SignFlip() if f else None,
        )  # fmt: skip
        ms = clock(simulator.step, device)
        base = ms if rule == "mean" else base
        each = simulator.gradients / (simulator.steps * simulator.honest * 25)  # of a worker in a step: as in plain SGD
        found.append(
            dict(table="overhead", device=device, n=n, rule=rule, f=f, ms=ms, ratio=ms / base,
                 gradients=each * n / (n - f), each=each, vectors=n - 1, excess=n / (n - f) - 1)
        )  # fmt: skip
    return found


def _steps(rank: int, size: int, folder: str, f: int, d: int, how: str, times: Any) -> None:
    torch.set_num_threads(1)
    p = torch.nn.Parameter(torch.zeros(d))
    p.grad = torch.full((d,), float(rank))
    group: Any = None
    if how == "gloo":
        options = dict(init_method=f"file://{folder}/init", rank=rank, world_size=size, timeout=timedelta(seconds=60))
        dist.init_process_group("gloo", **options)
    else:
        group = Peers.connect(dist.FileStore(f"{folder}/store", size), rank, size, host="127.0.0.1", timeout=60.0)
    if rank < size - f or how == "gloo":
        optimizer = MoNNA([p], lr=0.1, f=f, mixer="nna" if f else "mean", group=group, timeout=2.0)
        found = []
        for _ in range(12):
            start = time.perf_counter()
            optimizer.step()
            found.append((time.perf_counter() - start) * 1e3)
        times.put((statistics.median(found[2:]), max(found)))
    else:
        time.sleep(8.0)  # silent: connected, and never heard of
    if group is not None:
        group.close()
    else:
        dist.destroy_process_group()


def exchange(size: int, d: int) -> list[dict[str, Any]]:
    context = multiprocessing.get_context("spawn")
    found, base = [], 0.0
    for how, f in (("gloo", 0), *(("peers", f) for f in fractions(size)[:-1])):
        with tempfile.TemporaryDirectory() as folder:
            times = context.Queue()
            running = [context.Process(target=_steps, args=(r, size, folder, f, d, how, times)) for r in range(size)]
            for process in running:
                process.start()
            measured = [times.get(timeout=120) for _ in range(size - f)]
            for process in running:
                process.join()
        ms = statistics.median(m for m, _ in measured)
        base = ms if how == "gloo" else base
        slowest = max(m for _, m in measured)
        found.append(
            dict(table="exchange", n=size, d=d, how=how, f=f, ms=ms, ratio=ms / base, slowest_ms=slowest)
        )  # fmt: skip
    return found


def show(rows: list[dict[str, Any]]) -> None:
    columns = [c for c in rows[0] if c != "table"]
    print(f"\n| {' | '.join(columns)} |\n|{' --- |' * len(columns)}")
    for row in rows:
        print(
            "| "
            + " | ".join(f"{v:.3g}" if isinstance(v, float) else str(v) for v in row.values() if v != row["table"])
            + " |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: both, where there is a GPU")
    parser.add_argument("--workers", type=int, default=16)
    parser.add_argument("--elements", type=int, default=1_000_000)
    parser.add_argument("--peers", type=int, default=8, help="real processes; 0: none")
    parser.add_argument("--json", help="write the rows to this file")
    given = parser.parse_args()
    devices = [given.device] if given.device else ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    rows = []
    print(f"torch {torch.__version__}, polyak {polyak.__version__}, {torch.get_num_threads()} threads")
    for device in devices:
        for part in (rules(device, given.workers, given.elements), overhead(device, given.workers)):
            show(part)
            rows += part
    if given.peers and "cpu" in devices:
        part = exchange(given.peers, given.elements)
        show(part)
        rows += part
    if given.json:
        with open(given.json, "w", encoding="utf-8") as file:
            json.dump(rows, file, indent=1)


if __name__ == "__main__":
    main()
