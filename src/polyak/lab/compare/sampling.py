"""One trial of a comparison of samplers: an arm draws samples with more and more evaluations, up to its budget.

An evaluation is one call of the network for one sample: a guided pair counts twice, a population of k particles k times. Every arm
starts from the same noise for one seed.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from polyak.lab.claim import Diverged, Measurement, Trial
from polyak.lab.compare.generators import Generators, number
from polyak.lab.compare.samplers import OF_A_PIPELINE, is_scheduler, split_options
from polyak.lab.compare.spec import find
from polyak.lab.compare.task import OF_A_TRIAL, SamplingTask, TaskError, load, metrics

PARTS = (0.125, 0.25, 0.5, 1.0)  # of the budget, at which samples are judged
_FURTHER = 20  # points of evaluation that a solver may need for a step
_FIRST = 8  # evaluations of the first runs of a budget in time, which tell how long one takes


class UnsuitedError(ValueError):
    """An arm cannot draw what the task has: a denoiser's samples, or a pipeline's."""


class _Sampler(Protocol):
    """An arm that can be run with a number of evaluations."""

    def draw(self, evaluations: int, seed: int) -> tuple[Any, int]:
        """Samples, and how many evaluations they took; ValueError where so few do not suffice."""
        ...


@dataclass(frozen=True)
class Draw:
    """The trial function for a task file: options are class, fixed, tuned, budget, points and, for tuning, main."""

    file: str

    def __call__(self, trial: Trial) -> Iterator[Measurement]:
        import torch

        task = load(self.file, trial.seed, trial.device)
        if not isinstance(task, SamplingTask):
            raise TaskError(f"{Path(self.file).name}: samplers need a task with a denoiser or a pipeline, and a metric")
        main = trial.options.get("main")
        arm = sampler(task, trial, trial.device)
        with torch.no_grad():
            limit = _limit(arm, trial)
            values: dict[str, float] = {}
            spent, seconds = 0, 0.0
            for part in PARTS if main is None else (1.0,):
                count = math.floor(part * limit)
                try:
                    samples, spent, seconds = _timed(arm, count, trial)
                except ValueError:
                    if part < 1.0:  # a part of the budget may be too little for one step
                        continue
                    raise
                # The same numbers every time, whatever an arm has drawn.
                with Generators(trial.device, number("evaluation", trial.seed)):
                    values = _judged(task, samples, main, self.file)
                at = {"used": part, "evaluations": spent, "seconds": seconds}
                yield Measurement(values=values, at=at)
        final = {"evaluations": spent, "seconds": seconds, "memory": _memory(trial.device)}
        yield Measurement(values={**values, **final})


def sampler(task: SamplingTask, options: Trial | Mapping[str, Any], device: str) -> _Sampler:
    """An arm, with its fixed and tuned options.

    Raises:
        UnsuitedError: the arm is for tasks of the other kind.
    """
    given = split_options({**options["fixed"], **{name: options[name] for name in options["tuned"]}})
    cls = find(options["class"])
    return _Solver(task, cls, given, device) if task.pipeline is None else _Pipeline(task, cls, given)


def samples_of(made: Any, who: str) -> Any:
    """The samples in what a pipeline returns: its ``images``, the first of an output or a tuple, or a tensor, array or list itself.

    Raises:
        TaskError: it returns something else. ``who``: the pipeline, for the message.
    """
    import numpy as np
    import torch

    if hasattr(made, "images"):
        return made.images
    if isinstance(made, (torch.Tensor, np.ndarray, list)):
        return made
    if isinstance(made, (tuple, Mapping)) and len(made):  # diffusers' outputs are ordered dictionaries
        return next(iter(made.values())) if isinstance(made, Mapping) else made[0]
    raise TaskError(
        f"{who} must return samples: an output that has `images`, a tuple whose first they are, or a tensor, array or list, got "
        f"{'None' if made is None else f'a {type(made).__name__}'}"
    )


def _limit(sampler: _Sampler, trial: Trial) -> int:
    """The budget in evaluations; of a time, as many as fit by what a few take."""
    budget: Mapping[str, float] = trial["budget"]
    if "evaluations" in budget:
        return int(budget["evaluations"])
    _timed(sampler, _FIRST, trial)  # what is loaded at the first run is no cost of sampling
    _, spent, seconds = _timed(sampler, _FIRST, trial)
    return max(1, math.floor(budget["seconds"] / (seconds / spent)))


def _timed(sampler: _Sampler, evaluations: int, trial: Trial) -> tuple[Any, int, float]:
    import torch

    def now() -> float:
        if trial.device != "cpu":
            torch.cuda.synchronize(trial.device)
        return time.perf_counter()

    began = now()
    # The noise is no other's: a task may draw from a generator with the trial's seed, too.
    samples, spent = sampler.draw(evaluations, number("noise", trial.seed))
    return samples, spent, now() - began


def _judged(task: SamplingTask, samples: Any, main: str | None, file: str) -> dict[str, float]:
    import numpy as np
    import torch

    if isinstance(samples, np.ndarray) and samples.dtype.kind in "fc":
        finite = bool(np.isfinite(samples).all())
    else:
        finite = not isinstance(samples, torch.Tensor) or bool(samples.isfinite().all())
    if not finite:
        raise Diverged("samples are not finite")
    found = metrics(task.metric(samples), "metric", file)
    if bad := [name for name, value in found.items() if not math.isfinite(value)]:
        raise Diverged(f"{bad[0]} is {found[bad[0]]}")
    return found if main is None else {"validation": found[main]}


def _memory(device: str) -> float:
    import torch

    return 0.0 if device == "cpu" else torch.cuda.max_memory_allocated(device) / 1e6


class _Solver:
    """A solver of ``polyak.generate``, with its guidance and steering."""

    def __init__(self, task: SamplingTask, cls: Any, given: Mapping[str, Mapping[str, Any]], device: str) -> None:
        if is_scheduler(cls):
            raise UnsuitedError(
                f"{cls.__name__} is a diffusers scheduler, which goes into a pipeline: it needs a task that returns a `pipeline`, "
                "and this one returns a denoiser"
            )
        self._task, self._device = task, device
        self._solver = cls(**given[""])
        self._parts = {
            name: find(given[name][""])(**{k: v for k, v in given[name].items() if k})
            for name in ("guidance", "steering")
            if given[name]
        }
        self._sample, self._call = given["sample"], given["call"]

    def draw(self, evaluations: int, seed: int) -> tuple[Any, int]:
        import torch

        sample = find("polyak.generate:sample")
        generator = torch.Generator(self._device).manual_seed(seed)
        # What one evaluation point costs in calls of the network per sample.
        cost = 2 if getattr(self._parts.get("guidance"), "paired", False) else 1
        cost *= getattr(self._parts.get("steering"), "particles", 1)
        try:
            samples, info = sample(
                self._task.denoiser,
                tuple(self._task.shape),
                process=self._task.process,
                solver=self._solver,
                nfe=evaluations // cost,
                generator=generator,
                dtype=self._task.dtype,
                device=self._device,
                check_finite=False,
                return_info=True,
                **self._parts,
                **self._sample,
                **self._call,
            )
        except ValueError as error:
            if least := self._least(evaluations // cost):
                who = " with ".join(map(repr, [self._solver, *self._parts.values()]))
                raise ValueError(
                    f"{who} takes at least {cost * least} evaluations for a sample, and there are {evaluations}"
                ) from error
            raise
        return samples, info.nfe * cost

    def _least(self, points: int) -> int:
        """How many points of evaluation the solver needs, where it needs more than these; else 0."""
        process, grid = self._task.process or self._task.denoiser.process, self._sample.get("grid")

        def suffice(n: int) -> bool:
            with suppress(ValueError):
                return len(self._solver.times(process, nfe=n, grid=grid)) > 1
            return False

        return 0 if suffice(points) else next((n for n in range(points + 1, points + _FURTHER) if suffice(n)), 0)


class _Pipeline:
    """A scheduler in a diffusers pipeline; a solver of ours goes in by its adapter."""

    def __init__(self, task: SamplingTask, cls: Any, given: Mapping[str, Mapping[str, Any]]) -> None:
        if part := next((name for name in ("guidance", "steering") if given[name]), ""):
            raise UnsuitedError(f"{part} cannot be an arm's in a pipeline, {OF_A_PIPELINE}")
        if key := next((key for key in OF_A_TRIAL if key in given["call"]), ""):
            raise UnsuitedError(f"call.{key} cannot be an arm's: it is {OF_A_TRIAL[key]} affair")
        self._pipeline, config = task.pipeline, task.pipeline.scheduler.config
        if is_scheduler(cls):
            self._scheduler = cls.from_config(config, **given[""], **given["sample"])
        else:
            adapter = find("polyak.generate.adapters.diffusers:PolyakScheduler")
            self._scheduler = adapter.from_config(config, solver=cls(**given[""]), **given["sample"])
        self._call = {**task.call, **given["call"]}
        if hasattr(self._pipeline, "set_progress_bar_config"):
            self._pipeline.set_progress_bar_config(disable=True)

    def draw(self, evaluations: int, seed: int) -> tuple[Any, int]:
        import torch

        steps, points = self._steps(self._scheduler, evaluations)
        device = getattr(self._pipeline, "device", "cpu")
        call = {**self._call, "num_inference_steps": steps, "generator": torch.Generator(device).manual_seed(seed)}
        # A task may return one pipeline for all trials: the next arm is made from its own scheduler, not from this one.
        own, self._pipeline.scheduler = self._pipeline.scheduler, self._scheduler
        try:
            made = self._pipeline(**call)
        finally:
            self._pipeline.scheduler = own
        return samples_of(made, f"the pipeline {type(self._pipeline).__name__}"), points

    def _steps(self, scheduler: Any, evaluations: int) -> tuple[int, int]:
        """The most steps whose timesteps, one evaluation each, are within the budget."""
        name, least, failed = type(scheduler).__name__, "", None
        for steps in range(evaluations, 0, -1):
            try:
                scheduler.set_timesteps(steps)
            except Exception as error:  # a scheduler's first steps may be of a kind that needs several
                failed = failed or ValueError(f"{name}.set_timesteps({steps}) raised {type(error).__name__}: {error}")
                continue
            taken = len(scheduler.timesteps)
            if taken <= evaluations:
                return steps, taken
            least = f"{steps} step{'s' * (steps > 1)} of {name} take{'s' * (steps == 1)} {taken} evaluations"
        if least:
            fewer = "; it cannot plan fewer steps" if failed else ""
            raise ValueError(f"{least}, and there are {evaluations}{fewer}") from failed
        raise failed or ValueError(f"{name} has no step of {evaluations} evaluations")
