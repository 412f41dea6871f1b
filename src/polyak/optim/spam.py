"""SPAM: spike-aware Adam with momentum reset (Huang et al., arXiv 2501.06842; ICLR 2025).

Adam with three changes: every ``reset_interval`` steps both moments are set to zero and the step is warmed up again; entries of
the gradient with ``g^2 > threshold v`` are shrunk to ``sign(g) sqrt(threshold v)``; and for matrices, moments (and updates) may
be kept for a random part of the entries only, drawn anew at every reset. With t the number of the step, N = warmup_steps and
k = t mod reset_interval:

    m = b1 m + (1 - b1) g       v = b2 v + (1 - b2) g^2       p -= lr s sqrt(1 - b2^t) / (1 - b1^t) m / (sqrt(v) + eps)
    s = 1 - 0.99 (1 + cos(pi k / (N + 1))) / 2    for k < N after the first reset, else 1
    p -= lr weight_decay p

The bias correction's t is not reset, as in the official code: after a reset the first steps are up to
``(1 - b1) / sqrt(1 - b2)`` = 3.16 times larger than Adam's, which the warmup hides.
"""

from __future__ import annotations

import math
import warnings
import zlib
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any, ClassVar

import torch

from polyak.core import checks
from polyak.core.elementwise import axpy, minimum, sign, sqrt, where
from polyak.core.momentum import bias_correction, ema
from polyak.optim._engine import RuleOptimizer
from polyak.optim._engine.dispatch import check, check_state
from polyak.optim._engine.places import Places
from polyak.optim._engine.tensors import LOW, PLAIN, alike, is_dtensor, plain

__all__ = ["SPAM", "SpikeMonitor", "clip_spikes_", "spam_param_groups"]


def rule(p: Any, g: Any, state: Any, h: Any) -> tuple[Any, dict[str, Any]]:
    """One step of SPAM (the equations above), elementwise."""
    b1, b2 = h.betas
    m, v = state.exp_avg, state.exp_avg_sq
    if (keep := getattr(h, "keep", None)) is not None:
        # Where only the device knows the step; elsewhere the moments have been set to zero before.
        m, v = where(keep > 0, m, 0.0), where(keep > 0, v, 0.0)
    bound = h.threshold * v
    # An entry without a second moment would be clipped to zero for ever, as in the official code.
    spike = where(g * g > bound, where(v > 0, h.clipping, 0.0), 0.0) > 0
    g = where(spike, sign(g) * sqrt(bound), g)
    m = ema(m, g, b1)
    v = ema(v, g * g, b2)
    step = minimum(h.step, h.since) if h.reset_bias_correction else h.step
    size = h.lr * h.scale * sqrt(bias_correction(b2, step)) / bias_correction(b1, step)
    p = axpy(-size, m / (sqrt(v) + h.eps), p)
    return p * (1 - h.lr * h.weight_decay * h.decay), {"exp_avg": m, "exp_avg_sq": v, "count": spike}


def warmup_scale(k: int, warmup_steps: int) -> float:
    """The step's factor ``k`` steps after a reset: from 0.01 along half a cosine, 1 from ``warmup_steps`` on."""
    return 1 - 0.99 * (1 + math.cos(math.pi * k / (warmup_steps + 1))) / 2 if k < warmup_steps else 1.0


@lru_cache(maxsize=64)
def _schedule(t: int, interval: int, warmup_steps: int, grace: int, clips: bool, decay: float) -> dict[str, float]:
    """What the rule is handed at step ``t``: one object for all groups of a step that share it."""
    k = t % interval
    return {
        "decay": decay,
        "scale": warmup_scale(k, warmup_steps) if t >= interval else 1.0,
        "clipping": float(clips and t >= grace and k >= grace),
        "since": float(k + 1 if t >= interval else t),
    }


