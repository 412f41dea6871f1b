"""Asking a reward of a population: any scorer, on any device, in parts, its answer checked.

What is steered or searched by a reward does not look into it: it may not be differentiable, may run on the CPU or return a list.

Example:
    >>> import torch
    >>> score = Scorer(lambda samples: samples.flatten(2).mean(2), batch_size=4)
    >>> score(torch.ones(6, 3), particles=2).shape
    torch.Size([3, 2])
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from polyak.core import checks
from polyak.generate.process import wide

__all__ = ["RewardContext", "Scorer"]

Reward = Callable[..., Any]  # (samples[, context]) -> rewards
Decode = Callable[[Tensor], Any]

REWARD = checks.Function("a function (samples) or (samples, context) -> rewards", 1) | checks.Function(
    "a function (samples, context) -> rewards", 2
)
DECODE = checks.Function("a function of samples (n, ...)", 1)
BATCH = checks.Integer(1)


@checks.arguments(
    systems=checks.Instance(range, words="a range"), step=checks.Integer(0), t=checks.operand, last=checks.flag
)
@dataclass(frozen=True)
class RewardContext:
    """What a reward is told beside the samples.

    Attributes:
        systems: which systems of the population the samples are of: with one prompt for each system, ``prompts[i]`` for i in it.
        step: the solver's step after which rewards are asked for, from 0.
        t: the time of the prediction that the samples are.
        last: whether they are the final samples, not predictions of them.
    """

    systems: range
    step: int = 0
    t: float = 0.0
    last: bool = False


class Scorer:
    """A reward, how samples are made ready for it, and how many it is given at once.

    Args:
        reward: ``(samples)`` or ``(samples, context) -> rewards``: samples of b systems, k of each, have shape (b, k, ...); rewards
            have shape (b, k) or (b * k,), or are a list, or an array, of such. It is called without gradients.
        decode: applied to samples of shape (n, ...) first, a VAE's decoder, say; where it returns a list of n (texts, images), the
            reward is given the list, system by system.
        batch_size: the most samples at once; None: all. Bounds the memory of ``decode`` and of the reward.
    """

    @checks.arguments(reward=REWARD, decode=DECODE | None, batch_size=BATCH | None)
    def __init__(self, reward: Reward, *, decode: Decode | None = None, batch_size: int | None = None) -> None:
        self.reward, self.decode, self.batch_size = reward, decode, batch_size
        self._told = takes_context(reward)

    @checks.arguments(
        rows=checks.Tensor(least_ndim=1), particles=checks.Integer(1), step=checks.Integer(0), t=checks.operand, last=checks.flag
    )  # fmt: skip
    def __call__(
        self, rows: Tensor, particles: int = 1, *, step: int = 0, t: float = 0.0, last: bool = False
    ) -> Tensor:
        """The rewards of samples (b * k, ...), shape (b, k), in float64, on the samples' device; NaN stays NaN.

        Args:
            rows: the k samples of one system are adjacent.
            particles: k.
            step, t, last: told to the reward (:class:`RewardContext`).

        Raises:
            TypeError: rewards that are not real numbers.
            ValueError: rewards of another shape, or rows that are not k for each system.
        """
        if len(rows) % particles:
            raise ValueError(f"rows must be particles={particles} for each system, got {len(rows)}")
        batch = len(rows) // particles
        found = [
            self._part(rows[start : start + len(systems) * count], RewardContext(systems, step, t, last), count)
            for start, systems, count in self._parts(batch, particles)
        ]
        if not found:
            return torch.empty(batch, particles, dtype=wide(rows.device), device=rows.device)
        return torch.cat(found).reshape(batch, particles)

    def _parts(self, batch: int, k: int) -> Iterator[tuple[int, range, int]]:
        """The first row of each part, its systems, and how many samples of each it has."""
        most = self.batch_size or max(1, batch * k)
        if k <= most:
            whole = most // k
            for first in range(0, batch, whole):
                yield first * k, range(first, min(batch, first + whole)), k
            return
        for system in range(batch):
            for first in range(0, k, most):
                yield system * k + first, range(system, system + 1), min(most, k - first)

    @torch.no_grad()
    def _part(self, rows: Tensor, context: RewardContext, k: int) -> Tensor:
        samples: Any = rows if self.decode is None else self.decode(rows)
        b = len(context.systems)
        if len(samples) != b * k:
            raise ValueError(f"decode must keep the number of samples, {b * k}, got {len(samples)}")
        if hasattr(samples, "reshape"):
            samples = samples.reshape(b, k, *samples.shape[1:])
        said = self.reward(samples, context) if self._told else self.reward(samples)
        return _numbers(said, b, k, rows.device)


def takes_context(function: Callable[..., Any]) -> bool:
    """Whether a reward wants the context: it has an argument of this name, or cannot be called with the samples alone."""
    plain = function.forward if isinstance(function, nn.Module) else function
    try:
        signature = inspect.signature(plain)
    except (TypeError, ValueError):
        return False
    return "context" in signature.parameters or not checks.Function(arguments=1).like(plain)


def without_nan(rewards: Tensor) -> tuple[Tensor, Tensor]:
    """Rewards whose NaN are -inf, and how many there were, a tensor of one integer: nobody waits for the device."""
    missing = rewards.isnan()
    return rewards.masked_fill(missing, -torch.inf), missing.sum()


def warn_of_nan(count: Tensor, what: str) -> None:
    """Warn if rewards were NaN, and ``what`` became of their samples. Waits for the device: for the end of a run."""
    if found := int(count):
        warnings.warn(
            f"{found} {'reward was' if found == 1 else 'rewards were'} NaN: {what}", RuntimeWarning, stacklevel=3
        )


def _numbers(said: Any, b: int, k: int, device: torch.device) -> Tensor:
    """What a reward returned, as (b * k,)."""
    made: Any = said
    try:
        if hasattr(made, "__array__") and not isinstance(made, Tensor):
            made = torch.as_tensor(made)
        elif isinstance(made, Sequence) and len(made):  # of numbers, or of tensors of one element, on any device
            made = torch.stack([torch.as_tensor(one, device="cpu") for one in made])
    except (TypeError, ValueError, RuntimeError):
        made = None
    if not isinstance(made, Tensor) or made.is_complex() or made.dtype == torch.bool:
        raise TypeError(f"reward must return real numbers, got {checks.shown(said)}")
    if made.shape not in ((b, k), (b * k,)):
        raise ValueError(f"reward must return shape {(b, k)} or {(b * k,)}, got {tuple(made.shape)}")
    return made.to(device=device, dtype=wide(device)).reshape(b * k)
