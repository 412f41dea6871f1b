"""Vector fields of diffusion models: divergence, products with Jacobians, and the log-likelihood of the probability-flow ODE.

A field is a function ``(x, t) -> tensor`` of x's shape, (B, ...), that treats each row by itself; t is a number or has shape (B,).
Where a field is asked for, a denoiser stands for its score. With D the number of elements of a row, what is exact costs one
evaluation and D products of a vector with its Jacobian (reverse mode, ``torch.func.vjp``; in forward mode every operation with a
constant costs a call of Python); Hutchinson's estimate takes ``probes`` of them, with random signs v: ``E v^T J v = tr J``
(Hutchinson, 1990). All results can be differentiated.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import torch
from torch import Tensor
from torch.func import vjp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from polyak.core import checks, integrators
from polyak.generate.evaluate import HALF, MODEL, Model
from polyak.generate.process import GRIDS, Generators, Process
from polyak.generate.process.path import TIME, one_for_each_row

__all__ = ["divergence", "log_likelihood"]

Field = Callable[[Tensor, Any], Any]  # (x, t) -> a tensor of x's shape, or a Prediction, of which the score is meant
MOST = 4096  # elements of a row, beyond which nothing is exact: it would take as many evaluations
_ROOM = 2**22  # elements of the tangents that go through a field at once

FIELD = checks.Function("a field (x, t) -> tensor, or a denoiser", 2)
POTENTIAL = checks.Function("a function (x, t) -> one number for each row", 2)
STATE = checks.Tensor(floating=True, least_ndim=2)
PROCESS = checks.Instance(Process, words="a Process of Gaussian noise (an instance, not the class)")
METHOD = checks.Choice("exact", "hutchinson")
PROBES = checks.Integer(1, 1_000_000)
STEPS = checks.Integer(1, 1_000_000)
_TRACE = dict(method=METHOD, probes=PROBES, generator=checks.generator | None)


@checks.arguments(field=FIELD, x=STATE, t=TIME, **_TRACE)
def divergence(
    field: Field,
    x: Tensor,
    t: float | Tensor,
    *,
    method: Literal["exact", "hutchinson"] = "exact",
    probes: int = 1,
    generator: torch.Generator | None = None,
) -> Tensor:
    """``sum_i d f_i / d x_i`` in each row.

    Args:
        field: of which; a denoiser stands for its score.
        x: (B, ...). t: a number or (B,).
        method: "exact" takes D products with the Jacobian; "hutchinson" takes ``probes``, and is unbiased.
        probes, generator: of "hutchinson".

    Returns:
        (B,), differentiable in x and in the field's parameters.

    Raises:
        ValueError: a field whose values have not x's shape; rows of more than 4096 elements for "exact".

    Example:
        >>> divergence(lambda x, t: -x, torch.ones(2, 3), 0.5)
        tensor([-3., -3.])
    """
    one_for_each_row(t, x)
    return trace(lambda y: value(field, y, t), x, directions(x, method, probes, generator))[1]


@checks.arguments(
    denoiser=MODEL, process=PROCESS, x=STATE, **_TRACE, steps=STEPS, grid=checks.Choice(*GRIDS),
    prior=checks.Function("a function x -> log density", 1) | None,
)  # fmt: skip
def log_likelihood(
    denoiser: Model,
    process: Process,
    x: Tensor,
    method: Literal["exact", "hutchinson"] = "exact",
    *,
    probes: int = 1,
    steps: int = 100,
    grid: str = "logsnr",
    prior: Callable[[Tensor], Tensor] | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """``log p(x)`` of the law that the probability-flow ODE makes at t_min (Song et al., arXiv 2011.13456, equation 39).

    ``log p(x) = log p_T(x_T) + int div v dt`` along ``dx/dt = v = alpha' x0_hat + sigma' eps_hat`` from x at t_min to x_T at
    t_max, by the classical Runge-Kutta method of fourth order.

    Args:
        x: (B, ...), points at t_min (for data, add the noise of t_min).
        method, probes: as for :func:`divergence`; random signs are drawn once for the whole path.
        steps, grid: of the integration, four evaluations a step. ``grid="time"`` where lam is infinite at an end.
        prior: the log density at t_max, (B, ...) -> (B,). Default: that of ``prior_std * N(0, I)``, which the law at t_max only
            resembles: with data of unit size under VP() the likelihood is off by some hundredths.

    Returns:
        (B,), in nats, differentiable. The path of x in half precision is followed in float32.

    Raises:
        ValueError: a process whose noise is not Gaussian or that is not the denoiser's; rows of more than 4096 elements for
            "exact".
    """
    check_process(denoiser, process)
    kind = x.dtype
    denoiser, x = widened(denoiser, x)
    tangents = directions(x, method, probes, generator)
    times = process.check_times(process.grid(steps, grid))[::-1]

    def slope(state: Tensor, t: float) -> Tensor:
        flow, div = trace(lambda y: velocity(denoiser, y, t), state[:, :-1].reshape(x.shape), tangents)
        return torch.cat([flow.flatten(1), div[:, None]], 1)

    state = torch.cat([x.flatten(1), x.new_zeros(len(x), 1)], 1)
    state = solution(slope, state, times)
    end = state[:, :-1].reshape(x.shape)
    if prior is None:
        std = process.prior_std
        constant = _size(x) * math.log(2 * math.pi * std**2) / 2
        first = -(end / std).flatten(1).square().sum(1) / 2 - constant
    else:
        first = prior(end)
        if not isinstance(first, Tensor) or first.shape != x.shape[:1]:
            raise ValueError(f"prior must return a tensor of shape ({len(x)},), got {checks.shown(first)}")
    return (first + state[:, -1]).to(kind)


def value(field: Field, x: Tensor, t: Any) -> Tensor:
    """What a field says at (x, t); of a denoiser, the score."""
    said = field(x, t)
    said = said if isinstance(said, Tensor) else getattr(said, "score", None)
    if not isinstance(said, Tensor) or said.shape != x.shape:
        got = tuple(said.shape) if isinstance(said, Tensor) else "no tensor"
        raise ValueError(f"field must return a tensor of x's shape {tuple(x.shape)}, got {got}")
    return said


def scalar(potential: Callable[[Tensor, Any], Tensor], x: Tensor, t: Any) -> Tensor:
    """What a potential says at (x, t), (B,)."""
    said = potential(x, t)
    if not isinstance(said, Tensor) or said.shape not in ((len(x),), (len(x), 1)):
        got = tuple(said.shape) if isinstance(said, Tensor) else type(said).__name__
        raise ValueError(f"potential must return shape ({len(x)},) or ({len(x)}, 1), got {got}")
    return said.reshape(len(x))


def velocity(denoiser: Model, x: Tensor, t: float) -> Tensor:
    """``dx/dt`` of the probability-flow ODE."""
    said: Any = denoiser(x, t)
    if not isinstance(getattr(said, "flow", None), Tensor):
        raise TypeError(f"denoiser must return a Prediction, got {type(said).__name__}; wrap it in Denoiser(...)")
    return said.flow


def widened(denoiser: Model, x: Tensor) -> tuple[Model, Tensor]:
    """x in float32 where it is of half precision, and the denoiser for it, which is still asked in x's own type."""
    if x.dtype not in HALF:
        return denoiser, x

    def asked(y: Tensor, t: float) -> Any:
        said: Any = denoiser(y.to(x.dtype), t)
        return said.rebase(y) if hasattr(said, "rebase") else said

    return asked, x.float()


