"""APG's kernels: in Triton's interpreter against the formula in float64, what they do not take, and their use on a GPU."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from polyak.generate import APG, CFG, DDIM, EDM, VP, APGState, Denoiser, Heun, Prediction, normalized_guidance, sample
from polyak.generate.apg import kernel
from polyak.generate.apg.kernel import How, Pair
from polyak.generate.apg.update import difference, updated

EPS = torch.finfo(torch.float32).eps
GAIN, BETA = 5.5, -0.75


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors on the CPU are taken for such on a GPU."""
    triton = pytest.importorskip("triton")
    if torch.cuda.is_available() or not triton.knobs.runtime.interpret:
        pytest.skip("needs Triton's interpreter")
    monkeypatch.setattr(kernel, "_on_gpu", lambda x: True)


@pytest.fixture
def small(interpreted: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Programs have few elements, and rows few programs: small tensors take several of each."""
    clear = (kernel._split.cache_clear, kernel._kernels.cache_clear)
    for f in clear:
        f()
    monkeypatch.setattr(kernel, "BLOCK", 32)
    monkeypatch.setattr(kernel, "PARTS", 4)
    yield
    for f in clear:
        f()


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The programs of each launch."""
    grids: list[int] = []
    launch = kernel._launch

    def counted(made: Any, grid: int, *rest: Any) -> None:
        grids.append(grid)
        launch(made, grid, *rest)

    monkeypatch.setattr(kernel, "_launch", counted)
    return grids


def drawn(shape: tuple[int, ...], dtype: torch.dtype = torch.float32, count: int = 4) -> Any:
    made = torch.randn(count, *shape, generator=torch.Generator().manual_seed(len(shape)), dtype=torch.float64)
    return made.to(dtype).unbind()


def check(pair: Pair, memory: Tensor | None, how: How, moves: bool = True) -> None:
    """What the kernels make is the formula in float64, but for the roundings of its terms; and so is what they remember."""
    wide = Pair(*(None if t is None else t.double() for t in pair[:3]), *pair[3:])  # type: ignore[arg-type]
    states = [APGState(BETA, average=m, before=m) for m in (memory, None if memory is None else memory.double())]
    dtype = torch.float32 if pair.x is not None else pair.cond.dtype
    c, d = difference(wide)
    want = updated(wide, states[1], moves, how, torch.float64)
    made = kernel.guided(pair, memory, BETA, moves, how, dtype)
    assert made is not None
    got, average = made
    assert got.dtype == dtype
    assert got.stride() == pair.cond.stride()
    assert (average is None) == (not moves)
    # Of a term of size s each of some ten operations errs by s EPS / 2; a sum of m terms of size t by log2(m) t EPS / 2 or so,
    # which is less.
    largest = max(t.abs().max().item() for t in (c, d, *([] if memory is None else [memory])))
    size = 1 + abs(pair.a) + abs(pair.b)
    atol = 16 * EPS * size * largest * (1 + abs(how.gain))
    low = (
        0.0 if dtype == torch.float32 else torch.finfo(dtype).eps
    )  # Triton's interpreter cuts what bfloat16 cannot hold
    assert ((got.double() - want).abs() <= atol + low * want.abs()).all(), (got.double() - want).abs().max() / atol
    if average is not None:
        assert average.dtype == torch.float32
        remembered = states[1].average
        assert remembered is not None
        assert ((average.double() - remembered).abs() <= 8 * EPS * size * largest).all()


HOWS = {
    "projected": How(GAIN, 0.0, 0.0), "some is kept": How(GAIN, 0.3, 0.0), "capped": How(GAIN, 0.0, 2.0),
    "capped alone": How(GAIN, 1.0, 2.0), "nothing is summed": How(GAIN, 1.0, 0.0), "loose": How(GAIN, 0.2, 1e6),
    "of uncond": How(GAIN, 0.0, 2.0, True), "of uncond, not projected": How(GAIN, 1.0, 2.0, True),
    "channels": How(GAIN, 0.0, 0.0, False, True), "channels, capped": How(GAIN, 0.4, 2.0, True, True),
}  # fmt: skip


@pytest.mark.parametrize("name", HOWS)
@pytest.mark.usefixtures("interpreted")
def test_every_option_is_the_formula(name: str, launches: list[int]) -> None:
    how = HOWS[name]
    c, u, x, before = drawn((2, 2, 3, 7))
    check(Pair(c, u, x, 1.25, -0.75), before, how)
    check(Pair(c, u), before if name in ("capped", "nothing is summed") else None, how, moves=False)
    assert launches == [4 if how.channels else 2] * (2 if name == "nothing is summed" else 4)


@pytest.mark.parametrize("shape", [(1, 1), (1, 2500), (2, 1, 2, 2, 5)], ids=str)
@pytest.mark.usefixtures("interpreted")
def test_shapes(shape: tuple[int, ...]) -> None:
    c, u, x, _ = drawn(shape)
    check(Pair(c, u, x, 0.8, 0.3), None, How(GAIN, 0.1, 1.5))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.usefixtures("interpreted")
def test_types(dtype: torch.dtype) -> None:
    c, u, x, before = drawn((1, 2, 37), dtype)
    check(Pair(c, u), before.float(), How(GAIN, 0.1, 1.5))
    check(Pair(c, u.float(), x.float(), 0.8, 0.3), before, How(GAIN, 0.0, 1.5))


@pytest.mark.parametrize("channels", [False, True])
@pytest.mark.usefixtures("small")
def test_a_long_row_has_programs_that_go_on(channels: bool, launches: list[int]) -> None:
    c, u, x, before = drawn((1, 2, 10, 37))
    check(Pair(c, u, x, 1.25, -0.75), before, How(GAIN, 0.1, 2.0, True, channels))
    # 740 elements are 24 blocks, 6 for each of 4 programs; a channel's 370 are 12, of 3.
    assert launches == [2 * 4 if channels else 4] * 2


@pytest.mark.usefixtures("interpreted")
def test_another_layout_and_large_and_missing_data(launches: list[int]) -> None:
    c, u, x, before = (t.to(memory_format=torch.channels_last) for t in drawn((2, 3, 4, 5)))
    check(Pair(c, u, x, 1.25, -0.75), before, HOWS["capped"])
    c, u, *_ = (300 * t for t in drawn((2, 3, 4), torch.float16))  # squares that half precision cannot hold
    check(Pair(c, u), None, HOWS["capped"])
    zero = torch.zeros(2, 12)
    check(Pair(zero, drawn((2, 12))[0]), None, HOWS["capped"])  # nothing is parallel to data that are 0
    check(Pair(zero + 1, zero + 1), None, HOWS["capped"])
    assert len(launches) == 8
    c, u, *_ = drawn((2, 12))
    c[1, 3] = torch.nan
    got, _ = kernel.guided(Pair(c, u), None, 0.0, False, HOWS["capped"], c.dtype)  # type: ignore[misc]
    assert bool(got[0].isfinite().all())
    assert bool(got[1].isnan().all())


@pytest.mark.usefixtures("interpreted")
def test_what_is_not_taken_goes_the_other_way(launches: list[int]) -> None:
    c, u, _, before = drawn((2, 3, 4, 4))
    how = HOWS["capped"]

    def taken(pair: Pair, memory: Tensor | None = None, how: How = how) -> bool:
        return kernel.guided(pair, memory, BETA, True, how, torch.float32) is not None

    wide, strided = c.double(), torch.randn(2, 3, 4, 8)[..., ::2]
    last = [t.to(memory_format=torch.channels_last) for t in (c, u)]
    for pair in (
        Pair(wide, u), Pair(c, wide), Pair(c, u, wide), Pair(strided, strided), Pair(c, strided), Pair(c, last[1]),
        Pair(c.clone().requires_grad_(), u), Pair(c.to("meta"), u.to("meta")), Pair(c[:0], u[:0]),
    ):  # fmt: skip
        assert not taken(pair)
    assert not taken(Pair(c, u), before.double())
    assert not taken(Pair(c, u), strided)
    assert not taken(Pair(c, u), how=how._replace(rescale=0.5))
    assert not taken(Pair(*last), how=how._replace(channels=True))
    plain = APG(3.0)
    each = torch.func.vmap(lambda c, u: plain.combine(c, u, plain.init()))(c[:, None], u[:, None])
    assert not launches
    assert taken(Pair(c, u))
    assert len(launches) == 2
    assert torch.allclose(each[:, 0], plain.combine(c, u, plain.init()), rtol=1e-5, atol=1e-5)
    leaf = c.clone().requires_grad_()
    got = normalized_guidance(leaf, u, 4.0, APGState(BETA, average=strided), 0.0, 2.0)
    assert torch.autograd.grad(got.sum(), leaf)[0].isfinite().all()
    got_whole = normalized_guidance(c, u, 4.0, APGState(BETA, average=strided.contiguous()), 0.0, 2.0)
    assert torch.allclose(got, got_whole, rtol=1e-5, atol=1e-5)
    assert len(launches) == 6


RUNS: dict[str, dict[str, Any]] = {
    "x0": {"norm_threshold": 2.0, "momentum": -0.5},
    "pred": {"space": "pred", "base": "uncond", "norm_threshold": 1.0, "update": "every", "momentum": 0.5},
}  # fmt: skip


def network(dtype: torch.dtype | None = None) -> Denoiser:
    def say(x: Tensor, t: Tensor, turn: float) -> Tensor:
        said = torch.tanh(x.float() + turn * x.float().flip(-1)) * (1 + t.float().reshape(-1, 1, 1))
        return said.to(dtype or x.dtype)

    return Denoiser(lambda x, t: say(x, t, 0.7), VP(), unconditional=lambda x, t: say(x, t, -0.3))


@pytest.mark.parametrize("name", RUNS)
def test_a_trajectory_and_its_memory(name: str, interpreted: None, launches: list[int]) -> None:
    guidance, x = APG(4.0, **RUNS[name]), drawn((2, 2, 6))[0]
    how: dict[str, Any] = {"solver": Heun(), "steps": 2, "guidance": guidance}
    kept: list[Any] = []
    got = sample(network(), x, callback=kept.append, **how)
    assert len(launches) == 2 * 4
    assert torch.equal(got, sample(network(), copy.deepcopy(kept[0]), **how))  # a copy of the state goes on by itself
    before = len(launches)
    exact = sample(network(), x.double(), **how)
    assert len(launches) == before
    # Four evaluations, whose errors grow with the scale.
    assert (got - exact).abs().max() < 1e-4 * exact.abs().max()
    state = guidance.init()
    cond, uncond = network().pair(x, 0.5)
    first = guidance(cond, uncond, state)
    average = state.average
    if guidance.update == "step":
        assert torch.equal(guidance(cond, uncond, state, update=False).output, first.output)
        assert state.average is average
    order = torch.tensor([1, 0])
    swapped, turned = guidance.reindex(state, order), x[order]
    pairs = [Prediction(p.output[order], turned, 0.5, VP(), p.kind) for p in (cond, uncond)]
    assert torch.equal(guidance(*pairs, swapped).output, guidance(cond, uncond, state).output[order])


def test_half_precision_networks_are_read_as_they_are(interpreted: None, launches: list[int]) -> None:
    x = drawn((1, 2, 6))[0]
    guidance = APG(4.0, norm_threshold=2.0, momentum=-0.5)
    low = sample(network(torch.bfloat16), x, solver=DDIM(), steps=2, guidance=guidance)
    assert low.dtype == torch.float32
    assert len(launches) == 4


# --- on a GPU


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("shape", [(2, 4, 128), (1, 3, 700001)], ids=str)
def test_on_a_gpu_nothing_waits_for_the_device(name: str, shape: tuple[int, ...], launches: list[int]) -> None:
    guidance, x = APG(4.0, **RUNS[name]), drawn(shape)[0]
    how: dict[str, Any] = {"solver": Heun(), "grid": EDM().grid(3, "karras").tolist(), "guidance": guidance}
    weight = 0.2
    denoiser = Denoiser(
        lambda x, t: torch.tanh(x * weight), EDM(), "sample", unconditional=lambda x, t: torch.tanh(x * weight - 0.3)
    )
    on_gpu = x.cuda()
    sample(denoiser, on_gpu, check_finite=False, **how)  # compiles
    count = len(launches)
    assert count
    torch.cuda.set_sync_debug_mode("error")
    try:
        got = sample(denoiser, on_gpu, check_finite=False, **how)
        again = sample(denoiser, on_gpu, check_finite=False, **how)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(launches) == 3 * count
    assert torch.equal(got, again)
    want = sample(denoiser, x.double(), **how)
    assert (got.cpu() - want).abs().max() < 1e-4 * want.abs().max()
    cfg = [sample(denoiser, on_gpu, solver=DDIM(), steps=3, guidance=g) for g in (CFG(3.0), APG(3.0, eta=1.0))]
    assert torch.equal(*cfg)
