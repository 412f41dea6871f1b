"""Experts and their powers, as one denoiser."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from polyak.core import checks
from polyak.generate.evaluate import MODEL, Model
from polyak.generate.fkc.weight import initial_scale
from polyak.generate.prediction import Prediction
from polyak.generate.process import Generators, Process, wide

Power = float | Callable[[float], Any]
Reward = Callable[[Tensor, Tensor], Tensor]

_POWER = checks.real | checks.Function("a function of t", 1)
_PROCESS = checks.Instance(Process, words="a Process with alpha and sigma (an instance, not the class)")
_EXPERTS = checks.Each(
    checks.Each(MODEL | _POWER, count=2, words="a pair (model, beta)"), least=1, words="a list of (model, beta)"
)


class ComposedPrediction(Prediction):
    """What :class:`Composed` predicts: the composed score, readable in every dialect, and what the corrector needs of its parts.

    Attributes:
        composed: whose it is.
        experts: the experts' predictions at the same point.
        betas: their powers at this time.
        composed_score: ``S = sum_i beta_i s_i``, x's shape, without the reward's part, which ``score`` has.
        grad_rho: the reward's gradient, x's shape, or None.
        drho: its derivative in reverse time, (B,), or None.
        dlog: ``sum_i (d_tau beta_i) log q_i``, (B,), or None for constant powers.
    """

    def __init__(
        self,
        composed: Composed,
        experts: Sequence[Prediction],
        betas: Sequence[float],
        grad_rho: Tensor | None = None,
        drho: Tensor | None = None,
        dlog: Tensor | None = None,
    ) -> None:
        self.composed, self.experts, self.betas = composed, tuple(experts), tuple(betas)
        self.grad_rho, self.drho, self.dlog = grad_rho, drho, dlog
        first = self.experts[0]
        alike = all((e.kind, e.sigma_data) == (first.kind, first.sigma_data) for e in self.experts)
        if alike and grad_rho is None and math.fsum(betas) == 1:
            # Dialects are affine, hence the same average in each; one expert alone is left as it is.
            parts, kind = [e.output for e in self.experts], first.kind
        else:
            parts, kind = [e.score for e in self.experts], "score"
        output = parts[0] if self.betas[0] == 1 else betas[0] * parts[0]
        for part, beta in zip(parts[1:], self.betas[1:], strict=True):
            output = torch.add(output, part, alpha=beta)
        if grad_rho is not None:
            output = torch.add(output, grad_rho, alpha=composed.share)
        super().__init__(output, first.x, first.t, first.process, kind, sigma_data=first.sigma_data)

    @property
    def composed_score(self) -> Tensor:
        return self.score if self.grad_rho is None else torch.add(self.score, self.grad_rho, alpha=-self.composed.share)

    def rebase(self, x: Tensor) -> ComposedPrediction:
        experts = [e.rebase(x) for e in self.experts]
        grad = None if self.grad_rho is None else self.grad_rho.to(x.dtype)
        return ComposedPrediction(self.composed, experts, self.betas, grad, self.drho, self.dlog)


class Composed:
    """``prod_i (q_t^i)^{beta_i} exp(rho_t)``: several models of one process and their powers, as one denoiser.

    Sampling it without :class:`FeynmanKacCorrector` is what is usually done, and follows another law.

    Args:
        experts: pairs (model, beta): each model a :class:`Denoiser`, or any ``(x, t) -> Prediction``. A power is a number, or a
            function of t; then the model must have ``log_prob(x, t) -> (B,)``.
        reward: ``(x, t) -> rho``, (B, ...) and (B,) to (B,), differentiable by autograd in both; a log-reward, which the target is
            tilted by. Let it be 0 at the start and what is wanted at the end, say.
        process: left out, the first expert's own.
        zeta: the share of noise of the solver that it is used with: of the reward's gradient ``zeta^2 / (1 + zeta^2)`` is added to
            the score.

    Attributes:
        process, experts, zeta: as given.
        share: ``zeta^2 / (1 + zeta^2)``.

    Raises:
        ValueError: experts of different processes; powers whose sum is not positive at the start; a power that changes over time
            for a model that has no ``log_prob``.

    Example:
        >>> both = Composed([(first, 1.0), (second, 1.0)])
        >>> x = sample(both, (8, 2), solver=ReverseSDE(), steps=100, steering=FeynmanKacCorrector("product", num_particles=64))
    """

    @checks.arguments(
        experts=_EXPERTS, reward=checks.Function("a function (x, t) -> log-reward", 2) | None, process=_PROCESS | None,
        zeta=checks.non_negative,
    )  # fmt: skip
    def __init__(
        self,
        experts: Sequence[tuple[Model, Power]],
        reward: Reward | None = None,
        *,
        process: Process | None = None,
        zeta: float = 1.0,
    ) -> None:
        self.experts = tuple((model, beta) for model, beta in experts)
        for i, (model, beta) in enumerate(self.experts):
            if not MODEL.like(model):
                raise TypeError(f"experts[{i}][0] must be {MODEL.words}, got {checks.shown(model)}")
            if not _POWER.like(beta):
                raise TypeError(f"experts[{i}][1] must be {_POWER.words}, got {checks.shown(beta)}")
            own = getattr(model, "process", None)
            process = own if process is None else process
            if own is not None and own != process:
                raise ValueError(f"experts must share one process: experts[{i}] has {own!r}, others {process!r}")
            if callable(beta) and not hasattr(model, "log_prob"):
                raise ValueError(f"experts[{i}] has a power that changes over time, and must have log_prob(x, t)")
        if process is None:
            raise ValueError("process is needed: no expert has its own")
        if not process.is_gaussian:
            raise ValueError(f"{process!r} has no Gaussian noise, hence no score")
        self.reward, self.process, self.zeta = reward, process, zeta
        self.share = (zeta / math.hypot(1, zeta)) ** 2
        initial_scale(self.betas(process.t_max), process)

    def __repr__(self) -> str:
        powers = ", ".join("beta(t)" if callable(beta) else f"{beta:g}" for _, beta in self.experts)
        return f"Composed(betas=({powers}), reward={self.reward is not None}, process={self.process!r})"

    def betas(self, t: float) -> tuple[float, ...]:
        """The powers at t."""
        return tuple(float(beta(t)) if callable(beta) else float(beta) for _, beta in self.experts)

    def prior(
        self,
        shape: Sequence[int],
        *,
        generator: Generators | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> Tensor:
        """Draw what sampling starts from: ``N(0, initial_scale^2 I)``, the prior to the power of the betas' sum."""
        x = self.process.prior(shape, generator=generator, dtype=dtype, device=device)
        total = math.fsum(self.betas(self.process.t_max))
        return x if total == 1 else x.div_(math.sqrt(total))

    def __call__(self, x: Tensor, t: float | Tensor) -> ComposedPrediction:
        """The composed prediction at x, shape (B, ...), and t, one number for all rows."""
        if isinstance(t, Tensor) and t.ndim:
            raise ValueError(f"t must be one number for all rows, got shape {tuple(t.shape)}")
        time = float(t)
        found: list[Prediction] = []
        for i, (model, _) in enumerate(self.experts):
            prediction: Any = model(x, t)  # type: ignore[arg-type]
            if not isinstance(prediction, Prediction):
                raise TypeError(f"experts[{i}] must return a Prediction, got {checks.shown(prediction)}")
            if prediction.process is not self.process and prediction.process != self.process:
                raise ValueError(f"experts[{i}] must predict for {self.process!r}, got {prediction.process!r}")
            found.append(prediction)
        grad, drho = (None, None) if self.reward is None else self._slopes(x, time)
        return ComposedPrediction(self, found, self.betas(time), grad, drho, self._dlog(x, time))

    def _slopes(self, x: Tensor, t: float) -> tuple[Tensor, Tensor]:
        """``grad rho``, x's shape, and ``d_tau rho = -d_t rho``, (B,)."""
        assert self.reward is not None
        with torch.inference_mode(False), torch.enable_grad():
            point = x.detach().clone().requires_grad_()
            when = torch.full((len(x),), t, dtype=wide(x.device), device=x.device, requires_grad=True)
            rho = self.reward(point, when)
            if not isinstance(rho, Tensor) or rho.shape != (len(x),):
                shown = tuple(rho.shape) if isinstance(rho, Tensor) else checks.shown(rho)
                raise ValueError(f"reward must return a tensor of shape ({len(x)},), got {shown}")
            if not rho.requires_grad:
                raise ValueError("reward must be differentiable: its result does not depend on x by autograd")
            grads = torch.autograd.grad(rho.sum(), (point, when), allow_unused=True)
        grad = torch.zeros_like(x) if grads[0] is None else grads[0].to(x.dtype)
        return grad, torch.zeros_like(when) if grads[1] is None else -grads[1]

    def _dlog(self, x: Tensor, t: float) -> Tensor | None:
        """``sum_i (d_tau beta_i) log q_i``."""
        total = None
        for model, beta in self.experts:
            if not callable(beta):
                continue
            near = 1e-5 * (self.process.t_max - self.process.t_min)
            low, high = max(t - near, self.process.t_min), min(t + near, self.process.t_max)
            slope = (float(beta(high)) - float(beta(low))) / (high - low)
            term = -slope * model.log_prob(x, t).to(wide(x.device))  # type: ignore[union-attr]
            total = term if total is None else total + term
        return total
