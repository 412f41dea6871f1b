"""Arms from words: ``adan``, ``adan:weight_decay=0.02``, ``sgd:momentum=0.9:lr=0.01..1``, ``my_module:MyOpt``.

A name is looked up in polyak, then in PyTorch (samplers: in ``polyak.generate``, then in diffusers); ``module:Class`` is imported.
``name=value`` fixes an option, ``name=low..high`` has it tuned. Where nothing is said of them, the learning rate and the weight
decay are tuned, each over a range around a centre that stands in the relation to AdamW's which the optimizer's paper gives.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal

from polyak.core import checks

Kind = Literal["training", "sampling"]
LR, WEIGHT_DECAY = 1e-3, 1e-2  # AdamW's usual values: the centre of all ranges
LR_SPAN, WEIGHT_DECAY_SPAN = 10**1.5, 10.0  # a range reaches this factor to either side of its centre


class ArmError(ValueError):
    """An arm's words cannot be understood; the message says what is known."""


@dataclass(frozen=True)
class Range:
    """Values to be tuned over, evenly spread in the logarithm where all are positive."""

    low: float
    high: float
    whole: bool = False  # integers
    open: bool = False  # grows where the best value is at an end: nobody asked for these ends

    @property
    def log(self) -> bool:
        return self.low > 0 and not self.whole

    @property
    def centre(self) -> float:
        middle = math.sqrt(self.low * self.high) if self.log else (self.low + self.high) / 2
        return round(middle) if self.whole else middle

    def at(self, part: float) -> float:
        """The value at 0 (low) to 1 (high)."""
        if self.log:
            return self.low * (self.high / self.low) ** part
        value = self.low + (self.high - self.low) * part
        return round(value) if self.whole else value

    def __str__(self) -> str:
        return f"{self.low:.3g} to {self.high:.3g}"


@dataclass(frozen=True, kw_only=True)
class ArmSpec:
    """One competitor: a class and its options."""

    text: str  # as it was given
    target: str  # "torch.optim:AdamW"
    fixed: Mapping[str, Any] = field(default_factory=dict)
    space: Mapping[str, Range] = field(default_factory=dict)
    says: str = ""  # where the ranges come from

    @property
    def class_name(self) -> str:
        return self.target.rpartition(":")[2]

    @property
    def pieces(self) -> list[str]:
        """Its words, taken apart: "my_module", "MyOpt", "beta=0.9"."""
        return _split(self.text, ":")

    @cached_property
    def label(self) -> str:
        """For people: "Adan", or "Adan (weight_decay 0.02)"."""
        own = ", ".join(f"{name} {value}" for name, value in self.fixed.items())
        return f"{self.class_name} ({own})" if own else self.class_name


def parse(text: str | Sequence[str | type], kind: Kind) -> tuple[ArmSpec, ...]:
    """Arms from a comma-separated list, or from a sequence of words (or classes) for one each.

    Raises:
        ArmError: a name or option is unknown (with a suggestion), a value cannot be read, arms are equal, or there is one only.
    """
    words = _split(text, ",") if isinstance(text, str) else [_word(given) for given in text]
    grouped: list[str] = []
    for word in (w.strip() for w in words):
        # "adan:eps=1e-6,weight_decay=0.02": a piece that is an option only belongs to the arm before it.
        if grouped and re.match(r"[\w.]+=", word):
            grouped[-1] += f":{word}"
        elif word:
            grouped.append(word)
    arms = tuple(_arm(word, kind) for word in grouped)
    if len(arms) < 2:
        raise ArmError(f"there must be two arms or more to compare, got {', '.join(a.text for a in arms) or 'none'}")
    texts = [arm.text for arm in arms]
    if twice := sorted({text for text in texts if texts.count(text) > 1}):
        raise ArmError(f"arms must differ, {twice[0]!r} is given twice")
    return arms


def _word(given: Any) -> str:
    """A class by its name, which processes find it by."""
    if isinstance(given, str):
        return given
    if not isinstance(given, type):
        raise ArmError(f"an arm is a name, module:Class, or a class, got {given!r}")
    return f"{given.__module__}:{given.__qualname__}"


def _split(text: str, separator: str) -> list[str]:
    """Pieces between separators that are outside of brackets."""
    pieces, depth = [""], 0
    for character in text:
        depth += (character in "([{") - (character in ")]}")
        if character == separator and depth == 0:
            pieces.append("")
        else:
            pieces[-1] += character
    return pieces


def _arm(text: str, kind: Kind) -> ArmSpec:
    heads, options = [], {}
    for piece in _split(text, ":"):
        name, equals, value = piece.partition("=")
        if not equals:
            heads.append(piece)
        elif name in options:
            raise ArmError(f"arm {text!r}: {name} is given twice")
        else:
            options[name] = value
    if len(heads) not in (1, 2) or not all(heads):
        raise ArmError(f"an arm is a name or module:Class, then :option=value, ..., got {text!r}")
    target = ":".join(heads) if len(heads) == 2 else _target(heads[0], kind)
    cls = find(target, text)
    values = {name: _value(value, f"arm {text!r}: {name}") for name, value in options.items()}
    if kind == "training":
        return _optimizer(text, target, cls, values)
    return _sampler(text, target, cls, values)


