"""Losses whose minimisers are an interpolant's fields."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from polyak.core import checks
from polyak.generate.interpolants.fields import INTERPOLANT, NETWORK, Network, checked
from polyak.generate.interpolants.path import Interpolant
from polyak.generate.process import wide

KINDS = ("b", "v", "s", "eta")


@checks.arguments(
    kind=checks.Choice(*KINDS), net=NETWORK, x0=checks.Tensor(floating=True, least_ndim=1) | None,
    x1=checks.Tensor(floating=True, least_ndim=1), interpolant=INTERPOLANT, generator=checks.generator | None,
    antithetic=checks.flag, t=checks.Tensor(floating=True, ndim=1) | None, mse=checks.flag,
)  # fmt: skip
def interpolant_loss(
    kind: str,
    net: Network,
    x0: Tensor | None,
    x1: Tensor,
    interpolant: Interpolant,
    generator: torch.Generator | None = None,
    antithetic: bool = True,
    *,
    t: Tensor | None = None,
    mse: bool = False,
) -> Tensor:
    """The loss of one field for each pair: the mean over pairs and times is least where the network is the field.

    With ``t ~ U[0, 1]``, ``z ~ N(0, I)``, at ``x_t = I + gamma z`` (arXiv 2303.08797, equations 2.13 to 2.19)

    - "b": ``|b|^2 / 2 - (dI/dt + gamma' z) . b``;  "v": ``|v|^2 / 2 - dI/dt . v``;
    - "s": ``|s|^2 / 2 + z . s / gamma``;  "eta": ``|eta|^2 / 2 - z . eta``.

    Of a one-sided path z is x0, gamma is a, and "v" is "b". Products and norms are sums over a sample's elements.

    Args:
        kind: which field net says.
        net: (x, t) of shapes (B, ...) and (B,), of x's shape; in its training mode, with gradients.
        x0, x1: pairs, (B, ...), coupled as they are given; x0 is None on the mirror path, and may be None on a one-sided one,
            whose x0 is N(0, I) whatever x1 is. (Noise that is coupled with the data is the path "linear" with gamma "zero".)
        antithetic: the mean over ``I + gamma z`` and ``I - gamma z`` (one call of net with 2B rows). With the brownian gamma
            "b" and "s" have without it a variance that grows as 1 / t and 1 / (1 - t) at the ends.
        t: times, (B,); drawn where they are left out.
        mse: ``|net - target|^2 / 2`` instead, which is the same up to a constant: a number to report.

    Returns:
        Shape (B,).
    """
    path = interpolant
    if path.latent_free and kind in ("s", "eta"):
        raise ValueError(f"kind must be 'b' or 'v' without noise, got {kind!r} with gamma='zero'")
    if path.mirror and kind == "v":
        raise ValueError("kind must not be 'v' on the mirror path, where v is 0")
    x0, z = path.ends(x0, x1, None, generator)
    if t is None:
        t = torch.rand(len(x1), generator=generator, dtype=wide(x1.device), device=x1.device)
        tiny = torch.finfo(t.dtype).eps
        t = t.clamp(tiny, 1 - tiny)
    elif t.shape != (len(x1),):
        raise ValueError(f"t must have shape ({len(x1)},), one for each row of x1, got {tuple(t.shape)}")
    mean = path.coefficient("b", t, x1) * x1
    if x0 is not None and not path.one_sided:
        mean = mean + path.coefficient("a", t, x1) * x0
    noise = path.coefficient("latent", t, x1) * z
    fixed, moving = _target(kind, path, t, x0, x1, z)
    told = t.to(x1.dtype)
    if not antithetic or path.latent_free:
        x = mean + noise
        return _loss(checked("net", net(x, told), x), _sum(fixed, moving), mse)
    x = torch.cat([mean + noise, mean - noise])
    plus, minus = checked("net", net(x, torch.cat([told, told])), x).chunk(2)
    return (_loss(plus, _sum(fixed, moving), mse) + _loss(minus, _sum(fixed, moving, -1), mse)) / 2


def _target(kind: str, path: Interpolant, t: Tensor, x0: Any, x1: Tensor, z: Tensor) -> tuple[Any, Any]:
    """What the network should say: a part that does not depend on the latent's sign, and one that turns with it."""
    if kind == "eta":
        return None, z
    if kind == "s":
        return None, -path.coefficient("over_latent", t, x1) * z
    if path.mirror:
        fixed = None
    else:
        fixed = path.coefficient("db", t, x1) * x1 if path.one_sided else path.dt(t, x0, x1)
    if path.latent_free or (kind == "v" and not path.one_sided):
        return fixed, None
    return fixed, path.coefficient("dlatent", t, x1) * z


def _sum(fixed: Tensor | None, moving: Tensor | None, sign: int = 1) -> Any:
    if moving is None:
        return fixed
    turned = moving if sign > 0 else -moving
    return turned if fixed is None else fixed + turned


def _loss(said: Tensor, target: Tensor, mse: bool) -> Tensor:
    if mse:
        return _summed((said - target).square()) / 2
    return _summed(said * (said / 2 - target))


def _summed(x: Tensor) -> Tensor:
    """Over each sample's elements."""
    return x.reshape(len(x), math.prod(x.shape[1:])).sum(1)
