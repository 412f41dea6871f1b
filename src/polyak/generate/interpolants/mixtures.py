"""Interpolants between mixtures of Gaussians, whose fields are known in closed form."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from polyak.core import checks
from polyak.core.exact import Gaussian, Mixture
from polyak.generate.interpolants.fields import INTERPOLANT, Fields
from polyak.generate.interpolants.path import Interpolant
from polyak.generate.process.path import TIME, one_for_each_row, wide

_LAW = checks.Instance(Mixture, words="a Mixture")


class _At(NamedTuple):
    """The law at t: B rows, T times (1 or B), P pairs of components."""

    logits: Tensor  # (B, P)
    gap: Tensor  # (B, P, d): V^-1 (x - M)
    velocity: Tensor  # (B, P, d): E[dI/dt | x, pair]


class GaussianMixtureInterpolant(Fields):
    """The fields of an interpolant between two mixtures of Gaussians that are drawn independently, in closed form.

    For a pair (k, l) of components ``M = a m0_k + b m1_l`` and ``V = a^2 C0_k + b^2 C1_l + gamma^2 I``; with
    ``r_kl ∝ p_k q_l N(x; M, V)`` and ``y = V^-1 (x - M)``

        v = sum r [a' m0 + b' m1 + (a a' C0 + b b' C1) y],  s = -sum r y,  b = v - gamma gamma' s.

    Args:
        rho0, rho1: the two laws; rho0 is None where it is N(0, I) (one-sided) or there is none (mirror).
        interpolant: default ``Interpolant()``.

    x has shape (B, d). Everything is computed in float64 and returned in x's dtype.

    Example:
        >>> exact = GaussianMixtureInterpolant(Gaussian([-3.0]), Mixture([[0.0], [6.0]], 0.3))
        >>> x1 = integrate(exact, x0, eps=1.0, steps=200)
    """

    @checks.arguments(rho0=_LAW | None, rho1=_LAW, interpolant=INTERPOLANT | None)
    def __init__(self, rho0: Mixture | None, rho1: Mixture, interpolant: Interpolant | None = None) -> None:
        self.interpolant = interpolant or Interpolant()
        self._nets = {}
        if (rho0 is None) != (self.interpolant.one_sided or self.interpolant.mirror):
            what = "be left out (None)" if rho0 is not None else "be given"
            raise ValueError(f"rho0 must {what} for {self.interpolant!r}")
        if rho0 is None:
            rho0 = Gaussian(torch.zeros(rho1.dim, device=rho1.means.device))
        if rho0.dim != rho1.dim:
            raise ValueError(f"rho0 and rho1 must have one dimension, got {rho0.dim} and {rho1.dim}")
        count0, count1 = len(rho0), len(rho1)
        self.rho0, self.rho1 = rho0, rho1
        self._m0, self._c0 = (p.repeat_interleave(count1, 0) for p in (rho0.means, rho0.covariances))
        self._m1, self._c1 = (p.repeat(count0, *[1] * (p.ndim - 1)) for p in (rho1.means, rho1.covariances))
        self._log_weights = (rho0.weights[:, None] * rho1.weights).flatten().log()

    def __repr__(self) -> str:
        return f"GaussianMixtureInterpolant({self.rho0!r}, {self.rho1!r}, {self.interpolant!r})"

    def _at(self, x: Tensor, t: float | Tensor) -> _At:
        d = self.rho1.dim
        if x.ndim != 2 or x.shape[1] != d:
            raise ValueError(f"x must have shape (B, {d}), got {tuple(x.shape)}")
        kind = wide(x.device)
        one_for_each_row(t, x)
        times = (
            t.to(x.device, kind).reshape(-1)
            if isinstance(t, Tensor)
            else torch.full((1,), t, dtype=kind, device=x.device)
        )
        a, b, da, db, gamma = (c[:, None, None] for c in self.interpolant.coefficients(times))
        m0, m1, c0, c1 = (p.to(x.device, kind) for p in (self._m0, self._m1, self._c0, self._c1))
        x = x.to(kind)
        spread = a[..., None] ** 2 * c0 + b[..., None] ** 2 * c1
        spread = spread + gamma[..., None] ** 2 * torch.eye(d, dtype=kind, device=x.device)
        root, failed = torch.linalg.cholesky_ex(spread)  # (T, P, d, d)
        if x.device.type == "cpu" and bool(failed.any()):  # elsewhere a look would wait for the device
            raise ValueError("t must be where rho_t has a density, which a law without spread has not at its end")
        off = x[:, None] - (a * m0 + b * m1)  # (B, P, d)
        if len(root) == 1:
            gap = torch.cholesky_solve(off.permute(1, 2, 0), root[0]).permute(2, 0, 1)
        else:
            gap = torch.cholesky_solve(off[..., None], root)[..., 0]
        half_det = root.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        norm = half_det + d / 2 * math.log(2 * math.pi)
        logits = self._log_weights.to(x.device, kind) - norm - (off * gap).sum(-1) / 2
        turn = a * da * _times(c0, gap) + b * db * _times(c1, gap)
        return _At(logits, gap, da * m0 + db * m1 + turn)

    @checks.arguments(x=checks.floating, t=TIME)
    def log_prob(self, x: Tensor, t: float | Tensor) -> Tensor:
        """``log rho_t(x)``, shape (B,)."""
        return torch.logsumexp(self._at(x, t).logits, 1).to(x.dtype)

    @checks.arguments(x=checks.floating, t=TIME)
    def s(self, x: Tensor, t: float | Tensor) -> Tensor:
        """The score ``grad log rho_t``."""
        return self._vs(x, t)[1]

    @checks.arguments(x=checks.floating, t=TIME)
    def v(self, x: Tensor, t: float | Tensor) -> Tensor:
        """``E[dI/dt | x_t = x]``."""
        return self._vs(x, t)[0]

    @checks.arguments(x=checks.floating, t=TIME)
    def eta(self, x: Tensor, t: float | Tensor) -> Tensor:
        """``E[z | x_t = x]``; of a one-sided path ``E[x0 | x_t = x]``."""
        return -self._of("latent", t, x) * self._vs(x, t)[1]

    def _vs(self, x: Tensor, t: float | Tensor) -> tuple[Tensor, Tensor]:
        at = self._at(x, t)
        r = torch.softmax(at.logits, 1)[..., None]
        return (r * at.velocity).sum(1).to(x.dtype), -(r * at.gap).sum(1).to(x.dtype)

    def _both(self, x: Tensor, t: float | Tensor, *, score: bool) -> tuple[Tensor, Any]:
        v, s = self._vs(x, t)
        return v - self._of("gg_dot", t, x) * s, s


def _times(covariances: Tensor, vectors: Tensor) -> Tensor:
    """(P, d, d) times (B, P, d)."""
    return torch.einsum("pij,bpj->bpi", covariances, vectors)
