"""What a network says of tokens: logits of each hidden position, as a prediction that samplers, guidance and steering read."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from polyak.core import checks
from polyak.generate.discrete import categorical, token_log_probs
from polyak.generate.process import Generators, MaskedProcess, wide
from polyak.generate.process.path import TIME, one_for_each_row

_MASKED = checks.Instance(MaskedProcess, words="a MaskedProcess")
_LOGITS = checks.Tensor(floating=True, least_ndim=3)
_MODEL = checks.Function("a function x -> logits, or (x, label) -> logits")


class TokenPrediction:
    """Logits of the tokens that x hides, at (x, t).

    A steering is told ``pred`` and ``x0_hat = pred.x0``, the most probable tokens. A reward of finished text wants samples:
    ``pred.draw(count, generator=generator)``. Guidance that mixes outputs (CFG) works on logits; one that reads x0 cannot.

    Args:
        logits: (*x.shape, V), as the network says them; -inf rules a token out.
        x: the state, (B, L) or (B, ...), integers.
        t: its time, a number or (B,).
        process: says which integer is the mask.
        timed: whether the network was told t, so that what it says cannot be kept for another time.

    Attributes:
        output: the logits.

    Raises:
        ValueError: shapes that do not fit.
    """

    kind = "logits"

    @checks.arguments(
        logits=_LOGITS, x=checks.Tensor(least_ndim=2), t=TIME, process=_MASKED, timed=checks.flag,
    )  # fmt: skip
    def __init__(
        self, logits: Tensor, x: Tensor, t: float | Tensor, process: MaskedProcess, *, timed: bool = False
    ) -> None:
        if logits.shape != (*x.shape, process.vocab):
            raise ValueError(
                f"logits must have shape {(*x.shape, process.vocab)}, of x and vocab, got {tuple(logits.shape)}"
            )
        self.output, self.x, self.process, self.timed = logits, x, process, timed
        self.t = one_for_each_row(t, x)

    @property
    def hidden(self) -> Tensor:
        """Which positions are masks: x's shape, bool."""
        return self.x == self.process.mask_id

    @property
    def log_probs(self) -> Tensor:
        """``log p(x0_l | x)`` of every position, never the mask: (*x.shape, V). What it says of visible ones is the network's."""
        return token_log_probs(self.output, self.process.mask_id)

    def at(self, positions: Tensor, *, temperature: float = 1.0, top_p: float | None = None) -> Tensor:
        """:attr:`log_probs` of some positions only: of (B, m) indices into the flattened events, (B, m, V)."""
        logits = self.output.flatten(1, -2)
        rows = logits.gather(1, positions[..., None].expand(*positions.shape, logits.shape[-1]))
        return token_log_probs(rows, self.process.mask_id, temperature=temperature, top_p=top_p)

    @property
    def x0(self) -> Tensor:
        """x with its masks replaced by the most probable tokens; x's shape and type."""
        return torch.where(self.hidden, self.log_probs.argmax(-1).to(self.x.dtype), self.x)

    @checks.arguments(
        count=checks.Integer(1), generator=checks.generators | None, precision=checks.Choice("f64", "f32", "two_level")
    )
    def draw(self, count: int = 1, *, generator: Generators | None = None, precision: str = "f64") -> Tensor:
        """Samples of x0: x with its masks replaced by draws, each position by itself. (count, *x.shape), in x's type."""
        log_p = self.log_probs
        drawn = [categorical(log_p, precision=precision, generator=generator) for _ in range(count)]
        return torch.where(self.hidden, torch.stack(drawn).to(self.x.dtype), self.x)

    def replace(self, output: Tensor, kind: str | None = None) -> TokenPrediction:
        """Other logits at the same (x, t).

        Raises:
            ValueError: an output that is no logits.
        """
        if kind not in (None, "logits"):
            raise ValueError(f"kind must be 'logits': of tokens there is no prediction by {kind!r}")
        return TokenPrediction(output, self.x, self.t, self.process, timed=self.timed)

    def rebase(self, x: Tensor) -> TokenPrediction:
        """The same logits, taken to be said of x."""
        return self if x is self.x else TokenPrediction(self.output, x, self.t, self.process, timed=self.timed)


class TokenDenoiser:
    """A network of tokens: the callable ``(x, t) -> TokenPrediction`` that samplers take.

    Args:
        model: ``x -> logits``, x of (B, L) or (B, ...) integers, logits (*x.shape, V); or what has ``.logits``, as models of
            transformers return. With ``told`` it is called with a second argument.
        process: the masking that it was trained with.
        told: what else the network is told: "nothing" (its optimum does not depend on the time), "time", t of (B,), or "masked",
            the part of x that is hidden, (B,); float32.
        unconditional: the network without its condition, for guidance.

    Attributes:
        nfe, evaluations: as of :class:`polyak.generate.Denoiser`.

    Example:
        >>> denoiser = TokenDenoiser(lambda x: torch.zeros(*x.shape, 5), MaskedProcess(5))
        >>> denoiser(torch.tensor([[5, 2]]), 0.5).x0
        tensor([[0, 2]])
    """

    @checks.arguments(
        model=_MODEL, process=_MASKED, told=checks.Choice("nothing", "time", "masked"), unconditional=_MODEL | None
    )
    def __init__(
        self,
        model: Callable[..., Any],
        process: MaskedProcess,
        *,
        told: str = "nothing",
        unconditional: Callable[..., Any] | None = None,
    ) -> None:
        self.model, self.process, self.told, self.unconditional = model, process, told, unconditional
        self.nfe = self.evaluations = 0

    def __call__(self, x: Tensor, t: float | Tensor) -> TokenPrediction:
        """The prediction at x, integers of (B, L) or (B, ...), and t, a number or (B,)."""
        self.nfe += 1
        return self._ask(self.model, x, t)

    def pair(self, x: Tensor, t: float | Tensor) -> tuple[TokenPrediction, TokenPrediction]:
        """The conditional and the unconditional prediction: one NFE, two evaluations."""
        if self.unconditional is None:
            raise ValueError(
                "guidance needs both predictions; give TokenDenoiser(unconditional=...), or leave guidance out"
            )
        self.nfe += 1
        return self._ask(self.model, x, t), self._ask(self.unconditional, x, t)

    def logits(self, x: Tensor, t: float | Tensor) -> Tensor:
        """What the network says of x at t."""
        return self._run(self.model, x, t)

    def _ask(self, model: Callable[..., Any], x: Tensor, t: float | Tensor) -> TokenPrediction:
        self.evaluations += 1
        one_for_each_row(t, x)  # before the network is asked
        return TokenPrediction(self._run(model, x, t), x, t, self.process, timed=self.told == "time")

    def _run(self, model: Callable[..., Any], x: Tensor, t: float | Tensor) -> Tensor:
        if self.told == "nothing":
            said = model(x)
        elif self.told == "masked":
            said = model(x, (x == self.process.mask_id).flatten(1).float().mean(1))
        elif isinstance(t, Tensor):
            said = model(x, t.to(x.device, wide(x.device)).float().expand(len(x)))
        else:
            said = model(x, torch.full((len(x),), float(t), device=x.device))
        return getattr(said, "logits", said)
