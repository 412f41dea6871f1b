"""The recurrences against their closed forms, and their forms for containers against the plain ones."""

import copy

import pytest
import torch

from polyak.core import momentum as mo

DOUBLE = torch.float64


def stream(n, seed=0, shape=(5,)):
    return list(torch.randn((n, *shape), generator=torch.Generator().manual_seed(seed), dtype=DOUBLE))


@pytest.mark.parametrize("beta", [0.0, 0.3, 0.9, 0.999])
@pytest.mark.parametrize(("name", "weight"), [("ema", None), ("heavy_ball", 1.0), ("heavy_ball", 0.25)])
def test_linear_recurrences_equal_their_sums(name, weight, beta):
    values, state = stream(30), torch.zeros(5, dtype=DOUBLE)
    for x in values:
        state = mo.ema(state, x, beta) if name == "ema" else mo.heavy_ball(state, x, beta, weight)
    scale = 1 - beta if name == "ema" else weight
    expected = sum(scale * beta ** (29 - k) * x for k, x in enumerate(values))
    torch.testing.assert_close(state, expected, atol=1e-13, rtol=0)


def test_on_numbers():
    assert mo.ema(2.0, 4.0, 0.75) == 2.5
    assert mo.heavy_ball(2.0, 4.0, 0.5) == 5.0
    assert mo.heavy_ball(2.0, 4.0, 0.5, 0.25) == 2.0
    assert mo.nesterov(2.0, 4.0, 0.5) == 5.0
    assert mo.nesterov_estimate(2.0, 4.0, 1.0, 0.5) == 1 + 4 + 1.5
    assert mo.bias_correction(0.9, 1) == pytest.approx(0.1)
    assert mo.bias_correction(0.0, 5) == 1.0


@pytest.mark.parametrize("beta", [0.5, 0.9, 0.99])
def test_bias_correction_makes_a_constant_its_own_average(beta):
    average = 0.0
    for step in range(1, 200):
        average = mo.ema(average, 7.0, beta)
        assert average / mo.bias_correction(beta, step) == pytest.approx(7.0, rel=1e-12)


def test_estimate_visits_nesterovs_points():
    """m' = b m' + g + b (g - g_prev), y - lr m', with g_{-1} = 0, is Nesterov's sequence seen at its look-ahead points."""
    a = torch.diag(torch.tensor([1.0, 10.0, 0.1], dtype=DOUBLE))
    a[0, 1] = a[1, 0] = 0.5
    target = torch.tensor([1.0, -2.0, 0.5], dtype=DOUBLE)
    lr, beta = 0.05, 0.9
    x, m = torch.zeros(3, dtype=DOUBLE), torch.zeros(3, dtype=DOUBLE)
    points = []
    for _ in range(50):
        y = x - lr * beta * m
        points.append(y)
        m = beta * m + (a @ y - target)
        x = x - lr * m
    y, m, previous = torch.zeros(3, dtype=DOUBLE), torch.zeros(3, dtype=DOUBLE), torch.zeros(3, dtype=DOUBLE)
    for expected in points:
        torch.testing.assert_close(y, expected, atol=1e-12, rtol=0)
        g = a @ y - target
        m = mo.nesterov_estimate(m, g, previous, beta)
        y, previous = y - lr * m, g
    assert float((y - torch.linalg.solve(a, target)).norm()) < float(torch.linalg.solve(a, target).norm())


def test_nesterov_look_ahead_equals_torch():
    p = torch.nn.Parameter(torch.ones(4, dtype=DOUBLE))
    optimizer = torch.optim.SGD([p], lr=0.1, momentum=0.9, nesterov=True)
    ours, velocity = p.detach().clone(), torch.zeros(4, dtype=DOUBLE)
    for g in stream(20, shape=(4,)):
        p.grad = g.clone()
        optimizer.step()
        velocity = mo.heavy_ball(velocity, g, 0.9)
        ours = ours - 0.1 * mo.nesterov(velocity, g, 0.9)
        torch.testing.assert_close(ours, p.detach(), atol=1e-13, rtol=0)


def container(seed, dtype=DOUBLE):
    a, b, c = stream(3, seed)
    return {"a": a.to(dtype), "deep": [b.to(dtype), (c.to(dtype).reshape(5, 1),)]}


def leaves(tree):
    return torch.utils._pytree.tree_leaves(tree)


PAIRS = [
    (mo.ema_tree, mo.ema_, mo.ema, (0.9,)),
    (mo.heavy_ball_tree, mo.heavy_ball_, mo.heavy_ball, (0.9,)),
    (mo.heavy_ball_tree, mo.heavy_ball_, mo.heavy_ball, (0.9, 0.25)),
]


