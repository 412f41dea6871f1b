"""Objectives of the search: a metric of samples drawn with a fixed seed, and how a candidate gets its value."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn

from polyak.core import checks
from polyak.core.distances import (
    FrechetDistance,
    KernelDistance,
    cubic_kernel,
    gaussian_kernel,
    median_distance,
    minus_distance,
    sliced_wasserstein,
)
from polyak.teachers.lcsc.bank import CheckpointBank, Combination

Metric = Callable[[Tensor], float]
Sampler = Callable[[Any, int, torch.Generator], Tensor]  # (model, n, generator) -> samples, (n, ...)
Objective = Callable[[Any], float]

METRICS = ("energy", "fid", "kid", "mmd", "sliced_w2")
RECOMBINE = 100  # evaluations between two combinations from the start, which end the rounding of moves


OBJECTIVE = checks.Function("a function of the model", 1)
_FEATURES = checks.Function("a function of data", 1)
_SAMPLING: dict[str, checks.Kind] = dict(
    sampler=checks.Function("a function (model, n, generator) -> samples", 3),
    metric=checks.Function("a function of samples", 1), n=checks.Integer(1), seed=checks.Integer(0, 2**62),
    batch=checks.Integer(1) | None,
)  # fmt: skip


@checks.arguments(
    reference=checks.Tensor(floating=True, least_ndim=1), kind=checks.Choice(*METRICS), features=_FEATURES | None,
    seed=checks.Integer(0, 2**62),
)  # fmt: skip
def metric_to(
    reference: Tensor, kind: str = "energy", *, features: Callable[[Tensor], Tensor] | None = None, seed: int = 0
) -> Metric:
    """The distance of samples to reference data, as a function of the samples.

    Args:
        reference: (m, ...) data, or with ``features=None`` their features, (m, d).
        kind: "energy": energy distance. "mmd": squared MMD, Gaussian kernel at the reference's median distance. "kid" and
            "fid": the formulas, on whatever ``features`` gives. "sliced_w2": 2-Wasserstein over 128 fixed directions.
        features: maps data (n, ...) to (n, d). Default: data are flattened.
        seed: of the directions.

    Returns:
        ``samples (n, ...) -> float``, lower is better. All but "kid" are biased by a term that falls with n: compare at one n.

    Raises:
        ValueError: unknown kind, or a reference that is not (m, ...).
    """
    if features is None and reference.ndim < 2:
        raise ValueError(f"reference must have shape (m, ...), got {tuple(reference.shape)}")
    y = _features(reference, features)
    if kind == "sliced_w2":
        return _OfFeatures(_Sliced(y, seed), features)
    if kind == "fid":
        return _OfFeatures(FrechetDistance(y), features)
    if kind == "kid":
        return _OfFeatures(KernelDistance(y, cubic_kernel, unbiased=True), features)
    kernel = minus_distance if kind == "energy" else gaussian_kernel(median_distance(y))
    return _OfFeatures(KernelDistance(y, kernel), features)


def _features(x: Tensor, features: Callable[[Tensor], Tensor] | None) -> Tensor:
    return (x if features is None else features(x)).detach().flatten(1)


@dataclass(frozen=True)
class _OfFeatures:
    """A distance of samples' features; an object and no closure, so that it can be pickled."""

    distance: Metric
    features: Callable[[Tensor], Tensor] | None

    def __call__(self, x: Tensor) -> float:
        return self.distance(_features(x, self.features))


@dataclass(frozen=True)
class _Sliced:
    """Sliced Wasserstein distance to y along the same directions at every call."""

    y: Tensor
    seed: int

    def __call__(self, x: Tensor) -> float:
        return sliced_wasserstein(x, self.y, generator=torch.Generator(self.y.device).manual_seed(self.seed))


