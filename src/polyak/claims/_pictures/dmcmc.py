"""Denoising MCMC's picture: two chains near a spiral of data, and the short paths from their states to samples."""

from __future__ import annotations

from polyak.lab.pictures import GRID, INK, MUTED, SERIES, described, log, name, panels

CHAINS, SAMPLES, STEPS, SEED = 3, 36, 4, 4


def picture():
    """Paths of Heun's method from noise; the states of chains and the paths from them; the levels that integrations start at."""
    import torch

    from polyak.generate import VE, DenoisingLangevinGibbs, KarrasHeun, NoisePosterior, noise_levels
    from polyak.generate.dmcmc import Integrator
    from polyak.generate.problems import ExactDenoiser, kde

    turn = torch.linspace(0.6, 3.2 * torch.pi, 90, dtype=torch.float64)
    spiral = torch.stack([turn.cos(), turn.sin()], 1) * (0.3 * turn)[:, None]
    law, process = kde(spiral, 0.05), VE(0.01, 50.0)

    class Traced(Integrator):
        """Heun's method, and where it began."""

        def __init__(self) -> None:
            self.began: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []

        def __call__(self, scaled, y, sigma, generator=None):
            made = KarrasHeun(STEPS)(scaled, y, sigma, generator)
            self.began.append((y, sigma, made))
            return made

    traced = Traced()
    posterior = NoisePosterior.exact(law, noise_levels(n=60))
    chains = DenoisingLangevinGibbs(ExactDenoiser(law, process), process, posterior, 0.05, 4, "sample", traced, "fresh")
    chains.warmup((CHAINS, 2), torch.Generator().manual_seed(SEED), dtype=torch.float64)
    chains.sample(CHAINS * SAMPLES)
    began, levels, made = (torch.stack(parts) for parts in zip(*traced.began, strict=True))

    figure, (states, samples, sigma) = panels(
        3, titles=("States of 3 chains", "Paths to samples", "Level at the start"), height=225
    )
    colors = (SERIES[0], SERIES[1], SERIES[2])
    for one in (states, samples):
        one.plot(*spiral.T, linewidth=5, color=GRID)
        one.grid(visible=False)
        one.set(aspect="equal", xlim=(-6, 6), ylim=(-6, 6), xticks=(-4, 0, 4), yticks=(-4, 0, 4))
    for k, color in enumerate(colors):
        states.plot(*began[:, k].T, color=color, linewidth=0.6, alpha=0.5)
        states.plot(*began[:, k].T, linestyle="none", marker="o", markersize=2.5, color=color)
        paths = torch.stack([began[:, k], made[:, k], torch.full_like(made[:, k], torch.nan)], 1)
        samples.plot(*paths.flatten(0, 1).T, color=color, linewidth=0.6, alpha=0.5)
        samples.plot(*made[:, k].T, linestyle="none", marker="o", markersize=2.5, color=INK)
        sigma.plot(levels[:, k], color=color, linewidth=1.2)
    sigma.axhline(50.0, color=MUTED, linewidth=1.2, linestyle=(0, (3, 1)))
    name(sigma, 0, 50.0, "from noise: 50", MUTED, shift=(0, -9))
    sigma.set_xlabel("samples")
    log(sigma, y=True)
    return described(
        figure,
        "Three chains about a spiral of data. Left: the states from which samples are made; each chain wanders about the spiral. "
        "Middle: lines from these states to their samples, which lie on the spiral. Right: the noise level at which each "
        "integration starts; it is mostly a tenth to a hundredth of the 50 at which one from noise begins.",
    )
