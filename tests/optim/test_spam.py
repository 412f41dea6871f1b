"""SPAM against its equations, Adam, and what its users may do wrong."""

import copy
import io
import math
import warnings

import numpy as np
import pytest
import torch
from references_for_tests import assert_same, give, gradients, normal, numbers, parameters, run, snapshot

from polyak.optim import SPAM
from polyak.optim.spam import SpikeMonitor, clip_spikes_, spam_param_groups, warmup_scale

SHAPES = [(3,), (30, 30), (), (17, 5)]
CLOSE = 1e-12  # float64, a few dozen operations a step on numbers of order one
QUICK = dict(reset_interval=8, warmup_steps=4, grace=3, threshold=6.0)
BACKENDS = {"eager": dict(foreach=False), "compiled": {}, "foreach": dict(foreach=True), "kernel": dict(fused=True)}


@pytest.fixture(params=BACKENDS)
def backend(request):
    if request.param == "kernel":
        request.getfixturevalue("interpreter")
    return BACKENDS[request.param]


def spiky(shapes, steps, seed=1000):
    """Gradients of which every fifth step's are 30 times as large."""
    lists = gradients(shapes, steps, seed=seed)
    return [[g * (30 if t % 5 == 4 else 1) for g in grads] for t, grads in enumerate(lists)]


def reference(params, steps, options, absent=()):
    """SPAM as its specification has it, in NumPy, without sparse momentum. Also returns clipped entries by step."""
    o = dict(lr=1e-3, betas=(0.9, 0.999), eps=1e-6, weight_decay=0.0, reset_interval=500, warmup_steps=150, threshold=5000.0,
             grace=20, maximize=False, reset_bias_correction=False) | options  # fmt: skip
    b1, b2 = o["betas"]
    values = [np.array(p) for p in params]
    m, v, own = [np.zeros_like(p) for p in values], [np.zeros_like(p) for p in values], [0] * len(values)
    total, k, clipped = 0, o["warmup_steps"] + 1, []
    for t, grads in enumerate(steps, 1):
        n = o["warmup_steps"]
        s = 1 - 0.99 * (1 + math.cos(math.pi * k / (n + 1))) / 2 if k < n else 1.0
        count = 0
        for i, g in enumerate(grads):
            if t % o["reset_interval"] == 0:
                m[i], v[i] = np.zeros_like(m[i]), np.zeros_like(v[i])
            if (t - 1, i) in absent:
                continue
            g = -g.numpy() if o["maximize"] else g.numpy()
            if o["threshold"] and t >= o["grace"] and t % o["reset_interval"] >= o["grace"]:
                spike = (g**2 > o["threshold"] * v[i]) & (v[i] > 0)
                count += int(spike.sum())
                g = np.where(spike, np.sign(g) * np.sqrt(o["threshold"] * v[i]), g)
            own[i] += 1
            m[i] = b1 * m[i] + (1 - b1) * g
            v[i] = b2 * v[i] + (1 - b2) * g * g
            c = own[i]
            if o["reset_bias_correction"] and t >= o["reset_interval"]:
                c = min(c, t % o["reset_interval"] + 1)
            a = o["lr"] * math.sqrt(1 - b2**c) / (1 - b1**c)
            values[i] = values[i] - a * s * m[i] / (np.sqrt(v[i]) + o["eps"])
            values[i] = values[i] - o["lr"] * o["weight_decay"] * values[i]
        total, k = total + 1, k + 1
        if (total + 1) % o["reset_interval"] == 0:
            k = 0
        clipped.append(count)
    return values, clipped


