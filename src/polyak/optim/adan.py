"""Adan: adaptive Nesterov momentum (Xie, Zhou, Li, Lin, Yan, arXiv 2208.06677; TPAMI 2024).

Nesterov's look-ahead gradient is estimated from successive gradients, ``g + b2 (g - g_prev)``, and both moments of an
Adam-like step are built from it:

    m = b1 m + (1 - b1) g              v = b2 v + (1 - b2) (g - g_prev)        n = b3 n + (1 - b3) (g + b2 (g - g_prev))^2
    p = (p - lr (m^ + b2 v^) / (sqrt(n^) + eps)) / (1 + lr wd)                 ^: divided by 1 - b^t

The betas are retention factors (the official code's convention; the paper's are 1 - b). The paper's Algorithm 1 starts from
the first gradient and has no bias correction; the code that produced its results starts from zero and corrects, as here.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, ClassVar

import torch

from polyak.core import checks
from polyak.core.elementwise import axpy, minimum, sqrt, where
from polyak.core.momentum import bias_correction, ema
from polyak.optim._engine import RuleOptimizer
from polyak.optim._engine.functional import apply

__all__ = ["Adan", "adan_step"]

STATE = ("exp_avg", "exp_avg_diff", "exp_avg_sq", "neg_pre_grad")


def rule(p: Any, g: Any, state: Any, h: Any) -> tuple[Any, dict[str, Any]]:
    """One step of Adan (the equations above), elementwise."""
    b1, b2, b3 = h.betas
    clip, norm = getattr(h, "clip", None), getattr(h, "grad_norm", None)
    if norm is not None:
        clip = minimum(h.max_grad_norm / (norm + h.eps), 1.0)
    if clip is not None:
        g = g * clip
    # The first gradient that a tensor sees is its own predecessor.
    difference = where(h.step > 1, g + state.neg_pre_grad, 0.0)
    ahead = axpy(b2, difference, g)
    m = ema(state.exp_avg, g, b1)
    v = ema(state.exp_avg_diff, difference, b2)
    n = ema(state.exp_avg_sq, ahead * ahead, b3)
    denominator = sqrt(n) / sqrt(bias_correction(b3, h.step)) + h.eps
    momentum = axpy(b2 / bias_correction(b2, h.step), v, m / bias_correction(b1, h.step))
    update = momentum / denominator
    if h.no_prox:
        p = axpy(-h.lr, update, p * (1 - h.lr * h.weight_decay))
    else:
        p = axpy(-h.lr, update, p) / (1 + h.lr * h.weight_decay)
    return p, {"exp_avg": m, "exp_avg_diff": v, "exp_avg_sq": n, "neg_pre_grad": -g}


class Adan(RuleOptimizer):
    """Adan, a drop-in for AdamW that takes 5 to 10 times its learning rate (arXiv 2208.06677, Algorithm 1).

    Args:
        params: parameters or param groups; every option below may be given per group.
        lr: learning rate. A tensor is allowed with ``capturable=True``.
        betas: retention of the gradient, of the gradient difference, and of the squared estimate.
        eps: added to the denominator after bias correction.
        weight_decay: decoupled; 0.02 in all of the paper's experiments.
        max_grad_norm: clip the global norm over all groups to this; 0 does not. ``p.grad`` is not changed.
        no_prox: decay as AdamW does, before the step, instead of the proximal form above.
        restart_radius: restart (see :meth:`restart`) when the steps have travelled further than this in the norm of the
            paper's restart condition; needs one host-device synchronization a step. None never does.
        maximize, foreach, capturable, differentiable, fused: as in ``torch.optim.Adam``. By default the fastest is chosen:
            one pass of compiled code on the CPU, one launch per type on CUDA, for all groups together.
        state_dtype: type of the state, None for the parameter's. float32 is advised for bfloat16 parameters: the
            difference of successive gradients cancels.
        rounding: how a bfloat16 or float16 parameter is written back: "nearest", "stochastic", or "kahan" (keeps what
            rounding leaves behind in a tensor of the parameter's type).
        generator: draws the seed of stochastic rounding.

    State: exp_avg, exp_avg_diff, exp_avg_sq, neg_pre_grad and step, per tensor; official checkpoints load. The official code
    counts steps per group, so that a tensor whose gradient first appears late is corrected wrongly there. A NaN gradient makes
    its own elements NaN, and with ``max_grad_norm`` all of them.

    Raises:
        ValueError: a hyperparameter is out of range, or ``fused=True`` without a CUDA device.
        RuntimeError: sparse gradients.

    Example:
        >>> optimizer = Adan(model.parameters(), lr=1e-2, weight_decay=0.02)
        >>> loss.backward()
        >>> optimizer.step()
    """

    rule = staticmethod(rule)
    state_names = STATE
    numbers = ("lr", "eps", "weight_decay", "max_grad_norm")
    tuples: ClassVar = {"betas": 3}
    switches = ("no_prox",)
    declared: ClassVar = dict(
        betas=checks.Betas(3, "Adan"), eps=checks.non_negative, weight_decay=checks.non_negative,
        max_grad_norm=checks.non_negative, no_prox=checks.flag, restart_radius=checks.positive | None,
    )  # fmt: skip

    def __init__(
        self,
        params: Any,
        lr: float | torch.Tensor = 1e-3,
        betas: tuple[float, float, float] = (0.98, 0.92, 0.99),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        max_grad_norm: float = 0.0,
        no_prox: bool = False,
        restart_radius: float | None = None,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        state_dtype: torch.dtype | None = None,
        rounding: str = "nearest",
        generator: torch.Generator | None = None,
    ) -> None:
        defaults = dict(
            lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, max_grad_norm=max_grad_norm, no_prox=no_prox,
            restart_radius=restart_radius, maximize=maximize, foreach=foreach, capturable=capturable,
            differentiable=differentiable, fused=fused, state_dtype=state_dtype, rounding=rounding,
        )  # fmt: skip
        super().__init__(params, defaults, generator=generator)

    def _check_group(self, group: dict[str, Any]) -> None:
        if all(b < 0.5 for b in group["betas"]):
            warnings.warn(
                f"betas {group['betas']} look like the paper's convention; polyak uses retention factors (1 - beta)",
                stacklevel=6,
            )
        if group["restart_radius"] != (radius := self.param_groups[0]["restart_radius"]):
            raise ValueError(
                f"restart_radius must be the same in all groups (the condition is over all parameters), "
                f"got {checks.shown(group['restart_radius'])} and {checks.shown(radius)}"
            )

    def _needs_norm(self, group: dict[str, Any]) -> bool:
        return group["max_grad_norm"] > 0

    def step(self, closure: Any = None) -> Any:
        """Update all parameters that have a gradient; returns the closure's loss, where there is a closure."""
        radius = self.param_groups[0]["restart_radius"]
        if radius is None:
            return super().step(closure)
        before = [[p.detach().clone() for p in group["params"]] for group in self.param_groups]
        loss = super().step(closure)
        with torch.no_grad():
            self._travel(before, radius)
        return loss

    def _travel(self, before: list[list[torch.Tensor]], radius: float) -> None:
        # (k + 1) sum_t ||theta_{t+1} - theta_t||^2 in the norm of sqrt(n_t) > R^2: the paper's restart condition.
        moved = [
            ((p.detach() - old).abs().square() * self.state[p]["exp_avg_sq"].abs().sqrt()).sum()
            for group, olds in zip(self.param_groups, before, strict=True)
            for p, old in zip(group["params"], olds, strict=True)
            if self._has_state(p)
        ]
        if not moved:
            return
        total = torch.stack([m.to(moved[0].device, torch.float64) for m in moved]).sum()
        # Kept in a param group, so that checkpoints and copies go on from there.
        first = self.param_groups[0]
        first["travelled"] = first.get("travelled", 0.0) + float(total)
        first["since_restart"] = first.get("since_restart", 0) + 1
        if first["since_restart"] * first["travelled"] > radius**2:
            self.restart()

    @torch.no_grad()
    def restart(self) -> None:
        """Forget all moments and count steps from zero, so that the next step takes its gradient as the previous one."""
        first = self.param_groups[0]
        first.update({name: 0 * first[name] for name in ("travelled", "since_restart") if name in first})
        for state in (self.state[p] for p in list(self.state) if self._has_state(p)):
            for name in ("exp_avg", "exp_avg_diff", "exp_avg_sq", "step"):
                state[name].zero_()


_LIST = checks.Each(checks.tensor, words="a list of tensors")


@checks.arguments(
    params=_LIST, grads=_LIST, exp_avgs=_LIST, exp_avg_diffs=_LIST, exp_avg_sqs=_LIST, neg_pre_grads=_LIST, state_steps=_LIST,
    lr=checks.non_negative, betas=checks.Betas(3, "Adan"), eps=checks.non_negative, weight_decay=checks.non_negative,
    clip=checks.non_negative, no_prox=checks.flag, maximize=checks.flag, foreach=checks.flag,
)  # fmt: skip
@torch.no_grad()
def adan_step(
    params: Sequence[torch.Tensor],
    grads: Sequence[torch.Tensor],
    exp_avgs: Sequence[torch.Tensor],
    exp_avg_diffs: Sequence[torch.Tensor],
    exp_avg_sqs: Sequence[torch.Tensor],
    neg_pre_grads: Sequence[torch.Tensor],
    state_steps: Sequence[torch.Tensor],
    *,
    lr: float,
    betas: tuple[float, float, float] = (0.98, 0.92, 0.99),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    clip: float = 1.0,
    no_prox: bool = False,
    maximize: bool = False,
    foreach: bool = True,
) -> None:
    """The functional form of :class:`Adan`: parameters, states and steps are updated in place.

    Args:
        state_steps: one tensor of one element per parameter, incremented here.
        clip: factor that the gradients are multiplied by.

    Raises:
        ValueError: lists of unequal length, or hyperparameters out of range.
    """
    given = dict(
        grads=grads,
        exp_avgs=exp_avgs,
        exp_avg_diffs=exp_avg_diffs,
        exp_avg_sqs=exp_avg_sqs,
        neg_pre_grads=neg_pre_grads,
    )
    for name, tensors in given.items():
        if len(tensors) != len(params):
            raise ValueError(f"{name} has {len(tensors)} tensors where params has {len(params)}")
    hyper = dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, clip=clip, no_prox=no_prox)
    states: dict[str, Sequence[torch.Tensor]] = dict(
        zip(STATE, (exp_avgs, exp_avg_diffs, exp_avg_sqs, neg_pre_grads), strict=True)
    )
    apply(rule, params, grads, states, state_steps, hyper, maximize=maximize, foreach=foreach)
