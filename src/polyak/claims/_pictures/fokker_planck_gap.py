"""The ODE-SDE gap's picture: a potential that misses the equation, and what its ODE and its SDE make of it."""

from __future__ import annotations

from polyak.lab.pictures import INK, SERIES, described, name, panels

STRETCH = 1.15


def picture():
    """The residual of log p to the power 1.15 over space and time; densities of samples."""
    import numpy as np
    import torch

    from polyak.claims.generate import _fokker_planck as f
    from polyak.core.distances import wasserstein_1d
    from polyak.generate import OU, log_fp_residual
    from polyak.generate.problems import ExactDenoiser

    figure, (field, densities) = panels(
        2, titles=("Residual of the wrong log density", "What its samples are like"), height=235
    )
    process = OU(t_min=1e-3, t_max=6.0)
    exact = ExactDenoiser(f.LAW, process)
    x, t = np.linspace(-3, 3, 61), np.linspace(0.05, 1.5, 30)
    points, times = (torch.from_numpy(v).flatten() for v in np.meshgrid(x, t))
    R = log_fp_residual(lambda x, t: STRETCH * exact.log_prob(x, t), process, points[:, None], times)
    shown = (R.reshape(len(t), len(x)).numpy() / 2).clip(-1, 1)
    field.contourf(x, t, shown, levels=np.linspace(-1, 1, 9), cmap="RdBu_r")
    field.grid(visible=False)
    field.set(xlabel="x", ylabel="time t")
    ode, sde, data = f.laws(f.denoiser(lambda x, t: STRETCH * exact.score(x, t), process), process, 40, 100)
    edges = np.linspace(-2.6, 2.9, 111)
    middle = (edges[1:] + edges[:-1]) / 2
    for law, color, text, dash in (
        (data, INK, "data", ":"),
        (ode, SERIES[0], "ODE", "-"),
        (sde, SERIES[1], "SDE", (0, (4, 1))),
    ):
        heights = np.histogram(law[:, 0].numpy(), edges, density=True)[0]
        densities.plot(middle, heights, color=color, linestyle=dash, linewidth=1.6)
        top = {"data": 2.5, "ODE": 2.25, "SDE": 2.0}[text]
        name(densities, 0.6, top, text, color, shift=(0, 0))
    name(densities, 0.6, 1.5, f"gap {wasserstein_1d(ode, sde).item():.2f}", INK, shift=(0, 0))
    densities.set(xlabel="x", ylabel="density")
    return described(
        figure,
        "Left: the residual R(x, t) of 1.15 times the log density of three spikes, red where it is positive and blue where it is "
        "negative; of the true log density it is zero everywhere. Right: with that score the ODE's samples and the SDE's have "
        "different densities, and neither has the data's.",
    )
