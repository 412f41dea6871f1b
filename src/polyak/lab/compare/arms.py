"""Parsing arms: ``adan``, ``adan:weight_decay=0.02``, ``sgd:momentum=0.9:lr=0.01..1``, ``my_module:MyOpt``.

A name is looked up in polyak, then in PyTorch (samplers: in ``polyak.generate``, then in diffusers); ``module:Class`` is imported.
``name=value`` fixes an option, ``name=low..high`` has it tuned. Where nothing is said of them, the learning rate and the weight
decay are tuned, each over a range around a centre that stands in the relation to AdamW's which the optimizer's paper gives.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from polyak.core import checks
from polyak.lab import limits
from polyak.lab.compare.optimizers import optimizer
from polyak.lab.compare.samplers import sampler_arm
from polyak.lab.compare.spec import ArmError, ArmSpec, Kind, find, names, read, split, target_of


def parse(text: str | Sequence[str | type], kind: Kind) -> tuple[ArmSpec, ...]:
    """Arms from a comma-separated list, or from a sequence of words (or classes) for one each.

    Raises:
        ArmError: a name or option is unknown (with a suggestion), a value cannot be read, arms are equal, or there is one only.
    """
    if isinstance(text, str) and len(text) > limits.ARMS * limits.WORDS:
        raise ArmError(f"arms must be at most {limits.ARMS * limits.WORDS:,} characters, got {limits.short(text)!r}")
    grouped = words_of(text)
    if len(grouped) > limits.ARMS:
        raise ArmError(f"there must be at most {limits.ARMS} arms to compare, got {len(grouped):,}")
    if long := [word for word in grouped if len(word) > limits.WORDS]:
        raise ArmError(f"an arm must be at most {limits.WORDS:,} characters, got {limits.short(long[0])!r}")
    arms = tuple(_arm(word, kind) for word in grouped)
    if len(arms) < 2:
        raise ArmError(f"there must be two arms or more to compare, got {', '.join(a.text for a in arms) or 'none'}")
    texts = [arm.text for arm in arms]
    if twice := sorted({text for text in texts if texts.count(text) > 1}):
        raise ArmError(f"arms must differ, {twice[0]!r} is given twice")
    return arms


def words_of(text: str | Sequence[str | type]) -> list[str]:
    """Each arm's words."""
    grouped: list[str] = []
    for word in (w.strip() for w in (split(text, ",") if isinstance(text, str) else map(_word, text))):
        # "adan:eps=1e-6,weight_decay=0.02": a piece that is an option only belongs to the arm before it.
        if grouped and re.match(r"[\w.]+=", word):
            grouped[-1] += f":{word}"
        elif word:
            grouped.append(word)
    return grouped


def nearly(word: str, kind: Kind) -> bool:
    """Whether an arm's words begin with what is, or nearly is, a name of this kind."""
    name, known = word.partition(":")[0].lower(), names(kind)
    return name in known or bool(checks.suggestion(name, known))


def _word(given: Any) -> str:
    """A class by its name, which processes find it by."""
    if isinstance(given, str):
        return given
    if not isinstance(given, type):
        raise ArmError(f"an arm is a name, module:Class, or a class, got {given!r}")
    return f"{given.__module__}:{given.__qualname__}"


def _arm(text: str, kind: Kind) -> ArmSpec:
    heads, options = [], {}
    for piece in split(text, ":"):
        name, equals, value = piece.partition("=")
        if not equals:
            heads.append(piece)
        elif name in options:
            raise ArmError(f"arm {text!r}: {name} is given twice")
        else:
            options[name] = value
    if len(heads) not in (1, 2) or not all(heads):
        raise ArmError(f"an arm is a name or module:Class, then :option=value, ..., got {text!r}")
    target = ":".join(heads) if len(heads) == 2 else target_of(heads[0], kind)
    cls = find(target, text)
    values = {name: read(value, f"arm {text!r}: {name}") for name, value in options.items()}
    if kind == "training":
        return optimizer(text, target, cls, values)
    return sampler_arm(text, target, cls, values)
