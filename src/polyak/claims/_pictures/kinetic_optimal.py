"""Kinetic-optimal paths' picture: how much is seen of three laws, the best path of each, and what velocities cost along three."""

from __future__ import annotations

from polyak.lab.pictures import GRID, MUTED, NEUTRAL, SERIES, described, name, panels


def picture():
    """Separation functions, optimal paths in the plane of sigma and alpha, and the energy along paths of one law."""
    import math

    import numpy as np
    import torch

    from polyak.generate import Flow, KineticOptimal, TrigFlow, gaussian_separation, separation_function

    draw = torch.Generator().manual_seed(0)

    def cloud(d: int, draws: int):
        x = torch.randn(50, d, generator=draw, dtype=torch.float64)
        x = x - x.mean(0)
        grid = torch.logspace(-1.7, 1, 40)
        return separation_function(x / x.square().mean().sqrt(), grid, n_samples=draws, generator=draw)

    spectrum = torch.arange(1, 33, dtype=torch.float64) ** -1.5  # falls as that of images does
    spectrum = spectrum / spectrum.mean()
    gaussian = gaussian_separation(spectrum)
    figure, (seen, plane, cost) = panels(3, titles=("Separation λ", "Optimal path", "Energy along it"), height=215)
    snr = torch.logspace(-1.5, 1, 120, dtype=torch.float64)
    t = torch.linspace(0, 1, 200, dtype=torch.float64)
    for separation, color in ((cloud(400, 100), SERIES[1]), (cloud(8, 300), SERIES[2]), (gaussian, SERIES[0])):
        path = KineticOptimal(separation)
        seen.plot(snr, separation(snr), color=color, linewidth=1.8)
        plane.plot(path.sigma(t), path.alpha(t), color=color, linewidth=1.8)
    seen.fill_between(snr, 0, snr**2 / (1 + snr**2), color=GRID, linewidth=0)
    seen.set_xscale("log")
    seen.set_xticks([0.1, 1, 10], ["0.1", "1", "10"])
    seen.minorticks_off()
    seen.set_xlabel("α / σ")
    name(seen, 0.03, 0.9, "d=400", SERIES[1], shift=(0, 0))
    name(seen, 1.15, 0.62, "d=8", SERIES[2], shift=(4, 0))
    name(seen, 10, 0.1, "impossible", MUTED, shift=(-2, 0))
    turn = np.linspace(0, math.pi / 2, 60)
    plane.plot([0, 1], [1, 0], color=NEUTRAL, linewidth=1, linestyle=(0, (3, 2)))
    plane.plot(np.cos(turn), np.sin(turn), color=NEUTRAL, linewidth=1, linestyle=(0, (1, 1.5)))
    name(plane, 0.04, 0.3, "Cond-OT", MUTED, shift=(0, 0))
    name(plane, 1.0, 0.95, "Gaussian", SERIES[0], shift=(-1, 0))
    plane.set(xlim=(0, 1.02), ylim=(0, 1.02), xlabel="σ", ylabel="α", xticks=[0, 0.5, 1], yticks=[0, 0.5, 1])
    plane.set_aspect("equal")
    inner = torch.linspace(1e-3, 1 - 1e-3, 300, dtype=torch.float64)
    for label, process, color, dash, at in (
        ("Cond-OT", Flow(), SERIES[1], (0, (3, 1)), (0.62, 1.08)),
        ("trigonometric", TrigFlow(), SERIES[2], (0, (1, 1)), (0.17, 0.1)),
        ("optimal", KineticOptimal(gaussian), SERIES[0], "-", (0.33, 0.64)),
    ):
        a, m, da, dm = (f(inner)[:, None] for f in (process.alpha, process.sigma, process.dalpha, process.dsigma))
        energy = ((a * da * spectrum + m * dm) ** 2 / (a**2 * spectrum + m**2)).mean(1)
        cost.plot(1 - inner, energy, color=color, linewidth=1.8, linestyle=dash)
        name(cost, *at, label, color, shift=(0, 0))
    cost.set(xlabel="noise → data", ylim=(0, 1.2), xticks=[0, 0.5, 1])
    return described(
        figure,
        "Left: the separation function of 50 points in 400 and in 8 dimensions and of a Gaussian whose spectrum falls as that of "
        "images; it rises from 0 to 1, earlier in the larger space. Middle: the optimal path of each in the plane of sigma and "
        "alpha; in the larger space it is nearly Cond-OT's straight line, for the Gaussian nearer to the circle. Right: the energy "
        "of the Gaussian's velocities along three paths; along the optimal one it is constant, and the least in all.",
    )
