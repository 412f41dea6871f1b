"""Adan against its equations, its closed forms, its relatives, and what its users may do wrong."""

import copy
import math
import warnings

import numpy as np
import pytest
import torch
from references_for_tests import adan, assert_same, give, gradients, normal, numbers, parameters, run, snapshot

from polyak.optim import Adan
from polyak.optim.adan import adan_step

SHAPES = [(3,), (2, 4), (), (17, 5)]
STATE = {"exp_avg": "m", "exp_avg_diff": "v", "exp_avg_sq": "n"}
# float64, a few dozen operations a step on numbers of order one
CLOSE = 1e-12


def make(shapes=SHAPES, **options):
    params = parameters(shapes)
    return params, Adan(params, **options)


# Golden trajectories.


@pytest.mark.parametrize(("no_prox", "maximize"), [(False, False), (True, True)])
@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
@pytest.mark.parametrize("max_grad_norm", [0.0, 0.7, 1e6])
def test_trajectory_equals_the_equations(backend, no_prox, weight_decay, max_grad_norm, maximize):
    if "fused" in backend and (weight_decay == 0.0) != (max_grad_norm == 1e6):
        pytest.skip("Triton's interpreter is slow: decay and clipping once each")
    options = dict(
        lr=0.02, betas=(0.9, 0.8, 0.95), eps=1e-6, weight_decay=weight_decay, no_prox=no_prox,
        max_grad_norm=max_grad_norm, maximize=maximize,
    )  # fmt: skip
    params, optimizer = make(**options, **backend)
    # The second parameter's gradient first appears at the third step, the third's is absent at the fourth.
    steps = gradients(SHAPES, 6, absent={(0, 1), (1, 1), (3, 2)})
    expected, state = adan(numbers(params), steps, options, with_state=True)
    run(optimizer, params, steps)
    assert_same(params, expected, atol=CLOSE)
    for p, s in zip(params, state, strict=True):
        mine = optimizer.state[p]
        assert float(mine["step"]) == s["t"]
        assert_same([mine[name] for name in STATE], [s[k] for k in STATE.values()], atol=CLOSE)
        assert_same([-mine["neg_pre_grad"]], [s["g"]], atol=CLOSE)


def test_options_per_group(backend):
    each = [
        dict(lr=0.03), dict(lr=0.01, betas=(0.5, 0.6, 0.7), weight_decay=0.1), dict(no_prox=True, weight_decay=0.2, lr=0.02),
        dict(max_grad_norm=0.5, lr=0.05, eps=1e-3),
    ]  # fmt: skip
    params = parameters(SHAPES)
    optimizer = Adan([{"params": [p], **o} for p, o in zip(params, each, strict=True)], **backend)
    steps = gradients(SHAPES, 5)
    expected = adan(numbers(params), steps, each)
    run(optimizer, params, steps)
    assert_same(params, expected, atol=CLOSE)


# Reference numbers, fixed when the method was first released: gradients 1, -2, 0.5, 0, 3 on a parameter of 1.
PINNED = {
    "default": (
        dict(lr=0.1),
        [0.900000001, 0.9566445005721902, 0.9645481637308481, 0.9758571549086597, 0.9474837471447268],
    ),
    "decay": (
        dict(lr=0.1, weight_decay=0.5),
        [0.857142858095238, 0.8702736739689793, 0.8363593686929877, 0.8073031998769516, 0.7418378972504941],
    ),
    "no_prox": (
        dict(lr=0.1, weight_decay=0.5, no_prox=True),
        [0.850000001, 0.8641445005221902, 0.8288409386547385, 0.7987078828998131, 0.7303990809908896],
    ),
    "clip": (
        dict(lr=0.1, max_grad_norm=1.0, maximize=True),
        [1.099999999, 1.0546018543780136, 1.0570541746565454, 1.052038266797657, 1.071797853671038],
    ),
    "betas": (
        dict(lr=0.1, betas=(0.9, 0.5, 0.8), eps=0.1),
        [0.9090909090909091, 0.9656316710180809, 0.9613541370189044, 0.9677073295899138, 0.921241695471756],
    ),
}


