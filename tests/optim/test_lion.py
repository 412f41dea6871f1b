"""Lion and Lion-K against their equations, the convex analysis behind each K, and the Lyapunov function's promises."""

import copy
import math
import warnings

import numpy as np
import pytest
import torch
from references_for_tests import DIRECTIONS, assert_same, gradients, lion, normal, numbers, parameters, run, snapshot

from polyak.optim import Lion, LionK
from polyak.optim.lion import bound, kappa, lyapunov
from polyak.optim.lion.kappa import (
    L1,
    L2,
    DeadZone,
    Entropic,
    Group,
    HalfSquare,
    Huber,
    Lp,
    Nuclear,
    Relativistic,
    TopK,
)

SHAPES = [(3, 4), (2, 5), (6, 3)]
CLOSE = 1e-12
EVERY = {repr(k): k for k in (
    L1(), L2(), Lp(3.0), DeadZone(0.1), Huber(0.2), Entropic(3.0), Relativistic(0.3), TopK(4), Group(0), Nuclear("svd"),
    Nuclear("ns5"), HalfSquare(),
)}  # fmt: skip
ELEMENTWISE = [k for k in EVERY.values() if k.elementwise]
SMOOTH = [Huber(0.2), Entropic(3.0), Relativistic(0.3), HalfSquare(), L2(), Lp(3.0), Lp(1.5), Group(0), Nuclear("svd")]
EXACT = [k for k in EVERY.values() if k != Nuclear("ns5")]  # whose grad is a subgradient, not near one


def direction(k):
    name = repr(k).replace(", fallback=None", "").replace("L2(scope='tensor')", "L2()")
    return DIRECTIONS[name]


def ids(k):
    return repr(k)


# Golden trajectories.


@pytest.mark.parametrize("k", EVERY.values(), ids=ids)
@pytest.mark.parametrize("options", [{}, dict(weight_decay=0.7), dict(weight_decay=0.7, maximize=True)])
def test_trajectory_equals_the_equations(backend, k, options):
    options = dict(lr=0.02, betas=(0.7, 0.9), **options)
    params = parameters(SHAPES)
    optimizer = LionK(params, k, **options, **backend)
    steps = gradients(SHAPES, 5, absent={(0, 1), (3, 2)})
    expected = lion(numbers(params), steps, direction(k), **options)
    run(optimizer, params, steps)
    assert_same(params, expected, atol=CLOSE if k != Nuclear("ns5") else 1e-9)


PINNED = {
    "sign": (L1(), [0.85, 0.9075, 0.7621249999999999, 0.8240187499999999, 0.6828178125]),
    "l2": (L2(), [0.85, 0.9075, 0.7621249999999999, 0.8240187499999999, 0.6828178125]),
    "dead_zone": (DeadZone(0.1), [0.95, 1.0025, 0.9523749999999999, 0.9047562499999998, 0.7595184374999998]),
    "huber": (Huber(0.2), [0.8999999999999999, 0.9504999999999999, 0.8825199999999999, 0.8406435499999999, 0.6986113724999999]),
    "entropic": (
        Entropic(2.0),
        [0.9302624679775096, 0.9201936538587693, 0.8660201805729629, 0.8236189672596783, 0.7293699814526255]),
    "relativistic": (
        Relativistic(0.3),
        [0.9183772233983162, 0.9261641043219393, 0.8663442838623902, 0.8245266010489432, 0.7131204033284956]),
    "half_square": (HalfSquare(), [0.94, 0.9120999999999999, 0.862404, 0.81973371, 0.7491924353999999]),
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(PINNED))
def test_pinned_numbers(name, backend):
    """Fixed when the method was first released: gradients 1, -2, 0.5, 0, 3 on a parameter of 1."""
    k, expected = PINNED[name]
    p = torch.nn.Parameter(torch.tensor([1.0], dtype=torch.float64))
    optimizer = LionK([p], k, lr=0.1, betas=(0.9, 0.99), weight_decay=0.5, **backend)
    visited = []
    for g in (1.0, -2.0, 0.5, 0.0, 3.0):
        p.grad = torch.tensor([g], dtype=torch.float64)
        optimizer.step()
        visited.append(p.item())
    assert visited == pytest.approx(expected, abs=1e-13)


