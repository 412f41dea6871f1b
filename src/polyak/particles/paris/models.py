"""State-space models: a hidden Markov chain that is seen through noise, and what smoothers ask of it.

``x_0 ~ m_0``, ``x_{t+1} ~ q(x_t, .)``, ``y_t ~ g(x_t, .)``, with densities that autograd can go through: the parameters of
a model, which is a module, are the theta that :func:`polyak.particles.fit` learns.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from polyak.core import checks

_LOG_2PI = math.log(2 * math.pi)
# What a smoother calls; any object that has it will do, a subclass of StateSpaceModel or not.
MODEL = checks.Like(
    "a state-space model", "initial", "log_transition", "sample_transition", "log_observation", "state_shape",
    "observation_shape",
)  # fmt: skip


class Normal:
    """A law ``N(mean, S)``, drawn with an explicit generator.

    Args:
        mean: (*batch, *event).
        scale: standard deviations that broadcast with ``mean``; or, of vectors, the lower Cholesky factor of S, (d, d).
        event: how many dimensions an event has: 0, or 1 for vectors.
        full: whether ``scale`` is a Cholesky factor.
    """

    @checks.arguments(mean=checks.floating, scale=checks.floating, event=checks.Integer(0, 1), full=checks.flag)
    def __init__(self, mean: Tensor, scale: Tensor, event: int = 0, full: bool = False) -> None:
        if full and (event != 1 or scale.shape != (mean.shape[-1:] * 2)):
            raise ValueError(f"scale must be a square matrix for vectors of mean's size, got {tuple(scale.shape)}")
        self.mean, self.scale, self.event, self.full = mean, scale, event, full

    def sample(self, shape: tuple[int, ...] = (), *, generator: torch.Generator | None = None) -> Tensor:
        """Draws, (*shape, *batch, *event)."""
        mean = self.mean
        z = torch.randn((*shape, *mean.shape), dtype=mean.dtype, device=mean.device, generator=generator)
        return mean + (z @ self.scale.mT if self.full else z * self.scale)

    def log_prob(self, x: Tensor) -> Tensor:
        """``log N(x; mean, S)``, where x broadcasts with the mean; the event's dimensions are summed over."""
        if self.full:
            # Whitened before they are broadcast: N + N products of a vector and a matrix, not N^2.
            identity = torch.eye(len(self.scale), dtype=self.scale.dtype, device=self.scale.device)
            inverse = torch.linalg.solve_triangular(self.scale, identity, upper=False).mT
            square = (x @ inverse - self.mean @ inverse).square()
        else:
            square = ((x - self.mean) / self.scale).square()
        if not self.event:
            return -0.5 * square - (self.scale.log() + 0.5 * _LOG_2PI)
        return -0.5 * square.sum(-1) - self._log_volume()

    def log_peak(self) -> Tensor:
        """The largest value of ``log_prob``."""
        return -self._log_volume() if self.event else -(self.scale.log() + 0.5 * _LOG_2PI)

    def _log_volume(self) -> Tensor:
        dim = self.mean.shape[-1]
        deviations = self.scale.diagonal() if self.full else self.scale.expand(*self.scale.shape[:-1], dim)
        return deviations.log().sum(-1) + 0.5 * dim * _LOG_2PI


class StateSpaceModel(nn.Module):
    """What a model has to say. Subclass it, or write an object with these methods.

    Tensors of states have shape (*batch, *state_shape), of observations (*batch, *observation_shape); methods broadcast over
    batches and return one number for each member. ``t`` is the time of ``x``, counted from 0.

    Attributes:
        state_shape, observation_shape: of one state and one observation; () where it is a number.
    """

    state_shape: tuple[int, ...] = ()
    observation_shape: tuple[int, ...] = ()

    def initial(self) -> Any:
        """The law of x_0, with ``sample(shape, generator=)`` and ``log_prob(x)``."""
        raise NotImplementedError

    def log_transition(self, x: Tensor, x_next: Tensor, t: int) -> Tensor:
        """``log q(x_t, x_{t+1})``; ``-inf`` where x_{t+1} cannot follow."""
        raise NotImplementedError

    def sample_transition(self, x: Tensor, t: int, generator: torch.Generator | None) -> Tensor:
        """``x_{t+1} ~ q(x_t, .)``, x's shape."""
        raise NotImplementedError

    def log_observation(self, x: Tensor, y: Tensor, t: int) -> Tensor:
        """``log g(x_t, y_t)``."""
        raise NotImplementedError

    def sample_observation(self, x: Tensor, t: int, generator: torch.Generator | None) -> Tensor:
        """``y_t ~ g(x_t, .)``; :meth:`simulate` alone needs it."""
        raise NotImplementedError

    def proposal(self, x: Tensor | None, y: Tensor, t: int) -> Any:
        """The law that particles are moved by, in place of the model's own; None, the default, for the model's own.

        ``t`` is the time that is moved to: of x_0 given y_0 at ``t=0``, where ``x`` is None, and of x_t given x_{t-1} and y_t
        later. It has ``sample(shape, generator=)`` and ``log_prob(x)``; its batch is x's, and at ``t=0`` y's, (*batch, 1).
        """
        return None

    def q_max(self, t: int) -> Tensor | float | None:
        """A bound on the density ``q(x_t, x_{t+1})``, for the backward engine "rejection"; None where there is none."""
        return None

    @checks.arguments(
        steps=checks.Integer(1), batch=checks.Each(checks.Integer(0)), generator=checks.generator | None
    )  # fmt: skip
    @torch.no_grad()
    def simulate(
        self, steps: int, batch: tuple[int, ...] = (), *, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor]:
        """Draw states x (*batch, steps, *state_shape) and observations y (*batch, steps, *observation_shape)."""
        x = self.initial().sample(tuple(batch), generator=generator)
        states, seen = [x], [self.sample_observation(x, 0, generator)]
        for t in range(1, steps):
            states.append(x := self.sample_transition(x, t - 1, generator))
            seen.append(self.sample_observation(x, t, generator))
        return torch.stack(states, len(batch)), torch.stack(seen, len(batch))


