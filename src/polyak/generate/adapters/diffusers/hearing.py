"""Guidance in pipelines that guide inside: what their network said is heard, and guided by, where they step."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from polyak.generate.adapters.diffusers.answers import Guide
from polyak.generate.evaluate import HALF, start_guidance
from polyak.generate.guidance import Guidance

_MOST = 4  # outputs that are kept: no pipeline that is understood has more than two in a step
_OFF = {True: 0.03, False: 1e-3}  # what a pipeline's combination may be off by, in half precision and else


class Hearing:
    """The outputs since the last step, and a guidance's state along a run.

    A pipeline that guides asks once for both predictions, in one batch whose first half is without the condition, or twice, first
    with it. What it makes of them is looked at in the first step of a run: it has to be ``u + w (c - u)``; which of the two
    is which follows from w > 1.
    """

    def __init__(self, guidance: Guidance) -> None:
        self.guidance = guidance
        self.outputs: list[Tensor] = []
        self.begin(None)

    def __deepcopy__(self, memo: Any) -> Hearing:
        """Of what it carries; a guidance remembers nothing, and is the same."""
        made = copy.copy(self)
        made.outputs, made.state = list(self.outputs), copy.deepcopy(self.state, memo)
        return made

    def begin(self, steps: int | None) -> None:
        """A run of so many steps begins; None: it is only planned."""
        if steps is None:
            self.outputs.clear()
        self.state: Any = None if steps is None else start_guidance(self.guidance, steps)
        self.swapped: bool | None = None

    def reindex(self, ancestors: Tensor) -> None:
        """After resampling: row i of the batch was row ``ancestors[i]``."""
        self.state = self.guidance.reindex(self.state, ancestors)

    def guide(self, given: Tensor, first: bool) -> Guide | None:
        """What makes a prediction of the outputs; None where the pipeline asked for one prediction only, in the midst of a run.

        Args:
            given: what the pipeline made of them.
            first: whether the evaluation begins a step.
        """
        outputs, self.outputs = [_without_variance(output, given) for output in self.outputs[-_MOST:]], []
        shapes = [tuple(output.shape) for output in outputs]
        if shapes == [(2 * given.shape[0], *given.shape[1:])]:
            u, c = outputs[0].chunk(2)
        elif shapes == [tuple(given.shape)] * 2:
            c, u = outputs
        elif shapes == [tuple(given.shape)] and (self.swapped is not None or not self.guidance.paired):
            if self.guidance.paired:
                return None
            c = u = outputs[0]
        elif shapes == [tuple(given.shape)]:
            raise ValueError(
                f"{self.guidance!r} needs both predictions, and the pipeline asks for one: give it a guidance_scale above 1 "
                "(true_cfg_scale in some), whose value has no further effect"
            )
        else:
            raise ValueError(
                f"the network said {shapes} before a step of shape {tuple(given.shape)}: this pipeline does not ask for a "
                "prediction with and one without the condition"
            )
        if self.swapped is None:
            self.swapped = _order(c, u, given)
        if self.swapped:
            c, u = u, c
        both = c.to(given.dtype), u.to(given.dtype)
        return lambda read: self.guidance(read(both[0]), read(both[1]), self.state, update=first)


def _without_variance(output: Tensor, given: Tensor) -> Tensor:
    learned = output.ndim > 1 and output.shape[1] == 2 * given.shape[1] and output.shape[2:] == given.shape[2:]
    return output.chunk(2, dim=1)[0] if learned else output


def _order(c: Tensor, u: Tensor, given: Tensor) -> bool | None:
    """Whether the two are the other way round; None where they are equal. Waits for the device.

    Raises:
        ValueError: what is given is no ``u + w (c - u)``.
    """
    c, u, g = (v.detach().float() for v in (c, u, given))
    d = c - u
    size = d.square().sum()
    w = (d * (g - u)).sum() / size
    off = (g - torch.lerp(u, c, w)).norm() / g.norm().clamp(min=torch.finfo(g.dtype).tiny)
    size, w, off = torch.stack([size, w, off]).tolist()
    if size == 0:
        return None
    if not off < _OFF[given.dtype in HALF]:
        raise ValueError(
            "the pipeline makes more of its two predictions than u + w (c - u), which another guidance would take the place of: "
            "switch that off (guidance_rescale=0), or use a modular pipeline with a guider"
        )
    return w < 0