def test_lion_is_lion_k_of_l1():
    results = []
    for make in (lambda p, **o: Lion(p, **o), lambda p, **o: LionK(p, "sign", **o), lambda p, **o: LionK(p, "l1", **o)):
        params = parameters(SHAPES)
        run(make(params, lr=0.01, weight_decay=0.3), params, gradients(SHAPES, 4))
        results.append(params)
    assert_same(results[0], results[1])
    assert_same(results[0], results[2])


def test_kappas_per_group():
    names = ["l2", Huber(0.3), "half_square"]
    params = parameters(SHAPES)
    groups = [{"params": [p], "kappa": k} for p, k in zip(params, names, strict=True)]
    steps = gradients(SHAPES, 4)
    expected = []
    for i, k in enumerate(names):
        alone = [torch.nn.Parameter(params[i].detach().clone())]
        run(LionK(alone, k, lr=0.02, weight_decay=0.5), alone, [[g[i]] for g in steps])
        expected.append(alone[0])
    run(LionK(groups, "l1", lr=0.02, weight_decay=0.5), params, steps)
    assert_same(params, expected)


@pytest.mark.parametrize("scope", ["group", "all"])
@pytest.mark.parametrize("maximize", [False, True])
def test_norms_over_more_than_a_tensor(backend, scope, maximize):
    options = dict(lr=0.02, betas=(0.7, 0.9), weight_decay=0.5)
    shapes = [(3, 4), (5,), (2,), ()]
    params = parameters(shapes)
    groups = [{"params": params[:2]}, {"params": params[2:]}]
    steps = gradients(shapes, 5, absent={(0, 1), (3, 2), (3, 3)})
    optimizer = LionK(groups, L2(scope), maximize=maximize, **options, **backend)
    values, buffers = numbers(params), [np.zeros(s) for s in shapes]
    for grads in steps:
        run(optimizer, params, [grads])
        arrays = [None if g is None else (-1 if maximize else 1) * g.numpy() for g in grads]
        c = [None if g is None else 0.7 * m + 0.3 * g for m, g in zip(buffers, arrays, strict=True)]
        square = [0.0 if x is None else float((x**2).sum()) for x in c]
        for i, x in enumerate(c):
            if x is None:
                continue
            norm = math.sqrt(sum(square) if scope == "all" else sum(square[:2] if i < 2 else square[2:]))
            values[i] = (1 - 0.02 * 0.5) * values[i] - 0.02 * x / norm
            buffers[i] = 0.9 * buffers[i] + 0.1 * arrays[i]
    assert_same(params, values, atol=CLOSE)


@pytest.mark.parametrize("scope", ["group", "all"])
def test_norms_over_groups_without_parameters_or_gradients(scope):
    params = parameters([(3,), (2,)])
    optimizer = LionK([{"params": params[:1]}, {"params": []}, {"params": params[1:]}], L2(scope), lr=0.1)
    before = snapshot(params)
    run(optimizer, params, [[None, torch.tensor([3.0, 4.0])]])
    assert_same(params, [before[0], before[1] - torch.tensor([0.06, 0.08], dtype=torch.float64)], atol=1e-15)


# Closed forms.


def test_every_coordinate_moves_by_lr_whatever_the_scale(backend):
    results = []
    for scale in (1.0, 1e-6, 1e8):
        params = parameters(SHAPES)
        before = snapshot(params)
        optimizer = Lion(params, lr=0.01, **backend)
        for grads in gradients(SHAPES, 4, scale=scale):
            run(optimizer, params, [grads])
            for p, old in zip(params, before, strict=True):
                torch.testing.assert_close((p.detach() - old).abs(), torch.full_like(old, 0.01), atol=1e-15, rtol=0)
            before = snapshot(params)
        results.append(params)
    assert_same(results[0], results[1])
    assert_same(results[0], results[2])


def test_sign_sgd():
    params = parameters(SHAPES)
    expected = snapshot(params)
    steps = gradients(SHAPES, 5)
    run(Lion(params, lr=0.01, betas=(0.0, 0.0)), params, steps)
    for grads in steps:
        expected = [p - 0.01 * g.sign() for p, g in zip(expected, grads, strict=True)]
    assert_same(params, expected, atol=1e-15)


