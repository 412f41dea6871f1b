"""Facts about each optimizer, from which :func:`names`, :func:`info` and :func:`create` are made."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from fnmatch import fnmatchcase
from importlib import import_module
from typing import Any

import torch

from polyak.core import checks
from polyak.optim._engine.options import Params

_RANGE = checks.Each(checks.positive, count=2) | None


@checks.arguments(
    name=checks.text, part=checks.text, says=checks.text, wraps=checks.flag, lr=_RANGE, weight_decay=_RANGE,
    relation=checks.text,
)  # fmt: skip
@dataclass(frozen=True, kw_only=True)
class Info:
    """What is known of an optimizer without making one.

    Attributes:
        name: what :func:`create` calls it.
        part: its module and class, "polyak.optim.adan:Adan".
        says: what it is, in a line.
        wraps: whether it is made of a module and a base optimizer instead of parameters.
        lr: its best learning rate over AdamW's, from and to; None where it has none of its own.
        weight_decay: its weight decay over AdamW's, likewise.
        relation: who says so.
    """

    name: str
    part: str
    says: str
    wraps: bool = False
    lr: tuple[float, float] | None = (1.0, 1.0)
    weight_decay: tuple[float, float] | None = (1.0, 1.0)
    relation: str = "AdamW's usual values"

    @property
    def optimizer(self) -> type[torch.optim.Optimizer]:
        """The class."""
        module, _, name = self.part.partition(":")
        return getattr(import_module(module), name)


_SGD = {
    "lr": (100.0, 100.0),
    "weight_decay": (0.05, 0.05),
    "relation": "usual for SGD: learning rate 0.1, weight decay 5e-4",
}
_LION = {
    "lr": (0.1, 1 / 3),
    "weight_decay": (3.0, 10.0),
    "relation": "Lion's paper: a third to a tenth of AdamW's learning rate, 3 to 10 times its weight decay",
}
_FACTS = {
    fact.name: fact
    for fact in (
        Info(
            name="adan", part="polyak.optim.adan:Adan",
            says="Adam-like steps from a Nesterov gradient that needs no second evaluation (arXiv 2208.06677)",
            lr=(5.0, 10.0), weight_decay=(2.0, 2.0),
            relation="its paper: 5 to 10 times AdamW's learning rate, weight decay 0.02",
        ),
        Info(
            name="lion", part="polyak.optim.lion:Lion",
            says="the sign of a momentum that looks ahead; one state per parameter (arXiv 2302.06675)", **_LION,
        ),
        Info(
            name="lionk", part="polyak.optim.lion:LionK",
            says="Lion with the gradient of any convex K in place of the sign (arXiv 2310.05898)", **_LION,
        ),
        Info(
            name="adamp", part="polyak.optim.adamp:AdamP",
            says="AdamW whose steps do not grow scale-invariant weights (arXiv 2006.08217)",
        ),
        Info(
            name="sgdp", part="polyak.optim.adamp:SGDP",
            says="SGD with momentum whose steps do not grow scale-invariant weights (arXiv 2006.08217)", **_SGD,
        ),
        Info(
            name="spam", part="polyak.optim.spam:SPAM",
            says="Adam that clips spikes, resets its momentum and can keep a part of it (arXiv 2501.06842)",
        ),
        Info(
            name="mkor", part="polyak.optim.mkor:MKOR", wraps=True, lr=None, weight_decay=None, relation="its base's",
            says="second-order preconditioning in O(d^2) around any optimizer, by rank-1 updates (arXiv 2306.01685)",
        ),
        Info(
            name="mkorh", part="polyak.optim.mkor:MKORH", wraps=True, lr=None, weight_decay=None, relation="its base's",
            says="MKOR that falls back to the optimizer inside when its progress slows (arXiv 2306.01685)",
        ),
        Info(
            name="monna", part="polyak.optim.monna:MoNNA",
            says="SGD with momentum in many processes, some of them faulty: means of nearest neighbours (arXiv 2209.10931)", **_SGD,
        ),
    )
}  # fmt: skip


@checks.arguments(pattern=checks.text)
def names(pattern: str = "*") -> list[str]:
    """The optimizers' names, sorted; only those that match a shell-like pattern, as in ``names("ada*")``."""
    return sorted(name for name in _FACTS if fnmatchcase(name, pattern))


@checks.arguments(name=checks.Text(empty=True))
def info(name: str) -> Info:
    """The facts about one optimizer.

    Raises:
        ValueError: there is none of this name.
    """
    if not isinstance(name, str) or name not in _FACTS:
        raise ValueError(
            f"name: there is no optimizer {checks.shown(name)}{checks.suggestion(name, _FACTS)} (polyak.optim.names() lists all)"
        )
    return _FACTS[name]


@checks.arguments(name=checks.text, params=checks.module | Params())
def create(name: str, params: Any, **options: Any) -> torch.optim.Optimizer:
    """An optimizer by its name.

    Args:
        name: one of :func:`names`.
        params: parameters, param groups, or a module, whose trainable parameters are taken.
        options: the optimizer's own.

    Raises:
        ValueError: there is no optimizer of this name, or a value is not allowed.
        TypeError: the optimizer has no such option.

    Example:
        >>> optimizer = polyak.optim.create("adan", model, lr=1e-2, weight_decay=0.02)
        >>> optimizer = polyak.optim.create("mkor", model, base=optimizer)  # those that wrap are given the module itself
    """
    facts = info(name)
    allowed = _options(facts.optimizer)
    for option in options:
        if option not in allowed:
            raise TypeError(f"{name} has no option {option!r}{checks.suggestion(option, allowed)}")
    given: Any = params
    if isinstance(params, torch.nn.Module) and not facts.wraps:
        given = [p for p in params.parameters() if p.requires_grad]
    return facts.optimizer(given, **options)


def _options(optimizer: type[torch.optim.Optimizer]) -> list[str]:
    """The names of a class's options; where it hands some on to the class it is made of, of that one's, too."""
    parameters = list(inspect.signature(optimizer).parameters.values())[1:]
    names = [p.name for p in parameters if p.kind is not p.VAR_KEYWORD]
    above = optimizer.__mro__[1]
    return names if len(names) == len(parameters) else [*names, *(o for o in _options(above) if o not in names)]