def _value(text: str, what: str) -> Any:
    """A literal, a range, or the word itself."""
    if match := re.fullmatch(r"([^.]\S*?)\.\.(\S+)", text):
        try:
            low, high = (ast.literal_eval(part) for part in match.groups())
        except (ValueError, SyntaxError):
            raise ArmError(f"{what} must be low..high, two numbers, got {text!r}") from None
        checks.real(f"{what}'s low end", low)
        checks.real(f"{what}'s high end", high)
        if not low < high:
            raise ArmError(f"{what}: the low end must be below the high end, got {text!r}")
        return Range(low, high, whole=isinstance(low, int) and isinstance(high, int))
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


# -- names -----------------------------------------------------------------------------------------------------------------


def find(target: str, text: str = "") -> Any:
    """What ``module:name`` names.

    Raises:
        ArmError: there is no such module, or it has no such name.
    """
    module, _, name = target.partition(":")
    if module == "__main__":
        raise ArmError(
            f"arm {text or target!r}: trials run in processes of their own, which do not see what a notebook or script holds. "
            f"Write the class to a file (in a notebook: a cell that begins with %%writefile mine.py), and name it mine:{name}"
        )
    try:
        found = importlib.import_module(module)
    except ImportError as error:
        raise ArmError(f"arm {text or target!r}: module {module!r} cannot be imported ({error})") from error
    if not hasattr(found, name):
        hint = checks.suggestion(name, [n for n in dir(found) if not n.startswith("_")])
        raise ArmError(f"arm {text or target!r}: {module} has no {name!r}{hint}")
    return getattr(found, name)


def _target(name: str, kind: Kind) -> str:
    known = names(kind)
    if name.lower() in known:
        return known[name.lower()]
    if kind == "sampling" and _has(f"diffusers:{name}"):
        return f"diffusers:{name}"
    raise ArmError(
        f"no arm is called {name!r}{checks.suggestion(name.lower(), known) or '.'} There are {', '.join(sorted(known))}, and "
        "anything else is named by module:Class"
    )


def _has(target: str) -> bool:
    try:
        find(target)
    except ArmError:
        return False
    return True


def names(kind: Kind) -> dict[str, str]:
    """Short name (lower case) -> ``module:Class``."""
    base, rooms = {
        "training": ("torch.optim:Optimizer", ("torch.optim", "polyak.optim")),
        "sampling": ("polyak.generate:Solver", ("polyak.generate",)),
    }[kind]
    parent = find(base)
    found: dict[str, str] = {}
    for room in rooms:  # the later has the last word
        module = importlib.import_module(room)
        for name in getattr(module, "__all__", None) or dir(module):
            value = getattr(module, name)
            if isinstance(value, type) and issubclass(value, parent) and value is not parent:
                found[name.lower()] = f"{room}:{name}"
    return found


# -- optimizers ------------------------------------------------------------------------------------------------------------

# What an optimizer's rate and decay are, relative to AdamW's, and who says so.
_RELATIVE: Mapping[str, tuple[float, float, str]] = {
    "adan": (10**0.85, 2.0, "its paper: 5 to 10 times AdamW's learning rate, weight decay 0.02"),
    "lion": (
        10**-0.75,
        10**0.75,
        "its paper: a third to a tenth of AdamW's learning rate, 3 to 10 times its weight decay",
    ),
    "sgd": (100.0, 0.05, "usual for SGD: learning rate 0.1, weight decay 5e-4"),
    "sgdp": (100.0, 0.05, "usual for SGD: learning rate 0.1, weight decay 5e-4"),
    "muon": (20.0, 1.0, "its authors: learning rate 0.02"),
    "adamax": (2.0, 1.0, "its paper: learning rate 0.002"),
    "adafactor": (10.0, 1.0, "PyTorch's default: learning rate 0.01"),
    "prodigy": (1000.0, 1.0, "its paper: learning rate 1"),
    "dadaptadam": (1000.0, 1.0, "its paper: learning rate 1"),
}
_LIKE_ADAMW = ("adamw", "adam", "radam", "nadam", "adamp", "spam", "amsgrad", "adabelief", "lionk")


