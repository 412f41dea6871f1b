"""Gaussian mixtures: the noised law, its score, denoiser and posterior; tilts, products and powers with their normalizers.

If ``x_0 ~ sum_k w_k N(m_k, C_k)`` and ``x = alpha x_0 + sigma eps`` then ``x ~ sum_k w_k N(alpha m_k, S_k)`` with
``S_k = alpha^2 C_k + sigma^2 I``, and with the responsibilities ``r_k(x) ∝ w_k N(x; alpha m_k, S_k)``

- score: ``sum_k r_k S_k^-1 (alpha m_k - x)``,
- posterior: ``p(x_0 | x) = sum_k r_k N(n_k(x), C_k - alpha^2 C_k S_k^-1 C_k)``, ``n_k = m_k + alpha C_k S_k^-1 (x - alpha m_k)``,
- posterior mean: ``E[x_0 | x] = sum_k r_k n_k(x)``.

A mixture times ``exp(b'x - x'Bx/2)``, times another mixture, or to a whole power is a mixture again, of known mass.

Points are vectors: x has shape (*batch, d). ``alpha`` and ``sigma`` are numbers, or tensors that broadcast with (*batch,).
Everything is computed in float64 and returned in x's dtype, on x's device.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from polyak.core import checks
from polyak.core.exact import _products
from polyak.core.exact._algebra import powers, spectrum
from polyak.core.exact._categorical import drawn
from polyak.core.exact._products import Components

Scale = float | Tensor
_MIXTURE = checks.Like("a Mixture", "means", "weights", "covariances", "basis")

M = TypeVar("M", bound="Mixture")


class _Terms(NamedTuple):
    """What every quantity is made of. B is the flattened batch, K the number of components."""

    x: Tensor  # (B, d), float64
    alpha: Tensor  # (B or 1, 1)
    sigma: Tensor  # (B or 1, 1)
    offset: Tensor | None  # (B, K, d): x - alpha m_k in C_k's eigenbasis; None where C_k = c_k I
    variance: Tensor  # (B or 1, K, d or 1): the eigenvalues of S_k
    logits: Tensor  # (B, K): log w_k + log N(x; alpha m_k, S_k)
    distance: Tensor  # (B, K): |x - alpha m_k|^2; only where C_k = c_k I


class Mixture:
    """A mixture of K Gaussians in d dimensions.

    Args:
        means: (K, d).
        covariances: a number or (K,): isotropic variances, 0 for point masses; (K, d): diagonals; (K, d, d): full matrices.
        weights: (K,), positive, normalised here; equal where left out.
        labels: (K,) integers, the class of each component, for :meth:`of_class` and :meth:`class_posterior`.

    Raises:
        ValueError: shapes that do not fit, negative variances, weights that are not positive.

    Example:
        >>> model = Mixture([[-1.0], [1.0]], 0.01)
        >>> model.posterior_mean(torch.tensor([[0.3]]), alpha=1.0, sigma=0.1).shape
        torch.Size([1, 1])
    """

    @checks.arguments(
        means=checks.array,
        covariances=checks.array,
        weights=checks.array | None,
        labels=checks.Array(whole=True) | None,
    )
    def __init__(
        self,
        means: Tensor | Sequence[Sequence[float]],
        covariances: float | Tensor | Sequence[float] = 0.0,
        weights: Tensor | Sequence[float] | None = None,
        labels: Tensor | Sequence[int] | None = None,
    ) -> None:
        self.means = torch.as_tensor(means, dtype=torch.float64)
        if self.means.ndim != 2 or 0 in self.means.shape:
            raise ValueError(f"means must have shape (K, d), got {tuple(self.means.shape)}")
        count, dim = self.means.shape
        device = self.means.device
        given = torch.as_tensor(covariances, dtype=torch.float64, device=device)
        self.basis: Tensor | None = None  # (K, d, d): eigenvectors of C_k in columns
        if given.ndim == 0 or given.shape == (count,):
            self.variances = given.expand(count).reshape(count, 1).clone()
        elif given.shape == (count, dim):
            self.variances = given.clone()
            self.basis = torch.eye(dim, dtype=torch.float64, device=device).expand(count, dim, dim)
        elif given.shape == (count, dim, dim):
            if not torch.allclose(given, given.mT):
                raise ValueError("covariances must be symmetric matrices")
            self.variances, self.basis = spectrum(given)
        else:
            raise ValueError(
                f"covariances must be a number or have shape ({count},), ({count}, {dim}) or ({count}, {dim}, {dim}), "
                f"got {tuple(given.shape)}"
            )
        if not bool((self.variances >= 0).all()):
            raise ValueError(
                f"covariances must be positive semidefinite, got an eigenvalue {self.variances.min().item():g}"
            )
        raw = torch.as_tensor([1.0] * count if weights is None else weights, dtype=torch.float64, device=device)
        if raw.shape != (count,) or not bool((raw > 0).all() & raw.isfinite().all()):
            raise ValueError(f"weights must be {count} positive numbers, got {weights!r}")
        self.weights = raw / raw.sum()
        self.labels = None if labels is None else torch.as_tensor(labels, dtype=torch.long, device=device)
        if self.labels is not None and self.labels.shape != (count,):
            raise ValueError(f"labels must have shape ({count},), got {tuple(self.labels.shape)}")

    def __repr__(self) -> str:
        return f"{type(self).__name__}(components={len(self)}, dim={self.dim})"

    def __len__(self) -> int:
        return self.means.shape[0]

    @property
    def dim(self) -> int:
        return self.means.shape[1]

    @property
    def mean(self) -> Tensor:
        """(d,)"""
        return self.weights @ self.means

    @property
    def covariance(self) -> Tensor:
        """(d, d)"""
        spread = self.means - self.mean
        within = torch.einsum("k,kij->ij", self.weights, self.covariances)
        return within + torch.einsum("k,ki,kj->ij", self.weights, spread, spread)

    @property
    def covariances(self) -> Tensor:
        """(K, d, d)"""
        if self.basis is None:
            return torch.diag_embed(self.variances.expand(-1, self.dim))
        return (self.basis * self.variances[:, None]) @ self.basis.mT

    def to(self, device: torch.device | str) -> Mixture:
        """The same model on another device."""
        return self._mapped(lambda p: p.to(device))

    def select(self, components: Tensor | Sequence[int]) -> Mixture:
        """The mixture of some of the components, by index or boolean mask, renormalised."""
        index = torch.as_tensor(components, device=self.means.device)
        if index.numel() == 0 or (index.dtype == torch.bool and not bool(index.any())):
            raise ValueError("components must name at least one component")
        return self._mapped(lambda p: p[index])

    def of_class(self, label: int) -> Mixture:
        """The conditional law given a class."""
        if self.labels is None:
            raise ValueError("this mixture has no labels; give Mixture(labels=...)")
        chosen = self.labels == label
        if not bool(chosen.any()):
            raise ValueError(f"label must be one of {self.labels.unique().tolist()}, got {label!r}")
        return self.select(chosen)

    def _mapped(self, change: Callable[[Tensor], Tensor]) -> Mixture:
        """The mixture whose parameters, all of which begin with K, are changed alike."""
        new = type(self).__new__(type(self))
        new.means, new.variances, new.weights = change(self.means), change(self.variances), change(self.weights)
        new.weights = new.weights / new.weights.sum()
        new.basis = None if self.basis is None else change(self.basis)
        new.labels = None if self.labels is None else change(self.labels)
        return new

    @checks.arguments(
        n=checks.Integer(0), alpha=checks.non_negative, sigma=checks.non_negative, generator=checks.generator | None
    )
    def sample(
        self, n: int, *, alpha: float = 1.0, sigma: float = 0.0, generator: torch.Generator | None = None
    ) -> Tensor:
        """n draws of ``alpha x_0 + sigma eps``, float64, shape (n, d)."""
        device = self.means.device
        levels = torch.rand(n, dtype=torch.float64, device=device, generator=generator)
        which = torch.searchsorted(self.weights.cumsum(0), levels, right=True).clamp(max=len(self) - 1)
        z = torch.randn(n, self.dim, dtype=torch.float64, device=device, generator=generator)
        z = z * (alpha**2 * self.variances[which] + sigma**2).sqrt()
        if self.basis is not None:
            z = torch.einsum("nij,nj->ni", self.basis[which], z)
        return alpha * self.means[which] + z

    def log_prob(self, x: Tensor, alpha: Scale = 1.0, sigma: Scale = 0.0) -> Tensor:
        """``log p(x)`` of the noised law, shape (*batch,)."""
        return torch.logsumexp(self._terms(x, alpha, sigma).logits, -1).reshape(x.shape[:-1]).to(x.dtype)

    def responsibilities(self, x: Tensor, alpha: Scale = 1.0, sigma: Scale = 0.0) -> Tensor:
        """The posterior probabilities of the components, shape (*batch, K)."""
        r = torch.softmax(self._terms(x, alpha, sigma).logits, -1)
        return r.reshape(*x.shape[:-1], len(self)).to(x.dtype)

    def class_posterior(self, x: Tensor, alpha: Scale = 1.0, sigma: Scale = 0.0) -> Tensor:
        """The posterior probabilities of the classes 0 .. max(labels), shape (*batch, classes)."""
        if self.labels is None:
            raise ValueError("this mixture has no labels; give Mixture(labels=...)")
        member = torch.nn.functional.one_hot(self.labels).to(x.dtype)
        return self.responsibilities(x, alpha, sigma) @ member.to(x.device)

    def posterior_mean(self, x: Tensor, alpha: Scale, sigma: Scale) -> Tensor:
        """The optimal denoiser ``E[x_0 | x]``, x's shape."""
        terms = self._terms(x, alpha, sigma)
        r = torch.softmax(terms.logits, -1)
        if terms.offset is None:
            share = self._gain(terms)[..., 0]
            mean = (r * (1 - terms.alpha * share)) @ self.means.to(x.device) + (r * share).sum(
                -1, keepdim=True
            ) * terms.x
        else:
            mean = torch.einsum("bk,bki->bi", r, self._posterior_means(terms))
        return mean.reshape(x.shape).to(x.dtype)

    def _gain(self, terms: _Terms) -> Tensor:
        """``alpha C_k S_k^-1`` in the eigenbasis, (B or 1, K, d or 1)."""
        return terms.alpha[..., None] * self.variances.to(terms.x.device) / terms.variance

    def _posterior_means(self, terms: _Terms) -> Tensor:
        """``E[x_0 | x, k]``, (B, K, d)."""
        gain, means = self._gain(terms), self.means.to(terms.x.device)
        if terms.offset is None:
            return means + gain * (terms.x[:, None] - terms.alpha[..., None] * means)
        assert self.basis is not None
        return means + torch.einsum("kij,bkj->bki", self.basis.to(terms.x.device), gain * terms.offset)

    def _posterior_variances(self, terms: _Terms) -> Tensor:
        """Eigenvalues ``c (S - alpha^2 c) / S`` of ``Cov[x_0 | x, k]``, (B or 1, K, d or 1)."""
        noise = terms.sigma[..., None] ** 2
        return self.variances.to(terms.x.device) * noise / terms.variance

    def posterior(self, x: Tensor, alpha: Scale, sigma: Scale) -> Mixture:
        """The law of x_0 given one point x, shape (d,): a mixture with this one's labels. See also :meth:`sample_posterior`."""
        terms = self._terms(x, alpha, sigma)
        if x.ndim != 1:
            raise ValueError(f"x must be one point, of shape ({self.dim},), got {tuple(x.shape)}")
        law = self.to(x.device)
        means, variances = self._posterior_means(terms)[0], self._posterior_variances(terms)[0]
        new = _made(type(self), means, variances, law.basis, terms.logits[0])
        new.labels = law.labels
        return new

    def sample_posterior(
        self, x: Tensor, alpha: Scale, sigma: Scale, *, generator: torch.Generator | None = None
    ) -> Tensor:
        """One draw of x_0 given x for every point, x's shape."""
        terms = self._terms(x, alpha, sigma)
        which = drawn(terms.logits.softmax(-1), generator)
        rows = torch.arange(len(which), device=x.device)
        means = self._posterior_means(terms)[rows, which]
        variances = self._posterior_variances(terms).expand(len(rows), -1, -1)[rows, which]
        z = torch.randn(means.shape, dtype=torch.float64, device=x.device, generator=generator) * variances.sqrt()
        if self.basis is not None:
            z = torch.einsum("nij,nj->ni", self.basis.to(x.device)[which], z)
        return (means + z).reshape(x.shape).to(x.dtype)

    def velocity(self, x: Tensor, alpha: Scale, sigma: Scale, dalpha: Scale = -1.0, dsigma: Scale = 1.0) -> Tensor:
        """The probability flow's velocity ``E[dalpha x_0 + dsigma eps | x]``, x's shape.

        The defaults are the slopes of the linear path ``x_t = (1 - t) x_0 + t eps``, for which it is ``E[eps - x_0 | x_t]``.
        """
        wide = x.to(torch.float64)
        slopes = _column("dalpha", dalpha, x, checks.real), _column("dsigma", dsigma, x, checks.real)
        x0 = self.posterior_mean(wide, alpha, sigma).reshape(-1, self.dim)
        noise = -_column("sigma", sigma, x) * self.score(wide, alpha, sigma).reshape(-1, self.dim)
        return (slopes[0] * x0 + slopes[1] * noise).reshape(x.shape).to(x.dtype)

    def score(self, x: Tensor, alpha: Scale = 1.0, sigma: Scale = 0.0) -> Tensor:
        """``grad log p(x)`` of the noised law, x's shape."""
        terms = self._terms(x, alpha, sigma)
        return self._score(terms, torch.softmax(terms.logits, -1)).reshape(x.shape).to(x.dtype)

    def score_divergence(self, x: Tensor, alpha: Scale = 1.0, sigma: Scale = 0.0) -> Tensor:
        """``div score = sum_k r_k (|g_k|^2 - tr S_k^-1) - |score|^2`` with g_k the components' scores; shape (*batch,)."""
        terms = self._terms(x, alpha, sigma)
        r = torch.softmax(terms.logits, -1)
        if terms.offset is None:
            v = terms.variance[..., 0]
            inner = terms.distance / v**2 - self.dim / v
        else:
            inner = ((terms.offset / terms.variance) ** 2 - 1 / terms.variance).sum(-1)
        divergence = (r * inner).sum(-1) - self._score(terms, r).square().sum(-1)
        return divergence.reshape(x.shape[:-1]).to(x.dtype)

    def _score(self, terms: _Terms, r: Tensor) -> Tensor:
        device = terms.x.device
        if terms.offset is None:
            share = r / terms.variance[..., 0]
            return terms.alpha * (share @ self.means.to(device)) - share.sum(-1, keepdim=True) * terms.x
        assert self.basis is not None
        pull = torch.einsum("kij,bkj->bki", self.basis.to(device), terms.offset / terms.variance)
        return -torch.einsum("bk,bki->bi", r, pull)

    @checks.arguments(b=checks.array, B=checks.array | None)
    def tilt(
        self, b: Tensor | Sequence[float], B: float | Tensor | Sequence[float] | None = None
    ) -> tuple[Mixture, Tensor]:
        """The law proportional to ``p(x) exp(b'x - x'Bx/2)``, and the log of ``E[exp(b'x - x'Bx/2)]``. Labels are kept.

        Component k becomes ``S'_k = (S_k^-1 + B)^-1``, ``m'_k = S'_k (S_k^-1 m_k + b)``,
        ``log w'_k = log w_k + (m'_k'S'_k^-1 m'_k - m_k'S_k^-1 m_k + log|S'_k| - log|S_k|) / 2``; point masses stay where they are.

        Args:
            b: (d,).
            B: a number (times the identity), (d,) a diagonal, or (d, d) symmetric; need not be positive.

        Raises:
            ValueError: some ``S_k^-1 + B`` is not positive definite.
        """
        return self._normalised(_products.tilt(self, b, B), isinstance(self, Gaussian), self.labels)

    @checks.arguments(other=_MIXTURE)
    def product(self, other: Mixture) -> tuple[Mixture, Tensor]:
        """The law proportional to ``p(x) q(x)``, of K1 * K2 components, and the log of ``int p q``.

        Component ``k * K2 + l`` is that of the pair (k, l). It has no labels. Of two Gaussians it is a Gaussian.
        """
        gaussian = isinstance(self, Gaussian) and isinstance(other, Gaussian)
        return self._normalised(_products.product(self, other), gaussian)

    @checks.arguments(beta=checks.positive)
    def power(self, beta: float) -> tuple[Mixture, Tensor]:
        """The law proportional to ``p(x)^beta`` (annealed, for ``beta > 1``), and the log of ``int p^beta``.

        Of one component it is ``N(m, S / beta)``, and ``int p^beta = |2 pi S|^((1 - beta) / 2) beta^(-d/2)``.
        Of more, beta must be whole: the power is multiplied out, into ``(K + beta - 1 choose beta)`` components.
        """
        return self._normalised(_products.power(self, beta), isinstance(self, Gaussian))

    @checks.arguments(beta=checks.positive)
    def power_of_modes(self, beta: float) -> tuple[Mixture, Tensor]:
        """``sum_k (w_k N(x; m_k, S_k))^beta``, normalised: the power of modes that do not overlap. With its log normalizer.

        Mode k has a mass proportional to ``w_k^beta |S_k|^((1 - beta) / 2)``. Labels are kept.
        """
        return self._normalised(_products.power_of_modes(self, beta), isinstance(self, Gaussian), self.labels)

    def _normalised(self, parts: Components, gaussian: bool, labels: Tensor | None = None) -> tuple[Mixture, Tensor]:
        variances, basis = (parts.covariances[:, :1, 0], None) if parts.isotropic else spectrum(parts.covariances)
        new = _made(Gaussian if gaussian else Mixture, parts.means, variances, basis, parts.log_masses)
        new.labels = labels
        return new, parts.log_masses.logsumexp(0)

    def _terms(self, x: Tensor, alpha: Scale, sigma: Scale) -> _Terms:
        if not x.is_floating_point():
            raise ValueError(f"x must be floating point, got {x.dtype}")
        if x.ndim < 1 or x.shape[-1] != self.dim:
            raise ValueError(f"x must have shape (*batch, {self.dim}), got {tuple(x.shape)}")
        flat = x.reshape(-1, self.dim).to(torch.float64)
        a, s = _column("alpha", alpha, x), _column("sigma", sigma, x)
        means, variances = self.means.to(x.device), self.variances.to(x.device)
        spread = a[..., None] ** 2 * variances + s[..., None] ** 2
        if x.device.type == "cpu" and not bool((spread > 0).all()):  # elsewhere the check would wait for the device
            raise ValueError("sigma must be > 0 where a component has zero variance, got sigma=0")
        if self.basis is None:
            offset = None
            square = flat.square().sum(-1, keepdim=True) - 2 * a * (flat @ means.T) + a**2 * means.square().sum(-1)
            distance = square.clamp(min=0)
            quadratic = distance / spread[..., 0] + self.dim * torch.log(spread[..., 0])
        else:
            offset = torch.einsum("kij,bki->bkj", self.basis.to(x.device), flat[:, None] - a[..., None] * means)
            distance = flat.new_empty(0)
            quadratic = (offset.square() / spread + torch.log(spread)).sum(-1)
        logits = torch.log(self.weights.to(x.device)) - 0.5 * (quadratic + self.dim * math.log(2 * math.pi))
        return _Terms(flat, a, s, offset, spread, logits, distance)


