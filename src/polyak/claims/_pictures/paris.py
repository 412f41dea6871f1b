"""PaRIS particle Gibbs' picture: the steps that an estimate is made of, and how the bias goes away with the sweeps."""

from __future__ import annotations

from polyak.lab.pictures import INK, MUTED, SERIES, described, name, panels

STEPS, N, SWEEPS, RUNS = 30, 12, 6, 1200
ALPHAS = (0.15, 0.35, 0.6, 0.9)  # by the weight of a step


def picture():
    """What counts at each time, through ancestors and through backward draws; the mean estimate of each sweep, and PaRIS's."""
    import torch

    from polyak.claims.particles import _state_spaces as s
    from polyak.particles.paris import PaRIS, ParisParticleGibbs

    model, draw = s.linear(), torch.Generator().manual_seed(3)
    _, y = model.simulate(STEPS, generator=draw)
    mean = s.kalman().smooth(y[:, None]).means[:, 0]
    exact = s.kalman().smooth(y[:, None]).cross_moments.sum().item()
    figure, (*lines, bias) = panels(
        3, titles=("Through ancestors", "Two backward draws", "Mean of estimates"), height=225
    )
    chain = ParisParticleGibbs(model, s.product, N, sweeps=SWEEPS, burn_in=0, generator=draw)
    for one, backward, color in zip(lines, ("ancestor", "dense"), (SERIES[1], SERIES[0]), strict=True):
        alone = ParisParticleGibbs(model, s.product, N, backward=backward, generator=torch.Generator().manual_seed(5))
        draws: list = []
        with torch.no_grad():
            alone._sweep(list(y), None, draws)
        weight, gap = alone._paris.cloud.W, float("nan")
        lines_of: dict[float, list[tuple[float, float]]] = {alpha: [] for alpha in ALPHAS}
        for t in range(STEPS - 1, 0, -1):
            (past, _), (x, j) = draws[t - 1], draws[t]
            share = (weight / j.shape[1])[:, None].expand(j.shape)
            for i, k in ((i, k) for i in range(N) for k in range(j.shape[1]) if weight[i] > 0.003):
                seen = min(ALPHAS, key=lambda alpha, w=float(share[i, k]): abs(alpha - 0.1 - 1.4 * w**0.6))
                lines_of[seen] += [(t - 1, float(past[j[i, k]])), (t, float(x[i])), (gap, gap)]
            weight = torch.zeros_like(weight).scatter_add(0, j.flatten(), share.flatten())
        for alpha, points in lines_of.items():
            if points:
                one.plot(*zip(*points, strict=True), color=color, linewidth=1, alpha=alpha)
        one.plot(range(STEPS), mean.numpy(), color=INK, linewidth=1, linestyle=(0, (3, 2)))
        one.set_xlabel("time")
    lines[0].sharey(lines[1])
    name(lines[0], 0, lines[0].get_ylim()[0], "dashed: exact mean", MUTED, shift=(0, 8))
    smoother = PaRIS(model, s.product, N, generator=draw)
    s.run(smoother, y.expand(RUNS, STEPS))
    bias.axhline(exact, color=INK, linewidth=1, linestyle=(0, (3, 2)))
    made = smoother.estimate().mean().item()
    bias.axhline(made, color=SERIES[1], linewidth=2)
    sweeps = chain.run(y.expand(RUNS, STEPS)).per_sweep.mean(1)
    bias.plot(range(1, SWEEPS + 1), sweeps.numpy(), color=SERIES[0], linewidth=2, marker="o", markersize=4)
    name(bias, 3.5, made, "PaRIS", SERIES[1], shift=(0, 9))
    name(bias, 3.5, sweeps[2].item(), "PPG", SERIES[0], shift=(0, -12))
    bias.set_xlabel("sweep")
    return described(
        figure,
        "The steps that the final estimate is made of, for twelve particles of a linear Gaussian model. Through the filter's "
        "ancestors it is one path at early times; two backward draws for each particle make a web around the exact mean. The "
        "mean estimate of PaRIS with so few particles is off; that of PaRIS within particle Gibbs comes to the exact value in a "
        "few sweeps.",
    )