@pytest.mark.parametrize("name", sorted(PINNED))
def test_pinned_numbers(name, backend):
    options, expected = PINNED[name]
    p = torch.nn.Parameter(torch.tensor([1.0], dtype=torch.float64))
    optimizer = Adan([p], **options, **backend)
    visited = []
    for g in (1.0, -2.0, 0.5, 0.0, 3.0):
        p.grad = torch.tensor([g], dtype=torch.float64)
        optimizer.step()
        visited.append(float(p.detach()))
    assert visited == pytest.approx(expected, abs=1e-13)


# Closed forms.


@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
def test_first_step_is_the_sign(backend, weight_decay):
    params, optimizer = make(lr=0.1, weight_decay=weight_decay, **backend)
    before, grads = snapshot(params), gradients(SHAPES, 1)[0]
    run(optimizer, params, [grads])
    expected = [(p - 0.1 * g / (g.abs() + 1e-8)) / (1 + 0.1 * weight_decay) for p, g in zip(before, grads, strict=True)]
    assert_same(params, expected, atol=CLOSE)


def test_constant_gradient_moves_by_lr_forever(backend):
    params, optimizer = make([(7,)], lr=0.1, eps=0.0, **backend)
    before, g = snapshot(params)[0], normal((7,), 5)
    run(optimizer, params, [[g]] * 30)
    assert_same(params, [before - 0.1 * 30 * g.sign()], atol=1e-12)
    assert not optimizer.state[params[0]]["exp_avg_diff"].any()


def test_without_the_difference_it_is_adam(backend):
    params, optimizer = make(lr=0.01, betas=(0.9, 0.0, 0.99), **backend)
    twins = [torch.nn.Parameter(p.detach().clone()) for p in params]
    adam = torch.optim.Adam(twins, lr=0.01, betas=(0.9, 0.99))
    for grads in gradients(SHAPES, 25):
        for group, opt in ((params, optimizer), (twins, adam)):
            run(opt, group, [grads])
        assert_same(params, twins, atol=CLOSE)


@pytest.mark.parametrize("decay", [0.0, 0.4])
def test_without_the_difference_and_no_prox_it_is_adamw(decay):
    params, optimizer = make(lr=0.01, betas=(0.9, 0.0, 0.99), weight_decay=decay, no_prox=True)
    twins = [torch.nn.Parameter(p.detach().clone()) for p in params]
    steps = gradients(SHAPES, 10)
    run(optimizer, params, steps)
    run(torch.optim.AdamW(twins, lr=0.01, betas=(0.9, 0.99), weight_decay=decay), twins, steps)
    assert_same(params, twins, atol=CLOSE)


def test_moments_add_up_to_nesterovs():
    b = 0.9
    params, optimizer = make([(6,)], betas=(b, b, 0.99))
    average, previous = torch.zeros(6, dtype=torch.float64), None
    for (g,) in gradients([(6,)], 20):
        run(optimizer, params, [[g]])
        average = b * average + (1 - b) * (g + b * (g - (g if previous is None else previous)))
        previous = g
        state = optimizer.state[params[0]]
        assert_same([state["exp_avg"] + b * state["exp_avg_diff"]], [average], atol=1e-14)


def test_the_two_decays_differ_by_second_order():
    def distance(lr, wd):
        results = []
        for no_prox in (False, True):
            params, optimizer = make([(50,)], lr=lr, weight_decay=wd, no_prox=no_prox)
            results.append(run(optimizer, params, gradients([(50,)], 1)) and params[0].detach())
        return float((results[0] - results[1]).abs().max())

    assert distance(0.1, 0.0) == 0.0
    for lr, wd in ((1e-2, 0.1), (1e-2, 1.0), (1e-3, 0.1)):
        assert 0 < distance(lr, wd) <= 4 * ((lr * wd) ** 2 + lr**2 * wd)  # |p| < 4
    assert distance(1e-3, 0.1) == pytest.approx(distance(1e-2, 0.1) / 100, rel=0.05)


