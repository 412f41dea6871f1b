"""MoNNA's picture: eleven workers on their way to a minimum, three of them faulty."""

from __future__ import annotations

from typing import Any

from polyak.lab.pictures import GRID, INK, MUTED, NEUTRAL, SERIES, described, name, panels

WORKERS, FAULTY, STEPS, LR = 11, 3, 100, 0.06
START, NOISE = (-2.5, 1.5), 3.0  # of each worker's gradient, in each weight


def picture():
    """Paths of the honest workers' two weights under the mean of all, NNA without momentum, and MoNNA."""
    import numpy as np

    titles = ("Mean of all", "Nearest neighbours", "... and momentum")
    figure, axes = panels(3, titles=titles, square=True, share=True, height=205)
    turn = np.linspace(0, 2 * np.pi, 40)
    looks = (("mean", 0.0, NEUTRAL), ("nna", 0.0, SERIES[1]), ("nna", 0.95, SERIES[0]))
    for one, (mixer, momentum, color) in zip(axes, looks, strict=True):
        for radius in (0.6, 1.2, 1.8, 2.4):
            one.plot(radius * np.cos(turn), radius * np.sin(turn), color=GRID, linewidth=1)
        paths = _paths(mixer, momentum, STEPS if mixer == "nna" else 2)
        for path in paths:
            one.plot(*path[::2].T, color=color, linewidth=0.9, alpha=0.7)
            one.plot(*path[-1], marker="o", markersize=5, color=color)
        one.plot(*START, marker="o", markersize=4, color=INK)
        one.plot(0, 0, marker="+", markersize=11, color=INK)
        one.grid(visible=False)
        one.set(xlim=(-3, 2), ylim=(-1.5, 2.5), xticks=range(-2, 2), xlabel="weight 1")
    name(axes[0], -1.9, 2, "off at once", MUTED, shift=(8, 0))
    name(axes[0], 0, 0, "minimum", MUTED, shift=(8, -12))
    axes[0].set_ylabel("weight 2")
    return described(
        figure,
        "Eight honest workers on their way to a minimum while three faulty ones send what misleads most. If all are averaged "
        "they are off the picture in one step. With the mean of nearest neighbours they come near, but hover beside the "
        "minimum; with momentum, which is MoNNA, they stay together and reach it.",
    )


def _paths(mixer: str, momentum: float, steps: int) -> Any:
    """(honest, steps + 1, 2): the honest workers' weights after each step."""
    import torch

    from polyak.optim.monna import Simulator
    from polyak.optim.monna.attacks import ALIE

    noise, honest = torch.Generator().manual_seed(100), WORKERS - FAULTY
    model = torch.nn.Linear(1, 2, bias=False, dtype=torch.float64)
    with torch.no_grad():
        model.weight.copy_(torch.tensor(START)[:, None])
    ones = torch.ones(honest, 1, 1, dtype=torch.float64)
    targets = NOISE * torch.randn(steps, honest, 1, 2, generator=noise, dtype=torch.float64)
    run = Simulator(
        model, ((ones, target) for target in targets), n=WORKERS, f=FAULTY, lr=LR, momentum=momentum, mixer=mixer,
        attack=ALIE(evaluations=8), loss=lambda out, target: (out - target).square().sum() / 2,
    )  # fmt: skip
    path = [run.parameters]
    for _ in range(steps):
        run.step()
        path.append(run.parameters)
    return torch.stack(path, 1).numpy()
