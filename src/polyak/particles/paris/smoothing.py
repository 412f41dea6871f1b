"""PaRIS: smoothed additive functionals on the way, in memory that does not grow (Olsson and Westerborn, Bernoulli 2017)."""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch
from torch import Tensor

from polyak.core import checks
from polyak.core.particles import SCHEMES, Cloud
from polyak.particles.paris.backward import ENGINES, categorical, draw, picked, rows
from polyak.particles.paris.filtering import Filter, Watch, observation
from polyak.particles.paris.functional import FUNCTIONAL, prepared
from polyak.particles.paris.models import MODEL

DRAWS = checks.Integer(1) | checks.Choice(math.inf)
ENGINE = checks.Choice(*ENGINES)


class PaRIS:
    """Particle-based, rapid incremental smoother: ``E[h_n | y_{0:n}]`` for an additive functional, observation by observation.

    Each of N particles carries a statistic tau, an estimate of ``E[h_t | x_t, y_{0:t}]``. After a step of the particle filter

        tau_{t+1}^i = 1/M sum_j [tau_t^J + h_t(x_t^J, x_{t+1}^i)],     J = J^{i,j} ~ w_t^l q(x_t^l, x_{t+1}^i)  over l,

    and the estimate is ``sum_i W^i tau^i``. With M >= 2 its variance grows like n, as FFBSi's does, where that of paths through
    the filter's ancestors grows like n^2; its bias is O(n / N). ``m=math.inf`` takes the exact mean over l (forward-only
    FFBSm).

    Args:
        model: a :class:`StateSpaceModel`.
        functional: h, a function ``(x, x_next, t)`` of two tensors of states, both (*pairs, *state_shape), which returns
            (*pairs, *event); or a :class:`FisherScore`.
        n: particles, N.
        m: backward draws a particle, M; 1 is degenerate, and warned of.
        backward: "dense", "rejection" (needs the model's ``q_max``), "mcmc" or "ancestor", the path through the ancestors.
        scheme: of resampling, see :func:`polyak.core.particles.resample`.
        ess_threshold: resample where the effective sample size is below this share of N; 1 for always.
        generator: of all draws, on the model's device.

    A batch, ``y_t`` of shape (*batch, *observation_shape), is that of independent series, or of independent runs for one. An
    observation with a NaN in it is missing: it does not count. On an accelerator nothing is waited for in :meth:`update`; what
    went wrong is said by :meth:`estimate`.

    Example:
        >>> smoother = PaRIS(model, lambda x, x_next, t: x * x_next, n=256)
        >>> cloud = smoother.init(y[0])
        >>> for y_t in y[1:]:
        ...     cloud, tau = smoother.update(y_t)
        >>> smoother.estimate()  # of E[sum_t x_t x_{t+1} | y]; the evidence is in cloud.log_z

    Raises:
        ValueError: arguments that do not fit together; no particle has a weight (t and y_t are named); the backward kernel is
            undefined (t is named).
    """

    @checks.arguments(
        model=MODEL, functional=FUNCTIONAL, n=checks.Integer(1, 2**40), m=DRAWS, backward=ENGINE,
        scheme=checks.Choice(*SCHEMES), ess_threshold=checks.fraction, generator=checks.generator | None,
    )  # fmt: skip
    def __init__(
        self,
        model: Any,
        functional: Any,
        n: int = 1024,
        m: int | float = 2,
        backward: str = "dense",
        scheme: str = "systematic",
        ess_threshold: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> None:
        m = settled(m, backward, model)
        self.model, self.functional, self.n, self.m, self.backward = model, functional, n, m, backward
        self.scheme, self.ess_threshold, self.generator = scheme, ess_threshold, generator
        self._filter = Filter(model, n, scheme, ess_threshold, generator)
        self._h = prepared(functional, model)
        self.tau: Tensor

    @property
    def t(self) -> int:
        """The time of the last observation; -1 where there was none."""
        return self._filter.t

    @property
    def cloud(self) -> Cloud:
        """The weighted particles."""
        return self._filter.cloud

    @torch.no_grad()
    def init(self, y0: Tensor) -> Cloud:
        """Begin with y_0, (*batch, *observation_shape): the weighted particles (*batch, N, *state_shape)."""
        y0 = observation("y0", y0, self.model)
        self._begin(y0)
        return self.cloud

    @torch.no_grad()
    def update(self, y_t: Tensor) -> tuple[Cloud, Tensor]:
        """Go on with the next observation: the particles, and their statistics (*batch, N, *event)."""
        if self.t < 0:
            raise ValueError("update goes on from an observation: call init(y0) first")
        self._advance(observation("y_t", y_t, self.model, self.cloud.logw.shape[:-1]))
        return self.cloud, self.tau

    def estimate(self) -> Tensor:
        """``sum_i W^i tau^i``, (*batch, *event): of the functional up to now, given all that was seen."""
        if self.t < 0:
            raise ValueError("there is nothing to estimate: call init(y0) first")
        self._filter.watch.look()
        return self._mean()

    def state_dict(self) -> dict[str, Any]:
        """All that the run is, with the generator's state: a run that loads it goes on as this one does."""
        cloud = {name: getattr(self.cloud, name) for name in ("x", "logw", "log_z")} if self.t >= 0 else None
        tau = self.tau if self.t >= 0 else None
        drawn = None if self.generator is None else self.generator.get_state()
        return {"t": self.t, "cloud": cloud, "tau": tau, "generator": drawn}

    @checks.arguments(state=checks.state_dict)
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a :meth:`state_dict`."""
        if missing := {"t", "cloud", "tau", "generator"} - {*state.keys()}:
            raise ValueError(f"state must be what state_dict() returns, and lacks {', '.join(sorted(missing))}")
        if state["cloud"] is not None:
            cloud = Cloud(**state["cloud"])
            self._filter.cloud, self.tau = cloud, state["tau"]
            self._filter.watch = Watch(tuple(cloud.logw.shape[:-1]), cloud.logw.device)
        if self.generator is not None and state["generator"] is not None:
            self.generator.set_state(state["generator"])
        self._filter.t = state["t"]

    def _mean(self) -> Tensor:
        w = self.cloud.logw.softmax(-1)
        return (w.reshape(*w.shape, *[1] * (self.tau.ndim - w.ndim)) * self.tau).sum(w.ndim - 1)

    def _begin(self, y: Tensor, frozen: Tensor | None = None) -> None:
        self._filter.begin(y, frozen)
        logw = self.cloud.logw
        self.tau = self._h.first(self.cloud.x, y.unsqueeze(logw.ndim - 1)).to(logw.dtype)

    def _advance(self, y: Tensor, frozen: Tensor | None = None, *, traced: bool = False) -> Tensor | None:
        """One step of particles and statistics. Returns the backward draws, (*batch, N, draws), where there are or must be any."""
        t = self.t
        before, ancestors = self._filter.move(y, frozen)
        return self._smooth(before, self.cloud.x, ancestors, y.unsqueeze(before.logw.ndim - 1), t, traced)

    def _smooth(self, before: Cloud, x: Tensor, ancestors: Tensor, seen: Tensor, t: int, traced: bool) -> Tensor | None:
        """The statistics at t + 1, from the particles of t with the weights that they had there."""
        model, logw = self.model, before.logw
        dim = logw.ndim - 1
        tau, pair = self.tau, seen.unsqueeze(dim)
        if self.m != math.inf:
            drawn = (model, before.x, logw, x, ancestors, t, int(self.m), self.generator)
            j, undefined = draw(self.backward, *drawn)
            self._filter.watch.note("undefined", undefined, t, seen)
            h = self._h.step(picked(before.x, j, dim), x.unsqueeze(dim + 1), pair, t)
            self.tau = (picked(tau, j, dim) + h).mean(dim + 1)
            return j
        made, first = [], []
        for part, logits in rows(model, before.x, logw, x, t):
            undefined = ~logits.amax(-1).isfinite()
            self._filter.watch.note("undefined", undefined.any(-1), t, seen)
            p = torch.where(undefined[..., None], 0.0, logits).softmax(-1)
            following = x.narrow(dim, part.start, part.stop - part.start).unsqueeze(dim + 1)
            h = self._h.step(before.x.unsqueeze(dim), following, pair, t)
            each = tau.unsqueeze(dim) + h
            made.append((p.reshape(*p.shape, *[1] * (each.ndim - p.ndim)) * each).sum(dim + 1))
            if traced:
                first.append(categorical(logits, 1, self.generator)[0])
        self.tau = torch.cat(made, dim)
        return torch.cat(first, dim) if traced else None


def settled(m: int | float, backward: str, model: Any) -> int | float:
    """M, once it is known to suit the engine and the model."""
    bound = getattr(model, "q_max", None)
    if backward == "rejection" and (bound is None or bound(0) is None):
        raise ValueError(
            "backward=\"rejection\" needs the model's q_max, a bound on the transition's density; it is None"
        )
    if m == math.inf and backward != "dense":
        raise ValueError(f'm=inf sums over all particles, which backward="dense" alone does, got {backward!r}')
    if backward == "ancestor":
        return 1  # all draws would be the same
    if m == 1:
        warnings.warn(
            "m=1 backward draw: statistics degenerate as those of ancestors' paths do; use m=2",
            UserWarning,
            stacklevel=3,
        )
    return m
