"""One trial of a comparison: an optimizer trains the task's model until its budget is spent.

The clock counts what a user waits for: taking a batch, the gradient, the optimizer's step. Evaluations stop it. Batches, training
and evaluations each have global random generators of their own, so that whatever an optimizer draws, every arm meets the same
batches in the same order, and is evaluated with the same random numbers.
"""

from __future__ import annotations

import copy
import gc
import inspect
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from polyak.lab.claim import Diverged, Measurement, Trial
from polyak.lab.compare.generators import Generators, number, seed_all
from polyak.lab.compare.optimizers import BASE, OF_BASE
from polyak.lab.compare.recipe import REST, Average, Recipe, Routed, matrices, routed, to_mode
from polyak.lab.compare.spec import defaults, find
from polyak.lab.compare.task import TaskError, TrainingTask, endless, load, metrics

if TYPE_CHECKING:
    import torch
    from torch import nn

_GENTLY = 1e-6  # of the learning rate: that one is so large that the model breaks is for a trial to find
_EVERY = 8  # on an accelerator, how many steps are enqueued before the clock waits for them


@dataclass(frozen=True)
class Train:
    """The trial function for a task file: options are class, fixed, tuned, budget, points and, for tuning, main."""

    file: str

    def __call__(self, trial: Trial) -> Iterator[Measurement]:
        task = load(self.file, trial.seed, trial.device)
        if not isinstance(task, TrainingTask):
            raise TaskError(f"{Path(self.file).name}: optimizers need a task with a model, batches and a loss")
        return _train(_Training(task, self.file, trial))


