"""Looking at a task before it is compared on: does it run, is it a pure function of its seed, does it give itself away?

:func:`examine` and :func:`try_arms` run in processes of their own, so that what the user's code does to them is forgotten.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from polyak.lab import group
from polyak.lab.claim import Measurement, Trial
from polyak.lab.compare.arms import ArmError
from polyak.lab.compare.contents import digest, targets
from polyak.lab.compare.generators import Generators, number
from polyak.lab.compare.sampling import UnsuitedError, sampler, samples_of
from polyak.lab.compare.task import (
    AnyTask,
    Facts,
    SamplingTask,
    TaskError,
    TrainingTask,
    betters,
    blame,
    endless,
    load,
    metrics,
    says,
)
from polyak.lab.compare.trial import build, rehearse
from polyak.lab.workers import Job, Outcome, settle

if TYPE_CHECKING:
    from torch import nn

_State = tuple[dict[str, str], dict[str, str]]  # digests of parameters, and of what else is saved

SEED = 20_000  # neither tuned on nor reported
_BATCHES = 3  # are compared
_EVALUATIONS = 8  # of a sampler that is tried
_STEPS = 2  # of a pipeline that is looked at
_SHOWN = 3  # names in a message
_ROUNDING = 1e-3  # relative, of an accelerator, which may sum in another order every time


def examine(file: str, device: str, processes: int = 1) -> Facts | str:
    """The facts of a task, or what is wrong with it, in a sentence. ``processes``: of each trial."""
    # First, while this process holds nothing on an accelerator.
    same = _same_batches(file, device, processes) if processes > 1 else ()
    with group.of_one() if processes > 1 else nullcontext():
        found = _examine(file, device)
    return found if isinstance(found, str) else replace(found, warnings=(*same, *found.warnings))


def _examine(file: str, device: str) -> Facts | str:
    try:
        began = time.perf_counter()
        first = _load(file, device)
        building = time.perf_counter() - began
        if isinstance(first, SamplingTask):
            return replace(_examine_sampling(first, file, device), building=building)
        return replace(_examine_training(first, file, device), building=building)
    except TaskError as error:
        return str(error)


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
            task = _load(file, device)
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
                return ArmError(f"arm {text!r}: {name} cannot {what}: {type(error).__name__}: {error}")
            if missing := [part for part in ("step", "zero_grad", "param_groups") if not hasattr(optimizer, part)]:
                return ArmError(f"arm {text!r}: {name} is no optimizer: it has no {' and no '.join(missing)}")
            try:
                rehearse(task, task.model, optimizer, next(endless(task.batches, Path(file).name)))
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


def _load(file: str, device: str) -> AnyTask:
    settle(("numpy", "torch"), SEED)
    return load(file, SEED, device)


def _examine_training(first: TrainingTask, file: str, device: str) -> Facts:
    name = Path(file).name
    weights = digest(first.model.state_dict())
    with blame(f"{name}: taking a batch", file):
        batches = list(islice(endless(first.batches, name), _BATCHES))
    contents = digest(batches)
    warnings: list[str] = []
    state = _state(first.model)
    began = time.perf_counter()
    untrained = _evaluate(first, "evaluate", file, device)
    evaluating = time.perf_counter() - began
    state = _left(first.model, state, "evaluate", name, warnings)
    validated = None
    if first.validate:
        validated = _evaluate(first, "validate", file, device)
        _left(first.model, state, "validate", name, warnings)
    better = betters(first, untrained, file)
    # Numbers without a name are called after the function: one of validate's is taken for the one of evaluate.
    if validated is not None and not {next(iter(untrained)), "validate"} & validated.keys():
        raise TaskError(f"{name}: validate must return {next(iter(untrained))!r}, too, which arms are compared by")
    _check_schedule(first, file)
    seconds, loss = _take_steps(first, batches, file)
    # A second call with the same seed must not meet what the first one left: trained weights, drawn random numbers.
    second = _load(file, device)
    assert isinstance(second, TrainingTask)
    ours, theirs = ({p.data_ptr() for p in t.model.parameters() if p.numel()} for t in (first, second))
    if ours & theirs:
        raise TaskError(
            f"{name}: task returns the same model twice: it would go on training where the last trial ended. Make the model inside "
            "the function"
        )
    if digest(second.model.state_dict()) != weights:
        raise TaskError(
            f"{name}: two calls with one seed give different initial weights: something is left from one call to the next "
            "(a generator made outside of the function?). Make it inside, from the seed"
        )
    with blame(f"{name}: taking a batch", file):
        again = digest(list(islice(endless(second.batches, name), _BATCHES)))
    if again != contents:
        raise TaskError(
            f"{name}: two calls with one seed give different batches: something is left from one call to the next (an iterator or "
            "generator made outside of the function?). Make it inside, from the seed"
        )
    for what, found in (("evaluate", untrained), ("validate", validated)):
        if found is not None:
            again = _evaluate(second, what, file, device)
            _compare_numbers(found, again, f"{what}(model)", "untrained model", name, device)
    warnings += targets(batches, name)
    if first.validate and validated == untrained:
        warnings.append(
            f"{name}: validate and evaluate agree to the last digit on the untrained model: if they look at the same data, what is "
            "reported was also chosen by"
        )
    return Facts(
        kind="training",
        says=says(file),
        better=better,
        initial=untrained,
        parameters=sum(p.numel() for p in first.model.parameters() if p.requires_grad),
        schedule=first.schedule if isinstance(first.schedule, str) else "of the task's own",
        validates=first.validate is not None,
        seconds=seconds,
        evaluating=evaluating,
        identity=_identity(weights, contents, loss, untrained, validated),
        warnings=tuple(warnings),
    )


def _identity(*parts: Any) -> str:
    """A digest that changes where the task's data or model do; numbers count to five digits, which do not depend on a machine."""
    said = [f"{part:.5g}" if isinstance(part, float) else part for part in parts]
    said = [{k: f"{v:.5g}" for k, v in part.items()} if isinstance(part, Mapping) else part for part in said]
    return digest(said)


