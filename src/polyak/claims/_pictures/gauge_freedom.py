"""Gauge freedom's picture: two fields, one law, and what each says of the data's dimensions."""

from __future__ import annotations

from polyak.lab.pictures import GRID, INK, MUTED, SERIES, described, log, name, panels

PATHS, STEPS, KAPPA = 12, 90, 3.0  # every third step is drawn


def picture():
    """Paths of the ODE with the score and with a gauge added; singular values of scores near a plane."""
    import torch

    from polyak.claims.generate import _gauge
    from polyak.generate import RK4, Denoiser, antisymmetric_gauge, intrinsic_dimension, matrix_gauge, sample
    from polyak.generate.problems import ExactDenoiser, Gaussian, Recorder

    titles = ("The score", "Score and gauge", "Scores near a plane")
    figure, (*planes, values) = panels(3, titles=titles, height=225)
    model = ExactDenoiser(_gauge.law("mixture"), _gauge.EXACT)
    draw = torch.Generator().manual_seed(4)
    start = model.law.sample(90, sigma=3.0, generator=draw)
    for one, kappa, color in zip(planes, (0.0, KAPPA), SERIES[:2], strict=True):
        field = antisymmetric_gauge(model, _gauge.TURN, kappa)
        record = Recorder()
        times = _gauge.EXACT.grid(STEPS, "logsnr", start=3.0)
        denoiser = Denoiser(field, _gauge.EXACT, "score", label=lambda t: t)
        ends = sample(denoiser, start, solver=RK4(), grid=times, callback=record)
        paths = torch.stack([start, *record.states])[::3, :PATHS].numpy()
        one.plot(*ends.numpy().T, ".", color=GRID, markersize=5)
        for k in range(PATHS):
            one.plot(*paths[:, k].T, color=color, linewidth=1)
        one.plot(*paths[-1].T, "o", markersize=3.5, color=INK)
        one.grid(visible=False)
        one.set(aspect="equal", xlim=(-5, 5), ylim=(-5, 5), xticks=range(-4, 5, 4), yticks=range(-4, 5, 4))
    name(planes[0], -4.7, 4.5, "grey: samples", MUTED, shift=(0, 0))
    true, turn = ExactDenoiser(Gaussian([0.0] * 5, [1.0, 1.0, 0.0, 0.0, 0.0]), _gauge.PLANE), torch.zeros(5, 5).double()
    turn[0, 4], turn[4, 0] = 1, -1
    x = torch.tensor([[0.16, 0.12, 0.0, 0.0, 0.0]], dtype=torch.float64)
    for kappa, color, dash, text, shift in (
        (0.0, SERIES[0], "-", "score", (-8, -4)),
        (1.0, SERIES[1], (0, (3, 1)), "gauge", (8, 8)),
    ):
        field = matrix_gauge(true, lambda x, t, kappa=kappa: torch.cos(x[:, 2] / t)[:, None, None] * turn * kappa)
        denoiser = Denoiser(field, _gauge.PLANE, "score", label=lambda t: t)
        found = intrinsic_dimension(
            denoiser, _gauge.PLANE, x, "score", sigma_lo=0.05, points=500, generator=draw.manual_seed(1)
        )
        sizes = found.singular_values[0].tolist()
        values.plot(range(1, 6), sizes, color=color, linewidth=2, linestyle=dash, marker="o", markersize=4)
        name(values, 4, sizes[3], text, color, shift=shift)
    log(values, y=True)
    values.set(xticks=range(1, 6), xlabel="singular value")
    return described(
        figure,
        "Left: paths from noise to samples of a mixture of three normal laws, nearly straight. Middle: a gauge three times "
        "as large as the score is added; the paths wind, and the samples are distributed as before. Right: singular values "
        "of the scores at 500 points near a plane of two dimensions in five. Of the score three are large, as many as "
        "directions leave the plane; with a gauge a fourth is.",
    )
