"""Ensemble forecasts by conditional diffusion: a context that is sometimes left out in training, and maps beside the samples."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from polyak.core import checks
from polyak.generate.cogdpm.guidance import EPS, MISSING, PrecisionGuidance, PrecisionState
from polyak.generate.evaluate import GUIDANCE
from polyak.generate.guidance import Guidance
from polyak.generate.prediction import DIALECT, Denoiser
from polyak.generate.process import ProbabilityPath
from polyak.generate.process.path import PATH
from polyak.generate.sampling import sample
from polyak.generate.solver import SOLVER, Solver, Step

_CONTEXT = checks.Tensor(floating=True, least_ndim=2)
_MASK = checks.Tensor(least_ndim=2) | None


class ContextDropout(nn.Module):
    """What a network is told of its context: the frames and a channel that says where they are known.

    In training a whole context is left out with probability p, so that the network can be asked without one; what it is told is
    then all 0.

    Args:
        p: in [0, 1); 0.1 to 0.2 is usual. With 0 the network learns no context-free prediction.

    Example:
        >>> drop = ContextDropout(0.1)
        >>> drop(torch.ones(5, 4, 8, 8)).shape  # four frames and the mask
        torch.Size([5, 5, 8, 8])
    """

    @checks.arguments(p=checks.Number(0, 1, "[)"))
    def __init__(self, p: float = 0.1) -> None:
        super().__init__()
        self.p = p

    def extra_repr(self) -> str:
        return f"p={self.p:g}"

    @checks.arguments(context=_CONTEXT, mask=_MASK, generator=checks.generator | None)
    def forward(
        self, context: Tensor, mask: Tensor | None = None, *, generator: torch.Generator | None = None
    ) -> Tensor:
        """The context, 0 where it is not known, and the mask: (B, C, ...) to (B, C + 1, ...).

        Args:
            context: (B, C, ...), frames as channels. It may be NaN where the mask is False.
            mask: bool, True where it is known, (B, 1, ...) or what broadcasts to it; None: everywhere.
            generator: of what is left out; in training mode only.
        """
        known = context.new_ones(len(context), 1, *context.shape[2:])
        if mask is not None:
            seen = _of_rows(mask, context)
            context, known = context.masked_fill(~seen, 0.0), known * seen.to(context.dtype)
        told = torch.cat([context, known], 1)
        if not (self.training and self.p):
            return told
        kept = torch.rand(len(context), generator=generator, device=context.device) >= self.p
        return told * kept.to(told.dtype).reshape(-1, *[1] * (told.ndim - 1))


def _of_rows(mask: Tensor, context: Tensor) -> Tensor:
    """A mask as one of each row's frames alike, (B, 1, ...)."""
    shape = (len(context), 1, *context.shape[2:])
    if mask.dtype != torch.bool:
        raise ValueError(f"mask must be of bool, True where the context is known, got {mask.dtype}")
    try:
        return mask.to(context.device).expand(shape)
    except RuntimeError:
        raise ValueError(f"mask must broadcast to {shape}, got {tuple(mask.shape)}") from None


@checks.arguments(
    model=checks.Function("a network (x, label of t, told) -> output", 3), context=_CONTEXT, process=PATH, prediction=DIALECT,
    mask=_MASK, context_free=checks.flag, sigma_data=checks.positive,
)  # fmt: skip
def context_denoiser(
    model: Callable[[Tensor, Tensor, Tensor], Tensor],
    context: Tensor,
    process: ProbabilityPath,
    prediction: str = "epsilon",
    *,
    mask: Tensor | None = None,
    context_free: bool = True,
    sigma_data: float = 0.5,
) -> Denoiser:
    """The denoiser of a forecast after this context; its unconditional prediction is told nothing.

    Args:
        model: ``(x, label of t, told) -> output``, with ``told`` as :class:`ContextDropout` makes it: (B, C + 1, ...).
        context: the frames before, (B, C, ...), a row for each row of x.
        process, prediction, sigma_data: as of :class:`Denoiser`.
        mask: bool, True where the context is known, (B, 1, ...).
        context_free: whether the network was trained without its context, too. Without that guidance is refused.

    Raises:
        ValueError: a context with NaN that no mask leaves out.
    """
    _need_finite(context, mask)
    told = ContextDropout(0.0)(context, mask)
    nothing = torch.zeros_like(told)
    return Denoiser(
        lambda x, t: model(x, t, told),
        process,
        prediction,
        unconditional=(lambda x, t: model(x, t, nothing)) if context_free else None,
        sigma_data=sigma_data,
    )


def _need_finite(context: Tensor, mask: Tensor | None) -> None:
    seen = context if mask is None else context.masked_fill(~_of_rows(mask, context), 0.0)
    if not bool(seen.isfinite().all()):
        where = "a mask that is False there" if mask is None else "mask to be False there"
        raise ValueError(f"context has NaN or infinity, which needs {where}")