@pytest.mark.parametrize(
    "options",
    [
        dict(lr=0.02, **QUICK),
        dict(lr=0.02, weight_decay=0.3, maximize=True, betas=(0.8, 0.9), eps=1e-3, **QUICK),
        dict(lr=0.02, reset_bias_correction=True, **QUICK),
        dict(lr=0.02, **{**QUICK, "warmup_steps": 0}),
        dict(lr=0.02, **{**QUICK, "grace": 0}),
        dict(lr=0.02, threshold=0.0, reset_interval=8, warmup_steps=4, grace=3),
    ],
)  # fmt: skip
@pytest.mark.parametrize("capturable", [False, True])
def test_trajectory_equals_the_equations(backend, options, capturable):
    if "fused" in backend and capturable != ("betas" in options or "reset_bias_correction" in options):
        pytest.skip("Triton's interpreter is slow: each option once")
    params = parameters(SHAPES)
    steps = spiky(SHAPES, 20)
    absent = {(0, 1), (7, 2), (12, 2)}  # the third has no gradient at the first reset
    expected, clipped = reference(numbers(params), steps, options, absent)
    optimizer = SPAM(params, capturable=capturable, **options, **backend)
    counted = []
    for t, grads in enumerate(steps):
        give(params, [None if (t, i) in absent else g for i, g in enumerate(grads)])
        optimizer.step()
        counted.append(int(optimizer.last_clipped))
    if not capturable:  # there, a tensor without a gradient at the reset keeps its moments, as in the official code
        assert_same(params, expected, atol=CLOSE)
        assert counted == clipped
    else:
        kept = [i for i in range(len(SHAPES)) if i != 2]
        assert_same([params[i] for i in kept], [expected[i] for i in kept], atol=CLOSE)
    assert (sum(clipped) > 0) == (options["threshold"] > 0)


def test_warmup_table():
    assert [warmup_scale(k, 4) for k in range(5)] == pytest.approx([0.01, 0.104537, 0.352037, 0.657963, 1.0], abs=1e-6)
    assert warmup_scale(0, 0) == 1.0


def test_it_is_adam_without_its_parts(backend):
    """Adam's eps stands beside the corrected root, SPAM's beside the plain one."""
    params, twins = parameters(SHAPES), parameters(SHAPES)
    optimizer = SPAM(params, lr=0.01, eps=1e-3, threshold=0.0, warmup_steps=0, **backend)
    adam = torch.optim.Adam(twins, lr=0.01)
    for t, grads in enumerate(gradients(SHAPES, 12), 1):
        adam.param_groups[0]["eps"] = 1e-3 / math.sqrt(1 - 0.999**t)
        run(optimizer, params, [grads])
        run(adam, twins, [grads])
    assert_same(params, twins, atol=CLOSE)


def test_clipped_gradients_and_the_growth_of_the_second_moment(backend):
    params = parameters([(50,)])
    optimizer = SPAM(params, lr=0.0, grace=1, reset_interval=100, warmup_steps=10, **backend)
    run(optimizer, params, gradients([(50,)], 3))
    v = optimizer.state[params[0]]["exp_avg_sq"].clone()
    run(optimizer, params, [[1e6 * normal((50,), 7)]])
    after = optimizer.state[params[0]]["exp_avg_sq"]
    assert int(optimizer.last_clipped) == 50
    assert_same([after / v], [torch.full((50,), 0.999 + 0.001 * 5000.0, dtype=torch.float64)], atol=1e-9)


def test_moments_restart_exactly_at_the_interval(backend):
    params = parameters([(6,)])
    optimizer = SPAM(params, lr=0.01, **QUICK, **backend)
    for t, grads in enumerate(gradients([(6,)], 24), 1):
        run(optimizer, params, [grads])
        restarted = torch.allclose(optimizer.state[params[0]]["exp_avg_sq"], 0.001 * grads[0] ** 2, rtol=1e-12)
        assert restarted == (t in (1, 8, 16, 24))


@pytest.mark.parametrize("capturable", [False, True])
def test_a_reset_before_there_are_moments(backend, capturable):
    params = parameters([(6,), (4, 3)])
    optimizer = SPAM(
        [{"params": [params[0]]}, {"params": [params[1]], "density": 0.5}], lr=0.01, capturable=capturable, **QUICK,
        **backend,
    )  # fmt: skip
    for t in range(1, 10):
        give(params, [normal((6,), t), normal((4, 3), t) if t > 8 else None])
        optimizer.step()
    assert int((params[1].detach() != parameters([(6,), (4, 3)])[1].detach()).sum()) == 6


def test_no_clipping_in_the_grace_period(backend):
    params = parameters([(6,)])
    optimizer = SPAM(params, lr=0.01, threshold=1e-3, reset_interval=10, warmup_steps=2, grace=4, **backend)
    active = []
    for t, grads in enumerate(gradients([(6,)], 25), 1):
        run(optimizer, params, [grads])
        if int(optimizer.last_clipped):
            active.append(t)
    assert active == [4, 5, 6, 7, 8, 9, 14, 15, 16, 17, 18, 19, 24, 25]


