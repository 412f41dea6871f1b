"""Feynman-Kac steering: any reward on any diffusion model, by weighing and resampling its trajectories.

Singhal et al., "A General Framework for Inference-time Scaling and Steering of Diffusion Models" (arXiv 2501.06848). The target is

    p*(x_0) ~ p(x_0) exp(lam r(x_0)),

and k trajectories of the model are its particles. At some steps, always at the last one, each is weighed by a potential G_t of the
rewards that it has had (section 3), r_t = r(x0_hat(x_t)) being that of the predicted data:

- "diff": ``exp(lam (r_t - r_before))``, with r_min before the first;
- "max", "sum", "rt": ``exp(lam max_{s >= t} r_s)``, ``exp(lam sum_{s >= t} r_s)``, ``exp(lam r_t)``.

The last potential is ``exp(lam (r(x_0) - r_min)) / prod G_s`` over the earlier ones of the particle's own path; that of "diff" is
this by itself. So the product of all is ``exp(lam (r(x_0) - r_min))``, and the law of the weighted particles is the target for
large k. The reward is not differentiated. It is of the prediction made before the step that it weighs.

Weights are logarithms in float64, and are carried until particles are resampled.
"""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from polyak.core import checks
from polyak.core.particles import SCHEMES, ess, resample
from polyak.generate.rewards import BATCH, DECODE, REWARD, Decode, Reward, Scorer, warn_of_nan, without_nan
from polyak.generate.steering import SteeringState, rows_of

POTENTIALS = ("diff", "max", "sum", "rt", "is", "bon")
Potential = Callable[[Tensor, "FKState"], Tensor]  # (rewards, state) -> log G, (batch, k)
Schedule = dict[str, float] | Sequence[int] | Callable[[int], bool]
Sampler = Callable[..., Tensor]  # (n, generator=...) -> (n, rows, ...)
_CLAMP = math.log(1e10)  # of weights, in the published code


class _When(checks.Kind):
    """When rewards are asked for."""

    words = "a dict of start, stop, every; increasing step indices; or a function (step) -> bool"

    def like(self, value: Any) -> bool:
        return isinstance(value, dict) or _INDICES.like(value) or _ASKED.like(value)

    def __call__(self, name: str, value: Any) -> Any:
        super().__call__(name, value)
        if isinstance(value, dict):
            if set(value) != {"start", "stop", "every"}:
                raise ValueError(f"{name} must have start, stop and every, got {checks.shown(value)}")
            for key, one in value.items():
                checks.between(f"{name}[{key!r}]", one, 0, 1, ends="(]" if key == "every" else "[]")
            if value["start"] > value["stop"]:
                raise ValueError(f"{name} must start before it stops, got {checks.shown(value)}")
        elif _INDICES.like(value):
            _INDICES(name, value)
            if any(b <= a for a, b in itertools.pairwise(value)):
                raise ValueError(f"{name} must be increasing step indices, got {checks.shown(value)}")
        return value


_INDICES = checks.Each(checks.Integer(0))
_ASKED = checks.Function("a function (step) -> bool", 1)
_POTENTIAL = checks.Choice(*POTENTIALS) | checks.Function("a function (rewards, state) -> log G", 2)


@dataclass(frozen=True)
class FKState(SteeringState):
    """What a population carries beside its weights; all of shape (batch, k), float64, unless said otherwise.

    Attributes:
        reward: the last reward of each particle, at the end that of its final sample.
        seen: the running maximum ("max") or sum ("sum") of the rewards.
        total: the logarithm of the product of the potentials along the particle's path.
        offset: (batch, 1), r_min.
        nan, collapsed: counts of rewards that were NaN, and of scorings at which no particle of a system had a weight left.
        index, scored: the last step, and how many times rewards were asked for.
        when: the steps at which they are; None: the schedule is asked.
    """

    reward: Tensor = field(default_factory=lambda: torch.zeros(0, 0))
    seen: Tensor = field(default_factory=lambda: torch.zeros(0, 0))
    total: Tensor = field(default_factory=lambda: torch.zeros(0, 0))
    offset: Tensor = field(default_factory=lambda: torch.zeros(0, 1))
    nan: Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.int64))
    collapsed: Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.int64))
    index: int = -1
    scored: int = 0
    when: frozenset[int] | None = None

    def gathered(self, ancestors: Tensor) -> FKState:
        """What belongs to the particles, after resampling: particle i of a system was ``ancestors[:, i]``."""
        moved = {name: getattr(self, name).gather(1, ancestors) for name in ("reward", "seen", "total")}
        return replace(self, **moved)


