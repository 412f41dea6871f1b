"""The optimizers on a CUDA device. Runs under pytest, and as a script (``python tests/optim/test_gpu.py``) where that is absent."""

from __future__ import annotations

import copy
import itertools
import math
import sys
import time
import traceback
from contextlib import contextmanager

import torch

from polyak.optim import SGDP, SPAM, AdamP, Adan, Lion, LionK
from polyak.optim.lion import kappa

try:
    import pytest
except ImportError:
    pytest = None

if pytest is not None:
    pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

CUDA = torch.device("cuda")
SIZES = [(), (1,), (3,), (1023,), (1024,), (1025,), (64, 33), (0,), (70_001,), (2, 3, 5, 7)]
FEW = [(5,), (1024,), (33, 65), ()]
LOW = (torch.bfloat16, torch.float16)


def cases(names, values):
    """``pytest.mark.parametrize`` that also works without pytest."""

    def decorate(test):
        test.cases = [*getattr(test, "cases", []), (names.split(", "), values)]
        return test if pytest is None else pytest.mark.parametrize(names, values)(test)

    return decorate


def dyadic(shape, seed, scale=8):
    """Random multiples of 1/scale up to 2, zero among them: sums and products with dyadic betas are exact in float32."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-2 * scale, 2 * scale + 1, shape, generator=generator).double() / scale


def normal(shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def parameters(shapes, dtype, device, make=normal):
    return [torch.nn.Parameter(make(s, i).to(dtype).to(device)) for i, s in enumerate(shapes)]


def give_gradients(params, t, make=normal, *, late=None):
    """Step t's gradients, the same for every device and type up to rounding; parameter ``late`` has none before t = 2."""
    for i, p in enumerate(params):
        absent = i == late and t < 2
        p.grad = None if absent else make(tuple(p.shape), 1000 * (t + 1) + i).to(p.dtype).to(p.device)


def train(make_optimizer, params, steps, make=normal, *, late=None, start=0):
    optimizer = make_optimizer(params)
    for t in range(start, start + steps):
        give_gradients(params, t, make, late=late)
        optimizer.step()
    return optimizer


def assert_close(actual, expected, *, atol, rtol=0.0):
    for i, (a, e) in enumerate(zip(actual, expected, strict=True)):
        torch.testing.assert_close(
            a.detach().double().cpu(), e.detach().double().cpu(), atol=atol, rtol=rtol, equal_nan=True,
            msg=lambda text, i=i: f"tensor {i}: {text}",
        )  # fmt: skip


def assert_equal(actual, expected):
    assert_close(actual, expected, atol=0.0)


def mode(optimizer, group=0):
    return next(row.mode for row in optimizer._plan.rows if row.group == group)


@contextmanager
def no_synchronization():
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def sparse_spam(params, **options):
    """A quarter of the moments in matrices, all of them elsewhere."""
    groups = [
        {"params": [p for p in params if p.dim() == 2], "density": 0.25},
        {"params": [p for p in params if p.dim() != 2]},
    ]
    return SPAM(
        groups, lr=1e-2, weight_decay=0.1, reset_interval=3, warmup_steps=1, grace=1, threshold=2.0,
        generator=torch.Generator().manual_seed(0), **options,
    )  # fmt: skip