def test_a_spike_moves_one_entry_a_bounded_way(backend):
    results = []
    for factor in (1.0, 1e6):
        params = parameters([(40,)])
        optimizer = SPAM(params, lr=0.01, grace=2, reset_interval=100, warmup_steps=10, **backend)
        steps = gradients([(40,)], 12)
        steps[6][0][3] *= factor
        run(optimizer, params, steps)
        results.append(params[0].detach())
    others = torch.arange(40) != 3
    assert torch.equal(results[0][others], results[1][others])
    assert 0 < abs(float(results[0][3] - results[1][3])) < 12 * 0.01 * 3.2


def test_entries_without_a_second_moment_are_not_frozen(backend):
    """The official code clips the gradient of a unit that wakes up to zero, for ever."""
    params = parameters([(4,)])
    optimizer = SPAM(params, lr=0.01, grace=1, reset_interval=100, warmup_steps=10, **backend)
    g = torch.tensor([1.0, 0.0, 2.0, 0.0], dtype=torch.float64)
    run(optimizer, params, [[g], [g]])
    before = snapshot(params)[0]
    run(optimizer, params, [[torch.ones(4, dtype=torch.float64)]])
    assert (params[0].detach() != before).all()


@pytest.mark.parametrize("options", [dict(), dict(density=0.5)], ids=str)
def test_gradients_are_not_touched(options, backend):
    params = parameters([(12, 5)])
    optimizer = SPAM(params, lr=0.01, **QUICK, **options, **backend)
    for grads in spiky([(12, 5)], 12):
        kept = grads[0].clone()
        run(optimizer, params, [grads])
        assert torch.equal(params[0].grad, kept)


@pytest.mark.parametrize("density", [1.0, 0.5])
def test_differentiation_through_four_steps(density):
    """Over a reset and clipped entries."""

    def four_steps(start, *grads):
        p = start.clone()
        optimizer = SPAM(
            [p], lr=0.1, weight_decay=0.1, reset_interval=3, warmup_steps=1, grace=1, threshold=2.0, density=density,
            generator=torch.Generator().manual_seed(0), differentiable=True,
        )  # fmt: skip
        for g in grads:
            p.grad = g
            optimizer.step()
        return p

    arguments = [((10 if i == 2 else 1) * normal((3, 4), i)).requires_grad_() for i in range(5)]
    assert torch.autograd.gradcheck(four_steps, arguments, eps=1e-6, atol=1e-6)


@pytest.mark.parametrize(("interval", "warmup"), [(8, 0), (1000, 5)])
def test_the_same_as_pytorch_optimizer(interval, warmup):
    """Without its warmup, whose helper gives other values when it is evaluated step by step; and where nothing resets."""
    theirs = pytest.importorskip("pytorch_optimizer")
    params, twins = parameters(SHAPES[:2]), parameters(SHAPES[:2])
    optimizer = SPAM(
        params, lr=0.02, weight_decay=0.1, threshold=6.0, grace=3, reset_interval=interval, warmup_steps=warmup
    )
    other = theirs.SPAM(
        twins, lr=0.02, weight_decay=0.1, threshold=6, grad_accu_steps=3, update_proj_gap=interval, warmup_epoch=warmup
    )
    clipped = 0
    for grads in spiky(SHAPES[:2], 30):
        run(optimizer, params, [grads])
        run(other, twins, [[g.clone() for g in grads]])  # it writes into them
        clipped += int(optimizer.last_clipped)
    assert clipped > 0
    assert_same(params, twins, atol=CLOSE)


# Sparse momentum.


def sparse(density=0.25, shapes=((40, 30), (17, 25)), seed=3, **options):
    params = parameters(shapes)
    optimizer = SPAM(
        [{"params": params, "density": density}], lr=0.02, generator=torch.Generator().manual_seed(seed), **options
    )
    return params, optimizer


