"""The table of noise levels, and who tells which one a noised sample has: a classifier, or an exact posterior."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from polyak.core import checks
from polyak.core.exact import Mixture
from polyak.generate.process import Generators, expand, standard_normal, wide

_ROOM = 2**23  # numbers that an exact posterior holds at once
_LEVEL = checks.positive
_COUNT = checks.Integer(2, 1_000_000)


@checks.arguments(sigma_min=_LEVEL, sigma_max=_LEVEL, n=_COUNT)
def noise_levels(sigma_min: float = 0.01, sigma_max: float = 50.0, n: int = 1000) -> Tensor:
    """``sigma_k = sigma_min (sigma_max / sigma_min)^(1 - k/n)``, k = 0 .. n-1: equally spaced in log sigma, the LARGEST first.

    The last is a step above sigma_min (with n = 1000 that is the table of the official code).

    Returns:
        (n,), float64, strictly decreasing.
    """
    if sigma_max <= sigma_min:
        raise ValueError(f"sigma_max must be above sigma_min={sigma_min:g}, got {sigma_max!r}")
    part = 1 - torch.arange(n, dtype=torch.float64) / n
    levels = sigma_min * torch.exp(part * math.log(sigma_max / sigma_min))
    levels[0] = sigma_max
    if not bool((levels[1:] < levels[:-1]).all()):
        raise ValueError(f"sigma_min={sigma_min!r} and sigma_max={sigma_max!r} are too near for n={n} levels")
    return levels


class NoisePosterior:
    """``p(sigma | x)`` on a table of levels: ``posterior(x)`` are its logits, for x of shape (B, ...) in the scaled variable.

    Args:
        logits: x -> (B, n), up to a constant for each row.
        levels: (n,), positive and strictly decreasing.

    Example:
        >>> posterior = NoisePosterior.exact(Gaussian([0.0, 0.0]), noise_levels(n=100))
        >>> posterior(torch.zeros(3, 2)).shape
        torch.Size([3, 100])
    """

    @checks.arguments(logits=checks.Function("a function x -> logits", 1), levels=checks.Numbers(2))
    def __init__(self, logits: Callable[[Tensor], Tensor], levels: Tensor | Sequence[float]) -> None:
        self.logits = logits
        self.levels = check_levels("levels", torch.as_tensor(levels, dtype=torch.float64))

    def __call__(self, x: Tensor) -> Tensor:
        """Logits, (B, n)."""
        return self.logits(x)

    @classmethod
    def exact(cls, law: Mixture, levels: Tensor | Sequence[float] | None = None) -> NoisePosterior:
        """The posterior where the law of the data is known: ``p(sigma | x) ~ p(x | sigma)``, each level as likely as any.

        Args:
            law: of the data, for x whose rows have ``law.dim`` elements.
            levels: the table; default ``noise_levels()``.

        Raises:
            ValueError: levels that are no table, or (when it is called) rows of another size.
        """
        if not isinstance(law, Mixture):
            raise TypeError(f"law must be a Mixture, got {checks.shown(law)}")
        table = noise_levels() if levels is None else torch.as_tensor(levels, dtype=torch.float64)

        def logits(x: Tensor) -> Tensor:
            flat, known = x.flatten(1), table.to(x.device, wide(x.device))
            rows = max(1, _ROOM // (len(known) * (len(law) + law.dim)))
            made = [_log_likelihoods(law, part.to(known), known) for part in flat.split(rows)]
            return torch.cat(made) if made else known.new_empty(0, len(known))

        return cls(logits, table)


def _log_likelihoods(law: Mixture, x: Tensor, levels: Tensor) -> Tensor:
    """``log p(x | sigma)`` at all levels, (B, n)."""
    if law.basis is not None or x.shape[1] != law.dim:
        return law.log_prob(x[:, None].expand(-1, len(levels), -1), 1.0, levels)
    # Of isotropic components, distances are the same at all levels.
    distance = torch.cdist(x, law.means.to(x), compute_mode="donot_use_mm_for_euclid_dist").square()
    spread = law.variances.to(x)[:, 0] + levels.square()[:, None]
    share = law.weights.to(x).log() - law.dim / 2 * (2 * math.pi * spread).log()
    return torch.logsumexp(torch.addcmul(share, distance[:, None], 1 / spread, value=-0.5), 2)


class NoiseClassifier(nn.Module):
    """The paper's noise classifier, which of ``classes`` levels an image has: four convolutions with ReLU and average pooling.

    Images of 32 pixels are halved four times. Larger ones are divided by four where that is needed to end with 2 x 2 (256 pixels:
    three times, then halved); smaller ones are halved less often.

    Args:
        in_shape: (channels, height, width) of an image, at least 2 x 2.
        classes: the number of levels; class 0 is the LARGEST.
        sigma_min, sigma_max: of :func:`noise_levels`; official code has 0.01 and 50 (CIFAR-10) or 348 (CelebA-HQ).
    """

    @checks.arguments(
        in_shape=checks.Each(checks.Integer(1, 65536), count=3), classes=_COUNT, sigma_min=_LEVEL, sigma_max=_LEVEL
    )
    def __init__(
        self, in_shape: Sequence[int], classes: int = 1000, sigma_min: float = 0.01, sigma_max: float = 50.0
    ) -> None:
        super().__init__()
        noise_levels(sigma_min, sigma_max, classes)  # refuses what is no table
        self.in_shape, self.classes = tuple(in_shape), classes
        self.sigma_min, self.sigma_max = sigma_min, sigma_max
        channels, height, width = self.in_shape
        if min(height, width) < 2:
            raise ValueError(f"in_shape must be (channels, height, width) of at least 2 x 2, got {self.in_shape}")
        halvings = int(math.log2(min(height, width) / 2))
        layers: list[nn.Module] = []
        for i, (before, after) in enumerate(zip((channels, 32, 64, 128), (32, 64, 128, 256), strict=True)):
            stride = 4 if halvings > 4 + i else 2 if halvings > i else 1
            layers += [nn.Conv2d(before, after, 3, padding=1), nn.ReLU()]
            if stride > 1:
                layers.append(nn.AvgPool2d(2, stride))
                height, width = ((side - 2) // stride + 1 for side in (height, width))
        self.features = nn.Sequential(*layers)
        self.head = nn.Linear(256 * height * width, classes)

    @property
    def levels(self) -> Tensor:
        """(classes,), float64, decreasing."""
        return noise_levels(self.sigma_min, self.sigma_max, self.classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, classes) of images x, (B, channels, height, width)."""
        if x.shape[1:] != self.in_shape:
            raise ValueError(f"x must have shape (B, *{self.in_shape}), got {tuple(x.shape)}")
        return self.head(self.features(x).flatten(1))


