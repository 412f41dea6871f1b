"""By how much a model misses the Fokker-Planck equation: of a potential, and of a field."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.func import grad, vjp

from polyak.core import checks
from polyak.generate.fields import (
    FIELD,
    METHOD,
    POTENTIAL,
    PROBES,
    PROCESS,
    STATE,
    Field,
    check_process,
    check_size,
    directions,
    scalar,
    signs,
    smooth_attention,
    trace,
    value,
)
from polyak.generate.process import Process, expand, wide
from polyak.generate.process.path import TIME, one_for_each_row

Potential = Callable[[Tensor, Any], Tensor]  # (x, t) -> (B,) or (B, 1)
Laplacian = Literal["exact", "hutchinson"]
TRACE = dict(laplacian=METHOD, probes=PROBES, generator=checks.generator | None)
_FLAT = (nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.RReLU, nn.Hardtanh, nn.Threshold)  # without a second derivative


@checks.arguments(potential=POTENTIAL, process=PROCESS, x=STATE, t=TIME, **TRACE)
def log_fp_residual(
    potential: Potential,
    process: Process,
    x: Tensor,
    t: float | Tensor,
    laplacian: Laplacian = "exact",
    probes: int = 1,
    generator: torch.Generator | None = None,
) -> Tensor:
    """``R = u_t + div f + f.grad u - g^2/2 (lap u + |grad u|^2)`` of a potential u: zero everywhere if e^u solves the equation.

    It sees the normalization of e^u, which a score does not: of ``u + c(t)`` it is ``R + c'(t)``.

    Args:
        potential: u, a function or module ``(x, t) -> (B,)`` or ``(B, 1)`` with second derivatives; it is given t as (B,).
        process: of Gaussian noise, ``dx = f x dt + g dW``.
        x: (B, ...). t: a number or (B,), where the noise is positive and the drift finite.
        laplacian: "exact" takes D products with the Hessian, D the number of elements of a row, at most 4096; "hutchinson" takes
            ``probes``, and is unbiased.
        probes, generator: of "hutchinson".

    Returns:
        (B,), in 1 / time; differentiable in x and in the potential's parameters.

    Raises:
        ValueError: a potential of another shape, or made of ReLUs; noise that is not Gaussian; t where the equation is singular.

    Example:
        >>> u = lambda x, t: -x.square().sum(1)  # OU's stationary law, up to a constant
        >>> log_fp_residual(u, OU(), torch.ones(2, 3), 0.5)
        tensor([0., 0.])
    """
    check_smooth("potential", potential)
    check_process(potential, process)
    at = row_times(process, x, t)
    return score_and_residual(potential, process, x, at, spatial(x, laplacian, probes, generator))[1]


@checks.arguments(score_fn=FIELD, process=PROCESS, x=STATE, t=TIME, **TRACE)
def score_fp_residual(
    score_fn: Field,
    process: Process,
    x: Tensor,
    t: float | Tensor,
    laplacian: Laplacian = "exact",
    probes: int = 1,
    generator: torch.Generator | None = None,
) -> Tensor:
    """``r = s_t + grad[f.s - g^2/2 (div s + |s|^2)]`` of a score s: the gradient of R where s is that of a potential.

    Lai et al., "FP-Diffusion", ICML 2023, arXiv 2210.04296, equation 7, with the drift linear in x.

    Args:
        score_fn: s, a function ``(x, t) -> x's shape`` with second derivatives; a denoiser stands for its score.
        process, x, t, laplacian, probes, generator: as for :func:`log_fp_residual`; what is estimated is ``div s``.

    Returns:
        x's shape; differentiable in x and in the parameters. All derivatives are in reverse mode.

    Raises:
        ValueError: as for :func:`log_fp_residual`.
    """
    check_smooth("score_fn", score_fn)
    check_process(score_fn, process)
    wide_t = row_times(process, x, t)
    f, g2, at = expand(process.drift(wide_t), x), process.diffusion2(wide_t).to(x.dtype), wide_t.to(x.dtype)
    along = directions(x, laplacian, probes, generator)

    def inner(y: Tensor) -> Tensor:
        s, div = trace(lambda z: value(score_fn, z, at), y, along)
        return ((f * y * s).flatten(1).sum(1) - g2 / 2 * (div + s.flatten(1).square().sum(1))).sum()

    # s_t by reverse mode twice: forward mode is missing in parts of which image networks are made.
    with smooth_attention():
        pull: Any = vjp(lambda tau: value(score_fn, x, tau), at)[1]
        push: Any = vjp(lambda w: pull(w)[0], torch.zeros_like(x))[1]
        return push(torch.ones_like(at))[0] + grad(inner)(x)


def check_smooth(name: str, model: Any) -> None:
    """ValueError where a model is made of activations whose second derivative is zero."""
    model = getattr(model, "model", model) if not isinstance(model, nn.Module) else model
    model = getattr(model, "__self__", model)  # of a method, as a potential's score is
    for part in model.modules() if isinstance(model, nn.Module) else ():
        if isinstance(part, _FLAT):
            raise ValueError(
                f"{name} must be smooth, got one with {type(part).__name__}: ReLU potentials have no Laplacian; "
                "use a smooth activation"
            )


def row_times(process: Process, x: Tensor, t: float | Tensor) -> Tensor:
    """A time for each row, (B,), in float64; ValueError where the equation is singular (of tensors on the CPU alone)."""
    one_for_each_row(t, x)
    if isinstance(t, Tensor):
        at = t.to(x.device, wide(x.device)).expand(len(x))
        fits = at.device.type != "cpu" or bool(
            regular(process, at).all()
        )  # elsewhere the look would wait for the device
    else:
        at = torch.full((len(x),), process.check_time("t", t), dtype=wide(x.device), device=x.device)
        fits = process.sigma(t) > 0 and math.isfinite(process.drift(t))
    if not fits:
        raise ValueError(
            f"t must be where noise is positive and the drift finite, not {checks.shown(t)} of {process!r}"
        )
    return at


def regular(process: Process, t: Tensor) -> Tensor:
    """Where the equation's coefficients are finite, and so are scores."""
    return (process.sigma(t) > 0) & process.drift(t).isfinite()


