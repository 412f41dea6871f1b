"""What an argument may be: kinds of plain values. Each is called with the argument's name and value, and returns the value.

A kind refuses a wrong type by TypeError and a wrong value by ValueError; the message has the name, the value and what is
allowed. ``a | b`` is either of two kinds, ``a | None`` one that may be left out.
"""

from __future__ import annotations

import functools
import inspect
import math
import os
import sys
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from numbers import Integral, Real
from types import FunctionType, MethodType
from typing import Any

from polyak.core.checks.messages import shape_of, shown, suggestion

MOST = 2**63 - 1  # what 64 bits hold, as counters on devices and in files do
_LONGEST_NAME = 255  # bytes of one file's name


class Kind:
    """What an argument may be. A subclass says in words what it takes, and looks at the type and then at the value."""

    words: str = "what its description says"
    quick: Collection[type] = ()  # types of which every value is allowed, as far as they are known

    def like(self, value: Any) -> bool:
        """Whether a value is of the right type."""
        raise NotImplementedError

    def __call__(self, name: str, value: Any) -> Any:
        """The value, where it is allowed; TypeError or ValueError where not."""
        if not self.like(value):
            raise TypeError(f"{name} must be {self.words}, got {shown(value)}")
        return value

    def __or__(self, other: Kind | None) -> Either:
        return Either(self, Nothing() if other is None else other)

    def __repr__(self) -> str:
        return f"<{self.words}>"


class Nothing(Kind):
    """None alone."""

    words = "None"
    quick = frozenset({type(None)})

    def like(self, value: Any) -> bool:
        return value is None


class Either(Kind):
    """What any of several kinds takes; the first whose type fits decides."""

    def __init__(self, *kinds: Kind) -> None:
        self.kinds = tuple(k for kind in kinds for k in (kind.kinds if isinstance(kind, Either) else (kind,)))
        *most, last = (kind.words for kind in self.kinds)
        self.words = f"{', '.join(most)} or {last}"
        self.quick: set[type] = set()

    def like(self, value: Any) -> bool:
        return any(kind.like(value) for kind in self.kinds)

    def __call__(self, name: str, value: Any) -> Any:
        for kind in self.kinds:
            if kind.like(value):
                made = kind(name, value)
                if type(value) in kind.quick:
                    self.quick.add(type(value))
                return made
        raise TypeError(f"{name} must be {self.words}, got {shown(value)}")


class Number(Kind):
    """A real number in an interval: a bool is none, nor is a tensor.

    Args:
        low, high, ends: the interval; ``ends`` says which ends belong to it: "[]", "[)", "(]" or "()".
        infinite: whether an end at infinity may be reached.
        nan: whether NaN is one, too: what was measured may be.
    """

    def __init__(
        self,
        low: float = -math.inf,
        high: float = math.inf,
        ends: str = "[]",
        *,
        infinite: bool = False,
        nan: bool = False,
    ) -> None:
        self.low, self.high, self.ends, self.infinite, self.nan = low, high, ends, infinite, nan
        self.range = f"in {ends[0]}{low:g}, {high:g}{ends[1]}"
        if high == math.inf:
            self.range = "" if low == -math.inf else f"{'>=' if ends[0] == '[' else '>'} {low:g}"
        self.words = f"a number {self.range}".rstrip()

    def like(self, value: Any) -> bool:
        return type(value) is float or (isinstance(value, Real) and not isinstance(value, bool))

    def __call__(self, name: str, value: Any) -> float:
        if type(value) is float and self.low < value < self.high:
            return value
        if not self.like(value):
            raise TypeError(f"{name} must be a number, got {shown(value)}")
        try:
            number = float(value)
        except OverflowError:  # an integer beyond the largest float
            number = math.inf if value > 0 else -math.inf
            if self.infinite:
                raise ValueError(f"{name} must be below the largest float, got {shown(value)}") from None
        if math.isnan(number) and self.nan:
            return number
        if math.isnan(number) or (math.isinf(number) and not self.infinite):
            raise ValueError(f"{name} must be finite, got {shown(value)}")
        above = number >= self.low if self.ends[0] == "[" else number > self.low
        below = number <= self.high if self.ends[1] == "]" else number < self.high
        if not (above and below):
            raise ValueError(f"{name} must be {self.range}, got {shown(value)}")
        return number


