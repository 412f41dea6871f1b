"""MKOR-H: MKOR until its progress slows, then the base optimizer alone.

The paper names the hybrid and publishes no code for its switch. The rule here: with L an average of the loss and
``r = average of (L_before - L) / |L_before|`` per step, both with retention 1 - 1/window, r is looked at after every ``window``
steps; where it is below ``tau`` times the best so far, the base steps alone from then on.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from polyak.core import checks
from polyak.optim.mkor.checkpoint import settled
from polyak.optim.mkor.layers import MODEL
from polyak.optim.mkor.optimizer import MKOR
from polyak.optim.mkor.reduction import mean


class MKORH(MKOR):
    """MKOR-H (arXiv 2306.01685): MKOR that falls back to its base optimizer when its progress slows.

    The loss of a step is what its closure returns, or what :meth:`observe` was given. It is kept on its device and read once in
    ``window`` steps; in several processes the rate is averaged, so that all of them switch at once.

    Args:
        model, base, and options: as in :class:`MKOR`.
        window: steps between two looks at the progress, and the length of its averages.
        tau: falls back where the rate of decrease is below ``tau`` times the best so far; 0 only where the loss rises.

    State: as MKOR's, and the averages.

    Example:
        >>> optimizer = MKORH(model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9))
        >>> optimizer.observe(loss)
        >>> loss.backward()
        >>> optimizer.step()
    """

    @checks.arguments(model=MODEL, base=checks.optimizer, window=checks.Integer(1), tau=checks.fraction)
    def __init__(
        self, model: Any, base: torch.optim.Optimizer, *, window: int = 50, tau: float = 0.2, **options: Any
    ) -> None:
        self.window, self.tau = window, tau
        self._losses: list[Tensor] = []  # of the step to come
        self._level: Tensor | None = None
        self._rate: Tensor | None = None
        self._best = float("-inf")
        self._observed = 0
        super().__init__(model, base, **options)

    def observe(self, loss: Tensor | float) -> None:
        """Note a loss of the step to come; the mean counts where there are several."""
        self._losses.append(torch.as_tensor(loss, dtype=torch.float32).detach().reshape(()))

    def _after_step(self, loss: Any) -> None:
        if loss is not None and not self._losses:
            self.observe(loss)
        if self._active:
            self._follow()
        self._losses.clear()

    def _follow(self) -> None:
        if self._losses:
            now = torch.stack(self._losses).mean()
            self._observed += 1
            if self._level is None or self._rate is None:
                self._level, self._rate = now, torch.zeros_like(now)
            else:
                # As long as fewer than `window` are known, the plain mean of them.
                weight = 1 / min(self._observed, self.window)
                self._level, self._rate = self._level.to(now.device), self._rate.to(now.device)  # from a checkpoint
                level = self._level.lerp(now, weight)
                weight = 1 / min(self._observed - 1, self.window)
                self._rate = self._rate.lerp((self._level - level) / self._level.abs(), weight)
                self._level = level
        if self._steps % self.window == 0:
            self._judge()

    def _judge(self) -> None:
        if self._rate is None:
            warnings.warn("MKORH has seen no loss: give step a closure, or call observe(loss)", stacklevel=4)
            return
        rate = float(mean(self._rate, self.process_group))
        self._best = max(self._best, rate)
        if rate < self.tau * self._best or rate < 0:
            self.fallback()

    def _numbers(self) -> dict[str, Any]:
        known = {"level": settled(self._level), "rate": settled(self._rate)}
        return {**super()._numbers(), **known, "best": self._best, "observed": self._observed}

    def _own_state(self) -> dict[str, Any]:
        progress = {"level": self._level, "rate": self._rate, "best": self._best, "observed": self._observed}
        return {**MKOR._numbers(self), "factors": self._saved_factors(), "progress": progress}

    def _load_own_state(self, own: Mapping[str, Any]) -> None:
        super()._load_own_state(own)
        progress = own.get("progress", own)
        self._best, self._observed = progress.get("best", float("-inf")), progress.get("observed", 0)
        level, rate = (progress.get(name) for name in ("level", "rate"))
        self._level = level.clone() if self._observed else None
        self._rate = rate.clone() if self._observed else None
