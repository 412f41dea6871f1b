"""What a network predicts (noise, data, score, v, flow, EDM), and conversions between these, given x, t and the process.

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

So every view of an output is ``a x + b o`` with two numbers that the process, t and the dialect decide (:func:`weights`).
A solver folds them into its step, which is then one linear combination of tensors.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

from polyak.core import checks
from polyak.generate.process import Moment, Moments, ProbabilityPath, expand, wide
from polyak.generate.process.path import PATH, TIME, one_for_each_row

Kind = Literal["epsilon", "sample", "score", "v_prediction", "flow", "edm"]
KINDS: tuple[Kind, ...] = ("epsilon", "sample", "score", "v_prediction", "flow", "edm")
ALIASES: dict[str, Kind] = {"eps": "epsilon", "x0": "sample", "v": "v_prediction", "flow_prediction": "flow"}
Network = Callable[[Tensor, Tensor], Tensor]  # (x, labels of shape (B,)) -> output of x's shape


def check_kind(name: str, kind: str) -> Kind:
    """A dialect, by its name or a usual short one ("eps", "x0", "v", "flow_prediction")."""
    return checks.one_of(name, ALIASES.get(kind, kind) if isinstance(kind, str) else kind, KINDS)


class _Dialect(checks.Kind):
    words = f"one of {', '.join(map(repr, KINDS))}"

    def like(self, value: Any) -> bool:
        return isinstance(value, str)

    def __call__(self, name: str, value: Any) -> Kind:
        return value if type(value) is str and value in KINDS else check_kind(name, value)


class _Output(checks.Kind):
    words = "a tensor"

    def __init__(self) -> None:
        self.quick: set[type] = set()

    def like(self, value: Any) -> bool:
        return isinstance(value, Tensor)

    def __call__(self, name: str, value: Any) -> Tensor:
        if not self.like(value):
            hint = "; take its .sample" if hasattr(value, "sample") else ""
            raise TypeError(f"a network's {name} must be a tensor, got {type(value).__name__}{hint}")
        self.quick.add(type(value))
        return value


DIALECT = _Dialect()
NETWORK = checks.Function("a function (x, t) -> output", 2)


@runtime_checkable
class PredictionLike(Protocol):
    """What sampling asks of a prediction; solvers read more of it: ``x0``, ``eps`` or ``flow``, each of x's shape.

    :class:`Prediction` is that of Gaussian processes. A bridge between two laws, a discrete state or one with further
    dimensions brings its own, with the views that its solvers read. Of discrete states the output is one of logits, of shape
    (*x.shape, V), and has the kind "logits": it may be -inf.
    """

    output: Tensor
    x: Tensor

    def rebase(self, x: Tensor) -> PredictionLike:
        """The same output, taken to be said of x (say, of the state before it was rounded), in x's dtype."""
        ...


class _At:
    """The schedules of a process at one of the moments of a run."""

    __slots__ = ("index", "moments")

    def __init__(self, moments: Moments, index: int) -> None:
        self.moments, self.index = moments, index

    # Found without __getattr__, which takes ten times as long: these are read at every evaluation.
    alpha = property(lambda self: self.moments.alpha[self.index])
    sigma = property(lambda self: self.moments.sigma[self.index])
    dalpha = property(lambda self: self.moments.dalpha[self.index])
    dsigma = property(lambda self: self.moments.dsigma[self.index])
    sigma_hat = property(lambda self: self.moments.sigma_hat[self.index])


class _Of:
    """The schedules of a process at any other time."""

    __slots__ = ("process", "t")

    def __init__(self, process: ProbabilityPath, t: float | Tensor) -> None:
        self.process, self.t = process, t

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or name in _Of.__slots__:
            raise AttributeError(name)
        return getattr(self.process, name)(self.t)


def _schedules(process: ProbabilityPath, t: float | Tensor) -> Any:
    if isinstance(t, Tensor):
        return _Of(process, t.to(wide(t.device)))
    if isinstance(t, Moment) and t.of.are_of(process):
        return _At(t.of, t.index)
    return _Of(process, t)