class Integer(Kind):
    """An integer, at least ``least`` and at most ``most``; a bool is none."""

    def __init__(self, least: int | None = None, most: int | None = None) -> None:
        self.least, self.most = least, MOST if most is None else most
        limits = ("" if least is None else f" >= {least}", "" if most is None else f" and at most {most}")
        self.words = f"an integer{limits[0]}{limits[1]}"

    def like(self, value: Any) -> bool:
        return type(value) is int or (isinstance(value, Integral) and not isinstance(value, bool))

    def __call__(self, name: str, value: Any) -> int:
        if type(value) is int and (-MOST if self.least is None else self.least) <= value <= self.most:
            return value
        if not self.like(value):
            raise TypeError(f"{name} must be an integer, got {shown(value)}")
        number = int(value)
        least = -MOST - 1 if self.least is None else self.least
        if number < least:
            raise ValueError(f"{name} must be at least {least}, got {shown(value)}")
        if number > self.most:
            raise ValueError(f"{name} must be at most {self.most}, got {shown(value)}")
        return number


class Choice(Kind):
    """One of a few values (1 is not True); a near miss is suggested."""

    def __init__(self, *options: Any) -> None:
        self.options = options
        self.listed = ", ".join(map(repr, options))
        self.words = f"one of {self.listed}" if len(options) > 1 else self.listed
        self.types = tuple({type(option) for option in options})
        truths = all(any(o is truth for o in options) for truth in (False, True))
        self.quick = {*((bool,) if truths else ()), *((type(None),) if any(o is None for o in options) else ())}

    def like(self, value: Any) -> bool:
        plain = _plain(value)
        return any(plain is o for o in self.options) if isinstance(plain, bool) else isinstance(plain, self.types)

    def __call__(self, name: str, value: Any) -> Any:
        if type(value) is str and value in self.options:
            return value
        plain = _plain(value)
        if any(isinstance(plain, bool) == isinstance(o, bool) and _equal(plain, o) for o in self.options):
            return plain
        raise ValueError(f"{name} must be one of {self.listed}, got {shown(value)}{suggestion(value, self.options)}")


def _plain(value: Any) -> Any:
    """NumPy's numbers and truths as Python's."""
    numpy = sys.modules.get("numpy")
    return value.item() if numpy is not None and isinstance(value, numpy.generic) else value


def _equal(value: Any, option: Any) -> bool:
    # Values of other types are not compared: a tensor's answer is none, and others may raise.
    return value is option or (isinstance(value, (bool, int, float, str)) and value == option)


class Betas(Kind):
    """So many retention factors, each in [0, 1); tensors of one element are read. ``owner`` is who needs them."""

    def __init__(self, count: int, owner: str) -> None:
        self.count, self.owner = count, owner
        self.words = f"{count} numbers in [0, 1)"
        self.each = Number(0.0, 1.0, "[)")

    def like(self, value: Any) -> bool:
        return isinstance(value, Sequence) and not isinstance(value, (str, bytes))

    def __call__(self, name: str, value: Any) -> tuple[float, ...]:
        words = {1: "one beta", 2: "two betas", 3: "three betas"}
        if not isinstance(value, Sequence) or isinstance(value, bytes) or len(value) != self.count:
            got = len(value) if isinstance(value, Sequence) else shown(value)
            raise ValueError(f"{self.owner} needs {words.get(self.count, f'{self.count} betas')}, got {got}")
        numbers = [b.item() if _is_one_element(b) else b for b in value]
        return tuple(self.each(f"{name}[{i}]", b) for i, b in enumerate(numbers))


