"""What a network predicts, in one struct: every dialect converts to every other, given x, t and the process.

With ``x = alpha x0 + sigma eps`` a network's output o at (x, t) is one of

- "epsilon": ``x0 = (x - sigma o) / alpha``;
- "sample": ``eps = (x - alpha o) / sigma``;
- "score": ``eps = -sigma o`` (Gaussian processes only);
- "v_prediction", ``v = alpha eps - sigma x0``: ``x0 = (alpha x - sigma o) / (alpha^2 + sigma^2)``,
  ``eps = (sigma x + alpha o) / (alpha^2 + sigma^2)`` (Salimans and Ho, arXiv 2202.00512);
- "flow", ``u = alpha' x0 + sigma' eps``: with ``d = alpha sigma' - alpha' sigma``, ``x0 = (sigma' x - sigma o) / d``,
  ``eps = (alpha o - alpha' x) / d``;
- "edm", the preconditioned network of Karras et al. (arXiv 2206.00364, equation 7) in the scaled variable y = x / alpha, s =
  sigma / alpha: ``x0 = c_skip y + c_out F(c_in y, c_noise)``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from polyak.core import checks
from polyak.generate.process import Process, check_batch, expand

Kind = Literal["epsilon", "sample", "score", "v_prediction", "flow", "edm"]
KINDS: tuple[Kind, ...] = ("epsilon", "sample", "score", "v_prediction", "flow", "edm")
ALIASES: dict[str, Kind] = {"eps": "epsilon", "x0": "sample", "v": "v_prediction", "flow_prediction": "flow"}
Network = Callable[[Tensor, Tensor], Tensor]  # (x, labels of shape (B,)) -> output of x's shape


def check_kind(name: str, kind: str) -> Kind:
    """A dialect, by its name or a usual short one ("eps", "x0", "v", "flow_prediction")."""
    return checks.one_of(name, ALIASES.get(kind, kind), KINDS)  # type: ignore[return-value]


class Prediction:
    """A network's output at (x, t), readable in every dialect: ``.x0 .eps .score .v .flow``. Views are made on first use.

    Args:
        output: what the network said, x's shape.
        x: the state, shape (B, ...).
        t: its time, a number or a tensor of shape (B,).
        process: the process it belongs to.
        kind: the output's dialect.
        sigma_data: the standard deviation of the data, for "edm".

    Raises:
        ValueError: unknown kind; shapes that differ; a score where the noise is not Gaussian. Reading x0 where alpha = 0, or
            eps or the score where sigma = 0, from an output that does not determine it.
    """

    def __init__(
        self,
        output: Tensor,
        x: Tensor,
        t: float | Tensor,
        process: Process,
        kind: str = "epsilon",
        *,
        sigma_data: float = 0.5,
    ) -> None:
        if output.shape != x.shape:
            raise ValueError(f"output must have x's shape {tuple(x.shape)}, got {tuple(output.shape)}")
        self.output, self.x, self.process = output, x, process
        self.t = check_batch(t, x)
        self.kind = check_kind("kind", kind)
        self.sigma_data = sigma_data
        if self.kind == "score":
            self._need_gaussian()

    def _need_gaussian(self) -> None:
        if not self.process.is_gaussian:
            raise ValueError(f"{self.process!r} has no Gaussian noise, hence no score from its predictions")

    def _at(self, schedule: Callable[..., float | Tensor]) -> float | Tensor:
        t = self.t.to(torch.float64) if isinstance(self.t, Tensor) else self.t
        return expand(schedule(t), self.x)

    @cached_property
    def alpha(self) -> float | Tensor:
        """``alpha(t)``, ready to multiply x."""
        return self._at(self.process.alpha)

    @cached_property
    def sigma(self) -> float | Tensor:
        """``sigma(t)``, ready to multiply x."""
        return self._at(self.process.sigma)

    def _divide(self, value: Tensor, by: float | Tensor, what: str) -> Tensor:
        if not isinstance(by, Tensor) and by == 0:  # per-sample times would cost a synchronization
            raise ValueError(f"{what} from the {self.kind!r} output at t={self.t}")
        return value / by

    @cached_property
    def x0(self) -> Tensor:
        """The predicted clean data, x's shape."""
        x, o, alpha, sigma = self.x, self.output, self.alpha, self.sigma
        if self.kind == "sample":
            return o
        if self.kind == "v_prediction":
            return (alpha * x - sigma * o) / (alpha**2 + sigma**2)
        if self.kind == "flow":
            dalpha, dsigma = self._at(self.process.dalpha), self._at(self.process.dsigma)
            return (dsigma * x - sigma * o) / (alpha * dsigma - dalpha * sigma)
        if self.kind == "edm":
            skip, out = edm_output_scaling(self._at(self.process.sigma_hat), self.sigma_data)
            return self._divide(x, alpha, "x0 is undetermined, alpha is 0,") * skip + out * o
        return self._divide(x - sigma * self.eps, alpha, "x0 is undetermined, alpha is 0,")

    @cached_property
    def eps(self) -> Tensor:
        """The predicted noise, x's shape."""
        x, o, alpha, sigma = self.x, self.output, self.alpha, self.sigma
        if self.kind == "epsilon":
            return o
        if self.kind == "score":
            return -sigma * o
        if self.kind == "v_prediction":
            return (sigma * x + alpha * o) / (alpha**2 + sigma**2)
        if self.kind == "flow":
            dalpha, dsigma = self._at(self.process.dalpha), self._at(self.process.dsigma)
            return (alpha * o - dalpha * x) / (alpha * dsigma - dalpha * sigma)
        return self._divide(x - alpha * self.x0, sigma, "eps is undetermined, sigma is 0,")

    @property
    def score(self) -> Tensor:
        """``grad log p_t(x) = -eps / sigma``, x's shape."""
        self._need_gaussian()
        return self.output if self.kind == "score" else self._divide(-self.eps, self.sigma, "the score is infinite")

    @property
    def v(self) -> Tensor:
        """``alpha eps - sigma x0``, x's shape."""
        return self.output if self.kind == "v_prediction" else self.alpha * self.eps - self.sigma * self.x0

    @property
    def flow(self) -> Tensor:
        """``dx/dt`` of the probability-flow ODE, ``alpha' x0 + sigma' eps``, x's shape."""
        if self.kind == "flow":
            return self.output
        return self._at(self.process.dalpha) * self.x0 + self._at(self.process.dsigma) * self.eps

    def replace(self, output: Tensor, kind: str | None = None) -> Prediction:
        """Another output at the same (x, t); of the same dialect unless ``kind`` says otherwise."""
        return Prediction(output, self.x, self.t, self.process, kind or self.kind, sigma_data=self.sigma_data)

    def rebase(self, x: Tensor) -> Prediction:
        """The same output, taken to be said of x (say, of the state before it was rounded), in x's dtype."""
        return Prediction(self.output.to(x.dtype), x, self.t, self.process, self.kind, sigma_data=self.sigma_data)


