"""AdamP and SGDP: momentum without its slowdown on scale-invariant weights (Heo et al., arXiv 2006.08217; ICLR 2021).

Where the loss does not depend on a weight's norm (before a normalization), the gradient is orthogonal to the weight, but
momentum is not: its radial part makes the weight grow and the effective step shrink. These optimizers take it out of the step,

    u <- u - n (n . u),   n = w / (||w|| + eps),        for each row of a weight ("channel"), or for the weight as one ("layer"),

wherever the weight behaves as scale-invariant: every row's ``|cos(w, g)|`` is below ``delta / sqrt(row length)``, tested with
the raw gradient, rows first. There, weight decay is multiplied by ``wd_ratio``. Tensors of one dimension are never projected.

The paper's equation 11 has no absolute value in the test; the code has, and its authors say that it is meant.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar

import torch

from polyak.core import checks
from polyak.core.projection import project_out, radial, row_norms
from polyak.optim._engine import RuleOptimizer
from polyak.optim._engine.plan import Cohort
from polyak.optim._engine.tensors import is_dtensor
from polyak.optim.adamp import compiled, kernel
from polyak.optim.adamp.rules import CHANNEL, LAYER, adamp_rule, sgdp_rule

PROJECTIONS = ("auto", "channel", "layer", "never")
_FORCED = {"auto": 0, "channel": CHANNEL, "layer": LAYER}
_NAMES = {0: None, CHANNEL: "channel", LAYER: "layer"}

__all__ = ["SGDP", "AdamP", "effective_step", "radial_fraction"]


class _Projected(RuleOptimizer):
    """What both optimizers share: the options of the projection, and its backends."""

    multi_tensor = False
    declared: ClassVar = dict(
        eps=checks.positive, weight_decay=checks.non_negative, delta=checks.Number(0, infinite=True),
        wd_ratio=checks.fraction, nesterov=checks.flag, projection=checks.Choice(*PROJECTIONS), record=checks.flag,
    )  # fmt: skip

    def __init__(self, params: Any, defaults: dict[str, Any], record: bool, generator: torch.Generator | None) -> None:
        self._record = self.__checks__["record"]("record", record)
        self._recorded: list[tuple[torch.Tensor, torch.Tensor]] = []
        super().__init__(params, {**defaults, "projection": "auto"}, generator=generator)

    @property
    def last_projection(self) -> dict[torch.Tensor, str | None]:
        """For every tensor of the last step None, "channel" or "layer"; needs ``record=True``. Waits for the device."""
        if not self._record:
            raise RuntimeError(f"last_projection is kept by {type(self).__name__}(..., record=True) only")
        found: dict[torch.Tensor, str | None] = {}
        if self._plan is not None:
            status = self._plan.looker.status.tolist()
            found |= {row.p: None for row, seen in zip(self._plan.rows, status, strict=True) if seen}
            for cohort in self._plan.cohorts:
                modes = cohort.runner.modes() if hasattr(cohort.runner, "modes") else [None] * len(cohort.owners)
                found |= {p: _NAMES[mode] for p, mode in zip(cohort.owners, modes, strict=True) if mode and p in found}
        found |= {p: _NAMES[int(mode)] for p, mode in self._recorded}
        return found

    def step(self, closure: Any = None) -> Any:
        """Update all parameters that have a gradient; returns the closure's loss, where there is a closure."""
        self._recorded.clear()
        return super().step(closure)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for name, value in (("_record", False), ("_recorded", [])):  # of an older pickle
            self.__dict__.setdefault(name, value)

    def _note(self, p: torch.Tensor) -> Any:
        return _Note(p, self._recorded if self._record else None)

    def _elementwise(self, group: dict[str, Any]) -> bool:
        # Of a sharded tensor no part can be updated alone; DTensor sums over all of them.
        return not any(is_dtensor(p) for p in group["params"])

    def _fits(self, group: dict[str, Any], p: torch.Tensor) -> bool:
        length = p.numel() // max(1, len(p)) if p.dim() > 1 else 0
        rows_apart = length == 0 or len(p) == 1 or p.stride(0) == length <= kernel.LONGEST
        return rows_apart or group["projection"] == "never"

    def _launch(self, cohort: Cohort) -> Any:
        forced = self._forced(cohort)
        return super()._launch(cohort) if forced is None else kernel.Launch(cohort, _matrices(cohort.owners), forced)

    def _compiled(self, cohort: Cohort) -> Any:
        forced = self._forced(cohort)
        if forced is None:
            return super()._compiled(cohort)
        return compiled.make(cohort, _matrices(cohort.owners), forced)

    def _forced(self, cohort: Cohort) -> int | None:
        """The view that a cohort's tensors are projected in, 0 where the test decides, None where they are not."""
        projection = self.param_groups[next(iter(cohort.rank))]["projection"]
        return None if projection == "never" else _FORCED[projection]


