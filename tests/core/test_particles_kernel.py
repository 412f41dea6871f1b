"""The fused step: in Triton's interpreter against plain PyTorch, what it does not take, and its use on a GPU."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from polyak.core.particles import SCHEMES, Cloud, _blocks, _gpu, _kernel, _native, _schemes, counts, gather, resample
from polyak.core.particles._values import effective

CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def seeded(seed: int = 0, device: str = "cpu") -> torch.Generator:
    return torch.Generator(device).manual_seed(seed)


def log_weights(*shape: int, device: str = "cpu") -> Tensor:
    """Of all kinds: equal ones, zeros, a single particle with weight, one at +inf, none with weight."""
    logw = 2 * torch.randn(*shape, dtype=torch.float64, generator=seeded(shape[-1]))
    logw[:, ::5] = -torch.inf
    logw[0] = 0.3
    logw[1, 1:] = -torch.inf
    logw[1, 0] = -700.0
    logw[2, 3] = torch.inf
    logw[3] = -torch.inf
    return (logw + 1e3).to(device)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Tensors on the CPU are taken for such on a GPU of one program, which takes all systems; launches are counted."""
    triton = pytest.importorskip("triton")
    if torch.cuda.is_available() or not triton.knobs.runtime.interpret:
        pytest.skip("needs Triton's interpreter")
    grids: list[int] = []
    launch = _kernel._launch
    monkeypatch.setattr(_gpu, "_on_gpu", lambda x: True)
    fused = ("systematic", "stratified")
    stepped = _kernel.stepped
    monkeypatch.setattr(_native, "stepped", lambda *a, **k: stepped(*a, **k) if a[2] in fused else None)
    monkeypatch.setattr(_kernel, "PROGRAMS", 1)
    for module in (_kernel, _blocks):
        monkeypatch.setattr(
            module, "_launch", lambda made, grid, *rest: (grids.append(grid), launch(made, grid, *rest))
        )
    return grids


def off_edges(logw: Tensor, ancestors: Tensor, expected: Tensor, scheme: str, u: Tensor) -> None:
    """Equal, but for points within 1e-12 of an edge of the cumulative weights."""
    if torch.equal(ancestors, expected):
        return
    n = ancestors.shape[-1]
    points = (torch.arange(n, device=u.device) + (u.unsqueeze(-1) if scheme == "systematic" else u)) / n
    rows, slots = (ancestors != expected).nonzero(as_tuple=True)
    assert len(rows) < 100
    for i, k in zip(rows.tolist(), slots.tolist(), strict=True):
        c = _schemes.unnormalized(logw[i]).cumsum(-1)
        assert (c / c[-1] - points[i, k]).abs().min() < 1e-12