def edm_output_scaling(sigma_hat: float | Tensor, sigma_data: float) -> tuple[float | Tensor, float | Tensor]:
    """EDM's ``(c_skip, c_out)``: ``sd^2 / (s^2 + sd^2)`` and ``s sd / sqrt(s^2 + sd^2)``."""
    total = sigma_hat**2 + sigma_data**2
    return sigma_data**2 / total, sigma_hat * sigma_data / total**0.5


def edm_input_scaling(sigma_hat: float | Tensor, sigma_data: float) -> float | Tensor:
    """EDM's ``c_in = 1 / sqrt(s^2 + sd^2)``."""
    return (sigma_hat**2 + sigma_data**2) ** -0.5


def edm_label(sigma_hat: float | Tensor) -> float | Tensor:
    """EDM's ``c_noise = ln(s) / 4``."""
    return sigma_hat.log() / 4 if isinstance(sigma_hat, Tensor) else math.log(sigma_hat) / 4


class Denoiser:
    """A network and what its output means: the callable ``(x, t) -> Prediction`` that samplers take.

    Args:
        model: ``(x, label) -> output``: x of shape (B, ...), label of shape (B,); output of x's shape. A diffusers UNet is
            ``lambda x, t: unet(x, t).sample``.
        process: the process the network was trained with.
        prediction: the output's dialect: "epsilon", "sample", "score", "v_prediction", "flow" or "edm".
        unconditional: the network without its condition, for guidance.
        label: from t to what the network is told; default ``process.label``, and ``ln(sigma) / 4`` for "edm".
        sigma_data: the standard deviation of the data, for "edm".

    Attributes:
        nfe: points at which it was asked (what papers count); evaluations: calls of a network (a guided pair is two).

    Example:
        >>> denoiser = Denoiser(lambda x, label: torch.zeros_like(x), VP())
        >>> denoiser(torch.ones(2, 3), 0.5).x0.shape, denoiser.nfe
        (torch.Size([2, 3]), 1)
    """

    def __init__(
        self,
        model: Network,
        process: Process,
        prediction: str = "epsilon",
        *,
        unconditional: Network | None = None,
        label: Callable[[float | Tensor], float | Tensor] | None = None,
        sigma_data: float = 0.5,
    ) -> None:
        if not isinstance(process, Process):
            raise TypeError(f"process must be a Process, got {process!r}")
        self.model, self.unconditional, self.process = model, unconditional, process
        self.prediction = check_kind("prediction", prediction)
        self.sigma_data = checks.positive("sigma_data", sigma_data)
        self._label = label
        self.nfe = self.evaluations = 0

    def __call__(self, x: Tensor, t: float | Tensor) -> Prediction:
        """The prediction at x, shape (B, ...), and t, a number or a tensor of shape (B,)."""
        self.nfe += 1
        return self._ask(self.model, x, t)

    def pair(self, x: Tensor, t: float | Tensor) -> tuple[Prediction, Prediction]:
        """The conditional and the unconditional prediction: one NFE, two evaluations."""
        if self.unconditional is None:
            raise ValueError("guidance needs both predictions; give Denoiser(unconditional=...), or leave guidance out")
        self.nfe += 1
        return self._ask(self.model, x, t), self._ask(self.unconditional, x, t)

    def _ask(self, model: Network, x: Tensor, t: float | Tensor) -> Prediction:
        self.evaluations += 1
        check_batch(t, x)
        output = self._run(model, x, t)
        return Prediction(output, x, t, self.process, self.prediction, sigma_data=self.sigma_data)

    def _run(self, model: Network, x: Tensor, t: float | Tensor) -> Tensor:
        exact = t.to(torch.float64) if isinstance(t, Tensor) else t
        fed = x
        if self.prediction == "edm":
            scaling = edm_input_scaling(self.process.sigma_hat(exact), self.sigma_data) / self.process.alpha(exact)
            fed = x * expand(scaling, x)
        return model(fed, self._labels(self.label(exact), x))

    def label(self, t: float | Tensor) -> float | Tensor:
        """What the network is told at t."""
        if self._label is not None:
            return self._label(t)
        return edm_label(self.process.sigma_hat(t)) if self.prediction == "edm" else self.process.label(t)

    @staticmethod
    def _labels(label: float | Tensor, x: Tensor) -> Tensor:
        """(B,), in float32 where x's own precision would round the label."""
        dtype = x.dtype if x.dtype in (torch.float32, torch.float64) else torch.float32
        if isinstance(label, Tensor):
            return label.to(device=x.device, dtype=dtype).expand(x.shape[0])
        return torch.full((x.shape[0],), label, dtype=dtype, device=x.device)
