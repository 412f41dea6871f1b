"""The particle filter under the smoothers, whose slot 0 may be set to a given path (conditional SMC)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from polyak.core import checks
from polyak.core.particles import Cloud, gather, resample_conditional
from polyak.particles.paris.functional import observed, parted


class Watch:
    """What went wrong first in each system, and when; kept on the device, and looked at when it is asked to."""

    def __init__(self, batch: tuple[int, ...], device: torch.device) -> None:
        self.device = device
        self._when = {kind: torch.full(batch, -1, device=device) for kind in ("collapsed", "undefined", "impossible")}
        self._y: Tensor | None = None

    def note(self, kind: str, bad: Tensor, t: int, y: Tensor) -> None:
        """``bad`` has the batch's shape. On the CPU it is looked at now."""
        here = self.device.type == "cpu"
        if here and not bool(bad.any()):
            return
        new = bad & (self._when[kind] < 0)
        self._when[kind] = torch.where(new, t, self._when[kind])
        if kind == "collapsed":
            shaped = new.reshape(*new.shape, *[1] * (y.ndim - new.ndim))
            self._y = torch.where(shaped, y, y if self._y is None else self._y)
        if here:
            self.look()

    def look(self) -> None:
        """Raise ValueError where something went wrong; on an accelerator this waits for it."""
        for kind, when in self._when.items():
            if not bool((when >= 0).any()):
                continue
            row = tuple((when >= 0).nonzero()[0].tolist())
            where = f" in system {row}" if row else ""
            t = int(when[row])
            if kind == "collapsed":
                assert self._y is not None
                raise ValueError(
                    f"no particle has a weight at t={t}{where}: log-weights are -inf or NaN for all, y_t={self._y[row].tolist()}"
                )
            if kind == "impossible":
                raise ValueError(f"path must be possible under the model, and has no weight at t={t}{where}")
            raise ValueError(
                f"backward kernel undefined at t={t}{where}: q(x_t, x_{{t+1}}) is 0 from every particle to one at t + 1; "
                "is the transition deterministic, or a given path impossible?"
            )


