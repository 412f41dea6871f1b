"""The sampling loop: a denoiser, a process and a solver, with optional guidance, correction and steering.

Per evaluation the order is denoiser -> guidance -> corrector -> solver; per completed step, solver -> steering.
"""

from __future__ import annotations

import copy
import hashlib
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, overload

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from polyak.core import checks
from polyak.generate.evaluate import (
    CORRECTOR,
    GUIDANCE,
    HALF,
    MODEL,
    STEPS,
    Corrector,
    DynamicThresholding,
    Evaluator,
    Model,
    look,
)
from polyak.generate.guidance import Guidance
from polyak.generate.linear import LinearSolver, tabled
from polyak.generate.plain import run_table
from polyak.generate.process import GRIDS, Generators, ProbabilityPath, wide
from polyak.generate.process.path import PATH, TIMES, unwatched
from polyak.generate.solver import SOLVER, Change, Solver, Step, drive, resume
from polyak.generate.steering import Steering

__all__ = ["HALF", "DynamicThresholding", "SamplingInfo", "invert", "sample"]


@checks.arguments(
    nfe=checks.Integer(0), evaluations=checks.Integer(0), queries=checks.Each(checks.operand),
    steps=checks.Each(checks.Each(checks.operand, count=2)), steering=checks.anything,
)  # fmt: skip
@dataclass
class SamplingInfo:
    """What a run of :func:`sample` cost.

    Attributes:
        nfe: points at which the denoiser was asked; what papers count.
        evaluations: network calls (a guided pair is two).
        queries: the times of those points, in order; tensors of shape (B,) of solvers whose rows have times of their own.
        steps: ``(s, t)`` of the completed steps.
        steering: the final steering state, with its weights and evidence; None without steering.
    """

    nfe: int = 0
    evaluations: int = 0
    queries: list[Any] = field(default_factory=list)
    steps: list[tuple[float, float]] = field(default_factory=list)
    steering: Any = None


@overload
def sample(
    denoiser: Model,
    x_T_or_shape: Tensor | Sequence[int] | Step,
    *,
    process: ProbabilityPath | None = ...,
    solver: Solver,
    steps: int | None = ...,
    nfe: int | None = ...,
    grid: str | Sequence[float] | Tensor | None = ...,
    guidance: Guidance | None = ...,
    steering: Steering | None = ...,
    corrector: Corrector | None = ...,
    generator: Generators | None = ...,
    dtype: torch.dtype | None = ...,
    device: torch.device | str | None = ...,
    callback: Callable[[Step], None] | None = ...,
    check_finite: bool | None = ...,
    return_info: Literal[False] = ...,
) -> Tensor: ...


@overload
def sample(
    denoiser: Model,
    x_T_or_shape: Tensor | Sequence[int] | Step,
    *,
    process: ProbabilityPath | None = ...,
    solver: Solver,
    steps: int | None = ...,
    nfe: int | None = ...,
    grid: str | Sequence[float] | Tensor | None = ...,
    guidance: Guidance | None = ...,
    steering: Steering | None = ...,
    corrector: Corrector | None = ...,
    generator: Generators | None = ...,
    dtype: torch.dtype | None = ...,
    device: torch.device | str | None = ...,
    callback: Callable[[Step], None] | None = ...,
    check_finite: bool | None = ...,
    return_info: Literal[True],
) -> tuple[Tensor, SamplingInfo]: ...


class _Start(checks.Kind):
    words = "a tensor or a shape (B, ...)"

    def like(self, value: Any) -> bool:
        return isinstance(value, (Tensor, Step)) or (
            isinstance(value, Sequence) and not isinstance(value, (str, bytes))
        )

    def __call__(self, name: str, value: Any) -> Any:
        if isinstance(value, Sequence) and not len(value):
            raise TypeError(f"{name} must be {self.words}, got {checks.shown(value)}")
        if isinstance(super().__call__(name, value), (Tensor, Step)):
            return value
        return [checks.integer(f"{name}[{i}]", n, least=0) for i, n in enumerate(value)]


