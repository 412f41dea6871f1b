"""State dicts of the elementwise optimizers: written in the form that every loader takes, loaded without rounding."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from polyak.optim._engine import options

if TYPE_CHECKING:
    from polyak.optim._engine.base import RuleOptimizer


def write_options(group: dict[str, Any]) -> None:
    """Make a saved param group hold plain values only: ``torch.load`` and distributed checkpoints refuse others."""
    if group["state_dtype"] is not None:
        group["state_dtype"] = str(group["state_dtype"]).removeprefix("torch.")


@contextmanager
def written(optimizer: RuleOptimizer) -> Iterator[None]:
    """Options are written before any hook of others sees the state_dict."""

    def write(_: Any, saved: dict[str, Any]) -> None:
        for group in saved["param_groups"]:
            optimizer._write_options(group)

    handle = optimizer.register_state_dict_post_hook(write, prepend=True)
    try:
        yield
    finally:
        handle.remove()


def load(
    optimizer: RuleOptimizer, state_dict: Mapping[str, Any], load_with_torch: Callable[[Mapping[str, Any]], None]
) -> None:
    """Load a checkpoint. One of another optimizer, or for other shapes, raises ValueError and changes nothing.

    It is looked at after the hooks that others have registered to translate it, and is loaded before theirs that come then.
    """
    saved: dict[str, Any] = {}
    before = optimizer.__getstate__()

    def translate(_: Any, given: Mapping[str, Any]) -> dict[str, Any]:
        adopted = optimizer._adopt({"state": dict(given["state"]), "param_groups": list(given["param_groups"])})
        saved.update(adopted, ids=[i for group in adopted["param_groups"] for i in group["params"]])
        _check(optimizer, saved["state"], saved["ids"])
        return {**given, **adopted}

    def settle(_: Any) -> None:
        try:
            for group in optimizer.param_groups:
                optimizer._check_engine(group)
                optimizer._check_group(group)
        except Exception:
            optimizer.__setstate__(before)
            raise
        for group in optimizer.param_groups:
            options.warn_of_near_misses(type(optimizer).__name__, group, optimizer.defaults)
        optimizer._forget()
        _copy(optimizer, saved["state"], saved["ids"])
        optimizer._loaded()

    handles = [
        optimizer.register_load_state_dict_pre_hook(translate),
        optimizer.register_load_state_dict_post_hook(settle, prepend=True),
    ]
    try:
        load_with_torch(state_dict)
    finally:
        for handle in handles:
            handle.remove()


# What other optimizers' states are made of, so that their checkpoints are told from ours with further entries.
_ADAM = {"step", "exp_avg", "exp_avg_sq"}
_ADAN = {"exp_avg", "exp_avg_sq", "exp_avg_diff", "neg_pre_grad"}
_OTHERS = (
    _ADAM, _ADAM - {"step"}, _ADAM | {"max_exp_avg_sq"}, _ADAM | {"mu_product"}, _ADAN, _ADAN | {"step"},
    {"step", "exp_avg", "exp_inf"}, {"exp_avg"}, {"step", "exp_avg"}, {"momentum_buffer"}, {"step", "sum"},
    {"step", "square_avg"}, {"step", "square_avg", "momentum_buffer"}, {"step", "square_avg", "acc_delta"},
    {"step", "eta", "mu", "ax"}, {"step", "prev", "step_size"},
)  # fmt: skip


def _check(optimizer: RuleOptimizer, saved: Mapping[Any, Any], ids: list[Any]) -> None:
    """Raise ValueError where the saved state is not one for these parameters. Entries of others may be in it."""
    mine = [p for group in optimizer.param_groups for p in group["params"]]
    needed, owner = set(optimizer.state_names), type(optimizer).__name__
    known = {*needed, *optimizer.other_names, "step", "compensation"}
    if len(mine) != len(ids):
        return  # torch.optim says so
    for i, p in zip(ids, mine, strict=True):
        values = saved.get(i, {})
        names = set(values)
        if (names & needed != needed and (names & needed or names in _OTHERS)) or (names - known and names in _OTHERS):
            raise ValueError(
                f"this state_dict is not one of {owner}: state {sorted(map(str, values))} "
                f"where {sorted(needed)} is needed"
            )
        if not names & needed:
            continue
        if optimizer.counts_steps and "step" not in values:
            raise ValueError(f"state_dict: parameter {i} has no step, which {owner} counts")
        for name in optimizer.state_names:
            if values[name].shape != (shape := optimizer._shape(p, values)):
                raise ValueError(
                    f"state_dict: {name} of parameter {i} has shape {tuple(values[name].shape)}, "
                    f"where {tuple(shape)} is needed"
                )


def _copy(optimizer: RuleOptimizer, saved: Mapping[Any, Any], ids: list[Any]) -> None:
    """The saved tensors in their own types: torch.optim casts them to the parameter's, which would round a wider state."""
    saved_ids = iter(ids)
    counters: dict[Any, torch.Tensor] = {}
    for group in optimizer.param_groups:
        for p in group["params"]:
            values = saved.get(next(saved_ids), {})
            # Texts are entries of somebody else's, which torch.optim takes for containers.
            if texts := {k: v for k, v in values.items() if isinstance(v, (str, bytes))}:
                optimizer.state[p].update(texts)
            if not optimizer._has_state(p):
                continue
            for name in optimizer._stored(group):
                if name in values:
                    dtype = optimizer._state_dtype(name, p, group) if name in optimizer.state_names else p.dtype
                    # A copy: torch.optim would go on in the checkpoint's own tensors.
                    optimizer.state[p][name] = values[name].to(device=p.device, dtype=dtype, copy=True)
                else:
                    optimizer.state[p][name] = torch.zeros_like(p, memory_format=torch.preserve_format)
            for name in optimizer.other_names:
                if name in values:
                    optimizer.state[p][name] = values[name].to(device=p.device, copy=True)
            if optimizer._counts(group):
                # Those of one count share a counter again: launches are one per counter.
                count = float(optimizer.state[p].get("step", 0.0))
                device = p.device if group["capturable"] else torch.device("cpu")
                shared = counters.setdefault((count, device), torch.tensor(count, dtype=torch.float32, device=device))
                optimizer.state[p]["step"] = shared


def adopt(optimizer: RuleOptimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    """What every optimizer translates of other implementations' checkpoints. Missing options take the defaults."""
    state, groups = dict(state_dict["state"]), []
    for group in state_dict["param_groups"]:
        group = dict(group)
        # Some count steps in the param group, and choose a backend with options of other meanings: ours is chosen anew.
        step = group.pop("step", None)
        if step is not None:
            group = {name: value for name, value in group.items() if name not in ("foreach", "fused")}
            for i in group["params"] if optimizer.counts_steps else ():
                if state.get(i) and "step" not in state[i]:
                    state[i] = {**state[i], "step": torch.tensor(float(step))}
        # What else is in a group is kept: schedulers have their own entries there.
        group = {**optimizer.defaults, **group}
        if isinstance(group["state_dtype"], str):
            group["state_dtype"] = getattr(torch, group["state_dtype"], group["state_dtype"])
        groups.append(group)
    return {"state": state, "param_groups": groups}
