"""Frozen policies that share a model's modules: a round's reference, at the cost of the trained weights alone."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from polyak.core import checks
from polyak.optim.apo.exact import ALPHA
from polyak.optim.apo.weights import Weights


class FrozenPolicy(nn.Module):
    """A model with other values of its trained weights: calls the model with these, in evaluation mode, without gradients.

    Args:
        model: whose modules, frozen weights and buffers are used as they are at each call.
        weights: name -> tensor, kept without a copy; on the model's device.
    """

    @checks.arguments(model=checks.module, weights=checks.Map(checks.tensor, "a dict from names to tensors"))
    def __init__(self, model: nn.Module, weights: Weights) -> None:
        super().__init__()
        self._model = (model,)  # in a tuple: the model is no part of this one
        self.weights = weights

    @property
    def config(self) -> Any:
        return getattr(self._model[0], "config", None)

    @torch.no_grad()
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the model returns."""
        model = self._model[0]
        with evaluating(model):
            return functional_call(model, self.weights, args, kwargs)


class ExtrapolatedPolicy(nn.Module):
    """``log pi = (1 + alpha) log current - alpha log previous`` per token, normalized: APO in the space of logits.

    The forward pass takes what a causal model takes and returns an object with ``logits`` (batch, length, vocabulary).
    """

    @checks.arguments(current=checks.module, previous=checks.module, alpha=ALPHA)
    def __init__(self, current: nn.Module, previous: nn.Module, alpha: float) -> None:
        super().__init__()
        self.current, self.previous, self.alpha = current, previous, alpha

    @torch.no_grad()
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        new, old = (policy(*args, **kwargs).logits for policy in (self.current, self.previous))
        return SimpleNamespace(logits=combined_logits(new, old, self.alpha))


def combined_logits(current: Tensor, previous: Tensor, alpha: float) -> Tensor:
    """Normalized log-probabilities of the extrapolation, in current's dtype; tokens that current excludes stay so."""
    wide = torch.promote_types(current.dtype, torch.float32)
    new, old = current.to(wide).log_softmax(-1), previous.to(device=current.device, dtype=wide).log_softmax(-1)
    mixed = (1 + alpha) * new - alpha * old
    return mixed.masked_fill(new == -torch.inf, -torch.inf).log_softmax(-1).to(current.dtype)


def frozen_copy(model: nn.Module) -> nn.Module:
    """A copy in evaluation mode whose parameters have no gradients, free of what trainers hang on a model's forward pass."""
    gradients = [p.grad for p in model.parameters()]
    for p in model.parameters():
        p.grad = None
    try:
        twin = copy.deepcopy(model)
    finally:
        for p, gradient in zip(model.parameters(), gradients, strict=True):
            p.grad = gradient
    for module in twin.modules():
        # Trainers replace forward on the instance by closures over the first model: a copy would run that one's weights.
        vars(module).pop("forward", None)
    return twin.requires_grad_(False).eval()


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, then each module's former mode."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextmanager
def without_dropout(model: nn.Module) -> Iterator[None]:
    """Training mode with every dropout at 0, so that policy and reference differ by their weights alone; then as it was."""
    modes = [(module, module.training) for module in model.modules()]
    rates: list[tuple[nn.Module, str, float]] = []
    for module in model.modules():
        names = ["p"] if isinstance(module, nn.modules.dropout._DropoutNd) else ["attention_dropout", "dropout"]
        for name in names:
            rate = vars(module).get(name)
            if isinstance(rate, float):
                rates.append((module, name, rate))
                setattr(module, name, 0.0)
    model.train()
    try:
        yield
    finally:
        for module, name, rate in rates:
            setattr(module, name, rate)
        for module, mode in modes:
            module.training = mode
