"""Steering: how a population of trajectories is weighed and resampled while it is generated.

Particles are rows: ``batch`` systems of ``k`` particles are a tensor of ``batch * k`` rows, those of one system adjacent.
Log-weights live in the state, in float64, and are carried between resamplings.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from polyak.core import checks


@checks.arguments(
    logw=checks.Tensor(floating=True, ndim=2),
    log_z=checks.Tensor(floating=True, ndim=1),
    ancestors=checks.Tensor(ndim=1) | None,
)
@dataclass(frozen=True)
class SteeringState:
    """The weights of a population. Systems extend it with what they carry along (past rewards, clocks).

    Attributes:
        logw: (batch, k), unnormalised log-weights since the last resampling, float64.
        log_z: (batch,), the accumulated log-evidence, float64.
        ancestors: (batch * k,) int64 if the last step moved particles: row i came from row ``ancestors[i]``; else None.
    """

    logw: Tensor
    log_z: Tensor
    ancestors: Tensor | None = None

    @classmethod
    def uniform(cls, batch: int, k: int, *, device: torch.device | str | None = None) -> SteeringState:
        """Equal weights."""
        logw = torch.zeros(batch, k, dtype=torch.float64, device=device)
        return cls(logw, torch.zeros(batch, dtype=torch.float64, device=device))

    def moved(self, ancestors: Tensor | None) -> SteeringState:
        """The same weights, with what the step moved."""
        return replace(self, ancestors=ancestors)


@runtime_checkable
class Steering(Protocol):
    """What sampling asks of a steering."""

    @property
    def particles(self) -> int:
        """k, the particles per system."""
        ...

    @property
    def resamples(self) -> bool:
        """Whether particles are ever copied; then a deterministic solver is refused, whose copies never separate."""
        ...

    def init(self, batch: int, k: int) -> SteeringState:
        """The state at the start. One with an argument ``device`` is told where the particles are, one with an argument ``steps``
        the number of steps (None where the solver finds its steps itself)."""
        ...

    def step(self, state: Any, x_next: Tensor, *args: Any, **told: Any) -> tuple[Tensor, Any]:
        """Weigh the population after a solver's step from t to t_next, and resample it if its time has come.

        It is told all of these by keyword; what comes after the generator only where it has arguments of these names.

        Args:
            state: as the last step returned it, without its ancestors.
            x_next: (batch * k, ...), the states at t_next.
            pred, x0_hat: the prediction at the step's start, guided and corrected, and its x0, where it has one.
            step: the step's index, from 0; ``last`` marks the last one.
            t, t_next: the times of the step.
            generator: the steering's own, seeded from the run's; the solver's noise is the same without it.
            mean, std: of the Gaussian that x_next was drawn from; None after a deterministic step.
            log_ratio: (batch * k,), float64: log of the density of this transition without guidance and correction over the one
                that it was drawn from; None after a deterministic step.
            cond, uncond: the predictions before guidance; the same one where the guidance needed no second.

        Returns:
            The states, reordered by ``state.ancestors`` where that is not None, and the new state.
        """
        ...

    def select(self, state: Any, x: Tensor) -> Tensor:
        """What is returned of the final population x of (batch * k, ...)."""
        ...


def rows_of(ancestors: Tensor) -> Tensor:
    """Ancestors (batch, k), each one's place among the k of its system, as rows (batch * k,) of the population."""
    batch, k = ancestors.shape
    return (ancestors + k * torch.arange(batch, device=ancestors.device)[:, None]).flatten()