@pytest.mark.parametrize("scale", [1e-3, 1e4])
def test_the_scale_of_the_loss_does_not_matter(backend, scale):
    results = []
    for s in (1.0, scale):
        params, optimizer = make(lr=0.02, eps=0.0, weight_decay=0.1, **backend)
        run(optimizer, params, gradients(SHAPES, 6, scale=s))
        results.append(params)
    assert_same(*results, atol=1e-11)


def test_eps_is_added_after_the_correction():
    """With a gradient g for the only time and a large eps, the step is lr g / (|g| + eps) exactly."""
    p = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))
    run(Adan([p], lr=1.0, eps=10.0), [p], [[torch.tensor([2.0])]])
    assert p.item() == pytest.approx(-2 / 12, abs=1e-14)


@pytest.mark.parametrize("max_grad_norm", [0.0, 0.5])
def test_order_of_groups_changes_nothing(max_grad_norm):
    results = []
    for order in ([0, 1, 2, 3], [3, 1, 0, 2]):
        params = parameters(SHAPES)
        groups = [{"params": [params[i]], "lr": 0.01 * (i + 1)} for i in order]
        run(Adan(groups, max_grad_norm=max_grad_norm), params, gradients(SHAPES, 4))
        results.append(params)
    assert_same(*results, atol=CLOSE)


# Clipping.


def test_the_norm_is_over_all_groups(backend):
    params = parameters([(4,), (3,)])
    optimizer = Adan([{"params": [p]} for p in params], max_grad_norm=1.0, **backend)
    run(optimizer, params, [[torch.full((4,), 3.0), torch.full((3,), 4.0)]])
    factor = 1 / (math.sqrt(4 * 9 + 3 * 16) + 1e-8)
    for p, g in zip(params, (3.0, 4.0), strict=True):
        # The stored gradient is the clipped one, and only once clipped.
        assert_same([-optimizer.state[p]["neg_pre_grad"]], [torch.full_like(p, g * factor)], atol=1e-14)


def test_clipping_equals_torchs_on_scaled_gradients(backend):
    steps = gradients(SHAPES, 5)
    params, optimizer = make(lr=0.01, max_grad_norm=0.5, **backend)
    run(optimizer, params, steps)
    twins, plain = make(lr=0.01)
    for grads in steps:
        give(twins, grads)
        torch.nn.utils.clip_grad_norm_(twins, 0.5)
        plain.step()
    assert_same(params, twins, atol=1e-7)  # torch adds 1e-6 to the norm, we eps


@pytest.mark.parametrize(("dtype", "size"), [(torch.bfloat16, 5000), (torch.float16, 5000), (torch.float16, 10)])
def test_the_norm_of_low_precision_gradients_is_not_rounded(dtype, size):
    """A norm kept in the gradients' type would be off by 2^-9, or overflow."""
    p = torch.nn.Parameter(torch.zeros(size, dtype=dtype))
    value = 60000.0 if size == 10 and dtype == torch.float16 else 1.01
    p.grad = torch.full((size,), value, dtype=dtype)
    exact = float(p.grad.double().norm())
    optimizer = Adan([p], max_grad_norm=1.0, state_dtype=torch.float32)
    optimizer.step()
    clipped = -optimizer.state[p]["neg_pre_grad"].double()
    assert_same([clipped], [p.grad.double() / exact], atol=0, rtol=1e-5)


def test_the_norm_of_float64_gradients_is_float64():
    params, optimizer = make(max_grad_norm=0.5)
    (grads,) = gradients(SHAPES, 1)
    run(optimizer, params, [grads])
    norm = math.sqrt(sum(float((g**2).sum()) for g in grads))
    for p, g in zip(params, grads, strict=True):
        assert_same([-optimizer.state[p]["neg_pre_grad"]], [g * 0.5 / (norm + 1e-8)], atol=1e-14)


