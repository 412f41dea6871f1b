"""Evaluating a denoiser during sampling: its prediction at ``(x, t)``, after guidance and correction.

:func:`polyak.generate.sample`, the diffusers scheduler and correctors of one's own ask for predictions through the same object,
so that all of them mean the same by one evaluation: denoiser, guidance, corrector, in this order.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from polyak.core import checks
from polyak.generate.guidance import Guidance, OnOutputs
from polyak.generate.prediction import Denoiser, Prediction, PredictionLike
from polyak.generate.solver import Query

Model = Denoiser | Callable[[Tensor, float], PredictionLike]
Corrector = Callable[[Tensor, float], Tensor]  # (x0, t) -> x0
HALF = (torch.float16, torch.bfloat16)


MODEL = checks.Function("a Denoiser, or a function (x, t) -> Prediction", 2)
CORRECTOR = checks.Function("a function (x0, t) -> x0", 2)
GUIDANCE = checks.Like("a Guidance (an instance, not the class)", "paired", "init")
STEPS = checks.Integer(1, 1_000_000)


class DynamicThresholding:
    """A corrector for pixel data in [-1, 1] (Imagen, arXiv 2205.11487, section 2.3): never for latents.

    Per sample, q = the ``quantile`` of \\|x0\\| over all its elements, at least ``floor`` and at most ``ceiling``; x0 is clipped to
    [-q, q] and divided by q (times floor: the result lies in [-floor, floor]). diffusers' ``sample_max_value`` is a ceiling.
    """

    @checks.arguments(
        quantile=checks.fraction, floor=checks.positive, ceiling=checks.Number(0, ends="(]", infinite=True)
    )
    def __init__(self, quantile: float = 0.995, floor: float = 1.0, ceiling: float = math.inf) -> None:
        self.quantile, self.floor, self.ceiling = quantile, floor, ceiling

    def __call__(self, x0: Tensor, t: float) -> Tensor:
        magnitude, _ = x0.abs().flatten(1).sort(1)  # torch.quantile is limited to 2^24 elements
        position = self.quantile * (magnitude.shape[1] - 1)
        below = int(position)
        above = min(below + 1, magnitude.shape[1] - 1)
        q = torch.lerp(magnitude[:, below], magnitude[:, above], position - below)
        q = q.clamp(min=self.floor).clamp(max=self.ceiling).reshape(-1, *[1] * (x0.ndim - 1))
        return torch.clamp(x0, -q, q) * (self.floor / q)


class Evaluator:
    """``query -> prediction``: the denoiser's answer, guided and corrected. Its guidance has one trajectory's state.

    Args:
        denoiser: a :class:`Denoiser`, or any callable ``(x, t) -> prediction``.
        guidance, corrector: as for :func:`polyak.generate.sample`.
        dtype: what the denoiser is given x in, where that is not the state's own type.
        check_finite: look for NaN and infinity in every prediction; None: on the CPU only.
        steps: the number of steps of the trajectory, which a guidance may ask for.

    Attributes:
        nfe, evaluations: points asked at, and calls of a network.
        queries: the times of the points.
        cond, uncond: the predictions before guidance, at the last first evaluation of a step.
        guided: the prediction after guidance and correction there.
        state: the guidance's.

    Example:
        >>> evaluate = Evaluator(denoiser, guidance=CFG(3.0))
        >>> evaluate(Query(x, 0.5)).x0
    """

    @checks.arguments(
        denoiser=MODEL, guidance=GUIDANCE | None, corrector=CORRECTOR | None, dtype=checks.dtype | None,
        check_finite=checks.optional_flag, steps=STEPS | None,
    )  # fmt: skip
    def __init__(
        self,
        denoiser: Model,
        *,
        guidance: Guidance | None = None,
        corrector: Corrector | None = None,
        dtype: torch.dtype | None = None,
        check_finite: bool | None = None,
        steps: int | None = None,
    ) -> None:
        self.denoiser, self.guidance, self.corrector = denoiser, guidance, corrector
        self.dtype, self.check_finite, self.steps = dtype, check_finite, steps
        self.nfe = self.evaluations = 0
        self.queries: list[float | Tensor] = []
        self.cond: Any = None
        self.uncond: Any = None
        self.guided: Any = None
        self.state = None if guidance is None else start_guidance(guidance, steps)
        self._paired_at = getattr(guidance, "paired_at", None)
        self._tells = self._paired_at is not None and "state" in inspect.signature(self._paired_at).parameters

    def __call__(self, query: Query) -> Any:
        """The prediction at a query's point, of the query's x."""
        x, t = query.x, query.t
        if self.dtype is not None and self.dtype != x.dtype:
            x = x.to(self.dtype)
        self.nfe += 1
        self.queries.append(t)
        if self._paired(query):
            first, second = self.denoiser.pair(x, t)  # type: ignore[union-attr]
            self.evaluations += 2
            cond, uncond = self._checked(first, query), self._checked(second, query)
        else:
            self.evaluations += 1
            cond = uncond = self._checked(self.denoiser(x, t), query)
        return self.finish(query, cond, uncond)

    def finish(self, query: Query, cond: Any, uncond: Any) -> Any:
        """Guidance and correction of predictions that are there already."""
        prediction = cond
        if self.guidance is not None:
            prediction = self.guidance(cond, uncond, self.state, update=query.first)
        if self.corrector is not None:
            prediction = prediction.replace(self.corrector(prediction.x0, query.t), "sample")
        if query.first:
            self.cond, self.uncond, self.guided = cond, uncond, prediction
        return prediction

    def _paired(self, query: Query) -> bool:
        if self.guidance is None:
            return False
        if self._paired_at is None:
            return self.guidance.paired
        told = {"state": self.state, "first": query.first} if self._tells else {}
        return bool(self._paired_at(query.t, **told))

    def _checked(self, prediction: Any, query: Query) -> Any:
        if type(prediction) is not Prediction and not isinstance(prediction, PredictionLike):
            raise TypeError(
                f"denoiser must return a Prediction, got {type(prediction).__name__}; wrap it in Denoiser(...)"
            )
        output = prediction.output
        if self.looks(output):
            look(output, self.nfe, query.t, logs=getattr(prediction, "kind", "") == "logits")
        same = output.dtype == query.x.dtype == prediction.x.dtype  # x may have been rounded for the network
        return prediction if same else prediction.rebase(query.x)

    def looks(self, x: Tensor) -> bool:
        """Whether predictions on x's device are looked at."""
        if self.check_finite is None:
            return x.device.type == "cpu" and not isinstance(x, FakeTensor)
        return self.check_finite

    @property
    def plain(self) -> bool:
        """Whether it is a network and nothing else, or two and a guidance that is a function of their outputs."""
        if type(self.denoiser) is not Denoiser or self.corrector is not None:
            return False
        return self.guidance is None or self.on_outputs is not None

    @property
    def on_outputs(self) -> OnOutputs | None:
        """The guidance as a function of the network's outputs, if it can be one."""
        denoiser: Any = self.denoiser
        found = getattr(type(self.guidance), "on_outputs", None)  # of its own, not of what it may wrap
        if found is None or getattr(denoiser, "unconditional", None) is None:
            return None
        return found(self.guidance, denoiser.prediction)


def look(output: Tensor, evaluation: int, t: float | Tensor, *, logs: bool = False) -> None:
    """ValueError where an output is not finite; ``logs`` of probabilities may be -inf, but not NaN or +inf."""
    # A sum is not finite where a term is not; only then is each one looked at.
    if not math.isfinite(output.sum().item()) and not bool((output < math.inf if logs else output.isfinite()).all()):
        what = "NaN" if bool(output.isnan().any()) else "infinity"
        when = t.tolist() if isinstance(t, Tensor) else f"{t:.6g}"
        raise ValueError(f"{what} in the prediction of evaluation {evaluation} at t={when}")


def start_guidance(guidance: Guidance, steps: int | None) -> Any:
    """The state of a guidance at a trajectory's start; one whose ``init`` takes ``steps`` is told their number."""
    init: Callable[..., Any] = guidance.init
    return init(steps=steps) if "steps" in inspect.signature(init).parameters else init()
