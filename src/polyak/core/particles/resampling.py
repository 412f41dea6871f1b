"""Resampling: from log-weights to ancestors."""

from __future__ import annotations

import torch
from torch import Tensor

from polyak.core import checks
from polyak.core.particles._drawing import REGISTRY, drawn
from polyak.core.particles._values import LOGW, ON_COLLAPSE, prepared

SCHEMES = tuple(REGISTRY)
SCHEME = checks.Choice(*SCHEMES)


@checks.arguments(
    logw=LOGW, n=checks.Integer(1) | None, scheme=SCHEME, generator=checks.generator | None,
    u=checks.Tensor(floating=True) | None, on_collapse=ON_COLLAPSE, check=checks.optional_flag,
)  # fmt: skip
def resample(
    logw: Tensor,
    n: int | None = None,
    *,
    scheme: str = "systematic",
    generator: torch.Generator | None = None,
    u: Tensor | None = None,
    on_collapse: str = "error",
    check: bool | None = None,
) -> Tensor:
    """Ancestors, (*batch, n) int64, drawn with ``E[#{k: ancestor_k = i}] = n W_i``.

    | scheme | offspring of a particle | shape of ``u`` |
    | --- | --- | --- |
    | "multinomial" | independent draws | (*batch, n) |
    | "stratified" | within 2 of ``n W`` | (*batch, n) |
    | "systematic" | ``n W`` rounded down or up | (*batch) |
    | "residual" | ``n W`` rounded down, and multinomial draws of the rest | (*batch, n) |
    | "residual-systematic" | the same, with systematic draws | (*batch) |
    | "ssp" | ``n W`` rounded down or up, negatively associated | (*batch, N - 1) |
    | "killing" | particles stay with probability ``W / max W``, or are drawn | (*batch, 2 n), n = N |

    Args:
        logw: log-weights, shape (*batch, N); systems are independent. -inf is never drawn; a single +inf always is.
        n: how many; default: N.
        scheme: see above. Systematic is the cheapest, ssp is consistent whatever the order of the particles; both, as stratified,
            leave equal weights as they are.
        generator: where the uniforms come from, on logw's device.
        u: the uniforms in [0, 1) themselves; then nothing is random. Those of "killing" are n to survive and n to be drawn by.
        on_collapse: what a system is where all are -inf: "error", or "uniform", equal weights.
        check: look for NaN and collapse. Default: on the CPU. Where nobody looks, such systems have equal weights.

    Returns:
        Ancestors, sorted for all schemes but "residual" and "killing"; with ``u`` "multinomial" has u's order.

    Raises:
        ValueError: with the systems' indices: NaN, two of +inf, all -inf; no particles; logw of integers; u of another shape, or
            outside [0, 1); a generator of another device.

    Sources: Douc, Cappe and Moulines, 2005; Gerber, Chopin and Whiteley, 2019, algorithm 3 (ssp); Del Moral, 2004 (killing).
    """
    values = prepared("logw", logw.detach() if logw.requires_grad else logw, on_collapse, check)
    return drawn(values, logw.shape[-1] if n is None else n, scheme, generator, u, check)
