"""PolyakScheduler: a scheduler for diffusers pipelines that steps with any solver of polyak."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers.schedulers.scheduling_utils import KarrasDiffusionSchedulers, SchedulerMixin
from diffusers.utils import BaseOutput
from torch import Tensor

from polyak.core import checks
from polyak.generate.adapters.diffusers import schedule
from polyak.generate.adapters.diffusers.answers import kept_exactly, predicted, said, unrounded
from polyak.generate.adapters.diffusers.configured import Configured
from polyak.generate.adapters.diffusers.edits import Watch, is_part, times_of_levels
from polyak.generate.adapters.diffusers.hearing import Hearing
from polyak.generate.adapters.diffusers.noise import Noising
from polyak.generate.adapters.diffusers.options import STEPS
from polyak.generate.adapters.diffusers.runs import Driven, Ground, Leg, begin_at, compose
from polyak.generate.adapters.diffusers.schedule import Request, Schedule
from polyak.generate.guidance import Guidance
from polyak.generate.prediction import Prediction, edm_input_scaling
from polyak.generate.process import Discrete, Flow, Moments, Process
from polyak.generate.process.path import PATH
from polyak.generate.solver import SOLVER, Solver


@checks.arguments(prev_sample=checks.tensor, pred_original_sample=checks.tensor | None)
@dataclass
class PolyakSchedulerOutput(BaseOutput):
    """What a step gives: the next point to ask the model at, and the clean data predicted at the last one.

    The data are left out where the origin's step has none (flow matching).
    """

    prev_sample: Tensor
    pred_original_sample: Tensor | None = None


class PolyakScheduler(Noising, SchedulerMixin, Configured):
    """A solver of this room, or of yours, in the place of a diffusers scheduler.

    Options have the meaning that they have in the diffusers scheduler whose configuration this is (``origin``): its timesteps,
    its noise levels, its scale of samples, its ``add_noise``. What each option of each scheduler means here is a table in the
    documentation (``polyak.generate.adapters.diffusers.options``); what cannot be taken is refused by name. Without an origin
    options are those of DPMSolverMultistepScheduler, and ``set_alpha_to_one``, ``clip_sample``, ``snr_shift_scale``.

    There is one timestep per evaluation: solvers of several stages ask at inner points, or at some twice. A solver that cannot
    end on clean data, or cannot start where lam is infinite, is helped with first-order steps there; a run that begins in
    the middle of a step finishes it with first-order steps. The model's outputs are not looked at (no NaN check), so that a
    step never waits for the GPU; a run that starts somewhere without ``set_begin_index`` does so once.

    Args:
        solver: not adaptive.
        process: left out, made from the options.
        origin: the name of the diffusers scheduler whose options these are; :meth:`from_config` finds it by itself.
        grid: a kind of time grid of :meth:`Process.grid`, from t_max to t_min, instead of the options' timesteps, which then
            need not be integers.
        options: of the origin. Also ``prediction_type="score"`` and "edm" with ``sigma_data``.

    Attributes:
        timesteps: what the network is told, one for each evaluation.
        sigmas: the noise levels at these, and at the end: sigma / alpha, of a flow its t.
        order: evaluations of a full step, for solvers that ask at points that are not on their grid (Runge-Kutta); else 1, also
            after ``set_timesteps`` with timesteps or sigmas, whose pipelines count evaluations.

    Raises:
        ValueError: no solver, an adaptive one; options that are refused or unknown.
    """

    _compatibles = [e.name for e in KarrasDiffusionSchedulers]  # noqa: RUF012 - diffusers' own convention
    order = 1
    _hearing: Hearing | None = None

    def _unplanned(self) -> None:
        labels, levels = schedule.training(self._plan)
        self.num_inference_steps: int | None = None
        self._times: list[float] = []
        self._legs: list[Leg] = []
        self._asked: list[float] = []
        self.timesteps = self._table_of(labels, None)
        self.sigmas = torch.tensor(levels, dtype=torch.float32)
        self._reset()

    def __copy__(self) -> PolyakScheduler:
        """A copy whose run goes on by itself."""
        made = object.__new__(type(self))
        made.__dict__.update(self.__dict__)
        shared = {id(leg.ground.process): leg.ground.process for leg in self._legs}
        made._driven = copy.deepcopy(self._driven, shared)
        made._hearing = copy.deepcopy(self._hearing)
        return made

    def __len__(self) -> int:
        return self._plan.train_steps

    # --- the plan

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        *,
        timesteps: Sequence[float] | None = None,
        sigmas: Sequence[float] | None = None,
        mu: float | None = None,
        original_inference_steps: int | None = None,
        strength: float = 1.0,
    ) -> None:
        """Plan a run.

        Args:
            num_inference_steps: steps (evaluations, for "fast" and "singlestep" DPM-Solvers); or
            timesteps: what the model is to be told at each step, decreasing; or
            sigmas: the noise levels of each step (``sigma / alpha``, or a flow's t before its shift), decreasing. A flow takes
                both, for schedules whose timesteps say something else.
            device: of ``scheduler.timesteps``.
            mu: for configurations with dynamic shifting, the log of the shift ("exponential"), or the shift ("linear").
            original_inference_steps, strength: of consistency models (LCM and TCD).
        """
        self._refresh()
        count = num_inference_steps
        for values in (timesteps, sigmas):
            if values is not None and count is not None and len(values) == count and self._plan.facts.family == "flow":
                count = None
        both = timesteps is not None and sigmas is not None and self._plan.facts.family == "flow"
        if sum(v is not None for v in (count, timesteps, sigmas)) != 1 + both or (both and count is not None):
            raise ValueError("give one of num_inference_steps, timesteps and sigmas")
        if (original_inference_steps is not None or strength != 1) and self._plan.facts.spacing != "lcm":
            raise ValueError(
                "original_inference_steps and strength are for configurations of LCMScheduler and TCDScheduler"
            )
        request = Request(count, timesteps, sigmas, mu, original_inference_steps, strength)
        made = self._scheduled(request)
        self._told = dict(zip(made.times[:-1], made.labels, strict=True))
        self._compose(made)
        self.num_inference_steps = len(made.times) - 1
        # With timesteps or levels of their own, pipelines take the number of timesteps for the number of steps.
        self.order = 1 if request.steps is None else self._per_step
        self.timesteps = self._table_of([self._label(t) for t in self._asked], device)
        self._reset()

    def _compose(self, made: Schedule) -> None:
        """Plan the solver's run over times."""
        ground = Ground(made.process, self._kind)
        self._legs = compose(self._solver, made.times, ground)
        self.process, self._times, self._ground = made.process, made.times, ground
        self._asked = [t for leg in self._legs for t in leg.asked]
        self._starts = [first for leg in self._legs for first in leg.first]
        self._points: Moments | None = None
        levels, self._scales = self._levels([*self._asked, made.times[-1]])
        self.sigmas = levels.to(torch.float32)

    def _follow(self) -> None:
        """Go on from what somebody made of ``timesteps`` or ``sigmas``.

        Raises:
            ValueError: timesteps that are not planned; levels within a run, or of a solver that asks between them.
        """
        if not self._times:
            return
        if not self._watched[0].same(self.timesteps):
            if not is_part(self.timesteps, self._planned):
                raise ValueError(
                    f"timesteps were changed to {self.timesteps.tolist()}, which are not a part of those planned, "
                    f"{self._planned}: call set_timesteps(timesteps=...)"
                )
            self._watch()
        if not self._watched[1].same(self.sigmas):
            levels, changed = self._planned_levels, self.sigmas.detach().cpu()
            if changed.shape != levels.shape or not torch.equal(changed.to(levels.dtype), levels):
                if self._driven is not None or self._asked != self._times[:-1]:
                    where = "within a run" if self._driven is not None else f"though {self._solver!r} asks between them"
                    raise ValueError(f"sigmas were changed {where}: call set_timesteps(sigmas=...) instead")
                times = times_of_levels(self._plan, changed, levels.tolist(), self._times)
                self._compose(Schedule(times, self._planned, schedule.widened(self.process, times)))
            self._watch()

    def _watch(self) -> None:
        self._watched = Watch(self.timesteps), Watch(self.sigmas)
        self._planned_levels = self.sigmas.detach().cpu().clone()

    def _scheduled(self, request: Request) -> Schedule:
        plan = self._plan
        timed = not plan.given or isinstance(plan.process, Discrete | Flow)
        if request.steps is not None and (plan.grid is not None or not timed):
            n = checks.integer("num_inference_steps", request.steps, least=1)
            process = plan.process
            if isinstance(process, Flow) and not plan.given:
                process = Flow(label_scale=process.label_scale)
            times = self.solver.times(process, steps=n, grid=plan.grid).tolist()
            return Schedule(times, [schedule.label(plan, plan.process, t) for t in times[:-1]], plan.process)
        made = schedule.make(plan, request, zero=self.solver.reaches_zero)
        return dataclasses.replace(made, times=schedule.checked(plan, made))

    def _label(self, t: float) -> float:
        told = self._told.get(t)
        return schedule.label(self._plan, self.process, t) if told is None else told

    def _levels(self, times: list[float]) -> tuple[Tensor, list[float] | None]:
        """The noise levels at times, and what a sample is multiplied by before the network sees it."""
        t, data = torch.tensor(times, dtype=torch.float64), self._plan.input_data
        if isinstance(self.process, Flow) or not isinstance(self.process, Process):
            return (1 - t if self._plan.config.get("invert_sigmas") else t), None
        sigma = self.process.sigma_hat(t)
        return sigma, None if data is None else (edm_input_scaling(sigma, data) / self.process.alpha(t)).tolist()

    def _table_of(self, labels: list[float], device: str | torch.device | None) -> Tensor:
        table = np.array(labels)
        whole = table.round()
        integers = self._plan.facts.family == "chain" and self._plan.kind != "edm"
        if self._plan.given:
            integers = isinstance(self.process, Discrete)
        if integers and (np.abs(table - whole) < 1e-6).all():
            table = whole.astype(np.int64)
        else:
            table = table.astype(np.float32)
        self._planned: list[float] = table.tolist()
        return torch.tensor(table, device=device)

    @property
    def init_noise_sigma(self) -> float:
        """The standard deviation of the noise that a run starts from, as the origin has it."""
        family = self._plan.facts.family
        if family == "chain" or self._plan.given:
            return getattr(self.process, "prior_std", 1.0)
        if family == "levels":
            top = float(self.sigmas.max())
            return top if self._plan.config["timestep_spacing"] in ("linspace", "trailing") else math.hypot(top, 1.0)
        return math.hypot(self._plan.config["sigma_max"], 1.0) if family == "edm" else 1.0

    # --- the run

    def _reset(self) -> None:
        self._step_index: int | None = None
        self._begin_index: int | None = None
        self._driven: Driven | None = None
        self._exact: Tensor | None = None
        if self._hearing is not None:
            self._hearing.begin(None)
        self._watch()

    @property
    def step_index(self) -> int | None:
        """How many evaluations are done, counted from the first timestep."""
        return self._step_index

    @property
    def begin_index(self) -> int | None:
        """The index of the first timestep of the run."""
        return self._begin_index

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Start at ``timesteps[begin_index]`` (image-to-image pipelines)."""
        self._begin_index = checks.integer("begin_index", begin_index, least=0)

    def index_for_timestep(self, timestep: Any, schedule_timesteps: Tensor | None = None) -> int:
        """Where a timestep is; where it is there twice, the second one, so that a run does not start within a step."""
        table = self.timesteps if schedule_timesteps is None else schedule_timesteps
        wanted = float(timestep)
        found = [i for i, label in enumerate(table.tolist()) if abs(label - wanted) <= 1e-6 * max(1.0, abs(label))]
        if not found:
            raise ValueError(f"timestep {wanted:g} is not one of the timesteps {table.tolist()}")
        return found[min(1, len(found) - 1)]

    def _start_index(self, timestep: Any) -> int:
        if not self._times:
            raise ValueError("call set_timesteps before the first step")
        if self._begin_index is not None:
            return self._begin_index
        wanted = float(timestep)
        close = [i for i, v in enumerate(self._planned) if abs(v - wanted) <= 1e-4 * max(1.0, abs(v))]
        starts = [i for i in close if self._starts[i]]
        if not close:
            raise ValueError(f"timestep {wanted:g} is not one of the timesteps {self._planned}")
        return starts[0] if starts else close[0]

    def _begin(self, timestep: Any) -> None:
        index = self._start_index(timestep)
        self._driven = Driven(begin_at(self._legs, index, self._ground) if index else self._legs, self._ground)
        self._step_index = index
        if self._hearing is not None:
            self._hearing.begin(sum(self._starts[index:]))

    def reindex(self, ancestors: Tensor) -> None:
        """Move what is remembered of the samples after resampling between steps: row i of the batch was row ``ancestors[i]``.

        Raises:
            ValueError: a solver that is a coroutine.
        """
        if self._driven is not None:
            self._driven.reindex(ancestors)
        if self._exact is not None:
            self._exact = self._exact.index_select(0, ancestors)
        if self._hearing is not None:
            self._hearing.reindex(ancestors)

    # --- guidance

    def hear(self, output: Tensor, guidance: Guidance) -> None:
        """Take note of what the network said: the next step guides by it, instead of going by what it is given."""
        if self._hearing is None or self._hearing.guidance != guidance:
            self._hearing = Hearing(guidance)
            if self._step_index is not None:
                self._hearing.begin(sum(self._starts[self._step_index :]))
        self._hearing.outputs.append(output)

    def deafen(self) -> None:
        """Steps go by what they are given again."""
        self._hearing = None

    def asks(self, timestep: Any) -> tuple[int, float, bool, float]:
        """The next evaluation: its index and time, whether it begins a step, and what scales its point for the network."""
        index = self._start_index(timestep) if self._step_index is None else self._step_index
        scaled = self._plan.input_data is not None and self._scales is not None
        if self._points is None:
            self._points = self.process.moments(self._asked)
        if index >= len(self._starts):
            raise ValueError(
                "scheduler has no evaluation left: call set_timesteps, and give the guider the scheduler that the pipeline has"
            )
        return index, self._points[index], self._starts[index], self._scales[index] if scaled else 1.0  # type: ignore[index]

    def read(self, output: Tensor, x: Tensor, t: float) -> Prediction:
        """The network's output at a point, as the configuration has it."""
        return said(self._plan, self.process, output, x, t)

    def scale_model_input(self, sample: Tensor, timestep: Any = None) -> Tensor:
        """The sample as the model wants it: scaled where the origin's samples are, and for preconditioned networks."""
        if not self._times:
            self._refresh()
        self._follow()
        if self._plan.input_data is None:
            return sample
        if not self._times:  # nothing is planned, and all timesteps are known
            at = torch.tensor([float(timestep)], dtype=torch.float64)
            _, scales = self._levels(schedule.times_of(self._plan, self.process, at).tolist())
            return sample * scales[0]  # type: ignore[index]
        index = self._start_index(timestep) if self._step_index is None else self._step_index
        return sample * self._scales[index]  # type: ignore[index]

    def step(
        self,
        model_output: Tensor,
        timestep: Any,
        sample: Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        return_dict: bool = True,
        *,
        eta: float = 0.0,
        use_clipped_model_output: bool | None = None,
        **others: Any,
    ) -> PolyakSchedulerOutput | tuple[Tensor, ...]:
        """Take the model's output at the point that the last step returned; give the next point, or the result.

        Args:
            model_output: shape (B, C, ...), twice the channels with a learned variance.
            timestep: one of ``timesteps``; looked at only where the run starts without ``set_begin_index``.
            sample: the point. Where it is not what the last step returned (a callback or an inpainting mask changed it, also
                in place), the solver goes on from what it is now.
            generator: of a stochastic solver's noise in this step, or one for each sample.
            return_dict: give a :class:`PolyakSchedulerOutput`, else a tuple: of the next point, and of the predicted clean
                data where the origin's step gives them.
            eta: what DDIM's pipelines pass; only 0, since noise is the solver's own.
            use_clipped_model_output: what DDIM's pipelines pass: the noise, too, is that of the clipped data.
            others: what else diffusers' steps take; only values that ask for nothing (``s_churn=0``).

        Raises:
            ValueError: before ``set_timesteps``, after the last step, or for what else is asked for.
        """
        if isinstance(generator, int | float):  # DDIM's fourth argument is eta
            generator, eta = None, generator
        if eta:
            raise ValueError(f"eta must be 0, got {eta}: noise is the solver's own, as in DDIM(eta=...)")
        for name, value in others.items():
            allowed = STEPS.get(name, ())
            if ... not in allowed and not any(value is a or (isinstance(a, float) and value == a) for a in allowed):
                raise ValueError(
                    f"{name}={value!r} cannot be taken by step: {'leave it out' if allowed else 'unknown'}"
                )
        self._follow()
        if self._driven is None:
            self._begin(timestep)
        assert self._driven is not None
        assert self._step_index is not None
        if self._driven.done:
            raise ValueError("the run is complete; call set_timesteps before the next one")
        run, x = self._driven, unrounded(sample, self._exact)
        hearing = self._hearing
        guide = None if hearing is None else hearing.guide(model_output, self._starts[self._step_index])  # type: ignore[index]
        prediction = predicted(
            self._plan,
            self.process,
            self.solver,
            self.corrector,
            model_output,
            x,
            run.t,
            bool(use_clipped_model_output),
            guide,
        )
        facts = self._plan.facts
        gives_x0 = (facts.gives_x0 or (return_dict and facts.family != "flow")) and isinstance(self.process, Process)
        made, beside = run.send(prediction, generator, [prediction.weights("x0")] if gives_x0 else ())
        self._exact = kept_exactly(made, sample.dtype)
        self._step_index += 1
        given = [point.to(sample.dtype) for point in (made, *beside)]
        return PolyakSchedulerOutput(*given) if return_dict else tuple(given)


@checks.arguments(solver=SOLVER, process=PATH, prediction_type=checks.text)
def as_diffusers(solver: Solver, process: Process, prediction_type: str = "epsilon", **options: Any) -> PolyakScheduler:
    """A diffusers scheduler for a solver and a process; ``options`` are those of :class:`PolyakScheduler`."""
    return PolyakScheduler(solver=solver, process=process, prediction_type=prediction_type, **options)
