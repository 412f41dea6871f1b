"""Solvers as coroutines: a solver asks for predictions where it wants them, and says when a step is done.

``solver.run(x, times, process)`` is a generator. It yields a :class:`Query`, and is sent the prediction there; it yields a
:class:`Step` when a step is complete, and is sent None, or a :class:`Change` if the batch was changed. It returns the final
state. What a solver remembers from one step to the next is in the step's ``memory``: ``run(step.x, times, process,
memory=step.memory)`` goes on from there, so that a run can be resumed, copied, rolled back and forked. One implementation
serves our own loop (:func:`polyak.generate.sampling.sample`), a diffusers scheduler, and anything else that can answer.

A solver goes on from ``prediction.x`` at the first query of a step: whoever answers may have changed the state in between
(inpainting, a pipeline's callback). It changes no tensor that it is given.

Nearly every solver is linear: such a one writes down its weights, and has no coroutine of its own
(:class:`polyak.generate.linear.LinearSolver`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from polyak.core import checks
from polyak.generate.prediction import PredictionLike
from polyak.generate.process import Generators, ProbabilityPath
from polyak.generate.process.path import PATH, TIMES


@checks.arguments(x=checks.tensor, t=checks.operand, first=checks.flag)
@dataclass(slots=True, eq=False)
class Query:
    """A solver wants the prediction at (x, t). ``first``: the first evaluation of a step.

    t is a number, or a tensor of shape (B,) where every row has a time of its own.
    """

    x: Tensor
    t: Any
    first: bool = True


@checks.arguments(
    x=checks.tensor, s=checks.operand, t=checks.operand, index=checks.Integer(0), last=checks.flag, mean=checks.tensor | None,
    std=checks.operand | None, error=checks.tensor | None, memory=checks.anything,
    gain=checks.Instance(tuple, words="a pair (view, weight)") | None, guidance=checks.anything, steering=checks.anything,
)  # fmt: skip
@dataclass(slots=True, eq=False)
class Step:
    """A step from s to t is done.

    Attributes:
        x: the state at t.
        index, last: the step's number from 0, and whether it is the last.
        mean, std: of the Gaussian ``x ~ N(mean, std^2 I)`` that x was drawn from; None after a deterministic step.
        error: (B,), the estimated local error in units of the tolerance; adaptive solvers only.
        memory: what the solver remembers: :func:`resume` goes on from it. None if it remembers nothing.
        gain: of a step of one evaluation: ``(view, w)``: the mean moves by ``w`` times any change of this view ("x0", "eps" or
            "flow") of the prediction.
        guidance, steering: their states after the step, put there by :func:`polyak.generate.sample`.
    """

    x: Tensor
    s: float
    t: float
    index: int
    last: bool
    mean: Tensor | None = None
    std: float | None = None
    error: Tensor | None = None
    memory: Any = None
    gain: tuple[str, float] | None = None
    guidance: Any = None
    steering: Any = None


@checks.arguments(x=checks.tensor, ancestors=checks.tensor | None)
@dataclass(frozen=True, eq=False)
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
        tapers: by how much the order of a whole run is, asymptotically, lower (its last steps are, or a published formula is).
        stages: evaluations per step.
        stochastic: whether it draws noise.
        needs_gaussian: whether it is valid for Gaussian processes only.
        history: past predictions that it remembers (0 for one-step methods).
        grid: the kind of time grid it is used with unless told otherwise.
        no_corrector: why x0 correctors cannot be used with it; "" if they can.
        adaptive: whether it finds its times while it runs.
        reaches_zero: whether its last step may end on clean data, sigma = 0.
        discrete: whether it steps through integer states, of processes with ``is_discrete``, and through no others.
    """

    order: int = 1
    tapers: int = 0
    stages: int = 1
    stochastic: bool = False
    needs_gaussian: bool = False
    history: int = 0
    grid: str = "time"
    no_corrector: str = ""
    adaptive: bool = False
    reaches_zero: bool = True
    discrete: bool = False

    def __eq__(self, other: object) -> bool:
        """Whether it steps the same way: a solver of the same class, with the same options."""
        return vars(self) == vars(other) if type(other) is type(self) else NotImplemented

    def __hash__(self) -> int:
        return hash(type(self))

    def __repr__(self) -> str:
        """The options that are not the defaults."""
        options = dataclasses.fields(self) if dataclasses.is_dataclass(self) else ()
        shown = (f"{f.name}={getattr(self, f.name)!r}" for f in options if getattr(self, f.name) != f.default)
        return f"{type(self).__name__}({', '.join(shown)})"

    def with_steps(self, steps: int) -> Solver:
        """The solver to use where so many steps are asked for: itself, unless :meth:`run` could not tell from its times."""
        return self

    def times(
        self, process: ProbabilityPath, *, steps: int | None = None, nfe: int | None = None, grid: str | None = None
    ) -> Tensor:
        """The times to hand to :meth:`run`, for a number of steps, or for at most ``nfe`` evaluations."""
        return process.grid(step_count(steps, nfe, self.stages), grid or self.grid)

    def run(
        self,
        x: Tensor,
        times: Sequence[float],
        process: ProbabilityPath,
        *,
        generator: Generators | None = None,
        memory: Any = None,
    ) -> Run:
        """The coroutine that takes x from ``times[0]`` to ``times[-1]``.

        A solver without ``history`` may leave ``memory`` out of its signature. One with it takes the ``memory`` of its own last
        :class:`Step`, and goes on from x, the state after that step.
        """
        raise NotImplementedError


