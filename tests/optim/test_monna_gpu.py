"""MoNNA on CUDA: rules against the CPU's, no waiting for the device, and NCCL against the rule on what was gathered."""

from __future__ import annotations

import multiprocessing
import sys
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parent))

import monna_for_tests as helpers
from references_for_tests import assert_same, normal

from polyak.optim import MoNNA
from polyak.optim.monna import Simulator, aggregators, mixer
from polyak.optim.monna.attacks import ALIE
from polyak.optim.monna.transport import Group, Patience

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
two_devices = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")


def mixed(name, x):
    made = mixer(name)
    return made.mix(x[0], list(x[1:] if made.centred else x), 2)


@pytest.mark.parametrize("name", aggregators.RULES)
@pytest.mark.parametrize("bad", [False, True])
def test_rules_equal_the_cpus(name, bad):
    x = normal((9, 10_000), 0)
    if bad and name != "mean":
        x[4], x[7] = float("nan"), float("inf")
    # Norms of 10,000 numbers are summed in another order: 1e-13 in float64, and no choice here is that close.
    assert_same([mixed(name, x.cuda()).cpu()], [mixed(name, x)], atol=1e-10)


@pytest.mark.parametrize(
    "name", [n for n in aggregators.RULES if n != "mva"]
)  # its table of subsets is made once, here
def test_rules_do_not_wait_for_the_device(name):
    x = normal((9, 1000), 0).cuda()
    mixed(name, x)
    torch.cuda.set_sync_debug_mode("error")
    try:
        mixed(name, x)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("rule", ["nna", "trimmed_mean"])
def test_the_simulator_runs_on_the_device(rule):
    ends = []
    for device in ("cpu", "cuda"):
        c = helpers.CENTRES.to(device)

        def batches(c=c):
            while True:
                yield c[:3, None], c[:3, None]

        simulator = Simulator(
            helpers.Point().to(device), batches(), n=4, f=1, mixer=rule, attack=ALIE(1.5), loss=helpers.half_square,
            **helpers.OPTIONS,
        )  # fmt: skip
        for _ in range(20):
            simulator.step()
        ends.append(simulator.parameters.cpu())
    assert_same(ends[:1], ends[1:], atol=1e-12)


def nccl_worker(rank, folder, server):
    """Momentum steps mixed over NCCL, beside the rule applied to what all_gather brings of the same half steps."""
    torch.cuda.set_device(rank)
    options = dict(init_method=f"file://{folder}/init", rank=rank, world_size=2, timeout=timedelta(seconds=3000))
    dist.init_process_group("nccl", device_id=torch.device("cuda", rank), **options)
    sizes = [(1000, 33), (7,), ()]
    params = [torch.nn.Parameter(normal(s, i).cuda()) for i, s in enumerate(sizes)]
    twins = [p.detach().clone() for p in params]
    momenta = [torch.zeros_like(p) for p in twins]
    seen = []

    def rule(own, others, f):
        seen.append((own.clone(), [v.clone() for v in others]))
        return mixer("nna").mix(own, others, f)

    optimizer = MoNNA(params, lr=0.25, momentum=0.5, f=0, mixer=rule, server=server)
    for t in range(6):
        grads = [normal(s, 1000 * (t + 1) + 10 * rank + i).cuda() for i, s in enumerate(sizes)]
        for p, g in zip(params, grads, strict=True):
            p.grad = g
        optimizer.step()
        momenta = [0.5 * m + 0.5 * g for m, g in zip(momenta, grads, strict=True)]
        half = torch.cat([(p - 0.25 * m).reshape(-1) for p, m in zip(twins, momenta, strict=True)])
        both = [torch.empty_like(half) for _ in range(2)]
        dist.all_gather(both, half)
        first = rank if server is None else server
        expected = mixer("nna").mix(both[first], [both[1 - first]], 0)
        parts = expected.split([p.numel() for p in twins])
        twins = [part.view_as(p) for part, p in zip(parts, twins, strict=True)]
        assert_same([p.cpu() for p in params], [p.cpu() for p in twins], atol=1e-12)
    if server is None or rank == server:
        assert len(seen) == 6
        assert seen[0][0].is_cuda
    gathered = Group().exchange(torch.full((3,), float("nan") if rank else 1.0, device="cuda"), Patience(2, True, 60.0))
    assert gathered[1] is not None
    assert gathered[1].isnan().all()
    dist.destroy_process_group()


@two_devices
@pytest.mark.parametrize("server", [None, 1])
def test_nccl_equals_the_rule_on_the_gathered_stack(tmp_path, server):
    context = multiprocessing.get_context("spawn")
    running = [context.Process(target=nccl_worker, args=(r, str(tmp_path), server)) for r in range(2)]
    for process in running:
        process.start()
    for process in running:
        process.join()
        assert process.exitcode == 0