@pytest.mark.parametrize("density", [0.01, 0.25, 0.9])
def test_sparse_momentum_is_the_dense_rule_on_the_mask(backend, density):
    """Between two resets, each masked entry has SPAM's dense trajectory, and no other moves."""
    shapes = [(40, 30), (17, 25)]
    params, optimizer = sparse(density, weight_decay=0.1, **QUICK, **backend)
    twins = parameters(shapes)
    dense = SPAM(twins, lr=0.02, weight_decay=0.1, **QUICK, foreach=False)
    start, masks = snapshot(params), None
    for t, grads in enumerate(spiky(shapes, 7), 1):
        run(optimizer, params, [grads])
        run(dense, twins, [grads])
        masks = masks or [optimizer.mask(p) for p in params]
        for p, q, m, w in zip(params, twins, masks, start, strict=True):
            assert torch.equal(optimizer.mask(p), m), t
            assert int(m.sum()) == int(density * p.numel()) == optimizer.state[p]["exp_avg"].numel()
            assert_same([p.detach()[m]], [q.detach()[m]], atol=CLOSE)
            assert torch.equal(p.detach()[~m], w[~m])
    run(optimizer, params, spiky(shapes, 1))
    assert all(not torch.equal(optimizer.mask(p), m) for p, m in zip(params, masks, strict=True))
    assert not any(torch.isnan(p).any() for p in params)


def test_density_one_is_dense(backend):
    shapes = [(40, 30), (17, 25)]
    params, optimizer = sparse(1.0, **QUICK, **backend)
    twins = parameters(shapes)
    run(optimizer, params, spiky(shapes, 20))
    run(SPAM(twins, lr=0.02, **QUICK, **backend), twins, spiky(shapes, 20))
    assert_same(params, twins)
    assert set(optimizer.state[params[0]]) == {"step", "exp_avg", "exp_avg_sq"}


def test_masks_are_uniform_and_differ_between_tensors_and_resets():
    params, optimizer = sparse(0.25, shapes=((64, 64), (64, 64)), **QUICK)
    seen = []
    for grads in gradients([(64, 64)] * 2, 24):
        run(optimizer, params, [grads])
        seen.append([optimizer.mask(p) for p in params])
    masks = [seen[t][i].double() for t in (0, 7, 15, 23) for i in (0, 1)]
    for i, a in enumerate(masks):
        # Rows and columns hold 16 entries each on average, with standard deviation sqrt(64 / 4 * 3 / 4) = 3.5.
        assert (a.sum(0) - 16).abs().max() < 5 * 3.5
        assert (a.sum(1) - 16).abs().max() < 5 * 3.5
        for b in masks[:i]:
            # Independent masks share 256 of 4096 entries, with standard deviation sqrt(256 * 15 / 16 * 0.6) = 12.
            assert abs(float((a * b).sum()) - 256) < 5 * 12


def test_masks_depend_on_seed_and_name_alone():
    named = [("a", (8, 9)), ("b", (10, 12))]

    def masks(order, seed):
        values = {name: torch.nn.Parameter(normal(shape, 0)) for name, shape in named}
        groups = [{"params": [(name, values[name]) for name in order], "density": 0.3}]
        optimizer = SPAM(groups, generator=torch.Generator().manual_seed(seed))
        run(optimizer, list(values.values()), gradients([s for _, s in named], 1))
        return [optimizer.mask(values[name]) for name, _ in named]

    first = masks(["a", "b"], 1)
    assert all(torch.equal(x, y) for x, y in zip(first, masks(["b", "a"], 1), strict=True))
    assert not torch.equal(first[0], masks(["a", "b"], 2)[0])


def test_the_memory_is_saved():
    def held(density):
        params = [torch.nn.Parameter(torch.randn(300, 200)) for _ in range(3)]
        optimizer = SPAM([{"params": params, "density": density}])
        give(params, [torch.randn(300, 200) for _ in params])
        optimizer.step()
        tensors = {id(t): t for s in optimizer.state.values() for t in s.values() if t.dim()}
        return sum(t.untyped_storage().nbytes() for t in tensors.values()) / sum(p.numel() for p in params)

    assert held(1.0) == 8.0
    # Two float32 and one byte for each kept entry, and eight bytes for every 1024 of them.
    assert held(0.25) == pytest.approx(0.25 * 9, rel=0.01)
    assert held(0.25) <= 0.3 * held(1.0)


def test_decay_of_masked_tensors(backend):
    for decay, moves in (("masked", False), ("all", True)):
        params, optimizer = sparse(0.25, weight_decay=0.5, decay_masked=decay, **QUICK, **backend)
        start = snapshot(params)
        run(optimizer, params, gradients([(40, 30), (17, 25)], 1))
        for p, w in zip(params, start, strict=True):
            outside = ~optimizer.mask(p)
            assert_same([p.detach()[outside]], [w[outside] * (1 - 0.02 * 0.5 if moves else 1)], atol=CLOSE)