def spatial(x: Tensor, laplacian: str, probes: int, generator: torch.Generator | None) -> Tensor:
    """Directions in (x, t), (n, B, D + 1), whose mean of ``v^T H v`` is the Laplacian in x: time's part is zero."""
    if laplacian == "hutchinson":
        return torch.nn.functional.pad(signs(x, probes, generator).flatten(2), (0, 1))
    size = check_size(x)
    axes = size**0.5 * torch.eye(size, size + 1, dtype=x.dtype, device=x.device)
    return axes[:, None].expand(size, len(x), size + 1)


def score_and_residual(
    potential: Potential, process: Process, x: Tensor, at: Tensor, along: Tensor
) -> tuple[Tensor, Tensor]:
    """``(grad u, R)``, x's shape and (B,). Time is one more coordinate, so that one pass has u_t and grad u."""

    def slope(z: Tensor) -> Tensor:
        return grad(lambda w: scalar(potential, w[:, :-1].reshape(x.shape), w[:, -1]).sum())(z)

    with smooth_attention():
        both, lap = trace(slope, torch.cat([x.flatten(1), at.to(x.dtype)[:, None]], 1), along)
    s, u_t = both[:, :-1], both[:, -1]
    f, g2 = process.drift(at).to(x.dtype), process.diffusion2(at).to(x.dtype)
    transported = f * (s.shape[1] + (x.flatten(1) * s).sum(1))
    return s.reshape(x.shape), u_t + transported - g2 / 2 * (lap + s.square().sum(1))
