"""Data sets by name, and batches of them.

data = load("mnist")
for rows in batches(len(data.train_labels), 64, seed=0, epoch=3):
    images, labels = data.train_images[rows], data.train_labels[rows]
"""

from __future__ import annotations

from collections.abc import Callable

from branchgraph.data.batches import batches
from branchgraph.data.dataset import Dataset
from branchgraph.data.digits import load_digits
from branchgraph.data.mnist import load_mnist
from branchgraph.ir.errors import MissingError

__all__ = ["Dataset", "batches", "datasets", "load"]

_LOADERS: dict[str, Callable[[], Dataset]] = {"digits": load_digits, "mnist": load_mnist}


def datasets() -> list[str]:
    """Names that `load` knows, sorted."""
    return sorted(_LOADERS)


def load(name: str) -> Dataset:
    """The data set `name`, or `MissingError` listing those there are."""
    if name not in _LOADERS:
        raise MissingError(f"no data set {name!r}; there are: {', '.join(datasets())}")
    return _LOADERS[name]()
