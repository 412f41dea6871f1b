"""Feynman-Kac correctors' picture: a ring at a third of the temperature, by scores alone and corrected."""

from __future__ import annotations

from polyak.lab.pictures import INK, MUTED, SERIES, described, name, panels

COUNT, STEPS, SHOWN = 2000, 80, 125  # particles, steps, particles that are drawn


def picture():
    """Particles of both over the modes, and the masses of the modes beside the exact ones."""
    import numpy as np
    import torch

    from polyak.claims.generate import _correctors as c
    from polyak.generate import Composed, FeynmanKacCorrector, ReverseSDE, sample
    from polyak.generate.problems import ExactDenoiser

    law = c.ring()
    composed = Composed([(ExactDenoiser(law, c.PROCESS), c.BETA)])
    exact = law.power_of_modes(c.BETA)[0].weights.numpy()
    corrector = FeynmanKacCorrector("anneal", num_particles=COUNT)
    titles = ("Scores alone", "Corrected", "Masses of the modes")
    figure, (*planes, bars) = panels(3, titles=titles, height=225)
    looks = (("scores alone", None, SERIES[1], -0.2), ("corrected", corrector, SERIES[0], 0.2))
    places = np.arange(c.MODES)
    for one, (who, steering, color, shift) in zip(planes, looks, strict=True):
        draw = torch.Generator().manual_seed(104)
        rows = COUNT if steering is None else 1
        x = sample(
            composed, (rows, 2), solver=ReverseSDE(), steps=STEPS, grid="karras", steering=steering, generator=draw
        )
        one.scatter(*x[:: COUNT // SHOWN].numpy().T, s=5, color=color, linewidths=0, alpha=0.6)
        for place, mean in enumerate(law.means.numpy()):
            name(one, 1.42 * mean[0], 1.42 * mean[1], str(place + 1), INK, shift=(-3, -4))
        one.set(aspect="equal", xlim=(-5, 5), ylim=(-5, 5), xticks=(-3, 0, 3), yticks=(-3, 0, 3))
        one.grid(visible=False)
        nearest = torch.cdist(x.double(), law.means).argmin(1)
        mass = torch.bincount(nearest, minlength=c.MODES).double().numpy() / len(x)
        bars.bar(places + shift, mass, 0.38, color=color)
        name(bars, 2.4, 0.66 if steering is None else 0.55, who, color, shift=(0, 0))
    for place, mass in zip(places, exact, strict=True):
        bars.plot([place - 0.45, place + 0.45], [mass, mass], color=INK, linewidth=2)
    name(bars, 2.4, 0.77, "line: exact", MUTED, shift=(0, 0))
    bars.set(xticks=places, xticklabels=[str(p + 1) for p in places], xlabel="mode", ylim=(0, 0.95))
    return described(
        figure,
        "Particles from a ring of six modes at a third of its temperature. Scores alone leave mass in every mode; corrected, "
        "nearly all particles are in the modes that the exact law prefers, in its proportions.",
    )
