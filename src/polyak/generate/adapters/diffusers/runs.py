"""A solver that is asked from outside, one evaluation at a time, and can be copied, pickled and started anywhere.

A run is a sequence of legs: the solver on its grid, and first-order steps where the solver cannot go (onto clean data, at an
infinite lam, for the rest of a step in whose middle a run begins).
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from polyak.generate.ddim import DDIM
from polyak.generate.linear import Stage, rehearse, tabled, take_stage
from polyak.generate.process import ProbabilityPath
from polyak.generate.solver import Query, Run, Solver, Step, resume

FIRST_ORDER = DDIM()  # exact if the predicted data do not change; equals DPM-Solver of order 1
MOST_LEADING = 4  # first-order steps that a solver may be helped with before its own


@dataclass(frozen=True)
class Leg:
    """A solver on its times.

    Attributes:
        asked: the times at which it asks.
        first: which of these begin a step.
        stages: what it makes of the answers, for solvers that write it down; None for coroutines.
    """

    solver: Solver
    times: tuple[float, ...]
    asked: tuple[float, ...]
    first: tuple[bool, ...]
    stages: list[Stage] | None


@dataclass(frozen=True)
class Ground:
    """What legs are planned on: the process, and the dialect of the predictions."""

    process: ProbabilityPath
    kind: str

    def leg(self, solver: Solver, times: Sequence[float]) -> Leg:
        """The solver's plan; its ValueError if it cannot go there."""
        if tabled(solver):
            stages = solver.table(list(times), self.process, self.kind)
            asked, first = [s.t for s in stages], [s.first for s in stages]
        else:
            queries = rehearse(solver, list(times), self.process, self.kind)
            stages, asked, first = None, [q.t for q in queries], [q.first for q in queries]
        return Leg(solver, tuple(times), tuple(map(float, asked)), tuple(first), stages)


