"""Adaptive projected guidance (APG): high guidance scales without burnt colours.

Sadat, Hilliges and Weber, "Eliminating Oversaturation and Artifacts of High Guidance Scales in Diffusion Models", arXiv
2410.02416 (ICLR 2025). Of the clean data ``D_c`` predicted with the condition and ``D_u`` without, with norms and products over the
elements of one sample:

    d = D_c - D_u                                   the update of classifier-free guidance
    d = d + beta d_before                           reverse momentum, beta < 0
    d = d min(1, r / |d|)                           a trust region
    d_par = <d, D_c> D_c / |D_c|^2,  d_orth = d - d_par
    D = D_c + (w - 1) (d_orth + eta d_par)

The part of d along ``D_c`` only scales it, which is contrast and saturation; ``eta = 0`` leaves it out. With ``eta = 1``, no r and
no beta this is classifier-free guidance.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from polyak.core import checks
from polyak.generate.apg.kernel import How, Pair
from polyak.generate.apg.update import difference, precise, share, updated, within
from polyak.generate.evaluate import HALF, Model
from polyak.generate.guidance import CFG, OnOutputs
from polyak.generate.prediction import Prediction
from polyak.generate.sampling import sample

__all__ = ["APG", "CFG", "APGState", "contrast", "denoiser_post_cfg", "normalized_guidance", "project", "saturation"]
_MISSING = "uncond is missing: APG needs both predictions; use scale=1 for none"


class _Momentum(checks.Number):
    def __init__(self) -> None:
        super().__init__(-1.0, 1.0, "()")

    def __call__(self, name: str, value: Any) -> float:
        number = checks.real(name, value)
        if not -1.0 < number < 1.0:
            raise ValueError(
                f"{name} must be {self.range}: |momentum| must be < 1 or the guidance diverges, got {number:g}"
            )
        return number


MOMENTUM = _Momentum()
SCALE = checks.Number(-1e30, 1e30)  # what single precision holds
_ROWS = checks.Tensor(floating=True, least_ndim=2)


@checks.arguments(
    momentum=MOMENTUM,
    steps=checks.Integer(1) | None,
    step=checks.Integer(0),
    average=_ROWS | None,
    before=_ROWS | None,
)
@dataclass(eq=False)
class APGState:
    """What APG carries along one trajectory.

    Attributes:
        momentum: beta.
        steps: of the trajectory, where that is known.
        step: how many steps have begun.
        average: ``d + beta d_before`` at the last update, of the data's shape; None before the first.
        before: what ``average`` was before that: all evaluations of one step see the same.
    """

    momentum: float = 0.0
    steps: int | None = None
    step: int = 0
    average: Tensor | None = None
    before: Tensor | None = None

    def memory(self, update: bool, shape: torch.Size) -> Tensor | None:
        """``d_before`` for an evaluation that updates it, or does not."""
        memory = self.average if update else self.before
        if memory is not None and memory.shape != shape:
            raise ValueError(
                f"state is of predictions of shape {tuple(memory.shape)}, got {tuple(shape)}: every trajectory "
                "begins with a state of its own, init(), and reindex(state, ancestors) follows a resampled batch"
            )
        return memory

    def reindex(self, ancestors: Tensor) -> APGState:
        """The state after resampling: row i of the batch came from row ``ancestors[i]``."""
        rows = (None if kept is None else kept.index_select(0, ancestors) for kept in (self.average, self.before))
        return APGState(self.momentum, self.steps, self.step, *rows)


@checks.arguments(v0=_ROWS, v1=_ROWS)
def project(v0: Tensor, v1: Tensor) -> tuple[Tensor, Tensor]:
    """``(parallel, orthogonal)``: the part of v0 along v1 and the rest, for each sample; computed in float64.

    Args:
        v0: (B, ...).
        v1: of the same shape. Where it is 0 nothing is parallel to it.
    """
    _check_alike(v0=v0, v1=v1)
    a, b = (v if v.device.type == "mps" else v.double() for v in (v0, v1))
    parallel = (share(a, b, within(b)) * b).to(v0.dtype)
    return parallel, v0 - parallel


@checks.arguments(
    pred_cond=_ROWS, pred_uncond=_ROWS | None, scale=SCALE,
    state=checks.Instance(APGState, words="an APGState") | None, eta=checks.fraction, norm_threshold=checks.real,
)  # fmt: skip
def normalized_guidance(
    pred_cond: Tensor,
    pred_uncond: Tensor | None,
    scale: float,
    state: APGState | None = None,
    eta: float = 1.0,
    norm_threshold: float = 0.0,
) -> Tensor:
    """The paper's function: predictions of clean data in, the guided prediction out.

    Args:
        pred_cond, pred_uncond: with and without the condition, shape (B, ...).
        scale: w; 1 is ``pred_cond`` itself.
        state: the momentum of this trajectory, ``APGState(momentum=-0.5)``: every call updates it.
        eta: how much of the update's part along ``pred_cond`` is kept, in [0, 1].
        norm_threshold: r, the largest norm of the update; 0 or less: any.

    Returns:
        A tensor like ``pred_cond``; half precision is computed in single precision.

    Raises:
        ValueError: shapes that differ; a state of another shape; on the CPU, predictions that are not finite.
    """
    if pred_uncond is None:
        if scale != 1:
            raise ValueError(_MISSING.replace("uncond", "pred_uncond", 1))
        return pred_cond
    _check_alike(pred_cond=pred_cond, pred_uncond=pred_uncond)
    for name, value in (("pred_cond", pred_cond), ("pred_uncond", pred_uncond)):
        _look(name, value)
    if scale == 1:
        return pred_cond
    if eta == 1 and norm_threshold <= 0 and state is None:
        return torch.lerp(precise(pred_uncond), precise(pred_cond), scale).to(pred_cond.dtype)
    if state is not None:
        state.step += 1
    return updated(Pair(pred_cond, pred_uncond), state, True, How(scale - 1, eta, norm_threshold), pred_cond.dtype)


def _look(name: str, x: Tensor) -> None:
    if x.device.type != "cpu" or isinstance(x, FakeTensor) or math.isfinite(x.detach().sum().item()):
        return
    if not bool(x.isfinite().all()):
        raise ValueError(f"{name} must be finite, got NaN or infinity")


def _check_alike(**two: Tensor) -> None:
    (first, a), (second, b) = two.items()
    if a.shape != b.shape:
        raise ValueError(f"{second} must have {first}'s shape {tuple(a.shape)}, got {tuple(b.shape)}")


@checks.arguments(
    scale=SCALE, eta=checks.fraction, norm_threshold=checks.Choice("auto") | checks.real, momentum=MOMENTUM | None,
    base=checks.Choice("cond", "uncond"), space=checks.Choice("x0", "pred"), update=checks.Choice("step", "every"),
    start=checks.fraction, stop=checks.fraction, rescale=checks.fraction, channelwise=checks.flag,
)  # fmt: skip
@dataclass(frozen=True)
class APG:
    """Adaptive projected guidance, for ``sample(..., guidance=APG(...))``.

    Args:
        scale: w of ``D_c + (w - 1) (...)``; 1 is the conditional prediction, and asks for no other.
        eta: how much of the update's part along ``D_c`` is kept, in [0, 1]; 0 as recommended, 1 as in CFG.
        norm_threshold: r, the largest norm of a sample's update, in units of the data; 0 or less: any. "auto" (ours, not the
            paper's) has to be measured first, see :meth:`measured`.
        momentum: beta in (-1, 1), typically -0.5 or -0.75; None or 0: none.
        base: "cond" as in the paper; "uncond": ``D_u + w (...)``, as diffusers does it unless told otherwise.
        space: what is guided: "x0", the predicted clean data; "pred", the network's own output, as diffusers does it.
        update: "step": the momentum moves on at the first evaluation of a solver's step, and all evaluations of the step see
            what was there before; "every": it moves on at each of them.
        start, stop: fractions of the steps between which there is guidance; outside only the condition is asked for.
        rescale: phi of rescaled guidance (Lin et al., arXiv 2305.08891, section 3.4), applied afterwards.
        channelwise: project each channel of (B, C, ...) by itself.

    Example:
        >>> guidance = APG(scale=15, norm_threshold=15, momentum=-0.5)  # the paper's setting for SDXL
    """

    scale: float = 7.5
    eta: float = 0.0
    norm_threshold: Any = 0.0
    momentum: float | None = None
    base: str = "cond"
    space: str = "x0"
    update: str = "step"
    start: float = 0.0
    stop: float = 1.0
    rescale: float = dataclasses.field(default=0.0, kw_only=True)
    channelwise: bool = dataclasses.field(default=False, kw_only=True)

    def __post_init__(self) -> None:
        if self.start >= self.stop:
            raise ValueError(f"start must be below stop={self.stop:g}, got {self.start:g}")

    @property
    def paired(self) -> bool:
        return self.scale != 1.0

    def paired_at(self, t: Any, state: APGState | None, first: bool) -> bool:
        """Whether the unconditional prediction is needed at the next evaluation, which begins a step or does not."""
        return self.paired and self._active(state, first)

    def init(self, steps: int | None = None) -> APGState:
        """The state at the start of a trajectory of so many steps."""
        if self.norm_threshold == "auto":
            raise ValueError(
                'norm_threshold="auto" has to be measured: guidance = guidance.measured(denoiser, x_T, ...)'
            )
        if steps is None and (self.start, self.stop) != (0, 1):
            raise ValueError(
                f"start={self.start:g} and stop={self.stop:g} are fractions of the steps, whose number is not known here"
            )
        return APGState(self.momentum or 0.0, steps)

    def reindex(self, state: APGState, ancestors: Tensor) -> APGState:
        return state.reindex(ancestors)

    def __call__(self, cond: Any, uncond: Any, state: APGState | None = None, *, update: bool = True) -> Any:
        """The guided prediction; of clean data (kind "sample") unless ``space="pred"`` or it is CFG's own."""
        state = self.init() if state is None and not self.momentum else state
        if state is None:
            raise ValueError("state is needed with momentum: APG.init() at the start of each trajectory")
        active = self._active(state, update)
        if update:
            state.step += 1
        if not (active and self.paired):
            return cond
        if uncond is None or uncond is cond:
            raise ValueError(_MISSING)
        if self._plain:
            return CFG(self.scale)(cond, uncond)
        if self.space == "pred":
            if uncond.kind != cond.kind:
                raise ValueError(f"uncond must be of cond's kind {cond.kind!r} with space='pred', got {uncond.kind!r}")
            return cond.replace(self.combine(cond.output, uncond.output, state, update=update))
        pair = _pair(cond, uncond)
        dtype = pair.cond.dtype if pair.x is None else torch.promote_types(pair.x.dtype, pair.cond.dtype)
        return cond.replace(self._made(pair, state, update, dtype), "sample")

    def on_outputs(self, kind: str) -> OnOutputs | None:
        """See :class:`polyak.generate.guidance.OnOutputs`."""
        if not self.paired or type(self) is not APG or (self.start, self.stop) != (0, 1):
            return None
        if self._plain:
            return CFG(self.scale).on_outputs(kind)
        of_data = self.space == "x0"
        return OnOutputs("sample" if of_data else kind, of_data, self._on_outputs)

    def _on_outputs(
        self, cond: Tensor, uncond: Tensor, x: Tensor, weights: tuple[float, float], state: APGState, first: bool
    ) -> Tensor:
        state.step += first
        a, b = weights
        pair = Pair(_known(cond, x), _known(uncond, x), x if a else None, a, b)
        return self._made(pair, state, first, x.dtype)

    def combine(self, cond: Tensor, uncond: Tensor, state: APGState, *, update: bool = True) -> Tensor:
        """What is made of two tensors of shape (B, ...), whatever they are predictions of; ``cond`` for a scale of 1."""
        if not self.paired:
            return cond
        _check_alike(cond=cond, uncond=uncond)
        if self._plain:
            return torch.lerp(precise(uncond), precise(cond), self.scale).to(cond.dtype)
        return self._made(Pair(cond, uncond), state, update, cond.dtype)

    @checks.arguments(quantile=checks.fraction)
    def measured(self, denoiser: Model, x_T: Tensor, *, quantile: float = 0.5, **how: Any) -> APG:
        """The same with a norm_threshold that is a quantile of \\|d\\|, over all steps of trajectories without guidance (w = 1).

        Args:
            denoiser, x_T: with an unconditional prediction; the start of a few trajectories, shape (k, ...).
            quantile: 0.5 is the median.
            how: solver, steps or nfe, and whatever else :func:`polyak.generate.sample` takes.
        """
        probe = _Probe(self)
        sample(denoiser, x_T, guidance=probe, **how)
        sizes = torch.cat(probe.sizes)
        return dataclasses.replace(self, norm_threshold=torch.quantile(sizes.double(), quantile).item())

    @property
    def _plain(self) -> bool:
        """Whether it is classifier-free guidance."""
        return self.eta == 1 and not self.norm_threshold > 0 and not self.momentum and not self.rescale

    def _active(self, state: APGState | None, first: bool) -> bool:
        if self.start == 0 and self.stop == 1:
            return True
        if state is None or state.steps is None:
            raise ValueError("state is needed with start and stop: APG.init(steps) at the start of each trajectory")
        now = state.step if first else state.step - 1
        return int(self.start * state.steps) <= now < int(self.stop * state.steps)

    def _made(self, pair: Pair, state: APGState, update: bool, dtype: torch.dtype) -> Tensor:
        if pair.cond.ndim < 2 + self.channelwise:
            shape = "(B, C, ...) with channelwise=True" if self.channelwise else "(B, ...)"
            raise ValueError(f"cond must have shape {shape}, got {tuple(pair.cond.shape)}")
        of_uncond = self.base == "uncond"
        gain = float(self.scale if of_uncond else self.scale - 1)
        how = How(gain, self.eta, self.norm_threshold, of_uncond, self.channelwise, self.rescale)
        return updated(pair, state if self.momentum else None, update or self.update == "every", how, dtype)


