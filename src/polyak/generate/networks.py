"""A small U-Net and a small transformer (DiT) for images, made of diffusers' pieces, as networks that a denoiser takes.

    >>> network = unet(size=8, channels=1, classes=10)
    >>> network(torch.zeros(2, 1, 8, 8), torch.tensor([0.1, 0.9]), torch.tensor([3, 10])).shape
    torch.Size([2, 1, 8, 8])

A trained one is saved with all that is needed to make it again and to sample from it, in one safetensors file:

    >>> save_denoiser("digits.safetensors", network, EDM(), "edm")
    >>> denoiser = load_denoiser("digits.safetensors", label=3)

They are told a time, whatever the process calls it, and with ``classes`` a class for each image; class ``classes`` is none,
as guidance needs it. diffusers is imported when one is made.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from polyak.core import checks
from polyak.generate.prediction import DIALECT, Denoiser
from polyak.generate.process import Process
from polyak.generate.process.path import PATH

__all__ = ["ImageNetwork", "dit", "image_denoiser", "load_denoiser", "save_denoiser", "unet"]

_SHAPE: dict[str, checks.Kind] = dict(
    size=checks.Integer(4, 4096), channels=checks.Integer(1, 4096), classes=checks.Integer(0, 1_000_000),
    time_scale=checks.positive,
)  # fmt: skip


class ImageNetwork(nn.Module):
    """A diffusers model of images as a function ``(x, t, y) -> output``.

    Args:
        model: takes ``(x, t, class_labels=y)`` and returns what has a ``sample``.
        classes: how many there are beside the class that means none; 0 for a model that knows no classes.
        time_scale: what a time is multiplied by; the models' embedding of it resolves differences of about one.
    """

    @checks.arguments(
        model=checks.Instance(nn.Module, words="a module"), classes=checks.Integer(0), time_scale=checks.positive
    )
    def __init__(self, model: nn.Module, classes: int = 0, time_scale: float = 1000.0) -> None:
        super().__init__()
        self.model, self.classes, self.time_scale = model, classes, time_scale
        self.made: dict[str, Any] = {}  # how :func:`unet` or :func:`dit` made it

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        """The output for images x (B, channels, size, size) at times t (B,), of classes y (B,); None is no class."""
        if y is None and self.classes:
            y = torch.full((len(x),), self.classes, device=x.device)
        told = {"class_labels": y} if self.classes else {}
        return self.model(x, t * self.time_scale, **told).sample


@checks.arguments(**_SHAPE, width=checks.Integer(8, 4096), levels=checks.Integer(1, 8) | None)
def unet(
    size: int,
    channels: int = 1,
    *,
    width: int = 32,
    levels: int | None = None,
    classes: int = 0,
    time_scale: float = 1000.0,
) -> ImageNetwork:
    """A U-Net: ``width`` channels at full resolution, twice as many below; attention at the lowest.

    Args:
        size: of the images; halved ``levels - 1`` times. By default down to 4 to 8 pixels.
        width: a multiple of 8.

    Raises:
        ImportError: diffusers is not installed.
    """
    if width % 8:
        raise ValueError(f"width must be a multiple of 8, got {width}")
    levels = levels or max(1, int(math.log2(size / 4)))
    if size % 2 ** (levels - 1):
        raise ValueError(f"size must be divisible by {2 ** (levels - 1)} for {levels} levels, got {size}")
    model = _diffusers().UNet2DModel(
        sample_size=size,
        in_channels=channels,
        out_channels=channels,
        block_out_channels=(width, *[2 * width] * (levels - 1)),
        down_block_types=(*["DownBlock2D"] * (levels - 1), "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", *["UpBlock2D"] * (levels - 1)),
        layers_per_block=1,
        attention_head_dim=max(8, width // 2),
        norm_num_groups=8,
        num_class_embeds=classes + 1 if classes else None,
    )
    options = dict(width=width, levels=levels)
    return _made("unet", model, size, channels, classes, time_scale, options)


@checks.arguments(
    **_SHAPE, width=checks.Integer(8, 4096), depth=checks.Integer(1, 100), heads=checks.Integer(1, 256),
    patch=checks.Integer(1, 64),
)  # fmt: skip
def dit(
    size: int,
    channels: int = 1,
    *,
    width: int = 64,
    depth: int = 4,
    heads: int = 4,
    patch: int = 2,
    classes: int = 0,
    time_scale: float = 1000.0,
) -> ImageNetwork:
    """A diffusion transformer: ``depth`` blocks of the given ``width`` on patches, each told the time by adaptive norms.

    Args:
        size: of the images, a multiple of ``patch``.
        width: a multiple of ``heads``.

    Raises:
        ImportError: diffusers is not installed.
    """
    if width % heads:
        raise ValueError(f"width must be a multiple of heads={heads}, got {width}")
    if size % patch:
        raise ValueError(f"size must be a multiple of patch={patch}, got {size}")
    model = _diffusers().DiTTransformer2DModel(
        num_attention_heads=heads,
        attention_head_dim=width // heads,
        in_channels=channels,
        out_channels=channels,
        num_layers=depth,
        sample_size=size,
        patch_size=patch,
        num_embeds_ada_norm=max(classes, 1),
        norm_num_groups=1,
    )
    for part in model.modules():
        # It would drop classes by torch's global generator; whoever trains does, by his own.
        if hasattr(part, "dropout_prob"):
            part.dropout_prob = 0.0
    options = dict(width=width, depth=depth, heads=heads, patch=patch)
    return _made("dit", model if classes else _Classless(model), size, channels, classes, time_scale, options)


def _made(
    name: str, model: nn.Module, size: int, channels: int, classes: int, time_scale: float, options: dict[str, int]
) -> ImageNetwork:
    network = ImageNetwork(model, classes, time_scale)
    network.made = dict(network=name, size=size, channels=channels, classes=classes, time_scale=time_scale, **options)
    return network


class _Classless(nn.Module):
    """A DiT that is never told a class."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor, t: Tensor) -> Any:
        return self.model(x, t, class_labels=torch.zeros(len(x), dtype=torch.long, device=x.device))