def compose(solver: Solver, times: Sequence[float], ground: Ground) -> list[Leg]:
    """The legs of a whole run, the solver's as long as can be.

    Args:
        solver: of most steps.
        times: decreasing; the last two may be equal, for an evaluation without effect.
        ground: the process and the dialect.

    Raises:
        ValueError: the solver's own, if it takes no part of the times.
    """
    times = list(times)
    idle = times[-1] == times[-2]
    clean = not idle and ground.process.ends_clean(times[-1])
    if clean and getattr(solver, "denoise_to_zero", False) and len(times) > 2:
        times, clean = times[:-1], False  # it ends on clean data by itself
    tails = (1,) if idle or (clean and not solver.reaches_zero) else (0, 1) if clean else (0,)
    refusal: ValueError | None = None
    for tail, lead in itertools.product(tails, range(MOST_LEADING)):
        body = times[lead : len(times) - tail]
        before = [ground.leg(FIRST_ORDER, times[: lead + 1])] if lead else []
        after = [ground.leg(FIRST_ORDER, times[-2:])] if tail else []
        if len(body) == 1 and tail:
            return before + after
        if len(body) < 2:
            continue
        try:
            return [*before, ground.leg(solver, body), *after]
        except ValueError as error:
            refusal = refusal or error
    assert refusal is not None
    raise refusal


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
    if leg.solver is FIRST_ORDER:
        return [ground.leg(FIRST_ORDER, leg.times[index:]), *after]
    rest = list(leg.asked[index:])
    for done, start in enumerate(rest):
        if start not in leg.times[:-1]:
            continue
        times = leg.times[leg.times.index(start) :]
        for solver in _variants(leg.solver):
            try:
                found = ground.leg(solver, times)
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

    Of a solver that is a coroutine, what it was told since its last step with a memory is kept, and a copy of the run is told
    it again; noise drawn then is thrown away, because a solver goes on from the state that it is sent.
    """

    def __init__(self, legs: Sequence[Leg], ground: Ground) -> None:
        self.legs, self.ground = list(legs), ground
        self.at = self.stage = 0
        self.start: Tensor | None = None
        self.values: tuple[Tensor, ...] = ()
        self.generator: Any = None
        self._coroutine: _Coroutine | None = None

    @property
    def done(self) -> bool:
        """Whether nothing more is asked."""
        return self.at >= len(self.legs)

    @property
    def t(self) -> float:
        """The time of the next evaluation."""
        leg = self.legs[self.at]
        return leg.asked[self.stage] if leg.stages is None else leg.stages[self.stage].t

    def send(self, prediction: Any, generator: Any) -> Tensor:
        """Answer what is asked, and get the next point; after the last answer, the result. Noise is the generator's, or
        that of the last one that was given."""
        if generator is not None:
            self.generator = generator
        leg = self.legs[self.at]
        if leg.stages is None:
            if self._coroutine is None:
                self._coroutine = _Coroutine(leg, self.ground.process)
            point = self._coroutine.send(prediction, self.generator)
        else:
            stage = leg.stages[self.stage]
            if stage.first:
                self.start = prediction.x
            assert self.start is not None
            made, self.values = take_stage(stage, self.start, prediction, self.values, self.generator, mean=False)
            point = made.next
        self.stage += 1
        if self.stage == len(leg.asked):
            self.at, self.stage, self.values, self.start, self._coroutine = self.at + 1, 0, (), None, None
        return point

    def __getstate__(self) -> dict[str, Any]:
        # Stages are planned again: their times know each other, which a copy would not keep.
        legs = [leg if leg.stages is None else dataclasses.replace(leg, stages=[]) for leg in self.legs]
        return {**self.__dict__, "legs": legs, "generator": _frozen(self.generator)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.legs = [leg if leg.stages is None else self.ground.leg(leg.solver, leg.times) for leg in self.legs]
        self.generator = _thawed(self.generator)


def _frozen(generator: Any) -> Any:
    """A generator as its device and its state; of each, for several."""
    if isinstance(generator, list | tuple):
        return [_frozen(one) for one in generator]
    return None if generator is None else {"device": str(generator.device), "state": generator.get_state()}


def _thawed(frozen: Any) -> Any:
    if isinstance(frozen, list):
        return [_thawed(one) for one in frozen]
    if frozen is None:
        return None
    generator = torch.Generator(frozen["device"])
    generator.set_state(frozen["state"])
    return generator


class _Coroutine:
    """One leg of a solver that is a coroutine."""

    def __init__(self, leg: Leg, process: ProbabilityPath) -> None:
        self.leg, self.process = leg, process
        self.step: Step | None = None
        self.told: list[Any] = []
        self._bound: Any = None
        self._run: Run | None = None

    def send(self, prediction: Any, generator: Any) -> Tensor:
        """The next point, or the state at the leg's end."""
        given = _own(generator, prediction.x)
        if self._run is None:
            self._begin(prediction.x, given)
        self.told.append(prediction)
        lent = self._lend(given)
        try:
            return self._tell(prediction)
        finally:
            if lent:
                given.set_state(self._bound.get_state())

    def _lend(self, given: Any) -> bool:
        """Let the run's own generator draw what the given one would; whether that has to be moved on afterwards."""
        if isinstance(self._bound, list) and isinstance(given, list):
            self._bound[:] = given
            return False
        if given is self._bound or not (
            isinstance(self._bound, torch.Generator) and isinstance(given, torch.Generator)
        ):
            return False
        self._bound.set_state(given.get_state())
        return True

    def _tell(self, prediction: Any) -> Tensor:
        assert self._run is not None
        try:
            event = self._run.send(prediction)
            while not isinstance(event, Query):
                if event.memory is not None:
                    self.step, self.told = event, []
                event = self._run.send(None)
            return event.x
        except StopIteration as stop:
            return stop.value

    def _begin(self, x: Tensor, given: Any) -> None:
        """Start the leg, or go on where the run was that this is a copy of."""
        told, self.told, times = self.told, [], list(self.leg.times)
        self._bound = given
        if told or self.step is not None:
            device = x.device
            self._bound = (
                [torch.Generator(device) for _ in given] if isinstance(given, list) else torch.Generator(device)
            )
        if self.step is not None:
            self._run = resume(self.leg.solver, self.step, times, self.process, generator=self._bound)
        else:
            start = told[0].x if told else x
            self._run = self.leg.solver.run(start, times, self.process, generator=self._bound)
        next(self._run)
        for prediction in told:
            self.told.append(prediction)
            self._tell(prediction)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_run": None, "_bound": None}


def _own(generator: Any, x: Tensor) -> Any:
    """What a run is started with, so that another generator can take its place on the way."""
    if generator is None and x.device.type in ("cpu", "cuda"):
        return torch.cuda.default_generators[x.device.index or 0] if x.is_cuda else torch.default_generator
    return list(generator) if isinstance(generator, list | tuple) else generator
