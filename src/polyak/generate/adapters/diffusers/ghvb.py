"""Schedulers with momentum: :class:`PolyakScheduler` whose solver is HeavyBall or GHVB."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

from polyak.core import checks
from polyak.generate.adapters.diffusers.parts import load
from polyak.generate.adapters.diffusers.scheduler import PolyakScheduler
from polyak.generate.ghvb import GHVB, HeavyBall
from polyak.generate.solver import SOLVER, Solver

_OWN = ("order", "beta", "spacing", "start")  # options of the solver
_KINDS: dict[str, checks.Kind] = dict(
    order=checks.Integer(1, 5) | None, beta=checks.Number(0, 1, "(]") | None,
    spacing=checks.Choice(None, "constant", "variable"), start=checks.Choice(None, "lower", "rk"),
    solver=SOLVER | checks.Map() | None,
)  # fmt: skip


class _MomentumScheduler(PolyakScheduler):
    makes: ClassVar[type[HeavyBall] | type[GHVB]]

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
        made = self.makes() if solver is None else load(solver, Solver)
        if type(made) is not self.makes:
            raise ValueError(f"solver must be a {self.makes.__name__}, got {made!r}: take PolyakScheduler for others")
        super().__init__(solver=dataclasses.replace(made, **known), **options)

    @classmethod
    def from_config(cls, config: Any = None, return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """From the configuration of any diffusers scheduler; ``kwargs`` are options of it, and the solver's."""
        own = {name: kwargs.pop(name) for name in _OWN if name in kwargs}
        if kwargs.get("solver") is None:
            saved = config.get("solver") if isinstance(config, Mapping) else None
            is_ours = isinstance(saved, Mapping) and str(saved.get("part", "")).endswith(f":{cls.makes.__name__}")
            kwargs["solver"] = load(saved, Solver) if is_ours else cls.makes()
        solver = load(kwargs["solver"], Solver)
        kwargs["solver"] = cls(solver=solver, **own).solver
        return super().from_config(config, return_unused_kwargs, **kwargs)


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