class SPAM(RuleOptimizer):
    """SPAM, a drop-in for Adam that spikes of the gradient do not derail (arXiv 2501.06842, Algorithm 1).

    Args:
        params: parameters or param groups; every option may be given per group. :func:`spam_param_groups` makes groups with
            sparse momentum.
        lr: learning rate. A tensor is allowed with ``capturable=True``.
        betas: retention of the first and of the second moment.
        eps: added to ``sqrt(v)``, before bias correction.
        weight_decay: decoupled, applied after the step.
        reset_interval: steps between two resets; larger than the run for none.
        warmup_steps: steps of the warmup after each reset; there is none at the start of training.
        threshold: entries with ``g^2`` above this multiple of the second moment (before this step, not corrected) are clipped;
            0 clips none.
        grace: no clipping in the first steps up to this one, nor in as many steps from a reset on.
        density: part of a matrix's entries that have moments and are updated, in (0, 1]; below 1 for matrices only.
        decay_masked: weight decay of matrices with ``density < 1``: "masked" entries alone, or "all". (In the official code
            it has no effect on them.)
        nonfinite: what to do with infinite and NaN entries of the gradient: "clip" (an infinite one is a spike, clipped and
            counted; where nothing is clipped, as in the grace period, it makes its own entry NaN, as a NaN always does), or
            "raise" before anything is changed, which waits for the device.
        reset_bias_correction: count the bias correction's steps from the last reset.
        generator: draws the seed of the masks (None: torch's own seed, without drawing from it) and of stochastic rounding.
            Replicas of a model (DDP) need the same masks: generators of one seed, or one seed for torch.
        maximize, foreach, capturable, differentiable, fused: as in ``torch.optim.Adam``; by default the fastest is chosen.
            With ``capturable=True`` masks stay as they are until :meth:`redraw_masks` is called between steps.
        state_dtype: type of the moments, None for the parameter's (the second moment of low-precision ones: float32).
        rounding: as in :class:`polyak.optim.Adan`; "kahan" needs ``density=1``.

    State: exp_avg, exp_avg_sq and step, per tensor; with ``density < 1`` the moments of the ``int(density * numel)`` entries
    alone, and ``mask``, ``mask_bases`` which say where they are: a byte an entry. The official code draws later masks entry by
    entry; here all have the same size. Masks depend on the seed, the reset's number and the parameter's name (its position,
    where parameters come without names), on nothing else. The number of steps is ``param_groups[i]["total_step"]``. A reset
    also reaches parameters that have no gradient in its step (with ``capturable=True`` it passes them by). Checkpoints of the
    official code load where their momentum is not sparse; those of Adam, too: the schedule of resets starts then.

    Raises:
        ValueError: a hyperparameter is out of range.
        RuntimeError: sparse gradients; with ``nonfinite="raise"`` gradients that are not finite.

    Example:
        >>> optimizer = SPAM(model.parameters(), lr=1e-3)
        >>> loss.backward()
        >>> optimizer.step()
    """

    rule = staticmethod(rule)
    state_names = ("exp_avg", "exp_avg_sq")
    numbers = ("lr", "eps", "weight_decay", "threshold")
    tuples: ClassVar = {"betas": 2}
    switches = ("reset_bias_correction",)
    other_names = ("mask", "mask_bases")
    declared: ClassVar = dict(
        betas=checks.Betas(2, "SPAM"), eps=checks.non_negative, weight_decay=checks.non_negative,
        threshold=checks.non_negative, reset_interval=checks.Integer(1), warmup_steps=checks.Integer(0),
        grace=checks.Integer(0), density=checks.Number(0.0, 1.0, "(]"), decay_masked=checks.Choice("masked", "all"),
        nonfinite=checks.Choice("clip", "raise"), reset_bias_correction=checks.flag,
    )  # fmt: skip

    def __init__(
        self,
        params: Any,
        lr: float | torch.Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        *,
        reset_interval: int = 500,
        warmup_steps: int = 150,
        threshold: float = 5000.0,
        grace: int = 20,
        density: float = 1.0,
        decay_masked: str = "masked",
        nonfinite: str = "clip",
        reset_bias_correction: bool = False,
        generator: torch.Generator | None = None,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        state_dtype: torch.dtype | None = None,
        rounding: str = "nearest",
    ) -> None:
        defaults = dict(
            lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, reset_interval=reset_interval, warmup_steps=warmup_steps,
            threshold=threshold, grace=grace, density=density, decay_masked=decay_masked, nonfinite=nonfinite,
            reset_bias_correction=reset_bias_correction, maximize=maximize, foreach=foreach, capturable=capturable,
            differentiable=differentiable, fused=fused, state_dtype=state_dtype, rounding=rounding,
        )  # fmt: skip
        self.__checks__["generator"]("generator", generator)
        given = generator is not None
        self._mask_seed = int(torch.randint(2**62, (), generator=generator)) if given else torch.initial_seed() % 2**62
        super().__init__(
            params, defaults, generator=generator if isinstance(rounding, str) and rounding == "stochastic" else None
        )

    # Options.

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        self._begin(self.param_groups[-1])

    def _begin(self, group: dict[str, Any]) -> None:
        """A group's own counter and the seed of its masks; both are saved with it."""
        first = self.param_groups[0]
        group.setdefault("mask_seed", first.get("mask_seed", self._mask_seed))
        total = group.setdefault("total_step", first.get("total_step", 0))
        if group["capturable"]:
            device = group["params"][0].device if group["params"] else None
            group["total_step"] = torch.as_tensor(total, dtype=torch.int64).to(device, copy=True)
        else:
            group["total_step"] = int(total)

    def _check_group(self, group: dict[str, Any]) -> None:
        interval, warmup, grace = (group[name] for name in ("reset_interval", "warmup_steps", "grace"))
        if interval <= grace:
            raise ValueError(
                f"reset_interval must be above grace (spikes would never be clipped), got {interval} and {grace}"
            )
        if warmup > interval:
            warnings.warn(
                f"warmup_steps {warmup} is above reset_interval {interval}: after the first reset the step never gets back to "
                "its full size",
                stacklevel=6,
            )
        if group["density"] < 1:
            for p in group["params"]:
                if p.dim() != 2:
                    raise ValueError(f"density below 1 is for matrices, got a parameter of shape {tuple(p.shape)}")
                if p.is_complex():
                    raise ValueError(f"density below 1 is for real parameters, got {p.dtype}")
                if is_dtensor(p):
                    raise ValueError("density below 1 is not for sharded parameters (DTensor): use density=1")
            if group["rounding"] == "kahan":
                raise ValueError("rounding='kahan' needs density=1: its remainders are kept for every entry")

    def _state_dtype(self, name: str, p: torch.Tensor, group: dict[str, Any]) -> torch.dtype:
        if name == "exp_avg_sq" and group["state_dtype"] is None and p.dtype in LOW:
            return torch.float32  # its increments are far below it: bfloat16 would lose them
        return super()._state_dtype(name, p, group)

    # The schedule of resets.

    def _derived(self, group: dict[str, Any]) -> dict[str, float]:
        decay = float(group["density"] == 1 or group["decay_masked"] == "masked")
        if group["capturable"]:
            return {"decay": decay}
        clips = group["threshold"] > 0
        return _schedule(
            group["total_step"], group["reset_interval"], group["warmup_steps"], group["grace"], clips, decay
        )

    def _extra(self, group: dict[str, Any]) -> tuple[str, ...]:
        return ("scale", "clipping", "since", "keep") if group["capturable"] else ()

    def _prepare(self) -> None:
        self._refuse_nonfinite()
        extras: list[dict[str, torch.Tensor]] = []
        for group in self.param_groups:
            if group["capturable"]:
                extras.append(self._on_device(group))
                continue
            extras.append({})
            group["total_step"] += 1
            if group["total_step"] % group["reset_interval"] == 0:
                self._reset(group, group["total_step"])
        self._extra_values = extras

    def _on_device(self, group: dict[str, Any]) -> dict[str, torch.Tensor]:
        """The schedule where the step is on the device: nothing is read back, and a captured graph goes on with it."""
        total, found = group["total_step"], getattr(self, "found_inf", None)
        total += 1 if found is None else 1 - found.to(total.device).reshape(()).to(total.dtype)
        interval, warmup, grace = group["reset_interval"], group["warmup_steps"], group["grace"]
        k, first = total % interval, total < interval
        rest = 1 - 0.99 * (1 + torch.cos(math.pi * k.double() / (warmup + 1))) / 2
        return {
            "scale": torch.where(first | (k >= warmup), 1.0, rest),
            "clipping": ((group["threshold"] > 0) & (total >= grace) & (k >= grace)).double(),
            "since": torch.where(first, total, k + 1).double(),
            "keep": (first | (k > 0)).double(),
        }

    def _refuse_nonfinite(self) -> None:
        careful = [p for group in self.param_groups if group["nonfinite"] == "raise" for p in group["params"]]
        seen = [p for p in careful if p.grad is not None and p.grad.layout is torch.strided and p.grad.numel()]
        for p in seen:
            check(self, p, p.grad)
        largest = [torch.linalg.vector_norm(plain(p.grad), math.inf) for p in seen]
        finite = torch.stack([n.to("cpu", torch.float64) for n in largest]).isfinite().tolist() if seen else []
        broken = [p for p, fine in zip(seen, finite, strict=True) if not fine]
        if broken:
            shapes = ", ".join(str(tuple(p.shape)) for p in broken[:3])
            raise RuntimeError(f"SPAM: {len(broken)} gradients are not finite (of parameters of shape {shapes})")

    def step(self, closure: Any = None) -> Any:
        """Update all parameters that have a gradient; returns the closure's loss, where there is a closure."""
        loss = super().step(closure)
        for group in self.param_groups:
            if group["density"] < 1 and group["decay_masked"] == "all" and group["weight_decay"] != 0:
                self._decay_all(group)
        return loss

    @torch.no_grad()
    def _decay_all(self, group: dict[str, Any]) -> None:
        updated = [p for p in group["params"] if p.grad is not None]
        decay = group["lr"] * group["weight_decay"]
        if (found := getattr(self, "found_inf", None)) is not None:
            decay = decay * (1 - found.double().reshape(()))  # a step that the scaler skips leaves no trace
        for together in alike(updated):
            if type(together[0]) in PLAIN or is_dtensor(together[0]):
                torch._foreach_mul_(together, 1 - decay)
            else:
                for p in together:
                    p.mul_(1 - decay)

    @property
    def last_clipped(self) -> torch.Tensor:
        """How many entries were clipped at the last step: a tensor on the device, so that asking does not wait for it."""
        return self._counted()

    # Sparse momentum.

    def _places(self, p: torch.Tensor) -> Places | None:
        state = self.state.get(p)
        return Places(state["mask"], state["mask_bases"]) if state and "mask" in state else None

    def _init_state(self, group: dict[str, Any], params: list[torch.Tensor]) -> None:
        if group["density"] < 1:
            for p in params:
                if p.numel():
                    places = self._draw(group, p, int(group["total_step"]))
                    self.state[p].update(mask=places.gaps, mask_bases=places.bases)
        super()._init_state(group, params)

    def _state_like(self, name: str, p: torch.Tensor, group: dict[str, Any]) -> torch.Tensor:
        places = self._places(p)
        if places is None:
            return super()._state_like(name, p, group)
        return torch.zeros(places.gaps.shape, dtype=self._state_dtype(name, p, group), device=p.device)

    def _shape(self, p: torch.Tensor, values: Mapping[str, Any]) -> torch.Size:
        return values["mask"].shape if "mask" in values else p.shape

    def _draw(self, group: dict[str, Any], p: torch.Tensor, step: int) -> Places:
        """The mask of one parameter at the step of this number (1 is the first)."""
        names, position = group.get("param_names"), next(i for i, q in enumerate(group["params"]) if q is p)
        number = sum(len(g["params"]) for g in self.param_groups[: _index_of(self.param_groups, group)]) + position
        who = zlib.crc32(names[position].encode()) if names else number
        reset = step // group["reset_interval"]
        count = max(1, int(group["density"] * p.numel()))
        keys = _mix(torch.arange(p.numel(), device=p.device) + _mixed_number(group["mask_seed"], who, reset))
        return Places.of(keys.topk(count, largest=False, sorted=False).indices.sort().values)

    def _reset(self, group: dict[str, Any], step: int) -> bool:
        """Forget all moments, also of tensors without a gradient, and draw masks; False where one has moved in memory."""
        in_place = True
        states = {p: self.state[p] for p in group["params"] if self._has_state(p)}
        if states:
            for p, state in states.items():
                check_state(self, p)
                for name in self.state_names:
                    if name in state:
                        state[name].zero_()
        for p, state in states.items():
            if "mask" in state:
                places = self._draw(group, p, step)
                if places.gaps.dtype.itemsize <= state["mask"].dtype.itemsize:
                    # In place: the addresses in a kernel's table stay good.
                    state["mask"].copy_(places.gaps)
                    state["mask_bases"].copy_(places.bases)
                else:
                    state.update(mask=places.gaps, mask_bases=places.bases)
                    in_place = False
        return in_place

    @torch.no_grad()
    def redraw_masks(self) -> bool:
        """Draw the masks of the next step and forget the moments: for use between replays of a CUDA graph, before each reset.

        Returns False where a mask has moved, for its gaps need a wider type than those before: then capture the graph anew.
        """
        groups = [group for group in self.param_groups if group["density"] < 1]
        in_place = [self._reset(group, int(group["total_step"]) + 1) for group in groups]
        return all(in_place)

    def mask(self, p: torch.Tensor) -> torch.Tensor:
        """Which entries of a parameter are updated: a bool tensor of its shape."""
        places = self._places(p)
        if places is None:
            return torch.ones(p.shape, dtype=torch.bool, device=p.device)
        flat = torch.zeros(p.numel(), dtype=torch.bool, device=p.device)
        return flat.index_fill_(0, places.indices(), True).view(p.shape)

    def _adopt(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        # The official code keeps its counters beside the parameters' states.
        state, groups = dict(state_dict["state"]), state_dict["param_groups"]
        if isinstance(total := state.get("total_step"), int):
            state = {i: values for i, values in state.items() if i not in ("total_step", "current_step")}
            groups = [{**group, "total_step": total} for group in groups]
        return super()._adopt({"state": state, "param_groups": groups})

    def _loaded(self) -> None:
        for group in self.param_groups:
            self._begin(group)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.__dict__.setdefault("_mask_seed", torch.initial_seed() % 2**62)  # of an older pickle


def _index_of(groups: Sequence[dict[str, Any]], group: dict[str, Any]) -> int:
    return next(i for i, g in enumerate(groups) if g is group)


def _signed(x: int) -> int:
    return (x + 2**63) % 2**64 - 2**63


_FACTORS = tuple(map(_signed, (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB)))


def _mix(x: torch.Tensor) -> torch.Tensor:
    """SplitMix64 (Steele, Lea, Flood, 2014) on int64: a bijection, so that no two entries tie, and the same on every device."""
    x = x * _FACTORS[0]
    x = (x ^ ((x >> 30) & (2**34 - 1))) * _FACTORS[1]
    x = (x ^ ((x >> 27) & (2**37 - 1))) * _FACTORS[2]
    return x ^ ((x >> 31) & (2**33 - 1))


def _mixed_number(*numbers: int) -> int:
    mixed = 0
    for number in numbers:
        mixed = int(_mix(torch.tensor(_signed(mixed + number + 1))))
    return mixed


@checks.arguments(
    model=checks.module,
    density=checks.Number(0.0, 1.0, "(]"),
    include=checks.Several(checks.text, words="a list of parts of names"),
)
def spam_param_groups(
    model: torch.nn.Module, density: float, include: Iterable[str] = ("attn", "mlp", "attention")
) -> list[dict[str, Any]]:
    """Param groups with sparse momentum for the linear layers inside attention and feed-forward blocks, as in the paper.

    Args:
        model: its trainable parameters are divided.
        density: of the moments of ``torch.nn.Linear`` weights whose module's name contains one of ``include``.
        include: parts of names. Embeddings, norms, biases and the output layer usually have none of them.

    Returns:
        Two groups of named parameters, the sparse one first; empty ones are left out.
    """
    parts = tuple(include)
    sparse = {
        module.weight
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and any(part in name for part in parts)
    }
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    groups = [
        {"params": [(name, p) for name, p in named if p in sparse], "density": density},
        {"params": [(name, p) for name, p in named if p not in sparse]},
    ]
    return [group for group in groups if group["params"]]


_LIST = checks.Each(checks.tensor, words="a list of tensors")


@checks.arguments(grads=_LIST, exp_avg_sqs=_LIST, threshold=checks.positive)
@torch.no_grad()
def clip_spikes_(
    grads: Sequence[torch.Tensor], exp_avg_sqs: Sequence[torch.Tensor], threshold: float = 5000.0
) -> torch.Tensor:
    """SPAM's clipping for any Adam: in place, ``g = sign(g) sqrt(threshold v)`` where ``g^2 > threshold v`` and ``v > 0``.

    Args:
        grads: gradients.
        exp_avg_sqs: second moments before this step, without bias correction, of the gradients' shapes.
        threshold: positive.

    Returns:
        The number of clipped entries, on the first gradient's device.

    Raises:
        ValueError: lists of unequal length or tensors of unequal shape, or a threshold that is not positive.
    """
    if len(grads) != len(exp_avg_sqs):
        raise ValueError(f"exp_avg_sqs has {len(exp_avg_sqs)} tensors where grads has {len(grads)}")
    for i, (g, v) in enumerate(zip(grads, exp_avg_sqs, strict=True)):
        if g.shape != v.shape:
            raise ValueError(f"exp_avg_sqs[{i}] has shape {tuple(v.shape)} where grads[{i}] has {tuple(g.shape)}")
    total = torch.zeros((), dtype=torch.int64, device=grads[0].device if grads else None)
    for g, v in zip(grads, exp_avg_sqs, strict=True):
        value, bound = g.to(v.dtype), threshold * v
        spike = (value * value > bound) & (v > 0)
        total += spike.sum().to(total.device)
        g.copy_(torch.where(spike, sign(value) * bound.sqrt(), value))
    return total


class SpikeMonitor:
    """Counts spikes of the gradient: entries above ``threshold`` times their own mean size before (the paper's GSS).

    Entries that are not finite are spikes, and left out of the mean. Those that were always zero have no size to compare with.

    Args:
        window: steps that the mean goes over. It is kept as one number an entry: the plain mean of the first ``window`` steps,
            then an exponential one of that length.
        threshold: ratio from which on an entry is a spike.

    Example:
        >>> monitor = SpikeMonitor()
        >>> loss.backward()
        >>> monitor.update(model.named_parameters())
        >>> monitor.counts
    """

    @checks.arguments(window=checks.Integer(1), threshold=checks.positive)
    def __init__(self, window: int = 1000, threshold: float = 50.0) -> None:
        self.window, self.threshold = window, threshold
        self.counts: dict[str, torch.Tensor] = {}  # spikes so far, by name, on the parameters' devices
        self.steps = 0
        self._means: dict[str, tuple[torch.Tensor, int]] = {}

    @torch.no_grad()
    def update(self, named_parameters: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Look at the present gradients; parameters without one are left out. Does not wait for the device."""
        self.steps += 1
        for name, p in named_parameters:
            if p.grad is None:
                continue
            size = p.grad.abs().float() if p.dtype in LOW else p.grad.abs()
            mean, seen = self._means.get(name, (torch.zeros_like(size), 0))
            finite = size.isfinite()
            spikes = (~finite | ((size > self.threshold * mean) & (mean > 0))).sum()
            self.counts[name] = self.counts.get(name, torch.zeros_like(spikes)) + spikes
            seen = min(seen + 1, self.window)
            self._means[name] = (torch.where(finite, mean + (size - mean) / seen, mean), seen)

    @property
    def total(self) -> int:
        """All spikes so far; waits for the device."""
        return sum(int(count) for count in self.counts.values())
