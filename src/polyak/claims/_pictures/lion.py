"""Lion's picture: where its points go under three choices of K, and the constraint that each keeps."""

from __future__ import annotations

from polyak.lab.pictures import GRID, MUTED, NEUTRAL, SERIES, described, name, panels

DECAY, STEPS = 1.0, 900
CENTRE = (1.8, 0.9)  # the minimum without a constraint, outside of all of them


def picture():
    """Paths from four starts to the minimum of a quadratic, by Lion-K with K the 1-norm, the 2-norm and Huber's function."""
    import numpy as np
    import torch

    from polyak.core.schedules import Cosine
    from polyak.optim.lion import LionK, kappa

    figure, axes = panels(
        3,
        titles=("Lion: |xᵢ| ≤ 1/wd", "2-norm: |x| ≤ 1/wd", "Huber: a soft box"),
        square=True,
        share=True,
        height=225,
    )
    starts = torch.tensor([[-2.4, 1.6], [-1.9, -2.0], [0.3, 2.4], [2.2, -1.9]], dtype=torch.float64)
    grid = np.linspace(-2.7, 2.7, 50)
    x, y = np.meshgrid(grid, grid)
    loss = (x - CENTRE[0]) ** 2 + 3 * (y - CENTRE[1]) ** 2
    turn = np.linspace(0, 2 * np.pi, 60)
    box = np.array([[-1, 1, 1, -1, -1], [-1, -1, 1, 1, -1]]) / DECAY
    borders = (box, np.array([np.cos(turn), np.sin(turn)]) / DECAY, box)
    kinds = (kappa.L1, kappa.L2, lambda: kappa.Huber(0.8))
    for one, kind, border, color in zip(axes, kinds, borders, SERIES, strict=False):
        one.contour(x, y, loss, levels=[0.5, 2, 5, 10, 17, 26, 40], colors=GRID, linewidths=1)
        one.fill(*border, color=color, alpha=0.12, linewidth=0)
        one.plot(*border, color=color, linewidth=1.4)
        one.plot(*CENTRE, marker="+", markersize=9, color=NEUTRAL)
        for start in starts:
            point = start.clone()
            optimizer, rate, path = (
                LionK([point], kind(), lr=0.02, weight_decay=DECAY),
                Cosine(0.02, 1e-4, STEPS),
                [start],
            )
            for step in range(STEPS):
                point.grad = torch.stack([2 * (point[0] - CENTRE[0]), 6 * (point[1] - CENTRE[1])])
                optimizer.param_groups[0]["lr"] = rate(step)
                optimizer.step()
                path.append(point.clone())
            one.plot(*torch.stack(path[::5]).T.numpy(), color=color, linewidth=1.4, alpha=0.85)
            one.plot(*start.numpy(), marker="o", markersize=4, color=color)
            one.plot(*point.numpy(), marker="o", markersize=7, color=color)
        one.set_xlim(-2.7, 2.7)
        one.set_ylim(-2.7, 2.7)
        one.set_xlabel("weight 1 (in 1/wd)")
    axes[0].set_ylabel("weight 2 (in 1/wd)")
    name(axes[0], *CENTRE, "minimum of f", MUTED, shift=(-10, 14))
    return described(
        figure,
        "Contours of a quadratic loss over two weights. Paths from four starts enter the shaded set that weight decay "
        "defines, a box for Lion and a disc for the 2-norm, and end at the loss's minimum within it; with Huber's function, "
        "inside the box.",
    )
