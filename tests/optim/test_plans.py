"""Plans: what changes from step to step needs no new one; and what a plan is made of."""

import copy
import ctypes
import random
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from references_for_tests import assert_same, give, gradients, normal, parameters, run
from systems_for_tests import SYSTEMS

from polyak.core import cc
from polyak.optim import Adan, Lion
from polyak.optim._engine import compiled, look, plan
from polyak.optim._engine.norm import global_norm

SHAPES = [(), (7,), (3, 5), (0,), (40, 30)]
makers = pytest.mark.parametrize("name", sorted(SYSTEMS))
# Those that compiled code runs.
PLANNED = sorted(set(SYSTEMS) - {"lion-cautious", "lion-entropic", "lion-l2-tensor"})


@pytest.fixture
def made(monkeypatch):
    """How many plans have been made."""
    plans = []
    make = plan.make
    monkeypatch.setattr(plan, "make", lambda *a, **o: plans.append(make(*a, **o)) or plans[-1])
    return plans


@pytest.mark.parametrize("name", PLANNED)
def test_experts_need_no_plan_of_their_own(made, name):
    """Another half of the tensors has gradients at every step: nothing is planned, nor compiled, once all have a state."""
    shapes = [(4, 3)] * 12
    draw = random.Random(0)
    absent = {(t, i) for t in range(30) for i in range(12) if draw.random() < 0.5}
    results = []
    for options in ({}, dict(foreach=False)):
        params = parameters(shapes)
        optimizer = SYSTEMS[name](params, **options)
        for t, grads in enumerate(gradients(shapes, 30, absent=absent)):
            if t == 12:
                libraries, plans = cc.library.cache_info().misses, len(made)
            run(optimizer, params, [grads])
        assert len(made) == plans
        assert cc.library.cache_info().misses == libraries
        results.append(params)
    assert_same(*results, atol=1e-12)


@pytest.mark.parametrize("name", sorted(set(PLANNED) - {"spam-sparse", "adamp-never"}))  # those make their own groups
def test_one_text_for_all_groups_and_counts(name):
    """A group a tensor, each with its own numbers and count, is one call."""
    shapes = [(4, 3), (6,), (2, 2), (5,)]
    results = []
    for options in ({}, dict(foreach=False)):
        params = parameters(shapes)
        groups = [{"params": [p], "lr": 0.01 * (i + 1)} for i, p in enumerate(params)]
        optimizer = SYSTEMS[name](groups, **options)
        absent = {(0, 1), (1, 1), (2, 3), (5, 0)}
        for t, grads in enumerate(gradients(shapes, 8, absent=absent)):
            for k, group in enumerate(optimizer.param_groups):
                group["lr"] = 0.01 * (k + 1) / (t + 1)  # as schedulers do, a new number each
            run(optimizer, params, [grads])
        results.append(params)
        if not options:
            assert len(optimizer._plan.cohorts) == 1
    assert_same(*results, atol=1e-12)


@makers
def test_the_same_numbers_need_no_new_plan(made, name):
    params = parameters(SHAPES)
    optimizer = SYSTEMS[name](params)
    for t, grads in enumerate(gradients(SHAPES, 6)):
        for group in optimizer.param_groups:
            group["lr"] = 0.01 / (t + 1)
            group["mine"] = t  # anybody's
        if t == 2:
            before = len(made)
        run(optimizer, params, [grads])
    assert len(made) == before


@pytest.mark.parametrize("name", ["adan", "spam", "adamp"])
def test_numbers_in_lists_and_tensors_may_change_in_place(made, name):
    params, twins = parameters(SHAPES), parameters(SHAPES)
    lr = torch.tensor(0.01, dtype=torch.float64)
    optimizer, reference = SYSTEMS[name](params, lr=lr), SYSTEMS[name](twins, foreach=False)
    optimizer.param_groups[0]["betas"] = betas = list(optimizer.param_groups[0]["betas"])
    for t, grads in enumerate(gradients(SHAPES, 5)):
        lr.fill_(0.01 / (t + 1))
        betas[0] = 0.9 - 0.1 * t
        reference.param_groups[0].update(lr=0.01 / (t + 1), betas=(0.9 - 0.1 * t, *betas[1:]))
        run(optimizer, params, [grads])
        run(reference, twins, [grads])
    assert_same(params, twins, atol=1e-12)
    assert len(made) == 2


