"""Declaring what the arguments of a public function or class may be, once: checked at entry, and readable by tests."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from polyak.core.checks.kinds import Anything, Kind
from polyak.core.checks.messages import shown

_ANY = Anything("it is not declared")
T = TypeVar("T", bound=Callable[..., Any])
_NAMED = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


_UNFIT = (RuntimeError, OverflowError, NotImplementedError, IndexError, TypeError, ValueError)


def arguments(**kinds: Kind) -> Callable[[T], T]:
    """Declare what each argument may be; it is checked, by its kind, before anything else is done.

    Put it on a function, on an ``__init__``, or on a class whose ``__init__`` is made for it (a dataclass, a NamedTuple).
    Arguments that are left out are not looked at: a default is right.

    Example:
        >>> @arguments(scale=checks.positive, steps=checks.Integer(1) | None)
        ... def grid(scale, steps=None): ...
    """

    def declare(made: Any) -> Any:
        if not isinstance(made, type):
            return _checked(made, kinds)
        if issubclass(made, tuple):  # a NamedTuple, which is made by __new__
            made.__new__ = staticmethod(_checked(made.__new__, kinds))
        else:
            made.__init__ = _checked(vars(made)["__init__"], kinds)
        return made

    return declare


def operands(**kinds: Kind) -> Callable[[T], T]:
    """As :func:`arguments`, of a function that does arithmetic and nothing else: what cannot be done is a ValueError."""
    return lambda made: _checked(made, kinds, joint=True)


def _checked(function: Any, kinds: Mapping[str, Kind], *, joint: bool = False) -> Any:
    parameters = list(inspect.signature(function).parameters.values())
    if missing := kinds.keys() - {p.name for p in parameters if p.kind in _NAMED}:
        raise TypeError(f"{function.__qualname__} has no argument {sorted(missing)[0]!r} to declare")
    checked = _written(function, parameters, kinds, joint)
    functools.update_wrapper(checked, function)
    checked.__checks__ = dict(kinds)
    return checked


def _written(function: Any, parameters: list[inspect.Parameter], kinds: Mapping[str, Kind], joint: bool) -> Any:
    """A function of the same parameters, written out as dataclasses write theirs: going through them costs five times as much."""
    known: dict[str, Any] = {"_function": function, "_unfit": _unfit, "_UNFIT": _UNFIT}
    heads, lines, given = [], [], []
    for i, p in enumerate(parameters):
        if p.kind is p.KEYWORD_ONLY and not any(h.startswith("*") for h in heads):
            heads.append("*")
        stars = {p.VAR_POSITIONAL: "*", p.VAR_KEYWORD: "**"}.get(p.kind, "")
        known[f"_default{i}"] = p.default
        heads.append(f"{stars}{p.name}" + (f"=_default{i}" if p.default is not p.empty else ""))
        given.append(f"{p.name}={p.name}" if p.kind is p.KEYWORD_ONLY else f"{stars}{p.name}")
        if p.kind is p.POSITIONAL_ONLY and (i + 1 == len(parameters) or parameters[i + 1].kind is not p.kind):
            heads.append("/")
        if not isinstance(kind := kinds.get(p.name, _ANY), Anything):
            known[f"_kind{i}"], known[f"_quick{i}"] = kind, kind.quick
            left_out = "" if p.default is p.empty else f"{p.name} is not _default{i} and "
            lines += [
                f"    if {left_out}type({p.name}) not in _quick{i}:",
                f"        {p.name} = _kind{i}({p.name!r}, {p.name})",
            ]
    call = f"return _function({', '.join(given)})"
    if joint:
        named = ", ".join(f"{p.name!r}: {p.name}" for p in parameters)
        lines += [
            "    try:",
            f"        {call}",
            "    except _UNFIT as _error:",
            f"        raise _unfit(_error, {{{named}}}) from None",
        ]
    else:
        lines.append(f"    {call}")
    source = [f"def checked({', '.join(heads)}):", *lines]
    exec(compile("\n".join(source), f"<arguments of {function.__qualname__}>", "exec"), known)
    return known["checked"]


def _unfit(error: Exception, given: Mapping[str, Any]) -> Exception:
    """What is raised where arithmetic on these arguments ended in an error; those of machines and of traces stay what they are."""
    if type(error) not in _UNFIT or any(hasattr(value, "elementwise") for value in given.values()):
        return error
    return ValueError(f"{', '.join(f'{name}={shown(value)}' for name, value in given.items())}: {error}")


def declared(made: Callable[..., Any]) -> dict[str, Kind]:
    """What was declared of the arguments of a function or a class, by name; empty where nothing was."""
    if not isinstance(made, type):
        return dict(getattr(made, "__checks__", {}))
    entry = made.__new__ if issubclass(made, tuple) else made.__init__
    return {**getattr(made, "__checks__", {}), **getattr(entry, "__checks__", {})}
