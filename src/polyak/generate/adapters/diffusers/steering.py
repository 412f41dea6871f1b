"""Steering in pipelines as they are: particles are weighed and resampled between their steps."""

from __future__ import annotations

import functools
import inspect
from typing import Any

import numpy as np
import torch
from torch import Tensor

from polyak.core import checks
from polyak.generate.adapters.diffusers.scheduler import PolyakScheduler
from polyak.generate.steering import Steering

_PIPE = checks.Like("a pipeline (its scheduler can step)", "scheduler")
_STEERING = checks.Like("a Steering (an instance, not the class)", "particles", "step")
_SAME = 1e-3  # of the largest value: what two runs from one state may differ by without noise
_NO_NOISE = "resampled copies never separate: "


class FKCallback:
    """What :func:`fk_callback` did to a pipeline; :meth:`remove` undoes it, as does leaving a ``with`` block.

    Attributes:
        state: the steering's, of the last run.
    """

    @checks.arguments(pipe=_PIPE, steering=_STEERING)
    def __init__(self, pipe: Any, steering: Steering) -> None:
        if not callable(getattr(pipe.scheduler, "step", None)):
            raise ValueError(f"pipe must have a scheduler that can step, got {checks.shown(pipe.scheduler)}")
        self.pipe, self.steering, self.scheduler = pipe, steering, pipe.scheduler
        self.state: Any = None
        # Pipelines without the callback are steered by what their scheduler returns.
        self._alone = "callback_on_step_end" not in inspect.signature(type(pipe).__call__).parameters
        if "step" in vars(self.scheduler):
            raise ValueError("pipe is steered already: remove() that callback first")
        self._plain = plain = self.scheduler.step
        self._signature = inspect.signature(plain)
        self._heard: tuple[Any, Tensor] | None = None  # the run's timesteps, and the predicted data
        self._run: Any = None
        self._index, self._at, self._copies = 0, -1, None

        @functools.wraps(plain)  # pipelines look at its signature
        def step(*args: Any, **kwargs: Any) -> Any:
            return self._step(*args, **kwargs)

        self.scheduler.step = step

    # --- what the pipeline calls

    def __call__(self, pipe: Any, step: int, timestep: Any, callback_kwargs: dict[str, Any]) -> dict[str, Any]:
        """``callback_on_step_end`` of the pipeline: its latents, resampled.

        Raises:
            ValueError: latents that are not k for each prompt, or are not handed over; another scheduler than at first.
        """
        if "latents" not in callback_kwargs:
            raise ValueError('callback_on_step_end_tensor_inputs must have "latents"')
        if self._heard is None or pipe.scheduler is not self.scheduler:
            raise ValueError("pipe has another scheduler than when fk_callback was called; call it again")
        count = getattr(pipe, "num_timesteps", None) or len(self.scheduler.timesteps)
        (_, x0), self._heard = self._heard, None
        moved = self._moved(callback_kwargs["latents"], x0, int(step), count, timestep)
        return {**callback_kwargs, "latents": moved}

    def _step(self, *args: Any, **kwargs: Any) -> Any:
        """The scheduler's step, which tells what data it predicts."""
        given = self._signature.bind(*args, **kwargs)
        named = given.arguments
        self._look_for_noise(named)
        output, timestep, sample = (named[name] for name in ("model_output", "timestep", "sample"))
        plain = named.get("return_dict", True)
        if "return_dict" in self._signature.parameters:
            named["return_dict"] = True
        t = self.scheduler.asks(timestep)[1] if isinstance(self.scheduler, PolyakScheduler) else None
        made = self._plain(*given.args, **given.kwargs)
        x0 = _prediction(self.scheduler, made, output, sample, t)
        run = self.scheduler.timesteps
        if self._alone:
            self._index = 0 if run is not self._run or self.state is None else self._index + 1
            self._run = run
            made.prev_sample = self._moved(made.prev_sample, x0, self._index, len(run), timestep)
        else:
            if self._heard is not None and self._heard[0] is run:
                raise ValueError("fk_callback steers between steps: hand it to the pipeline, callback_on_step_end=...")
            self._heard = run, x0
        return made if plain else made.to_tuple()

    def _moved(self, x: Tensor, x0: Tensor, index: int, count: int, timestep: Any) -> Tensor:
        k = self.steering.particles
        if len(x) % k:
            raise ValueError(
                f"the pipeline must make k={k} samples for each prompt (num_images_per_prompt={k}), got {len(x)} rows"
            )
        last = index >= count - 1
        if index == 0 or self.state is None or index <= self._at:
            self.state, self._copies = self._init(len(x) // k, k, x.device, count), None
        elif self._copies is not None and not last:
            self._look_at_copies(x)
        self._at = index
        state = self.state.moved(None) if hasattr(self.state, "moved") else self.state
        known = {
            "pred": None,
            "x0_hat": x0,
            "step": index,
            "t": timestep,
            "t_next": 0.0,
            "last": last,
            "generator": None,
        }
        if not last:
            known["t_next"] = self.scheduler.timesteps[min(index + 1, len(self.scheduler.timesteps) - 1)]
        moved, self.state = self.steering.step(state, x, **known)
        if (rows := self.state.ancestors) is not None and not last:
            self._move_memory(rows, x.shape)
            if self._copies is None and self.steering.resamples:
                self._copies = _two_of_one(rows)
        return moved

    def _init(self, batch: int, k: int, device: torch.device, steps: int) -> Any:
        known, asked = {"device": device, "steps": steps}, inspect.signature(self.steering.init).parameters
        return self.steering.init(batch, k, **{name: value for name, value in known.items() if name in asked})

    # --- copies need noise

    def _look_for_noise(self, named: dict[str, Any]) -> None:
        if not self.steering.resamples:
            return
        if isinstance(self.scheduler, PolyakScheduler):
            if not self.scheduler.solver.stochastic:
                raise ValueError(f"deterministic solver {self.scheduler.solver!r}: {_NO_NOISE}use one with eta > 0")
        elif "eta" in self._signature.parameters and not named.get("eta", self._signature.parameters["eta"].default):
            raise ValueError(f"deterministic solver: {_NO_NOISE}call the pipeline with eta=1.0, got eta=0")

    def _look_at_copies(self, x: Tensor) -> None:
        """One step after the first copies were made: are they apart? Waits for the device, once in a run."""
        (i, j), self._copies = self._copies, (-1, -1)  # type: ignore[misc]
        if i >= 0 and bool((x[i] - x[j]).abs().max() <= _SAME * x[i].abs().max()):
            name = type(self.scheduler).__name__
            raise ValueError(
                f"deterministic solver {name}: {_NO_NOISE}use a stochastic one, DDIMScheduler with eta=1.0, say"
            )

    # --- what moves along

    def _move_memory(self, rows: Tensor, shape: torch.Size) -> None:
        """Re-index what the scheduler remembers of each sample: all that has the shape of the samples."""
        if isinstance(self.scheduler, PolyakScheduler):
            self.scheduler.reindex(rows)
            return

        def taken(value: Any) -> Any:
            if isinstance(value, Tensor):
                return value.index_select(0, rows) if value.shape == shape else value
            if type(value) in (list, tuple):
                return type(value)(taken(one) for one in value)
            return value

        for name, value in vars(self.scheduler).items():
            if isinstance(value, Tensor) or type(value) in (list, tuple):
                setattr(self.scheduler, name, taken(value))

    # --- after the run

    def select(self, images: Any) -> Any:
        """The images that the steering picks, of all that the pipeline returned: a list, an array or a tensor, as they are.

        Raises:
            ValueError: no run, or another number of images.
        """
        if self.state is None:
            raise ValueError("select needs a run of the pipeline before it")
        count = self.state.logw.numel()
        if len(images) != count:
            raise ValueError(f"images must be all {count} of the last run, got {len(images)}")
        rows = self.steering.select(self.state, torch.arange(count, device=self.state.logw.device)).tolist()
        return images[rows] if isinstance(images, Tensor | np.ndarray) else [images[i] for i in rows]

    def remove(self) -> None:
        """The pipeline runs as it did before."""
        vars(self.scheduler).pop("step", None)

    def __enter__(self) -> FKCallback:
        return self

    def __exit__(self, *error: Any) -> None:
        self.remove()


@checks.arguments(pipe=_PIPE, steering=_STEERING)
def fk_callback(pipe: Any, steering: Steering) -> FKCallback:
    """Steer a diffusers pipeline, as it is, by a reward.

        callback = fk_callback(pipe, FKSteering(reward, num_particles=4, decode=decode))
        images = pipe(prompts, num_images_per_prompt=4, eta=1.0, callback_on_step_end=callback).images
        best = callback.select(images)  # one for each prompt

    The scheduler's ``step`` is wrapped to hear the data that it predicts. Pipelines that know no ``callback_on_step_end``
    (DDPMPipeline, DDIMPipeline) are steered from there, and need not be handed anything.

    Args:
        pipe: any whose scheduler draws noise: DDIMScheduler with ``eta=1.0``, DDPM, Euler ancestral, LCM, SDE-DPM-Solver++,
            stochastic flow matching, or a PolyakScheduler with a stochastic solver. It makes k samples for each prompt, adjacent.
        steering: an :class:`polyak.generate.FKSteering`, or another that goes by predicted data. Rewards are of latents, unless
            it decodes them.

    Raises:
        ValueError: when the pipeline runs: no noise, a scheduler that does not tell its predicted data, samples that are not k for
            each prompt, a callback that is not handed over.
    """
    return FKCallback(pipe, steering)


def _two_of_one(rows: Tensor) -> tuple[int, int] | None:
    """Two rows with one ancestor, where there are such."""
    seen: dict[int, int] = {}
    for i, ancestor in enumerate(rows.tolist()):
        if ancestor in seen:
            return seen[ancestor], i
        seen[ancestor] = i
    return None


def _prediction(scheduler: Any, made: Any, output: Tensor, sample: Tensor, t: float | None) -> Tensor:
    """The predicted data of a step that was made, at the time t of a PolyakScheduler."""
    for name in ("pred_original_sample", "denoised"):
        if (found := getattr(made, name, None)) is not None:
            return found
    if t is not None:
        return scheduler.read(output, sample, t).x0
    if str(getattr(scheduler.config, "algorithm_type", "")).endswith("++") and hasattr(scheduler, "model_outputs"):
        return scheduler.model_outputs[-1]
    if "FlowMatch" in type(scheduler).__name__ and getattr(scheduler, "step_index", None):
        return sample - scheduler.sigmas[scheduler.step_index - 1].to(sample) * output
    raise ValueError(
        f"{type(scheduler).__name__} does not tell its predicted data: use DDIMScheduler with eta=1.0, or a PolyakScheduler"
    )