def _is_one_element(value: Any) -> bool:
    shape = shape_of(value)
    return shape is not None and math.prod(shape) == 1 and hasattr(value, "item")


class Text(Kind):
    """A string; not an empty one unless that is allowed."""

    def __init__(self, *, empty: bool = False) -> None:
        self.empty, self.words = empty, "a string" if empty else "a string that is not empty"

    def like(self, value: Any) -> bool:
        return isinstance(value, str)

    def __call__(self, name: str, value: Any) -> str:
        if not (super().__call__(name, value) or self.empty):
            raise ValueError(f"{name} must not be empty, got {shown(value)}")
        return value


class Path(Kind):
    """A path in the file system, which need not be there: a string or an object like ``pathlib.Path``."""

    words = "a path"

    def like(self, value: Any) -> bool:
        return isinstance(value, str) or (isinstance(value, os.PathLike) and not isinstance(value, type))

    def __call__(self, name: str, value: Any) -> Any:
        text = os.fspath(super().__call__(name, value))
        encoded = os.fsencode(text) if "\0" not in str(text) else b"\0"
        if not encoded.strip() or b"\0" in encoded:
            raise ValueError(f"{name} must be a path, got {shown(value)}")
        if any(len(part) > _LONGEST_NAME for part in encoded.split(os.fsencode(os.sep))):
            raise ValueError(f"{name} must have names of at most {_LONGEST_NAME} bytes, got {shown(value)}")
        return value


class Function(Kind):
    """What can be called with so many arguments, where their number is known; a class is none unless ``classes`` says so."""

    def __init__(self, words: str = "a function", arguments: int | None = None, *, classes: bool = False) -> None:
        self.words, self.arguments, self.classes = words, arguments, classes

    def like(self, value: Any) -> bool:
        if not callable(value) or (isinstance(value, type) and not self.classes):
            return False
        return self.arguments is None or _takes(value, self.arguments)


def _takes(value: Any, count: int) -> bool:
    """Whether a function may be called with so many arguments; of one that does not say, True."""
    plain, bound = (value, 0) if isinstance(value, FunctionType) else (type(value).__call__, 1)
    if isinstance(value, MethodType):
        plain = value.__func__
    if isinstance(plain, FunctionType) and not plain.__code__.co_kwonlyargcount:  # inspect takes twenty times as long
        code, given = plain.__code__, count + bound
        least = code.co_argcount - len(plain.__defaults__ or ())
        return least <= given and (given <= code.co_argcount or bool(code.co_flags & inspect.CO_VARARGS))
    try:
        signature = inspect.signature(value)
    except (TypeError, ValueError):  # many that are not written in Python do not say
        return True
    try:
        signature.bind(*[None] * count)
    except TypeError:
        return False
    return True


class Instance(Kind):
    """An object of one of these classes; the class itself is none."""

    def __init__(self, *classes: type, words: str = "") -> None:
        self.classes, self.quick = classes, frozenset(classes)
        self.words = words or " or ".join(f"a {c.__module__.partition('.')[0]}.{c.__name__}" for c in classes)

    def like(self, value: Any) -> bool:
        return isinstance(value, self.classes)


class Like(Kind):
    """An object that has these attributes, whatever its class; a class itself is none."""

    def __init__(self, words: str, *attributes: str) -> None:
        self.words, self.attributes = words, attributes

    def like(self, value: Any) -> bool:
        if isinstance(value, type):
            return False
        try:
            return all(hasattr(value, attribute) for attribute in self.attributes)
        except Exception:  # an attribute that raises is none
            return False


