"""Momentum and averages: each recurrence once, for optimizers, teachers, layers and samplers alike.

The functions in the first part are the recurrences themselves: pure, on numbers, tensors or traced values. Those in the
second part apply them to tensors or to nested containers of tensors (dicts, lists, tuples), in place (a trailing
underscore, one multi-tensor call per container) or functionally.

Sources: B. T. Polyak, "Some methods of speeding up the convergence of iteration methods" (1964): heavy ball; Y. Nesterov
(1983): look-ahead; B. T. Polyak and A. B. Juditsky (1992): averaging; Xie et al., arXiv 2208.06677: Nesterov momentum
estimation without the look-ahead gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.utils import _pytree as pytree

from polyak.core import checks
from polyak.core.elementwise import Operand, axpy

Tree = Any  # a tensor, or dicts, lists and tuples of such, nested


class _Tree(checks.Kind):
    words = "a tensor, or dicts, lists and tuples of tensors"

    def like(self, value: Any) -> bool:
        return all(isinstance(leaf, torch.Tensor) for leaf in pytree.tree_leaves(value))

    def __call__(self, name: str, value: Any) -> Tree:
        for leaf in pytree.tree_leaves(value):
            if not isinstance(leaf, torch.Tensor):
                raise TypeError(f"{name} must hold tensors only, got {type(leaf).__name__}")
        return value


_TREE, _RATE, _FACTOR = _Tree(), checks.Operand(checks.fraction), checks.Operand(checks.real)
_BALL = dict(velocity=checks.operand, gradient=checks.operand, beta=_FACTOR, weight=_FACTOR)
_BALLS = dict(velocity=_TREE, gradient=_TREE, beta=checks.real, weight=checks.real)


@checks.operands(**_BALL)
def heavy_ball(velocity: Operand, gradient: Operand, beta: float, weight: float = 1.0) -> Any:
    """Polyak's heavy ball: ``beta v + weight g``. ``weight=1-beta`` makes it the exponential average."""
    return axpy(weight, gradient, beta * velocity)


@checks.operands(average=checks.operand, value=checks.operand, beta=_RATE)
def ema(average: Operand, value: Operand, beta: float) -> Any:
    """Exponential moving average with retention ``beta``: ``beta a + (1 - beta) x``."""
    return axpy(1 - beta, value, beta * average)


@checks.operands(**_BALL)
def nesterov(velocity: Operand, gradient: Operand, beta: float, weight: float = 1.0) -> Any:
    """Nesterov's look-ahead on an already updated velocity: ``beta v + weight g``, the step to take."""
    return axpy(weight, gradient, beta * velocity)


@checks.operands(momentum=checks.operand, gradient=checks.operand, previous=checks.operand, beta=_FACTOR)
def nesterov_estimate(momentum: Operand, gradient: Operand, previous: Operand, beta: float) -> Any:
    """Nesterov momentum from successive gradients, no look-ahead point: ``beta m + g + beta (g - g_prev)``.

    With ``g_prev = 0`` at the first step, ``y - lr m`` visits Nesterov's look-ahead points (Adan, Lemma 1).
    """
    return axpy(beta, gradient - previous, axpy(beta, momentum, gradient))


@checks.operands(beta=_RATE, step=checks.operand)
def bias_correction(beta: float, step: Operand) -> Any:
    """``1 - beta^step``: what an average started at zero has to be divided by after ``step`` updates."""
    return 1 - beta**step


def _leaves(**two: Tree) -> tuple[list[list[torch.Tensor]], pytree.TreeSpec]:
    names = " and ".join(two)
    (first, spec), (second, other) = (pytree.tree_flatten(tree) for tree in two.values())
    if other != spec:
        raise ValueError(f"{names} differ in structure: {spec} and {other}")
    for a, b in zip(first, second, strict=True):
        if a.shape != b.shape:
            raise ValueError(f"{names} differ in shape: {[tuple(a.shape), tuple(b.shape)]}")
    return [first, second], spec


@checks.operands(average=_TREE, value=_TREE, beta=checks.fraction)
def ema_tree(average: Tree, value: Tree, beta: float) -> Tree:
    """:func:`ema` on tensors or nested containers of tensors of equal structure and shapes; new tensors are returned."""
    (averages, values), spec = _leaves(average=average, value=value)
    return pytree.tree_unflatten([ema(a, v, beta) for a, v in zip(averages, values, strict=True)], spec)


@checks.operands(average=_TREE, value=_TREE, beta=checks.fraction)
@torch.no_grad()
def ema_(average: Tree, value: Tree, beta: float) -> Tree:
    """:func:`ema` in place on ``average``, which is returned; floating-point leaves are averaged, others copied."""
    (averages, values), _ = _leaves(average=average, value=value)
    moving = [i for i, a in enumerate(averages) if a.is_floating_point() or a.is_complex()]
    if moving:
        old, new = [averages[i] for i in moving], [values[i] for i in moving]
        torch._foreach_mul_(old, beta)
        torch._foreach_add_(old, _like(new, old), alpha=1 - beta)
    for i in set(range(len(averages))) - set(moving):
        averages[i].copy_(values[i])
    return average


@checks.operands(**_BALLS)
def heavy_ball_tree(velocity: Tree, gradient: Tree, beta: float, weight: float = 1.0) -> Tree:
    """:func:`heavy_ball` on tensors or nested containers of tensors; new tensors are returned."""
    (velocities, gradients), spec = _leaves(velocity=velocity, gradient=gradient)
    new = [heavy_ball(v, g, beta, weight) for v, g in zip(velocities, gradients, strict=True)]
    return pytree.tree_unflatten(new, spec)


@checks.operands(**_BALLS)
@torch.no_grad()
def heavy_ball_(velocity: Tree, gradient: Tree, beta: float, weight: float = 1.0) -> Tree:
    """:func:`heavy_ball` in place on ``velocity``, which is returned."""
    (velocities, gradients), _ = _leaves(velocity=velocity, gradient=gradient)
    if velocities:
        torch._foreach_mul_(velocities, beta)
        torch._foreach_add_(velocities, _like(gradients, velocities), alpha=weight)
    return velocity


def _like(values: Sequence[torch.Tensor], models: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    return [v.to(device=m.device, dtype=m.dtype) for v, m in zip(values, models, strict=True)]


class Average:
    """The exponential average of a stream of tensors or containers, with or without bias correction.

    Args:
        beta: retention factor in [0, 1).
        correct: divide by ``1 - beta^t``, so that the average of a constant is that constant from the first update on.

    Example:
        >>> average = Average(0.9)
        >>> average.update(torch.tensor([1.0])).value
        tensor([1.])
    """

    @checks.arguments(beta=checks.retention, correct=checks.flag)
    def __init__(self, beta: float, *, correct: bool = True) -> None:
        self.beta, self.correct = beta, correct
        self.step = 0
        self._sum: Tree = None

    @checks.arguments(value=_TREE)
    def update(self, value: Tree) -> Average:
        """Take in one more value (a tensor or a container of the first one's structure); returns self."""
        if self._sum is None:
            self._sum = pytree.tree_map(torch.zeros_like, value)
        ema_(self._sum, value, self.beta)
        self.step += 1
        return self

    @property
    def value(self) -> Tree:
        """The average so far. Raises RuntimeError before the first update."""
        if self._sum is None:
            raise RuntimeError("Average has no value before the first update")
        scale = bias_correction(self.beta, self.step) if self.correct else 1.0
        return pytree.tree_map(lambda a: a / scale if a.is_floating_point() or a.is_complex() else a.clone(), self._sum)
