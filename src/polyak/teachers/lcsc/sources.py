"""Reading checkpoints: from memory, safetensors or torch files (whole or in shards), torch.distributed.checkpoint folders.

A source says what a checkpoint holds without reading its weights, and hands them out one tensor at a time.
"""

from __future__ import annotations

import json
import pickle
import re
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from polyak.core import checks

Layout = dict[str, tuple[tuple[int, ...], torch.dtype] | None]  # None: no tensor
Get = Callable[[str], Any]

TORCH_FILES = (".pt", ".pth", ".bin", ".ckpt")
# What libraries call the weights in a folder that holds more than them.
WEIGHTS = ("model", "diffusion_pytorch_model", "pytorch_model", "adapter_model")
# What trainers put beside them.
TRAINING_STATE = (
    "optimizer",
    "scheduler",
    "rng_state",
    "training_args",
    "scaler",
    "random_states",
    "custom_checkpoint",
)


class Source(ABC):
    """One checkpoint. Subclass it to read checkpoints from elsewhere, say an object store."""

    name: str

    @abstractmethod
    def layout(self) -> Layout:
        """Entry -> (shape, dtype), or None for what is no tensor; in the order in which they are best read."""

    @abstractmethod
    def open(self) -> Any:
        """A context manager; it gives a function from an entry's name to its value."""


class MissingError(FileNotFoundError, ValueError):
    """A path that leads nowhere."""


CHECKPOINT = checks.Map(words="a state dict") | checks.path | checks.Instance(Source, words="a Source")


class _Checkpoints(checks.Kind):
    words = "a path or a list of checkpoints"

    def like(self, value: Any) -> bool:
        return checks.path.like(value) or checks.Stream().like(value)

    def __call__(self, name: str, value: Any) -> Any:
        if isinstance(value, Mapping):
            raise TypeError(f"{name} must be several state dicts in a list, got one state dict")
        if checks.path.like(super().__call__(name, value)):
            return checks.path(name, value)
        return [CHECKPOINT(f"{name}[{i}]", item) for i, item in enumerate(value)]


CHECKPOINTS = _Checkpoints()


def describe(value: Any) -> tuple[tuple[int, ...], torch.dtype] | None:
    """A layout's line for a value."""
    return (tuple(value.shape), value.dtype) if isinstance(value, Tensor) else None


class Memory(Source):
    """A state dict."""

    def __init__(self, state_dict: Mapping[str, Any], name: str) -> None:
        self.state_dict, self.name = state_dict, name

    def layout(self) -> Layout:
        return {key: describe(value) for key, value in self.state_dict.items()}

    @contextmanager
    def open(self) -> Iterator[Get]:
        yield self.state_dict.__getitem__


class Files(Source):
    """Files of one format, each with some of the entries. At most one of them is open at a time."""

    def __init__(self, name: str, files: list[Path], entry: str | None) -> None:
        self.name, self.files, self.entry = name, files, entry
        for file in files:
            if not file.is_file():
                raise MissingError(f"checkpoint {name}: there is no file {file}")
        self._where: dict[str, Path] = {}

    def layout(self) -> Layout:
        found: Layout = {}
        for file in self.files:
            with self._opened(file) as (entries, _):
                self._where.update(dict.fromkeys(entries, file))
                found.update(entries)
        return found

    @contextmanager
    def open(self) -> Iterator[Get]:
        if not self._where:
            self.layout()
        present, stack, inner = None, ExitStack(), None

        def get(key: str) -> Any:
            nonlocal present, inner
            file = self._where[key]
            if file != present:
                stack.close()
                _, inner = stack.enter_context(self._opened(file))
                present = file
            assert inner is not None
            return inner(key)

        with stack:
            yield get

    def _opened(self, file: Path) -> Any:
        return _safetensors(file) if file.suffix == ".safetensors" else _torch(file, self.entry)


@contextmanager
def _safetensors(file: Path) -> Iterator[tuple[Layout, Get]]:
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError as error:
        raise ImportError(f"{file} needs safetensors: pip install 'polyak[teachers]'") from error
    try:
        opened = safe_open(str(file), framework="pt")
    except SafetensorError as error:
        raise ValueError(f"{file} is not a safetensors file: {error}") from error
    with opened as handle:
        # Views into the mapped file: nothing is read before it is used.
        yield {key: describe(handle.get_tensor(key)) for key in handle.keys()}, handle.get_tensor  # noqa: SIM118


