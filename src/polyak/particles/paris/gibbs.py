"""Particle Gibbs: chains of paths, each drawn by a particle filter that is given the last one."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from polyak.core import checks
from polyak.particles.paris.backward import categorical
from polyak.particles.paris.filtering import Filter, observation
from polyak.particles.paris.functional import FUNCTIONAL
from polyak.particles.paris.models import MODEL
from polyak.particles.paris.smoothing import DRAWS, ENGINE, PaRIS


@checks.arguments(estimate=checks.tensor, path=checks.tensor, per_sweep=checks.tensor)
class Smoothed(NamedTuple):
    """What :meth:`ParisParticleGibbs.run` returns.

    Attributes:
        estimate: (*batch, *event), the mean over the sweeps after the burn-in.
        path: (*batch, T, *state_shape), the last one: a draw from the smoothing law but for what is left of the start.
        per_sweep: (sweeps, *batch, *event).
    """

    estimate: Tensor
    path: Tensor
    per_sweep: Tensor


class ParisParticleGibbs:
    """Parisian particle Gibbs: PaRIS within a conditional particle filter, swept again and again (arXiv 2301.00900).

    In a sweep slot 0 is set to the last path at every time; the other N - 1 particles draw their ancestors from all N. Every
    slot's statistic is updated as in :class:`PaRIS`, that of slot 0 among them, and each particle's path goes on from its first
    backward draw. In the end a path is drawn by the weights, for the next sweep. The chain of paths leaves the smoothing law
    invariant for any N >= 2, and a sweep's estimate ``sum_i W^i tau^i`` is unbiased once the chain is stationary. So the bias of

        (k - k0)^{-1} sum_{s = k0 + 1}^{k} (sum_i W^i tau^i)_s

    after k sweeps falls geometrically with the burn-in k0, not like 1 / N. Take N in proportion to the series' length.

    Args:
        model, functional, m, backward, generator: as for :class:`PaRIS`.
        n: particles, N, the given one among them.
        sweeps: k.
        burn_in: k0, below k; None for a quarter of k. With a start that is stationary 0 will do.

    Raises:
        ValueError: as :class:`PaRIS`; ``burn_in >= sweeps``; a path of another shape, or one that the model cannot have.

    Example:
        >>> smoother = ParisParticleGibbs(model, lambda x, x_next, t: x * x_next, n=32)
        >>> estimate, path, per_sweep = smoother.run(y)
    """

    @checks.arguments(
        model=MODEL, functional=FUNCTIONAL, n=checks.Integer(2, 2**40), m=DRAWS, sweeps=checks.Integer(1, 2**40),
        burn_in=checks.Integer(0) | None, backward=ENGINE, generator=checks.generator | None,
    )  # fmt: skip
    def __init__(
        self,
        model: Any,
        functional: Any,
        n: int = 64,
        m: int | float = 2,
        sweeps: int = 16,
        burn_in: int | None = None,
        backward: str = "dense",
        generator: torch.Generator | None = None,
    ) -> None:
        burn_in = sweeps // 4 if burn_in is None else burn_in
        if burn_in >= sweeps:
            raise ValueError(f"burn_in must be below sweeps, or no sweep is left to average, got {burn_in} of {sweeps}")
        self.model, self.sweeps, self.burn_in = model, sweeps, burn_in
        self._paris = PaRIS(model, functional, n, m, backward, generator=generator)

    @torch.no_grad()
    def run(self, y: Tensor, path: Tensor | None = None) -> Smoothed:
        """Sweep over the series y, (*batch, T, *observation_shape).

        Args:
            path: (*batch, T, *state_shape) to start from; default: one that a PaRIS sweep draws.
        """
        times = series(y, self.model)
        path = self._sweep(times, None) if path is None else given(path, times, self.model)
        estimates = []
        for _ in range(self.sweeps):
            path = self._sweep(times, path)
            estimates.append(self._paris._mean())
        self._paris._filter.watch.look()
        per_sweep = torch.stack(estimates)
        return Smoothed(per_sweep[self.burn_in :].mean(0), path, per_sweep)

    def _sweep(
        self, times: list[Tensor], path: Tensor | None, draws: list[tuple[Tensor, Tensor | None]] | None = None
    ) -> Tensor:
        """One pass over the series, conditional on a path unless that is None. Returns the path that is drawn.

        ``draws`` is given the particles of each time with their backward draws, of which the first have none.
        """
        paris = self._paris
        dim = times[0].ndim - len(self.model.observation_shape)
        frozen = [None] * len(times) if path is None else path.unbind(dim)
        paris._begin(times[0], frozen[0])
        states, parents = [paris.cloud.x], []
        if draws is not None:
            draws.append((paris.cloud.x, None))
        for y, slot in zip(times[1:], frozen[1:], strict=True):
            j = paris._advance(y, slot, traced=True)
            assert j is not None
            states.append(paris.cloud.x)
            parents.append(j[..., 0])
            if draws is not None:
                draws.append((paris.cloud.x, j))
        return traced(states, parents, paris.cloud.logw, paris.generator)


@checks.arguments(
    model=MODEL, y=checks.tensor, kind=checks.Choice("ancestor", "backward", "pgas"), n=checks.Integer(2, 2**40),
    sweeps=checks.Integer(1, 2**40), path=checks.floating | None, generator=checks.generator | None,
)  # fmt: skip
@torch.no_grad()
def particle_gibbs(
    model: Any,
    y: Tensor,
    kind: str = "ancestor",
    *,
    n: int = 64,
    sweeps: int = 16,
    path: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Plain particle Gibbs: the paths of all sweeps, (sweeps, *batch, T, *state_shape), each drawn by a conditional filter.

    Args:
        model, y, path, generator: as for :class:`ParisParticleGibbs`.
        kind: how a sweep draws its path: "ancestor", back through the ancestors (Andrieu, Doucet and Holenstein, 2010), which at
            early times hardly ever leaves the given path where T is large against N; "backward", by backward draws (Whiteley,
            2010); "pgas", through the ancestors, where that of the given path is drawn anew at each time (Lindsten, Jordan and
            Schon, 2014).
        n: particles, the given one among them.
        sweeps: how many paths.

    Raises:
        ValueError: as :class:`ParisParticleGibbs`.
    """
    times = series(y, model)
    filtered = Filter(model, n, "multinomial", 1.0, generator)
    path = _gibbs_sweep(filtered, times, None, kind) if path is None else given(path, times, model)
    return torch.stack([path := _gibbs_sweep(filtered, times, path, kind) for _ in range(sweeps)])


