"""Precision-weighted guidance: more guidance where the predicted data have changed more along the trajectory."""

from __future__ import annotations

import inspect
import math
import warnings
from dataclasses import KW_ONLY, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from polyak.core import checks
from polyak.generate.evaluate import GUIDANCE, HALF, start_guidance
from polyak.generate.guidance import Guidance

EPS = 1e-6  # of the precision, in units of the data squared
MISSING = "precision guidance needs a context-free prediction"
_ROWS = checks.Tensor(floating=True, least_ndim=2)


@checks.arguments(
    members=checks.Integer(1), window=checks.Integer(2) | None, count=checks.Integer(0), mean=_ROWS | None,
    m2=_ROWS | None, recent=checks.Each(_ROWS), inner=checks.anything,
)  # fmt: skip
@dataclass(eq=False)
class PrecisionState:
    """What precision guidance carries along one trajectory: the running variance of the predicted data (Welford's method).

    Attributes:
        members: so many rows of the batch, one after the other, are one forecast's, and share the mean of their variances.
        window: of how many of the last steps the variance is; None: of all.
        count: steps that have begun.
        mean: of the data predicted with the context, over those steps, shape (B, ...); None before the first.
        m2: the sum of squares about it.
        recent: the last predictions, with a ``window`` only.
        inner: the state of a guidance whose update is weighted.
    """

    members: int = 1
    window: int | None = None
    count: int = 0
    mean: Tensor | None = None
    m2: Tensor | None = None
    recent: tuple[Tensor, ...] = ()
    inner: Any = None

    def add(self, x0: Tensor) -> None:
        """One more step's prediction. In float32 at least: squares underflow in half precision."""
        x0 = x0.float() if x0.dtype in HALF else x0
        if len(x0) % self.members:
            raise ValueError(f"members={self.members} must divide the batch, got {len(x0)} rows")
        if self.mean is not None and self.mean.shape != x0.shape:
            raise ValueError(
                f"state is of predictions of shape {tuple(self.mean.shape)}, got {tuple(x0.shape)}: every forecast begins with "
                "a state of its own, init()"
            )
        x0 = x0.clone()  # a network may write its next output over this one
        self.count += 1
        if self.window is not None:
            self.recent = (*self.recent, x0)[-self.window :]
        if self.mean is None or self.m2 is None:
            self.mean, self.m2 = x0, torch.zeros_like(x0)
        else:
            off = x0 - self.mean
            self.mean = torch.add(self.mean, off, alpha=1 / self.count)
            self.m2 = torch.addcmul(self.m2, off, x0 - self.mean)

    @property
    def uncertainty(self) -> Tensor | None:
        """U, the variance over the steps, in units of the data squared: (B, ...), the same for all members of a forecast."""
        if self.m2 is None:
            return None
        u = self.m2 / self.count if self.window is None else torch.stack(self.recent).var(0, correction=0)
        if self.members == 1 or not len(u):
            return u
        mean = u.unflatten(0, (-1, self.members)).mean(1, keepdim=True)
        return mean.expand(-1, self.members, *u.shape[1:]).flatten(0, 1)

    @property
    def precision(self) -> Tensor | None:
        """``1 / (U + 1e-6)``, of U's shape."""
        u = self.uncertainty
        return None if u is None else 1 / (u + EPS)


