"""Arms that are samplers: a solver with its guidance and steering, or a scheduler for a pipeline."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from polyak.lab.compare.spec import ArmError, ArmSpec, Range, check_options, defaults, find, typed

_PARTS = ("guidance", "steering")  # an option guidance=CFG, and guidance.scale=3 for its own
_SAMPLE = ("grid",)  # an option of sample, and of PolyakScheduler
OF_A_PIPELINE = "whose guidance is its own: give that in the task's `call`"


def sampler_arm(text: str, target: str, cls: Any, values: dict[str, Any]) -> ArmSpec:
    ours = isinstance(cls, type) and issubclass(cls, find("polyak.generate:Solver"))
    if not ours and not is_scheduler(cls):
        raise ArmError(f"arm {text!r}: {target} is no class of solvers or schedulers")
    known, takes_any = defaults(cls)
    if ours:
        known |= dict.fromkeys((*_PARTS, *_SAMPLE))
    for head in (name.partition(".")[0] for name in values):
        if head in (*_PARTS, *_SAMPLE) and head not in known:
            own = f", {OF_A_PIPELINE}" if head in _PARTS else ""
            raise ArmError(
                f"arm {text!r}: {head} is for polyak's solvers; {cls.__name__} is a scheduler of a pipeline{own}"
            )
    for part in _PARTS:
        inner = [name for name in values if name.startswith(f"{part}.")]
        if part in values:
            values[part] = _part(str(values[part]), text)
            cls_of_part = find(values[part], text)
            options, _ = defaults(cls_of_part)
            check_options(text, cls_of_part, [name.partition(".")[2] for name in inner], options, False)
            known |= {f"{part}.{name}": default for name, default in options.items()}
        elif inner:
            raise ArmError(f"arm {text!r}: {inner[0]} needs {part}=, e.g. guidance=CFG")
    plain = [name for name in values if name.partition(".")[0] not in (*_PARTS, "call")]
    check_options(text, cls, plain, known, takes_any)
    values = {name: typed(value, known.get(name)) for name, value in values.items()}
    space = {name: value for name, value in values.items() if isinstance(value, Range)}
    fixed = {name: value for name, value in values.items() if not isinstance(value, Range)}
    return ArmSpec(text=text, target=target, fixed=fixed, space=space)


def is_scheduler(cls: Any) -> bool:
    """Whether it is a class of schedulers, as diffusers has them, which go into a pipeline."""
    return isinstance(cls, type) and hasattr(cls, "from_config")


def _part(name: str, text: str) -> str:
    target = name if ":" in name else name.replace("/", ":") if "/" in name else f"polyak.generate:{name}"
    find(target, text)
    return target


def split_options(options: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """A sampler's options by what they belong to: "" the solver itself, "guidance", "steering", "sample", "call"."""
    found: dict[str, dict[str, Any]] = {"": {}, "guidance": {}, "steering": {}, "sample": {}, "call": {}}
    for name, value in options.items():
        head, dot, rest = name.partition(".")
        if dot and head in found:
            found[head][rest] = value
        elif head in _PARTS:
            found[head][""] = value
        elif head in _SAMPLE:
            found["sample"][name] = value
        else:
            found[""][name] = value
    return found
