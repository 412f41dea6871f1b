"""Language models of LLaMA's kind on C4, at the sizes where optimizers for pre-training are compared (those of GaLore)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from polyak.claims._problems import Problem, _evaluation
from polyak.lab import data

VOCABULARY = 32_000
# hidden width, width of the feed-forward layer, heads, layers
SIZES = {
    "60m": (512, 1376, 8, 8),
    "130m": (768, 2048, 12, 12),
    "350m": (1024, 2736, 16, 24),
    "1b": (2048, 5461, 32, 24),
}


def llama_c4(
    seed: int,
    device: str,
    *,
    size: str,
    batch: int,
    micro_batch: int,
    length: int = 256,
    measured_tokens: int = 10_000_000,
) -> Problem:
    """The next token of C4's documents, each cut or padded to ``length`` tokens; bfloat16 weights.

    The gradients of ``batch // micro_batch`` batches make one step. The result is ``perplexity`` on the first
    ``measured_tokens`` of the validation split.

    Raises:
        DataError: transformers or datasets is not installed, or C4 or its tokenizer cannot be loaded.
    """
    try:
        transformers, datasets = import_module("transformers"), import_module("datasets")
    except ImportError as error:
        raise data.DataError(
            "C4 at the paper's scale needs transformers and datasets: pip install transformers datasets"
        ) from error
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained("t5-base", model_max_length=length)
        training, validation = (
            datasets.load_dataset("allenai/c4", "en", split=split, streaming=True) for split in ("train", "validation")
        )
    except Exception as error:  # whatever the network and the libraries' many layers raise
        raise data.DataError(f"C4 and t5-base's tokenizer must come from the hub; they could not ({error})") from error
    width, expanded, heads, layers = SIZES[size]
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        intermediate_size=expanded,
        num_attention_heads=heads,
        num_hidden_layers=layers,
        max_position_embeddings=1024,
        rms_norm_eps=1e-6,
        use_cache=False,
        tie_word_embeddings=False,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = transformers.LlamaForCausalLM(config).to(device, torch.bfloat16)
    documents = training.shuffle(seed=seed, buffer_size=10_000)

    def tokens(split: Any) -> Iterator[Tensor]:
        """Batches of ``(micro_batch, length)`` tokens; padding is -100."""
        for some in split.iter(batch_size=micro_batch):
            read = tokenizer(
                some["text"], max_length=length, truncation=True, padding="max_length", return_tensors="pt"
            )
            if len(read["input_ids"]) == micro_batch:
                yield read["input_ids"].masked_fill(read["attention_mask"] == 0, -100).to(device)

    def forever() -> Iterator[Tensor]:
        while True:
            yield from tokens(documents)

    def loss(some: Tensor, reduction: str = "mean") -> Tensor:
        # Padding comes last and nothing looks ahead: which token stands for it does not matter.
        logits = model(input_ids=some.clamp(min=0)).logits[:, :-1]
        return F.cross_entropy(logits.flatten(0, 1).float(), some[:, 1:].flatten(), reduction=reduction)

    def results() -> dict[str, float]:
        total, count = 0.0, 0
        with _evaluation(model):
            for some in tokens(validation):
                total += loss(some, "sum").item()
                count += int((some[:, 1:] >= 0).sum())
                if count >= measured_tokens:
                    break
        return {"perplexity": math.exp(total / count)}

    return Problem(model=model, batches=forever(), loss=loss, results=results, accumulate=max(1, batch // micro_batch))
