"""Small convolutional networks with batch normalization, and measures of their weights: for claims about scale invariance."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from polyak.claims._problems import Problem, _evaluation, digit_images, seeded
from polyak.lab import data
from polyak.optim.adamp import effective_step

TRAINING, VALIDATION = 0.4, 0.2  # shares of the images; the rest is the test's


def digits_cnn(
    seed: int,
    device: str = "cpu",
    *,
    widths: str = "16-16-32-32",
    side: int = 14,
    batch: int = 128,
    images: int = 10_000,
) -> tuple[Problem, int]:
    """Handwritten digits, classified by convolutions with batch normalization, a mean over positions and a linear layer.

    Args:
        seed: of the initial weights and of the order of the data.
        device: where it is trained.
        widths: channels of the 3 x 3 convolutions. After the second the resolution is halved.
        side: to which MNIST's 28 x 28 pixels are averaged down. Without MNIST: scikit-learn's digits, 8 x 8.
        batch: images in a step.
        images: how many are used at most, of MNIST's test set.

    Returns:
        The problem, and the steps in an epoch. Its results are ``train_loss``, ``validation_loss``, ``test_loss`` and
        ``accuracy``, the test's.
    """
    x, y = _images(side, device)
    x, y = x[:images], y[:images]
    first, second = round(TRAINING * len(x)), round((TRAINING + VALIDATION) * len(x))
    x = (x - x[:first].mean()) / x[:first].std()
    parts = {"train": slice(first), "validation": slice(first, second), "test": slice(second, None)}
    model = seeded(lambda: _cnn([int(width) for width in widths.split("-")], 10), seed, device)

    def epochs() -> Iterator[tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(seed)
        while True:
            for part in torch.randperm(first, generator=generator).to(device).split(batch):
                if len(part) == batch:
                    yield x[part], y[part]

    def loss(pair: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(model(pair[0]), pair[1])

    def results() -> dict[str, float]:
        found: dict[str, float] = {}
        with _evaluation(model):
            for name, part in parts.items():
                logits = torch.cat([model(some) for some in x[part].split(500)])
                found[f"{name}_loss"] = F.cross_entropy(logits, y[part]).item()
                found["accuracy"] = (logits.argmax(1) == y[part]).double().mean().item()  # the test's comes last
        return found

    return Problem(model=model, batches=epochs(), loss=loss, results=results), first // batch


def _images(side: int, device: str) -> tuple[Tensor, Tensor]:
    """Images ``(n, 1, side, side)`` in an order drawn once for all, and their labels."""
    try:
        images, labels = data.mnist()
    except data.DataError:
        x, y = digit_images(device)
        return x.view(-1, 1, 8, 8), y
    order = np.random.default_rng(0).permutation(len(images))
    x = torch.from_numpy(images[order]).to(device, torch.float32)[:, None] / 255
    return F.adaptive_avg_pool2d(x, side), torch.from_numpy(labels[order]).to(device)


def _cnn(widths: Sequence[int], classes: int) -> nn.Module:
    layers: list[nn.Module] = []
    for i, (before, after) in enumerate(pairwise((1, *widths))):
        layers += [nn.Conv2d(before, after, 3, padding=1, bias=False), nn.BatchNorm2d(after), nn.ReLU()]
        if i == 1:
            layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], classes))


class Convolutions:
    """The convolutions' weights in training: how they grow, and how far a step turns them.

    Args:
        model: with its initial weights.
        optimizer: AdamP, SGDP, or their relatives of torch.optim; with its base rate.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self._weights = [m.weight for m in model.modules() if isinstance(m, nn.Conv2d)]
        self._initial = [w.detach().norm() for w in self._weights]
        self._optimizer = optimizer
        self._base = optimizer.param_groups[0]["lr"]

    def measure(self) -> dict[str, float]:
        """``growth``: ``||w|| / ||w_0||``; ``turn``: the angle of a step at the base rate; means over the convolutions."""
        growths = [w.detach().norm() / initial for w, initial in zip(self._weights, self._initial, strict=True)]
        angles = effective_step(self._optimizer)
        factor = self._optimizer.param_groups[0]["lr"] / self._base
        turns = torch.stack([angles[w] for w in self._weights]) / factor
        return {"growth": torch.stack(growths).mean().item(), "turn": turns.mean().item()}