class _Note:
    """What the eager rule is told of a tensor: whether it may be projected, and where to leave its decision."""

    def __init__(self, p: torch.Tensor, recorded: list[tuple[torch.Tensor, torch.Tensor]] | None) -> None:
        self.matrix = p.dim() > 1 and p.numel() > 0
        self._p = p
        self._recorded = recorded

    def decided(self, mode: torch.Tensor) -> None:
        if self._recorded is not None:
            self._recorded.append((self._p, mode))


def _matrices(owners: Iterable[torch.Tensor]) -> list[int]:
    return [len(p) if p.dim() > 1 and p.numel() else 0 for p in owners]


class AdamP(_Projected):
    """AdamP, a drop-in for AdamW (arXiv 2006.08217, Algorithm 3).

    Args:
        params: parameters or param groups; every option may be given per group, and ``projection`` beside them: "auto" (the
            test decides), "channel" or "layer" (always projected so) or "never". Depthwise kernels have short rows, which
            pass the test often: "never" keeps them out.
        lr: learning rate. A tensor is allowed with ``capturable=True``.
        betas: retention of the first and of the second moment.
        eps: added to the denominator after bias correction, and to norms.
        weight_decay: decoupled, ``w *= 1 - lr weight_decay``.
        delta: a weight counts as scale-invariant below ``delta / sqrt(row length)``; 0 makes this AdamW, inf always projects.
        wd_ratio: factor of the weight decay where the step is projected.
        nesterov: Nesterov's momentum.
        maximize, foreach, capturable, differentiable, fused: as in ``torch.optim.Adam``. By default the fastest is chosen:
            one compiled pass after the test on the CPU, five launches for all tensors of a type on CUDA. Nothing is
            read back from the device. ``foreach`` runs tensor by tensor.
        record: keep how each tensor was projected, for ``last_projection``.
        state_dtype, rounding, generator: as in :class:`polyak.optim.Adan`.

    State: exp_avg, exp_avg_sq and step, per tensor; checkpoints of the official code and of timm load. A zero gradient counts
    as orthogonal, as in the official code. A tensor whose gradient is not finite fails the test: those elements become NaN, no
    others (with "channel" and "layer" their rows, or the tensor).

    Raises:
        ValueError: a hyperparameter is out of range.
        RuntimeError: sparse gradients.

    Example:
        >>> optimizer = AdamP(model.parameters(), lr=1e-3, weight_decay=1e-2)
        >>> loss.backward()
        >>> optimizer.step()
    """

    rule = staticmethod(adamp_rule)
    state_names = ("exp_avg", "exp_avg_sq")
    numbers = ("lr", "eps", "weight_decay", "delta", "wd_ratio")
    tuples: ClassVar = {"betas": 2}
    switches = ("nesterov", "projection")
    declared: ClassVar = dict(betas=checks.Betas(2, "AdamP"))

    def __init__(
        self,
        params: Any,
        lr: float | torch.Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        delta: float = 0.1,
        wd_ratio: float = 0.1,
        nesterov: bool = False,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        record: bool = False,
        state_dtype: torch.dtype | None = None,
        rounding: str = "nearest",
        generator: torch.Generator | None = None,
    ) -> None:
        defaults = dict(
            lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, delta=delta, wd_ratio=wd_ratio, nesterov=nesterov,
            maximize=maximize, foreach=foreach, capturable=capturable, differentiable=differentiable, fused=fused,
            state_dtype=state_dtype, rounding=rounding,
        )  # fmt: skip
        super().__init__(params, defaults, record, generator)