@checks.arguments(
    scale=checks.non_negative, window=checks.Integer(2) | None, pool=checks.Choice("ensemble", "member"),
    quantile=checks.fraction, clip=checks.Each(checks.non_negative, count=2), smooth=checks.Number(0, 1000),
    start=checks.Integer(0), members=checks.Integer(1) | None, mask=checks.Tensor(least_ndim=2) | None,
    inner=GUIDANCE | None,
)  # fmt: skip
@dataclass(frozen=True)
class PrecisionGuidance:
    """Precision-weighted guidance, for ``sample(..., guidance=PrecisionGuidance(...))`` and :func:`ensemble_forecast`.

    ``D = D_c + w W (D_c - D_u)`` with ``W = clip(U / quantile(U), lo, hi)``: the less precise a pixel is, the more. W, the
    quantile and the pooling are our reconstruction of the paper (see the module).

    Args:
        scale: w, at least 0; CFG's scale less one. 0 is the prediction with the context, whose map is still made.
        window: the variance over so many of the last steps, at least 2, in place of all. Late in sampling such a window shows which
            pixels have settled first, which is not how sure they are: leave it out.
        pool: "ensemble": one map for all members of a forecast; "member": a map for each.
        quantile: of U over one forecast's pixels, which is given the weight 1; 1 is the largest.
        clip: ``(lo, hi)`` of W; (1, 1) is CFG.
        smooth: the standard deviation, in pixels, of a Gaussian by which U is smoothed along the last two dimensions; 0: none.
        start: steps before this one, counted from 0, have U = 0 in W, hence W = lo; at step 0 there is no variance.
        members: how many rows of the batch, one after the other, are one forecast's. None: :func:`ensemble_forecast` fills it in;
            else each row is one.
        mask: True where a pixel is known to have data, of a shape that broadcasts to the batch's; elsewhere U counts as 0 and
            is left out of quantile and smoothing.
        inner: a guidance whose update ``G - D_c`` is weighted in place of ``D_c - D_u``: ``D = D_c + w W (G - D_c)``. So
            ``inner=APG(...)`` weighs what its projection and threshold have left.

    Example:
        >>> guidance = PrecisionGuidance(1.0, members=8)
        >>> weighted = PrecisionGuidance(1.0, members=8, inner=APG(8, norm_threshold=5))
    """

    scale: float = 1.0
    window: int | None = None
    pool: str = "ensemble"
    quantile: float = 1.0
    clip: tuple[float, float] = (0.0, 1.0)
    smooth: float = 0.0
    start: int = 1
    members: int | None = None
    _: KW_ONLY
    mask: Tensor | None = field(default=None, compare=False, repr=False)
    inner: Guidance | None = None

    def __post_init__(self) -> None:
        if self.clip[0] > self.clip[1]:
            raise ValueError(f"clip must be (lo, hi) with lo <= hi, got {tuple(self.clip)}")
        if self.mask is not None and self.mask.dtype != torch.bool:
            raise ValueError(f"mask must be of bool, True where there are data, got {self.mask.dtype}")

    @property
    def paired(self) -> bool:
        return self.scale != 0 and (self.inner is None or self.inner.paired)

    def paired_at(self, t: Any, state: PrecisionState, first: bool) -> bool:
        """Whether the prediction without the context is needed at the next evaluation: as ``inner`` says."""
        asks = getattr(self.inner, "paired_at", None)
        if asks is None or not self.paired:
            return self.paired
        told = {"state": state.inner, "first": first} if "state" in inspect.signature(asks).parameters else {}
        return bool(asks(t, **told))

    def init(self, steps: int | None = None) -> PrecisionState:
        """The state at the start of a trajectory, of so many steps where ``inner`` asks for their number."""
        together = self.members or 1
        if self.members == 1 and self.pool == "ensemble":
            warnings.warn("members=1 leaves nothing to pool: the member's own variance is used", stacklevel=2)
        inner = None if self.inner is None else start_guidance(self.inner, steps)
        return PrecisionState(together if self.pool == "ensemble" else 1, self.window, inner=inner)

    def reindex(self, state: PrecisionState, ancestors: Tensor) -> PrecisionState:
        """The state after resampling: row i of the batch came from row ``ancestors[i]``."""
        mean, m2 = (None if kept is None else kept.index_select(0, ancestors) for kept in (state.mean, state.m2))
        recent = tuple(kept.index_select(0, ancestors) for kept in state.recent)
        inner = state.inner if self.inner is None else self.inner.reindex(state.inner, ancestors)
        return replace(state, mean=mean, m2=m2, recent=recent, inner=inner)

    def weight(self, state: PrecisionState) -> Tensor | None:
        """W of the next prediction, shape (B, ...); None before the first step."""
        u = state.uncertainty
        if u is None:
            return None
        if state.count <= self.start:
            u = torch.zeros_like(u)
        mask = None
        if self.mask is not None:
            try:
                mask = self.mask.to(u.device).expand_as(u)
            except RuntimeError:
                raise ValueError(
                    f"mask must broadcast to the batch's shape {tuple(u.shape)}, got {tuple(self.mask.shape)}"
                ) from None
            u = u.masked_fill(~mask, 0.0)
        if self.smooth:
            u = _smoothed(u, mask, self.smooth)
        level = _quantile(u.flatten(1), self.quantile, None if mask is None else mask.flatten(1))
        # 0 / 0 is 0; where only the level is 0 the weight is the largest.
        ratio = torch.where(u > 0, u / level.reshape(-1, *[1] * (u.ndim - 1)), 0.0)
        return ratio.clamp(*self.clip)

    def __call__(self, cond: Any, uncond: Any, state: PrecisionState | None = None, *, update: bool = True) -> Any:
        """The guided prediction, in cond's dialect where both have one.

        Raises:
            ValueError: no state; no prediction without the context; a batch that ``members`` does not divide.
        """
        if state is None:
            raise ValueError("state is needed: PrecisionGuidance.init() at the start of each forecast")
        if update:
            state.add(cond.x0)
        if not self.paired:
            return cond
        alone = any(uncond is given for given in (None, cond))
        if alone and not hasattr(self.inner, "paired_at"):  # which says itself whether it needs both
            raise ValueError(f"uncond is missing: {MISSING}; scale=0 does without")
        weight = self.weight(state)
        if weight is None:
            raise ValueError("state must have seen the first evaluation of a step, which update=True tells it of")
        amount = weight * self.scale
        # Elementwise, hence the same in every dialect.
        if self.inner is None:
            own, other = _alike(cond, uncond)
            return own.replace(_lerp(other.output, own.output, 1 + amount))
        own, guided = _alike(cond, self.inner(cond, uncond, state.inner, update=update))
        return own.replace(_lerp(own.output, guided.output, amount))


