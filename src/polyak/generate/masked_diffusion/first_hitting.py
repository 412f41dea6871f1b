"""The first-hitting sampler (arXiv 2409.02908, section 4): one call of the network for each token, or for several at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from polyak.core import checks
from polyak.generate.discrete import categorical, token_log_probs, uniform
from polyak.generate.process import Generators, MaskedProcess, ProbabilityPath
from polyak.generate.solver import Query, Run, Solver, Step


@dataclass(frozen=True, eq=False)
class Hits:
    """What is remembered between calls; all tensors have a row for each sequence.

    Attributes:
        done, calls: how many calls have been made, of how many.
        masks: (B,), how many masks there were at the start.
        level: (B,), float64: ``1 - alpha`` at the time of the last reveal.
        earlier: of higher order: the log-probabilities that were said last, or the positions revealed last.
        revealed: (B,) or (B, m): how many were revealed last, or which of these positions were.
    """

    done: int
    calls: int
    masks: Tensor
    level: Tensor
    earlier: Tensor | None = None
    revealed: Tensor | None = None

    def take(self, ancestors: Tensor) -> Hits:
        """What is remembered after resampling: row i of the batch came from row ``ancestors[i]``."""

        def rows(value: Tensor | None) -> Any:
            return None if value is None else value.index_select(0, ancestors)

        return Hits(self.done, self.calls, rows(self.masks), rows(self.level), rows(self.earlier), rows(self.revealed))


@checks.arguments(
    steps=checks.Integer(1) | None, order=checks.Choice(1, 2), variant=checks.Choice(None, "extrapolate", "pc"),
    temperature=checks.non_negative, top_p=checks.Number(0, 1, "(]") | None,
    precision=checks.Choice("f64", "f32", "two_level"),
)  # fmt: skip
@dataclass(frozen=True, repr=False)
class FirstHitting(Solver):
    """The exact sampler of masked diffusion: masks are revealed one by one, in random order, with one call for each.

    Which position comes next, and when, does not depend on the tokens: the times of n masks are the order statistics of n uniforms
    (under the linear schedule), and the order is uniform. With fewer calls each reveals several tokens by themselves, from the same
    logits; the error falls as one over the number of calls. A visible token is not changed (but by the variant "pc").

    Args:
        steps: calls of the network; by default as many as the fullest row has masks. Each row reveals its masks in equal parts.
        order, variant: of order 2, for fewer calls than masks: "extrapolate" takes log p to be linear in the number of masks, from
            the last two calls; "pc" draws the tokens that were revealed last once more, from the next call's logits at their
            positions: it needs a network that is trained to predict visible positions from all others.
        temperature: logits are divided by it; 0 takes the most probable token (the order stays random).
        top_p: draw from the fewest most probable tokens that have this probability together.
        precision: of the draws, as for :func:`polyak.generate.discrete.categorical`.

    Raises:
        ValueError: order 2 without a variant, or a variant of order 1. While it runs: more steps than positions.

    ``sample`` needs neither ``steps`` nor ``nfe`` with it; ``steps=`` there is the same as here. Without either it counts the
    masks first, and waits once for the device to do so. Masks are counted at the start: those that a callback puts back stay.
    """

    steps: int | None = None
    order: int = 1
    variant: str | None = None
    temperature: float = 1.0
    top_p: float | None = None
    precision: str = "f64"

    stochastic: ClassVar[bool] = True
    discrete: ClassVar[bool] = True
    adaptive: ClassVar[bool] = True  # the number of calls follows from the state
    no_corrector: ClassVar[str] = "tokens are drawn from logits, not from a prediction of clean data"

    def __post_init__(self) -> None:
        if (self.order == 1) != (self.variant is None):
            raise ValueError(
                f"variant must be 'extrapolate' or 'pc' for order=2, and None for order=1, got {self.variant!r} with "
                f"order={self.order}"
            )

    @property
    def history(self) -> int:  # type: ignore[override]
        return self.order - 1

    def with_steps(self, steps: int) -> FirstHitting:
        return replace(self, steps=steps) if self.steps is None else self

    def times(
        self, process: ProbabilityPath, *, steps: int | None = None, nfe: int | None = None, grid: str | None = None
    ) -> Tensor:
        """The two ends; with a number of calls their nominal times, at which equal parts of the masks are left."""
        if steps is not None and nfe is not None:
            raise ValueError(f"give steps or nfe, not both, got steps={steps!r}, nfe={nfe!r}")
        asked = {n for n in (self.steps, steps, nfe) if n is not None}
        if len(asked) > 1:
            raise ValueError(f"steps must be the solver's own, {self.steps}, or left out, got {steps or nfe}")
        if asked == {1} and self.steps is None:
            raise ValueError("steps=1 must be the solver's own: FirstHitting(steps=1)")  # two times mean: not decided
        if grid not in (None, "time"):
            raise ValueError(f"grid must be left out: reveals have times of their own, got {grid!r}")
        return torch.linspace(process.t_max, process.t_min, 1 + (asked.pop() if asked else 1), dtype=torch.float64)

    def run(
        self,
        x: Tensor,
        times: Sequence[float],
        process: ProbabilityPath,
        *,
        generator: Generators | None = None,
        memory: Hits | None = None,
    ) -> Run:
        assert isinstance(process, MaskedProcess)
        shape, mask = x.shape, process.mask_id
        length = x[:1].numel()
        asked = self.steps or (len(times) - 1 if len(times) > 2 else None)
        if asked is not None and asked > length:
            raise ValueError(f"steps must be at most the {length} positions, got {asked}")
        if memory is None:
            masks = (x == mask).flatten(1).sum(1)
            level = masks.new_full(masks.shape, 1 - process.alpha(float(times[0])), dtype=torch.float64)
            memory = Hits(0, asked or int(masks.max()), masks, level)
        calls, masks = memory.calls, memory.masks
        most = -(-length // asked) if asked else 1  # that any row reveals at once
        nominal = [_nominal(process, i / calls, times) for i in range(calls + 1)] if calls else []
        for i in range(memory.done, calls):
            before, after = (self._revealed(j, calls, masks, asked) for j in (i, i + 1))
            left, now = masks - before, after - before
            level, first = _hit(memory.level, left, now, most, generator)
            p = yield Query(x, process.t_of_alpha(1 - first).clamp(min=process.t_min, max=process.t_max))
            x = p.x.flatten(1)
            if memory.earlier is not None and self.variant == "pc":
                x = self._write(x, memory.earlier, memory.revealed, self._draw(p, memory.earlier, generator))
            keys = uniform(x.shape, generator=generator, device=x.device).masked_fill_(x != mask, -1.0)
            keys, places = keys.topk(most, 1)
            chosen = (torch.arange(most, device=x.device) < now[:, None]) & (keys >= 0)
            earlier = revealed = None
            if self.variant == "extrapolate":
                earlier, revealed = p.log_probs.flatten(1, -2), now
                tokens = self._extrapolated(earlier, memory, places, now, generator)
            else:
                tokens = self._draw(p, places, generator)
                if self.variant == "pc" and most > 1:  # one token alone was right at once
                    earlier, revealed = places, chosen & (now > 1)[:, None]
            x = self._write(x, places, chosen, tokens).view(shape)
            memory = Hits(i + 1, calls, masks, level, earlier, revealed)
            change = yield Step(x, nominal[i], nominal[i + 1], i, i == calls - 1, memory=memory)
            if change is not None:
                x = change.x
                if change.ancestors is not None:
                    memory = memory.take(change.ancestors)
                    masks = memory.masks
        return x

    def _revealed(self, calls: int, of: int, masks: Tensor, asked: int | None) -> Tensor:
        """How many tokens of each row are revealed after so many calls."""
        return masks.clamp(max=calls) if asked is None else masks * calls // of

    def _draw(self, p: Any, places: Tensor, generator: Generators | None) -> Tensor:
        log_p = p.at(places, temperature=self.temperature, top_p=self.top_p)
        return log_p.argmax(-1) if self.temperature == 0 else self._token(log_p, generator)

    def _token(self, log_p: Tensor, generator: Generators | None) -> Tensor:
        return categorical(log_p, precision=self.precision, generator=generator)

    def _write(self, x: Tensor, places: Tensor, chosen: Any, tokens: Tensor) -> Tensor:
        return x.scatter(1, places, torch.where(chosen, tokens.to(x.dtype), x.gather(1, places)))

    def _extrapolated(
        self, said: Tensor, memory: Hits, places: Tensor, now: Tensor, generator: Generators | None
    ) -> Tensor:
        """Tokens by log p at the mean number of masks of this call's reveals, ``(now - 1) / 2`` below the present one."""
        index = places[..., None].expand(*places.shape, said.shape[-1])
        log_p = said.gather(1, index)
        if memory.earlier is not None:
            assert memory.revealed is not None
            part = (now - 1).clamp(min=0) / (2 * memory.revealed.clamp(min=1))
            part = torch.where(memory.revealed > 0, part, 0.0).to(log_p.dtype)[:, None, None]
            change = log_p - memory.earlier.gather(1, index)
            log_p = torch.where(change.isfinite(), log_p + part * change, log_p)
        log_p = token_log_probs(log_p, said.shape[-1], temperature=self.temperature, top_p=self.top_p)
        return log_p.argmax(-1) if self.temperature == 0 else self._token(log_p, generator)


def _hit(level: Tensor, left: Tensor, now: Tensor, most: int, generator: Generators | None) -> tuple[Tensor, Tensor]:
    """``1 - alpha`` at the last and at the first of the next ``now`` reveals of rows with ``left`` masks, each (B,)."""
    u = uniform((len(level), most), generator=generator, device=level.device)
    rank = torch.arange(most, device=level.device)
    part = (1 - u) ** (1 / (left[:, None] - rank).clamp(min=1).to(u.dtype))  # never 0
    part = torch.where(rank < now[:, None], part, 1.0)
    return level * part.prod(1), level * part[:, 0]


def _nominal(process: MaskedProcess, part: float, times: Sequence[float]) -> float:
    """The time at which a part of the masks has been revealed, on the mean."""
    if part in (0.0, 1.0):
        return float(times[0] if part == 0.0 else times[-1])
    kept = process.alpha(float(times[0]))
    return process.t_of_alpha(kept + part * (process.alpha(float(times[-1])) - kept))
