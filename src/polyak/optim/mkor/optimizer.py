"""MKOR as an optimizer around another: hooks, factors and checkpoints together. Equations in the package's docstring."""

from __future__ import annotations

import functools
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from polyak.core import checks
from polyak.optim._engine.copies import kept
from polyak.optim.mkor import checkpoint, statistics
from polyak.optim.mkor.factors import FACTORS, STABILIZE, Rule, Stack, stacks
from polyak.optim.mkor.layers import MODEL, SKIP, Layer, Tally, eligible, named_layers
from polyak.optim.mkor.reduction import average
from polyak.optim.mkor.watch import Gate, Watch, aside

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


SCALER = checks.Like("a torch.amp.GradScaler", "is_enabled", "get_scale")


class _Group(checks.Kind):
    words = "a torch.distributed process group, None (all) or False (none)"

    def like(self, value: Any) -> bool:
        return value is None or value is False or (dist.is_available() and isinstance(value, dist.ProcessGroup))


GROUP = _Group()


class MKOR(Optimizer):
    """MKOR around a first-order optimizer (arXiv 2306.01685).

    It is a ``torch.optim.Optimizer`` that has the base's param groups and state: give it, not the base, to the training loop
    and to learning-rate schedulers. ``.grad`` is not changed: the base sees preconditioned gradients in its place.

    Args:
        model: a module, whose Linear and Conv2d layers are preconditioned where the base has their weights; or an iterable of
            modules, or of pairs (name, module). Grouped convolutions are left to the base, with a warning.
        base: the optimizer that steps: SGD, AdamW, polyak's. One whose ``step`` needs a closure (LBFGS) cannot serve.
        inv_freq: steps from one update of the factors to the next; the first step makes one.
        warmup_steps: each of the first so many steps makes one, too.
        decay: how much of a factor is kept at an update.
        update: "package": the official code's, which keeps 0 < J <= I. "ema": J is the inverse of the moving average
            ``C <- decay C + (1 - decay) v v^T``, C = I at first; it grows in every direction that is not seen, and so needs
            ``stabilize``.
        stabilize: (threshold, blend): where an entry of J is larger than the threshold after an update, both factors of its
            layer become ``(1 - blend) J + blend I`` at their next, in place of taking in a vector. What overflows on the
            inputs' side resets the outputs' in the same update. With "package" no entry is above 1, so that the default
            threshold never acts.
        factor_dtype: type in which factors are kept. Arithmetic is in float32, or float64 where anything is.
        clip: bound of every entry before means are taken.
        skip: names of modules, or modules, that are left to the base, with all inside them: vocabulary heads, say.
        process_group: processes whose vectors are averaged, in one all-reduce an update; None: all, where torch.distributed
            is initialized; False: none. Every process must step as often as the others.
        loss_reduction: "mean" or "sum", how the loss is made of its rows. For "mean" the rows' gradients are multiplied by
            their number, so that g is that of the mean's terms.
        scaler: the ``torch.amp.GradScaler`` in use, whose scale the vectors are freed of. Steps that it skips change nothing.

    Several passes before a step, from gradient accumulation (divide the loss by their number) or because a module is used more
    than once, count as rows of one batch. Means are taken as backward passes a layer: passes without one leave no trace,
    recomputed ones count once. For others, say for an attack on the inputs, use :meth:`no_stats`.

    Nothing waits for the device. A vector that is not finite is not taken in, its factor stays as it was: ``skipped`` counts
    these (and on the CPU the first one warns). A gradient that is not finite, or is zero, reaches the base as it is.

    State: the base's, and per layer the factors and their flags, by the module's name: ``state_dict()["mkor"]``. From its first
    step on a weight's state has them, too (``state[weight]["mkor_A"]`` and so on), and every param group the number of steps, so
    that the helpers of ``torch.distributed.checkpoint`` save and load all of it. The rest of a checkpoint loads into the base
    alone, too. Neither the means gathered since the last step, nor the hyperparameters are in it. A copy by pickle or deepcopy
    has hooks of its own on the modules it comes with, and neither ``scaler`` nor ``process_group``. Weights in shards (FSDP's)
    are refused: the factors need whole ones.

    In a model that is compiled the statistics are part of its graph, which they do not break.

    Raises:
        ValueError: an argument is out of range; there is no layer to precondition; two layers share a weight.
        TypeError: of the wrong type, or a weight in shards.
        RuntimeError: sparse gradients; a GradScaler that it was not given.

    Example:
        >>> optimizer = MKOR(model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9))
        >>> loss.backward()
        >>> optimizer.step()
    """

    base: Optimizer

    @checks.arguments(
        model=MODEL, base=checks.optimizer, inv_freq=checks.Integer(1), warmup_steps=checks.Integer(0),
        decay=checks.Number(0.0, 1.0, "()"), update=checks.Choice("package", "ema"),
        stabilize=STABILIZE, factor_dtype=checks.Choice(*DTYPES),
        clip=checks.positive, skip=SKIP, process_group=GROUP, loss_reduction=checks.Choice("mean", "sum"), scaler=SCALER | None,
    )  # fmt: skip
    def __init__(
        self,
        model: nn.Module | Iterable[nn.Module] | Iterable[tuple[str, nn.Module]],
        base: Optimizer,
        *,
        inv_freq: int = 10,
        warmup_steps: int = 0,
        decay: float = 0.95,
        update: str = "package",
        stabilize: tuple[float, float] = (2.0, 1.0),
        factor_dtype: torch.dtype = torch.float32,
        clip: float = 100.0,
        skip: Iterable[str | nn.Module] = (),
        process_group: Any = None,
        loss_reduction: str = "mean",
        scaler: Any = None,
    ) -> None:
        _check_base(base)
        self.inv_freq, self.warmup_steps, self.clip = inv_freq, warmup_steps, clip
        self.mean_loss, self.factor_dtype = loss_reduction == "mean", factor_dtype
        self.rule = Rule.checked(decay, update, stabilize, factor_dtype)
        self.process_group = process_group
        self._candidates = named_layers(model, skip)
        self._layers: list[Layer] = []
        self._stacks: list[Stack] = []
        self._steps = 0
        self._active = self._watching = True
        self._asked = self._warned = False
        self._handles: list[Any] = []
        # As an optimizer is restored from a pickle: param groups and state exist already, they are the base's.
        self.__setstate__({"base": base, "_hooked": False, "_gate": self._new_gate()})
        self.scaler = scaler
        self._register()
        if not self._layers:
            raise ValueError("model: MKOR found no Linear or Conv2d whose weight the base optimizer has")
        self._hook()
        self._note()

    # What is the base's.

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        return self.base.param_groups

    @property
    def state(self) -> Any:  # type: ignore[override]
        return self.base.state

    @property
    def defaults(self) -> dict[str, Any]:  # type: ignore[override]
        return self.base.defaults

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As the base's; layers whose weights are new are preconditioned from now on."""
        self.base.add_param_group(param_group)
        if self._active:
            self._register()
        if self._hooked:
            self._unhook()
            self._hook()
        self._note()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As the base's; means gathered for a step that did not come are dropped."""
        self._forget()
        self.base.zero_grad(set_to_none)

    # Statistics.

    @property
    def _step_supports_amp_scaling(self) -> bool:
        # GradScaler.step asks this before it steps, or does not step.
        if self.scaler is None:
            raise RuntimeError(
                "MKOR must know the GradScaler to see gradients unscaled: MKOR(model, base, scaler=scaler)"
            )
        if self._asked:
            self._drop()
        for layer in self._layers:
            layer.collect()
        self._asked = True
        self._gate.loss_scale = self._gate.scale()
        return False

    @property
    def scaler(self) -> Any:
        """The GradScaler in use; may be set."""
        return self._gate.scaler

    @scaler.setter
    def scaler(self, value: Any) -> None:
        self._gate.scaler = (SCALER | None)("scaler", value)
        self._gate.prime(self._layers)

    @contextmanager
    def no_stats(self) -> Iterator[None]:
        """Forward and backward passes inside leave no statistics."""
        before, self._watching = self._watching, False
        self._open()
        try:
            with aside(self._layers):
                yield
        finally:
            self._watching = before
            self._open()

    def remove(self) -> None:
        """Take the hooks off the modules: no statistics are gathered any more, and the factors stay as they are."""
        self._unhook()
        self._forget()
        self._gate.silent = -1  # which was asked for: no word of passes that are not seen

    def _due(self) -> bool:
        return self._steps % self.inv_freq == 0 or self._steps < self.warmup_steps

    def _see(self, layer: Layer, x: Tensor, output: Tensor) -> None:
        if self._watching and self._due() and x.numel():
            a = statistics.input_mean(layer, x, self.clip, torch.promote_types(x.dtype, torch.float32))
            output.register_hook(functools.partial(self._seen, layer, a))

    @torch.no_grad()
    def _seen(self, layer: Layer, a: Tensor, grad: Tensor) -> None:
        if not self._watching:
            return
        if self._asked:
            self._drop()
        dtype = torch.promote_types(grad.dtype, torch.float32)
        layer.add(a, statistics.output_mean(layer, grad, self.clip, dtype, self._gate.scale(), self.mean_loss))

    def _drop(self) -> None:
        """Leave out what was gathered for a step that the scaler skipped, since it found an infinity."""
        self._asked = False
        for layer in self._layers:
            layer.drop()

    def _forget(self) -> None:
        self._asked = False
        for layer in self._layers:
            layer.clear()
        self._open()

    def _new_gate(self) -> Gate:
        gate = Gate(self.clip, self.mean_loss)
        weakref.finalize(self, gate.shut)
        return gate

    def _open(self) -> None:
        self._gate.open = self._watching and self._hooked and self._due()

    def _register(self) -> None:
        """Take up the layers whose weights the base has, and stack them anew."""
        mine = {p for group in self.base.param_groups for p in group["params"]}
        known = {layer.module for layer in self._layers}
        added = [Layer.of(n, m) for n, m in self._candidates if m not in known and m.weight in mine and eligible(n, m)]
        weights: dict[Tensor, str] = {}
        for layer in (*self._layers, *added):
            if (other := weights.setdefault(layer.weight, layer.name)) != layer.name:
                raise ValueError(f"{other!r} and {layer.name!r} share a weight: name one of them in skip")
        self._layers += added
        self._restack()

    def _hook(self) -> None:
        self._gate.prime(self._layers)
        self._handles = [
            layer.module.register_forward_hook(Watch(self._see, layer, self._gate), with_kwargs=True)
            for layer in self._layers
        ]
        self._hooked = True
        self._open()

    def _unhook(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles, self._hooked = [], False
        self._open()  # a graph that was compiled with a hook keeps it

    # Factors.

    @property
    def factors(self) -> dict[str, tuple[Tensor, Tensor]]:
        """The inverse factors (A, G) by the module's name, of shapes (d_in + 1, d_in + 1) (d_in without bias), (d_out, d_out)."""
        return {
            layer.name: (stack.A.J[i], stack.G.J[i]) for stack in self._stacks for i, layer in enumerate(stack.layers)
        }

    @property
    def skipped(self) -> int:
        """How many updates of factors were left out since their vector was not finite. Waits for the device."""
        return sum(int(stack.skipped.sum()) for stack in self._stacks)

    def _restack(self) -> None:
        """Stacks for the layers as they are now (their number, devices, types), with the factors that there were."""
        self._load_factors(self._saved_factors())

    def _load_factors(self, saved: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Stacks for the layers as they are now, with these factors, or I."""
        self._stacks = stacks(self._layers, self.factor_dtype)
        for stack in self._stacks:
            for layer, entries in zip(stack.layers, stack.entries, strict=True):
                layer.collect()
                layer.tally = Tally(layer.inputs, layer.outputs, layer.weight)
                for name in FACTORS if saved.get(layer.name) else ():
                    entries[f"mkor_{name}"].copy_(saved[layer.name][name])
        checkpoint.renew(self.base, self._stacks)

    def _current(self) -> bool:
        """Whether all weights are still on the devices, and of the types, that they were stacked for."""
        return all(
            layer.weight.device == stack.device and layer.weight.dtype == stack.weight_dtype
            for stack in self._stacks
            for layer in stack.layers
        )

    def _update_factors(self) -> None:
        gathered = [stack.vectors(self.mean_loss) for stack in self._stacks]
        self._gate.look_for_passes(self._layers)
        for stack, vectors in zip(self._stacks, average(gathered, self.process_group), strict=True):
            stack.update(*vectors, self.rule)
            if not self._warned and stack.device.type == "cpu" and bool(stack.skipped.any()):
                self._warned = True
                names = [layer.name for layer, count in zip(stack.layers, stack.skipped, strict=True) if count]
                warnings.warn(f"MKOR: statistics of {names} are not finite and were not taken in", stacklevel=4)

    # The step.

    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Update the factors where that is due, precondition, and let the base step.

        Args:
            closure: evaluates the model anew and returns the loss, which is returned.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for layer in self._layers:
            if layer.weight.grad is not None and layer.weight.grad.layout != torch.strided:
                raise RuntimeError(f"MKOR does not support sparse gradients; the weight of {layer.name!r} has one")
        replaced: list[tuple[Tensor, Tensor | None]] = []
        try:
            if self._active:
                with torch.no_grad():
                    self._precondition(replaced)
            self.base.step()
        finally:
            for p, grad in replaced:
                p.grad = grad
        self._steps += 1
        self._forget()
        self._after_step(loss)
        checkpoint.publish(self.base, self._stacks)
        self._note()
        return loss

    def _after_step(self, loss: Any) -> None:
        """What a subclass does with the closure's loss, where there is one."""

    def _precondition(self, replaced: list[tuple[Tensor, Tensor | None]]) -> None:
        """Put the preconditioned gradients in the place of the gradients, which go to the list."""
        if not self._current():
            self._restack()
        if self._due():
            self._update_factors()
        for stack in self._stacks:
            with torch.autocast(stack.device.type, enabled=False):
                for p, value in stack.precondition():
                    replaced.append((p, p.grad))
                    p.grad = value

    def fallback(self) -> None:
        """Step with the base alone from now on; its state is kept, hooks and factors go."""
        self.remove()
        self._active, self._stacks = False, []
        checkpoint.withdraw(self.base)
        self._note()

    @property
    def preconditions(self) -> bool:
        """Whether it still does: not after :meth:`fallback`."""
        return self._active

    # Checkpoints and copies.

    def _saved_factors(self) -> dict[str, dict[str, Tensor]]:
        return {
            layer.name: {name: entries[f"mkor_{name}"] for name in FACTORS}
            for stack in self._stacks
            for layer, entries in zip(stack.layers, stack.entries, strict=True)
        }

    def state_dict(self) -> dict[str, Any]:
        """The base's state_dict, and beside its entries "mkor": factors by the module's name, and the number of steps."""
        for pre_hook in self._optimizer_state_dict_pre_hooks.values():
            pre_hook(self)
        saved = {**self.base.state_dict(), "mkor": self._own_state()}
        for post_hook in self._optimizer_state_dict_post_hooks.values():
            changed = post_hook(self, saved)
            saved = saved if changed is None else changed
        return saved

    def _numbers(self) -> dict[str, Any]:
        return {"base": type(self.base).__name__, "steps": self._steps, "preconditions": self._active}

    def _note(self) -> None:
        checkpoint.write_numbers(self.base, self._numbers())

    def _own_state(self) -> dict[str, Any]:
        return {**self._numbers(), "factors": self._saved_factors()}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:  # type: ignore[override]
        """Load a checkpoint. One of another optimizer or of other layers raises ValueError and changes nothing."""
        saved = dict(state_dict)
        for pre_hook in self._optimizer_load_state_dict_pre_hooks.values():
            changed = pre_hook(self, saved)
            saved = saved if changed is None else dict(changed)
        params = [p for group in self.param_groups for p in group["params"]]
        saved, found = checkpoint.divide(saved, params, self._layers)
        own = saved.pop("mkor", found)  # without "mkor": the helpers of torch.distributed.checkpoint
        checkpoint.check(own, type(self.base).__name__, self._layers)
        self.base.load_state_dict(saved)
        self._load_own_state(own)
        checkpoint.renew(self.base, self._stacks, found)
        self._note()
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def _load_own_state(self, own: Mapping[str, Any]) -> None:
        self._steps = own["steps"]
        self._forget()
        if not own["preconditions"]:
            self.fallback()
            return
        if not self._active:
            self._active = True
            self._hook()
        self._load_factors(own["factors"])

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in kept(self).items() if k not in ("_handles", "_gate", "process_group")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        fresh = "_layers" in state
        if fresh:
            state = {"_handles": [], "process_group": None, **state}
        super().__setstate__(state)
        if fresh:
            self._gate = self._new_gate()
            checkpoint.renew(self.base, self._stacks)
            if self._hooked:
                self._hook()


def _check_base(base: Optimizer) -> None:
    if isinstance(base, MKOR):
        raise ValueError("base must not be MKOR itself")
    if isinstance(base, torch.optim.LBFGS):
        raise ValueError("base must step without a closure, which LBFGS does not")
