"""The functions mean the same on numbers and on tensors of every type, NaN and the signs of zero included."""

import math

import pytest
import torch

from polyak.core import elementwise as ew

VALUES = [-2.5, -1.0, -0.0, 0.0, 1e-3, 0.7, 3.0, math.inf, -math.inf, math.nan]
UNARY = [ew.sqrt, ew.absolute, ew.sign, ew.exp, ew.tanh]


def same(a, b):
    return (math.isnan(a) and math.isnan(b)) or a == b


@pytest.mark.parametrize("function", UNARY)
@pytest.mark.parametrize("value", VALUES)
def test_unary_functions_agree_on_numbers_and_tensors(function, value):
    if function is ew.sqrt and value < 0:
        pytest.skip("Python's own sqrt refuses what a tensor makes NaN")
    on_tensor = float(function(torch.tensor(value, dtype=torch.float64)))
    on_number = function(value)
    assert same(on_tensor, on_number) or abs(on_tensor - on_number) <= 4e-16 * abs(on_number)


@pytest.mark.parametrize(("function", "exact"), [(ew.minimum, min), (ew.maximum, max)])
@pytest.mark.parametrize("x", VALUES)
@pytest.mark.parametrize("y", VALUES)
def test_extrema_agree_on_every_mixture_and_propagate_nan(function, exact, x, y):
    expected = math.nan if math.isnan(x) or math.isnan(y) else exact(x, y)
    a, b = torch.tensor([x], dtype=torch.float64), torch.tensor([y], dtype=torch.float64)
    for result in (function(x, y), function(a, y), function(x, b), function(a, b)):
        assert same(float(result), expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64])
def test_sign(dtype):
    x = torch.tensor([-3, 0, 2]).to(dtype)
    assert ew.sign(x).tolist() == [-1, 0, 1]
    assert ew.sign(x).dtype == dtype


def test_sign_keeps_nan():
    assert math.isnan(ew.sign(math.nan))
    result = ew.sign(torch.tensor([math.nan, -0.0, math.inf, -math.inf]))
    assert math.isnan(result[0])
    assert result[1:].tolist() == [0, 1, -1]


def test_axpy():
    x, y = torch.tensor([1.0, -2.0], dtype=torch.float64), torch.tensor([0.5, 0.25], dtype=torch.float64)
    expected = [3.5, -5.75]
    assert ew.axpy(3.0, x, y).tolist() == expected
    assert ew.axpy(torch.tensor(3.0), x, y).tolist() == expected
    assert ew.axpy(3.0, 2.0, 1.0) == 7.0
    assert ew.axpy(3.0, 2.0, y).tolist() == [6.5, 6.25]
    assert ew.axpy(3.0, x, 1.0).tolist() == [4.0, -5.0]
    assert y.tolist() == [0.5, 0.25], "operands are left alone"


def test_where():
    x = torch.tensor([1.0, -1.0], dtype=torch.float64)
    assert ew.where(x > 0, x, 0.0).tolist() == [1, 0]
    assert ew.where(x > 0, 0.0, x).tolist() == [0, -1]
    assert ew.where(True, x, 0.0) is x
    assert ew.where(False, x, 0.0) == 0.0
    assert ew.where(0.0, 1.0, 2.0) == 2.0
    assert ew.where(torch.tensor(True), x, 0.0).tolist() == [1, -1]
    assert ew.where(x > 0, x, 0.0).dtype == torch.float64


def test_gradients_flow():
    x = torch.tensor([0.3, 0.8], dtype=torch.float64, requires_grad=True)

    def function(x):
        y = ew.axpy(0.3, ew.tanh(x), ew.sqrt(x)) * ew.exp(-ew.absolute(x))
        return ew.where(x > 0.5, ew.minimum(y, 1.0), ew.maximum(y, x))

    assert torch.autograd.gradcheck(function, (x,))


def test_traced_values_take_part():
    class Traced:
        def elementwise(self, name, *args):
            return name, args

    t = Traced()
    x = torch.ones(2)
    for function, name, args in [
        (ew.axpy, "axpy", (2.0, x, t)), (ew.where, "where", (x, 0.0, t)), (ew.minimum, "min", (1.0, t)),
        (ew.maximum, "max", (t, 1.0)), (ew.sqrt, "sqrt", (t,)), (ew.absolute, "abs", (t,)), (ew.sign, "sign", (t,)),
        (ew.exp, "exp", (t,)), (ew.tanh, "tanh", (t,)),
    ]:  # fmt: skip
        assert function(*args) == (name, args)
