"""A pipeline's network output as a prediction, at the state before it was rounded to half precision."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from polyak.generate.adapters.diffusers.plan import Plan
from polyak.generate.ddim import DDIM
from polyak.generate.evaluate import HALF, Corrector
from polyak.generate.linear import tabled
from polyak.generate.prediction import Prediction
from polyak.generate.process import ProbabilityPath
from polyak.generate.solver import Solver


class Negated(Prediction):
    """Of a network that answers the opposite: what it says is minus its dialect."""

    def weights(self, view: str) -> tuple[Any, Any]:
        a, b = super().weights(view)
        return a, -b

    def replace(self, output: Tensor, kind: str | None = None) -> Prediction:
        """An output that such a network would give, or one of a dialect that is named."""
        if kind is not None:
            return super().replace(output, kind)
        return Negated(output, self.x, self.t, self.process, self.kind, sigma_data=self.sigma_data)

    def rebase(self, x: Tensor) -> Prediction:
        """The same output, taken to be said of x."""
        return Negated(self.output.to(x.dtype), x, self.t, self.process, self.kind, sigma_data=self.sigma_data)


def said(plan: Plan, process: ProbabilityPath, output: Tensor, x: Tensor, t: float) -> Prediction:
    """A network's output at (x, t), read as the configuration has it, without what was learned of variances."""
    if plan.learned and output.shape[1] == 2 * x.shape[1]:
        output = output.chunk(2, dim=1)[0]
    kind = Prediction if plan.gain > 0 else Negated
    return kind(output, x, t, process, plan.kind, sigma_data=plan.sigma_data)


Guide = Callable[[Callable[[Tensor], Prediction]], Prediction]


def predicted(
    plan: Plan,
    process: ProbabilityPath,
    solver: Solver,
    corrector: Corrector | None,
    output: Tensor,
    x: Tensor,
    t: float,
    clipped_eps: bool,
    guide: Guide | None = None,
) -> Prediction:
    """The prediction that a network's output is.

    Args:
        plan, process, solver, corrector: of the run.
        output: shape (B, C, ...), twice the channels with a learned variance.
        x: the state, shape (B, C, ...).
        t: its time.
        clipped_eps: whether the noise, too, is that of the clipped data.
        guide: makes the prediction of others than the output, each of which it has read.
    """

    def read(output: Tensor) -> Prediction:
        made = said(plan, process, output, x, t)
        # A coroutine may read the output itself.
        return (
            made
            if plan.gain > 0 or tabled(solver)
            else Prediction(-made.output, x, t, process, made.kind, sigma_data=plan.sigma_data)
        )

    made = read(output) if guide is None else guide(read)
    if corrector is None:
        return made
    x0 = corrector(made.x0, t)
    if plan.facts.keeps_eps and not clipped_eps and isinstance(solver, DDIM):
        # DDIM's own step keeps the network's eps: the state is moved along, so that x = alpha x0 + sigma eps holds.
        made = made.rebase(torch.add(x, x0 - made.x0, alpha=made.alpha))  # type: ignore[arg-type]
    return Prediction(x0, made.x, t, process, "sample")


def unrounded(sample: Tensor, exact: Tensor | None) -> Tensor:
    """A sample in at least single precision: of one in half precision what it was before it was rounded.

    Gradients go to the sample that was given.

    Args:
        sample: as a pipeline hands it over.
        exact: the state that the last step returned, before it was rounded; None if there is none.
    """
    if sample.dtype not in HALF:
        return sample
    given = sample.float()
    if exact is None or (exact.shape, exact.dtype, exact.device) != (given.shape, given.dtype, given.device):
        return given
    value = torch.where(exact.to(sample.dtype) == sample, exact, given.detach())
    if not given.requires_grad:
        return value
    finite = given.masked_fill(~given.detach().isfinite(), 0.0)
    return value + (finite - finite.detach())


def kept_exactly(made: Tensor, dtype: torch.dtype) -> Tensor | None:
    """What :func:`unrounded` needs of a state that is handed out in a dtype."""
    return made.detach() if dtype in HALF else None