class GaussianModel(StateSpaceModel):
    """A model whose transition and observation are normal: a subclass says their laws."""

    def transition(self, x: Tensor, t: int) -> Normal:
        """The law of x_{t+1} given x_t = x."""
        raise NotImplementedError

    def observation(self, x: Tensor, t: int) -> Normal:
        """The law of y_t given x_t = x."""
        raise NotImplementedError

    def log_transition(self, x: Tensor, x_next: Tensor, t: int) -> Tensor:
        return self.transition(x, t).log_prob(x_next)

    def sample_transition(self, x: Tensor, t: int, generator: torch.Generator | None) -> Tensor:
        return self.transition(x, t).sample(generator=generator)

    def log_observation(self, x: Tensor, y: Tensor, t: int) -> Tensor:
        return self.observation(x, t).log_prob(y)

    def sample_observation(self, x: Tensor, t: int, generator: torch.Generator | None) -> Tensor:
        return self.observation(x, t).sample(generator=generator)


def _raw(name: str, covariance: Tensor) -> nn.Parameter:
    """A covariance as free numbers: the logarithm of a deviation, or a Cholesky factor with a logarithmic diagonal."""
    if not covariance.ndim:
        if not covariance > 0:
            raise ValueError(f"{name} must be > 0, got {covariance.item():g}")
        return nn.Parameter(0.5 * covariance.log())
    factor, failed = torch.linalg.cholesky_ex(covariance)
    if failed or not torch.allclose(covariance, covariance.mT):
        raise ValueError(f"{name} must be a symmetric positive definite matrix, got {covariance.tolist()}")
    return nn.Parameter(factor.tril(-1) + factor.diagonal().log().diag_embed())


def _factor(raw: Tensor) -> Tensor:
    """The deviation, or the Cholesky factor."""
    return raw.exp() if not raw.ndim else raw.tril(-1) + raw.diagonal().exp().diag_embed()


