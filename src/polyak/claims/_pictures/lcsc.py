"""LCSC's picture: the plane through three checkpoints, their averages, and the combination that a search finds."""

from __future__ import annotations

from typing import Any

from polyak.lab.pictures import GRID, INK, SERIES, described, name, panels

STEPS, EVERY, LR = 150, 50, 0.4  # of SGD, whose rate is too high to come to rest
EVALS = 200


def picture():
    """A loss on the plane through three checkpoints of SGD, with the moving averages' arc and LCSC's result; its search."""
    import numpy as np
    import torch

    from polyak.teachers.lcsc import LCSC, combine, ema_coefficients, landscape

    checkpoints, objective = _trained()
    first, second, third = checkpoints
    generator = torch.Generator().manual_seed(103)
    result = LCSC(checkpoints, objective=objective, evals=EVALS, population=20, generator=generator).run()
    arc = torch.stack([ema_coefficients(3, rate) for rate in torch.linspace(0, 1, 21).tolist()])
    figure, (plane, search) = panels(2, titles=("Plane through three checkpoints", "Best loss so far"), height=260)

    # Coefficient 2 to the right and 3 upwards; that of the first checkpoint is what is left to 1.
    xs = ys = list(np.linspace(-0.5, 1.5, 24))
    values = landscape(first, second, third, (xs, ys), objective=objective).numpy()
    levels = values.min() + (values.max() - values.min()) * np.linspace(0.04, 1, 10) ** 2
    plane.contour(xs, ys, values.T, levels=levels, colors=GRID, linewidths=1)
    plane.plot(*result.tried[::2, 1:].T.numpy(), marker=".", markersize=4, linewidth=0, color=SERIES[0], alpha=0.4)
    plane.plot(*arc[:, 1:].T.numpy(), color=SERIES[1], linewidth=2, linestyle="--")
    for number, place, shift in ((1, (0, 0), (-8, -10)), (2, (1, 0), (8, -10)), (3, (0, 1), (-8, 10))):
        plane.plot(*place, marker="o", markersize=6, color=INK)
        name(plane, place[0], place[1], str(number), INK, shift=shift)
    plane.plot(*result.coefficients[1:].numpy(), marker="*", markersize=14, color=SERIES[0])
    plane.grid(visible=False)
    plane.set(
        xlim=(xs[0], xs[-1]),
        ylim=(ys[0], ys[-1]),
        xlabel="coefficient of 2",
        ylabel="coefficient of 3",
        xticks=(0, 1),
        yticks=(0, 1),
    )
    name(plane, arc[5, 1].item(), arc[5, 2].item(), "averages", SERIES[1], shift=(8, 5))

    single, average = min(map(objective, checkpoints)), min(objective(combine(checkpoints, a)) for a in arc)
    search.plot(range(1, EVALS + 1), result.best.numpy(), color=SERIES[0], linewidth=2, drawstyle="steps-post")
    for value, text, color, dash in ((single, "best checkpoint", INK, ":"), (average, "best average", SERIES[1], "--")):
        search.axhline(value, color=color, linewidth=1.4, linestyle=dash)
        name(search, EVALS, value, text, color, shift=(-2, 9))
    name(search, EVALS, result.value, "LCSC", SERIES[0], shift=(-2, -10))
    search.set(xlabel="evaluations", ylim=(0.28, 0.34))
    return described(
        figure,
        "Contours of a loss on the plane through three checkpoints of a training run. The arc of moving averages passes "
        "beside the minimum; the candidates of LCSC's search gather in it and end at the star. Right: within 25 evaluations "
        "the search is below the best average, which is below the best checkpoint.",
    )


def _trained() -> Any:
    """Three checkpoints of logistic regression under noisy SGD, and its loss."""
    import torch

    noise = torch.Generator().manual_seed(100)
    x = torch.randn(300, 6, generator=noise, dtype=torch.float64) * torch.tensor([3.0, 2, 1, 1, 0.5, 0.3]).double()
    y = (x @ torch.tensor([0.3, -0.5, 1, -1, 1, 2]).double() + torch.randn(300, generator=noise).double() > 0).double()
    w, saved = torch.zeros(6, dtype=torch.float64), []

    def loss(at: Any, rows: Any = slice(None)) -> Any:
        return torch.nn.functional.binary_cross_entropy_with_logits(x[rows] @ at, y[rows])

    for step in range(1, STEPS + 1):
        w.requires_grad_()
        (slope,) = torch.autograd.grad(loss(w, torch.randint(300, (4,), generator=noise)), w)
        w = (w - LR * slope).detach()
        if step % EVERY == 0:
            saved.append({"w": w})
    return saved, lambda state: loss(state["w"]).item()
