"""The schemes: from log-weights and uniforms to ancestors, in plain PyTorch, without a branch on values.

Weights are rounded to multiples of a 2^-52nd of the least power of two above their sum. Then every partial sum is exact, whatever
order a device adds in: cumulative weights never decrease, and do not grow at all where a weight is zero, so that a particle without
weight is never drawn.
"""

from __future__ import annotations

import torch
from torch import Tensor

_EXPONENT = {torch.float64: (torch.int64, 0x7FF0000000000000), torch.float32: (torch.int32, 0x7F800000)}


def unnormalized(logw: Tensor) -> Tensor:
    """``exp(logw - max)``. A single +inf is an atom; a system without weight, or with NaN, has equal ones."""
    top = logw.amax(-1, keepdim=True)
    return torch.where((logw == top) | top.isnan(), 0.0, logw - top).exp()


def exact(w: Tensor) -> Tensor:
    """Weights rounded such that all sums of them are exact."""
    total = w.sum(-1, keepdim=True)
    integer, mask = _EXPONENT[w.dtype]
    above = (total.view(integer) & mask).view(w.dtype) * 2
    return (w + above) - above


def expand(ends: Tensor, n: int) -> Tensor:
    """Sorted ancestors from where each particle's offspring end: ``#{i: ends_i <= k}`` for k < n, in O(N + n)."""
    marks = ends.new_zeros(*ends.shape[:-1], n + 1)
    return marks.scatter_add_(-1, ends, ends.new_ones(1).expand_as(ends)).cumsum(-1)[..., :n]


def offspring_ends(w: Tensor, n: int | Tensor, u: Tensor, most: int) -> Tensor:
    """``#{k < n: (k + u_k) / n < c_i}`` for the cumulative weights c.

    Args:
        w: exact weights. n: how many are drawn, a number or (*batch, 1), at most ``most``.
        u: (*batch, 1) for one uniform in all strata, (*batch, n) for one in each.
    """
    c = w.cumsum(-1)
    total = c[..., -1:]
    at = c * (n / total)
    whole = at.floor()
    stratum = whole.to(torch.int64).clamp(0, most)
    own = u if u.shape[-1] == 1 else u.gather(-1, stratum.clamp(max=most - 1))
    # k + u < at, in numbers that are exact: at - floor(at) is.
    ends = stratum + (own < at - whole)
    return torch.where(c >= total, n, ends.clamp(max=n) if isinstance(n, int) else ends.minimum(n))


def inverse(w: Tensor, u: Tensor) -> Tensor:
    """``#{i: c_i <= u}`` for cumulative weights c that end at 1, and never a particle without weight."""
    c = w.cumsum(-1)
    total = c[..., -1:].contiguous()
    drawn = torch.searchsorted(c, (u * total).contiguous(), right=True)
    return drawn.minimum(torch.searchsorted(c, total))


def spacings(shape: tuple[int, ...], like: Tensor, generator: torch.Generator | None) -> Tensor:
    """Sums of exponentials, (*batch, n + 1): of m uniforms the sorted ones are the first m over the (m + 1)-th."""
    made = torch.empty((*shape[:-1], shape[-1] + 1), dtype=like.dtype, device=like.device)
    return made.exponential_(generator=generator).cumsum_(-1)


def uniforms(shape: tuple[int, ...], like: Tensor, generator: torch.Generator | None) -> Tensor:
    return torch.rand(shape, dtype=like.dtype, device=like.device, generator=generator)


def multinomial(w: Tensor, n: int, u: Tensor | None, generator: torch.Generator | None) -> Tensor:
    if u is None:
        sums = spacings((*w.shape[:-1], n), w, generator)
        u = sums[..., :-1] / sums[..., -1:]
    return inverse(exact(w), u)


def systematic(w: Tensor, n: int, u: Tensor | None, generator: torch.Generator | None) -> Tensor:
    u = uniforms(w.shape[:-1], w, generator) if u is None else u
    return expand(offspring_ends(exact(w), n, u.unsqueeze(-1), n), n)


def stratified(w: Tensor, n: int, u: Tensor | None, generator: torch.Generator | None) -> Tensor:
    u = uniforms((*w.shape[:-1], n), w, generator) if u is None else u
    return expand(offspring_ends(exact(w), n, u, n), n)


def _parts(w: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """``floor(n W)``, int64, and what is left of it."""
    w = exact(w)
    at = w * (n / w.sum(-1, keepdim=True))
    whole = at.floor()
    return whole.to(torch.int64), at - whole


def residual(w: Tensor, n: int, u: Tensor | None, generator: torch.Generator | None) -> Tensor:
    copies, rest = _parts(w, n)
    ends = copies.cumsum(-1)
    certain = ends[..., -1:]
    slot = torch.arange(n, device=w.device)
    if u is None:
        sums = spacings((*w.shape[:-1], n), w, generator)
        u = sums.gather(-1, (slot - certain).clamp(min=0)) / sums.gather(-1, n - certain)
    drawn = inverse(exact(rest), u).clamp(max=w.shape[-1] - 1)  # of no rest none is drawn
    return torch.where(slot < certain, expand(ends, n).clamp(max=w.shape[-1] - 1), drawn)


def residual_systematic(w: Tensor, n: int, u: Tensor | None, generator: torch.Generator | None) -> Tensor:
    copies, rest = _parts(w, n)
    ends = copies.cumsum(-1)
    u = uniforms(w.shape[:-1], w, generator) if u is None else u
    left = n - ends[..., -1:]
    rest = exact(torch.where(left > 0, rest, 1.0))
    more = offspring_ends(rest, left, u.unsqueeze(-1), n)
    return expand(ends + more, n)


def ssp(w: Tensor, n: int, u: Tensor | None, generator: torch.Generator | None) -> Tensor:
    """Neighbours meet in rounds: of two open fractions one is closed, the other carries on."""
    size = w.shape[-1]
    u = uniforms((*w.shape[:-1], size - 1), w, generator) if u is None else u
    copies, rest = _parts(w, n)
    owner = torch.arange(size, device=w.device).expand_as(copies)
    used = 0
    while (many := rest.shape[-1]) > 1:
        pairs = many // 2
        a, b = rest[..., : 2 * pairs : 2], rest[..., 1 : 2 * pairs : 2]
        own_a, own_b = owner[..., : 2 * pairs : 2], owner[..., 1 : 2 * pairs : 2]
        v = u[..., used : used + pairs]
        used += pairs
        both = a + b
        full = both >= 1
        closes_a = torch.where(full, v * (2 - both) < 1 - b, v * both >= a)
        copies = copies.scatter_add(-1, torch.where(closes_a, own_a, own_b), full.to(torch.int64))
        rest = torch.cat((torch.where(full, both - 1, both), rest[..., 2 * pairs :]), -1)
        owner = torch.cat((torch.where(closes_a, own_b, own_a), owner[..., 2 * pairs :]), -1)
    # The last fraction is 0 or 1, but for rounding.
    copies = copies.scatter_add(-1, owner, n - copies.sum(-1, keepdim=True))
    return expand(copies.cumsum(-1), n)


def killing(w: Tensor, n: int, u: Tensor | None, generator: torch.Generator | None) -> Tensor:
    u = uniforms((*w.shape[:-1], 2 * n), w, generator) if u is None else u
    stays = u[..., :n] < w  # the largest is 1
    return torch.where(stays, torch.arange(n, device=w.device), inverse(exact(w), u[..., n:]))