def check_process(denoiser: Any, process: Process) -> None:
    """ValueError unless the noise is Gaussian and the process is the denoiser's own, where it has one."""
    if not process.is_gaussian:
        raise ValueError(f"process must have Gaussian noise, got {process!r}")
    own = getattr(denoiser, "process", process)
    if own != process:
        raise ValueError(f"process must be the denoiser's own, {own!r}, got {process!r}")


def _size(x: Tensor) -> int:
    return math.prod(x.shape[1:])


def check_size(x: Tensor) -> int:
    """The number of elements of a row; ValueError where there are too many for what is exact."""
    size = _size(x)
    if size > MOST:
        raise ValueError(f"x must have at most {MOST} elements in a row for an exact Jacobian, got {size}")
    return size


def signs(x: Tensor, count: int, generator: Generators | None) -> Tensor:
    """Random signs, (count, *x.shape); a list of generators draws each row from its own."""
    if isinstance(generator, Sequence):
        if len(generator) != len(x):
            raise ValueError(f"generator must be one, or one for each of the {len(x)} rows, got {len(generator)}")
        rows = [signs(x[i : i + 1], count, one) for i, one in enumerate(generator)]
        return torch.cat(rows, 1) if rows else x.new_empty(count, *x.shape)
    source = x.device if generator is None else generator.device
    bits = torch.randint(2, (count, *x.shape), generator=generator, device=source)
    return bits.to(x).mul_(2).sub_(1)