_RUN: dict[str, checks.Kind] = dict(
    denoiser=MODEL, process=PATH | None, solver=SOLVER,
    steps=STEPS | None, nfe=STEPS | None, guidance=GUIDANCE | None, check_finite=checks.optional_flag,
)  # fmt: skip


@checks.arguments(
    **_RUN, x_T_or_shape=_Start(), grid=checks.text | TIMES | None,
    steering=checks.Like("a Steering (an instance, not the class)", "particles", "step") | None, corrector=CORRECTOR | None,
    generator=checks.generators | None, dtype=checks.dtype | None, device=checks.device | None,
    callback=checks.Function("a function of a Step", 1) | None, return_info=checks.flag,
)  # fmt: skip
@torch.no_grad()
def sample(
    denoiser: Model,
    x_T_or_shape: Tensor | Sequence[int] | Step,
    *,
    process: ProbabilityPath | None = None,
    solver: Solver,
    steps: int | None = None,
    nfe: int | None = None,
    grid: str | Sequence[float] | Tensor | None = None,
    guidance: Guidance | None = None,
    steering: Steering | None = None,
    corrector: Corrector | None = None,
    generator: Generators | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    callback: Callable[[Step], None] | None = None,
    check_finite: bool | None = None,
    return_info: bool = False,
) -> Tensor | tuple[Tensor, SamplingInfo]:
    """Generate: run a solver from noise to data.

    Args:
        denoiser: a :class:`Denoiser`, or any callable ``(x, t) -> Prediction``. It is given x in the dtype of the start.
        x_T_or_shape: the start, shape (B, ...), at the first time of the grid; or a shape, whose start is drawn from the
            denoiser's ``prior`` where it has one, else from ``process.prior``. With steering a shape counts systems,
            (batch, ...), and a tensor holds particles, (batch * k, ...). Or a :class:`Step` that a callback was given in an
            earlier run with the same arguments: go on from there, with what solver, guidance and steering remembered. The
            step stays as it is. Of a discrete process a start holds integers.
        process: left out, the denoiser's own.
        solver: how to step.
        steps, nfe: the number of steps, or the largest number of evaluations; exactly one, unless ``grid`` holds times or
            the solver is adaptive.
        grid: the kind of time grid (default: the solver's own choice), or the decreasing times themselves.
        guidance: how the conditional and the unconditional prediction are combined; the denoiser must have both.
        steering: how trajectories are weighed and resampled.
        corrector: changes the predicted clean data, ``(x0, t) -> x0``, after guidance.
        generator: all randomness comes from it (from torch's default one where it is left out). On the start's device. A list
            holds one for each row: a sample then does not depend on its batch.
        dtype, device: of the start that is drawn for a shape. (For a Step ``dtype`` is what the denoiser is given x in: that of a
            half precision run, whose own state is in float32.)
        callback: called after each step (after steering) with the solver's :class:`Step`; the run goes on from its ``x``, which
            may be changed in place or be another tensor.
        check_finite: look for NaN and infinity in every prediction. Default: on the CPU every time; elsewhere only in the
            final sample, because each look waits for the device, and not at all while a CUDA graph is captured.
        return_info: also return a :class:`SamplingInfo`.

    Returns:
        Samples in the start's shape and dtype (of a half precision start the state is kept in float32 on the way); with
        steering what ``steering.select`` returns.

    Raises:
        ValueError: arguments that contradict each other or the process, a start that is no state of the process, a generator on
            another device, or predictions that are not finite (naming the evaluation and t).
    """
    process = _process_of(denoiser, process)
    _check_parts(denoiser, process, solver, guidance, steering, corrector)
    if isinstance(grid, str) or grid is None:
        asked = nfe if steps is None else steps
        solver = solver if asked is None else solver.with_steps(asked)
        times = _times(process, solver, steps, nfe, grid)
    elif steps is None and nfe is None:
        times = process.check_times(grid)
        solver = solver.with_steps(len(times) - 1)
    else:
        raise ValueError("grid holds the times; leave out steps and nfe")
    if isinstance(x_T_or_shape, Step):
        began, x = x_T_or_shape, _start(process, x_T_or_shape.x, steering, generator, None, device)
    else:
        prior = getattr(denoiser, "prior", None)
        began, x = None, _start(process, x_T_or_shape, steering, generator, dtype, device, prior)
    count = None if solver.adaptive else len(times) - 1
    dtype = None if process.is_discrete else dtype or x.dtype
    evaluator = Evaluator(
        denoiser, guidance=guidance, corrector=corrector, dtype=dtype, check_finite=check_finite, steps=count
    )
    loop = _Loop(evaluator, x, solver, steering, generator, callback, began)
    result = loop.run(times, process)
    return (result, loop.info) if return_info else result


