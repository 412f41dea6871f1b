"""What potentials are trained by: their equation, the change of images along a step, and a classifier of pairs of images."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

from polyak.core import checks
from polyak.generate import fields
from polyak.generate.potential_flows.flow import INDEX, LATENTS, PotentialFlow
from polyak.generate.potential_flows.wave import gradient, official_residual, second


@checks.arguments(
    flow=checks.Instance(PotentialFlow, words="a PotentialFlow"), generator_fn=checks.Function("a function z -> images", 1),
    z=LATENTS, k=INDEX, s=INDEX, reconstructor=checks.Function("a function (before, after) -> logits", 2) | None,
    lambda_cls=checks.non_negative, lambda_pde=checks.non_negative, generator=checks.generator | None,
    direction=checks.Choice(1, -1), probes=fields.PROBES,
)  # fmt: skip
def potential_flow_loss(
    flow: PotentialFlow,
    generator_fn: Callable[[Tensor], Tensor],
    z: Tensor,
    k: int,
    s: int,
    reconstructor: Callable[[Tensor, Tensor], Tensor] | None = None,
    lambda_cls: float = 1.0,
    lambda_pde: float = 1.0,
    generator: torch.Generator | None = None,
    *,
    direction: int = 1,
    probes: int = 1,
) -> dict[str, Tensor]:
    """One iteration's loss, for one potential k and one time s, both to be drawn anew for each iteration (algorithm 1).

    From z the walk goes ``T // 2`` steps, z_0 = z, z_1, .... With grad u short for ``grad_z u_k``,

        ic  = mean |grad u(z, 0)|^2,       pde = mean_t mean (u_tt - c_k^2 laplacian u)^2 at (z_t, t),
        jvp = mean (J_G(z_{s+1}) grad u(z_{s+1}, s + 1))^2,       cls = cross entropy of k given (G(z_{s+1}), G(z_{s+2})),
        wave = ic + pde - jvp,       loss = lambda_cls cls + lambda_pde wave.

    Args:
        flow: its ``laplacian`` says which residual is squared.
        generator_fn: G, (B, d) -> images (B, ...), in evaluation mode. It is differentiated in forward mode, or twice backwards
            where one of its operations has no such derivative.
        z: (B, d), random latents.
        k: in [0, K). s: in [0, T // 2 - 2].
        reconstructor: logits (B, K) of a pair of images, such as :class:`PairClassifier`; None leaves cls out.
        generator: of the signs of ``laplacian="hutchinson"``, of which there are ``probes``.
        direction: -1 shows the classifier the step on the mirrored walk, from 2z - z_{s+2} to 2z - z_{s+1}.

    Returns:
        "loss", "wave", "ic", "pde", "jvp" and "cls" (where there is a reconstructor): scalars; "logits" (B, K); "before" and
        "after": z_{s+1} and z_{s+2}, (B, d).

    Raises:
        ValueError: a generator whose output does not depend on z, or is not images in floating point; a time or an index out of
            range; z that is not finite.

    Warns:
        UserWarning: the generator is a module in training mode with batch norm, which mixes samples.
    """
    flow.check(k, z)
    if s > flow.half - 2:
        raise ValueError(f"s must be at most {flow.half - 2}, which is steps // 2 - 2, got {s}")
    if not len(z):
        raise ValueError(f"z must have at least one row, got shape {tuple(z.shape)}")
    _warn_of_batch_norm(generator_fn)
    # Half precision would round derivatives: autocast is for the classifier alone.
    with torch.autocast(z.device.type, enabled=False):
        path, slopes = flow.walk(k, z, flow.half)
        before, after = path[s + 1], path[s + 2]
        ic = slopes[0].square().mean()
        pde = _residual(flow, k, path[:-1], generator, probes).square().mean()
        images, change = _images(generator_fn, before, slopes[s + 1])
        moved = change.to(torch.promote_types(change.dtype, torch.float32)).square().mean()
        wave = ic + pde - moved
        parts = dict(wave=wave, ic=ic, pde=pde, jvp=moved, before=before, after=after)
        if reconstructor is None:
            return dict(loss=lambda_pde * wave, **parts)
        if direction == 1:
            pair = images, generator_fn(after)
        else:
            pair = generator_fn(2 * z - after), generator_fn(2 * z - before)
    logits = reconstructor(*pair)
    if not isinstance(logits, Tensor) or logits.shape != (len(z), flow.k):
        raise ValueError(f"reconstructor must return shape {(len(z), flow.k)}, got {checks.shown(logits)}")
    cls = F.cross_entropy(logits, torch.full((len(z),), k, device=logits.device))
    return dict(loss=lambda_cls * cls + lambda_pde * wave, cls=cls, logits=logits, **parts)


def _residual(flow: PotentialFlow, k: int, states: Tensor, generator: torch.Generator | None, probes: int) -> Tensor:
    """The residual at all states (T, B, d) of a walk at once, each at its time."""
    u, z = flow.potentials[k], states.flatten(0, 1)
    times = torch.arange(len(states), dtype=z.dtype, device=z.device)
    c2 = flow.c[k].square()
    if flow.laplacian == "official":
        return official_residual(u, z, times, c2)
    t = times.repeat_interleave(states.shape[1])
    along = fields.directions(z, "hutchinson" if flow.laplacian == "hutchinson" else "exact", probes, generator)
    return second(u, z, t) - c2 * fields.trace(gradient(u, t), z, along)[1]


def _images(generator_fn: Callable[[Tensor], Tensor], z: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """``G(z)`` and its derivative along v."""
    try:
        images, change = _forwards(generator_fn, z, v)
    except (
        RuntimeError
    ):  # an operation of G has no derivative in forward mode, or none for tensors laid out like its own
        images, change = _backwards(generator_fn, z, v)
    # Forward mode does not mind no_grad inside G, where nothing would be learned from images.
    cut = z.requires_grad and torch.is_grad_enabled() and not images.requires_grad
    if change is None or cut:
        raise ValueError(
            f"generator_fn must be differentiable: generator output does not depend on z, got {images.dtype}"
        )
    return images, change


def _forwards(generator_fn: Callable[[Tensor], Tensor], z: Tensor, v: Tensor) -> tuple[Tensor, Tensor | None]:
    """By dual numbers. (``torch.func.jvp`` would refuse a generator that counts its batches.)"""
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(_checked(generator_fn(forward_ad.make_dual(z, v)), z))


def _backwards(generator_fn: Callable[[Tensor], Tensor], z: Tensor, v: Tensor) -> tuple[Tensor, Tensor | None]:
    """``J v`` as the derivative of ``J^T w`` by w along v. (Fused attention has one derivative only.)"""
    graph = torch.is_grad_enabled()
    with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
        at = z if z.requires_grad else z.detach().requires_grad_()
        images = _checked(generator_fn(at), z)
        if not images.requires_grad:
            return images, None
        w = torch.zeros_like(images, requires_grad=True)
        pulled = torch.autograd.grad(images, at, w, create_graph=True)
        change = torch.autograd.grad(pulled, w, v, create_graph=graph)[0]
    return (images, change) if graph else (images.detach(), change.detach())


def _checked(images: Tensor, z: Tensor) -> Tensor:
    if not isinstance(images, Tensor) or images.shape[:1] != z.shape[:1]:
        raise ValueError(f"generator_fn must return {len(z)} images for {len(z)} latents, got {checks.shown(images)}")
    return images


def _warn_of_batch_norm(generator_fn: Any) -> None:
    module = generator_fn if isinstance(generator_fn, nn.Module) else getattr(generator_fn, "__self__", None)
    if isinstance(module, nn.Module) and any(
        isinstance(part, nn.modules.batchnorm._BatchNorm) and part.training for part in module.modules()
    ):
        warnings.warn(
            "generator_fn has batch norm in training mode, which mixes samples: call eval() on it", stacklevel=4
        )
