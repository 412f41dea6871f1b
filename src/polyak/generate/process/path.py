"""The base of all paths from data to noise: their times, time grids, prior, and the label of a time that the network is given.

A :class:`ProbabilityPath` says nothing of how noise enters. Gaussian noising processes, with their alpha and sigma, are
:class:`polyak.generate.process.base.Process`; bridges between two laws, discrete states and the like subclass this directly.
"""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from polyak.core import checks

Time = TypeVar("Time", float, Tensor, float | Tensor)
Generators = torch.Generator | Sequence[torch.Generator]
GRIDS = ("logsnr", "time", "quadratic", "karras")
# What single precision may miss an end of the range by, relative to it and in all.
_RELATIVE, _ABSOLUTE = 1e-6, 1.2e-7


TIME = checks.Operand(checks.real)  # a number, or a time for each row


class Moment(float):
    """A time of a path: a number that knows its place among the times of a run, for which schedules are computed at once.

    Attributes:
        of: the :class:`Moments` it belongs to.
        index: its place there.
    """

    __slots__ = ("index", "of")
    of: Moments
    index: int

    def __reduce__(self) -> tuple[Any, ...]:
        return float, (float(self),)


class Moments(Sequence[Moment]):
    """Times of a path, and its schedules at all of them: each is computed once, when it is first asked for.

    Any method of the path that maps a tensor of times to a tensor can be read here by its name, as a list of numbers:
    ``moments.lam[i]`` is lam at ``moments[i]``.
    """

    @checks.arguments(
        path=checks.Like("a Process (an instance, not the class)", "t_min", "t_max"),
        times=checks.Numbers(0, words="a sequence of times"),
    )
    def __init__(self, path: ProbabilityPath, times: Sequence[float]) -> None:
        self.path = self._equal = path
        self.times: list[Moment] = []
        for i, t in enumerate(times):
            moment = Moment(t)
            moment.of, moment.index = self, i
            self.times.append(moment)

    def __len__(self) -> int:
        return len(self.times)

    def __getitem__(self, index: Any) -> Any:
        return self.times[index]

    def are_of(self, path: ProbabilityPath) -> bool:
        """Whether they are times of this path, or of an equal one."""
        if path is self.path or path is self._equal:
            return True
        if path != self.path:
            return False
        self._equal = path  # which need not be compared again
        return True

    def __getattr__(self, name: str) -> list[float]:
        if name.startswith("_"):
            raise AttributeError(name)
        schedule = getattr(self.path, name, None)
        if schedule is None:
            raise AttributeError(f"{self.path!r} has no {name}, which Gaussian processes have and this solver needs")
        with unwatched():
            values = schedule(torch.tensor(self.times, dtype=torch.float64, device="cpu")).tolist()
        self.__dict__[name] = values
        return values