def _evaluate(task: TrainingTask, what: str, file: str, device: str) -> dict[str, float]:
    import torch

    name = Path(file).name
    task.model.eval()
    with torch.no_grad(), _random_numbers(device), blame(f"{name}: {what}(model)", file):
        found = metrics(getattr(task, what)(task.model), what, file)
    for key, value in found.items():
        if not math.isfinite(value):
            of = "" if key == what else f" for {key!r}"
            raise TaskError(f"{name}: {what} gives {value}{of} on the untrained model, before any step")
    return found


def _check_schedule(task: TrainingTask, file: str) -> None:
    name = Path(file).name
    for used in (0.0, 0.5, 1.0):
        with blame(f"{name}: schedule(used)", file):
            factor = task.factor(used)
        if not math.isfinite(factor):
            raise TaskError(
                f"{name}: schedule(used) must give finite factors of the learning rate, got {factor} at {used}"
            )


def _random_numbers(device: str) -> Generators:
    """The global generators for an evaluation, as a trial has them: the same numbers every time."""
    return Generators(device, number("evaluation", SEED))


def _compare_numbers(
    first: Mapping[str, float], second: Mapping[str, float], what: str, given: str, name: str, device: str
) -> None:
    """Those that two calls with one seed give: equal on a CPU."""
    for key in dict.fromkeys([*first, *second]):
        one, other = first.get(key, math.nan), second.get(key, math.nan)
        near = math.isclose(one, other, rel_tol=0.0 if device == "cpu" else _ROUNDING)
        if not near and not (math.isnan(one) and math.isnan(other)):
            raise TaskError(
                f"{name}: two calls with one seed give different numbers: of the same {given} {what} is {one!r}, then {other!r} "
                f"({key}). Something is left from one call to the next, or comes from no seed (held-out data from a generator "
                "made outside of the function? from os.urandom?). Make it inside, from the seed"
            )


def _left(model: nn.Module, before: _State, what: str, name: str, warnings: list[str]) -> _State:
    """A model's state after an evaluation. Changed parameters are an error; changes of what else is saved of it, a warning more."""
    after = _state(model)
    if changed := _changes(before[0], after[0]):
        raise TaskError(
            f"{name}: {what}(model) changes the model's parameters ({_listed(changed)}): an evaluation must leave them as they are"
        )
    if changed := _changes(before[1], after[1]):
        warnings.append(
            f"{name}: {what}(model) changes the model's buffers ({_listed(changed)}): running statistics take in what is evaluated "
            "on, and numbers depend on how often it is. Does it call model.train()? The model is in evaluation mode before"
        )
    return after


