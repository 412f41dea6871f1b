"""MKOR's picture: a line fitted to inputs that are not centred, by SGD alone and with MKOR's factors."""

from __future__ import annotations

from typing import Any

from polyak.lab.pictures import GRID, INK, NEUTRAL, SERIES, described, log, name, panels

STEPS, LR, MEAN = 100, 0.03, 2.0  # of the inputs, whose spread is 1
STARTS = ((-0.4, -2.4), (2.4, 2.4), (-0.6, 2.4))  # slope and offset
BEST = (1.0, 0.5)


def picture():
    """Paths of a line's slope and offset to the least squares by SGD, alone and with MKOR's factors, and their losses."""
    import numpy as np

    figure, (*valleys, losses) = panels(3, titles=("SGD", "MKOR with SGD", "Loss, mean of paths"), height=225)
    slope, offset = np.meshgrid(np.linspace(-1, 3, 40), np.linspace(-3, 4, 40))
    error = (MEAN * (slope - BEST[0]) + offset - BEST[1]) ** 2 + (slope - BEST[0]) ** 2
    looks = (("SGD", NEUTRAL, (0, (3, 1))), ("MKOR", SERIES[0], "-"))
    for valley, (method, color, dash) in zip(valleys, looks, strict=True):
        valley.contour(slope, offset, error, levels=[0.1, 1, 4, 10, 20, 35, 55], colors=GRID, linewidths=1)
        paths, loss = _paths(method)
        for path in paths:
            valley.plot(*path.T, color=color, linewidth=1.4)
            valley.plot(*path[0], marker="o", markersize=4, color=INK)
            valley.plot(*path[-1], marker="o", markersize=6, color=color)
        valley.plot(*BEST, marker="+", markersize=9, color=INK)
        valley.grid(visible=False)
        valley.set(xlabel="slope", xlim=(-1, 3), ylim=(-3, 4))
        losses.plot(range(STEPS + 1), loss, color=color, linewidth=2, linestyle=dash)
        name(losses, 60, loss[60], method, color, shift=(6, 10) if method == "SGD" else (-6, -10))
    valleys[0].set_ylabel("offset")
    losses.set_xlabel("step")
    log(losses, y=True)
    return described(
        figure,
        "Contours of a line's squared error over its slope and its offset: a narrow valley, since the inputs are not centred. "
        "From three starts SGD falls into the valley and creeps along it. With MKOR's factors, which learn the mean input, "
        "the paths bend to the minimum early: after 100 steps the loss is a quarter of SGD's.",
    )


def _fit(method: str, lr: float) -> Any:
    """A line, what it is off by, and what trains it."""
    import torch

    from polyak.optim import MKOR

    x = MEAN + torch.randn(200, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(100))
    model = torch.nn.Linear(1, 1, dtype=torch.float64)
    optimizer: Any = torch.optim.SGD(model.parameters(), lr=lr)
    if method == "MKOR":
        optimizer = MKOR(model, optimizer, inv_freq=1)

    def step() -> float:
        optimizer.zero_grad()
        loss = (model(x) - BEST[0] * x - BEST[1]).square().mean()
        loss.backward()
        optimizer.step()
        return loss.item()

    return model, step


def _put(model: Any, place: Any) -> None:
    import torch

    with torch.no_grad():
        model.weight.fill_(place[0])
        model.bias.fill_(place[1])


def _paths(method: str) -> Any:
    """(starts, steps + 1, 2): slopes and offsets of every step; and the mean losses."""
    import numpy as np

    paths, losses = [], []
    for start in STARTS:
        model, step = _fit(method, LR)
        _put(model, start)
        path, history = [], []
        for _ in range(STEPS + 1):
            path.append((model.weight.item(), model.bias.item()))
            history.append(step())
        paths.append(path)
        losses.append(history)
    return np.array(paths), np.array(losses).mean(0)
