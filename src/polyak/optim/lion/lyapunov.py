"""Whether a Lion-K run still descends: the Lyapunov function of arXiv 2310.05898 in its discrete form.

With u = -m, L = wd and e = lr / (1 - lr wd) (the explicit step of size lr is the paper's implicit one of size e):

    H = f(x) + K*(L x) / L + k [K*(L x) + K(u) - L <u, x>],        k = e b1 / (e L (1 - b1) + (1 - b2))

does not increase but for a term of order e^2 where b1 <= b2. Evaluate f on a fixed batch: the stochastic H is noise.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from polyak.core import checks
from polyak.core.momentum import ema


@checks.arguments(**dict.fromkeys(("H", "energy", "gap", "feasibility", "delta1", "delta2"), checks.measured))
@dataclass(frozen=True)
class Lyapunov:
    """What :func:`lyapunov` measures, as numbers; infinite where wd x is outside the domain of K*.

    H: the Lyapunov function. energy: ``f + K*(wd x) / wd``, what is minimized. gap: the Fenchel-Young gap in brackets above,
    >= 0. feasibility: distance of wd x to the domain. delta1, delta2: the two inner products that H falls by, >= 0; NaN where
    the parameters have no gradient.
    """

    H: float
    energy: float
    gap: float
    feasibility: float
    delta1: float
    delta2: float


_LION = checks.Like("an optimizer of the Lion-K family", "param_groups", "state")


@checks.arguments(optimizer=_LION)
def bound(optimizer: Any) -> float:
    """1 / weight_decay: the radius of the constraint that a Lion-K run solves for.

    Raises:
        ValueError: weight decay is zero, or differs between param groups.
    """
    return 1 / _shared(optimizer)[2]


@checks.arguments(optimizer=_LION, loss=checks.scalar)
@torch.no_grad()
def lyapunov(optimizer: Any, loss: torch.Tensor | float) -> Lyapunov:
    """Measure a :class:`LionK` between ``backward()`` and ``step()``.

    Args:
        optimizer: its groups must have the same lr, betas and weight decay; ``kappa`` may differ.
        loss: f at the present parameters.

    Raises:
        ValueError: weight decay is zero (there is no constraint: K*(0) is constant; watch f alone), or groups differ.
    """
    lr, (b1, b2), wd = _shared(optimizer)
    e = lr / (1 - lr * wd)
    weight = e * b1 / (e * wd * (1 - b1) + (1 - b2))
    penalty = gap = delta1 = delta2 = square = 0.0
    for group in optimizer.param_groups:
        kappa = group["kappa"]
        if getattr(kappa, "scope", "tensor") != "tensor":
            raise ValueError(f"lyapunov works with constraints per tensor, got {checks.shown(kappa)}")
        for p in group["params"]:
            x = p.detach().double()
            state = optimizer.state.get(p, {})
            m = state["exp_avg"].double() if "exp_avg" in state else torch.zeros_like(x)
            conjugate = kappa.conjugate(wd * x)
            penalty += float(conjugate)
            gap += float(conjugate + kappa.value(-m) + wd * (m * x).sum())
            square += float(kappa.distance(wd * x)) ** 2
            if p.grad is None:
                delta1 = delta2 = math.nan
                continue
            g = p.grad.double() * (-1.0 if group["maximize"] else 1.0)
            ahead, after = -ema(m, g, b1), -ema(m, g, b2)
            step = kappa.grad(ahead)
            delta1 += float(((step - wd * x) * (ahead - kappa.conjugate_grad(wd * x))).sum())
            delta2 += float(((after - ahead) * (kappa.grad(after) - step)).sum())
    energy = float(loss) + penalty / wd
    return Lyapunov(energy + weight * gap, energy, gap, math.sqrt(square), delta1, delta2)


def _shared(optimizer: Any) -> tuple[float, tuple[float, float], float]:
    if wrong := next((g for g in optimizer.param_groups if "kappa" not in g), None):
        raise ValueError(f"optimizer must be one of the Lion-K family, got one whose groups have {sorted(wrong)}")
    first, *others = [(float(g["lr"]), g["betas"], g["weight_decay"]) for g in optimizer.param_groups]
    if any(other != first for other in others):
        raise ValueError(f"param groups must share lr, betas and weight_decay, got {checks.shown([first, *others])}")
    if first[2] == 0:
        raise ValueError("weight_decay is 0: there is no constraint, and K*(0) is constant; watch the loss itself")
    return first
