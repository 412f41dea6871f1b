"""The base of the elementwise optimizers: ``torch.optim.Optimizer`` around a rule that is written once.

A subclass holds its rule, the names of its state tensors and of its options, and its defaults. This class holds what all of
them share: param groups and lazily made state. How a step is planned, dispatched and run is in the files of those names.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch.optim import Optimizer

from polyak.core import checks
from polyak.core.launch import available
from polyak.optim._engine import checkpoints, compiled, copies, dispatch, hooks, launch, options, running
from polyak.optim._engine.places import Places
from polyak.optim._engine.plan import Cohort, Plan
from polyak.optim._engine.tensors import LOW


class RuleOptimizer(Optimizer):
    """An optimizer whose update is an elementwise rule ``rule(p, g, state, h) -> (p, {state: value})``.

    Subclasses define ``rule`` (a static method written with ``polyak.core.elementwise`` and arithmetic), ``state_names``, and
    which of their options the rule sees. ``h`` holds those of the param group, and ``h.step`` (1 at a tensor's first update).
    """

    rule: ClassVar[Callable[..., tuple[Any, dict[str, Any]]]]
    state_names: ClassVar[tuple[str, ...]]
    numbers: ClassVar[tuple[str, ...]] = ("lr",)  # options that are a number: traced, so that they may change
    tuples: ClassVar[Mapping[str, int]] = {}  # options that are so many numbers
    switches: ClassVar[tuple[str, ...]] = ()  # options that the rule branches on
    counts_steps: ClassVar[bool] = True
    declared: ClassVar[Mapping[str, checks.Kind]] = {}  # what each further argument, and option of a group, may be
    __checks__: ClassVar[Mapping[str, checks.Kind]] = options.KINDS  # those of the classes above, too
    other_names: ClassVar[tuple[str, ...]] = ()  # state tensors that the rule does not see
    multi_tensor: ClassVar[bool] = True  # whether lists of tensors (_foreach_ calls) can run the rule

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.__checks__ = {**cls.__checks__, **vars(cls).get("declared", {})}

    def __init__(self, params: Any, defaults: dict[str, Any], *, generator: torch.Generator | None = None) -> None:
        for name, value in options.DEFAULTS.items():
            defaults.setdefault(name, value)
        options.check(self.__checks__, defaults)
        params, generator = (
            self.__checks__[n](n, given) for n, given in (("params", params), ("generator", generator))
        )
        if generator is not None and defaults["rounding"] != "stochastic":
            raise ValueError(f"generator is used by rounding='stochastic' only, got rounding={defaults['rounding']!r}")
        defaults["rounding_seed"] = (
            int(torch.randint(0, 2**31, (), generator=generator)) if defaults["rounding"] == "stochastic" else 0
        )
        self._forget()
        self._extra_values: list[dict[str, torch.Tensor]] = []
        hooks.wrap(type(self))
        try:
            super().__init__(params, defaults)
        except (TypeError, ValueError) as error:
            # Which of several groups it is about.
            at = len(getattr(self, "param_groups", ()))
            several = isinstance(params, list) and at < len(params) and isinstance(params[at], dict)
            if several and type(error) in (TypeError, ValueError):
                raise type(error)(f"params[{at}]: {error}") from None
            if type(error) is ValueError and "can't optimize a non-leaf" in str(error):
                raise ValueError(f"params: {error}") from None
            raise

    @property
    def _step_supports_amp_scaling(self) -> bool:
        # GradScaler then hands over its scale and its finding on the device, and does not wait for it.
        return all(
            group["capturable"] and all(self._mode(group, p.device) == "kernel" for p in group["params"])
            for group in self.param_groups
        )

    def _mode(self, group: dict[str, Any], device: torch.device) -> str:
        return dispatch.mode_of(self, group, device)

    # What a subclass may say about itself.

    def _check_group(self, group: dict[str, Any]) -> None:
        """Raise ValueError where a param group's hyperparameters are not allowed. Called for every group added or loaded."""

    def _elementwise(self, group: dict[str, Any]) -> bool:
        """Whether the rule of this group is elementwise; one that is not runs per tensor in eager PyTorch."""
        return True

    def _extra(self, group: dict[str, Any]) -> tuple[str, ...]:
        """Names of further uniform inputs of the rule, which are in `_extra_values` when the group is updated."""
        return ()

    def _derived(self, group: dict[str, Any]) -> dict[str, float]:
        """Further uniform inputs of the rule, numbers that change from step to step."""
        return {}

    def _prepare(self) -> None:
        """Called once a step before the groups are updated; fills `_extra_values`: for each group, name -> tensor."""

    def _note(self, p: torch.Tensor) -> Any:
        """What the eager rule finds as ``h.note`` for this parameter."""
        return None

    def _places(self, p: torch.Tensor) -> Places | None:
        """The elements that have a state and are updated; None: all. Their tensors are among ``other_names``."""
        return None

    def _fits(self, group: dict[str, Any], p: torch.Tensor) -> bool:
        """Whether compiled code can take a parameter that is plain, dense memory beside its state."""
        return True

    def _needs_norm(self, group: dict[str, Any]) -> bool:
        """Whether the rule sees ``h.grad_norm``, the norm of all of the optimizer's gradients together."""
        return False

    def _launch(self, cohort: Cohort) -> Any:
        """The GPU's runner of a cohort."""
        return launch.Launch(cohort)

    def _compiled(self, cohort: Cohort) -> Any:
        """The CPU's compiled runner of a cohort, or None where there cannot be one."""
        return compiled.make(cohort)

    # State.

    def _counts(self, group: dict[str, Any]) -> bool:
        return self.counts_steps or group["rounding"] == "stochastic"

    def _stored(self, group: dict[str, Any]) -> list[str]:
        return [*self.state_names, *(["compensation"] if group["rounding"] == "kahan" else [])]

    def _state_like(self, name: str, p: torch.Tensor, group: dict[str, Any]) -> torch.Tensor:
        """A state tensor as it is before the first step."""
        return torch.zeros_like(p, dtype=self._state_dtype(name, p, group), memory_format=torch.preserve_format)

    def _state_dtype(self, name: str, p: torch.Tensor, group: dict[str, Any]) -> torch.dtype:
        wanted = group["state_dtype"]
        if wanted is None:
            return p.dtype
        return wanted.to_complex() if p.is_complex() else wanted

    def _has_state(self, p: torch.Tensor) -> bool:
        """Whether a parameter's own state is made."""
        return any(name in self.state.get(p, ()) for name in self.state_names or ("step",))

    def _init_group(self, group: dict[str, Any], params: Sequence[torch.Tensor], grads: Sequence[torch.Tensor]) -> None:
        """Check the gradients, and make the state of parameters that have none yet."""
        for g in grads:
            if g.layout is not torch.strided:
                raise RuntimeError(f"{type(self).__name__} does not support sparse gradients, got layout {g.layout}")
        # Others keep entries of theirs in a state, which is not made before ours are there.
        fresh = [p for p in params if not self._has_state(p)]
        if fresh:
            self._init_state(group, fresh)
        for p in params:
            state = self.state[p]
            if group["rounding"] == "kahan" and "compensation" not in state:
                state["compensation"] = torch.zeros_like(p, memory_format=torch.preserve_format)
            if lacking := [name for name in self._needed(group) if name not in state]:
                raise RuntimeError(f"{type(self).__name__}: the state of a parameter lacks {', '.join(lacking)}")

    def _needed(self, group: dict[str, Any]) -> list[str]:
        """What a parameter's state must hold."""
        return [*self._stored(group), *(["step"] if self._counts(group) else [])]

    def _init_state(self, group: dict[str, Any], params: list[torch.Tensor]) -> None:
        steps: dict[torch.device, torch.Tensor] = {}
        for p in params:
            state = self.state[p]
            if self._counts(group):
                # One counter for all that start together: a step increments one tensor, not one per parameter.
                device = p.device if group["capturable"] else torch.device("cpu")
                if device not in steps:
                    steps[device] = torch.tensor(0.0, dtype=torch.float32, device=device)
                state["step"] = steps[device]
            for name in self.state_names:
                state[name] = self._state_like(name, p, group)

    # Param groups and checkpoints.

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As in torch.optim; what is no option is kept, with a warning where it looks like one that is misspelt."""
        if isinstance(param_group, dict) and "params" not in param_group:
            raise ValueError(f"param_group must have an entry 'params', got {checks.shown(param_group)}")
        super().add_param_group(param_group)
        try:
            self._check_engine(self.param_groups[-1])
            self._check_group(self.param_groups[-1])
        except Exception:
            self.param_groups.pop()
            raise
        options.warn_of_near_misses(type(self).__name__, self.param_groups[-1], self.defaults)

    def _check_engine(self, group: dict[str, Any]) -> None:
        options.check(self.__checks__, group)
        if group["fused"] and group["foreach"]:
            raise ValueError("`fused` and `foreach` cannot be `True` together.")
        if group["differentiable"] and (group["fused"] or group["foreach"]):
            raise ValueError("`differentiable` works with neither `foreach` nor `fused`.")
        for p in group["params"]:
            if not (p.is_floating_point() or p.is_complex()):
                raise ValueError(f"{type(self).__name__} needs floating-point or complex parameters, got {p.dtype}")
            if group["fused"] and not available(p.device):
                raise ValueError(
                    f"fused=True needs parameters on a CUDA device and Triton; got one on {p.device}. "
                    "On the CPU the default (fused=None) is the fast path."
                )
            if group["rounding"] != "nearest" and p.dtype not in LOW:
                raise ValueError(
                    f"rounding={group['rounding']!r} is for bfloat16 and float16 parameters, got {p.dtype}"
                )

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._forget()
        for group in self.param_groups:
            for name, value in self.defaults.items():
                group.setdefault(name, value)

    def __getstate__(self) -> dict[str, Any]:
        # A plan holds compiled functions and addresses; it is made again.
        return {**copies.kept(self), "_plan": None, "_loose_counts": [], "_generators": {}, "_extra_values": []}

    def _forget(self) -> None:
        """Look at everything anew at the next step."""
        self._plan: Plan | None = None
        self._loose_counts: list[torch.Tensor] = []
        self._generators: dict[int, torch.Generator] = {}  # of stochastic rounding where there is no compiled code

    def state_dict(self) -> dict[str, Any]:
        """As in torch.optim; options that are objects are written as text, which every loader takes."""
        with checkpoints.written(self):
            return super().state_dict()

    def _write_options(self, group: dict[str, Any]) -> None:
        """Make a saved param group hold plain values only: ``torch.load`` and distributed checkpoints refuse others."""
        checkpoints.write_options(group)

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Load a checkpoint. One of another optimizer, or for other shapes, raises ValueError and changes nothing."""
        checkpoints.load(self, state_dict, super().load_state_dict)  # type: ignore[arg-type]

    def _loaded(self) -> None:
        """What is left to do when a checkpoint has been loaded."""

    def _shape(self, p: torch.Tensor, values: Mapping[str, Any]) -> torch.Size:
        """The shape that a loaded state tensor of ``p`` must have."""
        return p.shape

    def _adopt(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """Translate checkpoints of other implementations; a subclass knows which. Missing options take the defaults."""
        return checkpoints.adopt(self, state_dict)

    # The step.

    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Update all parameters that have a gradient.

        Args:
            closure: evaluates the model anew and returns the loss, which is returned.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with torch.set_grad_enabled(bool(self.defaults["differentiable"])):
            if torch.compiler.is_compiling():
                running.untraced_step(self)  # type: ignore[call-arg]
            else:
                running.step(self)
        return loss

    def _counted(self) -> torch.Tensor:
        """How many elements the rule's condition held for at the last step: on the first parameter's device, no waiting."""
        return running.counted(self)
