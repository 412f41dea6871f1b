"""Problems with known answers: exact denoisers, flows and reference solutions, for tests and claims.

The models are those of :mod:`polyak.core.exact`, the distances those of :mod:`polyak.core.distances`; both are at hand here.

Example:
    >>> model, process = ring(), VP()
    >>> denoiser = ExactDenoiser(model, process)
    >>> x_T = process.prior((100, 2), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    >>> x = sample(denoiser, x_T, solver=DPMSolver(), nfe=20)
    >>> error = path_rmse(x, reference(denoiser, x_T))
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from polyak.core import checks
from polyak.core.distances import (
    energy_distance,
    frechet_distance,
    gaussian_w2,
    precision_recall,
    sliced_wasserstein,
    wasserstein_1d,
)
from polyak.core.exact import Gaussian, Mixture
from polyak.generate.dpm_solver import DPMSolver
from polyak.generate.pfgmpp import PFGMPP
from polyak.generate.prediction import Denoiser, Network
from polyak.generate.process import Process
from polyak.generate.process.path import TIMES
from polyak.generate.sampling import sample
from polyak.generate.solver import Step

__all__ = [
    "ExactDenoiser",
    "Gaussian",
    "Mixture",
    "StudentDenoiser",
    "energy_distance",
    "frechet_distance",
    "gaussian_flow",
    "gaussian_w2",
    "kde",
    "path_rmse",
    "precision_recall",
    "reference",
    "reference_path",
    "ring",
    "sliced_wasserstein",
    "wasserstein_1d",
]


@checks.arguments(modes=checks.Integer(1, 1_000_000), radius=checks.positive, variance=checks.non_negative)
def ring(modes: int = 8, *, radius: float = 2.0, variance: float = 0.04) -> Mixture:
    """A 2-D mixture of equal modes on a circle, mode k at angle ``2 pi k / modes``; each is a class of its own."""
    angle = 2 * math.pi * torch.arange(modes, dtype=torch.float64) / modes
    means = radius * torch.stack([angle.cos(), angle.sin()], 1)
    return Mixture(means, variance, labels=torch.arange(modes))


@checks.arguments(points=checks.array, bandwidth=checks.Number(0, 1e150), labels=checks.Array(whole=True) | None)
def kde(points: Tensor, bandwidth: float, labels: Tensor | Sequence[int] | None = None) -> Mixture:
    """The kernel density estimate of a data set, points (n, d): one component ``N(point, bandwidth^2 I)`` each.

    ``bandwidth=0`` is the law of the data set itself, whose denoiser memorises. One evaluation costs O(B n d).
    """
    shape = torch.as_tensor(points, dtype=torch.float64).shape
    if len(shape) == 2 and 0 not in shape:
        return Mixture(points, bandwidth**2, labels=labels)
    raise ValueError(f"points must have shape (n, d), got {tuple(shape)}")


_LAW = checks.Instance(Mixture, words="a Mixture")
PROCESS = checks.Instance(Process, words="a Process with alpha and sigma (an instance, not the class)")
_DENOISER = checks.Instance(Denoiser, words="a Denoiser")
_NFE = checks.Integer(30, 1_000_000)


def _need_gaussian(process: Process, what: str) -> None:
    if not process.is_gaussian:
        raise ValueError(f"process must have Gaussian noise: {what} exact for Gaussian noise only, got {process!r}")


class ExactDenoiser(Denoiser):
    """The optimal denoiser ``E[x0 | x_t]`` of a known law, for x of shape (B, d).

    Args:
        law: the law of the data.
        process: the noising process; Gaussian.
        unconditional: the law without condition, for guidance; ``law`` is then ``unconditional.of_class(c)``, say.
    """

    process: Process

    @checks.arguments(law=_LAW, process=PROCESS, unconditional=_LAW | None)
    def __init__(self, law: Mixture, process: Process, *, unconditional: Mixture | None = None) -> None:
        _need_gaussian(process, "these denoisers are")
        super().__init__(
            self._posterior(law, process),
            process,
            "sample",
            unconditional=None if unconditional is None else self._posterior(unconditional, process),
        )
        self.law = law

    @staticmethod
    def _posterior(law: Mixture, process: Process) -> Network:
        return lambda x, t: law.posterior_mean(x, process.alpha(t), process.sigma(t))

    def _run(self, model: Network, x: Tensor, t: float | Tensor) -> Tensor:
        return model(x, t)  # type: ignore[arg-type]  # the time itself, unrounded, not a label

    def log_prob(self, x: Tensor, t: float | Tensor) -> Tensor:
        """``log p_t(x)``, shape (B,)."""
        return self.law.log_prob(x, self.process.alpha(t), self.process.sigma(t))

    def score(self, x: Tensor, t: float | Tensor) -> Tensor:
        """``grad log p_t(x)``, x's shape."""
        return self.law.score(x, self.process.alpha(t), self.process.sigma(t))