def _state(model: nn.Module) -> _State:
    """Digests of a model's parameters, and of what else is saved of it: running statistics, counters, but no caches."""
    model.eval()  # there are models that merge weights by it, and the mode that an evaluation leaves is no matter
    own = {key for key, _ in model.named_parameters(remove_duplicate=False)}
    parameters = {key: digest(value) for key, value in model.named_parameters()}
    return parameters, {key: digest(value) for key, value in model.state_dict().items() if key not in own}


def _changes(before: Mapping[str, str], after: Mapping[str, str]) -> list[str]:
    return [key for key in dict.fromkeys([*before, *after]) if before.get(key) != after.get(key)]


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(names[:_SHOWN])
    return shown if len(names) <= _SHOWN else f"{shown} and {len(names) - _SHOWN} more"


def _take_steps(task: TrainingTask, batches: list[Any], file: str) -> tuple[float, float]:
    """A few plain gradient steps: the loss is one finite number with a gradient. Seconds for one, and the first loss."""
    import torch

    name = Path(file).name
    task.model.train()
    took, losses = [], []
    for batch in batches:
        began = time.perf_counter()
        with blame(f"{name}: loss(model, batch)", file):
            loss = task.loss(task.model, batch)
        if not isinstance(loss, torch.Tensor) or loss.numel() != 1:
            what = f"one of shape {tuple(loss.shape)}" if isinstance(loss, torch.Tensor) else f"a {type(loss).__name__}"
            raise TaskError(f"{name}: loss(model, batch) must return a tensor of one element, got {what}")
        if not loss.requires_grad:
            raise TaskError(
                f"{name}: the loss has no gradient: it does not depend on the model's parameters, or was detached"
            )
        losses.append(float(loss.detach()))
        if not math.isfinite(losses[0]):
            raise TaskError(f"{name}: the loss of the first batch is {losses[0]}, before any step")
        with blame(f"{name}: the gradient of loss(model, batch)", file):
            loss.backward()
        with torch.no_grad():
            for p in task.model.parameters():
                if p.grad is not None:
                    p.add_(p.grad, alpha=-1e-3)
                    p.grad = None
        took.append(time.perf_counter() - began)
    return min(took), losses[0]


def _examine_sampling(first: SamplingTask, file: str, device: str) -> Facts:
    name = Path(file).name
    look = _look_at_pipeline if first.denoiser is None else _look_at_denoiser
    one = look(first, file, device)
    better = betters(first, one.numbers, file)
    # A second call with the same seed must not meet what the first one left, be it in the samples or in what judges them.
    second = _load(file, device)
    assert isinstance(second, SamplingTask)
    other = look(second, file, device)
    if one.made != other.made:
        raise TaskError(
            f"{name}: two calls with one seed give {one.of} that differ: something is left from one call to the next (a generator "
            "made outside of the function?). Make it inside, from the seed"
        )
    _compare_numbers(one.numbers, other.numbers, "metric(samples)", "samples", name, device)
    return Facts(
        kind="sampling",
        says=says(file),
        better=better,
        initial=one.numbers,
        seconds=other.seconds,
        evaluating=max(one.evaluating, other.evaluating),
        identity=_identity("" if first.denoiser is None else one.made, one.numbers),
    )


@dataclass(frozen=True, kw_only=True)
class _Look:
    """What a call of a sampling task's function gave."""

    of: str
    made: str  # a digest of the first prediction, or of a pipeline's samples
    numbers: dict[str, float]  # of these samples; where there is a denoiser, of noise
    seconds: float = 0.0  # of one evaluation
    evaluating: float


