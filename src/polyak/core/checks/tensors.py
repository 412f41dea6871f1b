"""What an argument may be: kinds of PyTorch's objects. Importing this does not import torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from polyak.core.checks.kinds import MOST, Each, Kind, Like, Number, measured, real
from polyak.core.checks.messages import shown


class _OfTorch(Kind):
    """An instance of one of torch's classes."""

    attribute = "Tensor"
    words = "a tensor"

    def like(self, value: Any) -> bool:
        import torch

        return isinstance(value, getattr(torch, self.attribute))


class Tensor(_OfTorch):
    """A tensor.

    Args:
        floating: of floating point (a complex one is none).
        inexact: of floating point, or complex.
        ndim: its number of dimensions, where that is known; ``least_ndim`` where more are allowed.
    """

    def __init__(
        self, *, floating: bool = False, inexact: bool = False, ndim: int | None = None, least_ndim: int = 0
    ) -> None:
        self.floating, self.inexact, self.ndim, self.least_ndim = floating, inexact, ndim, least_ndim
        self.quick: set[type] = set()
        shape = (
            f" of {ndim} dimensions"
            if ndim is not None
            else f" of at least {least_ndim} dimensions"
            if least_ndim
            else ""
        )
        what = "floating-point " if floating else "floating-point or complex " if inexact else ""
        self.words = f"a {what}tensor{shape}"

    def __call__(self, name: str, value: Any) -> Any:
        super().__call__(name, value)
        wrong = (self.floating or self.inexact) and not (
            value.is_floating_point() or (self.inexact and value.is_complex())
        )
        wrong = wrong or value.ndim < self.least_ndim
        if wrong or (self.ndim is not None and value.ndim != self.ndim):
            raise ValueError(f"{name} must be {self.words}, got {value.dtype}, {tuple(value.shape)}")
        if not (self.floating or self.inexact or self.least_ndim) and self.ndim is None:
            self.quick.add(type(value))
        return value


class Numbers(Kind):
    """Real numbers in one dimension: a sequence, an array or a tensor of them, at least so many."""

    def __init__(self, least: int = 1, kind: Number = real, words: str = "") -> None:
        self.least, self.kind = least, kind
        self.words = words or f"a sequence of at least {least} numbers"

    def like(self, value: Any) -> bool:
        if isinstance(value, (str, bytes, bytearray, type)):
            return False
        return isinstance(value, Sequence) or (hasattr(value, "tolist") and hasattr(value, "ndim"))

    def __call__(self, name: str, value: Any) -> Any:
        super().__call__(name, value)
        members: Any = value
        if not isinstance(value, Sequence):
            if value.ndim != 1:
                raise ValueError(f"{name} must be {self.words}, got shape {tuple(value.shape)}")
            members = value.tolist()
        if len(members) < self.least:
            raise ValueError(f"{name} must be {self.words}, got {len(members)}")
        low, high = self.kind.low, self.kind.high
        for i, member in enumerate(members):
            if not (type(member) is float and low < member < high):
                self.kind(f"{name}[{i}]", member.item() if hasattr(member, "item") else member)  # type: ignore[union-attr]
        return value


class Array(Kind):
    """Numbers of any shape: a tensor, an array, nested sequences, or one number.

    Args:
        whole: whether they must be whole.
    """

    def __init__(self, *, whole: bool = False) -> None:
        self.whole, self.words = whole, f"{'whole' if whole else 'finite'} numbers: a tensor, or sequences of them"

    def like(self, value: Any) -> bool:
        if isinstance(value, (Sequence, bytearray)) and not tensor.like(value):
            return not isinstance(value, (str, bytes, bytearray)) and all(self.like(member) for member in value)
        if (
            hasattr(value, "ndim")
            and not isinstance(value, type)
            and (dtype := getattr(value, "dtype", None)) is not None
        ):
            return not any(word in str(dtype) for word in ("complex", "bool", "object", "<U", "|S", "datetime"))
        return real.like(value)

    def __call__(self, name: str, value: Any) -> Any:
        import torch

        super().__call__(name, value)
        try:
            made = torch.as_tensor(value, dtype=torch.float64)
            right = bool(((made.frac() == 0) & (made.abs() < MOST)).all() if self.whole else made.isfinite().all())
        except (TypeError, ValueError, RuntimeError, OverflowError):
            right = False
        if not right:
            raise ValueError(f"{name} must be {self.words}, got {shown(value)}")
        return value


