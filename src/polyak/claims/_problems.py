"""The small problems that claims about optimizers share: real data, small models, seconds on one core.

A :class:`Problem` is made from a seed alone (initial weights, order of the data), so that all arms of one seed meet the same.
This module imports torch: a claim imports it inside its trial function.
"""

from __future__ import annotations

import math
import os
import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from polyak.core.schedules import Cosine, Schedule, Warmup
from polyak.lab import data
from polyak.lab.claim import Diverged, Measurement, measure

TEST_DIGITS = 360  # a fifth, drawn once for all


@dataclass(frozen=True, kw_only=True)
class Problem:
    """A model to be trained.

    Attributes:
        model: with its initial weights.
        batches: the training batches, without end; drawn from the seed.
        loss: a batch's training loss, of one element.
        results: metrics of the model as it is, each taken over all of its data in evaluation mode.
        watched: those of them that are cheap enough to be taken on the way.
        accumulate: how many batches make one step.
    """

    model: nn.Module
    batches: Iterator[Any]
    loss: Callable[[Any], Tensor]
    results: Callable[[], Mapping[str, float]]
    watched: Callable[[], Mapping[str, float]] = dict
    accumulate: int = 1


def warmup_cosine(steps: int, *, warmup: float = 0.1, start: float | None = None, end: float = 0.0) -> Schedule:
    """Factors of the base rate: linear from ``start`` over the first ``warmup`` of all ``steps``, then half a cosine to ``end``."""
    first = round(warmup * steps)
    return Warmup(Cosine(1.0, end, max(steps - first, 1)), first, start)


