"""LCSC: linear combinations of saved checkpoints, their coefficients found by search (Liu et al., arXiv 2404.02241; ICLR 2025).

Of checkpoints theta_1 .. theta_K that a training has left behind (raw weights, not averages) the model is

    theta(a) = sum_i a_i theta_i,   sum_i a_i = 1,

with the a_i of any sign that minimize a metric of samples, without gradients. The oldest coefficient is one minus the others.
EMA is the special case ``a_1 = g^(K-1)``, ``a_i = (1-g) g^(K-i)``: the search starts there and goes on where EMA cannot go.
"""

from __future__ import annotations

import hashlib
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from polyak.core import checks
from polyak.teachers.lcsc.bank import BANK, CheckpointBank, check_coefficients, combine, ema_coefficients
from polyak.teachers.lcsc.journal import Journal
from polyak.teachers.lcsc.objective import (
    OBJECTIVE,
    Evaluator,
    Objective,
    SampleMetric,
    batch_norms,
    metric_to,
    sample_metric,
    tied,
    warn_of_batch_norm,
)
from polyak.teachers.lcsc.optimizers import OPTIMIZER, Optimizer, full, optimizer_named
from polyak.teachers.lcsc.plane import landscape
from polyak.teachers.lcsc.saver import CheckpointSaver

__all__ = [
    "LCSC",
    "CheckpointBank",
    "CheckpointSaver",
    "Finalist",
    "Result",
    "combine",
    "ema_coefficients",
    "landscape",
    "metric_to",
    "sample_metric",
]

EXPLODED = 10.0


@checks.arguments(coefficients=checks.tensor, value=checks.measured, heldout=checks.measured)
@dataclass(frozen=True)
class Finalist:
    """One of the best found: its coefficients (K,), its value in the search, and its held-out value."""

    coefficients: Tensor
    value: float
    heldout: float


@checks.arguments(
    coefficients=checks.tensor, value=checks.measured, heldout=checks.measured | None, history=checks.tensor, tried=checks.tensor,
    finalists=checks.Each(checks.Instance(Finalist)), failures=checks.Integer(0),
)  # fmt: skip
@dataclass(frozen=True)
class Result:
    """What a search found.

    Attributes:
        coefficients: (K,), float64, the oldest checkpoint's first.
        value: the objective there, in the search: too good by selection.
        heldout: the held-out objective there; None where there is none.
        history: (n,), the value of each evaluation in order; inf where it was not finite.
        tried: (n, K), their coefficients.
        finalists: the best of the search that were evaluated again, by their held-out value.
        failures: how many evaluations were not finite.
    """

    coefficients: Tensor
    value: float
    heldout: float | None
    history: Tensor
    tried: Tensor
    finalists: tuple[Finalist, ...]
    failures: int

    @property
    def best(self) -> Tensor:
        """(n,), the least value up to each evaluation."""
        return self.history.cummin(0).values


