"""Searches over coefficients. Each is a coroutine: it yields the K-1 free ones (all but the oldest's) and is sent their value.

A search ends when it has no more to ask, or is left when its evaluations are spent. It knows nothing of weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator

import torch
from torch import Tensor

from polyak.core import checks
from polyak.teachers.lcsc.bank import ema_coefficients

Search = Generator[Tensor, float, None]
Optimizer = Callable[[int, int, int, torch.Generator], Search]  # (K, evals, population, generator)

MOST_RATE = 0.98  # of the averages that searches start from
_PARENTS = 10
_SIGMA = 0.05
_MUTATED = 0.3  # the share of coefficients that noise moves


def full(free: Tensor) -> Tensor:
    """All K coefficients: the oldest's is one minus the others, or 0 where that is their rounding."""
    oldest = 1 - free.sum(0, keepdim=True)
    return torch.cat([torch.where(oldest.abs() < 1e-15 * (1 + len(free)), 0.0, oldest), free])


def evolution(k: int, evals: int, population: int, generator: torch.Generator) -> Search:
    """Steady-state evolution from averages of random rates.

    Two of the ten best are crossed: half the time by a random convex blend, else by an exchange of coefficients, whose sum is
    then restored in equal parts. Nine times in ten the child is moved: mostly by Gaussian noise of sum zero on 30% of the
    coefficients, of size 0.05 times 0.1, 1 or 3, else by up to twice the difference of two others. The best ``population`` are
    kept. The paper names crossover, mutation and this start; the details are ours, since its search was never released. Noise of
    sum zero matters: else the oldest checkpoint, the farthest, takes up all that is added; so do differences, which know how far
    each direction may be gone.
    """

    def uniform(*shape: int) -> Tensor:
        return torch.rand(shape, dtype=torch.float64, generator=generator)

    rates = uniform(population) * MOST_RATE
    rates[0] = 0  # the last checkpoint is among them
    alive: list[tuple[float, Tensor]] = []
    for rate in rates.tolist():
        a = ema_coefficients(k, rate)
        alive.append(((yield a[1:]), a))
    moved = max(2, round(_MUTATED * k))
    while True:
        alive.sort(key=lambda pair: pair[0])
        del alive[population:]
        parents = alive[:_PARENTS]
        first, second = (parents[i][1] for i in torch.randperm(len(parents), generator=generator)[:2].tolist())
        if uniform() < 0.5:
            a = torch.lerp(second, first, uniform())
        else:
            a = torch.where(uniform(k) < 0.5, first, second)
            a = a + (1 - a.sum()) / k
        if uniform() < 0.9:
            if uniform() < 0.3:
                plus, minus = (alive[i][1] for i in torch.randperm(len(alive), generator=generator)[:2].tolist())
                a = a + 2 * uniform() * (plus - minus)
            else:
                size = _SIGMA * (0.1, 1.0, 3.0)[int(torch.randint(3, (), generator=generator))]
                noise = torch.randn(moved, dtype=torch.float64, generator=generator)
                a = a.index_add(0, torch.randperm(k, generator=generator)[:moved], size * (noise - noise.mean()))
        alive.append(((yield a[1:]), a))


