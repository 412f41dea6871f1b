"""Where data sets are found, and what is said where they are not."""

from __future__ import annotations

import gzip
import struct
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from polyak.lab import data
from polyak.lab.data import DataError


@pytest.fixture(autouse=True)
def nothing_at_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither a folder nor a loader of public data."""
    monkeypatch.delenv("POLYAK_DATA", raising=False)
    for library in ("torchvision", "torchvision.datasets", "datasets"):
        monkeypatch.setitem(sys.modules, library, None)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in the documented layout, with four images."""
    images = np.arange(4 * 28 * 28, dtype=np.uint64).astype(np.uint8)
    write(tmp_path / "mnist/t10k-images-idx3-ubyte.gz", struct.pack(">4B3I", 0, 0, 8, 3, 4, 28, 28) + images.tobytes())
    write(tmp_path / "mnist/t10k-labels-idx1-ubyte.gz", struct.pack(">4BI", 0, 0, 8, 1, 4) + bytes([7, 2, 1, 0]))
    for name in ("tiny-shakespeare/input.txt", "wikitext-2/valid.txt"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text(f"the text of {name} é", encoding="utf-8")
    (tmp_path / "wikitext-2/train.txt").touch()
    monkeypatch.setenv("POLYAK_DATA", str(tmp_path))
    return tmp_path


def write(path: Path, raw: bytes) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(gzip.compress(raw))


def test_sets_within_scikit_learn() -> None:
    shapes = {"digits": (1797, 64), "breast_cancer": (569, 30), "diabetes": (442, 10)}
    for name, shape in shapes.items():
        x, y = getattr(data, name)()
        assert (x.shape, y.shape, x.dtype) == (shape, shape[:1], np.float64)


def test_mnist_from_the_folder(folder: Path) -> None:
    images, labels = data.mnist()
    assert (images.shape, images.dtype, labels.dtype) == ((4, 28, 28), np.uint8, np.int64)
    assert images[1, 0, 0] == 28 * 28 % 256
    assert labels.tolist() == [7, 2, 1, 0]
    images[0] = 0  # it is the caller's own
    with pytest.raises(DataError, match="POLYAK_DATA"):
        data.mnist("train")
    with pytest.raises(ValueError, match="split must be one of 'test', 'train', got 'valid'"):
        data.mnist("valid")  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"text", "is not a gzip file"),
        (gzip.compress(b"text", mtime=0), "is not an IDX file"),
        (gzip.compress(b"\0\0\x08\x01\0\0\0\x05abc", mtime=0), r"holds 3 values, its header says \[5\]"),
    ],
)
def test_damaged_files_are_named(folder: Path, raw: bytes, message: str) -> None:
    path = folder / "mnist/t10k-images-idx3-ubyte.gz"
    path.write_bytes(raw)
    with pytest.raises(DataError, match=message):
        data.mnist()


def test_texts_from_the_folder(folder: Path) -> None:
    assert data.shakespeare() == "the text of tiny-shakespeare/input.txt é"
    assert data.wikitext() == "the text of wikitext-2/valid.txt é"
    assert data.text() == (data.shakespeare(), "tiny-shakespeare")
    with pytest.raises(DataError, match="WikiText-2 is not at hand"):
        data.wikitext("train")  # an empty file is none


def test_there_is_always_a_text() -> None:
    first, second = data.text(), data.text()
    assert first == second
    assert len(first.text) == 1_000_000
    assert "standard library" in first.name
    assert "def " in first.text


def test_what_is_not_at_hand_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for load, library in ((data.mnist, "torchvision"), (data.shakespeare, "datasets"), (data.wikitext, "datasets")):
        with pytest.raises(DataError, match=rf"set POLYAK_DATA to a folder.*or install {library}"):
            load()
    monkeypatch.setenv("POLYAK_DATA", str(tmp_path / "absent"))
    with pytest.raises(DataError, match="POLYAK_DATA must name a folder"):
        data.text()


def test_public_loaders_are_asked_last(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def load_dataset(*where: str, **options: str) -> dict[str, list[dict[str, str]]]:
        asked.append((where, options))
        return {split: [{"text": split[0]}] for split in ("train", "validation", "test")}

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    assert data.shakespeare() == "tvt"
    assert data.wikitext() == "v"
    assert [where[0] for where, _ in asked] == ["karpathy/tiny_shakespeare", "Salesforce/wikitext"]

    def unreachable(*_: str) -> None:
        raise ConnectionError("no network")

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=unreachable))
    with pytest.raises(DataError, match=r"datasets could not load it \(no network\)"):
        data.wikitext()


def test_mnist_through_torchvision(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    def mnist(root: Path, *, train: bool, download: bool) -> SimpleNamespace:
        assert download
        return SimpleNamespace(data=torch.zeros(2, 28, 28, dtype=torch.uint8), targets=torch.tensor([int(train), 5]))

    monkeypatch.setitem(sys.modules, "torchvision", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "torchvision.datasets", SimpleNamespace(MNIST=mnist))
    images, labels = data.mnist("train")
    assert images.shape == (2, 28, 28)
    assert labels.tolist() == [1, 5]
