"""Solvers as coroutines: a solver asks for predictions where it wants them, and says when a step is done.

``solver.run(x, times, process)`` is a generator. It yields a :class:`Query`, and is sent the :class:`Prediction` there; it
yields a :class:`Step` when a step is complete, and is sent None, or a :class:`Change` if the batch was resampled. It returns
the final state. All that a solver remembers lives inside that generator, so that one implementation serves our own loop
(:func:`polyak.generate.sampling.sample`), a diffusers scheduler, and anything else that can answer questions.

A solver goes on from ``prediction.x`` at the first query of a step: whoever answers may have changed the state in between
(inpainting, a pipeline's callback). It changes no tensor that it is given, and its coefficients are Python floats computed in
double precision.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from polyak.core import checks
from polyak.generate.prediction import Prediction
from polyak.generate.process import Process, standard_normal


@dataclass(frozen=True)
class Query:
    """A solver wants the prediction at (x, t). ``first``: the first evaluation of a step."""

    x: Tensor
    t: float
    first: bool = True


@dataclass(frozen=True)
class Step:
    """A step from s to t is done.

    Attributes:
        x: the state at t.
        index, last: the step's number from 0, and whether it is the last.
        mean, std: of the Gaussian ``x ~ N(mean, std^2 I)`` that x was drawn from; None after a deterministic step.
        error: (B,), the estimated local error in units of the tolerance; adaptive solvers only.
    """

    x: Tensor
    s: float
    t: float
    index: int
    last: bool
    mean: Tensor | None = None
    std: float | None = None
    error: Tensor | None = None


@dataclass(frozen=True)
class Change:
    """The state is now ``x``; if the batch was resampled, its row i came from row ``ancestors[i]``."""

    x: Tensor
    ancestors: Tensor | None = None

    def take(self, value: Tensor) -> Tensor:
        """What a solver remembers of the old rows, for the new rows."""
        return value if self.ancestors is None else value.index_select(0, self.ancestors)


Run = Generator[Query | Step, Any, Tensor]


class Solver:
    """A way to step. A subclass declares its facts and defines :meth:`run`.

    Attributes:
        order: of accuracy, on the probability-flow ODE.
        stages: evaluations per step.
        stochastic: whether it draws noise.
        needs_gaussian: whether it is valid for Gaussian processes only.
        history: past predictions that it remembers (0 for one-step methods).
        grid: the kind of time grid it is used with unless told otherwise.
        no_corrector: why x0 correctors cannot be used with it; "" if they can.
        adaptive: whether it finds its times while it runs.
        reaches_zero: whether its last step may end on clean data, sigma = 0.
    """

    order: int = 1
    stages: int = 1
    stochastic: bool = False
    needs_gaussian: bool = False
    history: int = 0
    grid: str = "time"
    no_corrector: str = ""
    adaptive: bool = False
    reaches_zero: bool = True

    def __repr__(self) -> str:
        """The options that are not the defaults."""
        options = dataclasses.fields(self) if dataclasses.is_dataclass(self) else ()
        shown = (f"{f.name}={getattr(self, f.name)!r}" for f in options if getattr(self, f.name) != f.default)
        return f"{type(self).__name__}({', '.join(shown)})"

    def times(
        self, process: Process, *, steps: int | None = None, nfe: int | None = None, grid: str | None = None
    ) -> Tensor:
        """The times to hand to :meth:`run`, for a number of steps, or for at most ``nfe`` evaluations."""
        return process.grid(step_count(steps, nfe, self.stages), grid or self.grid)

    def run(
        self, x: Tensor, times: Sequence[float], process: Process, *, generator: torch.Generator | None = None
    ) -> Run:
        """The coroutine that takes x from ``times[0]`` to ``times[-1]``."""
        raise NotImplementedError


def step_count(steps: int | None, nfe: int | None, stages: int) -> int:
    """The number of steps that ``steps`` or ``nfe`` ask for; ValueError unless exactly one is given."""
    if (steps is None) == (nfe is None):
        raise ValueError(f"give either steps or nfe, got steps={steps!r}, nfe={nfe!r}")
    if steps is not None:
        return checks.integer("steps", steps, least=1)
    return checks.integer("nfe", nfe, least=stages) // stages


def check_times(times: Any, process: Process) -> list[float]:
    """A strictly decreasing sequence of at least two times of the process, as floats; ValueError otherwise."""
    values = [float(t) for t in times]
    if len(values) < 2:
        raise ValueError(f"times must hold at least 2 times, got {values}")
    for i, t in enumerate(values):
        process.check_time(f"times[{i}]", t)
    for i, (s, t) in enumerate(itertools.pairwise(values)):
        if t >= s:
            raise ValueError(f"times must decrease strictly, got times[{i}]={s!r}, times[{i + 1}]={t!r}")
    return values


def drive(
    run: Run, answer: Callable[[Query], Prediction], done: Callable[[Step], Change | None] | None = None
) -> Tensor:
    """Run a solver to its end: ``answer`` its queries; ``done`` hears of each step, and may change the batch."""
    reply: Prediction | Change | None = None
    while True:
        try:
            event = run.send(reply)
        except StopIteration as stop:
            return stop.value
        if isinstance(event, Query):
            reply = answer(event)
        else:
            reply = None if done is None else done(event)


def rehearse(solver: Solver, times: Sequence[float], process: Process) -> list[Query]:
    """The queries that a solver will make, in order, found by running it on a single zero. Not for adaptive solvers."""
    asked: list[Query] = []

    def answer(query: Query) -> Prediction:
        asked.append(query)
        return Prediction(torch.zeros_like(query.x), query.x, query.t, process, "sample")

    drive(solver.run(torch.zeros(1, dtype=torch.float64), times, process, generator=torch.Generator()), answer)
    return asked


def combine(*terms: tuple[float, Tensor]) -> Tensor:
    """``sum c_i x_i`` with as few passes over memory as there are terms."""
    (c, x), *rest = terms
    total = x * c
    for c, x in rest:
        total.add_(x, alpha=c)
    return total


def noise_step(process: Process, s: float, t: float, eta: float = 1.0) -> float:
    """The std of the fresh noise in a step s -> t: ``eta sigma_t sqrt(1 - exp(-2 h))``, h = lam_t - lam_s.

    For a variance-preserving process this is DDIM's (arXiv 2010.02502, equation 16).
    """
    return eta * process.sigma(t) * math.sqrt(-math.expm1(2 * (process.lam(s) - process.lam(t))))


@dataclass(frozen=True, repr=False)
class DDIM(Solver):
    """DDIM (Song et al., arXiv 2010.02502, equation 12): ``x_t = alpha_t x0 + sqrt(sigma_t^2 - std^2) eps + std z``.

    First order, one evaluation a step. ``eta=0`` is deterministic, and equals DPM-Solver-1; ``eta=1`` is ancestral sampling
    (SDE-DPM-Solver++ of first order). ``std = eta sigma_t sqrt(1 - exp(-2h))`` with h the step in half log-SNR.
    """

    eta: float = 0.0

    order: ClassVar[int] = 1

    def __post_init__(self) -> None:
        checks.between("eta", self.eta, 0.0, 1.0)

    @property
    def stochastic(self) -> bool:
        return self.eta > 0

    @property
    def needs_gaussian(self) -> bool:
        return self.eta > 0

    def run(
        self, x: Tensor, times: Sequence[float], process: Process, *, generator: torch.Generator | None = None
    ) -> Run:
        for i, (s, t) in enumerate(itertools.pairwise(times)):
            p: Prediction = yield Query(x, s)
            sigma = process.sigma(t)
            std = noise_step(process, s, t, self.eta) if self.eta and sigma else 0.0
            x = mean = combine((process.alpha(t), p.x0), (math.sqrt(sigma**2 - std**2), p.eps))
            if std:
                z = standard_normal(mean.shape, generator=generator, dtype=mean.dtype, device=mean.device)
                x = torch.add(mean, z, alpha=std)
            last = i == len(times) - 2
            change = yield Step(x, s, t, i, last, mean=mean if std else None, std=std or None)
            x = x if change is None else change.x
        return x


class RungeKutta(Solver):
    """An explicit Runge-Kutta method on the probability-flow ODE ``dx/dt = alpha' x0 + sigma' eps`` in the process's own time.

    A subclass declares its tableau: ``nodes`` c, ``matrix`` a (one row per further stage) and ``weights`` b. The last step
    is Euler's where a node falls on clean data (sigma = 0), at which the ODE cannot be evaluated.
    """

    nodes: ClassVar[tuple[float, ...]] = (0.0,)
    matrix: ClassVar[tuple[tuple[float, ...], ...]] = ()
    weights: ClassVar[tuple[float, ...]] = (1.0,)

    @property
    def stages(self) -> int:
        return len(self.nodes)

    def run(
        self, x: Tensor, times: Sequence[float], process: Process, *, generator: torch.Generator | None = None
    ) -> Run:
        for i, (s, t) in enumerate(itertools.pairwise(times)):
            h = t - s
            p: Prediction = yield Query(x, s)
            x, slopes = p.x, [p.flow]
            if 1.0 in self.nodes and process.sigma(t) == 0:
                x = combine((1.0, x), (h, slopes[0]))
            else:
                for c, row in zip(self.nodes[1:], self.matrix, strict=True):
                    inner = combine((1.0, x), *((h * a, k) for a, k in zip(row, slopes, strict=True) if a))
                    # A node at the step's end is the next time itself, to the last bit.
                    p = yield Query(inner, t if c == 1.0 else s + c * h, first=False)
                    slopes.append(p.flow)
                x = combine((1.0, x), *((h * b, k) for b, k in zip(self.weights, slopes, strict=True) if b))
            change = yield Step(x, s, t, i, i == len(times) - 2)
            x = x if change is None else change.x
        return x


class Euler(RungeKutta):
    """First order, one evaluation a step: ``x + h f(x, s)``."""


class Heun(RungeKutta):
    """Second order, two evaluations a step: the trapezoidal rule (the deterministic sampler of EDM, arXiv 2206.00364)."""

    order = 2
    nodes = (0.0, 1.0)
    matrix = ((1.0,),)
    weights = (0.5, 0.5)


class RK4(RungeKutta):
    """Fourth order, four evaluations a step: the classical method of Kutta (1901)."""

    order = 4
    nodes = (0.0, 0.5, 0.5, 1.0)
    matrix = ((0.5,), (0.0, 0.5), (0.0, 0.0, 1.0))
    weights = (1 / 6, 1 / 3, 1 / 3, 1 / 6)