def _known(output: Tensor, x: Tensor) -> Tensor:
    """An output in x's dtype, or as it is where it is read in that."""
    same = output.dtype == x.dtype or (x.dtype == torch.float32 and output.dtype in HALF)
    return output if same else output.to(x.dtype)


def _pair(cond: Any, uncond: Any) -> Pair:
    """Two predictions as data, unread where the same numbers lead from both outputs to them."""
    if not _one_affine(cond, uncond):
        return Pair(cond.x0, uncond.x0)
    a, b = cond.weights("x0")
    return Pair(cond.output, uncond.output, cond.x if a else None, a, b)


def _one_affine(cond: Any, uncond: Any) -> bool:
    """Whether x0 is ``a x + b output`` of both, with the same two numbers and the same x."""
    if not isinstance(cond, Prediction) or type(uncond) is not type(cond) or uncond.kind != cond.kind:
        return False
    numbers = not (isinstance(cond.t, Tensor) or isinstance(uncond.t, Tensor))
    return numbers and uncond.x is cond.x and bool(uncond.t == cond.t)


class _Probe:
    """Guides nothing, and writes down how large the update would be."""

    paired = True

    def __init__(self, guidance: APG) -> None:
        self.guidance = guidance
        self.sizes: list[Tensor] = []

    def init(self) -> None:
        return None

    def __call__(self, cond: Any, uncond: Any, state: None = None, *, update: bool = True) -> Any:
        if update:
            pred = self.guidance.space == "pred"
            d = cond.output - uncond.output if pred else difference(_pair(cond, uncond))[1]
            self.sizes.append(torch.linalg.vector_norm(d, dim=within(d)))
        return cond

    def reindex(self, state: None, ancestors: Tensor) -> None:
        return None


