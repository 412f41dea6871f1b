"""Linear solvers: each step is a linear combination of the state, the network's output and remembered outputs.

The weights follow from the times alone. A :class:`LinearSolver` writes them down once for all steps, as a table of
:class:`Stage`; the work on tensors is done here, in one pass over memory for each evaluation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeGuard

import torch
from torch import Tensor

from polyak.core import checks
from polyak.generate.prediction import Prediction
from polyak.generate.process import Generators, ProbabilityPath, standard_normal
from polyak.generate.solver import Query, Run, Solver, Step, drive
from polyak.generate.update import Update, advance


@checks.arguments(steps=checks.Integer(0), values=checks.Each(checks.tensor))
@dataclass(frozen=True, eq=False)
class Memory:
    """What a linear solver remembers after a step.

    Attributes:
        steps: the number of steps that are done.
        values: past values of the network in the solver's own dialect, newest first; never changed in place.
    """

    steps: int
    values: tuple[Tensor, ...] = ()

    def take(self, ancestors: Tensor) -> Memory:
        """What is remembered after resampling: row i of the batch came from row ``ancestors[i]``."""
        return Memory(self.steps, tuple(value.index_select(0, ancestors) for value in self.values))


_WEIGHTS = checks.Instance(tuple, words="a tuple of weights")


@checks.arguments(
    t=checks.operand, to=checks.operand, view=checks.Choice("x0", "eps", "flow", "score", "v"), base=checks.operand,
    value=checks.operand, past=_WEIGHTS, std=checks.operand, keep=_WEIGHTS, first=checks.flag, last=checks.flag,
    mixed=checks.Instance(tuple, words="a tuple of rows of weights"),
)  # fmt: skip
class Stage(NamedTuple):
    """One evaluation of a linear solver, and what is made of it:

        y = base x + value m + sum_i past_i m_i + std z

    with x the state at the step's start, m a view of the prediction at t, and m_i what is remembered, newest first. y is the
    next point of evaluation, or, after the last stage of a step, the state.

    Attributes:
        t, to: the times of the evaluation and of y.
        view: what is read of the prediction: "x0", "eps" or "flow".
        base, value, past, std: the weights.
        keep: which of (m, *remembered) are remembered after this stage; -1 is the first one of what is mixed, -2 the second.
        first, last: whether it begins, and whether it completes a step.
        mixed: further values that can be remembered, averages of past ones, say: for each the weights of (m, *remembered).
    """

    t: float
    to: float
    view: str
    base: float
    value: float
    past: tuple[float, ...] = ()
    std: float = 0.0
    keep: tuple[int, ...] = ()
    first: bool = True
    last: bool = True
    mixed: tuple[tuple[float, ...], ...] = ()


class LinearSolver(Solver):
    """A solver whose every step is a linear combination. A subclass defines :meth:`table`.

    Attributes:
        by_kind: whether the plan depends on the dialect of the predictions.

    Example:
        >>> class Euler(LinearSolver):
        ...     def table(self, times, process, kind="flow"):
        ...         at = process.moments(times)
        ...         return [Stage(s, t, "flow", 1.0, t - s) for s, t in zip(at, at[1:])]
    """

    by_kind: bool = False

    def table(self, times: Sequence[float], process: ProbabilityPath, kind: str = "flow") -> list[Stage]:
        """All evaluations of a run, with their weights.

        Args:
            times: as for :meth:`run`. ``at = process.moments(times)`` has the process's schedules at all of them:
                ``at.alpha[i]`` is a number. Stages should have these moments as their times.
            kind: the dialect of the predictions, for methods that ask where not every dialect determines the field.
        """
        raise NotImplementedError

    def run(
        self,
        x: Tensor,
        times: Sequence[float],
        process: ProbabilityPath,
        *,
        generator: Generators | None = None,
        memory: Memory | None = None,
    ) -> Run:
        kind, stages = "flow", self.table(times, process)
        index, values = (0, ()) if memory is None else (memory.steps, memory.values)
        at = first_stage(stages, index)
        start, began = x, 0.0
        while at < len(stages):
            stage = stages[at]
            p: Any = yield Query(x, stage.t, stage.first)
            if stage.first and self.by_kind and (said := getattr(p, "kind", "flow")) != kind:
                # A guidance may change the dialect on the way, a corrector does from the start.
                kind, stages = said, self.table(times, process, said)
                at = first_stage(stages, index)
                stage = stages[at]
            if stage.first:
                start, began = p.x, stage.t
            made, values = take_stage(stage, start, p, values, generator)
            x, at = made.next, at + 1
            if stage.last:
                done = Memory(index + 1, values)
                last = not any(stage.last for stage in stages[at:])
                step = Step(x, began, stage.to, index, last, made.mean, stage.std or None, memory=done)
                if stage.first:
                    step.gain = (stage.view, stage.value)
                change = yield step
                index += 1
                if change is not None:
                    x = change.x
                    if change.ancestors is not None:
                        values = done.take(change.ancestors).values
        return x


def first_stage(stages: Sequence[Stage], step: int) -> int:
    """Where the stages of a step, counted from 0, begin; their end for the one after the last."""
    starts = [i for i, stage in enumerate(stages) if stage.first]
    return starts[step] if step < len(starts) else len(stages)


class Folded(NamedTuple):
    """A stage, with the dialect of the output folded into its weights."""

    of_x: float  # of the point of the evaluation; at a step's first stage also of its start
    of_output: float
    base: float  # of the step's start, after the first stage
    past: tuple[float, ...]
    value: tuple[float, float] | None  # (a, b) of the value that is remembered
    std: float
    keep: tuple[int, ...]
    mixed: tuple[tuple[float, ...], ...] = ()  # of the point, the output and what is remembered


def folded(stage: Stage, weights: Callable[[str], tuple[float, float]]) -> Folded:
    """A stage for a prediction whose views are ``a x + b output`` with ``(a, b) = weights(view)``."""
    # Where the prediction is not read its view need not be determined.
    read = stage.value or 0 in stage.keep or any(row[0] for row in stage.mixed)
    a, b = weights(stage.view) if read else (0.0, 0.0)
    of_x, base = stage.value * a, stage.base
    if stage.first:
        of_x, base = of_x + base, 0.0
    value = (a, b) if 0 in stage.keep else None
    mixed = tuple([(of_m * a, of_m * b, *past) for of_m, *past in stage.mixed])
    return Folded(of_x, stage.value * b, base, stage.past, value, stage.std, stage.keep, mixed)


def apply(
    stage: Folded,
    start: Tensor,
    x: Tensor,
    output: Tensor,
    values: tuple[Tensor, ...],
    generator: Generators | None = None,
    mean: bool = True,
    also: Sequence[tuple[float, float]] = (),
) -> tuple[Update, tuple[Tensor, ...]]:
    """What a stage makes of an output at x, and what is remembered after it.

    Args:
        start: the state at the step's start; not looked at in its first stage.
        values: what is remembered.
        generator: of the noise, where the stage draws some.
        mean: whether the mean of a stochastic step is wanted.
        also: weights of x and the output in what is made beside, in the same pass.
    """
    if not (stage.past or stage.base or stage.std or stage.keep):
        return advance(x, output, stage.of_x, stage.of_output, also=also), ()
    past = stage.past
    if stage.mixed:  # which may weigh what the next point does not
        past = (*past, *[0.0] * (max(map(len, stage.mixed)) - 2 - len(past)))
    if any(past[len(values) :]) or any(any(row[2 + len(values) :]) for row in stage.mixed):
        raise ValueError(f"a stage weighs {len(past)} remembered values, and there are {len(values)}")
    rest: list[tuple[float, Tensor]] = list(zip(past, values, strict=False))
    if stage.base:
        rest.append((stage.base, start))
    noise = None
    if stage.std:
        noise = stage.std, standard_normal(x.shape, generator=generator, dtype=x.dtype, device=x.device)
    made = advance(
        x, output, stage.of_x, stage.of_output, rest,
        value=stage.value, noise=noise, mean=mean, also=also, mixed=stage.mixed,
    )  # fmt: skip
    if not stage.keep:
        return made, ()
    known = (made.value, *values)
    kept = [made.mixed[-1 - i] if i < 0 else known[i] for i in stage.keep if i < len(known)]
    return made, tuple(kept)  # type: ignore[arg-type]


def take_stage(
    stage: Stage,
    start: Tensor,
    prediction: Any,
    values: tuple[Tensor, ...],
    generator: Generators | None = None,
    mean: bool = True,
    also: Sequence[tuple[float, float]] = (),
) -> tuple[Update, tuple[Tensor, ...]]:
    """:func:`apply` for a prediction; a stage's first is taken to be of the step's start, whatever that was before."""
    weighed = getattr(prediction, "weights", None)
    if weighed is None or isinstance(prediction.t, Tensor):
        output, weighed = getattr(prediction, stage.view), _as_it_is
    else:
        output = prediction.output
    return apply(folded(stage, weighed), start, prediction.x, output, values, generator, mean, also)


def _as_it_is(view: str) -> tuple[float, float]:
    return 0.0, 1.0


def tabled(solver: Solver) -> TypeGuard[LinearSolver]:
    """Whether a solver is all in its table: linear, and with no coroutine of its own."""
    return isinstance(solver, LinearSolver) and type(solver).run is LinearSolver.run


def rehearse(
    solver: Solver, times: Sequence[float], process: ProbabilityPath, kind: str = "sample", memory: Any = None
) -> list[Query]:
    """The queries that a solver will make, in order, for outputs of a dialect. Not for adaptive solvers."""
    if tabled(solver):
        return [Query(torch.empty(0), stage.t, stage.first) for stage in solver.table(times, process, kind)]
    asked: list[Query] = []

    def answer(query: Query) -> Prediction:
        asked.append(query)
        return Prediction(torch.zeros_like(query.x), query.x, query.t, process, kind)

    options = {} if memory is None else {"memory": memory}
    x = torch.zeros(1, 1, dtype=torch.float64)
    drive(solver.run(x, times, process, generator=torch.Generator(), **options), answer)
    return asked
