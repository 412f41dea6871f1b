"""PFGM++'s picture: the radius of its noise, and paths from noise to data, for few and many extra dimensions."""

from __future__ import annotations

from polyak.lab.pictures import INK, MUTED, SERIES, described, name, panels

N, PATHS = 64, 40
SHOWN = ((4.0, "D = 4", (2.1, 0.25)), (64.0, "64", (1.25, 1.15)), (float("inf"), "inf", (1.14, 2.7)))


def picture():
    """The density of the radius in 64 dimensions; paths of the ODE to a ring of points, for D = 1 and for D = inf."""
    import math

    import torch

    from polyak.generate import PFGMPP, Heun, sample
    from polyak.generate.problems import Recorder, StudentDenoiser

    titles = ("Noise, N = 64", "Paths, D = 1", "Paths, D = inf")
    figure, (radii, *planes) = panels(3, titles=titles, height=225)
    ratio = torch.linspace(0.3, 3.2, 120, dtype=torch.float64)  # R / (sigma sqrt(N))
    x = (ratio * math.sqrt(N))[:, None] * torch.eye(1, N, dtype=torch.float64)
    sphere = math.log(2) + N / 2 * math.log(math.pi) - math.lgamma(N / 2)
    for (D, label, at), color in zip(SHOWN, (SERIES[1], SERIES[2], SERIES[0]), strict=True):
        log_kernel = PFGMPP(D, N).log_kernel(x, torch.zeros(1, N, dtype=torch.float64), 1.0)
        density = math.sqrt(N) * (log_kernel + sphere + (N - 1) * x[:, 0].log()).exp()
        radii.plot(ratio, density, color=color, linewidth=2)
        name(radii, *at, label, color)
    radii.set_xlabel("R / (sigma sqrt(N))")
    radii.set_ylabel("density", color=MUTED)

    angle = torch.arange(8, dtype=torch.float64) * math.pi / 4
    ring = torch.stack([angle.cos(), angle.sin()], 1)
    for one, D, color in zip(planes, (1.0, math.inf), (SERIES[1], SERIES[0]), strict=True):
        process = PFGMPP(D, 2, sigma_min=0.01, sigma_max=3.0)
        start = process.prior((PATHS, 2), generator=torch.Generator().manual_seed(103), dtype=torch.float64)
        record = Recorder()
        sample(StudentDenoiser(ring, process), start, solver=Heun(), steps=15, grid="logsnr", callback=record)
        for path in torch.stack([start, *record.states]).transpose(0, 1):
            one.plot(*path.T, color=color, linewidth=0.9, alpha=0.8)
        one.plot(*ring.T, linestyle="none", marker="o", markersize=4, color=INK)
        one.grid(visible=False)
        one.set(aspect="equal", xlim=(-9, 9), ylim=(-9, 9), xticks=(-6, 0, 6), yticks=(-6, 0, 6))
    return described(
        figure,
        "Left: the radius of the noise in 64 dimensions, for 4, 64 and infinitely many extra dimensions. The fewer there are, the "
        "wider it spreads. Middle and right: 40 paths from noise of the same level to 8 points on a circle. With one extra "
        "dimension many start far outside of the picture; with infinitely many, which is diffusion, hardly any.",
    )
