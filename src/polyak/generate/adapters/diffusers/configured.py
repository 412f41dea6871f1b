"""A scheduler's configuration: how it is read, edited, and handed from one scheduler to another."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin

from polyak.core import checks
from polyak.generate.adapters.diffusers.options import Acts
from polyak.generate.adapters.diffusers.parts import dump, load
from polyak.generate.adapters.diffusers.plan import (
    PARTS,
    WORDS,
    Plan,
    defaults_of,
    facts_of,
    idle_of,
    names_of,
    notes_of,
    read,
)
from polyak.generate.adapters.diffusers.resolve import entries, resolve
from polyak.generate.adapters.diffusers.runs import Ground, evaluations_per_step
from polyak.generate.adapters.diffusers.values import plain, same, snapshot
from polyak.generate.process import Discrete, Flow, ProbabilityPath
from polyak.generate.process.path import GRID, PATH
from polyak.generate.solver import SOLVER, Solver


class Configured(ConfigMixin):
    """What a scheduler makes of its configuration."""

    @checks.arguments(
        solver=SOLVER | checks.Map() | None,
        process=PATH | checks.Map() | None,
        origin=checks.text | None,
        grid=GRID | None,
    )
    def __init__(
        self,
        *,
        solver: Solver | dict[str, Any] | None = None,
        process: ProbabilityPath | dict[str, Any] | None = None,
        origin: str | None = None,
        grid: str | None = None,
        **options: Any,
    ) -> None:
        if solver is None:
            raise ValueError("solver is needed: PolyakScheduler.from_config(config, solver=DPMSolver(...))")
        self._solver = _checked(load(solver, Solver))
        self._given: ProbabilityPath | None = None if process is None else load(process, ProbabilityPath)
        options = plain(options)
        if origin is None and "shift" in options and "beta_start" not in options:
            origin = "FlowMatchEulerDiscreteScheduler"
        if options.get("prediction_type") in WORDS:
            options["prediction_type"] = WORDS[options["prediction_type"]]
        hidden = {k: options.pop(k) for k in list(options) if k.startswith("_")}
        written = options if "_use_default_values" not in hidden else hidden.pop("_by_hand", ())
        saved: dict[str, Any] = {"solver": dump(self._solver), "process": None, "origin": origin, "grid": grid}
        if self._given is not None:
            saved["process"] = dump(self._given)
        options = {**options, **self._chain_of_process(options, origin, written)}
        notes = hidden.get("_notes", ())
        self._read(
            {k: v for k, v in options.items() if k not in notes} | {"grid": grid}, origin, grid, frozenset(written)
        )
        filled = {k: v for k, v in defaults_of(origin).items() if k not in options}
        if self._plan.facts.family == "flow" and "prediction_type" not in options:
            options["prediction_type"] = "flow_prediction"  # what one goes to next is told
        unused = [*hidden.pop("_use_default_values", ()), *filled, *saved]
        super().register_to_config(
            **filled, **options, **saved, **hidden, _use_default_values=list(dict.fromkeys(unused))
        )
        self._seen = snapshot(self._internal_dict)
        self._unplanned()

    def _unplanned(self) -> None:
        """Be as before any run was planned."""
        raise NotImplementedError

    def _chain_of_process(self, options: Mapping[str, Any], origin: str | None, written: Any) -> dict[str, Any]:
        """The options of a chain of betas, where one was given."""
        if not isinstance(self._given, Discrete) or not isinstance(facts_of(origin).options.get("trained_betas"), Acts):
            return {}
        betas = (1 - torch.exp(2 * torch.diff(self._given._table))).tolist()
        for name, value in (("trained_betas", betas), ("num_train_timesteps", len(betas))):
            if name in written and not same(options[name], value):
                raise ValueError(f"{name}={options[name]!r} is not that of the process that is given, {self._given!r}")
        return {"trained_betas": betas, "num_train_timesteps": len(betas)}

    def _read(
        self, options: Mapping[str, Any], origin: str | None, grid: str | None, by_hand: frozenset[str] = frozenset()
    ) -> None:
        """Make the plan, and refuse what does not go together."""
        plan = read(options, origin, process=self._given, grid=grid, by_hand=by_hand)
        solver = self._solver
        if solver.needs_gaussian and not plan.process.is_gaussian:
            raise ValueError(f"{solver!r} needs Gaussian noise, which {plan.process!r} has not")
        if options.get("thresholding") and plan.corrector is not None and solver.no_corrector:
            raise ValueError(f"thresholding cannot be used: {solver.no_corrector}")
        self._plan: Plan = plan
        self.process: Any = plan.process
        self.corrector = plan.corrector
        # What is corrected is the predicted data, whatever the network says.
        self._kind = plan.kind if plan.corrector is None else "sample"
        self._per_step = self.order = evaluations_per_step(solver, Ground(plan.process, self._kind))

    # --- edits

    @property
    def solver(self) -> Solver:
        """The solver. Another one may be assigned; it takes part from the next ``set_timesteps`` on, which it needs."""
        return self._solver

    @solver.setter
    def solver(self, solver: Solver | dict[str, Any]) -> None:
        self.register_to_config(solver=solver)
        self._refresh()

    def register_to_config(self, **options: Any) -> None:
        """Change options, which count from the next ``set_timesteps`` on; also ``solver`` and ``process``."""
        if options.get("solver") is not None:
            self._solver = _checked(load(options["solver"], Solver))
            options["solver"] = dump(self._solver)
        if isinstance(options.get("process"), ProbabilityPath):
            self._given = options["process"]
            options["process"] = dump(self._given)
        notes = notes_of(options, self._internal_dict.get("origin"))
        if notes:
            options["_notes"] = sorted({*self._internal_dict.get("_notes", ()), *notes})
        super().register_to_config(**plain(options))

    def _refresh(self) -> bool:
        """Read the configuration again if somebody changed it: its entries, as pipelines do, or its attributes."""
        now = entries(self._internal_dict, self._seen)
        changed = {name for name, value in now.items() if name not in self._seen or not same(value, self._seen[name])}
        if not changed:
            return False
        if not same(now["solver"], dump(self._solver)):
            self._solver = _checked(load(now["solver"], Solver))
        if "process" in changed and now["process"] is None:
            self._given = None
        elif "process" in changed and (self._given is None or not same(now["process"], dump(self._given))):
            self._given = load(now["process"], ProbabilityPath)
        config = {k: plain(v) for k, v in now.items() if k not in PARTS and not k.startswith("_")}
        notes = [n for n in notes_of(config, now.get("origin")) if n in changed or n in now.get("_notes", ())]
        marks = {"_notes": notes} if notes else {}
        config |= self._chain_of_process(config, now.get("origin"), changed)
        # Pipelines write options of the solver that ours replaces, too.
        by_hand = frozenset(changed & set(config) - idle_of(now.get("origin")))
        options = {k: v for k, v in config.items() if k not in notes}
        self._read({**options, "grid": now.get("grid")}, now.get("origin"), now.get("grid"), by_hand)
        super().register_to_config(**config, **marks)
        self._seen = snapshot({**now, **config, **marks})
        self._unplanned()
        return True

    def set_shift(self, shift: float) -> None:
        """Change a flow's shift; :meth:`set_timesteps` then uses it.

        Raises:
            ValueError: the configuration is not one of a flow.
        """
        checks.positive("shift", shift)
        if self._plan.facts.family == "flow":
            self.register_to_config(shift=shift)
        elif isinstance(self._plan.process, Flow) and "flow_shift" in self._plan.facts.options:
            self.register_to_config(flow_shift=shift)
        else:
            raise ValueError(f"shift={shift!r} needs a flow: {self._plan.process!r} is none")

    # --- from and to other schedulers

    @classmethod
    def from_config(  # type: ignore[override]
        cls, config: Any = None, return_unused_kwargs: bool = False, **kwargs: Any
    ) -> Any:
        """From the configuration of any diffusers scheduler: ``PolyakScheduler.from_config(config, solver=...)``.

        Args:
            config: of a diffusers scheduler or of a PolyakScheduler; also a plain dict of options.
            return_unused_kwargs: return what is not understood, instead of refusing it.
            kwargs: options that override those of the configuration; solver, process, origin, grid.

        Raises:
            ValueError: what is refused, by name; no solver, or one of your own class in a saved configuration.
        """
        if config is None:
            raise ValueError("config is needed: that of a scheduler, as pipe.scheduler.config")
        if not isinstance(config, Mapping):
            config, kwargs = cls.load_config(config, return_unused_kwargs=True, **kwargs)
        options, given, used = resolve(config, kwargs)
        unused: dict[str, Any] = {}
        if return_unused_kwargs:
            known = {*PARTS, *names_of(given.get("origin"))}
            unused = {k: given.pop(k) for k in list(given) if k not in known}
        if "_class_name" in options:
            options["_class_name"] = cls.__name__
        by_hand = [k for k in kwargs if k in given and k not in PARTS]
        made = cls(**{**options, **given}, _use_default_values=used, _by_hand=by_hand)
        return (made, unused) if return_unused_kwargs else made


def _checked(solver: Solver) -> Solver:
    if solver.adaptive:
        raise ValueError(f"diffusers needs the timesteps beforehand; an adaptive solver has none: {solver!r}")
    return solver
