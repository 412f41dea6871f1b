"""Decoding with masked language models, as transformers' ``custom_generate`` functions are called: ``(model, input_ids, ...)``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from polyak.core import checks
from polyak.generate.masked_diffusion.first_hitting import FirstHitting
from polyak.generate.process import Generators, MaskedProcess
from polyak.generate.sampling import sample
from polyak.generate.solver import SOLVER, Solver, Step
from polyak.generate.steering import Steering
from polyak.generate.tokens import TokenDenoiser


@checks.arguments(
    model=checks.Function("a model (input_ids, attention_mask=...) -> logits"), input_ids=checks.Tensor(ndim=2),
    max_new_tokens=checks.Integer(0), mask_token_id=checks.Integer(0) | None, attention_mask=checks.Tensor(ndim=2) | None,
    solver=SOLVER | None, steering=checks.Like("a Steering (an instance, not the class)", "particles", "step") | None,
    generator=checks.generators | None, callback=checks.Function("a function of a Step", 1) | None,
)  # fmt: skip
@torch.no_grad()
def generate_masked(
    model: Callable[..., Any],
    input_ids: Tensor,
    max_new_tokens: int = 0,
    *,
    mask_token_id: int | None = None,
    attention_mask: Tensor | None = None,
    solver: Solver | None = None,
    steering: Steering | None = None,
    generator: Generators | None = None,
    callback: Callable[[Step], None] | None = None,
) -> Tensor:
    """Fill the masks of a batch of prompts, and ``max_new_tokens`` more behind it, with a masked language model.

    Args:
        model: a ``*ForMaskedLM`` model of transformers, or another that says logits (B, L, V) of ``input_ids``.
        input_ids: (B, L) tokens; those that are masks are filled, all others are the prompt and stay.
        mask_token_id: default: that of ``model.config``.
        attention_mask: (B, L), 1 where a position is read (0: padding); handed to the model, with 1 for new tokens.
        solver: default ``FirstHitting()``: one call for each token. ``FirstHitting(steps=N, temperature=..., top_p=...)`` makes N.
        steering: weighs and resamples ``steering.particles`` copies of each prompt after each reveal.
        generator, callback: as for :func:`polyak.generate.sample`.

    Returns:
        (B, L + max_new_tokens), input_ids' type; with steering what it selects.

    Raises:
        ValueError: no mask's id, ids outside the model's vocabulary, or shapes that do not fit.

    Example:
        >>> bert = lambda input_ids: torch.zeros(*input_ids.shape, 6)
        >>> generate_masked(bert, torch.tensor([[2, 3]]), max_new_tokens=2, mask_token_id=4).shape
        torch.Size([1, 4])
    """
    if mask_token_id is None:
        mask_token_id = getattr(getattr(model, "config", None), "mask_token_id", None)
        if mask_token_id is None:
            raise ValueError("mask_token_id is needed: the model's config does not say it (the tokenizer does)")
    if attention_mask is not None and attention_mask.shape != input_ids.shape:
        raise ValueError(
            f"attention_mask must have input_ids' shape {tuple(input_ids.shape)}, got {tuple(attention_mask.shape)}"
        )
    k = 1 if steering is None else checks.integer("steering.particles", steering.particles, least=1)
    rows = len(input_ids)
    if input_ids.is_floating_point() or input_ids.is_complex() or input_ids.dtype == torch.bool:
        raise ValueError(f"input_ids must be integers, got {input_ids.dtype}")
    x = torch.cat([input_ids, input_ids.new_full((rows, max_new_tokens), mask_token_id)], 1).repeat_interleave(k, 0)
    told: dict[str, Tensor] = {}
    if attention_mask is not None:
        read = torch.cat([attention_mask, attention_mask.new_ones(rows, max_new_tokens)], 1)
        told["attention_mask"] = read.repeat_interleave(k, 0)

    def says(x: Tensor) -> Any:
        return model(x, **told)

    if not x.numel():
        return x
    vocab = _vocabulary(model, x, told)
    if mask_token_id > vocab:
        raise ValueError(f"mask_token_id must be at most {vocab}, the model's logits, got {mask_token_id}")
    process = MaskedProcess(vocab, mask_token_id)
    process.check_state("input_ids", x)
    return sample(
        TokenDenoiser(says, process), x, solver=solver or FirstHitting(), steering=steering, generator=generator,
        callback=callback,
    )  # fmt: skip


def _vocabulary(model: Any, x: Tensor, told: dict[str, Tensor]) -> int:
    """How many logits the model says: its config's word, or one call's."""
    known = getattr(getattr(model, "config", None), "vocab_size", None)
    if isinstance(known, int):
        return known
    said = model(x[:1], **{name: value[:1] for name, value in told.items()})
    logits: Tensor = getattr(said, "logits", said)
    if not isinstance(logits, Tensor) or logits.ndim != 3:
        raise ValueError(f"model must say logits (B, L, V), got {type(said).__name__}")
    return logits.shape[-1]