def test_clipping_may_be_switched_on_and_off_between_steps(backend):
    steps = gradients(SHAPES, 6)
    params, optimizer = make(lr=0.01, **backend)
    twins, reference = make(lr=0.01, foreach=False)
    for t, grads in enumerate(steps):
        for group, opt in ((params, optimizer), (twins, reference)):
            opt.param_groups[0]["max_grad_norm"] = [0.0, 0.3][t // 2 % 2]
            run(opt, group, [grads])
    assert_same(params, twins, atol=CLOSE)
    stored = torch.cat([reference.state[p]["neg_pre_grad"].reshape(-1) for p in twins])
    assert float(stored.norm()) > 1  # the last steps were not clipped


# Traps.


def test_the_gradient_is_not_kept_by_reference_nor_changed(backend):
    params, optimizer = make(lr=0.01, max_grad_norm=0.1, **backend)
    twins, reference = make(lr=0.01, max_grad_norm=0.1)
    buffers = [torch.zeros_like(p) for p in params]
    for p, b in zip(params, buffers, strict=True):
        p.grad = b
    for grads in gradients(SHAPES, 5):
        for b, g in zip(buffers, grads, strict=True):
            b.copy_(g)  # the same memory every step, as with zero_grad(set_to_none=False)
        optimizer.step()
        assert_same(buffers, grads)
        assert all(p.grad is b for p, b in zip(params, buffers, strict=True))
        for b in buffers:
            b.zero_()
        run(reference, twins, [grads])
    assert_same(params, twins, atol=CLOSE)
    for p in params:
        assert not any(s.data_ptr() == p.grad.data_ptr() for s in optimizer.state[p].values() if s.numel() > 1)


def test_a_late_gradient_starts_from_its_own_first_step(backend):
    """The official code corrects it with the group's step."""
    params, optimizer = make([(3,), (3,)], lr=0.1, **backend)
    alone = [torch.nn.Parameter(params[1].detach().clone())]
    steps = gradients([(3,), (3,)], 9, absent={(t, 1) for t in range(5)})
    run(optimizer, params, steps)
    run(Adan(alone, lr=0.1), alone, [[g[1]] for g in steps[5:]])
    assert_same([params[1]], alone, atol=CLOSE)
    assert [float(optimizer.state[p]["step"]) for p in params] == [9, 4]


def test_an_absent_gradient_keeps_what_was_seen_last(backend):
    params, optimizer = make([(3,)], lr=0.1, **backend)
    (a,), (b,) = gradients([(3,)], 2)
    run(optimizer, params, [[a]])
    before, state = snapshot(params), copy.deepcopy(optimizer.state_dict()["state"])
    run(optimizer, params, [[None]] * 3)
    assert_same(params, before)
    for key, value in state[0].items():
        assert torch.equal(optimizer.state_dict()["state"][0][key], value)
    run(optimizer, params, [[b]])
    assert_same([optimizer.state[params[0]]["exp_avg_diff"]], [0.08 * (b - a)], atol=1e-14)


def test_zero_gradients_from_the_start(backend):
    params, optimizer = make(**backend)
    before = snapshot(params)
    run(optimizer, params, [[torch.zeros(s) for s in SHAPES]] * 3)
    assert_same(params, before)
    for p in params:
        assert not any(s.any() for name, s in optimizer.state[p].items() if name != "step")


def test_nan_shows(backend):
    params, optimizer = make([(5,), (4,)], **backend)
    grads = gradients([(5,), (4,)], 1)[0]
    grads[0][2] = math.nan
    run(optimizer, params, [grads])
    assert params[0].isnan().tolist() == [False, False, True, False, False]
    assert not params[1].isnan().any()
    run(optimizer, params, gradients([(5,), (4,)], 1))
    assert params[0].isnan().tolist() == [False, False, True, False, False]


def test_nan_reaches_all_through_the_norm(backend):
    params, optimizer = make([(5,), (4,)], max_grad_norm=1.0, **backend)
    grads = gradients([(5,), (4,)], 1)[0]
    grads[0][2] = math.nan
    run(optimizer, params, [grads])
    assert all(p.isnan().all() for p in params)


def test_accumulated_gradients_are_what_is_differenced():
    params, optimizer = make([(3,)], lr=0.1)
    parts = gradients([(3,)], 6)
    for t in range(3):
        optimizer.zero_grad()
        for (g,) in parts[2 * t : 2 * t + 2]:
            (params[0] * g).sum().backward()
        optimizer.step()
    twins, reference = make([(3,)], lr=0.1)
    run(reference, twins, [[parts[2 * t][0] + parts[2 * t + 1][0]] for t in range(3)])
    assert_same(params, twins, atol=CLOSE)


def test_low_precision_state_loses_the_difference_and_wide_state_does_not():
    steps = [[1.0 + 1e-3 * g[0]] for g in gradients([(200,)], 8)]
    exact, reference = [torch.nn.Parameter(torch.zeros(200, dtype=torch.float64))], None
    errors = {}
    for state_dtype in (None, torch.float32):
        p = torch.nn.Parameter(torch.zeros(200, dtype=torch.bfloat16))
        optimizer = run(Adan([p], state_dtype=state_dtype), [p], steps)
        reference = Adan(exact := [torch.nn.Parameter(torch.zeros(200, dtype=torch.float64))])
        run(reference, exact, [[g.to(torch.bfloat16).double()] for (g,) in steps])
        v, truth = optimizer.state[p]["exp_avg_diff"].double(), reference.state[exact[0]]["exp_avg_diff"]
        errors[state_dtype] = float((v - truth).abs().max())
        assert optimizer.state[p]["exp_avg_diff"].dtype == (state_dtype or torch.bfloat16)
    assert errors[torch.float32] < 1e-6
    assert errors[None] > 10 * errors[torch.float32]


# Restarts.


def test_restart_is_a_fresh_start(backend):
    params, optimizer = make(lr=0.1, **backend)
    run(optimizer, params, gradients(SHAPES, 3))
    optimizer.restart()
    twins = [torch.nn.Parameter(p.detach().clone()) for p in params]
    fresh = Adan(twins, lr=0.1)
    for grads in gradients(SHAPES, 3, seed=77):
        run(optimizer, params, [grads])
        run(fresh, twins, [grads])
        assert_same(params, twins, atol=CLOSE)
    assert float(optimizer.state[params[0]]["step"]) == 3


def restarts(steps, radius, shapes=SHAPES, **options):
    """The steps after which the paper's condition restarts, from the reference."""
    start, count, total, found = numbers(parameters(shapes)), 0, 0.0, []
    pending = []
    for t, grads in enumerate(steps):
        pending.append(grads)
        before = adan(start, pending[:-1], options)
        after, state = adan(start, pending, options, with_state=True)
        total += sum(
            float((np.sqrt(s["n"]) * (a - b) ** 2).sum()) for a, b, s in zip(after, before, state, strict=True)
        )
        count += 1
        if count * total > radius**2:
            found.append(t)
            start, count, total, pending = after, 0, 0.0, []
    return found, after


@pytest.mark.parametrize("radius", [0.05, 0.3, 1.0, 50.0])
def test_restart_condition(backend, radius):
    steps = gradients(SHAPES, 12)
    params, optimizer = make(lr=0.02, restart_radius=radius, **backend)
    found, counts = [], []
    expected, values = restarts(steps, radius, lr=0.02)
    for t, grads in enumerate(steps):
        run(optimizer, params, [grads])
        counts.append(float(optimizer.state[params[0]]["step"]))
        if counts[-1] == 0:
            found.append(t)
    assert found == expected
    assert_same(params, values, atol=CLOSE)
    assert {0.05: 12, 50.0: 0}.get(radius, len(found)) == len(found)


def test_a_copy_goes_on_counting_to_the_restart():
    import pickle

    steps = gradients(SHAPES, 12)
    for through in (copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))):
        params, optimizer = make(lr=0.02, restart_radius=0.3)
        run(optimizer, params, steps[:2])
        twins, twin = through((params, optimizer))
        run(optimizer, params, steps[2:])
        run(twin, twins, steps[2:])
        assert_same(twins, params)