SYSTEMS = {
    "adan": lambda p, **o: Adan(p, lr=1e-2, **o),
    "adan-clip": lambda p, **o: Adan(p, lr=1e-2, weight_decay=0.1, max_grad_norm=0.5, maximize=True, **o),
    "adan-no-prox": lambda p, **o: Adan(p, lr=1e-2, betas=(0.9, 0.0, 0.95), weight_decay=0.1, no_prox=True, **o),
    "lion-entropic": lambda p, **o: LionK(p, kappa.Entropic(3.0), lr=1e-2, weight_decay=0.5, **o),
    "lion-relativistic": lambda p, **o: LionK(
        p, kappa.Relativistic(0.3), lr=1e-2, weight_decay=0.5, maximize=True, **o
    ),
    "lion-huber": lambda p, **o: LionK(p, kappa.Huber(0.2), lr=1e-2, weight_decay=0.5, **o),
    "lion-half-square": lambda p, **o: LionK(p, "half_square", lr=1e-2, **o),
    "lion-l2-group": lambda p, **o: LionK(p, kappa.L2("group"), lr=1e-2, weight_decay=0.5, **o),
    "lion-l2-all": lambda p, **o: LionK(p, kappa.L2("all"), lr=1e-2, weight_decay=0.5, **o),
    "adamp": lambda p, **o: AdamP(p, lr=1e-2, weight_decay=0.1, **o),
    "adamp-always": lambda p, **o: AdamP(p, lr=1e-2, weight_decay=0.1, delta=1e9, nesterov=True, maximize=True, **o),
    "sgdp": lambda p, **o: SGDP(p, lr=1e-2, momentum=0.9, weight_decay=0.1, **o),
    "sgdp-buffer": lambda p, **o: SGDP(
        p, lr=1e-2, momentum=0.9, dampening=0.1, weight_decay=0.1, delta=1e9, project_buffer=True, **o
    ),
    "spam": lambda p, **o: SPAM(
        p, lr=1e-2, weight_decay=0.1, reset_interval=3, warmup_steps=1, grace=1, threshold=2.0, **o
    ),
    "spam-sparse": sparse_spam,
}
# Discontinuous updates are compared on numbers for which float32 is exact.
EXACT = {
    "lion": lambda p, **o: Lion(p, lr=2**-6, betas=(0.875, 0.9375), weight_decay=0.5, **o),
    "lion-dead-zone": lambda p, **o: LionK(p, kappa.DeadZone(0.25), lr=2**-6, betas=(0.875, 0.9375), **o),
}


@cases("name", sorted(SYSTEMS))
@cases("dtype", [torch.float64, torch.float32])
@cases("capturable", [False, True])
def test_kernel_equals_the_float64_reference(name, dtype, capturable):
    expected = parameters(SIZES, torch.float64, "cpu")
    reference = train(lambda p: SYSTEMS[name](p, foreach=False), expected, 5, late=3)
    actual = parameters(SIZES, dtype, CUDA)
    optimizer = train(lambda p: SYSTEMS[name](p, capturable=capturable), actual, 2, late=3)
    if name == "spam-sparse" and capturable:
        optimizer.redraw_masks()  # step 3 resets
    train(lambda _: optimizer, actual, 3, late=3, start=2)
    assert mode(optimizer) == "kernel"
    # float32: five roundings of |p| < 5 (half an ulp: 2.4e-7), and relative errors of the update well below 1e-4.
    atol = 5 * 2.4e-7 + 5 * 1e-2 * 1e-4 if dtype == torch.float32 else 1e-12
    if dtype == torch.float64 and ("clip" in name):
        atol = 1e-10
    assert_close(actual, expected, atol=atol)
    for a, e in zip(actual, expected, strict=True):
        assert_close(
            [optimizer.state[a][n] for n in optimizer.state_names], [reference.state[e][n] for n in optimizer.state_names],
            atol=3e-6 if dtype == torch.float32 else atol,
        )  # fmt: skip


@cases("name", sorted(EXACT))
@cases("backend", ["kernel", "foreach"])
def test_exact_arithmetic_is_exact(name, backend):
    expected = parameters(SIZES, torch.float64, "cpu", dyadic)
    train(lambda p: EXACT[name](p, foreach=False), expected, 3, dyadic)
    actual = parameters(SIZES, torch.float32, CUDA, dyadic)
    optimizer = train(lambda p: EXACT[name](p, foreach=True if backend == "foreach" else None), actual, 3, dyadic)
    assert mode(optimizer) == backend
    assert_close(actual, expected, atol=3e-6)  # the parameter itself is rounded; a wrong sign would be off by 1/32


