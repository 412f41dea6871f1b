"""The adaptive DPM-Solvers: DPM-Solver-12 and -23, a pair of orders whose difference sets the step."""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from polyak.generate.dpm_solver.base import DPMSolver
from polyak.generate.dpm_solver.step import dpm_step
from polyak.generate.process import Generators, ProbabilityPath
from polyak.generate.solver import Query, Run, Step

_SMALLEST = 1e-8  # a step in lam that is no progress


@dataclass(frozen=True)
class _Memory:
    """What is remembered after an accepted step."""

    steps: int
    t: float
    previous: Tensor  # the lower solution, which the tolerance is relative to
    h: float
    nfe: int

    def take(self, ancestors: Tensor) -> _Memory:
        return replace(self, previous=self.previous.index_select(0, ancestors))


@dataclass(frozen=True, repr=False)
class DPMSolverAdaptive(DPMSolver):
    """Step sizes by error control: DPM-Solver-12 (``order=2``) and DPM-Solver-23 (``order=3``).

    The error is the largest over the batch, hence a sample's steps depend on its batch; each sample's own is in
    ``Step.error``.

    Args:
        order, form, kind: see :class:`DPMSolver`.
        atol, rtol: tolerances (0.0078 = 2/256 for data in [-1, 1]).
        theta: safety factor.
        h_init: first step, in lam.
        max_nfe: give up after this many evaluations.
        denoise_to_zero: spend one more evaluation at the end and return x0 there.

    Raises:
        RuntimeError: no progress; it names t and the error.
    """

    atol: float = 0.0078
    rtol: float = 0.05
    theta: float = 0.9
    h_init: float = 0.05
    max_nfe: int = 10_000
    denoise_to_zero: bool = False

    adaptive = True
    history = 1
    reaches_zero = False

    def __post_init__(self) -> None:
        if self.order == 1:
            raise ValueError('order must be 2 or 3 for method="adaptive", got 1')

    @property
    def stages(self) -> int:  # type: ignore[override]
        return self.order

    @property
    def no_corrector(self) -> str:  # type: ignore[override]
        return "adaptive sampling cannot call a corrector, its error estimate would be meaningless"

    def times(
        self, process: ProbabilityPath, *, steps: int | None = None, nfe: int | None = None, grid: str | None = None
    ) -> Tensor:
        """The two ends; the steps between are found on the way."""
        if steps is not None or nfe is not None or grid is not None:
            raise ValueError("adaptive finds its own steps; leave out steps, nfe and grid")
        return torch.tensor([process.t_max, process.t_min], dtype=torch.float64)

    def plan(self, nfe: int, process: ProbabilityPath, grid: str | None = None) -> list[tuple[int, float, float]]:
        raise ValueError("adaptive finds its own steps; there is no plan")

    def run(
        self,
        x: Tensor,
        times: Sequence[float],
        process: Any,
        *,
        generator: Generators | None = None,
        memory: _Memory | None = None,
    ) -> Run:
        if self.denoise_to_zero and times[-1] > times[0]:
            raise ValueError("denoise_to_zero ends at the data; leave it out to run towards the noise")
        known = memory or _Memory(0, times[0], x, self.h_init, 0)
        s, end = known.t, times[-1]
        lam, lam_end = process.lam(s), process.lam(end)
        if not (math.isfinite(lam) and math.isfinite(lam_end)):
            raise ValueError(
                f"adaptive needs a finite lam at both ends, got {lam} at t={s:g} and {lam_end} at t={end:g}"
            )
        towards = math.copysign(1.0, lam_end - lam)
        retry, worst = False, 0.0
        while s != end:
            if known.nfe + self.order > self.max_nfe:
                raise RuntimeError(
                    f"adaptive DPM-Solver spent {known.nfe} evaluations (max_nfe={self.max_nfe}) and is at t={s:.6g}, "
                    f"error {worst:g} times the tolerance"
                )
            left = abs(lam_end - lam)
            t = end if known.h >= left else process.t_of_lam(lam + towards * known.h)
            h = min(known.h, left)
            inner = [process.t_of_lam(lam + towards * h * j / self.order) for j in range(1, self.order)]
            p: Any = yield Query(x, s, first=not retry)
            x = p.x
            values, r = yield from self._stages(x, s, t, self._own(p), inner, process)
            nfe = known.nfe + self.order
            low = self._step(x, s, t, values[:-1], r[:-1], process)
            high = self._step(x, s, t, values, r, process)
            scale = torch.maximum(low.abs(), known.previous.abs()).mul_(self.rtol).clamp_(min=self.atol)
            error = ((high - low) / scale).flatten(1).square().mean(1).sqrt()
            worst = error.max().item()
            then = h * self.theta * max(worst, 1e-12) ** (-1 / self.order)
            if retry := not worst <= 1:
                if not math.isfinite(worst) or h < _SMALLEST:
                    raise RuntimeError(
                        f"adaptive DPM-Solver makes no progress at t={s:.6g}: error {worst:g} times the tolerance "
                        f"with a step of {h:g} in lam"
                    )
                known = replace(known, h=then, nfe=nfe)
            else:
                known = _Memory(known.steps + 1, t, low, then, nfe)
                change = yield Step(high, s, t, known.steps - 1, t == end, error=error, memory=known)
                x = high
                if change is not None:
                    x = change.x
                    known = known if change.ancestors is None else known.take(change.ancestors)
                s, lam = t, process.lam(t)
        if self.denoise_to_zero:
            p = yield Query(x, end)
            x = p.x0
        return x

    def _own(self, prediction: Any) -> Tensor:
        """The value, apart from the network's output: compiled and captured networks write every one to the same place."""
        value = getattr(prediction, self._view)
        return value.clone() if value is prediction.output else value

    def _step(
        self, x: Tensor, s: float, t: float, values: Sequence[Tensor], r: Sequence[float], process: Any
    ) -> Tensor:
        return dpm_step(x, s, t, values, process, r=r, form=self.form, kind=self.kind)

    def _stages(
        self, x: Tensor, s: float, t: float, value: Tensor, inner: Sequence[float], process: Any
    ) -> Generator[Query, Any, tuple[list[Tensor], list[float]]]:
        """The values at s and at the inner times, and the nodes r of the latter."""
        lam = process.lam(s)
        h = process.lam(t) - lam
        r = [(process.lam(q) - lam) / h for q in inner]
        values = [value]
        for j, q in enumerate(inner):
            at = dpm_step(x, s, q, values, process, r=[node / r[j] for node in r[:j]], form=self.form, kind="taylor")
            p = yield Query(at, q, first=False)
            values.append(self._own(p))
        return values, r