def cmaes(k: int, evals: int, population: int, generator: torch.Generator) -> Search:
    """CMA-ES with a full covariance (the library ``cmaes``), from the best of ``population`` averages; K up to about 100.

    Its own population follows its dimension; where it has converged it starts again from the best, with one twice as large.
    """
    try:
        from cmaes import CMA
    except ImportError as error:
        raise ImportError("optimizer='cmaes' needs cmaes: pip install 'polyak[teachers]'") from error
    if k < 3:
        raise ValueError(f"optimizer='cmaes' needs at least 3 checkpoints, got {k}")
    best = yield from _scan(k, min(population, max(1, evals // 4)))
    size = None
    while True:
        seed = int(torch.randint(2**31, (), generator=generator))
        search = CMA(mean=best[1].numpy(), sigma=_SIGMA, seed=seed, population_size=size)
        while not search.should_stop():
            told = []
            for _ in range(search.population_size):
                x = search.ask()
                point = torch.from_numpy(x.copy())
                value = yield point
                if value < best[0]:
                    best = value, point
                told.append(
                    (x, min(value, 1e300))
                )  # only their order counts, and infinities have none among themselves
            search.tell(told)
        size = 2 * search.population_size


def quadratic(k: int, evals: int, population: int, generator: torch.Generator) -> Search:
    """Fit a quadratic model to random points about the best one, step to its minimum, repeat.

    A full model has 1 + d + d(d+1)/2 terms for d = K-1 and is fitted to half again as many points, or to what half of the
    evaluations left allow (the least-norm model, then). Each step is tried whole and shortened; where none is better the
    next points are drawn from closer by.
    """
    d = k - 1
    scanned = min(population, max(1, evals // 4))
    best = yield from _scan(k, scanned)
    left = evals - scanned
    radius = _SIGMA
    terms = 1 + d + d * (d + 1) // 2
    rows, columns = torch.triu_indices(d, d)
    while left > 0:
        count = max(2, min(math.ceil(1.5 * terms), left // 2))
        z = torch.randn(count, d, dtype=torch.float64, generator=generator)
        center, values = best[1], []
        for row in z:
            x = center + radius * row
            value = yield x
            values.append(value)
            best = min(best, (value, x), key=lambda pair: pair[0])
        y = torch.tensor(values, dtype=torch.float64)
        known = y.isfinite()
        features = torch.cat([torch.ones(count, 1, dtype=torch.float64), z, z[:, rows] * z[:, columns]], dim=1)
        improved = False
        if int(known.sum()) > 1:
            fitted = torch.linalg.lstsq(features[known], y[known, None], driver="gelsd").solution[:, 0]
            for step in _model_steps(fitted, rows, columns, d):
                x = center + radius * step
                value = yield x
                if value < best[0]:
                    best, improved = (value, x), True
        left -= count + len(_SHORTENED)
        radius = radius if improved else radius / 3


_SHORTENED = (1.0, 0.3, 0.1)


def _model_steps(fitted: Tensor, rows: Tensor, columns: Tensor, d: int) -> list[Tensor]:
    """The minimum of a fitted quadratic, whole and shortened. Directions in which it has none are followed downhill."""
    gradient = fitted[1 : 1 + d]
    hessian = torch.zeros(d, d, dtype=torch.float64)
    hessian[rows, columns] = fitted[1 + d :]
    curvature, directions = torch.linalg.eigh(hessian + hessian.T)
    least = 1e-12 * curvature.abs().max().clamp(min=torch.finfo(torch.float64).tiny)
    step = -directions @ ((directions.T @ gradient) / curvature.abs().clamp(min=least))
    return [factor * step for factor in _SHORTENED]


def grid(k: int, evals: int, population: int, generator: torch.Generator) -> Search:
    """Averages of ``evals`` rates and window starts: as many starts as half lives, memories 1/(1-g) spaced by their logarithm.

    The first is the last checkpoint (g = 0). What EMA would have given, had its rate and start been searched as long.
    """
    starts = torch.linspace(0, k - 2, min(k - 1, math.isqrt(evals))).round().long().tolist()
    yield ema_coefficients(k, 0.0)[1:]
    for i, start in enumerate(starts):
        count = (evals - 1) // len(starts) + (i < (evals - 1) % len(starts))
        memories = torch.logspace(0, -math.log10(1 - MOST_RATE), count + 1, dtype=torch.float64)[1:]
        for rate in (1 - 1 / memories).tolist():
            yield ema_coefficients(k, rate, start=start)[1:]


def greedy(k: int, evals: int, population: int, generator: torch.Generator) -> Search:
    """The greedy soup (Wortsman et al., arXiv 2203.05482): single checkpoints, then the best ones averaged in while it helps.

    Passes are repeated, so that a checkpoint may be taken several times, until one brings nothing.
    """
    one = torch.eye(k, dtype=torch.float64)
    singles: dict[int, float] = {}
    for i in reversed(range(k)):
        singles[i] = yield one[i, 1:]
    order = sorted(singles, key=singles.__getitem__)
    counts, best = one[order[0]].clone(), singles[order[0]]
    improved = True
    while improved:
        improved = False
        for i in order:
            candidate = counts + one[i]
            if torch.count_nonzero(candidate) == 1:
                continue  # the same weights again
            value = yield (candidate / candidate.sum())[1:]
            if value < best:
                counts, best, improved = candidate, value, True


def _scan(k: int, count: int) -> Generator[Tensor, float, tuple[float, Tensor]]:
    """The best of ``count`` averages over all checkpoints, their memories spaced by logarithm."""
    best: tuple[float, Tensor] = (math.inf, ema_coefficients(k, 0.0)[1:])
    for memory in torch.logspace(0, -math.log10(1 - MOST_RATE), count, dtype=torch.float64).tolist():
        x = ema_coefficients(k, 1 - 1 / memory)[1:]
        value = yield x
        if value < best[0]:
            best = value, x
    return best


OPTIMIZERS: dict[str, Optimizer] = {
    "evolution": evolution,
    "cmaes": cmaes,
    "quadratic": quadratic,
    "grid": grid,
    "greedy": greedy,
}


OPTIMIZER = checks.Choice(*OPTIMIZERS) | checks.Function("a function (K, evals, population, generator) -> search", 4)


def optimizer_named(given: str | Optimizer) -> Optimizer:
    """A search by its name, or a function that makes one."""
    return given if callable(given) else OPTIMIZERS[given]
