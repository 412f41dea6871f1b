"""Two measures of generated text, which say something only together: low perplexity is easy for text without variety."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from polyak.core import checks

_TOKENS = checks.Tensor(least_ndim=2)


@checks.arguments(texts=_TOKENS, lm=checks.Function("a function tokens -> logits of each next token", 1))
@torch.no_grad()
def generative_perplexity(texts: Tensor, lm: Callable[[Tensor], Any]) -> Tensor:
    """``exp`` of the mean negative log-likelihood per token that another model gives to texts; the first token is given.

    Report it with :func:`sentence_entropy`: a sampler that repeats itself has a low perplexity.

    Args:
        texts: (B, L) tokens of the judge, L at least 2.
        lm: of (B, L) tokens says logits (B, L, V), those at i of the token at i + 1; or what has ``.logits``.

    Returns:
        (), float64.
    """
    _check_tokens("texts", texts)
    if texts.ndim != 2 or texts.shape[1] < 2 or not len(texts):
        raise ValueError(f"texts must have shape (B, L) with L of at least 2, got {tuple(texts.shape)}")
    said = lm(texts)
    logits: Tensor = getattr(said, "logits", said)
    if logits.ndim != 3 or logits.shape[:2] != texts.shape:
        raise ValueError(f"logits of lm must have shape {(*texts.shape, 'V')}, got {tuple(logits.shape)}")
    log_p = logits[:, :-1].float().log_softmax(-1).gather(-1, texts[:, 1:].long()[..., None])
    return log_p.double().mean().neg().exp()


@checks.arguments(tokens=_TOKENS)
def sentence_entropy(tokens: Tensor) -> Tensor:
    """The entropy in nats of the histogram of tokens inside each sample: (..., L) integers to (...), float64.

    At most ``log L``.
    """
    _check_tokens("tokens", tokens)
    if not tokens.shape[-1]:
        raise ValueError(f"tokens must not be empty, got shape {tuple(tokens.shape)}")
    # Of a token that comes c times in L: each of its places has -log(c / L), and the mean over places is the entropy.
    same = tokens[..., :, None] == tokens[..., None, :]
    return -(same.sum(-1).double() / tokens.shape[-1]).log().mean(-1)


def _check_tokens(name: str, tokens: Tensor) -> None:
    if tokens.is_floating_point() or tokens.is_complex() or tokens.dtype == torch.bool:
        raise ValueError(f"{name} must be integers, got {tokens.dtype}")
