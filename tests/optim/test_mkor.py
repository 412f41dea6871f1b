"""MKOR: factors, preconditioning and the fallback, against independent float64 code. Statistics: test_mkor_statistics.py."""

import numpy as np
import pytest
import torch
from mkor_for_tests import Reference, backward, conv_net, data, mkor, mlp, sgd, train
from references_for_tests import assert_same, normal, snapshot
from torch import nn

from polyak.optim import MKOR, MKORH, Adan
from polyak.optim.mkor.factors import Rule, Side

PACKAGE, EMA = Rule(0.95, False, 2.0, 1.0), Rule(0.9, True, 1e9, 1.0)
YES = torch.ones(1, dtype=torch.bool)


# The whole, against the specification in NumPy.

GOLDEN = {
    "defaults": {},
    "warmup": dict(inv_freq=5, warmup_steps=3),
    "clip": dict(clip=0.3, inv_freq=1),
    "decay": dict(decay=0.5, inv_freq=1),
    "package, stabilized": dict(inv_freq=1, decay=0.6, stabilize=(0.97, 0.4)),
    "ema": dict(update="ema", decay=0.8, inv_freq=1, stabilize=(1e9, 1.0)),
    "ema, stabilized": dict(update="ema", decay=0.7, inv_freq=1, stabilize=(2.0, 0.7)),
    "ema, reset": dict(update="ema", decay=0.7, inv_freq=1),
}


@pytest.mark.parametrize("name", sorted(GOLDEN))
def test_golden_trajectory(name):
    options = GOLDEN[name]
    model = conv_net()
    given = {"inv_freq": 2, **options}
    (threshold, blend), ema = given.pop("stabilize", (2.0, 1.0)), given.pop("update", "") == "ema"
    reference = Reference(model, ema=ema, threshold=threshold, blend=blend, **given)
    optimizer = mkor(model, **options)
    resets = 0
    for t in range(12):
        x = data(6, 2, 5, 5, seed=t)
        train(model, optimizer, [x])
        reference.step(x)
        resets += sum(sum(f) for f in reference.flags.values())
        for i, (A, G) in ((int(name), factors) for name, factors in optimizer.factors.items()):
            assert_same([A, G], reference.factors[i], atol=1e-9)
            w = model[i].weight.detach().flatten(1)
            w = w if model[i].bias is None else torch.cat([w, model[i].bias.detach()[:, None]], 1)
            assert_same([w], [reference.weights[i]], atol=1e-10)
    assert ("stabilized" in name or "reset" in name) == (resets > 0), "the threshold was meant to act, or not to"


def test_pinned_numbers():
    """One weight, one input: J and w by hand, w' = w - lr buffer, since one number scaled to its own size is itself."""
    model = nn.Linear(1, 1, bias=False).double()
    nn.init.ones_(model.weight)
    optimizer = mkor(model, inv_freq=1)
    j_a = j_g = None
    w, buffer = 1.0, 0.0
    for _ in range(6):
        train(model, optimizer, [torch.tensor([[1.0], [3.0]], dtype=torch.float64)])
        a, g = 2.0, np.mean([2 * w * x for x in (1.0, 3.0)])
        if j_a is None:
            j_a = j_g = 1.0
        else:
            p, q = 0.95 * j_a + 0.05, 0.95 * j_g + 0.05
            j_a, j_g = p / (1 + p * a * a), q / (1 + q * g * g)
        buffer = 0.9 * buffer + w * (1 + 9)
        w -= 0.1 * buffer
        A, G = optimizer.factors[""]
        assert (A.item(), G.item(), model.weight.item()) == pytest.approx((j_a, j_g, w), abs=1e-12)


# Factors.