@pytest.mark.parametrize("beta", [0.0, 0.9])
def test_half_square_is_heavy_ball_with_decay(beta):
    params = parameters(SHAPES)
    expected, averages = snapshot(params), [torch.zeros(s, dtype=torch.float64) for s in SHAPES]
    steps = gradients(SHAPES, 6)
    run(LionK(params, "half_square", lr=0.1, betas=(beta, beta), weight_decay=0.2), params, steps)
    for grads in steps:
        averages = [beta * m + (1 - beta) * g for m, g in zip(averages, grads, strict=True)]
        expected = [0.98 * p - 0.1 * m for p, m in zip(expected, averages, strict=True)]
    assert_same(params, expected, atol=CLOSE)


def test_the_buffer_comes_from_the_old_one_with_b2():
    p = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))
    optimizer = LionK([p], "half_square", lr=1.0, betas=(0.5, 0.75))
    run(optimizer, [p], [[torch.tensor([4.0])]])
    assert p.item() == -2.0
    assert optimizer.state[p]["exp_avg"].item() == 1.0  # 3.0 if it were made of the interpolation
    run(optimizer, [p], [[torch.tensor([0.0])]])
    assert p.item() == -2.5
    assert optimizer.state[p]["exp_avg"].item() == 0.75


def test_decay_is_decoupled_and_the_sign_of_zero_is_zero(backend):
    params = parameters(SHAPES)
    before = snapshot(params)
    run(Lion(params, lr=0.1, weight_decay=0.5, **backend), params, [[torch.zeros(s) for s in SHAPES]])
    assert_same(params, [0.95 * p for p in before], atol=1e-15)


@pytest.mark.parametrize("k", EVERY.values(), ids=ids)
def test_zero_has_direction_zero(k):
    u = torch.zeros(3, 4, dtype=torch.float64)
    assert torch.equal(k.grad(u), u)
    assert float(k.value(u)) == pytest.approx(
        12 * 0.3 if k == Relativistic(0.3) else 12 * math.log(2) / 3 if k == Entropic(3.0) else 0
    )


@pytest.mark.parametrize("k", EVERY.values(), ids=ids)
def test_nan_reaches_the_parameter(k):
    u = normal((3, 4), 0)
    u[1, 2] = math.nan
    result = k.grad(u)
    assert result[1, 2].isnan()
    if k.elementwise or k == TopK(4):
        assert int(result.isnan().sum()) == 1
    p = torch.nn.Parameter(torch.ones(3, 4, dtype=torch.float64))
    run(LionK([p], k, lr=0.1), [p], [[u]])
    assert p[1, 2].isnan()


def test_cautious():
    k = L1()
    p = torch.nn.Parameter(torch.zeros(4, dtype=torch.float64))
    optimizer = Lion([p], lr=1.0, betas=(0.9, 0.9), cautious=True)
    run(optimizer, [p], [[torch.tensor([1.0, 1.0, 1.0, 1.0])]])
    assert p.tolist() == [-1.0] * 4
    # The momentum outweighs the new gradient of the first; the others agree: 3 of 4 move, 4/3 as far.
    run(optimizer, [p], [[torch.tensor([-0.1, 1.0, 1.0, 1.0])]])
    assert p.tolist() == pytest.approx([-1.0, *[-1 - 4 / 3] * 3], abs=1e-12)
    none = torch.nn.Parameter(torch.zeros(4, dtype=torch.float64))
    run(Lion([none], lr=1.0, cautious=True), [none], [[torch.zeros(4)]])
    assert none.tolist() == [0] * 4
    assert k.elementwise


def test_cautious_maximizes_too():
    results = []
    for sign in (1.0, -1.0):
        params = parameters(SHAPES)
        run(Lion(params, lr=0.1, cautious=True, maximize=sign < 0), params, gradients(SHAPES, 5, scale=sign))
        results.append(params)
    assert_same(*results)


# Each K.


def points(k, count=20, scale=1.0):
    return [scale * normal((3, 4), 100 + i) for i in range(count)]


def inside(k, seed):
    """A point of the domain of K*: D of some point is one; a convex combination with zero is further in."""
    return 0.9 * k.grad(normal((3, 4), seed))


@pytest.mark.parametrize("k", EXACT, ids=ids)
def test_fenchel_young(k):
    for i, u in enumerate(points(k)):
        y = inside(k, i)
        conjugate = float(k.conjugate(y))
        assert math.isfinite(conjugate)
        assert float(k.value(u)) + conjugate >= float((u * y).sum()) - 1e-12
        touching = k.grad(u)
        assert float(k.value(u) + k.conjugate(touching)) == pytest.approx(float((u * touching).sum()), abs=1e-9)


