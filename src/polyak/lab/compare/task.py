"""The user's own problem: a file with one function, ``task(seed, device)``, and the checks that it is fit to compare on.

What the function returns is a :class:`TrainingTask` (for optimizers) or a :class:`SamplingTask` (for samplers), or a plain
dictionary with the same names. ``polyak init-task optim`` and ``polyak init-task sampler`` write examples.

A file is imported once per worker process and its function is called for every trial. So nothing may be left behind by one
call that another would meet: :func:`examine` calls it twice with one seed and compares.
"""

from __future__ import annotations

import difflib
import importlib.util
import math
import re
import sys
import traceback
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from functools import cache
from numbers import Real
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal

from polyak.core import checks
from polyak.core.schedules import Constant, Cosine, Linear, Schedule, Warmup
from polyak.lab.compare.generators import Generators, number
from polyak.lab.compare.spec import find

if TYPE_CHECKING:
    from torch import Tensor, nn

FUNCTION = "task"
Better = Literal["lower", "higher"]
OWN = (
    "steps",
    "seconds",
    "memory",
    "used",
    "validation",
    "train_loss",
    "evaluations",
    "processor",
)  # the lab's own measurements
# Arguments of a pipeline that a trial gives, and what decides them.
OF_A_TRIAL = {"num_inference_steps": "the budget's", "generator": "the seed's"}
_NO_RETURN = " (is there no return?)"
PARTS = 1000  # a schedule's steps from the first to the last
_WARMUP = {"cosine": 0.05, "linear": 0.05, "constant": 0.0}  # a share of the budget, where nobody says another


@cache
def shaped(name: str, warmup: float | None = None) -> Schedule:
    """A schedule over :data:`PARTS` steps; ``name`` "" is no more than its warmup, a share of these."""
    rise = round(PARTS * (_WARMUP[name] if warmup is None else warmup))
    down = {"cosine": Cosine, "linear": Linear}.get(name)
    return Warmup(down(1.0, 0.0, PARTS - rise) if down else Constant(1.0), rise)


SCHEDULES: Mapping[str, Schedule] = {name: shaped(name) for name in _WARMUP}
_MORE_IS_BETTER = ("acc", "auc", "f1", "bleu", "r2", "psnr", "ssim", "precision", "recall", "iou", "score", "reward")
_UNNAMED = ("evaluate", "metric")  # what a number is called that comes without a name
# What names that leave no doubt hold, as a part or as a word.
_LESS_IS_BETTER = ("loss", "error", "perplex", "entropy", "distance", "diverg", "residual", "regret")
_LESS_WORDS = frozenset(
    ("err", "mse", "rmse", "mae", "mape", "nll", "ppl", "fid", "kid", "kl", "wer", "cer", "cost", "bits", "bpc", "bpd")
)


class TaskError(ValueError):
    """A task file cannot be used; the message says why, in a sentence."""


class NoTaskError(TaskError):
    """There is no such file."""


_MEASURES = checks.Function("a function (model) -> number", 1)
_BETTER = checks.Choice("lower", "higher") | checks.Map(checks.Choice("lower", "higher")) | None


@checks.arguments(
    model=checks.module, batches=checks.Stream("an iterable of batches"),
    loss=checks.Function("a function (model, batch) -> loss", 2), evaluate=_MEASURES, validate=_MEASURES | None,
    better=_BETTER, params=checks.Function("a function (model) -> param groups", 1) | None,
    schedule=checks.text | checks.Function("a function of the part of the budget", 1),
)  # fmt: skip
@dataclass(kw_only=True)
class TrainingTask:
    """A model to be trained: what ``task(seed, device)`` returns where optimizers are compared.

    Args:
        model: with its initial weights, on the device.
        batches: training batches: a DataLoader, list, or other iterable (begun anew when it ends), or an endless iterator.
        loss: ``loss(model, batch)`` is the training loss, a tensor of one element.
        evaluate: ``evaluate(model)`` is a number, or ``{"name": number}`` whose first name is what the arms are compared by. On
            data that is not trained on. The model is in evaluation mode then, and gradients are off; it must stay as it is.
        validate: as ``evaluate``, on data of its own: what learning rates are chosen by. Default: ``evaluate``, and the report
            says so, since numbers by which something was chosen are a little too good.
        better: "lower" or "higher", or one for each name: ``{"accuracy": "higher"}``. Names like "loss" need none.
        params: ``params(model)`` are the param groups. Default: all parameters that need gradients, in one group.
        schedule: factor of the learning rate by the part of the budget that is used, from 0 to 1: "cosine" (up over the first
            20th, then half a cosine to 0), "linear", "constant", or a function. The same for all arms that do not have their own.
    """

    model: nn.Module
    batches: Iterable[Any]
    loss: Callable[[Any, Any], Tensor]
    evaluate: Callable[[Any], float | Mapping[str, float]]
    validate: Callable[[Any], float | Mapping[str, float]] | None = None
    better: Better | Mapping[str, Better] | None = None
    params: Callable[[Any], Any] | None = None
    schedule: str | Callable[[float], float] = "cosine"

    def factor(self, used: float) -> float:
        """The learning rate's factor where this part of the budget is used."""
        if isinstance(self.schedule, str):
            return shaped(self.schedule)(used * PARTS)
        return float(self.schedule(used))


