"""Additive functionals ``h_n = sum_{t < n} h_t(x_t, x_{t+1})``, and the one whose smoothed mean is the score."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from polyak.core import checks
from polyak.particles.paris.models import MODEL

Plain = Callable[[Tensor, Tensor, int], Tensor]


class FisherScore:
    """The functional whose smoothed mean is the score, ``grad_theta log p(y_{0:n})`` (Fisher's identity).

    ``h_t = grad log q(x_t, x_{t+1}) + grad log g(x_{t+1}, y_{t+1})``, and ``grad log m_0(x_0) + grad log g(x_0, y_0)`` to begin
    with; each particle's is computed by autograd, so that its event shape is (P,), the number of parameters. Give it to
    :class:`PaRIS` or :class:`ParisParticleGibbs` as the functional. It reads the parameters where it is called: they may change.

    Args:
        model: a module.
        parameters: those to differentiate by, in this order; default: all that require a gradient.

    Raises:
        ValueError: a parameter that the model does not have, or none at all.
    """

    @checks.arguments(model=checks.module, parameters=checks.Several(checks.tensor) | None)
    def __init__(self, model: nn.Module, parameters: Sequence[Tensor] | None = None) -> None:
        MODEL("model", model)
        names = {id(p): name for name, p in model.named_parameters()}
        wanted = [p for p in model.parameters() if p.requires_grad] if parameters is None else list(parameters)
        if any(id(p) not in names for p in wanted) or not wanted:
            raise ValueError("parameters must be some of the model's, got one that it does not have, or none at all")
        self.model: Any = model
        self.parameters = wanted
        self._densities = _Densities(model)
        self._names = [f"model.{names[id(p)]}" for p in wanted]

    def split(self, score: Tensor) -> list[Tensor]:
        """A vector (*batch, P) as tensors (*batch, *shape), one for each parameter."""
        parts = score.split([p.numel() for p in self.parameters], -1)
        return [part.reshape(*score.shape[:-1], *p.shape) for part, p in zip(parts, self.parameters, strict=True)]

    def first(self, x: Tensor, y: Tensor) -> Tensor:
        """Of particles x (*batch, N, *state) given y_0, which broadcasts with them: (*batch, N, P)."""
        return self._each((x, y), lambda x, y: (x, None, y, 0), x)

    def step(self, x: Tensor, x_next: Tensor, y_next: Tensor, t: int) -> Tensor:
        """Of pairs that broadcast, (*pairs, *state), given y_{t+1}: (*pairs, P)."""
        event = len(self.model.state_shape)
        shape = _joint(x, x_next)
        both = (x.expand(shape), x_next.expand(shape), y_next)
        return self._each(both, lambda x, x_next, y: (x, x_next, y, t), both[0], len(shape) - event)

    def _each(self, given: tuple[Tensor, ...], order: Callable[..., Any], x: Tensor, dims: int | None = None) -> Tensor:
        dims = x.ndim - len(self.model.state_shape) if dims is None else dims
        pairs = x.shape[:dims]
        *states, y = given
        y = y.expand(*pairs, *self.model.observation_shape)
        flat = [one.reshape(-1, *one.shape[dims:]) for one in (*states, y)]
        named = dict(self._densities.named_parameters())
        free = {name: named[name].detach() for name in self._names}
        fixed = {name: p.detach() for name, p in named.items() if name not in free}

        def density(parameters: dict[str, Tensor], *one: Tensor) -> Tensor:
            return functional_call(self._densities, {**parameters, **fixed}, order(*one))

        made = vmap(grad(density), in_dims=(None, *[0] * len(flat)))(free, *flat)
        return torch.cat([made[name].reshape(len(flat[0]), -1) for name in self._names], 1).reshape(*pairs, -1)


class _Densities(nn.Module):
    """A model's log-densities as a module's call, which functional_call needs."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor, x_next: Tensor | None, y: Tensor, t: int) -> Tensor:
        if x_next is None:
            return self.model.initial().log_prob(x) + observed(self.model, x, y, 0)
        return self.model.log_transition(x, x_next, t) + observed(self.model, x_next, y, t + 1)


def observed(model: Any, x: Tensor, y: Tensor, t: int) -> Tensor:
    """``log g(x_t, y_t)``, and 0 where y_t is missing: where any of its numbers is NaN."""
    known, missing = parted(model, y)
    density = model.log_observation(x, known, t)
    return density if missing is None else torch.where(missing, 0.0, density)


def parted(model: Any, y: Tensor) -> tuple[Tensor, Tensor | None]:
    """y with zeros for NaN, which would be in gradients behind ``where``, too; and what is missing, if anything can be."""
    if not y.is_floating_point():
        return y, None
    unknown = y.isnan()
    missing = unknown.flatten(-len(model.observation_shape)).any(-1) if model.observation_shape else unknown
    return torch.where(unknown, torch.zeros_like(y), y), missing


def _joint(x: Tensor, x_next: Tensor) -> list[int]:
    """The shape that two tensors of equally many dimensions broadcast to; torch.broadcast_shapes takes as long as the sums."""
    return [b if a == 1 else a for a, b in zip(x.shape, x_next.shape, strict=True)]


class _OfStates:
    """A user's function of ``(x_t, x_{t+1}, t)``."""

    def __init__(self, function: Plain, event: int) -> None:
        self.function, self.event = function, event

    def first(self, x: Tensor, y: Tensor) -> Tensor:
        return torch.zeros_like(self._shaped(x, x, 0))

    def step(self, x: Tensor, x_next: Tensor, y_next: Tensor, t: int) -> Tensor:
        return self._shaped(x, x_next, t)

    def _shaped(self, x: Tensor, x_next: Tensor, t: int) -> Tensor:
        full = _joint(x, x_next)
        pairs = full[: len(full) - self.event]
        made = self.function(x.expand(full), x_next.expand(full), t)
        if not isinstance(made, Tensor):
            raise TypeError(f"functional must return a tensor, got {type(made).__name__}")
        try:
            return made.expand(*pairs, *made.shape[len(pairs) :])
        except RuntimeError:
            raise ValueError(
                f"functional must return shape (*pairs, *event) with pairs {tuple(pairs)}, got {tuple(made.shape)}"
            ) from None


FUNCTIONAL = checks.Instance(FisherScore, words="a FisherScore") | checks.Function("a function (x, x_next, t)", 3)


def prepared(functional: Any, model: Any) -> Any:
    """What has ``first`` and ``step``."""
    return functional if isinstance(functional, FisherScore) else _OfStates(functional, len(model.state_shape))
