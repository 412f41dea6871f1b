"""Guidance: how a conditional and an unconditional prediction are combined.

A guidance is asked once per evaluation. What it carries along a trajectory (momentum, statistics) lives in a state that
:meth:`Guidance.init` makes anew for every trajectory, never in the object, so that one object serves many samplers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from polyak.core import checks
from polyak.generate.prediction import Prediction


@runtime_checkable
class Guidance(Protocol):
    """What sampling asks of a guidance.

    ``paired`` says whether the unconditional prediction is needed; where it is not, ``uncond`` is the conditional one. A
    guidance that needs it at some times only also has ``paired_at(t) -> bool``, or ``paired_at(t, state, first) -> bool``, which
    is told its state, too, and whether the evaluation begins a step. One whose ``init`` has an argument ``steps`` is told the
    number of steps of the trajectory (None where the solver finds its steps itself).
    """

    @property
    def paired(self) -> bool: ...

    def init(self) -> Any:
        """The state at the start of a trajectory; None for a guidance without memory."""
        ...

    def __call__(self, cond: Prediction, uncond: Prediction, state: Any = None, *, update: bool = True) -> Prediction:
        """The guided prediction.

        ``update`` is true at the first evaluation of a solver's step: only then may the state change; the further stages of
        a step read it.
        """
        ...

    def reindex(self, state: Any, ancestors: Tensor) -> Any:
        """The state after resampling: row i of the batch came from row ``ancestors[i]``."""
        ...


class OnOutputs(NamedTuple):
    """A guidance as a function of the network's two outputs, for runs in which nobody asks for its predictions.

    A guidance that can be one has a method ``on_outputs(kind)``, which says how outputs of a dialect are combined, or None.

    Attributes:
        kind: the dialect of what is made.
        reads_data: whether the weights of clean data are needed.
        combine: ``(cond, uncond, x, (a, b), state, first) -> output`` in x's dtype; clean data are ``a x + b output``.
    """

    kind: str
    reads_data: bool
    combine: Callable[[Tensor, Tensor, Tensor, tuple[float, float], Any, bool], Tensor]


class CFG:
    """Classifier-free guidance ``cond + (scale - 1) (cond - uncond)`` (Ho and Salimans, arXiv 2207.12598).

    Scale 1 is the conditional prediction (and asks for no other), 0 the unconditional one. The combination is linear, hence
    the same in every dialect.
    """

    @checks.arguments(scale=checks.real)
    def __init__(self, scale: float = 7.5) -> None:
        self.scale = scale

    def __repr__(self) -> str:
        return f"CFG(scale={self.scale:g})"

    @property
    def paired(self) -> bool:
        return self.scale != 1.0

    def init(self) -> None:
        return None

    def __call__(self, cond: Prediction, uncond: Prediction, state: None = None, *, update: bool = True) -> Prediction:
        if not self.paired:
            return cond
        other = uncond.output if uncond.kind == cond.kind else uncond.x0
        own = cond if uncond.kind == cond.kind else cond.replace(cond.x0, "sample")
        return own.replace(torch.lerp(other, own.output, self.scale))

    def on_outputs(self, kind: str) -> OnOutputs | None:
        return OnOutputs(kind, False, self._combine) if self.paired and type(self) is CFG else None

    def _combine(self, cond: Tensor, uncond: Tensor, x: Tensor, *_: Any) -> Tensor:
        return torch.lerp(uncond.to(x.dtype), cond.to(x.dtype), self.scale)

    def reindex(self, state: None, ancestors: Tensor) -> None:
        return None
