"""How far apart samples of the ODE and of the SDE are, and either from the data."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from polyak.core import checks
from polyak.core.distances import sliced_wasserstein, wasserstein_1d
from polyak.generate.ddim import DDIM
from polyak.generate.evaluate import MODEL, Model
from polyak.generate.fields import PROCESS, STATE, STEPS, check_process
from polyak.generate.fokker_planck_gap.density import SHAPE
from polyak.generate.process import Process
from polyak.generate.process.path import GRID
from polyak.generate.runge_kutta import Heun
from polyak.generate.sampling import sample
from polyak.generate.solver import Solver

_SAMPLES = checks.Tensor(floating=True, ndim=2)
_SOLVER = checks.Instance(Solver, words="a Solver (an instance, not the class)")
_BINS, _COUNT = checks.Integer(2, 10_000), checks.Integer(1, 10**9)


@checks.arguments(x=_SAMPLES, y=_SAMPLES, bins=_BINS, box=checks.positive)
def histogram_w2(x: Tensor, y: Tensor, bins: int = 64, box: float = 4.0) -> float:
    """The squared W2 of two histograms in the plane: the paper's measure, for as many samples as one likes.

    Points with a coordinate of ``box`` or more in size are dropped; the others go to the nearest node of a grid of ``bins`` by
    ``bins`` over ``[-box, box]^2``. Between the histograms the transport is exact. Its cost ``(i - i')^2 + (j - j')^2`` is paid
    along one axis and then along the other: a linear program with ``2 bins^3`` unknowns in place of ``bins^4`` (Auricchio et
    al., "Computing Kantorovich-Wasserstein distances on d-dimensional histograms using (d+1)-partite graphs", NeurIPS 2018).

    Args:
        x, y: samples, (n, 2) and (m, 2).
        bins, box: of the grid, whose cells have sides of ``2 box / (bins - 1)``.

    Returns:
        W2 squared, as the paper's tables have it.

    Raises:
        ValueError: points that are not finite, or none inside the box.
        ImportError: SciPy is not installed.
    """
    a, b = (_histogram(name, points, bins, box) for name, points in (("x", x), ("y", y)))
    return (2 * box / (bins - 1)) ** 2 * _transport(a, b)


def _histogram(name: str, x: Tensor, bins: int, box: float) -> Tensor:
    """Shares of the points, (bins, bins), on the CPU."""
    if x.shape[1] != 2:
        raise ValueError(f"{name} must have shape (n, 2), got {tuple(x.shape)}")
    x = x.detach().to(torch.float64).cpu()
    if not bool(x.isfinite().all()):
        raise ValueError(f"{name} must be finite, got {checks.shown(x)}")
    inside = x[(x.abs() < box).all(1)]
    if not len(inside):
        raise ValueError(
            f"{name} must have points inside the box, all {len(x)} have a coordinate of {box:g} or more in size"
        )
    i, j = ((inside + box) * ((bins - 1) / (2 * box))).round().long().unbind(1)
    counts = torch.bincount(i * bins + j, minlength=bins * bins)
    return counts.reshape(bins, bins).double() / len(inside)


def _transport(a: Tensor, b: Tensor) -> float:
    """The least mean of the squared distance, in cells: from (i, j) to (k, j), and from there to (k, l)."""
    optimize, sparse = _scipy("optimize"), _scipy("sparse")
    sources, targets = a.nonzero(), b.nonzero()
    columns, rows = targets[:, 0].unique(), sources[:, 1].unique()  # the k and the j that can occur
    p, q, m = len(sources), len(targets), len(rows)
    place = torch.zeros(len(a), dtype=torch.long)
    place[rows] = torch.arange(m)
    rank = torch.zeros(len(a), dtype=torch.long)
    rank[columns] = torch.arange(len(columns))
    at, k = torch.meshgrid(torch.arange(p), torch.arange(len(columns)), indexing="ij")
    to, j = torch.meshgrid(torch.arange(q), torch.arange(m), indexing="ij")
    at, k, to, j = at.flatten(), k.flatten(), to.flatten(), j.flatten()
    cost = torch.cat([(sources[at, 0] - columns[k]).square(), (targets[to, 1] - rows[j]).square()])
    middle = torch.cat([k * m + place[sources[at, 1]], rank[targets[to, 0]] * m + j])
    edges, first = torch.arange(len(cost)), len(at)
    # What leaves a source; what comes to the middle less what leaves it; what comes to a target.
    index = torch.cat([at, p + middle, p + len(columns) * m + to])
    signs = torch.ones(len(cost), dtype=torch.float64)
    signs[first:] = -1
    entries = torch.cat([signs[:first], signs, signs[first:].abs()])
    unknown = torch.cat([edges[:first], edges, edges[first:]])
    total = p + len(columns) * m + q
    matrix = sparse.csr_array((entries.numpy(), (index.numpy(), unknown.numpy())), shape=(total, len(cost)))
    scale = float(max(p, q))  # so that masses are about one
    masses = scale * torch.cat([a[a > 0], torch.zeros(len(columns) * m, dtype=torch.float64), b[b > 0]])
    found = optimize.linprog(cost.double().numpy(), A_eq=matrix, b_eq=masses.numpy(), method="highs")
    if found.x is None:
        raise RuntimeError(f"SciPy's linear program did not end: {found.message}")
    return max(found.fun, 0.0) / scale


def _scipy(module: str) -> Any:
    try:
        return import_module(f"scipy.{module}")
    except ImportError as error:
        raise ImportError("exact optimal transport needs SciPy: pip install 'polyak[lab]'") from error


_FOUND = checks.measured | None


@checks.arguments(ode_sde=checks.measured, ode_data=_FOUND, sde_data=_FOUND)
class Gap(NamedTuple):
    """Distances W2 (not squared) between samples of the ODE, of the SDE, and data; None where no data were given."""

    ode_sde: float
    ode_data: float | None
    sde_data: float | None


@checks.arguments(
    denoiser=MODEL, process=PROCESS, n=_COUNT, steps=STEPS, metric=checks.Choice("w2", "sliced"), data=STATE | None,
    shape=SHAPE | None, ode=_SOLVER | None, sde=_SOLVER | None, grid=GRID | None, bins=_BINS, box=checks.positive,
    projections=checks.Integer(1, 10**6), generator=checks.generator | None,
    dtype=checks.dtype | None, device=checks.device | None,
)  # fmt: skip
def ode_sde_gap(
    denoiser: Model,
    process: Process,
    n: int = 10_000,
    steps: int = 300,
    generator: torch.Generator | None = None,
    metric: Literal["w2", "sliced"] = "w2",
    *,
    data: Tensor | None = None,
    shape: Sequence[int] | None = None,
    ode: Solver | None = None,
    sde: Solver | None = None,
    grid: str | None = None,
    bins: int = 64,
    box: float = 4.0,
    projections: int = 128,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> Gap:
    """How far the law of the probability-flow ODE's samples is from that of the reverse SDE's, with one and the same model.

    With the true score they are one law. Two samples of n of one law are apart, too: by about ``1/sqrt(n)`` in one dimension.

    Args:
        denoiser, process: the model, and its process of Gaussian noise.
        n, steps: samples of either, from the same starts, and steps.
        generator: of everything random.
        metric: "w2": by sorting in one dimension; in two by :func:`histogram_w2` of ``bins`` and ``box``, its root.
            "sliced": over ``projections`` directions, in any dimension.
        data: (m, ...), samples at t_min; left out, ``shape`` is that of one sample.
        ode, sde: solvers; default ``Heun()`` and ``DDIM(eta=1.0)``.
        grid: the spacing of steps; default: each solver's own.
        bins, box, projections: of the metric.
        dtype, device: of the samples; default: those of the data.

    Returns:
        A :class:`Gap`.

    Raises:
        ValueError: noise that is not Gaussian; an ``ode`` that draws noise or an ``sde`` that does not; neither data nor a shape;
            "w2" in more than two dimensions; samples that are not finite.
    """
    check_process(denoiser, process)
    ode, sde = ode or Heun(), sde or DDIM(eta=1.0)
    if ode.stochastic:
        raise ValueError(f"ode must be a deterministic solver, got {ode!r}")
    if not sde.stochastic:
        raise ValueError(f"sde must be a stochastic solver, got {sde!r}")
    if data is not None:
        if shape is not None and tuple(shape) != data.shape[1:]:
            raise ValueError(f"shape must be that of the data, {tuple(data.shape[1:])}, got {tuple(shape)}")
        shape, dtype, device = data.shape[1:], dtype or data.dtype, device or data.device
    elif shape is None:
        raise ValueError("data or shape is needed, to know what one sample is like; got neither")
    size = torch.Size(shape).numel()
    if metric == "w2" and size > 2:
        raise ValueError(f"metric must be 'sliced' in more than two dimensions, got 'w2' for {size}")
    start = process.prior((n, *shape), generator=generator, dtype=dtype, device=device)
    drawn = [
        sample(denoiser, start, process=process, solver=solver, steps=steps, grid=grid, generator=generator).flatten(1)
        for solver in (ode, sde)
    ]

    def apart(x: Tensor, y: Tensor) -> float:
        if metric == "sliced":
            return sliced_wasserstein(x, y, projections=projections, generator=generator)
        return wasserstein_1d(x, y).item() if size == 1 else histogram_w2(x, y, bins, box) ** 0.5

    if data is None:
        return Gap(apart(*drawn), None, None)
    given = data.flatten(1).to(start)
    return Gap(apart(*drawn), apart(drawn[0], given), apart(drawn[1], given))