class LinearGaussian(GaussianModel):
    """``x_0 ~ N(m0, P0)``, ``x_{t+1} = A x_t + N(0, Q)``, ``y_t = C x_t + N(0, R)``.

    Numbers make states and observations numbers; matrices make them vectors: A (d, d), C (k, d), Q (d, d), R (k, k), m0
    (d,), P0 (d, d). All are parameters, covariances as Cholesky factors with a logarithmic diagonal (``raw_Q``, ...).

    Args:
        A, C, Q, R, m0, P0: numbers, or tensors; C, Q, R and P0 default to the identity, m0 to zero.
        optimal: whether particles are moved by the law of x_t given x_{t-1} and y_t, in place of the transition.

    Raises:
        ValueError: shapes that do not fit, covariances that are not positive definite.

    Example:
        >>> model = LinearGaussian(0.97, Q=0.2, R=0.3)
        >>> x, y = model.simulate(60)
        >>> y.shape
        torch.Size([60])
    """

    @checks.arguments(
        A=checks.array, C=checks.array | None, Q=checks.array | None, R=checks.array | None, m0=checks.array | None,
        P0=checks.array | None, optimal=checks.flag,
    )  # fmt: skip
    def __init__(
        self,
        A: Any,
        C: Any = None,
        Q: Any = None,
        R: Any = None,
        m0: Any = None,
        P0: Any = None,
        *,
        optimal: bool = False,
    ) -> None:
        super().__init__()
        given = A if isinstance(A, Tensor) and A.is_floating_point() else torch.as_tensor(A, dtype=_default())
        if given.ndim not in (0, 2) or (given.ndim and (given.shape[0] != given.shape[1] or not given.numel())):
            raise ValueError(f"A must be a number or a square matrix, got shape {tuple(given.shape)}")
        kind: dict[str, Any] = dict(dtype=given.dtype, device=given.device)
        d = given.shape[:1]
        seen = torch.as_tensor(C, **kind) if C is not None else torch.eye(d[0], **kind) if d else torch.ones((), **kind)
        if seen.ndim != given.ndim or seen.shape[1:] != d or not seen.numel():
            raise ValueError(
                f"C must have shape {('k', *d) if d else ()}, as A has {tuple(given.shape)}, got {tuple(seen.shape)}"
            )
        k = seen.shape[:1]
        self.state_shape, self.observation_shape, self.optimal = tuple(d), tuple(k), optimal
        one = {1: torch.ones((), **kind)} if not d else {}
        self.A, self.C = nn.Parameter(given.detach().clone()), nn.Parameter(seen.detach().clone())
        for name, value, size in (("Q", Q, d), ("R", R, k), ("P0", P0, d)):
            default = one[1] if not size else torch.eye(size[0], **kind)
            made = default if value is None else torch.as_tensor(value, **kind)
            if made.shape != size * 2:
                raise ValueError(f"{name} must have shape {tuple(size * 2)}, got {tuple(made.shape)}")
            setattr(self, f"raw_{name}", _raw(name, made.detach()))
        start = torch.zeros(d, **kind) if m0 is None else torch.as_tensor(m0, **kind)
        if start.shape != d:
            raise ValueError(f"m0 must have shape {tuple(d)}, got {tuple(start.shape)}")
        self.m0 = nn.Parameter(start.detach().clone())

    @property
    def Q(self) -> Tensor:
        """The covariance of the transition."""
        return self._covariance("raw_Q")

    @property
    def R(self) -> Tensor:
        """The covariance of the observation."""
        return self._covariance("raw_R")

    @property
    def P0(self) -> Tensor:
        """The covariance of x_0."""
        return self._covariance("raw_P0")

    def initial(self) -> Normal:
        return self._law(self.m0, "raw_P0")

    def transition(self, x: Tensor, t: int) -> Normal:
        return self._law(_times(self.A, x), "raw_Q")

    def observation(self, x: Tensor, t: int) -> Normal:
        return self._law(_times(self.C, x), "raw_R")

    def proposal(self, x: Tensor | None, y: Tensor, t: int) -> Normal | None:
        if not self.optimal:
            return None
        before = self.transition(x, t - 1) if x is not None else self.initial()
        P, C, mean = self.P0 if x is None else self.Q, self.C, before.mean
        if not self.state_shape:
            gain = P * C / (C * P * C + self.R)
            return Normal(mean + gain * (y - C * mean), ((1 - gain * C) * P).sqrt())
        gain = torch.linalg.solve(C @ P @ C.mT + self.R, C @ P).mT
        eye = torch.eye(len(P), dtype=P.dtype, device=P.device)
        covariance = (eye - gain @ C) @ P @ (eye - gain @ C).mT + gain @ self.R @ gain.mT
        return Normal(mean + _times(gain, y - _times(C, mean)), torch.linalg.cholesky_ex(covariance).L, 1, True)

    def q_max(self, t: int) -> Tensor:
        zero = torch.zeros(self.state_shape, dtype=self.A.dtype, device=self.A.device)
        return self._law(zero, "raw_Q").log_peak().exp()

    def _covariance(self, raw: str) -> Tensor:
        factor = _factor(getattr(self, raw))
        return factor.square() if not factor.ndim else factor @ factor.mT

    def _law(self, mean: Tensor, raw: str) -> Normal:
        vector = bool(self.state_shape)
        return Normal(mean, _factor(getattr(self, raw)), int(vector), vector)


def _times(matrix: Tensor, x: Tensor) -> Tensor:
    return x @ matrix.mT if matrix.ndim else matrix * x


def _default() -> torch.dtype:
    return torch.get_default_dtype()


