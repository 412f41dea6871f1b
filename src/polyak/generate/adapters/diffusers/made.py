"""Schedulers of one solver each, whose options are theirs: the base of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

from polyak.generate.adapters.diffusers.parts import load
from polyak.generate.adapters.diffusers.scheduler import PolyakScheduler
from polyak.generate.solver import Solver


class OfOneSolver(PolyakScheduler):
    """A PolyakScheduler whose solver is always of one class.

    Attributes:
        makes: the class.
        own: the options of the solver that the scheduler takes.
    """

    makes: ClassVar[type[Any]]
    own: ClassVar[tuple[str, ...]]

    @classmethod
    def _made(cls, solver: Solver | dict[str, Any] | None, given: Mapping[str, Any]) -> Solver:
        """The solver, or the default one, with the options that are given."""
        made = cls.makes() if solver is None else load(solver, Solver)
        if type(made) is not cls.makes:
            raise ValueError(f"solver must be a {cls.makes.__name__}, got {made!r}: take PolyakScheduler for others")
        return dataclasses.replace(made, **given)

    @classmethod
    def from_config(cls, config: Any = None, return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """From the configuration of any diffusers scheduler; ``kwargs`` are options of it, and the solver's."""
        own = {name: kwargs.pop(name) for name in cls.own if name in kwargs}
        if kwargs.get("solver") is None:
            saved = config.get("solver") if isinstance(config, Mapping) else None
            is_ours = isinstance(saved, Mapping) and str(saved.get("part", "")).endswith(f":{cls.makes.__name__}")
            kwargs["solver"] = load(saved, Solver) if is_ours else cls.makes()
        solver = load(kwargs["solver"], Solver)
        kwargs["solver"] = cls(solver=solver, **own).solver
        return super().from_config(config, return_unused_kwargs, **kwargs)
