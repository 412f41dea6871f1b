"""Tokens: draws that keep the tail of their law, the law that draws with rounded noise have, and which positions to hide.

A token of law p can be drawn as ``argmax_v log p_v + g_v`` with ``g_v = -log(-log u_v)``, the Gumbel-max trick. Where u is a
multiple of 2^-24, as single precision draws it, g never exceeds 16.64: rare tokens all but vanish. Zheng et al. (arXiv
2409.02908, section 5) found that published samplers of masked diffusion do so. :func:`categorical` does not, and
:func:`truncated_gumbel_law` says what law such a sampler has.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from polyak.core import checks
from polyak.generate.process.path import Generators

__all__ = [
    "categorical",
    "gumbel_bound",
    "random_subsets",
    "rounded_gumbel_law",
    "spread",
    "stratified_counts",
    "token_log_probs",
    "truncated_gumbel_law",
    "uniform",
]

_BITS = {torch.float16: 11, torch.bfloat16: 8, torch.float32: 24, torch.float64: 53}  # of torch.rand's uniforms
_PRECISION = checks.Choice("f64", "f32", "two_level")


@checks.arguments(
    shape=checks.Each(checks.Integer(0)), generator=checks.generators | None, dtype=checks.dtype,
    device=checks.device | None,
)  # fmt: skip
def uniform(
    shape: Sequence[int],
    *,
    generator: Generators | None = None,
    dtype: torch.dtype = torch.float64,
    device: torch.device | str | None = None,
) -> Tensor:
    """Uniform on [0, 1) of a shape, drawn on the generator's device; a list of generators draws one row each."""
    shape = tuple(shape)
    if isinstance(generator, Sequence):
        if not shape or len(generator) != shape[0]:
            raise ValueError(f"generator must be one, or one for each row of shape {shape}, got {len(generator)}")
        rows = [uniform((1, *shape[1:]), generator=one, dtype=dtype, device=device) for one in generator]
        return torch.cat(rows) if rows else torch.empty(shape, dtype=dtype, device=device)
    source = device if generator is None else generator.device
    drawn = torch.rand(shape, generator=generator, dtype=dtype, device=source)
    return drawn if generator is None or device is None else drawn.to(device)


@checks.arguments(
    logits=checks.Tensor(floating=True, least_ndim=1), precision=_PRECISION, generator=checks.generators | None
)
def categorical(logits: Tensor, *, precision: str = "f64", generator: Generators | None = None) -> Tensor:
    """One token of each row, with probability proportional to ``exp(logits)``.

    Args:
        logits: (..., V), any floating-point type; -inf rules a token out. Drawn from at "precision", whatever their type.
        precision: "f64" inverts the distribution function in float64 (one uniform a row); "two_level" is Gumbel-max in float32
            with noise from two draws, of 48 bits near the top, for devices without float64; "f32" is Gumbel-max with noise of
            24 bits, as published samplers draw it: its law is not that of the logits.
        generator: one, or one for each row of the first dimension.

    Returns:
        (...), int64.

    Raises:
        ValueError: no token, or on the CPU logits that are NaN, +inf, or -inf in a whole row. (Elsewhere they are not looked at,
            which would wait for the device.)
    """
    if not logits.shape[-1]:
        raise ValueError(f"logits must have at least one token in the last dimension, got shape {tuple(logits.shape)}")
    if isinstance(generator, Sequence) and logits.ndim < 2:
        raise ValueError("generator must be one where logits have no rows")
    if logits.device.type == "cpu" and logits.numel():
        top = logits.amax(-1)  # NaN where any is
        if not bool(top.isfinite().all()):
            bad = top[~top.isfinite()][0].item()
            what = {math.inf: "+inf", -math.inf: "-inf for every token of a row"}.get(bad, "NaN")
            raise ValueError(f"logits must be numbers or -inf, and not all -inf, got {what}")
    if precision == "f64":
        return _by_inversion(logits, generator)
    shape, device, values = logits.shape, logits.device, logits.float()
    if precision == "f32":
        u = uniform(shape, generator=generator, dtype=torch.float32, device=device)
        race = u.clamp_min_(2.0**-25).log_().neg_()  # 0 is drawn, too
    else:
        coarse, fine = (uniform(shape, generator=generator, dtype=torch.float32, device=device) for _ in range(2))
        u = coarse.add_(fine.add_(2.0**-25), alpha=2.0**-24).clamp_max_(1 - 2.0**-24)
        race = u.neg_().log1p_().neg_()
    return (values - race.log_()).argmax(-1)


