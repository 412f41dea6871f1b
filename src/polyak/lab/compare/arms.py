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
from polyak.lab import limits, words

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
        return f"{words.number(self.low)} to {words.number(self.high)}"


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
    def own(self) -> tuple[str, ...]:
        """The options that were given, for people: ("weight_decay 0.02",), ("eta 0 to 1",)."""
        given = [piece.partition("=")[::2] for piece in self.pieces if "=" in piece]
        return tuple(f"{name} {self.space.get(name, value)}" for name, value in given)

    @property
    def label(self) -> str:
        """For people, with the options that were given: "Adan (weight_decay 0.02)", "DDIM (eta 0 to 1)"."""
        return self.labelled(self.own)

    def labelled(self, options: Sequence[str]) -> str:
        return f"{self.class_name} ({', '.join(options)})" if options else self.class_name


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
    for word in (w.strip() for w in (_split(text, ",") if isinstance(text, str) else map(_word, text))):
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


_UNREADABLE = (ValueError, SyntaxError, RecursionError, MemoryError)  # what Python raises at what is no literal


def _value(text: str, what: str) -> Any:
    """A literal, a range, or the word itself."""
    if match := re.fullmatch(r"([^.]\S*?)\.\.(\S+)", text):
        try:
            low, high = (ast.literal_eval(part) for part in match.groups())
            for end, value in (("low", low), ("high", high)):
                checks.real(f"{what}'s {end} end", value)
        except (*_UNREADABLE, TypeError) as error:
            why = f" ({error})" if "end must be" in str(error) else ""
            raise ArmError(f"{what} must be low..high, two numbers, got {text!r}{why}") from None
        if not low < high:
            raise ArmError(f"{what}: the low end must be below the high end, got {text!r}")
        return Range(low, high, whole=isinstance(low, int) and isinstance(high, int))
    try:
        return ast.literal_eval(text)
    except _UNREADABLE:
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

# Learning rates and weight decays of others than polyak's (which says so itself), relative to AdamW's, and who says so.
_RELATIVE: Mapping[str, tuple[float, float, str]] = {
    "sgd": (100.0, 0.05, "usual for SGD: learning rate 0.1, weight decay 5e-4"),
    "muon": (20.0, 1.0, "its authors: learning rate 0.02"),
    "adamax": (2.0, 1.0, "its paper: learning rate 0.002"),
    "adafactor": (10.0, 1.0, "PyTorch's default: learning rate 0.01"),
    "prodigy": (1000.0, 1.0, "its paper: learning rate 1"),
    "dadaptadam": (1000.0, 1.0, "its paper: learning rate 1"),
}
_LIKE_ADAMW = ("adamw", "adam", "radam", "nadam", "amsgrad", "adabelief")
BASE = "base"  # the optimizer that one is wrapped around; base.momentum=0.9 is an option of its own
OF_BASE = ("lr", "weight_decay")  # are the base's by their own names
_BASE_DEFAULT = {BASE: "sgd", f"{BASE}.momentum": 0.9}


def _optimizer(text: str, target: str, cls: Any, values: dict[str, Any]) -> ArmSpec:
    if not callable(cls):
        raise ArmError(f"arm {text!r}: {target} is no optimizer class")
    if _wraps(target):
        return _around_a_base(text, target, cls, values)
    _check_given(text, cls, values)
    values, space, says = _tuned(text, cls, values)
    fixed = {name: value for name, value in values.items() if not isinstance(value, Range)}
    return ArmSpec(text=text, target=target, fixed=fixed, space=space, says=says)


def _around_a_base(text: str, target: str, cls: Any, values: dict[str, Any]) -> ArmSpec:
    """An optimizer around another, whose the learning rate, the weight decay and all of ``base.option`` are."""
    values = values if BASE in values else {**_BASE_DEFAULT, **values}
    named = str(values.pop(BASE)).replace("/", ":")
    base = named if ":" in named else _target(named, "training")
    inner = {n.removeprefix(f"{BASE}."): v for n, v in values.items() if n.startswith(f"{BASE}.") or n in OF_BASE}
    own = {n: v for n, v in values.items() if not n.startswith(f"{BASE}.") and n not in OF_BASE}
    base_cls = find(base, text)
    _check_given(text, base_cls, inner)
    inner, space, says = _tuned(text, base_cls, inner)
    known, takes_any = _defaults(cls)
    _check_options(text, cls, own, dict.fromkeys([*list(known)[2:], *OF_BASE, BASE]), takes_any)
    own = {name: _typed(value, known.get(name)) for name, value in own.items()}

    def outer(options: Mapping[str, Any]) -> dict[str, Any]:
        return {name if name in OF_BASE else f"{BASE}.{name}": value for name, value in options.items()}

    fixed = {name: value for name, value in (outer(inner) | own).items() if not isinstance(value, Range)}
    space = outer(space) | {name: value for name, value in own.items() if isinstance(value, Range)}
    return ArmSpec(text=text, target=target, fixed={BASE: base, **fixed}, space=space, says=says)


