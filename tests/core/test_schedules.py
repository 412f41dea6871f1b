"""Values at the ends and between them, outside the range, in LambdaLR, and through pickle."""

import math
import pickle

import pytest
import torch

from polyak.core.schedules import Constant, Cosine, Exponential, Linear, Warmup

ENDS = [(1.0, 0.0), (0.1, 0.7), (0.7, 0.1), (1e-8, 3e-3), (0.3, 0.3), (2.0, 1e-5)]
KINDS = [Linear, Cosine, Exponential]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("start", "end"), ENDS)
@pytest.mark.parametrize("steps", [1, 3, 10, 1000])
def test_ends_are_exact_and_hold(kind, start, end, steps):
    if kind is Exponential and min(start, end) == 0:
        pytest.skip("needs positive ends")
    schedule = kind(start, end, steps)
    # Both ends to rounding at the larger of the two.
    slack = 4e-16 * max(abs(start), abs(end))
    for step in (0, -1):
        assert schedule(step) == pytest.approx(start, abs=slack)
    for step in (steps, steps + 1, 10 * steps):
        assert schedule(step) == pytest.approx(end, abs=0 if kind is not Exponential else slack)
    values = [schedule(k) for k in range(steps + 1)]
    rising = sorted(values) if end >= start else sorted(values, reverse=True)
    assert values == pytest.approx(rising, abs=slack)
    assert min(values) >= min(start, end) - slack
    assert max(values) <= max(start, end) + slack


def test_values_between():
    assert Linear(1.0, 3.0, 4)(1) == 1.5
    assert Cosine(1.0, 0.0, 4)(2) == pytest.approx(0.5)
    assert Cosine(1.0, 0.0, 4)(1) == pytest.approx((1 + math.sqrt(0.5)) / 2)
    assert Exponential(1.0, 16.0, 4)(1) == pytest.approx(2.0)
    assert Linear(0.0, 1.0, 2)(0.5) == 0.25
    assert Constant(0.3)(10**9) == 0.3
    assert Constant()(0) == 1.0


def test_warmup():
    schedule = Warmup(Cosine(1.0, 0.0, 10), 4)
    assert [schedule(k) for k in range(5)] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert schedule(9) == pytest.approx(0.5)
    assert schedule(14) == schedule(99) == 0.0
    from_zero = Warmup(Constant(2.0), 4, start=0.0)
    assert [from_zero(k) for k in range(6)] == pytest.approx([0, 0.5, 1, 1.5, 2, 2])
    assert Warmup(Constant(2.0), 4, start=0.5)(0) == 1.0
    assert Warmup(Constant(2.0), 0)(0) == 2.0
    assert Warmup(Constant(2.0), 0, start=0.0)(0) == 2.0
    nested = Warmup(Warmup(Constant(), 2, start=0.0), 2)
    assert nested(2) == 0.0


@pytest.mark.parametrize("kind", KINDS)
def test_bad_input(kind):
    for steps in (0, -1):
        with pytest.raises(ValueError, match="steps must be at least 1"):
            kind(1.0, 0.5, steps)
    with pytest.raises(TypeError, match="steps must be an integer"):
        kind(1.0, 0.5, 2.0)
    with pytest.raises(ValueError, match="end must be finite"):
        kind(1.0, math.nan, 2)
    with pytest.raises(TypeError, match="start must be a number"):
        kind("1", 0.5, 2)


def test_more_bad_input():
    for start, end, name in ((0.0, 1.0, "start"), (1.0, -1.0, "end")):
        with pytest.raises(ValueError, match=f"{name} must be > 0"):
            Exponential(start, end, 2)
    with pytest.raises(ValueError, match="steps must be at least 0"):
        Warmup(Constant(), -1)
    with pytest.raises(ValueError, match=r"start must be in \[0, 1\]"):
        Warmup(Constant(), 2, start=1.5)


@pytest.mark.parametrize(
    "schedule", [Linear(1, 0.1, 5), Warmup(Cosine(1, 0, 7), 3), Exponential(1, 0.1, 5), Constant(0.5)]
)
def test_in_a_scheduler_and_through_pickle(schedule):
    copied = pickle.loads(pickle.dumps(schedule))
    assert copied == schedule
    assert hash(copied) == hash(schedule)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.5)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)
    for k in range(12):
        assert optimizer.param_groups[0]["lr"] == pytest.approx(0.5 * copied(k))
        optimizer.step()
        scheduler.step()
