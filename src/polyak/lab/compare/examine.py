"""Examining a task before it is compared on: does it run, is it a pure function of its seed, are targets among its inputs?

:func:`examine` runs in a process of its own, so that what the user's code does to it is forgotten.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from polyak.lab import group
from polyak.lab.compare.contents import digest, targets
from polyak.lab.compare.generators import Generators, number
from polyak.lab.compare.leaks import changed, held
from polyak.lab.compare.ranks import BATCHES, SEED, same_batches
from polyak.lab.compare.sampling import samples_of
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
from polyak.lab.compare.trial import copied
from polyak.lab.workers import call_apart, settle

if TYPE_CHECKING:
    from torch import nn

_State = tuple[dict[str, str], dict[str, str]]  # digests of parameters, and of what else is saved

_STEPS = 2  # of a pipeline that is looked at
_SHOWN = 3  # names in a message
_PATIENCE_S = 120.0  # with a process of its own, where a cause is looked for
_ROUNDING = 1e-3  # relative, of an accelerator, which may sum in another order every time


def examine(file: str, device: str, processes: int = 1) -> Facts | str:
    """The facts of a task, or what is wrong with it, in a sentence. ``processes``: of each trial."""
    # First, while this process holds nothing on an accelerator.
    same = same_batches(file, device, processes) if processes > 1 else ()
    with group.of_one() if processes > 1 else nullcontext():
        found = _examine(file, device)
    return found if isinstance(found, str) else replace(found, warnings=(*same, *found.warnings))


def _examine(file: str, device: str) -> Facts | str:
    try:
        began = time.perf_counter()
        first = fresh(file, device)
        building = time.perf_counter() - began
        if isinstance(first, SamplingTask):
            return replace(_examine_sampling(first, file, device), building=building)
        return replace(_examine_training(first, file, device), building=building)
    except TaskError as error:
        return str(error)


def fresh(file: str, device: str) -> AnyTask:
    settle(("numpy", "torch"), SEED)
    return load(file, SEED, device)


def _examine_training(first: TrainingTask, file: str, device: str) -> Facts:
    name = Path(file).name
    weights = digest(first.model.state_dict())
    with blame(f"{name}: taking a batch", file):
        batches = list(islice(endless(first.batches, name), BATCHES))
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
    seconds, losses = _take_steps(first, batches, file, device)
    # A second call with the same seed must not meet what the first one left: trained weights, drawn random numbers.
    second = fresh(file, device)
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
        again = digest(list(islice(endless(second.batches, name), BATCHES)))
    if again != contents:
        raise TaskError(
            f"{name}: two calls with one seed give different batches: something is left from one call to the next (an iterator or "
            "generator made outside of the function?). Make it inside, from the seed"
        )
    for what, found in (("evaluate", untrained), ("validate", validated)):
        if found is not None:
            again = _evaluate(second, what, file, device)
            retry = partial(_evaluate_anew, what, file, device)
            _compare_numbers(found, again, retry, f"{what}(model)", "untrained model", file, device)
    _compare_losses(losses, _take_steps(second, batches, file, device)[1], file, device)
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
        identity=_identity(weights, contents, losses[0], untrained, validated),
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


def _evaluate_anew(what: str, file: str, device: str) -> None:
    task = fresh(file, device)
    assert isinstance(task, TrainingTask)
    _evaluate(task, what, file, device)


def _compare_numbers(
    first: Mapping[str, float],
    second: Mapping[str, float],
    retry: Callable[[], object],
    what: str,
    given: str,
    file: str,
    device: str,
) -> None:
    """Those that two calls with one seed give: equal on a CPU. ``retry``: makes them once more, so that the cause is seen."""
    for key in dict.fromkeys([*first, *second]):
        one, other = first.get(key, math.nan), second.get(key, math.nan)
        near = math.isclose(one, other, rel_tol=0.0 if device == "cpu" else _ROUNDING)
        if not near and not (math.isnan(one) and math.isnan(other)):
            before = held(file)
            retry()
            names = changed(before, held(file))
            why = (
                f"{names} outside of the function changes with each"
                if names
                else "Something is left from one call to the next, or comes from no seed (held-out data from a generator made "
                "outside of the function? from os.urandom?)"
            )
            raise TaskError(
                f"{Path(file).name}: two calls with one seed give different numbers: of the same {given} {what} is {one!r}, then "
                f"{other!r} ({key}). {why}. Make it inside, from the seed"
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


def _take_steps(task: TrainingTask, batches: list[Any], file: str, device: str) -> tuple[float, list[float]]:
    """A few plain gradient steps: the loss is one finite number with a gradient. Seconds for one, and the losses.

    Last comes the loss of the first batch again, which all that the steps have done is in.
    """
    import torch

    name = Path(file).name
    task.model.train()
    took, losses = [], []
    numbers = Generators(device, number("steps", SEED))
    for batch in map(copied, [*batches, batches[0]]):
        began = time.perf_counter()
        with blame(f"{name}: loss(model, batch)", file), numbers:
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
    return min(took), losses


def _compare_losses(first: list[float], second: list[float], file: str, device: str) -> None:
    """Those of the same steps, on what two calls with one seed give: equal on a CPU."""
    for step, (one, other) in enumerate(zip(first, second, strict=True), 1):
        near = math.isclose(one, other, rel_tol=0.0 if device == "cpu" else _ROUNDING)
        if not near and not (math.isnan(one) and math.isnan(other)):
            raise TaskError(
                f"{Path(file).name}: the same steps, taken twice in one process, give different numbers: the training loss of step "
                f"{step} is {one!r}, then {other!r}. {cause(first, file, device)}"
            )


def losses_of(file: str, device: str) -> list[float]:
    """The losses of a few steps on what a call gives."""
    task = fresh(file, device)
    assert isinstance(task, TrainingTask)
    batches = list(islice(endless(task.batches, Path(file).name), BATCHES))
    return _take_steps(task, batches, file, device)[1]


def cause(first: list[float], file: str, device: str) -> str:
    """Why two trials differ, in a sentence: by what the task's modules hold, and by what a process of its own finds."""
    before = held(file)
    losses_of(file, device)
    if names := changed(before, held(file)):
        return f"{names} outside of task(seed, device) changes from trial to trial: make it inside of the function"
    try:
        found = [call_apart(losses_of, file, device, timeout=_PATIENCE_S) for _ in range(2)]
    except (RuntimeError, TimeoutError):
        found = []
    if len(found) == 2 and found[0] != found[1]:
        return "In new processes they differ, too: something is drawn from no seed (os.urandom? the time?). Take it from the seed"
    return "Something is left from one trial to the next (in an imported package? in a file?). Make it inside of the function"


def _examine_sampling(first: SamplingTask, file: str, device: str) -> Facts:
    name = Path(file).name
    look = _look_at_pipeline if first.denoiser is None else _look_at_denoiser
    one = look(first, file, device)
    better = betters(first, one.numbers, file)
    # A second call with the same seed must not meet what the first one left, be it in the samples or in what judges them.
    second = fresh(file, device)
    assert isinstance(second, SamplingTask)
    other = look(second, file, device)
    if one.made != other.made:
        raise TaskError(
            f"{name}: two calls with one seed give {one.of} that differ: something is left from one call to the next (a generator "
            "made outside of the function?). Make it inside, from the seed"
        )

    def retry() -> None:
        third = fresh(file, device)
        assert isinstance(third, SamplingTask)
        look(third, file, device)

    _compare_numbers(one.numbers, other.numbers, retry, "metric(samples)", "samples", file, device)
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
