"""Extrapolating LoRA adapters: the change of the weight, not its factors.

An adapter of scale s adds ``s B A`` to a weight, with A (r, in) and B (out, r). From ``B_0 A_0`` to ``B_1 A_1``,

    (1 + alpha) B_1 A_1 - alpha B_0 A_0 = [(1 + alpha) B_1, -alpha B_0] [A_1; A_0]

exactly, at the sum of both ranks; at rank r where B_0 = 0, as in a new adapter. So the first round keeps an adapter's rank, and
later ones let it grow as 1, 2, 3, 5 ... times r. The scale s stays: ``lora_alpha`` follows the rank. Extrapolating A and B
themselves would add ``alpha (1 + alpha) (B_1 - B_0)(A_1 - A_0)``. Whoever wants the old rank back merges the adapter into the
base weights after a round, and starts a new one.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

_A = re.compile(r"(^|.*\.)lora_A(\.[^.]+)?\.weight$")


def has_adapter(model: nn.Module) -> bool:
    """Whether there are LoRA layers in the model."""
    return any(hasattr(module, "lora_A") and hasattr(module, "lora_B") for module in model.modules())


def pairs(weights: Iterable[str] | Mapping[str, Tensor]) -> list[tuple[str, str]]:
    """The names of the factors (A, B) among weights.

    Raises:
        ValueError: one of two factors is missing; a LoRA weight of another kind than matrices beside linear layers.
    """
    names = set(weights)
    found = [(name, name.replace("lora_A", "lora_B")) for name in weights if _A.match(name)]
    for a, b in found:
        if b not in names:
            raise ValueError(
                f"{a!r} is to be extrapolated without its factor {b!r}: the filter must keep both or neither"
            )
    known = {name for pair in found for name in pair}
    for name in weights:
        if name in known or "lora_" not in name or re.search(r"lora_B(\.[^.]+)?\.bias$", name):
            continue
        if "lora_B" in name and name.endswith(".weight"):
            raise ValueError(
                f"{name!r} is to be extrapolated without its factor A: the filter must keep both or neither"
            )
        raise ValueError(
            f"{name!r} cannot be extrapolated: of LoRA only factors A and B of linear layers can (no DoRA)"
        )
    if isinstance(weights, Mapping):
        for name in known:
            if weights[name].ndim != 2:
                raise ValueError(
                    f"{name!r} must be a matrix, got shape {tuple(weights[name].shape)}: merge the adapter first"
                )
    return found


def with_adapter_names(source: Mapping[str, Tensor], like: Iterable[str]) -> Mapping[str, Tensor]:
    """A saved adapter's weights, ``lora_A.weight``, under the names that they have in a model, ``lora_A.default.weight``."""
    saved = {name: re.sub(r"(lora_[AB])\.[^.]+\.(weight|bias)$", r"\1.\2", name) for name in like if "lora_" in name}
    renamed = {own: source[short] for own, short in saved.items() if own not in source and short in source}
    used = {saved[own] for own in renamed}
    return {**{name: value for name, value in source.items() if name not in used}, **renamed} if renamed else source


def same_ends(name: str, value: Tensor, other: Tensor) -> bool:
    """Whether two factors belong to weights of one shape; their ranks may differ."""
    axis = 1 if "lora_A" in name else 0
    return other.ndim == 2 and value.shape[axis] == other.shape[axis]


def extrapolated(factors: list[tuple[Tensor, Tensor, Tensor, Tensor]], alpha: float) -> list[tuple[Tensor, Tensor]]:
    """For each (A_1, B_1, A_0, B_0) the factors (A, B) of the extrapolated change, in float32 or wider.

    All grow alike, so that an adapter keeps one rank: they do if any B_0 is not zero.
    """
    wide = [tuple(x.detach().to(torch.promote_types(x.dtype, torch.float32)) for x in four) for four in factors]
    grows = any(bool(b0.any()) for *_, b0 in wide)
    if not grows:
        return [(a1, (1 + alpha) * b1) for a1, b1, _, _ in wide]
    return [
        (torch.cat([a1, a0.to(a1)]), torch.cat([(1 + alpha) * b1, -alpha * b0.to(b1)], dim=1))
        for a1, b1, a0, b0 in wide
    ]


def resize_(model: nn.Module, name_a: str, name_b: str, a: Tensor, b: Tensor) -> None:
    """Put factors of another rank into a PEFT layer; its scale stays as it is."""
    layer, adapter = _place(model, name_a)
    for parent, value in ((layer.lora_A[adapter], a), (layer.lora_B[adapter], b)):
        parent.weight = nn.Parameter(value.detach().contiguous(), requires_grad=parent.weight.requires_grad)
    rank = a.shape[0]
    layer.lora_A[adapter].out_features = layer.lora_B[adapter].in_features = rank
    layer.r[adapter] = rank
    # A saved adapter is loaded by its lora_alpha and rank: they have to give the same scale.
    root = getattr(layer, "use_rslora", {}).get(adapter, False)
    layer.lora_alpha[adapter] = layer.scaling[adapter] * (rank**0.5 if root else rank)


def sync_configuration(model: nn.Module, factors: list[tuple[str, str]]) -> None:
    """Write the layers' ranks into the adapter's configuration, by which it is saved and loaded."""
    configurations = getattr(model, "peft_config", {})
    done: set[str] = set()
    for name, _ in factors:
        layer, adapter = _place(model, name)
        config = configurations.get(adapter)
        if config is None or adapter in done:
            continue
        done.add(adapter)
        pattern = next((p for p in config.rank_pattern if re.match(rf"(.*\.)?({p})$", name.split(".lora_A")[0])), None)
        ratio = layer.r[adapter] / (config.rank_pattern[pattern] if pattern else config.r)
        if ratio == 1:
            continue
        scale = ratio**0.5 if config.use_rslora else ratio
        config.r = round(config.r * ratio)
        config.lora_alpha *= scale
        config.rank_pattern = {p: round(r * ratio) for p, r in config.rank_pattern.items()}
        config.alpha_pattern = {p: value * scale for p, value in config.alpha_pattern.items()}


def check_module(model: nn.Module) -> None:
    """Raise ValueError for adapters whose effect on the weights is not ``s B A`` with factors of their own."""
    for adapter, config in getattr(model, "peft_config", {}).items():
        kind = getattr(config.peft_type, "value", config.peft_type)
        if kind != "LORA":
            raise ValueError(
                f"adapter {adapter!r} is of type {kind}; only LoRA adapters are extrapolated: merge it first"
            )
        if getattr(config, "use_dora", False):
            raise ValueError(f"adapter {adapter!r} uses DoRA, which is not linear in its weights: merge it first")
    for name, module in model.named_modules():
        if getattr(module, "merged_adapters", None):
            raise ValueError(
                f"{name!r} holds a merged adapter: unmerge it (model.unmerge_adapter()) before extrapolating"
            )


def _place(model: nn.Module, name_a: str) -> tuple[Any, str]:
    """The PEFT layer and the adapter of a weight ``<layer>.lora_A.<adapter>.weight``."""
    path, _, rest = name_a.rpartition("lora_A.")
    return model.get_submodule(path.rstrip(".")), rest.removesuffix(".weight")
