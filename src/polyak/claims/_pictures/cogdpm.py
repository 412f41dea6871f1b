"""CogDPM's picture: a field that is advected, a forecast of it, and where the forecast is guided."""

from __future__ import annotations

from typing import Any

from polyak.lab.pictures import INK, MUTED, SERIES, described, panels

STEPS, MEMBERS = 18, 16
SEED = 21  # of a field whose upper half is warm, and whose lower half is not
LEADS = (0, 1, 3)
ROWS = ("came", "forecast", "weight W")


def picture():
    """Frames ahead of one context: what came, one member, and the weights, by the exact denoiser of the advection."""
    import torch

    from polyak.claims.generate import _advection as a
    from polyak.generate import EDM, Euler, PrecisionGuidance, ensemble_forecast
    from polyak.generate.cogdpm import PrecisionState

    draw = torch.Generator().manual_seed(SEED)
    frames, warm, wind = (v[0] for v in a.advected(1, draw))
    process = EDM(sigma_min=0.02, sigma_max=20.0)
    denoiser = a.exact(frames[a.PAST - 1], warm, wind, process)
    guidance = PrecisionGuidance(0.5)
    made = ensemble_forecast(
        lambda context: denoiser, frames[None, : a.PAST], solver=Euler(), steps=STEPS, grid="karras", members=MEMBERS,
        guidance=guidance, generator=draw,
    )  # fmt: skip
    weights = guidance.weight(PrecisionState(count=2, mean=made.uncertainty, m2=2 * made.uncertainty))
    assert weights is not None
    titles = ["1 frame ahead", "2 frames ahead", "4 frames ahead"] + [""] * 6
    figure, axes = panels(9, rows=3, titles=titles, height=420, frame=False, square=True)
    for i, one in enumerate(axes):
        row, frame = i // 3, LEADS[i % 3]
        if row < 2:
            shown = frames[a.PAST + frame] if row == 0 else made.samples[0, 0, frame]
            _filled(one, shown, (0.2, 0.6, 1.0), SERIES[1])
            _filled(one, -shown, (0.2, 0.6, 1.0), SERIES[0])
        else:
            _filled(one, weights[0, frame], (0.1, 0.3, 0.5, 0.7), INK)
        one.axhline(a.BAND - 0.5, color=MUTED, linewidth=0.7, linestyle=(0, (3, 2)))
        one.set(xlim=(0, a.SIZE - 1), ylim=(a.SIZE - 1, 0))
        if frame == 0:
            one.set_ylabel(ROWS[row], color=INK)
    return described(
        figure,
        "One, two and four frames ahead of a field that two winds carry along. The wind of the lower half stays; that of the upper "
        "half may jump, and nobody knows by how much. Above: what came. Middle: one member of the forecast, which is right in the "
        "lower half and displaced in the upper one. Below: the weights of the guidance, dark where they are large. There are none "
        "where the forecast is sure; they grow with the lead, and are largest at the flanks of the upper pattern.",
    )


def _filled(axes: Any, field: Any, levels: tuple[float, ...], color: str) -> None:
    """Shades: one more layer for each level that is passed."""
    for level in levels:
        if field.max() > level:
            axes.contourf(field.numpy(), levels=[level, 1e6], colors=[color], alpha=0.28)
