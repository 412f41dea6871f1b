"""The convex functions K of the Lion-K family, with what makes each a constraint or a penalty.

For each K: its value, a subgradient with D(0) = 0 (the update direction), its conjugate K* (infinite outside its domain), a
subgradient of K*, and the distance to the domain of K*. Lion-K with decay wd minimizes ``f(x) + K*(wd x) / wd`` (Chen, Liu,
Liang, Liu, arXiv 2310.05898). All act on one tensor of any shape; ``value``, ``conjugate`` and ``distance`` return tensors of
one element.
"""

from __future__ import annotations

import ast
import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from polyak.core import checks
from polyak.core.elementwise import absolute, maximum, minimum, sign, sqrt, tanh

__all__ = [
    "L1",
    "L2",
    "DeadZone",
    "Entropic",
    "Group",
    "HalfSquare",
    "Huber",
    "Kappa",
    "Lp",
    "Nuclear",
    "Relativistic",
    "TopK",
    "named",
    "polar_newton_schulz",
    "polar_svd",
]

EDGE = 1e-7  # the diagnostic stays this far from |y| = 1, where two conjugates have infinite slopes


class Kappa:
    """A convex function K with K(0) minimal. ``elementwise``: ``grad`` acts on each element by itself."""

    elementwise: ClassVar[bool] = True

    def value(self, u: torch.Tensor) -> torch.Tensor:
        """K(u)."""
        raise NotImplementedError

    def grad(self, u: Any) -> Any:
        """A subgradient of K at u, zero at zero."""
        raise NotImplementedError

    def conjugate(self, y: torch.Tensor) -> torch.Tensor:
        """K*(y) = sup_u <u, y> - K(u); infinite outside the domain (a rounding error of 1e-9 is inside)."""
        raise NotImplementedError

    def conjugate_grad(self, y: torch.Tensor) -> torch.Tensor:
        """A subgradient of K* at y (in its domain)."""
        raise NotImplementedError

    def distance(self, y: torch.Tensor) -> torch.Tensor:
        """Distance of y to the domain of K*; Euclidean unless the class says otherwise."""
        raise NotImplementedError

    def _within(self, y: torch.Tensor, inside: torch.Tensor | float) -> torch.Tensor:
        slack = 1e-9 if y.dtype == torch.float64 else 1e-5
        return torch.where(self.distance(y) <= slack, torch.as_tensor(inside, dtype=y.dtype, device=y.device), math.inf)


class _Box(Kappa):
    """Those whose K* lives on |y_i| <= 1."""

    def distance(self, y: torch.Tensor) -> torch.Tensor:
        return torch.linalg.vector_norm((y.abs() - 1).clamp(min=0))

    def _clipped(self, y: torch.Tensor) -> torch.Tensor:
        return y.clamp(-1 + EDGE, 1 - EDGE)


