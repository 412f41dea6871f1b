"""Before the first trial: does every arm run on the task, and does a trial that is run twice give the same numbers?

What is run is what will be: the trial functions, through the code that workers run.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from polyak.lab import group
from polyak.lab.claim import Trial, TrialFunction
from polyak.lab.compare.examine import fresh
from polyak.lab.compare.leaks import changed, held
from polyak.lab.compare.ranks import SEED
from polyak.lab.compare.sampling import UnsuitedError, sampler
from polyak.lab.compare.spec import ArmError
from polyak.lab.compare.task import SamplingTask, TaskError, endless
from polyak.lab.compare.trial import build, recipe_of, rehearse
from polyak.lab.workers import Job, Outcome, carry_out

_EVALUATIONS = 8  # of a sampler that is tried
_CLOCKS = ("seconds", "processor", "memory")  # differ from run to run


@dataclass(frozen=True)
class Again:
    """A trial that is to be run twice."""

    function: TrialFunction
    arm: str
    options: Mapping[str, Any]
    worst: Mapping[str, float]


def rehearse_all(
    file: str,
    device: str,
    arms: Sequence[tuple[str, Mapping[str, Any]]],
    processes: int = 1,
    again: Sequence[Again] = (),
) -> ArmError | TaskError | None:
    """What is wrong with the first arm that cannot be used on a task, or with the task; None where all is well."""
    if wrong := try_arms(file, device, arms, processes):
        return wrong
    return next((wrong for one in again if (wrong := twice(file, device, one))), None)


def try_arms(
    file: str, device: str, arms: Sequence[tuple[str, Mapping[str, Any]]], processes: int = 1
) -> ArmError | TaskError | None:
    """What is wrong with the first arm that cannot be used on a task; None where all can.

    ``arms``: each one's words, and its options as a trial gets them. ``processes``: of each trial.
    """
    with group.of_one() if processes > 1 else nullcontext():
        return _try_arms(file, device, arms)


def _try_arms(file: str, device: str, arms: Sequence[tuple[str, Mapping[str, Any]]]) -> ArmError | TaskError | None:
    try:
        for text, options in arms:
            task = fresh(file, device)
            name = str(options["class"]).rpartition(":")[2]
            try:
                if isinstance(task, SamplingTask):
                    _draw_once(task, options, device)
                    continue
                optimizer = build(task, task.model.train(), options)
            except UnsuitedError as error:
                return ArmError(f"arm {text!r}: {error}")
            except Exception as error:
                what = "draw on this task" if isinstance(task, SamplingTask) else "be made"
                hint = (
                    f"; if it is for matrices alone, name one for the rest: {text}:rest=adamw"
                    if "2D" in str(error)
                    else ""
                )
                return ArmError(f"arm {text!r}: {name} cannot {what}: {type(error).__name__}: {error}{hint}")
            if missing := [part for part in ("step", "zero_grad", "param_groups") if not hasattr(optimizer, part)]:
                return ArmError(f"arm {text!r}: {name} is no optimizer: it has no {' and no '.join(missing)}")
            try:
                rehearse(task, task.model, optimizer, next(endless(task.batches, Path(file).name)), recipe_of(options))
            except TaskError:
                raise
            except Exception as error:
                return ArmError(f"arm {text!r}: a step of {name} raised {type(error).__name__}: {error}")
    except TaskError as error:
        return error
    return None


def _draw_once(task: SamplingTask, options: Mapping[str, Any], device: str) -> None:
    """Draw samples with a small budget, or with the whole one where so little is not enough for a step."""
    import torch

    arm, whole = sampler(task, options, device), int(options["budget"].get("evaluations", _EVALUATIONS))
    with torch.no_grad():
        try:
            arm.draw(min(_EVALUATIONS, whole), SEED)
        except ValueError:
            arm.draw(whole, SEED)


def twice(file: str, device: str, again: Again) -> TaskError | None:
    """What differs between two runs of one trial in this process, and why; None where nothing does."""
    trial = Trial(
        claim="", scale="", task=Path(file).stem, arm=again.arm, seed=SEED, device=device, options=again.options
    )
    job = Job(
        function=again.function,
        trial=trial,
        worst=again.worst,
        needed=frozenset(),
        libraries=("numpy", "torch"),
    )

    def run() -> Outcome:
        return carry_out(job, lambda *_: None, lambda *_: True)

    try:
        one, other = run(), run()
        said = _difference(one, other)
        if not said:
            return None
        before = held(file)
        run()
    except Exception:
        return None  # a trial will say what is wrong
    names = changed(before, held(file))
    why = (
        f"{names} outside of task(seed, device) changes from trial to trial: make it inside of the function"
        if names
        else "Something is left from one trial to the next, or is drawn from no seed. Make it inside of the function, from the seed"
    )
    return TaskError(
        f"{Path(file).name}: one trial of {again.arm}, run twice in one process, gives different numbers: {said}. {why}"
    )


def _difference(one: Outcome, other: Outcome) -> str:
    """The first number that differs, in words; "" where none does."""
    curves = [(at.get("step", at.get("evaluations")), values) for at, values in one.curve]
    others = [(at.get("step", at.get("evaluations")), values) for at, values in other.curve]
    for (at, values), (_, theirs) in zip(
        [*curves, ("the end", one.values)], [*others, ("the end", other.values)], strict=False
    ):
        for name, value in values.items():
            same = value == theirs.get(name) or (math.isnan(value) and math.isnan(theirs.get(name, 0.0)))
            if name not in _CLOCKS and not same:
                where = at if isinstance(at, str) else f"{at:g}"
                return f"{name} at {where} is {value!r}, then {theirs.get(name)!r}"
    return "" if len(curves) == len(others) else f"it is measured {len(curves)} times, then {len(others)}"
