"""The losses of a round: DPO, IPO and SPPO, from the log-probabilities of whole responses.

With ``h = log pi(y_w)/pi_t(y_w) - log pi(y_l)/pi_t(y_l)``, sums over the tokens of a response, and ``pi_t`` the round's reference:

    DPO  (arXiv 2305.18290)   -log sigmoid(beta h)
    IPO  (arXiv 2310.12036)   (h - 1/(2 tau))^2
    SPPO (arXiv 2405.00675)   sum over y in {y_w, y_l} of (log pi(y)/pi_t(y) - eta (P(y beats pi_t) - 1/2))^2
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from polyak.core import checks

__all__ = ["PreferenceLoss", "dpo_loss", "ipo_loss", "sequence_logps", "sppo_loss"]

_LOGPS = dict.fromkeys(("logp_w", "logp_l", "ref_w", "ref_l"), checks.floating)
_CHANCE = checks.floating | checks.fraction


@checks.arguments(loss=checks.tensor, chosen_rewards=checks.tensor, rejected_rewards=checks.tensor)
class PreferenceLoss(NamedTuple):
    """A loss per pair, which carries gradients, and the implicit rewards of both responses, which do not."""

    loss: Tensor
    chosen_rewards: Tensor
    rejected_rewards: Tensor


@checks.arguments(beta=checks.positive, **_LOGPS)
def dpo_loss(logp_w: Tensor, logp_l: Tensor, ref_w: Tensor, ref_l: Tensor, beta: float) -> PreferenceLoss:
    """``-log sigmoid(beta h)``; rewards ``beta log pi/pi_t``.

    Args:
        logp_w, logp_l: log-probabilities of the chosen and of the rejected responses under the policy; any one shape, nats.
        ref_w, ref_l: the same under the round's frozen reference.
        beta: > 0, the weight of the KL divergence to the reference.

    Raises:
        ValueError: beta <= 0, shapes that differ, a log-probability that is not finite (looked for on the CPU only: elsewhere
            it would wait for the device).
    """
    up, down = _ratios(logp_w, logp_l, ref_w, ref_l)
    return PreferenceLoss(-F.logsigmoid(beta * (up - down)), beta * up.detach(), beta * down.detach())


@checks.arguments(tau=checks.positive, **_LOGPS)
def ipo_loss(logp_w: Tensor, logp_l: Tensor, ref_w: Tensor, ref_l: Tensor, tau: float) -> PreferenceLoss:
    """``(h - 1/(2 tau))^2``; rewards ``tau log pi/pi_t``. Arguments and errors as for :func:`dpo_loss`.

    The sums are over a response's tokens, as in the paper's equation 17; TRL divides them by the response's length.
    """
    up, down = _ratios(logp_w, logp_l, ref_w, ref_l)
    return PreferenceLoss((up - down - 1 / (2 * tau)).square(), tau * up.detach(), tau * down.detach())


@checks.arguments(eta=checks.positive, wins_w=_CHANCE, wins_l=_CHANCE, **_LOGPS)
def sppo_loss(
    logp_w: Tensor,
    logp_l: Tensor,
    ref_w: Tensor,
    ref_l: Tensor,
    eta: float,
    wins_w: Tensor | float = 1.0,
    wins_l: Tensor | float = 0.0,
) -> PreferenceLoss:
    """Squared distance of both log ratios to ``eta (P - 1/2)``; rewards ``log pi/pi_t / eta``.

    Args:
        eta: > 0, about 1/beta.
        wins_w, wins_l: the probability that the response beats one of pi_t, in [0, 1], of the log-probabilities' shape or a
            number. The default takes the label itself for it (TRL's ``sppo_hard`` with ``beta = 1 / eta``).

    The other arguments and errors are as for :func:`dpo_loss`.
    """
    up, down = _ratios(logp_w, logp_l, ref_w, ref_l)
    goals = [eta * (_probability(n, p, up) - 0.5) for n, p in (("wins_w", wins_w), ("wins_l", wins_l))]
    loss = (up - goals[0]).square() + (down - goals[1]).square()
    return PreferenceLoss(loss, up.detach() / eta, down.detach() / eta)


@checks.arguments(logits=checks.Tensor(floating=True), labels=checks.tensor, mask=checks.tensor)
def sequence_logps(logits: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
    """The log-probabilities of responses: for each sequence, the sum over its masked tokens, shape (batch,), float32 or wider.

    Args:
        logits: (batch, length, vocabulary), a causal model's: those at position i are of the token at i + 1.
        labels: (batch, length), the token ids that the model was given.
        mask: (batch, length), 1 or True at the tokens of the response. The first position has no prediction and never counts.

    Raises:
        ValueError: shapes that do not fit.
    """
    if logits.ndim != 3 or labels.shape != logits.shape[:2] or mask.shape != labels.shape:
        raise ValueError(
            "logits, labels and mask must have shapes (batch, length, vocabulary), (batch, length) and (batch, length), "
            f"got {tuple(logits.shape)}, {tuple(labels.shape)} and {tuple(mask.shape)}"
        )
    kept = mask[:, 1:].bool()
    # What is masked may hold an ignored index such as -100.
    chosen = labels[:, 1:].masked_fill(~kept, 0)
    scores = logits[:, :-1].to(torch.promote_types(logits.dtype, torch.float32))
    per_token = scores.gather(-1, chosen[..., None]).squeeze(-1) - scores.logsumexp(-1)
    return per_token.masked_fill(~kept, 0.0).sum(-1)


def check_finite(where: str, **logps: Tensor) -> None:
    """Raise ValueError with the index of the first pair whose log-probability is NaN or infinite. Waits for the device."""
    if bool(torch.stack([p.detach().isfinite().all() for p in logps.values()]).all()):
        return
    for name, values in logps.items():
        bad = (~values.detach().isfinite()).reshape(-1).nonzero()
        if len(bad):
            index = int(bad[0])
            raise ValueError(f"{where}{name}[{index}] must be finite, got {values.detach().reshape(-1)[index].item()}")


def _ratios(logp_w: Tensor, logp_l: Tensor, ref_w: Tensor, ref_l: Tensor) -> tuple[Tensor, Tensor]:
    shapes = [tuple(x.shape) for x in (logp_w, logp_l, ref_w, ref_l)]
    if len(set(shapes)) > 1:
        raise ValueError(f"logp_w, logp_l, ref_w and ref_l must have one shape, got {shapes}")
    if logp_w.device.type == "cpu":
        check_finite("", logp_w=logp_w, logp_l=logp_l, ref_w=ref_w, ref_l=ref_l)
    return logp_w - ref_w.detach(), logp_l - ref_l.detach()


def _probability(name: str, value: Tensor | float, like: Tensor) -> Tensor | float:
    if not isinstance(value, Tensor):
        return value
    if value.shape != like.shape:
        raise ValueError(f"{name} must have the log-probabilities' shape {tuple(like.shape)}, got {tuple(value.shape)}")
    if value.device.type == "cpu" and not bool(((value >= 0) & (value <= 1)).all()):
        raise ValueError(f"{name} must lie in [0, 1], got values from {value.min().item():g} to {value.max().item():g}")
    return value.detach()