class Filter:
    """Particles that are moved and weighed, observation by observation; see :class:`PaRIS` for the arguments."""

    cloud: Cloud
    watch: Watch

    def __init__(
        self, model: Any, n: int, scheme: str, ess_threshold: float, generator: torch.Generator | None
    ) -> None:
        self.model, self.n, self.scheme, self.ess_threshold = model, n, scheme, ess_threshold
        self.generator = generator
        self.t = -1

    def begin(self, y: Tensor, frozen: Tensor | None = None) -> None:
        """Particles of x_0, weighed by y_0, (*batch, *observation_shape)."""
        model, dim = self.model, y.ndim - len(self.model.observation_shape)
        batch, seen = y.shape[:dim], y.unsqueeze(dim)
        own = model.initial()
        other, missing = _proposal(model, None, seen, 0)
        x = own.sample((*batch, self.n), generator=self.generator)
        if other is not None:
            # The proposal's batch is (*batch, 1): that dimension is drawn N times.
            moved = other.sample((self.n,), generator=self.generator).squeeze(dim + 1).movedim(0, dim)
            x = self._chosen(missing, x, moved)
        x = _with(frozen, x, dim)
        weight = observed(model, x, seen, 0)
        if other is not None:
            weight = weight + _where(missing, own.log_prob(x) - other.log_prob(x))
        self.t, self.watch = 0, Watch(tuple(batch), x.device)
        self._weigh(Cloud.uniform(x, (*batch, self.n)), weight, y, frozen)

    def move(self, y: Tensor, frozen: Tensor | None = None) -> tuple[Cloud, Tensor]:
        """One step; with ``frozen``, the state (*batch, *state_shape) that slot 0 is set to, as if it came from slot 0.

        Returns:
            The particles as they were before, with the weights that backward draws need, and the ancestors (*batch, N).
        """
        model, t, before = self.model, self.t, self.cloud
        dim = before.logw.ndim - 1
        seen = y.unsqueeze(dim)
        if frozen is None:
            how: dict[str, Any] = dict(scheme=self.scheme, generator=self.generator, check=False)
            cloud, ancestors, _ = before.maybe_resample(self.ess_threshold, **how)
        else:
            # The others draw from all particles, the frozen one among them.
            ancestors = resample_conditional(before.logw, generator=self.generator, check=False)
            cloud = Cloud(gather(before.x, ancestors, dim), torch.zeros_like(before.logw), before.log_z, ancestors)
        other, missing = _proposal(model, cloud.x, seen, t + 1)
        x = model.sample_transition(cloud.x, t, self.generator)
        if other is not None:
            x = self._chosen(missing, x, other.sample(generator=self.generator))
        x = _with(frozen, x, dim)
        weight = observed(model, x, seen, t + 1)
        if other is not None:
            weight = weight + _where(missing, model.log_transition(cloud.x, x, t) - other.log_prob(x))
        self.t = t + 1
        self._weigh(Cloud(x, cloud.logw, cloud.log_z, ancestors), weight, y, frozen)
        return before, ancestors

    def _chosen(self, missing: Tensor | None, x: Tensor, moved: Tensor) -> Tensor:
        """The model's own moves where the observation is missing, which a proposal cannot look at."""
        if missing is None:
            return moved
        return torch.where(missing.reshape(*missing.shape, *[1] * len(self.model.state_shape)), x, moved)

    def _weigh(self, cloud: Cloud, weight: Tensor, y: Tensor, frozen: Tensor | None) -> None:
        weight = weight.expand(cloud.logw.shape)
        # Where all is lost the run goes on with equal weights until it is asked; the evidence remembers.
        self.cloud = cloud.reweight(weight, on_collapse="uniform", check=False)
        self.watch.note("collapsed", ~self.cloud.log_z.isfinite(), self.t, y)
        if frozen is not None:
            self.watch.note("impossible", ~weight[..., 0].isfinite(), self.t, y)


def observation(name: str, y: Any, model: Any, batch: tuple[int, ...] | None = None) -> Tensor:
    """Observations of shape (*batch, *observation_shape), on the CPU looked at for infinities."""
    checks.tensor(name, y)
    shape = tuple(model.observation_shape)
    if (
        y.ndim < len(shape)
        or y.shape[y.ndim - len(shape) :] != shape
        or (batch is not None and y.shape != (*batch, *shape))
    ):
        wanted = (
            f"{(*batch, *shape)}"
            if batch is not None
            else f"(*batch, {', '.join(map(str, shape))})"
            if shape
            else "batch"
        )
        raise ValueError(f"{name} must have shape {wanted}, got {tuple(y.shape)}")
    if y.is_complex():
        raise ValueError(f"{name} must be real, got {y.dtype}")
    if y.device.type == "cpu" and bool(y.isinf().any()):
        raise ValueError(f"{name} must be finite, or NaN where it is missing, got {y[y.isinf()][0].item()}")
    return y


def _proposal(model: Any, x: Tensor | None, y: Tensor, t: int) -> tuple[Any, Tensor | None]:
    """The proposal, or None, and where y is missing."""
    propose = getattr(model, "proposal", None)
    if propose is None:
        return None, None
    known, missing = parted(model, y)
    return propose(x, known, t), missing


def _where(missing: Tensor | None, ratio: Tensor) -> Tensor:
    return ratio if missing is None else torch.where(missing, 0.0, ratio)


def _with(frozen: Tensor | None, x: Tensor, dim: int) -> Tensor:
    """The particles, slot 0 of which is the frozen one."""
    if frozen is None:
        return x
    return torch.cat([frozen.to(x.dtype).unsqueeze(dim), x.narrow(dim, 1, x.shape[dim] - 1)], dim)