def decay_matrices(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Param groups that decay matrices, and neither biases nor gains of normalization."""
    params = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in params if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in params if p.dim() < 2], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def train(
    problem: Problem, optimizer: torch.optim.Optimizer, *, steps: int, schedule: Schedule, points: int = 20
) -> Iterator[Measurement]:
    """Train, and measure ``train_loss`` on the way (the mean over the steps since the last point) and the results at the end.

    What a claim does to gradients it does in ``optimizer.register_step_pre_hook``.

    Raises:
        Diverged: the training loss is not finite.
    """
    bases = [group["lr"] for group in optimizer.param_groups]
    recorded = {math.ceil(steps * (i + 1) / points) for i in range(points)}
    problem.model.train()
    total, count = 0.0, 0
    for step in range(steps):
        factor = schedule(step)
        for group, base in zip(optimizer.param_groups, bases, strict=True):
            group["lr"] = base * factor
        optimizer.zero_grad()
        for _ in range(problem.accumulate):
            loss = problem.loss(next(problem.batches)) / problem.accumulate
            loss.backward()
            total += loss.detach()
        optimizer.step()
        count += 1
        if step + 1 in recorded:
            mean = float(total) / count
            if not math.isfinite(mean):
                raise Diverged(f"training loss {mean} at step {step + 1}")
            yield measure({"step": step + 1}, train_loss=mean, **problem.watched())
            total, count = 0.0, 0
    yield Measurement(values=dict(problem.results()))


# -- models ----------------------------------------------------------------------------------------------------------------


class Block(nn.Module):
    """A transformer's block, normalized before each half; ``causal`` attends to no later position."""

    mask: Tensor

    def __init__(self, dim: int, heads: int, expansion: int, length: int, *, causal: bool) -> None:
        super().__init__()
        self.heads, self.scale = heads, (dim // heads) ** -0.5
        self.before_attention, self.before_mlp = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.mlp = nn.Sequential(nn.Linear(dim, expansion * dim), nn.GELU(), nn.Linear(expansion * dim, dim))
        mask = torch.full((length, length), -math.inf).triu(1) if causal else torch.zeros(())
        self.register_buffer("mask", mask, persistent=False)
        self.causal = causal

    def forward(self, x: Tensor) -> Tensor:
        """``(batch, length, dim)`` to the same."""
        batch, length, dim = x.shape
        heads = self.qkv(self.before_attention(x)).view(batch, length, 3, self.heads, dim // self.heads)
        q, k, v = heads.permute(2, 0, 3, 1, 4)
        # On these sizes plain products are faster than the CPU's fused attention.
        scores = (q * self.scale) @ k.transpose(-1, -2)
        if self.causal:
            scores = scores + self.mask
        x = x + self.out((scores.softmax(-1) @ v).transpose(1, 2).reshape(batch, length, dim))
        return x + self.mlp(self.before_mlp(x))


class ViT(nn.Module):
    """A vision transformer of patches: linear embedding, learned positions, mean over positions, linear head."""

    def __init__(self, patch: int, tokens: int, classes: int, *, dim: int, depth: int, heads: int, expansion: int):
        super().__init__()
        self.embed = nn.Linear(patch, dim)
        self.positions = nn.Parameter(0.02 * torch.randn(tokens, dim))
        self.blocks = nn.Sequential(*(Block(dim, heads, expansion, tokens, causal=False) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Patches ``(batch, tokens, patch)`` to logits ``(batch, classes)``."""
        return self.head(self.norm(self.blocks(self.embed(x) + self.positions)).mean(1))


class GPT(nn.Module):
    """A language model: token and learned position embeddings, causal blocks, linear head."""

    def __init__(self, vocabulary: int, context: int, *, dim: int, depth: int, heads: int, expansion: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, dim)
        self.positions = nn.Parameter(torch.randn(context, dim) / dim**0.5)
        nn.init.normal_(self.embed.weight, std=dim**-0.5)
        self.blocks = nn.Sequential(*(Block(dim, heads, expansion, context, causal=True) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, vocabulary)

    def forward(self, tokens: Tensor) -> Tensor:
        """``(batch, context)`` to logits of each next token ``(batch, context, vocabulary)``."""
        return self.head(self.norm(self.blocks(self.embed(tokens) + self.positions)))


def dense(*widths: int, activation: Callable[[], nn.Module]) -> nn.Sequential:
    """Linear layers of these widths, with the activation between them."""
    layers: list[nn.Module] = []
    for width, following in pairwise(widths):
        layers += [nn.Linear(width, following), activation()]
    return nn.Sequential(*layers[:-1])


def seeded(make: Callable[[], nn.Module], seed: int, device: str) -> nn.Module:
    """A model with initial weights drawn from the seed on the CPU, and the global generator as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make().to(device)


# -- problems --------------------------------------------------------------------------------------------------------------


def digits_vit(
    seed: int,
    device: str = "cpu",
    *,
    dim: int = 32,
    depth: int = 2,
    heads: int = 4,
    expansion: int = 2,
    patch: int = 2,
    batch: int = 128,
    images: str = "digits",
) -> Problem:
    """8 x 8 digits (or "mnist": its test set, a fifth held out) as patches, classified by a small ViT; epochs of full batches."""
    x, y = digit_images(device) if images == "digits" else mnist_images(device)
    test = TEST_DIGITS if images == "digits" else len(x) // 5
    side = round(x.shape[1] ** 0.5) // patch
    x = (
        _standardized(x, test)
        .view(-1, side, patch, side, patch)
        .transpose(2, 3)
        .reshape(-1, side * side, patch * patch)
    )
    model = seeded(
        lambda: ViT(patch * patch, side * side, 10, dim=dim, depth=depth, heads=heads, expansion=expansion),
        seed,
        device,
    )
    return _classification(model, x, y, batch, seed, test)


def digits_mlp(seed: int, device: str = "cpu", *, hidden: int = 128, batch: int = 128) -> Problem:
    """8 x 8 digits, classified by a network 64-hidden-10."""
    x, y = digit_images(device)
    model = seeded(lambda: dense(64, hidden, 10, activation=nn.ReLU), seed, device)
    return _classification(model, _standardized(x), y, batch, seed)


def digits_autoencoder(seed: int, device: str = "cpu") -> Problem:
    """The training digits through 64-100-50-12-50-100-64 with tanh; full batch, mean squared error per pixel."""
    x, _ = digit_images(device)
    inside, outside = x[:-TEST_DIGITS], x[-TEST_DIGITS:]
    model = seeded(lambda: dense(64, 100, 50, 12, 50, 100, 64, activation=nn.Tanh), seed, device)

    def forever() -> Iterator[Tensor]:
        while True:
            yield inside

    def loss(batch: Tensor) -> Tensor:
        return F.mse_loss(model(batch), batch)

    def results() -> dict[str, float]:
        with _evaluation(model):
            return {"train_loss": loss(inside).item(), "test_loss": loss(outside).item()}

    return Problem(model=model, batches=forever(), loss=loss, results=results)


def char_lm(
    seed: int,
    device: str = "cpu",
    *,
    dim: int = 48,
    depth: int = 2,
    heads: int = 4,
    expansion: int = 2,
    context: int = 64,
    batch: int = 16,
    windows: int = 256,
) -> Problem:
    """The next character of a text, by a small GPT, from windows drawn at random from its first nine tenths.

    The results are nats per character: over ``windows`` evenly spaced windows of what was trained on, and of the last tenth.
    """
    tokens, vocabulary = _characters()
    tokens = torch.from_numpy(tokens).to(device)
    edge = len(tokens) * 9 // 10
    model = seeded(
        lambda: GPT(vocabulary, context, dim=dim, depth=depth, heads=heads, expansion=expansion), seed, device
    )
    reach = torch.arange(context + 1, device=device)

    def drawn() -> Iterator[Tensor]:
        generator = torch.Generator().manual_seed(seed)
        while True:
            yield tokens[torch.randint(edge - context, (batch, 1), generator=generator).to(device) + reach]

    def loss(window: Tensor) -> Tensor:
        return F.cross_entropy(model(window[:, :-1]).flatten(0, 1), window[:, 1:].flatten())

    def spaced(first: int, last: int) -> float:
        starts = torch.linspace(first, last - context - 1, windows, device=device).long()[:, None]
        return sum(loss(tokens[part + reach]).item() * len(part) for part in starts.split(64)) / windows

    def results() -> dict[str, float]:
        with _evaluation(model):
            return {"train_loss": spaced(0, edge), "test_loss": spaced(edge, len(tokens))}

    return Problem(model=model, batches=drawn(), loss=loss, results=results)


def imagenet_deit(
    seed: int, device: str, *, model: str, batch: int, micro_batch: int, workers: int
) -> tuple[Problem, int]:
    """ImageNet-1k with DeiT's augmentation (RandAugment, mixup, cutmix, erasing) and smoothing, by timm; steps in an epoch.

    The gradients of ``batch // micro_batch`` of the loader's batches make one step. The set is looked for in the folder
    ``imagenet/train`` and ``imagenet/validation`` of POLYAK_DATA, then on the hub.

    Raises:
        DataError: timm is not installed, or the set is not at hand.
    """
    return _imagenet(
        seed, device, model, batch, micro_batch, workers,
        network=dict(drop_path_rate=0.1),
        training=dict(auto_augment="rand-m9-mstd0.5-inc1", re_prob=0.25, re_mode="pixel", color_jitter=0.3),
        validation=dict(crop_pct=0.9),
        mixed=dict(mixup_alpha=0.8, cutmix_alpha=1.0, label_smoothing=0.1, num_classes=1000),
        interpolation="bicubic",
    )  # fmt: skip


def imagenet_plain(
    seed: int, device: str, *, model: str, batch: int, micro_batch: int, workers: int
) -> tuple[Problem, int]:
    """ImageNet-1k with random crops and flips alone, as convolutional networks are compared on it; else as above."""
    return _imagenet(
        seed, device, model, batch, micro_batch, workers,
        network={}, training=dict(color_jitter=0.0), validation=dict(crop_pct=0.875), mixed=None,
        interpolation="bilinear",
    )  # fmt: skip


def _imagenet(
    seed: int,
    device: str,
    model: str,
    batch: int,
    micro_batch: int,
    workers: int,
    *,
    network: Mapping[str, Any],
    training: Mapping[str, Any],
    validation: Mapping[str, Any],
    mixed: Mapping[str, Any] | None,
    interpolation: str,
) -> tuple[Problem, int]:
    try:
        timm, loaders = import_module("timm"), import_module("timm.data")
    except ImportError as error:
        raise data.DataError("ImageNet at the paper's scale needs timm: pip install timm datasets") from error
    torch.manual_seed(seed)  # timm's loaders and mixing draw from the global generators
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002
    net = timm.create_model(model, num_classes=1000, **network).to(device)
    folder = Path(os.environ.get(data.VARIABLE, ""), "imagenet")
    where = {"name": "", "root": str(folder)} if folder.is_dir() else {"name": "hfds/ILSVRC/imagenet-1k", "root": None}
    shared = dict(
        input_size=(3, 224, 224),
        batch_size=micro_batch,
        num_workers=workers,
        device=torch.device(device),
        interpolation=interpolation,
    )
    try:
        splits = [loaders.create_dataset(**where, split=split) for split in ("train", "validation")]
    except Exception as error:  # whatever the network and timm's readers raise
        raise data.DataError(
            f"ImageNet-1k is not at hand: put its classes' folders in imagenet/train and imagenet/validation of {data.VARIABLE}, "
            f"or install datasets and log in to the hub, which asks to accept its terms; timm could not load it ({error})"
        ) from error
    collate = None if mixed is None else loaders.FastCollateMixup(**mixed)
    inside = loaders.create_loader(splits[0], is_training=True, collate_fn=collate, **training, **shared)
    outside = loaders.create_loader(splits[1], is_training=False, **validation, **shared)

    def forever() -> Iterator[tuple[Tensor, Tensor]]:
        while True:
            yield from inside

    def logits(images: Tensor) -> Tensor:
        with torch.autocast(torch.device(device).type, torch.bfloat16):
            return net(images)

    def loss(pair: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(logits(pair[0]).float(), pair[1])  # labels are classes, or shares of them where mixed

    def results() -> dict[str, float]:
        total, right, count = 0.0, 0, 0
        with _evaluation(net):
            for images, labels in outside:
                scores = logits(images).float()
                total += F.cross_entropy(scores, labels, reduction="sum").item()
                right += int((scores.argmax(1) == labels).sum())
                count += len(labels)
        return {"test_loss": total / count, "accuracy": right / count}

    accumulate = max(1, batch // micro_batch)
    problem = Problem(model=net, batches=forever(), loss=loss, results=results, watched=results, accumulate=accumulate)
    return problem, max(1, len(inside) // accumulate)


def digit_images(device: str) -> tuple[Tensor, Tensor]:
    """Pixels from 0 to 1 and labels; shuffled, since the set is in the order of its writers, with the test's digits last."""
    x, y = data.digits()
    order = np.random.default_rng(0).permutation(len(x))
    return torch.from_numpy(x[order] / 16).float().to(device), torch.from_numpy(y[order]).to(device)


def mnist_images(device: str) -> tuple[Tensor, Tensor]:
    """MNIST's test images, (10000, 784) pixels from 0 to 1, and their labels, in the order of :func:`digit_images`."""
    x, y = data.mnist("test")
    order = np.random.default_rng(0).permutation(len(x))
    return torch.from_numpy(x[order]).flatten(1).float().div_(255).to(device), torch.from_numpy(y[order]).to(device)


def _standardized(x: Tensor, test: int = TEST_DIGITS) -> Tensor:
    """All pixels shifted and scaled alike, to mean 0 and variance 1 over all but the last, the test's."""
    return (x - x[:-test].mean()) / x[:-test].std()


def _characters() -> tuple[np.ndarray, int]:
    """The text's characters as numbers, and how many there are. Those that come less than ten times are one and the same."""
    numbers, count = _numbered(data.text().text)
    return numbers.copy(), count


@lru_cache(maxsize=1)  # sorting a million letters takes as long as a short trial
def _numbered(text: str) -> tuple[np.ndarray, int]:
    letters = np.array(text, dtype=np.str_).reshape(1).view(np.int32)
    _, inverse, counts = np.unique(letters, return_inverse=True, return_counts=True)
    common = counts >= 10
    numbers = np.where(common, np.cumsum(common), 0)
    return numbers[inverse].astype(np.int64), int(common.sum()) + 1


def _classification(model: nn.Module, x: Tensor, y: Tensor, batch: int, seed: int, test: int = TEST_DIGITS) -> Problem:
    inside, outside = (x[:-test], y[:-test]), (x[-test:], y[-test:])

    def epochs() -> Iterator[tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(seed)
        while True:
            order = torch.randperm(len(inside[0]), generator=generator).to(x.device)
            for part in order.split(batch):
                if len(part) == batch:
                    yield inside[0][part], inside[1][part]

    def loss(pair: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(model(pair[0]), pair[1])

    def watched() -> dict[str, float]:
        with _evaluation(model):
            logits = model(outside[0])
            right = (logits.argmax(1) == outside[1]).double().mean()
            return {"test_loss": F.cross_entropy(logits, outside[1]).item(), "accuracy": right.item()}

    def results() -> dict[str, float]:
        with _evaluation(model):
            return {"train_loss": loss(inside).item(), **watched()}

    return Problem(model=model, batches=epochs(), loss=loss, results=results, watched=watched)


class _evaluation:
    """The model in evaluation mode without gradients, then back in the mode it was in."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.grad = model, torch.no_grad()

    def __enter__(self) -> None:
        self.training = self.model.training
        self.model.eval()
        self.grad.__enter__()

    def __exit__(self, *error: Any) -> None:
        self.grad.__exit__(*error)
        self.model.train(self.training)
