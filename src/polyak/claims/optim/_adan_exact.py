"""What must be true of Adan by its equations, in float64 on a random quadratic and on random gradients. It imports torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from polyak.optim.adan import Adan

SIZE, STEPS = 12, 40
B1, B2, B3 = 0.98, 0.92, 0.99
LR, DECAY, EPS = 0.1, 0.1, 1e-8
HUGE = 1e10  # an eps beside which sqrt(n) is nothing: what steps is the momentum alone


def measured(seed: int, *, difference: bool, restarts: bool) -> dict[str, float]:
    """Distances to what the equations say, relative to the largest value.

    Args:
        seed: of the quadratic and of the gradients.
        difference: whether the gradient difference has its weight b2; else 0.
        restarts: whether ``restart()`` is called.
    """
    draw = torch.Generator().manual_seed(seed)
    start, *drawn = torch.randn(1 + STEPS, SIZE, generator=draw, dtype=torch.float64)
    b2 = B2 if difference else 0.0
    adan = _path(lambda x: Adan([x], LR, (B1, b2, B3), EPS), start, drawn)
    decayed = _path(lambda x: Adan([x], LR, (B1, b2, B3), EPS, DECAY), start, drawn)
    adam = _path(lambda x: torch.optim.Adam([x], LR, (B1, B3), EPS), start, drawn)
    return {
        "nesterov": _from_nesterov(start, draw, difference),
        "sums": _far(decayed, _by_sums(start, drawn)),
        "from_adam": _far(adan, adam),
        "after_restart": _after_restart(start, drawn, b2, restarts),
    }


def _far(got: Tensor, want: Tensor) -> float:
    return ((got - want).abs().max() / want.abs().max()).item()


def _path(make: Callable[[nn.Parameter], torch.optim.Optimizer], start: Tensor, gradients: Sequence[Tensor]) -> Tensor:
    x = nn.Parameter(start.clone())
    return _run(make(x), x, gradients)


def _run(optimizer: torch.optim.Optimizer, x: nn.Parameter, gradients: Sequence[Tensor]) -> Tensor:
    """The points after each step with the given gradients."""
    points = []
    for g in gradients:
        x.grad = g.clone()
        optimizer.step()
        points.append(x.detach().clone())
    return torch.stack(points)


def _from_nesterov(start: Tensor, draw: torch.Generator, difference: bool) -> float:
    """The paper's Lemma 1: with one b, and no division, Adan's points are those where Nesterov's method takes its gradients.

    Nesterov: ``y = x - lr b m``, ``m = b m + grad f(y)``, ``x = x - lr m``. Adan's first gradient is its own predecessor, which
    is a start from ``m = -grad f(y) / b``. Its bias correction is undone by the rate.
    """
    b, basis = 0.9, torch.linalg.qr(torch.randn(SIZE, SIZE, generator=draw, dtype=torch.float64)).Q
    A = basis * torch.logspace(-2, 0, SIZE, dtype=torch.float64) @ basis.T  # of largest eigenvalue 1: the rate is 1
    p = nn.Parameter(start.clone())
    optimizer = Adan([p], betas=(b, b if difference else 0.0, B3), eps=HUGE)
    m = -(A @ start) / b
    x = start + b * m
    points, wanted = [], []
    for step in range(1, STEPS + 1):
        optimizer.param_groups[0]["lr"] = HUGE * (1 - b**step) / (1 - b)
        p.grad = A @ p.detach()
        optimizer.step()
        m = b * m + A @ (x - b * m)
        x = x - m
        points.append(p.detach().clone())
        wanted.append(x - b * m)
    return _far(torch.stack(points), torch.stack(wanted))


def _by_sums(start: Tensor, gradients: Sequence[Tensor]) -> Tensor:
    """Algorithm 1's points without a recursion for the moments: sums over all gradients so far, divided by their weights' sum."""
    g = torch.stack(list(gradients))
    d = g - torch.cat([g[:1], g[:-1]])
    p, points = start, []
    for t in range(1, len(g) + 1):

        def mean(values: Tensor, b: float, t: int = t) -> Tensor:
            weights = b ** torch.arange(t - 1, -1, -1, dtype=torch.float64)
            return weights @ values[:t] / weights.sum()

        u = (mean(g, B1) + B2 * mean(d, B2)) / (mean((g + B2 * d) ** 2, B3).sqrt() + EPS)
        # The minimum of <u, y> + |y - p|^2 / (2 lr) + decay |y|^2 / 2.
        p = (p - LR * u) / (1 + LR * DECAY)
        points.append(p)
    return torch.stack(points)


def _after_restart(start: Tensor, gradients: Sequence[Tensor], b2: float, restarts: bool) -> float:
    """The distance between the second half after ``restart()`` and a new optimizer's."""
    half, x = len(gradients) // 2, nn.Parameter(start.clone())
    optimizer = Adan([x], LR, (B1, b2, B3), EPS)
    _run(optimizer, x, gradients[:half])
    middle = x.detach().clone()
    if restarts:
        optimizer.restart()
    return _far(
        _run(optimizer, x, gradients[half:]),
        _path(lambda y: Adan([y], LR, (B1, b2, B3), EPS), middle, gradients[half:]),
    )
