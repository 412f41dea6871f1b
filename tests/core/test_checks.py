"""Every check returns what is allowed, and names the argument, the value and the allowed range where it is not."""

from fractions import Fraction

import numpy as np
import pytest
import torch

from polyak.core import checks


@pytest.mark.parametrize("value", [0, 0.0, -1.5, 3, np.float32(0.5), np.float64(2), np.int64(3), Fraction(1, 2)])
def test_real_takes_every_kind_of_number(value):
    assert checks.real("x", value) == float(value)
    assert type(checks.real("x", value)) is float


@pytest.mark.parametrize("check", [checks.real, checks.non_negative, checks.positive])
@pytest.mark.parametrize("value", [True, False, "1", None, 1j, [1.0], torch.tensor(1.0), np.True_])
def test_what_is_no_number_is_a_type_error(check, value):
    with pytest.raises(TypeError, match="momentum must be a number, got"):
        check("momentum", value)


@pytest.mark.parametrize("check", [checks.real, checks.non_negative, checks.positive])
@pytest.mark.parametrize(
    "value", [float("nan"), float("inf"), -float("inf"), np.float32("nan"), pytest.param(10**400, id="huge")]
)
def test_numbers_must_be_finite(check, value):
    with pytest.raises(ValueError, match="rate must be finite, got"):
        check("rate", value)


def test_signs():
    assert checks.non_negative("x", 0) == 0
    assert checks.positive("x", 1e-300) == 1e-300
    with pytest.raises(ValueError, match=r"^x must be >= 0, got -1e-09$"):
        checks.non_negative("x", -1e-9)
    for value in (0, -1.0):
        with pytest.raises(ValueError, match=rf"^x must be > 0, got {value}$"):
            checks.positive("x", value)


@pytest.mark.parametrize(
    ("ends", "inside", "outside"),
    [("[]", (0, 1), ()), ("[)", (0, 0.5), (1,)), ("(]", (1, 0.5), (0,)), ("()", (0.5,), (0, 1))],
)
def test_between(ends, inside, outside):
    for value in inside:
        assert checks.between("x", value, 0, 1, ends=ends) == value
    for value in (*outside, -0.1, 1.1):
        with pytest.raises(ValueError) as caught:
            checks.between("x", value, 0, 1, ends=ends)
        assert str(caught.value) == f"x must be in {ends[0]}0, 1{ends[1]}, got {value!r}"


def test_integer():
    assert checks.integer("n", np.int32(4), least=4, most=4) == 4
    assert type(checks.integer("n", np.int32(4))) is int
    for value in (True, 1.0, "1", None):
        with pytest.raises(TypeError, match="n must be an integer, got"):
            checks.integer("n", value)
    with pytest.raises(ValueError, match="n must be at least 1, got 0"):
        checks.integer("n", 0, least=1)
    with pytest.raises(ValueError, match="n must be at most 3, got 4"):
        checks.integer("n", 4, most=3)


def test_one_of():
    assert checks.one_of("method", "svd", ("svd", "ns5")) == "svd"
    assert checks.one_of("flag", None, (None, False, True)) is None
    with pytest.raises(ValueError) as caught:
        checks.one_of("method", "sdv", ("svd", "ns5"))
    assert str(caught.value) == "method must be one of 'svd', 'ns5', got 'sdv'; did you mean 'svd'?"
    with pytest.raises(ValueError) as caught:
        checks.one_of("method", 12, ("svd", "ns5"))
    assert "did you mean" not in str(caught.value)


@pytest.mark.parametrize("value", [0, 1, 0.0, 1.0])
def test_numbers_are_no_truth_values(value):
    with pytest.raises(ValueError, match="flag must be one of"):
        checks.one_of("flag", value, (False, True))