@cases("name", ["adan", "adan-clip", "lion-entropic", "lion-l2-all"])
@cases("options", [dict(foreach=True), dict(foreach=False), dict(foreach=True, capturable=True)])
def test_other_backends_equal_the_reference(name, options):
    expected = parameters(FEW, torch.float64, "cpu")
    train(lambda p: SYSTEMS[name](p, foreach=False), expected, 5, late=1)
    actual = parameters(FEW, torch.float64, CUDA)
    train(lambda p: SYSTEMS[name](p, **options), actual, 5, late=1)
    assert_close(actual, expected, atol=1e-10)


# Low precision.


@cases("dtype", LOW)
@cases("state_dtype", [None, torch.float32])
@cases("name", ["adan", "lion-entropic", "adamp-always", "spam"])
def test_low_precision_agrees_with_the_cpu(name, dtype, state_dtype):
    def make(p, **o):
        return SYSTEMS[name](p, state_dtype=state_dtype, **o)

    expected, actual = parameters(SIZES, dtype, "cpu"), parameters(SIZES, dtype, CUDA)
    train(lambda p: make(p, foreach=False), expected, 4)
    train(make, actual, 4)
    off = total = 0
    ulp = torch.finfo(dtype).eps
    for a, e in zip(actual, expected, strict=True):
        a, e = a.detach().double().cpu(), e.detach().double()
        # A value near the middle of two numbers may round either way, and then the difference may grow a little.
        assert ((a - e).abs() <= 3 * ulp * e.abs().clamp(min=2**-6)).all()
        off, total = off + int((a != e).sum()), total + a.numel()
    assert off <= 0.01 * total


@cases("dtype", LOW)
@cases("name", ["adan", "lion-entropic"])
def test_kahan_tracks_float32(name, dtype):
    start = parameters(FEW, dtype, CUDA)
    exact = [torch.nn.Parameter(p.detach().float()) for p in start]
    steps = 40

    def make(p, **o):
        return SYSTEMS[name](p, **o)

    low = make(start, rounding="kahan", state_dtype=torch.float32)
    wide = make(exact)
    plain = parameters(FEW, dtype, CUDA)
    nearest = make(plain, state_dtype=torch.float32)
    for t in range(steps):
        give_gradients(start, t)
        for p, q, r in zip(start, exact, plain, strict=True):
            q.grad, r.grad = p.grad.float(), p.grad.clone()
        low.step(), wide.step(), nearest.step()
    tracked = [p.detach().double() + low.state[p]["compensation"].double() for p in start]
    # What is lost is rounding of the remainder (half an ulp of half an ulp of p), once a step; fp16 adds its subnormals.
    eps = torch.finfo(dtype).eps
    worst = max(float(q.abs().max()) for q in exact)
    bound = steps * (eps / 2) ** 2 * worst + steps * 6e-8 + steps * 2.4e-7
    assert_close(tracked, exact, atol=bound)
    error = max(float((p.double() - q.double()).abs().max()) for p, q in zip(plain, exact, strict=True))
    assert error > 5 * bound, "nearest rounding should be visibly worse, else this test shows nothing"


@cases("dtype", LOW)
@cases("backend", [dict(), dict(capturable=True), dict(foreach=True), dict(foreach=True, capturable=True)])
def test_stochastic_rounding_is_unbiased_and_fresh_every_step(dtype, backend):
    n, step_size = 1 << 16, torch.finfo(dtype).eps / 8  # an eighth of an ulp at 1: nearest would never move
    p = torch.nn.Parameter(torch.ones(n, device=CUDA, dtype=dtype))
    optimizer = LionK(
        [p], "half_square", lr=step_size, betas=(0.0, 0.0), rounding="stochastic",
        generator=torch.Generator().manual_seed(3), **backend,
    )  # fmt: skip
    p.grad = torch.full_like(p, -1.0)
    moved = []
    for _ in range(16):
        before = p.detach().double()
        optimizer.step()
        moved.append((p.detach().double() - before) / torch.finfo(dtype).eps)
    for m in moved:
        assert set(m.unique().tolist()) <= {0.0, 1.0}
        # Bernoulli(1/8), 65536 draws: six standard deviations.
        assert abs(float(m.mean()) - 0.125) < 6 * math.sqrt(0.125 * 0.875 / n)
    for a, b in itertools.pairwise(moved):
        correlation = float(((a - 0.125) * (b - 0.125)).mean()) / (0.125 * 0.875)
        assert abs(correlation) < 6 / math.sqrt(n), "the same draws at successive steps"


