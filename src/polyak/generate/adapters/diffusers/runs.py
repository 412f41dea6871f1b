"""A run that a pipeline steps from outside, one evaluation at a time. It can be copied, pickled and started at any timestep.

A run is a sequence of legs: the solver on its grid, and first-order steps where the solver cannot go (onto clean data, at an
infinite lam, for the rest of a step in whose middle a run begins).
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from polyak.generate.adapters.diffusers.coroutine import Coroutine, frozen, thawed
from polyak.generate.ddim import DDIM
from polyak.generate.linear import Stage, rehearse, tabled, take_stage
from polyak.generate.process import Flow, ProbabilityPath
from polyak.generate.solver import Solver
from polyak.generate.update import combine

FIRST_ORDER = DDIM()  # exact if the predicted data do not change; equals DPM-Solver of order 1
HOPELESS = 2.0**-40  # alpha^2 that is as good as 0
MOST_LEADING = 4  # first-order steps that a solver may be helped with before its own


@dataclass(frozen=True)
class Leg:
    """A solver on its times.

    A copy is planned again, because the stages' times know each other, which a copy of each would not keep.

    Attributes:
        ground: what it was planned on.
        asked: the times at which it asks.
        first: which of these begin a step.
        stages: what it makes of the answers, for solvers that write it down; None for coroutines.
        more: whether the solver was told that one more step follows.
    """

    ground: Ground
    solver: Solver
    times: tuple[float, ...]
    asked: tuple[float, ...]
    first: tuple[bool, ...]
    stages: list[Stage] | None
    more: bool = False

    def __reduce__(self) -> tuple[Any, ...]:
        return _planned, (self.ground, self.solver, self.times, self.more)


@dataclass(frozen=True)
class Ground:
    """What legs are planned on: the process, and the dialect of the predictions."""

    process: ProbabilityPath
    kind: str

    def leg(self, solver: Solver, times: Sequence[float], more: bool = False) -> Leg:
        """The solver's plan; its ValueError if it cannot go there.

        Args:
            solver: of all steps.
            times: one more than there are steps.
            more: one more step follows, which somebody else takes: what a solver does at the end of its run, it does there.
        """
        more = more and tabled(solver)
        if tabled(solver):
            try:
                stages = solver.table([*times, times[-1] / 2] if more else list(times), self.process, self.kind)
            except ValueError:
                if not more:
                    raise
                return self.leg(solver, times)
            if more and not (stages[-1].first and stages[-1].t == times[-1]):
                return self.leg(solver, times)
            stages = stages[:-1] if more else stages
            asked, first = [s.t for s in stages], [s.first for s in stages]
        else:
            queries = rehearse(solver, list(times), self.process, self.kind)
            stages, asked, first = None, [q.t for q in queries], [q.first for q in queries]
        return Leg(self, solver, tuple(times), tuple(map(float, asked)), tuple(first), stages, more)


def _planned(ground: Ground, solver: Solver, times: Sequence[float], more: bool) -> Leg:
    return ground.leg(solver, times, more)


def compose(solver: Solver, times: Sequence[float], ground: Ground) -> list[Leg]:
    """The legs of a whole run, the solver's as long as can be.

    Args:
        solver: of most steps.
        times: decreasing; the last two may be equal, for an evaluation without effect.
        ground: the process and the dialect.

    Raises:
        ValueError: the solver's own, if it takes no part of the times.
    """
    whole, process = list(times), ground.process
    idle = whole[-1] == whole[-2]
    clean = not idle and _is_clean(process, whole[-1])
    alone = clean and getattr(solver, "denoise_to_zero", False) and len(whole) > 2  # it ends on clean data by itself
    reached = whole[:-1] if alone else whole
    if alone:
        tails: tuple[int, ...] = (0,)
    else:
        tails = (1,) if idle or (clean and not solver.reaches_zero) else (0, 1) if clean else (0,)
    infinite = process.is_gaussian and process.alpha(whole[0]) == 0  # type: ignore[attr-defined]
    refusals: dict[tuple[int, int], ValueError] = {}
    least = _least_help(solver, whole[0], process) if len(whole) > 2 else 0
    for tail, lead in itertools.product(tails, range(least, MOST_LEADING)):
        body = reached[lead : len(reached) - tail]
        before = [ground.leg(FIRST_ORDER, whole[: lead + 1])] if lead else []
        if len(body) == 1 and (tail or alone):
            return [*before, ground.leg(FIRST_ORDER, whole[-2:])]
        if len(whole) == 2 and lead and infinite:
            return before
        if len(body) < 2:
            continue
        after = [ground.leg(FIRST_ORDER, whole[-2:])] if tail else []
        try:
            return [*before, ground.leg(solver, body, more=idle), *after]
        except ValueError as error:
            refusals[tail, lead] = error
    # Where the ends can be helped with, what is refused is what lies between.
    between = tails[-1], 1 if infinite else 0
    raise refusals.get(between) or next(iter(refusals.values()))


def _is_clean(process: ProbabilityPath, t: float) -> bool:
    return process.ends_clean(t) or (process.is_gaussian and process.sigma(t) == 0)  # type: ignore[attr-defined]


def _least_help(solver: Solver, t: float, process: ProbabilityPath) -> int:
    """How many first-order steps a run begins with: one where hardly any signal is left, for solvers that divide by it."""
    if not process.is_gaussian or not 0 < process.alpha(t) ** 2 <= HOPELESS:  # type: ignore[attr-defined]
        return 0
    try:  # whoever cannot start where there is none at all
        Ground(Flow(), "v_prediction").leg(solver, [1.0, 0.75, 0.5, 0.25])
    except ValueError:
        return 1
    return 0


def _variants(solver: Solver) -> list[Solver]:
    """The solver, and what it is without the further evaluations by which it starts."""
    if getattr(solver, "start", "lower") == "lower" or not dataclasses.is_dataclass(solver):
        return [solver]
    return [solver, dataclasses.replace(solver, start="lower")]  # type: ignore[list-item]


def begin_at(legs: Sequence[Leg], index: int, ground: Ground) -> list[Leg]:
    """Legs that ask at the same times from the given evaluation on."""
    total = sum(len(leg.asked) for leg in legs)
    if index >= total:
        raise ValueError(f"begin_index must be below {total}, the number of timesteps, got {index}")
    leg, *after = legs
    while index >= len(leg.asked):
        index -= len(leg.asked)
        leg, *after = after
    if index == 0:
        return [leg, *after]
    if leg.solver == FIRST_ORDER:
        return [ground.leg(FIRST_ORDER, leg.times[index:]), *after]
    rest = list(leg.asked[index:])
    for done, start in enumerate(rest):
        if start not in leg.times[:-1]:
            continue
        times = leg.times[leg.times.index(start) :]
        for solver in _variants(leg.solver):
            try:
                found = ground.leg(solver, times, leg.more)
            except ValueError:
                continue
            if list(found.asked) == rest[done:]:
                before = [ground.leg(FIRST_ORDER, rest[: done + 1])] if done else []
                return [*before, found, *after]
    end = leg.times[-1]
    if getattr(leg.solver, "denoise_to_zero", False) and ground.process.ends_clean(0.0):
        end = 0.0
    return [ground.leg(FIRST_ORDER, [*rest, end]), *after]


def evaluations_per_step(solver: Solver, ground: Ground) -> int:
    """How many evaluations there are to a step of a grid, for a solver that asks at further points; else 1."""
    try:
        legs = compose(solver, ground.process.grid(7, "time").tolist(), ground)
    except ValueError:
        return max(1, solver.stages)
    leg = max(legs, key=lambda found: len(found.times))
    starts = [i for i, first in enumerate(leg.first) if first]
    counts = []
    for i, j in itertools.pairwise(starts):
        if not {leg.asked[i], leg.asked[j]} <= set(leg.times):
            return 1
        spanned = leg.times.index(leg.asked[j]) - leg.times.index(leg.asked[i])
        counts.append((j - i) // max(spanned, 1))
    return max(1, min(counts, default=1))


class Driven:
    """A run in progress: which evaluation is next, the state at the step's start, and what the solver remembers.

    A copy keeps no graph of autograd's.
    """

    def __init__(self, legs: Sequence[Leg], ground: Ground) -> None:
        self.legs, self.ground = list(legs), ground
        self.at = self.stage = 0
        self.start: Tensor | None = None
        self.values: tuple[Tensor, ...] = ()
        self.generator: Any = None
        self._coroutine: Coroutine | None = None

    @property
    def done(self) -> bool:
        """Whether nothing more is asked."""
        return self.at >= len(self.legs)

    @property
    def t(self) -> float:
        """The time of the next evaluation."""
        leg = self.legs[self.at]
        return leg.asked[self.stage] if leg.stages is None else leg.stages[self.stage].t

    def send(
        self, prediction: Any, generator: Any, also: Sequence[tuple[float, float]] = ()
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Answer what is asked.

        Args:
            prediction: the answer.
            generator: of the noise; None for the last one that was given.
            also: weights of the point and the output in what is made beside.

        Returns:
            The next point (after the last answer, the result), and what was made beside it.
        """
        if generator is not None:
            self.generator = generator
        leg = self.legs[self.at]
        if leg.stages is None:
            if self._coroutine is None:
                self._coroutine = Coroutine(leg.solver, leg.times, leg.asked, self.ground.process)
            beside = tuple(combine((a, prediction.x), (b, prediction.output)) for a, b in also)
            point = self._coroutine.send(prediction, self.generator)
        else:
            stage, start = leg.stages[self.stage], self.start
            if stage.first:
                start = prediction.x
                if not stage.last:  # a copy is made: a pipeline may write the next point into the memory of this one
                    also = [(1.0, 0.0), *also]
            assert start is not None
            made, self.values = take_stage(stage, start, prediction, self.values, self.generator, False, also)
            point, beside = made.next, made.also
            if stage.first and not stage.last:
                self.start, *others = beside
                beside = tuple(others)
        self.stage += 1
        if self.stage == len(leg.asked):
            self.at, self.stage, self.values, self.start, self._coroutine = self.at + 1, 0, (), None, None
        return point, beside

    def reindex(self, ancestors: Tensor) -> None:
        """After resampling: row i of the batch was row ``ancestors[i]``.

        Raises:
            ValueError: in the midst of a coroutine, which is told of no change by a pipeline.
        """
        if self._coroutine is not None:
            raise ValueError(f"{self.legs[self.at].solver!r} cannot be steered in a pipeline: it is no LinearSolver")
        self.start = None if self.start is None else self.start.index_select(0, ancestors)
        self.values = tuple(value.index_select(0, ancestors) for value in self.values)

    def __getstate__(self) -> dict[str, Any]:
        start = None if self.start is None else self.start.detach()
        values = tuple(value.detach() for value in self.values)
        return {**self.__dict__, "start": start, "values": values, "generator": frozen(self.generator)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.generator = thawed(self.generator)