@pytest.mark.parametrize("k", EXACT, ids=ids)
def test_subgradient_inequality(k):
    for u, other in zip(points(k), points(k, scale=3.0)[::-1], strict=True):
        assert float(k.value(other)) >= float(k.value(u) + (k.grad(u) * (other - u)).sum()) - 1e-12


@pytest.mark.parametrize("k", SMOOTH, ids=ids)
def test_grad_is_the_gradient(k):
    for u in points(k, 5):
        u.requires_grad_(True)
        (expected,) = torch.autograd.grad(k.value(u), u)
        assert_same([k.grad(u.detach())], [expected], atol=1e-8)


@pytest.mark.parametrize("k", [Huber(0.2), Entropic(3.0), Relativistic(0.3), HalfSquare()], ids=ids)
def test_grad_inverts_conjugate_grad(k):
    for i in range(10):
        y = 0.95 * torch.tanh(normal((3, 4), i))
        assert_same([k.grad(k.conjugate_grad(y))], [y], atol=1e-9)
        y.requires_grad_(True)
        (expected,) = torch.autograd.grad(k.conjugate(y), y)
        assert_same([k.conjugate_grad(y.detach())], [expected], atol=1e-8)


@pytest.mark.parametrize("k", EXACT, ids=ids)
def test_conjugate_grad_is_a_subgradient(k):
    for i in range(10):
        y, other = inside(k, i), inside(k, 50 + i)
        slope = k.conjugate_grad(y)
        assert float(k.conjugate(other)) >= float(k.conjugate(y) + (slope * (other - y)).sum()) - 1e-9


OUTSIDE = {
    "box": ([k for k in EXACT if isinstance(k, kappa._Box)], torch.tensor([[3.0, -0.5], [0.0, -2.0]]), math.sqrt(5)),
    "l2": ([L2()], torch.tensor([[3.0, 0.0], [0.0, 4.0]]), 4.0),
    "l3": ([Lp(1.5)], torch.tensor([[2.0, 2.0], [2.0, 2.0]]), 2 * 4 ** (1 / 3) - 1),
    "rows": ([Group(0)], torch.tensor([[3.0, 4.0], [0.6, 0.0]]), 4.0),
    "columns": ([Group(1)], torch.tensor([[3.0, 0.6], [4.0, 0.0]]), 4.0),
    "spectral": ([Nuclear("svd")], torch.tensor([[3.0, 0.0], [0.0, -2.0]]), math.sqrt(5)),
    "topk-box": ([TopK(2)], torch.tensor([[2.5, 0.0], [0.0, 0.0]]), 1.5),
    "topk-sum": ([TopK(2)], torch.tensor([[1.0, 1.0], [1.0, 1.0]]), 1.0),
}


@pytest.mark.parametrize("name", sorted(OUTSIDE))
def test_outside_the_domain(name):
    for k in OUTSIDE[name][0]:
        y, distance = OUTSIDE[name][1].double(), OUTSIDE[name][2]
        assert float(k.distance(y)) == pytest.approx(distance, abs=1e-12)
        assert float(k.conjugate(y)) == math.inf
        assert float(k.distance(0.05 * y)) == 0
        assert math.isfinite(float(k.conjugate(0.05 * y)))
    assert float(HalfSquare().distance(torch.full((2,), 99.0))) == 0


@pytest.mark.parametrize("k", [Entropic(3.0), Relativistic(0.3)], ids=ids)
def test_the_boundary_is_finite(k):
    y = torch.tensor([1.0, -1.0], dtype=torch.float64)
    assert torch.isfinite(k.conjugate(y))
    assert torch.isfinite(k.conjugate_grad(y)).all()


def test_limits_are_sign():
    u = normal((3, 4), 0)
    u = u.sign() * (u.abs() + 0.1)
    for k in (Huber(1e-6), Entropic(1e4), Relativistic(1e-9), DeadZone(0.0), TopK(12), TopK(99), Lp(1 + 1e-9)):
        assert_same([k.grad(u)], [u.sign()], atol=1e-6)
    assert_same([Lp(2.0).grad(u)], [L2().grad(u)], atol=1e-15)
    assert float(Lp(2.0).value(u)) == pytest.approx(float(L2().value(u)), rel=1e-14)