def test_stochastic_rounding_survives_a_checkpoint():
    def make(p):
        return Adan(p, lr=1e-3, rounding="stochastic", generator=torch.Generator().manual_seed(5))

    params = parameters(FEW, torch.bfloat16, CUDA)
    optimizer = train(make, params, 3)
    copies = [torch.nn.Parameter(p.detach().clone()) for p in params]
    other = Adan(copies, rounding="stochastic")
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for t in range(3, 6):
        for group, opt in ((params, optimizer), (copies, other)):
            give_gradients(group, t)
            opt.step()
    assert_equal(copies, params)


# CUDA graphs, GradScaler, synchronization.


@cases(
    "name",
    ["adan", "adan-clip", "lion-entropic", "lion-l2-all", "adamp", "adamp-always", "sgdp", "spam", "spam-sparse"],
)
@cases("tensor_lr", [False, True])
def test_graph_replay_equals_eager_steps(name, tensor_lr):
    def make(p):
        optimizer = SYSTEMS[name](p, capturable=True)
        if tensor_lr:
            for group in optimizer.param_groups:
                group["lr"] = torch.tensor(1e-2, device=CUDA, dtype=torch.float64)
        return optimizer

    captured, eager = parameters(FEW, torch.float32, CUDA), parameters(FEW, torch.float32, CUDA)
    first, second = make(captured), make(eager)
    for p in captured:
        p.grad = torch.zeros_like(p)

    def load(t):
        give_gradients(eager, t)
        for p, q in zip(captured, eager, strict=True):
            p.grad.copy_(q.grad)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for t in range(2):
            load(t)
            first.step()
            second.step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        first.step()
    for t in range(2, 8):
        load(t)
        if tensor_lr:
            for group in (*first.param_groups, *second.param_groups):
                group["lr"].fill_(1e-2 / t)
        graph.replay()
        second.step()
    assert_equal(captured, eager)
    for p, q in zip(captured, eager, strict=True):
        if "step" in second.state[q]:
            assert float(first.state[p]["step"]) == float(second.state[q]["step"]) == 8.0