def _tuned(text: str, cls: Any, values: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Range], str]:
    """An optimizer's options, what is tuned of them (the learning rate first: the grid is over it), and where ranges come from."""
    parameters, takes_any = _defaults(cls)
    parameters = dict(list(parameters.items())[1:])  # the first is what is optimized
    _check_options(text, cls, values, parameters, takes_any)
    values = {name: _typed(value, parameters.get(name)) for name, value in values.items()}
    for name, value in values.items():
        _check_kind(f"arm {text!r}: {name}", value, parameters.get(name))
    rate, decay, says = _relation(cls, parameters.get("lr"))
    usual = {"lr": _around(LR * rate, LR_SPAN), "weight_decay": _around(WEIGHT_DECAY * decay, WEIGHT_DECAY_SPAN)}
    space = {name: values.get(name, usual[name]) for name in usual if name in parameters or name in values}
    space = {name: value for name, value in (space | values).items() if isinstance(value, Range)}
    return values, space, says if any(r.open for r in space.values()) else ""


def _relation(cls: Any, default: Any) -> tuple[float, float, str]:
    """The learning rate and the weight decay over AdamW's, and who says so."""
    name = cls.__name__.lower()
    optim = importlib.import_module("polyak.optim")
    if name in optim.names() and (facts := optim.info(name)).lr and facts.weight_decay:
        return math.sqrt(math.prod(facts.lr)), math.sqrt(math.prod(facts.weight_decay)), facts.relation
    if name in _RELATIVE:
        return _RELATIVE[name]
    if isinstance(default, (int, float)) and default > 0 and name not in _LIKE_ADAMW:
        return default / LR, 1.0, f"its default: learning rate {default:g}"
    return 1.0, 1.0, "AdamW's usual values"


def _wraps(target: str) -> bool:
    """Whether it is one of polyak's that are made around another optimizer."""
    optim = importlib.import_module("polyak.optim")
    return target in [f"polyak.optim:{i.part.partition(':')[2]}" for i in map(optim.info, optim.names()) if i.wraps]


def _check_given(text: str, cls: Any, values: Iterable[str]) -> None:
    """An option without a default must be given, if it is not tuned in any case."""
    asked = [n for n, default in list(_defaults(cls)[0].items())[1:] if default is inspect.Parameter.empty]
    if missing := [name for name in asked if name not in (*values, *OF_BASE)]:
        raise ArmError(f"arm {text!r}: {cls.__name__} needs {' and '.join(missing)}: {text}:{missing[0]}=...")


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
    return {p.name: _default(p) for p in parameters if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)}, takes_any


def _default(parameter: inspect.Parameter) -> Any:
    """Of what is declared to be a float (PyTorch's ``momentum: float = 0``) a float: it is not of whole numbers."""
    value = parameter.default
    declared = "float" in str(parameter.annotation)
    return float(value) if declared and isinstance(value, int) and not isinstance(value, bool) else value


def _check_options(text: str, cls: Any, values: Iterable[str], known: Mapping[str, Any], takes_any: bool) -> None:
    for name in values:
        if name not in known and not takes_any:
            hint = checks.suggestion(name, known) or "."
            raise ArmError(f"arm {text!r}: {cls.__name__} has no option {name!r}{hint} It has {', '.join(known)}")


# -- samplers --------------------------------------------------------------------------------------------------------------

_PARTS = ("guidance", "steering")  # an option guidance=CFG, and guidance.scale=3 for its own
_SAMPLE = ("grid",)  # an option of sample, and of PolyakScheduler
OF_A_PIPELINE = "whose guidance is its own: give that in the task's `call`"


def _sampler(text: str, target: str, cls: Any, values: dict[str, Any]) -> ArmSpec:
    ours = isinstance(cls, type) and issubclass(cls, find("polyak.generate:Solver"))
    if not ours and not is_scheduler(cls):
        raise ArmError(f"arm {text!r}: {target} is no class of solvers or schedulers")
    known, takes_any = _defaults(cls)
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
