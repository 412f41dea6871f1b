"""The wave equation ``u_tt = c^2 laplacian_z u``, and what a function leaves of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor
from torch.func import grad

from polyak.core import checks
from polyak.generate import fields
from polyak.generate.process.path import TIME, one_for_each_row

LAPLACIAN = checks.Choice("trace", "hutchinson", "official")
Laplacian = Literal["trace", "hutchinson", "official"]
U = Callable[[Tensor, Any], Tensor]  # (z, t) -> one number for each row


@checks.arguments(
    u_fn=checks.Function("a function (z, t) -> tensor", 2), z=fields.STATE, t=TIME, c=checks.Operand(checks.real), mode=LAPLACIAN,
    probes=fields.PROBES, generator=checks.generator | None,
)  # fmt: skip
def wave_residual(
    u_fn: U,
    z: Tensor,
    t: float | Tensor,
    c: float | Tensor = 1.0,
    mode: Laplacian = "trace",
    *,
    probes: int = 1,
    generator: torch.Generator | None = None,
) -> Tensor:
    """``u_tt - c^2 laplacian_z u`` at (z, t): zero where u obeys the wave equation.

    Args:
        u_fn: u, a function ``(z, t) -> (B,)`` or ``(B, 1)`` that treats each row by itself. It is differentiated twice.
        z: (B, ...). t: a number, or (B,).
        c: the speed of waves, a number or (B,).
        mode: "trace" is the equation. "hutchinson" is its unbiased estimate from ``probes`` random signs v, ``v^T H v`` of the
            Hessian H, for many dimensions. "official" is what the official code takes for it: sums of H's rows in place of the
            trace, and u_tt summed over the batch; t is then one time for all rows.
        probes, generator: of "hutchinson".

    Returns:
        (B,); z's shape for "official". Differentiable.

    Raises:
        ValueError: values of u that are not one number for each row; rows of more than 4096 elements for "trace"; more than one
            time for "official".

    Example:
        >>> wave_residual(lambda z, t: torch.cos(t) * torch.cos(z[:, 0]), torch.zeros(2, 3), 0.5)
        tensor([0., 0.])
    """
    one_for_each_row(t, z)
    if isinstance(c, Tensor) and c.shape not in ((), (1,), z.shape[:1]):
        raise ValueError(f"c must be a number or have shape ({len(z)},) like z's batch, got {tuple(c.shape)}")
    times = torch.as_tensor(t, dtype=z.dtype, device=z.device)
    if mode == "official":
        if times.numel() != 1:
            raise ValueError(f't must be one time with mode="official", got shape {tuple(times.shape)}')
        c2 = c.square().reshape(-1, *[1] * (z.ndim - 1)) if isinstance(c, Tensor) else c * c
        return official_residual(u_fn, z, times.reshape(1), c2)
    laplacian = fields.trace(gradient(u_fn, times), z, fields.directions(z, mode, probes, generator))[1]
    return second(u_fn, z, times.expand(len(z))) - c * c * laplacian


def official_residual(u_fn: U, z: Tensor, times: Tensor, c2: float | Tensor) -> Tensor:
    """``sum_b u_tt - c^2 H 1`` for T times with as many rows of z each, one after another: z's shape."""
    each = len(z) // len(times)

    def u(y: Tensor, at: Tensor) -> Tensor:
        return one_number(u_fn(y, at.repeat_interleave(each)), y)

    slope = gradient(u, times)
    rows = grad(lambda y: slope(y).sum())(z)
    return second(u, z, times).repeat_interleave(each).reshape(-1, *[1] * (z.ndim - 1)) - c2 * rows


def gradient(u_fn: U, t: Any) -> Callable[[Tensor], Tensor]:
    """``grad_z u(z, t)`` as a function of z."""
    return grad(lambda y: one_number(u_fn(y, t), y).sum())


def second(u_fn: U, z: Tensor, t: Tensor) -> Tensor:
    """``d^2/dt^2`` of u, summed over the rows that share a time: t's shape."""
    slope = grad(lambda at: one_number(u_fn(z, at), z).sum())
    return grad(lambda at: slope(at).sum())(t)


def one_number(said: Any, z: Tensor) -> Tensor:
    """What a potential says, as (B,); ValueError where it is not one number for each row."""
    if not isinstance(said, Tensor) or said.shape not in ((len(z),), (len(z), 1)):
        got = tuple(said.shape) if isinstance(said, Tensor) else type(said).__name__
        raise ValueError(f"u_fn must return shape ({len(z)},) or ({len(z)}, 1), got {got}")
    return said.reshape(len(z))
