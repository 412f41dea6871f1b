"""What is minimized: the error of consistency, the cross entropy of conditionals, and the divergence from an energy's law."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from polyak.core import checks
from polyak.generate.marginalization.chain import PersistentChain
from polyak.generate.marginalization.model import MarginalizationModel, log_probabilities
from polyak.generate.marginalization.values import VALUES, configurations, random_ranks, widened

MODEL = checks.Instance(MarginalizationModel, words="a MarginalizationModel")
_CHAIN = checks.Instance(PersistentChain, words="a PersistentChain")
_FALL = 10.0  # nats below the least finite log_f, for what is impossible


@checks.arguments(model=MODEL, x=VALUES, generator=checks.generator | None, log_z=checks.scalar)
def consistency_loss(
    model: MarginalizationModel, x: Tensor, generator: torch.Generator | None = None, *, log_z: float | Tensor = 0.0
) -> Tensor:
    """``D mean e^2 + (f(nothing) - log_z)^2``: how far marginals and conditionals are from belonging together (equation 4).

    For each row a random order sigma and a step d are drawn, and

        e = f(x_{sigma(<d)}) + log p_phi(x_{sigma(d)} | x_{sigma(<d)}) - f(x_{sigma(<=d)})

    Both values of f have gradients. Of the whole only the mean is unbiased: D times one step's error stands for the sum over
    steps.

    Args:
        x: complete configurations, [B, D].
        generator: of orders and steps, on x's device.
        log_z: what f(nothing) is drawn to. It shifts f, and with it no probability; a parameter here is learned.

    Returns:
        A scalar.
    """
    return _tied(model, _batch(model, x), log_z, generator)[0]


def _tied(
    model: MarginalizationModel, x: Tensor, log_z: float | Tensor, generator: torch.Generator | None, *more: Tensor
) -> tuple[Tensor, Tensor]:
    """The loss of consistency, and f of more configurations, in one call of the network."""
    if isinstance(log_z, Tensor) and log_z.dtype == torch.bool:
        raise ValueError("log_z must be a number, got a tensor of bool")
    rows, length = x.shape
    rank = random_ranks(rows, length, x.device, generator)
    step = torch.randint(length, (rows, 1), device=x.device, generator=generator)
    before, after = torch.where(rank < step, x, 0), torch.where(rank <= step, x, 0)
    f, logits = model.heads(torch.cat([before, after, x.new_zeros(1, length), *more]), rows)
    f_before, f_after, f_nothing, f_more = f.split([rows, rows, 1, len(f) - 2 * rows - 1])
    error = f_before + log_probabilities(logits, (rank == step).int().argmax(1), x) - f_after
    return length * error.square().mean() + (f_nothing - log_z).square().sum(), f_more


@checks.arguments(model=MODEL, x=VALUES, generator=checks.generator | None)
def data_loss(model: MarginalizationModel, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """The any-order cross entropy of the conditionals: an unbiased estimate of ``-E_sigma sum_d log p_phi``, a scalar.

    A random subset is known, of a size that is uniform in 0 .. D - 1, and all M positions that are not are predicted:
    ``-(D / M) sum_j log p_phi(x_j | x_S)``, the mean over rows. No configuration has a higher mean log p than its negative,
    in nats. It trains the conditionals alone: the marginals then follow by :func:`consistency_loss`.

    Args:
        x: complete configurations, [B, D].
        generator: of subsets, on x's device.
    """
    x = _batch(model, x)
    rank = random_ranks(len(x), model.length, x.device, generator)
    known = torch.randint(model.length, (len(x), 1), device=x.device, generator=generator)
    hidden = rank >= known
    said = model.logits(torch.where(hidden, 0, x)).log_softmax(-1).gather(2, x[..., None] - 1)[..., 0]
    return -(torch.where(hidden, said, 0).sum(1) * model.length / (model.length - known[:, 0])).mean()


@checks.arguments(
    model=MODEL, log_f=checks.Function("a function x [B, D] -> log f [B]", 1), chain=_CHAIN, alpha=checks.non_negative,
    log_z=checks.scalar | None, generator=checks.generator | None,
)  # fmt: skip
def energy_loss(
    model: MarginalizationModel,
    log_f: Callable[[Tensor], Tensor],
    chain: PersistentChain,
    alpha: float = 4.0,
    *,
    log_z: float | Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """``alpha`` times the :func:`consistency_loss` on a chain's samples, plus REINFORCE for ``KL(p_theta || f / Z)`` (section 4.2).

    With ``r = f_theta(x) - log f(x)``, of which the batch's mean is taken away and by whose deviation it is divided, the second
    part is ``mean(r f_theta(x))``, r without gradient: one call of the network, where a product of conditionals needs D.

    Args:
        log_f: of configurations [B, D] with values 1 to K: the logarithm of the density, not its negative, an energy. Minus
            infinity is taken as 10 below the least finite value of the batch, with a warning (on the CPU).
        chain: whose state x is as it was last refreshed.
        alpha: the weight of consistency.
        log_z: what f(nothing) is drawn to; default D log K, which is right where all values are as likely.
        generator: of the orders of consistency, on the chain's device.

    Returns:
        A scalar.
    """
    x = chain.x
    log_z = model.length * math.log(model.num_values) if log_z is None else log_z
    tied, f = _tied(model, x, log_z, generator, x)
    with torch.no_grad():
        wanted = _densities(log_f, x).to(f)
        r = f.detach() - wanted
        r = r - r.mean()
        size = r.square().sum().div(max(len(x) - 1, 1)).sqrt()
        eps = torch.finfo(f.dtype).eps
        # Where all are equal, what is left of r is rounding, which is not to be blown up.
        rounding = 8 * eps * torch.maximum(f.detach().abs(), wanted.abs()).max()
        r = torch.where(size <= rounding, 0, r / (size + eps))
    return alpha * tied + (r * f).mean()


def _densities(log_f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    said = log_f(x)
    if not isinstance(said, Tensor) or said.shape != (len(x),) or not said.is_floating_point():
        raise ValueError(f"log_f must give a floating-point tensor of shape ({len(x)},), got {checks.shown(said)}")
    said = widened(said)
    impossible = said == -math.inf
    if x.device.type == "cpu":  # elsewhere it would wait for the device
        if wrong := int((~(said.isfinite() | impossible)).sum()):
            raise ValueError(f"log_f must be finite or minus infinity, got NaN or infinity for {wrong} of {len(x)}")
        if none := int(impossible.sum()):
            warnings.warn(f"log_f is minus infinity for {none} of {len(x)} configurations", stacklevel=3)
    least = torch.where(impossible, math.inf, said).min()
    return torch.where(impossible, torch.where(least.isfinite(), least - _FALL, 0), said)


def _batch(model: MarginalizationModel, x: Tensor) -> Tensor:
    x = configurations("x", x, model.length, model.num_values, complete=True)
    if not len(x):
        raise ValueError("x must have a row, got none")
    return x
