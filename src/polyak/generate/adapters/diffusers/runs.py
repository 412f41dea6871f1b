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

from polyak.generate.prediction import Prediction
from polyak.generate.process import Process
from polyak.generate.solver import DDIM, Query, Run, Solver, rehearse

FIRST_ORDER = DDIM()  # exact if the predicted data do not change; equals DPM-Solver of order 1
MOST_LEADING = 4  # first-order steps that a solver may be helped with before its own


@dataclass(frozen=True)
class Leg:
    """A solver on its times, and the times at which it asks; ``first`` marks the evaluations that begin a step."""

    solver: Solver
    times: tuple[float, ...]
    asked: tuple[float, ...]
    first: tuple[bool, ...]


def _leg(solver: Solver, times: Sequence[float], process: Process) -> Leg:
    if solver is FIRST_ORDER:  # its times may be equal, which no other solver allows
        return Leg(solver, tuple(times), tuple(times[:-1]), (True,) * (len(times) - 1))
    queries = rehearse(solver, list(times), process)
    return Leg(solver, tuple(times), tuple(q.t for q in queries), tuple(q.first for q in queries))


def compose(solver: Solver, times: Sequence[float], process: Process) -> list[Leg]:
    """The legs of a whole run, the solver's as long as can be.

    Raises:
        ValueError: the solver's own, if it takes no part of the times.
    """
    times = list(times)
    idle = times[-1] == times[-2]
    clean = process.sigma(times[-1]) == 0 and not idle
    if clean and not solver.reaches_zero and getattr(solver, "denoise_to_zero", False) and len(times) > 2:
        times, clean = times[:-1], False  # it ends on clean data by itself
    tails = (1,) if idle or (clean and not solver.reaches_zero) else (0, 1) if clean else (0,)
    refusal: ValueError | None = None
    for tail in tails:
        for lead in range(MOST_LEADING):
            body = times[lead : len(times) - tail]
            ends = [_leg(FIRST_ORDER, times[: lead + 1], process)] if lead else []
            last = [_leg(FIRST_ORDER, times[-2:], process)] if tail else []
            if len(body) < 2:
                if tail and len(body) == 1:
                    return ends + last
                break
            try:
                return [*ends, _leg(solver, body, process), *last]
            except ValueError as error:
                refusal = refusal or error
    assert refusal is not None
    raise refusal


def _variants(solver: Solver) -> list[Solver]:
    """The solver, and what it is without the further evaluations by which it starts."""
    if getattr(solver, "start", "lower") == "lower" or not dataclasses.is_dataclass(solver):
        return [solver]
    return [solver, dataclasses.replace(solver, start="lower")]  # type: ignore[list-item]


def begin_at(legs: Sequence[Leg], index: int, process: Process) -> list[Leg]:
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
    rest = list(leg.asked[index:])
    if leg.solver is FIRST_ORDER:
        return [_leg(FIRST_ORDER, leg.times[index:], process), *after]
    for done in range(len(rest)):
        if rest[done] not in leg.times[:-1]:
            continue
        times = leg.times[leg.times.index(rest[done]) :]
        for solver in _variants(leg.solver):
            try:
                found = _leg(solver, times, process)
            except ValueError:
                continue
            if list(found.asked) == rest[done:]:
                before = [_leg(FIRST_ORDER, rest[: done + 1], process)] if done else []
                return [*before, found, *after]
    return [_leg(FIRST_ORDER, [*rest, leg.times[-1]], process), *after]


def evaluations_per_step(solver: Solver, process: Process) -> int:
    """How many evaluations there are to a step of a grid, for a solver that asks at further points; else 1."""
    try:
        legs = compose(solver, process.grid(7, "time").tolist(), process)
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


def _own(generator: Any, x: Tensor) -> Any:
    """What a run is started with, so that another generator can take its place on the way."""
    if generator is None and x.device.type in ("cpu", "cuda"):
        return torch.cuda.default_generators[x.device.index or 0] if x.is_cuda else torch.default_generator
    return list(generator) if isinstance(generator, list | tuple) else generator


class Driven:
    """A run in progress.

    A solver is a coroutine, which cannot be copied. What it was told is kept until its leg ends, and a copy is told it again
    when it is next asked; noise drawn then is thrown away, because a solver goes on from the state that it is sent.
    """

    def __init__(self, legs: Sequence[Leg], process: Process) -> None:
        self.legs, self.process = list(legs), process
        self.at = 0
        self.told: list[Prediction] = []
        self.generator: Any = None
        self._bound: Any = None
        self._run: Run | None = None

    @property
    def done(self) -> bool:
        """Whether nothing more is asked."""
        return self.at >= len(self.legs)

    def send(self, prediction: Prediction, generator: Any) -> Tensor:
        """Answer what is asked, and get the next point; after the last answer, the result. Noise is the generator's, or
        that of the last one that was given."""
        if generator is not None:
            self.generator = generator
        given = _own(self.generator, prediction.x)
        if self._run is None:
            self._start(prediction.x, given)
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

    def _tell(self, prediction: Prediction) -> Tensor:
        assert self._run is not None
        try:
            event = self._run.send(prediction)
            while not isinstance(event, Query):
                event = self._run.send(None)
            return event.x
        except StopIteration as stop:
            self.at, self.told, self._run = self.at + 1, [], None
            return stop.value

    def _start(self, x: Tensor, given: Any) -> None:
        """Start the leg, and tell it again what it was told before the copy was made."""
        leg, told = self.legs[self.at], self.told
        if told:
            rows = [torch.Generator(x.device) for _ in given] if isinstance(given, list) else torch.Generator(x.device)
            self._bound = rows
        else:
            self._bound = given
        self._run = leg.solver.run(told[0].x if told else x, list(leg.times), self.process, generator=self._bound)
        next(self._run)
        for prediction in told:
            self._tell(prediction)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_run": None, "_bound": None}
