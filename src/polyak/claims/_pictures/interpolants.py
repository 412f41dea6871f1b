"""The picture of stochastic interpolants: one bridge between two laws, crossed by the ODE and by an SDE."""

from __future__ import annotations

from polyak.lab.pictures import GRID, INK, SERIES, described, name, panels

PATHS, STEPS, EPS = 12, 64, 1.0
ERROR, LEVELS, POINTS = 1.5, (0.0, 0.25, 0.5, 1.0, 2.0), 1000


def picture():
    """Paths of the ODE and of the SDE over the density of the bridge; the error of samples against the noise level."""
    import numpy as np
    import torch

    from polyak.generate.interpolants import Fields, GaussianMixtureInterpolant, integrate
    from polyak.generate.problems import Mixture, wasserstein_1d

    source, target = Mixture([[-2.0], [2.0]], 0.15), Mixture([[-4.0], [0.0], [4.0]], 0.2)
    bridge = GaussianMixtureInterpolant(source, target)
    times, places = np.linspace(0, 1, 24), torch.linspace(-5.5, 5.5, 60, dtype=torch.float64)[:, None]
    density = torch.stack([bridge.log_prob(places, t).exp() for t in times], 1).numpy()
    figure, (*planes, errors) = panels(
        3, titles=("The ODE", f"An SDE, $\\epsilon$ = {EPS:g}", "W2 with a wrong drift"), height=225
    )

    def recorded(eps: float) -> tuple[np.ndarray, np.ndarray]:
        seen: list[tuple[float, torch.Tensor]] = []

        def b(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            seen.append((float(t[0]), x))
            return bridge.b(x, float(t[0]))

        fields = Fields(bridge.interpolant, b=b, s=lambda x, t: bridge.s(x, float(t[0])))
        draw = torch.Generator().manual_seed(5)
        end = integrate(fields, source.sample(PATHS, generator=draw), eps, STEPS, "euler", generator=draw)
        return np.array([t for t, _ in seen] + [1.0]), torch.stack([x for _, x in seen] + [end])[..., 0].numpy()

    for one, eps, color in zip(planes, (0.0, EPS), SERIES, strict=False):
        one.contourf(times, places[:, 0], density, levels=[0.02, 2.0], colors=[GRID], alpha=0.5, antialiased=True)
        one.plot(*recorded(eps), color=color, linewidth=1)
        one.grid(visible=False)
        one.set(xlim=(0, 1), ylim=(-5.5, 5.5), xlabel="t", xticks=(0, 0.5, 1))

    def off(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return bridge.b(x, float(t[0])) + ERROR * torch.sin(2 * x)

    wrong = Fields(bridge.interpolant, b=off, s=lambda x, t: bridge.s(x, float(t[0])))
    goal = target.sample(20 * POINTS, generator=torch.Generator().manual_seed(1))
    found = []
    for eps in LEVELS:
        draw = torch.Generator().manual_seed(2)
        x = integrate(wrong, source.sample(POINTS, generator=draw), eps, 80, "euler", generator=draw)
        found.append(wasserstein_1d(x, goal).item())
    errors.plot(LEVELS, found, color=INK, linewidth=2, marker="o", markersize=4)
    name(errors, LEVELS[0], found[0], "ODE", SERIES[0], shift=(8, 0))
    errors.set(xlabel="noise level $\\epsilon$", ylim=(0, 1.1 * max(found)))
    return described(
        figure,
        "Paths from two clusters to three over the density of the bridge between them: those of the ODE do not cross, those "
        "of the SDE wander, and both end in the three clusters. With a drift that is off by 1.5 sin(2 x), the distance of "
        "the samples to the target falls as the noise level grows.",
    )