class StochasticVolatility(StateSpaceModel):
    """``x_0 ~ N(0, sigma^2 / (1 - phi^2))``, ``x_{t+1} = phi x_t + sigma N(0, 1)``, ``y_t = beta exp(x_t / 2) N(0, 1)``.

    The log-variance of a return follows a stationary autoregression (Taylor 1982). States and observations are numbers.
    Parameters are free: ``raw_phi = atanh(phi)``, ``log_sigma``, ``log_beta``.

    Args:
        phi: persistence, in (-1, 1).
        sigma: deviation of the log-variance's noise, > 0.
        beta: the return's deviation at x = 0, > 0, in the returns' unit.
        dtype: of the parameters.
    """

    @checks.arguments(
        phi=checks.Number(-1, 1, "()"), sigma=checks.positive, beta=checks.positive, dtype=checks.dtype | None
    )  # fmt: skip
    def __init__(
        self, phi: float = 0.95, sigma: float = 0.2, beta: float = 1.0, *, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.raw_phi, self.log_sigma, self.log_beta = (
            nn.Parameter(torch.tensor(value, dtype=dtype))
            for value in (math.atanh(phi), math.log(sigma), math.log(beta))
        )

    @property
    def phi(self) -> Tensor:
        return torch.tanh(self.raw_phi)

    @property
    def sigma(self) -> Tensor:
        return self.log_sigma.exp()

    @property
    def beta(self) -> Tensor:
        return self.log_beta.exp()

    def initial(self) -> Normal:
        # 1 - tanh(r)^2 = 1 / cosh(r)^2, which does not cancel.
        scale = self.sigma * torch.cosh(self.raw_phi)
        return Normal(torch.zeros_like(scale), scale)

    def log_transition(self, x: Tensor, x_next: Tensor, t: int) -> Tensor:
        return Normal(self.phi * x, self.sigma).log_prob(x_next)

    def sample_transition(self, x: Tensor, t: int, generator: torch.Generator | None) -> Tensor:
        return Normal(self.phi * x, self.sigma).sample(generator=generator)

    def log_observation(self, x: Tensor, y: Tensor, t: int) -> Tensor:
        # Written out: exp(-x) does not overflow where a deviation's square would.
        scaled = (y / self.beta).square() * (-x).exp()
        return -0.5 * (scaled + x + _LOG_2PI) - self.log_beta

    def sample_observation(self, x: Tensor, t: int, generator: torch.Generator | None) -> Tensor:
        z = torch.randn(x.shape, dtype=x.dtype, device=x.device, generator=generator)
        return self.beta * (x / 2).exp() * z

    def q_max(self, t: int) -> Tensor:
        return (-(self.log_sigma + 0.5 * _LOG_2PI)).exp()


class NeuralSSM(GaussianModel):
    """``x_0 ~ N(m, diag s_0^2)``, ``x_{t+1} = x_t + f(x_t) + N(0, diag s^2)``, ``y_t = g(x_t) + N(0, diag r^2)``, f and g networks.

    Args:
        state_dim, observation_dim: sizes of the vectors x and y.
        hidden: width of the two perceptrons of one hidden layer (tanh) that f and g are, unless they are given.
        transition, observation: modules for f, (*batch, state_dim) to the same, and g, to (*batch, observation_dim).
        transition_scale, observation_scale, initial_scale: the deviations s, r and s_0 to begin with.

    Deviations are learned as logarithms. A network sees each particle once, not each pair of them.
    """

    @checks.arguments(
        state_dim=checks.Integer(1, 2**20), observation_dim=checks.Integer(1, 2**20), hidden=checks.Integer(1, 2**20),
        transition=checks.module | None, observation=checks.module | None, transition_scale=checks.positive,
        observation_scale=checks.positive, initial_scale=checks.positive,
    )  # fmt: skip
    def __init__(
        self,
        state_dim: int,
        observation_dim: int,
        hidden: int = 32,
        *,
        transition: nn.Module | None = None,
        observation: nn.Module | None = None,
        transition_scale: float = 0.3,
        observation_scale: float = 0.3,
        initial_scale: float = 1.0,
    ) -> None:
        super().__init__()
        self.state_shape, self.observation_shape = (state_dim,), (observation_dim,)
        self.drift = transition or _perceptron(state_dim, hidden, state_dim)
        self.readout = observation or _perceptron(state_dim, hidden, observation_dim)
        like = next(self.parameters(), torch.zeros(()))
        kind: dict[str, Any] = dict(dtype=like.dtype, device=like.device)
        self.m0 = nn.Parameter(torch.zeros(state_dim, **kind))
        self.log_s = nn.Parameter(torch.full((state_dim,), math.log(transition_scale), **kind))
        self.log_r = nn.Parameter(torch.full((observation_dim,), math.log(observation_scale), **kind))
        self.log_s0 = nn.Parameter(torch.full((state_dim,), math.log(initial_scale), **kind))

    def initial(self) -> Normal:
        return Normal(self.m0, self.log_s0.exp(), 1)

    def transition(self, x: Tensor, t: int) -> Normal:
        return Normal(x + self.drift(x), self.log_s.exp(), 1)

    def observation(self, x: Tensor, t: int) -> Normal:
        return Normal(self.readout(x), self.log_r.exp(), 1)

    def q_max(self, t: int) -> Tensor:
        return Normal(self.m0, self.log_s.exp(), 1).log_peak().exp()


def _perceptron(inputs: int, hidden: int, outputs: int) -> nn.Module:
    return nn.Sequential(nn.Linear(inputs, hidden), nn.Tanh(), nn.Linear(hidden, outputs))