class SGDP(_Projected):
    """SGDP, SGD with momentum whose step loses its radial part (arXiv 2006.08217, Algorithm 2).

    Args:
        params: parameters or param groups, as in :class:`AdamP`.
        lr: learning rate.
        momentum: retention of the buffer, which starts at zero: ``dampening`` also acts on the first gradient, unlike in
            ``torch.optim.SGD``.
        dampening: the gradient enters the buffer with weight ``1 - dampening``.
        weight_decay: decoupled, ``w *= 1 - lr weight_decay / (1 - momentum)``: as strong as SGD's L2 penalty of that size.
        nesterov: Nesterov's momentum.
        eps: added to norms.
        delta, wd_ratio: as in :class:`AdamP`.
        project_buffer: also project the momentum buffer, as the official code does (without nesterov its step is the buffer,
            projected in place). The paper projects the step alone.
        maximize, foreach, capturable, differentiable, fused, record, state_dtype, rounding, generator: as in :class:`AdamP`.

    State: momentum_buffer, per tensor, as in ``torch.optim.SGD``; checkpoints of that, of the official code and of timm load.
    Gradients that are not finite: as in :class:`AdamP`, but an infinite one makes its element infinite.

    Raises:
        ValueError: a hyperparameter is out of range.
        RuntimeError: sparse gradients.
    """

    rule = staticmethod(sgdp_rule)
    state_names = ("momentum_buffer",)
    numbers = ("lr", "momentum", "dampening", "weight_decay", "eps", "delta", "wd_ratio")
    switches = ("nesterov", "project_buffer", "projection")
    counts_steps = False
    declared: ClassVar = dict(  # decay is divided by 1 - momentum
        momentum=checks.retention, dampening=checks.non_negative, project_buffer=checks.flag
    )

    def __init__(
        self,
        params: Any,
        lr: float | torch.Tensor,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        *,
        nesterov: bool = False,
        eps: float = 1e-8,
        delta: float = 0.1,
        wd_ratio: float = 0.1,
        project_buffer: bool = False,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        record: bool = False,
        state_dtype: torch.dtype | None = None,
        rounding: str = "nearest",
        generator: torch.Generator | None = None,
    ) -> None:
        defaults = dict(
            lr=lr, momentum=momentum, dampening=dampening, weight_decay=weight_decay, nesterov=nesterov, eps=eps,
            delta=delta, wd_ratio=wd_ratio, project_buffer=project_buffer, maximize=maximize, foreach=foreach,
            capturable=capturable, differentiable=differentiable, fused=fused, state_dtype=state_dtype, rounding=rounding,
        )  # fmt: skip
        super().__init__(params, defaults, record, generator)

    def _check_group(self, group: dict[str, Any]) -> None:
        if group["nesterov"] and (group["momentum"] == 0 or group["dampening"] != 0):
            raise ValueError("Nesterov momentum requires a momentum and zero dampening")

    def _adopt(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        # The official code's name for the buffer.
        state = {
            i: {("momentum_buffer" if name == "momentum" else name): value for name, value in values.items()}
            for i, values in state_dict["state"].items()
        }
        return super()._adopt({"state": state, "param_groups": state_dict["param_groups"]})


def _momentum(optimizer: torch.optim.Optimizer, group: dict[str, Any], p: torch.Tensor) -> torch.Tensor | None:
    """The direction that the present momentum of an Adam- or SGD-like optimizer gives, or None before the first step."""
    state = optimizer.state.get(p, {})
    if "exp_avg" in state:
        step = torch.as_tensor(state["step"], dtype=torch.float64, device=p.device)
        b1, b2 = (1 - beta**step for beta in group["betas"])
        return state["exp_avg"] / b1 / ((state["exp_avg_sq"] / b2).sqrt() + group["eps"])
    return state.get("momentum_buffer")


def _matrices_of(optimizer: torch.optim.Optimizer) -> Iterable[tuple[dict[str, Any], torch.Tensor, torch.Tensor]]:
    for group in optimizer.param_groups:
        for p in group["params"]:
            u = _momentum(optimizer, group, p)
            if p.dim() > 1 and p.numel() and not p.is_complex() and u is not None:
                yield group, p, u


@checks.arguments(optimizer=checks.optimizer)
@torch.no_grad()
def radial_fraction(optimizer: torch.optim.Optimizer) -> dict[torch.Tensor, torch.Tensor]:
    """How much of the present momentum's direction is radial: ``||(n_r . u_r)_r|| / ||u||`` over the rows r, in [0, 1].

    Args:
        optimizer: AdamP, SGDP, or one of ``torch.optim``'s with the same state (Adam, AdamW, SGD with momentum).

    Returns:
        For each tensor of two and more dimensions that has a state: a tensor of no dimension, on its device.
    """
    found = {}
    for _, p, u in _matrices_of(optimizer):
        total = torch.linalg.vector_norm(u).clamp(min=torch.finfo(u.dtype).tiny)
        found[p] = torch.linalg.vector_norm(radial(u, p, "channel", 0.0).nan_to_num()) / total
    return found


@checks.arguments(optimizer=checks.optimizer)
@torch.no_grad()
def effective_step(optimizer: torch.optim.Optimizer) -> dict[torch.Tensor, torch.Tensor]:
    """How far the present momentum turns each weight: the mean over rows of ``lr ||u_r without its radial part|| / ||w_r||``.

    Arguments and result as in :func:`radial_fraction`; radians, to first order.
    """
    found = {}
    for group, p, u in _matrices_of(optimizer):
        turned = row_norms(project_out(u, p, eps=torch.finfo(p.dtype).tiny), "channel")
        found[p] = group["lr"] * (turned / row_norms(p, "channel")).nan_to_num(posinf=0.0).mean()
    return found
