"""MNIST: 60 000 + 10 000 handwritten digits, 28x28, from the four original idx files.

Source: Y. LeCun, L. Bottou, Y. Bengio, P. Haffner, "Gradient-based learning applied to document
recognition", Proceedings of the IEEE 86 (1998).
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from branchgraph.data.dataset import Dataset
from branchgraph.data.folder import data_folder
from branchgraph.data.idx import read_idx
from branchgraph.ir.errors import FormatError, MissingError

_FILES = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)
_CLASSES = 10


def load_mnist(folder: str | os.PathLike[str] | None = None) -> Dataset:
    """MNIST with images byte/255, float32 [n, 1, 28, 28], and labels int64 [n].

    Looks in `folder`, else in `mnist` under the data folder, for the four files with or without
    `.gz`. Raises `MissingError` naming what is not there, `FormatError` for files that are broken.
    """
    train_images, train_labels, test_images, test_labels = (
        _images(path) if "images" in path.name else _labels(path) for path in found(folder)
    )
    return Dataset("mnist", _CLASSES, train_images, train_labels, test_images, test_labels)


def found(folder: str | os.PathLike[str] | None = None) -> list[Path]:
    """The four files that are read, training before test and images before labels."""
    place = data_folder("mnist") if folder is None else Path(folder)
    return [_find(place, name) for name in _FILES]


def _find(place: Path, name: str) -> Path:
    for candidate in (place / name, place / f"{name}.gz"):
        if candidate.exists():
            return candidate
    raise MissingError(
        f"MNIST: no {name} or {name}.gz in {place}; expected the files {', '.join(_FILES)}, each "
        "plain or .gz. Run: branchgraph data fetch mnist, or put the files there, or set "
        "BRANCHGRAPH_DATA to the folder that holds mnist/ with them"
    )


def _images(path: Path) -> np.ndarray:
    images = read_idx(path)
    if images.ndim != 3 or images.dtype != np.uint8 or images.shape[1:] != (28, 28):
        raise FormatError(
            f"{path}: expected uint8 images [n, 28, 28], got {images.dtype} {list(images.shape)}; "
            "download the file again"
        )
    scaled = images[:, None].astype(np.float32)
    scaled /= np.float32(255)
    return scaled


def _labels(path: Path) -> np.ndarray:
    labels = read_idx(path)
    if labels.ndim != 1 or labels.dtype != np.uint8:
        raise FormatError(
            f"{path}: expected uint8 labels [n], got {labels.dtype} {list(labels.shape)}; "
            "download the file again"
        )
    return labels.astype(np.int64)