class _Training:
    """A model on its way."""

    def __init__(self, task: TrainingTask, file: str, trial: Trial) -> None:
        self.task, self.file, self.name = task, file, Path(file).name
        self.device, self.options = trial.device, trial.options
        self.budget: Mapping[str, float] = trial["budget"]
        self.clock = _Clock(trial.device)
        self.for_batches = Generators(trial.device)  # they go on from where the task has left them
        self.batches = endless(task.batches, self.name)
        self.trial = trial
        self.optimizer = build(task, task.model, trial)
        self.recipe = recipe_of(trial)
        self.average = Average(task.model, self.recipe.ema) if self.recipe.ema is not None else None
        self.bases = [group["lr"] for group in self.optimizer.param_groups if "lr" in group]
        self.steps = self.gradients = 0
        self.closure = True  # whether the optimizer asks for the gradient itself, once it is warm
        self.loss: Any = 0.0
        self.since = 0  # gradients that the loss has been summed over

    @property
    def used(self) -> float:
        """The part of the budget that is spent."""
        if "steps" in self.budget:
            return self.steps / self.budget["steps"]
        if "gradients" in self.budget:
            return min(self.gradients / self.budget["gradients"], 1.0)  # a step may take more than are left
        return min(self.clock.seconds / self.budget["seconds"], 1.0)

    def step(self) -> None:
        with self.for_batches, self.clock:
            batch = next(self.batches)
        with self._may_diverge(lambda: self.task.loss(self.task.model, batch)), self.clock:
            self._set_rates()
            if self.closure:
                self.optimizer.step(lambda: self._gradient(batch))
            else:
                self._gradient(batch)
                self.optimizer.step()
            if self.average:
                self.average.update()
            self.steps += 1
            if "seconds" in self.budget and self.steps % _EVERY == 0:
                self.clock.wait()

    def warm_up(self) -> None:
        """Two steps on what another call of the task's function gives, off the clock, so that this one's is as it was.

        What is compiled or loaded at a first step is no cost of training.
        """
        with Generators(self.device):
            other = load(self.file, self.trial.seed, self.device)
            assert isinstance(other, TrainingTask)
            batches = endless(other.batches, self.name)
            model = other.model.train()
            self.closure = rehearse(other, model, build(other, model, self.trial), next(batches), self.recipe)
        del other, model, batches
        gc.collect()  # an optimizer's hooks and its model hold each other
        if self.device != "cpu":
            import torch

            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)  # what was warmed up with is gone

    def _set_rates(self) -> None:
        factor = self.recipe.factor(self.task, self.used)
        groups = (group for group in self.optimizer.param_groups if "lr" in group)
        for group, base in zip(groups, self.bases, strict=True):
            group["lr"] = base * factor

    def _gradient(self, batch: Any) -> Any:
        loss = _gradient(self.task, self.task.model, self.optimizer, batch, self.recipe)
        self.loss = self.loss + loss.detach()
        self.gradients += 1
        self.since += 1
        return loss

    def mean_loss(self) -> float:
        """The training loss since it was last asked for.

        Raises:
            Diverged: it is not finite.
        """
        mean, self.loss, self.since = float(self.loss) / max(self.since, 1), 0.0, 0
        if not math.isfinite(mean):
            raise Diverged(f"training loss {mean} by step {self.steps}")
        return mean

    def evaluated(self) -> dict[str, float]:
        """The model's metrics; for tuning the one that is tuned by, as "validation".

        Raises:
            Diverged: one is not finite.
        """
        import torch

        main = self.options.get("main")
        function = self.task.evaluate if main is None else self.task.validate or self.task.evaluate
        what = "validate" if main is not None and self.task.validate else "evaluate"
        self.task.model.eval()
        to_mode(self.optimizer, "eval")
        # The same numbers every time: an arm that is evaluated less often, at long steps, is not evaluated with others.
        seeded = Generators(self.device, number("evaluation", self.trial.seed))
        with torch.no_grad(), seeded, self.average.in_place() if self.average else nullcontext():
            with self._may_diverge(lambda: function(self.task.model)):
                given = function(self.task.model)
            found = metrics(given, what, self.file)
        to_mode(self.optimizer, "train")
        self.task.model.train()
        if main is not None:
            found = {"validation": found[main] if main in found else next(iter(found.values()))}
        if bad := {name: value for name, value in found.items() if not math.isfinite(value)}:
            name, value = next(iter(bad.items()))
            raise Diverged(f"{name} is {value} at step {self.steps}")
        return found

    @contextmanager
    def _may_diverge(self, again: Callable[[], Any]) -> Iterator[None]:
        """An error where numbers are not finite is divergence: many losses, metrics and decompositions refuse NaN."""
        try:
            yield
        except Exception as error:
            if not self._is_finite(again):
                raise Diverged(f"{type(error).__name__} at step {self.steps}: {error}") from error
            raise

    def _is_finite(self, again: Callable[[], Any]) -> bool:
        """Whether squares of parameters and gradients are, and the modules give no NaN as a call is made again."""
        import torch

        held = [t for p in self.task.model.parameters() for t in (p.detach(), p.grad) if t is not None]
        finite = all(bool(t.abs().le(torch.finfo(t.dtype).max ** 0.5).all()) for t in held)
        given: list[torch.Tensor] = []
        hooks = [
            m.register_forward_hook(lambda *passed: given.extend(_tensors(passed[-1])))
            for m in self.task.model.modules()
        ]
        try:
            with torch.no_grad(), suppress(Exception):
                again()
        finally:
            for hook in hooks:
                hook.remove()
        return finite and not any(bool(t.isnan().any()) for t in given)

    def memory(self) -> float:
        """Megabytes: the accelerator's peak; on a CPU parameters, gradients and the optimizer's state."""
        import torch

        if self.device != "cpu":
            return torch.cuda.max_memory_allocated(self.device) / 1e6
        held = [p for group in self.optimizer.param_groups for p in group["params"]]
        held += [p.grad for p in held if p.grad is not None]
        held += list(_tensors(self.optimizer.state)) + (self.average.held if self.average else [])
        return sum(t.numel() * t.element_size() for t in {id(t): t for t in held}.values()) / 1e6


def _train(training: _Training) -> Iterator[Measurement]:
    points = training.options["points"]
    training.task.model.train()
    training.warm_up()
    to_mode(training.optimizer, "train")
    seed_all(number("training", training.trial.seed), training.device)
    yield Measurement(values=training.evaluated(), at={"used": 0.0, "step": 0, "seconds": 0.0, "gradients": 0})
    done, loss, found = 0, 0.0, {}
    while training.used < 1.0:
        training.step()
        # One long step may pass several of the points at which is measured: the last one counts.
        passed = math.floor(training.used * points + 1e-9)
        if passed > done:
            done = passed
            training.clock.wait()
            at = {"used": done / points, "step": training.steps, "seconds": training.clock.seconds}
            at["gradients"] = training.gradients
            loss, found = training.mean_loss(), training.evaluated()
            yield Measurement(values={**found, "train_loss": loss}, at=at)
    final = {"steps": training.steps, "evaluations": training.gradients, "seconds": training.clock.seconds}
    final["processor"] = training.clock.processor / training.clock.seconds
    yield Measurement(values={**found, **final, "train_loss": loss, "memory": training.memory()})


