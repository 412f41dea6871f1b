"""GHVB's picture: regions of stability, where eight guided steps end, and errors at several numbers of steps."""

from __future__ import annotations

from typing import Any

from polyak.lab.pictures import INK, MUTED, SERIES, described, log, name, panels

STEPS, SHOWN, DRAWN = (6, 8, 10, 14, 20), 8, 45
GUIDANCE = 7.5
INSIDE = 0.12  # how far left of 0 the regions are seen from


def picture():
    """PLMS4, and with momentum HB and GHVB: stability, guided samples, and their error."""
    import torch

    from polyak.generate import CFG, GHVB, VP, DPMSolver, HeavyBall, sample, stability_region
    from polyak.generate.problems import ExactDenoiser, path_rmse, ring

    law, process = ring(), VP()
    denoiser = ExactDenoiser(law.of_class(0), process, unconditional=law)
    noise = torch.randn(DRAWN, 2, generator=torch.Generator().manual_seed(103), dtype=torch.float64)
    exact = sample(denoiser, noise, solver=DPMSolver(method="singlestep"), nfe=150, guidance=CFG(GUIDANCE))
    titles = ("Stable steps", f"{SHOWN} steps, guidance {GUIDANCE}", "Error of the ends")
    figure, (plane, ends, errors) = panels(3, titles=titles, height=225)
    kinds: tuple[tuple[str, str, float, Any, str, str], ...] = (
        ("PLMS4", "hb", 1.0, HeavyBall(4, 1.0), SERIES[1], "s"),
        ("GHVB", "ghvb", 0.8, GHVB(4, 0.8), SERIES[0], "o"),
        ("HB", "hb", 0.8, HeavyBall(4, 0.8), SERIES[2], "^"),
    )
    turn = torch.linspace(0, 2 * torch.pi, 73, dtype=torch.float64)
    for i, (label, method, beta, solver, color, marker) in enumerate(kinds):
        # The region is seen whole from a point inside it.
        near, far = torch.zeros_like(turn), torch.ones_like(turn)
        for _ in range(11):
            middle = (near + far) / 2
            inside = stability_region(method, 4, beta, torch.polar(middle, turn) - INSIDE)  # type: ignore[arg-type]
            near, far = torch.where(inside, middle, near), torch.where(inside, far, middle)
        edge = torch.polar(near, turn) - INSIDE
        plane.plot(edge.real.numpy(), edge.imag.numpy(), color=color, linewidth=2)
        made = sample(denoiser, noise, solver=solver, steps=SHOWN, grid="time", guidance=CFG(GUIDANCE))
        ends.plot(*made.T.numpy(), linestyle="none", marker=marker, markersize=3, color=color, alpha=0.7)
        error = [
            path_rmse(sample(denoiser, noise, solver=solver, steps=n, grid="time", guidance=CFG(GUIDANCE)), exact)
            for n in STEPS
        ]
        errors.plot(STEPS, error, color=color, linewidth=2, marker=marker, markersize=4)
        name(ends, 2.6, -9 - 3.2 * i, label, color, shift=(0, 0))
    name(ends, 2.6, 6, "exact", INK, shift=(0, 0))
    ends.plot(*exact.T.numpy(), linestyle="none", marker=".", markersize=3, color=INK)
    plane.axvline(0, color=MUTED, linewidth=0.8)
    plane.set(xlim=(-0.5, 0.12), xticks=(-0.4, -0.2, 0), yticks=(-0.4, 0, 0.4), xlabel="real part of z")
    errors.set_xlabel("steps")
    log(errors, x=True, y=True)
    return described(
        figure,
        "Where in the plane steps of three methods are stable: GHVB's region holds that of PLMS4, and HB's reaches further left, "
        "but not up to the imaginary axis. Ends of 45 guided paths with eight steps: PLMS4's are strewn far from the exact ones, "
        "GHVB's less far, and HB's are among them. Errors over the number of steps: below 14 HB's is the smallest; above, GHVB's "
        "is PLMS4's, and HB's is larger.",
    )
