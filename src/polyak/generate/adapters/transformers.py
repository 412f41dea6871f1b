"""Masked language models of transformers as networks of a marginalization model: their logits, and a head of marginals.

    bert = AutoModelForMaskedLM.from_pretrained("bert-base-uncased")
    net = MaskedLMDual(bert, length=32, mask=tokenizer.mask_token_id, first=tokenizer.cls_token_id, last=tokenizer.sep_token_id)
    model = MarginalizationModel(net, net.num_values, 32)

Value v stands for token ``tokens[v - 1]``, and 0 for the mask.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from polyak.core import checks

__all__ = ["MaskedLMDual"]

_TOKEN = checks.Integer(0)


class MaskedLMDual(nn.Module):
    """A masked language model, with a head of marginals on the last hidden state of the first token.

    Any model that is called as transformers' are will do: ``model(input_ids=ids, output_hidden_states=True)`` with ``logits`` and
    ``hidden_states``, and a ``config`` that says ``vocab_size`` and ``hidden_size``. That head is new, and has to be trained.

    Args:
        model: such a model. Put it in evaluation mode: with dropout no two calls agree.
        length: D, how many tokens are modelled.
        mask: the mask's token.
        tokens: those that are the values 1 to K; all but the mask by default, in the vocabulary's order.
        first, last: tokens that stand before and after, or None for none. Without a first one the head is on the mean.
    """

    tokens: Tensor

    @checks.arguments(
        model=checks.module, length=checks.Integer(1, 1_000_000), mask=_TOKEN,
        tokens=checks.Each(_TOKEN, least=2) | None, first=_TOKEN | None, last=_TOKEN | None,
    )  # fmt: skip
    def __init__(
        self,
        model: nn.Module,
        length: int,
        mask: int,
        *,
        tokens: Sequence[int] | None = None,
        first: int | None = None,
        last: int | None = None,
    ) -> None:
        super().__init__()
        config: Any = getattr(model, "config", None)
        size, width = getattr(config, "vocab_size", None), getattr(config, "hidden_size", None)
        if not isinstance(size, int) or not isinstance(width, int):
            raise TypeError("model must have a config with vocab_size and hidden_size, as transformers' models have")
        chosen = [i for i in range(size) if i != mask] if tokens is None else [int(i) for i in tokens]
        for name, some in (("mask", [mask]), ("tokens", chosen), ("first", [first]), ("last", [last])):
            if beyond := [i for i in some if i is not None and i >= size]:
                raise ValueError(f"{name} must be below the vocabulary's size, {size}, got {beyond[0]}")
        if mask in chosen or len(set(chosen)) < len(chosen):
            raise ValueError("tokens must differ from each other and from the mask")
        self.model, self.length, self.num_values = model, length, len(chosen)
        self.first, self.last = first, last
        self.register_buffer("tokens", torch.tensor([mask, *chosen]))
        like = next(model.parameters())
        head = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, 1))
        self.of_marginals = head.to(like.device, like.dtype)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """f, [B], and logits, [B, D, K], for x of int64, [B, D], 0 for unknown."""
        said = self._call(x, True)
        hidden = said.hidden_states[-1]
        return self.of_marginals(hidden.mean(1) if self.first is None else hidden[:, 0])[:, 0], self._logits(said)

    def conditional(self, x: Tensor) -> Tensor:
        """The logits alone."""
        return self._logits(self._call(x, False))

    def _call(self, x: Tensor, hidden: bool) -> Any:
        ids = self.tokens[x]
        if self.first is not None:
            ids = F.pad(ids, (1, 0), value=self.first)
        if self.last is not None:
            ids = F.pad(ids, (0, 1), value=self.last)
        return self.model(input_ids=ids, output_hidden_states=hidden)

    def _logits(self, said: Any) -> Tensor:
        begin = 0 if self.first is None else 1
        return said.logits[:, begin : begin + self.length, self.tokens[1:]]
