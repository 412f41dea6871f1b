"""Linear Gaussian state-space models: the Kalman filter, the Rauch-Tung-Striebel smoother, the likelihood and its score.

    x_0 ~ N(m0, P0),   x_t = A x_{t-1} + N(0, Q),   y_t = C x_t + N(0, R),   t = 0 .. T-1

Filter (Kalman 1960): ``m- = A m``, ``P- = A P A' + Q``, ``S = C P- C' + R``, ``K = P- C' S^-1``, ``m = m- + K (y - C m-)``, and in
Joseph's form ``P = (I - K C) P- (I - K C)' + K R K'``. The log-likelihood is the sum of ``log N(y_t; C m-_t, S_t)``.

Smoother (Rauch, Tung, Striebel 1965): ``G = P A' (P-_{t+1})^-1``, ``ms = m + G (ms_{t+1} - m-_{t+1})``,
``Ps = P + G (Ps_{t+1} - P-_{t+1}) G'`` and ``Cov(x_t, x_{t+1} | y) = G Ps_{t+1}``.

The first observation is of x_0 itself. Series are independent: y has shape (*batch, T, p). Everything is float64.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from polyak.core import checks
from polyak.core.exact._algebra import factored

Matrix = Tensor | Sequence[Sequence[float]]


@checks.arguments(
    means=checks.tensor,
    covariances=checks.tensor,
    predicted_means=checks.tensor,
    predicted_covariances=checks.tensor,
    log_likelihood=checks.tensor,
)
class FilteredMoments(NamedTuple):
    """``N(means, covariances)`` is the law of x_t given y_0 .. y_t; the predicted ones are given y_0 .. y_{t-1}."""

    means: Tensor  # (*batch, T, d)
    covariances: Tensor  # (*batch, T, d, d)
    predicted_means: Tensor  # (*batch, T, d)
    predicted_covariances: Tensor  # (*batch, T, d, d)
    log_likelihood: Tensor  # (*batch,)


@checks.arguments(means=checks.tensor, covariances=checks.tensor, lag_one=checks.tensor, log_likelihood=checks.tensor)
class SmoothedMoments(NamedTuple):
    """``N(means, covariances)`` is the law of x_t given all of y; ``lag_one`` is ``Cov(x_t, x_{t+1} | y)``."""

    means: Tensor  # (*batch, T, d)
    covariances: Tensor  # (*batch, T, d, d)
    lag_one: Tensor  # (*batch, T-1, d, d)
    log_likelihood: Tensor  # (*batch,)

    @property
    def second_moments(self) -> Tensor:
        """``E[x_t x_t' | y]``, (*batch, T, d, d)."""
        return self.covariances + self.means[..., :, None] * self.means[..., None, :]

    @property
    def cross_moments(self) -> Tensor:
        """``E[x_t x_{t+1}' | y]``, (*batch, T-1, d, d); its sum over t is the additive functional that smoothers are tested on."""
        return self.lag_one + self.means[..., :-1, :, None] * self.means[..., 1:, None, :]


@checks.arguments(**dict.fromkeys(("A", "C", "Q", "R", "m0", "P0"), checks.tensor))
class LinearGaussianScore(NamedTuple):
    """Derivatives of the log-likelihood, each of shape (*batch, *shape of the parameter).

    Those of Q, R and P0 are symmetric: ``d loglik = tr(score' dQ)`` for symmetric dQ.
    """

    A: Tensor
    C: Tensor
    Q: Tensor
    R: Tensor
    m0: Tensor
    P0: Tensor


class LinearGaussian:
    """A linear Gaussian state-space model of d states and p observations.

    Args:
        A: (d, d), the transition.
        C: (p, d), the observation.
        Q, R: (d, d) and (p, p), covariances of the noises, positive semidefinite.
        m0: (d,), the mean of x_0.
        P0: (d, d), its covariance, positive semidefinite.

    Parameters that are tensors with ``requires_grad`` stay in the graph: :meth:`log_likelihood` can be differentiated.

    Example:
        >>> model = LinearGaussian([[0.9]], [[1.0]], [[0.5]], [[0.2]], [0.0], [[1.0]])
        >>> x, y = model.simulate(100, n=8, generator=torch.Generator().manual_seed(0))
        >>> model.filter(y).means.shape, model.smooth(y).cross_moments.sum(-3).shape
        (torch.Size([8, 100, 1]), torch.Size([8, 1, 1]))
    """

    @checks.arguments(**dict.fromkeys(("A", "C", "Q", "R", "m0", "P0"), checks.array))
    def __init__(self, A: Matrix, C: Matrix, Q: Matrix, R: Matrix, m0: Tensor | Sequence[float], P0: Matrix) -> None:
        self.A = torch.as_tensor(A, dtype=torch.float64)
        self.C, self.Q, self.R, self.m0, self.P0 = (
            torch.as_tensor(value, dtype=torch.float64, device=self.A.device) for value in (C, Q, R, m0, P0)
        )
        d = self.A.shape[0] if self.A.ndim == 2 else 0
        if self.A.shape != (d, d) or d == 0:
            raise ValueError(f"A must have shape (d, d), got {tuple(self.A.shape)}")
        if self.C.ndim != 2 or self.C.shape[0] == 0 or self.C.shape[1] != d:
            raise ValueError(f"C must have shape (p, {d}), got {tuple(self.C.shape)}")
        p = self.C.shape[0]
        if self.m0.shape != (d,):
            raise ValueError(f"m0 must have shape ({d},), got {tuple(self.m0.shape)}")
        for name, value, size in (("Q", self.Q, d), ("R", self.R, p), ("P0", self.P0, d)):
            _check_covariance(name, value.detach(), size)

    def __repr__(self) -> str:
        return f"LinearGaussian(states={self.A.shape[0]}, observations={self.C.shape[0]})"

    @checks.arguments(T=checks.Integer(1), n=checks.Integer(0), generator=checks.generator | None)
    def simulate(self, T: int, n: int = 1, *, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """n independent series: states (n, T, d) and observations (n, T, p)."""
        with torch.no_grad():
            roots = [_root(c) for c in (self.P0, self.Q, self.R)]
            draws = [
                torch.randn(n, T, len(c), dtype=c.dtype, device=c.device, generator=generator) for c in (self.Q, self.R)
            ]
            states = [self.m0 + draws[0][:, 0] @ roots[0].T]
            for t in range(1, T):
                states.append(states[-1] @ self.A.T + draws[0][:, t] @ roots[1].T)
            x = torch.stack(states, 1)
            return x, x @ self.C.T + draws[1] @ roots[2].T

    def filter(self, y: Tensor) -> FilteredMoments:
        """Filtered and predicted moments, and the log-likelihood.

        Args:
            y: (*batch, T, p); what is NaN is missing, a whole row or a part of one.
        """
        y, seen = self._observed(y)
        batch, T, d = y.shape[:-2], y.shape[-2], self.A.shape[0]
        eye = torch.eye(d, dtype=y.dtype, device=y.device)
        m, P = self.m0.expand(*batch, d), self.P0
        means, covariances, predicted_means, predicted = [], [], [], []
        log_likelihood = y.new_zeros(batch)
        for t in range(T):
            if t:
                m, P = m @ self.A.mT, _symmetric(self.A @ P @ self.A.mT + self.Q)
            predicted_means.append(m)
            predicted.append(P)
            C, R, gap = self._at(seen, t)
            factor = factored(
                _symmetric(C @ P @ C.mT) + R, "y has no density under the model: C P C' + R must be positive definite"
            )
            residual = gap * y[..., t, :] - (C @ m[..., None])[..., 0]
            white = torch.linalg.solve_triangular(factor, residual[..., None], upper=False)[..., 0]
            gain = torch.cholesky_solve(C @ P, factor).mT
            m = m + (gain @ residual[..., None])[..., 0]
            left = eye - gain @ C
            P = _symmetric(left @ P @ left.mT + gain @ R @ gain.mT)
            count = gap.sum(-1) if isinstance(gap, Tensor) else y.shape[-1]
            half_det = factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)
            log_likelihood = log_likelihood - 0.5 * (white.square().sum(-1) + count * math.log(2 * math.pi)) - half_det
            means.append(m)
            covariances.append(P)
        return FilteredMoments(
            torch.stack(means, -2),
            _stacked(covariances, batch),
            torch.stack(predicted_means, -2),
            _stacked(predicted, batch),
            log_likelihood,
        )

    def log_likelihood(self, y: Tensor) -> Tensor:
        """``log p(y)``, (*batch,), of y as in :meth:`filter`; differentiable in the parameters and in y."""
        return self.filter(y).log_likelihood

    def smooth(self, y: Tensor) -> SmoothedMoments:
        """Moments given all of y, as in :meth:`filter`; the covariances of neighbours in time are ``lag_one``."""
        f = self.filter(y)
        m, P = f.means[..., -1, :], f.covariances[..., -1, :, :]
        means, covariances, lags = [m], [P], []
        for t in range(f.means.shape[-2] - 2, -1, -1):
            filtered, ahead = f.covariances[..., t, :, :], f.predicted_covariances[..., t + 1, :, :]
            gain = _solved(ahead, self.A @ filtered).mT
            lags.append(gain @ P)
            m = f.means[..., t, :] + (gain @ (m - f.predicted_means[..., t + 1, :])[..., None])[..., 0]
            P = _symmetric(filtered + gain @ (P - ahead) @ gain.mT)
            means.append(m)
            covariances.append(P)
        lag_one = torch.stack(lags[::-1], -3) if lags else P.new_zeros(*P.shape[:-2], 0, *P.shape[-2:])
        return SmoothedMoments(
            torch.stack(means[::-1], -2), torch.stack(covariances[::-1], -3), lag_one, f.log_likelihood
        )

    def score(self, y: Tensor) -> LinearGaussianScore:
        """The derivative of the log-likelihood by Fisher's identity: ``E[grad log p(x, y) | y]``, of y as in :meth:`filter`.

        ``d/dA = Q^-1 sum E[(x_{t+1} - A x_t) x_t' | y]`` and ``d/dQ = Q^-1 (sum E[w w' | y] - (T - 1) Q) Q^-1 / 2`` with
        ``w = x_{t+1} - A x_t``; those of C, R, m0 and P0 are alike.

        Raises:
            ValueError: Q, R or P0 is singular (differentiate :meth:`log_likelihood`), or a row of y is missing in part.
        """
        with torch.no_grad():
            s = self.smooth(y)
            y, seen = self._observed(y)
            row = torch.ones_like(y[..., 0]) if seen is None else seen[..., 0].to(y.dtype)
            if seen is not None and not bool((seen == seen[..., :1]).all()):
                raise ValueError("y must have rows that are there or NaN throughout; differentiate log_likelihood")
            second, cross = s.second_moments, s.cross_moments.sum(-3)
            before, after = second[..., :-1, :, :].sum(-3), second[..., 1:, :, :].sum(-3)
            noise = cross.mT - self.A @ before  # sum E[w x_t']
            spread = _symmetric(after - self.A @ cross - noise @ self.A.mT)  # sum E[w w']
            weighed = row[..., None, None]
            yx = (weighed * y[..., :, None] * s.means[..., None, :]).sum(-3)
            yy = (weighed * y[..., :, None] * y[..., None, :]).sum(-3)
            error = yx - self.C @ (weighed * second).sum(-3)  # sum E[v x_t'], v = y_t - C x_t
            residual = _symmetric(yy - self.C @ yx.mT - error @ self.C.mT)  # sum E[v v']
            start = s.means[..., 0, :] - self.m0
            first = s.covariances[..., 0, :, :] + start[..., :, None] * start[..., None, :]
            Q, R, P0 = (_inverse(name, value) for name, value in (("Q", self.Q), ("R", self.R), ("P0", self.P0)))
            return LinearGaussianScore(
                Q @ noise,
                R @ error,
                0.5 * Q @ (spread - (y.shape[-2] - 1) * self.Q) @ Q,
                0.5 * R @ (residual - row.sum(-1)[..., None, None] * self.R) @ R,
                start @ P0,
                0.5 * P0 @ (first - self.P0) @ P0,
            )

    def _observed(self, y: Tensor) -> tuple[Tensor, Tensor | None]:
        """y with zeros where it is missing, and where it is not; None where nothing is missing."""
        p = self.C.shape[0]
        if not isinstance(y, Tensor) or not y.is_floating_point():
            raise TypeError(f"y must be a floating-point tensor, got {checks.shown(y)}")
        if y.ndim < 2 or y.shape[-1] != p or y.shape[-2] == 0:
            raise ValueError(f"y must have shape (*batch, T, {p}) with T > 0, got {tuple(y.shape)}")
        y = y.to(self.A)
        if bool(y.isinf().any()):
            raise ValueError("y must be finite, or NaN where it is missing; got an infinite number")
        seen = ~y.isnan()
        return (y, None) if bool(seen.all()) else (torch.where(seen, y, 0.0), seen)

    def _at(self, seen: Tensor | None, t: int) -> tuple[Tensor, Tensor, Tensor | float]:
        """C and R with a missing observation as one of nothing, in noise of its own; and 1 where there is one."""
        if seen is None:
            return self.C, self.R, 1.0
        gap = seen[..., t, :].to(self.C)
        return gap[..., None] * self.C, gap[..., None] * self.R * gap[..., None, :] + torch.diag_embed(1 - gap), gap


def _check_covariance(name: str, value: Tensor, size: int) -> None:
    if value.shape != (size, size):
        raise ValueError(f"{name} must have shape ({size}, {size}), got {tuple(value.shape)}")
    values = torch.linalg.eigvalsh(value)
    slack = size * torch.finfo(value.dtype).eps * values.abs().max()
    if not torch.allclose(value, value.mT) or not bool((values >= -slack).all()):
        raise ValueError(f"{name} must be symmetric and positive semidefinite, got eigenvalues {values.tolist()}")


def _symmetric(matrix: Tensor) -> Tensor:
    return 0.5 * (matrix + matrix.mT)


def _root(covariance: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(covariance)
    return vectors * values.clamp(min=0).sqrt()


def _solved(matrix: Tensor, right: Tensor) -> Tensor:
    """``matrix^-1 right`` for covariances; by the pseudo-inverse where one is singular, as where noise is absent."""
    factor, failed = torch.linalg.cholesky_ex(matrix)
    pivots = factor.detach().diagonal(dim1=-2, dim2=-1).square()
    least = pivots.amax(-1) * matrix.shape[-1] * 4 * torch.finfo(matrix.dtype).eps
    if bool(failed.any() | (pivots.amin(-1) <= least).any()):
        return torch.linalg.pinv(matrix, hermitian=True) @ right
    return torch.cholesky_solve(right, factor)


def _inverse(name: str, value: Tensor) -> Tensor:
    return torch.cholesky_inverse(
        factored(value, f"{name} must be positive definite for Fisher's identity; differentiate log_likelihood")
    )


def _stacked(matrices: list[Tensor], batch: torch.Size) -> Tensor:
    return torch.stack([m.expand(*batch, *m.shape[-2:]) for m in matrices], -3)