class FKSteering:
    """Steer generation by a reward.

        steering = FKSteering(reward, lam=10.0, num_particles=4)
        x = sample(denoiser, (batch, 3, 64, 64), solver=DDIM(eta=1.0), steps=100, steering=steering)

    Args:
        reward: ``(samples)`` or ``(samples, context) -> rewards``; see :class:`polyak.generate.rewards.Scorer`.
        lam: how far the law is tilted; below 0 away from the reward.
        potential: see above. "is": only the last one (importance sampling). "bon": none; the k samples are sorted by reward. Or a
            function ``(rewards, state) -> log G``, all (batch, k); the last potential makes it exact, as for "max".
        num_particles: k, for each system.
        schedule: when rewards are asked for, beside the last step: fractions of the number of steps; step indices from 0; or a
            function of the index.
        ess_threshold: resample a system whose effective sample size is below this part of k. 1: whenever weights are not equal, 0:
            never.
        scheme: of resampling, one of ``polyak.core.particles.SCHEMES``.
        intermediate: what an intermediate reward is of: "x0", the predicted data, or "samples",
            ``log (1/M) sum_m exp(r(x_0^m))`` over draws of x_0 given x_t, for models that can draw them.
        num_x0_samples: M.
        lam_inside: average ``exp(lam r)`` in place of ``exp(r)``: ``(1/lam) log (1/M) sum_m exp(lam r(x_0^m))``.
        r_min: the reward before the first one. "first": the largest of the system's first rewards; nothing then depends on where
            rewards have their zero. It does not change the target, but ``log_z``.
        decode: from samples (n, ...) to what the reward is given, in parts of ``reward_batch_size``.
        reward_batch_size: the most samples that are decoded and scored at once.
        pick: what of a final system is returned: "best" by reward, shape (batch, ...), or "all", (batch * k, ...).
        correct_proposal: weigh by the ratio of the model's own transitions to those under guidance and correction, too: the target
            is then of the model without them, and they only propose. Otherwise they are part of the model, as in the paper.
        generator: of resampling, on the particles' device; left out, one that the sampling loop makes of its own.
        parity: "official" for what the published image code does: weights are dropped where particles are not resampled, the last
            weight of "max" and "sum" is of the running value in place of r(x_0), which begins with r_min, and weights are clamped
            to 1e10. It resamples multinomially, always (``ess_threshold=1``) or below the threshold, at the end below one half.
            ``log_z`` is NaN.

    Raises:
        ValueError: a schedule that does not increase, or in fractions that are none.

    The final :class:`FKState` is ``info.steering`` of ``sample(..., return_info=True)``: weights, rewards, and ``log_z``, whose
    exponential is an unbiased estimate of ``E[exp(lam (r(x_0) - r_min))]`` under the model, for a number as r_min.
    """

    @checks.arguments(
        reward=REWARD, lam=checks.real, potential=_POTENTIAL, num_particles=checks.Integer(1), schedule=_When(),
        ess_threshold=checks.fraction, scheme=checks.Choice(*SCHEMES), intermediate=checks.Choice("x0", "samples"),
        num_x0_samples=checks.Integer(1), lam_inside=checks.flag, r_min=checks.Choice("first") | checks.real, decode=DECODE | None,
        reward_batch_size=BATCH | None, pick=checks.Choice("best", "all"), correct_proposal=checks.flag,
        generator=checks.generator | None, parity=checks.Choice(None, "official"),
    )  # fmt: skip
    def __init__(
        self,
        reward: Reward,
        *,
        lam: float = 10.0,
        potential: str | Potential = "diff",
        num_particles: int = 4,
        schedule: Schedule = {"start": 0.2, "stop": 0.8, "every": 0.2},  # noqa: B006 - never written to
        ess_threshold: float = 1.0,
        scheme: str = "systematic",
        intermediate: str = "x0",
        num_x0_samples: int = 4,
        lam_inside: bool = False,
        r_min: float | str = 0.0,
        decode: Decode | None = None,
        reward_batch_size: int | None = None,
        pick: str = "best",
        correct_proposal: bool = False,
        generator: torch.Generator | None = None,
        parity: str | None = None,
    ) -> None:
        self.scorer = Scorer(reward, decode=decode, batch_size=reward_batch_size)
        self.lam, self.potential, self.num_particles = lam, potential, num_particles
        self.schedule, self.ess_threshold, self.scheme = schedule, ess_threshold, scheme
        self.intermediate, self.num_x0_samples, self.lam_inside = intermediate, num_x0_samples, lam_inside
        self.r_min, self.pick, self.correct_proposal = r_min, pick, correct_proposal
        self.generator, self.parity = generator, parity
        if parity is not None and (r_min == "first" or callable(potential) or correct_proposal):
            raise ValueError(
                'parity="official" needs a number as r_min, a potential by its name, and no correct_proposal'
            )

    @property
    def particles(self) -> int:
        """k."""
        return self.num_particles

    @property
    def resamples(self) -> bool:
        """Whether copies are made before the last step."""
        return self.num_particles > 1 and self.potential not in ("is", "bon") and self.ess_threshold > 0

    # --- what a sampling loop calls

    def init(
        self, batch: int, k: int, *, device: torch.device | str | None = None, steps: int | None = None
    ) -> FKState:
        """Equal weights, and no reward yet.

        Args:
            batch, k: systems, and particles of each.
            device: where the particles are.
            steps: the number of steps, which a schedule in fractions needs.

        Raises:
            ValueError: no ``steps`` for such a schedule; an index that is none of the steps'.
        """
        base = SteeringState.uniform(batch, k, device=device)
        start = 0.0 if isinstance(self.r_min, str) else self.r_min
        zero, none = torch.zeros_like(base.logw), torch.zeros((), dtype=torch.int64, device=base.logw.device)
        # The published code begins both with r_min, so that rewards below it have no maximum.
        seen = start if self.parity else -torch.inf if self.potential == "max" else 0.0
        return FKState(
            base.logw, base.log_z, reward=zero + start, seen=zero + seen, total=zero,
            offset=zero[:, :1] + start, nan=none, collapsed=none, when=self._indices(steps),
        )  # fmt: skip

    def step(
        self,
        state: Any,
        x_next: Tensor,
        *,
        pred: Any = None,
        x0_hat: Tensor | None = None,
        x0_sampler: Sampler | None = None,
        step: int,
        t: float = 0.0,
        t_next: float = 0.0,
        last: bool = False,
        mean: Tensor | None = None,
        std: float | None = None,
        log_ratio: Tensor | None = None,
        cond: Any = None,
        uncond: Any = None,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, FKState]:
        """Weigh and resample after a step.

        Args:
            state: an :class:`FKState`.
            x_next, pred, x0_hat, step, t, t_next, last, log_ratio, generator: as for :class:`polyak.generate.Steering`.
            mean, std, cond, uncond: not looked at.
            x0_sampler: ``(n, generator=...) -> (n, batch * k, ...)``, draws of x_0 given x_t, for ``intermediate="samples"``; left
                out, the prediction's ``draw`` (as of tokens).

        Raises:
            ValueError: a step that is not after the last one; no x0_hat, or no draws, where the reward is of these.
        """
        if step <= state.index:
            raise ValueError(f"step must increase, got {step} after {state.index}")
        state = replace(state, index=step, ancestors=None)
        if log_ratio is not None and self.correct_proposal:
            state = self._reweighted(state, log_ratio.reshape(state.logw.shape).to(state.logw))
        if not last and not self._scores(step, state):
            return x_next, state
        generator = self.generator or generator
        if last:
            reward = self.scorer(x_next, state.logw.shape[1], step=step, t=float(t_next), last=True)
        else:
            reward = self._intermediate(state, pred, x0_hat, x0_sampler, step, float(t), generator)
        finite, missing = without_nan(reward)
        state = replace(state, nan=state.nan + missing)
        if self.potential == "bon":
            ancestors = finite.argsort(dim=1, descending=True, stable=True)
            state = replace(state, reward=finite)
        elif self.parity:
            state, ancestors = self._as_published(state, reward, last, generator)
        else:
            state = self._scored(state, finite, last)
            state, ancestors = self._resampled(state, generator)
        if ancestors is None:
            return x_next, state
        rows = rows_of(ancestors)
        return x_next.index_select(0, rows), replace(state.gathered(ancestors), ancestors=rows)

    def select(self, state: Any, x: Tensor) -> Tensor:
        """The best of each system by its reward, or all; warns of rewards that were NaN and of weights that collapsed."""
        warn_of_nan(state.nan, "the weight of these particles is 0")
        if found := int(state.collapsed):
            what = "no particle of a system had a finite reward: it was neither weighed nor resampled"
            warnings.warn(f"{found} times {what}", RuntimeWarning, stacklevel=2)
        batch, k = state.logw.shape
        if self.pick == "all" or not batch:
            return x
        return x.index_select(0, self.best(state) + k * torch.arange(batch, device=x.device))

    def best(self, state: FKState) -> Tensor:
        """Which particle of each system has the largest reward, (batch,)."""
        return without_nan(state.reward)[0].argmax(1)

    # --- rewards

    def _indices(self, steps: int | None) -> frozenset[int] | None:
        schedule = self.schedule
        if isinstance(schedule, dict):
            if steps is None:
                raise ValueError(
                    "schedule in fractions needs the number of steps: init(..., steps=n), or give indices or a function"
                )
            start, stop, every = (schedule[name] for name in ("start", "stop", "every"))
            count = math.floor((stop - start) / every + 1e-9) + 1
            return frozenset(round((start + i * every) * steps) for i in range(count))
        if callable(schedule):
            return None
        if steps is not None and schedule and schedule[-1] >= steps:
            raise ValueError(f"schedule must have indices below the number of steps, {steps}, got {schedule[-1]}")
        return frozenset(schedule)

    def _scores(self, step: int, state: FKState) -> bool:
        if self.potential in ("is", "bon"):
            return False
        return step in state.when if state.when is not None else bool(self.schedule(step))  # type: ignore[operator]

    def _intermediate(
        self,
        state: FKState,
        pred: Any,
        x0_hat: Tensor | None,
        sampler: Sampler | None,
        step: int,
        t: float,
        generator: torch.Generator | None,
    ) -> Tensor:
        batch, k = state.logw.shape
        if self.intermediate == "x0":
            if x0_hat is None:
                raise ValueError('intermediate="x0" needs x0_hat, and this prediction has no x0')
            return self.scorer(x0_hat, k, step=step, t=t)
        sampler = sampler or getattr(pred, "draw", None)
        if sampler is None:
            raise ValueError('intermediate="samples" needs x0_sampler, or a prediction with draw(n, generator=...)')
        m = self.num_x0_samples
        draws = sampler(m, generator=generator)
        if draws.shape[:2] != (m, batch * k):
            raise ValueError(f"x0_sampler must return shape ({m}, {batch * k}, ...), got {tuple(draws.shape)}")
        rewards = self.scorer(draws.transpose(0, 1).flatten(0, 1), k * m, step=step, t=t).reshape(batch, k, m)
        if self.lam_inside and self.lam:
            return ((self.lam * rewards).logsumexp(2) - math.log(m)) / self.lam
        return rewards.logsumexp(2) - math.log(m)

    # --- weights

    def _scored(self, state: FKState, reward: Tensor, last: bool) -> FKState:
        """The weights with the potentials of new rewards."""
        if self.r_min == "first" and not state.scored:
            top = reward.amax(1, keepdim=True)
            state = replace(state, offset=torch.where(top.isfinite(), top, 0.0))
        seen = state.seen
        if self.potential in ("max", "sum"):
            seen = torch.maximum(seen, reward) if self.potential == "max" else seen + reward
        total = self._total(state, reward, seen, last)
        # A particle whose reward is not finite has no weight, and what it had before stays.
        alive = total.isfinite() & reward.isfinite()
        increment = torch.where(alive, total - state.total, -torch.inf)
        dead = (state.logw + increment == -torch.inf).all(1, keepdim=True)
        keep = alive & ~dead
        return replace(
            self._reweighted(state, torch.where(dead, 0.0, increment)),
            reward=torch.where(keep, reward, state.reward),
            seen=torch.where(keep, seen, state.seen),
            total=torch.where(keep, total, state.total),
            collapsed=state.collapsed + dead.sum(),
            scored=state.scored + 1,
        )

    def _total(self, state: FKState, reward: Tensor, seen: Tensor, last: bool) -> Tensor:
        """The logarithm of the product of all potentials so far."""
        if last or self.potential == "diff":
            return self.lam * (reward - state.offset)
        if callable(self.potential):
            made = self.potential(reward, state)
            if not isinstance(made, Tensor) or made.shape != reward.shape:
                raise ValueError(
                    f"potential must return log G of shape {tuple(reward.shape)}, got {checks.shown(made)}"
                )
            return state.total + made.to(reward)
        return state.total + self.lam * (reward if self.potential == "rt" else seen)

    def _reweighted(self, state: FKState, increment: Tensor) -> FKState:
        logw = state.logw + increment
        return replace(state, logw=logw, log_z=state.log_z + logw.logsumexp(1) - state.logw.logsumexp(1))

    def _resampled(self, state: FKState, generator: torch.Generator | None) -> tuple[FKState, Tensor | None]:
        if not self.ess_threshold:
            return state, None
        ancestors, did = self._ancestors(state.logw, self.scheme, self.ess_threshold, generator)
        return replace(state, logw=torch.where(did, 0.0, state.logw)), ancestors

    @staticmethod
    def _ancestors(
        logw: Tensor, scheme: str, threshold: float, generator: torch.Generator | None, *, always: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Ancestors (batch, k), its own particles where a system is not resampled, and (batch, 1) whether it was; branch-free."""
        k = logw.shape[1]
        did = (ess(logw) < threshold * k)[:, None] | always
        drawn = resample(logw, scheme=scheme, generator=generator)
        return torch.where(did, drawn, torch.arange(k, device=logw.device)), did

    def _as_published(
        self, state: FKState, reward: Tensor, last: bool, generator: torch.Generator | None
    ) -> tuple[FKState, Tensor]:
        """The published code's weights and resampling (FKD.resample); ``total`` is its product of potentials."""
        seen = reward
        if self.potential in ("max", "sum"):
            seen = torch.maximum(state.seen, reward) if self.potential == "max" else state.seen + reward
        logw = self.lam * (reward - state.reward if self.potential == "diff" else seen)
        if last and self.potential != "diff":
            logw = logw - state.total
        logw = torch.where(logw.isnan(), -torch.inf, logw.clamp(max=_CLAMP))
        dead = (logw == -torch.inf).all(1, keepdim=True)
        logw = torch.where(dead, 0.0, logw)
        threshold = 0.5 if last else self.ess_threshold
        ancestors, did = self._ancestors(logw, "multinomial", threshold, generator, always=threshold == 1)
        state = replace(
            state, reward=reward, seen=seen, total=state.total + torch.where(did, logw, 0.0), scored=state.scored + 1,
            collapsed=state.collapsed + dead.sum(), log_z=torch.full_like(state.log_z, torch.nan),
        )  # fmt: skip
        return state, ancestors
