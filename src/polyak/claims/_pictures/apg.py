"""APG's picture: where samples of one class end at a high scale, and how saturated digits are, by either guidance."""

from __future__ import annotations

from polyak.lab.pictures import GRID, INK, MUTED, SERIES, described, name, panels

SCALES = (1.0, 2.0, 4.0, 8.0, 16.0)
POINTS, IMAGES, STEPS, W = 80, 30, 18, 8.0


def picture():
    """Samples of two of eight clusters on a ring; the share of saturated pixels of digits over the scale."""
    import numpy as np
    import torch

    from polyak.generate import APG, CFG, EDM, Heun, sample
    from polyak.generate.problems import ExactDenoiser, kde, ring
    from polyak.lab.data import digits

    def made(law, condition, guidance, count):
        denoiser = ExactDenoiser(condition, EDM(), unconditional=law)
        noise = EDM().prior((count, law.dim), generator=torch.Generator().manual_seed(7), dtype=torch.float64)
        return sample(denoiser, noise, solver=Heun(), steps=STEPS, grid="karras", guidance=guidance)

    images, labels = map(torch.from_numpy, digits())
    numbers = kde(images[:400] / 8 - 1, 0.2, labels[:400])
    eight = ring(variance=0.04)
    ways = (
        ("CFG", CFG, SERIES[1]),
        ("APG", lambda w: APG(w, norm_threshold=2.5, momentum=-0.5), SERIES[0]),
    )
    turn = np.linspace(0, 2 * np.pi, 60)
    figure, axes = panels(3, titles=("CFG, w = 8", "APG, w = 8", "saturated pixels, %"), height=205)
    for one, (way, guidance, color) in zip(axes, ways, strict=False):
        for angle in np.arange(8) * np.pi / 4:
            wanted = angle < 1
            one.fill(
                2 * np.cos(angle) + 0.4 * np.cos(turn), 2 * np.sin(angle) + 0.4 * np.sin(turn),
                color=MUTED if wanted else GRID, alpha=0.6 if wanted else 1.0, linewidth=0,
            )  # fmt: skip
        one.plot(2 * np.cos(turn), 2 * np.sin(turn), color=INK, linewidth=0.7, linestyle=(0, (3, 2)))
        x = made(eight, eight.select([0, 1]), guidance(W), POINTS)
        one.plot(*x.T.numpy(), linestyle="", marker="o", markersize=2.2, color=color, alpha=0.8)
        one.grid(visible=False)
        one.set(aspect="equal", xlim=(-2.5, 3.5), ylim=(-2.5, 3.5), xticks=range(-2, 4, 2), yticks=range(-2, 4, 2))
        found = [made(numbers, numbers.of_class(3), guidance(w), IMAGES) for w in SCALES]
        share = [100 * (x.abs() > 1.05).double().mean().item() for x in found]
        axes[2].plot(SCALES, share, color=color, linewidth=2, marker="o", markersize=4)
        name(axes[2], SCALES[-2], share[-2], way, color, shift=(-6, 9))
    axes[2].set_xscale("log", base=2)
    axes[2].set_xticks(SCALES, [f"{w:g}" for w in SCALES])
    axes[2].set_xlabel("scale w")
    return described(
        figure,
        "Left and middle: samples of two neighbouring clusters of eight on a ring, at scale 8. Classifier-free guidance drives "
        "them out of the ring; APG keeps them near it. Right: the share of saturated pixels of handwritten threes grows with the "
        "scale by classifier-free guidance and hardly by APG.",
    )
