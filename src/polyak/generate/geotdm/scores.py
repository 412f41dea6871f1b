"""Scores that train a network: whether it tells samples from data, and what it learns from samples for data.

The paper's, which come from models of time series, use EqMotion; here it is a small :class:`EGTN`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from polyak.core import checks
from polyak.generate.geotdm.graphs import Inputs, graph_of
from polyak.generate.geotdm.network import EGTN, SIZE, Block, through

_PATHS = checks.Tensor(floating=True, ndim=4)
_DECLARED: dict[str, Any] = dict(
    samples=_PATHS, truth=_PATHS, h=checks.Tensor(ndim=3) | None, epochs=checks.Integer(1, 100_000), hidden=SIZE,
    lr=checks.positive, generator=checks.generator | None,
)  # fmt: skip
_BATCH, _TIMES = 128, 32
_TRAINED = 0.8  # of the data of the classifier; it is judged by the rest


class _Classifier(nn.Module):
    """The log-odds that a trajectory is a sample, the same for all that are turned or moved."""

    def __init__(self, node_dim: int, hidden: int) -> None:
        super().__init__()
        self.enter, self.block, self.read = nn.Linear(node_dim, hidden), Block(hidden, 0, _TIMES), nn.Linear(hidden, 1)

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        times = torch.arange(x.shape[-1], dtype=x.dtype, device=x.device)
        _, features = through([self.block], x.mT, self.enter(h), graph_of(Inputs(h)), times, _TIMES)
        return self.read(features).mean((1, 2, 3))


@checks.arguments(**_DECLARED)
def classification_score(
    samples: Tensor,
    truth: Tensor,
    h: Tensor | None = None,
    *,
    epochs: int = 100,
    hidden: int = 16,
    lr: float = 5e-3,
    generator: torch.Generator | None = None,
) -> float:
    """The cross entropy, in nats, of a classifier that was trained to tell samples from data; log 2 where it cannot.

    Higher is better. It is trained on four fifths of both, and judged by the rest.

    Args:
        samples, truth: as many of each, [B, N, 3, T].
        h: features of the points of both, [B, N, H]; none by default.
        epochs, hidden, lr: of the training, by Adam.
        generator: of the weights, the split and the batches, on samples' device.
    """
    h = _features(samples, truth, h)
    if samples.shape != truth.shape or len(samples) < 5:
        raise ValueError(
            f"samples must be five or more, of truth's shape {tuple(truth.shape)}, got {tuple(samples.shape)}"
        )
    order = torch.randperm(len(samples), generator=generator, device=samples.device)
    fitted, judged = order.split([n := int(_TRAINED * len(order)), len(order) - n])
    net = _made(lambda: _Classifier(h.shape[-1], hidden), samples, generator)

    def loss(rows: Tensor) -> Tensor:
        logits = torch.cat([net(x[rows], h[rows]) for x in (samples, truth)])
        labels = torch.cat([torch.ones_like(rows), torch.zeros_like(rows)]).to(logits.dtype)
        return F.binary_cross_entropy_with_logits(logits, labels)

    _fit(net, loss, fitted, epochs, lr, generator)
    with torch.no_grad():
        return loss(judged).item()


@checks.arguments(**_DECLARED)
def prediction_score(
    samples: Tensor,
    truth: Tensor,
    h: Tensor | None = None,
    *,
    epochs: int = 100,
    hidden: int = 16,
    lr: float = 5e-3,
    generator: torch.Generator | None = None,
) -> float:
    """The mean squared error, on data, of a forecast of the second half of the frames by the first that was learned from samples.

    Lower is better. Arguments as for :func:`classification_score`; numbers of graphs may differ where there is no h.
    """
    total = truth.shape[-1]
    if total < 2 or samples.shape[1:] != truth.shape[1:] or not len(samples) or not len(truth):
        raise ValueError(
            f"samples and truth must have the same points and two or more frames, got {tuple(samples.shape)}, {tuple(truth.shape)}"
        )
    given = total // 2
    told = _features(samples, truth, h)
    others = told if h is not None else truth.new_ones(*truth.shape[:2], 1)
    net = _made(
        lambda: EGTN(told.shape[-1], 0, hidden, layers=1, ref_layers=1, future=total - given), samples, generator
    )

    def loss(x: Tensor, h: Tensor) -> Tensor:
        return F.mse_loss(net.reference(x[..., :given], h), x[..., given:])

    rows = torch.arange(len(samples), device=samples.device)
    _fit(net, lambda rows: loss(samples[rows], told[rows]), rows, epochs, lr, generator)
    with torch.no_grad():
        return loss(truth, others).item()


def _features(samples: Tensor, truth: Tensor, h: Tensor | None) -> Tensor:
    for name, x in (("samples", samples), ("truth", truth)):
        if x.shape[-2] != 3 or not x.numel() or not bool(x.isfinite().all()):
            raise ValueError(f"{name} must be finite, of shape [B, N, 3, T], got {checks.shown(x)}")
    if h is None:
        return samples.new_ones(*samples.shape[:2], 1)
    if samples.shape[:2] != h.shape[:2] or truth.shape[:2] != h.shape[:2] or not h.shape[2]:
        raise ValueError(f"h must have shape {(*samples.shape[:2], 'H')}, and truth as many, got {tuple(h.shape)}")
    return h.to(samples.dtype)


def _made(build: Callable[[], Any], like: Tensor, generator: torch.Generator | None) -> Any:
    """A network whose weights follow from the generator."""
    seed = torch.randint(2**62, (), generator=generator, device=like.device).item()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(seed))
        return build().to(like.device, like.dtype)


def _fit(
    net: nn.Module, loss: Callable[[Tensor], Tensor], rows: Tensor, epochs: int, lr: float, generator: Any
) -> None:
    optimizer = torch.optim.Adam(net.parameters(), lr)
    for _ in range(epochs):
        for some in rows[torch.randperm(len(rows), generator=generator, device=rows.device)].split(_BATCH):
            optimizer.zero_grad(set_to_none=True)
            loss(some).backward()
            optimizer.step()