def _alike(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return isinstance(a, Tensor) and isinstance(b, Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_alike(a[name], b[name]) for name in a)
    return bool(a == b)


def unwatched() -> AbstractContextManager[Any]:
    """Numbers are computed as they are, also where modes see every operation (FakeTensorMode, memory estimates)."""
    core: Any = torch._C
    return _disable_current_modes() if core._len_torch_dispatch_stack() else nullcontext()


@checks.arguments(device=checks.Instance(torch.device))
def wide(device: torch.device) -> torch.dtype:
    """The type that times are computed in on a device: float64 where every device of that kind has it."""
    return torch.float64 if device.type in ("cpu", "cuda") else torch.float32


@checks.arguments(t=TIME, x=checks.tensor)
def check_batch(t: float | Tensor, x: Tensor) -> float | Tensor:
    """t as a number, or a tensor of shape () or (B,) for x of shape (B, ...); ValueError otherwise."""
    return one_for_each_row(t, x)


def one_for_each_row(t: float | Tensor, x: Tensor) -> float | Tensor:
    """:func:`check_batch`, where both are known to be what they should be."""
    if isinstance(t, Tensor) and t.ndim and t.shape != x.shape[:1]:
        raise ValueError(f"t must be a number or have shape ({x.shape[0]},) like x's batch, got {tuple(t.shape)}")
    return t


@checks.arguments(coefficient=checks.operand, x=checks.tensor)
def expand(coefficient: float | Tensor, x: Tensor) -> float | Tensor:
    """A per-sample coefficient of shape (B,) made to multiply x of shape (B, ...), in x's dtype; numbers pass through."""
    if not isinstance(coefficient, Tensor):
        return coefficient
    coefficient = coefficient.to(device=x.device, dtype=x.dtype)
    return coefficient.reshape(coefficient.shape + (1,) * (x.ndim - 1)) if coefficient.ndim else coefficient


@checks.arguments(
    shape=checks.Each(checks.Integer(0)), generator=checks.generators | None, dtype=checks.dtype | None,
    device=checks.device | None,
)  # fmt: skip
def standard_normal(
    shape: Sequence[int],
    *,
    generator: Generators | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """N(0, I) of a shape, drawn on the generator's device; a list of generators draws one row each."""
    if isinstance(generator, Sequence):
        if len(generator) != shape[0]:
            raise ValueError(f"generator must be one, or one for each of the {shape[0]} rows, got {len(generator)}")
        rows = [standard_normal((1, *shape[1:]), generator=g, dtype=dtype, device=device) for g in generator]
        return torch.cat(rows) if rows else torch.empty(tuple(shape), dtype=dtype, device=device)
    shape = tuple(shape)
    source = device if generator is None else generator.device
    drawn = torch.randn(shape, generator=generator, dtype=dtype, device=source)
    return drawn if generator is None or device is None else drawn.to(device)


class ProbabilityPath:
    """A path of laws p_t, data at small t and noise at large t. A subclass gives ``t_min < t_max`` and :meth:`prior`.

    Attributes:
        t_min, t_max: the times between which the model may be evaluated.
        is_gaussian: whether the noise is Gaussian, so that there are a score and stochastic solvers.
        is_discrete: whether its states are integers, which solvers of differential equations cannot step.
    """

    is_gaussian: ClassVar[bool] = False
    is_discrete: ClassVar[bool] = False
    t_min: float
    t_max: float

    def __eq__(self, other: object) -> bool:
        """Whether it is the same path: of the same class, with the same attributes."""
        if type(other) is not type(self):
            return NotImplemented
        return _alike(vars(self), vars(other))

    def __hash__(self) -> int:
        return hash(type(self))

    def moments(self, times: Sequence[float]) -> Moments:
        """The given times, for all of which the schedules are computed together."""
        return Moments(self, times)

    def label(self, t: Time) -> Time:
        """What a network trained with this path is told in place of t: t itself unless the path says otherwise."""
        return t

    def t_of_label(self, label: Time) -> Time:
        """The inverse of :meth:`label`."""
        return label

    def prior(
        self,
        shape: Sequence[int],
        *,
        generator: Generators | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> Tensor:
        """Draw what sampling starts from, of the given shape."""
        raise NotImplementedError(f"{type(self).__name__} has no prior to draw from; hand sample() a start")

    def check_state(self, name: str, x: Tensor) -> None:
        """ValueError unless x can be a state of it: floating point, of shape (B, ...)."""
        if x.ndim == 0 or not x.is_floating_point():
            raise ValueError(
                f"{name} must be a floating-point tensor of shape (B, ...), got {x.dtype}, {tuple(x.shape)}"
            )

    def evaluable(self, t: float, kind: str = "flow") -> bool:
        """Whether an output of a dialect determines the field ``dx/dt`` at t."""
        return self.t_min <= t <= self.t_max

    def ends_clean(self, t: float) -> bool:
        """Whether t is below the range of times, and is clean data: a run may end there, and no model is asked."""
        return False

    def check_time(self, name: str, t: Any) -> float:
        """t, if it is in [t_min, t_max] or clean data; what single precision misses of an end is forgiven; else ValueError."""
        number = checks.real(name, t)
        if self.t_min <= number <= self.t_max or self.ends_clean(number):
            return number
        for end in (self.t_min, self.t_max):
            if abs(number - end) <= _RELATIVE * abs(end) + _ABSOLUTE * min(1.0, abs(self.t_max)):
                return float(end)
        raise ValueError(f"{name} must be in [{self.t_min:g}, {self.t_max:g}] for {self!r}, got {t!r}")

    def check_times(self, times: Any) -> list[float]:
        """A strictly decreasing sequence of at least two times as floats, each as :meth:`check_time` returns it."""
        values = (
            times.tolist() if isinstance(times, Tensor) else [t.item() if isinstance(t, Tensor) else t for t in times]
        )
        if len(values) < 2:
            raise ValueError(f"times must hold at least 2 times, got {values}")
        inside = all(type(t) is float for t in values) and self.t_max >= values[0] and values[-1] >= self.t_min
        if inside and all(map(operator.gt, values, values[1:])):
            return values
        values = [self.check_time(f"times[{i}]", t) for i, t in enumerate(values)]
        for i, (s, t) in enumerate(itertools.pairwise(values)):
            if t >= s:
                raise ValueError(f"times must decrease strictly, got times[{i}]={s!r}, times[{i + 1}]={t!r}")
        return values

    def grid(self, n: int, kind: str = "time", *, start: float | None = None, end: float | None = None) -> Tensor:
        """n steps: n + 1 strictly decreasing times from ``start`` (default t_max) to ``end`` (default t_min), float64.

        Args:
            n: number of steps, at least 1.
            kind: what is equally spaced: "time": t; "quadratic": sqrt(t); of Gaussian processes also "logsnr": lam, and
                "karras": sigma_hat^(1/7).
            start, end: other ends. ``end=0`` below t_min puts n points on [t_min, start], and then the clean data at 0.

        Raises:
            ValueError: unknown kind, n < 1, ends out of range, or lam infinite at an end where the kind needs it.
        """
        checks.integer("n", n, least=1)
        checks.one_of("kind", kind, GRIDS)
        first = self.check_time("start", self.t_max if start is None else start)
        last = self.check_time("end", self.t_min if end is None else end)
        if last >= first:
            raise ValueError(f"end must be below start={first!r}, got {last!r}")
        with unwatched(), torch.device("cpu"):
            return self._grid(n, kind, first, last)

    def _grid(self, n: int, kind: str, first: float, last: float) -> Tensor:
        if last < self.t_min:
            head = self._grid(n - 1, kind, first, self.t_min) if n > 1 else torch.tensor([first], dtype=torch.float64)
            return torch.cat([head, torch.tensor([last], dtype=torch.float64)])
        forward, back = self._scale(kind)
        ends = forward(torch.tensor([first, last], dtype=torch.float64))
        low, high = ends.tolist()
        if not (math.isfinite(low) and math.isfinite(high)):
            at = last if math.isfinite(low) else first
            raise ValueError(f"the {kind!r} grid of {self!r} cannot reach t={at:g}, where lam is infinite; use 'time'")
        # Not linspace: its halves round differently, and a grid of a sub-interval should repeat the whole one's points.
        times = back(torch.arange(n + 1, dtype=torch.float64).div_(n).mul_(high - low).add_(low))
        times[0], times[-1] = first, last
        return times

    def _scale(self, kind: str) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
        """The map from t to what a kind of grid spaces equally, and its inverse."""
        if kind == "time":
            return lambda t: t, lambda t: t
        if kind == "quadratic":
            return torch.sqrt, torch.square
        raise ValueError(f"the {kind!r} grid needs a Gaussian process, which {self!r} is not; use 'time'")


PATH = checks.Instance(ProbabilityPath, words="a Process (an instance, not the class)")
TIMES = checks.Numbers(2, words="a sequence of at least 2 times")
GRID = checks.Choice(*GRIDS)
