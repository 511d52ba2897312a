"""A data set: images and labels for training and for test, checked once when it is made."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from branchgraph.ir.errors import FormatError


@dataclass(frozen=True, eq=False)
class Dataset:
    """Images [n, channels, height, width], float32, and labels [n], int64, in 0..classes-1.

    Raises `FormatError` on construction when shapes or dtypes disagree, an image is not finite, or
    a label is outside its range.
    """

    name: str
    classes: int
    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray

    def __post_init__(self) -> None:
        for part, images, labels in self._parts():
            _check(f"{self.name}, {part}", images, labels, self.classes)
        if self.train_images.shape[1:] != self.test_images.shape[1:]:
            raise FormatError(
                f"{self.name}: images of {list(self.train_images.shape[1:])} for training, "
                f"of {list(self.test_images.shape[1:])} for test; both need one shape"
            )

    def _parts(self) -> tuple[tuple[str, np.ndarray, np.ndarray], ...]:
        return (
            ("training", self.train_images, self.train_labels),
            ("test", self.test_images, self.test_labels),
        )

    @property
    def image_shape(self) -> tuple[int, ...]:
        """Channels, height and width of one image."""
        return tuple(self.train_images.shape[1:])

    def subset(
        self, train: int | None = None, test: int | None = None, classes: int | None = None
    ) -> Dataset:
        """The first `classes` classes, and of these the first `train` and `test` examples.

        Everything where None. For trials, quick tests, and networks with fewer outputs.
        """
        whole = self if classes is None else self._first_classes(classes)
        for what, wanted, there in (
            ("train", train, len(whole.train_labels)),
            ("test", test, len(whole.test_labels)),
        ):
            if wanted is not None and not 0 <= wanted <= there:
                raise FormatError(f"{self.name}: expected {what} in 0..{there}, got {wanted}")
        return replace(
            whole,
            train_images=whole.train_images[:train],
            train_labels=whole.train_labels[:train],
            test_images=whole.test_images[:test],
            test_labels=whole.test_labels[:test],
        )

    def _first_classes(self, classes: int) -> Dataset:
        if not 1 <= classes <= self.classes:
            raise FormatError(f"{self.name}: expected classes in 1..{self.classes}, got {classes}")
        train, test = self.train_labels < classes, self.test_labels < classes
        return replace(
            self,
            classes=classes,
            train_images=self.train_images[train],
            train_labels=self.train_labels[train],
            test_images=self.test_images[test],
            test_labels=self.test_labels[test],
        )

    def __repr__(self) -> str:
        return (
            f"<Dataset {self.name}: {len(self.train_labels)} + {len(self.test_labels)} images "
            f"{list(self.image_shape)}, {self.classes} classes>"
        )


def _check(what: str, images: np.ndarray, labels: np.ndarray, classes: int) -> None:
    if images.ndim != 4 or images.dtype != np.float32:
        raise FormatError(
            f"{what}: expected float32 images [n, channels, height, width], "
            f"got {images.dtype} {list(images.shape)}"
        )
    if labels.shape != images.shape[:1] or labels.dtype != np.int64:
        raise FormatError(
            f"{what}: expected int64 labels [{len(images)}], one an image, "
            f"got {labels.dtype} {list(labels.shape)}"
        )
    # NaN comes through both extremes; a mask would be as large as the images.
    if not np.isfinite([images.min(initial=0), images.max(initial=0)]).all():
        raise FormatError(f"{what}: images hold NaN or infinity; check where they come from")
    if labels.size and not 0 <= labels.min() <= labels.max() < classes:
        raise FormatError(
            f"{what}: expected labels in 0..{classes - 1}, got {labels.min()}..{labels.max()}"
        )
