"""The backward kernel: given where a particle is at t + 1, which particle of time t it came from.

``P(J = l | x_{t+1}) ∝ w_t^l q(x_t^l, x_{t+1})`` over all l, with the weights w_t as they were before resampling. Draws come from

- "dense": an N x N matrix of log-weights, a slice of its rows at a time, inverted by one cumulative sum: O(N^2), no waiting;
- "rejection": l from the weights, accepted with ``q / q_max``; after sqrt(N) failures in a row a dense draw. O(N M) expected
  where q is nearly flat, but how many are left is asked of the device in every round;
- "mcmc": a few steps of independent Metropolis-Hastings, started at the ancestor: O(N M), biased by what is left of the start;
- "ancestor": the ancestor itself, which is the genealogy's own path: O(N), and degenerate. It is what PaRIS improves on.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

ENGINES = ("dense", "rejection", "mcmc", "ancestor")
MCMC_STEPS = 4
_AT_ONCE = {"cpu": 2**18}  # numbers of a slice of the matrix: what a cache holds
_AT_ONCE_ELSEWHERE = 2**25


def draw(
    engine: str,
    model: Any,
    x: Tensor,
    logw: Tensor,
    x_next: Tensor,
    ancestors: Tensor,
    t: int,
    m: int,
    generator: torch.Generator | None,
) -> tuple[Tensor, Tensor]:
    """Backward indices J (*batch, N, m), and whether a system has a particle that can have come from nowhere, (*batch,)."""
    if engine == "ancestor":
        return ancestors[..., None].expand(*ancestors.shape, m), logw.new_zeros(logw.shape[:-1], dtype=torch.bool)
    if engine == "mcmc":
        return _mcmc(model, x, logw, x_next, ancestors, t, m, generator)
    if engine == "rejection":
        return _rejection(model, x, logw, x_next, t, m, generator)
    drawn, undefined = [], logw.new_zeros(logw.shape[:-1], dtype=torch.bool)
    for _, logits in rows(model, x, logw, x_next, t):
        j, bad = categorical(logits, m, generator)
        drawn.append(j)
        undefined = undefined | bad.any(-1)
    return drawn[0] if len(drawn) == 1 else torch.cat(drawn, -2), undefined


def rows(model: Any, x: Tensor, logw: Tensor, x_next: Tensor, t: int) -> Iterator[tuple[slice, Tensor]]:
    """Slices of the particles at t + 1, with their rows ``log w_t^l + log q(x_t^l, x_{t+1}^i)``, (*batch, rows, N)."""
    dim, n = logw.ndim - 1, x_next.shape[logw.ndim - 1]
    row = logw.numel() * math.prod(model.state_shape)
    step = max(1, _AT_ONCE.get(x.device.type, _AT_ONCE_ELSEWHERE) // max(1, row))
    past = x.unsqueeze(dim)
    for start in range(0, n, step):
        part = slice(start, min(start + step, n))
        following = x_next.narrow(dim, start, part.stop - start).unsqueeze(dim + 1)
        logq = model.log_transition(past, following, t).to(logw.dtype)
        yield part, (logw.unsqueeze(-2) + logq).expand(*logw.shape[:-1], part.stop - start, logw.shape[-1])


def categorical(logits: Tensor, m: int, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
    """m draws from each row of (*batch, N), by inversion, and whether a row has no weight (or NaN): its draws mean nothing."""
    top = logits.amax(-1, keepdim=True)
    undefined = ~(top.isfinite())
    cumulative = (logits - torch.where(undefined, 0.0, top)).exp().cumsum(-1)
    u = torch.rand((*logits.shape[:-1], m), dtype=logits.dtype, device=logits.device, generator=generator)
    # right=True: what has no weight is not drawn, even at u = 0. u times the total is below the total in floating point, too.
    j = torch.searchsorted(cumulative, u * cumulative[..., -1:], right=True)
    return j.clamp_(max=logits.shape[-1] - 1), undefined[..., 0]


def picked(x: Tensor, j: Tensor, dim: int) -> Tensor:
    """x (*batch, N, *event) at indices (*batch, N, m): (*batch, N, m, *event)."""
    flat = j.flatten(-2)
    index = flat.reshape(*flat.shape, *[1] * (x.ndim - flat.ndim)).expand(*flat.shape, *x.shape[dim + 1 :])
    return x.gather(dim, index).unflatten(dim, tuple(j.shape[-2:]))


def _mcmc(
    model: Any,
    x: Tensor,
    logw: Tensor,
    x_next: Tensor,
    ancestors: Tensor,
    t: int,
    m: int,
    generator: torch.Generator | None,
) -> tuple[Tensor, Tensor]:
    dim = logw.ndim - 1
    following = x_next.unsqueeze(dim + 1)
    cumulative = logw.softmax(-1).cumsum(-1)
    j = ancestors[..., None].expand(*ancestors.shape, m)
    now = model.log_transition(picked(x, j, dim), following, t)
    for _ in range(MCMC_STEPS):
        u, v = torch.rand((2, *j.shape), dtype=logw.dtype, device=logw.device, generator=generator)
        level = (u * cumulative[..., -1:, None]).flatten(-2)
        new = torch.searchsorted(cumulative, level, right=True).clamp_(max=logw.shape[-1] - 1).view_as(j)
        proposed = model.log_transition(picked(x, new, dim), following, t)
        # The weights cancel: they are the proposal. Two impossible pasts are not compared.
        accept = (v.log() < (proposed - now).to(logw.dtype)) | (now == -math.inf)
        j, now = torch.where(accept, new, j), torch.where(accept, proposed, now)
    return j, (now == -math.inf).flatten(-2).any(-1)


def _rejection(
    model: Any, x: Tensor, logw: Tensor, x_next: Tensor, t: int, m: int, generator: torch.Generator | None
) -> tuple[Tensor, Tensor]:
    """All (system, particle, draw) that are still open are proposed to at once, and leave when they accept."""
    batch, n = logw.shape[:-1], logw.shape[-1]
    logw, event = logw.reshape(-1, n), x.shape[logw.ndim :]
    x, x_next = x.reshape(-1, *event), x_next.reshape(-1, *event)
    bound = torch.as_tensor(model.q_max(t), dtype=logw.dtype, device=logw.device).log()
    systems, count = len(logw), len(x_next) // len(logw)
    weights = logw.softmax(-1)
    # One sorted sequence for all systems: the k-th one's levels are in [k, k + 1].
    levels = weights.cumsum(-1)
    levels = (levels / levels[:, -1:] + torch.arange(systems, dtype=logw.dtype, device=logw.device)[:, None]).flatten()
    weights = weights.flatten()
    j = torch.zeros(systems * count * m, dtype=torch.int64, device=logw.device)
    open_ = torch.arange(len(j), device=logw.device)
    for _ in range(math.ceil(math.sqrt(n))):
        if not len(open_):
            break
        particle = open_ // m
        system = particle // count
        u, v = torch.rand((2, len(open_)), dtype=logw.dtype, device=logw.device, generator=generator)
        new = torch.searchsorted(levels, system + u, right=True)
        new = torch.minimum(torch.maximum(new, system * n), system * n + n - 1)
        logq = model.log_transition(x[new], x_next[particle], t).to(logw.dtype)
        accept = (v.log() < logq - bound) & (weights[new] > 0)
        j[open_[accept]] = (new - system * n)[accept]
        open_ = open_[~accept]
    undefined = torch.zeros(systems, dtype=torch.bool, device=logw.device)
    step = max(1, _AT_ONCE.get(x.device.type, _AT_ONCE_ELSEWHERE) // n)
    for rest in open_.split(step):
        particle = rest // m
        system = particle // count
        past = x.view(systems, n, *event)[system]
        logq = model.log_transition(past, x_next[particle].unsqueeze(1), t).to(logw.dtype)
        drawn, bad = categorical(logw[system] + logq, 1, generator)
        j[rest] = drawn[:, 0]
        undefined[system[bad]] = True
    return j.view(*batch, count, m), undefined.view(batch)
