"""Elementwise functions that mean the same on numbers, on tensors and on the traced values of an update rule.

A rule written with these and with the arithmetic operators can be run by eager PyTorch, or recorded once and run by another
backend (see ``polyak.optim._engine``). A traced value takes part by having a method ``elementwise(name, *args)``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from polyak.core import checks

Operand = Any  # a number, a tensor or a traced value


def _dispatch(name: str, on_tensors: Callable[..., Any], on_numbers: Callable[..., Any], *args: Operand) -> Any:
    tensors = False
    for a in args:
        if isinstance(a, torch.Tensor):
            tensors = True
        elif hasattr(a, "elementwise"):
            return a.elementwise(name, *args)
    return on_tensors(*args) if tensors else on_numbers(*args)


def _sign(x: float) -> float:
    return math.nan if math.isnan(x) else float((x > 0) - (x < 0))


def _sign_tensor(x: torch.Tensor) -> torch.Tensor:
    # torch.sign(nan) is 0, which would hide a broken gradient.
    return torch.where(torch.isnan(x), x, torch.sign(x))


def _where_tensor(condition: Any, a: Any, b: Any) -> Any:
    if isinstance(condition, torch.Tensor):
        return torch.where(condition, a, b)
    return a if condition else b


def _axpy_tensor(a: Any, x: Any, y: Any) -> Any:
    if isinstance(a, torch.Tensor) or not isinstance(y, torch.Tensor):
        return y + a * x
    return torch.add(y, x, alpha=a)


@checks.operands(a=checks.operand, x=checks.operand, y=checks.operand)
def axpy(a: Operand, x: Operand, y: Operand) -> Any:
    """``y + a x`` with a scalar ``a``."""
    return _dispatch("axpy", _axpy_tensor, lambda a, x, y: y + a * x, a, x, y)


@checks.operands(x=checks.operand)
def sqrt(x: Operand) -> Any:
    return _dispatch("sqrt", torch.sqrt, math.sqrt, x)


@checks.operands(x=checks.operand)
def absolute(x: Operand) -> Any:
    return _dispatch("abs", torch.abs, abs, x)


@checks.operands(x=checks.operand)
def sign(x: Operand) -> Any:
    """-1, 0 or 1; NaN stays NaN."""
    return _dispatch("sign", _sign_tensor, _sign, x)


@checks.operands(x=checks.operand)
def exp(x: Operand) -> Any:
    return _dispatch("exp", torch.exp, math.exp, x)


@checks.operands(x=checks.operand)
def tanh(x: Operand) -> Any:
    return _dispatch("tanh", torch.tanh, math.tanh, x)


@checks.operands(x=checks.operand, y=checks.operand)
def minimum(x: Operand, y: Operand) -> Any:
    """The smaller; NaN if either is."""
    return _dispatch("min", _extremum(torch.minimum, torch.clamp_max), _of_numbers(min), x, y)


@checks.operands(x=checks.operand, y=checks.operand)
def maximum(x: Operand, y: Operand) -> Any:
    """The larger; NaN if either is."""
    return _dispatch("max", _extremum(torch.maximum, torch.clamp_min), _of_numbers(max), x, y)


def _of_numbers(choose: Callable[..., float]) -> Callable[..., float]:
    return lambda x, y: math.nan if math.isnan(x) or math.isnan(y) else choose(x, y)


def _extremum(of_tensors: Callable[..., Any], with_number: Callable[..., Any]) -> Callable[..., Any]:
    def run(x: Any, y: Any) -> torch.Tensor:
        if isinstance(x, torch.Tensor) and isinstance(y, torch.Tensor):
            return of_tensors(x, y)
        return with_number(x, y) if isinstance(x, torch.Tensor) else with_number(y, x)

    return run


@checks.operands(condition=checks.condition, a=checks.operand, b=checks.operand)
def where(condition: Operand, a: Operand, b: Operand) -> Any:
    """``a`` where the condition holds, else ``b``."""
    return _dispatch("where", _where_tensor, lambda c, a, b: a if c else b, condition, a, b)
