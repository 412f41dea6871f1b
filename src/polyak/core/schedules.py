"""Schedules: numbers that follow the step. Each is a small picklable object; call it with a step (0, 1, 2, ...).

They fit ``torch.optim.lr_scheduler.LambdaLR`` as they are (as factors of the base rate), and anything else that changes as
training goes: decay rates of teachers, temperatures, guidance.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from polyak.core import checks

Schedule = Callable[[float], float]


_ENDS = dict(start=checks.real, end=checks.real, steps=checks.Integer(1))


@checks.arguments(value=checks.real)
@dataclass(frozen=True)
class Constant:
    """The same value at every step."""

    value: float = 1.0

    def __call__(self, step: float) -> float:
        return self.value


@dataclass(frozen=True)
class _Between:
    start: float
    end: float
    steps: int

    def _progress(self, step: float) -> float:
        return min(max(step / self.steps, 0.0), 1.0)


@checks.arguments(**_ENDS)
@dataclass(frozen=True)
class Linear(_Between):
    """A straight line from ``start`` at step 0 to ``end`` at step ``steps``, and ``end`` after it."""

    def __call__(self, step: float) -> float:
        done = self._progress(step)
        return (1 - done) * self.start + done * self.end  # exact at both ends


@checks.arguments(**_ENDS)
@dataclass(frozen=True)
class Cosine(_Between):
    """Half a cosine from ``start`` at step 0 to ``end`` at step ``steps`` (Loshchilov and Hutter, 2017), ``end`` after it."""

    def __call__(self, step: float) -> float:
        return self.end + (self.start - self.end) * 0.5 * (1 + math.cos(math.pi * self._progress(step)))


@checks.arguments(start=checks.positive, end=checks.positive, steps=checks.Integer(1))
@dataclass(frozen=True)
class Exponential(_Between):
    """A constant factor per step from ``start`` at step 0 to ``end`` at step ``steps``; both must be > 0."""

    def __call__(self, step: float) -> float:
        return self.start * (self.end / self.start) ** self._progress(step)


@checks.arguments(
    after=checks.Function("a schedule, a function of the step", 1),
    steps=checks.Integer(0),
    start=checks.fraction | None,
)
@dataclass(frozen=True)
class Warmup:
    """Linear from ``start * after(0)`` up to ``after(0)`` over ``steps`` steps, then ``after``, counted from there.

    With ``start=None`` the first step already has ``1 / (steps + 1)`` of the full value, so that no step is wasted at zero.
    """

    after: Schedule
    steps: int
    start: float | None = None

    def __call__(self, step: float) -> float:
        if step >= self.steps:
            return self.after(step - self.steps)
        if self.start is None:
            return self.after(0) * (step + 1) / (self.steps + 1)
        return self.after(0) * (self.start + (1 - self.start) * step / self.steps)