def test_betas():
    assert checks.betas([0, 0.5], 2, "Lion") == (0.0, 0.5)
    for value, count, message in [
        ((0.9, 0.99), 3, "Adan needs three betas, got 2"),
        ((0.9,) * 4, 2, "Adan needs two betas, got 4"),
        (0.9, 1, "Adan needs one beta, got 0.9"),
        ((1,) * 5, 4, "Adan needs 4 betas, got 5"),
    ]:
        with pytest.raises(ValueError) as caught:
            checks.betas(value, count, "Adan")
        assert str(caught.value) == message
    for value in ((0.9, 1.0), (0.9, -0.1), (0.9, float("nan"))):
        with pytest.raises(ValueError, match=r"betas\[1\]"):
            checks.betas(value, 2, "Lion")
    for value in ((0.9, "0.99"), (True, 0.9), "ab"):
        with pytest.raises(TypeError, match=r"betas\[\d\] must be a number"):
            checks.betas(value, 2, "Lion")


def test_suggestions():
    assert checks.suggestion("weigth_decay", ["weight_decay", "lr"]) == "; did you mean 'weight_decay'?"
    assert checks.suggestion("zzz", ["weight_decay", "lr"]) == ""
    assert checks.suggestion("cfg", ["config", "CFG", "Guidance"]) == "; did you mean 'CFG'?"
    assert checks.suggestion("LRR", ["lr", "weight_decay"]) == "; did you mean 'lr'?"
    assert checks.suggestion("ADamW", ["adamw", "AdamW"]) == "; did you mean 'AdamW'?"
    assert checks.suggestion("ADan", ["ADAM", "Adan", 3]) == "; did you mean 'Adan'?"


class Huge:
    def __repr__(self) -> str:
        return "x" * 10_000


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (torch.randn(3, 4), "Tensor of shape (3, 4), torch.float32"),
        (torch.nn.Parameter(torch.zeros(200, 100)), "Parameter of shape (200, 100), torch.float32"),
        (np.zeros((5, 2)), "ndarray of shape (5, 2), float64"),
        (torch.tensor(0.5), "tensor(0.5000)"),
        (torch.zeros(0), "Tensor of shape (0,), torch.float32"),
        ([torch.zeros(3)] * 9, "[" + ", ".join(["Tensor of shape (3,), torch.float32"] * 4) + ", and 5 more]"),
        ({"a": torch.zeros(2)}, "{'a': Tensor of shape (2,), torch.float32}"),
        ((0.9, 0.99), "(0.9, 0.99)"),
        ((0.9,), "(0.9,)"),
        ([], "[]"),
        ("adan", "'adan'"),
        (None, "None"),
        (Huge(), "an object of type Huge"),
        (torch.nn.Linear(2, 2), "an object of type Linear"),
    ],
)
def test_values_are_shown_without_contents_of_tensors(value, text):
    assert checks.shown(value) == text


def test_no_check_prints_or_compares_a_tensor():
    big = torch.randn(200, 100)
    for call in (
        lambda: checks.real("x", big), lambda: checks.positive("x", [big]), lambda: checks.integer("x", big),
        lambda: checks.between("x", big, 0, 1), lambda: checks.one_of("x", big, ["a", "b"]),
        lambda: checks.one_of("x", big, [None, False, True]), lambda: checks.betas(big, 2, "Adam"),
        lambda: checks.betas((big, big), 2, "Adam"),
    ):  # fmt: skip
        with pytest.raises((TypeError, ValueError)) as error:
            call()
        assert len(str(error.value)) < 200
        assert "Tensor of shape (200, 100)" in str(error.value)


@pytest.mark.parametrize("make", [torch.tensor, np.float32, lambda b: torch.tensor([[b]])])
def test_betas_of_one_element_are_read(make):
    assert checks.betas((make(0.5), make(0.25)), 2, "Adam") == (0.5, 0.25)
    with pytest.raises(ValueError, match=r"betas\[1\] must be in \[0, 1\), got 1.0"):
        checks.betas((make(0.5), make(1.0)), 2, "Adam")