@pytest.mark.parametrize("density", [1.0, 0.25])
@pytest.mark.parametrize("before", [6, 7, 8])
def test_a_checkpoint_across_a_reset(density, before, backend):
    shapes = [(40, 30), (17, 25)]
    params, optimizer = sparse(density, **QUICK, **backend)
    steps = spiky(shapes, 14)
    run(optimizer, params, steps[:before])
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    copies, other = sparse(density, seed=99, **QUICK, **backend)
    with torch.no_grad():
        for c, p in zip(copies, params, strict=True):
            c.copy_(p)
    other.load_state_dict(torch.load(file))
    run(optimizer, params, steps[before:])
    run(other, copies, steps[before:])
    assert_same(copies, params)


def test_a_checkpoint_of_the_official_code():
    """Its counters lie beside the parameters' states, under names."""
    params = parameters(SHAPES)
    optimizer = SPAM(params, lr=0.02, **QUICK)
    steps = spiky(SHAPES, 14)
    run(optimizer, params, steps[:6])
    theirs = copy.deepcopy(optimizer.state_dict())
    for group in theirs["param_groups"]:
        del group["total_step"], group["mask_seed"]
    theirs["state"] |= {"total_step": 6, "current_step": 11}
    copies = [torch.nn.Parameter(p.detach().clone()) for p in params]
    other = SPAM(copies, lr=0.02, **QUICK)
    other.load_state_dict(theirs)
    assert other.param_groups[0]["total_step"] == 6
    assert list(other.state_dict()["state"]) == list(range(len(SHAPES)))
    run(optimizer, params, steps[6:])
    run(other, copies, steps[6:])
    assert_same(copies, params)


def test_a_checkpoint_of_adam_starts_the_schedule():
    params = parameters(SHAPES)
    adam = run(torch.optim.Adam(params), params, gradients(SHAPES, 5))
    optimizer = SPAM(params)
    optimizer.load_state_dict(copy.deepcopy(adam.state_dict()))
    assert optimizer.param_groups[0]["total_step"] == 0
    assert {float(s["step"]) for s in optimizer.state.values()} == {5.0}


@pytest.mark.parametrize("decay", ["masked", "all"])
def test_a_step_that_the_scaler_skips_leaves_no_trace(interpreter, decay):
    params, optimizer = sparse(0.25, weight_decay=0.5, decay_masked=decay, fused=True, capturable=True, **QUICK)
    twins, reference = sparse(0.25, weight_decay=0.5, decay_masked=decay, foreach=False, **QUICK)
    assert optimizer._step_supports_amp_scaling
    for t, grads in enumerate(gradients([(40, 30), (17, 25)], 4)):
        give(params, [4 * g for g in grads])
        before = snapshot(params)
        optimizer.grad_scale, optimizer.found_inf = torch.tensor(4.0), torch.tensor(float(t == 1)).reshape(1)
        optimizer.step()
        if t == 1:
            assert_same(params, before)
        else:
            run(reference, twins, [grads])
    assert_same(params, twins, atol=1e-9)  # the scale reaches the kernel in float32


def test_capturable_masks_are_redrawn_on_request(backend):
    """Before each step of a reset: the same as without ``capturable``, where the step does so by itself."""
    params, optimizer = sparse(0.25, capturable=True, **QUICK, **backend)
    twins, reference = sparse(0.25, **QUICK, foreach=False)
    first = None
    for t, grads in enumerate(spiky([(40, 30), (17, 25)], 20), 1):
        if t % 8 == 0:
            assert optimizer.redraw_masks()
        run(optimizer, params, [grads])
        run(reference, twins, [grads])
        first = optimizer.mask(params[0]) if first is None else first
        assert torch.equal(optimizer.mask(params[0]), reference.mask(twins[0]))
    assert not torch.equal(optimizer.mask(params[0]), first)
    assert_same(params, twins, atol=CLOSE)


def test_a_mask_with_wider_gaps_moves_and_a_narrower_one_stays():
    params, optimizer = sparse(0.25, shapes=((40, 30),), capturable=True)
    run(optimizer, params, gradients([(40, 30)], 1))
    state = optimizer.state[params[0]]
    wide = state["mask"] = state["mask"].to(torch.int16)
    assert optimizer.redraw_masks()
    assert state["mask"] is wide
    assert int(optimizer.mask(params[0]).sum()) == 300
    optimizer.param_groups[0]["density"] = 0.003  # three of 1200: gaps beyond a byte
    state.update({name: state[name][:3].clone() for name in ("mask", "exp_avg", "exp_avg_sq")})
    state["mask"] = state["mask"].to(torch.uint8)
    assert not optimizer.redraw_masks()
    assert int(optimizer.mask(params[0]).sum()) == 3