@checks.arguments(guidance=checks.Instance(APG, words="an APG"))
def denoiser_post_cfg(guidance: APG) -> Callable[[Mapping[str, Any]], Tensor]:
    """A function for programs that guide by a hook on denoised data, as ComfyUI's ``set_model_sampler_post_cfg_function`` takes.

    It reads "cond_denoised", "uncond_denoised" and "sigma" of the dict that it is given, and returns the guided data. The program's
    own scale has no effect. Momentum begins anew where sigma rises, that is, with the next image; the program does not
    say which evaluations begin a step, so that each one updates it.
    """
    state, last = guidance.init(), math.inf

    def guided(args: Mapping[str, Any]) -> Tensor:
        nonlocal state, last
        cond, uncond = args["cond_denoised"], args["uncond_denoised"]
        if uncond is None:
            if guidance.paired:
                raise ValueError(_MISSING.replace("uncond", "uncond_denoised", 1))
            return cond
        if guidance.momentum:
            sigma = float(torch.as_tensor(args["sigma"]).max())
            state, last = guidance.init() if sigma > last else state, sigma
        return guidance.combine(cond, uncond, state)

    return guided


@checks.arguments(x=checks.Tensor(floating=True, least_ndim=3))
def saturation(x: Tensor) -> Tensor:
    """The mean HSV saturation ``(max - min) / max`` over the pixels of each image; black pixels have none.

    Args:
        x: RGB in [0, 1], shape (B, 3, ...); what is beyond is clipped.

    Returns:
        Shape (B,).
    """
    if x.shape[1] != 3:
        raise ValueError(f"x must have shape (B, 3, ...), got {tuple(x.shape)}")
    least, most = x.clamp(0, 1).aminmax(dim=1)
    return torch.where(most > 0, (most - least) / most, 0.0).flatten(1).mean(1)


@checks.arguments(x=_ROWS)
def contrast(x: Tensor) -> Tensor:
    """The standard deviation over the pixels of each image: x of shape (B, ...) to (B,)."""
    return x.flatten(1).std(1, correction=0)