class Undetermined(ValueError):
    """A view that an output does not determine: x0 where alpha = 0, eps or the score where sigma = 0."""


def _over(by: Any, what: str) -> Any:
    """``1 / by``; a tensor is not looked at, which would cost a synchronization."""
    if not isinstance(by, Tensor) and by == 0:
        raise Undetermined(what)
    return 1 / by


def weights(kind: str, view: str, at: Any, sigma_data: float = 0.5) -> tuple[Any, Any]:
    """The ``(a, b)`` of a view ``a x + b o`` of an output o.

    Args:
        kind: the output's dialect.
        view: "x0", "eps", "score", "v" or "flow".
        at: has ``alpha``, ``sigma``, ``dalpha``, ``dsigma`` and ``sigma_hat`` at the output's time: numbers or tensors.

    Raises:
        Undetermined: numbers at which the view is not determined.
    """
    if view == "x0":
        return _x0_weights(kind, at, sigma_data)
    if view == "eps":
        return _eps_weights(kind, at, sigma_data)
    if view == "score" != kind:
        (a, b), over = _eps_weights(kind, at, sigma_data), _over(at.sigma, "the score is infinite")
        return -a * over, -b * over
    if _OWN.get(view) == kind:
        return 0.0, 1.0
    if view not in VIEWS:
        checks.one_of("view", view, VIEWS)
    # v = alpha eps - sigma x0; dx/dt = alpha' x0 + sigma' eps
    of_x0, of_eps = (-at.sigma, at.alpha) if view == "v" else (at.dalpha, at.dsigma)
    (a0, b0), (a1, b1) = _x0_weights(kind, at, sigma_data), _eps_weights(kind, at, sigma_data)
    return of_x0 * a0 + of_eps * a1, of_x0 * b0 + of_eps * b1


VIEWS = ("x0", "eps", "score", "v", "flow")
_OWN = {"x0": "sample", "eps": "epsilon", "score": "score", "v": "v_prediction", "flow": "flow"}


def _x0_weights(kind: str, at: Any, sigma_data: float) -> tuple[Any, Any]:
    if kind == "sample":
        return 0.0, 1.0
    alpha, sigma = at.alpha, at.sigma
    if kind == "v_prediction":
        total = alpha**2 + sigma**2
        return alpha / total, -sigma / total
    if kind == "flow":
        turn = alpha * at.dsigma - at.dalpha * sigma
        return at.dsigma / turn, -sigma / turn
    over = _over(alpha, "x0 is undetermined, alpha is 0,")
    if kind == "edm":
        skip, out = edm_output_scaling(at.sigma_hat, sigma_data)
        return skip * over, out
    return over, (-sigma if kind == "epsilon" else sigma**2) * over


def _eps_weights(kind: str, at: Any, sigma_data: float) -> tuple[Any, Any]:
    if kind == "epsilon":
        return 0.0, 1.0
    alpha, sigma = at.alpha, at.sigma
    if kind == "score":
        return 0.0, -sigma
    if kind == "v_prediction":
        total = alpha**2 + sigma**2
        return sigma / total, alpha / total
    if kind == "flow":
        turn = alpha * at.dsigma - at.dalpha * sigma
        return -at.dalpha / turn, alpha / turn
    over = _over(sigma, "eps is undetermined, sigma is 0,")
    if kind == "edm":
        skip, out = edm_output_scaling(at.sigma_hat, sigma_data)
        return (1 - skip) * over, -alpha * out * over
    return over, -alpha * over