def _given(options: Trial | Mapping[str, Any]) -> dict[str, Any]:
    """An arm's fixed and tuned options. JSON, through which they come, has lists where optimizers have tuples."""
    given = {**options["fixed"], **{name: options[name] for name in options["tuned"]}}
    return {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}


def recipe_of(options: Trial | Mapping[str, Any]) -> Recipe:
    """What an arm is beside its optimizer."""
    return Recipe.of(_given(options), defaults(find(options["class"]))[0])


def build(task: TrainingTask, model: nn.Module, options: Trial | Mapping[str, Any]) -> Any:
    """The arm's optimizer over a model's parameters, with its fixed and tuned options."""
    params = task.params(model) if task.params else [p for p in model.parameters() if p.requires_grad]
    given, cls = _given(options), find(options["class"])
    Recipe.of(given, defaults(cls)[0])  # takes out what is not the optimizer's
    if REST in given and REST not in defaults(cls)[0]:
        return _routed(cls, params, model, given)
    if BASE not in given:
        return cls(params, **given)
    inner = {n.removeprefix(f"{BASE}."): given.pop(n) for n in list(given) if n.startswith(f"{BASE}.")}
    inner |= {name: given.pop(name) for name in OF_BASE if name in given}
    return cls(model, find(str(given.pop(BASE)))(params, **inner), **given)


def _routed(cls: Any, params: Any, model: nn.Module, given: dict[str, Any]) -> Any:
    """An optimizer for hidden matrices, and another for the rest."""
    other = find(str(given.pop(REST)))
    inner = {n.removeprefix(f"{REST}."): given.pop(n) for n in list(given) if n.startswith(f"{REST}.")}
    if "weight_decay" in given and "weight_decay" in defaults(other)[0]:
        inner.setdefault("weight_decay", given["weight_decay"])
    hidden, rest = routed(params, matrices(model))
    if not hidden:
        raise ValueError("the model has no hidden matrix")
    first = cls(hidden, **given)
    return Routed(first, other(rest, **inner)) if rest else first


def rehearse(
    task: TrainingTask, model: nn.Module, optimizer: torch.optim.Optimizer, batch: Any, recipe: Recipe
) -> bool:
    """Take two steps. Whether the optimizer asks for the gradient itself, by calling what its ``step`` is given.

    Many do not: they take the gradient that is there, and some have a ``step`` that is given nothing.
    """
    calls = 0

    def closure() -> Any:
        nonlocal calls
        calls += 1
        return _gradient(task, model, optimizer, copied(batch), recipe)

    takes_one = _takes_closure(optimizer)
    for group in optimizer.param_groups:
        if "lr" in group:
            group["lr"] = group["lr"] * _GENTLY
    for _ in range(2):
        to_mode(optimizer, "train")
        _gradient(task, model, optimizer, copied(batch), recipe)
        optimizer.step(closure) if takes_one else optimizer.step()
        to_mode(optimizer, "eval")
    return calls > 0


def copied(batch: Any) -> Any:
    """A batch for a loss that changes it; one that cannot be copied is given as it is."""
    try:
        return copy.deepcopy(batch)
    except Exception:
        return batch


def _takes_closure(optimizer: torch.optim.Optimizer) -> bool:
    try:
        return bool(inspect.signature(optimizer.step).parameters)
    except (TypeError, ValueError):
        return True


def _gradient(
    task: TrainingTask, model: nn.Module, optimizer: torch.optim.Optimizer, batch: Any, recipe: Recipe
) -> Any:
    """The loss of a batch, a tensor of one element, with its gradient in the parameters."""
    optimizer.zero_grad()
    loss = task.loss(model, batch)
    loss.backward()
    recipe.clipped(optimizer)
    return loss


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    import torch

    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from _tensors(part)
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from _tensors(part)


class _Clock:
    """Seconds inside of its ``with`` blocks, and for how many of them this process had a processor."""

    def __init__(self, device: str) -> None:
        self.seconds, self.processor = 0.0, 0.0
        self._device, self._began, self._processor_began = device, 0.0, 0.0

    def __enter__(self) -> None:
        self._began, self._processor_began = time.perf_counter(), time.process_time()

    def __exit__(self, *_: object) -> None:
        self.seconds += time.perf_counter() - self._began
        self.processor += time.process_time() - self._processor_began
        self._began = 0.0

    def wait(self) -> None:
        """Let the accelerator end what it was given, on this clock."""
        if self._device != "cpu":
            import torch

            began = time.perf_counter()
            torch.cuda.synchronize(self._device)
            if not self._began:
                self.seconds += time.perf_counter() - began
