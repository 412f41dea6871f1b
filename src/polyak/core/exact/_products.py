"""What is multiplied out: tilts, products and powers of mixtures of Gaussians."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import combinations_with_replacement
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from polyak.core import checks
from polyak.core.exact._algebra import multiplied, powers, spectrum, tilted

if TYPE_CHECKING:
    from polyak.core.exact.mixtures import Mixture

_MOST_COMPONENTS = 100_000  # of a power
_MIXTURE = checks.Like("a Mixture", "means", "weights", "covariances", "basis")


class Products:
    """The part of :class:`~polyak.core.exact.Mixture` that multiplies densities."""

    means: Tensor
    variances: Tensor
    weights: Tensor
    labels: Tensor | None
    basis: Tensor | None
    _gaussian: ClassVar[bool] = False  # the product of two such is one

    if TYPE_CHECKING:

        def __len__(self) -> int: ...

        @property
        def dim(self) -> int: ...

        @property
        def covariances(self) -> Tensor: ...

        def _assembled(
            self, means: Tensor, variances: Tensor, basis: Tensor | None, log_weights: Tensor, *, gaussian: bool
        ) -> Mixture: ...

    @checks.arguments(b=checks.array, B=checks.array | None)
    def tilt(
        self, b: Tensor | Sequence[float], B: float | Tensor | Sequence[float] | None = None
    ) -> tuple[Mixture, Tensor]:
        """The law proportional to ``p(x) exp(b'x - x'Bx/2)``, and the log of ``E[exp(b'x - x'Bx/2)]``.

        Component k becomes ``S'_k = (S_k^-1 + B)^-1``, ``m'_k = S'_k (S_k^-1 m_k + b)``,
        ``log w'_k = log w_k + (m'_k'S'_k^-1 m'_k - m_k'S_k^-1 m_k + log|S'_k| - log|S_k|) / 2``; point masses stay where they are.

        Args:
            b: (d,).
            B: a number (times the identity), (d,) a diagonal, or (d, d) symmetric; need not be positive.

        Returns:
            the tilted mixture, with this one's labels, and a number.

        Raises:
            ValueError: some ``S_k^-1 + B`` is not positive definite.
        """
        d, like = self.dim, {"dtype": torch.float64, "device": self.means.device}
        slope, bend = torch.as_tensor(b, **like), torch.as_tensor(0.0 if B is None else B, **like)
        if slope.shape != (d,):
            raise ValueError(f"b must have shape ({d},), got {tuple(slope.shape)}")
        if bend.shape not in ((), (d,), (d, d)) or (bend.ndim == 2 and not torch.allclose(bend, bend.mT)):
            raise ValueError(
                f"B must be a number, ({d},) or a symmetric ({d}, {d}) matrix, got shape {tuple(bend.shape)}"
            )
        round_ = self.basis is None and bend.ndim == 0
        full = bend if bend.ndim == 2 else torch.diag_embed(bend.expand(d))
        means, covariances, log_mass = tilted(self.means, self._roots(), slope, full)
        return self._of(means, covariances, log_mass + self.weights.log(), round_, self.labels)

    @checks.arguments(other=_MIXTURE)
    def product(self, other: Mixture) -> tuple[Mixture, Tensor]:
        """The law proportional to ``p(x) q(x)``, of K1 * K2 components, and the log of ``int p q``.

        Component ``k * K2 + l`` is that of the pair (k, l); of two Gaussians it is a Gaussian. It has no labels.
        """
        if other.dim != self.dim:
            raise ValueError(f"other must be of dimension {self.dim}, got {other.dim}")
        law = other.to(self.means.device)
        means, covariances, log_mass = multiplied(self.means, self.covariances, law.means, law.covariances)
        log_weights = (self.weights.log()[:, None] + law.weights.log()).flatten() + log_mass
        return self._of(means, covariances, log_weights, self.basis is None and law.basis is None, other=law)

    @checks.arguments(beta=checks.positive)
    def power(self, beta: float) -> tuple[Mixture, Tensor]:
        """The law proportional to ``p(x)^beta`` (annealed, for ``beta > 1``), and the log of ``int p^beta``.

        Of one component it is ``N(m, S / beta)``, and ``int p^beta = |2 pi S|^((1 - beta) / 2) beta^(-d/2)``.
        Of more, beta must be whole: the power is multiplied out, into ``(K + beta - 1 choose beta)`` components.
        """
        count = len(self)
        if count == 1:
            betas, log_choices = self.means.new_tensor([[beta]]), self.means.new_zeros(1)
        elif beta != round(beta) or math.comb(count + round(beta) - 1, round(beta)) > _MOST_COMPONENTS:
            raise ValueError(
                f"beta must be whole, and the power of at most {_MOST_COMPONENTS} components, of a mixture of {count}; "
                f"got {beta:g} (of modes that do not overlap: power_of_modes)"
            )
        else:
            chosen = list(combinations_with_replacement(range(count), round(beta)))
            index = torch.tensor(chosen, device=self.means.device)
            betas = torch.nn.functional.one_hot(index, count).sum(1).to(torch.float64)
            log_choices = math.lgamma(beta + 1) - torch.lgamma(betas + 1).sum(-1)
        return self._powers(betas, log_choices)

    @checks.arguments(beta=checks.positive)
    def power_of_modes(self, beta: float) -> tuple[Mixture, Tensor]:
        """``sum_k (w_k N(x; m_k, S_k))^beta``, normalised: the power of modes that do not overlap. With its log normalizer.

        Mode k has a mass proportional to ``w_k^beta |S_k|^((1 - beta) / 2)``. Labels are kept.
        """
        betas = beta * torch.eye(len(self), dtype=torch.float64, device=self.means.device)
        return self._powers(betas, self.means.new_zeros(len(self)), self.labels)

    def _powers(self, betas: Tensor, log_choices: Tensor, labels: Tensor | None = None) -> tuple[Mixture, Tensor]:
        means, covariances, log_mass = powers(self.means, self.covariances, betas, "beta is too near to zero")
        return self._of(
            means, covariances, log_mass + log_choices + betas @ self.weights.log(), self.basis is None, labels
        )

    def _roots(self) -> Tensor:
        """(K, d, d): ``C_k = L_k L_k'``."""
        scale = self.variances.expand(-1, self.dim).sqrt()
        return torch.diag_embed(scale) if self.basis is None else self.basis * scale[:, None]

    def _of(
        self,
        means: Tensor,
        covariances: Tensor,
        log_weights: Tensor,
        isotropic: bool,
        labels: Tensor | None = None,
        *,
        other: Products | None = None,
    ) -> tuple[Mixture, Tensor]:
        """A mixture of weights that are not normalised, and their log sum; of Gaussians, a Gaussian."""
        gaussian = self._gaussian and (other is None or other._gaussian)
        variances, basis = (covariances[:, :1, 0], None) if isotropic else spectrum(covariances)
        new = self._assembled(means, variances, basis, log_weights, gaussian=gaussian)
        new.labels = labels
        return new, log_weights.logsumexp(0)