def check(logw: Tensor, n: int, scheme: str, threshold: float | None, x: Tensor) -> None:
    batch, size = logw.shape
    u = torch.rand((batch,) if scheme == "systematic" else (batch, n), dtype=torch.float64, generator=seeded(1)).to(
        logw.device
    )
    made = _kernel.stepped(logw, n, scheme, u, threshold=threshold, x=x)
    assert made is not None
    assert made.x is not None
    expected = getattr(_schemes, scheme)(_schemes.unnormalized(logw), n, u, None)
    if threshold is not None:
        did = torch.ones(batch, dtype=torch.bool, device=logw.device)
        did = did if threshold == 1 else effective(logw) < threshold * size
        expected = torch.where(did.unsqueeze(-1), expected, torch.arange(n, device=logw.device))
        assert made.did is not None
        assert made.logw is not None
        assert torch.equal(made.did, did)
        assert torch.equal(made.logw, torch.where(did.unsqueeze(-1), 0.0, logw))
    off_edges(logw, made.ancestors, expected, scheme, u)
    assert torch.equal(made.x, gather(x, made.ancestors))


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize(
    ("scheme", "n", "threshold", "event", "dtype"),
    [
        ("systematic", 40, None, (), torch.float32),
        ("systematic", 70, None, (3,), torch.float32),
        ("stratified", 30, None, (), torch.complex64),
        ("stratified", 40, 0.5, (5,), torch.bfloat16),
        ("systematic", 40, 0.3, (2, 2), torch.float64),
        ("systematic", 40, 1.0, (), torch.bool),
        ("systematic", 40, 0.5, (33,), torch.float32),
    ],
)
def test_the_kernel_is_the_formula(
    scheme: str, n: int, threshold: float | None, event: tuple[int, ...], dtype: torch.dtype, small: list[int]
) -> None:
    x = torch.randn(6, 40, *event, generator=seeded(2))
    check(log_weights(6, 40), n, scheme, threshold, x > 0 if dtype == torch.bool else x.to(dtype))
    assert small == [1]


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize(
    ("scheme", "n", "threshold", "event"),
    [("systematic", 70, 0.5, ()), ("stratified", 40, None, (3,)), ("systematic", 90, None, ())],
)
def test_the_kernels_for_many_particles_are_the_formula(
    scheme: str,
    n: int,
    threshold: float | None,
    event: tuple[int, ...],
    small: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(_kernel, "CHUNK", 0)
    monkeypatch.setattr(_blocks, "CHUNK", 32)
    logw = log_weights(6, 70)
    logw[4, 32:64] = -torch.inf  # a piece without weight
    logw[5] = torch.where(torch.arange(70) == 66, 1e3, 0.0)
    check(logw, n, scheme, threshold, torch.randn(6, 70, *event, generator=seeded(2)))
    assert small == [18, 6, 18]


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_clouds_and_resampling_take_it_where_they_may(small: list[int]) -> None:
    logw, u = torch.randn(2, 3, 40, dtype=torch.float64, generator=seeded()), torch.rand(2, 3, dtype=torch.float64)
    logw[0] *= 5
    x = {"a": torch.randn(2, 3, 40, 2), "b": torch.arange(240).reshape(2, 3, 40), "c": "as it is"}
    plain = resample(logw.requires_grad_(), u=u)
    cloud, ancestors, did = Cloud(x, logw.detach(), torch.zeros(2, 3)).maybe_resample(0.5, u=u)
    assert len(small) == 2
    assert did.any()
    assert not did.all()
    assert torch.equal(ancestors, torch.where(did.unsqueeze(-1), plain, torch.arange(40)))
    assert torch.equal(cloud.x["a"], gather(x["a"], ancestors))
    assert torch.equal(cloud.x["b"], gather(x["b"], ancestors))
    again, _, _ = Cloud(x["a"].requires_grad_(), logw, torch.zeros(2, 3), differentiable=True).maybe_resample(0.5, u=u)
    assert torch.equal(again.logw, cloud.logw)
    assert again.logw.requires_grad
    assert again.x.requires_grad
    for scheme in SCHEMES:
        resample(logw, scheme=scheme, generator=seeded())
    resample(logw.float())
    resample(torch.zeros(3, 1))
    assert len(small) == 6  # neither other schemes nor one particle


@pytest.mark.gpu
@CUDA
@pytest.mark.parametrize("scheme", ["systematic", "stratified"])
@pytest.mark.parametrize("size", [2, 33, 1000, 1025, 4097, 10_000, 16_384, 16_385, 100_000, 1_000_000])
def test_on_a_gpu_the_kernel_is_the_formula(scheme: str, size: int) -> None:
    cases = ((5, None, ()), (700, 0.5, (3,)), (1000, 1.0, (4,)), (300, None, (70,)))
    for batch, threshold, event in cases if size < 20_000 else ((12, None, ()), (15, 0.5, (3,))):
        logw = 2 * torch.randn(batch, size, dtype=torch.float64, device="cuda", generator=seeded(device="cuda"))
        logw[0] = 0.0
        if size > 9:
            logw[:5] = log_weights(5, size, device="cuda")  # of each kind
        x = torch.randn(batch, size, *event, device="cuda")
        check(logw, size, scheme, threshold, x)
        with_weight = logw[4:]
        assert bool((with_weight.gather(-1, resample(with_weight, scheme=scheme)) > -math.inf).all())
        if threshold is None:
            check(logw, size // 2 + 1, scheme, None, x)


def filter_step(cloud: Cloud, scheme: str) -> tuple[Cloud, Tensor, Tensor]:
    cloud = cloud.reweight(-cloud.x["a"].square().sum(-1))
    return cloud.maybe_resample(0.5, scheme)


def on_gpu(size: int) -> Cloud:
    return Cloud.uniform(
        {"a": torch.randn(6, size, 2, device="cuda"), "b": torch.zeros(6, size, device="cuda")}, (6, size)
    )


@pytest.mark.gpu
@CUDA
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("size", [500, 40_000])
def test_a_step_never_waits_for_the_device(scheme: str, size: int) -> None:
    cloud = on_gpu(size)
    filter_step(cloud, scheme)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            cloud, ancestors, _ = filter_step(cloud, scheme)
        cloud.mean(lambda x: x["a"])
        cloud.quantile(0.5, lambda x: x["a"])
        counts(ancestors, size)
        gather(cloud.x, ancestors)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert bool(cloud.log_z.isfinite().all())


@pytest.mark.gpu
@CUDA
@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_step_is_captured_in_a_graph(scheme: str) -> None:
    cloud = on_gpu(500)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        filter_step(cloud, scheme)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        made, ancestors, did = filter_step(cloud, scheme)
    cloud.x["a"].normal_().mul_(3)
    graph.replay()
    torch.cuda.synchronize()
    assert bool(did.all())
    assert torch.equal(made.x["a"], gather(cloud.x["a"], ancestors))
    expected = cloud.reweight(-cloud.x["a"].square().sum(-1)).log_z
    assert torch.allclose(made.log_z, expected)


@pytest.mark.gpu
@CUDA
def test_a_broken_system_on_a_gpu_says_so_in_its_evidence() -> None:
    cloud = on_gpu(500)
    spoilt: Any = torch.zeros(6, 500, dtype=torch.float64, device="cuda")
    spoilt[1], spoilt[2, 7] = -torch.inf, torch.nan
    cloud, ancestors, _ = cloud.reweight(spoilt).maybe_resample(1.0)
    assert cloud.log_z.isnan().tolist() == [False, False, True, False, False, False]
    assert cloud.log_z[1] == -torch.inf
    assert torch.equal(ancestors.cpu(), torch.arange(500).expand(6, 500))
    with pytest.raises(ValueError, match=r"NaN in system \(2,\)"):
        resample(spoilt, check=True)