@checks.arguments(**_RUN, x=checks.Tensor(floating=True, least_ndim=1), grid=checks.text | None)
def invert(
    denoiser: Model,
    x: Tensor,
    *,
    process: ProbabilityPath | None = None,
    solver: Solver,
    steps: int | None = None,
    nfe: int | None = None,
    grid: str | None = None,
    guidance: Guidance | None = None,
    check_finite: bool | None = None,
) -> Tensor:
    """From data back to noise: the solver's own grid, run in increasing time. What :func:`sample` undoes.

    Args:
        x: data at the last time of the grid (t_min), shape (B, ...).
        process, solver, steps, nfe, grid, guidance, check_finite: as for :func:`sample`.

    Returns:
        The noise at t_max, in x's shape and dtype.

    Raises:
        ValueError: as :func:`sample`; a stochastic solver.
    """
    process = _process_of(denoiser, process)
    if solver.stochastic:
        raise ValueError(f"only a deterministic solver can be inverted, got {solver!r}")
    _check_parts(denoiser, process, solver, guidance, None, None)
    times = _times(process, solver, steps, nfe, grid)
    with torch.no_grad():
        x = _start(process, x, None, None, None, None)
        count = None if solver.adaptive else len(times) - 1
        evaluator = Evaluator(denoiser, guidance=guidance, dtype=x.dtype, check_finite=check_finite, steps=count)
        return _Loop(evaluator, x, solver, None, None, None, None).run(times[::-1], process)


def _times(
    process: ProbabilityPath, solver: Solver, steps: int | None, nfe: int | None, grid: str | None
) -> list[float]:
    if grid is not None and type(process).grid.__module__.startswith("polyak.generate.process"):
        checks.one_of("grid", grid, GRIDS)
    with unwatched(), torch.device("cpu"):
        return process.check_times(solver.times(process, steps=steps, nfe=nfe, grid=grid))


def _process_of(denoiser: Model, process: ProbabilityPath | None) -> ProbabilityPath:
    own = getattr(denoiser, "process", None)
    if process is None:
        if own is None:
            raise ValueError("process is needed: this denoiser does not have one")
        return own
    if own is not None and own != process:
        raise ValueError(f"process must be the denoiser's own, {own!r}, got {process!r}")
    return process


def _check_parts(
    denoiser: Model,
    process: ProbabilityPath,
    solver: Solver,
    guidance: Guidance | None,
    steering: Steering | None,
    corrector: Corrector | None,
) -> None:
    if solver.discrete != process.is_discrete:
        which = "integer states only, which {} has not" if solver.discrete else "numbers, not integer states of {}"
        raise ValueError(f"{solver!r} steps through {which.format(repr(process))}; use another solver")
    if solver.needs_gaussian and not process.is_gaussian:
        raise ValueError(f"{solver!r} needs Gaussian noise, which {process!r} has not; use a deterministic solver")
    if guidance is not None and guidance.paired and not hasattr(denoiser, "pair"):
        raise ValueError(f"{guidance!r} needs a Denoiser with an unconditional prediction, got {denoiser!r}")
    if corrector is not None and solver.no_corrector:
        raise ValueError(f"corrector cannot be used: {solver.no_corrector}")
    if steering is not None and steering.resamples and not solver.stochastic:
        raise ValueError(f"deterministic solver {solver!r}: resampled copies never separate; use one with eta > 0")


