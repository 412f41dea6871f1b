"""The masking process of discrete diffusion: tokens are kept with probability alpha(t), else replaced by the mask."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from polyak.core import checks
from polyak.generate.discrete import random_subsets, spread, stratified_counts, token_log_probs, uniform
from polyak.generate.process.base import _in_float64, _slope
from polyak.generate.process.path import TIME, Generators, ProbabilityPath, check_batch

Schedule = str | Callable[[Tensor], Tensor]
EPS = 1e-3  # of MDLM's log-linear schedule
_CHECKED = 257  # times at which a schedule of one's own is looked at
_TOKENS = checks.Tensor(least_ndim=2)


class MaskedProcess(ProbabilityPath):
    """Masked (absorbing) diffusion: at t each token is the mask with probability ``1 - alpha(t)``, independently of the others.

    Given x_t the tokens that are hidden do not depend on t, so that a network need not be told it, and the negative ELBO does not
    depend on the schedule (Zheng et al., arXiv 2409.02908; Sahoo et al., arXiv 2406.07524; Shi et al., arXiv 2406.04329).

    Args:
        vocab: V: networks say V logits, tokens are integers below V.
        mask_id: the integer that stands for the mask: one of the V (then no data has it), or V itself, the default.
        schedule: "linear", ``alpha = 1 - t``; "cosine", ``1 - cos(pi (1 - t) / 2)``; "loglinear", MDLM's ``1 - (1 - 1e-3) t``,
            whose end is not quite masked; or a function of a float64 tensor t that falls from 1 to 0 over [0, 1].

    Raises:
        ValueError: no token is left beside the mask, or a schedule that does not fall from 1 to 0.

    Example:
        >>> process = MaskedProcess(vocab=5)
        >>> process.corrupt(torch.tensor([[0, 3, 1, 4]]), n=4)
        tensor([[5, 5, 5, 5]])
    """

    is_discrete: ClassVar[bool] = True
    t_min: float = 0.0
    t_max: float = 1.0

    @checks.arguments(
        vocab=checks.Integer(1, 2**40), mask_id=checks.Integer(0, 2**40) | None,
        schedule=checks.Choice("linear", "cosine", "loglinear") | checks.Function("a function of t", 1),
    )  # fmt: skip
    def __init__(self, vocab: int, mask_id: int | None = None, schedule: Schedule = "linear") -> None:
        mask_id = vocab if mask_id is None else mask_id
        if mask_id > vocab:
            raise ValueError(f"mask_id must be at most vocab={vocab}, got {mask_id}")
        if vocab == 1 and mask_id == 0:
            raise ValueError("vocab must have a token beside the mask, got vocab=1 with mask_id=0")
        self.vocab, self.mask_id, self.schedule = vocab, mask_id, schedule
        if callable(schedule):
            _check_schedule(schedule)

    def __repr__(self) -> str:
        mask = "" if self.mask_id == self.vocab else f", mask_id={self.mask_id}"
        return (
            f"MaskedProcess({self.vocab}{mask}{'' if self.schedule == 'linear' else f', schedule={self.schedule!r}'})"
        )

    @_in_float64
    def alpha(self, t: Tensor) -> Tensor:
        """The probability that a token is kept."""
        return self._alpha(t)

    @_in_float64
    def dalpha(self, t: Tensor) -> Tensor:
        """``alpha'(t)``, not positive."""
        return _slope(self._alpha, t)

    @_in_float64
    def t_of_alpha(self, alpha: Tensor) -> Tensor:
        """The inverse of :meth:`alpha`, within [0, 1]."""
        if self.schedule == "linear":
            return 1 - alpha
        if self.schedule == "loglinear":
            return ((1 - alpha) / (1 - EPS)).clamp(0.0, 1.0)
        if self.schedule == "cosine":
            return 1 - torch.asin((alpha / 2).clamp(0.0, 0.5).sqrt()) * (4 / math.pi)
        low, high = torch.zeros_like(alpha), torch.ones_like(alpha)
        for _ in range(60):
            middle = (low + high) / 2
            early = self._alpha(middle) > alpha
            low, high = torch.where(early, middle, low), torch.where(early, high, middle)
        return (low + high) / 2

    def _alpha(self, t: Tensor) -> Tensor:
        if callable(self.schedule):
            return self.schedule(t)
        if self.schedule == "cosine":
            return 2 * torch.sin((1 - t) * (math.pi / 4)).square()  # 1 - cos(pi (1 - t) / 2), without its cancellation
        return 1 - t if self.schedule == "linear" else 1 - (1 - EPS) * t

    def check_state(self, name: str, x: Tensor) -> None:
        """ValueError unless x holds tokens or masks, (B, ...); values are looked at on the CPU only."""
        if x.ndim < 2 or not _whole(x):
            raise ValueError(f"{name} must be integers of shape (B, L), got {x.dtype}, {tuple(x.shape)}")
        if x.device.type == "cpu" and x.numel():
            low, high = (int(end) for end in x.aminmax())
            if low < 0 or high > max(self.vocab - 1, self.mask_id):
                raise ValueError(f"{name} must hold tokens below vocab={self.vocab} or the mask {self.mask_id}, got "
                                 f"{low if low < 0 else high}")  # fmt: skip

    def check_data(self, name: str, x: Tensor) -> None:
        """ValueError unless x holds tokens, and none of them is the mask."""
        self.check_state(name, x)
        if x.device.type == "cpu" and bool((x == self.mask_id).any()):
            raise ValueError(f"{name} must be clean data, but holds the mask {self.mask_id}")

    def prior(
        self,
        shape: Sequence[int],
        *,
        generator: Generators | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> Tensor:
        """What sampling starts from: all masks, int64."""
        if dtype is not None:
            raise ValueError(f"dtype must be left out, since tokens are int64, got {dtype}")
        if len(shape) < 2:
            raise ValueError(f"shape must be (B, L), got {tuple(shape)}")
        if device is None and generator is not None:
            one = generator[0] if isinstance(generator, Sequence) and len(generator) else generator
            device = one.device if isinstance(one, torch.Generator) else None
        return torch.full(tuple(shape), self.mask_id, dtype=torch.int64, device=device)

    @checks.arguments(
        x0=_TOKENS, t=TIME | None, n=checks.Integer() | checks.Tensor(ndim=1) | None, generator=checks.generators | None
    )
    def corrupt(
        self,
        x0: Tensor,
        t: float | Tensor | None = None,
        *,
        n: int | Tensor | None = None,
        generator: Generators | None = None,
    ) -> Tensor:
        """Draw x_t given x0: by a time, or with a number of masks.

        Args:
            x0: clean tokens (B, L), or of any event shape (B, ...).
            t: a number or (B,), in (0, 1]; or
            n: a number or (B,) integers, 1 .. L: exactly so many positions are hidden, all subsets being equally likely.

        Returns:
            x0's shape and type, with masks.

        Raises:
            ValueError: neither or both of t and n, one out of range, or data with a mask.
        """
        self.check_data("x0", x0)
        if (t is None) == (n is None):
            raise ValueError(f"give either t or n, got t={t!r}, n={n!r}")
        rows, length = len(x0), x0[:1].numel() if len(x0) else math.prod(x0.shape[1:])
        if t is not None:
            self._inside("t", check_batch(t, x0), 1.0)
            kept = self.alpha(t.double() if isinstance(t, Tensor) else float(t))
            kept = kept.to(x0.device).reshape(-1, 1) if isinstance(kept, Tensor) else kept
            hidden = uniform((rows, length), generator=generator, device=x0.device) >= kept
        else:
            if isinstance(n, Tensor) and (not _whole(n) or n.shape != (rows,)):
                raise ValueError(f"n must be an integer or {rows} of them, got {n.dtype}, {tuple(n.shape)}")
            self._inside("n", n, length)
            counts = n.to(x0.device) if isinstance(n, Tensor) else torch.full((rows,), int(n or 0), device=x0.device)
            hidden = random_subsets(counts, length, generator=generator)
        return x0.masked_fill(hidden.view(x0.shape), self.mask_id)

    def _inside(self, name: str, value: Any, most: float) -> None:
        if isinstance(value, Tensor):
            if value.device.type != "cpu" or not value.numel():
                return
            wrong = ~((value > 0) & (value <= most))
            value = value[wrong].flatten()[0].item() if bool(wrong.any()) else most
        if not 0 < value <= most:
            raise ValueError(f"{name} must be in (0, {most}], got {value!r}")

    @checks.arguments(
        model=checks.Function("a function x -> logits, or a TokenDenoiser"), x0=_TOKENS, form=checks.Choice("count", "time"),
        generator=checks.generator | None,
    )  # fmt: skip
    def nelbo(
        self,
        model: Callable[..., Any],
        x0: Tensor,
        form: str = "count",
        *,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """An unbiased estimate, for each row, of an upper bound on ``-log p(x0)``: the loss to train by, in nats.

            count:  L / n       sum_{l hidden} -log p(x0_l | x),   n uniform on 1 .. L, n positions hidden
            time:  -alpha'(t) / (1 - alpha(t)) sum_{l hidden} -log p(x0_l | x_t),   t uniform on (0, 1)

        Both have one expectation, that of any-order autoregression; "count" has the smaller variance and no weight without bound.
        n and t are spread over the rows. ``nelbo(...).mean() / L`` is nats a token.

        Args:
            model: says logits (B, L, V) of x; a :class:`polyak.generate.TokenDenoiser` may be told t, too.
            x0: clean tokens (B, L) or (B, ...).

        Returns:
            (B,), in the logits' type, at least float32.
        """
        self.check_data("x0", x0)
        length = math.prod(x0.shape[1:])
        if form == "count":
            n = stratified_counts(len(x0), length, generator=generator, device=x0.device)
            x, weight = self.corrupt(x0, n=n, generator=generator), length / n
            t = self.t_of_alpha(1 - n.double() / length)
        else:
            t = 1 - spread(len(x0), generator=generator, device=x0.device)  # never 0
            x, weight = self.corrupt(x0, t, generator=generator), -self.dalpha(t) / (1 - self.alpha(t))
        said = model.logits(x, t) if hasattr(model, "logits") else model(x)
        logits: Tensor = getattr(said, "logits", said)
        if logits.shape != (*x.shape, self.vocab):
            raise ValueError(f"logits must have shape {(*x.shape, self.vocab)}, got {tuple(logits.shape)}")
        # Of a visible token that is no column of the logits nothing is gathered: x0 has none.
        right = token_log_probs(logits, self.mask_id).gather(-1, x0.long()[..., None])[..., 0]
        hidden = x == self.mask_id
        return torch.where(hidden, -right, 0.0).flatten(1).sum(1) * weight.to(right.dtype)


def _whole(x: Tensor) -> bool:
    return not (x.is_floating_point() or x.is_complex() or x.dtype == torch.bool)


def _check_schedule(schedule: Callable[[Tensor], Tensor]) -> None:
    t = torch.linspace(0, 1, _CHECKED, dtype=torch.float64)
    alpha = schedule(t)
    if not isinstance(alpha, Tensor) or alpha.shape != t.shape:
        raise ValueError("schedule must map a tensor of times to one of their shape")
    falls = bool(alpha.isfinite().all()) and bool((torch.diff(alpha) < 0).all())
    if not falls or abs(alpha[0].item() - 1) > 1e-6 or not -1e-9 <= alpha[-1].item() <= 1e-2:
        raise ValueError(
            f"schedule must fall strictly from 1 at t=0 to 0 at t=1, got {alpha[0].item():g} to {alpha[-1].item():g}"
            f"{'' if falls else ', not falling everywhere'}"
        )