@checks.arguments(**_SAMPLING)
@dataclass(frozen=True)
class SampleMetric:
    """See :func:`sample_metric`."""

    sampler: Sampler
    metric: Metric
    n: int
    seed: int
    batch: int | None = None

    def __call__(self, model: Any) -> float:
        """The metric of n samples of the model."""
        device = _device(model)
        with _seeded(self.seed, device), _evaluating(model), torch.no_grad():
            generator = torch.Generator(device).manual_seed(self.seed)
            left, parts = self.n, []
            while left:
                size = min(left, self.batch or left)
                parts.append(self.sampler(model, size, generator))
                left -= size
            return float(self.metric(torch.cat(parts)))

    def fresh(self, *, n: int | None = None, seed: int | None = None, metric: Metric | None = None) -> SampleMetric:
        """The same on other noise (by default the next seed) and more samples (by default 4 n)."""
        return replace(
            self,
            n=4 * self.n if n is None else n,
            seed=self.seed + 1 if seed is None else seed,
            metric=metric or self.metric,
        )


@checks.arguments(**_SAMPLING)
def sample_metric(sampler: Sampler, metric: Metric, n: int, seed: int, *, batch: int | None = None) -> SampleMetric:
    """An objective: the metric of n samples, drawn with the same noise at every call.

    Args:
        sampler: ``(model, n, generator) -> samples`` of shape (n, ...). It is run in evaluation mode, without gradients, and
            with the global generators seeded alike; they are as before afterwards.
        metric: ``samples -> float``, lower is better; :func:`metric_to` makes the usual ones.
        n: number of samples.
        seed: of the noise.
        batch: at most this many samples at a time.

    Returns:
        ``objective(model) -> float``. Its ``fresh()`` is the same on other noise, for what must not be judged by what was
        searched.
    """
    return SampleMetric(sampler, metric, n, seed, batch)


def _device(model: Any) -> torch.device:
    if isinstance(model, nn.Module):
        tensors: Iterator[Tensor] | Any = model.parameters()
    else:
        tensors = (v for v in model.values() if isinstance(v, Tensor)) if isinstance(model, Mapping) else iter(())
    return next((t.device for t in tensors), torch.device("cpu"))


@contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    """The global generators of the CPU and of the device seeded, and then as they were."""
    if device.type == "cpu":
        with torch.random.fork_rng([]):
            torch.default_generator.manual_seed(seed)
            yield
    else:
        with torch.random.fork_rng([device.index or 0], device_type=device.type):
            torch.manual_seed(seed)
            yield


@contextmanager
def _evaluating(model: Any) -> Iterator[None]:
    """Evaluation mode, then every module in the mode it was in."""
    training = [m for m in model.modules() if m.training] if isinstance(model, nn.Module) else []
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


class Evaluator:
    """Gives coefficients their value: moves the weights there and asks the objective, with the model or a state dict."""

    def __init__(
        self,
        bank: CheckpointBank,
        model: nn.Module | None,
        *,
        reestimate: Callable[[nn.Module], object] | None = None,
        device_budget: int | None = None,
    ) -> None:
        self.bank, self.model, self.reestimate = bank, model, reestimate
        own = None if model is None else _own_weights(bank, model)
        device = _device(model)
        self.combination = Combination(bank, into=own, device=device)
        self.others = bank.others()
        if model is not None and self.others:
            model.load_state_dict(self.others, strict=False)
        # Where the model's tensors are not themselves the combination, they are written from it.
        self._written = [
            (tensor, self.combination.weights[key])
            for key, tensor in (own or {}).items()
            if tensor is not self.combination.weights[key]
        ]
        if device_budget is not None:
            bank.keep(device_budget, device)
        self._count, self._start = 0, True
        self._path: list[Tensor] = []

    def note(self, coefficients: Tensor) -> None:
        """Take coefficients as the next to be visited. The weights follow when a value is asked for."""
        if self._count % RECOMBINE == 0:
            self._path.clear()
            self._start = True
        self._path.append(coefficients)
        self._count += 1

    def value(self, objective: Objective) -> float:
        """The objective at the coefficients noted last; inf where it is not finite.

        Every noted point is passed through, so that the rounding of the weights is that of the same search without a break.
        """
        for a in self._path:
            if self._start:
                self.combination.set(a)
                self._start = False
            else:
                self.combination.move(a)
        self._path.clear()
        return self._ask(objective)

    def value_at(self, coefficients: Tensor, objective: Objective) -> float:
        """The objective at coefficients that are combined from the start, with nothing held in lower precision."""
        self.combination.set(coefficients, kept=False)
        self._count, self._path = 0, []
        return self._ask(objective)

    def put(self, coefficients: Tensor) -> None:
        """Leave the model with these coefficients' weights."""
        if self.model is not None:
            self.combination.set(coefficients, kept=False)
            self._present()
            if self.reestimate is not None:
                self.reestimate(self.model)

    @torch.no_grad()
    def _present(self) -> Any:
        """What the objective is given."""
        if self.model is None:
            return self.bank.ordered({**self.others, **self.combination.state_dict()})
        for tensor, weights in self._written:
            tensor.copy_(weights)
        return self.model

    def _ask(self, objective: Objective) -> float:
        given = self._present()
        if self.reestimate is not None:
            self.reestimate(given)
        given = objective(given)
        if isinstance(given, Tensor) and given.numel() == 1:
            given = given.item()
        if isinstance(given, bool) or not isinstance(given, Real):
            raise TypeError(f"objective must return a number, got {checks.shown(given)}")
        value = float(given)
        return value if math.isfinite(value) else math.inf


