"""A denoiser in the scaled variable ``y = x / alpha``, whose noise level is ``sigma_hat = sigma / alpha``.

There every Gaussian process is variance exploding: ``y = x0 + sigma_hat eps``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from polyak.core import checks
from polyak.generate.evaluate import HALF, Evaluator, Model
from polyak.generate.fields import check_process
from polyak.generate.process import Process, expand
from polyak.generate.solver import Query

_FORGIVEN = 1e-6  # what rounding of sigma_hat may miss of an end of the range


class Scaled:
    """Predictions at (y, sigma), sigma one for each row.

    Args:
        denoiser, process: of the model; the process Gaussian, and the denoiser's own.
        dtype: what the denoiser is given x in.

    Attributes:
        nfe: points at which it was asked, each for the whole batch.
    """

    def __init__(self, denoiser: Model, process: Process, dtype: torch.dtype | None = None) -> None:
        self.denoiser, self.process = denoiser, process
        self.evaluator = Evaluator(denoiser, dtype=dtype)

    @property
    def nfe(self) -> int:
        return self.evaluator.nfe

    def floor(self, sigma_min: float) -> float:
        """sigma_min, or the model's smallest level where that is above it."""
        return max(sigma_min, self.process.sigma_hat(self.process.t_min))

    def time(self, sigma: Tensor) -> Tensor:
        """The process's time at which ``sigma_hat`` is sigma, within its range."""
        return self.process.t_of_lam(-sigma.log()).clamp(self.process.t_min, self.process.t_max)

    def predict(self, x: Tensor, t: Tensor) -> Any:
        """The prediction at the process's own (x, t)."""
        return self.evaluator(Query(x, t))

    def at(self, y: Tensor, sigma: Tensor) -> Any:
        """The prediction at (y, sigma)."""
        t = self.time(sigma)
        return self.predict(expand(self.process.alpha(t), y) * y, t)

    def eps(self, y: Tensor, sigma: Tensor) -> Tensor:
        """``dy/dsigma`` of the probability-flow ODE, which is the predicted noise; the score of y is ``-eps / sigma``."""
        return self.at(y, sigma).eps


def checked(denoiser: Model, process: Any) -> Process:
    """The process, where it is Gaussian, and the denoiser's own."""
    if not isinstance(process, Process) or not process.is_gaussian:
        raise ValueError(
            f"process must have Gaussian noise: Denoising MCMC needs a score, which {process!r} has not; got {process!r}"
        )
    check_process(denoiser, process)
    return process


def check_range(name: str, low: float, high: float, process: Process) -> None:
    """ValueError where levels are beyond those of the model."""
    least, most = process.sigma_hat(process.t_min), process.sigma_hat(process.t_max)
    if not (low >= least * (1 - _FORGIVEN) and high <= most * (1 + _FORGIVEN)):  # nor where one is NaN
        raise ValueError(
            f"{name} must be within the model's levels sigma / alpha, {least:.6g} to {most:.6g} for {process!r}, got {low:.6g} to "
            f"{high:.6g}"
        )


def working(x: Tensor) -> Tensor:
    """x in the type that a state is kept in: half precision in float32."""
    return x.float() if x.dtype in HALF else x


PROCESS = checks.Like("a Process of Gaussian noise (an instance, not the class)", "t_min", "t_max", "is_gaussian")