def _diffusers() -> Any:
    try:
        return import_module("diffusers")
    except ImportError as error:
        raise ImportError("this network is made of diffusers' parts: pip install 'polyak[diffusers]'") from error


_PATH = checks.Path()
_FORMAT = "polyak denoiser 1"


@checks.arguments(
    path=_PATH, network=checks.Instance(ImageNetwork, words="a network of unet(...) or dit(...)"), process=PATH,
    prediction=DIALECT, sigma_data=checks.positive,
)  # fmt: skip
def save_denoiser(
    path: str | Path, network: ImageNetwork, process: Process, prediction: str = "epsilon", *, sigma_data: float = 0.5
) -> None:
    """Save weights, and how the network, the process and the output's dialect are made again.

    Args:
        path: of the safetensors file.
        process: one of this package's, a dataclass of numbers.

    Raises:
        ValueError: a network that neither :func:`unet` nor :func:`dit` made, or a process of another package.
    """
    if not network.made:
        raise ValueError("network must be one that unet(...) or dit(...) made, got an ImageNetwork of another model")
    name = type(process).__name__
    if getattr(_room(), name, None) is not type(process) or not dataclasses.is_dataclass(process):
        raise ValueError(f"process must be one that the file can name, such as VP(), got {process!r}")
    fields = {f.name: getattr(process, f.name) for f in dataclasses.fields(process) if f.init}
    told = dict(
        format=_FORMAT, **network.made, process={"name": name, **fields}, prediction=prediction, sigma_data=sigma_data
    )
    try:
        text = json.dumps(told)
    except TypeError as error:
        raise ValueError(f"process must have numbers for options, got {process!r}") from error
    weights = {key: value.detach().contiguous() for key, value in network.state_dict().items()}
    _safetensors()[1].save_file(weights, path, {"polyak": text})


