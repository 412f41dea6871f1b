"""Meta flow matching's picture: populations that were not in training, moved by one field, told nothing or told which they are."""

from __future__ import annotations

from typing import Any

from polyak.lab.pictures import INK, MUTED, SERIES, described, name, panels

SHOWN, POINTS = 5, 14


def picture():
    """Where the exact fields take populations that contract: paths of points, by the part's own transport."""
    import torch

    from polyak.claims.generate._populations import LEFT, Centre, Exact, Nothing
    from polyak.generate.meta_flow import MetaFlowMatching

    generator = torch.Generator().manual_seed(5)
    centre = torch.tensor([[-3.6, 2.0], [3.4, 2.6], [-2.6, -2.8], [3.4, -2.2], [0.2, 0.2]])[:, None]
    x0 = centre + torch.randn(SHOWN, POINTS, 2, generator=generator)
    centre = x0.mean(1, keepdim=True)
    x1 = centre + LEFT * (x0 - centre)
    titles = ("Flow matching, told nothing", "Meta flow matching")
    figure, axes = panels(2, titles=titles, height=265, square=True, share=True, frame=False)
    for one, told, color in zip(axes, (False, True), (SERIES[1], SERIES[0]), strict=True):
        meta = MetaFlowMatching(Centre() if told else Nothing(), Exact(told))
        path = meta.transport(x0, steps=4, return_path=True)
        gaps = torch.full((1, SHOWN * POINTS, 2), torch.nan)  # between one point's path and the next's
        lines = torch.cat([path.flatten(1, 2), gaps]).transpose(0, 1).reshape(-1, 2)
        one.plot(*lines.T.numpy(), color=MUTED, linewidth=0.7, alpha=0.7)
        dots: dict[str, Any] = dict(linestyle="", marker="o")
        one.plot(*x1.flatten(0, 1).T.numpy(), **dots, markersize=4.5, markerfacecolor="none", color=INK, alpha=0.6)
        one.plot(*path[-1].flatten(0, 1).T.numpy(), **dots, markersize=2.5, color=color)
    name(axes[0], -6.0, -5.6, "circles: where they belong", MUTED, shift=(0, 0))
    axes[0].set(xlim=(-6.2, 6.2), ylim=(-6.2, 6.2))
    return described(
        figure,
        "Five populations of points, each to be contracted about its own centre. The best field that cannot tell populations "
        "apart draws all points a little towards the origin, and misses. Told the population's centre, the field takes every "
        "point to where it belongs.",
    )