def directions(x: Tensor, method: str, probes: int, generator: torch.Generator | None) -> Tensor | None:
    """What :func:`trace` is taken along: None for all unit vectors, or random signs (probes, *x.shape)."""
    if method == "hutchinson":
        return signs(x, probes, generator)
    check_size(x)
    return None


def trace(f: Callable[[Tensor], Tensor], x: Tensor, along: Tensor | None) -> tuple[Tensor, Tensor]:
    """``(f(x), tr J)``, x's shape and (B,); with directions v given, ``mean_v v^T J v`` in place of the trace."""
    total = x.new_zeros(len(x))
    said, pulled = pullbacks(f, x, along)
    for tangents, products in pulled:
        total = total + (products * tangents).flatten(2).sum((0, 2))
    return said, total if along is None else total / len(along)


def jacobian(f: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    """``(f(x), J)``, x's shape and (B, D, D), ``J[b, i, j] = d f_i / d x_j`` in row b."""
    size = check_size(x)
    said, pulled = pullbacks(f, x, None)
    rows = [products.flatten(2) for _, products in pulled]
    return said, torch.cat(rows).movedim(0, 1) if rows else x.new_zeros(len(x), size, size)


def pullbacks(
    f: Callable[[Tensor], Tensor], x: Tensor, along: Tensor | None
) -> tuple[Tensor, Iterator[tuple[Tensor, Tensor]]]:
    """f(x), and some directions v after others with their ``J^T v``, (n, *x.shape) each; all unit vectors where None is given."""
    with smooth_attention() if torch.is_grad_enabled() else nullcontext():
        try:
            said, back, *_ = vjp(f, x)
        except RuntimeError as error:
            error.add_note(
                "A field is differentiated by torch.func.vjp: without gradient checkpointing, and without an "
                "autograd.Function that lacks setup_context."
            )
            raise
    return said, _pulled(lambda v: back(v)[0], x, along)


def smooth_attention() -> AbstractContextManager[Any]:
    """Within it attention has second derivatives, which fused kernels have not."""
    return sdpa_kernel(SDPBackend.MATH)


def _pulled(back: Callable[[Tensor], Tensor], x: Tensor, along: Tensor | None) -> Iterator[tuple[Tensor, Tensor]]:
    def one_by_one(directions: Tensor) -> Tensor:
        return torch.stack([back(v) for v in directions])

    size = _size(x)
    count = size if along is None else len(along)
    step = max(1, _ROOM // max(1, x.numel()))
    batched: Callable[[Tensor], Tensor] = vmap(back)
    for a in range(0, count if x.numel() else 0, step):
        if along is None:
            rows = torch.arange(a, min(a + step, size), device=x.device)[:, None] == torch.arange(size, device=x.device)
            some = rows.to(x.dtype).reshape(-1, 1, *x.shape[1:]).expand(-1, *x.shape)
        else:
            some = along[a : a + step]
        try:
            products = batched(some)
        except RuntimeError:  # not all kernels are for vmap: those of channels-last convolutions are not
            batched = one_by_one
            products = batched(some)
        yield some, products


def solution(
    f: Callable[[Tensor, float], Tensor],
    x: Tensor,
    times: Sequence[float],
    heard: Callable[[float, Tensor], None] | None = None,
) -> Tensor:
    """``x`` at the last of the times, by the classical Runge-Kutta method; ``heard`` is told of each step's end."""
    low, high = min(times), max(times)
    for s, t in itertools.pairwise(times):
        # s + (t - s) may miss t by a rounding, and with it the process's range.
        x = integrators.rk4(lambda y, at: f(y, min(max(at, low), high)), x, s, t - s)
        if heard is not None:
            heard(t, x)
    return x
