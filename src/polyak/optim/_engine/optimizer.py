"""The base of the elementwise optimizers: ``torch.optim.Optimizer`` around a rule that is written once.

A subclass holds its rule, the names of its state tensors, and its defaults; this class holds what all of them share: lazily
made state, shared step counters, complex, sharded and low-precision tensors, the choice of backend, and checkpoints.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from numbers import Real
from typing import Any, ClassVar

import torch
from torch.optim import Optimizer

from polyak.core import checks
from polyak.optim._engine import foreach as foreach_backend
from polyak.optim._engine import kernel
from polyak.optim._engine.blocked import Blocked, Layout
from polyak.optim._engine.compiled import compiled
from polyak.optim._engine.eager import eager
from polyak.optim._engine.places import Places
from polyak.optim._engine.rounding import Rounding
from polyak.optim._engine.tensors import (
    LOW,
    compute_dtype,
    dense,
    flat,
    is_dtensor,
    laid_out,
    placed_like,
    plain,
    real_dtype,
    wide,
)
from polyak.optim._engine.trace import Hyper, Program, trace

ENGINE_OPTIONS = (
    "maximize", "foreach", "fused", "capturable", "differentiable", "state_dtype", "rounding", "rounding_seed",
)  # fmt: skip
ROUNDINGS = ("nearest", "stochastic", "kahan")
_ENGINE_DEFAULTS = dict(
    maximize=False, foreach=None, fused=None, capturable=False, differentiable=False, state_dtype=None, rounding="nearest"
)  # fmt: skip
_NUMBER = (int, float, Real)  # the last for NumPy's; the first two are quick to test
_GRAD, _DTYPE = operator.attrgetter("grad"), operator.attrgetter("dtype")  # in map(), no bytecode per tensor

_programs: dict[Any, Program] = {}


@dataclass(eq=False)
class Cohort:
    """The parameters of a plan that are updated together: one step count, one combination of types."""

    mode: str  # "eager", "compiled", "blocked", "foreach" or "kernel"
    members: list[int]  # positions in the plan
    salt: int  # tells its random numbers from those of other cohorts and groups
    step: torch.Tensor | None
    device: torch.device
    runner: Any = None
    arrays: list[list[torch.Tensor]] = field(default_factory=list)  # per program input but "g": local tensors
    strides: list[tuple[int, ...]] = field(default_factory=list)
    generator: torch.Generator | None = None
    notes: list[Any] = field(default_factory=list)  # per parameter, what the rule wants to know of it
    counts: list[torch.Tensor] = field(
        default_factory=list
    )  # of the last step, where the rule counts and has no runner
    places: list[Places] | None = None  # per parameter the elements that have a state, where not all have


@dataclass(eq=False)
class Plan:
    """How a param group was last updated; good for as long as nothing it depends on has changed."""

    key: Any
    params: list[torch.Tensor]
    states: list[dict[str, Any]]
    all_states: list[dict[str, Any]]  # of the optimizer, in its order
    contents: list[Any]  # the values of `states`, one after the other
    tensors: dict[str, list[Any]]  # per state name, as found in `states`
    pointers: list[list[int]]  # of the parameters, then per stored state
    strides: list[tuple[int, ...]]  # of the parameters
    options: list[Any] | None  # of the group, in the order of the defaults; None where they may change unseen
    numbers: dict[str, Any]  # made of them
    unwrap: bool  # whether gradients must be made local and real before they are used
    grad_types: list[torch.dtype]
    cohorts: list[Cohort]

    @property
    def mode(self) -> str:
        """The cohorts' backend; that of the first where devices differ."""
        return self.cohorts[0].mode