def test_a_checkpoint_goes_on_counting_to_the_restart():
    steps = gradients(SHAPES, 12)
    params, optimizer = make(lr=0.02, restart_radius=0.3)
    run(optimizer, params, steps[:2])
    twins = [torch.nn.Parameter(p.detach().clone()) for p in params]
    twin = Adan(twins, lr=0.02, restart_radius=0.3)
    twin.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    run(optimizer, params, steps[2:])
    run(twin, twins, steps[2:])
    assert_same(twins, params)


def test_restart_before_the_first_step():
    params, optimizer = make()
    optimizer.restart()
    run(optimizer, params, gradients(SHAPES, 1))


# The functional form.


@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize("options", [{}, dict(weight_decay=0.1), dict(weight_decay=0.1, no_prox=True, maximize=True)])
def test_functional_form(foreach, options):
    params, optimizer = make(lr=0.02, **options)
    plain = snapshot(params)
    states = [[torch.zeros_like(p) for p in plain] for _ in range(4)]
    counts = [torch.tensor(0.0) for _ in plain]
    for grads in gradients(SHAPES, 4):
        run(optimizer, params, [grads])
        kept = [g.clone() for g in grads]
        adan_step(plain, grads, *states, counts, lr=0.02, foreach=foreach, **options)
        assert_same(grads, kept)
    assert_same(plain, params, atol=CLOSE)
    assert [float(c) for c in counts] == [4.0] * len(plain)