def _gibbs_sweep(filtered: Filter, times: list[Tensor], path: Tensor | None, kind: str) -> Tensor:
    model, generator = filtered.model, filtered.generator
    dim = times[0].ndim - len(model.observation_shape)
    frozen = [None] * len(times) if path is None else path.unbind(dim)
    filtered.begin(times[0], frozen[0])
    states, weights, parents = [filtered.cloud.x], [filtered.cloud.logw], []
    for t, (y, slot) in enumerate(zip(times[1:], frozen[1:], strict=True)):
        before, ancestors = filtered.move(y, slot)
        if kind == "pgas" and slot is not None:
            own = _from(model, before.x, before.logw, slot, t, filtered, y, generator)
            ancestors = torch.cat([own.unsqueeze(-1), ancestors[..., 1:]], -1)
        states.append(filtered.cloud.x)
        weights.append(filtered.cloud.logw)
        parents.append(ancestors)
    if kind != "backward":
        made = traced(states, parents, filtered.cloud.logw, generator)
    else:
        at = categorical(filtered.cloud.logw, 1, generator)[0]
        steps = [_at(states[-1], at, dim)]
        for t in range(len(states) - 2, -1, -1):
            own = _from(model, states[t], weights[t], steps[-1], t, filtered, times[t], generator)
            steps.append(_at(states[t], own.unsqueeze(-1), dim))
        made = torch.stack(steps[::-1], dim)
    filtered.watch.look()
    return made


def _from(
    model: Any,
    x: Tensor,
    logw: Tensor,
    x_next: Tensor,
    t: int,
    filtered: Filter,
    y: Tensor,
    generator: torch.Generator | None,
) -> Tensor:
    """A backward draw for one particle of each system, (*batch)."""
    logits = logw + model.log_transition(x, x_next.unsqueeze(logw.ndim - 1), t).to(logw.dtype)
    j, undefined = categorical(logits, 1, generator)
    filtered.watch.note("undefined", undefined, t, y)
    return j[..., 0]


def traced(states: list[Tensor], parents: list[Tensor], logw: Tensor, generator: torch.Generator | None) -> Tensor:
    """A path (*batch, T, *state_shape) that ends in a particle drawn by its weight, back through the parents of each time."""
    dim = logw.ndim - 1
    at = categorical(logw, 1, generator)[0]
    steps = [_at(states[-1], at, dim)]
    for x, parent in zip(states[-2::-1], parents[::-1], strict=True):
        at = parent.gather(-1, at)
        steps.append(_at(x, at, dim))
    return torch.stack(steps[::-1], dim)


def _at(x: Tensor, at: Tensor, dim: int) -> Tensor:
    """x (*batch, N, *event) at one particle of each system, (*batch, 1): (*batch, *event)."""
    index = at.reshape(*at.shape, *[1] * (x.ndim - at.ndim)).expand(*at.shape, *x.shape[dim + 1 :])
    return x.gather(dim, index).squeeze(dim)


def series(y: Any, model: Any) -> list[Tensor]:
    """The observations of each time, of y (*batch, T, *observation_shape)."""
    checks.tensor("y", y)
    shape = tuple(model.observation_shape)
    axis = y.ndim - len(shape) - 1
    if axis < 0 or y.shape[axis + 1 :] != shape or y.shape[axis] < 1:
        raise ValueError(f"y must have shape (*batch, T, *{shape}) with T >= 1, got {tuple(y.shape)}")
    observation("y", y, model)
    return list(y.unbind(axis))


def given(path: Tensor, times: list[Tensor], model: Any) -> Tensor:
    """A path of the right shape, which is looked at for NaN on the CPU."""
    batch = times[0].shape[: times[0].ndim - len(model.observation_shape)]
    wanted = (*batch, len(times), *model.state_shape)
    if path.shape != wanted:
        raise ValueError(f"path must have shape {wanted}, got {tuple(path.shape)}")
    if path.device.type == "cpu" and not bool(path.isfinite().all()):
        raise ValueError("path must be finite")
    return path