@contextmanager
def _torch(file: Path, entry: str | None) -> Iterator[tuple[Layout, Get]]:
    try:
        try:
            loaded = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError:  # files from before torch 1.6 cannot be mapped
            loaded = torch.load(file, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise ValueError(
            f"{file} cannot be read as weights alone; save the model's state_dict() by itself ({error})"
        ) from error
    entries = _entry(loaded, entry, file)
    yield {key: describe(value) for key, value in entries.items()}, entries.__getitem__


def _entry(loaded: Any, entry: str | None, where: Path) -> Mapping[str, Any]:
    """The state dict in what a file holds: all of it, or what is under ``entry``."""
    if not isinstance(loaded, Mapping):
        raise ValueError(f"{where} must hold a state dict, got {type(loaded).__name__}")
    if entry is not None:
        if not isinstance(loaded.get(entry), Mapping):
            raise ValueError(f"{where} has no state dict under entry={entry!r}; it has {sorted(map(str, loaded))}")
        return loaded[entry]
    if not any(isinstance(value, Tensor) for value in loaded.values()):
        inner = [
            k for k, v in loaded.items() if isinstance(v, Mapping) and any(isinstance(t, Tensor) for t in v.values())
        ]
        hint = f"; say which of its entries is the state dict: entry={inner[0]!r}" if inner else ""
        raise ValueError(f"{where} holds no tensors at its top level{hint}")
    return loaded


class Distributed(Source):
    """A folder written by torch.distributed.checkpoint, on any number of ranks; read by this process alone, tensors only."""

    def __init__(self, folder: Path, entry: str | None) -> None:
        self.name, self.folder = str(folder), folder
        self.prefix = f"{entry}." if entry else ""

    def layout(self) -> Layout:
        from torch.distributed.checkpoint import FileSystemReader
        from torch.distributed.checkpoint.metadata import TensorStorageMetadata

        found: Layout = {
            key.removeprefix(self.prefix): (tuple(item.size), item.properties.dtype)
            for key, item in FileSystemReader(self.folder).read_metadata().state_dict_metadata.items()
            if key.startswith(self.prefix) and isinstance(item, TensorStorageMetadata)
        }
        if not found:
            raise ValueError(f"{self.folder} holds no tensors under entry={self.prefix.rstrip('.')!r}")
        return found

    @contextmanager
    def open(self) -> Iterator[Get]:
        import torch.distributed.checkpoint as dcp

        layout = self.layout()

        def get(key: str) -> Tensor:
            facts = layout[key]
            assert facts is not None
            value = torch.empty(facts[0], dtype=facts[1])
            with warnings.catch_warnings():  # it says that there is one process, which no_dist has said
                warnings.filterwarnings("ignore", message="torch.distributed is")
                dcp.load({self.prefix + key: value}, storage_reader=dcp.FileSystemReader(self.folder), no_dist=True)
            return value

        yield get


def source(item: Any, index: int, entry: str | None) -> Source:
    """The source of one checkpoint: a state dict, a file, a shard index, a folder with one checkpoint, or a Source."""
    if isinstance(item, Source):
        return item
    if isinstance(item, Mapping):
        return Memory(item, f"number {index}")
    path = Path(item)
    if path.is_dir():
        if (path / ".metadata").is_file():
            return Distributed(path, entry)
        path = _weights_in(path)
    if not path.is_file():
        raise MissingError(f"checkpoints[{index}]: there is no file or folder {path}")
    if path.name.endswith(".index.json"):
        return Files(str(path), _shards(path), entry)
    checks.one_of(f"the suffix of checkpoint {path}", path.suffix, [".safetensors", *TORCH_FILES])
    return Files(str(path), [path], entry)


def _shards(index: Path) -> list[Path]:
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        return [index.parent / name for name in dict.fromkeys(weight_map.values())]
    except (json.JSONDecodeError, KeyError, AttributeError, TypeError) as error:
        raise ValueError(f"{index} is not a shard index: it must be JSON with a 'weight_map'") from error


def _weights_in(folder: Path) -> Path:
    """The file, or the shard index, of the one checkpoint in a folder."""
    for pattern in ("*.safetensors.index.json", "*.index.json", "*.safetensors", "*"):
        found = [p for p in sorted(folder.glob(pattern)) if p.name.endswith(".index.json") or _is_weights(p)]
        named = [p for p in found if p.name.partition(".")[0] in WEIGHTS]
        for candidates in (named, found):
            if len(candidates) == 1:
                return candidates[0]
        if found:
            names = ", ".join(p.name for p in found)
            raise ValueError(f"{folder} must hold one checkpoint, it has {names}; give the files themselves")
    raise ValueError(f"{folder} holds no checkpoint (.safetensors, {', '.join(TORCH_FILES)} or a shard index)")


def _is_weights(path: Path) -> bool:
    hidden = path.name.startswith((".", *TRAINING_STATE))
    return path.is_file() and path.suffix in (".safetensors", *TORCH_FILES) and not hidden


def _is_checkpoint(folder: Path) -> bool:
    if (folder / ".metadata").is_file():
        return True
    return folder.is_dir() and any(_is_weights(p) or p.name.endswith(".index.json") for p in folder.iterdir())


def checkpoints_in(folder: Path) -> list[Path]:
    """A folder's checkpoints, its sub-folders or its files, by the numbers in their names: step-900 before step-1000."""
    if not folder.is_dir():
        raise MissingError(f"checkpoints must be a list, or a folder that holds several, got {folder}")
    inside = [p for p in folder.iterdir() if not p.name.startswith(".")]
    folders = [p for p in inside if p.is_dir() and _is_checkpoint(p)]
    if not folders and any(p.name.endswith(".index.json") for p in inside):
        raise ValueError(f"{folder} is one checkpoint in shards; give a list, or the folder that holds several")
    return sorted(folders or [p for p in inside if _is_weights(p)], key=_natural)


def _natural(path: Path) -> list[tuple[int, int | str]]:
    return [(0, int(part)) if part.isdigit() else (1, part) for part in re.split(r"(\d+)", path.name) if part]