def test_top_k_keeps_exactly_k_on_ties():
    for u in (torch.ones(6), -torch.ones(2, 3), torch.tensor([2.0, 1, 1, 1, 1, -2.0])):
        for k in (1, 2, 3, 5):
            result = TopK(k).grad(u)
            assert int(result.abs().sum()) == k
            assert torch.equal(result.abs().unique(), torch.tensor([0.0, 1.0]))
            assert float((result * u).sum()) == float(TopK(k).value(u))


def test_large_and_small_numbers():
    for scale in (1e-17, 1e17):  # whose cubes are out of float32's range, whose squares are not
        u = (scale * normal((3, 4), 0)).float()
        assert_same([Lp(3.0).grad(u)], [Lp(3.0).grad(u / scale)], atol=1e-5)
        assert_same([Nuclear("svd").grad(u)], [Nuclear("svd").grad(u / scale)], atol=1e-5)


def test_empty_tensors():
    u = torch.zeros(0, 3)
    for k in (L1(), L2(), Huber(1.0), Group(0), HalfSquare(), TopK(2)):
        assert k.grad(u).shape == (0, 3)
        assert float(k.value(u)) == 0
        assert float(k.distance(u)) == 0


# Spectral.


@pytest.mark.parametrize("shape", [(4, 6), (6, 4), (5, 5), (3, 2, 2, 2)])
@pytest.mark.parametrize("scale", [1e-20, 1.0, 1e20])
def test_singular_values(shape, scale):
    u = scale * normal(shape, 3)
    exact = torch.linalg.svdvals(Nuclear("svd").grad(u).flatten(1))
    assert_same([exact], [torch.ones_like(exact)], atol=1e-12)
    near = torch.linalg.svdvals(Nuclear("ns5").grad(u).flatten(1))
    assert float(near.min()) > 0.5  # 0.7 to 1.2 holds from a condition that random matrices need not have
    assert float(near.max()) < 1.22
    assert Nuclear("ns5").grad(u).shape == shape


def test_newton_schulz_on_well_conditioned_matrices():
    left, right = (torch.linalg.qr(normal((8, 8), i)).Q for i in range(2))
    for low in (1.0, 0.3, 0.1):
        u = left @ torch.diag(torch.linspace(low, 1, 8, dtype=torch.float64)) @ right
        values = torch.linalg.svdvals(Nuclear("ns5").grad(u))
        assert float(values.min()) >= 0.67
        assert float(values.max()) <= 1.21


@pytest.mark.parametrize("method", ["svd", "ns5"])
def test_special_matrices(method):
    tolerance = 1e-12 if method == "svd" else 0.35
    row = normal((1, 7), 0)
    assert_same([Nuclear(method).grad(row)], [L2().grad(row)], atol=tolerance)
    diagonal = torch.diag(torch.tensor([2.0, -1.0, 0.5], dtype=torch.float64))
    assert_same([Nuclear(method).grad(diagonal)], [diagonal.sign()], atol=tolerance)
    low_rank = torch.outer(normal((5,), 1), normal((4,), 2))
    exact = low_rank / low_rank.norm()
    assert_same([Nuclear(method).grad(low_rank)], [exact], atol=tolerance)


def test_nuclear_fallback():
    params = [torch.nn.Parameter(torch.ones(3, 2)), torch.nn.Parameter(torch.ones(3))]
    with pytest.raises(ValueError, match=r"at least two dimensions, got shape \(3,\).*fallback='l1'"):
        LionK(params, "nuclear")
    optimizer = LionK(params, Nuclear("svd", fallback="l1"), lr=0.5)
    run(optimizer, params, [[torch.ones(3, 2), torch.tensor([4.0, 0.0, -1.0])]])
    assert params[1].tolist() == [0.5, 1.0, 1.5]
    convolution = torch.nn.Parameter(torch.zeros(4, 3, 2, 2, dtype=torch.float64))
    g = normal((4, 3, 2, 2), 0)
    run(LionK([convolution], Nuclear("svd"), lr=1.0, betas=(0.0, 0.0)), [convolution], [[g]])
    assert_same([-convolution.reshape(4, 12)], [Nuclear("svd").grad(g.reshape(4, 12))], atol=1e-12)


# The constraint.


