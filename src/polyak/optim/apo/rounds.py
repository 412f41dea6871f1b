"""A run of APO over a model's rounds: what is kept between them, and one round of training.

apo = APO(alpha=0.3)
reference = apo.start(model)
for prompts in splits:
    pairs = label(sample(model, prompts))          # the model is pi_t, and so is the reference
    train_round(model, reference, pairs, optimizer=make_optimizer, loss="dpo", beta=0.1)
    reference = apo.after_round(model, reference)
apo.swap(model)                                    # the method's output: the last trained weights
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from polyak.core import checks
from polyak.optim.apo import lora
from polyak.optim.apo.exact import ALPHA
from polyak.optim.apo.extrapolate import check_masters, move_
from polyak.optim.apo.policies import ExtrapolatedPolicy, FrozenPolicy, frozen_copy
from polyak.optim.apo.weights import FILTER, Filter, Weights, assign_, previous_weights, trained_weights, unwrapped

_STATE = {"alpha", "space", "round", "swapped", "vocabulary", "kept", "before"}


class APO:
    """Accelerated preference optimization: Nesterov's extrapolation between rounds (He, Yuan, Gu, arXiv 2410.06293).

    After each round ``theta_{t+1} = theta^_{t+1} + alpha (theta^_{t+1} - theta^_t)``: the model from which the next round
    samples, starts and stays close to. What a run gives is ``theta^_{T+1}``, the last *trained* weights (:meth:`swap`).
    One copy of the trained weights is kept, ``theta^_t``.

    Args:
        alpha: in [0, 1); 0 is iterative DPO. Or "fista": (t - 1) / (t + 2) after round t, which is not in the paper.
        space: "parameter"; or "logits": the weights are left alone, and the next round's policy is
            ``(1 + alpha) log pi^_{t+1} - alpha log pi^_t``, normalized per token, which takes both models at each token
            (:class:`polyak.optim.apo.ExtrapolatedLogits` samples from it). Its rounds start from ``theta^_{t+1}``.
        device: where the kept copy lies; "cpu" spares the accelerator. Default: with the weights. Not for "logits".
        filter: a function of a weight's name, False for what is to stay out of it.

    Raises:
        ValueError: a value out of range.
    """

    @checks.arguments(
        alpha=checks.Choice("fista") | ALPHA, space=checks.Choice("parameter", "logits"), device=checks.device | None,
        filter=FILTER | None,
    )  # fmt: skip
    def __init__(
        self,
        alpha: float | Literal["fista"] = 0.3,
        space: Literal["parameter", "logits"] = "parameter",
        *,
        device: torch.device | str | None = None,
        filter: Filter | None = None,  # the word of extrapolate_
    ) -> None:
        self.alpha, self.space = alpha, space
        if device is not None and space == "logits":
            raise ValueError("space 'logits' runs the kept weights at every token: device= is for space 'parameter'")
        self.device, self.filter = device, filter
        self.round = 0  # the round that is under way; 0 before the start
        self.swapped = False
        self._kept: Weights = {}
        self._before: Weights = {}  # in the space of logits: the weights one round before the kept ones
        self._vocabulary = ""

    def __repr__(self) -> str:
        return f"APO(alpha={self.alpha!r}, space={self.space!r}, round={self.round})"

    @property
    def kept(self) -> Weights:
        """The kept copy: ``theta^_t`` during round t (after :meth:`swap`, the extrapolated weights)."""
        return self._kept

    def factor(self, t: int) -> float:
        """The alpha that follows round t, counted from 1."""
        return (t - 1) / (t + 2) if self.alpha == "fista" else float(self.alpha)

    def start(
        self,
        model: nn.Module,
        reference: nn.Module | None = None,
        *,
        masters: Mapping[str, Tensor] | None = None,
        tokenizer: Any = None,
    ) -> nn.Module:
        """Begin a run from the model's weights; returns the first round's reference, as :meth:`after_round` does."""
        self._begin(model, masters, tokenizer, reference)
        return self.reference(model, reference)

    def after_round(
        self,
        model: nn.Module,
        reference: nn.Module | None = None,
        *,
        masters: Mapping[str, Tensor] | None = None,
        tokenizer: Any = None,
    ) -> nn.Module:
        """End a round: extrapolate the trained model in place, and return the next round's reference.

        Args:
            model: as it was trained, ``theta^_{t+1}``; afterwards ``theta_{t+1}``.
            reference: the last round's, whose memory is used again. Left out: a frozen copy of the model, or, for an adapter,
                a :class:`FrozenPolicy` that shares the base weights. (TRL makes an adapter's reference itself.)
            masters: as for :func:`extrapolate_`; then they have to be given to :meth:`start`, too.
            tokenizer: compared with the one that the run started with.

        Raises:
            RuntimeError: before :meth:`start`, or while the weights are swapped.
            ValueError: weights of other names or shapes than at the start, another tokenizer, quantized weights. Model and
                state are then as they were.
        """
        self._advance(model, masters, tokenizer, reference)
        return self.reference(model, reference)

    def reference(self, model: nn.Module, reference: nn.Module | None = None) -> nn.Module:
        """The reference of the round that the model is about to begin; for a run that goes on from a saved state.

        ``reference`` is a former one, whose memory is used again.
        """
        self._check_under_way("reference")
        weights, inner = trained_weights(model, self.filter), unwrapped(model)
        if self.space == "logits":
            current = FrozenPolicy(inner, self._kept)
            if not self._before:
                return current
            return ExtrapolatedPolicy(current, FrozenPolicy(inner, self._before), self.factor(self.round - 1))
        _check_reference(reference, weights)
        if isinstance(reference, FrozenPolicy):
            reference.weights = _filled(reference.weights, weights)
        elif reference is not None:
            own = dict(reference.named_parameters(remove_duplicate=False))
            with torch.no_grad():
                for name, p in weights.items():
                    own[name].copy_(p)
        elif lora.has_adapter(inner):
            return FrozenPolicy(inner, _filled({}, weights))
        else:
            return frozen_copy(inner)
        return reference

    def _begin(
        self, model: nn.Module, masters: Mapping[str, Tensor] | None, tokenizer: Any, reference: nn.Module | None = None
    ) -> None:
        if self.round:
            raise RuntimeError(f"this run has begun: it is in round {self.round}; make a new APO for a new run")
        weights = trained_weights(model, self.filter)
        check_masters(weights, masters)
        _check_reference(reference, weights)
        self._vocabulary = _digest(tokenizer)
        self._kept = {
            name: (masters or {}).get(name, p.detach()).to(self.device or p.device, copy=True)
            for name, p in weights.items()
        }
        self.round = 1

    def _advance(
        self, model: nn.Module, masters: Mapping[str, Tensor] | None, tokenizer: Any, reference: nn.Module | None = None
    ) -> None:
        self._check_under_way("after_round")
        weights = trained_weights(model, self.filter)
        kept = previous_weights(self._kept, weights, complete=True)
        check_masters(weights, masters)
        _check_reference(reference, weights)
        digest = _digest(tokenizer)
        if digest and self._vocabulary and digest != self._vocabulary:
            raise ValueError(f"tokenizer must be the one that the run started with ({self._vocabulary}), got {digest}")
        if self.space == "logits":
            self._before, self._kept = kept, _filled({}, weights)
        else:
            self._kept = move_(model, weights, kept, self.factor(self.round), masters=masters, keep=True)
        self.round += 1

    @torch.no_grad()
    def swap(self, model: nn.Module, *, masters: Mapping[str, Tensor] | None = None) -> None:
        """Exchange the model's extrapolated weights with the last trained ones, ``theta^``; once more exchanges them back.

        The trained weights are what the method gives: evaluate and save these, and say so where the extrapolated are shown.
        In the space of logits the model has the trained weights anyway, and nothing happens.
        """
        if not self.round:
            raise RuntimeError("swap comes after start")
        if self.space == "logits":
            return
        weights = trained_weights(model, self.filter)
        kept = previous_weights(self._kept, weights, complete=True)
        check_masters(weights, masters)
        masters = masters or {}
        for name, p in weights.items():
            if name not in masters and torch.promote_types(kept[name].dtype, p.dtype) != p.dtype:
                raise ValueError(f"{name!r} is kept in {kept[name].dtype} from its master: give masters to swap it")
        in_pairs = {name for pair in lora.pairs(weights) for name in pair}
        for name in weights.keys() - in_pairs:
            source = masters.get(name, weights[name])
            now = source.detach().clone()
            source.copy_(kept[name])
            weights[name].copy_(kept[name])
            kept[name].copy_(now)
        if in_pairs:
            now = {name: weights[name].detach().to(kept[name], copy=True) for name in in_pairs}
            assign_(model, {name: kept[name] for name in weights if name in in_pairs})
            kept.update(now)
        self._kept, self.swapped = kept, not self.swapped

    def state_dict(self) -> dict[str, Any]:
        """All that a run keeps beside the model: numbers, and the kept weights (not copied)."""
        return {
            "alpha": self.alpha, "space": self.space, "round": self.round, "swapped": self.swapped,
            "vocabulary": self._vocabulary, "kept": dict(self._kept), "before": dict(self._before),
        }  # fmt: skip

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where a run was saved; the model is saved and loaded by its owner.

        Raises:
            ValueError: keys that are missing or unknown, values out of range. This object is then as it was.
        """
        if wrong := _STATE.symmetric_difference(state):
            raise ValueError(f"a state of APO has {sorted(_STATE)}; missing or unknown: {sorted(wrong)}")
        fresh = APO(state["alpha"], state["space"], device=self.device, filter=self.filter)
        checks.integer("round", state["round"], least=0)
        self.alpha, self.space = fresh.alpha, fresh.space
        self.round, self.swapped, self._vocabulary = state["round"], bool(state["swapped"]), state["vocabulary"]
        self._kept, self._before = (
            {name: value.detach().to(self.device or value.device, copy=True) for name, value in state[which].items()}
            for which in ("kept", "before")
        )

    def _check_under_way(self, what: str) -> None:
        if not self.round:
            raise RuntimeError(f"{what} comes after start, which keeps the weights that the first round sets out from")
        if self.swapped:
            raise RuntimeError(
                f"{what}: the model has the trained weights in place of the extrapolated ones; swap them back"
            )


def _filled(old: Weights, weights: Weights) -> Weights:
    """The weights' values in the old tensors, or in new ones where a factor has another rank."""
    filled: Weights = {}
    for name, p in weights.items():
        same = name in old and old[name].shape == p.shape
        filled[name] = old[name].copy_(p.detach()) if same else p.detach().clone()
    return filled


def _check_reference(reference: nn.Module | None, weights: Weights) -> None:
    if reference is None or isinstance(reference, FrozenPolicy | ExtrapolatedPolicy):
        return
    if not isinstance(reference, nn.Module):
        raise TypeError(f"reference must be a torch.nn.Module, got {type(reference).__name__}")
    own = dict(reference.named_parameters(remove_duplicate=False))
    for name, p in weights.items():
        if name not in own or own[name].shape != p.shape:
            shape = tuple(own[name].shape) if name in own else "absent"
            raise ValueError(f"{name!r} has shape {tuple(p.shape)} in the model, and is {shape} in the reference")
        if own[name] is p:
            raise ValueError("reference must be frozen weights of its own, got the model that is trained")


def _digest(tokenizer: Any) -> str:
    """A tokenizer's vocabulary in a few letters, by which another one is told from it."""
    if tokenizer is None:
        return ""
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: (item[1], item[0]))
    digest = hashlib.sha256("\n".join(f"{i} {token}" for token, i in vocabulary).encode(errors="surrogatepass"))
    return f"{len(vocabulary)} tokens, digest {digest.hexdigest()[:12]}"