class LCSC:
    """Search the coefficients of saved checkpoints.

    Beside the candidate's weights, one tensor of one checkpoint is in memory at a time; with ``model`` the candidate's
    weights are the model's own tensors, where their type is that of accumulation.

    Args:
        checkpoints: a :class:`CheckpointBank`, or what makes one: state dicts, files, or a folder; the oldest first.
        objective: lower is better. It is given the model with the candidate's weights or, without ``model``, their state
            dict, which is overwritten later. It must be deterministic, on fixed noise: see :func:`sample_metric`.
        model: receives the candidates' weights. Its own are lost; after :meth:`run` it has the winner's. Entries that it has
            tied may stand in the checkpoints once, as safetensors has them.
        optimizer: "evolution" (the paper's), "cmaes", "quadratic", "grid" (averages of all rates and window starts), "greedy"
            (soup); or a function as in :mod:`~polyak.teachers.lcsc.optimizers`.
        evals: number of evaluations of the objective.
        population: of the evolution, at least 2; how many averages the others but "grid" and "greedy" start from.
        generator: the search's seed is drawn from it. Default: seed 0.
        device_budget: bytes to hold checkpoints with on the model's device; the newest that fit are then not read again.
        heldout: the objective, on other noise and more samples, by which the best are judged again. Default: the
            objective's ``fresh()`` where it is a :func:`sample_metric`, else none; False: none.
        finalists: how many are judged again.
        reestimate: called with the model before each evaluation, to collect BatchNorm's statistics anew.
        resume: a file that keeps the evaluations. Where it exists, the search goes on from it: killed at any time and started
            again with the same arguments, it gives bitwise the result of an unbroken one (one evaluation may be repeated).

    Raises:
        ValueError: as :class:`CheckpointBank`; an unknown optimizer, arguments out of range, a model with other entries than
            the checkpoints, a journal of another search.
        RuntimeError: (from :meth:`run`) the objective was finite nowhere.

    Example:
        >>> objective = sample_metric(sampler, metric_to(data, "fid", features=network), n=10_000, seed=0)
        >>> result = LCSC("checkpoints/", model=model, objective=objective, resume="search.jsonl").run()
    """

    @checks.arguments(
        checkpoints=BANK, objective=OBJECTIVE, model=checks.module | None,
        optimizer=OPTIMIZER, evals=checks.Integer(1), population=checks.Integer(2), generator=checks.generator | None,
        device_budget=checks.Integer(0) | None, heldout=OBJECTIVE | checks.Choice(False) | None, finalists=checks.Integer(1),
        reestimate=checks.Function("a function of the model", 1) | None, resume=checks.path | None,
    )  # fmt: skip
    def __init__(
        self,
        checkpoints: CheckpointBank | str | Path | Sequence[Any],
        *,
        objective: Objective,
        model: nn.Module | None = None,
        optimizer: str | Optimizer = "evolution",
        evals: int = 2000,
        population: int = 40,
        generator: torch.Generator | None = None,
        device_budget: int | None = None,
        heldout: Objective | bool | None = None,
        finalists: int = 5,
        reestimate: Callable[[nn.Module], object] | None = None,
        resume: str | Path | None = None,
    ) -> None:
        self.optimizer = optimizer_named(optimizer)
        self.evals, self.population, self.finalists = evals, population, finalists
        if reestimate is not None and model is None:
            raise ValueError("reestimate needs model=")
        self.bank = checkpoints if isinstance(checkpoints, CheckpointBank) else CheckpointBank(checkpoints)
        self.model, self.objective, self.reestimate, self.resume = model, objective, reestimate, resume
        self.device_budget = device_budget
        self.heldout: Objective | None
        if heldout is None and isinstance(objective, SampleMetric):
            self.heldout = objective.fresh()
        else:
            self.heldout = heldout if callable(heldout) else None
        if statistics := batch_norms(self.bank, model):
            if reestimate is None:
                warn_of_batch_norm(statistics)
            else:
                self.bank = self.bank.without(statistics)
        self._seed = int(torch.randint(2**62, (), generator=generator or torch.Generator().manual_seed(0)))

    def run(self) -> Result:
        """Search; afterwards ``model`` has the winner's weights."""
        k = len(self.bank)
        evaluator = Evaluator(self.bank, self.model, reestimate=self.reestimate, device_budget=self.device_budget)
        if self.bank.identical():
            warnings.warn(
                "all checkpoints are the same: there is nothing to search, the last one is returned", stacklevel=2
            )
            last = ema_coefficients(k, 0.0)
            value = evaluator.value_at(last, self.objective)
            return Result(last, value, None, torch.tensor([value]).double(), last[None], (), int(math.isinf(value)))
        journal = Journal(self.resume, self._settings())
        try:
            tried, values = self._search(evaluator, journal)
            history = torch.tensor(values, dtype=torch.float64)
            failures = int(history.isinf().sum())
            if failures == len(values):
                raise RuntimeError(f"the objective was finite at none of {failures} evaluations")
            order = history.sort(stable=True).indices.tolist()
            finalists = self._judge_again(
                evaluator, journal, [(tried[i], values[i]) for i in order if values[i] < math.inf]
            )
        finally:
            journal.close()
        winner, value = (tried[order[0]], values[order[0]])
        if finalists:
            winner, value = finalists[0].coefficients, finalists[0].value
        if (largest := float(winner.abs().max())) > EXPLODED:
            warnings.warn(
                f"the largest coefficient is {largest:.3g}: results may not carry over to other noise", stacklevel=2
            )
        evaluator.put(winner)
        heldout = finalists[0].heldout if finalists else None
        return Result(winner, value, heldout, history, torch.stack(tried), finalists, failures)

    def state_dict(self, coefficients: Any) -> dict[str, Any]:
        """The combination's state dict: new tensors in the checkpoints' types. See :func:`combine`."""
        return combine(self.bank, coefficients)

    def apply_(self, model: nn.Module, coefficients: Any) -> nn.Module:
        """Load a combination into a model, and return it."""
        check_coefficients(coefficients, len(self.bank))
        state = self.state_dict(coefficients)
        state.update({key: state[other] for key, other in tied(model, state).items()})
        model.load_state_dict(state)
        return model

    def _settings(self) -> dict[str, Any]:
        entries = repr([(key, tuple(self.bank.shape(key)), str(self.bank.dtype_of(key))) for key in self.bank.keys])
        return {
            "optimizer": getattr(self.optimizer, "__qualname__", type(self.optimizer).__qualname__),
            "population": self.population,
            "seed": self._seed,
            "checkpoints": len(self.bank),
            "entries": hashlib.sha256(entries.encode()).hexdigest()[:16],
        }

    def _search(self, evaluator: Evaluator, journal: Journal) -> tuple[list[Tensor], list[float]]:
        generator = torch.Generator().manual_seed(self._seed)
        search = self.optimizer(len(self.bank), self.evals, self.population, generator)
        tried: list[Tensor] = []
        values: list[float] = []
        try:
            free = next(search)
            while True:
                a = full(free)
                evaluator.note(a)
                value = journal.look_up("search", a)
                if value is None:
                    value = evaluator.value(self.objective)
                    journal.add("search", a, value)
                tried.append(a)
                values.append(value)
                if len(values) == self.evals:
                    break
                free = search.send(value)
        except StopIteration:
            pass
        return tried, values

    def _judge_again(
        self, evaluator: Evaluator, journal: Journal, ranked: list[tuple[Tensor, float]]
    ) -> tuple[Finalist, ...]:
        """The best that differ, evaluated on what the search has not seen."""
        if self.heldout is None:
            return ()
        found: dict[tuple[float, ...], Finalist] = {}
        for a, value in ranked:
            if len(found) == self.finalists:
                break
            name = tuple(a.tolist())
            if name not in found:
                again = journal.look_up("heldout", a)
                if again is None:
                    again = evaluator.value_at(a, self.heldout)
                    journal.add("heldout", a, again)
                found[name] = Finalist(a, value, again)
        return tuple(sorted(found.values(), key=lambda finalist: finalist.heldout))