@pytest.mark.parametrize(
    "k", [L1(), L2(), Group(0), DeadZone(0.05), Huber(0.1), Entropic(5.0), Nuclear("svd"), TopK(3), Lp(3.0)], ids=ids
)
def test_the_distance_contracts_and_the_inside_is_never_left(k):
    lr, wd = 0.05, 2.0
    p = torch.nn.Parameter(5 * normal((3, 4), 0))
    optimizer = LionK([p], k, lr=lr, weight_decay=wd)
    last = float(k.distance(wd * p.detach()))
    assert last > 1
    for (g,) in gradients([(3, 4)], 200):
        run(optimizer, [p], [[g]])
        distance = float(k.distance(wd * p.detach()))
        assert distance <= (1 - lr * wd) * last + 1e-12
        last = distance
    assert last < 1e-8


def quadratic(seed, n=6, condition=20.0):
    """f and its gradient, with the Lipschitz constant; some coordinates of the minimum are outside of the box."""
    basis = torch.linalg.qr(normal((n, n), seed)).Q
    a = basis @ torch.diag(torch.linspace(1 / condition, 1, n, dtype=torch.float64)) @ basis.T
    b = 2 * normal((n,), seed + 1)
    return lambda x: 0.5 * x @ a @ x - b @ x, lambda x: a @ x - b, 1.0


@pytest.mark.parametrize(
    "k", [L1(), L2(), DeadZone(0.05), Huber(0.1), Entropic(5.0), Relativistic(0.2), Lp(3.0), HalfSquare()], ids=ids
)
@pytest.mark.parametrize("betas", [(0.9, 0.99), (0.5, 0.5), (0.0, 0.9)])
def test_the_discrete_inequality(k, betas):
    """H+ - H <= -e (1 + k L) delta1 - k (1 - b2) / (b2 - b1) delta2 + Lip / 2 e^2 ||V||^2."""
    lr, wd, (b1, b2) = 0.01, 1.5, betas
    f, gradient, lipschitz = quadratic(0)
    p = torch.nn.Parameter(0.1 * normal((6,), 7))
    optimizer = LionK([p], k, lr=lr, betas=betas, weight_decay=wd)
    e = lr / (1 - lr * wd)
    weight = e * b1 / (e * wd * (1 - b1) + (1 - b2))
    falls = 0
    for _ in range(300):
        x = p.detach().clone()
        p.grad = gradient(x)
        before = lyapunov(optimizer, f(x))
        assert before.gap >= -1e-12
        assert before.feasibility == 0
        assert before.delta1 >= -1e-9
        assert before.delta2 >= -1e-12
        assert math.isclose(before.H, before.energy + weight * before.gap, abs_tol=1e-12)
        assert before.energy == pytest.approx(float(f(x) + k.conjugate(wd * x) / wd), abs=1e-12)
        optimizer.step()
        after = lyapunov(optimizer, f(p.detach()))
        moved = (p.detach() - x) / e  # V, by the implicit form
        slack = lipschitz / 2 * e**2 * float(moved @ moved)
        # conjugate_grad(wd x) at the old point bounds the one at the new point's through convexity of K* only at the new one:
        ahead = (
            -(b1 * (optimizer.state[p]["exp_avg"] - (1 - b2) * p.grad) / b2 + (1 - b1) * p.grad) if b2 > 0 else -p.grad
        )
        new = float(moved @ (ahead - k.conjugate_grad(wd * p.detach())))
        second = weight * (1 - b2) / (b2 - b1) * before.delta2 if b2 > b1 else 0.0
        limit = -e * (1 + weight * wd) * new - second + slack
        rise = after.H - before.H
        assert rise <= limit + 1e-10 * (1 + abs(before.energy))
        falls += after.H < before.H
    assert falls > 150 or after.delta1 < 1e-3


def test_the_energy_ends_at_the_constrained_minimum():
    f, gradient, _ = quadratic(3)
    wd = 0.8
    x = torch.zeros(6, dtype=torch.float64)
    for _ in range(20_000):  # projected gradient
        x = (x - gradient(x)).clamp(-1 / wd, 1 / wd)
    assert 0 < int((x.abs() > 1 / wd - 1e-9).sum()) < 6
    p = torch.nn.Parameter(torch.zeros(6, dtype=torch.float64))
    optimizer = Lion([p], lr=0.01, weight_decay=wd)
    for t in range(4000):
        optimizer.param_groups[0]["lr"] = 0.05 / (1 + t / 100)
        p.grad = gradient(p.detach())
        optimizer.step()
    assert float(f(p.detach()) - f(x)) < 1e-3
    assert float(p.detach().abs().max()) <= bound(optimizer) + 1e-12