class Each(Kind):
    """A sequence (a list, a tuple) whose members are all of one kind.

    Args:
        kind: of the members.
        least, count: how many there must be at least, or exactly.
        words: of the whole.
    """

    def __init__(self, kind: Kind, *, least: int = 0, count: int | None = None, words: str = "") -> None:
        self.kind, self.least, self.count = kind, least, count
        many = f"{count} " if count is not None else f"at least {least} " if least else ""
        self.words = words or f"a sequence, each member {kind.words}"
        self.many = many

    def like(self, value: Any) -> bool:
        return type(value) in (list, tuple) or (
            isinstance(value, Sequence) and not isinstance(value, (str, bytes, bytearray))
        )

    def __call__(self, name: str, value: Any) -> Any:
        super().__call__(name, value)
        if len(value) < self.least or (self.count is not None and len(value) != self.count):
            raise ValueError(f"{name} must have {self.many}members, got {len(value)}")
        for i, member in enumerate(value):
            if type(member) not in self.kind.quick:
                self.kind(f"{name}[{i}]", member)
        return value


class Several(Kind):
    """An iterable whose members are all of one kind, which is made a list; a string is none, nor is a tensor."""

    def __init__(self, kind: Kind, *, words: str = "") -> None:
        self.kind, self.words = kind, words or f"an iterable, each member {kind.words}"

    def like(self, value: Any) -> bool:
        return isinstance(value, Iterable) and not (
            isinstance(value, (str, bytes, bytearray, Mapping)) or hasattr(value, "ndim")
        )

    def __call__(self, name: str, value: Any) -> list[Any]:
        return [self.kind(f"{name}[{i}]", member) for i, member in enumerate(super().__call__(name, value))]


class Stream(Several):
    """An iterable that is gone through as it is used: its members are looked at then."""

    def __init__(self, words: str = "an iterable") -> None:
        super().__init__(Anything("looked at when its turn comes"), words=words)

    def __call__(self, name: str, value: Any) -> Any:
        return Kind.__call__(self, name, value)


class Map(Kind):
    """A mapping, whose values are all of one kind where one is given."""

    def __init__(self, kind: Callable[[str, Any], Any] | None = None, words: str = "a dict") -> None:
        self.kind, self.words = kind, words

    def like(self, value: Any) -> bool:
        return isinstance(value, Mapping)

    def __call__(self, name: str, value: Any) -> Any:
        super().__call__(name, value)
        if self.kind is not None:
            for key, member in value.items():
                self.kind(f"{name}[{key!r}]", member)
        return value


class Anything(Kind):
    """Anything at all, for a reason that is said: what is given on as it is, or is checked elsewhere."""

    def __init__(self, why: str) -> None:
        self.words = f"anything ({why})"

    def like(self, value: Any) -> bool:
        return True


anything = Anything("it is handed on as it is")
real = Number()
non_negative = Number(0)
positive = Number(0, ends="()")
fraction = Number(0, 1)
retention = Number(0, 1, "[)")
measured = Number(infinite=True, nan=True)
flag = Choice(False, True)
optional_flag = Choice(None, False, True)
text = Text()
path = Path()
function = Function()


_number, _integer = functools.cache(Number), functools.cache(Integer)


def between(name: str, value: Any, low: float, high: float, *, ends: str = "[]") -> float:
    """A finite number in an interval; ``ends`` says which ends belong to it: "[]", "[)", "(]" or "()"."""
    return _number(low, high, ends)(name, value)


def integer(name: str, value: Any, *, least: int | None = None, most: int | None = None) -> int:
    """An integer, at least ``least`` and at most ``most``."""
    return _integer(least, most)(name, value)


def one_of(name: str, value: Any, allowed: Iterable[Any]) -> Any:
    """A member of ``allowed`` (1 is not True); a near miss is suggested."""
    return Choice(*allowed)(name, value)


def betas(value: Any, count: int, owner: str) -> tuple[float, ...]:
    """``count`` retention factors, each in [0, 1); tensors of one element are read."""
    return Betas(count, owner)("betas", value)