@checks.arguments(
    metric=checks.Function("a function (samples) -> number", 1),
    denoiser=checks.Function("a function (x, t) -> prediction", 2) | None,
    shape=checks.Each(checks.Integer(0)), process=checks.anything, dtype=checks.dtype | None,
    pipeline=checks.Function("a pipeline") | None, call=checks.Map(), better=_BETTER,
)  # fmt: skip
@dataclass(kw_only=True)
class SamplingTask:
    """A model to draw samples from: what ``task(seed, device)`` returns where samplers are compared.

    Either ``denoiser`` and ``shape``, for the solvers of :mod:`polyak.generate`, or a diffusers ``pipeline``, for schedulers.

    Args:
        metric: ``metric(samples)`` is a number, or ``{"name": number}`` whose first name is what the arms are compared by.
        denoiser: a ``polyak.generate.Denoiser``, or what takes ``(x, t)`` and returns a ``Prediction``.
        shape: of the samples, ``(count, ...)``.
        process: the noise, where the denoiser does not have its own.
        dtype: of the samples, a torch dtype; None for torch's default.
        pipeline: a diffusers pipeline, on the device. ``metric`` gets the ``images`` of what it returns; where there are none, the
            first of an output or of a tuple; or the tensor, array or list itself.
        call: what the pipeline is called with: prompt, height, width, ...; neither num_inference_steps nor generator.
        better: "lower" or "higher", or one for each name.
    """

    metric: Callable[[Any], float | Mapping[str, float]]
    denoiser: Any = None
    shape: Sequence[int] = ()
    process: Any = None
    dtype: Any = None
    pipeline: Any = None
    call: Mapping[str, Any] = field(default_factory=dict)
    better: Better | Mapping[str, Better] | None = None


AnyTask = TrainingTask | SamplingTask


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What is known of a task before anything is compared on it."""

    kind: Literal["training", "sampling"]
    says: str  # the file's first line of documentation
    better: Mapping[str, Better]  # by metric; the first is what arms are compared by
    initial: Mapping[str, float] = field(default_factory=dict)  # the untrained model's metrics
    parameters: int = 0
    schedule: str = ""
    validates: bool = False  # whether what is tuned by is apart from what is reported
    seconds: float = 0.0  # of one step, or of one evaluation of the denoiser
    building: float = 0.0  # seconds of calling the function
    evaluating: float = 0.0  # seconds of one evaluation of the model
    identity: str = ""  # a digest of what the function gave: initial weights, first batches, first numbers
    warnings: tuple[str, ...] = ()

    @property
    def main(self) -> str:
        return next(iter(self.better))


# -- the file --------------------------------------------------------------------------------------------------------------


def load(file: str, seed: int, device: str) -> AnyTask:
    """Call a file's function, and check what it returns.

    Raises:
        TaskError: the file cannot be imported, lacks the function, or the function raises or returns something else.
    """
    name = Path(file).name
    # What is drawn at an import does not depend on the trial that comes first in a process, and takes nothing from it.
    with Generators(device, number("import", 0)):
        function = _function(file)
    _one_thread()
    with blame(f"{name}: {FUNCTION}(seed, device)", file):
        made = function(seed, device)
    _one_thread()
    return _checked(made, name)


def _one_thread() -> None:
    """Whatever the file asks for: at its import that would be for a process's first trial alone."""
    if torch := sys.modules.get("torch"):
        torch.set_num_threads(1)


def says(file: str) -> str:
    """The first line of a file's documentation."""
    text = (_module(file).__doc__ or "").strip()
    return text.splitlines()[0] if text else ""


def _function(file: str) -> Callable[[int, str], Any]:
    name, module = Path(file).name, _module(file)
    function = getattr(module, FUNCTION, None)
    if function is None:
        near = difflib.get_close_matches(FUNCTION, [n for n, v in vars(module).items() if callable(v)], n=1, cutoff=0.5)
        hint = f"; did you mean to call {near[0]!r} so?" if near else "."
        raise TaskError(f"{name} has no function {FUNCTION}(seed, device){hint} `polyak init-task` writes an example")
    if not callable(function):
        raise TaskError(f"{name}: {FUNCTION} must be a function {FUNCTION}(seed, device), got {function!r}")
    return function


