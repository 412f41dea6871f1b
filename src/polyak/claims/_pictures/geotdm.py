"""Geometric trajectory diffusion's picture: bodies that were free, and what may become of them when springs take hold."""

from __future__ import annotations

import itertools
from typing import Any

from polyak.lab.pictures import INK, MUTED, SERIES, described, panels

DRAWN, STEPS = 40, 100


def picture():
    """The prior around a reference trajectory, and samples, of three bodies whose springs are not known."""
    import torch
    from torch import nn

    from polyak.claims.generate import _trajectories as p
    from polyak.generate.geotdm import GeometricTrajectoryDiffusion, simulate_nbody

    # All springs that there may be between three bodies, and how each goes on from the same frames.
    x = torch.tensor([[[-1.4, 0.5, 0.0], [0.1, -1.1, 0.0], [1.4, 0.6, 0.0]]], dtype=torch.float64)
    v = torch.tensor([[[0.2, 0.45, 0.0], [-0.35, -0.2, 0.0], [0.1, -0.4, 0.0]]], dtype=torch.float64)
    seen, *_ = simulate_nbody(
        "springs", 1, 3, 13, save_every=3, dt=0.2, initial=(x, v), edges=torch.zeros(1, 3, 3).double()
    )
    edges = torch.zeros(8, 3, 3)
    for one, held in zip(edges, itertools.product((0, 1), repeat=3), strict=True):
        one[(0, 0, 1), (1, 2, 2)] = one[(1, 2, 2), (0, 0, 1)] = torch.tensor(held).float()
    x = torch.zeros(8, 3, 3, p.FRAMES, dtype=torch.float64)
    x[..., : p.GIVEN] = seen.permute(0, 2, 3, 1)
    known = p.data(x.permute(0, 3, 1, 2), edges, torch.zeros(8, 3), torch.float64)
    futures = p.continued(known)

    class Possible(nn.Module):
        """The exact noise where all futures are as likely. Its reference goes straight on: an affine combination, too."""

        future = p.FRAMES - p.GIVEN

        def reference(self, x_given: Any, *rest: Any) -> Any:
            ahead = torch.arange(1, self.future + 1, dtype=x_given.dtype)
            return x_given[..., -1:] + (x_given[..., -1:] - x_given[..., -2:-1]) * ahead

        def forward(self, x: Any, tau: Any, *rest: Any) -> Any:
            x_r, bar = self.reference(x[..., : p.GIVEN]), model.alphas_bar[tau][:, None, None, None]
            z, clean = x[..., p.GIVEN :] - x_r, bar.sqrt()[:, None] * (futures - x_r[:, None])
            share = (-(z[:, None] - clean).square().sum((2, 3, 4)) / (2 * (1 - bar.flatten()[:, None]))).softmax(1)
            return (z - (share[:, :, None, None, None] * clean).sum(1)) / (1 - bar).sqrt()

    model = GeometricTrajectoryDiffusion(Possible(), STEPS)
    given, h = known.given[:1], known.h[:1]
    x_r = model.prior(given, h)[0]
    generator = torch.Generator().manual_seed(3)
    start = x_r + torch.randn(DRAWN // 8, *x_r.shape, dtype=torch.float64, generator=generator)
    made = model.sample(h, x_given=given, num_samples=DRAWN, generator=generator)[:, 0]

    figure, axes = panels(2, titles=("The prior, around a reference", "Samples"), height=265, square=True, frame=False)
    for axis, drawn, width in zip(axes, (start, made), (0.5, 1.2), strict=True):
        for body, color in enumerate(SERIES[:3]):
            for path in drawn[:, body]:
                line = torch.cat([given[0, body, :, -1:], path], 1)
                axis.plot(*line[:2].numpy(), color=color, linewidth=width, alpha=0.5)
            axis.plot(*given[0, body, :2].numpy(), color=INK, linewidth=2, marker="o", markersize=3.5)
    for body in range(3):
        line = torch.cat([given[0, body, :, -1:], x_r[body]], 1)
        axes[0].plot(*line[:2].numpy(), color=INK, linewidth=1.2, linestyle=(0, (3, 2)))
        axes[1].plot(
            *futures[:, body, :2, -1].T.numpy(), linestyle="", marker="o", markersize=5, color=INK, fillstyle="none"
        )
    axes[0].set_xlabel("black: given; dashed: the reference", color=MUTED)
    axes[1].set_xlabel("circles: where all possible springs lead", color=MUTED)
    return described(
        figure,
        "Three bodies that moved freely in the four given frames. Any of three springs may now take hold: eight futures are "
        "possible. Sampling starts from noise around a reference trajectory, which goes straight on, and ends on these futures.",
    )