def weights_at(
    kind: str, view: str, process: ProbabilityPath, t: float | Tensor, sigma_data: float = 0.5
) -> tuple[Any, Any]:
    """:func:`weights` at a time of a process; ValueError where the view is not determined."""
    if "score" in (kind, view) and not process.is_gaussian:
        raise ValueError(f"{process!r} has no Gaussian noise, hence no score from its predictions")
    if _OWN.get(view) == kind:
        return 0.0, 1.0
    try:
        return weights(kind, view, _schedules(process, t), sigma_data)
    except Undetermined as error:
        raise ValueError(f"{error} from the {kind!r} output at t={t}") from None


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

    @checks.arguments(output=_Output(), x=checks.tensor, t=TIME, process=PATH, kind=DIALECT, sigma_data=checks.positive)
    def __init__(
        self,
        output: Tensor,
        x: Tensor,
        t: float | Tensor,
        process: ProbabilityPath,
        kind: str = "epsilon",
        *,
        sigma_data: float = 0.5,
    ) -> None:
        if output.shape != x.shape:
            raise ValueError(f"output must have x's shape {tuple(x.shape)}, got {tuple(output.shape)}")
        self.output, self.x, self.process = output, x, process
        self.t = one_for_each_row(t, x)
        self.kind = kind
        self.sigma_data = sigma_data
        self._views: dict[str, Tensor] = {}
        if kind == "score":
            weights_at(kind, "score", process, self.t)  # refused where the noise is not Gaussian

    def weights(self, view: str) -> tuple[Any, Any]:
        """``(a, b)`` of ``view = a x + b output``: numbers, or for a time for each row tensors of shape (B,) in float64.

        Args:
            view: "x0", "eps", "score", "v" or "flow".
        """
        return weights_at(self.kind, view, self.process, self.t, self.sigma_data)

    def view(self, name: str) -> Tensor:
        """x0, eps, score, v or flow, by name; x's shape."""
        made = self._views.get(name)
        if made is None:
            a, b = (expand(w, self.x) for w in self.weights(name))
            if isinstance(a, float) and a == 0.0:
                made = self.output if isinstance(b, float) and b == 1.0 else b * self.output
            else:
                made = a * self.x + b * self.output
            self._views[name] = made
        return made

    @property
    def alpha(self) -> float | Tensor:
        """``alpha(t)``, ready to multiply x."""
        return expand(_schedules(self.process, self.t).alpha, self.x)

    @property
    def sigma(self) -> float | Tensor:
        """``sigma(t)``, ready to multiply x."""
        return expand(_schedules(self.process, self.t).sigma, self.x)

    @property
    def x0(self) -> Tensor:
        """The predicted clean data, x's shape."""
        return self.view("x0")

    @property
    def eps(self) -> Tensor:
        """The predicted noise, x's shape."""
        return self.view("eps")

    @property
    def score(self) -> Tensor:
        """``grad log p_t(x) = -eps / sigma``, x's shape."""
        return self.view("score")

    @property
    def v(self) -> Tensor:
        """``alpha eps - sigma x0``, x's shape."""
        return self.view("v")

    @property
    def flow(self) -> Tensor:
        """``dx/dt`` of the probability-flow ODE, ``alpha' x0 + sigma' eps``, x's shape."""
        return self.view("flow")

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


def edm_loss_weight(sigma_hat: float | Tensor, sigma_data: float) -> float | Tensor:
    """EDM's ``(s^2 + sd^2) / (s sd)^2 = 1 / c_out^2``, by which its loss of x0 is one unit of the network's output."""
    return (sigma_hat**2 + sigma_data**2) / (sigma_hat * sigma_data) ** 2


def edm_label(sigma_hat: float | Tensor) -> float | Tensor:
    """EDM's ``c_noise = ln(s) / 4``."""
    return sigma_hat.log() / 4 if isinstance(sigma_hat, Tensor) else math.log(sigma_hat) / 4


