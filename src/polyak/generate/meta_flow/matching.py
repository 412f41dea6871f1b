"""Meta flow matching: the loss that trains an encoder and a velocity, and the transport of new populations."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from polyak.core import checks
from polyak.core.integrators import EULER, RK4, dopri5, runge_kutta
from polyak.generate.meta_flow.distances import assignment
from polyak.generate.meta_flow.populations import mean_of, population

_TOLERANCE = 1e-4


class MetaFlowMatching(nn.Module):
    """An encoder of populations and a velocity, the loss that trains both, and the transport of a new population.

    Args:
        encoder: a module ``(x, mask, features) -> e`` such as :class:`PopulationEncoder`.
        velocity: a module ``(t, x, e) -> v`` such as :class:`MetaVelocity`; a condition is given as fourth where there is one.
        coupling: which x1 goes with an x0. "paired": the one at its place. "independent": any of its population's. "ot": that
            of the optimal transport of all x0 to as many x1 (exact, by SciPy on the CPU). The latter two take populations
            whose numbers of points before and after differ: of more the rest is left out, of fewer some are used again.
        base: where paths start, at x0 ("source") or at noise ("gaussian"); the embedding is of x0 in both cases.
        alternate: train as the official code does: one call of :meth:`loss` for the velocity, with embeddings that are
            remembered, then one for the encoder, and so on. A remembered embedding is as old as the last call for the encoder that
            its population was in. All of it is in the ``state_dict``.
        center: take the mean of the embedded population off before everything, and put it back in the end: what is learned
            moves with the data.

    Example:
        >>> meta = MetaFlowMatching(PopulationEncoder(dim=2, k=10), MetaVelocity(dim=2, embed=64))
        >>> optimizer = torch.optim.Adam(meta.parameters(), 1e-4)
        >>> meta.loss(x0, x1, generator=generator).backward()
    """

    @checks.arguments(
        encoder=checks.module, velocity=checks.module, coupling=checks.Choice("paired", "independent", "ot"),
        base=checks.Choice("source", "gaussian"), alternate=checks.flag, center=checks.flag,
    )  # fmt: skip
    def __init__(
        self,
        encoder: nn.Module,
        velocity: nn.Module,
        coupling: str = "paired",
        base: str = "source",
        alternate: bool = False,
        *,
        center: bool = False,
    ) -> None:
        super().__init__()
        self.encoder, self.velocity = encoder, velocity
        self.coupling, self.base, self.alternate, self.center = coupling, base, alternate, center
        self._calls = 0  # of the loss, while training alternately
        self._known: dict[int, Tensor] = {}  # the remembered embedding of each population, by its index

    def loss(
        self,
        x0: Tensor,
        x1: Tensor,
        mask0: Tensor | None = None,
        mask1: Tensor | None = None,
        cond: Tensor | None = None,
        features: Tensor | None = None,
        index: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """``|v - (x1 - x0)|^2``, the mean over a population's points and then over populations: a scalar.

        Args:
            x0, x1: points before and after, [P, N, D] and [P, M, D], with masks.
            cond: of the populations, [P, C].
            features: of the points before, for the encoder, [P, N, F].
            index: which populations these are, integers [P]: what embeddings are remembered by (``alternate=True``).
            generator: of times, noise and pairs, on x0's device.
        """
        x0, points = population("x0", x0, mask0)
        x1, after = population("x1", x1, mask1, x0.shape[2])
        if not len(x0) or len(x1) != len(x0):
            raise ValueError(f"x0 and x1 must have the same populations, one or more, got {len(x0)} and {len(x1)}")
        if self.coupling == "paired" and (x0.shape != x1.shape or not (mask0 is mask1 or torch.equal(points, after))):
            raise ValueError(
                f'x0 and x1 must have the same points with coupling="paired", got {_count(points)} and {_count(after)}'
            )
        keys = _keys(index, len(x0), needed=self.alternate and self.training)
        if self.center:
            shift = mean_of(x0, points)
            x0, x1 = x0 - shift, x1 - shift
        e, velocity = self._parts(x0, mask0, features, keys)
        if self.base == "gaussian":
            start = torch.randn(x0.shape, dtype=x0.dtype, device=x0.device, generator=generator)
        else:
            start = x0
        end = self._partners(start, x1, points, after, generator)
        t = torch.rand(points.shape, dtype=x0.dtype, device=x0.device, generator=generator)
        u = end - start
        v = velocity(t, start + t[..., None] * u, e, *_given(cond))
        error = torch.where(points, (v - u).square().sum(-1), 0).sum(1) / points.sum(1)
        if self.alternate and self.training:
            self._known.update(zip(keys, e.detach(), strict=True))
            self._calls += 1
        return error.mean()

    def _parts(self, x0: Tensor, mask: Tensor | None, features: Tensor | None, keys: list[int]) -> tuple[Tensor, Any]:
        """The embeddings, and the velocity: both with gradients, or one of them when they alternate."""
        if not (self.alternate and self.training):
            return self.encoder(x0, mask, features), self.velocity
        if self._calls % 2:
            fixed = {name: weight.detach() for name, weight in self.velocity.named_parameters()}
            return self.encoder(x0, mask, features), lambda *at: functional_call(self.velocity, fixed, at)
        known = dict(self._known)
        if new := [i for i, key in enumerate(keys) if key not in known]:
            with torch.no_grad():
                found = self.encoder(x0[new], *(None if a is None else a[new] for a in (mask, features)))
            known.update(zip([keys[i] for i in new], found, strict=True))
        return torch.stack([known[key] for key in keys]).to(x0), self.velocity

    def _partners(self, x0: Tensor, x1: Tensor, points: Tensor, after: Tensor, generator: Any) -> Tensor:
        """An x1 for every x0, [P, N, D]."""
        if self.coupling == "paired":
            return x1
        draw = torch.rand(after.shape, device=x0.device, generator=generator).masked_fill(~after, 2.0).argsort(1)
        turn = (points.cumsum(1) - 1).clamp(min=0) % after.sum(1, keepdim=True)
        x1 = _rows(x1, draw.gather(1, turn))
        if self.coupling == "independent":
            return x1
        order = torch.arange(x0.shape[1]).repeat(len(x0), 1)
        for i, (cost, real) in enumerate(
            zip(torch.cdist(x0.double(), x1.double()).square().cpu(), points.cpu(), strict=True)
        ):
            rows = real.nonzero()[:, 0]
            order[i, rows] = rows[assignment(cost[rows][:, rows])]
        return _rows(x1, order.to(x1.device))

    @checks.arguments(
        x0=checks.floating, mask=checks.tensor | None, cond=checks.tensor | None,
        solver=checks.Choice("dopri5", "euler", "rk4"), steps=checks.Integer(1, 1_000_000), return_path=checks.flag,
        features=checks.tensor | None, context=checks.floating | None, generator=checks.generator | None,
    )  # fmt: skip
    @torch.no_grad()
    def transport(
        self,
        x0: Tensor,
        mask: Tensor | None = None,
        cond: Tensor | None = None,
        solver: str = "dopri5",
        steps: int = 100,
        return_path: bool = False,
        *,
        features: Tensor | None = None,
        context: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Where the points x0, [P, N, D], of populations are at t = 1: without gradients; what is padded stays as it is.

        Args:
            x0, mask, cond: as for :meth:`loss`.
            solver: "dopri5" keeps the error of a step below 1e-4 (1 + \\|x\\|); "euler" and "rk4" take ``steps`` equal ones.
            steps: how many; of "dopri5" the times of a path only.
            return_path: the states at steps + 1 equidistant times, [steps + 1, P, N, D].
            features: of the points that are embedded, [P, N, F].
            context: the points that are embedded, [P, M, D], all of them: by default x0's. It is for moving a part of a
                population, and is embedded once.
            generator: of the noise (``base="gaussian"``), on x0's device.
        """
        given, kind = x0, x0.dtype
        x0, points = population("x0", x0, mask)
        whole, its_mask, its_points = x0, mask, points
        if context is not None:
            its_mask = None
            whole, its_points = population("context", context, None, x0.shape[2])
            if len(whole) != len(x0):
                raise ValueError(f"context must have as many populations as x0, {len(x0)}, got {len(whole)}")
        shift = mean_of(whole, its_points) if self.center else torch.zeros_like(x0[:, :1])
        e = self.encoder(whole - shift, its_mask, features)
        wide = torch.float32 if kind in (torch.float16, torch.bfloat16) else kind
        if self.base == "gaussian":
            x = torch.randn(x0.shape, dtype=kind, device=x0.device, generator=generator)
        else:
            x = x0 - shift

        def field(x: Tensor, t: float) -> Tensor:
            v = self.velocity(x.new_full((), t, dtype=kind), x.to(kind), e, *_given(cond))
            return torch.where(points[..., None], v, 0).to(wide)

        times = [i / steps for i in range(steps + 1)]
        if solver == "dopri5":
            tolerance = max(_TOLERANCE, torch.finfo(kind).eps)
            path = dopri5(field, x.to(wide), times if return_path else (0.0, 1.0), rtol=tolerance, atol=tolerance)
        else:
            states = [x.to(wide)]
            for t in times[:-1]:
                new = runge_kutta(RK4 if solver == "rk4" else EULER, field, states[-1], t, 1 / steps)
                states = [*states, new] if return_path else [new]
            path = torch.stack(states)
        path = torch.where(points[..., None], (path + shift).to(kind), given)
        return path if return_path else path[-1]

    def get_extra_state(self) -> dict[str, Any]:
        keys = list(self._known)
        kept = {"index": torch.tensor(keys), "embedding": torch.stack([self._known[k] for k in keys])} if keys else {}
        return {"calls": self._calls, **kept}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        self._calls = state["calls"]
        self._known = dict(zip(state["index"].tolist(), state["embedding"], strict=True)) if "index" in state else {}


def _keys(index: Tensor | None, count: int, needed: bool) -> list[int]:
    if index is None:
        if needed:
            raise ValueError("index must say which populations these are, with alternate=True, got None")
        return []
    whole = isinstance(index, Tensor) and not (
        index.is_floating_point() or index.is_complex() or index.dtype == torch.bool
    )
    if not whole or index.shape != (count,):
        raise ValueError(
            f"index must be a tensor of {count} integers, one for each population, got {checks.shown(index)}"
        )
    return index.tolist() if needed else []


def _rows(x: Tensor, index: Tensor) -> Tensor:
    return x.gather(1, index[..., None].expand(-1, -1, x.shape[2]))


def _given(cond: Tensor | None) -> tuple[Tensor, ...]:
    return () if cond is None else (cond,)


def _count(points: Tensor) -> list[int]:
    return points.sum(1).tolist()
