"""What MoNNA's tests run in processes of their own: honest workers, and faulty ones of every kind."""

from __future__ import annotations

import copy
import math
import pickle
import threading
import time
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.nn.functional as F

from polyak.optim import MoNNA
from polyak.optim.monna import Peers, Simulator, nna
from polyak.optim.monna.attacks import ALIE
from polyak.optim.monna.peers import _message
from polyak.optim.monna.transport import Group, Patience


def connected(store, size, timeout=3000.0, ranks=None):
    """The Peers of these ranks (None: all), made in one process, in threads."""
    made = {}

    def connect(rank):
        made[rank] = Peers.connect(store, rank, size, host="127.0.0.1", timeout=timeout)

    threads = [threading.Thread(target=connect, args=(r,)) for r in (range(size) if ranks is None else ranks)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    return [made[r] for r in sorted(made)]


# Logistic regression whose data differ from worker to worker.

FEATURES, CLASSES, SAMPLES = 6, 3, 90


def data(rank):
    generator = torch.Generator().manual_seed(rank)
    truth = torch.randn(FEATURES, CLASSES, generator=torch.Generator().manual_seed(99), dtype=torch.float64)
    x = torch.randn(SAMPLES, FEATURES, generator=generator, dtype=torch.float64) + 0.3 * rank
    return x, (x @ truth).argmax(1)


def loss_of(vector, ranks):
    x, y = (torch.cat(parts) for parts in zip(*(data(r) for r in ranks), strict=True))
    weight, bias = vector[: FEATURES * CLASSES].view(CLASSES, FEATURES), vector[FEATURES * CLASSES :]
    return F.cross_entropy(F.linear(x, weight, bias), y).item()


def flat(model):
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


def worker(rank, size, folder, kind, *, f, steps, timeout, pause, middle, reached):
    """One worker of a mesh of Peers; an honest one writes what it saw to ``folder``."""
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", size)
    with Peers.connect(store, rank, size, host="127.0.0.1", timeout=3000.0) as peers:
        if kind == "honest":
            honest(peers, folder, f=f, steps=steps, timeout=timeout, pause=pause, middle=middle, reached=reached)
        else:
            faulty(peers, kind, Patience(need=size - f, everyone=True, timeout=timeout), steps, pause)


def honest(peers, folder, *, f, steps, timeout, pause, middle, reached):
    model = torch.nn.Linear(FEATURES, CLASSES).double()
    torch.nn.init.zeros_(model.weight), torch.nn.init.zeros_(model.bias)
    seen = []

    def mix(own, others, f):
        seen.append((own.clone(), torch.stack(others), f))
        return nna(own, others, f)

    optimizer = MoNNA(model.parameters(), lr=0.5, momentum=0.9, f=f, mixer=mix, group=peers, timeout=timeout)
    x, y = data(peers.rank)
    ends, times = [], []
    for step in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        time.sleep(pause)
        start = time.monotonic()
        optimizer.step()
        times.append(time.monotonic() - start)
        ends.append(flat(model))
        if step == middle and reached is not None:
            reached.set()
    torch.save({"seen": seen, "ends": ends, "times": times, "alive": peers.alive}, f"{folder}/{peers.rank}.pt")


def faulty(peers, kind, patience, steps, pause):
    count = FEATURES * CLASSES + CLASSES
    vector = torch.zeros(count, dtype=torch.float64)
    for step in range(steps):
        time.sleep(pause)
        if kind == "wrong shape" and step == 5:
            send_all(peers, _message(step, torch.zeros(2 * count, dtype=torch.float64)))
        if kind == "garbage" and step == 5:
            send_all(peers, [memoryview(b"\xff" * 1000)])
        if kind == "silent" or (step >= 5 and kind in ("wrong shape", "garbage")):
            time.sleep(steps * pause + 2 * patience.timeout)
            return
        try:
            received = [v for v in peers.exchange(vector, patience) if v is not None]
        except RuntimeError:  # the others have finished, or dropped this one
            return
        mean = torch.stack(received).mean(0)
        vector = {
            "sign flip": -mean,
            "near": mean + 0.01 * torch.stack(received).std(0),
            "nan": torch.full_like(mean, math.nan),
            "inf": torch.full_like(mean, math.inf),
        }.get(kind, mean)


def send_all(peers, message):
    with peers._changed:
        peers._post(message, peers._peers)


# Runs that a simulator repeats to the bit.

CENTRES = torch.randn(4, 16, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
# Powers of two, by which products are exact: whether a backend fuses them with additions makes no difference.
OPTIONS = dict(lr=0.25, momentum=0.5, weight_decay=0.015625)
STEPS = 25


class Point(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.x = torch.nn.Parameter(torch.ones(16, dtype=torch.float64))

    def forward(self, c):
        return self.x - c


def half_square(difference, _):
    return difference.square().sum(-1).mean() / 2


def simulated(rule, attack=None):
    h = 3 if attack else 4

    def batches():
        while True:
            yield CENTRES[:h, None], CENTRES[:h, None]

    return Simulator(
        Point(), batches(), n=4, f=1, mixer=rule, attack=attack, loss=half_square, **OPTIONS
    )  # fmt: skip


def group_worker(rank, folder, rule, attacked, server, device="cpu"):
    """One of four ranks of a process group; the last attacks as the simulator does, which it runs along."""
    torch.set_num_threads(1)
    backend = "gloo" if device == "cpu" else "nccl"
    dist.init_process_group(
        backend, init_method=f"file://{folder}/init", rank=rank, world_size=4, timeout=timedelta(seconds=3000)
    )
    if attacked and rank == 3:
        simulator, group = simulated(rule, ALIE()), Group()
        MoNNA(Point().parameters(), f=1, mixer=rule, server=server, **OPTIONS)  # it starts as the others do
        for _ in range(STEPS):
            simulator.step()
            group.exchange(simulator.sent.contiguous(), Patience(need=3, everyone=True, timeout=3000.0))
    else:
        model = Point()
        optimizer = MoNNA(model.parameters(), f=1, mixer=rule, server=server, **OPTIONS)
        for _ in range(STEPS):
            optimizer.zero_grad()
            half_square(model(CENTRES[rank][None]), None).backward()
            optimizer.step()
        torch.save(flat(model), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


MISTAKES = {  # what rank 1 does otherwise: what all ranks say
    "nothing": None,
    "count": "number of elements (by rank: [8, 9, 8]), shapes and types, values of parameters",
    "shape": "shapes and types",
    "type": "shapes and types, values of parameters",
    "value": "values of parameters",
    "order": "values of parameters",
    "sign of zero": "values of parameters",
    "buffer": "values of buffers",
    "f": "f (by rank: [0, 1, 0])",
    "server": "server (by rank: [0, -1, 0])",
    "mixer": "mixer",
    "max_norm": "max_norm",
    "lr": "lr, momentum and weight_decay",
    "of the last group": "lr, momentum and weight_decay",
}


def _mistaken(what):
    """Arguments in which one thing is wrong; None: nothing."""
    p, q = torch.arange(6.0).reshape(2, 3), torch.tensor([0.0, 1.0])
    given = dict(lr=0.1, f=0, mixer="nna", max_norm=1.0, server=0, weight_decay=0.0)
    changed = dict(f=1, server=None, mixer="mean", max_norm=2.0, lr=0.2)
    given |= {name: changed[name] for name in changed if name == what}
    last = {"momentum": 0.5 if what == "of the last group" else 0.9}
    buffers = [torch.tensor([1.0, 2.0 if what == "buffer" else 3.0])]
    if what == "shape":
        p = p.reshape(3, 2)
    elif what == "type":
        p = p.double()
    elif what == "value":
        p[1, 2] += 1e-6
    elif what == "order":
        p = p.flip(0)
    elif what == "sign of zero":
        p[0, 0] = -0.0
    elif what == "count":
        p = torch.arange(7.0)
    groups = [{"params": [torch.nn.Parameter(p[:0])]}, {"params": [torch.nn.Parameter(p)], **last}]
    return groups, dict(given, buffers=buffers), torch.nn.Parameter(q + (what == "added later"))


def group_mistake(rank, folder, reports):
    """Ranks that start otherwise than the others: all must say so, and none may hang."""
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/init", rank=rank, world_size=3, timeout=timedelta(seconds=3000)
    )
    for what in MISTAKES:
        groups, options, _ = _mistaken(what if rank == 1 else None)
        try:
            MoNNA(groups, **options)
        except ValueError as error:
            reports.put((rank, what, str(error)))
    groups, options, _ = _mistaken(None)
    optimizer = MoNNA(groups, **options)
    optimizer.add_param_group({"params": _mistaken(None)[2]})
    try:
        optimizer.add_param_group({"params": _mistaken("added later" if rank == 1 else None)[2]})
    except ValueError as error:
        reports.put((rank, "added later", str(error)))
    assert len(optimizer.param_groups) == 3
    other = copy.deepcopy(optimizer)
    pickled = pickle.loads(pickle.dumps(optimizer))
    for one in (optimizer, other, pickled):
        for group in one.param_groups:
            for p in group["params"]:
                p.grad = torch.full_like(p, float(rank))
        one.step()
    reports.put(
        (
            rank,
            "copies",
            [[p.tolist() for g in o.param_groups for p in g["params"]] for o in (optimizer, other, pickled)],
        )
    )
    try:
        MoNNA(groups, lr=0.1, f=0, wait="n-f")
    except ValueError as error:
        reports.put((rank, "wait", str(error)))
    reports.put((rank, "end", ""))
    dist.destroy_process_group()
