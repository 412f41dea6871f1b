"""Attacks on robust means, for simulations: what f colluding workers send who see every honest vector of the step.

With a the mean and s the standard deviation (per coordinate, ddof 1) of what the honest workers send:

    sign flip          -a                                     FOE   (1 - z) a      (fall of empires, arXiv 1903.03936)
    scaled sign flip   -a h / f   (h honest workers)          ALIE  a + z s        (a little is enough, arXiv 1902.06156)
    label flip         a - lr * (mean gradient on flipped labels)
    mimic              the first honest worker's vector (arXiv 2006.09365)
    NaN                NaN everywhere

Where FOE and ALIE are given no z, they search each step for the one that moves the mixed honest mean farthest from a. All f
workers send the same vector, to everyone.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from polyak.core import checks

__all__ = ["ALIE", "FOE", "Attack", "LabelFlip", "Mimic", "NaN", "ScaledSignFlip", "SignFlip", "View", "line_search"]


@checks.arguments(
    honest=checks.Tensor(ndim=2), f=checks.Integer(0), mix=checks.Function("a function of a vector", 1),
    flipped=checks.Function("a function of a change of targets", 1), lr=checks.non_negative | None,
)  # fmt: skip
@dataclass(frozen=True)
class View:
    """What attackers know of a step.

    Attributes:
        honest: (h, d), what the honest workers send.
        f: how many attackers there are.
        mix: (d,) -> (h, d), what the honest workers would have after mixing if every attacker sent this vector.
        flipped: targets' change -> (d,), the honest workers' mean gradient, at the parameters before the step, on targets
            that it changes.
        lr: the learning rate of the step; None where gradients are what is sent.
    """

    honest: Tensor
    f: int
    mix: Callable[[Tensor], Tensor]
    flipped: Callable[[Callable[[Tensor], Tensor]], Tensor]
    lr: float | None


class Attack(Protocol):
    """A function of the :class:`View` that returns the vector (d,) that every attacker sends."""

    def __call__(self, view: View) -> Tensor: ...


@checks.arguments(
    objective=checks.Function("a function of z", 1), evaluations=checks.Integer(1), start=checks.non_negative,
    delta=checks.positive, shrink=checks.Number(0.0, 1.0, "()"),
)  # fmt: skip
def line_search(
    objective: Callable[[float], float], *, evaluations: int = 16, start: float = 0.0, delta: float = 1.0,
    shrink: float = 0.8,
) -> float:  # fmt: skip
    """The z >= 0 with the largest objective seen: steps that double while it grows, then ever smaller ones around the best."""
    best, value = start, objective(start)
    used, expanding, side = 1, True, 1.0
    while used < evaluations:
        z = max(0.0, best + side * delta)
        found = objective(z)
        used += 1
        if found > value:
            best, value = z, found
            delta *= 2.0 if expanding else shrink
            continue
        side, expanding = 1.0 if expanding else -side, False
        delta *= shrink
    return best


class SignFlip:
    """``-a``."""

    def __call__(self, view: View) -> Tensor:
        return -view.honest.mean(0)


class ScaledSignFlip:
    """``-a h / f``: a plain mean becomes zero."""

    def __call__(self, view: View) -> Tensor:
        return view.honest.mean(0) * (-len(view.honest) / view.f)


class _Searching:
    """An attack along a direction, of a given strength or the strongest that a line search finds.

    Args:
        z: the strength; None searches each step, by ``evaluations`` trial mixtures. Waits for the device.
    """

    @checks.arguments(z=checks.real | None, evaluations=checks.Integer(1))
    def __init__(self, z: float | None = None, *, evaluations: int = 16) -> None:
        self.z, self.evaluations = z, evaluations

    def direction(self, honest: Tensor, mean: Tensor) -> Tensor:
        raise NotImplementedError

    def __call__(self, view: View) -> Tensor:
        mean = view.honest.mean(0)
        along = self.direction(view.honest, mean)
        if self.z is not None:
            return mean + self.z * along

        def moved(z: float) -> float:
            distance = (view.mix(mean + z * along).mean(0) - mean).square().sum().item()
            return distance if math.isfinite(distance) else -math.inf

        return mean + line_search(moved, evaluations=self.evaluations) * along


class ALIE(_Searching):
    """``a + z s``: a shift that hides in the honest workers' spread."""

    def direction(self, honest: Tensor, mean: Tensor) -> Tensor:
        return honest.std(0, correction=1)


class FOE(_Searching):
    """``(1 - z) a``: the mean, shortened or turned round."""

    def direction(self, honest: Tensor, mean: Tensor) -> Tensor:
        return -mean


class LabelFlip:
    """Trains honestly from the honest mean on labels ``classes - 1 - y``."""

    @checks.arguments(classes=checks.Integer(2))
    def __init__(self, classes: int = 10) -> None:
        self.classes = classes

    def __call__(self, view: View) -> Tensor:
        gradient = view.flipped(lambda y: self.classes - 1 - y)
        return gradient if view.lr is None else view.honest.mean(0) - view.lr * gradient


class Mimic:
    """The vector of one honest worker, over and over: its data count more than the others'."""

    @checks.arguments(worker=checks.Integer(0))
    def __init__(self, worker: int = 0) -> None:
        self.worker = worker

    def __call__(self, view: View) -> Tensor:
        return view.honest[self.worker]


class NaN:
    """Not a number, in every place."""

    def __call__(self, view: View) -> Tensor:
        return torch.full_like(view.honest[0], math.nan)
