"""What the DPM-Solvers share, and ``DPMSolver(method=...)``, which makes any of them."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

from polyak.core import checks
from polyak.generate.dpm_solver.step import VIEW, Form, Kind
from polyak.generate.linear import Stage
from polyak.generate.process import GRIDS, ProbabilityPath
from polyak.generate.solver import Solver

METHODS = ("fast", "singlestep", "multistep", "adaptive")
_DEFAULTS: dict[str, Any] = dict(
    order=3, form="eps", method="fast", kind="midpoint", grid="logsnr", lower_order_final=True, denoise_to_zero=False,
    atol=0.0078, rtol=0.05, theta=0.9, h_init=0.05, start="lower", sde=False, parity=None, max_nfe=10_000,
)  # fmt: skip
KINDS: dict[str, checks.Kind] = dict(
    order=checks.Integer(1, 3), form=checks.Choice("eps", "data"), method=checks.Choice(*METHODS),
    kind=checks.Choice("midpoint", "taylor"), grid=checks.Choice(*GRIDS), lower_order_final=checks.flag | checks.Integer(0),
    denoise_to_zero=checks.flag, atol=checks.positive, rtol=checks.positive, theta=checks.Number(0.0, 1.0, "()"),
    h_init=checks.positive, start=checks.Choice("lower", "singlestep"), sde=checks.flag,
    parity=checks.Choice(None, "official"), max_nfe=checks.Integer(1),
)  # fmt: skip


class _ByMethod(type):
    """Calling :class:`DPMSolver` itself makes the class of its method. What is given is checked here, for all of them."""

    __checks__ = KINDS

    @property
    def __signature__(cls) -> inspect.Signature:
        if not cls._of_all:
            own = list(inspect.signature(cls.__init__).parameters.values())[1:]  # type: ignore[misc]
            return inspect.Signature(own)
        kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
        return inspect.Signature([inspect.Parameter(n, kind, default=d) for n, d in _DEFAULTS.items()])

    @property
    def _of_all(cls) -> bool:
        return cls.__name__ == "DPMSolver" and cls.__module__ == __name__

    def __call__(cls, *args: Any, **options: Any) -> Any:
        bound = inspect.signature(cls).bind(*args, **options)
        given = {n: KINDS[n](n, value) if n in KINDS else value for n, value in bound.arguments.items()}
        if not cls._of_all:
            return super().__call__(**given)
        method, sde = given.pop("method", "fast"), given.pop("sde", False)
        if sde and method != "multistep":
            raise ValueError(f'sde needs method="multistep", got {method!r}')
        made = _classes()["sde" if sde else method]
        known = {f.name for f in fields(made)}
        # An option of another method is taken where it asks for nothing: at its default, or switched off.
        for name in [name for name in given if name not in known]:
            if given[name] != _DEFAULTS[name] and given[name] is not False:
                _refuse(name, given[name], made)
            del given[name]
        return made(**given)


def _refuse(name: str, value: Any, made: Any) -> None:
    owners = {m: c for m, c in _classes().items() if name in {f.name for f in fields(c)}}
    whose = " or ".join(f'method="{m}" ({c.__name__})' for m, c in owners.items() if m != "sde")
    said = f'"{value}"' if isinstance(value, str) else repr(value)
    raise ValueError(f"{name}={said} needs {whose}; it does nothing in {made.__name__}")


def _classes() -> dict[str, Any]:
    from polyak.generate.dpm_solver import adaptive, multistep, singlestep

    return {
        "fast": singlestep.DPMSolverFast,
        "singlestep": singlestep.DPMSolverSinglestep,
        "multistep": multistep.DPMSolverMultistep,
        "sde": multistep.DPMSolverSDE,
        "adaptive": adaptive.DPMSolverAdaptive,
    }


@dataclass(frozen=True, repr=False)
class DPMSolver(Solver, metaclass=_ByMethod):
    """The DPM-Solvers. ``DPMSolver(order=..., form=..., method=...)`` makes one of the classes below, whose options are given.

    ======================  =======================  =======================================================================
    ``method=``             class                    how it steps
    ======================  =======================  =======================================================================
    ``"fast"`` (default)    DPMSolverFast            singlestep, lower orders at the end: any number of evaluations
    ``"singlestep"``        DPMSolverSinglestep      singlestep steps, all of one order
    ``"multistep"``         DPMSolverMultistep       one evaluation a step, the earlier ones reused
    ``"multistep", sde``    DPMSolverSDE             the same for the reverse SDE
    ``"adaptive"``          DPMSolverAdaptive        step sizes by error control
    ======================  =======================  =======================================================================

    Args:
        order: 1 to 3. Order 1 is DDIM.
        form: "eps" (DPM-Solver) or "data" (DPM-Solver++): which prediction is interpolated.
        kind: "midpoint" or "taylor", see :func:`dpm_step`; the same at order 1.

    Raises:
        ValueError: arguments out of range or without meaning together; a budget that does not admit the order.
    """

    order: int = 3
    form: Form = "eps"
    kind: Kind = "midpoint"

    @property
    def no_corrector(self) -> str:  # type: ignore[override]
        return "" if self.form == "data" else 'form="eps" does not see x0; use form="data"'

    def plan(self, nfe: int, process: ProbabilityPath, grid: str | None = None) -> list[tuple[int, float, float]]:
        """The steps that a budget buys, ``[(order, t_from, t_to), ...]``."""
        raise NotImplementedError

    def _ended(self, stages: list[Stage], times: Sequence[float], zero: bool) -> list[Stage]:
        """The stages, and one more evaluation that returns x0 where ``zero`` asks for it."""
        if not zero:
            return stages
        if times[-1] > times[0]:
            raise ValueError("denoise_to_zero ends at the data; leave it out to run towards the noise")
        end = stages[-1].to
        return [*stages, Stage(end, end, "x0", 0.0, 1.0, last=False)]

    @property
    def _view(self) -> str:
        return VIEW[self.form]
