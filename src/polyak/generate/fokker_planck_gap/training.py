"""A potential to learn, and score matching with the residual of the Fokker-Planck equation added."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.func import grad

from polyak.core import checks
from polyak.generate.fields import POTENTIAL, PROCESS, STATE, check_process, scalar, smooth_attention
from polyak.generate.fokker_planck_gap.residual import (
    TRACE,
    Laplacian,
    Potential,
    check_smooth,
    regular,
    row_times,
    score_and_residual,
    spatial,
)
from polyak.generate.process import Process, expand, wide

_BOX = 3.5  # of the paper


class PotentialNet(nn.Module):
    """The paper's network, an MLP ``(t, x) -> u(x, t)``, ``depth`` hidden layers of ``width`` with Softplus.

    Its score is ``grad_x u``: ``Denoiser(net.score, process, "score", label=lambda t: t)`` samples with it.

    Args:
        dim: the number of elements of a row of x.
        width, depth: of the hidden layers.
        beta: of Softplus. The paper's 100 is nearly ReLU: its second derivative is a spike 0.02 wide. 5 is smooth.
    """

    @checks.arguments(
        dim=checks.Integer(1, 10**6),
        width=checks.Integer(1, 10**6),
        depth=checks.Integer(1, 1000),
        beta=checks.positive,
    )
    def __init__(self, dim: int, width: int = 80, depth: int = 3, beta: float = 100.0) -> None:
        super().__init__()
        self.dim = dim
        layers: list[nn.Module] = []
        for size in (dim + 1, *[width] * (depth - 1)):
            layers += [nn.Linear(size, width), nn.Softplus(beta)]
        self.net = nn.Sequential(*layers, nn.Linear(width, 1))

    def forward(self, x: Tensor, t: float | Tensor) -> Tensor:
        """u, (B,), for x (B, ...) with ``dim`` elements a row and t, a number or (B,)."""
        flat = x.flatten(1)
        if flat.shape[1] != self.dim:
            raise ValueError(f"x must have {self.dim} elements in a row, got shape {tuple(x.shape)}")
        at = torch.as_tensor(t, dtype=x.dtype, device=x.device).expand(len(x))
        return self.net(torch.cat([at[:, None], flat], 1))[:, 0]

    def score(self, x: Tensor, t: float | Tensor) -> Tensor:
        """``grad_x u``, x's shape."""
        return grad(lambda y: self(y, t).sum())(x)


@checks.arguments(
    potential=POTENTIAL, process=PROCESS, x0=STATE, weight=checks.non_negative, preset=checks.Choice("data", "paper"),
    box=checks.positive | None, terminal=checks.optional_flag, t=checks.Tensor(floating=True, ndim=1) | None, **TRACE,
)  # fmt: skip
def fp_regularized_loss(
    potential: Potential,
    process: Process,
    x0: Tensor,
    weight: float = 0.1,
    preset: Literal["data", "paper"] = "data",
    box: float | None = None,
    terminal: bool | None = None,
    generator: torch.Generator | None = None,
    *,
    t: Tensor | None = None,
    laplacian: Laplacian = "exact",
    probes: int = 1,
) -> dict[str, Tensor]:
    """Denoising score matching, and ``weight`` times the residual: ``dsm + weight (residual + terminal)``.

    Times are ``t_min + (t_max - t_min) Beta(1, 2)``. With ``x_t = alpha x0 + sigma eps`` and ``s = grad u``:

    - "data", ours: dsm is the mean of ``(sigma s + eps)^2`` over elements; residual that of ``(sigma^2 R)^2`` at the same x_t,
      where boxes would not scale with the dimension, and freed from its growth like 1/sigma^2 at small t; terminal that of
      ``(s(x_T, t_max) - grad log prior)^2`` at draws of the prior, of which R says nothing.
    - "paper": dsm is the mean of ``(s + eps / sigma)^2``; residual that of ``R^2`` at as many points, uniform in
      ``[-box, box]^D`` and in [t_min, t_max]; no terminal term.

    Args:
        potential: u, as for :func:`log_fp_residual`.
        process: of Gaussian noise, its noise positive at t_min and its drift finite at t_max.
        x0: data, (B, ...).
        weight: w_R; with 0 the loss is dsm, and nothing else is evaluated.
        preset: "data" or "paper".
        box: half the side of the paper's box; default 3.5.
        terminal: whether the terminal term is there; default: in "data".
        generator: of everything random, on x0's device.
        t: times of score matching, (B,), in place of the drawn ones.
        laplacian, probes: as for :func:`log_fp_residual`.

    Returns:
        "loss" and its parts "dsm" and, with a weight, "residual" and "terminal" where there is one. Scalars.

    Raises:
        ValueError: no data; a box in "data"; and as :func:`log_fp_residual`.
    """
    check_smooth("potential", potential)
    check_process(potential, process)
    paper = preset == "paper"
    if box is not None and not paper:
        raise ValueError(f"box is of preset='paper', whose points are uniform in it, got {box!r} with preset='data'")
    if not x0.numel():
        raise ValueError(f"x0 must not be empty, got shape {tuple(x0.shape)}")
    ends = torch.tensor([process.t_min, process.t_max], dtype=torch.float64, device="cpu")
    if not bool(regular(process, ends).all()):
        raise ValueError(
            f"process must have positive noise at t_min and a finite drift at t_max, got {process!r}; give it other ends"
        )
    if t is None:
        t = _between(process, 1 - _uniform(len(x0), x0, generator).sqrt())
    elif t.shape != (len(x0),):
        raise ValueError(f"t must have shape ({len(x0)},), one for each row of x0, got {tuple(t.shape)}")
    at = row_times(process, x0, t)
    x, noise = process.perturb(x0, at, generator=generator)
    sigma = expand(process.sigma(at), x0)
    if not weight or paper:
        s, missed = _score(potential, x, at), None
    else:
        s, missed = score_and_residual(potential, process, x, at, spatial(x, laplacian, probes, generator))
        missed = missed * process.sigma(at).square().to(x0.dtype)
    dsm = (s + noise / sigma if paper else sigma * s + noise).square().mean()
    if not weight:
        return {"loss": dsm, "dsm": dsm}
    if missed is None:
        points = (2 * _uniform(x0.numel(), x0, generator).to(x0.dtype) - 1).reshape(x0.shape) * (box or _BOX)
        when = _between(process, _uniform(len(x0), x0, generator))
        missed = score_and_residual(potential, process, points, when, spatial(points, laplacian, probes, generator))[1]
    parts = {"residual": missed.square().mean()}
    if terminal or (terminal is None and not paper):
        end = process.prior(x0.shape, generator=generator, dtype=x0.dtype, device=x0.device)
        last = at.new_full((len(x0),), process.t_max)
        parts["terminal"] = (_score(potential, end, last) + end / process.prior_std**2).square().mean()
    return {"loss": dsm + weight * torch.stack(list(parts.values())).sum(), "dsm": dsm, **parts}


def _uniform(n: int, x: Tensor, generator: torch.Generator | None) -> Tensor:
    source = x.device if generator is None else generator.device
    return torch.rand(n, dtype=wide(source), device=source, generator=generator).to(x.device)


def _between(process: Process, part: Tensor) -> Tensor:
    return process.t_min + (process.t_max - process.t_min) * part


def _score(potential: Potential, x: Tensor, at: Tensor) -> Tensor:
    with smooth_attention():
        return grad(lambda y: scalar(potential, y, at.to(x.dtype)).sum())(x)
