"""A stochastic scheduler for pipelines of flow models (FLUX, Stable Diffusion 3): :class:`PolyakScheduler` with FlowSDE."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from polyak.core import checks
from polyak.generate.adapters.diffusers.made import OfOneSolver
from polyak.generate.adapters.diffusers.schedule import Request, Schedule, label
from polyak.generate.process import VP, Process
from polyak.generate.rbf.solver import GRIDS, SHAPES, FlowSDE
from polyak.generate.solver import SOLVER, Solver

_FLOW = "FlowMatchEulerDiscreteScheduler"
_KINDS: dict[str, checks.Kind] = dict(
    g=checks.Choice(None, *SHAPES), norm=checks.non_negative | None, grid=checks.Choice(None, *GRIDS),
    path=checks.Choice(None, "vp") | checks.Instance(Process, words="a Process"), solver=SOLVER | checks.Map() | None,
)  # fmt: skip


class FlowSDEScheduler(OfOneSolver):
    """The SDE of a flow model in the place of FlowMatchEulerDiscreteScheduler, with its options, timesteps and shifts.

    Args:
        g, norm: those of :class:`polyak.generate.FlowSDE`; ``norm=0`` is FlowMatchEulerDiscreteScheduler.
        path: the SDE of another interpolant, "vp" for :class:`polyak.generate.VP`; latents stay the pipeline's.
        grid: "vp" or "uniform": the solver's own times, as many as the pipeline asks for, in place of the pipeline's and its shift.
        solver: one that is made already, whose options these change.
        options: as of :class:`PolyakScheduler`.

    Attributes:
        generator: of the noise of steps that are given none: pipelines of FLUX and Stable Diffusion 3 give theirs to the first
            noise alone. Default: torch's own.

    Example:
        >>> pipe.scheduler = FlowSDEScheduler.from_config(pipe.scheduler.config, path="vp", grid="vp")
    """

    makes = FlowSDE
    generator: torch.Generator | None = None
    own: ClassVar[tuple[str, ...]] = ("g", "norm", "grid", "path")

    @checks.arguments(**_KINDS)
    def __init__(
        self,
        *,
        g: str | None = None,
        norm: float | None = None,
        grid: str | None = None,
        path: str | Process | None = None,
        solver: Solver | dict[str, Any] | None = None,
        **options: Any,
    ) -> None:
        given = {"g": g, "norm": norm, "grid": grid, "path": VP() if path == "vp" else path}
        if options.get("origin") is None and options.get("process") is None and "beta_start" not in options:
            options["origin"] = _FLOW
        known = {name: value for name, value in given.items() if value is not None}
        super().__init__(solver=self._made(solver, known), **options)

    def step(
        self,
        model_output: Tensor,
        timestep: Any,
        sample: Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        return_dict: bool = True,
        **others: Any,
    ) -> Any:
        """As of :class:`PolyakScheduler`; noise that no generator is given for comes from the scheduler's own."""
        source = self.generator if generator is None else generator
        return super().step(model_output, timestep, sample, source, return_dict, **others)

    def _scheduled(self, request: Request) -> Schedule:
        solver, plan = self._solver, self._plan
        assert isinstance(solver, FlowSDE)
        count = request.steps if request.sigmas is None else len(request.sigmas)
        if solver.grid is None or count is None or request.timesteps is not None:
            return super()._scheduled(request)
        times = solver.times(plan.process, steps=checks.integer("num_inference_steps", count, least=1)).tolist()
        times[-1] = 0.0 if plan.process.ends_clean(0.0) else times[-1]
        return Schedule(times, [label(plan, plan.process, t) for t in times[:-1]], plan.process)
