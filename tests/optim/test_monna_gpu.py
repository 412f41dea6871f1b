"""MoNNA over NCCL: the workers' weights are those of the same run over gloo."""

from datetime import timedelta

import pytest
import torch

from polyak.optim import MoNNA

STEPS = 4


def _worker(rank, folder, backend, server):
    import torch.distributed as dist

    device = torch.device("cuda", rank) if backend == "nccl" else torch.device("cpu")
    if backend == "nccl":
        torch.cuda.set_device(device)
    dist.init_process_group(
        backend, init_method=f"file://{folder}/init", rank=rank, world_size=2, timeout=timedelta(seconds=60)
    )
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(5, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2)).double().to(device)
    optimizer = MoNNA(model.parameters(), lr=0.5, momentum=0.9, f=0, mixer="median", server=server)
    generator = torch.Generator().manual_seed(rank)
    for _ in range(STEPS):
        x = torch.randn(3, 5, dtype=torch.float64, generator=generator).to(device)
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    torch.save([p.detach().cpu() for p in model.parameters()], f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def _train(folder, backend, server):
    folder.mkdir()
    torch.multiprocessing.spawn(_worker, (str(folder), backend, server), nprocs=2)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("server", [None, 0])
def test_nccl_as_gloo(tmp_path, server):
    over_nccl, over_gloo = (_train(tmp_path / backend, backend, server) for backend in ("nccl", "gloo"))
    for mine, theirs in zip(over_nccl, over_gloo, strict=True):
        for a, b in zip(mine, theirs, strict=True):
            assert torch.allclose(a, b, rtol=0, atol=1e-12)
    assert all(torch.equal(a, b) for a, b in zip(*over_nccl, strict=True))
