"""DPM-Solver and DPM-Solver++: exponential integrators for the diffusion ODE in half-logSNR time.

Lu et al., "DPM-Solver: A Fast ODE Solver for Diffusion Probabilistic Model Sampling in Around 10 Steps", NeurIPS 2022, arXiv
2206.00927; "DPM-Solver++", arXiv 2211.01095. With lam = log(alpha / sigma), a step s -> t of length h = lam_t - lam_s is exactly

    eps form:   x_t = (alpha_t / alpha_s) x_s - alpha_t  int_{lam_s}^{lam_t} exp(-lam) eps(x_lam, lam) dlam
    data form:  x_t = (sigma_t / sigma_s) x_s + sigma_t  int_{lam_s}^{lam_t} exp(+lam)  x0(x_lam, lam) dlam

and a method of order k replaces the network's value m (eps or x0) in the integral by a polynomial of degree k - 1. With
z = h (eps) or -h (data), rho the fraction of the step, ``m ~ m_0 + rho D1 + rho^2 D2 / 2`` gives, for both forms,

    x_t = A x_s - B z [phi_1(z) m_0 + phi_2(z) D1 + phi_3(z) D2],     phi_k(z) = sum_j z^j / (j + k)!

with A = alpha_t / alpha_s, B = sigma_t (eps) or A = sigma_t / sigma_s, B = alpha_t (data). Singlestep methods take m at nodes
rho > 0 within the step, multistep methods at nodes rho < 0, the steps before: one formula (:func:`dpm_step`) serves both.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from polyak.core import checks
from polyak.generate.prediction import Prediction
from polyak.generate.process import Process, standard_normal
from polyak.generate.sampling import invert
from polyak.generate.solver import Query, Run, Solver, Step, combine, step_count

__all__ = ["DPMSolver", "dpm_step", "invert"]

Form = Literal["eps", "data"]
Kind = Literal["midpoint", "taylor"]
OFFICIAL_FINAL = 10  # lower_order_final=True acts below this number of steps, as in the official code


def _z_phi(z: float, count: int) -> list[float]:
    """``[z phi_1(z), ..., z phi_count(z)]``, each to full relative precision; z may be infinite for count 1."""
    if abs(z) >= 1:
        values = [math.expm1(z)]
        for k in range(1, count):
            values.append(values[-1] / z - 1 / math.factorial(k))
        return values
    # The differences above lose all digits for small z: sum the series.
    return [math.fsum(z ** (j + 1) / math.factorial(j + k) for j in range(20)) for k in range(1, count + 1)]


def _node_weights(z: float, r: Sequence[float], kind: Kind, parity: str | None) -> list[float]:
    """The weight of m at the start and at the nodes r, in ``x_t = A x - B sum_i w_i m_i``."""
    if not r:
        return _z_phi(z, 1)
    if len(r) == 1:
        first, second = _z_phi(z, 2)
        slope = (first / 2 if kind == "midpoint" else second) / r[0]
        return [first - slope, slope]
    first, second, third = _z_phi(z, 3)
    r1, r2 = r
    if kind == "midpoint" and r2 > 0:
        return [first - second / r2, 0.0, second / r2]
    # D1 = (r2 D10 - r1 D11) / (r2 - r1) and D2 = 2 (D11 - D10) / (r2 - r1), with D1i = (m_(i+1) - m_0) / r_(i+1).
    curvature = third if parity == "official" and r2 < 0 else 2 * third
    w1 = (r2 * second - curvature) / ((r2 - r1) * r1)
    w2 = (curvature - r1 * second) / ((r2 - r1) * r2)
    return [first - w1 - w2, w1, w2]


def _transition(process: Process, s: float, t: float, form: Form, sde: bool) -> tuple[float, float, float, float]:
    """(A, B, z, std): ``x_t = A x_s - B sum_i w_i(z) m_i + std N(0, I)``."""
    la_s, ls_s, la_t, ls_t = process.log_alpha(s), process.log_sigma(s), process.log_alpha(t), process.log_sigma(t)
    h = (la_t - ls_t) - (la_s - ls_s)
    if form == "eps":
        scale, std = (2.0, math.sqrt(math.expm1(2 * h))) if sde else (1.0, 0.0)
        return math.exp(la_t - la_s), scale * math.exp(ls_t), h, std * math.exp(ls_t)
    if sde:
        return math.exp(ls_t - ls_s - h), math.exp(la_t), -2 * h, math.exp(ls_t) * math.sqrt(-math.expm1(-2 * h))
    return math.exp(ls_t - ls_s), math.exp(la_t), -h, 0.0


def dpm_step(
    x: Tensor,
    s: float,
    t: float,
    values: Sequence[Tensor],
    process: Process,
    *,
    r: Sequence[float] = (),
    form: Form = "eps",
    kind: Kind = "midpoint",
    sde: bool = False,
    noise: Tensor | None = None,
    parity: Literal["official"] | None = None,
) -> Tensor:
    """One update s -> t of order ``len(values)``; t may be on either side of s.

    Args:
        x: the state at s.
        s, t: times of ``process``.
        values: 1 to 3 network values of x's shape, in the dialect of ``form``: first that at s, then those at the nodes ``r``.
        r: the nodes of the further values, ``(lam - lam_s) / (lam_t - lam_s)``: positive for points within the step,
            negative for earlier steps.
        form: "eps" (DPM-Solver) or "data" (DPM-Solver++).
        kind: "taylor": the integral of the interpolating polynomial. "midpoint", the papers' default: order 2 replaces
            phi_2 by phi_1 / 2; order 3 with nodes within the step uses the farther one only.
        sde: the reverse SDE in place of the ODE (DPM-Solver++, appendix).
        noise: standard normal of x's shape for the SDE; without it the mean of the transition is returned.
        parity: "official" halves the second-difference term of multistep order 3, as the official code (and diffusers) do;
            the method is then of second order only (ours of third), though often better at 10 to 20 steps.

    Returns:
        The state at t, a new tensor of x's shape and dtype.

    Raises:
        ValueError: numbers of values and nodes that do not fit; lam infinite at s or t where only a first-order step in data
            form is defined.
    """
    if not 1 <= len(values) <= 3 or len(r) != len(values) - 1:
        raise ValueError(f"values must be 1 to 3, and r one fewer, got {len(values)} and {len(r)}")
    mean, std = _mean_and_std(x, s, t, values, process, r, form, kind, sde, parity)
    return mean if noise is None or not std else torch.add(mean, noise, alpha=std)


def _mean_and_std(
    x: Tensor,
    s: float,
    t: float,
    values: Sequence[Tensor],
    process: Process,
    r: Sequence[float],
    form: Form,
    kind: Kind,
    sde: bool,
    parity: str | None,
) -> tuple[Tensor, float]:
    keep, scale, z, std = _transition(process, s, t, form, sde)
    if math.isinf(z) and (form == "eps" or r):
        raise ValueError(
            f"lam is infinite at t={s if math.isinf(process.lam(s)) else t:g}: only a first-order step in data form "
            'reaches it; use form="data" and method="multistep", or end before it'
        )
    weights = _node_weights(z, r, kind, parity)
    terms = ((-scale * w, m) for w, m in zip(weights, values, strict=True) if w)
    return combine((keep, x), *terms), std


@dataclass(frozen=True, repr=False)
class DPMSolver(Solver):
    """DPM-Solver (``form="eps"``) and DPM-Solver++ (``form="data"``), orders 1 to 3.

    Usual choices: for unconditional models or weak guidance ``DPMSolver()``, order 3, "fast", logSNR grid; for strong
    guidance ``DPMSolver(order=2, form="data", method="multistep", grid="time")``.

    Args:
        order: 1 to 3. Order 1 is DDIM.
        form: "eps" or "data": which prediction is interpolated.
        method: "fast": singlestep steps of ``order``, the last ones lower, so that any number of evaluations is met exactly
            (DPM-Solver-fast). "singlestep": ``nfe // order`` steps, all of that order. "multistep": one evaluation a step,
            the earlier ones reused. "adaptive": step sizes by error control (DPM-Solver-12 for order 2, -23 for order 3).
        kind: "midpoint" or "taylor", see :func:`dpm_step`.
        grid: kind of time grid, unless :func:`sample` is told otherwise.
        lower_order_final: multistep only: end with lower orders where there are fewer than 10 steps (or than the number
            given). A step onto clean data is of order 1 in any case.
        denoise_to_zero: spend one more evaluation at the end and return x0 there. It counts in ``nfe``, not in ``steps``.
        atol, rtol, theta, h_init: adaptive: tolerances (0.0078 = 2/256 for data in [-1, 1]), safety factor, first step in
            lam. The error is the largest over the batch, hence a sample's steps depend on its batch.
        start: multistep: "lower": the first steps are of lower order, as in the paper; the first one leaves an error of
            second order, small where the prediction hardly changes at first. "singlestep": they are singlestep steps of full
            order, at ``(order - 1)^2`` further evaluations.
        sde: solve the reverse SDE (multistep only).
        parity: "official", see :func:`dpm_step`.
        max_nfe: adaptive: give up after this many evaluations.

    In ``times(steps=n)`` and in :func:`sample`, n is the number of evaluations of "fast" and "singlestep" (as in the official
    code and in diffusers), and of steps of "multistep".

    Raises:
        ValueError: arguments out of range or without meaning together; a budget that does not admit the order.
        RuntimeError: the adaptive method makes no progress; it names t and the error.
    """

    order: int = 3
    form: Form = "eps"
    method: Literal["fast", "singlestep", "multistep", "adaptive"] = "fast"
    kind: Kind = "midpoint"
    grid: str = "logsnr"
    lower_order_final: bool | int = True
    denoise_to_zero: bool = False
    atol: float = 0.0078
    rtol: float = 0.05
    theta: float = 0.9
    h_init: float = 0.05
    start: Literal["lower", "singlestep"] = "lower"
    sde: bool = False
    parity: Literal["official"] | None = None
    max_nfe: int = 10_000

    def __post_init__(self) -> None:
        checks.integer("order", self.order, least=1, most=3)
        checks.one_of("form", self.form, ("eps", "data"))
        checks.one_of("method", self.method, ("fast", "singlestep", "multistep", "adaptive"))
        checks.one_of("kind", self.kind, ("midpoint", "taylor"))
        checks.one_of("start", self.start, ("lower", "singlestep"))
        checks.one_of("parity", self.parity, (None, "official"))
        checks.positive("atol", self.atol)
        checks.positive("rtol", self.rtol)
        checks.between("theta", self.theta, 0.0, 1.0, ends="()")
        checks.positive("h_init", self.h_init)
        checks.integer("max_nfe", self.max_nfe, least=1)
        checks.integer("lower_order_final", int(self.lower_order_final), least=0)
        if self.method == "adaptive" and self.order == 1:
            raise ValueError('order must be 2 or 3 for method="adaptive", got 1')
        if self.sde and self.method != "multistep":
            raise ValueError(f'sde needs method="multistep", got {self.method!r}')
        if self.start == "singlestep" and (self.sde or self.method != "multistep"):
            raise ValueError('start="singlestep" needs method="multistep" without sde')

    @property
    def stages(self) -> int:
        return 1 if self.method == "multistep" else self.order

    @property
    def history(self) -> int:
        return self.order - 1 if self.method == "multistep" else 0

    @property
    def stochastic(self) -> bool:
        return self.sde

    @property
    def needs_gaussian(self) -> bool:
        return self.sde

    @property
    def no_corrector(self) -> str:
        if self.method == "adaptive":
            return "adaptive sampling cannot call a corrector, its error estimate would be meaningless"
        return "" if self.form == "data" else 'form="eps" does not see x0; use form="data"'

    @property
    def adaptive(self) -> bool:
        return self.method == "adaptive"

    @property
    def reaches_zero(self) -> bool:
        return self.form == "data" and self.method == "multistep" and not self.denoise_to_zero

    # --- planning

    def times(
        self, process: Process, *, steps: int | None = None, nfe: int | None = None, grid: str | None = None
    ) -> Tensor:
        """All points of evaluation and the end: n evaluations are n + 1 times; of "adaptive", the two ends."""
        if self.adaptive:
            if steps is not None or nfe is not None or grid is not None:
                raise ValueError("adaptive finds its own steps; leave out steps, nfe and grid")
            return torch.tensor([process.t_max, process.t_min], dtype=torch.float64)
        n = step_count(steps, nfe, 1) - (self._extra if nfe is not None else 0)
        kind = grid or self.grid
        if n < (self.order if self.method == "multistep" else 1):
            count = f"steps={steps}" if nfe is None else f"nfe={nfe}"
            raise ValueError(f"{count} is too few for order {self.order} with start={self.start!r}")
        if self.method == "multistep":
            return process.grid(n, kind)
        orders = self._orders(n)
        if not orders:
            raise ValueError(f"{'steps' if nfe is None else 'nfe'} must be at least order={self.order}, got {n}")
        if kind != "logsnr":
            return process.grid(sum(orders), kind)
        ends = process.grid(len(orders), kind).tolist()
        inner = [process.grid(k, kind, start=s, end=t)[:-1] for k, s, t in zip(orders, ends, ends[1:], strict=False)]
        return torch.cat([*inner, torch.tensor(ends[-1:], dtype=torch.float64)])

    def plan(self, nfe: int, process: Process, grid: str | None = None) -> list[tuple[int, float, float]]:
        """The steps that a budget buys, ``[(order, t_from, t_to), ...]``."""
        if self.adaptive:
            raise ValueError("adaptive finds its own steps; there is no plan")
        times = self.times(process, nfe=nfe, grid=grid).tolist()
        if self.method == "multistep":
            return list(zip(self._multistep_orders(len(times) - 1), times, times[1:], strict=False))
        steps, i = [], 0
        for k in self._orders(len(times) - 1):
            steps.append((k, times[i], times[i + k]))
            i += k
        return steps

    @property
    def _extra(self) -> int:
        """Evaluations beside those at the times: the singlestep start, the final denoising."""
        return (self.order - 1) ** 2 * (self.start == "singlestep") + self.denoise_to_zero

    def _orders(self, n: int) -> list[int]:
        """Orders of the steps that spend at most n evaluations ("singlestep"), or exactly n ("fast")."""
        full, rest = divmod(n, self.order)
        if self.method == "singlestep" or self.order == 1:
            return [self.order] * full
        if self.order == 3 and rest == 0:
            return [3] * (full - 1) + [2, 1]
        return [self.order] * full + [rest] * (rest > 0)

    def _multistep_orders(self, n: int) -> list[int]:
        threshold = OFFICIAL_FINAL if self.lower_order_final is True else int(self.lower_order_final)
        order = self.order
        bootstrapped = self.start == "singlestep"
        orders = [order if bootstrapped else min(order, i + 1) for i in range(n)]
        return [min(k, n - i) for i, k in enumerate(orders)] if n < threshold else orders

    # --- running

    def run(
        self, x: Tensor, times: Sequence[float], process: Process, *, generator: torch.Generator | None = None
    ) -> Run:
        if self.denoise_to_zero and times[-1] > times[0]:
            raise ValueError("denoise_to_zero ends at the data; leave it out to run towards the noise")
        if self.method == "multistep":
            x = yield from self._run_multistep(x, times, process, generator)
        elif self.method == "adaptive":
            x = yield from self._run_adaptive(x, times, process)
        else:
            x = yield from self._run_singlestep(x, times, process)
        if self.denoise_to_zero:
            p: Prediction = yield Query(x, times[-1])
            x = p.x0
        return x

    def _value(self, prediction: Prediction) -> Tensor:
        return prediction.eps if self.form == "eps" else prediction.x0

    def _step(
        self, x: Tensor, s: float, t: float, values: Sequence[Tensor], r: Sequence[float], process: Process, kind: Kind
    ) -> Tensor:
        return dpm_step(x, s, t, values, process, r=r, form=self.form, kind=kind, parity=self.parity)

    def _stages(
        self, x: Tensor, s: float, t: float, value: Tensor, inner: Sequence[float], process: Process
    ) -> Generator[Query, Any, tuple[list[Tensor], list[float]]]:
        """The values at s and at the inner times of a singlestep step, and the nodes r of the latter."""
        lam = process.lam(s)
        h = process.lam(t) - lam
        r = [(process.lam(q) - lam) / h for q in inner]
        values = [value]
        for j, q in enumerate(inner):
            x_q = self._step(x, s, q, values, [node / r[j] for node in r[:j]], process, "taylor")
            p: Prediction = yield Query(x_q, q, first=False)
            values.append(self._value(p))
        return values, r

    def _run_singlestep(self, x: Tensor, times: Sequence[float], process: Process) -> Run:
        orders = self._orders(len(times) - 1)
        if sum(orders) != len(times) - 1:
            raise ValueError(
                f'method="singlestep" of order {self.order} needs a multiple of {self.order} intervals, got {len(times) - 1}'
            )
        i = 0
        for index, order in enumerate(orders):
            s, *inner, t = times[i : i + order + 1]
            i += order
            p: Prediction = yield Query(x, s)
            x = p.x
            values, r = yield from self._stages(x, s, t, self._value(p), inner, process)
            x = self._step(x, s, t, values, r, process, self.kind)
            change = yield Step(x, s, t, index, index == len(orders) - 1)
            x = x if change is None else change.x
        return x

    def _run_multistep(
        self, x: Tensor, times: Sequence[float], process: Process, generator: torch.Generator | None
    ) -> Run:
        n = len(times) - 1
        orders = self._multistep_orders(n)
        past: list[tuple[float, Tensor]] = []  # (lam, value), newest first
        for i, (s, t) in enumerate(itertools.pairwise(times)):
            p: Prediction = yield Query(x, s)
            x, value = p.x, self._value(p)
            lam, lam_t = process.lam(s), process.lam(t)
            std = 0.0
            if self.start == "singlestep" and i < self.order - 1 and orders[i] > 1:
                inner = [process.t_of_lam(lam + (lam_t - lam) * j / orders[i]) for j in range(1, orders[i])]
                values, r = yield from self._stages(x, s, t, value, inner, process)
                x = mean = self._step(x, s, t, values, r, process, self.kind)
            else:
                h = lam_t - lam
                usable = [(node, m) for node, m in past if math.isfinite(node) and math.isfinite(h)][: orders[i] - 1]
                r = [(node - lam) / h for node, _ in usable]
                values = [value, *(m for _, m in usable)]
                mean, std = _mean_and_std(x, s, t, values, process, r, self.form, self.kind, self.sde, self.parity)
                x = mean
                if std:
                    z = standard_normal(x.shape, generator=generator, dtype=x.dtype, device=x.device)
                    x = torch.add(mean, z, alpha=std)
            past = [(lam, value), *past][: self.order - 1]
            change = yield Step(x, s, t, i, i == n - 1, mean=mean if std else None, std=std or None)
            if change is not None:
                x, past = change.x, [(node, change.take(m)) for node, m in past]
        return x

    def _run_adaptive(self, x: Tensor, times: Sequence[float], process: Process) -> Run:
        s, end = times[0], times[-1]
        lam, lam_end = process.lam(s), process.lam(end)
        if not (math.isfinite(lam) and math.isfinite(lam_end)):
            raise ValueError(
                f"adaptive needs a finite lam at both ends, got {lam} at t={s:g} and {lam_end} at t={end:g}"
            )
        towards = math.copysign(1.0, lam_end - lam)
        h, index, nfe = self.h_init, 0, 0
        x_prev = x
        retry = False
        while s != end:
            left = abs(lam_end - lam)
            t = end if h >= left else process.t_of_lam(lam + towards * h)
            h = min(h, left)
            inner = [process.t_of_lam(lam + towards * h * j / self.order) for j in range(1, self.order)]
            p: Prediction = yield Query(x, s, first=not retry)
            x = p.x
            values, r = yield from self._stages(x, s, t, self._value(p), inner, process)
            nfe += self.order
            low = self._step(x, s, t, values[:-1], r[:-1], process, self.kind)
            high = self._step(x, s, t, values, r, process, self.kind)
            scale = torch.maximum(low.abs(), x_prev.abs()).mul_(self.rtol).clamp_(min=self.atol)
            error = ((high - low) / scale).flatten(1).square().mean(1).sqrt()
            worst = error.max().item()
            if retry := not worst <= 1:
                failed = f"no progress at t={s:.6g}: error {worst:g} times the tolerance with a step of {h:g} in lam"
                if not math.isfinite(worst) or h < 1e-8:
                    raise RuntimeError(f"adaptive DPM-Solver makes {failed}")
            else:
                change = yield Step(high, s, t, index, t == end, error=error)
                x, x_prev = (high, low) if change is None else (change.x, change.take(low))
                s, lam, index = t, process.lam(t), index + 1
            if nfe + self.order > self.max_nfe and s != end:
                raise RuntimeError(
                    f"adaptive DPM-Solver spent {nfe} evaluations (max_nfe={self.max_nfe}) and is at t={s:.6g}, "
                    f"error {worst:g} times the tolerance"
                )
            h *= self.theta * max(worst, 1e-12) ** (-1 / self.order)
        return x