def _alike(one: Any, other: Any) -> tuple[Any, Any]:
    """Both predictions in one dialect."""
    if one.kind == other.kind:
        return one, other
    return one.replace(one.x0, "sample"), other.replace(other.x0, "sample")


def _lerp(a: Tensor, b: Tensor, weight: Tensor) -> Tensor:
    """``a + weight (b - a)``; half precision is computed in float32."""
    if a.dtype in HALF:
        return torch.lerp(a.float(), b.float(), weight).to(a.dtype)
    return torch.lerp(a, b, weight.to(a.dtype))


def _quantile(u: Tensor, q: float, mask: Tensor | None) -> Tensor:
    """The q-quantile of each row of u (B, N), non-negative, over its mask: shape (B,). (torch.quantile has a limit of 2^24.)"""
    if q == 1 or not u.numel():
        return u.amax(1) if u.numel() else u.new_ones(len(u))
    if mask is None:
        last = torch.full((len(u), 1), u.shape[1] - 1, device=u.device)
    else:
        u, last = u.masked_fill(~mask, math.inf), (mask.sum(1, keepdim=True) - 1).clamp(min=0)
    position = q * last.to(u.dtype)
    below = position.floor().long()
    ordered = u.sort(1).values
    low, high = ordered.gather(1, below), ordered.gather(1, torch.minimum(below + 1, last))
    return torch.where(high > low, torch.lerp(low, high, position - below), low)[:, 0]


def _smoothed(u: Tensor, mask: Tensor | None, sigma: float) -> Tensor:
    """The Gaussian mean of u over the neighbours that are there: within the field, and in the mask."""
    if u.ndim < 3:
        raise ValueError(f"smooth={sigma:g} needs fields of shape (B, ..., H, W), got {tuple(u.shape)}")
    there = torch.ones_like(u) if mask is None else mask.to(u.dtype)
    share = _blurred(there, sigma)
    return torch.where(there > 0, _blurred(u, sigma) / share, 0.0)


def _blurred(u: Tensor, sigma: float) -> Tensor:
    radius = math.ceil(3 * sigma)
    at = torch.arange(-radius, radius + 1, dtype=u.dtype, device=u.device)
    kernel = torch.exp(-(at**2) / (2 * sigma**2))
    kernel = kernel / kernel.sum()
    flat = u.reshape(-1, 1, *u.shape[-2:])
    for shape in ((1, 1, -1, 1), (1, 1, 1, -1)):
        flat = torch.nn.functional.conv2d(flat, kernel.reshape(shape), padding="same")
    return flat.reshape(u.shape)