@pytest.mark.parametrize("foreach", [False, True])
def test_functional_form_with_steps_of_their_own_and_a_clip(foreach):
    shapes = [(4,), (4,)]
    plain = [normal((4,), i) for i in range(2)]
    states = [[torch.zeros_like(p) for p in plain] for _ in range(4)]
    counts = [torch.tensor(0.0), torch.tensor(0.0)]
    (first, second) = gradients(shapes, 2)
    expected = [
        adan([plain[0].numpy()], [[0.5 * first[0]], [0.5 * second[0]]], dict(lr=0.1))[0],
        adan([plain[1].numpy()], [[0.5 * second[1]]], dict(lr=0.1))[0],
    ]
    adan_step(plain[:1], first[:1], *[s[:1] for s in states], counts[:1], lr=0.1, clip=0.5, foreach=foreach)
    adan_step(plain, second, *states, counts, lr=0.1, clip=0.5, foreach=foreach)
    assert_same(plain, expected, atol=CLOSE)


def test_functional_form_bad_input():
    p, s, c = [torch.ones(2)], [torch.zeros(2)], [torch.tensor(0.0)]
    with pytest.raises(ValueError, match="exp_avg_sqs has 0 tensors where params has 1"):
        adan_step(p, p, s, s, [], s, c, lr=0.1)
    with pytest.raises(ValueError, match="grads has 2 tensors"):
        adan_step(p, p * 2, s, s, s, s, c, lr=0.1)
    with pytest.raises(ValueError, match="state_steps has 0"):
        adan_step(p, p, s, s, s, s, [], lr=0.1)
    with pytest.raises(ValueError, match="lr must be >= 0, got -1"):
        adan_step(p, p, s, s, s, s, c, lr=-1)
    with pytest.raises(ValueError, match="Adan needs three betas"):
        adan_step(p, p, s, s, s, s, c, lr=1, betas=(0.9, 0.9))
    assert float(c[0]) == 0.0


# Checkpoints of the official code.