def test_package_factors_stay_positive_and_at_most_one():
    side = Side(1, 6, torch.float64, torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    for t in range(1000):
        v = torch.randn(1, 6, generator=generator, dtype=torch.float64) * 10 ** (t % 5 - 2)
        assert not side.update(v, YES, PACKAGE).any()
        assert torch.equal(side.J, side.J.mT)
        eigenvalues = torch.linalg.eigvalsh(side.J[0])
        assert eigenvalues.min() > 0
        assert eigenvalues.max() <= 1 + 1e-14


def test_ema_factors_are_the_inverse_of_the_moving_average():
    side, C = Side(1, 5, torch.float64, torch.device("cpu")), torch.eye(5, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    for t in range(200):
        v = torch.randn(1, 5, generator=generator, dtype=torch.float64)
        side.update(v, YES, EMA)
        if t:
            C = 0.9 * C + 0.1 * v.mT @ v
        torch.testing.assert_close(side.J[0], torch.linalg.inv(C), atol=1e-8, rtol=1e-8)


def test_a_constant_vector_has_a_fixed_point():
    v = normal((1, 4), 0)
    side = Side(1, 4, torch.float64, torch.device("cpu"))
    for _ in range(400):
        side.update(v, YES, PACKAGE)
    u = v[0] / v.norm()
    j = float(u @ side.J[0] @ u)
    p = 0.95 * j + 0.05
    assert j == pytest.approx(p / (1 + p * float(v.square().sum())), abs=1e-12)
    rest = side.J[0] - j * torch.outer(u, u)
    assert_same([rest], [torch.eye(4).double() - torch.outer(u, u)], atol=1e-12)


def test_a_reset_takes_nothing_in():
    side = Side(1, 3, torch.float64, torch.device("cpu"))
    v = normal((1, 3), 1)
    side.update(v, YES, PACKAGE)
    assert torch.equal(side.J[0], torch.eye(3, dtype=torch.float64))
    side.update(v, YES, PACKAGE)
    before = side.J.clone()
    assert not torch.equal(before[0], torch.eye(3, dtype=torch.float64))
    side.reset[:] = True
    side.update(v, YES, Rule(0.95, False, 2.0, 0.25))
    assert_same(side.J, 0.75 * before + 0.25 * torch.eye(3, dtype=torch.float64), atol=1e-16)
    assert not side.reset.any()


def test_a_stack_updates_each_layer_on_its_own():
    v, usable = normal((3, 4), 2), torch.tensor([True, False, True])
    stack = Side(3, 4, torch.float64, torch.device("cpu"))
    alone = [Side(1, 4, torch.float64, torch.device("cpu")) for _ in range(3)]
    for t in range(4):
        stack.update(v * (t + 1), usable, PACKAGE)
        for i, side in enumerate(alone):
            side.update(v[i : i + 1] * (t + 1), usable[i : i + 1], PACKAGE)
    assert_same(stack.J, [side.J[0] for side in alone], atol=1e-15)
    assert stack.reset.tolist() == [False, True, False]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_is_storage_only(dtype):
    """v^T P v = 4e8 here: beyond float16, and no reason to stop."""
    side = Side(1, 40_000 // 100, dtype, torch.device("cpu"))
    v = torch.full((1, 400), 100.0)
    exact = Side(1, 400, torch.float64, torch.device("cpu"))
    for _ in range(5):
        side.update(v, YES, PACKAGE)
        exact.update(v.double(), YES, PACKAGE)
    # Each of four updates rounds entries of size 1 at most once, to half a unit in the last place.
    assert side.J.dtype == dtype
    assert_same(side.J.double(), exact.J, atol=4 * torch.finfo(dtype).eps / 2)


def test_overflow_of_the_inputs_resets_the_outputs_in_the_same_update():
    model = mlp(3, 2)
    optimizer = mkor(model, inv_freq=1, update="ema", decay=0.5, stabilize=(3.0, 1.0))
    seen = []
    for t in range(4):
        train(model, optimizer, [data(4, 3, seed=t)])
        (stack,) = optimizer._stacks
        seen.append((stack.A.reset.item(), stack.G.reset.item(), stack.G.J[0].clone()))
    # J = I, 2, 4: over the threshold at the third, where the outputs' factor had been 2 in its unseen direction.
    assert [s[:2] for s in seen] == [(False, False), (False, False), (True, False), (False, False)]
    assert torch.equal(seen[2][2], torch.eye(2, dtype=torch.float64))
    assert torch.equal(optimizer.factors["0"][0], torch.eye(4, dtype=torch.float64))


# Preconditioning.


def seen_by(base):
    """The gradients that the base optimizer steps with."""
    found = []
    base.register_step_pre_hook(
        lambda o, a, k: found.append([None if p.grad is None else p.grad.clone() for p in o.param_groups[0]["params"]])
    )
    return found


def norms(grads):
    return torch.stack([g.norm() for g in grads]).sum()


def test_the_first_step_is_the_bases():
    model, twin = mlp(3, 5, 2), mlp(3, 5, 2)
    for m, optimizer in ((model, mkor(model)), (twin, sgd(twin))):
        train(m, optimizer, [data(4, 3)])
    assert_same(model.parameters(), twin.parameters(), atol=1e-16)


def test_the_size_stays_and_the_direction_descends():
    model = mlp(3, 5, 5, 5, 2)
    optimizer = mkor(model, inv_freq=1)
    found = seen_by(optimizer.base)
    for t in range(20):
        optimizer.zero_grad()
        backward(model, 5 * data(4, 3, seed=t))
        raw = [p.grad.clone() for p in model.parameters()]
        optimizer.step()
        for w in range(0, len(raw), 2):
            before, after = raw[w : w + 2], found[-1][w : w + 2]
            assert norms(after).item() == pytest.approx(norms(before).item(), rel=1e-13)
            assert sum((a * b).sum() for a, b in zip(before, after, strict=True)) > 0
    assert not torch.allclose(raw[0], found[-1][0], rtol=1e-2)


def test_gradients_are_left_as_they_were():
    model = mlp(3, 5, 2)
    optimizer = mkor(model, inv_freq=1)
    for t in range(3):
        optimizer.zero_grad()
        backward(model, data(4, 3, seed=t))
        grads = [p.grad for p in model.parameters()]
        values = snapshot(grads)
        optimizer.step()
        assert all(p.grad is g for p, g in zip(model.parameters(), grads, strict=True))
        assert_same(grads, values)


def test_layers_of_one_shape_are_stacked_and_their_order_changes_nothing(monkeypatch):
    results = []
    for limit in (2**25, 1):
        monkeypatch.setattr("polyak.optim.mkor.factors.STACKED", limit)
        model = mlp(4, 4, 4, 4, 4, 2)
        optimizer = mkor(model, inv_freq=1)
        assert [len(s.layers) for s in optimizer._stacks] == ([4, 1] if limit > 1 else [1] * 5)
        train(model, optimizer, [data(6, 4, seed=t) for t in range(8)])
        results.append(snapshot(model.parameters()))
    assert_same(*results, atol=1e-13)


def test_a_zero_gradient_stays_zero_and_one_that_is_not_finite_is_passed_on():
    model = mlp(3, 3, 3)
    optimizer = mkor(model, inv_freq=1)
    train(model, optimizer, [data(4, 3, seed=t) for t in range(2)])
    found = seen_by(optimizer.base)
    optimizer.zero_grad()
    backward(model, data(4, 3))
    model[0].weight.grad.zero_(), model[0].bias.grad.zero_()
    model[2].weight.grad[0, 0] = float("nan")
    expected = model[2].weight.grad.clone()
    optimizer.step()
    assert not found[-1][0].any()
    assert_same([found[-1][2]], [expected])


def test_a_layer_without_gradient_is_passed_over():
    model = mlp(3, 3, 3, 3)
    optimizer = mkor(model, inv_freq=1)
    train(model, optimizer, [data(4, 3, seed=t) for t in range(3)])
    before, old = snapshot(model[2].parameters()), [f.clone() for f in optimizer.factors["2"]]
    others = [f.clone() for f in optimizer.factors["0"]]
    optimizer.zero_grad()
    (model[4](torch.tanh(model[0](data(4, 3))))).square().mean().backward()
    optimizer.step()
    assert_same(model[2].parameters(), before)
    assert_same(optimizer.factors["2"], old)
    assert not torch.equal(optimizer.factors["0"][0], others[0])
    assert optimizer.skipped == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_weights_of_other_types(dtype):
    model, exact = mlp(3, 4, 2), mlp(3, 4, 2)
    model.to(dtype)
    exact.load_state_dict(model.state_dict())
    optimizer, reference = MKOR(model, sgd(model), inv_freq=1), mkor(exact, inv_freq=1)
    for t in range(3):
        x = data(4, 3, seed=t, dtype=dtype)
        train(model, optimizer, [x])
        train(exact, reference, [x.double()])
    assert optimizer.factors["0"][0].dtype == torch.float32
    # Three steps, each through two layers, round weights, activations and gradients of size 1 some ten times.
    assert_same(model.parameters(), exact.parameters(), atol=60 * torch.finfo(dtype).eps)


def test_channels_last_gradients_keep_their_layout():
    model = conv_net()
    model[0].to(memory_format=torch.channels_last)
    twin = conv_net()
    first, second = mkor(model, inv_freq=1), mkor(twin, inv_freq=1)
    for t in range(3):
        x = data(6, 2, 5, 5, seed=t)
        train(model, first, [x.to(memory_format=torch.channels_last)])
        train(twin, second, [x])
    assert_same(model.parameters(), twin.parameters(), atol=1e-13)


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True),
        lambda p: torch.optim.AdamW(p, lr=0.01),
        lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
        lambda p: Adan(p, lr=0.01),
        lambda p: Adan(p, lr=0.01, max_grad_norm=0.1, foreach=False),
    ],
    ids=["sgd", "adamw", "adamw-fused", "adan", "adan-clip"],
)
def test_any_base(make):
    """The base steps as it would alone with the preconditioned gradients, and keeps its state."""
    model, twin = mlp(3, 5, 2), mlp(3, 5, 2)
    optimizer, alone = MKOR(model, make(model.parameters()), inv_freq=1), make(twin.parameters())
    found = seen_by(optimizer.base)
    for t in range(5):
        train(model, optimizer, [data(4, 3, seed=t)])
        for p, g in zip(twin.parameters(), found[-1], strict=True):
            p.grad = g
        alone.step()
    assert_same(model.parameters(), twin.parameters(), atol=1e-14)
    assert optimizer.state is optimizer.base.state
    assert set(optimizer.state) == set(model.parameters())


