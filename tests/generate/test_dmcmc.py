"""Dmcmc against references that are independent of it."""

from __future__ import annotations

import pytest

# Each line of the checklist becomes a test that a wrong implementation fails: break the line that it guards, and see it fail.
CHECKS = (
    "the closed form, in float64",
    "a golden trajectory, computed from the equations by other code",
    "saved and loaded half-way equals the uninterrupted run",
    "bad input is refused by name, and changes nothing",
)


@pytest.mark.parametrize("check", CHECKS)
def test_it_is_written(check):
    pytest.fail(f"dmcmc: no test yet of this: {check}")