def _look_at_denoiser(task: SamplingTask, file: str, device: str) -> _Look:
    import torch

    name = Path(file).name
    process = task.process or getattr(task.denoiser, "process", None)
    if process is None:
        raise TaskError(f"{name}: the denoiser does not have a process: return one, e.g. process=VP()")
    generator = torch.Generator(device).manual_seed(SEED)
    x = process.prior(tuple(task.shape), generator=generator, dtype=task.dtype, device=device)
    began = time.perf_counter()
    with torch.no_grad(), blame(f"{name}: denoiser(x, t)", file):
        prediction = task.denoiser(x, process.t_max)
    seconds = time.perf_counter() - began
    output = getattr(prediction, "output", None)
    if not isinstance(output, torch.Tensor):
        raise TaskError(
            f"{name}: denoiser(x, t) must return a polyak.generate.Prediction, got a {type(prediction).__name__}; "
            "wrap a network in polyak.generate.Denoiser"
        )
    if not bool(output.isfinite().all()):
        raise TaskError(f"{name}: the denoiser's first prediction is not finite")
    made = digest(output)
    return _Look(of="denoisers", made=made, seconds=seconds, **_judged(task, x, file, device))


def _look_at_pipeline(task: SamplingTask, file: str, device: str) -> _Look:
    import torch

    name = Path(file).name
    generator = torch.Generator(device).manual_seed(SEED)
    if hasattr(task.pipeline, "set_progress_bar_config"):
        task.pipeline.set_progress_bar_config(disable=True)
    began = time.perf_counter()
    with torch.no_grad(), blame(f"{name}: the pipeline", file):
        made = task.pipeline(**{**task.call, "num_inference_steps": _STEPS, "generator": generator})
    seconds = (time.perf_counter() - began) / _STEPS
    samples = samples_of(made, f"{name}: the pipeline {type(task.pipeline).__name__}")
    made = digest(samples)
    return _Look(of="samples", made=made, seconds=seconds, **_judged(task, samples, file, device))


def _judged(task: SamplingTask, samples: Any, file: str, device: str) -> dict[str, Any]:
    began = time.perf_counter()
    with _random_numbers(device), blame(f"{Path(file).name}: metric(samples)", file):
        numbers = metrics(task.metric(samples), "metric", file)
    return {"numbers": numbers, "evaluating": time.perf_counter() - began}


# -- trials of several processes -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _FirstBatches:
    """A trial function: whether all ranks have the same first batches. They meet at the store that was there before them."""

    file: str

    def __call__(self, trial: Trial) -> Iterator[Measurement]:
        from torch.distributed import TCPStore

        task, own = load(self.file, trial.seed, trial.device), ""
        if isinstance(task, TrainingTask):
            batches = list(islice(endless(task.batches, Path(self.file).name), _BATCHES))
            own = digest(batches) if _is_data(batches) else ""
        store = TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
        store.set(f"polyak/{os.environ['RANK']}", own)
        found = {store.get(f"polyak/{rank}").decode() for rank in range(int(os.environ["WORLD_SIZE"]))}
        yield Measurement(values={"same": float(len(found) == 1 and "" not in found)})


def _same_batches(file: str, device: str, processes: int) -> tuple[str, ...]:
    """A warning where a task gives the same to all processes of a trial, which then do the same work."""
    name, trial = Path(file).name, Trial(claim="", scale="", task="", arm="", seed=SEED, device=device)
    job = Job(
        function=_FirstBatches(file),
        trial=trial,
        worst={"same": 0.0},
        needed=frozenset(["same"]),
        libraries=("numpy", "torch"),
        processes=processes,
    )
    found = group.carry_out(job, lambda *_: None, lambda *_: True)
    # What goes wrong here goes wrong in a trial, too, which says so.
    if not isinstance(found, Outcome) or not found.values["same"]:
        return ()
    all_ = "both" if processes == 2 else f"all {processes}"
    return (
        f"{name} gives {all_} processes of a trial the same batches: unless its loss or its model shares them out, each does the "
        "same work. Give every rank batches of its own: by torch.distributed.get_rank() or the variable RANK, with a "
        "DistributedSampler, or with accelerate",
    )


def _is_data(batches: Sequence[Any]) -> bool:
    """Whether a digest sees all of some batches, and they are more than numbers of steps, for which a loss makes its own data."""
    import numpy as np
    import torch

    data, parts = (torch.Tensor, np.ndarray, str), list(_leaves(batches))
    known = all(isinstance(part, (*data, int, float, type(None))) for part in parts)
    return known and any(isinstance(part, data) for part in parts)


def _leaves(value: Any) -> Iterator[Any]:
    if not isinstance(value, (Mapping, list, tuple)):
        yield value
        return
    for part in value.values() if isinstance(value, Mapping) else value:
        yield from _leaves(part)