# MKOR-H.


def hybrid(model, **options):
    return MKORH(model, sgd(model), **{"factor_dtype": torch.float64, "inv_freq": 1, **options})


def test_hybrid_is_mkor_until_it_falls_back_and_then_its_base():
    model, twin = mlp(3, 5, 2), mlp(3, 5, 2)
    optimizer, reference = hybrid(model, window=1000), mkor(twin, inv_freq=1)
    batches = [data(4, 3, seed=t) for t in range(12)]
    train(model, optimizer, batches[:6])
    train(twin, reference, batches[:6])
    assert_same(model.parameters(), twin.parameters(), atol=0)
    optimizer.fallback()
    assert not optimizer.preconditions
    # The base alone, with the momentum that it has.
    train(model, optimizer, batches[6:])
    reference.remove()
    train(twin, reference.base, batches[6:])
    assert_same(model.parameters(), twin.parameters(), atol=0)
    assert optimizer.factors == {}
    backward(model, batches[0])
    assert optimizer._layers[0].passes == 0


def fed(losses, **options):
    """How many steps an optimizer that is told these losses preconditions."""
    model = mlp(3, 2)
    optimizer = hybrid(model, **options)
    for t, loss in enumerate(losses):
        optimizer.observe(loss)
        train(model, optimizer, [data(4, 3)])
        if not optimizer.preconditions:
            return t + 1
    return None


