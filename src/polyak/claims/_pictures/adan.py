"""Adan's picture: a stretched valley, with and without the gradient's change in the momentum."""

from __future__ import annotations

from typing import Any

from polyak.lab.pictures import GRID, INK, MUTED, NEUTRAL, SERIES, described, log, name, panels

STEPS, BETAS, LR = 120, (0.98, 0.92, 0.99), 0.4
STARTS = ((-2.0, 1.2), (2.0, 0.4), (-0.8, -1.7))
SLANT, STEEP = 0.45, 30.0  # the valley's angle, and how much steeper it is across than along


def picture():
    """Paths to a minimum by Adan, and by the same without the gradient's change, which is Adam; and their losses."""
    import numpy as np

    figure, (*valleys, losses) = panels(3, titles=("Adam (0.98, 0.99)", "Adan", "Loss, mean of paths"), height=225)
    x, y = np.meshgrid(np.linspace(-2.3, 2.3, 50), np.linspace(-2.3, 2.3, 50))
    looks = (("Adam", NEUTRAL, (0, (3, 1))), ("Adan", SERIES[0], "-"))
    for valley, (method, color, dash) in zip(valleys, looks, strict=True):
        paths = _paths(method)
        valley.contour(x, y, _loss(x, y), levels=[0.2, 1, 3, 8, 16, 30, 50], colors=GRID, linewidths=1)
        for path in paths:
            valley.plot(*path.T, color=color, linewidth=1.4)
            valley.plot(*path[0], marker="o", markersize=4, color=INK)
            valley.plot(*path[-1], marker="o", markersize=6, color=color)
        valley.grid(visible=False)
        valley.set(aspect="equal", xticks=range(-2, 3), yticks=range(-2, 3), xlabel="weight 1")
        loss = _loss(*paths.transpose(2, 0, 1)).mean(0)
        losses.plot(range(STEPS + 1), loss, color=color, linewidth=2, linestyle=dash)
        name(losses, 100, loss[85:115].max(), method, color, shift=(-4, 14))
    valleys[0].set_ylabel("weight 2")
    valleys[0].plot(0, 0, marker="+", markersize=9, color=MUTED)
    losses.set_xlabel("step")
    log(losses, y=True)
    return described(
        figure,
        "Paths from three starts to the minimum of a stretched valley, at the same learning rate. Adam's swing from side to "
        "side; Adan's, whose momentum takes in how the gradient changes, are damped. After 120 steps Adan's loss is a "
        "hundredth of Adam's.",
    )


def _loss(x: Any, y: Any) -> Any:
    from math import cos, sin

    return (cos(SLANT) * x + sin(SLANT) * y) ** 2 / 2 + STEEP * (cos(SLANT) * y - sin(SLANT) * x) ** 2 / 2


def _paths(method: str) -> Any:
    """(starts, steps + 1, 2): the points of every step."""
    import torch

    from polyak.optim import Adan

    points = [torch.tensor(start, dtype=torch.float64, requires_grad=True) for start in STARTS]
    if method == "Adan":
        optimizer: Any = Adan(points, lr=LR, betas=BETAS)
    else:
        optimizer = torch.optim.Adam(points, lr=LR, betas=(BETAS[0], BETAS[2]))
    path = [torch.stack(points).detach()]
    for _ in range(STEPS):
        optimizer.zero_grad()
        torch.stack([_loss(*point) for point in points]).sum().backward()
        optimizer.step()
        path.append(torch.stack(points).detach())
    return torch.stack(path, 1).numpy()