@pytest.mark.parametrize("k", [Huber(0.5), Entropic(2.0), Relativistic(0.5)], ids=ids)
def test_the_continuous_identity(k):
    """x' = D(u + e u') - L x, u' = -a grad f - g u: dH/dt is what the paper says, by central differences."""
    a, g, e, wd = 1.3, 0.7, 0.6, 0.9
    f, gradient, _ = quadratic(5)

    def field(x, u):
        du = -a * gradient(x) - g * u
        return k.grad(u + e * du) - wd * x, du

    def energy(x, u):
        conjugate = k.conjugate(wd * x)
        gap = conjugate + k.value(u) - wd * (u * x).sum()
        return a * f(x) + g / wd * conjugate + (1 - e * g) / (1 + e * wd) * gap

    for seed in range(5):
        x, u = 0.3 * torch.tanh(normal((6,), seed)), normal((6,), seed + 20)
        dx, du = field(x, u)
        h = 1e-5
        slope = float(energy(x + h * dx, u + h * du) - energy(x - h * dx, u - h * du)) / (2 * h)
        ahead = u + e * du
        first = float((dx * (ahead - k.conjugate_grad(wd * x))).sum())
        second = float(((ahead - u) * (k.grad(ahead) - k.grad(u))).sum())
        expected = -(wd + g) / (1 + e * wd) * first - (1 - e * g) / (e * (1 + e * wd)) * second
        assert slope == pytest.approx(expected, abs=1e-7)
        assert first >= 0
        assert second >= 0


def test_lyapunov_edges():
    p = torch.nn.Parameter(torch.tensor([0.1, 3.0]))
    optimizer = Lion([p], lr=0.01, weight_decay=1.0)
    fresh = lyapunov(optimizer, 1.0)
    assert math.isnan(fresh.delta1)
    assert math.isinf(fresh.H)  # 3.0 is outside
    assert fresh.feasibility == pytest.approx(2.0)
    with torch.no_grad():
        p[1] = 0.5
    assert lyapunov(optimizer, torch.tensor(2.0)).energy == 2.0
    assert bound(optimizer) == 1.0
    before = p.detach().clone()
    p.grad = torch.ones(2)
    lyapunov(optimizer, 0.0)
    assert torch.equal(p, before)
    assert not optimizer.state, "measuring makes no state"


def test_lyapunov_bad_input():
    params = parameters([(2,), (2,)])
    with pytest.raises(ValueError, match="weight_decay is 0"):
        lyapunov(Lion(params), 0.0)
    with pytest.raises(ValueError, match="weight_decay is 0"):
        bound(Lion(params))
    groups = [{"params": params[:1]}, {"params": params[1:], "weight_decay": 0.5}]
    with pytest.raises(ValueError, match="must share lr, betas and weight_decay"):
        lyapunov(Lion(groups, weight_decay=1.0), 0.0)
    with pytest.raises(ValueError, match="constraints per tensor"):
        lyapunov(LionK(params, L2("all"), weight_decay=1.0), 0.0)


# Other people's checkpoints.


def test_checkpoints_of_lion_pytorch_load():
    params = parameters(SHAPES)
    steps = gradients(SHAPES, 6)
    optimizer = run(Lion(params, lr=0.01, weight_decay=0.3), params, steps[:3])
    theirs = {
        "state": {i: {"exp_avg": optimizer.state[p]["exp_avg"].clone()} for i, p in enumerate(params)},
        "param_groups": [{"lr": 0.01, "betas": (0.9, 0.99), "weight_decay": 0.3, "params": [0, 1, 2]}],
    }
    twins = [torch.nn.Parameter(p.detach().clone()) for p in params]
    twin = Lion(twins, lr=5.0)
    twin.load_state_dict(copy.deepcopy(theirs))
    run(optimizer, params, steps[3:])
    run(twin, twins, steps[3:])
    assert_same(twins, params)


@pytest.mark.parametrize("k", EVERY.values(), ids=ids)
def test_checkpoints_are_plain_values(k, tmp_path):
    """torch.load takes nothing else by default, and distributed checkpoints refuse objects."""
    params = parameters(SHAPES)
    steps = gradients(SHAPES, 4)
    optimizer = run(LionK(params, k, lr=0.01, state_dtype=torch.float32), params, steps[:2])
    torch.save(optimizer.state_dict(), tmp_path / "lion.pt")
    twins = [torch.nn.Parameter(p.detach().clone()) for p in params]
    twin = LionK(twins, "half_square", lr=1.0)
    twin.load_state_dict(torch.load(tmp_path / "lion.pt"))
    assert twin.param_groups[0]["kappa"] == optimizer.param_groups[0]["kappa"] == k
    assert twin.param_groups[0]["state_dtype"] == torch.float32
    run(optimizer, params, steps[2:])
    run(twin, twins, steps[2:])
    assert_same(twins, params)


