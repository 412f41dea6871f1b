"""Singlestep DPM-Solvers: a step of order k asks at k points within itself."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from polyak.generate.dpm_solver.base import DPMSolver
from polyak.generate.dpm_solver.step import Form, Kind, ends, step_weights
from polyak.generate.linear import LinearSolver, Stage
from polyak.generate.process import Moments, ProbabilityPath
from polyak.generate.solver import step_count


def stages_of_step(
    at: Moments,
    first: int,
    order: int,
    form: Form,
    kind: Kind,
    view: str,
    remembered: int = 0,
    keep: Sequence[int] = (),
) -> list[Stage]:
    """The stages of one step from ``at[first]`` over ``order - 1`` inner points to ``at[first + order]``.

    Inner points are reached by "taylor" steps of the order that the values so far admit.

    Args:
        remembered: how many values of earlier steps there are, which stay.
        keep: what is remembered after the last stage, as in :class:`Stage`.
    """
    lam, last = at.lam, first + order
    stages = []
    for j in range(order):
        to = first + j + 1
        h = lam[to] - lam[first]
        r = [(lam[first + q] - lam[first]) / h for q in range(1, j + 1)]
        how: Kind = kind if to == last else "taylor"
        base, weights, _ = step_weights(
            ends(at, first), ends(at, to), r, form=form, kind=how, times=(float(at[first]), float(at[to]))
        )
        newest, *older = reversed(weights)
        stages.append(
            Stage(
                at[first + j],
                at[to],
                view,
                base,
                newest,
                tuple(older),
                first=j == 0,
                last=to == last,
                keep=tuple(keep) if to == last else tuple(range(j + 1 + remembered)),
            )
        )
    return stages


@dataclass(frozen=True, repr=False)
class _Singlestep(DPMSolver, LinearSolver):
    """What the singlestep methods share.

    ``times(steps=n)`` and :func:`sample` count evaluations, as the official code and diffusers do.
    """

    grid: str = "logsnr"
    denoise_to_zero: bool = False

    @property
    def stages(self) -> int:  # type: ignore[override]
        return self.order

    @property
    def reaches_zero(self) -> bool:  # type: ignore[override]
        return False

    def orders(self, n: int) -> list[int]:
        """Orders of the steps that spend n evaluations."""
        raise NotImplementedError

    def times(
        self, process: ProbabilityPath, *, steps: int | None = None, nfe: int | None = None, grid: str | None = None
    ) -> Tensor:
        """All points of evaluation and the end: n evaluations are n + 1 times."""
        n = step_count(steps, nfe, 1) - (self.denoise_to_zero if nfe is not None else 0)
        kind = grid or self.grid
        orders = self.orders(n) if n > 0 else []
        if not orders:
            what = "steps" if nfe is None else "nfe"
            raise ValueError(f"{what} must be at least order={self.order}, got {steps if nfe is None else nfe}")
        if kind != "logsnr":
            return process.grid(sum(orders), kind)
        # Inner points are uniform in lam between the outer ones, all found together.
        outer = process.grid(len(orders), kind)
        lam = process.lam(outer).tolist()  # type: ignore[attr-defined]
        inner = [a + (b - a) * j / k for a, b, k in zip(lam, lam[1:], orders, strict=False) for j in range(k)]
        times = process.t_of_lam(torch.tensor([*inner, lam[-1]], dtype=torch.float64))  # type: ignore[attr-defined]
        times[[*itertools.accumulate(orders, initial=0)]] = outer
        return times

    def plan(self, nfe: int, process: ProbabilityPath, grid: str | None = None) -> list[tuple[int, float, float]]:
        times = self.times(process, nfe=nfe, grid=grid).tolist()
        orders = self.orders(len(times) - 1)
        at = list(itertools.accumulate(orders, initial=0))
        return [(k, times[i], times[i + k]) for k, i in zip(orders, at, strict=False)]

    def table(self, times: Sequence[float], process: ProbabilityPath, kind: str = "flow") -> list[Stage]:
        orders = self.orders(len(times) - 1)
        if sum(orders) != len(times) - 1:
            raise ValueError(
                f"{self!r} needs a multiple of {self.order} intervals, got {len(times) - 1}; DPMSolverFast takes any number"
            )
        at, stages, first = process.moments(times), [], 0
        for order in orders:
            stages += stages_of_step(at, first, order, self.form, self.kind, self._view)
            first += order
        return self._ended(stages, times, self.denoise_to_zero)


@dataclass(frozen=True, repr=False)
class DPMSolverFast(_Singlestep):
    """DPM-Solver-fast: singlestep steps of ``order``, the last ones lower, so that any number of evaluations is met exactly.

    Args:
        order, form, kind: see :class:`DPMSolver`.
        grid: kind of time grid, unless :func:`sample` is told otherwise.
        denoise_to_zero: spend one more evaluation at the end and return x0 there. It counts in ``nfe``, not in ``steps``.
    """

    @property
    def tapers(self) -> bool:  # type: ignore[override]
        return self.order == 3

    def orders(self, n: int) -> list[int]:
        full, rest = divmod(n, self.order)
        if self.order == 3 and rest == 0:
            return [3] * (full - 1) + [2, 1]
        return [self.order] * full + [rest] * (rest > 0)


@dataclass(frozen=True, repr=False)
class DPMSolverSinglestep(_Singlestep):
    """Singlestep steps that are all of one order: a budget of n evaluations makes ``n // order`` of them.

    Args:
        order, form, kind: see :class:`DPMSolver`.
        grid: kind of time grid, unless :func:`sample` is told otherwise.
        denoise_to_zero: spend one more evaluation at the end and return x0 there. It counts in ``nfe``, not in ``steps``.
    """

    def orders(self, n: int) -> list[int]:
        return [self.order] * (n // self.order)