class StudentDenoiser(Denoiser):
    """The optimal denoiser of a data set, each point as likely as any, under PFGM++'s noise, for x of shape (B, d).

    ``sum_k w_k y_k`` with ``w_k ~ (|x - y_k|^2 + r^2)^(-(d + D) / 2)``. One evaluation costs O(B n d).

    Args:
        points: the data, (n, d).
        process: the noising process.
    """

    process: PFGMPP

    @checks.arguments(
        points=checks.array, process=checks.Instance(PFGMPP, words="a PFGMPP (an instance, not the class)")
    )
    def __init__(self, points: Tensor, process: PFGMPP) -> None:
        points = torch.as_tensor(points, dtype=torch.float64)
        if points.ndim != 2 or 0 in points.shape:
            raise ValueError(f"points must have shape (n, d), got {tuple(points.shape)}")
        super().__init__(self._posterior, process, "sample")
        self.points = points

    def _posterior(self, x: Tensor, t: float | Tensor) -> Tensor:
        points = self.points.to(x.device)
        return (self.process.posterior_weights(x, points, t) @ points).to(x.dtype)

    def _run(self, model: Network, x: Tensor, t: float | Tensor) -> Tensor:
        return model(x, t)  # type: ignore[arg-type]  # the time itself, as for ExactDenoiser


@checks.arguments(
    law=checks.Instance(Gaussian, words="a Gaussian"), process=PROCESS, x=checks.floating, s=checks.real, t=checks.real
)
def gaussian_flow(law: Gaussian, process: Process, x: Tensor, s: float, t: float) -> Tensor:
    """The exact solution at t of the probability-flow ODE that is at x (shape (B, d)) at s."""
    if x.ndim != 2 or x.shape[1] != law.dim:
        raise ValueError(f"x must have shape (B, {law.dim}), got {tuple(x.shape)}")
    _need_gaussian(process, "this solution is")
    s, t = process.check_time("s", s), process.check_time("t", t)
    return law.flow(x, (process.alpha(s), process.sigma(s)), (process.alpha(t), process.sigma(t)))


@checks.arguments(denoiser=_DENOISER, x_T=checks.Tensor(floating=True, ndim=2), process=PROCESS | None, nfe=_NFE)
def reference(denoiser: Denoiser, x_T: Tensor, *, process: Process | None = None, nfe: int = 2000) -> Tensor:
    """The probability-flow ODE's solution at t_min from x_T at t_max, both (B, d), to all digits that matter.

    Singlestep DPM-Solver-3 on the logSNR grid in float64; its error falls as nfe^-3.
    """
    solver = DPMSolver(order=3, method="singlestep")
    return sample(denoiser, x_T.to(torch.float64), process=process, solver=solver, nfe=nfe)


@checks.arguments(
    denoiser=_DENOISER, x_T=checks.Tensor(floating=True, ndim=2), times=TIMES, process=PROCESS | None, nfe=_NFE
)
def reference_path(
    denoiser: Denoiser, x_T: Tensor, times: Sequence[float] | Tensor, *, process: Process | None = None, nfe: int = 2000
) -> Tensor:
    """The reference solution at every one of the decreasing ``times``, shape (len(times), B, d); the first is x_T itself.

    Each interval gets its share of the evaluations by its length in lam, and at least 30.
    """
    process = process or denoiser.process  # type: ignore[assignment]
    assert isinstance(process, Process)
    ends = process.check_times(times)
    lams = [process.lam(t) for t in ends]
    path = [x_T.to(torch.float64)]
    solver = DPMSolver(order=3, method="singlestep")
    for i in range(len(ends) - 1):
        share = (lams[i + 1] - lams[i]) / (lams[-1] - lams[0])
        nodes = process.grid(3 * max(10, math.ceil(share * nfe / 3)), "logsnr", start=ends[i], end=ends[i + 1])
        path.append(sample(denoiser, path[-1], process=process, solver=solver, grid=nodes))
    return torch.stack(path)


@checks.arguments(x=checks.Tensor(least_ndim=1), y=checks.Tensor(least_ndim=1))
def path_rmse(x: Tensor, y: Tensor) -> float:
    """Root of the mean, over paths, of ``|x - y|^2``: two solutions from the same starts, (B, d), compared path by path."""
    if x.shape != y.shape:
        raise ValueError(f"x and y must have one shape, got {tuple(x.shape)} and {tuple(y.shape)}")
    return (x.to(torch.float64) - y.to(torch.float64)).flatten(1).square().sum(1).mean().sqrt().item()


class Recorder:
    """A ``callback`` of :func:`sample` that keeps the trajectory: ``times`` and ``states`` after each step."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self.states: list[Tensor] = []

    def __call__(self, step: Step) -> None:
        self.times.append(step.t)
        self.states.append(step.x)
