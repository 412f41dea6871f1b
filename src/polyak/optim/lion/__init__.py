"""Lion and Lion-K: weight decay as a constraint (Chen et al., arXiv 2302.06675; Chen, Liu, Liang, Liu, arXiv 2310.05898).

    c = b1 m + (1 - b1) g        x = (1 - lr wd) x - lr D(c)        m = b2 m + (1 - b2) g

with D a subgradient of a convex, even K (``polyak.optim.lion.kappa``). The iterates minimize ``f(x) + K*(wd x) / wd``: for Lion,
K = ||.||_1 and D = sign, that is f under the constraint ``||x||_inf <= 1 / wd``. A Lyapunov function watches the descent
(``polyak.optim.lion.lyapunov``).
"""

from __future__ import annotations

import warnings
from typing import Any, ClassVar

import torch

from polyak.core import checks
from polyak.core.elementwise import axpy, where
from polyak.core.momentum import ema
from polyak.optim._engine import RuleOptimizer
from polyak.optim._engine.dispatch import check
from polyak.optim._engine.options import known
from polyak.optim.lion import kappa
from polyak.optim.lion.kappa import L1, L2, Kappa, Nuclear
from polyak.optim.lion.lyapunov import Lyapunov, bound, lyapunov

__all__ = ["Lion", "LionK", "Lyapunov", "bound", "kappa", "lyapunov"]


def rule(p: Any, g: Any, state: Any, h: Any) -> tuple[Any, dict[str, Any]]:
    """One step of Lion-K (the equations above). The buffer is updated with b2, from the old buffer, after the step."""
    b1, b2 = h.betas
    c = ema(state.exp_avg, g, b1)
    norm = getattr(h, "norm", None)
    if norm is not None:
        direction = where(norm > 0, c / norm, c * norm)  # a NaN norm reaches every element, a zero one leaves zeros
    else:
        direction = h.kappa.grad(c)
    if h.cautious:
        agrees = (direction * g > 0).to(direction.dtype)
        direction = direction * agrees / agrees.mean().clamp(min=1e-3)
    p = axpy(-h.lr, direction, (1 - h.lr * h.weight_decay) * p)
    return p, {"exp_avg": ema(state.exp_avg, g, b2)}


