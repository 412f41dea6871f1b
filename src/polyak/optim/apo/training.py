"""One round of training without TRL: a causal model against its frozen reference, on pairs of responses."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from polyak.core import checks
from polyak.optim.apo.losses import PreferenceLoss, check_finite, dpo_loss, ipo_loss, sequence_logps, sppo_loss
from polyak.optim.apo.policies import without_dropout
from polyak.optim.apo.weights import unwrapped

Batch = Mapping[str, Any] | Sequence[Mapping[str, Any]]
COLUMNS = ("prompt_ids", "chosen_ids", "rejected_ids")
STALE = ("ref_chosen_logps", "ref_rejected_logps")
WINS = ("chosen_wins", "rejected_wins")


_MEANS = checks.Each(checks.measured)


@checks.arguments(loss=_MEANS, accuracy=_MEANS, margin=_MEANS, degenerate=checks.Integer(0))
@dataclass(frozen=True)
class RoundReport:
    """What a round measured, one number per step: the mean loss, how often the chosen response has the higher implicit reward,
    and by how much. ``degenerate`` counts pairs without a preference: equal responses, or an empty one."""

    loss: list[float]
    accuracy: list[float]
    margin: list[float]
    degenerate: int

    @property
    def steps(self) -> int:
        return len(self.loss)


_BATCHES = checks.Stream("an iterable of batches")


@checks.arguments(
    model=checks.module, reference=checks.module, batches=_BATCHES,
    optimizer=checks.Function("a function of the parameters", 1, classes=True), loss=checks.Choice("dpo", "ipo", "sppo"),
    beta=checks.positive, max_grad_norm=checks.positive | None, pad_token_id=checks.Integer() | None,
)  # fmt: skip
def train_round(
    model: nn.Module,
    reference: nn.Module,
    batches: Iterable[Batch],
    *,
    optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer],
    loss: Literal["dpo", "ipo", "sppo"] = "dpo",
    beta: float = 0.1,
    max_grad_norm: float | None = None,
    pad_token_id: int | None = None,
) -> RoundReport:
    """Train a model for one round, a step per batch, in place.

    A pair without a preference (equal responses, or an empty one) counts with the loss of ``h = 0`` and has no gradient; a
    warning tells how many there were. Dropout is off, in both models. Each step waits once for the device, to look for NaN.

    Args:
        model: called with ``input_ids`` and ``attention_mask`` (2 B, length), returns an object with ``logits``: any causal
            model of transformers, with or without an adapter.
        reference: pi_t, from :class:`polyak.optim.apo.APO`; called alike, without gradients.
        batches: each a dict as TRL's ``DataCollatorForPreference`` makes it, ``input_ids``, ``attention_mask`` and
            ``completion_mask`` with the B chosen sequences before the B rejected; or a list of dicts with the lists of token
            ids ``prompt_ids``, ``chosen_ids`` and ``rejected_ids``, for :func:`collate`. SPPO also reads ``chosen_wins`` and
            ``rejected_wins``, the probabilities of beating a response of pi_t; without them it takes 1 and 0.
        optimizer: a function of the trainable parameters: every round has a new optimizer.
        loss: "dpo", "ipo" or "sppo".
        beta: > 0: DPO's beta, IPO's tau, 1 / SPPO's eta.
        max_grad_norm: where the gradient is clipped; None: nowhere.
        pad_token_id: for batches that are lists. Default: the model's configuration's, else 0 (padding is masked).

    Raises:
        ValueError: arguments out of range, no batch at all, the model as its own reference, batches of another form,
            log-probabilities of another round among them, or a log-probability that is not finite (with the batch's and the
            pair's index; the model is then as the last step left it).
    """
    if unwrapped(reference) is unwrapped(model):
        raise ValueError("reference must be frozen weights of its own, got the model that is trained")
    params = [p for p in model.parameters() if p.requires_grad]
    if not params:
        raise ValueError("model has no trainable parameter")
    config = getattr(unwrapped(model), "config", None)
    padding = pad_token_id if pad_token_id is not None else getattr(config, "pad_token_id", None) or 0
    cache = {} if config is None else {"use_cache": False}
    steps, degenerate, stepper = [], [], None
    with without_dropout(model):
        for number, batch in enumerate(batches):
            data = _checked(batch, number, padding, params[0].device)
            stepper = stepper or optimizer(params)
            with torch.no_grad():
                ref = _logps(reference, data, cache)
            logp = _logps(model, data, cache)
            check_finite(f"batch {number}: ", log_probability=logp, reference_log_probability=ref)
            empty = _degenerate(data)
            value = _loss(loss, beta, logp, ref, empty, data)
            stepper.zero_grad()
            value.loss.mean().backward()
            if max_grad_norm is not None:
                torch.nn.utils.clip_grad_norm_(params, max_grad_norm)
            stepper.step()
            margin = value.chosen_rewards - value.rejected_rewards
            steps.append(torch.stack([value.loss.detach().mean(), (margin > 0).to(margin).mean(), margin.mean()]))
            degenerate.append(empty.sum())
    if stepper is None:
        raise ValueError("batches holds no batch: there is nothing to train on")
    stepper.zero_grad()
    count = int(torch.stack(degenerate).sum())
    if count:
        warnings.warn(
            f"{count} pairs have equal responses, or an empty one: they have no preference and were not learned from",
            stacklevel=2,
        )
    return RoundReport(*(list(column) for column in zip(*torch.stack(steps).tolist(), strict=True)), degenerate=count)


@checks.arguments(examples=checks.Each(checks.Map(), words="a sequence of dicts"), pad_token_id=checks.Integer())
def collate(examples: Sequence[Mapping[str, Any]], pad_token_id: int = 0) -> dict[str, Tensor]:
    """Lists of token ids as tensors: what TRL's ``DataCollatorForPreference`` makes of ``prompt_ids``, ``chosen_ids`` and
    ``rejected_ids``; with ``chosen_wins`` and ``rejected_wins`` (batch,) where all examples have them."""
    if not examples:
        raise ValueError("examples must hold at least one example, got none")
    for number, example in enumerate(examples):
        for name in COLUMNS:
            if name not in example:
                hint = checks.suggestion(name, example)
                raise ValueError(f"examples: example {number} has no {name!r}; it has {sorted(example)}{hint}")
        if not len(example["prompt_ids"]):
            raise ValueError(
                f"examples: example {number}: prompt_ids must hold at least one token, from which the first is predicted"
            )
    both = [(list(e["prompt_ids"]), list(e[side])) for side in COLUMNS[1:] for e in examples]
    length = max(len(prompt) + len(response) for prompt, response in both)

    def padded(rows: list[list[int]], value: int) -> Tensor:
        return torch.tensor([row + [value] * (length - len(row)) for row in rows], dtype=torch.long)

    data = {
        "input_ids": padded([p + r for p, r in both], pad_token_id),
        "attention_mask": padded([[1] * len(p + r) for p, r in both], 0),
        "completion_mask": padded([[0] * len(p) + [1] * len(r) for p, r in both], 0),
    }
    if all(name in e for e in examples for name in WINS):
        data |= {name: torch.tensor([float(e[name]) for e in examples]) for name in WINS}
    return data


def _checked(batch: Batch, number: int, padding: int, device: torch.device) -> dict[str, Tensor]:
    """A batch as tensors on the device."""
    if not isinstance(batch, (Mapping, list, tuple)):
        raise TypeError(f"batches[{number}] must be a dict, or a list of dicts, got {checks.shown(batch)}")
    examples = [batch] if isinstance(batch, Mapping) else list(batch)
    for example in examples:
        if stale := [name for name in STALE if name in example]:
            raise ValueError(
                f"batch {number} has {stale[0]!r}: log-probabilities computed before may be of another round's reference; "
                "leave them out"
            )
    data = dict(batch) if isinstance(batch, Mapping) else collate(batch, padding)
    for name in ("input_ids", "attention_mask", "completion_mask"):
        value = data.get(name)
        if not isinstance(value, Tensor) or value.ndim != 2 or len(value) % 2 or value.shape != data["input_ids"].shape:
            got = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
            raise ValueError(
                f"batch {number}: {name} must be a tensor (2 pairs, length), chosen before rejected, got {got}"
            )
    return {name: value.to(device) for name, value in data.items() if isinstance(value, Tensor)}


def _logps(model: nn.Module, data: Mapping[str, Tensor], options: Mapping[str, Any]) -> Tensor:
    """Log-probabilities of all sequences' responses, (2 B,)."""
    logits = model(input_ids=data["input_ids"], attention_mask=data["attention_mask"], **options).logits
    return sequence_logps(logits, data["input_ids"], data["completion_mask"])


def _degenerate(data: Mapping[str, Tensor]) -> Tensor:
    """Which pairs have equal responses, or an empty one, (B,)."""
    mask = data["completion_mask"].bool()
    mask[:, 0] = False
    chosen, rejected = torch.where(mask, data["input_ids"], -1).chunk(2)
    up, down = mask.chunk(2)
    return (chosen == rejected).all(1) | ~up.any(1) | ~down.any(1)


def _loss(
    kind: str, beta: float, logp: Tensor, ref: Tensor, empty: Tensor, data: Mapping[str, Tensor]
) -> PreferenceLoss:
    # Both ratios of a pair without a preference are 0, and constant.
    ratio = (logp - ref).masked_fill(empty.repeat(2), 0.0)
    zero = torch.zeros_like(ref)
    (up, down), (zero_up, zero_down) = ratio.chunk(2), zero.chunk(2)
    if kind == "dpo":
        return dpo_loss(up, down, zero_up, zero_down, beta)
    if kind == "ipo":
        return ipo_loss(up, down, zero_up, zero_down, beta)
    wins = {f"wins_{short}": data[name].to(up) for short, name in zip("wl", WINS, strict=True) if name in data}
    return sppo_loss(up, down, zero_up, zero_down, 1 / beta, **wins)
