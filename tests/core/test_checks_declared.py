"""What is declared of arguments is checked where they enter, costs no more, and leaves the function what it was."""

import copy
import dataclasses
import inspect
import itertools
import pickle
from typing import NamedTuple

import numpy as np
import pytest
import torch

from polyak.core import checks


@checks.arguments(a=checks.positive, b=checks.Integer(1) | None, c=checks.flag)
def function(a, /, b=None, *rest, c=False, d=3, **more):
    """What it is."""
    return a, b, rest, c, d, more


@checks.arguments(x=checks.real, names=checks.Several(checks.text))
@dataclasses.dataclass(frozen=True)
class Data:
    x: float
    names: object = ()


@checks.arguments(x=checks.real)
class Pair(NamedTuple):
    x: float
    y: float = 0.0


class Made:
    @checks.arguments(x=checks.positive)
    def __init__(self, x: float) -> None:
        self.x = x


def test_a_function_stays_what_it_was():
    assert str(inspect.signature(function)) == "(a, /, b=None, *rest, c=False, d=3, **more)"
    assert (function.__name__, function.__doc__) == ("function", "What it is.")
    assert function(2, 1, "r", c=True, e=5) == (2.0, 1, ("r",), True, 3, {"e": 5})
    assert function(2) == (2.0, None, (), False, 3, {})
    assert list(checks.declared(function)) == ["a", "b", "c"]
    assert list(checks.declared(Data)) == ["x", "names"]
    assert list(checks.declared(Pair)) == list(checks.declared(Made)) == ["x"]
    assert checks.declared(print) == {}
    with pytest.raises(TypeError, match=r"function\(\) missing 1 required positional argument: 'a'"):
        function()


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: function(0), ValueError, "a must be > 0, got 0"),
        (lambda: function(1, "2"), TypeError, "b must be an integer >= 1 or None, got '2'"),
        (lambda: function(1, 0), ValueError, "b must be at least 1, got 0"),
        (lambda: function(1, c=1), ValueError, "c must be one of False, True, got 1"),
        (lambda: Data("x"), TypeError, "x must be a number, got 'x'"),
        (lambda: Data(1, ["a", 2]), TypeError, r"names\[1\] must be a string that is not empty, got 2"),
        (lambda: dataclasses.replace(Data(1), x=None), TypeError, "x must be a number, got None"),
        (lambda: Pair(x=True), TypeError, "x must be a number, got True"),
        (lambda: Made(-1), ValueError, "x must be > 0, got -1"),
    ],
)
def test_what_enters_is_looked_at(call, error, words):
    with pytest.raises(error, match=f"^{words}$"):
        call()