class LionK(RuleOptimizer):
    """Lion with any convex K in place of the l1 norm (arXiv 2310.05898, equation 3).

    Args:
        params: parameters or param groups; every option below, ``kappa`` too, may be given per group.
        kappa: an object of ``polyak.optim.lion.kappa`` or its name. K, and so the constraint, is per tensor, except for
            ``L2(scope=...)``.
        lr: learning rate; 3 to 10 times smaller than AdamW's. ``lr * weight_decay`` must stay below 1.
        betas: of the interpolation that is stepped along, and of the buffer. The Lyapunov guarantee needs b1 <= b2.
        weight_decay: decoupled; 3 to 10 times larger than AdamW's. The solution is that of ``f + K*(wd .) / wd``. A learning
            rate that is scheduled to zero stops the decay, too: the constraint is then no longer enforced.
        cautious: only elements whose direction agrees with the gradient move (Liang et al., arXiv 2411.16085).
        maximize, foreach, capturable, differentiable, fused, state_dtype, rounding, generator: as in
            :class:`polyak.optim.Adan`. A K that is not elementwise runs per tensor.

    State: exp_avg, as in lion-pytorch, timm and bitsandbytes, whose checkpoints load. NaN gradients reach the parameter.

    Raises:
        ValueError: a hyperparameter is out of range, or ``lr * weight_decay >= 1``.
        RuntimeError: sparse gradients.

    Example:
        >>> optimizer = LionK(model.parameters(), kappa.L2(), lr=1e-3, weight_decay=1.0)  # weights stay in a ball of radius 1
    """

    rule = staticmethod(rule)
    state_names = ("exp_avg",)
    numbers = ("lr", "weight_decay")
    tuples: ClassVar = {"betas": 2}
    switches = ("kappa", "cautious")
    declared: ClassVar = dict(
        kappa=kappa.KIND, betas=checks.Betas(2, "LionK"), weight_decay=checks.non_negative, cautious=checks.flag
    )
    counts_steps = False

    def __init__(
        self,
        params: Any,
        kappa: Kappa | str,
        lr: float | torch.Tensor = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        *,
        cautious: bool = False,
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
            lr=lr, betas=betas, weight_decay=weight_decay, kappa=kappa, cautious=cautious, maximize=maximize, foreach=foreach,
            capturable=capturable, differentiable=differentiable, fused=fused, state_dtype=state_dtype, rounding=rounding,
        )  # fmt: skip
        super().__init__(params, defaults, generator=generator)

    def _check_group(self, group: dict[str, Any]) -> None:
        if group["betas"][0] > group["betas"][1]:
            warnings.warn(f"betas {group['betas']}: with b1 > b2 the Lyapunov guarantee is lost", stacklevel=4)
        if (lr := known(group["lr"])) is not None and lr * group["weight_decay"] >= 1:
            product = f"{lr} * {group['weight_decay']}"
            raise ValueError(f"lr * weight_decay must be < 1 (the step overshoots the origin), got {product}")
        if isinstance(group["kappa"], Nuclear) and group["kappa"].fallback is None:
            for p in group["params"]:
                if p.dim() < 2:
                    group["kappa"].value(p)  # raises, naming the shape

    def _write_options(self, group: dict[str, Any]) -> None:
        super()._write_options(group)
        group["kappa"] = kappa.text(group["kappa"])

    def _elementwise(self, group: dict[str, Any]) -> bool:
        return (group["kappa"].elementwise or bool(self._extra(group))) and not group["cautious"]

    def _extra(self, group: dict[str, Any]) -> tuple[str, ...]:
        spans = isinstance(group["kappa"], L2) and group["kappa"].scope != "tensor"
        return ("norm",) if spans else ()

    def _prepare(self) -> None:
        if not any(self._extra(group) for group in self.param_groups):
            return
        squares = [self._squared_norm(group) for group in self.param_groups]
        total = torch.stack(squares).sum()
        self._extra_values = [
            {"norm": (total if getattr(group["kappa"], "scope", "") == "all" else square).sqrt()}
            for group, square in zip(self.param_groups, squares, strict=True)
        ]

    def _squared_norm(self, group: dict[str, Any]) -> torch.Tensor:
        """||c||^2 over a group, of the interpolation that its step will take."""
        owners = [p for p in group["params"] if p.grad is not None]
        # An empty group may stand beside others.
        device = next(p.device for g in [group, *self.param_groups] for p in g["params"])
        if not owners or not (isinstance(group["kappa"], L2) and group["kappa"].scope != "tensor"):
            return torch.zeros((), dtype=torch.float64, device=device)
        b1 = group["betas"][0]
        sign = -1.0 if group["maximize"] else 1.0
        scale = getattr(self, "grad_scale", None)
        parts = []
        for p in owners:
            check(self, p, p.grad)
            g = p.grad.float() if p.grad.dtype in (torch.bfloat16, torch.float16) else p.grad
            g = g * sign if scale is None else g * (sign / scale.to(g.device))
            m = self.state[p]["exp_avg"] if self._has_state(p) else torch.zeros_like(g)
            square = ema(m.to(g.dtype), g, b1).abs().double().square().sum()
            parts.append((square.full_tensor() if hasattr(square, "full_tensor") else square).to(device))
        return torch.stack(parts).sum()


class Lion(LionK):
    """Lion: sign of the interpolated momentum, one state tensor (Chen et al., arXiv 2302.06675, Algorithm 2).

    With weight decay wd it minimizes the loss under the constraint that every weight stays within 1/wd (arXiv 2310.05898).
    The arguments are those of :class:`LionK` without ``kappa``.

    Example:
        >>> optimizer = Lion(model.parameters(), lr=1e-4, weight_decay=1.0)
        >>> loss.backward()
        >>> optimizer.step()
    """

    declared: ClassVar = dict(betas=checks.Betas(2, "Lion"))

    def __init__(
        self,
        params: Any,
        lr: float | torch.Tensor = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        *,
        cautious: bool = False,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        state_dtype: torch.dtype | None = None,
        rounding: str = "nearest",
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(
            params, L1(), lr, betas, weight_decay, cautious=cautious, maximize=maximize, foreach=foreach,
            capturable=capturable, differentiable=differentiable, fused=fused, state_dtype=state_dtype, rounding=rounding,
            generator=generator,
        )  # fmt: skip
