"""APO's picture: policies on three answers, round by round, by iterative DPO and by APO."""

from __future__ import annotations

from typing import Any

from polyak.lab.pictures import GRID, INK, MUTED, NEUTRAL, SERIES, described, name, panels

ROUNDS, BETA, ALPHA = 4, 1.0, 0.5
REWARD = (1.0, 0.4, 0.0)  # of the best answer, the second and the worst
STARTS = ((0.04, 0.16, 0.80), (0.04, 0.62, 0.34), (0.20, 0.05, 0.75))
CORNERS = ((0.5, 0.75**0.5), (1.0, 0.0), (0.0, 0.0))  # where a policy that gives only this answer is drawn


def picture():
    """Trained policies after each of four rounds from three references, and how often they do not give the best answer."""
    import torch

    from polyak.optim.apo import tabular

    reward, ref = torch.tensor(REWARD, dtype=torch.float64), torch.tensor(STARTS, dtype=torch.float64)
    titles = ("Iterative DPO", f"APO, α = {ALPHA}", "Not the best answer")
    figure, (*triangles, missed) = panels(3, titles=titles, height=215)
    looks = (("DPO", 0.0, NEUTRAL, (0, (3, 1))), ("APO", ALPHA, SERIES[0], "-"))
    for one, (method, alpha, color, dash) in zip(triangles, looks, strict=True):
        policies = tabular(reward, ref, BETA, alpha, ROUNDS).trained.exp()
        _triangle(one)
        for path in (policies @ torch.tensor(CORNERS, dtype=torch.float64)).transpose(0, 1).numpy():
            one.plot(*path.T, color=color, linewidth=1.4)
            one.plot(*path[1:].T, marker="o", markersize=5, linewidth=0, color=color)
            one.plot(*path[0], marker="o", markersize=4, color=INK)
        missing = 100 * (1 - policies[..., 0]).mean(1).numpy()
        missed.plot(missing, color=color, linewidth=2, linestyle=dash, marker="o", markersize=5)
        name(missed, ROUNDS, missing[-1], method, color, shift=(8, 0))
    missed.set(xlabel="round", ylabel="percent", xlim=(-0.2, ROUNDS + 1.4), ylim=(0, 100), xticks=range(ROUNDS + 1))
    return described(
        figure,
        "Two triangles whose corners are policies that always give the best, the second or the worst of three answers. From "
        "three references, four rounds of iterative DPO lead upwards, and four of APO further on the same paths: at the end "
        "the best answer is missed in 14 % of cases instead of 37 %.",
    )


def _triangle(axes: Any) -> None:
    """The policies on three answers: a corner for each."""
    axes.fill(*zip(*CORNERS, strict=True), facecolor="none", edgecolor=GRID, linewidth=1.4)
    for (x, y), answer, shift in zip(CORNERS, ("best", "second", "worst"), ((10, -4), (-22, -9), (0, -9)), strict=True):
        name(axes, x, y, answer, MUTED, shift=shift)
    axes.axis("off")
    axes.set_aspect("equal")