def _start(
    process: ProbabilityPath,
    given: Tensor | Sequence[int],
    steering: Steering | None,
    generator: Generators | None,
    dtype: torch.dtype | None,
    device: torch.device | str | None,
    prior: Callable[..., Tensor] | None = None,
) -> Tensor:
    k = 1 if steering is None else checks.integer("steering.particles", steering.particles, least=1)
    several = generator if isinstance(generator, Sequence) else [] if generator is None else [generator]
    if not isinstance(given, Tensor):
        rows, *event = given
        return (prior or process.prior)((rows * k, *event), generator=generator, dtype=dtype, device=device)
    if dtype is not None or device is not None:
        raise ValueError("dtype and device follow the start; give them with a shape only")
    process.check_state("x_T_or_shape", given)
    if len(given) % k:
        raise ValueError(f"x_T must hold k={k} particles for each system, got {len(given)} rows")
    if isinstance(generator, Sequence) and len(generator) != len(given):
        raise ValueError(f"generator must be one, or one for each of the {len(given)} rows, got {len(generator)}")
    for one in several:
        if one.device.type != given.device.type:
            raise ValueError(f"generator must be on x_T's device {given.device}, got {one.device}")
    return given


@dataclass
class _Loop:
    """One run: the answers to a solver's questions, and what has to be remembered between them."""

    evaluator: Evaluator
    start: Tensor
    solver: Solver
    steering: Steering | None
    generator: Generators | None
    callback: Callable[[Step], None] | None
    began: Step | None

    def __post_init__(self) -> None:
        self.info = SamplingInfo()
        self.steered: Any = None
        if self.steering is not None:
            k = self.steering.particles
            batch, init = len(self.start) // k, self.steering.init
            known, asked = (
                {"device": self.start.device, "steps": self.evaluator.steps},
                inspect.signature(init).parameters,
            )
            self.steered = init(batch, k, **{name: value for name, value in known.items() if name in asked})
            self.own = _own_generator(self.generator, self.start.device)
            taken = inspect.signature(self.steering.step).parameters
            self.everything = any(p.kind is p.VAR_KEYWORD for p in taken.values())
            self.taken = set(taken)
        if self.began is not None:
            self.steered = copy.deepcopy(self.began.steering) or self.steered
            if self.began.guidance is not None:
                self.evaluator.state = copy.deepcopy(self.began.guidance)

    def run(self, times: list[float], process: ProbabilityPath) -> Tensor:
        dtype = self.evaluator.dtype or self.start.dtype
        x = self.start.float() if self.start.dtype in HALF else self.start
        if len(x):  # networks need not survive an empty batch
            solver, evaluator = self.solver, self.evaluator
            unheard = self.steering is None and self.callback is None and self.began is None
            if unheard and evaluator.plain and tabled(solver):
                x = self._run_table(solver, x, times, process, dtype)
                self._look_at_the_end(x)
                return x.to(dtype)
            if self.began is None:
                run = self.solver.run(x, times, process, generator=self.generator)
            else:
                run = resume(self.solver, replace(self.began, x=x), times, process, generator=self.generator)
            x = drive(run, self.evaluator, self.done)
            self._look_at_the_end(x)
        self.info.nfe, self.info.evaluations = self.evaluator.nfe, self.evaluator.evaluations
        self.info.queries = [t if isinstance(t, Tensor) else float(t) for t in self.evaluator.queries]
        x = x.to(dtype)
        if self.steering is None:
            return x
        self.info.steering = self.steered
        return self.steering.select(self.steered, x)

    def _run_table(
        self, solver: LinearSolver, x: Tensor, times: list[float], process: ProbabilityPath, dtype: torch.dtype
    ) -> Tensor:
        """Nobody has to be asked or told on the way."""
        check = look if self.evaluator.looks(x) else None
        denoiser: Any = self.evaluator.denoiser
        guidance, state = self.evaluator.on_outputs, self.evaluator.state
        how = {"dtype": dtype, "generator": self.generator, "check": check, "guidance": guidance, "state": state}
        x, stages = run_table(solver, denoiser, x, times, process, **how)
        self.info.nfe = len(stages)
        self.info.evaluations = len(stages) * (1 if guidance is None else 2)
        self.info.queries = [float(stage.t) for stage in stages]
        firsts = [float(stage.t) for stage in stages if stage.first]
        self.info.steps = list(zip(firsts, (float(stage.to) for stage in stages if stage.last), strict=False))
        return x

    def _look_at_the_end(self, x: Tensor) -> None:
        if self.evaluator.check_finite is not None or x.is_meta or isinstance(x, FakeTensor):
            return
        if x.is_cuda and torch.cuda.is_current_stream_capturing():
            return
        if not bool(x.isfinite().all()):
            raise ValueError("the sample is not finite; run with check_finite=True to find the evaluation")

    def done(self, step: Step) -> Change | None:
        """steering, and then whoever listens"""
        change = None
        if self.steering is not None:
            change = self._steer(step)
        self.info.steps.append((float(step.s), float(step.t)))
        if self.callback is not None:
            # Copies: the run goes on in its own.
            step.guidance, step.steering = copy.deepcopy((self.evaluator.state, self.steered))
            x, before = step.x, _version(step.x)
            self.callback(step)
            if step.x is not x or not _same(x, before):
                change = Change(step.x, None if change is None else change.ancestors)
        return change

    def _steer(self, step: Step) -> Change | None:
        assert self.steering is not None
        evaluator, guided = self.evaluator, self.evaluator.guided
        known = {"mean": step.mean, "std": step.std, "cond": evaluator.cond, "uncond": evaluator.uncond}
        if self.everything or "log_ratio" in self.taken:
            known["log_ratio"] = _log_ratio(step, evaluator)
        # What moved at an earlier step is not to be moved again.
        state = self.steered.moved(None) if hasattr(self.steered, "moved") else self.steered
        x, self.steered = self.steering.step(
            state,
            step.x,
            pred=guided,
            x0_hat=getattr(guided, "x0", None),
            step=step.index,
            t=step.s,
            t_next=step.t,
            last=step.last,
            generator=self.own,
            **{name: value for name, value in known.items() if self.everything or name in self.taken},
        )
        ancestors = self.steered.ancestors
        if ancestors is not None:
            if evaluator.guidance is not None:
                evaluator.state = evaluator.guidance.reindex(evaluator.state, ancestors)
            if hasattr(step.memory, "take"):
                step.memory = step.memory.take(ancestors)
        if ancestors is None and x is step.x:
            return None
        step.x, step.mean = x, None if step.mean is None or ancestors is None else step.mean.index_select(0, ancestors)
        return Change(x, ancestors)


