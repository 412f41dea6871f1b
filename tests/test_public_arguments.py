"""Whatever is public refuses what its arguments cannot be: by TypeError or ValueError that names it, before anything changes.

What an argument may be is declared beside it (``polyak.core.checks.arguments``). Here each is spoilt, one at a time, with values
that have nothing to do with it; whether a value is a right one is said a second time, by :func:`right`, on its own account.
"""

import collections
import datetime
import enum
import fractions
import inspect
import math
import os
import pathlib
import re
import types
import warnings

import numpy as np
import pytest
import torch
from torch import nn

from polyak.core import checks

from .public_for_tests import COMMON, NEEDS, TOO_LONG, public

PUBLIC = public()


class Awkward:
    """Raises wherever it is looked at."""

    def __repr__(self):
        raise RuntimeError("no text")

    def __eq__(self, other):
        raise RuntimeError("no comparison")

    def __bool__(self):
        raise RuntimeError("no truth")

    __hash__ = object.__hash__


class Colour(enum.Enum):
    RED = 1


NAN = math.nan
SPOILT = [
    # numbers
    NAN, math.inf, -math.inf, 0, 1, 2, -1, -1e-9, 0.5, 1.5, 1e308, -0.0, 10**400, -(10**30), 2**63, 1j, True, False,
    np.float32("nan"), np.float64(-3.0), np.int64(-7), np.True_, fractions.Fraction(-1, 2),
    # texts
    "", " ", "x", "0.1", "nope", "EPS", "ad", "é" * 300, "\x00", "cuda:-1", "l1)", b"1", bytearray(b"1"), pathlib.Path("a" * 300),
    # containers
    [], (), {}, set(), [0.1], (0.1, 0.2), [None], [[1.0], ["a"]], [NAN, 0.9], (1.0, 0.9), (2, 0.9), ("a", "b"), [1j, 2j],
    [object()], {"a": 1}, {"lr": 1}, [{"lr": 1}], {0.5}, range(3), "abc", collections.deque([1]), [float], [[]], ([0.1], "x"),
    # tensors and arrays
    torch.tensor(NAN), torch.tensor([0.1, 0.2]), torch.tensor(False), torch.tensor(1j), torch.zeros(0), torch.zeros(2, 0),
    torch.zeros(1, 2, 3).long(), torch.ones(2, dtype=torch.complex64), np.zeros((2, 2)), np.array(["a"]), np.array(None),
    # other objects
    None, object(), Awkward(), float, int, torch.Tensor, nn.Linear, nn.Linear(2, 2), lambda: 1, print, math, ..., NotImplemented,
    torch.int8, torch.bool, np.float64, torch.device("cpu"), torch.Generator, Colour.RED, datetime.date(2020, 1, 1), Exception("x"),
    types.SimpleNamespace(), os.environ, iter([]), slice(1), property(), super,
]  # fmt: skip


def number(kind, value):
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, (int, float, np.number, fractions.Fraction)):
        return False
    if isinstance(value, complex) or (value != value and not kind.nan):
        return False
    if value != value:
        return True
    if abs(value) > 1.7e308 and not (kind.infinite and abs(value) == math.inf):
        return False
    low = value >= kind.low if kind.ends[0] == "[" else value > kind.low
    return bool(low and (value <= kind.high if kind.ends[1] == "]" else value < kind.high))


def listed(value):
    return isinstance(value, (list, tuple, range, collections.deque))


def is_path(value):
    text = str(value) if isinstance(value, pathlib.Path) else value
    return isinstance(text, str) and text.strip() != "" and "\0" not in text and len(text.encode()) < 256


def numbers(value):
    """Whether all that is in it are numbers, and finite."""
    if isinstance(value, (torch.Tensor, np.ndarray)):
        array = np.asarray(value.detach() if isinstance(value, torch.Tensor) else value)
        return array.dtype.kind in "iuf" and bool(np.isfinite(array).all())
    if listed(value):
        return all(map(numbers, value)) and len({np.shape(v) for v in value}) < 2
    return number(checks.real, value)


def is_whole(array):
    return bool(((array % 1 == 0) & (abs(array) < 2.0**63)).all())