@checks.arguments(
    samples=checks.Tensor(floating=True, least_ndim=3), uncertainty=checks.Tensor(floating=True, least_ndim=2),
    precision=checks.Tensor(floating=True, least_ndim=2),
)  # fmt: skip
@dataclass(frozen=True, eq=False)
class Forecast:
    """An ensemble forecast.

    Attributes:
        samples: (B, M, ...): M members for each of B contexts.
        uncertainty: (B, ...): U, the variance of the predicted data over the steps, averaged over the members.
        precision: (B, ...): ``1 / (U + 1e-6)``.
    """

    samples: Tensor
    uncertainty: Tensor
    precision: Tensor


@checks.arguments(
    denoiser=checks.Function("a function of the context, or of (context, mask), that returns a Denoiser"),
    context=_CONTEXT, process=PATH | None, solver=SOLVER, guidance=GUIDANCE | None, members=checks.Integer(1),
    shape=checks.Each(checks.Integer(1), least=1) | None, mask=_MASK, steps=checks.Integer(1) | None, nfe=checks.Integer(1) | None,
    grid=checks.anything, generator=checks.generator | None,
)  # fmt: skip
def ensemble_forecast(
    denoiser: Callable[..., Denoiser],
    context: Tensor,
    *,
    process: ProbabilityPath | None = None,
    solver: Solver,
    guidance: Guidance | None = None,
    members: int = 8,
    shape: Sequence[int] | None = None,
    mask: Tensor | None = None,
    steps: int | None = None,
    nfe: int | None = None,
    grid: Any = None,
    generator: torch.Generator | None = None,
) -> Forecast:
    """Several forecasts for each context, and how precise each pixel is.

    Args:
        denoiser: from a context (B * M, C, ...), each row M times, to a :class:`Denoiser`; with a mask it is given it, too, as
            ``mask=``. ``partial(context_denoiser, network, process=...)`` is one.
        context: (B, C, ...).
        process: left out, the denoiser's own.
        guidance: :class:`PrecisionGuidance`, or any other (the map is made all the same); None: by the context alone.
        members: M.
        shape: of one forecast, (F, ...); None: that of one context.
        mask: bool, True where the context is known, (B, 1, ...). Pixels elsewhere have no part in the weights' quantile, for which
            they must be the forecast's.
        solver, steps, nfe, grid, generator: as of :func:`polyak.generate.sample`.

    Raises:
        ValueError: guidance without a context-free prediction; a context with NaN that no mask leaves out.
    """
    _need_finite(context, mask)
    rows = context.repeat_interleave(members, 0)
    if mask is None:
        asked = denoiser(rows)
    else:
        mask = _of_rows(mask, context).repeat_interleave(members, 0)
        asked = denoiser(rows, mask=mask)
    event = tuple(context.shape[1:] if shape is None else shape)
    watched = _watched(guidance, members, mask if mask is None else _of_forecasts(mask, event))
    if watched.paired and getattr(asked, "unconditional", asked) is None:
        raise ValueError(f"{MISSING}: train the network with ContextDropout(p), p > 0, or leave guidance out")
    states: list[PrecisionState] = []

    def keep(step: Step) -> None:
        states[:] = [step.guidance]

    x = sample(
        asked, (len(rows), *event), process=process, solver=solver, guidance=watched, steps=steps, nfe=nfe, grid=grid,
        generator=generator, dtype=context.dtype, device=context.device, callback=keep,
    )  # fmt: skip
    u = states[0].uncertainty if states else None
    u = torch.zeros_like(x) if u is None else u
    u = u.unflatten(0, (len(context), members)).mean(1)
    return Forecast(x.unflatten(0, (len(context), members)), u, 1 / (u + EPS))


def _of_forecasts(mask: Tensor, event: tuple[int, ...]) -> Tensor:
    """A context's mask (B, 1, ...) as that of forecasts of this shape: the same for all that comes before its own dimensions."""
    own = mask.shape[2:]
    return mask.reshape(len(mask), *[1] * (len(event) - len(own)), *own)


def _watched(guidance: Guidance | None, members: int, mask: Tensor | None) -> PrecisionGuidance:
    """The guidance as one that makes a map: any other is one's inner guidance, with W = 1."""
    if isinstance(guidance, PrecisionGuidance):
        own = guidance.members
        if own not in (None, members):
            raise ValueError(f"guidance.members must be members={members}, or left out, got {own}")
        given = guidance.mask if mask is None else mask
        return replace(guidance, members=members, mask=given)
    if guidance is None:
        return PrecisionGuidance(0.0, pool="member")
    return PrecisionGuidance(1.0, pool="member", clip=(1.0, 1.0), inner=guidance)
