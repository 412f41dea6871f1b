"""The corrector as a steering: weights of one inner product a step, and resampling."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from polyak.core import checks
from polyak.core.particles import SCHEMES, ess, resample
from polyak.generate.fkc.composed import Composed, ComposedPrediction
from polyak.generate.fkc.weight import fkc_weight
from polyak.generate.process import wide
from polyak.generate.steering import SteeringState, rows_of

_TARGETS = ("anneal", "cfg", "product", "tilt")
_TARGET = checks.Choice(*_TARGETS) | checks.Instance(Composed, words="a Composed")


_PARTICLES, _SYSTEMS = checks.Tensor(floating=True, ndim=2), checks.Tensor(floating=True, ndim=1)


@checks.arguments(
    logw=_PARTICLES, log_z=_SYSTEMS, ancestors=checks.Tensor(ndim=1) | None, steps=checks.Integer(0) | None,
    clipped=_SYSTEMS | None, roots=checks.Tensor(ndim=2) | None, deaths=_PARTICLES | None, limits=_PARTICLES | None,
)  # fmt: skip
@dataclass(frozen=True)
class FKCState(SteeringState):
    """The weights, and what a run of the corrector remembers.

    Attributes:
        steps: of the run, or None.
        clipped: (batch,), how many increments were clipped so far.
        roots: (batch, k), the particle of the start that each descends from; few of them say that diversity was lost.
        deaths, limits: (batch, k), the clocks of "birth_death" and their Exp(1) thresholds; None for other schemes.
    """

    steps: int | None = None
    clipped: Tensor | None = None
    roots: Tensor | None = None
    deaths: Tensor | None = None
    limits: Tensor | None = None


class FeynmanKacCorrector:
    """Weighs and resamples particles so that they follow the law that a combination of scores is said to have.

    The rate of the log-weights is :func:`fkc_weight` at the state before each step; it is the same for every share of noise.
    Log-weights are carried between resamplings, and log_z estimates the logarithm of the target's integral over that of the law of
    the start, ``prod_i (q_1^i)^{beta_i}``.

    Args:
        target: what the denoiser is: "anneal", a :class:`Composed` of one expert; "product", of several; "tilt", with a reward; a
            Composed itself, any of these. "cfg": a pair combined by :class:`CFG` in ``sample(guidance=CFG(w))``, with one scale for
            all times; what is sampled is then ``q_u^{1-w} q_c^w``.
        num_particles: k, at least 2.
        zeta: the share of noise of the solver (see :class:`ReverseSDE`); 1 for the room's other stochastic solvers.
        ess_threshold: resample where the effective sample size is below this share of k; None: after every step, as official code
            does; 0: never, and the samples have the weights ``info.steering.logw``.
        scheme: of resampling, by name (see :func:`polyak.core.particles.resample`), or "birth_death": a particle whose deficit
            ``integral of (mean g - g_k)_+`` reaches an Exp(1) threshold is replaced by one drawn by its surplus; fewer move.
        window: the part of the steps, as shares of the run, in which particles are resampled; weights are carried outside of it,
            and the last step resamples.
        clip: bound on the increments ``g dtau`` in absolute value, a bias, for images (official code: 1 or 2).
        center: take the mean over the particles off the increments before they are clipped. log_z has it all the same.
        generator: the resampling's own; default: one that follows from the run's.

    Raises:
        ValueError: one particle; a window that is none. While it runs: a prediction that is not of the target's kind, a zeta that
            is not the Composed's.

    Example:
        >>> corrector = FeynmanKacCorrector("cfg", num_particles=64)
        >>> x = sample(denoiser, (1, 2), solver=DDIM(eta=1.0), steps=100, guidance=CFG(2.0), steering=corrector)
    """

    @checks.arguments(
        target=_TARGET, num_particles=checks.Integer(2), zeta=checks.non_negative, ess_threshold=checks.fraction | None,
        scheme=checks.Choice(*SCHEMES, "birth_death"), window=checks.Each(checks.fraction, count=2, words="a pair of shares"),
        clip=checks.positive | None, center=checks.flag, generator=checks.generator | None,
    )  # fmt: skip
    def __init__(
        self,
        target: str | Composed = "anneal",
        *,
        num_particles: int = 4,
        zeta: float = 1.0,
        ess_threshold: float | None = 0.5,
        scheme: str = "systematic",
        window: Sequence[float] = (0.0, 1.0),
        clip: float | None = None,
        center: bool = True,
        generator: torch.Generator | None = None,
    ) -> None:
        low, high = window
        if low >= high:
            raise ValueError(f"window must be increasing, got {window!r}")
        if scheme == "birth_death" and ess_threshold == 0:
            raise ValueError('ess_threshold=0 never resamples, which scheme="birth_death" must')
        self.target, self.num_particles, self.zeta = target, num_particles, zeta
        self.ess_threshold, self.scheme, self.window = ess_threshold, scheme, (float(low), float(high))
        self.clip, self.center, self.generator = clip, center, generator

    def __repr__(self) -> str:
        target = self.target if isinstance(self.target, str) else "composed"
        return f"FeynmanKacCorrector({target!r}, num_particles={self.num_particles}, scheme={self.scheme!r})"

    @property
    def particles(self) -> int:
        return self.num_particles

    @property
    def resamples(self) -> bool:
        return self.ess_threshold != 0

    def init(
        self, batch: int, k: int, *, device: torch.device | str | None = None, steps: int | None = None
    ) -> FKCState:
        """Equal weights."""
        if steps is None and self.window != (0.0, 1.0):
            raise ValueError(f"window={self.window} needs a solver whose number of steps is known")
        base = SteeringState.uniform(batch, k, device=device)
        roots = torch.arange(k, device=base.logw.device).expand(batch, k)
        return FKCState(base.logw, base.log_z, steps=steps, clipped=torch.zeros_like(base.log_z), roots=roots)

    def step(
        self,
        state: FKCState,
        x_next: Tensor,
        *,
        pred: Any,
        x0_hat: Tensor | None = None,
        step: int,
        t: float,
        t_next: float,
        last: bool,
        mean: Tensor | None = None,
        cond: Any = None,
        uncond: Any = None,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, FKCState]:
        """Weigh the population by what happened from t to t_next, and resample it where that is due."""
        generator = self.generator or generator
        rate, level = self._rate(pred, cond, uncond, mean, step)
        gain = (float(t) - float(t_next)) * rate.reshape(state.logw.shape).to(state.logw.dtype)
        state, gain = self._centred(state, gain, (float(t) - float(t_next)) * level)
        active, opens = self._active(state, step)
        if self.scheme == "birth_death" and active and not opens:
            state, ancestors = self._clocks(state, gain, generator)
        else:
            always = last or opens
            state, ancestors = self._resampled(state, gain, generator, due=active or last, always=always)
        if ancestors is None:
            return x_next, state
        rows = rows_of(ancestors)
        assert state.roots is not None
        state = replace(state, ancestors=rows, roots=state.roots.gather(1, ancestors))
        return x_next.index_select(0, rows), state

    def select(self, state: FKCState, x: Tensor) -> Tensor:
        """All particles, (batch * k, ...)."""
        return x

    def _rate(self, pred: Any, cond: Any, uncond: Any, mean: Tensor | None, step: int) -> tuple[Tensor, float]:
        """g of each particle, (batch * k,), and the part of it that is the same for all."""
        if pred is None:
            raise ValueError(
                "the corrector needs the predictions, and this pipeline's scheduler does not tell them: use a PolyakScheduler, "
                'guide(pipe, CFG(scale)) and target="cfg"'
            )
        if step == 0:
            self._check(pred, cond, uncond, mean)
        t, process = float(pred.t), pred.process
        sigma2, drift = process.diffusion2(t), process.drift(t)
        if self.target == "cfg":
            kind = wide(pred.x.device)
            # S = s_u + w d and d = s_c - s_u: <S - s_u, S - s_c> = w (w - 1) |d|^2, whatever w is.
            S, a, b = (p.score.flatten(1).to(kind) for p in (pred, uncond, cond))
            return sigma2 / 2 * ((S - a) * (S - b)).sum(1), 0.0
        x = pred.x
        rate = fkc_weight(
            pred.composed_score, [e.score for e in pred.experts], pred.betas, sigma2,
            None if pred.grad_rho is None else drift * x, pred.grad_rho, pred.drho, event_dims=x.ndim - 1,
        )  # fmt: skip
        if pred.dlog is not None:
            rate = rate + pred.dlog
        return rate, (math.fsum(pred.betas) - 1) * drift * x[0].numel()

    def _check(self, pred: Any, cond: Any, uncond: Any, mean: Tensor | None) -> None:
        if isinstance(pred.t, Tensor) and pred.t.ndim:
            raise ValueError("the corrector needs a solver whose rows have one time")
        if self.target == "cfg":
            if cond is uncond:
                text = 'target="cfg" with one prediction corrects nothing: sample with guidance=CFG(scale), scale not 1'
                warnings.warn(text, RuntimeWarning, stacklevel=2)
            return
        if not isinstance(pred, ComposedPrediction):
            raise ValueError(
                f"target must be what the denoiser is: {self.target!r} needs a Composed one without guidance"
            )
        made = pred.composed
        held = {
            "anneal": len(made.experts) == 1 and made.reward is None,
            "product": len(made.experts) > 1 and made.reward is None,
            "tilt": made.reward is not None,
        }
        if not (held[self.target] if isinstance(self.target, str) else made is self.target):
            raise ValueError(f"target must be what the denoiser is, {made!r}, got {self.target!r}")
        if made.reward is not None and made.zeta != self.zeta:
            raise ValueError(f"zeta must be the Composed's own, {made.zeta:g}, got {self.zeta:g}")
        if mean is None and math.fsum(pred.betas) != 1:
            text = "a deterministic solver contracts particles far below an annealed law's spread: weights say little"
            warnings.warn(text, RuntimeWarning, stacklevel=2)

    def _centred(self, state: FKCState, gain: Tensor, level: float) -> tuple[FKCState, Tensor]:
        """Increments without their mean, clipped; the mean goes into log_z at once."""
        state = replace(state, log_z=state.log_z + level)
        if self.center:
            mean = gain.mean(1, keepdim=True)
            gain, state = gain - mean, replace(state, log_z=state.log_z + mean.squeeze(1))
        if self.clip is not None:
            assert state.clipped is not None
            many = (gain.abs() > self.clip).sum(1)
            gain, state = gain.clamp(-self.clip, self.clip), replace(state, clipped=state.clipped + many)
        return state, gain

    def _active(self, state: FKCState, step: int) -> tuple[bool, bool]:
        """Whether a step is in the window; whether it is its first one and brings weights along for the clocks."""
        if state.steps is None:
            return True, False
        low, high = (share * state.steps for share in self.window)
        active = low <= step < high
        return active, self.scheme == "birth_death" and active and step > 0 and step - 1 < low

    def _resampled(
        self, state: FKCState, gain: Tensor, generator: torch.Generator | None, *, due: bool, always: bool
    ) -> tuple[FKCState, Tensor | None]:
        logw = state.logw + gain
        state = replace(state, logw=logw, log_z=state.log_z + logw.logsumexp(1) - state.logw.logsumexp(1))
        if not due or self.ess_threshold == 0:
            return state, None
        k = self.num_particles
        threshold = 1.0 if always or self.ess_threshold is None else self.ess_threshold
        # Equal weights, whose effective size is k but for rounding, are left alone.
        low = (ess(logw) < threshold * k * (1 - 1e-12))[:, None]
        scheme = "systematic" if self.scheme == "birth_death" else self.scheme
        ancestors = torch.where(
            low, resample(logw, scheme=scheme, generator=generator), torch.arange(k, device=logw.device)
        )
        return replace(state, logw=torch.where(low, 0.0, logw)), ancestors

    def _clocks(
        self, state: FKCState, gain: Tensor, generator: torch.Generator | None
    ) -> tuple[FKCState, Tensor | None]:
        """A step of deaths and births; weights stay equal."""
        mean = gain.mean(1, keepdim=True)
        surplus = gain - mean
        limits = self._limits(gain, generator) if state.limits is None else state.limits
        deaths = (torch.zeros_like(gain) if state.deaths is None else state.deaths) + (-surplus).clamp(min=0)
        dead = deaths >= limits
        # In proportion to the surplus of this step; where there is none all are alike. Given u, draws are in no order.
        u = torch.rand(gain.shape, dtype=gain.dtype, device=gain.device, generator=generator)
        parents = resample(surplus.clamp(min=0).log(), scheme="multinomial", u=u, on_collapse="uniform")
        own = torch.arange(self.num_particles, device=gain.device)
        state = replace(
            state,
            log_z=state.log_z + mean.squeeze(1),
            deaths=torch.where(dead, 0.0, deaths),
            limits=torch.where(dead, self._limits(gain, generator), limits),
        )
        return state, torch.where(dead, parents, own)

    @staticmethod
    def _limits(like: Tensor, generator: torch.Generator | None) -> Tensor:
        """Exp(1) of like's shape."""
        u = torch.rand(like.shape, dtype=like.dtype, device=like.device, generator=generator)
        return -torch.log1p(-u)
