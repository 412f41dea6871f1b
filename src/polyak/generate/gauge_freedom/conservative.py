"""The conservative part of a field, ``s = grad phi + R``: found by regression, built in, trained for, and measured."""

from __future__ import annotations

import copy
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import grad, jvp, vjp, vmap

from polyak.core import checks
from polyak.generate.fields import FIELD, PROBES, STATE, STEPS, Field, scalar, signs, value
from polyak.generate.process.path import TIME, one_for_each_row


class EnergyScore(nn.Module):
    """A conservative network: the gradient ``grad_x phi(x, t)`` of a scalar one, exactly curl-free in x.

    It serves as the model of a :class:`~polyak.generate.Denoiser` of any dialect: what a dialect adds is a multiple of x, which
    is a gradient, too. Training differentiates twice; an evaluation costs two to three times that of ``potential``.

    Args:
        potential: phi, a module ``(x, t) -> (B,)`` or ``(B, 1)``, smooth in x (SiLU, not ReLU).

    Raises:
        ValueError: when it is asked: a potential that does not give one number for each row.
    """

    @checks.arguments(potential=checks.module)
    def __init__(self, potential: nn.Module) -> None:
        super().__init__()
        self.potential = potential

    def energy(self, x: Tensor, t: Any) -> Tensor:
        """phi, (B,)."""
        return scalar(self.potential, x, t)

    def forward(self, x: Tensor, t: Any) -> Tensor:
        """``grad_x phi(x, t)``, x's shape."""
        return grad(lambda y: self.energy(y, t).sum())(x)


@checks.arguments(
    gradient=checks.Function("a function (x, t) -> tensor", 2), remainder_norm=checks.scalar, cos=checks.scalar
)
class Projection(NamedTuple):
    """What :func:`project_conservative` found.

    Attributes:
        gradient: ``grad phi``, a function ``(x, t) -> tensor``; an :class:`EnergyScore`.
        remainder_norm: ``sqrt(E |R|^2)`` of the remainder ``R = s - grad phi``.
        cos: ``E[grad phi . R] / sqrt(E |grad phi|^2 E |R|^2)``: zero at the projection.
    """

    gradient: EnergyScore
    remainder_norm: Tensor
    cos: Tensor


@checks.arguments(
    field=FIELD, samples=STATE, t=TIME, potential=checks.module, steps=STEPS, lr=checks.positive,
    batch=checks.Integer(1, 10**9) | None, generator=checks.generator | None,
)  # fmt: skip
@torch.inference_mode(False)
@torch.enable_grad()
def project_conservative(
    field: Field,
    samples: Tensor,
    t: float | Tensor,
    potential: nn.Module,
    steps: int = 1000,
    *,
    lr: float = 1e-2,
    batch: int | None = None,
    generator: torch.Generator | None = None,
) -> Projection:
    """The nearest gradient field: phi that minimizes ``E_p |s - grad phi|^2``, which is the conservative part of s.

    It is exact for as many samples and as rich a potential as it takes. Fitted by Adam, whose rate falls to zero by a cosine.

    Args:
        field: s; a denoiser stands for its score.
        samples: (n, ...), draws from the law at t: the split is orthogonal in that law, and in no other.
        t: their time: a number, or (n,).
        potential: phi, a module ``(x, t) -> (n,)`` or ``(n, 1)``, smooth in x. It is copied, and stays as it is.
        steps, lr, batch: of Adam; all samples at every step where ``batch`` is left out.
        generator: of batches.

    Returns:
        ``(gradient, remainder_norm, cos)``, measured on the samples.

    Raises:
        ValueError: no samples, or a field that is not finite at one; a potential without parameters.
    """
    one_for_each_row(t, samples)
    if not samples.numel():
        raise ValueError(f"samples must not be empty, got shape {tuple(samples.shape)}")
    # What was made in inference mode cannot be trained on; copies can.
    samples, t = samples.detach().clone(), t.detach().clone() if isinstance(t, Tensor) else t
    with torch.no_grad():
        wanted = value(field, samples, t)
    if not bool(wanted.isfinite().all()):
        raise ValueError("field must be finite at all samples, got NaN or infinity")
    fitted = EnergyScore(copy.deepcopy(potential))
    parameters = [p for p in fitted.parameters() if p.requires_grad]
    if not parameters:
        raise ValueError(f"potential must have parameters to fit, got {type(potential).__name__}")
    source = samples.device if generator is None else generator.device
    optimizer = torch.optim.Adam(parameters, lr)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: 0.5 * (1 + math.cos(math.pi * i / steps)))
    for _ in range(steps):
        x, target, at = samples, wanted, t
        if batch is not None:
            rows = torch.randint(len(x), (batch,), generator=generator, device=source).to(x.device)
            x, target, at = x[rows], wanted[rows], t[rows] if isinstance(t, Tensor) and t.ndim else t
        loss = (fitted(x, at) - target).flatten(1).square().sum(1).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        found = fitted(samples, t)
        rest = wanted - found
        inner = (found * rest).flatten(1).sum(1).mean()
        sizes = [part.flatten(1).square().sum(1).mean().sqrt() for part in (found, rest)]
        cos = inner / (sizes[0] * sizes[1]).clamp(min=torch.finfo(inner.dtype).tiny)
    return Projection(fitted, sizes[1], cos)