def test_copies_go_on_alone():
    params, optimizer = sparse(0.25, **QUICK)
    run(optimizer, params, spiky([(40, 30), (17, 25)], 3))
    twin = copy.deepcopy(optimizer)
    assert [int(g["total_step"]) for g in twin.param_groups] == [3]
    run(optimizer, params, spiky([(40, 30), (17, 25)], 1))
    assert [int(g["total_step"]) for g in twin.param_groups] == [3]


def test_param_groups():
    model = torch.nn.ModuleDict(
        dict(
            embed=torch.nn.Embedding(5, 4), attn_out=torch.nn.Linear(4, 4), mlp=torch.nn.Sequential(torch.nn.Linear(4, 8)),
            head=torch.nn.Linear(4, 5), self_attention=torch.nn.LayerNorm(4),
        )
    )  # fmt: skip
    groups = spam_param_groups(model, 0.5)
    assert [name for name, _ in groups[0]["params"]] == ["attn_out.weight", "mlp.0.weight"]
    assert groups[0]["density"] == 0.5
    assert "density" not in groups[1]
    optimizer = SPAM(groups)
    assert sum(len(g["params"]) for g in optimizer.param_groups) == len(list(model.parameters()))
    assert len(spam_param_groups(torch.nn.Linear(3, 3), 0.5)) == 1


def test_groups_share_the_count_of_steps():
    params = parameters([(3,), (4,)])
    optimizer = SPAM([{"params": [params[0]]}, {"params": [params[1]]}], lr=0.01, **QUICK)
    run(optimizer, params, gradients([(3,), (4,)], 5))
    assert [g["total_step"] for g in optimizer.param_groups] == [5, 5]
    late = torch.nn.Parameter(normal((2,), 0))
    optimizer.add_param_group({"params": [late]})
    assert optimizer.param_groups[2]["total_step"] == 5


# The parts on their own.


def test_clip_spikes():
    g, v = [torch.tensor([3.0, -50.0, 1.0, math.inf])], [torch.tensor([1.0, 0.01, 0.0, 4.0])]
    count = clip_spikes_(g, v, threshold=100.0)
    assert int(count) == 2
    assert_same(g, [torch.tensor([3.0, -1.0, 1.0, 20.0])], atol=1e-6)
    with pytest.raises(ValueError, match="threshold"):
        clip_spikes_(g, v, threshold=0.0)
    with pytest.raises(ValueError, match="exp_avg_sqs has 0"):
        clip_spikes_(g, [], threshold=1.0)
    with pytest.raises(ValueError, match=r"exp_avg_sqs\[0\] has shape \(1,\) where grads\[0\] has \(4,\)"):
        clip_spikes_(g, [torch.ones(1)], threshold=1.0)


def test_spike_monitor():
    monitor, p = SpikeMonitor(window=10, threshold=50), torch.nn.Parameter(torch.zeros(4))
    for t in range(30):
        p.grad = torch.ones(4)
        if t in (5, 20):  # the first spike is in the mean that the second is compared with
            p.grad[1] = 1000.0 if t == 5 else 1e5
        monitor.update([("p", p)])
    assert int(monitor.counts["p"]) == 2 == monitor.total
    p.grad = None
    monitor.update([("p", p)])
    assert monitor.steps == 31
    with pytest.raises(ValueError, match="window"):
        SpikeMonitor(window=0)


def test_spike_monitor_is_not_blinded_by_what_is_not_finite():
    monitor, p = SpikeMonitor(window=10, threshold=50), torch.nn.Parameter(torch.zeros(3))
    for t in range(9):
        p.grad = torch.tensor([math.inf, math.nan, 1.0]) if t in (0, 4) else torch.ones(3)
        if t == 8:
            p.grad *= 1000
        monitor.update([("p", p)])
    assert monitor.total == 2 + 2 + 3


# Bad input.


