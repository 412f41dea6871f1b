"""A segment of a run whose solver is a coroutine: driven one prediction at a time; copies are replayed the same ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from polyak.generate.process import ProbabilityPath
from polyak.generate.solver import Query, Run, Solver, Step, resume


class Coroutine:
    """A solver's run over some times.

    A copy is told again what the run was told since its last step with a memory, each time with the noise that there was.

    Args:
        solver: a coroutine.
        times: of its steps.
        asked: the times at which it is going to ask.
        process: the process.
    """

    def __init__(
        self, solver: Solver, times: Sequence[float], asked: Sequence[float], process: ProbabilityPath
    ) -> None:
        self.solver, self.times, self.asked, self.process = solver, list(times), list(asked), process
        self.step: Step | None = None
        self.told: list[tuple[Any, Any]] = []  # predictions, and the state of the generator before each
        self.done = 0  # evaluations
        self._since: Any = None  # the generator's state at the start, or after the last step with a memory
        self._bound: Any = None
        self._run: Run | None = None

    def send(self, prediction: Any, generator: Any) -> Tensor:
        """The next point, or the state at the end; tensors of its own.

        Raises:
            ValueError: the solver asks at other times than it was planned to.
        """
        # A pipeline may write the next state, or the next output, into the memory of the last one.
        prediction = prediction.replace(prediction.output.clone()).rebase(prediction.x.clone())
        given = _own(generator, prediction.x)
        if self._run is None:
            self._begin(prediction.x, given)
        lent = self._lend(given)
        self.told.append((prediction, frozen(self._bound)))
        try:
            point = self._tell(prediction)
        finally:
            if lent:
                given.set_state(self._bound.get_state())
        return point.clone()

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
        self.done += 1
        try:
            event = self._run.send(prediction)
            while not isinstance(event, Query):
                if event.memory is not None:
                    self.step, self.told, self._since = event, [], frozen(self._bound)
                event = self._run.send(None)
        except StopIteration as stop:
            if self.done != len(self.asked):
                raise ValueError(self._astray("ends")) from None
            return stop.value
        if self.done == len(self.asked) or (
            not isinstance(event.t, Tensor) and float(event.t) != self.asked[self.done]
        ):
            raise ValueError(self._astray(f"asks at t={event.t}"))
        return event.x

    def _astray(self, what: str) -> str:
        planned = f"at t={self.asked[self.done]:g}" if self.done < len(self.asked) else "no more"
        return (
            f"{self.solver!r} {what} after {self.done} evaluations, where it was planned to ask {planned}: timesteps are known "
            "before a run, so where a solver asks must not depend on what it is told"
        )

    def _begin(self, x: Tensor, given: Any) -> None:
        """Start, or go on where the run was that this is a copy of."""
        told, self.told = self.told, []
        again = bool(told) or self.step is not None
        if again:
            self._bound = thawed(self._since)
        else:
            self._bound, self._since = given, frozen(given)
        if self.step is not None:
            self._run = resume(self.solver, self.step, self.times, self.process, generator=self._bound)
        else:
            start = told[0][0].x if told else x
            self._run = self.solver.run(start, self.times, self.process, generator=self._bound)
        next(self._run)
        self.done -= len(told)
        for prediction, state in told:
            self.told.append((prediction, state))
            _restore(self._bound, state)
            self._tell(prediction)

    def __getstate__(self) -> dict[str, Any]:
        told = [(p.replace(p.output.detach()).rebase(p.x.detach()), state) for p, state in self.told]
        return {**self.__dict__, "_run": None, "_bound": None, "told": told}


def _own(generator: Any, x: Tensor) -> Any:
    """What a run is started with, so that another generator can take its place on the way."""
    if generator is None and x.device.type in ("cpu", "cuda"):
        return torch.cuda.default_generators[x.device.index or 0] if x.is_cuda else torch.default_generator
    return list(generator) if isinstance(generator, list | tuple) else generator


def frozen(generator: Any) -> Any:
    """A generator as its device and its state; of each, for several."""
    if isinstance(generator, list | tuple):
        return [frozen(one) for one in generator]
    return None if generator is None else {"device": str(generator.device), "state": generator.get_state()}


def thawed(state: Any) -> Any:
    """A generator of its own in a :func:`frozen` state; several, for a list."""
    if isinstance(state, list):
        return [thawed(one) for one in state]
    if state is None:
        return None
    generator = torch.Generator(state["device"])
    generator.set_state(state["state"])
    return generator


def _restore(generator: Any, state: Any) -> None:
    """Put a generator, or each of several, into a :func:`frozen` state."""
    if isinstance(generator, list):
        for i, one in enumerate(state):
            generator[i] = thawed(one)
    elif generator is not None and state is not None:
        generator.set_state(state["state"])