_PROBED = dict(field=FIELD, x=STATE, t=TIME, probes=PROBES, generator=checks.generator | None)


@checks.arguments(**_PROBED)
def jacobian_asymmetry(
    field: Field, x: Tensor, t: float | Tensor, probes: int = 8, generator: torch.Generator | None = None
) -> Tensor:
    """``|J - J^T|_F / |J + J^T|_F`` of a field's Jacobian in x: 0 for a conservative one. Says nothing of whether it is right.

    Both norms are estimated with the same random signs v: ``|M|_F^2 = E |M v|^2``.

    Args:
        field: a denoiser stands for its score.
        x: (B, ...). t: a number or (B,).
        probes: how many v, each at the cost of a product in forward and one in reverse mode.
        generator: of the v.

    Returns:
        (B,), differentiable.
    """
    ahead, back = _products(field, x, t, probes, generator)
    apart, together = ((a.flatten(2).square().sum(2).mean(0)) for a in (ahead - back, ahead + back))
    ratio = apart / together.clamp(min=torch.finfo(x.dtype).tiny)
    return torch.where(ratio == 0, 1, ratio).sqrt() * (ratio != 0)  # at 0 the root has no slope


@checks.arguments(**_PROBED)
def conservativity_penalty(
    field: Field, x: Tensor, t: float | Tensor, probes: int = 1, generator: torch.Generator | None = None
) -> Tensor:
    """``E_v |v^T (J - J^T)|^2 = |J - J^T|_F^2`` with random signs v: added to a training loss it makes a field conservative.

    Args:
        field: a denoiser stands for its score.
        x: (B, ...). t: a number or (B,).
        probes: how many v. The estimate is unbiased with one.
        generator: of the v.

    Returns:
        (B,), differentiable in the field's parameters.
    """
    ahead, back = _products(field, x, t, probes, generator)
    return (back - ahead).flatten(2).square().sum(2).mean(0)


def _products(
    field: Field, x: Tensor, t: float | Tensor, probes: int, generator: torch.Generator | None
) -> tuple[Tensor, Tensor]:
    """``J v`` and ``J^T v``, (probes, *x.shape) each."""
    one_for_each_row(t, x)
    tangents = signs(x, probes, generator)
    if not x.numel():
        return tangents, tangents

    def f(y: Tensor) -> Tensor:
        return value(field, y, t)

    pull = vjp(f, x)[1]
    return vmap(lambda v: jvp(f, (x,), (v,))[1])(tangents), vmap(lambda v: pull(v)[0])(tangents)