class _Told:
    """The labels of a run, one row of a table for each of its times; None where there is no label."""

    def __init__(self, moments: Moments, key: tuple[int, torch.dtype, torch.device], labels: list[float]) -> None:
        rows, dtype, device = key
        self.moments, self.key = moments, key
        # Inference tensors have no version, by which to see that they were written to.
        with torch.inference_mode(False):
            # From pinned memory a copy does not wait for the device.
            told = torch.tensor(labels, dtype=dtype, device="cpu", pin_memory=device.type == "cuda")
            self._table = told.to(device, non_blocking=True)[:, None].repeat(1, rows)
            made = self._table.unbind()
        self.rows = [None if math.isnan(label) else row for label, row in zip(labels, made, strict=True)]
        self._version = self._table._version

    def touched(self) -> bool:
        """Whether a network may have written over what it was told."""
        return self._table._version != self._version


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

    @checks.arguments(
        model=NETWORK, process=PATH, prediction=DIALECT, unconditional=NETWORK | None,
        label=checks.Function("a function of t", 1) | None, sigma_data=checks.positive,
    )  # fmt: skip
    def __init__(
        self,
        model: Network,
        process: ProbabilityPath,
        prediction: str = "epsilon",
        *,
        unconditional: Network | None = None,
        label: Callable[[float | Tensor], float | Tensor] | None = None,
        sigma_data: float = 0.5,
    ) -> None:
        self.model, self.unconditional, self.process = model, unconditional, process
        self.prediction = prediction
        self.sigma_data = sigma_data
        self._label = label
        self._told: _Told | None = None
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
        one_for_each_row(t, x)  # before the network is asked
        output = self._run(model, x, t)
        return Prediction(output, x, t, self.process, self.prediction, sigma_data=self.sigma_data)

    def _run(self, model: Network, x: Tensor, t: float | Tensor) -> Tensor:
        return model(self.scaled(x, t), self._labels(x, t))

    def scaled(self, x: Tensor, t: float | Tensor) -> Tensor:
        """x as the network is given it: scaled for "edm", else x itself."""
        if self.prediction != "edm":
            return x
        at = _schedules(self.process, t)
        return x * expand(edm_input_scaling(at.sigma_hat, self.sigma_data) / at.alpha, x)

    def label(self, t: float | Tensor) -> float | Tensor:
        """What the network is told at t."""
        if self._label is not None:
            return self._label(t)
        return edm_label(self.process.sigma_hat(t)) if self.prediction == "edm" else self.process.label(t)  # type: ignore[attr-defined]

    def _labels(self, x: Tensor, t: float | Tensor) -> Tensor:
        """(B,), in float32 where x's own precision would round the label."""
        if isinstance(t, Moment):
            return self.labels([t], x)[0]
        label = self.label(t.to(wide(t.device)) if isinstance(t, Tensor) else t)
        if isinstance(label, Tensor):
            return label.to(device=x.device, dtype=_label_dtype(x)).expand(x.shape[0])
        return torch.full((x.shape[0],), label, dtype=_label_dtype(x), device=x.device)

    def labels(self, times: Sequence[Moment], x: Tensor) -> list[Tensor]:
        """What the network is told for x at some of the times of a run, each of shape (B,).

        The labels of all times of the run are made and moved to the device together, when the first is asked for.
        """
        if x.is_cuda and torch.cuda.is_current_stream_capturing():
            return [self._labels(x, float(t)) for t in times]  # a captured graph may read no memory that is not its own
        key, known = (len(x), _label_dtype(x), x.device), self._told
        if known is None or known.moments is not times[0].of or known.key != key or known.touched():
            known = self._told = _Told(times[0].of, key, [self._told_at(t) for t in times[0].of])
        rows = [known.rows[t.index] for t in times]
        return [self._labels(x, float(t)) if row is None else row for t, row in zip(times, rows, strict=True)]

    def _told_at(self, t: float) -> float:
        """The label, or nan: a run's last time need have none, since nobody is asked there."""
        try:
            return float(self.label(float(t))) if self.process.t_min <= t <= self.process.t_max else math.nan
        except (ValueError, ZeroDivisionError, OverflowError):
            return math.nan

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_told": None}


def _label_dtype(x: Tensor) -> torch.dtype:
    return x.dtype if x.dtype in (torch.float32, torch.float64) else torch.float32
