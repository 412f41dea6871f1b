"""Resampling of which one particle's line is known: for conditional SMC and particle Gibbs."""

from __future__ import annotations

import torch
from torch import Tensor

from polyak.core import checks
from polyak.core.particles import _schemes
from polyak.core.particles._drawing import same_device
from polyak.core.particles._values import INTEGERS, LOGW, ON_COLLAPSE, looks, prepared, systems
from polyak.core.particles.resampling import SCHEME

_CONDITIONAL = ("multinomial", "systematic", "killing")


@checks.arguments(
    logw=LOGW, n=checks.Integer(1) | None, ref=checks.Integer(0) | checks.tensor, scheme=SCHEME,
    generator=checks.generator | None, on_collapse=ON_COLLAPSE, check=checks.optional_flag,
)  # fmt: skip
def resample_conditional(
    logw: Tensor,
    n: int | None = None,
    *,
    ref: int | Tensor = 0,
    scheme: str = "multinomial",
    generator: torch.Generator | None = None,
    on_collapse: str = "error",
    check: bool | None = None,
) -> Tensor:
    """Ancestors, (*batch, n) int64, of which slot ``ref`` has ancestor ``ref``; the others follow the scheme's law given that.

    The law is such that a reference drawn from W, and the others given it, are what the scheme draws at once. Forcing one slot
    of any scheme but the multinomial one is not that.

    - "multinomial": the other n - 1 are drawn from W, independently (Andrieu, Doucet and Holenstein, 2010).
    - "systematic": the reference's own point is uniform in its part of [0, 1), which tells where all points are; slots are then
      turned until it is at ``ref`` (Chopin and Singh, 2015, section 4.2).
    - "killing": a slot s is the reference's offspring with probability ``(1 - W_s / max W) / N``, and ``ref`` itself with what is
      left; the others live or die by themselves (Karppinen, Singh and Vihola, 2022). n is N.

    Args:
        logw, n, generator, on_collapse, check: as for :func:`resample`.
        ref: the slot and the ancestor, in [0, min(n, N)): a number, or a tensor with one for each system, of shape batch.

    Raises:
        ValueError: as :func:`resample`; ref out of range; a scheme for which no conditional one is known.
    """
    if scheme not in _CONDITIONAL:
        known = ", ".join(map(repr, _CONDITIONAL))
        raise ValueError(f"scheme must be one of {known} to be conditional, got {scheme!r}")
    values = prepared("logw", logw.detach(), on_collapse, check)
    size = logw.shape[-1]
    n = size if n is None else n
    if scheme == "killing" and n != size:
        raise ValueError(f"n must be the number of particles, {size}, for scheme='killing', got {n}")
    same_device(generator, values)
    slot = _slots(ref, min(n, size), values, check)
    w = _schemes.unnormalized(values)
    if looks(w, check) and bool((bad := w.gather(-1, slot).squeeze(-1) == 0).any()):
        raise ValueError(f"ref must be a particle with weight, got one without{systems(bad)}")
    others = {"multinomial": _multinomial, "systematic": _systematic, "killing": _killing}[scheme]
    return torch.where(torch.arange(n, device=w.device) == slot, slot, others(w, n, slot, generator))


def _slots(ref: int | Tensor, most: int, logw: Tensor, check: bool | None) -> Tensor:
    """The reference of every system, (*batch, 1)."""
    batch = logw.shape[:-1]
    if isinstance(ref, Tensor):
        if ref.dtype not in INTEGERS or ref.shape not in (batch, ()) or ref.device != logw.device:
            raise ValueError(
                f"ref must be a number, or integers of shape {tuple(batch)} on {logw.device}, "
                f"got {ref.dtype} of shape {tuple(ref.shape)} on {ref.device}"
            )
        if ref.numel() and looks(ref, check) and not bool(((ref >= 0) & (ref < most)).all()):
            raise ValueError(f"ref must be in [0, {most}), got {ref.tolist()}")
        return ref.to(torch.int64).expand(batch).unsqueeze(-1)
    if ref >= most:
        raise ValueError(f"ref must be in [0, {most}), got {ref}")
    return torch.full((*batch, 1), ref, dtype=torch.int64, device=logw.device)


def _multinomial(w: Tensor, n: int, slot: Tensor, generator: torch.Generator | None) -> Tensor:
    if n == 1:
        return slot
    drawn = _schemes.multinomial(w, n - 1, None, generator)
    place = torch.arange(n, device=w.device)
    return drawn.gather(-1, (place - (place > slot).to(torch.int64)).clamp(0, n - 2))


def _systematic(w: Tensor, n: int, slot: Tensor, generator: torch.Generator | None) -> Tensor:
    w = _schemes.exact(w)
    c = w.cumsum(-1)
    own, end = w.gather(-1, slot), c.gather(-1, slot)
    u = _schemes.uniforms(slot.shape, w, generator)
    at = n * ((end - own + u * own) / c[..., -1:])  # the reference's point, in units of strata
    stratum = at.floor().clamp(0, n - 1)
    u = (at - stratum).clamp(0, 1 - torch.finfo(w.dtype).eps / 2)
    drawn = _schemes.expand(_schemes.offspring_ends(w, n, u, n), n)
    turned = (torch.arange(n, device=w.device) + stratum.to(torch.int64) - slot) % n
    return drawn.gather(-1, turned)


def _killing(w: Tensor, n: int, slot: Tensor, generator: torch.Generator | None) -> Tensor:
    drawn = _schemes.killing(w, n, None, generator)
    # Whose slot is the reference's offspring: an inverse of the distribution, its own slot last.
    moves = (1 - w) / n
    place = torch.arange(n, device=w.device)
    c = torch.where(place == slot, 0.0, moves).cumsum(-1)
    other = torch.searchsorted(c, _schemes.uniforms(slot.shape, w, generator), right=True)
    # Relabelled so that it is at ref; what was drawn there goes to that slot. n: nothing moves.
    return torch.where(place == other, drawn.gather(-1, slot), drawn)
