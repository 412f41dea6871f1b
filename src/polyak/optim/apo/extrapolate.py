"""The step between rounds: ``theta_{t+1} = theta^_{t+1} + alpha (theta^_{t+1} - theta^_t)``, on a model's weights."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import TypeVar

import torch
from torch import Tensor, nn

from polyak.core import checks
from polyak.optim.apo import lora
from polyak.optim.apo.exact import ALPHA
from polyak.optim.apo.weights import (
    FILTER,
    MODEL,
    Filter,
    Weights,
    assign_,
    check_same_vocabulary,
    previous_weights,
    trained_weights,
)

M = TypeVar("M", bound="nn.Module | dict[str, Tensor]")


@checks.arguments(
    model=MODEL, previous=MODEL, alpha=ALPHA, filter=FILTER | None, masters=checks.Map(checks.tensor) | None
)
@torch.no_grad()
def extrapolate_(
    model: M,
    previous: nn.Module | Mapping[str, Tensor],
    alpha: float,
    *,
    filter: Filter | None = None,  # the specification's own word
    masters: Mapping[str, Tensor] | None = None,
) -> M:
    """Move a model's trained weights on by ``alpha`` times what they moved since ``previous``, in place; returns the model.

    Parameters that are frozen, buffers and integer tensors stay as they are, tied weights move once, and ``alpha = 0`` changes
    nothing. Of LoRA adapters the change of the weight ``s B A`` is extrapolated, which may add to their rank
    (:mod:`polyak.optim.apo.lora`); the model's parameters A and B are then new ones.

    Arithmetic is in float32 or wider, one weight at a time. In bfloat16 a round of small steps may be lost in the rounding of
    the weights, whatever the arithmetic: hold them in float32 (as TRL does under ``bf16=True``), or give the ``masters``.

    Args:
        model: a module, of which the parameters with ``requires_grad`` move; or a state dict (a model's, or an adapter's as
            PEFT gives it), of which every floating-point tensor does. In a state dict, factors of another rank replace the
            old ones; the scale that PEFT computes, ``lora_alpha / r``, has to be kept by whoever loads it.
        previous: the weights at the end of the round before, under the same names.
        alpha: in [0, 1).
        filter: a function of a weight's name, False for what is to stay.
        masters: name -> float32 tensor, for weights of a module in half precision: these move, and the weights are rounded
            from them. ``previous`` then holds former masters.

    Raises:
        ValueError: alpha out of range; names, shapes or vocabularies that differ (the first is named); quantized weights;
            adapters other than LoRA. The model is then as it was.

    Example:
        >>> before = {name: p.detach().clone() for name, p in model.named_parameters()}
        >>> train(model)
        >>> extrapolate_(model, before, alpha=0.3)
    """
    check_same_vocabulary(model, previous)
    weights = trained_weights(model, filter)
    if isinstance(previous, Mapping) and filter is None and not isinstance(model, nn.Module):
        extra = sorted(set(previous) - set(model))
        if extra:
            raise ValueError(f"previous has a weight {extra[0]!r}, which the model does not have")
    old = previous_weights(previous, weights, complete=False)
    check_masters(weights, masters)
    if alpha:
        move_(model, weights, old, alpha, masters=masters)
    return model


@torch.no_grad()
def move_(
    model: nn.Module | dict[str, Tensor],
    weights: Weights,
    old: Weights,
    alpha: float,
    *,
    masters: Mapping[str, Tensor] | None = None,
    keep: bool = False,
) -> Weights:
    """Extrapolate what :func:`extrapolate_` has checked. With ``keep``, ``old`` takes in the weights as they were before.

    Returns ``old``, with new tensors where factors of LoRA have another rank.
    """
    masters = masters or {}
    factors = lora.pairs(weights)
    in_pairs = {name for pair in factors for name in pair}
    lost = _Lost()
    for name, p in weights.items():
        if name in in_pairs:
            continue
        source = masters.get(name, p.detach())
        wide = source.to(torch.promote_types(source.dtype, torch.float32))
        # Only this one weight is held twice more, so that a run costs no second copy of the model.
        new = (wide - old[name].to(wide)).mul_(alpha).add_(wide)
        lost.count(source, old[name], new)
        if keep:
            old[name].copy_(source)
        if name in masters:
            masters[name].copy_(new)
        p.copy_(new)
    if factors:
        fours = [(weights[a], weights[b], old[a].to(weights[a]), old[b].to(weights[b])) for a, b in factors]
        # With alpha = 0 the factors must stay, bit for bit.
        moved = lora.extrapolated(fours, alpha) if alpha else [(a1, b1) for a1, b1, *_ in fours]
        if keep:
            for name in in_pairs:
                old[name] = weights[name].detach().to(old[name], copy=True)
        values = {
            name: value for pair, two in zip(factors, moved, strict=True) for name, value in zip(pair, two, strict=True)
        }
        assign_(model, values)
    lost.warn(alpha)
    return old


def check_masters(weights: Weights, masters: Mapping[str, Tensor] | None) -> None:
    """Raise ValueError where masters are not float32 (or wider) tensors of the weights' names and shapes."""
    in_pairs = {name for pair in lora.pairs(weights) for name in pair}
    for name, master in (masters or {}).items():
        if name not in weights or name in in_pairs:
            raise ValueError(
                f"masters has {name!r}, which is no trained weight of the model (factors of LoRA have none)"
            )
        if master.shape != weights[name].shape or master.dtype not in (torch.float32, torch.float64):
            raise ValueError(
                f"masters[{name!r}] must be float32 of shape {tuple(weights[name].shape)}, "
                f"got {master.dtype} of shape {tuple(master.shape)}"
            )


class _Lost:
    """Counts weights in half precision that changed in the round and that rounding does not let the extrapolation move."""

    def __init__(self) -> None:
        self.changed: list[Tensor] = []
        self.stuck: list[Tensor] = []

    def count(self, now: Tensor, before: Tensor, new: Tensor) -> None:
        if now.dtype in (torch.bfloat16, torch.float16):
            changed = now != before.to(now)
            self.changed.append(changed.sum())
            self.stuck.append((changed & (new.to(now.dtype) == now)).sum())

    def warn(self, alpha: float) -> None:
        changed, stuck = (sum(int(n) for n in counts) for counts in (self.changed, self.stuck))
        if alpha and 2 * stuck > changed:
            warnings.warn(
                f"of {changed} half-precision weights that the round changed, {stuck} are rounded back when extrapolated: "
                "hold the trained weights in float32, or give their float32 masters",
                stacklevel=4,
            )
