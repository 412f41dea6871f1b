"""Robust means: nearest-neighbour averaging (NNA, arXiv 2209.10931) and the rules that it is compared with.

Every rule takes k vectors of which up to f are arbitrary, as a tensor ``(k, d)`` or as k equal containers of tensors, and
returns one. None waits for the device, and none is thrown off by NaN or infinity in up to f vectors, except :func:`mean`.

    NNA                 x_i <- mean of the k - f vectors nearest to x_i, itself included
    trimmed mean        per coordinate, without the f lowest and the f highest (Yin et al., arXiv 1803.01498)
    median              per coordinate
    geometric median    smoothed Weiszfeld iterations (RFA, Pillutla et al., arXiv 1912.13445)
    self-centred clip   z <- z + mean_j clip(x_j - z, tau), from z = x_i (He et al., arXiv 2202.01545)
    Krum, multi-Krum    the vector, or the k - f vectors, nearest to its own nearest neighbours (Blanchard et al., 2017)
    MVA                 mean of the k - f vectors of least variance (El-Mhamdi et al., arXiv 2008.00742)
    NNM                 replaces each vector by its NNA, before another rule (Allouah et al., arXiv 2302.01772)

What NNA guarantees. Let D be the largest distance between two honest vectors, b the number of faulty workers, and c <= b of
those that answered. If every honest vector arrives, n - f vectors are averaged and each honest result lies within D of that
worker's own vector; two honest results differ by at most ``(f - b + 4 c) / (n - f)`` times D, which is below 1 for n > 5 f
whatever is sent, even different things to different workers. (Two selections share all but f - b + c_i + c_j of their
places. There, two faulty vectors differ by at most 3 D, a faulty and an honest one by 2 D, two honest ones by D.) When the
f slowest are not waited for, the factor is ``(2 f - b + 4 c) / (n - 2 f)``. :func:`agreement` gives both.
"""

from __future__ import annotations

import inspect
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from polyak.core import checks
from polyak.optim.monna.vectors import OWN, VECTORS, Vectors, check_alike, flatten, like, rows_of

MOST_SUBSETS = 200_000
_SIZE = checks.Number(0.0, 1e38, "()")  # which float32 holds
_COUNT, _VARIANT = checks.Integer(0), checks.Choice("repo", "original")


def check_faulty(received: int, f: int) -> int:
    """``f``, if a rule can tolerate so many of ``received``. Raises ValueError otherwise."""
    checks.integer("f", f, least=0)
    if 2 * f >= received:
        raise ValueError(f"no rule tolerates half or more faulty: f={f} of {received} vectors")
    return f


@checks.arguments(
    n=checks.Integer(1), f=_COUNT, faulty=_COUNT, answering=_COUNT | None, wait=checks.Choice("all", "n-f")
)
def agreement(n: int, f: int, *, faulty: int, answering: int | None = None, wait: str = "all") -> float:
    """How much NNA shrinks the diameter of n - ``faulty`` honest vectors, at the worst: see the module's text.

    Args:
        faulty: how many workers are in fact faulty, at most f. answering: how many of these send anything; None: all.
    """
    check_faulty(n, f)
    checks.integer("faulty", faulty, least=0, most=f)
    c = faulty if answering is None else checks.integer("answering", answering, least=0, most=faulty)
    if wait == "all":
        return (f - faulty + 4 * c) / (n - f)
    check_faulty(n - f, f)
    return (2 * f - faulty + 4 * c) / (n - 2 * f)


# -- the rules, on lists of (..., d) ---------------------------------------------------------------------------------------


def _norm(difference: Tensor) -> Tensor:
    low = difference.dtype in (torch.bfloat16, torch.float16)
    return torch.linalg.vector_norm(difference, dim=-1, dtype=torch.float32 if low else None)


def _distance(a: Tensor, b: Tensor) -> Tensor:
    return _norm(a - b)


def lowest(scores: Tensor, count: int) -> Tensor:
    """A mask of the ``count`` lowest along the last dimension; NaN is the highest, equal ones count in their order."""
    return scores.argsort(dim=-1, stable=True).argsort(dim=-1) < count


