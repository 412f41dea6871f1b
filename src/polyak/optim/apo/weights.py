"""Which weights of a model a round trains, and the checks that two sets of them belong together."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from polyak.core import checks
from polyak.optim.apo import lora

Filter = Callable[[str], bool]
Weights = dict[str, Tensor]
FILTER = checks.Function("a function of a weight's name", 1)
MODEL = checks.module | checks.Map(checks.tensor, "a mapping of tensors")


def unwrapped(model: Any) -> Any:
    """The module inside ``torch.compile`` and ``DistributedDataParallel``."""
    while True:
        if hasattr(model, "_orig_mod"):
            model = model._orig_mod
        elif isinstance(model, nn.parallel.DistributedDataParallel):
            model = model.module
        else:
            return model


def trained_weights(model: nn.Module | Mapping[str, Tensor], keep: Filter | None = None) -> Weights:
    """Name -> weight, each storage once: a module's trainable parameters; a mapping's floating-point tensors.

    Raises:
        TypeError: neither a module nor a mapping of tensors.
        ValueError: quantized weights, adapters that are not LoRA, nothing to train.
    """
    model = unwrapped(model)
    keep = keep or (lambda name: True)
    if isinstance(model, nn.Module):
        lora.check_module(model)
        # Parameters of a quantized base stay as they are under an adapter, and only there.
        held = model.named_parameters() if not lora.has_adapter(model) else ()
        _refuse_quantized({name: p for name, p in held if keep(name)})
        found: Weights = {name: p for name, p in model.named_parameters() if p.requires_grad and keep(name)}
    elif isinstance(model, Mapping):
        for name, value in model.items():
            if not isinstance(value, Tensor):
                raise TypeError(f"{name!r} must be a tensor, got {type(value).__name__}")
        chosen = {name: value for name, value in model.items() if keep(name)}
        _refuse_quantized(chosen)
        found = _once({name: value for name, value in chosen.items() if value.is_floating_point()})
    else:
        raise TypeError(f"model must be a torch.nn.Module or a mapping of tensors, got {type(model).__name__}")
    if not found:
        raise ValueError(
            "model has nothing to extrapolate: no weight is trainable (requires_grad) and kept by the filter"
        )
    lora.pairs(found)  # raises where a factor has no partner
    return found


def previous_weights(previous: nn.Module | Mapping[str, Tensor], like: Weights, complete: bool) -> Weights:
    """The weights of ``previous`` under the names of ``like``.

    Raises:
        ValueError: naming the first weight that is missing, has another shape, or, with ``complete``, is of no use.
    """
    previous = unwrapped(previous)
    source: Mapping[str, Tensor]
    if isinstance(previous, nn.Module):
        source = dict(previous.named_parameters(remove_duplicate=False))
    elif isinstance(previous, Mapping):
        source = previous
    else:
        raise TypeError(f"previous must be a torch.nn.Module or a mapping of tensors, got {type(previous).__name__}")
    source = lora.with_adapter_names(source, like)
    factors = {name for pair in lora.pairs(like) for name in pair}
    for name, value in like.items():
        if name not in source:
            raise ValueError(f"previous has no weight {name!r}, which the model has")
        other = source[name]
        if not isinstance(other, Tensor) or not other.is_floating_point():
            raise ValueError(f"previous must hold a floating-point tensor {name!r}, got {_described(other)}")
        same = lora.same_ends(name, value, other) if name in factors else value.shape == other.shape
        if not same:
            raise ValueError(
                f"{name!r} has shape {tuple(value.shape)} in the model and {tuple(other.shape)} in previous"
            )
    if complete and (extra := sorted(set(source) - set(like))):
        raise ValueError(f"previous has a weight {extra[0]!r}, which the model does not have or does not train")
    for a, b in lora.pairs(like):
        if source[a].shape[0] != source[b].shape[1]:
            raise ValueError(f"previous: {a!r} has rank {source[a].shape[0]} and {b!r} has rank {source[b].shape[1]}")
    return {name: source[name].detach() for name in like}


def check_same_vocabulary(model: Any, previous: Any) -> None:
    """Raise ValueError where both are models with configurations whose vocabularies or special tokens differ."""
    ours, theirs = (getattr(unwrapped(m), "config", None) for m in (model, previous))
    for key in ("vocab_size", "bos_token_id", "eos_token_id"):
        a, b = getattr(ours, key, None), getattr(theirs, key, None)
        if a is not None and b is not None and a != b:
            raise ValueError(
                f"model and previous have different tokenizers: {key} is {a!r} in the model and {b!r} in previous"
            )


def assign_(model: nn.Module | dict[str, Tensor], values: Weights) -> None:
    """Put values in the place of a model's weights of those names; factors of LoRA may have another rank."""
    model = unwrapped(model)
    factors = lora.pairs(values)
    in_pairs = {name for pair in factors for name in pair}
    own: Weights = {**dict(model.named_parameters())} if isinstance(model, nn.Module) else model
    with torch.no_grad():
        for name, value in values.items():
            if name not in in_pairs:
                own[name].copy_(value)
        for a, b in factors:
            if own[a].shape == values[a].shape:
                own[a].copy_(values[a])
                own[b].copy_(values[b])
            elif isinstance(model, nn.Module):
                lora.resize_(model, a, b, values[a].to(own[a]), values[b].to(own[b]))
            else:
                own[a], own[b] = values[a].to(own[a]), values[b].to(own[b])
    if isinstance(model, nn.Module) and factors:
        lora.sync_configuration(model, factors)


def _once(weights: Weights) -> Weights:
    """Without the further names of one storage (tied weights)."""
    seen: set[tuple] = set()
    found: Weights = {}
    for name, value in weights.items():
        where = (value.data_ptr(), value.device, value.shape, value.stride()) if value.numel() else name
        if where not in seen:
            seen.add(where)  # type: ignore[arg-type]
            found[name] = value
    return found


def _refuse_quantized(weights: Mapping[str, Tensor]) -> None:
    for name, value in weights.items():
        narrow = value.dtype.itemsize == 1 and value.dtype != torch.bool and value.ndim > 1
        if narrow or value.is_quantized or hasattr(value, "quant_state") or hasattr(value, "SCB"):
            raise ValueError(f"{name!r} is quantized ({_described(value)}): dequantize, or extrapolate the adapter")


def _described(value: object) -> str:
    return f"{value.dtype} of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