def test_a_clip_that_is_switched_on_is_seen():
    params, twins = parameters(SHAPES), parameters(SHAPES)
    optimizer, reference = Adan(params), Adan(twins, foreach=False)
    for t, grads in enumerate(gradients(SHAPES, 5)):
        for each in (optimizer, reference):
            each.param_groups[0]["max_grad_norm"] = [0.0, 0.5, 0.1, 0.0, 0.2][t]
        run(optimizer, params, [grads])
        run(reference, twins, [grads])
    assert_same(params, twins, atol=1e-12)


@pytest.mark.parametrize("native", ["through_headers", "through_dlpack", None])
def test_counters_are_counted_once_a_step(native, monkeypatch):
    if native is not None and getattr(look, native)() is None:
        pytest.skip("needs a compiler")
    monkeypatch.setattr(look, "native", getattr(look, native) if native else (lambda: None))
    params = parameters([(3,)] * 4)
    optimizer = Adan(params)
    steps = gradients([(3,)] * 4, 6, absent={(1, 0), (3, 0), (3, 1), (4, 1)})
    run(optimizer, params, steps[:1])
    assert len({id(optimizer.state[p]["step"]) for p in params}) == 1, "one counter while all go together"
    for t, grads in enumerate(steps[1:], 1):
        optimizer.param_groups[0]["lr"] = 0.1 / t  # read anew at each step
        run(optimizer, params, [grads])
    assert [float(optimizer.state[p]["step"]) for p in params] == [4, 4, 6, 6]


def test_counts_of_other_types_wait_for_a_gradient_too():
    params = parameters([(3,)] * 2)
    optimizer = run(Adan(params), params, gradients([(3,)] * 2, 1))
    optimizer.state[params[0]]["step"] = torch.tensor([1.0], dtype=torch.float64)
    run(optimizer, params, gradients([(3,)] * 2, 4, absent={(1, 0), (3, 0)}))
    assert [float(optimizer.state[p]["step"]) for p in params] == [3, 5]


@pytest.mark.parametrize("native", ["through_headers", "through_dlpack", None])
def test_a_gradient_that_is_its_parameter_is_copied(native, monkeypatch):
    """Compiled code is told that what it reads and writes are different places."""
    if native is not None and getattr(look, native)() is None:
        pytest.skip("needs a compiler")
    monkeypatch.setattr(look, "native", getattr(look, native) if native else (lambda: None))
    params = parameters([(3,)] * 2)
    optimizer = run(Adan(params), params, gradients([(3,)] * 2, 1))
    params[0].grad = params[0].detach()
    optimizer.step()
    assert optimizer._plan.looker.status.tolist() == [look.COPIED, look.READ]


