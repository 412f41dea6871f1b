"""Convex problems on real data, with their exact minima under a penalty or a constraint."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from polyak.claims._problems import digit_images
from polyak.lab import data


@dataclass(frozen=True, kw_only=True)
class Convex:
    """A smooth convex function of one float64 tensor, in closed form.

    Attributes:
        shape: the tensor's.
        value: the function, as a number.
        gradient: its gradient.
        lipschitz: a Lipschitz constant of the gradient.
    """

    shape: tuple[int, ...]
    value: Callable[[Tensor], float]
    gradient: Callable[[Tensor], Tensor]
    lipschitz: float


@cache
def logistic() -> Convex:
    """Logistic regression of breast_cancer: 569 tumours, 30 standardized features, no bias, mean loss."""
    x, y = data.breast_cancer()
    signed = torch.from_numpy((x - x.mean(0)) / x.std(0) * (2 * y - 1)[:, None])
    across, n = signed.T.contiguous(), len(signed)
    return Convex(
        shape=(30,),
        value=lambda w: F.softplus(-signed.mv(w), threshold=50).mean().item(),
        gradient=lambda w: across.mv(torch.sigmoid(signed.mv(w).neg_())).div_(-n),
        lipschitz=torch.linalg.matrix_norm(signed, 2).item() ** 2 / (4 * n),
    )


@cache
def least_squares() -> Convex:
    """Least squares on diabetes: 442 patients, 10 standardized features and target, half the mean squared error."""
    x, y = data.diabetes()
    features, target = torch.from_numpy((x - x.mean(0)) / x.std(0)), torch.from_numpy((y - y.mean()) / y.std())
    n = len(target)
    gram, cross = features.T @ features / n, features.T @ target / n
    return Convex(
        shape=(10,),
        value=lambda w: (features.mv(w) - target).square().mean().item() / 2,
        gradient=lambda w: gram.mv(w).sub_(cross),
        lipschitz=torch.linalg.matrix_norm(gram, 2).item(),
    )


@cache
def softmax(images: int = 300) -> Convex:
    """Softmax regression of the first digits: one 10 x 64 matrix on pixels from 0 to 1, no bias, mean loss."""
    x, y = digit_images("cpu")
    pixels, labels = x[:images].double(), y[:images]
    across, target = pixels.T.contiguous(), F.one_hot(labels, 10).double().T @ pixels / images
    return Convex(
        shape=(10, 64),
        value=lambda w: F.cross_entropy(pixels @ w.T, labels).item(),
        gradient=lambda w: torch.addmm(target, torch.softmax(w @ across, 0), pixels, beta=-1, alpha=1 / images),
        lipschitz=torch.linalg.matrix_norm(pixels, 2).item() ** 2 / (2 * images),
    )


def convex(name: str) -> Convex:
    """A convex problem by its name: logistic, least_squares or softmax."""
    return {"logistic": logistic, "least_squares": least_squares, "softmax": softmax}[name]()


@dataclass(frozen=True, kw_only=True)
class Penalty:
    """``P(x) = K*(L x) / L`` of a convex K, written here without the part that is tested with it.

    Attributes:
        value: P(x), where x is in its domain.
        support: K(u).
        project: the nearest point of the domain.
        proximal: ``argmin_y |y - x|^2 / (2 t) + P(y)`` of (x, t).
    """

    value: Callable[[Tensor], float]
    support: Callable[[Tensor], float]
    project: Callable[[Tensor], Tensor]
    proximal: Callable[[Tensor, float], Tensor]


@cache
def penalty(name: str, weight_decay: float, width: float = 0.0) -> Penalty:
    """The penalty of one K: sign, dead_zone, huber, entropic (of this width), l2, group (rows) or nuclear."""
    radius = 1 / weight_decay

    def box(x: Tensor) -> Tensor:
        return x.clamp(-radius, radius)

    def rows(x: Tensor) -> Tensor:
        return x * (radius / x.norm(dim=1, keepdim=True).clamp(min=radius))

    def spectral(x: Tensor) -> Tensor:
        u, s, v = torch.linalg.svd(x, full_matrices=False)
        return (u * s.clamp(max=radius)) @ v

    def entropy(x: Tensor) -> float:
        up, down = (1 + weight_decay * x) / 2, (1 - weight_decay * x) / 2
        return width * radius * (torch.xlogy(up, up) + torch.xlogy(down, down)).sum().item()

    def entropic_proximal(x: Tensor, t: float) -> Tensor:
        # With y = tanh(z) / L the condition is tanh(z) / L + t width z = x; Newton's steps from 0 never overshoot.
        z, size = torch.zeros_like(x), x.abs()
        for _ in range(60):
            y = z.tanh()
            z = z - (radius * y + t * width * z - size) / (radius * (1 - y * y) + t * width)
        return radius * z.tanh() * x.sign()

    def ball(project: Callable[[Tensor], Tensor], support: Callable[[Tensor], Tensor]) -> Penalty:
        return Penalty(
            value=lambda x: 0.0, support=lambda u: support(u).item(), project=project, proximal=lambda x, t: project(x)
        )

    if name == "sign":
        return ball(box, lambda u: u.abs().sum())
    if name == "l2":
        return ball(lambda x: x * (radius / max(x.norm().item(), radius)), torch.linalg.vector_norm)
    if name == "group":
        return ball(rows, lambda u: u.norm(dim=1).sum())
    if name == "nuclear":
        return ball(spectral, lambda u: torch.linalg.svdvals(u).sum())
    if name == "dead_zone":
        return Penalty(
            value=lambda x: width * x.abs().sum().item(),
            support=lambda u: F.relu(u.abs() - width).sum().item(),
            project=box,
            proximal=lambda x, t: box(F.softshrink(x, t * width)),
        )
    if name == "huber":
        return Penalty(
            value=lambda x: width * weight_decay / 2 * x.square().sum().item(),
            support=lambda u: F.huber_loss(u, torch.zeros_like(u), reduction="sum", delta=width).item() / width,
            project=box,
            proximal=lambda x, t: box(x / (1 + t * width * weight_decay)),
        )
    if name == "entropic":
        return Penalty(
            value=entropy,
            support=lambda u: width * (u.abs() / width + F.softplus(-2 * u.abs() / width)).sum().item(),
            project=box,
            proximal=entropic_proximal,
        )
    raise ValueError(f"there is no penalty {name!r}")


def suboptimality(f: Convex, p: Penalty, x: Tensor, weight_decay: float) -> float:
    """A bound on ``f(x) + P(x)`` above its minimum, by Fenchel and Young: ``<g, x> + P(x) + K(-g) / L`` at the gradient g."""
    g = f.gradient(x)
    return (g * x).sum().item() + p.value(x) + p.support(-g) / weight_decay


@cache
def minimum(problem: str, kappa: str, weight_decay: float, width: float, accuracy: float, most: int = 20_000) -> float:
    """The minimum of a convex problem under a penalty, to ``accuracy``, by accelerated proximal gradients with restarts.

    Raises:
        RuntimeError: not reached within ``most`` steps.
    """
    f, p = convex(problem), penalty(kappa, weight_decay, width)
    x = ahead = torch.zeros(f.shape, dtype=torch.float64)
    momentum, t = 1.0, 1 / f.lipschitz
    for step in range(most):
        if step % 100 == 0 and suboptimality(f, p, x, weight_decay) <= accuracy:
            return f.value(x) + p.value(x)
        before, x = x, p.proximal(ahead - t * f.gradient(ahead), t)
        if ((ahead - x) * (x - before)).sum() > 0:  # the step goes against the momentum (O'Donoghue and Candes, 2015)
            momentum, ahead = 1.0, x
            continue
        following = (1 + math.sqrt(1 + 4 * momentum**2)) / 2
        ahead = x + (momentum - 1) / following * (x - before)
        momentum = following
    raise RuntimeError(f"no minimum of {problem} under {kappa} to {accuracy} within {most} steps")
