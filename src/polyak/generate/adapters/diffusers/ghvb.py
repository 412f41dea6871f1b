"""Schedulers with momentum: :class:`PolyakScheduler` whose solver is HeavyBall or GHVB."""

from __future__ import annotations

from typing import Any, ClassVar

from polyak.core import checks
from polyak.generate.adapters.diffusers.made import OfOneSolver
from polyak.generate.ghvb import GHVB, HeavyBall
from polyak.generate.solver import SOLVER, Solver

_KINDS: dict[str, checks.Kind] = dict(
    order=checks.Integer(1, 5) | None, beta=checks.Number(0, 1, "(]") | None,
    spacing=checks.Choice(None, "constant", "variable"), start=checks.Choice(None, "lower", "rk"),
    solver=SOLVER | checks.Map() | None,
)  # fmt: skip


class _MomentumScheduler(OfOneSolver):
    own: ClassVar[tuple[str, ...]] = ("order", "beta", "spacing", "start")

    @checks.arguments(**_KINDS)
    def __init__(
        self,
        *,
        order: int | None = None,
        beta: float | None = None,
        spacing: str | None = None,
        start: str | None = None,
        solver: Solver | dict[str, Any] | None = None,
        **options: Any,
    ) -> None:
        given = {"order": order, "beta": beta, "spacing": spacing, "start": start}
        known = {name: value for name, value in given.items() if value is not None}
        super().__init__(solver=self._made(solver, known), **options)


class HeavyBallScheduler(_MomentumScheduler):
    """PLMS with heavy-ball momentum in the place of a diffusers scheduler.

    Args:
        order, beta, spacing, start: those of :class:`polyak.generate.HeavyBall`.
        solver: one that is made already, whose options these change.
        options: as of :class:`PolyakScheduler`.

    Example:
        >>> pipe.scheduler = HeavyBallScheduler.from_config(pipe.scheduler.config, order=4, beta=0.8)
    """

    makes = HeavyBall


class GHVBScheduler(_MomentumScheduler):
    """GHVB in the place of a diffusers scheduler; arguments as of :class:`HeavyBallScheduler`."""

    makes = GHVB
