"""Multistep DPM-Solvers: one evaluation a step, the earlier ones reused; for the ODE and for the reverse SDE."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from polyak.generate.dpm_solver.base import DPMSolver
from polyak.generate.dpm_solver.singlestep import stages_of_step
from polyak.generate.dpm_solver.step import ends, step_weights
from polyak.generate.linear import LinearSolver, Stage
from polyak.generate.process import Moments, ProbabilityPath
from polyak.generate.solver import step_count

OFFICIAL_FINAL = 10  # lower_order_final=True acts below this number of steps, as in the official code


@dataclass(frozen=True, repr=False)
class _Multistep(DPMSolver, LinearSolver):
    """What the multistep methods share."""

    grid: str = "logsnr"
    lower_order_final: bool | int = True
    denoise_to_zero: bool = False
    parity: Literal["official"] | None = None

    def __post_init__(self) -> None:
        # 1 is True: a threshold of one step would be none.
        if self.lower_order_final < 2:
            object.__setattr__(self, "lower_order_final", bool(self.lower_order_final))

    @property
    def history(self) -> int:  # type: ignore[override]
        return self.order - 1

    @property
    def tapers(self) -> bool:  # type: ignore[override]
        return self.order == 3 and self.parity == "official"

    @property
    def reaches_zero(self) -> bool:  # type: ignore[override]
        return self.form == "data" and not self.denoise_to_zero

    @property
    def _extra(self) -> int:
        """Evaluations beside those at the times."""
        return int(self.denoise_to_zero)

    @property
    def _bootstraps(self) -> bool:
        return False

    def times(
        self, process: ProbabilityPath, *, steps: int | None = None, nfe: int | None = None, grid: str | None = None
    ) -> Tensor:
        n = step_count(steps, nfe, 1) - (self._extra if nfe is not None else 0)
        if n < self.order:
            count = f"steps={steps}" if nfe is None else f"nfe={nfe}"
            start = " with start='singlestep'" if self._bootstraps else ""
            raise ValueError(f"{count} is too few for order {self.order}{start}")
        return process.grid(n, grid or self.grid)

    def plan(self, nfe: int, process: ProbabilityPath, grid: str | None = None) -> list[tuple[int, float, float]]:
        times = self.times(process, nfe=nfe, grid=grid).tolist()
        return list(zip(self.orders(len(times) - 1), times, times[1:], strict=False))

    def orders(self, n: int) -> list[int]:
        """The orders of n steps."""
        below = OFFICIAL_FINAL if self.lower_order_final is True else int(self.lower_order_final)
        orders = [self.order if self._bootstraps else min(self.order, i + 1) for i in range(n)]
        return [min(k, n - i) for i, k in enumerate(orders)] if n < below else orders

    def _table(self, times: Sequence[float], process: ProbabilityPath, sde: bool) -> list[Stage]:
        orders = self.orders(len(times) - 1)
        at, places = self._points(times, process, orders)
        lam, stages, nodes = at.lam, [], list[float]()  # of what is remembered, newest first
        for order, i, to in zip(orders, places, places[1:], strict=False):
            limit = min(len(nodes) + 1, self.order - 1)
            if to - i > 1:
                # Of a singlestep step the value at its start, which is the oldest of its own, is history.
                keep = range(order - 1, order - 1 + limit)
                stages += stages_of_step(at, i, order, self.form, self.kind, self._view, len(nodes), keep)
            else:
                h = lam[to] - lam[i]
                usable = list(itertools.takewhile(math.isfinite, nodes)) if math.isfinite(h) else []
                base, (value, *past), std = step_weights(
                    ends(at, i), ends(at, to), [(node - lam[i]) / h for node in usable[: order - 1]],
                    form=self.form, kind=self.kind, sde=sde, parity=self.parity, times=(float(at[i]), float(at[to])),
                )  # fmt: skip
                keep = range(limit)
                stages.append(Stage(at[i], at[to], self._view, base, value, tuple(past), std, tuple(keep)))
            nodes = [lam[i], *nodes][:limit]
        return self._ended(stages, times, self.denoise_to_zero)

    def _points(self, times: Sequence[float], process: Any, orders: Sequence[int]) -> tuple[Moments, list[int]]:
        """All points of evaluation, those within a singlestep start included, and where the given times are among them."""
        at = process.moments(times)
        if not self._bootstraps:
            return at, list(range(len(times)))
        points, places = [], []
        for i, s in enumerate(at):
            places.append(len(points))
            points.append(s)
            if i < min(self.order - 1, len(orders)):
                low, high = at.lam[i], at.lam[i + 1]
                points += [process.t_of_lam(low + (high - low) * j / orders[i]) for j in range(1, orders[i])]
        return process.moments(points), places


@dataclass(frozen=True, repr=False)
class DPMSolverMultistep(_Multistep):
    """DPM-Solver 2M and 3M (``form="data"``: DPM-Solver++): one evaluation a step.

    Args:
        order, form, kind: see :class:`DPMSolver`.
        grid: kind of time grid, unless :func:`sample` is told otherwise.
        lower_order_final: end with lower orders where there are fewer than 10 steps (or than the number given). A step onto
            clean data is of order 1 in any case.
        denoise_to_zero: spend one more evaluation at the end and return x0 there. It counts in ``nfe``, not in ``steps``.
        parity: "official": order 3 as in the official code, see :func:`dpm_step`; orders 1 and 2 are the same in both.
        start: "lower": the first steps are of lower order, as in the paper; the first one leaves an error of second order,
            small where the prediction hardly changes at first. "singlestep": they are singlestep steps of full order, at
            ``(order - 1)^2`` further evaluations; for orders 2 and 3.
    """

    start: Literal["lower", "singlestep"] = "lower"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self._bootstraps and self.order == 1:
            raise ValueError('start="singlestep" needs order 2 or 3, got 1')

    @property
    def _extra(self) -> int:
        return super()._extra + (self.order - 1) ** 2 * self._bootstraps

    @property
    def _bootstraps(self) -> bool:
        return self.start == "singlestep"

    def table(self, times: Sequence[float], process: ProbabilityPath, kind: str = "flow") -> list[Stage]:
        return self._table(times, process, sde=False)


@dataclass(frozen=True, repr=False)
class DPMSolverSDE(_Multistep):
    """SDE-DPM-Solver(++): the multistep method for the reverse SDE, which draws noise at every step.

    Args:
        order, form, kind: see :class:`DPMSolver`.
        grid, lower_order_final, denoise_to_zero, parity: as in :class:`DPMSolverMultistep`.
    """

    stochastic = True
    needs_gaussian = True

    def table(self, times: Sequence[float], process: ProbabilityPath, kind: str = "flow") -> list[Stage]:
        return self._table(times, process, sde=True)