def _column(name: str, value: Scale, x: Tensor, kind: checks.Number = checks.non_negative) -> Tensor:
    """A coefficient as (1, 1), or as (B, 1) where it differs between the points."""
    if not isinstance(value, Tensor):
        return torch.tensor([[kind(name, value)]], dtype=torch.float64, device=x.device)
    value = value.to(device=x.device, dtype=torch.float64)
    return value.reshape(1, 1) if value.ndim == 0 else value.expand(x.shape[:-1]).reshape(-1, 1)


def _made(kind: type[M], means: Tensor, variances: Tensor, basis: Tensor | None, log_weights: Tensor) -> M:
    """A mixture of parts that fit, as they are; a weight may be so small that it is zero."""
    new = kind.__new__(kind)
    new.means, new.variances, new.basis = means, variances, basis
    new.weights, new.labels = log_weights.softmax(0), None
    return new


class Gaussian(Mixture):
    """``N(mean, covariance)``: a mixture of one, whose probability-flow ODE is solved exactly.

    Args:
        mean: (d,).
        covariance: a number, (d,) or (d, d).
    """

    @checks.arguments(mean=checks.array, covariance=checks.array)
    def __init__(self, mean: Tensor | Sequence[float], covariance: float | Tensor | Sequence[float] = 1.0) -> None:
        mean = torch.as_tensor(mean, dtype=torch.float64)
        given = torch.as_tensor(covariance, dtype=torch.float64)
        if mean.ndim != 1 or (given.ndim and given.shape not in ((len(mean),), (len(mean),) * 2)):
            raise ValueError(
                f"mean must have shape (d,), and covariance none, (d,) or (d, d), got {tuple(mean.shape)} and {tuple(given.shape)}"
            )
        try:
            super().__init__(mean[None], given if given.ndim == 0 else given[None])
        except ValueError as error:
            raise ValueError(f"mean and covariance: {error}") from None

    def flow(self, x: Tensor, start: tuple[float, float], end: tuple[float, float]) -> Tensor:
        """The exact probability-flow map from noise level ``(alpha_s, sigma_s)`` to ``(alpha_t, sigma_t)``, x's shape.

        In an eigenbasis of the covariance each coordinate of ``x - alpha mean`` is scaled by
        ``sqrt((alpha_t^2 c + sigma_t^2) / (alpha_s^2 c + sigma_s^2))``.
        """
        (a_s, s_s), (a_t, s_t) = start, end
        mean, c = self.means[0].to(x.device), self.variances[0].to(x.device)
        y = x.to(torch.float64) - a_s * mean
        factor = ((a_t**2 * c + s_t**2) / (a_s**2 * c + s_s**2)).sqrt()
        if self.basis is None:
            y = y * factor
        else:
            basis = self.basis[0].to(x.device)
            y = (y @ basis * factor) @ basis.T
        return (a_t * mean + y).to(x.dtype)


