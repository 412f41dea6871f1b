"""Learning a state-space model: ascent of the likelihood by scores that particles estimate, for any optimizer of PyTorch."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from polyak.core import checks
from polyak.core.particles import Cloud
from polyak.particles.paris.backward import picked
from polyak.particles.paris.functional import FisherScore, observed
from polyak.particles.paris.gibbs import ParisParticleGibbs, given, series
from polyak.particles.paris.models import MODEL
from polyak.particles.paris.smoothing import ENGINE, PaRIS

_DECAY = 0.6  # of "rml": steps are t^-0.6 of the optimizer's


@checks.arguments(parameters=checks.tensor, scores=checks.tensor, path=checks.tensor | None)
class Fitted(NamedTuple):
    """What :func:`fit` returns. P is the number of parameters that the optimizer has, in its order.

    Attributes:
        parameters: (iterations, P), after each.
        scores: (iterations, P), the estimated gradients of the log-likelihood, mean over the batch; of "rml" their sums.
        path: (*batch, T, *state_shape), the last given path; None for "paris" and "rml".
    """

    parameters: Tensor
    scores: Tensor
    path: Tensor | None


@checks.arguments(
    model=checks.module, y=checks.tensor, optimizer=checks.optimizer, estimator=checks.Choice("ppg", "paris", "msc", "rml"),
    iterations=checks.Integer(1, 2**40), n=checks.Integer(2, 2**40), m=checks.Integer(1), sweeps=checks.Integer(1, 2**40) | None,
    burn_in=checks.Integer(0) | None, backward=ENGINE, path=checks.floating | None,
    callback=checks.Function("a function (iteration)", 1) | None, generator=checks.generator | None,
)  # fmt: skip
def fit(
    model: nn.Module,
    y: Tensor,
    optimizer: Optimizer,
    estimator: str = "ppg",
    iterations: int = 100,
    *,
    n: int = 64,
    m: int = 2,
    sweeps: int | None = None,
    burn_in: int | None = None,
    backward: str = "dense",
    path: Tensor | None = None,
    callback: Callable[[int], Any] | None = None,
    generator: torch.Generator | None = None,
) -> Fitted:
    """Maximize the likelihood of y over the optimizer's parameters, in place.

    By Fisher's identity the score is a smoothed additive functional (:class:`FisherScore`). Statistics are linear in it, so
    that one backward pass through ``sum omega log q + sum omega' log g`` over the draws of a sweep gives its estimate, where
    omega is what each pair counts for: parameters cost no memory for each particle. Only "rml" carries scores along.

    Args:
        model: a module that is a state-space model.
        y: series (*batch, T, *observation_shape); the likelihood's logarithm is averaged over the batch.
        optimizer: over some or all of the model's parameters; it may maximize or minimize, both raise the likelihood.
        estimator: of the score, in each iteration:
            "ppg": the roll-out estimate of :class:`ParisParticleGibbs`, started at the last iteration's path;
            "msc": the same with one sweep and no burn-in, which is Markov score climbing with N Rao-Blackwellized paths;
            "paris": the mean of ``sweeps`` independent runs of PaRIS, whose bias is O(T / N);
            "rml": recursive maximum likelihood, online: a step after each observation by what the estimate of the score grew,
            of size ``t^-0.6`` times the optimizer's; an iteration is a pass over the series.
        iterations: steps of the optimizer, or passes.
        n, m, backward, generator: particles, draws, engine and draws' generator, as for :class:`PaRIS`.
        sweeps, burn_in: of "ppg", default 16 and a quarter; of "paris", default one, and none.
        path: to begin with, for "ppg" and "msc"; default: one that a PaRIS run draws.
        callback: called after each iteration with its number, from 0.

    Raises:
        ValueError: parameters that the model does not have; options of another estimator; a score that is not finite; what
            :class:`ParisParticleGibbs` raises.
    """
    MODEL("model", model)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    known = {id(p) for p in model.parameters()}
    if any(id(p) not in known for p in parameters):
        raise ValueError("optimizer must be over the model's parameters, got one that the model does not have")
    for name, value, users in (
        ("sweeps", sweeps, ("ppg", "paris")), ("burn_in", burn_in, ("ppg",)), ("path", path, ("ppg", "msc")),
    ):  # fmt: skip
        if value is not None and estimator not in users:
            raise ValueError(f"{name} does nothing with estimator={estimator!r}; leave it out")
    times = series(y, model)
    if estimator == "rml":
        return _online(model, times, optimizer, parameters, iterations, PaRIS(
            model, FisherScore(model, parameters), n, m, backward, generator=generator
        ), callback)  # fmt: skip
    conditional = estimator != "paris"
    count = {"msc": 1, "paris": sweeps or 1}.get(estimator, sweeps or 16)
    chain = ParisParticleGibbs(model, _nothing, n, m, count, burn_in if conditional else 0, backward, generator)
    with torch.no_grad():
        if conditional:
            path = chain._sweep(times, None) if path is None else given(path, times, model)
    values, scores = [], []
    for iteration in range(iterations):
        total = [torch.zeros_like(p) for p in parameters]
        for s in range(chain.sweeps):
            draws: list[tuple[Tensor, Tensor | None]] = []
            with torch.no_grad():
                end = chain._sweep(times, path, draws)
            path = end if conditional else None
            if s >= chain.burn_in:
                torch._foreach_add_(total, sweep_score(model, times, chain._paris.cloud, draws, parameters))
        chain._paris._filter.watch.look()
        torch._foreach_div_(total, chain.sweeps - chain.burn_in)
        scores.append(_step(optimizer, parameters, total, iteration))
        values.append(_flat(parameters))
        if callback is not None:
            callback(iteration)
    return Fitted(torch.stack(values), torch.stack(scores), path)


def _nothing(x: Tensor, x_next: Tensor, t: int) -> Tensor:
    return x.new_zeros(())


def sweep_score(
    model: Any,
    times: list[Tensor],
    cloud: Cloud,
    draws: list[tuple[Tensor, Tensor | None]],
    parameters: Sequence[Tensor],
) -> list[Tensor]:
    """The gradient of the sum of log-densities over the draws, each with the weight that it has in the final estimate."""
    omega = cloud.logw.softmax(-1)
    dim, first = omega.ndim - 1, draws[0][0]
    with torch.enable_grad():
        total = omega.new_zeros(())
        for t in range(len(times) - 1, 0, -1):
            x, j = draws[t]
            assert j is not None
            past = draws[t - 1][0]
            m = j.shape[-1]
            share = (omega / m).unsqueeze(-1).expand(j.shape)
            seen = observed(model, x, times[t].unsqueeze(dim), t)
            moved = model.log_transition(picked(past, j, dim), x.unsqueeze(dim + 1), t - 1)
            total = total + (omega * seen).sum() + (share * moved).sum()
            omega = torch.zeros_like(omega).scatter_add_(-1, j.flatten(-2), share.flatten(-2))
        start = model.initial().log_prob(first) + observed(model, first, times[0].unsqueeze(dim), 0)
        total = (total + (omega * start).sum()) / max(1, omega[..., 0].numel())
        free = [p for p in parameters if p.requires_grad]
        made = torch.autograd.grad(total, free, allow_unused=True)
    found = {id(p): g for p, g in zip(free, made, strict=True) if g is not None}
    return [found.get(id(p), torch.zeros_like(p)) for p in parameters]


def _online(
    model: Any,
    times: list[Tensor],
    optimizer: Optimizer,
    parameters: Sequence[Tensor],
    iterations: int,
    paris: PaRIS,
    callback: Callable[[int], Any] | None,
) -> Fitted:
    dim = times[0].ndim - len(model.observation_shape)
    rates = [group["lr"] for group in optimizer.param_groups]
    counter = itertools.count(1)
    values, scores = [], []
    try:
        for iteration in range(iterations):
            before: Tensor | float = 0.0
            for t, y in enumerate(times):
                with torch.no_grad():
                    paris._begin(y) if t == 0 else paris._advance(y)
                    now = paris._mean().reshape(-1, *paris.tau.shape[dim + 1 :]).mean(0)
                decay = next(counter) ** -_DECAY
                for group, rate in zip(optimizer.param_groups, rates, strict=True):
                    group["lr"] = rate * decay
                _step(optimizer, parameters, _parts(now - before, parameters), iteration)
                before = now
            paris._filter.watch.look()
            scores.append(torch.as_tensor(before))
            values.append(_flat(parameters))
            if callback is not None:
                callback(iteration)
    finally:
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
    return Fitted(torch.stack(values), torch.stack(scores), None)


def _step(optimizer: Optimizer, parameters: Sequence[Tensor], score: list[Tensor], iteration: int) -> Tensor:
    """One step up; returns the score as one vector."""
    flat = torch.cat([g.flatten() for g in score])
    if not bool(flat.isfinite().all()):
        raise ValueError(
            f"the score is not finite in iteration {iteration}: {flat.tolist()[:4]}; a smaller step, or more particles"
        )
    by = {id(p): g for p, g in zip(parameters, score, strict=True)}
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad = by[id(p)].to(p.dtype) if group.get("maximize") else -by[id(p)].to(p.dtype)
    optimizer.step()
    return flat


def _parts(flat: Tensor, parameters: Sequence[Tensor]) -> list[Tensor]:
    pieces = flat.split([p.numel() for p in parameters])
    return [piece.view_as(p) for piece, p in zip(pieces, parameters, strict=True)]


def _flat(parameters: Sequence[Tensor]) -> Tensor:
    return torch.cat([p.detach().flatten() for p in parameters])
