"""Training denoisers: one loss and one loop for every process and every dialect of a network's output.

    >>> loss = denoising_loss(Denoiser(network, Flow(), "flow"), images, generator=generator).mean()

A time is drawn for each sample, noise is added, and what the network says is compared with what it should have said:

- "edm" (Karras et al., arXiv 2206.00364, equation 8): ``ln s ~ N(-1.2, 1.2^2)`` for ``s = sigma / alpha``, and
  ``(s^2 + sd^2) / (s sd)^2 |x0_hat - x0|^2``, which is one unit of the network's own output;
- else t is uniform in [t_min, t_max], and the loss is ``|output - target|^2`` in the network's own dialect (Ho et al., arXiv
  2006.11239, equation 14; for "flow" the conditional flow matching of Lipman et al., arXiv 2210.02747, equation 14);
- "score": in the noise that the score stands for, ``|sigma score + eps|^2``.

Only the process's ``perturb`` says what noise is, so that processes without Gaussian noise (PFGM++) are trained alike.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from polyak.core import checks
from polyak.generate.prediction import DIALECT, Denoiser, edm_loss_weight
from polyak.generate.process import Process, expand, standard_normal, wide
from polyak.generate.process.path import PATH

Net = TypeVar("Net", bound=nn.Module)
P_MEAN, P_STD = -1.2, 1.2  # of ln s (EDM, table 1)


@checks.arguments(
    denoiser=checks.Instance(Denoiser, words="a Denoiser"), x0=checks.Tensor(floating=True, least_ndim=2),
    t=checks.Tensor(floating=True, ndim=1) | None, p_mean=checks.real, p_std=checks.non_negative,
    generator=checks.Instance(torch.Generator, words="a torch.Generator") | None,
)  # fmt: skip
def denoising_loss(
    denoiser: Denoiser,
    x0: Tensor,
    *,
    t: Tensor | None = None,
    p_mean: float = P_MEAN,
    p_std: float = P_STD,
    generator: torch.Generator | None = None,
) -> Tensor:
    """How far a network is from what it should say, for each sample: the mean over its elements.

    Args:
        denoiser: with gradients, as :func:`polyak.generate.sample` takes it.
        x0: data, shape (B, ...).
        t: times of shape (B,); drawn where they are left out.
        p_mean, p_std: of ``ln s`` that is drawn for "edm".
        generator: of times and noise, on x0's device.

    Returns:
        Shape (B,).
    """
    process = denoiser.process
    assert isinstance(process, Process)
    if t is None:
        t = _draw(denoiser, len(x0), x0.device, p_mean, p_std, generator)
    elif t.shape != (len(x0),):
        raise ValueError(f"t must have shape ({len(x0)},), one for each row of x0, got {tuple(t.shape)}")
    x, noise = process.perturb(x0, t, generator=generator)
    said = denoiser(x, t)
    if denoiser.prediction == "edm":
        weight = edm_loss_weight(process.sigma_hat(t), denoiser.sigma_data)
        return (said.x0 - x0).square().flatten(1).mean(1) * torch.as_tensor(weight).to(x0.dtype)
    if denoiser.prediction in ("epsilon", "score"):
        wanted, got = noise, said.eps
    elif denoiser.prediction == "sample":
        wanted, got = x0, said.output
    else:
        # Of the noise itself: that of x, (x - alpha x0) / sigma, is lost to rounding near the data.
        at = t.to(wide(t.device))
        flow = denoiser.prediction == "flow"
        a, b = (process.dalpha(at), process.dsigma(at)) if flow else (-process.sigma(at), process.alpha(at))
        wanted, got = expand(a, x0) * x0 + expand(b, x0) * noise, said.output
    return (got - wanted).square().flatten(1).mean(1)


def _draw(denoiser: Denoiser, n: int, device: Any, mean: float, std: float, generator: Any) -> Tensor:
    process: Any = denoiser.process
    if denoiser.prediction == "edm":
        log_s = mean + std * standard_normal((n,), generator=generator, dtype=torch.float64, device=device)
        return process.t_of_lam(-log_s).clamp(process.t_min, process.t_max)
    part = torch.rand(n, generator=generator, dtype=torch.float64, device=device)
    return process.t_min + (process.t_max - process.t_min) * part


@checks.arguments(
    network=checks.Instance(nn.Module, words="a module (x, t) or (x, t, y) -> output"),
    images=checks.Tensor(floating=True, least_ndim=2), process=PATH, prediction=DIALECT,
    labels=checks.Tensor(ndim=1) | None, none=checks.Integer(0) | None, drop=checks.fraction,
    steps=checks.Integer(1, 10**9), batch=checks.Integer(1, 10**7), lr=checks.positive, ema=checks.Number(0, 1, "[)"),
    sigma_data=checks.positive, generator=checks.Instance(torch.Generator, words="a torch.Generator") | None,
    progress=checks.Function("a function (step, loss)", 2) | None,
)  # fmt: skip
def train_denoiser(
    network: Net,
    images: Tensor,
    process: Process,
    prediction: str = "epsilon",
    *,
    labels: Tensor | None = None,
    none: int | None = None,
    drop: float = 0.1,
    steps: int = 2000,
    batch: int = 128,
    lr: float = 2e-3,
    ema: float = 0.995,
    sigma_data: float = 0.5,
    generator: torch.Generator | None = None,
    progress: Callable[[int, float], None] | None = None,
) -> Net:
    """Train a network to denoise, with Adam, a warmup over 5 % of the steps and a cosine to zero.

    Args:
        network: changed in place; called with (x, label of t), and with the class where there are ``labels``.
        images: the data, shape (n, ...), on the network's device.
        process, prediction, sigma_data: as for :class:`Denoiser`.
        labels: (n,), the class of each; ``none`` is told in its place with probability ``drop``, so that the network can be
            asked without a condition (default: the network's ``classes``, else the largest label plus one).
        steps, batch, lr: of Adam, with betas (0.9, 0.99).
        ema: retention of the weights' average; 0 for none.
        generator: of batches, times and noise, on the images' device.
        progress: told the step and its loss, fifty times or somewhat more; of fewer steps, at each.

    Returns:
        The network with averaged weights, in evaluation mode; a copy.
    """
    if not images.numel():
        raise ValueError(f"images must not be empty, got shape {tuple(images.shape)}")
    nothing = 0 if labels is None else _none_of(labels, len(images), getattr(network, "classes", None), none)
    kept = AveragedModel(network, multi_avg_fn=get_ema_multi_avg_fn(ema)) if ema else None
    optimizer = torch.optim.Adam(network.parameters(), lr, betas=(0.9, 0.99))
    warm = max(1, steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda i: min(1.0, (i + 1) / warm) * 0.5 * (1 + math.cos(math.pi * i / steps))
    )
    network.train()
    for step in range(steps):
        rows = torch.randint(len(images), (batch,), generator=generator, device=images.device)
        told = ()
        if labels is not None:
            lost = torch.rand(batch, generator=generator, device=images.device) < drop
            told = (torch.where(lost, nothing, labels[rows]),)
        denoiser = Denoiser(lambda x, t, told=told: network(x, t, *told), process, prediction, sigma_data=sigma_data)
        loss = denoising_loss(denoiser, images[rows], generator=generator).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if kept is not None:
            kept.update_parameters(network)
        if progress is not None and step % max(1, steps // 50) == 0:
            progress(step, loss.item())
    return copy.deepcopy(cast(Net, network if kept is None else kept.module)).eval()


def _none_of(labels: Tensor, images: int, classes: Any, none: int | None) -> int:
    """The class that means none, for labels that are some; ``classes`` is how many the network knows, where it says so."""
    if len(labels) != images:
        raise ValueError(f"labels must have one class for each of the {images} images, got {len(labels)}")
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise ValueError(f"labels must be integers, got {labels.dtype}")
    low, high = (int(end) for end in labels.aminmax())
    known = classes if isinstance(classes, int) else high + 1
    if low < 0 or high >= known:
        raise ValueError(f"labels must be in [0, {known}), got {low if low < 0 else high}")
    return known if none is None else none
