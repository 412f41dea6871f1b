"""Arms that are optimizers: which options are fixed, which are tuned, and over which ranges."""

from __future__ import annotations

import importlib
import inspect
import math
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from polyak.lab.compare import recipe as recipes
from polyak.lab.compare.recipe import REST
from polyak.lab.compare.spec import ArmError, ArmSpec, Range, check_options, defaults, find, target_of, typed

LR, WEIGHT_DECAY = 1e-3, 1e-2  # AdamW's usual values: the centre of all ranges
LR_SPAN, WEIGHT_DECAY_SPAN = 10**1.5, 10.0  # a range reaches this factor to either side of its centre
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


def optimizer(text: str, target: str, cls: Any, values: dict[str, Any]) -> ArmSpec:
    if not callable(cls):
        raise ArmError(f"arm {text!r}: {target} is no optimizer class")
    own, _ = defaults(cls)
    recipe = {name: values.pop(name) for name in recipes.NAMES if name in values and name not in own}
    for name, value in recipe.items():
        recipes.check(f"arm {text!r}: {name}", name, value)
    if _wraps(target):
        spec = _around_a_base(text, target, cls, values)
    else:
        rest = {name: values.pop(name) for name in list(values) if name.partition(".")[0] == REST and name not in own}
        _check_given(text, cls, values)
        values, space, says = _tuned(text, cls, values)
        fixed = {name: value for name, value in values.items() if not isinstance(value, Range)}
        spec = ArmSpec(text=text, target=target, fixed=fixed, space=space, says=says)
        if rest or _for_matrices(cls, own):
            spec = _with_a_rest(spec, rest)
    ranges = {name: value for name, value in recipe.items() if isinstance(value, Range)}
    fixed = {name: value for name, value in recipe.items() if name not in ranges}
    ranges = {name: replace(value, whole=False) for name, value in ranges.items()}
    return replace(spec, fixed={**spec.fixed, **fixed}, space={**spec.space, **ranges})


def _for_matrices(cls: Any, own: Mapping[str, Any]) -> bool:
    """Whether it takes matrices alone: Muon, where it does not bring an optimizer for the rest."""
    return "muon" in cls.__name__.lower() and not any(name.startswith("adam") for name in own)


def _with_a_rest(spec: ArmSpec, given: Mapping[str, Any]) -> ArmSpec:
    """With another optimizer for what are no hidden matrices, whose learning rate is tuned, too."""
    named = str(given.get(REST, "adamw")).replace("/", ":")
    target = named if ":" in named else target_of(named, "training")
    cls = find(target, spec.text)
    if not callable(cls) or _wraps(target):
        raise ArmError(f"arm {spec.text!r}: {REST} must be an optimizer by itself, got {named!r}")
    inner = {name.removeprefix(f"{REST}."): value for name, value in given.items() if name != REST}
    _check_given(spec.text, cls, inner)
    values, space, _ = _tuned(spec.text, cls, inner)
    fixed = {f"{REST}.{name}": value for name, value in values.items() if not isinstance(value, Range)}
    # The weight decay is one for all, unless it is said.
    space = {f"{REST}.{name}": r for name, r in space.items() if name != "weight_decay" or name in inner}
    return replace(spec, fixed={**spec.fixed, REST: target, **fixed}, space={**spec.space, **space})


def _around_a_base(text: str, target: str, cls: Any, values: dict[str, Any]) -> ArmSpec:
    """An optimizer around another, whose the learning rate, the weight decay and all of ``base.option`` are."""
    values = values if BASE in values else {**_BASE_DEFAULT, **values}
    named = str(values.pop(BASE)).replace("/", ":")
    base = named if ":" in named else target_of(named, "training")
    inner = {n.removeprefix(f"{BASE}."): v for n, v in values.items() if n.startswith(f"{BASE}.") or n in OF_BASE}
    own = {n: v for n, v in values.items() if not n.startswith(f"{BASE}.") and n not in OF_BASE}
    base_cls = find(base, text)
    _check_given(text, base_cls, inner)
    inner, space, says = _tuned(text, base_cls, inner)
    known, takes_any = defaults(cls)
    check_options(text, cls, own, dict.fromkeys([*list(known)[2:], *OF_BASE, BASE]), takes_any)
    own = {name: typed(value, known.get(name)) for name, value in own.items()}

    def outer(options: Mapping[str, Any]) -> dict[str, Any]:
        return {name if name in OF_BASE else f"{BASE}.{name}": value for name, value in options.items()}

    fixed = {name: value for name, value in (outer(inner) | own).items() if not isinstance(value, Range)}
    space = outer(space) | {name: value for name, value in own.items() if isinstance(value, Range)}
    return ArmSpec(text=text, target=target, fixed={BASE: base, **fixed}, space=space, says=says)


def _tuned(text: str, cls: Any, values: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Range], str]:
    """An optimizer's options, what is tuned of them (the learning rate first: the grid is over it), and where ranges come from."""
    parameters, takes_any = defaults(cls)
    parameters = dict(list(parameters.items())[1:])  # the first is what is optimized
    check_options(text, cls, values, parameters, takes_any)
    values = {name: typed(value, parameters.get(name)) for name, value in values.items()}
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
    asked = [n for n, default in list(defaults(cls)[0].items())[1:] if default is inspect.Parameter.empty]
    if missing := [name for name in asked if name not in (*values, *OF_BASE)]:
        raise ArmError(f"arm {text!r}: {cls.__name__} needs {' and '.join(missing)}: {text}:{missing[0]}=...")


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
