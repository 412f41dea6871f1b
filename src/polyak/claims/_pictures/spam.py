"""SPAM's picture: one gradient a thousand times too large, and what it does to the steps that follow."""

from __future__ import annotations

from typing import Any

from polyak.lab.pictures import MUTED, NEUTRAL, SERIES, described, log, name, panels

STEPS, WEIGHTS, LR = 400, 20, 0.01
SPIKE, SIZE = 60, 1000.0  # the step of the gradient that is too large, and by how much


def picture():
    """Losses of Adam and of SPAM on one noisy quadratic with a spike, and how far their steps go."""
    figure, (losses, lengths) = panels(2, titles=("Loss", "Length of a step"), height=260)
    for method, color, dash in (("Adam", NEUTRAL, (0, (3, 1))), ("SPAM", SERIES[0], "-")):
        loss, length = _run(method)
        losses.plot(range(0, STEPS, 4), loss[::4], color=color, linewidth=2, linestyle=dash)
        lengths.plot(range(0, STEPS, 4), length[::4], color=color, linewidth=2, linestyle=dash)
        name(losses, 300, loss[300], method, color, shift=(6, 12))
        name(lengths, 240, length[240], method, color, shift=(6, 18))
    for one in (losses, lengths):
        one.axvline(SPIKE, color=MUTED, linewidth=1, linestyle=":")
        one.set_xlabel("step")
    losses.set_ylim(0, None)
    log(lengths, y=True)
    name(losses, SPIKE, 0, "a spike", MUTED, shift=(4, 10))
    return described(
        figure,
        "At step 60 one gradient is a thousand times too large. Adam's loss stands still from then on, since its second "
        "moment remembers: its steps are a tenth as long for hundreds of steps. SPAM clips the spike, its steps recover, its "
        "loss goes on falling.",
    )


def _run(method: str) -> Any:
    """(steps,) each: losses before, and lengths of, every step."""
    import torch

    from polyak.optim import SPAM

    noise = torch.Generator().manual_seed(100)
    w = torch.full((WEIGHTS,), 3.0, dtype=torch.float64)
    optimizer: Any = torch.optim.Adam([w], lr=LR) if method == "Adam" else SPAM([w], lr=LR)
    losses, lengths = [], []
    for step in range(STEPS):
        losses.append(w.square().mean().item() / 2)
        w.grad = w + torch.randn(WEIGHTS, generator=noise, dtype=torch.float64)
        if step == SPIKE:
            w.grad *= -SIZE
        before = w.clone()
        optimizer.step()
        lengths.append((w - before).norm().item())
    return losses, lengths
