"""Solving an interpolant's ODE and SDEs, forward and backward, and the likelihood of its model."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from polyak.core import checks
from polyak.core.integrators import EULER, HEUN, RK4, euler_maruyama, runge_kutta
from polyak.generate.evaluate import HALF
from polyak.generate.fields import signs, trace
from polyak.generate.interpolants.fields import EPS, Eps, Fields
from polyak.generate.process import Generators, standard_normal

TABLEAUS = {"euler": EULER, "heun": HEUN, "rk4": RK4}
EXACT = 20  # dimensions up to which the divergence is a sum of so many derivatives
_FIELDS = checks.Instance(Fields, words="a Fields")
_COMMON = dict(
    fields=_FIELDS, eps=EPS, steps=checks.Integer(1, 1_000_000), t0=checks.Number(0, 0.5, "[)"),
    generator=checks.generators | None,
)  # fmt: skip


def _grid(steps: int, t0: float, backward: bool) -> list[float]:
    """``steps + 1`` times from t0 to 1 - t0, or back; that both halves mirror each other makes t = 1/2 exact."""
    half = [t0 + (1 - 2 * t0) * i / steps for i in range(steps // 2 + 1)]
    times = half + [1 - t for t in reversed(half[: (steps + 1) // 2])]
    if steps % 2 == 0:
        times[steps // 2] = 0.5
    return times[::-1] if backward else times


def _level(eps: Eps, t: float) -> float:
    return checks.non_negative(f"eps({t:g})", eps(t)) if callable(eps) else eps


@checks.arguments(
    **_COMMON, x0=checks.Tensor(floating=True, least_ndim=1), method=checks.Choice(*TABLEAUS),
    direction=checks.Choice("forward", "backward"), finish=checks.flag,
)  # fmt: skip
@torch.no_grad()
def integrate(
    fields: Fields,
    x0: Tensor,
    eps: Eps = 0.0,
    steps: int = 100,
    method: str = "heun",
    direction: str = "forward",
    t0: float = 1e-3,
    generator: Generators | None = None,
    *,
    finish: bool = False,
) -> Tensor:
    """Carry samples of one end to the other: ``dX = (b + eps s) dt + sqrt(2 eps) dW`` on [t0, 1 - t0], in equal steps.

    Args:
        fields: what to solve.
        x0: samples at the start, shape (B, ...): of rho0, or with ``direction="backward"`` of rho1.
        eps: the noise level, at least 0: a number or a function of t. 0 is the ODE, which does not need a score.
        steps: of equal length.
        method: "euler" (for eps > 0 Euler-Maruyama, weak order 1), "heun" (order 2; for eps > 0 the noise is added first, and both
            stages are evaluated at the end of the step, weak order 1), or "rk4" (order 4, for the ODE alone).
        direction: backward is ``dX = -(b - eps s) dt' + sqrt(2 eps) dW`` in t' = 1 - t.
        t0: how far from both ends to stay; where fields are singular at the ends it must be > 0.
        generator: of the noise, on x0's device.
        finish: end with the posterior mean of the far end, ``fields.x1`` (backward ``fields.x0``), at the last time.

    Returns:
        Samples at the other end, in x0's shape and dtype (half precision is solved in float32).

    Raises:
        ValueError: options that do not go together; on the CPU, a state that is not finite, with its step and time.
    """
    if method == "rk4" and not (isinstance(eps, (int, float)) and eps == 0):
        raise ValueError("method must be 'euler' or 'heun' for eps > 0, got 'rk4'")
    sign = -1 if direction == "backward" else 1
    kept, x = x0.dtype, x0.float() if x0.dtype in HALF else x0
    inner = _lowered(fields, kept) if kept in HALF else fields
    times = _grid(steps, t0, sign < 0)
    for step, (s, t) in enumerate(pairwise(times), 1):
        level = _level(eps, s)
        if level == 0:
            x = runge_kutta(TABLEAUS[method], inner.drift, x, s, t - s)
        elif method == "euler":
            x = _maruyama(lambda y, u, e=sign * level: inner.drift(y, u, e), x, s, t - s, level, generator)
        else:
            x = x + math.sqrt(2 * level * abs(t - s)) * _noise(x, generator)
            x = runge_kutta(HEUN, lambda y, _, t=t, e=sign * level: inner.drift(y, t, e), x, s, t - s)
        _look(x, step, t)
    if finish:
        x = inner.x1(x, times[-1]) if sign > 0 else inner.x0(x, times[-1])
    return x.to(kept)


def _look(x: Tensor, step: int, t: float) -> None:
    """ValueError where the state is not finite; on the CPU, as elsewhere a look would wait for the device."""
    if x.device.type != "cpu" or isinstance(x, FakeTensor) or math.isfinite(x.sum().item()):
        return
    if not bool(x.isfinite().all()):
        raise ValueError(f"the state is not finite after step {step}, at t={t:.6g}: the fields are not, or it diverged")


def _noise(x: Tensor, generator: Generators | None) -> Tensor:
    return standard_normal(x.shape, generator=generator, dtype=x.dtype, device=x.device)


def _maruyama(drift: Any, x: Tensor, t: float, dt: float, level: float, generator: Generators | None) -> Tensor:
    spread = torch.full((), math.sqrt(2 * level), dtype=x.dtype, device=x.device)
    return euler_maruyama(drift, lambda y, u: spread, x, t, dt, noise=_noise(x, generator))


def _lowered(fields: Fields, dtype: torch.dtype) -> Any:
    """The fields of a network in half precision, for a state in float32."""

    class Lowered:
        def drift(self, x: Tensor, t: float, eps: float = 0.0) -> Tensor:
            return fields.drift(x.to(dtype), t, eps).float()

        def s(self, x: Tensor, t: float) -> Tensor:
            return fields.s(x.to(dtype), t).float()

        def x0(self, x: Tensor, t: float) -> Tensor:
            return fields.x0(x.to(dtype), t).float()

        def x1(self, x: Tensor, t: float) -> Tensor:
            return fields.x1(x.to(dtype), t).float()

    return Lowered()


@checks.arguments(
    **_COMMON, x=checks.Tensor(floating=True, least_ndim=2), log_prob0=checks.Function("a function of x", 1) | None,
    method=checks.Choice(*TABLEAUS), probes=checks.Integer(1, 10_000) | None, samples=checks.Integer(1, 10**6),
)  # fmt: skip
@torch.no_grad()
def log_likelihood(
    fields: Fields,
    x: Tensor,
    log_prob0: Callable[[Tensor], Tensor] | None = None,
    *,
    eps: Eps = 0.0,
    steps: int = 100,
    method: str = "heun",
    t0: float = 1e-3,
    probes: int | None = None,
    samples: int = 1,
    generator: Generators | None = None,
) -> Tensor:
    """``log rho1(x)`` of the model.

    With eps = 0, that of the ODE: ``log rho0(X_0) - int_0^1 div b(X_t, t) dt`` along the path that ends at x. With eps > 0 the
    estimate ``E[log rho0(X_0) - int div b_F + eps |s|^2 dt]`` over backward paths from x, with ``b_F = b + eps s``, which is
    ``log rho1(x)`` for exact fields.

    Args:
        fields: of the model.
        x: points, shape (B, ...).
        log_prob0: ``log rho0``, of points to (B,); of a one-sided path N(0, I) where it is left out.
        eps, steps, t0: as of :func:`integrate`. ``method`` is that of the ODE; the SDE's is Euler-Maruyama.
        probes: how many random signs (Hutchinson) estimate the divergence, each one derivative. Default: the exact
            sum of derivatives up to 20 dimensions, then 1.
        samples: backward paths for each point, for eps > 0.
        generator: of all that is drawn; a list has one for each path, ``samples`` for the first point, and so on.

    Returns:
        Shape (B,), in nats, in x's dtype; for x in half precision in float32, in which it is solved.

    Raises:
        ValueError: no log_prob0, where the source is not N(0, I); on the CPU, a state that is not finite.
    """
    rho0 = log_prob0
    if rho0 is None:
        if not fields.interpolant.one_sided:
            raise ValueError("log_prob0 must be given: the source is not N(0, I) by itself")
        rho0 = _standard_normal
    inner: Any = fields
    if x.dtype in HALF:
        x, inner = x.float(), _lowered(fields, x.dtype)
    size, event = math.prod(x.shape[1:]), x.shape[1:]
    random = probes is not None or size > EXACT
    stochastic = not (isinstance(eps, (int, float)) and eps == 0)
    rows = len(x) * (samples if stochastic else 1)

    def along() -> Tensor | None:
        return signs(x.new_empty(rows, *event), probes or 1, generator) if random else None

    times = _grid(steps, t0, backward=True)
    if not stochastic:
        fixed = along()

        def slopes(state: Tensor, t: Any) -> Tensor:
            point = state[:, :-1].reshape(rows, *event)
            b, divergence = trace(lambda y: inner.drift(y, t), point, fixed)
            return torch.cat([b.flatten(1), divergence[:, None]], 1)

        state = torch.cat([x.flatten(1), x.new_zeros(rows, 1)], 1)
        for step, (s, t) in enumerate(pairwise(times), 1):
            state = runge_kutta(TABLEAUS[method], slopes, state, s, t - s)
            _look(state, step, t)
        return _begun(rho0, state[:, :-1].reshape(x.shape)) + state[:, -1]
    y, total = x.repeat_interleave(samples, 0), x.new_zeros(rows)
    for step, (s, t) in enumerate(pairwise(times), 1):
        level = _level(eps, s)
        drift, divergence = trace(lambda p, s=s, e=level: inner.drift(p, s, e), y, along())
        if level:
            score = inner.s(y, s)
            divergence = divergence + level * score.square().flatten(1).sum(1)
            drift = drift - 2 * level * score  # b - eps s
        total = total - abs(t - s) * divergence
        y = _maruyama(lambda p, u, known=drift: known, y, s, t - s, level, generator)
        _look(y, step, t)
    return (_begun(rho0, y) + total).reshape(len(x), samples).mean(1)


def _begun(log_prob0: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    value = log_prob0(x)
    if value.shape != x.shape[:1]:
        raise ValueError(f"log_prob0 must return shape ({len(x)},), one for each row, got {tuple(value.shape)}")
    return value


def _standard_normal(x: Tensor) -> Tensor:
    flat = x.flatten(1)
    return -flat.square().sum(1) / 2 - flat.shape[1] / 2 * math.log(2 * math.pi)


@checks.arguments(excess_b=checks.non_negative, excess_s=checks.positive)
def optimal_eps(excess_b: float, excess_s: float) -> float:
    """The noise level with the least bound on ``KL(rho1 || model)``: ``sqrt(excess_b / excess_s)``.

    For losses L as of :func:`interpolant_loss` and their excess dL over the least that any network reaches,
    ``KL <= dL_b / eps + eps dL_s``. There is no such bound for the ODE.
    """
    return math.sqrt(excess_b / excess_s)
