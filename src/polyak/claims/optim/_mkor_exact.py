"""What must be true of MKOR by its equations, on two small layers in float64, and how its updates' work grows. It imports torch."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from polyak.claims._kfac import KFAC
from polyak.optim.mkor import MKOR

STEPS, ROWS, SIZES, LR = 40, 16, (6, 5, 4), 0.05
WIDTHS = (128, 512)  # between which the power of the work is measured
DECAY = 0.95


def measured(kind: str, seed: int) -> dict[str, float]:
    """One run of 40 steps, each with an update of the factors. ``kind``: mkor, ema, no_update or kfac.

    inverse: the largest relative distance of a factor to the inverse of its matrix, which is kept beside it and inverted
    anew. smallest, largest: eigenvalues of all factors at all times. size: the largest relative change of a gradient's norm.
    cosine: the smallest between step and gradient. power: p, where an update's work grows as width^p.
    """
    if kind == "no_update":
        return _run(kind, seed)
    return {**_run(kind, seed), "power": _power(kind)}


def _run(kind: str, seed: int) -> dict[str, float]:
    draw = torch.Generator().manual_seed(seed)
    model, step, factors = _made(kind, SIZES, draw)
    layers: list[Any] = [m for m in model if isinstance(m, nn.Linear)]
    means = [Means(layer) for layer in layers]
    matrices = [[torch.eye(n, dtype=torch.float64) for n in (m.in_features + 1, m.out_features)] for m in layers]
    found: dict[str, list[float]] = {name: [] for name in ("inverse", "eigenvalue", "size", "cosine")}
    for n in range(STEPS):
        x, y = (torch.randn(ROWS, size, generator=draw, dtype=torch.float64) + 1 for size in (SIZES[0], SIZES[-1]))
        for p in model.parameters():
            p.grad = None
        (model(x) - y).square().sum(1).mean().backward()
        gradients = [_both(layer.weight.grad, layer.bias.grad) for layer in layers]
        before = [_both(layer.weight, layer.bias) for layer in layers]
        step()
        for i, layer in enumerate(layers):
            U = (before[i] - _both(layer.weight, layer.bias)) / LR
            found["size"].append(abs(_size(U) / _size(gradients[i]) - 1))
            found["cosine"].append(float((U * gradients[i]).sum() / U.norm() / gradients[i].norm()))
            if kind == "kfac":
                continue
            for side, v in enumerate((means[i].input, gradients[i][:, -1])):  # of a mean loss, g is the bias's gradient
                if n:  # the first update takes nothing in
                    matrices[i][side] = _taken_in(kind, matrices[i][side], v)
                J, exact = factors()[i][side], torch.linalg.inv(matrices[i][side])
                found["inverse"].append(float((J - exact).norm() / exact.norm()))
                found["eigenvalue"] += torch.linalg.eigvalsh(J).tolist()
    ends = {"size": max(found["size"]), "cosine": min(found["cosine"])}
    if kind == "kfac":
        return ends
    return {
        **ends,
        "inverse": max(found["inverse"]),
        "smallest": min(found["eigenvalue"]),
        "largest": max(found["eigenvalue"]),
    }


def _taken_in(kind: str, C: Tensor, v: Tensor) -> Tensor:
    """The matrix whose inverse the factor is, with v: by the official code's rule, or the moving average."""
    if kind == "ema":
        return DECAY * C + (1 - DECAY) * torch.outer(v, v)
    eye = torch.eye(len(C), dtype=torch.float64)
    return torch.linalg.inv(DECAY * torch.linalg.inv(C) + (1 - DECAY) * eye) + torch.outer(v, v)


class Means:
    """A layer's mean input over rows, with the bias's 1, of its last pass."""

    input: Tensor

    def __init__(self, layer: nn.Module) -> None:
        layer.register_forward_pre_hook(self._watch)

    def _watch(self, _: nn.Module, args: tuple[Tensor, ...]) -> None:
        self.input = torch.cat([args[0].detach().mean(0), torch.ones(1, dtype=torch.float64)])


def _both(weight: Tensor, bias: Tensor) -> Tensor:
    return torch.cat([weight, bias[:, None]], 1).detach().clone()


def _size(U: Tensor) -> float:
    """The paper's norm of a layer's gradient: the weight's and the bias's, added."""
    return float(U[:, :-1].norm() + U[:, -1].norm())


def _made(kind: str, sizes: tuple[int, ...], draw: torch.Generator, every: int = 1) -> tuple[nn.Sequential, Any, Any]:
    """A model with tanh between its layers, its step, and the layers' factors as (A, G)."""
    parts: list[nn.Module] = []
    for i, o in pairwise(sizes):
        parts += [nn.Linear(i, o, dtype=torch.float64), nn.Tanh()]
    model = nn.Sequential(*parts[:-1])
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=draw, dtype=torch.float64) / math.sqrt(p.shape[-1]))
    base = torch.optim.SGD(model.parameters(), lr=LR)
    if kind == "kfac":
        kfac = KFAC(model, every=every)

        def step() -> None:
            kfac.precondition(LR)
            base.step()

        return model, step, None
    update, never = ("ema" if kind == "ema" else "package"), 1e12  # a threshold that is not reached
    mkor = MKOR(
        model, base, inv_freq=every, decay=DECAY, update=update, stabilize=(never, 1.0), factor_dtype=torch.float64
    )
    if kind == "no_update":
        mkor.remove()
    return model, mkor.step, lambda: list(mkor.factors.values())


def _power(kind: str) -> float:
    """Work is counted in products and factorizations of matrices, at a step that updates less one that does not."""
    few, many = (_work(kind, width) for width in WIDTHS)
    return math.log(many / few) / math.log(WIDTHS[1] / WIDTHS[0])


def _work(kind: str, width: int) -> int:
    draw = torch.Generator().manual_seed(0)
    model, step, _ = _made(kind, (width - 1, width), draw, every=2)
    x = torch.randn(ROWS, width - 1, generator=draw, dtype=torch.float64)
    counts = []
    for _ in range(2):
        model.zero_grad()
        model(x).square().sum(1).mean().backward()
        # An inverse by Cholesky takes d^3 / 3 and 2 d^3 / 3.
        cubic = {
            torch.ops.aten.linalg_cholesky_ex: lambda a, *_, **__: a[-1] ** 3 // 3,
            torch.ops.aten.cholesky_inverse: lambda a, *_, **__: 2 * a[-1] ** 3 // 3,
        }
        with FlopCounterMode(display=False, custom_mapping=cubic) as counter:
            step()
        counts.append(counter.get_total_flops())
    return counts[0] - counts[1]
