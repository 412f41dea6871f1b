"""Which potential moved an image: a classifier of pairs, and how well few pairs teach one."""

from __future__ import annotations

from importlib import import_module

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from polyak.core import checks

_LENET = 32  # pixels of a side, which three convolutions of 5 x 5 with two poolings leave one of


class PairClassifier(nn.Module):
    """Logits of K classes from two images, one before and one after an edit, joined along channels in this order.

    Args:
        k: K.
        channels: C, of one image.
        network: "lenet", for small images: convolutions 5 x 5 to 6, 16 and 120 channels with batch norm, two poolings, the mean
            over pixels, and two linear layers. "resnet18" is torchvision's, for two images of three channels.
        padding: of LeNet's convolutions; 2 for images of less than 32 pixels.

    Raises:
        ImportError: torchvision, for "resnet18", is not installed.
    """

    @checks.arguments(
        k=checks.Integer(2, 1_000_000), channels=checks.Integer(1, 4096), network=checks.Choice("lenet", "resnet18"),
        padding=checks.Integer(0, 2),
    )  # fmt: skip
    def __init__(self, k: int, channels: int = 3, network: str = "lenet", padding: int = 0) -> None:
        super().__init__()
        self.k, self.channels, self.padding, self.lenet = k, channels, padding, network == "lenet"
        if self.lenet:
            self.features = nn.Sequential(
                *_convolution(2 * channels, 6, padding), nn.MaxPool2d(2),
                *_convolution(6, 16, padding), nn.MaxPool2d(2),
                *_convolution(16, 120, padding),
            )  # fmt: skip
            self.head = nn.Sequential(nn.Linear(120, 84), nn.BatchNorm1d(84), nn.ReLU(), nn.Linear(84, k))
            return
        try:
            self.features = import_module("torchvision.models").resnet18(weights=None, num_classes=k)
        except ImportError as error:
            raise ImportError('network="resnet18" is torchvision\'s: pip install torchvision') from error
        self.features.conv1 = nn.Conv2d(2 * channels, 64, 7, stride=2, padding=3, bias=False)
        nn.init.kaiming_normal_(self.features.conv1.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, before: Tensor, after: Tensor) -> Tensor:
        """Logits (B, K) of images (B, C, height, width)."""
        if before.shape != after.shape or before.ndim != 4 or before.shape[1] != self.channels:
            got = f"{tuple(before.shape)} and {tuple(after.shape)}"
            raise ValueError(f"before and after must have shape (B, {self.channels}, height, width), got {got}")
        pair = torch.cat([before, after], 1)
        if not self.lenet:
            return self.features(pair)
        least = 4 if self.padding == 2 else _LENET - 14 * self.padding
        if min(before.shape[2:]) < least:
            raise ValueError(
                f"before must have at least {least} pixels a side with padding={self.padding}, got {tuple(before.shape)}"
            )
        return self.head(self.features(pair).mean((2, 3)))


def _convolution(given: int, made: int, padding: int) -> tuple[nn.Module, ...]:
    return nn.Conv2d(given, made, 5, padding=padding), nn.BatchNorm2d(made), nn.ReLU()


@checks.arguments(
    pairs=checks.Tensor(floating=True, ndim=5), labels=checks.Tensor(ndim=1), train_fraction=checks.Number(0, 1, "()"),
    classifier=checks.Instance(nn.Module, words="a module (before, after) -> logits") | None, steps=checks.Integer(1, 10**9),
    batch=checks.Integer(2, 10**7), lr=checks.positive, generator=checks.generator | None,
)  # fmt: skip
def variation_predictability(
    pairs: Tensor,
    labels: Tensor,
    train_fraction: float = 0.02,
    *,
    classifier: nn.Module | None = None,
    steps: int = 300,
    batch: int = 64,
    lr: float = 1e-3,
    generator: torch.Generator | None = None,
) -> float:
    """How well edits can be told apart after few examples (Zhu, Xu, Tao, "Learning Disentangled Representations with Latent
    Variation Predictability", ECCV 2020): the accuracy on the other pairs of a classifier that was trained on some.

    Args:
        pairs: images before and after an edit, (N, 2, C, height, width).
        labels: which edit, integers from 0 on, (N,).
        train_fraction: of the pairs, to train with; drawn at random.
        classifier: a module (before, after) -> logits, which is trained; by default a new :class:`PairClassifier`.
        steps, batch, lr: of Adam.
        generator: of the split, the batches and the new classifier's weights.

    Returns:
        The share of right answers, in [0, 1].

    Raises:
        ValueError: labels that are not one whole number for each pair; no pair left to train or to test with; pairs that are not
            finite.
    """
    if (
        labels.shape != pairs.shape[:1]
        or labels.is_floating_point()
        or labels.is_complex()
        or labels.dtype == torch.bool
    ):
        raise ValueError(f"labels must be {len(pairs)} whole numbers, one for each pair, got {checks.shown(labels)}")
    if pairs.shape[1] != 2:
        raise ValueError(f"pairs must have shape (N, 2, C, height, width), got {tuple(pairs.shape)}")
    count = round(train_fraction * len(pairs))
    if not 0 < count < len(pairs):
        raise ValueError(
            f"train_fraction must leave pairs to train and to test with, got {train_fraction:g} of {len(pairs)}"
        )
    if int(labels.min()) < 0:
        raise ValueError(f"labels must be 0 or more, got {int(labels.min())}")
    if not bool(pairs.isfinite().all()):
        raise ValueError("pairs must be finite, got NaN or infinity in them")
    labels = labels.to(pairs.device, torch.long)
    device = pairs.device if generator is None else generator.device
    order = torch.randperm(len(pairs), generator=generator, device=device).to(pairs.device)
    train, test = order[:count], order[count:]
    judge = _judge(pairs, labels, generator) if classifier is None else classifier
    optimizer = torch.optim.Adam(judge.parameters(), lr)
    judge.train()
    with torch.enable_grad():
        for _ in range(steps):
            rows = train[torch.randint(count, (batch,), generator=generator, device=device).to(pairs.device)]
            loss = F.cross_entropy(judge(pairs[rows, 0], pairs[rows, 1]), labels[rows])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
    judge.eval()
    with torch.no_grad():
        told = torch.cat([judge(*pairs[rows].unbind(1)).argmax(1) for rows in test.split(1024)])
    return (told == labels[test]).double().mean().item()


def _judge(pairs: Tensor, labels: Tensor, generator: torch.Generator | None) -> nn.Module:
    """A new classifier, whose weights follow from the generator."""
    classes = max(2, int(labels.max()) + 1)
    padding = 2 if min(pairs.shape[3:]) < _LENET else 0
    if generator is None:
        return PairClassifier(classes, pairs.shape[2], padding=padding).to(pairs)
    seed = int(torch.randint(2**31, (1,), generator=generator, device=generator.device))
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        return PairClassifier(classes, pairs.shape[2], padding=padding).to(pairs)