def test_infinite_and_nan_gradients(backend):
    g = normal((6,), 5)
    g[1], g[2] = math.inf, math.nan
    params = parameters([(6,)])
    optimizer = SPAM(params, lr=0.01, grace=1, reset_interval=100, warmup_steps=10, **backend)
    run(optimizer, params, gradients([(6,)], 3))
    run(optimizer, params, [[g]])
    assert int(optimizer.last_clipped) == 1
    assert torch.isnan(params[0]).tolist() == [False, False, True, False, False, False]


def test_refusing_gradients_that_are_not_finite():
    params = parameters([(6,), (3, 2)])
    optimizer = SPAM(params, lr=0.01, nonfinite="raise")
    run(optimizer, params, gradients([(6,), (3, 2)], 2))
    before, state = snapshot(params), copy.deepcopy(optimizer.state_dict())
    for bad in (math.nan, math.inf):
        with pytest.raises(RuntimeError, match=r"1 gradients are not finite \(of parameters of shape \(3, 2\)"):
            run(optimizer, params, [[normal((6,), 0), torch.full((3, 2), bad, dtype=torch.float64)]])
        assert_same(params, before)
        after = optimizer.state_dict()
        assert after["param_groups"] == state["param_groups"]
        assert all(torch.equal(after["state"][i][n], state["state"][i][n]) for i in (0, 1) for n in ("exp_avg", "step"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(reset_interval=20), "reset_interval must be above grace"), (dict(reset_interval=0), "reset_interval"),
        (dict(density=0.0), "density"), (dict(density=1.5), "density"), (dict(density=math.nan), "density"),
        (dict(threshold=-1.0), "threshold"), (dict(threshold=math.nan), "threshold"), (dict(grace=-1), "grace"),
        (dict(warmup_steps=-1), "warmup_steps"), (dict(lr=-1.0), "lr"), (dict(eps=-1.0), "eps"),
        (dict(betas=(0.9, 1.0)), "betas"), (dict(betas=(0.9, 0.9, 0.9)), "two betas"), (dict(nonfinite="no"), "nonfinite"),
        (dict(weight_decay=-1.0), "weight_decay"), (dict(decay_masked="no"), "decay_masked"),
        (dict(reset_bias_correction="no"), "reset_bias_correction"),
    ],
)  # fmt: skip
def test_bad_hyperparameters(options, message):
    with pytest.raises(ValueError, match=message):
        SPAM(parameters([(3, 4)]), **options)


def test_other_bad_input():
    with pytest.raises(ValueError, match=r"density below 1 is for matrices, got a parameter of shape \(3, 4, 5\)"):
        SPAM(parameters([(3, 4, 5)]), density=0.5)
    with pytest.raises(ValueError, match=r"density below 1 is for real parameters, got torch\.complex64"):
        SPAM([torch.nn.Parameter(torch.zeros(3, 4, dtype=torch.complex64))], density=0.5)
    with pytest.raises(TypeError, match="reset_interval must be an integer"):
        SPAM(parameters([(3, 4)]), reset_interval=50.5)
    with pytest.raises(ValueError, match="kahan"):
        SPAM([torch.nn.Parameter(torch.zeros(3, 4).bfloat16())], density=0.5, rounding="kahan")
    with pytest.warns(UserWarning, match="never gets back"):
        SPAM(parameters([(3, 4)]), reset_interval=100)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        SPAM(parameters([(3, 4)]))
    params, optimizer = sparse(0.5)
    run(optimizer, params, gradients([(40, 30), (17, 25)], 1))
    state = optimizer.state_dict()
    state["state"][0]["exp_avg"] = torch.zeros(7)
    _, other = sparse(0.5)
    with pytest.raises(ValueError, match=r"exp_avg of parameter 0 has shape \(7,\), where \(600,\) is needed"):
        other.load_state_dict(state)
    assert not other.state_dict()["state"]


def test_low_precision_keeps_the_second_moment_in_float32():
    p = torch.nn.Parameter(torch.randn(4, 5).bfloat16())
    optimizer = SPAM([p])
    give([p], [torch.randn(4, 5)])
    optimizer.step()
    assert optimizer.state[p]["exp_avg"].dtype == torch.bfloat16
    assert optimizer.state[p]["exp_avg_sq"].dtype == torch.float32
    other = SPAM([torch.nn.Parameter(p.detach().clone())])
    other.load_state_dict(optimizer.state_dict())
    assert next(iter(other.state.values()))["exp_avg_sq"].dtype == torch.float32
