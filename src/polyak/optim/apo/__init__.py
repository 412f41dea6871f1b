"""APO: iterative preference optimization with Nesterov's extrapolation (He, Yuan, Gu, arXiv 2410.06293).

    theta^_{t+1} = train from theta_t, on pairs sampled from pi_t, with reference pi_t
    theta_{t+1}  = theta^_{t+1} + alpha (theta^_{t+1} - theta^_t)

Iterative DPO is a proximal-point method on policies; the second line accelerates it, in exact arithmetic by 1 / (1 - alpha):
:func:`tabular`, :func:`exponent`. :class:`APO` keeps what a run keeps between rounds and :func:`train_round` trains one; with
TRL's ``DPOTrainer`` there are :func:`iterate_dpo` and :class:`APOCallback`. Any causal model of transformers will do, whole or
with LoRA adapters. (TRL's losses ``apo_zero`` and ``apo_down`` are another method, anchored preference optimization.)

    apo = APO(alpha=0.3)
    reference = apo.start(model)
    for prompts in splits:
        pairs = label(sample(model, prompts))
        train_round(model, reference, pairs, optimizer=lambda params: torch.optim.AdamW(params, lr=1e-6), beta=0.1)
        reference = apo.after_round(model, reference)
    apo.swap(model)  # the method's output: the last trained weights
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from polyak.optim.apo import losses
from polyak.optim.apo.exact import Rounds, exponent, tabular
from polyak.optim.apo.extrapolate import extrapolate_
from polyak.optim.apo.losses import sequence_logps
from polyak.optim.apo.policies import ExtrapolatedPolicy, FrozenPolicy
from polyak.optim.apo.rounds import APO
from polyak.optim.apo.training import RoundReport, collate, train_round

if TYPE_CHECKING:
    from polyak.optim.apo.trainers import APOCallback, ExtrapolatedLogits, iterate_dpo

__all__ = [
    "APO",
    "APOCallback",
    "ExtrapolatedLogits",
    "ExtrapolatedPolicy",
    "FrozenPolicy",
    "RoundReport",
    "Rounds",
    "collate",
    "exponent",
    "extrapolate_",
    "iterate_dpo",
    "losses",
    "sequence_logps",
    "tabular",
    "train_round",
]


def __getattr__(name: str) -> Any:
    """What needs transformers is imported when it is asked for."""
    if name in ("APOCallback", "ExtrapolatedLogits", "iterate_dpo"):
        return getattr(import_module("polyak.optim.apo.trainers"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
