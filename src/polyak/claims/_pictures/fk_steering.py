"""FK steering's picture: trajectories of a mixture on the line, free and steered, and the law that is reached."""

from __future__ import annotations

from polyak.lab.pictures import GRID, INK, MUTED, SERIES, described, name, panels

PARTICLES, STEPS, LAM = 24, 40, 1.5
SCORED = (8, 16, 24, 32)


def picture():
    """Paths in half log-SNR, the lineages that survive in colour; a histogram beside the exact tilt."""
    import numpy as np
    import torch

    from polyak.core.exact import Mixture
    from polyak.generate import DDIM, VP, FKSteering, sample
    from polyak.generate.problems import ExactDenoiser

    law, process = Mixture([[-2.0], [0.0], [2.0]], 0.05, [0.6, 0.3, 0.1]), VP()
    denoiser = ExactDenoiser(law, process)
    lams = [float(process.lam(t)) for t in process.grid(STEPS, "logsnr").tolist()]
    titles = ("Free", f"Steered up, k = {PARTICLES}", "Law of the samples")
    figure, (free, steered, laws) = panels(3, titles=titles, height=235)

    def rule(k, threshold=0.7):
        return FKSteering(
            lambda x: x[..., 0], lam=LAM, num_particles=k, schedule=SCORED, ess_threshold=threshold, pick="all"
        )

    def run(steering):
        states, parents = [], []

        def keep(step):
            moved = None if step.steering is None else step.steering.ancestors
            rows = torch.arange(len(step.x)) if moved is None else moved
            states.append(step.x[:, 0].clone())
            parents.append(rows)

        start = process.prior((PARTICLES, 1), generator=torch.Generator().manual_seed(5), dtype=torch.float64)
        sample(
            denoiser, start, solver=DDIM(eta=1.0), steps=STEPS, grid="logsnr", steering=steering, callback=keep,
            generator=torch.Generator().manual_seed(6),
        )  # fmt: skip
        return start[:, 0], states, parents

    for axes, steering in ((free, None), (steered, rule(PARTICLES))):
        start, states, parents = run(steering)
        alive = torch.ones(PARTICLES, dtype=torch.bool)
        for i in reversed(range(STEPS)):
            before = start if i == 0 else states[i - 1]
            for row in range(PARTICLES):
                color, width = (SERIES[0], 1.0) if alive[row] and steering else (INK if not steering else GRID, 0.8)
                axes.plot(
                    lams[i : i + 2], [before[parents[i][row]], states[i][row]], color=color, linewidth=width,
                    alpha=0.45 if not steering else 0.9, zorder=3 if alive[row] else 1,
                )  # fmt: skip
            lives = torch.zeros(PARTICLES, dtype=torch.bool)
            lives[parents[i][alive]] = True
            alive = lives
        axes.set(ylim=(-3.4, 3.4), xlabel="half log-SNR", yticks=(-2, 0, 2))
        axes.grid(visible=False)
    free.set_ylabel("x")
    for step in SCORED:
        steered.axvline(lams[step + 1], color=MUTED, linewidth=0.7, linestyle=(0, (2, 2)), zorder=0)
    name(steered, lams[SCORED[0] + 1], -3.2, "resampled", MUTED, shift=(3, 0))

    tilted, _ = law.tilt(torch.tensor([LAM], dtype=torch.float64))
    x = sample(
        denoiser, (4, 1), solver=DDIM(eta=1.0), steps=STEPS, grid="logsnr", steering=rule(1000, 1.0),
        generator=torch.Generator().manual_seed(7), dtype=torch.float64,
    )[:, 0]  # fmt: skip
    line = torch.linspace(-3.4, 3.4, 300, dtype=torch.float64)
    laws.hist(x.numpy(), bins=np.linspace(-3.4, 3.4, 69), density=True, color=SERIES[0], alpha=0.35, linewidth=0)
    for one, color, label, shift in ((law, INK, "model", (-14, 6)), (tilted, SERIES[0], "tilted", (-52, -12))):
        density = one.log_prob(line[:, None]).exp()
        laws.plot(line, density, color=color, linewidth=1.5)
        top = int(density.argmax())
        name(laws, float(line[top]), float(density[top]), label, color, shift=shift)
    laws.set(xlabel="x", xticks=(-2, 0, 2), yticks=())
    return described(
        figure,
        "Left: trajectories of a diffusion model from noise to three clusters of weights 0.6, 0.3 and 0.1, most of which end in "
        "the lowest. Middle: as many trajectories that are resampled at four times by what they are predicted to become; the "
        "lineages that survive end in the two upper clusters. Right: a histogram of steered samples, near the exactly tilted law.",
    )