def _optimizer(text: str, target: str, cls: Any, values: dict[str, Any]) -> ArmSpec:
    if not callable(cls):
        raise ArmError(f"arm {text!r}: {target} is no optimizer class")
    parameters, takes_any = _defaults(cls)
    parameters = dict(list(parameters.items())[1:])  # the first is what is optimized
    _check_options(text, cls, values, parameters, takes_any)
    values = {name: _typed(value, parameters.get(name)) for name, value in values.items()}
    for name, value in values.items():
        _check_kind(f"arm {text!r}: {name}", value, parameters.get(name))
    rate, decay, says = _RELATIVE.get(cls.__name__.lower(), (None, 1.0, ""))
    if rate is None:
        default = parameters.get("lr")
        if isinstance(default, float) and default > 0 and cls.__name__.lower() not in _LIKE_ADAMW:
            rate, says = default / LR, f"its default: learning rate {default:g}"
        else:
            rate, says = 1.0, "AdamW's usual values"
    usual = {"lr": _around(LR * rate, LR_SPAN), "weight_decay": _around(WEIGHT_DECAY * decay, WEIGHT_DECAY_SPAN)}
    # The learning rate comes first: the grid is over it.
    space = {name: values.get(name, usual[name]) for name in usual if name in parameters or name in values}
    space = {name: value for name, value in (space | values).items() if isinstance(value, Range)}
    fixed = {name: value for name, value in values.items() if not isinstance(value, Range)}
    return ArmSpec(
        text=text, target=target, fixed=fixed, space=space, says=says if any(r.open for r in space.values()) else ""
    )


def _typed(value: Any, default: Any) -> Any:
    """A range of whole numbers is one of integers only where the option's default is an integer, too."""
    if isinstance(value, Range) and not (isinstance(default, int) and not isinstance(default, bool)):
        return replace(value, whole=False)
    return value


def _check_kind(what: str, value: Any, default: Any) -> None:
    """A word where the default is a number or a tuple of numbers is a slip."""
    if not isinstance(value, str):
        return
    if isinstance(default, (int, float)) and not isinstance(default, bool):
        raise ArmError(f"{what} must be a number, got {value!r}")
    if isinstance(default, tuple):
        raise ArmError(f"{what} must be a tuple like {str(default).replace(' ', '')}, got {value!r}")


def _around(centre: float, span: float) -> Range:
    return Range(float(f"{centre / span:.3g}"), float(f"{centre * span:.3g}"), open=True)


def _defaults(cls: Any) -> tuple[dict[str, Any], bool]:
    """A class's options with their defaults, and whether it takes any others."""
    try:
        parameters = list(inspect.signature(cls).parameters.values())
    except (TypeError, ValueError):
        return {}, True
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters)
    return {p.name: p.default for p in parameters if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)}, takes_any


def _check_options(text: str, cls: Any, values: Iterable[str], known: Mapping[str, Any], takes_any: bool) -> None:
    for name in values:
        if name not in known and not takes_any:
            hint = checks.suggestion(name, known) or "."
            raise ArmError(f"arm {text!r}: {cls.__name__} has no option {name!r}{hint} It has {', '.join(known)}")


# -- samplers --------------------------------------------------------------------------------------------------------------

_PARTS = ("guidance", "steering")  # an option guidance=CFG, and guidance.scale=3 for its own
_CALL = ("grid",)  # sample's own


def _sampler(text: str, target: str, cls: Any, values: dict[str, Any]) -> ArmSpec:
    if not isinstance(cls, type):
        raise ArmError(f"arm {text!r}: {target} is no class of solvers or schedulers")
    known, takes_any = _defaults(cls)
    known |= dict.fromkeys((*_PARTS, *_CALL))
    for part in _PARTS:
        inner = [name for name in values if name.startswith(f"{part}.")]
        if part in values:
            values[part] = _part(str(values[part]), text)
            cls_of_part = find(values[part], text)
            options, _ = _defaults(cls_of_part)
            _check_options(text, cls_of_part, [name.partition(".")[2] for name in inner], options, False)
            known |= {f"{part}.{name}": default for name, default in options.items()}
        elif inner:
            raise ArmError(f"arm {text!r}: {inner[0]} needs {part}=, e.g. guidance=CFG")
    plain = [name for name in values if name.partition(".")[0] not in (*_PARTS, "call")]
    _check_options(text, cls, plain, known, takes_any)
    values = {name: _typed(value, known.get(name)) for name, value in values.items()}
    space = {name: value for name, value in values.items() if isinstance(value, Range)}
    fixed = {name: value for name, value in values.items() if not isinstance(value, Range)}
    return ArmSpec(text=text, target=target, fixed=fixed, space=space)


def _part(name: str, text: str) -> str:
    target = name if ":" in name else name.replace("/", ":") if "/" in name else f"polyak.generate:{name}"
    find(target, text)
    return target


def split_options(options: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """A sampler's options by what they belong to: "" the solver itself, "guidance", "steering", "call"."""
    found: dict[str, dict[str, Any]] = {"": {}, "guidance": {}, "steering": {}, "call": {}}
    for name, value in options.items():
        head, dot, rest = name.partition(".")
        if dot and head in found:
            found[head][rest] = value
        elif head in _PARTS:
            found[head][""] = value
        elif head in _CALL:
            found["call"][name] = value
        else:
            found[""][name] = value
    return found