def test_graph_of_backward_and_step():
    """The gradients are made within the capture, at addresses that no step has seen before."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.Tanh(), torch.nn.Linear(32, 4)).to(CUDA)
    twin = copy.deepcopy(model)
    x, y = torch.randn(8, 16, device=CUDA), torch.randn(8, 4, device=CUDA)

    def make(m):
        return Adan(m.parameters(), lr=1e-2, max_grad_norm=1.0, capturable=True)

    first, second = make(model), make(twin)

    def step(m, optimizer):
        optimizer.zero_grad(set_to_none=True)
        torch.nn.functional.mse_loss(m(x), y).backward()
        optimizer.step()

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step(model, first)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    first.zero_grad(set_to_none=True)
    with torch.cuda.graph(graph):
        torch.nn.functional.mse_loss(model(x), y).backward()
        first.step()
    for _ in range(3):
        step(twin, second)
    for _ in range(5):
        x.copy_(torch.randn_like(x))
        graph.replay()
        step(twin, second)
    assert_close(model.parameters(), twin.parameters(), atol=2e-5)


def test_stochastic_rounding_draws_anew_at_every_replay():
    n = 1 << 14
    p = torch.nn.Parameter(torch.ones(n, device=CUDA, dtype=torch.bfloat16))
    optimizer = LionK([p], "half_square", lr=2**-8, betas=(0.0, 0.0), rounding="stochastic", capturable=True)
    p.grad = torch.full_like(p, -1.0)
    for _ in range(2):
        optimizer.step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step()
    moved = []
    for _ in range(4):
        p.data.fill_(1.0)
        graph.replay()
        moved.append(p.detach().double() > 1)
    for a, b in itertools.pairwise(moved):
        same = float((a == b).double().mean())
        assert abs(same - 0.5) < 6 * 0.5 / math.sqrt(n)


@cases("name", ["adan", "adan-clip", "lion-entropic", "lion-l2-group", "adamp", "sgdp", "spam", "spam-sparse"])
@cases("options", [dict(), dict(capturable=True), dict(foreach=True)])
@cases("unscale", [False, True])
def test_a_step_that_the_scaler_skips_leaves_no_trace(name, options, unscale):
    params, plain = parameters(FEW, torch.float32, CUDA), parameters(FEW, torch.float32, CUDA)
    optimizer, reference = SYSTEMS[name](params, **options), SYSTEMS[name](plain, **options)
    scaler = torch.amp.GradScaler("cuda", init_scale=1024.0, growth_interval=3)
    for t in range(6):
        broken = t in (0, 3)
        give_gradients(plain, t)
        for p, q in zip(params, plain, strict=True):
            p.grad = q.grad * scaler.get_scale()
        if broken:
            params[1].grad[0] = math.inf
        before = [g.grad.clone() for g in params]
        state = copy.deepcopy(optimizer.state_dict()["state"])
        values = [p.detach().clone() for p in params]
        scaler.scale(torch.ones((), device=CUDA))  # as a loss would be
        if unscale:
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        if broken:
            assert_equal(params, values)
            for i, old in state.items():
                for key, value in old.items():
                    assert torch.equal(optimizer.state_dict()["state"][i][key], value), key
        else:
            reference.step()
            assert_close(params, plain, atol=1e-6)
        if options.get("capturable") and not unscale:
            assert optimizer._step_supports_amp_scaling
            assert_equal([p.grad for p in params], before)  # ours does not unscale in place
    assert not hasattr(optimizer, "found_inf")


@cases("name", sorted(SYSTEMS))
@cases("options", [dict(), dict(capturable=True)])
def test_warm_steps_do_not_synchronize(name, options):
    params = parameters(FEW, torch.float32, CUDA)
    optimizer = SYSTEMS[name](params, **options)
    for group in optimizer.param_groups:
        if group.get("density", 1.0) < 1:
            group["reset_interval"] = 1000  # a redrawn mask's largest gap is looked at
    gradients = []
    for t in range(5):
        give_gradients(params, t)
        gradients.append([p.grad for p in params])
    for t in range(5):  # other addresses at every step: the table of pointers is made again
        for p, g in zip(params, gradients[t], strict=True):
            p.grad = g
        if t < 2:
            optimizer.step()
            continue
        with no_synchronization():
            optimizer.step()
        optimizer.param_groups[0]["lr"] = 0.5 * float(optimizer.param_groups[0]["lr"])


def test_the_async_path_of_the_scaler_does_not_synchronize():
    params = parameters(FEW, torch.float32, CUDA)
    optimizer = Adan(params, lr=1e-2, max_grad_norm=1.0, capturable=True)
    scaler = torch.amp.GradScaler("cuda", init_scale=8.0)
    scaler.scale(torch.ones((), device=CUDA))
    give_gradients(params, 0)
    for t in range(4):
        if t < 2:
            scaler.step(optimizer)
        else:
            with no_synchronization():
                scaler.step(optimizer)
        scaler.update()


def test_masks_are_the_same_on_every_device_and_are_redrawn_between_replays():
    shapes = [(33, 65), (64, 33)]
    here, there = parameters(shapes, torch.float64, "cpu"), parameters(shapes, torch.float64, CUDA)
    reference, optimizer = sparse_spam(here), sparse_spam(there, capturable=True)
    seen = []
    for t in range(4):
        for params, opt in ((here, reference), (there, optimizer)):
            give_gradients(params, t)
            if t == 2 and opt is optimizer:  # on the host the third step does so by itself
                assert opt.redraw_masks()
            opt.step()
        masks = [optimizer.mask(p).cpu() for p in there]
        assert all(torch.equal(m, reference.mask(p)) for m, p in zip(masks, here, strict=True))
        seen.append(masks[0])
    assert not torch.equal(seen[1], seen[2])
    assert_close(there, here, atol=1e-12)


# Layouts, lists, devices.


@cases("name", ["adan", "adan-clip", "lion-entropic", "adamp-always", "spam", "spam-sparse"])
def test_layouts(name):
    def make_params(device, dtype):
        base = normal((6, 5, 4, 3), 0).to(device, dtype)
        wide = normal((8, 10), 2).to(device, dtype)
        return [
            torch.nn.Parameter(base.to(memory_format=torch.channels_last)),
            torch.nn.Parameter(normal((7, 9), 1).to(device, dtype).t()),
            torch.nn.Parameter(wide[:, ::2]),  # not dense
            torch.nn.Parameter(normal((41,), 3).to(device, dtype)[1:]),  # not aligned
            torch.nn.Parameter(normal((3, 5), 4).to(device, dtype)),
        ]

    def give(params, t, *, contiguous):
        for i, p in enumerate(params):
            g = normal(tuple(p.shape), 100 * t + i).to(p.device, p.dtype)
            if not contiguous and g.dim() == 4:
                g = g.to(memory_format=torch.channels_last)
            elif not contiguous and g.dim() == 2:
                g = g.t().contiguous().t()
            p.grad = g

    expected, actual = make_params("cpu", torch.float64), make_params(CUDA, torch.float32)
    reference, optimizer = SYSTEMS[name](expected, foreach=False), SYSTEMS[name](actual)
    # The groups' other members must not be pulled off the kernel by one that is not dense.
    for t in range(6):
        give(expected, t, contiguous=True)
        give(actual, t, contiguous=t % 2 == 0)
        reference.step(), optimizer.step()
    assert_close(actual, expected, atol=6e-6)
    assert actual[0].is_contiguous(memory_format=torch.channels_last)


def test_channels_last_stays_on_the_kernel():
    p = torch.nn.Parameter(torch.randn(6, 5, 4, 3, device=CUDA).to(memory_format=torch.channels_last))
    optimizer = Adan([p])
    p.grad = torch.ones_like(p)
    optimizer.step()
    assert mode(optimizer) == "kernel"
    assert optimizer.state[p]["exp_avg"].stride() == p.stride()


def test_complex_parameters_equal_their_real_view():
    z = torch.nn.Parameter(torch.complex(normal((37,), 0), normal((37,), 1)).to(CUDA))
    r = torch.nn.Parameter(torch.view_as_real(z.detach()).clone())
    first, second = Adan([z], lr=1e-2, max_grad_norm=1.0), Adan([r], lr=1e-2, max_grad_norm=1.0)
    for t in range(4):
        g = torch.complex(normal((37,), 10 + t), normal((37,), 20 + t)).to(CUDA)
        z.grad, r.grad = g, torch.view_as_real(g).clone()
        first.step(), second.step()
    assert_close([torch.view_as_real(z.detach())], [r], atol=1e-13)


def test_many_tensors_in_one_launch():
    generator = torch.Generator().manual_seed(0)
    shapes = [(int(n),) for n in torch.randint(0, 3000, (2000,), generator=generator)]
    expected, actual = parameters(shapes, torch.float64, "cpu"), parameters(shapes, torch.float32, CUDA)
    train(lambda p: Adan(p, lr=1e-2), expected, 3)
    optimizer = train(lambda p: Adan(p, lr=1e-2), actual, 3)
    assert len(optimizer._plan.cohorts) == 1
    assert_close(actual, expected, atol=5e-6)


def test_types_mixed_in_one_group():
    types = [torch.float32, torch.bfloat16, torch.float64, torch.float16] * 3
    expected = parameters([(200,)] * 12, torch.float64, "cpu")
    actual = [torch.nn.Parameter(p.detach().to(CUDA, t)) for p, t in zip(expected, types, strict=True)]
    with torch.no_grad():
        for e, a in zip(expected, actual, strict=True):
            e.copy_(a)

    def make(p):
        return Adan(p, lr=1e-2, state_dtype=torch.float32)

    reference, optimizer = Adan(expected, lr=1e-2), make(actual)
    for t in range(3):
        give_gradients(actual, t)
        for e, a in zip(expected, actual, strict=True):
            e.grad = a.grad.double().cpu()
        reference.step(), optimizer.step()
    for a, e in zip(actual, expected, strict=True):
        assert_close([a], [e], atol=1e-5 + 8 * torch.finfo(a.dtype).eps)


def test_more_elements_than_32_bits_count():
    n = 2**31 + 1025
    if torch.cuda.mem_get_info()[0] < 8 * n:
        return
    p = torch.nn.Parameter(torch.zeros(n, device=CUDA, dtype=torch.bfloat16))
    p.grad = torch.ones_like(p)
    p.grad[-1] = -1.0
    p.grad[2**31 - 1] = 0.0
    Lion([p], lr=0.5).step()
    ends = p.detach()[[0, 2**31 - 2, 2**31 - 1, 2**31, 2**31 + 1023, 2**31 + 1024]].float().cpu()
    assert ends.tolist() == [-0.5, -0.5, 0.0, -0.5, -0.5, 0.5]


@cases("order", ["cuda first", "cpu first"])
@cases("name", ["adan", "adan-clip", "lion-entropic", "adamp-always", "spam"])
def test_one_group_on_two_devices(order, name):
    shapes = [(5,), (70,), (3, 3), (1030,)]
    expected, actual = parameters(shapes, torch.float64, "cpu"), parameters(shapes, torch.float64, "cpu")
    start = 0 if order == "cuda first" else 1
    for i in range(start, len(actual), 2):
        actual[i] = torch.nn.Parameter(actual[i].detach().to(CUDA))
    train(lambda p: SYSTEMS[name](p, foreach=False), expected, 3)
    train(SYSTEMS[name], actual, 3)
    assert_close(actual, expected, atol=1e-10)


def test_learning_rate_tensor_on_the_host():
    """As in torch.optim, whose capturable optimizers take one (outside of a graph)."""
    expected, actual = parameters(FEW, torch.float64, "cpu"), parameters(FEW, torch.float64, CUDA)
    train(lambda p: Adan(p, lr=1e-2, foreach=False), expected, 3)
    train(lambda p: Adan(p, lr=torch.tensor(1e-2, dtype=torch.float64), capturable=True), actual, 3)
    assert_close(actual, expected, atol=1e-12)


@cases("dtype", [torch.float32, torch.float64])
def test_learning_rate_tensor_on_the_device(dtype):
    expected, actual = parameters(FEW, torch.float64, "cpu"), parameters(FEW, torch.float64, CUDA)
    train(lambda p: Adan(p, lr=2**-7, foreach=False), expected, 3)
    optimizer = train(lambda p: Adan(p, lr=torch.tensor(2**-7, dtype=dtype, device=CUDA), capturable=True), actual, 3)
    assert mode(optimizer) == "kernel"
    assert_close(actual, expected, atol=1e-12)


@cases("capturable", [False, True])
def test_a_checkpoint_that_went_through_the_host(capturable):
    params = parameters(FEW, torch.float32, CUDA)
    optimizer = train(lambda p: Adan(p, lr=1e-2, capturable=capturable), params, 3)
    saved = torch.utils._pytree.tree_map(
        lambda t: t.cpu().clone() if isinstance(t, torch.Tensor) else t, optimizer.state_dict()
    )
    copies = [torch.nn.Parameter(p.detach().clone()) for p in params]
    other = Adan(copies, lr=1.0, capturable=capturable)
    other.load_state_dict(saved)
    for t in range(3, 6):
        for group, opt in ((params, optimizer), (copies, other)):
            give_gradients(group, t)
            opt.step()
    assert_equal(copies, params)
    assert len(other._plan.cohorts) == 1, "one launch before the checkpoint, one after it"


def test_new_gradient_addresses_at_every_step():
    expected, actual = parameters(FEW, torch.float64, "cpu"), parameters(FEW, torch.float32, CUDA)
    reference, optimizer = Adan(expected, lr=1e-2), Adan(actual, lr=1e-2)
    kept = []
    for t in range(12):
        give_gradients(expected, t), give_gradients(actual, t)
        kept.append([p.grad for p in actual] if t % 3 else None)  # so that the allocator's addresses wander
        if t == 6:
            actual[2].data = actual[2].data.clone()
        reference.step(), optimizer.step()
    assert_close(actual, expected, atol=8e-6)


def test_gradients_are_not_touched():
    for name in SYSTEMS:
        params = parameters(FEW, torch.float32, CUDA)
        optimizer = SYSTEMS[name](params)
        for t in range(2):
            give_gradients(params, t)
            before = [p.grad.clone() for p in params]
            optimizer.step()
            assert_equal([p.grad for p in params], before)


@cases(
    "name",
    ["lion", "adan", "lion-huber", "lion-entropic", "lion-relativistic", "lion-dead-zone", "lion-l2-group", "adamp",
     "sgdp", "spam"],
)  # fmt: skip
def test_nan_propagates_and_infinities_do_not_hang(name):
    params = parameters([(3000,)], torch.float32, CUDA)
    optimizer = {**SYSTEMS, **EXACT}[name](params)
    give_gradients(params, 0)
    params[0].grad[17] = math.nan
    optimizer.step()
    broken = params[0].detach().isnan()
    assert bool(broken.all()) if name == "lion-l2-group" else broken.nonzero().flatten().tolist() == [17]


def test_zero_gradients_move_nothing():
    for name, make in {**SYSTEMS, **EXACT}.items():
        params = parameters(FEW, torch.float32, CUDA)
        before = [p.detach().clone() for p in params]
        optimizer = make(params)
        for group in optimizer.param_groups:
            group["weight_decay"] = 0.0
        for _ in range(2):
            for p in params:
                p.grad = torch.zeros_like(p)
            optimizer.step()
        for p, old in zip(params, before, strict=True):
            assert torch.equal(p, old), name


def test_gradient_of_a_wider_type():
    p = torch.nn.Parameter(torch.ones(2000, device=CUDA, dtype=torch.bfloat16))
    if not hasattr(p, "grad_dtype"):
        return
    p.grad_dtype = torch.float32
    p.grad = torch.full((2000,), -3.0, device=CUDA)
    LionK([p], "half_square", lr=0.25, betas=(0.0, 0.0)).step()
    assert p.detach().float().unique().tolist() == [1.75]


@cases("name", ["adan", "adan-clip", "lion-l2-all"])
def test_parameters_on_a_device_that_is_not_the_current_one(name):
    if torch.cuda.device_count() < 2:
        return
    expected, actual = parameters(FEW, torch.float64, "cpu"), parameters(FEW, torch.float64, torch.device("cuda:1"))
    train(lambda p: SYSTEMS[name](p, foreach=False), expected, 4)
    optimizer = train(SYSTEMS[name], actual, 4)
    assert mode(optimizer) == "kernel"
    assert torch.cuda.current_device() == 0
    assert_close(actual, expected, atol=1e-10)


def _main() -> int:
    failed = []
    torch.cuda.init()
    started = time.perf_counter()
    selected = sys.argv[1:]
    for name, test in list(globals().items()):
        if not name.startswith("test_") or (selected and not any(s in name for s in selected)):
            continue
        choices = [
            [dict(zip(names, v if len(names) > 1 else (v,), strict=True)) for v in vs]
            for names, vs in getattr(test, "cases", [])
        ]
        for picked in itertools.product(*choices):
            arguments = {k: v for d in picked for k, v in d.items()}
            label = f"{name}({', '.join(f'{k}={v}' for k, v in arguments.items())})"
            try:
                test(**arguments)
            except Exception:
                failed.append(label)
                print(f"FAIL {label}")
                traceback.print_exc()
            else:
                print(f"pass {label}")
    print(f"{len(failed)} failed in {time.perf_counter() - started:.0f} s")
    for label in failed:
        print(f"FAIL {label}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(_main())