@cache
def _module(file: str) -> ModuleType:
    path = Path(file)
    # A file may be called like a module that others need.
    taken = path.stem in sys.modules or path.stem in sys.stdlib_module_names
    spec = importlib.util.spec_from_file_location(f"_task_{path.stem}" if taken else path.stem, path)
    if spec is None or spec.loader is None:
        raise TaskError(f"{path.name} is no Python file")
    add_folder(path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    with blame(f"{path.name}: importing it", file):
        spec.loader.exec_module(module)
    return module


def add_folder(path: Path) -> None:
    """Let what is beside the file be imported, from now on; what is installed comes first, so that a random.py harms nobody."""
    folder = str(path.parent.resolve())
    if folder not in sys.path:
        sys.path.append(folder)


@contextmanager
def blame(doing: str, file: str) -> Iterator[None]:
    """Say in a sentence which of the user's code raised, and where."""
    try:
        yield
    except TaskError:
        raise
    except (Exception, SystemExit) as error:
        at = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
        line = f" ({Path(file).name}, line {at[-1]})" if at else ""
        raise TaskError(f"{doing} raised {type(error).__name__}: {error}{line}") from error


def _checked(made: Any, name: str) -> AnyTask:
    if isinstance(made, Mapping):
        kind = SamplingTask if {"denoiser", "pipeline", "metric"} & made.keys() else TrainingTask
        known = [f.name for f in fields(kind)]
        for key in made:
            if key not in known:
                hint = checks.suggestion(key, known) or "."
                raise TaskError(f"{name}: {FUNCTION} returned an unknown {key!r}{hint} Known are {', '.join(known)}")
        needed = ["metric"] if kind is SamplingTask else ["model", "batches", "loss", "evaluate"]
        if missing := [key for key in needed if key not in made]:
            raise TaskError(f"{name}: {FUNCTION} must return {', '.join(needed)}; {', '.join(missing)} is missing")
        made = kind(**made)
    if isinstance(made, TrainingTask):
        _check_training(made, name)
    elif isinstance(made, SamplingTask):
        _check_sampling(made, name)
    else:
        raise TaskError(
            f"{name}: {FUNCTION} must return a dictionary with model, batches, loss and evaluate (or denoiser, shape and metric), "
            f"got {_kind(made)}{_NO_RETURN if made is None else ''}"
        )
    return made


def _check_training(task: TrainingTask, name: str) -> None:
    from torch import nn

    _need(name, "model", isinstance(task.model, nn.Module), "a torch.nn.Module", task.model)
    _need(name, "batches", isinstance(task.batches, Iterable), "an iterable of batches", task.batches)
    _need(name, "loss", callable(task.loss), "a function loss(model, batch)", task.loss)
    _need(name, "evaluate", callable(task.evaluate), "a function evaluate(model)", task.evaluate)
    _need(
        name, "validate", task.validate is None or callable(task.validate), "a function validate(model)", task.validate
    )
    _need(name, "params", task.params is None or callable(task.params), "a function params(model)", task.params)
    known = ", ".join(SCHEDULES)
    good = task.schedule in SCHEDULES if isinstance(task.schedule, str) else callable(task.schedule)
    _need(name, "schedule", good, f"one of {known}, or a function", task.schedule)
    if not any(p.requires_grad for p in task.model.parameters()):
        raise TaskError(f"{name}: the model has no parameter that needs a gradient: there is nothing to train")


def _check_sampling(task: SamplingTask, name: str) -> None:
    import torch

    _need(name, "metric", callable(task.metric), "a function metric(samples)", task.metric)
    if (task.denoiser is None) == (task.pipeline is None):
        raise TaskError(f"{name}: {FUNCTION} must return either a denoiser or a pipeline")
    if task.denoiser is not None:
        _need(name, "denoiser", callable(task.denoiser), "a Denoiser, or a function of (x, t)", task.denoiser)
        counts = isinstance(task.shape, Sequence) and len(task.shape) > 0
        _need(
            name, "shape", counts and all(isinstance(n, int) and n > 0 for n in task.shape), "(count, ...)", task.shape
        )
        known = task.process is None or isinstance(task.process, find("polyak.generate:ProbabilityPath"))
        _need(name, "process", known, "a process of polyak.generate, e.g. VP()", task.process)
        floating = isinstance(task.dtype, torch.dtype) and task.dtype.is_floating_point
        _need(name, "dtype", task.dtype is None or floating, "a floating torch dtype, e.g. torch.float64", task.dtype)
        unused = ("call",)
    else:
        scheduled = hasattr(getattr(task.pipeline, "scheduler", None), "config")
        wanted = "a pipeline with a scheduler, which has a config"
        _need(name, "pipeline", callable(task.pipeline) and scheduled, wanted, task.pipeline)
        named = isinstance(task.call, Mapping) and all(isinstance(key, str) for key in task.call)
        _need(name, "call", named, 'a dictionary of arguments by name, e.g. {"prompt": "a cat"}', task.call)
        for key, whose in OF_A_TRIAL.items():
            if key in task.call:
                raise TaskError(f"{name}: call must not hold {key!r}, which is {whose} affair")
        unused = ("shape", "process", "dtype")
    for key in unused:
        value = getattr(task, key)
        if value is not None and not (isinstance(value, (Sequence, Mapping)) and not value):
            of = "denoiser" if task.pipeline is None else "pipeline"
            raise TaskError(f"{name}: {key} has no effect beside a {of}, got {_kind(value)}: leave it out")


def _need(name: str, what: str, good: bool, wanted: str, got: object) -> None:
    if not good:
        raise TaskError(f"{name}: {what} must be {wanted}, got {_kind(got)}")


def _kind(value: object) -> str:
    if value is None or isinstance(value, (str, int, float)):
        return repr(value)
    if isinstance(value, type):
        return f"the class {value.__name__}"
    shape = getattr(value, "shape", None)
    of = f" of shape {tuple(shape)}" if isinstance(shape, tuple) else ""  # a tensor's is one, too
    return f"a {type(value).__name__}{of}"


# -- what its functions give -----------------------------------------------------------------------------------------------


def metrics(given: Any, what: str, file: str) -> dict[str, float]:
    """The numbers that evaluate, validate or metric returned, by name; one without a name is called after ``what``.

    Raises:
        TaskError: something else was returned.
    """
    name = Path(file).name
    found = dict(given) if isinstance(given, Mapping) else {what: given}
    if not found:
        raise TaskError(f"{name}: {what} must return a number or a dictionary of numbers, got an empty one")
    for key, value in found.items():
        if hasattr(value, "item") and math.prod(getattr(value, "shape", ())) == 1:  # a tensor or array of one element
            value = value.item()
        if isinstance(value, bool) or not isinstance(value, Real):
            of = f" for {key!r}" if isinstance(given, Mapping) else ""
            hint = _NO_RETURN if given is None else ""
            raise TaskError(
                f"{name}: {what} must return a number or a dictionary of numbers, got {_kind(value)}{of}{hint}"
            )
        if not isinstance(key, str) or key in OWN:
            raise TaskError(f"{name}: {what} must not call a number {key!r}: the lab uses this name itself")
        found[key] = float(value)
    return found


def betters(task: AnyTask, names: Iterable[str], file: str) -> dict[str, Better]:
    """Whether lower or higher is better, by metric.

    Raises:
        TaskError: what is declared is neither, or names no metric; or nothing is, of a metric whose name does not say.
    """
    name, names = Path(file).name, list(names)
    declared = task.better if isinstance(task.better, Mapping) else dict.fromkeys(names, task.better)
    for key, value in declared.items():
        if key not in names:
            raise TaskError(f"{name}: better names {key!r}, which is not measured{checks.suggestion(key, names)}")
        if value not in ("lower", "higher", None):
            raise TaskError(f"{name}: better must be 'lower' or 'higher', got {value!r} for {key!r}")
    found: dict[str, Better] = {}
    for key in names:
        value = declared.get(key)
        words = set(re.split(r"[^a-z]+", key.lower()))
        less = bool(words & _LESS_WORDS) or any(part in key.lower() for part in _LESS_IS_BETTER)
        more = any(part in key.lower() for part in _MORE_IS_BETTER)
        # Of further metrics, which decide nothing, only those are asked about that look like more is better.
        if value is None and not less and (more or key == names[0]):
            raise TaskError(f"{name}: {_ask(key)}")
        found[key] = "higher" if value == "higher" else "lower"
    return found


def _ask(key: str) -> str:
    """Which is better, more or less of a metric whose name does not say?"""
    if key in _UNNAMED:
        return (
            f"is more of what {key} returns better, or less? Return better='higher' or better='lower' with the others (a name that "
            "says so, like {'loss': ...}, would do, too)"
        )
    guess = "higher" if any(word in key.lower() for word in _MORE_IS_BETTER) else "lower"
    other = "lower" if guess == "higher" else "higher"
    return f"is more of {key!r} better? Return better={{{key!r}: {guess!r}}} (or {other!r}) with the others"


def endless(batches: Iterable[Any], name: str) -> Generator[Any, None, None]:
    """Batches for ever: an iterable is begun anew when it ends.

    Raises:
        TaskError: it is empty, or an iterator that cannot be begun anew has ended.
    """
    while True:
        count = 0
        for batch in batches:
            count += 1
            yield batch
        if not count:
            raise TaskError(
                f"{name}: batches came to an end. Give a DataLoader, a list, or an iterator that does not end "
                "(a generator is used up after one pass)"
            )
