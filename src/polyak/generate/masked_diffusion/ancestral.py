"""Ancestral sampling of masked diffusion on a grid of times: what most published models are sampled with."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from polyak.core import checks
from polyak.generate.discrete import categorical, uniform
from polyak.generate.process import Generators, MaskedProcess, ProbabilityPath
from polyak.generate.solver import Query, Run, Solver, Step, step_count


@dataclass(frozen=True, eq=False)
class Reveals:
    """What is remembered between steps: how many are done, and in which step each position is revealed, (B, L)."""

    done: int
    at: Tensor

    def take(self, ancestors: Tensor) -> Reveals:
        """What is remembered after resampling: row i of the batch came from row ``ancestors[i]``."""
        return Reveals(self.done, self.at.index_select(0, ancestors))


@checks.arguments(
    steps=checks.Integer(1, 1_000_000) | None, cache=checks.flag, precision=checks.Choice("f64", "f32", "two_level")
)
@dataclass(frozen=True, repr=False)
class MaskedAncestral(Solver):
    """From s to t every mask is revealed with probability ``(alpha_t - alpha_s) / (1 - alpha_s)``, all from the logits at s.

    First order: tokens that are revealed in one step are drawn by themselves.

    Args:
        steps: of the uniform grid of times; ``steps`` or ``grid`` of ``sample`` say it, too.
        cache: ask the network only where the state has changed since it was asked (Sahoo et al., arXiv 2406.07524): of one
            sequence at most L times. A network that is told the time is asked in each step all the same.
        precision: "f64" and "two_level" decide first whether a token is revealed, and then which, each as precisely as
            :func:`polyak.generate.discrete.categorical` draws it. "f32" draws both at once, by Gumbel-max in single precision
            with the mask as one of the tokens, as published code does: rare tokens all but vanish, the more so the more steps.

    With a cache it waits for the device once at the start and after each resampling; with "f32" in each step.
    """

    steps: int | None = None
    cache: bool = True
    precision: str = "f64"

    stochastic: ClassVar[bool] = True
    discrete: ClassVar[bool] = True
    no_corrector: ClassVar[str] = "tokens are drawn from logits, not from a prediction of clean data"

    def times(
        self, process: ProbabilityPath, *, steps: int | None = None, nfe: int | None = None, grid: str | None = None
    ) -> Tensor:
        if self.steps is not None:
            if (steps if steps is not None else nfe) not in (None, self.steps):
                raise ValueError(f"steps must be the solver's own, {self.steps}, or left out, got {steps or nfe}")
            steps, nfe = self.steps, None
        return process.grid(step_count(steps, nfe, 1), grid or "time")

    def run(
        self,
        x: Tensor,
        times: Sequence[float],
        process: ProbabilityPath,
        *,
        generator: Generators | None = None,
        memory: Reveals | None = None,
    ) -> Run:
        assert isinstance(process, MaskedProcess)
        kept = [process.alpha(float(t)) for t in times]
        steps, start = len(times) - 1, 0 if memory is None else memory.done
        joint = self.precision == "f32"
        at = self._schedule(x, kept, 0, generator) if memory is None else memory.at
        most, final = self._most(x, at, process.mask_id, steps)
        p: Any = None
        for i in range(start, steps):
            # Where nothing is left to reveal nobody is asked.
            wanted = not self.cache or bool((x == process.mask_id).any() if joint else i <= final)
            if wanted and (p is None or not self.cache or p.timed):
                p = yield Query(x, times[i])
                x = p.x
            if joint and wanted:
                new = self._joint(x, p, (kept[i + 1] - kept[i]) / (1 - kept[i]), generator)
                changed = not self.cache or bool((new != x).any())
            elif wanted and most[i]:
                new, changed = self._reveal(x, p, at == i, most[i], generator), True
            else:
                new, changed = x.clone(), False  # whoever hears of the step may write in it
            x, p = new, None if changed else p
            last = i == steps - 1
            change = yield Step(x, times[i], times[i + 1], i, last, memory=Reveals(i + 1, at))
            if change is not None:
                x, p = change.x, None
                if not last:
                    # Copies are revealed each by its own: given that a mask is left, its time is free again.
                    at = self._schedule(x, kept, i + 1, generator)
                    most, final = self._most(x, at, process.mask_id, steps)
        return x

    def _schedule(self, x: Tensor, kept: Sequence[float], done: int, generator: Generators | None) -> Tensor:
        """The step in which each position is revealed if it is still a mask after ``done`` steps, (B, L)."""
        left = torch.tensor([1 - alpha for alpha in kept[done + 1 :]], dtype=torch.float64, device=x.device)
        v = uniform((len(x), x[:1].numel()), generator=generator, device=x.device) * (1 - kept[done])
        ahead = torch.searchsorted(left.flip(0).contiguous(), v, right=True)  # steps after which it is no mask
        return done + len(left) - ahead

    def _most(self, x: Tensor, at: Tensor, mask: int, steps: int) -> tuple[list[int], int]:
        """The most positions of a row that each step reveals, and the last step that reveals any."""
        if not self.cache or self.precision == "f32":
            return [x[:1].numel()] * steps, steps
        hidden = (x == mask).flatten(1).long()
        counts = hidden.new_zeros(len(x), steps + 1).scatter_add_(1, at, hidden)
        most = counts.amax(0).tolist()[:steps]
        return most, max((i for i, count in enumerate(most) if count), default=-1)

    def _reveal(self, x: Tensor, p: Any, due: Tensor, most: int, generator: Generators | None) -> Tensor:
        flat, mask = x.flatten(1), p.process.mask_id
        due = due & (flat == mask)
        if most == flat.shape[1]:
            tokens = categorical(p.log_probs.flatten(1, -2), precision=self.precision, generator=generator)
            return torch.where(due, tokens.to(x.dtype), flat).view(x.shape)
        chosen, places = due.to(torch.uint8).topk(most, 1)
        tokens = categorical(p.at(places), precision=self.precision, generator=generator).to(x.dtype)
        return flat.scatter(1, places, torch.where(chosen.bool(), tokens, flat.gather(1, places))).view(x.shape)

    def _joint(self, x: Tensor, p: Any, reveal: float, generator: Generators | None) -> Tensor:
        log_p = p.log_probs.float()
        stay = torch.full_like(log_p[..., :1], math.log1p(-reveal) if reveal < 1 else -math.inf)
        tokens = categorical(torch.cat([log_p + math.log(reveal), stay], -1), precision="f32", generator=generator)
        revealed = (tokens < log_p.shape[-1]) & p.hidden
        return torch.where(revealed, tokens.to(x.dtype), x)
