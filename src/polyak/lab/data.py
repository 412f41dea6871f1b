"""Real data for claims: from a folder, from sets that come with libraries, or from their public loaders.

A set is looked for in the folder that the environment's ``POLYAK_DATA`` names::

    mnist/t10k-images-idx3-ubyte.gz   mnist/t10k-labels-idx1-ubyte.gz   (train-... for the training set)
    tiny-shakespeare/input.txt
    wikitext-2/train.txt   wikitext-2/valid.txt   wikitext-2/test.txt

then among the sets inside scikit-learn, which need no network; then through torchvision or Hugging Face's datasets, where these
are installed. :func:`text` always finds something.
"""

from __future__ import annotations

import gzip
import os
import platform
import sysconfig
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from polyak.core import checks

if TYPE_CHECKING:
    import numpy as np

VARIABLE = "POLYAK_DATA"
_SOURCE_LETTERS = 1_000_000


class DataError(RuntimeError):
    """A data set is not at hand; the message says how to get it."""


class Text(NamedTuple):
    """A text, and what it is."""

    text: str
    name: str


def digits() -> tuple[np.ndarray, np.ndarray]:
    """1797 images of handwritten digits, 8 x 8 pixels in rows of 64 (float64, 0 to 16), and their labels (int64)."""
    return _within_sklearn("digits")


def breast_cancer() -> tuple[np.ndarray, np.ndarray]:
    """569 tumours, 30 features each (float64), and whether each is benign (int64, 0 or 1)."""
    return _within_sklearn("breast_cancer")


def diabetes() -> tuple[np.ndarray, np.ndarray]:
    """442 patients, 10 standardized features each (float64), and the disease's progress a year later (float64)."""
    return _within_sklearn("diabetes")


def mnist(split: Literal["test", "train"] = "test") -> tuple[np.ndarray, np.ndarray]:
    """MNIST's 10,000 test or 60,000 training images (uint8, ``(n, 28, 28)``) and their labels (int64).

    Raises:
        DataError: neither the folder nor torchvision has them.
    """
    stem = {"test": "t10k", "train": "train"}[checks.one_of("split", split, ["test", "train"])]
    images = _in_folder(f"mnist/{stem}-images-idx3-ubyte.gz")
    labels = _in_folder(f"mnist/{stem}-labels-idx1-ubyte.gz")
    if images and labels:
        return _idx(images), _idx(labels).astype("int64")
    try:
        datasets = import_module("torchvision.datasets")
    except ImportError as error:
        raise _missing("MNIST", "mnist", "torchvision") from error
    try:
        loaded = datasets.MNIST(_cache("mnist"), train=split == "train", download=True)
    except (OSError, RuntimeError) as error:
        raise _missing("MNIST", "mnist", "torchvision", error) from error
    return loaded.data.numpy(), loaded.targets.numpy().astype("int64")


def shakespeare() -> str:
    """Tiny Shakespeare: 1.1 MB of plays.

    Raises:
        DataError: neither the folder nor Hugging Face's datasets has it.
    """
    path = _in_folder("tiny-shakespeare/input.txt")
    if path:
        return _text_of(path)
    # The set's own loading script is of a kind that is no longer run; this is the hub's conversion of it.
    splits = _from_hub(
        "Tiny Shakespeare", "tiny-shakespeare", "karpathy/tiny_shakespeare", revision="refs/convert/parquet"
    )
    return "".join(row["text"] for split in ("train", "validation", "test") for row in splits[split])


def wikitext(split: Literal["train", "valid", "test"] = "valid") -> str:
    """WikiText-2, with rare words as ``<unk>``.

    Raises:
        DataError: neither the folder nor Hugging Face's datasets has it.
    """
    checks.one_of("split", split, ["train", "valid", "test"])
    path = _in_folder(f"wikitext-2/{split}.txt")
    if path:
        return _text_of(path)
    splits = _from_hub("WikiText-2", "wikitext-2", "Salesforce/wikitext", "wikitext-2-v1")
    return "".join(row["text"] for row in splits["validation" if split == "valid" else split])


def text() -> Text:
    """About a million letters: Tiny Shakespeare where the folder has it, else Python's own standard library in source.

    The latter is always there, and the same for one version of Python: its modules in the order of their names.
    """
    path = _in_folder("tiny-shakespeare/input.txt")
    if path:
        return Text(_text_of(path), "tiny-shakespeare")
    parts: list[str] = []
    letters = 0
    for file in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        parts.append(_text_of(file))
        letters += len(parts[-1])
        if letters >= _SOURCE_LETTERS:
            break
    return Text("".join(parts)[:_SOURCE_LETTERS], f"Python {platform.python_version()} standard library")


def _in_folder(name: str) -> Path | None:
    """A file of the folder, if there is one with something in it."""
    folder = os.environ.get(VARIABLE)
    if not folder:
        return None
    if not Path(folder).is_dir():
        raise DataError(f"{VARIABLE} must name a folder, got {folder!r}")
    path = Path(folder, name)
    return path if path.is_file() and path.stat().st_size else None


def _text_of(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def _idx(path: Path) -> np.ndarray:
    """An IDX file of bytes: two zeros, the type, the number of axes, their lengths (big-endian), the values."""
    import numpy as np

    try:
        raw = gzip.decompress(path.read_bytes())
    except (OSError, EOFError) as error:
        raise DataError(f"{path} is not a gzip file: {error}") from error
    if raw[:3] != b"\0\0\x08":
        raise DataError(f"{path} is not an IDX file of bytes")
    axes = raw[3]
    shape = np.frombuffer(raw, dtype=">u4", count=axes, offset=4).tolist()
    values = np.frombuffer(raw, dtype=np.uint8, offset=4 + 4 * axes)
    if values.size != np.prod(shape):
        raise DataError(f"{path} holds {values.size} values, its header says {shape}")
    return values.reshape(shape).copy()


def _within_sklearn(name: str) -> tuple[np.ndarray, np.ndarray]:
    x, y = _read_sklearn(name)
    return x.copy(), y.copy()


@cache  # every trial reads them, and their files are text
def _read_sklearn(name: str) -> tuple[np.ndarray, np.ndarray]:
    try:
        from sklearn import datasets
    except ImportError as error:
        raise DataError(f"{name} comes with scikit-learn: pip install 'polyak[lab]'") from error
    return getattr(datasets, f"load_{name}")(return_X_y=True)


def _from_hub(title: str, folder: str, *where: str, **options: str) -> Any:
    try:
        hub = import_module("datasets")
    except ImportError as error:
        raise _missing(title, folder, "datasets") from error
    try:
        return hub.load_dataset(*where, **options)
    except Exception as error:  # whatever the network and the library's many layers raise
        raise _missing(title, folder, "datasets", error) from error


def _cache(name: str) -> Path:
    import platformdirs

    return Path(platformdirs.user_cache_dir("polyak", appauthor=False), name)


def _missing(title: str, folder: str, library: str, error: Exception | None = None) -> DataError:
    why = f"{library} could not load it ({error})" if error else f"{library} is not installed"
    return DataError(
        f"{title} is not at hand: set {VARIABLE} to a folder that holds {folder}/, or install {library}; {why}"
    )