class Generator(_OfTorch):
    """A ``torch.Generator``."""

    attribute = "Generator"
    words = "a torch.Generator"


class DType(_OfTorch):
    """A ``torch.dtype``; of floating point unless that does not matter."""

    attribute = "dtype"

    def __init__(self, *, floating: bool = True) -> None:
        self.floating, self.words = floating, f"a {'floating-point ' if floating else ''}torch.dtype"

    def __call__(self, name: str, value: Any) -> Any:
        if self.floating and not super().__call__(name, value).is_floating_point:
            raise ValueError(f"{name} must be {self.words}, got {value}")
        return value


class Device(Kind):
    """A device, as torch takes it: a ``torch.device``, a name such as "cuda:0", or an accelerator's number."""

    words = "a torch.device or its name"

    def like(self, value: Any) -> bool:
        import torch

        return isinstance(value, (torch.device, str)) or (type(value) is int)

    def __call__(self, name: str, value: Any) -> Any:
        import torch

        super().__call__(name, value)
        try:
            torch.device(value)
        except (RuntimeError, ValueError, OverflowError):
            raise ValueError(f"{name} must be {self.words}, got {shown(value)}") from None
        return value


class Module(Kind):
    """A ``torch.nn.Module``."""

    words = "a torch.nn.Module"

    def like(self, value: Any) -> bool:
        from torch import nn

        return isinstance(value, nn.Module)


class Optimizer(Kind):
    """A ``torch.optim.Optimizer``."""

    words = "a torch.optim.Optimizer"

    def like(self, value: Any) -> bool:
        from torch.optim import Optimizer as Base

        return isinstance(value, Base)


class Operand(Kind):
    """What recurrences and elementwise functions work on: a number, a tensor, or a traced value of an update rule.

    Args:
        number: what numbers may be; tensors are not looked at, which would wait for a device. Default: any, also infinite and NaN.
        truths: whether a bool is one.
    """

    def __init__(self, number: Number = measured, *, truths: bool = False) -> None:
        self.number, self.truths = number, truths
        self.words = f"{number.words}{', a bool' if truths else ''}, a tensor or a traced value"
        self.quick: set[type] = {*((float,) if number is measured else ()), *((bool,) if truths else ())}

    def like(self, value: Any) -> bool:
        return (
            real.like(value)
            or hasattr(value, "elementwise")
            or tensor.like(value)
            or (self.truths and isinstance(value, bool))
        )

    def __call__(self, name: str, value: Any) -> Any:
        kind = type(value)
        if kind is float or (isinstance(value, float) and kind.__module__.startswith("polyak")):
            # A time of a run is a float that knows more: it stays what it is.
            if self.number is measured:
                self.quick.add(kind)
            elif not self.number.low < value < self.number.high:
                self.number(name, value)
            return value
        if not real.like(value):
            self.quick.add(type(super().__call__(name, value)))
            return value
        number = self.number(name, value)
        if kind is not int:
            return number
        if not -MOST <= value <= MOST:
            raise ValueError(f"{name} must be a number that 64 bits hold, got {shown(value)}")
        return value


class Scalar(Kind):
    """A number, or a tensor of one: also infinite and NaN."""

    words = "a number, or a tensor of one element"

    def like(self, value: Any) -> bool:
        return real.like(value) or tensor.like(value)

    def __call__(self, name: str, value: Any) -> Any:
        if not tensor.like(value):
            return measured(name, value)
        if value.numel() != 1 or value.is_complex():
            raise ValueError(f"{name} must be {self.words}, got {shown(value)}")
        return value


tensor = Tensor()
floating = Tensor(floating=True)
generator = Generator()
generators = generator | Each(generator, words="one for each row")
dtype = DType()
device = Device()
module = Module()
optimizer = Optimizer()
scalar = Scalar()
array = Array()
operand = Operand()
condition = Operand(truths=True)
state_dict = Like("a state dict", "keys", "__getitem__")