def rates(losses, window):
    """The rate after every step, by the rule's words: both averages are plain means until there are enough."""
    level, rate, found = losses[0], 0.0, [0.0]
    for n, loss in enumerate(losses[1:], 1):
        new = level + (loss - level) / min(n + 1, window)
        rate += ((level - new) / level - rate) / min(n, window)
        level = new
        found.append(rate)
    return found


FALLING, FLAT, RISING = [0.9**t for t in range(30)], [0.9**30] * 60, [1 + 0.1 * t for t in range(30)]


@pytest.mark.parametrize(
    ("losses", "window", "tau", "expected"),
    [
        (FALLING, 10, 0.2, None),
        (FALLING + FLAT, 10, 0.2, 80),
        (FALLING + FLAT, 10, 0.8, 50),
        (FALLING + FLAT, 7, 0.2, 56),
        (RISING, 10, 0.0, 10),
        (RISING, 1, 0.5, 2),
    ],
)
def test_the_fallback_is_at_the_end_of_a_window(losses, window, tau, expected):
    found = rates(losses, window)
    looks = range(window - 1, len(losses), window)
    best = {t: max(found[s] for s in looks if s <= t) for t in looks}
    assert next((t + 1 for t in looks if found[t] < tau * best[t] or found[t] < 0), None) == expected
    assert fed(losses, window=window, tau=tau) == expected


def test_the_rate_is_the_mean_relative_decrease_of_the_mean_loss():
    optimizer = hybrid(mlp(3, 2), window=4)
    losses = [3.0, 2.0, 4.0, 1.0, 0.5, 0.7, 0.1]
    for loss in losses:
        optimizer.observe(loss)
        optimizer._follow()
        optimizer._losses.clear()
    # Kept in float32: seven steps of a few roundings each.
    assert float(optimizer._rate) == pytest.approx(rates(losses, 4)[-1], abs=1e-6)


def test_losses_come_from_closures_too_and_their_absence_warns():
    model = mlp(3, 2)
    optimizer = hybrid(model, window=2)

    def closure():
        optimizer.zero_grad()
        loss = model(data(4, 3)).square().mean()
        loss.backward()
        return loss

    first = optimizer.step(closure)
    assert float(optimizer._level) == pytest.approx(first.item(), rel=1e-6)
    optimizer.observe(3.0), optimizer.observe(5.0)
    optimizer.step(closure)
    assert float(optimizer._level) == pytest.approx((first.item() + 4) / 2, rel=1e-6)
    silent = hybrid(mlp(3, 2), window=2)
    with pytest.warns(UserWarning, match="MKORH has seen no loss"):
        silent.step(), silent.step()
