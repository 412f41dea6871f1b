"""K potentials, each a small network, and walks along their gradients."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from polyak.core import checks
from polyak.generate.potential_flows.wave import LAPLACIAN, Laplacian, gradient, one_number
from polyak.generate.process.path import TIME, one_for_each_row

LATENTS = checks.Tensor(floating=True, ndim=2)
INDEX = checks.Integer(0)


class Potential(nn.Module):
    """``u(z, t) = tanh(w . tanh(W3 (tanh(W1 z) + e(t))))`` and biases, with e(t) two layers on sines and cosines of t.

    Args:
        dim: d, of z and of all layers. An odd one has a zero beside the sines and cosines.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.latent, self.fusion = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.time = nn.Sequential(nn.Linear(dim, dim), nn.GELU(), nn.Linear(dim, dim))
        self.out = nn.Linear(dim, 1)

    def forward(self, z: Tensor, t: Tensor) -> Tensor:
        """u, (B,), at z (B, d) and t, one or (B,)."""
        half = z.shape[-1] // 2
        places = torch.arange(half, dtype=z.dtype, device=z.device)
        angle = t[..., None] * torch.exp(places * (-math.log(10_000) / max(half - 1, 1)))
        waves = F.pad(torch.cat([angle.sin(), angle.cos()], -1), (0, z.shape[-1] % 2))
        h = torch.tanh(self.fusion(torch.tanh(self.latent(z)) + self.time(waves)))
        return torch.tanh(self.out(h))[:, 0]


class PotentialFlow(nn.Module):
    """K potentials ``u_k(z, t)`` of latents z, the speeds c_k of their waves, and walks along their gradients (section 3).

    ``potentials`` is an ``nn.ModuleList``: a module ``(z, t) -> (B,)`` of your own may take the place of any.

    Args:
        dim: d, of a latent.
        k: K, how many potentials: two at least, since they are to be told apart.
        steps: T, of a whole walk: times are in [0, T). Training walks the first T // 2 of them.
        laplacian: what :func:`potential_flow_loss` takes for the Laplacian, as in :func:`wave_residual`. "trace" costs d products
            with the Hessian; "hutchinson" is for d beyond some 64; "official" is the published code's.
        c_init: what the speeds are at first; they are learned.
    """

    @checks.arguments(
        dim=checks.Integer(2, 1_000_000), k=checks.Integer(2, 1_000_000), steps=checks.Integer(4, 1_000_000),
        laplacian=LAPLACIAN, c_init=checks.Number(0, 1e6),
    )  # fmt: skip
    def __init__(
        self, dim: int, k: int = 16, steps: int = 10, laplacian: Laplacian = "trace", c_init: float = 1.0
    ) -> None:
        super().__init__()
        self.dim, self.k, self.steps, self.laplacian = dim, k, steps, laplacian
        self.potentials = nn.ModuleList(Potential(dim) for _ in range(k))
        self.c = nn.Parameter(torch.full((k,), float(c_init)))

    @property
    def half(self) -> int:
        """How many steps a walk has in training, ``steps // 2``."""
        return self.steps // 2

    @checks.arguments(k=INDEX, z=LATENTS, t=TIME)
    def potential(self, k: int, z: Tensor, t: float | Tensor) -> Tensor:
        """``u_k(z, t)``, (B,), at latents z (B, d) and a time t in [0, steps), one or (B,)."""
        self.check(k, z)
        return one_number(self.potentials[k](z, self._time(t, z)), z)

    @checks.arguments(k=INDEX, z=LATENTS, t=TIME)
    def velocity(self, k: int, z: Tensor, t: float | Tensor) -> Tensor:
        """``grad_z u_k(z, t)``, (B, d): a step of the walk. Free of curl. Arguments as for :meth:`potential`."""
        self.check(k, z)
        return gradient(self.potentials[k], self._time(t, z))(z)

    @checks.arguments(z=LATENTS, k=INDEX, steps=checks.Integer(0) | None, direction=checks.Choice(1, -1))
    def traverse(self, z: Tensor, k: int, steps: int | None = None, direction: int = 1) -> Tensor:
        """The walk ``z_{t+1} = z_t + grad u_k(z_t, t)`` from z (B, d) on: (steps + 1, B, d), z itself first.

        Args:
            steps: how many, at most T; by default the T // 2 that are trained.
            direction: -1 for the mirror image of the walk in z, ``2 z - z_t``.

        Raises:
            ValueError: z is not finite (looked at on the CPU); more steps than there are times.
        """
        self.check(k, z)
        steps = self.half if steps is None else steps
        if steps > self.steps:
            raise ValueError(f"steps must be at most {self.steps}, the flow's own, got {steps}")
        path = self.walk(k, z, steps)[0]
        return path if direction == 1 else 2 * z - path

    def walk(self, k: int, z: Tensor, steps: int) -> tuple[Tensor, list[Tensor]]:
        """The path, (steps + 1, B, d), and the gradients along it, for k and z that :meth:`check` has seen."""
        if z.device.type == "cpu" and not bool(z.isfinite().all()):
            raise ValueError("z must be finite, got NaN or infinity in it")
        path, slopes = [z], []
        for t in range(steps):
            slopes.append(gradient(self.potentials[k], z.new_tensor(t))(path[-1]))
            path.append(path[-1] + slopes[-1])
        return torch.stack(path), slopes

    def check(self, k: int, z: Tensor) -> None:
        """ValueError unless there is a potential k, and z has the flow's shape, type and device."""
        if k >= self.k:
            raise ValueError(f"k must be below {self.k}, the number of potentials, got {k}")
        if z.shape[1] != self.dim:
            raise ValueError(f"z must have shape (B, {self.dim}), got {tuple(z.shape)}")
        if z.dtype != self.c.dtype or z.device != self.c.device:
            raise ValueError(f"z must be {self.c.dtype} on {self.c.device} like the flow, got {z.dtype} on {z.device}")

    def _time(self, t: Any, z: Tensor) -> Tensor:
        one_for_each_row(t, z)
        # A tensor elsewhere is not looked at: it would wait for the device.
        if not isinstance(t, Tensor) or (t.device.type == "cpu" and t.numel()):
            low, high = (float(t.min()), float(t.max())) if isinstance(t, Tensor) else (t, t)
            if not (low >= 0 and high < self.steps):
                raise ValueError(f"t must be in [0, {self.steps}), got {low if low < 0 else high:g}")
        return torch.as_tensor(t, dtype=z.dtype, device=z.device)
