"""Potential flows' picture: walks in a plane of latents, along a straight direction and along a wave's gradient."""

from __future__ import annotations

from typing import Any

from polyak.lab.pictures import MUTED, SERIES, described, name, panels

STEPS, SPEED = 9, 0.25


def picture():
    """Walks of the part itself, from the same points, with two potentials that obey the wave equation."""
    import torch
    from torch import nn

    from polyak.generate import PotentialFlow

    waves = torch.tensor([[0.75, 0.25], [-0.4, 0.85]])

    class Straight(nn.Module):
        def forward(self, z, t):
            return 0.045 * t * (z[:, 0] + 0.35 * z[:, 1])

    class Standing(nn.Module):
        def forward(self, z, t):
            return 0.16 * (torch.sin(z @ waves.T + 0.4) * torch.sin(SPEED * t[..., None] * waves.norm(dim=1))).sum(-1)

    flow = PotentialFlow(2, k=2, steps=2 * STEPS)
    flow.potentials[0], flow.potentials[1] = Straight(), Standing()
    side = torch.linspace(-2.0, 2.0, 7)
    start = torch.cartesian_prod(side, side)
    fine = torch.linspace(-2.9, 2.9, 60)
    titles = ("A straight edit", "An edit along a wave")
    figure, axes = panels(2, titles=titles, height=270, square=True, share=True, frame=False)
    for k, (one, color) in enumerate(zip(axes, (SERIES[1], SERIES[0]), strict=True)):
        path = flow.traverse(start, k, STEPS)
        level = flow.potential(k, torch.cartesian_prod(fine, fine), float(STEPS)).reshape(60, 60).T
        lines: dict[str, Any] = dict(colors=MUTED, linewidths=0.5, alpha=0.5)
        one.contour(fine.numpy(), fine.numpy(), level.numpy(), levels=9, **lines)
        gap = torch.full((1, len(start), 2), torch.nan)  # between one point's path and the next's
        one.plot(*torch.cat([path, gap]).transpose(0, 1).reshape(-1, 2).T.numpy(), color=color, linewidth=1.2)
        one.plot(*path[0].T.numpy(), linestyle="", marker="o", markersize=2.5, color=color)
    name(axes[0], -2.9, -3.35, "dots: where walks start", MUTED, shift=(0, 0))
    return described(
        figure,
        "Walks of nine steps from 49 latents in a plane, along the gradients of two potentials that obey the wave equation and "
        "begin at rest. In one all walks are the same straight line. In the other, of two standing waves, each walk has its own "
        "direction, and bends, across the potential's level lines.",
    )