def tied(model: nn.Module, known: Iterable[str]) -> dict[str, str]:
    """The model's entries that are not among the known ones, but whose memory is that of a known one: missing -> known.

    Tied weights stand once in files of safetensors, and twice or more in ``model.state_dict()``.
    """
    own = {k: v for k, v in model.state_dict(keep_vars=True).items() if isinstance(v, Tensor)}
    known = set(known)
    here: dict[Any, str] = {}
    for key in own.keys() & known:
        for place in _places(own[key]):
            here.setdefault(place, key)
    found = {key: next((here[p] for p in _places(t) if p in here), None) for key, t in own.items() if key not in known}
    return {key: other for key, other in found.items() if other is not None}


def _places(t: Tensor) -> tuple[Any, ...]:
    """What two entries that are one have in common: the object, or the part of memory (which some kinds do not have)."""
    try:
        address = t.data_ptr()
    except (RuntimeError, NotImplementedError):
        address = 0
    return (id(t), (t.device, t.dtype, address, t.shape, t.stride())) if address else (id(t),)


def _own_weights(bank: CheckpointBank, model: nn.Module) -> dict[str, Tensor]:
    """The model's tensors under the bank's keys; ValueError where the two do not fit."""
    own = model.state_dict()
    known = dict.fromkeys([*bank.keys, *bank.layout])  # in order: the first that does not fit is named
    twins = tied(model, known)
    for key in (*own, *known):
        if key not in known and key not in twins:
            raise ValueError(f"the checkpoints lack {key!r}, which the model has")
        if key not in own:
            raise ValueError(f"the model lacks {key!r}, which the checkpoints have")
    for key in bank.keys:
        if own[key].shape != bank.shape(key):
            raise ValueError(
                f"{key!r} has shape {tuple(own[key].shape)} in the model, {tuple(bank.shape(key))} in checkpoints"
            )
    return {key: own[key] for key in bank.keys}


def batch_norms(bank: CheckpointBank, model: nn.Module | None) -> list[str]:
    """The running statistics among what the checkpoints hold."""
    if model is None:
        return [k for k in bank.layout if k.rpartition(".")[2] in ("running_mean", "running_var")]
    return [
        key
        for name, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None
        for what in ("running_mean", "running_var")
        if (key := f"{name}.{what}".lstrip(".")) in bank.layout
    ]


def warn_of_batch_norm(statistics: list[str]) -> None:
    """Say what a combination does to running statistics."""
    warnings.warn(
        f"{statistics[0]!r} belongs to a BatchNorm: combined statistics are not those of the combined weights (and a variance "
        "may become negative); give reestimate=, a function of the model that collects them anew, such as one that calls "
        "torch.optim.swa_utils.update_bn",
        stacklevel=3,
    )
