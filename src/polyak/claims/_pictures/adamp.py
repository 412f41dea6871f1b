"""AdamP's picture: a weight whose length does not matter, under Adam and under AdamP."""

from __future__ import annotations

from typing import Any

from polyak.lab.pictures import GRID, INK, MUTED, NEUTRAL, SERIES, described, name, panels

STEPS, LR, BETAS = 250, 0.06, (0.9, 0.99)
SPREAD = 0.4  # in radians: how much the angle that a step asks for differs from the best one, which is 0
STARTS = (2.8, 1.7, -1.1, -2.2)


def picture():
    """Paths of a weight of two entries whose loss is 1 - cos of its angle, and the step's length relative to the weight's."""
    import numpy as np

    figure, (plane, steps) = panels(2, titles=("Four starts, one best angle", "Effective step, lr / |w|"), height=260)
    turn = np.linspace(0, 2 * np.pi, 100)
    for radius in (1, 2, 3):
        plane.plot(radius * np.cos(turn), radius * np.sin(turn), color=GRID, linewidth=1)
    plane.plot([0, 2.7], [0, 0], color=MUTED, linewidth=1, linestyle=":")
    # With delta = 0 nothing is projected: that is Adam.
    for delta, label, color, dash in ((0.0, "Adam", NEUTRAL, (0, (3, 1))), (0.1, "AdamP", SERIES[0], "-")):
        paths = _paths(delta)
        for path in paths:
            plane.plot(*path[::2].T, color=color, linewidth=1.4, linestyle=dash)
            plane.plot(*path[0], marker="o", markersize=4, color=INK)
            plane.plot(*path[-1], marker="o", markersize=7, color=color)
        effective = (LR / np.linalg.norm(paths, axis=2)).mean(0)
        steps.plot(range(0, STEPS + 1, 2), effective[::2], color=color, linewidth=2, linestyle=dash)
        name(steps, STEPS, effective[-1], label, color, shift=(-2, -12))
    plane.grid(visible=False)
    plane.set(
        aspect="equal", xlim=(-1.7, 2.7), ylim=(-2.2, 2.2), yticks=range(-2, 3), xlabel="weight 1", ylabel="weight 2"
    )
    name(plane, 2.7, 0, "best", MUTED, shift=(-2, 8))
    steps.set(xlabel="step", ylabel="radians", ylim=(0, None))
    return described(
        figure,
        "Left: the plane of a weight of two entries whose length does not matter to the loss. From four starts on the unit "
        "circle Adam's paths leave the circle while they turn to the best direction; AdamP's stay on it. Right: as Adam's "
        "weights grow its steps turn them less and less; AdamP's effective step stays.",
    )


def _paths(delta: float) -> Any:
    """(starts, steps + 1, 2): the weights at every step."""
    import torch

    from polyak.optim import AdamP

    angles = torch.tensor(STARTS, dtype=torch.float64)
    weights = [w.clone()[None] for w in torch.stack([angles.cos(), angles.sin()], 1)]
    optimizer, path = AdamP(weights, lr=LR, betas=BETAS, delta=delta), [torch.cat(weights)]
    noise = torch.Generator().manual_seed(100)
    for target in SPREAD * torch.randn(STEPS, generator=noise, dtype=torch.float64):
        w = torch.cat(weights)
        turn = torch.sin(torch.atan2(w[:, 1], w[:, 0]) - target) / w.square().sum(1)
        for one, g in zip(weights, turn[:, None] * torch.stack([-w[:, 1], w[:, 0]], 1), strict=True):
            one.grad = g[None]
        optimizer.step()
        path.append(torch.cat(weights))
    return torch.stack(path, 1).numpy()
