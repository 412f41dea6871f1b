"""``add_noise``: noise at given timesteps, for training, image to image and inpainting."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from polyak.generate.adapters.diffusers import schedule
from polyak.generate.adapters.diffusers.plan import Plan
from polyak.generate.prediction import edm_input_scaling
from polyak.generate.process import expand, wide


class Noising:
    """What a scheduler knows of noise without a run."""

    _plan: Plan
    _times: list[float]
    _asked: list[float]
    process: Any
    timesteps: Tensor
    config: Any
    _planned: list[float]
    _refresh: Callable[[], bool]
    _follow: Callable[[], None]

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """``alpha x0 + sigma noise`` at the given timesteps, shape (B,) or one for all."""
        alpha, sigma = self._moments(timesteps, original_samples)
        return alpha * original_samples + sigma * noise

    def scale_noise(self, sample: Tensor, timestep: Tensor, noise: Tensor | None = None) -> Tensor:
        """The same, in the order of arguments of diffusers' flow schedulers."""
        if noise is None:
            raise ValueError("noise is needed")
        return self.add_noise(sample, noise, torch.as_tensor(timestep))

    def get_velocity(self, sample: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """``alpha noise - sigma sample``, the target of a v-predicting network, for a chain's scaled samples."""
        alpha, sigma = self._moments(timesteps, sample)
        scale = (alpha**2 + sigma**2) ** -0.5
        return scale * (alpha * noise - sigma * sample)

    def _moments(self, timesteps: Tensor, x: Tensor) -> tuple[Any, Any]:
        """alpha and sigma of timesteps: of those that are planned exactly, of others by the process."""
        if not self._times:
            self._refresh()
        kind = wide(timesteps.device)
        labels = timesteps.to(kind)
        t = schedule.times_of(self._plan, self.process, labels)
        if self._times:
            self._follow()
            planned = torch.tensor(self._planned, dtype=torch.float32, device=labels.device)
            same = labels.to(torch.float32).reshape(-1, 1) == planned
            times = torch.tensor(self._asked, dtype=kind, device=labels.device)
            t = torch.where(same.any(1), times[same.int().argmax(1)], t.reshape(-1)).reshape(t.shape)
        t = t.to(x.device)
        if t.ndim and len(t) != len(x):
            t = t.expand(len(x))
        return expand(self.process.alpha(t), x), expand(self.process.sigma(t), x)

    @property
    def betas(self) -> Tensor:
        """The chain's betas, where there is a chain."""
        return self._chain().betas

    @property
    def alphas(self) -> Tensor:
        """``1 - beta``, where there is a chain."""
        return 1 - self._chain().betas

    @property
    def alphas_cumprod(self) -> Tensor:
        """The products of ``alphas``, where there is a chain."""
        return self._chain().alphas_cumprod

    @property
    def final_alpha_cumprod(self) -> Tensor:
        """What the last step ends on, where there is a chain."""
        one = self._plan.config.get("set_alpha_to_one", True)
        return self._chain().alphas_cumprod.new_tensor(1.0) if one else self._chain().alphas_cumprod[0]

    def _chain(self) -> Any:
        table = self._plan.table
        if table is None:
            raise AttributeError(f"{self._plan.process!r} has no betas")
        return table

    # --- of flow matching schedulers, and EDM's

    @property
    def shift(self) -> float:
        """A flow's shift."""
        return self._of_flow("shift")

    @property
    def sigma_min(self) -> float:
        """The lowest level of all timesteps of a flow."""
        self._of_flow("sigma_min")
        return min(self._training_levels)

    @property
    def sigma_max(self) -> float:
        """The highest level of all timesteps of a flow."""
        self._of_flow("sigma_max")
        return max(self._training_levels)

    def _of_flow(self, name: str) -> Any:
        if self._plan.facts.family != "flow":
            raise AttributeError(f"{type(self).__name__!r} of {self._plan.origin} has no {name!r}")
        return self.config.get(name)

    @property
    def _training_levels(self) -> list[float]:
        return schedule.training(self._plan)[1]

    def time_shift(self, mu: float, sigma: float, t: Any) -> Any:
        """Times of a flow, shifted by mu as ``time_shift_type`` says."""
        scale = math.exp(mu) if self.config.get("time_shift_type", "exponential") == "exponential" else mu
        return scale / (scale + (1 / t - 1) ** sigma)

    def _get_conditioning_c_in(self, sigma: Any) -> Any:
        """EDM's scale of a further input of its network, which Cosmos asks for."""
        return edm_input_scaling(sigma, self._plan.sigma_data)