@pytest.mark.parametrize(("functional", "in_place", "plain", "args"), PAIRS)
def test_containers(functional, in_place, plain, args):
    old, new = container(0), container(1)
    kept, kept_new = copy.deepcopy(old), copy.deepcopy(new)
    result = functional(old, new, *args)
    for a, b, r, o, n in zip(*map(leaves, (kept, kept_new, result, old, new)), strict=True):
        assert torch.equal(r, plain(a, b, *args))
        assert torch.equal(o, a), "the functional form leaves its arguments alone"
        assert torch.equal(n, b)
    addresses = [t.data_ptr() for t in leaves(old)]
    assert in_place(old, new, *args) is old
    assert [t.data_ptr() for t in leaves(old)] == addresses
    for o, r, n, b in zip(*map(leaves, (old, result, new, kept_new)), strict=True):
        torch.testing.assert_close(o, r, atol=1e-15, rtol=0)
        assert torch.equal(n, b)
    assert functional([], [], *args) == []
    assert in_place({}, {}, *args) == {}
    single = functional(kept["a"], kept_new["a"], *args)
    assert torch.equal(single, result["a"])


@pytest.mark.parametrize("function", [mo.ema_tree, mo.ema_, mo.heavy_ball_tree, mo.heavy_ball_])
def test_containers_that_do_not_match(function):
    x, y = torch.zeros(3), torch.zeros(4)
    before = x.clone()
    for a, b in [([x], [x, x]), ({"a": x}, {"b": x}), ({"a": x}, [x]), ([x], (x,))]:
        with pytest.raises(ValueError, match="differ in structure"):
            function(a, b, 0.9)
    with pytest.raises(ValueError, match=r"differ in shape: \[\(3,\), \(4,\)\]"):
        function([x, x], [x, y], 0.9)
    with pytest.raises(ValueError, match="differ in shape"):
        function([x], [torch.zeros(1)], 0.9)  # would broadcast
    with pytest.raises(TypeError, match="tensors only, got float"):
        function([x, 1.0], [x, 2.0], 0.9)
    assert torch.equal(x, before)


def test_order_of_keys_never_mixes_tensors_up():
    a = {"x": torch.zeros(2), "y": torch.ones(2)}
    b = {"y": torch.ones(2), "x": torch.zeros(2)}
    try:
        result = mo.ema_tree(a, b, 0.5)
    except ValueError:
        return
    assert torch.equal(result["x"], a["x"])
    assert torch.equal(result["y"], a["y"])


def test_in_place_forms_take_other_types_and_parameters():
    average = [torch.zeros(3, dtype=torch.float32), torch.tensor([5]), torch.zeros(2, dtype=torch.complex64)]
    value = [
        torch.nn.Parameter(torch.ones(3, dtype=DOUBLE)),
        torch.tensor([9]),
        torch.ones(2, dtype=torch.complex64) * 1j,
    ]
    mo.ema_(average, value, 0.75)
    assert average[0].tolist() == [0.25] * 3
    assert average[0].dtype == torch.float32
    assert not average[0].requires_grad
    assert average[1].tolist() == [9], "a counter is copied, not averaged"
    assert average[2].tolist() == [0.25j] * 2
    teacher = torch.nn.Parameter(torch.zeros(2))
    mo.ema_([teacher], [torch.ones(2)], 0.5)
    assert teacher.tolist() == [0.5, 0.5]


def test_functional_forms_are_differentiable():
    a, b = (torch.randn(3, dtype=DOUBLE, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(lambda a, b: mo.ema_tree([a], [b], 0.7)[0], (a, b))
    assert torch.autograd.gradcheck(lambda a, b: mo.heavy_ball_tree([a], [b], 0.7, 2.0)[0], (a, b))


@pytest.mark.parametrize("correct", [True, False])
def test_average(correct):
    values = stream(10)
    average = mo.Average(0.8, correct=correct)
    for step, x in enumerate(values, 1):
        assert average.update({"x": x}) is average
        expected = sum(0.2 * 0.8 ** (step - 1 - k) * v for k, v in enumerate(values[:step]))
        expected = expected / (1 - 0.8**step) if correct else expected
        torch.testing.assert_close(average.value["x"], expected, atol=1e-14, rtol=0)
        assert average.step == step
    kept = average.value["x"].clone()
    average.value["x"].zero_()
    assert torch.equal(average.value["x"], kept), "what is handed out is not the state"


def test_average_does_not_keep_the_first_value():
    x = torch.ones(2)
    average = mo.Average(0.5).update(x)
    x.zero_()
    assert average.value.tolist() == [1, 1]


def test_average_copies_counters():
    average = mo.Average(0.9).update({"w": torch.ones(1), "seen": torch.tensor(5)})
    assert average.value["seen"].item() == 5
    assert average.update({"w": torch.ones(1), "seen": torch.tensor(8)}).value["seen"].item() == 8
    assert average.value["w"].item() == pytest.approx(1.0)


def test_average_bad_input():
    with pytest.raises(RuntimeError, match="before the first update"):
        _ = mo.Average(0.9).value
    for beta in (1.0, -0.1, float("nan")):
        with pytest.raises(ValueError, match="beta"):
            mo.Average(beta)
    average = mo.Average(0.9).update([torch.ones(2)])
    with pytest.raises(ValueError, match="structure"):
        average.update([torch.ones(2), torch.ones(2)])
    assert average.step == 1
