"""Data sets by name, and batches of them.

data = load("mnist")
for rows in batches(len(data.train_labels), 64, seed=0, epoch=3):
    images, labels = data.train_images[rows], data.train_labels[rows]

A name takes options: `load("cifar10:classes=2,train=1000")` keeps the first two classes, and of
these the first thousand examples for training.
"""

from __future__ import annotations

from typing import Protocol

from branchgraph.data.batches import batches
from branchgraph.data.cifar import load_cifar10, load_cifar100
from branchgraph.data.dataset import Dataset
from branchgraph.data.digits import load_digits
from branchgraph.data.mnist import load_mnist
from branchgraph.ir.errors import MissingError
from branchgraph.ir.spec import arguments_for, parse_spec

__all__ = ["Dataset", "batches", "datasets", "load"]

#: What may be said after the name of a data set.
OPTIONS = {"classes": int | None, "train": int | None, "test": int | None}


class _Loader(Protocol):
    def __call__(
        self, *, classes: int | None = None, train: int | None = None, test: int | None = None
    ) -> Dataset: ...


_LOADERS: dict[str, _Loader] = {
    "cifar10": load_cifar10,
    "cifar100": load_cifar100,
    "digits": lambda **options: load_digits().subset(**options),
    "mnist": lambda **options: load_mnist().subset(**options),
}


def datasets() -> list[str]:
    """Names that `load` knows, sorted."""
    return sorted(_LOADERS)


def load(spec: str) -> Dataset:
    """The data set `spec`, a name or `NAME:KEY=VALUE,...` with options classes, train and test.

    Raises `MissingError` listing the data sets there are, or naming the files that are not there,
    and `FormatError` for options that do not fit and files that are broken.
    """
    name, raw = parse_spec(spec)
    if name not in _LOADERS:
        raise MissingError(f"no data set {name!r}; there are: {', '.join(datasets())}")
    return _LOADERS[name](**arguments_for(raw, OPTIONS, name))