@pytest.mark.parametrize("rounding", ["kahan", "stochastic"])
def test_checkpoints_of_lion_pytorch_load_where_we_keep_more(rounding):
    params = parameters([(5,)], torch.bfloat16)
    theirs = {
        "state": {0: {"exp_avg": torch.ones(5, dtype=torch.bfloat16)}},
        "param_groups": [{"lr": 0.5, "betas": (0.9, 0.99), "weight_decay": 0.0, "params": [0]}],
    }
    optimizer = Lion(params, lr=5.0, rounding=rounding)
    optimizer.load_state_dict(theirs)
    before = snapshot(params)
    run(optimizer, params, [[torch.zeros(5)]])
    assert_same(params, [before[0] - 0.5], atol=2**-6)


# Bad input.


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        (dict(lr=-1.0), ValueError, "lr must be >= 0, got -1.0"), (dict(lr="1"), TypeError, "lr must be a number"),
        (dict(lr=float("nan")), ValueError, "lr must be finite"),
        (dict(weight_decay=-0.1), ValueError, "weight_decay must be >= 0"),
        (dict(weight_decay=True), TypeError, "weight_decay must be a number"),
        (dict(betas=(0.9, 1.0)), ValueError, r"betas\[1\] must be in \[0, 1\), got 1.0"),
        (dict(betas=(0.9,)), ValueError, "needs two betas, got 1"),
        (dict(lr=0.5, weight_decay=2.0), ValueError, r"lr \* weight_decay must be < 1 .*overshoots the origin.*0.5 \* 2.0"),
        (dict(cautious="yes"), ValueError, "cautious must be one of"), (dict(cautious=1), ValueError, "cautious must be one of"),
    ],
)  # fmt: skip
def test_bad_hyperparameters(options, error, words):
    params = parameters([(2,), (2,)])
    with pytest.raises(error, match=words):
        Lion(params, **options)
    with pytest.raises(error, match=words):
        Lion([{"params": params, **options}])
    with pytest.raises(error, match=words):
        LionK(params, "l2", **options)


def test_bad_kappas():
    params = parameters([(2,)])
    with pytest.raises(ValueError, match=r"kappa must be one of .*got 'nuclaer'; did you mean 'nuclear'\?"):
        LionK(params, "nuclaer")
    for text in (
        "Huber(e=__import__('os'))",
        "__import__('os')",
        "os.getcwd()",
        "Hubber(e=1.0)",
        "Huber(e=-1.0)",
        "[f()]()",
    ):
        with pytest.raises(ValueError):
            LionK(params, text)
    for value in (L1, None, 3, torch.sign):
        with pytest.raises(TypeError, match="kappa must be a Kappa or one of"):
            LionK(params, value)
    with pytest.raises(TypeError):
        Lion(params, kappa="l2")
    for make, words in [
        (lambda: Lp(1.0), "p must be > 1"), (lambda: Lp(0.5), "p must be > 1"), (lambda: DeadZone(-1), "e must be >= 0"),
        (lambda: Huber(0), "e must be > 0"), (lambda: Entropic(-1), "a must be > 0"), (lambda: Relativistic(0), "e must be > 0"),
        (lambda: TopK(0), "k must be at least 1"), (lambda: L2("everything"), "scope must be one of"),
        (lambda: Nuclear("qr"), "method must be one of"), (lambda: Nuclear(fallback="l2"), "fallback must be one of"),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match=words):
            make()
    with pytest.raises(TypeError, match="k must be an integer"):
        TopK(1.5)
    with pytest.raises(ValueError, match=r"Group\(dim=2\) does not fit a tensor of shape \(2, 3\)"):
        Group(2).grad(torch.ones(2, 3))


def test_reversed_betas_are_noticed():
    with pytest.warns(UserWarning, match="b1 > b2 the Lyapunov guarantee is lost"):
        Lion(parameters([(2,)]), betas=(0.99, 0.9))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Lion(parameters([(2,)]), betas=(0.9, 0.9))