@pytest.mark.parametrize("fused", [False, True])
def test_official_checkpoints_load(fused):
    params, optimizer = make(lr=0.02, weight_decay=0.1)
    steps = gradients(SHAPES, 8)
    run(optimizer, params, steps[:4])
    official = copy.deepcopy(optimizer.state_dict())
    for state in official["state"].values():
        del state["step"]
    keys = ("params", "lr", "betas", "eps", "weight_decay", "max_grad_norm", "no_prox")
    official["param_groups"] = [
        {**{k: g[k] for k in keys}, "foreach": True, "fused": fused, "step": 4} for g in official["param_groups"]
    ]
    kept = copy.deepcopy(official)
    twins = [torch.nn.Parameter(p.detach().clone()) for p in params]
    twin = Adan(twins, lr=1.0)
    twin.load_state_dict(official)
    run(optimizer, params, steps[4:])
    run(twin, twins, steps[4:])
    assert_same(twins, params, atol=CLOSE)
    assert "step" not in twin.param_groups[0]
    assert official["param_groups"] == kept["param_groups"]
    assert all("step" not in s for s in official["state"].values()), "what was loaded is not changed"
    assert_same(official["state"][1].values(), kept["state"][1].values())


# Bad input.


@pytest.mark.parametrize("name", ["lr", "eps", "weight_decay", "max_grad_norm"])
@pytest.mark.parametrize(
    ("value", "error", "words"),
    [
        (-1e-3, ValueError, "must be >= 0, got -0.001"), (float("nan"), ValueError, "must be finite, got nan"),
        (float("inf"), ValueError, "must be finite, got inf"), (True, TypeError, "must be a number, got True"),
        ("0.1", TypeError, "must be a number, got '0.1'"), (None, TypeError, "must be a number, got None"),
    ],
)  # fmt: skip
def test_hyperparameters_out_of_range(name, value, error, words):
    params = parameters([(2,), (2,)])
    late = {"params": params[1:], name: value}
    with pytest.raises(error, match=f"^{name} {words}$"):
        Adan(params, **{name: value})
    with pytest.raises(error, match=rf"^params\[1\]: {name} {words}$"):
        Adan([{"params": params[:1]}, late])
    optimizer = Adan(params[:1])
    with pytest.raises(error, match=f"^{name} {words}$"):
        optimizer.add_param_group(late)
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize(
    ("betas", "error", "words"),
    [
        ((0.9, 0.99), ValueError, "Adan needs three betas, got 2"),
        ((0.9, 0.9, 1.0), ValueError, r"betas\[2\] must be in \[0, 1\)"),
        ((-0.1, 0.9, 0.9), ValueError, r"betas\[0\]"), (0.9, ValueError, "Adan needs three betas, got 0.9"),
        ((0.9, 0.9, "a"), TypeError, r"betas\[2\] must be a number"), ((0.9, float("nan"), 0.9), ValueError, r"betas\[1\]"),
    ],
)  # fmt: skip
def test_bad_betas(betas, error, words):
    with pytest.raises(error, match=words):
        Adan(parameters([(2,)]), betas=betas)


def test_the_papers_convention_is_noticed():
    with pytest.warns(UserWarning, match=r"look like the paper's convention; polyak uses retention factors") as caught:
        Adan(parameters([(2,)]), betas=(0.02, 0.08, 0.01))
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Adan(parameters([(2,)]))
        Adan(parameters([(2,)]), betas=[0.9, 0.0, 0.99])


@pytest.mark.parametrize("value", [1, 0, "yes", None])
def test_no_prox_is_a_truth_value(value):
    with pytest.raises(ValueError, match="no_prox must be one of False, True"):
        Adan(parameters([(2,)]), no_prox=value)


@pytest.mark.parametrize("value", [0, -1.0, float("nan")])
def test_restart_radius_out_of_range(value):
    with pytest.raises(ValueError, match="restart_radius"):
        Adan(parameters([(2,)]), restart_radius=value)


def test_restart_radius_is_one_for_all_groups():
    params = parameters([(2,), (2,)])
    with pytest.raises(ValueError, match=r"restart_radius must be the same in all groups.*got 1.0 and None"):
        Adan([{"params": params[:1]}, {"params": params[1:], "restart_radius": 1.0}])
    optimizer = Adan([{"params": params, "restart_radius": 1e-9}], lr=0.1)
    run(optimizer, params, gradients([(2,), (2,)], 1))
    assert float(optimizer.state[params[0]]["step"]) == 0, "restarted"