@checks.arguments(laws=checks.Each(checks.Instance(Mixture, words="a Gaussian"), least=1), betas=checks.Numbers())
def product_of_powers(laws: Sequence[Mixture], betas: Sequence[float]) -> tuple[Gaussian, Tensor]:
    """``prod_i N(x; m_i, S_i)^beta_i``, normalised, and the log of its integral.

    Args:
        laws: Gaussians (mixtures of one component) of one dimension, with density.
        betas: as many numbers; they may be negative, as those of classifier-free guidance ``(1 - w, w)``.

    Raises:
        ValueError: ``sum_i beta_i S_i^-1`` is not positive definite.

    Example:
        >>> law, log_z = product_of_powers([Gaussian([1.5], 0.5), Gaussian([-0.5], 2.0)], [1.0, 1.0])
        >>> round(law.mean.item(), 6), round(law.covariance.item(), 6)
        (1.1, 0.4)
    """
    if len(betas) != len(laws):
        raise ValueError(f"betas must be {len(laws)} numbers, one for each of laws, got {len(betas)}")
    if any(len(law) != 1 or law.dim != laws[0].dim for law in laws):
        raise ValueError("laws must each have one component, and all have one dimension")
    device = laws[0].means.device
    means, covariances = (torch.cat([getattr(law, n).to(device) for law in laws]) for n in ("means", "covariances"))
    row = torch.as_tensor([float(b) for b in betas], dtype=torch.float64, device=device)[None]
    message = "betas must leave a law that can be normalised: sum beta_i S_i^-1 must be positive definite"
    mean, covariance, log_mass = powers(means, covariances, row, message)
    return _made(Gaussian, mean, *spectrum(covariance), log_mass), log_mass[0]