def right(kind, value):
    """Whether a kind should take a value: of the vocabulary said anew, of a room's own kinds what they say of types."""
    match kind:
        case checks.Either():
            return any(right(one, value) for one in kind.kinds)
        case checks.Nothing():
            return value is None
        case checks.Number():
            return number(kind, value)
        case checks.Integer():
            whole = isinstance(value, (int, np.integer)) and not isinstance(value, bool)
            return whole and (kind.least is None or value >= kind.least) and -(2**63) <= value <= kind.most
        case checks.Choice():
            plain = bool(value) if isinstance(value, np.bool_) else value
            return any(
                plain is o or (type(plain) is type(o) and isinstance(o, (str, int)) and plain == o)
                for o in kind.options
            )
        case checks.Text():
            return isinstance(value, str) and (kind.empty or value != "")
        case checks.Path():
            return is_path(value)
        case checks.Function():
            return callable(value) and (kind.classes or not isinstance(value, type))
        case checks.Instance():
            return isinstance(value, kind.classes)
        case checks.Betas():
            return listed(value) and len(value) == kind.count and all(right(kind.each, v) for v in value)
        case checks.Each():
            sized = listed(value) and len(value) >= kind.least and kind.count in (None, len(value))
            return sized and all(right(kind.kind, v) for v in value)
        case checks.Several():
            if not isinstance(value, collections.abc.Iterable) or hasattr(value, "ndim"):
                return False
            members = () if isinstance(value, collections.abc.Iterator) else value
            return not isinstance(value, (str, bytes, bytearray, dict, os._Environ)) and all(
                right(kind.kind, v) for v in members
            )
        case checks.Map():
            return isinstance(value, collections.abc.Mapping) and (
                kind.kind is None or all(right(kind.kind, v) for v in value.values())
            )
        case checks.Operand():
            held = isinstance(value, torch.Tensor) or (kind.truths and isinstance(value, bool))
            return held or (number(kind.number, value) and (type(value) is not int or abs(value) < 2**63))
        case checks.Scalar():
            one = isinstance(value, torch.Tensor) and value.numel() == 1 and not value.is_complex()
            return one or number(checks.measured, value)
        case checks.Numbers():
            flat = numbers(value) and np.ndim(value) == 1 and len(value) >= kind.least
            return bool(flat) and all(number(kind.kind, float(v)) for v in value)
        case checks.Array():
            return numbers(value) and (not kind.whole or is_whole(np.asarray(value, dtype=float)))
        case checks.Tensor():
            if not isinstance(value, torch.Tensor) or (kind.floating and not value.is_floating_point()):
                return False
            if kind.inexact and not (value.is_floating_point() or value.is_complex()):
                return False
            return kind.ndim in (None, value.ndim) and value.ndim >= kind.least_ndim
        case checks.DType():
            return isinstance(value, torch.dtype) and (value.is_floating_point or not kind.floating)
        case checks.Device():
            return isinstance(value, torch.device) or (type(value) is int and 0 <= value < 128)
        case checks.Module():
            return isinstance(value, nn.Module)
        case checks.Optimizer():
            return isinstance(value, torch.optim.Optimizer)
        case checks.Generator():
            return isinstance(value, torch.Generator)
    return kind.like(value)


def parameters(made):
    return [p for p in inspect.signature(made).parameters.values() if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]


def example(name, made):
    """The least arguments of a right call."""
    given = NEEDS.get(name, dict)()
    needed = [p.name for p in parameters(made) if p.default is p.empty and p.name not in given]
    given |= {n: COMMON[n]() for n in needed if n in COMMON}
    if lacking := [n for n in needed if n not in given]:
        pytest.fail(
            f"{name}: say in NEEDS of tests/public_for_tests.py what a right call of it has for {', '.join(lacking)}"
        )
    return given


def snapshot(value):
    if isinstance(value, torch.Tensor):
        return value.detach().clone(), value.grad
    if isinstance(value, nn.Module):
        return {k: v.clone() for k, v in value.state_dict().items()}, value.training, len(value._forward_hooks)
    if isinstance(value, dict):
        return {k: snapshot(v) for k, v in value.items()}
    return [snapshot(v) for v in value] if isinstance(value, (list, tuple)) else id(value)


def same(a, b):
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a is b or a == b


def names(error, argument):
    if argument == "params" and "param" in str(error):
        return True  # torch.optim's own words
    return re.search(rf"(?<![a-z0-9_]){re.escape(argument)}(?![a-z0-9_])", str(error), re.IGNORECASE) is not None


def told(made, given, argument, wrong):
    """What is amiss with how a call with one argument changed ends; "" where it is right."""
    try:
        made(**given)
    except (ValueError, TypeError) as error:
        # Of a right value that does not go with the other arguments any of them may be named.
        about = [argument] if wrong else given
        return (
            "" if any(names(error, one) for one in about) else f"not named: {type(error).__name__}: {str(error)[:150]}"
        )
    except Exception as error:
        return f"{type(error).__name__}: {str(error)[:150]}"
    return "accepted" if wrong else ""


def kinds_of(name, made):
    declared = checks.declared(made)
    missing = [p.name for p in parameters(made) if p.name not in declared]
    assert not missing, (
        f"{name}: declare what {', '.join(missing)} may be, by @checks.arguments({missing[0]}=checks.positive, ...) above the "
        "function, its class or its __init__ (an optimizer of the engine: in `declared`); see CONTRIBUTING.md"
    )
    return {p.name: declared[p.name] for p in parameters(made)}


TRIED = collections.Counter()


@pytest.mark.parametrize("name", PUBLIC)
@pytest.mark.xdist_group("public arguments")
def test_what_an_argument_cannot_be_is_refused_by_name(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    made = PUBLIC[name]
    given, amiss = example(name, made), []
    before = snapshot(given)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for argument, kind in kinds_of(name, made).items():
            for value in SPOILT:
                wrong = not right(kind, value)
                if not wrong and (name in TOO_LONG or callable(value)):  # a function may do whatever it likes
                    continue
                TRIED["wrong" if wrong else "right"] += 1
                if said := told(made, {**given, argument: value}, argument, wrong):
                    amiss.append(f"{argument}={checks.shown(value)}: {said}")
                if not same(snapshot(given), before):
                    if wrong:
                        amiss.append(f"{argument}={checks.shown(value)}: changed what it was given")
                    given = example(name, made)
                    before = snapshot(given)
            for misspelt in (argument[:-1] + "_", argument + "s", "x" + argument):
                if misspelt not in inspect.signature(made).parameters and not takes_any(made):
                    TRIED["misspelt"] += 1
                    if said := told(made, {**given, misspelt: 1}, misspelt, True):
                        amiss.append(f"{misspelt}=1: {said}")
    TRIED["names"] += 1
    assert not amiss, f"{name}:\n" + "\n".join(amiss)


def takes_any(made):
    return any(p.kind is p.VAR_KEYWORD for p in inspect.signature(made).parameters.values())


@pytest.mark.xdist_group("public arguments")
def test_enough_was_tried():
    if TRIED["names"] < len(PUBLIC):
        pytest.skip("not all names were tried")
    assert TRIED["wrong"] + TRIED["misspelt"] >= 10_000
