"""An arm's recipe beside its optimizer: schedule, warmup, clipping, weight averaging, a second optimizer for what is no matrix.

``adamw:schedule=linear:warmup=0.1:clip=1.0``, ``sgd:schedule=constant:ema=0.999``, ``torch.optim:Muon:rest=adamw:rest.eps=1e-6``.
An option of the optimizer's own with one of these names is the optimizer's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from polyak.core import checks
from polyak.lab.compare.spec import ArmError, Range
from polyak.lab.compare.task import PARTS, SCHEDULES, shaped

if TYPE_CHECKING:
    import torch
    from torch import nn

    from polyak.lab.compare.task import TrainingTask

NAMES = ("schedule", "warmup", "clip", "ema")
REST = "rest"  # the optimizer of what are no matrices; rest.lr=0.001 is an option of its own


def check(what: str, name: str, value: Any) -> None:
    """A recipe's option, or each end of its range; ArmError says what is allowed."""
    if name == "schedule":
        if value not in SCHEDULES:
            raise ArmError(f"{what} must be one of {', '.join(SCHEDULES)}, got {value!r}")
        return
    for one in (value.low, value.high) if isinstance(value, Range) else (value,):
        try:
            if name == "clip":
                checks.positive(what, one)
            else:
                checks.between(what, one, 0.0, 1.0, ends="[)" if name == "warmup" else "()")
        except (ValueError, TypeError) as error:
            hint = " (a share of the budget)" if name == "warmup" else ""
            raise ArmError(f"{error}{hint}") from None


@dataclass(frozen=True)
class Recipe:
    """What is not said is as the task has it.

    Args:
        schedule: of the learning rate.
        warmup: the share of the budget over which the learning rate rises.
        clip: the largest norm that the whole gradient may have.
        ema: decay of the average of weights that is evaluated in their place.
    """

    schedule: str = ""
    warmup: float | None = None
    clip: float | None = None
    ema: float | None = None

    @classmethod
    def of(cls, given: dict[str, Any], own: Mapping[str, Any]) -> Recipe:
        """Take a recipe's options out of an arm's; those that the optimizer has itself (``own``) stay."""
        return cls(**{name: given.pop(name) for name in NAMES if name in given and name not in own})

    def factor(self, task: TrainingTask, used: float) -> float:
        """The learning rate's factor where this part of the budget is used."""
        if not self.schedule and self.warmup is None:
            return task.factor(used)
        named = self.schedule or (task.schedule if isinstance(task.schedule, str) else "")
        rise = self.warmup if named or self.warmup is not None else 0.0
        return shaped(named, rise)(used * PARTS) * (1.0 if named else task.factor(used))

    def clipped(self, optimizer: torch.optim.Optimizer) -> None:
        """Clip the gradient, by the norm of all that the optimizer trains."""
        if self.clip is not None:
            import torch

            held = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
            torch.nn.utils.clip_grad_norm_(held, self.clip)


class Average:
    """An exponential average of a model's parameters, which is put in their place for evaluations; buffers stay as they are."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self._held = [p for p in model.parameters() if p.requires_grad]
        self._decay, self._steps = decay, 0
        self._average = [p.detach().clone() for p in self._held]

    def update(self) -> None:
        """Take in the weights after a step. Of early ones it is the mean, so that the initial weights are forgotten."""
        import torch

        self._steps += 1
        decay = min(self._decay, (self._steps - 1) / self._steps)
        with torch.no_grad():
            for average, p in zip(self._average, self._held, strict=True):
                average.lerp_(p.detach().to(average.dtype), 1 - decay)

    @property
    def held(self) -> list[torch.Tensor]:
        return self._average

    @contextmanager
    def in_place(self) -> Iterator[None]:
        import torch

        with torch.no_grad():
            kept = [p.detach().clone() for p in self._held]
            for p, average in zip(self._held, self._average, strict=True):
                p.copy_(average)
        try:
            yield
        finally:
            with torch.no_grad():
                for p, own in zip(self._held, kept, strict=True):
                    p.copy_(own)


class Routed:
    """Two optimizers as one: the first has the matrices, the other the rest."""

    def __init__(self, first: torch.optim.Optimizer, rest: torch.optim.Optimizer) -> None:
        self._both = [first, rest]

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return [group for one in self._both for group in one.param_groups]

    @property
    def state(self) -> dict[Any, Any]:
        return {key: value for one in self._both for key, value in one.state.items()}

    def zero_grad(self, set_to_none: bool = True) -> None:
        for one in self._both:
            one.zero_grad(set_to_none)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """A step of each, with the gradient that is there, or that the first asks for."""
        loss = self._both[0].step() if closure is None else self._both[0].step(closure)
        self._both[1].step()
        return loss

    def train(self) -> None:
        self._to("train")

    def eval(self) -> None:
        self._to("eval")

    def _to(self, mode: str) -> None:
        for one in self._both:
            to_mode(one, mode)


def to_mode(optimizer: Any, mode: str) -> None:
    """Tell an optimizer that has modes (schedule-free ones) that the model trains, or is evaluated, from now on."""
    change = getattr(optimizer, mode, None)
    if callable(change):
        change()


def matrices(model: nn.Module) -> set[int]:
    """The identities of a model's hidden matrices: neither embeddings nor, where there are others, the last layer's weight.

    That is for whom Muon is, by its authors and by PyTorch's documentation.
    """
    from torch import nn

    lookups = {id(p) for m in model.modules() if isinstance(m, (nn.Embedding, nn.EmbeddingBag)) for p in m.parameters()}
    found = [p for p in model.parameters() if p.requires_grad and p.ndim == 2 and id(p) not in lookups]
    return {id(p) for p in (found[:-1] if len(found) > 1 else found)}


def routed(params: Any, hidden: set[int]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Param groups of matrices, and of the rest, with the options that the task gave them.

    ``params``: parameters, with names or without, or groups of them.
    """
    given = list(params)
    groups = given if given and isinstance(given[0], dict) else [{"params": given}]
    parts: tuple[list[dict[str, Any]], list[dict[str, Any]]] = ([], [])
    for group in groups:
        options = {k: v for k, v in group.items() if k != "params"}
        held = group["params"] if not hasattr(group["params"], "requires_grad") else [group["params"]]
        held = [p[1] if isinstance(p, tuple) else p for p in held]
        for part, inside in zip(parts, (True, False), strict=True):
            if own := [p for p in held if (id(p) in hidden) == inside]:
                part.append({**options, "params": own})
    return parts
