"""The sampling loop: a denoiser, a process and a solver, with optional guidance, correction and steering.

Per evaluation the order is denoiser -> guidance -> corrector -> solver; per completed step, solver -> steering.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, overload

import torch
from torch import Tensor

from polyak.core import checks
from polyak.generate.guidance import Guidance
from polyak.generate.prediction import Denoiser, Prediction
from polyak.generate.process import Process
from polyak.generate.solver import Change, Query, Solver, Step, check_times, drive
from polyak.generate.steering import Steering

Model = Denoiser | Callable[[Tensor, float], Prediction]
Corrector = Callable[[Tensor, float], Tensor]  # (x0, t) -> x0
HALF = (torch.float16, torch.bfloat16)


@dataclass
class SamplingInfo:
    """What a run of :func:`sample` cost.

    Attributes:
        nfe: points at which the denoiser was asked; what papers count.
        evaluations: network calls (a guided pair is two).
        queries: the times of those points, in order.
        steps: ``(s, t)`` of the completed steps.
        steering: the final steering state, with its weights and evidence; None without steering.
    """

    nfe: int = 0
    evaluations: int = 0
    queries: list[float] = field(default_factory=list)
    steps: list[tuple[float, float]] = field(default_factory=list)
    steering: Any = None


class DynamicThresholding:
    """A corrector for pixel data in [-1, 1] (Imagen, arXiv 2205.11487, section 2.3): never for latents.

    Per sample, q = the ``quantile`` of \\|x0\\| over all its elements, at least ``floor``; x0 is clipped to [-q, q] and divided
    by q (times floor, so that the result lies in [-floor, floor]).
    """

    def __init__(self, quantile: float = 0.995, floor: float = 1.0) -> None:
        self.quantile = checks.between("quantile", quantile, 0.0, 1.0, ends="(]")
        self.floor = checks.positive("floor", floor)

    def __call__(self, x0: Tensor, t: float) -> Tensor:
        magnitude, _ = x0.abs().flatten(1).sort(1)  # torch.quantile is limited to 2^24 elements
        position = self.quantile * (magnitude.shape[1] - 1)
        below = int(position)
        above = min(below + 1, magnitude.shape[1] - 1)
        q = torch.lerp(magnitude[:, below], magnitude[:, above], position - below).clamp(min=self.floor)
        q = q.reshape(-1, *[1] * (x0.ndim - 1))
        return torch.clamp(x0, -q, q) * (self.floor / q)


@overload
def sample(
    denoiser: Model,
    x_T_or_shape: Tensor | Sequence[int],
    *,
    process: Process | None = ...,
    solver: Solver,
    steps: int | None = ...,
    nfe: int | None = ...,
    grid: str | Sequence[float] | Tensor | None = ...,
    guidance: Guidance | None = ...,
    steering: Steering | None = ...,
    corrector: Corrector | None = ...,
    generator: torch.Generator | None = ...,
    dtype: torch.dtype | None = ...,
    device: torch.device | str | None = ...,
    callback: Callable[[Step], None] | None = ...,
    check_finite: bool | None = ...,
    return_info: Literal[False] = ...,
) -> Tensor: ...


@overload
def sample(
    denoiser: Model,
    x_T_or_shape: Tensor | Sequence[int],
    *,
    process: Process | None = ...,
    solver: Solver,
    steps: int | None = ...,
    nfe: int | None = ...,
    grid: str | Sequence[float] | Tensor | None = ...,
    guidance: Guidance | None = ...,
    steering: Steering | None = ...,
    corrector: Corrector | None = ...,
    generator: torch.Generator | None = ...,
    dtype: torch.dtype | None = ...,
    device: torch.device | str | None = ...,
    callback: Callable[[Step], None] | None = ...,
    check_finite: bool | None = ...,
    return_info: Literal[True],
) -> tuple[Tensor, SamplingInfo]: ...


@torch.no_grad()
def sample(
    denoiser: Model,
    x_T_or_shape: Tensor | Sequence[int],
    *,
    process: Process | None = None,
    solver: Solver,
    steps: int | None = None,
    nfe: int | None = None,
    grid: str | Sequence[float] | Tensor | None = None,
    guidance: Guidance | None = None,
    steering: Steering | None = None,
    corrector: Corrector | None = None,
    generator: torch.Generator | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    callback: Callable[[Step], None] | None = None,
    check_finite: bool | None = None,
    return_info: bool = False,
) -> Tensor | tuple[Tensor, SamplingInfo]:
    """Generate: run a solver from noise to data.

    Args:
        denoiser: a :class:`Denoiser`, or any callable ``(x, t) -> Prediction``. It is given x in the dtype of the start.
        x_T_or_shape: the start, shape (B, ...), at the first time of the grid; or a shape, whose start is drawn from
            ``process.prior``. With steering a shape counts systems, (batch, ...), and a tensor holds particles,
            (batch * k, ...).
        process: left out, the denoiser's own.
        solver: how to step.
        steps, nfe: the number of steps, or the largest number of evaluations; exactly one, unless ``grid`` holds times or
            the solver is adaptive.
        grid: the kind of time grid (default: the solver's own choice), or the decreasing times themselves.
        guidance: how the conditional and the unconditional prediction are combined; the denoiser must have both.
        steering: how trajectories are weighed and resampled.
        corrector: changes the predicted clean data, ``(x0, t) -> x0``, after guidance.
        generator: all randomness comes from it (from torch's default one where it is left out). On the start's device.
        dtype, device: of the start that is drawn for a shape.
        callback: called after each step (after steering) with the solver's :class:`Step`.
        check_finite: look for NaN and infinity in every prediction. Default: on the CPU every time; elsewhere only in the
            final sample, because each look waits for the device.
        return_info: also return a :class:`SamplingInfo`.

    Returns:
        Samples in the start's shape and dtype (of a half precision start the state is kept in float32 on the way); with
        steering what ``steering.select`` returns.

    Raises:
        ValueError: arguments that contradict each other or the process, a start that is not floating point, a generator on
            another device, or predictions that are not finite (naming the evaluation and t).
    """
    process = _process_of(denoiser, process)
    _check_parts(denoiser, process, solver, guidance, steering, corrector)
    if isinstance(grid, str) or grid is None:
        times = check_times(solver.times(process, steps=steps, nfe=nfe, grid=grid), process)
    elif steps is None and nfe is None:
        times = check_times(grid, process)
    else:
        raise ValueError("grid holds the times; leave out steps and nfe")
    x = _start(process, x_T_or_shape, steering, generator, dtype, device)
    loop = _Loop(denoiser, x, solver, guidance, steering, corrector, generator, callback, check_finite)
    result = loop.run(times, process)
    return (result, loop.info) if return_info else result


def invert(
    denoiser: Model,
    x: Tensor,
    *,
    process: Process | None = None,
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
    times = check_times(solver.times(process, steps=steps, nfe=nfe, grid=grid), process)
    with torch.no_grad():
        x = _start(process, x, None, None, None, None)
        loop = _Loop(denoiser, x, solver, guidance, None, None, None, None, check_finite)
        return loop.run(times[::-1], process)


def _process_of(denoiser: Model, process: Process | None) -> Process:
    own = getattr(denoiser, "process", None)
    if process is None:
        if own is None:
            raise ValueError("process is needed: this denoiser does not have one")
        return own
    if own is not None and own is not process and own != process:
        raise ValueError(f"process must be the denoiser's own, {own!r}, got {process!r}")
    return process


def _check_parts(
    denoiser: Model,
    process: Process,
    solver: Solver,
    guidance: Guidance | None,
    steering: Steering | None,
    corrector: Corrector | None,
) -> None:
    if not isinstance(solver, Solver):
        raise TypeError(f"solver must be a Solver (an instance, not the class), got {solver!r}")
    if solver.needs_gaussian and not process.is_gaussian:
        raise ValueError(f"{solver!r} needs Gaussian noise, which {process!r} has not; use a deterministic solver")
    if guidance is not None and guidance.paired and not hasattr(denoiser, "pair"):
        raise ValueError(f"{guidance!r} needs a Denoiser with an unconditional prediction, got {denoiser!r}")
    if corrector is not None and solver.no_corrector:
        raise ValueError(f"corrector cannot be used: {solver.no_corrector}")
    if steering is not None and steering.resamples and not solver.stochastic:
        raise ValueError(f"deterministic solver {solver!r}: resampled copies never separate; use one with eta > 0")


def _start(
    process: Process,
    given: Tensor | Sequence[int],
    steering: Steering | None,
    generator: torch.Generator | None,
    dtype: torch.dtype | None,
    device: torch.device | str | None,
) -> Tensor:
    k = 1 if steering is None else checks.integer("steering.particles", steering.particles, least=1)
    if not isinstance(given, Tensor):
        rows, *event = (checks.integer(f"shape[{i}]", n, least=0) for i, n in enumerate(given))
        return process.prior((rows * k, *event), generator=generator, dtype=dtype, device=device)
    if dtype is not None or device is not None:
        raise ValueError("dtype and device follow the start; give them with a shape only")
    if given.ndim == 0 or not given.is_floating_point():
        raise ValueError(
            f"x_T must be a floating-point tensor of shape (B, ...), got {given.dtype}, {tuple(given.shape)}"
        )
    if len(given) % k:
        raise ValueError(f"x_T must hold k={k} particles for each system, got {len(given)} rows")
    if generator is not None and generator.device.type != given.device.type:
        raise ValueError(f"generator must be on x_T's device {given.device}, got {generator.device}")
    return given


@dataclass
class _Loop:
    """One run: the answers to a solver's questions, and what has to be remembered between them."""

    denoiser: Model
    start: Tensor
    solver: Solver
    guidance: Guidance | None
    steering: Steering | None
    corrector: Corrector | None
    generator: torch.Generator | None
    callback: Callable[[Step], None] | None
    check_finite: bool | None

    def __post_init__(self) -> None:
        self.info = SamplingInfo()
        self.guided = self.guidance.init() if self.guidance is not None else None
        self.first: Prediction | None = None
        if self.steering is not None:
            k = self.steering.particles
            self.steered = self.steering.init(len(self.start) // k, k)

    def run(self, times: list[float], process: Process) -> Tensor:
        dtype = self.start.dtype
        x = self.start.float() if dtype in HALF else self.start
        if len(x):  # networks need not survive an empty batch
            x = drive(self.solver.run(x, times, process, generator=self.generator), self.answer, self.done)
            if self.check_finite is None and x.device.type != "cpu" and not bool(x.isfinite().all()):
                raise ValueError("the sample is not finite; run with check_finite=True to find the evaluation")
        x = x.to(dtype)
        if self.steering is None:
            return x
        self.info.steering = self.steered
        return self.steering.select(self.steered, x)

    def answer(self, query: Query) -> Prediction:
        """denoiser -> guidance -> corrector"""
        x, t = query.x.to(self.start.dtype), query.t
        self.info.nfe += 1
        self.info.queries.append(t)
        if self.guidance is not None and self.guidance.paired:
            cond, uncond = (self._checked(p, query) for p in self.denoiser.pair(x, t))  # type: ignore[union-attr]
            self.info.evaluations += 2
        else:
            cond = uncond = self._checked(self.denoiser(x, t), query)
            self.info.evaluations += 1
        prediction = cond
        if self.guidance is not None:
            prediction = self.guidance(cond, uncond, self.guided, update=query.first)
        if self.corrector is not None:
            prediction = prediction.replace(self.corrector(prediction.x0, t), "sample")
        if query.first:
            self.first = prediction
        return prediction

    def _checked(self, prediction: Prediction, query: Query) -> Prediction:
        if not isinstance(prediction, Prediction):
            raise TypeError(
                f"denoiser must return a Prediction, got {type(prediction).__name__}; wrap it in Denoiser(...)"
            )
        look = prediction.output.device.type == "cpu" if self.check_finite is None else self.check_finite
        if look and not bool(prediction.output.isfinite().all()):
            what = "NaN" if bool(prediction.output.isnan().any()) else "infinity"
            raise ValueError(f"{what} in the prediction of evaluation {self.info.nfe} at t={query.t:.6g}")
        return prediction if query.x.dtype == self.start.dtype else prediction.rebase(query.x)

    def done(self, step: Step) -> Change | None:
        """steering, and then whoever listens"""
        change = None
        if self.steering is not None:
            change, step = self._steer(step)
        self.info.steps.append((step.s, step.t))
        if self.callback is not None:
            self.callback(step)
        return change

    def _steer(self, step: Step) -> tuple[Change | None, Step]:
        assert self.steering is not None
        assert self.first is not None
        x, self.steered = self.steering.step(
            self.steered,
            step.x,
            pred=self.first,
            x0_hat=self.first.x0,
            step=step.index,
            t=step.s,
            t_next=step.t,
            last=step.last,
            generator=self.generator,
        )
        ancestors = self.steered.ancestors
        if ancestors is None and x is step.x:
            return None, step
        if ancestors is not None and self.guidance is not None:
            self.guided = self.guidance.reindex(self.guided, ancestors)
        return Change(x, ancestors), Step(x, step.s, step.t, step.index, step.last)