def test_tensors_that_share_memory_go_one_after_the_other():
    whole, (other,) = normal((8,), 0), parameters([(3,)])
    params = [torch.nn.Parameter(t) for t in (whole, whole[3:5])] + [other]
    optimizer = run(Adan(params), params, gradients([(8,), (2,), (3,)], 2))
    assert [row.mode for row in optimizer._plan.rows] == ["eager", "eager", "compiled"]


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("name", [*PLANNED, "large rounding"])
def test_threads_share_the_work(name, threads):
    shapes = [(300, 200), (7,), (90_000,), (2, 30_000), (1, 5), (0, 4)]
    made = dict(rounding="stochastic", generator=torch.Generator().manual_seed(0)) if name == "large rounding" else {}
    make = SYSTEMS["adan"] if made else SYSTEMS[name]
    before = torch.get_num_threads()
    results = []
    try:
        for count in (threads, 1):
            torch.set_num_threads(count)
            params = parameters(shapes, torch.bfloat16 if made else torch.float64)
            if made:
                made["generator"].manual_seed(0)
            run(make(params, **made), params, gradients(shapes, 3, absent={(1, 2)}))
            results.append(params)
    finally:
        torch.set_num_threads(before)
    # Where tensors are projected, and in PyTorch's own norms, sums are in another order: roundings of numbers of order one.
    summed = name in ("adamp", "sgdp", "lion-l2-all", "lion-l2-group")
    assert_same(*results, atol=1e-13 if summed else 0.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("threads", [1, 3])
def test_the_norm_of_all_gradients(dtype, threads):
    """Sums of squares in float64, whose order does not depend on threads; PyTorch's in float32 differ by roundings."""
    shapes = [(300, 300), (7,), (), (0,), (70_000,)]
    params = parameters(shapes, dtype)
    seen = []
    optimizer = Adan(params, lr=0.0, max_grad_norm=1.0)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        for grads in gradients(shapes, 2):
            give(params, grads)
            optimizer.step()
            cohort = optimizer._plan.cohorts[0]
            seen.append(float(cohort.numbers[0, cohort.places_of["grad_norm"]]))
            exact = torch.stack([p.grad.double().square().sum() for p in params]).sum().sqrt()
            assert abs(seen[-1] - float(exact)) <= 1e-12 * float(exact)
            other = float(global_norm([p.grad for p in params]))
            assert abs(other - float(exact)) <= (1e-12 if dtype == torch.float64 else 1e-4) * float(exact)
    finally:
        torch.set_num_threads(before)


def test_the_norm_of_tensors_of_many_kinds():
    from torch.testing._internal.two_tensor import TwoTensor

    grads = [normal((3,), 0), normal((4, 2), 1).float(), torch.complex(normal((2,), 2), normal((2,), 3)).conj()]
    grads += [torch._neg_view(normal((5,), 4)), normal((6,), 5).to(torch.bfloat16), torch.zeros(0)]
    exact = torch.stack([g.to(torch.complex128).abs().square().sum() for g in grads]).sum().sqrt()
    assert abs(float(global_norm(grads)) - float(exact)) < 1e-6 * float(exact)
    assert float(global_norm([])) == 0.0
    wrapped = TwoTensor(torch.full((4,), 2.0), torch.full((4,), 2.0))
    assert float(global_norm([wrapped])) == 4.0
    plain = torch.full((4,), 2.0)
    assert abs(float(global_norm([plain, wrapped, plain])) - 48**0.5) < 1e-6


# The compiler.


def test_a_compilers_error_is_told_once(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(cc, "_reported", [])
    broken = tmp_path / "cc"
    broken.write_text("#!/bin/sh\necho 'no such option: -march=native' >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CC", str(broken))
    library = cc.library.__wrapped__
    with pytest.warns(UserWarning, match="without some compiled code.*slower") as told:
        assert library("int a;") is None
    assert "no such option: -march=native" in str(told[0].message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert library("int b;") is None


def test_no_compiler_is_no_error(monkeypatch):
    monkeypatch.setenv("POLYAK_NO_COMPILER", "1")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert cc.library.__wrapped__("int a;") is None
        assert cc.library.__wrapped__("int a;", ctypes.PyDLL, ("-std=c++20",)) is None


def test_without_anything_compiled_the_result_is_the_same(monkeypatch):
    monkeypatch.setattr(compiled, "rule", lambda *what: None)
    monkeypatch.setattr(look, "native", lambda: None)
    params, twins = parameters(SHAPES), parameters(SHAPES)
    steps = gradients(SHAPES, 5, absent={(1, 1), (2, 4)})
    assert run(Adan(params, max_grad_norm=0.5), params, steps)._plan.mode == "foreach"
    run(Adan(twins, max_grad_norm=0.5, foreach=False), twins, steps)
    assert_same(params, twins, atol=1e-13)


def test_another_pytorch_is_not_read_through_these_headers(monkeypatch):
    """Its tensors lie elsewhere: that is found out without touching them."""
    native = look.through_headers()
    if native is None:
        pytest.skip("needs a C++ compiler and PyTorch's headers")
    assert look._reads(native)
    for payload in (0, 8, 24, 32):
        assert not look._reads(native._replace(payload=payload))


def test_counts_are_where_the_options_want_them():
    params, twins = parameters([(3,), (2, 2)]), parameters([(3,), (2, 2)])
    optimizer, reference = Adan(params), Adan(twins, foreach=False)
    for t, grads in enumerate(gradients([(3,), (2, 2)], 6)):
        optimizer.param_groups[0]["capturable"] = t in (2, 3)
        run(optimizer, params, [grads])
        run(reference, twins, [grads])
    assert_same(params, twins, atol=1e-12)
    assert {float(s["step"]) for s in optimizer.state.values()} == {6.0}


def test_states_are_saved_without_one_another(tmp_path):
    """A state alone is written as large as it is, also where it was looked at through views."""
    params = parameters([(50, 40)] * 8)
    optimizer = run(Lion(params), params, gradients([(50, 40)] * 8, 2))
    torch.save(optimizer.state[params[0]]["exp_avg"], tmp_path / "one.pt")
    torch.save(copy.deepcopy(optimizer.state_dict()), tmp_path / "all.pt")
    one, everything = ((tmp_path / name).stat().st_size for name in ("one.pt", "all.pt"))
    assert one < 50 * 40 * 8 + 4096
    assert everything < 8 * 50 * 40 * 8 + 16384


@pytest.mark.slow
def test_kernels_are_compiled_for_a_gpu_that_is_not_there():
    pytest.importorskip("triton")
    script = Path(__file__).with_name("kernels_for_tests.py")
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert int(done.stdout.split()[-1]) > 60