def test_classes_are_copied_and_pickled_without_being_made_again():
    for made in (Data(1), Pair(1), Made(1)):
        for other in (copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
            assert other.x == 1.0
            assert type(other) is type(made)
    assert Pair(np.float32(2))._replace(y=1.0) == (2.0, 1.0)


def test_only_what_there_is_can_be_declared():
    with pytest.raises(TypeError, match="length has no argument 'y' to declare"):

        @checks.arguments(y=checks.real)
        def length(x):
            return x


def test_a_default_is_right_whatever_it_is():
    nothing = object()

    @checks.arguments(x=checks.real)
    def given(x=nothing):
        return x

    assert given() is nothing
    assert given(nothing) is nothing


def test_arithmetic_that_cannot_be_done_names_its_operands():
    @checks.operands(x=checks.operand, y=checks.operand)
    def add(x, y):
        if x is y:
            raise KeyError("of its own")
        return x + y

    assert add(1, 2.5) == 3.5
    with pytest.raises(
        ValueError, match=r"^x=Tensor of shape \(2,\), torch.float32, y=Tensor of shape \(3,\), torch.float32: The size"
    ):
        add(torch.ones(2), torch.ones(3))
    with pytest.raises(KeyError, match="of its own"):
        add(torch.pi, torch.pi)
    with pytest.raises(TypeError, match="y must be a number, a tensor or a traced value, got 'a'"):
        add(1, "a")


def test_operands_keep_what_they_are():
    class Traced:
        def elementwise(self, *_):
            return self

    class Moment(float):
        __module__ = "polyak.somewhere"

    traced, moment, tensor = Traced(), Moment(0.5), torch.ones(2)
    for kind in (checks.operand, checks.Operand(checks.fraction)):
        for value in (traced, moment, tensor, 1):
            assert kind("x", value) is kind("x", value) is value  # also once the type is known
        assert type(kind("x", np.float64(0.5))) is float
    with pytest.raises(ValueError, match=r"beta must be in \[0, 1\], got 1.5"):
        checks.Operand(checks.fraction)("beta", Moment(1.5))
    with pytest.raises(ValueError, match="x must be a number that 64 bits hold"):
        checks.operand("x", 2**64)


@pytest.mark.parametrize(
    ("kind", "good", "bad"),
    [
        (checks.Number(0, infinite=True), [0, np.inf, 3], [-1, np.nan, "1", 10**400]),
        (checks.measured, [np.nan, -np.inf], [None, 1j]),
        (checks.Integer(0), [0, np.int32(3), 2**63 - 1], [2**63, -1, 1.0, True]),
        (checks.Choice(None, "a"), [None, "a", np.str_("a")], ["b", np.array(None), False]),
        (checks.optional_flag, [None, True, np.False_], [0, 1, "yes", np.array([True, False])]),
        (checks.path, ["a/b", __import__("pathlib").Path("c")], ["", "\0", "x" * 256, None, b"a", type("P", (), {})]),
        (checks.Function("f", 2), [lambda x, y: 0, print, lambda *a: 0, max], [lambda x: 0, int, 3, lambda x, *, y: 0]),
        (checks.Function("f", 1, classes=True), [dict, lambda x, y=1: 0], [lambda: 0, "f"]),
        (checks.Each(checks.positive, count=2), [(1, 2), [1.0, 3]], [(1,), "ab", (1, -1), {1, 2}, 5]),
        (checks.Several(checks.text), [["a"], ("b",), {"c": 1}.keys()], ["ab", [1], {"a": 1}, torch.zeros(2), 3]),
        (checks.Stream(), [[], iter([1]), range(2)], ["ab", {}, torch.zeros(2), None]),
        (checks.Map(checks.positive), [{}, {"a": 1}], [{"a": 0}, [], None]),
        (checks.Numbers(2), [[1, 2], torch.ones(3), np.ones(2)], [[1], "ab", torch.ones(2, 2), [1, "a"], [1, np.nan], 3]),
        (checks.array, [1, [[1.0], [2]], torch.ones(2), np.ones((2, 2))], [[[1], [1, 2]], "1", np.nan, torch.ones(1) == 1, None]),
        (checks.Array(whole=True), [[0, 1], torch.tensor([2.0])], [[0.5], [1e30]]),
        (checks.Tensor(floating=True, ndim=2), [torch.ones(1, 1)], [torch.ones(1), torch.ones(1, 1).long(), np.ones((1, 1))]),
        (checks.Tensor(inexact=True), [torch.ones(1), torch.ones(1) * 1j], [torch.ones(1).bool(), 1.0]),
        (checks.scalar, [1, np.nan, torch.ones(1, 1)], [torch.ones(2), "1", torch.ones(()) * 1j, True]),
        (checks.dtype, [torch.float16], [torch.int8, "float32", float]),
        (checks.device, ["cpu", torch.device("cpu")], ["nope", "", -1, True, None, 10**30]),
        (checks.generators, [torch.Generator(), [torch.Generator()]], [[0], 1, "ab"]),
        (checks.module, [torch.nn.Identity()], [torch.nn.Identity, print]),
        (checks.Like("it", "a"), [type("T", (), {"a": 1})()], [type("T", (), {"a": 1}), 3]),
        (checks.Betas(2, "Lion"), [(0.9, 0.99), [0, 0]], [(1.0, 0.9), (0.9,), "ab", 0.9]),
        (checks.flag | checks.Integer(0), [True, 3], ["x", -1, 1.5, None]),
    ],
    ids=itertools.count(),  # some values print an address, which workers do not share
)  # fmt: skip
def test_kinds(kind, good, bad):
    for value in good:
        kind("size", value)
    for value in bad:
        with pytest.raises((TypeError, ValueError), match=r"\bsize\b|Lion needs two betas"):
            kind("size", value)
