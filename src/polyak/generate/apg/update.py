"""APG's update of two outputs: in PyTorch, and where they can take it by the kernels."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from polyak.generate.apg import kernel
from polyak.generate.apg.kernel import How, Pair
from polyak.generate.evaluate import HALF


class Momentum(Protocol):
    """What is carried along a trajectory."""

    momentum: float
    average: Tensor | None
    before: Tensor | None

    def memory(self, update: bool, shape: torch.Size) -> Tensor | None: ...


def updated(pair: Pair, state: Momentum | None, moves: bool, how: How, dtype: torch.dtype) -> Tensor:
    """What is made of two outputs; a state, if there is one, moves on or is only read."""
    memory, beta = (None, 0.0) if state is None else (state.memory(moves, pair.cond.shape), state.momentum)
    keeps = state is not None and moves
    fused = kernel.guided(pair, memory, beta, keeps, how, dtype)
    if fused is None:
        c, d = difference(pair)
        if memory is not None:
            d = d.add_(memory, alpha=beta)
        made = _rescaled(_guided(data(pair, pair.uncond) if how.of_uncond else c, c, d, how), c, how.rescale).to(dtype)
    else:
        made, d = fused
    if state is not None and moves:
        state.before, state.average = memory, d
    return made


def data(pair: Pair, output: Tensor) -> Tensor:
    """What is guided, of an output."""
    if pair.x is None:
        return precise(output) if pair.b == 1 else precise(output) * pair.b
    return torch.mul(precise(pair.x), pair.a).add_(precise(output), alpha=pair.b)


def difference(pair: Pair) -> tuple[Tensor, Tensor]:
    """``(D_c, D_c - D_u)``, without ``D_u``."""
    d = torch.sub(precise(pair.cond), precise(pair.uncond))
    return data(pair, pair.cond), d if pair.b == 1 else d.mul_(pair.b)


def _guided(base: Tensor, c: Tensor, d: Tensor, how: How) -> Tensor:
    """``base + gain (d_orth + eta d_par)`` of the capped d: two or three reductions, and one combination of c and d."""
    weight, (gain, eta, r) = None, how[:3]
    if r > 0:
        size = torch.linalg.vector_norm(d, dim=within(d), keepdim=True)
        weight = torch.div(r, size).clamp(max=1.0) * gain  # the cap is 1 where d is 0
    if eta == 1:
        return torch.add(base, d, alpha=gain) if weight is None else torch.addcmul(base, d, weight)
    along = share(d, c, within(d, how.channels)) * ((1 - eta) * (gain if weight is None else weight))
    made = c * (1 - along) if base is c else torch.addcmul(base, c, along, value=-1)
    return made.add_(d, alpha=gain) if weight is None else made.addcmul_(d, weight)


def _rescaled(made: Tensor, c: Tensor, phi: float) -> Tensor:
    """Partly with the deviation that c has."""
    if not phi:
        return made
    wanted, found = (v.std(within(v), keepdim=True) for v in (c, made))
    return made * torch.where(found > 0, torch.lerp(torch.ones_like(found), wanted / found, phi), 1.0)


def share(d: Tensor, c: Tensor, within: tuple[int, ...]) -> Tensor:
    """``<d, c> / |c|^2`` of each sample; 0 where c is 0. (Not a matrix product, which rounds to TF32 on some GPUs.)"""
    size = torch.linalg.vector_norm(c, dim=within, keepdim=True).clamp(min=torch.finfo(c.dtype).tiny)
    return (d * c).sum(within, keepdim=True) / size / size


def within(x: Tensor, channels: bool = False) -> tuple[int, ...]:
    """The dimensions of one sample, or of one of its channels."""
    return tuple(range(2 if channels else 1, x.ndim))


def precise(x: Tensor) -> Tensor:
    return x.float() if x.dtype in HALF else x