@dataclass(frozen=True)
class L1(_Box):
    """K = ||u||_1, D = sign: Lion itself. min f subject to |x_i| <= 1/wd."""

    def value(self, u: torch.Tensor) -> torch.Tensor:
        return u.abs().sum()

    def grad(self, u: Any) -> Any:
        return sign(u)

    def conjugate(self, y: torch.Tensor) -> torch.Tensor:
        return self._within(y, 0.0)

    def conjugate_grad(self, y: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(y)


@checks.arguments(e=checks.non_negative)
@dataclass(frozen=True)
class DeadZone(_Box):
    """K = sum max(|u| - e, 0), D = sign(u) where |u| > e. K* = e ||y||_1 on the box: sparse solutions."""

    e: float

    def value(self, u: torch.Tensor) -> torch.Tensor:
        return (u.abs() - self.e).clamp(min=0).sum()

    def grad(self, u: Any) -> Any:
        return sign(u) * (absolute(u) > self.e)

    def conjugate(self, y: torch.Tensor) -> torch.Tensor:
        return self._within(y, self.e * y.abs().sum())

    def conjugate_grad(self, y: torch.Tensor) -> torch.Tensor:
        return self.e * torch.sign(y)


@checks.arguments(e=checks.positive)
@dataclass(frozen=True)
class Huber(_Box):
    """K = sum of Huber functions of width e, D = clip(u / e, -1, 1). K* = (e/2) ||y||^2 on the box."""

    e: float

    def value(self, u: torch.Tensor) -> torch.Tensor:
        a = u.abs()
        return torch.where(a > self.e, a - self.e / 2, a.square() / (2 * self.e)).sum()

    def grad(self, u: Any) -> Any:
        return minimum(maximum(u / self.e, -1.0), 1.0)

    def conjugate(self, y: torch.Tensor) -> torch.Tensor:
        return self._within(y, self.e / 2 * y.square().sum())

    def conjugate_grad(self, y: torch.Tensor) -> torch.Tensor:
        return self.e * y


@checks.arguments(a=checks.positive)
@dataclass(frozen=True)
class Entropic(_Box):
    """K = sum log(2 cosh(a u)) / a, D = tanh(a u). K* = the negative binary entropy of (1 + y) / 2, over a."""

    a: float

    def value(self, u: torch.Tensor) -> torch.Tensor:
        s = (self.a * u).abs()
        return (s + torch.log1p(torch.exp(-2 * s))).sum() / self.a

    def grad(self, u: Any) -> Any:
        return tanh(self.a * u)

    def conjugate(self, y: torch.Tensor) -> torch.Tensor:
        up, down = ((1 + y) / 2).clamp(0, 1), ((1 - y) / 2).clamp(0, 1)
        return self._within(y, (torch.xlogy(up, up) + torch.xlogy(down, down)).sum() / self.a)

    def conjugate_grad(self, y: torch.Tensor) -> torch.Tensor:
        return torch.atanh(self._clipped(y)) / self.a


@checks.arguments(e=checks.positive)
@dataclass(frozen=True)
class Relativistic(_Box):
    """K = sum sqrt(u^2 + e^2), D = u / sqrt(u^2 + e^2). K* = -e sum sqrt(1 - y^2) on the box."""

    e: float

    def value(self, u: torch.Tensor) -> torch.Tensor:
        return (u.square() + self.e**2).sqrt().sum()

    def grad(self, u: Any) -> Any:
        return u / sqrt(u * u + self.e**2)

    def conjugate(self, y: torch.Tensor) -> torch.Tensor:
        return self._within(y, -self.e * (1 - y.square()).clamp(min=0).sqrt().sum())

    def conjugate_grad(self, y: torch.Tensor) -> torch.Tensor:
        y = self._clipped(y)
        return self.e * y / (1 - y.square()).sqrt()


@dataclass(frozen=True)
class HalfSquare(Kappa):
    """K = ||u||^2 / 2, D = u: heavy ball with decoupled decay. K* = ||y||^2 / 2, no constraint."""

    def value(self, u: torch.Tensor) -> torch.Tensor:
        return u.square().sum() / 2

    def grad(self, u: Any) -> Any:
        return u

    def conjugate(self, y: torch.Tensor) -> torch.Tensor:
        return y.square().sum() / 2

    def conjugate_grad(self, y: torch.Tensor) -> torch.Tensor:
        return y

    def distance(self, y: torch.Tensor) -> torch.Tensor:
        return torch.zeros((), dtype=y.dtype, device=y.device)


class _Ball(Kappa):
    """Norms: K* is the indicator of the dual norm's unit ball."""

    elementwise: ClassVar[bool] = False

    def conjugate(self, y: torch.Tensor) -> torch.Tensor:
        return self._within(y, 0.0)

    def conjugate_grad(self, y: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(y)


def unit(u: Any, norm: Any) -> Any:
    """``u / norm``, zero where the norm is zero; a NaN stays."""
    return u / torch.where(norm == 0, 1.0, norm)


@checks.arguments(scope=checks.Choice("tensor", "group", "all"))
@dataclass(frozen=True)
class L2(_Ball):
    """K = ||u||_2, D = u / ||u||. min f subject to ||x||_2 <= 1/wd.

    scope: what the norm, and so the constraint, is over: each "tensor", each param "group", or "all" parameters.
    """

    scope: str = "tensor"

    def value(self, u: torch.Tensor) -> torch.Tensor:
        return torch.linalg.vector_norm(u)

    def grad(self, u: Any) -> Any:
        return unit(u, torch.linalg.vector_norm(u))

    def distance(self, y: torch.Tensor) -> torch.Tensor:
        return (torch.linalg.vector_norm(y) - 1).clamp(min=0)


@checks.arguments(p=checks.Number(1.0, ends="()"))
@dataclass(frozen=True)
class Lp(_Ball):
    """K = ||u||_p for p > 1, D = sign(u) |u|^(p-1) / ||u||_p^(p-1). min f subject to ||x||_q <= 1/wd, 1/p + 1/q = 1.

    ``distance`` is measured in the q-norm.
    """

    p: float

    def value(self, u: torch.Tensor) -> torch.Tensor:
        return torch.linalg.vector_norm(u, self.p)

    def grad(self, u: Any) -> Any:
        # Ratios are at most 1, so that no power overflows, or underflows in all elements.
        u = unit(u, u.abs().max()) if u.numel() else u
        r = unit(u, torch.linalg.vector_norm(u, self.p))
        return torch.sign(r) * r.abs() ** (self.p - 1)

    def distance(self, y: torch.Tensor) -> torch.Tensor:
        return (torch.linalg.vector_norm(y, self.p / (self.p - 1)) - 1).clamp(min=0)


@checks.arguments(k=checks.Integer(1))
@dataclass(frozen=True)
class TopK(_Ball):
    """K = the sum of the k largest |u|, D = sign on exactly those. min f subject to ||x||_inf <= 1/wd, ||x||_1 <= k/wd.

    ``distance`` is measured in the norm whose unit ball that is: max(||y||_inf, ||y||_1 / k).
    """

    k: int

    def _top(self, u: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        flat = u.reshape(-1)
        return flat, flat.abs().topk(min(self.k, flat.numel())).indices

    def value(self, u: torch.Tensor) -> torch.Tensor:
        flat, top = self._top(u)
        return flat[top].abs().sum()

    def grad(self, u: Any) -> Any:
        flat, top = self._top(u)
        chosen = torch.zeros_like(flat).index_copy(0, top, sign(flat[top]))
        # A NaN counts as the largest in topk; every one of them is kept, not only k.
        return torch.where(flat.isnan(), flat, chosen).reshape(u.shape)

    def distance(self, y: torch.Tensor) -> torch.Tensor:
        if y.numel() == 0:
            return torch.zeros((), dtype=y.dtype, device=y.device)
        return (torch.maximum(y.abs().max(), y.abs().sum() / self.k) - 1).clamp(min=0)


@checks.arguments(dim=checks.Integer())
@dataclass(frozen=True)
class Group(_Ball):
    """K = sum of the Euclidean norms of the slices along ``dim`` (rows for 0), D = each slice over its norm.

    min f subject to ||x_g|| <= 1/wd for every slice.
    """

    dim: int = 0

    def _norms(self, u: torch.Tensor) -> torch.Tensor:
        if u.dim() == 0:
            return u.abs()
        if not -u.dim() <= self.dim < u.dim():
            raise ValueError(f"Group(dim={self.dim}) does not fit a tensor of shape {tuple(u.shape)}")
        others = [d for d in range(u.dim()) if d != self.dim % u.dim()]
        return torch.linalg.vector_norm(u, dim=others, keepdim=True) if others else u.abs()

    def value(self, u: torch.Tensor) -> torch.Tensor:
        return self._norms(u).sum()

    def grad(self, u: Any) -> Any:
        return unit(u, self._norms(u))

    def distance(self, y: torch.Tensor) -> torch.Tensor:
        return torch.linalg.vector_norm((self._norms(y) - 1).clamp(min=0))


@checks.arguments(method=checks.Choice("ns5", "svd"), fallback=checks.Choice(None, "l1"))
@dataclass(frozen=True)
class Nuclear(_Ball):
    """K = the sum of singular values, D = the polar factor U V^T. min f subject to a spectral norm <= 1/wd (Muon with decay).

    method: "svd", or "ns5", five Newton-Schulz iterations (singular values in 0.7 to 1.2; K. Jordan's coefficients).
    fallback: what vectors and scalars get, which have no singular values: "l1", or None to refuse them.
    Tensors of more than two dimensions are matrices of shape (first, all others).
    """

    method: str = "ns5"
    fallback: str | None = None

    def _other(self, u: torch.Tensor) -> Kappa | None:
        if u.dim() >= 2:
            return None
        if self.fallback is None:
            raise ValueError(
                f"Nuclear needs tensors of at least two dimensions, got shape {tuple(u.shape)}; "
                "give fallback='l1', or another kappa for that param group"
            )
        return L1()

    def value(self, u: torch.Tensor) -> torch.Tensor:
        other = self._other(u)
        return other.value(u) if other else torch.linalg.svdvals(u.flatten(1)).sum()

    def grad(self, u: Any) -> Any:
        other = self._other(u)
        if other:
            return other.grad(u)
        matrix = u.flatten(1)
        return (polar_svd(matrix) if self.method == "svd" else polar_newton_schulz(matrix)).reshape(u.shape)

    def distance(self, y: torch.Tensor) -> torch.Tensor:
        other = self._other(y)
        if other:
            return other.distance(y)
        return torch.linalg.vector_norm((torch.linalg.svdvals(y.flatten(1)) - 1).clamp(min=0))


@checks.arguments(u=checks.Tensor(floating=True, least_ndim=2))
def polar_svd(u: torch.Tensor) -> torch.Tensor:
    """U V^T of the singular value decomposition, without the directions whose singular value is zero to rounding."""
    if not torch.isfinite(u).all():
        return torch.full_like(u, math.nan)
    left, values, right = torch.linalg.svd(u, full_matrices=False)
    floor = (
        values.max(dim=-1, keepdim=True).values * max(u.shape[-2:]) * torch.finfo(u.dtype).eps
        if values.numel()
        else 0.0
    )
    return (left * (values > floor).to(u.dtype)) @ right


@checks.arguments(u=checks.Tensor(floating=True, least_ndim=2), steps=checks.Integer(0))
def polar_newton_schulz(u: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """U V^T approximately, by the quintic iteration ``X <- a X + (b A + c A^2) X``, ``A = X X^T``; matrix products only."""
    a, b, c = 3.4445, -4.7750, 2.0315
    wide = u.shape[-2] <= u.shape[-1]
    x = u if wide else u.mT
    x = unit(x, torch.linalg.matrix_norm(x, keepdim=True))
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x if wide else x.mT


NAMES: dict[str, Kappa] = {
    "l1": L1(),
    "sign": L1(),
    "l2": L2(),
    "group": Group(),
    "nuclear": Nuclear(),
    "half_square": HalfSquare(),
}


class _Named(checks.Kind):
    words = f"a Kappa or one of {', '.join(map(repr, NAMES))}"

    def like(self, value: Any) -> bool:
        return isinstance(value, (str, Kappa))

    def __call__(self, name: str, value: Any) -> Kappa:
        if isinstance(super().__call__(name, value), Kappa):
            return value
        return _read(value) if value.endswith(")") else NAMES[checks.one_of(name, value, NAMES)]


KIND = _Named()


@checks.arguments(kappa=KIND)
def named(kappa: Kappa | str) -> Kappa:
    """A kappa by its name ("l1", "l2", "group", "nuclear", "half_square"), by its text ("Huber(e=0.5)"), or itself."""
    return kappa  # type: ignore[return-value]  # which its kind has made of it


def text(kappa: Kappa) -> Kappa | str:
    """A kappa as text that :func:`named` reads, for checkpoints; one that is not of this file stays itself."""
    try:
        return repr(kappa) if named(repr(kappa)) == kappa else kappa
    except (ValueError, TypeError, SyntaxError):
        return kappa


def _read(written: str) -> Kappa:
    wrong = f"kappa must be {KIND.words}, got {checks.shown(written)}"
    try:
        call = ast.parse(written, mode="eval").body
    except (SyntaxError, ValueError):
        raise ValueError(wrong) from None
    family = {c.__name__: c for c in globals().values() if isinstance(c, type) and issubclass(c, Kappa)}
    if not (isinstance(call, ast.Call) and isinstance(call.func, ast.Name)):
        raise ValueError(wrong)
    made = family[checks.one_of("kappa", call.func.id, family)]
    try:
        options = {k.arg: ast.literal_eval(k.value) for k in call.keywords if k.arg}
        return made(*map(ast.literal_eval, call.args), **options)
    except (TypeError, ValueError) as error:
        raise type(error)(f"kappa {checks.shown(written)}: {error}") from None