@checks.arguments(path=_PATH, label=checks.Integer(0) | None, device=checks.device | None)
def load_denoiser(path: str | Path, *, label: int | None = None, device: torch.device | str | None = None) -> Denoiser:
    """The denoiser that :func:`save_denoiser` wrote.

    Args:
        label: the class to generate; guidance is then against no class. None: no class.

    Returns:
        A :class:`Denoiser`, whose ``process`` and ``prediction`` are the file's, and whose network has the type that was saved.

    Raises:
        FileNotFoundError: no file.
        ValueError: not such a file, or a class that the network does not know.
    """
    files = _safetensors()[0]
    try:
        with files.safe_open(path, "pt", device=str(device or "cpu")) as file:
            told = json.loads((file.metadata() or {}).get("polyak", "{}"))
            if told.pop("format", None) != _FORMAT:
                raise ValueError(f"path must be a file of save_denoiser, got {str(path)!r}")
            weights = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (it is no mapping)
    except files.SafetensorError as error:
        raise ValueError(f"path must be a file of save_denoiser, got {str(path)!r}: {error}") from None
    process, prediction, sigma_data = told.pop("process"), told.pop("prediction"), told.pop("sigma_data")
    kind = getattr(_room(), name := process.pop("name"), None)
    if not (isinstance(kind, type) and issubclass(kind, Process)):
        raise ValueError(f"path must be a file with a process of this package, got {name!r}")
    make = {"unet": unet, "dit": dit}[told.pop("network")]
    network: ImageNetwork = make(**told)
    network.to(max((w.dtype for w in weights.values() if w.is_floating_point()), key=lambda kind: kind.itemsize))
    network.load_state_dict(weights)
    network.to(device).eval().requires_grad_(False)
    return image_denoiser(network, kind(**process), prediction, label=label, sigma_data=sigma_data)


@checks.arguments(
    network=checks.Instance(ImageNetwork, words="a network of unet(...) or dit(...)"), process=PATH, prediction=DIALECT,
    label=checks.Integer(0) | checks.Each(checks.Integer(0)) | checks.Tensor(ndim=1) | None, sigma_data=checks.positive,
)  # fmt: skip
def image_denoiser(
    network: ImageNetwork,
    process: Process,
    prediction: str = "epsilon",
    *,
    label: int | Sequence[int] | Tensor | None = None,
    sigma_data: float = 0.5,
) -> Denoiser:
    """A denoiser of a class, or of one class for each row; its unconditional prediction is of no class.

    Raises:
        ValueError: a class that the network does not know.
    """
    if label is None:
        return Denoiser(network, process, prediction, sigma_data=sigma_data)
    wanted = torch.as_tensor(label)
    whole = not (wanted.is_floating_point() or wanted.is_complex() or wanted.dtype == torch.bool)
    if not whole or bool(((wanted < 0) | (wanted >= network.classes)).any()):
        raise ValueError(f"label must be in [0, {network.classes}), the network's classes, got {label!r}")

    def of_class(x: Tensor, t: Tensor) -> Tensor:
        if wanted.ndim and len(wanted) != len(x):
            raise ValueError(f"label must be one class, or one for each of the {len(x)} rows, got {len(wanted)}")
        return network(x, t, wanted.to(x.device).expand(len(x)))

    return Denoiser(of_class, process, prediction, unconditional=network, sigma_data=sigma_data)


def _room() -> Any:
    """All processes, those of systems included, by their public names."""
    return import_module("polyak.generate")


def _safetensors() -> Any:
    try:
        return import_module("safetensors"), import_module("safetensors.torch")
    except ImportError as error:
        raise ImportError("saving and loading needs safetensors: pip install 'polyak[diffusers]'") from error