class RuleOptimizer(Optimizer):
    """An optimizer whose update is an elementwise rule ``rule(p, g, state, h) -> (p, {state: value})``.

    Subclasses define ``rule`` (a static method written with ``polyak.core.elementwise`` and arithmetic) and ``state_names``.
    ``h`` holds the param group's own hyperparameters and ``h.step`` (1 at the first update of a tensor).
    """

    rule: ClassVar[Callable[..., tuple[Any, dict[str, Any]]]]
    state_names: ClassVar[tuple[str, ...]]
    counts_steps: ClassVar[bool] = True
    other_names: ClassVar[tuple[str, ...]] = ()  # state tensors that the rule does not see
    multi_tensor: ClassVar[bool] = True  # whether the backends of blocks and of _foreach_ calls can run the rule

    def __init__(self, params: Any, defaults: dict[str, Any], *, generator: torch.Generator | None = None) -> None:
        for name, value in _ENGINE_DEFAULTS.items():
            defaults.setdefault(name, value)
        _check_options(defaults)
        if generator is not None and defaults["rounding"] != "stochastic":
            raise ValueError(f"generator is used by rounding='stochastic' only, got rounding={defaults['rounding']!r}")
        defaults["rounding_seed"] = (
            int(torch.randint(0, 2**31, (), generator=generator)) if defaults["rounding"] == "stochastic" else 0
        )
        self._plans: dict[int, Plan] = {}
        self._extra_values: list[dict[str, torch.Tensor]] = []
        super().__init__(params, defaults)

    @property
    def _step_supports_amp_scaling(self) -> bool:
        # GradScaler then hands over its scale and its finding on the device, and does not wait for it.
        return all(
            group["capturable"] and all(self._mode(group, p.device) == "kernel" for p in group["params"])
            for group in self.param_groups
        )

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

    def _note(self, p: torch.Tensor) -> Any:
        """What the eager rule finds as ``h.note`` for this parameter."""
        return None

    def _places(self, p: torch.Tensor) -> Places | None:
        """The elements that have a state and are updated; None: all. Their tensors are among ``other_names``."""
        return None

    def _state_like(self, name: str, p: torch.Tensor, group: dict[str, Any]) -> torch.Tensor:
        """A state tensor as it is before the first step."""
        return torch.zeros_like(p, dtype=self._state_dtype(name, p, group), memory_format=torch.preserve_format)

    def _state_dtype(self, name: str, p: torch.Tensor, group: dict[str, Any]) -> torch.dtype:
        wanted = group["state_dtype"]
        if wanted is None:
            return p.dtype
        return wanted.to_complex() if p.is_complex() else wanted

    def _launch(
        self,
        program: Program,
        signature: kernel.Signature,
        cohort: Cohort,
        owners: list[torch.Tensor],
        group: dict[str, Any],
    ) -> Any:
        """The GPU's runner of a cohort."""
        return kernel.Launch(program, signature, cohort.arrays, cohort.places)

    def _compiled(
        self, program: Program, layout: Layout, cohort: Cohort, owners: list[torch.Tensor], group: dict[str, Any]
    ) -> Any:
        """The CPU's compiled runner of a cohort, or None where there cannot be one."""
        return compiled(program, layout, cohort.arrays, cohort.places)

    def _counts(self, group: dict[str, Any]) -> bool:
        return self.counts_steps or group["rounding"] == "stochastic"

    # Param groups and checkpoints.

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        allowed = {*self.defaults, "params", "name", "param_names", "initial_lr"}
        if isinstance(param_group, dict):
            for name in param_group:
                if name not in allowed:
                    hint = checks.suggestion(name, self.defaults)
                    raise ValueError(f"{type(self).__name__} has no option {name!r} (param group){hint}")
        super().add_param_group(param_group)
        try:
            self._check_engine(self.param_groups[-1])
            self._check_group(self.param_groups[-1])
        except Exception:
            self.param_groups.pop()
            raise

    def _check_engine(self, group: dict[str, Any]) -> None:
        _check_options(group)
        if group["fused"] and group["foreach"]:
            raise ValueError("`fused` and `foreach` cannot be `True` together.")
        if group["differentiable"] and (group["fused"] or group["foreach"]):
            raise ValueError("`differentiable` works with neither `foreach` nor `fused`.")
        for p in group["params"]:
            if not (p.is_floating_point() or p.is_complex()):
                raise ValueError(f"{type(self).__name__} needs floating-point or complex parameters, got {p.dtype}")
            if group["fused"] and not kernel.available(p.device):
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
        self._plans = {}
        for group in self.param_groups:
            for name, value in self.defaults.items():
                group.setdefault(name, value)

    def __getstate__(self) -> dict[str, Any]:
        # Plans hold compiled functions and device tables; they are made again.
        return {**super().__getstate__(), "_plans": {}}

    def state_dict(self) -> dict[str, Any]:
        """As in torch.optim; options that are objects are written as text, which every loader takes."""
        saved = super().state_dict()
        for group in saved["param_groups"]:
            self._write_options(group)
        return saved

    def _write_options(self, group: dict[str, Any]) -> None:
        """Make a saved param group hold plain values only: ``torch.load`` and distributed checkpoints refuse others."""
        if group["state_dtype"] is not None:
            group["state_dtype"] = str(group["state_dtype"]).removeprefix("torch.")

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Load a checkpoint. One of another optimizer, or for other shapes, raises ValueError and changes nothing."""
        saved = self._adopt({"state": dict(state_dict["state"]), "param_groups": list(state_dict["param_groups"])})
        mine = [p for group in self.param_groups for p in group["params"]]
        ids = [i for group in saved["param_groups"] for i in group["params"]]
        known = {*self.state_names, *self.other_names, "step", "compensation"}
        if len(mine) == len(ids):
            for i, p in zip(ids, mine, strict=True):
                values = saved["state"].get(i, {})
                if values and (set(values) - known or set(self.state_names) - set(values)):
                    raise ValueError(
                        f"this state_dict is not one of {type(self).__name__}: state {sorted(values)} "
                        f"where {sorted(self.state_names)} is needed"
                    )
                if values and self.counts_steps and "step" not in values:
                    raise ValueError(f"state_dict: parameter {i} has no step, which {type(self).__name__} counts")
                for name in self.state_names:
                    if name in values and values[name].shape != (shape := self._shape(p, values)):
                        raise ValueError(
                            f"state_dict: {name} of parameter {i} has shape {tuple(values[name].shape)}, "
                            f"where {tuple(shape)} is needed"
                        )
        before = self.__getstate__()
        super().load_state_dict(saved)
        try:
            for group in self.param_groups:
                self._check_engine(group)
                self._check_group(group)
        except Exception:
            self.__setstate__(before)
            raise
        self._plans = {}
        # torch.optim casts loaded state to the parameter's type, which would round a wider state.
        saved_ids = iter(ids)
        counters: dict[Any, torch.Tensor] = {}
        for group in self.param_groups:
            for p in group["params"]:
                values = saved["state"].get(next(saved_ids), {})
                for name in self._stored(group) if values else ():
                    if name in values:
                        dtype = self._state_dtype(name, p, group) if name in self.state_names else p.dtype
                        # A copy: torch.optim would go on in the checkpoint's own tensors.
                        self.state[p][name] = values[name].to(device=p.device, dtype=dtype, copy=True)
                    else:
                        self.state[p][name] = torch.zeros_like(p, memory_format=torch.preserve_format)
                for name in self.other_names:
                    if name in values:
                        self.state[p][name] = values[name].to(device=p.device, copy=True)
                if self.state.get(p) and self._counts(group):
                    # Those of one count share a counter again: launches are one per counter.
                    count = float(self.state[p].get("step", 0.0))
                    device = p.device if group["capturable"] else torch.device("cpu")
                    shared = counters.setdefault(
                        (count, device), torch.tensor(count, dtype=torch.float32, device=device)
                    )
                    self.state[p]["step"] = shared

    def _shape(self, p: torch.Tensor, values: Mapping[str, Any]) -> torch.Size:
        """The shape that a loaded state tensor of ``p`` must have."""
        return p.shape

    def _adopt(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """Translate checkpoints of other implementations; a subclass knows which. Missing options take the defaults."""
        state, groups = dict(state_dict["state"]), []
        for group in state_dict["param_groups"]:
            group = dict(group)
            # Some count steps in the param group, and choose a backend with options of other meanings: ours is chosen anew.
            step = group.pop("step", None)
            if step is not None:
                group = {name: value for name, value in group.items() if name not in ("foreach", "fused")}
                for i in group["params"] if self.counts_steps else ():
                    if state.get(i) and "step" not in state[i]:
                        state[i] = {**state[i], "step": torch.tensor(float(step))}
            # What else is in a group is kept: schedulers have their own entries there.
            group = {**self.defaults, **group}
            if isinstance(group["state_dtype"], str):
                group["state_dtype"] = getattr(torch, group["state_dtype"], group["state_dtype"])
            groups.append(group)
        return {"state": state, "param_groups": groups}

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
            self._prepare()
            for index, group in enumerate(self.param_groups):
                self._step_group(index, group)  # type: ignore[attr-defined]
        return loss

    def _prepare(self) -> None:
        """Called once a step before the groups are updated; fills `_extra_values`: for each group, name -> tensor."""

    @torch.compiler.disable  # type: ignore[misc]
    def _step_group(self, index: int, group: dict[str, Any]) -> None:
        # Not traced by torch.compile: the backends are compiled already, and plans are made from addresses.
        plan = self._plans.get(index)
        grads = list(map(_GRAD, group["params"]))
        params = group["params"]
        if type(None) in set(map(type, grads)):
            params = [p for p, g in zip(params, grads, strict=True) if g is not None]
            grads = [g for g in grads if g is not None]
        if not params:
            return
        if plan is None or not self._valid(plan, group, params, grads):
            self._init_group(group, params, grads)
            plan = self._plans[index] = self._make_plan(index, group, params, grads)
        numbers = {**plan.numbers, **self._derived(group)}
        numbers.update({name: self._extra_values[index][name] for name in self._extra(group)})
        scale, found_inf = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        if plan.unwrap:
            grads = [plain(placed_like(g, p)) for g, p in zip(grads, params, strict=True)]
        if found_inf is not None and scale is None:  # as GradScaler has it after unscale_()
            scale = torch.ones_like(found_inf)
        for cohort in plan.cohorts:
            own = grads if len(cohort.members) == len(grads) else [grads[i] for i in cohort.members]
            if found_inf is not None and cohort.mode != "kernel":
                # A parameter that the kernel cannot take (one with gaps in memory): here the host has to look.
                if bool(found_inf):
                    continue
                own = [g / scale.to(g.device, g.dtype) for g in own]  # type: ignore[union-attr]
            self._run(cohort, own, group, numbers, scale, found_inf)

    def _init_group(self, group: dict[str, Any], params: Sequence[torch.Tensor], grads: Sequence[torch.Tensor]) -> None:
        """Check the gradients, and make the state of parameters that have none yet."""
        for g in grads:
            if g.layout is not torch.strided:
                raise RuntimeError(f"{type(self).__name__} does not support sparse gradients, got layout {g.layout}")
        fresh = [p for p in params if not self.state.get(p)]
        if fresh:
            self._init_state(group, fresh)

    def _init_state(self, group: dict[str, Any], params: list[torch.Tensor]) -> None:
        steps: dict[torch.device, torch.Tensor] = {}
        for p in params:
            state = self.state[p]
            if self._counts(group):
                # One counter for all that start together: a step increments one tensor, not one per parameter.
                device = p.device if group["capturable"] else torch.device("cpu")
                if device not in steps:
                    steps[device] = torch.zeros((), dtype=torch.float32, device=device)
                state["step"] = steps[device]
            for name in self.state_names:
                state[name] = self._state_like(name, p, group)
            if group["rounding"] == "kahan":
                state["compensation"] = torch.zeros_like(p, memory_format=torch.preserve_format)

    def _mode(self, group: dict[str, Any], device: torch.device) -> str:
        loop = group["foreach"] is False and not group["fused"]
        if group["differentiable"] or loop or not self._elementwise(group):
            return "eager"
        wanted = group["fused"] or (device.type == "cuda" and not group["foreach"] and group["fused"] is None)
        if wanted and kernel.available(device):
            return "kernel"
        if device.type == "cpu":
            return "blocked" if self.multi_tensor or not group["foreach"] else "eager"
        return "foreach" if self.multi_tensor else "eager"

    def _counted(self) -> torch.Tensor:
        """How many elements the rule's condition held for at the last step: on the first parameter's device, no waiting."""
        device = self.param_groups[0]["params"][0].device
        parts = []
        for plan in self._plans.values():
            for cohort in plan.cohorts:
                counts = getattr(cohort.runner, "counts", None)
                parts += cohort.counts if counts is None else [counts.sum()]
        return (
            torch.stack([c.to(device) for c in parts]).sum()
            if parts
            else torch.zeros((), dtype=torch.int64, device=device)
        )

    def _numbers(self, group: dict[str, Any]) -> dict[str, Any]:
        """The group's numeric hyperparameters, tuples as name.0, name.1, ..."""
        numbers: dict[str, Any] = {}
        for name in self.defaults:
            if name in ENGINE_OPTIONS:
                continue
            value = group[name]
            if isinstance(value, _NUMBER) and not isinstance(value, bool):
                numbers[name] = float(value)
            elif isinstance(value, torch.Tensor):
                if value.device.type != "cpu" and not group["capturable"]:
                    raise ValueError(f"{name} as a tensor on {value.device} needs capturable=True")
                numbers[name] = value if value.device.type != "cpu" else float(value)
            elif isinstance(value, (tuple, list)):
                for i, v in enumerate(value):
                    numbers[f"{name}.{i}"] = float(v)
        return numbers

    def _static(self, group: dict[str, Any]) -> dict[str, Any]:
        numeric = (*_NUMBER, tuple, list, torch.Tensor)
        return {
            name: group[name]
            for name in self.defaults
            if name not in ENGINE_OPTIONS and (isinstance(group[name], bool) or not isinstance(group[name], numeric))
        }

    def _program(self, group: dict[str, Any]) -> Program:
        static = self._static(group)
        lengths = {
            name: len(group[name]) if isinstance(group[name], (tuple, list)) else 0
            for name in self.defaults
            if name not in ENGINE_OPTIONS and name not in static
        }
        lengths.update(dict.fromkeys(self._further(group), 0))
        key = (type(self).rule, self.state_names, tuple(lengths.items()), tuple(static.items()), group["maximize"])
        if key not in _programs:
            _programs[key] = trace(type(self).rule, self.state_names, lengths, static, maximize=group["maximize"])
        return _programs[key]

    def _further(self, group: dict[str, Any]) -> tuple[str, ...]:
        return (*self._extra(group), *self._derived(group).keys(), *(("step",) if self._counts(group) else ()))

    def _plan_key(self, group: dict[str, Any]) -> Any:
        lr_on_device = _on_device(group.get("lr"))
        options = tuple(group[name] for name in ENGINE_OPTIONS)
        scaled = getattr(self, "found_inf", None) is not None
        return (options, tuple(self._static(group).values()), self._extra(group), lr_on_device, scaled)

    def _valid(
        self, plan: Plan, group: dict[str, Any], params: Sequence[torch.Tensor], grads: Sequence[torch.Tensor]
    ) -> bool:
        if len(params) != len(plan.params) or not all(map(operator.is_, params, plan.params)):
            return False
        options = list(map(group.__getitem__, self.defaults))
        if plan.options is None or not all(map(operator.is_, options, plan.options)):
            if plan.key != self._plan_key(group):
                return False
            plan.numbers = self._numbers(group)
            plan.options = None if any(isinstance(value, torch.Tensor) for value in options) else options
        elif plan.key[-1] != (getattr(self, "found_inf", None) is not None):
            return False
        # In the order of the dictionaries: looking a tensor up by its hash costs more than all that is compared here.
        states = self.state.values()
        if len(states) != len(plan.all_states) or not all(map(operator.is_, states, plan.all_states)):
            return False
        found = list(chain.from_iterable(map(dict.values, plan.states)))
        if len(found) != len(plan.contents) or not all(map(operator.is_, found, plan.contents)):
            return False
        # Lists compare by identity first: no element is looked at while nothing has changed.
        # The states' memory may move, too (share_memory_(), or .data as offloading assigns it), and runners hold addresses.
        return (
            plan.grad_types == list(map(_DTYPE, grads))
            and plan.strides == list(map(torch.Tensor.stride, params))
            and plan.pointers == self._pointers(group, params, plan.tensors)
        )

    def _pointers(
        self, group: dict[str, Any], params: Sequence[torch.Tensor], tensors: Mapping[str, list[Any]]
    ) -> list[list[int]]:
        columns = [params, *(tensors[name] for name in self._stored(group))]
        return [list(map(torch.Tensor.data_ptr, column)) for column in columns]

    def _make_plan(
        self, index: int, group: dict[str, Any], params: Sequence[torch.Tensor], grads: Sequence[torch.Tensor]
    ) -> Plan:
        names = self._stored(group)
        groups: dict[Any, list[int]] = {}
        for i, (p, g) in enumerate(zip(params, grads, strict=True)):
            state = self.state[p]
            step: Any = None
            if self._counts(group):
                # Comparing values on the device would mean to wait for it.
                step = id(state["step"]) if group["capturable"] else float(state["step"])
            mode = self._mode(group, p.device)
            places = self._places(p)
            if mode in ("blocked", "kernel") and not self._is_laid_out(group, p):
                mode = "foreach" if places is None and self.multi_tensor else "eager"
            elif mode == "foreach" and places is not None:
                mode = "eager"
            types = tuple(state[name].dtype for name in names)
            gaps = None if places is None else places.gaps.dtype
            groups.setdefault((mode, step, p.device, p.dtype, g.dtype, types, gaps), []).append(i)
        cohorts = []
        for (mode, _, device, dtype, grad_dtype, types, _), members in groups.items():
            step = self._own_step([self.state[params[i]] for i in members]) if self._counts(group) else None
            cohort = Cohort(mode, members, index * 1_000_033 + members[0], step, device)
            self._fill_cohort(cohort, group, [params[i] for i in members], dtype, grad_dtype, types)
            cohorts.append(cohort)
        states = [self.state[p] for p in params]
        contents = list(chain.from_iterable(s.values() for s in states))
        tensors = {name: [s.get(name) for s in states] for name in names}
        unwrap = self._elementwise(group) and any(is_dtensor(p) or p.is_complex() for p in params)
        pointers = self._pointers(group, params, tensors)
        strides, types = [p.stride() for p in params], [g.dtype for g in grads]
        return Plan(
            self._plan_key(group), list(params), states, list(self.state.values()), contents, tensors, pointers, strides, None,
            self._numbers(group), unwrap, types, cohorts,
        )  # fmt: skip

    def _is_laid_out(self, group: dict[str, Any], p: torch.Tensor) -> bool:
        local = plain(p)
        if self._places(p) is not None:
            return local.is_contiguous()
        same = all(plain(self.state[p][name]).stride() == local.stride() for name in self._stored(group))
        return same and dense(local)

    def _own_step(self, states: list[dict[str, Any]]) -> torch.Tensor:
        """One counter for a cohort, its own: parameters outside of it that shared the old one keep that."""
        step = states[0]["step"].clone()
        for state in states:
            state["step"] = step
        return step

    def _fill_cohort(
        self,
        cohort: Cohort,
        group: dict[str, Any],
        owners: list[torch.Tensor],
        dtype: torch.dtype,
        grad_dtype: torch.dtype,
        state_types: tuple[torch.dtype, ...],
    ) -> None:
        mode, names = cohort.mode, self._stored(group)
        program = self._program(group) if mode != "eager" else None
        # A rule that is not elementwise needs the whole tensor, and lets DTensor see to its parts.
        local = plain if self._elementwise(group) else (lambda t: t)
        columns = [[local(p) for p in owners], *([local(self.state[p][name]) for p in owners] for name in names)]
        real = real_dtype(dtype)
        compute = compute_dtype(real)
        of_states = [real_dtype(t) for t in state_types[: len(self.state_names)]]
        storage = (real, real_dtype(grad_dtype), *of_states)
        rounding = Rounding(group["rounding"])
        if mode in ("blocked", "kernel"):
            cohort.strides = [p.stride() for p in columns[0]]
        if rounding.mode == "stochastic" and mode != "kernel":
            cohort.generator = torch.Generator(device=cohort.device)
            if cohort.step is not None and cohort.step.device.type != "cpu":
                # The step cannot be read at every update: from here on the generator goes on by itself.
                cohort.generator.manual_seed(_mixed(group["rounding_seed"], cohort.salt, int(cohort.step)))
        cohort.arrays, cohort.runner = columns, program
        cohort.notes = [self._note(p) for p in owners]
        places = [own for own in map(self._places, owners) if own is not None]
        cohort.places, gaps = places or None, places[0].gaps.dtype if places else None
        if mode == "blocked":
            assert program is not None
            layout = Layout(compute, storage, rounding, gaps)
            runner = None if group["foreach"] else self._compiled(program, layout, cohort, owners, group)
            if runner is not None:
                cohort.mode, cohort.runner = "compiled", runner
                return
            if gaps is not None or not self.multi_tensor:
                cohort.mode = "eager"
                return
            cohort.runner = Blocked(program, layout)
            cohort.arrays = [[flat(t) for t in column] for column in columns]
        elif mode == "kernel":
            assert program is not None
            on_device = [*self._extra(group)]
            if group["capturable"]:
                on_device += ["step"] if self._counts(group) else []
            on_device += ["lr"] if _on_device(group.get("lr")) else []
            used = tuple(n for n in on_device if n in program.uniforms)
            scaled = getattr(self, "found_inf", None) is not None
            signature = kernel.Signature(compute, storage, rounding, used, scaled, gaps)
            cohort.runner = self._launch(program, signature, cohort, owners, group)

    def _stored(self, group: dict[str, Any]) -> list[str]:
        return [*self.state_names, *(["compensation"] if group["rounding"] == "kahan" else [])]

    def _run(
        self,
        cohort: Cohort,
        grads: Sequence[torch.Tensor],
        group: dict[str, Any],
        numbers: dict[str, Any],
        scale: torch.Tensor | None,
        found_inf: torch.Tensor | None,
    ) -> None:
        step, values, seed, mode = cohort.step, numbers, group["rounding_seed"], cohort.mode
        cohort.counts = []
        if step is not None:
            if found_inf is None:
                step += 1
            else:
                step += 1 - found_inf.to(step.device, step.dtype).reshape(())
            on_host = not group["capturable"] or (step.device.type == "cpu" and mode != "kernel")
            values = {**numbers, "step": step if mode == "kernel" and not on_host else wide(step)}
            if on_host:
                values["step"] = float(step)
        if group["rounding"] == "stochastic":
            # A new draw for every step and cohort, the same again after a checkpoint.
            counted = step is not None and step.device.type == "cpu"
            seed = _mixed(seed, cohort.salt, int(step) if counted else 0)  # type: ignore[arg-type]
            if cohort.generator is not None and counted:
                cohort.generator.manual_seed(seed)
        if mode == "kernel":
            if list(map(torch.Tensor.stride, grads)) != cohort.strides:
                grads = [laid_out(g, s) for g, s in zip(grads, cohort.strides, strict=True)]
            for name in cohort.runner.signature.on_device:
                values = _moved(values, name, cohort.device)
            cohort.runner.run(grads, values, (scale, found_inf), seed)
        elif mode == "compiled":
            if list(map(torch.Tensor.stride, grads)) != cohort.strides:
                grads = [laid_out(g, s) for g, s in zip(grads, cohort.strides, strict=True)]
            cohort.runner.run(grads, {name: float(value) for name, value in values.items()})
        elif mode == "blocked":
            p, *states = cohort.arrays
            flattened = [flat(laid_out(g, s)) for g, s in zip(grads, cohort.strides, strict=True)]
            hosted = {name: float(value) for name, value in values.items()}
            cohort.counts = cohort.runner.run([p, flattened, *states], hosted, cohort.generator)
        elif mode == "foreach":
            p, *states = cohort.arrays
            for name in self._extra(group):
                values = _moved(values, name, cohort.device)
            compute, rounding = compute_dtype(p[0].dtype), Rounding(group["rounding"])
            columns = [p, grads, *states]
            cohort.counts = foreach_backend.run(cohort.runner, columns, values, compute, rounding, cohort.generator)
        else:
            for name in self._extra(group):
                values = _moved(values, name, cohort.device)
            self._run_eager(cohort, grads, group, values)

    def _run_eager(
        self, cohort: Cohort, grads: Sequence[torch.Tensor], group: dict[str, Any], values: dict[str, Any]
    ) -> None:
        """The reference: the rule itself, on one tensor after the other."""
        h = Hyper(**self._static(group))
        for name in self.defaults:
            if name not in ENGINE_OPTIONS and not hasattr(h, name):
                listed = isinstance(group[name], (tuple, list))
                setattr(h, name, tuple(group[name]) if listed else values[name])
        for name in self._further(group):
            setattr(h, name, values[name])
        rounding = Rounding(group["rounding"])
        for k, ((p, *stored), g) in enumerate(zip(zip(*cohort.arrays, strict=True), grads, strict=True)):
            state = dict(zip(self.state_names, stored, strict=False))
            remainder = stored[-1] if rounding.mode == "kahan" else None
            h.note = cohort.notes[k]
            places = None if cohort.places is None else cohort.places[k].indices()
            own = p if places is None else p.flatten()[places]
            g = g if places is None else g.flatten()[places]
            count = eager(
                type(self).rule, own, -g if group["maximize"] else g, state, h, rounding, remainder, cohort.generator
            )
            if places is not None:
                p.copy_(p.flatten().index_copy(0, places, own).view_as(p))
            if count is not None:
                cohort.counts.append(count)


def _check_options(group: Mapping[str, Any]) -> None:
    for name in ("maximize", "capturable", "differentiable"):
        checks.one_of(name, group[name], (False, True))
    for name in ("foreach", "fused"):
        checks.one_of(name, group[name], (None, False, True))
    checks.one_of("rounding", group["rounding"], ROUNDINGS)
    wanted = group["state_dtype"]
    if wanted is not None and not (isinstance(wanted, torch.dtype) and wanted.is_floating_point):
        raise ValueError(f"state_dtype must be None or a floating-point torch.dtype, got {wanted!r}")


def _on_device(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.device.type != "cpu"


def _moved(values: dict[str, Any], name: str, device: torch.device) -> dict[str, Any]:
    """``values`` with one tensor on ``device``."""
    value = values[name]
    if value.device == device:
        return values
    return {**values, name: value.to(device, non_blocking=True)}


def _mixed(seed: int, cohort: int, step: int) -> int:
    return (seed * 1_000_003 + cohort + step * 7919) % 2**31
