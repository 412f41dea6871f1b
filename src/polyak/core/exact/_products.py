"""Tilts, products and powers of mixtures of Gaussians, as components that are not normalised."""

from __future__ import annotations

import math
from itertools import combinations_with_replacement
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from polyak.core.exact._algebra import multiplied, powers, tilted

if TYPE_CHECKING:
    from polyak.core.exact.mixtures import Mixture

_MOST_COMPONENTS = 100_000  # of a power


class Components(NamedTuple):
    """Gaussians with masses."""

    means: Tensor  # (n, d)
    covariances: Tensor  # (n, d, d)
    log_masses: Tensor  # (n,)
    isotropic: bool


def tilt(law: Mixture, b: object, B: object) -> Components:
    d, like = law.dim, {"dtype": torch.float64, "device": law.means.device}
    slope, bend = torch.as_tensor(b, **like), torch.as_tensor(0.0 if B is None else B, **like)
    if slope.shape != (d,):
        raise ValueError(f"b must have shape ({d},), got {tuple(slope.shape)}")
    if bend.shape not in ((), (d,), (d, d)) or (bend.ndim == 2 and not torch.allclose(bend, bend.mT)):
        raise ValueError(f"B must be a number, ({d},) or a symmetric ({d}, {d}) matrix, got shape {tuple(bend.shape)}")
    full = bend if bend.ndim == 2 else torch.diag_embed(bend.expand(d))
    scale = law.variances.expand(-1, d).sqrt()
    roots = torch.diag_embed(scale) if law.basis is None else law.basis * scale[:, None]  # C_k = L_k L_k'
    means, covariances, log_mass = tilted(law.means, roots, slope, full)
    return Components(means, covariances, log_mass + law.weights.log(), law.basis is None and bend.ndim == 0)


def product(law: Mixture, other: Mixture) -> Components:
    if other.dim != law.dim:
        raise ValueError(f"other must be of dimension {law.dim}, got {other.dim}")
    other = other.to(law.means.device)
    means, covariances, log_mass = multiplied(law.means, law.covariances, other.means, other.covariances)
    log_weights = (law.weights.log()[:, None] + other.weights.log()).flatten()
    return Components(means, covariances, log_mass + log_weights, law.basis is None and other.basis is None)


def power(law: Mixture, beta: float) -> Components:
    count, device = len(law), law.means.device
    if count == 1:
        return power_of_modes(law, beta)
    if beta != round(beta) or math.comb(count + round(beta) - 1, round(beta)) > _MOST_COMPONENTS:
        raise ValueError(
            f"beta must be whole, and the power of at most {_MOST_COMPONENTS} components, of a mixture of {count}; "
            f"got {beta:g} (of modes that do not overlap: power_of_modes)"
        )
    chosen = torch.tensor(list(combinations_with_replacement(range(count), round(beta))), device=device)
    betas = torch.nn.functional.one_hot(chosen, count).sum(1).to(torch.float64)
    return _powers(law, betas, math.lgamma(beta + 1) - torch.lgamma(betas + 1).sum(-1))


def power_of_modes(law: Mixture, beta: float) -> Components:
    betas = beta * torch.eye(len(law), dtype=torch.float64, device=law.means.device)
    return _powers(law, betas, law.means.new_zeros(len(law)))


def _powers(law: Mixture, betas: Tensor, log_choices: Tensor) -> Components:
    means, covariances, log_mass = powers(law.means, law.covariances, betas, "beta is too near to zero")
    log_weights = torch.special.xlogy(betas, law.weights).sum(-1)  # a weight may be zero where its power is
    return Components(means, covariances, log_mass + log_choices + log_weights, law.basis is None)