def _mean_of(rows: Sequence[Tensor], chosen: Tensor, base: Tensor, count: int) -> Tensor:
    # From `base` on, so that equal vectors are averaged without rounding; filled, because 0 times NaN is NaN.
    total, difference = torch.zeros_like(base), torch.empty_like(base)
    for j, row in enumerate(rows):
        torch.sub(row, base, out=difference)
        total += difference.masked_fill_(~chosen[..., j, None], 0.0)
    return total.div_(count).add_(base)


def _nna(own: Tensor, others: Sequence[Tensor], f: int) -> Tensor:
    keep = len(others) + 1 - f
    if not others:
        return own.clone()
    difference = torch.empty_like(own)  # one buffer: new memory for each would cost more than the arithmetic
    distances = [_norm(torch.sub(own, other, out=difference)) for other in others]
    chosen = lowest(torch.stack([torch.zeros_like(distances[0]), *distances], -1), keep)
    return _mean_of(others, chosen[..., 1:], own, keep)


def _mean(rows: Sequence[Tensor], f: int) -> Tensor:
    return _middle(rows, 0, len(rows))


def _middle(rows: Sequence[Tensor], first: int, last: int) -> Tensor:
    base = rows[(first + last) // 2]
    total, difference = torch.zeros_like(base), torch.empty_like(base)
    for row in rows[first:last]:
        total += torch.sub(row, base, out=difference)
    return total.div_(last - first).add_(base)


@cache
def _network(k: int) -> tuple[tuple[int, int], ...]:
    """Batcher's odd-even merge sort: the pairs of places to be put in order, one after the other."""
    pairs = []
    p = 1
    while p < k:
        q = p
        while q >= 1:
            for start in range(q % p, k - q, 2 * q):
                span = range(start, start + min(q, k - start - q))
                pairs.extend((i, i + q) for i in span if i // (2 * p) == (i + q) // (2 * p))
            q //= 2
        p *= 2
    return tuple(pairs)


def _ascending(rows: Sequence[Tensor]) -> list[Tensor]:
    """Sorted per coordinate, NaN as the highest: for few rows a sorting network is 4 to 10 times as fast as torch.sort."""
    rows = [torch.nan_to_num(row, nan=math.inf, posinf=math.inf, neginf=-math.inf) for row in rows]
    spare = torch.empty_like(rows[0])
    for i, j in _network(len(rows)):
        torch.minimum(rows[i], rows[j], out=spare)
        torch.maximum(rows[i], rows[j], out=rows[j])
        rows[i], spare = spare, rows[i]
    return rows


def _trimmed_mean(rows: Sequence[Tensor], f: int) -> Tensor:
    return _middle(_ascending(rows), f, len(rows) - f)


def _median(rows: Sequence[Tensor], f: int) -> Tensor:
    ordered, k = _ascending(rows), len(rows)
    return torch.lerp(ordered[(k - 1) // 2], ordered[k // 2], 0.5) if k % 2 == 0 else ordered[k // 2]


def _finite(rows: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Vectors with zeros for what is no number, and which of them had none: 0 times NaN would be NaN."""
    return [row.nan_to_num(0.0, 0.0, 0.0) for row in rows], [row.isfinite().all(-1) for row in rows]


def _weighted_step(rows: Sequence[Tensor], finite: Sequence[Tensor], z: Tensor, weigh: Any) -> tuple[Tensor, Any]:
    """``sum_j w_j (x_j - z)`` and ``sum_j w_j`` with w_j = weigh(||x_j - z||), 0 where that distance is not finite."""
    step, difference, total = torch.zeros_like(z), torch.empty_like(z), 0.0
    for row, good in zip(rows, finite, strict=True):
        distance = _norm(torch.sub(row, z, out=difference))
        weight = torch.where(good & distance.isfinite(), weigh(distance), 0.0)
        step.addcmul_(weight[..., None].to(z.dtype), difference)
        total = total + weight
    return step, total


def _geometric_median(rows: Sequence[Tensor], f: int, iters: int = 3, eps: float = 0.1) -> Tensor:
    rows, finite = _finite(rows)
    z = torch.zeros_like(rows[0])
    for _ in range(iters):
        step, total = _weighted_step(rows, finite, z, lambda distance: 1 / distance.clamp(min=eps))
        z = (z + step / total[..., None]).to(z.dtype)
    return z


def _clip(own: Tensor, rows: Sequence[Tensor], f: int, tau: float = 2.0, iters: int = 3) -> Tensor:
    (rows, finite), z = _finite(rows), own
    for _ in range(iters):
        step, _ = _weighted_step(rows, finite, z, lambda distance: tau / distance.clamp(min=tau))
        z = z + step / len(rows)
    return z


def _self_centered_clip(own: Tensor, others: Sequence[Tensor], f: int, tau: float = 2.0, iters: int = 3) -> Tensor:
    return _clip(own, [own, *others], f, tau, iters)


def _pairwise(rows: Sequence[Tensor]) -> Tensor:
    """(..., k, k) distances, 0 on the diagonal, infinite to a vector that is not finite."""
    k = len(rows)
    zero = torch.zeros_like(_distance(rows[0], rows[0]))
    table = [[zero] * k for _ in range(k)]
    for i, j in itertools.combinations(range(k), 2):
        table[i][j] = table[j][i] = _distance(rows[i], rows[j]).nan_to_num(nan=math.inf, posinf=math.inf)
    return torch.stack([torch.stack(line, -1) for line in table], -2)


def _krum_scores(rows: Sequence[Tensor], f: int, variant: str) -> Tensor:
    count = len(rows) - f - (1 if variant == "repo" else 2)
    if count < 1:
        raise ValueError(f"Krum (variant {variant!r}) needs more than {len(rows) - count} vectors, got {len(rows)}")
    nearest = _pairwise(rows).sort(dim=-1).values[..., 1 : count + 1]  # the first is the vector itself
    return (nearest if variant == "repo" else nearest.square()).sum(-1)


def _pick(rows: Sequence[Tensor], index: Tensor) -> Tensor:
    result = rows[0]
    for j, row in enumerate(rows):
        result = torch.where((index == j)[..., None], row, result)
    return result


def _krum(rows: Sequence[Tensor], f: int, variant: str = "repo") -> Tensor:
    return _pick(rows, _krum_scores(rows, f, variant).argmin(-1))


def _multi_krum(rows: Sequence[Tensor], f: int, variant: str = "repo") -> Tensor:
    scores, keep = _krum_scores(rows, f, variant), len(rows) - f
    return _mean_of(rows, lowest(scores, keep), _pick(rows, scores.argmin(-1)), keep)


@cache
def _subsets(k: int, size: int) -> Tensor:
    if (count := math.comb(k, size)) > MOST_SUBSETS:
        raise ValueError(
            f"mva looks at all {count} subsets of {size} of {k} vectors; at most {MOST_SUBSETS} are allowed"
        )
    return torch.tensor(list(itertools.combinations(range(k), size)))


def _mva(rows: Sequence[Tensor], f: int) -> Tensor:
    # A subset's variance is the sum of its squared pairwise distances over 2 size^2.
    k, squares = len(rows), _pairwise(rows).square()
    subsets = _subsets(k, k - f).to(squares.device)
    scores = sum(
        (squares[..., subsets[:, i], subsets[:, j]] for i, j in itertools.combinations(range(k - f), 2)),
        squares.new_zeros(*squares.shape[:-2], len(subsets)),
    )
    best = subsets[scores.argmin(-1)]  # (..., k - f)
    chosen = (best[..., None] == torch.arange(k, device=best.device)).any(-2)
    return _mean_of(rows, chosen, _pick(rows, best[..., 0]), k - f)


def _nnm(rows: Sequence[Tensor], f: int) -> list[Tensor]:
    distances = _pairwise(rows)
    distances = distances - torch.eye(len(rows), dtype=distances.dtype, device=distances.device)  # itself first
    keep = len(rows) - f
    return [_mean_of(rows, lowest(distances[..., i, :], keep), row, keep) for i, row in enumerate(rows)]


# -- public functions ------------------------------------------------------------------------------------------------------


def _apply(x: Vectors, f: int, rule: Callable[..., Tensor], **options: Any) -> Any:
    rows, rebuild = rows_of("x", x)
    return rebuild(rule(rows, check_faulty(len(rows), f), **options))


def _centred(
    own: Any, others: Vectors, f: int, rule: Callable[..., Tensor], name: str = "others", **options: Any
) -> Any:
    rows, _ = rows_of(name, others) if len(others) else ([], None)
    flat, rebuild = (own, lambda result: result) if isinstance(others, Tensor) else (flatten(own), like(own))
    check_alike(f"own and {name}", [flat, *rows])
    return rebuild(rule(flat, rows, check_faulty(len(rows) + 1, f), **options))


@checks.arguments(own=OWN, others=VECTORS, f=_COUNT)
def nna(own: Any, others: Vectors, f: int) -> Any:
    """Nearest-neighbour averaging: the mean of the ``k - f`` of k = 1 + len(others) vectors nearest to ``own``, own included.

    Distances are Euclidean, of differences that are formed first; NaN ranks last; equal distances count own first, then in
    the order given. Two passes over ``others``, of which nothing is copied.

    Args:
        own: (d,), or a container of tensors. others: (k - 1, d), or a list of k - 1 containers like own.
        f: how many to leave out.

    Raises:
        ValueError: f < 0 or 2 f >= k, vectors of different length, or not floating point.
    """
    return _centred(own, others, f, _nna)


@checks.arguments(x=VECTORS)
def mean(x: Vectors) -> Any:
    """The plain mean, which one faulty vector can move anywhere."""
    return _apply(x, 0, _mean)


@checks.arguments(x=VECTORS, f=_COUNT)
def trimmed_mean(x: Vectors, f: int) -> Any:
    """Per coordinate, the mean without the f lowest and the f highest; NaN is among the highest."""
    return _apply(x, f, _trimmed_mean)


@checks.arguments(x=VECTORS)
def median(x: Vectors) -> Any:
    """Per coordinate, the median; of an even number the mean of the two in the middle. NaN is among the highest."""
    return _apply(x, 0, _median)


@checks.arguments(x=VECTORS, iters=checks.Integer(1), eps=_SIZE)
def geometric_median(x: Vectors, iters: int = 3, eps: float = 0.1) -> Any:
    """``argmin_z sum_j ||x_j - z||`` by ``iters`` Weiszfeld steps from z = 0, with weights ``1 / max(||x_j - z||, eps)``.

    Three steps from zero are the official baseline: far from the origin not yet the geometric median, nor equivariant to
    translation. Vectors that are not finite have weight 0.
    """
    return _apply(x, 0, _geometric_median, iters=iters, eps=eps)


@checks.arguments(own=OWN, x=VECTORS, tau=_SIZE, iters=checks.Integer(1))
def self_centered_clip(own: Any, x: Vectors, tau: float, iters: int = 3) -> Any:
    """``iters`` times ``z <- z + mean_j clip(x_j - z, tau)`` from z = own; clip shortens to the norm tau.

    Args:
        x: all k vectors, own among them. One that is not finite moves nothing.
    """
    return _centred(own, x, 0, _clip, "x", tau=tau, iters=iters)


@checks.arguments(x=VECTORS, f=_COUNT, variant=_VARIANT)
def krum(x: Vectors, f: int, variant: str = "repo") -> Any:
    """The vector with the least sum of distances to its nearest others.

    ``variant="repo"``: plain distances to k - f - 1 others, as in the paper's code; ``"original"``: squared ones to k - f - 2.
    """
    return _apply(x, f, _krum, variant=variant)


@checks.arguments(x=VECTORS, f=_COUNT, variant=_VARIANT)
def multi_krum(x: Vectors, f: int, variant: str = "repo") -> Any:
    """The mean of the k - f vectors that :func:`krum` scores lowest."""
    return _apply(x, f, _multi_krum, variant=variant)


@checks.arguments(x=VECTORS, f=_COUNT)
def mva(x: Vectors, f: int) -> Any:
    """The mean of the k - f vectors of least variance, found among all subsets (ValueError above 200,000 of them)."""
    return _apply(x, f, _mva)


@checks.arguments(x=VECTORS, f=_COUNT)
def nnm(x: Vectors, f: int) -> Any:
    """Each vector replaced by the mean of its k - f nearest, itself included: (k, d), or a list of k containers."""
    rows, rebuild = rows_of("x", x)
    mixed = _nnm(rows, check_faulty(len(rows), f))
    return torch.stack(mixed, -2) if isinstance(x, Tensor) else [rebuild(row) for row in mixed]


# -- rules by name ---------------------------------------------------------------------------------------------------------

RULES: dict[str, tuple[Callable[..., Tensor], bool]] = {  # with whether a rule looks from one's own vector
    "nna": (_nna, True),
    "mean": (_mean, False),
    "trimmed_mean": (_trimmed_mean, False),
    "median": (_median, False),
    "geometric_median": (_geometric_median, False),
    "self_centered_clip": (_self_centered_clip, True),
    "krum": (_krum, False),
    "multi_krum": (_multi_krum, False),
    "mva": (_mva, False),
}
_OPTIONS: dict[str, Callable[[str, Any], Any]] = {
    "tau": _SIZE,
    "eps": _SIZE,
    "iters": checks.Integer(1),
    "variant": _VARIANT,
}


_PAIRS = checks.Each(checks.Each(checks.Anything("an option's name, or its value"), count=2))


@checks.arguments(
    name=checks.text, rule=checks.function, centred=checks.flag, options=_PAIRS,
    nnm=checks.flag,
)  # fmt: skip
@dataclass(frozen=True)
class Mixer:
    """A rule with its options, as optimizer and simulator call it: ``mixer.mix(own, rows, f)`` on lists of (..., d).

    ``rows`` are the others' vectors in the order of ranks where ``centred``, else all vectors, own among them, so that
    whoever has the same vectors gets the same result to the bit.
    """

    name: str
    rule: Callable[..., Tensor]
    centred: bool
    options: tuple[tuple[str, Any], ...] = ()
    nnm: bool = False

    def mix(self, own: Tensor, rows: Sequence[Tensor], f: int) -> Tensor:
        if self.centred:
            if self.nnm:
                own, *rows = _nnm([own, *rows], f)
            return self.rule(own, rows, f, **dict(self.options))
        rows = list(rows)
        return self.rule(_nnm(rows, f) if self.nnm else rows, f, **dict(self.options))


RULE = (
    checks.Choice(*RULES)
    | checks.Function("a function (own, others, f) -> mixed", 3)
    | checks.Instance(Mixer, words="a Mixer")
)


@checks.arguments(rule=RULE, nnm=checks.flag)
def mixer(
    rule: str | Callable[[Tensor, list[Tensor], int], Tensor] | Mixer, *, nnm: bool = False, **options: Any
) -> Mixer:
    """A rule by its name, with its options: ``mixer("self_centered_clip", tau=5.0)``, ``mixer("trimmed_mean", nnm=True)``.

    Args:
        rule: a name of :data:`RULES`, or a function ``(own, others, f) -> mixed`` of vectors (d,).
        nnm: mix nearest neighbours first (:func:`nnm`).

    Raises:
        ValueError: no such rule, or an option that the rule does not have; a near name is suggested.
    """
    if isinstance(rule, Mixer):
        return rule
    if callable(rule):
        name, function, centred = getattr(rule, "__name__", "custom"), rule, True
        known: list[str] = []
    else:
        name = rule
        function, centred = RULES[name]
        known = [p.name for p in inspect.signature(function).parameters.values() if p.default is not p.empty]
    for option, value in options.items():
        if option not in known:
            raise ValueError(f"mixer {name!r} has no option {option!r}{checks.suggestion(option, known)}")
        options[option] = _OPTIONS[option](option, value)
    return Mixer(name, function, centred, tuple(sorted(options.items())), nnm)
