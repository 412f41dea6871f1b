"""APO with transformers' and TRL's trainers, and with ``generate``.

def trainer_factory(model, ref_model, pairs):
    args = DPOConfig(output_dir, beta=0.1, learning_rate=1e-6, num_train_epochs=1)
    return DPOTrainer(model, ref_model, args, train_dataset=pairs, processing_class=tokenizer)

iterate_dpo(trainer_factory, 3, sampler, labeler, APO(alpha=0.3), model=model)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

try:
    from transformers import LogitsProcessor, TrainerCallback
except ImportError as error:
    raise ImportError("polyak.optim.apo.trainers needs transformers: pip install 'polyak[preference]'") from error

from polyak.core import checks
from polyak.optim.apo import lora
from polyak.optim.apo.exact import ALPHA
from polyak.optim.apo.policies import combined_logits, evaluating
from polyak.optim.apo.rounds import APO
from polyak.optim.apo.training import STALE
from polyak.optim.apo.weights import check_same_vocabulary, unwrapped


class Trainer(Protocol):
    """What :func:`iterate_dpo` needs of a trainer."""

    def train(self) -> Any: ...


_TOKENIZER = checks.Like("a tokenizer", "get_vocab") | None
_APO = checks.Instance(APO, words="an APO")


@checks.arguments(
    trainer_factory=checks.Function("a function (model, ref_model, pairs) -> trainer", 3, classes=True),
    rounds=checks.Integer(1), sampler=checks.Function("a function (model, t) -> responses", 2),
    labeler=checks.Function("a function of the responses", 1), apo=_APO, model=checks.module, tokenizer=_TOKENIZER,
)  # fmt: skip
def iterate_dpo(
    trainer_factory: Callable[[nn.Module, nn.Module | None, Any], Trainer],
    rounds: int,
    sampler: Callable[[nn.Module, int], Any],
    labeler: Callable[[Any], Any],
    apo: APO,
    *,
    model: nn.Module,
    tokenizer: Any = None,
) -> nn.Module:
    """Rounds of sampling, labelling and training, with APO between them; works with TRL's ``DPOTrainer`` as it is.

    Args:
        trainer_factory: (model, ref_model, pairs) -> a trainer of the round, with an optimizer of its own. ``ref_model`` is
            pi_t and has to be used; for LoRA adapters it is None, since TRL takes the adapter it finds for the reference.
        rounds: how many more rounds; a run may have begun before (:meth:`APO.load_state_dict`).
        sampler: (model, t) -> responses to the prompts of round t, counted from 1. The model is pi_t.
        labeler: responses -> pairs, as the trainer takes them.
        apo: in the space of parameters.
        model: trained in place.
        tokenizer: must not change between calls; compared by vocabulary.

    Returns:
        The model with the last trained weights, ``theta^_{T+1}``; ``apo.swap(model)`` puts the extrapolated ones in.

    Raises:
        ValueError: a trainer that trains another model, uses another reference or moves it; pairs that bring
            log-probabilities of a reference.

    Example:
        >>> iterate_dpo(trainer_factory, 3, sampler, labeler, APO(alpha=0.3), model=model)
    """
    if apo.space != "parameter":
        raise ValueError(
            "apo: iterate_dpo needs space 'parameter': a trainer's reference is one model; use train_round for 'logits'"
        )
    if apo.swapped:
        apo.swap(model)
    adapter = lora.has_adapter(model)
    if not apo.round:
        apo._begin(model, None, tokenizer)
    # TRL makes the reference of an adapter itself.
    reference = None if adapter else apo.reference(model)
    for _ in range(rounds):
        pairs = labeler(sampler(model, apo.round))
        _check_pairs(pairs)
        if adapter:
            _drop_reference_adapter(model)
        with _own_forward(model), _own_forward(reference):
            trainer = trainer_factory(model, reference, pairs)
            _check_trainer(trainer, model, reference)
            trainer.train()
        apo._advance(model, None, tokenizer, reference)
        if reference is not None:
            apo.reference(model, reference)
    apo.swap(model)
    return model


class APOCallback(TrainerCallback):
    """Extrapolates at the end of a trainer's training, for loops of one's own: one trainer a round, one APO for all.

    Args:
        apo: started by the first trainer's beginning if it has not been.
        reference: the trainer's ``ref_model``, which then becomes the next round's in place. None: it is left alone, and
            ``callback.reference`` holds a new one (for LoRA adapters TRL makes it from the adapter).

    Raises:
        ValueError: the trainer moves its reference (``sync_ref_model``).
    """

    @checks.arguments(apo=_APO, reference=checks.module | None)
    def __init__(self, apo: APO, reference: nn.Module | None = None) -> None:
        self.apo, self.reference = apo, reference

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if getattr(args, "sync_ref_model", False):
            raise ValueError(
                "sync_ref_model moves the reference within a round; APO needs the round's own: turn it off"
            )
        if not self.apo.round:
            self.apo.start(kwargs["model"], self.reference, tokenizer=_tokenizer(kwargs.get("processing_class")))

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        tokenizer = _tokenizer(kwargs.get("processing_class"))
        self.reference = self.apo.after_round(kwargs["model"], self.reference, tokenizer=tokenizer)


class ExtrapolatedLogits(LogitsProcessor):
    """Samples from ``(1 + alpha) log pi^_{t+1} - alpha log pi^_t`` per token: APO in the space of logits, in ``generate``.

    Put it first among the processors: it takes the model's own logits. It runs the previous model beside the one that
    generates, with a cache of its own, which it makes anew where sequences were reordered (beams) or are other ones.

    Args:
        previous: the model of the round before; of an :class:`ExtrapolatedPolicy`, its ``previous``.
        alpha: in [0, 1).
        attention_mask: the prompts' (batch, length), where they are padded on the left.
        model: the one that generates; given, its vocabulary is compared.

    Raises:
        ValueError: alpha out of range, another vocabulary.

    Example:
        >>> model.generate(**inputs, logits_processor=[ExtrapolatedLogits(previous, 0.3, inputs["attention_mask"])])
    """

    @checks.arguments(
        previous=checks.module, alpha=ALPHA, attention_mask=checks.Tensor(ndim=2) | None, model=checks.module | None
    )
    def __init__(
        self, previous: nn.Module, alpha: float, attention_mask: Tensor | None = None, *, model: nn.Module | None = None
    ) -> None:
        self.previous, self.alpha, self.attention_mask = previous, alpha, attention_mask
        if model is not None:
            check_same_vocabulary(model, previous)
        self._seen: Tensor | None = None
        self._cache: Any = None

    @torch.no_grad()
    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if not self.alpha:
            return scores
        old = self._next_logits(input_ids)
        if old.shape != scores.shape:
            raise ValueError(
                f"previous has logits of shape {tuple(old.shape)}, the model {tuple(scores.shape)}: other tokenizers"
            )
        return combined_logits(scores, old, self.alpha)

    def _next_logits(self, input_ids: Tensor) -> Tensor:
        seen = self._seen
        grown = seen is not None and seen.shape == input_ids[:, :-1].shape and torch.equal(seen, input_ids[:, :-1])
        options: dict[str, Any] = {"use_cache": True}
        if self.attention_mask is not None:
            mask = self.attention_mask.to(input_ids.device)
            repeats = len(input_ids) // len(mask)
            mask = mask.repeat_interleave(repeats, 0)
            new = mask.new_ones(len(input_ids), input_ids.shape[1] - mask.shape[1])
            mask = torch.cat([mask, new], 1)
            positions = (mask.long().cumsum(1) - 1).clamp(min=0)
            options |= {"attention_mask": mask, "position_ids": positions[:, -1:] if grown else positions}
        if grown:
            options["past_key_values"] = self._cache
        with evaluating(self.previous):
            out = self.previous(input_ids=input_ids[:, -1:] if grown else input_ids, **options)
        self._seen, self._cache = input_ids.clone(), out.past_key_values
        return out.logits[:, -1]


def _check_pairs(pairs: Any) -> None:
    columns = getattr(pairs, "column_names", None)
    if columns is None and isinstance(pairs, list) and pairs and isinstance(pairs[0], dict):
        columns = list(pairs[0])
    if stale := [name for name in STALE if name in (columns or ())]:
        raise ValueError(f"pairs have the column {stale[0]!r}: log-probabilities of another reference; leave it out")


def _check_trainer(trainer: Any, model: nn.Module, reference: nn.Module | None) -> None:
    if not callable(getattr(trainer, "train", None)):
        raise TypeError(f"trainer_factory must return an object with train(), got {type(trainer).__name__}")
    if hasattr(trainer, "model") and unwrapped(trainer.model) is not unwrapped(model):
        raise ValueError("the trainer trains another model: trainer_factory must hand its first argument on")
    if reference is not None and hasattr(trainer, "ref_model"):
        used = trainer.ref_model
        if used is None or unwrapped(used) is not reference:
            raise ValueError(
                "the trainer has a reference of its own: trainer_factory must hand ref_model on, which is pi_t"
            )
    if getattr(getattr(trainer, "args", None), "sync_ref_model", False):
        raise ValueError("sync_ref_model moves the reference within a round; APO needs the round's own: turn it off")


def _drop_reference_adapter(model: Any) -> None:
    """TRL copies the adapter into one named "ref", once: the last round's must go."""
    if "ref" in getattr(model, "peft_config", {}):
        model.delete_adapter("ref")


def _tokenizer(processing: Any) -> Any:
    """The tokenizer, or that of a processor; None where there is none."""
    inner = getattr(processing, "tokenizer", processing)
    return inner if hasattr(inner, "get_vocab") else None


@contextmanager
def _own_forward(model: nn.Module | None) -> Iterator[None]:
    """Take back what trainers hang on forward passes (fused heads, autocast): each new trainer would hang its own on top."""
    modules = [] if model is None else [(module, vars(module).get("forward")) for module in model.modules()]
    try:
        yield
    finally:
        for module, forward in modules:
            if forward is None:
                vars(module).pop("forward", None)
            else:
                module.forward = forward