@checks.arguments(
    classifier=checks.Like("a noise classifier, with levels", "levels", "__call__"),
    x0=checks.Tensor(floating=True, least_ndim=2), generator=checks.generators | None,
)  # fmt: skip
def noise_classifier_loss(classifier: Any, x0: Tensor, generator: Generators | None = None) -> Tensor:
    """The cross entropy that a noise classifier is trained by, of data that are noised with a level drawn for each; a scalar.

    ``x = x0 + sigma_y z``, y uniform over the table. The official training: Adam with 1e-3, batches of 100, 100 to 200 epochs.

    Args:
        classifier: x -> logits (B, n), with ``levels`` (n,), as :class:`NoiseClassifier`.
        x0: data, (B, ...).
        generator: of the levels, then of the noise.

    Raises:
        ValueError: logits of another shape.
    """
    levels = classifier.levels.to(x0.device)
    part = uniform(len(x0), generator, x0.device)
    y = (part * len(levels)).long().clamp(max=len(levels) - 1)
    z = standard_normal(x0.shape, generator=generator, dtype=x0.dtype, device=x0.device)
    said = check_logits(classifier(x0 + expand(levels[y], x0) * z), len(x0), len(levels))
    return nn.functional.cross_entropy(said, y)


def check_levels(name: str, levels: Tensor) -> Tensor:
    """ValueError unless they are a table: positive and strictly decreasing."""
    table = levels.ndim == 1 and len(levels) >= 2 and bool((levels > 0).all() & levels.isfinite().all())
    if not (table and bool((levels[1:] < levels[:-1]).all())):
        raise ValueError(
            f"{name} must be at least 2 positive numbers, the largest first, got {checks.shown(levels.tolist())}"
        )
    return levels


def check_logits(said: Any, rows: int, count: int) -> Tensor:
    """ValueError unless there is one logit for each row and level."""
    if not isinstance(said, Tensor) or said.shape != (rows, count):
        got = tuple(said.shape) if isinstance(said, Tensor) else type(said).__name__
        raise ValueError(f"the noise posterior must return logits of shape {(rows, count)}, got {got}")
    return said


def uniform(n: int, generator: Generators | None, device: torch.device) -> Tensor:
    """(n,), uniform in [0, 1); a list of generators draws one number each."""
    if isinstance(generator, Sequence):
        if len(generator) != n:
            raise ValueError(f"generator must be one, or one for each of the {n} rows, got {len(generator)}")
        each = [uniform(1, one, device) for one in generator]
        return torch.cat(each) if each else torch.empty(0, dtype=wide(device), device=device)
    source = device if generator is None else generator.device
    return torch.rand(n, generator=generator, dtype=wide(source), device=source).to(device)


def draw(logits: Tensor, generator: Generators | None) -> Tensor:
    """An index for each row of logits (B, n), by its probability: (B,)."""
    below = logits.to(wide(logits.device)).softmax(1).cumsum(1)
    part = uniform(len(logits), generator, logits.device) * below[:, -1]
    return torch.searchsorted(below, part[:, None], right=True)[:, 0].clamp(max=logits.shape[1] - 1)