def _by_inversion(logits: Tensor, generator: Generators | None) -> Tensor:
    """The first token whose cumulated weight exceeds ``u`` of the total: its own weight is above 0 then."""
    values = logits.double()
    weights = (values - values.amax(-1, keepdim=True)).exp_().cumsum(-1)
    total = weights[..., -1:]
    u = uniform(total.shape, generator=generator, device=logits.device)
    # Below the total even where a device's u may be 1.
    threshold = torch.minimum(u * total, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(weights, threshold, right=True)[..., 0]


@checks.arguments(dtype=checks.dtype)
def gumbel_bound(dtype: torch.dtype) -> float:
    """The largest ``-log(-log u)`` of a uniform u that torch draws in a type: 16.6355 in float32, 36.737 in float64."""
    if dtype not in _BITS:
        raise ValueError(f"dtype must be one of {', '.join(map(str, _BITS))}, got {dtype}")
    return -math.log(-math.log1p(-(2.0 ** -_BITS[dtype])))


_LAW = checks.Tensor(floating=True, least_ndim=1)
_BITS_OF = checks.Integer(1, 200)


@checks.arguments(p=_LAW, bits=_BITS_OF, bound=checks.Number(-700, 700) | None)
def truncated_gumbel_law(p: Tensor, bits: int = 24, *, bound: float | None = None) -> Tensor:
    """The law of ``argmax log p + g`` for Gumbel noise g conditioned on ``g <= M`` (arXiv 2409.02908, proposition 5.1).

    With p sorted upwards, ``S_i = sum_{j >= i} p_j``, ``e = exp(-M)`` and ``p_0 = 0``:

        P(n) = p_n sum_{i <= n} exp((K - i + 1) e) / S_i [exp(-S_i e / p_i) - exp(-S_i e / p_{i-1})]

    Args:
        p: (..., K), not negative; normalised here.
        bits: of the uniforms: M is their largest noise, ``-log(-log(1 - 2^-bits))``.
        bound: M itself.

    Returns:
        The law, p's shape and type; computed in float64.
    """
    law = _normalised(p)
    e = -math.log1p(-(2.0**-bits)) if bound is None else math.exp(-bound)
    ordered, order = law.sort(-1)
    tail = ordered.flip(-1).cumsum(-1).flip(-1)
    rank = torch.arange(law.shape[-1], 0, -1, dtype=torch.float64, device=law.device)  # K - i + 1
    before = torch.cat([torch.zeros_like(ordered[..., :1]), ordered[..., :-1]], -1)
    # Both exponents are e (K - i + 1 - S_i / p) <= e: exp of the sum does not overflow where its parts would.
    here, there = ((e * (rank - tail / q)).exp() for q in (ordered, before))
    beta = torch.where(ordered > 0, (here - there) / tail, 0.0)
    made = torch.where(ordered > 0, ordered * beta.cumsum(-1), 0.0)
    return torch.empty_like(made).scatter_(-1, order, made).to(p.dtype)


@checks.arguments(p=_LAW, bits=_BITS_OF, reveal=checks.Number(0, 1, "(]"))
def rounded_gumbel_law(p: Tensor, bits: int = 24, *, reveal: float = 1e-3) -> Tensor:
    """The probability of each token that Gumbel-max with rounded noise gives beside an entry of weight ``1 - reveal``.

    :func:`truncated_gumbel_law` conditions the noise. A generator rounds it: the race ``-log u`` of u on a grid of ``2^-bits`` is
    rounded up to a multiple of about ``e = 2^-bits``, and 0 comes as the last. A token of weight ``w = reveal p`` is then ahead of
    the other entry, which is met after a time of exponential law, with probability ``e / (exp(e / w) - 1)`` in place of w.
    Derived here, to first order in ``reveal``, and in the tokens' competition with each other.

    Args:
        p: (..., K), not negative; normalised here.
        bits: of the uniforms.
        reveal: the weight of all tokens together, small.

    Returns:
        p's shape and type; the sum is the probability that a token is drawn at all.
    """
    weight, e = reveal * _normalised(p), 2.0**-bits
    return (e / torch.expm1(e / weight)).to(p.dtype)


def _normalised(p: Tensor) -> Tensor:
    if not p.numel():
        raise ValueError(f"p must not be empty, got shape {tuple(p.shape)}")
    law = p.double()
    total = law.sum(-1, keepdim=True)
    if not bool(((law >= 0).all(-1, keepdim=True) & (total > 0) & total.isfinite()).all()):
        raise ValueError("p must hold probabilities: finite, none below 0, not all 0 in a row")
    return law / total


@checks.arguments(
    logits=checks.Tensor(floating=True, least_ndim=1), mask_id=checks.Integer(0), temperature=checks.non_negative,
    top_p=checks.Number(0, 1, "(]") | None,
)  # fmt: skip
def token_log_probs(logits: Tensor, mask_id: int, *, temperature: float = 1.0, top_p: float | None = None) -> Tensor:
    """``log p`` of tokens from a network's logits: never the mask, which has weight 0 whatever the network says.

    Args:
        logits: (..., V); of less than single precision they are taken to it.
        mask_id: its column is ruled out; V where it has none.
        temperature: logits are divided by it; 0 leaves the largest alone (the first of equals).
        top_p: keep the fewest most probable tokens whose probabilities sum to at least this.

    Returns:
        (..., V), float32, or float64 where logits are.
    """
    values = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if mask_id < values.shape[-1]:
        values = values.clone()
        values.select(-1, mask_id).fill_(-math.inf)
    if temperature == 0:
        best = values.argmax(-1, keepdim=True)
        return torch.full_like(values, -math.inf).scatter_(-1, best, 0.0)
    if temperature != 1:
        values = values / temperature
    log_p = values.log_softmax(-1)
    if top_p is None or top_p == 1:
        return log_p
    ordered, order = log_p.sort(-1, descending=True)
    p = ordered.exp()
    kept = p.cumsum(-1) - p < top_p  # what comes before is not enough
    kept = torch.empty_like(kept).scatter_(-1, order, kept)
    return log_p.masked_fill(~kept, -math.inf).log_softmax(-1)


@checks.arguments(counts=checks.Tensor(ndim=1), length=checks.Integer(1), generator=checks.generators | None)
def random_subsets(counts: Tensor, length: int, *, generator: Generators | None = None) -> Tensor:
    """For each row a subset of ``counts[b]`` positions of ``length``, uniform among those: (B, length), true in the subset."""
    if counts.is_floating_point() or counts.is_complex():
        raise ValueError(f"counts must be integers, got {counts.dtype}")
    keys = uniform((len(counts), length), generator=generator, device=counts.device)
    return keys.argsort(-1).argsort(-1) < counts[:, None]


@checks.arguments(
    batch=checks.Integer(0), length=checks.Integer(1), generator=checks.generator | None, device=checks.device | None
)
def stratified_counts(
    batch: int,
    length: int,
    *,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """A number of positions for each row: each uniform on 1 .. length, and together evenly spread. (batch,), int64."""
    return (spread(batch, generator=generator, device=device) * length).long().clamp_(max=length - 1) + 1


@checks.arguments(batch=checks.Integer(0), generator=checks.generator | None, device=checks.device | None)
def spread(batch: int, *, generator: torch.Generator | None = None, device: torch.device | str | None = None) -> Tensor:
    """Points ``(U + b / batch) mod 1``: each uniform on [0, 1), and together evenly spread. (batch,), float64."""
    one = uniform((1,), generator=generator, device=device)
    return (one + torch.arange(batch, dtype=torch.float64, device=one.device) / max(batch, 1)).frac_()