def _version(x: Tensor) -> int | Tensor:
    """What tells whether x is changed in place: its counter of writes, or a copy where it has none."""
    return x.clone() if x.is_inference() else x._version


def _same(x: Tensor, before: int | Tensor) -> bool:
    return torch.equal(x, before) if isinstance(before, Tensor) else x._version == before


def _log_ratio(step: Step, evaluator: Evaluator) -> Tensor | None:
    """log N(x; mean without guidance and correction, std^2 I) - log N(x; mean, std^2 I), (B,), float64 where there is such."""
    if step.mean is None or step.std is None or step.gain is None:
        return None
    view, weight = step.gain
    kind = wide(step.x.device)
    z = (step.x - step.mean).flatten(1).to(kind) / step.std
    if evaluator.guided is evaluator.cond:
        return z.new_zeros(len(z))
    moved = getattr(evaluator.cond, view) - getattr(evaluator.guided, view)
    shift = moved.flatten(1).to(kind) * (weight / step.std)
    return (z * shift - shift.square() / 2).sum(1)


def _own_generator(generator: Generators | None, device: torch.device) -> torch.Generator | None:
    """A generator for steering, which follows from the run's own without drawing from it."""
    if generator is None:
        return None
    first = generator[0] if isinstance(generator, Sequence) else generator
    state = first.get_state().numpy().tobytes()
    seed = int.from_bytes(hashlib.blake2b(state, digest_size=7).digest(), "little")
    return torch.Generator(device).manual_seed(seed)