SOLVER = checks.Instance(Solver, words="a Solver (an instance, not the class)")


def step_count(steps: int | None, nfe: int | None, stages: int) -> int:
    """The number of steps that ``steps`` or ``nfe`` ask for; ValueError unless exactly one is given."""
    if (steps is None) == (nfe is None):
        raise ValueError(f"give either steps or nfe, got steps={steps!r}, nfe={nfe!r}")
    if steps is not None:
        return checks.integer("steps", steps, least=1)
    return checks.integer("nfe", nfe, least=stages) // stages


@checks.arguments(
    run=checks.Like("a run of a solver", "send"), answer=checks.Function("a function of a Query", 1),
    done=checks.Function("a function of a Step", 1) | None,
)  # fmt: skip
def drive(
    run: Run, answer: Callable[[Query], PredictionLike], done: Callable[[Step], Change | None] | None = None
) -> Tensor:
    """Run a solver to its end: ``answer`` its queries; ``done`` hears of each step, and may change the batch."""
    reply: Any = None
    while True:
        try:
            event = run.send(reply)
        except StopIteration as stop:
            return stop.value
        if type(event) is Query:
            reply = answer(event)
        else:
            reply = None if done is None else done(event)  # type: ignore[arg-type]


@checks.arguments(
    solver=SOLVER,
    step=checks.Instance(Step, words="a Step"),
    times=TIMES,
    process=PATH,
    generator=checks.generators | None,
)
def resume(
    solver: Solver,
    step: Step,
    times: Sequence[float],
    process: ProbabilityPath,
    *,
    generator: Generators | None = None,
) -> Run:
    """The coroutine that goes on after a step of a run over ``times``; the step stays as it is, and can be resumed again.

    Raises:
        ValueError: a step that did not end at one of the times, or a solver that remembers predictions, but not in its steps.
    """
    if not solver.adaptive and float(step.t) not in map(float, times):
        raise ValueError(
            f"the step ended at t={float(step.t):.6g}, which is none of this run's times: resume the same run"
        )
    if step.memory is not None:
        return solver.run(step.x, times, process, generator=generator, memory=step.memory)
    if solver.history:
        raise ValueError(f"{solver!r} remembers past predictions, but its steps have no memory to go on from")
    return _renumbered(solver.run(step.x, times[step.index + 1 :], process, generator=generator), step.index + 1)


def _renumbered(run: Run, by: int) -> Run:
    reply = None
    while True:
        try:
            event = run.send(reply)
        except StopIteration as stop:
            return stop.value
        if isinstance(event, Step):
            event.index += by
        reply = yield event
